//! `bench dialogue` on a tiny model: figures of all tasks, going on where a run stopped, refusals.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn run(args: &[&str]) -> Output {
    let golden = std::env::var_os("LONGSPAN_GOLDEN").map(PathBuf::from);
    let golden =
        golden.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"));
    Command::new(env!("CARGO_BIN_EXE_longspan"))
        .args(["bench", "dialogue"])
        .args(args)
        .arg("--model")
        .arg(golden.join("tiny-models/gguf-llama/model.gguf"))
        .stdin(Stdio::null())
        .env("LONGSPAN_CONFIG", "/nonexistent/longspan.toml")
        .env_remove("LONGSPAN_CPU")
        .output()
        .unwrap()
}

#[test]
fn sessions_are_held_once_and_told_by_method() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out").display().to_string();
    // The published format, in small letters: the tiny vocabulary has no others.
    let talk = folder.path().join("talk.jsonl");
    let row = |id: String, stem: &str| {
        let choices = [("A", "an apple"), ("B", "a lemon")];
        let choices =
            choices.map(|(label, text)| serde_json::json!({"label": label, "text": text}));
        serde_json::json!({"id": id, "question": {"stem": stem, "choices": choices}, "answerKey": "A"})
            .to_string()
    };
    let rows = (0..3).flat_map(|n| {
        [
            row(format!("key_{n}"), "i bought an apple."),
            row(format!("{n}"), "what is sour?"),
            row(format!("answer_{n}"), "what did i buy?"),
        ]
    });
    std::fs::write(&talk, rows.collect::<Vec<_>>().join("\n")).unwrap();
    let talk = talk.display().to_string();
    let args = [
        "--tasks",
        "grocery",
        "--file",
        &talk,
        "--method",
        "full",
        "--method",
        "sinks:4,60",
        "--plain",
        "--out",
        &out,
        "--json",
    ];
    let first = run(&args);
    let said = String::from_utf8_lossy(&first.stderr).into_owned();
    assert!(first.status.success(), "{said}");
    let lines: Vec<serde_json::Value> = (String::from_utf8_lossy(&first.stdout).lines())
        .map(|line| serde_json::from_str(line).expect("a JSON object a line"))
        .collect();
    assert_eq!(lines.len(), 2);
    for line in &lines {
        assert_eq!((&line["sessions"], &line["turns"]), (&3.into(), &9.into()));
    }
    let store = Path::new(&out).join("sessions.jsonl");
    let stored = std::fs::read_to_string(&store).unwrap();
    assert_eq!(stored.lines().count(), 6);
    // A run that was killed: half a line is left, and one session is missing.
    let kept: Vec<&str> = stored.lines().take(5).collect();
    std::fs::write(&store, kept.join("\n") + "\n{\"setup\": \"half").unwrap();
    let again = run(&args);
    assert!(again.status.success());
    let lines = String::from_utf8_lossy(&again.stdout).lines().count();
    assert_eq!(lines, 2);

    for (args, word) in [
        (&["--tasks", "chess"][..], "rock-paper-scissors"),
        (&["--cache", "3"], "--cache 3"),
        (&["--file", "none.jsonl"], "--file holds one task"),
    ] {
        let refused = run(&[args, &["--out", &out]].concat());
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains(word), "{said}");
    }
}
