//! The loop: the one place where a step is made. Recipes bring a source, an objective and a schedule; no recipe owns a
//! loop of its own.
//!
//! A global batch is cut into micro-batches. Ranks (threads, and the processes of [`crate::comm`]) take them in turn, and
//! their gradients are added in the order of micro-batches, so that 1, 2 and 4 ranks give the same bits.

use crate::comm::{Alone, Comm, Part, pack, unpack};
use crate::error::{Result, TrainError};
use crate::objective::Objective;
use crate::optim::{Optimizer, clip_grad_norm};
use crate::schedule::Schedule;
use crate::source::Source;
use candle_core::Tensor;
use candle_core::backprop::GradStore;
use longspan_kernels::pool::Pool;
use longspan_nn::params::{Param, ParamStore};
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Instant;

/// Graphs of long recurrences are walked recursively; threads that walk them need room.
const STACK: usize = 1 << 30;

thread_local! {
    /// Whether this thread has that room.
    static ROOMY: Cell<bool> = const { Cell::new(false) };
}

/// A thread with room for the walk through long graphs: trainers on it make no thread for each step.
pub(crate) fn roomy<'scope, R: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    work: impl FnOnce() -> R + Send + 'scope,
) -> std::io::Result<ScopedJoinHandle<'scope, R>> {
    let alone = Pool::is_alone();
    std::thread::Builder::new()
        .name(name.into())
        .stack_size(STACK)
        .spawn_scoped(scope, move || {
            ROOMY.set(true);
            match alone {
                true => Pool::alone(work),
                false => work(),
            }
        })
}
/// So many steps in a row without a finite loss end the run.
const MOST_NOT_FINITE: usize = 5;

/// How long and how to step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoopConfig {
    /// Optimiser steps of the run.
    pub steps: u64,
    /// Micro-batches whose gradients make one step.
    pub micro_batches: usize,
    /// Threads of each process that share the micro-batches of a step.
    pub ranks: usize,
    /// Limit of the gradients' global norm; none = no clipping.
    pub clip: Option<f64>,
    /// Learning rate over the run.
    pub schedule: Schedule,
}

impl Default for LoopConfig {
    fn default() -> Self {
        LoopConfig {
            steps: 1000,
            micro_batches: 1,
            ranks: 1,
            clip: Some(1.0),
            schedule: Schedule::default(),
        }
    }
}

impl LoopConfig {
    /// Refuses what cannot run.
    pub fn check(&self) -> Result<()> {
        self.schedule.check()?;
        if self.micro_batches == 0 {
            return Err(TrainError::option("train.micro_batches", 0, "1 or more"));
        }
        if self.ranks == 0 || self.ranks > self.micro_batches {
            return Err(TrainError::option(
                "train.ranks",
                self.ranks,
                format!(
                    "from 1 to the {} micro-batches of a step",
                    self.micro_batches
                ),
            ));
        }
        match self.clip {
            Some(clip) if clip.is_nan() || clip <= 0.0 => {
                Err(TrainError::option("train.clip", clip, "more than 0"))
            }
            _ => Ok(()),
        }
    }
}

/// What one step did. Written to `events.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepEvent {
    /// Steps made, this one included.
    pub step: u64,
    /// Tokens read, this step included.
    pub tokens: u64,
    /// Mean loss of the global batch before the step, nats (or the objective's unit).
    pub loss: f64,
    /// Learning rate of parameters without a cap.
    pub lr: f64,
    /// Global norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Whether gradients were scaled down.
    pub clipped: bool,
    /// True when loss or gradients were not finite, and the parameters were left as they were.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
    /// Time of this step, seconds.
    pub seconds: f64,
    /// Tokens per second of this step.
    pub tokens_per_second: f64,
    /// Estimated time left, seconds.
    pub seconds_left: f64,
}

/// Loss, gradients and notes of a micro-batch.
type Made = (f64, GradStore, Vec<Vec<f64>>);

/// Parameters, optimiser, data and loss of a run, and where it is.
pub struct Trainer<S, O> {
    /// The parameters; models built from the store see every step.
    pub params: Arc<ParamStore>,
    /// Optimiser state.
    pub optimizer: Optimizer,
    /// Where batches come from.
    pub source: S,
    /// The loss.
    pub objective: O,
    /// How to step.
    pub config: LoopConfig,
    /// Steps made.
    pub step: u64,
    /// Tokens read.
    pub tokens: u64,
    /// Steps in a row that were skipped.
    pub not_finite: usize,
    /// The processes of the run.
    pub comm: Arc<dyn Comm>,
    pace: f64,
}

impl<S, O> Trainer<S, O>
where
    O: Objective,
    S: Source<Batch = O::Batch>,
{
    /// A run at its start.
    pub fn new(
        params: Arc<ParamStore>,
        optimizer: Optimizer,
        source: S,
        objective: O,
        config: LoopConfig,
    ) -> Result<Self> {
        config.check()?;
        Ok(Trainer {
            params,
            optimizer,
            source,
            objective,
            config,
            step: 0,
            tokens: 0,
            not_finite: 0,
            comm: Arc::new(Alone),
            pace: 0.0,
        })
    }

    /// Whether all steps were made.
    pub fn finished(&self) -> bool {
        self.step >= self.config.steps
    }

    /// One step; none when the run or its data ended.
    pub fn step(&mut self) -> Result<Option<StepEvent>> {
        if self.finished() {
            return Ok(None);
        }
        let start = Instant::now();
        let batches = self.source.next(self.config.micro_batches)?;
        if batches.is_empty() {
            return Ok(None);
        }
        let params = self.params.list();
        let (loss, mut gradients) = self.gradients(&params, &batches)?;
        let norm = clip_grad_norm(&mut gradients, self.config.clip)?;
        let multiplier = self
            .config
            .schedule
            .multiplier(self.step, self.config.steps);
        let finite = loss.is_finite() && norm.is_finite();
        if finite {
            self.optimizer.step(&params, &gradients, multiplier)?;
            self.objective.after_step()?;
            self.not_finite = 0;
        } else {
            self.not_finite += 1;
            if self.not_finite >= MOST_NOT_FINITE {
                return Err(TrainError::NotFinite {
                    step: self.step + 1,
                    count: self.not_finite,
                });
            }
        }
        self.step += 1;
        let tokens: usize = batches.iter().map(|b| self.objective.tokens(b)).sum();
        self.tokens += tokens as u64;
        let seconds = start.elapsed().as_secs_f64();
        // A mean that forgets slow first steps.
        self.pace = if self.pace == 0.0 {
            seconds
        } else {
            0.95 * self.pace + 0.05 * seconds
        };
        Ok(Some(StepEvent {
            step: self.step,
            tokens: self.tokens,
            loss,
            lr: self.optimizer.config().lr() * multiplier,
            grad_norm: norm,
            clipped: self.config.clip.is_some_and(|clip| norm > clip),
            skipped: !finite,
            seconds,
            tokens_per_second: tokens as f64 / seconds.max(1e-9),
            seconds_left: self.pace * (self.config.steps - self.step) as f64,
        }))
    }

    /// Mean loss and its gradients over a global batch.
    pub fn gradients(
        &self,
        params: &[(String, Param)],
        batches: &[O::Batch],
    ) -> Result<(f64, BTreeMap<String, Tensor>)> {
        let weight: f64 = batches.iter().map(|b| self.objective.weight(b)).sum();
        let scale = 1.0 / weight.max(f64::MIN_POSITIVE);
        let mut loss = 0f64;
        let mut sum: BTreeMap<String, Tensor> = BTreeMap::new();
        let trained: Vec<&(String, Param)> =
            params.iter().filter(|(_, p)| p.group.trainable).collect();
        let like: Vec<Tensor> = trained
            .iter()
            .map(|(_, param)| param.var.as_detached_tensor())
            .collect();
        let threads = self.config.ranks;
        for round in batches.chunks(threads * self.comm.size()) {
            // Each process takes as many in a row as it has threads.
            let mine = (self.comm.rank() * threads).min(round.len());
            let mine = mine..(mine + threads).min(round.len());
            let mut made = Vec::new();
            for result in self.round(&round[mine.clone()], scale) {
                let (loss, mut store, notes) = result?;
                let gradients = trained.iter().map(|(_, param)| {
                    let gradient = store.remove(param.var.as_tensor());
                    gradient.map(|gradient| gradient.detach())
                });
                made.push(Part {
                    loss,
                    gradients: gradients.collect(),
                    notes,
                });
            }
            let mut made = made.into_iter();
            for index in 0..round.len() {
                let own = if mine.contains(&index) {
                    made.next()
                } else {
                    None
                };
                let part = match own {
                    Some(part) if self.comm.size() == 1 => part,
                    part => self.told(index / threads, part, &like)?,
                };
                loss += part.loss;
                self.objective.add_notes(&part.notes)?;
                for ((name, _), gradient) in trained.iter().zip(part.gradients) {
                    let Some(gradient) = gradient else {
                        continue;
                    };
                    match sum.get_mut(name) {
                        Some(sum) => *sum = (&*sum + gradient)?,
                        None => {
                            sum.insert(name.clone(), gradient);
                        }
                    }
                }
            }
        }
        Ok((loss, sum))
    }

    /// A micro-batch's part, told by the process that made it; `part` is that of this process.
    fn told(&self, from: usize, part: Option<Part>, like: &[Tensor]) -> Result<Part> {
        let mut bytes = match &part {
            Some(part) => pack(part)?,
            None => Vec::new(),
        };
        self.comm.broadcast(from, &mut bytes)?;
        Ok(match part {
            Some(part) => part,
            None => unpack(&bytes, like)?,
        })
    }

    /// One micro-batch per rank, at the same time; results in the order of micro-batches.
    fn round(&self, batches: &[O::Batch], scale: f64) -> Vec<Result<Made>> {
        let objective = &self.objective;
        // Notes are those of the thread that made them.
        let make = |batch| -> Result<Made> {
            let (loss, store) = objective.gradients(batch, scale)?;
            Ok((loss, store, objective.take_notes()))
        };
        if let ([batch], true) = (batches, ROOMY.get()) {
            return vec![make(batch)];
        }
        let make = &make;
        std::thread::scope(|scope| {
            let ranks: Vec<_> = batches
                .iter()
                .map(|batch| roomy(scope, "longspan-rank", move || make(batch)))
                .collect();
            ranks
                .into_iter()
                .map(|rank| match rank.map(|rank| rank.join()) {
                    Ok(Ok(result)) => result,
                    Ok(Err(panic)) => std::panic::resume_unwind(panic),
                    Err(source) => Err(TrainError::File {
                        path: "a rank's thread".into(),
                        source,
                    }),
                })
                .collect()
        })
    }
}
