//! Tokens of texts and conversations: by a tokenizer of one's own, by the server's route, or estimated.

use super::{ChatError, Input, OpenAiModel, Result, TokenCount};
use crate::chat::model::Call;
use crate::chat::wire;
use longspan_data::tokenize::Special;
use serde::Serialize;

/// Who counts tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Counting {
    /// Nobody: they are estimated.
    Estimate,
    /// A server of another make that has a tokenize route: texts are exact, conversations nearly.
    Texts,
    /// A server of our make: texts, many at a time, and conversations.
    All,
}

/// Texts counted in one exchange, and their bytes, at most.
const COUNTED_AT_ONCE: (usize, usize) = (4096, 4 << 20);

impl OpenAiModel {
    fn tokenize<T: Serialize>(&self, request: &T) -> Result<wire::TokenizeReply> {
        let url = self.url("tokenize");
        let body = self.json(&url, request)?;
        self.parse(&url, &self.send("tokenize", Some(body), &Call::default())?)
    }

    /// Tokens of a text by the route of another make, whose field is `prompt` or `content`.
    pub(super) fn tokens_there(&self, text: &str) -> Result<usize> {
        let reply = self.tokenize(&serde_json::json!({
            "model": self.config.model, "prompt": text, "content": text, "add_special_tokens": false,
        }))?;
        match reply.count.max(reply.tokens.len()) {
            0 if !text.is_empty() => Err(ChatError::Protocol(format!(
                "{}: no tokens of {} bytes of text",
                self.url("tokenize"),
                text.len()
            ))),
            tokens => Ok(tokens),
        }
    }

    fn exact(tokens: usize) -> TokenCount {
        TokenCount {
            tokens,
            exact: true,
        }
    }

    /// Tokens of a conversation in its template, or of a text.
    pub(super) fn tokens_of_input(&self, input: &Input) -> Result<TokenCount> {
        if self.counting == Counting::All {
            let mut request = wire::TokenizeRequest {
                model: self.config.model.clone(),
                ..wire::TokenizeRequest::default()
            };
            match input {
                Input::Chat(messages) => {
                    request.messages = Some(messages.iter().map(wire::ChatMessage::from).collect());
                }
                Input::Text(text) => request.prompt = Some(text.clone()),
            }
            return Ok(Self::exact(self.tokenize(&request)?.count));
        }
        let mut count = self.tokens_of(&input.plain())?;
        if let Input::Chat(messages) = input {
            // Templates put a few tokens around every message.
            count.tokens += 6 * messages.len() + 4;
        }
        count.exact = false;
        Ok(count)
    }

    /// Tokens of a text alone.
    pub(super) fn tokens_of(&self, text: &str) -> Result<TokenCount> {
        match (&self.config.tokenizer, self.counting) {
            (Some(tokenizer), _) => {
                let tokens = tokenizer.encode(text, Special::None);
                Ok(Self::exact(
                    tokens.map_err(crate::chat::local::ModelError::from)?.len(),
                ))
            }
            _ if text.is_empty() => Ok(Self::exact(0)),
            (None, Counting::All) => Ok(self.tokens_of_each(&[text])?[0]),
            (None, Counting::Texts) => Ok(Self::exact(self.tokens_there(text)?)),
            (None, Counting::Estimate) => Ok(TokenCount::estimate(text)),
        }
    }

    /// Tokens of many texts, in as few exchanges as the server allows.
    pub(super) fn tokens_of_each(&self, texts: &[&str]) -> Result<Vec<TokenCount>> {
        if self.counting == Counting::Estimate || self.config.tokenizer.is_some() {
            return texts.iter().map(|text| self.tokens_of(text)).collect();
        }
        if self.counting == Counting::Texts {
            // One exchange a piece would take long where pieces are sentences: a share of the whole's tokens serves,
            // and whoever packs pieces counts what came of it once more.
            if texts.len() <= 4 {
                return texts.iter().map(|text| self.tokens_of(text)).collect();
            }
            let bytes = texts.iter().map(|text| text.len()).sum::<usize>().max(1);
            let whole = self.tokens_of(&texts.concat())?.tokens;
            let share = |text: &&str| TokenCount {
                tokens: (text.len() * whole).div_ceil(bytes),
                exact: true,
            };
            return Ok(texts.iter().map(share).collect());
        }
        let mut counts = Vec::with_capacity(texts.len());
        while counts.len() < texts.len() {
            let mut bytes = 0;
            let next = texts[counts.len()..].iter().take(COUNTED_AT_ONCE.0);
            let next = next.take_while(|text| {
                bytes += text.len();
                bytes <= COUNTED_AT_ONCE.1 || bytes == text.len()
            });
            let prompts: Vec<String> = next.map(|text| text.to_string()).collect();
            let asked = prompts.len();
            let reply = self.tokenize(&wire::TokenizeRequest {
                model: self.config.model.clone(),
                prompts: Some(prompts),
                add_special_tokens: Some(false),
                ..wire::TokenizeRequest::default()
            })?;
            let found = reply.counts.unwrap_or_default();
            if found.len() != asked {
                return Err(ChatError::Protocol(format!(
                    "{}: {} counts for {asked} texts",
                    self.url("tokenize"),
                    found.len()
                )));
            }
            counts.extend(found.into_iter().map(Self::exact));
        }
        Ok(counts)
    }
}
