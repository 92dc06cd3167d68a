//! Perplexity protocols against transformers on a tiny model, and their laws.

#[path = "../../../tests/golden.rs"]
mod golden;

use candle_core::{Device, Tensor};
use longspan_eval::ppl::{self, by_position, figures, windows};
use longspan_eval::task::{GROUP, Likelihood, Protocol};
use longspan_infer::{Engine, EngineOptions};
use longspan_kernels::attention::KvDtype;
use longspan_nn::config::ModelConfig;
use longspan_nn::model::Decoder;
use serde_json::{Value, json};
use std::collections::HashMap;

fn options(context: &str) -> EngineOptions {
    EngineOptions {
        kv: KvDtype::F32,
        context: context.parse().unwrap(),
    }
}

fn engine(case: &golden::Case) -> Engine {
    let folder = tempfile::tempdir().unwrap();
    let mut config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "max_position_embeddings": 4096,
    });
    for key in [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rope_theta",
        "rms_norm_eps",
        "tie_word_embeddings",
    ] {
        config[key] = case.meta(key).clone();
    }
    let file = folder.path().join("config.json");
    std::fs::write(&file, config.to_string()).unwrap();
    let config = ModelConfig::from_hf_file(&file).unwrap();
    let weights: HashMap<String, Tensor> = case
        .tensors
        .iter()
        .filter_map(|(name, tensor)| {
            let name = name.strip_prefix("model_state.")?;
            let values: Vec<f32> = tensor.values.iter().map(|&v| v as f32).collect();
            let tensor = Tensor::from_vec(values, &tensor.shape[..], &Device::Cpu).unwrap();
            Some((name.to_string(), tensor))
        })
        .collect();
    let model = Decoder::from_tensors(&config, &weights, &Device::Cpu).unwrap();
    Engine::new(model, "tiny".into()).unwrap()
}

fn tokens(case: &golden::Case) -> Vec<u32> {
    case.i64("tokens").iter().map(|&id| id as u32).collect()
}

fn nll(engine: &Engine, context: &str, tokens: &[u32], protocol: Protocol) -> Vec<Option<f32>> {
    ppl::nll(
        engine,
        &options(context),
        &[],
        tokens,
        protocol,
        &mut |_| true,
    )
    .unwrap()
}

fn likelihood(nll: &[Option<f32>]) -> Likelihood {
    Likelihood {
        nll: nll.to_vec(),
        bytes: 1,
        words: 1,
        bos: false,
    }
}

fn close(found: f64, want: &Value, tolerance: f64) {
    let want = want.as_f64().unwrap();
    assert!(
        (found - want).abs() <= tolerance * want.abs().max(1.0),
        "{found} {want}"
    );
}

#[test]
fn protocols_give_the_golden_likelihoods() {
    for case in golden::cases_of("perplexity", "tiny_llama") {
        let engine = engine(&case);
        let tokens = tokens(&case);
        let nll_tolerance = case.meta("atol")["nll"].as_f64().unwrap();
        let ppl_tolerance = case.meta("rtol")["ppl"].as_f64().unwrap();
        let check = |found: &[Option<f32>], want: &[f64]| {
            for (at, (found, want)) in found.iter().zip(want).enumerate() {
                match found {
                    Some(found) => assert!(
                        (f64::from(*found) - want).abs() <= nll_tolerance,
                        "token {at}: {found} {want}"
                    ),
                    None => assert!(want.is_nan(), "token {at} is not scored, golden {want}"),
                }
            }
        };
        let full = nll(&engine, "full", &tokens, Protocol::Position);
        assert_eq!(full[0], None);
        check(&full[1..], &case.f64("nll.full"));
        for kind in case.meta("cases").as_array().unwrap() {
            let size = |name: &str| kind[name].as_u64().unwrap() as usize;
            match kind["kind"].as_str().unwrap() {
                "by_position" => {
                    let document = likelihood(&full);
                    let buckets = by_position(&[&document]);
                    let edges: Vec<usize> = std::iter::once(0)
                        .chain(buckets.iter().map(|b| b.1))
                        .collect();
                    assert_eq!(json!(edges), kind["edges"]);
                    for (bucket, want) in buckets.iter().zip(kind["mean_nll"].as_array().unwrap()) {
                        close(bucket.2, want, nll_tolerance);
                    }
                }
                name => {
                    let window = size("window");
                    let protocol = if name == "sliding" {
                        let protocol = Protocol::Sliding {
                            window,
                            stride: size("stride"),
                        };
                        let plan = windows(tokens.len(), protocol, 0).unwrap();
                        let triples: Vec<[usize; 3]> =
                            plan.iter().map(|w| [w.begin, w.end, w.take]).collect();
                        assert_eq!(json!(triples), kind["windows"]);
                        protocol
                    } else {
                        Protocol::Fixed { window }
                    };
                    let found = nll(&engine, "full", &tokens, protocol);
                    let stored = format!("nll.w{window}_s{}", kind["stride"]);
                    if case.has(&stored) {
                        check(&found, &case.f64(&stored));
                    }
                    let document = likelihood(&found);
                    let figures = figures(&[&document]);
                    assert_eq!(figures.tokens, size("tokens_scored"));
                    close(figures.nll.value, &kind["mean_nll"], nll_tolerance);
                    close(figures.ppl.value, &kind["ppl"], ppl_tolerance);
                }
            }
        }
    }
}

#[test]
fn streaming_without_a_limit_is_one_pass_and_with_a_window_is_masked_attention() {
    let case = &golden::cases_of("perplexity", "tiny_llama")[0];
    let engine = engine(case);
    let tokens = tokens(case);
    let full = nll(&engine, "full", &tokens, Protocol::Position);
    let whole = Protocol::Sliding {
        window: tokens.len() + 5,
        stride: 7,
    };
    let near = |a: &[Option<f32>], b: &[Option<f32>]| {
        a.iter().zip(b).all(|(a, b)| match (a, b) {
            (Some(a), Some(b)) => (a - b).abs() < 1e-4,
            (a, b) => a.is_none() && b.is_none(),
        })
    };
    assert!(near(&full, &nll(&engine, "full", &tokens, whole)));
    assert!(near(
        &full,
        &nll(&engine, "window:4000", &tokens, Protocol::Position)
    ));
    let narrow = nll(&engine, "window:16", &tokens, Protocol::Position);
    assert!(near(&full[..16], &narrow[..16]) && !near(&full, &narrow));
}

#[test]
fn bos_gives_every_token_a_score_and_stops_are_noticed() {
    let case = &golden::cases_of("perplexity", "tiny_llama")[0];
    let engine = engine(case);
    let tokens = tokens(case);
    let with = |protocol| {
        ppl::nll(
            &engine,
            &options("full"),
            &[1],
            &tokens[1..],
            protocol,
            &mut |_| true,
        )
        .unwrap()
    };
    let all = with(Protocol::Position);
    assert!(all.iter().all(Option::is_some));
    // The same as reading the token as text.
    let mut text = tokens.clone();
    text[0] = 1;
    let plain = nll(&engine, "full", &text, Protocol::Position);
    assert!(
        all.iter()
            .zip(&plain[1..])
            .all(|(a, b)| (a.unwrap() - b.unwrap()).abs() < 1e-5)
    );
    let disjoint = with(Protocol::Sliding {
        window: 50,
        stride: 49,
    });
    assert!(disjoint.iter().all(Option::is_some));
    let stopped = ppl::nll(
        &engine,
        &options("full"),
        &[],
        &tokens,
        Protocol::Position,
        &mut |_| false,
    );
    assert!(stopped.is_err());
    let tiny = Protocol::Sliding {
        window: 4,
        stride: 9,
    };
    assert!(
        ppl::nll(&engine, &options("full"), &[], &tokens, tiny, &mut |_| true).is_ok(),
        "a stride beyond the window is cut to it"
    );
}

/// P6 with the whole text as context is one pass; with less it scores the same tokens, each after exactly as much.
#[test]
fn recent_tokens_are_the_same_ones_for_every_context() {
    let case = &golden::cases_of("perplexity", "tiny_llama")[0];
    let engine = engine(case);
    let tokens = tokens(case);
    let whole = nll(&engine, "full", &tokens, Protocol::Position);
    let scored = 100;
    let recent = |context| {
        nll(
            &engine,
            "full",
            &tokens,
            Protocol::Recent { context, scored },
        )
    };
    let all = recent(tokens.len());
    let first = tokens.len() - scored;
    assert!(all[..first].iter().all(Option::is_none));
    for at in first..tokens.len() {
        let (a, b) = (all[at].unwrap(), whole[at].unwrap());
        assert!((a - b).abs() < 1e-4, "{at}: {a} {b}");
    }
    let short = recent(8);
    assert!(short[first..].iter().all(Option::is_some));
    // The first of a group has eight tokens before it: what a window of nine gives its last token.
    let fixed = nll(&engine, "full", &tokens, Protocol::Fixed { window: 9 });
    for at in [first, first + GROUP] {
        let (a, b) = (short[at].unwrap(), fixed[at].unwrap());
        assert!((a - b).abs() < 1e-4, "{at}: {a} {b}");
    }
}
