//! Documents: read once, asked many times.
//!
//! `POST /v1/documents` takes JSON (`{"text": ...}`) or a file as it is (text, Markdown, HTML, PDF, EPUB). Its keys
//! and values stay in memory under an id that requests name as `session`; with a folder they also outlive the server.

use crate::answer::{DONE, Events, Piece, begun, event, failed};
use crate::app::{App, client, now, peer, read_body, too_long};
use crate::error::{Failure, Result};
use crate::listen::Peer;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use longspan_agents::chat::wire::{self, Progress, Spec};
use longspan_data::document::{self, Limits};
use longspan_infer::context::ContextConfig;
use longspan_infer::schedule::{Base, Event, Goal, Job, Sink};
use longspan_infer::session::SessionDir;
use longspan_nn::position::RopeOverride;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path as FilePath;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;
use tokio::sync::mpsc::unbounded_channel;

/// Tokens left for a question and an answer where a policy is chosen for a document.
const ROOM: usize = 2048;

/// A document that can be asked about.
pub struct Document {
    /// Its id: the `session` of requests.
    pub id: String,
    info: Info,
    context: ContextConfig,
    rope: Option<RopeOverride>,
    /// Its text; None where an earlier server read it.
    text: Option<String>,
    /// The first character of each token of the text, and the tokens that the template put before it.
    starts: Vec<u32>,
    head: usize,
    /// Saved by an earlier server and not loaded yet.
    resting: Mutex<Option<SessionDir>>,
}

/// What is told of a document.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Info {
    id: String,
    object: String,
    name: String,
    created: u64,
    tokens: usize,
    chars: usize,
    context: String,
    why: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    rope: Option<String>,
    warnings: Vec<String>,
    read_seconds: f64,
}

/// The body of an upload as JSON, and the query of one as a file.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Upload {
    model: String,
    name: String,
    text: Option<String>,
    context: Option<Spec>,
    rope: Option<String>,
    stream: bool,
    user: Option<String>,
}

/// All documents.
#[derive(Default)]
pub struct Documents(Mutex<BTreeMap<String, Arc<Document>>>);

impl Documents {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Document>>> {
        self.0.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    /// Finds what an earlier server saved in a folder. What cannot be read is left alone.
    pub fn find(&self, folder: &FilePath) {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let session = SessionDir::new(entry.path());
            let Some(id) = entry.file_name().to_str().map(str::to_string) else {
                continue;
            };
            let Ok(header) = session.header() else {
                continue;
            };
            let Ok(info) = serde_json::from_value::<Info>(header.note) else {
                continue;
            };
            let document = Document {
                id: id.clone(),
                info,
                context: header.context,
                rope: header.rope,
                text: None,
                starts: Vec::new(),
                head: 0,
                resting: Mutex::new(Some(session)),
            };
            self.lock().insert(id, Arc::new(document));
        }
    }

    fn get(&self, id: &str) -> Result<Arc<Document>> {
        self.lock().get(id).cloned().ok_or_else(|| {
            let text =
                format!("session: no document has the id {id:?}; upload it to /v1/documents");
            Failure::new(StatusCode::NOT_FOUND, "document_not_found", text).at("session")
        })
    }

    /// A document whose keys and values are in memory.
    pub async fn ready(&self, app: &Arc<App>, id: &str) -> Result<Arc<Document>> {
        let document = self.get(id)?;
        let (waker, app) = (document.clone(), app.clone());
        let load = tokio::task::spawn_blocking(move || {
            let mut resting = waker.resting.lock().unwrap_or_else(|p| p.into_inner());
            if let Some(session) = resting.as_ref() {
                let session = SessionDir::new(session.path());
                app.scheduler.restore(session, &waker.id)?;
                *resting = None;
            }
            Ok::<(), Failure>(())
        });
        load.await.map_err(|error| {
            let status = StatusCode::INTERNAL_SERVER_ERROR;
            Failure::new(status, "internal_error", error.to_string())
        })??;
        Ok(document)
    }
}

impl Document {
    /// Refuses options that the document was not read with.
    pub fn check(&self, shared: &wire::Shared) -> Result<()> {
        let wrong = |field: &str, found: String, own: String| {
            let text = format!(
                "{field}: {found} found; the document was read under {own}, upload it again for another"
            );
            Err(Failure::new(StatusCode::BAD_REQUEST, "invalid_value", text).at(field))
        };
        if let Some(asked) = &shared.policy {
            // A name alone stands for the policy with the parameters that fit.
            let same = *asked == self.context || asked.to_string() == self.context.name();
            if !same {
                return wrong("context", asked.to_string(), self.context.to_string());
            }
        }
        if let Some(asked) = &shared.rotary
            && Some(asked) != self.rope.as_ref()
        {
            let own = self
                .rope
                .as_ref()
                .map_or("the model's own rule".into(), ToString::to_string);
            return wrong("rope", asked.to_string(), own);
        }
        Ok(())
    }

    /// The policy, and most tokens of an answer to a question of so many tokens.
    pub fn room(
        &self,
        app: &App,
        question: usize,
        asked: Option<usize>,
    ) -> Result<(String, usize)> {
        let most = match self.context {
            ContextConfig::Full => app.window(self.rope.as_ref())?,
            _ => u64::MAX,
        };
        let most = most.min(app.options.max_tokens as u64);
        let used = self.info.tokens + question;
        let left = most.saturating_sub(used as u64) as usize;
        let max = asked.unwrap_or(1024.min(left));
        if max > left || left == 0 {
            return Err(too_long(
                used + max,
                most,
                "document, question and answer together",
            ));
        }
        Ok((self.context.to_string(), max))
    }

    /// The characters of the text that a range of tokens is.
    pub fn chars(&self, [start, end]: [u64; 2]) -> Option<[usize; 2]> {
        let at = |token: u64| -> usize {
            let token = (token as usize).saturating_sub(self.head);
            self.starts
                .get(token)
                .map_or(self.info.chars, |&at| at as usize)
        };
        let (from, to) = (at(start), at(end));
        (from < to && !self.starts.is_empty()).then_some([from, to])
    }
}

/// The first character of each token of `text`.
fn starts(app: &App, tokens: &[u32], text: &str) -> Vec<u32> {
    let mut chars = Vec::with_capacity(text.len() + 1);
    let mut count = 0;
    for byte in text.bytes() {
        // Continuation bytes belong to the character before.
        count += u32::from(byte & 0xC0 != 0x80);
        chars.push(count - 1);
    }
    chars.push(count);
    let mut at = 0;
    let place = |&token: &u32| {
        let here = chars[at.min(chars.len() - 1)];
        at += app.model.tokenizer.token_bytes(token).len();
        here
    };
    tokens.iter().map(place).collect()
}

/// `POST /v1/documents`
pub async fn upload(
    State(app): State<Arc<App>>,
    Query(query): Query<BTreeMap<String, String>>,
    from: Option<Extension<Peer>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response> {
    let body = read_body(&app, body).await?;
    let kind = headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok());
    let json = kind.is_some_and(|kind| kind.starts_with("application/json"));
    let invalid = |field: &str, text: String| {
        Failure::new(StatusCode::BAD_REQUEST, "invalid_value", text).at(field)
    };
    let (upload, text, warnings) = if json {
        let mut upload: Upload = wire::read(&body)?;
        let text = upload.text.take();
        let text =
            text.ok_or_else(|| invalid("text", "text: nothing found, a text expected".into()))?;
        (upload, text, Vec::new())
    } else {
        let get = |name: &str| query.get(name).cloned();
        let upload = Upload {
            model: get("model").unwrap_or_default(),
            name: get("name").unwrap_or_default(),
            text: None,
            context: get("context").map(Spec::Text),
            rope: get("rope"),
            stream: query.get("stream").is_some_and(|value| value == "true"),
            user: get("user"),
        };
        let name = if upload.name.is_empty() {
            "document"
        } else {
            &upload.name
        }
        .to_string();
        let most = (app.options.max_body as u64).saturating_mul(4);
        let read = tokio::task::spawn_blocking(move || {
            let extension = FilePath::new(&name).extension().and_then(|e| e.to_str());
            let extension = extension.map(str::to_ascii_lowercase);
            document::from_bytes(
                &name,
                extension.as_deref(),
                &body,
                &Limits::with_max_bytes(most),
            )
        });
        let read = read
            .await
            .map_err(|error| invalid("body", error.to_string()))?;
        let document = read.map_err(|error| invalid("body", error.to_string()))?;
        (upload, document.text, document.warnings)
    };
    if text.trim().is_empty() {
        return Err(invalid("text", "text: no words found".into()));
    }
    app.check_model(&upload.model)?;
    // The checks of requests serve here too.
    let asked = wire::ChatRequest {
        context: upload.context.clone(),
        rope: upload.rope.clone(),
        ..wire::ChatRequest::default()
    };
    let (policy, rope) = (asked.policy()?, asked.rotary()?);
    let worker = app.clone();
    let cut = tokio::task::spawn_blocking(move || {
        let prompt = worker.model.ask(&text, "");
        prompt.map(|prompt| {
            let own = worker
                .model
                .tokenizer
                .encode(&text, longspan_data::tokenize::Special::None);
            let own = own.unwrap_or_default();
            let head = prompt.document.len() - own.len().min(prompt.document.len());
            let starts = starts(&worker, &own, &text);
            (prompt.document, head, starts, text)
        })
    });
    let cut = cut
        .await
        .map_err(|error| invalid("text", error.to_string()))?;
    let (tokens, head, starts, text) = cut?;
    let whole = tokens.len() + ROOM.min(app.options.max_tokens / 4);
    let (options, why) = app.policy(policy, rope.as_ref(), whole)?;
    let id = app.id("doc");
    let info = Info {
        id: id.clone(),
        object: "document".into(),
        name: upload.name.clone(),
        created: now(),
        tokens: tokens.len(),
        chars: text.chars().count(),
        context: options.context.to_string(),
        why,
        rope: rope.as_ref().map(ToString::to_string),
        warnings,
        read_seconds: 0.0,
    };
    let document = Document {
        id: id.clone(),
        info: info.clone(),
        context: options.context.clone(),
        rope: rope.clone(),
        text: Some(text),
        starts,
        head,
        resting: Mutex::new(None),
    };
    let save = app.options.documents.as_ref().map(|folder| {
        let note = serde_json::to_value(&info).unwrap_or_default();
        (SessionDir::new(folder.join(&id)), note)
    });
    let (sender, pieces) = unbounded_channel();
    let sink: Sink = Box::new(move |event| {
        let piece = match event {
            Event::Progress { read, total } => Piece::Progress(Progress { read, total }),
            Event::Finished(summary) => Piece::Finished(summary),
            Event::Failed(error) => Piece::Failed(error.into()),
            Event::Echo(_) | Event::Token { .. } | Event::Ended { .. } => {
                return ControlFlow::Continue(());
            }
        };
        match sender.send(piece) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    });
    let user = upload.user.map(serde_json::Value::from);
    let job = Job {
        client: client(peer(&from), user.as_ref()),
        base: Base::Empty(options, rope),
        prompt: tokens,
        goal: Goal::Keep {
            id: id.clone(),
            room: ROOM,
            save,
        },
        deadline: Some(Instant::now() + app.options.request_timeout),
    };
    let ticket = app.scheduler.submit(job, sink)?;
    let mut asked = begun(pieces, ticket).await?;
    if !upload.stream {
        loop {
            match asked.next().await {
                Piece::Finished(summary) => {
                    let info = keep(&app, document, summary.prefill.as_secs_f64());
                    return Ok(Json(info).into_response());
                }
                Piece::Failed(failure) => return Err(failure),
                _ => {}
            }
        }
    }
    let mut document = Some(document);
    let format = move |piece| match piece {
        Piece::Progress(progress) => vec![event(&json!({ "id": id, "progress": progress }))],
        Piece::Finished(summary) => {
            let info = document
                .take()
                .map(|document| keep(&app, document, summary.prefill.as_secs_f64()));
            vec![event(&json!({ "id": id, "document": info })), DONE]
        }
        Piece::Failed(failure) => failed(failure),
        Piece::Echo(_) | Piece::Text { .. } | Piece::Ended { .. } => Vec::new(),
    };
    Ok(Events::new(asked, format).response())
}

/// Lists a document that is read.
fn keep(app: &App, mut document: Document, seconds: f64) -> Info {
    document.info.read_seconds = seconds;
    let info = document.info.clone();
    app.documents
        .lock()
        .insert(document.id.clone(), Arc::new(document));
    info
}

/// `GET /v1/documents`
pub async fn list(State(app): State<Arc<App>>) -> Json<serde_json::Value> {
    let documents = app.documents.lock();
    let data: Vec<&Info> = documents.values().map(|document| &document.info).collect();
    Json(json!({ "object": "list", "data": data }))
}

/// `GET /v1/documents/{id}`; with `?text=true` its text too.
pub async fn one(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Result<Json<serde_json::Value>> {
    let document = app.documents.get(&id)?;
    let mut value = json!(document.info);
    if query.get("text").is_some_and(|value| value == "true") {
        value["text"] = json!(document.text);
    }
    Ok(Json(value))
}

/// `DELETE /v1/documents/{id}`
pub async fn remove(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Json<serde_json::Value>> {
    app.documents.get(&id)?;
    app.documents.lock().remove(&id);
    let answer = json!({ "id": id, "object": "document", "deleted": true });
    let work = tokio::task::spawn_blocking(move || {
        app.scheduler.forget(&id)?;
        if let Some(folder) = &app.options.documents {
            let session = SessionDir::new(folder.join(&id));
            if session.exists() {
                session.delete()?;
            }
        }
        Ok::<(), Failure>(())
    });
    match work.await {
        Ok(done) => done?,
        Err(error) => {
            let status = StatusCode::INTERNAL_SERVER_ERROR;
            return Err(Failure::new(status, "internal_error", error.to_string()));
        }
    }
    Ok(Json(answer))
}

/// `DELETE /v1/prefixes`: lets go the keys and values of finished talks.
pub async fn forget_prefixes(State(app): State<Arc<App>>) -> Result<Json<serde_json::Value>> {
    let work = tokio::task::spawn_blocking(move || app.scheduler.forget_prefixes());
    match work.await {
        Ok(done) => done?,
        Err(error) => {
            let status = StatusCode::INTERNAL_SERVER_ERROR;
            return Err(Failure::new(status, "internal_error", error.to_string()));
        }
    }
    Ok(Json(json!({ "deleted": true })))
}
