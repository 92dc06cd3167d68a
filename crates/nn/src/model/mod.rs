//! Assembled architectures, each readable from top to bottom in one file.

pub mod decoder;

pub use decoder::{Decoder, Precision};
