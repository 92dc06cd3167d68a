//! `longspan bench parity`: how closely this engine's logits follow a reference's.

use crate::models;
use crate::options::Common;
use crate::reading::kv_dtype;
use anyhow::{Context, Result, bail};
use longspan_infer::EngineOptions;
use longspan_infer::engine::Want;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::path::Path;

/// Tokens of one forward pass; logits of one pass are held at a time.
const CHUNK: usize = 256;

/// Compares with `input_ids` [T] and `logits` [T, vocab] or `nll` [T - 1] of a safetensors file.
pub fn run(reference: &Path, common: &Common) -> Result<()> {
    let file =
        std::fs::File::open(reference).with_context(|| format!("{}", reference.display()))?;
    // SAFETY: the file is only read, and not changed by this program.
    let bytes = unsafe { memmap(&file)? };
    let tensors =
        SafeTensors::deserialize(&bytes).with_context(|| format!("{}", reference.display()))?;
    let ids = integers(
        &tensors
            .tensor("input_ids")
            .context("the reference lacks input_ids")?,
    )?;
    let logits = tensors.tensor("logits").ok();
    let nll = tensors
        .tensor("nll")
        .ok()
        .map(|view| floats(&view))
        .transpose()?;
    if logits.is_none() && nll.is_none() {
        bail!("{}: found neither logits nor nll", reference.display());
    }
    let opened = models::open(common)?;
    let engine = &opened.model.engine;
    let vocab = engine.model().config().vocab_size;
    if let Some(logits) = &logits
        && (logits.dtype() != Dtype::F32 || logits.shape() != [ids.len(), vocab])
    {
        bail!(
            "logits: found {:?} {:?}, expected F32 [{}, {vocab}]",
            logits.dtype(),
            logits.shape(),
            ids.len()
        );
    }
    let context = common.context.as_deref().unwrap_or("full").parse()?;
    let mut sequence = engine.sequence(
        &EngineOptions {
            kv: kv_dtype(common)?,
            context,
        },
        None,
    )?;
    let (mut same, mut kl, mut worst, mut ours) = (0usize, 0f64, 0f64, Vec::new());
    for (index, chunk) in ids.chunks(CHUNK).enumerate() {
        let found = engine.forward(&mut [(&mut sequence, chunk)], Want::All)?;
        for (offset, row) in found.chunks_exact(vocab).enumerate() {
            let position = index * CHUNK + offset;
            let log_z = log_sum_exp(row);
            if let Some(next) = ids.get(position + 1) {
                ours.push(log_z - row[*next as usize] as f64);
            }
            if let Some(view) = &logits {
                let start = position * vocab * 4;
                let want: Vec<f32> = view.data()[start..start + vocab * 4]
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                    .collect();
                let want_z = log_sum_exp(&want);
                let divergence: f64 = want
                    .iter()
                    .zip(row)
                    .map(|(&want, &found)| {
                        let log_p = want as f64 - want_z;
                        log_p.exp() * (log_p - (found as f64 - log_z))
                    })
                    .sum();
                kl += divergence;
                worst = worst.max(divergence);
                same += (argmax(&want) == argmax(row)) as usize;
            }
        }
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let perplexity = mean(&ours).exp();
    let reference_perplexity = nll
        .as_ref()
        .map(|nll| mean(&nll[..ours.len().min(nll.len())]).exp());
    let value = serde_json::json!({
        "model": opened.name, "positions": ids.len(),
        "top1_equal": logits.as_ref().map(|_| same as f64 / ids.len() as f64),
        "mean_kl": logits.as_ref().map(|_| kl / ids.len() as f64),
        "max_kl": logits.as_ref().map(|_| worst),
        "perplexity": perplexity,
        "reference_perplexity": reference_perplexity,
        "perplexity_difference": reference_perplexity.map(|reference| perplexity / reference - 1.0),
    });
    if common.json {
        println!("{value}");
    } else {
        for (key, value) in value
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(_, value)| !value.is_null())
        {
            println!("{key:<24} {value}");
        }
    }
    Ok(())
}

unsafe fn memmap(file: &std::fs::File) -> Result<memmap2::Mmap> {
    Ok(memmap2::Mmap::map(file)?)
}

fn integers(view: &TensorView<'_>) -> Result<Vec<u32>> {
    match view.dtype() {
        Dtype::I64 => Ok(view
            .data()
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32)
            .collect()),
        Dtype::I32 | Dtype::U32 => Ok(view
            .data()
            .chunks_exact(4)
            .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
            .collect()),
        other => bail!("input_ids: found {other:?}, expected I64"),
    }
}

fn floats(view: &TensorView<'_>) -> Result<Vec<f64>> {
    match view.dtype() {
        Dtype::F32 => Ok(view
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()) as f64)
            .collect()),
        other => bail!("nll: found {other:?}, expected F32"),
    }
}

fn log_sum_exp(row: &[f32]) -> f64 {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    top + row
        .iter()
        .map(|&x| (x as f64 - top).exp())
        .sum::<f64>()
        .ln()
}

fn argmax(row: &[f32]) -> usize {
    row.iter().enumerate().fold(
        0,
        |best, (index, &x)| if x > row[best] { index } else { best },
    )
}
