//! A model that carries a state behind the server: completions of several clients at once are what the engine alone writes,
//! and a context policy is refused with its reason.

use candle_core::{DType, Device};
use longspan_agents::LocalModel;
use longspan_data::tokenize::{Special, Tokenizer, byte_vocabulary};
use longspan_infer::engine::Want;
use longspan_infer::{Engine, EngineOptions};
use longspan_nn::model::{Network, Recurrent, StackConfig, StackLm};
use longspan_nn::params::ParamStore;
use longspan_serve::{ServeOptions, Server};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

fn model(folder: &std::path::Path) -> Arc<LocalModel> {
    let config: StackConfig = serde_json::from_value(json!({
        "d_model": 32, "layers": 2, "mixer": {"kind": "mamba2", "head_dim": 16, "state_size": 8}, "tie_embeddings": false,
    }))
    .unwrap();
    let store = ParamStore::new(3, DType::F32, &Device::Cpu);
    let stack = StackLm::new(&config, 256, &store.root()).unwrap();
    let network = Network::Recurrent(Box::new(Recurrent::new(stack, None).unwrap()));
    let engine = Engine::new(network, "tiny mamba2".into()).unwrap();
    std::fs::write(folder.join("tokenizer.json"), byte_vocabulary().to_string()).unwrap();
    let tokenizer = Tokenizer::from_dir(folder).unwrap();
    Arc::new(LocalModel::new(engine, tokenizer).unwrap())
}

fn post(address: SocketAddr, path: &str, body: &Value) -> (u16, String) {
    let body = body.to_string();
    let mut stream = TcpStream::connect(address).unwrap();
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).unwrap();
    let reply = String::from_utf8_lossy(&reply).into_owned();
    let status = reply.split(' ').nth(1).unwrap().parse().unwrap();
    let text = reply.split_once("\r\n\r\n").unwrap().1.to_string();
    (status, text)
}

/// Greedy tokens of the engine alone, as text.
fn alone(model: &LocalModel, prompt: &str, count: usize) -> String {
    let mut ids = model.tokenizer.encode(prompt, Special::None).unwrap();
    let mut sequence = model
        .engine
        .sequence(&EngineOptions::default(), None)
        .unwrap();
    let mut bytes = Vec::new();
    for _ in 0..count {
        let logits = model
            .engine
            .forward(&mut [(&mut sequence, &ids[..])], Want::Last)
            .unwrap();
        let best =
            (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a)));
        let next = best.unwrap() as u32;
        bytes.extend(model.tokenizer.token_bytes(next));
        ids = vec![next];
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[test]
fn completions_are_those_of_the_engine() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let mut options = ServeOptions::new("tiny");
    options.address = ([127, 0, 0, 1], 0).into();
    options.max_tokens = 4096;
    let server = Server::start(model.clone(), None, options).unwrap();
    let address = server.address();
    let prompts = ["one", "a longer prompt", "one and more", "x"];
    std::thread::scope(|scope| {
        for prompt in prompts {
            let model = &model;
            scope.spawn(move || {
                let body =
                    json!({"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0});
                let (status, text) = post(address, "/v1/completions", &body);
                assert_eq!(status, 200, "{text}");
                let start = text.find('{').unwrap();
                let end = text.rfind('}').unwrap();
                let reply: Value = serde_json::from_str(&text[start..=end]).unwrap();
                let said = reply["choices"][0]["text"].as_str().unwrap();
                assert_eq!(said, alone(model, prompt, 12), "{prompt}");
                // In events the same, the sign for a character that the last token leaves unfinished included.
                let mut body = body.clone();
                body["stream"] = json!(true);
                let (status, text) = post(address, "/v1/completions", &body);
                assert_eq!(status, 200, "{text}");
                let events = text.lines().filter_map(|line| line.strip_prefix("data: "));
                let pieces: String = (events.filter(|event| *event != "[DONE]"))
                    .map(|event| {
                        let event: Value = serde_json::from_str(event).unwrap();
                        let piece = event["choices"][0]["text"].as_str();
                        piece.unwrap_or_default().to_string()
                    })
                    .collect();
                assert_eq!(pieces, said, "{prompt}");
            });
        }
    });
    let body = json!({"model": "tiny", "prompt": "a", "max_tokens": 2, "context": "infllm"});
    let (status, text) = post(address, "/v1/completions", &body);
    assert!(
        (400..500).contains(&status) && text.contains("state"),
        "{status} {text}"
    );
    server.stop();
}
