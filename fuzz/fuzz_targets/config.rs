//! Any bytes as a Hugging Face `config.json`.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use longspan_nn::config::ModelConfig;

fuzz_target!(|bytes: &[u8]| {
    let Ok(config) = ModelConfig::from_hf_json(Path::new("config.json"), bytes) else {
        return;
    };
    // What was accepted is usable: no product overflows, every index points somewhere.
    assert_eq!(config.layers.len(), config.num_layers);
    let ropes = config.layers.iter().filter_map(|layer| layer.rope);
    ropes.for_each(|rope| assert!(rope < config.rope.len()));
    assert!(config.rotary_dim() <= config.head_dim);
    assert!(!config.expected_tensors().is_empty());
});
