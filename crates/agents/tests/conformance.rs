//! The laws of the chat seam, for a tiny model in the local engine, a script, and both seen through the endpoint client.

#[path = "../../../tests/golden.rs"]
mod golden;
mod wire_server;

use candle_core::Device;
use longspan_agents::LocalModel;
use longspan_agents::chat::conformance::{Probe, agree, broken, run};
use longspan_agents::chat::http::Patience;
use longspan_agents::chat::layers::{
    CacheMode, CacheStore, Layers, Retry, Retrying, TraceWriter, read_trace, summarize_trace,
};
use longspan_agents::chat::local_chat::LocalChat;
use longspan_agents::chat::model::{Call, ChatError, ChatModel, Request, TokenCount};
use longspan_agents::chat::openai::{OpenAiConfig, OpenAiModel};
use longspan_agents::chat::scripted::Scripted;
use longspan_infer::{Engine, EngineOptions};
use longspan_kernels::attention::KvDtype;
use longspan_nn::model::{Decoder, Precision};
use longspan_nn::weights::Checkpoint;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use wire_server::{Fault, Server};

fn local() -> Arc<dyn ChatModel> {
    let path = golden::root().join("tiny-models/gguf-llama/model.gguf");
    let checkpoint = Checkpoint::open(&path).unwrap();
    let precision = Precision::Dense(candle_core::DType::F32);
    let decoder = Decoder::load(
        &checkpoint.config,
        &*checkpoint.weights,
        precision,
        &Device::Cpu,
    )
    .unwrap();
    let engine = Engine::new(decoder, checkpoint.fingerprint.to_string()).unwrap();
    let model = Arc::new(LocalModel::new(engine, checkpoint.tokenizer).unwrap());
    let options = EngineOptions {
        kv: KvDtype::F32,
        ..EngineOptions::default()
    };
    Arc::new(LocalChat::new(model, "tiny", options, 64 << 20).unwrap())
}

fn scripted() -> Arc<dyn ChatModel> {
    let model = Scripted::new(|_| {
        Ok("Once the rain fell on the wide window, and nobody saw it end.".into())
    });
    Arc::new(model.window(500))
}

fn endpoint(server: &Server, change: impl FnOnce(&mut OpenAiConfig)) -> Arc<dyn ChatModel> {
    let mut config = OpenAiConfig::new(&server.url, "");
    change(&mut config);
    Arc::new(
        OpenAiModel::new(config)
            .unwrap()
            .connect(&Call::default())
            .unwrap(),
    )
}

fn holds(model: &Arc<dyn ChatModel>, change: impl FnOnce(&mut Probe<'_>)) {
    let folder = tempfile::tempdir().unwrap();
    let mut probe = Probe::new(folder.path());
    change(&mut probe);
    let outcomes = run(model, &probe);
    assert!(outcomes.len() >= 20);
    assert_eq!(broken(&outcomes), "");
}

#[test]
fn the_local_engine_keeps_the_laws() {
    holds(&local(), |_| {});
}

#[test]
fn a_script_keeps_the_laws() {
    holds(&scripted(), |_| {});
}

#[test]
fn an_endpoint_keeps_the_laws() {
    for model in [local(), scripted()] {
        let server = Server::start(Arc::clone(&model));
        let held = || server.running.load(Ordering::SeqCst);
        let folder = tempfile::tempdir().unwrap();
        for stream in [true, false] {
            let client = endpoint(&server, |config| config.stream = stream);
            let mut probe = Probe::new(folder.path());
            probe.held = Some(&held);
            assert_eq!(broken(&run(&client, &probe)), "", "stream {stream}");
            agree(&model, &client, &probe).unwrap();
        }
    }
}

#[test]
fn a_servers_own_count_is_taken_where_it_has_one() {
    let texts = ["One two three.", "", "Four, and a longer word: lighthouse."];
    let sum = |model: &Arc<dyn ChatModel>| -> Vec<usize> {
        let counts = model.count_texts(&texts).unwrap();
        assert!(counts.iter().all(|count| count.exact));
        counts.iter().map(|count| count.tokens).collect()
    };
    // One of our make counts many texts in one exchange.
    let model = local();
    let server = Server::start(Arc::clone(&model));
    let client = endpoint(&server, |_| {});
    assert_eq!(sum(&client), sum(&model));
    assert_eq!(
        client.count_text(texts[2]).unwrap(),
        model.count_text(texts[2]).unwrap()
    );
    // Layers hand it on.
    let layered = Layers {
        retry: Some(Retry::default()),
        ..Layers::default()
    };
    assert_eq!(sum(&layered.wrap(Arc::clone(&client))), sum(&model));
    // Servers of other makes have a route for one text, or none.
    let answer = |reply: &'static str| {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = other_make(stream, reply);
            }
        });
        let model = OpenAiModel::new(OpenAiConfig::new(&url, "m")).unwrap();
        model.connect(&Call::default()).unwrap()
    };
    for reply in [
        r#"{"count": 7, "tokens": [1], "max_model_len": 9}"#,
        r#"{"tokens": [1,2,3,4,5,6,7]}"#,
    ] {
        let count = answer(reply).count_text("some words").unwrap();
        assert_eq!((count.tokens, count.exact), (7, true), "{reply}");
    }
    let model = answer("");
    let count = model.count_text("some words").unwrap();
    assert_eq!(
        (count, count.exact),
        (TokenCount::estimate("some words"), false)
    );
}

/// A server that lists a model without abilities, and answers its tokenize route with this; 404 if that is empty.
fn other_make(mut stream: std::net::TcpStream, reply: &str) -> std::io::Result<()> {
    use std::io::{BufRead, BufReader, Read, Write};
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut first, mut length) = (String::new(), 0);
    reader.read_line(&mut first)?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let (status, body) = match first.split(' ').nth(1) {
        Some("/v1/models") => (200, r#"{"data": [{"id": "m", "object": "model"}]}"#),
        Some("/tokenize") if !reply.is_empty() => (200, reply),
        _ => (404, "{}"),
    };
    write!(
        stream,
        "HTTP/1.1 {status} x\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[test]
fn layers_keep_the_laws_and_the_suite_finds_breaches() {
    let folder = tempfile::tempdir().unwrap();
    let layers = Layers {
        retry: Some(Retry::default()),
        cache: Some((
            Arc::new(CacheStore::open(&folder.path().join("cache.sqlite")).unwrap()),
            CacheMode::ReadWrite,
        )),
        trace: Some(Arc::new(
            TraceWriter::open(&folder.path().join("trace.jsonl"), true).unwrap(),
        )),
        ..Layers::default()
    };
    holds(&layers.wrap(scripted()), |_| {});
    let lines = read_trace(&folder.path().join("trace.jsonl")).unwrap();
    let totals = summarize_trace(&lines);
    let calls: usize = totals.values().map(|total| total.calls).sum();
    assert_eq!(calls, lines.len());
    assert!(
        lines.iter().any(|line| line.from_cache) && lines.iter().any(|line| line.error.is_some())
    );
    // A model whose replies change breaks the first law.
    let count = Mutex::new(0);
    let fickle: Arc<dyn ChatModel> = Arc::new(Scripted::new(move |_| {
        let mut count = count.lock().unwrap();
        *count += 1;
        Ok(format!("one two three four five {count}"))
    }));
    let text = broken(&run(&fickle, &Probe::new(folder.path())));
    assert!(text.contains("equal greedy requests"), "{text}");
}

fn bare(server: &Server) -> OpenAiModel {
    let mut config = OpenAiConfig::new(&server.url, "m");
    config.key = Some("secret".into());
    config.patience = Patience {
        connect: Duration::from_secs(5),
        first: Duration::from_secs(30),
        idle: Duration::from_secs(30),
    };
    OpenAiModel::new(config).unwrap()
}

#[test]
fn retries_follow_their_schedule() {
    let server = Server::start(scripted());
    let sleeps = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&sleeps);
    let retry = Retry {
        sleep: Arc::new(move |_, time| {
            seen.lock().unwrap().push(time);
            Ok(())
        }),
        ..Retry::default()
    };
    let model = Retrying::new(Arc::new(bare(&server)), retry);
    let error = r#"{"error":{"message":"busy"}}"#;
    let again = |faults: Vec<Fault>| {
        *server.faults.lock().unwrap() = faults;
        server.requests.store(0, Ordering::SeqCst);
        sleeps.lock().unwrap().clear();
        let result = model.ask(&Request::user("x").max_tokens(20), &Call::default());
        (
            result,
            server.requests.load(Ordering::SeqCst),
            sleeps.lock().unwrap().clone(),
        )
    };
    let (reply, asked, slept) = again(vec![
        Fault::Status(429, "retry-after: 7\r\n", error),
        Fault::Status(503, "", error),
        Fault::Raw(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n".to_vec()),
        Fault::Status(500, "retry-after: 9999\r\n", error),
    ]);
    // A stream that ends before its first event is a broken dialect, not a busy server.
    assert!(matches!(reply, Err(ChatError::Protocol(_))), "{reply:?}");
    assert_eq!((asked, slept[0]), (3, Duration::from_secs(7)));
    let (reply, asked, slept) = again(vec![
        Fault::Status(503, "", error),
        Fault::Status(502, "", error),
        Fault::Status(500, "retry-after: 9999\r\n", error),
    ]);
    assert!(reply.unwrap().text.starts_with("Once"));
    assert_eq!(asked, 4);
    let ms = |low: u64, high: u64| Duration::from_millis(low)..=Duration::from_millis(high);
    assert!(
        ms(250, 500).contains(&slept[0]) && ms(500, 1000).contains(&slept[1]),
        "{slept:?}"
    );
    assert_eq!(slept[2], Duration::from_secs(30));
    let (reply, asked, slept) = again(vec![Fault::Status(503, "", error); 9]);
    let text = reply.unwrap_err().to_string();
    assert!(
        text.contains("tried 6 times") && text.contains("busy"),
        "{text}"
    );
    assert_eq!((asked, slept.len()), (6, 5));
    // After the first piece of text there is no second try.
    let (reply, asked, _) = again(vec![Fault::Raw(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"Half\"}}]}\n\n".to_vec(),
    )]);
    let error = reply.unwrap_err();
    assert!(matches!(error, ChatError::Network { .. }), "{error:?}");
    assert_eq!((error.partial(), asked), ("Half", 1));
}

#[test]
fn refusals_have_their_kinds() {
    let server = Server::start(scripted());
    let model = bare(&server);
    type Check = fn(&ChatError) -> bool;
    let cases: Vec<(u16, &str, Check)> = vec![
        (401, r#"{"error":{"message":"key"}}"#, |e| {
            matches!(e, ChatError::Auth(_))
        }),
        (
            429,
            r#"{"error":{"message":"paid","code":"insufficient_quota"}}"#,
            |e| matches!(e, ChatError::Auth(_)),
        ),
        (429, "slow down", |e| {
            matches!(e, ChatError::RateLimited { .. })
        }),
        (
            400,
            r#"{"error":{"message":"long","code":"context_length_exceeded"}}"#,
            |e| matches!(e, ChatError::ContextOverflow { .. }),
        ),
        (
            400,
            r#"{"error":{"message":"no","code":"content_filter"}}"#,
            |e| matches!(e, ChatError::ContentFilter(_)),
        ),
        (
            404,
            "nothing",
            |e| matches!(e, ChatError::NotFound(text) if text.contains("404") && text.contains("nothing")),
        ),
        (504, "", |e| matches!(e, ChatError::Timeout { .. })),
        (200, "{\"choices\":[]}", |e| {
            matches!(e, ChatError::Protocol(_))
        }),
        (
            200,
            "nonsense",
            |e| matches!(e, ChatError::Protocol(text) if text.contains("nonsense")),
        ),
        (200, r#"{"error":{"message":"oh","code":429}}"#, |e| {
            matches!(e, ChatError::RateLimited { .. })
        }),
    ];
    for (status, body, check) in cases {
        let body: &'static str = Box::leak(body.to_string().into_boxed_str());
        *server.faults.lock().unwrap() = vec![Fault::Status(status, "", body)];
        let error = model
            .ask(&Request::user("x"), &Call::default())
            .unwrap_err();
        assert!(check(&error), "{status} {body}: {error:?}");
        assert!(!error.to_string().contains("secret"));
    }
    // What a request sends beyond the dialect is only what differs from it.
    let bodies = server.bodies.lock().unwrap();
    for field in ["top_k", "min_p", "repetition_penalty", "decode", "context"] {
        assert!(bodies[0].get(field).is_none(), "{field}: {}", bodies[0]);
    }
}

#[test]
fn answers_that_are_too_large_and_stops_in_silence() {
    let server = Server::start(scripted());
    let mut config = OpenAiConfig::new(&server.url, "m");
    config.max_bytes = 1000;
    let small = OpenAiModel::new(config).unwrap();
    let long = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: {}\n\n",
        "x".repeat(5000)
    );
    *server.faults.lock().unwrap() = vec![Fault::Raw(long.into_bytes())];
    let error = small
        .ask(&Request::user("x"), &Call::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("more than 1000 bytes"), "{error}");
    // A caller may stop while the server says nothing.
    *server.faults.lock().unwrap() = vec![Fault::Silence];
    let requests = Arc::clone(&server.requests);
    let before = requests.load(Ordering::SeqCst);
    let call = Call::new(move || requests.load(Ordering::SeqCst) > before);
    let error = bare(&server).ask(&Request::user("x"), &call).unwrap_err();
    assert!(matches!(error, ChatError::Cancelled { .. }), "{error:?}");
    // Nobody listens there.
    let closed = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let model = OpenAiModel::new(OpenAiConfig::new(&format!("http://{closed}/v1"), "m")).unwrap();
    let error = model
        .ask(&Request::user("x"), &Call::default())
        .unwrap_err();
    assert!(matches!(error, ChatError::Network { .. }), "{error:?}");
}
