//! Byte-level BPE (GPT-2, Llama 3, Qwen, Tekken): cut into words, write the bytes as characters, merge.
//!
//! The merging is done by the `tokenizers` crate. Words repeat, so each distinct one is merged once per call.

use super::TokenizerError;
use super::pieces::byte_to_char;
use super::split::PreRules;
use std::borrow::Cow;
use std::collections::HashMap;
use tokenizers::models::bpe::{BPE, Merges};
use tokenizers::{Model, NormalizedString, Normalizer};

/// A byte-level BPE encoder for text without control tokens.
#[derive(Debug, Clone)]
pub(crate) struct ByteBpe {
    rules: PreRules,
    model: BPE,
}

/// Longest word, in bytes, whose ids are remembered during a call.
const CACHED_WORD: usize = 64;

impl ByteBpe {
    /// `vocab` holds the ordinary tokens only, so that no text can become a control token.
    ///
    /// # Errors
    /// [`TokenizerError::BadMerge`] for a rule that is not two tokens of `vocab` making a third.
    pub fn new(
        rules: PreRules,
        vocab: HashMap<String, u32>,
        merges: &[String],
        unknown: Option<String>,
    ) -> Result<Self, TokenizerError> {
        let mut rank: Merges = Vec::with_capacity(merges.len());
        let mut joined = String::new();
        for (index, merge) in merges.iter().enumerate() {
            let bad = |problem: String| TokenizerError::BadMerge {
                index,
                merge: merge.clone(),
                problem,
            };
            // A token may itself begin with a space, so the separator is looked for after the first character.
            let skip = merge.chars().next().map_or(0, char::len_utf8);
            let Some(at) = merge[skip..].find(' ').map(|at| at + skip) else {
                return Err(bad("expected two tokens with a space between".into()));
            };
            let (left, right) = (&merge[..at], &merge[at + 1..]);
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            for token in [left, right, &joined] {
                if !vocab.contains_key(token) {
                    return Err(bad(format!(
                        "the vocabulary has no ordinary token `{token}`"
                    )));
                }
            }
            rank.push((left.to_string(), right.to_string()));
        }
        let mut builder = BPE::builder()
            .vocab_and_merges(
                vocab
                    .into_iter()
                    .collect::<tokenizers::models::bpe::Vocab>(),
                rank,
            )
            .cache_capacity(0)
            .ignore_merges(rules.ignore_merges);
        if let Some(unknown) = unknown {
            builder = builder.unk_token(unknown);
        }
        let model = builder.build().map_err(|e| TokenizerError::Library {
            doing: "building the merges",
            message: e.to_string(),
        })?;
        Ok(Self { rules, model })
    }

    /// Appends the ids of `text`, in time about linear in its length. A byte that the vocabulary lacks (SmolLM2 has no
    /// token for some that are rare) becomes the unknown token if there is one and else nothing, as in the original.
    ///
    /// # Errors
    /// [`TokenizerError::Library`] if the unknown token is not in the vocabulary.
    pub fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let text = if self.rules.nfc {
            nfc(text)?
        } else {
            Cow::Borrowed(text)
        };
        let mut known: HashMap<&str, (usize, usize)> = HashMap::new();
        let mut written = String::new();
        self.rules.splitter.split(&text, &mut |word| {
            if let Some(&(start, end)) = known.get(word) {
                out.extend_from_within(start..end);
                return Ok(());
            }
            let start = out.len();
            written.clear();
            written.extend(word.bytes().map(byte_to_char));
            let tokens = self
                .model
                .tokenize(&written)
                .map_err(|e| TokenizerError::Library {
                    doing: "merging a word",
                    message: e.to_string(),
                })?;
            out.extend(tokens.iter().map(|t| t.id));
            if word.len() <= CACHED_WORD {
                known.insert(word, (start, out.len()));
            }
            Ok(())
        })
    }
}

/// Canonical composition. An ASCII character composes only with what follows it, so between two of them nothing
/// changes, and each run of other characters is composed together with the one ASCII character before it.
fn nfc(text: &str) -> Result<Cow<'_, str>, TokenizerError> {
    let bytes = text.as_bytes();
    let next = |from: usize, ascii: bool| {
        let rest = bytes[from..].iter();
        rest.take_while(|b| b.is_ascii() != ascii).count() + from
    };
    let mut out = String::new();
    let mut done = 0;
    loop {
        let run = next(done, false);
        let start = if run > done { run - 1 } else { run };
        if run == bytes.len() {
            break;
        }
        let end = next(run, true);
        out.push_str(&text[done..start]);
        let mut normalized = NormalizedString::from(&text[start..end]);
        tokenizers::normalizers::unicode::NFC
            .normalize(&mut normalized)
            .map_err(|e| TokenizerError::Library {
                doing: "composing characters (NFC)",
                message: e.to_string(),
            })?;
        out.push_str(normalized.get());
        done = end;
    }
    if done == 0 {
        return Ok(Cow::Borrowed(text));
    }
    out.push_str(&text[done..]);
    Ok(Cow::Owned(out))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]
        #[test]
        fn composing_in_runs_is_composing_the_whole(chars in proptest::collection::vec(prop_oneof![
            proptest::sample::select("aeAZ <=> \n\u{338}\u{301}\u{327}\u{344}\u{1100}\u{1161}\u{11a8}가\u{958}Ωé中\u{f900}".chars().collect::<Vec<_>>()),
            any::<char>(),
        ], 0..24)) {
            let text: String = chars.into_iter().collect();
            let mut whole = NormalizedString::from(text.as_str());
            tokenizers::normalizers::unicode::NFC.normalize(&mut whole).unwrap();
            prop_assert_eq!(nfc(&text).unwrap(), whole.get());
        }
    }
}
