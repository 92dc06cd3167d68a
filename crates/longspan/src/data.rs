//! `longspan data`: the samples of generated benchmarks as JSON lines, and M4LE's long rows from short labelled texts.

use crate::eval::{coded, evenly, exit, parse_length};
use crate::models;
use crate::options::Common;
use anyhow::Result;
use clap::Args;
use longspan_data::tokenize::Tokenizer;
use longspan_eval::bench::dataset::Source;
use longspan_eval::bench::export;
use longspan_eval::bench::m4le::build::{Config, Item, Kind, build};
use longspan_eval::count::{Counter, Words};
use longspan_eval::registry::Registry;
use longspan_eval::task::SampleCx;
use longspan_nn::weights::Checkpoint;
use serde::Deserialize;
use serde_json::json;
use std::path::{Path, PathBuf};

#[derive(Args)]
pub struct Data {
    /// Benchmarks (ruler, threading, ...) or tasks (ruler/vt, threading/single); m4le with --pool
    #[arg(required = true, value_name = "BENCH")]
    benches: Vec<String>,
    /// Lengths, in each task's unit: 512,4k (m4le: buckets, in words or Chinese characters)
    #[arg(long, value_delimiter = ',', value_parser = parse_length, value_name = "N,..")]
    lengths: Vec<usize>,
    /// Samples per length; per length and depth where a task has depths
    #[arg(long, default_value_t = 100, value_name = "N")]
    samples: usize,
    /// Depths of the answer in the text: this many, evenly spaced from 0 to 100%
    #[arg(long, default_value_t = 5, value_name = "N")]
    depths: usize,
    /// Decides all random choices
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Texts to make samples from, as `longspan eval --data` takes them
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Count words instead of the tokens of --model's tokenizer
    #[arg(long)]
    words: bool,
    /// m4le: short texts, one a line with `text` and what is asked about: label, title, question and answers, summary
    #[arg(long, value_name = "FILE")]
    pool: Option<PathBuf>,
    /// m4le: explicit-single, explicit-multiple, semantic-single, semantic-multiple, global
    #[arg(long, default_value = "explicit-single", value_parser = parse_kind, value_name = "KIND")]
    kind: Kind,
    /// m4le: the texts are Chinese
    #[arg(long)]
    chinese: bool,
    /// Folder that the files go to
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
}

fn parse_kind(text: &str) -> Result<Kind, String> {
    let value = serde::de::value::StrDeserializer::<serde::de::value::Error>::new(text);
    Kind::deserialize(value).map_err(|error| error.to_string())
}

fn tokenizer(args: &Data, common: &Common) -> Result<Option<Tokenizer>> {
    match &common.model {
        Some(name) if !args.words => {
            let path = models::obtain(name, common.json)?;
            Ok(Some(Checkpoint::open(&path)?.tokenizer))
        }
        _ => Ok(None),
    }
}

/// `longspan data`
pub fn data(args: &Data, common: &Common) -> Result<()> {
    if args.samples == 0 {
        return Err(exit(2, "--samples is 0, expected at least 1"));
    }
    if let Some(pool) = &args.pool {
        if args.benches != ["m4le"] {
            return Err(exit(2, "--pool makes rows of m4le alone"));
        }
        return packed(args, pool, common);
    }
    let registry = Registry::default();
    let tokenizer = tokenizer(args, common)?;
    let counter: &dyn Counter = match &tokenizer {
        Some(tokenizer) => tokenizer,
        None => &Words,
    };
    let depths = evenly(args.depths)?;
    for name in &args.benches {
        for task in registry.select(name).map_err(coded)? {
            let lengths = match args.lengths.is_empty() {
                true => task.meta().lengths.to_vec(),
                false => args.lengths.clone(),
            };
            for &length in &lengths {
                let cx = SampleCx {
                    length,
                    longest: lengths.iter().copied().max().unwrap_or(length),
                    samples: args.samples,
                    depths: &depths,
                    seed: args.seed,
                    counter,
                    data: args.data.as_deref(),
                    fixtures: false,
                };
                let rows = export::rows(&*task, &cx).map_err(coded)?;
                let path = args.out.join(export::path(&task.meta().id, length));
                write(&path, &rows, &counter.name(), common)?;
            }
        }
    }
    Ok(())
}

fn packed(args: &Data, pool: &Path, common: &Common) -> Result<()> {
    let rows = Source::Path(pool).rows(&[]).map_err(coded)?;
    let items: Vec<Item> = rows
        .iter()
        .map(|row| row.parse())
        .collect::<longspan_eval::Result<_>>()
        .map_err(coded)?;
    let mut config = Config {
        kind: args.kind,
        n_examples: args.samples,
        seed: args.seed,
        chinese: args.chinese,
        ..Config::default()
    };
    if !args.lengths.is_empty() {
        config.buckets = args.lengths.clone();
    }
    let rows = build(&items, &config).map_err(coded)?;
    let kind = serde_json::to_value(args.kind)?;
    let name = kind.as_str().unwrap_or("m4le").to_string();
    let rows: Vec<String> = rows
        .iter()
        .map(export::line)
        .collect::<longspan_eval::Result<_>>()
        .map_err(coded)?;
    write(
        &args.out.join(format!("{name}.jsonl")),
        &rows,
        "words",
        common,
    )
}

fn write(path: &Path, rows: &[String], counted: &str, common: &Common) -> Result<()> {
    let failed = |error: std::io::Error| exit(2, format!("{}: {error}", path.display()));
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    std::fs::write(path, rows.join("\n") + "\n").map_err(failed)?;
    match common.json {
        true => println!(
            "{}",
            json!({ "file": path, "rows": rows.len(), "counted": counted })
        ),
        false => println!(
            "{}  {} rows, lengths in {counted}",
            path.display(),
            rows.len()
        ),
    }
    Ok(())
}
