//! LongBench (paper 35, arXiv 2308.14508): 21 data sets in English, Chinese and code, LongBench-E with 13 of them
//! evened out over lengths, and LongBench v2. For numbers that may stand beside a paper's: published prompts, output
//! limits, truncation and scorer.

pub mod score;
pub mod v2;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use serde::Deserialize;
use serde_json::{Value, json};

use super::attr;
use super::dataset::{Shipped, source};
use crate::error::{EvalError, Result};
use crate::metric::rouge::RougeCompat;
use crate::python::format_fields;
use crate::stats::Estimate;
use crate::task::*;
use score::Metric;

/// What is fixed about a data set.
#[derive(Clone, Copy, Debug)]
pub struct DataSet {
    pub name: &'static str,
    pub category: &'static str,
    /// en, zh or code.
    pub language: &'static str,
    pub metric: Metric,
    /// Part of LongBench-E.
    pub in_e: bool,
    /// Continued as it stands: no chat template around it.
    pub raw: bool,
}

const fn set(
    name: &'static str,
    category: &'static str,
    language: &'static str,
    metric: Metric,
    in_e: bool,
    raw: bool,
) -> DataSet {
    DataSet {
        name,
        category,
        language,
        metric,
        in_e,
        raw,
    }
}

const SINGLE: &str = "single-document QA";
const MULTI: &str = "multi-document QA";
const SUMMARY: &str = "summarisation";
const FEW_SHOT: &str = "few-shot learning";
const SYNTHETIC: &str = "synthetic";
const CODE: &str = "code completion";

/// All data sets.
pub const DATA_SETS: [DataSet; 21] = [
    set("narrativeqa", SINGLE, "en", Metric::QaF1, false, false),
    set("qasper", SINGLE, "en", Metric::QaF1, true, false),
    set("multifieldqa_en", SINGLE, "en", Metric::QaF1, true, false),
    set(
        "multifieldqa_zh",
        SINGLE,
        "zh",
        Metric::QaF1Zh,
        false,
        false,
    ),
    set("hotpotqa", MULTI, "en", Metric::QaF1, true, false),
    set("2wikimqa", MULTI, "en", Metric::QaF1, true, false),
    set("musique", MULTI, "en", Metric::QaF1, false, false),
    set("dureader", MULTI, "zh", Metric::RougeZh, false, false),
    set("gov_report", SUMMARY, "en", Metric::Rouge, true, false),
    set("qmsum", SUMMARY, "en", Metric::Rouge, false, false),
    set("multi_news", SUMMARY, "en", Metric::Rouge, true, false),
    set("vcsum", SUMMARY, "zh", Metric::RougeZh, false, false),
    set("trec", FEW_SHOT, "en", Metric::Classification, true, true),
    set("triviaqa", FEW_SHOT, "en", Metric::QaF1, true, true),
    set("samsum", FEW_SHOT, "en", Metric::Rouge, true, true),
    set("lsht", FEW_SHOT, "zh", Metric::Classification, false, true),
    set("passage_count", SYNTHETIC, "en", Metric::Count, true, false),
    set(
        "passage_retrieval_en",
        SYNTHETIC,
        "en",
        Metric::Retrieval,
        true,
        false,
    ),
    set(
        "passage_retrieval_zh",
        SYNTHETIC,
        "zh",
        Metric::RetrievalZh,
        false,
        false,
    ),
    set("lcc", CODE, "code", Metric::CodeSim, true, true),
    set("repobench-p", CODE, "code", Metric::CodeSim, true, true),
];

/// A data set by name.
pub fn dataset(name: &str) -> Option<&'static DataSet> {
    DATA_SETS.iter().find(|set| set.name == name)
}

static PROMPTS: LazyLock<BTreeMap<String, String>> =
    LazyLock::new(|| table(include_str!("dataset2prompt.json")));
static MAX_NEW: LazyLock<BTreeMap<String, usize>> =
    LazyLock::new(|| table(include_str!("dataset2maxlen.json")));

fn table<T: serde::de::DeserializeOwned>(text: &str) -> BTreeMap<String, T> {
    serde_json::from_str(text).expect("a table that ships with the program")
}

/// A published row.
#[derive(Clone, Debug, Deserialize)]
pub struct Row {
    pub input: String,
    pub context: String,
    pub answers: Vec<String>,
    /// Words, or characters of Chinese sets.
    pub length: usize,
    #[serde(default)]
    pub all_classes: Option<Vec<String>>,
    #[serde(rename = "_id")]
    pub id: String,
}

/// The published prompt of a row.
///
/// # Errors
/// An unknown data set.
pub fn prompt(dataset: &str, row: &Row) -> Result<String> {
    let template = PROMPTS.get(dataset).ok_or_else(|| {
        EvalError::Input(format!(
            "longbench: `{dataset}` is none of its 21 data sets"
        ))
    })?;
    let field = |name: &str| match name {
        "context" => Some(row.context.as_str().into()),
        "input" => Some(row.input.as_str().into()),
        _ => None,
    };
    format_fields(template, field).map_err(|name| {
        EvalError::Input(format!(
            "longbench: the prompt of {dataset} has a field `{name}`"
        ))
    })
}

macro_rules! shipped {
    ($($name:literal),*) => {
        &[$((
            concat!("data/", $name, ".jsonl"),
            include_str!(concat!("../../../../../tests/fixtures/longbench/data/", $name, ".jsonl")),
        )),*]
    };
}

const SHIPPED: Shipped = shipped!(
    "narrativeqa",
    "qasper",
    "multifieldqa_en",
    "multifieldqa_zh",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "dureader",
    "gov_report",
    "qmsum",
    "multi_news",
    "vcsum",
    "trec",
    "triviaqa",
    "samsum",
    "lsht",
    "passage_count",
    "passage_retrieval_en",
    "passage_retrieval_zh",
    "lcc",
    "repobench-p",
    "hotpotqa_e",
    "gov_report_e",
    "passage_count_e"
);

struct LongBench {
    meta: TaskMeta,
    set: &'static DataSet,
    e: bool,
}

/// One task a data set, LongBench-E and v2 included.
pub fn tasks() -> Vec<Arc<dyn Task>> {
    let task = |set: &'static DataSet, e: bool| -> Arc<dyn Task> {
        let best = match set.metric {
            // The published formula has 1e-8 below the line: a perfect match gives 0.999999995.
            Metric::Rouge | Metric::RougeZh => 0.999_999_99,
            _ => 1.0,
        };
        Arc::new(LongBench {
            meta: TaskMeta {
                id: format!("longbench{}/{}", if e { "-e" } else { "" }, set.name),
                version: 1,
                ability: set.category,
                metric: set.metric.name(),
                higher_is_better: true,
                best,
                // Any text is a little like a line of code.
                floor: if set.metric == Metric::CodeSim {
                    0.3
                } else {
                    0.0
                },
                unit: Unit::Tokens,
                lengths: &[7500],
                depths: false,
                source: "arXiv 2308.14508; data THUDM/LongBench",
                licence: "MIT (prompts); each data set has its own",
            },
            set,
            e,
        })
    };
    let mut all: Vec<_> = DATA_SETS.iter().map(|set| task(set, false)).collect();
    all.extend(DATA_SETS.iter().filter(|s| s.in_e).map(|s| task(s, true)));
    all.push(v2::task());
    all
}

impl Task for LongBench {
    fn meta(&self) -> &TaskMeta {
        &self.meta
    }

    fn needs_data(&self) -> bool {
        true
    }

    fn samples(&self, cx: &SampleCx<'_>) -> Result<Vec<Sample>> {
        let set = self.set;
        let data = source(cx, "longbench", SHIPPED)?;
        let file = format!("{}{}.jsonl", set.name, if self.e { "_e" } else { "" });
        let mut names = vec![format!("data/{file}"), file];
        if self.e && matches!(data, super::dataset::Source::Shipped(_)) {
            // Three sets ship with rows of LongBench-E; the others show the form with their plain rows.
            names.push(format!("data/{}.jsonl", set.name));
        }
        let max_new = MAX_NEW.get(set.name).copied().unwrap_or(64);
        let mut samples = Vec::new();
        for row in data.rows(&names)?.into_iter().take(cx.samples) {
            let parsed: Row = row.parse()?;
            if parsed.answers.is_empty() {
                return Err(row.wrong("found no answer, expected at least one"));
            }
            let mut attrs = BTreeMap::from([
                attr("length", parsed.length),
                attr("source_id", parsed.id.clone()),
            ]);
            if let Some(classes) = &parsed.all_classes {
                attrs.extend([attr("all_classes", json!(classes))]);
            }
            let text = prompt(set.name, &parsed)?;
            let oracle = parsed.answers[0].clone();
            let mut sample = Sample::new(
                Prompt {
                    segments: vec![Segment::Unique(text)],
                    truncation: Truncation::Middle(cx.length),
                    raw: set.raw,
                },
                Work::Generate(Decode {
                    max_new,
                    stop: match set.name {
                        "samsum" => vec!["\n".into()],
                        _ => Vec::new(),
                    },
                }),
                parsed.answers,
                attrs,
                oracle,
            );
            let document = blake3::hash(parsed.context.as_bytes()).to_hex();
            sample.cluster = document[..8].to_string();
            samples.push(sample);
        }
        Ok(samples)
    }

    fn score(&self, row: &Prediction) -> Scored {
        let classes = strings(row.attrs.get("all_classes"));
        let text = score::extract(self.set.name, &row.text);
        let value = score::score(
            self.set.name,
            &row.text,
            &row.references,
            &classes,
            RougeCompat::Unlimited,
        );
        Scored::new(row, value.unwrap_or(0.0), Some(text.to_string()))
    }

    fn aggregate(&self, rows: &[Prediction], scored: &[Scored]) -> Vec<Aggregate> {
        let mut all = mean_aggregates(self.meta.metric, scored);
        let lengths: BTreeMap<&str, usize> = rows
            .iter()
            .map(|row| {
                let length = row.attrs.get("length").and_then(Value::as_u64);
                (row.id.as_str(), length.unwrap_or(0) as usize)
            })
            .collect();
        let at = |s: &Scored| (lengths.get(s.id.as_str()).copied().unwrap_or(0), s.value);
        let pairs: Vec<(usize, f64)> = scored.iter().map(at).collect();
        let mut push = |name: &str, value: Option<f64>, n: usize| {
            if let Some(value) = value {
                all.push(Aggregate {
                    name: name.into(),
                    estimate: Estimate::exact(value, n),
                });
            }
        };
        if self.e {
            let bins = score::bins(pairs.iter().copied());
            let n = |low: usize, high: usize| {
                pairs
                    .iter()
                    .filter(|(l, _)| (low..high).contains(l))
                    .count()
            };
            push("official 0-4k", bins.to_4k, n(0, 4000));
            push("official 4-8k", bins.to_8k, n(4000, 8000));
            push("official 8k+", bins.above, n(8000, usize::MAX));
        } else {
            let mean = pairs.iter().map(|p| p.1).sum::<f64>() / pairs.len() as f64;
            let score = (!pairs.is_empty()).then(|| crate::python::round(100.0 * mean, 2));
            push("official", score, pairs.len());
        }
        all
    }
}

/// A list of strings of an attribute; empty for anything else.
pub(crate) fn strings(value: Option<&Value>) -> Vec<String> {
    let list = value.and_then(Value::as_array);
    list.map(|list| {
        list.iter()
            .filter_map(|v| v.as_str().map(str::to_string))
            .collect()
    })
    .unwrap_or_default()
}

/// Scores a folder of published predictions (`<dataset>.jsonl` with `pred`, `answers`, `all_classes`, `length`): data
/// set to score, or to scores by length for LongBench-E. Equal files give equal results, byte for byte.
///
/// # Errors
/// A folder without predictions, an unknown data set, a bad row.
pub fn score_folder(
    folder: &Path,
    e: bool,
    compat: RougeCompat,
) -> Result<BTreeMap<String, Value>> {
    let mut results = BTreeMap::new();
    for entry in std::fs::read_dir(folder).map_err(EvalError::io(folder))? {
        let path = entry.map_err(EvalError::io(folder))?.path();
        if path.extension().is_none_or(|e| e != "jsonl") {
            continue;
        }
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let name = name.strip_suffix("_e").unwrap_or(&name).to_string();
        let rows: Vec<score::PredictionRow> = super::dataset::Source::Path(&path)
            .rows(&[])?
            .iter()
            .map(|row| row.parse())
            .collect::<Result<_>>()?;
        let unknown = || {
            EvalError::Input(format!(
                "{}: `{name}` is none of LongBench's 21 data sets",
                path.display()
            ))
        };
        let value = if e {
            json!(score::by_length(&name, &rows, compat).ok_or_else(unknown)?)
        } else {
            dataset(&name).ok_or_else(unknown)?;
            json!(score::dataset_score(&name, &rows, compat))
        };
        results.insert(name, value);
    }
    if results.is_empty() {
        return Err(EvalError::Input(format!(
            "{}: found no <dataset>.jsonl with predictions",
            folder.display()
        )));
    }
    Ok(results)
}
