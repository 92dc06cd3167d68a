//! Any OpenAI-compatible server as a target: chat or plain completions through the client of `agents`, with patient
//! repeats, so that a server that is busy or restarts loses nothing.

use super::{Cost, Output, Target, local::stream};
use crate::count::Counter;
use crate::error::{EvalError, Result};
use crate::task::{Sample, Truncation, Work};
use longspan_agents::chat::http::Patience;
use longspan_agents::chat::layers::{Retry, Retrying};
use longspan_agents::chat::model::{Call, ChatError, ChatModel, Request, TokenCount};
use longspan_agents::chat::openai::{OpenAiConfig, OpenAiModel};
use longspan_agents::workflow::chunk::halves;
use std::sync::Arc;
use std::time::Duration;

/// Which server and how patiently.
#[derive(Clone, Debug)]
pub struct EndpointConfig {
    /// Base address, up to and without `/chat/completions`.
    pub url: String,
    /// The model's name there.
    pub model: String,
    /// Sent as a bearer token.
    pub key: Option<String>,
    /// Chat completions, but for samples whose prompt is to be read raw; else plain completions of the text.
    pub chat: bool,
    /// Longest wait for a reply.
    pub timeout: Duration,
    /// Tries per sample.
    pub tries: u32,
    /// First pause between tries; doubles up to a minute.
    pub pause: Duration,
}

/// See the module's text.
pub struct Endpoint {
    config: EndpointConfig,
    model: Retrying,
    call: Call,
}

/// Longest pause.
const LONGEST: Duration = Duration::from_secs(60);

/// Tokens as the client estimates them for a server whose tokenizer it does not have.
struct Estimate;

impl Counter for Estimate {
    fn count(&self, text: &str) -> Result<usize> {
        Ok(TokenCount::estimate(text).tokens)
    }

    fn cut<'t>(&self, text: &'t str, tokens: usize) -> Result<&'t str> {
        let edges: Vec<usize> = text
            .char_indices()
            .map(|(at, _)| at)
            .chain([text.len()])
            .collect();
        let fit = edges.partition_point(|&at| TokenCount::estimate(&text[..at]).tokens <= tokens);
        Ok(&text[..edges[fit.saturating_sub(1)]])
    }

    fn name(&self) -> String {
        "estimated tokens".into()
    }
}

impl Endpoint {
    /// `cancelled` is asked while a reply is awaited and between tries.
    ///
    /// # Errors
    /// An address that is none.
    pub fn new(
        config: EndpointConfig,
        cancelled: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Result<Endpoint> {
        let mut client = OpenAiConfig::new(&config.url, &config.model);
        client.key = config.key.clone();
        client.stream = false;
        client.patience = Patience {
            first: config.timeout,
            idle: config.timeout,
            ..Patience::default()
        };
        let client = OpenAiModel::new(client).map_err(|e| EvalError::Input(e.to_string()))?;
        let retry = Retry {
            tries: config.tries,
            pause: config.pause,
            longest: LONGEST,
            ..Retry::default()
        };
        Ok(Endpoint {
            config,
            model: Retrying::new(Arc::new(client), retry),
            call: Call::new(cancelled),
        })
    }
}

impl Target for Endpoint {
    fn model(&self) -> String {
        self.config.model.clone()
    }

    fn identity(&self) -> Option<String> {
        // What a name stands for on a server can change, but within a run it must not be asked twice.
        Some(format!(
            "{} {} chat {} raw as text",
            self.config.url, self.config.model, self.config.chat
        ))
    }

    fn counter(&self) -> &dyn Counter {
        &Estimate
    }

    fn run(&self, sample: &Sample, seed: u64) -> Result<Output> {
        let mut output = Output::default();
        let Work::Generate(decode) = &sample.work else {
            output.error = Some("a completions endpoint gives no likelihoods of a text".into());
            return Ok(output);
        };
        let mut text = sample.prompt.text();
        if let Truncation::Middle(most) = sample.prompt.truncation {
            let mut count = |text: &str| Ok::<_, EvalError>(TokenCount::estimate(text).tokens);
            let cut = halves(&text, most, "", &mut count)?;
            output.truncated = cut.len() < text.len();
            text = cut;
        }
        let mut request = match self.config.chat && !sample.prompt.raw {
            true => Request::user(text),
            false => Request::text(text),
        };
        request.max_tokens = decode.max_new;
        request.stop = decode.stop.clone();
        request.sampling.seed = stream(seed, &sample.id);
        match self.model.ask(&request, &self.call) {
            Ok(reply) => {
                output.finish = match reply.finish {
                    longspan_agents::Finish::Length => "length",
                    _ => "stop",
                }
                .into();
                output.text = reply.text;
                output.tokens_in = reply.usage.prompt;
                output.tokens_out = reply.usage.completion;
                output.cost = Cost {
                    decode_s: reply.total_s,
                    cached_tokens: reply.usage.cached,
                    ..Cost::default()
                };
            }
            Err(ChatError::Cancelled { .. }) => {
                return Err(EvalError::Interrupted { done: 0, total: 0 });
            }
            // No sample can be done with this key or at this address.
            Err(error @ (ChatError::Auth(_) | ChatError::NotFound(_))) => {
                return Err(EvalError::Input(error.to_string()));
            }
            Err(error) if error.retryable() => {
                return Err(EvalError::Unreachable(error.to_string()));
            }
            Err(error) => output.error = Some(error.to_string()),
        }
        Ok(output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn estimates_cut_where_they_count() {
        for text in ["", "plain words of text", "中文 and English", "é€😀"] {
            for tokens in 0..8 {
                let cut = Estimate.cut(text, tokens).unwrap();
                assert!(Estimate.count(cut).unwrap() <= tokens);
                let longer = text[cut.len()..].chars().next();
                if let Some(next) = longer {
                    let longer = format!("{cut}{next}");
                    assert!(Estimate.count(&longer).unwrap() > tokens);
                }
            }
        }
    }
}
