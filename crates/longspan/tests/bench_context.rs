//! `bench context` on a tiny model: cells, reasons, files, and going on where a run stopped.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn run(args: &[&str]) -> Output {
    let golden = std::env::var_os("LONGSPAN_GOLDEN").map(PathBuf::from);
    let golden =
        golden.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"));
    Command::new(env!("CARGO_BIN_EXE_longspan"))
        .args(args)
        .arg("--model")
        .arg(golden.join("tiny-models/gguf-llama/model.gguf"))
        .stdin(Stdio::null())
        .env("LONGSPAN_CONFIG", "/nonexistent/longspan.toml")
        .env_remove("LONGSPAN_CPU")
        .output()
        .unwrap()
}

fn cells(out: &Output) -> Vec<serde_json::Value> {
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let text = String::from_utf8_lossy(&out.stdout);
    let lines = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("a JSON object a line"));
    lines.collect()
}

#[test]
fn cells_are_measured_once_and_refusals_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let out: PathBuf = folder.path().join("out");
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "abcd efgh ".repeat(60)).unwrap();
    let (out, text) = (out.display().to_string(), text.display().to_string());
    let args = [
        "bench",
        "context",
        "--text",
        &text,
        "--lengths",
        "64,96",
        "--methods",
        "window:24,full,sinks:2,20,infllm:n_local=4000",
        "--measure",
        "cost,loss",
        "--decode",
        "4",
        "--out",
        &out,
        "--json",
    ];
    let first = cells(&run(&args));
    let of = |method: &str, length: u64| {
        let found = first.iter().find(|cell| {
            cell["method"]
                .as_str()
                .is_some_and(|name| name.starts_with(method))
                && cell["length"] == length
        });
        found.unwrap_or_else(|| panic!("{method} at {length} is missing"))
    };
    for length in [64, 96] {
        // Full attention is measured first, so that the others can be compared with it.
        for method in ["full", "window", "sinks"] {
            let cell = of(method, length);
            assert!(cell["cost"]["kv_memory_bytes"].as_u64().unwrap() > 0);
            assert_eq!(cell["cost"]["decoded"], 4);
            assert!(cell["loss"]["nll"].as_f64().unwrap() > 0.0);
        }
        assert!(of("window", length)["cost"]["kl"].as_f64().unwrap() > 0.0);
        assert!(of("full", length)["cost"]["kl"].is_null());
        assert!(
            of("infllm", length)["refused"]
                .as_str()
                .unwrap()
                .contains("n_local")
        );
    }
    assert!(
        first
            .iter()
            .any(|row| row["what"] == "seconds to read" && row["slope"].is_number())
    );

    let store = Path::new(&out).join("cells.jsonl");
    let before = std::fs::read_to_string(&store).unwrap();
    assert_eq!(before.lines().count(), 8);
    assert!(
        std::fs::read_to_string(Path::new(&out).join("context.html"))
            .unwrap()
            .contains("<svg")
    );

    // A killed run's half line goes; the other cells stay as they are.
    let lines: Vec<&str> = before.lines().collect();
    std::fs::write(&store, lines[..6].join("\n") + "\n" + &lines[6][..20]).unwrap();
    let second = cells(&run(&args));
    let after = std::fs::read_to_string(&store).unwrap();
    assert_eq!(after.lines().count(), 8);
    assert_eq!(after.lines().take(6).collect::<Vec<_>>(), lines[..6]);
    assert_eq!(first[0], second[0]);
}

#[test]
fn mistakes_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out").display().to_string();
    for (args, word) in [
        (&["--lengths", "0"][..], "no length"),
        (&["--lengths", "32"], "at least 64"),
        (&["--methods", "magic"], "unknown policy"),
        (&["--decode", "0"], "at least 1"),
    ] {
        let args = [&["bench", "context", "--out", &out][..], args].concat();
        let output = run(&args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(word), "{error}");
    }
}
