//! `longspan bench depth`: one call of prefill and some decoded tokens at a depth, method beside method. The text up to
//! there is read once, under a cheap policy, so that great depths can be compared in minutes.

use crate::bench_context::parse_length;
use crate::bench_context_cell::{divergence, log_softmax};
use crate::models::{self, Opened};
use crate::options::Common;
use crate::reading::kv_dtype;
use crate::ui;
use anyhow::{Result, bail};
use clap::Args;
use longspan_data::document::{self, Limits};
use longspan_data::tokenize::Special;
use longspan_infer::context::ContextConfig;
use longspan_infer::engine::Want;
use longspan_infer::{EngineOptions, Sequence};
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;

/// `longspan bench depth`
#[derive(Args)]
pub struct DepthBench {
    /// Depths in tokens
    #[arg(long, value_delimiter = ',', value_parser = parse_length, default_value = "2k,8k,32k", value_name = "N,..")]
    depths: Vec<usize>,
    /// Policies as --context takes them; may be repeated; full is always measured
    #[arg(long = "method", value_name = "POLICY", default_values_t = ["hip".to_string(), "squeezed:0.9".to_string()])]
    methods: Vec<String>,
    /// Policy that reads up to the depth: full or hip:...
    #[arg(long, default_value = "hip", value_name = "POLICY")]
    fill: String,
    /// Text to read; none = made-up tokens, without divergence
    #[arg(long, value_name = "FILE")]
    text: Vec<PathBuf>,
    /// Tokens of the call that is measured; it ends at the depth
    #[arg(long, default_value_t = 1024, value_name = "N")]
    call: usize,
    /// Tokens decoded
    #[arg(long, default_value_t = 64, value_name = "N")]
    decode: usize,
    /// Wait for Enter before measuring at each depth
    #[arg(long)]
    wait: bool,
}

/// What one method did at one depth.
#[derive(Clone, Copy)]
struct Row {
    call_seconds: f64,
    index_seconds: f64,
    decode_seconds: f64,
    kept: Option<f64>,
    /// Divergence from full attention of what is decoded, and the share of same likeliest tokens.
    kl: Option<(f64, f64)>,
}

/// Runs the bench.
pub fn run(args: &DepthBench, common: &Common) -> Result<()> {
    if args.decode == 0 || args.call < 128 {
        bail!("--decode and --call: expected at least 1 and 128");
    }
    let mut depths = args.depths.clone();
    depths.sort_unstable();
    if depths.first().is_none_or(|&depth| depth < args.call) {
        bail!("--depths: expected at least {} tokens (--call)", args.call);
    }
    let mut methods = vec![ContextConfig::Full];
    for text in &args.methods {
        let method = text.parse()?;
        if method != ContextConfig::Full {
            methods.push(method);
        }
    }
    let opened = models::open(common)?;
    let longest = depths[depths.len() - 1] + args.decode;
    let tokens = text_of(args, &opened, longest)?;
    let engine = &opened.model.engine;
    let options = EngineOptions {
        kv: kv_dtype(common)?,
        context: args.fill.parse()?,
    };
    let mut filled = engine.sequence(&options, None)?;
    filled.expect_length(longest);
    // Threads, caches and weights awake.
    let mut warm = engine.sequence(&options, None)?;
    engine.forward(&mut [(&mut warm, &tokens[..128])], Want::Nothing)?;
    let mut rows: Vec<Vec<Row>> = vec![Vec::new(); methods.len()];
    for &depth in &depths {
        let chunk = filled.spec().chunk;
        for piece in tokens[filled.len()..depth - args.call].chunks(chunk) {
            engine.forward(&mut [(&mut filled, piece)], Want::Nothing)?;
            stop_here()?;
        }
        if args.wait {
            eprintln!("at {} tokens; Enter goes on", ui::count(depth as u64));
            std::io::stdin().read_line(&mut String::new())?;
        }
        let mut reference = Vec::new();
        for (method, rows) in methods.iter().zip(&mut rows) {
            let sequence = engine.continued(&filled, method)?;
            let text = &tokens[depth - args.call..depth + args.decode];
            let (mut row, logits) = measure(&opened, sequence, text, args)?;
            if !args.text.is_empty() {
                let vocab = engine.model().config().vocab_size;
                if *method == ContextConfig::Full {
                    reference = logits;
                } else {
                    row.kl = Some(divergence(&reference, &logits, vocab));
                }
            }
            rows.push(row);
        }
        let full = rows[0][rows[0].len() - 1];
        for (method, rows) in methods.iter().zip(&rows) {
            report(
                args,
                method,
                depth,
                &rows[rows.len() - 1],
                &full,
                common.json,
            );
        }
        stop_here()?;
    }
    // The whole reading, from calls at some depths.
    let whole = |rows: &[Row]| reading_seconds(&depths, rows, args.call);
    let full = whole(&rows[0]);
    for (method, rows) in methods.iter().zip(&rows) {
        let (seconds, longest) = (whole(rows), depths[depths.len() - 1]);
        if common.json {
            println!(
                "{}",
                json!({ "method": method.to_string(), "length": longest, "reading_seconds": seconds, "reading_ratio": full / seconds })
            );
        } else {
            println!(
                "reading {} tokens takes {seconds:.1} s under {method}, from the calls measured: {:.2} x full",
                ui::count(longest as u64),
                full / seconds
            );
        }
    }
    Ok(())
}

fn stop_here() -> Result<()> {
    if ui::interrupted() {
        return Err(ui::Interrupted("the rows printed so far are complete".into()).into());
    }
    Ok(())
}

fn text_of(args: &DepthBench, opened: &Opened, want: usize) -> Result<Vec<u32>> {
    let (model, engine) = (&opened.model, &opened.model.engine);
    if args.text.is_empty() {
        let vocab = engine.model().config().vocab_size;
        return Ok(crate::bench::tokens(want, vocab));
    }
    let mut tokens: Vec<u32> = model.tokenizer.bos().into_iter().collect();
    for file in &args.text {
        let text = document::read(file, &Limits::default())?.text;
        tokens.extend(model.tokenizer.encode(&text, Special::None)?);
    }
    if tokens.len() < want {
        bail!("the text has {} tokens, {want} are needed", tokens.len());
    }
    tokens.truncate(want);
    Ok(tokens)
}

fn measure(
    opened: &Opened,
    mut sequence: Sequence,
    text: &[u32],
    args: &DepthBench,
) -> Result<(Row, Vec<f32>)> {
    let engine = &opened.model.engine;
    let (call, next) = text.split_at(args.call);
    let clock = Instant::now();
    let mut logits = Vec::new();
    let chunk = sequence.spec().chunk;
    for piece in call.chunks(chunk) {
        logits = engine.forward(&mut [(&mut sequence, piece)], Want::Last)?;
    }
    let call_seconds = clock.elapsed().as_secs_f64();
    let clock = Instant::now();
    engine.seal(&mut sequence)?;
    let index_seconds = clock.elapsed().as_secs_f64();
    let before = sequence.report();
    let (mut rows, mut decode_seconds) = (Vec::new(), 0.0);
    for token in next {
        rows.extend_from_slice(&logits);
        let clock = Instant::now();
        logits = engine.forward(
            &mut [(&mut sequence, std::slice::from_ref(token))],
            Want::Last,
        )?;
        decode_seconds += clock.elapsed().as_secs_f64();
    }
    rows.extend_from_slice(&logits);
    log_softmax(&mut rows, engine.model().config().vocab_size);
    let after = sequence.report();
    let offered = after.offered - before.offered;
    let row = Row {
        call_seconds,
        index_seconds,
        decode_seconds: decode_seconds / next.len() as f64,
        kept: (offered > 0).then(|| (after.taken - before.taken) as f64 / offered as f64),
        kl: None,
    };
    Ok((row, rows))
}

fn report(
    args: &DepthBench,
    method: &ContextConfig,
    depth: usize,
    row: &Row,
    full: &Row,
    json: bool,
) {
    let rate = args.call as f64 / row.call_seconds;
    let (prefill, decode) = (
        full.call_seconds / row.call_seconds,
        full.decode_seconds / row.decode_seconds,
    );
    if json {
        println!(
            "{}",
            json!({
                "method": method.to_string(), "depth": depth, "call": args.call,
                "prefill_tokens_per_second": rate, "prefill_ratio": prefill,
                "decode_tokens_per_second": 1.0 / row.decode_seconds, "decode_ratio": decode,
                "index_seconds": row.index_seconds, "kept": row.kept,
                "kl": row.kl.map(|kl| kl.0), "agreement": row.kl.map(|kl| kl.1),
            })
        );
        return;
    }
    print!(
        "{:>9} tokens  {:<10} prefill {rate:>8.1} tok/s {prefill:>6.2} x   decode {:>7.1} tok/s {decode:>6.2} x",
        ui::count(depth as u64),
        method.name(),
        1.0 / row.decode_seconds
    );
    if row.index_seconds > 0.1 {
        print!("   index {:.1} s", row.index_seconds);
    }
    if let Some(kept) = row.kept {
        print!("   {:.1} % of the keys", kept * 100.0);
    }
    if let Some((kl, same)) = row.kl {
        print!("   KL {kl:.3} nats, {:.0} % same", same * 100.0);
    }
    println!();
}

/// Seconds to read from nothing to the last depth, if a call's time is straight between the depths and level before
/// the first.
fn reading_seconds(depths: &[usize], rows: &[Row], call: usize) -> f64 {
    let rate = |index: usize| rows[index].call_seconds / call as f64;
    let first = depths[0] as f64 * rate(0);
    let rest = (1..depths.len()).map(|index| {
        let span = (depths[index] - depths[index - 1]) as f64;
        span * (rate(index) + rate(index - 1)) / 2.0
    });
    first + rest.sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_is_the_area_under_its_calls() {
        let row = |call_seconds| Row {
            call_seconds,
            index_seconds: 0.0,
            decode_seconds: 1.0,
            kept: None,
            kl: None,
        };
        // 1, 1 and 3 seconds for 10 tokens at 10, 20 and 40.
        let rows = [row(1.0), row(1.0), row(3.0)];
        let seconds = reading_seconds(&[10, 20, 40], &rows, 10);
        assert!((seconds - (1.0 + 1.0 + 4.0)).abs() < 1e-9, "{seconds}");
    }
}
