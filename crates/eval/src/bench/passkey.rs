//! Passkey retrieval (paper 57, after Landmark Attention): one number in repeated filler. The
//! quickest test of whether a model sees all of its context.

use super::{attr, largest};
use crate::error::{EvalError, Result};
use crate::python::{Random, chars};
use crate::task::*;
use std::collections::BTreeMap;
use std::sync::Arc;

const TASK: &str = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about the important information there.";
const FILLER: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";
const QUESTION: &str = "What is the pass key?";
const PREFIX: &str = " The pass key is";
/// Most tokens of an answer.
const MAX_NEW: usize = 10;

/// The first `count` characters of the filler, repeated with a space between.
fn garbage(count: usize) -> String {
    format!("{FILLER} ").repeat(count / (FILLER.len() + 1) + 1)[..count].to_string()
}

/// The document: everything before the question, with `before` of `total` filler characters before
/// the key. Both parts of the filler start at its beginning, as published.
pub fn document(total: usize, before: usize, key: i64) -> String {
    format!(
        "{TASK}\n{}\nThe pass key is {key}. Remember it. {key} is the pass key.\n{}\n",
        garbage(before),
        garbage(total - before)
    )
}

/// The published prompt for a seed: (filler characters before the key, key, prompt).
pub fn published(seed: i64, total: usize) -> (usize, i64, String) {
    let mut random = Random::new(seed);
    let before = random.randint(0, total as i64) as usize;
    let key = random.randint(1, 50_000);
    let prompt = document(total, before, key) + QUESTION + PREFIX;
    (before, key, prompt)
}

/// See the module's text.
pub struct Passkey {
    meta: TaskMeta,
}

impl Passkey {
    /// The task.
    pub fn task() -> Arc<dyn Task> {
        Arc::new(Passkey {
            meta: TaskMeta {
                id: "passkey".into(),
                version: 1,
                ability: "retrieval of a number from filler",
                metric: "accuracy",
                higher_is_better: true,
                best: 1.0,
                floor: 0.0,
                unit: Unit::Tokens,
                lengths: &[512, 1024, 2048, 4096],
                depths: true,
                source: "arXiv 2305.16300",
                licence: "generated",
            },
        })
    }
}

impl Task for Passkey {
    fn meta(&self) -> &TaskMeta {
        &self.meta
    }

    fn samples(&self, cx: &SampleCx<'_>) -> Result<Vec<Sample>> {
        let limit = cx.length.saturating_sub(MAX_NEW + cx.counter.overhead());
        let size = largest(cx.length * 8, limit, |total| {
            let text = document(total, total / 2, 12_345) + QUESTION + PREFIX;
            cx.counter.count(&text)
        })?;
        let Some(total) = size else {
            return Err(EvalError::Input(format!(
                "passkey: {} tokens do not hold the question; take a longer text",
                cx.length
            )));
        };
        let mut all = Vec::new();
        for &depth in cx.depths {
            for repeat in 0..cx.samples {
                // A key of its own for every sample of every length.
                let mut random = Random::from_text(&format!(
                    "passkey {} {} {depth} {repeat}",
                    cx.seed, cx.length
                ));
                let key = random.randint(1, 50_000);
                let before = (total as f64 * depth / 100.0) as usize;
                let attrs = BTreeMap::from([attr("depth", depth), attr("repeat", repeat)]);
                all.push(Sample::new(
                    Prompt::ask(document(total, before, key), QUESTION).prefixed(PREFIX),
                    Work::Generate(Decode {
                        max_new: MAX_NEW,
                        stop: vec!["\n".into()],
                    }),
                    vec![key.to_string()],
                    attrs,
                    format!(" {key}."),
                ));
            }
        }
        Ok(all)
    }

    fn score(&self, row: &Prediction) -> Scored {
        let first = chars::numbers(&row.text).next().map(str::to_string);
        let hit = row.references.first() == first.as_ref();
        Scored::new(row, f64::from(u8::from(hit)), first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_number_counts() {
        let task = Passkey::task();
        let row = |text: &str| Prediction {
            text: text.into(),
            references: vec!["4711".into()],
            ..Prediction::default()
        };
        for (text, value) in [
            (" 4711.", 1.0),
            ("12 or 4711", 0.0),
            ("none", 0.0),
            (" 47110", 0.0),
        ] {
            assert_eq!(task.score(&row(text)).value, value, "{text}");
        }
        assert_eq!(task.score(&row("none")).extracted, None);
    }
}
