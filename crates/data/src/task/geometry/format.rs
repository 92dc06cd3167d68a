//! Text files of geometric examples, as the data of paper 39 is published: `x1 y1 ... xn yn output i1 ... im`, one example
//! a line, indices from 1; and TSPLIB's files of Euclidean tours.

use super::exact::Point;
use std::fmt::Write;

/// One line of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// The input.
    pub points: Vec<Point>,
    /// Indices of the answer, from 0.
    pub answer: Vec<usize>,
}

/// What is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: found {found}, expected {expected}")]
pub struct FormatError {
    line: usize,
    found: String,
    expected: &'static str,
}

fn wrong(line: usize, found: impl ToString, expected: &'static str) -> FormatError {
    FormatError {
        line,
        found: found.to_string(),
        expected,
    }
}

/// A line for this example. `closed` repeats the first index at the end, as files of hulls and tours do.
pub fn write_line(points: &[Point], answer: &[usize], closed: bool) -> String {
    let mut out = String::new();
    for [x, y] in points {
        let _ = write!(out, "{x} {y} ");
    }
    out += "output";
    for index in answer.iter().chain(answer.first().filter(|_| closed)) {
        let _ = write!(out, " {}", index + 1);
    }
    out
}

/// All examples of a file; empty lines are passed over. `closed` drops a last index that equals the first.
pub fn read_lines(text: &str, closed: bool) -> Result<Vec<Line>, FormatError> {
    let mut out = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let number = number + 1;
        let mut words = line.split_whitespace();
        let mut numbers = Vec::new();
        let mut separated = false;
        for word in words.by_ref() {
            if word == "output" {
                separated = true;
                break;
            }
            let value: f64 = word
                .parse()
                .map_err(|_| wrong(number, format!("{word:?}"), "a coordinate or `output`"))?;
            if !value.is_finite() {
                return Err(wrong(number, word, "a finite coordinate"));
            }
            numbers.push(value);
        }
        if numbers.is_empty() && !separated {
            continue;
        }
        if !separated {
            return Err(wrong(
                number,
                "no `output`",
                "`output` between points and indices",
            ));
        }
        if numbers.is_empty() || !numbers.len().is_multiple_of(2) {
            let found = format!("{} coordinates", numbers.len());
            return Err(wrong(number, found, "pairs of coordinates"));
        }
        let points: Vec<Point> = numbers.chunks(2).map(|p| [p[0], p[1]]).collect();
        let mut answer = Vec::new();
        for word in words {
            match word.parse::<usize>() {
                Ok(index) if (1..=points.len()).contains(&index) => answer.push(index - 1),
                _ => {
                    let found = format!("index {word:?}");
                    return Err(wrong(number, found, "the number of a point, from 1"));
                }
            }
        }
        if closed && answer.len() > 1 && answer.first() == answer.last() {
            answer.pop();
        }
        out.push(Line { points, answer });
    }
    Ok(out)
}

/// The cities of a TSPLIB file of type `EUC_2D`, in the order of the file.
pub fn read_tsplib(text: &str) -> Result<Vec<Point>, FormatError> {
    let mut out = Vec::new();
    let (mut inside, mut euclidean, mut last) = (false, false, 0);
    for (number, line) in text.lines().enumerate() {
        let number = number + 1;
        last = number;
        let line = line.trim();
        if line == "EOF" {
            break;
        }
        if !inside {
            if let Some((key, value)) = line.split_once(':')
                && key.trim() == "EDGE_WEIGHT_TYPE"
            {
                euclidean = value.trim() == "EUC_2D";
                if !euclidean {
                    return Err(wrong(number, value.trim(), "EDGE_WEIGHT_TYPE EUC_2D"));
                }
            }
            inside = line == "NODE_COORD_SECTION";
            continue;
        }
        let mut values = line.split_whitespace().skip(1).map(str::parse::<f64>);
        match (values.next(), values.next()) {
            (Some(Ok(x)), Some(Ok(y))) if x.is_finite() && y.is_finite() => out.push([x, y]),
            _ => return Err(wrong(number, format!("{line:?}"), "a city: number, x, y")),
        }
    }
    if !euclidean || out.is_empty() {
        return Err(wrong(
            last,
            "the end",
            "EDGE_WEIGHT_TYPE and NODE_COORD_SECTION before it",
        ));
    }
    Ok(out)
}
