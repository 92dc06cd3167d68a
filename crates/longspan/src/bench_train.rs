//! `longspan bench train`: training throughput of a transformer and a Mamba-2 of about 10 million parameters, and of the two
//! operations behind long mixers. `scripts/peers/train_torch.py` runs it beside PyTorch.

use crate::options::{Common, Numbers};
use anyhow::Result;
use candle_core::{Tensor, Var};
use clap::Args;
use longspan_kernels::cpu::Level;
use longspan_kernels::fftconv::fft_conv;
use longspan_kernels::pool::Pool;
use longspan_kernels::ssd::Scan;
use longspan_nn::config::ModelConfig;
use longspan_nn::mixer::{Mamba2Config, MixerConfig};
use longspan_nn::model::{LanguageModel, StackConfig, StackLm, new_decoder};
use longspan_nn::params::ParamStore;
use longspan_train::batch::PackedBatch;
use longspan_train::config::Place;
use longspan_train::objective::{LanguageModeling, Recompute};
use longspan_train::optim::{OptimConfig, Optimizer};
use longspan_train::source::Source;
use longspan_train::trainer::{LoopConfig, Trainer};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

#[derive(Args)]
pub struct TrainBench {
    /// What to measure
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "transformer,mamba2,fft-conv,scan"
    )]
    pub what: Vec<String>,
    /// Documents of a step
    #[arg(long, default_value_t = 4)]
    pub documents: usize,
    /// Tokens of a document
    #[arg(long, default_value_t = 512)]
    pub length: usize,
    /// Steps measured, after one that is not; the median counts
    #[arg(long, default_value_t = 3)]
    pub steps: usize,
    /// Types of weights, activations and products
    #[arg(long, value_enum, default_value_t)]
    pub numbers: Numbers,
}

const VOCAB: usize = 256;
const WIDTH: usize = 320;

/// The transformer: 8 layers of width 320, 5 heads, a gated MLP of 864: 10.0 M parameters.
pub fn transformer(params: &ParamStore) -> Result<Arc<dyn LanguageModel>> {
    let config = json!({
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 864,
        "num_hidden_layers": 8, "num_attention_heads": 5, "rms_norm_eps": 1e-6, "tie_word_embeddings": true,
        "max_position_embeddings": 65536, "hidden_act": "silu",
    });
    let config = ModelConfig::from_hf_json(Path::new("config"), config.to_string().as_bytes())?;
    Ok(Arc::new(new_decoder(&config, params, 0.02)?))
}

/// The Mamba-2: 15 layers of width 320, 10 heads of 64, 64 columns of state: 10.0 M parameters.
pub fn mamba2(params: &ParamStore) -> Result<Arc<dyn LanguageModel>> {
    let mixer = Mamba2Config {
        state_size: 64,
        chunk_size: 64,
        ..Mamba2Config::default()
    };
    let config = StackConfig::of_mixers(WIDTH, 15, MixerConfig::Mamba2(mixer));
    Ok(Arc::new(StackLm::new(&config, VOCAB, &params.root())?))
}

/// The same documents at every step.
struct Same(PackedBatch);

impl Source for Same {
    type Batch = PackedBatch;

    fn next(&mut self, count: usize) -> longspan_train::Result<Vec<PackedBatch>> {
        Ok(vec![self.0.clone(); count])
    }

    fn state(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    fn load(&mut self, _: &serde_json::Value) -> longspan_train::Result<()> {
        Ok(())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Steps before the clock counts: a GPU's first load code and find their memory.
fn warm_up(place: &Place) -> usize {
    if place.device.is_cpu() { 1 } else { 5 }
}

/// (parameters, median seconds of a step).
fn train(args: &TrainBench, place: &Place, build: Build) -> Result<(usize, f64)> {
    let params = Arc::new(ParamStore::new(1, place.dtype, &place.device));
    let objective = LanguageModeling::new(build(&params)?, Recompute::None, usize::MAX)?;
    let mut batch = PackedBatch::default();
    for document in crate::bench::tokens(args.documents * args.length, VOCAB).chunks(args.length) {
        batch.push_text(document);
    }
    let config = LoopConfig {
        steps: u64::MAX,
        ..LoopConfig::default()
    };
    let optimizer = Optimizer::new(OptimConfig::adamw(1e-4))?;
    let mut trainer = Trainer::new(params.clone(), optimizer, Same(batch), objective, config)?;
    let mut seconds = Vec::new();
    let warm = warm_up(place);
    for step in 0..args.steps.max(1) + warm {
        place.device.synchronize()?;
        let start = Instant::now();
        trainer.step()?;
        place.device.synchronize()?;
        if step >= warm {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    Ok((params.count(), median(seconds)))
}

type Build = fn(&ParamStore) -> Result<Arc<dyn LanguageModel>>;

fn wave(place: &Place, shape: &[usize], low: f32, high: f32) -> Result<Var> {
    let count: usize = shape.iter().product();
    let value = |i: usize| low + (high - low) * (((i * 7919) % 1009) as f32 / 1009.0);
    let values: Vec<f32> = (0..count).map(value).collect();
    Ok(Var::from_tensor(&Tensor::from_vec(
        values,
        shape,
        &place.device,
    )?)?)
}

/// Median seconds of forward and backward pass.
fn operation(
    args: &TrainBench,
    place: &Place,
    f: &dyn Fn() -> candle_core::Result<Tensor>,
) -> Result<f64> {
    let mut seconds = Vec::new();
    let warm = warm_up(place);
    for run in 0..args.steps.max(1) + warm {
        place.device.synchronize()?;
        let start = Instant::now();
        f()?.sqr()?.sum_all()?.backward()?;
        place.device.synchronize()?;
        if run >= warm {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    Ok(median(seconds))
}

/// Runs the bench.
pub fn run(args: &TrainBench, common: &Common) -> Result<()> {
    longspan_kernels::cpu::keep_freed_memory();
    let place = &crate::models::place(common, args.numbers)?;
    let tokens = args.documents * args.length;
    for what in &args.what {
        let (parameters, seconds, size) = match what.as_str() {
            "transformer" | "mamba2" => {
                let build: Build = if what == "mamba2" {
                    mamba2
                } else {
                    transformer
                };
                let (parameters, seconds) = train(args, place, build)?;
                (parameters, seconds, tokens)
            }
            "fft-conv" => {
                let (b, h, l) = (4, 256, 4096);
                let (u, k) = (
                    wave(place, &[b, h, l], -1.0, 1.0)?,
                    wave(place, &[h, l], -0.1, 0.1)?,
                );
                let run = || fft_conv(u.as_tensor(), k.as_tensor(), None);
                (0, operation(args, place, &run)?, b * l)
            }
            "scan" => {
                let (b, l, h, p, n) = (2, 2048, 8, 64, 64);
                let (x, dt) = (
                    wave(place, &[b, l, h, p], -1.0, 1.0)?,
                    wave(place, &[b, l, h], 0.01, 0.1)?,
                );
                let a = wave(place, &[h], -2.0, -0.5)?;
                let (wb, wc) = (
                    wave(place, &[b, l, 1, n], -1.0, 1.0)?,
                    wave(place, &[b, l, 1, n], -1.0, 1.0)?,
                );
                let run = || {
                    let scan = Scan {
                        x: x.as_tensor(),
                        dt: dt.as_tensor(),
                        a: a.as_tensor(),
                        b: wb.as_tensor(),
                        c: wc.as_tensor(),
                        state: None,
                    };
                    Ok(scan.chunked(64)?.0)
                };
                (0, operation(args, place, &run)?, b * l)
            }
            other => anyhow::bail!(
                "--what: found {other}, expected transformer, mamba2, fft-conv or scan"
            ),
        };
        let rate = size as f64 / seconds;
        if common.json {
            let line = json!({
                "peer": "longspan", "what": what, "parameters": parameters, "seconds": seconds, "tokens_per_second": rate,
                "device": format!("{:?}", place.device.location()), "numbers": format!("{:?}", args.numbers), "level": Level::current().name(), "threads": Pool::global().threads(),
            });
            println!("{line}");
        } else {
            let parameters = match parameters {
                0 => String::new(),
                n => format!("  {:.1} M parameters", n as f64 / 1e6),
            };
            println!(
                "{what:<12} {rate:>9.0} tokens/s  {:>9.1} ms a step{parameters}",
                1e3 * seconds
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_models_have_ten_million_parameters_and_learn() {
        let builds: [Build; 2] = [transformer, mamba2];
        for build in builds {
            let args = TrainBench {
                what: Vec::new(),
                documents: 1,
                length: 8,
                steps: 1,
                numbers: Numbers::F32,
            };
            let (parameters, seconds) = train(&args, &Place::default(), build).unwrap();
            assert!(
                (9_800_000..10_200_000).contains(&parameters),
                "{parameters}"
            );
            assert!(seconds > 0.0);
        }
    }
}
