//! Judges over chat models, L-Eval's judged questions, and samples written for other programs.

use longspan_agents::chat::model::{Call, ChatError};
use longspan_agents::chat::scripted::Scripted;
use longspan_eval::EvalError;
use longspan_eval::bench::dataset::Source;
use longspan_eval::bench::judge::{Cached, ChatJudge, Judge, Retry};
use longspan_eval::bench::{export, leval, longbench_write};
use longspan_eval::count::Words;
use longspan_eval::registry::Registry;
use longspan_eval::task::*;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

fn fixtures(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures")
        .join(name)
}

fn cx(length: usize, samples: usize, data: Option<&Path>, fixtures: bool) -> SampleCx<'_> {
    SampleCx {
        length,
        longest: length,
        samples,
        depths: &[0.0, 50.0],
        seed: 42,
        counter: &Words,
        data,
        fixtures,
    }
}

fn rows(samples: &[Sample], answer: impl Fn(&Sample) -> String) -> Vec<Prediction> {
    samples
        .iter()
        .enumerate()
        .map(|(index, sample)| Prediction {
            id: sample.id.clone(),
            index,
            attrs: sample.attrs.clone(),
            references: sample.references.clone(),
            text: answer(sample),
            ..Prediction::default()
        })
        .collect()
}

fn retry() -> Retry {
    Retry {
        tries: 2,
        pause: Duration::ZERO,
        failure: "failed".into(),
    }
}

fn judge(model: Scripted) -> ChatJudge {
    ChatJudge {
        model: Arc::new(model),
        max_new: 64,
        call: Call::default(),
    }
}

#[test]
fn a_chat_model_judges_pairs_and_is_not_asked_twice() {
    let registry = Registry::default();
    let task = registry.task("leval-judged").unwrap();
    let samples = task.samples(&cx(16384, 100, None, true)).unwrap();
    assert!(!samples.is_empty());
    let good = rows(&samples, |s| s.references[0].clone());
    let bad = rows(&samples, |_| "I do not know.".into());
    let pairs = leval::judged::pairs(&good, &bad);
    assert_eq!(pairs.len(), samples.len());
    // Prefers the answer that the reference has.
    let script = || {
        Scripted::new(|request| {
            let text = request.input.plain();
            let first = text.split("[Answer of Assistant A]\n").nth(1);
            let known = first.is_some_and(|a| a.starts_with("I do not know."));
            Ok(if known { "[[B]]" } else { "[[A]]" }.into())
        })
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("judge.jsonl");
    let first = Cached::open(judge(script()), "script", retry(), &path).unwrap();
    let outcome = leval::judge::compare(&pairs, &first, 4).unwrap();
    assert_eq!(outcome.tally.win_rate(), Some(1.0));
    assert_eq!(first.calls(), 2 * pairs.len());
    let again = Cached::open(judge(script()), "script", retry(), &path).unwrap();
    let swapped = leval::judged::pairs(&bad, &good);
    let other = leval::judge::compare(&swapped, &again, 4).unwrap();
    assert_eq!(other.tally.win_rate(), Some(0.0));
    assert_eq!(again.calls(), 0);
    // An answer that failed is in no pair.
    let mut broken = good.clone();
    broken[0].error = Some("no".into());
    assert_eq!(leval::judged::pairs(&broken, &bad).len(), pairs.len() - 1);
}

#[test]
fn a_run_is_compared_with_a_published_file() {
    let path = fixtures("l-eval/preds.gpt_x.pred.jsonl");
    let published = Source::Path(&path).rows(&[]).unwrap();
    let mine: Vec<Prediction> = published
        .iter()
        .enumerate()
        .map(|(index, row)| {
            let value: Value = row.parse().unwrap();
            Prediction {
                index,
                attrs: [("asked".to_string(), value["query"].clone())].into(),
                references: vec![value["gt"].as_str().unwrap().into()],
                text: "mine".into(),
                ..Prediction::default()
            }
        })
        .collect();
    let pairs = leval::judged::pairs_with_file(&mine, &published).unwrap();
    assert_eq!(pairs.len(), published.len());
    assert!(
        pairs
            .iter()
            .all(|p| p.model == "mine" && p.baseline != "mine")
    );
}

#[test]
fn what_ends_a_judged_run_and_what_does_not() {
    let say = |error: fn() -> ChatError| {
        let judge = judge(Scripted::new(move |_| Err(error())));
        judge.ask("", "?").unwrap_err()
    };
    let busy = || ChatError::Overloaded {
        message: "busy".into(),
        after: None,
    };
    assert!(matches!(say(busy), EvalError::Unreachable(_)));
    let long = || ChatError::ContextOverflow { tokens: 9, max: 1 };
    assert!(matches!(say(long), EvalError::Target(_)));
    assert!(matches!(
        say(|| ChatError::Auth("key".into())),
        EvalError::Input(_)
    ));
    let seen = Scripted::new(|request| Ok(format!("{:?}", request.input)));
    let reply = judge(seen).ask("be fair", "who won?").unwrap();
    assert!(
        reply.contains("be fair") && reply.contains("who won?"),
        "{reply}"
    );
}

#[test]
fn requests_of_long_writing_are_found_again() {
    let registry = Registry::default();
    let task = registry.task("longbench-write").unwrap();
    let requests = longbench_write::requests(None).unwrap();
    for sample in task.samples(&cx(32768, 100, None, true)).unwrap() {
        let row = sample.attrs["row"].as_u64().unwrap() as usize;
        assert_eq!(sample.prompt.text(), requests[row]);
    }
    let task = registry.task("longwrite-ruler").unwrap();
    for sample in task.samples(&cx(700, 100, None, false)).unwrap() {
        let row = sample.attrs["row"].as_u64().unwrap() as usize;
        let request = longbench_write::ruler_request(row, 700);
        assert_eq!(Some(sample.prompt.text()), request);
    }
    assert_eq!(longbench_write::ruler_request(1000, 1), None);
}

#[test]
fn written_samples_read_back_as_the_task() {
    let registry = Registry::default();
    let dir = tempfile::tempdir().unwrap();
    for id in ["ruler/niah_multikey_1", "ruler/vt"] {
        let task = registry.task(id).unwrap();
        let lines = export::rows(&*task, &cx(1024, 3, None, false)).unwrap();
        assert_eq!(lines.len(), 3);
        assert!(lines[0].starts_with("{\"index\":"), "{}", lines[0]);
        let path = dir.path().join(export::path(id, 1024));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, lines.join("\n")).unwrap();
        let folder = dir.path().join("1024");
        let again = task.samples(&cx(1024, 3, Some(&folder), false)).unwrap();
        let made = task.samples(&cx(1024, 3, None, false)).unwrap();
        let ids = |list: &[Sample]| list.iter().map(|s| s.id.clone()).collect::<Vec<_>>();
        assert_eq!(ids(&again), ids(&made));
    }
    // Every generator, in the plain form.
    for task in registry.tasks().iter().filter(|t| !t.needs_data()) {
        let id = &task.meta().id;
        let length = match task.meta().unit {
            Unit::Tokens => 1024,
            Unit::Characters => 4000,
            Unit::Lines => 60,
            Unit::Words => 500,
            Unit::Rounds => 1,
        };
        let lines = export::rows(&**task, &cx(length, 1, None, false)).unwrap();
        assert!(!lines.is_empty(), "{id}");
        for line in lines {
            let row: Value = serde_json::from_str(&line).unwrap();
            assert!(
                row["input"].is_string() && row["outputs"].is_array(),
                "{id}"
            );
            assert!(!line.contains('\n'));
        }
    }
}
