//! The adding problem (Hochreiter and Schmidhuber 1997; paper 15): two marked numbers far apart, their sum at the end.

use super::Signals;
use crate::random::Random;
use serde::{Deserialize, Serialize};

/// Numbers uniform in 0..1 beside marks; the target of the last step is the sum of the two marked ones. Always
/// answering 1 has mean squared error 1/6.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Adding {
    /// Steps of an example; one mark lies in each half.
    pub steps: usize,
}

impl Default for Adding {
    fn default() -> Self {
        Adding { steps: 100 }
    }
}

impl Signals for Adding {
    fn inputs(&self) -> usize {
        2
    }

    fn outputs(&self) -> usize {
        1
    }

    fn steps(&self) -> usize {
        self.steps
    }

    fn last_only(&self) -> bool {
        true
    }

    fn sample(&self, random: &mut Random) -> (Vec<f32>, Vec<f32>) {
        let half = self.steps / 2;
        let (first, second) = (
            random.below(half.max(1) as u64) as usize,
            half + random.below((self.steps - half).max(1) as u64) as usize,
        );
        let mut input = Vec::with_capacity(2 * self.steps);
        let mut sum = 0.0;
        for t in 0..self.steps {
            let value = random.uniform() as f32;
            let marked = t == first || t == second;
            if marked {
                sum += value;
            }
            input.extend([value, f32::from(u8::from(marked))]);
        }
        (input, vec![sum])
    }
}
