//! The HTTP server: an OpenAI-compatible endpoint with this program's long-context methods, documents that are read
//! once and asked many times, and a page to try it.
//!
//! A request's way: [`listen`] (sockets, time-outs), [`app`] (key, limits, routes), a handler that turns the body
//! into tokens, [`longspan_infer::schedule`] (one thread, all requests), and [`answer`], which makes text of tokens.

mod answer;
mod app;
mod chat;
mod completion;
mod document;
mod embedding;
mod error;
mod listen;
mod metrics;
mod models;
mod openapi;
mod page;

use app::App;
use longspan_agents::LocalModel;
use longspan_infer::context::ContextConfig;
use longspan_infer::engine::default_kv;
use longspan_infer::schedule::{Counters, ScheduleOptions};
use longspan_kernels::attention::KvDtype;
use longspan_nn::model::TextEncoder;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::watch;

/// How to serve.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Where to listen. Port 0 takes a free one.
    pub address: SocketAddr,
    /// The model's name in requests and answers.
    pub model: String,
    /// Other names that requests may give it.
    pub aliases: Vec<String>,
    /// Requests must carry it as a bearer token.
    pub key: Option<String>,
    /// Type of cached keys and values.
    pub kv: KvDtype,
    /// The policy of requests that name none; None = by length.
    pub context: Option<ContextConfig>,
    /// Documents are saved here and found again after a restart.
    pub documents: Option<PathBuf>,
    /// Most tokens of a prompt, its document and its answer.
    pub max_tokens: usize,
    /// Most bytes of a body.
    pub max_body: usize,
    /// Connections at once.
    pub max_connections: usize,
    /// For the head of a request.
    pub head_timeout: Duration,
    /// For a body.
    pub body_timeout: Duration,
    /// For a client that does not take what is written to it.
    pub write_timeout: Duration,
    /// For a request as a whole.
    pub request_timeout: Duration,
    /// Running requests get this long when the server is stopped.
    pub grace: Duration,
    /// The scheduler's limits.
    pub schedule: ScheduleOptions,
}

impl ServeOptions {
    /// The defaults: loopback, no key, policies by length.
    pub fn new(model: impl Into<String>) -> Self {
        ServeOptions {
            address: ([127, 0, 0, 1], 8080).into(),
            model: model.into(),
            aliases: Vec::new(),
            key: None,
            kv: default_kv(),
            context: None,
            documents: None,
            max_tokens: 1 << 20,
            max_body: 64 << 20,
            max_connections: 1024,
            head_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(60),
            request_timeout: Duration::from_secs(3600),
            grace: Duration::from_secs(20),
            schedule: ScheduleOptions::default(),
        }
    }
}

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("{address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// The folder of documents.
    #[error("{path}: {source}")]
    Documents {
        /// The folder.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// An address that others can reach, without a key.
    #[error("{0} can be reached from other machines: give an API key, or listen on 127.0.0.1")]
    Open(SocketAddr),
    /// No runtime.
    #[error("the server's threads cannot be started: {0}")]
    Threads(std::io::Error),
}

/// A server that runs. Dropping it stops it.
pub struct Server {
    address: SocketAddr,
    counters: Arc<Counters>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts serving in threads of its own.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub fn start(
        model: Arc<LocalModel>,
        embedder: Option<Arc<TextEncoder>>,
        options: ServeOptions,
    ) -> Result<Server, ServeError> {
        if !options.address.ip().is_loopback() && options.key.is_none() {
            return Err(ServeError::Open(options.address));
        }
        if let Some(path) = &options.documents {
            std::fs::create_dir_all(path).map_err(|source| ServeError::Documents {
                path: path.clone(),
                source,
            })?;
        }
        let wanted = options.address;
        let wrong = |source| ServeError::Listen {
            address: wanted,
            source,
        };
        let listener = std::net::TcpListener::bind(wanted).map_err(wrong)?;
        listener.set_nonblocking(true).map_err(wrong)?;
        let address = listener.local_addr().map_err(wrong)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("http")
            .enable_all()
            .build()
            .map_err(ServeError::Threads)?;
        let app = Arc::new(App::new(model, embedder, options));
        app.find_documents();
        let counters = app.scheduler.counters().clone();
        let (stop, stopped) = watch::channel(false);
        let thread = std::thread::Builder::new()
            .name("serve".into())
            .spawn(move || {
                runtime.block_on(listen::serve(listener, app, stopped));
                runtime.shutdown_timeout(Duration::from_secs(1));
            })
            .map_err(ServeError::Threads)?;
        Ok(Server {
            address,
            counters,
            stop,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What the scheduler counts.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Takes no more requests, lets running ones end within [`ServeOptions::grace`], and returns when all is quiet.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}
