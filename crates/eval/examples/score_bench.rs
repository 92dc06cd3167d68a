//! How long scoring takes: 10,000 stored rows of realistic length over the metrics of several benchmarks, written to a
//! run's folder and scored from it, one thread.
//!
//!     cargo run --release -p longspan-eval --example score_bench [ROWS]

use longspan_eval::cell::{Cell, CellWriter, CostRow, RunConfig, RunFolder};
use longspan_eval::python::Random;
use longspan_eval::registry::Registry;
use longspan_eval::score::{score_cell, score_run};
use longspan_eval::task::{Likelihood, Prediction};
use std::collections::{BTreeMap, HashSet};
use std::time::Instant;

/// Task, words of a reply, words of an answer, answers: the lengths of the published sets.
const TASKS: [(&str, usize, usize, usize); 14] = [
    ("longbench/narrativeqa", 40, 8, 2),
    ("longbench/hotpotqa", 30, 4, 1),
    ("longbench/multifieldqa_zh", 40, 12, 1),
    ("longbench/gov_report", 350, 500, 1),
    ("longbench/multi_news", 350, 250, 1),
    ("longbench/vcsum", 150, 120, 1),
    ("longbench/trec", 20, 3, 1),
    ("longbench/lcc", 40, 10, 1),
    ("leval/financial_qa", 120, 60, 1),
    ("leval/gov_report_summ", 300, 400, 1),
    ("leval/quality", 40, 1, 1),
    ("m4le/newsqa", 40, 5, 1),
    ("m4le/news-commentary-en2zh", 80, 80, 1),
    ("ruler/niah_multivalue", 60, 1, 4),
];

const WORDS: [&str; 24] = [
    "the",
    "report",
    "of",
    "Congress",
    "agency",
    "found",
    "that",
    "costs",
    "rose",
    "by",
    "percent",
    "in",
    "fiscal",
    "year",
    "and",
    "committee",
    "a",
    "lighthouse,",
    "paragraph",
    "return",
    "self.value",
    "(x",
    "==",
    "0).",
];
const CHINESE: [&str; 12] = [
    "会议",
    "讨论",
    "了",
    "今年",
    "的",
    "预算",
    "，",
    "委员会",
    "认为",
    "成本",
    "上升",
    "。",
];

fn text(random: &mut Random, words: usize, chinese: bool) -> String {
    let list: &[&str] = if chinese { &CHINESE } else { &WORDS };
    let mut all = String::new();
    for at in 0..words {
        if at > 0 && !chinese {
            all.push(if at % 17 == 16 { '\n' } else { ' ' });
        }
        all += list[random.below(list.len() as u64) as usize];
    }
    all
}

fn main() {
    let rows: usize = std::env::args().nth(1).map_or(10_000, |n| {
        n.parse().expect("the number of rows is a whole number")
    });
    let registry = Registry::default();
    let mut random = Random::from_text("score bench");
    let tasks: Vec<_> = TASKS
        .iter()
        .map(|row| (row, registry.task(row.0).expect("a task of the registry")))
        .collect();
    let cell = |task: &str, version| Cell {
        task: task.into(),
        version,
        length: 8192,
        model: "bench".into(),
        policy: "full".into(),
        seed: 0,
    };
    let share = rows.div_ceil(tasks.len());
    let mut cells = Vec::new();
    for ((id, reply, answer, answers), task) in &tasks {
        let chinese = id.contains("zh") || id.contains("vcsum");
        let list: Vec<Prediction> = (0..share)
            .map(|index| {
                let references: Vec<String> = (0..*answers)
                    .map(|_| text(&mut random, *answer, chinese))
                    .collect();
                Prediction {
                    id: format!("{index}"),
                    index,
                    cluster: (index / 3).to_string(),
                    attrs: BTreeMap::from([("depth".into(), (index % 11 * 10).into())]),
                    question: text(&mut random, 100, chinese),
                    text: text(&mut random, *reply, chinese),
                    references,
                    finish: "stop".into(),
                    ..Prediction::default()
                }
            })
            .collect();
        cells.push((cell(id, task.meta().version), list));
    }
    // Perplexity rows hold a number for each token.
    let perplexity = registry.task("perplexity").expect("a task of the registry");
    let list = (0..share.min(50)).map(|index| Prediction {
        id: index.to_string(),
        index,
        cluster: index.to_string(),
        likelihood: Some(Likelihood {
            nll: (0..8192)
                .map(|_| Some(random.below(1000) as f32 / 250.0))
                .collect(),
            bytes: 32_000,
            words: 6_000,
            bos: false,
        }),
        ..Prediction::default()
    });
    cells.push((
        cell("perplexity", perplexity.meta().version),
        list.collect(),
    ));

    let path = std::env::temp_dir().join(format!("longspan-score-bench-{}", std::process::id()));
    let config = RunConfig {
        harness: "bench".into(),
        compat: "official".into(),
        cells: cells
            .iter()
            .map(|(c, rows)| (c.clone(), rows.len()))
            .collect(),
        tokenizer: "words".into(),
        targets: Vec::new(),
        options: Vec::new(),
        created: 0,
    };
    let folder = RunFolder::create(&path, &config).expect("a folder for the run");
    for (cell, rows) in &cells {
        let known: HashSet<String> = rows.iter().map(|row| row.id.clone()).collect();
        let mut writer = CellWriter::open(&folder, cell, &known).expect("a file for the cell");
        for row in rows {
            let cost = CostRow {
                id: row.id.clone(),
                cost: Default::default(),
                tokens: (8000, 100),
            };
            writer.append(row, &cost).expect("a row is written");
        }
        writer.finish(&folder, cell).expect("the cell is written");
    }
    let total: usize = cells.iter().map(|(_, rows)| rows.len()).sum();
    // The dictionary of Chinese words is read once a process.
    let start = Instant::now();
    longspan_eval::metric::segment::jieba("预算");
    println!(
        "{:<32} {:>9.1} ms",
        "dictionary",
        start.elapsed().as_secs_f64() * 1e3
    );
    for (cell, rows) in &cells {
        let task = registry.task(&cell.task).expect("a task of the registry");
        let start = Instant::now();
        let score = score_cell(&*task, cell, rows);
        let ms = start.elapsed().as_secs_f64() * 1e3;
        let name = task.meta().metric;
        println!(
            "{:<32} {ms:>9.1} ms  {:>6} rows  {name} {:.3}",
            cell.task,
            score.rows.len(),
            score.main().map_or(0.0, |main| main.value)
        );
    }
    let start = Instant::now();
    let scores = score_run(&folder, &registry).expect("the run is scored");
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{total} rows of {} cells read, scored and written: {seconds:.2} s",
        scores.len()
    );
    std::fs::remove_dir_all(&path).expect("the folder is removed");
}
