//! [`ModelConfig`] from a Hugging Face `config.json`, in the spelling of any version.
//!
//! Keys that are absent take the default of their model type in the transformers library, since
//! checkpoints leave out what equals it.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{Activation, Architecture, ConfigError, LayerConfig, ModelConfig, RopeSpec, intern};

/// `model_type` of the supported models.
const MODEL_TYPES: &[(&str, Architecture)] = &[
    ("llama", Architecture::Llama),
    ("mistral", Architecture::Mistral),
    ("qwen2", Architecture::Qwen2),
    ("qwen3", Architecture::Qwen3),
    ("gemma3_text", Architecture::Gemma3),
    ("gemma3", Architecture::Gemma3),
    ("smollm3", Architecture::SmolLM3),
];

/// What a key stands for when it is absent.
struct Defaults {
    /// None: the number of heads.
    num_kv_heads: Option<usize>,
    /// None: `hidden_size / num_attention_heads`.
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    rope_theta: f64,
    tie_word_embeddings: bool,
    sliding_window: Option<usize>,
}

impl Defaults {
    fn of(architecture: Architecture) -> Self {
        let llama = Self {
            num_kv_heads: None,
            head_dim: None,
            max_position_embeddings: 2048,
            rope_theta: 10_000.0,
            tie_word_embeddings: false,
            sliding_window: None,
        };
        match architecture {
            Architecture::Llama | Architecture::Stack => llama,
            Architecture::Mistral => Self {
                num_kv_heads: Some(8),
                max_position_embeddings: 131_072,
                sliding_window: Some(4096),
                ..llama
            },
            Architecture::Qwen2 => Self {
                num_kv_heads: Some(32),
                max_position_embeddings: 32_768,
                sliding_window: Some(4096),
                ..llama
            },
            Architecture::Qwen3 => Self {
                num_kv_heads: Some(32),
                head_dim: Some(128),
                max_position_embeddings: 32_768,
                sliding_window: Some(4096),
                ..llama
            },
            Architecture::Gemma3 => Self {
                num_kv_heads: Some(4),
                head_dim: Some(256),
                max_position_embeddings: 131_072,
                rope_theta: 1_000_000.0,
                tie_word_embeddings: true,
                sliding_window: Some(4096),
            },
            Architecture::SmolLM3 => Self {
                num_kv_heads: Some(4),
                max_position_embeddings: 32_768,
                rope_theta: 2_000_000.0,
                tie_word_embeddings: true,
                ..llama
            },
        }
    }
}

/// Joins names for a message.
pub(super) fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.collect::<Vec<_>>().join(", ")
}

/// A JSON object whose keys are read with a type; null counts as absent.
pub(super) struct Fields<'a> {
    pub(super) file: &'a Path,
    pub(super) map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn read<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match convert(value) {
            Some(value) => Ok(Some(value)),
            None => Err(self.invalid(key, shown(value), expected)),
        }
    }

    pub(super) fn size(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        self.read(key, "a non-negative integer", |v| {
            usize::try_from(v.as_u64()?).ok()
        })
    }

    /// A size without a default: all real checkpoints write it.
    pub(super) fn required(
        &self,
        key: &str,
        fallback: Option<usize>,
    ) -> Result<usize, ConfigError> {
        self.size(key)?
            .or(fallback)
            .ok_or_else(|| ConfigError::Missing {
                file: self.file.to_path_buf(),
                key: key.into(),
                expected: "an integer".into(),
            })
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.read(key, "a number", Value::as_f64)
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.read(key, "true or false", Value::as_bool)
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>, ConfigError> {
        self.read(key, "an object", Value::as_object)
    }

    pub(super) fn invalid(&self, key: &str, found: String, expected: &str) -> ConfigError {
        ConfigError::Invalid {
            file: self.file.to_path_buf(),
            key: key.into(),
            found,
            expected: expected.into(),
        }
    }
}

/// A value in a message, cut to a readable length.
fn shown(value: &Value) -> String {
    const SHOWN: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

impl ModelConfig {
    /// Reads `config.json` at `file`.
    ///
    /// # Errors
    /// As [`ModelConfig::from_hf_json`], and when the file cannot be read.
    pub fn from_hf_file(file: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read(file).map_err(|source| ConfigError::Io {
            file: file.to_path_buf(),
            source,
        })?;
        Self::from_hf_json(file, &text)
    }

    /// Reads the text of a `config.json`; `file` only names it in errors.
    ///
    /// # Errors
    /// An unsupported model type or feature, a missing key, or sizes that cannot belong together.
    pub fn from_hf_json(file: &Path, text: &[u8]) -> Result<Self, ConfigError> {
        let root: Map<String, Value> =
            serde_json::from_slice(text).map_err(|source| ConfigError::Json {
                file: file.to_path_buf(),
                source,
            })?;
        let root = Fields { file, map: &root };
        let model_type = root
            .read("model_type", "a string", Value::as_str)?
            .ok_or_else(|| ConfigError::Missing {
                file: file.to_path_buf(),
                key: "model_type".into(),
                expected: super::stack::all_types(MODEL_TYPES.iter().map(|(name, _)| *name)),
            })?;
        let Some(&(_, architecture)) = MODEL_TYPES.iter().find(|(name, _)| *name == model_type)
        else {
            return Err(ConfigError::Architecture {
                file: file.to_path_buf(),
                found: model_type.into(),
                supported: super::stack::all_types(MODEL_TYPES.iter().map(|(name, _)| *name)),
            });
        };
        if root.get("quantization_config").is_some() {
            return Err(root.invalid(
                "quantization_config",
                "set".into(),
                "absent (for a quantised model, use its GGUF file)",
            ));
        }
        let fields = match root.object("text_config")? {
            Some(map) if model_type == "gemma3" => Fields { file, map },
            _ => Fields {
                file,
                map: root.map,
            },
        };
        decoder(architecture, &root, &fields)
    }
}

/// The configuration of the decoder described by `fields`, part of the file `root`.
fn decoder(
    architecture: Architecture,
    root: &Fields,
    fields: &Fields,
) -> Result<ModelConfig, ConfigError> {
    let defaults = Defaults::of(architecture);
    let gemma = architecture == Architecture::Gemma3;
    // Only multimodal Gemma checkpoints leave these out.
    let fallback = |size| gemma.then_some(size);
    let num_layers = fields.required("num_hidden_layers", fallback(26))?;
    let hidden_size = fields.required("hidden_size", fallback(2304))?;
    let num_heads = fields.required("num_attention_heads", fallback(8))?;
    if num_layers > super::MAX_LAYERS {
        return Err(fields.invalid(
            "num_hidden_layers",
            num_layers.to_string(),
            &format!("1 to {}", super::MAX_LAYERS),
        ));
    }
    let num_kv_heads = match fields.map.get("num_key_value_heads") {
        // Explicit null means one for each head.
        Some(Value::Null) => num_heads,
        _ => fields
            .size("num_key_value_heads")?
            .or(defaults.num_kv_heads)
            .unwrap_or(num_heads),
    };
    let head_dim = match fields.size("head_dim")?.or(defaults.head_dim) {
        Some(size) => size,
        None if num_heads > 0 && hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            return Err(fields.invalid(
                "num_attention_heads",
                num_heads.to_string(),
                &format!("a divisor of the hidden size {hidden_size}"),
            ));
        }
    };
    let context_length = fields
        .size("max_position_embeddings")?
        .unwrap_or(defaults.max_position_embeddings);
    let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
    if fields.flag("use_bidirectional_attention")? == Some(true) {
        return Err(fields.invalid("use_bidirectional_attention", "true".into(), "false"));
    }
    let score_width = match gemma {
        true => fields.number("query_pre_attn_scalar")?.unwrap_or(256.0),
        false => head_dim as f64,
    };
    let cap = |key: &str| -> Result<Option<f32>, ConfigError> {
        Ok(match gemma {
            true => fields.number(key)?.map(|cap| cap as f32),
            false => None,
        })
    };
    let tied = match fields.flag("tie_word_embeddings")? {
        Some(tied) => Some(tied),
        None => root.flag("tie_word_embeddings")?,
    };
    let mut rope = Vec::new();
    let layers = layers(
        architecture,
        fields,
        &defaults,
        num_layers,
        context_length,
        &mut rope,
    )?;
    let config = ModelConfig {
        architecture,
        vocab_size: fields.required("vocab_size", fallback(262_208))?,
        hidden_size,
        intermediate_size: fields.required("intermediate_size", fallback(9216))?,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        rms_norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6),
        context_length,
        tie_word_embeddings: tied.unwrap_or(defaults.tie_word_embeddings),
        qkv_bias: attention_bias || architecture == Architecture::Qwen2,
        output_bias: attention_bias && architecture != Architecture::Qwen2,
        mlp_bias: match architecture {
            Architecture::Llama | Architecture::SmolLM3 => {
                fields.flag("mlp_bias")?.unwrap_or(false)
            }
            _ => false,
        },
        qk_norm: matches!(architecture, Architecture::Qwen3 | Architecture::Gemma3),
        sandwich_norms: gemma,
        embedding_scale: gemma.then(|| (hidden_size as f32).sqrt()),
        activation: activation(fields, gemma)?,
        attention_scale: score_width.sqrt().recip() as f32,
        attention_softcap: cap("attn_logit_softcapping")?,
        final_softcap: cap("final_logit_softcapping")?,
        alibi_max_bias: alibi(fields)?,
        layers,
        rope,
        name: root
            .read("_name_or_path", "a string", Value::as_str)?
            .filter(|name| !name.is_empty())
            .map(str::to_owned),
    };
    let name = |field: &str| -> String {
        match field {
            "num_layers" => "num_hidden_layers",
            "num_heads" => "num_attention_heads",
            "num_kv_heads" => "num_key_value_heads",
            "context_length" => "max_position_embeddings",
            "attention_scale" => "query_pre_attn_scalar",
            "attention_softcap" => "attn_logit_softcapping",
            "final_softcap" => "final_logit_softcapping",
            "alibi_max_bias" => "alibi_bias_max",
            other => other,
        }
        .into()
    };
    config.validate(fields.file, name)
}

/// Whether positions are told by ALiBi, in the spellings of BLOOM (`position_embedding_type`), Falcon
/// (`alibi`) and MPT (`alibi_bias_max`).
fn alibi(fields: &Fields) -> Result<Option<f64>, ConfigError> {
    let named = fields.read("position_embedding_type", "a string", Value::as_str)?;
    let set = fields.flag("alibi")?.unwrap_or(named == Some("alibi"));
    let bias = fields.number("alibi_bias_max")?.unwrap_or(8.0);
    Ok(set.then_some(bias))
}

fn activation(fields: &Fields, gemma: bool) -> Result<Activation, ConfigError> {
    let (key, default) = match gemma {
        true => ("hidden_activation", "gelu_pytorch_tanh"),
        false => ("hidden_act", "silu"),
    };
    match fields
        .read(key, "a string", Value::as_str)?
        .unwrap_or(default)
    {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        other => Err(fields.invalid(key, format!("`{other}`"), "silu or gelu_pytorch_tanh")),
    }
}

/// The two kinds of layer, by their names in `layer_types`.
const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

/// Windows and position encodings of all layers.
fn layers(
    architecture: Architecture,
    fields: &Fields,
    defaults: &Defaults,
    num_layers: usize,
    context_length: usize,
    rope: &mut Vec<RopeSpec>,
) -> Result<Vec<LayerConfig>, ConfigError> {
    // For Mistral an explicit null switches the window off, an absent key does not.
    let window = match fields.map.get("sliding_window") {
        Some(Value::Null) => None,
        _ => fields.size("sliding_window")?.or(defaults.sliding_window),
    };
    let window = match architecture {
        Architecture::Llama | Architecture::Stack => None,
        Architecture::Mistral | Architecture::Gemma3 => window,
        Architecture::Qwen2 | Architecture::Qwen3 | Architecture::SmolLM3 => {
            window.filter(|_| matches!(fields.flag("use_sliding_window"), Ok(Some(true))))
        }
    };
    if window == Some(0) {
        return Err(fields.invalid("sliding_window", "0".into(), "a positive number or null"));
    }
    let has_rope = match alibi(fields)? {
        Some(_) => vec![false; num_layers],
        None => rope_layers(architecture, fields, num_layers)?,
    };
    let sliding = sliding_layers(architecture, fields, num_layers, &has_rope)?;
    let mut layers = Vec::with_capacity(num_layers);
    for i in 0..num_layers {
        let kind = if sliding[i] { SLIDING } else { FULL };
        let rope = match has_rope[i] {
            true => {
                let parameters =
                    rope_parameters(architecture, fields, defaults, context_length, kind)?;
                let spec = RopeSpec {
                    parameters,
                    freq_factors: None,
                    max_position_embeddings: context_length,
                };
                Some(intern(rope, &spec))
            }
            false => None,
        };
        layers.push(LayerConfig {
            sliding_window: window.filter(|_| sliding[i]),
            rope,
        });
    }
    Ok(layers)
}

/// Which layers encode positions: all, except in SmolLM3.
fn rope_layers(
    architecture: Architecture,
    fields: &Fields,
    num_layers: usize,
) -> Result<Vec<bool>, ConfigError> {
    if architecture != Architecture::SmolLM3 {
        return Ok(vec![true; num_layers]);
    }
    let listed = fields.read("no_rope_layers", "a list of 0 (no encoding) and 1", |v| {
        v.as_array()?
            .iter()
            .map(|flag| flag.as_u64().filter(|f| *f < 2).map(|f| f == 1))
            .collect::<Option<Vec<bool>>>()
    })?;
    match listed {
        Some(listed) if listed.len() >= num_layers => Ok(listed),
        Some(listed) => Err(fields.invalid(
            "no_rope_layers",
            format!("{} long", listed.len()),
            &format!("one for each of the {num_layers} layers"),
        )),
        None => {
            let interval = fields.size("no_rope_layer_interval")?.unwrap_or(4);
            if interval == 0 {
                return Err(fields.invalid(
                    "no_rope_layer_interval",
                    "0".into(),
                    "a positive number",
                ));
            }
            Ok((1..=num_layers)
                .map(|n| !n.is_multiple_of(interval))
                .collect())
        }
    }
}

/// Which layers see only a window, if there is one.
fn sliding_layers(
    architecture: Architecture,
    fields: &Fields,
    num_layers: usize,
    has_rope: &[bool],
) -> Result<Vec<bool>, ConfigError> {
    // Mistral has a window in every layer, whatever `layer_types` may say.
    let uniform = match architecture {
        Architecture::Llama => Some(false),
        Architecture::Mistral => Some(true),
        _ => None,
    };
    if let Some(sliding) = uniform {
        return Ok(vec![sliding; num_layers]);
    }
    let kinds = format!("`{FULL}` or `{SLIDING}` for each of the {num_layers} layers");
    let listed = fields.read("layer_types", &kinds, |v| {
        v.as_array()?
            .iter()
            .map(|kind| match kind.as_str()? {
                FULL => Some(false),
                SLIDING => Some(true),
                _ => None,
            })
            .collect::<Option<Vec<bool>>>()
    })?;
    match listed {
        Some(listed) if listed.len() == num_layers => return Ok(listed),
        Some(listed) => {
            let found = format!("{} long", listed.len());
            return Err(fields.invalid("layer_types", found, &kinds));
        }
        None => {}
    }
    match architecture {
        Architecture::Gemma3 => {
            let period = match fields.size("sliding_window_pattern")? {
                Some(period) => period,
                None => fields.size("_sliding_window_pattern")?.unwrap_or(6),
            };
            if period == 0 {
                return Err(fields.invalid(
                    "sliding_window_pattern",
                    "0".into(),
                    "a positive number of layers",
                ));
            }
            Ok((1..=num_layers)
                .map(|n| !n.is_multiple_of(period))
                .collect())
        }
        Architecture::SmolLM3 => Ok(has_rope.iter().map(|rope| !rope).collect()),
        _ => {
            let first = fields.size("max_window_layers")?.unwrap_or(28);
            Ok((0..num_layers).map(|i| i >= first).collect())
        }
    }
}

/// The `rope_parameters` dictionary of one kind of layer.
///
/// Three spellings: `rope_parameters` (one dictionary, or one for each kind of layer), and the older
/// `rope_theta` beside `rope_scaling`. In Gemma 3 the older scaling is meant for global layers only
/// and local layers have `rope_local_base_freq`.
fn rope_parameters(
    architecture: Architecture,
    fields: &Fields,
    defaults: &Defaults,
    context_length: usize,
    kind: &str,
) -> Result<Value, ConfigError> {
    let local = architecture == Architecture::Gemma3 && kind == SLIDING;
    let (theta_key, theta) = match local {
        true => ("rope_local_base_freq", 10_000.0),
        false => ("rope_theta", defaults.rope_theta),
    };
    let scaling = fields.object("rope_scaling")?.filter(|map| !map.is_empty());
    let mut dict = match (fields.object("rope_parameters")?, scaling) {
        (Some(map), _) if map.contains_key(FULL) || map.contains_key(SLIDING) => {
            let nested = Fields {
                file: fields.file,
                map,
            };
            nested.object(kind)?.cloned().unwrap_or_default()
        }
        (_, Some(_)) if local => Map::new(),
        (_, Some(map)) => map.clone(),
        (Some(_), None) if local => Map::new(),
        (Some(map), None) => map.clone(),
        (None, None) => Map::new(),
    };
    dict.retain(|_, value| !value.is_null());
    let old_spelling = dict.remove("type");
    if !dict.contains_key("rope_type") {
        dict.insert(
            "rope_type".into(),
            old_spelling.unwrap_or_else(|| json!("default")),
        );
    }
    let Some(rope_type) = dict["rope_type"].as_str().map(str::to_owned) else {
        return Err(fields.invalid("rope_type", shown(&dict["rope_type"]), "a string"));
    };
    if !dict.contains_key("rope_theta") {
        let theta = fields.number(theta_key)?.unwrap_or(theta);
        dict.insert("rope_theta".into(), json!(theta));
    }
    if !dict.contains_key("partial_rotary_factor")
        && let Some(share) = fields.number("partial_rotary_factor")?
    {
        dict.insert("partial_rotary_factor".into(), json!(share));
    }
    if matches!(rope_type.as_str(), "llama3" | "yarn" | "longrope") {
        let key = "original_max_position_embeddings";
        // A value beside the dictionary wins over one inside.
        if let Some(original) = fields.size(key)? {
            dict.insert(key.into(), json!(original));
        } else if !dict.contains_key(key) {
            dict.insert(key.into(), json!(context_length));
        }
    }
    Ok(dict.into())
}
