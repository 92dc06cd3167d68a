//! Text in: documents of many formats, tokenizers of many families; synthetic tasks by seed.

pub mod document;
pub mod random;
pub mod task;
pub mod tokenize;
