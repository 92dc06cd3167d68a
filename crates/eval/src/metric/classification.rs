//! Which class, which paragraph, which items: LongBench's classification, retrieval and count scores, and the F1
//! of item sets of M4LE.

use std::collections::HashSet;

use crate::python::chars::{is_decimal, numbers};

/// LongBench's classification, 0 to 1: 1 / (classes found in the prediction) if the gold class is among them.
/// Classes that are part of the gold name are dropped, except that the published loop, which removes from
/// the list it walks, skips the class after each one it removes.
pub fn classification(prediction: &str, gold: &str, classes: &[impl AsRef<str>]) -> f64 {
    let mut found: Vec<&str> = classes
        .iter()
        .map(AsRef::as_ref)
        .filter(|class| prediction.contains(class))
        .collect();
    let mut index = 0;
    while index < found.len() {
        let class = found[index];
        if gold.contains(class) && class != gold {
            let first = found.iter().position(|&c| c == class);
            found.remove(first.unwrap_or(index));
        }
        index += 1;
    }
    if found.contains(&gold) {
        1.0 / found.len() as f64
    } else {
        0.0
    }
}

/// The share of numbers (`\d+`, any script) in the prediction that equal `gold` as text; 0 without numbers.
pub fn count(prediction: &str, gold: &str) -> f64 {
    let (mut all, mut right) = (0, 0);
    for number in numbers(prediction) {
        all += 1;
        right += usize::from(number == gold);
    }
    if all == 0 {
        0.0
    } else {
        f64::from(right as u32) / f64::from(all)
    }
}

/// [`count`] against the number after the first `marker` that a number follows ("Paragraph " or "段落" in
/// the gold answer). 0 where there is none.
pub fn retrieval(prediction: &str, gold: &str, marker: &str) -> f64 {
    let number = gold.match_indices(marker).find_map(|(at, _)| {
        let rest = &gold[at + marker.len()..];
        let end = rest.find(|c| !is_decimal(c)).unwrap_or(rest.len());
        (end > 0).then(|| &rest[..end])
    });
    number.map_or(0.0, |number| count(prediction, number))
}

/// F1 of two sets of items (M4LE's `cls_f1`); 0 where nothing is shared.
pub fn set_f1<'a>(
    prediction: impl IntoIterator<Item = &'a str>,
    gold: impl IntoIterator<Item = &'a str>,
) -> f64 {
    let prediction: HashSet<&str> = prediction.into_iter().collect();
    let gold: HashSet<&str> = gold.into_iter().collect();
    let shared = prediction.intersection(&gold).count() as f64;
    if shared == 0.0 {
        return 0.0;
    }
    let precision = shared / prediction.len() as f64;
    let recall = shared / gold.len() as f64;
    2.0 * precision * recall / (precision + recall)
}
