//! Adding two decimal numbers digit by digit (paper 27, NoPE): every digit is one token.

use super::{EOS, Example, FIRST, SEP, Tokens};
use crate::random::Random;
use serde::{Deserialize, Serialize};

/// The plus sign.
const PLUS: u32 = FIRST + 10;

/// Two numbers of at most `length` digits, at least one of exactly that many; most significant digit first.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Addition {
    /// Write the answer with its least significant digit first.
    pub reversed: bool,
}

impl Tokens for Addition {
    fn vocab_size(&self) -> usize {
        PLUS as usize + 1
    }

    fn sample(&self, length: usize, random: &mut Random) -> Example {
        let length = length.max(1);
        let other = random.between(1, length);
        let lengths = if random.below(2) == 0 {
            [length, other]
        } else {
            [other, length]
        };
        // Digits, least significant first; numbers of more than one digit do not start with 0.
        let mut number = |digits: usize| -> Vec<u32> {
            (0..digits)
                .map(|place| {
                    if place + 1 == digits && digits > 1 {
                        1 + random.below(9) as u32
                    } else {
                        random.below(10) as u32
                    }
                })
                .collect()
        };
        let (a, b) = (number(lengths[0]), number(lengths[1]));
        let mut sum = Vec::new();
        let mut carry = 0;
        for place in 0..a.len().max(b.len()) {
            let total = a.get(place).unwrap_or(&0) + b.get(place).unwrap_or(&0) + carry;
            sum.push(total % 10);
            carry = total / 10;
        }
        if carry > 0 {
            sum.push(carry);
        }
        let token = |digit: &u32| FIRST + digit;
        let mut prompt: Vec<u32> = a.iter().rev().map(token).collect();
        prompt.push(PLUS);
        prompt.extend(b.iter().rev().map(token));
        prompt.push(SEP);
        let mut answer: Vec<u32> = sum.iter().map(token).collect();
        if !self.reversed {
            answer.reverse();
        }
        answer.push(EOS);
        Example { prompt, answer }
    }
}
