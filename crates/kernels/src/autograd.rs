//! Operations with an analytic gradient, written on slices and used on candle tensors.
//!
//! A [`Kernel`] says what it computes and how gradients come back; [`apply`] makes it an operation of candle's graph
//! with any number of inputs, in f32 or f64 (f64 is for tests and for what f32 cannot hold), on the CPU.

use crate::composed::{Composed, composes, node, number, sigmoid};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape,
    Storage, Tensor, WithDType, bail,
};
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
///
/// Candle's graph knows operations of up to three tensors: of four inputs and more the first two are tensors of the graph's
/// operation, and the third is a number that carries the gradients of the others ([`Carrier`]).
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
    let mut op = Op {
        kernel,
        carried: Vec::new(),
        gradients: Arc::default(),
    };
    match &inputs[..] {
        [] => bail!("{name}: no inputs"),
        [a] => a.apply_op1_arc(Arc::new(Box::new(op))),
        [a, b] => a.apply_op2_arc(b, Arc::new(Box::new(op))),
        [a, b, c] => a.apply_op3_arc(b, c, Arc::new(Box::new(op))),
        [a, b, rest @ ..] => {
            op.carried = rest.iter().map(|t| (t.detach(), t.track_op())).collect();
            let carrier = carry(rest, &op.gradients)?;
            a.apply_op3_arc(b, &carrier, Arc::new(Box::new(op)))
        }
    }
}

struct Op<K> {
    kernel: K,
    /// The third input and further ones, if there are more than three, and whether their gradients are asked.
    carried: Vec<(Tensor, bool)>,
    /// Their gradients, from the backward pass of this operation to those of its carriers.
    gradients: Arc<Gradients>,
}

/// Gradients on their way, by input.
pub(crate) type Gradients = Mutex<Vec<Option<Tensor>>>;

/// A number that depends on up to three tensors in the graph alone. Its backward pass comes after that of the operation it
/// is an input of, which has left the tensors' gradients.
struct Carrier {
    gradients: Arc<Gradients>,
    /// Which of the gradients are those of its tensors.
    places: std::ops::Range<usize>,
}

/// One number that stands for all these tensors.
pub(crate) fn carry(tensors: &[Tensor], gradients: &Arc<Gradients>) -> Result<Tensor> {
    let mut carriers = Vec::new();
    for (at, tensors) in tensors.chunks(3).enumerate() {
        let first = 3 * at;
        let carrier = Carrier {
            gradients: gradients.clone(),
            places: first..first + tensors.len(),
        };
        carriers.push(match tensors {
            [a] => a.apply_op1_arc(Arc::new(Box::new(carrier)))?,
            [a, b] => a.apply_op2_arc(b, Arc::new(Box::new(carrier)))?,
            [a, b, c] => a.apply_op3_arc(b, c, Arc::new(Box::new(carrier)))?,
            _ => bail!("carry: found {} tensors, expected 1 to 3", tensors.len()),
        });
    }
    let mut carriers = carriers.into_iter();
    let first = carriers.next();
    let first = first.ok_or_else(|| candle_core::Error::msg("carry: no tensors"))?;
    carriers.try_fold(first, |sum, carrier| sum + carrier)
}

impl Carrier {
    fn take(&self) -> impl Iterator<Item = Option<Tensor>> {
        let mut gradients = self.gradients.lock().unwrap_or_else(|e| e.into_inner());
        let taken = gradients[self.places.clone()].iter_mut().map(Option::take);
        taken.collect::<Vec<_>>().into_iter()
    }
}

impl CustomOp1 for Carrier {
    fn name(&self) -> &'static str {
        "carrier"
    }

    fn cpu_fwd(&self, s: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        number(s)
    }

    fn cuda_fwd(&self, s: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        number(s)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.take().next().flatten())
    }
}

impl CustomOp2 for Carrier {
    fn name(&self) -> &'static str {
        "carrier"
    }

    fn cpu_fwd(
        &self,
        s: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        number(s)
    }

    fn cuda_fwd(
        &self,
        s: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        number(s)
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut parts = self.take();
        let mut next = || parts.next().flatten();
        Ok((next(), next()))
    }
}

impl CustomOp3 for Carrier {
    fn name(&self) -> &'static str {
        "carrier"
    }

    fn cpu_fwd(
        &self,
        s: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        number(s)
    }

    fn cuda_fwd(
        &self,
        s: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        number(s)
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut parts = self.take();
        let mut next = || parts.next().flatten();
        Ok((next(), next(), next()))
    }
}

/// A contiguous tensor's elements in place.
fn read<'a, T: WithDType>(name: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let values = storage.as_slice::<T>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => bail!("{name}: input is not contiguous"),
    }
}

/// [`read`] of a tensor that may lie elsewhere.
pub(crate) fn on_cpu<'a, T: WithDType>(
    name: &str,
    storage: &'a Storage,
    layout: &Layout,
) -> Result<&'a [T]> {
    match storage {
        Storage::Cpu(storage) => read(name, storage, layout),
        _ => bail!("{name}: a tensor is not on the CPU"),
    }
}

impl<K: Kernel> Op<K> {
    /// Hands `work` the kernel's inputs, of which `arrays` are those of the graph's operation.
    fn with_inputs<T: Real, R>(
        &self,
        arrays: &[&[T]],
        work: impl FnOnce(&[&[T]]) -> R,
    ) -> Result<R> {
        let held: Vec<_> = (self.carried.iter().map(|(t, _)| t.storage_and_layout())).collect();
        // The carrier stands last.
        let own = arrays.len() - usize::from(!held.is_empty());
        let mut inputs = arrays[..own].to_vec();
        for (storage, layout) in &held {
            inputs.push(on_cpu(self.kernel.name(), storage, layout)?);
        }
        Ok(work(&inputs))
    }

    fn forward(&self, arrays: &[(&CpuStorage, &Layout)]) -> Result<(CpuStorage, Shape)> {
        fn run<K: Kernel, T: Real>(
            op: &Op<K>,
            arrays: &[(&CpuStorage, &Layout)],
        ) -> Result<(CpuStorage, Shape)> {
            let name = op.kernel.name();
            let arrays = arrays.iter().map(|(s, l)| read::<T>(name, s, l));
            let arrays = arrays.collect::<Result<Vec<_>>>()?;
            let (out, shape) = op.with_inputs(&arrays, |inputs| op.kernel.forward(inputs))?;
            Ok((T::to_cpu_storage_owned(out), Shape::from(shape)))
        }
        match arrays[0].0 {
            CpuStorage::F32(_) => run::<K, f32>(self, arrays),
            CpuStorage::F64(_) => run::<K, f64>(self, arrays),
            other => bail!(
                "{}: found {:?}, expected f32 or f64",
                self.kernel.name(),
                candle_core::backend::BackendStorage::dtype(other)
            ),
        }
    }

    fn pull_back<T: Real>(
        &self,
        args: &[&Tensor],
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<Vec<Option<Tensor>>> {
        let name = self.kernel.name();
        let grad = grad.contiguous()?;
        let tensors: Vec<&Tensor> = args.iter().copied().chain([res, &grad]).collect();
        let held: Vec<_> = tensors.iter().map(|t| t.storage_and_layout()).collect();
        let mut arrays = Vec::with_capacity(held.len());
        for (storage, layout) in &held {
            arrays.push(on_cpu::<T>(name, storage, layout)?);
        }
        let (inputs, ends) = arrays.split_at(args.len());
        let parts = self.with_inputs(inputs, |inputs| {
            self.kernel.backward(inputs, ends[0], ends[1])
        })?;
        // Constants need no gradient.
        let of = |part: Vec<T>, arg: &Tensor, asked: bool| match asked {
            true => Tensor::from_vec(part, arg.shape(), arg.device()).map(Some),
            false => Ok(None),
        };
        let mut parts = parts.into_iter();
        let own = args.len() - usize::from(!self.carried.is_empty());
        let mut gradients = args[..own]
            .iter()
            .zip(&mut parts)
            .map(|(arg, part)| of(part, arg, arg.track_op()))
            .collect::<Result<Vec<_>>>()?;
        if let Some(carrier) = args.get(own) {
            let carried = self.carried.iter().zip(parts);
            let carried = carried.map(|((input, asked), part)| of(part, input, *asked));
            let carried = carried.collect::<Result<Vec<_>>>()?;
            *self.gradients.lock().unwrap_or_else(|e| e.into_inner()) = carried;
            gradients.push(match carrier.track_op() {
                true => Some(carrier.zeros_like()?),
                false => None,
            });
        }
        Ok(gradients)
    }

    fn gradients(
        &self,
        args: &[&Tensor],
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<Vec<Option<Tensor>>> {
        match args[0].dtype() {
            DType::F64 => self.pull_back::<f64>(args, res, grad),
            _ => self.pull_back::<f32>(args, res, grad),
        }
    }
}

impl<K: Kernel> CustomOp1 for Op<K> {
    fn name(&self) -> &'static str {
        self.kernel.name()
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward(&[(s, l)])
    }

    fn bwd(&self, arg: &Tensor, res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.gradients(&[arg], res, grad)?.remove(0))
    }
}

impl<K: Kernel> CustomOp2 for Op<K> {
    fn name(&self) -> &'static str {
        self.kernel.name()
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward(&[(s1, l1), (s2, l2)])
    }

    fn bwd(
        &self,
        arg1: &Tensor,
        arg2: &Tensor,
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut parts = self.gradients(&[arg1, arg2], res, grad)?.into_iter();
        Ok((parts.next().flatten(), parts.next().flatten()))
    }
}

impl<K: Kernel> CustomOp3 for Op<K> {
    fn name(&self) -> &'static str {
        self.kernel.name()
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward(&[(s1, l1), (s2, l2), (s3, l3)])
    }

    fn bwd(
        &self,
        arg1: &Tensor,
        arg2: &Tensor,
        arg3: &Tensor,
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut parts = self.gradients(&[arg1, arg2, arg3], res, grad)?.into_iter();
        let mut next = || parts.next().flatten();
        Ok((next(), next(), next()))
    }
}

/// A number whose gradient gives `x` this gradient, of its shape: where a backward pass goes on from another graph.
pub fn seeded(x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    if x.dims() != gradient.dims() {
        bail!(
            "seeded: found a gradient {:?} of {:?}, expected the same shape",
            gradient.dims(),
            x.dims()
        );
    }
    let gradients: Arc<Gradients> = Arc::new(Mutex::new(vec![Some(gradient.detach())]));
    carry(std::slice::from_ref(x), &gradients)
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
