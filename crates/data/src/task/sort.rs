//! Sorting integers drawn with repetition, the base task of task hinting (paper 51) and one of NoPE's (paper 27).

use super::{EOS, Example, FIRST, SEP, Tokens};
use crate::random::Random;
use serde::{Deserialize, Serialize};

/// Lists of `length` values below `values`, answered in ascending order; one token per value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sort {
    /// Number of different values (V).
    pub values: usize,
}

impl Default for Sort {
    fn default() -> Self {
        Sort { values: 100 }
    }
}

impl Tokens for Sort {
    fn vocab_size(&self) -> usize {
        FIRST as usize + self.values.max(1)
    }

    fn sample(&self, length: usize, random: &mut Random) -> Example {
        let mut prompt: Vec<u32> = (0..length)
            .map(|_| FIRST + random.below(self.values.max(1) as u64) as u32)
            .collect();
        let mut answer = prompt.clone();
        answer.sort_unstable();
        prompt.push(SEP);
        answer.push(EOS);
        Example { prompt, answer }
    }
}
