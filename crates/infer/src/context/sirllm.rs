//! SirLLM: the first tokens and those that surprised the model most, re-indexed as if they were
//! adjacent; memories fade from round to round.
//!
//! For talks without end on a fixed cache that still know what was said. Paper: arXiv 2405.12528.

use super::{
    Call, ContextPolicy, LayerAt, Part, Plan, PolicyReport, PolicySpec, Positions, Queries,
};
use crate::kv::KvStore;
use crate::wire::{read_f32s, read_u64, write_f32s, write_u64};
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};

/// Tokens of one call at most: its logits are held at a time.
const CHUNK: usize = 256;
/// Slots freed at a time while an answer is written.
const ANSWER_ROOM: usize = 32;

/// What a token's place in memory is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Entropy {
    /// Its surprisal, -log p given what came before: the paper's formula.
    #[default]
    Paper,
    /// How little the model expected the token before it to be repeated: what the published code
    /// computes.
    SelfShifted,
    /// Shannon entropy of the distribution it was drawn from.
    Predictive,
}

/// `sirllm:top=1020,decay=0.9`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SirLlmConfig {
    /// First tokens kept (`start_size`).
    pub start: usize,
    /// Last tokens that fit beside the others (`recent_size`).
    pub recent: usize,
    /// Surprising tokens kept (`token_entropy_size`); default what the window leaves, at most 1020.
    pub top: Option<usize>,
    /// eta: factor on what is remembered, once a round.
    pub decay: f64,
    /// The measure of surprise.
    pub entropy: Entropy,
}

impl Default for SirLlmConfig {
    fn default() -> Self {
        SirLlmConfig {
            start: 4,
            recent: 0,
            top: None,
            decay: 1.0,
            entropy: Entropy::Paper,
        }
    }
}

impl SirLlmConfig {
    fn top(&self, window: u64) -> usize {
        let left = (window as usize).saturating_sub(self.start + self.recent);
        self.top.unwrap_or(left.min(1020))
    }

    /// Refuses impossible values; the text names the option, the value and what is allowed.
    pub fn check(&self, window: u64) -> Result<(), String> {
        let capacity = self.start + self.recent + self.top(window);
        if capacity as u64 > window {
            return Err(format!(
                "start + recent + top = {capacity} tokens, more than the model's window of {window}"
            ));
        }
        if capacity <= self.start {
            return Err("recent + top is 0, expected at least 1".into());
        }
        if !(0.0..=1.0).contains(&self.decay) {
            return Err(format!("decay is {}, expected 0 to 1", self.decay));
        }
        Ok(())
    }
}

/// See the module's text.
#[derive(Clone)]
pub struct SirLlm {
    config: SirLlmConfig,
    top: usize,
    /// Decayed worth of each cached token.
    entropy: Vec<f32>,
    /// Number in the text of each cached token.
    tokens: Vec<u64>,
    /// Tokens read so far.
    seen: u64,
    /// Logits after the last token: they predict the next call's first.
    last: Vec<f32>,
    /// The call under way opened a round.
    opens_round: bool,
    evicted: u64,
}

/// The cached tokens to keep, ascending, when `incoming` more are to fit into
/// `start + recent + top` slots: the first, the most surprising, then the most recent ones.
pub fn keep(
    entropy: &[f32],
    incoming: usize,
    start: usize,
    recent: usize,
    top: usize,
) -> Vec<usize> {
    let n = entropy.len();
    let capacity = start + recent + top;
    if n + incoming <= capacity {
        return (0..n).collect();
    }
    let mut kept = vec![false; n];
    let best = top.saturating_sub(incoming).min(n);
    if best > 0 {
        let mut order: Vec<usize> = (0..n).collect();
        order.select_nth_unstable_by(best - 1, |&a, &b| {
            entropy[b].total_cmp(&entropy[a]).then(a.cmp(&b))
        });
        order[..best].iter().for_each(|&index| kept[index] = true);
    }
    kept[..start.min(n)].fill(true);
    let mut count = kept.iter().filter(|&&kept| kept).count();
    for index in (1..n).rev() {
        if count + incoming >= capacity {
            break;
        }
        if !kept[index] {
            kept[index] = true;
            count += 1;
        }
    }
    (0..n).filter(|&index| kept[index]).collect()
}

impl SirLlm {
    /// The configuration must have passed [`SirLlmConfig::check`].
    pub fn new(config: &SirLlmConfig, window: u64) -> Self {
        SirLlm {
            config: config.clone(),
            top: config.top(window),
            entropy: Vec::new(),
            tokens: Vec::new(),
            seen: 0,
            last: Vec::new(),
            opens_round: false,
            evicted: 0,
        }
    }

    fn capacity(&self) -> usize {
        self.config.start + self.config.recent + self.top
    }

    /// Frees slots for `incoming` tokens in every layer.
    fn make_room(
        &mut self,
        incoming: usize,
        layers: &[usize],
        store: &mut KvStore,
    ) -> io::Result<()> {
        let SirLlmConfig { start, recent, .. } = self.config;
        let kept = keep(&self.entropy, incoming, start, recent, self.top);
        if kept.len() == self.entropy.len() {
            return Ok(());
        }
        self.evicted += (self.entropy.len() - kept.len()) as u64;
        let order: Vec<u64> = kept.iter().map(|&index| index as u64).collect();
        let order = vec![order; store.layout().num_kv_heads];
        for &layer in layers {
            store.rearrange(layer, &order, true)?;
        }
        self.entropy = kept.iter().map(|&index| self.entropy[index]).collect();
        self.tokens = kept.iter().map(|&index| self.tokens[index]).collect();
        Ok(())
    }

    /// What each of the tokens of a call is worth; `row(t)`: logits after token t.
    fn worth(&self, tokens: &[u32], logits: &[f32]) -> Vec<f32> {
        let vocab = logits.len() / tokens.len();
        let rows: Vec<&[f32]> = logits.chunks_exact(vocab).collect();
        let mut worth = vec![0f32; tokens.len()];
        match self.config.entropy {
            Entropy::SelfShifted => {
                let repeated: Vec<f32> = rows
                    .iter()
                    .zip(tokens)
                    .map(|(row, &token)| surprisal(row, token))
                    .collect();
                worth[1..].copy_from_slice(&repeated[..tokens.len() - 1]);
                worth[0] = repeated.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            }
            kind => {
                let value = |row: &[f32], token: u32| match kind {
                    Entropy::Predictive => shannon(row),
                    _ => surprisal(row, token),
                };
                for index in 1..tokens.len() {
                    worth[index] = value(rows[index - 1], tokens[index]);
                }
                // A round's first token has no predictor inside of it.
                worth[0] = if tokens.len() > 1 && (self.opens_round || self.last.is_empty()) {
                    worth[1..].iter().copied().fold(f32::NEG_INFINITY, f32::max)
                } else if self.last.is_empty() {
                    0.0
                } else {
                    value(&self.last, tokens[0])
                };
            }
        }
        worth
    }
}

/// ln of the sum of exponentials, and the largest logit.
fn log_sum(row: &[f32]) -> (f64, f64) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let sum: f64 = row.iter().map(|&x| (x as f64 - max).exp()).sum();
    (max + sum.ln(), max)
}

fn surprisal(row: &[f32], token: u32) -> f32 {
    (log_sum(row).0 - row[token as usize] as f64) as f32
}

fn shannon(row: &[f32]) -> f32 {
    let (total, _) = log_sum(row);
    let mean: f64 = row
        .iter()
        .map(|&x| (x as f64 - total).exp() * (total - x as f64))
        .filter(|x| x.is_finite())
        .sum();
    mean as f32
}

impl ContextPolicy for SirLlm {
    fn spec(&self) -> PolicySpec {
        PolicySpec {
            chunk: CHUNK.min(self.capacity() - self.config.start),
            raw_keys: true,
            rearranges: true,
            positions: Positions::Cache,
            logits: true,
            ..PolicySpec::default()
        }
    }

    fn begin_call(&mut self, call: &Call<'_>, store: &mut KvStore) -> io::Result<()> {
        if let Some(&layer) = call.layers.first()
            && store.len(layer) != self.entropy.len() as u64
        {
            return Err(io::Error::other(format!(
                "SirLLM: {} tokens are cached, {} are known",
                store.len(layer),
                self.entropy.len()
            )));
        }
        let (n, most) = (self.entropy.len(), self.capacity() - self.config.start);
        if call.tokens > most {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "sirllm: a call of {} tokens does not fit beside the first {}, expected at most recent + top = {most}",
                    call.tokens, self.config.start
                ),
            ));
        }
        self.opens_round = call.round.is_some();
        if let Some(round) = call.round {
            self.make_room(round.clamp(call.tokens, most), call.layers, store)?;
            self.entropy
                .iter_mut()
                .for_each(|e| *e *= self.config.decay as f32);
        } else if n + call.tokens > self.capacity() {
            let room = call.tokens.max(ANSWER_ROOM.min(most));
            self.make_room(room, call.layers, store)?;
        }
        Ok(())
    }

    fn plan(&mut self, at: LayerAt, _: &Queries<'_>, _: &mut KvStore) -> io::Result<Plan> {
        Ok(Plan {
            parts: vec![Part::causal(0..at.end())],
        })
    }

    fn end_call(&mut self, tokens: &[u32], logits: &[f32]) -> io::Result<()> {
        let worth = self.worth(tokens, logits);
        self.entropy.extend_from_slice(&worth);
        self.tokens
            .extend(self.seen..self.seen + tokens.len() as u64);
        self.seen += tokens.len() as u64;
        let vocab = logits.len() / tokens.len();
        self.last.clear();
        self.last.extend_from_slice(&logits[logits.len() - vocab..]);
        Ok(())
    }

    fn fork(&self) -> Box<dyn ContextPolicy> {
        Box::new(self.clone())
    }

    fn save(&self, out: &mut dyn Write) -> io::Result<()> {
        write_u64(out, self.seen)?;
        write_u64(out, self.evicted)?;
        write_f32s(out, &self.entropy)?;
        write_f32s(out, &self.last)?;
        self.tokens
            .iter()
            .try_for_each(|&token| write_u64(out, token))
    }

    fn load(&mut self, input: &mut dyn Read) -> io::Result<()> {
        self.seen = read_u64(input)?;
        self.evicted = read_u64(input)?;
        self.entropy = read_f32s(input)?;
        self.last = read_f32s(input)?;
        if self.entropy.len() > self.capacity() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "SirLLM state: {} tokens are kept, expected at most {}",
                    self.entropy.len(),
                    self.capacity()
                ),
            ));
        }
        self.tokens = (0..self.entropy.len())
            .map(|_| read_u64(input))
            .collect::<io::Result<_>>()?;
        Ok(())
    }

    fn kept(&self) -> Vec<(u64, f32)> {
        let tokens = self.tokens.iter().copied();
        tokens.zip(self.entropy.iter().copied()).collect()
    }

    fn report(&self) -> PolicyReport {
        PolicyReport {
            evicted: self.evicted,
            index_bytes: (4 * (self.entropy.len() + self.last.len()) + 8 * self.tokens.len())
                as u64,
            ..PolicyReport::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn surprisal_and_entropy_are_those_of_the_definition() {
        let row = [1.0f32, 2.0, 0.5, f32::NEG_INFINITY];
        let total: f64 = row.iter().map(|&x| (x as f64).exp()).sum();
        let p: Vec<f64> = row.iter().map(|&x| (x as f64).exp() / total).collect();
        assert!((surprisal(&row, 1) as f64 + p[1].ln()).abs() < 1e-6);
        let want: f64 = p.iter().filter(|&&p| p > 0.0).map(|p| -p * p.ln()).sum();
        assert!((shannon(&row) as f64 - want).abs() < 1e-6);
    }

    #[test]
    fn without_decay_left_only_the_newest_round_competes() {
        // Older tokens are ties at 0: the lowest index first.
        let entropy = [0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 1.0, 2.0];
        assert_eq!(keep(&entropy, 2, 0, 0, 7), [0, 1, 5, 6, 7]);
        // And with none kept by surprise the newest fill the room.
        assert_eq!(keep(&entropy, 2, 1, 5, 0), [0, 5, 6, 7]);
    }
}
