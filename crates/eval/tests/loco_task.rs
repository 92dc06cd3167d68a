//! Search as a task: rankings by words and by hashed words, stored and scored like any reply.

use longspan_agents::rag::HashedWords;
use longspan_eval::count::Words;
use longspan_eval::registry::Registry;
use longspan_eval::score::score_cell;
use longspan_eval::target::{Constant, Search, SearchBy, Target};
use longspan_eval::task::*;
use std::sync::Arc;

fn samples(task: &dyn Task, length: usize, samples: usize) -> Vec<Sample> {
    task.samples(&SampleCx {
        length,
        longest: length,
        samples,
        depths: &[],
        seed: 1,
        counter: &Words,
        data: None,
        fixtures: true,
    })
    .unwrap()
}

fn answers(target: &dyn Target, samples: &[Sample]) -> Vec<Prediction> {
    samples
        .iter()
        .enumerate()
        .map(|(index, sample)| {
            let output = target.run(sample, 0).unwrap();
            Prediction {
                id: sample.id.clone(),
                index,
                cluster: sample.cluster.clone(),
                attrs: sample.attrs.clone(),
                references: sample.references.clone(),
                text: output.text,
                error: output.error,
                ..Prediction::default()
            }
        })
        .collect()
}

fn figure(task: &dyn Task, target: &dyn Target, length: usize) -> f64 {
    let cell = longspan_eval::cell::Cell {
        task: task.meta().id.clone(),
        version: 1,
        length,
        model: target.model(),
        policy: target.policy(),
        seed: 1,
    };
    let rows = answers(target, &samples(task, length, 100));
    let score = score_cell(task, &cell, &rows);
    assert_eq!(score.counts.errors, 0);
    score.main().unwrap().value
}

fn hashed(pieces: Option<usize>) -> Search {
    let by = SearchBy::Vectors {
        embedder: Arc::new(HashedWords::default()),
        pieces,
    };
    Search::new(by, "hashed")
}

#[test]
fn rankings_are_replies() {
    let registry = Registry::default();
    let task = registry.task("loco").unwrap();
    let bm25 = Search::new(SearchBy::Bm25, "bm25");
    let words = figure(&*task, &bm25, 1_000_000);
    let vectors = figure(&*task, &hashed(None), 1_000_000);
    assert!(words > 0.9 && vectors > 0.2, "{words} {vectors}");
    // What is cut cannot be found, and is said.
    let cut = samples(&*task, 3, 100);
    assert!(
        cut.iter()
            .all(|s| s.attrs["documents cut"].as_u64() > Some(0))
    );
    assert!(figure(&*task, &bm25, 3) < words);
    assert_eq!(figure(&*task, &Constant::default(), 1_000_000), 0.0);
}

/// A fact in a long document is found by its words; one vector of the whole loses it among the others.
#[test]
fn needles_are_lost_in_long_vectors() {
    let registry = Registry::default();
    let task = registry.task("loco/needles").unwrap();
    let bm25 = Search::new(SearchBy::Bm25, "bm25");
    assert_eq!(figure(&*task, &bm25, 1000), 1.0);
    let (short, long) = (
        figure(&*task, &hashed(None), 250),
        figure(&*task, &hashed(None), 4000),
    );
    assert!(long < short, "{short} {long}");
    assert_eq!(hashed(Some(100)).policy(), "mean of 100 words");
    assert_ne!(hashed(Some(100)).identity(), hashed(None).identity());
}

#[test]
fn a_searcher_writes_nothing_and_a_writer_searches_nothing() {
    let registry = Registry::default();
    let passkey = registry.task("passkey").unwrap();
    let cx = SampleCx {
        length: 512,
        longest: 512,
        samples: 1,
        depths: &[50.0],
        seed: 1,
        counter: &Words,
        data: None,
        fixtures: false,
    };
    let sample = passkey.samples(&cx).unwrap().remove(0);
    let output = hashed(None).run(&sample, 0).unwrap();
    assert!(output.error.unwrap().contains("writes nothing"));
}
