//! Assembled architectures, each readable from top to bottom in one file.

pub mod bert;
pub mod decoder;
pub mod language;
mod parameters;
pub mod stack;

pub use bert::{Bert, BertConfig, TextEncoder};
pub use decoder::{Decoder, Precision};
pub use language::{LanguageModel, new_decoder};
pub use stack::{SignalModel, Stack, StackConfig, StackLm};
