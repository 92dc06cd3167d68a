//! Recurrent nets: Elman (tanh, relu), LSTM, GRU, in stacks and both directions (paper 15), with PyTorch's tensors.
//!
//! Names, layouts, gate order and the two biases are those of `torch.nn.RNN/LSTM/GRU`, so their state dicts load. A net
//! whose output is not as wide as the model gets a projection, `out_proj`.

use super::{MixerSpec, MixerState, SequenceMixer, StateKind, linear};
use crate::params::{Init, Params};
use candle_core::{Result, Tensor, bail};
use longspan_kernels::recurrent::{Cell, recurrence};
use serde::{Deserialize, Serialize};

/// Kind of cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RnnCell {
    /// Elman with tanh.
    Tanh,
    /// Elman with relu.
    Relu,
    /// Long short-term memory.
    Lstm,
    /// The first LSTM, of 1997: without forget gate.
    Lstm97,
    /// LSTM with peepholes: diagonal weights `weight_p_l0` [3, hidden] by which i and f read the old state, o the new.
    PeepholeLstm,
    /// Gated recurrent unit.
    Gru,
}

/// Hyper-parameters of [`Rnn`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RnnConfig {
    /// The cell.
    pub cell: RnnCell,
    /// Width of the hidden state; none = d_model.
    pub hidden_size: Option<usize>,
    /// Layers of the net.
    pub layers: usize,
    /// A second net reads from the end; outputs stand side by side.
    pub bidirectional: bool,
}

impl Default for RnnConfig {
    fn default() -> Self {
        RnnConfig {
            cell: RnnCell::Lstm,
            hidden_size: None,
            layers: 1,
            bidirectional: false,
        }
    }
}

struct Direction {
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    /// Diagonals i, f, o of peepholes: [3, hidden]
    peepholes: Option<Tensor>,
}

/// The net.
pub struct Rnn {
    cell: Cell,
    hidden: usize,
    bidirectional: bool,
    /// Per layer, one or two directions.
    layers: Vec<Vec<Direction>>,
    out_proj: Option<Tensor>,
}

impl Rnn {
    /// Parameters in `params`.
    pub fn new(config: &RnnConfig, d_model: usize, params: &Params<'_>) -> Result<Self> {
        let hidden = config.hidden_size.unwrap_or(d_model);
        if hidden == 0 || config.layers == 0 {
            bail!(
                "rnn: found hidden size {hidden} and {} layers, expected 1 or more of each",
                config.layers
            );
        }
        let cell = match config.cell {
            RnnCell::Tanh => Cell::Tanh,
            RnnCell::Relu => Cell::Relu,
            RnnCell::Lstm => Cell::Lstm,
            RnnCell::Lstm97 => Cell::Lstm97,
            RnnCell::PeepholeLstm => Cell::PeepholeLstm,
            RnnCell::Gru => Cell::Gru,
        };
        let directions = if config.bidirectional { 2 } else { 1 };
        let limit = (hidden as f64).powf(-0.5);
        let get = |name: String, shape: &[usize]| {
            let init = Init::Uniform {
                low: -limit,
                high: limit,
            };
            params.get(&name, shape, init)
        };
        let width = cell.gates() * hidden;
        let mut layers = Vec::new();
        for layer in 0..config.layers {
            let inputs = if layer == 0 {
                d_model
            } else {
                directions * hidden
            };
            let mut both = Vec::new();
            for direction in 0..directions {
                let end = if direction == 1 { "_reverse" } else { "" };
                both.push(Direction {
                    weight_ih: get(format!("weight_ih_l{layer}{end}"), &[width, inputs])?,
                    weight_hh: get(format!("weight_hh_l{layer}{end}"), &[width, hidden])?,
                    bias_ih: get(format!("bias_ih_l{layer}{end}"), &[width])?,
                    bias_hh: get(format!("bias_hh_l{layer}{end}"), &[width])?,
                    peepholes: match cell.diagonals() {
                        0 => None,
                        n => Some(get(format!("weight_p_l{layer}{end}"), &[n, hidden])?),
                    },
                });
            }
            layers.push(both);
        }
        let out_proj = if directions * hidden == d_model {
            None
        } else {
            Some(get(
                "out_proj.weight".into(),
                &[d_model, directions * hidden],
            )?)
        };
        Ok(Rnn {
            cell,
            hidden,
            bidirectional: config.bidirectional,
            layers,
            out_proj,
        })
    }

    /// The net without the projection: x [batch, length, inputs], start states per layer and direction [batch, states
    /// hidden] (h, then c of an LSTM), to outputs [batch, length, directions hidden] and the last states.
    pub fn run(&self, x: &Tensor, start: &[Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let (batch, length, _) = x.dims3()?;
        let directions = if self.bidirectional { 2 } else { 1 };
        if start.len() != self.layers.len() * directions {
            bail!(
                "rnn: found {} start states, expected {}",
                start.len(),
                self.layers.len() * directions
            );
        }
        if length == 0 {
            let y = Tensor::zeros((batch, 0, directions * self.hidden), x.dtype(), x.device())?;
            return Ok((y, start.to_vec()));
        }
        let mut x = x.clone();
        let mut last = Vec::new();
        for (layer, both) in self.layers.iter().enumerate() {
            let mut outputs = Vec::new();
            for (direction, net) in both.iter().enumerate() {
                let turned = if direction == 1 {
                    x.flip(&[1])?
                } else {
                    x.clone()
                };
                let gates = linear(&turned, &net.weight_ih, Some(&net.bias_ih))?;
                let start = &start[layer * directions + direction];
                let bias = match &net.peepholes {
                    Some(peepholes) => Tensor::cat(&[&net.bias_hh, &peepholes.flatten_all()?], 0)?,
                    None => net.bias_hh.clone(),
                };
                let states = recurrence(self.cell, &gates, &net.weight_hh, &bias, start)?;
                last.push(states.narrow(1, length - 1, 1)?.squeeze(1)?);
                let y = states.narrow(2, 0, self.hidden)?;
                outputs.push(if direction == 1 {
                    y.contiguous()?.flip(&[1])?
                } else {
                    y
                });
            }
            x = match &outputs[..] {
                [one] => one.contiguous()?,
                many => Tensor::cat(many, 2)?,
            };
        }
        Ok((x, last))
    }

    fn zeros(&self, batch: usize) -> Result<Vec<Tensor>> {
        let weight = &self.layers[0][0].weight_hh;
        let zero = Tensor::zeros(
            (batch, self.cell.states() * self.hidden),
            weight.dtype(),
            weight.device(),
        )?;
        Ok(vec![zero; self.layers.iter().map(Vec::len).sum()])
    }
}

impl SequenceMixer for Rnn {
    fn spec(&self) -> MixerSpec {
        MixerSpec {
            name: "rnn",
            causal: !self.bidirectional,
            state: if self.bidirectional {
                StateKind::None
            } else {
                StateKind::Fixed
            },
            state_gradient: None,
        }
    }

    fn forward(
        &self,
        x: &Tensor,
        state: Option<&MixerState>,
    ) -> Result<(Tensor, Option<MixerState>)> {
        let (batch, length, _) = x.dims3()?;
        let start = match state {
            Some(_) if self.bidirectional => bail!("an rnn that reads both ways has no state"),
            Some(state) => (0..self.layers.len())
                .map(|layer| state.get(&format!("layer{layer}")).cloned())
                .collect::<Result<Vec<_>>>()?,
            None => self.zeros(batch)?,
        };
        let (y, last) = self.run(x, &start)?;
        let y = match &self.out_proj {
            Some(weight) => linear(&y, weight, None)?,
            None => y,
        };
        let next = state.map(|state| MixerState {
            tensors: last
                .into_iter()
                .enumerate()
                .map(|(layer, t)| (format!("layer{layer}"), t))
                .collect(),
            position: state.position + length,
            plan: None,
        });
        Ok((y, next))
    }

    fn init_state(&self, batch: usize) -> Result<MixerState> {
        if self.bidirectional {
            bail!("an rnn that reads both ways has no step form");
        }
        let tensors = self.zeros(batch)?.into_iter().enumerate();
        Ok(MixerState {
            tensors: tensors
                .map(|(layer, t)| (format!("layer{layer}"), t))
                .collect(),
            position: 0,
            plan: None,
        })
    }
}
