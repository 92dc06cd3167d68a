//! `POST /v1/completions`

use super::{
    Answer, ErrorBody, MAX_N, MAX_STOPS, OneOrMany, Result, Shared, Spec, StreamOptions, check_top,
    generating,
};
use longspan_infer::context::ContextConfig;
use longspan_infer::decode::{DecodeConfig, SamplingConfig};
use longspan_nn::position::RopeOverride;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// What completions continue and embeddings embed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a text, a list of texts, a list of token ids or a list of such lists"
)]
pub enum Prompt {
    /// One text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// One text as token ids.
    Tokens(Vec<u32>),
    /// Several as token ids.
    TokenLists(Vec<Vec<u32>>),
}

impl Default for Prompt {
    fn default() -> Self {
        Prompt::Text(String::new())
    }
}

generating! {
    /// `POST /v1/completions`
    CompletionRequest {
        /// What is continued.
        #[serde(default)]
        pub prompt: Prompt,
        /// The prompt is part of the answer's text and of its log probabilities.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub echo: Option<bool>,
        /// Report log probabilities, and those of this many likeliest tokens.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub logprobs: Option<usize>,
    }
}

impl CompletionRequest {
    /// Checks what can be checked without a model.
    pub fn check(&self) -> Result<()> {
        self.check_shared()?;
        if self.max_tokens == Some(0) && self.echo != Some(true) {
            let text = "max_tokens: 0 found, at least 1 expected without \"echo\": true";
            return Err(ErrorBody::invalid("max_tokens", text));
        }
        self.logprobs
            .map_or(Ok(()), |top| check_top("logprobs", top))
    }
}

/// Log probabilities of a completion or of a piece of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CompletionLogprobs {
    /// Texts of the tokens.
    pub tokens: Vec<String>,
    /// None for the first token of an echoed prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// The likeliest tokens by their texts.
    pub top_logprobs: Option<Vec<Option<BTreeMap<String, f32>>>>,
    /// Where each token starts, in characters of the answer's text.
    pub text_offset: Vec<usize>,
}

/// An answer of completions, whole or a piece of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CompletionChoice {
    /// Its number: prompts one after another, `n` answers of each.
    pub index: usize,
    /// Its text.
    pub text: String,
    /// If asked.
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop`, `length`.
    pub finish_reason: Option<String>,
}

/// The body of a completion's answer, and one event of its stream.
pub type CompletionReply = Answer<CompletionChoice>;
