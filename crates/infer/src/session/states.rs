//! The states of a stack of mixers on disk: what a session holds in place of keys and values.

use crate::wire::{read_bytes, read_u64, write_bytes, write_u64};
use candle_core::{DType, Tensor};
use longspan_nn::mixer::MixerState;
use std::io::{self, Read, Write};

fn wrong(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}

/// Writes all blocks' states.
pub(super) fn save(out: &mut dyn Write, states: &[MixerState]) -> io::Result<()> {
    write_u64(out, states.len() as u64)?;
    for state in states {
        write_u64(out, state.tensors.len() as u64)?;
        for (name, tensor) in &state.tensors {
            write_bytes(out, name.as_bytes())?;
            write_u64(out, tensor.rank() as u64)?;
            for &size in tensor.dims() {
                write_u64(out, size as u64)?;
            }
            let flat = tensor.flatten_all().map_err(io::Error::other)?;
            let bytes: Vec<u8> = match tensor.dtype() {
                DType::F64 => flat
                    .to_vec1::<f64>()
                    .map(|v| v.iter().flat_map(|x| x.to_le_bytes()).collect()),
                _ => flat
                    .to_dtype(DType::F32)
                    .and_then(|flat| flat.to_vec1::<f32>())
                    .map(|v| v.iter().flat_map(|x| x.to_le_bytes()).collect()),
            }
            .map_err(io::Error::other)?;
            write_bytes(out, &bytes)?;
        }
    }
    Ok(())
}

/// Reads what [`save`] wrote over the states of a new sequence, which say what is expected.
pub(super) fn load(
    input: &mut dyn Read,
    states: &mut [MixerState],
    position: usize,
) -> io::Result<()> {
    let found = read_u64(input)?;
    if found != states.len() as u64 {
        return Err(wrong(format!(
            "found states of {found} blocks, expected {}",
            states.len()
        )));
    }
    for state in states {
        let found = read_u64(input)?;
        if found != state.tensors.len() as u64 {
            let expected = state.tensors.len();
            return Err(wrong(format!(
                "a state has {found} tensors, expected {expected}"
            )));
        }
        for (name, tensor) in &mut state.tensors {
            let found = read_bytes(input)?;
            if found != name.as_bytes() {
                let found = String::from_utf8_lossy(&found).into_owned();
                return Err(wrong(format!("a state holds {found:?}, expected {name:?}")));
            }
            let rank = read_u64(input)?;
            if rank != tensor.rank() as u64 {
                return Err(wrong(format!(
                    "{name} has {rank} axes, expected {}",
                    tensor.rank()
                )));
            }
            let mut shape = Vec::new();
            for _ in 0..rank {
                shape.push(read_u64(input)? as usize);
            }
            let bytes = read_bytes(input)?;
            let size = tensor.dtype().size_in_bytes();
            let count = shape
                .iter()
                .try_fold(1usize, |n, &size| n.checked_mul(size));
            // Keys that grow with the text have one axis of another size.
            let like = shape
                .iter()
                .zip(tensor.dims())
                .filter(|(a, b)| a != b)
                .count()
                <= 1;
            if !like || count.and_then(|n| n.checked_mul(size)) != Some(bytes.len()) {
                return Err(wrong(format!(
                    "{name} has shape {shape:?} and {} bytes, expected one like {:?} of {size} bytes each",
                    bytes.len(),
                    tensor.dims()
                )));
            }
            let device = tensor.device().clone();
            let read = match tensor.dtype() {
                DType::F64 => {
                    let values = bytes
                        .chunks_exact(8)
                        .map(|b| f64::from_le_bytes(b.try_into().unwrap_or_default()));
                    Tensor::from_vec(values.collect::<Vec<_>>(), shape, &device)
                }
                dtype => {
                    let values = bytes
                        .chunks_exact(4)
                        .map(|b| f32::from_le_bytes(b.try_into().unwrap_or_default()));
                    Tensor::from_vec(values.collect::<Vec<_>>(), shape, &device)
                        .and_then(|t| t.to_dtype(dtype))
                }
            };
            *tensor = read.map_err(io::Error::other)?;
        }
        state.position = position;
    }
    Ok(())
}
