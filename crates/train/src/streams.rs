//! Learning on streams of tokens with marked targets: a source, accuracy, and loss by position.

use crate::batch::PackedBatch;
use crate::error::{Result, TrainError};
use crate::objective::{LanguageModeling, Recompute};
use crate::optim::{OptimConfig, Optimizer};
use crate::schedule::Schedule;
use crate::source::{Source, state_from};
use crate::trainer::{LoopConfig, Trainer};
use candle_core::{D, DType, Device};
use longspan_data::random::Random;
use longspan_data::task::stream::{Marked, Streams};
use longspan_nn::model::{LanguageModel, StackConfig, StackLm};
use longspan_nn::params::ParamStore;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Arc;

/// Stretches of a text from random places, byte by byte; every byte is known from those before, as far as it can be.
#[derive(Clone, Debug)]
pub struct TextStreams {
    bytes: Vec<u8>,
}

impl TextStreams {
    /// `longest`: tokens of the longest stretch that will be asked for.
    pub fn new(bytes: &[u8], longest: usize) -> Result<Self> {
        if bytes.len() < longest.max(2) {
            return Err(TrainError::option(
                "text",
                format!("{} bytes", bytes.len()),
                format!("at least {}, the longest stretch read", longest.max(2)),
            ));
        }
        Ok(TextStreams {
            bytes: bytes.to_vec(),
        })
    }

    /// Loss of one who only knows how often each byte comes, nats.
    pub fn entropy(&self) -> f64 {
        let mut counts = [0usize; 256];
        self.bytes.iter().for_each(|&b| counts[usize::from(b)] += 1);
        let shares = counts.iter().map(|&n| n as f64 / self.bytes.len() as f64);
        shares.filter(|&p| p > 0.0).map(|p| -p * p.ln()).sum()
    }
}

impl Streams for TextStreams {
    fn vocab_size(&self) -> usize {
        256
    }

    fn sample(&self, length: usize, random: &mut Random) -> Marked {
        let length = length.min(self.bytes.len());
        let places = (self.bytes.len() - length + 1) as u64;
        let start = random.below(places) as usize;
        let stretch = &self.bytes[start..start + length];
        Marked {
            tokens: stretch.iter().map(|&b| u32::from(b)).collect(),
            known: vec![true; length],
        }
    }
}

/// Examples of a stream task, all of one length; only what can be known is a target.
pub struct StreamSource<'a> {
    task: &'a dyn Streams,
    length: usize,
    examples: usize,
    random: Random,
}

impl<'a> StreamSource<'a> {
    /// `purpose` names the stream of random numbers: training and test never share one.
    pub fn new(
        task: &'a dyn Streams,
        length: usize,
        examples: usize,
        seed: u64,
        purpose: &str,
    ) -> Result<Self> {
        if length == 0 || examples == 0 {
            return Err(TrainError::option(
                "length, examples",
                format!("{length} and {examples}"),
                "1 or more of each",
            ));
        }
        Ok(StreamSource {
            task,
            length,
            examples,
            random: Random::new(seed, purpose),
        })
    }
}

impl Source for StreamSource<'_> {
    type Batch = PackedBatch;

    fn next(&mut self, count: usize) -> Result<Vec<PackedBatch>> {
        Ok((0..count)
            .map(|_| {
                let mut batch = PackedBatch::default();
                for _ in 0..self.examples {
                    let row = self.task.sample(self.length, &mut self.random);
                    batch.push(&row.tokens, |t| if row.known[t] { 1.0 } else { 0.0 });
                }
                batch
            })
            .collect())
    }

    fn state(&self) -> Value {
        self.random.state().into()
    }

    fn load(&mut self, state: &Value) -> Result<()> {
        self.random = Random::from_state(state_from(state)?);
        Ok(())
    }
}

/// One lesson of a training.
#[derive(Clone)]
pub struct Lesson<'a> {
    /// The task.
    pub task: &'a dyn Streams,
    /// Tokens of an example.
    pub length: usize,
    /// Examples of a step.
    pub examples: usize,
    /// Optimiser steps.
    pub steps: u64,
}

/// One lesson after the other; the last goes on for ever.
struct LessonSource<'a> {
    /// Micro-batches of each lesson.
    lessons: Vec<(u64, StreamSource<'a>)>,
    at: LessonState,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LessonState {
    lesson: usize,
    /// Micro-batches of this lesson that were given out.
    given: u64,
}

impl Source for LessonSource<'_> {
    type Batch = PackedBatch;

    fn next(&mut self, count: usize) -> Result<Vec<PackedBatch>> {
        let mut out = Vec::with_capacity(count);
        for _ in 0..count {
            while self.at.lesson + 1 < self.lessons.len()
                && self.at.given >= self.lessons[self.at.lesson].0
            {
                self.at = LessonState {
                    lesson: self.at.lesson + 1,
                    given: 0,
                };
            }
            out.extend(self.lessons[self.at.lesson].1.next(1)?);
            self.at.given += 1;
        }
        Ok(out)
    }

    fn state(&self) -> Value {
        serde_json::json!([self.at, self.lessons[self.at.lesson].1.state()])
    }

    fn load(&mut self, state: &Value) -> Result<()> {
        let (at, inner): (LessonState, Value) = state_from(state)?;
        let count = self.lessons.len();
        let Some((_, source)) = self.lessons.get_mut(at.lesson) else {
            return Err(TrainError::option(
                "source state: lesson",
                at.lesson,
                format!("below {count}, as many as there are"),
            ));
        };
        source.load(&inner)?;
        self.at = at;
        Ok(())
    }
}

/// How a stack is trained on stream tasks.
#[derive(Clone)]
pub struct StreamTraining<'a> {
    /// What is learned, in this order: one lesson, or a curriculum over one vocabulary.
    pub lessons: Vec<Lesson<'a>>,
    /// Learning rate of AdamW; a cosine to a tenth, over all lessons, after 5 % of warm-up.
    pub lr: f64,
    /// Where.
    pub device: Device,
}

impl<'a> StreamTraining<'a> {
    /// Tokens of all lessons, as every one of them counts them.
    fn vocab_size(&self) -> Result<usize> {
        let sizes: Vec<usize> = self.lessons.iter().map(|l| l.task.vocab_size()).collect();
        match sizes.first() {
            Some(&size) if sizes.iter().all(|&s| s == size) => Ok(size),
            _ => Err(TrainError::option(
                "vocabularies of the lessons",
                format!("{sizes:?}"),
                "one lesson or more, all of one vocabulary",
            )),
        }
    }

    fn source(&self, seed: u64) -> Result<LessonSource<'a>> {
        let mut lessons = Vec::with_capacity(self.lessons.len());
        for (k, lesson) in self.lessons.iter().enumerate() {
            let purpose = match k {
                0 => "streams to learn".to_string(),
                _ => format!("streams to learn, lesson {k}"),
            };
            let (length, examples) = (lesson.length, lesson.examples);
            let source = StreamSource::new(lesson.task, length, examples, seed, &purpose)?;
            lessons.push((lesson.steps, source));
        }
        Ok(LessonSource {
            lessons,
            at: LessonState::default(),
        })
    }

    /// A trained model and its parameters; none when `go_on`, told of every step, says stop.
    pub fn run(
        &self,
        stack: &StackConfig,
        seed: u64,
        go_on: &mut dyn FnMut(f64) -> bool,
    ) -> Result<Option<(Arc<StackLm>, Arc<ParamStore>)>> {
        let params = Arc::new(ParamStore::new(seed, DType::F32, &self.device));
        let model = Arc::new(StackLm::new(stack, self.vocab_size()?, &params.root())?);
        let objective = LanguageModeling::new(model.clone(), Recompute::None, usize::MAX)?;
        let steps = self.lessons.iter().map(|l| l.steps).sum();
        let config = LoopConfig {
            steps,
            clip: Some(1.0),
            schedule: Schedule::Cosine {
                warmup: steps / 20,
                min_lr_ratio: 0.1,
            },
            ..LoopConfig::default()
        };
        let optimizer = Optimizer::new(OptimConfig::adamw(self.lr))?;
        let source = self.source(seed)?;
        let mut trainer = Trainer::new(params.clone(), optimizer, source, objective, config)?;
        while let Some(event) = trainer.step()? {
            if !go_on(event.step as f64 / steps.max(1) as f64) {
                return Ok(None);
            }
        }
        Ok(Some((model, params)))
    }

    /// As [`run`](Self::run), with the trained model on the CPU, which has every way to read it: state policies step token
    /// by token.
    pub fn run_to_cpu(
        &self,
        stack: &StackConfig,
        seed: u64,
        go_on: &mut dyn FnMut(f64) -> bool,
    ) -> Result<Option<(Arc<StackLm>, Arc<ParamStore>)>> {
        let trained = self.run(stack, seed, go_on)?;
        if self.device.is_cpu() {
            return Ok(trained);
        }
        let Some((_, params)) = trained else {
            return Ok(None);
        };
        let params = ParamStore::from_tensors(params.tensors(), DType::F32, &Device::Cpu);
        let model = StackLm::new(stack, self.vocab_size()?, &params.root())?;
        Ok(Some((Arc::new(model), Arc::new(params))))
    }
}

/// Share of the marked targets that are the likeliest token.
pub fn accuracy(model: &StackLm, batches: &[PackedBatch]) -> Result<f64> {
    let (mut right, mut count) = (0usize, 0usize);
    for batch in batches {
        batch.check(model.vocab_size())?;
        let hidden = model.hidden(&batch.ids, &batch.lengths)?.detach();
        let best = model.logits(&hidden)?.argmax(D::Minus1)?.to_vec1::<u32>()?;
        for ((best, target), weight) in best.iter().zip(&batch.targets).zip(&batch.weights) {
            if *weight > 0.0 {
                count += 1;
                right += usize::from(best == target);
            }
        }
    }
    Ok(right as f64 / count.max(1) as f64)
}

/// Mean loss of marked targets in each stretch of `bucket` positions, nats.
pub fn loss_by_position(
    model: &Arc<StackLm>,
    batches: &[PackedBatch],
    bucket: usize,
) -> Result<Vec<f64>> {
    let objective = LanguageModeling::new(model.clone(), Recompute::None, usize::MAX)?;
    let (mut sums, mut counts) = (Vec::<f64>::new(), Vec::<f64>::new());
    for batch in batches {
        let losses = objective.losses(batch)?;
        let mut start = 0;
        for &length in &batch.lengths {
            for t in 0..length {
                if batch.weights[start + t] > 0.0 {
                    let at = t / bucket.max(1);
                    if sums.len() <= at {
                        sums.resize(at + 1, 0.0);
                        counts.resize(at + 1, 0.0);
                    }
                    sums[at] += f64::from(losses[start + t]);
                    counts[at] += 1.0;
                }
            }
            start += length;
        }
    }
    Ok(sums.iter().zip(&counts).map(|(sum, n)| sum / n).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use longspan_data::task::stream::Rewrite;

    fn lesson(task: &dyn Streams, length: usize, steps: u64) -> Lesson<'_> {
        Lesson {
            task,
            length,
            examples: 2,
            steps,
        }
    }

    #[test]
    fn lessons_follow_each_other_and_resume() {
        let task = Rewrite::default();
        let training = |lessons| StreamTraining {
            lessons,
            lr: 1e-3,
            device: Device::Cpu,
        };
        let two = training(vec![lesson(&task, 4, 3), lesson(&task, 8, 2)]);
        let mut source = two.source(1).unwrap();
        let lengths = |batches: &[PackedBatch]| -> Vec<usize> {
            batches.iter().map(|b| b.lengths[0]).collect()
        };
        let first = source.next(4).unwrap();
        assert_eq!(lengths(&first), [4, 4, 4, 8]);
        let state = source.state();
        let rest = source.next(3).unwrap();
        assert_eq!(lengths(&rest), [8, 8, 8]);
        let mut again = two.source(1).unwrap();
        again.load(&state).unwrap();
        assert_eq!(again.next(3).unwrap(), rest);
        let outside = serde_json::json!([{"lesson": 2, "given": 0}, 0]);
        assert!(again.load(&outside).is_err());
        let other = Rewrite {
            keys: 3,
            ..Rewrite::default()
        };
        let mixed = training(vec![lesson(&task, 4, 1), lesson(&other, 4, 1)]);
        assert!(mixed.vocab_size().is_err() && training(Vec::new()).vocab_size().is_err());
    }

    #[test]
    fn losses_are_sorted_by_position_and_sources_resume() {
        let task = Rewrite {
            keys: 4,
            values: 4,
            change: 0.2,
            horizon: None,
        };
        let training = StreamTraining {
            lessons: vec![lesson(&task, 16, 2)],
            lr: 1e-3,
            device: Device::Cpu,
        };
        let stack =
            serde_json::json!({"d_model": 8, "layers": 1, "mixer": {"kind": "lru", "n": 4}});
        let stack: StackConfig = serde_json::from_value(stack).unwrap();
        let (model, _) = training.run(&stack, 0, &mut |_| true).unwrap().unwrap();
        assert!(training.run(&stack, 0, &mut |_| false).unwrap().is_none());
        let mut source = StreamSource::new(&task, 32, 3, 1, "test").unwrap();
        let state = source.state();
        let batches = source.next(2).unwrap();
        source.load(&state).unwrap();
        assert_eq!(source.next(2).unwrap(), batches);
        let losses = loss_by_position(&model, &batches, 8).unwrap();
        assert_eq!(losses.len(), 4);
        assert!(
            losses.iter().all(|l| l.is_finite() && *l > 0.0),
            "{losses:?}"
        );
        let share = accuracy(&model, &batches).unwrap();
        assert!((0.0..=1.0).contains(&share));
        assert!(StreamSource::new(&task, 0, 1, 0, "x").is_err());
    }

    #[test]
    fn stretches_of_a_text_lie_in_it_and_their_bytes_are_targets() {
        let text = b"abcdefghij".repeat(3);
        let task = TextStreams::new(&text, 12).unwrap();
        let batch = StreamSource::new(&task, 12, 20, 1, "test").unwrap();
        let batch = { batch }.next(1).unwrap().remove(0);
        batch.check(task.vocab_size()).unwrap();
        assert_eq!(batch.total_weight(), 20.0 * 11.0);
        let mut starts = std::collections::BTreeSet::new();
        for row in batch.ids.chunks(12) {
            assert!(
                row.windows(2)
                    .all(|w| w[1] == w[0] + 1 || w == [106, 97].as_slice())
            );
            starts.insert(row[0]);
        }
        assert!(starts.len() > 3, "{starts:?}");
        assert!((task.entropy() - 10f64.ln()).abs() < 1e-12);
        // The whole text is the longest stretch; a longer one is refused.
        let whole = TextStreams::new(&text, 30).unwrap();
        let row = whole.sample(30, &mut Random::new(0, "test"));
        assert_eq!((row.tokens.len(), row.tokens[29]), (30, 106));
        let error = TextStreams::new(&text, 31).unwrap_err().to_string();
        assert!(
            error.contains("30 bytes") && error.contains("31"),
            "{error}"
        );
    }
}
