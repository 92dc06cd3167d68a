//! The experiment on states that never learned to forget: recipes from files, a text as the task, what is refused.

use longspan_train::reproduce::{Experiment, Recipe, Report, recipe, run};
use std::path::Path;

/// A recipe small enough for a test.
fn small(task: &str) -> String {
    format!(
        r#"
paper = "stuffed-mamba"
claim = "test"
seeds = 1
[experiment]
kind = "collapse"
task = {task}
factor = 2
test_examples = 4
steps = 3
lr = 0.01
d_model = 8
layers = 1
mixer = {{ head_dim = 8, chunk_size = 8 }}
checks = [
    {{ of = "short", measure = "rise at the longest", at_most = 100.0 }},
    {{ of = "short", measure = "rise at the longest, window", at_most = 100.0 }},
    {{ of = "all state sizes", measure = "rank correlation of pairs held and state size", at_least = 2.0 }},
]
[[experiment.settings]]
name = "short"
state_size = 4
length = 16
examples = 2
repaired = true
[[experiment.settings]]
name = "long"
state_size = 4
length = 32
examples = 1
[experiment.capacity]
state_sizes = [2, 4]
pairs = [1, 2]
symbols = 4
steps = 2
tokens = 16
test_examples = 8
lr = 0.01
d_model = 8
layers = 1
mixer = {{ head_dim = 8 }}
"#
    )
}

fn written(folder: &Path, task: &str) -> Recipe {
    let path = folder.join("small.toml");
    std::fs::write(&path, small(task)).unwrap();
    recipe(path.to_str().unwrap()).unwrap()
}

fn report(recipe: &Recipe) -> Report {
    run(recipe, &mut |_, _| true).unwrap().unwrap()
}

fn values(report: &Report, row: &str) -> Vec<f64> {
    let found = report.rows.iter().find(|r| r.name == row);
    found
        .unwrap_or_else(|| panic!("no row {row}"))
        .values
        .clone()
}

#[test]
fn a_text_beside_the_recipe_is_read_and_measured() {
    let folder = tempfile::tempdir().unwrap();
    let text = "So it goes on, line after line, to the end.\n".repeat(40);
    std::fs::write(folder.path().join("text.txt"), &text).unwrap();
    let text_recipe = written(folder.path(), r#"{ task = "text", file = "text.txt" }"#);
    let found = report(&text_recipe);
    assert!(
        found.setting.contains("bytes of a text"),
        "{}",
        found.setting
    );
    assert!(found.baseline.contains("nats"), "{}", found.baseline);
    for row in [
        "short: loss at the training length",
        "short: rise at the longest",
        "short: rise at the longest, forget more",
        "short: rise at the longest, norm clip",
        "short: rise at the longest, window",
        "long: rise at the longest",
        "held by N = 2: pairs held",
    ] {
        assert!(values(&found, row)[0].is_finite(), "{row}");
    }
    // Trained to the end of the test: there is nothing beyond.
    assert_eq!(values(&found, "long: rise at the longest"), [0.0]);
    assert!(!found.holds, "no correlation is 2");
    // The same file by another name gives the same.
    let absolute = folder.path().join("text.txt");
    let again = written(
        folder.path(),
        &format!(r#"{{ task = "text", file = '{}' }}"#, absolute.display()),
    );
    assert_eq!(report(&again).verdict, found.verdict);
}

#[test]
fn rewritten_keys_are_a_task_too() {
    let folder = tempfile::tempdir().unwrap();
    let task = r#"{ task = "rewrite", keys = 3, values = 4, horizon = 12 }"#;
    let found = report(&written(folder.path(), task));
    assert!(found.setting.contains("12 tokens"), "{}", found.setting);
    assert!(found.baseline.contains("ln 4"), "{}", found.baseline);
    assert!(values(&found, "short: rise at the longest")[0].is_finite());
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
    let shipped = recipe(shipped.join("stuffed-mamba-rewrite.toml").to_str().unwrap()).unwrap();
    shipped.experiment.check().unwrap();
}

#[test]
fn texts_that_are_missing_or_too_short_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let text = written(folder.path(), r#"{ task = "text", file = "text.txt" }"#);
    let refused = || run(&text, &mut |_, _| true).unwrap_err().to_string();
    let error = refused();
    assert!(
        error.contains("text.txt") && error.contains("task.file"),
        "{error}"
    );
    // 20 times the test length of 32 bytes are needed.
    std::fs::write(folder.path().join("text.txt"), "x".repeat(639)).unwrap();
    let error = refused();
    for part in ["text.txt", "639 bytes", "640"] {
        assert!(error.contains(part), "{error}");
    }
    std::fs::write(folder.path().join("text.txt"), "x".repeat(640)).unwrap();
    report(&text);
    for task in [
        r#"{ task = "text" }"#,
        r#"{ task = "text", file = "a", keys = 3 }"#,
        r#"{ task = "tape" }"#,
        r#"{ keys = 3 }"#,
    ] {
        assert!(toml::from_str::<Recipe>(&small(task)).is_err(), "{task}");
    }
}

#[test]
fn capacities_that_cannot_be_measured_are_refused() {
    let parsed = |from: &str, to: &str| -> Recipe {
        let text = small(r#"{ task = "rewrite" }"#);
        assert!(text.contains(from), "{from}");
        toml::from_str(&text.replace(from, to)).unwrap()
    };
    parsed("", "").experiment.check().unwrap();
    for (from, to, option) in [
        (
            "state_sizes = [2, 4]",
            "state_sizes = [2]",
            "capacity.state_sizes",
        ),
        ("pairs = [1, 2]", "pairs = []", "capacity.pairs"),
        ("pairs = [1, 2]", "pairs = [0, 2]", "capacity.pairs"),
        ("symbols = 4", "symbols = 1", "capacity.symbols"),
        (
            "test_examples = 8",
            "test_examples = 0",
            "capacity.test_examples",
        ),
        ("length = 32", "length = 33", "factor"),
    ] {
        let error = parsed(from, to).experiment.check().unwrap_err().to_string();
        assert!(error.contains(option), "{error}");
    }
    let Experiment::Collapse(mut collapse) = parsed("", "").experiment else {
        panic!("another kind");
    };
    collapse.set_steps(7);
    assert_eq!(
        (collapse.steps, collapse.capacity.map(|c| c.steps)),
        (7, Some(7))
    );
}
