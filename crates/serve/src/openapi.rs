//! `GET /openapi.json`: what can be asked, for programs.

use axum::Json;
use serde_json::{Value, json};

fn object(properties: Value, required: &[&str]) -> Value {
    json!({ "type": "object", "properties": properties, "required": required })
}

fn named(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

fn route(summary: &str, body: Option<Value>, answer: Value) -> Value {
    let mut route = json!({
        "summary": summary,
        "responses": {
            "200": { "description": "done", "content": { "application/json": { "schema": answer } } },
            "default": { "description": "an error", "content": { "application/json": { "schema": named("Error") } } },
        },
    });
    if let Some(body) = body {
        route["requestBody"] =
            json!({ "required": true, "content": { "application/json": { "schema": body } } });
    }
    route
}

/// Fields that both requests for text share.
fn shared(own: Value) -> Value {
    let spec = |text: &str| json!({ "description": text, "oneOf": [{ "type": "string" }, { "type": "object" }] });
    let mut all = json!({
        "model": { "type": "string", "description": "the served model's name; may be left out" },
        "stream": { "type": "boolean", "description": "answer in server-sent events, ended by data: [DONE]" },
        "stream_options": object(json!({
            "include_usage": { "type": "boolean" },
            "include_progress": { "type": "boolean", "description": "chunks without choices tell how much of the prompt is read" },
        }), &[]),
        "max_tokens": { "type": "integer", "minimum": 0 },
        "n": { "type": "integer", "minimum": 1, "maximum": longspan_agents::chat::wire::MAX_N },
        "stop": { "oneOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" }, "maxItems": longspan_agents::chat::wire::MAX_STOPS }] },
        "temperature": { "type": "number", "minimum": 0 },
        "top_p": { "type": "number", "exclusiveMinimum": 0, "maximum": 1 },
        "top_k": { "type": "integer", "minimum": 0 },
        "min_p": { "type": "number", "minimum": 0, "maximum": 1 },
        "repetition_penalty": { "type": "number", "exclusiveMinimum": 0 },
        "presence_penalty": { "type": "number", "minimum": -2, "maximum": 2 },
        "frequency_penalty": { "type": "number", "minimum": -2, "maximum": 2 },
        "logit_bias": { "type": "object", "additionalProperties": { "type": "number" } },
        "seed": { "type": "integer" },
        "user": { "type": "string", "description": "requests of one user share a turn in the queue" },
        "context": spec("what later tokens see of a long text: auto, full, window:N, infllm:topk=16, ..."),
        "rope": { "type": "string", "description": "another rotary rule: ntk:2, yarn:4, ..." },
        "decode": spec("the strategy: plain, greedy, lookahead, beam:beams=4, dbs:groups=3, tree:budget=32"),
        "session": { "type": "string", "description": "id of an uploaded document that the prompt is about" },
        "show_context": { "type": "boolean", "description": "report where the model looked" },
    });
    if let (Some(all), Some(own)) = (all.as_object_mut(), own.as_object()) {
        all.extend(own.clone());
    }
    all
}

/// The document.
pub fn spec() -> Value {
    let text = json!({ "type": "string" });
    let number = json!({ "type": "integer" });
    let message = object(
        json!({
            "role": { "enum": ["system", "developer", "user", "assistant"] },
            "content": { "oneOf": [{ "type": "string" }, { "type": "array", "items": object(json!({ "type": { "const": "text" }, "text": text }), &["type", "text"]) }] },
        }),
        &["role", "content"],
    );
    let prompt = json!({ "oneOf": [
        { "type": "string" }, { "type": "array", "items": { "type": "string" } },
        { "type": "array", "items": { "type": "integer" } }, { "type": "array", "items": { "type": "array", "items": { "type": "integer" } } },
    ] });
    let chat = shared(json!({
        "messages": { "type": "array", "items": named("Message"), "minItems": 1 },
        "max_completion_tokens": { "type": "integer", "minimum": 1 },
        "logprobs": { "type": "boolean" },
        "top_logprobs": { "type": "integer", "minimum": 0, "maximum": longspan_agents::chat::wire::MAX_TOP_LOGPROBS },
    }));
    let completion = shared(json!({
        "prompt": prompt,
        "echo": { "type": "boolean", "description": "the prompt is part of the answer; with logprobs it is scored" },
        "logprobs": { "type": "integer", "minimum": 0, "maximum": longspan_agents::chat::wire::MAX_TOP_LOGPROBS },
    }));
    let usage = object(
        json!({ "prompt_tokens": number, "completion_tokens": number, "total_tokens": number }),
        &["prompt_tokens", "completion_tokens", "total_tokens"],
    );
    let reply = object(
        json!({
            "id": text, "object": text, "created": number, "model": text,
            "choices": { "type": "array", "items": { "type": "object" } },
            "usage": usage,
            "longspan": named("Details"),
        }),
        &["id", "object", "created", "model", "choices"],
    );
    let details = object(
        json!({
            "context": text, "decode": text,
            "queue_seconds": { "type": "number" }, "prefill_seconds": { "type": "number" }, "decode_seconds": { "type": "number" },
            "forwards": number,
            "looked": { "type": "array", "items": object(json!({
                "tokens": { "type": "array", "items": number, "minItems": 2, "maxItems": 2 },
                "chars": { "type": "array", "items": number, "minItems": 2, "maxItems": 2 },
                "weight": { "type": "number" },
            }), &["tokens", "weight"]) },
        }),
        &[],
    );
    let document = object(
        json!({
            "id": text, "object": text, "name": text, "created": number, "tokens": number, "chars": number,
            "context": text, "why": text, "rope": text, "read_seconds": { "type": "number" },
            "warnings": { "type": "array", "items": text },
        }),
        &["id", "tokens", "context"],
    );
    let error = object(
        json!({ "error": object(json!({ "message": text, "type": text, "param": { "type": ["string", "null"] }, "code": { "type": ["string", "null"] } }), &["message", "type"]) }),
        &["error"],
    );
    let mut upload = route(
        "Read a document once, to ask about it as session",
        Some(object(
            json!({
                "name": text, "text": text, "context": text, "rope": text,
                "stream": { "type": "boolean", "description": "events {progress: {read, total}}, then {document}" },
            }),
            &["text"],
        )),
        named("Document"),
    );
    upload["requestBody"]["content"]["application/octet-stream"] =
        json!({ "schema": { "type": "string", "format": "binary" } });
    upload["parameters"] = ["name", "context", "rope", "stream"]
        .map(|name| json!({ "name": name, "in": "query", "schema": text, "description": "for files sent as they are" }))
        .into();
    let id = json!([{ "name": "id", "in": "path", "required": true, "schema": text }]);
    let with_id = |mut route: Value| {
        route["parameters"] = id.clone();
        route
    };
    let list = |item: &str| {
        object(
            json!({ "object": text, "data": { "type": "array", "items": named(item) } }),
            &["data"],
        )
    };
    json!({
        "openapi": "3.1.0",
        "info": { "title": "Longspan", "version": env!("CARGO_PKG_VERSION"), "description": "An OpenAI-compatible endpoint with long-context methods" },
        "components": {
            "securitySchemes": { "key": { "type": "http", "scheme": "bearer" } },
            "schemas": {
                "Message": message, "Details": details, "Reply": reply, "Document": document, "Error": error,
                "ChatRequest": object(chat, &["messages"]), "CompletionRequest": object(completion, &["prompt"]),
                "Model": object(json!({ "id": text, "object": text, "created": number, "owned_by": text, "context_window": number, "max_model_len": number, "abilities": { "type": "array", "items": text } }), &["id"]),
            },
        },
        "security": [{ "key": [] }, {}],
        "paths": {
            "/v1/chat/completions": { "post": route("Answer a conversation", Some(named("ChatRequest")), named("Reply")) },
            "/v1/completions": { "post": route("Continue or score a text", Some(named("CompletionRequest")), named("Reply")) },
            "/v1/embeddings": { "post": route("Vectors of texts", Some(object(json!({ "input": prompt, "model": text, "encoding_format": { "enum": ["float", "base64"] } }), &["input"])), json!({ "type": "object" })) },
            "/v1/models": { "get": route("The served model", None, list("Model")) },
            "/v1/models/{id}": { "get": with_id(route("One model", None, named("Model"))) },
            "/v1/documents": { "post": upload, "get": route("The documents", None, list("Document")) },
            "/v1/documents/{id}": {
                "get": with_id(route("A document; ?text=true for its text too", None, named("Document"))),
                "delete": with_id(route("Let a document go", None, json!({ "type": "object" }))),
            },
            "/v1/prefixes": { "delete": route("Let go what is kept of finished talks", None, json!({ "type": "object" })) },
            "/tokenize": { "post": route("Tokens of a text or a conversation", Some(object(json!({ "prompt": text, "prompts": { "type": "array", "items": text, "description": "only their counts are answered" }, "messages": { "type": "array", "items": named("Message") }, "add_special_tokens": { "type": "boolean" }, "return_token_strs": { "type": "boolean" } }), &[])), object(json!({ "tokens": { "type": "array", "items": number }, "count": number, "counts": { "type": "array", "items": number }, "max_model_len": number }), &["tokens"])) },
            "/detokenize": { "post": route("The text of tokens", Some(object(json!({ "tokens": { "type": "array", "items": number } }), &["tokens"])), object(json!({ "prompt": text }), &["prompt"])) },
            "/metrics": { "get": { "summary": "Counters in Prometheus' text form", "responses": { "200": { "description": "done" } } } },
            "/healthz": { "get": { "summary": "200 while the engine runs", "security": [], "responses": { "200": { "description": "it runs" }, "503": { "description": "it does not" } } } },
            "/openapi.json": { "get": { "summary": "This document", "security": [], "responses": { "200": { "description": "done" } } } },
            "/": { "get": { "summary": "A page to try it", "security": [], "responses": { "200": { "description": "HTML" } } } },
        },
    })
}

/// `GET /openapi.json`
pub async fn document() -> Json<Value> {
    Json(spec())
}
