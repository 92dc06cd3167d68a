//! XL3M: the golden selection through the engine, and the laws of the planner with a stub model whose
//! entropies are prescribed.

#[path = "../../../tests/golden.rs"]
mod golden;

use candle_core::{DType, Device, Tensor};
use longspan_infer::engine::Want;
use longspan_infer::key_context::{
    Distribution, EngineSource, KeyContextConfig, KeyContextError, KeyContextPlanner, NextToken,
    Shape,
};
use longspan_infer::{Engine, EngineOptions};
use longspan_kernels::attention::KvDtype;
use longspan_nn::config::ModelConfig;
use longspan_nn::model::Decoder;
use proptest::prelude::*;
use std::collections::HashMap;

fn options() -> EngineOptions {
    EngineOptions {
        kv: KvDtype::F32,
        ..EngineOptions::default()
    }
}

/// The tiny model whose configuration and weights a golden file carries.
fn engine(case: &golden::Case) -> Engine {
    let folder = tempfile::tempdir().unwrap();
    let mut config = case.meta("model").clone();
    config["model_type"] = "llama".into();
    config["architectures"] = serde_json::json!(["LlamaForCausalLM"]);
    config["max_position_embeddings"] = 2048.into();
    config["hidden_act"] = "silu".into();
    let file = folder.path().join("config.json");
    std::fs::write(&file, config.to_string()).unwrap();
    let config = ModelConfig::from_hf_file(&file).unwrap();
    let weights: HashMap<String, Tensor> = case
        .tensors
        .iter()
        .filter_map(|(name, tensor)| {
            let name = name.strip_prefix("w.")?;
            let values: Vec<f32> = tensor.values.iter().map(|&v| v as f32).collect();
            let tensor = Tensor::from_vec(values, &tensor.shape[..], &Device::Cpu).unwrap();
            Some((name.to_string(), tensor.to_dtype(DType::F32).unwrap()))
        })
        .collect();
    let model = Decoder::from_tensors(&config, &weights, &Device::Cpu).unwrap();
    Engine::new(model, "xl3m".into()).unwrap()
}

fn last_logits(engine: &Engine, tokens: &[u32]) -> Vec<f32> {
    let mut sequence = engine.sequence(&options(), None).unwrap();
    engine
        .forward(&mut [(&mut sequence, tokens)], Want::Last)
        .unwrap()
}

#[test]
fn golden_selection() {
    for case in golden::cases_of("xl3m", "select") {
        let engine = engine(&case);
        let ids = |name: &str| -> Vec<u32> { case.i64(name).iter().map(|&id| id as u32).collect() };
        let tokens = ids("tokens");
        assert_eq!(tokens.len(), case.meta_usize("total_len"));
        let (head, question) = (case.meta_usize("head_len"), case.meta_usize("question_len"));
        let config = KeyContextConfig {
            segment: case.meta_usize("segment"),
            stride: Some(case.meta_usize("stride")),
            keep: case.meta_usize("keep"),
            ..KeyContextConfig::default()
        };
        let planner = KeyContextPlanner::new(config).unwrap();
        // Too small for the text, large enough for what is to be kept.
        let shape = Shape {
            head,
            question,
            window: tokens.len(),
            generation: 1,
        };

        let asked = &tokens[tokens.len() - question..];
        let segments = planner.segments(tokens.len(), head, question);
        let bounds: Vec<i64> = segments
            .iter()
            .flat_map(|r| [r.start as i64, r.end as i64])
            .collect();
        assert_eq!(bounds, case.i64("segments"));
        let prefixes: Vec<Vec<u32>> = segments
            .iter()
            .map(|r| tokens[r.clone()].to_vec())
            .collect();
        let mut source = EngineSource::new(&engine, options(), 3);
        let found = source.next_token(&prefixes, asked).unwrap();
        let logits: Vec<f32> = found
            .iter()
            .flat_map(|d| match d {
                Distribution::Logits(logits) => logits.clone(),
                Distribution::Top(_) => panic!("an engine knows all logits"),
            })
            .collect();
        case.assert_close("segment_last_logits", &logits);

        let mut reused = EngineSource::new(&engine, options(), 2).with_reuse();
        let mut plans = Vec::new();
        for batch in [1, 4, 100] {
            let mut source = EngineSource::new(&engine, options(), batch);
            plans.push(planner.plan(&mut source, &tokens, shape).unwrap());
        }
        // Twice: the second time segments are not read again.
        plans.push(planner.plan(&mut reused, &tokens, shape).unwrap());
        let bytes = reused.kept_bytes();
        assert!(bytes > 0);
        plans.push(planner.plan(&mut reused, &tokens, shape).unwrap());
        assert_eq!(reused.kept_bytes(), bytes);
        for plan in plans {
            let entropies: Vec<f64> = plan.segments.iter().map(|s| s.entropy).collect();
            case.assert_close("entropy", &entropies);
            let kept = plan.segments.iter().enumerate().filter(|(_, s)| s.kept);
            let kept: Vec<i64> = kept.map(|(index, _)| index as i64).collect();
            assert_eq!(kept, case.i64("selected"));
            let index: Vec<i64> = plan
                .ranges
                .iter()
                .flat_map(|r| r.clone().map(|i| i as i64))
                .collect();
            assert_eq!(index, case.i64("key_context_index"));
            assert_eq!(plan.tokens, ids("key_context_tokens"));
            assert!(!plan.approx);
            case.assert_close("final_logits", &last_logits(&engine, &plan.tokens));
        }
        case.assert_close("full_context_logits", &last_logits(&engine, &tokens));

        // Overlap: each token of the text lies in some segment, none counts twice in the key context.
        let config = KeyContextConfig {
            segment: 12,
            stride: Some(5),
            keep: 3,
            ..Default::default()
        };
        let planner = KeyContextPlanner::new(config).unwrap();
        let mut source = EngineSource::new(&engine, options(), 4);
        let plan = planner.plan(&mut source, &tokens, shape).unwrap();
        for segment in &plan.segments {
            let text = [&tokens[segment.range.clone()], asked].concat();
            let (alone, _) = Distribution::Logits(last_logits(&engine, &text)).entropy();
            assert!((segment.entropy - alone).abs() <= 1e-5);
        }
        let kept = plan.segments.iter().filter(|s| s.kept);
        assert_eq!(kept.count(), 3);
        // All segments, without overlap: the key context is the prompt.
        let config = KeyContextConfig {
            segment: 31,
            keep: 2,
            ..Default::default()
        };
        let planner = KeyContextPlanner::new(config).unwrap();
        let shape = Shape {
            window: 70,
            ..shape
        };
        let mut wide = EngineSource::new(&engine, options(), 4);
        let all = planner
            .plan(
                &mut wide,
                &tokens,
                Shape {
                    generation: 0,
                    ..shape
                },
            )
            .unwrap();
        assert_eq!(all.tokens, tokens);
    }
}

/// A model whose certainty after a prefix is prescribed by the prefix's first token, and that remembers
/// what it was asked.
struct Stub {
    entropies: Vec<f64>,
    asked: Vec<(Vec<u32>, Vec<u32>)>,
    batch: usize,
}

impl Stub {
    fn new(entropies: &[f64]) -> Self {
        Stub {
            entropies: entropies.to_vec(),
            asked: Vec::new(),
            batch: 2,
        }
    }
}

/// Logits of two tokens whose entropy is this many nats.
fn logits_of(entropy: f64) -> Vec<f32> {
    let of = |gap: f32| Distribution::Logits(vec![gap, 0.0]).entropy().0;
    let (mut low, mut high) = (0.0f32, 80.0f32);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if of(middle) > entropy {
            low = middle
        } else {
            high = middle
        }
    }
    vec![low, 0.0]
}

impl NextToken for Stub {
    fn next_token(
        &mut self,
        prefixes: &[Vec<u32>],
        question: &[u32],
    ) -> Result<Vec<Distribution>, KeyContextError> {
        let first = self.asked.len();
        self.asked
            .extend(prefixes.iter().map(|p| (p.clone(), question.to_vec())));
        let entropies = (first..self.asked.len()).map(|i| self.entropies[i % self.entropies.len()]);
        Ok(entropies
            .map(|e| Distribution::Logits(logits_of(e)))
            .collect())
    }

    fn batch(&self) -> usize {
        self.batch
    }
}

#[test]
fn the_surest_segments_are_kept_in_order() {
    let tokens: Vec<u32> = (0..50).collect();
    let shape = Shape {
        head: 2,
        question: 8,
        window: 45,
        generation: 5,
    };
    let config = KeyContextConfig {
        segment: 10,
        keep: 2,
        ..Default::default()
    };
    let plan = |config: &KeyContextConfig, entropies: &[f64]| {
        let mut stub = Stub::new(entropies);
        let planner = KeyContextPlanner::new(config.clone()).unwrap();
        (planner.plan(&mut stub, &tokens, shape).unwrap(), stub.asked)
    };
    let (found, asked) = plan(&config, &[0.5, 0.3, 0.4, 0.1]);
    let kept: Vec<bool> = found.segments.iter().map(|s| s.kept).collect();
    assert_eq!(kept, [false, true, false, true]);
    let want: Vec<u32> = (0..2).chain(12..22).chain(32..50).collect();
    assert_eq!(found.tokens, want);
    // Every sub-context is head, segment, question, and nothing of another.
    assert_eq!(asked.len(), 4);
    for (index, (prefix, question)) in asked.iter().enumerate() {
        let start = 2 + 10 * index as u32;
        let want: Vec<u32> = (0..2).chain(start..start + 10).collect();
        assert_eq!((prefix, question), (&want, &tokens[42..].to_vec()));
    }
    // Of equals the earlier one; neighbours merge; a threshold may keep fewer, or none.
    let (found, _) = plan(&config, &[0.4, 0.2, 0.2, 0.2]);
    assert_eq!(found.ranges, std::slice::from_ref(&(12..32)));
    let threshold = KeyContextConfig {
        threshold: Some(0.25),
        ..config.clone()
    };
    let (found, _) = plan(&threshold, &[0.6, 0.2, 0.6, 0.5]);
    assert_eq!(found.ranges, std::slice::from_ref(&(12..22)));
    let (none, _) = plan(
        &KeyContextConfig {
            threshold: Some(0.1),
            ..config.clone()
        },
        &[0.5],
    );
    assert_eq!(none.tokens, [&tokens[..2], &tokens[42..]].concat());
    // A separator stands between ranges that do not touch.
    let separated = KeyContextConfig {
        separator: vec![99, 98],
        ..config.clone()
    };
    let (found, _) = plan(&separated, &[0.1, 0.5, 0.2, 0.5]);
    let want: Vec<u32> = (0..12)
        .chain([99, 98])
        .chain(22..32)
        .chain(42..50)
        .collect();
    assert_eq!(found.tokens, want);

    // A scan can be stopped.
    let planner = KeyContextPlanner::new(config).unwrap();
    let mut stub = Stub::new(&[0.5]);
    let error = planner
        .plan_with(&mut stub, &tokens, shape, &mut |_, _| false)
        .unwrap_err();
    assert_eq!(error.to_string(), "stopped after 22 of 50 tokens");
    // A source that answers something else is named, as is one that answers with no numbers.
    struct Short(Vec<f32>);
    impl NextToken for Short {
        fn next_token(
            &mut self,
            p: &[Vec<u32>],
            _: &[u32],
        ) -> Result<Vec<Distribution>, KeyContextError> {
            Ok(vec![
                Distribution::Logits(self.0.clone());
                p.len() - usize::from(self.0.is_empty())
            ])
        }
    }
    let error = planner
        .plan(&mut Short(vec![]), &tokens, shape)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("found 0 distributions, expected 1"),
        "{error}"
    );
    let error = planner
        .plan(&mut Short(vec![f32::NAN, 1.0]), &tokens, shape)
        .unwrap_err();
    assert!(error.to_string().contains("segment 0"), "{error}");
}

#[test]
fn a_prompt_that_fits_is_left_alone() {
    let tokens: Vec<u32> = (0..40).collect();
    let shape = Shape {
        head: 1,
        question: 4,
        window: 45,
        generation: 5,
    };
    let mut stub = Stub::new(&[0.5]);
    let plan = KeyContextPlanner::default()
        .plan(&mut stub, &tokens, shape)
        .unwrap();
    assert_eq!(plan.tokens, tokens);
    assert!(plan.segments.is_empty() && stub.asked.is_empty());
}

#[test]
fn entropies_are_exact_at_the_extremes() {
    let of = |logits: Vec<f32>| Distribution::Logits(logits).entropy();
    assert!((of(vec![3.0; 1000]).0 - 1000f64.ln()).abs() <= 1e-12);
    let mut one = vec![f32::NEG_INFINITY; 10];
    one[3] = 5.0;
    assert_eq!(of(one), (0.0, false));
    assert_eq!(of(vec![1e4, -1e4, 0.0]).0, 0.0);
    // Likeliest tokens only: what they leave is one more token.
    let top = Distribution::Top(vec![0.5f32.ln(), 0.25f32.ln()]);
    let want = 0.5 * 2f64.ln() + 2.0 * 0.25 * 4f64.ln();
    let (found, approx) = top.entropy();
    assert!(approx && (found - want).abs() <= 1e-6);
    assert!((Distribution::Top(vec![0.0]).entropy().0).abs() <= 1e-12);
}

#[test]
fn impossible_sizes_are_named() {
    for (config, word) in [
        (
            KeyContextConfig {
                segment: 0,
                ..Default::default()
            },
            "segment is 0",
        ),
        (
            KeyContextConfig {
                stride: Some(0),
                ..Default::default()
            },
            "stride is 0",
        ),
        (
            KeyContextConfig {
                keep: 0,
                ..Default::default()
            },
            "keep is 0",
        ),
        (
            KeyContextConfig {
                stride: Some(513),
                ..Default::default()
            },
            "at most the segment",
        ),
        (
            KeyContextConfig {
                threshold: Some(f64::NAN),
                ..Default::default()
            },
            "threshold",
        ),
    ] {
        let error = KeyContextPlanner::new(config).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    let tokens: Vec<u32> = (0..3000).collect();
    let plan = |shape: Shape| {
        let mut stub = Stub::new(&[0.5]);
        KeyContextPlanner::default()
            .plan(&mut stub, &tokens, shape)
            .unwrap_err()
            .to_string()
    };
    let shape = Shape {
        head: 4,
        question: 64,
        window: 600,
        generation: 100,
    };
    assert!(plan(shape).contains("no room for one segment of 512"));
    assert!(
        plan(Shape {
            question: 0,
            ..shape
        })
        .contains("at least 1")
    );
    assert!(
        plan(Shape {
            head: 2999,
            ..shape
        })
        .contains("3000 tokens")
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Entropies of random logits are those of a plain sum in f64.
    #[test]
    fn entropies_match_their_definition(logits in prop::collection::vec(-50.0..50.0f32, 1..300)) {
        let weights: Vec<f64> = logits.iter().map(|&l| f64::from(l).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let want: f64 = weights.iter().map(|w| -(w / sum) * (w / sum).ln()).filter(|x| !x.is_nan()).sum();
        let (found, _) = Distribution::Logits(logits).entropy();
        prop_assert!((found - want).abs() <= 1e-6);
    }

    /// Whatever the sizes: segments cover the text and fit their length, and the key context fits the
    /// window, keeps the order, and holds nothing twice.
    #[test]
    fn plans_fit_and_keep_the_order(
        length in 1usize..400,
        segment in 1usize..60,
        share in 0.01..1.0f64,
        keep in 1usize..12,
        head in 0usize..10,
        question in 1usize..30,
        window in 1usize..300,
        generation in 0usize..40,
        separator in 0usize..3,
        entropies in prop::collection::vec(0.0..0.69f64, 1..20),
    ) {
        let stride = ((segment as f64 * share) as usize).max(1);
        let config = KeyContextConfig {
            segment,
            stride: Some(stride),
            keep,
            threshold: None,
            separator: vec![1_000_000; separator],
        };
        let planner = KeyContextPlanner::new(config).unwrap();
        let all = head + length + question;
        let tokens: Vec<u32> = (0..all as u32).collect();

        let segments = planner.segments(all, head, question);
        prop_assert_eq!(segments[0].start, head);
        prop_assert_eq!(segments[segments.len() - 1].end, head + length);
        for pair in segments.windows(2) {
            prop_assert_eq!(pair[1].start, pair[0].start + stride);
            prop_assert_eq!(pair[0].len(), segment);
            prop_assert!(pair[1].start <= pair[0].end && pair[1].end > pair[0].end);
        }
        prop_assert!(segments.iter().all(|r| !r.is_empty() && r.len() <= segment));

        let shape = Shape { head, question, window, generation };
        match planner.plan(&mut Stub::new(&entropies), &tokens, shape) {
            Err(error) => {
                let free = window.saturating_sub(generation + head + question);
                prop_assert!(free < segment + separator, "{error}");
            }
            Ok(plan) => {
                prop_assert!(plan.tokens.len() + generation <= window);
                let kept: Vec<u32> = plan.tokens.iter().copied().filter(|&t| t < 1_000_000).collect();
                prop_assert!(kept.windows(2).all(|pair| pair[0] < pair[1]));
                prop_assert!(plan.ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
                prop_assert_eq!(&kept[..head], &tokens[..head]);
                prop_assert_eq!(&kept[kept.len() - question..], &tokens[all - question..]);
                let again = planner.plan(&mut Stub::new(&entropies), &tokens, shape).unwrap();
                prop_assert_eq!(&again, &plan);
                if !plan.segments.is_empty() {
                    let most = keep.min(plan.segments.len());
                    let count = plan.segments.iter().filter(|s| s.kept).count();
                    prop_assert!(count >= 1 && count <= most);
                    let worst = plan.segments.iter().filter(|s| s.kept).map(|s| s.entropy).fold(0.0, f64::max);
                    let best = plan.segments.iter().filter(|s| !s.kept).map(|s| s.entropy).fold(9.0, f64::min);
                    prop_assert!(worst <= best);
                }
            }
        }
    }
}
