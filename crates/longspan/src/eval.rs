//! `longspan eval`: benchmarks on a model, several policies, an endpoint or a searcher.

use crate::options::Common;
use crate::reading::{free_memory, kv_dtype};
use crate::run_folder::{Head, RunFolderArgs};
use crate::{models, ui};
use anyhow::Result;
use clap::{Args, ValueEnum};
use longspan_agents::rag::{Embedder, HashedWords};
use longspan_eval::EvalError;
use longspan_eval::bench::file_task::FileTask;
use longspan_eval::cache::Cache;
use longspan_eval::cell::{Cell, RunFolder};
use longspan_eval::registry::Registry;
use longspan_eval::report::Report;
use longspan_eval::run::{Job, RunOptions};
use longspan_eval::score::CellScore;
use longspan_eval::target::*;
use longspan_eval::task::{SampleCx, Task, Unit};
use longspan_infer::EngineOptions;
use longspan_infer::context::auto;
use longspan_infer::decode::DecodeConfig;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// An error with the exit code it asks for: 1 a gate failed, 2 bad input, 3 the target does not
/// answer, 130 interrupted.
#[derive(Debug)]
pub struct Exit {
    /// The code.
    pub code: u8,
    message: String,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Exit {}

pub(crate) fn exit(code: u8, message: impl Into<String>) -> anyhow::Error {
    Exit {
        code,
        message: message.into(),
    }
    .into()
}

pub(crate) fn coded(error: EvalError) -> anyhow::Error {
    let code = match &error {
        EvalError::Interrupted { .. } => 130,
        EvalError::Unreachable(_) => 3,
        EvalError::Target(_) => 1,
        _ => 2,
    };
    exit(code, error.to_string())
}

/// Who answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Who {
    /// The model, on this machine
    Local,
    /// Knows every answer: shows the best scores
    Oracle,
    /// Always says the same: shows the floors
    Constant,
}

/// Chat template or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Chat {
    /// Where the model has one
    Auto,
    /// Plain text
    Never,
}

#[derive(Args)]
pub struct Eval {
    /// Benchmarks (ruler, needle, ...), tasks (ruler/vt), or files that describe one (mine.toml); `list` prints
    /// them all
    #[arg(required = true, value_name = "BENCH")]
    benches: Vec<String>,
    /// Lengths, in each task's unit: 512,4k
    #[arg(long, value_delimiter = ',', value_parser = parse_length, value_name = "N,..")]
    lengths: Vec<usize>,
    /// Samples per length; per length and depth where a task has depths
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
    /// Depths of the answer in the text: this many, evenly spaced from 0 to 100%
    #[arg(long, default_value_t = 5, value_name = "N")]
    depths: usize,
    /// Context policy, as --context takes it; may be repeated to compare several
    #[arg(long, value_name = "POLICY")]
    policy: Vec<String>,
    /// Who answers
    #[arg(long, default_value = "local")]
    target: Who,
    /// OpenAI-compatible server, for instance http://localhost:8000/v1; the model is --model (where several
    /// are served), a key is read from LONGSPAN_API_KEY
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// With --endpoint: plain completions in place of chat completions
    #[arg(long)]
    completions: bool,
    /// Requests in flight at an endpoint
    #[arg(long, default_value_t = 4, value_name = "N")]
    concurrency: usize,
    /// With --endpoint: seconds to wait for a reply
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    timeout: u64,
    /// With --endpoint: tries per sample
    #[arg(long, default_value_t = 8, value_name = "N")]
    tries: u32,
    /// With --endpoint: most requests that begin in a minute; a server's Retry-After is kept to without it
    #[arg(long, value_name = "N", requires = "endpoint", value_parser = parse_rate)]
    rate: Option<f64>,
    /// Rank documents instead of writing (loco): bm25, hashed (words hashed to vectors), or an embedder's alias or folder
    #[arg(long, value_name = "BY", conflicts_with_all = ["endpoint", "recorded"])]
    search: Option<String>,
    /// With --search by vectors: a document is the mean of the vectors of pieces of this many words
    #[arg(long, value_name = "WORDS", requires = "search")]
    search_pieces: Option<usize>,
    /// Answers of an earlier run instead of a model
    #[arg(long, value_name = "RUN")]
    recorded: Option<PathBuf>,
    /// Official data of the benchmark (a folder or file in its published form)
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// A few small samples that ship with the program
    #[arg(long)]
    sample: bool,
    /// Whether prompts stand in the model's chat template
    #[arg(long, default_value = "auto")]
    chat: Chat,
    /// Decoding strategy, as `longspan ask --decode` takes it
    #[arg(long, default_value = "plain", value_name = "STRATEGY")]
    decode: String,
    #[command(flatten)]
    run: RunFolderArgs,
    /// Ask anew what was answered in earlier runs (for timings)
    #[arg(long)]
    no_cache: bool,
    /// Read documents that samples share anew for each
    #[arg(long)]
    no_reuse: bool,
}

pub(crate) fn parse_length(text: &str) -> Result<usize, String> {
    let (digits, factor) = match text.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1024),
        None => (text, 1),
    };
    let length: Option<usize> = digits.parse().ok();
    let length = length
        .and_then(|n| n.checked_mul(factor))
        .filter(|n| *n > 0);
    length.ok_or_else(|| format!("{text:?} is no length; expected for instance 512 or 4k"))
}

fn parse_rate(text: &str) -> Result<f64, String> {
    let rate: Option<f64> = text.parse().ok();
    rate.filter(|rate| rate.is_finite() && *rate > 0.0)
        .ok_or_else(|| format!("{text:?} is no rate; expected requests a minute, above 0"))
}

/// `longspan eval`
pub fn eval(args: &Eval, common: &Common) -> Result<()> {
    let mut registry = Registry::default();
    if args.benches == ["list"] {
        return list(&registry, common);
    }
    let mut tasks: Vec<Arc<dyn Task>> = Vec::new();
    for name in &args.benches {
        let mut name = name.clone();
        if name.ends_with(".toml") {
            let task = FileTask::open(Path::new(&name)).map_err(coded)?;
            name = task.meta().id.clone();
            registry.add(Arc::new(task)).map_err(coded)?;
        }
        for task in registry.select(&name).map_err(coded)? {
            if tasks.iter().all(|known| known.meta().id != task.meta().id) {
                tasks.push(task);
            }
        }
    }
    let depths = evenly(args.depths)?;
    let targets = targets(args, common)?;
    let counter = targets[0].counter();
    let mut jobs = Vec::new();
    let mut units = Vec::new();
    for task in &tasks {
        let meta = task.meta();
        let lengths: Vec<usize> = match (args.sample, args.lengths.is_empty()) {
            (true, _) => vec![match meta.unit {
                Unit::Tokens => 1024,
                Unit::Characters => 2000,
                Unit::Lines => 50,
                Unit::Words => 500,
                Unit::Rounds => 1,
            }],
            (false, true) => meta.lengths.to_vec(),
            (false, false) => args.lengths.clone(),
        };
        let samples = args.samples.unwrap_or(match (args.sample, meta.depths) {
            (true, _) => 2,
            (false, true) => 1,
            (false, false) => 10,
        });
        if samples == 0 {
            return Err(exit(2, "--samples is 0, expected at least 1"));
        }
        if !units.contains(&meta.unit.name()) {
            units.push(meta.unit.name());
        }
        for &length in &lengths {
            let made = task
                .samples(&SampleCx {
                    length,
                    longest: lengths.iter().copied().max().unwrap_or(length),
                    samples,
                    depths: &depths,
                    seed: args.run.seed,
                    counter,
                    data: args.data.as_deref(),
                    fixtures: args.sample,
                })
                .map_err(coded)?;
            for target in &targets {
                jobs.push(Job {
                    cell: Cell {
                        task: meta.id.clone(),
                        version: meta.version,
                        length,
                        model: target.model(),
                        policy: target.policy(),
                        seed: args.run.seed,
                    },
                    samples: made.clone(),
                    target: Arc::clone(target),
                });
            }
        }
    }
    let mut options = vec![
        ("seed".to_string(), args.run.seed.to_string()),
        ("decoding".to_string(), args.decode.clone()),
    ];
    let elsewhere = args.endpoint.is_some() || args.recorded.is_some() || args.search.is_some();
    if !elsewhere && args.target == Who::Local {
        options.push((
            "keys and values".into(),
            format!("{:?}", kv_dtype(common)?).to_lowercase(),
        ));
        options.push((
            "cpu level".into(),
            longspan_kernels::cpu::Level::current().name().into(),
        ));
        options.push((
            "chat template".into(),
            format!("{:?}", args.chat).to_lowercase(),
        ));
    }
    if let Some(path) = &args.data {
        options.push(("data".into(), path.display().to_string()));
    }
    let names: Vec<&str> = args
        .benches
        .iter()
        .map(|name| name.trim_end_matches(".toml"))
        .collect();
    let place = args.run.place(&names.join("-"));
    let head = Head {
        tokenizer: counter.name(),
        targets: targets
            .iter()
            .map(|t| t.identity().unwrap_or_else(|| t.model()))
            .collect(),
        options,
    };
    let cache = match args.no_cache {
        true => None,
        false => Some(Cache::new(&cache_folder()?).map_err(coded)?),
    };
    let unit = if units.len() == 1 { units[0] } else { "units" };
    let options = RunOptions {
        concurrency: args.concurrency,
        cache: cache.as_ref(),
        ..RunOptions::default()
    };
    let shown = (unit, common.json);
    let done = place
        .run(&jobs, head, (&registry, &tasks), options, shown)
        .map_err(coded)?;
    print(&done.report, done.folder.path(), common);
    place.say_left(done.outcome.map_err(coded)?);
    Ok(())
}

pub(crate) fn evenly(count: usize) -> Result<Vec<f64>> {
    match count {
        0 => Err(exit(2, "--depths is 0, expected at least 1")),
        1 => Ok(vec![50.0]),
        _ => Ok((0..count)
            .map(|i| (1000.0 * i as f64 / (count - 1) as f64).round() / 10.0)
            .collect()),
    }
}

fn cache_folder() -> Result<PathBuf> {
    Ok(match std::env::var_os("LONGSPAN_EVAL_CACHE") {
        Some(path) => path.into(),
        None => longspan_nn::hub::Hub::from_env()?.cache().join("eval"),
    })
}

fn targets(args: &Eval, common: &Common) -> Result<Vec<Arc<dyn Target>>> {
    if let Some(path) = &args.recorded {
        let folder = RunFolder::open(path).map_err(coded)?;
        let mut rows = Vec::new();
        for (cell, _) in folder.config().map_err(coded)?.cells {
            rows.extend(folder.predictions(&cell).map_err(coded)?);
        }
        return Ok(vec![Arc::new(Recorded::new("recorded", rows))]);
    }
    if let Some(url) = &args.endpoint {
        let config = EndpointConfig {
            url: url.clone(),
            model: common.model.clone().unwrap_or_default(),
            key: std::env::var("LONGSPAN_API_KEY").ok(),
            chat: !args.completions,
            timeout: Duration::from_secs(args.timeout.max(1)),
            tries: args.tries.max(1),
            pause: Duration::from_millis(500),
            per_minute: args.rate,
        };
        return Ok(vec![Arc::new(
            Endpoint::connect(config, ui::interrupted).map_err(coded)?,
        )]);
    }
    if let Some(by) = &args.search {
        return Ok(vec![Arc::new(searcher(by, args.search_pieces, common)?)]);
    }
    match args.target {
        Who::Oracle => return Ok(vec![Arc::new(Oracle)]),
        Who::Constant => return Ok(vec![Arc::new(Constant::default())]),
        Who::Local => {}
    }
    let kv = kv_dtype(common)?;
    let decode: DecodeConfig = args.decode.parse().map_err(|e| exit(2, format!("{e}")))?;
    let opened = models::open(common)?;
    // Reports are handed on: a file's name says enough, its folder too much.
    let (name, _) = opened.friendly();
    let window = opened.model.engine.window();
    let model = Arc::new(opened.model);
    let one = [common.context.clone().unwrap_or_else(|| "full".into())];
    let policies = if args.policy.is_empty() {
        &one[..]
    } else {
        &args.policy
    };
    let mut all: Vec<Arc<dyn Target>> = Vec::new();
    for policy in policies {
        let context = auto::parse(policy, window).map_err(|e| exit(2, format!("{e}")))?;
        let options = LocalOptions {
            engine: EngineOptions { kv, context },
            chat: match args.chat {
                Chat::Auto => ChatMode::Auto,
                Chat::Never => ChatMode::Never,
            },
            decode: decode.clone(),
            reuse: !args.no_reuse,
            reuse_bytes: free_memory().map_or(1 << 30, |bytes| bytes / 4),
            memory_bytes: free_memory().map(|bytes| bytes / 10 * 8),
        };
        let local = Local::new(Arc::clone(&model), &name, options, ui::interrupted);
        all.push(Arc::new(local.map_err(coded)?));
    }
    Ok(all)
}

fn searcher(name: &str, pieces: Option<usize>, common: &Common) -> Result<Search> {
    let embedder: Arc<dyn Embedder> = match name {
        "bm25" if pieces.is_some() => {
            return Err(exit(
                2,
                "--search-pieces is for vectors; bm25 reads whole documents",
            ));
        }
        "bm25" => return Ok(Search::new(SearchBy::Bm25, name)),
        "hashed" => Arc::new(HashedWords::default()),
        name => Arc::new(crate::search::embedder(name, common)?),
    };
    if pieces == Some(0) {
        return Err(exit(2, "--search-pieces is 0, expected at least 1"));
    }
    Ok(Search::new(SearchBy::Vectors { embedder, pieces }, name))
}

fn list(registry: &Registry, common: &Common) -> Result<()> {
    for task in registry.tasks() {
        let meta = task.meta();
        if common.json {
            println!("{}", serde_json::to_string(meta)?);
        } else {
            println!(
                "{:<24} v{}  {:<38} {:<18} {:<11} {}",
                meta.id,
                meta.version,
                meta.ability,
                meta.metric,
                meta.unit.name(),
                meta.licence
            );
        }
    }
    Ok(())
}

pub(crate) fn summary(score: &CellScore) -> Value {
    json!({
        "task": score.cell.task, "length": score.cell.length, "model": score.cell.model,
        "policy": score.cell.policy, "aggregates": score.aggregates, "counts": score.counts,
    })
}

pub(crate) fn print(report: &Report, folder: &Path, common: &Common) {
    if common.json {
        let cells: Vec<Value> = report
            .cells
            .iter()
            .map(|cell| {
                let mut value = summary(&cell.score);
                value["cost"] = json!(cell.cost);
                value
            })
            .collect();
        println!(
            "{}",
            json!({ "run": folder, "report": folder.join("report.html"), "cells": cells, "effective": report.effective })
        );
        return;
    }
    for cell in &report.cells {
        line(&cell.score, &cell.series());
    }
    for e in &report.effective {
        let bound = if e.at_least { "at least " } else { "" };
        println!(
            "effective length, {} ({} of {} tasks), {}: {bound}{:.0} {}",
            e.what, e.tasks.0, e.tasks.1, e.series, e.length, e.unit
        );
    }
    println!("{}", folder.join("report.html").display());
}

/// Prints one cell's score; `series` is model and policy.
pub(crate) fn line(score: &CellScore, series: &str) {
    let counts = &score.counts;
    let mut notes = String::new();
    for (count, name) in [
        (counts.truncated, "truncated"),
        (counts.unparsed, "unparsed"),
        (counts.errors, "errors"),
    ] {
        if count > 0 {
            notes += &format!("  {count} {name}");
        }
    }
    let (name, value) = match score.aggregates.first().filter(|_| score.main().is_some()) {
        Some(main) => {
            let se = main
                .estimate
                .se
                .map_or(String::new(), |se| format!(" ± {se:.3}"));
            (
                main.name.as_str(),
                format!("{:.3}{se}", main.estimate.value),
            )
        }
        None => ("", "no scored rows".into()),
    };
    println!(
        "{:<24} {:>9}  {series:<28} {:<18} {:<16} n {}{notes}",
        score.cell.task,
        ui::count(score.cell.length as u64),
        name,
        value,
        counts.rows
    );
}
