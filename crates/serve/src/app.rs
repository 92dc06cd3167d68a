//! What all handlers share: the model, the scheduler, the documents; the routes; the key and the limits.

use crate::document::Documents;
use crate::error::{Failure, Result};
use crate::listen::Peer;
use crate::metrics::HttpCounters;
use crate::{ServeOptions, chat, completion, document, embedding, metrics, models, openapi, page};
use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Extension, Router};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use longspan_agents::LocalModel;
use longspan_agents::chat::wire::Head;
use longspan_infer::EngineOptions;
use longspan_infer::context::auto::{self, Need};
use longspan_infer::context::{ContextConfig, InfLlmConfig};
use longspan_infer::schedule::Scheduler;
use longspan_nn::model::TextEncoder;
use longspan_nn::position::RopeOverride;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// See the module's text.
pub struct App {
    /// Text to tokens and back, and the template.
    pub model: Arc<LocalModel>,
    /// Texts to vectors, if there is a model for it.
    pub embedder: Option<Arc<TextEncoder>>,
    /// Runs the engine.
    pub scheduler: Scheduler,
    /// How to serve.
    pub options: ServeOptions,
    /// Documents by id.
    pub documents: Documents,
    /// What the HTTP side counts.
    pub http: HttpCounters,
    /// When the server started, in Unix seconds.
    pub started: u64,
    random: RandomState,
    drawn: AtomicU64,
}

/// Unix seconds.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

impl App {
    /// Starts the scheduler.
    pub fn new(
        model: Arc<LocalModel>,
        embedder: Option<Arc<TextEncoder>>,
        options: ServeOptions,
    ) -> App {
        App {
            scheduler: Scheduler::new(model.engine.clone(), options.schedule.clone()),
            documents: Documents::default(),
            http: HttpCounters::default(),
            started: now(),
            random: RandomState::new(),
            drawn: AtomicU64::new(0),
            model,
            embedder,
            options,
        }
    }

    /// Finds the documents that an earlier server saved.
    pub fn find_documents(&self) {
        if let Some(folder) = &self.options.documents {
            self.documents.find(folder);
        }
    }

    /// A number that others cannot guess.
    pub fn random(&self) -> u64 {
        let drawn = self.drawn.fetch_add(1, Ordering::Relaxed);
        self.random.hash_one(drawn)
    }

    /// A name that others cannot guess.
    pub fn id(&self, prefix: &str) -> String {
        format!("{prefix}-{:016x}{:016x}", self.random(), self.random())
    }

    /// Names the weights and all that decides texts.
    pub fn fingerprint(&self) -> String {
        let mut hash = blake3::Hasher::new();
        hash.update(self.model.engine.fingerprint().as_bytes());
        hash.update(&self.model.tokenizer.fingerprint().to_le_bytes());
        format!("fp_{}", &hash.finalize().to_hex()[..16])
    }

    /// What begins an answer.
    pub fn head(&self, prefix: &str, object: &str) -> Head {
        Head {
            id: self.id(prefix),
            object: object.into(),
            created: now(),
            model: self.options.model.clone(),
            system_fingerprint: Some(self.fingerprint()),
            ..Head::default()
        }
    }

    /// Refuses the name of another model.
    pub fn check_model(&self, name: &str) -> Result<()> {
        let own = &self.options.model;
        if name.is_empty() || name == own || self.options.aliases.iter().any(|a| a == name) {
            return Ok(());
        }
        let text = format!("model: {name:?} found, {own:?} is served");
        Err(Failure::new(StatusCode::NOT_FOUND, "model_not_found", text).at("model"))
    }

    /// The window in tokens under a rotary rule.
    pub fn window(&self, rope: Option<&RopeOverride>) -> Result<u64> {
        Ok(match rope {
            None => self.model.engine.window(),
            Some(rope) => self.model.engine.under_rope(Some(rope.clone()))?.window(),
        })
    }

    /// How a text of so many tokens, its answer included, is kept; and why so.
    pub fn policy(
        &self,
        asked: Option<ContextConfig>,
        rope: Option<&RopeOverride>,
        tokens: usize,
    ) -> Result<(EngineOptions, String)> {
        // Rules that read files of this machine are for its owner.
        if let Some(rope) = rope {
            let text = rope.to_string();
            let reads = |part: &str| part.starts_with("longrope") || part.starts_with("clex:");
            if text.split('+').any(reads) {
                let text = format!(
                    "rope: {text:?} found; rules that read files are for the command line of the server"
                );
                return Err(Failure::new(StatusCode::BAD_REQUEST, "invalid_value", text).at("rope"));
            }
        }
        let own = self
            .model
            .engine
            .under_rope(rope.cloned().or_else(|| self.model.engine.rope().cloned()))?;
        let window = own.window();
        let most = self.options.max_tokens;
        if tokens > most {
            return Err(too_long(tokens, most as u64, "prompt and answer together"));
        }
        let (context, why) = match asked.or_else(|| self.options.context.clone()) {
            Some(ContextConfig::InfLlm(config)) if config == InfLlmConfig::default() => (
                ContextConfig::InfLlm(InfLlmConfig::fitting(window)),
                "as asked".into(),
            ),
            Some(config) => (config, "as asked".into()),
            None => auto::choose(&Need {
                tokens: tokens as u64,
                window,
                kv_bytes_per_token: own.kv_bytes_per_token(self.options.kv),
                free_bytes: Some(self.options.schedule.kv_bytes),
                cpu: own.model().device().is_cpu(),
            }),
        };
        if context == ContextConfig::Full && tokens as u64 > window {
            return Err(too_long(
                tokens,
                window,
                "prompt and answer together under context \"full\" (leave context away for a policy that reads on)",
            ));
        }
        let options = EngineOptions {
            kv: self.options.kv,
            context,
        };
        // Says what does not fit before anything waits for it.
        own.sequence(&options, None)?;
        Ok((options, why))
    }
}

/// A prompt that does not fit.
pub fn too_long(found: usize, most: u64, what: &str) -> Failure {
    let text = format!("the maximum is {most} tokens, found {found} tokens for {what}");
    Failure::new(StatusCode::BAD_REQUEST, "context_length_exceeded", text).at("messages")
}

/// Who asks, for the scheduler's fairness: the key's or body's user, else the connection's other end.
pub fn client(peer: Option<&Peer>, user: Option<&serde_json::Value>) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    match (user.and_then(|user| user.as_str()), peer) {
        (Some(user), _) => user.hash(&mut hasher),
        // Programs of one machine are told apart by their connections.
        (None, Some(Peer(address))) if address.ip().is_loopback() => address.hash(&mut hasher),
        (None, Some(Peer(address))) => address.ip().hash(&mut hasher),
        (None, None) => {}
    }
    hasher.finish()
}

/// The whole body of a request, within the server's limits of size and time.
pub async fn read_body(app: &App, body: Body) -> Result<Bytes> {
    let most = app.options.max_body;
    let whole = Limited::new(body, most).collect();
    match tokio::time::timeout(app.options.body_timeout, whole).await {
        Ok(Ok(whole)) => Ok(whole.to_bytes()),
        Ok(Err(error)) if error.downcast_ref::<LengthLimitError>().is_some() => {
            let text = format!("the body has more than {most} bytes");
            Err(Failure::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "body_too_large",
                text,
            ))
        }
        Ok(Err(error)) => {
            let text = format!("the body broke off: {error}");
            Err(Failure::new(StatusCode::BAD_REQUEST, "broken_body", text))
        }
        Err(_) => {
            let limit = app.options.body_timeout.as_secs();
            let text = format!("the body did not come within {limit} s");
            Err(Failure::new(StatusCode::REQUEST_TIMEOUT, "timeout", text))
        }
    }
}

/// All routes.
pub fn router(app: Arc<App>) -> Router {
    let guarded = Router::new()
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions", post(completion::complete))
        .route("/v1/embeddings", post(embedding::embed))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/documents", post(document::upload).get(document::list))
        .route(
            "/v1/documents/{id}",
            get(document::one).delete(document::remove),
        )
        .route("/v1/prefixes", delete(document::forget_prefixes))
        .route("/tokenize", post(models::tokenize))
        .route("/detokenize", post(models::detokenize))
        .route("/metrics", get(metrics::metrics))
        .route_layer(middleware::from_fn_with_state(app.clone(), guard));
    Router::new()
        .route("/", get(page::index))
        .route("/style.css", get(page::style))
        .route("/page.js", get(page::script))
        .route("/openapi.json", get(openapi::document))
        .route("/healthz", get(metrics::health))
        .merge(guarded)
        .method_not_allowed_fallback(wrong_method)
        .fallback(unknown)
        .layer(middleware::from_fn_with_state(app.clone(), count))
        .with_state(app)
}

async fn unknown(request: Request) -> Failure {
    let text = format!(
        "there is nothing at {}; see /openapi.json",
        request.uri().path()
    );
    Failure::new(StatusCode::NOT_FOUND, "unknown_route", text)
}

async fn wrong_method(request: Request) -> Failure {
    let text = format!(
        "{} does not take {}",
        request.uri().path(),
        request.method()
    );
    Failure::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", text)
}

/// The key; and pages of other sites may not use a server that has none.
async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    let refused = match &app.options.key {
        Some(key) => wrong_key(headers, key),
        None => foreign_page(headers),
    };
    match refused {
        Some(failure) => failure.into_response(),
        None => next.run(request).await,
    }
}

fn wrong_key(headers: &HeaderMap, key: &str) -> Option<Failure> {
    let given = headers.get(header::AUTHORIZATION);
    let given = given.and_then(|given| given.to_str().ok()?.strip_prefix("Bearer "));
    // Hashes first: how long a comparison takes then says nothing about the key.
    let same =
        given.is_some_and(|given| blake3::hash(given.as_bytes()) == blake3::hash(key.as_bytes()));
    (!same).then(no_key)
}

fn no_key() -> Failure {
    let text = "the API key is missing or wrong; send \"Authorization: Bearer KEY\"";
    Failure::new(StatusCode::UNAUTHORIZED, "invalid_api_key", text)
}

fn foreign_page(headers: &HeaderMap) -> Option<Failure> {
    let origin = headers.get(header::ORIGIN)?.to_str().unwrap_or("");
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok());
    let own = origin.split_once("://").map(|(_, host)| host);
    (own != host).then(|| {
        let text =
            format!("the page {origin:?} is not this server's; set an API key to allow others");
        Failure::new(StatusCode::FORBIDDEN, "foreign_origin", text)
    })
}

struct InFlight(Arc<App>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.http.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    app.http.in_flight.fetch_add(1, Ordering::Relaxed);
    let flight = InFlight(app.clone());
    let path = request.extensions().get::<MatchedPath>();
    let route = path.map_or("other", MatchedPath::as_str).to_string();
    let response = next.run(request).await;
    drop(flight);
    app.http.answered(&route, response.status().as_u16());
    response
}

/// The connection's other end, where there is one.
pub fn peer(extension: &Option<Extension<Peer>>) -> Option<&Peer> {
    extension.as_ref().map(|Extension(peer)| peer)
}
