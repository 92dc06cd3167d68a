//! Text to token ids and back, exactly as each model's own tokenizer does it.
//!
//! A [`Tokenizer`] comes from a Hugging Face `tokenizer.json` ([`Tokenizer::from_dir`]) or from the metadata of a GGUF
//! file ([`Tokenizer::from_gguf`]). Plain text can never become a control token unless the caller asks for it with
//! [`Special::Parse`]: a document that holds `<|im_start|>` is data, not a turn of the conversation.

mod bpe;
mod byte_vocabulary;
mod error;
mod gguf;
mod json;
mod pieces;
mod sentencepiece;
mod split;
mod stream;
#[cfg(test)]
mod tests;

pub use byte_vocabulary::byte_vocabulary;
pub use error::TokenizerError;
pub use gguf::GgufVocab;
pub use pieces::TokenKind;
pub use stream::StreamDecoder;

use aho_corasick::{AhoCorasick, MatchKind};
use pieces::Pieces;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// What control tokens written out in a text mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Special {
    /// Nothing: they are plain text. For documents and for what users type.
    None,
    /// They are the tokens they name. For rendered chat templates.
    Parse,
    /// As `Parse`, and the start and end tokens that the model was trained with are added where they are missing.
    ParseWithBos,
}

/// A model's tokenizer. Cloning is cheap: clones share the vocabulary.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    engine: Engine,
    pieces: Pieces,
    ids: HashMap<Box<str>, u32>,
    bos: Option<u32>,
    eos_ids: Vec<u32>,
    /// Ids put before and after a text by `Special::ParseWithBos`.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    /// A space at the very start of decoded text was put there by encoding.
    strip_first_space: bool,
    chat_template: Option<String>,
    fingerprint: u64,
}

enum Engine {
    /// Our own path: control tokens are found first, the text between them goes to the codec.
    Native {
        codec: Box<gguf::Codec>,
        /// Tokens found under `Special::Parse`, and those found always.
        parse: Matcher,
        always: Matcher,
    },
    /// Everything is left to the `tokenizers` crate.
    Library(Box<json::Library>),
}

/// Finds tokens in text: the leftmost, and the longest of those.
struct Matcher(Option<(AhoCorasick, Vec<u32>)>);

impl Matcher {
    fn new<'a>(tokens: impl Iterator<Item = (u32, &'a str)>) -> Result<Self, TokenizerError> {
        let (ids, texts): (Vec<u32>, Vec<&str>) = tokens.filter(|(_, t)| !t.is_empty()).unzip();
        if ids.is_empty() {
            return Ok(Self(None));
        }
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(texts)
            .map_err(|e| TokenizerError::Library {
                doing: "indexing control tokens",
                message: e.to_string(),
            })?;
        Ok(Self(Some((finder, ids))))
    }

    /// Hands over the stretches of `text` between the tokens, and the token after each (none after the last).
    fn cut<'t, E>(
        &self,
        text: &'t str,
        mut each: impl FnMut(&'t str, Option<u32>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut start = 0;
        if let Some((finder, ids)) = &self.0 {
            for found in finder.find_iter(text) {
                each(
                    &text[start..found.start()],
                    Some(ids[found.pattern().as_usize()]),
                )?;
                start = found.end();
            }
        }
        each(&text[start..], None)
    }
}

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file describes.
    ///
    /// # Errors
    /// A field that contradicts another, a family or pre-tokenizer that is not known (the error lists those that are).
    pub fn from_gguf(vocab: &GgufVocab) -> Result<Self, TokenizerError> {
        gguf::build(vocab).map(|inner| Self {
            inner: Arc::new(inner),
        })
    }

    /// Reads `tokenizer.json`, given itself or as the folder that holds it. From the same folder, where present:
    /// `tokenizer_config.json` (start and end tokens, chat template), `generation_config.json` (further end tokens),
    /// `chat_template.jinja`.
    ///
    /// # Errors
    /// Files that cannot be read, or that are not what they should be.
    pub fn from_dir(path: &Path) -> Result<Self, TokenizerError> {
        json::load(path).map(|inner| Self {
            inner: Arc::new(inner),
        })
    }

    /// The ids of `text`.
    ///
    /// # Errors
    /// Only for vocabularies that cannot write every text (no byte tokens and no unknown token).
    pub fn encode(&self, text: &str, special: Special) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::with_capacity(text.len() / 4 + 2);
        match &self.inner.engine {
            Engine::Library(library) => library.encode(text, special != Special::None, &mut ids)?,
            Engine::Native {
                codec,
                parse,
                always,
            } => {
                let matcher = if special == Special::None {
                    always
                } else {
                    parse
                };
                matcher.cut(text, |stretch, token| {
                    codec.encode(stretch, &mut ids)?;
                    ids.extend(token);
                    Ok::<_, TokenizerError>(())
                })?;
            }
        }
        if special == Special::ParseWithBos {
            let Inner { prefix, suffix, .. } = &*self.inner;
            if !ids.starts_with(prefix) {
                ids.splice(0..0, prefix.iter().copied());
            }
            if !ids.ends_with(suffix) {
                ids.extend(suffix);
            }
        }
        Ok(ids)
    }

    /// The text of `ids`. Control tokens and ids outside the vocabulary give nothing; an unknown token gives
    /// U+2047 between spaces, bytes that are not UTF-8 give U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        if let Engine::Library(library) = &self.inner.engine
            && !library.tokens_are_bytes
        {
            return library.decode(ids);
        }
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        let mut at_start = true;
        for &id in ids {
            self.append_bytes(id, &mut at_start, &mut bytes);
        }
        match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(e) => String::from_utf8_lossy(e.as_bytes()).into_owned(),
        }
    }

    /// A decoder that takes ids one at a time and hands over whole characters only.
    pub fn stream(&self) -> StreamDecoder {
        StreamDecoder::new(self.clone())
    }

    /// The bytes of one token, a control token's name included; empty for an id outside the vocabulary. For
    /// SentencePiece tokens the space that begins a word is part of it.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.inner.pieces.bytes(id).to_vec()
    }

    /// What `id` is for; `None` outside the vocabulary.
    pub fn kind(&self, id: u32) -> Option<TokenKind> {
        self.inner.pieces.kind(id)
    }

    /// The start token, whether or not the model wants it before every text.
    pub fn bos(&self) -> Option<u32> {
        self.inner.bos
    }

    /// The tokens that end a turn or a document: generation stops at any of them. Ascending.
    pub fn eos_ids(&self) -> &[u32] {
        &self.inner.eos_ids
    }

    /// Number of ids, unused ones included: every id is below it.
    pub fn vocab_size(&self) -> usize {
        self.inner.pieces.len()
    }

    /// The model's chat template (Jinja), if its file has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.inner.chat_template.as_deref()
    }

    /// Equal for tokenizers read from equal files, different (but for accident, 1 in 2^64) for those that could give
    /// other ids. Stable across runs and machines; a guard for saved token ids, no protection against forgery.
    pub fn fingerprint(&self) -> u64 {
        self.inner.fingerprint
    }

    /// The id of a token by its name in the vocabulary (`<|im_end|>`, `Ġthe`, `▁the`).
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.ids.get(token).copied()
    }

    fn tokens_are_bytes(&self) -> bool {
        match &self.inner.engine {
            Engine::Library(library) => library.tokens_are_bytes,
            Engine::Native { .. } => true,
        }
    }

    /// Appends what `id` adds to decoded text. `at_start` is cleared by the first text.
    fn append_bytes(&self, id: u32, at_start: &mut bool, out: &mut Vec<u8>) {
        let inner = &*self.inner;
        match inner.pieces.kind(id) {
            None | Some(TokenKind::Control) => return,
            Some(TokenKind::Unknown) => {
                *at_start = false;
                out.extend_from_slice(UNKNOWN_TEXT.as_bytes());
                return;
            }
            Some(_) => {}
        }
        let mut bytes = inner.pieces.bytes(id);
        if *at_start && !bytes.is_empty() {
            *at_start = false;
            if inner.strip_first_space && bytes[0] == b' ' {
                bytes = &bytes[1..];
            }
        }
        out.extend_from_slice(bytes);
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("bos", &self.bos())
            .field("eos_ids", &self.eos_ids())
            .finish_non_exhaustive()
    }
}

/// What decoding shows for an unknown token, as SentencePiece does.
const UNKNOWN_TEXT: &str = " \u{2047} ";

/// Names of tokens that end a turn or a document, whatever the file says about its end token.
const END_TOKENS: &[&str] = &[
    "</s>",
    "<eos>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<turn|>",
];

/// The end tokens: those named in the file, and those of [`END_TOKENS`] that are control tokens here.
fn end_ids(
    named: impl IntoIterator<Item = u32>,
    ids: &HashMap<Box<str>, u32>,
    pieces: &Pieces,
) -> Vec<u32> {
    let known = END_TOKENS
        .iter()
        .filter_map(|t| ids.get(*t).copied())
        .filter(|&id| pieces.kind(id) == Some(TokenKind::Control));
    let mut all: Vec<u32> = named.into_iter().chain(known).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// FNV-1a, 64 bits: small, and the same on every machine.
struct Fingerprint(u64);

impl Fingerprint {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    /// Adds bytes and a separator that depends on their number.
    fn add(&mut self, bytes: &[u8]) {
        for &b in bytes.iter().chain(&(bytes.len() as u64).to_le_bytes()) {
            self.0 = (self.0 ^ b as u64).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}
