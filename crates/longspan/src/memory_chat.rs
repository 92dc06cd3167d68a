//! `longspan chat --memory scm`: a talk that is remembered, in a file, over restarts; `longspan memory`: what is in it.

use crate::cli::Chat;
use crate::options::Common;
use crate::ui;
use anyhow::{Context, Result};
use longspan_agents::chat::model::{Call, Request};
use longspan_agents::memory::scm::stream::{Item, MemoryStream};
use longspan_agents::memory::scm::{Mode, Scm, ScmConfig};
use serde_json::json;
use std::path::PathBuf;

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
    let path = file_of(args.memory.memory_file.as_ref())?;
    let embedder = crate::search::embedder(&args.memory.memory_embedder, common)
        .context("a memory needs an embedder (--memory-embedder)")?;
    // Prompts are kept within the window, so full attention serves.
    let model = crate::chat_model::open(&args.chat_model, common)?;
    let config = ScmConfig {
        mode: args.memory.memory_mode,
        k: args.memory.memory_k,
        window: args.memory.memory_window,
        max_tokens: template.max_tokens,
        ..ScmConfig::default()
    };
    let stream = MemoryStream::open(&path)?;
    let mut scm = Scm::new(stream, config, &*model, &embedder)?;
    if !common.json {
        eprintln!(
            "memory: {} ({} turns); /undo takes the last turn back, /forget all of them",
            path.display(),
            ui::count(scm.stream().items().len() as u64)
        );
    }
    let call = Call::new(ui::interrupted);
    while let Some(line) = ui::next_line().context("standard input")? {
        match line.as_str() {
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
        let mut printed = ui::Printed::new(common.json);
        let system = args.system.as_deref();
        let turn = scm.turn(
            &*model,
            &embedder,
            &template,
            system,
            &line,
            &call,
            &mut |text| printed.piece(text),
        );
        printed.finish()?;
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
        }
        if let Some(why) = turn.summary_failed {
            eprintln!("the turn is kept, but has no summary yet: {why}");
        }
    }
    Ok(())
}

/// `longspan memory`
#[derive(clap::Subcommand)]
pub enum Kept {
    /// List what a memory holds, or print one turn
    #[command(after_help = "Examples:
  longspan memory show
  longspan memory show --memory-file friend.sqlite --last 20
  longspan memory show --turn 7")]
    Show {
        #[command(flatten)]
        file: MemoryFile,
        /// The newest turns only
        #[arg(long, value_name = "N", conflicts_with = "turn")]
        last: Option<usize>,
        /// This turn in full
        #[arg(long, value_name = "TURN")]
        turn: Option<usize>,
    },
    /// Write all turns as JSON, one object a line: what was said, summaries, tokens, last activation
    #[command(after_help = "Example: longspan memory export --out talk.jsonl")]
    Export {
        #[command(flatten)]
        file: MemoryFile,
        /// Into this file in place of standard output
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// Also the embeddings
        #[arg(long)]
        embeddings: bool,
    },
}

/// Which memory.
#[derive(clap::Args, Clone)]
pub struct MemoryFile {
    /// The memory's file; default: the one in the user's cache folder
    #[arg(long, value_name = "FILE")]
    memory_file: Option<PathBuf>,
}

/// `longspan memory show|export`
pub fn kept(what: &Kept, common: &Common) -> Result<()> {
    let (Kept::Show { file, .. } | Kept::Export { file, .. }) = what;
    let path = file_of(file.memory_file.as_ref())?;
    if !path.is_file() {
        anyhow::bail!(
            "{}: there is no memory; `longspan chat --memory scm` makes one",
            path.display()
        );
    }
    let stream = MemoryStream::open(&path)?;
    let items = stream.items();
    match what {
        Kept::Show {
            turn: Some(turn), ..
        } => {
            let Some(item) = items.iter().find(|item| item.turn == *turn) else {
                anyhow::bail!(
                    "{}: there is no turn {turn}; {}",
                    path.display(),
                    range(items)
                );
            };
            if common.json {
                println!("{}", json!(item));
                return Ok(());
            }
            println!("{}", item.text);
            if item.summary != item.text {
                println!("\nSummary: {}", item.summary);
            }
        }
        Kept::Show { last, .. } => {
            let skip = items.len().saturating_sub(last.unwrap_or(usize::MAX));
            if common.json {
                items[skip..]
                    .iter()
                    .for_each(|item| println!("{}", json!(item)));
                return Ok(());
            }
            println!("{:>6} {:>7} {:>9}  said", "turn", "tokens", "activated");
            for item in &items[skip..] {
                let said = format!("{} / {}", item.user, item.assistant);
                let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
                let said: String = said.chars().take(90).collect();
                let activated = match item.last_access {
                    at if at > item.turn => at.to_string(),
                    _ => "-".into(),
                };
                println!(
                    "{:>6} {:>7} {activated:>9}  {said}",
                    item.turn, item.text_tokens
                );
            }
            eprintln!("{}: {}", path.display(), range(items));
        }
        Kept::Export {
            out, embeddings, ..
        } => {
            let mut text = String::new();
            for item in items {
                let mut line = json!(item);
                if *embeddings {
                    line["embedding"] = json!(item.embedding);
                }
                text.push_str(&format!("{line}\n"));
            }
            match out {
                Some(out) => {
                    std::fs::write(out, text).with_context(|| out.display().to_string())?;
                    eprintln!("{}: {}", out.display(), range(items));
                }
                None => ui::write_out(&text)?,
            }
        }
    }
    Ok(())
}

fn range(items: &[Item]) -> String {
    match items {
        [] => "no turns".into(),
        [first, .., last] => format!(
            "{} turns, {} to {}",
            ui::count(items.len() as u64),
            first.turn,
            last.turn
        ),
        [only] => format!("one turn, {}", only.turn),
    }
}

/// The file that is named, else the one in the user's cache folder.
fn file_of(named: Option<&PathBuf>) -> Result<PathBuf> {
    match named {
        Some(path) => Ok(path.clone()),
        None => Ok(longspan_nn::hub::Hub::from_env()?
            .cache()
            .join("memory/scm.sqlite")),
    }
}
