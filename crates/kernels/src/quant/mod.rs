//! The tensor types of GGUF files: block sizes, and the plain dequantiser every packed kernel is
//! tested against.
//!
//! A block stores some small integer codes and the scales that turn them back into weights. The
//! layouts are those of the `ggml` library (file `ggml-common.h`), version 2025.

mod dequantize;
#[cfg(test)]
mod tests;

pub use dequantize::dequantize;
pub(crate) use dequantize::{five_bits, half_at, k4_scale_min, q3_k_scales};

/// Element type of a GGUF tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
pub enum GgmlType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an F32.
    BF16,
    /// 4 bits and a scale per 32 weights.
    Q4_0,
    /// 4 bits, a scale and a minimum per 32 weights.
    Q4_1,
    /// 5 bits and a scale per 32 weights.
    Q5_0,
    /// 5 bits, a scale and a minimum per 32 weights.
    Q5_1,
    /// 8 bits and a scale per 32 weights.
    Q8_0,
    /// 2 bits; 4-bit scales and minima per 16 weights, in super-blocks of 256.
    Q2K,
    /// 3 bits; 6-bit scales per 16 weights, in super-blocks of 256.
    Q3K,
    /// 4 bits; 6-bit scales and minima per 32 weights, in super-blocks of 256.
    Q4K,
    /// 5 bits; 6-bit scales and minima per 32 weights, in super-blocks of 256.
    Q5K,
    /// 6 bits; 8-bit scales per 16 weights, in super-blocks of 256.
    Q6K,
}

impl GgmlType {
    /// Every type this crate reads.
    pub const ALL: [GgmlType; 13] = [
        GgmlType::F32,
        GgmlType::F16,
        GgmlType::BF16,
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q5_0,
        GgmlType::Q5_1,
        GgmlType::Q8_0,
        GgmlType::Q2K,
        GgmlType::Q3K,
        GgmlType::Q4K,
        GgmlType::Q5K,
        GgmlType::Q6K,
    ];

    /// The type with this number in a GGUF file, if it is one this crate reads.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|ty| ty.id() == id)
    }

    /// The number of this type in a GGUF file.
    pub fn id(self) -> u32 {
        match self {
            GgmlType::F32 => 0,
            GgmlType::F16 => 1,
            GgmlType::BF16 => 30,
            GgmlType::Q4_0 => 2,
            GgmlType::Q4_1 => 3,
            GgmlType::Q5_0 => 6,
            GgmlType::Q5_1 => 7,
            GgmlType::Q8_0 => 8,
            GgmlType::Q2K => 10,
            GgmlType::Q3K => 11,
            GgmlType::Q4K => 12,
            GgmlType::Q5K => 13,
            GgmlType::Q6K => 14,
        }
    }

    /// The name used by GGUF tools, such as `Q4_K`.
    pub fn name(self) -> &'static str {
        match self {
            GgmlType::F32 => "F32",
            GgmlType::F16 => "F16",
            GgmlType::BF16 => "BF16",
            GgmlType::Q4_0 => "Q4_0",
            GgmlType::Q4_1 => "Q4_1",
            GgmlType::Q5_0 => "Q5_0",
            GgmlType::Q5_1 => "Q5_1",
            GgmlType::Q8_0 => "Q8_0",
            GgmlType::Q2K => "Q2_K",
            GgmlType::Q3K => "Q3_K",
            GgmlType::Q4K => "Q4_K",
            GgmlType::Q5K => "Q5_K",
            GgmlType::Q6K => "Q6_K",
        }
    }

    /// Weights in one block.
    pub fn block_elements(self) -> usize {
        match self {
            GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => 1,
            GgmlType::Q4_0 | GgmlType::Q4_1 | GgmlType::Q5_0 | GgmlType::Q5_1 | GgmlType::Q8_0 => {
                32
            }
            GgmlType::Q2K | GgmlType::Q3K | GgmlType::Q4K | GgmlType::Q5K | GgmlType::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            GgmlType::F32 => 4,
            GgmlType::F16 | GgmlType::BF16 => 2,
            GgmlType::Q4_0 => 18,
            GgmlType::Q4_1 => 20,
            GgmlType::Q5_0 => 22,
            GgmlType::Q5_1 => 24,
            GgmlType::Q8_0 => 34,
            GgmlType::Q2K => 84,
            GgmlType::Q3K => 110,
            GgmlType::Q4K => 144,
            GgmlType::Q5K => 176,
            GgmlType::Q6K => 210,
        }
    }

    /// Bytes of `elements` weights; `None` when that is no whole number of blocks, or too large.
    pub fn bytes(self, elements: usize) -> Option<usize> {
        let blocks = elements / self.block_elements();
        elements
            .is_multiple_of(self.block_elements())
            .then(|| blocks.checked_mul(self.block_bytes()))?
    }
}

/// Why a tensor could not be dequantised.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantError {
    /// The number of weights is no whole number of blocks.
    #[error(
        "{elements} weights of type {} do not fill whole blocks of {}; the tensor's shape and type disagree",
        ty.name(), ty.block_elements()
    )]
    PartialBlock {
        /// Type asked for.
        ty: GgmlType,
        /// Weights asked for.
        elements: usize,
    },
    /// The data is shorter or longer than its shape says.
    #[error(
        "{elements} weights of type {} take {expected} bytes but {found} were given; the file may be cut short",
        ty.name()
    )]
    Length {
        /// Type asked for.
        ty: GgmlType,
        /// Weights asked for.
        elements: usize,
        /// Bytes the weights take.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
}
