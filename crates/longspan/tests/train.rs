//! Training as its users meet it: a run that is killed at any moment goes on as if nothing had happened.

mod training;

use std::path::Path;
use std::process::{Command, Output, Stdio};
use training::{config, text};

/// Forty steps by two ranks, with a look at the middle.
fn copying() -> String {
    config(
        3,
        4,
        "steps = 40\nmicro_batches = 2\nranks = 2",
        "[eval]\nevery = 20\nlengths = [3]\nexamples = 4",
    )
}

fn longspan(folder: &Path, words: &[&str]) -> Command {
    let mut command = training::command(env!("CARGO_BIN_EXE_longspan"), folder);
    command.args(words);
    command
}

fn run(folder: &Path, words: &[&str]) -> Output {
    longspan(folder, words).output().unwrap()
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
    std::fs::write(at.join("copy.toml"), copying()).unwrap();
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
        std::fs::write(at.join("wrong.toml"), copying().replace(from, to)).unwrap();
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

const TEXT: &str = r#"
seed = 1
[model]
MODEL
[data]
kind = "text"
files = ["text.txt"]
length = 48
tokens = 192
[optim]
name = "adamw"
lr = 1e-2
[train]
steps = 60
"#;

#[test]
fn what_was_trained_generates() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    std::fs::write(at.join("text.txt"), "round and round it goes, ".repeat(40)).unwrap();
    let stack = |mixer: &str| {
        format!(
            "kind = \"stack\"\nd_model = 32\nlayers = 2\nmlp_ratio = 2.0\nmixer = {{ {mixer} }}"
        )
    };
    let decoder = "kind = \"decoder\"\nstd = 0.1\nconfig = { model_type = \"llama\", hidden_size = 32, \
                   intermediate_size = 64, num_hidden_layers = 2, num_attention_heads = 2, rms_norm_eps = 1e-6, \
                   tie_word_embeddings = true, max_position_embeddings = 64, hidden_act = \"silu\" }";
    for (name, model) in [
        (
            "mamba2",
            stack("kind = \"mamba2\", head_dim = 16, state_size = 8, chunk_size = 16"),
        ),
        (
            "s4",
            stack("kind = \"s4\", d_state = 16, l_max = 48, dt_transform = \"exp\""),
        ),
        ("gru", stack("kind = \"rnn\", cell = \"gru\"")),
        ("decoder", decoder.to_string()),
    ] {
        let config = format!("{name}.toml");
        std::fs::write(at.join(&config), TEXT.replace("MODEL", &model)).unwrap();
        let trained = run(at, &["train", &config, "--out", name]);
        assert!(
            trained.status.success(),
            "{name}: {}",
            text(&trained.stderr)
        );
        let prompt = "round and round it goes, round and rou";
        let words = [
            "generate",
            prompt,
            "--model",
            name,
            "--max-tokens",
            "6",
            "--temperature",
            "0",
        ];
        let written = run(at, &words);
        assert!(
            written.status.success(),
            "{name}: {}",
            text(&written.stderr)
        );
        assert!(
            text(&written.stdout).contains("nd it "),
            "{name}: {}",
            text(&written.stdout)
        );
        let shown = text(&run(at, &["info", "--model", name]).stdout);
        assert!(shown.contains("256"), "{name}: {shown}");
        if name != "decoder" {
            // What needs cached keys is refused, and says why.
            let words = [&words[..], &["--context", "infllm"]].concat();
            let refused = run(at, &words);
            assert!(!refused.status.success());
            assert!(
                text(&refused.stderr).contains("state"),
                "{}",
                text(&refused.stderr)
            );
        }
    }
}
