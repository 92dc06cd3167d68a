//! A server of a tiny model, and a client that speaks HTTP byte by byte.

use crate::golden;
use candle_core::Device;
use longspan_agents::LocalModel;
use longspan_infer::Engine;
use longspan_kernels::attention::KvDtype;
use longspan_nn::model::{Decoder, Precision};
use longspan_nn::weights::Checkpoint;
use longspan_serve::{ServeOptions, Server};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

/// Planes are counted for the whole process, so tests take turns.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|poison| poison.into_inner())
}

pub fn model() -> Arc<LocalModel> {
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

pub fn options() -> ServeOptions {
    let mut options = ServeOptions::new("tiny");
    options.address = ([127, 0, 0, 1], 0).into();
    options.kv = KvDtype::F32;
    options.max_tokens = 4096;
    options.schedule.prefix_bytes = 0;
    options
}

pub fn start(change: impl FnOnce(&mut ServeOptions)) -> Server {
    let mut options = options();
    change(&mut options);
    Server::start(model(), None, options).unwrap()
}

pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The events of a stream; panics unless it ends as it should.
    pub fn events(&self) -> Vec<Value> {
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
pub fn receive(stream: &mut TcpStream) -> Reply {
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

pub fn send(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: &[u8],
) -> TcpStream {
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

pub fn call(server: &Server, method: &str, path: &str, body: &Value) -> Reply {
    let body = match body {
        Value::Null => Vec::new(),
        body => body.to_string().into_bytes(),
    };
    let headers = "Content-Type: application/json\r\n";
    receive(&mut send(server.address(), method, path, headers, &body))
}

pub fn chat(text: &str, more: Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": text }], "max_tokens": 8, "temperature": 0 });
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    body
}

pub fn soon(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub const CHAT: &str = "/v1/chat/completions";
