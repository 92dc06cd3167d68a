//! Processes that train one model together: who they are, and how one tells the others something.
//!
//! Data parallelism needs no more than broadcasts: each micro-batch's gradients are told by the process that made them and
//! added by all in the order of micro-batches, so any number of processes gives the same bits.

use crate::error::Result;
use candle_core::{DType, Device, Tensor};

#[cfg(feature = "mpi")]
mod mpi;

#[cfg(feature = "mpi")]
pub use mpi::Mpi;

/// The processes of a run.
pub trait Comm: Send + Sync {
    /// Number of this process; 0 writes files and talks to people.
    fn rank(&self) -> usize;
    /// Number of processes.
    fn size(&self) -> usize;
    /// Replaces `bytes` on every process by those of process `from`. All processes must call it, in the same order.
    fn broadcast(&self, from: usize, bytes: &mut Vec<u8>) -> Result<()>;
    /// Ends all processes: the others would wait for this one for ever.
    fn abort(&self, code: i32) -> !;
}

/// One process.
pub struct Alone;

impl Comm for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn broadcast(&self, _: usize, _: &mut Vec<u8>) -> Result<()> {
        Ok(())
    }

    fn abort(&self, code: i32) -> ! {
        std::process::exit(code)
    }
}

/// What one micro-batch gave: its loss, and the gradients of all parameters, some of which may have none.
pub(crate) type Part = (f64, Vec<Option<Tensor>>);

/// A part as bytes: loss, then for each parameter a mark and its values (f32, or f64 for f64).
pub(crate) fn pack(part: &Part) -> candle_core::Result<Vec<u8>> {
    let mut out = part.0.to_le_bytes().to_vec();
    for gradient in &part.1 {
        let Some(gradient) = gradient else {
            out.push(0);
            continue;
        };
        out.push(1);
        let flat = gradient.flatten_all()?;
        match gradient.dtype() {
            DType::F64 => {
                let values = flat.to_vec1::<f64>()?;
                out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
            // Exact for all narrower types.
            _ => {
                let values = flat.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
        }
    }
    Ok(out)
}

/// The part that [`pack`] wrote; `like` are the parameters.
pub(crate) fn unpack(bytes: &[u8], like: &[Tensor]) -> candle_core::Result<Part> {
    let mut rest = bytes;
    let mut take = |count: usize| -> candle_core::Result<&[u8]> {
        let Some((head, tail)) = rest.split_at_checked(count) else {
            candle_core::bail!(
                "gradients of another process: found {} bytes, expected more; do all processes train the same model?",
                bytes.len()
            )
        };
        rest = tail;
        Ok(head)
    };
    let loss = f64::from_le_bytes(take(8)?.try_into().unwrap_or_default());
    let mut gradients = Vec::with_capacity(like.len());
    for param in like {
        if take(1)? == [0] {
            gradients.push(None);
            continue;
        }
        let count = param.elem_count();
        let tensor = match param.dtype() {
            DType::F64 => {
                let values = take(8 * count)?.chunks_exact(8);
                let values: Vec<f64> = values
                    .map(|b| f64::from_le_bytes(b.try_into().unwrap_or_default()))
                    .collect();
                Tensor::from_vec(values, param.shape(), &Device::Cpu)?
            }
            dtype => {
                let values = take(4 * count)?.chunks_exact(4);
                let values: Vec<f32> = values
                    .map(|b| f32::from_le_bytes(b.try_into().unwrap_or_default()))
                    .collect();
                Tensor::from_vec(values, param.shape(), &Device::Cpu)?.to_dtype(dtype)?
            }
        };
        gradients.push(Some(tensor.to_device(param.device())?));
    }
    Ok((loss, gradients))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_cross_processes_bit_for_bit() {
        let a = Tensor::new(&[[1.1f32, f32::NAN], [-0.0, 3e-40]], &Device::Cpu).unwrap();
        let b = Tensor::new(&[0.1f64, -1e300], &Device::Cpu).unwrap();
        let like = [a.clone(), b.clone(), a.clone()];
        let bytes = pack(&(0.3, vec![Some(a.clone()), None, Some(a.clone())])).unwrap();
        let (loss, parts) = unpack(&bytes, &like).unwrap();
        assert_eq!(loss.to_bits(), 0.3f64.to_bits());
        assert!(parts[1].is_none());
        let bits = |t: &Tensor| -> Vec<u32> {
            let values = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            values.iter().map(|v| v.to_bits()).collect()
        };
        assert_eq!(bits(parts[2].as_ref().unwrap()), bits(&a));
        let bytes = pack(&(0.0, vec![None, Some(b.clone()), None])).unwrap();
        let found = unpack(&bytes, &like).unwrap().1.remove(1).unwrap();
        assert_eq!(found.to_vec1::<f64>().unwrap(), b.to_vec1::<f64>().unwrap());
        let error = unpack(&bytes[..12], &like).unwrap_err().to_string();
        assert!(error.contains("12 bytes"), "{error}");
    }
}
