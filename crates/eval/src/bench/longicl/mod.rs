//! LongICLBench (paper 34, arXiv 2404.02060): classification with up to 174 classes, learnt from one to five rounds of
//! demonstrations in the prompt. For finding out whether a model, or a context policy, uses all of a long prompt.
//! Prompts are plain text without a chat template, and answers are written greedily; the published API calls sample.

pub mod extract;
pub mod prompt;
pub mod select;

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use serde_json::{Value, json};

use super::attr;
use super::dataset::{Row, Shipped, source};
use crate::error::Result;
use crate::metric::micro_f1::Counts;
use crate::stats::Estimate;
use crate::task::*;
use prompt::{Example, Pairs, Relation};

/// Most new tokens of an answer.
const MAX_NEW: usize = 100;
/// TacRED's test examples of one label.
const TACRED_TEST: usize = 20;
/// DialogRE's scoring stops after this many gold labels.
const DIALOGRE_LABELS: usize = 500;

/// The six data sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataSet {
    Banking77,
    GoEmotions,
    Tacred,
    FewNerd,
    DialogRe,
    Discovery,
}

/// How demonstrations stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Round by round.
    Plain,
    /// The same demonstrations, those of one label together, labels in alphabetical order.
    Grouped,
    /// Round by round, after a list of all labels.
    Instruct,
}

impl DataSet {
    /// In order of difficulty.
    pub const ALL: [DataSet; 6] = [
        DataSet::GoEmotions,
        DataSet::Banking77,
        DataSet::Tacred,
        DataSet::FewNerd,
        DataSet::DialogRe,
        DataSet::Discovery,
    ];

    /// Its name, also of its folder.
    pub fn name(self) -> &'static str {
        match self {
            DataSet::Banking77 => "banking77",
            DataSet::GoEmotions => "goemotions",
            DataSet::Tacred => "tacred",
            DataSet::FewNerd => "fewnerd",
            DataSet::DialogRe => "dialogre",
            DataSet::Discovery => "discovery",
        }
    }

    fn ability(self) -> &'static str {
        match self {
            DataSet::Banking77 => "intents",
            DataSet::GoEmotions => "emotions",
            DataSet::Tacred => "relations in sentences",
            DataSet::FewNerd => "entities",
            DataSet::DialogRe => "relations in dialogues",
            DataSet::Discovery => "connectives",
        }
    }

    fn metric(self) -> &'static str {
        match self {
            DataSet::Banking77 | DataSet::GoEmotions | DataSet::Discovery => "accuracy",
            _ => "micro F1",
        }
    }

    /// Its published labels, in order; none for Few-NERD.
    pub fn labels(self) -> &'static [String] {
        static LABELS: LazyLock<BTreeMap<String, Vec<String>>> = LazyLock::new(|| {
            serde_json::from_str(include_str!("labels.json"))
                .expect("a table that ships with the program")
        });
        let name = match self {
            DataSet::GoEmotions => "goemotion",
            other => other.name(),
        };
        LABELS.get(name).map_or(&[], Vec::as_slice)
    }
}

macro_rules! shipped {
    ($($name:literal),*) => {
        &[$((
            $name,
            include_str!(concat!("../../../../../tests/fixtures/longiclbench/", $name)),
        )),*]
    };
}

const SHIPPED: Shipped = shipped!(
    "banking77/train.jsonl",
    "banking77/test.jsonl",
    "banking77/labels.json",
    "goemotions/train.jsonl",
    "goemotions/test.jsonl",
    "discovery/train.jsonl",
    "discovery/test.jsonl",
    "tacred/train.json",
    "tacred/test.json",
    "fewnerd/train.json",
    "fewnerd/test.json",
    "dialogre/train.json",
    "dialogre/test.json"
);

struct LongIcl {
    meta: TaskMeta,
    set: DataSet,
    variant: Variant,
}

/// One task a data set, and their grouped and instructed forms.
pub fn tasks() -> Vec<Arc<dyn Task>> {
    let mut all: Vec<Arc<dyn Task>> = Vec::new();
    for (prefix, variant) in [
        ("longicl", Variant::Plain),
        ("longicl-grouped", Variant::Grouped),
        ("longicl-instruct", Variant::Instruct),
    ] {
        for set in DataSet::ALL {
            // Few-NERD and DialogRE have sentences with several labels, and no published list in the prompt.
            let single = !matches!(set, DataSet::FewNerd | DataSet::DialogRe);
            if variant != Variant::Plain && !single {
                continue;
            }
            all.push(Arc::new(LongIcl {
                meta: TaskMeta {
                    id: format!("{prefix}/{}", set.name()),
                    version: 1,
                    ability: set.ability(),
                    metric: set.metric(),
                    higher_is_better: true,
                    // Micro F1 has 1e-8 below its lines.
                    best: match set.metric() {
                        "accuracy" => 1.0,
                        _ => 0.999_999_9,
                    },
                    floor: 0.0,
                    unit: Unit::Rounds,
                    lengths: &[1, 2, 3, 4, 5],
                    depths: false,
                    source: "arXiv 2404.02060; data TIGER-AI-Lab/LongICLBench and the hub",
                    licence: "MIT (prompts); each data set has its own",
                },
                set,
                variant,
            }));
        }
    }
    all
}

/// A data set's demonstrations and test examples.
struct Read {
    train: Vec<Example>,
    test: Vec<Example>,
    labels: Vec<String>,
}

impl LongIcl {
    fn read(&self, cx: &SampleCx<'_>) -> Result<Read> {
        let data = source(cx, "longicl", SHIPPED)?;
        let name = self.set.name();
        let files = |part: &str| -> Vec<String> {
            ["jsonl", "json"]
                .iter()
                .flat_map(|end| [format!("{name}/{part}.{end}"), format!("{part}.{end}")])
                .collect()
        };
        let own = [format!("{name}/labels.json")];
        let labels =
            if data.has(&own) && !matches!(data, super::dataset::Source::Path(p) if p.is_file()) {
                data.rows(&own)?
                    .iter()
                    .map(Row::parse)
                    .collect::<Result<Vec<String>>>()?
            } else {
                self.set.labels().to_vec()
            };
        let parse = |part: &str| -> Result<Vec<Example>> {
            let rows = data.rows(&files(part))?;
            rows.iter()
                .map(|row| prompt::parse(self.set, row, &labels))
                .collect()
        };
        Ok(Read {
            train: parse("train")?,
            test: parse("test")?,
            labels,
        })
    }

    /// Demonstrations of a number of rounds, in order.
    fn demonstrations(&self, read: &Read, rounds: usize) -> Vec<Example> {
        let prefix = |sizes: [usize; 5]| sizes[rounds.clamp(1, 5) - 1].min(read.train.len());
        let chosen: Vec<Example> = match self.set {
            DataSet::FewNerd => read.train[..prefix([57, 114, 170, 224, 281])].to_vec(),
            DataSet::DialogRe => {
                return merge_dialogues(&read.train[..prefix([34, 67, 99, 131, 163])]);
            }
            DataSet::Tacred => {
                let labels: Vec<&str> = read.train.iter().map(Example::first_label).collect();
                let picked = select::tacred_rounds(&labels, &read.labels, rounds);
                picked.into_iter().map(|i| read.train[i].clone()).collect()
            }
            _ => {
                let labels: Vec<Vec<&str>> = read.train.iter().map(Example::labels).collect();
                let picked = select::round_robin_single_label(&labels, rounds);
                picked.into_iter().map(|i| read.train[i].clone()).collect()
            }
        };
        if self.variant == Variant::Grouped {
            let mut grouped = chosen;
            grouped.sort_by(|a, b| a.first_label().cmp(b.first_label()));
            return grouped;
        }
        chosen
    }

    fn test<'r>(&self, read: &'r Read, most: usize) -> Vec<&'r Example> {
        let picked: Vec<usize> = match self.set {
            DataSet::FewNerd | DataSet::DialogRe => (0..read.test.len()).collect(),
            DataSet::Tacred => {
                let labels: Vec<&str> = read.test.iter().map(Example::first_label).collect();
                select::tacred_test(&labels, &read.labels, TACRED_TEST)
            }
            set => {
                let rounds = match set {
                    DataSet::GoEmotions => 25,
                    DataSet::Banking77 => 7,
                    _ => 4,
                };
                let labels: Vec<Vec<&str>> = read.test.iter().map(Example::labels).collect();
                select::round_robin_single_label(&labels, rounds)
            }
        };
        picked
            .into_iter()
            .take(most)
            .map(|i| &read.test[i])
            .collect()
    }
}

/// Rows of one dialogue become one demonstration, in order of first appearance.
fn merge_dialogues(rows: &[Example]) -> Vec<Example> {
    let mut merged: Vec<Example> = Vec::new();
    for row in rows {
        let Example::Dialogue {
            dialogue,
            relations,
        } = row
        else {
            continue;
        };
        let same = merged.iter_mut().find_map(|m| match m {
            Example::Dialogue {
                dialogue: d,
                relations,
            } if d == dialogue => Some(relations),
            _ => None,
        });
        match same {
            Some(list) => list.extend(relations.iter().cloned()),
            None => merged.push(row.clone()),
        }
    }
    merged
}

impl Task for LongIcl {
    fn meta(&self) -> &TaskMeta {
        &self.meta
    }

    fn needs_data(&self) -> bool {
        true
    }

    fn samples(&self, cx: &SampleCx<'_>) -> Result<Vec<Sample>> {
        let read = self.read(cx)?;
        let demonstrations = self.demonstrations(&read, cx.length);
        let list = (self.variant == Variant::Instruct).then_some(read.labels.as_slice());
        let head = prompt::head(self.set, &demonstrations, list);
        let shared: Arc<str> = head.into();
        let order: Vec<&str> = demonstrations.iter().map(Example::first_label).collect();
        let positions = select::positions(&order);
        let mut samples = Vec::new();
        for (index, example) in self.test(&read, cx.samples).into_iter().enumerate() {
            let mut attrs = BTreeMap::from([
                attr("row", index),
                attr("demonstrations", demonstrations.len()),
                attr("query", example.query_text()),
            ]);
            let (references, oracle) = example.answer();
            match example {
                Example::Dialogue { relations, .. } => {
                    attrs.extend([attr("pairs", relations.len())]);
                }
                Example::Entities { .. } => {}
                _ => {
                    let at = positions.get(example.first_label());
                    attrs.extend([attr(
                        "label_positions",
                        json!(at.cloned().unwrap_or_default()),
                    )]);
                }
            }
            let mut sample = Sample::new(
                Prompt {
                    segments: vec![
                        Segment::Shared(Arc::clone(&shared)),
                        Segment::Unique(example.stub()),
                    ],
                    raw: true,
                    ..Prompt::default()
                },
                Work::Generate(Decode {
                    max_new: MAX_NEW,
                    stop: Vec::new(),
                }),
                references,
                attrs,
                oracle,
            );
            // The demonstrations are the same for all; the queries are what was drawn.
            sample.cluster = sample.id.clone();
            samples.push(sample);
        }
        Ok(samples)
    }

    fn score(&self, row: &Prediction) -> Scored {
        let query = row.attrs.get("query").and_then(Value::as_str).unwrap_or("");
        let gold = row.references.first().map_or("", String::as_str);
        let counted = |counts: Counts, extracted: String| {
            let mut scored = Scored::new(row, counts.f1_plain(), Some(extracted));
            scored.more = BTreeMap::from([
                ("predicted".to_string(), counts.predicted as f64),
                ("gold".to_string(), counts.gold as f64),
                ("correct".to_string(), counts.correct as f64),
            ]);
            scored
        };
        match self.set {
            DataSet::Banking77 | DataSet::GoEmotions | DataSet::Discovery => {
                let found = extract::label(self.set, &row.text, query);
                let gold = match self.set {
                    DataSet::Discovery => extract::discovery_label(gold),
                    _ => gold.to_lowercase(),
                };
                Scored::new(row, f64::from(u8::from(found == gold)), Some(found))
            }
            DataSet::Tacred => {
                let found = extract::label(self.set, &row.text, query);
                let counts = Counts {
                    predicted: usize::from(self.set.labels().contains(&found)),
                    gold: 1,
                    correct: usize::from(found == gold),
                };
                counted(counts, found)
            }
            DataSet::FewNerd => {
                let found = extract::entities(&row.text, query);
                let gold: Pairs = serde_json::from_str(gold).unwrap_or_default();
                let lines: Vec<String> = found.iter().map(|(e, k)| format!("{e}: {k}")).collect();
                counted(extract::entity_counts(&found, &gold.0), lines.join("\n"))
            }
            DataSet::DialogRe => {
                let pairs = row.references.len();
                let found = extract::relations(&row.text, query, pairs);
                let gold: Vec<&str> = row.references.iter().map(String::as_str).collect();
                let counts = extract::relation_counts(&found, &gold, self.set.labels());
                counted(counts, found)
            }
        }
    }

    fn aggregate(&self, rows: &[Prediction], scored: &[Scored]) -> Vec<Aggregate> {
        if self.set.metric() == "accuracy" {
            let mut all = mean_aggregates(self.meta.metric, scored);
            all.extend(bias(rows, scored));
            return all;
        }
        let order: BTreeMap<&str, usize> = rows.iter().map(|r| (r.id.as_str(), r.index)).collect();
        let mut in_order: Vec<&Scored> = scored.iter().collect();
        in_order.sort_by_key(|s| order.get(s.id.as_str()).copied().unwrap_or(usize::MAX));
        let mut total = Counts::default();
        let mut n = 0;
        for row in in_order {
            if self.set == DataSet::DialogRe && total.gold >= DIALOGRE_LABELS {
                break;
            }
            let count = |key: &str| row.more.get(key).map_or(0, |v| *v as usize);
            total += Counts {
                predicted: count("predicted"),
                gold: count("gold"),
                correct: count("correct"),
            };
            n += 1;
        }
        let value = match self.set {
            DataSet::FewNerd => total.f1_plain(),
            _ => total.f1(),
        };
        let (precision, recall) = total.precision_recall();
        [
            (self.meta.metric, value),
            ("precision", precision),
            ("recall", recall),
        ]
        .into_iter()
        .map(|(name, value)| Aggregate {
            name: name.into(),
            estimate: Estimate::exact(value, n),
        })
        .collect()
    }
}

/// Where the labels stand that a model prefers: KL divergence from an even choice, and the share of answers whose
/// demonstrations fill the last tenth of the prompt. Labels and positions are read from the rows.
fn bias(rows: &[Prediction], scored: &[Scored]) -> Vec<Aggregate> {
    let extracted: BTreeMap<&str, &str> = scored
        .iter()
        .filter_map(|s| Some((s.id.as_str(), s.extracted.as_deref()?)))
        .collect();
    let mut order: BTreeMap<u64, String> = BTreeMap::new();
    let mut queries: Vec<(String, &str)> = Vec::new();
    for row in rows {
        let gold = row.references.first().map_or("", String::as_str);
        let gold = extract::discovery_label(gold);
        let at = row.attrs.get("label_positions").and_then(Value::as_array);
        for position in at.into_iter().flatten().filter_map(Value::as_u64) {
            order.insert(position, gold.clone());
        }
        if let Some(predicted) = extracted.get(row.id.as_str()) {
            queries.push((gold, predicted));
        }
    }
    let demonstrations: Vec<&str> = order.values().map(String::as_str).collect();
    let queries: Vec<(&str, &str)> = queries.iter().map(|(g, p)| (g.as_str(), *p)).collect();
    let Some(bias) = select::position_bias(&demonstrations, &queries) else {
        return Vec::new();
    };
    [
        ("position KL", bias.kl),
        ("share of last tenth", bias.share[9]),
    ]
    .into_iter()
    .map(|(name, value)| Aggregate {
        name: name.into(),
        estimate: Estimate::exact(value, queries.len()),
    })
    .collect()
}

impl Relation {
    fn pair(&self) -> String {
        use crate::python::repr_str;
        format!("({}, {})", repr_str(&self.subject), repr_str(&self.object))
    }
}
