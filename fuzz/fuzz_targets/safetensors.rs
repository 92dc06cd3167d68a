//! Any bytes as a safetensors file: header, every tensor, the names of a model.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use longspan_nn::config::ModelConfig;
use longspan_nn::weights::WeightSource;
use longspan_nn::weights::safetensors::{HfWeights, Safetensors};

const CONFIG: &str = r#"{"model_type": "gemma3_text", "vocab_size": 2, "hidden_size": 2,
    "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 2, "sliding_window": 2}"#;

fuzz_target!(|bytes: &[u8]| {
    let path = Path::new("fuzz.safetensors");
    let Ok(file) = Safetensors::from_bytes(path, bytes.to_vec()) else {
        return;
    };
    let total: usize = file.tensors().iter().map(|t| file.data(t).len()).sum();
    assert!(total < bytes.len());
    let config = ModelConfig::from_hf_json(path, CONFIG.as_bytes()).unwrap();
    let Ok(weights) = HfWeights::from_shards(path, vec![file], &config) else {
        return;
    };
    weights.fingerprint();
    let _ = config.check_tensors(&weights);
    for name in weights.names() {
        if let Ok(matrix) = weights.matrix(&name) {
            let expected = matrix.ty.bytes(matrix.rows * matrix.cols);
            assert_eq!(expected, Some(matrix.bytes.len()), "{name}");
        }
        let _ = weights.vector(&name);
    }
});
