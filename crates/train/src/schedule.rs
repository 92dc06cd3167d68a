//! Learning rates over a run, as multipliers of the base rate.

use crate::error::{Result, TrainError};
use serde::{Deserialize, Serialize};

/// The multiplier of each step; all warm up linearly from 0 over `warmup` steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Schedule {
    /// 1 after the warm-up.
    Constant {
        /// Steps of warm-up.
        #[serde(default)]
        warmup: u64,
    },
    /// Half a cosine from 1 to `min_lr_ratio` at the last step.
    Cosine {
        /// Steps of warm-up.
        #[serde(default)]
        warmup: u64,
        /// Multiplier at the end.
        #[serde(default)]
        min_lr_ratio: f64,
    },
    /// A line from 1 to `min_lr_ratio` at the last step.
    Linear {
        /// Steps of warm-up.
        #[serde(default)]
        warmup: u64,
        /// Multiplier at the end.
        #[serde(default)]
        min_lr_ratio: f64,
    },
    /// Warm-up, stable, decay: 1 until the last `decay_share` of the steps, then a line to `min_lr_ratio`.
    Wsd {
        /// Steps of warm-up.
        #[serde(default)]
        warmup: u64,
        /// Share of all steps that decay.
        #[serde(default = "tenth")]
        decay_share: f64,
        /// Multiplier at the end.
        #[serde(default)]
        min_lr_ratio: f64,
    },
}

fn tenth() -> f64 {
    0.1
}

impl Default for Schedule {
    fn default() -> Self {
        Schedule::Cosine {
            warmup: 0,
            min_lr_ratio: 0.0,
        }
    }
}

impl Schedule {
    /// The multiplier of step `step` (from 0) of `total`.
    pub fn multiplier(&self, step: u64, total: u64) -> f64 {
        let (warmup, min) = match *self {
            Schedule::Constant { warmup } => (warmup, 1.0),
            Schedule::Cosine {
                warmup,
                min_lr_ratio,
            }
            | Schedule::Linear {
                warmup,
                min_lr_ratio,
            }
            | Schedule::Wsd {
                warmup,
                min_lr_ratio,
                ..
            } => (warmup, min_lr_ratio),
        };
        if step < warmup {
            return step as f64 / warmup as f64;
        }
        let part = |from: f64, to: f64| {
            if to <= from {
                1.0
            } else {
                ((step as f64 - from) / (to - from)).clamp(0.0, 1.0)
            }
        };
        let whole = part(warmup as f64, total as f64);
        match *self {
            Schedule::Constant { .. } => 1.0,
            Schedule::Cosine { .. } => {
                min + (1.0 - min) * (1.0 + (std::f64::consts::PI * whole).cos()) / 2.0
            }
            Schedule::Linear { .. } => 1.0 - (1.0 - min) * whole,
            Schedule::Wsd { decay_share, .. } => {
                let from = total as f64 * (1.0 - decay_share);
                1.0 - (1.0 - min) * part(from, total as f64)
            }
        }
    }

    /// Refuses shares outside 0..=1.
    pub fn check(&self) -> Result<()> {
        let share = |name: &str, value: f64| {
            if (0.0..=1.0).contains(&value) {
                Ok(())
            } else {
                Err(TrainError::option(name, value, "a share from 0 to 1"))
            }
        };
        match *self {
            Schedule::Constant { .. } => Ok(()),
            Schedule::Cosine { min_lr_ratio, .. } | Schedule::Linear { min_lr_ratio, .. } => {
                share("schedule.min_lr_ratio", min_lr_ratio)
            }
            Schedule::Wsd {
                decay_share,
                min_lr_ratio,
                ..
            } => {
                share("schedule.decay_share", decay_share)?;
                share("schedule.min_lr_ratio", min_lr_ratio)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_schedule_warms_up_and_ends_where_it_says() {
        let schedules = [
            (r#"{"kind": "constant", "warmup": 4}"#, 1.0),
            (
                r#"{"kind": "cosine", "warmup": 4, "min_lr_ratio": 0.2}"#,
                0.2,
            ),
            (
                r#"{"kind": "linear", "warmup": 4, "min_lr_ratio": 0.1}"#,
                0.1,
            ),
            (r#"{"kind": "wsd", "warmup": 4, "decay_share": 0.5}"#, 0.0),
        ];
        for (text, end) in schedules {
            let schedule: Schedule = serde_json::from_str(text).unwrap();
            schedule.check().unwrap();
            assert_eq!(schedule.multiplier(0, 100), 0.0);
            assert_eq!(schedule.multiplier(1, 100), 0.25);
            assert_eq!(schedule.multiplier(4, 100), 1.0);
            assert!(
                (schedule.multiplier(100, 100) - end).abs() < 1e-12,
                "{text}"
            );
            let mut last = 1.0;
            for step in 4..=100 {
                let now = schedule.multiplier(step, 100);
                assert!(now <= last + 1e-12, "{text} rises at {step}");
                last = now;
            }
        }
        let wsd: Schedule = serde_json::from_str(r#"{"kind": "wsd", "decay_share": 0.5}"#).unwrap();
        assert_eq!(wsd.multiplier(50, 100), 1.0);
        assert!(wsd.multiplier(51, 100) < 1.0);
        let wrong = Schedule::Linear {
            warmup: 0,
            min_lr_ratio: 2.0,
        };
        let error = wrong.check().unwrap_err().to_string();
        assert!(error.contains("min_lr_ratio") && error.contains('2'));
    }
}
