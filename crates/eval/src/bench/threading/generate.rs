//! Key-value haystacks and threads through them (paper 43), from CPython's random stream, so that
//! published haystacks come out again.

use crate::python::Random;
use serde::{Deserialize, Serialize};

/// Characters of a pair in the printed object.
pub const PAIR_CHARS: usize = 80;

/// `{"k0": "v0", "k1": "v1", ...}` as pairs; a value may be a list (branched threads).
#[derive(Clone, Debug, PartialEq)]
pub struct Haystack {
    /// Keys in printed order.
    pub keys: Vec<String>,
    /// One value per key, or several.
    pub values: Vec<Vec<String>>,
}

/// Order of a thread's positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Towards the end.
    Forward,
    /// Towards the start.
    Backward,
    /// Any.
    Random,
}

impl Direction {
    /// All three.
    pub const ALL: [Direction; 3] = [Direction::Forward, Direction::Backward, Direction::Random];

    /// As the files spell it.
    pub fn name(self) -> &'static str {
        match self {
            Direction::Forward => "forward",
            Direction::Backward => "backward",
            Direction::Random => "random",
        }
    }
}

impl Haystack {
    /// `n` pairs of UUIDs without version bits, in order k0, v0, k1, v1, ...
    pub fn new(n: usize, random: &mut Random) -> Haystack {
        let mut haystack = Haystack {
            keys: Vec::with_capacity(n),
            values: Vec::with_capacity(n),
        };
        for _ in 0..n {
            haystack.keys.push(random.uuid());
            haystack.values.push(vec![random.uuid()]);
        }
        haystack
    }

    /// The printed object; 80 characters a pair while values are single.
    pub fn text(&self) -> String {
        let mut text = String::with_capacity(PAIR_CHARS * self.keys.len());
        for (index, (key, values)) in self.keys.iter().zip(&self.values).enumerate() {
            text += if index == 0 { "{\"" } else { ", \"" };
            text += key;
            text += "\": ";
            match values.as_slice() {
                [value] => {
                    text.push('"');
                    text += value;
                    text.push('"');
                }
                values => {
                    text += "[\"";
                    text += &values.join("\", \"");
                    text += "\"]";
                }
            }
        }
        text.push('}');
        text
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// True without pairs.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Makes a chain through these positions: the value at each is the key of the next. Returns
    /// (first key, answer): the last value stays.
    pub fn chain(&mut self, positions: &[usize]) -> (String, String) {
        for pair in positions.windows(2) {
            self.values[pair[0]] = vec![self.keys[pair[1]].clone()];
        }
        let (first, last) = (positions[0], positions[positions.len() - 1]);
        (self.keys[first].clone(), self.values[last][0].clone())
    }
}

/// The pair at a depth in percent.
pub fn depth_index(n: usize, depth: f64) -> usize {
    ((n as f64 * depth / 100.0).floor() as usize).min(n.saturating_sub(1))
}

/// `length` positions of `free`, in the order of the direction; they are taken out of `free`.
pub fn positions(
    free: &mut Vec<usize>,
    length: usize,
    direction: Direction,
    random: &mut Random,
) -> Vec<usize> {
    let drawn = random.sample_indices(free.len(), length);
    let mut chosen: Vec<usize> = drawn.iter().map(|&at| free[at]).collect();
    free.retain(|position| !chosen.contains(position));
    match direction {
        Direction::Forward => chosen.sort(),
        Direction::Backward => chosen.sort_by(|a, b| b.cmp(a)),
        Direction::Random => {}
    }
    chosen
}
