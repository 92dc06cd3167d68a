//! `longspan trace show`: what a workflow asked and what it took.

use crate::options::Common;
use crate::ui;
use anyhow::Result;
use clap::Subcommand;
use longspan_agents::chat::layers::{TraceLine, read_trace, summarize_trace};
use serde_json::json;
use std::path::PathBuf;

#[derive(Subcommand)]
pub enum Trace {
    /// List the calls of a file that --trace wrote, with tokens and seconds
    #[command(after_help = "Examples:
  longspan ask book.txt \"Who is the narrator?\" --workflow chain --trace calls.jsonl
  longspan trace show calls.jsonl
  longspan trace show calls.jsonl --full 3")]
    Show {
        /// The file
        file: PathBuf,
        /// Print prompt and reply of this call, from 1
        #[arg(long, value_name = "CALL")]
        full: Option<usize>,
    },
}

/// `longspan trace`
pub fn run(what: &Trace, common: &Common) -> Result<()> {
    let Trace::Show { file, full } = what;
    let lines = read_trace(file)?;
    if let Some(number) = full {
        let Some(line) = number.checked_sub(1).and_then(|index| lines.get(index)) else {
            anyhow::bail!(
                "--full {number}: {} holds calls 1 to {}",
                file.display(),
                lines.len()
            );
        };
        return print(line, common.json);
    }
    let totals = summarize_trace(&lines);
    if common.json {
        for line in &lines {
            println!("{}", json!(line));
        }
        for ((workflow, model), total) in &totals {
            println!(
                "{}",
                json!({ "workflow": workflow, "model": model, "total": total })
            );
        }
        return Ok(());
    }
    println!(
        "{:>4}  {:<14} {:<26} {:>9} {:>8} {:>8}  reply",
        "call", "workflow", "step", "read", "written", "seconds"
    );
    for (index, line) in lines.iter().enumerate() {
        let said = match (&line.error, &line.reply) {
            (Some(error), _) => format!("failed: {error}"),
            (None, Some(reply)) => reply.split_whitespace().collect::<Vec<_>>().join(" "),
            (None, None) => line.method.clone(),
        };
        let mut said: String = said.chars().take(60).collect();
        if line.from_cache {
            said = format!("(cached) {said}");
        }
        println!(
            "{:>4}  {:<14} {:<26} {:>9} {:>8} {:>8.2}  {said}",
            index + 1,
            line.workflow,
            line.step,
            ui::count(line.usage.prompt as u64),
            ui::count(line.usage.completion as u64),
            line.total_s
        );
    }
    println!();
    for ((workflow, model), total) in &totals {
        println!(
            "{workflow} by {model}: {} calls ({} from the cache, {} failed), {} tokens read ({} of them reused), {} written, {:.1} s",
            total.calls,
            total.from_cache,
            total.failed,
            ui::count(total.usage.prompt as u64),
            ui::count(total.usage.cached as u64),
            ui::count(total.usage.completion as u64),
            total.seconds
        );
    }
    Ok(())
}

fn print(line: &TraceLine, json: bool) -> Result<()> {
    if json {
        println!("{}", json!(line));
        return Ok(());
    }
    match &line.request {
        Some(request) => println!("{}\n{}", request.input.plain(), request.answer_prefix),
        None => println!("(the prompt was not traced)"),
    }
    println!(
        "--- {} {}: {}",
        line.model,
        line.method,
        line.finish.as_deref().unwrap_or("no reply")
    );
    println!(
        "{}",
        line.reply
            .as_deref()
            .or(line.error.as_deref())
            .unwrap_or("")
    );
    Ok(())
}
