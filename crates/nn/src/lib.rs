//! Models: weights from files, positions, attention patterns, assembled architectures.

pub mod attention;
pub mod config;
pub mod hub;
pub mod memory;
pub mod mixer;
pub mod model;
pub mod params;
pub mod position;
pub mod weights;
