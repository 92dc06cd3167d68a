//! The program as its users meet it, on a tiny GGUF model: answers, sessions, and what it says
//! when something is wrong.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn model() -> PathBuf {
    let golden = std::env::var_os("LONGSPAN_GOLDEN").map(PathBuf::from);
    let golden =
        golden.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"));
    golden.join("tiny-models/gguf-llama/model.gguf")
}

fn longspan(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_longspan"));
    command
        .args(words)
        .arg("--model")
        .arg(model())
        .stdin(Stdio::null());
    command.env("LONGSPAN_CONFIG", "/nonexistent/longspan.toml");
    command.env_remove("LONGSPAN_CPU");
    command
}

fn run(words: &[&str]) -> Output {
    longspan(words).output().unwrap()
}

fn fails(words: &[&str], code: i32, says: &[&str]) {
    let output = run(words);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{words:?}: {error}");
    for text in says {
        assert!(
            error.contains(text),
            "{words:?} does not say {text:?}:\n{error}"
        );
    }
}

fn file(folder: &Path, name: &str, bytes: &[u8]) -> String {
    let path = folder.join(name);
    std::fs::write(&path, bytes).unwrap();
    path.display().to_string()
}

#[test]
fn a_document_is_read_and_the_answer_streams() {
    let folder = tempfile::tempdir().unwrap();
    let text = file(folder.path(), "a.txt", b"abc abc abc");
    let output = run(&["ask", &text, "abc?", "--max-tokens", "4", "--json"]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["context"]["policy"], "full");
    assert!(value["answer_tokens"].as_u64().unwrap() >= 1);
    assert!(value["kv_memory_bytes"].as_u64().unwrap() > 0);
}

#[test]
fn a_prepared_session_answers_as_a_fresh_reading_does() {
    let folder = tempfile::tempdir().unwrap();
    let text = file(folder.path(), "a.txt", "abcd ".repeat(8).as_bytes());
    let session = folder.path().join("s").display().to_string();
    let words = ["--max-tokens", "6", "--json"];
    let fresh = run(&[
        &["ask", &text, "abc?", "--context", "window:16"][..],
        &words,
    ]
    .concat());
    assert!(
        fresh.status.success(),
        "{}",
        String::from_utf8_lossy(&fresh.stderr)
    );
    let prepared = run(&[
        "prepare",
        &text,
        "--session",
        &session,
        "--context",
        "window:16",
    ]);
    assert!(
        prepared.status.success(),
        "{}",
        String::from_utf8_lossy(&prepared.stderr)
    );
    let answer = |output: Output| -> serde_json::Value {
        let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        value["answer"].clone()
    };
    let fresh = answer(fresh);
    // Twice: asking leaves the session as it is.
    for _ in 0..2 {
        let asked = run(&[&["ask", "--session", &session, "abc?"][..], &words].concat());
        assert!(
            asked.status.success(),
            "{}",
            String::from_utf8_lossy(&asked.stderr)
        );
        assert_eq!(answer(asked), fresh);
    }
    // Another text's session does not replace it.
    let other = file(folder.path(), "b.txt", b"dcba dcba");
    let words = [
        "prepare",
        &other,
        "--session",
        &session,
        "--context",
        "window:16",
    ];
    fails(&words, 1, &["another text", "delete the folder"]);
    assert!(
        run(&["ask", "--session", &session, "abc?", "--max-tokens", "2"])
            .status
            .success()
    );
    std::fs::write(Path::new(&session).join("index"), b"no index").unwrap();
    fails(
        &["ask", "--session", &session, "abc?"],
        1,
        &["index", "prepare it again"],
    );
}

#[test]
fn mistakes_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let text = file(folder.path(), "a.txt", b"abc");
    let empty = file(folder.path(), "empty.txt", b" \n ");
    let binary = file(
        folder.path(),
        "b.txt",
        &[0u8, 1, 2, 3, 0, 0, 255, 254, 7, 0].repeat(100),
    );
    fails(
        &["ask", "/no/such/file.txt", "q"],
        1,
        &["/no/such/file.txt"],
    );
    fails(&["ask", &empty, "q"], 1, &["empty.txt"]);
    fails(&["ask", &binary, "q"], 1, &["b.txt", "binary"]);
    fails(
        &["ask", &text, "q", "--max-bytes", "2"],
        1,
        &["a.txt", "--max-bytes"],
    );
    fails(&["ask", &text], 1, &["FILE... QUESTION"]);
    fails(&["ask"], 2, &["required"]);
    fails(
        &["ask", &text, &"q".repeat(100_000)],
        1,
        &["window", "question"],
    );
    fails(
        &["ask", &text, "q", "--context", "magic"],
        1,
        &["unknown policy", "infllm"],
    );
    fails(
        &["ask", &text, "q", "--kv", "int3"],
        1,
        &["--kv int3", "int8"],
    );
    fails(&["ask", &text, "q", "--top-p", "2"], 1, &["top_p"]);
    fails(
        &["ask", &text, "q", "--max-tokens", "0"],
        1,
        &["--max-tokens"],
    );
    fails(
        &["ask", "--session", "/no/session", "q"],
        1,
        &["/no/session", "longspan prepare"],
    );
    fails(&["generate", ""], 1, &["prompt is empty"]);
    fails(&["generate", "a", "--threads", "0"], 1, &["--threads"]);
    let two_gb = folder.path().join("huge.txt");
    std::fs::File::create(&two_gb)
        .unwrap()
        .set_len(2 << 30)
        .unwrap();
    fails(
        &["ask", &two_gb.display().to_string(), "q"],
        1,
        &["huge.txt", "--max-bytes"],
    );

    let output = longspan(&["generate", "a"])
        .env("LONGSPAN_CPU", "mmx")
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && error.contains("mmx") && error.contains("portable"),
        "{error}"
    );
}

#[test]
fn an_option_that_a_command_does_not_read_is_refused() {
    let refused = |words: &[&str]| {
        let output = run_alone(words);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{words:?}: {error}");
        let option = words.iter().rev().nth(1).unwrap();
        let says = format!("unexpected argument '{option}'");
        assert!(error.contains(&says), "{words:?}: {error}");
    };
    for command in [
        "pull",
        "models",
        "papers",
        "trace show a.jsonl",
        "memory show",
        "search . x",
        "score a",
        "report a",
        "compare a",
        "runs ls",
        "bench attention",
    ] {
        let words: Vec<&str> = command.split(' ').collect();
        for option in [["--model", "x"], ["--context", "full"], ["--device", "cpu"]] {
            refused(&[&words[..], &option].concat());
        }
    }
    for command in [
        "train a.toml",
        "reproduce s4",
        "bench mixers s4",
        "bench train",
    ] {
        let words: Vec<&str> = command.split(' ').collect();
        for option in [["--model", "x"], ["--context", "full"]] {
            refused(&[&words[..], &option].concat());
        }
    }
    for command in ["info", "data passkey --out a"] {
        let words: Vec<&str> = command.split(' ').collect();
        for option in [["--kv", "f16"], ["--rope", "ntk:2"], ["--threads", "1"]] {
            refused(&[&words[..], &option].concat());
        }
    }
    for command in ["context", "depth", "questions", "dialogue"] {
        refused(&["bench", command, "--context", "full"]);
    }
    // One object in place of text is what every command can print, but for a shell's script.
    let output = run_alone(&["completions", "bash", "--json"]);
    assert!(!output.status.success());
}

fn run_alone(words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_longspan"));
    command
        .args(words)
        .env("LONGSPAN_CONFIG", "/nonexistent/longspan.toml");
    command.stdin(Stdio::null()).output().unwrap()
}

#[test]
fn a_model_that_is_none_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let whole = std::fs::read(model()).unwrap();
    let cut = file(folder.path(), "cut.gguf", &whole[..whole.len() / 2]);
    for (spec, says) in [
        (cut.as_str(), "cut.gguf"),
        ("no-such-alias", "smollm2-135m"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_longspan"))
            .args(["info", "--model", spec])
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && error.contains(says),
            "{spec}: {error}"
        );
    }
}

#[test]
fn a_full_disk_and_a_forbidden_folder_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let text = file(folder.path(), "a.txt", b"abc");
    let blocked = file(folder.path(), "blocked", b"a file where a folder should be");
    let session = format!("{blocked}/s");
    fails(&["prepare", &text, "--session", &session], 1, &["blocked"]);
    // A file that cannot grow stands for a full disk.
    if Path::new("/dev/full").exists() {
        let session = folder.path().join("full");
        std::fs::create_dir(&session).unwrap();
        std::os::unix::fs::symlink("/dev/full", session.join("hot-1")).unwrap();
        fails(
            &[
                "prepare",
                &text,
                "--context",
                "full",
                "--session",
                &session.display().to_string(),
            ],
            1,
            &["hot-1", "space"],
        );
        assert!(!session.join("index").exists());
    }
}
