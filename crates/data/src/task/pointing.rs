//! Tasks whose answers are positions of their input (papers 08 and 39): a list or set of vectors in, a list of indices out.

use super::geometry::Geometry;
use crate::random::Random;
use serde::{Deserialize, Serialize};

/// One example.
#[derive(Clone, Debug, PartialEq)]
pub struct PointingExample {
    /// [n, dim], row-major.
    pub inputs: Vec<f32>,
    /// Indices from 0.
    pub answer: Vec<usize>,
}

/// A task over n vectors.
pub trait Pointing: Send + Sync {
    /// Numbers of one element.
    fn dim(&self) -> usize;
    /// True when the answer's length is not that of the input: the model must say where it ends.
    fn ends(&self) -> bool;
    /// An example of n elements.
    fn sample(&self, n: usize, random: &mut Random) -> PointingExample;
}

/// Sorting a set of numbers (paper 08): n uniform in 0..1, answered by their indices in ascending or other order.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SortSet {
    /// The order in which the answer is to be written.
    pub order: AnswerOrder,
}

/// Orders of an answer that is a set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AnswerOrder {
    /// Smallest first.
    #[default]
    Ascending,
    /// A fixed order of ranks without sense: 2nd, 5th, 1st, ... as a seeded shuffle of the ranks says.
    Scrambled,
}

impl Pointing for SortSet {
    fn dim(&self) -> usize {
        1
    }

    fn ends(&self) -> bool {
        false
    }

    fn sample(&self, n: usize, random: &mut Random) -> PointingExample {
        let inputs: Vec<f32> = (0..n).map(|_| random.uniform() as f32).collect();
        let mut answer: Vec<usize> = (0..n).collect();
        // Equal numbers keep the order of the input.
        answer.sort_by(|&a, &b| inputs[a].total_cmp(&inputs[b]));
        if self.order == AnswerOrder::Scrambled {
            let mut ranks: Vec<usize> = (0..n).collect();
            Random::new(n as u64, "scrambled ranks").shuffle(&mut ranks);
            answer = ranks.iter().map(|&rank| answer[rank]).collect();
        }
        PointingExample { inputs, answer }
    }
}

/// A pointing task by name, as recipes write it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "task", rename_all = "kebab-case", deny_unknown_fields)]
pub enum PointingTask {
    /// Hulls, triangulations, tours.
    Geometry(Geometry),
    /// Numbers in order.
    Sort(SortSet),
}

impl PointingTask {
    /// The task behind the name.
    pub fn get(&self) -> &dyn Pointing {
        match self {
            PointingTask::Geometry(task) => task,
            PointingTask::Sort(task) => task,
        }
    }
}
