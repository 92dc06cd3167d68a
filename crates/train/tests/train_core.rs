//! Goldens `train-core` through the trainer: optimiser steps with clipping, schedules; and its laws: checkpointed = plain,
//! packed = separate, 2 and 4 ranks = 1, resumed = uninterrupted, all on the decoder that also answers.

#[path = "../../../tests/golden.rs"]
mod golden;

use candle_core::{DType, Device, Tensor};
use golden::Case;
use longspan_nn::config::ModelConfig;
use longspan_nn::model::{Decoder, LanguageModel, StackConfig, StackLm, new_decoder};
use longspan_nn::params::{Init, ParamStore};
use longspan_train::batch::PackedBatch;
use longspan_train::error::Result;
use longspan_train::objective::{LanguageModeling, Objective, Recompute};
use longspan_train::optim::{OptimConfig, Optimizer};
use longspan_train::run::{self, Event, RunFolder};
use longspan_train::schedule::Schedule;
use longspan_train::source::{Source, TextSource};
use longspan_train::trainer::{LoopConfig, Trainer};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

fn config(vocab: usize, width: usize, layers: usize, case: Option<&Case>) -> ModelConfig {
    let mut json = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": width,
        "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "max_position_embeddings": 64, "hidden_act": "silu",
    });
    if let Some(case) = case {
        json["intermediate_size"] = case.meta("mlp_width").clone();
        json["num_attention_heads"] = case.meta("heads").clone();
        json["num_key_value_heads"] = case.meta("kv_heads").clone();
        json["rms_norm_eps"] = case.meta("rms_eps").clone();
        json["rope_theta"] = case.meta("rope_theta").clone();
        json["tie_word_embeddings"] = case.meta("tied_embeddings").clone();
    }
    ModelConfig::from_hf_json(Path::new("train-core"), json.to_string().as_bytes()).unwrap()
}

/// The golden's weights in a store, and the model over them.
fn golden_model(case: &Case) -> (Arc<ParamStore>, Arc<dyn LanguageModel>) {
    let (vocab, width) = (case.meta_usize("vocab"), case.meta_usize("width"));
    let config = config(vocab, width, case.meta_usize("layers"), Some(case));
    let store = ParamStore::new(0, DType::F32, &Device::Cpu);
    for (name, tensor) in &case.tensors {
        if let Some(name) = name.strip_prefix("w.") {
            let values = Init::Values(tensor.values.clone());
            store.root().get(name, &tensor.shape, values).unwrap();
        }
    }
    let model = Decoder::from_tensors(&config, &store.tensors(), &Device::Cpu).unwrap();
    (Arc::new(store), Arc::new(model))
}

/// The golden's packed row: labels of -100 have no weight.
fn golden_batch(case: &Case) -> PackedBatch {
    let (ids, labels) = (case.i64("input_ids"), case.i64("labels"));
    let mut batch = PackedBatch::default();
    let mut start = 0;
    for length in case.i64("seq_lengths") {
        let tokens: Vec<u32> = ids[start..start + length as usize]
            .iter()
            .map(|&id| id as u32)
            .collect();
        batch.push(&tokens, |index| {
            if labels[start + index] == -100 {
                0.0
            } else {
                1.0
            }
        });
        for (index, &token) in tokens.iter().enumerate().skip(1) {
            let label = labels[start + index];
            assert!(label == -100 || label as u32 == token);
        }
        start += length as usize;
    }
    batch
}

/// The same batch for ever.
struct Again(PackedBatch);

impl Source for Again {
    type Batch = PackedBatch;
    fn next(&mut self, count: usize) -> Result<Vec<PackedBatch>> {
        Ok(vec![self.0.clone(); count])
    }
    fn state(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
    fn load(&mut self, _: &serde_json::Value) -> Result<()> {
        Ok(())
    }
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn optimiser_steps_are_those_of_pytorch() {
    for case in &golden::cases_of("train-core", "tiny_llama_packed") {
        for prefix in ["adamw", "rmsprop"] {
            let meta = case.meta(prefix);
            let number = |key: &str| meta[key].as_f64().unwrap();
            let optim = match prefix {
                "adamw" => OptimConfig::AdamW {
                    lr: number("lr"),
                    beta1: number("beta1"),
                    beta2: number("beta2"),
                    eps: number("eps"),
                    weight_decay: number("weight_decay"),
                },
                _ => OptimConfig::RmsProp {
                    lr: number("lr"),
                    alpha: number("alpha"),
                    eps: number("eps"),
                },
            };
            let (store, model) = golden_model(case);
            let objective = LanguageModeling::new(model, Recompute::None, 7).unwrap();
            let config = LoopConfig {
                steps: meta["steps"].as_u64().unwrap(),
                clip: Some(number("clip_norm")),
                schedule: Schedule::Constant { warmup: 0 },
                ..LoopConfig::default()
            };
            let mut trainer = Trainer::new(
                store.clone(),
                Optimizer::new(optim).unwrap(),
                Again(golden_batch(case)),
                objective,
                config,
            )
            .unwrap();
            let (mut losses, mut norms) = (Vec::new(), Vec::new());
            while let Some(event) = trainer.step().unwrap() {
                losses.push(event.loss);
                norms.push(event.grad_norm);
            }
            case.assert_close(&format!("{prefix}_losses"), &losses);
            case.assert_close(&format!("{prefix}_gradnorms"), &norms);
            let tensors = store.tensors();
            let mut compared = 0;
            for name in case.tensors.keys() {
                if let Some(weight) = name.strip_prefix(&format!("{prefix}_final.")) {
                    case.assert_close(name, &flat(&tensors[weight]));
                    compared += 1;
                }
            }
            assert!(compared >= 3);
        }
    }
}

#[test]
fn cosine_schedules_are_those_of_the_golden() {
    let rows = golden::json("train-core", "cosine_min_ratio.json");
    for row in rows.as_array().unwrap() {
        let schedule = Schedule::Cosine {
            warmup: row["warmup"].as_u64().unwrap(),
            min_lr_ratio: row["min_lr_ratio"].as_f64().unwrap(),
        };
        let total = row["total"].as_u64().unwrap();
        for (step, expected) in row["multiplier"].as_array().unwrap().iter().enumerate() {
            let found = schedule.multiplier(step as u64, total);
            let expected = expected.as_f64().unwrap();
            assert!(
                (found - expected).abs() < 1e-9,
                "{row}: step {step}: {found}"
            );
        }
    }
}

fn tiny(seed: u64) -> (Arc<ParamStore>, Arc<dyn LanguageModel>) {
    let config = config(40, 16, 5, None);
    let store = ParamStore::new(seed, DType::F32, &Device::Cpu);
    let model = new_decoder(&config, &store, 0.1).unwrap();
    (Arc::new(store), Arc::new(model))
}

fn texts() -> Vec<Vec<u32>> {
    (0..9u32)
        .map(|d| (0..11 + d).map(|t| (t * t + 7 * d) % 40).collect())
        .collect()
}

fn gradients(
    model: &Arc<dyn LanguageModel>,
    store: &ParamStore,
    recompute: Recompute,
    rows: usize,
    batches: &[PackedBatch],
) -> (f64, BTreeMap<String, Vec<f32>>) {
    let objective = LanguageModeling::new(model.clone(), recompute, rows).unwrap();
    let weight: f64 = batches.iter().map(|b| objective.weight(b)).sum();
    let mut total = 0.0;
    let mut out: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    for batch in batches {
        let (loss, grads) = objective.gradients(batch, 1.0 / weight).unwrap();
        total += loss;
        for (name, param) in store.list() {
            let gradient = flat(grads.get(param.var.as_tensor()).expect(&name));
            match out.get_mut(&name) {
                Some(sum) => sum.iter_mut().zip(gradient).for_each(|(s, g)| *s += g),
                None => drop(out.insert(name, gradient)),
            }
        }
    }
    (total, out)
}

fn assert_same(a: &(f64, BTreeMap<String, Vec<f32>>), b: &(f64, BTreeMap<String, Vec<f32>>)) {
    assert!((a.0 - b.0).abs() < 1e-6, "losses {} and {}", a.0, b.0);
    assert_eq!(a.1.len(), b.1.len());
    for (name, x) in &a.1 {
        for (x, y) in x.iter().zip(&b.1[name]) {
            assert!(
                (x - y).abs() <= 1e-6 + 1e-5 * x.abs(),
                "{name}: {x} and {y}"
            );
        }
    }
}

fn packed(texts: &[Vec<u32>]) -> PackedBatch {
    let mut batch = PackedBatch::default();
    texts.iter().for_each(|text| batch.push_text(text));
    batch
}

#[test]
fn checkpointed_gradients_are_the_plain_ones() {
    let (store, model) = tiny(1);
    let batch = [packed(&texts())];
    let plain = gradients(&model, &store, Recompute::None, 4096, &batch);
    for (every, rows) in [(1, 4096), (2, 5), (3, 1), (9, 64)] {
        let again = gradients(&model, &store, Recompute::Every(every), rows, &batch);
        assert_same(&plain, &again);
    }
    assert!(LanguageModeling::new(model, Recompute::Every(0), 1).is_err());
}

#[test]
fn packed_documents_train_as_separate_ones() {
    let (store, model) = tiny(2);
    let together = gradients(&model, &store, Recompute::None, 4096, &[packed(&texts())]);
    let separate: Vec<PackedBatch> = texts()
        .iter()
        .map(|text| packed(std::slice::from_ref(text)))
        .collect();
    let apart = gradients(&model, &store, Recompute::None, 4096, &separate);
    assert_same(&together, &apart);
    // And a token of one document does not reach another's loss.
    let objective = LanguageModeling::new(model, Recompute::None, 64).unwrap();
    let before = objective.losses(&packed(&texts())).unwrap();
    let mut changed = texts();
    changed[0]
        .iter_mut()
        .for_each(|token| *token = (*token + 1) % 40);
    let after = objective.losses(&packed(&changed)).unwrap();
    let first = changed[0].len();
    assert_ne!(before[..first], after[..first]);
    assert_eq!(before[first..], after[first..]);
}

fn trainer(ranks: usize, steps: u64) -> Trainer<TextSource, LanguageModeling> {
    let (store, model) = tiny(3);
    let objective = LanguageModeling::new(model, Recompute::Every(2), 16).unwrap();
    let source = TextSource::new(texts(), 12, 24, 5).unwrap();
    let config = LoopConfig {
        steps,
        micro_batches: 4,
        ranks,
        clip: Some(0.5),
        schedule: Schedule::Cosine {
            warmup: 2,
            min_lr_ratio: 0.1,
        },
    };
    let optimizer = Optimizer::new(OptimConfig::adamw(1e-2)).unwrap();
    Trainer::new(store, optimizer, source, objective, config).unwrap()
}

fn bits(store: &ParamStore) -> Vec<(String, Vec<u32>)> {
    let mut out: Vec<(String, Vec<u32>)> = store
        .tensors()
        .iter()
        .map(|(name, t)| (name.clone(), flat(t).iter().map(|v| v.to_bits()).collect()))
        .collect();
    out.sort();
    out
}

#[test]
fn codebooks_of_two_and_four_ranks_are_those_of_one() {
    let stack = serde_json::json!({
        "d_model": 8, "layers": 2, "norm": false, "residual": false,
        "mixer": {"kind": "longvq", "key_dim": 4, "codes": 6, "block": 4, "ema_order": 2},
    });
    let stack: StackConfig = serde_json::from_value(stack).unwrap();
    let run = |ranks| {
        let store = Arc::new(ParamStore::new(3, DType::F32, &Device::Cpu));
        let model = Arc::new(StackLm::new(&stack, 40, &store.root()).unwrap());
        let objective = LanguageModeling::new(model, Recompute::Every(1), 16).unwrap();
        let source = TextSource::new(texts(), 12, 24, 5).unwrap();
        let config = LoopConfig {
            steps: 4,
            micro_batches: 4,
            ranks,
            ..LoopConfig::default()
        };
        let optimizer = Optimizer::new(OptimConfig::adamw(1e-2)).unwrap();
        let start = bits(&store);
        let mut trainer = Trainer::new(store, optimizer, source, objective, config).unwrap();
        while trainer.step().unwrap().is_some() {}
        let end = bits(&trainer.params);
        for name in ["c_sum", "c_count"] {
            let of = |list: &[(String, Vec<u32>)]| -> Vec<Vec<u32>> {
                let kept = list.iter().filter(|(path, _)| path.ends_with(name));
                kept.map(|(_, values)| values.clone()).collect()
            };
            assert_eq!(of(&end).len(), 2, "{name} of two layers");
            assert!(of(&start) != of(&end), "{name} has moved");
        }
        end
    };
    let one = run(1);
    for ranks in [2, 4] {
        assert_eq!(run(ranks), one, "{ranks} ranks");
    }
}

#[test]
fn two_and_four_ranks_are_one() {
    let run = |ranks| {
        let mut trainer = trainer(ranks, 6);
        let mut losses = Vec::new();
        while let Some(event) = trainer.step().unwrap() {
            losses.push(event.loss.to_bits());
        }
        (losses, bits(&trainer.params))
    };
    let one = run(1);
    assert_eq!(one.0.len(), 6);
    for ranks in [2, 4] {
        assert_eq!(run(ranks), one, "{ranks} ranks");
    }
    let config = LoopConfig {
        ranks: 3,
        micro_batches: 2,
        ..LoopConfig::default()
    };
    assert!(config.check().unwrap_err().to_string().contains("ranks"));
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, broken) = (folder.path().join("whole"), folder.path().join("broken"));
    let go = |path: &Path, stop: u64| {
        let mut trainer = trainer(2, 9);
        let mut run = RunFolder::open(path, "a = 1\n", 2).unwrap();
        run.resume(&mut trainer).unwrap();
        while trainer.step < stop {
            let event = trainer.step().unwrap().unwrap();
            run.log(&Event::Step(event)).unwrap();
            if trainer.step.is_multiple_of(2) || trainer.finished() {
                run.save(&trainer).unwrap();
            }
        }
        bits(&trainer.params)
    };
    let expected = go(&whole, 9);
    // Stops after steps 1 (before any checkpoint), 5 (one after a checkpoint), then ends; the last line of the log is
    // cut in two, as a crash may leave it, and a checkpoint is half written.
    go(&broken, 1);
    go(&broken, 5);
    let log = broken.join("events.jsonl");
    let mut text = std::fs::read(&log).unwrap();
    text.truncate(text.len() - 9);
    std::fs::write(&log, text).unwrap();
    std::fs::create_dir(broken.join("tmp-step-000006")).unwrap();
    assert_eq!(go(&broken, 9), expected);
    let losses = |path: &Path| -> Vec<u64> {
        run::events(path)
            .unwrap()
            .iter()
            .map(|event| match event {
                Event::Step(event) => event.loss.to_bits(),
                other => panic!("{other:?}"),
            })
            .collect()
    };
    assert_eq!(losses(&whole).len(), 9);
    assert_eq!(losses(&whole), losses(&broken));
    assert_eq!(
        run::checkpoints(&whole).unwrap(),
        ["step-000008", "step-000009"]
    );
    // The same folder under another configuration, and a checkpoint that is damaged, are refused.
    let other = RunFolder::open(&whole, "a = 2\n", 2).err().unwrap();
    assert!(other.to_string().contains("config.toml"), "{other}");
    let model = whole.join("step-000009/model.safetensors");
    std::fs::write(&model, b"short").unwrap();
    let mut run = RunFolder::open(&whole, "a = 1\n", 2).unwrap();
    let error = run.resume(&mut trainer(1, 9)).unwrap_err().to_string();
    assert!(error.contains("model.safetensors"), "{error}");
}

#[test]
fn losses_that_are_not_finite_leave_the_parameters_and_then_end_the_run() {
    let mut trainer = trainer(1, 100);
    let params = trainer.params.list();
    let (name, param) = &params[0];
    let healthy = param.var.as_detached_tensor().copy().unwrap();
    param.var.set(&(&healthy * f64::NAN).unwrap()).unwrap();
    let before = bits(&trainer.params);
    let event = trainer.step().unwrap().unwrap();
    assert!(event.skipped);
    assert_eq!(bits(&trainer.params), before, "{name}");
    param.var.set(&healthy).unwrap();
    assert!(!trainer.step().unwrap().unwrap().skipped);
    assert_eq!(trainer.not_finite, 0);
    param.var.set(&(&healthy * f64::NAN).unwrap()).unwrap();
    let error = loop {
        if let Err(error) = trainer.step() {
            break error;
        }
    };
    assert!(error.to_string().contains("5 steps in a row"), "{error}");
}

#[test]
fn a_tiny_decoder_learns_its_texts() {
    let mut trainer = trainer(2, 60);
    let mut losses = Vec::new();
    while let Some(event) = trainer.step().unwrap() {
        losses.push(event.loss);
    }
    let last = losses[losses.len() - 4..].iter().sum::<f64>() / 4.0;
    assert!(
        losses[0] > 3.0 && last < 0.5 * losses[0],
        "{} to {last}",
        losses[0]
    );
}
