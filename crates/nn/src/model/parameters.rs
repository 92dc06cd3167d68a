//! Where a model's parameters come from: a checkpoint's files, or tensors that a trainer holds. Every
//! architecture asks by name, width and shape through [`Parameters`], and gets what its ops run on.

use super::Precision;
use crate::weights::{MatrixData, WeightSource};
use candle_core::{DType, Device, Result, Tensor, bail};
use longspan_kernels::matmul::{MatrixSource, PackedMatrix};
use longspan_kernels::ops::{DensePart, Linear};
use longspan_kernels::quant;
use std::collections::HashMap;
use std::sync::Arc;

/// A matrix asked for by name.
pub(super) struct Projection {
    pub weight: String,
    pub bias: Option<String>,
    pub rows: usize,
}

/// Where parameters come from: a checkpoint, or tensors held by a trainer.
pub(super) trait Parameters {
    fn vector(&self, name: &str, width: usize) -> Result<Tensor>;
    fn linear(&self, cols: usize, parts: &[Projection]) -> Result<Linear>;
}

impl Parameters for HashMap<String, Tensor> {
    fn vector(&self, name: &str, width: usize) -> Result<Tensor> {
        match self.get(name) {
            Some(tensor) if tensor.dims() == [width] => Ok(tensor.clone()),
            Some(tensor) => bail!(
                "tensor {name}: found shape {:?}, expected [{width}]",
                tensor.dims()
            ),
            None => bail!("tensor {name} is missing"),
        }
    }

    fn linear(&self, cols: usize, parts: &[Projection]) -> Result<Linear> {
        let parts = parts
            .iter()
            .map(|part| {
                let bias = part
                    .bias
                    .as_ref()
                    .map(|name| self.vector(name, part.rows))
                    .transpose()?;
                match self.get(&part.weight) {
                    Some(weight) if weight.dims() == [part.rows, cols] => Ok(DensePart {
                        weight: weight.clone(),
                        bias,
                    }),
                    Some(weight) => bail!(
                        "tensor {}: found shape {:?}, expected [{}, {cols}]",
                        part.weight,
                        weight.dims(),
                        part.rows
                    ),
                    None => bail!("tensor {} is missing", part.weight),
                }
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Linear::Dense(parts))
    }
}

/// Reads parameters from a checkpoint, held as `precision` says.
pub(super) struct Loader<'a> {
    pub weights: &'a dyn WeightSource,
    pub precision: Precision,
    pub device: &'a Device,
}

impl Loader<'_> {
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<MatrixData<'_>> {
        let matrix = self
            .weights
            .matrix(name)
            .map_err(candle_core::Error::wrap)?;
        if (matrix.rows, matrix.cols) != (rows, cols) {
            bail!(
                "tensor {name}: found shape [{}, {}], expected [{rows}, {cols}]",
                matrix.rows,
                matrix.cols
            );
        }
        Ok(matrix)
    }

    fn values(&self, name: &str, width: usize) -> Result<Vec<f32>> {
        let values = self
            .weights
            .vector(name)
            .map_err(candle_core::Error::wrap)?;
        if values.len() != width {
            bail!(
                "tensor {name}: found {} values, expected {width}",
                values.len()
            );
        }
        Ok(values)
    }
}

impl Parameters for Loader<'_> {
    fn vector(&self, name: &str, width: usize) -> Result<Tensor> {
        let dtype = match self.precision {
            Precision::Packed => DType::F32,
            Precision::Dense(dtype) => dtype,
        };
        Tensor::from_vec(self.values(name, width)?, width, self.device)?.to_dtype(dtype)
    }

    fn linear(&self, cols: usize, parts: &[Projection]) -> Result<Linear> {
        match self.precision {
            Precision::Packed => {
                let data = parts
                    .iter()
                    .map(|part| self.matrix(&part.weight, part.rows, cols))
                    .collect::<Result<Vec<_>>>()?;
                let sources: Vec<MatrixSource> = data
                    .iter()
                    .map(|data| MatrixSource {
                        ty: data.ty,
                        rows: data.rows,
                        bytes: &data.bytes,
                    })
                    .collect();
                let matrix =
                    Arc::new(PackedMatrix::pack(cols, &sources).map_err(candle_core::Error::wrap)?);
                let mut bias = Vec::new();
                for part in parts {
                    if let Some(name) = &part.bias {
                        bias.extend(self.values(name, part.rows)?);
                    }
                }
                let bias = (!bias.is_empty()).then(|| Arc::new(bias));
                Ok(Linear::Packed { matrix, bias })
            }
            Precision::Dense(dtype) => {
                let parts = parts
                    .iter()
                    .map(|part| {
                        let data = self.matrix(&part.weight, part.rows, cols)?;
                        let mut values = vec![0f32; part.rows * cols];
                        quant::dequantize(data.ty, &data.bytes, &mut values)
                            .map_err(candle_core::Error::wrap)?;
                        let weight = Tensor::from_vec(values, (part.rows, cols), self.device)?
                            .to_dtype(dtype)?;
                        let bias = part
                            .bias
                            .as_ref()
                            .map(|name| self.vector(name, part.rows))
                            .transpose()?;
                        Ok(DensePart { weight, bias })
                    })
                    .collect::<Result<Vec<_>>>()?;
                Ok(Linear::Dense(parts))
            }
        }
    }
}
