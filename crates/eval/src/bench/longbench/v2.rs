//! LongBench v2 (arXiv 2412.15204): four-way choice over texts of 8k to 2M words, read by the published pattern.
//! Greedy here, where the published script samples at temperature 0.1.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;

use super::super::attr;
use super::super::dataset::{Shipped, source};
use crate::error::Result;
use crate::metric::letters::correct_answer_is;
use crate::python::round;
use crate::stats::Estimate;
use crate::task::*;

#[derive(Deserialize)]
struct Row {
    #[serde(rename = "_id")]
    id: String,
    domain: String,
    difficulty: String,
    length: String,
    question: String,
    #[serde(rename = "choice_A")]
    a: String,
    #[serde(rename = "choice_B")]
    b: String,
    #[serde(rename = "choice_C")]
    c: String,
    #[serde(rename = "choice_D")]
    d: String,
    answer: String,
    context: String,
}

const SHIPPED: Shipped = &[(
    "v2.jsonl",
    include_str!("../../../../../tests/fixtures/longbench/v2.jsonl"),
)];

struct V2 {
    meta: TaskMeta,
}

pub(super) fn task() -> Arc<dyn Task> {
    Arc::new(V2 {
        meta: TaskMeta {
            id: "longbench-v2".into(),
            version: 1,
            ability: "choice over long texts",
            metric: "accuracy",
            higher_is_better: true,
            best: 1.0,
            floor: 0.0,
            unit: Unit::Tokens,
            lengths: &[7500],
            depths: false,
            source: "arXiv 2412.15204; data THUDM/LongBench-v2",
            licence: "Apache-2.0 (data)",
        },
    })
}

impl Task for V2 {
    fn meta(&self) -> &TaskMeta {
        &self.meta
    }

    fn needs_data(&self) -> bool {
        true
    }

    fn samples(&self, cx: &SampleCx<'_>) -> Result<Vec<Sample>> {
        let names = ["v2.jsonl", "data.json", "train.jsonl"].map(String::from);
        let mut samples = Vec::new();
        let rows = source(cx, "longbench-v2", SHIPPED)?.rows(&names)?;
        for row in rows.into_iter().take(cx.samples) {
            let parsed: Row = row.parse()?;
            if !["A", "B", "C", "D"].contains(&parsed.answer.as_str()) {
                return Err(row.wrong(format!(
                    "found answer {:?}, expected one of A, B, C, D",
                    parsed.answer
                )));
            }
            let text = format!(
                "Please read the following text and answer the question below.\n\n<text>\n{}\n</text>\n\nWhat is the \
                 correct answer to this question: {}\nChoices:\n(A) {}\n(B) {}\n(C) {}\n(D) {}\n\nFormat your \
                 response as follows: \"The correct answer is (insert answer here)\".",
                parsed.context.trim(),
                parsed.question.trim(),
                parsed.a.trim(),
                parsed.b.trim(),
                parsed.c.trim(),
                parsed.d.trim(),
            );
            let oracle = format!("The correct answer is ({})", parsed.answer);
            let attrs = BTreeMap::from([
                attr("source_id", parsed.id),
                attr("domain", parsed.domain),
                attr("difficulty", parsed.difficulty),
                attr("length", parsed.length),
            ]);
            let mut sample = Sample::new(
                Prompt {
                    segments: vec![Segment::Unique(text)],
                    truncation: Truncation::Middle(cx.length),
                    raw: false,
                },
                Work::Generate(Decode {
                    max_new: 128,
                    stop: Vec::new(),
                }),
                vec![parsed.answer],
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
        let letter = correct_answer_is(&row.text).map(String::from);
        let right = letter.is_some() && letter.as_ref() == row.references.first();
        let mut scored = Scored::new(row, f64::from(u8::from(right)), letter);
        // The published "compensated" score: a reply without a letter counts as a guess among four.
        let compensated = if scored.extracted.is_none() {
            0.25
        } else {
            scored.value
        };
        scored.more.insert("compensated".into(), compensated);
        scored
    }

    fn aggregate(&self, rows: &[Prediction], scored: &[Scored]) -> Vec<Aggregate> {
        let mut all = mean_aggregates(self.meta.metric, scored);
        let values: BTreeMap<&str, f64> = scored.iter().map(|s| (s.id.as_str(), s.value)).collect();
        for (field, groups) in [
            ("difficulty", &["easy", "hard"][..]),
            ("length", &["short", "medium", "long"]),
        ] {
            for group in groups {
                let of_group: Vec<f64> = rows
                    .iter()
                    .filter(|row| row.attrs.get(field).is_some_and(|v| v == group))
                    .filter_map(|row| values.get(row.id.as_str()).copied())
                    .collect();
                if of_group.is_empty() {
                    continue;
                }
                let mean = of_group.iter().sum::<f64>() / of_group.len() as f64;
                all.push(Aggregate {
                    name: format!("official {group}"),
                    estimate: Estimate::exact(round(100.0 * mean, 1), of_group.len()),
                });
            }
        }
        all
    }
}
