//! Plausible wrong passages around the right one: how much does a reader suffer from them? For measuring
//! readers and for training on noisy passages. Long-Context LLMs Meet RAG, arXiv 2410.05983, algorithm 1,
//! and the measures of its answers.

use std::collections::HashSet;

/// Lower case, ASCII punctuation, the words a, an and the, and repeated blanks removed: the form in which
/// answers are looked for and compared.
pub fn normalise(text: &str) -> String {
    let kept: String = (text.to_lowercase().chars())
        .filter(|c| !c.is_ascii_punctuation())
        .collect();
    let words = kept
        .split_whitespace()
        .filter(|word| !matches!(*word, "a" | "an" | "the"));
    words.collect::<Vec<_>>().join(" ")
}

/// Whether one of the answers occurs in the text, both normalised. An answer of which nothing is left
/// occurs everywhere.
pub fn contains(text: &str, answers: &[impl AsRef<str>]) -> bool {
    let text = normalise(text);
    answers
        .iter()
        .any(|answer| text.contains(&normalise(answer.as_ref())))
}

/// Whether the text is one of the answers, both normalised.
pub fn exact_match(text: &str, answers: &[impl AsRef<str>]) -> bool {
    let text = normalise(text);
    answers
        .iter()
        .any(|answer| text == normalise(answer.as_ref()))
}

/// The passages of a hard-negative prompt before they are shuffled: the gold one, then those ranked best
/// that are not gold, hold no answer and are no copy of one taken, `k` in all (fewer if there are no
/// more). `ranked` are texts, best first; the result indexes them.
pub fn hard_negatives(
    ranked: &[impl AsRef<str>],
    gold: usize,
    answers: &[impl AsRef<str>],
    k: usize,
) -> Vec<usize> {
    let mut chosen = vec![gold];
    let text = |index: usize| normalise(ranked[index].as_ref());
    let mut seen: HashSet<String> = ranked
        .get(gold)
        .map(|gold| normalise(gold.as_ref()))
        .into_iter()
        .collect();
    for index in 0..ranked.len() {
        if chosen.len() >= k {
            break;
        }
        if index != gold && !contains(ranked[index].as_ref(), answers) && seen.insert(text(index)) {
            chosen.push(index);
        }
    }
    chosen
}

/// Shuffles by numbers in [0, 1): for i = n-1 down to 1, j = floor(u (i + 1)), swap i and j.
pub fn fisher_yates<T>(items: &mut [T], mut uniform: impl FnMut() -> f64) {
    for i in (1..items.len()).rev() {
        let j = (uniform() * (i + 1) as f64) as usize;
        items.swap(i, j.min(i));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_of_the_gold_or_of_a_negative_is_no_negative() {
        let ranked = [
            "No answer.",
            "The gold: forty-two",
            "the gold forty-two!",
            "no answer",
            "other",
        ];
        assert_eq!(hard_negatives(&ranked, 1, &["43"], 9), [1, 0, 4]);
        assert_eq!(hard_negatives(&ranked, 1, &["OTHER"], 9), [1, 0]);
        assert_eq!(hard_negatives(&ranked, 1, &["43"], 1), [1]);
    }

    #[test]
    fn a_shuffle_moves_every_item_once() {
        let mut items: Vec<usize> = (0..50).collect();
        let mut step = 0u32;
        fisher_yates(&mut items, || {
            step += 1;
            f64::from(step * 7919 % 1000) / 1000.0
        });
        assert_eq!(step, 49);
        items.sort_unstable();
        assert_eq!(items, (0..50).collect::<Vec<_>>());
    }
}
