//! Scores: a pure function of stored predictions. Generation is not needed, the model is not asked.

use crate::cell::{Cell, CostRow, RunFolder, write_json};
use crate::error::Result;
use crate::registry::Registry;
use crate::stats::{self, Estimate};
use crate::task::{Aggregate, Prediction, Scored, Task};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// Rows that need a look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Stored rows.
    pub rows: usize,
    /// Part of the prompt was left out.
    pub truncated: usize,
    /// Nothing could be taken from the reply.
    pub unparsed: usize,
    /// The target refused; these rows are in no mean.
    pub errors: usize,
    /// The reply ended at its limit of tokens.
    pub at_limit: usize,
}

/// Scores of a cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CellScore {
    /// Which cell.
    pub cell: Cell,
    /// The first is the task's metric.
    pub aggregates: Vec<Aggregate>,
    /// Rows that need a look.
    pub counts: Counts,
    /// The metric by value of each attribute that has a few values: depth, hops, direction.
    pub by: BTreeMap<String, Vec<(Value, Estimate)>>,
    /// Row scores.
    pub rows: Vec<Scored>,
}

impl CellScore {
    /// The task's metric; None for a cell without scored rows.
    pub fn main(&self) -> Option<&Estimate> {
        self.aggregates
            .first()
            .map(|aggregate| &aggregate.estimate)
            .filter(|estimate| estimate.n > 0)
    }
}

/// Most values of an attribute that tables are made of.
const MOST_VALUES: usize = 64;

/// An attribute's value and its (cluster, score) rows.
type Group<'a> = (&'a Value, Vec<(&'a str, f64)>);

/// Scores a cell's rows.
pub fn score_cell(task: &dyn Task, cell: &Cell, rows: &[Prediction]) -> CellScore {
    let good: Vec<Prediction> = rows
        .iter()
        .filter(|row| row.error.is_none())
        .cloned()
        .collect();
    let scored: Vec<Scored> = good.iter().map(|row| task.score(row)).collect();
    let counts = Counts {
        rows: rows.len(),
        truncated: rows.iter().filter(|row| row.truncated).count(),
        unparsed: scored.iter().filter(|row| row.extracted.is_none()).count(),
        errors: rows.len() - good.len(),
        at_limit: good.iter().filter(|row| row.finish == "length").count(),
    };
    let mut groups: BTreeMap<&str, Vec<Group<'_>>> = BTreeMap::new();
    for (row, score) in good.iter().zip(&scored) {
        for (name, value) in &row.attrs {
            let groups = groups.entry(name).or_default();
            let at = match groups.iter().position(|(known, _)| *known == value) {
                Some(at) => at,
                None if groups.len() <= MOST_VALUES => {
                    groups.push((value, Vec::new()));
                    groups.len() - 1
                }
                None => continue,
            };
            groups[at].1.push((&score.cluster, score.value));
        }
    }
    let by = groups
        .into_iter()
        .filter(|(_, groups)| groups.len() > 1 && groups.len() <= MOST_VALUES)
        .map(|(name, mut groups)| {
            groups.sort_by(|a, b| order(a.0, b.0));
            let values = groups
                .into_iter()
                .map(|(value, rows)| (value.clone(), stats::mean(&rows)))
                .collect();
            (name.to_string(), values)
        })
        .collect();
    CellScore {
        cell: cell.clone(),
        aggregates: task.aggregate(&good, &scored),
        counts,
        by,
        rows: scored,
    }
}

fn order(a: &Value, b: &Value) -> std::cmp::Ordering {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a.total_cmp(&b),
        _ => a.to_string().cmp(&b.to_string()),
    }
}

/// What a cell took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CostSummary {
    /// Seconds of reading and writing, replies from the cache not counted.
    pub seconds: f64,
    /// Prompt tokens per second of reading, those read earlier included.
    pub prefill_tokens_per_s: Option<f64>,
    /// Tokens per second of writing.
    pub decode_tokens_per_s: Option<f64>,
    /// Largest bytes of keys and values.
    pub peak_kv_bytes: u64,
    /// Share of prompt tokens that did not have to be read anew.
    pub cached_share: f64,
}

/// Sums up costs.
pub fn summarize_costs(rows: &[CostRow]) -> CostSummary {
    let fresh: Vec<&CostRow> = rows.iter().filter(|row| !row.cost.from_cache).collect();
    let sum = |get: &dyn Fn(&CostRow) -> f64| fresh.iter().map(|row| get(row)).sum::<f64>();
    let (read, write) = (sum(&|r| r.cost.prefill_s), sum(&|r| r.cost.decode_s));
    let tokens_in = sum(&|r| r.tokens.0 as f64);
    CostSummary {
        seconds: read + write,
        prefill_tokens_per_s: (read > 0.0).then(|| tokens_in / read),
        decode_tokens_per_s: (write > 0.0)
            .then(|| sum(&|r| r.tokens.1.saturating_sub(1) as f64) / write),
        peak_kv_bytes: rows.iter().map(|row| row.cost.kv_bytes).max().unwrap_or(0),
        cached_share: sum(&|r| r.cost.cached_tokens as f64) / tokens_in.max(1.0),
    }
}

/// Scores every cell of a run and writes the score files. Cells without rows are left out.
///
/// # Errors
/// Rows that cannot be read, tasks that are not known.
pub fn score_run(folder: &RunFolder, registry: &Registry) -> Result<Vec<(CellScore, CostSummary)>> {
    let mut all = Vec::new();
    for (cell, _) in folder.config()?.cells {
        let rows = folder.predictions(&cell)?;
        if rows.is_empty() {
            continue;
        }
        let task = registry.task(&cell.task)?;
        let score = score_cell(&*task, &cell, &rows);
        write_json(&folder.score_path(&cell), &score)?;
        all.push((score, summarize_costs(&folder.costs(&cell)?)));
    }
    Ok(all)
}
