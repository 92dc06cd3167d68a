//! Numerics of Longspan: matrix products straight from packed low-bit weights, attention over any
//! plan of cached keys, and the small fused operations around them.
//!
//! Every fast kernel has a naive twin that stays as its oracle, and is dispatched at run time over
//! [`cpu::Level`]: AMX, AVX-512, AVX2, portable.

pub mod additive;
pub mod attention;
pub mod autograd;
pub mod block_scores;
pub mod causal;
pub mod centroids;
pub mod composed;
pub mod cpu;
pub mod cut;
pub mod dense;
pub mod elementwise;
pub mod fftconv;
mod gpu;
mod graph;
#[cfg(test)]
mod harness;
pub mod heads;
pub mod learn;
pub mod linear;
pub mod matmul;
pub mod measure;
pub mod mlp;
pub mod modal;
pub mod ops;
mod panel;
pub mod pool;
pub mod quant;
pub mod recurrent;
pub mod s4;
pub mod selective;
pub mod slots;
pub mod ssd;
pub mod ssd_policy;
mod tile;
pub mod tridiag;
pub mod vandermonde;
pub mod vq;
#[cfg(target_arch = "x86_64")]
mod words;
