//! Whether the wanted strings occur in the reply: RULER's two scores.

/// The reply as RULER cleans it: trimmed, control characters 0x00 to 0x1f turned to newlines, trimmed again.
pub fn clean(prediction: &str) -> String {
    let plain: String = crate::python::strip(prediction)
        .chars()
        .map(|c| if c < ' ' { '\n' } else { c })
        .collect();
    crate::python::strip(&plain).to_string()
}

fn found<'a>(
    prediction: &'a str,
    references: &'a [impl AsRef<str>],
) -> impl Iterator<Item = f64> + 'a {
    let prediction = prediction.to_lowercase();
    references
        .iter()
        .map(move |r| f64::from(u8::from(prediction.contains(&r.as_ref().to_lowercase()))))
}

/// The share of references that occur in the prediction, case ignored, 0 to 1; 0 without references.
pub fn all(prediction: &str, references: &[impl AsRef<str>]) -> f64 {
    found(prediction, references).sum::<f64>() / references.len().max(1) as f64
}

/// 1 if any reference occurs in the prediction, case ignored.
pub fn part(prediction: &str, references: &[impl AsRef<str>]) -> f64 {
    found(prediction, references).fold(0.0, f64::max)
}
