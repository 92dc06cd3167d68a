//! Models: weights from files, positions, attention patterns, assembled architectures.

pub mod attention;
pub mod config;
pub mod hub;
pub mod model;
pub mod position;
pub mod weights;
