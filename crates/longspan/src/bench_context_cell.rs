//! One cell of `bench context`: what a method costs on a text of one length, and what the model still
//! knows of that text.

use crate::ui;
use anyhow::{Context, Result, bail};
use longspan_agents::LocalModel;
use longspan_eval::EvalError;
use longspan_eval::ppl;
use longspan_eval::registry::Registry;
use longspan_eval::target::{ChatMode, Local, LocalOptions, Target};
use longspan_eval::task::{Likelihood, Prediction, Protocol, SampleCx};
use longspan_infer::context::ContextConfig;
use longspan_infer::decode::DecodeConfig;
use longspan_infer::engine::Want;
use longspan_infer::kv::plane::TierFile;
use longspan_infer::{Engine, EngineError, EngineOptions, Sequence};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// Tokens read after the text, as a question is: the first token is ready when they are read.
pub const QUESTION: usize = 32;

/// What a reading took, and how the next tokens came out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Seconds to read all but the last [`QUESTION`] tokens.
    pub read_seconds: f64,
    /// Tokens a second of that.
    pub prefill_tokens_per_second: f64,
    /// Seconds of indexing after reading (Squeezed Attention's clusters).
    pub index_seconds: f64,
    /// Seconds to read the question once the text is read.
    pub question_seconds: f64,
    /// All of the above: from nothing to the first token.
    pub first_token_seconds: f64,
    /// Tokens a second of decoding at this depth.
    pub decode_tokens_per_second: f64,
    /// Tokens decoded.
    pub decoded: usize,
    /// Bytes of keys and values in memory and on disk, and of the policy's own indices.
    pub kv_memory_bytes: u64,
    /// See above.
    pub kv_disk_bytes: u64,
    /// See above.
    pub index_bytes: u64,
    /// Mean loss of the decoded tokens, which are the text's own, in nats.
    pub next_nll: Option<f64>,
    /// Mean divergence of the decoded tokens' distributions from those of full attention, in nats.
    pub kl: Option<f64>,
    /// Share of decoded tokens whose likeliest token is that of full attention.
    pub agreement: Option<f64>,
}

/// Loss over the whole text, read in one pass.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    /// Nats per token.
    pub nll: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// (first position, one past the last, nats per token, tokens).
    pub buckets: Vec<(usize, usize, f64, usize)>,
    /// Nats per token of the last eighth of the text.
    pub last_nll: f64,
}

/// Score of a retrieval task at one depth.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Retrieval {
    /// The task.
    pub task: String,
    /// Percent of the text before the answer.
    pub depth: f64,
    /// Mean score, 0 to 1.
    pub score: f64,
    /// Samples.
    pub samples: usize,
}

/// One method on one length.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Names all that decides the figures besides the next three.
    pub setup: String,
    /// Rotary rule; `own` = the model's.
    pub rope: String,
    /// Context policy.
    pub method: String,
    /// Tokens of the text.
    pub length: usize,
    /// Why nothing was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// Speed and memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<Cost>,
    /// Loss by position.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<Loss>,
    /// Retrieval by task and depth.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub retrieval: Vec<Retrieval>,
}

impl Cell {
    /// Method and rotary rule.
    pub fn series(&self) -> String {
        match self.rope.as_str() {
            "own" => self.method.clone(),
            rope => format!("{} with {rope}", self.method),
        }
    }

    /// Mean score over the depths of a task.
    pub fn score(&self, task: &str) -> Option<f64> {
        let rows = || self.retrieval.iter().filter(|row| row.task == task);
        let samples: usize = rows().map(|row| row.samples).sum();
        let sum: f64 = rows().map(|row| row.score * row.samples as f64).sum();
        (samples > 0).then(|| sum / samples as f64)
    }
}

/// What is measured of every cell.
pub struct Plan {
    /// Speed, memory, divergence.
    pub cost: bool,
    /// Loss by position.
    pub loss: bool,
    /// Tasks of retrieval.
    pub tasks: Vec<String>,
    /// Depths in percent.
    pub depths: Vec<f64>,
    /// Samples per depth.
    pub samples: usize,
    /// Tokens decoded.
    pub decode: usize,
    /// Longer texts keep cold keys and values on disk.
    pub disk_above: usize,
    /// The text is prose, not made of random tokens: its loss says something.
    pub prose: bool,
    /// Where reference distributions and temporary files lie.
    pub folder: PathBuf,
}

impl Plan {
    /// Tokens that a cell reads, for the progress bar.
    pub fn work(&self, method: &ContextConfig, length: usize) -> u64 {
        let mut tokens = 0;
        if self.cost {
            tokens += length;
        }
        if self.loss && self.prose && !reads_in_full(method) {
            tokens += length;
        }
        for task in &self.tasks {
            let readings = if shares(task) { 1 } else { self.depths.len() };
            tokens += readings * self.samples * length;
        }
        tokens as u64
    }
}

/// Tasks whose questions are all about one text.
fn shares(task: &str) -> bool {
    task.ends_with("/shared")
}

/// The loss of a text under these is that of full attention: they choose keys only after it was read.
fn reads_in_full(method: &ContextConfig) -> bool {
    match method {
        ContextConfig::Squeezed(_) => true,
        ContextConfig::Hip(config) => !config.prefill,
        _ => false,
    }
}

/// A cell's method on an engine.
pub struct Subject<'a> {
    /// The model.
    pub model: &'a Arc<LocalModel>,
    /// Its name.
    pub name: &'a str,
    /// Policy and storage.
    pub options: EngineOptions,
    /// Tokens of the text, and of what follows it: length + the plan's `decode`.
    pub tokens: &'a [u32],
    /// Tokens of the text.
    pub length: usize,
    /// Named in files of reference distributions.
    pub reference: String,
}

fn stop_here() -> Result<()> {
    if ui::interrupted() {
        return Err(ui::Interrupted(
            "finished cells are kept; the same command goes on with the others".into(),
        )
        .into());
    }
    Ok(())
}

/// Why a method cannot be run at all; None if it can.
pub fn refusal(subject: &Subject<'_>, plan: &Plan) -> Option<String> {
    let engine = &subject.model.engine;
    let length = subject.length + plan.decode;
    let tried = (engine.sequence(&subject.options, None))
        .and_then(|_| engine.check_length(length))
        .err()
        .map(|error| error.to_string());
    if tried.is_some() {
        return tried;
    }
    let keeps_all = matches!(
        subject.options.context,
        ContextConfig::Full
            | ContextConfig::Hip(_)
            | ContextConfig::Squeezed(_)
            | ContextConfig::Span(_)
    );
    let need = engine.kv_bytes_per_token(subject.options.kv) * length as u64;
    let free = crate::reading::free_memory()?;
    (keeps_all && need > free / 10 * 8).then(|| {
        format!(
            "keys and values of {} tokens need {}, of {} that are free",
            ui::count(length as u64),
            ui::bytes(need),
            ui::bytes(free)
        )
    })
}

/// Measures a cell. `advance` is told of tokens that were read.
pub fn measure(
    subject: &Subject<'_>,
    plan: &Plan,
    advance: &mut dyn FnMut(usize),
) -> Result<(Option<Cost>, Option<Loss>, Vec<Retrieval>)> {
    let cost = match plan.cost {
        true => Some(cost(subject, plan, advance)?),
        false => None,
    };
    let loss = match plan.loss && plan.prose && !reads_in_full(&subject.options.context) {
        true => Some(loss(subject, advance)?),
        false => None,
    };
    Ok((cost, loss, retrieval(subject, plan, advance)?))
}

fn read(
    engine: &Engine,
    sequence: &mut Sequence,
    tokens: &[u32],
    advance: &mut dyn FnMut(usize),
) -> Result<()> {
    let chunk = sequence.spec().chunk;
    for piece in tokens.chunks(chunk) {
        engine.forward(&mut [(sequence, piece)], Want::Nothing)?;
        advance(piece.len());
        stop_here()?;
    }
    Ok(())
}

/// Removes a file when it goes out of use.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn cost(subject: &Subject<'_>, plan: &Plan, advance: &mut dyn FnMut(usize)) -> Result<Cost> {
    let engine = &subject.model.engine;
    let file = Removed(plan.folder.join("tier.tmp"));
    let tier = match subject.length > plan.disk_above {
        true => Some(TierFile::create(&file.0).with_context(|| file.0.display().to_string())?),
        false => None,
    };
    // Threads, caches and weights awake.
    let mut warm = engine.sequence(&subject.options, None)?;
    read(
        engine,
        &mut warm,
        &subject.tokens[..subject.length.min(256)],
        &mut |_| {},
    )?;

    let mut sequence = engine.sequence(&subject.options, tier)?;
    sequence.expect_length(subject.length + plan.decode);
    let (text, next) = subject.tokens.split_at(subject.length);
    let (body, question) = text.split_at(subject.length - QUESTION);
    let clock = Instant::now();
    read(engine, &mut sequence, body, advance)?;
    let read_seconds = clock.elapsed().as_secs_f64();
    let clock = Instant::now();
    engine.seal(&mut sequence)?;
    let index_seconds = clock.elapsed().as_secs_f64();
    let clock = Instant::now();
    let mut logits = engine.prefill(&mut sequence, question, &mut |_, _| {
        Ok(ControlFlow::Continue(()))
    })?;
    let question_seconds = clock.elapsed().as_secs_f64();
    advance(QUESTION);

    // The text's own next tokens, so that every method is asked the same.
    let vocab = engine.model().config().vocab_size;
    let mut rows: Vec<f32> = Vec::with_capacity(next.len() * vocab);
    let mut decode_seconds = 0.0;
    for token in next {
        rows.extend_from_slice(&logits);
        let clock = Instant::now();
        logits = engine.forward(
            &mut [(&mut sequence, std::slice::from_ref(token))],
            Want::Last,
        )?;
        decode_seconds += clock.elapsed().as_secs_f64();
        stop_here()?;
    }
    let bytes = sequence.kv_bytes();
    let mut cost = Cost {
        read_seconds,
        prefill_tokens_per_second: body.len() as f64 / read_seconds.max(1e-9),
        index_seconds,
        question_seconds,
        first_token_seconds: read_seconds + index_seconds + question_seconds,
        decode_tokens_per_second: next.len() as f64 / decode_seconds.max(1e-9),
        decoded: next.len(),
        kv_memory_bytes: bytes.memory,
        kv_disk_bytes: bytes.disk,
        index_bytes: sequence.report().index_bytes,
        ..Cost::default()
    };
    if !plan.prose {
        return Ok(cost);
    }
    log_softmax(&mut rows, vocab);
    let losses = rows.chunks_exact(vocab).zip(next);
    let sum: f64 = losses
        .map(|(row, &token)| -f64::from(row[token as usize]))
        .sum();
    cost.next_nll = Some(sum / next.len() as f64);
    let path = plan
        .folder
        .join(format!("reference-{}.f32", subject.reference));
    if subject.options.context == ContextConfig::Full {
        let bytes: Vec<u8> = rows.iter().flat_map(|x| x.to_le_bytes()).collect();
        std::fs::write(&path, bytes).with_context(|| path.display().to_string())?;
    } else if let Some(reference) = reference(&path, rows.len())? {
        let (kl, agreement) = divergence(&reference, &rows, vocab);
        (cost.kl, cost.agreement) = (Some(kl), Some(agreement));
    }
    Ok(cost)
}

/// Log probabilities in place of logits.
pub fn log_softmax(rows: &mut [f32], vocab: usize) {
    for row in rows.chunks_exact_mut(vocab) {
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|&x| f64::from(x - top).exp()).sum();
        let norm = f64::from(top) + sum.ln();
        row.iter_mut()
            .for_each(|x| *x = (f64::from(*x) - norm) as f32);
    }
}

/// What full attention gave, if it was measured.
fn reference(path: &Path, len: usize) -> Result<Option<Vec<f32>>> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    if bytes.len() != 4 * len {
        bail!(
            "{}: {} bytes, expected {}; delete the file and measure full attention anew",
            path.display(),
            bytes.len(),
            4 * len
        );
    }
    let floats = bytes.chunks_exact(4);
    let floats = floats.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    Ok(Some(floats.collect()))
}

/// Mean over rows of log probabilities of sum p (ln p - ln q), and the share of rows with the same likeliest
/// token.
pub fn divergence(p: &[f32], q: &[f32], vocab: usize) -> (f64, f64) {
    let best = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
    let (mut kl, mut same, mut rows) = (0.0, 0, 0);
    for (p, q) in p.chunks_exact(vocab).zip(q.chunks_exact(vocab)) {
        kl += (p.iter().zip(q))
            .map(|(&p, &q)| f64::from(p).exp() * (f64::from(p) - f64::from(q)))
            .sum::<f64>();
        same += usize::from(best(p) == best(q));
        rows += 1;
    }
    (
        kl / f64::from(rows.max(1)),
        same as f64 / f64::from(rows.max(1)),
    )
}

fn failed(error: EvalError) -> anyhow::Error {
    match error {
        EvalError::Interrupted { .. } => match stop_here() {
            Err(stopped) => stopped,
            Ok(()) => error.into(),
        },
        error => error.into(),
    }
}

fn loss(subject: &Subject<'_>, advance: &mut dyn FnMut(usize)) -> Result<Loss> {
    // The text begins with the model's beginning-of-text token where it has one.
    let bos = usize::from(
        subject
            .model
            .tokenizer
            .bos()
            .is_some_and(|bos| subject.tokens[0] == bos),
    );
    let (start, text) = subject.tokens[..subject.length].split_at(bos);
    let mut read = 0;
    let nll = ppl::nll(
        &subject.model.engine,
        &subject.options,
        start,
        text,
        Protocol::Position,
        &mut |sequence| {
            advance(sequence.len() - read);
            read = sequence.len();
            !ui::interrupted()
        },
    )
    .map_err(failed)?;
    let whole = Likelihood {
        nll,
        bytes: 1,
        words: 1,
        bos: bos > 0,
    };
    let figures = ppl::figures(&[&whole]);
    let last = &whole.nll[whole.nll.len() / 8 * 7..];
    let count = last.iter().flatten().count();
    let sum: f64 = last.iter().flatten().map(|&x| f64::from(x)).sum();
    Ok(Loss {
        nll: figures.nll.value,
        perplexity: figures.ppl.value,
        buckets: ppl::by_position(&[&whole]),
        last_nll: sum / count.max(1) as f64,
    })
}

fn retrieval(
    subject: &Subject<'_>,
    plan: &Plan,
    advance: &mut dyn FnMut(usize),
) -> Result<Vec<Retrieval>> {
    let registry = Registry::default();
    let mut all = Vec::new();
    for name in &plan.tasks {
        let task = registry.task(name).map_err(failed)?;
        let options = LocalOptions {
            engine: subject.options.clone(),
            chat: ChatMode::Auto,
            decode: DecodeConfig::Plain,
            reuse: shares(name),
            reuse_bytes: crate::reading::free_memory().map_or(1 << 30, |bytes| bytes / 4),
            memory_bytes: None,
        };
        let local = Local::new(
            Arc::clone(subject.model),
            subject.name,
            options,
            ui::interrupted,
        )
        .map_err(failed)?;
        let samples = task
            .samples(&SampleCx {
                length: subject.length,
                longest: subject.length,
                samples: plan.samples,
                depths: &plan.depths,
                seed: 42,
                counter: local.counter(),
                data: None,
                fixtures: false,
            })
            .map_err(failed)?;
        let mut by_depth: BTreeMap<u64, (f64, f64, usize)> = BTreeMap::new();
        let readings = if shares(name) { plan.depths.len() } else { 1 };
        for (index, sample) in samples.iter().enumerate() {
            let output = local.run(sample, 42).map_err(failed)?;
            if let Some(error) = output.error {
                bail!("{name} at {} tokens: {error}", subject.length);
            }
            let row = Prediction {
                id: sample.id.clone(),
                index,
                references: sample.references.clone(),
                text: output.text,
                ..Prediction::default()
            };
            let depth = sample
                .attrs
                .get("depth")
                .and_then(|d| d.as_f64())
                .unwrap_or(0.0);
            let entry = by_depth.entry(depth.to_bits()).or_insert((depth, 0.0, 0));
            entry.1 += task.score(&row).value;
            entry.2 += 1;
            advance(subject.length / readings);
            stop_here()?;
        }
        all.extend(
            by_depth
                .into_values()
                .map(|(depth, sum, samples)| Retrieval {
                    task: name.clone(),
                    depth,
                    score: sum / samples as f64,
                    samples,
                }),
        );
    }
    Ok(all)
}

/// True for errors that end one cell and not the run.
pub fn concerns_the_cell(error: &anyhow::Error) -> bool {
    error.downcast_ref::<ui::Interrupted>().is_none()
        && (error.downcast_ref::<EngineError>().is_some()
            || error.downcast_ref::<EvalError>().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_zero_only_for_equal_rows() {
        let mut p = vec![1.0, 2.0, 3.0, 0.0, 0.0, 5.0];
        let mut q = vec![3.0, 2.0, 1.0, 0.0, 0.0, 5.0];
        log_softmax(&mut p, 3);
        log_softmax(&mut q, 3);
        for row in p.chunks_exact(3) {
            let sum: f32 = row.iter().map(|x| x.exp()).sum();
            assert!((sum - 1.0).abs() < 1e-6);
        }
        assert_eq!(divergence(&p, &p, 3), (0.0, 1.0));
        let (kl, same) = divergence(&p, &q, 3);
        // The first rows: p = softmax(1, 2, 3), q its reverse; sum p (ln p - ln q) = 2 (p3 - p1), halved by
        // the equal second rows.
        let want = f64::from(p[2].exp() - p[0].exp());
        assert!(
            (kl - want).abs() < 1e-6 && same == 0.5,
            "{kl}, expected {want}"
        );
    }

    #[test]
    fn scores_weigh_samples() {
        let row = |depth, score, samples| Retrieval {
            task: "passkey".into(),
            depth,
            score,
            samples,
        };
        let cell = Cell {
            rope: "own".into(),
            method: "full".into(),
            retrieval: vec![row(0.0, 1.0, 3), row(50.0, 0.0, 1)],
            ..Cell::default()
        };
        assert_eq!(cell.score("passkey"), Some(0.75));
        assert_eq!(cell.score("needle"), None);
        assert_eq!(cell.series(), "full");
    }
}
