//! Any OpenAI-compatible server as a target: chat or plain completions through the client of `agents`, at the server's
//! pace and with patient repeats, so that one that is busy or restarts loses nothing. A server that counts tokens
//! decides what a length is, and one that echoes log-probabilities gives the likelihood of a text.

use super::pace::Paced;
use super::{Cost, Output, Target, local::stream};
use crate::count::Counter;
use crate::error::{EvalError, Result};
use crate::task::{Likelihood, Protocol, Sample, Truncation, Work};
use longspan_agents::chat::http::Patience;
use longspan_agents::chat::layers::{Retry, Retrying};
use longspan_agents::chat::model::{
    Ability, Call, ChatError, ChatModel, Input, Request, TokenCount,
};
use longspan_agents::chat::openai::{OpenAiConfig, OpenAiModel};
use longspan_agents::workflow::chunk::halves;
use longspan_agents::{Message, Role};
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
    /// Most requests that begin in a minute; None = no limit but what the server says.
    pub per_minute: Option<f64>,
}

/// See the module's text.
pub struct Endpoint {
    config: EndpointConfig,
    model: Arc<dyn ChatModel>,
    counter: ServerCounter,
    call: Call,
}

/// Tokens that are read beyond those whose likelihood is taken.
const SPARE: usize = 16;

/// Longest pause.
const LONGEST: Duration = Duration::from_secs(60);

/// Tokens as the server counts them, or as the client estimates them for a server that does not.
struct ServerCounter {
    /// None: estimate.
    server: Option<Arc<dyn ChatModel>>,
    overhead: usize,
}

impl ServerCounter {
    const ESTIMATE: ServerCounter = ServerCounter {
        server: None,
        overhead: 0,
    };

    /// Asks the server whether it counts, and what it puts around a text.
    fn new(server: Arc<dyn ChatModel>, chat: bool) -> Result<ServerCounter> {
        let bare = server.count_text("text").map_err(failed)?;
        if !bare.exact {
            return Ok(ServerCounter::ESTIMATE);
        }
        let framed = match chat {
            true => Input::Chat(vec![Message::new(Role::User, "text")]),
            false => Input::Text("text".into()),
        };
        let framed = server.count(&framed).map_err(failed)?;
        Ok(ServerCounter {
            server: Some(server),
            overhead: framed.tokens.saturating_sub(bare.tokens),
        })
    }
}

impl Counter for ServerCounter {
    fn count(&self, text: &str) -> Result<usize> {
        Ok(match &self.server {
            Some(server) => server.count_text(text).map_err(failed)?.tokens,
            None => TokenCount::estimate(text).tokens,
        })
    }

    fn cut<'t>(&self, text: &'t str, tokens: usize) -> Result<&'t str> {
        let edges: Vec<usize> = text
            .char_indices()
            .map(|(at, _)| at)
            .chain([text.len()])
            .collect();
        // The last edge whose beginning fits.
        let (mut low, mut high) = (0, edges.len() - 1);
        while low < high {
            let middle = (low + high).div_ceil(2);
            if self.count(&text[..edges[middle]])? <= tokens {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        Ok(&text[..edges[low]])
    }

    fn overhead(&self) -> usize {
        self.overhead
    }

    fn name(&self) -> String {
        match self.server {
            Some(_) => "the server's tokens".into(),
            None => "estimated tokens".into(),
        }
    }
}

/// What an endpoint's failure means for a run.
fn failed(error: ChatError) -> EvalError {
    match error {
        ChatError::Cancelled { .. } => EvalError::Interrupted { done: 0, total: 0 },
        error if error.retryable() => EvalError::Unreachable(error.to_string()),
        // No sample can be done with this key or at this address.
        error => EvalError::Input(error.to_string()),
    }
}

impl Endpoint {
    /// Asks nothing yet. `cancelled` is asked while a reply is awaited and between tries.
    ///
    /// # Errors
    /// An address that is none.
    pub fn new(
        config: EndpointConfig,
        cancelled: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Result<Endpoint> {
        let client = client(&config)?;
        Ok(Endpoint {
            model: layers(Arc::new(client), &config),
            counter: ServerCounter::ESTIMATE,
            config,
            call: Call::new(cancelled),
        })
    }

    /// Asks the server for its models first: a wrong address or key shows before samples are made, an empty model name
    /// stands for the only model there, and a server that counts tokens is taken at its word.
    ///
    /// # Errors
    /// [`EvalError::Unreachable`] if there is no answer, [`EvalError::Input`] for a key that is refused or a model that
    /// must be named.
    pub fn connect(
        mut config: EndpointConfig,
        cancelled: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Result<Endpoint> {
        let call = Call::new(cancelled);
        let client = client(&config)?.connect(&call).map_err(failed)?;
        config.model = client.card().name.clone();
        if config.model.is_empty() {
            return Err(EvalError::Input(format!(
                "{} does not list its models; name one with --model",
                config.url
            )));
        }
        let model = layers(Arc::new(client), &config);
        let counter = ServerCounter::new(Arc::clone(&model), config.chat)?;
        Ok(Endpoint {
            config,
            model,
            counter,
            call,
        })
    }

    /// The likelihood of a text's first tokens, in one pass.
    fn likelihood(&self, text: &str, protocol: Protocol, tokens: usize) -> Result<Output> {
        let mut output = Output {
            finish: "stop".into(),
            ..Output::default()
        };
        let mut refuse = |reason: &str| {
            output.error = Some(reason.into());
            Ok(std::mem::take(&mut output))
        };
        if protocol != Protocol::Position {
            return refuse("an endpoint reads a text in one pass; this protocol needs windows");
        }
        if self.counter.server.is_none() || !self.model.card().can(Ability::Score) {
            return refuse(
                "this endpoint does not say that it counts tokens and echoes their log-probabilities",
            );
        }
        // A text that ends within a word has another last token: more is read than is scored.
        let text = self.counter.cut(text, tokens + SPARE)?;
        let total = self.counter.count(text)?;
        let mut scores = match self.model.score("", text, &self.call) {
            Ok(scores) => scores,
            Err(error) => match failed(error) {
                EvalError::Input(reason) => return refuse(&reason),
                error => return Err(error),
            },
        };
        if scores.len() + 1 < total || scores.len() > total {
            return refuse(&format!(
                "found log-probabilities of {} tokens, expected {total}, or one fewer",
                scores.len()
            ));
        }
        if total < tokens {
            return refuse(&format!(
                "the document has {total} tokens, fewer than the {tokens} asked for"
            ));
        }
        let bos = scores.len() == total;
        let spare = scores.split_off(tokens.saturating_sub(usize::from(!bos)));
        let spare: usize = spare.iter().map(|score| score.token.len()).sum();
        let text = text.get(..text.len().saturating_sub(spare)).unwrap_or(text);
        if let Some(bad) = scores.iter().find(|score| !score.logprob.is_finite()) {
            return refuse(&format!(
                "the log-probability of {:?} is {}",
                bad.token, bad.logprob
            ));
        }
        let nll = (!bos).then_some(None).into_iter();
        output.likelihood = Some(Likelihood {
            nll: nll
                .chain(scores.iter().map(|score| Some((-score.logprob).max(0.0))))
                .collect(),
            bytes: scores.iter().map(|score| score.token.len()).sum(),
            words: text.split_whitespace().count(),
            bos,
        });
        output.tokens_in = tokens;
        Ok(output)
    }
}

fn client(config: &EndpointConfig) -> Result<OpenAiModel> {
    let mut client = OpenAiConfig::new(&config.url, &config.model);
    client.key = config.key.clone();
    client.stream = false;
    client.patience = Patience {
        first: config.timeout,
        idle: config.timeout,
        ..Patience::default()
    };
    OpenAiModel::new(client).map_err(|e| EvalError::Input(e.to_string()))
}

fn layers(client: Arc<dyn ChatModel>, config: &EndpointConfig) -> Arc<dyn ChatModel> {
    let retry = Retry {
        tries: config.tries,
        pause: config.pause,
        longest: LONGEST,
        ..Retry::default()
    };
    let paced = Paced::new(client, config.per_minute, LONGEST);
    Arc::new(Retrying::new(Arc::new(paced), retry))
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
        &self.counter
    }

    fn run(&self, sample: &Sample, seed: u64) -> Result<Output> {
        let mut output = Output::default();
        let mut text = sample.prompt.text();
        let decode = match &sample.work {
            Work::Generate(decode) => decode,
            Work::Likelihood { protocol, tokens } => {
                return self.likelihood(&text, *protocol, *tokens);
            }
            Work::Search { .. } => {
                output.error = Some(super::search::NO_SEARCH.into());
                return Ok(output);
            }
        };
        if let Truncation::Middle(most) = sample.prompt.truncation
            && self.counter.count(&text)? > most
        {
            let mut count = |text: &str| self.counter.count(text);
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
            Err(error @ (ChatError::Auth(_) | ChatError::NotFound(_))) => {
                return Err(failed(error));
            }
            Err(error) => match failed(error) {
                // Of this sample alone.
                EvalError::Input(reason) => output.error = Some(reason),
                error => return Err(error),
            },
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
                let cut = ServerCounter::ESTIMATE.cut(text, tokens).unwrap();
                assert!(ServerCounter::ESTIMATE.count(cut).unwrap() <= tokens);
                let longer = text[cut.len()..].chars().next();
                if let Some(next) = longer {
                    let longer = format!("{cut}{next}");
                    assert!(ServerCounter::ESTIMATE.count(&longer).unwrap() > tokens);
                }
            }
        }
    }
}
