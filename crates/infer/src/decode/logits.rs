//! From logits to the distribution that a token is drawn from.
//!
//! Order, as in Hugging Face transformers: logit bias, repetition penalty, presence and frequency penalty,
//! temperature, top-k, top-p, min-p; then the rest is normalised. Temperature 0 takes the likeliest token
//! after the penalties. Of equal logits the lower token id comes first, and top-k keeps exactly k.

mod config;
mod select;

pub use config::{SamplingConfig, SamplingError};
pub use select::{argmax, log_sum_exp, top_k};

use std::collections::HashMap;

/// Applies a [`SamplingConfig`] to the logits of one sequence, token after token.
#[derive(Debug, Clone)]
pub struct LogitsPipeline {
    config: SamplingConfig,
    counts: Counts,
    /// Tokens of the history that are prompt: the presence and frequency penalties skip them.
    prompt_len: Option<usize>,
    adjusted: Vec<f32>,
    weights: Vec<f32>,
    sums: Vec<f64>,
}

/// What may be drawn, with weights that are not normalised.
enum Support {
    One(u32),
    /// All of the vocabulary, by `weights` and `sums` of the pipeline.
    All,
    Some(Vec<(u32, f32)>),
}

impl LogitsPipeline {
    /// # Errors
    /// As [`SamplingConfig::validate`].
    pub fn new(config: SamplingConfig) -> Result<LogitsPipeline, SamplingError> {
        config.validate()?;
        Ok(LogitsPipeline {
            config,
            counts: Counts::default(),
            prompt_len: None,
            adjusted: Vec::new(),
            weights: Vec::new(),
            sums: Vec::new(),
        })
    }

    pub fn config(&self) -> &SamplingConfig {
        &self.config
    }

    /// Says how many tokens at the start of each history are prompt.
    /// If it is never called, the first history seen is all prompt.
    pub fn set_prompt_len(&mut self, tokens: usize) {
        self.prompt_len = Some(tokens);
        self.counts = Counts::default();
    }

    /// Draws a token from `logits` [vocab] after `history`, by a `uniform` number in [0, 1).
    pub fn draw(&mut self, logits: &[f32], history: &[u32], uniform: f64) -> u32 {
        match self.support(logits, history) {
            Support::One(token) => token,
            Support::All => {
                let total: f64 = self.sums.iter().sum();
                select::locate(&self.weights, &self.sums, uniform * total) as u32
            }
            Support::Some(list) => {
                let total: f64 = list.iter().map(|&(_, w)| f64::from(w)).sum();
                let weights = list.iter().map(|&(_, w)| w);
                list[select::locate_in(weights, uniform * total)].0
            }
        }
    }

    /// The tokens that [`LogitsPipeline::draw`] can give, with their probabilities, in its order.
    pub fn distribution(&mut self, logits: &[f32], history: &[u32]) -> Vec<(u32, f32)> {
        let mut list = match self.support(logits, history) {
            Support::One(token) => vec![(token, 1.0)],
            Support::All => (0..).zip(self.weights.iter().copied()).collect(),
            Support::Some(list) => list,
        };
        list.retain(|&(_, weight)| weight > 0.0);
        let total: f64 = list.iter().map(|&(_, w)| f64::from(w)).sum();
        for (_, weight) in &mut list {
            *weight = (f64::from(*weight) / total) as f32;
        }
        list
    }

    /// Logits after bias and penalties; the input itself where none applies.
    fn adjust<'a>(&'a mut self, logits: &'a [f32], history: &[u32]) -> &'a [f32] {
        let config = &self.config;
        let repetition = config.repetition_penalty;
        let (presence, frequency) = (config.presence_penalty, config.frequency_penalty);
        let penalised = repetition != 1.0 || presence != 0.0 || frequency != 0.0;
        let prompt_len = *self.prompt_len.get_or_insert(history.len());
        if !penalised && config.logit_bias.is_empty() {
            return logits;
        }
        self.adjusted.clear();
        self.adjusted.extend_from_slice(logits);
        for (&token, bias) in &config.logit_bias {
            if let Some(logit) = self.adjusted.get_mut(token as usize) {
                *logit += bias;
            }
        }
        if penalised {
            self.counts.follow(history, prompt_len);
            for (&token, seen) in &self.counts.seen {
                let Some(logit) = self.adjusted.get_mut(token as usize) else {
                    continue;
                };
                *logit = if *logit > 0.0 {
                    *logit / repetition
                } else {
                    *logit * repetition
                };
                if seen.answer > 0 {
                    *logit -= presence + frequency * seen.answer as f32;
                }
            }
        }
        &self.adjusted
    }

    fn support(&mut self, logits: &[f32], history: &[u32]) -> Support {
        let mut weights = std::mem::take(&mut self.weights);
        let mut sums = std::mem::take(&mut self.sums);
        let SamplingConfig {
            temperature,
            top_k,
            top_p,
            min_p,
            ..
        } = self.config;
        let logits = self.adjust(logits, history);
        let best = select::argmax(logits);
        let max = logits.get(best).copied().unwrap_or(f32::NEG_INFINITY);
        let support = if temperature == 0.0 || top_k == 1 || !max.is_finite() {
            // All tokens banned, or one infinitely likely: nothing is left to chance.
            Support::One(best as u32)
        } else {
            let weight = |logit: f32| select::exp((logit - max) / temperature);
            let candidates = |k: usize| -> Vec<(u32, f32)> {
                let mut list = select::top_k(logits, k);
                list.iter_mut()
                    .for_each(|(_, value)| *value = weight(*value));
                list
            };
            let mut list = if top_k > 0 && top_k < logits.len() {
                let mut list = candidates(top_k);
                if top_p < 1.0 {
                    let total = list.iter().map(|&(_, w)| f64::from(w)).sum::<f64>();
                    let kept = nucleus(&list, f64::from(top_p) * total);
                    list.truncate(kept.unwrap_or(list.len()));
                }
                Some(list)
            } else {
                select::weigh(logits, max, temperature, &mut weights, &mut sums);
                (top_p < 1.0).then(|| {
                    let mass = f64::from(top_p) * sums.iter().sum::<f64>();
                    // The nucleus is mostly small: look for it among few, then among all.
                    let mut list = candidates(64);
                    match nucleus(&list, mass) {
                        Some(kept) => list.truncate(kept),
                        None => list = wide_nucleus(logits, &weights, mass),
                    }
                    list
                })
            };
            if min_p > 0.0 {
                // The likeliest token has weight 1, so a weight is the ratio to it.
                match &mut list {
                    Some(list) => list.retain(|&(_, w)| w >= min_p),
                    None => {
                        let all = (0..).zip(weights.iter().copied());
                        list = Some(all.filter(|&(_, w)| w >= min_p).collect());
                    }
                }
            }
            list.map_or(Support::All, Support::Some)
        };
        self.weights = weights;
        self.sums = sums;
        support
    }
}

/// How many of `list`, largest first, reach the sum `mass`: each is kept whose betters do not reach it.
/// `None` if all together do not.
fn nucleus(list: &[(u32, f32)], mass: f64) -> Option<usize> {
    let mut running = 0.0;
    for (index, &(_, weight)) in list.iter().enumerate() {
        running += f64::from(weight);
        if running >= mass {
            return Some(index + 1);
        }
    }
    None
}

/// [`nucleus`] of a whole vocabulary without sorting it: bins by weight find where the sum crosses `mass`,
/// and only the bin of the crossing is sorted.
fn wide_nucleus(logits: &[f32], weights: &[f32], mass: f64) -> Vec<(u32, f32)> {
    // Bits of floats from 0 to 1 rise with their value: 8 bins to each power of two.
    let bin = |weight: f32| (weight.to_bits() >> 20) as usize;
    let mut sums = [0.0f64; 1024];
    for &weight in weights {
        sums[bin(weight)] += f64::from(weight);
    }
    let mut above = 0.0;
    let crossing = (0..sums.len()).rev().find(|&index| {
        let crosses = above + sums[index] >= mass;
        if !crosses {
            above += sums[index];
        }
        crosses
    });
    let crossing = crossing.unwrap_or(0);
    let mut kept = Vec::new();
    let mut edge = Vec::new();
    for (token, &weight) in (0u32..).zip(weights) {
        if bin(weight) > crossing {
            kept.push((token, weight));
        } else if bin(weight) == crossing && weight > 0.0 {
            edge.push((token, weight));
        }
    }
    // By logit, as weights of different logits may round to the same.
    edge.sort_unstable_by(|a, b| {
        logits[b.0 as usize]
            .total_cmp(&logits[a.0 as usize])
            .then(a.0.cmp(&b.0))
    });
    edge.truncate(nucleus(&edge, mass - above).unwrap_or(edge.len()));
    kept.append(&mut edge);
    kept
}

/// Which tokens a history holds, kept up to date as it grows, shrinks or changes.
#[derive(Debug, Clone, Default)]
struct Counts {
    /// The history counted.
    counted: Vec<u32>,
    seen: HashMap<u32, Seen>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    /// Occurrences in the prompt and in the answer.
    prompt: u32,
    answer: u32,
}

impl Counts {
    fn follow(&mut self, history: &[u32], prompt_len: usize) {
        let common = if history.starts_with(&self.counted) {
            self.counted.len()
        } else {
            let pairs = self.counted.iter().zip(history);
            pairs.take_while(|(a, b)| a == b).count()
        };
        for index in (common..self.counted.len()).rev() {
            let token = self.counted[index];
            if let Some(seen) = self.seen.get_mut(&token) {
                *seen.place(index, prompt_len) -= 1;
                if seen.prompt + seen.answer == 0 {
                    self.seen.remove(&token);
                }
            }
        }
        self.counted.truncate(common);
        for (index, &token) in history.iter().enumerate().skip(common) {
            *self.seen.entry(token).or_default().place(index, prompt_len) += 1;
            self.counted.push(token);
        }
    }
}

impl Seen {
    fn place(&mut self, index: usize, prompt_len: usize) -> &mut u32 {
        if index < prompt_len {
            &mut self.prompt
        } else {
            &mut self.answer
        }
    }
}

#[cfg(test)]
mod tests;
