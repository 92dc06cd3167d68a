//! BERT against Hugging Face transformers: token ids, states and sentence vectors of a tiny random
//! checkpoint (`scripts/parity/bert.py`).

#[path = "../../../tests/golden.rs"]
mod golden;

use candle_core::{DType, Device};
use longspan_nn::model::{Bert, BertConfig, Precision, TextEncoder};
use longspan_nn::weights::WeightSource;
use longspan_nn::weights::safetensors::HfWeights;
use std::collections::HashMap;
use std::path::Path;

fn texts(case: &golden::Case) -> Vec<String> {
    let text = |n: usize| case.meta.get(&format!("text.{n}"));
    let all = (0..).map_while(text);
    all.map(|text| text.as_str().unwrap().to_string()).collect()
}

#[test]
fn states_and_vectors_match_transformers() {
    for case in golden::cases_of("tiny-bert", "encode") {
        let folder = case.path.parent().unwrap();
        let encoder =
            TextEncoder::open(folder, Precision::Dense(DType::F32), &Device::Cpu).unwrap();
        let texts = texts(&case);
        assert!(texts.len() >= 3, "{} texts", texts.len());
        let ids: Vec<Vec<u32>> = texts
            .iter()
            .map(|text| encoder.tokens(text).unwrap())
            .collect();
        for (n, ids) in ids.iter().enumerate() {
            let found: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
            assert_eq!(found, case.i64(&format!("input_ids.{n}")));
        }
        // All texts in one batch without padding.
        let lengths: Vec<usize> = ids.iter().map(Vec::len).collect();
        let hidden = encoder.bert().hidden(&ids.concat(), &lengths).unwrap();
        let (mut start, dim) = (0, encoder.dim());
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let vectors = encoder.embed(&texts).unwrap();
        for (n, &length) in lengths.iter().enumerate() {
            let own = hidden.narrow(0, start, length).unwrap();
            let own = own.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            case.assert_close(&format!("hidden.{n}"), &own);
            case.assert_close(&format!("embedding.{n}"), &vectors[n * dim..(n + 1) * dim]);
            // A text's vector does not depend on its company.
            let alone = encoder.embed(&texts[n..=n]).unwrap();
            case.assert_close(&format!("embedding.{n}"), &alone);
            start += length;
        }
        // bf16 weights: the same directions.
        let packed = TextEncoder::open(folder, Precision::Packed, &Device::Cpu).unwrap();
        let near = packed.embed(&texts).unwrap();
        for (near, exact) in near.chunks(dim).zip(vectors.chunks(dim)) {
            let cosine: f32 = near.iter().zip(exact).map(|(a, b)| a * b).sum();
            assert!(cosine > 0.999, "{cosine}");
        }
    }
}

#[test]
fn given_tensors_compute_the_same_and_have_gradients() {
    let case = &golden::cases_of("tiny-bert", "encode")[0];
    let folder = case.path.parent().unwrap();
    let (config, weights) = open(folder);
    let mut tensors = HashMap::new();
    for name in weights.names() {
        let shape = weights.shape(&name).unwrap().to_vec();
        let values = match shape.len() {
            1 => weights.vector(&name).unwrap(),
            _ => {
                let bytes = weights.matrix(&name).unwrap().bytes.into_owned();
                let values = bytes.chunks_exact(4);
                values
                    .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                    .collect()
            }
        };
        let variable = candle_core::Var::from_vec(values, shape, &Device::Cpu).unwrap();
        tensors.insert(name, variable.as_tensor().clone());
    }
    let bert = Bert::from_tensors(&config, &tensors).unwrap();
    let ids: Vec<u32> = case
        .i64("input_ids.0")
        .iter()
        .map(|&id| id as u32)
        .collect();
    let hidden = bert.hidden(&ids, &[ids.len()]).unwrap();
    let values = hidden.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    case.assert_close("hidden.0", &values);
    let gradients = hidden.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    for name in [
        "embeddings.word_embeddings.weight",
        "encoder.layer.0.attention.self.key.weight",
        "encoder.layer.1.output.LayerNorm.bias",
    ] {
        let gradient = gradients.get(&tensors[name]).expect(name);
        let size = gradient.sqr().unwrap().sum_all().unwrap();
        assert!(size.to_scalar::<f32>().unwrap() > 0.0, "{name}");
    }
}

fn open(folder: &Path) -> (BertConfig, HfWeights) {
    let config = std::fs::read(folder.join("config.json")).unwrap();
    let weights = HfWeights::open_as_stored(folder).unwrap();
    (serde_json::from_slice(&config).unwrap(), weights)
}

#[test]
fn what_cannot_be_right_is_refused_by_name() {
    let case = &golden::cases_of("tiny-bert", "encode")[0];
    let (config, weights) = open(case.path.parent().unwrap());
    let load = |config: &BertConfig| {
        let precision = Precision::Dense(DType::F32);
        let bert = Bert::load(config, &weights, precision, &Device::Cpu);
        bert.map(|_| ()).unwrap_err().to_string()
    };
    let mut wide = config.clone();
    wide.intermediate_size = 41;
    let error = load(&wide);
    assert!(
        error.contains("intermediate.dense") && error.contains("41"),
        "{error}"
    );
    let mut other = config.clone();
    other.hidden_act = "relu".into();
    let error = load(&other);
    assert!(
        error.contains("hidden_act is relu, expected gelu"),
        "{error}"
    );
    let bert = Bert::load(
        &config,
        &weights,
        Precision::Dense(DType::F32),
        &Device::Cpu,
    )
    .unwrap();
    let long = vec![5; 81];
    for (ids, lengths) in [(&long[..], vec![81]), (&[28], vec![1]), (&[1, 2], vec![1])] {
        assert!(bert.hidden(ids, &lengths).is_err(), "{lengths:?}");
    }
}
