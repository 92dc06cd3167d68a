//! Packed batches: documents lie flat, one after the other, and never see each other.

use crate::error::{Result, TrainError};

/// Tokens of several documents with the target and the weight of each.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PackedBatch {
    /// Token ids: [tokens].
    pub ids: Vec<u32>,
    /// The token to predict at each position; meaningless where the weight is 0: [tokens].
    pub targets: Vec<u32>,
    /// Weight of each position's loss: [tokens].
    pub weights: Vec<f32>,
    /// Length of each document; they sum to the number of tokens.
    pub lengths: Vec<usize>,
}

impl PackedBatch {
    /// A document every token of which, but the first, is a target. A document of one token has none.
    pub fn push_text(&mut self, tokens: &[u32]) {
        self.push(tokens, |_| 1.0);
    }

    /// Prompt and answer; only the answer is a target.
    pub fn push_example(&mut self, prompt: &[u32], answer: &[u32]) {
        let tokens = [prompt, answer].concat();
        self.push(
            &tokens,
            |index| {
                if index >= prompt.len() { 1.0 } else { 0.0 }
            },
        );
    }

    /// A document; `weight(i)` is that of token i as a target.
    pub fn push(&mut self, tokens: &[u32], weight: impl Fn(usize) -> f32) {
        if tokens.is_empty() {
            return;
        }
        self.ids.extend(tokens);
        self.targets.extend(&tokens[1..]);
        self.targets.push(0);
        self.weights.extend((1..tokens.len()).map(weight));
        self.weights.push(0.0);
        self.lengths.push(tokens.len());
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Σ of the weights: what the loss of a global batch is divided by.
    pub fn total_weight(&self) -> f64 {
        self.weights.iter().map(|&w| f64::from(w)).sum()
    }

    /// Checks that all parts agree with each other and with the vocabulary.
    pub fn check(&self, vocab_size: usize) -> Result<()> {
        let tokens = self.ids.len();
        let lengths: usize = self.lengths.iter().sum();
        if [self.targets.len(), self.weights.len(), lengths] != [tokens; 3] {
            return Err(TrainError::option(
                "batch",
                format!(
                    "{} targets, {} weights, documents of {lengths} tokens in all",
                    self.targets.len(),
                    self.weights.len()
                ),
                format!("{tokens} of each, as there are ids"),
            ));
        }
        let largest = self.ids.iter().chain(&self.targets).max();
        match largest {
            Some(&id) if id as usize >= vocab_size => Err(TrainError::option(
                "batch",
                format!("token id {id}"),
                format!("ids below the vocabulary of {vocab_size}"),
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_stay_inside_documents() {
        let mut batch = PackedBatch::default();
        batch.push_text(&[5, 6, 7]);
        batch.push_text(&[]);
        batch.push_text(&[8]);
        batch.push_example(&[1, 2], &[3, 4]);
        assert_eq!(batch.ids, [5, 6, 7, 8, 1, 2, 3, 4]);
        assert_eq!(batch.targets, [6, 7, 0, 0, 2, 3, 4, 0]);
        assert_eq!(batch.weights, [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]);
        assert_eq!(batch.lengths, [3, 1, 4]);
        assert_eq!(batch.total_weight(), 4.0);
        batch.check(9).unwrap();
        assert!(batch.check(8).unwrap_err().to_string().contains("8"));
        batch.lengths.pop();
        assert!(batch.check(9).is_err());
    }
}
