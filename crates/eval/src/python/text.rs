//! `str` as CPython has it: splitting, stripping, `string.punctuation`, `repr`, and one-pass formatting.

use std::borrow::Cow;
use std::fmt::Write;

use super::chars::{is_printable, is_space, is_word, runs};

/// `string.punctuation`.
pub const PUNCTUATION: &str = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~";

/// `text.split()`: runs of Unicode whitespace separate, none at the ends.
pub fn split(text: &str) -> impl DoubleEndedIterator<Item = &str> {
    text.split(is_space).filter(|word| !word.is_empty())
}

/// `text.strip()`.
pub fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// `text.splitlines()`: also at vertical tab, form feed, the ASCII separators, NEL, and U+2028/2029.
pub fn splitlines(text: &str) -> Vec<&str> {
    let ends = |c| {
        matches!(
            c,
            '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let Some(at) = rest.find(ends) else {
            lines.push(rest);
            break;
        };
        lines.push(&rest[..at]);
        let end = if rest[at..].starts_with("\r\n") {
            2
        } else {
            rest[at..].chars().next().map_or(0, char::len_utf8)
        };
        rest = &rest[at + end..];
    }
    lines
}

/// Deletes the characters of [`PUNCTUATION`].
pub fn delete_punctuation(text: &str) -> String {
    // Exactly the ASCII punctuation of Rust.
    text.chars().filter(|c| !c.is_ascii_punctuation()).collect()
}

/// `re.sub(r"\b(a|an|the)\b", " ", text)`: a word of its own by Python's Unicode `\w`.
pub fn replace_articles(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut done = 0;
    for (start, word) in runs(text, is_word) {
        if matches!(word, "a" | "an" | "the") {
            out.push_str(&text[done..start]);
            out.push(' ');
            done = start + word.len();
        }
    }
    out.push_str(&text[done..]);
    out
}

/// `" ".join(text.split())`.
pub fn collapse_whitespace(text: &str) -> String {
    join(split(text), " ")
}

/// `separator.join(words)`.
pub fn join<'a>(words: impl IntoIterator<Item = &'a str>, separator: &str) -> String {
    let mut out = String::new();
    for (index, word) in words.into_iter().enumerate() {
        if index > 0 {
            out.push_str(separator);
        }
        out.push_str(word);
    }
    out
}

/// The first `count` characters (code points), as `text[:count]`.
pub fn head(text: &str, count: usize) -> &str {
    match text.char_indices().nth(count) {
        Some((end, _)) => &text[..end],
        None => text,
    }
}

/// `template.format(**fields)` for plain `{name}` fields: one pass, so braces inside values stay. `{{` and
/// `}}` are literal braces. An unknown name is returned as the error.
pub fn format_fields<'a>(
    template: &str,
    field: impl Fn(&str) -> Option<Cow<'a, str>>,
) -> Result<String, String> {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        let brace = &rest[at..at + 1];
        rest = &rest[at + 1..];
        if rest.starts_with(brace) {
            out.push_str(brace);
            rest = &rest[1..];
        } else if brace == "{" {
            let end = rest.find('}').ok_or_else(|| rest.to_string())?;
            let name = &rest[..end];
            out.push_str(&field(name).ok_or_else(|| name.to_string())?);
            rest = &rest[end + 1..];
        } else {
            return Err("}".into());
        }
    }
    out.push_str(rest);
    Ok(out)
}

/// `repr(text)`: single quotes, double ones where the text holds a single quote and no double one.
pub fn repr_str(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    let mut out = String::with_capacity(text.len() + 2);
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if is_printable(c) => out.push(c),
            c => {
                let code = c as u32;
                // Writing to a string never fails.
                let _ = match code {
                    0..=0xff => write!(out, "\\x{code:02x}"),
                    0x100..=0xffff => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push(quote);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_as_python_has_them() {
        let words: Vec<&str> = split(" a\u{1f}b\u{3000}c ").collect();
        assert_eq!(words, ["a", "b", "c"]);
        assert_eq!(strip("\x1c x \u{a0}"), "x");
        assert_eq!(splitlines("a\r\nb\u{85}\n\x1cc\n"), ["a", "b", "", "", "c"]);
        assert_eq!(delete_punctuation("café-bar, «x»"), "cafébar «x»");
        assert!(PUNCTUATION.chars().all(|c| c.is_ascii_punctuation()) && PUNCTUATION.len() == 32);
        assert_eq!(
            replace_articles("the cat_a a\u{301} an-the éa"),
            "  cat_a  \u{301}  -  éa"
        );
        assert_eq!(head("中文字", 2), "中文");
    }

    #[test]
    fn repr_quotes_and_escapes() {
        assert_eq!(repr_str("Ana"), "'Ana'");
        assert_eq!(repr_str("O'Neil"), "\"O'Neil\"");
        assert_eq!(repr_str("'\""), r#"'\'"'"#);
        assert_eq!(
            repr_str("\u{a0}é\t\u{200b}\u{e0001}\x7f"),
            r"'\xa0é\t\u200b\U000e0001\x7f'"
        );
    }

    #[test]
    fn values_are_not_expanded_again() {
        let fill = |name: &str| (name == "x").then_some(Cow::Borrowed("{y}"));
        assert_eq!(format_fields("{{{x}}} {x}", fill).unwrap(), "{{y}} {y}");
        assert_eq!(format_fields("{z}", fill), Err("z".into()));
        assert_eq!(format_fields("a } b", fill), Err("}".into()));
    }
}
