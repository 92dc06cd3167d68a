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

/// What one micro-batch gave.
#[derive(Debug)]
pub(crate) struct Part {
    /// Its loss.
    pub loss: f64,
    /// Gradients of all parameters, some of which may have none.
    pub gradients: Vec<Option<Tensor>>,
    /// What the objective noted.
    pub notes: Vec<Vec<f64>>,
}

/// A part as bytes: loss, notes by block (their number, then each as a count and values), then for each parameter a mark and
/// its values (f32, or f64 for f64).
pub(crate) fn pack(part: &Part) -> candle_core::Result<Vec<u8>> {
    let mut out = part.loss.to_le_bytes().to_vec();
    out.extend((part.notes.len() as u64).to_le_bytes());
    for notes in &part.notes {
        out.extend((notes.len() as u64).to_le_bytes());
        out.extend(notes.iter().flat_map(|note| note.to_le_bytes()));
    }
    for gradient in &part.gradients {
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
    let f64_of = |bytes: &[u8]| f64::from_le_bytes(bytes.try_into().unwrap_or_default());
    let loss = f64_of(take(8)?);
    let count = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap_or_default());
    let mut notes = Vec::new();
    for _ in 0..count(take(8)?) {
        let length = count(take(8)?).min(usize::MAX as u64 / 8) as usize;
        notes.push(take(8 * length)?.chunks_exact(8).map(f64_of).collect());
    }
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
                let values: Vec<f64> = values.map(f64_of).collect();
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
    Ok(Part {
        loss,
        gradients,
        notes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_cross_processes_bit_for_bit() {
        let a = Tensor::new(&[[1.1f32, f32::NAN], [-0.0, 3e-40]], &Device::Cpu).unwrap();
        let b = Tensor::new(&[0.1f64, -1e300], &Device::Cpu).unwrap();
        let like = [a.clone(), b.clone(), a.clone()];
        let part = |gradients| Part {
            loss: 0.3,
            gradients,
            notes: vec![vec![0.1, -2.0], vec![]],
        };
        let bytes = pack(&part(vec![Some(a.clone()), None, Some(a.clone())])).unwrap();
        let found = unpack(&bytes, &like).unwrap();
        assert_eq!(found.loss.to_bits(), 0.3f64.to_bits());
        assert_eq!(found.notes, [vec![0.1, -2.0], vec![]]);
        assert!(found.gradients[1].is_none());
        let bits = |t: &Tensor| -> Vec<u32> {
            let values = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            values.iter().map(|v| v.to_bits()).collect()
        };
        assert_eq!(bits(found.gradients[2].as_ref().unwrap()), bits(&a));
        let bytes = pack(&part(vec![None, Some(b.clone()), None])).unwrap();
        let mut found = unpack(&bytes, &like).unwrap();
        let found = found.gradients.remove(1).unwrap();
        assert_eq!(found.to_vec1::<f64>().unwrap(), b.to_vec1::<f64>().unwrap());
        let error = unpack(&bytes[..12], &like).unwrap_err().to_string();
        assert!(error.contains("12 bytes"), "{error}");
    }
}
