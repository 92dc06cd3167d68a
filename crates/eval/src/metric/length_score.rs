//! LongBench-Write's measures of long writing (LongWriter, paper 41): words written, the length score S_l, and the
//! judge's quality score S_q.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::python::chars::{is_word, runs};

/// Words of a text: characters in U+4E00 to U+9FFF, and words of ASCII letters alone (a digit, underscore,
/// accented letter or Chinese character that touches them prevents it; "don't" has two).
pub fn count_words(text: &str) -> usize {
    let chinese = text
        .chars()
        .filter(|c| ('\u{4e00}'..='\u{9fff}').contains(c));
    let english =
        runs(text, is_word).filter(|(_, run)| run.bytes().all(|b| b.is_ascii_alphabetic()));
    chinese.count() + english.count()
}

/// S_l, 0 to 100: falls to 0 at four times the required words, and at a third of them.
pub fn length_score(required: usize, written: usize) -> f64 {
    let (x, y) = (required as f64, written as f64);
    if written == 0 || required == 0 {
        return 0.0;
    }
    let off = if written > required {
        (y / x - 1.0) / 3.0
    } else {
        (x / y - 1.0) / 2.0
    };
    100.0 * (1.0 - off).max(0.0)
}

/// What the judge rates, 1 to 5 each.
pub const DIMENSIONS: [&str; 6] = [
    "Relevance",
    "Accuracy",
    "Coherence",
    "Clarity",
    "Breadth and Depth",
    "Reading Experience",
];

/// Ratings in the order of [`DIMENSIONS`].
pub type Ratings = [f64; 6];

/// Reads the judge's JSON, bare, fenced, or amid text. `None` unless all six ratings are whole numbers 1 to 5.
pub fn parse_ratings(reply: &str) -> Option<Ratings> {
    let start = reply.find('{')?;
    let end = reply.rfind('}')?;
    let object: BTreeMap<String, Value> = serde_json::from_str(reply.get(start..=end)?).ok()?;
    let mut ratings = [0.0; 6];
    for (slot, name) in ratings.iter_mut().zip(DIMENSIONS) {
        let rating = object.get(name)?.as_i64()?;
        *slot = (1..=5).contains(&rating).then_some(rating as f64)?;
    }
    Some(ratings)
}

/// S_q: per dimension (mean - 1) * 25, and their mean, 0 to 100. `None` without ratings.
pub fn quality_score(ratings: &[Ratings]) -> Option<(Ratings, f64)> {
    if ratings.is_empty() {
        return None;
    }
    let mut scores = [0.0; 6];
    for (index, score) in scores.iter_mut().enumerate() {
        let sum: f64 = ratings.iter().map(|r| r[index]).sum();
        *score = (sum / ratings.len() as f64 - 1.0) * 25.0;
    }
    Some((scores, scores.iter().sum::<f64>() / 6.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratings_are_read_or_refused() {
        let good = r#"{"Analysis": "fine", "Relevance": 5, "Accuracy": 4, "Coherence": 3, "Clarity": 2,
            "Breadth and Depth": 1, "Reading Experience": 5}"#;
        let expected = Some([5.0, 4.0, 3.0, 2.0, 1.0, 5.0]);
        assert_eq!(parse_ratings(good), expected);
        assert_eq!(
            parse_ratings(&format!("Here:\n```json\n{good}\n```")),
            expected
        );
        assert_eq!(parse_ratings(&good.replace("\"Clarity\": 2,", "")), None);
        assert_eq!(parse_ratings(&good.replace(": 4", ": 6")), None);
        assert_eq!(parse_ratings(&good.replace(": 4", ": \"4\"")), None);
        assert_eq!(parse_ratings("no"), None);
    }
}
