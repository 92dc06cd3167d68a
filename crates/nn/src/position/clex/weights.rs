//! The network of CLEX as published: two tensors among a checkpoint's weights, options in its `config.json`.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Act, ClexConfig, ClexField, ClexTable, LogScale};
use crate::position::RopeError;
use crate::weights::safetensors::Safetensors;

/// Ends of the tensors' names; in full they are `model.clex_layer.proj_func.ode_up_proj` and `..._down_proj`.
const UP: &str = "ode_up_proj";
const DOWN: &str = "ode_down_proj";

/// What a folder or file says about CLEX.
#[derive(Debug, Clone, PartialEq)]
pub struct ClexWeights {
    /// Its hyper-parameters.
    pub config: ClexConfig,
    /// The original window, where `config.json` states one, tokens.
    pub window: Option<usize>,
    path: PathBuf,
    /// `[pairs, width]`, row-major, and its shape.
    up: (Vec<f32>, [usize; 2]),
    /// `[width, pairs]`, row-major, and its shape.
    down: (Vec<f32>, [usize; 2]),
}

impl ClexWeights {
    /// Reads a Hugging Face folder, or one `.safetensors` file (with a `config.json` beside it, if there is
    /// one). What the configuration leaves out means what it meant when CLEX was first published:
    /// `silu`, steps of 0.01, 16 windows.
    ///
    /// # Errors
    /// [`RopeError::File`] names the file, the tensor or key, and what was expected.
    pub fn open(path: &Path) -> Result<Self, RopeError> {
        let fail = |path: &Path, problem: String| RopeError::File {
            path: path.into(),
            problem,
        };
        let folder = if path.is_dir() {
            path.to_path_buf()
        } else {
            path.parent().unwrap_or(Path::new("")).to_path_buf()
        };
        let files = if path.is_dir() {
            let entries = std::fs::read_dir(path).map_err(|e| fail(path, e.to_string()))?;
            let mut files: Vec<PathBuf> = entries
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
                .collect();
            files.sort();
            files
        } else {
            vec![path.to_path_buf()]
        };
        let (mut up, mut down) = (None, None);
        for file in &files {
            let tensors = Safetensors::open(file).map_err(|e| fail(path, e.to_string()))?;
            for tensor in tensors.tensors() {
                let place = match tensor.name.rsplit('.').next() {
                    Some(UP) => &mut up,
                    Some(DOWN) => &mut down,
                    _ => continue,
                };
                let values = floats(&tensor.dtype, tensors.data(tensor));
                let (Some(values), &[rows, columns]) = (values, &tensor.shape[..]) else {
                    let found = format!(
                        "tensor `{}`: found {} {:?}, expected two dimensions of F32, F16 or BF16",
                        tensor.name, tensor.dtype, tensor.shape
                    );
                    return Err(fail(file, found));
                };
                if place.replace((values, [rows, columns])).is_some() {
                    return Err(fail(file, format!("`{}` is there twice", tensor.name)));
                }
            }
        }
        let (Some(up), Some(down)) = (up, down) else {
            let found = format!(
                "found no tensors {UP} and {DOWN} in {} safetensors files; expected the weights of a model tuned with CLEX",
                files.len()
            );
            return Err(fail(path, found));
        };
        let mut weights = ClexWeights {
            config: ClexConfig {
                act: Act::Silu,
                ..ClexConfig::default()
            },
            window: None,
            path: path.to_path_buf(),
            up,
            down,
        };
        let file = folder.join("config.json");
        if file.is_file() {
            let bytes = std::fs::read(&file).map_err(|e| fail(&file, e.to_string()))?;
            let config: Value =
                serde_json::from_slice(&bytes).map_err(|e| fail(&file, e.to_string()))?;
            weights.configure(&config).map_err(|p| fail(&file, p))?;
        }
        Ok(weights)
    }

    /// Takes over what a `config.json` says.
    fn configure(&mut self, config: &Value) -> Result<(), String> {
        let mut dict = serde_json::Map::new();
        for key in ["rope_scaling", "rope_parameters"] {
            if let Some(Value::Object(map)) = config.get(key) {
                dict = map.clone();
            }
        }
        // One name at a time: the dictionary also holds what belongs to other rules.
        let known = [
            "max_factor",
            "param_factor",
            "act",
            "time_dt",
            "clex_field_base",
        ];
        dict.retain(|key, value| known.contains(&key.as_str()) && !value.is_null());
        if !dict.contains_key("act") {
            dict.insert("act".into(), "silu".into());
        }
        self.config = serde_json::from_value(dict.into())
            .map_err(|error| format!("the rope parameters of CLEX: {error}"))?;
        if config.get("log_scale").and_then(Value::as_bool) == Some(true) {
            self.config.log_scale = LogScale::Max;
        }
        let window = config.get("max_position_embeddings");
        self.window = match window {
            None | Some(Value::Null) => None,
            Some(value) => match value.as_u64() {
                Some(tokens) if tokens > 0 => Some(tokens as usize),
                _ => {
                    return Err(format!(
                        "`max_position_embeddings` is {value}, expected a number of tokens above 0"
                    ));
                }
            },
        };
        Ok(())
    }

    /// The field for a rotation of `pairs` pairs. Errors if the tensors are of another size.
    pub fn field(&self, pairs: usize) -> Result<ClexField, RopeError> {
        let width = self.up.1[1];
        if self.up.1 != [pairs, width] || self.down.1 != [width, pairs] {
            return Err(RopeError::File {
                path: self.path.clone(),
                problem: format!(
                    "tensors {UP} {:?} and {DOWN} {:?}, expected [{pairs}, width] and [width, {pairs}] for this model's rotation",
                    self.up.1, self.down.1
                ),
            });
        }
        let config = &self.config;
        ClexField::new(
            pairs,
            &self.up.0,
            &self.down.0,
            config.act,
            config.clex_field_base,
        )
    }

    /// The table for plain frequencies `theta` `[pairs]` of a model with this window.
    pub fn table(&self, theta: &[f32], window: usize) -> Result<ClexTable, RopeError> {
        let config = &self.config;
        // Far beyond any use; bounds the time a wrong file can take.
        if !(1..=4096).contains(&config.max_factor) {
            return Err(RopeError::field(
                "max_factor",
                config.max_factor,
                "1 to 4096",
            ));
        }
        if !(1e-4..=1.0).contains(&config.time_dt) {
            return Err(RopeError::field("time_dt", config.time_dt, "0.0001 to 1"));
        }
        let field = self.field(theta.len())?;
        Ok(ClexTable::new(theta, &field, config, window))
    }
}

/// The values of a tensor; None for types that hold no weights.
fn floats(dtype: &str, bytes: &[u8]) -> Option<Vec<f32>> {
    let halves = |of: fn(u16) -> f32| {
        let halves = bytes.as_chunks::<2>().0.iter();
        halves.map(|b| of(u16::from_le_bytes(*b))).collect()
    };
    match dtype {
        "F32" => {
            let words = bytes.as_chunks::<4>().0.iter();
            Some(words.map(|b| f32::from_le_bytes(*b)).collect())
        }
        "F16" => Some(halves(|bits| half::f16::from_bits(bits).to_f32())),
        "BF16" => Some(halves(|bits| half::bf16::from_bits(bits).to_f32())),
        _ => None,
    }
}
