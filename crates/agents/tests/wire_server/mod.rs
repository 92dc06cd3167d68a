//! A small HTTP server in the OpenAI dialect over any chat model, for tests of the client: one thread per connection,
//! one request per connection, and faults on demand.
#![allow(dead_code)]

use longspan_agents::chat::local::Finish;
use longspan_agents::chat::model::{Ability, Call, ChatError, ChatModel, Input, Reply, Request};
use longspan_agents::chat::wire::{self, ErrorBody};
use longspan_infer::decode::DecodeConfig;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// An answer in place of the real one: a status with headers and a body, or raw bytes.
#[derive(Clone)]
pub enum Fault {
    Status(u16, &'static str, &'static str),
    Raw(Vec<u8>),
    /// Accept and never answer until the client goes.
    Silence,
}

pub struct Server {
    pub url: String,
    /// Answers in order of requests before the model is asked.
    pub faults: Arc<Mutex<Vec<Fault>>>,
    pub requests: Arc<AtomicUsize>,
    /// Generations under way.
    pub running: Arc<AtomicU64>,
    pub bodies: Arc<Mutex<Vec<Value>>>,
}

impl Server {
    pub fn start(model: Arc<dyn ChatModel>) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Server {
            url: format!("http://{}/v1", listener.local_addr().unwrap()),
            faults: Arc::default(),
            requests: Arc::default(),
            running: Arc::default(),
            bodies: Arc::default(),
        };
        let shared = (
            Arc::clone(&server.faults),
            Arc::clone(&server.requests),
            Arc::clone(&server.running),
            Arc::clone(&server.bodies),
        );
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let model = Arc::clone(&model);
                let (faults, requests, running, bodies) = shared.clone();
                std::thread::spawn(move || {
                    let _ = serve(stream, &*model, &faults, &requests, &running, &bodies);
                });
            }
        });
        server
    }
}

fn respond(stream: &mut TcpStream, status: u16, headers: &str, body: &str) -> std::io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 {status} x\r\ncontent-type: application/json\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
}

fn serve(
    mut stream: TcpStream,
    model: &dyn ChatModel,
    faults: &Mutex<Vec<Fault>>,
    requests: &AtomicUsize,
    running: &AtomicU64,
    bodies: &Mutex<Vec<Value>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split_whitespace().nth(1).unwrap_or("").to_string();
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        if header.trim().is_empty() {
            break;
        }
        if let Some(value) = header.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let counted = path != "/v1/models" && path != "/tokenize";
    if counted {
        requests.fetch_add(1, Ordering::SeqCst);
        bodies
            .lock()
            .unwrap()
            .push(serde_json::from_slice(&body).unwrap_or(Value::Null));
        let fault = {
            let mut faults = faults.lock().unwrap();
            (!faults.is_empty()).then(|| faults.remove(0))
        };
        match fault {
            None => {}
            Some(Fault::Status(status, headers, body)) => {
                return respond(&mut stream, status, headers, body);
            }
            Some(Fault::Raw(bytes)) => return stream.write_all(&bytes),
            Some(Fault::Silence) => {
                let mut rest = Vec::new();
                let _ = reader.read_to_end(&mut rest);
                return Ok(());
            }
        }
    }
    let answer = match path.as_str() {
        "/v1/models" => Ok(models(model)),
        "/tokenize" => tokenize(model, &body),
        "/v1/embeddings" => embeddings(model, &body),
        "/v1/chat/completions" => return write_chat(stream, model, &body, running),
        "/v1/completions" => return write_completion(stream, model, &body, running),
        _ => Err((404, ErrorBody::invalid("path", "no such route"))),
    };
    send(&mut stream, answer)
}

fn send(stream: &mut TcpStream, answer: Result<Value, (u16, ErrorBody)>) -> std::io::Result<()> {
    match answer {
        Ok(value) => respond(stream, 200, "", &value.to_string()),
        Err((status, error)) => respond(stream, status, "", &json!({ "error": error }).to_string()),
    }
}

fn models(model: &dyn ChatModel) -> Value {
    let card = model.card();
    let abilities = [
        ("chat", Ability::Chat),
        ("complete", Ability::Complete),
        ("logprobs", Ability::Logprobs),
        ("echo", Ability::Score),
        ("embed", Ability::Embed),
    ];
    let mut names: Vec<&str> = abilities
        .iter()
        .filter(|(_, a)| card.can(*a))
        .map(|(name, _)| *name)
        .collect();
    names.push("tokenize");
    json!({"object": "list", "data": [{"id": "served", "max_model_len": card.window, "fingerprint": card.fingerprint,
        "abilities": names, "embedding_dim": card.embedding_dim}]})
}

fn bad(error: ErrorBody) -> (u16, ErrorBody) {
    (400, error)
}

fn failed(error: ChatError) -> (u16, ErrorBody) {
    match error {
        ChatError::ContextOverflow { .. } => {
            bad(ErrorBody::invalid("messages", error.to_string())
                .with_code("context_length_exceeded"))
        }
        ChatError::BadRequest(text) | ChatError::Store(text) => bad(ErrorBody::invalid("", text)),
        error => (500, ErrorBody::invalid("", error.to_string())),
    }
}

fn tokenize(model: &dyn ChatModel, body: &[u8]) -> Result<Value, (u16, ErrorBody)> {
    let request: wire::TokenizeRequest = wire::read(body).map_err(bad)?;
    if let Some(texts) = request.prompts {
        let counts: Result<Vec<usize>, _> = texts
            .iter()
            .map(|text| Ok(model.count_text(text).map_err(failed)?.tokens))
            .collect();
        return Ok(json!({"counts": counts?}));
    }
    let input = match (request.messages, request.prompt) {
        (Some(messages), _) => Input::Chat(wire::turns(&messages).map_err(bad)?),
        (None, prompt) => Input::Text(prompt.unwrap_or_default()),
    };
    Ok(json!({"count": model.count(&input).map_err(failed)?.tokens, "tokens": []}))
}

fn embeddings(model: &dyn ChatModel, body: &[u8]) -> Result<Value, (u16, ErrorBody)> {
    let request: wire::EmbeddingRequest = wire::read(body).map_err(bad)?;
    let wire::Prompt::Texts(texts) = request.input else {
        return Err(bad(ErrorBody::invalid("input", "a list of texts expected")));
    };
    let found = model.embed(&texts, &Call::default()).map_err(failed)?;
    // Out of order, as the dialect allows.
    let data = found.vectors.iter().enumerate().rev();
    let data: Vec<Value> = data
        .map(|(index, vector)| json!({"index": index, "embedding": vector}))
        .collect();
    Ok(json!({"object": "list", "data": data, "usage": {"prompt_tokens": found.tokens}}))
}

fn finish(reply: &Reply) -> &'static str {
    match reply.finish {
        Finish::Length => "length",
        _ => "stop",
    }
}

fn usage(reply: &Reply) -> Value {
    json!({"prompt_tokens": reply.usage.prompt, "completion_tokens": reply.usage.completion,
        "total_tokens": reply.usage.prompt + reply.usage.completion,
        "prompt_tokens_details": {"cached_tokens": reply.usage.cached}})
}

/// Counts a generation while it lives.
struct Under<'a>(&'a AtomicU64);

impl<'a> Under<'a> {
    fn new(count: &'a AtomicU64) -> Under<'a> {
        count.fetch_add(1, Ordering::SeqCst);
        Under(count)
    }
}

impl Drop for Under<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Streams what the model writes; stops when the client has gone.
fn generate(
    stream: &mut TcpStream,
    model: &dyn ChatModel,
    request: &Request,
    running: &AtomicU64,
    chunk: &dyn Fn(&str) -> Value,
    last: &dyn Fn(&Reply) -> Vec<Value>,
) -> std::io::Result<()> {
    let _under = Under::new(running);
    let mut head = false;
    let mut broken = None;
    let result = model.reply(request, &Call::default(), &mut |piece| {
        let mut write = || -> std::io::Result<()> {
            if piece.is_empty() {
                return Ok(());
            }
            if !std::mem::replace(&mut head, true) {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n: hello\n\n")?;
            }
            // In two writes, to part characters and events.
            let event = format!("data: {}\n\n", chunk(piece));
            let (a, b) = event.as_bytes().split_at(event.len() / 2);
            stream.write_all(a)?;
            stream.flush()?;
            stream.write_all(b)
        };
        match write() {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                broken = Some(error);
                ControlFlow::Break(())
            }
        }
    });
    if let Some(error) = broken {
        return Err(error);
    }
    match result {
        Err(error) if !head => send(stream, Err(failed(error))),
        Err(error) => write!(stream, "data: {}\n\n", json!({ "error": failed(error).1 })),
        Ok(reply) => {
            if !head {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")?;
            }
            for value in last(&reply) {
                write!(stream, "data: {value}\r\n\r\n")?;
            }
            stream.write_all(b"data: [DONE]\n\n")
        }
    }
}

fn write_chat(
    mut stream: TcpStream,
    model: &dyn ChatModel,
    body: &[u8],
    running: &AtomicU64,
) -> std::io::Result<()> {
    let parsed = (|| {
        let body: wire::ChatRequest = wire::read(body).map_err(bad)?;
        body.check().map_err(bad)?;
        let mut request = Request::chat(wire::turns(&body.messages).map_err(bad)?);
        request.max_tokens = body.max_new_tokens().unwrap_or(16);
        request.stop = body.stops();
        request.sampling = body
            .sampling(&DecodeConfig::Plain, 0, body.wanted_logprobs())
            .map_err(bad)?;
        request.decode = body.strategy().map_err(bad)?;
        Ok((request, body.streams()))
    })();
    let (request, streams) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return send(&mut stream, Err(error)),
    };
    if streams {
        let chunk = |piece: &str| json!({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": null}]});
        let last = |reply: &Reply| {
            let logprobs = request
                .sampling
                .logprobs
                .map(|_| json!({ "content": reply.logprobs }));
            vec![
                json!({"choices": [{"index": 0, "delta": {}, "logprobs": logprobs, "finish_reason": finish(reply)}]}),
                json!({"choices": [], "usage": usage(reply)}),
            ]
        };
        return generate(&mut stream, model, &request, running, &chunk, &last);
    }
    let _under = Under::new(running);
    let answer = model
        .ask(&request, &Call::default())
        .map_err(failed)
        .map(|reply| {
            let logprobs = request
                .sampling
                .logprobs
                .map(|_| json!({ "content": reply.logprobs }));
            json!({"choices": [{"index": 0, "message": {"role": "assistant", "content": reply.text},
            "logprobs": logprobs, "finish_reason": finish(&reply)}], "usage": usage(&reply)})
        });
    send(&mut stream, answer)
}

fn completion_logprobs(reply: &Reply) -> Value {
    let tops: Vec<Value> = reply
        .logprobs
        .iter()
        .map(|entry| {
            entry
                .top_logprobs
                .iter()
                .map(|top| (top.token.clone(), json!(top.logprob)))
                .collect::<serde_json::Map<_, _>>()
                .into()
        })
        .collect();
    json!({
        "tokens": reply.logprobs.iter().map(|entry| &entry.token).collect::<Vec<_>>(),
        "token_logprobs": reply.logprobs.iter().map(|entry| entry.logprob).collect::<Vec<_>>(),
        "top_logprobs": tops, "text_offset": vec![0; reply.logprobs.len()],
    })
}

fn write_completion(
    mut stream: TcpStream,
    model: &dyn ChatModel,
    body: &[u8],
    running: &AtomicU64,
) -> std::io::Result<()> {
    let parsed = (|| {
        let body: wire::CompletionRequest = wire::read(body).map_err(bad)?;
        body.check().map_err(bad)?;
        let wire::Prompt::Text(text) = &body.prompt else {
            return Err(bad(ErrorBody::invalid("prompt", "a text expected")));
        };
        let mut request = Request::text(text);
        request.max_tokens = body.max_tokens.unwrap_or(16);
        request.stop = body.stops();
        request.sampling = body
            .sampling(&DecodeConfig::Plain, 0, body.logprobs)
            .map_err(bad)?;
        Ok((
            request,
            body.streams(),
            body.echo == Some(true),
            text.clone(),
        ))
    })();
    let (request, streams, echo, text) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return send(&mut stream, Err(error)),
    };
    if echo {
        let answer = model.score("", &text, &Call::default()).map_err(failed).map(|scores| {
            // The first token has no score; where one is missing it stands before the others.
            let mut offset = text.chars().count();
            let mut offsets = vec![0; scores.len()];
            for (index, score) in scores.iter().enumerate().rev() {
                offset = offset.saturating_sub(score.token.chars().count());
                offsets[index] = offset;
            }
            json!({"choices": [{"index": 0, "text": text, "finish_reason": "length", "logprobs": {
                "tokens": scores.iter().map(|s| &s.token).collect::<Vec<_>>(),
                "token_logprobs": scores.iter().map(|s| s.logprob).collect::<Vec<_>>(),
                "top_logprobs": null, "text_offset": offsets}}]})
        });
        return send(&mut stream, answer);
    }
    if streams {
        let chunk =
            |piece: &str| json!({"choices": [{"index": 0, "text": piece, "finish_reason": null}]});
        let last = |reply: &Reply| {
            let logprobs = request
                .sampling
                .logprobs
                .map(|_| completion_logprobs(reply));
            vec![
                json!({"choices": [{"index": 0, "text": "", "logprobs": logprobs, "finish_reason": finish(reply)}]}),
                json!({"choices": [], "usage": usage(reply)}),
            ]
        };
        return generate(&mut stream, model, &request, running, &chunk, &last);
    }
    let _under = Under::new(running);
    let answer = model.ask(&request, &Call::default()).map_err(failed).map(|reply| {
        let logprobs = request.sampling.logprobs.map(|_| completion_logprobs(&reply));
        json!({"choices": [{"index": 0, "text": reply.text, "logprobs": logprobs, "finish_reason": finish(&reply)}],
            "usage": usage(&reply)})
    });
    send(&mut stream, answer)
}
