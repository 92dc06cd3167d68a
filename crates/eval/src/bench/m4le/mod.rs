//! M4LE (paper 10, arXiv 2310.19240): 36 short data sets made long by packing, in buckets of length, with five
//! abilities from finding one item by its id to reading everything. For a profile of what length costs, by ability;
//! [`build`] makes such rows from any pool of labelled short texts.

pub mod build;
pub mod score;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::attr;
use super::dataset::{Shipped, source};
use crate::error::{EvalError, Result};
use crate::stats::Estimate;
use crate::task::*;
use score::{Metric, Options, Spec};

/// A published row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub instruction: String,
    /// A worked example, the material, the question, ending in an answer cue.
    pub input: String,
    pub answers: Vec<String>,
    /// Words (English) or characters (Chinese) of instruction and input.
    #[serde(default)]
    pub input_length: usize,
    /// The same with the gold answer.
    #[serde(default)]
    pub total_length: usize,
    pub length_bucket: usize,
    /// Anything else.
    #[serde(flatten)]
    pub extra: BTreeMap<String, serde_json::Value>,
}

macro_rules! shipped {
    ($($name:literal),*) => {
        &[$((
            concat!($name, ".jsonl"),
            include_str!(concat!("../../../../../tests/fixtures/m4le/", $name, ".jsonl")),
        )),*]
    };
}

const SHIPPED: Shipped = shipped!(
    "mnds-news_explicit-single",
    "thucnews_explicit-single",
    "newsqa",
    "c3",
    "wow",
    "drcd_explicit-single",
    "cnnnews",
    "cepsum",
    "lcsts",
    "ncls",
    "mnds-news_explicit-multiple",
    "thucnews_explicit-multiple",
    "marc",
    "online-shopping",
    "wikitext-103",
    "wiki2019zh",
    "duorc",
    "nq-open",
    "dureader",
    "drcd_semantic-single",
    "wikihow",
    "news2016",
    "tedtalks-en2zh",
    "tedtalks-zh2en",
    "mnds-news_semantic-multiple",
    "thucnews_semantic-multiple",
    "hotpotqa",
    "bigpatent_global_cls",
    "triviaqa",
    "arxiv",
    "pubmed",
    "booksum",
    "bigpatent_global_sum",
    "cnewsum",
    "clts+",
    "open-subtitles-en2zh",
    "open-subtitles-zh2en",
    "news-commentary-en2zh",
    "news-commentary-zh2en"
);

struct M4le {
    meta: TaskMeta,
    spec: &'static Spec,
}

/// One task a published file.
pub fn tasks() -> Vec<Arc<dyn Task>> {
    score::TASKS
        .iter()
        .map(|spec| -> Arc<dyn Task> {
            Arc::new(M4le {
                meta: TaskMeta {
                    id: format!("m4le/{}", spec.name),
                    version: 1,
                    ability: spec.ability,
                    metric: spec.metric.name(),
                    higher_is_better: true,
                    best: 1.0,
                    floor: 0.0,
                    unit: Unit::Words,
                    lengths: &[1000, 2000, 4000, 6000, 8000],
                    depths: false,
                    source: "arXiv 2310.19240; data wckwan/M4LE",
                    licence: "MIT (code); each source set has its own",
                },
                spec,
            })
        })
        .collect()
}

/// Most new tokens. The published script allows as many as the bucket is long.
fn max_new(bucket: usize) -> usize {
    bucket.min(512)
}

impl Task for M4le {
    fn meta(&self) -> &TaskMeta {
        &self.meta
    }

    fn needs_data(&self) -> bool {
        true
    }

    fn samples(&self, cx: &SampleCx<'_>) -> Result<Vec<Sample>> {
        let data = source(cx, "m4le", SHIPPED)?;
        let names = [self.spec.name, self.spec.evaluator].map(|n| format!("{n}.jsonl"));
        // The samples that ship are of the first bucket.
        let bucket = if cx.fixtures && cx.data.is_none() {
            self.meta.lengths[0]
        } else {
            cx.length
        };
        let mut samples = Vec::new();
        let mut buckets = BTreeSet::new();
        for row in data.rows(&names)? {
            let parsed: Row = row.parse()?;
            buckets.insert(parsed.length_bucket);
            if parsed.length_bucket != bucket {
                continue;
            }
            if samples.len() >= cx.samples {
                break;
            }
            if parsed.answers.is_empty() {
                return Err(row.wrong("found no answer, expected at least one"));
            }
            let attrs = BTreeMap::from([
                attr("line", row.line),
                attr("total_length", parsed.total_length),
            ]);
            let oracle = match self.spec.name {
                // The published scorer reads what stands between quotation marks.
                "news2016" => format!("\"{}\"", parsed.answers[0]),
                _ => parsed.answers[0].clone(),
            };
            let mut sample = Sample::new(
                Prompt {
                    segments: vec![Segment::Unique(format!(
                        "{}\n{}",
                        parsed.instruction, parsed.input
                    ))],
                    ..Prompt::default()
                },
                Work::Generate(Decode {
                    max_new: max_new(parsed.length_bucket),
                    stop: Vec::new(),
                }),
                parsed.answers,
                attrs,
                oracle,
            );
            sample.cluster = sample.id.clone();
            samples.push(sample);
        }
        if samples.is_empty() {
            return Err(EvalError::Input(format!(
                "{}: no row of bucket {bucket}; the file has {buckets:?}",
                self.meta.id
            )));
        }
        Ok(samples)
    }

    fn score(&self, row: &Prediction) -> Scored {
        let options = Options::default();
        let value = score::score_row(self.spec, &row.text, &row.references, options);
        let extracted = match score::prepare(self.spec, &row.text, &row.references, options) {
            score::Prepared::Text(text, _) => text,
            score::Prepared::Ids(ids, _) => ids.join(", "),
        };
        Scored::new(row, value, Some(extracted))
    }

    fn aggregate(&self, rows: &[Prediction], scored: &[Scored]) -> Vec<Aggregate> {
        let mut all = mean_aggregates(self.meta.metric, scored);
        if self.spec.metric == Metric::Bleu {
            // BLEU of a bucket is that of its corpus; the mean of the rows' is another figure.
            let pairs: Vec<(String, Vec<String>)> = rows
                .iter()
                .filter(|row| row.error.is_none())
                .map(|row| (row.text.clone(), row.references.clone()))
                .collect();
            if let Some(value) = score::score_bucket(self.spec, &pairs, Options::default()) {
                all[0].name = "mean bleu of rows".into();
                all.insert(
                    0,
                    Aggregate {
                        name: self.meta.metric.into(),
                        estimate: Estimate::exact(value, pairs.len()),
                    },
                );
            }
        }
        all
    }
}
