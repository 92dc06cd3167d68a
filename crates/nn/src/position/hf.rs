//! Reads a [`RopeBasis`] from the JSON configuration of a Hugging Face checkpoint.
//!
//! Two spellings exist: `rope_parameters` (a dict holding everything, or one dict per layer type) and the
//! older `rope_theta` + `rope_scaling`. An unknown rule is an error that names it: a model run with the
//! wrong angles answers fluently and wrongly.

use serde_json::{Map, Value};

use super::{RopeBasis, RopeError, RopeScaling, YarnParameters};

/// The values of `rope_type` (or, in older files, `type`) that are understood.
pub const KNOWN_ROPE_TYPES: &[&str] = &[
    "default",
    "linear",
    "dynamic",
    "yarn",
    "longrope",
    "su",
    "llama3",
    "proportional",
    "mrope",
];

/// The base when a configuration states none.
const DEFAULT_THETA: f64 = 10_000.0;
/// Gemma 3 leaves its bases out of the file when they are the usual ones.
const GEMMA3_GLOBAL_THETA: f64 = 1_000_000.0;
const GEMMA3_LOCAL_THETA: f64 = 10_000.0;
/// Names under which the number of positions is stored.
const WINDOW_FIELDS: &[&str] = &["max_position_embeddings", "n_positions", "max_seq_len"];

impl RopeBasis {
    /// Reads one dict of rope parameters: `rope_theta` (default 10000), `rope_type` (or `type`, default
    /// `default`), `partial_rotary_factor` (default 1), and the parameters of that rule.
    ///
    /// `head_dim` is the width of one head, `max_position_embeddings` the window of the checkpoint in
    /// tokens. Errors name the unknown rule, or the field with the value found and the value expected.
    pub fn from_hf(
        parameters: &Value,
        head_dim: usize,
        max_position_embeddings: usize,
    ) -> Result<Self, RopeError> {
        let empty = Map::new();
        let map = match parameters {
            Value::Object(map) => map,
            Value::Null => &empty,
            other => return Err(RopeError::field("rope_parameters", other, "an object")),
        };
        let dict = Dict(map);
        let rope_type = dict.rope_type()?;
        if map.contains_key("mrope_section") || rope_type == "axial" {
            return Err(RopeError::Unsupported {
                what: "rope over several axes (`mrope_section`, `axial`)".into(),
                why: "only text decoders are read; use the text-only variant of this model".into(),
            });
        }

        if rope_type == "clex" {
            return Err(RopeError::Unsupported {
                what: "rope_type `clex` without its weights".into(),
                why: "its frequencies come from tensors beside the model; give --rope clex:FOLDER"
                    .into(),
            });
        }
        let theta = dict.number("rope_theta")?.unwrap_or(DEFAULT_THETA);
        let share = dict.number("partial_rotary_factor")?.unwrap_or(1.0);
        if !(share > 0.0 && share <= 1.0) {
            return Err(RopeError::field(
                "partial_rotary_factor",
                share,
                "a number above 0 and at most 1",
            ));
        }
        if rope_type == "proportional" {
            // The series spans the whole head; only its first part moves.
            let moving_pairs = (share * head_dim as f64 / 2.0).floor() as usize;
            let linear = dict.number("factor")?.unwrap_or(1.0);
            return RopeBasis::new(theta, head_dim, max_position_embeddings)?
                .with_moving_pairs(moving_pairs)?
                .with_scaling(divided_by(linear));
        }
        let rotary_dim = (share * head_dim as f64) as usize;
        let plain = RopeBasis::new(theta, rotary_dim, max_position_embeddings)?;
        let original = match dict.tokens("original_max_position_embeddings")? {
            Some(tokens) => tokens,
            None => max_position_embeddings,
        };
        // The stretch, where the file gives only the two windows.
        let implied = || max_position_embeddings as f64 / original as f64;
        let scaling = match rope_type {
            "default" | "mrope" => RopeScaling::Default,
            "linear" => divided_by(dict.required("factor")?),
            "dynamic" => RopeScaling::Dynamic {
                factor: dict.required("factor")?,
            },
            "yarn" => RopeScaling::Yarn(YarnParameters {
                factor: dict.number("factor")?.unwrap_or_else(implied),
                beta_fast: dict.number("beta_fast")?.unwrap_or(32.0),
                beta_slow: dict.number("beta_slow")?.unwrap_or(1.0),
                truncate: dict.flag("truncate")?.unwrap_or(true),
                attention_factor: dict.number("attention_factor")?,
                mscale: dict.number("mscale")?,
                mscale_all_dim: dict.number("mscale_all_dim")?,
                original_max_position_embeddings: original,
            }),
            "longrope" | "su" => {
                let factor = dict.number("factor")?.unwrap_or_else(implied);
                let attention_factor = match dict.number("attention_factor")? {
                    Some(given) => given,
                    None if factor <= 1.0 => 1.0,
                    None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
                };
                RopeScaling::LongRope {
                    short_factor: dict.numbers("short_factor")?,
                    long_factor: dict.numbers("long_factor")?,
                    original_max_position_embeddings: original,
                    attention_factor,
                }
            }
            "llama3" => RopeScaling::Llama3 {
                factor: dict.required("factor")?,
                low_freq_factor: dict.required("low_freq_factor")?,
                high_freq_factor: dict.required("high_freq_factor")?,
                original_max_position_embeddings: original,
            },
            unknown => {
                return Err(RopeError::UnknownType {
                    found: unknown.into(),
                    known: KNOWN_ROPE_TYPES.join(", "),
                });
            }
        };
        plain.with_scaling(scaling)
    }

    /// Reads a whole `config.json`, in either spelling.
    ///
    /// `layer_type` (`full_attention`, `sliding_attention`, ...) chooses among the dicts of a model whose
    /// layer types differ. `Ok(None)` means that layers of this type have no rotation at all (NoPE).
    /// Errors: as [`from_hf`](Self::from_hf); a layer type that is needed and not given, or not there.
    pub fn from_hf_config(
        config: &Value,
        layer_type: Option<&str>,
    ) -> Result<Option<Self>, RopeError> {
        let Value::Object(whole) = config else {
            return Err(RopeError::field("config", config, "an object"));
        };
        let mut map = whole;
        // Files of models that also see or hear keep the decoder one level down.
        if let (None, Some(Value::Object(text))) = (map.get("hidden_size"), map.get("text_config"))
        {
            map = text;
        }
        let dict = Dict(map);
        let head_dim = head_dim(&dict, layer_type)?;
        let window = match first_tokens(&dict, WINDOW_FIELDS)? {
            Some(tokens) => tokens,
            None => return Err(missing(WINDOW_FIELDS[0], "the window, in tokens")),
        };

        let gemma3 = map
            .get("model_type")
            .and_then(Value::as_str)
            .is_some_and(|name| name.starts_with("gemma3"));
        let written = ["rope_parameters", "rope_scaling"]
            .iter()
            .find_map(|name| map.get(*name).filter(|value| !value.is_null()));
        let mut parameters = match written {
            None => Map::new(),
            Some(Value::Object(written)) if is_nested(written) => {
                match of_layer_type(written, layer_type)? {
                    Some(parameters) => parameters.clone(),
                    None => return Ok(None),
                }
            }
            Some(Value::Object(written)) => {
                let local = dict.number("rope_local_base_freq")?;
                let mut parameters = written.clone();
                if layer_type == Some("sliding_attention") && (local.is_some() || gemma3) {
                    // The stretch is for the layers that see everything.
                    parameters = Map::new();
                }
                parameters
            }
            Some(other) => {
                return Err(RopeError::field(
                    "rope_parameters",
                    other,
                    "an object or null",
                ));
            }
        };

        if !parameters.contains_key("rope_theta") {
            let local = layer_type == Some("sliding_attention");
            let of_local = dict.number("rope_local_base_freq")?.filter(|_| local);
            let usual = match (gemma3, local) {
                (true, true) => GEMMA3_LOCAL_THETA,
                (true, false) => GEMMA3_GLOBAL_THETA,
                (false, _) => DEFAULT_THETA,
            };
            // Gemma 3 states the base of its global layers in `rope_theta`: not that of the local ones.
            let of_model = dict.number("rope_theta")?.filter(|_| !(gemma3 && local));
            let of_neox = dict.number("rotary_emb_base")?;
            let theta = of_local.or(of_model).or(of_neox).unwrap_or(usual);
            parameters.insert("rope_theta".into(), theta.into());
        }
        if !parameters.contains_key("partial_rotary_factor") {
            let share = match dict.number("partial_rotary_factor")? {
                Some(share) => Some(share),
                None => dict.number("rotary_pct")?,
            };
            if let Some(share) = share {
                parameters.insert("partial_rotary_factor".into(), share.into());
            }
        }
        let original = "original_max_position_embeddings";
        let rope_type = Dict(&parameters).rope_type()?;
        if matches!(rope_type, "llama3" | "yarn" | "longrope" | "su")
            && let Some(tokens) = dict.tokens(original)?
        {
            parameters.insert(original.into(), tokens.into());
        }
        RopeBasis::from_hf(&Value::Object(parameters), head_dim, window).map(Some)
    }
}

fn divided_by(linear: f64) -> RopeScaling {
    if linear == 1.0 {
        return RopeScaling::Default;
    }
    RopeScaling::Composed {
        linear,
        power: 0.0,
        truncated: None,
    }
}

/// Width of the part of a head that may rotate.
fn head_dim(dict: &Dict, layer_type: Option<&str>) -> Result<usize, RopeError> {
    let global: &[&str] = &["global_head_dim"];
    let usual: &[&str] = &["qk_rope_head_dim", "head_dim"];
    if layer_type == Some("full_attention")
        && let Some(dim) = first_tokens(dict, global)?
    {
        return Ok(dim);
    }
    if let Some(dim) = first_tokens(dict, usual)? {
        return Ok(dim);
    }
    let width = first_tokens(dict, &["hidden_size", "n_embd"])?
        .ok_or_else(|| missing("hidden_size", "the width of the model, or `head_dim`"))?;
    let heads = first_tokens(dict, &["num_attention_heads", "n_head"])?
        .ok_or_else(|| missing("num_attention_heads", "the number of query heads"))?;
    if heads == 0 {
        return Err(RopeError::field("num_attention_heads", 0, "at least 1"));
    }
    Ok(width / heads)
}

/// One dict per layer type: no rope parameter is itself an object.
fn is_nested(written: &Map<String, Value>) -> bool {
    written
        .iter()
        .any(|(name, value)| value.is_object() || name.ends_with("_attention"))
}

fn of_layer_type<'a>(
    written: &'a Map<String, Value>,
    layer_type: Option<&str>,
) -> Result<Option<&'a Map<String, Value>>, RopeError> {
    let present = || {
        let names: Vec<&str> = written.keys().map(String::as_str).collect();
        format!(
            "one of the layer types in rope_parameters: {}",
            names.join(", ")
        )
    };
    let Some(layer_type) = layer_type else {
        return Err(RopeError::field("layer_type", "not given", present()));
    };
    match written.get(layer_type) {
        Some(Value::Object(parameters)) => Ok(Some(parameters)),
        Some(Value::Null) => Ok(None),
        Some(other) => Err(RopeError::field(
            format!("rope_parameters.{layer_type}"),
            other,
            "an object, or null for layers without rotation",
        )),
        None => Err(RopeError::field("layer_type", layer_type, present())),
    }
}

fn first_tokens(dict: &Dict, names: &[&str]) -> Result<Option<usize>, RopeError> {
    for name in names {
        if let Some(tokens) = dict.tokens(name)? {
            return Ok(Some(tokens));
        }
    }
    Ok(None)
}

fn missing(field: &str, expected: &str) -> RopeError {
    RopeError::field(field, "missing", expected)
}

/// Typed access to a JSON object; null counts as absent.
struct Dict<'a>(&'a Map<String, Value>);

impl<'a> Dict<'a> {
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn rope_type(&self) -> Result<&'a str, RopeError> {
        let Some(value) = self.get("rope_type").or_else(|| self.get("type")) else {
            return Ok("default");
        };
        value
            .as_str()
            .ok_or_else(|| RopeError::field("rope_type", value, "a string"))
    }

    fn number(&self, name: &str) -> Result<Option<f64>, RopeError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(number) => Ok(Some(number)),
            None => Err(RopeError::field(name, value, "a number")),
        }
    }

    fn required(&self, name: &str) -> Result<f64, RopeError> {
        self.number(name)?.ok_or_else(|| missing(name, "a number"))
    }

    fn tokens(&self, name: &str) -> Result<Option<usize>, RopeError> {
        let Some(number) = self.number(name)? else {
            return Ok(None);
        };
        // Some files write whole numbers as 4096.0.
        if number.fract() != 0.0 || !(1.0..9e15).contains(&number) {
            return Err(RopeError::field(name, number, "a whole number above 0"));
        }
        Ok(Some(number as usize))
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, RopeError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        match value.as_bool() {
            Some(flag) => Ok(Some(flag)),
            None => Err(RopeError::field(name, value, "true or false")),
        }
    }

    fn numbers(&self, name: &str) -> Result<Vec<f32>, RopeError> {
        let expected = "a list of numbers";
        let value = self.get(name).ok_or_else(|| missing(name, expected))?;
        let list = value.as_array();
        let numbers = list.and_then(|list| {
            let numbers = list.iter().map(|v| v.as_f64().map(|v| v as f32));
            numbers.collect::<Option<Vec<f32>>>()
        });
        numbers.ok_or_else(|| RopeError::field(name, value, expected))
    }
}
