//! ALiBi under LM-Infinite's visible sets, and the decay of rotary encodings (Llama 2 Long's figure).

#[path = "../../../tests/golden.rs"]
mod golden;

use candle_core::{DType, Device, Tensor};
use longspan_nn::attention::Attend;
use longspan_nn::position::alibi::{Alibi, AlibiAttention, slopes};
use longspan_nn::position::{RopeBasis, XPos};

/// [heads, tokens, dim] to [tokens, heads dim].
fn token_major(x: &[f64], heads: usize, dim: usize) -> Vec<f64> {
    let tokens = x.len() / heads / dim;
    let at = |t: usize, h: usize| (h * tokens + t) * dim;
    (0..tokens)
        .flat_map(|t| (0..heads).flat_map(move |h| (0..dim).map(move |d| at(t, h) + d)))
        .map(|i| x[i])
        .collect()
}

/// Attention over tokens in pieces of the given sizes; q, k, v token-major in f64.
fn run(alibi: &Alibi, dim: usize, qkv: [&[f64]; 3], pieces: &[usize], dtype: DType) -> Vec<f64> {
    let heads = alibi.slopes.len();
    let scale = 1.0 / (dim as f64).sqrt();
    let mut attention = AlibiAttention::new(alibi.clone(), 1, heads, dim, scale).unwrap();
    let (mut out, mut start) = (Vec::new(), 0);
    for &count in pieces {
        let width = heads * dim;
        let rows = start * width..(start + count) * width;
        let [q, k, v] = qkv.map(|x| {
            Tensor::from_slice(&x[rows.clone()], (count, width), &Device::Cpu)
                .and_then(|x| x.to_dtype(dtype))
                .unwrap()
        });
        let found = attention.attend(0, &q, &k, &v).unwrap();
        let found = found.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
        out.extend(found.to_vec1::<f64>().unwrap());
        start += count;
    }
    out
}

#[test]
fn alibi_in_lm_infinite() {
    for case in golden::cases_of("lm-infinite", "alibi") {
        let &[batch, heads, tokens, dim] = case.shape("q") else {
            panic!("q has four dimensions")
        };
        assert_eq!((batch, case.meta_usize("first_query_pos")), (1, 0));
        let alibi = Alibi {
            slopes: case.f64("slopes"),
            local: case.meta_usize("local"),
            global: case.meta_usize("global"),
        };
        let [q, k, v, out] =
            ["q", "k", "v", "out"].map(|name| token_major(&case.f64(name), heads, dim));
        let (atol, _) = case.tolerance("out");
        for pieces in [vec![tokens], vec![1; tokens], vec![7, 1, tokens - 8]] {
            let found = run(&alibi, dim, [&q, &k, &v], &pieces, DType::F64);
            for (index, (found, want)) in found.iter().zip(&out).enumerate() {
                assert!(
                    (found - want).abs() <= atol,
                    "{index}: {found}, expected {want}"
                );
            }
            let single = run(&alibi, dim, [&q, &k, &v], &pieces, DType::F32);
            assert!(single.iter().zip(&out).all(|(a, b)| (a - b).abs() <= 2e-6));
        }
        // A window as long as the text is plain ALiBi.
        let wide = Alibi {
            local: tokens,
            global: 0,
            ..alibi.clone()
        };
        let plain = Alibi {
            slopes: alibi.slopes.clone(),
            ..Alibi::new(heads)
        };
        let of = |alibi: &Alibi| run(alibi, dim, [&q, &k, &v], &[tokens], DType::F64);
        assert_eq!(of(&wide), of(&plain));
        assert_ne!(of(&wide), of(&alibi));
    }
}

#[test]
fn biases_and_slopes_are_those_of_the_paper() {
    assert_eq!(slopes(4), [0.25, 0.0625, 0.015625, 0.00390625]);
    let eight = slopes(8);
    assert_eq!((eight[0], eight[7]), (0.5, 1.0 / 256.0));
    // Twelve heads: the eight, then the first four odd ones of sixteen.
    let twelve = slopes(12);
    assert_eq!(twelve[..8], eight);
    for (i, slope) in twelve[8..].iter().enumerate() {
        assert!((slope - (-(i as f64) - 0.5).exp2()).abs() <= 1e-15);
    }
    assert!(slopes(0).is_empty());

    let alibi = Alibi {
        slopes: vec![0.5],
        local: 4,
        global: 2,
    };
    assert_eq!(alibi.bias(0, 10, 10), Some(0.0));
    assert_eq!(alibi.bias(0, 10, 7), Some(-1.5));
    assert_eq!(alibi.bias(0, 10, 6), None, "between the last and the first");
    assert_eq!(alibi.bias(0, 10, 1), Some(-2.0), "at the ceiling");
    assert_eq!(
        alibi.bias(0, 1, 0),
        Some(-0.5),
        "a first token among the last ones"
    );
    assert_eq!(alibi.bias(0, 3, 4), None, "the future");
    assert!(AlibiAttention::new(alibi.clone(), 1, 2, 8, 1.0).is_err());
    assert!(AlibiAttention::new(Alibi { local: 0, ..alibi }, 1, 1, 8, 1.0).is_err());
}

/// Logits of all-ones queries and keys by distance, for the encodings that Llama 2 Long compares, from
/// the bases that reading uses. f32 frequencies bound the agreement, at 3e-7 of each angle.
#[test]
fn decay_with_distance() {
    for case in golden::cases_of("llama2-long", "decay_curves") {
        let dim = case.meta_usize("head_dim");
        let plain = RopeBasis::new(case.meta_f64("rope_base"), dim, 4096).unwrap();
        let rope = |text: String| RopeBasis::parse_override(&text, &plain).unwrap();
        let (abf, pi) = (case.meta_f64("abf_base"), case.meta_f64("pi_scale"));
        let scale_base = case.meta_f64("xpos_scale_base");
        let distances = case.f64("distance");
        for (name, basis) in [
            ("rope", plain.clone()),
            ("pi", rope(format!("linear:{pi}"))),
            ("abf", rope(format!("abf:{abf}"))),
            ("xpos", rope(format!("xpos:{scale_base}"))),
            ("xpos_abf", rope(format!("xpos:{scale_base}+abf:{abf}"))),
        ] {
            let frequencies = basis.frequencies(None);
            let score = |distance: f64, error: f64| -> f64 {
                let zeta = XPos::zeta(dim / 2);
                let of_pair = |(j, &freq): (usize, &f32)| {
                    let decay = match frequencies.scale_base {
                        Some(base) => zeta[j].powf(distance / base),
                        None => 1.0,
                    };
                    let angle = distance * f64::from(freq);
                    if error == 0.0 {
                        angle.cos() * decay
                    } else {
                        angle * error * decay
                    }
                };
                let sum: f64 = frequencies.inv_freq.iter().enumerate().map(of_pair).sum();
                sum * 2.0 / (dim as f64).sqrt()
            };
            let found: Vec<f64> = distances.iter().map(|&d| score(d, 0.0)).collect();
            case.assert_within(name, &found, |i, _| 1e-9 + score(distances[i], 3e-7));
        }
        for (name, basis) in [("rope", plain.clone()), ("abf", rope(format!("abf:{abf}")))] {
            let found = basis.frequencies(None).inv_freq;
            case.assert_within(&format!("inv_freq.{name}"), &found, |_, g| 3e-7 * g);
            let mean = found.iter().map(|&f| f64::from(f)).sum::<f64>() / found.len() as f64;
            case.assert_within(&format!("step.mean_angle.{name}"), &[mean], |_, g| 3e-7 * g);
        }
        let mean = rope(format!("linear:{pi}")).frequencies(None).inv_freq;
        let mean = mean.iter().map(|&f| f64::from(f)).sum::<f64>() / mean.len() as f64;
        case.assert_within("step.mean_angle.pi", &[mean], |_, g| 3e-7 * g);
    }
}

/// Llama 2 Long: raising the base by `f^(d / (d - 2))` is static NTK scaling by f.
#[test]
fn a_raised_base_is_ntk_scaling() {
    let plain = RopeBasis::new(10_000.0, 64, 4096).unwrap();
    for factor in [1.0, 2.0, 8.0] {
        let base = 10_000.0 * f64::powf(factor, 64.0 / 62.0);
        let abf = RopeBasis::parse_override(&format!("abf:{base}"), &plain).unwrap();
        let ntk = RopeBasis::parse_override(&format!("ntk:{factor}"), &plain).unwrap();
        assert_eq!(abf.frequencies(None), ntk.frequencies(None));
        let stored = serde_json::to_string(&abf).unwrap();
        assert_eq!(
            serde_json::from_str::<RopeBasis>(&stored)
                .unwrap()
                .rope_theta(),
            base
        );
    }
    let same = RopeBasis::parse_override("abf:10000", &plain).unwrap();
    assert_eq!(same, plain);
}
