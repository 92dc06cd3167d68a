//! What comes next, given logits: one file per strategy behind [`Strategy`].

pub mod logits;
pub mod random;
pub mod sample;
pub mod stop;

pub use logits::SamplingConfig;
pub use sample::{Choice, Strategy};
