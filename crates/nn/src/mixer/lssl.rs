//! LSSL: a linear state-space layer that is a recurrence, a convolution and an ODE at once, its state matrix trained inside
//! a structured family that holds the HiPPO memories (paper 26). For time series that change their sampling rate.
//!
//! A = -diag(pl) (T^-1 + diag(c)) diag(pr), B = pl b, T tridiagonal: 7 n numbers, products and solves in O(n).

use super::modes::{Affine, convolve};
use super::{MixerSpec, MixerState, SequenceMixer, StateKind, hippo};
use crate::params::{Init, ParamGroup, Params};
use candle_core::{DType, Result, Tensor, bail};
use longspan_kernels::tridiag::{krylov, tridiag_multiply, tridiag_solve};
use serde::{Deserialize, Serialize};
use std::sync::Mutex;

/// Start of A and B.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Measure {
    /// Scaled Legendre.
    Legs,
    /// Translated Legendre, in the structured family's time (twice as fast as the dense matrix).
    Legt,
    /// Translated Laguerre.
    Lagt,
    /// Chebyshev.
    Chebyshev,
    /// Dense, normal over n, never trained: the paper's control outside the family.
    Random,
}

/// Hyper-parameters of [`Lssl`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LsslConfig {
    /// State size N.
    pub order: usize,
    /// Start of A and B.
    pub measure: Measure,
    /// 0: A, B and dt stay (LSSL-f); 1: trained, one A for all features; 2: one A per feature.
    pub learn: u8,
    /// Outputs M per feature.
    pub channels: usize,
    /// Smallest initial step.
    pub dt_min: f64,
    /// Largest initial step.
    pub dt_max: f64,
    /// Of the generalised bilinear transform: 0 Euler, 1/2 bilinear, 1 backward Euler.
    pub alpha: f64,
    /// Zero-order hold instead; `learn` 0 only.
    pub zoh: bool,
    /// Steps are multiplied by this: sequences sampled so many times more coarsely than in training.
    pub rate: f64,
    /// As the reference: the rate is rounded, and scales the step inside Ā alone.
    pub reference_rate_quirk: bool,
    /// GELU and a linear layer from all outputs to the width; needed when `channels` is not 1.
    pub projection: bool,
}

impl Default for LsslConfig {
    fn default() -> Self {
        LsslConfig {
            order: 64,
            measure: Measure::Legs,
            learn: 1,
            channels: 1,
            dt_min: 1e-3,
            dt_max: 1e-1,
            alpha: 0.5,
            zoh: false,
            rate: 1.0,
            reference_rate_quirk: false,
            projection: true,
        }
    }
}

/// Parameters of the structured family, each [1 or features, n].
pub struct Structured {
    /// Below T's diagonal; the first is unused.
    pub dl: Tensor,
    /// T's diagonal.
    pub d: Tensor,
    /// Above it; the last is unused.
    pub du: Tensor,
    /// Left scale.
    pub pl: Tensor,
    /// Right scale.
    pub pr: Tensor,
    /// Added to T^-1's diagonal.
    pub c: Tensor,
    /// B = pl b.
    pub b: Tensor,
}

/// Names of the seven vectors, in order.
pub const VECTORS: [&str; 7] = ["dl", "d", "du", "pl", "pr", "c", "b"];

/// Initial values of the seven vectors, without the noise that some measures add to d.
pub fn structured_start(measure: Measure, n: usize) -> Result<[Vec<f64>; 7]> {
    let root = |k: usize| (2.0 * k as f64 + 1.0).sqrt();
    let same = |value: f64| vec![value; n];
    let roots: Vec<f64> = (0..n).map(root).collect();
    Ok(match measure {
        Measure::Legs => {
            let c = (0..n).map(|k| -(k as f64) / (2.0 * k as f64 + 1.0));
            let c = c.collect();
            [
                same(-1.0),
                same(1.0),
                same(0.0),
                roots.clone(),
                roots,
                c,
                same(1.0),
            ]
        }
        Measure::Legt => {
            let mut d = same(0.0);
            d[0] = 0.5;
            d[n - 1] = 0.5;
            [
                same(-0.5),
                d,
                same(0.5),
                roots.clone(),
                roots,
                same(0.0),
                same(1.0),
            ]
        }
        Measure::Lagt => [
            same(-1.0),
            same(1.0),
            same(0.0),
            same(1.0),
            same(1.0),
            same(-0.5),
            same(1.0),
        ],
        Measure::Chebyshev => {
            let (mut dl, mut du) = (same(-0.5), same(0.5));
            du[0] *= std::f64::consts::SQRT_2;
            if n > 1 {
                dl[1] *= std::f64::consts::SQRT_2;
            }
            [
                dl,
                same(0.0),
                du,
                same(1.0),
                same(1.0),
                same(0.0),
                same(1.0),
            ]
        }
        Measure::Random => bail!("lssl: the random start has no structured form"),
    })
}

impl Structured {
    fn all(&self) -> [&Tensor; 7] {
        [
            &self.dl, &self.d, &self.du, &self.pl, &self.pr, &self.c, &self.b,
        ]
    }

    /// The same family for `features` systems.
    fn spread(&self, features: usize) -> Result<Structured> {
        let wide = |t: &Tensor| -> Result<Tensor> {
            let n = t.dim(1)?;
            t.broadcast_as((features, n))?.contiguous()
        };
        let [dl, d, du, pl, pr, c, b] = self.all();
        Ok(Structured {
            dl: wide(dl)?,
            d: wide(d)?,
            du: wide(du)?,
            pl: wide(pl)?,
            pr: wide(pr)?,
            c: wide(c)?,
            b: wide(b)?,
        })
    }

    /// (I + e A) v: e [systems], v [systems, columns, n].
    pub fn multiply(&self, e: &Tensor, v: &Tensor) -> Result<Tensor> {
        let w = v.broadcast_mul(&self.pr.unsqueeze(1)?)?;
        let s = tridiag_solve(&self.dl, &self.d, &self.du, &w)?;
        let inner = (s + w.broadcast_mul(&self.c.unsqueeze(1)?)?)?;
        let scale = self.pl.broadcast_mul(&e.unsqueeze(1)?)?.unsqueeze(1)?;
        v - inner.broadcast_mul(&scale)?
    }

    /// (I - e A)^-1 v: with s = T^-1 diag(pr) x this is one tridiagonal system in s.
    pub fn solve(&self, e: &Tensor, v: &Tensor) -> Result<Tensor> {
        let scaled = self.pl.broadcast_mul(&e.unsqueeze(1)?)?; // e pl
        let rows = (self.pr.recip()? + (&scaled * &self.c)?)?;
        let (dl, du) = ((&rows * &self.dl)?, (&rows * &self.du)?);
        let d = ((&rows * &self.d)? + &scaled)?;
        let s = tridiag_solve(&dl, &d, &du, v)?;
        tridiag_multiply(&self.dl, &self.d, &self.du, &s)?.broadcast_div(&self.pr.unsqueeze(1)?)
    }

    /// A itself, [systems, n, n], by one product per column.
    pub fn dense(&self) -> Result<Tensor> {
        let eye = self.eye()?;
        let one = Tensor::ones(self.d.dim(0)?, self.d.dtype(), self.d.device())?;
        (self.multiply(&one, &eye)? - eye)?
            .transpose(1, 2)?
            .contiguous()
    }

    fn eye(&self) -> Result<Tensor> {
        let (systems, n) = self.d.dims2()?;
        Tensor::eye(n, self.d.dtype(), self.d.device())?
            .unsqueeze(0)?
            .broadcast_as((systems, n, n))?
            .contiguous()
    }

    /// Ā [systems, n, n] and B̄ [systems, n] of the generalised bilinear transform; dt [systems].
    pub fn discretise(&self, dt: &Tensor, alpha: f64) -> Result<(Tensor, Tensor)> {
        let moved = self.multiply(&(dt * (1.0 - alpha))?, &self.eye()?)?;
        let implicit = (dt * alpha)?;
        // Rows of `moved` are columns of the matrix.
        let a = self
            .solve(&implicit, &moved)?
            .transpose(1, 2)?
            .contiguous()?;
        Ok((a, self.write(dt, alpha)?))
    }

    /// B̄ [systems, n].
    fn write(&self, dt: &Tensor, alpha: f64) -> Result<Tensor> {
        let b = (&self.pl * &self.b)?.unsqueeze(1)?;
        let b = self.solve(&(dt * alpha)?, &b)?.squeeze(1)?;
        b.broadcast_mul(&dt.unsqueeze(1)?)
    }
}

/// Ā and B̄ of a dense system by zero-order hold: the exponential of [[A, B], [0, 0]] dt.
pub fn zoh(a: &[Vec<f64>], b: &[f64], dt: f64) -> (Vec<Vec<f64>>, Vec<f64>) {
    let n = b.len();
    let mut m: Vec<Vec<f64>> = a
        .iter()
        .zip(b)
        .map(|(row, &b)| row.iter().chain([&b]).map(|x| x * dt).collect())
        .collect();
    m.push(vec![0.0; n + 1]);
    let size: f64 = m
        .iter()
        .map(|row| row.iter().map(|x| x.abs()).sum())
        .fold(0.0, f64::max);
    let halvings = if size > 0.5 {
        (size / 0.5).log2().ceil() as i32
    } else {
        0
    };
    let scale = 0.5f64.powi(halvings);
    m.iter_mut().flatten().for_each(|x| *x *= scale);
    let product = |a: &[Vec<f64>], b: &[Vec<f64>]| -> Vec<Vec<f64>> {
        let row = |row: &Vec<f64>| {
            let mut out = vec![0.0; n + 1];
            for (&x, b) in row.iter().zip(b) {
                out.iter_mut().zip(b).for_each(|(o, b)| *o += x * b);
            }
            out
        };
        a.iter().map(row).collect()
    };
    let eye: Vec<Vec<f64>> = (0..=n)
        .map(|i| (0..=n).map(|j| if i == j { 1.0 } else { 0.0 }).collect())
        .collect();
    let (mut sum, mut term) = (eye.clone(), eye);
    for k in 1..=16 {
        term = product(&term, &m);
        term.iter_mut().flatten().for_each(|x| *x /= f64::from(k));
        for (sum, term) in sum.iter_mut().flatten().zip(term.iter().flatten()) {
            *sum += term;
        }
    }
    for _ in 0..halvings {
        sum = product(&sum, &sum);
    }
    sum.truncate(n);
    sum.into_iter()
        .map(|mut row| {
            let b = row.pop().unwrap_or(0.0);
            (row, b)
        })
        .unzip()
}

/// Ā and B̄ of a dense system by the generalised bilinear transform, in f64: the oracle of [`Structured::discretise`].
pub fn dense_bilinear(a: &[Vec<f64>], b: &[f64], dt: f64, alpha: f64) -> (Vec<Vec<f64>>, Vec<f64>) {
    use rustfft::num_complex::Complex64 as C;
    let n = b.len();
    let unit = |i: usize, j: usize| if i == j { 1.0 } else { 0.0 };
    let matrix = |scale: f64| -> hippo::Matrix {
        (0..n)
            .map(|i| {
                (0..n)
                    .map(|j| C::from(unit(i, j) + scale * a[i][j]))
                    .collect()
            })
            .collect()
    };
    let mut right = matrix((1.0 - alpha) * dt);
    for (row, &b) in right.iter_mut().zip(b) {
        row.push(C::from(dt * b));
    }
    let solved = hippo::solve(&matrix(-alpha * dt), &right);
    solved
        .into_iter()
        .map(|row| {
            let mut row: Vec<f64> = row.iter().map(|z| z.re).collect();
            let b = row.pop().unwrap_or(0.0);
            (row, b)
        })
        .unzip()
}

enum System {
    Structured(Structured),
    /// [n, n] and [n], constant.
    Dense(Tensor, Tensor),
}

/// The layer.
pub struct Lssl {
    config: LsslConfig,
    features: usize,
    system: System,
    log_dt: Tensor,
    c: Tensor,
    d: Tensor,
    out: Option<Affine>,
    /// The Krylov block, where nothing in it is trained.
    kept: Mutex<Option<Tensor>>,
}

impl Lssl {
    /// Parameters in `params`.
    pub fn new(config: &LsslConfig, features: usize, params: &Params<'_>) -> Result<Self> {
        let c = config;
        let n = c.order;
        if n == 0 || c.channels == 0 || c.learn > 2 || !(0.0..=1.0).contains(&c.alpha) {
            bail!(
                "lssl: found order {n}, channels {}, learn {}, alpha {}, expected 1 or more, 0 to 2, and 0 to 1",
                c.channels,
                c.learn,
                c.alpha
            );
        }
        let positive = |x: f64| x.is_finite() && x > 0.0;
        if !positive(c.dt_min) || c.dt_max < c.dt_min || !positive(c.rate) {
            bail!(
                "lssl: found dt {}..{} and rate {}, expected 0 < dt_min <= dt_max and a rate above 0",
                c.dt_min,
                c.dt_max,
                c.rate
            );
        }
        if c.learn > 0 && (c.zoh || c.measure == Measure::Random) {
            bail!(
                "lssl: zero-order hold and the random start are for learn = 0, found {}",
                c.learn
            );
        }
        if !c.projection && c.channels != 1 {
            bail!(
                "lssl: found {} channels without a projection, expected 1",
                c.channels
            );
        }
        let slow = |max_lr: f64| ParamGroup {
            max_lr: Some(max_lr),
            weight_decay: Some(0.0),
            trainable: c.learn > 0,
        };
        let copies = if c.learn == 2 { features } else { 1 };
        let at = params.at("transition");
        let system = if c.measure == Measure::Random {
            let mut random = params.random("transition");
            let a = (0..n * n).map(|_| random.normal() / n as f64).collect();
            let b = (0..n).map(|_| random.normal()).collect();
            System::Dense(
                at.get_in("A", &[n, n], Init::Values(a), slow(1e-4))?,
                at.get_in("B", &[n], Init::Values(b), slow(1e-4))?,
            )
        } else {
            let start = structured_start(c.measure, n)?;
            let noise = match c.measure {
                Measure::Legt => 1e-4,
                Measure::Chebyshev => 1e-6,
                _ => 0.0,
            };
            let mut random = params.random("noise");
            let mut get = |index: usize| {
                let mut values = start[index].repeat(copies);
                if VECTORS[index] == "d" && noise > 0.0 {
                    values
                        .iter_mut()
                        .for_each(|v| *v += noise * random.normal());
                }
                at.get_in(
                    VECTORS[index],
                    &[copies, n],
                    Init::Values(values),
                    slow(1e-4),
                )
            };
            System::Structured(Structured {
                dl: get(0)?,
                d: get(1)?,
                du: get(2)?,
                pl: get(3)?,
                pr: get(4)?,
                c: get(5)?,
                b: get(6)?,
            })
        };
        let mut random = params.random("log_dt");
        let steps = (0..features)
            .map(|_| random.range(c.dt_min.ln(), c.dt_max.ln()))
            .collect();
        let m = c.channels;
        Ok(Lssl {
            features,
            system,
            log_dt: params.get_in("log_dt", &[features], Init::Values(steps), slow(1e-3))?,
            c: params.get("C", &[features, m, n], Init::Normal { std: 1.0 })?,
            d: params.get("D", &[features, m], Init::Normal { std: 1.0 })?,
            out: c
                .projection
                .then(|| Affine::new(params, "output_linear", features * m, features))
                .transpose()?,
            kept: Mutex::default(),
            config: c.clone(),
        })
    }

    /// Steps of the matrix and of the input: [features] each.
    fn steps(&self) -> Result<(Tensor, Tensor)> {
        let dt = self.log_dt.exp()?;
        if self.config.reference_rate_quirk {
            return Ok(((&dt * self.config.rate.round().max(1.0))?, dt));
        }
        let dt = (dt * self.config.rate)?;
        Ok((dt.clone(), dt))
    }

    /// Ā [features, n, n] and B̄ [features, n].
    pub fn transition(&self) -> Result<(Tensor, Tensor)> {
        let (matrix_dt, write_dt) = self.steps()?;
        let alpha = self.config.alpha;
        let (a, b) = match &self.system {
            System::Structured(system) if !self.config.zoh => {
                let system = system.spread(self.features)?;
                let (a, b) = system.discretise(&matrix_dt, alpha)?;
                let b = if self.config.reference_rate_quirk {
                    system.write(&write_dt, alpha)?
                } else {
                    b
                };
                return Ok((a, b));
            }
            System::Structured(system) => {
                let b = (&system.pl * &system.b)?.squeeze(0)?;
                (system.dense()?.squeeze(0)?, b)
            }
            System::Dense(a, b) => (a.clone(), b.clone()),
        };
        // Constants, in f64.
        let wide = |t: &Tensor| t.to_dtype(DType::F64);
        let (a, b) = (wide(&a)?.to_vec2::<f64>()?, wide(&b)?.to_vec1::<f64>()?);
        let times = |dt: &Tensor| wide(dt)?.to_vec1::<f64>();
        let (mut all_a, mut all_b) = (Vec::new(), Vec::new());
        for (matrix_dt, write_dt) in times(&matrix_dt)?.into_iter().zip(times(&write_dt)?) {
            let system = |dt: f64| {
                if self.config.zoh {
                    zoh(&a, &b, dt)
                } else {
                    dense_bilinear(&a, &b, dt, alpha)
                }
            };
            all_a.extend(system(matrix_dt).0.concat());
            all_b.extend(system(write_dt).1);
        }
        let (h, n, device) = (self.features, self.config.order, self.c.device());
        let like = |t: Tensor| t.to_dtype(self.c.dtype());
        Ok((
            like(Tensor::from_vec(all_a, (h, n, n), device)?)?,
            like(Tensor::from_vec(all_b, (h, n), device)?)?,
        ))
    }

    /// Ā^l B̄ as columns: [features, n, length].
    fn columns(&self, length: usize) -> Result<Tensor> {
        if self.config.learn > 0 {
            let (a, b) = self.transition()?;
            return krylov(&a, &b, length);
        }
        let mut kept = self
            .kept
            .lock()
            .unwrap_or_else(|poison| poison.into_inner());
        if let Some(columns) = &*kept
            && columns.dim(2)? >= length
        {
            return columns.narrow(2, 0, length);
        }
        let (a, b) = self.transition()?;
        let columns = krylov(&a.detach(), &b.detach(), length)?.detach();
        *kept = Some(columns.clone());
        Ok(columns)
    }

    /// The convolution kernels C Ā^l B̄: [features, channels, length].
    pub fn kernel(&self, length: usize) -> Result<Tensor> {
        self.c.matmul(&self.columns(length)?.contiguous()?)
    }

    /// The linear system as one convolution: u [batch, length, features] to [batch, length, features channels], D included.
    pub fn convolution(&self, u: &Tensor) -> Result<Tensor> {
        let (_, length, h) = u.dims3()?;
        let m = self.config.channels;
        let kernel = self.kernel(length)?.reshape((h * m, length))?;
        convolve(&self.repeated(u)?, &kernel)? + self.skip(u)?
    }

    /// The linear system step by step from a state [batch, features, n]: two structured products per step, no matrix.
    pub fn recurrence(&self, u: &Tensor, state: &Tensor) -> Result<(Tensor, Tensor)> {
        let (batch, length, h) = u.dims3()?;
        let m = self.config.channels;
        let mut x = state.transpose(0, 1)?.contiguous()?; // [features, batch, n]
        let alpha = self.config.alpha;
        let (matrix_dt, write_dt) = self.steps()?;
        let structured = match &self.system {
            System::Structured(system) if !self.config.zoh => Some(system.spread(self.features)?),
            _ => None,
        };
        let (dense, b) = match &structured {
            Some(system) => (None, system.write(&write_dt, alpha)?),
            None => {
                let (a, b) = self.transition()?;
                (Some(a.transpose(1, 2)?.contiguous()?), b)
            }
        };
        let (explicit, implicit) = ((&matrix_dt * (1.0 - alpha))?, (&matrix_dt * alpha)?);
        let read = self.c.transpose(1, 2)?.contiguous()?; // [features, n, channels]
        let mut outputs = Vec::with_capacity(length);
        for t in 0..length {
            let u = u.narrow(1, t, 1)?.squeeze(1)?.t()?.unsqueeze(2)?; // [features, batch, 1]
            let moved = match (&structured, &dense) {
                (Some(system), _) => system.solve(&implicit, &system.multiply(&explicit, &x)?)?,
                (None, Some(a)) => x.matmul(a)?,
                (None, None) => bail!("lssl: no transition"),
            };
            x = (moved + u.broadcast_mul(&b.unsqueeze(1)?)?)?;
            let y = x.matmul(&read)?; // [features, batch, channels]
            outputs.push(y.transpose(0, 1)?.contiguous()?.reshape((batch, h * m))?);
        }
        let y = (Tensor::stack(&outputs, 1)? + self.skip(u)?)?;
        Ok((y, x.transpose(0, 1)?.contiguous()?))
    }

    /// Every feature once per output: [batch, length, features channels].
    fn repeated(&self, u: &Tensor) -> Result<Tensor> {
        let (batch, length, h) = u.dims3()?;
        let m = self.config.channels;
        u.unsqueeze(3)?
            .broadcast_as((batch, length, h, m))?
            .contiguous()?
            .reshape((batch, length, h * m))
    }

    fn skip(&self, u: &Tensor) -> Result<Tensor> {
        self.repeated(u)?.broadcast_mul(&self.d.flatten_all()?)
    }

    /// Activation and projection.
    fn finish(&self, y: &Tensor) -> Result<Tensor> {
        match &self.out {
            Some(out) => out.apply(&y.gelu_erf()?),
            None => Ok(y.clone()),
        }
    }
}

impl SequenceMixer for Lssl {
    fn spec(&self) -> MixerSpec {
        MixerSpec {
            name: "lssl",
            causal: true,
            state: StateKind::Fixed,
            state_gradient: None,
        }
    }

    fn forward(
        &self,
        x: &Tensor,
        state: Option<&MixerState>,
    ) -> Result<(Tensor, Option<MixerState>)> {
        let length = x.dim(1)?;
        if length == 0 {
            return Ok((x.clone(), state.cloned()));
        }
        let (y, next) = match state {
            None => (self.convolution(x)?, None),
            Some(state) => {
                let (y, last) = self.recurrence(x, state.get("state")?)?;
                (y, Some(state.moved(length, [("state", last)])))
            }
        };
        Ok((self.finish(&y)?, next))
    }

    fn init_state(&self, batch: usize) -> Result<MixerState> {
        let shape = [batch, self.features, self.config.order];
        MixerState::zeros([("state", &shape[..])], &self.c)
    }
}
