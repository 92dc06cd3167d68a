//! Figures as inline SVG: heat map, curves with intervals, quality beside cost.

use super::{figure, grouped, length};
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
    let caption = format!("across: {}; down: {}", title.0, title.1);
    // Seven units a letter of size 12 are enough.
    let width = (left + w * columns.len() + 8).max(left + 7 * caption.chars().count());
    let height = top + h * rows.len() + 40;
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
        "<text x=\"{left}\" y=\"{}\" fill=\"#555\">{}</text></svg>",
        height - 12,
        escape(&caption)
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

/// An axis: its range and the round values named on it.
struct Axis {
    low: f64,
    high: f64,
    ticks: Vec<f64>,
    /// Decimals that tell the ticks apart.
    places: usize,
}

impl Axis {
    /// Round values at equal steps around all of these; `zero_to_one` for scores.
    fn new(values: impl Iterator<Item = f64>, zero_to_one: bool) -> Axis {
        let (mut low, mut high) = values
            .filter(|v| v.is_finite())
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| {
                (l.min(v), h.max(v))
            });
        if zero_to_one || !low.is_finite() {
            (low, high) = (0.0, 1.0);
        } else if high - low < 1e-9 * high.abs().max(1.0) {
            let room = (high.abs() * 0.1).max(1e-3);
            (low, high) = (low - room, high + room);
        }
        // Four or five steps of 1, 2, 2.5 or 5 times a power of ten.
        let least = (high - low) / 4.5;
        let power = 10f64.powf(least.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|factor| factor * power);
        let step = step.into_iter().find(|step| *step >= least);
        let step = step.unwrap_or(10.0 * power);
        let from = (low / step + 1e-9).floor();
        let to = (high / step - 1e-9).ceil();
        let count = (to - from) as usize;
        let places = (0..9).find(|&places| {
            let scaled = step * 10f64.powi(places);
            (scaled - scaled.round()).abs() < 1e-6 * scaled
        });
        Axis {
            low: from * step,
            high: to * step,
            ticks: (0..=count).map(|i| (from + i as f64) * step).collect(),
            places: places.unwrap_or(9) as usize,
        }
    }

    /// Where a value lies between both ends.
    fn share(&self, value: f64) -> f64 {
        ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }

    fn name(&self, tick: f64) -> String {
        // No minus before zero.
        let tick = if tick.abs() < 1e-12 { 0.0 } else { tick };
        match self.places {
            0 => grouped(tick),
            places => format!("{tick:.places$}"),
        }
    }
}

/// Frame, horizontal lines and axis names.
fn frame(out: &mut String, y: &Axis, x_name: &str, y_name: &str) {
    let _ = write!(
        out,
        "<svg role=\"img\" viewBox=\"0 0 {W} {H}\" width=\"{W}\" height=\"{H}\" font-size=\"12\">"
    );
    for &value in &y.ticks {
        let at = TOP + (H - TOP - BOTTOM) * (1.0 - y.share(value));
        let _ = write!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            W - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            y.name(value)
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
    let y = Axis::new(ys, zero_to_one);
    let x_at = |x: f64| {
        let share = if last > first {
            (x.max(1.0).ln() - first) / (last - first)
        } else {
            0.5
        };
        LEFT + 14.0 + (W - LEFT - RIGHT - 28.0) * share
    };
    let y_at = |v: f64| TOP + (H - TOP - BOTTOM) * (1.0 - y.share(v));
    let mut out = String::new();
    frame(&mut out, &y, x_name, y_name);
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

/// A point of a scatter.
pub struct Dot {
    /// The series that it belongs to, for its colour.
    pub series: usize,
    /// Its name in full, shown when it is pointed at.
    pub name: String,
    /// A word or two beside it.
    pub label: String,
    /// Cost.
    pub x: f64,
    /// Quality.
    pub y: f64,
}

/// Quality over cost (x linear from 0); points of one series have one colour. A point that is not finite stays out.
pub fn scatter(dots: &[Dot], x_name: &str, y_name: &str, zero_to_one: bool) -> String {
    let dots = || dots.iter().filter(|d| d.x.is_finite() && d.y.is_finite());
    if dots().all(|dot| dot.x <= 0.0) {
        return String::new();
    }
    let y = Axis::new(dots().map(|dot| dot.y), zero_to_one);
    let x = Axis::new(dots().map(|dot| dot.x).chain([0.0]), false);
    let x_at = |v: f64| LEFT + (W - LEFT - RIGHT - 24.0) * x.share(v);
    let y_at = |v: f64| TOP + (H - TOP - BOTTOM) * (1.0 - y.share(v));
    let mut out = String::new();
    frame(&mut out, &y, x_name, y_name);
    for &tick in &x.ticks {
        let _ = write!(
            out,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            x_at(tick),
            H - BOTTOM + 18.0,
            x.name(tick)
        );
    }
    for dot in dots() {
        let (at, height) = (x_at(dot.x), y_at(dot.y));
        let _ = write!(
            out,
            "<circle cx=\"{at:.1}\" cy=\"{height:.1}\" r=\"5\" fill=\"{}\" fill-opacity=\"0.85\"><title>{}: {} at {}</title></circle><text x=\"{:.1}\" y=\"{:.1}\" font-size=\"11\" fill=\"#555\">{}</text>",
            colour(dot.series),
            escape(&dot.name),
            figure(dot.y),
            figure(dot.x),
            at + 8.0,
            height + if height < TOP + 12.0 { 14.0 } else { -6.0 },
            escape(&dot.label)
        );
    }
    out += "</svg>";
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(values: &[f64], score: bool) -> Vec<String> {
        let axis = Axis::new(values.iter().copied(), score);
        for value in values {
            let share = axis.share(*value);
            assert!((0.0..=1.0).contains(&share));
            let back = axis.low + share * (axis.high - axis.low);
            assert!((back - value).abs() <= 1e-6 * value.abs().max(1.0));
        }
        axis.ticks.iter().map(|&tick| axis.name(tick)).collect()
    }

    #[test]
    fn ticks_are_round_and_hold_all_values() {
        let scores = ["0.00", "0.25", "0.50", "0.75", "1.00"];
        assert_eq!(names(&[0.3, 0.9], true), scores);
        let rates = ["0", "5,000", "10,000", "15,000"];
        assert_eq!(names(&[0.0, 12037.0, 3153.0], false), rates);
        assert_eq!(names(&[1.5, 6.4], false), ["0", "2", "4", "6", "8"]);
        assert_eq!(
            names(&[-1.0, 1.0], false),
            ["-1.0", "-0.5", "0.0", "0.5", "1.0"]
        );
        assert!(names(&[7.0], false).len() >= 3);
        assert!(names(&[0.0], false).len() >= 3);
        assert_eq!(names(&[], false), scores);
    }

    #[test]
    fn dots_have_their_series_colour_and_a_label() {
        let dot = |series, label: &str, x, y| Dot {
            series,
            name: format!("s{series}"),
            label: label.into(),
            x,
            y,
        };
        let dots = [
            dot(0, "1k", 10.0, 0.5),
            dot(0, "2k", 20.0, 0.4),
            dot(1, "1k", f64::NAN, 0.4),
        ];
        let figure = scatter(&dots, "cost", "score", true);
        assert_eq!(figure.matches(colour(0)).count(), 2);
        assert_eq!(figure.matches(colour(1)).count(), 0);
        assert!(figure.contains(">2k</text>"));
        assert_eq!(scatter(&dots[2..], "cost", "score", true), "");
    }
}
