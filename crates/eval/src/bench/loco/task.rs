//! LoCoV1 as a task: queries as samples, rankings as replies. Its score is the plain mean of the data sets' nDCG@10.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Corpus, Document, Query, needles, read, row_scores};
use crate::bench::attr;
use crate::bench::dataset::{Shipped, source};
use crate::error::{EvalError, Result};
use crate::stats::{self, Estimate};
use crate::task::*;

const SHIPPED: Shipped = &[
    (
        "LoCoV1-Documents.jsonl",
        include_str!("../../../../../tests/fixtures/loco/LoCoV1-Documents.jsonl"),
    ),
    (
        "LoCoV1-Queries.jsonl",
        include_str!("../../../../../tests/fixtures/loco/LoCoV1-Queries.jsonl"),
    ),
];

/// Documents of a set of needles.
const NEEDLES: usize = 64;

struct Loco {
    meta: TaskMeta,
    needles: bool,
}

/// `loco`, the published data sets, and `loco/needles`, documents with a fact at every depth. A length is the most
/// words of a document that are read; the default of `loco` cuts nothing.
pub fn tasks() -> Vec<Arc<dyn Task>> {
    let task = |id: &str, needles: bool| -> Arc<dyn Task> {
        Arc::new(Loco {
            meta: TaskMeta {
                id: id.into(),
                version: 1,
                ability: if needles {
                    "search for a fact within long documents"
                } else {
                    "search among long documents"
                },
                metric: "nDCG@10",
                higher_is_better: true,
                best: 1.0,
                floor: 0.0,
                unit: Unit::Words,
                lengths: if needles {
                    &[250, 1000, 4000]
                } else {
                    &[1_000_000]
                },
                depths: false,
                source: "arXiv 2402.07440; data hazyresearch/LoCoV1",
                licence: if needles {
                    "generated"
                } else {
                    "by source set"
                },
            },
            needles,
        })
    };
    vec![task("loco", false), task("loco/needles", true)]
}

/// The first `words` words of a document, and whether there are more.
fn cut(document: Document, words: usize) -> (Document, bool) {
    let passage = &document.passage;
    let next = crate::python::split(passage).nth(words);
    let end = next.map(|word| word.as_ptr() as usize - passage.as_ptr() as usize);
    match end {
        None => (document, false),
        Some(end) => {
            let passage = passage[..end].trim_end().to_string();
            let pid = document.pid;
            (Document { pid, passage }, true)
        }
    }
}

impl Loco {
    fn corpora(&self, cx: &SampleCx<'_>) -> Result<BTreeMap<String, Corpus>> {
        if !self.needles {
            return read(&source(cx, "loco", SHIPPED)?, "test");
        }
        let texts = crate::bench::perplexity::shipped();
        let passages: Vec<String> = texts
            .flat_map(|text| text.split("\n\n"))
            .map(str::trim)
            .filter(|text| !text.is_empty())
            .map(str::to_string)
            .collect();
        let words: usize = passages.iter().map(|p| p.split_whitespace().count()).sum();
        let mean = words.div_ceil(passages.len()).max(1);
        let corpus = needles(&passages, NEEDLES, (cx.length / mean).max(1), cx.seed);
        Ok(BTreeMap::from([("needles".to_string(), corpus)]))
    }
}

impl Task for Loco {
    fn meta(&self) -> &TaskMeta {
        &self.meta
    }

    fn needs_data(&self) -> bool {
        !self.needles
    }

    fn samples(&self, cx: &SampleCx<'_>) -> Result<Vec<Sample>> {
        let mut samples = Vec::new();
        for (set, corpus) in self.corpora(cx)? {
            let mut cuts = 0;
            let documents = corpus.documents.into_iter().map(|document| {
                // Needle documents have their length already; a cut would take needles away.
                let most = if self.needles { usize::MAX } else { cx.length };
                let (document, is_cut) = cut(document, most);
                cuts += usize::from(is_cut);
                document
            });
            let documents = Documents::new(documents.collect());
            for query in corpus.queries.into_iter().take(cx.samples) {
                samples.push(sample(&set, query, &documents, cuts));
            }
        }
        if samples.is_empty() {
            return Err(EvalError::Input(format!("{}: no queries", self.meta.id)));
        }
        Ok(samples)
    }

    fn score(&self, row: &Prediction) -> Scored {
        let Ok(ranked) = serde_json::from_str::<Vec<String>>(&row.text) else {
            return Scored::new(row, 0.0, None);
        };
        let qid = row.attrs.get("qid").and_then(|v| v.as_str()).unwrap_or("");
        let ranked = ranked.iter().map(String::as_str);
        let answers = row.references.iter().map(String::as_str).collect();
        let scores = row_scores(ranked, qid, &answers);
        let first: Vec<String> = serde_json::from_str::<Vec<String>>(&row.text)
            .unwrap_or_default()
            .into_iter()
            .take(3)
            .collect();
        let mut scored = Scored::new(row, scores.ndcg_at_10, Some(first.join(", ")));
        for (name, value) in [
            ("nDCG@1", scores.ndcg_at_1),
            ("nDCG@3", scores.ndcg_at_3),
            ("nDCG@5", scores.ndcg_at_5),
            ("nDCG@100", scores.ndcg_at_100),
            ("MRR@10", scores.mrr_at_10),
            ("recall@10", scores.recall_at_10),
            ("recall@100", scores.recall_at_100),
        ] {
            scored.more.insert(name.into(), value);
        }
        scored
    }

    fn aggregate(&self, rows: &[Prediction], scored: &[Scored]) -> Vec<Aggregate> {
        let mut all = mean_aggregates(self.meta.metric, scored);
        let mut sets: BTreeMap<&str, Vec<(&str, f64)>> = BTreeMap::new();
        for (row, score) in rows.iter().zip(scored) {
            let set = row.attrs.get("dataset").and_then(|v| v.as_str());
            let list = sets.entry(set.unwrap_or("")).or_default();
            list.push((&score.cluster, score.value));
        }
        if sets.len() < 2 {
            return all;
        }
        let means: Vec<Estimate> = sets.values().map(|list| stats::mean(list)).collect();
        let n = means.len() as f64;
        // Every data set counts the same, however many queries it has.
        let squares: Option<f64> = means.iter().map(|m| m.se.map(|se| se * se)).sum();
        let mean = Aggregate {
            name: self.meta.metric.into(),
            estimate: Estimate {
                value: means.iter().map(|m| m.value).sum::<f64>() / n,
                se: squares.map(|sum| sum.sqrt() / n),
                interval: None,
                ..all[0].estimate
            },
        };
        all[0].name = "nDCG@10 of all queries".into();
        all.insert(0, mean);
        for (name, estimate) in sets.keys().zip(means) {
            all.push(Aggregate {
                name: format!("nDCG@10 {name}"),
                estimate,
            });
        }
        all
    }
}

fn sample(set: &str, query: Query, documents: &Documents, cuts: usize) -> Sample {
    let mut attrs = BTreeMap::from([
        attr("dataset", set),
        attr("qid", query.qid),
        attr("documents", documents.list.len()),
    ]);
    if cuts > 0 {
        attrs.extend([attr("documents cut", cuts)]);
    }
    let oracle = serde_json::Value::from(query.answer_pids.clone()).to_string();
    let mut sample = Sample::new(
        Prompt {
            segments: vec![Segment::Unique(query.query)],
            ..Prompt::default()
        },
        Work::Search {
            documents: documents.clone(),
        },
        query.answer_pids,
        attrs,
        oracle,
    );
    sample.cluster = sample.id.clone();
    sample
}
