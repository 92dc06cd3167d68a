//! Laws of the rotary rules: what must hold for every basis, whatever its numbers.

use longspan_nn::position::randomized::randomized_positions;
use longspan_nn::position::{
    Frequencies, RopeBasis, RopeLayout, RopeScaling, RopeTable, XPos, YarnParameters, rotate,
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

/// Rotation by its definition, in f64: the oracle of the fast one.
fn rotate_by_definition(
    layout: RopeLayout,
    x: &[f64],
    frequencies: &Frequencies,
    position: f64,
) -> Vec<f64> {
    let mut turned = x.to_vec();
    let pairs = frequencies.inv_freq.len();
    for (j, &freq) in frequencies.inv_freq.iter().enumerate() {
        let (a, b) = match layout {
            RopeLayout::Half => (j, j + pairs),
            RopeLayout::Interleaved => (2 * j, 2 * j + 1),
        };
        let (sin, cos) = (position * f64::from(freq)).sin_cos();
        turned[a] = (x[a] * cos - x[b] * sin) * frequencies.attention_factor;
        turned[b] = (x[b] * cos + x[a] * sin) * frequencies.attention_factor;
    }
    turned
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn layouts() -> impl Strategy<Value = RopeLayout> {
    prop_oneof![Just(RopeLayout::Half), Just(RopeLayout::Interleaved)]
}

/// Any basis of 16 rotated coordinates.
fn bases() -> impl Strategy<Value = RopeBasis> {
    let factors = prop::collection::vec(1.0f32..64.0, 8);
    let scalings = prop_oneof![
        Just(RopeScaling::Default),
        (1.0..32.0, 0.0..2.0, prop::option::of(16usize..100_000))
            .prop_map(|(linear, power, truncated)| composed(linear, power, truncated)),
        (1.0..32.0).prop_map(|factor| RopeScaling::Ntk { factor }),
        (1.0..32.0).prop_map(|factor| RopeScaling::Dynamic { factor }),
        (1.0..32.0, 64usize..100_000).prop_map(|(factor, original)| RopeScaling::Yarn(
            YarnParameters::new(factor, original)
        )),
        (factors.clone(), factors, 1.0..2.0).prop_map(|(short_factor, long_factor, factor)| {
            RopeScaling::LongRope {
                short_factor,
                long_factor,
                original_max_position_embeddings: 512,
                attention_factor: factor,
            }
        }),
        (1.0..32.0, 0.5..2.0, 2.5..8.0).prop_map(|(factor, low, high)| RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: WINDOW,
        }),
    ];
    (scalings, 1000.0..1e6, 0usize..=8).prop_map(|(scaling, theta, moving)| {
        RopeBasis::new(theta, 16, WINDOW)
            .and_then(|basis| basis.with_moving_pairs(moving))
            .and_then(|basis| basis.with_scaling(scaling))
            .unwrap()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// A logit depends on the distance of two tokens, not on where they stand.
    #[test]
    fn logits_are_relative(
        basis in bases(),
        layout in layouts(),
        length in 1usize..100_000,
        near in 0u32..50_000,
        distance in 0u32..50_000,
        shift in 0u32..1_000_000,
        query in prop::collection::vec(-1.0..1.0f64, 20),
        key in prop::collection::vec(-1.0..1.0f64, 20),
    ) {
        let frequencies = basis.frequencies(Some(length));
        let logit = |base: u32| {
            let turn = |x: &[f64], position: u32| {
                rotate_by_definition(layout, x, &frequencies, f64::from(position))
            };
            dot(&turn(&query, base + distance), &turn(&key, base))
        };
        // f64 itself rounds the largest of these angles to 1.2e-10.
        let error = (logit(near) - logit(near + shift)).abs();
        prop_assert!(error <= 2e-9, "off by {error:e}");
        let close = logit(near % 1000) - logit(near % 1000 + shift % 1000);
        if distance < 1000 {
            prop_assert!(close.abs() <= 1e-10, "off by {close:e}");
        }
    }

    /// The fast rotation is the rotation by definition, for whole and partial heads.
    #[test]
    fn rotation_matches_its_definition(
        basis in bases(),
        layout in layouts(),
        position in 0usize..5000,
        x in prop::collection::vec(-4.0..4.0f32, 20),
    ) {
        let frequencies = basis.frequencies(Some(position + 1));
        let wide: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
        let expected = rotate_by_definition(layout, &wide, &frequencies, position as f64);
        let mut table = RopeTable::new(&frequencies, layout);
        table.ensure(position + 1);
        let mut turned = x.clone();
        table.rotate(&mut turned, position);
        for (found, expected) in turned.iter().zip(&expected) {
            prop_assert!((f64::from(*found) - expected).abs() <= 2e-6 * 8.0);
        }
        prop_assert_eq!(&turned[16..], &x[16..], "coordinates beyond the rotation pass through");
    }

    /// However a table grew, its rows are those of the definition.
    #[test]
    fn growth_does_not_change_rows(
        basis in bases(),
        steps in prop::collection::vec(1usize..400, 1..6),
    ) {
        let frequencies = basis.frequencies(None);
        let mut table = RopeTable::new(&frequencies, RopeLayout::Half);
        let (mut cos, mut sin) = (vec![0.0; 8], vec![0.0; 8]);
        let mut end = 0;
        for step in steps {
            end += step;
            table.ensure(end);
            prop_assert!(table.positions() >= end);
        }
        for position in [0, end / 2, end - 1] {
            RopeTable::compute_row(&frequencies, position as f64, &mut cos, &mut sin);
            prop_assert_eq!(table.row(position), (&cos[..], &sin[..]));
        }
    }

    /// Dividing frequencies and dividing positions is one thing.
    #[test]
    fn linear_is_interpolation(log2 in 0u32..6, any in 1.0..32.0f64, position in 0u32..100_000) {
        let row = |scaling: RopeScaling, position: f64| {
            let frequencies = plain().with_scaling(scaling).unwrap().frequencies(None);
            let (mut cos, mut sin) = (vec![0.0; 8], vec![0.0; 8]);
            RopeTable::compute_row(&frequencies, position, &mut cos, &mut sin);
            (cos, sin)
        };
        let position = f64::from(position);
        // Powers of two divide without rounding, so nothing at all may differ.
        let exact = f64::from(1u32 << log2);
        prop_assert_eq!(
            row(composed(exact, 0.0, None), position),
            row(RopeScaling::Default, position / exact)
        );
        // `any` is rounded to f32 once, and each frequency once more.
        let (cos, _) = row(composed(any, 0.0, None), position);
        let (expected, _) = row(RopeScaling::Default, position / any);
        for (found, expected) in cos.iter().zip(expected) {
            prop_assert!(f64::from((found - expected).abs()) <= 1e-6 + 2e-7 * position / any);
        }
    }

    /// An xPos logit is, pair by pair, the plain one times `zeta^(distance / scale_base)`.
    #[test]
    fn xpos_decays_with_distance(
        layout in layouts(),
        table in 1usize..5000,
        m in 0u32..2000,
        n in 0u32..2000,
        query in prop::collection::vec(-1.0..1.0f32, 16),
        key in prop::collection::vec(-1.0..1.0f32, 16),
    ) {
        let (m, n) = (f64::from(m), f64::from(n));
        let frequencies = plain().frequencies(None);
        let xpos = XPos::new(table, layout);
        let (mut turned_query, mut turned_key) = (query.clone(), key.clone());
        xpos.rotate_query(&frequencies, m, &mut turned_query);
        xpos.rotate_key(&frequencies, n, &mut turned_key);

        let wide = |x: &[f32]| x.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
        let plain_query = rotate_by_definition(layout, &wide(&query), &frequencies, m);
        let plain_key = rotate_by_definition(layout, &wide(&key), &frequencies, n);
        for (j, zeta) in XPos::zeta(8).into_iter().enumerate() {
            let (a, b) = match layout {
                RopeLayout::Half => (j, j + 8),
                RopeLayout::Interleaved => (2 * j, 2 * j + 1),
            };
            let of_pair = |q: &[f64], k: &[f64]| q[a] * k[a] + q[b] * k[b];
            let expected = of_pair(&plain_query, &plain_key) * zeta.powf((m - n) / xpos.scale_base);
            let found = of_pair(&wide(&turned_query), &wide(&turned_key));
            let size = zeta.powf((m - n) / xpos.scale_base).max(1.0);
            prop_assert!((found - expected).abs() <= 1e-5 * size, "{found} is not {expected}");
        }
    }

    /// Random positions rise, start with the first step, and end within the sequence.
    #[test]
    fn random_positions_rise_and_stay_inside(
        uniform in prop::collection::vec(0.0..1.0f32, 1..300),
        eps in 0.0..0.5f32,
    ) {
        let positions = randomized_positions(&uniform, eps);
        let tokens = uniform.len() as f32;
        prop_assert_eq!(positions.len(), uniform.len());
        prop_assert!(positions.windows(2).all(|w| w[0] <= w[1]));
        prop_assert!(positions[positions.len() - 1] <= tokens * 1.000_001);
        let walked: f32 = uniform.iter().map(|u| eps + u * (2.0 - eps)).sum();
        if walked < tokens * 0.999 {
            prop_assert!((positions[0] - (eps + uniform[0] * (2.0 - eps))).abs() <= 1e-6);
        }
    }
}

/// Every rule with the parameters that ask for nothing is the plain rotation.
#[test]
fn degenerate_rules_are_the_plain_rotation() {
    let expected = plain().frequencies(None);
    let slowest = f64::from(expected.inv_freq[7]);
    let beyond = (std::f64::consts::TAU / slowest) as usize + 2;
    let rules = [
        composed(1.0, 0.0, None),
        composed(1.0, 0.0, Some(beyond)),
        RopeScaling::Ntk { factor: 1.0 },
        RopeScaling::Dynamic { factor: 4.0 },
        RopeScaling::Yarn(YarnParameters::new(1.0, WINDOW)),
        RopeScaling::LongRope {
            short_factor: vec![1.0; 8],
            long_factor: vec![1.0; 8],
            original_max_position_embeddings: WINDOW,
            attention_factor: 1.0,
        },
        RopeScaling::Llama3 {
            factor: 1.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64,
        },
    ];
    for rule in rules {
        let basis = plain().with_scaling(rule.clone()).unwrap();
        for seq_len in [None, Some(1), Some(WINDOW)] {
            let found = basis.frequencies(seq_len);
            assert_eq!(found.attention_factor, 1.0, "{rule:?}");
            for (found, expected) in found.inv_freq.iter().zip(&expected.inv_freq) {
                let error = (found - expected).abs() / expected;
                assert!(error <= 3e-7, "{rule:?}: {found} is not {expected}");
            }
        }
    }

    let mut xpos = XPos::new(WINDOW, RopeLayout::Half);
    xpos.scale_base = f64::INFINITY;
    let mut turned: Vec<f32> = (0..16).map(|i| i as f32 - 7.5).collect();
    let mut table = RopeTable::new(&expected, RopeLayout::Half);
    table.ensure(100);
    let mut expected = turned.clone();
    table.rotate(&mut expected, 99);
    xpos.rotate_key(table.frequencies(), 99.0, &mut turned);
    assert_eq!(turned, expected);
}

/// Rules that read the length change at the window, and only past it.
#[test]
fn length_dependent_rules_change_at_the_window() {
    let dynamic = plain()
        .with_scaling(RopeScaling::Dynamic { factor: 2.0 })
        .unwrap();
    let parameters = json!({"rope_type": "su", "short_factor": [1.0, 1.0], "long_factor": [2.0, 4.0],
        "original_max_position_embeddings": WINDOW});
    let longrope = RopeBasis::from_hf(&parameters, 4, 4 * WINDOW).unwrap();
    for basis in [dynamic, longrope] {
        assert!(basis.depends_on_length());
        let within = basis.frequencies(Some(WINDOW));
        let beyond = basis.frequencies(Some(WINDOW + 1));
        assert_eq!(within, basis.frequencies(None));
        assert_ne!(within.inv_freq, beyond.inv_freq);
        assert_eq!(within.attention_factor, beyond.attention_factor);
    }
    assert!(!plain().depends_on_length());
}

/// The factor of YaRN reaches the logits squared.
#[test]
fn attention_factor_reaches_the_logits() {
    let yarn = plain()
        .with_scaling(RopeScaling::Yarn(YarnParameters::new(16.0, WINDOW)))
        .unwrap()
        .frequencies(None);
    assert_eq!(yarn.attention_factor, 0.1 * 16f64.ln() + 1.0);
    let mut x: Vec<f32> = (0..16).map(|i| 1.0 + i as f32).collect();
    let before: f32 = x.iter().map(|v| v * v).sum();
    let mut table = RopeTable::new(&yarn, RopeLayout::Half);
    table.ensure(1000);
    table.rotate(&mut x, 999);
    let after: f32 = x.iter().map(|v| v * v).sum();
    let squared = yarn.attention_factor * yarn.attention_factor;
    assert!((f64::from(after / before) - squared).abs() <= 1e-5);
}

/// At position 2^30 an f32 angle is off by up to 32 radians; here it is exact.
#[test]
fn far_positions_keep_their_angle() {
    let frequencies = plain().frequencies(None);
    let far = f64::from(1u32 << 30);
    let (mut cos, mut sin) = (vec![0.0; 8], vec![0.0; 8]);
    RopeTable::compute_row(&frequencies, far, &mut cos, &mut sin);
    // Doubling the angle thirty times reaches the same place by another way.
    for (j, freq) in frequencies.inv_freq.iter().enumerate() {
        let (mut c, mut s) = (f64::from(*freq).cos(), f64::from(*freq).sin());
        for _ in 0..30 {
            (c, s) = (c * c - s * s, 2.0 * c * s);
        }
        assert!((f64::from(cos[j]) - c).abs() <= 2e-6, "pair {j}");
        assert!((f64::from(sin[j]) - s).abs() <= 2e-6, "pair {j}");
    }
}

/// A rotation of no pairs leaves the whole head as it is.
#[test]
fn rotation_of_no_pairs_is_the_identity() {
    let mut x = [1.0, 2.0, 3.0];
    rotate(RopeLayout::Half, &mut x, &[], &[]);
    assert_eq!(x, [1.0, 2.0, 3.0]);
}

fn config(extra: serde_json::Value) -> serde_json::Value {
    let mut config = json!({"hidden_size": 64, "num_attention_heads": 4,
        "max_position_embeddings": 4096});
    for (name, value) in extra.as_object().unwrap() {
        config[name] = value.clone();
    }
    config
}

#[test]
fn one_dict_per_layer_type() {
    let config = config(json!({"head_dim": 32, "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25,
            "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "linear_attention": null}}));
    let of = |layer_type| RopeBasis::from_hf_config(&config, Some(layer_type)).unwrap();
    let full = of("full_attention").unwrap();
    assert_eq!(full.rotary_dim(), 32);
    let moving = full.frequencies(None).inv_freq;
    assert!(moving[..4].iter().all(|&f| f > 0.0) && moving[4..].iter().all(|&f| f == 0.0));
    assert_eq!(of("sliding_attention").unwrap().rope_theta(), 10000.0);
    assert_eq!(of("linear_attention"), None);

    for (layer_type, found) in [(None, "not given"), (Some("chunked_attention"), "chunked")] {
        let error = RopeBasis::from_hf_config(&config, layer_type).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains(found) && text.contains("sliding_attention"),
            "{text}"
        );
    }
}

#[test]
fn old_gemma3_spelling() {
    let stretch = json!({"rope_type": "linear", "factor": 8.0});
    let written = config(json!({"model_type": "gemma3_text", "head_dim": 256,
        "rope_theta": 1e6, "rope_local_base_freq": 10000.0, "rope_scaling": stretch}));
    let unsaid = json!({"model_type": "gemma3", "text_config": config(json!({
        "model_type": "gemma3_text", "head_dim": 256, "rope_scaling": stretch}))});
    for config in [written, unsaid] {
        let of = |layer_type| RopeBasis::from_hf_config(&config, Some(layer_type));
        let global = of("full_attention").unwrap().unwrap();
        assert_eq!(global.rope_theta(), 1e6);
        assert_eq!(global.scaling(), &composed(8.0, 0.0, None));
        let local = of("sliding_attention").unwrap().unwrap();
        assert_eq!(local.rope_theta(), 10000.0);
        assert_eq!(local.scaling(), &RopeScaling::Default);
    }
}

#[test]
fn original_window_beside_the_dict_counts_more() {
    let dict = json!({"rope_type": "yarn", "original_max_position_embeddings": 1024});
    for (config, factor, original) in [
        (config(json!({"rope_scaling": dict})), 4.0, 1024),
        (
            config(json!({"rope_scaling": dict, "original_max_position_embeddings": 2048})),
            2.0,
            2048,
        ),
        (
            config(json!({"rope_scaling": {"rope_type": "yarn"}})),
            1.0,
            4096,
        ),
    ] {
        let basis = RopeBasis::from_hf_config(&config, None).unwrap().unwrap();
        let expected = RopeScaling::Yarn(YarnParameters::new(factor, original));
        assert_eq!(basis.scaling(), &expected);
    }
}

#[test]
fn defaults_and_aliases() {
    let basis = |extra| {
        RopeBasis::from_hf_config(&config(extra), None)
            .unwrap()
            .unwrap()
    };
    let plain = RopeBasis::new(10_000.0, 16, 4096).unwrap();
    assert_eq!(basis(json!({})), plain);
    assert_eq!(
        basis(json!({"rope_scaling": null, "rope_theta": 10000})),
        plain
    );
    assert_eq!(basis(json!({"rope_scaling": {"type": "mrope"}})), plain);
    assert_eq!(basis(json!({"head_dim": 8})).rotary_dim(), 8);
    assert_eq!(basis(json!({"partial_rotary_factor": 0.5})).rotary_dim(), 8);
    assert_eq!(
        basis(json!({"rotary_pct": 0.25, "rotary_emb_base": 500})).rope_theta(),
        500.0
    );
}

/// Wrong configurations are refused with the field, what was found and what was expected.
#[test]
fn bad_configurations_name_the_fault() {
    for (scaling, words) in [
        (
            json!({"rope_type": "spiral"}),
            vec!["spiral", "yarn", "llama3"],
        ),
        (json!({"rope_type": 3}), vec!["rope_type", "3"]),
        (json!({"rope_type": "linear"}), vec!["factor", "missing"]),
        (
            json!({"type": "linear", "factor": 0}),
            vec!["factor", "0", "above"],
        ),
        (
            json!({"type": "linear", "factor": "four"}),
            vec!["factor", "four", "number"],
        ),
        (
            json!({"type": "dynamic", "factor": 0.5}),
            vec!["factor", "0.5"],
        ),
        (json!({"type": "longrope"}), vec!["short_factor", "missing"]),
        (
            json!({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
            vec!["short_factor", "1 values", "8 values"],
        ),
        (
            json!({"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}),
            vec!["high_freq_factor", "low_freq_factor"],
        ),
        (
            json!({"type": "yarn", "factor": 4, "truncate": 1}),
            vec!["truncate", "true or false"],
        ),
        (
            json!({"type": "default", "mrope_section": [1, 2]}),
            vec!["mrope_section"],
        ),
        (json!({"rope_theta": -1}), vec!["rope_theta", "-1"]),
        (
            json!({"partial_rotary_factor": 1.5}),
            vec!["partial_rotary_factor", "1.5"],
        ),
        (
            json!({"partial_rotary_factor": 0.2}),
            vec!["rotary dimension", "3", "even"],
        ),
        (json!([1]), vec!["rope_parameters", "object"]),
    ] {
        let config = config(json!({"rope_parameters": scaling}));
        let text = RopeBasis::from_hf_config(&config, None)
            .unwrap_err()
            .to_string();
        for word in words {
            assert!(text.contains(word), "`{word}` is missing in: {text}");
        }
    }
    for config in [
        json!(7),
        json!({"hidden_size": 64}),
        json!({"hidden_size": 1.5}),
    ] {
        assert!(
            RopeBasis::from_hf_config(&config, None).is_err(),
            "{config}"
        );
    }
}

/// A stored basis is checked like any other input.
#[test]
fn stored_bases_are_checked() {
    let mut stored = serde_json::to_value(plain()).unwrap();
    assert_eq!(
        serde_json::from_value::<RopeBasis>(stored.clone()).unwrap(),
        plain()
    );
    stored["freq_factors"] = json!([1.0, 2.0]);
    let text = serde_json::from_value::<RopeBasis>(stored)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("freq_factors") && text.contains("8 values"),
        "{text}"
    );
}

#[test]
fn stored_frequency_factors() {
    let mut factors = [1.0, 1.0, 2.0, 4.0, 8.0, 8.0, 1e30, 1e30];
    let basis = plain().with_freq_factors(&factors).unwrap();
    let expected = plain().frequencies(None).inv_freq;
    let found = basis.frequencies(None).inv_freq;
    for j in 0..6 {
        let error = found[j] * factors[j] / expected[j] - 1.0;
        assert!(error.abs() <= 3e-7, "pair {j}");
    }
    assert_eq!(&found[6..], &[0.0, 0.0]);
    // An override replaces the rule, and the pairs that stand still go on standing still.
    let ntk = RopeBasis::parse_override("ntk:2", &basis).unwrap();
    assert_eq!(&ntk.frequencies(None).inv_freq[6..], &[0.0, 0.0]);
    assert!(ntk.frequencies(None).inv_freq[5] > found[5]);

    factors[0] = 0.0;
    for bad in [&factors[..], &factors[..7]] {
        let text = plain().with_freq_factors(bad).unwrap_err().to_string();
        assert!(text.contains("rope_freqs.weight"), "{text}");
    }
}
