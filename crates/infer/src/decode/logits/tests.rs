//! The pipeline against a naive twin that sorts everything, and against values computed by hand.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn pipeline(options: &str) -> LogitsPipeline {
    LogitsPipeline::new(options.parse().unwrap()).unwrap()
}

/// The oracle: each step on the whole vocabulary in f64, tokens removed by setting them to -inf.
fn naive(config: &SamplingConfig, logits: &[f32], history: &[u32], prompt_len: usize) -> Vec<f64> {
    let mut scores: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
    for (&token, &bias) in &config.logit_bias {
        scores[token as usize] += f64::from(bias);
    }
    for (token, score) in scores.iter_mut().enumerate() {
        let count = |tokens: &[u32]| tokens.iter().filter(|&&t| t as usize == token).count() as f64;
        if count(history) > 0.0 {
            let penalty = f64::from(config.repetition_penalty);
            *score = if *score > 0.0 {
                *score / penalty
            } else {
                *score * penalty
            };
        }
        let answer = count(&history[prompt_len..]);
        *score -= f64::from(config.frequency_penalty) * answer;
        if answer > 0.0 {
            *score -= f64::from(config.presence_penalty);
        }
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    if config.temperature == 0.0 {
        let mut one = vec![0.0; scores.len()];
        one[order[0]] = 1.0;
        return one;
    }
    scores
        .iter_mut()
        .for_each(|s| *s /= f64::from(config.temperature));
    let keep = |scores: &mut [f64], kept: &dyn Fn(usize) -> bool| {
        for (rank, &token) in order.iter().enumerate() {
            if !kept(rank) {
                scores[token] = f64::NEG_INFINITY;
            }
        }
    };
    if config.top_k > 0 {
        keep(&mut scores, &|rank| rank < config.top_k);
    }
    if config.top_p < 1.0 {
        let probabilities = softmax(&scores);
        let better = |rank: usize| order[..rank].iter().map(|&t| probabilities[t]).sum::<f64>();
        keep(&mut scores, &|rank| better(rank) < f64::from(config.top_p));
    }
    if config.min_p > 0.0 {
        let probabilities = softmax(&scores);
        let least = f64::from(config.min_p) * probabilities[order[0]];
        keep(&mut scores, &|rank| probabilities[order[rank]] >= least);
    }
    softmax(&scores)
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

/// The pipeline's distribution over the whole vocabulary.
fn dense(pipeline: &mut LogitsPipeline, logits: &[f32], history: &[u32]) -> Vec<f64> {
    let mut all = vec![0.0; logits.len()];
    for (token, probability) in pipeline.distribution(logits, history) {
        all[token as usize] = f64::from(probability);
    }
    all
}

fn config() -> impl Strategy<Value = SamplingConfig> {
    let off = |range: std::ops::Range<f32>, off: f32| prop_oneof![Just(off), range];
    (
        prop_oneof![1 => Just(0.0f32), 6 => 0.1f32..3.0],
        prop_oneof![Just(0usize), 1usize..150],
        off(0.05..1.0, 1.0),
        off(0.001..0.5, 0.0),
        off(0.5..2.0, 1.0),
        off(-2.0..2.0, 0.0),
        off(-2.0..2.0, 0.0),
        prop::collection::btree_map(0u32..90, -5.0f32..5.0, 0..4),
    )
        .prop_map(
            |(temperature, top_k, top_p, min_p, repetition, presence, frequency, logit_bias)| {
                SamplingConfig {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    repetition_penalty: repetition,
                    presence_penalty: presence,
                    frequency_penalty: frequency,
                    logit_bias,
                    ..SamplingConfig::default()
                }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// A token on the very edge of top-p or min-p may fall either way by rounding; then and only then
    /// the distributions differ, by no more than that token.
    #[test]
    fn the_distribution_is_the_naive_one(
        config in config(),
        logits in prop::collection::vec(-12.0f32..12.0, 90..700),
        history in prop::collection::vec(0u32..90, 0..40),
        split in any::<prop::sample::Index>(),
    ) {
        let prompt_len = split.index(history.len() + 1);
        let mut pipeline = LogitsPipeline::new(config.clone()).unwrap();
        pipeline.set_prompt_len(prompt_len);
        let found = dense(&mut pipeline, &logits, &history);
        let mut agrees = false;
        for nudge in [0.0, 1e-5, -1e-5] {
            let mut config = config.clone();
            if config.top_p < 1.0 {
                config.top_p = (config.top_p + nudge).min(1.0);
            }
            if config.min_p > 0.0 {
                config.min_p *= 1.0 - nudge;
            }
            let expected = naive(&config, &logits, &history, prompt_len);
            agrees |= found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5);
        }
        prop_assert!(agrees, "{}", config);
    }

    /// Histories that grow, shrink and change give what a fresh pipeline gives.
    #[test]
    fn counts_follow_any_history(steps in prop::collection::vec((0usize..6, prop::collection::vec(0u32..20, 0..5)), 1..12)) {
        let config: SamplingConfig = "repetition_penalty=1.3,presence_penalty=0.4,frequency_penalty=0.2".parse().unwrap();
        let logits: Vec<f32> = (0..20).map(|i| (i * 7 % 11) as f32 / 3.0 - 1.0).collect();
        let mut kept = LogitsPipeline::new(config.clone()).unwrap();
        kept.set_prompt_len(2);
        let mut history: Vec<u32> = vec![1, 2, 3];
        for (back, more) in steps {
            history.truncate(history.len().saturating_sub(back));
            history.extend(more);
            let mut fresh = LogitsPipeline::new(config.clone()).unwrap();
            fresh.set_prompt_len(2);
            prop_assert_eq!(kept.distribution(&logits, &history), fresh.distribution(&logits, &history));
        }
    }
}

#[test]
fn penalties_by_hand() {
    // Token 0 in the prompt, 1 once and 2 twice in the answer, 3 unseen.
    let mut pipeline = pipeline(
        "repetition_penalty=2,presence_penalty=0.5,frequency_penalty=0.25,logit_bias=3:1.5",
    );
    pipeline.set_prompt_len(1);
    let adjusted = pipeline.adjust(&[3.0, -1.0, 4.0, 0.5], &[0, 1, 2, 2]);
    // 3/2; -1*2-0.5-0.25; 4/2-0.5-2*0.25; 0.5+1.5
    assert_eq!(adjusted, [1.5, -2.75, 1.0, 2.0]);
}

#[test]
fn the_first_history_is_the_prompt() {
    let mut pipeline = pipeline("frequency_penalty=1");
    assert_eq!(pipeline.adjust(&[1.0, 1.0], &[0, 0]), [1.0, 1.0]);
    assert_eq!(pipeline.adjust(&[1.0, 1.0], &[0, 0, 0, 1]), [0.0, 0.0]);
}

#[test]
fn filters_by_hand() {
    // Probabilities 1/2, 1/4, 1/8, 1/16, 1/16.
    let logits: Vec<f32> = [0.5f32, 0.25, 0.125, 0.0625, 0.0625]
        .iter()
        .map(|p| p.ln())
        .collect();
    let tokens = |options: &str| -> Vec<u32> {
        pipeline(options)
            .distribution(&logits, &[])
            .iter()
            .map(|x| x.0)
            .collect()
    };
    assert_eq!(tokens("top_p=0.7"), [0, 1]);
    assert_eq!(tokens("top_p=0.8"), [0, 1, 2]);
    assert_eq!(tokens("top_p=0.001"), [0]);
    assert_eq!(tokens("top_k=4"), [0, 1, 2, 3]);
    assert_eq!(tokens("min_p=0.24"), [0, 1, 2]);
    assert_eq!(tokens("min_p=1"), [0]);
    // Among the first two, 2/3 and 1/3: top-p counts after top-k.
    assert_eq!(tokens("top_k=2,top_p=0.6"), [0]);
    assert_eq!(tokens("top_k=2,top_p=0.7"), [0, 1]);
    assert_eq!(tokens("temperature=0"), [0]);
    // Temperature comes first: squared probabilities are 64, 16, 4, 1, 1 of 86.
    assert_eq!(tokens("temperature=0.5,top_p=0.7"), [0]);
    assert_eq!(tokens(""), [0, 1, 2, 3, 4]);
}

#[test]
fn frequencies_are_those_of_the_distribution() {
    let logits: Vec<f32> = (0..40).map(|i| (i * 13 % 17) as f32 / 4.0).collect();
    for options in [
        "",
        "temperature=0.8,top_k=12,top_p=0.95",
        "min_p=0.1,temperature=1.5",
    ] {
        let mut pipeline = pipeline(options);
        let rng = crate::decode::random::CounterRng::new(11, 0);
        let draws = 20_000u64;
        let mut counts = BTreeMap::new();
        for index in 0..draws {
            let token = pipeline.draw(&logits, &[], rng.uniform(index));
            *counts.entry(token).or_insert(0.0) += 1.0;
        }
        let expected = pipeline.distribution(&logits, &[]);
        assert!(
            counts
                .keys()
                .all(|token| expected.iter().any(|(t, _)| t == token))
        );
        let chi: f64 = expected
            .iter()
            .map(|(token, p)| {
                let expected = f64::from(*p) * draws as f64;
                (counts.get(token).unwrap_or(&0.0) - expected).powi(2) / expected
            })
            .sum();
        // Mean of chi-square plus five of its standard deviations.
        let degrees = (expected.len() - 1) as f64;
        assert!(
            chi < degrees + 5.0 * (2.0 * degrees).sqrt(),
            "{options}: {chi} of {degrees}"
        );
    }
}

#[test]
fn odd_logits_never_panic() {
    let inf = f32::INFINITY;
    for options in [
        "",
        "top_p=0.9",
        "top_k=2",
        "min_p=0.1",
        "temperature=0",
        "repetition_penalty=1.5",
        "temperature=1e-30",
    ] {
        let mut pipeline = pipeline(options);
        for (logits, allowed) in [
            (&[][..], &[0u32][..]),
            (&[f32::NAN, f32::NAN], &[0]),
            (&[-inf, -inf, -inf], &[0]),
            (&[-inf, 2.0, -inf], &[1]),
            (&[f32::NAN, 2.0, -inf], &[1]),
            (&[1.0, inf, 2.0], &[1]),
            (&[-inf, 1.0, 1.0, f32::NAN], &[1, 2]),
        ] {
            for uniform in [0.0, 0.3, 0.999_999_999_999] {
                let token = pipeline.draw(logits, &[0, 1, 900], uniform);
                assert!(allowed.contains(&token), "{options} {logits:?}: {token}");
            }
        }
    }
}

#[test]
fn a_flat_large_vocabulary_needs_the_wide_nucleus() {
    let logits: Vec<f32> = (0..5000).map(|i| (i % 7) as f32 * 1e-3).collect();
    let mut pipeline = pipeline("top_p=0.9");
    let kept = pipeline.distribution(&logits, &[]).len();
    assert!((4480..4510).contains(&kept), "{kept}");
}

/// The distributions that Hugging Face transformers' own processors give, from the folder of goldens.
#[test]
fn distributions_are_those_of_transformers() {
    let root = std::env::var_os("LONGSPAN_GOLDEN").map_or_else(
        || std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"),
        Into::into,
    );
    let mut cases = 0;
    for entry in std::fs::read_dir(root.join("sampling")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let config = &metadata.metadata().as_ref().unwrap()["config"];
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let floats = |name: &str| -> Vec<f32> {
            let (words, _) = tensors.tensor(name).unwrap().data().as_chunks::<4>();
            words.iter().map(|word| f32::from_le_bytes(*word)).collect()
        };
        let view = tensors.tensor("history").unwrap();
        let (words, _) = view.data().as_chunks::<8>();
        let history: Vec<u32> = words
            .iter()
            .map(|word| i64::from_le_bytes(*word) as u32)
            .collect();
        let config: SamplingConfig = serde_json::from_str(config).unwrap();
        let found = dense(
            &mut LogitsPipeline::new(config).unwrap(),
            &floats("logits"),
            &history,
        );
        for (token, (found, expected)) in found.iter().zip(floats("probabilities")).enumerate() {
            let difference = (found - f64::from(expected)).abs();
            assert!(
                difference < 1e-6,
                "{}: token {token}: {found} {expected}",
                path.display()
            );
        }
        cases += 1;
    }
    assert!(cases > 0, "no golden found");
}
