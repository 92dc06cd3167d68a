//! XL3M: reads an arbitrarily long prompt in short segments, keeps those after which the model is surest
//! of the next token, and answers from them alone.
//!
//! For needle-type questions over texts far beyond a model's window, without training and with a trail of
//! what was used (XL3M, arXiv 2405.17755). A planner before the engine: it needs only the distribution of
//! the next token, behind [`NextToken`], which an engine gives in full and an endpoint in part.

use crate::engine::{Engine, EngineError, EngineOptions, Sequence, Want};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ops::Range;

/// How a long prompt is cut and what is kept of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KeyContextConfig {
    /// Tokens of a segment (w).
    pub segment: usize,
    /// Tokens from one segment's start to the next (s); default `segment`, less gives overlap.
    pub stride: Option<usize>,
    /// Most segments kept (k); fewer where the window has no room for them.
    pub keep: usize,
    /// Keep only segments with at most this entropy in nats, still `keep` at most.
    pub threshold: Option<f64>,
    /// Tokens that stand between kept ranges that do not touch; none by default.
    pub separator: Vec<u32>,
}

impl Default for KeyContextConfig {
    fn default() -> Self {
        KeyContextConfig {
            segment: 512,
            stride: None,
            keep: 4,
            threshold: None,
            separator: Vec::new(),
        }
    }
}

/// What a prompt is made of, and the room there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Tokens at the start that every sub-context begins with: BOS, instructions.
    pub head: usize,
    /// Tokens at the end that follow every segment. They must end exactly where the answer starts: certainty
    /// about the first token of the answer is what is measured.
    pub question: usize,
    /// The model's window, tokens (`L_max`).
    pub window: usize,
    /// Tokens kept free for the answer (g).
    pub generation: usize,
}

/// Why no plan can be made.
#[derive(Debug, thiserror::Error)]
pub enum KeyContextError {
    /// Sizes that do not fit together. The text names them.
    #[error("xl3m: {0}")]
    Config(String),
    /// The model failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The source of distributions failed, or answered with something else.
    #[error("xl3m: {0}")]
    Source(String),
}

/// What is known of the next token.
#[derive(Clone, Debug, PartialEq)]
pub enum Distribution {
    /// Logits of the whole vocabulary.
    Logits(Vec<f32>),
    /// Log-probabilities of the likeliest tokens only, as endpoints give them.
    Top(Vec<f32>),
}

impl Distribution {
    /// Entropy in nats, and whether it is approximate. Of likeliest tokens only, what they leave counts as one
    /// more token, so the true entropy is at least this.
    pub fn entropy(&self) -> (f64, bool) {
        let term = |log_p: f64| {
            if log_p == f64::NEG_INFINITY {
                0.0
            } else {
                -log_p * log_p.exp()
            }
        };
        match self {
            Distribution::Logits(logits) => {
                let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let top = f64::from(top);
                let sum: f64 = logits.iter().map(|&l| (f64::from(l) - top).exp()).sum();
                let log_z = top + sum.ln();
                let of = |&logit: &f32| term(f64::from(logit) - log_z);
                (logits.iter().map(of).sum(), false)
            }
            Distribution::Top(log_p) => {
                let known: f64 = log_p.iter().map(|&l| f64::from(l).exp()).sum();
                let rest = (1.0 - known).max(0.0).ln();
                let sum: f64 = log_p.iter().map(|&l| term(f64::from(l))).sum();
                (sum + term(rest), true)
            }
        }
    }
}

/// The `most` segments of least entropy, and of at most `threshold` nats, in the order of the text. Of equals the
/// earlier ones are kept.
pub fn choose(entropies: &[f64], most: usize, threshold: Option<f64>) -> Vec<usize> {
    let mut order: Vec<usize> = (0..entropies.len()).collect();
    // The sort is stable: of equals the earlier one comes first.
    order.sort_by(|&a, &b| entropies[a].total_cmp(&entropies[b]));
    if let Some(threshold) = threshold {
        order.retain(|&index| entropies[index] <= threshold);
    }
    order.truncate(most);
    order.sort_unstable();
    order
}

/// Gives the distribution of the token after each of some independent texts.
pub trait NextToken {
    /// Each prefix, followed by the common question, is a text of its own from position 0 on. Answers stand
    /// in the order of the prefixes.
    fn next_token(
        &mut self,
        prefixes: &[Vec<u32>],
        question: &[u32],
    ) -> Result<Vec<Distribution>, KeyContextError>;

    /// How many prefixes to hand over at once.
    fn batch(&self) -> usize {
        1
    }
}

/// One segment and what it was worth.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Segment {
    /// Its tokens in the prompt.
    pub range: Range<usize>,
    /// Entropy of the next token after it and the question, nats.
    pub entropy: f64,
    /// Whether it is part of the key context.
    pub kept: bool,
}

/// The prompt to answer from, and how it came about.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KeyContextPlan {
    /// All segments in order; empty if the prompt fits the window as it is.
    pub segments: Vec<Segment>,
    /// Head, kept ranges in order, question.
    pub tokens: Vec<u32>,
    /// The kept ranges of the prompt, overlapping ones merged.
    pub ranges: Vec<Range<usize>>,
    /// Entropies come from the likeliest tokens only.
    pub approx: bool,
}

/// See the module's text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KeyContextPlanner {
    config: KeyContextConfig,
}

impl KeyContextPlanner {
    /// Errors on sizes of 0 and on a stride that would skip tokens.
    pub fn new(config: KeyContextConfig) -> Result<Self, KeyContextError> {
        let stride = config.stride.unwrap_or(config.segment);
        for (name, value) in [
            ("segment", config.segment),
            ("stride", stride),
            ("keep", config.keep),
        ] {
            if value == 0 {
                return Err(KeyContextError::Config(format!(
                    "{name} is 0, expected at least 1"
                )));
            }
        }
        if stride > config.segment {
            return Err(KeyContextError::Config(format!(
                "stride is {stride}, expected at most the segment of {}: tokens between would never be read",
                config.segment
            )));
        }
        if config.threshold.is_some_and(|t| t.is_nan() || t < 0.0) {
            return Err(KeyContextError::Config(format!(
                "threshold is {:?}, expected nats of at least 0",
                config.threshold
            )));
        }
        Ok(KeyContextPlanner { config })
    }

    /// The segments of a prompt of so many tokens, as ranges of the prompt.
    pub fn segments(&self, tokens: usize, head: usize, question: usize) -> Vec<Range<usize>> {
        let (segment, stride) = (
            self.config.segment,
            self.config.stride.unwrap_or(self.config.segment),
        );
        let length = tokens.saturating_sub(head + question);
        let mut segments = Vec::new();
        let mut start = 0;
        while start < length {
            let end = (start + segment).min(length);
            segments.push(head + start..head + end);
            // A shorter segment is only there to reach the end.
            if end == length {
                break;
            }
            start += stride;
        }
        segments
    }

    /// How many segments fit beside head, question and answer.
    fn room(&self, shape: Shape) -> Result<usize, KeyContextError> {
        let Shape {
            head,
            question,
            window,
            generation,
        } = shape;
        let each = self.config.segment + self.config.separator.len();
        let free = window.checked_sub(generation + head + question);
        match free.map_or(0, |free| free / each) {
            0 => Err(KeyContextError::Config(format!(
                "a window of {window} tokens has no room for one segment of {} beside {head} of the head, {question} of the question and {generation} of the answer; shorten the segment or the question",
                self.config.segment
            ))),
            most => Ok(most.min(self.config.keep)),
        }
    }

    /// Reads every segment of `tokens` with the question and chooses. A prompt that fits the window is returned
    /// as it is, without asking the model.
    pub fn plan(
        &self,
        source: &mut dyn NextToken,
        tokens: &[u32],
        shape: Shape,
    ) -> Result<KeyContextPlan, KeyContextError> {
        self.plan_with(source, tokens, shape, &mut |_, _| true)
    }

    /// As [`plan`](Self::plan); `progress(done, all)` is called after every batch and stops the scan by
    /// returning false, which ends in [`EngineError::Cancelled`].
    pub fn plan_with(
        &self,
        source: &mut dyn NextToken,
        tokens: &[u32],
        shape: Shape,
        progress: &mut dyn FnMut(usize, usize) -> bool,
    ) -> Result<KeyContextPlan, KeyContextError> {
        let Shape { head, question, .. } = shape;
        if question == 0 || head + question > tokens.len() {
            return Err(KeyContextError::Config(format!(
                "a prompt of {} tokens cannot have {head} of head and {question} of question; expected a question of at least 1",
                tokens.len()
            )));
        }
        if tokens.len() + shape.generation <= shape.window {
            let whole = head..tokens.len() - question;
            return Ok(KeyContextPlan {
                segments: Vec::new(),
                tokens: tokens.to_vec(),
                ranges: Vec::from_iter((!whole.is_empty()).then_some(whole)),
                approx: false,
            });
        }
        let most = self.room(shape)?;
        let ranges = self.segments(tokens.len(), head, question);
        let asked = &tokens[tokens.len() - question..];
        let mut entropies = Vec::with_capacity(ranges.len());
        let mut approx = false;
        for batch in ranges.chunks(source.batch().max(1)) {
            let prefix = |range: &Range<usize>| [&tokens[..head], &tokens[range.clone()]].concat();
            let prefixes: Vec<Vec<u32>> = batch.iter().map(prefix).collect();
            let found = source.next_token(&prefixes, asked)?;
            if found.len() != batch.len() {
                return Err(KeyContextError::Source(format!(
                    "found {} distributions, expected {}",
                    found.len(),
                    batch.len()
                )));
            }
            for distribution in found {
                let (entropy, rough) = distribution.entropy();
                if entropy.is_nan() {
                    return Err(KeyContextError::Source(format!(
                        "segment {} has a distribution without entropy (logits that are not numbers)",
                        entropies.len()
                    )));
                }
                entropies.push(entropy);
                approx |= rough;
            }
            let done = entropies.len();
            if !progress(done, ranges.len()) && done < ranges.len() {
                return Err(EngineError::Cancelled {
                    read: ranges[done - 1].end,
                    total: tokens.len(),
                }
                .into());
            }
        }
        let order = choose(&entropies, most, self.config.threshold);
        let mut merged: Vec<Range<usize>> = Vec::new();
        for &index in &order {
            let range = ranges[index].clone();
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = range.end.max(last.end),
                _ => merged.push(range),
            }
        }
        let mut chosen = tokens[..head].to_vec();
        for (index, range) in merged.iter().enumerate() {
            if index > 0 {
                chosen.extend(&self.config.separator);
            }
            chosen.extend(&tokens[range.clone()]);
        }
        chosen.extend(asked);
        let segments = ranges.into_iter().zip(entropies).enumerate();
        Ok(KeyContextPlan {
            segments: segments
                .map(|(index, (range, entropy))| Segment {
                    range,
                    entropy,
                    kept: order.binary_search(&index).is_ok(),
                })
                .collect(),
            tokens: chosen,
            ranges: merged,
            approx,
        })
    }
}

/// [`NextToken`] from an engine: all prefixes of a batch in one pass.
pub struct EngineSource<'a> {
    engine: &'a Engine,
    options: EngineOptions,
    batch: usize,
    /// Prefixes that were read, for further questions about the same text.
    kept: Option<HashMap<Vec<u32>, Sequence>>,
}

impl<'a> EngineSource<'a> {
    /// Reads `batch` segments at a time under `options`.
    pub fn new(engine: &'a Engine, options: EngineOptions, batch: usize) -> Self {
        EngineSource {
            engine,
            options,
            batch: batch.max(1),
            kept: None,
        }
    }

    /// Keeps the keys and values of every segment, so that another question reads itself only. Costs the
    /// memory of the whole text's keys and values.
    pub fn with_reuse(mut self) -> Self {
        self.kept = Some(HashMap::new());
        self
    }

    /// Bytes of keys and values kept for reuse.
    pub fn kept_bytes(&self) -> u64 {
        let kept = self.kept.iter().flat_map(HashMap::values);
        kept.map(|sequence| sequence.kv_bytes().memory).sum()
    }

    /// Sequences that have read a prefix each.
    fn read(&mut self, prefixes: &[Vec<u32>]) -> Result<Vec<Sequence>, KeyContextError> {
        let mut sequences = Vec::with_capacity(prefixes.len());
        let mut fresh = Vec::new();
        for (index, prefix) in prefixes.iter().enumerate() {
            let known = self.kept.as_ref().and_then(|kept| kept.get(prefix));
            sequences.push(match known {
                Some(sequence) => sequence.fork(),
                None => {
                    fresh.push(index);
                    self.engine.sequence(&self.options, None)?
                }
            });
        }
        let mut rows: Vec<(&mut Sequence, &[u32])> = sequences
            .iter_mut()
            .enumerate()
            .filter(|(index, _)| fresh.contains(index))
            .map(|(index, sequence)| (sequence, &prefixes[index][..]))
            .collect();
        self.engine.forward(&mut rows, Want::Nothing)?;
        if let Some(kept) = &mut self.kept {
            for index in fresh {
                kept.insert(prefixes[index].clone(), sequences[index].fork());
            }
        }
        Ok(sequences)
    }
}

impl NextToken for EngineSource<'_> {
    fn next_token(
        &mut self,
        prefixes: &[Vec<u32>],
        question: &[u32],
    ) -> Result<Vec<Distribution>, KeyContextError> {
        let vocab = self.engine.model().config().vocab_size;
        let logits = if self.kept.is_some() {
            let mut sequences = self.read(prefixes)?;
            let mut rows: Vec<(&mut Sequence, &[u32])> =
                sequences.iter_mut().map(|s| (s, question)).collect();
            self.engine.forward(&mut rows, Want::Last)?
        } else {
            let texts: Vec<Vec<u32>> = prefixes.iter().map(|p| [p, question].concat()).collect();
            let mut sequences = texts
                .iter()
                .map(|_| self.engine.sequence(&self.options, None))
                .collect::<Result<Vec<_>, _>>()?;
            let mut rows: Vec<(&mut Sequence, &[u32])> = sequences
                .iter_mut()
                .zip(&texts)
                .map(|(s, t)| (s, &t[..]))
                .collect();
            self.engine.forward(&mut rows, Want::Last)?
        };
        let rows = logits.chunks_exact(vocab);
        Ok(rows.map(|row| Distribution::Logits(row.to_vec())).collect())
    }

    fn batch(&self) -> usize {
        self.batch
    }
}
