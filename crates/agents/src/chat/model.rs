//! The seam under every workflow, memory and benchmark: one request of messages in, one reply out, from a local
//! engine, an OpenAI-compatible endpoint or a script.
//!
//! Calls block. They stop early by [`Call::cancelled`], by [`Call::deadline`], or when the text's reader breaks.
//! A missing ability is the error [`ChatError::Unsupported`]; nothing is emulated silently. Layers (retry, budget,
//! cache, trace) wrap a model and are models themselves: see [`super::layers`].

use super::local::{Finish, ModelError};
use super::template::{Message, Role};
use super::wire::TokenLogprob;
use longspan_infer::decode::{DecodeConfig, SamplingConfig};
use longspan_infer::key_context::Distribution;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Something a model may be able to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ability {
    /// [`ChatModel::reply`] to messages.
    Chat,
    /// [`ChatModel::reply`] to a plain text: no template.
    Complete,
    /// [`Reply::logprobs`].
    Logprobs,
    /// [`ChatModel::score`].
    Score,
    /// [`ChatModel::embed`].
    Embed,
    /// [`Request::answer_prefix`] after messages.
    AnswerPrefix,
    /// Equal seeds give equal texts at a temperature above 0.
    Seed,
    /// [`DecodeConfig`]s other than plain.
    Decode,
    /// [`ChatModel::prepare`] saves time later.
    Prepare,
    /// [`ChatModel::prepare`] reads while another call writes: a chunk ahead of its turn costs little.
    ReadAhead,
}

impl fmt::Display for Ability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Ability::Chat => "chat",
            Ability::Complete => "completion of plain text",
            Ability::Logprobs => "log probabilities",
            Ability::Score => "scores of a given text",
            Ability::Embed => "embeddings",
            Ability::AnswerPrefix => "a given start of the answer",
            Ability::Seed => "seeds",
            Ability::Decode => "decoding strategies",
            Ability::Prepare => "prepared beginnings",
            Ability::ReadAhead => "reading ahead while it writes",
        };
        f.write_str(text)
    }
}

/// What a model is and can do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// The name people know.
    pub name: String,
    /// All that decides replies: weights, tokenizer, template, policy; or address and name.
    pub fingerprint: String,
    /// Most tokens of a prompt and its reply; None if not known or not limited.
    pub window: Option<usize>,
    /// What it can do.
    pub abilities: Vec<Ability>,
    /// Components of an embedding.
    pub embedding_dim: Option<usize>,
}

impl Card {
    /// Whether it can.
    pub fn can(&self, ability: Ability) -> bool {
        self.abilities.contains(&ability)
    }

    /// # Errors
    /// [`ChatError::Unsupported`] if it cannot.
    pub fn need(&self, ability: Ability) -> Result<(), ChatError> {
        if self.can(ability) {
            return Ok(());
        }
        Err(ChatError::Unsupported {
            model: self.name.clone(),
            ability,
        })
    }
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Input {
    /// A conversation, put into the model's template.
    Chat(Vec<Message>),
    /// A plain text to continue.
    Text(String),
}

impl Input {
    /// The texts without a template, for estimates and traces.
    pub fn plain(&self) -> String {
        match self {
            Input::Text(text) => text.clone(),
            Input::Chat(messages) => messages
                .iter()
                .map(|message| message.content.as_str())
                .collect::<Vec<_>>()
                .join("\n"),
        }
    }
}

/// One request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// What is asked.
    pub input: Input,
    /// The reply goes on from this text, which is not part of it; empty by default.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub answer_prefix: String,
    /// Most tokens of the reply.
    pub max_tokens: usize,
    /// Texts that end the reply; they are not part of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// How tokens are drawn; `logprobs` asks for [`Reply::logprobs`].
    pub sampling: SamplingConfig,
    /// The strategy.
    #[serde(default)]
    pub decode: DecodeConfig,
}

impl Request {
    /// A greedy request of at most 1024 tokens.
    pub fn new(input: Input) -> Request {
        Request {
            input,
            answer_prefix: String::new(),
            max_tokens: 1024,
            stop: Vec::new(),
            sampling: SamplingConfig {
                temperature: 0.0,
                ..SamplingConfig::default()
            },
            decode: DecodeConfig::Plain,
        }
    }

    /// A conversation of one message.
    pub fn user(text: impl Into<String>) -> Request {
        Request::chat(vec![Message::new(Role::User, text)])
    }

    /// A conversation.
    pub fn chat(messages: Vec<Message>) -> Request {
        Request::new(Input::Chat(messages))
    }

    /// A plain text to continue.
    pub fn text(text: impl Into<String>) -> Request {
        Request::new(Input::Text(text.into()))
    }

    /// Most tokens of the reply.
    pub fn max_tokens(mut self, tokens: usize) -> Request {
        self.max_tokens = tokens;
        self
    }

    /// 0 takes the likeliest token. The seed matters above 0 only.
    pub fn temperature(mut self, temperature: f32, seed: u64) -> Request {
        (self.sampling.temperature, self.sampling.seed) = (temperature, seed);
        self
    }

    /// Log probabilities of the tokens written, and of this many likeliest ones.
    pub fn logprobs(mut self, top: usize) -> Request {
        self.sampling.logprobs = Some(top);
        self
    }

    /// True if equal requests to equal models have equal replies.
    pub fn deterministic(&self, card: &Card) -> bool {
        self.sampling.temperature == 0.0 || card.can(Ability::Seed)
    }
}

/// Tokens of a request and its reply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Of the prompt, template included.
    pub prompt: usize,
    /// Of those, how many were there already.
    pub cached: usize,
    /// Of the reply, with the token that ended it.
    pub completion: usize,
    /// Counted by the model's own tokenizer, not estimated.
    pub exact: bool,
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Usage) {
        self.prompt += other.prompt;
        self.cached += other.cached;
        self.completion += other.completion;
        self.exact &= other.exact;
    }
}

/// One reply.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The text, without stop texts and special tokens.
    pub text: String,
    /// Why it ended: stop or length. A cancelled reply is [`ChatError::Cancelled`].
    pub finish: Finish,
    /// Token by token, if asked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<TokenLogprob>,
    /// Tokens.
    pub usage: Usage,
    /// Seconds until the first piece of text.
    #[serde(default)]
    pub first_s: f64,
    /// Seconds in all.
    #[serde(default)]
    pub total_s: f64,
    /// It came from the cache: nothing was computed.
    #[serde(default)]
    pub from_cache: bool,
}

/// Tokens of a text or a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenCount {
    /// How many.
    pub tokens: usize,
    /// By the model's own tokenizer and template; an estimate if false.
    pub exact: bool,
}

impl TokenCount {
    /// An estimate for models whose tokenizer is not known: a token for 3.3 bytes, or for a Chinese, Japanese or
    /// Korean character.
    pub fn estimate(text: &str) -> TokenCount {
        let (mut wide, mut bytes) = (0, 0);
        for c in text.chars() {
            match c {
                '\u{2E80}'..='\u{9FFF}'
                | '\u{AC00}'..='\u{D7AF}'
                | '\u{F900}'..='\u{FAFF}'
                | '\u{FF00}'..='\u{FFEF}'
                | '\u{20000}'..='\u{3FFFF}' => wide += 1,
                _ => bytes += c.len_utf8(),
            }
        }
        TokenCount {
            tokens: wide + (bytes as f64 / 3.3).ceil() as usize,
            exact: false,
        }
    }

    /// What to plan with: estimates get a tenth more.
    pub fn planned(self) -> usize {
        match self.exact {
            true => self.tokens,
            false => self.tokens + self.tokens.div_ceil(10),
        }
    }
}

/// A token of a given text and how likely the model found it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenScore {
    /// Its text; bytes that are not UTF-8 are U+FFFD.
    pub token: String,
    /// Natural logarithm of its probability after all before it.
    pub logprob: f32,
}

/// Embeddings of some texts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Embeddings {
    /// One per text, all of one length.
    pub vectors: Vec<Vec<f32>>,
    /// Tokens read.
    pub tokens: usize,
}

/// What surrounds a call: who asks, and when to stop. Cheap to clone; workflows hand it down.
#[derive(Clone)]
pub struct Call {
    stop: Arc<dyn Fn() -> bool + Send + Sync>,
    /// No call goes on past this moment.
    pub deadline: Option<Instant>,
    /// For traces: the workflow.
    pub workflow: String,
    /// For traces: the step of it.
    pub step: String,
}

impl Default for Call {
    fn default() -> Self {
        Call::new(|| false)
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Call({} {})", self.workflow, self.step)
    }
}

impl Call {
    /// `stop` is asked often, from any thread; once it says true, it should stay true.
    pub fn new(stop: impl Fn() -> bool + Send + Sync + 'static) -> Call {
        Call {
            stop: Arc::new(stop),
            deadline: None,
            workflow: String::new(),
            step: String::new(),
        }
    }

    /// The same for a step of a workflow.
    pub fn step(&self, workflow: &str, step: impl Into<String>) -> Call {
        Call {
            workflow: workflow.into(),
            step: step.into(),
            ..self.clone()
        }
    }

    /// Ends at the latest after this time.
    pub fn within(mut self, time: Duration) -> Call {
        let end = Instant::now() + time;
        self.deadline = Some(self.deadline.map_or(end, |at| at.min(end)));
        self
    }

    /// True if the caller asked to stop.
    pub fn cancelled(&self) -> bool {
        (self.stop)()
    }

    /// # Errors
    /// [`ChatError::Cancelled`] or [`ChatError::Timeout`], with the text so far.
    pub fn check(&self, partial: &str) -> Result<(), ChatError> {
        if self.cancelled() {
            return Err(ChatError::Cancelled {
                partial: partial.into(),
            });
        }
        if self.deadline.is_some_and(|at| Instant::now() >= at) {
            return Err(ChatError::Timeout {
                message: "the deadline has passed".into(),
                partial: partial.into(),
            });
        }
        Ok(())
    }

    /// Sleeps in short steps, so that a stop is noticed.
    ///
    /// # Errors
    /// As [`Call::check`].
    pub fn sleep(&self, time: Duration) -> Result<(), ChatError> {
        let end = Instant::now() + time;
        loop {
            self.check("")?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
    }
}

/// Why there is no reply.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// Too many requests; the server may say how long to wait.
    #[error("{message}")]
    RateLimited {
        /// What the server said.
        message: String,
        /// Its Retry-After.
        after: Option<Duration>,
    },
    /// The server is busy or failing.
    #[error("{message}")]
    Overloaded {
        /// What the server said.
        message: String,
        /// Its Retry-After.
        after: Option<Duration>,
    },
    /// No answer in time.
    #[error("{message}")]
    Timeout {
        /// Which limit.
        message: String,
        /// The text so far.
        partial: String,
    },
    /// The connection failed.
    #[error("{message}")]
    Network {
        /// How.
        message: String,
        /// The text so far.
        partial: String,
    },
    /// The key is missing or wrong, or may not do this.
    #[error("{0}")]
    Auth(String),
    /// Prompt and reply are more than the model takes.
    #[error("the prompt and its reply need {tokens} tokens, the model takes {max}")]
    ContextOverflow {
        /// Tokens needed, 0 if the server did not say.
        tokens: usize,
        /// Tokens there are.
        max: usize,
    },
    /// The server's filter refused.
    #[error("{0}")]
    ContentFilter(String),
    /// There is no such address or model.
    #[error("{0}")]
    NotFound(String),
    /// The request cannot be meant.
    #[error("{0}")]
    BadRequest(String),
    /// The model cannot do this.
    #[error("{model} gives no {ability}")]
    Unsupported {
        /// Which model.
        model: String,
        /// What it cannot.
        ability: Ability,
    },
    /// A limit of the budget is reached. The text holds the ledger.
    #[error("{0}")]
    Budget(String),
    /// The caller asked to stop.
    #[error("stopped by the caller")]
    Cancelled {
        /// The text so far.
        partial: String,
    },
    /// The answer is not in the dialect.
    #[error("{0}")]
    Protocol(String),
    /// A cache, trace or script could not be read or written, or does not hold the request.
    #[error("{0}")]
    Store(String),
    /// The local engine failed.
    #[error(transparent)]
    Local(#[from] ModelError),
}

impl ChatError {
    /// True if trying again later may help.
    pub fn retryable(&self) -> bool {
        matches!(
            self,
            ChatError::RateLimited { .. }
                | ChatError::Overloaded { .. }
                | ChatError::Timeout { .. }
                | ChatError::Network { .. }
        )
    }

    /// What was written before it broke off.
    pub fn partial(&self) -> &str {
        match self {
            ChatError::Timeout { partial, .. }
            | ChatError::Network { partial, .. }
            | ChatError::Cancelled { partial } => partial,
            _ => "",
        }
    }
}

/// Result of calls.
pub type Result<T, E = ChatError> = std::result::Result<T, E>;

/// Takes pieces of text as they are written; breaking stops the reply. Pieces may be empty while a model works.
pub type OnText<'a> = &'a mut dyn FnMut(&str) -> ControlFlow<()>;

/// For callers that wait for the whole text.
pub fn ignore(_: &str) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// See the module's text.
pub trait ChatModel: Send + Sync {
    /// What it is and can do.
    fn card(&self) -> &Card;

    /// Tokens of an input, template and the start of the answer's turn included.
    ///
    /// # Errors
    /// Messages that the template refuses.
    fn count(&self, input: &Input) -> Result<TokenCount>;

    /// Tokens of a piece of text inside a prompt: no template, no start token. Counts of pieces may add up to a
    /// token or two more or less than the count of the whole.
    ///
    /// # Errors
    /// Text that the tokenizer cannot take.
    fn count_text(&self, text: &str) -> Result<TokenCount>;

    /// [`ChatModel::count_text`] of many pieces, in one exchange where a server counts.
    ///
    /// # Errors
    /// As [`ChatModel::count_text`].
    fn count_texts(&self, texts: &[&str]) -> Result<Vec<TokenCount>> {
        texts.iter().map(|text| self.count_text(text)).collect()
    }

    /// One reply. The pieces handed to `on_text` add up to [`Reply::text`]. A request that cannot fit
    /// is refused before it is sent.
    ///
    /// # Errors
    /// See [`ChatError`].
    fn reply(&self, request: &Request, call: &Call, on_text: OnText<'_>) -> Result<Reply>;

    /// How likely the model finds each token of `continuation` after `prompt`, both plain text.
    ///
    /// # Errors
    /// See [`ChatError`]; [`ChatError::Unsupported`] unless the model says otherwise.
    fn score(&self, prompt: &str, continuation: &str, call: &Call) -> Result<Vec<TokenScore>> {
        let _ = (prompt, continuation, call);
        self.card().need(Ability::Score)?;
        Ok(Vec::new())
    }

    /// Embeddings of texts.
    ///
    /// # Errors
    /// See [`ChatError`]; [`ChatError::Unsupported`] unless the model says otherwise.
    fn embed(&self, texts: &[String], call: &Call) -> Result<Embeddings> {
        let _ = (texts, call);
        self.card().need(Ability::Embed)?;
        Ok(Embeddings::default())
    }

    /// The distribution of the reply's first token. By default the likeliest 20 tokens of a reply of one.
    ///
    /// # Errors
    /// See [`ChatError`].
    fn next_token(&self, request: &Request, call: &Call) -> Result<Distribution> {
        self.card().need(Ability::Logprobs)?;
        let mut one = request.clone().max_tokens(1).logprobs(20);
        one.stop.clear();
        let reply = self.reply(&one, call, &mut ignore)?;
        let token = reply.logprobs.first().ok_or_else(|| {
            ChatError::Protocol(format!(
                "{}: asked for log probabilities, found none",
                self.card().name
            ))
        })?;
        let top = token.top_logprobs.iter().map(|top| top.logprob).collect();
        Ok(Distribution::Top(top))
    }

    /// Reads the common beginning of requests to come, where that saves time later; else does nothing.
    /// `input` is a conversation whose last message is only begun.
    ///
    /// # Errors
    /// See [`ChatError`].
    fn prepare(&self, input: &Input, call: &Call) -> Result<()> {
        let _ = (input, call);
        Ok(())
    }

    /// # Errors
    /// [`ChatError::ContextOverflow`] if the prompt and the longest reply exceed the window.
    fn fit(&self, request: &Request) -> Result<TokenCount> {
        let mut count = self.count(&request.input)?;
        if !request.answer_prefix.is_empty() {
            count.tokens += self.count_text(&request.answer_prefix)?.tokens;
        }
        let tokens = count.tokens + request.max_tokens;
        match self.card().window {
            Some(max) if tokens > max => Err(ChatError::ContextOverflow { tokens, max }),
            _ => Ok(count),
        }
    }

    /// The whole text of a reply.
    ///
    /// # Errors
    /// As [`ChatModel::reply`].
    fn ask(&self, request: &Request, call: &Call) -> Result<Reply> {
        self.reply(request, call, &mut ignore)
    }
}
