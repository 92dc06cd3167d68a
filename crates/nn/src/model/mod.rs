//! Assembled architectures, each readable from top to bottom in one file.

pub mod bert;
pub mod decoder;
pub mod language;
pub mod network;
mod parameters;
pub mod pointer;
pub mod set2set;
pub mod stack;
pub mod tagged;
pub mod tempered;

pub use bert::{Bert, BertConfig, TextEncoder};
pub use decoder::{Decoder, Precision};
pub use language::{LanguageModel, new_decoder};
pub use network::{Network, Recurrent};
pub use pointer::{PointerDecoder, PointerHead, PtrNet, PtrNetConfig};
pub use set2set::{Set2Seq, Set2SeqConfig, Set2Set, Set2SetConfig};
pub use stack::{SignalModel, Stack, StackConfig, StackLm};
pub use tagged::{Choose, TaggedConfig, TaggedLm};
pub use tempered::{Temper, TemperedConfig, TemperedDecoder};
