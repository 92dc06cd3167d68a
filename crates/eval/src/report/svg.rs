//! Figures as inline SVG: heat map, curves with intervals, quality beside cost.

use super::{figure, length};
use std::fmt::Write;

/// Text made safe for HTML.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            c if c.is_control() && c != '\n' && c != '\t' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// Line colours, told apart by people with colour-blindness too (Okabe and Ito).
const COLOURS: [&str; 12] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#b8860b",
    "#882255", "#117733", "#332288", "#aa4499",
];

/// The colour of a series.
pub fn colour(index: usize) -> &'static str {
    COLOURS[index % COLOURS.len()]
}

/// Light to dark blue for 0 to 1.
fn shade(share: f64) -> (String, &'static str) {
    let t = share.clamp(0.0, 1.0);
    let mix = |from: f64, to: f64| (from + (to - from) * t).round() as u8;
    let fill = format!(
        "rgb({},{},{})",
        mix(247.0, 8.0),
        mix(251.0, 64.0),
        mix(255.0, 129.0)
    );
    (fill, if t > 0.5 { "#fff" } else { "#111" })
}

/// A map of (column, row) cells; None = not run. Values are 0 to 1, printed in the cell, with the
/// count as a tooltip.
pub fn heat_map(
    title: (&str, &str),
    columns: &[String],
    rows: &[String],
    cell: &dyn Fn(usize, usize) -> Option<(f64, usize)>,
) -> String {
    let (w, h, left, top) = (62, 26, 76, 22);
    let (width, height) = (left + w * columns.len() + 8, top + h * rows.len() + 40);
    let mut out = format!(
        "<svg role=\"img\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" font-size=\"12\">"
    );
    for (x, name) in columns.iter().enumerate() {
        let at = left + x * w + w / 2;
        let _ = write!(
            out,
            "<text x=\"{at}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            top - 7,
            escape(name)
        );
    }
    for (y, name) in rows.iter().enumerate() {
        let at = top + y * h;
        let _ = write!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
            left - 8,
            at + h / 2 + 4,
            escape(name)
        );
        for x in 0..columns.len() {
            let (fill, ink, text, tip) = match cell(x, y) {
                Some((value, n)) => {
                    let (fill, ink) = shade(value);
                    (
                        fill,
                        ink,
                        format!("{value:.2}"),
                        format!("{value:.3}, {n} rows"),
                    )
                }
                None => ("#ccc".into(), "#555", "-".into(), "not run".into()),
            };
            let left = left + x * w;
            let _ = write!(
                out,
                "<g><title>{tip}</title><rect x=\"{left}\" y=\"{at}\" width=\"{}\" height=\"{}\" fill=\"{fill}\"/><text x=\"{}\" y=\"{}\" text-anchor=\"middle\" fill=\"{ink}\">{text}</text></g>",
                w - 2,
                h - 2,
                left + w / 2 - 1,
                at + h / 2 + 4
            );
        }
    }
    let _ = write!(
        out,
        "<text x=\"{left}\" y=\"{}\" fill=\"#555\">across: {}; down: {}</text></svg>",
        height - 12,
        escape(title.0),
        escape(title.1)
    );
    out
}

/// A point with an interval.
#[derive(Clone, Debug)]
pub struct Point {
    /// Where.
    pub x: f64,
    /// Value.
    pub y: f64,
    /// 95% interval.
    pub interval: Option<(f64, f64)>,
}

/// A named curve.
pub struct Curve {
    /// Its name.
    pub name: String,
    /// In order of x.
    pub points: Vec<Point>,
}

const W: f64 = 640.0;
const H: f64 = 320.0;
const LEFT: f64 = 64.0;
const TOP: f64 = 14.0;
const RIGHT: f64 = 20.0;
const BOTTOM: f64 = 46.0;

/// A plain axis range with a little room; `zero_to_one` for scores.
fn range(values: impl Iterator<Item = f64>, zero_to_one: bool) -> (f64, f64) {
    if zero_to_one {
        return (0.0, 1.0);
    }
    let (low, high) = values
        .filter(|v| v.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| {
            (l.min(v), h.max(v))
        });
    if !low.is_finite() {
        return (0.0, 1.0);
    }
    let room = ((high - low) * 0.08).max(high.abs() * 0.02).max(1e-9);
    (low - room, high + room)
}

/// Frame, horizontal lines and axis names.
fn frame(out: &mut String, y: (f64, f64), x_name: &str, y_name: &str) {
    let _ = write!(
        out,
        "<svg role=\"img\" viewBox=\"0 0 {W} {H}\" width=\"{W}\" height=\"{H}\" font-size=\"12\">"
    );
    for step in 0..=4 {
        let share = f64::from(step) / 4.0;
        let value = y.0 + (y.1 - y.0) * share;
        let at = TOP + (H - TOP - BOTTOM) * (1.0 - share);
        let _ = write!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            W - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            figure(value)
        );
    }
    let _ = write!(
        out,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\" fill=\"#555\">{}</text><text transform=\"translate(14 {}) rotate(-90)\" text-anchor=\"middle\" fill=\"#555\">{}</text>",
        LEFT + (W - LEFT - RIGHT) / 2.0,
        H - 8.0,
        escape(x_name),
        TOP + (H - TOP - BOTTOM) / 2.0,
        escape(y_name)
    );
}

/// Names of curves with their colours.
pub fn legend(names: &[String]) -> String {
    let items: Vec<String> = names
        .iter()
        .enumerate()
        .map(|(i, name)| {
            format!(
                "<span class=\"key\"><i style=\"background:{}\"></i>{}</span>",
                colour(i),
                escape(name)
            )
        })
        .collect();
    format!("<p class=\"legend\">{}</p>", items.concat())
}

/// Curves over a logarithmic x with 95% intervals.
pub fn curves(curves: &[Curve], x_name: &str, y_name: &str, zero_to_one: bool) -> String {
    let all = || curves.iter().flat_map(|c| &c.points);
    let mut ticks: Vec<f64> = all().map(|p| p.x).collect();
    ticks.sort_by(f64::total_cmp);
    ticks.dedup();
    let (first, last) = match (ticks.first(), ticks.last()) {
        (Some(first), Some(last)) => (first.max(1.0).ln(), last.max(1.0).ln()),
        _ => return String::new(),
    };
    let ys = all().flat_map(|p| {
        let (low, high) = p.interval.unwrap_or((p.y, p.y));
        [p.y, low, high]
    });
    let y = range(ys, zero_to_one);
    let x_at = |x: f64| {
        let share = if last > first {
            (x.max(1.0).ln() - first) / (last - first)
        } else {
            0.5
        };
        LEFT + 14.0 + (W - LEFT - RIGHT - 28.0) * share
    };
    let y_at =
        |v: f64| TOP + (H - TOP - BOTTOM) * (1.0 - ((v - y.0) / (y.1 - y.0)).clamp(0.0, 1.0));
    let mut out = String::new();
    frame(&mut out, y, x_name, y_name);
    let mut shown = f64::NEG_INFINITY;
    for tick in &ticks {
        let at = x_at(*tick);
        // Names that would overlap are left out; the points stay.
        if at - shown >= 34.0 {
            shown = at;
            let _ = write!(
                out,
                "<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                H - BOTTOM + 18.0,
                length(*tick as usize)
            );
        }
    }
    for (index, curve) in curves.iter().enumerate() {
        let ink = colour(index);
        // A little to the side, so that equal curves stay visible.
        let shift = (index as f64 - (curves.len() as f64 - 1.0) / 2.0) * 3.0;
        let path: Vec<String> = curve
            .points
            .iter()
            .map(|p| format!("{:.1},{:.1}", x_at(p.x) + shift, y_at(p.y)))
            .collect();
        let _ = write!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{ink}\" stroke-width=\"2\"/>",
            path.join(" ")
        );
        for p in &curve.points {
            let at = x_at(p.x) + shift;
            if let Some((low, high)) = p.interval {
                let _ = write!(
                    out,
                    "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"{ink}\" stroke-opacity=\"0.6\"/>",
                    y_at(low),
                    y_at(high)
                );
            }
            let _ = write!(
                out,
                "<circle cx=\"{at:.1}\" cy=\"{:.1}\" r=\"3.5\" fill=\"{ink}\"><title>{}: {} at {}</title></circle>",
                y_at(p.y),
                escape(&curve.name),
                figure(p.y),
                length(p.x as usize)
            );
        }
    }
    out += "</svg>";
    out
}

/// Named points: quality over cost (x linear from 0). A point that is not finite stays out and keeps its colour.
pub fn scatter(
    points: &[(String, f64, f64)],
    x_name: &str,
    y_name: &str,
    zero_to_one: bool,
) -> String {
    let most = points.iter().map(|p| p.1).fold(0.0, f64::max) * 1.15;
    if points.is_empty() || most <= 0.0 {
        return String::new();
    }
    let y = range(points.iter().map(|p| p.2), zero_to_one);
    let x_at = |x: f64| LEFT + (W - LEFT - RIGHT) * x / most;
    let y_at =
        |v: f64| TOP + (H - TOP - BOTTOM) * (1.0 - ((v - y.0) / (y.1 - y.0)).clamp(0.0, 1.0));
    let mut out = String::new();
    frame(&mut out, y, x_name, y_name);
    for step in 0..=4 {
        let x = most * f64::from(step) / 4.0;
        let _ = write!(
            out,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            x_at(x),
            H - BOTTOM + 18.0,
            figure(x)
        );
    }
    for (index, (name, x, v)) in points.iter().enumerate() {
        if !x.is_finite() || !v.is_finite() {
            continue;
        }
        let _ = write!(
            out,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"6\" fill=\"{}\" fill-opacity=\"0.85\"><title>{}: {} at {}</title></circle>",
            x_at(*x),
            y_at(*v),
            colour(index),
            escape(name),
            figure(*v),
            figure(*x)
        );
    }
    out += "</svg>";
    out
}
