//! The lag task (paper 12, S4): band-limited noise, to be repeated some steps later. A model that cannot keep the
//! recent past gets no better than the variance, 1.

use super::Signals;
use crate::random::Random;
use serde::{Deserialize, Serialize};

/// One channel of noise and its copy `lag` steps later; targets before `lag` are 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lag {
    /// Steps of an example.
    pub steps: usize,
    /// Delay in steps.
    pub lag: usize,
    /// Largest frequency, in periods per example.
    pub band: usize,
}

impl Default for Lag {
    fn default() -> Self {
        Lag {
            steps: 1024,
            lag: 256,
            band: 32,
        }
    }
}

impl Signals for Lag {
    fn inputs(&self) -> usize {
        1
    }

    fn outputs(&self) -> usize {
        1
    }

    fn steps(&self) -> usize {
        self.steps
    }

    fn last_only(&self) -> bool {
        false
    }

    fn sample(&self, random: &mut Random) -> (Vec<f32>, Vec<f32>) {
        // A sum of `band` sinusoids of random phase and normal amplitude has variance 1.
        let mut signal = vec![0f64; self.steps];
        let scale = (1.0 / self.band.max(1) as f64).sqrt();
        for k in 1..=self.band.max(1) {
            let (a, b) = (random.normal() * scale, random.normal() * scale);
            let step = std::f64::consts::TAU * k as f64 / self.steps as f64;
            for (t, value) in signal.iter_mut().enumerate() {
                let (sin, cos) = (step * t as f64).sin_cos();
                *value += a * cos + b * sin;
            }
        }
        let input: Vec<f32> = signal.iter().map(|&v| v as f32).collect();
        let target = (0..self.steps)
            .map(|t| t.checked_sub(self.lag).map_or(0.0, |past| input[past]))
            .collect();
        (input, target)
    }
}
