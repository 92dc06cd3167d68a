//! The OpenAI dialect of HTTP bodies, with our extra fields: the same types on the client's and the server's side.
//! One file a route; here is what they share.
//!
//! Reading is lenient where the dialect grows (unknown fields go to `extra`, absent ones have defaults) and strict
//! where a value cannot be meant: [`read`] and the `check` methods name the field, the value found and what is expected.

mod chat;
mod completions;
mod embeddings;
mod models;
#[cfg(test)]
mod tests;

pub use chat::*;
pub use completions::*;
pub use embeddings::*;
pub use models::*;

use longspan_infer::context::ContextConfig;
use longspan_infer::decode::{DecodeConfig, SamplingConfig};
use longspan_nn::position::RopeOverride;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Most answers to one request.
pub const MAX_N: usize = 16;
/// Most stop texts.
pub const MAX_STOPS: usize = 16;
/// Most likeliest tokens listed beside a chosen one.
pub const MAX_TOP_LOGPROBS: usize = 20;

/// What an error answer holds: `{"error": {...}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ErrorBody {
    /// For people: the field, the value found, the value expected.
    #[serde(default)]
    pub message: String,
    /// `invalid_request_error`, `authentication_error`, `not_found_error`, `rate_limit_error`, `server_error`.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// The field at fault, as a path: `messages[1].role`.
    #[serde(default)]
    pub param: Option<String>,
    /// For programs: `context_length_exceeded`, `invalid_json`, `model_not_found`, ... Some endpoints send numbers.
    #[serde(default, deserialize_with = "text_or_number")]
    pub code: Option<String>,
}

fn text_or_number<'de, D: serde::Deserializer<'de>>(
    from: D,
) -> std::result::Result<Option<String>, D::Error> {
    Ok(match Option::<Value>::deserialize(from)? {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) => Some(text),
        Some(other) => Some(other.to_string()),
    })
}

impl ErrorBody {
    /// A request that cannot be meant.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        ErrorBody {
            message: message.into(),
            kind: "invalid_request_error".into(),
            param: Some(param.into()),
            code: Some("invalid_value".into()),
        }
    }

    /// The same with another code.
    pub fn with_code(mut self, code: &str) -> Self {
        self.code = Some(code.into());
        self
    }
}

/// The body of an answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReply {
    /// What went wrong.
    pub error: ErrorBody,
}

/// Result of reading a body.
pub type Result<T> = std::result::Result<T, ErrorBody>;

/// A body from its bytes. Errors name the field by its path and what was expected there.
pub fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        let syntax = !inner.is_data();
        ErrorBody {
            message: match (syntax, path.as_str()) {
                (true, _) => format!("the body is not JSON: {inner}"),
                (false, ".") => inner.to_string(),
                (false, path) => format!("{path}: {inner}"),
            },
            kind: "invalid_request_error".into(),
            param: (!syntax && path != ".").then_some(path),
            code: Some(
                if syntax {
                    "invalid_json"
                } else {
                    "invalid_value"
                }
                .into(),
            ),
        }
    })?;
    json.end().map_err(|error| ErrorBody {
        message: format!("the body is not JSON: {error}"),
        kind: "invalid_request_error".into(),
        param: None,
        code: Some("invalid_json".into()),
    })?;
    Ok(value)
}

/// One or several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
pub enum OneOrMany {
    /// One text.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl OneOrMany {
    /// As a list.
    pub fn list(&self) -> Vec<String> {
        match self {
            OneOrMany::One(text) => vec![text.clone()],
            OneOrMany::Many(list) => list.clone(),
        }
    }
}

/// A policy or strategy: the text of the command line, or an object with its hyper-parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a text such as \"infllm:topk=16\" or an object"
)]
pub enum Spec {
    /// `infllm:topk=16`
    Text(String),
    /// `{"policy": "infllm", "topk": 16}`
    Object(Map<String, Value>),
}

impl Spec {
    fn parse<T: DeserializeOwned + std::str::FromStr<Err: std::fmt::Display>>(
        &self,
        field: &str,
    ) -> Result<T> {
        match self {
            Spec::Text(text) => text
                .parse()
                .map_err(|error| ErrorBody::invalid(field, format!("{field}: {error}"))),
            Spec::Object(object) => serde_json::from_value(object.clone().into())
                .map_err(|error| ErrorBody::invalid(field, format!("{field}: {error}"))),
        }
    }
}

/// How a stream is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StreamOptions {
    /// The last chunk has no choices but the usage.
    pub include_usage: bool,
    /// Ours: chunks without choices tell how much of the prompt was read.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub include_progress: bool,
}

/// A request that writes text: its own fields, then those that all such requests share.
macro_rules! generating {
    ($(#[$outer:meta])* $name:ident { $($own:tt)* }) => {
        $(#[$outer])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        pub struct $name {
            $($own)*
            /// The model's name; empty means the one that is served.
            #[serde(default)]
            pub model: String,
            /// Answer in server-sent events.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub stream: Option<bool>,
            /// See [`StreamOptions`].
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub stream_options: Option<StreamOptions>,
            /// Most tokens of an answer.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub max_tokens: Option<usize>,
            /// Answers to write.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub n: Option<usize>,
            /// Texts that end an answer.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub stop: Option<OneOrMany>,
            /// See [`SamplingConfig`]; 1 unless `decode` names a search.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub temperature: Option<f32>,
            /// See [`SamplingConfig`].
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub top_p: Option<f32>,
            /// See [`SamplingConfig`].
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub top_k: Option<usize>,
            /// See [`SamplingConfig`].
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub min_p: Option<f32>,
            /// See [`SamplingConfig`].
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub repetition_penalty: Option<f32>,
            /// See [`SamplingConfig`].
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub presence_penalty: Option<f32>,
            /// See [`SamplingConfig`].
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub frequency_penalty: Option<f32>,
            /// Added to the logits of tokens, by token id.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub logit_bias: Option<BTreeMap<String, f32>>,
            /// Same seed, same text. Negative ones are taken for what their bits are.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub seed: Option<i64>,
            /// Ours: what later tokens see of a long text, as `--context`; `auto` chooses by length.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub context: Option<Spec>,
            /// Ours: another rotary rule, as `--rope`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub rope: Option<String>,
            /// Ours: the strategy, as `--decode`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub decode: Option<Spec>,
            /// Ours: a document uploaded before, that the prompt is about.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub session: Option<String>,
            /// Ours: report which parts of the prompt the answer was read from.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub show_context: Option<bool>,
            /// Fields that this version does not know.
            #[serde(flatten)]
            pub extra: Map<String, Value>,
        }

        impl $name {
            /// The texts that end an answer.
            pub fn stops(&self) -> Vec<String> {
                self.stop.as_ref().map(OneOrMany::list).unwrap_or_default()
            }

            /// True if the answer comes in events.
            pub fn streams(&self) -> bool {
                self.stream == Some(true)
            }

            /// The strategy; plain sampling if none is named.
            pub fn strategy(&self) -> Result<DecodeConfig> {
                self.decode.as_ref().map_or(Ok(DecodeConfig::Plain), |spec| spec.parse("decode"))
            }

            /// The policy; None = by length.
            pub fn policy(&self) -> Result<Option<ContextConfig>> {
                match &self.context {
                    None => Ok(None),
                    Some(Spec::Text(text)) if text == "auto" => Ok(None),
                    Some(spec) => spec.parse("context").map(Some),
                }
            }

            /// The rotary rule, if one is named.
            pub fn rotary(&self) -> Result<Option<RopeOverride>> {
                let wrong = |error: longspan_nn::position::RopeError| ErrorBody::invalid("rope", format!("rope: {error}"));
                self.rope.as_deref().map(|text| text.parse().map_err(wrong)).transpose()
            }

            /// The options of sampling, checked. `seed` serves where none is given.
            pub fn sampling(&self, decode: &DecodeConfig, seed: u64, logprobs: Option<usize>) -> Result<SamplingConfig> {
                let own = SamplingConfig::default();
                // Strategies with a distribution of their own refuse a temperature; the dialect's default is none.
                let own_rule = !matches!(decode, DecodeConfig::Plain | DecodeConfig::Lookahead(_));
                let mut logit_bias = BTreeMap::new();
                for (token, &bias) in self.logit_bias.iter().flatten() {
                    let id = token.parse().map_err(|_| {
                        let text = format!("logit_bias: {token:?} found, a token id expected");
                        ErrorBody::invalid("logit_bias", text)
                    })?;
                    logit_bias.insert(id, bias);
                }
                let config = SamplingConfig {
                    temperature: self.temperature.unwrap_or(if own_rule { 0.0 } else { own.temperature }),
                    top_k: self.top_k.unwrap_or(own.top_k),
                    top_p: self.top_p.unwrap_or(own.top_p),
                    min_p: self.min_p.unwrap_or(own.min_p),
                    repetition_penalty: self.repetition_penalty.unwrap_or(own.repetition_penalty),
                    presence_penalty: self.presence_penalty.unwrap_or(own.presence_penalty),
                    frequency_penalty: self.frequency_penalty.unwrap_or(own.frequency_penalty),
                    seed: self.seed.map_or(seed, |seed| seed as u64),
                    logit_bias,
                    logprobs,
                };
                config.validate().map_err(|error| {
                    let param = match &error {
                        longspan_infer::decode::logits::SamplingError::Value { option, .. } => option,
                        _ => "logit_bias",
                    };
                    ErrorBody::invalid(param, error.to_string())
                })?;
                Ok(config)
            }

            /// What all such requests share, checked. `seed` serves where none is given.
            pub fn shared(&self, seed: u64, logprobs: Option<usize>) -> Result<Shared> {
                self.check()?;
                let decode = self.strategy()?;
                Ok(Shared {
                    sampling: self.sampling(&decode, seed, logprobs)?,
                    decode,
                    policy: self.policy()?,
                    rotary: self.rotary()?,
                    stops: self.stops(),
                    n: self.n.unwrap_or(1),
                    streams: self.streams(),
                    stream_options: self.stream_options.unwrap_or_default(),
                    session: self.session.clone(),
                    show_context: self.show_context == Some(true),
                })
            }

            fn check_shared(&self) -> Result<()> {
                let wrong = |field: &str, found: usize, expected: &str| {
                    Err(ErrorBody::invalid(field, format!("{field}: {found} found, {expected} expected")))
                };
                if let Some(n) = self.n.filter(|n| !(1..=MAX_N).contains(n)) {
                    return wrong("n", n, &format!("1 to {MAX_N}"));
                }
                let stops = self.stops();
                if stops.len() > MAX_STOPS {
                    return wrong("stop", stops.len(), &format!("at most {MAX_STOPS} texts"));
                }
                if stops.iter().any(String::is_empty) {
                    return Err(ErrorBody::invalid("stop", "stop: an empty text found, texts of at least one character expected"));
                }
                if self.stream_options.is_some() && !self.streams() {
                    return Err(ErrorBody::invalid("stream_options", "stream_options is given without \"stream\": true"));
                }
                Ok(())
            }
        }
    };
}
use generating;

/// What all requests share that write text, checked.
#[derive(Clone, Debug)]
pub struct Shared {
    /// The strategy.
    pub decode: DecodeConfig,
    /// The options of sampling.
    pub sampling: SamplingConfig,
    /// The policy; None = by length.
    pub policy: Option<ContextConfig>,
    /// The rotary rule, if one is named.
    pub rotary: Option<RopeOverride>,
    /// Texts that end an answer.
    pub stops: Vec<String>,
    /// Answers to write.
    pub n: usize,
    /// Answer in events.
    pub streams: bool,
    /// How.
    pub stream_options: StreamOptions,
    /// The document that the prompt is about.
    pub session: Option<String>,
    /// Report where the model looked.
    pub show_context: bool,
}

fn check_top(field: &str, found: usize) -> Result<()> {
    if found <= MAX_TOP_LOGPROBS {
        return Ok(());
    }
    let text = format!("{field}: {found} found, at most {MAX_TOP_LOGPROBS} expected");
    Err(ErrorBody::invalid(field, text))
}

/// Tokens of a request and its answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Usage {
    /// Of the prompt, whether computed or reused.
    pub prompt_tokens: usize,
    /// Of all answers, the tokens that ended them included.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
    /// More about the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tokens_details: Option<PromptDetails>,
}

/// More about a prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PromptDetails {
    /// Tokens whose keys and values were there already.
    pub cached_tokens: usize,
}

/// A likely token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TopLogprob {
    /// Its text; bytes that are not UTF-8 are U+FFFD.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Its bytes.
    #[serde(default)]
    pub bytes: Option<Vec<u8>>,
}

/// A written token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// Its text; bytes that are not UTF-8 are U+FFFD.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Its bytes.
    #[serde(default)]
    pub bytes: Option<Vec<u8>>,
    /// The likeliest tokens.
    #[serde(default)]
    pub top_logprobs: Vec<TopLogprob>,
}

/// A stretch of the prompt or document that an answer was read from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Looked {
    /// First and one past the last token.
    pub tokens: [u64; 2],
    /// First and one past the last character of the document, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chars: Option<[usize; 2]>,
    /// Its share of all looks, 0 to 1.
    pub weight: f32,
}

/// What our server adds to an answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Details {
    /// The policy used, as `--context` reads it.
    pub context: String,
    /// The strategy used, as `--decode` reads it.
    pub decode: String,
    /// Seconds in the queue.
    pub queue_seconds: f64,
    /// Seconds of reading the prompt.
    pub prefill_seconds: f64,
    /// Seconds of writing.
    pub decode_seconds: f64,
    /// Passes over the model that writing took.
    pub forwards: usize,
    /// Where the model looked, if asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub looked: Option<Vec<Looked>>,
}

/// How far a prompt is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Tokens read.
    pub read: usize,
    /// Of so many.
    pub total: usize,
}

/// What begins every answer and every event of a stream.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Head {
    /// Of the request.
    pub id: String,
    /// `chat.completion`, `chat.completion.chunk`, `text_completion`.
    pub object: String,
    /// Unix seconds.
    pub created: u64,
    /// The model's name.
    pub model: String,
    /// Names the weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_fingerprint: Option<String>,
    /// Tokens; in a stream with the last event, if asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Ours, in a stream and if asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// Ours; in a stream with the last event.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub longspan: Option<Details>,
}

/// An answer, or one event of a stream: a head and choices. A stream ends with `data: [DONE]`, or with an event
/// `{"error": ...}`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answer<C> {
    /// What answers share.
    #[serde(flatten)]
    pub head: Head,
    /// The answers, or what an event adds to them; empty in events that only tell usage or progress.
    #[serde(default)]
    pub choices: Vec<C>,
}
