//! Any bytes as a GGUF file: header, configuration, tokenizer, every tensor.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use longspan_data::tokenize::{Special, Tokenizer};
use longspan_nn::config::ModelConfig;
use longspan_nn::weights::WeightSource;
use longspan_nn::weights::gguf::{Gguf, GgufWeights};

/// The tokenizer catches panics of the library it uses, so a panic counts only when it comes out
/// here. To see the message of one, run the program on its file with `RUST_BACKTRACE=1`.
fn quiet_panics() {
    std::panic::set_hook(Box::new(|panic| {
        if std::env::var_os("RUST_BACKTRACE").is_some() {
            eprintln!("{panic}");
        }
    }));
}

fuzz_target!(init: quiet_panics(), |bytes: &[u8]| {
    let Ok(gguf) = Gguf::from_bytes(Path::new("fuzz.gguf"), bytes.to_vec()) else {
        return;
    };
    gguf.fingerprint();
    if let Ok(vocab) = gguf.vocab()
        && let Ok(tokenizer) = Tokenizer::from_gguf(&vocab)
        && let Ok(ids) = tokenizer.encode("Hello, wörld! <|end|> 123", Special::Parse)
    {
        tokenizer.decode(&ids);
    }
    let Ok(config) = ModelConfig::from_gguf(&gguf) else {
        return;
    };
    let Ok(weights) = GgufWeights::new(gguf, &config) else {
        return;
    };
    let fits = config.check_tensors(&weights).is_ok();
    for name in weights.names() {
        let matrix = weights.matrix(&name);
        if let Ok(matrix) = &matrix {
            let expected = matrix.ty.bytes(matrix.rows * matrix.cols);
            assert_eq!(expected, Some(matrix.bytes.len()), "{name}");
        }
        let _ = weights.vector(&name);
    }
    if fits {
        for (name, shape) in config.expected_tensors() {
            // What the check let by has the shape the model is built with.
            match shape.len() {
                2 => assert!(weights.matrix(&name).is_ok(), "{name}"),
                _ => assert!(weights.shape(&name) == Some(&shape[..]), "{name}"),
            }
        }
    }
});
