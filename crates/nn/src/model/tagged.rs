//! A recurrent language model of sets whose elements carry their identity (paper 08, Order Matters): any order of the
//! elements can be written and undone, so that the order itself can be chosen by the model.
//!
//! Element (value, place) has id value * places + place; one id more starts every sequence.

use super::pointer::Lstm;
use crate::mixer::linear;
use crate::params::{Init, Params};
use candle_core::{D, DType, Result, Tensor, bail};
use longspan_data::random::Random;
use serde::{Deserialize, Serialize};

/// Hyper-parameters of [`TaggedLm`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TaggedConfig {
    /// Values of a place.
    pub symbols: usize,
    /// Places of a set: its elements.
    pub places: usize,
    /// Width of embeddings.
    pub embedding: usize,
    /// Width of the LSTM.
    pub hidden: usize,
}

impl Default for TaggedConfig {
    fn default() -> Self {
        TaggedConfig {
            symbols: 10,
            places: 20,
            embedding: 32,
            hidden: 64,
        }
    }
}

/// How an order is chosen by the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Choose {
    /// Element by element from the model's probabilities of those that are left.
    #[default]
    Sample,
    /// The most probable element that is left.
    Greedy,
    /// The most probable of all orders (at most 7 elements).
    Exhaustive,
    /// The most probable order that a beam of this width finds.
    Beam(usize),
}

/// The model: an embedding, an LSTM, a softmax over all elements.
pub struct TaggedLm {
    config: TaggedConfig,
    emb: Tensor,
    cell: Lstm,
    w_o: Tensor,
    b_o: Tensor,
}

impl TaggedLm {
    /// Parameters `emb` [ids + 1, e], `w_ih`, `w_hh`, `b`, `w_o` [ids, h], `b_o` [ids].
    pub fn new(config: &TaggedConfig, params: &Params<'_>) -> Result<Self> {
        let (c, ids) = (config, config.symbols * config.places);
        if ids == 0 || c.embedding == 0 || c.hidden == 0 {
            bail!("tagged model: found {c:?}, expected 1 or more of each");
        }
        let limit = (c.hidden as f64).powf(-0.5);
        let get = |name: &str, shape: &[usize]| {
            let init = Init::Uniform {
                low: -limit,
                high: limit,
            };
            params.get(name, shape, init)
        };
        Ok(TaggedLm {
            emb: get("emb", &[ids + 1, c.embedding])?,
            cell: Lstm::new("", c.embedding, c.hidden, limit, params)?,
            w_o: get("w_o", &[ids, c.hidden])?,
            b_o: get("b_o", &[ids])?,
            config: c.clone(),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &TaggedConfig {
        &self.config
    }

    /// Id of a value at a place.
    pub fn id(&self, value: u32, place: usize) -> u32 {
        value * self.config.places as u32 + place as u32
    }

    fn check(&self, ids: &[u32]) -> Result<()> {
        let most = (self.config.symbols * self.config.places) as u32;
        match ids.iter().find(|&&id| id >= most) {
            Some(id) => bail!("tagged model: found element {id}, expected below {most}"),
            None => Ok(()),
        }
    }

    /// ids [batch][length], in the order written, to logits of every step [batch, length, ids].
    pub fn logits(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let (batch, length) = (ids.len(), ids.first().map_or(0, Vec::len));
        if ids.iter().any(|row| row.len() != length) {
            bail!(
                "tagged model: found sets of different sizes, expected {length} elements in each"
            );
        }
        let go = (self.config.symbols * self.config.places) as u32;
        let mut before = Vec::with_capacity(batch * length);
        for row in ids {
            self.check(row)?;
            before.extend((0..length).map(|t| if t == 0 { go } else { row[t - 1] }));
        }
        let device = self.emb.device();
        let x = self
            .emb
            .index_select(&Tensor::new(before, device)?, 0)?
            .reshape((batch, length, self.config.embedding))?;
        let h = self.config.hidden;
        let start = Tensor::zeros((batch, 2 * h), x.dtype(), device)?;
        let states = self.cell.run(&x, &start)?.narrow(2, 0, h)?;
        linear(&states, &self.w_o, Some(&self.b_o))
    }

    /// ln p of each sequence under the whole vocabulary: [batch], tracked.
    pub fn log_probability(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let targets: Vec<Vec<i64>> = ids
            .iter()
            .map(|row| row.iter().map(|&id| i64::from(id)).collect())
            .collect();
        super::pointer::masked_nll(&self.logits(ids)?, &targets)?.neg()
    }

    /// ln q of each order: at every step the model's mass is shared by the elements of the set that are left. [batch].
    pub fn log_proposal(&self, ids: &[Vec<u32>]) -> Result<Vec<f64>> {
        let logits = self.logits(ids)?.detach().to_dtype(DType::F64)?;
        let logits = logits.to_vec3::<f64>()?;
        Ok(ids
            .iter()
            .zip(&logits)
            .map(|(row, logits)| {
                (0..row.len())
                    .map(|t| restricted(&logits[t], &row[t..], row[t]))
                    .sum()
            })
            .collect())
    }

    /// One order for each set of ids, chosen by the model as it is now.
    pub fn choose(
        &self,
        sets: &[Vec<u32>],
        how: Choose,
        random: &mut Random,
    ) -> Result<Vec<Vec<u32>>> {
        match how {
            Choose::Exhaustive => sets.iter().map(|set| self.exhaustive(set)).collect(),
            Choose::Beam(width) => self.search(sets, width.max(1), false, random),
            Choose::Greedy => self.search(sets, 1, false, random),
            Choose::Sample => self.search(sets, 1, true, random),
        }
    }

    fn exhaustive(&self, set: &[u32]) -> Result<Vec<u32>> {
        if set.len() > 7 {
            bail!(
                "exhaustive order search: found {} elements, expected at most 7",
                set.len()
            );
        }
        let orders = permutations(set);
        if set.is_empty() {
            return Ok(Vec::new());
        }
        let scores = self.log_probability(&orders)?.detach();
        let best = scores.argmax(D::Minus1)?.to_scalar::<u32>()?;
        Ok(orders[best as usize].clone())
    }

    /// Beams that may only write what is left of their set; scores under the whole vocabulary. `sample` draws instead, from
    /// the mass of what is left.
    fn search(
        &self,
        sets: &[Vec<u32>],
        width: usize,
        sample: bool,
        random: &mut Random,
    ) -> Result<Vec<Vec<u32>>> {
        let device = self.emb.device();
        let h = self.config.hidden;
        let go = (self.config.symbols * self.config.places) as u32;
        struct Beam {
            set: usize,
            written: Vec<u32>,
            left: Vec<u32>,
            score: f64,
        }
        let mut beams: Vec<Beam> = sets
            .iter()
            .enumerate()
            .map(|(set, left)| Beam {
                set,
                written: Vec::new(),
                left: left.clone(),
                score: 0.0,
            })
            .collect();
        let mut done: Vec<Vec<u32>> = vec![Vec::new(); sets.len()];
        for set in sets {
            self.check(set)?;
        }
        let mut state = Tensor::zeros((sets.len(), 2 * h), self.emb.dtype(), device)?;
        let emb = self.emb.detach();
        let longest = sets.iter().map(Vec::len).max().unwrap_or(0);
        for _ in 0..longest {
            let last: Vec<u32> = beams
                .iter()
                .map(|beam| beam.written.last().copied().unwrap_or(go))
                .collect();
            let x = emb
                .index_select(&Tensor::new(last, device)?, 0)?
                .unsqueeze(1)?;
            state = self.cell.run(&x, &state)?.detach().squeeze(1)?;
            let logits = linear(
                &state.narrow(1, 0, h)?,
                &self.w_o.detach(),
                Some(&self.b_o.detach()),
            )?;
            let logits = logits.to_dtype(DType::F64)?.to_vec2::<f64>()?;
            let mut next: Vec<(Beam, u32)> = Vec::new();
            let mut first = 0;
            while first < beams.len() {
                let set = beams[first].set;
                let group = beams[first..].iter().take_while(|b| b.set == set).count();
                let mut options: Vec<(f64, usize, usize)> = Vec::new();
                for k in first..first + group {
                    let beam = &beams[k];
                    let row = &logits[k];
                    if sample {
                        let mut rest = random.uniform();
                        let mut drawn = beam.left.len().saturating_sub(1);
                        for (place, &id) in beam.left.iter().enumerate() {
                            rest -= restricted(row, &beam.left, id).exp();
                            if rest < 0.0 {
                                drawn = place;
                                break;
                            }
                        }
                        options.push((0.0, k, drawn));
                        continue;
                    }
                    let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let log_z = top + row.iter().map(|l| (l - top).exp()).sum::<f64>().ln();
                    options.extend(
                        beam.left
                            .iter()
                            .enumerate()
                            .map(|(place, &id)| (beam.score + row[id as usize] - log_z, k, place)),
                    );
                }
                options.sort_by(|a, b| b.0.total_cmp(&a.0));
                for &(score, k, place) in options.iter().take(width) {
                    if beams[k].left.is_empty() {
                        continue;
                    }
                    let mut left = beams[k].left.clone();
                    let mut written = beams[k].written.clone();
                    written.push(left.swap_remove(place));
                    if left.is_empty() {
                        // The first to end is the best: options are sorted.
                        if done[set].is_empty() {
                            done[set] = written;
                        }
                        continue;
                    }
                    let beam = Beam {
                        set,
                        written,
                        left,
                        score,
                    };
                    next.push((beam, k as u32));
                }
                first += group;
            }
            if next.is_empty() {
                break;
            }
            let parents: Vec<u32> = next.iter().map(|(_, parent)| *parent).collect();
            state = state.index_select(&Tensor::new(parents, device)?, 0)?;
            beams = next.into_iter().map(|(beam, _)| beam).collect();
        }
        Ok(done)
    }
}

/// ln of the share that `id` has of the mass of `left`.
fn restricted(logits: &[f64], left: &[u32], id: u32) -> f64 {
    let at = |id: u32| logits[id as usize];
    let top = left
        .iter()
        .map(|&id| at(id))
        .fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = left.iter().map(|&id| (at(id) - top).exp()).sum();
    at(id) - top - sum.ln()
}

/// All orders of a list, in lexicographic order of places.
pub fn permutations(list: &[u32]) -> Vec<Vec<u32>> {
    if list.len() < 2 {
        return vec![list.to_vec()];
    }
    let mut out = Vec::new();
    for first in 0..list.len() {
        let mut rest = list.to_vec();
        let head = rest.remove(first);
        for mut tail in permutations(&rest) {
            tail.insert(0, head);
            out.push(tail);
        }
    }
    out
}
