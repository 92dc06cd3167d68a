//! Corpus BLEU-4 as the `bleu` of Hugging Face's `evaluate` computes it, with its `13a` tokenizer and the `zh`
//! tokenizer of sacreBLEU, odd ranges included. For M4LE's translation tasks.

use std::sync::LazyLock;

use regex::Regex;

use super::counts;
use crate::python::text::{split, strip};

/// The regular expressions both tokenizers end with.
fn separate(text: &str) -> Vec<String> {
    static PASSES: LazyLock<[(Regex, &str); 4]> = LazyLock::new(|| {
        [
            (r"([\{-\~\[-\x60 -\&\(-\+:-@/])", " $1 "),
            (r"([^0-9])([\.,])", "$1 $2 "),
            (r"([\.,])([^0-9])", " $1 $2"),
            (r"([0-9])(-)", "$1 $2 "),
        ]
        .map(|(pattern, with)| (Regex::new(pattern).expect("a constant pattern"), with))
    });
    let mut text = text.to_string();
    for (pass, with) in PASSES.iter() {
        text = pass.replace_all(&text, *with).into_owned();
    }
    split(&text).map(str::to_string).collect()
}

/// The `13a` tokenizer (mteval).
pub fn tokenize_13a(text: &str) -> Vec<String> {
    let mut text = text
        .replace("<skipped>", "")
        .replace("-\n", "")
        .replace('\n', " ");
    if text.contains('&') {
        text = text
            .replace("&quot;", "\"")
            .replace("&amp;", "&")
            .replace("&lt;", "<")
            .replace("&gt;", ">");
    }
    separate(&format!(" {text} "))
}

/// Characters that are tokens of their own in Chinese text. The last range stands for an escape the original wrote
/// with five digits, which Python reads as four digits and a digit; a second one lies within the others.
fn is_chinese(c: char) -> bool {
    matches!(c,
        '\u{3400}'..='\u{4db5}' | '\u{4e00}'..='\u{9fa5}' | '\u{9fa6}'..='\u{9fbb}'
        | '\u{f900}'..='\u{fa2d}' | '\u{fa30}'..='\u{fa6a}' | '\u{fa70}'..='\u{fad9}'
        | '\u{ff00}'..='\u{ffef}' | '\u{2e80}'..='\u{2eff}' | '\u{3000}'..='\u{303f}'
        | '\u{31c0}'..='\u{31ef}' | '\u{2f00}'..='\u{2fdf}' | '\u{2ff0}'..='\u{2fff}'
        | '\u{3100}'..='\u{312f}' | '\u{31a0}'..='\u{31bf}' | '\u{fe10}'..='\u{fe1f}'
        | '\u{fe30}'..='\u{fe4f}' | '\u{2600}'..='\u{26ff}' | '\u{2700}'..='\u{27bf}'
        | '\u{3200}'..='\u{33ff}' | '\u{2001}'..='\u{2a6d}')
}

/// The `zh` tokenizer.
pub fn tokenize_zh(text: &str) -> Vec<String> {
    let mut spaced = String::with_capacity(text.len() * 2);
    for c in strip(text).chars() {
        if is_chinese(c) {
            spaced.push(' ');
            spaced.push(c);
            spaced.push(' ');
        } else {
            spaced.push(c);
        }
    }
    separate(&spaced)
}

/// Corpus BLEU-4 without smoothing, 0 to 1. Each row: tokens of the prediction, and of its references. The
/// reference length is the sum of the shortest references. 0 for an empty corpus or prediction side (the
/// original divides by zero).
pub fn corpus_bleu(rows: &[(Vec<String>, Vec<Vec<String>>)]) -> f64 {
    const ORDER: usize = 4;
    let mut matches = [0; ORDER];
    let mut possible = [0; ORDER];
    let (mut predicted, mut referenced) = (0, 0);
    for (prediction, references) in rows {
        predicted += prediction.len();
        referenced += references.iter().map(Vec::len).min().unwrap_or(0);
        for n in 1..=ORDER {
            possible[n - 1] += (prediction.len() + 1).saturating_sub(n);
            let of_references: Vec<_> = references.iter().map(|r| counts(r.windows(n))).collect();
            for (gram, count) in counts(prediction.windows(n)) {
                let most = of_references.iter().filter_map(|r| r.get(gram)).max();
                matches[n - 1] += count.min(most.copied().unwrap_or(0));
            }
        }
    }
    if predicted == 0 || referenced == 0 {
        return 0.0;
    }
    let mut log = 0.0;
    for n in 0..ORDER {
        if possible[n] == 0 || matches[n] == 0 {
            return 0.0;
        }
        log += 1.0 / ORDER as f64 * (matches[n] as f64 / possible[n] as f64).ln();
    }
    let ratio = predicted as f64 / referenced as f64;
    let brevity = if ratio > 1.0 {
        1.0
    } else {
        (1.0 - 1.0 / ratio).exp()
    };
    log.exp() * brevity
}
