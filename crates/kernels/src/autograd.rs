//! Operations with an analytic gradient, written on slices and used on candle tensors.
//!
//! A [`Kernel`] says what it computes and how gradients come back; [`apply`] makes it an operation of candle's graph
//! with any number of inputs, in f32 or f64 (f64 is for tests and for what f32 cannot hold), on the CPU.

use crate::composed::{Composed, composes, node, sigmoid};
use crate::graph::attach;
pub use crate::graph::seeded;
use candle_core::{DType, Result, Storage, Tensor, WithDType, bail};
use rustfft::num_traits::Float;
use std::any::Any;
use std::cell::RefCell;
use std::sync::{Arc, Mutex};

/// f32 and f64.
pub trait Real: WithDType + Float + rustfft::FftNum + std::iter::Sum + Default {
    /// A transform of this size, planned once per thread.
    fn fft(size: usize, inverse: bool) -> Arc<dyn rustfft::Fft<Self>>;
    /// From f64, rounded.
    fn of(value: f64) -> Self {
        <Self as WithDType>::from_f64(value)
    }
    /// To f64, exactly.
    fn wide(self) -> f64 {
        WithDType::to_f64(self)
    }
    /// 1 / (1 + e^-x), for f32 in arithmetic that the compiler vectorises, within about 1e-7.
    fn sigmoid(self) -> Self;
    /// tanh x, likewise.
    fn tanh_fast(self) -> Self;
    /// e^x, likewise; f32 saturates instead of reaching 0 or infinity.
    fn exp_fast(self) -> Self;
}

#[inline(always)]
fn sigmoid_f32(x: f32) -> f32 {
    1.0 / (1.0 + crate::elementwise::exp(-x))
}

#[inline(always)]
fn tanh_f32(x: f32) -> f32 {
    // Near 0 the difference from 1 would lose digits.
    let s = x * x;
    let small =
        x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))));
    let large = 1.0 - 2.0 / (1.0 + crate::elementwise::exp(2.0 * x));
    if s < 0.0625 { small } else { large }
}

#[inline(always)]
fn sigmoid_f64(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[inline(always)]
fn tanh_f64(x: f64) -> f64 {
    x.tanh()
}

macro_rules! real {
    ($type:ty, $sigmoid:ident, $tanh:ident, $exp:path) => {
        impl Real for $type {
            #[inline(always)]
            fn sigmoid(self) -> Self {
                $sigmoid(self)
            }
            #[inline(always)]
            fn tanh_fast(self) -> Self {
                $tanh(self)
            }
            #[inline(always)]
            fn exp_fast(self) -> Self {
                $exp(self)
            }
            fn fft(size: usize, inverse: bool) -> Arc<dyn rustfft::Fft<Self>> {
                thread_local! {
                    static PLANNER: RefCell<rustfft::FftPlanner<$type>> =
                        RefCell::new(rustfft::FftPlanner::new());
                }
                PLANNER.with_borrow_mut(|planner| {
                    if inverse {
                        planner.plan_fft_inverse(size)
                    } else {
                        planner.plan_fft_forward(size)
                    }
                })
            }
        }
    };
}
real!(f32, sigmoid_f32, tanh_f32, crate::elementwise::exp);
real!(f64, sigmoid_f64, tanh_f64, f64::exp);

/// A function of several arrays with an analytic gradient.
pub trait Kernel: Send + Sync + 'static {
    /// Named in errors.
    fn name(&self) -> &'static str;
    /// Inputs, row-major, to the output and its shape. The caller has checked that sizes agree.
    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>);
    /// The gradient of each input, given output and its gradient.
    fn backward<T: Real>(&self, inputs: &[&[T]], output: &[T], gradient: &[T]) -> Vec<Vec<T>>;
}

/// What a kernel's forward pass keeps for its backward pass, beside inputs and output.
#[derive(Default)]
pub struct Saved(Mutex<Option<Box<dyn Any + Send>>>);

impl Saved {
    /// Keeps these in place of what was kept.
    pub fn put<T: Real>(&self, arrays: Vec<Vec<T>>) {
        *self.0.lock().unwrap_or_else(|e| e.into_inner()) = Some(Box::new(arrays));
    }

    /// Hands over what was kept, in the type it was put in; none before the forward pass.
    pub fn with<T: Real, R>(&self, work: impl FnOnce(&[Vec<T>]) -> R) -> R {
        let kept = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let arrays = kept
            .as_ref()
            .and_then(|kept| kept.downcast_ref::<Vec<Vec<T>>>());
        work(arrays.map_or(&[], |arrays| &arrays[..]))
    }
}

/// Runs a kernel as one differentiable operation. All inputs have one type, f32 or f64, and lie on the CPU.
pub fn apply<K: Kernel>(kernel: K, inputs: &[&Tensor]) -> Result<Tensor> {
    let name = kernel.name();
    for input in inputs {
        if composes(input) || input.dtype() != inputs[0].dtype() {
            bail!(
                "{name}: found {:?} on {:?}, expected {:?} on the CPU: this operation has no form for other devices",
                input.dtype(),
                input.device().location(),
                inputs[0].dtype()
            );
        }
    }
    let inputs = inputs.iter().map(|input| input.contiguous());
    let inputs = inputs.collect::<Result<Vec<_>>>()?;
    match inputs.first().map(Tensor::dtype) {
        Some(DType::F32) => run::<K, f32>(kernel, &inputs),
        Some(DType::F64) => run::<K, f64>(kernel, &inputs),
        Some(other) => bail!("{name}: found {other:?}, expected f32 or f64"),
        None => bail!("{name}: no inputs"),
    }
}

fn run<K: Kernel, T: Real>(kernel: K, inputs: &[Tensor]) -> Result<Tensor> {
    let name = kernel.name();
    let plain: Vec<Tensor> = inputs.iter().map(Tensor::detach).collect();
    let (out, shape) = with_elements(name, &plain, |x| kernel.forward::<T>(x))?;
    let asked: Vec<bool> = inputs.iter().map(Tensor::track_op).collect();
    if !asked.contains(&true) {
        return Tensor::from_vec(out, shape, plain[0].device());
    }
    let output = (Storage::Cpu(T::to_cpu_storage_owned(out)), shape.into());
    let back = move |outputs: &[Tensor], gradients: &[Option<Tensor>]| {
        let Some(gradient) = &gradients[0] else {
            return Ok(vec![None; plain.len()]);
        };
        let ends = [outputs[0].clone(), gradient.contiguous()?];
        let parts = with_elements(name, &plain, |x| {
            with_elements(name, &ends, |ends| {
                kernel.backward::<T>(x, ends[0], ends[1])
            })
        })??;
        // Constants need no gradient.
        let parts = parts.into_iter().zip(&plain).zip(&asked);
        let parts = parts.map(|((part, x), asked)| match asked {
            true => Tensor::from_vec(part, x.shape(), x.device()).map(Some),
            false => Ok(None),
        });
        parts.collect()
    };
    let inputs: Vec<&Tensor> = inputs.iter().collect();
    Ok(attach(name, &inputs, vec![output], back)?.remove(0))
}

/// Hands `work` the elements of contiguous tensors on the CPU.
pub(crate) fn with_elements<T: WithDType, R>(
    name: &str,
    tensors: &[Tensor],
    work: impl FnOnce(&[&[T]]) -> R,
) -> Result<R> {
    let held: Vec<_> = tensors.iter().map(Tensor::storage_and_layout).collect();
    let mut arrays = Vec::with_capacity(held.len());
    for (storage, layout) in &held {
        let Storage::Cpu(storage) = &**storage else {
            bail!("{name}: a tensor is not on the CPU");
        };
        match layout.contiguous_offsets() {
            Some((start, end)) => arrays.push(&storage.as_slice::<T>()?[start..end]),
            None => bail!("{name}: input is not contiguous"),
        }
    }
    Ok(work(&arrays))
}

/// ln(1 + e^x) elementwise, exact for small results too: x to the same shape.
pub fn softplus(x: &Tensor) -> Result<Tensor> {
    if composes(x) {
        return node(SoftplusComposed, &[x]);
    }
    apply(
        Softplus {
            shape: x.dims().to_vec(),
        },
        &[x],
    )
}

struct SoftplusComposed;

impl Composed for SoftplusComposed {
    fn name(&self) -> &'static str {
        "softplus"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        // max(x, 0) + ln(1 + e^-|x|); where 1 + e^-|x| would round, the logarithm is e^-|x| (1 - e^-|x| / 2).
        let small = x[0].abs()?.neg()?.exp()?;
        let plain = (&small + 1.0)?.log()?;
        let series = (&small * small.affine(-0.5, 1.0)?)?;
        let tail = small.lt(1e-3)?.where_cond(&series, &plain)?;
        x[0].relu()? + tail
    }

    fn backward(&self, x: &[Tensor], _: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        Ok(vec![(gradient * sigmoid(&x[0])?)?])
    }
}

struct Softplus {
    shape: Vec<usize>,
}

impl Kernel for Softplus {
    fn name(&self) -> &'static str {
        "softplus"
    }

    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let out = inputs[0].iter().map(|&x| {
            let zero = T::zero();
            (if x > zero { x } else { zero }) + (-Float::abs(x)).exp().ln_1p()
        });
        (out.collect(), self.shape.clone())
    }

    fn backward<T: Real>(&self, inputs: &[&[T]], _: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let sigmoid = |x: T| T::one() / (T::one() + (-x).exp());
        let out = inputs[0]
            .iter()
            .zip(gradient)
            .map(|(&x, &g)| g * sigmoid(x));
        vec![out.collect()]
    }
}

/// The largest relative difference between a function's gradients and central differences, for tests: every input is
/// f64; `f` gives a tensor that is summed with fixed random weights.
pub fn gradient_error(
    inputs: &[Tensor],
    step: f64,
    f: &dyn Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<f64> {
    let vars = inputs
        .iter()
        .map(candle_core::Var::from_tensor)
        .collect::<Result<Vec<_>>>()?;
    let tracked: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let weighted = |y: &Tensor| -> Result<Tensor> {
        let weights: Vec<f64> = (0..y.elem_count())
            .map(|i| ((i * 37 + 11) % 101) as f64 / 50.0 - 1.0)
            .collect();
        (y * Tensor::from_vec(weights, y.shape(), y.device())?)?.sum_all()
    };
    let gradients = weighted(&f(&tracked)?)?.backward()?;
    let mut worst = 0f64;
    for (index, var) in vars.iter().enumerate() {
        let analytic = match gradients.get(var.as_tensor()) {
            Some(gradient) => gradient.flatten_all()?.to_vec1::<f64>()?,
            None => vec![0.0; var.elem_count()],
        };
        let values = var.as_detached_tensor().flatten_all()?.to_vec1::<f64>()?;
        let scale = analytic.iter().fold(1e-3f64, |m, g| m.max(g.abs()));
        for element in 0..values.len() {
            let at = |delta: f64| -> Result<f64> {
                let mut moved = values.clone();
                moved[element] += delta;
                let mut inputs: Vec<Tensor> = tracked.iter().map(|t| t.detach()).collect();
                inputs[index] = Tensor::from_vec(moved, var.shape(), var.device())?;
                weighted(&f(&inputs)?)?.to_scalar::<f64>()
            };
            let numeric = (at(step)? - at(-step)?) / (2.0 * step);
            let error = (numeric - analytic[element]).abs() / scale;
            worst = if error.is_nan() {
                f64::INFINITY
            } else {
                worst.max(error)
            };
        }
    }
    Ok(worst)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn fast_gates_are_near_the_exact_ones() {
        let mut x = -30f32;
        while x < 30.0 {
            let wide = f64::from(x);
            let error = (f64::from(Real::sigmoid(x)) - 1.0 / (1.0 + (-wide).exp())).abs();
            assert!(error < 2e-7, "sigmoid({x})");
            let error = (f64::from(Real::tanh_fast(x)) - wide.tanh()).abs();
            assert!(
                error < 2e-7 && error <= 1e-6 * wide.tanh().abs(),
                "tanh({x}): {error}"
            );
            x += 0.001_37;
        }
    }

    #[test]
    fn softplus_keeps_small_values_and_has_its_gradient() {
        let x = Tensor::new(&[-20.0f32, -7.0, 0.0, 3.0, 90.0], &Device::Cpu).unwrap();
        let y = softplus(&x).unwrap().to_vec1::<f32>().unwrap();
        for (x, y) in x.to_vec1::<f32>().unwrap().iter().zip(y) {
            let exact = f64::from(*x).exp().ln_1p();
            let exact = if exact.is_finite() {
                exact
            } else {
                f64::from(*x)
            };
            assert!((f64::from(y) / exact - 1.0).abs() < 1e-6, "{x}: {y}");
        }
        let x = Tensor::new(&[[-3.0f64, 0.2], [1.0, 5.0]], &Device::Cpu).unwrap();
        let error = gradient_error(&[x], 1e-5, &|x| softplus(&x[0])).unwrap();
        assert!(error < 1e-8, "{error}");
        let whole = Tensor::zeros(3, DType::U32, &Device::Cpu).unwrap();
        assert!(softplus(&whole).is_err());
        assert!(crate::composed::composing(|| softplus(&whole)).is_err());
    }
}
