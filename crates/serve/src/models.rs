//! `GET /v1/models`, `POST /tokenize`, `POST /detokenize`

use crate::app::{App, read_body};
use crate::error::{Failure, Result};
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use longspan_agents::chat::local::ModelError;
use longspan_agents::chat::wire::{self, ModelInfo, ModelList, TokenizeReply, TokenizeRequest};
use longspan_data::tokenize::Special;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

fn info(app: &App) -> ModelInfo {
    let mut abilities = vec![
        "chat",
        "complete",
        "logprobs",
        "echo",
        "tokenize",
        "documents",
        "read_ahead",
    ];
    if app.embedder.is_some() {
        abilities.push("embed");
    }
    ModelInfo {
        id: app.options.model.clone(),
        object: "model".into(),
        created: app.started,
        owned_by: "longspan".into(),
        context_window: Some(app.model.engine.window()),
        max_model_len: Some(app.options.max_tokens as u64),
        fingerprint: Some(app.fingerprint()),
        aliases: app.options.aliases.clone(),
        abilities: abilities.into_iter().map(str::to_string).collect(),
        embedding_dim: app.embedder.as_ref().map(|embedder| embedder.dim()),
    }
}

/// `GET /v1/models`
pub async fn list(State(app): State<Arc<App>>) -> Json<ModelList> {
    Json(ModelList {
        object: "list".into(),
        data: vec![info(&app)],
    })
}

/// `GET /v1/models/{id}`
pub async fn one(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<ModelInfo>> {
    app.check_model(&id)?;
    Ok(Json(info(&app)))
}

fn wrong(error: longspan_data::tokenize::TokenizerError) -> Failure {
    ModelError::from(error).into()
}

/// `POST /tokenize`
pub async fn tokenize(State(app): State<Arc<App>>, body: Body) -> Result<Json<TokenizeReply>> {
    let body = read_body(&app, body).await?;
    let request: TokenizeRequest = wire::read(&body)?;
    app.check_model(&request.model)?;
    let tokenizer = &app.model.tokenizer;
    let special = match request.add_special_tokens {
        Some(false) => Special::None,
        _ => Special::ParseWithBos,
    };
    let tokens = match (&request.prompt, &request.messages, &request.prompts) {
        (Some(text), None, None) => tokenizer.encode(text, special).map_err(wrong)?,
        (None, Some(messages), None) => app.model.conversation(&wire::turns(messages)?)?,
        (None, None, Some(texts)) => {
            let count = |text: &String| Ok(tokenizer.encode(text, special).map_err(wrong)?.len());
            let counts = texts.iter().map(count).collect::<Result<Vec<usize>>>()?;
            return Ok(Json(TokenizeReply {
                count: counts.iter().sum(),
                max_model_len: app.options.max_tokens as u64,
                counts: Some(counts),
                ..TokenizeReply::default()
            }));
        }
        _ => {
            let text = "prompt, prompts or messages: one of the three is expected";
            return Err(Failure::new(StatusCode::BAD_REQUEST, "invalid_value", text).at("prompt"));
        }
    };
    let texts = request.return_token_strs.then(|| {
        let text = |&id: &u32| String::from_utf8_lossy(&tokenizer.token_bytes(id)).into_owned();
        tokens.iter().map(text).collect()
    });
    Ok(Json(TokenizeReply {
        count: tokens.len(),
        max_model_len: app.options.max_tokens as u64,
        counts: None,
        token_strs: texts,
        tokens,
    }))
}

/// The body of `POST /detokenize`.
#[derive(Deserialize)]
pub struct Detokenize {
    tokens: Vec<u32>,
}

/// Its answer.
#[derive(Serialize)]
pub struct Detokenized {
    prompt: String,
}

/// `POST /detokenize`
pub async fn detokenize(State(app): State<Arc<App>>, body: Body) -> Result<Json<Detokenized>> {
    let request: Detokenize = wire::read(&read_body(&app, body).await?)?;
    let prompt = app.model.tokenizer.decode(&request.tokens);
    Ok(Json(Detokenized { prompt }))
}
