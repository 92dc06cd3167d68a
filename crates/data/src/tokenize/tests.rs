//! Every family against ids of the reference libraries, the laws of decoding, and files that lie.

use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::PathBuf;

/// One file of `tests/golden/tokenizers`.
struct Golden {
    name: String,
    vocab: Option<GgufVocab>,
    /// A whole tokenizer.json.
    json: Option<Value>,
    cases: Vec<Case>,
}

struct Case {
    text: String,
    none: Vec<u32>,
    parse: Vec<u32>,
    decoded: String,
}

fn goldens() -> Vec<Golden> {
    let root = match std::env::var_os("LONGSPAN_GOLDEN") {
        Some(root) => PathBuf::from(root),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"),
    };
    let folder = root.join("tokenizers");
    let read = |path: &Path| -> Value {
        let text =
            std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    };
    let texts: Vec<String> = serde_json::from_value(read(&folder.join("texts.json"))).unwrap();
    let ids = |value: &Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    let mut all = Vec::new();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "json") || path.ends_with("texts.json") {
            continue;
        }
        let file = read(&path);
        let list = file["cases"].as_array().unwrap();
        assert_eq!(list.len(), texts.len(), "{}", path.display());
        let cases = texts.iter().zip(list).map(|(text, case)| Case {
            text: text.clone(),
            none: ids(&case["none"]),
            parse: ids(case.get("parse").unwrap_or(&case["none"])),
            decoded: case
                .get("decoded")
                .map_or(text.clone(), |d| d.as_str().unwrap().into()),
        });
        let vocab: Option<GgufVocab> = file
            .get("vocab")
            .map(|v| serde_json::from_value(v.clone()).unwrap());
        let json = file.get("tokenizer_json").map(|json| {
            let mut json = json.clone();
            // Where both are given, the table and the merges stand in `vocab` only.
            if let Some(vocab) = &vocab {
                let table = vocab.tokens.iter().enumerate();
                json["model"]["vocab"] = table
                    .map(|(id, t)| (t.clone(), json!(id)))
                    .collect::<serde_json::Map<_, _>>()
                    .into();
                json["model"]["merges"] = json!(vocab.merges);
            }
            json
        });
        all.push(Golden {
            name: file["case"].as_str().unwrap().to_string(),
            vocab,
            json,
            cases: cases.collect(),
        });
    }
    assert!(!all.is_empty(), "no golden file in {}", folder.display());
    all
}

fn from_json(json: &Value) -> Result<Tokenizer, TokenizerError> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    Tokenizer::from_dir(folder.path())
}

/// The tokenizers that a golden file describes.
fn built(golden: &Golden) -> Vec<(String, Tokenizer)> {
    let mut all = Vec::new();
    if let Some(vocab) = &golden.vocab {
        all.push((
            format!("{} from GGUF", golden.name),
            Tokenizer::from_gguf(vocab).unwrap(),
        ));
    }
    if let Some(json) = &golden.json {
        all.push((
            format!("{} from JSON", golden.name),
            from_json(json).unwrap(),
        ));
    }
    assert!(!all.is_empty(), "{} describes no tokenizer", golden.name);
    all
}

#[test]
fn ids_and_texts_equal_those_of_the_reference() {
    for golden in goldens() {
        for (name, tokenizer) in built(&golden) {
            for case in &golden.cases {
                let text = &case.text;
                assert_eq!(
                    tokenizer.encode(text, Special::None).unwrap(),
                    case.none,
                    "{name}, none, {text:?}"
                );
                assert_eq!(
                    tokenizer.encode(text, Special::Parse).unwrap(),
                    case.parse,
                    "{name}, parse, {text:?}"
                );
                assert_eq!(
                    tokenizer.decode(&case.none),
                    case.decoded,
                    "{name}, decode, {text:?}"
                );
            }
        }
    }
}

#[test]
fn plain_text_never_becomes_a_control_token() {
    for golden in goldens() {
        for (name, tokenizer) in built(&golden) {
            for case in &golden.cases {
                for id in tokenizer.encode(&case.text, Special::None).unwrap() {
                    let kind = tokenizer.kind(id);
                    // The unknown token is a special token to the library.
                    let unknown = tokenizer.token_bytes(id).eq_ignore_ascii_case(b"<unk>")
                        || tokenizer.token_bytes(id) == b"[UNK]";
                    assert!(
                        kind != Some(TokenKind::Control) || unknown,
                        "{name}: {id} {kind:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_stream_hands_over_what_decoding_gives_and_only_whole_characters() {
    for golden in goldens() {
        for (name, tokenizer) in built(&golden) {
            for case in &golden.cases {
                let mut stream = tokenizer.stream();
                let mut text = String::new();
                for &id in &case.none {
                    let part = stream.push(id).unwrap_or_default();
                    assert!(
                        !part.contains('\u{fffd}')
                            || case.text.contains('\u{fffd}')
                            || case.decoded.contains('\u{fffd}'),
                        "{name}: {part:?}"
                    );
                    text.push_str(&part);
                }
                text.push_str(&stream.finish().unwrap_or_default());
                assert_eq!(
                    text,
                    tokenizer.decode(&case.none),
                    "{name}, {:?}",
                    case.text
                );
            }
        }
    }
}

/// The smallest vocabulary of each family that is whole.
fn tiny(model: &str) -> GgufVocab {
    let tokens: &[(&str, i32)] = match model {
        "gpt2" => &[
            ("a", 1),
            ("b", 1),
            ("ab", 1),
            ("Ġ", 1),
            ("<s>", 3),
            ("<user>", 4),
        ],
        _ => &[
            ("<unk>", 2),
            ("<s>", 3),
            ("</s>", 3),
            ("▁", 1),
            ("a", 1),
            ("b", 1),
            ("ab", 1),
            ("▁ab", 1),
        ],
    };
    GgufVocab {
        model: model.into(),
        pre: Some("gpt-2".into()),
        tokens: tokens.iter().map(|(t, _)| t.to_string()).collect(),
        token_types: tokens.iter().map(|(_, k)| *k).collect(),
        scores: (0..tokens.len()).map(|i| -(i as f32)).collect(),
        merges: if model == "gpt2" {
            vec!["a b".into()]
        } else {
            Vec::new()
        },
        ..GgufVocab::default()
    }
}

#[test]
fn a_vocabulary_that_contradicts_itself_is_refused_by_name() {
    type Change = fn(&mut GgufVocab);
    let cases: &[(&str, Change, &str)] = &[
        (
            "gpt2",
            |v| v.tokens.clear(),
            "tokenizer.ggml.tokens has 0 entries",
        ),
        (
            "gpt2",
            |v| v.model = "rwkv".into(),
            "known models are: gpt2, llama, t5",
        ),
        (
            "gpt2",
            |v| v.pre = Some("klingon".into()),
            "known ones are: default, gpt-2, gpt-4o, llama-bpe",
        ),
        (
            "gpt2",
            |v| v.token_types.truncate(3),
            "tokenizer.ggml.token_type has 3 entries; expected 6",
        ),
        (
            "gpt2",
            |v| v.scores.push(0.0),
            "tokenizer.ggml.scores has 7 entries; expected 6",
        ),
        (
            "llama",
            |v| v.scores.clear(),
            "tokenizer.ggml.scores has 0 entries; expected 8",
        ),
        (
            "llama",
            |v| v.scores[4] = f32::NAN,
            "score of token 4 `a` is NaN",
        ),
        (
            "t5",
            |v| v.scores[4] = f32::INFINITY,
            "score of token 4 `a` is inf",
        ),
        (
            "llama",
            |v| v.token_types[4] = 9,
            "token_type of token 4 `a` is 9",
        ),
        ("llama", |v| v.token_types[4] = 6, "byte token 4 is `a`"),
        (
            "gpt2",
            |v| v.tokens[1] = "a".into(),
            "token `a` appears twice, as ids 0 and 1",
        ),
        (
            "gpt2",
            |v| v.bos = Some(6),
            "tokenizer.ggml.bos_token_id is 6; expected a token id below 6",
        ),
        (
            "gpt2",
            |v| v.eos = Some(u32::MAX),
            "tokenizer.ggml.eos_token_id is 4294967295",
        ),
        (
            "llama",
            |v| v.unknown = Some(8),
            "tokenizer.ggml.unknown_token_id is 8",
        ),
        (
            "gpt2",
            |v| v.eot = Some(99),
            "tokenizer.ggml.eot_token_id is 99",
        ),
        (
            "gpt2",
            |v| v.merges.push("a zz".into()),
            "merge 1 is `a zz`: the vocabulary has no ordinary token `zz`",
        ),
        (
            "gpt2",
            |v| v.merges.push("ab ab".into()),
            "no ordinary token `abab`",
        ),
        (
            "gpt2",
            |v| v.merges.push("ab".into()),
            "merge 1 is `ab`: expected two tokens",
        ),
        ("gpt2", |v| v.merges.push(String::new()), "merge 1 is ``"),
        (
            "gpt2",
            |v| v.merges.push("<s> a".into()),
            "no ordinary token `<s>`",
        ),
        (
            "t5",
            |v| v.precompiled_charsmap = Some(vec![1, 2]),
            "precompiled_charsmap is 2 bytes",
        ),
        (
            "t5",
            |v| v.precompiled_charsmap = Some(vec![255; 64]),
            "precompiled_charsmap is 64 bytes",
        ),
    ];
    for (model, change, expected) in cases {
        Tokenizer::from_gguf(&tiny(model)).unwrap();
        let mut vocab = tiny(model);
        change(&mut vocab);
        let error = Tokenizer::from_gguf(&vocab)
            .expect_err(expected)
            .to_string();
        assert!(
            error.contains(expected),
            "{error:?} does not say {expected:?}"
        );
    }
}

#[test]
fn a_text_that_the_vocabulary_cannot_write_is_an_error_or_the_unknown_token() {
    let vocab = tiny("llama");
    let error = Tokenizer::from_gguf(&vocab)
        .unwrap()
        .encode("abx", Special::None)
        .unwrap_err();
    assert!(error.to_string().contains("no token for `x`"), "{error}");
    let known = GgufVocab {
        unknown: Some(0),
        ..vocab
    };
    let tokenizer = Tokenizer::from_gguf(&known).unwrap();
    assert_eq!(
        tokenizer.encode("abxyab", Special::None).unwrap(),
        [7, 0, 6]
    );
}

#[test]
fn start_and_end_tokens_are_added_once() {
    let vocab = GgufVocab {
        bos: Some(1),
        eos: Some(2),
        add_eos: Some(true),
        ..tiny("llama")
    };
    let tokenizer = Tokenizer::from_gguf(&vocab).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos_ids()), (Some(1), &[2][..]));
    for text in ["ab", "<s>ab", "ab</s>", "<s>ab</s>"] {
        assert_eq!(
            tokenizer.encode(text, Special::ParseWithBos).unwrap(),
            [1, 7, 2],
            "{text}"
        );
    }
    assert_eq!(tokenizer.encode("ab", Special::Parse).unwrap(), [7]);
    assert_eq!(tokenizer.decode(&[1, 7, 7, 2, 999]), "ab ab");
    assert_eq!(tokenizer.token_bytes(7), b" ab");
    assert_eq!(tokenizer.token_bytes(1), b"<s>");
    assert_eq!(tokenizer.id("▁ab"), Some(7));
    assert_eq!(tokenizer.vocab_size(), 8);
}

#[test]
fn the_fingerprint_follows_what_changes_ids() {
    let base = Tokenizer::from_gguf(&tiny("llama")).unwrap().fingerprint();
    assert_eq!(
        Tokenizer::from_gguf(&tiny("llama")).unwrap().fingerprint(),
        base
    );
    let changes: [fn(&mut GgufVocab); 4] = [
        |v| v.scores[3] = -0.5,
        |v| v.tokens[3] = "c".into(),
        |v| v.token_types[3] = 4,
        |v| v.add_space_prefix = Some(false),
    ];
    for (i, change) in changes.into_iter().enumerate() {
        let mut vocab = tiny("llama");
        change(&mut vocab);
        assert_ne!(
            Tokenizer::from_gguf(&vocab).unwrap().fingerprint(),
            base,
            "change {i}"
        );
    }
}

#[test]
fn neighbouring_files_give_end_tokens_and_the_template() {
    let golden = goldens()
        .into_iter()
        .find(|g| g.name == "bpe-qwen2")
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("tokenizer.json", &golden.json.unwrap().to_string());
    write(
        "tokenizer_config.json",
        r#"{"bos_token":null,"eos_token":{"content":"<|im_end|>"},"chat_template":[{"name":"tools","template":"t"},{"name":"default","template":"d"}]}"#,
    );
    write("generation_config.json", r#"{"eos_token_id":[3,999999]}"#);
    let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
    let mut ends = vec![
        3,
        tokenizer.id("<|im_end|>").unwrap(),
        tokenizer.id("<|endoftext|>").unwrap(),
    ];
    ends.sort_unstable();
    assert_eq!(tokenizer.eos_ids(), ends);
    assert_eq!(tokenizer.chat_template(), Some("d"));
    write("chat_template.jinja", "j");
    let tokenizer = Tokenizer::from_dir(&folder.path().join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer.chat_template(), Some("j"));
    write("tokenizer_config.json", "{");
    let error = Tokenizer::from_dir(folder.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json"), "{error}");
    let error = Tokenizer::from_dir(&folder.path().join("nothing"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("cannot read") && error.contains("nothing"),
        "{error}"
    );
}

#[test]
fn a_tokenizer_json_that_lies_is_refused() {
    let good = || {
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
        })
    };
    assert_eq!(
        from_json(&good())
            .unwrap()
            .encode("abba", Special::None)
            .unwrap(),
        [2, 1, 0]
    );
    type Change = fn(&mut Value);
    let added = |id: Value| json!([{"id": id, "content": "<x>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}]);
    let mut far = good();
    far["added_tokens"] = added(json!(7));
    assert!(
        from_json(&far)
            .unwrap_err()
            .to_string()
            .contains("id of added token `<x>` is 7")
    );
    far["added_tokens"] = added(json!(u64::MAX));
    assert!(
        from_json(&far)
            .unwrap_err()
            .to_string()
            .contains("18446744073709551615")
    );
    let cases: &[(Change, &str)] = &[
        (|j| *j = json!([]), "no object `model`"),
        (|j| j["model"] = json!("BPE"), "no object `model`"),
        (
            |j| j["model"]["vocab"] = json!(null),
            "no table `model.vocab`",
        ),
        (
            |j| j["model"]["vocab"]["c"] = json!(-1),
            "token `c` is no whole number",
        ),
        (
            |j| j["model"]["vocab"]["c"] = json!(4_000_000_000u32),
            "token `c` is 4000000000",
        ),
        (
            |j| j["model"]["vocab"]["c"] = json!(1),
            "id 1 is `b` and `c`",
        ),
        (|j| j["model"]["merges"] = json!(["a c"]), "no token `c`"),
        (
            |j| j["model"]["merges"] = json!(["ab ab"]),
            "no token `abab`",
        ),
        (
            |j| j["model"]["merges"] = json!([["a"]]),
            "expected two tokens",
        ),
        (|j| j["model"]["merges"] = json!([7]), "expected two tokens"),
        (|j| j["model"]["merges"] = json!({}), "expected a list"),
        (
            |j| j["model"]["continuing_subword_prefix"] = json!("##long"),
            "lacks the continuing_subword_prefix",
        ),
        (
            |j| j["added_tokens"] = json!({}),
            "`added_tokens` is not a list",
        ),
        (
            |j| j["added_tokens"] = json!([{"id": 3}]),
            "added_tokens entry 0",
        ),
        (
            |j| j["pre_tokenizer"] = json!({"type": "Magic"}),
            "building the tokenizer",
        ),
        (
            |j| j["model"] = json!({"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]]}),
            "model.unk_id is 5",
        ),
        (
            |j| j["model"] = json!({"type": "Unigram", "vocab": [["a", 0.0], ["a", 0.0]]}),
            "`a` appears twice",
        ),
        (
            |j| j["model"] = json!({"type": "Unigram", "vocab": [["a"]]}),
            "entry 0",
        ),
    ];
    for (change, expected) in cases {
        let mut file = good();
        change(&mut file);
        let error = from_json(&file).expect_err(expected).to_string();
        assert!(
            error.contains(expected),
            "{error:?} does not say {expected:?}"
        );
    }
    let whole = good().to_string();
    let folder = tempfile::tempdir().unwrap();
    for length in 0..whole.len() {
        std::fs::write(folder.path().join("tokenizer.json"), &whole[..length]).unwrap();
        let error = Tokenizer::from_dir(folder.path()).expect_err(&whole[..length]);
        assert!(matches!(error, TokenizerError::Json { .. }), "{error}");
    }
}

/// Replaces the `n`-th node of a JSON tree, counted in reading order.
fn replace_node(value: &mut Value, n: &mut usize, with: &Value) {
    if *n == 0 {
        *value = with.clone();
    }
    *n = n.wrapping_sub(1);
    match value {
        Value::Array(list) => list.iter_mut().for_each(|v| replace_node(v, n, with)),
        Value::Object(map) => map.values_mut().for_each(|v| replace_node(v, n, with)),
        _ => {}
    }
}

fn tricky_text() -> impl Strategy<Value = String> {
    let chars = prop_oneof![
        6 => proptest::sample::select(" \t\n\r\u{a0}\u{3000}\u{85}\u{2028}".chars().collect::<Vec<_>>()),
        8 => proptest::sample::select("aBstd'ſéǅʰﬁ中ก\u{301}\u{93c}\u{903}".chars().collect::<Vec<_>>()),
        3 => proptest::sample::select("17½٣Ⅷ".chars().collect::<Vec<_>>()),
        5 => proptest::sample::select("._/<|>=$😀\u{200d}\u{feff}\u{0}▁".chars().collect::<Vec<_>>()),
        1 => any::<char>(),
    ];
    proptest::collection::vec(chars, 0..40).prop_map(|c| c.into_iter().collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn a_damaged_tokenizer_json_never_panics(node in 0usize..90, kind in 0usize..8, file in 0usize..4) {
        let name = ["hf-llama", "hf-wordpiece", "hf-unigram", "bpe-llama-bpe"][file];
        let mut json = FILES.with(|all| all[name].clone());
        // Short tables, so that the damage meets everything else too.
        if let Value::Array(merges) = &mut json["model"]["merges"] { merges.truncate(5); }
        if let Value::Array(added) = &mut json["added_tokens"] { added.truncate(1); }
        let with = [json!(null), json!(-1), json!(""), json!([]), json!({}), json!(1e300), json!("(("), json!(true)][kind].clone();
        replace_node(&mut json, &mut node.clone(), &with);
        if let Ok(tokenizer) = from_json(&json) {
            for special in [Special::None, Special::Parse, Special::ParseWithBos] {
                if let Ok(ids) = tokenizer.encode("a b  <s> c\u{301}\n", special) {
                    prop_assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
                    tokenizer.decode(&ids);
                }
            }
        }
    }

    #[test]
    fn decoding_gives_back_the_text(text in tricky_text()) {
        // NFC (qwen2), missing bytes (smollm) and `▁` (SentencePiece) change texts; these two never do.
        for (name, text) in [("bpe-llama-bpe", text.clone()), ("bpe-tekken", text.clone()), ("spm-gemma", text.replace('▁', ""))] {
            let tokenizer = SHARED.with(|all| all[name].clone());
            for special in [Special::None, Special::Parse] {
                let ids = tokenizer.encode(&text, special).unwrap();
                if special == Special::None {
                    prop_assert_eq!(tokenizer.decode(&ids), text.as_str(), "{}", name);
                }
                let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).collect();
                prop_assert_eq!(&bytes, text.as_bytes(), "{}", name);
            }
        }
    }
}

thread_local! {
    static FILES: HashMap<String, Value> =
        goldens().into_iter().filter_map(|g| Some((g.name, g.json?))).collect();
    static SHARED: HashMap<String, Tokenizer> = goldens()
        .into_iter()
        .filter_map(|g| Some((g.name, Tokenizer::from_gguf(&g.vocab?).unwrap())))
        .collect();
}
