//! `longspan search`: the passages of a folder that are nearest to a question, from an index that is kept and
//! brought up to date.

use crate::models;
use crate::options::Common;
use crate::ui::{self, Interrupted};
use anyhow::{Context, Result};
use candle_core::{DType, Device};
use clap::Args;
use longspan_agents::rag::index::{Hit, IndexError, Progress, Retriever, Updated};
use longspan_agents::rag::{Bm25Config, ChunkConfig, Embedder, Index, SentenceEmbedder};
use longspan_data::document::Limits;
use longspan_nn::model::{Precision, TextEncoder};
use serde_json::json;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

#[derive(Args)]
pub struct Search {
    /// Folder (or file): txt, md, html, pdf, epub, source code
    pub dir: PathBuf,
    /// What to look for
    pub query: String,
    /// Passages to show
    #[arg(short = 'k', long, default_value_t = 10, value_name = "N")]
    pub top: usize,
    /// bm25 (words), dense (meaning), hybrid (both)
    #[arg(long, default_value = "hybrid")]
    pub retriever: Retriever,
    /// Embedder for dense and hybrid: alias or folder of a BERT sentence encoder
    #[arg(long, default_value = "minilm-l6", value_name = "MODEL")]
    pub embedder: String,
    /// Most words of a passage
    #[arg(long, default_value_t = 100, value_name = "N")]
    pub words: usize,
    /// Leave out files larger than this (bytes)
    #[arg(long, default_value_t = 1 << 30, value_name = "BYTES")]
    pub max_bytes: u64,
}

/// Opens a sentence encoder by alias or folder, downloading it if need be.
pub fn embedder(name: &str, common: &Common) -> Result<SentenceEmbedder> {
    let folder = models::obtain(name, common.json)?;
    let precision = match common.precision {
        Some(crate::options::Precision::F32) => Precision::Dense(DType::F32),
        _ => Precision::Packed,
    };
    let encoder = TextEncoder::open(&folder, precision, &Device::Cpu)
        .with_context(|| format!("the embedder {name}"))?;
    Ok(SentenceEmbedder::new(encoder))
}

/// Where the index of a folder is kept.
fn index_path(dir: &Path, words: usize) -> Result<PathBuf> {
    let dir = dir
        .canonicalize()
        .with_context(|| dir.display().to_string())?;
    let key = format!("{} {words}", dir.display());
    let name = blake3::hash(key.as_bytes()).to_hex();
    let base = longspan_nn::hub::Hub::from_env()?.cache().join("search");
    Ok(base.join(&name[..16]).join("index.sqlite"))
}

/// `longspan search`
pub fn search(args: &Search, common: &Common) -> Result<()> {
    if args.words == 0 || args.top == 0 {
        anyhow::bail!("--words and --top are at least 1");
    }
    let path = index_path(&args.dir, args.words)?;
    let embedder = match args.retriever {
        Retriever::Bm25 => None,
        _ => Some(embedder(&args.embedder, common).context(
            "dense retrieval needs an embedder; without one, search with --retriever bm25",
        )?),
    };
    let embedder = embedder.as_ref().map(|embedder| embedder as &dyn Embedder);
    let mut index = Index::open(&path, ChunkConfig { words: args.words })?;
    let start = Instant::now();
    let updated = update(&mut index, args, embedder, common)?;
    let built = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let bm25 = Bm25Config::default();
    let hits = index.search(&args.query, args.top, args.retriever, &bm25, embedder)?;
    let searched = start.elapsed().as_secs_f64();
    if common.json {
        println!(
            "{}",
            json!({
                "query": args.query, "index": path, "files": updated.files, "passages": updated.passages,
                "read": updated.read, "removed": updated.removed, "embedded": updated.embedded,
                "index_seconds": built, "search_seconds": searched, "warnings": updated.warnings, "hits": hits,
            })
        );
        return Ok(());
    }
    report(&updated, built, searched);
    for (rank, hit) in hits.iter().enumerate() {
        print_hit(rank + 1, hit);
    }
    if hits.is_empty() {
        eprintln!("nothing found");
    }
    Ok(())
}

fn update(
    index: &mut Index,
    args: &Search,
    embedder: Option<&dyn Embedder>,
    common: &Common,
) -> Result<Updated> {
    let limits = Limits::with_max_bytes(args.max_bytes);
    let mut bar = ui::bar(0, "files", common.json);
    let mut embedding = false;
    let result = index.update(&args.dir, &limits, embedder, &mut |progress| {
        match progress {
            Progress::Files(done, total) => {
                bar.set_message("reading");
                bar.set_length(total as u64);
                bar.set_position(done as u64);
            }
            Progress::Vectors(done, total) => {
                if !embedding {
                    bar.finish_and_clear();
                    bar = ui::bar(total as u64, "passages", common.json);
                    bar.set_message("embedding");
                    bar.set_position(done as u64);
                    bar.reset_eta();
                    embedding = true;
                }
                bar.set_position(done as u64);
            }
        }
        match ui::interrupted() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    bar.finish_and_clear();
    match result {
        Err(IndexError::Stopped) => Err(Interrupted(
            "what was indexed is kept; the same command goes on from there".into(),
        )
        .into()),
        result => Ok(result?),
    }
}

fn report(updated: &Updated, built: f64, searched: f64) {
    for warning in &updated.warnings {
        eprintln!("left out or incomplete: {warning}");
    }
    let changes = match (updated.read, updated.removed, updated.embedded) {
        (0, 0, 0) => "nothing new".to_string(),
        (read, removed, embedded) => format!(
            "{} files read ({}), {} gone, {} passages embedded",
            ui::count(read as u64),
            ui::bytes(updated.bytes),
            ui::count(removed as u64),
            ui::count(embedded as u64)
        ),
    };
    eprintln!(
        "{} passages of {} files; {changes} in {built:.2} s; searched in {:.1} ms",
        ui::count(updated.passages as u64),
        ui::count(updated.files as u64),
        searched * 1000.0
    );
}

fn print_hit(rank: usize, hit: &Hit) {
    const SHOWN: usize = 300;
    let text: Vec<&str> = hit.text.split_whitespace().collect();
    let mut text = text.join(" ");
    if let Some((end, _)) = text.char_indices().nth(SHOWN) {
        text.truncate(end);
        text.push_str(" ...");
    }
    let section = hit.title.strip_prefix(&hit.document).unwrap_or(&hit.title);
    println!(
        "{rank:>3}. {}:{}{section}  ({:.4})",
        hit.document, hit.line, hit.score
    );
    println!("     {text}\n");
}
