//! `longspan eval`, `score`, `report`, `compare`: benchmarks on a model, a policy or an endpoint,
//! and what came of them.

use crate::cli::Common;
use crate::reading::{free_memory, kv_dtype};
use crate::{models, ui};
use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use longspan_eval::cache::Cache;
use longspan_eval::cell::{Cell, RunConfig, RunFolder};
use longspan_eval::compare::{self, Comparison};
use longspan_eval::registry::Registry;
use longspan_eval::report::{self, Report};
use longspan_eval::run::{Job, Observer, RunOptions};
use longspan_eval::score::{self, CellScore};
use longspan_eval::target::*;
use longspan_eval::task::{Prediction, SampleCx, Task, Unit};
use longspan_eval::{EvalError, run};
use longspan_infer::EngineOptions;
use longspan_infer::context::auto;
use longspan_infer::decode::DecodeConfig;
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

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

fn exit(code: u8, message: impl Into<String>) -> anyhow::Error {
    Exit {
        code,
        message: message.into(),
    }
    .into()
}

fn coded(error: EvalError) -> anyhow::Error {
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
    /// Benchmarks (ruler, needle, ...) or tasks (ruler/vt); `list` prints them all
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
    /// OpenAI-compatible server, for instance http://localhost:8000/v1; the model is --model, a key
    /// is read from LONGSPAN_API_KEY
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
    /// Answers of an earlier run instead of a model
    #[arg(long, value_name = "RUN")]
    recorded: Option<PathBuf>,
    /// Official data of the benchmark (a folder or file in its published form)
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// A few small samples that ship with the program
    #[arg(long)]
    sample: bool,
    /// Decides all random choices
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Whether prompts stand in the model's chat template
    #[arg(long, default_value = "auto")]
    chat: Chat,
    /// Decoding strategy, as `longspan ask --decode` takes it
    #[arg(long, default_value = "plain", value_name = "STRATEGY")]
    decode: String,
    /// Folder of the run; the same command with the same folder goes on where it stopped
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Ask anew what was answered in earlier runs (for timings)
    #[arg(long)]
    no_cache: bool,
    /// Read documents that samples share anew for each
    #[arg(long)]
    no_reuse: bool,
    /// Stop after this time; the run can go on later
    #[arg(long, value_name = "MINUTES")]
    max_minutes: Option<f64>,
}

#[derive(Args)]
pub struct Score {
    /// Run folders; with --pred one benchmark or task
    #[arg(required = true, value_name = "RUN")]
    what: Vec<String>,
    /// Predictions made elsewhere: a .jsonl file, or a folder with one per task; rows have `pred` and
    /// `outputs`
    #[arg(long, value_name = "PATH")]
    pred: Option<PathBuf>,
}

#[derive(Args)]
pub struct ReportArgs {
    /// Run folders
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Folder for report.html, report.md, report.json; default the first run's
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// TOML file with [[gate]] entries: task, length, policy, min, max; exit code 1 if one fails
    #[arg(long, value_name = "FILE")]
    gate: Option<PathBuf>,
    /// Put different versions of a task into one table
    #[arg(long)]
    force: bool,
}

#[derive(Args)]
pub struct Compare {
    /// Run folder, or several policies of one run
    a: PathBuf,
    /// Run folder to compare with it
    b: Option<PathBuf>,
    /// Exit with code 1 if any task falls by more than this
    #[arg(long, value_name = "X")]
    max_drop: Option<f64>,
    /// Compare different versions of a task
    #[arg(long)]
    force: bool,
}

fn parse_length(text: &str) -> Result<usize, String> {
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

/// Shows progress, notices Ctrl-C.
struct Bar(indicatif::ProgressBar);

impl Observer for Bar {
    fn start(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
        // What earlier runs did says nothing about this one's speed.
        self.0.reset_eta();
    }

    fn progress(&self, done: u64, _total: u64, cell: &Cell) {
        self.0.set_position(done);
        self.0.set_message(cell.task.clone());
    }

    fn cancelled(&self) -> bool {
        ui::interrupted()
    }
}

/// `longspan eval`
pub fn eval(args: &Eval, common: &Common) -> Result<()> {
    let registry = Registry::default();
    if args.benches == ["list"] {
        return list(&registry, common);
    }
    let mut tasks: Vec<Arc<dyn Task>> = Vec::new();
    for name in &args.benches {
        for task in registry.select(name).map_err(coded)? {
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
                    seed: args.seed,
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
                        seed: args.seed,
                    },
                    samples: made.clone(),
                    target: Arc::clone(target),
                });
            }
        }
    }
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let mut options = vec![
        ("seed".to_string(), args.seed.to_string()),
        ("decoding".to_string(), args.decode.clone()),
    ];
    if let (None, None, Who::Local) = (&args.endpoint, &args.recorded, args.target) {
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
    let config = RunConfig {
        harness: env!("CARGO_PKG_VERSION").into(),
        compat: "official".into(),
        cells: jobs
            .iter()
            .map(|job| (job.cell.clone(), job.samples.len()))
            .collect(),
        tokenizer: counter.name(),
        targets: targets
            .iter()
            .map(|t| t.identity().unwrap_or_else(|| t.model()))
            .collect(),
        options,
        created: now,
    };
    let path = args.out.clone().unwrap_or_else(|| {
        let name = args.benches.join("-").replace('/', "_");
        Path::new("runs").join(format!("{}-{name}", report::stamp(now)))
    });
    let folder = RunFolder::create(&path, &config).map_err(coded)?;
    let cache = match args.no_cache {
        true => None,
        false => Some(Cache::new(&cache_folder()?).map_err(coded)?),
    };
    let unit = if units.len() == 1 { units[0] } else { "units" };
    let bar = ui::bar(0, unit, common.json);
    let outcome = run::run(
        &folder,
        &jobs,
        &RunOptions {
            concurrency: args.concurrency,
            cache: cache.as_ref(),
            limit: args
                .max_minutes
                .map(|m| Duration::from_secs_f64(m.max(0.0) * 60.0)),
            ..RunOptions::default()
        },
        &Bar(bar.clone()),
    );
    bar.finish_and_clear();
    let report = Report::build(std::slice::from_ref(&folder), &registry, true).map_err(coded)?;
    report.write(folder.path()).map_err(coded)?;
    print(&report, folder.path(), common);
    let outcome = outcome.map_err(coded)?;
    if outcome.out_of_time {
        eprintln!(
            "longspan: {} of {} samples are done; the same command with --out {} goes on",
            outcome.done,
            outcome.total,
            path.display()
        );
    }
    Ok(())
}

fn evenly(count: usize) -> Result<Vec<f64>> {
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
        let Some(model) = common.model.clone() else {
            return Err(exit(
                2,
                "--endpoint needs --model, the model's name on the server",
            ));
        };
        let config = EndpointConfig {
            url: url.clone(),
            model,
            key: std::env::var("LONGSPAN_API_KEY").ok(),
            chat: !args.completions,
            timeout: Duration::from_secs(args.timeout.max(1)),
            tries: args.tries.max(1),
            pause: Duration::from_millis(500),
        };
        return Ok(vec![Arc::new(
            Endpoint::new(config, ui::interrupted).map_err(coded)?,
        )]);
    }
    match args.target {
        Who::Oracle => return Ok(vec![Arc::new(Oracle)]),
        Who::Constant => return Ok(vec![Arc::new(Constant::default())]),
        Who::Local => {}
    }
    let kv = kv_dtype(common)?;
    let decode: DecodeConfig = args.decode.parse().map_err(|e| exit(2, format!("{e}")))?;
    let opened = models::open(common)?;
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
        let local = Local::new(Arc::clone(&model), &opened.name, options, ui::interrupted);
        all.push(Arc::new(local.map_err(coded)?));
    }
    Ok(all)
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

fn summary(score: &CellScore) -> Value {
    json!({
        "task": score.cell.task, "length": score.cell.length, "model": score.cell.model,
        "policy": score.cell.policy, "aggregates": score.aggregates, "counts": score.counts,
    })
}

fn print(report: &Report, folder: &Path, common: &Common) {
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
        line(&cell.score);
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

fn line(score: &CellScore) {
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
        "{:<24} {:>9}  {:<28} {:<18} {:<16} n {}{notes}",
        score.cell.task,
        ui::count(score.cell.length as u64),
        format!("{} {}", score.cell.model, score.cell.policy),
        name,
        value,
        counts.rows
    );
}

/// `longspan score`
pub fn score(args: &Score, common: &Common) -> Result<()> {
    let registry = Registry::default();
    let show = |score: &CellScore| match common.json {
        true => println!("{}", summary(score)),
        false => line(score),
    };
    if let Some(path) = &args.pred {
        let [name] = args.what.as_slice() else {
            return Err(exit(2, "with --pred, name one benchmark or task"));
        };
        let mut found = false;
        for task in registry.select(name).map_err(coded)? {
            let id = &task.meta().id;
            let short = id.rsplit('/').next().unwrap_or(id);
            let file = match path.is_dir() {
                true => path.join(format!("{short}.jsonl")),
                false => path.clone(),
            };
            if !file.is_file() {
                continue;
            }
            found = true;
            let rows = foreign(&file)?;
            let cell = Cell {
                task: id.clone(),
                version: task.meta().version,
                length: 0,
                model: file.display().to_string(),
                policy: "-".into(),
                seed: 0,
            };
            show(&score::score_cell(&*task, &cell, &rows));
        }
        if !found {
            return Err(exit(
                2,
                format!("{}: found no predictions for {name}", path.display()),
            ));
        }
        return Ok(());
    }
    for run in &args.what {
        let folder = RunFolder::open(Path::new(run)).map_err(coded)?;
        for (score, _) in score::score_run(&folder, &registry).map_err(coded)? {
            show(&score);
        }
    }
    Ok(())
}

/// Rows with `pred` and `outputs`.
fn foreign(path: &Path) -> Result<Vec<Prediction>> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| exit(2, format!("{}: {error}", path.display())))?;
    let mut rows = Vec::new();
    for (index, line) in text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
    {
        let bad = |reason: &str| exit(2, format!("{}:{}: {reason}", path.display(), index + 1));
        let value: Value = serde_json::from_str(line).map_err(|error| bad(&error.to_string()))?;
        let Some(text) = value["pred"].as_str() else {
            return Err(bad("`pred` is missing or no string"));
        };
        let references = match &value["outputs"] {
            Value::String(one) => vec![one.clone()],
            Value::Array(all) => all
                .iter()
                .filter_map(|v| v.as_str().map(str::to_string))
                .collect(),
            _ => return Err(bad("`outputs` is missing or no list")),
        };
        rows.push(Prediction {
            id: index.to_string(),
            index,
            cluster: index.to_string(),
            references,
            text: text.into(),
            ..Prediction::default()
        });
    }
    Ok(rows)
}

/// One line of a gate file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Gate {
    task: String,
    length: Option<usize>,
    policy: Option<String>,
    min: Option<f64>,
    max: Option<f64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Gates {
    gate: Vec<Gate>,
}

/// `longspan report`
pub fn report(args: &ReportArgs, common: &Common) -> Result<()> {
    let registry = Registry::default();
    let open = |path: &PathBuf| RunFolder::open(path).map_err(coded);
    let folders: Vec<RunFolder> = args.runs.iter().map(open).collect::<Result<_>>()?;
    let report = Report::build(&folders, &registry, args.force).map_err(coded)?;
    let out = args.out.as_ref().unwrap_or(&args.runs[0]);
    std::fs::create_dir_all(out).with_context(|| format!("{}", out.display()))?;
    report.write(out).map_err(coded)?;
    print(&report, out, common);
    let Some(path) = &args.gate else {
        return Ok(());
    };
    let text = std::fs::read_to_string(path)
        .map_err(|error| exit(2, format!("{}: {error}", path.display())))?;
    let gates: Gates =
        toml::from_str(&text).map_err(|error| exit(2, format!("{}: {error}", path.display())))?;
    let mut failed = Vec::new();
    for gate in &gates.gate {
        let cells: Vec<_> = report
            .cells
            .iter()
            .filter(|cell| {
                let cell = &cell.score.cell;
                cell.task == gate.task
                    && gate.length.is_none_or(|length| length == cell.length)
                    && gate
                        .policy
                        .as_ref()
                        .is_none_or(|policy| *policy == cell.policy)
            })
            .collect();
        if cells.is_empty() {
            failed.push(format!("{}: no cell was run", gate.task));
        }
        for cell in cells {
            let value = cell.score.main().map_or(f64::NAN, |main| main.value);
            let low = gate.min.is_some_and(|min| value < min || value.is_nan());
            let high = gate.max.is_some_and(|max| value > max || value.is_nan());
            if low || high {
                failed.push(format!(
                    "{} at {}, {}: {value:.4}, expected {}",
                    gate.task,
                    cell.score.cell.length,
                    cell.series(),
                    match (gate.min, gate.max) {
                        (Some(min), Some(max)) => format!("{min} to {max}"),
                        (Some(min), None) => format!("at least {min}"),
                        (_, max) => format!("at most {}", max.unwrap_or(f64::NAN)),
                    }
                ));
            }
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(exit(1, format!("gate: {}", failed.join("; "))))
}

/// `longspan compare`
pub fn compare(args: &Compare, common: &Common) -> Result<()> {
    let registry = Registry::default();
    let scores = |path: &PathBuf| -> Result<Vec<CellScore>> {
        let folder = RunFolder::open(path).map_err(coded)?;
        let all = score::score_run(&folder, &registry).map_err(coded)?;
        Ok(all.into_iter().map(|(score, _)| score).collect())
    };
    let losses = |task: &str| {
        registry
            .task(task)
            .is_ok_and(|t| !t.meta().higher_is_better)
    };
    let a = scores(&args.a)?;
    let all = match &args.b {
        Some(b) => compare::compare(&a, &scores(b)?, &losses, args.force),
        None => compare::within(&a, &losses),
    }
    .map_err(coded)?;
    for comparison in &all {
        match common.json {
            true => println!("{}", serde_json::to_string(comparison)?),
            false => show(comparison),
        }
    }
    let worst = all.iter().map(Comparison::drop).fold(0.0, f64::max);
    match args.max_drop {
        Some(most) if worst > most => Err(exit(
            1,
            format!("gate: the largest drop is {worst:.4}, expected at most {most}"),
        )),
        _ => Ok(()),
    }
}

fn show(c: &Comparison) {
    let paired = &c.paired;
    let interval = paired.bootstrap.map_or(String::new(), |(low, high)| {
        format!(" [{low:+.3}, {high:+.3}]")
    });
    println!(
        "{} at {}: {} {:.3} -> {} {:.3}, difference {:+.3}{interval}, n {}, better {}, worse {}",
        c.task,
        c.length,
        c.a,
        c.a_value,
        c.b,
        c.b_value,
        paired.difference.value,
        paired.difference.n,
        paired.better,
        paired.worse
    );
    for (id, a, b) in c.flips.iter().take(20) {
        println!("  {id}  {a:.3} -> {b:.3}");
    }
    if c.flips.len() > 20 {
        println!("  and {} more (--json prints all)", c.flips.len() - 20);
    }
}
