//! Long-document perplexity as a task (paper 58): `perplexity` reads each document once and reports by position; the
//! windowed protocols compare window lengths: `sliding` and `disjoint` on the same tokens, `fixed` with equal contexts,
//! `recent` on the same last tokens after more and more text.

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

/// The documents that ship with the program.
pub(crate) fn shipped() -> impl Iterator<Item = &'static str> {
    SHIPPED.into_iter()
}

/// Tokens that `perplexity/recent` scores at the end of each text.
pub const RECENT: usize = 256;

/// Which protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// P4, P5.
    Position,
    /// P2.
    Sliding,
    /// P1.
    Disjoint,
    /// P3.
    Fixed,
    /// P6.
    Recent,
}

/// See the module's text.
pub struct Perplexity {
    meta: TaskMeta,
    kind: Kind,
}

/// `perplexity`, and one task for each windowed protocol.
pub fn tasks() -> Vec<Arc<dyn Task>> {
    let all: [(Kind, &str, u32, &'static str, &'static [usize]); 5] = [
        (
            Kind::Position,
            "perplexity",
            1,
            "next-token loss by position",
            &[2048],
        ),
        (
            Kind::Sliding,
            "perplexity/sliding",
            2,
            "next-token loss by window length",
            &[256, 512, 1024, 2048],
        ),
        (
            Kind::Disjoint,
            "perplexity/disjoint",
            1,
            "next-token loss in windows side by side",
            &[2048],
        ),
        (
            Kind::Fixed,
            "perplexity/fixed",
            1,
            "next-token loss after equally many tokens",
            &[256],
        ),
        (
            Kind::Recent,
            "perplexity/recent",
            1,
            "loss of the same last tokens by context length",
            &[256, 512, 1024, 2048],
        ),
    ];
    all.into_iter()
        .map(|(kind, id, version, ability, lengths)| {
            Arc::new(Perplexity {
                meta: TaskMeta {
                    id: id.into(),
                    version,
                    ability,
                    metric: "perplexity",
                    higher_is_better: false,
                    best: 1.0,
                    floor: crate::target::CONSTANT_SYMBOLS,
                    unit: Unit::Tokens,
                    lengths,
                    depths: false,
                    source: "arXiv 2108.12409, 2306.15595, 2309.17453; documents made for this program",
                    licence: "generated",
                },
                kind,
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
        let (window, longest) = (cx.length, cx.longest);
        let stride = match self.kind {
            Kind::Disjoint => window,
            _ => STRIDE.min(window),
        };
        // All lengths of a sweep read the same tokens.
        let (protocol, tokens) = match self.kind {
            Kind::Position => (Protocol::Position, window),
            Kind::Sliding | Kind::Disjoint => (Protocol::Sliding { window, stride }, longest),
            Kind::Fixed => (Protocol::Fixed { window }, 2 * longest),
            Kind::Recent => (
                Protocol::Recent {
                    context: window,
                    scored: RECENT,
                },
                longest + RECENT,
            ),
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
                match self.kind {
                    Kind::Sliding | Kind::Disjoint => BTreeMap::from([
                        attr("document", name.clone()),
                        attr("stride", stride),
                        attr("window", window),
                    ]),
                    _ => BTreeMap::from([attr("document", name.clone())]),
                },
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
        let number = |name: &str| {
            let value = rows.first()?.attrs.get(name)?.as_u64()?;
            usize::try_from(value).ok()
        };
        if let Some((window, stride)) = number("window").zip(number("stride"))
            && let Some(value) = ppl::of_window_means(&documents, window, stride)
        {
            all.push(exact("perplexity of window means (hf)", value));
        }
        if self.kind == Kind::Position {
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
