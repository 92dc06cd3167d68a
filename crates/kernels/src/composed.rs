//! Operations composed of candle's, for tensors that the kernels of this crate cannot reach: those on a GPU, and those of
//! 16 bits. Each is one node of the graph with an analytic gradient, because candle's own gradients
//! of a composition cost several launches for every operation in it.

use crate::gpu;
use crate::graph::attach;
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{D, DType, Device, Layout, Result, Shape, Storage, Tensor, bail};
use std::cell::Cell;
use std::sync::Mutex;

thread_local! {
    static FORCED: Cell<bool> = const { Cell::new(false) };
}

/// Whether an operation on this tensor is composed: it lies on a GPU, or its type is a float of 16 bits.
pub fn composes(x: &Tensor) -> bool {
    !x.device().is_cpu() || matches!(x.dtype(), DType::F16 | DType::BF16) || FORCED.get()
}

/// Runs `work` with every operation of this thread composed, also on the CPU: how the compositions are tested.
pub fn composing<R>(work: impl FnOnce() -> R) -> R {
    let before = FORCED.replace(true);
    let result = work();
    FORCED.set(before);
    result
}

/// A composition with its gradient. Tensors come without a graph, contiguous.
pub trait Composed: Send + Sync + 'static {
    /// Named in errors.
    fn name(&self) -> &'static str;
    /// Inputs to the output, whose memory nothing but it and the inputs may hold.
    fn forward(&self, x: &[Tensor]) -> Result<Tensor>;
    /// The gradient of each input, given output and its gradient.
    fn backward(&self, x: &[Tensor], y: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>>;
}

/// Runs a composition as one differentiable operation.
pub fn node<C: Composed>(op: C, inputs: &[&Tensor]) -> Result<Tensor> {
    let name = op.name();
    if let Some(input) = inputs.iter().find(|input| !input.dtype().is_float()) {
        bail!("{name}: found {:?}, expected floats", input.dtype());
    }
    let plain = inputs.iter().map(|input| input.detach().contiguous());
    let plain = plain.collect::<Result<Vec<_>>>()?;
    let y = op.forward(&plain)?;
    if !inputs.iter().any(|input| input.track_op()) {
        return Ok(y);
    }
    let output = elements(&y.contiguous()?, &plain)?;
    let back = move |outputs: &[Tensor], gradients: &[Option<Tensor>]| {
        let Some(gradient) = &gradients[0] else {
            return Ok(vec![None; plain.len()]);
        };
        let parts = op.backward(&plain, &outputs[0], &gradient.contiguous()?)?;
        Ok(parts.into_iter().map(Some).collect())
    };
    Ok(attach(name, inputs, vec![output], back)?.remove(0))
}

/// The elements of a contiguous tensor that an operation has made: its own memory if it lies on a GPU and nothing else holds
/// that, else a copy.
pub(crate) fn elements(value: &Tensor, inputs: &[Tensor]) -> Result<(Storage, Shape)> {
    let shape = value.shape().clone();
    if let Some(storage) = gpu::take_over(value, inputs)? {
        return Ok((Storage::Cuda(storage), shape));
    }
    let (storage, layout) = value.storage_and_layout();
    let storage = match &*storage {
        Storage::Cpu(storage) => Storage::Cpu(whole(storage, layout)?),
        Storage::Cuda(storage) => Storage::Cuda(whole(storage, layout)?),
        Storage::Metal(_) => bail!("found a tensor on {:?}", value.device().location()),
    };
    Ok((storage, shape))
}

/// A copy of a contiguous tensor's elements alone.
fn whole<S>(storage: &S, layout: &Layout) -> Result<S>
where
    S: BackendStorage,
    S::Device: BackendDevice<Storage = S>,
{
    let device = storage.device();
    // SAFETY: all elements are written below.
    let mut out = unsafe { device.alloc_uninit(layout.shape(), storage.dtype())? };
    storage.copy_strided_src(&mut out, 0, layout)?;
    Ok(out)
}

/// Sum over all axes but the last, in the type of sums; composed it is a product with ones, since candle's own reduction over
/// leading axes reads far apart.
pub fn sum_rows(x: &Tensor) -> Result<Tensor> {
    let x = &x.contiguous()?;
    if gpu::fits(&[x]) {
        return gpu::sum_rows(x);
    }
    let x = &wide(x)?;
    let width = x.dim(D::Minus1)?;
    let rows = x.elem_count() / width.max(1);
    let x = x.reshape((rows, width))?;
    Tensor::ones((1, rows), x.dtype(), x.device())?
        .matmul(&x)?
        .squeeze(0)
}

/// Σ x² over all elements, in the type of sums: by [`sum_rows`], since candle sums in one block of a GPU.
pub fn sum_squares(x: &Tensor) -> Result<f64> {
    let squares = wide(x)?.flatten_all()?.sqr()?;
    let width = 1024;
    let rows = squares.elem_count() / width;
    let body = squares.narrow(0, 0, rows * width)?;
    let rest = squares.narrow(0, rows * width, squares.elem_count() % width)?;
    let sum = match rows {
        0 => rest.sum_all(),
        _ => Tensor::cat(&[sum_rows(&body.reshape((rows, width))?)?, rest], 0)?.sum_all(),
    };
    sum?.to_dtype(DType::F64)?.to_scalar()
}

/// The type sums are made in: f32 for the narrow types.
pub fn wide(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F32 | DType::F64 => Ok(x.clone()),
        _ => x.to_dtype(DType::F32),
    }
}

/// 1 / (1 + e^-x), which does not overflow.
pub fn sigmoid(x: &Tensor) -> Result<Tensor> {
    (x * 0.5)?.tanh()?.affine(0.5, 0.5)
}

/// Tables that cost the host more than their use costs a GPU: the last few, by what they were made for.
pub struct Kept<K, V> {
    most: usize,
    values: Mutex<Vec<(K, V)>>,
}

impl<K: PartialEq, V: Clone> Kept<K, V> {
    /// Holds `most` values.
    pub const fn new(most: usize) -> Self {
        let values = Mutex::new(Vec::new());
        Kept { most, values }
    }

    /// The value of `key`, made if it is not held. Another thread may make it at the same time.
    pub fn get(&self, key: K, make: impl FnOnce() -> Result<V>) -> Result<V> {
        let kept = || self.values.lock().unwrap_or_else(|e| e.into_inner());
        let found = kept()
            .iter()
            .find(|(k, _)| *k == key)
            .map(|kept| kept.1.clone());
        if let Some(value) = found {
            return Ok(value);
        }
        let value = make()?;
        let mut kept = kept();
        if kept.len() >= self.most {
            kept.remove(0);
        }
        kept.push((key, value.clone()));
        Ok(value)
    }
}

/// Added to scores that are not seen. Finite: 0 times it stays 0.
pub const HIDDEN: f64 = -1e30;

/// 0 where `0 <= i - j < window`, [`HIDDEN`] elsewhere, for rows i from `first` and columns j from `from`: [rows, cols], f32.
pub fn band(
    (first, rows): (usize, usize),
    (from, cols): (usize, usize),
    window: usize,
    device: &Device,
) -> Result<Tensor> {
    type Key = ([usize; 4], candle_core::DeviceLocation);
    /// Small ones are asked again by every layer.
    static SMALL: Kept<Key, Tensor> = Kept::new(8);
    let make = || banded((first, rows), (from, cols), window, device);
    if rows * cols > 1 << 22 {
        return make();
    }
    let key = [rows, cols, first.wrapping_sub(from), window];
    SMALL.get((key, device.location()), make)
}

fn banded(
    (first, rows): (usize, usize),
    (from, cols): (usize, usize),
    window: usize,
    device: &Device,
) -> Result<Tensor> {
    let line = |start: usize, count: usize| -> Vec<f32> {
        (start..start + count).map(|i| i as f32).collect()
    };
    let i = Tensor::from_vec(line(first, rows), (rows, 1), device)?;
    let j = Tensor::from_vec(line(from, cols), (1, cols), device)?;
    let ahead = j.broadcast_sub(&i)?; // [rows, cols]
    let mut hidden = ahead.gt(0f32)?.to_dtype(DType::F32)?;
    if window < first + rows {
        let behind = ahead.le(-(window as f32))?.to_dtype(DType::F32)?;
        hidden = (hidden + behind)?;
    }
    hidden * HIDDEN
}

/// Rows of `x` [rows, width] by number, repeated at will: [ids, width]. On the CPU candle's own; elsewhere candle adds
/// gradients one row after the other, and this adds them in groups.
pub fn rows(x: &Tensor, ids: &[u32]) -> Result<Tensor> {
    let (count, _) = x.dims2()?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= count) {
        bail!("rows: found row {id}, expected one below {count}");
    }
    if !composes(x) {
        return x.index_select(&Tensor::new(ids, x.device())?, 0);
    }
    node(Rows { ids: ids.to_vec() }, &[x])
}

struct Rows {
    ids: Vec<u32>,
}

/// Rows that are added at once.
const TOGETHER: usize = 32;

impl Composed for Rows {
    fn name(&self) -> &'static str {
        "rows"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        let ids = Tensor::from_slice(&self.ids, self.ids.len(), x[0].device())?;
        x[0].index_select(&ids, 0)
    }

    fn backward(&self, x: &[Tensor], _: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        let (count, width) = x[0].dims2()?;
        let device = gradient.device();
        let zero = Tensor::zeros((1, width), gradient.dtype(), device)?;
        let mut values = gradient.clone();
        // For each row of x, which rows of `values` it gets.
        let mut shares: Vec<Vec<u32>> = vec![Vec::new(); count];
        for (at, &id) in self.ids.iter().enumerate() {
            shares[id as usize].push(at as u32);
        }
        while shares.iter().any(|share| share.len() > 1) {
            let nothing = values.dim(0)? as u32;
            let (mut picked, mut groups) = (Vec::new(), 0u32);
            let most = shares.iter().map(Vec::len).max().unwrap_or(1);
            let together = TOGETHER.min(most);
            for share in &mut shares {
                let mut next = Vec::new();
                for group in share.chunks(together) {
                    picked.extend(group);
                    picked.extend(std::iter::repeat_n(nothing, together - group.len()));
                    next.push(groups);
                    groups += 1;
                }
                *share = next;
            }
            let index = Tensor::from_vec(picked, groups as usize * together, device)?;
            let all = Tensor::cat(&[&values, &zero], 0)?.index_select(&index, 0)?;
            values = all.reshape((groups as usize, together, width))?.sum(1)?;
        }
        let nothing = values.dim(0)? as u32;
        let index: Vec<u32> = shares
            .iter()
            .map(|share| share.first().copied().unwrap_or(nothing))
            .collect();
        let index = Tensor::from_vec(index, count, device)?;
        Ok(vec![
            Tensor::cat(&[&values, &zero], 0)?.index_select(&index, 0)?,
        ])
    }
}

/// x_t = a_t x_{t-1} + v_t along the second axis by doubling, in ⌈log₂ length⌉ passes over all steps: real a and v
/// [batch, length, ..] of one shape, start [batch, ..].
pub fn doubling(a: &Tensor, v: &Tensor, start: &Tensor) -> Result<Tensor> {
    let length = v.dim(1)?;
    if length == 0 {
        return Ok(v.clone());
    }
    // The start acts through the first step alone.
    let first = (v.narrow(1, 0, 1)? + (a.narrow(1, 0, 1)? * start.unsqueeze(1)?)?)?;
    let rest = length - 1;
    let mut v = match rest {
        0 => first,
        _ => Tensor::cat(&[&first, &v.narrow(1, 1, rest)?], 1)?,
    };
    let mut a = a.clone();
    let mut step = 1;
    while step < length {
        let rest = length - step;
        let late = a.narrow(1, step, rest)?;
        let joined = (v.narrow(1, step, rest)? + (&late * v.narrow(1, 0, rest)?)?)?;
        v = Tensor::cat(&[&v.narrow(1, 0, step)?, &joined], 1)?;
        if 2 * step < length {
            let joined = (&late * a.narrow(1, 0, rest)?)?;
            a = Tensor::cat(&[&a.narrow(1, 0, step)?, &joined], 1)?;
        }
        step *= 2;
    }
    Ok(v)
}
