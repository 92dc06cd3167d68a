//! Weights of a model on disk, GGUF or safetensors, under one set of names and in one layout.
//!
//! Names are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`). Rows of query and key
//! projections are in Hugging Face's order, the two rotated halves of a head one after the other,
//! whatever the file does. Norms are the factors to multiply with, whatever the file does: Gemma's
//! safetensors hold the factor minus one, its GGUF files the factor itself.

mod checkpoint;
mod error;
mod fingerprint;
pub mod gguf;
pub mod safetensors;
mod storage;

use std::borrow::Cow;
use std::path::Path;

use longspan_kernels::quant::GgmlType;

pub use checkpoint::{Checkpoint, CheckpointError};
pub use error::WeightsError;
pub use fingerprint::Fingerprint;

/// A matrix as stored.
#[derive(Clone, Debug)]
pub struct MatrixData<'a> {
    /// How the elements are stored.
    pub ty: GgmlType,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Row-major `[rows, cols]`, each row in ggml's block layout. Not aligned to anything.
    pub bytes: Cow<'a, [u8]>,
}

/// Tensors by canonical name: what a model is built from.
pub trait WeightSource: Send + Sync {
    /// A matrix, without conversion.
    ///
    /// # Errors
    /// When it is absent, has not two dimensions, or is stored in a type which [`GgmlType`] lacks.
    fn matrix(&self, name: &str) -> Result<MatrixData<'_>, WeightsError>;

    /// A vector as float32. Norms come as the factor to multiply with.
    ///
    /// # Errors
    /// When it is absent, has not one dimension, or is not stored as F32, F16 or BF16.
    fn vector(&self, name: &str) -> Result<Vec<f32>, WeightsError>;

    /// All values of a tensor of any shape as float32, row-major, as the file holds them.
    ///
    /// # Errors
    /// When it is absent, or stored in a type that has no such values.
    fn values(&self, name: &str) -> Result<Vec<f32>, WeightsError> {
        if self.shape(name).is_none_or(|shape| shape.len() != 2) {
            return self.vector(name);
        }
        let matrix = self.matrix(name)?;
        let mut values = vec![0.0; matrix.rows * matrix.cols];
        longspan_kernels::quant::dequantize(matrix.ty, &matrix.bytes, &mut values).map_err(
            |error| WeightsError::Malformed {
                file: self.file().to_path_buf(),
                place: format!("tensor `{name}`"),
                found: error.to_string(),
                expected: "whole rows".into(),
            },
        )?;
        Ok(values)
    }

    /// The shape of a tensor, row-major, if it is there.
    fn shape(&self, name: &str) -> Option<&[usize]>;

    /// Whether a tensor is there.
    fn contains(&self, name: &str) -> bool {
        self.shape(name).is_some()
    }

    /// All canonical names, sorted.
    fn names(&self) -> Vec<String>;

    /// The file, or the folder of the files.
    fn file(&self) -> &Path;

    /// Identifies these weights.
    fn fingerprint(&self) -> Fingerprint;
}

/// The float32 values of `bytes`, or none if `ty` is a block type.
pub(crate) fn to_f32(ty: GgmlType, bytes: &[u8]) -> Option<Vec<f32>> {
    let halves = || {
        bytes
            .chunks_exact(2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]))
    };
    Some(match ty {
        GgmlType::F32 => bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
        GgmlType::F16 => halves().map(|b| half::f16::from_bits(b).to_f32()).collect(),
        GgmlType::BF16 => halves()
            .map(|b| half::bf16::from_bits(b).to_f32())
            .collect(),
        _ => return None,
    })
}

/// The error for an absent tensor, with the names most like it.
pub(crate) fn missing<'a>(
    file: &Path,
    name: &str,
    names: impl Iterator<Item = &'a str>,
) -> WeightsError {
    const SHOWN: usize = 8;
    let common = |other: &str| {
        name.bytes()
            .zip(other.bytes())
            .take_while(|(a, b)| a == b)
            .count()
    };
    let mut all: Vec<&str> = names.collect();
    all.sort_unstable();
    all.sort_by_key(|other| std::cmp::Reverse(common(other)));
    let mut available = format!("{} tensors", all.len());
    if !all.is_empty() {
        let nearest = all.iter().take(SHOWN).map(|n| format!("`{n}`"));
        available += ", nearest: ";
        available += &nearest.collect::<Vec<_>>().join(", ");
    }
    WeightsError::MissingTensor {
        file: file.to_path_buf(),
        tensor: name.into(),
        available,
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
