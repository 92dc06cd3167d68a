//! A tensor cut into parts along its last axis, whose gradients are put together once: the graph's own cuts give each part a
//! gradient as large as the whole, and add them all.

use crate::autograd::with_elements;
use crate::composed::elements;
use crate::dense::uninit;
use crate::elementwise::split_rows;
use crate::graph::attach;
use crate::pool::SharedMut;
use candle_core::{D, DType, Device, Result, Shape, Storage, Tensor, WithDType, bail};

/// x [.., Σ widths] to [.., width] each, contiguous.
pub fn cut(x: &Tensor, widths: &[usize]) -> Result<Vec<Tensor>> {
    let width = x.dim(D::Minus1)?;
    if widths.iter().sum::<usize>() != width {
        bail!(
            "cut: found parts {widths:?} of {:?}, expected all of its last axis",
            x.dims()
        );
    }
    let places = widths.iter().scan(0, |next, &width| {
        let first = *next;
        *next += width;
        Some((first, width))
    });
    if !x.track_op() {
        return places
            .map(|(first, width)| x.narrow(D::Minus1, first, width)?.contiguous())
            .collect();
    }
    let x = x.contiguous()?;
    let whole = x.detach();
    let parts = places.map(|(first, width)| part(&whole, first, width));
    let parts = parts.collect::<Result<Vec<_>>>()?;
    let widths = widths.to_vec();
    attach("cut", &[&x], parts, move |_, gradients| {
        let joined = match (whole.device(), whole.dtype()) {
            (Device::Cpu, DType::F64) => joined::<f64>(&whole, &widths, gradients),
            (Device::Cpu, DType::F32) => joined::<f32>(&whole, &widths, gradients),
            _ => composed(&whole, &widths, gradients),
        };
        Ok(vec![Some(joined?)])
    })
}

/// Columns `first..first + width` of `whole`.
fn part(whole: &Tensor, first: usize, width: usize) -> Result<(Storage, Shape)> {
    if !whole.device().is_cpu() {
        let part = whole.narrow(D::Minus1, first, width)?.force_contiguous()?;
        return elements(&part, std::slice::from_ref(whole));
    }
    let storage = match whole.dtype() {
        DType::F64 => copied::<f64>(whole, first, width),
        DType::F32 => copied::<f32>(whole, first, width),
        DType::BF16 => copied::<half::bf16>(whole, first, width),
        DType::F16 => copied::<half::f16>(whole, first, width),
        other => bail!("cut: found {other:?}, expected floats"),
    };
    let mut shape = whole.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = width;
    }
    Ok((storage?, shape.into()))
}

fn copied<T: WithDType>(whole: &Tensor, first: usize, width: usize) -> Result<Storage> {
    let all = whole.dim(D::Minus1)?;
    let out = with_elements::<T, _>("cut", std::slice::from_ref(whole), |x| {
        let rows = x[0].len() / all.max(1);
        let mut out: Vec<T> = uninit(rows * width);
        let shared = SharedMut::new(&mut out);
        split_rows(rows, width, |from, rows| {
            for row in from..from + rows {
                // SAFETY: pieces are disjoint rows.
                let out = unsafe { shared.slice(row * width, width) };
                out.copy_from_slice(&x[0][row * all + first..][..width]);
            }
        });
        out
    });
    Ok(Storage::Cpu(T::to_cpu_storage_owned(out?)))
}

/// The gradient of the whole from those of the parts.
fn joined<T: WithDType>(
    whole: &Tensor,
    widths: &[usize],
    parts: &[Option<Tensor>],
) -> Result<Tensor> {
    let width: usize = widths.iter().sum();
    let rows = whole.elem_count() / width.max(1);
    let found = parts.iter().flatten().map(Tensor::contiguous);
    let found = found.collect::<Result<Vec<_>>>()?;
    let out = with_elements::<T, _>("cut", &found, |found| {
        let mut found = found.iter();
        let slices = parts
            .iter()
            .map(|part| part.as_ref().and_then(|_| found.next()));
        let slices: Vec<_> = slices.zip(widths).collect();
        let mut out: Vec<T> = uninit(rows * width);
        let shared = SharedMut::new(&mut out);
        split_rows(rows, width, |first, rows| {
            for row in first..first + rows {
                let mut at = row * width;
                for &(part, &width) in &slices {
                    // SAFETY: pieces are disjoint rows.
                    let out = unsafe { shared.slice(at, width) };
                    match part {
                        Some(part) => out.copy_from_slice(&part[row * width..(row + 1) * width]),
                        None => out.fill(T::zero()),
                    }
                    at += width;
                }
            }
        });
        out
    });
    Tensor::from_vec(out?, whole.shape(), whole.device())
}

/// [`joined`] where the slices are not.
fn composed(whole: &Tensor, widths: &[usize], parts: &[Option<Tensor>]) -> Result<Tensor> {
    let parts = parts.iter().zip(widths);
    let parts = parts
        .filter(|(_, width)| **width > 0)
        .map(|(part, &width)| match part {
            Some(part) => part.contiguous(),
            None => {
                let mut shape = whole.dims().to_vec();
                if let Some(last) = shape.last_mut() {
                    *last = width;
                }
                Tensor::zeros(shape, whole.dtype(), whole.device())
            }
        });
    Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, D::Minus1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::{distance, tensor};
    use candle_core::Var;

    #[test]
    fn parts_and_their_gradients_are_those_of_the_graphs_own_cuts() {
        for dtype in [DType::F32, DType::F64] {
            for widths in [vec![3, 1, 5], vec![9], vec![0, 9], vec![40_000, 7]] {
                let width = widths.iter().sum::<usize>();
                let x = tensor(&[2, 3, width], 1, -1.0, 1.0)
                    .to_dtype(dtype)
                    .unwrap();
                let x = Var::from_tensor(&x).unwrap();
                // The last part has no gradient if there are several.
                let run = |parts: Vec<Tensor>| {
                    let most = parts.len().max(2) - 1;
                    let sums = parts
                        .iter()
                        .enumerate()
                        .take(most)
                        .map(|(i, part)| (part.sqr()? * (i + 1) as f64)?.sum_all());
                    let sums = sums.collect::<Result<Vec<_>>>().unwrap();
                    let loss = Tensor::stack(&sums, 0).unwrap().sum_all().unwrap();
                    let gradient = loss.backward().unwrap().remove(x.as_tensor()).unwrap();
                    (parts, gradient)
                };
                let mut first = 0;
                let plain = widths.iter().map(|&width| {
                    first += width;
                    x.narrow(2, first - width, width)
                });
                let plain = run(plain.collect::<Result<Vec<_>>>().unwrap());
                let found = run(cut(x.as_tensor(), &widths).unwrap());
                for (a, b) in found.0.iter().zip(&plain.0) {
                    assert_eq!(a.dims(), b.dims());
                    if a.elem_count() > 0 {
                        assert_eq!(distance(a, b), 0.0, "{widths:?}");
                    }
                }
                assert_eq!(distance(&found.1, &plain.1), 0.0, "{widths:?}");
            }
        }
        let x = tensor(&[2, 9], 1, -1.0, 1.0);
        assert!(cut(&x, &[3, 5]).unwrap_err().to_string().contains("cut"));
    }
}
