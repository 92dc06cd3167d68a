//! `config.json` of stacks of sequence mixers: Hugging Face's Mamba and Mamba-2, and `longspan-stack`, which `longspan train` writes:
//! `{"model_type": "longspan-stack", "vocab_size": N, "trained_length": tokens, "stack": {the model table of the run}}`.

use super::hf::{Fields, list};
use super::{ConfigError, MAX_LAYERS, MAX_SIZE};
use crate::mixer::{Mamba2Config, MambaConfig, MixerConfig};
use crate::model::StackConfig;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Written by `longspan train`.
pub const STACK: &str = "longspan-stack";

/// `model_type` of the files read here.
pub(super) const MODEL_TYPES: [&str; 3] = [STACK, "mamba", "mamba2"];

/// A stack's language model as its file describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct StackFile {
    /// The blocks.
    pub stack: StackConfig,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest sequence of training, if the file says.
    pub trained_length: Option<usize>,
}

impl StackFile {
    /// Reads the text of a `config.json`; None if it describes another kind of model. `file` is named in errors.
    ///
    /// # Errors
    /// A key that is missing, or a value that cannot be.
    pub fn parse(file: &Path, text: &str) -> Result<Option<Self>, ConfigError> {
        // Python writes an unlimited step size as a bare word that JSON does not have.
        let text = text
            .replace(": Infinity", ": null")
            .replace(" Infinity", " null");
        let Ok(map) = serde_json::from_str::<Map<String, Value>>(&text) else {
            // The reader of decoders says what is wrong.
            return Ok(None);
        };
        let root = Fields { file, map: &map };
        let kind = map.get("model_type").and_then(Value::as_str);
        match kind {
            Some(STACK) => own(&root).map(Some),
            Some("mamba") => mamba(&root).map(Some),
            Some("mamba2") => mamba2(&root).map(Some),
            _ => Ok(None),
        }
    }

    /// The text of a `config.json` that [`parse`](Self::parse) reads.
    pub fn to_json(&self) -> Value {
        let mut stack = json!(self.stack);
        // JSON has no infinity: the largest number stands for it.
        let lists = stack["mixer"].as_object_mut().into_iter().flatten();
        for (_, value) in lists {
            for value in value.as_array_mut().into_iter().flatten() {
                if value.is_null() {
                    *value = f64::MAX.into();
                }
            }
        }
        json!({
            "model_type": STACK,
            "vocab_size": self.vocab_size,
            "trained_length": self.trained_length,
            "stack": stack,
        })
    }
}

fn sized(root: &Fields, key: &str, most: usize) -> Result<usize, ConfigError> {
    let size = root.required(key, None)?;
    match size {
        0 => Err(root.invalid(key, "0".into(), "1 or more")),
        size if size > most => Err(root.invalid(key, size.to_string(), &format!("1 to {most}"))),
        size => Ok(size),
    }
}

fn own(root: &Fields) -> Result<StackFile, ConfigError> {
    let stack = root.object("stack")?.ok_or_else(|| ConfigError::Missing {
        file: root.file.to_path_buf(),
        key: "stack".into(),
        expected: "the model's table".into(),
    })?;
    let mut stack = StackConfig::deserialize(Value::Object(stack.clone()))
        .map_err(|error| root.invalid("stack", error.to_string(), "a stack of mixers"))?;
    if let MixerConfig::Mamba2(mixer) = &mut stack.mixer
        && mixer.time_step_limit.1 == f64::MAX
    {
        mixer.time_step_limit.1 = f64::INFINITY;
    }
    Ok(StackFile {
        stack,
        vocab_size: sized(root, "vocab_size", MAX_SIZE)?,
        trained_length: root.size("trained_length")?,
    })
}

/// Hugging Face's keys, with the defaults of its `MambaConfig`.
fn mamba(root: &Fields) -> Result<StackFile, ConfigError> {
    let size = |key: &str, default: usize| root.size(key).map(|size| size.unwrap_or(default));
    if let Some(act) = root.read("hidden_act", "a string", Value::as_str)?
        && act != "silu"
    {
        return Err(root.invalid("hidden_act", act.into(), "silu"));
    }
    let epsilon = root.number("layer_norm_epsilon")?.unwrap_or(1e-5);
    if !(epsilon > 0.0 && epsilon < 1.0) {
        let found = epsilon.to_string();
        return Err(root.invalid("layer_norm_epsilon", found, "a number between 0 and 1"));
    }
    // The word "auto" is the default rank.
    let rank = match root.get("time_step_rank") {
        Some(Value::String(word)) if word == "auto" => None,
        _ => root.size("time_step_rank")?,
    };
    let mixer = MambaConfig {
        expand: size("expand", 2)?,
        state_size: size("state_size", 16)?,
        conv_kernel: size("conv_kernel", 4)?,
        time_step_rank: rank,
        use_bias: root.flag("use_bias")?.unwrap_or(false),
        use_conv_bias: root.flag("use_conv_bias")?.unwrap_or(true),
    };
    let hidden = size("hidden_size", 768)?;
    let sizes = [
        hidden,
        mixer.expand,
        mixer.state_size,
        mixer.conv_kernel,
        rank.unwrap_or(1),
    ];
    if sizes.iter().any(|&size| size > 1 << 20) {
        return Err(root.invalid(
            "hidden_size, expand, state_size, conv_kernel, time_step_rank",
            format!("{sizes:?}"),
            "sizes of at most 1048576",
        ));
    }
    Ok(StackFile {
        stack: StackConfig {
            d_model: hidden,
            layers: sized(root, "num_hidden_layers", MAX_LAYERS)?,
            mixer: MixerConfig::Mamba(mixer),
            mlp_ratio: 0.0,
            norm_epsilon: epsilon,
            norm: true,
            residual: true,
            // Checkpoints decide: they hold `lm_head.weight` or they do not.
            tie_embeddings: true,
            sinusoid: false,
        },
        vocab_size: sized(root, "vocab_size", MAX_SIZE)?,
        trained_length: None,
    })
}

/// Hugging Face's keys, with the defaults of its `Mamba2Config`.
fn mamba2(root: &Fields) -> Result<StackFile, ConfigError> {
    let size = |key: &str, default: usize| root.size(key).map(|size| size.unwrap_or(default));
    if let Some(act) = root.read("hidden_act", "a string", Value::as_str)?
        && act != "silu"
    {
        return Err(root.invalid("hidden_act", act.into(), "silu"));
    }
    let hidden = size("hidden_size", 4096)?;
    let layers = sized(root, "num_hidden_layers", MAX_LAYERS)?;
    let limit = |index: usize, default: f64| {
        let value = root.get("time_step_limit").and_then(|list| list.get(index));
        value.and_then(Value::as_f64).unwrap_or(default)
    };
    let epsilon = root.number("layer_norm_epsilon")?.unwrap_or(1e-5);
    if !(epsilon > 0.0 && epsilon < 1.0) {
        let found = epsilon.to_string();
        return Err(root.invalid("layer_norm_epsilon", found, "a number between 0 and 1"));
    }
    let mixer = Mamba2Config {
        num_heads: Some(size("num_heads", 128)?),
        head_dim: size("head_dim", 64)?,
        expand: size("expand", 2)?,
        state_size: size("state_size", 128)?,
        n_groups: size("n_groups", 8)?,
        conv_kernel: size("conv_kernel", 4)?,
        chunk_size: size("chunk_size", 256)?,
        time_step_limit: (limit(0, 0.0), limit(1, f64::INFINITY)),
        use_bias: root.flag("use_bias")?.unwrap_or(false),
        use_conv_bias: root.flag("use_conv_bias")?.unwrap_or(true),
        layer_norm_epsilon: epsilon,
        ..Mamba2Config::default()
    };
    let sizes = [
        hidden,
        mixer.head_dim,
        mixer.expand,
        mixer.state_size,
        mixer.conv_kernel,
    ];
    if sizes.iter().any(|&size| size > 1 << 20) || mixer.chunk_size == 0 {
        let found = format!("{sizes:?}, chunks of {}", mixer.chunk_size);
        return Err(root.invalid(
            "hidden_size, head_dim, expand, state_size, conv_kernel, chunk_size",
            found,
            "sizes of at most 1048576 and a chunk of 1 or more",
        ));
    }
    Ok(StackFile {
        stack: StackConfig {
            d_model: hidden,
            layers,
            mixer: MixerConfig::Mamba2(mixer),
            mlp_ratio: 0.0,
            norm_epsilon: epsilon,
            norm: true,
            residual: true,
            // Checkpoints decide: they hold `lm_head.weight` or they do not.
            tie_embeddings: true,
            sinusoid: false,
        },
        vocab_size: sized(root, "vocab_size", MAX_SIZE)?,
        trained_length: None,
    })
}

/// All readable `model_type`s, for messages.
pub(super) fn all_types<'a>(decoders: impl Iterator<Item = &'a str>) -> String {
    list(decoders.chain(MODEL_TYPES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hugging_face_and_own_files_are_read() {
        let file = Path::new("config.json");
        let text = r#"{"model_type": "mamba2", "vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8,
            "head_dim": 16, "state_size": 32, "n_groups": 1, "time_step_limit": [0.0, Infinity]}"#;
        let found = StackFile::parse(file, text).unwrap().unwrap();
        assert_eq!((found.vocab_size, found.stack.layers), (288, 2));
        let MixerConfig::Mamba2(mixer) = &found.stack.mixer else {
            panic!("{found:?}")
        };
        assert_eq!(mixer.time_step_limit, (0.0, f64::INFINITY));
        let again = StackFile::parse(file, &found.to_json().to_string()).unwrap();
        assert_eq!(again, Some(found));
        let own = r#"{"model_type": "longspan-stack", "vocab_size": 256, "trained_length": 64,
            "stack": {"d_model": 8, "layers": 1, "mixer": {"kind": "s4", "d_state": 8}}}"#;
        let found = StackFile::parse(file, own).unwrap().unwrap();
        assert_eq!(found.trained_length, Some(64));
        let again = StackFile::parse(file, &found.to_json().to_string()).unwrap();
        assert_eq!(again, Some(found));
        assert_eq!(
            StackFile::parse(file, r#"{"model_type": "llama"}"#).unwrap(),
            None
        );
        for (from, to, says) in [
            ("\"vocab_size\": 288", "\"vocab_size\": 0", "vocab_size"),
            ("\"num_hidden_layers\": 2", "\"a\": 2", "num_hidden_layers"),
            (
                "\"state_size\": 32",
                "\"state_size\": 4000000",
                "state_size",
            ),
            ("\"n_groups\": 1", "\"hidden_act\": \"relu\"", "hidden_act"),
        ] {
            let error = StackFile::parse(file, &text.replace(from, to)).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
        let error = StackFile::parse(file, &own.replace("\"s4\"", "\"s99\"")).unwrap_err();
        assert!(error.to_string().contains("s99"), "{error}");
    }
}
