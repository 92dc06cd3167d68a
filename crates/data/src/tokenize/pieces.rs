//! What each token id stands for: its bytes and its kind, kept in one flat buffer.

use super::TokenizerError;

/// What a token is for. The numbers are those of SentencePiece and of `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum TokenKind {
    /// An ordinary piece of text.
    Normal = 1,
    /// Stands for what the vocabulary cannot write.
    Unknown = 2,
    /// Steers the model (`<s>`, `<|im_start|>`); never produced from plain text.
    Control = 3,
    /// Text that is always one token wherever it stands.
    UserDefined = 4,
    /// A slot that encoding never uses.
    Unused = 5,
    /// One raw byte, for characters outside the vocabulary.
    Byte = 6,
}

impl TokenKind {
    /// Reads the number used by GGUF; `None` when there is no such kind. 0 (undefined) reads as normal.
    pub fn from_ggml(value: i32) -> Option<Self> {
        Some(match value {
            0 | 1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }
}

/// The bytes and kinds of all ids, `0..len`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pieces {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    kinds: Vec<TokenKind>,
}

impl Pieces {
    pub fn push(&mut self, bytes: &[u8], kind: TokenKind) {
        self.bytes.extend_from_slice(bytes);
        self.ends.push(self.bytes.len());
        self.kinds.push(kind);
    }

    pub fn len(&self) -> usize {
        self.kinds.len()
    }

    /// Bytes of `id`; empty for an id outside the vocabulary.
    pub fn bytes(&self, id: u32) -> &[u8] {
        let i = id as usize;
        match self.ends.get(i) {
            None => &[],
            Some(&end) => &self.bytes[if i == 0 { 0 } else { self.ends[i - 1] }..end],
        }
    }

    pub fn kind(&self, id: u32) -> Option<TokenKind> {
        self.kinds.get(id as usize).copied()
    }
}

/// The printable stand-in of a byte in byte-level BPE vocabularies (GPT-2): visible Latin-1 characters stand for
/// themselves, the other 68 bytes for U+0100 onwards, in order.
pub(crate) fn byte_to_char(byte: u8) -> char {
    let n = byte as u32;
    let shifted = match n {
        0x00..=0x20 => 0x100 + n,
        0x7f..=0xa0 => 0x121 + (n - 0x7f),
        0xad => 0x143,
        _ => n,
    };
    char::from_u32(shifted).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The inverse of [`byte_to_char`]; `None` for a character that stands for no byte.
pub(crate) fn char_to_byte(c: char) -> Option<u8> {
    let n = c as u32;
    Some(match n {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => n as u8,
        0x100..=0x120 => (n - 0x100) as u8,
        0x121..=0x142 => (n - 0x121 + 0x7f) as u8,
        0x143 => 0xad,
        _ => return None,
    })
}

/// The bytes that a byte-level token stands for. A token with a character outside the alphabet stands for itself.
pub(crate) fn byte_level_bytes(token: &str) -> Vec<u8> {
    token
        .chars()
        .map(char_to_byte)
        .collect::<Option<Vec<u8>>>()
        .unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The byte that a SentencePiece byte token such as `<0x0A>` stands for.
pub(crate) fn byte_token(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        u8::from_str_radix(hex, 16).ok()
    } else {
        None
    }
}

/// Checks an optional id against the size of the vocabulary.
pub(crate) fn check_id(field: &str, id: Option<u32>, size: usize) -> Result<(), TokenizerError> {
    match id {
        Some(id) if id as usize >= size => Err(TokenizerError::IdOutOfRange {
            field: field.to_string(),
            found: id as u64,
            size: size as u64,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_is_a_bijection_on_printable_characters() {
        let mut seen = std::collections::HashSet::new();
        for b in 0..=255u8 {
            let c = byte_to_char(b);
            assert_eq!(char_to_byte(c), Some(b));
            assert!(seen.insert(c) && !c.is_whitespace() && !c.is_control());
        }
        assert_eq!(byte_to_char(b' '), 'Ġ');
        assert_eq!(byte_to_char(b'\n'), 'Ċ');
        assert_eq!(char_to_byte('▁'), None);
    }

    #[test]
    fn byte_tokens_are_read_strictly() {
        assert_eq!(byte_token("<0x0A>"), Some(10));
        for bad in ["<0x+A>", "<0x0>", "0x0A", "<0x0A", "<0xGG>", "<0x0AA>"] {
            assert_eq!(byte_token(bad), None, "{bad}");
        }
    }
}
