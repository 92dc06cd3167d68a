//! Fields of JSON rows, for tests that read goldens.

#![allow(dead_code)] // Not every test needs all of them.

use serde_json::Value;

pub fn text<'a>(row: &'a Value, key: &str) -> &'a str {
    row[key]
        .as_str()
        .unwrap_or_else(|| panic!("no text `{key}` in {row}"))
}

pub fn texts(value: &Value) -> Vec<String> {
    serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{value}: {e}"))
}

pub fn number(row: &Value, key: &str) -> f64 {
    row[key]
        .as_f64()
        .unwrap_or_else(|| panic!("no number `{key}` in {row}"))
}

pub fn close(found: f64, expected: f64, row: &Value) {
    assert!(
        (found - expected).abs() <= 1e-9,
        "{found}, not {expected}, for {row}"
    );
}
