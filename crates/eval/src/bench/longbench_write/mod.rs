//! LongBench-Write and LongWrite-Ruler (paper 41, arXiv 2408.07055): does a model write as many words as it is asked
//! for, and where does its output end? S_l counts words; S_q comes from a judge, see [`judge`]. Greedy here, where the
//! paper samples at temperature 0.5.

pub mod judge;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::attr;
use super::dataset::{Shipped, Source, source};
use crate::error::Result;
use crate::metric::length_score::{count_words, length_score};
use crate::stats::{self, Estimate};
use crate::task::*;

/// A published row.
#[derive(Clone, Debug, Deserialize)]
pub struct Row {
    pub prompt: String,
    #[serde(rename = "type")]
    pub kind: String,
    /// Words asked for.
    pub length: usize,
}

const SHIPPED: Shipped = &[(
    "longbench_write.jsonl",
    include_str!("../../../../../tests/fixtures/longbench-write/longbench_write.jsonl"),
)];

/// LongWrite-Ruler's prompts, with the words asked for in place of `{words}`. This program's own.
const RULER: [&str; 8] = [
    "Write a novel of {words} words about a family that keeps a lighthouse.",
    "Write a history of the bicycle in {words} words.",
    "Write a travel guide of {words} words to a mountain region.",
    "Write a handbook of {words} words for new volunteers of a library.",
    "写一部{words}字的小说，讲一个渔村的三代人。",
    "写一篇{words}字的文章，介绍造纸术的历史。",
    "写一份{words}字的城市旅行指南。",
    "写一本{words}字的园艺手册。",
];

/// The requests of LongBench-Write in their order: of published data, or of the samples that ship.
///
/// # Errors
/// Data that cannot be read.
pub fn requests(data: Option<&std::path::Path>) -> Result<Vec<String>> {
    let data = data.map_or(Source::Shipped(SHIPPED), Source::Path);
    let rows = data.rows(&NAMES.map(String::from))?;
    rows.iter()
        .map(|row| row.parse::<Row>().map(|row| row.prompt))
        .collect()
}

/// The request of a row of LongWrite-Ruler for this many words.
pub fn ruler_request(row: usize, words: usize) -> Option<String> {
    let text = RULER.get(row)?;
    Some(text.replace("{words}", &words.to_string()))
}

const NAMES: [&str; 3] = [
    "longbench_write.jsonl",
    "longbench_write_en.jsonl",
    "longwrite.jsonl",
];

struct Write {
    meta: TaskMeta,
    ruler: bool,
}

/// The two tasks. The length of LongBench-Write is the most tokens of an answer, that of LongWrite-Ruler the words
/// asked for.
pub fn tasks() -> Vec<Arc<dyn Task>> {
    let task = |id: &str, ruler: bool| -> Arc<dyn Task> {
        Arc::new(Write {
            meta: TaskMeta {
                id: id.into(),
                version: 1,
                ability: "long writing",
                metric: "S_l",
                higher_is_better: true,
                best: 100.0,
                floor: 0.0,
                unit: if ruler { Unit::Words } else { Unit::Tokens },
                lengths: if ruler {
                    &[1000, 2000, 5000, 10000, 20000, 30000]
                } else {
                    &[32768]
                },
                depths: false,
                source: "arXiv 2408.07055; data THUDM/LongWriter",
                licence: "Apache-2.0",
            },
            ruler,
        })
    };
    vec![
        task("longbench-write", false),
        task("longwrite-ruler", true),
    ]
}

/// Most tokens of an answer of LongWrite-Ruler.
fn room(words: usize) -> usize {
    // Two tokens a word leave room for writing too much; the published limit is 32,768.
    (2 * words + 512).min(32768)
}

fn sample(prompt: String, required: usize, kind: &str, index: usize, max_new: usize) -> Sample {
    let chinese = prompt
        .chars()
        .any(|c| ('\u{4e00}'..='\u{9fff}').contains(&c));
    let attrs = BTreeMap::from([
        attr("row", index),
        attr("required", required),
        attr("type", kind),
        attr("language", if chinese { "zh" } else { "en" }),
    ]);
    let mut sample = Sample::new(
        Prompt {
            segments: vec![Segment::Unique(prompt)],
            ..Prompt::default()
        },
        Work::Generate(Decode {
            max_new,
            stop: Vec::new(),
        }),
        Vec::new(),
        attrs,
        "word ".repeat(required),
    );
    sample.cluster = sample.id.clone();
    sample
}

/// The published bins of required lengths.
fn bin(required: usize) -> &'static str {
    match required {
        0..500 => "S_l below 500 words",
        500..2000 => "S_l 500 to 2k words",
        2000..4000 => "S_l 2k to 4k words",
        _ => "S_l 4k words and more",
    }
}

impl Task for Write {
    fn meta(&self) -> &TaskMeta {
        &self.meta
    }

    fn needs_data(&self) -> bool {
        !self.ruler
    }

    fn samples(&self, cx: &SampleCx<'_>) -> Result<Vec<Sample>> {
        if self.ruler {
            let prompts = RULER.iter().take(cx.samples).enumerate();
            let fill = |text: &str| text.replace("{words}", &cx.length.to_string());
            return Ok(prompts
                .map(|(i, text)| sample(fill(text), cx.length, "ruler", i, room(cx.length)))
                .collect());
        }
        let names = NAMES.map(String::from);
        let rows = source(cx, "longbench-write", SHIPPED)?.rows(&names)?;
        let mut samples = Vec::new();
        for (index, row) in rows.into_iter().take(cx.samples).enumerate() {
            let parsed: Row = row.parse()?;
            if parsed.length == 0 {
                return Err(row.wrong("found length 0, expected the words asked for"));
            }
            samples.push(sample(
                parsed.prompt,
                parsed.length,
                &parsed.kind,
                index,
                cx.length,
            ));
        }
        Ok(samples)
    }

    fn score(&self, row: &Prediction) -> Scored {
        let required = row.attrs.get("required").and_then(Value::as_u64);
        let written = count_words(&row.text);
        let value = length_score(required.unwrap_or(0) as usize, written);
        let mut scored = Scored::new(row, value, Some(format!("{written} words")));
        scored.more.insert("words".into(), written as f64);
        scored
    }

    fn aggregate(&self, rows: &[Prediction], scored: &[Scored]) -> Vec<Aggregate> {
        let mut all = mean_aggregates(self.meta.metric, scored);
        if self.ruler {
            let words = scored.iter().filter_map(|s| s.more.get("words").copied());
            if let Some(most) = words.reduce(f64::max) {
                all.push(Aggregate {
                    name: "most words".into(),
                    estimate: Estimate::exact(most, scored.len()),
                });
            }
            return all;
        }
        let required: BTreeMap<&str, usize> = rows
            .iter()
            .map(|row| {
                let words = row.attrs.get("required").and_then(Value::as_u64);
                (row.id.as_str(), words.unwrap_or(0) as usize)
            })
            .collect();
        let mut bins: BTreeMap<&str, Vec<(&str, f64)>> = BTreeMap::new();
        for row in scored {
            let words = required.get(row.id.as_str()).copied().unwrap_or(0);
            bins.entry(bin(words))
                .or_default()
                .push((&row.cluster, row.value));
        }
        all.extend(bins.into_iter().map(|(name, values)| Aggregate {
            name: name.into(),
            estimate: stats::mean(&values),
        }));
        all
    }
}
