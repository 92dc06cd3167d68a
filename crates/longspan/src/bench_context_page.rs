//! What `bench context` shows: a table, slopes of cost against length, and one page with curves and
//! quality beside cost.

use crate::bench_context_cell::{Cell, Cost};
use crate::ui;
use longspan_eval::report::svg::{self, Curve, Dot, Point, escape};
use longspan_eval::report::{STYLE, figure, length};
use serde::Serialize;
use std::fmt::Write;

/// How a cost grows: cost ~ length^slope.
#[derive(Clone, Debug, Serialize)]
pub struct Slope {
    /// Method and rotary rule.
    pub series: String,
    /// What was fitted.
    pub what: &'static str,
    /// Least squares through the logarithms.
    pub slope: f64,
    /// Lengths fitted.
    pub lengths: Vec<usize>,
}

type Get = fn(&Cost) -> f64;

const COSTS: [(&str, Get); 3] = [
    ("seconds to read", |cost| cost.read_seconds),
    ("seconds a decoded token", |cost| {
        1.0 / cost.decode_tokens_per_second
    }),
    ("bytes in memory", |cost| cost.kv_memory_bytes as f64),
];

/// Slopes of all series measured at two lengths at least.
pub fn slopes(cells: &[Cell]) -> Vec<Slope> {
    let mut all = Vec::new();
    for series in series(cells) {
        for (what, get) in COSTS {
            let points: Vec<(usize, f64)> = cells
                .iter()
                .filter(|cell| cell.series() == series)
                .filter_map(|cell| Some((cell.length, get(cell.cost.as_ref()?))))
                .filter(|(_, cost)| *cost > 0.0)
                .collect();
            if let Some(slope) = fit(&points) {
                all.push(Slope {
                    series: series.clone(),
                    what,
                    slope,
                    lengths: points.iter().map(|point| point.0).collect(),
                });
            }
        }
    }
    all
}

/// Least squares through (ln length, ln cost).
fn fit(points: &[(usize, f64)]) -> Option<f64> {
    let n = points.len() as f64;
    let logs: Vec<(f64, f64)> = points
        .iter()
        .map(|&(x, y)| ((x as f64).ln(), y.ln()))
        .collect();
    let mean = |get: fn(&(f64, f64)) -> f64| logs.iter().map(get).sum::<f64>() / n;
    let (mx, my) = (mean(|p| p.0), mean(|p| p.1));
    let spread: f64 = logs.iter().map(|p| (p.0 - mx).powi(2)).sum();
    let both: f64 = logs.iter().map(|p| (p.0 - mx) * (p.1 - my)).sum();
    (points.len() > 1 && spread > 1e-9).then(|| both / spread)
}

fn series(cells: &[Cell]) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for cell in cells {
        let name = cell.series();
        if !all.contains(&name) {
            all.push(name);
        }
    }
    all
}

fn tasks(cells: &[Cell]) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for row in cells.iter().flat_map(|cell| &cell.retrieval) {
        if !all.contains(&row.task) {
            all.push(row.task.clone());
        }
    }
    all
}

/// One line about a cell that has just been measured.
pub fn print_cell(cell: &Cell) {
    let mut line = format!(
        "{:>9} tokens  {}",
        ui::count(cell.length as u64),
        cell.series()
    );
    if let Some(reason) = &cell.refused {
        let _ = write!(line, "  refused: {reason}");
    }
    if let Some(cost) = &cell.cost {
        let _ = write!(
            line,
            "  prefill {:.0} tok/s  decode {:.1} tok/s",
            cost.prefill_tokens_per_second, cost.decode_tokens_per_second
        );
    }
    if let Some(loss) = &cell.loss {
        let _ = write!(line, "  loss {:.3}", loss.nll);
    }
    for task in tasks(std::slice::from_ref(cell)) {
        let _ = write!(
            line,
            "  {task} {:.2}",
            cell.score(&task).unwrap_or(f64::NAN)
        );
    }
    eprintln!("{line}");
}

const HEAD: [&str; 11] = [
    "tokens",
    "prefill tok/s",
    "decode tok/s",
    "first token s",
    "KV memory",
    "KV disk",
    "index",
    "nll",
    "nll at end",
    "nll of next",
    "KL to full",
];

/// A cell's figures, in the order of [`HEAD`], then one per task.
fn figures(cell: &Cell, tasks: &[String]) -> Vec<String> {
    let dash = || "-".to_string();
    let cost = |get: &dyn Fn(&Cost) -> String| cell.cost.as_ref().map_or_else(dash, get);
    let bytes = |n: u64| if n == 0 { dash() } else { ui::bytes(n) };
    let nats = |x: Option<f64>| x.map_or_else(dash, |x| format!("{x:.3}"));
    let mut all = vec![
        ui::count(cell.length as u64),
        cost(&|c| format!("{:.0}", c.prefill_tokens_per_second)),
        cost(&|c| format!("{:.1}", c.decode_tokens_per_second)),
        cost(&|c| format!("{:.2}", c.first_token_seconds)),
        cost(&|c| bytes(c.kv_memory_bytes)),
        cost(&|c| bytes(c.kv_disk_bytes)),
        cost(&|c| bytes(c.index_bytes)),
        nats(cell.loss.as_ref().map(|loss| loss.nll)),
        nats(cell.loss.as_ref().map(|loss| loss.last_nll)),
        nats(cell.cost.as_ref().and_then(|cost| cost.next_nll)),
        nats(cell.cost.as_ref().and_then(|cost| cost.kl)),
    ];
    all.extend(tasks.iter().map(|task| {
        cell.score(task)
            .map_or_else(dash, |score| format!("{score:.2}"))
    }));
    all
}

/// The table and the slopes.
pub fn print(cells: &[Cell], slopes: &[Slope]) {
    let tasks = tasks(cells);
    let mut head: Vec<String> = HEAD.iter().map(|name| name.to_string()).collect();
    head.extend(tasks.iter().cloned());
    for series in series(cells) {
        println!("{series}");
        let of: Vec<&Cell> = cells
            .iter()
            .filter(|cell| cell.series() == series)
            .collect();
        let rows: Vec<Vec<String>> = of
            .iter()
            .filter(|cell| cell.refused.is_none())
            .map(|cell| figures(cell, &tasks))
            .collect();
        if !rows.is_empty() {
            let width = |column: usize| {
                let cells = rows.iter().map(|row| row[column].len());
                cells.chain([head[column].len()]).max().unwrap_or(0)
            };
            let line = |row: &[String]| {
                let cells = row.iter().enumerate();
                let cells = cells.map(|(column, text)| format!("{text:>w$}", w = width(column)));
                println!("  {}", cells.collect::<Vec<_>>().join("  "));
            };
            line(&head);
            rows.iter().for_each(|row| line(row));
        }
        for cell in of.iter().filter(|cell| cell.refused.is_some()) {
            println!(
                "  {} tokens refused: {}",
                ui::count(cell.length as u64),
                cell.refused.as_deref().unwrap_or_default()
            );
        }
        for slope in slopes.iter().filter(|slope| slope.series == series) {
            println!("  {} grow as length^{:.2}", slope.what, slope.slope);
        }
    }
}

/// A named figure of a cell: (name, unit shown, larger is better on a 0 to 1 scale, getter).
type Measured<'a> = (&'a str, bool, Box<dyn Fn(&Cell) -> Option<f64> + 'a>);

fn measured(tasks: &[String]) -> Vec<Measured<'_>> {
    let mut all: Vec<Measured<'_>> = vec![
        (
            "prefill tokens per second",
            false,
            Box::new(|c| Some(c.cost.as_ref()?.prefill_tokens_per_second)),
        ),
        (
            "decode tokens per second",
            false,
            Box::new(|c| Some(c.cost.as_ref()?.decode_tokens_per_second)),
        ),
        (
            "seconds to the first token",
            false,
            Box::new(|c| Some(c.cost.as_ref()?.first_token_seconds)),
        ),
        (
            "keys and values in memory, MB",
            false,
            Box::new(|c| Some(c.cost.as_ref()?.kv_memory_bytes as f64 / 1e6)),
        ),
        (
            "loss at the end of the text, nats",
            false,
            Box::new(|c| Some(c.loss.as_ref()?.last_nll)),
        ),
        (
            "loss of the next tokens, nats",
            false,
            Box::new(|c| c.cost.as_ref()?.next_nll),
        ),
        (
            "divergence from full attention, nats",
            false,
            Box::new(|c| c.cost.as_ref()?.kl),
        ),
    ];
    for task in tasks {
        all.push((task, true, Box::new(move |c| c.score(task))));
    }
    all
}

/// The page: no script, no other file.
pub fn html(title: &str, cells: &[Cell], slopes: &[Slope]) -> String {
    let (names, tasks) = (series(cells), tasks(cells));
    let mut out = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><title>Context methods</title><style>{STYLE}</style></head><body><h1>Context methods on {}</h1>",
        escape(title)
    );
    let measured = measured(&tasks);
    let longest = cells
        .iter()
        .filter(|cell| cell.refused.is_none())
        .map(|cell| cell.length)
        .max()
        .unwrap_or(0);
    out += &svg::legend(&names);
    let at_longest = |name: &String| {
        cells
            .iter()
            .find(|cell| cell.series() == *name && cell.length == longest && cell.refused.is_none())
    };
    let cost = |cell: &Cell| {
        cell.cost
            .as_ref()
            .map(|cost| 1000.0 / cost.decode_tokens_per_second)
    };
    let _ = write!(
        out,
        "<h2>Quality beside cost at {} tokens</h2><div class=\"maps\">",
        length(longest)
    );
    for (what, scores, get) in measured.iter().skip(4) {
        let dots = names.iter().enumerate().filter_map(|(series, name)| {
            let cell = at_longest(name)?;
            Some(Dot {
                series,
                name: name.clone(),
                label: String::new(),
                x: cost(cell)?,
                y: get(cell)?,
            })
        });
        let dots: Vec<Dot> = dots.collect();
        if !dots.is_empty() {
            let figure = svg::scatter(&dots, "milliseconds a decoded token", what, *scores);
            let _ = write!(out, "<div><h3>{}</h3>{figure}</div>", escape(what));
        }
    }
    out += "</div><h2>By length</h2><div class=\"maps\">";
    for (what, scores, get) in &measured {
        let curves: Vec<Curve> = names
            .iter()
            .map(|name| {
                let mut points: Vec<Point> = cells
                    .iter()
                    .filter(|cell| cell.series() == *name)
                    .filter_map(|cell| {
                        Some(Point {
                            x: cell.length as f64,
                            y: get(cell)?,
                            interval: None,
                        })
                    })
                    .collect();
                points.sort_by(|a, b| a.x.total_cmp(&b.x));
                Curve {
                    name: name.clone(),
                    points,
                }
            })
            .collect();
        if curves.iter().any(|curve| !curve.points.is_empty()) {
            let figure = svg::curves(&curves, "length in tokens", what, *scores);
            let _ = write!(out, "<div><h3>{}</h3>{figure}</div>", escape(what));
        }
    }
    out += "</div>";
    let by_position: Vec<Curve> = names
        .iter()
        .map(|name| Curve {
            name: name.clone(),
            points: at_longest(name)
                .and_then(|cell| cell.loss.as_ref())
                .map(|loss| {
                    let buckets = loss.buckets.iter();
                    buckets
                        .map(|&(_, end, nll, _)| Point {
                            x: end as f64,
                            y: nll,
                            interval: None,
                        })
                        .collect()
                })
                .unwrap_or_default(),
        })
        .collect();
    if by_position.iter().any(|curve| !curve.points.is_empty()) {
        let figure = svg::curves(
            &by_position,
            "position in tokens (end of bucket)",
            "nats per token",
            false,
        );
        let _ = write!(
            out,
            "<h2>Loss by position at {} tokens</h2>{figure}",
            length(longest)
        );
    }
    depth_maps(&mut out, cells, &names, &tasks);
    table(&mut out, cells, slopes, &tasks);
    out += "</body></html>\n";
    out
}

fn depth_maps(out: &mut String, cells: &[Cell], names: &[String], tasks: &[String]) {
    for task in tasks {
        let rows = || cells.iter().filter(|cell| cell.score(task).is_some());
        let mut lengths: Vec<usize> = rows().map(|cell| cell.length).collect();
        lengths.sort_unstable();
        lengths.dedup();
        let mut depths: Vec<f64> = rows()
            .flat_map(|cell| &cell.retrieval)
            .filter(|row| row.task == *task)
            .map(|row| row.depth)
            .collect();
        depths.sort_by(f64::total_cmp);
        depths.dedup();
        let columns: Vec<String> = lengths.iter().map(|&n| length(n)).collect();
        let lines: Vec<String> = depths.iter().map(|depth| format!("{depth:.0}%")).collect();
        let _ = write!(
            out,
            "<h2>{} by length and depth</h2><div class=\"maps\">",
            escape(task)
        );
        for name in names {
            let value = |x: usize, y: usize| {
                let cell =
                    rows().find(|cell| cell.series() == *name && cell.length == lengths[x])?;
                let mut rows = cell.retrieval.iter();
                let row = rows.find(|row| row.task == *task && row.depth == depths[y])?;
                Some((row.score, row.samples))
            };
            let map = svg::heat_map(("length in tokens", "depth"), &columns, &lines, &value);
            let _ = write!(out, "<div><h3>{}</h3>{map}</div>", escape(name));
        }
        out.push_str("</div>");
    }
}

fn table(out: &mut String, cells: &[Cell], slopes: &[Slope], tasks: &[String]) {
    *out += "<h2>Figures</h2><table><tr><th>method</th>";
    let head = HEAD.iter().copied().chain(tasks.iter().map(String::as_str));
    for name in head {
        let _ = write!(out, "<th>{}</th>", escape(name));
    }
    *out += "</tr>";
    for cell in cells {
        let _ = write!(out, "<tr><td>{}</td>", escape(&cell.series()));
        match &cell.refused {
            Some(reason) => {
                let span = HEAD.len() + tasks.len() - 1;
                let _ = write!(
                    out,
                    "<td class=\"n\">{}</td><td colspan=\"{span}\">refused: {}</td>",
                    ui::count(cell.length as u64),
                    escape(reason)
                );
            }
            None => {
                for text in figures(cell, tasks) {
                    let _ = write!(out, "<td class=\"n\">{}</td>", escape(&text));
                }
            }
        }
        *out += "</tr>";
    }
    *out += "</table>";
    if slopes.is_empty() {
        return;
    }
    *out += "<h2>Growth</h2><p class=\"dim\">Cost grows as length to this power (least squares through the logarithms).</p><table><tr><th>method</th><th>what</th><th>power</th></tr>";
    for slope in slopes {
        let _ = write!(
            out,
            "<tr><td>{}</td><td>{}</td><td class=\"n\">{}</td></tr>",
            escape(&slope.series),
            slope.what,
            figure(slope.slope)
        );
    }
    *out += "</table>";
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench_context_cell::{Loss, Retrieval};

    fn cell(method: &str, length: usize) -> Cell {
        Cell {
            setup: "s".into(),
            rope: "own".into(),
            method: method.into(),
            length,
            cost: Some(Cost {
                read_seconds: 1e-6 * (length as f64).powi(2),
                prefill_tokens_per_second: 1e6 / length as f64,
                decode_tokens_per_second: 100.0,
                kv_memory_bytes: 1000 * length as u64,
                ..Cost::default()
            }),
            loss: Some(Loss {
                nll: 2.0,
                perplexity: 2f64.exp(),
                buckets: vec![(0, 16, 3.0, 16)],
                last_nll: 1.5,
            }),
            retrieval: vec![Retrieval {
                task: "passkey".into(),
                depth: 50.0,
                score: 1.0,
                samples: 2,
            }],
            ..Cell::default()
        }
    }

    #[test]
    fn slopes_are_the_powers() {
        let cells = [
            cell("full", 1000),
            cell("full", 2000),
            cell("full", 8000),
            cell("window:4", 1000),
        ];
        let found = slopes(&cells);
        let of = |what: &str| found.iter().find(|slope| slope.what == what).unwrap().slope;
        assert!((of("seconds to read") - 2.0).abs() < 1e-9);
        assert!(of("seconds a decoded token").abs() < 1e-9);
        assert!((of("bytes in memory") - 1.0).abs() < 1e-9);
        // One length has no slope.
        assert!(found.iter().all(|slope| slope.series == "full"));
    }

    #[test]
    fn the_page_holds_every_figure_and_reason() {
        let mut refused = cell("a<b", 2000);
        refused.cost = None;
        refused.loss = None;
        refused.retrieval.clear();
        refused.refused = Some("too \"wide\"".into());
        let cells = [cell("full", 1000), cell("full", 2000), refused];
        let page = html("tiny & small", &cells, &slopes(&cells));
        for text in [
            "tiny &amp; small",
            "a&lt;b",
            "too &quot;wide&quot;",
            "2,000",
            "1.500",
            "passkey",
            "<svg",
        ] {
            assert!(page.contains(text), "{text} is missing");
        }
        assert!(!page.contains("NaN") && !page.contains("<script"));
    }
}
