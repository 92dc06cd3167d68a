//! Memories inside of a model: what is kept of past tokens besides keys and values.

pub mod reweave;
