//! L-Eval's pairwise judge: two answers to one question, shown in both orders, with the reference answer but without
//! the document. The judge is any [`Judge`]: an endpoint, a local model, a script.

use serde::{Deserialize, Serialize};

use super::template_of_judge;
use crate::bench::judge::{Judge, in_parallel};
use crate::error::Result;
use crate::metric::pairwise::Tally;

/// A question with both answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pair {
    pub question: String,
    pub reference: String,
    pub model: String,
    pub baseline: String,
}

/// The judge's system message and the question with two answers in the given order.
pub fn prompt(question: &str, reference: &str, first: &str, second: &str) -> (String, String) {
    let user = format!(
        "[Question]\n{question}\n\n[Reference Answer]\n{reference}\n\n[Answer of Assistant A]\n{first}\n[End of Answer \
         A]\n\n[Answer of Assistant B]\n{second}\n[End of Answer B]"
    );
    (template_of_judge().to_string(), user)
}

/// What a pairwise comparison gave.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub tally: Tally,
    /// The judge's replies: model first, model second.
    pub replies: Vec<(String, String)>,
    /// Mean length of the model's and the baseline's answers, in words.
    pub mean_words: (f64, f64),
}

/// Judges every pair twice, in both orders. What the judge cannot answer should come back as text without a verdict
/// ("$ERROR$"), which is counted and left out of the rate.
///
/// # Errors
/// Those of the judge that should end the run.
pub fn compare(pairs: &[Pair], judge: &dyn Judge, concurrency: usize) -> Result<Outcome> {
    let replies = in_parallel(pairs, concurrency, |pair| {
        let ask = |first: &str, second: &str| {
            let (system, user) = prompt(&pair.question, &pair.reference, first, second);
            judge.ask(&system, &user)
        };
        Ok((
            ask(&pair.model, &pair.baseline)?,
            ask(&pair.baseline, &pair.model)?,
        ))
    })?;
    let mut outcome = Outcome::default();
    for (first, second) in &replies {
        outcome.tally.add(first, second);
    }
    outcome.replies = replies;
    let mean = |text: &dyn Fn(&Pair) -> &str| {
        let words = |pair: &Pair| crate::python::split(text(pair)).count() as f64;
        pairs.iter().map(words).sum::<f64>() / pairs.len().max(1) as f64
    };
    outcome.mean_words = (mean(&|p| &p.model), mean(&|p| &p.baseline));
    Ok(outcome)
}

/// Pairs of two published prediction files (lines with `query`, `gt` and a `<name>_pred`), joined on `query` and `gt`
/// in the order of the first; questions that only one file has are left out.
///
/// # Errors
/// Lines without these fields.
pub fn join(
    model: &[crate::bench::dataset::Row],
    baseline: &[crate::bench::dataset::Row],
) -> Result<Vec<Pair>> {
    let read = |row: &crate::bench::dataset::Row| -> Result<(String, String, String)> {
        let value: serde_json::Value = row.parse()?;
        let text = |key: &str| value[key].as_str().map(str::to_string);
        let prediction = value.as_object().and_then(|object| {
            let found = object.iter().find(|(key, _)| key.ends_with("_pred"));
            found.and_then(|(_, value)| value.as_str())
        });
        match (text("query"), text("gt"), prediction) {
            (Some(query), Some(gt), Some(prediction)) => Ok((query, gt, prediction.into())),
            _ => Err(row.wrong("expected the fields `query`, `gt` and one that ends in `_pred`")),
        }
    };
    let mut answers = std::collections::HashMap::new();
    for row in baseline {
        let (query, gt, prediction) = read(row)?;
        answers.insert((query, gt), prediction);
    }
    let mut pairs = Vec::new();
    for row in model {
        let (question, reference, prediction) = read(row)?;
        let key = (question, reference);
        if let Some(baseline) = answers.get(&key) {
            let baseline = baseline.clone();
            let (question, reference) = key;
            pairs.push(Pair {
                question,
                reference,
                model: prediction,
                baseline,
            });
        }
    }
    Ok(pairs)
}
