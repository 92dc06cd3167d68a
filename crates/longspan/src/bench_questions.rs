//! `longspan bench questions`: many questions of one document that is prepared once, beside reading it in full for
//! every question: time, and how many answers begin with the same line.

use crate::bench_context::parse_length;
use crate::models::{self, Opened};
use crate::options::Common;
use crate::reading::kv_dtype;
use crate::ui;
use anyhow::{Context, Result, bail};
use clap::Args;
use longspan_data::document::{self, Limits};
use longspan_data::tokenize::Special;
use longspan_infer::context::ContextConfig;
use longspan_infer::engine::Want;
use longspan_infer::{EngineOptions, Sequence};
use serde_json::json;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

/// `longspan bench questions`
#[derive(Args)]
pub struct QuestionsBench {
    /// The document
    #[arg(long, required = true, value_name = "FILE")]
    text: Vec<PathBuf>,
    /// Tokens of it that are read
    #[arg(long, value_parser = parse_length, default_value = "8k", value_name = "N")]
    length: usize,
    /// Policy of the prepared document; one of about eight times fewer keys by default
    #[arg(long, default_value = "squeezed:0.875", value_name = "POLICY")]
    method: String,
    /// Questions, one a line; none = beginnings of sentences of the document, to be continued
    #[arg(long, value_name = "FILE")]
    questions: Option<PathBuf>,
    /// Questions asked
    #[arg(long, default_value_t = 20, value_name = "N")]
    count: usize,
    /// Most tokens of an answer's first line
    #[arg(long, default_value_t = 24, value_name = "N")]
    max_tokens: usize,
    /// Read the document anew for every question under full attention too, instead of counting one reading as
    /// often
    #[arg(long)]
    reread: bool,
}

/// One side's work.
#[derive(Default)]
struct Side {
    read_seconds: f64,
    index_seconds: f64,
    answer_seconds: Vec<f64>,
    answers: Vec<Vec<u32>>,
    /// Keys taken of those offered, while answering.
    kept: Option<f64>,
}

/// Words of a made question.
const WORDS: usize = 12;

/// Runs the bench.
pub fn run(args: &QuestionsBench, common: &Common) -> Result<()> {
    if args.count == 0 || args.max_tokens == 0 {
        bail!("--count and --max-tokens: expected at least 1 of each");
    }
    let method: ContextConfig = args.method.parse()?;
    let opened = models::open(common)?;
    let tokenizer = &opened.model.tokenizer;
    let mut tokens: Vec<u32> = tokenizer.bos().into_iter().collect();
    for file in &args.text {
        let text = document::read(file, &Limits::default())?.text;
        tokens.extend(tokenizer.encode(&text, Special::None)?);
    }
    if tokens.len() < args.length {
        bail!(
            "the text has {} tokens, --length is {}",
            tokens.len(),
            args.length
        );
    }
    tokens.truncate(args.length);
    let questions = match &args.questions {
        Some(path) => std::fs::read_to_string(path)
            .with_context(|| path.display().to_string())?
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .take(args.count)
            .map(|line| format!("\n\nQuestion: {line}\nAnswer:"))
            .collect(),
        None => beginnings(&tokenizer.decode(&tokens), args.count)?,
    };
    if questions.is_empty() {
        bail!("no questions");
    }
    let questions: Vec<Vec<u32>> = questions
        .iter()
        .map(|question| tokenizer.encode(question, Special::None))
        .collect::<Result<_, _>>()?;
    let full = side(
        &opened,
        common,
        &ContextConfig::Full,
        &tokens,
        &questions,
        args,
    )?;
    let own = side(&opened, common, &method, &tokens, &questions, args)?;

    let answers = full.answers.iter().zip(&own.answers);
    let same = answers.clone().filter(|(a, b)| a == b).count();
    // Shares of first lines up to where they part.
    let common_share: f64 = answers
        .map(|(a, b)| {
            let common = a.iter().zip(b).take_while(|(a, b)| a == b).count();
            common as f64 / a.len().max(b.len()).max(1) as f64
        })
        .sum::<f64>()
        / questions.len() as f64;
    let answering = |side: &Side| side.answer_seconds.iter().sum::<f64>();
    let readings = if args.reread {
        1.0
    } else {
        questions.len() as f64
    };
    let full_seconds = full.read_seconds * readings + answering(&full);
    let own_seconds = own.read_seconds + own.index_seconds + answering(&own);
    let (count, ratio) = (questions.len(), full_seconds / own_seconds);
    if common.json {
        for (index, (a, b)) in full.answers.iter().zip(&own.answers).enumerate() {
            println!(
                "{}",
                json!({ "question": tokenizer.decode(&questions[index]), "full": tokenizer.decode(a), "method": tokenizer.decode(b), "same": a == b })
            );
        }
        println!(
            "{}",
            json!({
                "model": opened.name, "method": method.to_string(), "length": args.length, "questions": count,
                "same_first_lines": same, "common_share": common_share,
                "full_read_seconds": full.read_seconds / if args.reread { count as f64 } else { 1.0 },
                "full_answer_seconds": answering(&full), "full_total_seconds": full_seconds,
                "read_seconds": own.read_seconds, "index_seconds": own.index_seconds,
                "answer_seconds": answering(&own), "total_seconds": own_seconds,
                "ratio": ratio, "kept": own.kept,
            })
        );
        return Ok(());
    }
    for (index, (a, b)) in full.answers.iter().zip(&own.answers).enumerate() {
        let mark = if a == b { "same " } else { "other" };
        println!("{mark}  {:?}", tokenizer.decode(&questions[index]));
        println!("       {:?}", tokenizer.decode(a));
        if a != b {
            println!("       {:?}", tokenizer.decode(b));
        }
    }
    println!(
        "{count} questions of {} tokens: {full_seconds:.1} s with a reading each, {own_seconds:.1} s under {method} ({:.1} s reading, {:.1} s index, {:.1} s answers): {ratio:.1} times less",
        ui::count(args.length as u64),
        own.read_seconds,
        own.index_seconds,
        answering(&own)
    );
    println!(
        "first lines agree in {same} of {count} ({:.0} % of their tokens before they part){}",
        common_share * 100.0,
        own.kept
            .map(|kept| format!("; {:.1} % of the document's keys are read", kept * 100.0))
            .unwrap_or_default()
    );
    Ok(())
}

fn side(
    opened: &Opened,
    common: &Common,
    method: &ContextConfig,
    tokens: &[u32],
    questions: &[Vec<u32>],
    args: &QuestionsBench,
) -> Result<Side> {
    let engine = &opened.model.engine;
    let options = EngineOptions {
        kv: kv_dtype(common)?,
        context: method.clone(),
    };
    let read = || -> Result<Sequence> {
        let mut sequence = engine.sequence(&options, None)?;
        sequence.expect_length(tokens.len() + 256);
        let chunk = sequence.spec().chunk;
        for piece in tokens.chunks(chunk) {
            engine.forward(&mut [(&mut sequence, piece)], Want::Nothing)?;
            if ui::interrupted() {
                return Err(ui::Interrupted("no question was answered yet".into()).into());
            }
        }
        Ok(sequence)
    };
    let mut side = Side::default();
    let rereads = args.reread && *method == ContextConfig::Full;
    let clock = Instant::now();
    let mut document = read()?;
    side.read_seconds = clock.elapsed().as_secs_f64();
    let clock = Instant::now();
    engine.seal(&mut document)?;
    side.index_seconds = clock.elapsed().as_secs_f64();
    let (mut offered, mut taken) = (0, 0);
    for (index, question) in questions.iter().enumerate() {
        if rereads && index > 0 {
            let clock = Instant::now();
            document = read()?;
            side.read_seconds += clock.elapsed().as_secs_f64();
        }
        let clock = Instant::now();
        let mut sequence = document.fork();
        let before = sequence.report();
        let mut logits = engine.prefill(&mut sequence, question, &mut |_, _| {
            Ok(ControlFlow::Continue(()))
        })?;
        let mut answer = Vec::new();
        while answer.len() < args.max_tokens {
            let best = (0..logits.len())
                .max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a)))
                .unwrap_or(0) as u32;
            if opened.model.tokenizer.eos_ids().contains(&best) {
                break;
            }
            answer.push(best);
            // The first line that says something ends the answer.
            let line = opened.model.tokenizer.decode(&answer);
            if line.trim_start().contains('\n') {
                break;
            }
            logits = engine.forward(&mut [(&mut sequence, &[best])], Want::Last)?;
        }
        side.answer_seconds.push(clock.elapsed().as_secs_f64());
        side.answers.push(answer);
        let after = sequence.report();
        offered += after.offered - before.offered;
        taken += after.taken - before.taken;
        if ui::interrupted() {
            return Err(ui::Interrupted("not all questions were answered".into()).into());
        }
    }
    side.kept = (offered > 0).then(|| taken as f64 / offered as f64);
    Ok(side)
}

/// Beginnings of sentences at even depths of a document, to be continued.
fn beginnings(text: &str, count: usize) -> Result<Vec<String>> {
    let mut sentences: Vec<Vec<&str>> = vec![Vec::new()];
    for word in text.split_whitespace() {
        let ends = word.ends_with(['.', '?', '!']);
        if let Some(sentence) = sentences.last_mut() {
            sentence.push(word);
        }
        if ends {
            sentences.push(Vec::new());
        }
    }
    // Long enough that something is left to continue; the first and the last may be pieces.
    let inner = sentences.get(1..sentences.len().saturating_sub(1));
    let long: Vec<&Vec<&str>> = inner
        .unwrap_or(&[])
        .iter()
        .filter(|sentence| sentence.len() >= WORDS + 6)
        .collect();
    if long.len() < count {
        bail!(
            "the document has {} sentences of at least {} words, expected {count}; give --questions",
            long.len(),
            WORDS + 6
        );
    }
    let asked = (0..count).map(|index| {
        let sentence = long[(2 * index + 1) * long.len() / (2 * count)];
        format!(
            "\n\nAs it is written in the text above: {}",
            sentence[..WORDS].join(" ")
        )
    });
    Ok(asked.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_beginnings_of_different_sentences() {
        let sentence = |n: usize| {
            let words: Vec<String> = (0..20).map(|word| format!("w{n}x{word}")).collect();
            format!("{}. ", words.join(" "))
        };
        let text: String = (0..12).map(sentence).collect();
        let asked = beginnings(&text, 5).unwrap();
        assert_eq!(asked.len(), 5);
        for (index, question) in asked.iter().enumerate() {
            assert!(question.ends_with("x11"), "{question}");
            assert!(asked[..index].iter().all(|other| other != question));
        }
        assert!(beginnings("Too short.", 1).is_err());
    }
}
