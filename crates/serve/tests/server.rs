//! The server over real sockets, with a tiny model: the dialect, the seam's conformance suite, bad input, clients that
//! are slow or go away, many at once, restarts; and pages return to zero.

#[path = "../../../tests/golden.rs"]
mod golden;

use candle_core::Device;
use longspan_agents::LocalModel;
use longspan_agents::chat::conformance::{self, Probe};
use longspan_agents::chat::local_chat::LocalChat;
use longspan_agents::chat::model::{Call, ChatModel};
use longspan_agents::chat::openai::{OpenAiConfig, OpenAiModel};
use longspan_infer::context::ContextConfig;
use longspan_infer::kv::plane::live_planes;
use longspan_infer::{Engine, EngineOptions};
use longspan_kernels::attention::KvDtype;
use longspan_nn::model::{Decoder, Precision};
use longspan_nn::weights::Checkpoint;
use longspan_serve::{ServeError, ServeOptions, Server};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

/// Planes are counted for the whole process, so tests take turns.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|poison| poison.into_inner())
}

fn model() -> Arc<LocalModel> {
    static MODEL: OnceLock<Arc<LocalModel>> = OnceLock::new();
    let load = || {
        let path = golden::root().join("tiny-models/gguf-llama/model.gguf");
        let checkpoint = Checkpoint::open(&path).unwrap();
        let mut config = checkpoint.config.clone();
        config.context_length = 4096;
        let weights = &*checkpoint.weights;
        let decoder = Decoder::load(&config, weights, Precision::Packed, &Device::Cpu).unwrap();
        let engine = Engine::new(decoder, checkpoint.fingerprint.to_string()).unwrap();
        Arc::new(LocalModel::new(engine, checkpoint.tokenizer).unwrap())
    };
    MODEL.get_or_init(load).clone()
}

fn options() -> ServeOptions {
    let mut options = ServeOptions::new("tiny");
    options.address = ([127, 0, 0, 1], 0).into();
    options.kv = KvDtype::F32;
    options.max_tokens = 4096;
    options.schedule.prefix_bytes = 0;
    options
}

fn start(change: impl FnOnce(&mut ServeOptions)) -> Server {
    let mut options = options();
    change(&mut options);
    Server::start(model(), None, options).unwrap()
}

struct Reply {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The events of a stream; panics unless it ends as it should.
    fn events(&self) -> Vec<Value> {
        let text = String::from_utf8(self.body.clone()).unwrap();
        let mut data: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{text}");
        data.iter()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

/// Everything that comes until the other end closes, put together again if it came in chunks.
fn receive(stream: &mut TcpStream) -> Reply {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let end = bytes
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .expect("a head");
    let head = String::from_utf8(bytes[..end].to_vec())
        .unwrap()
        .to_lowercase();
    let mut rest = &bytes[end + 4..];
    let mut body = Vec::new();
    if head.contains("transfer-encoding: chunked") {
        loop {
            let line = rest.windows(2).position(|w| w == b"\r\n").expect("a chunk");
            let size =
                usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap(), 16).unwrap();
            if size == 0 {
                break;
            }
            body.extend_from_slice(&rest[line + 2..line + 2 + size]);
            rest = &rest[line + 2 + size + 2..];
        }
    } else {
        body = rest.to_vec();
    }
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Reply { status, head, body }
}

fn send(address: SocketAddr, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    // A server that refuses a body may close before it has it all.
    let _ = stream.write_all(body);
    stream
}

fn call(server: &Server, method: &str, path: &str, body: &Value) -> Reply {
    let body = match body {
        Value::Null => Vec::new(),
        body => body.to_string().into_bytes(),
    };
    let headers = "Content-Type: application/json\r\n";
    receive(&mut send(server.address(), method, path, headers, &body))
}

fn chat(text: &str, more: Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": text }], "max_tokens": 8, "temperature": 0 });
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    body
}

fn soon(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

const CHAT: &str = "/v1/chat/completions";

#[test]
fn the_endpoint_client_keeps_the_laws_of_the_seam() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let server = start(|_| {});
    let config = OpenAiConfig::new(&format!("http://{}/v1", server.address()), "");
    let remote: Arc<dyn ChatModel> = Arc::new(
        OpenAiModel::new(config)
            .unwrap()
            .connect(&Call::default())
            .unwrap(),
    );
    let mut probe = Probe::new(folder.path());
    probe.held = Some(&live_planes);
    let outcomes = conformance::run(&remote, &probe);
    let broken = conformance::broken(&outcomes);
    assert!(broken.is_empty(), "{broken}");
    let own = EngineOptions {
        kv: KvDtype::F32,
        context: ContextConfig::Full,
    };
    let local: Arc<dyn ChatModel> = Arc::new(LocalChat::new(model(), "tiny", own, 0).unwrap());
    conformance::agree(&remote, &local, &probe).unwrap();
}

#[test]
fn a_chunk_that_was_read_ahead_is_not_read_again() {
    use longspan_agents::chat::model::{Ability, Request};
    use longspan_agents::workflow::Silent;
    use longspan_agents::workflow::chain::{Chain, ChainConfig};
    let _turn = turn();
    let server = start(|options| options.schedule.prefix_bytes = 64 << 20);
    let config = OpenAiConfig::new(&format!("http://{}/v1", server.address()), "");
    let model = OpenAiModel::new(config).unwrap();
    let model = model.connect(&Call::default()).unwrap();
    assert!(model.card().can(Ability::ReadAhead));
    let text: String = (0..40)
        .map(|i| format!("On day {i} the keeper wrote of rain. "))
        .collect();
    let begun = Request::user(format!("{text}\n\n"));
    model.prepare(&begun.input, &Call::default()).unwrap();
    let whole = Request::user(format!("{text}\n\nWhat of it?")).max_tokens(4);
    let usage = model.ask(&whole, &Call::default()).unwrap().usage;
    let read = model.count_text(&text).unwrap().tokens;
    assert!(
        usage.cached + 8 > read && usage.cached < usage.prompt,
        "{usage:?} {read}"
    );
    // A chain over the server: workers after the first find their chunks there.
    let config = ChainConfig {
        window: 1600,
        max_output: 16,
        guard: false,
        ..ChainConfig::default()
    };
    let found = Chain::new(&model, config)
        .run(&text.repeat(2), "What?", &Call::default(), &mut Silent)
        .unwrap();
    assert!(found.chunks >= 2, "{found:?}");
    let failed = |event: &String| event.contains("read ahead");
    assert!(!found.events.iter().any(failed), "{found:?}");
    assert!(found.took.usage.cached > 400, "{:?}", found.took);
}

#[test]
fn counts_of_many_texts_are_those_of_each() {
    let _turn = turn();
    let server = start(|options| options.aliases = vec!["other-name".into()]);
    let texts = ["Hello there", "", "<s>", "é"];
    let count = |body: Value| call(&server, "POST", "/tokenize", &body).json();
    let all =
        count(json!({ "model": "other-name", "prompts": texts, "add_special_tokens": false }));
    for (at, text) in texts.iter().enumerate() {
        let one = count(json!({ "prompt": text, "add_special_tokens": false }));
        assert_eq!(all["counts"][at], one["count"], "{text}");
    }
    let wrong = call(
        &server,
        "POST",
        "/tokenize",
        &json!({ "prompt": "x", "prompts": ["y"] }),
    );
    assert_eq!(
        (wrong.status, wrong.json()["error"]["param"].as_str()),
        (400, Some("prompt"))
    );
}

#[test]
fn streams_fold_to_whole_answers() {
    let _turn = turn();
    let before = live_planes();
    let server = start(|_| {});
    let whole = call(
        &server,
        "POST",
        CHAT,
        &chat(
            "hello there",
            json!({ "n": 2, "logprobs": true, "top_logprobs": 2 }),
        ),
    );
    assert_eq!(
        whole.status,
        200,
        "{}",
        String::from_utf8_lossy(&whole.body)
    );
    let whole = whole.json();
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["choices"].as_array().unwrap().len(), 2);
    // Greedy answers are alike.
    assert_eq!(
        whole["choices"][0]["message"],
        whole["choices"][1]["message"]
    );
    let stream = call(
        &server,
        "POST",
        CHAT,
        &chat(
            "hello there",
            json!({ "stream": true, "stream_options": { "include_usage": true, "include_progress": true }, "logprobs": true, "top_logprobs": 2 }),
        ),
    );
    assert!(stream.head.contains("content-type: text/event-stream"));
    let events = stream.events();
    let mut text = String::new();
    let mut tokens = Vec::new();
    for event in events.iter().filter(|event| event["choices"] != json!([])) {
        let choice = &event["choices"][0];
        text += choice["delta"]["content"].as_str().unwrap_or("");
        if let Some(list) = choice["logprobs"]["content"].as_array() {
            tokens.extend(list.clone());
        }
    }
    assert_eq!(
        text,
        whole["choices"][0]["message"]["content"].as_str().unwrap()
    );
    assert_eq!(
        Value::from(tokens),
        whole["choices"][0]["logprobs"]["content"]
    );
    let usage = &events.last().unwrap()["usage"];
    assert_eq!(usage["prompt_tokens"], whole["usage"]["prompt_tokens"]);
    assert_eq!(
        whole["usage"]["completion_tokens"],
        usage["completion_tokens"].as_u64().unwrap() * 2
    );
    assert!(
        events
            .iter()
            .any(|event| event["progress"]["total"] == usage["prompt_tokens"])
    );
    assert_eq!(
        events[events.len() - 2]["choices"][0]["finish_reason"],
        whole["choices"][0]["finish_reason"]
    );
    // Completions, echoed.
    let body = json!({ "prompt": "hello there", "max_tokens": 5, "temperature": 0, "echo": true, "logprobs": 1 });
    let plain = call(&server, "POST", "/v1/completions", &body).json();
    let lists = &plain["choices"][0]["logprobs"];
    let text = plain["choices"][0]["text"].as_str().unwrap();
    assert!(text.starts_with("hello there"), "{text}");
    let written = plain["usage"]["total_tokens"].as_u64().unwrap() as usize;
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let len = lists[list].as_array().unwrap().len();
        assert!(
            len == written || len + 1 == written,
            "{list}: {len} of {written}"
        );
    }
    assert_eq!(lists["token_logprobs"][0], Value::Null);
    let mut body = body;
    body["stream"] = json!(true);
    let events = call(&server, "POST", "/v1/completions", &body).events();
    let (mut streamed, mut offsets) = (String::new(), Vec::new());
    for event in &events {
        streamed += event["choices"][0]["text"].as_str().unwrap();
        if let Some(list) = event["choices"][0]["logprobs"]["text_offset"].as_array() {
            offsets.extend(list.clone());
        }
    }
    assert_eq!(streamed, text);
    assert_eq!(Value::from(offsets), lists["text_offset"]);
    soon("pages return", || live_planes() == before);
}

#[test]
fn documents_are_read_once_and_outlive_the_server() {
    let _turn = turn();
    let before = live_planes();
    let folder = tempfile::tempdir().unwrap();
    let text: String = (0..60)
        .map(|i| format!("Line {i}: the cäptain keeps {} keys. ", i * 7))
        .collect();
    let ask = |server: &Server, id: &str, more: Value| {
        let mut body = chat(
            "How many keys?",
            json!({ "session": id, "show_context": true }),
        );
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        call(server, "POST", CHAT, &body)
    };
    let (id, answer) = {
        let server = start(|options| options.documents = Some(folder.path().into()));
        let upload = json!({ "name": "keys", "text": text, "context": "full", "stream": true });
        let events = call(&server, "POST", "/v1/documents", &upload).events();
        let info = &events.last().unwrap()["document"];
        let id = info["id"].as_str().unwrap().to_string();
        let tokens = info["tokens"].as_u64().unwrap();
        assert!(
            events
                .iter()
                .any(|event| event["progress"]["read"] == tokens)
        );
        let first = ask(&server, &id, json!({}));
        assert_eq!(
            first.status,
            200,
            "{}",
            String::from_utf8_lossy(&first.body)
        );
        let first = first.json();
        assert_eq!(
            first["usage"]["prompt_tokens_details"]["cached_tokens"],
            tokens
        );
        let second = ask(&server, &id, json!({})).json();
        assert_eq!(first["choices"], second["choices"]);
        // Where it looked is in the text.
        let looked = first["longspan"]["looked"].as_array().unwrap();
        let share: f64 = looked
            .iter()
            .map(|look| look["weight"].as_f64().unwrap())
            .sum();
        assert!((share - 1.0).abs() < 1e-3, "{share}");
        let chars = text.chars().count() as u64;
        assert!(
            looked
                .iter()
                .filter_map(|look| look["chars"][1].as_u64())
                .all(|end| end <= chars)
        );
        assert!(looked.iter().any(|look| look["chars"].is_array()));
        // The same as the command line: document, then question.
        let model = model();
        let prompt = model.ask(&text, "How many keys?").unwrap();
        let own = EngineOptions {
            kv: KvDtype::F32,
            context: ContextConfig::Full,
        };
        let mut sequence = model.engine.sequence(&own, None).unwrap();
        sequence.expect_length(prompt.document.len() + 2048);
        for piece in prompt.document.chunks(sequence.spec().chunk) {
            model
                .engine
                .forward(
                    &mut [(&mut sequence, piece)],
                    longspan_infer::engine::Want::Nothing,
                )
                .unwrap();
        }
        let logits = model
            .engine
            .prefill(&mut sequence, &prompt.question, &mut |_, _| {
                Ok(std::ops::ControlFlow::Continue(()))
            })
            .unwrap();
        let mut strategy = longspan_infer::decode::sample::parse("greedy", 0).unwrap();
        let limits = longspan_agents::Limits {
            max_tokens: 8,
            stop: Vec::new(),
        };
        let by_hand = model
            .generate(&mut sequence, logits, &mut *strategy, &limits, &mut |_| {
                std::ops::ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(
            first["choices"][0]["message"]["content"],
            by_hand.text.as_str()
        );
        // Options that the document was not read with.
        let other = ask(&server, &id, json!({ "context": "window:64" }));
        assert_eq!(
            (other.status, other.json()["error"]["param"].as_str()),
            (400, Some("context"))
        );
        let list = call(&server, "GET", "/v1/documents", &Value::Null).json();
        assert_eq!(list["data"][0]["id"], id.as_str());
        (id, first["choices"].clone())
    };
    assert_eq!(live_planes(), before);
    // Another server, as after a kill.
    let server = start(|options| options.documents = Some(folder.path().into()));
    let again = ask(&server, &id, json!({}));
    assert_eq!(
        again.status,
        200,
        "{}",
        String::from_utf8_lossy(&again.body)
    );
    assert_eq!(again.json()["choices"], answer);
    let gone = call(
        &server,
        "DELETE",
        &format!("/v1/documents/{id}"),
        &Value::Null,
    );
    assert_eq!(gone.status, 200);
    let missing = ask(&server, &id, json!({}));
    assert_eq!(
        (missing.status, missing.json()["error"]["code"].as_str()),
        (404, Some("document_not_found"))
    );
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    // A file as it is.
    let headers = "Content-Type: application/octet-stream\r\n";
    let page = b"<html><body><p>Some words stand here.</p></body></html>";
    let mut stream = send(
        server.address(),
        "POST",
        "/v1/documents?name=a.html&context=window:64",
        headers,
        page,
    );
    let info = receive(&mut stream).json();
    assert_eq!(
        (info["context"].as_str(), info["name"].as_str()),
        (Some("window:size=64"), Some("a.html"))
    );
    let id = info["id"].as_str().unwrap();
    let text = call(
        &server,
        "GET",
        &format!("/v1/documents/{id}?text=true"),
        &Value::Null,
    )
    .json();
    assert!(
        text["text"]
            .as_str()
            .unwrap()
            .contains("Some words stand here.")
    );
    drop(server);
    assert_eq!(live_planes(), before);
}

#[test]
fn bad_input_is_named() {
    let _turn = turn();
    let server = start(|options| {
        options.max_body = 10_000;
        options.body_timeout = Duration::from_millis(300);
    });
    let error = |reply: &Reply| -> (u16, String, String) {
        let error = &reply.json()["error"];
        let text = |name: &str| error[name].as_str().unwrap_or("").to_string();
        assert!(!text("message").is_empty() && !text("type").is_empty());
        (reply.status, text("code"), text("param"))
    };
    let raw = |body: &[u8]| receive(&mut send(server.address(), "POST", CHAT, "", body));
    let expect = |found: (u16, String, String), status: u16, code: &str, param: &str| {
        assert_eq!(found, (status, code.into(), param.into()));
    };
    expect(error(&raw(b"{\"messages\":")), 400, "invalid_json", "");
    expect(error(&raw(b"\xff\xfe{}")), 400, "invalid_json", "");
    expect(
        error(&raw(
            b"{\"messages\":[{\"role\":\"user\",\"content\":\"\xc3\x28\"}]}",
        )),
        400,
        "invalid_json",
        "",
    );
    expect(
        error(&raw(b"{\"messages\":7}")),
        400,
        "invalid_value",
        "messages",
    );
    expect(error(&raw(&vec![b' '; 20_000])), 413, "body_too_large", "");
    for (more, status, code, param) in [
        (json!({ "model": "other" }), 404, "model_not_found", "model"),
        (
            json!({ "max_tokens": 5000 }),
            400,
            "context_length_exceeded",
            "messages",
        ),
        (
            json!({ "context": "full", "rope": "clex:/etc" }),
            400,
            "invalid_value",
            "rope",
        ),
        (
            json!({ "context": "magic" }),
            400,
            "invalid_value",
            "context",
        ),
        (
            json!({ "decode": "beam", "temperature": 1 }),
            400,
            "invalid_value",
            "decode",
        ),
        (
            json!({ "logit_bias": { "999999": 1 } }),
            400,
            "invalid_value",
            "logit_bias",
        ),
        (
            json!({ "session": "none" }),
            404,
            "document_not_found",
            "session",
        ),
        (json!({ "messages": [] }), 400, "invalid_value", "messages"),
    ] {
        expect(
            error(&call(&server, "POST", CHAT, &chat("x", more))),
            status,
            code,
            param,
        );
    }
    let complete = |body: Value| error(&call(&server, "POST", "/v1/completions", &body));
    expect(
        complete(json!({ "prompt": [1, 99999] })),
        400,
        "invalid_value",
        "prompt",
    );
    expect(
        complete(json!({ "prompt": [] })),
        400,
        "invalid_value",
        "prompt",
    );
    expect(
        complete(json!({ "prompt": "x", "max_tokens": 0 })),
        400,
        "invalid_value",
        "max_tokens",
    );
    expect(
        error(&call(
            &server,
            "POST",
            "/v1/embeddings",
            &json!({ "input": "x" }),
        )),
        404,
        "model_not_found",
        "model",
    );
    expect(
        error(&call(
            &server,
            "POST",
            "/v1/documents",
            &json!({ "text": " " }),
        )),
        400,
        "invalid_value",
        "text",
    );
    expect(
        error(&call(&server, "GET", "/nothing", &Value::Null)),
        404,
        "unknown_route",
        "",
    );
    expect(
        error(&call(&server, "GET", CHAT, &Value::Null)),
        405,
        "method_not_allowed",
        "",
    );
    // A body that never comes.
    let mut stream = TcpStream::connect(server.address()).unwrap();
    write!(
        stream,
        "POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 50\r\n\r\n{{"
    )
    .unwrap();
    expect(error(&receive(&mut stream)), 408, "timeout", "");
    // A page of another site.
    let headers = "Origin: http://elsewhere.example\r\n";
    let body = chat("x", json!({})).to_string();
    let reply = receive(&mut send(
        server.address(),
        "POST",
        CHAT,
        headers,
        body.as_bytes(),
    ));
    expect(error(&reply), 403, "foreign_origin", "");
    // After all that it still answers.
    assert_eq!(
        call(&server, "POST", CHAT, &chat("x", json!({}))).status,
        200
    );
}

#[test]
fn a_key_guards_what_matters() {
    let _turn = turn();
    let mut open = options();
    open.address = ([0, 0, 0, 0], 0).into();
    assert!(matches!(
        Server::start(model(), None, open),
        Err(ServeError::Open(_))
    ));
    let server = start(|options| options.key = Some("secret".into()));
    let ask = |path: &str, headers: &str| {
        receive(&mut send(server.address(), "GET", path, headers, b"")).status
    };
    assert_eq!(ask("/v1/models", ""), 401);
    assert_eq!(ask("/v1/models", "Authorization: Bearer wrong\r\n"), 401);
    assert_eq!(ask("/metrics", ""), 401);
    assert_eq!(ask("/v1/models", "Authorization: Bearer secret\r\n"), 200);
    for path in ["/", "/style.css", "/page.js", "/healthz", "/openapi.json"] {
        assert_eq!(ask(path, ""), 200, "{path}");
    }
}

#[test]
fn clients_that_go_away_or_do_not_read_leave_nothing() {
    let _turn = turn();
    let before = live_planes();
    let server = start(|options| options.write_timeout = Duration::from_millis(500));
    let counters = server.counters().clone();
    let running =
        || counters.reading.load(Ordering::Relaxed) + counters.writing.load(Ordering::Relaxed);
    // A bias keeps the end away, so that answers are long.
    let eos: Vec<(String, Value)> = model()
        .tokenizer
        .eos_ids()
        .iter()
        .map(|id| (id.to_string(), json!(-100)))
        .collect();
    let eos: serde_json::Map<String, Value> = eos.into_iter().collect();
    for stream in [true, false] {
        let body = chat(
            "Hello",
            json!({ "stream": stream, "max_tokens": 3500, "logit_bias": eos }),
        );
        let connection = send(
            server.address(),
            "POST",
            CHAT,
            "",
            body.to_string().as_bytes(),
        );
        soon("it runs", || running() == 1);
        connection.shutdown(Shutdown::Both).unwrap();
        drop(connection);
        soon("it is given up", || {
            running() == 0 && live_planes() == before
        });
    }
    // Nobody reads: the answer is written to the end and its pages are free.
    let body = chat(
        "Hello",
        json!({ "stream": true, "max_tokens": 3000, "logit_bias": eos, "logprobs": true, "top_logprobs": 20 }),
    );
    let mut slow = send(
        server.address(),
        "POST",
        CHAT,
        "",
        body.to_string().as_bytes(),
    );
    let finished = counters.finished.load(Ordering::Relaxed);
    let given_up = counters.cancelled.load(Ordering::Relaxed);
    soon("the engine is done with it", || {
        counters.finished.load(Ordering::Relaxed) + counters.cancelled.load(Ordering::Relaxed)
            > finished + given_up
    });
    soon("pages return", || live_planes() == before);
    let other = call(&server, "POST", CHAT, &chat("x", json!({})));
    assert_eq!(other.status, 200);
    let mut rest = Vec::new();
    let _ = slow.read_to_end(&mut rest);
    soon("pages return", || live_planes() == before);
}

#[test]
fn sixty_four_clients_at_once() {
    let _turn = turn();
    let before = live_planes();
    let server = start(|_| {});
    let alone = call(&server, "POST", CHAT, &chat("Client 5 asks", json!({}))).json();
    let (good, dropped) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for client in 0..64usize {
            let (server, good, dropped, alone) = (&server, &good, &dropped, &alone);
            scope.spawn(move || {
                for round in 0..6usize {
                    let stream = (client + round).is_multiple_of(2);
                    let body = chat(
                        &format!("Client {client} asks"),
                        json!({ "stream": stream }),
                    );
                    if (client + round).is_multiple_of(7) {
                        drop(send(
                            server.address(),
                            "POST",
                            CHAT,
                            "",
                            body.to_string().as_bytes(),
                        ));
                        dropped.fetch_add(1, Ordering::Relaxed);
                        continue;
                    }
                    let reply = call(server, "POST", CHAT, &body);
                    assert_eq!(
                        reply.status,
                        200,
                        "{}",
                        String::from_utf8_lossy(&reply.body)
                    );
                    if stream {
                        reply.events();
                    } else if client == 5 {
                        assert_eq!(reply.json()["choices"], alone["choices"]);
                    }
                    good.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(good.into_inner() + dropped.into_inner(), 64 * 6);
    let counters = server.counters();
    soon("nothing runs", || {
        [
            &counters.queued,
            &counters.reading,
            &counters.writing,
            &counters.running_bytes,
        ]
        .iter()
        .all(|gauge| gauge.load(Ordering::Relaxed) == 0)
            && live_planes() == before
    });
    assert!(counters.shared_passes.load(Ordering::Relaxed) > 0);
    let metrics = call(&server, "GET", "/metrics", &Value::Null);
    let text = String::from_utf8(metrics.body).unwrap();
    assert!(
        text.contains("longspan_requests_writing 0")
            && text.contains(
                "longspan_http_answers_total{route=\"/v1/chat/completions\",status=\"200\"}"
            ),
        "{text}"
    );
}

#[test]
fn a_stop_lets_answers_end_and_takes_no_more() {
    let _turn = turn();
    let before = live_planes();
    let server = start(|_| {});
    let address = server.address();
    let body = chat("Hello", json!({ "max_tokens": 200 })).to_string();
    let mut stream = send(address, "POST", CHAT, "", body.as_bytes());
    let counters = server.counters().clone();
    soon("it runs or is done", || {
        counters.reading.load(Ordering::Relaxed)
            + counters.writing.load(Ordering::Relaxed)
            + counters.finished.load(Ordering::Relaxed)
            > 0
    });
    server.stop();
    assert_eq!(receive(&mut stream).status, 200);
    assert!(TcpStream::connect(address).is_err());
    assert_eq!(live_planes(), before);
}

#[test]
fn the_description_names_every_route() {
    let _turn = turn();
    let server = start(|_| {});
    let spec = call(&server, "GET", "/openapi.json", &Value::Null).json();
    for (path, methods) in spec["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let reply = call(
                &server,
                &method.to_uppercase(),
                &path.replace("{id}", "tiny"),
                &Value::Null,
            );
            assert!(reply.status != 405, "{method} {path}");
            let unknown = String::from_utf8_lossy(&reply.body).contains("unknown_route");
            assert!(!unknown, "{method} {path}");
        }
    }
    let counted = call(
        &server,
        "POST",
        "/tokenize",
        &json!({ "prompt": "hello there", "return_token_strs": true }),
    )
    .json();
    assert_eq!(
        counted["count"].as_u64().unwrap() as usize,
        counted["tokens"].as_array().unwrap().len()
    );
    let back = call(
        &server,
        "POST",
        "/detokenize",
        &json!({ "tokens": counted["tokens"] }),
    )
    .json();
    assert_eq!(back["prompt"], "hello there");
}
