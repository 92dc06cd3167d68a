//! Numbers as CPython rounds, prints and reads them.

use super::chars::{decimal_value, is_space};

/// `round(value, digits)`: the exact decimal value of the double, rounded half to even, then the nearest
/// double. (Multiplying, rounding and dividing, as numpy does, gives other results.)
pub fn round(value: f64, digits: usize) -> f64 {
    if !value.is_finite() {
        return value;
    }
    if digits == 0 {
        return value.round_ties_even();
    }
    // Rust prints the exact decimal expansion rounded half to even, as Python's dtoa does.
    format!("{value:.digits$}").parse().unwrap_or(value)
}

/// `repr(value)`: the shortest digits that read back, in Python's choice of notation.
pub fn repr_float(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{value:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        if plain.contains('.') {
            plain
        } else {
            plain + ".0"
        }
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{mantissa}e{sign}{:02}", exponent.abs())
    }
}

/// `float(text)`: spaces around, underscores between digits, `inf`, `nan` and digits of any script are
/// read; `None` where Python raises.
pub fn parse_float(text: &str) -> Option<f64> {
    // An ASCII text is stripped of C's whitespace alone, which lacks 0x1c to 0x1f.
    let c_space = |c: char| matches!(c, ' ' | '\t'..='\r');
    let trimmed = if text.is_ascii() {
        text.trim_matches(c_space)
    } else {
        text.trim_matches(is_space)
    };
    let mut plain = String::with_capacity(text.len());
    let trimmed: Vec<char> = trimmed.chars().collect();
    for (index, &c) in trimmed.iter().enumerate() {
        if c == '_' {
            let digit = |at: Option<usize>| {
                at.and_then(|at| trimmed.get(at))
                    .is_some_and(|&c| decimal_value(c).is_some())
            };
            if !digit(index.checked_sub(1)) || !digit(Some(index + 1)) {
                return None;
            }
        } else if let Some(digit) = decimal_value(c) {
            plain.push(char::from_digit(digit, 10)?);
        } else {
            plain.push(c);
        }
    }
    // Rust reads the same grammar: sign, digits, point, exponent, inf, infinity, nan in any case.
    plain.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_half_to_even_on_the_exact_value() {
        assert_eq!(round(0.125, 2), 0.12);
        assert_eq!(round(0.375, 2), 0.38);
        assert_eq!(round(2.675, 2), 2.67);
        assert_eq!(round(2.5, 0), 2.0);
        assert_eq!(round(-0.25, 1), -0.2);
        assert_eq!(round(1e22, 2), 1e22);
        assert!(round(f64::NAN, 2).is_nan());
    }

    #[test]
    fn floats_print_as_python_prints_them() {
        let cases = [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (1e15, "1000000000000000.0"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (-0.0, "-0.0"),
            (f64::NEG_INFINITY, "-inf"),
        ];
        for (value, text) in cases {
            assert_eq!(repr_float(value), text);
        }
    }

    #[test]
    fn floats_are_read_as_python_reads_them() {
        assert_eq!(parse_float(" 1_000.5\n"), Some(1000.5));
        assert_eq!(parse_float("１２"), Some(12.0));
        assert_eq!(parse_float("-Infinity"), Some(f64::NEG_INFINITY));
        assert_eq!(parse_float("1."), Some(1.0));
        assert_eq!(parse_float(".5e3"), Some(500.0));
        for bad in ["", "1__0", "_1", "1_", "0x10", "1,000", "1 2", ".", "e5"] {
            assert_eq!(parse_float(bad), None, "{bad}");
        }
    }
}
