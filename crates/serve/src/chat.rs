//! `POST /v1/chat/completions`

use crate::answer::{Ask, DONE, Events, Piece, ask, collect, details, event, failed, usage};
use crate::app::{App, client, peer, read_body, too_long};
use crate::error::{Failure, Result};
use crate::listen::Peer;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use longspan_agents::chat::local::ModelError;
use longspan_agents::chat::wire::{
    self, ChatChoice, ChatChunk, ChatLogprobs, ChatMessage, ChatReply, ChatRequest, ChunkChoice,
    Delta, Head, TokenLogprob,
};
use longspan_agents::{Message, Role};
use longspan_data::tokenize::Special;
use longspan_infer::schedule::Base;
use std::sync::Arc;

/// Tokens of an answer where the request does not say.
const MAX_TOKENS: usize = 1024;

/// Stands for the document while a template is rendered.
const DOCUMENT: &str = "\u{1}document\u{1}";

/// The handler.
pub async fn chat(
    State(app): State<Arc<App>>,
    from: Option<Extension<Peer>>,
    body: Body,
) -> Result<Response> {
    let body = read_body(&app, body).await?;
    let request: ChatRequest = wire::read(&body)?;
    drop(body);
    let shared = request.shared(app.random(), request.wanted_logprobs())?;
    app.check_model(&request.model)?;
    let turns = wire::turns(&request.messages)?;
    let who = client(peer(&from), request.extra.get("user"));
    let document = match &shared.session {
        Some(id) => Some(app.documents.ready(&app, id).await?),
        None => None,
    };
    let (base, prompt, context, max_tokens) = match &document {
        Some(document) => {
            document.check(&shared)?;
            let prompt = question(&app, &turns)?;
            let (context, max) = document.room(&app, prompt.len(), request.max_new_tokens())?;
            (Base::Kept(document.id.clone()), prompt, context, max)
        }
        None => {
            let prompt = app.model.conversation(&turns)?;
            let max = request.max_new_tokens();
            let (base, context, max) = fresh(&app, &shared, prompt.len(), max, MAX_TOKENS)?;
            (base, prompt, context, max)
        }
    };
    let tokens = prompt.len();
    let asked = ask(
        &app,
        Ask {
            client: who,
            base,
            prompt,
            shared: shared.clone(),
            max_tokens,
            echo: None,
        },
    )
    .await?;
    let finder = move |range| document.as_ref().and_then(|document| document.chars(range));
    if shared.streams {
        let mut stream = Chunks {
            head: app.head("chatcmpl", "chat.completion.chunk"),
            logprobs: shared.sampling.logprobs.is_some(),
            begun: Vec::new(),
            written: 0,
        };
        let format = move |piece| match piece {
            Piece::Finished(summary) => {
                let mut last = Vec::new();
                let options = shared.stream_options;
                if options.include_usage || options.include_progress || shared.show_context {
                    let mut chunk = stream.chunk(Vec::new());
                    chunk.head.usage = Some(usage(tokens, stream.written, &summary));
                    chunk.head.longspan = Some(details(&context, &shared, &summary, &finder));
                    last.push(event(&chunk));
                }
                last.push(DONE);
                last
            }
            Piece::Progress(progress) if shared.stream_options.include_progress => {
                let mut chunk = stream.chunk(Vec::new());
                chunk.head.progress = Some(progress);
                vec![event(&chunk)]
            }
            piece => stream.events(piece),
        };
        return Ok(Events::new(asked, format).response());
    }
    let (answers, _, summary) = collect(asked).await?;
    let written = answers.iter().map(|answer| answer.count).sum();
    let logprobs = shared.sampling.logprobs.is_some();
    let choices = answers
        .into_iter()
        .enumerate()
        .map(|(index, answer)| ChatChoice {
            index,
            message: ChatMessage::new("assistant", answer.text),
            logprobs: logprobs.then_some(ChatLogprobs {
                content: Some(answer.tokens),
            }),
            finish_reason: Some(answer.finish.into()),
        });
    let mut head = app.head("chatcmpl", "chat.completion");
    head.usage = Some(usage(tokens, written, &summary));
    head.longspan = Some(details(&context, &shared, &summary, finder));
    let choices = choices.collect();
    Ok(Json(ChatReply { head, choices }).into_response())
}

/// Base, policy and most tokens of an answer for a prompt that starts from nothing.
pub fn fresh(
    app: &App,
    shared: &wire::Shared,
    prompt: usize,
    asked: Option<usize>,
    default: usize,
) -> Result<(Base, String, usize)> {
    let most = app.options.max_tokens;
    if prompt >= most {
        return Err(too_long(prompt, most as u64, "the prompt"));
    }
    // An answer whose length nobody named takes what is left.
    let max = asked.unwrap_or(default.min(most - prompt));
    let rope = shared.rotary.as_ref();
    let whole = prompt.saturating_add(max);
    let (options, _) = app.policy(shared.policy.clone(), rope, whole)?;
    let context = options.context.to_string();
    Ok((Base::Empty(options, shared.rotary.clone()), context, max))
}

/// The tokens that follow a document: a question, or a talk about it.
fn question(app: &App, turns: &[Message]) -> Result<Vec<u32>> {
    let system: Vec<&str> = turns
        .iter()
        .filter(|turn| turn.role == Role::System)
        .map(|turn| turn.content.as_str())
        .collect();
    let mut talk: Vec<Message> = turns
        .iter()
        .filter(|turn| turn.role != Role::System)
        .cloned()
        .collect();
    let Some(first) = talk.first_mut().filter(|turn| turn.role == Role::User) else {
        let text = "messages: with a session the first message that is not system must be a user's question";
        return Err(Failure::new(StatusCode::BAD_REQUEST, "invalid_value", text).at("messages"));
    };
    // The document stands first in the talk, so instructions join the question.
    first.content = [system, vec![first.content.as_str()]].concat().join("\n\n");
    if let [only] = &talk[..] {
        return Ok(app.model.question(&only.content)?);
    }
    if app.model.chats() {
        talk[0].content = format!(
            "Here is a text:\n\n{DOCUMENT}\n\nUse the text to answer this question: {}",
            talk[0].content
        );
        let text = app.model.render(&talk)?;
        if let Some((_, rest)) = text.split_once(DOCUMENT) {
            let tokens = app.model.tokenizer.encode(rest, Special::Parse);
            return tokens.map_err(|error| Failure::from(ModelError::from(error)));
        }
    }
    let mut text = String::new();
    for turn in &talk {
        let label = match turn.role {
            Role::Assistant => " ",
            _ => "\n\nQuestion: ",
        };
        text.push_str(label);
        text.push_str(&turn.content);
        if turn.role == Role::User {
            text.push_str("\nAnswer:");
        }
    }
    let tokens = app.model.tokenizer.encode(&text, Special::None);
    tokens.map_err(|error| Failure::from(ModelError::from(error)))
}

/// What all chunks of a stream share.
struct Chunks {
    head: Head,
    logprobs: bool,
    /// Answers whose first chunk is out.
    begun: Vec<usize>,
    written: usize,
}

impl Chunks {
    fn chunk(&self, choices: Vec<ChunkChoice>) -> ChatChunk {
        ChatChunk {
            head: self.head.clone(),
            choices,
        }
    }

    fn choice(
        &mut self,
        index: usize,
        content: Option<String>,
        tokens: Vec<TokenLogprob>,
        finish: Option<&str>,
    ) -> ChunkChoice {
        let first = !self.begun.contains(&index);
        if first {
            self.begun.push(index);
        }
        ChunkChoice {
            index,
            delta: Delta {
                role: first.then(|| "assistant".into()),
                content,
            },
            logprobs: (self.logprobs && !tokens.is_empty()).then_some(ChatLogprobs {
                content: Some(tokens),
            }),
            finish_reason: finish.map(str::to_string),
        }
    }

    fn events(&mut self, piece: Piece) -> Vec<bytes::Bytes> {
        let choice = match piece {
            Piece::Text {
                answer,
                text,
                tokens,
            } => self.choice(answer, Some(text), tokens, None),
            Piece::Ended {
                answer,
                finish,
                tokens,
            } => {
                self.written += tokens;
                self.choice(answer, None, Vec::new(), Some(finish))
            }
            Piece::Failed(failure) => return failed(failure),
            Piece::Progress(_) | Piece::Echo(_) | Piece::Finished(_) => return Vec::new(),
        };
        vec![event(&self.chunk(vec![choice]))]
    }
}
