//! [`ModelConfig`] from the metadata and tensor shapes of a GGUF file.

use std::path::Path;

use serde_json::{Map, json};

use super::{Activation, Architecture, ConfigError, LayerConfig, ModelConfig, RopeSpec, intern};
use crate::weights::gguf::{Gguf, Value};
use crate::weights::to_f32;

/// `general.architecture` of the supported models. Mistral's files say `llama`.
const ARCHITECTURES: &[(&str, Architecture)] = &[
    ("llama", Architecture::Llama),
    ("baichuan", Architecture::Llama),
    ("qwen2", Architecture::Qwen2),
    ("qwen3", Architecture::Qwen3),
    ("gemma3", Architecture::Gemma3),
    ("smollm3", Architecture::SmolLM3),
];

/// Gemma 3: every sixth layer is global. Files rarely say so.
const GEMMA3_PATTERN: usize = 6;
/// Gemma 3: the frequency base of local layers. Files rarely say so.
const GEMMA3_LOCAL_THETA: f64 = 10_000.0;
/// Gemma 3 with this many layers (27B) scales attention by the mean width of a head,
/// `hidden_size / num_heads`, instead of the head's own size.
const GEMMA3_27B_LAYERS: usize = 62;
/// Baichuan with this many layers (13B) has ALiBi in place of rotation. Files do not say so.
const BAICHUAN_ALIBI_LAYERS: usize = 40;
/// SmolLM3: every fourth layer has no position encoding. Files do not say so.
const SMOLLM3_NO_ROPE_INTERVAL: usize = 4;

/// Reads keys `<architecture>.<key>`.
struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: &'a str,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn file(&self) -> &Path {
        self.gguf.file()
    }

    fn size(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.gguf.get(&self.key(key)) else {
            return Ok(None);
        };
        // Counts may come as an array with one element for each layer.
        let found = match value {
            Value::Array(array) => {
                let mut values = array.iter();
                let first = values.next();
                if values.any(|v| Some(v) != first) {
                    return Err(self.invalid(
                        key,
                        "an array of different values".into(),
                        "the same value for every layer",
                    ));
                }
                first.as_ref().and_then(Value::as_u64)
            }
            value => value.as_u64(),
        };
        match found.map(usize::try_from) {
            Some(Ok(size)) => Ok(Some(size)),
            _ => Err(self.invalid(key, value.describe(), "a non-negative integer")),
        }
    }

    fn required(&self, key: &str, expected: &str) -> Result<usize, ConfigError> {
        self.size(key)?.ok_or_else(|| self.missing(key, expected))
    }

    fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        let key = self.key(key);
        let number = self.gguf.number(&key)?;
        // A float32 such as 1e-6 is not 9.99e-7: take the decimal number its writer meant.
        Ok(match self.gguf.get(&key) {
            Some(Value::F32(v)) => v.to_string().parse().ok(),
            _ => number,
        })
    }

    fn missing(&self, key: &str, expected: &str) -> ConfigError {
        ConfigError::Missing {
            file: self.file().to_path_buf(),
            key: self.key(key),
            expected: expected.into(),
        }
    }

    fn invalid(&self, key: &str, found: String, expected: &str) -> ConfigError {
        ConfigError::Invalid {
            file: self.file().to_path_buf(),
            key: self.key(key),
            found,
            expected: expected.into(),
        }
    }
}

impl ModelConfig {
    /// Reads the configuration of `gguf`.
    ///
    /// Sliding windows are read for `llama` (Mistral) and `gemma3`; files of other architectures
    /// carry the key without using it.
    ///
    /// # Errors
    /// An unsupported architecture, a missing key, or sizes that cannot belong together.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ConfigError> {
        let architecture_name = gguf.architecture()?;
        let Some(&(_, architecture)) = ARCHITECTURES.iter().find(|(n, _)| *n == architecture_name)
        else {
            return Err(ConfigError::Architecture {
                file: gguf.file().to_path_buf(),
                found: architecture_name.into(),
                supported: super::hf::list(ARCHITECTURES.iter().map(|(name, _)| *name)),
            });
        };
        let keys = Keys {
            gguf,
            architecture: architecture_name,
        };
        if let Some(experts) = keys.size("expert_count")?.filter(|&count| count > 0) {
            return Err(keys.invalid(
                "expert_count",
                experts.to_string(),
                "0 (no mixture of experts)",
            ));
        }
        let gemma = architecture == Architecture::Gemma3;
        let num_layers = keys.required("block_count", "the number of layers")?;
        let hidden_size = keys.required("embedding_length", "the hidden size")?;
        let num_heads = keys.required("attention.head_count", "the number of heads")?;
        let num_kv_heads = keys.size("attention.head_count_kv")?.unwrap_or(num_heads);
        let context_length = keys.required("context_length", "the trained window")?;
        let head_dim = match keys.size("attention.key_length")? {
            Some(size) => size,
            None if num_heads > 0 && hidden_size.is_multiple_of(num_heads) => {
                hidden_size / num_heads
            }
            None => {
                return Err(keys.invalid(
                    "attention.head_count",
                    num_heads.to_string(),
                    &format!("a divisor of the hidden size {hidden_size}"),
                ));
            }
        };
        if let Some(size) = keys
            .size("attention.value_length")?
            .filter(|&s| s != head_dim)
        {
            return Err(keys.invalid(
                "attention.value_length",
                size.to_string(),
                &format!("{head_dim}, the size of keys"),
            ));
        }
        if num_layers > super::MAX_LAYERS {
            return Err(keys.invalid(
                "block_count",
                num_layers.to_string(),
                &format!("1 to {}", super::MAX_LAYERS),
            ));
        }
        let mut rope = Vec::new();
        let mut layers = layers(
            &keys,
            architecture,
            num_layers,
            head_dim,
            context_length,
            &mut rope,
        )?;
        let alibi_max_bias = match keys.number("attention.max_alibi_bias")? {
            Some(bias) => Some(bias).filter(|&bias| bias != 0.0),
            None if architecture_name == "baichuan" && num_layers == BAICHUAN_ALIBI_LAYERS => {
                Some(8.0)
            }
            None => None,
        };
        if alibi_max_bias.is_some() {
            layers.iter_mut().for_each(|layer| layer.rope = None);
            rope.clear();
        }
        let has = |name: &str| gguf.tensor(name).is_some();
        let width = match gemma && num_layers == GEMMA3_27B_LAYERS && num_heads > 0 {
            true => hidden_size as f64 / num_heads as f64,
            false => head_dim as f64,
        };
        let scale = keys
            .number("attention.scale")?
            .filter(|&scale| scale != 0.0);
        let cap = |key: &str| -> Result<Option<f32>, ConfigError> {
            Ok(keys.number(key)?.map(|c| c as f32).filter(|&c| c != 0.0))
        };
        let config = Self {
            architecture,
            vocab_size: vocab_size(gguf)?,
            hidden_size,
            intermediate_size: keys.required("feed_forward_length", "the inner size of the MLP")?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            rms_norm_eps: keys
                .number("attention.layer_norm_rms_epsilon")?
                .ok_or_else(|| keys.missing("attention.layer_norm_rms_epsilon", "a number"))?,
            context_length,
            tie_word_embeddings: !has("output.weight"),
            qkv_bias: has("blk.0.attn_q.bias"),
            output_bias: has("blk.0.attn_output.bias"),
            mlp_bias: has("blk.0.ffn_gate.bias"),
            qk_norm: matches!(architecture, Architecture::Qwen3 | Architecture::Gemma3),
            sandwich_norms: gemma,
            embedding_scale: gemma.then(|| (hidden_size as f32).sqrt()),
            activation: match gemma {
                true => Activation::GeluTanh,
                false => Activation::Silu,
            },
            attention_scale: scale.unwrap_or_else(|| width.sqrt().recip()) as f32,
            attention_softcap: cap("attn_logit_softcapping")?,
            final_softcap: cap("final_logit_softcapping")?,
            alibi_max_bias,
            layers,
            rope,
            name: gguf.text("general.name")?.map(str::to_owned),
        };
        let name = |field: &str| match field {
            "num_layers" => keys.key("block_count"),
            "vocab_size" => "token_embd.weight".into(),
            "hidden_size" => keys.key("embedding_length"),
            "intermediate_size" => keys.key("feed_forward_length"),
            "num_heads" => keys.key("attention.head_count"),
            "num_kv_heads" => keys.key("attention.head_count_kv"),
            "head_dim" => keys.key("attention.key_length"),
            "rms_norm_eps" => keys.key("attention.layer_norm_rms_epsilon"),
            "attention_scale" => keys.key("attention.scale"),
            "attention_softcap" => keys.key("attn_logit_softcapping"),
            "final_softcap" => keys.key("final_logit_softcapping"),
            "alibi_max_bias" => keys.key("attention.max_alibi_bias"),
            "rope_theta" => keys.key("rope.freq_base"),
            "partial_rotary_factor" => keys.key("rope.dimension_count"),
            "freq_factors" => "rope_freqs.weight".into(),
            other => keys.key(other),
        };
        config.validate(gguf.file(), name)
    }
}

/// Rows of the embedding, which must hold every token of the tokenizer.
fn vocab_size(gguf: &Gguf) -> Result<usize, ConfigError> {
    let missing = || ConfigError::Missing {
        file: gguf.file().to_path_buf(),
        key: "token_embd.weight".into(),
        expected: "the embedding matrix".into(),
    };
    let rows = gguf.tensor("token_embd.weight").ok_or_else(missing)?.shape[0];
    let tokens = gguf.get("tokenizer.ggml.tokens").and_then(Value::as_array);
    match tokens.map(|t| t.len()) {
        Some(tokens) if tokens > rows => Err(ConfigError::Invalid {
            file: gguf.file().to_path_buf(),
            key: "token_embd.weight".into(),
            found: format!("{rows} rows"),
            expected: format!("at least {tokens}, one for each token"),
        }),
        _ => Ok(rows),
    }
}

/// Windows and position encodings of all layers.
fn layers(
    keys: &Keys,
    architecture: Architecture,
    num_layers: usize,
    head_dim: usize,
    context_length: usize,
    rope: &mut Vec<RopeSpec>,
) -> Result<Vec<LayerConfig>, ConfigError> {
    let spec = |parameters, freq_factors| RopeSpec {
        parameters,
        freq_factors,
        max_position_embeddings: context_length,
    };
    let parameters = rope_parameters(keys, architecture, head_dim)?;
    let share = parameters.get("partial_rotary_factor").cloned();
    let global = spec(parameters, freq_factors(keys.gguf)?);
    let window = |key| Ok::<_, ConfigError>(keys.size(key)?.filter(|&window| window > 0));
    match architecture {
        Architecture::Gemma3 => {
            const KEY: &str = "attention.sliding_window";
            if keys.size(KEY)?.is_none() {
                return Err(keys.missing(KEY, "the window of local layers, e.g. 512"));
            }
            let window = window(KEY)?;
            let theta = keys
                .number("rope.freq_base_swa")?
                .unwrap_or(GEMMA3_LOCAL_THETA);
            let mut local = json!({"rope_type": "default", "rope_theta": theta});
            if let Some(share) = share {
                local["partial_rotary_factor"] = share;
            }
            let local = spec(local, None);
            let is_local = gemma_pattern(keys, num_layers)?;
            let mut layer = |is_local: &bool| match window {
                Some(_) if *is_local => LayerConfig {
                    sliding_window: window,
                    rope: Some(intern(rope, &local)),
                },
                _ => LayerConfig {
                    sliding_window: None,
                    rope: Some(intern(rope, &global)),
                },
            };
            Ok(is_local.iter().take(num_layers).map(&mut layer).collect())
        }
        Architecture::SmolLM3 => {
            let has_rope = |number: usize| !number.is_multiple_of(SMOLLM3_NO_ROPE_INTERVAL);
            let layer = |number| LayerConfig {
                sliding_window: None,
                rope: has_rope(number).then(|| intern(rope, &global)),
            };
            Ok((1..=num_layers).map(layer).collect())
        }
        _ => {
            let sliding_window = match architecture {
                Architecture::Llama => window("attention.sliding_window")?,
                _ => None,
            };
            let layer = LayerConfig {
                sliding_window,
                rope: Some(intern(rope, &global)),
            };
            Ok(vec![layer; num_layers])
        }
    }
}

/// Which layers are local, from `sliding_window_pattern`: a period, or one boolean for each layer.
fn gemma_pattern(keys: &Keys, num_layers: usize) -> Result<Vec<bool>, ConfigError> {
    const KEY: &str = "attention.sliding_window_pattern";
    let value = keys.gguf.get(&keys.key(KEY));
    if let Some(Value::Array(array)) = value {
        let listed: Option<Vec<bool>> = array
            .iter()
            .map(|v| v.as_bool().or_else(|| v.as_u64().map(|v| v != 0)))
            .collect();
        return match listed {
            Some(listed) if listed.len() >= num_layers => Ok(listed),
            _ => Err(keys.invalid(
                KEY,
                format!("array of {} {}", array.len(), array.type_name()),
                &format!("a boolean for each of the {num_layers} layers"),
            )),
        };
    }
    let period = keys.size(KEY)?.unwrap_or(GEMMA3_PATTERN);
    if period == 0 {
        return Err(keys.invalid(KEY, "0".into(), "a positive number of layers"));
    }
    Ok((1..=num_layers)
        .map(|n| !n.is_multiple_of(period))
        .collect())
}

/// The keys under `rope.` as Hugging Face's dictionary.
fn rope_parameters(
    keys: &Keys,
    architecture: Architecture,
    head_dim: usize,
) -> Result<serde_json::Value, ConfigError> {
    let theta = match (keys.number("rope.freq_base")?, architecture) {
        (Some(theta), _) => theta,
        (None, Architecture::Gemma3) => 1_000_000.0,
        (None, _) => 10_000.0,
    };
    let mut dict = Map::new();
    dict.insert("rope_theta".into(), json!(theta));
    if let Some(rotated) = keys
        .size("rope.dimension_count")?
        .filter(|&d| d != head_dim)
    {
        if rotated == 0 || rotated > head_dim || !rotated.is_multiple_of(2) {
            return Err(keys.invalid(
                "rope.dimension_count",
                rotated.to_string(),
                &format!("an even number up to the head size {head_dim}"),
            ));
        }
        dict.insert(
            "partial_rotary_factor".into(),
            json!(rotated as f64 / head_dim as f64),
        );
    }
    let kind_key = keys.key("rope.scaling.type");
    let factor = match keys.number("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.number("rope.scale_linear")?, // the key of old files
    };
    // Zero stands for "unset" in some files.
    let factor = factor.filter(|&factor| factor != 0.0);
    let kind = match (keys.gguf.text(&kind_key)?, factor) {
        (Some(kind), _) => kind,
        (None, Some(factor)) if factor != 1.0 => "linear",
        (None, _) => "none",
    };
    match (kind, factor) {
        ("none", _) => {
            dict.insert("rope_type".into(), json!("default"));
        }
        ("linear" | "yarn", None) => {
            return Err(keys.missing("rope.scaling.factor", "the factor of the scaling"));
        }
        ("linear", Some(factor)) => {
            dict.insert("rope_type".into(), json!("linear"));
            dict.insert("factor".into(), json!(factor));
        }
        ("yarn", Some(factor)) => yarn(keys, factor, &mut dict)?,
        (other, _) => {
            return Err(keys.invalid(
                "rope.scaling.type",
                format!("`{other}`"),
                "none, linear or yarn",
            ));
        }
    }
    Ok(dict.into())
}

/// The keys of YaRN.
fn yarn(
    keys: &Keys,
    factor: f64,
    dict: &mut Map<String, serde_json::Value>,
) -> Result<(), ConfigError> {
    dict.insert("rope_type".into(), json!("yarn"));
    dict.insert("factor".into(), json!(factor));
    let original = keys.required(
        "rope.scaling.original_context_length",
        "the window before scaling",
    )?;
    dict.insert("original_max_position_embeddings".into(), json!(original));
    for (gguf, hf) in [
        ("rope.scaling.yarn_beta_fast", "beta_fast"),
        ("rope.scaling.yarn_beta_slow", "beta_slow"),
    ] {
        if let Some(value) = keys.number(gguf)? {
            dict.insert(hf.into(), json!(value));
        }
    }
    // GGUF's factor multiplies YaRN's own `0.1 ln(factor) + 1`; Hugging Face's replaces it.
    let own = match keys.number("rope.scaling.attn_factor")? {
        Some(own) => Some(own),
        None => keys.number("rope.scaling.yarn_attn_factor")?,
    };
    if let Some(own) = own.filter(|&own| own != 1.0) {
        let usual = 0.1 * factor.max(1.0).ln() + 1.0;
        dict.insert("attention_factor".into(), json!(own * usual));
    }
    Ok(())
}

/// `rope_freqs.weight`, which files of Llama 3.1 and later carry in place of scaling keys.
fn freq_factors(gguf: &Gguf) -> Result<Option<Vec<f32>>, ConfigError> {
    const NAME: &str = "rope_freqs.weight";
    let Some(tensor) = gguf.tensor(NAME) else {
        return Ok(None);
    };
    match to_f32(tensor.ty, gguf.data(tensor)) {
        Some(values) if tensor.shape.len() == 1 => Ok(Some(values)),
        _ => Err(ConfigError::Invalid {
            file: gguf.file().to_path_buf(),
            key: NAME.into(),
            found: format!("shape {:?} in {}", tensor.shape, tensor.ty.name()),
            expected: "one dimension in F32, F16 or BF16".into(),
        }),
    }
}
