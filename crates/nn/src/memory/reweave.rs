//! Contextual Memory Reweaving: residual states of tokens that later text leaned on are kept from several
//! layers, aligned layer by layer (LLSR), and woven back into the stream beyond the window.
//!
//! For models of a fixed window that must not lose names and numbers, once the adapter is trained: untrained,
//! its gate is shut and it changes nothing. Paper: arXiv 2502.02046, which has no equation; what makes it
//! executable here is this project's definition. Its training-free form is the policy `cmr` of the engine.

use serde::{Deserialize, Serialize};

/// What is captured, and when it is forgotten.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReweaveConfig {
    /// C: the residual stream after this many blocks is captured; default a quarter, a half and three quarters.
    pub capture_layers: Vec<usize>,
    /// S: tokens of a chunk; memory is constant within one.
    pub segment: usize,
    /// kappa: share of a chunk's tokens that may be kept.
    pub keep: f64,
    /// tau: least relevance; 1 is what uniform attention gives.
    pub min_relevance: f64,
    /// M: most tokens kept.
    pub capacity: usize,
    /// gamma: factor on a token's relevance for each chunk since.
    pub decay: f64,
    /// Tokens nearer than this say nothing about relevance; default a quarter of the window.
    pub delta: Option<usize>,
}

impl Default for ReweaveConfig {
    fn default() -> Self {
        ReweaveConfig {
            capture_layers: Vec::new(),
            segment: 256,
            keep: 0.125,
            min_relevance: 1.0,
            capacity: 512,
            decay: 0.98,
            delta: None,
        }
    }
}

impl ReweaveConfig {
    /// The layers captured in a model of this depth.
    pub fn layers(&self, depth: usize) -> Vec<usize> {
        if !self.capture_layers.is_empty() {
            return self.capture_layers.clone();
        }
        let mut layers: Vec<usize> = (1..4).map(|part| (2 * depth * part + 4) / 8).collect();
        layers.dedup();
        layers
    }

    /// Refuses impossible values; the text names the option, the value and what is allowed.
    pub fn check(&self) -> Result<(), String> {
        for (name, value) in [("segment", self.segment), ("capacity", self.capacity)] {
            if value == 0 {
                return Err(format!("{name} is 0, expected at least 1"));
            }
        }
        if !(self.keep > 0.0 && self.keep <= 1.0) {
            return Err(format!(
                "keep is {}, expected above 0 and at most 1",
                self.keep
            ));
        }
        if self.min_relevance.is_nan() || self.min_relevance < 0.0 {
            return Err(format!(
                "min_relevance is {}, expected at least 0",
                self.min_relevance
            ));
        }
        if !(self.decay > 0.0 && self.decay <= 1.0) {
            return Err(format!(
                "decay is {}, expected above 0 and at most 1",
                self.decay
            ));
        }
        Ok(())
    }

    /// Indices of the tokens that a leaving chunk keeps, ascending: the `keep` share of largest relevance (ties to
    /// the earlier), without those below `min_relevance`.
    pub fn pick(&self, relevance: &[f32]) -> Vec<usize> {
        // The small constant keeps a rounded share such as 0.4 from adding a token.
        let most = (self.keep * relevance.len() as f64 - 1e-6).ceil().max(0.0) as usize;
        let mut order: Vec<usize> = (0..relevance.len()).collect();
        order.sort_by(|&a, &b| relevance[b].total_cmp(&relevance[a]).then(a.cmp(&b)));
        order.truncate(most);
        order.retain(|&token| f64::from(relevance[token]) >= self.min_relevance);
        order.sort_unstable();
        order
    }

    /// What a kept token is worth at chunk `now`.
    pub fn worth(&self, relevance: f32, segment: u64, now: u64) -> f64 {
        f64::from(relevance) * self.decay.powf(now.saturating_sub(segment) as f64)
    }
}

/// How much later text leaned on each token: mean attention in units of uniform attention.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Relevance {
    /// Number of the first token.
    first: u64,
    /// Per token: attention received, times the keys that each query saw.
    sums: Vec<f64>,
    /// Per token: queries counted.
    counts: Vec<f64>,
}

impl Relevance {
    /// Number of the first token known.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Tokens known.
    pub fn len(&self) -> usize {
        self.sums.len()
    }

    /// True without tokens.
    pub fn is_empty(&self) -> bool {
        self.sums.is_empty()
    }

    /// Adds to a token's attention: `received` is the sum over queries of (mean probability over layers and
    /// heads) times (keys the query saw), `queries` their number. Tokens below the first known are ignored.
    pub fn add(&mut self, token: u64, received: f64, queries: f64) {
        let Some(index) = token.checked_sub(self.first) else {
            return;
        };
        let index = index as usize;
        if index >= self.sums.len() {
            self.sums.resize(index + 1, 0.0);
            self.counts.resize(index + 1, 0.0);
        }
        self.sums[index] += received;
        self.counts[index] += queries;
    }

    /// Relevance of a known token; 0 if no query was counted.
    pub fn of(&self, token: u64) -> f32 {
        let index = token.checked_sub(self.first).map(|index| index as usize);
        match index.filter(|&index| index < self.sums.len() && self.counts[index] > 0.0) {
            Some(index) => (self.sums[index] / self.counts[index]) as f32,
            None => 0.0,
        }
    }

    /// Forgets the tokens below `first`.
    pub fn forget(&mut self, first: u64) {
        let gone = (first.saturating_sub(self.first) as usize).min(self.sums.len());
        self.sums.drain(..gone);
        self.counts.drain(..gone);
        self.first = self.first.max(first);
    }

    /// First token, sums and counts, to be saved.
    pub fn parts(&self) -> (u64, &[f64], &[f64]) {
        (self.first, &self.sums, &self.counts)
    }

    /// From what [`Relevance::parts`] gave. None if the lists differ in length.
    pub fn from_parts(first: u64, sums: Vec<f64>, counts: Vec<f64>) -> Option<Self> {
        (sums.len() == counts.len()).then_some(Relevance {
            first,
            sums,
            counts,
        })
    }
}

/// A captured token.
#[derive(Clone, Debug, PartialEq)]
pub struct Captured {
    /// Its number in the text.
    pub position: u64,
    /// How much later text leaned on it.
    pub relevance: f32,
    /// Number of its chunk.
    pub segment: u64,
    /// Residual stream after each captured layer: [layers, width].
    pub states: Vec<f32>,
}

/// The captured tokens of one sequence, by position.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReweaveMemory {
    entries: Vec<Captured>,
}

impl ReweaveMemory {
    /// Captured tokens, by position.
    pub fn entries(&self) -> &[Captured] {
        &self.entries
    }

    /// Adds tokens, and forgets those worth least at chunk `now` beyond the capacity (ties to the newer).
    pub fn push(
        &mut self,
        config: &ReweaveConfig,
        new: impl IntoIterator<Item = Captured>,
        now: u64,
    ) {
        self.entries.extend(new);
        if self.entries.len() > config.capacity {
            let worth = |entry: &Captured| config.worth(entry.relevance, entry.segment, now);
            self.entries.sort_by(|a, b| {
                worth(b)
                    .total_cmp(&worth(a))
                    .then(b.position.cmp(&a.position))
            });
            self.entries.truncate(config.capacity);
        }
        self.entries.sort_by_key(|entry| entry.position);
    }
}

/// x / sqrt(mean(x^2) + eps).
fn norm(x: &[f64]) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (mean + NORM_EPS).sqrt();
    x.iter().map(|x| x * factor).collect()
}

/// Added to mean squares.
pub const NORM_EPS: f64 = 1e-6;

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// A matrix [rows, columns].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Matrix {
    /// Row by row.
    pub data: Vec<f32>,
    /// Elements of a row.
    pub columns: usize,
}

impl Matrix {
    /// y = W x.
    fn times(&self, x: &[f64]) -> Vec<f64> {
        let rows = self.data.chunks_exact(self.columns);
        rows.map(|row| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum())
            .collect()
    }

    /// y = W^T x.
    fn transposed_times(&self, x: &[f64]) -> Vec<f64> {
        let mut out = vec![0.0; self.columns];
        for (row, x) in self.data.chunks_exact(self.columns).zip(x) {
            for (out, &w) in out.iter_mut().zip(row) {
                *out += f64::from(w) * x;
            }
        }
        out
    }
}

/// x + U V^T x, with U and V [width, rank].
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// U.
    pub up: Matrix,
    /// V.
    pub down: Matrix,
}

impl LowRank {
    fn apply(&self, x: &[f64]) -> Vec<f64> {
        let low = self.down.transposed_times(x);
        let up = self.up.times(&low);
        x.iter().zip(up).map(|(x, up)| x + up).collect()
    }
}

/// The trained part. Fresh from [`Reweave::new`] it is the identity.
#[derive(Clone, Debug, PartialEq)]
pub struct Reweave {
    /// A_j: aligns each captured layer.
    pub align: Vec<LowRank>,
    /// B_j: carries what was aligned below to layer j, for all layers but the first.
    pub carry: Vec<LowRank>,
    /// beta_j: how much of it.
    pub beta: Vec<f32>,
    /// a and b of the weight sigmoid(a ln relevance + b).
    pub weight: (f32, f32),
    /// Wq, Wk, Wv, Wo: [width, width].
    pub projections: [Matrix; 4],
    /// g: the gate, before its tanh.
    pub gate: f32,
    /// s_h: penalty of each head on the logarithm of distance; one per head.
    pub slopes: Vec<f32>,
}

impl Reweave {
    /// The identity for `layers` captured layers of this width: open in every part but the gate.
    /// `projections` are those of the block that follows, [width, width]; `down` draws one element of V.
    pub fn new(
        layers: usize,
        width: usize,
        rank: usize,
        heads: usize,
        projections: [Matrix; 4],
        mut down: impl FnMut() -> f32,
    ) -> Self {
        let mut low_rank = || LowRank {
            up: Matrix {
                data: vec![0.0; width * rank],
                columns: rank,
            },
            down: Matrix {
                data: (0..width * rank).map(|_| down()).collect(),
                columns: rank,
            },
        };
        Reweave {
            align: (0..layers).map(|_| low_rank()).collect(),
            carry: (1..layers).map(|_| low_rank()).collect(),
            beta: vec![-2.0; layers.saturating_sub(1)],
            weight: (1.0, 0.0),
            projections,
            gate: 0.0,
            slopes: vec![0.0; heads],
        }
    }

    /// Layered latent state reconstruction of one captured token: its memory vector, [width].
    pub fn reconstruct(&self, captured: &Captured) -> Vec<f32> {
        let width = captured.states.len() / self.align.len();
        let states = captured.states.chunks_exact(width);
        let mut z: Vec<f64> = Vec::new();
        for (index, (state, align)) in states.zip(&self.align).enumerate() {
            let state: Vec<f64> = state.iter().map(|&x| f64::from(x)).collect();
            let mut aligned = align.apply(&norm(&state));
            if index > 0 {
                // Lower layers are aligned upward, one after another.
                let share = sigmoid(f64::from(self.beta[index - 1]));
                for (x, below) in aligned.iter_mut().zip(self.carry[index - 1].apply(&z)) {
                    *x += share * below;
                }
            }
            z = aligned;
        }
        let (a, b) = self.weight;
        let relevance = f64::from(captured.relevance).max(1e-6).ln();
        let weight = sigmoid(f64::from(a) * relevance + f64::from(b));
        norm(&z).into_iter().map(|x| (weight * x) as f32).collect()
    }

    /// The residual x [width] of the token at `position`, with what it recalls of the memory woven in.
    /// `vectors` are the memory vectors of `memory`, one after another. An empty memory or a gate of 0 gives x
    /// itself.
    pub fn weave(
        &self,
        x: &[f32],
        position: u64,
        memory: &ReweaveMemory,
        vectors: &[f32],
    ) -> Vec<f32> {
        if memory.entries.is_empty() || self.gate == 0.0 {
            return x.to_vec();
        }
        let width = x.len();
        let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| f64::from(x)).collect() };
        let [wq, wk, wv, wo] = &self.projections;
        let query = wq.times(&norm(&wide(x)));
        let projected: Vec<(Vec<f64>, Vec<f64>)> = vectors
            .chunks_exact(width)
            .map(|vector| (wk.times(&wide(vector)), wv.times(&wide(vector))))
            .collect();
        let heads = self.slopes.len();
        let dim = width / heads;
        let mut recalled = vec![0.0; width];
        for (head, &slope) in self.slopes.iter().enumerate() {
            let part = head * dim..(head + 1) * dim;
            let logits: Vec<f64> = (projected.iter().zip(&memory.entries))
                .map(|((key, _), entry)| {
                    let dot: f64 = (query[part.clone()].iter().zip(&key[part.clone()]))
                        .map(|(q, k)| q * k)
                        .sum();
                    let distance = position.saturating_sub(entry.position) as f64;
                    dot / (dim as f64).sqrt() - f64::from(slope) * (1.0 + distance).log2()
                })
                .collect();
            let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = logits.iter().map(|logit| (logit - top).exp()).sum();
            for (logit, (_, value)) in logits.iter().zip(&projected) {
                let weight = (logit - top).exp() / total;
                for (sum, v) in recalled[part.clone()].iter_mut().zip(&value[part.clone()]) {
                    *sum += weight * v;
                }
            }
        }
        let gate = f64::from(self.gate).tanh();
        let out = wo.times(&recalled);
        x.iter()
            .zip(out)
            .map(|(&x, y)| (f64::from(x) + gate * y) as f32)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(position: u64, relevance: f32, segment: u64) -> Captured {
        Captured {
            position,
            relevance,
            segment,
            states: vec![1.0, 0.0, 0.5, -1.0],
        }
    }

    #[test]
    fn the_least_relevance_binds() {
        let config = ReweaveConfig {
            keep: 0.5,
            ..ReweaveConfig::default()
        };
        // Half of six is three; only two are as relevant as uniform attention.
        assert_eq!(config.pick(&[0.2, 1.0, 0.9, 3.0, 0.5, 0.1]), [1, 3]);
        let none = ReweaveConfig {
            min_relevance: 0.0,
            ..config
        };
        assert_eq!(none.pick(&[0.2, 1.0, 0.9, 3.0, 0.5, 0.1]), [1, 2, 3]);
        // Ties go to the earlier token, and 0.4 of 5 are two.
        let share = ReweaveConfig { keep: 0.4, ..none };
        assert_eq!(share.pick(&[1.0; 5]), [0, 1]);
    }

    #[test]
    fn capacity_holds_and_old_tokens_fade() {
        let config = ReweaveConfig {
            capacity: 2,
            decay: 0.5,
            ..ReweaveConfig::default()
        };
        let mut memory = ReweaveMemory::default();
        memory.push(&config, [entry(3, 2.0, 0), entry(1, 1.5, 0)], 0);
        memory.push(&config, [entry(9, 1.0, 1)], 1);
        // Worth at chunk 1: 1.0, 0.75 and 1.0.
        let positions: Vec<u64> = memory.entries().iter().map(|e| e.position).collect();
        assert_eq!(positions, [3, 9]);
        memory.push(&config, [entry(20, 4.0, 5)], 5);
        let positions: Vec<u64> = memory.entries().iter().map(|e| e.position).collect();
        assert_eq!(positions, [9, 20]);
    }

    #[test]
    fn untrained_it_is_the_identity() {
        let unit = || Matrix {
            data: vec![0.3, -0.1, 0.2, 0.9],
            columns: 2,
        };
        let mut draws = 0.0;
        let mut reweave = Reweave::new(2, 2, 1, 1, [unit(), unit(), unit(), unit()], || {
            draws += 0.1;
            draws
        });
        let mut memory = ReweaveMemory::default();
        let x = [0.25f32, -3.0];
        assert_eq!(reweave.weave(&x, 7, &memory, &[]), x);
        memory.push(&ReweaveConfig::default(), [entry(3, 2.0, 0)], 0);
        let vectors = reweave.reconstruct(&memory.entries()[0]);
        assert_eq!(reweave.weave(&x, 7, &memory, &vectors), x);
        reweave.gate = 0.5;
        assert_ne!(reweave.weave(&x, 7, &memory, &vectors), x);
    }

    #[test]
    fn relevance_forgets_and_counts() {
        let mut relevance = Relevance::default();
        relevance.add(4, 3.0, 2.0);
        relevance.add(4, 1.0, 2.0);
        relevance.add(5, 1.0, 4.0);
        assert_eq!(
            [
                relevance.of(3),
                relevance.of(4),
                relevance.of(5),
                relevance.of(6)
            ],
            [0.0, 1.0, 0.25, 0.0]
        );
        relevance.forget(5);
        assert_eq!(
            (relevance.of(4), relevance.of(5), relevance.len()),
            (0.0, 0.25, 1)
        );
        relevance.add(4, 9.0, 1.0);
        assert_eq!(relevance.of(4), 0.0);
    }

    #[test]
    fn depth_decides_the_layers() {
        let config = ReweaveConfig::default();
        assert_eq!(config.layers(30), [8, 15, 23]);
        assert_eq!(config.layers(4), [1, 2, 3]);
        assert_eq!(config.layers(29), [7, 15, 22]);
        assert_eq!(config.layers(1), [0, 1]);
        assert!(
            ReweaveConfig {
                keep: 0.0,
                ..config.clone()
            }
            .check()
            .unwrap_err()
            .contains("keep is 0")
        );
        assert!(config.check().is_ok());
    }
}
