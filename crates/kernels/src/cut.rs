//! A tensor cut into parts along its last axis, whose gradients are put together once: the graph's own cuts give each part a
//! gradient as large as the whole, and add them all.

use crate::autograd::on_cpu;
use crate::composed::{number, on_gpu};
use crate::dense::uninit;
use crate::elementwise::split_rows;
use crate::pool::SharedMut;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, D, DType, Device, Layout, Result, Shape, Tensor, WithDType,
    bail,
};
use std::sync::{Arc, Mutex};

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
    let gradients: Arc<Gradients> = Arc::new(Mutex::new(vec![None; widths.len()]));
    // One number stands between the whole and its parts: its backward pass comes after all of theirs.
    let hub = x.apply_op1_arc(Arc::new(Box::new(Hub {
        widths: widths.to_vec(),
        gradients: gradients.clone(),
    })))?;
    let whole = x.detach();
    places
        .enumerate()
        .map(|(index, (first, width))| {
            let part = Part {
                whole: whole.clone(),
                first,
                width,
                index,
                gradients: gradients.clone(),
            };
            hub.apply_op1_arc(Arc::new(Box::new(part)))
        })
        .collect()
}

/// Gradients of the parts, from their backward passes to that of the whole.
type Gradients = Mutex<Vec<Option<Tensor>>>;

struct Hub {
    widths: Vec<usize>,
    gradients: Arc<Gradients>,
}

impl Hub {
    fn joined<T: WithDType>(&self, whole: &Tensor, parts: &[Option<Tensor>]) -> Result<Tensor> {
        let width: usize = self.widths.iter().sum();
        let rows = whole.elem_count() / width.max(1);
        let mut out: Vec<T> = uninit(rows * width);
        let parts = parts
            .iter()
            .map(|part| part.as_ref().map(Tensor::contiguous));
        let parts = parts.map(Option::transpose).collect::<Result<Vec<_>>>()?;
        let held: Vec<_> = parts
            .iter()
            .map(|part| part.as_ref().map(Tensor::storage_and_layout))
            .collect();
        let slices = held.iter().map(|held| match held {
            Some((storage, layout)) => on_cpu::<T>("cut", storage, layout).map(Some),
            None => Ok(None),
        });
        let slices = slices.collect::<Result<Vec<_>>>()?;
        let shared = SharedMut::new(&mut out);
        split_rows(rows, width, |first, rows| {
            for row in first..first + rows {
                let mut at = row * width;
                for (part, &width) in slices.iter().zip(&self.widths) {
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
        Tensor::from_vec(out, whole.shape(), whole.device())
    }
}

impl Hub {
    fn composed(&self, whole: &Tensor, parts: Vec<Option<Tensor>>) -> Result<Tensor> {
        let parts = parts.into_iter().zip(&self.widths);
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
}

impl CustomOp1 for Hub {
    fn name(&self) -> &'static str {
        "cut"
    }

    fn cpu_fwd(&self, s: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        number(s)
    }

    fn cuda_fwd(&self, s: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        number(s)
    }

    fn bwd(&self, whole: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        let none = vec![None; self.widths.len()];
        let parts = std::mem::replace(
            &mut *self.gradients.lock().unwrap_or_else(|e| e.into_inner()),
            none,
        );
        let joined = match (whole.device(), whole.dtype()) {
            (Device::Cpu, DType::F64) => self.joined::<f64>(whole, &parts),
            (Device::Cpu, DType::F32) => self.joined::<f32>(whole, &parts),
            _ => self.composed(whole, parts),
        };
        joined.map(Some)
    }
}

/// Columns `first..first + width` of `whole`.
struct Part {
    whole: Tensor,
    first: usize,
    width: usize,
    index: usize,
    gradients: Arc<Gradients>,
}

impl Part {
    fn copied<T: WithDType>(&self) -> Result<CpuStorage> {
        let (storage, layout) = self.whole.storage_and_layout();
        let x = on_cpu::<T>("cut", &storage, layout)?;
        let (all, width) = (self.whole.dim(D::Minus1)?, self.width);
        let rows = x.len() / all.max(1);
        let mut out: Vec<T> = uninit(rows * width);
        let shared = SharedMut::new(&mut out);
        split_rows(rows, width, |first, rows| {
            for row in first..first + rows {
                // SAFETY: pieces are disjoint rows.
                let out = unsafe { shared.slice(row * width, width) };
                out.copy_from_slice(&x[row * all + self.first..][..width]);
            }
        });
        Ok(T::to_cpu_storage_owned(out))
    }
}

impl CustomOp1 for Part {
    fn name(&self) -> &'static str {
        "part"
    }

    fn cpu_fwd(&self, s: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut shape = self.whole.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = self.width;
        }
        let out = match s {
            CpuStorage::F64(_) => self.copied::<f64>()?,
            CpuStorage::F32(_) => self.copied::<f32>()?,
            CpuStorage::BF16(_) => self.copied::<half::bf16>()?,
            CpuStorage::F16(_) => self.copied::<half::f16>()?,
            _ => bail!("cut: found {:?}, expected floats", self.whole.dtype()),
        };
        Ok((out, Shape::from(shape)))
    }

    fn cuda_fwd(&self, s: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let part = self.whole.narrow(D::Minus1, self.first, self.width)?;
        on_gpu("cut", &part.force_contiguous()?, &[s])
    }

    fn bwd(&self, hub: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let mut gradients = self.gradients.lock().unwrap_or_else(|e| e.into_inner());
        gradients[self.index] = Some(gradient.clone());
        Ok(Some(hub.zeros_like()?))
    }
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
