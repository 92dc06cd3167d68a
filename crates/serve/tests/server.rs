//! The server over real sockets, with a tiny model: the dialect, the seam's conformance suite, documents, restarts.

mod common;
#[path = "../../../tests/golden.rs"]
mod golden;

use common::*;
use longspan_agents::chat::conformance::{self, Probe};
use longspan_agents::chat::local_chat::LocalChat;
use longspan_agents::chat::model::{Call, ChatModel};
use longspan_agents::chat::openai::{OpenAiConfig, OpenAiModel};
use longspan_infer::EngineOptions;
use longspan_infer::context::ContextConfig;
use longspan_infer::kv::plane::live_planes;
use longspan_kernels::attention::KvDtype;
use longspan_serve::Server;
use serde_json::{Value, json};
use std::sync::Arc;

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
