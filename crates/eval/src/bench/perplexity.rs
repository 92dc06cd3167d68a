//! Long-document perplexity as a task (paper 58): `perplexity` reads each document once and reports
//! by position; `perplexity/sliding` compares window lengths on the same tokens.

use super::{attr, texts};
use crate::error::{EvalError, Result};
use crate::ppl;
use crate::stats::Estimate;
use crate::task::*;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Tokens between windows: the published 256.
pub const STRIDE: usize = 256;

const SHIPPED: [&str; 5] = [
    include_str!("../../../../tests/fixtures/perplexity/doc0.txt"),
    include_str!("../../../../tests/fixtures/perplexity/doc1.txt"),
    include_str!("../../../../tests/fixtures/perplexity/doc2.txt"),
    include_str!("../../../../tests/fixtures/perplexity/doc3.txt"),
    include_str!("../../../../tests/fixtures/perplexity/doc4.txt"),
];

/// See the module's text.
pub struct Perplexity {
    meta: TaskMeta,
    sliding: bool,
}

/// `perplexity` and `perplexity/sliding`.
pub fn tasks() -> Vec<Arc<dyn Task>> {
    [false, true]
        .into_iter()
        .map(|sliding| {
            Arc::new(Perplexity {
                meta: TaskMeta {
                    id: if sliding { "perplexity/sliding" } else { "perplexity" }.into(),
                    version: 1,
                    ability: if sliding {
                        "next-token loss by window length"
                    } else {
                        "next-token loss by position"
                    },
                    metric: "perplexity",
                    higher_is_better: false,
                    best: 1.0,
                    floor: crate::target::CONSTANT_SYMBOLS,
                    unit: Unit::Tokens,
                    lengths: if sliding { &[256, 512, 1024, 2048] } else { &[2048] },
                    depths: false,
                    source: "arXiv 2108.12409, 2306.15595, 2309.17453; documents made for this program",
                    licence: "generated",
                },
                sliding,
            }) as Arc<dyn Task>
        })
        .collect()
}

impl Task for Perplexity {
    fn meta(&self) -> &TaskMeta {
        &self.meta
    }

    fn samples(&self, cx: &SampleCx<'_>) -> Result<Vec<Sample>> {
        let documents = match cx.data {
            Some(path) => texts(path)?,
            None => SHIPPED
                .iter()
                .enumerate()
                .map(|(at, text)| (format!("doc{at}"), text.to_string()))
                .collect(),
        };
        let tokens = if self.sliding { cx.longest } else { cx.length };
        let protocol = if self.sliding {
            Protocol::Sliding {
                window: cx.length,
                stride: STRIDE.min(cx.length),
            }
        } else {
            Protocol::Position
        };
        if cx.length < 2 {
            return Err(EvalError::Input(format!(
                "{}: length is {}, expected at least 2",
                self.meta.id, cx.length
            )));
        }
        let mut all = Vec::new();
        let mut short = 0;
        for (name, text) in &documents {
            if cx.counter.count(text)? < tokens {
                short += 1;
                continue;
            }
            let mut sample = Sample::new(
                Prompt {
                    segments: vec![Segment::Shared(text.as_str().into())],
                    raw: true,
                    ..Prompt::default()
                },
                Work::Likelihood { protocol, tokens },
                Vec::new(),
                BTreeMap::from([attr("document", name.clone())]),
                String::new(),
            );
            sample.cluster = name.clone();
            all.push(sample);
            if all.len() == cx.samples {
                break;
            }
        }
        if all.is_empty() {
            return Err(EvalError::Input(format!(
                "{}: all {short} documents have fewer than {tokens} tokens; give longer ones with --data or shorter lengths",
                self.meta.id
            )));
        }
        Ok(all)
    }

    /// The document's own perplexity; a cell's figure is not their mean, see `aggregate`.
    fn score(&self, row: &Prediction) -> Scored {
        let Some(likelihood) = &row.likelihood else {
            return Scored::new(row, f64::NAN, None);
        };
        let figures = ppl::figures(&[likelihood]);
        let mut scored = Scored::new(
            row,
            figures.ppl.value,
            Some(format!("{:.4}", figures.nll.value)),
        );
        scored.more.insert("nll".into(), figures.nll.value);
        scored
    }

    fn aggregate(&self, rows: &[Prediction], _scored: &[Scored]) -> Vec<Aggregate> {
        let documents: Vec<&Likelihood> = rows
            .iter()
            .filter_map(|row| row.likelihood.as_ref())
            .collect();
        let figures = ppl::figures(&documents);
        let figure = |name: &str, estimate| Aggregate {
            name: name.into(),
            estimate,
        };
        let exact = |name: &str, value| figure(name, Estimate::exact(value, figures.tokens));
        let mut all = vec![
            figure("perplexity", figures.ppl),
            figure("nll (nats)", figures.nll),
            exact("mean of documents", figures.document_ppl),
            exact("bits per byte", figures.bits_per_byte),
            exact("perplexity per word", figures.word_ppl),
            exact("bos", f64::from(u8::from(documents.iter().any(|d| d.bos)))),
        ];
        if !self.sliding {
            for (from, to, nll, count) in ppl::by_position(&documents) {
                all.push(figure(
                    &format!("nll at {}-{to}", from + 1),
                    Estimate::exact(nll, count),
                ));
            }
        }
        all
    }
}
