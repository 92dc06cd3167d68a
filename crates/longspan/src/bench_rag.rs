//! `longspan bench rag`: how many passages, in which order, and beside which wrong ones a reader can use (paper 17).

use crate::chat_model::{self, ChatModelArgs, call, explain};
use crate::options::Common;
use crate::ui::{self, Interrupted};
use anyhow::{Context, Result, bail};
use longspan_agents::chat::model::ChatError;
use longspan_agents::rag::study::{Condition, Corpus, Negatives, Row, StudyError, ask};
use longspan_agents::rag::{Embedder, Order, Retriever};
use longspan_eval::stats;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Readers of many passages
#[derive(clap::Args)]
pub struct RagBench {
    /// Passages in a prompt
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,5,10,20,40",
        value_name = "K,.."
    )]
    ks: Vec<usize>,
    /// Orders of retrieved passages: rank, ends, reverse, random:SEED; none leaves these out
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "rank,ends",
        value_name = "ORDER,.."
    )]
    orders: Vec<String>,
    /// Retrievers: bm25, dense, hybrid
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "bm25",
        value_name = "RETRIEVER,.."
    )]
    retrievers: Vec<Retriever>,
    /// Also the right passage among hard negatives: random, bm25, dense
    #[arg(long, value_delimiter = ',', value_name = "NEGATIVES,..")]
    negatives: Vec<Negatives>,
    /// Questions
    #[arg(long, default_value_t = 20, value_name = "N")]
    questions: usize,
    /// Places in the corpus; each has eight passages
    #[arg(long, default_value_t = 40, value_name = "N")]
    places: usize,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 24, value_name = "N")]
    max_tokens: usize,
    /// Embedder for dense and hybrid: alias or folder of a BERT sentence encoder
    #[arg(long, default_value = "minilm-l6", value_name = "MODEL")]
    embedder: String,
    /// Decides corpus and shuffles
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Folder of the run; the same command with the same folder goes on where it stopped
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    #[command(flatten)]
    chat_model: ChatModelArgs,
}

/// Rows in a file, one a line, beside the settings they belong to.
struct Rows {
    file: Option<std::fs::File>,
    rows: Vec<Row>,
}

impl Rows {
    fn open(folder: Option<&Path>, settings: &Value) -> Result<Rows> {
        let Some(folder) = folder else {
            return Ok(Rows {
                file: None,
                rows: Vec::new(),
            });
        };
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let config = folder.join("settings.json");
        match std::fs::read_to_string(&config) {
            Ok(text) => {
                if serde_json::from_str::<Value>(&text).ok().as_ref() != Some(settings) {
                    bail!(
                        "{}: the folder holds a run of another model or corpus; name another one with --out",
                        folder.display()
                    );
                }
            }
            Err(_) => std::fs::write(&config, format!("{settings:#}\n"))
                .with_context(|| config.display().to_string())?,
        }
        let path = folder.join("rows.jsonl");
        let named = || path.display().to_string();
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).with_context(named),
        };
        // What a kill tore is asked again.
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        let rows = text[..whole]
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<Vec<Row>, _>>()
            .with_context(named)?;
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(named)?;
        file.set_len(whole as u64).with_context(named)?;
        Ok(Rows {
            file: Some(file),
            rows,
        })
    }

    fn push(&mut self, row: Row) -> Result<()> {
        if let Some(file) = &mut self.file {
            file.write_all(format!("{}\n", json!(row)).as_bytes())?;
        }
        self.rows.push(row);
        Ok(())
    }

    fn of(&self, condition: &Condition) -> Vec<&Row> {
        let mut rows: Vec<&Row> = (self.rows.iter())
            .filter(|row| row.condition == *condition)
            .collect();
        rows.sort_by_key(|row| row.question);
        rows
    }
}

/// `longspan bench rag`
pub fn run(args: &RagBench, common: &Common) -> Result<()> {
    if args.questions == 0 || args.max_tokens == 0 || args.ks.contains(&0) {
        bail!("--questions, --max-tokens and --ks are at least 1");
    }
    let mut conditions = Vec::new();
    for &k in &args.ks {
        for &retriever in &args.retrievers {
            for order in args.orders.iter().filter(|order| *order != "none") {
                let order: Order = order.parse()?;
                conditions.push(Condition::Retrieved {
                    retriever,
                    k,
                    order,
                });
            }
        }
        for &negatives in &args.negatives {
            conditions.push(Condition::Planted {
                negatives,
                k,
                seed: args.seed,
            });
        }
    }
    let corpus = Corpus::new(args.places, args.questions, args.seed);
    if corpus.questions.len() < args.questions {
        bail!(
            "--questions {}: {} places give {} questions; raise --places",
            args.questions,
            args.places,
            corpus.questions.len()
        );
    }
    let dense = args.negatives.contains(&Negatives::Dense)
        || args.retrievers.iter().any(|r| *r != Retriever::Bm25);
    let embedder = dense
        .then(|| crate::search::embedder(&args.embedder, common))
        .transpose()?;
    let embedder = embedder.as_ref().map(|embedder| embedder as &dyn Embedder);
    let index = corpus.index(embedder)?;
    let model = chat_model::open(&args.chat_model, common)?;
    let settings = json!({
        "model": model.card().fingerprint, "places": args.places, "questions": args.questions,
        "max_tokens": args.max_tokens, "seed": args.seed,
    });
    let mut rows = Rows::open(args.out.as_deref(), &settings)?;
    let bar = ui::bar(
        (args.questions * conditions.len()) as u64,
        "answers",
        common.json,
    );
    bar.set_position(rows.rows.len() as u64);
    bar.reset_eta();
    let call = call();
    // All conditions of a question after each other: a run that is cut short is balanced.
    for number in 0..args.questions {
        for condition in &conditions {
            if rows.of(condition).iter().any(|row| row.question == number) {
                continue;
            }
            let row = ask(
                &*model,
                &corpus,
                &index,
                embedder,
                number,
                condition,
                args.max_tokens,
                &call,
            );
            let row = match row {
                Err(StudyError::Chat(ChatError::Cancelled { .. })) if ui::interrupted() => {
                    bar.finish_and_clear();
                    let kept = match &args.out {
                        Some(_) => "the same command goes on from there",
                        None => "nothing is kept without --out",
                    };
                    return Err(Interrupted(format!("{} answers; {kept}", rows.rows.len())).into());
                }
                Err(StudyError::Chat(error)) => return Err(explain(error)),
                row => row?,
            };
            rows.push(row)?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    show(&rows, &conditions, common)
}

fn show(rows: &Rows, conditions: &[Condition], common: &Common) -> Result<()> {
    let mut cells = Vec::new();
    for condition in conditions {
        let own = rows.of(condition);
        let n = own.len();
        let share = |count: usize| count as f64 / n.max(1) as f64;
        let right = own.iter().filter(|row| row.right).count();
        let (low, high) = stats::wilson(right, n);
        let there = own.iter().filter(|row| row.gold_at.is_some()).count();
        let ranks: Vec<f64> = own
            .iter()
            .filter_map(|row| row.gold_rank)
            .map(|rank| rank as f64 + 1.0)
            .collect();
        cells.push(json!({
            "condition": condition.to_string(), "questions": n, "right": share(right), "interval": [low, high],
            "exact": share(own.iter().filter(|row| row.exact).count()), "recall": share(there),
            "mean_rank": (!ranks.is_empty()).then(|| ranks.iter().sum::<f64>() / ranks.len() as f64),
            "prompt_tokens": own.iter().map(|row| row.prompt_tokens).sum::<usize>() / n.max(1),
            "seconds": own.iter().map(|row| row.seconds).sum::<f64>() / n.max(1) as f64,
        }));
    }
    let mut gains = Vec::new();
    for condition in conditions {
        let Condition::Retrieved {
            retriever,
            k,
            order,
        } = condition
        else {
            continue;
        };
        if *order == Order::Rank {
            continue;
        }
        let plain = rows.of(&Condition::Retrieved {
            retriever: *retriever,
            k: *k,
            order: Order::Rank,
        });
        let names: Vec<String> = plain.iter().map(|row| row.question.to_string()).collect();
        let own = rows.of(condition);
        let pairs: Vec<(&str, f64, f64)> = (plain.iter().zip(&own).zip(&names))
            .map(|((a, b), name)| {
                let value = |row: &Row| f64::from(u8::from(row.right));
                (name.as_str(), value(a), value(b))
            })
            .collect();
        if pairs.is_empty() {
            continue;
        }
        let paired = stats::paired(&pairs);
        gains.push(json!({
            "condition": condition.to_string(), "gain": paired.difference.value, "interval": paired.difference.interval,
            "better": paired.better, "worse": paired.worse,
        }));
    }
    if common.json {
        let all = json!({ "conditions": cells, "against_rank": gains });
        return Ok(ui::write_out(&format!("{all}\n"))?);
    }
    let mut table = String::from(
        "| condition | right (95 %) | exact | right passage shown | its mean rank | prompt tokens | seconds |\n|---|---|---|---|---|---|---|\n",
    );
    let number = |value: &Value, digits: usize| {
        value
            .as_f64()
            .map_or("-".to_string(), |value| format!("{value:.digits$}"))
    };
    for cell in &cells {
        table += &format!(
            "| {} | {} ({} to {}) of {} | {} | {} | {} | {} | {} |\n",
            cell["condition"].as_str().unwrap_or(""),
            number(&cell["right"], 2),
            number(&cell["interval"][0], 2),
            number(&cell["interval"][1], 2),
            cell["questions"],
            number(&cell["exact"], 2),
            number(&cell["recall"], 2),
            number(&cell["mean_rank"], 1),
            cell["prompt_tokens"],
            number(&cell["seconds"], 1),
        );
    }
    for gain in &gains {
        table += &format!(
            "{} against order=rank: {} ({} to {}), better {}, worse {}\n",
            gain["condition"].as_str().unwrap_or(""),
            number(&gain["gain"], 3),
            number(&gain["interval"][0], 3),
            number(&gain["interval"][1], 3),
            gain["better"],
            gain["worse"],
        );
    }
    Ok(ui::write_out(&table)?)
}
