//! The chat model that a command's options name: the local engine or an endpoint, inside the layers asked for.

use crate::models;
use crate::options::Common;
use crate::reading::kv_dtype;
use crate::ui::{self, Interrupted};
use anyhow::{Result, bail};
use clap::Args;
use indicatif::ProgressBar;
use longspan_agents::chat::layers::{
    Budget, CacheMode, CacheStore, Layers, Limit, Retry, TraceWriter,
};
use longspan_agents::chat::local_chat::LocalChat;
use longspan_agents::chat::model::{Call, ChatError, ChatModel};
use longspan_agents::chat::openai::{OpenAiConfig, OpenAiModel};
use longspan_agents::workflow::Observer;
use longspan_infer::EngineOptions;
use longspan_infer::context::ContextConfig;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// Bytes of keys and values kept for the common beginnings of requests.
const KEEP_BYTES: u64 = 2 << 30;

/// Where replies come from.
#[derive(Args, Clone, Default)]
pub struct ChatModelArgs {
    /// Base address of an OpenAI-compatible server, such as http://localhost:8000/v1, in place of a local model.
    /// A key is read from LONGSPAN_API_KEY or OPENAI_API_KEY
    #[arg(long, value_name = "URL", help_heading = "Chat model")]
    pub endpoint: Option<String>,
    /// The model's name there; may be left out where only one is served
    #[arg(
        long,
        value_name = "NAME",
        requires = "endpoint",
        help_heading = "Chat model"
    )]
    pub endpoint_model: Option<String>,
    /// Tokens of prompt and reply that the endpoint's model takes, if the server does not say
    #[arg(
        long,
        value_name = "TOKENS",
        requires = "endpoint",
        help_heading = "Chat model"
    )]
    pub endpoint_window: Option<usize>,
    /// Keep replies in this file: what was asked before is not asked again, so a run that was stopped goes on
    #[arg(long, value_name = "FILE", help_heading = "Chat model")]
    pub cache: Option<PathBuf>,
    /// Write every call to this file, one JSON object a line; see `longspan trace show`
    #[arg(long, value_name = "FILE", help_heading = "Chat model")]
    pub trace: Option<PathBuf>,
    /// Stop before more than this many tokens of prompts and replies are spent
    #[arg(long, value_name = "TOKENS", help_heading = "Chat model")]
    pub budget: Option<u64>,
}

impl ChatModelArgs {
    /// True if any of them is given.
    pub fn is_used(&self) -> bool {
        self.endpoint.is_some()
            || self.cache.is_some()
            || self.trace.is_some()
            || self.budget.is_some()
    }
}

/// Opens it.
pub fn open(args: &ChatModelArgs, common: &Common) -> Result<Arc<dyn ChatModel>> {
    let mut layers = Layers {
        retry: Some(Retry::default()),
        ..Layers::default()
    };
    if let Some(tokens) = args.budget {
        layers.budget = Some(Arc::new(Budget::new(Limit {
            tokens: Some(tokens),
            ..Limit::default()
        })));
    }
    if let Some(path) = &args.cache {
        layers.cache = Some((Arc::new(CacheStore::open(path)?), CacheMode::ReadWrite));
    }
    if let Some(path) = &args.trace {
        layers.trace = Some(Arc::new(TraceWriter::open(path, true)?));
    }
    let model: Arc<dyn ChatModel> = match &args.endpoint {
        Some(url) => {
            let mut config = OpenAiConfig::new(url, args.endpoint_model.as_deref().unwrap_or(""));
            config.window = args.endpoint_window;
            config.key = ["LONGSPAN_API_KEY", "OPENAI_API_KEY"]
                .iter()
                .find_map(|name| std::env::var(name).ok().filter(|key| !key.is_empty()));
            let model = OpenAiModel::new(config)?
                .connect(&call())
                .map_err(explain)?;
            if model.card().name.is_empty() {
                bail!("{url} does not list its models; name one with --endpoint-model");
            }
            Arc::new(model)
        }
        None => {
            let opened = models::open(common)?;
            let options = EngineOptions {
                kv: kv_dtype(common)?,
                context: match common.context.as_deref() {
                    None | Some("auto") => ContextConfig::Full,
                    Some(text) => text.parse()?,
                },
            };
            let model = Arc::new(opened.model);
            Arc::new(LocalChat::new(model, &opened.name, options, KEEP_BYTES)?)
        }
    };
    Ok(layers.wrap(model))
}

/// A call that Ctrl-C stops.
pub fn call() -> Call {
    Call::new(ui::interrupted)
}

/// A failure as commands report it: a stop by Ctrl-C is an interruption.
pub fn explain(error: ChatError) -> anyhow::Error {
    match error {
        ChatError::Cancelled { .. } if ui::interrupted() => Interrupted(
            "what was finished before is kept where --cache or a state file is given".into(),
        )
        .into(),
        error => error.into(),
    }
}

/// Shows a workflow on a terminal: a bar for its steps, notes on standard error, the answer on standard output.
pub struct Shown {
    bar: ProgressBar,
    json: bool,
    last: String,
    started: bool,
    /// Writing to standard output failed.
    pub failure: Option<io::Error>,
}

impl Shown {
    /// Quiet on standard output with `json`.
    pub fn new(json: bool) -> Shown {
        Shown {
            bar: ui::bar(0, "steps", json),
            json,
            last: String::new(),
            started: false,
            failure: None,
        }
    }

    /// Takes the bar away and ends the answer's line. `answer` is printed if it was not streamed.
    pub fn finish(mut self, answer: &str) -> Result<()> {
        self.bar.finish_and_clear();
        if !self.json {
            if !self.started {
                self.text(answer);
            }
            println!();
        }
        match self.failure {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }
}

impl Observer for Shown {
    fn step(&mut self, name: &str, done: usize, total: usize) {
        self.bar.set_length(total as u64);
        self.bar.set_position(done as u64);
        if self.last != name {
            self.last = name.into();
            self.bar.set_message(name.to_string());
        }
    }

    fn text(&mut self, piece: &str) {
        if self.json || piece.is_empty() || self.failure.is_some() {
            return;
        }
        self.started = true;
        // A bar and a text on one terminal would overwrite each other.
        let result = self.bar.suspend(|| ui::write_out(piece));
        self.failure = result.err();
    }

    fn note(&mut self, text: &str) {
        if !self.json {
            self.bar.suspend(|| eprintln!("{text}"));
        }
    }
}
