//! The dialects of "exact match": L-Eval's, with containment and partial credit for letters, and M4LE's.

use crate::python::chars::is_space;
use crate::python::parse_float;
use crate::python::text::{collapse_whitespace, delete_punctuation, replace_articles, strip};

/// L-Eval's normal form: punctuation deleted, the words a, an, the removed, spaces collapsed; case is kept.
fn normalize(text: &str) -> String {
    collapse_whitespace(&replace_articles(&delete_punctuation(text)))
}

/// L-Eval's exact match of processed answers, 0 to 1. A gold answer of letters A to D: 1 if equal, 0.25 if the
/// prediction's letters are some of them. Otherwise equality as numbers where both are numbers, else whether the
/// gold text occurs in the prediction, case and spaces ignored.
pub fn leval(prediction: &str, gold: &str) -> f64 {
    let letters = normalize(gold);
    if letters.chars().all(|c| "ABCD".contains(c)) {
        let chosen = normalize(prediction);
        return if chosen == letters {
            1.0
        } else if chosen.chars().all(|c| letters.contains(c)) {
            0.25
        } else {
            0.0
        };
    }
    let right = match (parse_float(prediction), parse_float(gold)) {
        (Some(prediction), Some(gold)) => prediction == gold,
        _ => {
            let flat = |text: &str| text.to_lowercase().replace(' ', "");
            flat(prediction).contains(&flat(gold))
        }
    };
    f64::from(u8::from(right))
}

/// M4LE's `acc`: 1 if any gold answer occurs in the response, case ignored.
pub fn any_contained(response: &str, golds: &[impl AsRef<str>]) -> f64 {
    let response = response.to_lowercase();
    let found = golds
        .iter()
        .any(|gold| response.contains(&gold.as_ref().to_lowercase()));
    f64::from(u8::from(found))
}

/// M4LE's `exact_match`: 1 if any gold answer equals the response, case and outer spaces ignored.
pub fn any_equal(response: &str, golds: &[impl AsRef<str>]) -> f64 {
    let plain = |text: &str| strip(&text.to_lowercase()).to_string();
    let response = plain(response);
    let found = golds.iter().any(|gold| plain(gold.as_ref()) == response);
    f64::from(u8::from(found))
}

/// Whether a text is blank to Python.
pub fn is_blank(text: &str) -> bool {
    text.chars().all(is_space)
}
