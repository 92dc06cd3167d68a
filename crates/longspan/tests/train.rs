//! Training as its users meet it: a run that is killed at any moment goes on as if nothing had happened.

use std::path::Path;
use std::process::{Command, Output, Stdio};

const CONFIG: &str = r#"
seed = 3
save_every = 3
[model]
kind = "stack"
d_model = 16
layers = 2
mlp_ratio = 2.0
mixer = { kind = "mamba2", head_dim = 8, state_size = 4, chunk_size = 8 }
[data]
kind = "task"
task = { task = "copy", variant = "cmc", symbols = 5 }
lengths = [1, 6]
examples = 4
[optim]
name = "adamw"
lr = 3e-3
[train]
steps = 40
micro_batches = 2
ranks = 2
[eval]
every = 20
lengths = [3]
examples = 4
"#;

fn longspan(folder: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_longspan"));
    command.args(words).current_dir(folder).stdin(Stdio::null());
    command.env("LONGSPAN_CONFIG", "/nonexistent/longspan.toml");
    command
}

fn run(folder: &Path, words: &[&str]) -> Output {
    longspan(folder, words).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// (step, loss as written) of all step events.
fn losses(run: &Path) -> Vec<(u64, String)> {
    std::fs::read_to_string(run.join("events.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .filter(|event| event["event"] == "step")
        .map(|event| (event["step"].as_u64().unwrap(), event["loss"].to_string()))
        .collect()
}

#[test]
fn a_killed_run_goes_on_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    std::fs::write(at.join("copy.toml"), CONFIG).unwrap();
    let whole = run(at, &["train", "copy.toml", "--out", "whole"]);
    assert!(whole.status.success(), "{}", text(&whole.stderr));
    assert!(
        text(&whole.stdout).contains("tokens/s"),
        "{}",
        text(&whole.stdout)
    );
    // Killed once a few steps are on disk, twice.
    for steps in [5, 17] {
        let mut child = longspan(at, &["train", "copy.toml", "--out", "killed"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        loop {
            let log = std::fs::read(at.join("killed/events.jsonl")).unwrap_or_default();
            let written = log.iter().filter(|&&byte| byte == b'\n').count();
            if written >= steps || child.try_wait().unwrap().is_some() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        // SIGKILL: nothing can be cleaned up.
        let _ = child.kill();
        child.wait().unwrap();
    }
    let rest = run(at, &["train", "copy.toml", "--out", "killed"]);
    assert!(rest.status.success(), "{}", text(&rest.stderr));
    assert_eq!(losses(&at.join("whole")).len(), 40);
    assert_eq!(losses(&at.join("whole")), losses(&at.join("killed")));
    let model =
        |run: &str| std::fs::read(at.join(run).join("step-000040/model.safetensors")).unwrap();
    assert!(
        model("whole") == model("killed"),
        "the final weights differ"
    );
    // What the runs left is listed, shown and drawn.
    let list = run(at, &["runs", "ls", "."]);
    assert!(
        text(&list.stdout).contains("step 40"),
        "{}",
        text(&list.stderr)
    );
    let shown = text(&run(at, &["runs", "show", "whole"]).stdout);
    assert!(
        shown.contains("exact at length 3") && shown.contains("step-000040"),
        "{shown}"
    );
    let drawn = run(
        at,
        &["runs", "plot", "whole", "killed", "--out", "loss.html"],
    );
    assert!(drawn.status.success(), "{}", text(&drawn.stderr));
    assert!(
        std::fs::read_to_string(at.join("loss.html"))
            .unwrap()
            .contains("<svg")
    );
}

#[test]
fn what_is_wrong_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    for (from, to, says) in [
        ("head_dim = 8", "head_dim = 7", "mamba2"),
        ("ranks = 2", "ranks = 3", "train.ranks"),
        ("lr = 3e-3", "lr = -1.0", "optim.lr"),
        ("symbols = 5", "symbol = 5", "symbol"),
        ("kind = \"mamba2\"", "kind = \"mamba3\"", "mamba3"),
    ] {
        std::fs::write(at.join("wrong.toml"), CONFIG.replace(from, to)).unwrap();
        let output = run(at, &["train", "wrong.toml", "--out", "wrong"]);
        assert_eq!(output.status.code(), Some(1), "{to}");
        let error = text(&output.stderr);
        assert!(error.contains(says), "{to}: {error}");
    }
    let output = run(at, &["reproduce", "nothing"]);
    assert!(
        text(&output.stderr).contains("s4"),
        "{}",
        text(&output.stderr)
    );
    let output = run(at, &["train", "missing.toml"]);
    assert!(text(&output.stderr).contains("missing.toml"));
}
