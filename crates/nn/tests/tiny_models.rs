//! Tiny random checkpoints of every architecture against Hugging Face transformers: logits to
//! 1e-5 in the dense path. Drop another folder into `tests/golden/tiny-models` to test it too.

#[path = "../../../tests/golden.rs"]
mod golden;

use candle_core::{DType, Device};
use longspan_nn::attention::CausalAttention;
use longspan_nn::config::ModelConfig;
use longspan_nn::model::{Decoder, Precision};
use longspan_nn::weights::WeightSource;
use longspan_nn::weights::gguf::{Gguf, GgufWeights};
use longspan_nn::weights::safetensors::HfWeights;
use std::path::Path;

fn open(folder: &Path) -> (ModelConfig, Box<dyn WeightSource>) {
    let gguf = folder.join("model.gguf");
    if gguf.exists() {
        let gguf = Gguf::open(&gguf).unwrap();
        let config = ModelConfig::from_gguf(&gguf).unwrap();
        let weights = GgufWeights::new(gguf, &config).unwrap();
        (config, Box::new(weights))
    } else {
        let config = ModelConfig::from_hf_file(&folder.join("config.json")).unwrap();
        let weights = HfWeights::open(folder, &config).unwrap();
        (config, Box::new(weights))
    }
}

#[test]
fn dense_logits_match_transformers() {
    let cases = golden::cases_of("tiny-models", "forward");
    assert!(cases.len() >= 10, "found {} tiny models", cases.len());
    for case in &cases {
        let (config, weights) = open(case.path.parent().unwrap());
        let model = Decoder::load(
            &config,
            &*weights,
            Precision::Dense(DType::F32),
            &Device::Cpu,
        )
        .unwrap();
        let ids: Vec<u32> = case.i64("input_ids").iter().map(|&id| id as u32).collect();
        let mut attend =
            CausalAttention::packed(&config, &[ids.len()], None, DType::F32, &Device::Cpu).unwrap();
        let logits = model
            .logits(&model.hidden(&ids, &mut attend).unwrap())
            .unwrap();
        case.assert_close(
            "logits",
            &logits.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
        );
        // Reading token by token over a cache gives the same.
        let mut cache = Vec::new();
        let mut rows = Vec::new();
        for id in &ids {
            let mut attend =
                CausalAttention::cached(&config, 1, &mut cache, DType::F32, &Device::Cpu).unwrap();
            let logits = model
                .logits(&model.hidden(&[*id], &mut attend).unwrap())
                .unwrap();
            rows.extend(logits.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        }
        if model
            .config()
            .rope
            .iter()
            .all(|rope| rope.parameters["rope_type"] != "longrope")
        {
            case.assert_close("logits", &rows);
        }
    }
}

#[test]
fn a_token_outside_the_vocabulary_is_refused() {
    let case = &golden::cases_of("tiny-models", "forward")[0];
    let (config, weights) = open(case.path.parent().unwrap());
    let model = Decoder::load(
        &config,
        &*weights,
        Precision::Dense(DType::F32),
        &Device::Cpu,
    )
    .unwrap();
    let mut attend =
        CausalAttention::packed(&config, &[1], None, DType::F32, &Device::Cpu).unwrap();
    let error = model
        .hidden(&[config.vocab_size as u32], &mut attend)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains(&format!("vocabulary of {}", config.vocab_size)),
        "{error}"
    );
}
