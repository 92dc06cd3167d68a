//! Probes of what a model does with length: `bench first-sentence` (Llama 2 Long, arXiv 2309.16039),
//! `bench key-context` (XL3M, arXiv 2405.17755) and `bench loss`, the loss by position.

use crate::models::{self, Opened};
use crate::options::Common;
use crate::reading::kv_dtype;
use crate::ui;
use anyhow::{Result, bail};
use clap::Args;
use longspan_data::document::{self, Limits};
use longspan_data::tokenize::Special;
use longspan_infer::EngineOptions;
use longspan_infer::engine::Want;
use longspan_infer::key_context::{
    EngineSource, KeyContextConfig, KeyContextPlan, KeyContextPlanner, Shape,
};
use serde_json::json;
use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

/// `longspan bench loss`
#[derive(Args)]
pub struct Loss {
    /// Documents to read
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Tokens of a text; the documents are cut into as many as they hold
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
    /// Most texts
    #[arg(long, default_value_t = 1)]
    texts: usize,
    /// Positions averaged into one number
    #[arg(long, default_value_t = 512)]
    bucket: usize,
}

/// `longspan bench first-sentence`
#[derive(Args)]
pub struct FirstSentence {
    /// Documents to take texts from
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Tokens of the texts
    #[arg(long, value_delimiter = ',', default_value = "256,1024,2048,4096,8192")]
    lengths: Vec<usize>,
    /// Texts of each length
    #[arg(long, default_value_t = 10)]
    texts: usize,
}

/// `longspan bench key-context`
#[derive(Args)]
pub struct KeyContext {
    /// Prose to hide the number in; none = filler sentences
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens of a prompt
    #[arg(long, default_value_t = 3000)]
    length: usize,
    /// Number of prompts
    #[arg(long, default_value_t = 20)]
    prompts: usize,
    /// Tokens of a segment
    #[arg(long, default_value_t = 512)]
    segment: usize,
    /// Tokens from one segment's start to the next; default the segment
    #[arg(long)]
    stride: Option<usize>,
    /// Most segments kept
    #[arg(long, default_value_t = 4)]
    keep: usize,
    /// Treat the model's window as this many tokens
    #[arg(long)]
    window: Option<usize>,
    /// Segments read at once
    #[arg(long, default_value_t = 8)]
    batch: usize,
}

/// How the first sentence is asked for; the paper does not publish its words.
const FIRST_SENTENCE: &str =
    "What is the first sentence of the text? Copy it word for word and write nothing else.";
/// The start of the answer, which models without instruction tuning need.
const PRIMED: &str = "The first sentence of the text is: \"";
/// Words of a sentence worth asking for.
const WORDS: std::ops::RangeInclusive<usize> = 8..=40;

fn text_of(files: &[PathBuf]) -> Result<String> {
    let limits = Limits::default();
    let mut text = String::new();
    for file in files {
        text += &document::read(file, &limits)?.text;
        text.push('\n');
    }
    Ok(text)
}

fn options(common: &Common) -> Result<EngineOptions> {
    Ok(EngineOptions {
        kv: kv_dtype(common)?,
        context: common.context.as_deref().unwrap_or("full").parse()?,
    })
}

fn stop_here() -> Result<()> {
    if ui::interrupted() {
        return Err(ui::Interrupted("the rows printed so far are complete".into()).into());
    }
    Ok(())
}

/// Prefill of the parts one after another, then the likeliest tokens until `ends` says so.
fn answer(
    opened: &Opened,
    options: &EngineOptions,
    parts: &[&[u32]],
    most: usize,
    ends: impl Fn(&str) -> bool,
) -> Result<String> {
    let (engine, tokenizer) = (&opened.model.engine, &opened.model.tokenizer);
    let mut sequence = engine.sequence(options, None)?;
    sequence.expect_length(parts.iter().map(|part| part.len()).sum::<usize>() + most);
    let mut logits = Vec::new();
    for part in parts.iter().filter(|part| !part.is_empty()) {
        logits = engine.prefill(&mut sequence, part, &mut |_, _| {
            Ok(match ui::interrupted() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            })
        })?;
    }
    let mut tokens = Vec::new();
    loop {
        let best = (0..logits.len())
            .max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
            .unwrap_or(0) as u32;
        if tokenizer.eos_ids().contains(&best) {
            break;
        }
        tokens.push(best);
        if tokens.len() == most || ends(&tokenizer.decode(&tokens)) {
            break;
        }
        logits = engine.forward(&mut [(&mut sequence, &[best])], Want::Last)?;
    }
    Ok(tokenizer.decode(&tokens))
}

/// Loss of next tokens by position, averaged over texts: nats per token.
pub fn loss(args: &Loss, common: &Common) -> Result<()> {
    if args.tokens < 2 || args.bucket == 0 || args.texts == 0 {
        bail!(
            "--tokens {}, --bucket {}, --texts {}: expected at least 2, 1 and 1",
            args.tokens,
            args.bucket,
            args.texts
        );
    }
    let opened = models::open(common)?;
    let (engine, tokenizer) = (&opened.model.engine, &opened.model.tokenizer);
    let options = options(common)?;
    let start: Vec<u32> = tokenizer.bos().into_iter().collect();
    let ids = tokenizer.encode(&text_of(&args.files)?, Special::None)?;
    let body = args.tokens - start.len();
    if ids.len() < body {
        bail!(
            "the documents have {} tokens, expected at least {body}; name more documents or lower --tokens",
            ids.len()
        );
    }
    let buckets = (args.tokens - 1).div_ceil(args.bucket);
    let (mut sums, mut counts) = (vec![0f64; buckets], vec![0usize; buckets]);
    let texts: Vec<&[u32]> = ids.chunks_exact(body).take(args.texts).collect();
    let clock = Instant::now();
    for text in &texts {
        let tokens = [&start, *text].concat();
        let mut sequence = engine.sequence(&options, None)?;
        sequence.expect_length(tokens.len());
        let mut position = 0;
        let chunk = sequence.spec().chunk;
        // The last token predicts nothing.
        let targets = tokens[1..].chunks(chunk);
        for (piece, targets) in tokens[..tokens.len() - 1].chunks(chunk).zip(targets) {
            let losses = engine.forward(&mut [(&mut sequence, piece)], Want::Losses(targets))?;
            for loss in losses {
                sums[position / args.bucket] += f64::from(loss);
                counts[position / args.bucket] += 1;
                position += 1;
            }
            stop_here()?;
        }
    }
    let rate = (texts.len() * args.tokens) as f64 / clock.elapsed().as_secs_f64();
    let rope = common.rope.as_ref().map(ToString::to_string);
    let mean: Vec<f64> = sums
        .iter()
        .zip(&counts)
        .map(|(s, &n)| s / n as f64)
        .collect();
    if common.json {
        let value = json!({
            "model": opened.name, "context": options.context.to_string(), "rope": rope,
            "texts": texts.len(), "tokens": args.tokens, "bucket": args.bucket, "nats_per_token": mean,
            "tokens_per_second": rate,
        });
        println!("{value}");
        return Ok(());
    }
    for (index, mean) in mean.iter().enumerate() {
        let first = index * args.bucket;
        println!(
            "positions {:>9} to {:>9}  {mean:.3} nats per token",
            ui::count(first as u64),
            ui::count((first + args.bucket).min(args.tokens - 1) as u64)
        );
    }
    println!(
        "{} texts of {} tokens under {}{}, {rate:.0} tok/s",
        texts.len(),
        ui::count(args.tokens as u64),
        options.context,
        rope.map_or(String::new(), |rope| format!(" with {rope}"))
    );
    Ok(())
}

/// Asks for the first sentence of texts of each length, greedily, and scores the answer.
pub fn first_sentence(args: &FirstSentence, common: &Common) -> Result<()> {
    let text = text_of(&args.files)?;
    let opened = models::open(common)?;
    let (model, options) = (&opened.model, options(common)?);
    let prime = model.tokenizer.encode(PRIMED, Special::None)?;
    for &length in &args.lengths {
        let clock = Instant::now();
        let mut scores = Vec::new();
        let starts = openings(&text);
        // Texts spread over the documents; six bytes a token are more than any prose needs.
        let fits = |&start: &usize| text.len() - start >= length * 6;
        let starts: Vec<usize> = starts.into_iter().filter(fits).collect();
        if starts.is_empty() {
            bail!(
                "no sentence of {} to {} words has {} bytes of text after it; name longer documents or lower --lengths",
                WORDS.start(),
                WORDS.end(),
                length * 6
            );
        }
        let texts = args.texts.min(starts.len());
        for index in 0..texts {
            let start = starts[index * starts.len() / texts];
            let mut end = (start + length * 6).min(text.len());
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            let body = &text[start..end];
            let Some(sentence) = sentence(body) else {
                continue;
            };
            let ids = model.tokenizer.encode(body, Special::None)?;
            let overhead = model.ask("", FIRST_SENTENCE)?;
            let overhead = overhead.document.len() + overhead.question.len() + prime.len();
            if ids.len() + overhead < length || overhead >= length {
                continue;
            }
            let body = model.tokenizer.decode(&ids[..length - overhead]);
            // A sentence that comes again can be copied from nearby.
            if !body.starts_with(sentence) || body.matches(sentence).count() != 1 {
                continue;
            }
            let prompt = model.ask(&body, FIRST_SENTENCE)?;
            let question = [&prompt.question[..], &prime].concat();
            let ends = |text: &str| text.contains('\n') || cut(text).len() < text.len();
            let parts = [&prompt.document[..], &question[..]];
            let said = answer(&opened, &options, &parts, 80, ends)?;
            let score = rouge_l(sentence, cut(&said)).2;
            scores.push(score);
            if common.json {
                let row = json!({
                    "model": opened.name, "context": options.context.to_string(),
                    "rope": common.rope, "tokens": length, "sentence": sentence, "answer": said, "rouge_l": score,
                });
                println!("{row}");
            }
            stop_here()?;
        }
        if !common.json {
            let mean = scores.iter().sum::<f64>() / scores.len().max(1) as f64;
            println!(
                "{:>9} tokens  ROUGE-L {:>5.1}  {} texts  {:.1} s",
                ui::count(length as u64),
                100.0 * mean,
                scores.len(),
                clock.elapsed().as_secs_f64()
            );
        }
    }
    Ok(())
}

/// Where a clean sentence of 8 to 40 words begins, in bytes: a capital letter at the start of a line or
/// after a full stop.
fn openings(text: &str) -> Vec<usize> {
    let mut openings = Vec::new();
    let (mut fresh, mut before) = (true, '\n');
    for (index, c) in text.char_indices() {
        if fresh && c.is_uppercase() && sentence(&text[index..]).is_some() {
            openings.push(index);
        }
        fresh = c == '\n' || (c == ' ' && matches!(before, '.' | '!' | '?'));
        before = c;
    }
    openings
}

/// The first sentence of a text, if it is a clean one of 8 to 40 words on one line.
fn sentence(text: &str) -> Option<&str> {
    let line = text.lines().next()?;
    let sentence = cut(line);
    let ends = sentence.ends_with(['.', '!', '?']);
    let words = sentence.split_whitespace().count();
    (ends && WORDS.contains(&words)).then_some(sentence)
}

/// A text up to the end of its first sentence or line.
fn cut(text: &str) -> &str {
    let line = text.trim_start().lines().next().unwrap_or_default();
    let mut before = ' ';
    for (index, c) in line.char_indices() {
        if matches!(before, '.' | '!' | '?') && (c.is_whitespace() || c == '"') {
            return &line[..index];
        }
        before = c;
    }
    line
}

/// ROUGE-L of a prediction, as the rouge-score package counts words: lower case, anything but letters a to z
/// and digits separates, no stemming. Precision, recall and F-measure.
fn rouge_l(target: &str, prediction: &str) -> (f64, f64, f64) {
    let words = |text: &str| -> Vec<String> {
        let text = text.to_lowercase();
        let words = text.split(|c: char| !c.is_ascii_alphanumeric());
        words
            .filter(|w| !w.is_empty())
            .map(str::to_string)
            .collect()
    };
    let (target, prediction) = (words(target), words(prediction));
    if target.is_empty() || prediction.is_empty() {
        return (0.0, 0.0, 0.0);
    }
    // One row of the table of longest common subsequences at a time.
    let mut row = vec![0usize; prediction.len() + 1];
    for word in &target {
        let mut corner = 0;
        for (j, other) in prediction.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if word == other {
                corner + 1
            } else {
                above.max(row[j])
            };
            corner = above;
        }
    }
    let common = row[prediction.len()] as f64;
    let (precision, recall) = (
        common / prediction.len() as f64,
        common / target.len() as f64,
    );
    let sum = precision + recall;
    let f = if sum > 0.0 {
        2.0 * precision * recall / sum
    } else {
        0.0
    };
    (precision, recall, f)
}

/// A way to make a long prompt short.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Xl3m,
    Truncated,
    Random,
    Bm25,
}

const WAYS: [(Way, &str); 4] = [
    (Way::Xl3m, "xl3m"),
    (Way::Truncated, "head and tail"),
    (Way::Random, "random segments"),
    (Way::Bm25, "BM25 segments"),
];

const FILLER: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n";
const QUESTION: &str = "What is the pass key? The pass key is ";

/// A number hidden in a text far longer than the window: XL3M beside other ways to shorten the prompt.
pub fn key_context(args: &KeyContext, common: &Common) -> Result<()> {
    let opened = models::open(common)?;
    let (engine, tokenizer) = (&opened.model.engine, &opened.model.tokenizer);
    let options = options(common)?;
    let window = args.window.unwrap_or(engine.window() as usize);
    let config = KeyContextConfig {
        segment: args.segment,
        stride: args.stride,
        keep: args.keep,
        ..KeyContextConfig::default()
    };
    let planner = KeyContextPlanner::new(config)?;
    let encode = |text: &str| tokenizer.encode(text, Special::None);
    let head: Vec<u32> = tokenizer.bos().into_iter().collect();
    let question = encode(QUESTION)?;
    let filler = match &args.text {
        Some(file) => encode(&text_of(std::slice::from_ref(file))?)?,
        None => encode(FILLER)?,
    };
    if filler.is_empty() || args.length < head.len() + question.len() + 64 {
        bail!(
            "--length {}: expected more than the head, the question and the number's sentence, and text to hide it in",
            args.length
        );
    }
    let shape = Shape {
        head: head.len(),
        question: question.len(),
        window,
        generation: 8,
    };
    let mut random = 1u64;
    let mut draw = |below: usize| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((random >> 33) as usize) % below.max(1)
    };
    let (mut kept, mut right) = (0, [0usize; 4]);
    let (mut scanned, mut seconds) = (0, 0.0);
    for prompt in 0..args.prompts {
        let key = 10_000 + draw(90_000);
        let needle = encode(&format!(
            "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
        ))?;
        let count = args.length - head.len() - question.len() - needle.len();
        let offset = if args.text.is_some() {
            draw(filler.len())
        } else {
            0
        };
        let body: Vec<u32> = filler
            .iter()
            .copied()
            .cycle()
            .skip(offset)
            .take(count)
            .collect();
        let at = count * (2 * prompt + 1) / (2 * args.prompts);
        let tokens = [&head[..], &body[..at], &needle, &body[at..], &question].concat();
        let place = head.len() + at..head.len() + at + needle.len();

        let clock = Instant::now();
        let mut source = EngineSource::new(engine, options.clone(), args.batch);
        let going = &mut |_, _| !ui::interrupted();
        let plan = planner.plan_with(&mut source, &tokens, shape, going)?;
        seconds += clock.elapsed().as_secs_f64();
        scanned += tokens.len();
        let whole = |ranges: &[std::ops::Range<usize>]| {
            ranges
                .iter()
                .any(|r| r.start <= place.start && place.end <= r.end)
        };
        // A needle cut by a border is kept if each of its pieces is.
        let holds = whole(&plan.ranges);
        kept += usize::from(holds);
        let mut rows = Vec::new();
        for (index, (way, name)) in WAYS.iter().enumerate() {
            let short = match way {
                // A prompt that fits has nothing to choose from.
                Way::Xl3m => plan.tokens.clone(),
                _ if plan.segments.is_empty() => tokens.clone(),
                Way::Truncated => {
                    let room = window - shape.generation - question.len();
                    let front = &tokens[..room.div_ceil(2).min(tokens.len())];
                    let back = &tokens[tokens.len() - question.len() - room / 2..];
                    [front, back].concat()
                }
                Way::Random => {
                    let all = plan.segments.len();
                    let mut picks = HashSet::new();
                    while picks.len() < kept_of(&plan).min(all) {
                        picks.insert(draw(all));
                    }
                    assembled(&tokens, &plan, &shape, &picks)
                }
                Way::Bm25 => {
                    let texts: Vec<String> = plan
                        .segments
                        .iter()
                        .map(|s| tokenizer.decode(&tokens[s.range.clone()]))
                        .collect();
                    let scores = bm25(&texts, QUESTION);
                    let mut order: Vec<usize> = (0..texts.len()).collect();
                    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
                    let picks = order.into_iter().take(kept_of(&plan)).collect();
                    assembled(&tokens, &plan, &shape, &picks)
                }
            };
            let said = answer(&opened, &options, &[&short], 8, |_| false)?;
            let digits: String = said
                .chars()
                .skip_while(|c| !c.is_ascii_digit())
                .take_while(char::is_ascii_digit)
                .collect();
            let hit = digits == key.to_string();
            right[index] += usize::from(hit);
            rows.push(json!({ "way": name, "answer": said, "right": hit }));
            stop_here()?;
        }
        if common.json {
            let row = json!({
                "model": opened.name, "tokens": tokens.len(), "key": key, "at": place.start,
                "kept": holds, "plan": { "segments": plan.segments, "tokens": plan.tokens.len() },
                "answers": rows,
            });
            println!("{row}");
        }
    }
    if !common.json {
        println!(
            "{} prompts of {} tokens, segments of {}, {} kept, window {}: the number's segment kept in {kept}; read at {:.0} tok/s",
            args.prompts,
            ui::count(args.length as u64),
            args.segment,
            args.keep,
            ui::count(window as u64),
            scanned as f64 / seconds
        );
        for ((_, name), right) in WAYS.iter().zip(right) {
            println!("{name:<16} {right} of {} right", args.prompts);
        }
    }
    Ok(())
}

fn kept_of(plan: &KeyContextPlan) -> usize {
    plan.segments.iter().filter(|segment| segment.kept).count()
}

/// Head, the picked segments in order, question.
fn assembled(
    tokens: &[u32],
    plan: &KeyContextPlan,
    shape: &Shape,
    picks: &HashSet<usize>,
) -> Vec<u32> {
    let mut out = tokens[..shape.head].to_vec();
    let mut end = 0;
    for (index, segment) in plan.segments.iter().enumerate() {
        if picks.contains(&index) {
            out.extend(&tokens[segment.range.start.max(end)..segment.range.end]);
            end = segment.range.end;
        }
    }
    out.extend(&tokens[tokens.len() - shape.question..]);
    out
}

/// Scores of texts for the words of a question (k1 1.2, b 0.75).
fn bm25(texts: &[String], question: &str) -> Vec<f64> {
    let words = |text: &str| -> Vec<String> {
        let text = text.to_lowercase();
        let words = text.split(|c: char| !c.is_alphanumeric());
        words
            .filter(|w| !w.is_empty())
            .map(str::to_string)
            .collect()
    };
    let texts: Vec<Vec<String>> = texts.iter().map(|text| words(text)).collect();
    let terms: HashSet<String> = words(question).into_iter().collect();
    let total: usize = texts.iter().map(Vec::len).sum();
    let mean = total as f64 / texts.len().max(1) as f64;
    let count = |text: &[String], term: &str| text.iter().filter(|w| *w == term).count() as f64;
    let mut scores = vec![0.0; texts.len()];
    for term in &terms {
        let holding = texts.iter().filter(|text| text.contains(term)).count() as f64;
        let idf = ((texts.len() as f64 - holding + 0.5) / (holding + 0.5) + 1.0).ln();
        for (score, text) in scores.iter_mut().zip(&texts) {
            let tf = count(text, term);
            *score += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * text.len() as f64 / mean));
        }
    }
    scores
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn rouge_l_is_that_of_the_package() {
        let golden = std::env::var_os("LONGSPAN_GOLDEN").map(PathBuf::from);
        let golden = golden
            .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"));
        let file = std::fs::read(golden.join("llama2-long/rouge_l.json")).unwrap();
        let cases: Vec<serde_json::Value> = serde_json::from_slice(&file).unwrap();
        assert!(!cases.is_empty());
        for case in cases {
            let text = |key: &str| case[key].as_str().unwrap();
            let found = rouge_l(text("target"), text("prediction"));
            for (found, key) in
                [found.0, found.1, found.2]
                    .iter()
                    .zip(["precision", "recall", "fmeasure"])
            {
                assert!(
                    (found - case[key].as_f64().unwrap()).abs() <= 1e-6,
                    "{key}: {case}"
                );
            }
        }
    }

    #[test]
    fn sentences_are_found_and_cut() {
        let text = "See below. The quick brown fox jumps over the lazy dog today. It ran.\nA short one.\n\
                    The value 3.5 is read from the second file on the disk! \"Yes\"";
        let found: Vec<&str> = openings(text)
            .into_iter()
            .filter_map(|at| sentence(&text[at..]))
            .collect();
        assert_eq!(
            found,
            [
                "The quick brown fox jumps over the lazy dog today.",
                "The value 3.5 is read from the second file on the disk!",
            ]
        );
        assert_eq!(cut("  It ran fast.\" And then"), "It ran fast.");
        assert_eq!(cut("no end\nmore."), "no end");
        assert_eq!(cut("v1.2 holds"), "v1.2 holds");
        assert_eq!(cut(""), "");
    }

    /// Who repeats the first sentence is right at any length; who sees the last tokens only is wrong once the
    /// text is longer than they are.
    #[test]
    fn only_the_first_sentence_scores() {
        let filler =
            "Rain fell upon harbour stones while quiet boats swung slowly round. ".repeat(200);
        let text =
            format!("Every engine in this old workshop was built by hand in winter. {filler}");
        let want = sentence(&text).unwrap();
        assert_eq!(rouge_l(want, cut(&text)).2, 1.0);
        for seen in [500, 5000] {
            let tail = &text[text.len() - seen..];
            let start = openings(tail)[0];
            assert!(rouge_l(want, cut(&tail[start..])).2 < 0.2);
        }
        assert_eq!(text.matches(want).count(), 1);
    }

    #[test]
    fn bm25_prefers_rare_words_of_the_question() {
        let texts = ["the sky is blue", "the pass key is 5", "the sun is the sun"];
        let scores = bm25(&texts.map(String::from), "What is the pass key?");
        assert!(scores[1] > scores[0] && scores[1] > scores[2]);
    }
}
