//! Reading answers out of replies, and literals out of published rows.

use regex::Regex;
use std::sync::LazyLock;

/// Characters of a UUID.
const UUID: usize = 36;

/// The items of a Python or JSON list literal of strings, or the one string of a quoted literal.
/// None for other texts. The literal must begin the text; what follows it is ignored.
pub fn literal(text: &str) -> Option<Vec<String>> {
    let text = text.trim();
    let mut chars = text.chars().peekable();
    let list = text.starts_with('[');
    if list {
        chars.next();
    }
    let mut items = Vec::new();
    loop {
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        match chars.next()? {
            ']' if list => return Some(items),
            quote @ ('"' | '\'') => {
                let mut item = String::new();
                loop {
                    match chars.next()? {
                        '\\' => item.push(chars.next()?),
                        c if c == quote => break,
                        c => item.push(c),
                    }
                }
                items.push(item);
                if !list {
                    return Some(items);
                }
            }
            _ => return None,
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        match chars.next()? {
            ',' => {}
            ']' => return Some(items),
            _ => return None,
        }
    }
}

/// The answer of a single-value reply: outer space and quotes off, at most 36 characters.
pub fn single(reply: &str) -> String {
    let text = reply.trim();
    let value = match literal(text) {
        Some(items) if !items.is_empty() => items[0].clone(),
        _ => text.trim_matches(['"', '\'']).to_string(),
    };
    value.chars().take(UUID).collect()
}

/// UUID-shaped words of a reply, in order, lower case.
fn values(reply: &str) -> Vec<String> {
    static SHAPE: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"(?i)[0-9a-f*&]{8}-[0-9a-f*&]{4}-[0-9a-f*&]{4}-[0-9a-f*&]{4}-[0-9a-f*&]{12}")
            .expect("a constant pattern")
    });
    let found = SHAPE.find_iter(reply);
    found.map(|m| m.as_str().to_lowercase()).collect()
}

/// Whether a reply that may be a whole sentence ends on this value: of all UUID-shaped words the last one counts, since a
/// sentence repeats the key before it.
pub fn ends_on(reply: &str, answer: &str) -> bool {
    values(reply).last().is_some_and(|value| value == answer)
}

/// Score of a list reply.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ListScore {
    /// Share of right values that are there.
    pub recall: f64,
    /// Share of values there that are right.
    pub precision: f64,
    /// The very list.
    pub exact: bool,
    /// Any value was found.
    pub found: bool,
}

/// Scores a list: a list literal, else all UUID-shaped words. Each value of the reply counts once.
pub fn list_score(reply: &str, answers: &[String]) -> ListScore {
    let values: Vec<String> = literal(reply)
        .filter(|items| reply.trim_start().starts_with('[') && !items.is_empty())
        .unwrap_or_else(|| values(reply));
    let mut left = values.clone();
    let mut hits = 0;
    for answer in answers {
        if let Some(at) = left.iter().position(|value| value == answer) {
            left.swap_remove(at);
            hits += 1;
        }
    }
    ListScore {
        recall: hits as f64 / answers.len().max(1) as f64,
        precision: hits as f64 / values.len().max(1) as f64,
        exact: values == answers,
        found: !values.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "e3e70682-c209-4cac-629f-6fbed82c07cd";
    const B: &str = "f728b4fa-4248-5e3a-0a5d-2f346baa9455";

    #[test]
    fn values_are_read_with_and_without_quotes() {
        for reply in [
            A.to_string(),
            format!(" \"{A}\"\n"),
            format!("'{A}' is it"),
            format!("{A} and more"),
        ] {
            assert_eq!(single(&reply), A, "{reply}");
        }
        assert_ne!(single(&format!("The value is {A}")), A);
        assert_eq!(single("  "), "");
        assert!(ends_on(&format!("The value of {B} is \"{A}\"."), A));
        assert!(!ends_on(&format!("{A} or {B}"), A) && !ends_on("none", A));
    }

    #[test]
    fn a_reply_that_lists_everything_has_low_precision() {
        let gold = [A.to_string(), B.to_string()];
        let score = list_score(&format!("['{A}', '{B}']"), &gold);
        assert_eq!(
            (score.recall, score.precision, score.exact),
            (1.0, 1.0, true)
        );
        let score = list_score(&format!("they are {B}, {A}, {A} and {A}"), &gold);
        assert_eq!(
            (score.recall, score.precision, score.exact),
            (1.0, 0.5, false)
        );
        let twice = [A.to_string(), A.to_string()];
        assert_eq!(list_score(&format!("[\"{A}\"]"), &twice).recall, 0.5);
        assert!(!list_score("none", &gold).found);
    }

    #[test]
    fn literals_and_what_is_none() {
        assert_eq!(literal("['a', \"b\"]").unwrap(), ["a", "b"]);
        assert_eq!(literal("[]").unwrap(), Vec::<String>::new());
        for text in ["", "[", "['a'", "['a' 'b']", "abc", "[1, 2]"] {
            assert_eq!(literal(text), None, "{text}");
        }
    }
}
