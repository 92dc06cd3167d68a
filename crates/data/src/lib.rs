//! Text in: documents of many formats, tokenizers of many families.

pub mod document;
pub mod tokenize;
