//! The OpenAI dialect of HTTP bodies, with our extra fields: the same types on the client's and the server's side.
//!
//! Reading is lenient where the dialect grows (unknown fields go to `extra`, absent ones have defaults) and strict
//! where a value cannot be meant: [`read`] and the `check` methods name the field, the value found and what is expected.

use super::template::{Message, Role};
use longspan_infer::context::ContextConfig;
use longspan_infer::decode::{DecodeConfig, SamplingConfig};
use longspan_nn::position::RopeOverride;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

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

/// The content of a message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of parts")]
pub enum Content {
    /// A text.
    Text(String),
    /// Parts, put together without anything between.
    Parts(Vec<ContentPart>),
}

/// A part of a message's content.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContentPart {
    /// `text` is understood.
    #[serde(rename = "type")]
    pub kind: String,
    /// The text of a part of type `text`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// All else.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// A message as it is sent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system` (or `developer`), `user`, `assistant`.
    #[serde(default)]
    pub role: String,
    /// What is said; some endpoints answer with null.
    #[serde(default)]
    pub content: Option<Content>,
    /// All else.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl ChatMessage {
    /// A message of this role.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        ChatMessage {
            role: role.into(),
            content: Some(Content::Text(content.into())),
            extra: Map::new(),
        }
    }

    /// The text of all parts that have one.
    pub fn text(&self) -> String {
        match &self.content {
            None => String::new(),
            Some(Content::Text(text)) => text.clone(),
            Some(Content::Parts(parts)) => parts
                .iter()
                .filter_map(|part| part.text.as_deref())
                .collect(),
        }
    }
}

impl From<&Message> for ChatMessage {
    fn from(message: &Message) -> Self {
        let role = match message.role {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        };
        ChatMessage::new(role, message.content.clone())
    }
}

/// The turns of a conversation; errors name the message that is none.
pub fn turns(messages: &[ChatMessage]) -> Result<Vec<Message>> {
    if messages.is_empty() {
        let message = "messages is an empty list, expected at least one message";
        return Err(ErrorBody::invalid("messages", message));
    }
    let turn = |(index, message): (usize, &ChatMessage)| {
        let at = format!("messages[{index}]");
        let role = match message.role.as_str() {
            "system" | "developer" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            other => {
                let text = format!(
                    "{at}.role: {other:?} found, system, developer, user or assistant expected"
                );
                return Err(ErrorBody::invalid(format!("{at}.role"), text));
            }
        };
        if let Some(Content::Parts(parts)) = &message.content {
            for (part, content) in parts.iter().enumerate() {
                if content.kind != "text" || content.text.is_none() {
                    let at = format!("{at}.content[{part}]");
                    let text = format!(
                        "{at}: a part of type {:?} found, one of type \"text\" with a text expected",
                        content.kind
                    );
                    return Err(ErrorBody::invalid(at, text));
                }
            }
        }
        if message.content.is_none() && role != Role::Assistant {
            let at = format!("{at}.content");
            let text = format!("{at}: null found, a text or a list of parts expected");
            return Err(ErrorBody::invalid(at, text));
        }
        Ok(Message::new(role, message.text()))
    };
    messages.iter().enumerate().map(turn).collect()
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

generating! {
    /// `POST /v1/chat/completions`
    ChatRequest {
        /// The conversation so far.
        pub messages: Vec<ChatMessage>,
        /// The newer name of `max_tokens`; it wins.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub max_completion_tokens: Option<usize>,
        /// Report the log probabilities of the tokens written.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub logprobs: Option<bool>,
        /// Also those of this many likeliest tokens.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub top_logprobs: Option<usize>,
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

impl ChatRequest {
    /// Checks what can be checked without a model.
    pub fn check(&self) -> Result<()> {
        self.check_shared()?;
        if self.max_new_tokens() == Some(0) {
            let field = match self.max_completion_tokens {
                Some(_) => "max_completion_tokens",
                None => "max_tokens",
            };
            return Err(ErrorBody::invalid(
                field,
                format!("{field}: 0 found, at least 1 expected"),
            ));
        }
        if let Some(top) = self.top_logprobs {
            if self.logprobs != Some(true) {
                let text = "top_logprobs is given without \"logprobs\": true";
                return Err(ErrorBody::invalid("top_logprobs", text));
            }
            check_top("top_logprobs", top)?;
        }
        Ok(())
    }

    /// Most tokens of an answer, by either name.
    pub fn max_new_tokens(&self) -> Option<usize> {
        self.max_completion_tokens.or(self.max_tokens)
    }

    /// How many likeliest tokens to list; None = no log probabilities.
    pub fn wanted_logprobs(&self) -> Option<usize> {
        (self.logprobs == Some(true)).then(|| self.top_logprobs.unwrap_or(0))
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

/// Log probabilities of a chat answer or of a piece of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChatLogprobs {
    /// Token by token.
    #[serde(default)]
    pub content: Option<Vec<TokenLogprob>>,
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

/// An answer of a chat.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ChatChoice {
    /// Its number.
    pub index: usize,
    /// What is said.
    pub message: ChatMessage,
    /// If asked.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop`, `length`.
    pub finish_reason: Option<String>,
}

/// The body of a chat's answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ChatReply {
    /// Of the request.
    pub id: String,
    /// `chat.completion`
    pub object: String,
    /// Unix seconds.
    pub created: u64,
    /// The model's name.
    pub model: String,
    /// The answers.
    pub choices: Vec<ChatChoice>,
    /// Tokens.
    pub usage: Option<Usage>,
    /// Names the weights.
    pub system_fingerprint: Option<String>,
    /// Ours.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub longspan: Option<Details>,
}

/// What a chunk adds to a message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Delta {
    /// In the first chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// Text to append.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// A choice of a chunk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ChunkChoice {
    /// The answer's number.
    pub index: usize,
    /// What is added to it.
    pub delta: Delta,
    /// Of the tokens added.
    pub logprobs: Option<ChatLogprobs>,
    /// In the answer's last chunk.
    pub finish_reason: Option<String>,
}

/// One event of a chat's stream. The stream ends with `data: [DONE]`, or with an event `{"error": ...}`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ChatChunk {
    /// Of the request.
    pub id: String,
    /// `chat.completion.chunk`
    pub object: String,
    /// Unix seconds.
    pub created: u64,
    /// The model's name.
    pub model: String,
    /// Empty in chunks that only tell usage or progress.
    pub choices: Vec<ChunkChoice>,
    /// In the last chunk, if asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Names the weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_fingerprint: Option<String>,
    /// Ours, if asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// Ours: with the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub longspan: Option<Details>,
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
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CompletionReply {
    /// Of the request.
    pub id: String,
    /// `text_completion`
    pub object: String,
    /// Unix seconds.
    pub created: u64,
    /// The model's name.
    pub model: String,
    /// The answers.
    pub choices: Vec<CompletionChoice>,
    /// Tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Names the weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_fingerprint: Option<String>,
    /// Ours, in a stream and if asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// Ours.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub longspan: Option<Details>,
}

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
    /// Ours: `chat`, `complete`, `logprobs`, `echo`, `embed`, `tokenize`, `documents`.
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
    /// Their texts, if asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_strs: Option<Vec<String>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_of_the_official_client_are_read() {
        let body = br#"{"model":"m","messages":[{"role":"developer","content":"Be brief."},
            {"role":"user","content":[{"type":"text","text":"Hel"},{"type":"text","text":"lo"}],"name":"x"}],
            "stream":true,"stream_options":{"include_usage":true},"max_completion_tokens":5,"max_tokens":9,
            "temperature":0,"stop":"x","logprobs":true,"top_logprobs":3,"seed":-1,"user":"me","tools":null,
            "context":{"policy":"window","size":64},"decode":"lookahead:branch_length=4","rope":"ntk:2"}"#;
        let request: ChatRequest = read(body).unwrap();
        request.check().unwrap();
        let turns = turns(&request.messages).unwrap();
        assert_eq!(turns[0], Message::new(Role::System, "Be brief."));
        assert_eq!(turns[1], Message::new(Role::User, "Hello"));
        assert_eq!(request.max_new_tokens(), Some(5));
        assert_eq!(request.stops(), ["x"]);
        assert_eq!(request.extra["user"], "me");
        assert_eq!(
            request.policy().unwrap().unwrap().to_string(),
            "window:size=64"
        );
        let decode = request.strategy().unwrap();
        assert_eq!(decode.to_string(), "lookahead:branch_length=4");
        let sampling = request
            .sampling(&decode, 3, request.wanted_logprobs())
            .unwrap();
        assert_eq!((sampling.seed, sampling.logprobs), (u64::MAX, Some(3)));
        assert_eq!(request.rotary().unwrap().unwrap().to_string(), "ntk:2");
        let again: ChatRequest = read(&serde_json::to_vec(&request).unwrap()).unwrap();
        assert_eq!(again, request);
    }

    #[test]
    fn wrong_types_are_named_by_their_path() {
        for (body, param, words) in [
            (
                r#"{"messages":[{"role":"user","content":3}]}"#,
                "messages[0].content",
                "a text or a list",
            ),
            (r#"{"messages":"hello"}"#, "messages", "sequence"),
            (
                r#"{"messages":[],"temperature":"hot"}"#,
                "temperature",
                "f32",
            ),
            (r#"{"messages":[],"max_tokens":-3}"#, "max_tokens", "-3"),
            (r#"{"messages":[],"n":1.5}"#, "n", "1.5"),
            (r#"{"messages":[],"stop":[1]}"#, "stop", "list of texts"),
            (r#"{"messages":[],"context":3}"#, "context", "infllm"),
        ] {
            let error = read::<ChatRequest>(body.as_bytes()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{error:?}");
            assert!(error.message.contains(words), "{error:?}");
            assert_eq!(error.code.as_deref(), Some("invalid_value"));
        }
        for body in [
            "",
            "{",
            "nonsense",
            "{\"messages\":[]} {}",
            "{\"model\":\"\u{1}\"}",
        ] {
            let error = read::<ChatRequest>(body.as_bytes()).unwrap_err();
            assert_eq!(
                error.code.as_deref(),
                Some("invalid_json"),
                "{body}: {error:?}"
            );
        }
        let error = read::<ChatRequest>(b"{\"messages\":[],\"model\":\"\xff\"}").unwrap_err();
        assert_eq!(error.code.as_deref(), Some("invalid_json"), "{error:?}");
        let error = read::<ChatRequest>(b"{}").unwrap_err();
        assert!(error.message.contains("messages"), "{error:?}");
    }

    #[test]
    fn impossible_values_are_named() {
        let user = r#""messages":[{"role":"user","content":"x"}]"#;
        for (fields, param) in [
            (r#""n":0"#, "n"),
            (r#""n":99"#, "n"),
            (r#""stop":["a",""]"#, "stop"),
            (r#""max_tokens":0"#, "max_tokens"),
            (r#""top_logprobs":2"#, "top_logprobs"),
            (r#""logprobs":true,"top_logprobs":21"#, "top_logprobs"),
            (r#""stream_options":{}"#, "stream_options"),
            (r#""temperature":-1"#, "temperature"),
            (r#""top_p":2"#, "top_p"),
            (r#""logit_bias":{"a":1}"#, "logit_bias"),
            (r#""context":"magic""#, "context"),
            (r#""decode":"magic""#, "decode"),
            (r#""rope":"magic""#, "rope"),
        ] {
            let request: ChatRequest = read(format!("{{{user},{fields}}}").as_bytes()).unwrap();
            let all = |request: &ChatRequest| {
                request.check()?;
                request.policy()?;
                request.rotary()?;
                request.sampling(&request.strategy()?, 0, request.wanted_logprobs())
            };
            let error = all(&request).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{fields}: {error:?}");
            assert!(error.message.contains(param), "{error:?}");
        }
        for (messages, param) in [
            ("[]", "messages"),
            (r#"[{"role":"wizard","content":""}]"#, "messages[0].role"),
            (r#"[{"role":"user"}]"#, "messages[0].content"),
            (
                r#"[{"role":"user","content":[{"type":"image_url"}]}]"#,
                "messages[0].content[0]",
            ),
        ] {
            let messages: Vec<ChatMessage> = serde_json::from_str(messages).unwrap();
            let error = turns(&messages).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{error:?}");
        }
    }

    #[test]
    fn answers_of_other_endpoints_are_read() {
        let reply: ChatReply = read(br#"{"choices":[{"message":{"role":"assistant","content":null,"refusal":null}}],"usage":{"prompt_tokens":1}}"#).unwrap();
        assert_eq!(reply.choices[0].message.text(), "");
        let chunk: ChatChunk = read(br#"{"id":"x","choices":[{"delta":{"content":"a","tool_calls":[]},"finish_reason":null}],"x":1}"#).unwrap();
        assert_eq!(chunk.choices[0].delta.content.as_deref(), Some("a"));
        let error: ErrorReply = read(br#"{"error":{"message":"no","code":400}}"#).unwrap();
        assert_eq!(error.error.code.as_deref(), Some("400"));
        let prompt: CompletionRequest = read(br#"{"prompt":[1,2,3]}"#).unwrap();
        assert_eq!(prompt.prompt, Prompt::Tokens(vec![1, 2, 3]));
        assert_eq!(
            read::<CompletionRequest>(br#"{"prompt":[]}"#)
                .unwrap()
                .prompt,
            Prompt::Texts(vec![])
        );
    }
}
