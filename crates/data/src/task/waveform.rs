//! Sine, saw tooth or square, with noise, of the same duration at any number of steps: what a continuous-time model should
//! tell apart at another sampling rate too (paper 26, LSSL).

use super::Signals;
use crate::random::Random;
use serde::{Deserialize, Serialize};

/// One period count, phase and amplitude per example; the target of the last step is the class, one-hot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Waveform {
    /// Samples of an example, whose duration is always the same.
    pub steps: usize,
    /// Periods in an example.
    pub periods: f64,
    /// Relative spread of the number of periods, either way.
    pub jitter: f64,
    /// Standard deviation of the noise added to every sample.
    pub noise: f64,
}

impl Default for Waveform {
    fn default() -> Self {
        Waveform {
            steps: 512,
            periods: 8.0,
            jitter: 0.2,
            noise: 0.3,
        }
    }
}

impl Signals for Waveform {
    fn inputs(&self) -> usize {
        1
    }

    fn outputs(&self) -> usize {
        3
    }

    fn steps(&self) -> usize {
        self.steps
    }

    fn last_only(&self) -> bool {
        true
    }

    fn sample(&self, random: &mut Random) -> (Vec<f32>, Vec<f32>) {
        let class = random.below(3) as usize;
        let periods = self.periods * (1.0 + self.jitter * random.range(-1.0, 1.0));
        let phase = random.uniform();
        // All three have mean square 1.
        let input = (0..self.steps)
            .map(|t| {
                let at = phase + periods * t as f64 / self.steps.max(1) as f64;
                let part = at - at.floor();
                let wave = match class {
                    0 => std::f64::consts::SQRT_2 * (std::f64::consts::TAU * part).sin(),
                    1 => 3f64.sqrt() * (2.0 * part - 1.0),
                    _ => {
                        if part < 0.5 {
                            1.0
                        } else {
                            -1.0
                        }
                    }
                };
                (wave + self.noise * random.normal()) as f32
            })
            .collect();
        let mut target = vec![0.0; 3];
        target[class] = 1.0;
        (input, target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_example_at_half_the_rate_is_every_other_sample() {
        let fine = Waveform {
            noise: 0.0,
            ..Waveform::default()
        };
        let coarse = Waveform {
            steps: 256,
            ..fine.clone()
        };
        for seed in 0..6 {
            let (a, class) = fine.sample(&mut Random::new(seed, "wave"));
            // Noise is drawn per sample, the rest before it.
            let (b, same) = coarse.sample(&mut Random::new(seed, "wave"));
            assert_eq!(class, same);
            assert_eq!(class.iter().sum::<f32>(), 1.0);
            for (t, value) in b.iter().enumerate() {
                assert!((a[2 * t] - value).abs() < 1e-5);
            }
            let power = a.iter().map(|v| v * v).sum::<f32>() / 512.0;
            assert!((power - 1.0).abs() < 0.1, "{power}");
        }
    }
}
