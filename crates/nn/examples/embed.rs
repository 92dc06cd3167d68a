//! The vectors of lines of text, one JSON list a line: what `scripts/parity/bert.py` compares.
//!
//!     embed FOLDER [f32|packed] < texts

use candle_core::{DType, Device};
use longspan_nn::model::{Precision, TextEncoder};
use std::io::Read;
use std::path::Path;
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments
        .next()
        .ok_or("usage: embed FOLDER [f32|packed] < texts")?;
    let precision = match arguments.next().as_deref() {
        None | Some("f32") => Precision::Dense(DType::F32),
        Some("packed") => Precision::Packed,
        Some(other) => return Err(format!("precision {other}, expected f32 or packed").into()),
    };
    let encoder = TextEncoder::open(Path::new(&folder), precision, &Device::Cpu)?;
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let lines: Vec<&str> = text.lines().collect();
    let start = Instant::now();
    let vectors = encoder.embed(&lines)?;
    let seconds = start.elapsed().as_secs_f64();
    let tokens = lines
        .iter()
        .map(|line| encoder.tokens(line).map(|ids| ids.len()))
        .sum::<Result<usize, _>>()?;
    eprintln!(
        "{} texts, {tokens} tokens in {seconds:.3} s: {:.0} tokens/s",
        lines.len(),
        tokens as f64 / seconds
    );
    for vector in vectors.chunks_exact(encoder.dim()) {
        println!("{}", serde_json::to_string(vector)?);
    }
    Ok(())
}
