//! Stacks of sequence mixers behind the engine: a fixed-size state in place of cached keys. What is written step by step is
//! what the mixer's own parallel form says, for every mixer; forks, rewinds, batches and saved sessions are exact.

mod common;

use candle_core::{D, DType, Device, Tensor};
use longspan_infer::context::ContextConfig;
use longspan_infer::engine::Want;
use longspan_infer::session::{Mode, SessionDir};
use longspan_infer::{Engine, EngineOptions, Sequence};
use longspan_nn::mixer::MixerConfig;
use longspan_nn::model::{LanguageModel, Network, Precision, Recurrent, StackConfig, StackLm};
use longspan_nn::params::ParamStore;
use longspan_nn::weights::Checkpoint;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::ops::ControlFlow;

const VOCAB: usize = 37;

fn mixers() -> Vec<Value> {
    vec![
        json!({"kind": "mamba2", "head_dim": 8, "state_size": 6, "chunk_size": 7}),
        json!({"kind": "s4", "d_state": 8, "l_max": 256}),
        json!({"kind": "s4", "d_state": 8, "mode": "diag", "init": "lin", "l_max": 256}),
        json!({"kind": "rnn", "cell": "lstm"}),
        json!({"kind": "rnn", "cell": "gru", "layers": 2}),
        json!({"kind": "rnn", "cell": "tanh", "hidden_size": 12}),
        // Its state grows: nothing of the engine depends on the size.
        json!({"kind": "attention", "heads": 2, "position": {"scheme": "none"}}),
    ]
}

fn config(mixer: &Value) -> StackConfig {
    let mixer: MixerConfig = serde_json::from_value(mixer.clone()).unwrap();
    let text = json!({"d_model": 16, "layers": 2, "mlp_ratio": 2.0, "mixer": mixer, "tie_embeddings": false});
    // Numbers that JSON cannot write come back by their defaults.
    let mut config: StackConfig = match serde_json::from_value(text.clone()) {
        Ok(config) => config,
        Err(_) => {
            let mut plain = text;
            plain["mixer"]
                .as_object_mut()
                .unwrap()
                .remove("time_step_limit");
            serde_json::from_value(plain).unwrap()
        }
    };
    config.mixer = mixer;
    config
}

fn model(mixer: &Value) -> StackLm {
    let store = ParamStore::new(5, DType::F32, &Device::Cpu);
    StackLm::new(&config(mixer), VOCAB, &store.root()).unwrap()
}

fn engine(mixer: &Value) -> Engine {
    let recurrent = Recurrent::new(model(mixer), Some(64)).unwrap();
    let network = Network::Recurrent(Box::new(recurrent));
    Engine::new(network, format!("tiny {mixer}")).unwrap()
}

fn fresh(engine: &Engine) -> Sequence {
    engine.sequence(&EngineOptions::default(), None).unwrap()
}

fn ids(count: usize, salt: usize) -> Vec<u32> {
    (0..count)
        .map(|i| ((i * 7919 + salt * 31 + i * i) % VOCAB) as u32)
        .collect()
}

/// Logits after every token, by the parallel form over the whole text.
fn parallel(model: &StackLm, tokens: &[u32]) -> Vec<Vec<f32>> {
    let hidden = model.hidden(tokens, &[tokens.len()]).unwrap();
    LanguageModel::logits(model, &hidden)
        .unwrap()
        .to_vec2()
        .unwrap()
}

fn best(logits: &[f32]) -> u32 {
    let logits = Tensor::new(logits, &Device::Cpu).unwrap();
    logits.argmax(D::Minus1).unwrap().to_scalar().unwrap()
}

fn near(found: &[f32], wanted: &[f32], what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (a, b) in found.iter().zip(wanted) {
        assert!((a - b).abs() < 2e-4 * b.abs().max(1.0), "{what}: {a} {b}");
    }
}

fn read(engine: &Engine, sequence: &mut Sequence, tokens: &[u32]) -> Vec<f32> {
    engine
        .prefill(sequence, tokens, &mut |_, _| Ok(ControlFlow::Continue(())))
        .unwrap()
}

#[test]
fn greedy_text_is_that_of_the_parallel_form() {
    for mixer in mixers() {
        let (engine, model) = (engine(&mixer), model(&mixer));
        let mut tokens = ids(23, 1);
        let mut sequence = fresh(&engine);
        let mut logits = read(&engine, &mut sequence, &tokens);
        for _ in 0..30 {
            let wanted = parallel(&model, &tokens).pop().unwrap();
            near(&logits, &wanted, &format!("{mixer} after {}", tokens.len()));
            let next = best(&logits);
            assert_eq!(next, best(&wanted), "{mixer}");
            tokens.push(next);
            logits = engine
                .forward(&mut [(&mut sequence, &[next])], Want::Last)
                .unwrap();
        }
        assert_eq!(sequence.tokens(), tokens);
    }
}

#[test]
fn losses_are_those_of_the_logits() {
    for mixer in mixers() {
        let engine = engine(&mixer);
        let (tokens, targets) = (ids(40, 3), ids(40, 4));
        common::assert_losses(&engine, || fresh(&engine), &tokens, &targets);
    }
}

#[test]
fn any_cut_of_the_text_gives_the_same_and_the_state_stays_small() {
    for mixer in mixers() {
        let (engine, model) = (engine(&mixer), model(&mixer));
        let tokens = ids(50, 2);
        let wanted = parallel(&model, &tokens).concat();
        let mut first_bytes = 0;
        for piece in [1, 7, 50] {
            let mut sequence = fresh(&engine);
            let mut found = Vec::new();
            for piece in tokens.chunks(piece) {
                found.extend(
                    engine
                        .forward(&mut [(&mut sequence, piece)], Want::All)
                        .unwrap(),
                );
                first_bytes = match first_bytes {
                    0 => sequence.kv_bytes().memory,
                    bytes => bytes,
                };
            }
            near(&found, &wanted, &format!("{mixer} by {piece}"));
            if mixer["kind"] != "attention" {
                assert_eq!(sequence.kv_bytes().memory, first_bytes, "{mixer}");
            }
        }
    }
}

#[test]
fn sequences_of_a_batch_do_not_touch_each_other() {
    for mixer in mixers() {
        let engine = engine(&mixer);
        let texts: Vec<Vec<u32>> = [9, 4, 9, 1].iter().map(|&n| ids(n, n)).collect();
        let mut alone = Vec::new();
        for text in &texts {
            let mut sequence = fresh(&engine);
            let mut logits = read(&engine, &mut sequence, text);
            for token in [3u32, 8] {
                logits = engine
                    .forward(&mut [(&mut sequence, &[token])], Want::Last)
                    .unwrap();
            }
            alone.push(logits);
        }
        let mut sequences: Vec<Sequence> = texts.iter().map(|_| fresh(&engine)).collect();
        let mut rows: Vec<(&mut Sequence, &[u32])> = sequences
            .iter_mut()
            .zip(&texts)
            .map(|(sequence, text)| (sequence, &text[..]))
            .collect();
        engine.forward(&mut rows, Want::Nothing).unwrap();
        let mut logits = Vec::new();
        for token in [[3u32], [8]] {
            let mut rows: Vec<(&mut Sequence, &[u32])> =
                sequences.iter_mut().map(|s| (s, &token[..])).collect();
            logits = engine.forward(&mut rows, Want::Last).unwrap();
        }
        near(&logits, &alone.concat(), &mixer.to_string());
        let lengths: Vec<usize> = sequences.iter().map(Sequence::len).collect();
        assert_eq!(lengths, [11, 6, 11, 3]);
    }
}

#[test]
fn forks_and_rewinds_are_snapshots() {
    for mixer in mixers() {
        let engine = engine(&mixer);
        let tokens = ids(12, 3);
        let mut sequence = fresh(&engine);
        read(&engine, &mut sequence, &tokens);
        let error = engine.truncate(&mut sequence, 5).unwrap_err().to_string();
        assert!(error.contains("state") && error.contains("12"), "{error}");
        sequence.commit();
        let mut fork = sequence.fork();
        let step = |sequence: &mut Sequence, token: u32| {
            engine
                .forward(&mut [(sequence, &[token])], Want::Last)
                .unwrap()
        };
        let wanted = step(&mut fork, 4);
        for token in [9, 9, 1] {
            step(&mut sequence, token);
        }
        engine.truncate(&mut sequence, 14).unwrap();
        assert_eq!(sequence.tokens()[12..], [9, 9]);
        engine.truncate(&mut sequence, 12).unwrap();
        assert_eq!(step(&mut sequence, 4), wanted, "{mixer}");
        assert!(engine.truncate(&mut sequence, 11).is_err());
        assert!(!sequence.spec().rewinds);
    }
}

#[test]
fn a_saved_session_goes_on_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    for (index, mixer) in mixers().iter().enumerate() {
        let engine = engine(mixer);
        let mut sequence = fresh(&engine);
        read(&engine, &mut sequence, &ids(19, 4));
        let session = SessionDir::new(folder.path().join(index.to_string()));
        session.create().unwrap();
        session.save(&engine, &sequence, Value::Null).unwrap();
        let (mut loaded, _) = session.load(&engine, Mode::Resume).unwrap();
        assert_eq!(loaded.tokens(), sequence.tokens());
        let next = |sequence: &mut Sequence| read(&engine, sequence, &[5, 6]);
        assert_eq!(next(&mut loaded), next(&mut sequence), "{mixer}");
        // A damaged index is an error, never a panic.
        let path = session.path().join("index");
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(session.load(&engine, Mode::Read).is_err());
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let engine = engine(&mixers()[0]);
    for context in ["infllm", "lm-infinite", "window", "h2o"] {
        let context: ContextConfig = context.parse().unwrap();
        let options = EngineOptions {
            context,
            ..EngineOptions::default()
        };
        let error = engine.sequence(&options, None).err().unwrap().to_string();
        assert!(error.contains("state"), "{error}");
    }
    let rope = engine.under_rope(Some("linear:2".parse().unwrap()));
    assert!(rope.err().unwrap().to_string().contains("no rotary"));
    assert_eq!(engine.kv_bytes_per_token(EngineOptions::default().kv), 0);
    let mut sequence = fresh(&engine);
    assert!(
        engine
            .forward(&mut [(&mut sequence, &[VOCAB as u32])], Want::Last)
            .is_err()
    );
    let both = json!({"kind": "rnn", "bidirectional": true});
    let error = Recurrent::new(model(&both), None)
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("both ways"), "{error}");
}

/// A folder in Hugging Face's layout, made of a golden case of transformers' Mamba-2.
#[test]
fn hugging_face_mamba2_folders_are_read_and_stepped() {
    for case in &common::golden::cases_of("stuffed-mamba", "causal_lm") {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let mut config: Value = serde_json::Value::Object(Default::default());
        for key in [
            "hidden_size",
            "num_hidden_layers",
            "vocab_size",
            "num_heads",
            "head_dim",
            "state_size",
            "n_groups",
            "conv_kernel",
            "chunk_size",
            "expand",
            "use_bias",
            "use_conv_bias",
            "layer_norm_epsilon",
        ] {
            config[key] = case.meta(key).clone();
        }
        config["model_type"] = "mamba2".into();
        let text = config.to_string();
        let text = format!(
            "{}, \"time_step_limit\": [0.0, Infinity]}}",
            &text[..text.len() - 1]
        );
        std::fs::write(path("config.json"), text).unwrap();
        let tokenizer = longspan_data::tokenize::byte_vocabulary().to_string();
        std::fs::write(path("tokenizer.json"), tokenizer).unwrap();
        let tensors: HashMap<String, Tensor> = case
            .tensors
            .keys()
            .filter_map(|name| {
                let values: Vec<f32> = case.f64(name).iter().map(|&v| v as f32).collect();
                let tensor = Tensor::from_vec(values, case.shape(name), &Device::Cpu).unwrap();
                Some((name.strip_prefix("param.")?.to_string(), tensor))
            })
            .collect();
        candle_core::safetensors::save(&tensors, path("model.safetensors")).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let network = checkpoint.network(Precision::Packed, &Device::Cpu).unwrap();
        let engine = Engine::new(network, checkpoint.fingerprint.to_string()).unwrap();
        let ids: Vec<u32> = case.i64("ids").iter().map(|&id| id as u32).collect();
        let (batch, length) = (case.shape("ids")[0], case.shape("ids")[1]);
        let golden: Vec<f32> = case.f64("logits").iter().map(|&v| v as f32).collect();
        let width = golden.len() / batch;
        for (row, golden) in ids.chunks(length).zip(golden.chunks(width)) {
            let mut sequence = fresh(&engine);
            let mut found = engine
                .forward(&mut [(&mut sequence, &row[..3])], Want::All)
                .unwrap();
            for token in &row[3..] {
                found.extend(
                    engine
                        .forward(&mut [(&mut sequence, &[*token])], Want::All)
                        .unwrap(),
                );
            }
            near(&found, golden, "Hugging Face");
        }
    }
}
