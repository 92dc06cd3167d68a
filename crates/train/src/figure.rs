//! Curves as SVG: of runs and of reproduced claims. Self-contained, readable without colour by their labels.

use std::fmt::Write;

/// One line of a figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// Written in the legend.
    pub name: String,
    /// (x, y); values that are not finite are left out.
    pub points: Vec<(f64, f64)>,
}

/// Told apart by people with colour-blindness too (Okabe and Ito).
const COLOURS: [&str; 8] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#b8860b",
];
const DASHES: [&str; 3] = ["", "6 3", "2 3"];

/// Makes text safe for SVG and HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// An SVG of curves. `log_y` draws powers of ten at equal distances.
pub fn curves(title: &str, x_name: &str, y_name: &str, curves: &[Curve], log_y: bool) -> String {
    let (width, height, left, top, right, bottom) = (720.0, 400.0, 70.0, 36.0, 190.0, 48.0);
    let fits = |&(x, y): &(f64, f64)| x.is_finite() && y.is_finite() && (!log_y || y > 0.0);
    let scale = |y: f64| if log_y { y.log10() } else { y };
    let shown: Vec<(f64, f64)> = curves
        .iter()
        .flat_map(|curve| curve.points.iter().copied().filter(fits))
        .map(|(x, y)| (x, scale(y)))
        .collect();
    let span = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
            (low.min(v), high.max(v))
        });
        if low > high {
            (0.0, 1.0)
        } else if low == high {
            (low - 0.5, high + 0.5)
        } else {
            (low, high)
        }
    };
    let (x0, x1) = span(&mut shown.iter().map(|p| p.0));
    let (y0, y1) = span(&mut shown.iter().map(|p| p.1));
    let px = |x: f64| left + (x - x0) / (x1 - x0) * (width - left - right);
    let py = |y: f64| height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\
         <text x=\"{left}\" y=\"20\" font-size=\"14\">{}</text>",
        escape(title)
    );
    for tick in 0..=4 {
        let share = f64::from(tick) / 4.0;
        let (x, y) = (x0 + share * (x1 - x0), y0 + share * (y1 - y0));
        let label = if log_y { 10f64.powf(y) } else { y };
        let _ = write!(
            out,
            "<line x1=\"{left}\" x2=\"{:.1}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{2:.1}\" y=\"{3:.1}\" text-anchor=\"end\">{4}</text>\
             <text x=\"{5:.1}\" y=\"{6:.1}\" text-anchor=\"middle\">{7}</text>",
            width - right,
            py(y),
            left - 6.0,
            py(y) + 4.0,
            short(label),
            px(x),
            height - bottom + 16.0,
            short(x)
        );
    }
    let _ = write!(
        out,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
         <text transform=\"translate(14 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
        (left + width - right) / 2.0,
        height - 10.0,
        escape(x_name),
        (top + height - bottom) / 2.0,
        escape(y_name)
    );
    for (index, curve) in curves.iter().enumerate() {
        let (colour, dash) = (COLOURS[index % 8], DASHES[(index / 8) % 3]);
        let points: Vec<(f64, f64)> = curve.points.iter().copied().filter(fits).collect();
        let path: Vec<String> = points
            .iter()
            .map(|&(x, y)| format!("{:.1},{:.1}", px(x), py(scale(y))))
            .collect();
        let _ = write!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.8\" stroke-dasharray=\"{dash}\"/>",
            path.join(" ")
        );
        if points.len() <= 24 {
            for (x, y) in points {
                let _ = write!(
                    out,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"><title>{}: {}, {}</title></circle>",
                    px(x),
                    py(scale(y)),
                    escape(&curve.name),
                    short(x),
                    short(y)
                );
            }
        }
        let y = top + 8.0 + 18.0 * index as f64;
        let _ = write!(
            out,
            "<line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"{colour}\" stroke-width=\"2\" \
             stroke-dasharray=\"{dash}\"/><text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            width - right + 10.0,
            width - right + 34.0,
            width - right + 40.0,
            y + 4.0,
            escape(&curve.name)
        );
    }
    out += "</svg>\n";
    out
}

/// A number in few characters.
fn short(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 {
        "0".into()
    } else if !(1e-3..1e5).contains(&size) {
        format!("{value:.1e}")
    } else if size >= 100.0 {
        format!("{value:.0}")
    } else {
        let text = format!("{value:.3}");
        text.trim_end_matches('0').trim_end_matches('.').to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_are_drawn_and_text_is_escaped() {
        let list = [
            Curve {
                name: "a<b".into(),
                points: vec![(1.0, 10.0), (2.0, f64::NAN), (3.0, 1000.0), (4.0, 0.0)],
            },
            Curve {
                name: "flat".into(),
                points: vec![],
            },
        ];
        for log in [false, true] {
            let svg = curves("t & u", "x", "y", &list, log);
            assert!(svg.contains("a&lt;b") && svg.contains("t &amp; u") && !svg.contains("NaN"));
            assert_eq!(svg.matches("<circle").count(), if log { 2 } else { 3 });
        }
        assert_eq!(short(0.125), "0.125");
        assert_eq!(short(12345.0), "12345");
        assert_eq!(short(1e-7), "1.0e-7");
    }
}
