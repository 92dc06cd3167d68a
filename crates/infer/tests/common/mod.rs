//! Tiny random models through the engine, with f32 keys and values: what the tests of policies, decoding,
//! memory and sessions share.
#![allow(dead_code)]

#[path = "../../../../tests/golden.rs"]
pub mod golden;

use candle_core::{DType, Device};
use longspan_infer::engine::Want;
use longspan_infer::{Engine, EngineOptions, Sequence};
use longspan_kernels::attention::KvDtype;
use longspan_nn::config::ModelConfig;
use longspan_nn::model::{Decoder, Precision};
use longspan_nn::weights::safetensors::HfWeights;

/// Every policy, with limits that a text of a hundred tokens passes.
pub const POLICIES: [&str; 18] = [
    "full",
    "window:24",
    "sinks:3,20",
    "lm-infinite:20,3",
    "lm-infinite:local=20,global=3,top_k=2,top_k_from_layer=0",
    "infllm:n_init=4,n_local=16,block=8,topk=2,repr_topk=2,exec_block=8,max_cached=3,chunk=16",
    "sirllm:start=3,recent=4,top=33,decay=0.8",
    "h2o:10,8",
    "h2o:10,8,positions=cache",
    "span:full=top-1,local=window-12,sinks=2",
    "span:full=1+,local=block-prev-10,sinks=1",
    "hip:k=12,beams=0,block_q=4,block_k=2,decode_block_k=2,share=none,window=6,sinks=2,dense_layers=1,refresh=3",
    "hip:k=12,beams=5,block_q=4,block_k=2,decode_block_k=4,share=decode,window=6,sinks=2,dense_layers=1,refresh=3",
    "hip:k=12,block_q=4,block_k=3,decode_block_k=5,share=always,window=6,sinks=2,dense_layers=0,refresh=2",
    "squeezed:0.5,clusters=20,obs=8,sinks=0,share=none,refresh=1",
    "squeezed:0.5,clusters=20,obs=8,sinks=2,share=decode,refresh=3",
    "squeezed:0.6,0.4,clusters=20,coarse=6,obs=8,leaf=10",
    "cmr:24,capacity=9,segment=16,keep=0.3,min_relevance=0.5,block=8,sinks=2,delta=4",
];

/// A model of `tests/golden/tiny-models` with a window of 256 tokens.
pub fn engine(name: &str) -> Engine {
    engine_with(name, |_| {})
}

/// The same after a change of its configuration.
pub fn engine_with(name: &str, change: impl FnOnce(&mut ModelConfig)) -> Engine {
    load(name, Precision::Dense(DType::F32), change)
}

/// The same with weights in another form.
pub fn engine_as(name: &str, precision: Precision) -> Engine {
    load(name, precision, |_| {})
}

fn load(name: &str, precision: Precision, change: impl FnOnce(&mut ModelConfig)) -> Engine {
    let folder = golden::root().join("tiny-models").join(name);
    let mut config = ModelConfig::from_hf_file(&folder.join("config.json")).unwrap();
    config.context_length = 256;
    change(&mut config);
    let weights = HfWeights::open(&folder, &config).unwrap();
    let model = Decoder::load(&config, &weights, precision, &Device::Cpu).unwrap();
    Engine::new(model, format!("tiny {name}")).unwrap()
}

/// A policy by its name on the command line.
pub fn options(context: &str) -> EngineOptions {
    EngineOptions {
        kv: KvDtype::F32,
        context: context.parse().unwrap(),
    }
}

/// A text of random tokens.
pub fn ids(count: usize, seed: u32, vocab: usize) -> Vec<u32> {
    (0..count as u32)
        .map(|i| {
            (i.wrapping_mul(2_654_435_761)
                .wrapping_add(seed.wrapping_mul(0x9e37_79b9))
                >> 7)
                % vocab as u32
        })
        .collect()
}

/// Reads tokens in pieces and returns the logits of all of them.
pub fn read(engine: &Engine, sequence: &mut Sequence, tokens: &[u32], piece: usize) -> Vec<f32> {
    tokens
        .chunks(piece)
        .flat_map(|piece| {
            engine
                .forward(&mut [(&mut *sequence, piece)], Want::All)
                .unwrap()
        })
        .collect()
}

/// Fails unless the losses that an engine gives are those of its logits, and wrong targets are refused.
pub fn assert_losses(
    engine: &Engine,
    fresh: impl Fn() -> Sequence,
    tokens: &[u32],
    targets: &[u32],
) {
    let logits = engine
        .forward(&mut [(&mut fresh(), tokens)], Want::All)
        .unwrap();
    let wanted: Vec<f32> = logits
        .chunks_exact(logits.len() / tokens.len())
        .zip(targets)
        .map(|(row, &target)| {
            let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
            (sum.ln() - f64::from(row[target as usize])) as f32
        })
        .collect();
    let losses =
        |targets: &[u32]| engine.forward(&mut [(&mut fresh(), tokens)], Want::Losses(targets));
    assert_close(&losses(targets).unwrap(), &wanted, 1e-4, "losses");
    for wrong in [&targets[1..], &vec![u32::MAX; tokens.len()]] {
        assert!(losses(wrong).unwrap_err().to_string().contains("targets"));
    }
}

/// Fails unless all elements agree.
pub fn assert_close(a: &[f32], b: &[f32], tolerance: f32, what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    let worst = a
        .iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    assert!(worst <= tolerance, "{what}: differs by {worst}");
}
