//! Text out of ids as they arrive: only whole characters are handed over.

use super::Tokenizer;

/// Turns ids into text one at a time. What it hands over, put together with [`finish`](Self::finish), is
/// [`Tokenizer::decode`] of all the ids.
#[derive(Debug, Clone)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    /// Bytes received and not yet handed over: the beginning of a character.
    bytes: Vec<u8>,
    /// The next piece of text is the first, whose leading space may be an artefact of encoding.
    at_start: bool,
    /// Only for tokenizers whose tokens have no bytes of their own (WordPiece): ids since the last hand-over.
    window: Vec<u32>,
    /// How much of the decoded window was handed over already, in bytes.
    shown: usize,
}

impl StreamDecoder {
    pub(super) fn new(tokenizer: Tokenizer) -> Self {
        Self {
            tokenizer,
            bytes: Vec::new(),
            at_start: true,
            window: Vec::new(),
            shown: 0,
        }
    }

    /// Takes the next id. `Some` text once at least one whole character is there; a control token, or the first bytes
    /// of a character, give `None`. Bytes that can never become a character come out as U+FFFD.
    pub fn push(&mut self, id: u32) -> Option<String> {
        if !self.tokenizer.tokens_are_bytes() {
            return self.push_to_window(id);
        }
        self.tokenizer
            .append_bytes(id, &mut self.at_start, &mut self.bytes);
        let (text, rest) = complete_prefix(&self.bytes);
        self.bytes.drain(..rest);
        (!text.is_empty()).then_some(text)
    }

    /// Ends the stream: what is left of an unfinished character, as U+FFFD.
    pub fn finish(&mut self) -> Option<String> {
        if !self.tokenizer.tokens_are_bytes() {
            let text = self.tokenizer.decode(&self.window);
            let rest = text.get(self.shown..).unwrap_or("").to_string();
            self.shown = text.len();
            return (!rest.is_empty()).then_some(rest);
        }
        let left = std::mem::take(&mut self.bytes);
        (!left.is_empty()).then(|| String::from_utf8_lossy(&left).into_owned())
    }

    fn push_to_window(&mut self, id: u32) -> Option<String> {
        /// Ids kept as context for the next ones, and the size at which older ones are dropped.
        const CONTEXT: usize = 8;
        const LIMIT: usize = 64;
        self.window.push(id);
        let text = self.tokenizer.decode(&self.window);
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return None;
        }
        let new = text.get(self.shown..).unwrap_or("").to_string();
        self.shown = text.len();
        if self.window.len() > LIMIT {
            self.window.drain(..LIMIT - CONTEXT);
            self.shown = self.tokenizer.decode(&self.window).len();
        }
        (!new.is_empty()).then_some(new)
    }
}

/// The text of the longest prefix that cannot change any more, and that prefix's length in bytes.
fn complete_prefix(bytes: &[u8]) -> (String, usize) {
    let mut text = String::new();
    let mut done = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        done += chunk.valid().len();
        let invalid = chunk.invalid();
        if invalid.is_empty() {
            continue;
        }
        let unfinished = done + invalid.len() == bytes.len()
            && std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
        if unfinished {
            break;
        }
        text.push(char::REPLACEMENT_CHARACTER);
        done += invalid.len();
    }
    (text, done)
}

#[cfg(test)]
mod tests {
    use super::complete_prefix;
    use proptest::prelude::*;

    #[test]
    fn a_character_waits_for_its_last_byte() {
        assert_eq!(complete_prefix(b"ab\xe2\x96"), ("ab".into(), 2));
        assert_eq!(complete_prefix(b"ab\xe2\x96\x81"), ("ab\u{2581}".into(), 5));
        assert_eq!(complete_prefix(b"\xff\xf0\x9f"), ("\u{fffd}".into(), 1));
        assert_eq!(complete_prefix(b"\xf0\x9fa"), ("\u{fffd}a".into(), 3));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn bytes_one_by_one_give_the_lossy_text(bytes in proptest::collection::vec(
            prop_oneof![any::<u8>(), Just(0xe2), Just(0x96), Just(0x81), Just(0xf0), Just(0x9f), Just(b'a')], 0..24)) {
            let (mut out, mut held) = (String::new(), Vec::new());
            for &b in &bytes {
                held.push(b);
                let (text, n) = complete_prefix(&held);
                out.push_str(&text);
                held.drain(..n);
            }
            out.push_str(&String::from_utf8_lossy(&held));
            prop_assert_eq!(out, String::from_utf8_lossy(&bytes));
        }
    }
}
