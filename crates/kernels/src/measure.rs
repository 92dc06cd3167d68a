//! What benches ask of the kernels: where the time of a forward pass goes, and how fast this machine
//! reads memory.

use crate::pool::Pool;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A share of a forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Norm and projections around attention.
    Projections,
    /// Rotating queries and keys, storing keys and values.
    Keys,
    /// What a context policy chooses.
    Policy,
    /// The attention kernel.
    Attention,
    /// Norm and gated MLP.
    Mlp,
    /// Final norm and logits.
    Head,
}

impl Stage {
    /// All, in the order of a layer.
    pub const ALL: [Stage; 6] = [
        Stage::Projections,
        Stage::Keys,
        Stage::Policy,
        Stage::Attention,
        Stage::Mlp,
        Stage::Head,
    ];

    /// As benches print it.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Projections => "projections",
            Stage::Keys => "keys",
            Stage::Policy => "policy",
            Stage::Attention => "attention",
            Stage::Mlp => "mlp",
            Stage::Head => "head",
        }
    }
}

static WATCHED: AtomicBool = AtomicBool::new(false);
static NANOSECONDS: [AtomicU64; Stage::ALL.len()] = [const { AtomicU64::new(0) }; Stage::ALL.len()];

/// Begins or ends the measurement, from zero.
pub fn watch(on: bool) {
    for total in &NANOSECONDS {
        total.store(0, Ordering::Relaxed);
    }
    WATCHED.store(on, Ordering::Relaxed);
}

/// Wall time of each stage since [`watch`].
pub fn totals() -> [(Stage, Duration); Stage::ALL.len()] {
    Stage::ALL.map(|stage| {
        let total = NANOSECONDS[stage as usize].load(Ordering::Relaxed);
        (stage, Duration::from_nanos(total))
    })
}

/// Runs `work` as part of a stage; costs nothing to speak of while nobody watches.
pub fn stage<R>(stage: Stage, work: impl FnOnce() -> R) -> R {
    if !WATCHED.load(Ordering::Relaxed) {
        return work();
    }
    let start = Instant::now();
    let result = work();
    let spent = start.elapsed().as_nanos() as u64;
    NANOSECONDS[stage as usize].fetch_add(spent, Ordering::Relaxed);
    result
}

/// Bytes a second of a streaming read of a buffer larger than the caches, by all threads.
pub fn memory_bandwidth() -> f64 {
    let pool = Pool::global();
    let buffer = vec![1u64; 50 << 20];
    let share = buffer.len() / pool.threads();
    let read = || {
        let start = Instant::now();
        pool.broadcast(&|worker| {
            let mut sums = [0u64; 32];
            for chunk in buffer[worker * share..][..share].chunks_exact(32) {
                for (sum, value) in sums.iter_mut().zip(chunk) {
                    *sum ^= *value;
                }
            }
            black_box(sums);
        });
        start.elapsed().as_secs_f64()
    };
    let shortest = (0..6).map(|_| read()).fold(f64::MAX, f64::min);
    (share * pool.threads() * 8) as f64 / shortest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_add_up_while_watched_and_only_then() {
        let of = |wanted: Stage| {
            let found = totals().into_iter().find(|(stage, _)| *stage == wanted);
            found.expect("all stages are listed").1
        };
        let pause = || std::thread::sleep(Duration::from_millis(2));
        stage(Stage::Mlp, pause);
        assert_eq!(of(Stage::Mlp), Duration::ZERO);
        watch(true);
        stage(Stage::Mlp, pause);
        stage(Stage::Mlp, pause);
        assert!(of(Stage::Mlp) >= Duration::from_millis(4));
        assert_eq!(of(Stage::Head), Duration::ZERO);
        watch(false);
        assert_eq!(of(Stage::Mlp), Duration::ZERO);
    }
}
