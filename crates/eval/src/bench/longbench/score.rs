//! The published scorer of LongBench: which metric a data set has, what of a prediction counts, and how rows become
//! the numbers papers print.

use serde::Serialize;

use crate::metric::classification::{classification, count, retrieval};
use crate::metric::edit_similarity::code_similarity;
use crate::metric::qa_f1::{qa_f1, qa_f1_zh};
use crate::metric::rouge::{RougeCompat, rouge_l, rouge_l_zh};
use crate::python::round;

/// How a data set is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    QaF1,
    QaF1Zh,
    Rouge,
    RougeZh,
    Classification,
    Retrieval,
    RetrievalZh,
    Count,
    CodeSim,
}

impl Metric {
    /// For tables.
    pub fn name(self) -> &'static str {
        match self {
            Metric::QaF1 | Metric::QaF1Zh => "qa_f1",
            Metric::Rouge | Metric::RougeZh => "rouge_l",
            Metric::Classification => "classification",
            Metric::Retrieval | Metric::RetrievalZh => "retrieval",
            Metric::Count => "count",
            Metric::CodeSim => "code_sim",
        }
    }

    /// The score of a prediction against one answer, 0 to 1.
    pub fn score(
        self,
        prediction: &str,
        answer: &str,
        classes: &[String],
        compat: RougeCompat,
    ) -> f64 {
        match self {
            Metric::QaF1 => qa_f1(prediction, answer),
            Metric::QaF1Zh => qa_f1_zh(prediction, answer),
            Metric::Rouge => rouge_l(prediction, answer, compat).f,
            Metric::RougeZh => rouge_l_zh(prediction, answer, compat).f,
            Metric::Classification => classification(prediction, answer, classes),
            Metric::Retrieval => retrieval(prediction, answer, "Paragraph "),
            Metric::RetrievalZh => retrieval(prediction, answer, "段落"),
            Metric::Count => count(prediction, answer),
            Metric::CodeSim => code_similarity(prediction, answer),
        }
    }
}

/// What counts of a prediction: for the few-shot sets, the first line after leading newlines.
pub fn extract<'a>(dataset: &str, prediction: &'a str) -> &'a str {
    if !matches!(dataset, "trec" | "triviaqa" | "samsum" | "lsht") {
        return prediction;
    }
    let text = prediction.trim_start_matches('\n');
    text.split('\n').next().unwrap_or("")
}

/// The score of one row, 0 to 1: the best over its answers. `None` for an unknown data set.
pub fn score(
    dataset: &str,
    prediction: &str,
    answers: &[String],
    classes: &[String],
    compat: RougeCompat,
) -> Option<f64> {
    let metric = super::dataset(dataset)?.metric;
    let prediction = extract(dataset, prediction);
    let scores = answers
        .iter()
        .map(|answer| metric.score(prediction, answer, classes, compat));
    Some(scores.fold(0.0, f64::max))
}

/// One row of a published prediction file.
#[derive(Clone, Debug, serde::Deserialize)]
pub struct PredictionRow {
    pub pred: String,
    pub answers: Vec<String>,
    #[serde(default)]
    pub all_classes: Option<Vec<String>>,
    #[serde(default)]
    pub length: Option<usize>,
}

/// Scores of LongBench-E by length of the row; `None` (the published NaN) for an empty bin.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ByLength {
    #[serde(rename = "0-4k")]
    pub to_4k: Option<f64>,
    #[serde(rename = "4-8k")]
    pub to_8k: Option<f64>,
    #[serde(rename = "8k+")]
    pub above: Option<f64>,
}

/// 100 * mean with two decimals; `None` without rows.
fn percent(scores: &[f64]) -> Option<f64> {
    let mean = scores.iter().sum::<f64>() / scores.len() as f64;
    (!scores.is_empty()).then(|| round(100.0 * mean, 2))
}

/// Row scores of a data set. The classes of `all_classes` are used for every row, as the published script uses the
/// last row's.
fn row_scores(dataset: &str, rows: &[PredictionRow], compat: RougeCompat) -> Option<Vec<f64>> {
    super::dataset(dataset)?;
    let last = rows.last().and_then(|row| row.all_classes.clone());
    let classes = last.unwrap_or_default();
    rows.iter()
        .map(|row| score(dataset, &row.pred, &row.answers, &classes, compat))
        .collect()
}

/// The data set's score, 0 to 100 with two decimals. `None` for an unknown data set or no rows.
pub fn dataset_score(dataset: &str, rows: &[PredictionRow], compat: RougeCompat) -> Option<f64> {
    percent(&row_scores(dataset, rows, compat)?)
}

/// LongBench-E's scores. `None` for an unknown data set.
pub fn by_length(dataset: &str, rows: &[PredictionRow], compat: RougeCompat) -> Option<ByLength> {
    let scores = row_scores(dataset, rows, compat)?;
    Some(bins(
        rows.iter()
            .map(|row| row.length.unwrap_or(0))
            .zip(scores.iter().copied()),
    ))
}

/// Means by length bin of (length, score) pairs.
pub fn bins(scored: impl Iterator<Item = (usize, f64)>) -> ByLength {
    let mut bins: [Vec<f64>; 3] = Default::default();
    for (length, score) in scored {
        let bin = match length {
            0..4000 => 0,
            4000..8000 => 1,
            _ => 2,
        };
        bins[bin].push(score);
    }
    ByLength {
        to_4k: percent(&bins[0]),
        to_8k: percent(&bins[1]),
        above: percent(&bins[2]),
    }
}

/// Means of category means: English (code counts as its own category), and Chinese, which shares the code category.
/// `scores`: data set and score. `None` where a language has no data set.
pub fn averages(scores: &[(&str, f64)]) -> (Option<f64>, Option<f64>) {
    let mean_of = |languages: &[&str]| {
        let mut categories: Vec<(&str, Vec<f64>)> = Vec::new();
        for &(name, score) in scores {
            let Some(set) = super::dataset(name) else {
                continue;
            };
            if !languages.contains(&set.language) {
                continue;
            }
            match categories.iter_mut().find(|(c, _)| *c == set.category) {
                Some((_, list)) => list.push(score),
                None => categories.push((set.category, vec![score])),
            }
        }
        let means: Vec<f64> = categories
            .iter()
            .map(|(_, list)| list.iter().sum::<f64>() / list.len() as f64)
            .collect();
        (!means.is_empty()).then(|| means.iter().sum::<f64>() / means.len() as f64)
    };
    (mean_of(&["en", "code"]), mean_of(&["zh", "code"]))
}

/// Ids kept by middle truncation: all if at most `max_length`, else the first and last `max_length / 2`.
pub fn truncate_middle<T: Copy>(ids: &[T], max_length: usize) -> Vec<T> {
    if ids.len() <= max_length {
        return ids.to_vec();
    }
    let half = max_length / 2;
    // Python's `ids[-0:]` is everything: a budget of one token keeps the whole text, as published.
    let tail = if half == 0 { 0 } else { ids.len() - half };
    [&ids[..half], &ids[tail..]].concat()
}
