//! LongVQ: moving averages write the past into every position, then attention over keys snapped to a codebook, exact over
//! all of the past in linear time and with a state of fixed size (paper 28).
//!
//! The layer is a whole gated block, y = x + u (h - x), with the norm before it: give it a chain without norms and
//! residuals of its own. The codebook learns from running means of the keys it stands for, not by gradients.

use super::ema::{Ema, EmaConfig};
use super::modes::{Affine, layer_norm, sigmoid};
use super::{MixerSpec, MixerState, SequenceMixer, StateKind};
use crate::params::{Init, ParamGroup, Params};
use candle_core::{DType, Result, Tensor, Var, bail};
use longspan_data::random::Random;
use longspan_kernels::cut::cut;
use longspan_kernels::vq::{VqAttention, straight_through, vq_assign};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::thread::ThreadId;

/// What writes the past into each position before attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Memory {
    /// Damped moving averages.
    Ema,
    /// Nothing: an ablation.
    None,
}

/// Hyper-parameters of [`LongVq`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LongVqConfig {
    /// Width E of values; none = 2 d_model.
    pub value_dim: Option<usize>,
    /// Width d_k of queries and keys.
    pub key_dim: usize,
    /// Codes S.
    pub codes: usize,
    /// Tokens C of a block: this one and the one before are seen key by key.
    pub block: usize,
    /// Averages per channel.
    pub ema_order: usize,
    /// What stands before attention.
    pub memory: Memory,
    /// Only earlier tokens.
    pub causal: bool,
    /// A learned bias by distance inside the window.
    pub bias: bool,
    /// Attention beyond the window; false is an ablation.
    pub far: bool,
    /// Weight of the commitment |k - code|², added in the backward pass of each micro-batch.
    pub commitment: f64,
    /// Decay of the codebook's running means, per optimiser step.
    pub codebook_decay: f64,
    /// Start the codebook from the first batch's keys (k-means++) instead of noise.
    pub first_batch: bool,
    /// Give a code that stood for nothing over 100 steps a key of the batch.
    pub reseed: bool,
}

impl Default for LongVqConfig {
    fn default() -> Self {
        LongVqConfig {
            value_dim: None,
            key_dim: 64,
            codes: 512,
            block: 128,
            ema_order: 16,
            memory: Memory::Ema,
            causal: true,
            bias: true,
            far: true,
            commitment: 1e-4,
            codebook_decay: 0.99,
            first_batch: true,
            reseed: false,
        }
    }
}

/// Counts below this are taken for this in codebook = sum / count.
const COUNT_FLOOR: f64 = 0.01;
/// Keys kept of a batch, for codes that start anew.
const SAMPLE: usize = 2048;
/// Steps without use after which a code starts anew.
const PATIENCE: u32 = 100;

/// What a step's codebook update is made from.
#[derive(Default)]
struct Seen {
    noted: Noted,
    /// Steps in which a code stood for no key.
    idle: Vec<u32>,
}

/// How keys are spread over codes, and how far from them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CodeUse {
    /// e^entropy of the share of keys per code: between 1 and the number of codes.
    pub perplexity: f64,
    /// √(Σ |k - code|² / Σ |k|²).
    pub relative_error: f64,
}

/// The layer.
pub struct LongVq {
    config: LongVqConfig,
    d_model: usize,
    value_dim: usize,
    ema: Option<Ema>,
    v_proj: Affine,
    base_proj: Affine,
    h_proj: Affine,
    qk_gain: Tensor,
    qk_bias: Tensor,
    rel_bias: Tensor,
    c_sum: Tensor,
    c_count: Tensor,
    seen: Mutex<Seen>,
    /// What each thread's forward passes noted since they were asked.
    noted: Mutex<HashMap<ThreadId, Noted>>,
}

/// Means of the keys each code stands for: c_sum [codes, d], c_count [codes].
pub fn codebook(c_sum: &Tensor, c_count: &Tensor) -> Result<Tensor> {
    c_sum.broadcast_div(&c_count.maximum(COUNT_FLOOR)?.unsqueeze(1)?)
}

/// c_sum and c_count after one update by the keys [rows, d] and their codes.
pub fn updated(
    c_sum: &Tensor,
    c_count: &Tensor,
    sums: &[f64],
    counts: &[f64],
    decay: f64,
) -> Result<(Tensor, Tensor)> {
    let moved = |old: &Tensor, new: &[f64]| -> Result<Tensor> {
        let values = old.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        let mixed: Vec<f64> = values
            .iter()
            .zip(new)
            .map(|(old, new)| decay * old + (1.0 - decay) * new)
            .collect();
        Tensor::from_vec(mixed, old.shape(), old.device())?.to_dtype(old.dtype())
    };
    Ok((moved(c_sum, sums)?, moved(c_count, counts)?))
}

/// Sums and counts of the keys [rows, d] per code.
pub fn assigned(keys: &[f64], codes: &[u32], d: usize, size: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut sums, mut counts) = (vec![0.0; size * d], vec![0.0; size]);
    for (key, &code) in keys.chunks(d).zip(codes) {
        counts[code as usize] += 1.0;
        let sum = &mut sums[code as usize * d..][..d];
        sum.iter_mut().zip(key).for_each(|(sum, k)| *sum += k);
    }
    (sums, counts)
}

impl LongVq {
    /// Parameters in `params`.
    pub fn new(config: &LongVqConfig, d_model: usize, params: &Params<'_>) -> Result<Self> {
        let c = config;
        let (e, dk, s) = (c.value_dim.unwrap_or(2 * d_model), c.key_dim, c.codes);
        if e == 0 || dk < 2 || s == 0 || c.block == 0 {
            bail!(
                "longvq: found value_dim {e}, key_dim {dk}, codes {s}, block {}, expected 1 or more, and a key_dim of 2 or \
                 more",
                c.block
            );
        }
        if !(0.0..1.0).contains(&c.codebook_decay) {
            bail!(
                "longvq: found codebook_decay {}, expected from 0 to below 1",
                c.codebook_decay
            );
        }
        let plain = ParamGroup::NO_DECAY;
        let fixed = ParamGroup {
            trainable: false,
            ..plain
        };
        let small = || Init::Normal { std: 0.02 };
        // Norms over q and k remove their scale, so that gains start at 1, not 0.
        let mut random = params.random("qk_gain");
        let gain = (0..2 * dk).map(|_| 1.0 + 0.02 * random.normal()).collect();
        let normal = Init::Normal {
            std: (dk as f64).powf(-0.5),
        };
        let memory = match c.memory {
            Memory::None => None,
            Memory::Ema => {
                let config = EmaConfig {
                    ndim: c.ema_order,
                    bidirectional: !c.causal,
                };
                Some(Ema::new(&config, d_model, &params.at("ema"))?)
            }
        };
        let width = 4 * c.block - 1;
        Ok(LongVq {
            d_model,
            value_dim: e,
            ema: memory,
            v_proj: Affine::new(params, "v_proj", d_model, e)?,
            base_proj: Affine::new(params, "base_proj", d_model, 2 * d_model + dk + e)?,
            h_proj: Affine::new(params, "h_proj", e, d_model)?,
            qk_gain: params.get_in("qk_gain", &[2, dk], Init::Values(gain), plain)?,
            qk_bias: params.get_in("qk_bias", &[2, dk], Init::Constant(0.0), plain)?,
            rel_bias: if c.bias {
                params.get_in("rel_bias", &[width], small(), plain)?
            } else {
                Tensor::zeros(width, params.dtype(), params.device())?
            },
            c_sum: params.get_in("c_sum", &[s, dk], normal, fixed)?,
            c_count: params.get_in("c_count", &[s], Init::Constant(1.0), fixed)?,
            seen: Mutex::default(),
            noted: Mutex::default(),
            config: c.clone(),
        })
    }

    fn codebook(&self) -> Result<Tensor> {
        codebook(&self.c_sum.detach(), &self.c_count.detach())
    }

    /// Queries, keys, values and gates of xn and its memory.
    fn projections(&self, xn: &Tensor, memory: &Tensor) -> Result<Projected> {
        let (d, dk, e) = (self.d_model, self.config.key_dim, self.value_dim);
        let base = cut(&self.base_proj.apply(memory)?, &[d, dk, e, d])?;
        let z = base[1].silu()?;
        let scaled = |row: usize| {
            let gain = self.qk_gain.narrow(0, row, 1)?.squeeze(0)?;
            let bias = self.qk_bias.narrow(0, row, 1)?.squeeze(0)?;
            let z = z.broadcast_mul(&gain)?.broadcast_add(&bias)?;
            layer_norm(&z, 1e-5)? * (dk as f64).powf(-0.25)
        };
        Ok(Projected {
            v: self.v_proj.apply(xn)?.silu()?,
            u: sigmoid(&base[0])?,
            r: base[2].silu()?,
            hx: base[3].clone(),
            q: scaled(0)?,
            k: scaled(1)?,
        })
    }

    fn gated(&self, x: &Tensor, p: &Projected, attended: &Tensor) -> Result<Tensor> {
        let h = self.h_proj.apply(&(attended * &p.r)?)?;
        let h = (&p.hx + h)?.silu()?;
        x + (&p.u * (h - x)?)?
    }

    /// The block over x [batch, length, d_model], and what attention gave [batch, length, value_dim].
    pub fn block(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let (batch, length, _) = x.dims3()?;
        let dk = self.config.key_dim;
        let xn = layer_norm(x, 1e-5)?;
        let memory = match &self.ema {
            Some(ema) => ema.forward(&xn, None)?.0,
            None => xn.clone(),
        };
        let p = self.projections(&xn, &memory)?;
        let codebook = self.codebook()?;
        let codes = vq_assign(&p.k.detach(), &codebook)?;
        let keys = p.k.contiguous()?.reshape((batch * length, dk))?;
        if x.track_op() {
            self.note(&keys, &codes)?;
        }
        let rows = Tensor::from_slice(&codes, codes.len(), x.device())?;
        let snapped = codebook.index_select(&rows, 0)?;
        let snapped = straight_through(&keys, &snapped, self.config.commitment)?;
        let attention = VqAttention {
            q: &p.q,
            codes: &codes,
            k: &snapped.reshape((batch, length, dk))?,
            codebook: &codebook,
            v: &p.v,
            bias: &self.rel_bias,
            block: self.config.block,
            causal: self.config.causal,
            far: self.config.far,
        };
        let attended = attention.run()?;
        Ok((self.gated(x, &p, &attended)?, attended))
    }

    /// How the keys of x [batch, length, d_model] use the codes.
    pub fn code_use(&self, x: &Tensor) -> Result<CodeUse> {
        let xn = layer_norm(&x.detach(), 1e-5)?;
        let memory = match &self.ema {
            Some(ema) => ema.forward(&xn, None)?.0,
            None => xn.clone(),
        };
        let k = self.projections(&xn, &memory)?.k.detach();
        let codebook = self.codebook()?;
        let codes = vq_assign(&k, &codebook)?;
        let mut counts = vec![0f64; self.config.codes];
        codes.iter().for_each(|&code| counts[code as usize] += 1.0);
        let total = codes.len().max(1) as f64;
        let entropy: f64 = counts
            .iter()
            .filter(|&&n| n > 0.0)
            .map(|n| -(n / total) * (n / total).ln())
            .sum();
        let rows = Tensor::from_slice(&codes, codes.len(), x.device())?;
        let keys = k.contiguous()?.reshape((codes.len(), ()))?;
        let size = |t: Tensor| -> Result<f64> {
            t.sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()
        };
        let gap = size((&keys - codebook.index_select(&rows, 0)?)?)?;
        Ok(CodeUse {
            perplexity: entropy.exp(),
            relative_error: (gap / size(keys)?.max(f64::MIN_POSITIVE)).sqrt(),
        })
    }

    fn note(&self, keys: &Tensor, codes: &[u32]) -> Result<()> {
        let (d, s) = (self.config.key_dim, self.config.codes);
        let keys = keys
            .detach()
            .to_dtype(DType::F64)?
            .flatten_all()?
            .to_vec1::<f64>()?;
        let (sums, counts) = assigned(&keys, codes, d, s);
        // Keys at equal distances through the batch.
        let every = codes.len().div_ceil(SAMPLE).max(1);
        let sample = keys
            .chunks(d)
            .step_by(every)
            .flat_map(|key| key.iter().copied())
            .collect();
        let new = Noted {
            sums,
            counts,
            sample,
        };
        let mut noted = held(&self.noted);
        let own = noted.entry(std::thread::current().id()).or_default();
        own.add(new);
        Ok(())
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poison| poison.into_inner())
}

/// Keys of forward passes: their sums [codes, d] and counts [codes] by code, and some of the last pass's keys.
#[derive(Default)]
struct Noted {
    sums: Vec<f64>,
    counts: Vec<f64>,
    sample: Vec<f64>,
}

impl Noted {
    fn add(&mut self, new: Noted) {
        for (old, new) in [(&mut self.sums, new.sums), (&mut self.counts, new.counts)] {
            if old.is_empty() {
                *old = new;
            } else {
                old.iter_mut().zip(new).for_each(|(old, new)| *old += new);
            }
        }
        self.sample = new.sample;
    }
}

struct Projected {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    r: Tensor,
    hx: Tensor,
}

/// `count` of the points [.., d], far from each other: the next is drawn in proportion to the squared distance from
/// those chosen (k-means++).
fn spread(points: &[f64], d: usize, count: usize, random: &mut Random) -> Vec<f64> {
    let points: Vec<&[f64]> = points.chunks(d).collect();
    let gap = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum() };
    let mut out = Vec::with_capacity(count * d);
    let mut nearest = vec![f64::INFINITY; points.len()];
    let mut next = random.below(points.len() as u64) as usize;
    for _ in 0..count {
        out.extend_from_slice(points[next]);
        for (nearest, point) in nearest.iter_mut().zip(&points) {
            *nearest = nearest.min(gap(point, points[next]));
        }
        let total: f64 = nearest.iter().sum();
        let mut left = random.uniform() * total;
        next = points.len() - 1;
        for (at, gap) in nearest.iter().enumerate() {
            left -= gap;
            if left <= 0.0 {
                next = at;
                break;
            }
        }
    }
    out
}

impl SequenceMixer for LongVq {
    fn spec(&self) -> MixerSpec {
        let causal = self.config.causal;
        MixerSpec {
            name: "longvq",
            causal,
            state: if causal {
                StateKind::Fixed
            } else {
                StateKind::None
            },
            state_gradient: Some("carried codes, counts and mean values are kept without a graph"),
        }
    }

    fn estimated_gradient(&self) -> Option<&'static str> {
        Some("the gradient of a key is that of its code (straight-through), with the commitment")
    }

    fn forward(
        &self,
        x: &Tensor,
        state: Option<&MixerState>,
    ) -> Result<(Tensor, Option<MixerState>)> {
        let (batch, length, _) = x.dims3()?;
        let Some(state) = state else {
            if length == 0 {
                return Ok((x.clone(), None));
            }
            return Ok((self.block(x)?.0, None));
        };
        if !self.config.causal {
            bail!("a LongVQ layer that looks both ways has no state");
        }
        if x.track_op() {
            bail!(
                "longvq: gradients do not pass a carried state; detach the input or give no state"
            )
        }
        if length == 0 {
            return Ok((x.clone(), Some(state.clone())));
        }
        let xn = layer_norm(x, 1e-5)?;
        let (memory, ema_state) = match &self.ema {
            None => (xn.clone(), None),
            Some(ema) => {
                let (y, next) = ema.forward(&xn, Some(state))?;
                (y, next)
            }
        };
        let p = self.projections(&xn, &memory)?;
        let codebook = self.codebook()?;
        let codes = vq_assign(&p.k.detach(), &codebook)?;
        let mut reader = Reader::new(self, state, &codebook)?;
        let rows = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        let (q, v) = (rows(&p.q)?, rows(&p.v)?);
        let (dk, e) = (self.config.key_dim, self.value_dim);
        let mut out = vec![0f64; batch * length * e];
        for row in 0..batch {
            for t in 0..length {
                let at = row * length + t;
                reader.read(
                    row,
                    state.position + t,
                    (&q[at * dk..][..dk], codes[at], &v[at * e..][..e]),
                    &mut out[at * e..][..e],
                );
            }
        }
        let attended =
            Tensor::from_vec(out, (batch, length, e), x.device())?.to_dtype(x.dtype())?;
        let y = self.gated(x, &p, &attended)?;
        let mut next = reader.state(state.position + length, x)?;
        if let Some(ema) = ema_state {
            next.tensors.extend(ema.tensors);
        }
        Ok((y, Some(next)))
    }

    fn init_state(&self, batch: usize) -> Result<MixerState> {
        if !self.config.causal {
            bail!("a LongVQ layer that looks both ways has no step form");
        }
        let (s, e, near) = (self.config.codes, self.value_dim, 2 * self.config.block);
        let mut state = MixerState::zeros(
            [
                ("counts", &[batch, s][..]),
                ("means", &[batch, s, e][..]),
                ("near_values", &[batch, near, e][..]),
            ],
            &self.c_sum,
        )?;
        let codes = Tensor::zeros((batch, near), DType::U32, self.c_sum.device())?;
        state.tensors.insert("near_codes".into(), codes);
        if let Some(ema) = &self.ema {
            state.tensors.extend(ema.init_state(batch)?.tensors);
        }
        Ok(state)
    }

    fn take_notes(&self) -> Vec<f64> {
        let own = held(&self.noted).remove(&std::thread::current().id());
        own.map_or(Vec::new(), |own| {
            [own.sums, own.counts, own.sample].concat()
        })
    }

    fn add_notes(&self, notes: &[f64]) -> Result<()> {
        let (d, s) = (self.config.key_dim, self.config.codes);
        if notes.is_empty() {
            return Ok(());
        }
        if notes.len() < s * d + s || !(notes.len() - s).is_multiple_of(d) {
            bail!(
                "longvq: found notes of {} numbers, expected those of {s} codes of {d}",
                notes.len()
            );
        }
        let (sums, rest) = notes.split_at(s * d);
        let (counts, sample) = rest.split_at(s);
        held(&self.seen).noted.add(Noted {
            sums: sums.to_vec(),
            counts: counts.to_vec(),
            sample: sample.to_vec(),
        });
        Ok(())
    }

    fn after_step(&self) -> Result<()> {
        // What this thread noted itself, where no trainer asked for it.
        self.add_notes(&self.take_notes())?;
        let mut held = held(&self.seen);
        let seen = &mut *held;
        let idle = &mut seen.idle;
        let seen = std::mem::take(&mut seen.noted);
        if seen.counts.is_empty() {
            return Ok(());
        }
        let (d, s) = (self.config.key_dim, self.config.codes);
        let counts = self
            .c_count
            .detach()
            .to_dtype(DType::F64)?
            .to_vec1::<f64>()?;
        // No code has counted anything yet.
        let fresh = counts.iter().all(|&count| count == 1.0);
        let (mut c_sum, mut c_count) = (self.c_sum.detach(), self.c_count.detach());
        if fresh && self.config.first_batch {
            let mut random = Random::new(0, "codebook");
            let start = spread(&seen.sample, d, s, &mut random);
            // The means of the keys nearest to each, in the numbers that a step brings.
            let device = c_sum.device();
            let keys = Tensor::from_slice(&seen.sample, (seen.sample.len() / d, d), device)?;
            let codes = vq_assign(&keys, &Tensor::from_slice(&start, (s, d), device)?)?;
            let (mut sums, mut counts) = assigned(&seen.sample, &codes, d, s);
            for code in (0..s)
                .filter(|&code| counts[code] == 0.0)
                .collect::<Vec<_>>()
            {
                sums[code * d..][..d].copy_from_slice(&start[code * d..][..d]);
                counts[code] = 1.0;
            }
            c_count = Tensor::from_vec(counts, s, device)?.to_dtype(c_count.dtype())?;
            c_sum = Tensor::from_vec(sums, (s, d), device)?.to_dtype(c_sum.dtype())?;
        } else {
            let decay = self.config.codebook_decay;
            (c_sum, c_count) = updated(&c_sum, &c_count, &seen.sums, &seen.counts, decay)?;
        }
        if self.config.reseed {
            idle.resize(s, 0);
            let mut sums = c_sum.to_dtype(DType::F64)?.to_vec2::<f64>()?;
            let mut counts = c_count.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            let keys = (seen.sample.len() / d) as u64;
            for code in 0..s {
                let used = seen.counts[code] > 0.0;
                idle[code] = if used { 0 } else { idle[code] + 1 };
                if idle[code] >= PATIENCE && keys > 0 {
                    let mut random = Random::new(code as u64, "code anew");
                    let key = random.below(keys) as usize;
                    sums[code] = seen.sample[key * d..][..d].to_vec();
                    counts[code] = 1.0;
                    idle[code] = 0;
                }
            }
            let like = |t: Tensor| t.to_dtype(c_sum.dtype());
            let device = c_sum.device();
            c_count = like(Tensor::from_vec(counts, s, device)?)?;
            c_sum = like(Tensor::from_vec(sums.concat(), (s, d), device)?)?;
        }
        Var::from_tensor(&self.c_sum)?.set(&c_sum)?;
        Var::from_tensor(&self.c_count)?.set(&c_count)?;
        Ok(())
    }
}

/// The step form's state, on slices: a ring of two blocks, and a count and a mean value per code.
struct Reader<'a> {
    layer: &'a LongVq,
    codebook: Vec<f64>,
    bias: Vec<f64>,
    counts: Vec<f64>,
    means: Vec<f64>,
    near_codes: Vec<u32>,
    near_values: Vec<f64>,
    batch: usize,
}

impl<'a> Reader<'a> {
    fn new(layer: &'a LongVq, state: &MixerState, codebook: &Tensor) -> Result<Self> {
        let rows = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        let near = state.get("near_codes")?;
        let ring = 2 * layer.config.block;
        if near.dims().len() != 2 || near.dim(1)? != ring {
            bail!(
                "longvq: found a state with {:?} near codes, expected [batch, {ring}]",
                near.dims()
            );
        }
        Ok(Reader {
            codebook: rows(codebook)?,
            bias: rows(&layer.rel_bias.detach())?,
            counts: rows(state.get("counts")?)?,
            means: rows(state.get("means")?)?,
            near_values: rows(state.get("near_values")?)?,
            near_codes: near.flatten_all()?.to_vec1::<u32>()?,
            batch: near.dim(0)?,
            layer,
        })
    }

    /// Token `t` of sequence `row`: (query, code, value) to what attention gives.
    fn read(&mut self, row: usize, t: usize, token: (&[f64], u32, &[f64]), out: &mut [f64]) {
        let config = &self.layer.config;
        let (c, s, dk, e) = (
            config.block,
            config.codes,
            config.key_dim,
            self.layer.value_dim,
        );
        let (query, code, value) = token;
        let counts = &mut self.counts[row * s..][..s];
        let means = &mut self.means[row * s * e..][..s * e];
        let codes = &mut self.near_codes[row * 2 * c..][..2 * c];
        let values = &mut self.near_values[row * 2 * c * e..][..2 * c * e];
        if t.is_multiple_of(c) && t >= 2 * c && config.far {
            // A block begins: the one whose place it takes in the ring becomes far.
            for slot in t % (2 * c)..t % (2 * c) + c {
                let code = codes[slot] as usize;
                let count = counts[code];
                counts[code] = count + 1.0;
                let mean = &mut means[code * e..][..e];
                for (mean, v) in mean.iter_mut().zip(&values[slot * e..][..e]) {
                    *mean += (v - *mean) / (count + 1.0);
                }
            }
        }
        let slot = t % (2 * c);
        codes[slot] = code;
        values[slot * e..][..e].copy_from_slice(value);
        let first = (t / c).saturating_sub(1) * c;
        let key = |code: usize| -> f64 {
            let key = &self.codebook[code * dk..][..dk];
            key.iter().zip(query).map(|(k, q)| k * q).sum()
        };
        // Score, weight of its value, place of the value.
        let mut near = Vec::with_capacity(2 * c);
        let most = 2 * c - 1;
        let mut top = f64::NEG_INFINITY;
        for j in first..=t {
            let slot = j % (2 * c);
            let score = key(codes[slot] as usize) + self.bias[t - j + most];
            top = top.max(score);
            near.push((score, slot));
        }
        let far: Vec<f64> = (0..s)
            .map(|code| {
                if counts[code] > 0.0 {
                    key(code) + counts[code].ln()
                } else {
                    f64::NEG_INFINITY
                }
            })
            .collect();
        top = far.iter().fold(top, |top, &score| top.max(score));
        let mut total = 0.0;
        let mut add = |weight: f64, value: &[f64]| {
            total += weight;
            out.iter_mut()
                .zip(value)
                .for_each(|(o, v)| *o += weight * v);
        };
        for (score, slot) in near {
            add((score - top).exp(), &values[slot * e..][..e]);
        }
        for (code, score) in far.into_iter().enumerate() {
            if score > f64::NEG_INFINITY {
                add((score - top).exp(), &means[code * e..][..e]);
            }
        }
        out.iter_mut().for_each(|o| *o /= total);
    }

    fn state(self, position: usize, like: &Tensor) -> Result<MixerState> {
        let config = &self.layer.config;
        let (near, s, e) = (2 * config.block, config.codes, self.layer.value_dim);
        let (batch, device) = (self.batch, like.device());
        let make = |values: Vec<f64>, shape: &[usize]| {
            Tensor::from_vec(values, shape, device)?.to_dtype(like.dtype())
        };
        let tensors = [
            ("counts", make(self.counts, &[batch, s])?),
            ("means", make(self.means, &[batch, s, e])?),
            ("near_values", make(self.near_values, &[batch, near, e])?),
            (
                "near_codes",
                Tensor::from_vec(self.near_codes, (batch, near), device)?,
            ),
        ];
        Ok(MixerState {
            tensors: tensors.map(|(name, t)| (name.to_string(), t)).into(),
            position,
            plan: None,
        })
    }
}
