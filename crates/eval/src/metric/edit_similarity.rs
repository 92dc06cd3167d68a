//! Similarity of code lines: `fuzz.ratio` of fuzzywuzzy 0.18 over `difflib` (LongBench's `code_sim`).

use crate::python::SequenceMatcher;

/// `fuzz.ratio(a, b)`: 0 to 100, whole. Not symmetric: see [`SequenceMatcher`].
pub fn fuzz_ratio(a: &str, b: &str) -> u32 {
    if a == b {
        return 100;
    }
    let a: Vec<char> = a.chars().collect();
    let b: Vec<char> = b.chars().collect();
    (100.0 * SequenceMatcher::new(&a, &b).ratio()).round_ties_even() as u32
}

/// LongBench's `code_sim`, 0 to 1: the first line of the prediction without a backtick, `#` or `//`, beside the
/// gold line.
pub fn code_similarity(prediction: &str, gold: &str) -> f64 {
    let line = prediction
        .trim_start_matches('\n')
        .split('\n')
        .find(|line| !line.contains('`') && !line.contains('#') && !line.contains("//"))
        .unwrap_or("");
    f64::from(fuzz_ratio(line, gold)) / 100.0
}
