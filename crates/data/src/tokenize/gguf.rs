//! From the metadata of a GGUF file to a tokenizer: check that the fields agree, then build the family they name.

use super::bpe::ByteBpe;
use super::pieces::{Pieces, byte_level_bytes, byte_token, check_id};
use super::sentencepiece::{Entry, SPACE, Search, SentencePiece};
use super::split::PreRules;
use super::{Engine, Fingerprint, Inner, Matcher, TokenKind, TokenizerError, end_ids};
use std::collections::HashMap;
use tokenizers::{NormalizedString, Normalizer};

/// The fields `tokenizer.*` of a GGUF file, as they stand there. `None` and empty: not in the file.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GgufVocab {
    /// `tokenizer.ggml.model`: `gpt2`, `llama` or `t5`.
    pub model: String,
    /// `tokenizer.ggml.pre`: how byte-level BPE cuts text into words.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`; a token's place is its id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.scores`, one for each token (SentencePiece models).
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.token_type`, one for each token; see [`TokenKind`].
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`, best first (BPE).
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`
    pub eos: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`
    pub unknown: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix` (SentencePiece models; yes if absent)
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.ggml.eot_token_id`
    pub eot: Option<u32>,
    /// `tokenizer.chat_template`
    pub chat_template: Option<String>,
    /// `tokenizer.ggml.precompiled_charsmap` (unigram models): how characters are normalised.
    pub precompiled_charsmap: Option<Vec<u8>>,
    /// `tokenizer.ggml.remove_extra_whitespaces` (unigram models; yes if absent)
    pub remove_extra_whitespaces: Option<bool>,
}

/// Encodes text without control tokens.
pub(super) enum Codec {
    Bytes(ByteBpe),
    Pieces {
        model: SentencePiece,
        /// A word's space is also put before the first word.
        space_prefix: bool,
        normalise: Option<Normalise>,
    },
}

/// What unigram models do to text first.
pub(super) struct Normalise {
    characters: Option<tokenizers::normalizers::Precompiled>,
    /// Runs of spaces become one, those at the ends none.
    collapse_spaces: bool,
}

impl Codec {
    pub fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<(), TokenizerError> {
        match self {
            Codec::Bytes(bpe) => bpe.encode(text, out),
            Codec::Pieces {
                model,
                space_prefix,
                normalise,
            } => {
                let normal;
                let text = match normalise {
                    Some(n) => {
                        normal = n.apply(text)?;
                        &normal
                    }
                    None => text,
                };
                if text.is_empty() {
                    return Ok(());
                }
                let mut written =
                    String::with_capacity(text.len() + text.len() / 2 + SPACE.len_utf8());
                if *space_prefix {
                    written.push(SPACE);
                }
                let mut rest = text;
                while let Some(at) = rest.find(' ') {
                    written.push_str(&rest[..at]);
                    written.push(SPACE);
                    rest = &rest[at + 1..];
                }
                written.push_str(rest);
                model.encode(&written, out)
            }
        }
    }
}

impl Normalise {
    fn apply(&self, text: &str) -> Result<String, TokenizerError> {
        let text = match &self.characters {
            None => text.to_string(),
            Some(map) => {
                let mut normalised = NormalizedString::from(text);
                map.normalize(&mut normalised)
                    .map_err(|e| TokenizerError::Library {
                        doing: "normalising characters",
                        message: e.to_string(),
                    })?;
                normalised.get().to_string()
            }
        };
        if !self.collapse_spaces {
            return Ok(text);
        }
        let mut out = String::with_capacity(text.len());
        for word in text.split(' ').filter(|w| !w.is_empty()) {
            if !out.is_empty() {
                out.push(' ');
            }
            out.push_str(word);
        }
        // At the end, spaces go in either spelling.
        out.truncate(out.trim_end_matches([' ', SPACE]).len());
        Ok(out)
    }
}

const MODELS: &[&str] = &["gpt2", "llama", "t5"];

/// Builds what the fields describe.
pub(super) fn build(vocab: &GgufVocab) -> Result<Inner, TokenizerError> {
    let size = vocab.tokens.len();
    if size == 0 {
        return Err(TokenizerError::Length {
            field: "tokenizer.ggml.tokens",
            found: 0,
            expected: 1,
        });
    }
    if !MODELS.contains(&vocab.model.as_str()) {
        return Err(TokenizerError::UnknownModel {
            found: vocab.model.clone(),
            known: MODELS.join(", "),
        });
    }
    let sentencepiece = vocab.model != "gpt2";
    let check_length = |field, found: usize, optional: bool| {
        if found == size || optional && found == 0 {
            Ok(())
        } else {
            Err(TokenizerError::Length {
                field,
                found,
                expected: size,
            })
        }
    };
    check_length("tokenizer.ggml.token_type", vocab.token_types.len(), true)?;
    check_length("tokenizer.ggml.scores", vocab.scores.len(), !sentencepiece)?;
    for (field, id) in [
        ("tokenizer.ggml.bos_token_id", vocab.bos),
        ("tokenizer.ggml.eos_token_id", vocab.eos),
        ("tokenizer.ggml.unknown_token_id", vocab.unknown),
        ("tokenizer.ggml.eot_token_id", vocab.eot),
    ] {
        check_id(field, id, size)?;
    }
    let mut ids: HashMap<Box<str>, u32> = HashMap::with_capacity(size);
    for (id, token) in vocab.tokens.iter().enumerate() {
        if let Some(first) = ids.insert(token.as_str().into(), id as u32) {
            return Err(TokenizerError::DuplicateToken {
                token: token.clone(),
                first,
                second: id as u32,
            });
        }
    }
    let mut kinds = Vec::with_capacity(size);
    for (id, token) in vocab.tokens.iter().enumerate() {
        let kind = match vocab.token_types.get(id) {
            Some(&n) => TokenKind::from_ggml(n).ok_or_else(|| TokenizerError::BadValue {
                field: format!("tokenizer.ggml.token_type of token {id} `{token}`"),
                found: n.to_string(),
                expected: "1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused or 6 byte"
                    .into(),
            })?,
            // Without types: byte tokens by their shape, the named ones by their role.
            None if sentencepiece && byte_token(token).is_some() => TokenKind::Byte,
            None if Some(id as u32) == vocab.unknown => TokenKind::Unknown,
            None if [vocab.bos, vocab.eos, vocab.eot].contains(&Some(id as u32)) => {
                TokenKind::Control
            }
            None => TokenKind::Normal,
        };
        kinds.push(kind);
    }
    let named = |wanted: &'static [TokenKind]| {
        vocab
            .tokens
            .iter()
            .enumerate()
            .filter(|&(id, _)| wanted.contains(&kinds[id]))
            .map(|(id, t)| (id as u32, t.as_str()))
    };

    let mut pieces = Pieces::default();
    let (codec, add_bos, parse, always);
    if sentencepiece {
        for (token, &kind) in vocab.tokens.iter().zip(&kinds) {
            match (kind, byte_token(token)) {
                (TokenKind::Byte, Some(byte)) => pieces.push(&[byte], kind),
                (TokenKind::Control | TokenKind::Unknown, _) => pieces.push(token.as_bytes(), kind),
                _ => pieces.push(token.replace(SPACE, " ").as_bytes(), kind),
            }
        }
        let entries: Vec<Entry> = (vocab.tokens.iter().zip(&vocab.scores).zip(&kinds))
            .map(|((text, &score), &kind)| Entry { text, score, kind })
            .collect();
        let unigram = vocab.model == "t5";
        let search = if unigram {
            Search::Unigram
        } else {
            Search::Merge
        };
        codec = Codec::Pieces {
            model: SentencePiece::new(search, &entries, vocab.unknown)?,
            space_prefix: vocab.add_space_prefix.unwrap_or(true),
            normalise: unigram.then(|| normaliser(vocab)).transpose()?,
        };
        add_bos = !unigram;
        parse = Matcher::new(named(&[TokenKind::Control, TokenKind::Unknown]))?;
        always = Matcher(None);
    } else {
        for (token, &kind) in vocab.tokens.iter().zip(&kinds) {
            match kind {
                TokenKind::Normal | TokenKind::Byte => pieces.push(&byte_level_bytes(token), kind),
                _ => pieces.push(token.as_bytes(), kind),
            }
        }
        let rules = PreRules::named(vocab.pre.as_deref())?;
        add_bos = rules.add_bos;
        let ordinary = named(&[TokenKind::Normal, TokenKind::Byte])
            .map(|(id, t)| (t.to_string(), id))
            .collect();
        // The unknown token of byte-level files is an end token in most; their own tokenizers never produce it.
        codec = Codec::Bytes(ByteBpe::new(rules, ordinary, &vocab.merges, None)?);
        parse = Matcher::new(named(&[
            TokenKind::Control,
            TokenKind::Unknown,
            TokenKind::UserDefined,
        ]))?;
        always = Matcher::new(named(&[TokenKind::UserDefined]))?;
    }
    let given = |add: bool, id: Option<u32>| {
        if add {
            id.into_iter().collect()
        } else {
            Vec::new()
        }
    };
    Ok(Inner {
        eos_ids: end_ids([vocab.eos, vocab.eot].into_iter().flatten(), &ids, &pieces),
        bos: vocab.bos,
        prefix: given(vocab.add_bos.unwrap_or(add_bos), vocab.bos),
        suffix: given(vocab.add_eos.unwrap_or(vocab.model == "t5"), vocab.eos),
        strip_first_space: sentencepiece && vocab.add_space_prefix.unwrap_or(true),
        chat_template: vocab.chat_template.clone(),
        fingerprint: fingerprint(vocab, &kinds),
        engine: Engine::Native {
            codec: Box::new(codec),
            parse,
            always,
        },
        pieces,
        ids,
    })
}

fn normaliser(vocab: &GgufVocab) -> Result<Normalise, TokenizerError> {
    let characters = match &vocab.precompiled_charsmap {
        None => None,
        Some(map) => {
            let bad = |found: String| TokenizerError::BadValue {
                field: "tokenizer.ggml.precompiled_charsmap".into(),
                found,
                expected: "the character map of a SentencePiece model".into(),
            };
            // The map starts with the size in bytes of its double array; the library trusts it.
            let size = map.first_chunk().map_or(0, |b| u32::from_le_bytes(*b)) as usize;
            if size == 0 || !size.is_multiple_of(4) || size > map.len().saturating_sub(4) {
                return Err(bad(format!(
                    "{} bytes that announce a table of {size}",
                    map.len()
                )));
            }
            let built = tokenizers::normalizers::Precompiled::from(map);
            Some(built.map_err(|e| bad(e.to_string()))?)
        }
    };
    Ok(Normalise {
        characters,
        collapse_spaces: vocab.remove_extra_whitespaces.unwrap_or(true),
    })
}

/// Everything that can change the ids of a text.
fn fingerprint(vocab: &GgufVocab, kinds: &[TokenKind]) -> u64 {
    let mut sum = Fingerprint::new();
    sum.add(vocab.model.as_bytes());
    sum.add(vocab.pre.as_deref().unwrap_or("default").as_bytes());
    for (id, (token, &kind)) in vocab.tokens.iter().zip(kinds).enumerate() {
        sum.add(token.as_bytes());
        sum.add(&[kind as u8]);
        if vocab.model != "gpt2" {
            sum.add(&vocab.scores[id].to_bits().to_le_bytes());
        }
    }
    for merge in &vocab.merges {
        sum.add(merge.as_bytes());
    }
    let options = [
        vocab.add_bos,
        vocab.add_eos,
        vocab.add_space_prefix,
        vocab.remove_extra_whitespaces,
    ];
    sum.add(
        format!(
            "{options:?} {:?} {:?} {:?}",
            vocab.bos, vocab.eos, vocab.unknown
        )
        .as_bytes(),
    );
    sum.add(vocab.precompiled_charsmap.as_deref().unwrap_or(&[]));
    sum.0
}
