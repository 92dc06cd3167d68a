//! Targets that need no model: the oracle, the constant, and stored replies.

use super::{Output, Target};
use crate::count::{Counter, Words};
use crate::error::{EvalError, Result};
use crate::task::{Likelihood, Prediction, Protocol, Sample, Work};
use std::collections::HashMap;

/// The constant target spreads likelihood over this many symbols.
pub const CONSTANT_SYMBOLS: f64 = 256.0;

/// Likelihoods of a word-counted text in which every scored token has this nll.
fn flat(sample: &Sample, protocol: Protocol, tokens: usize, nll: f32) -> Result<Likelihood> {
    let text = sample.prompt.text();
    let text = Words.cut(&text, tokens)?;
    let total = Words.count(text)?;
    let scored = crate::ppl::scored(total, protocol);
    Ok(Likelihood {
        nll: scored.iter().map(|&scored| scored.then_some(nll)).collect(),
        bytes: text.len(),
        words: text.split_whitespace().count(),
        bos: false,
    })
}

fn output(sample: &Sample, text: &str, nll: f32) -> Result<Output> {
    let mut output = Output {
        finish: "stop".into(),
        tokens_in: Words.count(&sample.prompt.text())?,
        ..Output::default()
    };
    match sample.work {
        Work::Generate(_) | Work::Search { .. } => {
            output.tokens_out = Words.count(text)?;
            output.text = text.into();
        }
        Work::Likelihood { protocol, tokens } => {
            output.likelihood = Some(flat(sample, protocol, tokens, nll)?);
        }
    }
    Ok(output)
}

/// Always right.
pub struct Oracle;

impl Target for Oracle {
    fn model(&self) -> String {
        "oracle".into()
    }

    fn identity(&self) -> Option<String> {
        None
    }

    fn counter(&self) -> &dyn Counter {
        &Words
    }

    fn run(&self, sample: &Sample, _seed: u64) -> Result<Output> {
        output(sample, &sample.oracle, 0.0)
    }
}

/// Always says the same; as a language model it gives 256 symbols one probability.
pub struct Constant {
    /// What it says.
    pub reply: String,
}

impl Default for Constant {
    fn default() -> Self {
        Constant {
            reply: "I do not know.".into(),
        }
    }
}

impl Target for Constant {
    fn model(&self) -> String {
        "constant".into()
    }

    fn identity(&self) -> Option<String> {
        None
    }

    fn counter(&self) -> &dyn Counter {
        &Words
    }

    fn run(&self, sample: &Sample, _seed: u64) -> Result<Output> {
        output(sample, &self.reply, CONSTANT_SYMBOLS.ln() as f32)
    }
}

/// Replies of an earlier run, by sample id.
pub struct Recorded {
    name: String,
    rows: HashMap<String, Prediction>,
}

impl Recorded {
    /// From prediction rows; a later row with the same id replaces an earlier one.
    pub fn new(name: &str, rows: impl IntoIterator<Item = Prediction>) -> Recorded {
        Recorded {
            name: name.into(),
            rows: rows.into_iter().map(|row| (row.id.clone(), row)).collect(),
        }
    }
}

impl Target for Recorded {
    fn model(&self) -> String {
        self.name.clone()
    }

    fn identity(&self) -> Option<String> {
        None
    }

    fn counter(&self) -> &dyn Counter {
        &Words
    }

    fn run(&self, sample: &Sample, _seed: u64) -> Result<Output> {
        let row = self.rows.get(&sample.id).ok_or_else(|| {
            EvalError::Input(format!(
                "the recorded replies have none for sample {}; they were made with other options",
                sample.id
            ))
        })?;
        Ok(Output {
            text: row.text.clone(),
            finish: row.finish.clone(),
            tokens_in: row.tokens_in,
            tokens_out: row.tokens_out,
            truncated: row.truncated,
            error: row.error.clone(),
            likelihood: row.likelihood.clone(),
            cost: Default::default(),
        })
    }
}
