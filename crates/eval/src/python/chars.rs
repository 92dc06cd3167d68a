//! Character classes as CPython's `str` methods and `re` module see them. They are not Rust's: `\w` leaves
//! combining marks out, and whitespace includes the four ASCII separators 0x1c to 0x1f.

use std::sync::LazyLock;

use regex_syntax::hir::{Class, HirKind};

/// A set of characters as sorted, disjoint ranges.
struct Ranges(Vec<(char, char)>);

impl Ranges {
    /// The ranges of a character class in regex notation. The patterns below are constants.
    fn of(pattern: &str) -> Self {
        let hir = regex_syntax::parse(pattern).expect("a constant class");
        match hir.kind() {
            HirKind::Class(Class::Unicode(class)) => {
                Ranges(class.iter().map(|r| (r.start(), r.end())).collect())
            }
            other => unreachable!("not a class: {other:?}"),
        }
    }

    fn has(&self, c: char) -> bool {
        let after = self.0.partition_point(|&(start, _)| start <= c);
        after > 0 && c <= self.0[after - 1].1
    }
}

static WORD: LazyLock<Ranges> = LazyLock::new(|| Ranges::of(r"[\p{L}\p{N}_]"));
static DECIMAL: LazyLock<Ranges> = LazyLock::new(|| Ranges::of(r"\p{Nd}"));
static UNPRINTABLE: LazyLock<Ranges> = LazyLock::new(|| Ranges::of(r"[\p{C}\p{Z}]"));

/// `str.isspace`, `\s`: what `str.split()` and `str.strip()` cut at.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\x1c'..='\x1f')
}

/// `\w`: alphanumeric by general category, or an underscore; marks and joiners are not.
pub fn is_word(c: char) -> bool {
    if c.is_ascii() {
        c.is_ascii_alphanumeric() || c == '_'
    } else {
        WORD.has(c)
    }
}

/// `\d`: any decimal digit of Unicode, full-width ones included.
pub fn is_decimal(c: char) -> bool {
    if c.is_ascii() {
        c.is_ascii_digit()
    } else {
        DECIMAL.has(c)
    }
}

/// The value of a decimal digit (`\d`), 0 to 9. Digits of one script are consecutive, zero first.
pub fn decimal_value(c: char) -> Option<u32> {
    if c.is_ascii() {
        return c.to_digit(10);
    }
    let after = DECIMAL.0.partition_point(|&(start, _)| start <= c);
    let (start, end) = *DECIMAL.0.get(after.checked_sub(1)?)?;
    // Ranges hold whole runs of ten (the mathematical digits hold five runs in one range).
    (c <= end).then(|| (c as u32 - start as u32) % 10)
}

/// `str.isprintable` for one character: `repr` escapes the others.
pub fn is_printable(c: char) -> bool {
    c == ' ' || !UNPRINTABLE.has(c)
}

/// The maximal runs of characters of a class, with their byte ranges, in order.
pub fn runs(text: &str, class: fn(char) -> bool) -> impl Iterator<Item = (usize, &str)> {
    let mut rest = 0;
    std::iter::from_fn(move || {
        let start = rest + text[rest..].find(class)?;
        let tail = &text[start..];
        let length = tail.find(|c| !class(c)).unwrap_or(tail.len());
        rest = start + length;
        Some((start, &tail[..length]))
    })
}

/// `re.findall(r"\d+", text)`.
pub fn numbers(text: &str) -> impl Iterator<Item = &str> {
    runs(text, is_decimal).map(|(_, run)| run)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_those_of_python() {
        assert!(is_space('\x1c') && is_space('\u{3000}') && !is_space('\u{200b}'));
        // A combining acute accent is no word character in Python, though Rust's \w has it.
        assert!(!is_word('\u{301}') && is_word('é') && is_word('中') && is_word('²'));
        assert!(is_decimal('７') && !is_decimal('²') && !is_decimal('七'));
        assert_eq!(decimal_value('７'), Some(7));
        assert_eq!(decimal_value('𝟗'), Some(9));
        assert_eq!(decimal_value('x'), None);
        assert!(!is_printable('\u{a0}') && is_printable('é') && !is_printable('\u{200b}'));
    }

    #[test]
    fn numbers_are_runs_of_unicode_digits() {
        let found: Vec<&str> = numbers("段落１２，or 07a8").collect();
        assert_eq!(found, ["１２", "07", "8"]);
    }
}
