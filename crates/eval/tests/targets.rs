//! The local engine and the endpoint as targets.

#[path = "../../../tests/golden.rs"]
mod golden;

use candle_core::Device;
use longspan_agents::LocalModel;
use longspan_eval::EvalError;
use longspan_eval::target::{ChatMode, Endpoint, EndpointConfig, Local, LocalOptions, Target};
use longspan_eval::task::*;
use longspan_infer::{Engine, EngineOptions};
use longspan_kernels::attention::KvDtype;
use longspan_nn::model::{Decoder, Precision};
use longspan_nn::weights::Checkpoint;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

fn model() -> Arc<LocalModel> {
    let path = golden::root().join("tiny-models/gguf-llama/model.gguf");
    let checkpoint = Checkpoint::open(&path).unwrap();
    let decoder = Decoder::load(
        &checkpoint.config,
        &*checkpoint.weights,
        Precision::Packed,
        &Device::Cpu,
    )
    .unwrap();
    let engine = Engine::new(decoder, checkpoint.fingerprint.to_string()).unwrap();
    Arc::new(LocalModel::new(engine, checkpoint.tokenizer).unwrap())
}

fn local(model: &Arc<LocalModel>, context: &str, change: impl FnOnce(&mut LocalOptions)) -> Local {
    let mut options = LocalOptions {
        engine: EngineOptions {
            kv: KvDtype::F32,
            context: context.parse().unwrap(),
        },
        chat: ChatMode::Auto,
        decode: "plain".parse().unwrap(),
        reuse: true,
        reuse_bytes: 1 << 30,
        memory_bytes: None,
    };
    change(&mut options);
    Local::new(Arc::clone(model), "tiny", options, || false).unwrap()
}

fn sample(document: &str, question: &str) -> Sample {
    Sample::new(
        Prompt::ask(document, question),
        Work::Generate(Decode {
            max_new: 12,
            stop: Vec::new(),
        }),
        vec!["x".into()],
        BTreeMap::new(),
        String::new(),
    )
}

/// Whether a document was read before must not show in a reply.
#[test]
fn reuse_saves_reading_and_changes_no_answer() {
    let model = model();
    let text = "abc ab a b c abc. ".repeat(120);
    let longer = text.clone() + &"cab cab. ".repeat(30);
    let samples = [
        sample(&text, "a?"),
        sample(&text, "b c?"),
        sample(&longer, "a?"),
        sample(&text, "c?"),
        sample(&longer[..longer.len() / 2], "a?"),
    ];
    for context in ["full", "window:64", "sinks:4,60"] {
        let fresh = local(&model, context, |o| o.reuse = false);
        let want: Vec<String> = samples
            .iter()
            .map(|s| fresh.run(s, 0).unwrap().text)
            .collect();
        let reusing = local(&model, context, |_| {});
        let outputs: Vec<_> = samples.iter().map(|s| reusing.run(s, 0).unwrap()).collect();
        assert_eq!(
            outputs.iter().map(|o| o.text.clone()).collect::<Vec<_>>(),
            want,
            "{context}"
        );
        assert_eq!(outputs[0].cost.cached_tokens, 0);
        assert!(
            outputs[1].cost.cached_tokens > 200,
            "{context}: {:?}",
            outputs[1].cost
        );
        // In another order.
        let other = local(&model, context, |_| {});
        let mut back: Vec<String> = samples
            .iter()
            .rev()
            .map(|s| other.run(s, 0).unwrap().text)
            .collect();
        back.reverse();
        assert_eq!(back, want, "{context}");
    }
}

#[test]
fn sampling_depends_on_seed_and_sample_alone() {
    let model = model();
    let target = local(&model, "full", |o| {
        o.decode = "sample:temperature=1.5".parse().unwrap()
    });
    let (a, b) = (sample("abc abc abc", "a?"), sample("abc abc abc", "b?"));
    let run = |s: &Sample, seed| target.run(s, seed).unwrap().text;
    let first = run(&a, 1);
    run(&b, 1);
    assert_eq!(run(&a, 1), first);
    assert!((2..12).any(|seed| run(&a, seed) != first));
}

#[test]
fn what_does_not_fit_is_said_not_cut() {
    let model = model();
    let target = local(&model, "full", |o| o.memory_bytes = Some(1000));
    let output = target.run(&sample(&"abc ".repeat(200), "a?"), 0).unwrap();
    assert!(output.error.unwrap().contains("memory"));
    let mut cut = sample(&"abc ".repeat(200), "a?");
    cut.prompt.truncation = Truncation::Middle(40);
    let output = local(&model, "full", |_| {}).run(&cut, 0).unwrap();
    assert!(output.truncated && output.tokens_in < 120 && output.error.is_none());
    let bad = "window:0".parse().unwrap();
    let options = LocalOptions {
        engine: EngineOptions {
            kv: KvDtype::F32,
            context: bad,
        },
        chat: ChatMode::Never,
        decode: "plain".parse().unwrap(),
        reuse: true,
        reuse_bytes: 0,
        memory_bytes: None,
    };
    assert!(matches!(
        Local::new(model, "tiny", options, || false),
        Err(EvalError::Input(_))
    ));
}

/// A server that misbehaves: for each sample it is first busy, then broken, then cuts the line, then
/// answers with the last word of the prompt.
struct Server {
    port: u16,
    seen: Arc<Mutex<BTreeMap<String, usize>>>,
    in_flight: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
}

fn serve(fail: bool) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = Server {
        port: listener.local_addr().unwrap().port(),
        seen: Arc::default(),
        in_flight: Arc::default(),
        most: Arc::default(),
    };
    let (seen, in_flight, most) = (
        server.seen.clone(),
        server.in_flight.clone(),
        server.most.clone(),
    );
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (seen, in_flight, most) = (seen.clone(), in_flight.clone(), most.clone());
            std::thread::spawn(move || {
                let now = in_flight.fetch_add(1, Ordering::SeqCst) + 1;
                most.fetch_max(now, Ordering::SeqCst);
                let _ = answer(stream, &seen, &in_flight, fail);
            });
        }
    });
    server
}

fn answer(
    mut stream: TcpStream,
    seen: &Mutex<BTreeMap<String, usize>>,
    in_flight: &AtomicUsize,
    fail: bool,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut length, mut line) = (0, String::new());
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let value: serde_json::Value = serde_json::from_slice(&body)?;
    let prompt = value["messages"][0]["content"]
        .as_str()
        .unwrap_or_default()
        .to_string();
    let times = {
        let mut seen = seen.lock().unwrap();
        let count = seen.entry(prompt.clone()).or_insert(0);
        *count += 1;
        *count
    };
    std::thread::sleep(Duration::from_millis(5));
    // Before the reply, so that the client's next request is not counted beside this one.
    in_flight.fetch_sub(1, Ordering::SeqCst);
    let (status, text) = match times {
        _ if !fail => ("200 OK", ""),
        1 => ("429 Too Many Requests", "busy"),
        2 => ("500 Internal Server Error", "oops"),
        3 => return Ok(()),
        _ => ("200 OK", ""),
    };
    let reply = if status.starts_with("200") {
        let last = prompt.split_whitespace().last().unwrap_or("");
        serde_json::json!({
            "choices": [{ "message": { "content": last }, "finish_reason": "stop" }],
            "usage": { "prompt_tokens": 7, "completion_tokens": 1 },
        })
        .to_string()
    } else {
        text.into()
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{reply}",
        reply.len()
    )?;
    stream.flush()
}

fn endpoint(port: u16, tries: u32) -> Endpoint {
    let config = EndpointConfig {
        url: format!("http://127.0.0.1:{port}/v1"),
        model: "m".into(),
        key: None,
        chat: true,
        timeout: Duration::from_secs(10),
        tries,
        pause: Duration::from_millis(2),
        per_minute: None,
    };
    Endpoint::new(config, || false).unwrap()
}

#[test]
fn an_endpoint_that_stumbles_loses_nothing_and_is_asked_nothing_twice() {
    use longspan_eval::cell::{Cell, RunConfig, RunFolder};
    use longspan_eval::run::{self, Job, RunOptions};
    let server = serve(true);
    let samples: Vec<Sample> = (0..40)
        .map(|i| sample("text", &format!(" say word{i}")))
        .collect();
    let cell = Cell {
        task: "passkey".into(),
        version: 1,
        length: 1,
        model: "m".into(),
        policy: "-".into(),
        seed: 0,
    };
    let jobs = [Job {
        cell: cell.clone(),
        samples,
        target: Arc::new(endpoint(server.port, 6)),
    }];
    let dir = tempfile::tempdir().unwrap();
    let config = RunConfig {
        harness: "test".into(),
        compat: "official".into(),
        cells: vec![(cell.clone(), 40)],
        tokenizer: "words".into(),
        targets: Vec::new(),
        options: Vec::new(),
        created: 0,
    };
    let folder = RunFolder::create(dir.path(), &config).unwrap();
    let options = RunOptions {
        concurrency: 8,
        ..RunOptions::default()
    };
    let outcome = run::run(&folder, &jobs, &options, &run::Silent).unwrap();
    assert_eq!(outcome.done, 40);
    let rows = folder.predictions(&cell).unwrap();
    assert_eq!(rows.len(), 40);
    for (index, row) in rows.iter().enumerate() {
        assert_eq!(
            (row.text.as_str(), row.tokens_in),
            (format!("word{index}").as_str(), 7)
        );
    }
    let seen = server.seen.lock().unwrap();
    assert!(
        seen.len() == 40 && seen.values().all(|&times| times == 4),
        "{seen:?}"
    );
    let most = server.most.load(Ordering::SeqCst);
    assert!(most > 1 && most <= 8, "{most} in flight");
    assert_eq!(server.in_flight.load(Ordering::SeqCst), 0);
}

#[test]
fn a_server_that_is_gone_is_unreachable_and_one_that_refuses_is_an_error() {
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let error = endpoint(port, 2).run(&sample("a", "b"), 0).unwrap_err();
    assert!(
        matches!(&error, EvalError::Unreachable(text) if text.contains("tried 2 times")),
        "{error}"
    );
    let server = serve(false);
    let mut asked = sample("a", "b");
    asked.work = Work::Likelihood {
        protocol: Protocol::Position,
        tokens: 3,
    };
    assert!(
        endpoint(server.port, 1)
            .run(&asked, 0)
            .unwrap()
            .error
            .is_some()
    );
    let bad = EndpointConfig {
        url: "localhost:80".into(),
        model: "m".into(),
        key: None,
        chat: true,
        timeout: Duration::from_secs(1),
        tries: 1,
        pause: Duration::ZERO,
        per_minute: None,
    };
    assert!(Endpoint::new(bad, || false).is_err());
}
