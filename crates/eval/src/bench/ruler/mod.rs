//! RULER (paper 57): thirteen synthetic tasks at any token length, scored by string match. For
//! finding the length up to which a model, a policy or a position method works.

mod generate;
mod sources;

pub use generate::{Haystack, Kind, Niah, Request, Row, Token, generate};
pub use sources::Sources;

use super::{attr, rows};
use crate::error::{EvalError, Result};
use crate::metric::string_match;
use crate::python;
use crate::stats::Estimate;
use crate::task::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Mean score of Llama-2-7B at 4,096 tokens: a model's effective length is the longest at which its
/// mean reaches this.
pub const THRESHOLD: f64 = 85.6;

/// One task of the thirteen.
pub struct Ruler {
    meta: TaskMeta,
    name: &'static str,
    kind: Kind,
}

const fn niah(haystack: Haystack, key: Token, value: Token, counts: (usize, usize, usize)) -> Kind {
    Kind::Niah(Niah {
        haystack,
        key,
        value,
        counts,
    })
}

macro_rules! fixture {
    ($name:literal) => {
        include_str!(concat!(
            "../../../../../tests/fixtures/ruler/",
            $name,
            "/validation.jsonl"
        ))
    };
}

/// Name, ability, generator and shipped rows of the thirteen.
const TASKS: [(&str, &str, Kind, &str); 13] = {
    use Haystack::*;
    use Token::*;
    [
        (
            "niah_single_1",
            "retrieval from filler",
            niah(Noise, Words, Numbers, (1, 1, 1)),
            fixture!("niah_single_1"),
        ),
        (
            "niah_single_2",
            "retrieval from an essay",
            niah(Essay, Words, Numbers, (1, 1, 1)),
            fixture!("niah_single_2"),
        ),
        (
            "niah_single_3",
            "retrieval of a UUID",
            niah(Essay, Words, Uuids, (1, 1, 1)),
            fixture!("niah_single_3"),
        ),
        (
            "niah_multikey_1",
            "retrieval among 4 keys",
            niah(Essay, Words, Numbers, (4, 1, 1)),
            fixture!("niah_multikey_1"),
        ),
        (
            "niah_multikey_2",
            "retrieval among needles",
            niah(Needle, Words, Numbers, (1, 1, 1)),
            fixture!("niah_multikey_2"),
        ),
        (
            "niah_multikey_3",
            "retrieval among UUIDs",
            niah(Needle, Uuids, Uuids, (1, 1, 1)),
            fixture!("niah_multikey_3"),
        ),
        (
            "niah_multivalue",
            "retrieval of 4 values",
            niah(Essay, Words, Numbers, (1, 4, 1)),
            fixture!("niah_multivalue"),
        ),
        (
            "niah_multiquery",
            "retrieval of 4 keys' values",
            niah(Essay, Words, Numbers, (1, 1, 4)),
            fixture!("niah_multiquery"),
        ),
        ("vt", "multi-hop tracing", Kind::Vt, fixture!("vt")),
        ("cwe", "aggregation of words", Kind::Cwe, fixture!("cwe")),
        (
            "fwe",
            "aggregation of coded words",
            Kind::Fwe,
            fixture!("fwe"),
        ),
        (
            "qa_1",
            "question answering (SQuAD)",
            Kind::Qa1,
            fixture!("qa_1"),
        ),
        (
            "qa_2",
            "question answering (HotpotQA)",
            Kind::Qa2,
            fixture!("qa_2"),
        ),
    ]
};

/// The thirteen tasks.
pub fn tasks() -> Vec<Arc<dyn Task>> {
    TASKS
        .iter()
        .map(|&(name, ability, kind, _)| {
            Arc::new(Ruler {
                meta: TaskMeta {
                    id: format!("ruler/{name}"),
                    version: 1,
                    ability,
                    metric: "string match",
                    higher_is_better: true,
                    best: 1.0,
                    floor: 0.0,
                    unit: Unit::Tokens,
                    lengths: &[4096],
                    depths: false,
                    source: "arXiv 2404.06654; generators of NVIDIA/RULER, texts made for this program",
                    licence: "Apache-2.0",
                },
                name,
                kind,
            }) as Arc<dyn Task>
        })
        .collect()
}

/// The generator of a task name, `niah_single_1` to `qa_2`.
pub fn kind(name: &str) -> Option<Kind> {
    TASKS.iter().find(|task| task.0 == name).map(|task| task.2)
}

/// The rows of a task, `niah_single_1` to `qa_2`, as the published generators write them.
///
/// # Errors
/// An unknown name, and those of [`generate`].
pub fn published(name: &str, cx: &SampleCx<'_>) -> Result<Vec<Row>> {
    let Some(&(name, _, kind, fixture)) = TASKS.iter().find(|task| task.0 == name) else {
        return Err(EvalError::Input(format!("ruler has no task {name:?}")));
    };
    let mut all: Vec<Row> = if cx.fixtures {
        rows(fixture, Path::new(name))?
    } else if let Some(path) = cx
        .data
        .map(|folder| folder.join(name).join("validation.jsonl"))
        .filter(|path| path.is_file())
    {
        let text = std::fs::read_to_string(&path).map_err(EvalError::io(&path))?;
        rows(&text, &path)?
    } else {
        let sources = match cx.data {
            Some(folder) => Sources::from_folder(folder)?,
            None => Sources::shipped()?,
        };
        generate(
            kind,
            &Request {
                sources: &sources,
                counter: cx.counter,
                max_seq_length: cx.length,
                model_template_token: cx.counter.overhead(),
                samples: cx.samples,
                random_seed: cx.seed as i64,
            },
        )?
    };
    all.truncate(cx.samples);
    Ok(all)
}

impl Ruler {
    fn sample(&self, row: Row, at: usize) -> Sample {
        let cut = row.input.rfind('\n').map_or(0, |at| at + 1);
        let (text, question) = row.input.split_at(cut);
        let mut prompt = Prompt::ask(text, question);
        if text.is_empty() {
            prompt.segments.remove(0);
        }
        let mut attrs = BTreeMap::from([attr("row", at)]);
        if let (Kind::Niah(niah), Some(_)) = (self.kind, row.token_position_answer)
            && niah.counts == (1, 1, 1)
        {
            let share = row.index as f64 / row.input.chars().count().max(1) as f64;
            attrs.extend([attr("depth", (share * 10.0).round() as u64 * 10)]);
        }
        let oracle = row.outputs.join(", ");
        let mut sample = Sample::new(
            prompt.prefixed(row.answer_prefix),
            Work::Generate(Decode {
                max_new: self.kind.tokens_to_generate(),
                stop: Vec::new(),
            }),
            row.outputs,
            attrs,
            oracle,
        );
        // Every row has a text of its own, unless two questions share their documents.
        if sample.prompt.shared().is_empty() {
            sample.cluster = sample.id.clone();
        }
        sample
    }
}

/// Mean of row scores in 0..100, rounded to two places as published.
pub fn official(scores: &[f64]) -> f64 {
    let mean = scores.iter().sum::<f64>() / scores.len().max(1) as f64;
    python::round(mean * 100.0, 2)
}

impl Task for Ruler {
    fn meta(&self) -> &TaskMeta {
        &self.meta
    }

    fn samples(&self, cx: &SampleCx<'_>) -> Result<Vec<Sample>> {
        Ok(published(self.name, cx)?
            .into_iter()
            .enumerate()
            .map(|(at, row)| self.sample(row, at))
            .collect())
    }

    fn score(&self, row: &Prediction) -> Scored {
        let text = string_match::clean(&row.text);
        let value = match self.kind {
            Kind::Qa1 | Kind::Qa2 => string_match::part(&text, &row.references),
            _ => string_match::all(&text, &row.references),
        };
        let extracted = (!text.is_empty()).then_some(text);
        Scored::new(row, value, extracted)
    }

    fn aggregate(&self, _rows: &[Prediction], scored: &[Scored]) -> Vec<Aggregate> {
        let mut all = mean_aggregates(self.meta.metric, scored);
        let values: Vec<f64> = scored.iter().map(|row| row.value).collect();
        all.push(Aggregate {
            name: "official (0-100)".into(),
            estimate: Estimate::exact(official(&values), values.len()),
        });
        all
    }
}
