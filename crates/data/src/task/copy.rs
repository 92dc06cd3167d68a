//! Copying, in the variants of the length-generalisation laboratory (paper 27, NoPE): one token many times or many
//! tokens once, once or twice, with one token replaced.

use super::{EOS, Example, FIRST, SEP, Tokens};
use crate::random::Random;
use serde::{Deserialize, Serialize};

/// Which copy is asked for, in the paper's abbreviations.
#[derive(Clone, std::marker::Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// One token repeated n times, copied.
    Rsc,
    /// One token repeated n times, answered with another token as often.
    Rdc,
    /// One token repeated n times, copied twice.
    Rsc2x,
    /// n random tokens, copied.
    Cmc,
    /// n random tokens, copied twice.
    Cmc2x,
    /// n random tokens, reversed.
    Reverse,
}

/// The copy tasks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Copy {
    /// Which copy.
    pub variant: Variant,
    /// Different tokens to draw from.
    pub symbols: usize,
}

impl Default for Copy {
    fn default() -> Self {
        Copy {
            variant: Variant::Cmc,
            symbols: 100,
        }
    }
}

impl Tokens for Copy {
    fn vocab_size(&self) -> usize {
        FIRST as usize + self.symbols.max(1)
    }

    fn sample(&self, length: usize, random: &mut Random) -> Example {
        let mut symbol = || FIRST + random.below(self.symbols.max(1) as u64) as u32;
        let (mut prompt, mut answer) = match self.variant {
            Variant::Rsc => {
                let list = vec![symbol(); length];
                (list.clone(), list)
            }
            Variant::Rsc2x => {
                let token = symbol();
                (vec![token; length], vec![token; 2 * length])
            }
            Variant::Rdc => {
                let (from, to) = (symbol(), symbol());
                // "replace from by to in from from from"
                let mut prompt = vec![from, to, SEP];
                prompt.extend(vec![from; length]);
                (prompt, vec![to; length])
            }
            Variant::Cmc => {
                let list: Vec<u32> = (0..length).map(|_| symbol()).collect();
                (list.clone(), list)
            }
            Variant::Cmc2x => {
                let list: Vec<u32> = (0..length).map(|_| symbol()).collect();
                let twice = [list.clone(), list.clone()].concat();
                (list, twice)
            }
            Variant::Reverse => {
                let list: Vec<u32> = (0..length).map(|_| symbol()).collect();
                let reversed = list.iter().rev().copied().collect();
                (list, reversed)
            }
        };
        prompt.push(SEP);
        answer.push(EOS);
        Example { prompt, answer }
    }
}
