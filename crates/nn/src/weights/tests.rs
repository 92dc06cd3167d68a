//! Both kinds of file give the same model under the same names.

use std::path::Path;

use super::gguf::{Gguf, GgufWeights, GgufWriter, Value};
use super::safetensors::{HfWeights, Safetensors};
use super::testing::{HEAD_DIM, HIDDEN, Tiny, VOCAB};
use super::*;
use crate::config::ModelConfig;

fn from_gguf(writer: &GgufWriter) -> (ModelConfig, GgufWeights) {
    let gguf = Gguf::from_bytes(Path::new("tiny.gguf"), writer.to_bytes()).unwrap();
    let config = ModelConfig::from_gguf(&gguf).unwrap();
    let weights = GgufWeights::new(gguf, &config).unwrap();
    (config, weights)
}

fn from_hf(tiny: &Tiny) -> (ModelConfig, HfWeights) {
    let text = tiny.hf_config().to_string();
    let config = ModelConfig::from_hf_json(Path::new("config.json"), text.as_bytes()).unwrap();
    let file = Safetensors::from_bytes(Path::new("tiny.safetensors"), tiny.safetensors()).unwrap();
    let weights = HfWeights::from_shards(Path::new("tiny"), vec![file], &config).unwrap();
    (config, weights)
}

#[test]
fn both_kinds_hold_the_same_tensors() {
    for tiny in Tiny::ALL {
        let (gguf_config, gguf) = from_gguf(&tiny.gguf());
        let (hf_config, hf) = from_hf(&tiny);
        let mut expected: Vec<String> = tiny.tensors().into_iter().map(|t| t.name).collect();
        expected.sort();
        for (config, source) in [
            (&gguf_config, &gguf as &dyn WeightSource),
            (&hf_config, &hf as &dyn WeightSource),
        ] {
            config.check_tensors(source).unwrap();
            let mut of_config: Vec<String> =
                config.expected_tensors().into_iter().map(|t| t.0).collect();
            of_config.sort();
            assert_eq!(of_config, expected, "{}", tiny.gguf);
            assert_eq!(source.names(), expected, "{}", tiny.gguf);
            for tensor in tiny.tensors() {
                assert!(source.contains(&tensor.name));
                let found = match tensor.shape[..] {
                    [rows, cols] => {
                        let matrix = source.matrix(&tensor.name).unwrap();
                        assert_eq!((matrix.rows, matrix.cols), (rows, cols));
                        to_f32(matrix.ty, &matrix.bytes).unwrap()
                    }
                    _ => source.vector(&tensor.name).unwrap(),
                };
                assert_eq!(found, tensor.values, "{} {}", tiny.gguf, tensor.name);
            }
        }
    }
}

#[test]
fn biases_of_llama_are_put_in_order_too() {
    let tiny = &Tiny::ALL[0];
    let mut writer = tiny.gguf();
    // Interleaved: the halves of a head alternate.
    let bias: Vec<f32> = (0..24).map(|i| i as f32).collect();
    writer.f32("blk.0.attn_q.bias", &[24], &bias);
    let (config, weights) = from_gguf(&writer);
    assert!(config.qkv_bias);
    let found = weights
        .vector("model.layers.0.self_attn.q_proj.bias")
        .unwrap();
    assert_eq!(found[..6], [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]);
    assert_eq!(found[18..], [18.0, 20.0, 22.0, 19.0, 21.0, 23.0]);
}

#[test]
fn elements_beyond_the_rotated_ones_stay() {
    let mut writer = Tiny::ALL[0].gguf();
    writer.metadata("llama.rope.dimension_count", Value::U32(4));
    let bias: Vec<f32> = (0..24).map(|i| i as f32).collect();
    writer.f32("blk.0.attn_q.bias", &[24], &bias);
    let (config, weights) = from_gguf(&writer);
    assert_eq!((config.head_dim, config.rotary_dim()), (HEAD_DIM, 4));
    let found = weights
        .vector("model.layers.0.self_attn.q_proj.bias")
        .unwrap();
    assert_eq!(found[..6], [0.0, 2.0, 1.0, 3.0, 4.0, 5.0]);
}

#[test]
fn whole_blocks_move_with_their_rows() {
    // Q8_0 rows of 32 elements: one block of 34 bytes, all bytes equal to the row's number.
    let mut writer = GgufWriter::new();
    let key = |key: &str| format!("llama.{key}");
    writer.metadata("general.architecture", Value::String("llama".into()));
    for (name, value) in [
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 32),
        ("attention.head_count", 2),
        ("attention.key_length", 4),
    ] {
        writer.metadata(&key(name), Value::U32(value));
    }
    writer.metadata(&key("attention.layer_norm_rms_epsilon"), Value::F32(1e-5));
    writer.f32("token_embd.weight", &[1, 32], &[0.0; 32]);
    let bytes = (0..8u8).flat_map(|row| [row; 34]).collect();
    writer.tensor("blk.0.attn_k.weight", &[8, 32], GgmlType::Q8_0, bytes);
    let (_, weights) = from_gguf(&writer);
    let matrix = weights
        .matrix("model.layers.0.self_attn.k_proj.weight")
        .unwrap();
    let rows: Vec<u8> = matrix.bytes.chunks(34).map(|row| row[33]).collect();
    assert_eq!(rows, [0, 2, 1, 3, 4, 6, 5, 7]);
}

#[test]
fn wrong_uses_are_named() {
    let tiny = &Tiny::ALL[0];
    let (_, gguf) = from_gguf(&tiny.gguf());
    let (_, hf) = from_hf(tiny);
    for source in [&gguf as &dyn WeightSource, &hf] {
        let error = source
            .matrix("model.layers.9.mlp.up_proj.weight")
            .unwrap_err();
        let text = error.to_string();
        assert!(
            matches!(error, WeightsError::MissingTensor { .. }),
            "{text}"
        );
        assert!(text.contains("model.layers.9.mlp.up_proj.weight"), "{text}");
        assert!(text.contains("nearest: `model.layers."), "{text}");
        assert!(matches!(
            source.matrix("model.norm.weight"),
            Err(WeightsError::Shape { found, .. }) if found == [HIDDEN]
        ));
        assert!(matches!(
            source.vector("model.embed_tokens.weight"),
            Err(WeightsError::Shape { found, .. }) if found == [VOCAB, HIDDEN]
        ));
    }
}

#[test]
fn sizes_are_compared_with_the_configuration() {
    let tiny = &Tiny::ALL[0];
    let (config, weights) = from_gguf(&tiny.gguf());
    let mut wrong = config.clone();
    wrong.intermediate_size += 1;
    let text = wrong.check_tensors(&weights).unwrap_err().to_string();
    assert!(
        text.contains("mlp.gate_proj.weight") && text.contains("[13, 8]"),
        "{text}"
    );
    let mut wrong = config;
    wrong.num_layers += 1;
    let error = wrong.check_tensors(&weights).unwrap_err();
    assert!(
        matches!(error, WeightsError::MissingTensor { tensor, .. } if tensor.contains("layers.2."))
    );
}

#[test]
fn fingerprints_follow_the_content() {
    let tiny = &Tiny::ALL[0];
    let print = |bytes: Vec<u8>, file: &str| {
        Gguf::from_bytes(Path::new(file), bytes)
            .unwrap()
            .fingerprint()
    };
    let bytes = tiny.gguf().to_bytes();
    let first = print(bytes.clone(), "a.gguf");
    assert_eq!(
        first,
        print(bytes.clone(), "b.gguf"),
        "the name does not matter"
    );
    assert_eq!(first.to_string().len(), 64);
    assert_eq!(first, Fingerprint::from_bytes(*first.as_bytes()));
    let mut other = bytes.clone();
    *other.last_mut().unwrap() ^= 1; // lm_head ends the file without padding
    assert_ne!(first, print(other, "a.gguf"), "a weight matters");
    let mut renamed = tiny.gguf();
    renamed.metadata("general.author", Value::String("someone".into()));
    assert_ne!(
        first,
        print(renamed.to_bytes(), "a.gguf"),
        "metadata matters"
    );
    let (_, hf) = from_hf(tiny);
    assert_eq!(hf.fingerprint(), from_hf(tiny).1.fingerprint());
    assert_ne!(hf.fingerprint(), from_hf(&Tiny::ALL[1]).1.fingerprint());
}

#[test]
fn a_checkpoint_opens_from_every_form() {
    for tiny in Tiny::ALL {
        let folder = tempfile::tempdir().unwrap();
        tiny.write_folder(folder.path());
        let gguf = folder.path().join("tiny.gguf");
        std::fs::write(&gguf, tiny.gguf().to_bytes()).unwrap();
        let nameless = folder.path().join("blob");
        std::fs::copy(&gguf, &nameless).unwrap();
        let opened: Vec<Checkpoint> = [
            gguf,
            nameless,
            folder.path().to_path_buf(),
            folder.path().join("model.safetensors"),
        ]
        .iter()
        .map(|path| Checkpoint::open(path).unwrap_or_else(|e| panic!("{} {e}", tiny.gguf)))
        .collect();
        for checkpoint in &opened {
            assert_eq!(checkpoint.tokenizer.id("<|end|>"), Some(256));
            assert_eq!(
                checkpoint.config.layers, opened[0].config.layers,
                "{}",
                tiny.gguf
            );
            let mut config = checkpoint.config.clone();
            config.name.clone_from(&opened[0].config.name);
            assert_eq!(config, opened[0].config, "{}", tiny.gguf);
        }
        assert_eq!(opened[0].fingerprint, opened[1].fingerprint);
        assert_eq!(opened[2].fingerprint, opened[3].fingerprint);
    }
}

#[test]
fn what_is_no_model_is_said_to_be_none() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("notes.txt");
    std::fs::write(&text, "hello").unwrap();
    for (path, part) in [
        (folder.path().to_path_buf(), "without `config.json`"),
        (text, "a file of another kind"),
        (folder.path().join("absent.gguf"), "cannot read"),
    ] {
        let message = Checkpoint::open(&path).err().unwrap().to_string();
        assert!(message.contains(part), "{message}");
        assert!(message.contains(&path.display().to_string()), "{message}");
    }
    std::fs::write(
        folder.path().join("config.json"),
        Tiny::ALL[0].hf_config().to_string(),
    )
    .unwrap();
    let message = Checkpoint::open(folder.path()).err().unwrap().to_string();
    assert!(message.contains("model.safetensors"), "{message}");
}
