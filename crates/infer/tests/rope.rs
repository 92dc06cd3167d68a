//! Rotary rules set by hand, through the engine: against a naive attention that keeps keys un-rotated, as
//! texts grow past the window, under policies, and in saved sessions.

mod common;

use candle_core::{DType, Device, Tensor};
use common::{assert_close, golden, ids, options, read};
use longspan_infer::engine::Want;
use longspan_infer::session::{Mode, SessionDir};
use longspan_infer::{Engine, EngineError, EngineOptions, Sequence};
use longspan_kernels::attention::KvDtype;
use longspan_nn::attention::{Attend, CausalAttention};
use longspan_nn::config::ModelConfig;
use longspan_nn::model::{Decoder, Network, Precision};
use longspan_nn::position::{LayerRopes, RopeLayout, RopeOverride, RopeTable, XPos, rotate};
use longspan_nn::weights::safetensors::HfWeights;
use std::ops::ControlFlow;
use std::sync::Arc;

/// The window of the tiny models here, short enough to be passed several times.
const WINDOW: usize = 16;

/// Rules of every kind; those that depend on length among them.
const RULES: [&str; 9] = [
    "linear:4",
    "power:0.5+truncated:64",
    "ntk:4",
    "yarn:4",
    "llama3:4",
    "abf:500000",
    "xpos:64",
    "dynamic:2",
    "clex-init:8",
];

fn decoder(name: &str, layers: Option<usize>) -> Decoder {
    decoder_of(name, layers, WINDOW)
}

fn decoder_of(name: &str, layers: Option<usize>, window: usize) -> Decoder {
    let folder = golden::root().join("tiny-models").join(name);
    let mut config = ModelConfig::from_hf_file(&folder.join("config.json")).unwrap();
    config.context_length = window;
    for rope in &mut config.rope {
        rope.max_position_embeddings = window;
    }
    let weights = HfWeights::open(&folder, &config).unwrap();
    if let Some(layers) = layers {
        config.num_layers = layers;
        config.layers.truncate(layers);
    }
    let precision = Precision::Dense(DType::F32);
    Decoder::load(&config, &weights, precision, &Device::Cpu).unwrap()
}

fn engine(name: &str, rope: &str) -> Engine {
    Engine::with_rope(decoder(name, None), name, rope.parse().unwrap()).unwrap()
}

fn fresh(engine: &Engine, context: &str) -> Sequence {
    engine.sequence(&options(context), None).unwrap()
}

/// Attention by its definition: un-rotated keys, turned anew for every call.
struct Naive<'a> {
    config: &'a ModelConfig,
    ropes: &'a LayerRopes,
    /// Per layer, keys and values of all tokens: [tokens, kv_heads head_dim].
    cache: Vec<(Vec<f32>, Vec<f32>)>,
}

impl<'a> Naive<'a> {
    fn new(config: &'a ModelConfig, ropes: &'a LayerRopes) -> Self {
        let cache = vec![Default::default(); config.num_layers];
        Naive {
            config,
            ropes,
            cache,
        }
    }
}

impl Attend for Naive<'_> {
    fn attend(
        &mut self,
        layer: usize,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let c = self.config;
        let flat = |x: &Tensor| x.contiguous()?.flatten_all()?.to_vec1::<f32>();
        let (keys, values) = &mut self.cache[layer];
        keys.extend(flat(key)?);
        values.extend(flat(value)?);
        let (dim, width) = (c.head_dim, c.num_kv_heads * c.head_dim);
        let (count, seen) = (query.dim(0)?, keys.len() / width);
        let frequencies = self
            .ropes
            .of_layer(layer)
            .map(|index| self.ropes.bases()[index].frequencies(Some(seen)));
        let turned = |x: &[f32], position: usize, is_key: bool| -> Vec<f32> {
            let mut x = x.to_vec();
            let Some(frequencies) = &frequencies else {
                return x;
            };
            let mut plain = frequencies.clone();
            plain.scale_base = None;
            if is_key {
                plain.query_factor = 1.0;
            }
            if let Some(scale_base) = frequencies.scale_base {
                let mut xpos = XPos::new(2, RopeLayout::Half);
                xpos.scale_base = scale_base;
                match is_key {
                    true => xpos.rotate_key(&plain, position as f64, &mut x),
                    false => xpos.rotate_query(&plain, position as f64, &mut x),
                }
            } else {
                let half = plain.inv_freq.len();
                let (mut cos, mut sin) = (vec![0.0; half], vec![0.0; half]);
                RopeTable::compute_row(&plain, position as f64, &mut cos, &mut sin);
                rotate(RopeLayout::Half, &mut x, &cos, &sin);
            }
            x
        };
        let query = flat(query)?;
        let window = c.layers[layer].sliding_window.unwrap_or(usize::MAX);
        let mut out = Vec::with_capacity(query.len());
        for (index, row) in query.chunks_exact(c.num_heads * dim).enumerate() {
            let position = seen - count + index;
            for (head, q) in row.chunks_exact(dim).enumerate() {
                let at = head / (c.num_heads / c.num_kv_heads) * dim;
                let q = turned(q, position, false);
                let first = (position + 1).saturating_sub(window);
                let logits: Vec<f64> = (first..=position)
                    .map(|j| {
                        let k = turned(&keys[j * width + at..][..dim], j, true);
                        let dot: f64 = q
                            .iter()
                            .zip(&k)
                            .map(|(&q, &k)| f64::from(q) * f64::from(k))
                            .sum();
                        let logit = dot * f64::from(c.attention_scale);
                        c.attention_softcap.map_or(logit, |cap| {
                            f64::from(cap) * (logit / f64::from(cap)).tanh()
                        })
                    })
                    .collect();
                let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = logits.iter().map(|l| (l - top).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for d in 0..dim {
                    let mixed = weights
                        .iter()
                        .zip(first..)
                        .map(|(w, j)| w / sum * f64::from(values[j * width + at + d]));
                    out.push(mixed.sum::<f64>() as f32);
                }
            }
        }
        Tensor::from_vec(out, (count, c.num_heads * dim), &Device::Cpu)
    }
}

fn naive(model: &Network, attend: &mut Naive<'_>, tokens: &[u32], piece: usize) -> Vec<f32> {
    tokens
        .chunks(piece)
        .flat_map(|piece| {
            let hidden = model.hidden(piece, attend).unwrap();
            let logits = model.logits(&hidden).unwrap();
            logits.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        })
        .collect()
}

#[test]
fn every_rule_is_that_of_the_naive_attention() {
    for name in ["llama-tied", "gemma3", "smollm3", "qwen3"] {
        for rule in RULES {
            let rope: RopeOverride = rule.parse().unwrap();
            let engine = engine(name, rule);
            let model = engine.model();
            let ropes = LayerRopes::with_override(model.config(), &rope).unwrap();
            let tokens = ids(4 * WINDOW, 1, model.config().vocab_size);
            // Growing past one window after the other, in steps that cross them and token by token.
            for piece in [4 * WINDOW, 7, 1] {
                let want = naive(
                    model,
                    &mut Naive::new(model.config(), &ropes),
                    &tokens,
                    piece,
                );
                let found = read(&engine, &mut fresh(&engine, "full"), &tokens, piece);
                let what = format!("{name} {rule} in pieces of {piece}");
                assert_close(&found, &want, 5e-5, &what);
            }
            let own = Engine::new(decoder(name, None), name.into()).unwrap();
            let plain = read(&own, &mut fresh(&own, "full"), &tokens, 4 * WINDOW);
            let ruled = read(&engine, &mut fresh(&engine, "full"), &tokens, 4 * WINDOW);
            assert_ne!(plain, ruled, "{name} {rule} changes nothing");
        }
    }
}

/// With one layer nothing but the angles depends on the length, so a text that grew gives at each length
/// what the text of that length gives when read at once.
#[test]
fn a_grown_text_is_the_text_read_at_once() {
    let config = json_longrope();
    for rule in [
        &config.1[..],
        "dynamic:2",
        "clex-init:8",
        "xpos:64+dynamic:2",
    ] {
        let engine =
            Engine::with_rope(decoder("llama-tied", Some(1)), "one", rule.parse().unwrap())
                .unwrap();
        let vocab = engine.model().config().vocab_size;
        let tokens = ids(3 * WINDOW + 5, 2, vocab);
        for step in [1, 3, WINDOW] {
            let mut grown = fresh(&engine, "full");
            let mut turns = 0;
            let mut end = 0;
            while end < tokens.len() {
                let start = end;
                end = (end + step).min(tokens.len());
                let rows = &mut [(&mut grown, &tokens[start..end])];
                let last = engine.forward(rows, Want::Last).unwrap();
                let whole = read(&engine, &mut fresh(&engine, "full"), &tokens[..end], end);
                let what = format!("{rule} at {end} tokens in steps of {step}");
                assert_close(&last, &whole[whole.len() - vocab..], 1e-5, &what);
                turns += 1;
            }
            assert!(turns >= 4);
        }
    }
}

/// A file with factors for the tiny models' 8 rotated pairs or fewer, and the override that names it.
fn json_longrope() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("factors.json");
    let pairs = decoder("llama-tied", Some(1)).config().head_dim / 2;
    let long: Vec<f32> = (0..pairs).map(|j| 1.0 + j as f32 / 2.0).collect();
    let value = serde_json::json!({
        "short_factor": vec![1.0; pairs], "long_factor": long, "factor": 4.0,
        "original_max_position_embeddings": WINDOW,
    });
    std::fs::write(&path, value.to_string()).unwrap();
    (folder, format!("longrope:{}", path.display()))
}

/// Once the length is known beforehand, how a text is cut into calls does not matter, in any depth.
#[test]
fn an_expected_length_makes_pieces_equal() {
    for rule in ["dynamic:2", "clex-init:8"] {
        let engine = engine("llama-tied", rule);
        let vocab = engine.model().config().vocab_size;
        let tokens = ids(4 * WINDOW, 3, vocab);
        let whole = read(&engine, &mut fresh(&engine, "full"), &tokens, tokens.len());
        for piece in [1, 5, WINDOW] {
            let mut sequence = fresh(&engine, "full");
            sequence.expect_length(tokens.len());
            let found = read(&engine, &mut sequence, &tokens, piece);
            assert_close(
                &found,
                &whole,
                5e-5,
                &format!("{rule} in pieces of {piece}"),
            );
        }
        // Unannounced, early tokens are read at the angles of a shorter text.
        let grown = read(&engine, &mut fresh(&engine, "full"), &tokens, 1);
        assert!(grown.iter().zip(&whole).any(|(a, b)| (a - b).abs() > 1e-3));
        // A prompt says its length itself.
        let mut sequence = fresh(&engine, "full");
        let last = engine
            .prefill(&mut sequence, &tokens, &mut |_, _| {
                Ok(ControlFlow::Continue(()))
            })
            .unwrap();
        assert_close(&last, &whole[whole.len() - vocab..], 5e-5, rule);
    }
}

#[test]
fn rules_compose_with_policies() {
    for rule in RULES {
        let engine = engine("qwen2", rule);
        let tokens = ids(60, 4, engine.model().config().vocab_size);
        let full = read(&engine, &mut fresh(&engine, "full"), &tokens, 60);
        for context in ["window:60", "lm-infinite:60,4"] {
            let mut sequence = fresh(&engine, context);
            sequence.expect_length(60);
            let found = read(&engine, &mut sequence, &tokens, 16);
            assert_close(&found, &full, 5e-5, &format!("{rule} under {context}"));
        }
        // InfLLM wants its budget within the window.
        let wide = decoder_of("qwen2", None, 256);
        let wide = Engine::with_rope(wide, "wide", rule.parse().unwrap()).unwrap();
        let context = "infllm:n_local=64,n_init=4,block=8,topk=2,exec_block=16,chunk=32";
        let want = read(&wide, &mut fresh(&wide, "full"), &tokens, 60);
        let found = read(&wide, &mut fresh(&wide, context), &tokens, 60);
        assert_close(&found, &want, 5e-5, &format!("{rule} under {context}"));
        // Far past a small budget all stays finite, and forks go on alike.
        for context in ["window:24", "sinks:3,20", "lm-infinite:20,3"] {
            let long = ids(120, 5, engine.model().config().vocab_size);
            let mut sequence = fresh(&engine, context);
            sequence.expect_length(128);
            let found = read(&engine, &mut sequence, &long, 16);
            assert!(found.iter().all(|x| x.is_finite()), "{rule} {context}");
            let mut fork = sequence.fork();
            let tail = ids(8, 6, engine.model().config().vocab_size);
            let a = read(&engine, &mut sequence, &tail, 1);
            assert_eq!(a, read(&engine, &mut fork, &tail, 1), "{rule} {context}");
        }
    }
}

#[test]
fn a_cut_text_stands_at_the_angles_of_its_length() {
    for rule in ["dynamic:2", "clex-init:8", "xpos:64"] {
        let engine =
            Engine::with_rope(decoder("llama-tied", Some(1)), "one", rule.parse().unwrap())
                .unwrap();
        let tokens = ids(3 * WINDOW, 7, engine.model().config().vocab_size);
        let mut sequence = fresh(&engine, "full");
        read(&engine, &mut sequence, &tokens, 8);
        engine.truncate(&mut sequence, WINDOW / 2).unwrap();
        let found = read(&engine, &mut sequence, &tokens[WINDOW / 2..WINDOW], WINDOW);
        let whole = read(
            &engine,
            &mut fresh(&engine, "full"),
            &tokens[..WINDOW],
            WINDOW,
        );
        assert_close(&found, &whole[whole.len() / 2..], 1e-5, rule);
    }
}

#[test]
fn sessions_carry_the_rule() {
    let folder = tempfile::tempdir().unwrap();
    for (index, rule) in ["dynamic:2", "clex-init:8", "xpos:64", "yarn:4"]
        .iter()
        .enumerate()
    {
        let own = engine("qwen3", rule);
        let vocab = own.model().config().vocab_size;
        let (head, tail) = (ids(3 * WINDOW + 2, 8, vocab), ids(20, 9, vocab));
        let directory = SessionDir::new(folder.path().join(index.to_string()));
        let mut sequence = fresh(&own, "full");
        // Announced beyond what is there: the angles of the cached keys are those of 80 tokens.
        sequence.expect_length(80);
        read(&own, &mut sequence, &head, 16);
        directory
            .save(&own, &sequence, serde_json::Value::Null)
            .unwrap();
        let want = read(&own, &mut sequence, &tail, 1);
        let again = engine("qwen3", rule);
        let (mut restored, header) = directory.load(&again, Mode::Read).unwrap();
        assert_eq!(header.rope, Some(rule.parse().unwrap()));
        assert_eq!(read(&again, &mut restored, &tail, 1), want, "{rule}");

        let refused = |engine: &Engine, words: &[&str]| {
            let error = directory.load(engine, Mode::Read).map(|_| ()).unwrap_err();
            let error = error.to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        };
        refused(
            &engine("qwen3", "linear:2"),
            &[
                &format!("--rope {}", header.rope.unwrap()),
                "--rope linear:2",
            ],
        );
        let plain = Engine::new(decoder("qwen3", None), "qwen3".into()).unwrap();
        refused(&plain, &["--rope", "own rotary positions"]);
    }
    // The same words over other frequencies are another rule.
    let (factors, rule) = json_longrope();
    let directory = SessionDir::new(folder.path().join("factors"));
    let own = engine("llama-tied", &rule);
    let mut sequence = fresh(&own, "full");
    read(&own, &mut sequence, &ids(20, 1, 50), 20);
    directory
        .save(&own, &sequence, serde_json::Value::Null)
        .unwrap();
    let file = factors.path().join("factors.json");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("1.5", "1.75")).unwrap();
    let error = directory.load(&engine("llama-tied", &rule), Mode::Read);
    let error = error.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("belongs to the model"), "{error}");
}

#[test]
fn what_cannot_work_is_refused_with_the_reason() {
    let message = |error: EngineError| error.to_string();
    let make = |name: &str, rule: &str| {
        Engine::with_rope(decoder(name, None), name, rule.parse().unwrap())
    };
    let randomised = make("llama-tied", "randomised")
        .map(|_| ())
        .map_err(message);
    assert!(randomised.unwrap_err().contains("in training only"));
    let local = make("mistral-sliding", "linear:4")
        .map(|_| ())
        .map_err(message);
    assert!(local.unwrap_err().contains("only the last tokens"));
    let missing = make("llama-tied", "clex:/no/such")
        .map(|_| ())
        .map_err(message);
    assert!(missing.unwrap_err().contains("/no/such"));

    let xpos = engine("llama-tied", "xpos:64");
    for kv in [KvDtype::F16, KvDtype::Int8] {
        let options = EngineOptions {
            kv,
            ..options("full")
        };
        let error = xpos
            .sequence(&options, None)
            .map(|_| ())
            .map_err(message)
            .unwrap_err();
        assert!(error.contains("--kv bf16"), "{error}");
    }
    for (rule, tokens) in [("clex-init:2", 2 * WINDOW + 1), ("xpos:1", 60)] {
        let engine = engine("llama-tied", rule);
        let tokens = ids(tokens, 1, engine.model().config().vocab_size);
        let mut sequence = fresh(&engine, "full");
        let error = engine
            .forward(&mut [(&mut sequence, &tokens)], Want::Last)
            .unwrap_err();
        assert!(matches!(error, EngineError::Rope(_)), "{error}");
        // Nothing was read, and shorter texts still can be.
        assert!(sequence.is_empty());
        read(&engine, &mut sequence, &tokens[..10], 10);
        let error = message(error);
        assert!(
            error.contains("too long") && error.contains("at most"),
            "{error}"
        );
    }
}

#[test]
fn windows_grow_with_the_stretch() {
    for (rule, window) in [("linear:4", 64), ("abf:500000", 16), ("clex-init:8", 128)] {
        for name in ["llama-tied", "gemma3"] {
            assert_eq!(engine(name, rule).window(), window, "{name} {rule}");
        }
    }
    let plain = Engine::new(decoder("llama-tied", None), "plain".into()).unwrap();
    assert_eq!((plain.window(), plain.rope()), (WINDOW as u64, None));
    assert_eq!(plain.fingerprint(), "plain");
    assert!(
        engine("llama-tied", "linear:4")
            .fingerprint()
            .contains("--rope linear:4")
    );
}

/// transformers computes the dynamic base anew at every forward pass, from the length by then, and leaves cached
/// keys as they are; so does the attention by candle ops, and with `keys=kept` the engine.
#[test]
fn kept_keys_stay_at_the_angles_they_were_read_at() {
    let model: Arc<Network> = decoder("llama-tied", None).into();
    let (config, vocab) = (model.config(), model.config().vocab_size);
    let tokens = ids(60, 8, vocab);
    // A prompt past the window of 16, single tokens, pieces; and growth from within the window.
    for calls in [&[40, 1, 1, 1, 7, 1, 1, 8][..], &[9, 1, 5, 1, 1, 43]] {
        let run = |rule: &str| {
            let rope: RopeOverride = rule.parse().unwrap();
            let engine = Engine::with_rope(model.clone(), "tiny", rope).unwrap();
            let mut sequence = fresh(&engine, "full");
            let (mut logits, mut start) = (Vec::new(), 0);
            for &count in calls {
                let rows = &mut [(&mut sequence, &tokens[start..start + count])];
                logits.extend(engine.forward(rows, Want::All).unwrap());
                start += count;
            }
            logits
        };
        let kept: RopeOverride = "dynamic:2,keys=kept".parse().unwrap();
        let ropes = LayerRopes::with_override(config, &kept).unwrap();
        let (mut want, mut start, mut cache) = (Vec::new(), 0, Vec::new());
        for &count in calls {
            let device = Device::Cpu;
            let mut attend = CausalAttention::cached_with(
                config,
                ropes.clone(),
                count,
                &mut cache,
                DType::F32,
                &device,
            )
            .unwrap();
            let hidden = model.hidden(&tokens[start..start + count], &mut attend);
            let logits: Tensor = model.logits(&hidden.unwrap()).unwrap();
            want.extend(logits.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            start += count;
        }
        let found = run("dynamic:2,keys=kept");
        assert_close(&found, &want, 5e-5, "keys kept");
        let turned = run("dynamic:2");
        let gap = turned.iter().zip(&found).map(|(a, b)| (a - b).abs());
        assert!(gap.fold(0.0, f32::max) > 1e-3, "turned keys give the same");
    }
}

/// transformers computes the dynamic base anew at every forward pass, from the length by then, and leaves cached
/// keys as they are; `keys=kept` does the same, and the default differs from it once a text grows past the window.
#[test]
fn kept_keys_are_what_transformers_does_with_its_cache() {
    let cases = golden::cases_of("giraffe", "dynamic_cache");
    assert!(!cases.is_empty());
    for case in &cases {
        let window = case.meta_usize("window");
        let model = decoder_of(case.meta_str("model"), None, window);
        let tokens: Vec<u32> = case.i64("input_ids").iter().map(|&id| id as u32).collect();
        let rule = format!("dynamic:{}", case.meta_f64("factor"));
        let model: Arc<Network> = model.into();
        let run = |rule: &str| {
            let rope: RopeOverride = rule.parse().unwrap();
            let engine = Engine::with_rope(model.clone(), "tiny", rope).unwrap();
            let mut sequence = fresh(&engine, "full");
            let (mut logits, mut start) = (Vec::new(), 0);
            for &count in &case.i64("calls") {
                let piece = &tokens[start..start + count as usize];
                let rows = &mut [(&mut sequence, piece)];
                logits.extend(engine.forward(rows, Want::All).unwrap());
                start += piece.len();
            }
            logits
        };
        let kept = run(&format!("{rule},keys=kept"));
        case.assert_within("logits", &kept, |_, golden| 2e-5 + 1e-5 * golden.abs());
        let gap = run(&rule)
            .into_iter()
            .zip(&kept)
            .map(|(a, b)| (a - b).abs());
        assert!(gap.fold(0.0, f32::max) > 1e-3, "turned keys give the same");
    }
}
