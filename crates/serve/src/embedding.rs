//! `POST /v1/embeddings`

use crate::app::{App, read_body};
use crate::error::{Failure, Result};
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use longspan_agents::chat::wire::{
    self, Embedding, EmbeddingReply, EmbeddingRequest, Prompt, Usage, Vector,
};
use std::sync::Arc;

/// Texts of one request.
const MAX_TEXTS: usize = 2048;

/// The handler.
pub async fn embed(State(app): State<Arc<App>>, body: Body) -> Result<Json<EmbeddingReply>> {
    let request: EmbeddingRequest = wire::read(&read_body(&app, body).await?)?;
    let Some(embedder) = app.embedder.clone() else {
        let text = "no embedding model is loaded; start the server with --embedder MODEL";
        return Err(Failure::new(StatusCode::NOT_FOUND, "model_not_found", text).at("model"));
    };
    let wrong = |field: &str, text: String| {
        Failure::new(StatusCode::BAD_REQUEST, "invalid_value", text).at(field)
    };
    let texts = match request.input {
        Prompt::Text(text) => vec![text],
        Prompt::Texts(texts) => texts,
        Prompt::Tokens(_) | Prompt::TokenLists(_) => {
            let text = "input: token ids found, texts expected: the embedding model has a tokenizer of its own";
            return Err(wrong("input", text.into()));
        }
    };
    if texts.is_empty() || texts.len() > MAX_TEXTS {
        let text = format!(
            "input: {} texts found, 1 to {MAX_TEXTS} expected",
            texts.len()
        );
        return Err(wrong("input", text));
    }
    let base64 = match request.encoding_format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => {
            let text = format!("encoding_format: {other:?} found, float or base64 expected");
            return Err(wrong("encoding_format", text));
        }
    };
    let dim = embedder.dim();
    if request.dimensions.is_some_and(|wanted| wanted != dim) {
        let text = format!(
            "dimensions: {} found, this model has {dim}",
            request.dimensions.unwrap_or_default()
        );
        return Err(wrong("dimensions", text));
    }
    // Long work of a processor: not on the threads that serve connections.
    let work = tokio::task::spawn_blocking(move || {
        let refs: Vec<&str> = texts.iter().map(String::as_str).collect();
        let count = |text: &&str| embedder.tokens(text).map_or(0, |tokens| tokens.len());
        let count = refs.iter().map(count).sum();
        embedder.embed(&refs).map(|vectors| (vectors, count))
    });
    let failed =
        |text: String| Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", text);
    let found = work.await.map_err(|error| failed(error.to_string()))?;
    let (vectors, tokens) = found.map_err(|error| failed(error.to_string()))?;
    let data = vectors
        .chunks_exact(dim)
        .enumerate()
        .map(|(index, row)| Embedding {
            object: "embedding".into(),
            index,
            embedding: match base64 {
                true => Vector::Base64(encode_base64(row)),
                false => Vector::Floats(row.to_vec()),
            },
        });
    Ok(Json(EmbeddingReply {
        object: "list".into(),
        data: data.collect(),
        model: request.model,
        usage: Some(Usage {
            prompt_tokens: tokens,
            total_tokens: tokens,
            ..Usage::default()
        }),
    }))
}

/// Little-endian f32 in base64.
fn encode_base64(row: &[f32]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = row.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let word = group.iter().enumerate().fold(0u32, |word, (at, &byte)| {
            word | u32::from(byte) << (16 - 8 * at)
        });
        for at in 0..4 {
            text.push(match at <= group.len() {
                true => char::from(LETTERS[(word >> (18 - 6 * at)) as usize & 63]),
                false => '=',
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::encode_base64;

    #[test]
    fn base64_of_floats() {
        assert_eq!(encode_base64(&[1.0]), "AACAPw==");
        assert_eq!(encode_base64(&[1.0, -2.5]), "AACAPwAAIMA=");
        assert_eq!(encode_base64(&[1.0, -2.5, 0.0]), "AACAPwAAIMAAAAAA");
    }
}
