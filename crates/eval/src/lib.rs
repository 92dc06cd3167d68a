//! Evaluation: benchmarks as tasks, runs as cells with stored predictions, scores as pure functions
//! of them, and reports.
//!
//! A sample's way: [`task::Task::samples`], [`run::run`] asks a [`target::Target`] and appends to a
//! [`cell::RunFolder`], [`score::score_run`] reads it back, [`report`] shows it.

pub mod bench;
pub mod cache;
pub mod cell;
pub mod compare;
pub mod count;
pub mod dialogue;
pub mod error;
pub mod metric;
pub mod ppl;
pub mod python;
pub mod registry;
pub mod report;
pub mod run;
pub mod score;
pub mod stats;
pub mod target;
pub mod task;

pub use error::{EvalError, Result};
