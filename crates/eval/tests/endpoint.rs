//! An endpoint that lists its models, counts tokens and echoes log-probabilities.

use longspan_eval::EvalError;
use longspan_eval::target::{Endpoint, EndpointConfig, Target};
use longspan_eval::task::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What the server was asked: path and body.
type Log = Arc<Mutex<Vec<(String, Value)>>>;

/// Tokens are words with the space before them; a chat puts three around a message.
fn pieces(text: &str) -> Vec<&str> {
    let mut cuts: Vec<usize> = text.match_indices(' ').map(|(at, _)| at).collect();
    cuts.retain(|&at| at > 0);
    cuts.push(text.len());
    let mut from = 0;
    let mut all = Vec::new();
    for cut in cuts {
        all.push(&text[from..cut]);
        from = cut;
    }
    all.retain(|piece| !piece.is_empty());
    all
}

fn reply(path: &str, body: &Value, counts: bool) -> (u16, Value) {
    match path {
        "/v1/models" => {
            let mut model = json!({ "id": "words", "object": "model" });
            if counts {
                model["abilities"] = json!(["chat", "complete", "echo", "tokenize"]);
            }
            (200, json!({ "object": "list", "data": [model] }))
        }
        "/tokenize" if counts => {
            if let Some(texts) = body["prompts"].as_array() {
                let count = |text: &Value| pieces(text.as_str().unwrap()).len();
                let counts: Vec<usize> = texts.iter().map(count).collect();
                return (
                    200,
                    json!({ "count": counts.iter().sum::<usize>(), "tokens": [], "counts": counts }),
                );
            }
            let count = match body["prompt"].as_str() {
                Some(text) => pieces(text).len(),
                None => pieces(body["messages"][0]["content"].as_str().unwrap()).len() + 3,
            };
            let tokens: Vec<usize> = (0..count).collect();
            (
                200,
                json!({ "count": count, "tokens": tokens, "max_model_len": 4096 }),
            )
        }
        "/v1/completions" if body["echo"] == true => {
            let text = body["prompt"].as_str().unwrap();
            let (mut offsets, mut at) = (Vec::new(), 0);
            for piece in pieces(text) {
                offsets.push(at);
                at += piece.chars().count();
            }
            let logprobs: Vec<Value> = (0..offsets.len())
                .map(|i| {
                    if i == 0 {
                        Value::Null
                    } else {
                        json!(-(i as f64) / 8.0)
                    }
                })
                .collect();
            let logprobs = json!({ "tokens": pieces(text), "token_logprobs": logprobs, "text_offset": offsets });
            let choice = json!({ "index": 0, "text": text, "finish_reason": "length", "logprobs": logprobs });
            (
                200,
                json!({ "choices": [choice], "usage": { "prompt_tokens": 1, "completion_tokens": 0, "total_tokens": 1 } }),
            )
        }
        "/v1/chat/completions" => {
            let text = body["messages"][0]["content"].as_str().unwrap();
            let choice =
                json!({ "index": 0, "message": { "content": text }, "finish_reason": "stop" });
            (
                200,
                json!({ "choices": [choice], "usage": { "prompt_tokens": 1, "completion_tokens": 1 } }),
            )
        }
        _ => (
            404,
            json!({ "error": { "message": "no such route", "type": "not_found" } }),
        ),
    }
}

fn handle(mut stream: TcpStream, log: &Log, counts: bool) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let path = first.split(' ').nth(1).unwrap_or_default().to_string();
    let (mut length, mut line) = (0, String::new());
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let (status, value) = reply(&path, &body, counts);
    log.lock().unwrap().push((path, body));
    let text = value.to_string();
    write!(
        stream,
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}",
        text.len()
    )?;
    stream.flush()
}

fn serve(counts: bool) -> (u16, Log) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let log = Log::default();
    let kept = log.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = handle(stream, &log, counts);
        }
    });
    (port, kept)
}

fn config(port: u16, model: &str) -> EndpointConfig {
    EndpointConfig {
        url: format!("http://127.0.0.1:{port}/v1"),
        model: model.into(),
        key: None,
        chat: true,
        timeout: Duration::from_secs(10),
        tries: 2,
        pause: Duration::from_millis(2),
        per_minute: None,
    }
}

fn sample(text: &str, work: Work) -> Sample {
    let prompt = Prompt {
        segments: vec![Segment::Unique(text.into())],
        raw: matches!(work, Work::Likelihood { .. }),
        ..Prompt::default()
    };
    Sample::new(prompt, work, Vec::new(), BTreeMap::new(), String::new())
}

#[test]
fn a_server_that_counts_decides_what_a_length_is() {
    let (port, log) = serve(true);
    let target = Endpoint::connect(config(port, ""), || false).unwrap();
    // The only model there.
    assert_eq!(target.model(), "words");
    let counter = target.counter();
    assert_eq!(counter.name(), "the server's tokens");
    assert_eq!(counter.count("one two three").unwrap(), 3);
    assert_eq!(counter.overhead(), 3);
    for tokens in 0..6 {
        let cut = counter.cut("one two thrée four", tokens).unwrap();
        assert_eq!(counter.count(cut).unwrap(), tokens.min(4));
        assert!(tokens < 4 || cut == "one two thrée four");
    }
    // Truncation by the server's tokens.
    let mut long = sample(
        "a b c d e f g h i j",
        Work::Generate(Decode {
            max_new: 5,
            stop: Vec::new(),
        }),
    );
    long.prompt.truncation = Truncation::Middle(6);
    let output = target.run(&long, 0).unwrap();
    assert!(
        output.truncated && pieces(&output.text).len() <= 6,
        "{}",
        output.text
    );
    assert!(output.text.starts_with("a b") && output.text.ends_with("i j"));
    let paths: Vec<String> = log.lock().unwrap().iter().map(|(p, _)| p.clone()).collect();
    assert_eq!(paths[0], "/v1/models");
}

#[test]
fn echoed_log_probabilities_are_a_likelihood() {
    let (port, _) = serve(true);
    let target = Endpoint::connect(config(port, "words"), || false).unwrap();
    let text = "one two three four five six";
    let work = |protocol, tokens| Work::Likelihood { protocol, tokens };
    let output = target
        .run(&sample(text, work(Protocol::Position, 4)), 0)
        .unwrap();
    assert_eq!(output.error, None);
    let likelihood = output.likelihood.unwrap();
    assert_eq!(likelihood.nll, [None, Some(0.125), Some(0.25), Some(0.375)]);
    assert_eq!(likelihood.bytes, " two three four".len());
    assert!(!likelihood.bos);
    let windows = Protocol::Sliding {
        window: 4,
        stride: 2,
    };
    let output = target.run(&sample(text, work(windows, 4)), 0).unwrap();
    assert!(output.error.unwrap().contains("windows"));
}

#[test]
fn without_counts_lengths_are_estimated_and_likelihoods_refused() {
    let (port, _) = serve(false);
    let target = Endpoint::connect(config(port, "another"), || false).unwrap();
    // Gateways serve more names than they list.
    assert_eq!(target.model(), "another");
    assert_eq!(target.counter().name(), "estimated tokens");
    let work = Work::Likelihood {
        protocol: Protocol::Position,
        tokens: 2,
    };
    let output = target.run(&sample("one two three", work), 0).unwrap();
    assert!(output.error.unwrap().contains("counts tokens"));
}

#[test]
fn a_wrong_address_shows_at_the_start() {
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let Err(error) = Endpoint::connect(config(port, "m"), || false) else {
        panic!("connected to nothing");
    };
    assert!(matches!(error, EvalError::Unreachable(_)), "{error}");
}
