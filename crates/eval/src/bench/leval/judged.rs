//! L-Eval's questions for a judge: answered like any task, compared afterwards with another run's answers (see
//! [`super::judge`]). Their own score is the share of answers that are not empty.

use std::sync::Arc;

use serde_json::Value;

use super::judge::Pair;
use super::{INFO, MAX_NEW, Row, SHIPPED, Score, parts, truncate};
use crate::bench::attr;
use crate::bench::dataset::{Row as DataRow, source};
use crate::error::{EvalError, Result};
use crate::task::*;

struct Judged {
    meta: TaskMeta,
}

/// `leval-judged`: the judged questions of all open sets that the data has.
pub fn task() -> Arc<dyn Task> {
    Arc::new(Judged {
        meta: TaskMeta {
            id: "leval-judged".into(),
            version: 1,
            ability: "open questions (judged apart)",
            metric: "answered",
            higher_is_better: true,
            best: 1.0,
            // Any words are an answer.
            floor: 1.0,
            unit: Unit::Tokens,
            lengths: &[16384],
            depths: false,
            source: "arXiv 2307.11088; data L4NLP/LEval",
            licence: "CC BY 4.0 and others, by source; prompts are this program's own",
        },
    })
}

impl Task for Judged {
    fn meta(&self) -> &TaskMeta {
        &self.meta
    }

    fn needs_data(&self) -> bool {
        true
    }

    fn samples(&self, cx: &SampleCx<'_>) -> Result<Vec<Sample>> {
        let data = source(cx, "leval-judged", SHIPPED)?;
        let budget = cx.length.saturating_sub(MAX_NEW);
        let mut samples = Vec::new();
        for info in INFO.iter().filter(|i| !matches!(i.score, Score::Closed(_))) {
            let names = info.files();
            if !data.has(&names) {
                continue;
            }
            let mut taken = 0;
            for row in data.rows(&names)? {
                let parsed: Row = row.parse()?;
                if !parsed.judged() {
                    continue;
                }
                let (document, cut) = truncate(&parsed.input, budget, false, cx.counter)?;
                let cluster = blake3::hash(parsed.input.as_bytes()).to_hex()[..8].to_string();
                for (question, gold) in parsed.instructions.iter().zip(&parsed.outputs) {
                    if taken == cx.samples {
                        break;
                    }
                    taken += 1;
                    let parts = parts(info, question, gold);
                    let attrs = [
                        attr("set", info.name),
                        attr("asked", question.clone()),
                        attr("document_cut", cut),
                    ];
                    let mut sample = Sample::new(
                        Prompt::ask(format!("{}{document}", parts.head), parts.question),
                        Work::Generate(Decode {
                            max_new: MAX_NEW,
                            stop: Vec::new(),
                        }),
                        vec![gold.clone()],
                        attrs.into_iter().collect(),
                        gold.clone(),
                    );
                    sample.cluster = cluster.clone();
                    samples.push(sample);
                }
            }
        }
        match samples.is_empty() {
            true => Err(EvalError::Input(
                "leval-judged: the data has no open question with `evaluation` LLM or human".into(),
            )),
            false => Ok(samples),
        }
    }

    fn score(&self, row: &Prediction) -> Scored {
        let answered = !row.text.trim().is_empty();
        let text = answered.then(|| row.text.clone());
        Scored::new(row, f64::from(u8::from(answered)), text)
    }
}

/// The question and reference of a stored answer.
fn asked(row: &Prediction) -> Option<(&str, &str)> {
    let question = row.attrs.get("asked").and_then(Value::as_str)?;
    Some((question, row.references.first()?))
}

/// Pairs of the answers of two runs to the same questions, in the order of the first. Questions that one of them has
/// not, or that failed, are left out.
pub fn pairs(model: &[Prediction], baseline: &[Prediction]) -> Vec<Pair> {
    let good = |rows: &'_ [Prediction]| -> Vec<Prediction> {
        rows.iter().filter(|r| r.error.is_none()).cloned().collect()
    };
    let other = good(baseline);
    let mut found = Vec::new();
    for row in good(model) {
        let Some((question, reference)) = asked(&row) else {
            continue;
        };
        if let Some(same) = other.iter().find(|o| asked(o) == asked(&row)) {
            found.push(Pair {
                question: question.into(),
                reference: reference.into(),
                model: row.text.clone(),
                baseline: same.text.clone(),
            });
        }
    }
    found
}

/// The same against a published file of predictions (lines with `query`, `gt` and a `<name>_pred`).
///
/// # Errors
/// Lines without these fields.
pub fn pairs_with_file(model: &[Prediction], baseline: &[DataRow]) -> Result<Vec<Pair>> {
    let rows: Vec<DataRow> = model
        .iter()
        .filter(|row| row.error.is_none())
        .filter_map(|row| {
            let (question, reference) = asked(row)?;
            let line =
                serde_json::json!({ "query": question, "gt": reference, "run_pred": row.text });
            Some(DataRow {
                path: "the run".into(),
                line: row.index + 1,
                text: line.to_string(),
            })
        })
        .collect();
    super::judge::join(&rows, baseline)
}
