//! `POST /v1/chat/completions`

use super::{
    Answer, ErrorBody, MAX_N, MAX_STOPS, OneOrMany, Result, Shared, Spec, StreamOptions,
    TokenLogprob, check_top, generating,
};
use crate::chat::template::{Message, Role};
use longspan_infer::context::ContextConfig;
use longspan_infer::decode::{DecodeConfig, SamplingConfig};
use longspan_nn::position::RopeOverride;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

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

/// Log probabilities of a chat answer or of a piece of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChatLogprobs {
    /// Token by token.
    #[serde(default)]
    pub content: Option<Vec<TokenLogprob>>,
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

/// The body of a chat's answer.
pub type ChatReply = Answer<ChatChoice>;

/// One event of a chat's stream.
pub type ChatChunk = Answer<ChunkChoice>;
