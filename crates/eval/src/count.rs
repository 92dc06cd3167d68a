//! Counting tokens as the target does, without knowing the target.

use crate::error::{EvalError, Result};
use crate::python::chars::{is_space, is_word};
use longspan_data::tokenize::{Special, Tokenizer};

/// Counts tokens.
pub trait Counter: Send + Sync {
    /// Tokens of a text.
    ///
    /// # Errors
    /// Text that the tokenizer cannot take.
    fn count(&self, text: &str) -> Result<usize>;

    /// The longest beginning of a text with at most this many tokens (to a character; cuts may
    /// count one token more where a token is split).
    ///
    /// # Errors
    /// As [`Counter::count`].
    fn cut<'t>(&self, text: &'t str, tokens: usize) -> Result<&'t str>;

    /// Tokens that a prompt gets around its text: beginning of text, chat template.
    fn overhead(&self) -> usize {
        0
    }

    /// Its name, for the report's head.
    fn name(&self) -> String;
}

/// Words and single other characters: `\w+|[^\w\s]`. For targets without a tokenizer.
pub struct Words;

impl Words {
    /// Ends of tokens in bytes.
    fn ends(text: &str) -> impl Iterator<Item = usize> {
        let mut chars = text.char_indices().peekable();
        std::iter::from_fn(move || {
            while let Some((at, c)) = chars.next() {
                if is_word(c) {
                    while chars.next_if(|(_, c)| is_word(*c)).is_some() {}
                    return Some(chars.peek().map_or(text.len(), |(at, _)| *at));
                }
                if !is_space(c) {
                    return Some(at + c.len_utf8());
                }
            }
            None
        })
    }
}

impl Counter for Words {
    fn count(&self, text: &str) -> Result<usize> {
        Ok(Words::ends(text).count())
    }

    fn cut<'t>(&self, text: &'t str, tokens: usize) -> Result<&'t str> {
        let end = if tokens == 0 {
            0
        } else {
            Words::ends(text).nth(tokens - 1).unwrap_or(text.len())
        };
        Ok(&text[..end])
    }

    fn name(&self) -> String {
        "words".into()
    }
}

impl Counter for Tokenizer {
    fn count(&self, text: &str) -> Result<usize> {
        let ids = self.encode(text, Special::None);
        Ok(ids.map_err(|e| EvalError::Input(e.to_string()))?.len())
    }

    fn cut<'t>(&self, text: &'t str, tokens: usize) -> Result<&'t str> {
        let ids = self
            .encode(text, Special::None)
            .map_err(|e| EvalError::Input(e.to_string()))?;
        if ids.len() <= tokens {
            return Ok(text);
        }
        let mut end: usize = ids[..tokens]
            .iter()
            .map(|&id| self.token_bytes(id).len())
            .sum();
        end = end.min(text.len());
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        Ok(&text[..end])
    }

    fn name(&self) -> String {
        format!("tokenizer {:016x}", self.fingerprint())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_the_expression() {
        let regex = regex::Regex::new(r"\w+|[^\w\s]").unwrap();
        for text in [
            "",
            "a b",
            "Dr. O'Neil's 3.5%  \n\tok",
            "été—naïve…",
            "VAR A_1 = 12",
        ] {
            assert_eq!(
                Words.count(text).unwrap(),
                regex.find_iter(text).count(),
                "{text}"
            );
        }
        assert_eq!(Words.cut("one, two three", 3).unwrap(), "one, two");
        assert_eq!(Words.cut("one", 0).unwrap(), "");
    }
}
