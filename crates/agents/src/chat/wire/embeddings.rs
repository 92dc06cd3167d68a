//! `POST /v1/embeddings`

use super::{Prompt, Usage};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// `POST /v1/embeddings`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EmbeddingRequest {
    /// What is embedded.
    pub input: Prompt,
    /// The model's name.
    #[serde(default)]
    pub model: String,
    /// `float` or `base64` (little-endian f32).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding_format: Option<String>,
    /// Fewer components than the model has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dimensions: Option<usize>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// A vector in one of two forms.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a list of numbers or a base64 text")]
pub enum Vector {
    /// Numbers.
    Floats(Vec<f32>),
    /// Little-endian f32 in base64.
    Base64(String),
}

/// One embedding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Embedding {
    /// `embedding`
    #[serde(default)]
    pub object: String,
    /// Which input.
    #[serde(default)]
    pub index: usize,
    /// The vector.
    pub embedding: Vector,
}

/// The body of an embedding's answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EmbeddingReply {
    /// `list`
    pub object: String,
    /// In order of the inputs.
    pub data: Vec<Embedding>,
    /// The model's name.
    pub model: String,
    /// Tokens.
    pub usage: Option<Usage>,
}
