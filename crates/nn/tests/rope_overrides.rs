//! Rules set by hand on a checkpoint: what their text means, which layers they reach, what is refused.

use longspan_nn::config::ModelConfig;
use longspan_nn::position::{
    LayerRopes, RopeBasis, RopeError, RopeLayout, RopeOverride, RopeScaling, RopeTable, XPos,
    YarnParameters, rotate,
};
use proptest::prelude::*;
use serde_json::json;

const WINDOW: usize = 2048;

fn plain() -> RopeBasis {
    RopeBasis::new(10_000.0, 16, WINDOW).unwrap()
}

fn composed(linear: f64, power: f64, truncated: Option<usize>) -> RopeScaling {
    RopeScaling::Composed {
        linear,
        power,
        truncated,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// xPos set on a basis gives the logits of xPos itself, whose factors are centred elsewhere.
    #[test]
    fn decaying_rows_are_xpos(
        scale_base in 64.0..4096.0f64,
        near in 0u32..400,
        distance in 0u32..400,
        query in prop::collection::vec(-1.0..1.0f32, 16),
        key in prop::collection::vec(-1.0..1.0f32, 16),
    ) {
        let basis = plain().with_xpos(scale_base).unwrap();
        let frequencies = basis.frequencies(None);
        prop_assert!(!frequencies.keys_are_as_queries());
        let mut xpos = XPos::new(800, RopeLayout::Half);
        xpos.scale_base = scale_base;
        let (m, n) = (f64::from(near + distance), f64::from(near));
        let (mut cos, mut sin) = ([0.0; 8], [0.0; 8]);
        let (mut q, mut k) = (query.clone(), key.clone());
        RopeTable::compute_row(&frequencies, m, &mut cos, &mut sin);
        rotate(RopeLayout::Half, &mut q, &cos, &sin);
        RopeTable::compute_key_row(&frequencies, n, &mut cos, &mut sin);
        rotate(RopeLayout::Half, &mut k, &cos, &sin);
        let mut without = frequencies.clone();
        without.scale_base = None;
        let (mut q_xpos, mut k_xpos) = (query, key);
        xpos.rotate_query(&without, m, &mut q_xpos);
        xpos.rotate_key(&without, n, &mut k_xpos);
        for j in 0..8 {
            // Pair by pair, as factors of pairs differ by orders of magnitude.
            let logit = |q: &[f32], k: &[f32]| q[j] * k[j] + q[j + 8] * k[j + 8];
            let (found, expected) = (logit(&q, &k), logit(&q_xpos, &k_xpos));
            prop_assert!((found - expected).abs() <= 1e-5 * (1.0 + expected.abs()));
        }
    }
}

#[test]
fn overrides() {
    let checkpoint = plain()
        .with_scaling(RopeScaling::Ntk { factor: 3.0 })
        .unwrap();
    for (text, scaling) in [
        ("default", RopeScaling::Default),
        ("linear:4", composed(4.0, 0.0, None)),
        ("power:0.5", composed(1.0, 0.5, None)),
        ("truncated:2048", composed(1.0, 0.0, Some(2048))),
        ("linear:4+power:0.5", composed(4.0, 0.5, None)),
        ("truncated:64 + linear:4", composed(4.0, 0.0, Some(64))),
        ("ntk:2", RopeScaling::Ntk { factor: 2.0 }),
        ("dynamic:4", RopeScaling::Dynamic { factor: 4.0 }),
        (
            "dynamic:4,keys=turned",
            RopeScaling::Dynamic { factor: 4.0 },
        ),
        (
            "yarn:4",
            RopeScaling::Yarn(YarnParameters::new(4.0, WINDOW)),
        ),
        (
            "yarn:16:4096",
            RopeScaling::Yarn(YarnParameters::new(16.0, 4096)),
        ),
        (
            "llama3:8:1024",
            RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 1024,
            },
        ),
        (
            "yarn:factor=4,beta_fast=16,attention_factor=1.5",
            RopeScaling::Yarn(YarnParameters {
                beta_fast: 16.0,
                attention_factor: Some(1.5),
                ..YarnParameters::new(4.0, WINDOW)
            }),
        ),
        ("abf:500000", RopeScaling::Default),
        ("abf:500000+randomised", RopeScaling::Default),
    ] {
        let theta = if text.starts_with("abf") {
            500_000.0
        } else {
            10_000.0
        };
        let expected = RopeBasis::new(theta, 16, WINDOW)
            .unwrap()
            .with_scaling(scaling)
            .unwrap();
        assert_eq!(
            RopeBasis::parse_override(text, &checkpoint).unwrap(),
            expected,
            "{text}"
        );
        // What is printed and stored reads back as the same.
        let parsed: RopeOverride = text.parse().unwrap();
        assert_eq!(parsed.to_string().parse::<RopeOverride>().unwrap(), parsed);
        let stored = serde_json::to_string(&parsed).unwrap();
        assert_eq!(
            serde_json::from_str::<RopeOverride>(&stored).unwrap(),
            parsed
        );
    }
    let both = RopeBasis::parse_override("abf:500000+yarn:4", &checkpoint).unwrap();
    assert_eq!(both.rope_theta(), 500_000.0);
    assert!(matches!(both.scaling(), RopeScaling::Yarn(_)));
    let decaying = RopeBasis::parse_override("xpos+abf:500000", &checkpoint).unwrap();
    assert_eq!(decaying.scale_base(), Some(512.0));
    assert_eq!(decaying.rope_theta(), 500_000.0);
    let random: RopeOverride = "randomized:0.1".parse().unwrap();
    assert_eq!(random.randomised(), Some(0.1));
    let text = "clex:a/b c,window=512,act=silu,time_dt=0.05,log_scale=max,max_factor=4";
    let clex: RopeOverride = text.parse().unwrap();
    assert_eq!(clex.to_string().parse::<RopeOverride>().unwrap(), clex);
    assert_eq!(
        "clex:a/b".parse::<RopeOverride>().unwrap(),
        RopeOverride::clex("a/b")
    );
    let absolute = clex.with_absolute_paths().unwrap().to_string();
    assert!(absolute.starts_with("clex:folder=/"), "{absolute}");
}

/// Factors for longrope come from the file of a checkpoint.
#[test]
fn longrope_reads_its_factors_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.json");
    let long: Vec<f32> = (0..8).map(|j| 1.0 + j as f32).collect();
    let scaling = json!({
        "type": "longrope", "short_factor": vec![1.0; 8], "long_factor": long, "factor": 4.0,
    });
    let whole = json!({ "rope_scaling": scaling, "original_max_position_embeddings": 512 });
    for written in [whole, {
        let mut alone = scaling.clone();
        alone["original_max_position_embeddings"] = 512.into();
        alone
    }] {
        std::fs::write(&file, written.to_string()).unwrap();
        let text = format!("longrope:{}", file.display());
        let basis = RopeBasis::parse_override(&text, &plain()).unwrap();
        let own = plain().frequencies(None).inv_freq;
        assert_eq!(basis.frequencies(Some(512)).inv_freq, own);
        let beyond = basis.frequencies(Some(513));
        for j in 0..8 {
            let error = beyond.inv_freq[j] * long[j] / own[j] - 1.0;
            assert!(error.abs() <= 3e-7, "pair {j}");
        }
        let factor = (1.0 + 4f64.ln() / 512f64.ln()).sqrt();
        assert!((beyond.attention_factor - factor).abs() <= 1e-12);
    }
    std::fs::write(&file, r#"{"long_factor": [1]}"#).unwrap();
    let text = format!("longrope:{}", file.display());
    let error = RopeBasis::parse_override(&text, &plain())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("config.json") && error.contains("short_factor"),
        "{error}"
    );
    let missing = RopeBasis::parse_override("longrope:/no/such.json", &plain()).unwrap_err();
    assert!(missing.to_string().contains("/no/such.json"));
}

/// A stretch is what a policy may take for the window; rules without one leave it.
#[test]
fn windows_are_stretched_as_stated() {
    for (text, window) in [
        ("default", WINDOW),
        ("abf:500000", WINDOW),
        ("power:0.5", WINDOW),
        ("linear:4", 4 * WINDOW),
        ("ntk:2.5", WINDOW / 2 * 5),
        ("dynamic:3", 3 * WINDOW),
        ("yarn:8:512", 4096),
        ("llama3:8:1024", 8192),
        ("clex-init:5", 5 * WINDOW),
    ] {
        let basis = RopeBasis::parse_override(text, &plain()).unwrap();
        assert_eq!(basis.stretched_window(), window, "{text}");
    }
    let clex = RopeBasis::parse_override("clex-init:5", &plain()).unwrap();
    clex.check_length(5 * WINDOW).unwrap();
    let error = clex.check_length(5 * WINDOW + 1).unwrap_err().to_string();
    assert!(
        error.contains("10241 tokens") && error.contains("10240"),
        "{error}"
    );
    let xpos = RopeBasis::parse_override("xpos:64", &plain()).unwrap();
    xpos.check_length(3000).unwrap();
    assert!(xpos.check_length(4000).is_err());
}

fn layers(layers: &[(Option<usize>, Option<usize>)], bases: usize) -> ModelConfig {
    let layers: Vec<_> = layers
        .iter()
        .map(|(rope, window)| json!({ "rope": rope, "sliding_window": window }))
        .collect();
    let rope = json!({
        "parameters": { "rope_type": "default", "rope_theta": 10000.0 },
        "freq_factors": null, "max_position_embeddings": WINDOW,
    });
    serde_json::from_value(json!({
        "architecture": "llama", "vocab_size": 8, "hidden_size": 16, "intermediate_size": 16,
        "num_layers": layers.len(), "num_heads": 1, "num_kv_heads": 1, "head_dim": 16,
        "rms_norm_eps": 1e-5, "context_length": WINDOW, "tie_word_embeddings": true,
        "qkv_bias": false, "output_bias": false, "mlp_bias": false, "qk_norm": false,
        "sandwich_norms": false, "embedding_scale": null, "activation": "silu",
        "attention_scale": 0.25, "attention_softcap": null, "final_softcap": null, "alibi_max_bias": null,
        "layers": layers, "rope": vec![rope; bases], "name": null,
    }))
    .unwrap()
}

#[test]
fn overrides_leave_local_and_position_free_layers_alone() {
    let linear: RopeOverride = "linear:4".parse().unwrap();
    // Local and global layers share a basis; the fourth layer has none.
    let config = layers(
        &[
            (Some(0), Some(64)),
            (Some(0), None),
            (Some(0), Some(64)),
            (None, None),
        ],
        1,
    );
    let own = LayerRopes::new(&config).unwrap();
    assert_eq!(own.stretched_window(), Some(WINDOW));
    let changed = LayerRopes::with_override(&config, &linear).unwrap();
    let of_layer = |layer: usize| changed.of_layer(layer).map(|i| &changed.bases()[i]);
    assert_eq!(of_layer(0), Some(&own.bases()[0]));
    assert_eq!(of_layer(2), Some(&own.bases()[0]));
    assert_eq!(of_layer(1).unwrap().scaling(), &composed(4.0, 0.0, None));
    assert_eq!(of_layer(3), None);
    assert_eq!(changed.stretched_window(), Some(4 * WINDOW));
    assert!(!changed.depend_on_length() && !changed.keys_differ());
    let dynamic = LayerRopes::with_override(&config, &"dynamic:2".parse().unwrap()).unwrap();
    assert!(dynamic.depend_on_length() && dynamic.turn_cached_keys());
    // Keys that stay where they were: the rule is printed, stored and read with that.
    let kept: RopeOverride = "dynamic:2,keys=kept".parse().unwrap();
    assert_eq!(kept.to_string(), "dynamic:2,keys=kept");
    let ropes = LayerRopes::with_override(&config, &kept).unwrap();
    assert!(ropes.depend_on_length() && !ropes.turn_cached_keys());
    let stored = serde_json::to_string(&ropes.bases()[1]).unwrap();
    let read: RopeBasis = serde_json::from_str(&stored).unwrap();
    assert!(read.keeps_keys() && read == ropes.bases()[1]);
    let error = "dynamic:2,keys=lost".parse::<RopeOverride>().unwrap_err();
    assert!(error.to_string().contains("turned or kept"), "{error}");
    let xpos = LayerRopes::with_override(&config, &"xpos".parse().unwrap()).unwrap();
    assert!(xpos.keys_differ());

    for (config, rope, word) in [
        (
            layers(&[(None, None)], 0),
            "linear:4",
            "no rotary positions",
        ),
        (
            layers(&[(Some(0), Some(64))], 1),
            "linear:4",
            "only the last tokens",
        ),
        (config, "randomised", "training only"),
    ] {
        let error = LayerRopes::with_override(&config, &rope.parse().unwrap()).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(word) && error.contains(rope), "{error}");
    }
}

#[test]
fn bad_overrides_name_the_fault_and_the_choices() {
    for (text, words) in [
        ("", "`` is not known"),
        ("spiral:3", "`spiral` is not known"),
        ("linear", "`linear` needs a number"),
        ("linear:", "`linear` needs a number"),
        ("linear:0.5", "at least 1 as factor, found `0.5`"),
        ("linear:inf", "found `inf`"),
        ("linear:nan", "found `nan`"),
        ("linear:4:5", "more than 1"),
        ("linear:4+linear:2", "`linear` is given twice"),
        ("truncated:1.5", "whole number above 0"),
        ("truncated:0", "above 0"),
        ("yarn:4:x", "found `x`"),
        ("yarn:4+ntk:2", "does not combine"),
        ("yarn:4+linear:2", "`linear` only combines"),
        ("default:1", "more than 0"),
        ("abf:0", "`abf` needs a number"),
        (
            "yarn:factor=4,factor=3",
            "`factor` of `yarn` is given twice",
        ),
        ("clex", "`clex` needs a folder"),
        ("clex:/x,act=relu", "expected tanh or silu"),
        ("clex-init+yarn:2", "does not combine"),
        ("power:1+clex-init", "`power` only combines"),
    ] {
        let error = RopeBasis::parse_override(text, &plain()).unwrap_err();
        assert!(matches!(error, RopeError::Override { .. }), "{text}");
        let shown = error.to_string();
        assert!(shown.contains(words), "`{words}` is missing in: {shown}");
        assert!(
            shown.contains("clex:FOLDER")
                && shown.contains("truncated:TOKENS")
                && shown.contains("abf:BASE"),
            "{shown}"
        );
    }
    let narrow = RopeBasis::new(10_000.0, 2, WINDOW).unwrap();
    assert!(RopeBasis::parse_override("ntk:2", &narrow).is_err());
}
