//! Effective lengths: RULER's, and needle threading's per task (papers 57 and 43).

use super::ReportCell;
use crate::bench::{ruler, threading};
use crate::metric::effective_length::crossing;
use serde::Serialize;
use std::collections::BTreeMap;

/// Up to which length something works.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Effective {
    /// Benchmark or task, with the condition where there is one.
    pub what: String,
    /// Model and policy.
    pub series: String,
    /// The length; 0 if it fails at the first.
    pub length: f64,
    /// True if it never fails: the length is only a lower bound.
    pub at_least: bool,
    /// The score that counts as working.
    pub threshold: f64,
    /// What lengths count.
    pub unit: &'static str,
    /// Tasks behind it, of how many.
    pub tasks: (usize, usize),
}

/// The condition at which a threading task's curve is read; None = the least over depths.
fn condition(task: &str) -> Option<Option<(&'static str, u64)>> {
    Some(match task.strip_prefix("threading/")? {
        "single" => None,
        "multi" | "conditional" => Some(("num_needles", 10)),
        "thread" => Some(("thread_length", 5)),
        "multithread" => Some(("num_threads", 5)),
        "branched" => Some(("thread_length", 5)),
        _ => return None,
    })
}

/// All effective lengths that the cells give.
pub fn effective(cells: &[ReportCell]) -> Vec<Effective> {
    let mut all = Vec::new();
    let mut rulers: BTreeMap<(String, usize), Vec<f64>> = BTreeMap::new();
    let mut curves: BTreeMap<(String, String), Vec<(usize, f64)>> = BTreeMap::new();
    for cell in cells {
        let task = &cell.score.cell.task;
        let Some(main) = cell.score.main() else {
            continue;
        };
        if task.starts_with("ruler/") {
            let scores = rulers
                .entry((cell.series(), cell.score.cell.length))
                .or_default();
            scores.push(main.value * 100.0);
        }
        let accuracy = match condition(task) {
            None => continue,
            Some(None) => cell
                .score
                .by
                .get("depth")
                .and_then(|depths| depths.iter().map(|(_, e)| e.value).min_by(f64::total_cmp))
                .unwrap_or(main.value),
            Some(Some((name, at))) => {
                let values = cell.score.by.get(name);
                match values.and_then(|v| v.iter().find(|(value, _)| value.as_u64() == Some(at))) {
                    Some((_, estimate)) => estimate.value,
                    None => continue,
                }
            }
        };
        curves
            .entry((task.clone(), cell.series()))
            .or_default()
            .push((cell.score.cell.length, accuracy));
    }
    let mut by_series: BTreeMap<&str, Vec<(usize, &Vec<f64>)>> = BTreeMap::new();
    for ((series, length), scores) in &rulers {
        by_series.entry(series).or_default().push((*length, scores));
    }
    for (series, lengths) in by_series {
        let good = |scores: &Vec<f64>| {
            scores.iter().sum::<f64>() / scores.len() as f64 >= ruler::THRESHOLD
        };
        let best = lengths
            .iter()
            .filter(|(_, scores)| good(scores))
            .map(|(length, _)| *length)
            .max();
        let longest = lengths.iter().map(|(length, _)| *length).max();
        all.push(Effective {
            what: "ruler".into(),
            series: series.into(),
            length: best.unwrap_or(0) as f64,
            at_least: best.is_some() && best == longest,
            threshold: ruler::THRESHOLD,
            unit: "tokens",
            tasks: (lengths.iter().map(|(_, s)| s.len()).min().unwrap_or(0), 13),
        });
    }
    for ((task, series), mut curve) in curves {
        curve.sort_by_key(|(length, _)| *length);
        let lengths: Vec<f64> = curve.iter().map(|(length, _)| *length as f64).collect();
        let accuracy: Vec<f64> = curve.iter().map(|(_, a)| *a).collect();
        let length = crossing(&lengths, &accuracy, threading::THRESHOLD);
        let at = match condition(&task).flatten() {
            Some((name, at)) => format!("{task} at {name} {at}"),
            None => format!("{task}, worst depth"),
        };
        all.push(Effective {
            what: at,
            series,
            at_least: accuracy.last().is_some_and(|a| *a >= threading::THRESHOLD) && length > 0.0,
            length,
            threshold: threading::THRESHOLD,
            unit: "characters",
            tasks: (1, 1),
        });
    }
    all
}
