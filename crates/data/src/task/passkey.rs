//! A key among filler, to be named at the end: how much a fixed-size state can hold and for how long (paper 16,
//! Stuffed Mamba; the token form of the passkey task).

use super::{EOS, Example, FIRST, SEP, Tokens};
use crate::random::Random;
use serde::{Deserialize, Serialize};

/// `length` tokens of which `digits` in a row, after a mark, are the key; the rest is filler of `fillers` symbols.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Passkey {
    /// Symbols of the key.
    pub digits: usize,
    /// Different key symbols.
    pub symbols: usize,
    /// Different filler symbols, none of them a key symbol.
    pub fillers: usize,
    /// Where the key starts, as a share of the room there is; none = anywhere.
    pub depth: Option<f64>,
}

impl Default for Passkey {
    fn default() -> Self {
        Passkey {
            digits: 5,
            symbols: 10,
            fillers: 16,
            depth: None,
        }
    }
}

impl Tokens for Passkey {
    fn vocab_size(&self) -> usize {
        FIRST as usize + 1 + self.symbols.max(1) + self.fillers.max(1)
    }

    fn sample(&self, length: usize, random: &mut Random) -> Example {
        let mark = FIRST;
        let (symbols, fillers) = (self.symbols.max(1) as u64, self.fillers.max(1) as u64);
        let key: Vec<u32> = (0..self.digits)
            .map(|_| FIRST + 1 + random.below(symbols) as u32)
            .collect();
        let room = length.saturating_sub(self.digits + 1);
        let before = match self.depth {
            Some(depth) => (depth.clamp(0.0, 1.0) * room as f64) as usize,
            None => random.between(0, room),
        };
        let mut filler = |count: usize| -> Vec<u32> {
            (0..count)
                .map(|_| FIRST + 1 + symbols as u32 + random.below(fillers) as u32)
                .collect()
        };
        let mut prompt = filler(before);
        prompt.push(mark);
        prompt.extend(&key);
        prompt.extend(filler(room - before));
        prompt.push(SEP);
        let mut answer = key;
        answer.push(EOS);
        Example { prompt, answer }
    }
}
