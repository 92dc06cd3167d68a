//! L-Eval's closed-ended tasks: how the published scorer processes a prediction and a gold answer before it compares
//! them. All of it is part of the score, the default "A" and the odd cleanings too.

use crate::metric::letters;
use crate::python::chars::{is_decimal, is_space};
use crate::python::text::split;

/// Which processing a closed task has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Letters; `several` where a question may have more than one.
    Letters { several: bool },
    /// A number after steps of reasoning (gsm100).
    Number,
    /// Output of code (codeU).
    Code,
    /// True or false by the document, and in the world (sci_fi).
    TrueFalse,
    /// The text itself (topic retrieval).
    Plain,
}

/// Processed prediction and gold answer; sci_fi has [`true_false`] instead.
pub fn process(kind: Kind, prediction: &str, gold: &str) -> (String, String) {
    match kind {
        Kind::Letters { several } => (letters::predicted(prediction, several), letters::gold(gold)),
        Kind::Number => (number(prediction), number(gold)),
        Kind::Code => (code(prediction, gold), clean_code(gold)),
        Kind::TrueFalse | Kind::Plain => (prediction.into(), gold.into()),
    }
}

/// The number of a worked answer: after "The answer is ", else the last piece with a digit before the first blank
/// line; then its digits up to the first full stop.
fn number(text: &str) -> String {
    const CUE: &str = "The answer is ";
    let stated = text.match_indices(CUE).find_map(|(at, _)| {
        let rest = &text[at + CUE.len()..];
        let end = rest.find(is_space).unwrap_or(rest.len());
        (end > 0).then(|| &rest[..end])
    });
    let piece = stated.unwrap_or_else(|| {
        let before = text.split("\n\n").next().unwrap_or("");
        let with_digit = before.split(' ').rev().find(|p| p.chars().any(is_decimal));
        with_digit.unwrap_or("")
    });
    let whole = piece.split('.').next().unwrap_or("");
    whole.chars().filter(|&c| is_decimal(c)).collect()
}

/// Code output with spaces collapsed, and commas, quotes, backslashes and ".0" deleted.
fn clean_code(text: &str) -> String {
    let mut spaced = String::with_capacity(text.len());
    let mut in_space = false;
    for c in text.chars() {
        if is_space(c) {
            if !in_space {
                spaced.push(' ');
            }
            in_space = true;
        } else {
            spaced.push(c);
            in_space = false;
        }
    }
    let mut text = spaced;
    for (from, to) in [
        (",", ""),
        ("'", ""),
        ("\\", ""),
        (".0", ""),
        ("] [", "]["),
        ("[ [", "[["),
        ("] ]", "]]"),
    ] {
        text = text.replace(from, to);
    }
    text
}

/// The part of a prediction that may hold the output: some words after "the final output", else the last words.
fn code(prediction: &str, gold: &str) -> String {
    let mut text = clean_code(prediction);
    for filler in [
        "will be",
        "of the code",
        "is",
        "would be",
        "the value of",
        "the result of",
        "printed",
    ] {
        text = text.replace(filler, "");
    }
    let count = split(gold).count() + 3;
    // As `re.split` has it: a space at an end of the text leaves an empty piece, which counts.
    let pieces = |text: &'_ str| -> Vec<String> {
        let inner: Vec<&str> = split(text).collect();
        let mut pieces: Vec<String> = Vec::with_capacity(inner.len() + 2);
        if text.starts_with(is_space) || text.is_empty() {
            pieces.push(String::new());
        }
        pieces.extend(inner.into_iter().map(String::from));
        if text.ends_with(is_space) {
            pieces.push(String::new());
        }
        pieces
    };
    let words = match text.rfind("the final output") {
        Some(at) => {
            let mut words = pieces(&text[at + "the final output".len()..]);
            words.truncate(count);
            words
        }
        None => {
            let words = pieces(&text);
            words[words.len().saturating_sub(count)..].to_vec()
        }
    };
    words.join(" ")
}

/// Loyalty to the document and truth in the world, from "ANSWER [fact: ANSWER]": the first word of each part that
/// holds "true" or "false".
pub fn true_false(text: &str) -> (&'static str, &'static str) {
    let text = text.to_lowercase();
    let (loyalty, fact) = text.split_once("[fact:").unwrap_or((&text, ""));
    let mut fact = fact.chars();
    fact.next_back();
    (first_truth(loyalty), first_truth(fact.as_str()))
}

fn first_truth(text: &str) -> &'static str {
    let truths = split(text).filter_map(|word| {
        if word.contains("true") {
            Some("true")
        } else if word.contains("false") {
            Some("false")
        } else {
            None
        }
    });
    { truths }.next().unwrap_or("<error>")
}
