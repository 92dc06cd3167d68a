//! `longspan bench workflow`: chain of agents, retrieval, one truncated call and others on the same documents, in a run
//! folder that `longspan report` and `longspan compare` read.

use crate::bench_context::parse_length;
use crate::chat_model::{self, ChatModelArgs};
use crate::options::Common;
use crate::run_folder::{Done, Head, RunFolderArgs};
use crate::ui;
use anyhow::{Context, Result, bail};
use longspan_agents::workflow::chain::ChainConfig;
use longspan_eval::EvalError;
use longspan_eval::bench::ruler::Sources;
use longspan_eval::cell::{Cell, RunFolder};
use longspan_eval::registry::Registry;
use longspan_eval::report::Report;
use longspan_eval::run::{Job, RunOptions};
use longspan_eval::target::workflow::{ChatCounter, stretched};
use longspan_eval::target::{Details, Method, Target, Workflow};
use longspan_eval::task::{SampleCx, Unit};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;

/// Workflows beside each other
#[derive(clap::Args)]
pub struct WorkflowBench {
    /// Tasks with documents and questions: needle, needle/shared, longbench/hotpotqa, m4le/newsqa, ...
    #[arg(required = true, value_name = "TASK")]
    tasks: Vec<String>,
    /// Tokens of a document: 8k,16k
    #[arg(long, value_delimiter = ',', value_parser = parse_length, default_value = "8k", value_name = "N,..")]
    lengths: Vec<usize>,
    /// full, rag, merge, hierarchical, chain, chain;order=rtl, chain;paths=bidir;select=vote|judge|oracle
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "full,rag,chain",
        value_name = "METHOD,.."
    )]
    methods: Vec<Method>,
    /// Tokens of a call of every method; the model's window if that is smaller
    #[arg(long, value_parser = parse_length, default_value = "4k", value_name = "TOKENS")]
    window: usize,
    /// Another window for the one call of `full`
    #[arg(long, value_parser = parse_length, value_name = "TOKENS")]
    full_window: Option<usize>,
    /// Most tokens of a worker's notes
    #[arg(long, default_value_t = 256, value_name = "TOKENS")]
    notes: usize,
    /// Samples per length; per length and depth where a task has depths
    #[arg(long, default_value_t = 2, value_name = "N")]
    samples: usize,
    /// Depths of a needle in percent
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "10,50,90",
        value_name = "PERCENT,.."
    )]
    depths: Vec<f64>,
    /// Prose around what is asked; default: a text that ships with the program
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Official data of the benchmark in place of the rows that ship with the program
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    #[command(flatten)]
    run: RunFolderArgs,
    #[command(flatten)]
    chat_model: ChatModelArgs,
}

fn failed(error: EvalError) -> anyhow::Error {
    match error {
        EvalError::Interrupted { done, total } => ui::Interrupted(format!(
            "{done} of {total} answers are stored; the same command goes on from there"
        ))
        .into(),
        error => error.into(),
    }
}

/// `longspan bench workflow`
pub fn run(args: &WorkflowBench, common: &Common) -> Result<()> {
    if args.samples == 0 || args.notes == 0 {
        bail!("--samples and --notes are at least 1");
    }
    if args
        .depths
        .iter()
        .any(|depth| !(0.0..=100.0).contains(depth))
    {
        bail!("--depths: 0 to 100 expected");
    }
    let registry = Registry::default();
    let mut tasks = Vec::new();
    for name in &args.tasks {
        tasks.extend(registry.select(name)?);
    }
    let prose = match &args.text {
        Some(path) => std::fs::read_to_string(path).with_context(|| path.display().to_string())?,
        None => Sources::shipped()?.essay.join(" "),
    };
    let model = chat_model::open(&args.chat_model, common)?;
    let counter = ChatCounter(Arc::clone(&model));
    let own = model.card().window.unwrap_or(usize::MAX);
    let place = args.run.place("workflows");
    let details = Arc::new(Details::new(&place.path.join("details.jsonl")));
    let mut jobs = Vec::new();
    for task in &tasks {
        let meta = task.meta();
        for &length in &args.lengths {
            // Texts that are made have the length asked for; rows of a data set get prose around them.
            let made = meta.unit == Unit::Tokens && !task.needs_data();
            let asked = if made { length } else { meta.lengths[0] };
            let samples = task.samples(&SampleCx {
                length: asked,
                longest: asked,
                samples: args.samples,
                depths: &args.depths,
                seed: args.run.seed,
                counter: &counter,
                data: match made {
                    true => args.text.as_deref(),
                    false => args.data.as_deref(),
                },
                fixtures: args.data.is_none(),
            })?;
            let samples = match made {
                true => samples,
                false => samples
                    .iter()
                    .map(|sample| stretched(sample, &prose, length, &counter, args.run.seed))
                    .collect::<Result<_, _>>()?,
            };
            for method in &args.methods {
                let window = match (method, args.full_window) {
                    (Method::Full, Some(window)) => window,
                    _ => args.window,
                };
                let config = ChainConfig {
                    window: window.min(own),
                    max_output: args.notes,
                    ..ChainConfig::default()
                };
                let target: Arc<dyn Target> = Arc::new(Workflow::new(
                    Arc::clone(&model),
                    method.clone(),
                    config,
                    Arc::clone(task),
                    Arc::clone(&details),
                    ui::interrupted,
                ));
                jobs.push(Job {
                    cell: Cell {
                        task: meta.id.clone(),
                        version: meta.version,
                        length,
                        model: target.model(),
                        policy: target.policy(),
                        seed: args.run.seed,
                    },
                    samples: samples.clone(),
                    target,
                });
            }
        }
    }
    let prose = match &args.text {
        Some(path) => path.display().to_string(),
        None => "shipped".into(),
    };
    let head = Head {
        tokenizer: format!("tokens of {}", model.card().name),
        targets: vec![model.card().fingerprint.clone()],
        options: vec![
            ("seed".into(), args.run.seed.to_string()),
            ("most tokens of notes".into(), args.notes.to_string()),
            ("prose".into(), prose),
        ],
    };
    let shown = ("tokens", common.json);
    let done = place.run(
        &jobs,
        head,
        (&registry, &tasks),
        RunOptions::default(),
        shown,
    )?;
    let Done {
        folder,
        report,
        outcome,
    } = done;
    let rows = rows(&report, &folder, &details)?;
    if common.json {
        let all = json!({ "run": folder.path(), "report": folder.path().join("report.html"), "cells": rows });
        ui::write_out(&format!("{all}\n"))?;
    } else {
        let page = folder.path().join("report.html");
        ui::write_out(&format!("{}{}\n", table(&rows), page.display()))?;
    }
    place.say_left(outcome.map_err(failed)?);
    Ok(())
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let values: Vec<f64> = values.collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

fn rows(report: &Report, folder: &RunFolder, details: &Details) -> Result<Vec<Value>> {
    let details = details.read()?;
    let mut rows = Vec::new();
    for cell in &report.cells {
        let score = &cell.score;
        let predictions = folder.predictions(&score.cell)?;
        let ids: Vec<&str> = predictions.iter().map(|row| row.id.as_str()).collect();
        let own = || {
            details
                .iter()
                .filter(|line| line.method == score.cell.policy && ids.contains(&line.id.as_str()))
        };
        let main = score.main();
        rows.push(json!({
            "task": score.cell.task, "length": score.cell.length, "method": score.cell.policy,
            "metric": score.aggregates.first().map(|main| &main.name),
            "score": main.map(|main| main.value), "se": main.and_then(|main| main.se),
            "interval": main.and_then(|main| main.interval), "answers": score.counts.rows,
            "truncated": score.counts.truncated, "errors": score.counts.errors,
            "calls": mean(own().map(|line| line.calls as f64)),
            "tokens_read": mean(predictions.iter().map(|row| row.tokens_in as f64)),
            "tokens_written": mean(predictions.iter().map(|row| row.tokens_out as f64)),
            "seconds": mean(own().map(|line| line.seconds)),
            "information_loss": mean(own().filter_map(|line| line.information_loss)),
        }));
    }
    Ok(rows)
}

fn table(rows: &[Value]) -> String {
    let mut table = String::from(
        "| task | tokens | method | score (95 %) | answers | truncated | calls | read | written | seconds | information lost |\n|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let number = |field: &str, digits: usize| {
            row[field]
                .as_f64()
                .map_or("-".to_string(), |value| format!("{value:.digits$}"))
        };
        let text = |field: &str| row[field].as_str().unwrap_or("-").to_string();
        let score = match row["interval"].as_array().map(Vec::as_slice) {
            Some([low, high]) => format!(
                "{} ({:.2} to {:.2})",
                number("score", 3),
                low.as_f64().unwrap_or(f64::NAN),
                high.as_f64().unwrap_or(f64::NAN)
            ),
            _ => number("score", 3),
        };
        table += &format!(
            "| {} | {} | {} | {score} | {} | {} | {} | {} | {} | {} | {} |\n",
            text("task"),
            row["length"],
            text("method"),
            row["answers"],
            row["truncated"],
            number("calls", 1),
            number("tokens_read", 0),
            number("tokens_written", 0),
            number("seconds", 1),
            number("information_loss", 3),
        );
    }
    table
}
