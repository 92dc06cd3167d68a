//! The quality score S_q of LongBench-Write: a judge rates an answer 1 to 5 in six respects, whatever its length. The
//! wording is this program's own, so that scores compare within its runs, not with the paper's.

use crate::bench::judge::{Judge, in_parallel};
use crate::error::Result;
use crate::metric::length_score::{DIMENSIONS, Ratings, parse_ratings, quality_score};

/// Calls for one answer before it is left out.
const TRIES: usize = 5;

/// The judge's message.
pub fn message(prompt: &str, answer: &str) -> String {
    let keys: Vec<String> = DIMENSIONS
        .iter()
        .map(|name| format!("\"{name}\": <1 to 5>"))
        .collect();
    format!(
        "Rate the quality of a text that was written for a request. Do not let its length influence you, neither for \
         nor against. Rate from 1 (poor) to 5 (excellent): Relevance (does it serve the request throughout?), Accuracy \
         (is what it states right?), Coherence (does it hang together?), Clarity (is it easy to follow?), Breadth and \
         Depth (does it cover the subject, and thoroughly?), Reading Experience (is it a pleasure to read?).\n\n\
         [Request]\n{prompt}\n\n[Text]\n{answer}\n[End of Text]\n\nReply with JSON alone, in this form: \
         {{\"Analysis\": \"<a few sentences>\", {}}}",
        keys.join(", ")
    )
}

/// What the judge found.
#[derive(Clone, Debug, PartialEq)]
pub struct Quality {
    /// Ratings by answer; `None` where none of five replies could be read.
    pub ratings: Vec<Option<Ratings>>,
    /// Answers without ratings.
    pub failed: usize,
    /// By dimension, and S_q, 0 to 100; `None` if no answer has ratings.
    pub scores: Option<(Ratings, f64)>,
}

/// Rates (prompt, answer) pairs. A reply that cannot be read is asked for again with a note, up to five calls.
///
/// # Errors
/// Those of the judge that end a run.
pub fn rate(pairs: &[(String, String)], judge: &dyn Judge, concurrency: usize) -> Result<Quality> {
    let ratings = in_parallel(pairs, concurrency, |(prompt, answer)| {
        let message = message(prompt, answer);
        for tried in 0..TRIES {
            // Another message, so that a judge that repeats itself, or a store of replies, gives another reply.
            let note = match tried {
                0 => String::new(),
                n => format!("\n(Reply {} could not be read as that JSON.)", n),
            };
            let reply = judge.ask("", &format!("{message}{note}"))?;
            if let Some(ratings) = parse_ratings(&reply) {
                return Ok(Some(ratings));
            }
        }
        Ok(None)
    })?;
    let read: Vec<Ratings> = ratings.iter().flatten().copied().collect();
    Ok(Quality {
        failed: ratings.len() - read.len(),
        scores: quality_score(&read),
        ratings,
    })
}

/// The overall score: the mean of S_l and S_q.
pub fn overall(length_score: f64, quality_score: f64) -> f64 {
    (length_score + quality_score) / 2.0
}
