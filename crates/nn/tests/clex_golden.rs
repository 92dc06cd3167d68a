//! CLEX against its published layer, and the laws of its field, solver and tables.

#[path = "../../../tests/golden.rs"]
mod golden;

use golden::Case;
use longspan_nn::position::clex::{
    Act, ClexConfig, ClexField, ClexTable, ClexWeights, LogScale, training_positions,
};
use longspan_nn::position::{Frequencies, RopeBasis, RopeScaling, RopeTable};
use proptest::prelude::*;

fn act(case: &Case) -> Act {
    serde_json::from_value(case.meta("act").clone()).expect("act")
}

fn field(case: &Case, pairs: usize) -> ClexField {
    let (up, down) = (case.f32("up_proj"), case.f32("down_proj"));
    ClexField::new(pairs, &up, &down, act(case), case.meta_f64("field_base")).unwrap()
}

/// Cosines and sines of `positions` for given frequencies, `[positions, pairs]` each.
fn rows(inv_freq: &[f32], positions: &[f64]) -> (Vec<f32>, Vec<f32>) {
    let frequencies = Frequencies::plain(inv_freq.to_vec());
    let pairs = inv_freq.len();
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    let (mut c, mut s) = (vec![0.0; pairs], vec![0.0; pairs]);
    for &position in positions {
        RopeTable::compute_row(&frequencies, position, &mut c, &mut s);
        cos.extend_from_slice(&c);
        sin.extend_from_slice(&s);
    }
    (cos, sin)
}

/// Compares a table with the golden one: `base` plus `per_angle` times the angle is allowed.
fn check_rows(
    case: &Case,
    prefix: &str,
    inv_freq: &[f32],
    positions: &[f64],
    (base, per_angle): (f64, f64),
) {
    let (cos, sin) = rows(inv_freq, positions);
    let pairs = inv_freq.len();
    let allowed = |index: usize, _| {
        let angle = positions[index / pairs] * f64::from(inv_freq[index % pairs]);
        base + per_angle * angle
    };
    case.assert_within(&format!("{prefix}.cos"), &cos, allowed);
    case.assert_within(&format!("{prefix}.sin"), &sin, allowed);
}

#[test]
fn tables() {
    for case in golden::cases_of("clex", "tables") {
        let (window, max_factor) = (
            case.meta_usize("max_position_embeddings"),
            case.meta_usize("max_factor"),
        );
        let pairs = case.meta_usize("dim") / 2;
        let field = field(&case, pairs);
        let basis = RopeBasis::new(case.meta_f64("base"), 2 * pairs, window).unwrap();
        let theta = basis.frequencies(None).inv_freq;
        case.assert_close("inv_freq_base", &theta);

        // The field and the parts of its trend, from the frequencies as stored.
        let start: Vec<f64> = case.f64("inv_freq_base").iter().map(|f| f.ln()).collect();
        for t in [1.0, 1.5, 3.0] {
            let name = format!("field.t{t:.1}");
            case.assert_within(&name, &field.value(t, &start), |_, golden| {
                1e-5 * golden.abs().max(0.01)
            });
            let ntk: Vec<f64> = field.log_ntk(t).iter().map(|z| z.exp()).collect();
            case.assert_close(&format!("time.t{t:.1}.ntk_inv_freq"), &ntk);
            let delta: Vec<f64> = field
                .trend(t)
                .iter()
                .zip(&ntk)
                .map(|(d, n)| d * n)
                .collect();
            case.assert_close(&format!("time.t{t:.1}.delta"), &delta);
        }

        let config = ClexConfig {
            max_factor,
            param_factor: case.meta_usize("param_factor"),
            act: act(&case),
            time_dt: case.meta_f64("time_dt"),
            ..ClexConfig::default()
        };
        let table = ClexTable::new(&theta, &field, &config, window);
        case.assert_close("freqs_t1_to_tmax", &table.frequencies.concat());
        assert_eq!(table.frequencies[0], theta, "scale 1 is the plain rotation");

        let stored = case.f32("freqs_t1_to_tmax");
        let whole = basis
            .with_scaling(RopeScaling::Clex(table.clone()))
            .unwrap();
        let mut checked = 0;
        for name in case.tensors.keys() {
            if let Some(length) = name
                .strip_prefix("eval.seq")
                .and_then(|rest| rest.strip_suffix(".cos"))
            {
                let length: usize = length.parse().expect("length");
                let (factor, cut) = table.factor_for(length);
                assert_eq!(cut, length > window * max_factor);
                assert_eq!(whole.check_length(length).is_err(), cut);
                let positions: Vec<f64> = (0..length.min(window * max_factor))
                    .map(|p| p as f64)
                    .collect();
                let prefix = format!("eval.seq{length}");
                let row = &stored[(factor - 1) * pairs..factor * pairs];
                check_rows(&case, &prefix, row, &positions, (1e-6, 2e-7));
                let found = whole.frequencies(Some(length)).inv_freq;
                check_rows(&case, &prefix, &found, &positions, (1e-5, 5e-6));
                checked += 1;
            } else if let Some(length) = name
                .strip_prefix("train.seq")
                .and_then(|rest| rest.strip_suffix(".t"))
            {
                let length: usize = length.parse().expect("length");
                let factor = case.i64(name)[0] as usize;
                let prefix = format!("train.seq{length}");
                let positions = case.f64(&format!("{prefix}.positions"));
                let row = &stored[(factor - 1) * pairs..factor * pairs];
                check_rows(&case, &prefix, row, &positions, (1e-6, 2e-7));
                check_rows(
                    &case,
                    &prefix,
                    &table.frequencies[factor - 1],
                    &positions,
                    (1e-5, 5e-6),
                );
                // The draw behind these positions makes them again.
                let share = (length / window).max(1) as f64;
                let inner = &positions[1..length - 1];
                let draw: Vec<u64> = inner
                    .iter()
                    .map(|p| (p * share).round() as u64 - 1)
                    .collect();
                let made = training_positions(length, window, factor, &draw).unwrap();
                case.assert_within(&format!("{prefix}.positions"), &made, |_, g| 1e-6 * g);
                checked += 1;
            }
        }
        assert!(checked > 0, "{}: no tables", case.path.display());
    }
}

#[test]
fn gradients_through_the_solver() {
    for case in golden::cases_of("clex", "gradient") {
        let pairs = case.meta_usize("dim") / 2;
        let field = field(&case, pairs);
        let basis = RopeBasis::new(case.meta_f64("base"), 2 * pairs, 1).unwrap();
        let theta = basis.frequencies(None).inv_freq;
        let start: Vec<f64> = theta.iter().map(|&f| f64::from(f).ln()).collect();
        let weights = case.f64("w");
        let (end, gradients) =
            field.solve_with_gradients(&start, case.meta_f64("t"), case.meta_f64("time_dt"), |z| {
                z.iter().zip(&weights).map(|(z, w)| w * z.exp()).collect()
            });
        case.assert_close("z_t", &end);
        case.assert_close("grad_up", &gradients.up);
        case.assert_close("grad_down", &gradients.down);
        let solved = field.solve(&start, &[case.meta_f64("t")], case.meta_f64("time_dt"));
        assert_eq!(solved, [end], "reading and training take the same steps");
    }
}

/// Values in [-1, 1), the same for the same seed.
fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// A network of moderate size: log-frequencies move by about 1 per unit of scale.
fn some_field(pairs: usize, width: usize, act: Act, seed: u64) -> ClexField {
    let scaled = |count: usize, by: f32, seed: u64| -> Vec<f32> {
        random(count, seed).iter().map(|x| x * by).collect()
    };
    let up = scaled(pairs * width, 0.1, seed);
    let down = scaled(pairs * width, 0.5, seed + 1);
    ClexField::new(pairs, &up, &down, act, 10_000.0).unwrap()
}

fn log_theta(pairs: usize) -> Vec<f64> {
    let theta = |j: usize| -(j as f64) / pairs as f64 * 10_000f64.ln();
    (0..pairs).map(theta).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Halving the step divides the error by about 2^4.
    #[test]
    fn the_solver_is_of_fourth_order(seed in 0u64..1000, tanh in any::<bool>()) {
        let act = if tanh { Act::Tanh } else { Act::Silu };
        let field = some_field(8, 16, act, seed);
        let start = log_theta(8);
        let exact = &field.solve(&start, &[3.0], 2e-3)[0];
        let error = |h: f64| -> f64 {
            let found = &field.solve(&start, &[3.0], h)[0];
            found.iter().zip(exact).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
        };
        let (coarse, fine) = (error(0.2), error(0.1));
        prop_assert!(fine * 10.0 <= coarse || coarse < 1e-9, "{coarse:e} to {fine:e}");
    }

    /// Gradients agree with differences, also with respect to a start inside the path.
    #[test]
    fn gradients_agree_with_differences(seed in 0u64..1000, tanh in any::<bool>()) {
        let act = if tanh { Act::Tanh } else { Act::Silu };
        let (pairs, width) = (4, 6);
        let (up, down) = (random(pairs * width, seed), random(pairs * width, seed + 7));
        let small = |v: &[f32]| -> Vec<f32> { v.iter().map(|x| 0.1 * x).collect() };
        let (up, down) = (small(&up), small(&down));
        let loss = |up: &[f32], down: &[f32]| -> f64 {
            let field = ClexField::new(pairs, up, down, act, 10_000.0).unwrap();
            field.solve(&log_theta(pairs), &[2.0], 0.25)[0].iter().map(|z| z.sin()).sum()
        };
        let field = ClexField::new(pairs, &up, &down, act, 10_000.0).unwrap();
        let (_, gradients) = field.solve_with_gradients(&log_theta(pairs), 2.0, 0.25, |z| {
            z.iter().map(|z| z.cos()).collect()
        });
        let step = 1e-3f32;
        for index in 0..pairs * width {
            let moved = |values: &[f32], by: f32| {
                let mut values = values.to_vec();
                values[index] += by;
                values
            };
            let span = f64::from(moved(&up, step)[index]) - f64::from(moved(&up, -step)[index]);
            let slope = (loss(&moved(&up, step), &down) - loss(&moved(&up, -step), &down)) / span;
            prop_assert!((slope - gradients.up[index]).abs() <= 1e-4 * (1.0 + slope.abs()));
            let span = f64::from(moved(&down, step)[index]) - f64::from(moved(&down, -step)[index]);
            let slope = (loss(&up, &moved(&down, step)) - loss(&up, &moved(&down, -step))) / span;
            prop_assert!((slope - gradients.down[index]).abs() <= 1e-4 * (1.0 + slope.abs()));
        }
    }

    /// A network that adds nothing gives NTK scaling by `2t - 1`, in the solver and in closed form; and
    /// scale 1 is the plain rotation bit for bit, whatever the network.
    #[test]
    fn without_a_network_it_is_ntk_scaling(
        pairs in 2usize..48,
        base in 1000.0..1e6f64,
        max_factor in 1usize..12,
        seed in 0u64..100,
    ) {
        let theta = RopeBasis::new(base, 2 * pairs, 64).unwrap().frequencies(None).inv_freq;
        let up = random(pairs * pairs * 2, seed);
        let zero = vec![0.0; up.len()];
        let field = ClexField::new(pairs, &up, &zero, Act::Tanh, 10_000.0).unwrap();
        let config = ClexConfig { max_factor, ..ClexConfig::default() };
        let solved = ClexTable::new(&theta, &field, &config, 64);
        let closed = ClexTable::untrained(&theta, max_factor, 64);
        for (t, (solved, closed)) in solved.frequencies.iter().zip(&closed.frequencies).enumerate() {
            let ntk = RopeBasis::new(base, 2 * pairs, 64)
                .unwrap()
                .with_scaling(RopeScaling::Ntk { factor: 2.0 * t as f64 + 1.0 })
                .unwrap()
                .frequencies(None)
                .inv_freq;
            for j in 0..pairs {
                prop_assert!((solved[j] / closed[j] - 1.0).abs() <= 1e-5);
                prop_assert!((closed[j] / ntk[j] - 1.0).abs() <= 1e-5);
            }
        }
        prop_assert_eq!(&solved.frequencies[0], &theta);
        prop_assert_eq!(&closed.frequencies[0], &theta);
    }

    #[test]
    fn training_positions_span_the_stretched_text(
        length in 2usize..200,
        share in 1usize..4,
        factor in 1usize..16,
        seed in 0u64..1000,
    ) {
        let window = (length / share).max(1);
        let places = (length * factor - 2) as u64;
        // A sorted draw without repetition: every place in turn, kept with the chance it needs.
        let mut left = length - 2;
        let coins = random(places as usize, seed);
        let draw: Vec<u64> = (0..places)
            .filter(|place| {
                let chance = left as f32 / (places - place) as f32;
                let take = left > 0 && (coins[*place as usize] + 1.0) / 2.0 < chance;
                left -= usize::from(take);
                take
            })
            .collect();
        prop_assume!(draw.len() == length - 2);
        let positions = training_positions(length, window, factor, &draw).unwrap();
        let share = (length / window).max(1);
        prop_assert_eq!(positions.len(), length);
        prop_assert_eq!(positions[0], 0.0);
        prop_assert_eq!(positions[length - 1], (length * factor / share) as f64 - 1.0);
        let rising = positions[..length - 1].windows(2).all(|pair| pair[0] < pair[1]);
        prop_assert!(rising);
    }
}

#[test]
fn scales_go_by_length() {
    let theta = RopeBasis::new(10_000.0, 8, 100)
        .unwrap()
        .frequencies(None)
        .inv_freq;
    let mut table = ClexTable::untrained(&theta, 4, 100);
    for (tokens, factor) in [
        (0, (1, false)),
        (1, (1, false)),
        (100, (1, false)),
        (101, (2, false)),
        (200, (2, false)),
        (201, (3, false)),
        (400, (4, false)),
        (401, (4, true)),
        (1 << 40, (4, true)),
    ] {
        assert_eq!(table.factor_for(tokens), factor, "{tokens} tokens");
    }
    assert_eq!(table.query_factor(Some(400)), 1.0);
    table.log_scale = LogScale::Max;
    let long = 400f64.ln() / 100f64.ln();
    assert_eq!(table.query_factor(Some(400)), long);
    assert_eq!(table.query_factor(Some(10)), 1.0);
    table.log_scale = LogScale::Raw;
    assert_eq!(table.query_factor(Some(10)), 0.5);

    // The factor reaches queries, and not keys.
    let basis = RopeBasis::new(10_000.0, 8, 100)
        .and_then(|basis| basis.with_scaling(RopeScaling::Clex(table)))
        .unwrap();
    let frequencies = basis.frequencies(Some(400));
    let (mut cos, mut sin) = ([0.0; 4], [0.0; 4]);
    RopeTable::compute_row(&frequencies, 0.0, &mut cos, &mut sin);
    assert_eq!(cos, [long as f32; 4]);
    RopeTable::compute_key_row(&frequencies, 0.0, &mut cos, &mut sin);
    assert_eq!(cos, [1.0; 4]);
}

/// Writes the two tensors as a checkpoint has them, in a given type.
fn write_weights(path: &std::path::Path, shapes: [[usize; 2]; 2], dtype: safetensors::Dtype) {
    let tensors: Vec<(String, [usize; 2], Vec<u8>)> = ["ode_up_proj", "ode_down_proj"]
        .into_iter()
        .zip(shapes)
        .map(|(name, shape)| {
            let values = random(shape[0] * shape[1], shape[0] as u64);
            let bytes = values.iter().flat_map(|&value| match dtype {
                safetensors::Dtype::F32 => value.to_le_bytes().to_vec(),
                _ => half::bf16::from_f32(value).to_le_bytes().to_vec(),
            });
            let name = format!("model.clex_layer.proj_func.{name}");
            (name, shape, bytes.collect())
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = safetensors::tensor::TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
        (name.as_str(), view)
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

#[test]
fn published_weights_are_read_and_mistakes_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    let open = |path: &std::path::Path| ClexWeights::open(path);
    let fails = |path: &std::path::Path, words: &[&str]| {
        let error = open(path).and_then(|w| w.field(8)).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    fails(folder.path(), &["ode_up_proj", "0 safetensors files"]);
    fails(
        &folder.path().join("none.safetensors"),
        &["none.safetensors"],
    );

    write_weights(&file, [[8, 16], [16, 8]], safetensors::Dtype::BF16);
    // Without a configuration: what the first release meant.
    let old = open(&file).unwrap();
    assert_eq!(old.config.act, Act::Silu);
    assert_eq!((old.config.max_factor, old.config.time_dt), (16, 0.01));
    assert_eq!(old.window, None);

    let config = folder.path().join("config.json");
    let write = |text: &str| std::fs::write(&config, text).unwrap();
    write(
        r#"{"max_position_embeddings": 4096, "log_scale": true, "rope_scaling": {"type": "clex",
            "factor": 1, "max_factor": 32, "param_factor": 2, "act": "tanh", "time_dt": 0.02}}"#,
    );
    let new = open(folder.path()).unwrap();
    assert_eq!(
        new.config,
        ClexConfig {
            max_factor: 32,
            param_factor: 2,
            act: Act::Tanh,
            time_dt: 0.02,
            clex_field_base: 10_000.0,
            log_scale: LogScale::Max,
        }
    );
    assert_eq!(new.window, Some(4096));
    let theta = RopeBasis::new(10_000.0, 16, 4096)
        .unwrap()
        .frequencies(None)
        .inv_freq;
    let table = new.table(&theta, 4096).unwrap();
    assert_eq!(table.longest(), 32 * 4096);
    assert!(table.frequencies[31] != ClexTable::untrained(&theta, 32, 4096).frequencies[31]);

    let theta = RopeBasis::new(10_000.0, 32, 4096)
        .unwrap()
        .frequencies(None)
        .inv_freq;
    let error = new.table(&theta, 4096).unwrap_err().to_string();
    assert!(
        error.contains("[8, 16]") && error.contains("[16, width]"),
        "{error}"
    );
    write(r#"{"rope_scaling": {"type": "clex", "max_factor": "many"}}"#);
    fails(folder.path(), &["config.json", "many"]);
    write(r#"{"max_position_embeddings": 0}"#);
    fails(folder.path(), &["config.json", "max_position_embeddings"]);
    write("{}");
    write_weights(&file, [[8, 16], [8, 16]], safetensors::Dtype::F32);
    fails(folder.path(), &["[8, 16]", "[width, 8]"]);
}
