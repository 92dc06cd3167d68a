//! The operations a model layer is written with, on candle tensors.
//!
//! Each op is one function with two forms: a fused forward on packed low-bit weights (CPU, no
//! gradient), and a composition of candle ops that can be differentiated and runs on any device.
//! Which one runs follows from the weights, so one model definition serves reading and learning.
//! Tokens of all sequences lie flat in the first dimension: activations are [tokens, width].

use crate::composed::composes;
use crate::dense::uninit;
use crate::elementwise::{self, Gate};
use crate::learn;
use crate::linear;
use crate::matmul::{Epilogue, PackedMatrix};
use crate::mlp::{self, GatedWeights};
use candle_core::{CpuStorage, D, Device, Result, Storage, Tensor, bail};
use std::cell::RefCell;
use std::sync::Arc;

/// One projection with gradient: weight [out, in], bias [out].
#[derive(Clone, Debug)]
pub struct DensePart {
    /// [out_features, in_features]
    pub weight: Tensor,
    /// [out_features]
    pub bias: Option<Tensor>,
}

/// One or several projections of the same input, outputs side by side: [tokens, in] to
/// [tokens, out_0 + out_1 + ...].
#[derive(Clone)]
pub enum Linear {
    /// Full-precision weights on any device.
    Dense(Vec<DensePart>),
    /// Low-bit weights for the CPU kernels; `bias` is [rows].
    Packed {
        /// [out_features, in_features]
        matrix: Arc<PackedMatrix>,
        /// [out_features]
        bias: Option<Arc<Vec<f32>>>,
    },
}

impl Linear {
    /// Bytes of weights that a product reads.
    pub fn bytes(&self) -> usize {
        match self {
            Linear::Dense(parts) => parts
                .iter()
                .map(|part| part.weight.elem_count() * part.weight.dtype().size_in_bytes())
                .sum(),
            Linear::Packed { matrix, .. } => matrix.bytes(),
        }
    }

    /// x [tokens, in] to [tokens, out].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Linear::Dense(parts) => {
                let mut outputs = dense(parts, x)?;
                match outputs.len() {
                    1 => Ok(outputs.remove(0)),
                    _ => Tensor::cat(&outputs, D::Minus1),
                }
            }
            Linear::Packed { matrix, bias } => {
                let tokens = x.dim(0)?;
                let out = with_rows(x, |x| {
                    let out = uninit(tokens * matrix.rows());
                    packed(matrix, bias, x, tokens, out, false)
                })?;
                matrix_tensor(out, tokens)
            }
        }
    }
}

fn dense(parts: &[DensePart], x: &Tensor) -> Result<Vec<Tensor>> {
    let outputs = parts.iter().map(|part| {
        let (weight, bias) = (&part.weight, part.bias.as_ref());
        match learns(x, std::slice::from_ref(part)) {
            true => linear::linear(x, weight, bias),
            false => linear::linear_naive(x, weight, bias),
        }
    });
    outputs.collect()
}

/// Whether the operations with an analytic gradient serve.
fn learns(x: &Tensor, parts: &[DensePart]) -> bool {
    let same = |t: &Tensor| t.dtype() == x.dtype();
    let all = |part: &DensePart| same(&part.weight) && part.bias.as_ref().is_none_or(same);
    (x.track_op() || composes(x)) && parts.iter().all(all)
}

fn packed(
    matrix: &PackedMatrix,
    bias: &Option<Arc<Vec<f32>>>,
    x: &[f32],
    tokens: usize,
    mut out: Vec<f32>,
    accumulate: bool,
) -> Vec<f32> {
    matrix.matmul(x, tokens, &mut out, epilogue(bias, accumulate, None));
    out
}

fn epilogue(bias: &Option<Arc<Vec<f32>>>, accumulate: bool, gate: Option<Gate>) -> Epilogue<'_> {
    Epilogue {
        bias: bias.as_ref().map(|bias| bias.as_slice()),
        accumulate,
        gate,
    }
}

/// RMSNorm with its weight [width] (Gemma's `1 + w` is folded in when the weights are loaded).
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: Tensor,
    /// The same values for the CPU kernels; absent while the weight is being trained.
    host: Option<Arc<Vec<f32>>>,
    eps: f64,
}

impl RmsNorm {
    /// weight: [width].
    pub fn new(weight: Tensor, eps: f64) -> Result<Self> {
        let host = if weight.device().is_cpu() && !weight.track_op() {
            Some(Arc::new(weight.to_vec1::<f32>()?))
        } else {
            None
        };
        Ok(RmsNorm { weight, host, eps })
    }

    /// x [.., width] to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if let (Some(weight), true) = (&self.host, is_plain(x)) {
            let out = with_rows(x, |x| {
                let mut out = uninit(x.len());
                elementwise::rms_norm(x, weight, self.eps as f32, &mut out);
                out
            })?;
            return Tensor::from_vec(out, x.shape(), &Device::Cpu);
        }
        learn::rms_norm(x, &self.weight.to_dtype(x.dtype())?, self.eps)
    }
}

/// LayerNorm with its weight and bias [width].
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    /// The same values for the CPU kernels; absent while they are being trained.
    host: Option<Arc<(Vec<f32>, Vec<f32>)>>,
    eps: f64,
}

impl LayerNorm {
    /// weight, bias: [width].
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Result<Self> {
        let host = if is_plain(&weight) && is_plain(&bias) {
            Some(Arc::new((weight.to_vec1::<f32>()?, bias.to_vec1::<f32>()?)))
        } else {
            None
        };
        Ok(LayerNorm {
            weight,
            bias,
            host,
            eps,
        })
    }

    /// x [.., width] to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if let (Some(host), true) = (&self.host, is_plain(x)) {
            let out = with_rows(x, |x| {
                let mut out = uninit(x.len());
                elementwise::layer_norm(x, &host.0, &host.1, self.eps as f32, &mut out);
                out
            })?;
            return Tensor::from_vec(out, x.shape(), &Device::Cpu);
        }
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        centred
            .broadcast_div(&(variance + self.eps)?.sqrt()?)?
            .broadcast_mul(&self.weight)?
            .broadcast_add(&self.bias)
    }
}

/// GELU in its exact form: x [tokens, width] to the same shape.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if !is_plain(x) {
        return x.gelu_erf();
    }
    let width = x.dim(D::Minus1)?;
    let out = with_rows(x, |x| {
        let mut out = x.to_vec();
        elementwise::gelu(&mut out, width);
        out
    })?;
    Tensor::from_vec(out, x.shape(), &Device::Cpu)
}

/// Token embeddings [vocab, width].
#[derive(Clone)]
pub enum Embedding {
    /// Full precision, differentiable.
    Dense(Tensor),
    /// Rows are unpacked on the fly.
    Packed(Arc<PackedMatrix>),
}

impl Embedding {
    /// ids (checked by the caller to be below the vocabulary size) to [tokens, width].
    pub fn forward(&self, ids: &[u32]) -> Result<Tensor> {
        match self {
            Embedding::Dense(weight) => crate::composed::rows(weight, ids),
            Embedding::Packed(matrix) => {
                let width = matrix.cols();
                let mut out = uninit(ids.len() * width);
                for (&id, row) in ids.iter().zip(out.chunks_exact_mut(width)) {
                    matrix.dequantize_row(id as usize, row);
                }
                matrix_tensor(out, ids.len())
            }
        }
    }
}

/// `linear(norm(x))`: x [tokens, width] to [tokens, out].
pub fn norm_linear(x: &Tensor, norm: &RmsNorm, linear: &Linear) -> Result<Tensor> {
    let (Linear::Packed { matrix, bias }, Some(weight), true) = (linear, &norm.host, is_plain(x))
    else {
        return linear.forward(&norm.forward(x)?);
    };
    let tokens = x.dim(0)?;
    let out = with_rows(x, |x| {
        scratch(|normed| {
            normed.resize(x.len(), 0.0);
            elementwise::rms_norm(x, weight, norm.eps as f32, normed);
            let out = uninit(tokens * matrix.rows());
            packed(matrix, bias, normed, tokens, out, false)
        })
    })?;
    matrix_tensor(out, tokens)
}

/// `linear(norm(x))` cut into outputs of these widths: x [tokens, width] to [tokens, width_i] each. Projections that are
/// separate matrices are never put together, so that no gradient has to be taken apart.
pub fn norm_linears(
    x: &Tensor,
    norm: &RmsNorm,
    linear: &Linear,
    widths: &[usize],
) -> Result<Vec<Tensor>> {
    if let Linear::Dense(parts) = linear
        && parts.len() == widths.len()
    {
        return dense(parts, &norm.forward(x)?);
    }
    let all = norm_linear(x, norm, linear)?;
    let mut start = 0;
    let outputs = widths.iter().map(|&width| {
        start += width;
        all.narrow(1, start - width, width)
    });
    outputs.collect()
}

/// `residual + post_norm(linear(x))`, post_norm optional (Gemma's sandwich norm).
pub fn linear_residual(
    x: &Tensor,
    linear: &Linear,
    post_norm: Option<&RmsNorm>,
    residual: &Tensor,
) -> Result<Tensor> {
    match (linear, post_norm) {
        (Linear::Packed { matrix, bias }, None) if is_plain(x) && is_plain(residual) => {
            let tokens = x.dim(0)?;
            let sum = with_rows(residual, |rows| elementwise::copy(rows, matrix.rows()))?;
            let out = with_rows(x, |x| packed(matrix, bias, x, tokens, sum, true))?;
            matrix_tensor(out, tokens)
        }
        (Linear::Dense(parts), None) if learns(x, parts) && parts.len() == 1 => {
            let part = &parts[0];
            linear::residual_linear(x, &part.weight, part.bias.as_ref(), Some(residual))
        }
        _ => {
            let y = linear.forward(x)?;
            residual
                + match post_norm {
                    Some(norm) => norm.forward(&y)?,
                    None => y,
                }
        }
    }
}

/// `x + post_norm(down(act(gate) * up))` with `[gate | up] = gate_up(norm(x))`.
pub fn gated_mlp(
    x: &Tensor,
    norm: &RmsNorm,
    gate_up: &Linear,
    gate: Gate,
    down: &Linear,
    post_norm: Option<&RmsNorm>,
) -> Result<Tensor> {
    if let (
        Linear::Packed { matrix, bias },
        Linear::Packed {
            matrix: last,
            bias: last_bias,
        },
        Some(weight),
        true,
    ) = (gate_up, down, &norm.host, is_plain(x))
    {
        let tokens = x.dim(0)?;
        let out = with_rows(x, |x| {
            scratch(|normed| {
                normed.resize(x.len(), 0.0);
                elementwise::rms_norm(x, weight, norm.eps as f32, normed);
                let mut out = match post_norm {
                    None => elementwise::copy(x, last.rows()),
                    Some(_) => uninit(tokens * last.rows()),
                };
                let last_how = epilogue(last_bias, post_norm.is_none(), None);
                let how = epilogue(bias, false, Some(gate));
                matrix.mlp(how, (last, last_how), normed, tokens, &mut out);
                out
            })
        })?;
        let y = matrix_tensor(out, tokens)?;
        return match post_norm {
            None => Ok(y),
            Some(norm) => x + norm.forward(&y)?,
        };
    }
    if let (Linear::Dense(pair), Linear::Dense(last), Gate::Silu, None) =
        (gate_up, down, gate, post_norm)
        && let ([first, second], [last]) = (&pair[..], &last[..])
        && learns(x, pair)
        && learns(x, std::slice::from_ref(last))
        && [first, second, last].iter().all(|part| part.bias.is_none())
        && norm.weight.dtype() == x.dtype()
    {
        let weights = GatedWeights {
            norm: &norm.weight,
            gate: &first.weight,
            up: &second.weight,
            down: &last.weight,
        };
        return mlp::gated_mlp(x, weights, norm.eps);
    }
    let width = match gate_up {
        Linear::Dense(parts) => {
            parts
                .iter()
                .map(|part| part.weight.dims()[0])
                .sum::<usize>()
                / 2
        }
        Linear::Packed { matrix, .. } => matrix.rows() / 2,
    };
    let both = norm_linears(x, norm, gate_up, &[width, width])?;
    let (g, up) = (&both[0], &both[1]); // [tokens, intermediate] each
    let hidden = match gate {
        Gate::Silu => learn::silu_gate(&g.contiguous()?, Some(&up.contiguous()?))?,
        Gate::GeluTanh => (g.gelu()? * up)?,
    };
    linear_residual(&hidden, down, post_norm, x)
}

/// True when the fused CPU forms may run: on the CPU, f32, and no gradient asked.
pub fn is_plain(x: &Tensor) -> bool {
    x.device().is_cpu() && !x.track_op() && x.dtype() == candle_core::DType::F32
}

/// Hands the elements of a contiguous f32 CPU tensor to `f` without a copy.
pub fn with_rows<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("tensor is not contiguous")
    };
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => Ok(f(&values[start..end])),
        _ => bail!(
            "expected an f32 tensor on the CPU, found {:?} on {:?}",
            x.dtype(),
            x.device()
        ),
    }
}

/// Hands the rows of a [tokens, width] f32 CPU tensor that may be a column slice of a wider one
/// to `f` as (elements from the first row on, row stride).
pub fn with_strided_rows<R>(x: &Tensor, f: impl FnOnce(&[f32], usize) -> R) -> Result<R> {
    let (storage, layout) = x.storage_and_layout();
    let (&[tokens, width], &[stride, 1]) = (layout.dims(), layout.stride()) else {
        bail!(
            "expected rows of adjacent elements, found shape {:?}, strides {:?}",
            layout.dims(),
            layout.stride()
        )
    };
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => {
            let start = layout.start_offset();
            let end = if tokens == 0 {
                start
            } else {
                start + (tokens - 1) * stride + width
            };
            Ok(f(&values[start..end], stride))
        }
        _ => bail!(
            "expected an f32 tensor on the CPU, found {:?} on {:?}",
            x.dtype(),
            x.device()
        ),
    }
}

fn matrix_tensor(values: Vec<f32>, tokens: usize) -> Result<Tensor> {
    let width = values.len() / tokens.max(1);
    Tensor::from_vec(values, (tokens, width), &Device::Cpu)
}

/// A buffer of this thread that keeps its memory from call to call.
fn scratch<R>(f: impl FnOnce(&mut Vec<f32>) -> R) -> R {
    thread_local! {
        static BUFFER: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    BUFFER.with_borrow_mut(f)
}
