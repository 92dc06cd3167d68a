//! Tables: tasks and policies down, lengths across.

use super::{Report, distinct, figure, length};
use std::fmt::Write;

/// Value ± standard error.
pub(super) fn value(estimate: &crate::stats::Estimate) -> String {
    match estimate.se {
        Some(se) => format!("{} ± {}", figure(estimate.value), figure(se)),
        None => figure(estimate.value),
    }
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

pub(super) fn render(report: &Report) -> String {
    let mut out = String::from("# Evaluation\n\n");
    for (name, value) in report.head() {
        let _ = writeln!(out, "- {name}: {}", cell(&value));
    }
    for task in report.tasks() {
        let cells: Vec<_> = report.of_task(task).collect();
        let mut lengths: Vec<usize> = cells.iter().map(|c| c.score.cell.length).collect();
        lengths.sort();
        lengths.dedup();
        let metric = cells[0]
            .score
            .aggregates
            .first()
            .map_or("score", |a| a.name.as_str());
        let better = if cells[0].higher_is_better {
            "higher"
        } else {
            "lower"
        };
        let _ = writeln!(
            out,
            "\n## {task}\n\n{metric} ({better} is better) by length in {}, mean ± standard error (rows)\n",
            cells[0].unit
        );
        let _ = write!(out, "| model / policy |");
        lengths.iter().for_each(|l| {
            let _ = write!(out, " {} |", length(*l));
        });
        let _ = write!(out, "\n|---|{}\n", "---|".repeat(lengths.len()));
        let names: Vec<String> = cells.iter().map(|c| c.series()).collect();
        for series in distinct(names.iter().map(String::as_str)) {
            let _ = write!(out, "| {} |", cell(series));
            for l in &lengths {
                let found = cells
                    .iter()
                    .find(|c| c.series() == series && c.score.cell.length == *l);
                let text = found.map_or("not run".into(), |c| match c.score.main() {
                    Some(main) => format!("{} ({})", value(main), main.n),
                    None => "no scored rows".into(),
                });
                let _ = write!(out, " {text} |");
            }
            out.push('\n');
        }
        let odd: Vec<_> = cells
            .iter()
            .filter(|c| {
                let n = &c.score.counts;
                n.truncated + n.unparsed + n.errors > 0
            })
            .collect();
        if !odd.is_empty() {
            out += "\n| model / policy | length | rows | truncated | unparsed | errors |\n|---|---|---|---|---|---|\n";
            for c in odd {
                let n = &c.score.counts;
                let _ = writeln!(
                    out,
                    "| {} | {} | {} | {} | {} | {} |",
                    cell(&c.series()),
                    length(c.score.cell.length),
                    n.rows,
                    n.truncated,
                    n.unparsed,
                    n.errors
                );
            }
        }
        if cells.iter().any(|c| c.score.aggregates.len() > 1) {
            out += "\nFurther figures:\n\n";
            for c in &cells {
                let more: Vec<String> = c.score.aggregates[1..]
                    .iter()
                    .map(|a| format!("{} {}", a.name, value(&a.estimate)))
                    .collect();
                let _ = writeln!(
                    out,
                    "- {} at {}: {}",
                    cell(&c.series()),
                    length(c.score.cell.length),
                    more.join(", ")
                );
            }
        }
    }
    if !report.effective.is_empty() {
        out += "\n## Effective length\n\n| what | model / policy | length | threshold | tasks |\n|---|---|---|---|---|\n";
        for e in &report.effective {
            let bound = if e.at_least { "at least " } else { "" };
            let _ = writeln!(
                out,
                "| {} | {} | {bound}{:.0} {} | {} | {} of {} |",
                e.what,
                cell(&e.series),
                e.length,
                e.unit,
                e.threshold,
                e.tasks.0,
                e.tasks.1
            );
        }
    }
    out += "\n## Cost\n\n| task | length | model / policy | seconds | read tokens/s | written tokens/s | peak keys and values | read before |\n|---|---|---|---|---|---|---|---|\n";
    for c in &report.cells {
        let rate = |rate: Option<f64>| rate.map_or("-".into(), |r| format!("{r:.0}"));
        let _ = writeln!(
            out,
            "| {} | {} | {} | {:.1} | {} | {} | {:.1} MB | {:.0}% |",
            c.score.cell.task,
            length(c.score.cell.length),
            cell(&c.series()),
            c.cost.seconds,
            rate(c.cost.prefill_tokens_per_s),
            rate(c.cost.decode_tokens_per_s),
            c.cost.peak_kv_bytes as f64 / 1e6,
            c.cost.cached_share * 100.0
        );
    }
    out
}
