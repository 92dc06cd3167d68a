//! The runner: cells in, stored predictions out. Order, concurrency and interruptions change
//! nothing in the files; scoring comes later and elsewhere.

use crate::cache::Cache;
use crate::cell::{Cell, CellWriter, CostRow, RunFolder};
use crate::error::{EvalError, Result};
use crate::target::{Output, Target};
use crate::task::{Prediction, Sample, Segment};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A cell with its samples and who answers them.
pub struct Job {
    /// Which cell.
    pub cell: Cell,
    /// Its samples, in order.
    pub samples: Vec<Sample>,
    /// Who answers.
    pub target: Arc<dyn Target>,
}

/// How to run.
pub struct RunOptions<'a> {
    /// Samples in work at a time; targets may allow fewer.
    pub concurrency: usize,
    /// Earlier replies.
    pub cache: Option<&'a Cache>,
    /// Stop (resumably) after this time.
    pub limit: Option<Duration>,
    /// Work on samples in another order: results must not depend on it.
    pub shuffle: Option<u64>,
    /// Consecutive failures to reach the target after which the run stops.
    pub breaker: usize,
}

impl Default for RunOptions<'_> {
    fn default() -> Self {
        RunOptions {
            concurrency: 1,
            cache: None,
            limit: None,
            shuffle: None,
            breaker: 5,
        }
    }
}

/// Told about progress, asked to stop.
pub trait Observer: Sync {
    /// Once, before the first sample: work that earlier runs did, of how much.
    fn start(&self, _done: u64, _total: u64) {}

    /// After each sample: work done, of how much (weighted by length), and the cell.
    fn progress(&self, _done: u64, _total: u64, _cell: &Cell) {}

    /// True to stop soon.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Neither shows nor stops anything.
pub struct Silent;

impl Observer for Silent {}

/// How a run ended without error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Samples with stored replies.
    pub done: usize,
    /// Samples asked for.
    pub total: usize,
    /// The time limit ended it.
    pub out_of_time: bool,
}

/// Characters of context stored beside the question.
const CONTEXT_SHOWN: usize = 160;

/// Runs what is not yet in the folder. Cells advance together, document by document, so that a run
/// that is cut short is balanced.
///
/// # Errors
/// Unreachable targets and stops leave what was finished in the folder.
pub fn run(
    folder: &RunFolder,
    jobs: &[Job],
    options: &RunOptions<'_>,
    observer: &dyn Observer,
) -> Result<Outcome> {
    let mut writers = Vec::new();
    let mut queue: Vec<(usize, usize)> = Vec::new();
    let (mut done_work, mut total_work, mut total, mut done) = (0u64, 0u64, 0, 0);
    let mut order: Vec<((usize, usize), usize, usize)> = Vec::new();
    for (index, job) in jobs.iter().enumerate() {
        let ids: HashMap<&str, usize> = job
            .samples
            .iter()
            .enumerate()
            .map(|(i, s)| (s.id.as_str(), i))
            .collect();
        if ids.len() != job.samples.len() {
            return Err(EvalError::Input(format!(
                "{}: two samples at length {} are alike; take fewer or another seed",
                job.cell.task, job.cell.length
            )));
        }
        let known = job.samples.iter().map(|s| s.id.clone()).collect();
        let writer = CellWriter::open(folder, &job.cell, &known)?;
        // Samples of one document follow each other, documents of all cells take turns.
        let mut documents: HashMap<&str, usize> = HashMap::new();
        for (at, sample) in job.samples.iter().enumerate() {
            let next = documents.len();
            let document = *documents.entry(&sample.cluster).or_insert(next);
            total += 1;
            total_work += job.cell.length as u64;
            if writer.done().contains(&sample.id) {
                done += 1;
                done_work += job.cell.length as u64;
            } else {
                order.push(((document, index), index, at));
            }
        }
        writers.push(Mutex::new(writer));
    }
    order.sort();
    queue.extend(order.iter().map(|&(_, job, at)| (job, at)));
    if let Some(seed) = options.shuffle {
        crate::python::Random::new(seed as i64).shuffle(&mut queue);
    }
    let concurrency = jobs
        .iter()
        .map(|job| job.target.concurrency())
        .min()
        .unwrap_or(1)
        .min(options.concurrency)
        .clamp(1, queue.len().max(1));
    let shared = Shared {
        jobs,
        writers: &writers,
        queue: &queue,
        next: AtomicUsize::new(0),
        stop: AtomicBool::new(false),
        failures: AtomicUsize::new(0),
        error: Mutex::new(None),
        done: AtomicUsize::new(done),
        work: Mutex::new(done_work),
        total_work,
        deadline: options.limit.map(|limit| Instant::now() + limit),
        options,
        observer,
    };
    observer.start(done_work, total_work);
    std::thread::scope(|scope| {
        for _ in 1..concurrency {
            scope.spawn(|| shared.work());
        }
        // The caller's thread works too: kernels may have pinned it.
        shared.work();
    });
    let error = shared.error.into_inner().unwrap_or_else(|p| p.into_inner());
    let finished = shared.done.into_inner();
    for (writer, job) in writers.into_iter().zip(jobs) {
        writer
            .into_inner()
            .unwrap_or_else(|p| p.into_inner())
            .finish(folder, &job.cell)?;
    }
    match error {
        Some(EvalError::Interrupted { .. }) => Err(EvalError::Interrupted {
            done: finished,
            total,
        }),
        Some(error) => Err(error),
        None => Ok(Outcome {
            done: finished,
            total,
            out_of_time: finished < total,
        }),
    }
}

struct Shared<'a> {
    jobs: &'a [Job],
    writers: &'a [Mutex<CellWriter>],
    queue: &'a [(usize, usize)],
    next: AtomicUsize,
    stop: AtomicBool,
    failures: AtomicUsize,
    error: Mutex<Option<EvalError>>,
    done: AtomicUsize,
    work: Mutex<u64>,
    total_work: u64,
    deadline: Option<Instant>,
    options: &'a RunOptions<'a>,
    observer: &'a dyn Observer,
}

impl Shared<'_> {
    fn work(&self) {
        while !self.stop.load(Ordering::SeqCst) {
            if self.deadline.is_some_and(|at| Instant::now() >= at) {
                return;
            }
            if self.observer.cancelled() {
                return self.fail(EvalError::Interrupted { done: 0, total: 0 });
            }
            let at = self.next.fetch_add(1, Ordering::SeqCst);
            let Some(&(job, sample)) = self.queue.get(at) else {
                return;
            };
            let job_at = job;
            let job = &self.jobs[job];
            let mut result = self.answer(job, &job.samples[sample]);
            // A target that is away for a moment is asked again before the run gives up.
            while let Err(EvalError::Unreachable(_)) = result {
                let failures = self.failures.fetch_add(1, Ordering::SeqCst) + 1;
                if failures >= self.options.breaker || self.stop.load(Ordering::SeqCst) {
                    break;
                }
                result = self.answer(job, &job.samples[sample]);
            }
            let stored = result.and_then(|output| {
                self.failures.store(0, Ordering::SeqCst);
                let (row, cost) = rows(&job.samples[sample], sample, output);
                let mut writer = self.writers[job_at]
                    .lock()
                    .unwrap_or_else(|p| p.into_inner());
                writer.append(&row, &cost)
            });
            if let Err(error) = stored {
                return self.fail(error);
            }
            self.done.fetch_add(1, Ordering::SeqCst);
            let mut work = self.work.lock().unwrap_or_else(|p| p.into_inner());
            *work += job.cell.length as u64;
            self.observer.progress(*work, self.total_work, &job.cell);
        }
    }

    fn fail(&self, error: EvalError) {
        self.stop.store(true, Ordering::SeqCst);
        let mut first = self.error.lock().unwrap_or_else(|p| p.into_inner());
        first.get_or_insert(error);
    }

    fn answer(&self, job: &Job, sample: &Sample) -> Result<Output> {
        let seed = job.cell.seed;
        let identity = job.target.identity();
        let Some((cache, identity)) = self.options.cache.zip(identity) else {
            return job.target.run(sample, seed);
        };
        let key = Cache::key(&identity, sample, seed);
        if let Some(output) = cache.get(&key) {
            return Ok(output);
        }
        let output = job.target.run(sample, seed)?;
        cache.put(&key, &output)?;
        Ok(output)
    }
}

/// The rows stored for an output.
fn rows(sample: &Sample, index: usize, output: Output) -> (Prediction, CostRow) {
    let question: String = sample
        .prompt
        .segments
        .iter()
        .filter(|segment| !matches!(segment, Segment::Shared(_)))
        .map(Segment::text)
        .collect();
    let shared = sample.prompt.shared();
    let count = shared.chars().count();
    let skip = count.saturating_sub(CONTEXT_SHOWN);
    let shown: String = shared.chars().skip(skip).collect();
    let elided = if skip > 0 {
        format!("[{skip} characters] ")
    } else {
        String::new()
    };
    // A question that is a whole document (few-shot prompts) is cut to its end as well.
    let long = question.chars().count().saturating_sub(4 * CONTEXT_SHOWN);
    let question: String = question.chars().skip(long).collect();
    let row = Prediction {
        id: sample.id.clone(),
        index,
        cluster: sample.cluster.clone(),
        attrs: sample.attrs.clone(),
        references: sample.references.clone(),
        question: format!("{elided}{shown}{question}"),
        text: output.text,
        finish: output.finish,
        tokens_in: output.tokens_in,
        tokens_out: output.tokens_out,
        truncated: output.truncated,
        error: output.error,
        likelihood: output.likelihood,
    };
    let cost = CostRow {
        id: row.id.clone(),
        cost: output.cost,
        tokens: (row.tokens_in, row.tokens_out),
    };
    (row, cost)
}
