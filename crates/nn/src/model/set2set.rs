//! Read, process, write (paper 08, Order Matters): an encoder of sets that no order of the input changes, and a decoder that
//! points into the set; for whoever has input without an order, or needs one vector of a set of any size.
//!
//! [`Set2Set`] is the process block as a pooling layer over ragged sets; [`Set2Seq`] is the whole model.

use super::pointer::{PointerDecoder, Reading, Sets};
use crate::mixer::linear;
use crate::params::{Init, Params};
use candle_core::{Result, Tensor, bail};
use longspan_kernels::recurrent::{Cell, recurrence};
use serde::{Deserialize, Serialize};

/// How a query is compared with a memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Similarity {
    /// m · q
    #[default]
    Dot,
    /// v · tanh(W1 m + W2 q)
    Additive,
}

/// What carries the process block from step to step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Carry {
    /// q* is the input of an LSTM that has a hidden state of its own, as in the known implementations.
    #[default]
    Input,
    /// q* stands where the hidden state stands, and there is no input, as the paper writes it.
    Hidden,
}

/// Hyper-parameters of [`Set2Set`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Set2SetConfig {
    /// Width of memories.
    pub d: usize,
    /// Process steps T; 0 = a constant learned vector that knows nothing of the set.
    pub steps: usize,
    /// Comparison of query and memory.
    pub similarity: Similarity,
    /// Where q* goes.
    pub carry: Carry,
}

impl Default for Set2SetConfig {
    fn default() -> Self {
        Set2SetConfig {
            d: 64,
            steps: 5,
            similarity: Similarity::Dot,
            carry: Carry::Input,
        }
    }
}

/// The process block: sets of memories to vectors, the same whatever the order.
pub struct Set2Set {
    config: Set2SetConfig,
    w_ih: Tensor,
    /// [4d, d]; zero when q* is the hidden state.
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    /// W1, W2, v
    additive: Option<(Tensor, Tensor, Tensor)>,
    /// [2d], where no step is made.
    constant: Option<Tensor>,
}

impl Set2Set {
    /// Parameters `w_ih` [4d, 2d], `w_hh` [4d, d], `b_ih`, `b_hh` [4d].
    pub fn new(config: &Set2SetConfig, params: &Params<'_>) -> Result<Self> {
        let d = config.d;
        if d == 0 {
            bail!("set2set: found width 0, expected 1 or more");
        }
        let limit = (d as f64).powf(-0.5);
        let get = |name: &str, shape: &[usize]| {
            let init = Init::Uniform {
                low: -limit,
                high: limit,
            };
            params.get(name, shape, init)
        };
        let own = config.carry == Carry::Input;
        let zeros = |shape: &[usize]| Tensor::zeros(shape, params.dtype(), params.device());
        Ok(Set2Set {
            config: config.clone(),
            w_ih: get("w_ih", &[4 * d, 2 * d])?,
            w_hh: if own {
                get("w_hh", &[4 * d, d])?
            } else {
                zeros(&[4 * d, d])?
            },
            b_ih: get("b_ih", &[4 * d])?,
            b_hh: if own {
                get("b_hh", &[4 * d])?
            } else {
                zeros(&[4 * d])?
            },
            additive: match config.similarity {
                Similarity::Dot => None,
                Similarity::Additive => {
                    Some((get("w1", &[d, d])?, get("w2", &[d, d])?, get("v", &[d])?))
                }
            },
            constant: (config.steps == 0)
                .then(|| get("q_star", &[2 * d]))
                .transpose()?,
        })
    }

    /// memories [elements, d] of sets that lie one after the other, `sizes` of them, to q* [sets, 2d].
    pub fn forward(&self, memories: &Tensor, sizes: &[usize]) -> Result<Tensor> {
        let (last, _) = self.trace(memories, sizes)?;
        match last.last() {
            Some(q) => Ok(q.clone()),
            None => match &self.constant {
                Some(q) => q
                    .unsqueeze(0)?
                    .broadcast_as((sizes.len(), 2 * self.config.d))?
                    .contiguous(),
                None => bail!("set2set: no step was made"),
            },
        }
    }

    /// As [`forward`](Self::forward), with q* and the attention [elements] of every step.
    pub fn trace(&self, memories: &Tensor, sizes: &[usize]) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
        let (elements, d) = memories.dims2()?;
        if d != self.config.d || sizes.iter().sum::<usize>() != elements {
            bail!(
                "set2set: found {elements} memories of width {d} in sets of {} in all, expected width {}",
                sizes.iter().sum::<usize>(),
                self.config.d
            );
        }
        let (sets, device) = (sizes.len(), memories.device());
        let of: Vec<u32> = sizes
            .iter()
            .enumerate()
            .flat_map(|(set, &size)| std::iter::repeat_n(set as u32, size))
            .collect();
        let index = Tensor::from_vec(of.clone(), elements, device)?;
        let zeros = |shape: &[usize]| Tensor::zeros(shape, memories.dtype(), device);
        let keys = match &self.additive {
            Some((w1, _, _)) => linear(memories, w1, None)?,
            None => memories.clone(),
        };
        let mut star = zeros(&[sets, 2 * d])?;
        let mut state = zeros(&[sets, 2 * d])?; // h, then c
        let (mut stars, mut attention) = (Vec::new(), Vec::new());
        for _ in 0..self.config.steps {
            let gates = linear(&star, &self.w_ih, Some(&self.b_ih))?.unsqueeze(1)?;
            state = recurrence(Cell::Lstm, &gates, &self.w_hh, &self.b_hh, &state)?.squeeze(1)?;
            let q = state.narrow(1, 0, d)?.contiguous()?;
            let e = match &self.additive {
                None => (&keys * q.index_select(&index, 0)?)?.sum(1)?,
                Some((_, w2, v)) => {
                    let query = linear(&q, w2, None)?.index_select(&index, 0)?;
                    (&keys + query)?.tanh()?.broadcast_mul(v)?.sum(1)?
                }
            };
            // Softmax within each set.
            let top = largest(&e, sizes)?.index_select(&index, 0)?;
            let weights = (e - top)?.exp()?;
            let sums = zeros(&[sets])?.index_add(&index, &weights, 0)?;
            let a = (weights / sums.index_select(&index, 0)?)?;
            let mixed = memories.broadcast_mul(&a.unsqueeze(1)?)?;
            let r = zeros(&[sets, d])?.index_add(&index, &mixed, 0)?;
            star = Tensor::cat(&[&q, &r], 1)?;
            stars.push(star.clone());
            attention.push(a);
        }
        Ok((stars, attention))
    }
}

/// The largest value of each set, without gradient: [sets].
fn largest(e: &Tensor, sizes: &[usize]) -> Result<Tensor> {
    let values = e
        .detach()
        .to_dtype(candle_core::DType::F64)?
        .to_vec1::<f64>()?;
    let mut rest = &values[..];
    let tops: Vec<f64> = sizes
        .iter()
        .map(|&size| {
            let (set, after) = rest.split_at(size);
            rest = after;
            set.iter().copied().fold(f64::NEG_INFINITY, f64::max)
        })
        .collect();
    Tensor::from_vec(tops, sizes.len(), e.device())?.to_dtype(e.dtype())
}

/// Hyper-parameters of [`Set2Seq`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Set2SeqConfig {
    /// Width of memories and of both LSTMs.
    pub d: usize,
    /// Process steps.
    pub steps: usize,
    /// An attention step between the decoder's state and its pointer.
    pub glimpse: bool,
    /// Whether answers end with an end token.
    pub ends: bool,
}

impl Default for Set2SeqConfig {
    fn default() -> Self {
        Set2SeqConfig {
            d: 64,
            steps: 5,
            glimpse: true,
            ends: false,
        }
    }
}

/// The write block: starts from q*, reads the memory pointed at last, points.
pub struct WriteBlock {
    decoder: PointerDecoder,
    w_init_h: Tensor,
    w_init_c: Tensor,
    go: Tensor,
    end: Option<Tensor>,
    d: usize,
}

impl WriteBlock {
    /// Parameters `w_init_h`, `w_init_c` [d, 2d], `go` [d], the cell's `w_ih`, `w_hh`, `b`, `p_*` and `g_*`.
    pub fn new(d: usize, glimpse: bool, ends: bool, params: &Params<'_>) -> Result<Self> {
        let limit = (d as f64).powf(-0.5);
        let get = |name: &str, shape: &[usize]| {
            let init = Init::Uniform {
                low: -limit,
                high: limit,
            };
            params.get(name, shape, init)
        };
        let glimpse = glimpse.then_some("g_");
        Ok(WriteBlock {
            decoder: PointerDecoder::new(("", "p_", glimpse), d, d, limit, params)?,
            w_init_h: get("w_init_h", &[d, 2 * d])?,
            w_init_c: get("w_init_c", &[d, 2 * d])?,
            go: get("go", &[d])?,
            end: ends.then(|| get("end", &[d])).transpose()?,
            d,
        })
    }

    /// What the decoder points into: memories [batch, longest, d], their mask with room for the end, q* [batch, 2d].
    pub fn read(
        &self,
        memories: &Tensor,
        mask: Tensor,
        star: &Tensor,
        sizes: &[usize],
    ) -> Result<Reading> {
        let (batch, longest, d) = memories.dims3()?;
        let before = usize::from(self.end.is_some());
        let memories = match &self.end {
            None => memories.clone(),
            Some(end) => {
                let end = end.reshape((1, 1, d))?.broadcast_as((batch, 1, d))?;
                Tensor::cat(&[&end.contiguous()?, memories], 1)?
            }
        };
        let flat = memories.reshape((batch * (before + longest), d))?;
        Ok(Reading {
            inputs: Tensor::cat(&[&self.go.unsqueeze(0)?, &flat], 0)?,
            state: Tensor::cat(
                &[
                    linear(star, &self.w_init_h, None)?.tanh()?,
                    linear(star, &self.w_init_c, None)?.tanh()?,
                ],
                1,
            )?,
            memories,
            mask,
            counts: sizes.iter().map(|size| before + size).collect(),
            ends: before == 1,
        })
    }

    /// The decoder.
    pub fn decoder(&self) -> &PointerDecoder {
        &self.decoder
    }

    /// Width of memories.
    pub fn width(&self) -> usize {
        self.d
    }
}

/// Read, process, write.
pub struct Set2Seq {
    /// Linear, tanh, linear.
    read: [(Tensor, Tensor); 2],
    process: Set2Set,
    write: WriteBlock,
}

impl Set2Seq {
    /// For sets of vectors of `dim` numbers: `read.0`, `read.1`, `process`, `write`.
    pub fn new(config: &Set2SeqConfig, dim: usize, params: &Params<'_>) -> Result<Self> {
        let layer = |at: Params<'_>, inputs: usize| -> Result<(Tensor, Tensor)> {
            let limit = (inputs as f64).powf(-0.5);
            let init = || Init::Uniform {
                low: -limit,
                high: limit,
            };
            Ok((
                at.get("weight", &[config.d, inputs], init())?,
                at.get("bias", &[config.d], init())?,
            ))
        };
        let read = params.at("read");
        let process = Set2SetConfig {
            d: config.d,
            steps: config.steps,
            ..Set2SetConfig::default()
        };
        Ok(Set2Seq {
            read: [layer(read.at(0), dim)?, layer(read.at(1), config.d)?],
            process: Set2Set::new(&process, &params.at("process"))?,
            write: WriteBlock::new(config.d, config.glimpse, config.ends, &params.at("write"))?,
        })
    }

    /// Memories of padded sets: [batch, longest, d].
    pub fn memories(&self, sets: &Sets) -> Result<Tensor> {
        let [(w, b), (w2, b2)] = &self.read;
        linear(&linear(&sets.values, w, Some(b))?.tanh()?, w2, Some(b2))
    }

    /// What the decoder points into.
    pub fn reading(&self, sets: &Sets) -> Result<Reading> {
        let memories = self.memories(sets)?;
        let (batch, longest, d) = memories.dims3()?;
        let flat = memories.reshape((batch * longest, d))?;
        // The process block sees elements, never padding.
        let real: Vec<u32> = sets
            .sizes
            .iter()
            .enumerate()
            .flat_map(|(b, &size)| (0..size).map(move |j| (b * longest + j) as u32))
            .collect();
        let elements = if real.len() == batch * longest {
            flat
        } else {
            flat.index_select(&Tensor::new(real, flat.device())?, 0)?
        };
        let star = self.process.forward(&elements, &sets.sizes)?;
        let mask = sets.mask(usize::from(self.write.end.is_some()))?;
        self.write.read(&memories, mask, &star, &sets.sizes)
    }

    /// The decoder.
    pub fn decoder(&self) -> &PointerDecoder {
        &self.write.decoder
    }

    /// A tensor of the model, for its device and type.
    pub fn like(&self) -> &Tensor {
        &self.write.go
    }
}
