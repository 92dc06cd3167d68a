//! ROUGE in its published dialects, which differ: `rouge` 1.0.1 (LongBench, M4LE English), the plain LCS of
//! `rouge_chinese` 1.0.3 (M4LE Chinese), and Google's `rouge_score` (L-Eval). Take the one the benchmark names.

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use regex::Regex;

use super::segment::jieba_joined;
use super::{counts, overlap};
use crate::python::chars::is_space;
use crate::python::text::{join, split};

/// Recall, precision and F-measure, 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rouge {
    pub recall: f64,
    pub precision: f64,
    pub f: f64,
}

/// What becomes of pairs that Python's recursion limit makes fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RougeCompat {
    /// They are scored.
    #[default]
    Unlimited,
    /// They score 0, as under the published script with this `sys.getrecursionlimit()` (1000 by default).
    PyRecursionLimit(usize),
}

/// Frames of the interpreter and the scorer above the recursion.
const FRAMES_ABOVE: usize = 10;

/// Words as small numbers, equal for equal words.
#[derive(Default)]
struct Words<'a>(HashMap<&'a str, u32>);

impl<'a> Words<'a> {
    fn id(&mut self, word: &'a str) -> u32 {
        let next = self.0.len() as u32;
        *self.0.entry(word).or_insert(next)
    }

    /// The words of sentences; a blank sentence has one, the empty word.
    fn of(&mut self, sentences: &'a [String]) -> Vec<Vec<u32>> {
        sentences
            .iter()
            .map(|s| s.split(' ').map(|word| self.id(word)).collect())
            .collect()
    }
}

/// Lengths of the longest common subsequences of all prefixes, (a + 1) rows of b + 1.
fn lcs_table(a: &[u32], b: &[u32]) -> Vec<u32> {
    let width = b.len() + 1;
    let mut table = vec![0u32; (a.len() + 1) * width];
    for i in 1..=a.len() {
        let (above, row) = table[(i - 1) * width..].split_at_mut(width);
        for j in 1..=b.len() {
            row[j] = if a[i - 1] == b[j - 1] {
                above[j - 1] + 1
            } else {
                above[j].max(row[j - 1])
            };
        }
    }
    table
}

/// The length alone, in one row.
fn lcs_length(a: &[u32], b: &[u32]) -> usize {
    let mut row = vec![0u32; b.len() + 1];
    for &word in a {
        let mut diagonal = 0;
        for j in 1..=b.len() {
            let above = row[j];
            row[j] = if word == b[j - 1] {
                diagonal + 1
            } else {
                above.max(row[j - 1])
            };
            diagonal = above;
        }
    }
    row[b.len()] as usize
}

/// Pieces between full stops, their words joined by one space; empty pieces dropped.
fn sentences(text: &str) -> Vec<String> {
    text.split('.')
        .filter(|piece| !piece.is_empty())
        .map(|piece| join(split(piece), " "))
        .collect()
}

fn of_counts(shared: usize, gold: usize, prediction: usize) -> Rouge {
    let recall = shared as f64 / gold as f64;
    let precision = shared as f64 / prediction as f64;
    let f = 2.0 * ((precision * recall) / (precision + recall + 1e-8));
    Rouge {
        recall,
        precision,
        f,
    }
}

/// `rouge-l` of `rouge` 1.0.1: the union, over pairs of sentences, of the *sets* of words of one longest common
/// subsequence, over the number of *distinct* words. All 0 where a side is empty (the package raises).
/// A perfect match gives f = 0.999999995.
pub fn rouge_l(prediction: &str, gold: &str, compat: RougeCompat) -> Rouge {
    let (prediction, gold) = (sentences(prediction), sentences(gold));
    if prediction.is_empty() || gold.is_empty() {
        return Rouge::default();
    }
    let mut words = Words::default();
    let (prediction, gold) = (words.of(&prediction), words.of(&gold));
    let distinct =
        |sentences: &[Vec<u32>]| sentences.iter().flatten().collect::<HashSet<_>>().len();
    let mut union = HashSet::new();
    for reference in &gold {
        for hypothesis in &prediction {
            let table = lcs_table(reference, hypothesis);
            let width = hypothesis.len() + 1;
            let (mut i, mut j) = (reference.len(), hypothesis.len());
            let mut steps = 0;
            while i > 0 && j > 0 {
                steps += 1;
                if reference[i - 1] == hypothesis[j - 1] {
                    union.insert(reference[i - 1]);
                    (i, j) = (i - 1, j - 1);
                } else if table[(i - 1) * width + j] > table[i * width + j - 1] {
                    i -= 1;
                } else {
                    j -= 1;
                }
            }
            if let RougeCompat::PyRecursionLimit(limit) = compat
                && steps + FRAMES_ABOVE > limit
            {
                return Rouge::default();
            }
        }
    }
    of_counts(union.len(), distinct(&gold), distinct(&prediction))
}

/// LongBench's `rouge_zh`: jieba words joined by spaces, then [`rouge_l`].
pub fn rouge_l_zh(prediction: &str, gold: &str, compat: RougeCompat) -> Rouge {
    rouge_l(&jieba_joined(prediction), &jieba_joined(gold), compat)
}

/// Lines as `rouge_chinese` cuts them: after closing marks unless a quote follows, and at newlines.
fn chinese_lines(text: &str) -> Vec<String> {
    static CUTS: LazyLock<[Regex; 4]> = LazyLock::new(|| {
        [
            r"([。！？?])([^”’])",
            r"(\.{6})([^”’])",
            r"(…{2})([^”’])",
            r"([。！？?][”’])([^，。！？?])",
        ]
        .map(|pattern| Regex::new(pattern).expect("a constant pattern"))
    });
    let mut text = text.to_string();
    for cut in CUTS.iter() {
        text = cut.replace_all(&text, "$1\n$2").into_owned();
    }
    text.trim_end_matches(is_space)
        .split('\n')
        .filter(|line| !line.is_empty())
        .map(|line| join(split(line), " "))
        .collect()
}

/// `rouge-l` of `rouge_chinese` 1.0.3 on text whose words are separated by spaces: one LCS over all words, with
/// repeats. All 0 where a side is empty.
pub fn rouge_l_plain(prediction: &str, gold: &str) -> Rouge {
    let (prediction, gold) = (chinese_lines(prediction), chinese_lines(gold));
    if prediction.is_empty() || gold.is_empty() {
        return Rouge::default();
    }
    let mut words = Words::default();
    let (prediction, gold) = (words.of(&prediction).concat(), words.of(&gold).concat());
    let shared = lcs_length(&gold, &prediction);
    of_counts(shared, gold.len(), prediction.len())
}

/// [`rouge_l_plain`] over jieba words.
pub fn rouge_l_plain_zh(prediction: &str, gold: &str) -> Rouge {
    rouge_l_plain(&jieba_joined(prediction), &jieba_joined(gold))
}

/// ROUGE-1, ROUGE-2 and ROUGE-L F-measures of Google's `rouge_score`, stemmer off, 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GoogleRouge {
    pub rouge1: f64,
    pub rouge2: f64,
    pub rouge_l: f64,
}

/// Tokens are runs of `[a-z0-9]` of the lower-cased text.
pub fn google_rouge(prediction: &str, gold: &str) -> GoogleRouge {
    let (prediction, gold) = (prediction.to_lowercase(), gold.to_lowercase());
    let mut words = Words::default();
    let mut tokens = |text| -> Vec<u32> {
        str::split(text, |c: char| !matches!(c, 'a'..='z' | '0'..='9'))
            .filter(|token| !token.is_empty())
            .map(|token| words.id(token))
            .collect()
    };
    let (prediction, gold) = (tokens(&prediction), tokens(&gold));
    let f = |shared: usize, of_gold: usize, of_prediction: usize| {
        if shared == 0 {
            return 0.0;
        }
        let precision = shared as f64 / of_prediction as f64;
        let recall = shared as f64 / of_gold as f64;
        2.0 * precision * recall / (precision + recall)
    };
    let ngram = |n: usize| {
        let (a, b) = (counts(prediction.windows(n)), counts(gold.windows(n)));
        f(
            overlap(&a, &b),
            (gold.len() + 1).saturating_sub(n),
            (prediction.len() + 1).saturating_sub(n),
        )
    };
    GoogleRouge {
        rouge1: ngram(1),
        rouge2: ngram(2),
        rouge_l: f(lcs_length(&gold, &prediction), gold.len(), prediction.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn one_row_is_the_table(
            a in proptest::collection::vec(0u32..5, 0..40),
            b in proptest::collection::vec(0u32..5, 0..40),
        ) {
            let table = lcs_table(&a, &b);
            prop_assert_eq!(lcs_length(&a, &b), table[table.len() - 1] as usize);
        }
    }

    #[test]
    fn a_long_path_scores_zero_under_the_recursion_limit() {
        let long = vec!["word"; 1200].join(" ");
        let same = rouge_l(&long, &long, RougeCompat::Unlimited);
        assert!(same.f > 0.99);
        let limited = rouge_l(&long, &long, RougeCompat::PyRecursionLimit(1000));
        assert_eq!(limited, Rouge::default());
    }
}
