//! Tasks that TOML files describe, and data in parquet.

use longspan_eval::bench::dataset::Source;
use longspan_eval::bench::file_task::FileTask;
use longspan_eval::cell::{Cell, RunConfig, RunFolder};
use longspan_eval::count::Words;
use longspan_eval::registry::Registry;
use longspan_eval::report::Report;
use longspan_eval::run::{self, Job, RunOptions};
use longspan_eval::target::{Constant, Oracle, Target};
use longspan_eval::task::{Prediction, Sample, SampleCx, Segment, Task, Truncation};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn fixtures(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures")
        .join(name)
}

fn minutes() -> FileTask {
    FileTask::open(&fixtures("file-task/minutes.toml")).unwrap()
}

fn samples(task: &dyn Task, data: Option<&Path>) -> longspan_eval::Result<Vec<Sample>> {
    task.samples(&SampleCx {
        length: 2000,
        longest: 2000,
        samples: 10,
        depths: &[],
        seed: 0,
        counter: &Words,
        data,
        fixtures: false,
    })
}

#[test]
fn a_file_is_a_task_with_prompts_and_answers() {
    let task = minutes();
    let all = samples(&task, None).unwrap();
    assert_eq!(all.len(), 3);
    // Braces of a text stay, both questions share their document.
    assert!(all[0].prompt.shared().contains("It chose {Orla} as chair."));
    assert_eq!(all[0].cluster, all[1].cluster);
    assert_ne!(all[0].cluster, all[2].cluster);
    assert_eq!(
        all[1].prompt.segments[1],
        Segment::Unique(
            "Question: When is the next meeting? Answer with a date alone.\nAnswer:".into()
        )
    );
    assert_eq!(all[0].references, ["3 March", "March 3"]);
    assert_eq!(all[1].references, ["7 April"]);
    assert_eq!(all[0].prompt.truncation, Truncation::Middle(2000));
    let score = |text: &str| {
        let row = Prediction {
            references: all[0].references.clone(),
            text: text.into(),
            ..Prediction::default()
        };
        task.score(&row)
    };
    assert_eq!(score("\nOn march 3.\n7 April").value, 1.0);
    assert_eq!(score("no\n3 March").value, 0.0);
    assert_eq!(score("\n\n").extracted, None);
}

/// A run of such a task is scored and reported from its folder alone.
#[test]
fn a_run_keeps_its_task() {
    for (target, want) in [
        (Arc::new(Oracle) as Arc<dyn Target>, 1.0),
        (Arc::new(Constant::default()), 0.0),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut registry = Registry::default();
        registry.add(Arc::new(minutes())).unwrap();
        let task = registry.task("minutes/dates").unwrap();
        let cell = Cell {
            task: task.meta().id.clone(),
            version: 1,
            length: 2000,
            model: target.model(),
            policy: "-".into(),
            seed: 0,
        };
        let jobs = [Job {
            cell: cell.clone(),
            samples: samples(&*task, None).unwrap(),
            target,
        }];
        let config = RunConfig {
            harness: "test".into(),
            compat: "official".into(),
            cells: vec![(cell, 3)],
            tokenizer: "words".into(),
            targets: Vec::new(),
            options: Vec::new(),
            created: 0,
        };
        let folder = RunFolder::create(dir.path(), &config).unwrap();
        registry.keep(&folder, &[task]).unwrap();
        run::run(&folder, &jobs, &RunOptions::default(), &run::Silent).unwrap();

        let mut fresh = Registry::default();
        assert!(Report::build(std::slice::from_ref(&folder), &fresh, false).is_err());
        fresh.add_run(&folder).unwrap();
        fresh.add_run(&folder).unwrap();
        let report = Report::build(&[folder], &fresh, false).unwrap();
        assert_eq!(report.cells[0].score.main().unwrap().value, want);
        assert!(report.cells[0].score.by.contains_key("kind"));
    }
}

#[test]
fn another_task_of_that_name_is_refused() {
    let mut registry = Registry::default();
    registry.add(Arc::new(minutes())).unwrap();
    for (from, to) in [
        ("Read the minutes.", "Read."),
        ("minutes/dates", "ruler"),
        ("minutes/dates", "passkey"),
    ] {
        let text = minutes().text().replace(from, to);
        let task = FileTask::from_text(&text, Path::new("other.toml")).unwrap();
        let error = registry.add(Arc::new(task)).unwrap_err().to_string();
        assert!(error.contains("another id"), "{error}");
    }
}

#[test]
fn mistakes_are_named() {
    let text = minutes().text().to_string();
    let bad = |from: &str, to: &str| {
        let changed = text.replace(from, to);
        assert_ne!(changed, text);
        match FileTask::from_text(&changed, Path::new("t.toml")) {
            Ok(_) => panic!("{to} passed"),
            Err(error) => error.to_string(),
        }
    };
    for (from, to, says) in [
        ("metric = \"contains\"", "metric = \"good\"", "good"),
        ("first_line", "firstline", "firstline"),
        ("minutes/dates", "a b", "id is \"a b\""),
        ("[2000]", "[]", "lengths"),
        ("first_line = true", "extract = \"(\"", "extract"),
        ("first_line = true", "extract = \"a\"", "group"),
        ("first_line = true", "classes = [\"a\"]", "classes"),
    ] {
        let error = bad(from, to);
        assert!(error.contains("t.toml") && error.contains(says), "{error}");
    }
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("minutes.jsonl");
    for (row, says) in [
        ("{\"text\": \"a\"}", "no field `dates`"),
        ("{\"text\": \"a\", \"dates\": {}}", "field `dates` is {}"),
        (
            "{\"text\": \"a\", \"dates\": \"b\", \"kind\": 1}",
            "no field `question`",
        ),
        (
            "{\"text\": [], \"dates\": \"b\", \"question\": \"?\"}",
            "field `text` is no text",
        ),
        (
            "{\"text\": \"a\", \"dates\": \"b\", \"question\": \"?\"}",
            "no field `kind`, named in `attrs`",
        ),
    ] {
        std::fs::write(&rows, row).unwrap();
        let error = samples(&minutes(), Some(dir.path()))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("minutes.jsonl:1") && error.contains(says),
            "{error}"
        );
    }
    std::fs::write(&rows, "").unwrap();
    assert!(samples(&minutes(), Some(dir.path())).is_err());
}

#[test]
fn every_metric_gives_its_maximum_to_the_right_answer() {
    let text = minutes().text().to_string();
    for metric in [
        "exact",
        "contains",
        "contains_all",
        "qa_f1",
        "qa_f1_zh",
        "rouge_l",
        "rouge_l_zh",
        "edit_similarity",
        "letter",
        "classification",
    ] {
        let classes = match metric {
            "classification" => "\nclasses = [\"C\", \"other\"]\n",
            _ => "",
        };
        let changed = text
            .replace("first_line = true", "")
            .replace("\"contains\"", &format!("\"{metric}\"{classes}"));
        let task = FileTask::from_text(&changed, Path::new("t.toml")).unwrap();
        let row = |text: &str| Prediction {
            references: vec!["C".into()],
            text: text.into(),
            ..Prediction::default()
        };
        // ROUGE's F has 1e-8 below its line.
        let right = task.score(&row("C")).value;
        assert!((right - 1.0).abs() < 1e-6, "{metric}: {right}");
        assert!(task.score(&row("B")).value < 1.0, "{metric}");
    }
    let pattern = text.replace("first_line = true", "extract = 'date: (\\w+ \\w+)'");
    let task = FileTask::from_text(&pattern, Path::new("t.toml")).unwrap();
    let row = |text: &str| Prediction {
        references: vec!["7 April".into()],
        text: text.into(),
        ..Prediction::default()
    };
    let scored = task.score(&row("date: 3 March, no, date: 7 April"));
    assert_eq!(
        (scored.value, scored.extracted.as_deref()),
        (1.0, Some("7 April"))
    );
    assert_eq!(task.score(&row("7 April")).extracted, None);
}

#[test]
fn parquet_reads_as_the_lines_it_was_made_from() {
    let folder = fixtures("parquet");
    let read = |source: &Path, name: &str| -> Vec<Value> {
        let rows = Source::Path(source).rows(&[name.to_string()]).unwrap();
        rows.iter().map(|row| row.parse().unwrap()).collect()
    };
    let want = read(&folder.join("rows.jsonl"), "");
    assert_eq!(want.len(), 3);
    assert_eq!(read(&folder.join("rows.parquet"), ""), want);
    // Parts in the order of their names, found by the name of what they are parts of.
    assert!(Source::Path(&folder).has(&["test.jsonl".into()]));
    assert_eq!(read(&folder, "test.jsonl"), want);
    // Fields keep the order of their columns.
    let row = &Source::Path(&folder.join("rows.parquet"))
        .rows(&[])
        .unwrap()[0];
    assert!(
        row.text.starts_with("{\"qid\":\"q0\",\"query\":"),
        "{}",
        row.text
    );
    assert!(
        row.text.contains("{\"zeta\":\"z\",\"alpha\":2}"),
        "{}",
        row.text
    );
    // A name that only begins alike is no part.
    assert!(!Source::Path(&folder).has(&["tes.jsonl".into()]));
    let bad = tempfile::tempdir().unwrap();
    let path = bad.path().join("x.parquet");
    std::fs::write(&path, b"PAR1 no parquet PAR1").unwrap();
    let error = Source::Path(&path).rows(&[]).unwrap_err().to_string();
    assert!(error.contains("x.parquet"), "{error}");
}
