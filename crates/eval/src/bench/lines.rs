//! LongChat-Lines (paper 06, Giraffe, after LongChat): numbered-register lines, one asked for. For
//! retrieval at exact line counts, where perplexity hides failures.

use super::attr;
use crate::error::{EvalError, Result};
use crate::python::{Random, chars};
use crate::task::*;
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

const HEADER: &str = "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a certain line index. Now the record start:\n\n";
const ADJECTIVES: [&str; 40] = [
    "torpid", "amber", "brisk", "calm", "dusty", "eager", "faint", "gentle", "hollow", "icy",
    "jolly", "keen", "lively", "mellow", "narrow", "olive", "plain", "quiet", "rapid", "silent",
    "tidy", "upbeat", "vivid", "warm", "young", "zesty", "bold", "crisp", "deep", "even", "fresh",
    "grand", "humble", "ivory", "jagged", "kindly", "lunar", "misty", "nimble", "open",
];
const NOUNS: [&str; 60] = [
    "kid", "anchor", "basket", "candle", "dolphin", "engine", "feather", "garden", "hammer",
    "island", "jacket", "kettle", "lantern", "mirror", "needle", "orchard", "pebble", "quarry",
    "ribbon", "saddle", "tunnel", "umbrella", "violin", "wagon", "yarn", "zipper", "barrel",
    "cottage", "desk", "easel", "fountain", "glove", "harbor", "igloo", "jar", "kite", "ladder",
    "magnet", "nest", "oven", "paddle", "quilt", "rocket", "stove", "teapot", "urn", "valley",
    "window", "yacht", "bridge", "clock", "door", "elbow", "fence", "gate", "hinge", "ink",
    "jewel", "key", "lamp",
];
/// Most tokens of an answer.
const MAX_NEW: usize = 35;

/// The first maximal run of digits as an integer; -1 if there is none, as published. Runs too long
/// for the type are no right answer either.
pub fn first_number(output: &str) -> i64 {
    match chars::numbers(output).next() {
        Some(digits) => {
            let value = digits.chars().try_fold(0i64, |value, c| {
                value
                    .checked_mul(10)?
                    .checked_add(i64::from(chars::decimal_value(c)?))
            });
            value.unwrap_or(i64::MAX)
        }
        None => -1,
    }
}

/// See the module's text.
pub struct Lines {
    meta: TaskMeta,
}

impl Lines {
    /// The task.
    pub fn task() -> Arc<dyn Task> {
        Arc::new(Lines {
            meta: TaskMeta {
                id: "lines".into(),
                version: 1,
                ability: "retrieval of one line's number",
                metric: "accuracy",
                higher_is_better: true,
                best: 1.0,
                floor: 0.0,
                unit: Unit::Lines,
                lengths: &[50, 100, 200],
                depths: true,
                source: "arXiv 2308.10882; LongChat's longeval",
                licence: "generated; published test sets: Apache-2.0",
            },
        })
    }

    /// Rows of the published files: `<n>_lines.jsonl` with `prompt`, `expected_number`, `random_idx`.
    fn published(&self, cx: &SampleCx<'_>, folder: &std::path::Path) -> Result<Vec<Sample>> {
        let path = if folder.is_dir() {
            folder.join(format!("{}_lines.jsonl", cx.length))
        } else {
            folder.to_path_buf()
        };
        let text = std::fs::read_to_string(&path).map_err(EvalError::io(&path))?;
        let mut all = Vec::new();
        for (index, row) in super::rows::<Value>(&text, &path)?.into_iter().enumerate() {
            let bad = |field: &str| EvalError::Row {
                path: path.clone(),
                line: index + 1,
                reason: format!("`{field}` is missing or of another type"),
            };
            let prompt = row["prompt"].as_str().ok_or_else(|| bad("prompt"))?;
            let number = row["expected_number"]
                .as_i64()
                .ok_or_else(|| bad("expected_number"))?;
            let count = row["num_lines"].as_u64().unwrap_or(cx.length as u64).max(1);
            // Published as an index or as [name, index].
            let at = row["random_idx"]
                .as_u64()
                .or_else(|| row["random_idx"][1].as_u64());
            let depth = at.map_or(0, |at| at * 100 / count / 10 * 10);
            all.push(sample(prompt.to_string(), number, depth as f64, index));
        }
        all.truncate(cx.samples * cx.depths.len());
        Ok(all)
    }
}

fn sample(prompt: String, number: i64, depth: f64, repeat: usize) -> Sample {
    // The question stands on the last non-empty line.
    let body = prompt.trim_end();
    let cut = body.rfind('\n').map_or(0, |at| at + 1);
    let (document, question) = prompt.split_at(cut);
    Sample::new(
        Prompt::ask(document, question),
        Work::Generate(Decode {
            max_new: MAX_NEW,
            stop: Vec::new(),
        }),
        vec![number.to_string()],
        BTreeMap::from([attr("depth", depth), attr("repeat", repeat)]),
        format!("The <REGISTER_CONTENT> is <{number}>."),
    )
}

impl Task for Lines {
    fn meta(&self) -> &TaskMeta {
        &self.meta
    }

    fn samples(&self, cx: &SampleCx<'_>) -> Result<Vec<Sample>> {
        if let Some(folder) = cx.data {
            return self.published(cx, folder);
        }
        let names = ADJECTIVES.len() * NOUNS.len();
        if cx.length == 0 || cx.length > names {
            return Err(EvalError::Input(format!(
                "lines: {} lines, expected 1 to {names} (line names are unique)",
                cx.length
            )));
        }
        let mut all = Vec::new();
        for repeat in 0..cx.samples {
            let seed = format!("lines {} {} {repeat}", cx.seed, cx.length);
            let mut random = Random::from_text(&seed);
            let mut lines: Vec<(String, i64)> = Vec::with_capacity(cx.length);
            for at in random.sample_indices(names, cx.length) {
                let name = format!(
                    "{}-{}",
                    ADJECTIVES[at / NOUNS.len()],
                    NOUNS[at % NOUNS.len()]
                );
                lines.push((name, random.randint(1, 50_000)));
            }
            let mut record = HEADER.to_string();
            for (name, number) in &lines {
                record += &format!("line {name}: REGISTER_CONTENT is <{number}>\n");
            }
            record.push('\n');
            let mut asked = HashSet::new();
            for &depth in cx.depths {
                let at = ((cx.length as f64 * depth / 100.0) as usize).min(cx.length - 1);
                // Few lines and many depths: every line is asked once.
                if !asked.insert(at) {
                    continue;
                }
                let (name, number) = &lines[at];
                let question = format!(
                    "Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {name}? I need the number."
                );
                all.push(sample(record.clone() + &question, *number, depth, repeat));
            }
        }
        Ok(all)
    }

    fn score(&self, row: &Prediction) -> Scored {
        let number = first_number(&row.text);
        let right = row.references.first().and_then(|text| text.parse().ok()) == Some(number);
        let extracted = (number >= 0).then(|| number.to_string());
        Scored::new(row, f64::from(u8::from(right)), extracted)
    }
}
