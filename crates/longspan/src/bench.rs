//! `longspan bench`: speed as a share of this machine's limits, fidelity, and finding a hidden number.

use crate::cli::Bench;
use crate::models::{self, Opened};
use crate::options::{Above, Common, RunOptions};
use crate::reading::kv_dtype;
use crate::{parity, ui};
use anyhow::Result;
use longspan_data::tokenize::Special;
use longspan_infer::engine::Want;
use longspan_infer::{EngineOptions, Sequence};
use longspan_kernels::cpu::Level;
use longspan_kernels::measure;
use longspan_kernels::pool::Pool;
use longspan_nn::model::Network;
use serde_json::json;
use std::ops::ControlFlow;
use std::time::Instant;

/// Runs one bench.
pub fn run(what: &Bench, above: &Above) -> Result<()> {
    let with = |options: &RunOptions| above.with(options);
    match what {
        Bench::Speed {
            prefill,
            decode,
            tokens,
            repeat,
            levels,
            options,
        } => match levels {
            true => every_level(),
            false => speed(prefill, decode, *tokens, *repeat, &with(options)?),
        },
        Bench::Mixers(it) => crate::bench_mixers::run(&it.args, &above.with(&it.options)?),
        Bench::Train(it) => crate::bench_train::run(&it.args, &above.with(&it.options)?),
        Bench::Decode(it) => crate::bench_decode::run(&it.args, &with(&it.options)?),
        Bench::Dialogue(it) => crate::bench_dialogue::run(&it.args, &above.with(&it.options)?),
        Bench::Attention(it) => crate::bench_attention::run(&it.args, &above.with(&it.options)?),
        Bench::Depth(it) => crate::bench_depth::run(&it.args, &above.with(&it.options)?),
        Bench::Questions(it) => crate::bench_questions::run(&it.args, &above.with(&it.options)?),
        Bench::Context(it) => crate::bench_context::run(&it.args, &above.with(&it.options)?),
        Bench::Loss(it) => crate::probe::loss(&it.args, &with(&it.options)?),
        Bench::FirstSentence(it) => crate::probe::first_sentence(&it.args, &with(&it.options)?),
        Bench::KeyContext(it) => crate::probe::key_context(&it.args, &with(&it.options)?),
        Bench::Workflow(it) => crate::bench_workflow::run(&it.args, &with(&it.options)?),
        Bench::Rag(it) => crate::bench_rag::run(&it.args, &with(&it.options)?),
        Bench::Parity { reference, options } => parity::run(reference, &with(options)?),
        Bench::Passkey {
            length,
            prompts,
            depth,
            options,
        } => passkey(*length, *prompts, depth, &with(options)?),
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Plausible token ids: a fixed pseudo-random walk over the vocabulary.
pub fn tokens(count: usize, vocab: usize) -> Vec<u32> {
    let mut state = 1u64;
    (0..count)
        .map(|_| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            ((state >> 33) % vocab.min(32_000) as u64) as u32
        })
        .collect()
}

fn fill(opened: &Opened, sequence: &mut Sequence, ids: &[u32]) -> Result<()> {
    let chunk = sequence.spec().chunk;
    let pieces = ids.len().div_ceil(chunk);
    for (index, piece) in ids.chunks(chunk).enumerate() {
        let want = if index + 1 == pieces {
            Want::Last
        } else {
            Want::Nothing
        };
        opened
            .model
            .engine
            .forward(&mut [(sequence, piece)], want)?;
    }
    Ok(())
}

fn speed(
    prefill: &[usize],
    decode: &[usize],
    count: usize,
    repeat: usize,
    common: &Common,
) -> Result<()> {
    let opened = models::open(common)?;
    let engine = &opened.model.engine;
    let vocab = engine.model().config().vocab_size;
    let context = common.context.as_deref().unwrap_or("full").parse()?;
    let options = EngineOptions {
        kv: kv_dtype(common)?,
        context,
    };
    if !common.json {
        println!(
            "model {}  level {}  threads {}  kv {:?}  load {:.2} s",
            opened.name,
            Level::current().name(),
            Pool::global().threads(),
            options.kv,
            opened.load.as_secs_f64()
        );
    }
    // Of decoding: the bytes of weights and of keys and values that a token reads, and what memory delivers.
    let weights = match engine.model() {
        Network::Decoder(decoder) => decoder.bytes_per_token() as f64,
        Network::Recurrent(_) => 0.0,
    };
    let bandwidth = measure::memory_bandwidth();
    let report = |what: &str, at: usize, runs: &[f64], kv_bytes: f64| {
        let tok_s = median(runs.to_vec());
        let spent = measure::totals().map(|(stage, time)| (stage.name(), time.as_secs_f64()));
        let wall: f64 = runs.iter().map(|rate| rate.recip()).sum();
        let tokens = if what == "prefill" { at } else { count };
        let shares: Vec<(&str, f64)> = spent
            .iter()
            .map(|(name, seconds)| (*name, seconds / (wall * tokens as f64)))
            .filter(|(_, share)| *share >= 0.0005)
            .collect();
        let read =
            (what == "decode" && weights > 0.0).then(|| (weights + kv_bytes) * tok_s / bandwidth);
        if common.json {
            let stages: serde_json::Map<String, serde_json::Value> = shares
                .iter()
                .map(|(name, share)| (name.to_string(), json!(share)))
                .collect();
            let row = json!({
                "peer": "longspan", "model": opened.name, "what": what, "length": at, "depth": at, "tok_s": tok_s,
                "median": tok_s, "runs": runs, "level": Level::current().name(), "threads": Pool::global().threads(), "kv": format!("{:?}", options.kv).to_lowercase(),
                "stages": stages, "share_of_memory_bandwidth": read, "memory_bandwidth": bandwidth,
            });
            println!("{row}");
            return;
        }
        let of_memory = read.map_or(String::new(), |share| {
            format!(
                "  {:.0} % of the {:.1} GB/s that memory delivers",
                100.0 * share,
                bandwidth * 1e-9
            )
        });
        println!(
            "{what:<8} {:>8} tokens  {tok_s:>10.1} tok/s{of_memory}",
            ui::count(at as u64)
        );
        let known: f64 = shares.iter().map(|(_, share)| share).sum();
        let list: Vec<String> = shares
            .iter()
            .chain([&("rest", 1.0 - known)])
            .map(|(name, share)| format!("{name} {:.0} %", 100.0 * share))
            .collect();
        println!("{:>25}  {}", "", list.join(", "));
    };
    for &length in prefill.iter().filter(|&&length| length > 0) {
        let ids = tokens(length, vocab);
        let mut runs = Vec::new();
        for run in 0..=repeat {
            let mut sequence = engine.sequence(&options, None)?;
            // The first run warms caches and memory.
            if run == 1 || repeat == 0 {
                measure::watch(true);
            }
            let start = Instant::now();
            fill(&opened, &mut sequence, &ids)?;
            let rate = length as f64 / start.elapsed().as_secs_f64();
            if run > 0 || repeat == 0 {
                runs.push(rate);
            }
            stop_here()?;
        }
        report("prefill", length, &runs, 0.0);
    }
    for &depth in decode {
        let mut sequence = engine.sequence(&options, None)?;
        fill(&opened, &mut sequence, &tokens(depth.max(1), vocab))?;
        let ids = tokens(count, vocab);
        let kv_bytes = sequence.kv_bytes().memory as f64;
        let mut runs = Vec::new();
        measure::watch(true);
        for _ in 0..repeat.max(1) {
            let mut run = sequence.fork();
            let start = Instant::now();
            for id in &ids {
                engine.forward(&mut [(&mut run, std::slice::from_ref(id))], Want::Last)?;
            }
            runs.push(count as f64 / start.elapsed().as_secs_f64());
            stop_here()?;
        }
        report("decode", depth, &runs, kv_bytes);
    }
    measure::watch(false);
    Ok(())
}

/// The same command once for each level of instructions: a process settles on one.
fn every_level() -> Result<()> {
    let program = std::env::current_exe()?;
    let arguments: Vec<_> = std::env::args_os()
        .skip(1)
        .filter(|argument| argument != "--levels")
        .collect();
    for level in Level::available().collect::<Vec<_>>().into_iter().rev() {
        let status = std::process::Command::new(&program)
            .args(&arguments)
            .env("LONGSPAN_CPU", level.name())
            .status()?;
        stop_here()?;
        if !status.success() {
            anyhow::bail!("the run at level {} failed: {status}", level.name());
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

/// The passkey test (LM-Infinite, InfLLM): filler sentences, one key, a question at the end; the
/// first integer of the answer must be the key.
fn passkey(length: usize, prompts: usize, depth: &[f64], common: &Common) -> Result<()> {
    let opened = models::open(common)?;
    let (model, engine) = (&opened.model, &opened.model.engine);
    let context: longspan_infer::context::ContextConfig =
        common.context.as_deref().unwrap_or("full").parse()?;
    let options = EngineOptions {
        kv: kv_dtype(common)?,
        context,
    };
    let (&[from, to] | &[from, .., to]) = depth else {
        anyhow::bail!("--depth takes two numbers, from,to");
    };
    let encode = |text: &str| model.tokenizer.encode(text, Special::None);
    let head = model.tokenizer.encode(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about the important information there.\n",
        Special::ParseWithBos,
    )?;
    let filler = encode(
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n",
    )?;
    let question = encode("What is the pass key? The pass key is ")?;
    let mut found = 0;
    for prompt in 0..prompts {
        let random = tokens(2 * prompt + 2, 1 << 20);
        let key = 10_000 + (random[2 * prompt] as u64 * 2_654_435_761 % 90_000) as u32;
        let needle = encode(&format!(
            "The pass key is {key}. Remember it. {key} is the pass key.\n"
        ))?;
        let count =
            length.saturating_sub(head.len() + needle.len() + question.len()) / filler.len();
        let share = from + (to - from) * (prompt as f64 + 0.5) / prompts as f64;
        let before = (count as f64 * share) as usize;
        let mut document = head.clone();
        (0..before).for_each(|_| document.extend(&filler));
        document.extend(&needle);
        (before..count).for_each(|_| document.extend(&filler));
        let mut sequence = engine.sequence(&options, None)?;
        let start = Instant::now();
        // Document, question and last token are separate calls: see InfLLM's page.
        fill(&opened, &mut sequence, &document)?;
        let reading = start.elapsed().as_secs_f64();
        let mut logits = engine.prefill(&mut sequence, &question, &mut |_, _| {
            Ok(ControlFlow::Continue(()))
        })?;
        let mut answer = Vec::new();
        for _ in 0..8 {
            let best = (0..logits.len())
                .max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
                .unwrap_or(0) as u32;
            answer.push(best);
            logits = engine.forward(&mut [(&mut sequence, &[best])], Want::Last)?;
        }
        let answer = model.tokenizer.decode(&answer);
        let digits: String = answer
            .chars()
            .skip_while(|c| !c.is_ascii_digit())
            .take_while(char::is_ascii_digit)
            .collect();
        let hit = digits == key.to_string();
        found += hit as usize;
        if common.json {
            println!(
                "{}",
                json!({ "model": opened.name, "context": options.context.to_string(), "tokens": document.len() + question.len(), "depth": share, "key": key, "answer": answer, "found": hit, "read_tokens_per_second": document.len() as f64 / reading })
            );
        } else {
            println!(
                "{:>9} tokens  depth {share:.2}  key {key}  {}  {answer:?}  {:.0} tok/s",
                ui::count(document.len() as u64),
                if hit { "found " } else { "missed" },
                document.len() as f64 / reading
            );
        }
        stop_here()?;
    }
    if !common.json {
        println!("found {found} of {prompts} under {}", options.context);
    }
    Ok(())
}
