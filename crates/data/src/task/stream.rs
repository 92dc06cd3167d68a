//! Token streams in which some tokens follow from what was read: selective copying, associative recall, and values that are
//! written again and again (papers 16, 28, 29).

use crate::random::Random;
use serde::{Deserialize, Serialize};

/// A sequence, and which of its tokens can be known from those before.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Marked {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// True where the token follows from the ones before it.
    pub known: Vec<bool>,
}

impl Marked {
    fn push(&mut self, token: u32, known: bool) {
        self.tokens.push(token);
        self.known.push(known);
    }
}

/// A task over streams.
pub trait Streams: Send + Sync {
    /// One more than the largest token id.
    fn vocab_size(&self) -> usize;
    /// A stream of this many tokens (or as few more as the task needs).
    fn sample(&self, length: usize, random: &mut Random) -> Marked;
}

/// Data tokens at random places among noise, to be written in order at the end (Gu and Dao 2023).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SelectiveCopy {
    /// Tokens to copy.
    pub data: usize,
    /// Different data tokens.
    pub symbols: usize,
}

impl Default for SelectiveCopy {
    fn default() -> Self {
        SelectiveCopy {
            data: 16,
            symbols: 14,
        }
    }
}

/// Noise, or "nothing here".
const NOISE: u32 = 0;
/// Asks for the answer.
const ASK: u32 = 1;
/// First id of a task's own symbols.
const FIRST: u32 = 2;

impl Streams for SelectiveCopy {
    fn vocab_size(&self) -> usize {
        FIRST as usize + self.symbols.max(1)
    }

    /// `length` tokens of noise and data, then the question and the answer.
    fn sample(&self, length: usize, random: &mut Random) -> Marked {
        let length = length.max(self.data);
        let mut places: Vec<usize> = (0..length).collect();
        random.shuffle(&mut places);
        let mut row = vec![NOISE; length];
        for &place in &places[..self.data] {
            row[place] = FIRST + random.below(self.symbols.max(1) as u64) as u32;
        }
        let mut out = Marked::default();
        row.iter().for_each(|&token| out.push(token, false));
        out.push(ASK, false);
        row.iter()
            .filter(|&&token| token != NOISE)
            .for_each(|&token| out.push(token, true));
        out
    }
}

/// Pairs of key and value, then keys again among noise, each followed by its value (multi-query associative recall).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recall {
    /// Pairs of an example; all keys differ.
    pub pairs: usize,
    /// Different keys.
    pub keys: usize,
    /// Different values.
    pub values: usize,
    /// Pairs are drawn from 1 to `pairs` per example.
    pub varied: bool,
}

impl Default for Recall {
    fn default() -> Self {
        Recall {
            pairs: 8,
            keys: 32,
            values: 32,
            varied: false,
        }
    }
}

impl Streams for Recall {
    fn vocab_size(&self) -> usize {
        FIRST as usize + self.keys + self.values
    }

    fn sample(&self, length: usize, random: &mut Random) -> Marked {
        let most = self.pairs.clamp(1, self.keys.max(1));
        let pairs = if self.varied {
            random.between(1, most)
        } else {
            most
        };
        let mut keys: Vec<u32> = (0..self.keys as u32).collect();
        random.shuffle(&mut keys);
        let values = FIRST + self.keys as u32;
        let pairs: Vec<(u32, u32)> = keys[..pairs]
            .iter()
            .map(|&key| {
                let value = values + random.below(self.values.max(1) as u64) as u32;
                (FIRST + key, value)
            })
            .collect();
        let mut out = Marked::default();
        for &(key, value) in &pairs {
            out.push(key, false);
            out.push(value, false);
        }
        // Every key is asked once, at random places; the rest is noise.
        let room = length.saturating_sub(2 * pairs.len()).max(2 * pairs.len());
        let mut order = pairs.clone();
        random.shuffle(&mut order);
        let mut slots: Vec<usize> = (0..room / 2).collect();
        random.shuffle(&mut slots);
        let mut asked: Vec<(usize, (u32, u32))> = slots.into_iter().zip(order).collect();
        asked.sort_unstable();
        let mut next = asked.into_iter().peekable();
        for slot in 0..room / 2 {
            match next.next_if(|(at, _)| *at == slot) {
                Some((_, (key, value))) => {
                    out.push(key, false);
                    out.push(value, true);
                }
                None => {
                    out.push(NOISE, false);
                    out.push(NOISE, false);
                }
            }
        }
        out
    }
}

/// A stream of pairs of key and value; now and then a key gets a new value, and the last one counts. Reading on for ever
/// asks for forgetting.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rewrite {
    /// Different keys.
    pub keys: usize,
    /// Different values.
    pub values: usize,
    /// Chance that a pair brings a new value for its key.
    pub change: f64,
    /// Values count as known where their key came within so many tokens before; none = however long ago. Loss at every
    /// position is then of questions that a reader of so many tokens can answer.
    pub horizon: Option<usize>,
}

impl Default for Rewrite {
    fn default() -> Self {
        Rewrite {
            keys: 32,
            values: 16,
            change: 0.25,
            horizon: None,
        }
    }
}

impl Streams for Rewrite {
    fn vocab_size(&self) -> usize {
        FIRST as usize + self.keys + self.values
    }

    fn sample(&self, length: usize, random: &mut Random) -> Marked {
        // Value, and where it was written last.
        let mut held: Vec<Option<(u32, usize)>> = vec![None; self.keys.max(1)];
        let values = FIRST + self.keys as u32;
        let mut out = Marked::default();
        while out.tokens.len() < length {
            let key = random.below(held.len() as u64) as usize;
            let changes = random.uniform() < self.change;
            out.push(FIRST + key as u32, false);
            let at = out.tokens.len();
            let value = match held[key] {
                Some((value, _)) if !changes => value,
                _ => values + random.below(self.values.max(1) as u64) as u32,
            };
            let near = |last: usize| self.horizon.is_none_or(|most| at - last <= most);
            let known = !changes && held[key].is_some_and(|(_, last)| near(last));
            held[key] = Some((value, at));
            out.push(value, known);
        }
        out
    }
}

/// A stream task by name, as recipes write it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "task", rename_all = "kebab-case", deny_unknown_fields)]
pub enum StreamTask {
    /// Copy what is not noise.
    SelectiveCopy(SelectiveCopy),
    /// Values by their keys.
    Recall(Recall),
    /// Values that change.
    Rewrite(Rewrite),
}

impl StreamTask {
    /// The task behind the name.
    pub fn get(&self) -> &dyn Streams {
        match self {
            StreamTask::SelectiveCopy(task) => task,
            StreamTask::Recall(task) => task,
            StreamTask::Rewrite(task) => task,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn copies_are_the_data_in_order() {
        let task = SelectiveCopy::default();
        let row = task.sample(100, &mut Random::new(1, "test"));
        assert_eq!(row.tokens.len(), 100 + 1 + 16);
        let data: Vec<u32> = row.tokens[..100]
            .iter()
            .copied()
            .filter(|&t| t != NOISE)
            .collect();
        assert_eq!(&row.tokens[101..], &data[..]);
        assert!(row.known[101..].iter().all(|&k| k) && !row.known[..101].iter().any(|&k| k));
        assert!(row.tokens.iter().all(|&t| (t as usize) < task.vocab_size()));
    }

    #[test]
    fn a_horizon_only_unmarks_what_lies_further_back() {
        let sample = |horizon: Option<usize>| {
            let task = Rewrite {
                horizon,
                ..Rewrite::default()
            };
            task.sample(400, &mut Random::new(2, "test"))
        };
        let (all, near) = (sample(None), sample(Some(40)));
        assert_eq!(all.tokens, near.tokens);
        let (mut kept, mut dropped) = (0, 0);
        for t in (1..400).step_by(2).filter(|&t| all.known[t]) {
            let last = (0..t - 1)
                .rev()
                .find(|&s| all.tokens[s] == all.tokens[t - 1]);
            let within = t - 1 - last.unwrap() <= 40;
            assert_eq!(near.known[t], within);
            *(if within { &mut kept } else { &mut dropped }) += 1;
        }
        assert!(kept > 20 && dropped > 20, "{kept}, {dropped}");
    }

    #[test]
    fn what_is_marked_known_follows_from_the_past() {
        let recall = Recall {
            varied: true,
            ..Recall::default()
        };
        let rewrite = Rewrite::default();
        let tasks: [&dyn Streams; 2] = [&recall, &rewrite];
        for task in tasks {
            let mut random = Random::new(3, "test");
            let mut known = 0;
            for _ in 0..20 {
                let row = task.sample(128, &mut random);
                let mut held = HashMap::new();
                for t in (0..row.tokens.len()).step_by(2) {
                    let (key, value) = (row.tokens[t], row.tokens[t + 1]);
                    assert!((value as usize) < task.vocab_size() && !row.known[t]);
                    if row.known[t + 1] {
                        assert_eq!(held.get(&key), Some(&value));
                        known += 1;
                    }
                    held.insert(key, value);
                }
            }
            assert!(known > 50, "{known}");
        }
        let row = recall.sample(128, &mut Random::new(5, "test"));
        assert_eq!(row, recall.sample(128, &mut Random::new(5, "test")));
    }
}
