//! `longspan write`: long texts, planned and written paragraph by paragraph.

use crate::chat_model::{self, ChatModelArgs, Shown, call};
use crate::options::Common;
use crate::ui::{self, Interrupted};
use crate::workflow_ask::spent;
use anyhow::{Context, Result};
use clap::Args;
use longspan_agents::chat::model::ChatError;
use longspan_agents::workflow::agent_write::{
    AgentWrite, AgentWriteConfig, Step, count_words, parse_plan,
};
use serde_json::json;
use std::path::{Path, PathBuf};

#[derive(Args)]
pub struct Write {
    /// What to write
    pub instruction: String,
    /// Words of the whole text
    #[arg(long, value_name = "N")]
    pub words: Option<usize>,
    /// Write the text to this file; the work so far is kept beside it, in FILE.state.json, and the same command goes on
    /// from there
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// A plan of one's own: one line a paragraph, `Paragraph 1 - Main Point: ... - Word Count: 400 words`
    #[arg(long, value_name = "FILE")]
    pub plan: Option<PathBuf>,
    /// Of plan and text; 0 = always the likeliest token
    #[arg(long, default_value_t = 1.0)]
    pub temperature: f32,
    /// Same seed, same text
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Most tokens of a reply
    #[arg(long, default_value_t = 4096, value_name = "N")]
    pub max_tokens: usize,
    /// How often a paragraph that is too short is gone on with
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub extend: usize,
    /// Lowers the chance of words that stand in the text already, above 1; for models of this program
    #[arg(long, default_value_t = 1.15, value_name = "R")]
    pub repetition_penalty: f32,
    #[command(flatten)]
    pub chat_model: ChatModelArgs,
}

fn state_path(out: &Path) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(".state.json");
    PathBuf::from(name)
}

/// `longspan write`
pub fn write(args: &Write, common: &Common) -> Result<()> {
    let config = AgentWriteConfig {
        words: args.words,
        max_tokens: args.max_tokens.max(1),
        temperature: args.temperature,
        seed: args.seed,
        extend: args.extend,
        repetition_penalty: args.repetition_penalty,
        ..AgentWriteConfig::default()
    };
    let plan: Option<Vec<Step>> = match &args.plan {
        None => None,
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            Some(parse_plan(&text, &config).with_context(|| path.display().to_string())?)
        }
    };
    let model = chat_model::open(&args.chat_model, common)?;
    let mut writer = AgentWrite::new(&*model, config);
    let state = args.out.as_deref().map(state_path);
    if let Some(path) = &state {
        writer = writer.state(path);
    }
    let mut shown = Shown::new(common.json || args.out.is_some());
    let result = writer.run_with(&args.instruction, plan, &call(), &mut shown);
    shown.finish("")?;
    let found = match result {
        Err(ChatError::Cancelled { .. }) if ui::interrupted() => {
            let kept = match &state {
                Some(path) => format!(
                    "all finished paragraphs are in {}; the same command goes on from there",
                    path.display()
                ),
                None => "nothing is kept without --out".into(),
            };
            return Err(Interrupted(kept).into());
        }
        found => found?,
    };
    let text = found.text();
    let words = count_words(&text);
    if let Some(out) = &args.out {
        std::fs::write(out, format!("{text}\n")).with_context(|| out.display().to_string())?;
        if let Some(path) = &state {
            std::fs::remove_file(path).with_context(|| path.display().to_string())?;
        }
    }
    if common.json {
        let paragraphs = found.plan.iter().zip(&found.paragraphs).map(|(step, paragraph)| {
            json!({ "point": step.point, "planned_words": step.words, "words": count_words(paragraph) })
        });
        println!(
            "{}",
            json!({
                "text": if args.out.is_none() { Some(&text) } else { None }, "out": args.out, "words": words,
                "requested_words": args.words, "paragraphs": paragraphs.collect::<Vec<_>>(), "model": found.model,
                "calls": found.took.calls, "prompt_tokens": found.took.usage.prompt,
                "reused_tokens": found.took.usage.cached, "completion_tokens": found.took.usage.completion,
                "seconds": found.took.seconds,
            })
        );
    } else {
        let asked = args.words.map_or(String::new(), |asked| {
            format!(" of {}", ui::count(asked as u64))
        });
        eprintln!(
            "{}{asked} words in {} paragraphs; {}",
            ui::count(words as u64),
            found.paragraphs.len(),
            spent(&found.took)
        );
        if let Some(out) = &args.out {
            println!("{}", out.display());
        }
    }
    Ok(())
}
