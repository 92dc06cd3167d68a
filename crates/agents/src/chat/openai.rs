//! Any OpenAI-compatible server behind the chat seam: conversations, plain completions, scores by echo, embeddings,
//! streamed, with the fields that our own server adds where it is one.
//!
//! One exchange per call; [`super::layers::Retrying`] repeats what failed.

mod counting;

use super::http::{Client, Head, Patience};
use super::local::Finish;
use super::model::{
    Ability, Call, Card, ChatError, ChatModel, Embeddings, Input, OnText, Reply, Request, Result,
    TokenCount, TokenScore, Usage,
};
use super::sse::SseParser;
use super::wire::{self, TokenLogprob, TopLogprob};
use counting::Counting;
use longspan_data::tokenize::Tokenizer;
use longspan_infer::decode::{DecodeConfig, SamplingConfig};
use serde::Serialize;
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::Instant;

/// Which server and how to talk with it.
#[derive(Clone)]
pub struct OpenAiConfig {
    /// Base address, up to and without `/chat/completions`: `http://localhost:8000/v1`.
    pub url: String,
    /// The model's name there; empty for the only one that is served.
    pub model: String,
    /// Sent as a bearer token; never part of errors, traces or fingerprints.
    pub key: Option<String>,
    /// Ask for events: text comes as it is written, and a stop reaches the server soon.
    pub stream: bool,
    /// Most tokens of prompt and reply, where the server does not say.
    pub window: Option<usize>,
    /// Counts tokens where the server does not.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Waiting times.
    pub patience: Patience,
    /// Most bytes of an answer.
    pub max_bytes: usize,
    /// Put into every body, for fields that only this server knows.
    pub extra: Map<String, Value>,
}

impl OpenAiConfig {
    /// The defaults for this address and model.
    pub fn new(url: &str, model: &str) -> OpenAiConfig {
        OpenAiConfig {
            url: url.into(),
            model: model.into(),
            key: None,
            stream: true,
            window: None,
            tokenizer: None,
            patience: Patience::default(),
            max_bytes: 64 << 20,
            extra: Map::new(),
        }
    }
}

/// See the module's text.
pub struct OpenAiModel {
    config: OpenAiConfig,
    client: Client,
    card: Card,
    counting: Counting,
}

/// What a stream or a whole answer adds up to.
#[derive(Default)]
struct Folded {
    text: String,
    finish: Option<String>,
    logprobs: Vec<TokenLogprob>,
    usage: Option<wire::Usage>,
    first_s: Option<f64>,
    choices: usize,
}

impl OpenAiModel {
    /// Sends nothing yet.
    ///
    /// # Errors
    /// An address that is none.
    pub fn new(mut config: OpenAiConfig) -> Result<OpenAiModel> {
        if !config.url.starts_with("http://") && !config.url.starts_with("https://") {
            return Err(ChatError::BadRequest(format!(
                "endpoint {:?}: expected http://... or https://...",
                config.url
            )));
        }
        config.url = config.url.trim_end_matches('/').into();
        let headers = config.key.iter();
        let headers = headers.map(|key| ("authorization".to_string(), format!("Bearer {key}")));
        let client = Client::new(config.patience, headers.collect());
        // What the dialect has. A server that lacks a part of it says so when asked for it.
        let abilities = vec![
            Ability::Chat,
            Ability::Complete,
            Ability::Logprobs,
            Ability::Score,
            Ability::Embed,
            Ability::Seed,
        ];
        let card = Card {
            name: config.model.clone(),
            fingerprint: format!("{} {}", config.url, config.model),
            window: config.window,
            abilities,
            embedding_dim: None,
        };
        Ok(OpenAiModel {
            config,
            client,
            card,
            counting: Counting::Estimate,
        })
    }

    /// Asks the server for its models and takes over what it says of this one. A server without that route is
    /// taken as it is.
    ///
    /// # Errors
    /// No connection, a key that is refused, or a model that is not there.
    pub fn connect(mut self, call: &Call) -> Result<OpenAiModel> {
        let body = match self.send("models", None, call) {
            Ok(body) => body,
            Err(ChatError::NotFound(_) | ChatError::BadRequest(_) | ChatError::Protocol(_)) => {
                return Ok(self);
            }
            Err(error) => return Err(error),
        };
        let Ok(list) = wire::read::<wire::ModelList>(&body) else {
            return Ok(self);
        };
        if self.config.model.is_empty() {
            let [only] = &list.data[..] else {
                let names: Vec<&str> = list.data.iter().map(|info| info.id.as_str()).collect();
                return Err(ChatError::BadRequest(format!(
                    "{}: no model is named, and {} are served ({}); name one",
                    self.config.url,
                    names.len(),
                    names.join(", ")
                )));
            };
            self.config.model = only.id.clone();
            self.card.name = only.id.clone();
        }
        let named = |info: &&wire::ModelInfo| {
            info.id == self.config.model || info.aliases.contains(&self.config.model)
        };
        let Some(info) = list.data.iter().find(named) else {
            // Gateways serve more names than they list.
            return Ok(self);
        };
        let to_usize = |tokens: u64| usize::try_from(tokens).unwrap_or(usize::MAX);
        let window = info.max_model_len.or(info.context_window).map(to_usize);
        self.card.window = self.config.window.or(window);
        self.card.embedding_dim = info.embedding_dim;
        self.card.fingerprint = format!(
            "{} {} {}",
            self.config.url,
            self.config.model,
            info.fingerprint.as_deref().unwrap_or_default()
        );
        if !info.abilities.is_empty() {
            let has = |name: &str| info.abilities.iter().any(|ability| ability == name);
            let known = [
                ("chat", Ability::Chat),
                ("complete", Ability::Complete),
                ("logprobs", Ability::Logprobs),
                ("echo", Ability::Score),
                ("embed", Ability::Embed),
            ];
            let mut abilities: Vec<Ability> = known
                .iter()
                .filter(|(name, _)| has(name))
                .map(|(_, ability)| *ability)
                .collect();
            if has("chat") || has("complete") {
                // Only our own server lists abilities, and it has these wherever it writes.
                abilities.extend([Ability::Seed, Ability::Decode]);
            }
            if has("read_ahead") {
                abilities.extend([Ability::Prepare, Ability::ReadAhead]);
            }
            self.card.abilities = abilities;
            if has("tokenize") {
                self.counting = Counting::All;
            }
        } else if self.config.tokenizer.is_none() && self.tokens_there("a b c").is_ok() {
            self.counting = Counting::Texts;
        }
        Ok(self)
    }

    fn url(&self, path: &str) -> String {
        // The route that counts stands beside the versioned ones.
        match path {
            "tokenize" => {
                let root = self
                    .config
                    .url
                    .strip_suffix("/v1")
                    .unwrap_or(&self.config.url);
                format!("{root}/tokenize")
            }
            path => format!("{}/{path}", self.config.url),
        }
    }

    /// A whole answer.
    fn send(&self, path: &str, body: Option<String>, call: &Call) -> Result<Vec<u8>> {
        let url = self.url(path);
        let mut found = Vec::new();
        let head = self.client.exchange(&url, body, call, &mut |_, bytes| {
            found.extend_from_slice(bytes);
            self.check_size(&url, found.len())
        })?;
        match head.status {
            200..=299 => Ok(found),
            _ => Err(self.refusal(&url, &head, &found)),
        }
    }

    fn check_size(&self, url: &str, bytes: usize) -> Result<()> {
        if bytes <= self.config.max_bytes {
            return Ok(());
        }
        Err(ChatError::Protocol(format!(
            "{url}: an answer of more than {} bytes",
            self.config.max_bytes
        )))
    }

    fn json<T: Serialize>(&self, url: &str, body: &T) -> Result<String> {
        serde_json::to_string(body)
            .map_err(|error| ChatError::BadRequest(format!("{url}: the request: {error}")))
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, url: &str, body: &[u8]) -> Result<T> {
        wire::read(body).map_err(|error| {
            let shown: String = String::from_utf8_lossy(body).chars().take(200).collect();
            ChatError::Protocol(format!("{url}: {error} in {shown:?}"))
        })
    }

    /// The error that an answer with this status is.
    fn refusal(&self, url: &str, head: &Head, body: &[u8]) -> ChatError {
        let error = wire::read::<wire::ErrorReply>(body).map(|reply| reply.error);
        let (said, code) = match error {
            Ok(error) => (error.message, error.code.unwrap_or_default()),
            Err(_) => {
                let shown = String::from_utf8_lossy(body);
                (shown.chars().take(300).collect(), String::new())
            }
        };
        self.failure(url, head.status, &said, &code, head.after)
    }

    fn failure(
        &self,
        url: &str,
        status: u16,
        said: &str,
        code: &str,
        after: Option<std::time::Duration>,
    ) -> ChatError {
        let message = format!("{url}: status {status}: {said}");
        match (status, code) {
            (_, "context_length_exceeded") => ChatError::ContextOverflow {
                tokens: 0,
                max: self.card.window.unwrap_or(0),
            },
            (_, "content_filter") => ChatError::ContentFilter(message),
            (401 | 403, _) | (_, "insufficient_quota") => ChatError::Auth(message),
            (404 | 405, _) => ChatError::NotFound(message),
            (429, _) => ChatError::RateLimited { message, after },
            (408 | 504, _) => ChatError::Timeout {
                message,
                partial: String::new(),
            },
            (425 | 500..=599, _) => ChatError::Overloaded { message, after },
            _ => ChatError::BadRequest(message),
        }
    }

    /// Sends a request for text and folds what comes, whether events or one body.
    fn write(
        &self,
        path: &str,
        body: String,
        call: &Call,
        add: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let url = self.url(path);
        let mut whole = Vec::new();
        let mut bytes_seen = 0;
        let mut parser = SseParser::default();
        let mut ended = false;
        let mut event = |data: String, ended: &mut bool| -> Result<()> {
            if *ended || data.is_empty() {
                return Ok(());
            }
            if data == "[DONE]" {
                *ended = true;
                return Ok(());
            }
            if let Ok(reply) = wire::read::<wire::ErrorReply>(data.as_bytes()) {
                let code = reply.error.code.clone().unwrap_or_default();
                let status = code.parse().unwrap_or(500);
                return Err(self.failure(&url, status, &reply.error.message, &code, None));
            }
            add(data.as_bytes())
        };
        let head = self
            .client
            .exchange(&url, Some(body), call, &mut |head, bytes| {
                bytes_seen += bytes.len();
                self.check_size(&url, bytes_seen)?;
                if !head.events || !(200..300).contains(&head.status) {
                    whole.extend_from_slice(bytes);
                    return Ok(());
                }
                let mut events = Vec::new();
                parser
                    .push(bytes, &mut |data| events.push(data))
                    .map_err(|error| ChatError::Protocol(format!("{url}: {error}")))?;
                events
                    .into_iter()
                    .try_for_each(|data| event(data, &mut ended))
            })?;
        if !(200..300).contains(&head.status) {
            return Err(self.refusal(&url, &head, &whole));
        }
        if !head.events {
            return event(String::from_utf8_lossy(&whole).into_owned(), &mut ended);
        }
        let mut events = Vec::new();
        parser.finish(&mut |data| events.push(data));
        events
            .into_iter()
            .try_for_each(|data| event(data, &mut ended))
    }

    fn finish(&self, folded: Folded, request: &Request, start: Instant) -> Result<Reply> {
        let finish = match folded.finish.as_deref() {
            Some("length") => Finish::Length,
            Some("content_filter") => {
                return Err(ChatError::ContentFilter(format!(
                    "{}: the filter cut the reply after {:?}",
                    self.config.url, folded.text
                )));
            }
            Some(_) => Finish::Stop,
            None if folded.choices > 0 => {
                return Err(ChatError::Network {
                    message: format!("{}: the reply broke off", self.config.url),
                    partial: folded.text,
                });
            }
            None => {
                return Err(ChatError::Protocol(format!(
                    "{}: a reply without choices",
                    self.config.url
                )));
            }
        };
        let usage = match folded.usage {
            Some(usage) => Usage {
                prompt: usage.prompt_tokens,
                cached: usage
                    .prompt_tokens_details
                    .map_or(0, |details| details.cached_tokens),
                completion: usage.completion_tokens,
                exact: true,
            },
            None => Usage {
                prompt: TokenCount::estimate(&request.input.plain()).tokens,
                cached: 0,
                completion: TokenCount::estimate(&folded.text).tokens,
                exact: false,
            },
        };
        let total_s = start.elapsed().as_secs_f64();
        Ok(Reply {
            text: folded.text,
            finish,
            logprobs: folded.logprobs,
            usage,
            first_s: folded.first_s.unwrap_or(total_s),
            total_s,
            from_cache: false,
        })
    }
}

/// The fields that both kinds of requests share.
macro_rules! fill {
    ($body:ident, $self:ident, $request:ident) => {{
        let sampling = &$request.sampling;
        let own = SamplingConfig::default();
        $body.model = $self.config.model.clone();
        $body.max_tokens = Some($request.max_tokens);
        $body.temperature = Some(sampling.temperature);
        $body.seed = Some(sampling.seed as i64);
        $body.stop =
            (!$request.stop.is_empty()).then(|| wire::OneOrMany::Many($request.stop.clone()));
        // Fields beyond the dialect only where they say something: strict servers refuse them.
        $body.top_p = (sampling.top_p != own.top_p).then_some(sampling.top_p);
        $body.top_k = (sampling.top_k != own.top_k).then_some(sampling.top_k);
        $body.min_p = (sampling.min_p != own.min_p).then_some(sampling.min_p);
        $body.repetition_penalty = (sampling.repetition_penalty != own.repetition_penalty)
            .then_some(sampling.repetition_penalty);
        $body.presence_penalty = (sampling.presence_penalty != own.presence_penalty)
            .then_some(sampling.presence_penalty);
        $body.frequency_penalty = (sampling.frequency_penalty != own.frequency_penalty)
            .then_some(sampling.frequency_penalty);
        $body.logit_bias = (!sampling.logit_bias.is_empty()).then(|| {
            let bias = sampling.logit_bias.iter();
            bias.map(|(token, bias)| (token.to_string(), *bias))
                .collect()
        });
        if $self.config.stream {
            $body.stream = Some(true);
            $body.stream_options = Some(wire::StreamOptions {
                include_usage: true,
                include_progress: false,
            });
        }
        if $request.decode != DecodeConfig::Plain {
            $self.card.need(Ability::Decode)?;
            $body.decode = Some(wire::Spec::Text($request.decode.to_string()));
        }
        $body.extra = $self.config.extra.clone();
    }};
}

impl ChatModel for OpenAiModel {
    fn card(&self) -> &Card {
        &self.card
    }

    fn count(&self, input: &Input) -> Result<TokenCount> {
        self.tokens_of_input(input)
    }

    fn count_text(&self, text: &str) -> Result<TokenCount> {
        self.tokens_of(text)
    }

    fn count_texts(&self, texts: &[&str]) -> Result<Vec<TokenCount>> {
        self.tokens_of_each(texts)
    }

    fn reply(&self, request: &Request, call: &Call, on_text: OnText<'_>) -> Result<Reply> {
        request
            .sampling
            .validate()
            .map_err(|error| ChatError::BadRequest(error.to_string()))?;
        let start = Instant::now();
        if self.card.window.is_some() {
            self.fit(request)?;
        }
        let mut folded = Folded::default();
        let mut partial = String::new();
        let mut piece = |folded: &mut Folded, text: &str| -> Result<()> {
            if !text.is_empty() {
                folded
                    .first_s
                    .get_or_insert_with(|| start.elapsed().as_secs_f64());
                folded.text.push_str(text);
                partial.push_str(text);
            }
            match on_text(text).is_break() {
                true => Err(ChatError::Cancelled {
                    partial: partial.clone(),
                }),
                false => call.check(&partial),
            }
        };
        let result = match &request.input {
            Input::Chat(messages) => {
                self.card.need(Ability::Chat)?;
                if !request.answer_prefix.is_empty() {
                    self.card.need(Ability::AnswerPrefix)?;
                }
                let mut body = wire::ChatRequest {
                    messages: messages.iter().map(wire::ChatMessage::from).collect(),
                    ..wire::ChatRequest::default()
                };
                fill!(body, self, request);
                body.logprobs = request.sampling.logprobs.map(|_| true);
                body.top_logprobs = request.sampling.logprobs.filter(|&top| top > 0);
                let url = self.url("chat/completions");
                let streams = self.config.stream;
                let body = self.json(&url, &body)?;
                self.write("chat/completions", body, call, &mut |data| {
                    // A server that does not stream answers with a message where a chunk has a delta.
                    let whole = !streams || !has_delta(data);
                    let (choice, usage) = if whole {
                        let reply: wire::ChatReply = self.parse(&url, data)?;
                        let choice = reply.choices.into_iter().find(|choice| choice.index == 0);
                        let choice = choice.map(|choice| {
                            (choice.message.text(), choice.logprobs, choice.finish_reason)
                        });
                        (choice, reply.head.usage)
                    } else {
                        let chunk: wire::ChatChunk = self.parse(&url, data)?;
                        let choice = chunk.choices.into_iter().find(|choice| choice.index == 0);
                        let choice = choice.map(|choice| {
                            (
                                choice.delta.content.unwrap_or_default(),
                                choice.logprobs,
                                choice.finish_reason,
                            )
                        });
                        (choice, chunk.head.usage)
                    };
                    folded.usage = usage.or(folded.usage);
                    let Some((text, logprobs, finish)) = choice else {
                        return piece(&mut folded, "");
                    };
                    folded.choices += 1;
                    folded.finish = finish.or(folded.finish.take());
                    folded
                        .logprobs
                        .extend(logprobs.and_then(|list| list.content).unwrap_or_default());
                    piece(&mut folded, &text)
                })
            }
            Input::Text(text) => {
                self.card.need(Ability::Complete)?;
                let mut body = wire::CompletionRequest {
                    prompt: wire::Prompt::Text(format!("{text}{}", request.answer_prefix)),
                    logprobs: request.sampling.logprobs,
                    ..wire::CompletionRequest::default()
                };
                fill!(body, self, request);
                let url = self.url("completions");
                let body = self.json(&url, &body)?;
                self.write("completions", body, call, &mut |data| {
                    let reply: wire::CompletionReply = self.parse(&url, data)?;
                    folded.usage = reply.head.usage.or(folded.usage);
                    let choice = reply.choices.into_iter().find(|choice| choice.index == 0);
                    let Some(choice) = choice else {
                        return piece(&mut folded, "");
                    };
                    folded.choices += 1;
                    folded.finish = choice.finish_reason.or(folded.finish.take());
                    folded.logprobs.extend(completion_logprobs(choice.logprobs));
                    piece(&mut folded, &choice.text)
                })
            }
        };
        match result {
            Ok(()) => self.finish(folded, request, start),
            Err(error) => Err(with_partial(error, folded.text)),
        }
    }

    fn score(&self, prompt: &str, continuation: &str, call: &Call) -> Result<Vec<TokenScore>> {
        self.card.need(Ability::Score)?;
        let url = self.url("completions");
        let body = wire::CompletionRequest {
            model: self.config.model.clone(),
            prompt: wire::Prompt::Text(format!("{prompt}{continuation}")),
            echo: Some(true),
            max_tokens: Some(0),
            logprobs: Some(0),
            temperature: Some(0.0),
            extra: self.config.extra.clone(),
            ..wire::CompletionRequest::default()
        };
        let body = self.json(&url, &body)?;
        let reply: wire::CompletionReply =
            self.parse(&url, &self.send("completions", Some(body), call)?)?;
        let logprobs = reply
            .choices
            .into_iter()
            .next()
            .and_then(|choice| choice.logprobs);
        let logprobs = logprobs.ok_or_else(|| {
            ChatError::Protocol(format!("{url}: asked for log probabilities, found none"))
        })?;
        // Offsets count characters. Only tokens that begin in the continuation are scored, found from the end: what a
        // start token or an unknown one of the prompt is written as does not matter.
        let last = logprobs.tokens.last().zip(logprobs.text_offset.last());
        let end = last.map_or(0, |(token, offset)| offset + token.chars().count());
        let start = end.saturating_sub(continuation.chars().count());
        let tokens = logprobs.tokens.into_iter().zip(logprobs.token_logprobs);
        let scored = tokens
            .zip(logprobs.text_offset)
            .filter(|(_, offset)| *offset >= start)
            .filter_map(|((token, logprob), _)| {
                Some(TokenScore {
                    token,
                    logprob: logprob?,
                })
            });
        Ok(scored.collect())
    }

    fn prepare(&self, input: &Input, call: &Call) -> Result<()> {
        if !self.card.can(Ability::Prepare) {
            return Ok(());
        }
        // The server keeps what it read for a finished answer; the shortest answer serves.
        let request = Request::new(input.clone()).max_tokens(1);
        self.reply(&request, call, &mut super::model::ignore)?;
        Ok(())
    }

    fn embed(&self, texts: &[String], call: &Call) -> Result<Embeddings> {
        self.card.need(Ability::Embed)?;
        if texts.is_empty() {
            return Ok(Embeddings::default());
        }
        let url = self.url("embeddings");
        let body = wire::EmbeddingRequest {
            input: wire::Prompt::Texts(texts.to_vec()),
            model: self.config.model.clone(),
            encoding_format: Some("float".into()),
            extra: self.config.extra.clone(),
            ..wire::EmbeddingRequest::default()
        };
        let body = self.json(&url, &body)?;
        let reply: wire::EmbeddingReply =
            self.parse(&url, &self.send("embeddings", Some(body), call)?)?;
        let wrong = |found: String| ChatError::Protocol(format!("{url}: {found}"));
        let mut vectors = vec![Vec::new(); texts.len()];
        for embedding in reply.data {
            let slot = vectors.get_mut(embedding.index).ok_or_else(|| {
                wrong(format!("embedding {} of {}", embedding.index, texts.len()))
            })?;
            *slot = match embedding.embedding {
                wire::Vector::Floats(floats) => floats,
                wire::Vector::Base64(text) => floats_of_base64(&text)
                    .ok_or_else(|| wrong("an embedding that is not base64 of f32".into()))?,
            };
        }
        let length = vectors[0].len();
        if let Some(at) = vectors
            .iter()
            .position(|v| v.len() != length || v.is_empty())
        {
            return Err(wrong(format!(
                "embedding {at} has {} components, expected {length}, at least 1",
                vectors[at].len()
            )));
        }
        Ok(Embeddings {
            vectors,
            tokens: reply.usage.map_or(0, |usage| usage.prompt_tokens),
        })
    }
}

/// True for an event of a chat's stream.
fn has_delta(data: &[u8]) -> bool {
    #[derive(serde::Deserialize)]
    struct Probe {
        #[serde(default)]
        choices: Vec<Map<String, Value>>,
    }
    serde_json::from_slice::<Probe>(data).is_ok_and(|probe| {
        !probe
            .choices
            .iter()
            .any(|choice| choice.contains_key("message"))
    })
}

fn with_partial(error: ChatError, text: String) -> ChatError {
    match error {
        ChatError::Timeout { message, .. } => ChatError::Timeout {
            message,
            partial: text,
        },
        ChatError::Network { message, .. } => ChatError::Network {
            message,
            partial: text,
        },
        ChatError::Cancelled { .. } => ChatError::Cancelled { partial: text },
        error => error,
    }
}

fn completion_logprobs(found: Option<wire::CompletionLogprobs>) -> Vec<TokenLogprob> {
    let found = found.unwrap_or_default();
    let mut tops = found.top_logprobs.unwrap_or_default().into_iter();
    let tokens = found.tokens.into_iter().zip(found.token_logprobs);
    tokens
        .map(|(token, logprob)| {
            let top = tops.next().flatten().unwrap_or_default();
            let mut top: Vec<TopLogprob> = top
                .into_iter()
                .map(|(token, logprob)| TopLogprob {
                    token,
                    logprob,
                    bytes: None,
                })
                .collect();
            top.sort_by(|a, b| b.logprob.total_cmp(&a.logprob));
            TokenLogprob {
                token,
                logprob: logprob.unwrap_or(f32::NAN),
                bytes: None,
                top_logprobs: top,
            }
        })
        .collect()
}

/// Little-endian f32 in base64; None if it is something else.
fn floats_of_base64(text: &str) -> Option<Vec<f32>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut held, mut bits) = (0u32, 0);
    for c in text.trim_end_matches('=').bytes() {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => return None,
        };
        held = held << 6 | u32::from(value);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((held >> bits) as u8);
            held &= (1 << bits) - 1;
        }
    }
    let floats = bytes.chunks_exact(4);
    let whole = floats.remainder().is_empty();
    let floats = floats.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    whole.then(|| floats.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_floats() {
        // 1.0 = 00 00 80 3f, -2.5 = 00 00 20 c0
        assert_eq!(floats_of_base64("AACAPwAAIMA="), Some(vec![1.0, -2.5]));
        assert_eq!(floats_of_base64(""), Some(vec![]));
        assert_eq!(floats_of_base64("AACA"), None);
        assert_eq!(floats_of_base64("AAC!PwAAIMA="), None);
    }

    #[test]
    fn addresses() {
        assert!(OpenAiModel::new(OpenAiConfig::new("localhost:1", "m")).is_err());
        let model = OpenAiModel::new(OpenAiConfig::new("http://h:1/v1/", "m")).unwrap();
        assert_eq!(model.url("models"), "http://h:1/v1/models");
        assert_eq!(model.url("tokenize"), "http://h:1/tokenize");
    }
}
