//! Files and folders as they should be, and as they should not be.

use std::path::Path;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::config::ModelConfig;
use crate::weights::testing::{HIDDEN, Tiny, fuzz_corpus};
use crate::weights::{WeightSource, to_f32};

fn parse(bytes: Vec<u8>) -> Result<Safetensors, WeightsError> {
    Safetensors::from_bytes(Path::new("x.safetensors"), bytes)
}

fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn config(tiny: &Tiny) -> ModelConfig {
    let text = tiny.hf_config().to_string();
    ModelConfig::from_hf_json(Path::new("config.json"), text.as_bytes()).unwrap()
}

/// Tensors of shape `[2]` and one type, packed one after the other.
fn small(names: &[&str], dtype: &str, values: &[u8]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    for (i, name) in names.iter().enumerate() {
        let offsets = [i * values.len(), (i + 1) * values.len()];
        header.insert(
            (*name).into(),
            json!({"dtype": dtype, "shape": [2], "data_offsets": offsets}),
        );
    }
    let mut bytes = file(&serde_json::Value::from(header).to_string(), 0);
    names.iter().for_each(|_| bytes.extend(values));
    bytes
}

#[test]
fn files_of_the_reference_writer_are_read() {
    for tiny in Tiny::ALL {
        let opened = parse(tiny.safetensors()).unwrap();
        let reference = tiny.safetensors();
        let reference = safetensors::SafeTensors::deserialize(&reference).unwrap();
        assert_eq!(opened.tensors().len(), reference.len());
        for tensor in opened.tensors() {
            let expected = reference.tensor(&tensor.name).unwrap();
            assert_eq!(tensor.shape, expected.shape());
            assert_eq!(opened.data(tensor), expected.data());
        }
    }
}

#[test]
fn metadata_and_foreign_types_are_kept() {
    let header = r#"{"__metadata__":{"format":"pt"},
        "a":{"dtype":"I64","shape":[],"data_offsets":[0,8]},
        "b":{"dtype":"F32","shape":[0,3],"data_offsets":[8,8]}}"#;
    let opened = parse(file(header, 8)).unwrap();
    assert_eq!(opened.metadata()["format"], "pt");
    assert_eq!(opened.tensor("a").unwrap().shape, [] as [usize; 0]);
    assert_eq!(opened.tensor("b").unwrap().bytes, 0);
    let weights =
        HfWeights::from_shards(Path::new("x"), vec![opened], &config(&Tiny::ALL[0])).unwrap();
    let text = weights.vector("a").unwrap_err().to_string();
    assert!(
        text.contains("`a`") && text.contains("I64") && text.contains("BF16"),
        "{text}"
    );
    assert!(weights.matrix("b").is_err());
}

#[test]
fn every_float_type_becomes_float32() {
    let values = [1.5f32, -0.375];
    let bytes = |dtype: &str| -> Vec<u8> {
        match dtype {
            "F32" => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            "F16" => values
                .iter()
                .flat_map(|&v| half::f16::from_f32(v).to_le_bytes())
                .collect(),
            _ => values
                .iter()
                .flat_map(|&v| half::bf16::from_f32(v).to_le_bytes())
                .collect(),
        }
    };
    for dtype in ["F32", "F16", "BF16"] {
        let opened = parse(small(&["v", "norm.weight"], dtype, &bytes(dtype))).unwrap();
        let weights =
            HfWeights::from_shards(Path::new("x"), vec![opened], &config(&Tiny::ALL[3])).unwrap();
        assert_eq!(weights.vector("v").unwrap(), values, "{dtype}");
        // Gemma's norms come with one added; the bare name gets its prefix.
        assert_eq!(
            weights.vector("model.norm.weight").unwrap(),
            [2.5, 0.625],
            "{dtype}"
        );
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = small(&["a", "b"], "F32", &[0; 8]);
    assert!(parse(bytes.clone()).is_ok());
    for length in 0..bytes.len() {
        let text = parse(bytes[..length].to_vec()).unwrap_err().to_string();
        assert!(text.starts_with("x.safetensors: "), "{text}");
    }
}

#[test]
fn hostile_headers_are_refused_by_name() {
    let one = |entry: &str, data| file(&format!(r#"{{"t":{entry}}}"#), data);
    let cases: Vec<(Vec<u8>, &[&str])> = vec![
        (vec![1, 2, 3], &["header's length", "truncated"]),
        (
            u64::MAX.to_le_bytes().to_vec(),
            &["header's length", "at most 100000000"],
        ),
        (file("[]", 0), &["the header", "object"]),
        (file("{", 0), &["the header", "EOF"]),
        (file("\u{0}", 0), &["the header"]),
        (file(&"[".repeat(10_000), 0), &["the header"]),
        (
            file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0),
            &["twice"],
        ),
        (one(r#"{"dtype":"F32","shape":[1]}"#, 4), &["data_offsets"]),
        (
            one(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#, 4),
            &["the header"],
        ),
        (
            one(r#"{"dtype":"Q9","shape":[1],"data_offsets":[0,4]}"#, 4),
            &["`t`", "Q9", "BF16"],
        ),
        (
            one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,0]}"#, 4),
            &["`t`", "4 to 0"],
        ),
        (
            one(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,5]}"#, 4),
            &["`t`", "4 bytes of data"],
        ),
        (
            one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#, 4),
            &["`t`", "[2]"],
        ),
        (
            one(
                r#"{"dtype":"F32","shape":[9223372036854775808,2],"data_offsets":[0,0]}"#,
                0,
            ),
            &["`t`", "9223372036854775808"],
        ),
        (
            one(r#"{"dtype":"F4","shape":[1],"data_offsets":[0,0]}"#, 0),
            &["`t`", "F4"],
        ),
        (
            one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#, 8),
            &["`t`", "data at 4", "at 0"],
        ),
        (
            one(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#, 8),
            &["4 bytes that belong"],
        ),
        (
            file(
                r#"{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
                    "t":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
                8,
            ),
            &["`t`", "twice"],
        ),
        (
            file(
                r#"{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
                    "u":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
                8,
            ),
            &["`u`", "data at 4", "at 8"],
        ),
    ];
    for (bytes, parts) in cases {
        let text = parse(bytes).unwrap_err().to_string();
        for part in parts {
            assert!(text.contains(part), "`{part}` not in: {text}");
        }
    }
}

#[test]
fn prefixes_of_multimodal_checkpoints_are_taken_off() {
    for (written, canonical) in [
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        (
            "layers.0.input_layernorm.weight",
            "model.layers.0.input_layernorm.weight",
        ),
        ("vision_tower.x", "vision_tower.x"),
    ] {
        let opened = parse(small(&[written], "F32", &[0; 8])).unwrap();
        let weights =
            HfWeights::from_shards(Path::new("x"), vec![opened], &config(&Tiny::ALL[0])).unwrap();
        assert_eq!(weights.names(), [canonical]);
    }
    let names = ["norm.weight", "model.norm.weight"];
    let opened = parse(small(&names, "F32", &[0; 8])).unwrap();
    let error = HfWeights::from_shards(Path::new("x"), vec![opened], &config(&Tiny::ALL[0]));
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("a second `model.norm.weight`")
    );
}

#[test]
fn shards_are_joined_by_their_index() {
    let tiny = &Tiny::ALL[0];
    let config = config(tiny);
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let write = |name: &str, bytes: &[u8]| std::fs::write(at(name), bytes).unwrap();
    write(
        "one.safetensors",
        &small(&["model.norm.weight"], "F32", &[0; 8]),
    );
    write(
        "two.safetensors",
        &small(&["lm_head.weight", "extra"], "F32", &[64; 8]),
    );
    let index = |map: serde_json::Value| {
        let text = json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string();
        write("model.safetensors.index.json", text.as_bytes());
        HfWeights::open(folder.path(), &config)
    };
    let weights = index(json!({
        "model.norm.weight": "one.safetensors", "lm_head.weight": "two.safetensors"
    }))
    .unwrap();
    assert_eq!(
        weights.names(),
        ["extra", "lm_head.weight", "model.norm.weight"]
    );
    assert_eq!(
        weights.vector("lm_head.weight").unwrap(),
        to_f32(longspan_kernels::quant::GgmlType::F32, &[64; 8]).unwrap()
    );
    for (map, part) in [
        (
            json!({"model.norm.weight": "two.safetensors"}),
            "`model.norm.weight` is missing",
        ),
        (
            json!({"model.norm.weight": "three.safetensors"}),
            "three.safetensors",
        ),
        (
            json!({"model.norm.weight": "../one.safetensors"}),
            "`../one.safetensors`",
        ),
        (json!({"model.norm.weight": "/etc/passwd"}), "`/etc/passwd`"),
        (json!({"model.norm.weight": ".."}), "`..`"),
        (json!(["one.safetensors"]), "weight_map"),
    ] {
        let text = index(map).unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    }
    // One whole file wins over an index.
    write("model.safetensors", &tiny.safetensors());
    let weights = HfWeights::open(folder.path(), &config).unwrap();
    assert_eq!(weights.shape("model.norm.weight"), Some(&[HIDDEN][..]));
}

#[test]
fn no_single_byte_makes_a_panic() {
    let files = fuzz_corpus("safetensors");
    assert!(files.len() >= 2);
    let config = config(&Tiny::ALL[3]);
    for (_, bytes) in files {
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        parse(bytes.clone()).unwrap();
        for at in 0..header {
            for value in *b"\x00\x01\xff059-]}\",{" {
                let mut changed = bytes.clone();
                changed[at] = value;
                let Ok(file) = parse(changed) else { continue };
                let Ok(weights) = HfWeights::from_shards(Path::new("x"), vec![file], &config)
                else {
                    continue;
                };
                for name in weights.names() {
                    let _ = weights.matrix(&name);
                    let _ = weights.vector(&name);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Flipped bytes give an error or another model, never a panic.
    #[test]
    fn flipped_bytes_never_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let tiny = &Tiny::ALL[0];
        let mut bytes = tiny.safetensors();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for (at, value) in flips {
            bytes[at.index(header)] = value;
        }
        if let Ok(file) = parse(bytes)
            && let Ok(weights) = HfWeights::from_shards(Path::new("x"), vec![file], &config(tiny))
        {
            let _ = weights.fingerprint();
            for name in weights.names() {
                let _ = weights.matrix(&name);
                let _ = weights.vector(&name);
            }
        }
    }
}
