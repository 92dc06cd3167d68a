//! The seam's promises, over every task of the registry: the oracle gets the maximum, the constant
//! the documented floor; a kill, another order and other concurrency leave equal files.

use longspan_eval::cache::Cache;
use longspan_eval::cell::{Cell, RunConfig, RunFolder};
use longspan_eval::count::Counter;
use longspan_eval::registry::Registry;
use longspan_eval::report::Report;
use longspan_eval::run::{self, Job, Observer, RunOptions};
use longspan_eval::score::{score_cell, score_run};
use longspan_eval::target::{Constant, Oracle, Output, Recorded, Target};
use longspan_eval::task::{Sample, SampleCx, Task, Unit};
use longspan_eval::{EvalError, Result};
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

fn length(task: &dyn Task) -> usize {
    match task.meta().unit {
        Unit::Tokens => 1024,
        Unit::Characters => 4000,
        Unit::Lines => 60,
        Unit::Words => 500,
        Unit::Rounds => 1,
    }
}

fn samples(task: &dyn Task, counter: &dyn Counter, fixtures: bool) -> Result<Vec<Sample>> {
    task.samples(&SampleCx {
        length: length(task),
        longest: length(task),
        samples: 2,
        depths: &[0.0, 50.0, 100.0],
        seed: 42,
        counter,
        data: None,
        fixtures: fixtures || task.needs_data(),
    })
}

fn jobs(target: Arc<dyn Target>, fixtures: bool, choose: &dyn Fn(&str) -> bool) -> Vec<Job> {
    let registry = Registry::default();
    let mut jobs = Vec::new();
    for task in registry
        .tasks()
        .iter()
        .filter(|task| choose(&task.meta().id))
    {
        let meta = task.meta();
        let made = samples(&**task, target.counter(), fixtures);
        jobs.push(Job {
            cell: Cell {
                task: meta.id.clone(),
                version: meta.version,
                length: length(&**task),
                model: target.model(),
                policy: target.policy(),
                seed: 42,
            },
            samples: made.unwrap_or_else(|error| panic!("{}: {error}", meta.id)),
            target: Arc::clone(&target),
        });
    }
    jobs
}

fn folder(path: &Path, jobs: &[Job]) -> RunFolder {
    let config = RunConfig {
        harness: "test".into(),
        compat: "official".into(),
        cells: jobs
            .iter()
            .map(|job| (job.cell.clone(), job.samples.len()))
            .collect(),
        tokenizer: "words".into(),
        targets: Vec::new(),
        options: Vec::new(),
        created: 0,
    };
    RunFolder::create(path, &config).unwrap()
}

fn everything(_: &str) -> bool {
    true
}

#[test]
fn the_oracle_gets_the_maximum_and_the_constant_the_floor() {
    let registry = Registry::default();
    let targets: [Arc<dyn Target>; 2] = [Arc::new(Oracle), Arc::new(Constant::default())];
    for fixtures in [false, true] {
        for (which, target) in targets.iter().enumerate() {
            let dir = tempfile::tempdir().unwrap();
            let jobs = jobs(Arc::clone(target), fixtures, &everything);
            assert_eq!(jobs.len(), registry.tasks().len());
            let folder = folder(dir.path(), &jobs);
            run::run(&folder, &jobs, &RunOptions::default(), &run::Silent).unwrap();
            let scores = score_run(&folder, &registry).unwrap();
            assert_eq!(scores.len(), jobs.len());
            for (score, _) in scores {
                let task = registry.task(&score.cell.task).unwrap();
                let meta = task.meta();
                let want = [meta.best, meta.floor][which];
                let main = score.main().unwrap();
                // A constant may share a word with an answer of a data set: there the floor is a bound.
                if which == 1 && task.needs_data() && main.value < want {
                    continue;
                }
                assert!(
                    (main.value - want).abs() < 1e-3 * want.max(1.0),
                    "{} of {} (fixtures: {fixtures}): {}, expected {want}",
                    meta.id,
                    target.model(),
                    main.value
                );
                assert_eq!(score.counts.errors, 0);
            }
            let report = Report::build(&[folder], &registry, false).unwrap();
            report.write(dir.path()).unwrap();
            let html = std::fs::read_to_string(dir.path().join("report.html")).unwrap();
            assert!(html.contains("<svg") && !html.contains("<script") && !html.contains("http"));
            assert_eq!(report.failures.is_empty(), which == 0);
        }
    }
}

#[test]
fn ids_are_unique_and_depend_on_content_alone() {
    let registry = Registry::default();
    for task in registry.tasks() {
        let first = samples(&**task, Oracle.counter(), false).unwrap();
        let again = samples(&**task, Oracle.counter(), false).unwrap();
        let ids: Vec<&String> = first.iter().map(|s| &s.id).collect();
        assert_eq!(
            ids,
            again.iter().map(|s| &s.id).collect::<Vec<_>>(),
            "{}",
            task.meta().id
        );
        assert_eq!(
            ids.iter().collect::<HashSet<_>>().len(),
            ids.len(),
            "{}",
            task.meta().id
        );
        for sample in &first {
            // The answer must be in the text, never in the question (of retrieval tasks).
            if task.meta().id.starts_with("passkey") || task.meta().id == "lines" {
                assert!(sample.prompt.shared().contains(&sample.references[0]));
            }
        }
    }
}

/// All prediction and score files of a run, by name.
fn files(path: &Path) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = std::fs::read_dir(path.join("cells"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| !path.to_string_lossy().contains(".cost."))
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read_to_string(&path).unwrap())
        })
        .collect();
    all.sort();
    all
}

/// Answers some samples rightly, from the sample alone, slowly enough for threads to overtake.
struct Mixed {
    asked: AtomicUsize,
    die_after: usize,
}

impl Target for Mixed {
    fn model(&self) -> String {
        "mixed".into()
    }

    fn identity(&self) -> Option<String> {
        Some("mixed".into())
    }

    fn counter(&self) -> &dyn Counter {
        &longspan_eval::count::Words
    }

    fn run(&self, sample: &Sample, seed: u64) -> Result<Output> {
        if self.asked.fetch_add(1, Ordering::SeqCst) >= self.die_after {
            return Err(EvalError::Unreachable("the server went away".into()));
        }
        let digit = sample.id.as_bytes()[0];
        std::thread::sleep(std::time::Duration::from_micros(u64::from(digit) % 7 * 50));
        if digit.is_multiple_of(2) {
            Oracle.run(sample, seed)
        } else {
            Constant::default().run(sample, seed)
        }
    }
}

fn mixed(die_after: usize) -> Arc<Mixed> {
    Arc::new(Mixed {
        asked: AtomicUsize::new(0),
        die_after,
    })
}

fn few(id: &str) -> bool {
    [
        "passkey",
        "needle/shared",
        "ruler/vt",
        "threading/multi",
        "perplexity",
        "lines",
    ]
    .contains(&id)
}

#[test]
fn kill_order_and_concurrency_change_no_byte() {
    let registry = Registry::default();
    let run_with = |path: &Path, options: &RunOptions<'_>, die_after: &[usize]| {
        for &limit in die_after {
            let jobs = jobs(mixed(limit), false, &few);
            let error = run::run(&folder(path, &jobs), &jobs, options, &run::Silent).unwrap_err();
            assert!(matches!(error, EvalError::Unreachable(_)), "{error}");
            // A kill can tear the last line.
            let torn = folder(path, &jobs).predictions_path(&jobs[0].cell);
            use std::io::Write;
            let mut file = std::fs::OpenOptions::new().append(true).open(torn).unwrap();
            file.write_all(b"{\"id\":\"ab").unwrap();
        }
        let jobs = jobs(mixed(usize::MAX), false, &few);
        let folder = folder(path, &jobs);
        let outcome = run::run(&folder, &jobs, options, &run::Silent).unwrap();
        assert_eq!(outcome.done, outcome.total);
        score_run(&folder, &registry).unwrap();
        files(path)
    };
    let plain = tempfile::tempdir().unwrap();
    let want = run_with(plain.path(), &RunOptions::default(), &[]);
    assert!(want.len() == 12, "{}", want.len());
    let cache_dir = tempfile::tempdir().unwrap();
    let cache = Cache::new(cache_dir.path()).unwrap();
    let cases: [(RunOptions<'_>, &[usize]); 5] = [
        (
            RunOptions {
                concurrency: 16,
                ..RunOptions::default()
            },
            &[],
        ),
        (
            RunOptions {
                shuffle: Some(7),
                ..RunOptions::default()
            },
            &[],
        ),
        (
            RunOptions {
                breaker: 1,
                ..RunOptions::default()
            },
            &[7, 3],
        ),
        (
            RunOptions {
                concurrency: 16,
                shuffle: Some(1),
                breaker: 2,
                ..RunOptions::default()
            },
            &[11],
        ),
        (
            RunOptions {
                concurrency: 4,
                cache: Some(&cache),
                ..RunOptions::default()
            },
            &[],
        ),
    ];
    for (index, (options, die_after)) in cases.iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let found = run_with(dir.path(), options, die_after);
        assert!(found == want, "case {index} differs");
    }
    // From the cache alone: nothing is asked.
    let target = mixed(0);
    let dir = tempfile::tempdir().unwrap();
    let jobs = jobs(target.clone(), false, &few);
    let options = RunOptions {
        cache: Some(&cache),
        ..RunOptions::default()
    };
    let folder = folder(dir.path(), &jobs);
    run::run(&folder, &jobs, &options, &run::Silent).unwrap();
    score_run(&folder, &registry).unwrap();
    assert!(files(dir.path()) == want);
    assert_eq!(target.asked.load(Ordering::SeqCst), 0);
}

#[test]
fn recorded_answers_give_the_same_scores() {
    let dir = tempfile::tempdir().unwrap();
    let jobs_a = jobs(mixed(usize::MAX), false, &few);
    let folder_a = folder(&dir.path().join("a"), &jobs_a);
    run::run(&folder_a, &jobs_a, &RunOptions::default(), &run::Silent).unwrap();
    let rows = jobs_a
        .iter()
        .flat_map(|job| folder_a.predictions(&job.cell).unwrap());
    let recorded: Arc<dyn Target> = Arc::new(Recorded::new("recorded", rows.collect::<Vec<_>>()));
    let jobs_b = jobs(recorded, false, &few);
    let folder_b = folder(&dir.path().join("b"), &jobs_b);
    run::run(&folder_b, &jobs_b, &RunOptions::default(), &run::Silent).unwrap();
    let registry = Registry::default();
    for (a, b) in jobs_a.iter().zip(&jobs_b) {
        let task = registry.task(&a.cell.task).unwrap();
        let left = score_cell(&*task, &a.cell, &folder_a.predictions(&a.cell).unwrap());
        let right = score_cell(&*task, &a.cell, &folder_b.predictions(&b.cell).unwrap());
        assert_eq!(left, right);
    }
}

struct StopAfter(AtomicUsize);

impl Observer for StopAfter {
    fn progress(&self, _done: u64, _total: u64, _cell: &Cell) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst) >= 4
    }
}

#[test]
fn a_stop_says_how_far_it_came_and_time_limits_are_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = jobs(mixed(usize::MAX), false, &few);
    let folder = folder(dir.path(), &jobs);
    let stop = StopAfter(AtomicUsize::new(0));
    let error = run::run(&folder, &jobs, &RunOptions::default(), &stop).unwrap_err();
    let EvalError::Interrupted { done, total } = error else {
        panic!("{error}");
    };
    assert_eq!(
        (done, total),
        (4, jobs.iter().map(|job| job.samples.len()).sum())
    );
    // What was done is spread over the cells, not all in the first.
    let started = jobs
        .iter()
        .filter(|job| !folder.predictions(&job.cell).unwrap().is_empty());
    assert!(started.count() >= 2);
    let options = RunOptions {
        limit: Some(std::time::Duration::ZERO),
        ..RunOptions::default()
    };
    let outcome = run::run(&folder, &jobs, &options, &run::Silent).unwrap();
    assert!(outcome.out_of_time && outcome.done == 4);
}

#[test]
fn scoring_ten_thousand_rows_takes_every_row() {
    let registry = Registry::default();
    let task = registry.task("ruler/niah_multivalue").unwrap();
    let fixture = samples(&*task, Oracle.counter(), true).unwrap();
    let row = |index: usize| longspan_eval::task::Prediction {
        id: index.to_string(),
        cluster: index.to_string(),
        references: fixture[index % fixture.len()].references.clone(),
        text: fixture[index % 2].oracle.clone(),
        ..Default::default()
    };
    let rows: Vec<_> = (0..10_000).map(row).collect();
    let cell = jobs(Arc::new(Oracle), true, &|id| id == "ruler/niah_multivalue")[0]
        .cell
        .clone();
    let score = score_cell(&*task, &cell, &rows);
    assert_eq!(
        (score.rows.len(), score.main().unwrap().value),
        (10_000, 1.0)
    );
}
