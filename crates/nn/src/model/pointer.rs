//! Pointer networks (paper 39): attention weights over the input are the output distribution, so that the vocabulary grows
//! with the input; for whoever wants positions of the input as an answer. Set-to-sequence models (paper 08) share the decoder.
//!
//! [`PointerDecoder`] points into any memories; [`PtrNet`] is the paper's network over points; [`FixedSeq2Seq`] are its
//! baselines, whose softmax has one row per index and so knows one length only.

use crate::mixer::{linear, softmax};
use crate::params::{Init, Params};
use candle_core::{D, DType, Result, Tensor, bail};
use longspan_kernels::additive::additive_scores;
use longspan_kernels::recurrent::{Cell, recurrence};
use serde::{Deserialize, Serialize};

/// Uniform in -limit..limit.
fn within(limit: f64) -> Init {
    Init::Uniform {
        low: -limit,
        high: limit,
    }
}

/// An LSTM with one bias, gates i, f, g, o.
pub(crate) struct Lstm {
    w_ih: Tensor,
    w_hh: Tensor,
    b: Tensor,
    zero: Tensor,
}

impl Lstm {
    /// Parameters `{prefix}w_ih` [4d, inputs], `{prefix}w_hh` [4d, d], `{prefix}b` [4d].
    pub(crate) fn new(
        prefix: &str,
        inputs: usize,
        d: usize,
        limit: f64,
        params: &Params<'_>,
    ) -> Result<Self> {
        let get = |name: &str, shape: &[usize]| {
            params.get(&format!("{prefix}{name}"), shape, within(limit))
        };
        Ok(Lstm {
            w_ih: get("w_ih", &[4 * d, inputs])?,
            w_hh: get("w_hh", &[4 * d, d])?,
            b: get("b", &[4 * d])?,
            zero: Tensor::zeros(4 * d, params.dtype(), params.device())?,
        })
    }

    /// x [batch, steps, inputs] from start [batch, 2d] (h, then c) to states [batch, steps, 2d].
    pub(crate) fn run(&self, x: &Tensor, start: &Tensor) -> Result<Tensor> {
        let gates = linear(x, &self.w_ih, Some(&self.b))?;
        recurrence(Cell::Lstm, &gates, &self.w_hh, &self.zero, start)
    }
}

/// `u_j = v · tanh(W1 e_j + W2 q)`: scores of memories for queries.
pub struct PointerHead {
    w1: Tensor,
    w2: Tensor,
    v: Tensor,
}

impl PointerHead {
    /// Parameters `{prefix}w1`, `{prefix}w2` [d, d] and `{prefix}v` [d].
    pub fn new(prefix: &str, d: usize, limit: f64, params: &Params<'_>) -> Result<Self> {
        let get = |name: &str, shape: &[usize]| {
            params.get(&format!("{prefix}{name}"), shape, within(limit))
        };
        Ok(PointerHead {
            w1: get("w1", &[d, d])?,
            w2: get("w2", &[d, d])?,
            v: get("v", &[d])?,
        })
    }

    /// The part of the scores that depends on memories alone, computed once per input: [batch, n, d] to the same.
    pub fn keys(&self, memories: &Tensor) -> Result<Tensor> {
        linear(memories, &self.w1, None)
    }

    /// Keys from [`keys`](Self::keys), queries [batch, m, d], mask [batch, n] (0 or -inf) to logits [batch, m, n].
    pub fn logits(&self, keys: &Tensor, queries: &Tensor, mask: &Tensor) -> Result<Tensor> {
        additive_scores(keys, &linear(queries, &self.w2, None)?, &self.v)?
            .broadcast_add(&mask.unsqueeze(1)?)
    }
}

/// What a decoder points into, for a batch: made once per input.
pub struct Reading {
    /// [batch, candidates, d]
    pub memories: Tensor,
    /// 0, or -inf for padding: [batch, candidates].
    pub mask: Tensor,
    /// What the decoder reads after pointing at a candidate; row 0 is the start, row 1 + b candidates + j is candidate j of
    /// row b: [1 + batch candidates, inputs].
    pub inputs: Tensor,
    /// First state, h then c: [batch, 2d].
    pub state: Tensor,
    /// Real candidates of each row.
    pub counts: Vec<usize>,
    /// Whether candidate 0 is the end.
    pub ends: bool,
}

/// Which answers a decoder may give. The model is the same; without a rule nothing is forbidden.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// Anything, until the end is pointed at.
    #[default]
    Free,
    /// No candidate twice, and at least this many before the end (three make a polygon).
    NoRepeat {
        /// Least number of candidates.
        least: usize,
    },
    /// Every candidate exactly once: permutations, and tours with their start free.
    Permutation,
    /// Every candidate exactly once, the first one first: tours as paper 39 writes them.
    Tour,
}

impl Rule {
    /// Whether candidate `c` (counted without the end) may follow `so_far`, of `n` candidates; none = the end.
    pub fn allows(self, c: Option<usize>, so_far: &[usize], n: usize) -> bool {
        match (self, c) {
            (Rule::Free, _) => true,
            (Rule::NoRepeat { least }, None) => so_far.len() >= least.min(n),
            (Rule::Permutation | Rule::Tour, None) => so_far.len() == n,
            (Rule::Tour, Some(c)) if so_far.is_empty() => c == 0,
            (_, Some(c)) => !so_far.contains(&c),
        }
    }
}

/// An answer with its log-probability under the model. Where a rule forbids candidates the remaining ones share its mass.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Candidates from 0, the end left out.
    pub indices: Vec<usize>,
    /// Σ ln p of what was pointed at, the end included.
    pub log_probability: f64,
    /// False when the length limit came before the end.
    pub ended: bool,
}

/// An LSTM that points.
pub struct PointerDecoder {
    cell: Lstm,
    head: PointerHead,
    /// Attention that makes the query from the state before it points.
    glimpse: Option<PointerHead>,
    d: usize,
}

impl PointerDecoder {
    /// `cell`, `head`, `glimpse`: prefixes of their parameters.
    pub fn new(
        (cell, head, glimpse): (&str, &str, Option<&str>),
        inputs: usize,
        d: usize,
        limit: f64,
        params: &Params<'_>,
    ) -> Result<Self> {
        Ok(PointerDecoder {
            cell: Lstm::new(cell, inputs, d, limit, params)?,
            head: PointerHead::new(head, d, limit, params)?,
            glimpse: glimpse
                .map(|prefix| PointerHead::new(prefix, d, limit, params))
                .transpose()?,
            d,
        })
    }

    /// Decoder states [batch, m, d] to logits [batch, m, candidates].
    fn point(&self, keys: &Keys, reading: &Reading, h: &Tensor) -> Result<Tensor> {
        let mut query = h.clone();
        if let (Some(glimpse), Some(keys)) = (&self.glimpse, &keys.glimpse) {
            let weights = softmax(&glimpse.logits(keys, &query, &reading.mask)?)?;
            query = weights.matmul(&reading.memories)?;
        }
        self.head.logits(&keys.pointer, &query, &reading.mask)
    }

    fn keys(&self, memories: &Tensor) -> Result<Keys> {
        Ok(Keys {
            pointer: self.head.keys(memories)?,
            glimpse: self
                .glimpse
                .as_ref()
                .map(|head| head.keys(memories))
                .transpose()?,
        })
    }

    /// Logits of every step when the answers are shown: targets [batch][m] are candidates (the end is candidate 0 if there
    /// is one), -1 is padding. [batch, m, candidates].
    pub fn logits(&self, reading: &Reading, targets: &[Vec<i64>]) -> Result<Tensor> {
        let (batch, candidates, _) = reading.memories.dims3()?;
        let steps = targets.first().map_or(0, Vec::len);
        if targets.len() != batch || targets.iter().any(|row| row.len() != steps) {
            bail!(
                "pointer decoder: found {} rows of targets, expected {batch} of {steps} steps each",
                targets.len()
            );
        }
        let mut rows = Vec::with_capacity(batch * steps);
        for (b, row) in targets.iter().enumerate() {
            if let Some(&wrong) = row
                .iter()
                .find(|&&t| t >= 0 && t as usize >= reading.counts[b])
            {
                bail!(
                    "pointer decoder: found target {wrong} in row {b}, expected below {}",
                    reading.counts[b]
                );
            }
            // Step t reads what was pointed at before.
            let before = (0..steps).map(|t| if t == 0 { -1 } else { row[t - 1] });
            rows.extend(before.map(|target| self.input_row(reading, candidates, b, target)));
        }
        let device = reading.memories.device();
        let inputs = reading
            .inputs
            .index_select(&Tensor::new(rows, device)?, 0)?
            .reshape((batch, steps, ()))?;
        let states = self.cell.run(&inputs, &reading.state)?;
        let keys = self.keys(&reading.memories)?;
        self.point(&keys, reading, &states.narrow(2, 0, self.d)?.contiguous()?)
    }

    /// Row of [`Reading::inputs`] after `target`; the start again after the end or before anything.
    fn input_row(&self, reading: &Reading, candidates: usize, b: usize, target: i64) -> u32 {
        if target < 0 || (reading.ends && target == 0) {
            0
        } else {
            (1 + b * candidates) as u32 + target as u32
        }
    }

    /// Σ of -ln p of each row's targets: [batch].
    pub fn nll(&self, reading: &Reading, targets: &[Vec<i64>]) -> Result<Tensor> {
        masked_nll(&self.logits(reading, targets)?, targets)
    }

    /// The best answers by beam search of this width (1 = greedy), at most `most` candidates long. Nothing is shown to
    /// the decoder but what it pointed at itself.
    pub fn decode(
        &self,
        reading: &Reading,
        rule: Rule,
        width: usize,
        most: usize,
    ) -> Result<Vec<Answer>> {
        let (batch, candidates, _) = reading.memories.dims3()?;
        let (width, device) = (width.max(1), reading.memories.device().clone());
        let detached = Reading {
            memories: reading.memories.detach(),
            mask: reading.mask.detach(),
            inputs: reading.inputs.detach(),
            state: reading.state.detach(),
            counts: reading.counts.clone(),
            ends: reading.ends,
        };
        let keys = self.keys(&detached.memories)?;
        let keys = Keys {
            pointer: keys.pointer.detach(),
            glimpse: keys.glimpse.map(|k| k.detach()),
        };
        let shift = usize::from(reading.ends);
        struct Beam {
            row: usize,
            indices: Vec<usize>,
            score: f64,
        }
        let mut done: Vec<Vec<Answer>> = (0..batch).map(|_| Vec::new()).collect();
        let mut beams: Vec<Beam> = (0..batch)
            .map(|row| Beam {
                row,
                indices: Vec::new(),
                score: 0.0,
            })
            .collect();
        let mut state = detached.state.clone(); // [beams, 2d]
        while !beams.is_empty() {
            let of = |beam: &Beam| {
                let last = beam.indices.last().map_or(-1, |&c| (c + shift) as i64);
                self.input_row(&detached, candidates, beam.row, last)
            };
            let rows: Vec<u32> = beams.iter().map(of).collect();
            let inputs = detached
                .inputs
                .index_select(&Tensor::new(rows, &device)?, 0)?
                .unsqueeze(1)?;
            state = self.cell.run(&inputs, &state)?.detach().squeeze(1)?;
            let rows = Tensor::new(
                beams.iter().map(|b| b.row as u32).collect::<Vec<_>>(),
                &device,
            )?;
            let pick = |t: &Tensor| t.index_select(&rows, 0);
            let local = Reading {
                memories: pick(&detached.memories)?,
                mask: pick(&detached.mask)?,
                inputs: detached.inputs.clone(),
                state: state.clone(),
                counts: Vec::new(),
                ends: reading.ends,
            };
            let local_keys = Keys {
                pointer: pick(&keys.pointer)?,
                glimpse: keys.glimpse.as_ref().map(pick).transpose()?,
            };
            let h = state.narrow(1, 0, self.d)?.contiguous()?.unsqueeze(1)?;
            let logits = self.point(&local_keys, &local, &h)?.squeeze(1)?.detach();
            let logits = logits.to_dtype(DType::F64)?.to_vec2::<f64>()?;
            // Continuations of each input's beams: (score, beam, candidate with the end, or none).
            let mut next: Vec<(Beam, u32)> = Vec::new();
            let mut first = 0;
            while first < beams.len() {
                let row = beams[first].row;
                let group = beams[first..].iter().take_while(|b| b.row == row).count();
                let n = reading.counts[row] - shift;
                let mut options: Vec<(f64, usize, Option<usize>)> = Vec::new();
                for (k, beam) in beams[first..first + group].iter().enumerate() {
                    let allowed: Vec<(Option<usize>, f64)> = (0..reading.counts[row])
                        .map(|c| (c.checked_sub(shift), logits[first + k][c]))
                        .filter(|&(c, _)| rule.allows(c, &beam.indices, n))
                        .collect();
                    let top = allowed
                        .iter()
                        .map(|a| a.1)
                        .fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = allowed.iter().map(|a| (a.1 - top).exp()).sum();
                    let log_z = top + sum.ln();
                    options.extend(
                        allowed
                            .iter()
                            .map(|&(c, logit)| (beam.score + logit - log_z, first + k, c)),
                    );
                }
                options.sort_by(|a, b| b.0.total_cmp(&a.0));
                for &(score, k, candidate) in options.iter().take(width) {
                    let mut indices = beams[k].indices.clone();
                    let ended = match candidate {
                        Some(c) => {
                            indices.push(c);
                            // Without an end the answer is as long as the input.
                            !reading.ends && indices.len() == n
                        }
                        None => true,
                    };
                    if ended || indices.len() >= most {
                        done[row].push(Answer {
                            indices,
                            log_probability: score,
                            ended,
                        });
                    } else {
                        let beam = Beam {
                            row,
                            indices,
                            score,
                        };
                        next.push((beam, k as u32));
                    }
                }
                // A beam that cannot beat what is done (probabilities only fall) is dropped.
                let best = done[row]
                    .iter()
                    .map(|a| a.log_probability)
                    .fold(f64::NEG_INFINITY, f64::max);
                if done[row].len() >= width {
                    next.retain(|(beam, _)| beam.row != row || beam.score > best);
                }
                first += group;
            }
            if next.is_empty() {
                break;
            }
            let parents: Vec<u32> = next.iter().map(|(_, parent)| *parent).collect();
            state = state.index_select(&Tensor::new(parents, &device)?, 0)?;
            beams = next.into_iter().map(|(beam, _)| beam).collect();
        }
        Ok(done
            .into_iter()
            .map(|answers| {
                answers
                    .into_iter()
                    .max_by(|a, b| a.log_probability.total_cmp(&b.log_probability))
                    .unwrap_or(Answer {
                        indices: Vec::new(),
                        log_probability: f64::NEG_INFINITY,
                        ended: false,
                    })
            })
            .collect())
    }
}

struct Keys {
    pointer: Tensor,
    glimpse: Option<Tensor>,
}

/// Σ of -ln p of each row's targets [batch][m], -1 left out, under logits [batch, m, candidates]: [batch].
pub fn masked_nll(logits: &Tensor, targets: &[Vec<i64>]) -> Result<Tensor> {
    let (batch, steps, _) = logits.dims3()?;
    let top = logits.max_keepdim(D::Minus1)?.detach();
    let sum = logits.broadcast_sub(&top)?.exp()?.sum_keepdim(D::Minus1)?;
    let log_z = (sum.log()? + top)?; // [batch, m, 1]
    let index: Vec<u32> = targets.iter().flatten().map(|&t| t.max(0) as u32).collect();
    let weight: Vec<f32> = targets
        .iter()
        .flatten()
        .map(|&t| if t < 0 { 0.0 } else { 1.0 })
        .collect();
    let device = logits.device();
    let index = Tensor::from_vec(index, (batch, steps, 1), device)?;
    let weight = Tensor::from_vec(weight, (batch, steps), device)?.to_dtype(logits.dtype())?;
    let losses = (log_z - logits.gather(&index, 2)?)?.squeeze(2)?;
    (losses * weight)?.sum(1)
}

/// A batch of inputs of different sizes, padded: values [batch, longest, dim] and sizes.
pub struct Sets {
    /// [batch, longest, dim]
    pub values: Tensor,
    /// Elements of each.
    pub sizes: Vec<usize>,
}

impl Sets {
    /// From row-major elements of `dim` numbers each.
    pub fn new(rows: &[&[f32]], dim: usize, params: &Tensor) -> Result<Self> {
        let sizes: Vec<usize> = rows.iter().map(|row| row.len() / dim.max(1)).collect();
        if rows.iter().any(|row| row.len() % dim.max(1) != 0) {
            bail!("sets: found a row that is not a multiple of {dim} numbers");
        }
        let longest = sizes.iter().copied().max().unwrap_or(0);
        let mut flat = vec![0f32; rows.len() * longest * dim];
        for (b, row) in rows.iter().enumerate() {
            flat[b * longest * dim..][..row.len()].copy_from_slice(row);
        }
        let values = Tensor::from_vec(flat, (rows.len(), longest, dim), params.device())?;
        Ok(Sets {
            values: values.to_dtype(params.dtype())?,
            sizes,
        })
    }

    /// 0 for elements, -inf for padding, with `before` columns of 0 first: [batch, before + longest].
    pub fn mask(&self, before: usize) -> Result<Tensor> {
        let longest = self.values.dim(1)?;
        let mask: Vec<f32> = self
            .sizes
            .iter()
            .flat_map(|&size| {
                (0..before + longest).map(move |j| {
                    if j < before + size {
                        0.0
                    } else {
                        f32::NEG_INFINITY
                    }
                })
            })
            .collect();
        let shape = (self.sizes.len(), before + longest);
        Tensor::from_vec(mask, shape, self.values.device())?.to_dtype(self.values.dtype())
    }
}

/// Hyper-parameters of [`PtrNet`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PtrNetConfig {
    /// Width of both LSTMs.
    pub hidden: usize,
    /// Weights start uniform in -init..init.
    pub init: f64,
    /// Attention steps between state and pointer; the paper's network has none, paper 08's baseline one.
    pub glimpse: bool,
    /// Whether answers end with the end token; permutations need none.
    pub ends: bool,
}

impl Default for PtrNetConfig {
    fn default() -> Self {
        PtrNetConfig {
            hidden: 256,
            init: 0.08,
            glimpse: false,
            ends: true,
        }
    }
}

/// An LSTM reads the points, another points at them.
pub struct PtrNet {
    encoder: Lstm,
    decoder: PointerDecoder,
    go: Tensor,
    end: Option<Tensor>,
    d: usize,
}

impl PtrNet {
    /// For points of `dim` coordinates. Parameters `enc_*`, `dec_*`, `go`, `end`, `w1`, `w2`, `v`.
    pub fn new(config: &PtrNetConfig, dim: usize, params: &Params<'_>) -> Result<Self> {
        let (d, limit) = (config.hidden, config.init);
        if d == 0 || dim == 0 {
            bail!("pointer network: found hidden {d} and {dim} coordinates, expected 1 or more");
        }
        let glimpse = config.glimpse.then_some("g_");
        Ok(PtrNet {
            encoder: Lstm::new("enc_", dim, d, limit, params)?,
            decoder: PointerDecoder::new(("dec_", "", glimpse), dim, d, limit, params)?,
            go: params.get("go", &[dim], within(limit))?,
            end: config
                .ends
                .then(|| params.get("end", &[d], within(limit)))
                .transpose()?,
            d,
        })
    }

    /// Encoder states: [batch, longest, d], and the state after each row's last point [batch, 2d].
    pub fn encode(&self, sets: &Sets) -> Result<(Tensor, Tensor)> {
        encode(&self.encoder, sets, self.d)
    }

    /// What the decoder points into.
    pub fn read(&self, sets: &Sets) -> Result<Reading> {
        let (states, state) = self.encode(sets)?;
        let (batch, longest, dim) = sets.values.dims3()?;
        let go = self.go.unsqueeze(0)?;
        let before = usize::from(self.end.is_some());
        let (memories, inputs) = match &self.end {
            None => (states, sets.values.clone()),
            Some(end) => {
                let end = end.reshape((1, 1, self.d))?;
                let end = end.broadcast_as((batch, 1, self.d))?;
                // The row of the end is never read: the start is.
                let unread = sets.values.narrow(1, 0, 1.min(longest))?.zeros_like()?;
                (
                    Tensor::cat(&[&end.contiguous()?, &states], 1)?,
                    Tensor::cat(&[&unread, &sets.values], 1)?,
                )
            }
        };
        let inputs = inputs.reshape((batch * (before + longest), dim))?;
        Ok(Reading {
            memories,
            mask: sets.mask(before)?,
            inputs: Tensor::cat(&[&go, &inputs], 0)?,
            state,
            counts: sets.sizes.iter().map(|size| before + size).collect(),
            ends: before == 1,
        })
    }

    /// The decoder.
    pub fn decoder(&self) -> &PointerDecoder {
        &self.decoder
    }

    /// A tensor of the model, for its device and type.
    pub fn like(&self) -> &Tensor {
        &self.go
    }
}

fn encode(encoder: &Lstm, sets: &Sets, d: usize) -> Result<(Tensor, Tensor)> {
    let (batch, longest, _) = sets.values.dims3()?;
    if sets.sizes.contains(&0) {
        bail!("pointer network: found an input without points, expected 1 or more");
    }
    let device = sets.values.device();
    let start = Tensor::zeros((batch, 2 * d), sets.values.dtype(), device)?;
    let all = encoder.run(&sets.values, &start)?; // [batch, longest, 2d]
    let last: Vec<u32> = (0..batch)
        .map(|b| (b * longest + sets.sizes[b] - 1) as u32)
        .collect();
    let state = all
        .reshape((batch * longest, 2 * d))?
        .index_select(&Tensor::new(last, device)?, 0)?;
    Ok((all.narrow(2, 0, d)?.contiguous()?, state))
}

/// The paper's baselines: an LSTM encoder and decoder whose softmax is over the indices 0..=n of one fixed n (0 = end), with
/// or without content attention that mixes encoder states.
pub struct FixedSeq2Seq {
    encoder: Lstm,
    decoder: Lstm,
    attention: Option<PointerHead>,
    go: Tensor,
    out: Tensor,
    n: usize,
    d: usize,
}

impl FixedSeq2Seq {
    /// For exactly `n` points of `dim` coordinates.
    pub fn new(
        hidden: usize,
        init: f64,
        attention: bool,
        n: usize,
        dim: usize,
        params: &Params<'_>,
    ) -> Result<Self> {
        if hidden == 0 || n == 0 || dim == 0 {
            bail!(
                "seq2seq: found hidden {hidden}, {n} points of {dim}, expected 1 or more of each"
            );
        }
        let d = hidden;
        // The decoder reads the point, and with attention also the last state and mix.
        let extra = if attention { 2 * d } else { 0 };
        Ok(FixedSeq2Seq {
            encoder: Lstm::new("enc_", dim, d, init, params)?,
            decoder: Lstm::new("dec_", dim + extra, d, init, params)?,
            attention: attention
                .then(|| PointerHead::new("", d, init, params))
                .transpose()?,
            go: params.get("go", &[dim], within(init))?,
            out: params.get("out", &[n + 1, d + extra / 2], within(init))?,
            n,
            d,
        })
    }

    /// A tensor of the model, for its device and type.
    pub fn like(&self) -> &Tensor {
        &self.go
    }

    /// Logits when answers are shown (`targets`, as of [`PointerDecoder::logits`] with an end), or with none: `steps` greedy
    /// steps whose own choices are read. [batch, steps, n + 1].
    pub fn logits(
        &self,
        sets: &Sets,
        targets: Option<&[Vec<i64>]>,
        steps: usize,
    ) -> Result<Tensor> {
        if let Some(&size) = sets.sizes.iter().find(|&&size| size != self.n) {
            bail!(
                "seq2seq with a fixed softmax: found {size} points, expected the {} it was made for",
                self.n
            );
        }
        let (states, mut state) = encode(&self.encoder, sets, self.d)?;
        let (batch, n, dim) = sets.values.dims3()?;
        let device = sets.values.device();
        let inputs = Tensor::cat(
            &[
                &self.go.unsqueeze(0)?,
                &sets.values.reshape((batch * n, dim))?,
            ],
            0,
        )?;
        let row = |b: usize, target: i64| {
            if target <= 0 {
                0
            } else {
                (b * n) as u32 + target as u32
            }
        };
        if let (None, Some(targets)) = (&self.attention, targets) {
            // Nothing is fed back: all steps at once.
            let rows: Vec<u32> = targets
                .iter()
                .enumerate()
                .flat_map(|(b, t)| {
                    (0..steps).map(move |k| row(b, if k == 0 { -1 } else { t[k - 1] }))
                })
                .collect();
            let x = inputs.index_select(&Tensor::new(rows, device)?, 0)?;
            let h = self.decoder.run(&x.reshape((batch, steps, dim))?, &state)?;
            return linear(&h.narrow(2, 0, self.d)?, &self.out, None);
        }
        let keys = match &self.attention {
            Some(head) => Some((head, head.keys(&states)?)),
            None => None,
        };
        let mask = sets.mask(0)?;
        let mut last = vec![-1i64; batch];
        let mut fed: Option<Tensor> = keys
            .as_ref()
            .map(|_| Tensor::zeros((batch, 2 * self.d), states.dtype(), device))
            .transpose()?;
        let mut out = Vec::with_capacity(steps);
        for step in 0..steps {
            let rows: Vec<u32> = (0..batch).map(|b| row(b, last[b])).collect();
            let mut x = inputs.index_select(&Tensor::new(rows, device)?, 0)?;
            if let Some(fed) = &fed {
                x = Tensor::cat(&[&x, fed], 1)?;
            }
            state = self.decoder.run(&x.unsqueeze(1)?, &state)?.squeeze(1)?;
            let mut h = state.narrow(1, 0, self.d)?.contiguous()?;
            if let Some((head, keys)) = &keys {
                let weights = softmax(&head.logits(keys, &h.unsqueeze(1)?, &mask)?)?;
                let mix = weights.matmul(&states)?.squeeze(1)?;
                h = Tensor::cat(&[&h, &mix], 1)?; // [batch, 2d]
                fed = Some(h.clone());
            }
            let logits = linear(&h, &self.out, None)?;
            match targets {
                Some(targets) => (0..batch).for_each(|b| last[b] = targets[b][step]),
                None => {
                    let best = logits.argmax(D::Minus1)?.to_vec1::<u32>()?;
                    (0..batch).for_each(|b| last[b] = i64::from(best[b]));
                }
            }
            out.push(logits);
        }
        Tensor::stack(&out, 1)
    }

    /// Greedy answers of at most `most` indices, from 0.
    pub fn greedy(&self, sets: &Sets, most: usize) -> Result<Vec<Answer>> {
        let logits = self.logits(sets, None, most + 1)?.detach();
        let logits = logits.to_dtype(DType::F64)?.to_vec3::<f64>()?;
        Ok(logits
            .iter()
            .map(|steps| {
                let mut answer = Answer {
                    indices: Vec::new(),
                    log_probability: 0.0,
                    ended: false,
                };
                for row in steps {
                    let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = row.iter().map(|l| (l - top).exp()).sum();
                    answer.log_probability -= sum.ln();
                    // Ties: the lowest index, as the decoder itself read.
                    match row.iter().position(|&l| l == top) {
                        Some(0) | None => {
                            answer.ended = true;
                            break;
                        }
                        Some(c) => answer.indices.push(c - 1),
                    }
                }
                if !answer.ended {
                    answer.indices.truncate(most);
                }
                answer
            })
            .collect())
    }
}
