//! S4 and S4D: a linear state-space system per channel, trained as one long convolution, run as a recurrence (paper 12).
//!
//! The layer is kernel convolution, `+ D u`, activation, and an output projection (GLU); norm and residual belong to the
//! block. Tensor names are the reference's (`layer.kernel.C`, ...), so its state dicts load.

use super::{MixerSpec, MixerState, SequenceMixer, StateKind, hippo, linear};
use crate::params::{Init, ParamGroup, Params};
use candle_core::{DType, Result, Tensor, bail};
use longspan_kernels::autograd::softplus;
use longspan_kernels::fftconv::fft_conv;
use longspan_kernels::s4::{Discretisation, diagonal_kernel, dplr_kernel, expm1};
use rustfft::num_complex::Complex64 as C;
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::sync::Arc;

/// Form of the state matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum S4Mode {
    /// Diagonal plus low rank, bilinear: S4.
    Dplr,
    /// Diagonal: S4D.
    Diag,
}

/// Start of the state matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum S4Init {
    /// HiPPO-LegS (for `diag`: its eigenvalues without the low-rank part).
    Legs,
    /// HiPPO-LegT, rank 2 (`dplr` only).
    Legt,
    /// -1/2 + iπn (`diag` only, as the rest).
    Lin,
    /// The inverse law that approximates LegS's eigenvalues.
    Inv,
    /// Quadratic frequencies.
    Quad,
    /// Real: no oscillation.
    Real,
    /// -1/2 with frequencies drawn from a half-normal distribution: a control, not from the paper's list.
    Random,
}

/// How dt is made from its parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DtTransform {
    /// e^x
    Exp,
    /// ln(1 + e^x)
    Softplus,
}

/// Hyper-parameters of [`S4`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct S4Config {
    /// State size N of every channel's system; even.
    pub d_state: usize,
    /// Read both ways.
    pub bidirectional: bool,
    /// S4 or S4D.
    pub mode: S4Mode,
    /// Start of A and B.
    pub init: S4Init,
    /// Rank of the low-rank part.
    pub rank: usize,
    /// Distinct (A, B); a divisor of the channels. 0 = one per channel.
    pub n_ssm: usize,
    /// Smallest initial step.
    pub dt_min: f64,
    /// Largest initial step.
    pub dt_max: f64,
    /// Transform of dt's parameter.
    pub dt_transform: DtTransform,
    /// `diag` by the bilinear rule instead of zero-order hold (`dplr` always is bilinear).
    pub bilinear: bool,
    /// Longest training length: S4's C is stored for kernels of this length.
    pub l_max: usize,
    /// GELU, then a linear layer with a gate (GLU), as published; false leaves the linear system alone.
    pub glu: bool,
}

impl Default for S4Config {
    fn default() -> Self {
        S4Config {
            d_state: 64,
            bidirectional: false,
            mode: S4Mode::Dplr,
            init: S4Init::Legs,
            rank: 1,
            n_ssm: 1,
            dt_min: 1e-3,
            dt_max: 1e-1,
            dt_transform: DtTransform::Softplus,
            bilinear: false,
            l_max: 1024,
            glu: true,
        }
    }
}

/// The layer.
pub struct S4 {
    config: S4Config,
    channels: usize,
    /// Copy of (A, B) that each channel uses.
    copies: Tensor,
    l_kernel: usize,
    inv_dt: Tensor,
    a_real: Tensor,
    a_imag: Tensor,
    b: Tensor,
    p: Option<Tensor>,
    c: Tensor,
    d: Tensor,
    output: Option<(Tensor, Tensor)>,
}

/// One channel's system for stepping.
struct Channel {
    lambda: Vec<C>,
    b: Vec<C>,
    c: Vec<C>,
    /// dplr: dt, P and the inverse of the discretised system's parts; diag: Ā and B̄ are in `lambda` and `b`.
    low_rank: Option<LowRank>,
}

struct LowRank {
    dt: f64,
    p: Vec<Vec<C>>,
    /// 1 / (2/dt - Λ)
    dg: Vec<C>,
    /// (I + 2 Re(Q Dg P))^-1 Q Dg over the half spectrum: [rank][n]
    r: Vec<Vec<C>>,
}

/// Every channel's system, in f64.
struct Plan(Vec<Channel>);

impl Channel {
    /// One step: x becomes the next state, the output (without D) comes back.
    fn step(&self, x: &mut [C], u: f64) -> f64 {
        match &self.low_rank {
            None => {
                for ((x, a), b) in x.iter_mut().zip(&self.lambda).zip(&self.b) {
                    *x = a * *x + b * u;
                }
            }
            Some(low) => {
                // Dot products run over both conjugate halves: twice the real part of one.
                let dots: Vec<f64> = low
                    .p
                    .iter()
                    .map(|p| {
                        2.0 * p
                            .iter()
                            .zip(&*x)
                            .map(|(p, x)| (p.conj() * x).re)
                            .sum::<f64>()
                    })
                    .collect();
                for (k, x) in x.iter_mut().enumerate() {
                    let mut v = (self.lambda[k] + 2.0 / low.dt) * *x + self.b[k] * (2.0 * u);
                    for (p, dot) in low.p.iter().zip(&dots) {
                        v -= p[k] * *dot;
                    }
                    *x = v;
                }
                let dots: Vec<f64> = low
                    .r
                    .iter()
                    .map(|r| 2.0 * r.iter().zip(&*x).map(|(r, v)| (r * v).re).sum::<f64>())
                    .collect();
                for (k, x) in x.iter_mut().enumerate() {
                    for (p, dot) in low.p.iter().zip(&dots) {
                        *x -= p[k] * *dot;
                    }
                    *x *= low.dg[k];
                }
            }
        }
        2.0 * self.c.iter().zip(&*x).map(|(c, x)| (c * x).re).sum::<f64>()
    }
}

impl S4 {
    /// Parameters in `params`, under the reference's names.
    pub fn new(config: &S4Config, channels: usize, params: &Params<'_>) -> Result<Self> {
        let c = config;
        let copies = if c.n_ssm == 0 { channels } else { c.n_ssm };
        if c.d_state < 2 || !c.d_state.is_multiple_of(2) {
            bail!("s4: found d_state {}, expected an even number", c.d_state);
        }
        if copies == 0 || !channels.is_multiple_of(copies) {
            bail!("s4: found n_ssm {copies}, expected a divisor of the {channels} channels");
        }
        if c.l_max == 0 || c.dt_min.is_nan() || c.dt_min <= 0.0 || c.dt_max < c.dt_min {
            bail!(
                "s4: found l_max {}, dt_min {}, dt_max {}, expected a length and 0 < dt_min <= dt_max",
                c.l_max,
                c.dt_min,
                c.dt_max
            );
        }
        let n = c.d_state / 2;
        let (lambda, b, p) = start(c, params)?;
        let kernel = params.at("layer").at("kernel");
        let slow = ParamGroup::STATE_SPACE;
        let tile = |values: Vec<f64>| Init::Values(values.repeat(copies));
        let flat = |values: &[C]| values.iter().flat_map(|z| [z.re, z.im]).collect::<Vec<_>>();
        let mut random = params.random("dt");
        let inv_dt: Vec<f64> = (0..channels)
            .map(|_| {
                let log = random.range(c.dt_min.ln(), c.dt_max.ln());
                match c.dt_transform {
                    DtTransform::Exp => log,
                    DtTransform::Softplus => {
                        let dt = log.exp();
                        dt + (-(-dt).exp_m1()).ln()
                    }
                }
            })
            .collect();
        let a_real = lambda.iter().map(|l| (-l.re).max(1e-4).ln()).collect();
        let a_imag = lambda.iter().map(|l| (-l.im).max(1e-4)).collect();
        let heads = if c.bidirectional { 2 } else { 1 };
        let rank = p.len();
        let get = |name: &str, shape: &[usize], init: Init| kernel.get_in(name, shape, init, slow);
        let inv_dt = get("inv_dt", &[channels, 1], Init::Values(inv_dt))?;
        let a_real = get("A_real", &[copies, n], tile(a_real))?;
        let a_imag = get("A_imag", &[copies, n], tile(a_imag))?;
        let b = get("B", &[1, copies, n, 2], tile(flat(&b)))?;
        let p = match c.mode {
            S4Mode::Diag => None,
            S4Mode::Dplr => {
                let values = p.iter().flat_map(|p| flat(p).repeat(copies)).collect();
                Some(get("P", &[rank, copies, n, 2], Init::Values(values))?)
            }
        };
        let index: Vec<u32> = (0..channels).map(|h| (h % copies) as u32).collect();
        let mut random = params.random("C");
        let half = 0.5f64.sqrt();
        let drawn: Vec<f64> = (0..heads * channels * n * 2)
            .map(|_| half * random.normal())
            .collect();
        let shape = [heads, channels, n, 2];
        let l_kernel = match kernel.constant("l_kernel") {
            Some(length) => {
                let length = length
                    .to_dtype(DType::F64)?
                    .flatten_all()?
                    .to_vec1::<f64>()?;
                length.first().map_or(c.l_max, |&l| l as usize)
            }
            None => c.l_max,
        };
        let mut layer = S4 {
            config: c.clone(),
            channels,
            copies: Tensor::new(index, params.device())?,
            l_kernel: l_kernel.max(1),
            inv_dt,
            a_real,
            a_imag,
            b,
            p,
            c: Tensor::from_vec(drawn, &shape[..], params.device())?.to_dtype(params.dtype())?,
            d: params
                .at("layer")
                .get("D", &[1, channels], Init::Normal { std: 1.0 })?,
            output: None,
        };
        // What is trained and stored is C~.
        let values = if kernel.given("C") || c.mode == S4Mode::Diag {
            layer.c.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?
        } else {
            layer.transformed(false)?
        };
        layer.c = kernel.get("C", &shape, Init::Values(values))?;
        if c.glu {
            let limit = (channels as f64).powf(-0.5);
            let uniform = || Init::Uniform {
                low: -limit,
                high: limit,
            };
            let out = params.at("output_linear").at(0);
            layer.output = Some((
                out.get("weight", &[2 * channels, channels], uniform())?,
                out.get("bias", &[2 * channels], uniform())?,
            ));
        }
        Ok(layer)
    }

    /// dt [channels], A [channels, n, 2], B [channels, n, 2], P [rank, channels, n, 2], tracked.
    fn system(&self) -> Result<(Tensor, Tensor, Tensor, Option<Tensor>)> {
        let dt = match self.config.dt_transform {
            DtTransform::Exp => self.inv_dt.exp()?,
            DtTransform::Softplus => softplus(&self.inv_dt)?,
        };
        let a = Tensor::stack(&[self.a_real.exp()?.neg()?, self.a_imag.neg()?], 2)?;
        let per_channel = |t: &Tensor, dim: usize| t.index_select(&self.copies, dim);
        Ok((
            dt.squeeze(1)?,
            per_channel(&a, 0)?,
            per_channel(&self.b.squeeze(0)?, 0)?,
            self.p.as_ref().map(|p| per_channel(p, 1)).transpose()?,
        ))
    }

    /// The convolution kernels: [1 or 2, channels, length].
    pub fn kernel(&self, length: usize) -> Result<Tensor> {
        let (dt, a, b, p) = self.system()?;
        let Some(p) = p else {
            let method = if self.config.bilinear {
                Discretisation::Bilinear
            } else {
                Discretisation::Zoh
            };
            return diagonal_kernel(&dt, &a, &b, &self.c, length, method);
        };
        if length <= self.l_kernel {
            return dplr_kernel(&dt, &a, &b, &p, &self.c, self.l_kernel, length);
        }
        if self.config.bidirectional {
            bail!(
                "s4: found length {length}, expected at most l_max, {}, when reading both ways",
                self.l_kernel
            );
        }
        // Past the trained length: the impulse response, step by step, without gradients.
        let plan = self.plan()?;
        let mut values = Vec::with_capacity(self.channels * length);
        for channel in &plan.0 {
            let mut x = vec![C::ZERO; channel.lambda.len()];
            for t in 0..length {
                values.push(channel.step(&mut x, if t == 0 { 1.0 } else { 0.0 }));
            }
        }
        Tensor::from_vec(values, (1, self.channels, length), self.c.device())?
            .to_dtype(self.c.dtype())
    }

    /// C~ from C, or back: [heads channels n 2] values in the order of `c`.
    fn transformed(&self, back: bool) -> Result<Vec<f64>> {
        let (dt, a, b, p) = self.system()?;
        let p = match p {
            Some(p) => p,
            None => return self.c.flatten_all()?.to_dtype(DType::F64)?.to_vec1(),
        };
        let (dt, a, b, p, c) = (
            reals(&dt)?,
            complexes(&a)?,
            complexes(&b)?,
            complexes(&p)?,
            complexes(&self.c)?,
        );
        let n = self.config.d_state / 2;
        let h = self.channels;
        let mut out = vec![C::ZERO; c.len()];
        for channel in 0..h {
            let rows = |x: &[C], row: usize| x[row * n..(row + 1) * n].to_vec();
            let p: Vec<Vec<C>> = (0..p.len() / (h * n))
                .map(|r| rows(&p, r * h + channel))
                .collect();
            let (a_bar, _) =
                hippo::discretise(dt[channel], &rows(&a, channel), &rows(&b, channel), &p);
            for head in 0..c.len() / (h * n) {
                let row = head * h + channel;
                let new = hippo::transform_c(&a_bar, self.l_kernel, &rows(&c, row), back);
                out[row * n..(row + 1) * n].copy_from_slice(&new);
            }
        }
        Ok(out.iter().flat_map(|z| [z.re, z.im]).collect())
    }

    fn plan(&self) -> Result<Plan> {
        let (dt, a, b, p) = self.system()?;
        let (dt, a, b) = (reals(&dt)?, complexes(&a)?, complexes(&b)?);
        let p = p.as_ref().map(complexes).transpose()?;
        let c: Vec<C> = self
            .transformed(true)?
            .chunks(2)
            .map(|z| C::new(z[0], z[1]))
            .collect();
        let (n, h) = (self.config.d_state / 2, self.channels);
        let channels = (0..h).map(|channel| {
            let row = |x: &[C], row: usize| x[row * n..(row + 1) * n].to_vec();
            let (lambda, b, c) = (row(&a, channel), row(&b, channel), row(&c, channel));
            let dt = dt[channel];
            let Some(p) = &p else {
                let (a_bar, b_bar) = lambda
                    .iter()
                    .zip(&b)
                    .map(|(&a, b)| {
                        let x = a * dt;
                        if self.config.bilinear {
                            let inverse = (C::ONE - x / 2.0).inv();
                            ((C::ONE + x / 2.0) * inverse, b * inverse * dt)
                        } else {
                            (x.exp(), b * expm1(x) / a)
                        }
                    })
                    .unzip();
                return Channel {
                    lambda: a_bar,
                    b: b_bar,
                    c,
                    low_rank: None,
                };
            };
            let p: Vec<Vec<C>> = (0..p.len() / (h * n))
                .map(|r| row(p, r * h + channel))
                .collect();
            let dg: Vec<C> = lambda
                .iter()
                .map(|l| (C::from(2.0 / dt) - l).inv())
                .collect();
            let q_dg: hippo::Matrix = p
                .iter()
                .map(|p| p.iter().zip(&dg).map(|(p, d)| p.conj() * d).collect())
                .collect();
            let small: hippo::Matrix = (0..p.len())
                .map(|i| {
                    (0..p.len())
                        .map(|j| {
                            let dot: f64 = q_dg[i].iter().zip(&p[j]).map(|(q, p)| (q * p).re).sum();
                            C::from(2.0 * dot + if i == j { 1.0 } else { 0.0 })
                        })
                        .collect()
                })
                .collect();
            let r = hippo::solve(&small, &q_dg);
            Channel {
                lambda,
                b,
                c,
                low_rank: Some(LowRank { dt, p, dg, r }),
            }
        });
        Ok(Plan(channels.collect()))
    }

    /// Activation and projection: y [batch, length, channels] to the same.
    fn finish(&self, y: &Tensor) -> Result<Tensor> {
        let Some((weight, bias)) = &self.output else {
            return Ok(y.clone());
        };
        let both = linear(&y.gelu_erf()?, weight, Some(bias))?;
        let (a, gate) = (
            both.narrow(2, 0, self.channels)?,
            both.narrow(2, self.channels, self.channels)?,
        );
        // sigmoid(x) = 1 / (1 + e^-x)
        a / (gate.neg()?.exp()? + 1.0)?
    }
}

fn reals(x: &Tensor) -> Result<Vec<f64>> {
    x.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}

fn complexes(x: &Tensor) -> Result<Vec<C>> {
    Ok(reals(x)?.chunks(2).map(|z| C::new(z[0], z[1])).collect())
}

/// Λ, B and P (none for `diag`), one of each conjugate pair.
type Start = (Vec<C>, Vec<C>, Vec<Vec<C>>);

/// The system at the start.
fn start(config: &S4Config, params: &Params<'_>) -> Result<Start> {
    use std::f64::consts::PI;
    let (n, half) = (config.d_state, config.d_state / 2);
    let clamp = |b: Vec<C>| {
        b.iter()
            .map(|b| C::new(b.re, b.im.clamp(-2.0, 2.0)))
            .collect()
    };
    if config.mode == S4Mode::Dplr {
        let nplr = match config.init {
            S4Init::Legs => hippo::nplr_legs(n, config.rank.max(1)),
            S4Init::Legt => hippo::nplr_legt(n, config.rank.max(2)),
            other => bail!("s4: found init {other:?} with mode dplr, expected legs or legt"),
        };
        return Ok((nplr.lambda, clamp(nplr.b), nplr.p));
    }
    let mut random = params.random("frequencies");
    let frequencies: Vec<f64> = (0..half)
        .map(|k| k as f64)
        .map(|k| match config.init {
            S4Init::Lin => PI * k,
            S4Init::Inv => n as f64 / PI * (n as f64 / (2.0 * k + 1.0) - 1.0),
            S4Init::Quad => (1.0 + 2.0 * k).powi(2) / PI,
            S4Init::Random => random.normal().abs(),
            _ => 0.0,
        })
        .collect();
    let ones = vec![C::ONE; half];
    Ok(match config.init {
        S4Init::Legs => {
            let nplr = hippo::nplr_legs(n, 1);
            (nplr.lambda, clamp(nplr.b), Vec::new())
        }
        S4Init::Legt => bail!("s4: found init legt with mode diag, expected mode dplr"),
        S4Init::Real => {
            let lambda = (0..half).map(|k| C::from(-(k as f64 + 1.0))).collect();
            (lambda, ones, Vec::new())
        }
        _ => {
            let lambda = frequencies.iter().map(|f| C::new(-0.5, -f)).collect();
            (lambda, ones, Vec::new())
        }
    })
}

impl SequenceMixer for S4 {
    fn spec(&self) -> MixerSpec {
        MixerSpec {
            name: "s4",
            causal: !self.config.bidirectional,
            state: if self.config.bidirectional {
                StateKind::None
            } else {
                StateKind::Fixed
            },
            state_gradient: Some(
                "the response to a carried state is made step by step, without a graph",
            ),
        }
    }

    fn forward(
        &self,
        x: &Tensor,
        state: Option<&MixerState>,
    ) -> Result<(Tensor, Option<MixerState>)> {
        let (batch, length, channels) = x.dims3()?;
        if channels != self.channels {
            bail!("s4: found {channels} channels, expected {}", self.channels);
        }
        if length == 0 {
            return Ok((x.clone(), state.cloned()));
        }
        // The recurrence serves single steps and carries states; the convolution serves learning.
        let skip = x.broadcast_mul(&self.d.unsqueeze(0)?)?;
        let Some(state) = state else {
            let kernel = self.kernel(length)?;
            let u = x.transpose(1, 2)?.contiguous()?; // [batch, channels, length]
            let forward = kernel.narrow(0, 0, 1)?.squeeze(0)?;
            let reverse = if self.config.bidirectional {
                Some(kernel.narrow(0, 1, 1)?.squeeze(0)?)
            } else {
                None
            };
            let y = fft_conv(&u, &forward, reverse.as_ref())?.transpose(1, 2)?;
            return Ok((self.finish(&(y + skip)?)?, None));
        };
        let plan = match state
            .plan
            .as_ref()
            .and_then(|plan| plan.downcast_ref::<Plan>())
        {
            Some(plan) => plan,
            None => bail!("s4: the state is not one that init_state of an S4 layer gave"),
        };
        let n = self.config.d_state / 2;
        let mut states = complexes(state.get("state")?)?; // [batch, channels, n]
        let u = reals(x)?;
        let mut y = vec![0f64; u.len()];
        for b in 0..batch {
            for (h, channel) in plan.0.iter().enumerate() {
                let x = &mut states[(b * channels + h) * n..][..n];
                for t in 0..length {
                    let at = (b * length + t) * channels + h;
                    y[at] = channel.step(x, u[at]);
                }
            }
        }
        let stepped = Tensor::from_vec(y, x.shape(), x.device())?.to_dtype(x.dtype())?;
        let values: Vec<f64> = states.iter().flat_map(|z| [z.re, z.im]).collect();
        // The state stays f64: it is small, and rounding it to f32 would cost accuracy over long sequences.
        let next = Tensor::from_vec(values, (batch, channels, n, 2), x.device())?;
        let y = if x.track_op() {
            bail!("s4: gradients do not pass a carried state; detach the input or give no state")
        } else {
            (stepped + skip)?
        };
        Ok((
            self.finish(&y)?,
            Some(MixerState {
                tensors: [("state".to_string(), next)].into(),
                position: state.position + length,
                plan: state.plan.clone(),
            }),
        ))
    }

    fn init_state(&self, batch: usize) -> Result<MixerState> {
        if self.config.bidirectional {
            bail!("an S4 layer that reads both ways has no step form");
        }
        let shape = (batch, self.channels, self.config.d_state / 2, 2);
        let zeros = Tensor::zeros(shape, DType::F64, self.c.device())?;
        let plan: Arc<dyn Any + Send + Sync> = Arc::new(self.plan()?);
        Ok(MixerState {
            tensors: [("state".to_string(), zeros)].into(),
            position: 0,
            plan: Some(plan),
        })
    }
}
