//! `longspan chat --memory scm`: a talk that is remembered, in a file, over restarts.

use crate::cli::{Chat, Common};
use crate::models;
use crate::ui;
use anyhow::{Context, Result};
use longspan_agents::chat::local_chat::LocalChat;
use longspan_agents::chat::model::{Call, Request};
use longspan_agents::memory::scm::stream::MemoryStream;
use longspan_agents::memory::scm::{Mode, Scm, ScmConfig};
use longspan_infer::EngineOptions;
use longspan_infer::context::ContextConfig;
use serde_json::json;
use std::io::{self, BufRead, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

/// Which memory a talk has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Memory {
    /// Self-controlled memory: every turn is kept, what matters returns
    Scm,
}

/// Options of a talk with a memory.
#[derive(clap::Args, Clone)]
pub struct MemoryArgs {
    /// Keep every turn and bring back what matters; the talk goes on over restarts
    #[arg(long)]
    pub memory: Option<Memory>,
    /// Where the memory is kept; default: one in the user's cache folder
    #[arg(long, value_name = "FILE", requires = "memory")]
    pub memory_file: Option<PathBuf>,
    /// Who decides what returns: paper, code (as published), naive, none
    #[arg(
        long,
        default_value = "paper",
        requires = "memory",
        value_name = "MODE"
    )]
    pub memory_mode: Mode,
    /// Turns that return
    #[arg(long, default_value_t = 6, requires = "memory", value_name = "K")]
    pub memory_k: usize,
    /// Most tokens of prompt and answer
    #[arg(
        long,
        default_value_t = 4000,
        requires = "memory",
        value_name = "TOKENS"
    )]
    pub memory_window: usize,
    /// Embedder that finds turns: alias or folder of a BERT sentence encoder
    #[arg(
        long,
        default_value = "minilm-l6",
        requires = "memory",
        value_name = "MODEL"
    )]
    pub memory_embedder: String,
}

/// `longspan chat --memory scm`
pub fn chat(args: &Chat, template: Request, common: &Common) -> Result<()> {
    let path = match &args.memory.memory_file {
        Some(path) => path.clone(),
        None => longspan_nn::hub::Hub::from_env()?
            .cache()
            .join("memory/scm.sqlite"),
    };
    let embedder = crate::search::embedder(&args.memory.memory_embedder, common)
        .context("a memory needs an embedder (--memory-embedder)")?;
    let opened = models::open(common)?;
    let options = EngineOptions {
        kv: crate::reading::kv_dtype(common)?,
        context: match common.context.as_deref() {
            // Prompts are kept within the window.
            None | Some("auto") => ContextConfig::Full,
            Some(text) => text.parse()?,
        },
    };
    let model = LocalChat::new(Arc::new(opened.model), &opened.name, options, 1 << 30)?;
    let config = ScmConfig {
        mode: args.memory.memory_mode,
        k: args.memory.memory_k,
        window: args.memory.memory_window,
        max_tokens: template.max_tokens,
        ..ScmConfig::default()
    };
    let stream = MemoryStream::open(&path)?;
    let mut scm = Scm::new(stream, config, &model, &embedder)?;
    if !common.json {
        eprintln!(
            "memory: {} ({} turns); /undo takes the last turn back, /forget all of them",
            path.display(),
            ui::count(scm.stream().items().len() as u64)
        );
    }
    let call = Call::new(ui::interrupted);
    let stdin = io::stdin();
    let interactive = io::IsTerminal::is_terminal(&stdin);
    loop {
        if interactive {
            eprint!("> ");
        }
        let mut line = String::new();
        let read = stdin
            .lock()
            .read_line(&mut line)
            .context("standard input")?;
        if read == 0 || ui::interrupted() {
            return Ok(());
        }
        match line.trim() {
            "" => continue,
            "/undo" => {
                let undone = scm.roll_back()?;
                eprintln!(
                    "{}",
                    if undone {
                        "the last turn is forgotten"
                    } else {
                        "there is no turn"
                    }
                );
                continue;
            }
            "/forget" => {
                scm.reset()?;
                eprintln!("everything is forgotten");
                continue;
            }
            _ => {}
        }
        let mut failure = None;
        let mut print = |text: &str| {
            if ui::interrupted() {
                return ControlFlow::Break(());
            }
            if common.json {
                return ControlFlow::Continue(());
            }
            let mut out = io::stdout().lock();
            match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failure = Some(error);
                    ControlFlow::Break(())
                }
            }
        };
        let system = args.system.as_deref();
        let turn = scm.turn(
            &model,
            &embedder,
            &template,
            system,
            line.trim(),
            &call,
            &mut print,
        );
        if let Some(error) = failure {
            return Err(error.into());
        }
        let turn = match turn {
            Err(_) if ui::interrupted() => return Ok(()),
            turn => turn?,
        };
        if common.json {
            let items = scm.stream().items();
            let activated: Vec<_> = (turn.activation.items.iter())
                .map(|&(item, form)| json!({ "turn": items[item].turn, "form": form }))
                .collect();
            println!(
                "{}",
                json!({
                    "answer": turn.reply.text, "finish_reason": turn.reply.finish, "turn": items.len(),
                    "prompt_tokens": turn.prompt_tokens, "activated": activated,
                    "questions": turn.activation.questions, "unclear": turn.activation.unclear,
                    "summary_failed": turn.summary_failed,
                })
            );
        } else {
            println!();
        }
        if let Some(why) = turn.summary_failed {
            eprintln!("the turn is kept, but has no summary yet: {why}");
        }
    }
}
