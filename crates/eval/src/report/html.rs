//! The page: head, tables, heat maps, curves, quality beside cost, wrong samples. No script, no
//! other file, readable when printed.

use super::markdown::value;
use super::svg::{self, Curve, Dot, Point, escape};
use super::{Report, ReportCell, distinct, figure, grouped, length};
use std::fmt::Write;

/// What every page of this program looks like.
pub const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1100px;padding:0 1rem;color:#111;background:#fff}\
h1{font-size:1.6rem}h2{font-size:1.25rem;margin-top:2.2rem;border-bottom:1px solid #ddd}h3{font-size:1rem;margin-bottom:.3rem}\
table{border-collapse:collapse;margin:.6rem 0}th,td{border:1px solid #ddd;padding:.25rem .6rem;text-align:left;vertical-align:top}td:first-child{min-width:8em}td,.legend{overflow-wrap:anywhere}td.n,th{overflow-wrap:normal}th{background:#f5f5f5}td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}\
svg{max-width:100%;height:auto;font-family:inherit}.maps{display:flex;flex-wrap:wrap;gap:1.5rem}.legend{margin:.2rem 0}.key{margin-right:1.2rem}.key i{display:inline-block;width:.8em;height:.8em;margin-right:.4em;border-radius:2px}\
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f7f7f7;padding:.5rem;margin:.2rem 0}details{margin:.3rem 0}summary{cursor:pointer}.dim{color:#555}";

pub(super) fn render(report: &Report) -> String {
    let mut out = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><title>Longspan evaluation</title><style>{STYLE}</style></head><body><h1>Evaluation</h1><table>"
    );
    for (name, value) in report.head() {
        let _ = write!(
            out,
            "<tr><th>{}</th><td>{}</td></tr>",
            escape(&name),
            escape(&value)
        );
    }
    out += "</table>";
    for task in report.tasks() {
        let cells: Vec<&ReportCell> = report.of_task(task).collect();
        let _ = write!(out, "<h2>{}</h2>", escape(task));
        table(&mut out, &cells);
        curve(&mut out, &cells);
        positions(&mut out, &cells);
        heat_maps(&mut out, &cells);
        conditions(&mut out, &cells);
        cost(&mut out, &cells);
    }
    if !report.effective.is_empty() {
        out += "<h2>Effective length</h2><table><tr><th>what</th><th>model / policy</th><th>length</th><th>threshold</th><th>tasks</th></tr>";
        for e in &report.effective {
            let bound = if e.at_least { "at least " } else { "" };
            let _ = write!(
                out,
                "<tr><td>{}</td><td>{}</td><td class=\"n\">{bound}{:.0} {}</td><td class=\"n\">{}</td><td class=\"n\">{} of {}</td></tr>",
                escape(&e.what),
                escape(&e.series),
                e.length,
                e.unit,
                e.threshold,
                e.tasks.0,
                e.tasks.1
            );
        }
        out += "</table>";
    }
    failures(&mut out, report);
    out += "</body></html>\n";
    out
}

fn lengths(cells: &[&ReportCell]) -> Vec<usize> {
    let mut all: Vec<usize> = cells.iter().map(|cell| cell.score.cell.length).collect();
    all.sort();
    all.dedup();
    all
}

fn series(cells: &[&ReportCell]) -> Vec<String> {
    let names: Vec<String> = cells.iter().map(|cell| cell.series()).collect();
    distinct(names.iter().map(String::as_str))
        .into_iter()
        .map(str::to_string)
        .collect()
}

fn metric<'a>(cells: &[&'a ReportCell]) -> &'a str {
    cells[0]
        .score
        .aggregates
        .first()
        .map_or("score", |a| a.name.as_str())
}

fn table(out: &mut String, cells: &[&ReportCell]) {
    let better = if cells[0].higher_is_better {
        "higher"
    } else {
        "lower"
    };
    let _ = write!(
        out,
        "<p class=\"dim\">{} ({better} is better), mean ± standard error; lengths in {}</p><table><tr><th>model / policy</th><th>length</th><th>{}</th><th>95% interval</th><th>rows</th><th>truncated</th><th>unparsed</th><th>errors</th><th>read tokens/s</th><th>peak keys and values</th></tr>",
        escape(metric(cells)),
        cells[0].unit,
        escape(metric(cells))
    );
    for cell in cells {
        let counts = &cell.score.counts;
        let main = cell.score.main();
        let interval = main
            .and_then(|m| m.interval)
            .map_or("-".into(), |(low, high)| {
                format!("{} to {}", figure(low), figure(high))
            });
        let _ = write!(
            out,
            "<tr><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{interval}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td></tr>",
            escape(&cell.series()),
            length(cell.score.cell.length),
            main.map_or("no scored rows".into(), value),
            counts.rows,
            counts.truncated,
            counts.unparsed,
            counts.errors,
            cell.cost.prefill_tokens_per_s.map_or("-".into(), grouped),
            match cell.cost.peak_kv_bytes {
                0 => "-".to_string(),
                bytes => format!("{:.1} MB", bytes as f64 / 1e6),
            }
        );
    }
    out.push_str("</table>");
}

fn curve(out: &mut String, cells: &[&ReportCell]) {
    if lengths(cells).len() < 2 {
        return;
    }
    let names = series(cells);
    let curves: Vec<Curve> = names
        .iter()
        .map(|name| {
            let mut points: Vec<Point> = cells
                .iter()
                .filter(|cell| cell.series() == *name)
                .filter_map(|cell| {
                    let main = cell.score.main()?;
                    Some(Point {
                        x: cell.score.cell.length as f64,
                        y: main.value,
                        interval: main.interval,
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
    let x = format!("length in {}", cells[0].unit);
    *out += "<h3>By length</h3>";
    *out += &svg::legend(&names);
    *out += &svg::curves(&curves, &x, metric(cells), cells[0].higher_is_better);
}

/// Loss by position, for perplexity.
fn positions(out: &mut String, cells: &[&ReportCell]) {
    let (mut curves, mut names) = (Vec::new(), Vec::new());
    for cell in cells {
        let points: Vec<Point> = cell
            .score
            .aggregates
            .iter()
            .filter_map(|aggregate| {
                let (_, end) = aggregate.name.strip_prefix("nll at ")?.split_once('-')?;
                Some(Point {
                    x: end.parse().ok()?,
                    y: aggregate.estimate.value,
                    interval: None,
                })
            })
            .collect();
        if !points.is_empty() {
            let name = format!("{} at {}", cell.series(), length(cell.score.cell.length));
            names.push(name.clone());
            curves.push(Curve { name, points });
        }
    }
    if !curves.is_empty() {
        *out += "<h3>Loss by position</h3>";
        *out += &svg::legend(&names);
        *out += &svg::curves(
            &curves,
            "position in tokens (end of bucket)",
            "nll in nats",
            false,
        );
    }
}

fn heat_maps(out: &mut String, cells: &[&ReportCell]) {
    let columns = lengths(cells);
    let mut maps = String::new();
    for name in series(cells) {
        let of: Vec<&&ReportCell> = cells.iter().filter(|cell| cell.series() == name).collect();
        let mut depths: Vec<f64> = of
            .iter()
            .flat_map(|cell| cell.score.by.get("depth").into_iter().flatten())
            .filter_map(|(depth, _)| depth.as_f64())
            .collect();
        depths.sort_by(f64::total_cmp);
        depths.dedup();
        if depths.is_empty() {
            continue;
        }
        let cell = |x: usize, y: usize| {
            let cell = of
                .iter()
                .find(|cell| cell.score.cell.length == columns[x])?;
            let by = cell.score.by.get("depth")?;
            let (_, estimate) = by
                .iter()
                .find(|(depth, _)| depth.as_f64() == Some(depths[y]))?;
            Some((estimate.value, estimate.n))
        };
        let lengths: Vec<String> = columns.iter().map(|l| length(*l)).collect();
        let rows: Vec<String> = depths.iter().map(|d| format!("{d:.0}%")).collect();
        let title = (
            format!("length in {}", of[0].unit),
            "depth of the answer in the text",
        );
        let _ = write!(
            maps,
            "<div><h3>{}</h3>{}</div>",
            escape(&name),
            svg::heat_map((&title.0, title.1), &lengths, &rows, &cell)
        );
    }
    if !maps.is_empty() {
        let _ = write!(out, "<div class=\"maps\">{maps}</div>");
    }
}

/// The metric by the other attributes: needles, hops, directions.
fn conditions(out: &mut String, cells: &[&ReportCell]) {
    let names = cells
        .iter()
        .flat_map(|cell| cell.score.by.keys().map(String::as_str));
    for name in distinct(names) {
        if ["depth", "row", "repeat", "repeat_number"].contains(&name)
            || cells[0].score.by.get(name).is_none_or(|v| v.len() > 12)
        {
            continue;
        }
        let _ = write!(
            out,
            "<details><summary>By {}</summary><table><tr><th>model / policy</th><th>length</th>",
            escape(name)
        );
        let mut values: Vec<String> = Vec::new();
        for cell in cells {
            for (value, _) in cell.score.by.get(name).into_iter().flatten() {
                let text = plain(value);
                if !values.contains(&text) {
                    values.push(text);
                }
            }
        }
        values.iter().for_each(|value| {
            let _ = write!(out, "<th>{}</th>", escape(value));
        });
        out.push_str("</tr>");
        for cell in cells {
            let _ = write!(
                out,
                "<tr><td>{}</td><td class=\"n\">{}</td>",
                escape(&cell.series()),
                length(cell.score.cell.length)
            );
            let by = cell.score.by.get(name);
            for text in &values {
                let found = by.and_then(|by| by.iter().find(|(value, _)| plain(value) == *text));
                let shown = found.map_or("-".into(), |(_, estimate)| value(estimate));
                let _ = write!(out, "<td class=\"n\">{shown}</td>");
            }
            out.push_str("</tr>");
        }
        out.push_str("</table></details>");
    }
}

fn plain(value: &serde_json::Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_string)
}

/// Quality beside memory and speed, where several models or policies were run.
fn cost(out: &mut String, cells: &[&ReportCell]) {
    let names = series(cells);
    if names.len() < 2 {
        return;
    }
    let dots = |cost: &dyn Fn(&ReportCell) -> Option<f64>| -> Vec<Dot> {
        let dots = cells.iter().filter_map(|cell| {
            let (own, length) = (cell.series(), length(cell.score.cell.length));
            Some(Dot {
                series: names.iter().position(|name| *name == own)?,
                name: format!("{own} at {length}"),
                label: length,
                x: cost(cell)?,
                y: cell.score.main()?.value,
            })
        });
        dots.collect()
    };
    let better = cells[0].higher_is_better;
    let memory = dots(&|cell| Some(cell.cost.peak_kv_bytes as f64 / 1e6).filter(|mb| *mb > 0.0));
    let speed = dots(&|cell| cell.cost.prefill_tokens_per_s);
    let memory = svg::scatter(&memory, "peak keys and values in MB", metric(cells), better);
    let speed = svg::scatter(&speed, "read tokens per second", metric(cells), better);
    if memory.is_empty() && speed.is_empty() {
        return;
    }
    let _ = write!(
        out,
        "<h3>Quality beside cost</h3>{}<div class=\"maps\">{memory}{speed}</div>",
        svg::legend(&names)
    );
}

fn failures(out: &mut String, report: &Report) {
    if report.failures.is_empty() {
        return;
    }
    let _ = write!(
        out,
        "<h2>Wrong samples</h2><p class=\"dim\">The first {}.</p>",
        report.failures.len()
    );
    for failure in &report.failures {
        let row = &failure.row;
        let attrs: Vec<String> = row
            .attrs
            .iter()
            .map(|(name, value)| format!("{name} {}", plain(value)))
            .collect();
        let _ = write!(
            out,
            "<details><summary>{} at {}, {}: score {} <span class=\"dim\">({})</span></summary><h3>Question</h3><pre>{}</pre><h3>Expected</h3><pre>{}</pre><h3>Taken from the reply</h3><pre>{}</pre><h3>Reply</h3><pre>{}</pre><p class=\"dim\">sample {}, {} tokens read, {} written, ended by {}</p></details>",
            escape(&failure.task),
            length(failure.length),
            escape(&failure.series),
            figure(failure.value),
            escape(&attrs.join(", ")),
            escape(&row.question),
            escape(&row.references.join("\n")),
            escape(failure.extracted.as_deref().unwrap_or("(nothing)")),
            escape(&row.text),
            escape(&row.id),
            row.tokens_in,
            row.tokens_out,
            escape(&row.finish)
        );
    }
}
