//! `longspan serve`: the HTTP server around an opened model.

use crate::options::Common;
use crate::{models, reading, ui};
use anyhow::{Context, Result};
use candle_core::Device;
use clap::Args;
use longspan_infer::schedule::ScheduleOptions;
use longspan_nn::model::{Precision, TextEncoder};
use longspan_serve::{ServeOptions, Server};
use serde_json::json;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

#[derive(Args)]
pub struct Serve {
    /// Where to listen; anything but this machine needs an API key
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "ADDRESS:PORT")]
    pub listen: SocketAddr,
    /// File that holds the API key which requests must carry; LONGSPAN_API_KEY otherwise
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Sentence encoder behind /v1/embeddings: a folder or an alias
    #[arg(long, value_name = "MODEL")]
    pub embedder: Option<String>,
    /// Save uploaded documents here, for servers to come
    #[arg(long, value_name = "FOLDER")]
    pub documents: Option<PathBuf>,
    /// Most tokens of a prompt, its document and its answer
    #[arg(long, default_value_t = 1 << 20, value_name = "N")]
    pub max_total_tokens: usize,
    /// Most bytes of a request
    #[arg(long, default_value_t = 64 << 20, value_name = "BYTES")]
    pub max_body: usize,
    /// Connections at once
    #[arg(long, default_value_t = 1024, value_name = "N")]
    pub max_connections: usize,
    /// Requests read or written at once
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub max_running: usize,
    /// Requests that wait; more are refused with status 429
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub max_queued: usize,
    /// Keys and values of running requests and documents
    #[arg(long, default_value_t = 4 << 30, value_name = "BYTES")]
    pub kv_memory: u64,
    /// Keys and values of finished talks, kept for those that go on; 0 keeps none
    #[arg(long, default_value_t = 1 << 30, value_name = "BYTES")]
    pub prefix_memory: u64,
    /// Tokens of prompts read in a pass that also writes: fewer make answers flow more evenly
    #[arg(long, default_value_t = 256, value_name = "TOKENS")]
    pub slice: usize,
    /// Seconds for a request as a whole
    #[arg(long, default_value_t = 3600, value_name = "SECONDS")]
    pub timeout: u64,
    /// Seconds for a client that does not take what is written to it
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    pub write_timeout: u64,
    /// Seconds that running requests get when the server is stopped
    #[arg(long, default_value_t = 20, value_name = "SECONDS")]
    pub grace: u64,
}

/// `longspan serve`
pub fn serve(args: &Serve, common: &Common) -> Result<()> {
    let key = match &args.key_file {
        Some(path) => {
            Some(std::fs::read_to_string(path).with_context(|| path.display().to_string())?)
        }
        None => std::env::var("LONGSPAN_API_KEY").ok(),
    };
    let key = key
        .map(|key| key.trim().to_string())
        .filter(|key| !key.is_empty());
    // Opening ties its thread to one processor; the server's threads must be free.
    let opened = std::thread::scope(|scope| scope.spawn(|| models::open(common)).join());
    let opened = opened.map_err(|_| anyhow::anyhow!("opening the model failed"))??;
    let window = opened.model.engine.window();
    let context = match common.context.as_deref() {
        None | Some("auto") => None,
        Some(text) => Some(longspan_infer::context::auto::parse(text, window)?),
    };
    let embedder = args.embedder.as_ref().map(|name| {
        let folder = models::obtain(name, common.json)?;
        let opened = TextEncoder::open(&folder, Precision::Packed, &Device::Cpu);
        opened
            .map(Arc::new)
            .with_context(|| format!("--embedder {name}"))
    });
    let (name, aliases) = opened.friendly();
    let options = ServeOptions {
        aliases,
        address: args.listen,
        key,
        kv: reading::kv_dtype(common)?,
        context,
        documents: args.documents.clone(),
        max_tokens: args.max_total_tokens,
        max_body: args.max_body,
        max_connections: args.max_connections,
        write_timeout: Duration::from_secs(args.write_timeout),
        request_timeout: Duration::from_secs(args.timeout),
        grace: Duration::from_secs(args.grace),
        schedule: ScheduleOptions {
            max_running: args.max_running,
            max_queued: args.max_queued,
            kv_bytes: args.kv_memory,
            prefix_bytes: args.prefix_memory,
            slice: args.slice,
        },
        ..ServeOptions::new(name.clone())
    };
    let keyed = options.key.is_some();
    let server = Server::start(Arc::new(opened.model), embedder.transpose()?, options)?;
    let url = format!("http://{}/", server.address());
    if common.json {
        println!("{}", json!({ "url": url, "model": name, "window": window }));
    } else {
        println!("{url}");
        eprintln!(
            "{name} is served, its window has {} tokens; {}Ctrl-C stops",
            ui::count(window),
            if keyed {
                "requests need the API key; "
            } else {
                ""
            }
        );
    }
    while !ui::interrupted() {
        std::thread::sleep(Duration::from_millis(100));
    }
    if !common.json {
        eprintln!("stopping: running requests get {} s", args.grace);
    }
    server.stop();
    Ok(())
}
