//! Two runs, or two policies of one run, on the same samples.

use crate::error::{EvalError, Result};
use crate::score::CellScore;
use crate::stats::{self, Paired};
use serde::Serialize;
use std::collections::HashMap;

/// A pair of cells on the same samples.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Task.
    pub task: String,
    /// Length.
    pub length: usize,
    /// What a is: model and policy.
    pub a: String,
    /// What b is.
    pub b: String,
    /// Metric of a, over the shared samples.
    pub a_value: f64,
    /// Metric of b.
    pub b_value: f64,
    /// b - a.
    pub paired: Paired,
    /// True if the metric is a score, false if it is a loss.
    pub higher_is_better: bool,
    /// Samples whose score changed: id, in a, in b.
    pub flips: Vec<(String, f64, f64)>,
    /// Samples in only one of the two.
    pub unpaired: usize,
}

fn name(score: &CellScore) -> String {
    match score.cell.policy.as_str() {
        "-" => score.cell.model.clone(),
        policy => format!("{} {policy}", score.cell.model),
    }
}

/// Compares each cell of `a` with the cells of `b` of the same task and length: with the one of
/// the same model and policy if there is one, else with all. `losses` names tasks whose metric is a loss.
///
/// # Errors
/// Different task versions (unless `force`), or nothing to compare.
pub fn compare(
    a: &[CellScore],
    b: &[CellScore],
    losses: &dyn Fn(&str) -> bool,
    force: bool,
) -> Result<Vec<Comparison>> {
    let mut all = Vec::new();
    for left in a {
        let same: Vec<&CellScore> = b
            .iter()
            .filter(|right| {
                right.cell.task == left.cell.task && right.cell.length == left.cell.length
            })
            .collect();
        let twin = same.iter().find(|right| name(right) == name(left));
        for right in twin.map_or(same.clone(), |twin| vec![*twin]) {
            if right.cell.version != left.cell.version && !force {
                return Err(EvalError::Input(format!(
                    "{}: versions {} and {} of the task are not comparable; --force compares them all the same",
                    left.cell.task, left.cell.version, right.cell.version
                )));
            }
            all.extend(pair(left, right, !losses(&left.cell.task)));
        }
    }
    if all.is_empty() {
        return Err(EvalError::Input(
            "the two share no samples of a task and length; compare runs with the same seed and lengths".into(),
        ));
    }
    Ok(all)
}

/// Compares the policies (or models) of one run with the first of each task and length.
///
/// # Errors
/// There is only one.
pub fn within(cells: &[CellScore], losses: &dyn Fn(&str) -> bool) -> Result<Vec<Comparison>> {
    let mut first: HashMap<(&str, usize), &CellScore> = HashMap::new();
    let mut all = Vec::new();
    for cell in cells {
        match first.get(&(cell.cell.task.as_str(), cell.cell.length)) {
            Some(left) => all.extend(pair(left, cell, !losses(&cell.cell.task))),
            None => {
                first.insert((&cell.cell.task, cell.cell.length), cell);
            }
        }
    }
    if all.is_empty() {
        return Err(EvalError::Input(
            "the run has one policy and one model; name a second run".into(),
        ));
    }
    Ok(all)
}

fn pair(a: &CellScore, b: &CellScore, higher_is_better: bool) -> Option<Comparison> {
    let right: HashMap<&str, &crate::task::Scored> =
        b.rows.iter().map(|row| (row.id.as_str(), row)).collect();
    let rows: Vec<(&str, &str, f64, f64)> = a
        .rows
        .iter()
        .filter_map(|row| {
            let other = right.get(row.id.as_str())?;
            Some((
                row.id.as_str(),
                row.cluster.as_str(),
                row.value,
                other.value,
            ))
        })
        .collect();
    if rows.is_empty() {
        return None;
    }
    let clustered: Vec<(&str, f64, f64)> = rows.iter().map(|&(_, c, x, y)| (c, x, y)).collect();
    Some(Comparison {
        task: a.cell.task.clone(),
        length: a.cell.length,
        a: name(a),
        b: name(b),
        a_value: rows.iter().map(|row| row.2).sum::<f64>() / rows.len() as f64,
        b_value: rows.iter().map(|row| row.3).sum::<f64>() / rows.len() as f64,
        paired: stats::paired(&clustered),
        higher_is_better,
        flips: rows
            .iter()
            .filter(|(_, _, x, y)| x != y)
            .map(|&(id, _, x, y)| (id.to_string(), x, y))
            .collect(),
        unpaired: a.rows.len() + b.rows.len() - 2 * rows.len(),
    })
}

impl Comparison {
    /// How much worse b is, in the metric's unit; 0 if it is not.
    pub fn drop(&self) -> f64 {
        let change = self.paired.difference.value;
        if self.higher_is_better {
            -change
        } else {
            change
        }
        .max(0.0)
    }
}
