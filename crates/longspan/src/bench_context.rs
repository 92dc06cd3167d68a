//! `longspan bench context`: every way to read past the window beside each other, on one model: what it
//! costs and what it still knows. Finished cells are kept; the same command goes on with the others.

use crate::bench_context_cell::{self as cell, Cell, Plan, Subject};
use crate::bench_context_page as page;
use crate::models::{self, Opened};
use crate::options::Common;
use crate::reading::kv_dtype;
use crate::ui;
use anyhow::{Context, Result, bail};
use clap::Args;
use longspan_data::document::{self, Limits};
use longspan_data::tokenize::Special;
use longspan_infer::EngineOptions;
use longspan_infer::context::{ContextConfig, POLICIES, auto};
use longspan_kernels::cpu::Level;
use longspan_kernels::pool::Pool;
use longspan_nn::position::{KNOWN_OVERRIDES, RopeOverride};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

/// `longspan bench context`
#[derive(Args)]
pub struct ContextBench {
    /// Lengths in tokens: 2k,8k,32k
    #[arg(long, value_delimiter = ',', value_parser = parse_length, default_value = "2k,8k", value_name = "N,..")]
    lengths: Vec<usize>,
    /// Policies as --context takes them, with commas between; `all` = one of each kind at --budget
    #[arg(long, default_value = "all", value_name = "POLICY,..")]
    methods: String,
    /// Rotary rules as --rope takes them, with commas between; `own` = the model's; every policy runs under
    /// every rule
    #[arg(long, default_value = "own", value_name = "RULE,..")]
    ropes: String,
    /// Text to read; none = made-up tokens, without loss and divergence
    #[arg(long, value_name = "FILE")]
    text: Vec<PathBuf>,
    /// What to measure: cost, loss, retrieval
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "cost,loss,retrieval",
        value_name = "WHAT,.."
    )]
    measure: Vec<Measure>,
    /// Tokens kept or seen by the methods of `all`; default a quarter of the window
    #[arg(long, value_name = "TOKENS")]
    budget: Option<usize>,
    /// Tasks of retrieval: passkey, needle, needle/shared (one reading for all depths)
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "passkey",
        value_name = "TASK,.."
    )]
    tasks: Vec<String>,
    /// Depths of the answer in the text, evenly spaced
    #[arg(long, default_value_t = 5, value_name = "N")]
    depths: usize,
    /// Samples per depth
    #[arg(long, default_value_t = 1, value_name = "N")]
    samples: usize,
    /// Tokens decoded at each depth
    #[arg(long, default_value_t = 64, value_name = "N")]
    decode: usize,
    /// Longer texts keep cold keys and values on disk
    #[arg(long, default_value_t = 65_536, value_name = "TOKENS")]
    disk_above: usize,
    /// Folder for cells.jsonl, context.json and context.html; the same folder goes on where it stopped
    #[arg(long, default_value = "context-bench", value_name = "FOLDER")]
    out: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Measure {
    /// Speed, memory, divergence from full attention
    Cost,
    /// Loss by position
    Loss,
    /// Finding what is hidden in a text
    Retrieval,
}

/// `512`, `4k`.
pub fn parse_length(text: &str) -> Result<usize, String> {
    let (digits, factor) = match text.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1024),
        None => match text.strip_suffix(['m', 'M']) {
            Some(digits) => (digits, 1 << 20),
            None => (text, 1),
        },
    };
    let length = digits
        .parse()
        .ok()
        .and_then(|n: usize| n.checked_mul(factor));
    length
        .filter(|&n| n > 0)
        .ok_or_else(|| format!("{text:?} is no length; expected for instance 512, 4k or 1m"))
}

/// Splits at commas that a new item follows: one that starts with a known name and then `:` or nothing. Other
/// commas part an item's own values.
fn split_items(text: &str, names: &[&str]) -> Vec<String> {
    let mut items: Vec<String> = Vec::new();
    for piece in text
        .split(',')
        .map(str::trim)
        .filter(|piece| !piece.is_empty())
    {
        let name = piece.split([':', '+']).next().unwrap_or(piece);
        match items.last_mut() {
            Some(last) if !names.contains(&name) => {
                last.push(',');
                last.push_str(piece);
            }
            _ => items.push(piece.into()),
        }
    }
    items
}

/// Names that a rule of `--ropes` begins with: `own`, and every form that `--rope` takes.
fn rope_names() -> Vec<&'static str> {
    let known = KNOWN_OVERRIDES.iter();
    let names = known.map(|form| form.split([':', '[']).next().unwrap_or(form));
    std::iter::once("own").chain(names).collect()
}

/// One policy of each kind, at equal budgets where they have one.
fn one_of_each(budget: usize, longest: usize, window: u64) -> Result<Vec<ContextConfig>> {
    let half = (budget / 2).max(1);
    // Past the window only slots are in range.
    let positions = if longest as u64 > window {
        "cache"
    } else {
        "absolute"
    };
    let texts = POLICIES.iter().map(|name| match *name {
        "window" => format!("window:{budget}"),
        "sinks" => format!("sinks:4,{}", budget.saturating_sub(4).max(1)),
        "lm-infinite" => format!("lm-infinite:{budget},10"),
        "sirllm" => format!("sirllm:top={}", budget.saturating_sub(4).max(1)),
        "h2o" => format!("h2o:{half},{half},positions={positions}"),
        "span" => format!("span:full=bottom-4,local=window-{budget}"),
        "cmr" => format!("cmr:{budget}"),
        other => other.into(),
    });
    texts
        .map(|text| auto::parse(&text, window).map_err(Into::into))
        .collect()
}

/// Runs the grid.
pub fn run(args: &ContextBench, common: &Common) -> Result<()> {
    let ropes = split_items(&args.ropes, &rope_names());
    if ropes.is_empty() || args.lengths.is_empty() {
        bail!("--ropes and --lengths: expected at least one of each");
    }
    let least = cell::QUESTION * 2;
    if let Some(short) = args.lengths.iter().find(|&&length| length < least) {
        bail!("--lengths {short}: expected at least {least}");
    }
    if args.decode == 0 || args.samples == 0 || args.depths == 0 {
        bail!("--decode, --samples and --depths: expected at least 1 of each");
    }
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let store = args.out.join("cells.jsonl");
    let mut cells = load(&store)?;
    let mut shown = Vec::new();
    let mut bar = None;
    for (index, rope) in ropes.iter().enumerate() {
        let mut common = common.clone();
        if rope != "own" {
            let rule = rope.parse::<RopeOverride>();
            common.rope = Some(rule.with_context(|| format!("--ropes {rope}"))?);
        }
        let opened = match models::open(&common) {
            Ok(opened) => opened,
            // A rule that this model has no use for is a refused column, not the end of the run.
            Err(error) if rope != "own" && ropes.len() > 1 => {
                eprintln!("--rope {rope}: {error:#}");
                continue;
            }
            Err(error) => return Err(error),
        };
        let (Opened { model, name, .. }, rope) = (opened, common.rope.as_ref());
        let model = Arc::new(model);
        let rope = rope.map_or("own".to_string(), ToString::to_string);
        let grid = Grid::new(args, &common, model, name, rope)?;
        let bar = bar.get_or_insert_with(|| ui::bar(0, "tokens", common.json));
        let pending: u64 = grid.work(&cells, args);
        // The other rules will take about as long.
        bar.set_length(bar.position() + pending * (ropes.len() - index) as u64);
        let here = grid.run(args, &mut cells, &store, bar, common.json)?;
        shown.extend(here);
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let title = format!(
        "{} ({})",
        common.model.as_deref().unwrap_or("default model"),
        level()
    );
    let slopes = page::slopes(&shown);
    if common.json {
        for cell in &shown {
            println!("{}", serde_json::to_string(cell)?);
        }
        for slope in &slopes {
            println!("{}", serde_json::to_string(slope)?);
        }
    } else {
        page::print(&shown, &slopes);
    }
    let report = json!({ "title": title, "cells": shown, "slopes": slopes });
    let path = args.out.join("context.json");
    std::fs::write(&path, serde_json::to_vec_pretty(&report)?)
        .with_context(|| path.display().to_string())?;
    let path = args.out.join("context.html");
    std::fs::write(&path, page::html(&title, &shown, &slopes))
        .with_context(|| path.display().to_string())?;
    if !common.json {
        println!("{}", path.display());
    }
    Ok(())
}

fn level() -> String {
    format!(
        "{}, {} threads",
        Level::current().name(),
        Pool::global().threads()
    )
}

/// Cells of earlier runs; half a line at the end, of a run that was killed, counts for nothing.
fn load(path: &PathBuf) -> Result<Vec<Cell>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut cells = Vec::new();
    let lines: Vec<&str> = text.lines().collect();
    for (index, line) in lines.iter().enumerate() {
        match serde_json::from_str(line) {
            Ok(cell) => cells.push(cell),
            Err(_) if index + 1 == lines.len() && !text.ends_with('\n') => {}
            Err(error) => bail!("{}:{}: {error}", path.display(), index + 1),
        }
    }
    Ok(cells)
}

fn append(path: &PathBuf, cell: &Cell) -> Result<()> {
    let name = || path.display().to_string();
    let mut text = serde_json::to_string(cell)?;
    text.push('\n');
    // What a killed run left of a line is ended first.
    if let Ok(old) = std::fs::read(path)
        && old.last().is_some_and(|&byte| byte != b'\n')
    {
        let whole = old
            .iter()
            .rposition(|&byte| byte == b'\n')
            .map_or(0, |at| at + 1);
        std::fs::write(path, &old[..whole]).with_context(name)?;
    }
    let mut file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(name)?;
    file.write_all(text.as_bytes()).with_context(name)
}

/// All lengths and methods of one model under one rotary rule.
struct Grid {
    model: Arc<longspan_agents::LocalModel>,
    name: String,
    rope: String,
    setup: String,
    methods: Vec<ContextConfig>,
    plan: Plan,
    options: EngineOptions,
    tokens: Vec<u32>,
}

impl Grid {
    fn new(
        args: &ContextBench,
        common: &Common,
        model: Arc<longspan_agents::LocalModel>,
        name: String,
        rope: String,
    ) -> Result<Grid> {
        let window = model.engine.window();
        let longest = args.lengths.iter().copied().max().unwrap_or(0);
        let budget = args.budget.unwrap_or((window / 4).max(16) as usize);
        let mut methods = match args.methods.as_str() {
            "all" => one_of_each(budget, longest, window)?,
            text => split_items(text, &POLICIES)
                .iter()
                .map(|text| auto::parse(text, window))
                .collect::<Result<Vec<_>, _>>()?,
        };
        if methods.is_empty() {
            bail!("--methods is empty");
        }
        // The others' distributions are compared with those of full attention.
        methods.sort_by_key(|method| *method != ContextConfig::Full);
        let kv = kv_dtype(common)?;
        let want = longest + args.decode;
        let tokens = text_tokens(args, &model, want)?;
        let plan = Plan {
            cost: args.measure.contains(&Measure::Cost),
            loss: args.measure.contains(&Measure::Loss),
            tasks: match args.measure.contains(&Measure::Retrieval) {
                true => args.tasks.clone(),
                false => Vec::new(),
            },
            depths: evenly(args.depths),
            samples: args.samples,
            decode: args.decode,
            disk_above: args.disk_above,
            prose: !args.text.is_empty(),
            folder: args.out.clone(),
        };
        let mut hash = blake3::Hasher::new();
        let what = format!(
            "{name} {kv:?} {} {:?} {} {} {:?} {:?} {} {} {}",
            model.tokenizer.fingerprint(),
            (plan.cost, plan.loss, plan.prose),
            plan.decode,
            plan.disk_above,
            plan.tasks,
            plan.depths,
            plan.samples,
            level(),
            env!("CARGO_PKG_VERSION"),
        );
        hash.update(what.as_bytes());
        tokens.iter().for_each(|token| {
            hash.update(&token.to_le_bytes());
        });
        Ok(Grid {
            model,
            name,
            rope,
            setup: hash.finalize().to_hex()[..12].to_string(),
            methods,
            plan,
            options: EngineOptions {
                kv,
                context: ContextConfig::Full,
            },
            tokens,
        })
    }

    fn known<'c>(&self, cells: &'c [Cell], method: &str, length: usize) -> Option<&'c Cell> {
        cells.iter().find(|cell| {
            cell.setup == self.setup
                && cell.rope == self.rope
                && cell.method == method
                && cell.length == length
        })
    }

    fn work(&self, cells: &[Cell], args: &ContextBench) -> u64 {
        let mut work = 0;
        for &length in &args.lengths {
            for method in &self.methods {
                if self.known(cells, &method.to_string(), length).is_none() {
                    work += self.plan.work(method, length);
                }
            }
        }
        work
    }

    /// Measures what is not known yet; all cells of the grid, in order.
    fn run(
        &self,
        args: &ContextBench,
        cells: &mut Vec<Cell>,
        store: &PathBuf,
        bar: &indicatif::ProgressBar,
        quiet: bool,
    ) -> Result<Vec<Cell>> {
        let mut all = Vec::new();
        for &length in &args.lengths {
            for method in &self.methods {
                let text = method.to_string();
                if let Some(cell) = self.known(cells, &text, length) {
                    all.push(cell.clone());
                    continue;
                }
                let cell = self.measure(method, length, bar)?;
                append(store, &cell)?;
                if !quiet {
                    bar.suspend(|| page::print_cell(&cell));
                }
                cells.push(cell.clone());
                all.push(cell);
            }
        }
        Ok(all)
    }

    fn measure(
        &self,
        method: &ContextConfig,
        length: usize,
        bar: &indicatif::ProgressBar,
    ) -> Result<Cell> {
        let mut cell = Cell {
            setup: self.setup.clone(),
            rope: self.rope.clone(),
            method: method.to_string(),
            length,
            ..Cell::default()
        };
        bar.set_message(format!("{} at {}", method.name(), ui::count(length as u64)));
        let name = blake3::hash(format!("{} {} {length}", self.setup, self.rope).as_bytes());
        let subject = Subject {
            model: &self.model,
            name: &self.name,
            options: EngineOptions {
                context: method.clone(),
                ..self.options.clone()
            },
            tokens: self.tokens.get(..length + self.plan.decode).unwrap_or(&[]),
            length,
            reference: name.to_hex()[..12].to_string(),
        };
        if subject.tokens.is_empty() {
            cell.refused = Some(format!(
                "the text has {} tokens, {} are needed",
                self.tokens.len(),
                length + self.plan.decode
            ));
            return Ok(cell);
        }
        if let Some(reason) = cell::refusal(&subject, &self.plan) {
            cell.refused = Some(reason);
            bar.inc(self.plan.work(method, length));
            return Ok(cell);
        }
        match cell::measure(&subject, &self.plan, &mut |tokens| bar.inc(tokens as u64)) {
            Ok((cost, loss, retrieval)) => {
                (cell.cost, cell.loss, cell.retrieval) = (cost, loss, retrieval);
            }
            Err(error) if cell::concerns_the_cell(&error) => {
                cell.refused = Some(format!("{error:#}"));
            }
            Err(error) => return Err(error),
        }
        Ok(cell)
    }
}

fn evenly(count: usize) -> Vec<f64> {
    match count {
        1 => vec![50.0],
        _ => (0..count)
            .map(|i| (1000.0 * i as f64 / (count - 1) as f64).round() / 10.0)
            .collect(),
    }
}

/// The text's first tokens after the beginning-of-text token, at most `want` of them.
fn text_tokens(
    args: &ContextBench,
    model: &longspan_agents::LocalModel,
    want: usize,
) -> Result<Vec<u32>> {
    if args.text.is_empty() {
        let vocab = model.engine.model().config().vocab_size;
        return Ok(crate::bench::tokens(want, vocab));
    }
    let mut tokens: Vec<u32> = model.tokenizer.bos().into_iter().collect();
    for file in &args.text {
        let text = document::read(file, &Limits::default())?.text;
        tokens.extend(model.tokenizer.encode(&text, Special::None)?);
        if tokens.len() >= want {
            break;
        }
    }
    tokens.truncate(want);
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_part_items_and_values() {
        let items = split_items(
            "full, sinks:4,100,h2o:64,64,positions=cache,window:512,infllm:n_local=256,block=32",
            &POLICIES,
        );
        assert_eq!(
            items,
            [
                "full",
                "sinks:4,100",
                "h2o:64,64,positions=cache",
                "window:512",
                "infllm:n_local=256,block=32"
            ]
        );
        let items = split_items(
            "own,yarn:factor=4,original=8192,linear:4+power:0.5,abf:500000,clex-init:4,dynamic:4,keys=kept,xpos,randomised:0.1,ntk:2",
            &rope_names(),
        );
        assert_eq!(
            items,
            [
                "own",
                "yarn:factor=4,original=8192",
                "linear:4+power:0.5",
                "abf:500000",
                "clex-init:4",
                "dynamic:4,keys=kept",
                "xpos",
                "randomised:0.1",
                "ntk:2"
            ]
        );
        for item in items.iter().skip(1) {
            item.parse::<RopeOverride>().unwrap();
        }
    }

    #[test]
    fn one_of_each_is_one_of_each() {
        for window in [256, 8192, 32_768] {
            let methods = one_of_each(64, 4 * window as usize, window).unwrap();
            let names: Vec<&str> = methods.iter().map(ContextConfig::name).collect();
            assert_eq!(names, POLICIES);
            for method in &methods {
                method
                    .build(window)
                    .unwrap_or_else(|error| panic!("{error}"));
            }
        }
    }

    #[test]
    fn half_a_line_of_a_killed_run_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cells.jsonl");
        let cell = |length| Cell {
            setup: "s".into(),
            length,
            ..Cell::default()
        };
        append(&path, &cell(1)).unwrap();
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.push_str("{\"setup\": \"s");
        std::fs::write(&path, text).unwrap();
        assert_eq!(load(&path).unwrap(), [cell(1)]);
        append(&path, &cell(2)).unwrap();
        assert_eq!(load(&path).unwrap(), [cell(1), cell(2)]);
        std::fs::write(&path, "no cell\n").unwrap();
        assert!(load(&path).unwrap_err().to_string().contains(":1: "));
    }

    #[test]
    fn lengths_have_units() {
        assert_eq!(parse_length("512"), Ok(512));
        assert_eq!(parse_length("4k"), Ok(4096));
        assert_eq!(parse_length("1m"), Ok(1 << 20));
        assert!(
            parse_length("0").is_err() && parse_length("k").is_err() && parse_length("x").is_err()
        );
    }
}
