//! L-Eval (paper 19, arXiv 2307.11088): 20 tasks over long documents; exams by exact match, open questions by F1 and
//! ROUGE with the wanted length told to the model, and a pairwise judge. For assistants on long documents, without a
//! bonus for long answers. Data of the published form; the prompts are this program's own.

pub mod judge;
pub mod judged;
pub mod process;

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use serde::Deserialize;
use serde_json::Value;

use super::attr;
use super::dataset::{Shipped, source};
use crate::count::Counter;
use crate::error::Result;
use crate::metric::exact_match;
use crate::metric::qa_f1::qa_f1;
use crate::metric::rouge::google_rouge;
use crate::python::text::split;
use crate::stats::Estimate;
use crate::task::*;
use process::Kind;

/// Most new tokens of an answer, and tokens kept free for it.
const MAX_NEW: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Score {
    Closed(Kind),
    F1,
    Rouge,
}

struct Info {
    name: &'static str,
    ability: &'static str,
    score: Score,
}

impl Info {
    /// Where its rows may be.
    fn files(&self) -> [String; 3] {
        let folder = match self.score {
            Score::Closed(_) => "Closed-ended-tasks",
            _ => "Open-ended-tasks",
        };
        [
            format!("{folder}/{}.jsonl", self.name),
            format!("LEval/{folder}/{}.jsonl", self.name),
            format!("{}.jsonl", self.name),
        ]
    }
}

const fn closed(name: &'static str, ability: &'static str, kind: Kind) -> Info {
    Info {
        name,
        ability,
        score: Score::Closed(kind),
    }
}

const fn f1(name: &'static str) -> Info {
    Info {
        name,
        ability: "open questions",
        score: Score::F1,
    }
}

const fn rouge(name: &'static str) -> Info {
    Info {
        name,
        ability: "summaries",
        score: Score::Rouge,
    }
}

const ONE: Kind = Kind::Letters { several: false };

static INFO: [Info; 20] = [
    closed(
        "coursera",
        "multiple choice, several right",
        Kind::Letters { several: true },
    ),
    closed("quality", "multiple choice", ONE),
    closed("tpo", "multiple choice", ONE),
    closed("gsm100", "arithmetic from 16 examples", Kind::Number),
    closed("codeU", "output of code", Kind::Code),
    closed(
        "sci_fi",
        "loyalty to a document, and truth",
        Kind::TrueFalse,
    ),
    closed(
        "topic_retrieval_longchat",
        "topics of a conversation",
        Kind::Plain,
    ),
    f1("financial_qa"),
    f1("legal_contract_qa"),
    f1("multidoc_qa"),
    f1("natural_question"),
    f1("narrative_qa"),
    f1("scientific_qa"),
    rouge("gov_report_summ"),
    rouge("meeting_summ"),
    rouge("news_summ"),
    rouge("paper_assistant"),
    rouge("patent_summ"),
    rouge("review_summ"),
    rouge("tv_show_summ"),
];

/// A published row: one document and its questions.
#[derive(Clone, Debug, Deserialize)]
pub struct Row {
    pub instructions: Vec<String>,
    pub outputs: Vec<String>,
    /// The document; the examples of gsm100; the conversation of topic retrieval.
    pub input: String,
    /// exam, f1, rouge, LLM or human.
    pub evaluation: String,
}

impl Row {
    /// Whether its answers are for a judge.
    fn judged(&self) -> bool {
        matches!(self.evaluation.as_str(), "LLM" | "human")
    }
}

static TEMPLATES: LazyLock<BTreeMap<String, String>> = LazyLock::new(|| {
    serde_json::from_str(include_str!("templates.json"))
        .expect("a table that ships with the program")
});

fn template(name: &str) -> &'static str {
    TEMPLATES.get(name).map_or("", String::as_str)
}

fn template_of_judge() -> &'static str {
    template("judge")
}

macro_rules! shipped {
    ($($name:literal),*) => {
        &[$((
            concat!($name, ".jsonl"),
            include_str!(concat!("../../../../../tests/fixtures/l-eval/", $name, ".jsonl")),
        )),*]
    };
}

const SHIPPED: Shipped = shipped!(
    "Closed-ended-tasks/coursera",
    "Closed-ended-tasks/quality",
    "Closed-ended-tasks/tpo",
    "Closed-ended-tasks/gsm100",
    "Closed-ended-tasks/codeU",
    "Closed-ended-tasks/sci_fi",
    "Closed-ended-tasks/topic_retrieval_longchat",
    "Open-ended-tasks/financial_qa",
    "Open-ended-tasks/legal_contract_qa",
    "Open-ended-tasks/multidoc_qa",
    "Open-ended-tasks/natural_question",
    "Open-ended-tasks/narrative_qa",
    "Open-ended-tasks/scientific_qa",
    "Open-ended-tasks/gov_report_summ",
    "Open-ended-tasks/meeting_summ",
    "Open-ended-tasks/news_summ",
    "Open-ended-tasks/paper_assistant",
    "Open-ended-tasks/patent_summ",
    "Open-ended-tasks/review_summ",
    "Open-ended-tasks/tv_show_summ"
);

struct Leval {
    meta: TaskMeta,
    info: &'static Info,
}

/// The twenty tasks.
pub fn tasks() -> Vec<Arc<dyn Task>> {
    INFO.iter()
        .map(|info| -> Arc<dyn Task> {
            let metric = match info.score {
                Score::Closed(_) => "exact match",
                Score::F1 => "f1",
                Score::Rouge => "rouge_l",
            };
            Arc::new(Leval {
                meta: TaskMeta {
                    id: format!("leval/{}", info.name),
                    version: 1,
                    ability: info.ability,
                    metric,
                    higher_is_better: true,
                    best: 1.0,
                    // The published rules read the letter A out of any text without letters.
                    floor: match info.score {
                        Score::Closed(Kind::Letters { .. }) => 0.5,
                        _ => 0.0,
                    },
                    unit: Unit::Tokens,
                    lengths: &[16384],
                    depths: false,
                    source: "arXiv 2307.11088; data L4NLP/LEval",
                    licence: "CC BY 4.0 and others, by source; prompts are this program's own",
                },
                info,
            })
        })
        .collect()
}

/// The published truncation: while the document has more than `budget` tokens, its first `budget - n` words (the last
/// ones of code), n = 0, 250, 500, ...; only the document is cut. Returns whether it was.
///
/// # Errors
/// Text the counter cannot take.
pub fn truncate(
    document: &str,
    budget: usize,
    keep_end: bool,
    counter: &dyn Counter,
) -> Result<(String, bool)> {
    if counter.count(document)? <= budget {
        return Ok((document.into(), false));
    }
    let words: Vec<&str> = document.split(' ').collect();
    let mut left_out = 0;
    loop {
        let keep = budget.saturating_sub(left_out).min(words.len());
        let kept = if keep_end {
            &words[words.len() - keep..]
        } else {
            &words[..keep]
        };
        let text = kept.join(" ");
        if keep == 0 || counter.count(&text)? <= budget {
            return Ok((text, true));
        }
        left_out += 250;
    }
}

/// What a question's prompt is made of.
struct Parts {
    head: String,
    question: String,
    prefix: &'static str,
}

fn parts(info: &Info, question: &str, gold: &str) -> Parts {
    let system = template(match (info.name, info.score) {
        ("gsm100", _) => "system_gsm",
        ("topic_retrieval_longchat", _) => "system_topic",
        ("coursera", _) => "system_coursera",
        ("codeU", _) => "system_code",
        ("sci_fi", _) => "system_sci_fi",
        (_, Score::Closed(_)) => "system_exam",
        _ => "system_open",
    });
    match info.score {
        Score::Closed(Kind::Number | Kind::Code | Kind::Plain) => Parts {
            head: format!("{system}\n\n"),
            question: format!("\n\n{question}"),
            prefix: "",
        },
        Score::Closed(_) => Parts {
            head: format!("{system}\n\n{}\n", template("document_is")),
            question: format!(" \nQuestion: {question}{}", template("bare_answer")),
            prefix: "\nAnswer:",
        },
        Score::F1 | Score::Rouge => Parts {
            head: format!("{system}\n\n{}\n", template("document_is")),
            question: format!(
                "\n\n{question}\nAnswer this question with {} words.",
                split(gold).count()
            ),
            prefix: "",
        },
    }
}

/// sci_fi's second question, about the real world, without the document.
fn worldly(question: &str) -> String {
    const BASED: &str = "based on the world described in the document.";
    question.replace(BASED, template("real_world"))
}

impl Leval {
    fn sample(
        &self,
        prompt: Prompt,
        gold: &str,
        oracle: String,
        cluster: &str,
        extra: Vec<(String, Value)>,
    ) -> Sample {
        let mut sample = Sample::new(
            prompt,
            Work::Generate(Decode {
                max_new: MAX_NEW,
                stop: Vec::new(),
            }),
            vec![gold.into()],
            extra.into_iter().collect(),
            oracle,
        );
        sample.cluster = cluster.into();
        sample
    }
}

impl Task for Leval {
    fn meta(&self) -> &TaskMeta {
        &self.meta
    }

    fn needs_data(&self) -> bool {
        true
    }

    fn samples(&self, cx: &SampleCx<'_>) -> Result<Vec<Sample>> {
        let info = self.info;
        let data = source(cx, "leval", SHIPPED)?;
        let names = info.files();
        let budget = cx.length.saturating_sub(MAX_NEW);
        let mut samples = Vec::new();
        let mut question_index = 0;
        for row in data.rows(&names)? {
            let parsed: Row = row.parse()?;
            if parsed.instructions.len() != parsed.outputs.len() {
                return Err(row.wrong(format!(
                    "found {} instructions and {} outputs, expected as many",
                    parsed.instructions.len(),
                    parsed.outputs.len()
                )));
            }
            let (document, cut) =
                truncate(&parsed.input, budget, info.name == "codeU", cx.counter)?;
            let cluster = blake3::hash(parsed.input.as_bytes()).to_hex()[..8].to_string();
            for (question, gold) in parsed.instructions.iter().zip(&parsed.outputs) {
                let index = question_index;
                question_index += 1;
                // Questions for judges are no part of n-gram scores.
                if parsed.judged() && !matches!(info.score, Score::Closed(_)) {
                    continue;
                }
                if index >= cx.samples {
                    return Ok(samples);
                }
                let parts = parts(info, question, gold);
                let prompt = Prompt::ask(format!("{}{document}", parts.head), parts.question);
                let prompt = match parts.prefix {
                    "" => prompt,
                    prefix => prompt.prefixed(prefix),
                };
                let mut attrs = vec![attr("question", index), attr("document_cut", cut)];
                if info.name == "topic_retrieval_longchat" {
                    attrs.push(attr("position", index % 3));
                }
                if info.score == Score::Closed(Kind::TrueFalse) {
                    let (loyalty, fact) = process::true_false(gold);
                    let mut first = attrs.clone();
                    first.push(attr("about", "document"));
                    samples.push(self.sample(prompt, gold, loyalty.into(), &cluster, first));
                    attrs.push(attr("about", "world"));
                    let prompt = Prompt {
                        segments: vec![
                            Segment::Unique(format!("Question: {}", worldly(question))),
                            Segment::AnswerPrefix(parts.prefix.into()),
                        ],
                        ..Prompt::default()
                    };
                    samples.push(self.sample(prompt, gold, fact.into(), &cluster, attrs));
                    continue;
                }
                let oracle = match info.score {
                    Score::Closed(Kind::Code) => format!("the final output {gold}"),
                    Score::Closed(Kind::Letters { .. }) => {
                        process::process(Kind::Letters { several: true }, gold, gold).1
                    }
                    _ => gold.clone(),
                };
                samples.push(self.sample(prompt, gold, oracle, &cluster, attrs));
            }
        }
        Ok(samples)
    }

    fn score(&self, row: &Prediction) -> Scored {
        let gold = row.references.first().map_or("", String::as_str);
        match self.info.score {
            Score::Closed(Kind::TrueFalse) => {
                // Each reply is one half of the published "first [fact: second]" prediction.
                let world = row.attrs.get("about").is_some_and(|v| v == "world");
                let expected = process::true_false(gold);
                let (reply, expected) = if world {
                    let joined = format!("[fact: {}]", row.text);
                    (process::true_false(&joined).1, expected.1)
                } else {
                    (process::true_false(&row.text).0, expected.0)
                };
                let value = exact_match::leval(reply, expected);
                let extracted = (reply != "<error>").then(|| reply.to_string());
                Scored::new(row, value, extracted)
            }
            Score::Closed(kind) => {
                let (prediction, gold) = process::process(kind, &row.text, gold);
                Scored::new(
                    row,
                    exact_match::leval(&prediction, &gold),
                    Some(prediction),
                )
            }
            Score::F1 => Scored::new(row, qa_f1(&row.text, gold), Some(row.text.clone())),
            Score::Rouge => {
                let rouge = google_rouge(&row.text, gold);
                let mut scored = Scored::new(row, rouge.rouge_l, Some(row.text.clone()));
                scored.more.insert("rouge1".into(), rouge.rouge1);
                scored.more.insert("rouge2".into(), rouge.rouge2);
                scored
            }
        }
    }

    fn aggregate(&self, rows: &[Prediction], scored: &[Scored]) -> Vec<Aggregate> {
        let mut all = mean_aggregates(self.meta.metric, scored);
        let values: BTreeMap<&str, &Scored> = scored.iter().map(|s| (s.id.as_str(), s)).collect();
        let mut group = |name: String, field: &str, value: Value| {
            let of_group: Vec<(&str, f64)> = rows
                .iter()
                .filter(|row| row.attrs.get(field) == Some(&value))
                .filter_map(|row| values.get(row.id.as_str()))
                .map(|s| (s.cluster.as_str(), s.value))
                .collect();
            if !of_group.is_empty() {
                all.push(Aggregate {
                    name,
                    estimate: crate::stats::mean(&of_group),
                });
            }
        };
        match self.info.name {
            "sci_fi" => {
                group("loyalty".into(), "about", "document".into());
                group("fact".into(), "about", "world".into());
            }
            "topic_retrieval_longchat" => {
                for position in 0..3 {
                    group(
                        format!("position {}", position + 1),
                        "position",
                        position.into(),
                    );
                }
            }
            _ => {}
        }
        if self.info.score == Score::Rouge && !scored.is_empty() {
            let n = scored.len() as f64;
            let more = |key: &str| scored.iter().filter_map(|s| s.more.get(key)).sum::<f64>() / n;
            let longest = scored.iter().map(|s| s.value).sum::<f64>() / n;
            all.push(Aggregate {
                name: "geometric mean".into(),
                estimate: Estimate::exact(
                    geometric_mean(more("rouge1"), more("rouge2"), longest),
                    scored.len(),
                ),
            });
        }
        all
    }
}

/// The geometric mean of three mean ROUGE scores.
pub fn geometric_mean(rouge1: f64, rouge2: f64, rouge_l: f64) -> f64 {
    (rouge1 * rouge2 * rouge_l).powf(1.0 / 3.0)
}
