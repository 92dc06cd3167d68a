//! The rotary rules against reference results: Giraffe's own modules and Hugging Face transformers.

#[path = "../../../tests/golden.rs"]
mod golden;

use golden::Case;
use longspan_nn::position::randomized::randomized_positions;
use longspan_nn::position::{
    Frequencies, RopeBasis, RopeLayout, RopeScaling, RopeTable, XPos, rotate,
};
use serde_json::Value;

fn layout(case: &Case) -> RopeLayout {
    serde_json::from_value(case.meta("layout").clone()).expect("layout")
}

/// Cosines and sines may differ by rounding of the frequency, which grows with the angle.
fn check_rows(case: &Case, prefix: &str, frequencies: &Frequencies, positions: &[f64]) {
    let pairs = frequencies.inv_freq.len();
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    let (mut c, mut s) = (vec![0.0; pairs], vec![0.0; pairs]);
    for &position in positions {
        RopeTable::compute_row(frequencies, position, &mut c, &mut s);
        cos.extend_from_slice(&c);
        sin.extend_from_slice(&s);
    }
    let allowed = |index: usize, _| {
        let angle = positions[index / pairs] * f64::from(frequencies.inv_freq[index % pairs]);
        1e-6 + 2e-7 * angle
    };
    case.assert_within(&format!("{prefix}cos"), &cos, allowed);
    case.assert_within(&format!("{prefix}sin"), &sin, allowed);
}

/// The composed rule of one entry of `cfgs`.
fn composed(case: &Case, config: &Value) -> RopeBasis {
    let number = |key: &str| config.get(key).and_then(Value::as_f64);
    let theta = number("base").unwrap_or(case.meta_f64("base"));
    RopeBasis::new(theta, case.meta_usize("dim"), case.meta_usize("npos"))
        .unwrap()
        .with_scaling(RopeScaling::Composed {
            linear: number("scale").unwrap_or(1.0),
            power: number("scale_power").unwrap_or(0.0),
            truncated: number("truncate").map(|tokens| tokens as usize),
        })
        .unwrap()
}

#[test]
fn bases() {
    for case in golden::cases_of("giraffe", "bases") {
        let positions = case.f64("positions");
        let configs = case.meta("cfgs").as_object().expect("cfgs");
        for (name, config) in configs {
            let frequencies = composed(&case, config).frequencies(None);
            assert_eq!(frequencies.attention_factor, 1.0);
            case.assert_close(&format!("{name}.inv_freq"), &frequencies.inv_freq);
            check_rows(&case, &format!("{name}."), &frequencies, &positions);

            // The reference rounds each angle to f32. Given those angles, nothing else may differ; and
            // rows of a grown table are the rows of any position.
            let stored = case.f32(&format!("{name}.inv_freq"));
            let pairs = stored.len();
            let golden = case.f64(&format!("{name}.cos")); // [rows, pairs]
            let (mut cos, mut sin) = (vec![0.0; pairs], vec![0.0; pairs]);
            let mut table = RopeTable::new(&frequencies, layout(&case));
            for (row, &position) in positions.iter().enumerate() {
                let angles =
                    Frequencies::plain(stored.iter().map(|f| position as f32 * f).collect());
                RopeTable::compute_row(&angles, 1.0, &mut cos, &mut sin);
                for (j, &cos) in cos.iter().enumerate() {
                    let error = (f64::from(cos) - golden[row * pairs + j]).abs();
                    assert!(error <= 1e-6, "{name} row {row} pair {j}: off by {error:e}");
                }
                table.ensure(position as usize + 1);
                RopeTable::compute_row(&frequencies, position, &mut cos, &mut sin);
                assert_eq!(table.row(position as usize), (&cos[..], &sin[..]));
            }
        }

        let config = &configs[case.meta_str("apply_cfg")];
        let frequencies = composed(&case, config).frequencies(None);
        let mut table = RopeTable::new(&frequencies, layout(&case));
        for (input, output) in [("apply.q", "apply.q_rot"), ("apply.k", "apply.k_rot")] {
            let shape = case.shape(input); // [batch, heads, tokens, head_dim]
            let (tokens, head_dim) = (shape[2], shape[3]);
            table.ensure(tokens);
            let mut x = case.f32(input);
            for (index, head) in x.chunks_exact_mut(head_dim).enumerate() {
                table.rotate(head, index % tokens);
            }
            case.assert_close(output, &x);
        }
    }
}

#[test]
fn hf_rope_types() {
    for case in golden::cases_of("giraffe", "hf_rope_types") {
        let mut checked = 0;
        for tensor in case.tensors.keys() {
            let Some(label) = tensor.strip_suffix(".inv_freq") else {
                continue;
            };
            let (name, seq_len) = match label.split_once('@') {
                Some((name, length)) => (name, Some(length.parse().expect("length"))),
                None => (label, None),
            };
            let entry = case.meta(name);
            let parameters = &entry["rope_parameters"];
            let head_dim = entry["config"]["head_dim"].as_u64().unwrap() as usize;
            let window = entry["config"]["max_position_embeddings"].as_u64().unwrap() as usize;
            let direct = RopeBasis::from_hf(parameters, head_dim, window).unwrap();

            // Both spellings of the whole file, and the stored form of the basis, say the same.
            let mut new = entry["config"].clone();
            new["rope_parameters"] = parameters.clone();
            let mut old = entry["config"].clone();
            old["rope_theta"] = parameters["rope_theta"].clone();
            old["rope_scaling"] = parameters.clone();
            let old_dict = old["rope_scaling"].as_object_mut().unwrap();
            old_dict.remove("rope_theta");
            let rope_type = old_dict.remove("rope_type").unwrap();
            old_dict.insert("type".into(), rope_type);
            for config in [new, old] {
                let read = RopeBasis::from_hf_config(&config, None).unwrap();
                assert_eq!(read.as_ref(), Some(&direct), "{name}: {config}");
            }
            let stored = serde_json::to_string(&direct).unwrap();
            assert_eq!(serde_json::from_str::<RopeBasis>(&stored).unwrap(), direct);

            let found = direct.frequencies(seq_len);
            assert_eq!(found.inv_freq.len(), direct.rotary_dim() / 2);
            case.assert_close(tensor, &found.inv_freq);
            let factor = format!("{label}.attention_factor");
            case.assert_close(&factor, &[found.attention_factor]);
            checked += 1;
        }
        assert!(checked > 0, "{}: nothing to check", case.path.display());
    }
}

#[test]
fn randomized() {
    for case in golden::cases_of("giraffe", "randomized") {
        let tokens = case.meta_usize("seq_len");
        let uniform = case.f32("u"); // [batch, tokens]
        let positions: Vec<f32> = uniform
            .chunks_exact(tokens)
            .flat_map(|row| randomized_positions(row, case.meta_f64("eps") as f32))
            .collect();
        case.assert_close("positions", &positions);

        let frequencies = Frequencies::plain(case.f32("inv_freq"));
        let basis = RopeBasis::new(case.meta_f64("base"), 2 * case.shape("inv_freq")[0], tokens);
        let scaling = RopeScaling::Composed {
            linear: case.meta_f64("scale"),
            power: 0.0,
            truncated: None,
        };
        let own = basis.unwrap().with_scaling(scaling).unwrap();
        case.assert_within("inv_freq", &own.frequencies(None).inv_freq, |_, g| 1e-6 * g);

        let pairs = frequencies.inv_freq.len();
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        let (mut c, mut s) = (vec![0.0; pairs], vec![0.0; pairs]);
        for position in positions {
            RopeTable::compute_row(&frequencies, f64::from(position), &mut c, &mut s);
            cos.extend_from_slice(&c); // [batch, tokens, pairs]
            sin.extend_from_slice(&s);
        }
        case.assert_close("cos", &cos);
        case.assert_close("sin", &sin);
    }
}

#[test]
fn xpos() {
    for case in golden::cases_of("giraffe", "xpos") {
        let table_len = case.meta_usize("max_position_embeddings");
        let offset = case.meta_usize("offset");
        let shape = case.shape("q").to_vec(); // [batch, heads, tokens, head_dim]
        let (tokens, head_dim) = (shape[2], shape[3]);
        let basis = RopeBasis::new(case.meta_f64("base"), head_dim, table_len).unwrap();
        let frequencies = basis.frequencies(None);
        let mut xpos = XPos::new(table_len, layout(&case));
        xpos.scale_base = case.meta_f64("scale_base");

        case.assert_close("zeta", &XPos::zeta(head_dim / 2));
        let mut scales = vec![0.0; table_len * head_dim / 2];
        for (row, scale) in scales.chunks_exact_mut(head_dim / 2).enumerate() {
            xpos.scale_row(row as f64, scale);
        }
        case.assert_close("scale_table", &scales);
        let rows: Vec<f64> = (0..table_len).map(|row| row as f64).collect();
        check_rows(&case, "", &frequencies, &rows);

        let (mut query, mut key) = (case.f32("q"), case.f32("k"));
        for (index, head) in query.chunks_exact_mut(head_dim).enumerate() {
            xpos.rotate_query(&frequencies, (offset + index % tokens) as f64, head);
        }
        for (index, head) in key.chunks_exact_mut(head_dim).enumerate() {
            xpos.rotate_key(&frequencies, (offset + index % tokens) as f64, head);
        }
        case.assert_close("q_rot", &query);
        case.assert_close("k_rot", &key);

        let of_head = tokens * head_dim;
        let mut scores = Vec::new(); // [batch, heads, tokens, tokens]
        for (query, key) in query.chunks_exact(of_head).zip(key.chunks_exact(of_head)) {
            for q in query.chunks_exact(head_dim) {
                for k in key.chunks_exact(head_dim) {
                    scores.push(q.iter().zip(k).map(|(a, b)| a * b).sum::<f32>());
                }
            }
        }
        case.assert_within("scores_unscaled", &scores, |_, g| 1e-4 * g.abs().max(1.0));
    }
}

/// A head whose coordinates are woven together turns to the woven head, with the very same products.
#[test]
fn layouts_are_permutations_of_each_other() {
    for case in golden::cases_of("giraffe", "bases") {
        let head_dim = case.meta_usize("dim");
        let (cos, sin) = (case.f32("default.cos"), case.f32("default.sin"));
        let pairs = head_dim / 2;
        for head in case.f32("apply.q").chunks_exact(head_dim) {
            let row = 7 * pairs..8 * pairs;
            let mut half = head.to_vec();
            rotate(
                RopeLayout::Half,
                &mut half,
                &cos[row.clone()],
                &sin[row.clone()],
            );
            let mut woven: Vec<f32> = (0..head_dim).map(|i| head[i / 2 + i % 2 * pairs]).collect();
            rotate(
                RopeLayout::Interleaved,
                &mut woven,
                &cos[row.clone()],
                &sin[row],
            );
            for i in 0..head_dim {
                assert_eq!(woven[i], half[i / 2 + i % 2 * pairs], "coordinate {i}");
            }
        }
    }
}
