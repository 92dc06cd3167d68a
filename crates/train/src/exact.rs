//! Exact match: the share of a task's examples that a model answers right to the last token, writing greedily.

use crate::error::Result;
use longspan_data::random::Random;
use longspan_data::task::{Example, Tokens};
use longspan_nn::model::StackLm;
use std::collections::BTreeMap;

/// Share of `count` fresh examples of this length that are answered exactly. The model writes on its own; the right answer
/// is never shown to it. The examples follow from `seed` and are not those of training.
pub fn exact_match(
    model: &StackLm,
    task: &dyn Tokens,
    length: usize,
    count: usize,
    seed: u64,
) -> Result<f64> {
    let mut random = Random::new(seed, &format!("test examples of length {length}"));
    // Examples with equally long prompts go through the model together.
    let mut groups: BTreeMap<usize, Vec<Example>> = BTreeMap::new();
    for _ in 0..count {
        let example = task.sample(length, &mut random);
        groups
            .entry(example.prompt.len())
            .or_default()
            .push(example);
    }
    let mut right = 0;
    for examples in groups.into_values() {
        let longest = examples.iter().map(|e| e.answer.len()).max().unwrap_or(0);
        let prompts: Vec<Vec<u32>> = examples.iter().map(|e| e.prompt.clone()).collect();
        let written = model.greedy(&prompts, longest)?;
        right += examples
            .iter()
            .zip(written)
            .filter(|(example, written)| written.starts_with(&example.answer))
            .count();
    }
    Ok(right as f64 / count.max(1) as f64)
}
