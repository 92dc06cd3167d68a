//! `longspan summarize`: summaries of books and meetings of any length.

use crate::chat_model::{self, ChatModelArgs, Shown, call, explain};
use crate::cli::Reading;
use crate::options::Common;
use crate::reading::{join, read_documents};
use crate::workflow_ask::spent;
use anyhow::{Context, Result, bail};
use clap::Args;
use longspan_agents::workflow::summary::{self, Kind, SummaryConfig, Utterance, meeting_text};
use serde_json::json;
use std::path::PathBuf;

#[derive(Args)]
pub struct Summarize {
    /// Documents, or one meeting as JSON: a list of {"role", "content"}, or an object with that list as "dialogues"
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<String>,
    /// Each block on its own, without the one before as background
    #[arg(long)]
    pub no_scm: bool,
    /// Most tokens of a block; default 3000, less for small windows
    #[arg(long, value_name = "TOKENS")]
    pub block: Option<usize>,
    /// Write the summaries of all blocks and levels to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    pub reading: Reading,
    #[command(flatten)]
    pub chat_model: ChatModelArgs,
}

/// The utterances of a file that is a meeting.
fn meeting(file: &str, max_bytes: u64) -> Result<Option<Vec<Utterance>>> {
    if !file.ends_with(".json") {
        return Ok(None);
    }
    let size = std::fs::metadata(file)
        .with_context(|| file.to_string())?
        .len();
    if size > max_bytes {
        bail!("{file}: {size} bytes found, at most {max_bytes} expected; raise --max-bytes");
    }
    let text = std::fs::read_to_string(file).with_context(|| file.to_string())?;
    let mut value: serde_json::Value =
        serde_json::from_str(&text).with_context(|| file.to_string())?;
    if let Some(list) = value.get_mut("dialogues") {
        value = list.take();
    }
    // Other JSON is a text like any other.
    Ok(serde_json::from_value(value)
        .ok()
        .filter(|list: &Vec<Utterance>| !list.is_empty()))
}

/// `longspan summarize`
pub fn summarize(args: &Summarize, common: &Common) -> Result<()> {
    let found = match &args.files[..] {
        [only] => meeting(only, args.reading.max_bytes)?,
        _ => None,
    };
    let (text, kind) = match found {
        Some(utterances) => (meeting_text(&utterances), Kind::Meeting(utterances)),
        None => (
            join(&read_documents(&args.files, &args.reading)?),
            Kind::Book,
        ),
    };
    let model = chat_model::open(&args.chat_model, common)?;
    let mut config = SummaryConfig::scaled(model.card().window);
    config.no_scm = args.no_scm;
    if let Some(block) = args.block {
        (config.block, config.meeting_block) = (block, block);
    }
    let mut shown = Shown::new(common.json);
    let result = summary::run(&*model, &text, &kind, &config, &call(), &mut shown);
    let found = match result {
        Ok(found) => found,
        Err(error) => {
            shown.finish("")?;
            return Err(explain(error));
        }
    };
    shown.finish(&found.summary)?;
    if let Some(out) = &args.out {
        let tree = json!({ "summary": found.summary, "theme": found.theme, "nodes": found.nodes });
        std::fs::write(out, format!("{tree:#}\n")).with_context(|| out.display().to_string())?;
    }
    if common.json {
        println!(
            "{}",
            json!({
                "summary": found.summary, "theme": found.theme, "nodes": found.nodes, "model": model.card().name,
                "calls": found.took.calls, "prompt_tokens": found.took.usage.prompt,
                "completion_tokens": found.took.usage.completion, "seconds": found.took.seconds,
            })
        );
    } else {
        eprintln!("{}", spent(&found.took));
    }
    Ok(())
}
