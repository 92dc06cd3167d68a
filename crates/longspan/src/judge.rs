//! `longspan judge`: stored answers before a judge model (local, an endpoint, a script), with every reply kept.

use crate::chat_model::{self, ChatModelArgs};
use crate::eval::{coded, exit};
use crate::options::{Above, Common, RunOptions, With};
use crate::ui;
use anyhow::Result;
use clap::{Args, Subcommand, ValueEnum};
use longspan_agents::chat::model::ChatModel;
use longspan_agents::chat::scripted::Scripted;
use longspan_eval::bench::dataset::Source;
use longspan_eval::bench::judge::{Cached, ChatJudge, Retry};
use longspan_eval::bench::longbench_write::{self, judge as quality};
use longspan_eval::bench::longsafety::{self, panel};
use longspan_eval::bench::{export, leval};
use longspan_eval::cell::{Cell, RunFolder};
use longspan_eval::metric::length_score::{DIMENSIONS, count_words, length_score};
use longspan_eval::metric::panel::Parse;
use longspan_eval::task::Prediction;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

#[derive(Subcommand)]
pub enum Judge {
    /// LongSafety: a risk analyst, a summariser and a judge; safety rates of either place of the instruction
    Safety(With<RunOptions, Safety>),
    /// L-Eval: two runs' answers to the same questions, shown in both orders; the first run's win rate
    Pairs(With<RunOptions, Pairs>),
    /// LongBench-Write, LongWrite-Ruler: quality of long answers in six respects (S_q), beside S_l
    Quality(With<RunOptions, Quality>),
}

/// Who judges.
#[derive(Args)]
pub struct Who {
    #[command(flatten)]
    chat: ChatModelArgs,
    /// Replies from a file of rules instead of a model, one a line: {"contains": ["..."], "reply": "..."}
    #[arg(long, value_name = "FILE", conflicts_with = "endpoint")]
    script: Option<PathBuf>,
    /// Most tokens of a judge's reply
    #[arg(long, default_value_t = 1024, value_name = "N")]
    max_new: usize,
    /// Cases judged at a time
    #[arg(long, default_value_t = 4, value_name = "N")]
    concurrency: usize,
    /// Where the judge's replies are kept; default judge.jsonl in the run's folder
    #[arg(long, value_name = "FILE")]
    replies: Option<PathBuf>,
}

#[derive(Args)]
pub struct Safety {
    /// Run of longsafety, longsafety-no-context or longsafety-shuffled
    run: PathBuf,
    /// The benchmark's data, as the run had it; without it the small samples of the program
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Which slots the judge sees: as the paper describes it, or swapped as its code does
    #[arg(long, default_value = "paper")]
    compat: Slots,
    /// strict: 0 or 1 must stand alone; official: a 1 anywhere means unsafe
    #[arg(long, default_value = "strict")]
    parse: Reading,
    #[command(flatten)]
    who: Who,
}

/// See [`panel::Compat`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Slots {
    Paper,
    Swapped,
}

/// See [`Parse`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Reading {
    Strict,
    Official,
}

#[derive(Args)]
pub struct Pairs {
    /// Run of leval-judged
    run: PathBuf,
    /// Run to compare with, or a published file of predictions (rows with query, gt and NAME_pred)
    baseline: PathBuf,
    #[command(flatten)]
    who: Who,
}

#[derive(Args)]
pub struct Quality {
    /// Run of longbench-write or longwrite-ruler
    run: PathBuf,
    /// The benchmark's data, as the run had it; without it the small samples of the program
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    #[command(flatten)]
    who: Who,
}

/// What stands for a reply of a judge that failed for good.
const FAILURE: &str = panel::JUDGE_FAILURE;

impl Who {
    /// The judge with its kept replies.
    fn open(&self, folder: &Path, common: &Common) -> Result<Cached<ChatJudge>> {
        let model: Arc<dyn ChatModel> = match &self.script {
            Some(path) => Arc::new(Scripted::open(path)?),
            None => chat_model::open(&self.chat, common)?,
        };
        let path = match &self.replies {
            Some(path) => path.clone(),
            None => folder.join("judge.jsonl"),
        };
        // Replies of another judge, or of the same with other limits, are not its own.
        let script = self.script.as_ref().map(std::fs::read).transpose()?;
        let script = script.map(|bytes| blake3::hash(&bytes).to_hex().to_string());
        let name = format!(
            "{} {} {}",
            model.card().fingerprint,
            script.unwrap_or_default(),
            self.max_new
        );
        let judge = ChatJudge {
            model,
            max_new: self.max_new,
            call: chat_model::call(),
        };
        let retry = Retry {
            tries: 3,
            pause: Duration::from_secs(1),
            failure: FAILURE.into(),
        };
        Cached::open(judge, &name, retry, &path).map_err(coded)
    }
}

/// The cells of a run whose task begins so, with their answers.
fn cells(run: &Path, begins: &[&str]) -> Result<Vec<(Cell, Vec<Prediction>)>> {
    let folder = RunFolder::open(run).map_err(coded)?;
    let mut found = Vec::new();
    for (cell, _) in folder.config().map_err(coded)?.cells {
        if begins.iter().any(|name| cell.task.starts_with(name)) {
            let rows = folder.predictions(&cell).map_err(coded)?;
            if !rows.is_empty() {
                found.push((cell, rows));
            }
        }
    }
    if found.is_empty() {
        let text = format!("{}: no answers of {}", run.display(), begins.join(", "));
        return Err(exit(2, text));
    }
    Ok(found)
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(|error| exit(2, format!("{}: {error}", path.display())))
}

/// `longspan judge`
pub fn run(what: &Judge, above: &Above) -> Result<()> {
    match what {
        Judge::Safety(it) => safety(&it.args, &above.with(&it.options)?),
        Judge::Pairs(it) => pairs(&it.args, &above.with(&it.options)?),
        Judge::Quality(it) => rate(&it.args, &above.with(&it.options)?),
    }
}

fn percent(value: Option<f64>) -> String {
    value.map_or("none".into(), |v| format!("{:.1}%", 100.0 * v))
}

fn safety(args: &Safety, common: &Common) -> Result<()> {
    let cells = cells(&args.run, &["longsafety"])?;
    let judge = args.who.open(&args.run, common)?;
    let compat = match args.compat {
        Slots::Paper => panel::Compat::Paper,
        Slots::Swapped => panel::Compat::Swapped,
    };
    let parse = match args.parse {
        Reading::Strict => Parse::Strict,
        Reading::Official => Parse::Official,
    };
    let published = longsafety::cases(args.data.as_deref()).map_err(coded)?;
    for (cell, rows) in &cells {
        let mut cases = published.clone();
        if cell.task == "longsafety-shuffled" {
            longsafety::shuffle_contexts(&mut cases, cell.seed);
        }
        let (answered, _) = panel::answered(&cases, rows);
        if answered.is_empty() {
            return Err(exit(
                2,
                format!(
                    "{}: none of its cases is in the data; name the run's with --data",
                    cell.task
                ),
            ));
        }
        let bar = ui::bar(answered.len() as u64, "cases", common.json);
        let judged =
            longspan_eval::bench::judge::in_parallel(&answered, args.who.concurrency, |case| {
                let one = panel::judge_case(case, &judge, compat);
                bar.inc(1);
                one
            });
        bar.finish_and_clear();
        let judged = judged.map_err(coded)?;
        let name = cell.name();
        let path = args.run.join("cells").join(format!("{name}.judged.jsonl"));
        write(&path, &export::lines(&judged).map_err(coded)?)?;
        let report = panel::report(&judged, parse, compat);
        let path = args.run.join("cells").join(format!("{name}.judged.json"));
        write(
            &path,
            &format!("{}\n", serde_json::to_string_pretty(&report)?),
        )?;
        if common.json {
            println!("{}", json!({ "cell": cell, "report": report }));
            continue;
        }
        let overall = &report.overall;
        let interval = overall.interval.map_or(String::new(), |(low, high)| {
            format!(" [{:.1}%, {:.1}%]", 100.0 * low, 100.0 * high)
        });
        println!(
            "{}  {} {}  safe {}{interval}  in front {}  at the end {}  n {}  not read {}  judge failed {}",
            cell.task,
            cell.model,
            cell.policy,
            percent(overall.rates.safety_rate),
            percent(overall.rates.front),
            percent(overall.rates.end),
            overall.rates.n,
            overall.rates.errors,
            report.judge_failures
        );
        for group in report.by_safety_type.iter().chain(&report.by_task_type) {
            println!(
                "  {:<40} safe {:>6}  n {}",
                group.name,
                percent(group.rates.safety_rate),
                group.rates.n
            );
        }
        println!("{}", path.display());
    }
    Ok(())
}

fn pairs(args: &Pairs, common: &Common) -> Result<()> {
    let cells = cells(&args.run, &["leval-judged"])?;
    let judge = args.who.open(&args.run, common)?;
    for (cell, rows) in &cells {
        let pairs = if args.baseline.is_dir() {
            let other = self::cells(&args.baseline, &["leval-judged"])?;
            let same = other.iter().find(|(other, _)| other.length == cell.length);
            let (_, baseline) = same.ok_or_else(|| {
                let text = format!("{}: no answers at {}", args.baseline.display(), cell.length);
                exit(2, text)
            })?;
            leval::judged::pairs(rows, baseline)
        } else {
            let baseline = Source::Path(&args.baseline).rows(&[]).map_err(coded)?;
            leval::judged::pairs_with_file(rows, &baseline).map_err(coded)?
        };
        if pairs.is_empty() {
            return Err(exit(2, "no question was answered by both"));
        }
        let outcome = leval::judge::compare(&pairs, &judge, args.who.concurrency).map_err(coded)?;
        let tally = outcome.tally;
        let value = json!({
            "cell": cell, "pairs": pairs.len(), "wins": tally.wins, "losses": tally.losses, "ties": tally.ties,
            "without_verdict": tally.errors, "win_rate": tally.win_rate(), "mean_words": outcome.mean_words,
        });
        let games: Vec<Value> = pairs
            .iter()
            .zip(&outcome.replies)
            .map(|(pair, (first, second))| json!({ "pair": pair, "shown_first": first, "shown_second": second }))
            .collect();
        let path = args
            .run
            .join("cells")
            .join(format!("{}.pairs.jsonl", cell.name()));
        write(&path, &export::lines(&games).map_err(coded)?)?;
        if common.json {
            println!("{value}");
            continue;
        }
        println!(
            "{} {}  win rate {}  wins {}  losses {}  ties {}  without a verdict {}  pairs {}  mean words {:.0} and {:.0}",
            cell.model,
            cell.policy,
            percent(tally.win_rate()),
            tally.wins,
            tally.losses,
            tally.ties,
            tally.errors,
            pairs.len(),
            outcome.mean_words.0,
            outcome.mean_words.1
        );
        println!("{}", path.display());
    }
    Ok(())
}

fn rate(args: &Quality, common: &Common) -> Result<()> {
    let cells = cells(&args.run, &["longbench-write", "longwrite-ruler"])?;
    let judge = args.who.open(&args.run, common)?;
    for (cell, rows) in &cells {
        let requests = match cell.task.as_str() {
            "longbench-write" => longbench_write::requests(args.data.as_deref()).map_err(coded)?,
            _ => (0..)
                .map_while(|row| longbench_write::ruler_request(row, cell.length))
                .collect(),
        };
        let mut asked = Vec::new();
        let mut lengths = Vec::new();
        for row in rows.iter().filter(|row| row.error.is_none()) {
            let number = |name: &str| row.attrs.get(name).and_then(Value::as_u64).unwrap_or(0);
            let at = usize::try_from(number("row")).unwrap_or(usize::MAX);
            let request = requests.get(at).ok_or_else(|| {
                let text = format!("the data has no row {at}; name the run's with --data");
                exit(2, text)
            })?;
            asked.push((request.clone(), row.text.clone()));
            let required = usize::try_from(number("required")).unwrap_or(0);
            lengths.push(length_score(required, count_words(&row.text)));
        }
        let outcome = quality::rate(&asked, &judge, args.who.concurrency).map_err(coded)?;
        let s_l = lengths.iter().sum::<f64>() / lengths.len().max(1) as f64;
        let ratings: Vec<Value> = outcome.ratings.iter().map(|r| json!(r)).collect();
        let value = json!({
            "cell": cell, "S_l": s_l, "S_q": outcome.scores.map(|(_, total)| total),
            "overall": outcome.scores.map(|(_, s_q)| quality::overall(s_l, s_q)),
            "dimensions": outcome.scores.map(|(each, _)| {
                DIMENSIONS.iter().zip(each).map(|(n, v)| (n.to_string(), json!(v))).collect::<serde_json::Map<_, _>>()
            }),
            "not_rated": outcome.failed, "ratings": ratings,
        });
        let path = args
            .run
            .join("cells")
            .join(format!("{}.quality.json", cell.name()));
        write(
            &path,
            &format!("{}\n", serde_json::to_string_pretty(&value)?),
        )?;
        if common.json {
            println!("{value}");
            continue;
        }
        match outcome.scores {
            Some((each, s_q)) => {
                println!(
                    "{} at {}, {} {}  S_q {s_q:.1}  S_l {s_l:.1}  overall {:.1}  n {}  not rated {}",
                    cell.task,
                    cell.length,
                    cell.model,
                    cell.policy,
                    quality::overall(s_l, s_q),
                    asked.len(),
                    outcome.failed
                );
                for (name, value) in DIMENSIONS.iter().zip(each) {
                    println!("  {name:<20} {value:>5.1}");
                }
            }
            None => println!(
                "{}: the judge rated none of {} answers",
                cell.task,
                asked.len()
            ),
        }
        println!("{}", path.display());
    }
    Ok(())
}
