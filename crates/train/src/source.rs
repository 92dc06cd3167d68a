//! What is read next. A source is a pure function of its state, and the state is a small JSON value: resuming a run is
//! loading it. The order of batches does not depend on how many ranks share the work.

use crate::batch::PackedBatch;
use crate::error::{Result, TrainError};
use longspan_data::random::Random;
use longspan_data::task::{TokenTask, Tokens};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A stream of micro-batches.
pub trait Source: Send {
    /// One micro-batch.
    type Batch;
    /// The next `count` micro-batches: one global batch. Fewer or none when the stream ends.
    fn next(&mut self, count: usize) -> Result<Vec<Self::Batch>>;
    /// Where the stream is.
    fn state(&self) -> Value;
    /// Goes on from a stored state.
    fn load(&mut self, state: &Value) -> Result<()>;
}

pub(crate) fn state_from<T: serde::de::DeserializeOwned>(state: &Value) -> Result<T> {
    serde_json::from_value(state.clone()).map_err(|error| {
        let expected = format!("the state of this kind of data ({error})");
        TrainError::option("source state", state, expected)
    })
}

/// Documents of tokens, shuffled every epoch, cut to at most `length` tokens and packed into micro-batches.
pub struct TextSource {
    documents: Vec<Vec<u32>>,
    length: usize,
    tokens: usize,
    seed: u64,
    at: TextState,
    order: Vec<usize>,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TextState {
    epoch: u64,
    /// Place in the epoch's order.
    document: usize,
    /// Tokens of that document already given out.
    offset: usize,
}

impl TextSource {
    /// `length`: longest piece of a document; `tokens`: size of a micro-batch.
    pub fn new(documents: Vec<Vec<u32>>, length: usize, tokens: usize, seed: u64) -> Result<Self> {
        let documents: Vec<Vec<u32>> = documents.into_iter().filter(|d| d.len() > 1).collect();
        if documents.is_empty() {
            let found = "no document of two tokens or more";
            return Err(TrainError::option("data", found, "text"));
        }
        if length < 2 || tokens < length {
            return Err(TrainError::option(
                "data.length, data.tokens",
                format!("{length} and {tokens}"),
                "a length of 2 or more, and at least as many tokens a micro-batch",
            ));
        }
        let mut source = TextSource {
            documents,
            length,
            tokens,
            seed,
            at: TextState::default(),
            order: Vec::new(),
        };
        source.shuffle();
        Ok(source)
    }

    fn shuffle(&mut self) {
        self.order = (0..self.documents.len()).collect();
        Random::new(self.seed, &format!("order of epoch {}", self.at.epoch))
            .shuffle(&mut self.order);
    }
}

impl Source for TextSource {
    type Batch = PackedBatch;

    fn next(&mut self, count: usize) -> Result<Vec<PackedBatch>> {
        let mut out = Vec::with_capacity(count);
        for _ in 0..count {
            let mut batch = PackedBatch::default();
            while batch.tokens() + 2 <= self.tokens {
                let document = &self.documents[self.order[self.at.document]];
                let rest = &document[self.at.offset..];
                let take = rest
                    .len()
                    .min(self.length)
                    .min(self.tokens - batch.tokens());
                batch.push_text(&rest[..take]);
                // The last token of a piece starts the next: it has not been a context yet.
                self.at.offset += take.max(2) - 1;
                if document.len() - self.at.offset < 2 {
                    self.at.offset = 0;
                    self.at.document += 1;
                    if self.at.document == self.documents.len() {
                        self.at.document = 0;
                        self.at.epoch += 1;
                        self.shuffle();
                    }
                }
            }
            out.push(batch);
        }
        Ok(out)
    }

    fn state(&self) -> Value {
        serde_json::to_value(self.at).unwrap_or(Value::Null)
    }

    fn load(&mut self, state: &Value) -> Result<()> {
        let at: TextState = state_from(state)?;
        let documents = &self.documents;
        if at.document >= documents.len() {
            return Err(TrainError::option(
                "source state: document",
                at.document,
                format!("below {}, as many documents as there are", documents.len()),
            ));
        }
        self.at = at;
        self.shuffle();
        if at.offset + 2 > self.documents[self.order[at.document]].len() {
            return Err(TrainError::option(
                "source state: offset",
                at.offset,
                "a place inside the document",
            ));
        }
        Ok(())
    }
}

/// Examples of a synthetic task, of lengths drawn uniformly from a range.
pub struct TaskSource {
    task: TokenTask,
    lengths: (usize, usize),
    examples: usize,
    random: Random,
}

impl TaskSource {
    /// `examples`: size of a micro-batch; lengths are uniform in `lengths.0..=lengths.1`.
    pub fn new(
        task: TokenTask,
        lengths: (usize, usize),
        examples: usize,
        seed: u64,
    ) -> Result<Self> {
        if lengths.0 > lengths.1 || examples == 0 {
            return Err(TrainError::option(
                "data.lengths, data.examples",
                format!("{lengths:?} and {examples}"),
                "a range from small to large, and 1 example or more",
            ));
        }
        Ok(TaskSource {
            task,
            lengths,
            examples,
            random: Random::new(seed, "task examples"),
        })
    }
}

impl Source for TaskSource {
    type Batch = PackedBatch;

    fn next(&mut self, count: usize) -> Result<Vec<PackedBatch>> {
        let task: &dyn Tokens = self.task.get();
        Ok((0..count)
            .map(|_| {
                let mut batch = PackedBatch::default();
                for _ in 0..self.examples {
                    let length = self.random.between(self.lengths.0, self.lengths.1);
                    let example = task.sample(length, &mut self.random);
                    batch.push_example(&example.prompt, &example.answer);
                }
                batch
            })
            .collect())
    }

    fn state(&self) -> Value {
        self.random.state().into()
    }

    fn load(&mut self, state: &Value) -> Result<()> {
        self.random = Random::from_state(state_from(state)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(seed: u64) -> TextSource {
        let documents = (0..7u32)
            .map(|d| (0..5 + 3 * d).map(|t| 100 * d + t).collect())
            .collect();
        TextSource::new(documents, 8, 20, seed).unwrap()
    }

    #[test]
    fn an_epoch_predicts_every_token_once() {
        let mut source = text(1);
        let mut seen = Vec::new();
        while source.at.epoch == 0 {
            let batch = source.next(1).unwrap().remove(0);
            batch.check(1000).unwrap();
            assert!(batch.tokens() <= 20 && batch.lengths.iter().all(|&l| l <= 8));
            for (target, weight) in batch.targets.iter().zip(&batch.weights) {
                if *weight > 0.0 {
                    seen.push(*target);
                }
            }
        }
        let first: std::collections::BTreeSet<u32> = seen.iter().copied().collect();
        let all: Vec<u32> = (0..7u32)
            .flat_map(|d| (1..5 + 3 * d).map(move |t| 100 * d + t))
            .collect();
        assert!(all.iter().all(|token| first.contains(token)));
        assert!(all.iter().all(|token| token % 100 != 0));
        // The batch that ended the epoch may hold a few tokens of the next.
        assert!(
            seen.len() < all.len() + 20,
            "{} of {}",
            seen.len(),
            all.len()
        );
    }

    fn resumes<S: Source<Batch = PackedBatch>>(make: impl Fn() -> S) {
        let mut whole = make();
        whole.next(13).unwrap();
        let state = whole.state();
        let rest = whole.next(30).unwrap();
        let mut resumed = make();
        resumed.load(&state).unwrap();
        assert_eq!(resumed.next(30).unwrap(), rest);
        assert!(resumed.load(&serde_json::json!({"what": 1})).is_err());
    }

    #[test]
    fn sources_resume_from_their_state() {
        resumes(|| text(3));
        let task: TokenTask = serde_json::from_str(r#"{"task": "sort", "values": 10}"#).unwrap();
        resumes(move || TaskSource::new(task.clone(), (2, 9), 3, 5).unwrap());
        assert!(TextSource::new(vec![vec![1]], 8, 8, 0).is_err());
        let outside = serde_json::json!({"epoch": 0, "document": 99, "offset": 0});
        assert!(text(1).load(&outside).is_err());
    }
}
