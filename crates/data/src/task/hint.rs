//! Helper tasks of task hinting (paper 51): small questions about the same lists that the base task, sorting, is trained on,
//! and the increment of a decimal number with its own hint.
//!
//! A hint has its own query token, so that one model can tell the tasks apart, and is never longer than the base task's
//! lists. All share one vocabulary, [`HintedSort::vocab_size`].

use super::{EOS, Example, FIRST, SEP, Sort, Tokens};
use crate::random::Random;
use serde::{Deserialize, Serialize};

/// What is asked about a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hint {
    /// The smallest element above x; [`EOS`] if there is none. The one that helps in the paper.
    Successor,
    /// The largest element below x; a token of its own if there is none.
    Predecessor,
    /// How often x occurs, in decimal digits.
    Count,
    /// The value at a masked place of the sorted list.
    Fill,
    /// Whether x occurs an odd number of times (1) or an even one (0): a control.
    Parity,
    /// The smallest element: a control.
    Min,
    /// The largest element: a control.
    Max,
}

impl Hint {
    /// All hints.
    pub const ALL: [Hint; 7] = [
        Hint::Successor,
        Hint::Predecessor,
        Hint::Count,
        Hint::Fill,
        Hint::Parity,
        Hint::Min,
        Hint::Max,
    ];

    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Hint::Successor => "successor",
            Hint::Predecessor => "predecessor",
            Hint::Count => "count",
            Hint::Fill => "fill",
            Hint::Parity => "parity",
            Hint::Min => "min",
            Hint::Max => "max",
        }
    }
}

/// Sorting with the vocabulary of all hints: values, then `none`, `mask`, ten digits, and a query token per hint.
#[derive(Clone, Debug, PartialEq)]
pub struct HintedSort {
    /// The base task.
    pub sort: Sort,
}

impl HintedSort {
    /// One more than the largest token.
    pub fn vocab_size(&self) -> usize {
        self.query(Hint::Max) as usize + 1
    }

    /// Answer of predecessor when nothing is smaller (the spec's BOS).
    pub fn none(&self) -> u32 {
        self.sort.vocab_size() as u32
    }

    /// The masked place of fill.
    pub fn mask(&self) -> u32 {
        self.none() + 1
    }

    /// The token of a decimal digit.
    pub fn digit(&self, digit: u32) -> u32 {
        self.none() + 2 + digit
    }

    /// The query token of a hint.
    pub fn query(&self, hint: Hint) -> u32 {
        let place = Hint::ALL.iter().position(|&h| h == hint).unwrap_or(0);
        self.none() + 12 + place as u32
    }

    /// The hint's example about a list of value tokens; `place` is the element (or, of fill, the rank) asked for.
    pub fn example(&self, hint: Hint, list: &[u32], place: usize) -> Example {
        let mut prompt = list.to_vec();
        let mut sorted = list.to_vec();
        sorted.sort_unstable();
        let (Some(&x), Some(&small), Some(&large)) =
            (list.get(place), sorted.first(), sorted.last())
        else {
            // An empty list, or a place outside it: nothing to say.
            prompt.push(self.query(hint));
            return Example {
                prompt,
                answer: vec![EOS],
            };
        };
        let count = list.iter().filter(|&&y| y == x).count();
        let above = sorted.iter().copied().find(|&y| y > x);
        let below = sorted.iter().rev().copied().find(|&y| y < x);
        prompt.push(self.query(hint));
        let answer = match hint {
            Hint::Successor => vec![above.unwrap_or(EOS)],
            Hint::Predecessor => vec![below.unwrap_or(self.none())],
            Hint::Count => {
                let digits = count.to_string();
                digits
                    .bytes()
                    .map(|b| self.digit(u32::from(b - b'0')))
                    .chain([EOS])
                    .collect()
            }
            Hint::Fill => {
                let value = sorted[place];
                prompt = sorted;
                prompt[place] = self.mask();
                prompt.push(self.query(hint));
                vec![value]
            }
            Hint::Parity => vec![self.digit(count as u32 % 2)],
            Hint::Min => vec![small],
            Hint::Max => vec![large],
        };
        if matches!(
            hint,
            Hint::Successor | Hint::Predecessor | Hint::Count | Hint::Parity
        ) {
            prompt.push(x);
        }
        Example { prompt, answer }
    }

    /// A random example about a random list of this length.
    pub fn sample(&self, hint: Hint, length: usize, random: &mut Random) -> Example {
        let mut list = self.sort.sample(length.max(1), random).prompt;
        list.pop(); // SEP
        let place = random.below(list.len() as u64) as usize;
        self.example(hint, &list, place)
    }
}

/// One more than a number of exactly `length` digits (paper 51's second task).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Increment {
    /// Write both numbers with the least significant digit first.
    pub reversed: bool,
    /// Share of numbers that end in a run of nines of random length; without it long carries hardly occur.
    pub carries: f64,
}

impl Increment {
    /// Digits of a number, least significant first, and those of the number plus one.
    fn digits(&self, length: usize, random: &mut Random) -> (Vec<u32>, Vec<u32>) {
        let length = length.max(1);
        let mut digits: Vec<u32> = (0..length)
            .map(|place| {
                if place + 1 == length && length > 1 {
                    1 + random.below(9) as u32
                } else {
                    random.below(10) as u32
                }
            })
            .collect();
        if random.uniform() < self.carries {
            let run = random.between(1, length);
            digits[..run].fill(9);
        }
        let mut next = digits.clone();
        let nines = digits.iter().take_while(|&&d| d == 9).count();
        next[..nines].fill(0);
        match next.get_mut(nines) {
            Some(digit) => *digit += 1,
            None => next.push(1),
        }
        (digits, next)
    }

    /// The hint: does a carry reach the digit that stands `place` from the least significant one? The place is asked for by
    /// repeating the digits below it; the answer is 1 or 0.
    pub fn carry(&self, length: usize, random: &mut Random) -> Example {
        let (digits, _) = self.digits(length, random);
        let place = random.between(0, digits.len() - 1);
        let reached = digits[..place].iter().all(|&d| d == 9);
        let token = |digit: &u32| FIRST + digit;
        let mut prompt: Vec<u32> = digits.iter().map(token).collect();
        let mut below: Vec<u32> = digits[..place].iter().map(token).collect();
        if !self.reversed {
            prompt.reverse();
            below.reverse();
        }
        prompt.push(FIRST + 10);
        prompt.extend(below);
        prompt.push(SEP);
        Example {
            prompt,
            answer: vec![FIRST + u32::from(reached), EOS],
        }
    }
}

impl Tokens for Increment {
    fn vocab_size(&self) -> usize {
        // Ten digits and the hint's query.
        FIRST as usize + 11
    }

    fn sample(&self, length: usize, random: &mut Random) -> Example {
        let (digits, next) = self.digits(length, random);
        let tokens = |digits: Vec<u32>| -> Vec<u32> {
            let mut out: Vec<u32> = digits.iter().map(|d| FIRST + d).collect();
            if !self.reversed {
                out.reverse();
            }
            out
        };
        let mut prompt = tokens(digits);
        prompt.push(SEP);
        let mut answer = tokens(next);
        answer.push(EOS);
        Example { prompt, answer }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_are_those_of_a_search_and_never_longer_than_the_list() {
        let hinted = HintedSort {
            sort: Sort { values: 13 },
        };
        let mut random = Random::new(4, "hints");
        for round in 0..10_000 {
            let length = 1 + round % 20;
            let hint = Hint::ALL[round % Hint::ALL.len()];
            let Example { prompt, answer } = hinted.sample(hint, length, &mut random);
            assert!(prompt.len() <= length + 2);
            assert!(
                prompt
                    .iter()
                    .chain(&answer)
                    .all(|&t| (t as usize) < hinted.vocab_size())
            );
            let list = &prompt[..length];
            assert_eq!(prompt[length], hinted.query(hint));
            let x = *prompt.last().unwrap();
            let count = list.iter().filter(|&&y| y == x).count() as u32;
            match hint {
                Hint::Successor => {
                    let mut best = EOS;
                    for &y in list.iter().filter(|&&y| y > x) {
                        best = if best == EOS { y } else { best.min(y) };
                    }
                    assert_eq!(answer, [best]);
                }
                Hint::Predecessor => {
                    let best = list.iter().copied().filter(|&y| y < x).max();
                    assert_eq!(answer, [best.unwrap_or(hinted.none())]);
                }
                Hint::Count => {
                    let mut number = 0;
                    for &digit in &answer[..answer.len() - 1] {
                        number = number * 10 + (digit - hinted.digit(0));
                    }
                    assert_eq!((number, answer[answer.len() - 1]), (count, EOS));
                }
                Hint::Fill => {
                    let at = list.iter().position(|&t| t == hinted.mask()).unwrap();
                    let mut whole = list.to_vec();
                    whole[at] = answer[0];
                    assert!(whole.is_sorted());
                }
                Hint::Parity => assert_eq!(answer, [hinted.digit(count % 2)]),
                Hint::Min => assert_eq!(answer[0], *list.iter().min().unwrap()),
                Hint::Max => assert_eq!(answer[0], *list.iter().max().unwrap()),
            }
        }
    }

    #[test]
    fn increments_add_one_and_carries_run_through_nines() {
        let mut random = Random::new(5, "increments");
        let mut long = 0;
        for round in 0..10_000 {
            let length = 1 + round % 18;
            let task = Increment {
                reversed: round % 2 == 1,
                carries: 0.3,
            };
            let number = |tokens: &[u32]| -> u128 {
                let mut digits: Vec<u32> = tokens.iter().map(|t| t - FIRST).collect();
                if task.reversed {
                    digits.reverse();
                }
                digits
                    .iter()
                    .fold(0, |value, &d| value * 10 + u128::from(d))
            };
            let Example { prompt, answer } = task.sample(length, &mut random);
            assert_eq!(prompt.len(), length + 1);
            let (before, after) = (
                number(&prompt[..length]),
                number(&answer[..answer.len() - 1]),
            );
            assert_eq!(before + 1, after);
            let Example { prompt, answer } = task.carry(length, &mut random);
            let place = prompt.len() - length - 2;
            let below = 10u128.pow(place as u32);
            let reached = (number(&prompt[..length]) + 1) % below == 0;
            assert_eq!(answer, [FIRST + u32::from(reached), EOS], "{prompt:?}");
            long += usize::from(reached && place > 2);
        }
        assert!(long > 100, "{long}");
    }
}
