//! Reports of one or several runs: JSON with everything, Markdown tables, and one HTML page that
//! needs no script and no other file.

mod effective;
mod html;
mod markdown;
pub mod svg;

pub use effective::{Effective, effective};
pub use html::STYLE;

use crate::cell::{RunConfig, RunFolder, write_file, write_json};
use crate::error::{EvalError, Result};
use crate::registry::Registry;
use crate::score::{CellScore, CostSummary, score_run};
use crate::task::Prediction;
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// Grows when the JSON changes.
pub const SCHEMA: u32 = 1;
/// Wrong samples shown.
const FAILURES: usize = 20;

/// Characters of a policy from which on tables give it a shorter name.
const NAME: usize = 40;

/// A cell as reports show it.
#[derive(Clone, Debug, Serialize)]
pub struct ReportCell {
    /// Scores.
    #[serde(flatten)]
    pub score: CellScore,
    /// What it took.
    pub cost: CostSummary,
    /// What lengths count.
    pub unit: &'static str,
    /// True for scores, false for losses.
    pub higher_is_better: bool,
    /// Where the stored replies are, one a line, by sample id.
    pub predictions: PathBuf,
    /// The policy as tables name it.
    #[serde(skip)]
    shown: String,
}

impl ReportCell {
    /// Model and policy.
    pub fn series(&self) -> String {
        match self.shown.as_str() {
            "-" => self.score.cell.model.clone(),
            policy => format!("{} / {policy}", self.score.cell.model),
        }
    }
}

/// A wrong sample.
#[derive(Clone, Debug, Serialize)]
pub struct Failure {
    /// Task.
    pub task: String,
    /// Length.
    pub length: usize,
    /// Model and policy.
    pub series: String,
    /// The row.
    pub row: Prediction,
    /// Its score.
    pub value: f64,
    /// What was taken from the reply.
    pub extracted: Option<String>,
}

/// Everything that is shown.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Of this structure.
    pub schema: u32,
    /// What the runs were asked for.
    pub runs: Vec<RunConfig>,
    /// All cells with rows.
    pub cells: Vec<ReportCell>,
    /// Effective lengths.
    pub effective: Vec<Effective>,
    /// The first wrong samples.
    pub failures: Vec<Failure>,
}

impl Report {
    /// Scores the runs and collects what is shown.
    ///
    /// # Errors
    /// Folders that cannot be read, unknown tasks, and different versions of a task unless `force`.
    pub fn build(folders: &[RunFolder], registry: &Registry, force: bool) -> Result<Report> {
        let mut report = Report {
            schema: SCHEMA,
            runs: Vec::new(),
            cells: Vec::new(),
            effective: Vec::new(),
            failures: Vec::new(),
        };
        let mut origins = Vec::new();
        for folder in folders {
            report.runs.push(folder.config()?);
            for (score, cost) in score_run(folder, registry)? {
                let task = registry.task(&score.cell.task)?;
                let meta = task.meta();
                origins.push((folder, meta.best));
                report.cells.push(ReportCell {
                    shown: String::new(),
                    cost,
                    unit: meta.unit.name(),
                    higher_is_better: meta.higher_is_better,
                    predictions: folder.predictions_path(&score.cell),
                    score,
                });
            }
        }
        let names = report.policy_names();
        for cell in &mut report.cells {
            let policy = &cell.score.cell.policy;
            cell.shown = names.get(policy).unwrap_or(policy).clone();
        }
        for (index, (folder, best)) in origins.into_iter().enumerate() {
            let cell = &report.cells[index];
            if cell.higher_is_better && report.failures.len() < FAILURES {
                let found = failures(folder, cell, best, FAILURES - report.failures.len())?;
                report.failures.extend(found);
            }
        }
        for cell in &report.cells {
            let version = |other: &&ReportCell| {
                let (a, b) = (&other.score.cell, &cell.score.cell);
                a.task == b.task && a.version != b.version
            };
            if let Some(other) = report.cells.iter().find(version).filter(|_| !force) {
                return Err(EvalError::Input(format!(
                    "{}: versions {} and {} of the task do not belong in one table; --force puts them there",
                    cell.score.cell.task, cell.score.cell.version, other.score.cell.version
                )));
            }
        }
        report.effective = effective(&report.cells);
        Ok(report)
    }

    fn policy_names(&self) -> BTreeMap<String, String> {
        let policies = self.cells.iter().map(|c| c.score.cell.policy.as_str());
        short_names(&distinct(policies))
    }

    /// Tasks in order of appearance.
    pub fn tasks(&self) -> Vec<&str> {
        distinct(self.cells.iter().map(|cell| cell.score.cell.task.as_str()))
    }

    /// Cells of a task.
    pub fn of_task<'a>(&'a self, task: &'a str) -> impl Iterator<Item = &'a ReportCell> {
        self.cells
            .iter()
            .filter(move |cell| cell.score.cell.task == task)
    }

    /// Markdown tables.
    pub fn markdown(&self) -> String {
        markdown::render(self)
    }

    /// One self-contained page.
    pub fn html(&self) -> String {
        html::render(self)
    }

    /// Writes report.json, report.md and report.html into a folder.
    ///
    /// # Errors
    /// The disk's.
    pub fn write(&self, folder: &Path) -> Result<()> {
        write_json(&folder.join("report.json"), self)?;
        write_file(&folder.join("report.md"), &self.markdown())?;
        write_file(&folder.join("report.html"), &self.html())
    }

    /// Lines for a report's head: what was run and how.
    fn head(&self) -> Vec<(String, String)> {
        let mut all: Vec<(String, String)> = Vec::new();
        let mut add =
            |name: &str, value: String| match all.iter_mut().find(|(known, _)| known == name) {
                Some((_, known)) if !known.split("; ").any(|part| part == value) => {
                    *known += &format!("; {value}");
                }
                Some(_) => {}
                None => all.push((name.into(), value)),
            };
        for run in &self.runs {
            add("harness", format!("longspan {}", run.harness));
            add("behaviour", run.compat.clone());
            add("made", date(run.created));
            add("lengths counted by", run.tokenizer.clone());
            for (name, value) in &run.options {
                add(name, value.clone());
            }
            for (cell, _) in &run.cells {
                add("task versions", format!("{} v{}", cell.task, cell.version));
            }
        }
        for (policy, name) in self.policy_names() {
            add("policies", format!("{name} = {policy}"));
        }
        all
    }
}

/// Short names of policies whose parameters would not fit a table: without those that all of a kind share.
fn short_names(policies: &[&str]) -> BTreeMap<String, String> {
    let long = || policies.iter().filter(|policy| policy.len() > NAME);
    let parts = |policy: &str| -> (String, Vec<String>) {
        let (kind, parameters) = policy.split_once(':').unwrap_or((policy, ""));
        let parameters = parameters.split(',').map(String::from);
        (kind.into(), parameters.collect())
    };
    let names = long().map(|policy| {
        let (kind, own) = parts(policy);
        let alike: Vec<_> = long()
            .map(|p| parts(p))
            .filter(|(k, _)| *k == kind)
            .collect();
        let shared = |p: &String| alike.iter().all(|(_, parameters)| parameters.contains(p));
        let told: Vec<String> = own.into_iter().filter(|p| !shared(p)).collect();
        let name = match told.is_empty() {
            true => kind,
            false => format!("{kind}:{}", told.join(",")),
        };
        (policy.to_string(), name)
    });
    names.collect()
}

/// The first `most` wrong samples of a cell.
fn failures(folder: &RunFolder, cell: &ReportCell, best: f64, most: usize) -> Result<Vec<Failure>> {
    let rows = folder.predictions(&cell.score.cell)?;
    let scores: HashMap<&str, _> = cell.score.rows.iter().map(|s| (s.id.as_str(), s)).collect();
    let wrong = rows.into_iter().filter_map(|row| {
        let score = scores.get(row.id.as_str())?;
        (score.value < best).then(|| Failure {
            task: cell.score.cell.task.clone(),
            length: cell.score.cell.length,
            series: cell.series(),
            value: score.value,
            extracted: score.extracted.clone(),
            row,
        })
    });
    Ok(wrong.take(most).collect())
}

/// Values in order of first appearance.
fn distinct<'a>(values: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = Vec::new();
    for value in values {
        if !seen.contains(&value) {
            seen.push(value);
        }
    }
    seen
}

/// A length for people: 512, 4k, 1.5k.
pub fn length(length: usize) -> String {
    match length {
        0..1000 => length.to_string(),
        _ if length.is_multiple_of(1024) => format!("{}k", length / 1024),
        _ => format!("{}k", (length as f64 / 100.0).round() / 10.0),
    }
}

/// A figure for people: three places below 10, fewer above.
pub fn figure(value: f64) -> String {
    match value.abs() {
        x if x.is_nan() => "-".into(),
        // No minus before zero.
        x if x < 0.0005 => "0.000".into(),
        x if x < 10.0 => format!("{value:.3}"),
        x if x < 1000.0 => format!("{value:.1}"),
        _ => grouped(value),
    }
}

/// A number without decimals, thousands apart.
pub fn grouped(value: f64) -> String {
    if !value.is_finite() {
        return "-".into();
    }
    let digits = format!("{:.0}", value.abs());
    let mut out = String::from(if value < 0.0 && digits != "0" {
        "-"
    } else {
        ""
    });
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Seconds since 1970 as a date in UTC (civil-from-days, Howard Hinnant's algorithm).
fn date(seconds: u64) -> String {
    let days = (seconds / 86_400) as i64 + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

/// Seconds since 1970 as `20261126-084100` (UTC), for folder names.
pub fn stamp(seconds: u64) -> String {
    let of_day = seconds % 86_400;
    format!(
        "{}-{:02}{:02}{:02}",
        date(seconds).replace('-', ""),
        of_day / 3600,
        of_day / 60 % 60,
        of_day % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_policies_are_told_apart_by_what_differs() {
        let all = "block=64,chunk=2048,decay=0.1,evict=lru,max_cached=32";
        let of = |n: usize| format!("infllm:{all},n_local={n}");
        let (a, b) = (of(512), of(4096));
        let names = short_names(&[&a, "full", "window:size=512"]);
        assert_eq!(names.len(), 1);
        assert_eq!(names[&a], "infllm");
        let names = short_names(&[&a, &b]);
        assert_eq!(names[&a], "infllm:n_local=512");
        assert_eq!(names[&b], "infllm:n_local=4096");
    }

    #[test]
    fn figures_for_people() {
        assert_eq!(date(0), "1970-01-01");
        assert_eq!(date(951_782_400), "2000-02-29");
        assert_eq!(date(1_767_225_599), "2025-12-31");
        assert_eq!(stamp(951_782_400 + 3661), "20000229-010101");
        assert_eq!(
            [length(512), length(4096), length(1500), length(2000)],
            ["512", "4k", "1.5k", "2k"]
        );
        assert_eq!(
            [figure(0.5), figure(12.345), figure(1234.5), figure(-0.0)],
            ["0.500", "12.3", "1,234", "0.000"]
        );
        assert_eq!(
            [grouped(999.6), grouped(-1_234_567.0), grouped(-0.2)],
            ["1,000", "-1,234,567", "0"]
        );
    }
}
