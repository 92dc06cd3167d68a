//! M4LE's published evaluator: what of a response counts, and the score of a row or, for BLEU, of a bucket.

use serde::Deserialize;

use crate::metric::bleu::{corpus_bleu, tokenize_13a, tokenize_zh};
use crate::metric::classification::set_f1;
use crate::metric::exact_match::{any_contained, any_equal};
use crate::metric::rouge::{RougeCompat, rouge_l, rouge_l_plain, rouge_l_plain_zh};
use crate::python::strip;

/// How a task is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// A gold answer occurs in the response.
    Acc,
    ExactMatch,
    /// Recall of ROUGE-L.
    Rouge,
    ClsF1,
    /// Corpus BLEU of a bucket.
    Bleu,
}

impl Metric {
    /// The evaluator's name.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Acc => "acc",
            Metric::ExactMatch => "exact_match",
            Metric::Rouge => "rouge",
            Metric::ClsF1 => "cls_f1",
            Metric::Bleu => "bleu",
        }
    }
}

/// Language of scoring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lang {
    En,
    Zh,
}

/// How English ROUGE is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RougeEn {
    /// The package `rouge` 1.0.1.
    #[default]
    Rouge,
    /// The plain LCS an environment gives in which `rouge_chinese` overwrote that package.
    Plain,
}

/// Choices between published behaviour and repairs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Cut the final full stop off the last gold id of the Chinese explicit-multiple sets. As published it stays, so
    /// that id cannot match.
    pub fixed: bool,
    pub rouge_en: RougeEn,
}

/// A task as the evaluator knows it.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// The name of the file on the hub.
    pub name: &'static str,
    /// The name under which the evaluator looks for outputs, where it differs.
    pub evaluator: &'static str,
    pub ability: &'static str,
    pub metric: Metric,
    pub lang: Lang,
    /// In this order, the response is cut at the first occurrence of each.
    pub end: &'static [&'static str],
}

const fn spec(
    name: &'static str,
    evaluator: &'static str,
    ability: &'static str,
    metric: Metric,
    lang: Lang,
    end: &'static [&'static str],
) -> Spec {
    Spec {
        name,
        evaluator,
        ability,
        metric,
        lang,
        end,
    }
}

const EXPLICIT_SINGLE: &str = "explicit single-span";
const EXPLICIT_MULTIPLE: &str = "explicit multiple-span";
const SEMANTIC_SINGLE: &str = "semantic single-span";
const SEMANTIC_MULTIPLE: &str = "semantic multiple-span";
const GLOBAL: &str = "global";

use Lang::{En, Zh};
use Metric::{Acc, Bleu, ClsF1, ExactMatch, Rouge};

/// All tasks. Translation pairs have a file for each direction.
#[rustfmt::skip]
pub const TASKS: [Spec; 39] = [
    spec(
        "mnds-news_explicit-single",
        "mnds-news_explicit-single_cls+ret",
        EXPLICIT_SINGLE,
        ExactMatch,
        En,
        &[],
    ),
    spec(
        "thucnews_explicit-single",
        "thucnews_explicit-single_cls+ret",
        EXPLICIT_SINGLE,
        ExactMatch,
        Zh,
        &[],
    ),
    spec("newsqa", "newsqa", EXPLICIT_SINGLE, Acc, En, &["\n", "."]),
    spec("c3", "c3", EXPLICIT_SINGLE, Acc, Zh, &["\n", "。"]),
    spec("wow", "wow", EXPLICIT_SINGLE, Acc, En, &[",", "\n"]),
    spec(
        "drcd_explicit-single",
        "drcd_explicit-single_ret",
        EXPLICIT_SINGLE,
        Acc,
        En,
        &["，", "\n"],
    ),
    spec("cnnnews", "cnnnews", EXPLICIT_SINGLE, Rouge, En, &["\n"]),
    spec("cepsum", "cepsum", EXPLICIT_SINGLE, Rouge, Zh, &["\n"]),
    spec("lcsts", "lcsts", EXPLICIT_SINGLE, Rouge, Zh, &["\n"]),
    spec("ncls", "ncls", EXPLICIT_SINGLE, Rouge, Zh, &["\n"]),
    spec(
        "mnds-news_explicit-multiple",
        "mnds-news_explicit-multiple_cls+ret",
        EXPLICIT_MULTIPLE,
        ClsF1,
        En,
        &[],
    ),
    spec(
        "thucnews_explicit-multiple",
        "thucnews_explicit-multiple_cls+ret",
        EXPLICIT_MULTIPLE,
        ClsF1,
        Zh,
        &[],
    ),
    spec("marc", "marc", EXPLICIT_MULTIPLE, ClsF1, En, &[]),
    spec(
        "online-shopping",
        "online-shopping",
        EXPLICIT_MULTIPLE,
        ClsF1,
        En,
        &[],
    ),
    spec(
        "wikitext-103",
        "wikitext-103",
        SEMANTIC_SINGLE,
        ExactMatch,
        En,
        &["."],
    ),
    spec(
        "wiki2019zh",
        "wiki2019zh",
        SEMANTIC_SINGLE,
        ExactMatch,
        Zh,
        &["。"],
    ),
    spec("duorc", "duorc", SEMANTIC_SINGLE, Acc, En, &["\n", "."]),
    spec("nq-open", "nq-open", SEMANTIC_SINGLE, Acc, En, &["\n", "."]),
    spec(
        "dureader",
        "dureader",
        SEMANTIC_SINGLE,
        Acc,
        Zh,
        &["\n", "。"],
    ),
    spec(
        "drcd_semantic-single",
        "drcd_semantic-single_qa",
        SEMANTIC_SINGLE,
        Acc,
        Zh,
        &["\n", "。"],
    ),
    spec("wikihow", "wikihow", SEMANTIC_SINGLE, Rouge, En, &["\n"]),
    spec("news2016", "news2016", SEMANTIC_SINGLE, Rouge, Zh, &["\n"]),
    spec(
        "tedtalks-en2zh",
        "tedtalks-en2zh",
        SEMANTIC_SINGLE,
        Bleu,
        Zh,
        &[],
    ),
    spec(
        "tedtalks-zh2en",
        "tedtalks-zh2en",
        SEMANTIC_SINGLE,
        Bleu,
        En,
        &[],
    ),
    spec(
        "mnds-news_semantic-multiple",
        "mnds-news_semantic-multiple_cls+cnt",
        SEMANTIC_MULTIPLE,
        ExactMatch,
        En,
        &["."],
    ),
    spec(
        "thucnews_semantic-multiple",
        "thucnews_semantic-multiple_cls+cnt",
        SEMANTIC_MULTIPLE,
        ExactMatch,
        Zh,
        &["。"],
    ),
    spec(
        "hotpotqa",
        "hotpotqa",
        SEMANTIC_MULTIPLE,
        Acc,
        En,
        &["\n", "."],
    ),
    spec(
        "bigpatent_global_cls",
        "bigpatent_global_cls",
        GLOBAL,
        Acc,
        En,
        &[":"],
    ),
    spec("triviaqa", "triviaqa", GLOBAL, Acc, En, &["\n", "."]),
    spec("arxiv", "arxiv", GLOBAL, Rouge, En, &["\n"]),
    spec("pubmed", "pubmed", GLOBAL, Rouge, En, &["\n"]),
    spec("booksum", "booksum", GLOBAL, Rouge, En, &["\n"]),
    spec(
        "bigpatent_global_sum",
        "bigpatent_global_sum",
        GLOBAL,
        Rouge,
        En,
        &["\n"],
    ),
    spec("cnewsum", "cnewsum", GLOBAL, Rouge, Zh, &["\n", "新闻"]),
    spec("clts+", "clts+", GLOBAL, Rouge, Zh, &["\n", "新闻"]),
    spec(
        "open-subtitles-en2zh",
        "open-subtitles-en2zh",
        GLOBAL,
        Bleu,
        Zh,
        &[],
    ),
    spec(
        "open-subtitles-zh2en",
        "open-subtitles-zh2en",
        GLOBAL,
        Bleu,
        En,
        &[],
    ),
    spec(
        "news-commentary-en2zh",
        "news-commentary-en2zh",
        GLOBAL,
        Bleu,
        Zh,
        &[],
    ),
    spec(
        "news-commentary-zh2en",
        "news-commentary-zh2en",
        GLOBAL,
        Bleu,
        En,
        &[],
    ),
];

/// A task by either of its names.
pub fn task(name: &str) -> Option<&'static Spec> {
    TASKS.iter().find(|t| t.name == name || t.evaluator == name)
}

/// What is compared.
#[derive(Clone, Debug, PartialEq)]
pub enum Prepared {
    Text(String, Vec<String>),
    /// Ids of the response and of the gold answer.
    Ids(Vec<String>, Vec<String>),
}

fn before<'a>(text: &'a str, mark: &str) -> &'a str {
    text.split(mark).next().unwrap_or("")
}

fn ids(text: &str, comma: &str) -> Vec<String> {
    text.split(comma).map(|id| strip(id).to_string()).collect()
}

/// Response and gold answers as the evaluator compares them.
pub fn prepare(spec: &Spec, response: &str, answers: &[String], options: Options) -> Prepared {
    let first = answers.first().map_or("", String::as_str);
    let prepared = match spec.name {
        "marc" | "mnds-news_explicit-multiple" => {
            let gold = if spec.name == "marc" {
                before(first, ".")
            } else {
                first
            };
            Prepared::Ids(ids(before(response, "."), ","), ids(gold, ","))
        }
        "online-shopping" | "thucnews_explicit-multiple" => {
            let gold = if options.fixed {
                first.trim_end_matches('。')
            } else {
                first
            };
            Prepared::Ids(ids(before(response, "。"), "，"), ids(gold, "，"))
        }
        "news2016" => {
            let inside = response.split('"').nth(1).unwrap_or(response);
            Prepared::Text(inside.into(), answers.to_vec())
        }
        "mnds-news_semantic-multiple" => Prepared::Text(
            response.into(),
            answers.iter().map(|a| before(a, ".").into()).collect(),
        ),
        "thucnews_semantic-multiple" => Prepared::Text(
            response.into(),
            answers.iter().map(|a| before(a, "。").into()).collect(),
        ),
        _ => Prepared::Text(response.into(), answers.to_vec()),
    };
    match prepared {
        Prepared::Text(mut response, answers) => {
            for mark in spec.end {
                response = strip(before(&response, mark)).to_string();
            }
            Prepared::Text(response, answers)
        }
        ids => ids,
    }
}

/// The score of one row, 0 to 1; of a BLEU task, the BLEU of a corpus of this row alone.
pub fn score_row(spec: &Spec, response: &str, answers: &[String], options: Options) -> f64 {
    match prepare(spec, response, answers, options) {
        Prepared::Ids(response, gold) => set_f1(
            response.iter().map(String::as_str),
            gold.iter().map(String::as_str),
        ),
        Prepared::Text(response, answers) => match spec.metric {
            Metric::Acc => any_contained(&response, &answers),
            Metric::ExactMatch => any_equal(&response, &answers),
            Metric::Rouge => answers
                .iter()
                .filter(|answer| !answer.is_empty())
                .map(|answer| match (spec.lang, options.rouge_en) {
                    (Lang::Zh, _) => rouge_l_plain_zh(&response, answer).recall,
                    (Lang::En, RougeEn::Plain) => rouge_l_plain(&response, answer).recall,
                    (Lang::En, RougeEn::Rouge) => {
                        rouge_l(&response, answer, RougeCompat::Unlimited).recall
                    }
                })
                .fold(0.0, f64::max),
            Metric::ClsF1 => 0.0,
            Metric::Bleu => bleu(spec.lang, &[(response, answers)]),
        },
    }
}

fn bleu(lang: Lang, rows: &[(String, Vec<String>)]) -> f64 {
    let tokens = |text: &String| match lang {
        Lang::En => tokenize_13a(text),
        Lang::Zh => tokenize_zh(text),
    };
    let rows: Vec<_> = rows
        .iter()
        .map(|(response, golds)| (tokens(response), golds.iter().map(tokens).collect()))
        .collect();
    corpus_bleu(&rows)
}

/// The score of a bucket of (response, answers) rows, 0 to 1: BLEU of the corpus, else the mean. `None` without rows.
pub fn score_bucket(spec: &Spec, rows: &[(String, Vec<String>)], options: Options) -> Option<f64> {
    if rows.is_empty() {
        return None;
    }
    if spec.metric == Metric::Bleu {
        let prepared: Vec<(String, Vec<String>)> = rows
            .iter()
            .filter_map(
                |(response, answers)| match prepare(spec, response, answers, options) {
                    Prepared::Text(response, answers) => Some((response, answers)),
                    Prepared::Ids(..) => None,
                },
            )
            .collect();
        return Some(bleu(spec.lang, &prepared));
    }
    let scores = rows.iter().map(|(r, a)| score_row(spec, r, a, options));
    Some(scores.sum::<f64>() / rows.len() as f64)
}

/// A published output row.
#[derive(Clone, Debug, Deserialize)]
pub struct OutputRow {
    /// Rows without a response are left out.
    #[serde(default)]
    pub gen_resp: Option<String>,
    pub answers: Vec<String>,
    pub length_bucket: usize,
}

/// The leaderboard's normalised score of a task and bucket, in the form inferred from the paper's table, where the
/// reference model at 1k stands at one half: score / (2 * reference), at most 1.
pub fn normalized(score: f64, reference_at_1k: f64) -> f64 {
    if reference_at_1k > 0.0 {
        (score / (2.0 * reference_at_1k)).min(1.0)
    } else {
        0.0
    }
}
