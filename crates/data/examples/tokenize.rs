//! Prints the token ids of a file, one per line, and the speed: the hook of scripts/parity/tokenizers.py.
//!
//! `tokenize VOCAB TEXT none|parse|bos`: VOCAB is a tokenizer.json, a folder with one, or a JSON object with the fields
//! of a GGUF vocabulary (as the script exports it).

use longspan_data::tokenize::{GgufVocab, Special, Tokenizer};
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [vocab, text, special] = arguments.as_slice() else {
        return Err("usage: tokenize VOCAB TEXT none|parse|bos".into());
    };
    let special = match special.as_str() {
        "none" => Special::None,
        "parse" => Special::Parse,
        "bos" => Special::ParseWithBos,
        other => return Err(format!("`{other}` is not none, parse or bos").into()),
    };
    let started = std::time::Instant::now();
    let path = Path::new(vocab);
    let fields: Option<GgufVocab> = match path.is_dir() {
        true => None,
        false => serde_json::from_slice(&std::fs::read(path)?).ok(),
    };
    let tokenizer = match fields {
        Some(fields) => Tokenizer::from_gguf(&fields)?,
        None => Tokenizer::from_dir(path)?,
    };
    let built = started.elapsed();
    let text = std::fs::read_to_string(text)?;
    let started = std::time::Instant::now();
    let ids = tokenizer.encode(&text, special)?;
    let took = started.elapsed();
    let decoded = tokenizer.decode(&ids);
    eprintln!(
        "{} tokens from {} bytes in {:.3} s ({:.1} MB/s); built in {:.3} s; decodes to the text: {}",
        ids.len(),
        text.len(),
        took.as_secs_f64(),
        text.len() as f64 / 1e6 / took.as_secs_f64(),
        built.as_secs_f64(),
        decoded == text,
    );
    let mut out = String::with_capacity(ids.len() * 7);
    for id in ids {
        out.push_str(&id.to_string());
        out.push('\n');
    }
    print!("{out}");
    Ok(())
}
