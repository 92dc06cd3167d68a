//! `POST /v1/completions`: plain texts continued, or scored where `echo` asks for the prompt's own log probabilities.

use crate::answer::{Ask, DONE, Events, Piece, ask, collect, details, event, failed, usage};
use crate::app::{App, client, peer, read_body};
use crate::chat::fresh;
use crate::error::{Failure, Result};
use crate::listen::Peer;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use longspan_agents::chat::local::{ModelError, token_text};
use longspan_agents::chat::wire::{
    self, CompletionChoice, CompletionLogprobs, CompletionReply, CompletionRequest, Head, Prompt,
    TokenLogprob, Usage,
};
use longspan_data::tokenize::Special;
use longspan_infer::schedule::{Base, Summary};
use std::sync::Arc;

/// Tokens of an answer where the request does not say: the dialect's own number.
const MAX_TOKENS: usize = 16;

/// Prompts of one request.
const MAX_PROMPTS: usize = 64;

/// The prompts of a request as tokens.
fn prompts(app: &App, prompt: &Prompt) -> Result<Vec<Vec<u32>>> {
    let tokenizer = &app.model.tokenizer;
    let encode = |text: &String| {
        let tokens = tokenizer.encode(text, Special::ParseWithBos);
        tokens.map_err(|error| Failure::from(ModelError::from(error)))
    };
    let lists: Vec<Vec<u32>> = match prompt {
        Prompt::Text(text) => vec![encode(text)?],
        Prompt::Texts(texts) => texts.iter().map(encode).collect::<Result<_>>()?,
        Prompt::Tokens(tokens) => vec![tokens.clone()],
        Prompt::TokenLists(lists) => lists.clone(),
    };
    let wrong = |text: String| {
        Err(Failure::new(StatusCode::BAD_REQUEST, "invalid_value", text).at("prompt"))
    };
    if lists.is_empty() || lists.len() > MAX_PROMPTS {
        return wrong(format!(
            "prompt: {} prompts found, 1 to {MAX_PROMPTS} expected",
            lists.len()
        ));
    }
    let vocab = app.model.engine.model().config().vocab_size;
    for list in &lists {
        if list.is_empty() {
            return wrong("prompt: an empty prompt found, at least one token expected".into());
        }
        if let Some(token) = list.iter().find(|&&token| token as usize >= vocab) {
            return wrong(format!(
                "prompt: token {token} found, the vocabulary has 0 to {}",
                vocab - 1
            ));
        }
    }
    Ok(lists)
}

/// Where the characters of a listed prompt begin, and its tokens.
struct Echoed {
    text: String,
    first: (String, Vec<u8>),
}

impl Echoed {
    fn new(app: &App, tokens: &[u32]) -> Echoed {
        let tokenizer = &app.model.tokenizer;
        Echoed {
            text: tokenizer.decode(tokens),
            first: token_text(tokenizer, tokens[0]),
        }
    }
}

/// Log probabilities of completions: lists side by side.
#[derive(Default)]
struct Lists {
    lists: CompletionLogprobs,
    top: bool,
    /// Bytes of tokens so far and the characters that they are; a token may end within one.
    bytes: Vec<u8>,
    chars: usize,
}

impl Lists {
    fn new(top: bool) -> Lists {
        Lists {
            lists: CompletionLogprobs {
                top_logprobs: top.then(Vec::new),
                ..CompletionLogprobs::default()
            },
            top,
            ..Lists::default()
        }
    }

    fn push(&mut self, token: &str, bytes: &[u8], entry: Option<&TokenLogprob>) {
        self.lists.text_offset.push(self.chars);
        self.bytes.extend_from_slice(bytes);
        let whole = match std::str::from_utf8(&self.bytes) {
            Ok(text) => text.len(),
            Err(error) => match error.error_len() {
                // More bytes may complete it.
                None => error.valid_up_to(),
                Some(_) => self.bytes.len(),
            },
        };
        let done: Vec<u8> = self.bytes.drain(..whole).collect();
        self.chars += String::from_utf8_lossy(&done).chars().count();
        self.lists.tokens.push(token.into());
        self.lists
            .token_logprobs
            .push(entry.map(|entry| entry.logprob));
        if let Some(tops) = &mut self.lists.top_logprobs {
            tops.push(entry.map(|entry| {
                let tops = entry.top_logprobs.iter();
                tops.map(|top| (top.token.clone(), top.logprob)).collect()
            }));
        }
    }

    fn entries(&mut self, entries: &[TokenLogprob]) {
        for entry in entries {
            let bytes = entry
                .bytes
                .clone()
                .unwrap_or_else(|| entry.token.clone().into_bytes());
            self.push(&entry.token, &bytes, Some(entry));
        }
    }

    fn take(&mut self) -> CompletionLogprobs {
        let empty = CompletionLogprobs {
            top_logprobs: self.top.then(Vec::new),
            ..CompletionLogprobs::default()
        };
        std::mem::replace(&mut self.lists, empty)
    }
}

/// The handler.
pub async fn complete(
    State(app): State<Arc<App>>,
    from: Option<Extension<Peer>>,
    body: Body,
) -> Result<Response> {
    let body = read_body(&app, body).await?;
    let request: CompletionRequest = wire::read(&body)?;
    drop(body);
    let shared = request.shared(app.random(), request.logprobs)?;
    app.check_model(&request.model)?;
    let echo = request.echo == Some(true);
    let wrong = |field: &str, text: &str| {
        Failure::new(StatusCode::BAD_REQUEST, "invalid_value", text).at(field)
    };
    if shared.session.is_some() && echo {
        return Err(wrong(
            "echo",
            "echo is for prompts of their own, not for sessions",
        ));
    }
    let document = match &shared.session {
        Some(id) => Some(app.documents.ready(&app, id).await?),
        None => None,
    };
    let prompts = prompts(&app, &request.prompt)?;
    if shared.streams && prompts.len() > 1 {
        return Err(wrong(
            "stream",
            "several prompts are answered without events",
        ));
    }
    let who = client(peer(&from), request.extra.get("user"));
    let mut asked = Vec::with_capacity(prompts.len());
    let mut policy = String::new();
    for prompt in &prompts {
        let (base, context, max_tokens) = match &document {
            Some(document) => {
                document.check(&shared)?;
                let (context, max) = document.room(
                    &app,
                    prompt.len(),
                    Some(request.max_tokens.unwrap_or(MAX_TOKENS)),
                )?;
                (Base::Kept(document.id.clone()), context, max)
            }
            None => fresh(&app, &shared, prompt.len(), request.max_tokens, MAX_TOKENS)?,
        };
        policy = context;
        let ask = ask(
            &app,
            Ask {
                client: who,
                base,
                prompt: prompt.clone(),
                shared: shared.clone(),
                max_tokens,
                echo: request.logprobs.filter(|_| echo),
            },
        );
        asked.push(ask.await?);
    }
    let mut head = app.head("cmpl", "text_completion");
    let finder = move |range| document.as_ref().and_then(|document| document.chars(range));
    let listing = shared.sampling.logprobs;
    let top = listing.is_some_and(|count| count > 0);
    if shared.streams {
        let prompt = prompts.into_iter().next().unwrap_or_default();
        let begin = echo.then(|| Echoed::new(&app, &prompt));
        let mut stream = Pieces {
            head,
            lists: (0..shared.n).map(|_| Lists::new(top)).collect(),
            listing: listing.is_some(),
            begin,
            echo: Vec::new(),
            echoed: false,
            written: 0,
        };
        let asked = asked.remove(0);
        let format = move |piece| match piece {
            Piece::Finished(summary) => {
                let mut last = stream.begin();
                let options = shared.stream_options;
                if options.include_usage || options.include_progress || shared.show_context {
                    let mut reply = stream.reply(Vec::new());
                    reply.head.usage = Some(usage(prompt.len(), stream.written, &summary));
                    reply.head.longspan = Some(details(&policy, &shared, &summary, &finder));
                    last.push(event(&reply));
                }
                last.push(DONE);
                last
            }
            Piece::Progress(progress) if shared.stream_options.include_progress => {
                let mut reply = stream.reply(Vec::new());
                reply.head.progress = Some(progress);
                vec![event(&reply)]
            }
            piece => stream.events(piece),
        };
        return Ok(Events::new(asked, format).response());
    }
    let (mut choices, mut total) = (Vec::new(), Usage::default());
    let mut last = Summary::default();
    for (prompt, asked) in prompts.iter().zip(asked) {
        let (mut answers, echoed, summary) = collect(asked).await?;
        if answers.is_empty() {
            // max_tokens 0: the prompt itself is the answer.
            answers.push(crate::answer::Whole {
                finish: "length",
                ..Default::default()
            });
        }
        let begin = echo.then(|| Echoed::new(&app, prompt));
        let mut written = 0;
        for answer in answers {
            written += answer.count;
            let mut lists = Lists::new(top);
            let mut text = String::new();
            if let Some(begin) = &begin {
                text.clone_from(&begin.text);
                lists.push(&begin.first.0, &begin.first.1, None);
                lists.entries(&echoed);
            }
            lists.entries(&answer.tokens);
            text.push_str(&answer.text);
            choices.push(CompletionChoice {
                index: choices.len(),
                text,
                logprobs: listing.map(|_| lists.take()),
                finish_reason: Some(answer.finish.into()),
            });
        }
        let one = usage(prompt.len(), written, &summary);
        total.prompt_tokens += one.prompt_tokens;
        total.completion_tokens += one.completion_tokens;
        total.total_tokens += one.total_tokens;
        if let Some(details) = one.prompt_tokens_details {
            total
                .prompt_tokens_details
                .get_or_insert_default()
                .cached_tokens += details.cached_tokens;
        }
        last = summary;
    }
    head.usage = Some(total);
    head.longspan = Some(details(&policy, &shared, &last, finder));
    Ok(Json(CompletionReply { head, choices }).into_response())
}

/// A completion in events.
struct Pieces {
    head: Head,
    lists: Vec<Lists>,
    listing: bool,
    /// The prompt, if it is part of the answer.
    begin: Option<Echoed>,
    echo: Vec<TokenLogprob>,
    echoed: bool,
    written: usize,
}

impl Pieces {
    fn events(&mut self, piece: Piece) -> Vec<bytes::Bytes> {
        let mut out = Vec::new();
        let (index, text, finish) = match piece {
            Piece::Echo(tokens) => {
                self.echo.extend(tokens);
                return out;
            }
            Piece::Text {
                answer,
                text,
                tokens,
            } => {
                out = self.begin();
                self.lists[answer].entries(&tokens);
                (answer, text, None)
            }
            Piece::Ended {
                answer,
                finish,
                tokens,
            } => {
                out = self.begin();
                self.written += tokens;
                (answer, String::new(), Some(finish))
            }
            Piece::Failed(failure) => return failed(failure),
            Piece::Progress(_) | Piece::Finished(_) => return out,
        };
        out.push(self.event(index, text, finish));
        out
    }

    /// The echoed prompt, once, before all else.
    fn begin(&mut self) -> Vec<bytes::Bytes> {
        let Some(begin) = self.begin.as_ref().filter(|_| !self.echoed) else {
            return Vec::new();
        };
        self.echoed = true;
        let text = begin.text.clone();
        for lists in &mut self.lists {
            lists.push(&begin.first.0, &begin.first.1, None);
            lists.entries(&self.echo);
        }
        let count = self.lists.len();
        (0..count)
            .map(|index| self.event(index, text.clone(), None))
            .collect()
    }

    fn event(&mut self, index: usize, text: String, finish: Option<&str>) -> bytes::Bytes {
        let logprobs = self.listing.then(|| self.lists[index].take());
        event(&self.reply(vec![CompletionChoice {
            index,
            text,
            logprobs: logprobs.filter(|lists| !lists.tokens.is_empty()),
            finish_reason: finish.map(str::to_string),
        }]))
    }

    fn reply(&self, choices: Vec<CompletionChoice>) -> CompletionReply {
        CompletionReply {
            head: self.head.clone(),
            choices,
        }
    }
}
