//! Learning on long sequences: one loop, with sources and objectives as its parts.
//!
//! [`trainer::Trainer`] makes the steps; [`run::RunFolder`] keeps configuration, events and checkpoints so that a run
//! that was killed goes on bit for bit. What a paper adds is a [`source::Source`], an [`objective::Objective`], or a recipe.

pub mod batch;
pub mod comm;
pub mod config;
pub mod error;
pub mod exact;
pub mod figure;
pub mod hints;
pub mod objective;
pub mod optim;
pub mod order_search;
pub mod pointing;
pub mod reproduce;
pub mod run;
pub mod schedule;
pub mod signal;
pub mod source;
pub mod streams;
pub mod tbptt;
pub mod trainer;

pub use error::{Result, TrainError};
