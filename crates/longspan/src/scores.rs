//! `longspan score`, `report`, `compare`: what came of runs, without asking a model.

use crate::eval::{coded, exit, line, print, summary};
use crate::options::Common;
use anyhow::{Context, Result};
use clap::Args;
use longspan_eval::bench::longbench;
use longspan_eval::cell::{Cell, RunFolder};
use longspan_eval::compare::{self, Comparison};
use longspan_eval::metric::rouge::RougeCompat;
use longspan_eval::registry::Registry;
use longspan_eval::report::Report;
use longspan_eval::score::{self, CellScore};
use longspan_eval::task::Prediction;
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

#[derive(Args)]
pub struct Score {
    /// Run folders; with --pred one benchmark or task
    #[arg(required = true, value_name = "RUN")]
    what: Vec<String>,
    /// Predictions made elsewhere: a .jsonl file, or a folder with one per task; rows have `pred` and
    /// `outputs` or `answers`. A folder for longbench or longbench-e gives the published script's figures
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

/// `longspan score`
pub fn score(args: &Score, common: &Common) -> Result<()> {
    let mut registry = Registry::default();
    let show = |score: &CellScore| match common.json {
        true => println!("{}", summary(score)),
        false => line(
            score,
            &format!("{} / {}", score.cell.model, score.cell.policy),
        ),
    };
    if let Some(path) = &args.pred {
        let [name] = args.what.as_slice() else {
            return Err(exit(2, "with --pred, name one benchmark or task"));
        };
        let e = name == "longbench-e";
        if path.is_dir() && (e || name == "longbench") {
            return official(path, e, common);
        }
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
        registry.add_run(&folder).map_err(coded)?;
        for (score, _) in score::score_run(&folder, &registry).map_err(coded)? {
            show(&score);
        }
    }
    Ok(())
}

/// A folder of prediction files as LongBench's own script writes them: its figures.
fn official(path: &Path, e: bool, common: &Common) -> Result<()> {
    let scores = longbench::score_folder(path, e, RougeCompat::Unlimited).map_err(coded)?;
    let each: Vec<(&str, f64)> = scores
        .iter()
        .filter_map(|(name, value)| Some((name.as_str(), value.as_f64()?)))
        .collect();
    let (english, chinese) = longbench::score::averages(&each);
    if common.json {
        println!(
            "{}",
            json!({ "scores": scores, "english": english, "chinese": chinese })
        );
        return Ok(());
    }
    for (name, value) in &scores {
        println!("{name:<24} {value}");
    }
    for (name, mean) in [("English", english), ("Chinese", chinese)] {
        if let Some(mean) = mean {
            println!("{name}, mean of categories: {mean:.2}");
        }
    }
    Ok(())
}

/// Rows with `pred`, and `outputs` or `answers`.
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
        let outputs = match &value["outputs"] {
            Value::Null => &value["answers"],
            outputs => outputs,
        };
        let references = match outputs {
            Value::String(one) => vec![one.clone()],
            Value::Array(all) => all
                .iter()
                .filter_map(|v| v.as_str().map(str::to_string))
                .collect(),
            _ => return Err(bad("`outputs` (or `answers`) is missing or no list")),
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
    let mut registry = Registry::default();
    let open = |path: &PathBuf| RunFolder::open(path).map_err(coded);
    let folders: Vec<RunFolder> = args.runs.iter().map(open).collect::<Result<_>>()?;
    for folder in &folders {
        registry.add_run(folder).map_err(coded)?;
    }
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
    let mut registry = Registry::default();
    for path in std::iter::once(&args.a).chain(&args.b) {
        let folder = RunFolder::open(path).map_err(coded)?;
        registry.add_run(&folder).map_err(coded)?;
    }
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
