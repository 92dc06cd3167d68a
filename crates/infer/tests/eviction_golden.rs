//! Goldens of the policies that drop tokens: SirLLM (13), H2O (53) and the spans of MASFormer (25),
//! with f32 keys and values.

#[path = "../../../tests/golden.rs"]
mod golden;
mod rig;

use candle_core::{Device, Tensor};
use golden::Case;
use longspan_infer::context::sirllm::{Entropy, keep};
use longspan_infer::context::span::{FullLayers, Local};
use longspan_infer::context::{
    ContextConfig, ContextPolicy, H2o, H2oConfig, Positions, SirLlmConfig, Span, SpanConfig,
};
use longspan_infer::engine::Want;
use longspan_infer::{Engine, EngineOptions};
use longspan_kernels::attention::KvDtype;
use longspan_nn::config::ModelConfig;
use longspan_nn::model::Decoder;
use rig::{Rig, assert_close, token_major};
use std::collections::HashMap;

#[test]
fn sirllm_keeps_what_the_official_class_keeps() {
    for case in golden::cases_of("sirllm", "evict") {
        for name in case.meta("cases").as_array().unwrap() {
            let name = name.as_str().unwrap();
            let size = |key: &str| case.meta_usize(&format!("{name}.{key}"));
            let kept = keep(
                &case.f32(&format!("{name}.entropy")),
                size("num_coming"),
                size("start"),
                size("recent"),
                size("top"),
            );
            let kept: Vec<i64> = kept.into_iter().map(|index| index as i64).collect();
            assert_eq!(kept, case.i64(&format!("{name}.keep")), "{name}");
        }
    }
}

/// The tiny model whose weights lie in `case`.
fn sirllm_engine(case: &Case) -> Engine {
    let mut json = case.meta("model").as_object().unwrap().clone();
    json.insert("model_type".into(), "llama".into());
    json.insert("hidden_act".into(), "silu".into());
    json.insert("max_position_embeddings".into(), 64.into());
    let text = serde_json::to_vec(&json).unwrap();
    let config = ModelConfig::from_hf_json(&case.path, &text).unwrap();
    let weights = golden::cases_of("sirllm", "stream");
    let file = case.meta_str("weights_file");
    let weights = weights.iter().find(|case| case.path.ends_with(file));
    let tensors: HashMap<String, Tensor> = weights
        .expect("the file that holds the weights")
        .tensors
        .iter()
        .filter_map(|(name, tensor)| {
            let values: Vec<f32> = tensor.values.iter().map(|&x| x as f32).collect();
            let tensor = Tensor::from_vec(values, &tensor.shape[..], &Device::Cpu).unwrap();
            Some((name.strip_prefix("w.")?.to_string(), tensor))
        })
        .collect();
    let model = Decoder::from_tensors(&config, &tensors, &Device::Cpu).unwrap();
    Engine::new(model, "golden".into()).unwrap()
}

#[test]
fn sirllm_streams() {
    for case in golden::cases_of("sirllm", "stream") {
        let engine = sirllm_engine(&case);
        let config = SirLlmConfig {
            start: case.meta_usize("start"),
            recent: case.meta_usize("recent"),
            top: Some(case.meta_usize("top")),
            decay: case.meta_f64("decay"),
            entropy: match case.meta_str("entropy") {
                "paper" => Entropy::Paper,
                "self_shifted" => Entropy::SelfShifted,
                other => panic!("{}: entropy {other}", case.path.display()),
            },
        };
        let options = EngineOptions {
            kv: KvDtype::F32,
            context: ContextConfig::SirLlm(config),
        };
        let mut sequence = engine.sequence(&options, None).unwrap();
        let tolerance = |name: &str| case.tolerance(name).0;
        for round in 0..case.meta_usize("rounds") {
            let at = |name: &str| format!("r{round}.{name}");
            let tokens: Vec<u32> = case.i64(&at("tokens")).iter().map(|&t| t as u32).collect();
            let before = sequence.len() as u64;
            sequence.begin_round(tokens.len());
            let logits = engine
                .forward(&mut [(&mut sequence, &tokens)], Want::All)
                .unwrap();
            let what = format!("{} round {round}", case.path.display());
            let want = case.f64(&at("logits"));
            assert_close(&logits, &want, tolerance("logits"), &what);
            let kept = sequence.policy().kept();
            if round > 0 {
                let old: Vec<i64> = kept
                    .iter()
                    .filter(|(token, _)| *token < before)
                    .map(|&(token, _)| token as i64)
                    .collect();
                assert_eq!(old, case.i64(&at("kept_abs_pos")), "{what}");
            }
            let worth: Vec<f32> = kept.iter().map(|&(_, worth)| worth).collect();
            let want = case.f64(&at("entropy_cache"));
            assert_close(&worth, &want, tolerance("entropy_cache"), &what);
            let new = &worth[worth.len() - tokens.len()..];
            assert_close(
                new,
                &case.f64(&at("entropy_new")),
                tolerance("entropy_new"),
                &what,
            );
        }
        assert!(sequence.report().evicted > 0, "the cache never filled");
    }
}

#[test]
fn h2o_streams() {
    for case in golden::cases_of("sinklora", "h2o") {
        let config = H2oConfig {
            heavy: Some(case.meta_usize("heavy")),
            recent: Some(case.meta_usize("recent")),
            positions: match case.meta_str("positions") {
                "absolute" => Positions::Absolute,
                "cache" => Positions::Cache,
                other => panic!("{}: positions {other}", case.path.display()),
            },
        };
        let mut policy = H2o::new(&config, 1 << 20);
        let &[heads, tokens, dim] = case.shape("q") else {
            panic!("q has three dimensions")
        };
        let mut rig = Rig::new(heads, heads, dim, Some(case.meta_f64("rope_base")), &policy);
        let rows = |name: &str| token_major(&case.f32(name), heads, dim);
        let (query, key, value) = (rows("q"), rows("k"), rows("v"));
        let (width, mut out, mut start) = (heads * dim, Vec::new(), 0);
        for (call, &count) in case.i64("calls").iter().enumerate() {
            let count = count as usize;
            let at = start * width..(start + count) * width;
            out.extend(rig.call(
                &mut policy,
                &query[at.clone()],
                &key[at.clone()],
                &value[at],
                count,
            ));
            start += count;
            let what = format!("{} call {call}", case.path.display());
            let cached: Vec<(u64, f32)> =
                (0..heads).flat_map(|head| policy.cached(0, head)).collect();
            let kept: Vec<i64> = cached.iter().map(|&(token, _)| token as i64).collect();
            assert_eq!(
                kept,
                case.i64(&format!("call{call}.kept_abs_pos")),
                "{what}"
            );
            let scores: Vec<f32> = cached.iter().map(|&(_, score)| score).collect();
            let want = case.f64(&format!("call{call}.scores"));
            assert_close(&scores, &want, case.tolerance("scores").0, &what);
        }
        assert_eq!(start, tokens);
        let want = token_major(&case.f32("out"), heads, dim);
        let want: Vec<f64> = want.into_iter().map(f64::from).collect();
        let what = case.path.display().to_string();
        assert_close(&out, &want, case.tolerance("out").0, &what);
    }
}

#[test]
fn spans_see_what_their_masks_say() {
    for case in golden::cases_of("masformer", "attention_spans") {
        let &[1, heads, tokens, dim] = case.shape("q") else {
            panic!("q is [1, heads, tokens, dim]")
        };
        let kv_heads = case.meta_usize("kv_heads");
        for name in case.meta("spans").as_array().unwrap() {
            let name = name.as_str().unwrap();
            let size = name
                .trim_start_matches(|c: char| !c.is_ascii_digit())
                .parse();
            let local = match (name.trim_end_matches(|c: char| c.is_ascii_digit()), size) {
                ("block", Ok(size)) => Some(Local::Block(size)),
                ("block_prev", Ok(size)) => Some(Local::BlockPrev(size)),
                ("window", Ok(size)) => Some(Local::Window(size)),
                ("full", _) => None,
                other => panic!("span {other:?}"),
            };
            let mask = case.i64(&format!("{name}.mask"));
            for query in 0..tokens {
                let first = local.map_or(0, |local| local.first_visible(query as u64)) as usize;
                for key in 0..tokens {
                    let sees = (first..=query).contains(&key);
                    assert_eq!(
                        mask[query * tokens + key] == 1,
                        sees,
                        "{name} {query} {key}"
                    );
                }
            }
            let pairs = case.meta_usize(&format!("{name}.visible_pairs")) as u64;
            let n = tokens as u64;
            let counted = local.map_or(n * (n + 1) / 2, |local| local.visible_pairs(n));
            assert_eq!(counted, pairs, "{name}");

            let config = SpanConfig {
                full: FullLayers::Bottom(usize::from(local.is_none())),
                local: local.unwrap_or(Local::Window(1)),
                sinks: 0,
            };
            let query = token_major(&case.f32("q"), heads, dim);
            let key = token_major(&case.f32("k"), kv_heads, dim);
            let value = token_major(&case.f32("v"), kv_heads, dim);
            let want = token_major(&case.f32(&format!("{name}.out")), heads, dim);
            let want: Vec<f64> = want.into_iter().map(f64::from).collect();
            // In pieces that cut blocks anywhere.
            for pieces in [vec![tokens], vec![5; tokens.div_ceil(5)], vec![1; tokens]] {
                let mut policy = Span::new(&config);
                let mut rig = Rig::new(heads, kv_heads, dim, None, &policy);
                let (mut out, mut start) = (Vec::new(), 0);
                for count in pieces {
                    let count = count.min(tokens - start);
                    let (w, kw) = (heads * dim, kv_heads * dim);
                    out.extend(rig.call(
                        &mut policy,
                        &query[start * w..(start + count) * w],
                        &key[start * kw..(start + count) * kw],
                        &value[start * kw..(start + count) * kw],
                        count,
                    ));
                    start += count;
                }
                assert_close(&out, &want, 1e-5, name);
            }
        }
    }
}

/// x [rows, inputs] times weight [outputs, inputs].
fn linear(x: &[f32], weight: &[f32], inputs: usize) -> Vec<f32> {
    let product = |x: &[f32], w: &[f32]| -> f64 {
        x.iter()
            .zip(w)
            .map(|(&x, &w)| f64::from(x) * f64::from(w))
            .sum()
    };
    x.chunks_exact(inputs)
        .flat_map(|x| {
            weight
                .chunks_exact(inputs)
                .map(move |w| product(x, w) as f32)
        })
        .collect()
}

fn rms_norm(x: &[f32], weight: &[f32], eps: f64) -> Vec<f32> {
    x.chunks_exact(weight.len())
        .flat_map(|x| {
            let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / x.len() as f64;
            let scale = 1.0 / (mean + eps).sqrt();
            x.iter()
                .zip(weight)
                .map(move |(&x, &w)| (f64::from(x) * scale * f64::from(w)) as f32)
        })
        .collect()
}

#[test]
fn a_stack_of_mixed_spans_matches_layer_by_layer() {
    for case in golden::cases_of("masformer", "mixed_stack") {
        let &[1, tokens, width] = case.shape("x") else {
            panic!("x is [1, tokens, width]")
        };
        let heads = case.meta_usize("heads");
        let full = case.meta("full_layers").as_array().unwrap();
        let full = full.iter().map(|l| l.as_u64().unwrap() as usize).collect();
        let block = case.meta_usize("block") as u64;
        let config = SpanConfig {
            full: FullLayers::List(full),
            local: match case.meta_str("local_kind") {
                "block" => Local::Block(block),
                "block_prev" => Local::BlockPrev(block),
                "window" => Local::Window(block),
                other => panic!("{}: local_kind {other}", case.path.display()),
            },
            sinks: 0,
        };
        assert_eq!(case.meta_str("act"), "relu");
        let layers = case.meta_usize("layers");
        let mut policy = Span::new(&config);
        let base = Some(case.meta_f64("rope_base"));
        let mut rig = Rig::new(heads, heads, width / heads, base, &policy).with_layers(layers);
        let mut x = case.f32("x");
        for layer in 0..layers {
            let weight = |name: &str| case.f32(&format!("layers.{layer}.{name}"));
            let eps = case.meta_f64("norm_eps");
            let normed = rms_norm(&x, &weight("norm1"), eps);
            let project = |name: &str| linear(&normed, &weight(name), width);
            let (q, k, v) = (project("q"), project("k"), project("v"));
            let attended = rig.attend(&mut policy, layer, &q, &k, &v, tokens);
            for (x, y) in x.iter_mut().zip(linear(&attended, &weight("o"), width)) {
                *x += y;
            }
            let mut inner = linear(&rms_norm(&x, &weight("norm2"), eps), &weight("up"), width);
            inner.iter_mut().for_each(|x| *x = x.max(0.0));
            let inputs = inner.len() / tokens;
            for (x, y) in x.iter_mut().zip(linear(&inner, &weight("down"), inputs)) {
                *x += y;
            }
            let name = format!("hidden_after.{layer}");
            assert_close(&x, &case.f64(&name), 1e-4, &name);
        }
    }
}

#[test]
fn a_window_of_spans_holds_the_bytes_of_the_formula() {
    let config = SpanConfig {
        full: FullLayers::Bottom(1),
        local: Local::Window(128),
        sinks: 0,
    };
    let mut policy: Box<dyn ContextPolicy> = Box::new(Span::new(&config));
    let (dim, pieces) = (16, 32);
    let mut rig = Rig::new(1, 1, dim, None, &*policy).with_layers(4);
    let rows = vec![0.5f32; 1024 * dim];
    for _ in 0..pieces {
        for layer in 0..4 {
            rig.attend(&mut *policy, layer, &rows, &rows, &rows, 1024);
        }
    }
    let token_bytes = 2 * dim as u64 * 4;
    let want = config.kv_bytes(pieces * 1024, 4, token_bytes);
    let found = rig.store.bytes().memory;
    // Whole pages: at most two more than the span in each local layer.
    assert!(
        found >= want - 3 * token_bytes && found <= want + 3 * 2 * 64 * token_bytes,
        "{found} bytes, the formula says {want}"
    );
}
