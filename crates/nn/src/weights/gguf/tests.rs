//! Files as they should be, and files as they should not be.

use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::config::ModelConfig;
use crate::weights::WeightSource;
use crate::weights::testing::{Tiny, fuzz_corpus};

fn parse(bytes: Vec<u8>) -> Result<Gguf, WeightsError> {
    Gguf::from_bytes(Path::new("x.gguf"), bytes)
}

/// Everything a program does with a file, so that no later step panics on what the parser let by.
fn use_all(gguf: Gguf) {
    let _ = gguf.vocab();
    let _ = gguf.fingerprint();
    if let Ok(config) = ModelConfig::from_gguf(&gguf)
        && let Ok(weights) = GgufWeights::new(gguf, &config)
    {
        let _ = config.check_tensors(&weights);
        for name in weights.names() {
            let _ = weights.matrix(&name);
            let _ = weights.vector(&name);
        }
    }
}

fn every_value() -> Vec<(&'static str, Value)> {
    vec![
        ("a.u8", Value::U8(200)),
        ("a.i8", Value::I8(-3)),
        ("a.u16", Value::U16(60_000)),
        ("a.i16", Value::I16(-30_000)),
        ("a.u32", Value::U32(4_000_000_000)),
        ("a.i32", Value::I32(-5)),
        ("a.f32", Value::F32(0.25)),
        ("a.bool", Value::Bool(true)),
        ("a.string", Value::String("räder".into())),
        ("a.u64", Value::U64(u64::MAX)),
        ("a.i64", Value::I64(i64::MIN)),
        ("a.f64", Value::F64(-1e300)),
        ("b.u8", Value::Array(Array::U8(vec![1, 2]))),
        ("b.i8", Value::Array(Array::I8(vec![-1]))),
        ("b.u16", Value::Array(Array::U16(vec![1]))),
        ("b.i16", Value::Array(Array::I16(vec![-1, 7]))),
        ("b.u32", Value::Array(Array::U32(vec![]))),
        ("b.i32", Value::Array(Array::I32(vec![-9, 9]))),
        ("b.f32", Value::Array(Array::F32(vec![1.5, -2.5]))),
        ("b.bool", Value::Array(Array::Bool(vec![true, false]))),
        (
            "b.string",
            Value::Array(Array::String(vec!["x".into(), String::new()])),
        ),
        ("b.u64", Value::Array(Array::U64(vec![3]))),
        ("b.i64", Value::Array(Array::I64(vec![-3]))),
        ("b.f64", Value::Array(Array::F64(vec![0.125]))),
    ]
}

#[test]
fn what_is_written_is_read() {
    let mut w = GgufWriter::new();
    for (key, value) in every_value() {
        w.metadata(key, value);
    }
    w.f32("first", &[2, 3], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    w.tensor("second", &[1, 32], GgmlType::Q4_0, (0..18).collect());
    w.tensor("third", &[3], GgmlType::BF16, vec![1, 2, 3, 4, 5, 6]);
    let gguf = parse(w.to_bytes()).unwrap();
    assert_eq!(gguf.version(), 3);
    let expected: BTreeMap<String, Value> = every_value()
        .into_iter()
        .map(|(k, v)| (k.into(), v))
        .collect();
    assert_eq!(*gguf.metadata(), expected);
    let names: Vec<&str> = gguf.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["first", "second", "third"]);
    let first = gguf.tensor("first").unwrap();
    assert_eq!(
        (&first.shape[..], first.ty, first.bytes),
        (&[2, 3][..], GgmlType::F32, 24)
    );
    assert_eq!(gguf.data(first)[4..8], 1f32.to_le_bytes());
    assert_eq!(
        gguf.data(gguf.tensor("second").unwrap()),
        (0..18).collect::<Vec<u8>>()
    );
    assert_eq!(gguf.data(gguf.tensor("third").unwrap()), [1, 2, 3, 4, 5, 6]);
    assert!(gguf.tensors().iter().all(|t| t.offset % 32 == 0));
}

#[test]
fn another_alignment_is_kept() {
    let mut w = GgufWriter::new();
    w.metadata("general.alignment", Value::U32(128));
    w.f32("a", &[1], &[1.0]).f32("b", &[1], &[2.0]);
    let gguf = parse(w.to_bytes()).unwrap();
    assert_eq!(gguf.tensors()[1].offset - gguf.tensors()[0].offset, 128);
    assert_eq!(gguf.data(&gguf.tensors()[1]), 2f32.to_le_bytes());
    for bad in [
        Value::U32(0),
        Value::U32(48),
        Value::U32(4),
        Value::I32(-32),
        Value::F32(32.0),
    ] {
        let mut w = GgufWriter::new();
        w.metadata("general.alignment", bad.clone());
        let text = parse(w.to_bytes()).unwrap_err().to_string();
        assert!(
            text.contains("general.alignment") && text.contains(&bad.describe()),
            "{text}"
        );
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let mut w = GgufWriter::new();
    for (key, value) in every_value() {
        w.metadata(key, value);
    }
    w.f32("first", &[8], &[1.0; 8])
        .f32("second", &[8], &[2.0; 8]);
    let bytes = w.to_bytes();
    assert!(parse(bytes.clone()).is_ok());
    for length in 0..bytes.len() {
        let error = parse(bytes[..length].to_vec()).unwrap_err();
        assert!(
            matches!(error, WeightsError::Truncated { .. }),
            "{length}: {error}"
        );
        assert!(error.to_string().contains("x.gguf"), "{error}");
    }
}

/// Bytes of a header, piece by piece.
struct Raw(Vec<u8>);

impl Raw {
    fn new(version: u32, tensors: u64, entries: u64) -> Self {
        Self(b"GGUF".to_vec())
            .u32(version)
            .u64(tensors)
            .u64(entries)
    }
    fn u32(mut self, v: u32) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn u64(mut self, v: u64) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn text(self, v: &str) -> Self {
        let mut s = self.u64(v.len() as u64);
        s.0.extend(v.as_bytes());
        s
    }
    fn tensor(self, name: &str, dimensions: &[u64], ty: u32, offset: u64) -> Self {
        let s = self.text(name).u32(dimensions.len() as u32);
        let s = dimensions.iter().fold(s, |s, &d| s.u64(d));
        s.u32(ty).u64(offset)
    }
    fn pad(mut self, data: usize) -> Vec<u8> {
        self.0.resize(self.0.len().next_multiple_of(32) + data, 0);
        self.0
    }
}

#[test]
fn hostile_headers_are_refused_by_name() {
    let one = || Raw::new(3, 1, 0);
    let two = || Raw::new(3, 2, 0);
    let entry = || Raw::new(3, 0, 1).text("k");
    let cases: Vec<(Vec<u8>, &[&str])> = vec![
        (
            b"GGML12345678901234567890".to_vec(),
            &["magic", "GGML", "GGUF"],
        ),
        (Raw::new(1, 0, 0).pad(0), &["version", "1", "2 and 3"]),
        (Raw::new(3u32.swap_bytes(), 0, 0).pad(0), &["big-endian"]),
        (
            Raw::new(3, u64::MAX, 0).pad(64),
            &["tensor descriptions", "18446744073709551615"],
        ),
        (Raw::new(3, 0, u64::MAX / 13).pad(64), &["metadata entries"]),
        (
            Raw::new(3, 0, 1).u64(u64::MAX).pad(64),
            &["metadata key number 0"],
        ),
        (
            Raw::new(3, 0, 1).text("").u32(0).pad(64),
            &["metadata key number 0", "0 bytes"],
        ),
        (entry().u32(13).pad(64), &["`k`", "value type 13"]),
        (entry().u32(7).u32(2).pad(64), &["`k`", "bool 2"]),
        (entry().u32(8).u64(1 << 60).pad(64), &["`k`", "truncated"]),
        (
            entry().u32(9).u32(8).u64(1 << 61).pad(64),
            &["elements of metadata key `k`"],
        ),
        (
            entry().u32(9).u32(9).u64(1).pad(64),
            &["`k`", "array of value type 9"],
        ),
        (
            Raw::new(3, 0, 2)
                .text("k")
                .u32(4)
                .u32(1)
                .text("k")
                .u32(4)
                .u32(1)
                .pad(64),
            &["`k`", "twice"],
        ),
        (
            one().tensor("t", &[], 0, 0).pad(64),
            &["`t`", "0 dimensions"],
        ),
        (
            one().tensor("t", &[1; 5], 0, 0).pad(64),
            &["`t`", "5 dimensions"],
        ),
        (
            one().tensor("t", &[4, 0], 0, 0).pad(64),
            &["`t`", "a dimension of 0"],
        ),
        (
            one().tensor("t", &[33], 8, 0).pad(64),
            &["`t`", "33", "multiple of 32"],
        ),
        (
            one().tensor("t", &[u64::MAX, 2], 0, 0).pad(64),
            &["`t`", "fits in memory"],
        ),
        (
            one().tensor("t", &[1 << 32, 1 << 32], 0, 0).pad(64),
            &["`t`", "fits in memory"],
        ),
        (
            one().tensor("t", &[1 << 40], 0, 0).pad(64),
            &["`t`", "truncated"],
        ),
        (
            one().tensor("t", &[4], 99, 0).pad(64),
            &["`t`", "type number 99", "Q4_K"],
        ),
        (
            one().tensor("t", &[4], 0, 7).pad(64),
            &["`t`", "offset 7", "alignment 32"],
        ),
        (
            one().tensor("t", &[4], 0, 64).pad(64),
            &["`t`", "offset 64"],
        ),
        (
            one().tensor("t", &[4], 0, u64::MAX - 31).pad(64),
            &["`t`", "offset"],
        ),
        (
            two()
                .tensor("t", &[16], 0, 0)
                .tensor("u", &[4], 0, 32)
                .pad(96),
            &["`u`", "offset 32", "at least 64", "`t`"],
        ),
        (
            two()
                .tensor("t", &[4], 0, 0)
                .tensor("t", &[4], 0, 32)
                .pad(96),
            &["`t`", "twice"],
        ),
    ];
    for (bytes, parts) in cases {
        let text = parse(bytes).unwrap_err().to_string();
        for part in parts {
            assert!(text.contains(part), "`{part}` not in: {text}");
        }
        assert!(text.starts_with("x.gguf: "), "{text}");
    }
}

#[test]
fn text_must_be_utf8() {
    let mut bytes = Raw::new(3, 0, 1).text("k").u32(8).u64(2).0;
    bytes.extend([0xC3, 0x28]);
    bytes.resize(96, 0);
    let text = parse(bytes).unwrap_err().to_string();
    assert!(text.contains("`k`") && text.contains("UTF-8"), "{text}");
}

#[test]
fn vocabularies_are_read_and_checked() {
    let gguf = parse(Tiny::ALL[0].gguf().to_bytes()).unwrap();
    let vocab = gguf.vocab().unwrap();
    assert_eq!(
        (vocab.model.as_str(), vocab.pre.as_deref()),
        ("gpt2", Some("gpt-2"))
    );
    assert_eq!((vocab.tokens.len(), vocab.token_types.len()), (257, 257));
    assert_eq!(
        (vocab.eos, vocab.bos, vocab.add_bos),
        (Some(256), None, None)
    );
    assert!(vocab.scores.is_empty());
    let cases = [
        ("tokenizer.ggml.bos_token_id", Value::U32(257), "257"),
        (
            "tokenizer.ggml.scores",
            Value::Array(Array::F32(vec![0.0])),
            "1 elements",
        ),
        (
            "tokenizer.ggml.scores",
            Value::Array(Array::I32(vec![0])),
            "array of 1 int32",
        ),
        ("tokenizer.ggml.add_bos_token", Value::U32(1), "uint32 1"),
    ];
    for (key, value, part) in cases {
        let mut w = Tiny::ALL[0].gguf();
        w.metadata(key, value);
        let text = parse(w.to_bytes())
            .unwrap()
            .vocab()
            .unwrap_err()
            .to_string();
        assert!(text.contains(key) && text.contains(part), "{text}");
    }
    let mut w = Tiny::ALL[0].gguf();
    w.metadata("tokenizer.ggml.bos_token_id", Value::U32(u32::MAX));
    assert_eq!(parse(w.to_bytes()).unwrap().vocab().unwrap().bos, None);
    let text = parse(GgufWriter::new().to_bytes())
        .unwrap()
        .vocab()
        .unwrap_err()
        .to_string();
    assert!(text.contains("tokenizer.ggml.tokens"), "{text}");
}

/// A model in three files: one tensor each, metadata in the first.
fn split(count: u64) -> Vec<Vec<u8>> {
    (0..3u16)
        .map(|part| {
            let mut w = GgufWriter::new();
            if part == 0 {
                w.metadata("general.architecture", Value::String("llama".into()));
            }
            w.metadata("split.no", Value::U16(part));
            w.metadata("split.count", Value::U16(count as u16));
            w.metadata("split.tensors.count", Value::I32(3));
            w.f32(&format!("t{part}"), &[2], &[f32::from(part); 2]);
            w.to_bytes()
        })
        .collect()
}

#[test]
fn split_files_are_joined() {
    let folder = tempfile::tempdir().unwrap();
    let name = |n: usize| folder.path().join(format!("model-{n:05}-of-00003.gguf"));
    for (i, bytes) in split(3).iter().enumerate() {
        std::fs::write(name(i + 1), bytes).unwrap();
    }
    let mut prints = Vec::new();
    for opened in 1..=3 {
        let gguf = Gguf::open(&name(opened)).unwrap();
        assert_eq!(gguf.file(), name(1));
        assert_eq!(gguf.architecture().unwrap(), "llama");
        for part in 0..3 {
            let tensor = gguf.tensor(&format!("t{part}")).unwrap();
            assert_eq!(tensor.part, part);
            assert_eq!(gguf.data(tensor)[..4], (part as f32).to_le_bytes());
        }
        prints.push(gguf.fingerprint());
    }
    assert!(prints.iter().all(|p| *p == prints[0]));
    std::fs::remove_file(name(2)).unwrap();
    let text = Gguf::open(&name(1)).unwrap_err().to_string();
    assert!(text.contains("model-00002-of-00003.gguf"), "{text}");
    // Renamed, so that the other parts cannot be found.
    let alone = folder.path().join("alone.gguf");
    std::fs::copy(name(1), &alone).unwrap();
    let text = Gguf::open(&alone).unwrap_err().to_string();
    assert!(
        text.contains("split.count") && text.contains("00001-of-00003"),
        "{text}"
    );
}

#[test]
fn wrong_splits_are_refused() {
    let join = |parts: Vec<Vec<u8>>| {
        let named = parts
            .into_iter()
            .map(|bytes| (PathBuf::from("x.gguf"), bytes));
        Gguf::from_parts(named.collect())
    };
    assert!(join(split(3)).is_ok());
    assert!(join(vec![]).unwrap_err().to_string().contains("no file"));
    let mut swapped = split(3);
    swapped.swap(1, 2);
    assert!(join(swapped).unwrap_err().to_string().contains("split.no"));
    assert!(
        join(split(4))
            .unwrap_err()
            .to_string()
            .contains("split.count")
    );
    let mut short = split(3);
    short[2] = {
        let mut w = GgufWriter::new();
        w.metadata("split.no", Value::U16(2))
            .metadata("split.count", Value::U16(3));
        w.to_bytes()
    };
    assert!(
        join(short)
            .unwrap_err()
            .to_string()
            .contains("split.tensors.count")
    );
    let mut twice = split(3);
    twice[2] = {
        let mut w = GgufWriter::new();
        w.f32("t0", &[1], &[0.0]);
        w.to_bytes()
    };
    assert!(join(twice).unwrap_err().to_string().contains("`t0`"));
}

/// Chance seldom hits the one byte that says how many heads there are, so take every byte in turn.
#[test]
fn no_single_byte_makes_a_panic() {
    let files = fuzz_corpus("gguf");
    assert!(files.len() >= 5);
    for (path, bytes) in files {
        let whole = parse(bytes.clone()).unwrap();
        let config = ModelConfig::from_gguf(&whole).unwrap();
        let header = whole.tensors().iter().map(|t| t.offset).min().unwrap();
        let weights = GgufWeights::new(whole, &config).unwrap();
        assert!(config.check_tensors(&weights).is_ok(), "{}", path.display());
        for at in 0..header {
            for value in [0, 1, 2, 3, 8, 64, 255] {
                let mut changed = bytes.clone();
                changed[at] = value;
                let _ = parse(changed).map(use_all);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Flipped bytes give an error or another model, never a panic.
    #[test]
    fn flipped_bytes_never_panic(
        which in 0..Tiny::ALL.len(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = Tiny::ALL[which].gguf().to_bytes();
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(gguf) = parse(bytes) {
            use_all(gguf);
        }
    }

    /// Flips within the first entries and the tensor descriptions.
    #[test]
    fn flipped_headers_never_panic(
        which in 0..Tiny::ALL.len(),
        at in any::<prop::sample::Index>(),
        value in prop::sample::select(vec![0u8, 1, 2, 7, 9, 31, 127, 128, 255]),
    ) {
        let mut bytes = Tiny::ALL[which].gguf().to_bytes();
        let header = parse(bytes.clone()).unwrap().tensors()[0].offset;
        bytes[at.index(header)] = value;
        if let Ok(gguf) = parse(bytes) {
            use_all(gguf);
        }
    }

    #[test]
    fn noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(noise);
        let _ = parse(bytes).map(use_all);
    }
}
