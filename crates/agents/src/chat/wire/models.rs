//! `GET /v1/models`, `POST /tokenize`

use super::ChatMessage;
use serde::{Deserialize, Serialize};

/// A model of `GET /v1/models`. What the dialect does not have is absent from other endpoints.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelInfo {
    /// Its name.
    pub id: String,
    /// `model`
    pub object: String,
    /// Unix seconds.
    pub created: u64,
    /// Who made it.
    pub owned_by: String,
    /// Ours: trained window in tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_window: Option<u64>,
    /// Ours: most tokens of a prompt and its answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<u64>,
    /// Ours: names the weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// Ours: other names that requests may give it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
    /// Ours: `chat`, `complete`, `logprobs`, `echo`, `embed`, `tokenize`, `documents`, `read_ahead`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub abilities: Vec<String>,
    /// Ours: components of an embedding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedding_dim: Option<usize>,
}

/// The body of `GET /v1/models`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelList {
    /// `list`
    pub object: String,
    /// The models.
    pub data: Vec<ModelInfo>,
}

/// `POST /tokenize`: a text or a conversation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TokenizeRequest {
    /// The model's name.
    pub model: String,
    /// A text.
    #[serde(alias = "content", skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// Ours: several texts, of which only the counts are answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompts: Option<Vec<String>>,
    /// A conversation, with the model's template.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages: Option<Vec<ChatMessage>>,
    /// Put the model's start token before a text, and read control tokens in it; true if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub add_special_tokens: Option<bool>,
    /// Also answer the text of each token.
    pub return_token_strs: bool,
}

/// The answer of `POST /tokenize`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TokenizeReply {
    /// The ids.
    pub tokens: Vec<u32>,
    /// How many.
    pub count: usize,
    /// The model's window in tokens.
    pub max_model_len: u64,
    /// Ours: tokens of each of `prompts`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub counts: Option<Vec<usize>>,
    /// Their texts, if asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_strs: Option<Vec<String>>,
}
