//! `longspan bench dialogue`: SirLLM's three tasks (arXiv 2405.12528), policies beside each other at caches of one
//! size. Finished sessions are kept; the same command goes on with the others.

use crate::models;
use crate::options::Common;
use crate::reading::kv_dtype;
use crate::ui;
use anyhow::{Context, Result, bail};
use clap::Args;
use longspan_data::task::dialogue::{Session, Talk, read_published};
use longspan_eval::EvalError;
use longspan_eval::dialogue::{Feed, Figures, SessionResult, TalkOptions, figures, hold};
use longspan_eval::target::ChatMode;
use longspan_infer::EngineOptions;
use longspan_infer::context::{ContextConfig, auto};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::io::Write;
use std::path::{Path, PathBuf};

/// `longspan bench dialogue`
#[derive(Args)]
pub struct DialogueBench {
    /// Tasks: grocery, dialogue, rock-paper-scissors
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "grocery,dialogue,rock-paper-scissors",
        value_name = "TASK,.."
    )]
    tasks: Vec<String>,
    /// Turns of a task, in whole sessions; rounds against each of the three opponents
    #[arg(long, default_value_t = 200, value_name = "N")]
    turns: usize,
    /// Tokens that the memory holds, under the methods that are not named
    #[arg(long, default_value_t = 256, value_name = "TOKENS")]
    cache: usize,
    /// A policy as --context takes it, as often as wanted; none = full, sinks and sirllm of --cache tokens, and
    /// sirllm with the surprise of the published code
    #[arg(long = "method", value_name = "POLICY")]
    methods: Vec<String>,
    /// A published file of the grocery or the dialogue task, in place of made-up sessions
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Remember the model's own replies in place of the right ones
    #[arg(long)]
    own_replies: bool,
    /// Turns stand as USER: ... ASSISTANT: ..., as in the paper, and not in the model's chat template
    #[arg(long)]
    plain: bool,
    /// Seed of the talks
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Folder for sessions.jsonl and dialogue.json; the same folder goes on where it stopped
    #[arg(long, default_value = "dialogue-bench", value_name = "FOLDER")]
    out: PathBuf,
}

/// A session under a method, as stored.
#[derive(Serialize, Deserialize)]
struct Row {
    /// All that decides the result.
    setup: String,
    task: String,
    method: String,
    result: SessionResult,
}

/// What is said of a method on a task.
#[derive(Serialize)]
struct Line {
    model: String,
    task: String,
    method: String,
    #[serde(flatten)]
    figures: Figures,
}

fn load(path: &Path) -> Result<Vec<Row>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let name = || path.display().to_string();
    let mut text = std::fs::read_to_string(path).with_context(name)?;
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    if whole < text.len() {
        // Half a line at the end is of a run that was killed; the next one begins in its place.
        text.truncate(whole);
        std::fs::write(path, &text).with_context(name)?;
    }
    let rows = text.lines().enumerate().map(|(index, line)| {
        serde_json::from_str(line).with_context(|| format!("{}, line {}", name(), index + 1))
    });
    rows.collect()
}

/// Policies with caches of one size.
fn equal(cache: usize, talk: Talk) -> Vec<String> {
    let (rest, decay) = (cache.saturating_sub(4).max(1), talk.decay());
    vec![
        "full".into(),
        format!("sinks:4,{rest}"),
        format!("sirllm:start=4,top={rest},decay={decay}"),
        format!("sirllm:start=4,top={rest},decay={decay},entropy=self-shifted"),
    ]
}

/// Runs the tasks.
pub fn run(args: &DialogueBench, common: &Common) -> Result<()> {
    if args.turns == 0 || args.cache < 8 {
        bail!(
            "--turns {} and --cache {}: expected at least 1 and 8",
            args.turns,
            args.cache
        );
    }
    let mut tasks: Vec<(Talk, Vec<Session>)> = Vec::new();
    for name in &args.tasks {
        let known = Talk::ALL.iter().find(|(_, known)| known == name);
        let Some((talk, _)) = known else {
            let names = Talk::ALL.map(|(_, name)| name).join(", ");
            bail!("--tasks {name}: expected one of {names}");
        };
        tasks.push((*talk, talk.sessions(args.turns, args.seed)));
    }
    if let Some(file) = &args.file {
        let [(talk, sessions)] = &mut tasks[..] else {
            bail!("--file holds one task; name it with --tasks");
        };
        let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
        *sessions = read_published(&text).with_context(|| file.display().to_string())?;
        if *talk == Talk::RockPaperScissors {
            bail!("--file: the games are made up here; name grocery or dialogue");
        }
        let mut turns = 0;
        sessions.retain(|session| {
            let wanted = turns < args.turns;
            turns += session.turns.len();
            wanted
        });
    }
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let store = args.out.join("sessions.jsonl");
    let mut rows = load(&store)?;
    let opened = models::open(common)?;
    let model = &opened.model;
    let kv = kv_dtype(common)?;
    let feed = match args.own_replies {
        true => Feed::Own,
        false => Feed::Right,
    };
    let chat = match args.plain {
        true => ChatMode::Never,
        false => ChatMode::Auto,
    };
    let mut lines = Vec::new();
    for (talk, sessions) in &tasks {
        let name = (Talk::ALL.iter())
            .find(|(known, _)| known == talk)
            .map_or("", |(_, name)| name);
        let methods = match args.methods.is_empty() {
            true => equal(args.cache, *talk),
            false => args.methods.clone(),
        };
        for method in methods {
            let context: ContextConfig = auto::parse(&method, model.engine.window())?;
            let method = context.to_string();
            let options = TalkOptions {
                engine: EngineOptions { kv, context },
                chat,
                feed,
            };
            let text = serde_json::to_vec(sessions)?;
            let setup = json!([
                model.engine.fingerprint(),
                format!("{kv:?} {chat:?} {feed:?}"),
                blake3::hash(&text).to_hex().as_str(),
            ])
            .to_string();
            let bar = ui::bar(sessions.len() as u64, "sessions", common.json);
            bar.set_message(format!("{name} {method}"));
            for session in sessions {
                let done = rows.iter().any(|row| {
                    row.setup == setup && row.method == method && row.result.session == session.id
                });
                if !done {
                    let result = match hold(model, &options, session, &ui::interrupted) {
                        Err(EvalError::Interrupted { .. }) => {
                            return Err(ui::Interrupted(
                                "finished sessions are kept; the same command goes on".into(),
                            )
                            .into());
                        }
                        result => result?,
                    };
                    let row = Row {
                        setup: setup.clone(),
                        task: name.into(),
                        method: method.clone(),
                        result,
                    };
                    append(&store, &row)?;
                    rows.push(row);
                }
                bar.inc(1);
            }
            bar.finish_and_clear();
            let mine = |row: &&Row| row.setup == setup && row.method == method;
            let results: Vec<&SessionResult> =
                rows.iter().filter(mine).map(|row| &row.result).collect();
            let line = Line {
                model: opened.name.clone(),
                task: name.into(),
                method,
                figures: figures(&results),
            };
            match common.json {
                true => println!("{}", serde_json::to_string(&line)?),
                false => print(&line, lines.is_empty()),
            }
            lines.push(line);
        }
    }
    let path = args.out.join("dialogue.json");
    std::fs::write(&path, serde_json::to_vec_pretty(&lines)?)
        .with_context(|| path.display().to_string())
}

fn append(path: &Path, row: &Row) -> Result<()> {
    let file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path);
    let line = serde_json::to_string(row)? + "\n";
    file.and_then(|mut file| file.write_all(line.as_bytes()))
        .with_context(|| path.display().to_string())
}

fn print(line: &Line, head: bool) {
    if head {
        println!(
            "{:<20} {:<44} {:>6} {:>7} {:>7} {:>7} {:>7} {:>6} {:>20} {:>10}",
            "task",
            "method",
            "turns",
            "recall",
            "by mean",
            "margin",
            "cached",
            "filler",
            "won/drawn/lost",
            "kv"
        );
    }
    let f = &line.figures;
    let percent = |share: Option<f64>| share.map_or("-".into(), |x| format!("{:.0} %", 100.0 * x));
    let number = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.2}"));
    let game = f.game.map_or("-".into(), |game| {
        game.map(|x| format!("{:.0} %", 100.0 * x)).join(" / ")
    });
    println!(
        "{:<20} {:<44} {:>6} {:>7} {:>7} {:>7} {:>7} {:>6} {:>20} {:>10}",
        line.task,
        line.method,
        f.turns,
        percent(f.recall),
        percent(f.recall_mean),
        number(f.margin),
        number(f.held),
        percent(f.filler),
        game,
        ui::bytes(f.kv_bytes)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_that_are_not_named_hold_as_many_tokens() {
        for (talk, name) in Talk::ALL {
            for method in equal(100, talk).iter().skip(1) {
                let context: ContextConfig = method.parse().unwrap();
                let tokens = match &context {
                    ContextConfig::Sinks(config) => config.n_init + config.n_local.unwrap(),
                    ContextConfig::SirLlm(config) => {
                        (config.start + config.recent + config.top.unwrap()) as u64
                    }
                    other => panic!("{name}: {other}"),
                };
                assert_eq!(tokens, 100, "{name}: {context}");
            }
        }
    }
}
