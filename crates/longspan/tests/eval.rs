//! `eval`, `score`, `report`, `compare` as their users meet them, on a tiny model and without one.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn model() -> PathBuf {
    let golden = std::env::var_os("LONGSPAN_GOLDEN").map(PathBuf::from);
    let golden =
        golden.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"));
    golden.join("tiny-models/gguf-llama/model.gguf")
}

fn run(folder: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_longspan"))
        .args(words)
        .current_dir(folder)
        .stdin(Stdio::null())
        .env("LONGSPAN_CONFIG", "/nonexistent/longspan.toml")
        .env("LONGSPAN_EVAL_CACHE", folder.join("cache"))
        .env_remove("LONGSPAN_CPU")
        .output()
        .unwrap()
}

fn succeeds(folder: &Path, words: &[&str]) -> String {
    let output = run(folder, words);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{words:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn fails(folder: &Path, words: &[&str], code: i32, says: &str) {
    let output = run(folder, words);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{words:?}: {error}");
    assert!(
        error.contains(says),
        "{words:?} does not say {says:?}:\n{error}"
    );
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[test]
fn the_shipped_samples_run_without_a_model() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let list = succeeds(folder, &["eval", "list"]);
    for name in [
        "passkey",
        "needle/shared",
        "ruler/qa_2",
        "threading/branched",
        "perplexity",
        "lines",
        "altered-qa",
    ] {
        assert!(
            list.lines().any(|line| line.starts_with(name)),
            "{name} is not in\n{list}"
        );
    }
    let words = [
        "eval",
        "ruler",
        "threading",
        "passkey",
        "--sample",
        "--out",
        "best",
        "--target",
        "oracle",
        "--json",
    ];
    let best = json(&succeeds(folder, &words));
    let cells = best["cells"].as_array().unwrap();
    assert_eq!(cells.len(), 20);
    for cell in cells {
        assert_eq!(cell["aggregates"][0]["value"], 1.0, "{cell}");
    }
    succeeds(
        folder,
        &[
            "eval", "ruler", "--sample", "--out", "worst", "--target", "constant",
        ],
    );
    for name in ["report.html", "report.md", "report.json"] {
        assert!(
            folder.join("best").join(name).metadata().unwrap().len() > 500,
            "{name}"
        );
    }
    let html = std::fs::read_to_string(folder.join("best/report.html")).unwrap();
    assert!(html.contains("<svg") && html.contains("depth of the answer"));

    let scores = succeeds(folder, &["score", "worst"]);
    assert!(scores.contains("ruler/vt") && scores.contains("0.000"));
    let compared = succeeds(folder, &["compare", "best", "worst", "--json"]);
    let first = json(compared.lines().next().unwrap());
    assert_eq!(first["paired"]["difference"]["value"], -1.0);
    fails(
        folder,
        &["compare", "best", "worst", "--max-drop", "0.5"],
        1,
        "largest drop is 1.0000",
    );
    fails(folder, &["compare", "best"], 2, "name a second run");

    let gates = "[[gate]]\ntask = \"ruler/vt\"\nmin = 0.9\n";
    std::fs::write(folder.join("gates.toml"), gates).unwrap();
    succeeds(folder, &["report", "best", "--gate", "gates.toml"]);
    fails(
        folder,
        &["report", "worst", "--gate", "gates.toml"],
        1,
        "expected at least 0.9",
    );
    succeeds(folder, &["report", "best", "worst", "--out", "both"]);
    let both = std::fs::read_to_string(folder.join("both/report.md")).unwrap();
    assert!(
        both.contains("| oracle |") && both.contains("| constant |"),
        "{both}"
    );
}

#[test]
fn predictions_made_elsewhere_are_scored() {
    let dir = tempfile::tempdir().unwrap();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/ruler/pred");
    let words = [
        "score",
        "ruler",
        "--pred",
        fixtures.to_str().unwrap(),
        "--json",
    ];
    let found = json(&succeeds(dir.path(), &words));
    let official = &found["aggregates"][1];
    assert_eq!(
        (&official["name"], &official["value"]),
        (&"official (0-100)".into(), &62.5.into())
    );
    fails(
        dir.path(),
        &["score", "ruler", "--pred", "none"],
        2,
        "found no predictions",
    );
}

#[test]
fn a_model_is_measured_and_the_run_is_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let model = model().display().to_string();
    let words = [
        "eval",
        "passkey",
        "perplexity",
        "--lengths",
        "500",
        "--depths",
        "2",
        "--out",
        "run",
        "--policy",
        "full",
        "--policy",
        "window:64",
        "--model",
        &model,
        "--json",
    ];
    let found = json(&succeeds(folder, &words));
    let cells = found["cells"].as_array().unwrap();
    assert_eq!(cells.len(), 4);
    let perplexity = |policy: &str| {
        let cell = cells
            .iter()
            .find(|c| c["task"] == "perplexity" && c["policy"] == policy)
            .unwrap();
        cell["aggregates"][0]["value"].as_f64().unwrap()
    };
    assert!(perplexity("full") > 1.0 && perplexity("full") != perplexity("window:size=64"));
    // What is done is not done again: the cost file does not grow.
    let costs = || -> u64 {
        let files = std::fs::read_dir(folder.join("run/cells")).unwrap();
        files.map(|f| f.unwrap().metadata().unwrap().len()).sum()
    };
    let before = costs();
    assert_eq!(json(&succeeds(folder, &words)), found);
    assert_eq!(costs(), before);
    let compared = succeeds(folder, &["compare", "run"]);
    assert!(compared.contains("passkey at 500"), "{compared}");
    let mut other = words;
    other[4] = "600";
    fails(folder, &other, 2, "other options");
}

#[test]
fn mistakes_are_named_with_their_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    fails(
        folder,
        &["eval", "rouler", "--target", "oracle"],
        2,
        "there is no benchmark \"rouler\"",
    );
    fails(
        folder,
        &["eval", "ruler/vt", "--lengths", "64", "--target", "oracle"],
        2,
        "smallest text does not fit",
    );
    fails(
        folder,
        &["eval", "passkey", "--lengths", "4x", "--target", "oracle"],
        2,
        "no length",
    );
    fails(
        folder,
        &["eval", "passkey", "--samples", "0", "--target", "oracle"],
        2,
        "expected at least 1",
    );
    fails(
        folder,
        &[
            "eval",
            "threading/multi",
            "--data",
            "nowhere",
            "--target",
            "oracle",
        ],
        2,
        "nowhere",
    );
    fails(folder, &["score", "nowhere"], 2, "no run folder");
    let closed = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let url = format!("http://{closed}/v1");
    let words = [
        "eval",
        "passkey",
        "--sample",
        "--endpoint",
        &url,
        "--model",
        "m",
        "--tries",
        "1",
        "--out",
        "away",
    ];
    fails(folder, &words, 3, "/v1/models");
    // Without --model it is the only one served, which nobody is there to tell.
    let words = ["eval", "passkey", "--endpoint", &url];
    fails(folder, &words, 3, "/v1/models");
}
