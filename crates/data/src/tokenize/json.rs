//! From a Hugging Face `tokenizer.json` and its neighbours to a tokenizer.
//!
//! Byte-level BPE files whose rules are known take our own path, which is several times faster; everything else is left
//! to the `tokenizers` crate. Both are checked first for what would make the crate panic or allocate without bound.

use super::bpe::ByteBpe;
use super::gguf::Codec;
use super::pieces::{Pieces, byte_level_bytes, byte_token};
use super::split::PreRules;
use super::{Engine, Fingerprint, Inner, Matcher, TokenKind, TokenizerError, end_ids};
use serde_json::Value;
use std::collections::HashMap;
use std::hash::BuildHasher;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Ids above this are taken for damage: no vocabulary comes near, and a table of all ids must fit in memory.
const MAX_ID: u64 = 1 << 24;

/// A tokenizer of the `tokenizers` crate.
pub(super) struct Library {
    parse: tokenizers::Tokenizer,
    /// The same with special tokens that no text can name. Made when first needed.
    plain: OnceLock<Result<Box<tokenizers::Tokenizer>, String>>,
    /// Decoding is putting the bytes of the tokens together.
    pub tokens_are_bytes: bool,
}

impl Library {
    pub fn encode(
        &self,
        text: &str,
        special: bool,
        out: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        let tokenizer = if special {
            &self.parse
        } else {
            let plain = self.plain.get_or_init(|| {
                let plain = guard("building the tokenizer for plain text", || {
                    without_special_names(&self.parse)
                });
                plain.map(Box::new).map_err(|e| e.to_string())
            });
            plain
                .as_deref()
                .map_err(|message| TokenizerError::Library {
                    doing: "encoding",
                    message: message.clone(),
                })?
        };
        let encoding = guard("encoding", || tokenizer.encode_fast(text, false))?;
        out.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    pub fn decode(&self, ids: &[u32]) -> String {
        guard("decoding", || self.parse.decode(ids, true)).unwrap_or_default()
    }
}

/// A copy whose special tokens bear names that nobody can guess. The library's own switch for plain text keeps added
/// tokens from being found, but a model whose vocabulary lists them (unigram, word level) finds them all the same.
fn without_special_names(
    tokenizer: &tokenizers::Tokenizer,
) -> tokenizers::Result<tokenizers::Tokenizer> {
    let secret = std::hash::RandomState::new().hash_one(0);
    let mut json = serde_json::to_value(tokenizer)?;
    let mut renamed: HashMap<String, String> = HashMap::new();
    for entry in json["added_tokens"].as_array_mut().into_iter().flatten() {
        if entry["special"] == true
            && let Some(name) = entry["content"].as_str()
        {
            let new = format!("\u{10ffff}{secret:x} {}", entry["id"]);
            renamed.insert(name.to_string(), new.clone());
            entry["content"] = Value::String(new);
        }
    }
    let rename = |name: &mut Value| {
        if let Some(new) = name.as_str().and_then(|n| renamed.get(n)) {
            *name = Value::String(new.clone());
        }
    };
    let model = &mut json["model"];
    rename(&mut model["unk_token"]);
    match &mut model["vocab"] {
        Value::Object(table) => {
            for (name, new) in &renamed {
                if let Some(id) = table.remove(name) {
                    table.insert(new.clone(), id);
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|entry| rename(&mut entry[0])),
        _ => {}
    }
    if let Value::Array(merges) = &mut model["merges"] {
        merges.retain(|merge| {
            let (left, right) = match merge {
                Value::String(text) => text.split_once(' ').unwrap_or_default(),
                pair => pair[0].as_str().zip(pair[1].as_str()).unwrap_or_default(),
            };
            let joined = format!("{left}{right}");
            ![left, right, &joined]
                .into_iter()
                .any(|token| renamed.contains_key(token))
        });
    }
    json["post_processor"] = Value::Null;
    let mut plain: tokenizers::Tokenizer = serde_json::from_value(json)?;
    plain.set_encode_special_tokens(true);
    Ok(plain)
}

/// Runs code of the library; its errors, and its panics on files that pass our checks, become typed errors.
fn guard<T>(
    doing: &'static str,
    f: impl FnOnce() -> tokenizers::Result<T>,
) -> Result<T, TokenizerError> {
    let message = match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(e)) => e.to_string(),
        Err(_) => "the library gave up on this file (panic)".into(),
    };
    Err(TokenizerError::Library { doing, message })
}

/// Reads a file of JSON. `None` if there is no such file.
fn read_json(path: &Path) -> Result<Option<Value>, TokenizerError> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(TokenizerError::Read {
                path: path.into(),
                source,
            });
        }
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|e| TokenizerError::Json {
            path: path.into(),
            found: e.to_string(),
            expected: "JSON",
        })
}

/// See [`super::Tokenizer::from_dir`].
pub(super) fn load(path: &Path) -> Result<Inner, TokenizerError> {
    let (folder, file) = if path.is_dir() {
        (path.to_path_buf(), path.join("tokenizer.json"))
    } else {
        (
            path.parent().map(PathBuf::from).unwrap_or_default(),
            path.to_path_buf(),
        )
    };
    let Some(json) = read_json(&file)? else {
        return Err(TokenizerError::Read {
            path: file,
            source: std::io::Error::new(std::io::ErrorKind::NotFound, "no such file"),
        });
    };
    let table = Table::read(&file, &json)?;
    let config = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
    let generation = read_json(&folder.join("generation_config.json"))?.unwrap_or(Value::Null);
    let template_file = folder.join("chat_template.jinja");
    let chat_template = match std::fs::read_to_string(&template_file) {
        Ok(text) => Some(text),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => template(&config["chat_template"]),
        Err(source) => {
            return Err(TokenizerError::Read {
                path: template_file,
                source,
            });
        }
    };

    let library: tokenizers::Tokenizer = guard("building the tokenizer", || {
        Ok(serde_json::from_value::<tokenizers::Tokenizer>(
            table.cleaned,
        )?)
    })?;
    for added in &table.added {
        match library.token_to_id(&added.text) {
            Some(id) if id == added.id => {}
            other => {
                return Err(TokenizerError::BadValue {
                    field: format!("id of added token `{}`", added.text),
                    found: added.id.to_string(),
                    expected: other.map_or("an id in order".into(), |id| id.to_string()),
                });
            }
        }
    }
    let (prefix, suffix) = around(&library)?;

    let mut kinds = vec![TokenKind::Unused; table.size];
    let mut names: Vec<Option<&str>> = vec![None; table.size];
    let mut ids: HashMap<Box<str>, u32> = HashMap::with_capacity(table.size);
    let style = Style::of(&json["decoder"]);
    let fallback = json["model"]["byte_fallback"] == true;
    for (token, id) in &table.vocab {
        let byte = fallback && byte_token(token).is_some();
        kinds[*id as usize] = if byte {
            TokenKind::Byte
        } else {
            TokenKind::Normal
        };
        names[*id as usize] = Some(token);
        ids.insert(token.as_str().into(), *id);
    }
    for added in &table.added {
        let special = added.special;
        kinds[added.id as usize] = if special {
            TokenKind::Control
        } else {
            TokenKind::UserDefined
        };
        names[added.id as usize] = Some(&added.text);
        ids.insert(added.text.as_str().into(), added.id);
    }
    let mut pieces = Pieces::default();
    for (name, &kind) in names.iter().zip(&kinds) {
        let name = name.unwrap_or("");
        match kind {
            TokenKind::Normal => pieces.push(&style.bytes(name), kind),
            TokenKind::Byte => pieces.push(&[byte_token(name).unwrap_or(b'?')], kind),
            _ => pieces.push(name.as_bytes(), kind),
        }
    }

    let token = |name: &str| {
        let value = &config[name];
        let text = value.as_str().or_else(|| value["content"].as_str())?;
        ids.get(text).copied()
    };
    let bos = token("bos_token").or_else(|| prefix.first().copied());
    let mut eos: Vec<u32> = token("eos_token").into_iter().collect();
    match &generation["eos_token_id"] {
        Value::Array(list) => eos.extend(list.iter().filter_map(as_id)),
        one => eos.extend(as_id(one)),
    }
    eos.retain(|&id| (id as usize) < table.size);

    let mut sum = Fingerprint::new();
    // Parsed JSON is written back with its keys in order, so layout does not count.
    for part in [
        "model",
        "added_tokens",
        "normalizer",
        "pre_tokenizer",
        "post_processor",
        "decoder",
    ] {
        sum.add(json[part].to_string().as_bytes());
    }

    let engine = match native(&json, &table.vocab, &table.merges, &table.added)? {
        Some(engine) => engine,
        None => Engine::Library(Box::new(Library {
            parse: library,
            plain: OnceLock::new(),
            tokens_are_bytes: style != Style::Other,
        })),
    };
    Ok(Inner {
        engine,
        eos_ids: end_ids(eos, &ids, &pieces),
        bos,
        prefix,
        suffix,
        strip_first_space: style == Style::SentencePiece { strip: true },
        chat_template,
        fingerprint: sum.0,
        pieces,
        ids,
    })
}

fn as_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// The chat template of a `tokenizer_config.json`: a string, or a list of named ones with a `default`.
fn template(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(list) => {
            let named = |name: &str| list.iter().find(|t| t["name"] == name);
            let chosen = named("default").or(list.first())?;
            chosen["template"].as_str().map(str::to_string)
        }
        _ => None,
    }
}

/// What the post-processor puts before and after a text.
fn around(library: &tokenizers::Tokenizer) -> Result<(Vec<u32>, Vec<u32>), TokenizerError> {
    let ids = |special| {
        guard("encoding", || library.encode_fast("a", special)).map(|e| e.get_ids().to_vec())
    };
    let (bare, full) = (ids(false)?, ids(true)?);
    let at = if bare.is_empty() {
        None
    } else {
        full.windows(bare.len()).position(|w| w == bare)
    };
    Ok(match at {
        Some(at) => (full[..at].to_vec(), full[at + bare.len()..].to_vec()),
        None => (Vec::new(), Vec::new()),
    })
}

struct Added {
    id: u32,
    text: String,
    special: bool,
}

/// The tables of a tokenizer.json, checked.
struct Table {
    vocab: Vec<(String, u32)>,
    merges: Vec<String>,
    added: Vec<Added>,
    /// One more than the highest id.
    size: usize,
    /// The file for the library, with what would make encoding random left out.
    cleaned: Value,
}

impl Table {
    fn read(path: &Path, json: &Value) -> Result<Self, TokenizerError> {
        let wrong = |found: String, expected| TokenizerError::Json {
            path: path.into(),
            found,
            expected,
        };
        let model = &json["model"];
        if !model.is_object() {
            return Err(wrong(
                "no object `model`".into(),
                "a tokenizer.json of the tokenizers library",
            ));
        }
        let mut vocab: Vec<(String, u32)> = Vec::new();
        let mut owner: HashMap<u32, &str> = HashMap::new();
        let check = |field: String, id: Option<u64>| match id {
            Some(id) if id < MAX_ID => Ok(id as u32),
            Some(found) => Err(TokenizerError::IdOutOfRange {
                field,
                found,
                size: MAX_ID,
            }),
            None => Err(TokenizerError::BadValue {
                field,
                found: "no whole number".into(),
                expected: "a token id".into(),
            }),
        };
        match &model["vocab"] {
            Value::Object(map) => {
                for (token, id) in map {
                    let id = check(format!("model.vocab, token `{token}`"), id.as_u64())?;
                    if let Some(other) = owner.insert(id, token) {
                        return Err(TokenizerError::BadValue {
                            field: format!("model.vocab, id {id}"),
                            found: format!("`{other}` and `{token}`"),
                            expected: "one token for each id".into(),
                        });
                    }
                    vocab.push((token.clone(), id));
                }
            }
            Value::Array(list) => {
                let mut seen = HashMap::new();
                for (id, entry) in list.iter().enumerate() {
                    let (Some(token), Some(_)) = (entry[0].as_str(), entry[1].as_f64()) else {
                        return Err(wrong(
                            format!("model.vocab entry {id} is {entry}"),
                            "[token, score]",
                        ));
                    };
                    if let Some(first) = seen.insert(token, id as u32) {
                        let token = token.to_string();
                        return Err(TokenizerError::DuplicateToken {
                            token,
                            first,
                            second: id as u32,
                        });
                    }
                    vocab.push((token.to_string(), id as u32));
                }
                let unknown = &model["unk_id"];
                if !unknown.is_null() && unknown.as_u64().is_none_or(|id| id >= list.len() as u64) {
                    return Err(TokenizerError::IdOutOfRange {
                        field: "model.unk_id".into(),
                        found: unknown.as_u64().unwrap_or(u64::MAX),
                        size: list.len() as u64,
                    });
                }
            }
            _ => return Err(wrong("no table `model.vocab`".into(), "a vocabulary")),
        }
        let merges = read_merges(model, &vocab)?;
        let mut added = Vec::new();
        match &json["added_tokens"] {
            Value::Null => {}
            Value::Array(list) => {
                for (i, entry) in list.iter().enumerate() {
                    let Some(text) = entry["content"].as_str() else {
                        return Err(wrong(
                            format!("added_tokens entry {i} is {entry}"),
                            "an object with `content`",
                        ));
                    };
                    let id = check(
                        format!("added_tokens, token `{text}`"),
                        entry["id"].as_u64(),
                    )?;
                    added.push(Added {
                        id,
                        text: text.to_string(),
                        special: entry["special"] == true,
                    });
                }
            }
            _ => return Err(wrong("`added_tokens` is not a list".into(), "a list")),
        }
        let ids = vocab
            .iter()
            .map(|(_, id)| *id)
            .chain(added.iter().map(|a| a.id));
        let size = ids.max().map_or(0, |id| id as usize + 1);
        let mut cleaned = json.clone();
        for option in ["truncation", "padding"] {
            cleaned[option] = Value::Null;
        }
        if !model["dropout"].is_null() {
            cleaned["model"]["dropout"] = Value::Null;
        }
        Ok(Self {
            vocab,
            merges,
            added,
            size,
            cleaned,
        })
    }
}

/// The merges as `left right`, each checked: the library trusts that the union is no longer than the longest token.
fn read_merges(model: &Value, vocab: &[(String, u32)]) -> Result<Vec<String>, TokenizerError> {
    let list = match &model["merges"] {
        Value::Null => return Ok(Vec::new()),
        Value::Array(list) => list,
        other => {
            return Err(TokenizerError::BadValue {
                field: "model.merges".into(),
                found: other.to_string().chars().take(60).collect(),
                expected: "a list".into(),
            });
        }
    };
    let known: std::collections::HashSet<&str> = vocab.iter().map(|(t, _)| t.as_str()).collect();
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or("");
    let mut merges = Vec::with_capacity(list.len());
    for (index, merge) in list.iter().enumerate() {
        let bad = |problem: String| TokenizerError::BadMerge {
            index,
            merge: merge
                .as_str()
                .map_or_else(|| merge.to_string(), str::to_string),
            problem,
        };
        let pair = match merge {
            Value::String(text) => text.split_once(' ').filter(|(_, r)| !r.contains(' ')),
            Value::Array(pair) if pair.len() == 2 => pair[0].as_str().zip(pair[1].as_str()),
            _ => None,
        };
        let Some((left, right)) = pair else {
            return Err(bad("expected two tokens".into()));
        };
        let Some(tail) = right.strip_prefix(prefix) else {
            return Err(bad(format!(
                "`{right}` lacks the continuing_subword_prefix `{prefix}`"
            )));
        };
        let joined = format!("{left}{tail}");
        for token in [left, right, &joined] {
            if !known.contains(token) {
                return Err(bad(format!("the vocabulary has no token `{token}`")));
            }
        }
        merges.push(format!("{left} {right}"));
    }
    Ok(merges)
}

/// How tokens turn back into text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    /// Characters that stand for bytes.
    ByteLevel,
    /// `▁` for a space, byte tokens; `strip`: the first space goes.
    SentencePiece { strip: bool },
    /// Something else: the library decodes.
    Other,
}

impl Style {
    fn of(decoder: &Value) -> Self {
        match decoder["type"].as_str() {
            Some("ByteLevel") => Self::ByteLevel,
            Some("Metaspace") if decoder["replacement"] == "▁" => Self::SentencePiece {
                strip: decoder["prepend_scheme"] != "never" && decoder["add_prefix_space"] != false,
            },
            Some("Sequence") => {
                let (mut spaces, mut strip, mut other) = (false, false, false);
                for step in decoder["decoders"].as_array().into_iter().flatten() {
                    match step["type"].as_str() {
                        Some("Replace")
                            if step["pattern"]["String"] == "▁" && step["content"] == " " =>
                        {
                            spaces = true
                        }
                        Some("ByteFallback" | "Fuse") => {}
                        Some("Strip")
                            if step["content"] == " "
                                && step["start"] == 1
                                && step["stop"] == 0 =>
                        {
                            strip = true;
                        }
                        _ => other = true,
                    }
                }
                if spaces && !other {
                    Self::SentencePiece { strip }
                } else {
                    Self::Other
                }
            }
            _ => Self::Other,
        }
    }

    fn bytes(self, token: &str) -> Vec<u8> {
        match self {
            Self::ByteLevel => byte_level_bytes(token),
            Self::SentencePiece { .. } => token.replace('▁', " ").into_bytes(),
            Self::Other => token.as_bytes().to_vec(),
        }
    }
}

/// Our own path, if the file is byte-level BPE by rules known here.
fn native(
    json: &Value,
    vocab: &[(String, u32)],
    merges: &[String],
    added: &[Added],
) -> Result<Option<Engine>, TokenizerError> {
    let model = &json["model"];
    let unset = |name: &str| model[name].is_null() || model[name] == "" || model[name] == false;
    let nfc = json["normalizer"]["type"] == "NFC";
    // In a list with spaces inside tokens the joined form is ambiguous.
    let plain = model["type"] == "BPE"
        && [
            "continuing_subword_prefix",
            "end_of_word_suffix",
            "byte_fallback",
        ]
        .into_iter()
        .all(unset)
        && json["decoder"]["type"] == "ByteLevel"
        && (nfc || json["normalizer"].is_null())
        && vocab.iter().all(|(token, _)| !token.contains(' '));
    let tokens = json["added_tokens"]
        .as_array()
        .map_or(&[][..], Vec::as_slice);
    let simple = |entry: &Value| {
        ["lstrip", "rstrip", "single_word"]
            .into_iter()
            .all(|f| entry[f] != true)
            && entry["normalized"] == Value::Bool(false)
    };
    let Some(mut rules) = PreRules::from_json(&json["pre_tokenizer"])? else {
        return Ok(None);
    };
    if !plain || !tokens.iter().all(simple) {
        return Ok(None);
    }
    rules.nfc = nfc;
    rules.ignore_merges = model["ignore_merges"] == true;
    let named: HashMap<&str, &Added> = added.iter().map(|a| (a.text.as_str(), a)).collect();
    let unknown = model["unk_token"].as_str().map(str::to_string);
    let ordinary = vocab
        .iter()
        .filter(|(t, _)| !named.contains_key(t.as_str()) || unknown.as_deref() == Some(t))
        .cloned()
        .collect();
    let codec = match ByteBpe::new(rules, ordinary, merges, unknown) {
        Ok(bpe) => Box::new(Codec::Bytes(bpe)),
        // A merge that makes an added token: unusual, so the library's business.
        Err(TokenizerError::BadMerge { .. }) => return Ok(None),
        Err(e) => return Err(e),
    };
    let parse = Matcher::new(added.iter().map(|a| (a.id, a.text.as_str())))?;
    let always = added.iter().filter(|a| !a.special);
    let always = Matcher::new(always.map(|a| (a.id, a.text.as_str())))?;
    Ok(Some(Engine::Native {
        codec,
        parse,
        always,
    }))
}
