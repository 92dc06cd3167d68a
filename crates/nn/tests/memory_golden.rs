//! LSSL, LongVQ and Mamba-2's state policies against reference results and their own laws.

mod family;

use candle_core::{DType, Device, Tensor};
use family::golden::{self, Case};
use family::{given, largest, near, sibling, t, wave, zeros};
use longspan_kernels::ssd::Scan;
use longspan_kernels::ssd_policy::{Repair, RepairState, repaired, window_state};
use longspan_kernels::tridiag::krylov;
use longspan_kernels::vq::{VqAttention, vq_assign};
use longspan_nn::mixer::longvq::{assigned, codebook, updated};
use longspan_nn::mixer::lssl::{
    Measure, Structured, VECTORS, dense_bilinear, structured_start, zoh,
};
use longspan_nn::mixer::*;
use longspan_nn::params::ParamStore;
use std::collections::HashMap;

// LSSL

fn matrix(case: &Case, name: &str) -> Vec<Vec<f64>> {
    t(case, name).to_vec2().unwrap()
}

fn structured(values: impl Fn(&str) -> Tensor) -> Structured {
    let get = |name: &str| values(name).unsqueeze(0).unwrap();
    let [dl, d, du, pl, pr, c, b] = VECTORS.map(get);
    Structured {
        dl,
        d,
        du,
        pl,
        pr,
        c,
        b,
    }
}

fn spread(s: &Structured, systems: usize) -> Structured {
    let wide = |x: &Tensor| {
        let n = x.dim(1).unwrap();
        x.broadcast_as((systems, n)).unwrap().contiguous().unwrap()
    };
    Structured {
        dl: wide(&s.dl),
        d: wide(&s.d),
        du: wide(&s.du),
        pl: wide(&s.pl),
        pr: wide(&s.pr),
        c: wide(&s.c),
        b: wide(&s.b),
    }
}

fn at_start(measure: Measure, n: usize) -> Structured {
    let start = structured_start(measure, n).unwrap();
    structured(|name| {
        let index = VECTORS.iter().position(|&v| v == name).unwrap();
        Tensor::new(start[index].clone(), &Device::Cpu).unwrap()
    })
}

#[test]
fn lssl_transitions_and_their_structured_form() {
    for case in &golden::cases_of("lssl", "transitions") {
        let n = case.meta_usize("N");
        let (a, b) = hippo::legs(n);
        let flat = |v: Vec<f64>| Tensor::new(v, &Device::Cpu).unwrap();
        near(case, "A_legs", &flat(a.concat()));
        near(case, "B_legs", &flat(b));
        let (a, b) = hippo::legt(n);
        near(case, "A_legt", &flat(a.concat()));
        near(case, "B_legt", &flat(b));
        let legs = at_start(Measure::Legs, n);
        near(case, "A_struct_legs", &legs.dense().unwrap());
        // The structured start is the dense matrix itself, B too.
        let dense = t(case, "A_legs").unsqueeze(0).unwrap();
        assert!(largest(&(legs.dense().unwrap() - dense).unwrap()) < 1e-12 * n as f64);
        near(case, "B_legs", &(&legs.pl * &legs.b).unwrap());
        let legt = at_start(Measure::Legt, n);
        near(
            case,
            "A_struct_legt_d_without_noise",
            &legt.dense().unwrap(),
        );
        let lagt = at_start(Measure::Lagt, n);
        near(case, "A_lagt", &lagt.dense().unwrap());
        near(case, "B_lagt", &(&lagt.pl * &lagt.b).unwrap());
        let perturbed = structured(|name| t(case, &format!("p_{name}")));
        near(case, "A_struct_perturbed", &perturbed.dense().unwrap());
        near(
            case,
            "B_struct_perturbed",
            &(&perturbed.pl * &perturbed.b).unwrap(),
        );
    }
}

#[test]
fn lssl_discretisations_by_structure_and_dense() {
    for case in &golden::cases_of("lssl", "discretise") {
        let params = sibling(case, "params_file");
        let h = case.meta_usize("H");
        let s = structured(|name| t(&params, &format!("p_{name}")));
        let s = spread(&s, h);
        let dt = t(case, "dt");
        let (a, b) = (
            matrix(&params, "A_struct_perturbed"),
            params.f64("B_struct_perturbed"),
        );
        let flat = |v: Vec<f64>| Tensor::new(v, &Device::Cpu).unwrap();
        for (name, alpha) in case.meta("schemes").as_object().unwrap() {
            let dense: Vec<_> = case
                .f64("dt")
                .into_iter()
                .map(|dt| match alpha.as_f64() {
                    Some(alpha) => dense_bilinear(&a, &b, dt, alpha),
                    None => zoh(&a, &b, dt),
                })
                .collect();
            let all_a = dense.iter().flat_map(|(a, _)| a.concat()).collect();
            let all_b = dense.iter().flat_map(|(_, b)| b.clone()).collect();
            near(case, &format!("dA_{name}"), &flat(all_a));
            near(case, &format!("dB_{name}"), &flat(all_b));
            if let Some(alpha) = alpha.as_f64() {
                let (a, b) = s.discretise(&dt, alpha).unwrap();
                near(case, &format!("dA_{name}"), &a);
                near(case, &format!("dB_{name}"), &b);
            }
        }
        let vec = t(case, "vec").unsqueeze(1).unwrap();
        let half = (&dt * 0.5).unwrap();
        near(case, "fwd_mult_half_dt", &s.multiply(&half, &vec).unwrap());
        near(case, "inv_mult_half_dt", &s.solve(&half, &vec).unwrap());
    }
}

#[test]
fn lssl_layer_as_convolution_and_as_recurrence() {
    for case in &golden::cases_of("lssl", "layer") {
        let system = sibling(case, "system_file");
        let params = sibling(&system, "params_file");
        let (h, n, m) = (
            case.meta_usize("H"),
            case.meta_usize("N"),
            case.meta_usize("M"),
        );
        let length = case.meta_usize("L");
        let (a, b) = (t(&system, "dA_bilinear"), t(&system, "dB_bilinear"));
        near(case, "krylov", &krylov(&a, &b, length).unwrap());
        let mut tensors: HashMap<String, Tensor> = VECTORS
            .iter()
            .map(|name| {
                let value = t(&params, &format!("p_{name}")).unsqueeze(0).unwrap();
                (format!("transition.{name}"), value)
            })
            .collect();
        for (name, value) in [
            ("log_dt", t(&system, "dt").log().unwrap()),
            ("C", t(case, "C")),
            ("D", t(case, "D")),
            ("output_linear.weight", t(case, "W_out")),
            ("output_linear.bias", t(case, "b_out")),
        ] {
            tensors.insert(name.into(), value);
        }
        let store = ParamStore::from_tensors(tensors, DType::F64, &Device::Cpu);
        let config = LsslConfig {
            order: n,
            channels: m,
            alpha: case.meta_f64("alpha"),
            ..LsslConfig::default()
        };
        let layer = Lssl::new(&config, h, &store.root()).unwrap();
        near(case, "kernel", &layer.kernel(length).unwrap());
        let u = t(case, "u");
        near(case, "ssm_out", &layer.convolution(&u).unwrap());
        near(case, "y", &layer.forward(&u, None).unwrap().0);
        let batch = u.dim(0).unwrap();
        let (y, last) = layer.recurrence(&u, &zeros(&[batch, h, n])).unwrap();
        near(case, "ssm_out", &y);
        near(case, "state_final", &last);
        let (y, last) = layer.recurrence(&u, &t(case, "state0")).unwrap();
        near(case, "ssm_out_from_state0", &y);
        near(case, "state_final_from_state0", &last);
        // Kept matrices (nothing trained) give the same.
        let frozen = LsslConfig {
            learn: 0,
            ..config.clone()
        };
        let frozen = Lssl::new(&frozen, h, &store.root()).unwrap();
        for length in [length, 5] {
            let difference = frozen.kernel(length).unwrap() - layer.kernel(length).unwrap();
            assert!(largest(&difference.unwrap()) < 1e-12);
        }
        assert_eq!(
            store
                .list()
                .iter()
                .filter(|(name, _)| name.starts_with("transition"))
                .count(),
            7,
            "the transition has seven vectors"
        );
    }
}

/// One feature with this system and C, as LSSL.
fn one_feature(s: &Structured, c: &Tensor, dt: f64, alpha: f64) -> (Lssl, ParamStore) {
    let mut tensors: HashMap<String, Tensor> = [
        ("transition.dl", &s.dl),
        ("transition.d", &s.d),
        ("transition.du", &s.du),
        ("transition.pl", &s.pl),
        ("transition.pr", &s.pr),
        ("transition.c", &s.c),
        ("transition.b", &s.b),
    ]
    .into_iter()
    .map(|(name, t)| (name.to_string(), t.clone()))
    .collect();
    tensors.insert(
        "log_dt".into(),
        Tensor::new(&[dt.ln()], &Device::Cpu).unwrap(),
    );
    tensors.insert("C".into(), c.clone());
    tensors.insert("D".into(), zeros(&[1, 1]));
    let store = ParamStore::from_tensors(tensors, DType::F64, &Device::Cpu);
    let config = LsslConfig {
        order: c.dim(2).unwrap(),
        alpha,
        projection: false,
        ..LsslConfig::default()
    };
    let layer = Lssl::new(&config, 1, &store.root()).unwrap();
    (layer, store)
}

#[test]
fn lssl_is_the_gate_of_a_recurrent_net_and_approaches_the_ode() {
    // Backward Euler on x' = -x + u with dt = e^z: x_t = (1 - s) x_{t-1} + s u_t, s = sigmoid(z).
    let one = |v: f64| Tensor::new(&[[v]], &Device::Cpu).unwrap();
    let decay = Structured {
        dl: one(0.0),
        d: one(1.0),
        du: one(0.0),
        pl: one(1.0),
        pr: one(1.0),
        c: one(0.0),
        b: one(1.0),
    };
    let c = Tensor::ones((1, 1, 1), DType::F64, &Device::Cpu).unwrap();
    for z in [-2.0f64, 0.3, 1.7] {
        let (layer, _) = one_feature(&decay, &c, z.exp(), 1.0);
        let u = wave(&[1, 12, 1], 3);
        let y = layer.forward(&u, None).unwrap().0.flatten_all().unwrap();
        let gate = 1.0 / (1.0 + (-z).exp());
        let mut x = 0.0;
        let inputs = u.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        for (u, y) in inputs.iter().zip(y.to_vec1::<f64>().unwrap()) {
            x = (1.0 - gate) * x + gate * u;
            assert!((x - y).abs() < 1e-12, "{x} {y}");
        }
    }
    // A smooth input through LegS: halving the step quarters the bilinear rule's error and halves Euler's.
    let n = 4;
    let legs = at_start(Measure::Legs, n);
    let c = wave(&[1, 1, n], 5);
    let weights = c.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let (a, b) = hippo::legs(n);
    let input = |time: f64| (1.3 * time).sin() + 0.5 * (2.9 * time).sin();
    // Runge and Kutta with a tiny step, to time 1.
    let slope = |x: &[f64], time: f64| -> Vec<f64> {
        let row = |i: usize| (0..n).map(|j| a[i][j] * x[j]).sum::<f64>() + b[i] * input(time);
        (0..n).map(row).collect()
    };
    let step = 1e-3;
    let mut x = vec![0.0; n];
    for k in 0..1000 {
        let time = k as f64 * step;
        let moved = |by: &[f64], scale: f64| -> Vec<f64> {
            x.iter().zip(by).map(|(x, s)| x + scale * s).collect()
        };
        let k1 = slope(&x, time);
        let k2 = slope(&moved(&k1, step / 2.0), time + step / 2.0);
        let k3 = slope(&moved(&k2, step / 2.0), time + step / 2.0);
        let k4 = slope(&moved(&k3, step), time + step);
        for i in 0..n {
            x[i] += step / 6.0 * (k1[i] + 2.0 * k2[i] + 2.0 * k3[i] + k4[i]);
        }
    }
    let exact: f64 = x.iter().zip(&weights).map(|(x, c)| x * c).sum();
    let error = |steps: usize, alpha: f64| {
        let dt = 1.0 / steps as f64;
        let (layer, _) = one_feature(&legs, &c, dt, alpha);
        // The value in the middle of each step stands for it, at its end for backward Euler.
        let shift = if alpha == 0.5 { 0.5 } else { 1.0 };
        let u: Vec<f64> = (0..steps).map(|k| input((k as f64 + shift) * dt)).collect();
        let u = Tensor::from_vec(u, (1, steps, 1), &Device::Cpu).unwrap();
        let y = layer.forward(&u, None).unwrap().0.flatten_all().unwrap();
        (y.to_vec1::<f64>().unwrap()[steps - 1] - exact).abs()
    };
    let (coarse, fine) = (error(64, 0.5), error(128, 0.5));
    assert!(
        (3.0..5.0).contains(&(coarse / fine)),
        "bilinear {coarse} {fine}"
    );
    let (coarse, fine) = (error(256, 1.0), error(512, 1.0));
    assert!(
        (1.6..2.4).contains(&(coarse / fine)),
        "backward Euler {coarse} {fine}"
    );
}

#[test]
fn lssl_serves_another_rate_when_its_step_is_scaled() {
    let (layer, store) = one_feature(
        &at_start(Measure::Legs, 8),
        &wave(&[1, 1, 8], 2),
        0.002,
        0.5,
    );
    let config = LsslConfig {
        order: 8,
        projection: false,
        rate: 2.0,
        ..LsslConfig::default()
    };
    let coarse = Lssl::new(&config, 1, &store.root()).unwrap();
    // A slow wave, sampled finely and half as finely.
    let sampled = |steps: usize| {
        let u: Vec<f64> = (0..steps)
            .map(|k| (6.0 * (k as f64 + 0.5) / steps as f64).sin())
            .collect();
        Tensor::from_vec(u, (1, steps, 1), &Device::Cpu).unwrap()
    };
    let last = |layer: &Lssl, steps: usize| {
        let y = layer.forward(&sampled(steps), None).unwrap().0;
        y.flatten_all().unwrap().to_vec1::<f64>().unwrap()[steps - 1]
    };
    let (fine, scaled, kept) = (last(&layer, 512), last(&coarse, 256), last(&layer, 256));
    assert!(
        (fine - scaled).abs() < 0.01 * fine.abs().max(1.0),
        "{fine} {scaled}"
    );
    assert!(
        (fine - kept).abs() > 5.0 * (fine - scaled).abs(),
        "{fine} {scaled} {kept}"
    );
}

// LongVQ

#[test]
fn vq_assignment_and_codebook_update() {
    for case in &golden::cases_of("longvq", "vq") {
        let (keys, s, d) = (t(case, "keys"), case.meta_usize("S"), case.meta_usize("dk"));
        let (c_sum, c_count) = (t(case, "c_sum"), t(case, "c_count"));
        let codes_now = codebook(&c_sum, &c_count).unwrap();
        near(case, "codebook", &codes_now);
        let codes = vq_assign(&keys, &codes_now).unwrap();
        let expected: Vec<u32> = case.i64("codes").iter().map(|&c| c as u32).collect();
        assert_eq!(codes, expected);
        let rows = Tensor::new(codes.clone(), &Device::Cpu).unwrap();
        let snapped = codes_now.index_select(&rows, 0).unwrap();
        near(case, "quantised", &snapped);
        let flat = keys.reshape((codes.len(), d)).unwrap();
        let gap = (&flat - &snapped).unwrap().sqr().unwrap().sum(1).unwrap();
        near(case, "sq_error", &gap);
        near(case, "commit_loss", &gap.mean_all().unwrap());
        let values = flat.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let (sums, counts) = assigned(&values, &codes, d, s);
        let decay = case.meta_f64("gamma");
        let (new_sum, new_count) = updated(&c_sum, &c_count, &sums, &counts, decay).unwrap();
        near(case, "c_sum_new", &new_sum);
        near(case, "c_count_new", &new_count);
        near(
            case,
            "codebook_new",
            &codebook(&new_sum, &new_count).unwrap(),
        );
    }
}

#[test]
fn vq_attention_linear_and_dense() {
    for case in &golden::cases_of("longvq", "vq_attention") {
        let codes: Vec<u32> = case.i64("codes").iter().map(|&c| c as u32).collect();
        let (q, book) = (t(case, "q"), t(case, "codebook"));
        let rows = Tensor::new(codes.clone(), &Device::Cpu).unwrap();
        let k = book
            .index_select(&rows, 0)
            .unwrap()
            .reshape(q.shape())
            .unwrap();
        let (v, bias) = (t(case, "v"), t(case, "rel_bias"));
        for (name, causal) in [("y_causal", true), ("y_bidirectional", false)] {
            let attention = VqAttention {
                q: &q,
                codes: &codes,
                k: &k,
                codebook: &book,
                v: &v,
                bias: &bias,
                block: case.meta_usize("block"),
                causal,
                far: true,
            };
            near(case, name, &attention.run().unwrap());
            near(case, name, &attention.dense().unwrap());
        }
    }
}

fn longvq_block(case: &Case) -> (LongVq, ParamStore) {
    let (d, s) = (case.meta_usize("D"), case.meta_usize("S"));
    let unit = |name: &str| t(case, name).unsqueeze(2).unwrap();
    let store = given([
        ("ema.delta", unit("ema.delta")),
        ("ema.alpha", unit("ema.alpha")),
        ("ema.beta", unit("ema.beta")),
        ("ema.gamma", t(case, "ema.gamma")),
        ("ema.omega", t(case, "ema.omega")),
        ("v_proj.weight", t(case, "W_v")),
        ("v_proj.bias", t(case, "b_v")),
        ("base_proj.weight", t(case, "W_base")),
        ("base_proj.bias", t(case, "b_base")),
        ("h_proj.weight", t(case, "W_h")),
        ("h_proj.bias", t(case, "b_h")),
        ("qk_gain", t(case, "qk_gain")),
        ("qk_bias", t(case, "qk_bias")),
        ("rel_bias", t(case, "rel_bias")),
        ("c_sum", t(case, "codebook")),
        (
            "c_count",
            Tensor::ones(s, DType::F64, &Device::Cpu).unwrap(),
        ),
    ]);
    let config = LongVqConfig {
        value_dim: Some(case.meta_usize("E")),
        key_dim: case.meta_usize("dk"),
        codes: s,
        block: case.meta_usize("block"),
        ema_order: case.meta_usize("ema_ndim"),
        causal: case.meta("causal").as_bool().unwrap(),
        ..LongVqConfig::default()
    };
    (LongVq::new(&config, d, &store.root()).unwrap(), store)
}

#[test]
fn longvq_block_parallel_and_step_by_step() {
    for case in &golden::cases_of("longvq", "block_causal") {
        let (layer, _store) = longvq_block(case);
        let x = t(case, "x");
        let (y, attended) = layer.block(&x).unwrap();
        near(case, "attn", &attended);
        near(case, "y", &y);
        let (batch, length, _) = x.dims3().unwrap();
        let mut state = layer.init_state(batch).unwrap();
        let steps: Vec<Tensor> = (0..length)
            .map(|i| {
                let token = x.narrow(1, i, 1).unwrap().squeeze(1).unwrap();
                layer.step(&token, &mut state).unwrap()
            })
            .collect();
        near(case, "y", &Tensor::stack(&steps, 1).unwrap());
    }
}

#[test]
fn the_codebook_learns_by_running_means_and_not_by_gradients() {
    let store = ParamStore::new(1, DType::F32, &Device::Cpu);
    let config = LongVqConfig {
        key_dim: 4,
        codes: 6,
        block: 4,
        ema_order: 2,
        ..LongVqConfig::default()
    };
    let layer = LongVq::new(&config, 8, &store.root()).unwrap();
    let x = wave(&[4, 32, 8], 3).to_dtype(DType::F32).unwrap();
    let tracked = candle_core::Var::from_tensor(&x).unwrap();
    let before = layer.code_use(&x).unwrap();
    // Reading without learning leaves no trace.
    layer.forward(&x, None).unwrap();
    layer.after_step().unwrap();
    assert_eq!(layer.code_use(&x).unwrap(), before);
    for _ in 0..200 {
        layer.forward(tracked.as_tensor(), None).unwrap();
        layer.after_step().unwrap();
    }
    let after = layer.code_use(&x).unwrap();
    assert!(
        after.relative_error < 0.8 * before.relative_error && after.perplexity > 3.0,
        "{before:?} {after:?}"
    );
    let y = layer.forward(tracked.as_tensor(), None).unwrap().0;
    let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    for name in ["c_sum", "c_count"] {
        let var = &store.tensors()[name];
        assert!(gradients.get(var).is_none(), "{name}");
    }
}

// Mamba-2's state policies

fn scanned(case: &Case) -> (Vec<Tensor>, Tensor) {
    let inputs = sibling(case, "inputs_file");
    let raw = t(&inputs, "dt_raw")
        .broadcast_add(&t(&inputs, "dt_bias"))
        .unwrap();
    let dt = longspan_kernels::autograd::softplus(&raw).unwrap();
    let x = t(&inputs, "x");
    let heads = inputs.shape("D")[0];
    let d = t(&inputs, "D").reshape((1, 1, heads, 1)).unwrap();
    let skip = x.broadcast_mul(&d).unwrap();
    (
        vec![x, dt, t(&inputs, "A"), t(&inputs, "B"), t(&inputs, "C")],
        skip,
    )
}

fn scan(x: &[Tensor]) -> Scan<'_> {
    Scan {
        x: &x[0],
        dt: &x[1],
        a: &x[2],
        b: &x[3],
        c: &x[4],
        state: None,
    }
}

#[test]
fn a_window_by_difference_of_states_and_a_clipped_norm() {
    for case in &golden::cases_of("stuffed-mamba", "window_state_difference") {
        let (x, skip) = scanned(case);
        let r = case.meta_usize("window");
        let s = scan(&x);
        let start = RepairState::new(&s, r).unwrap();
        let (y, end) = repaired(&s, Repair::Window(r), &start, 0).unwrap();
        near(case, "y_window_f64", &(y + skip).unwrap());
        near(case, "state_last_f64", &window_state(&end, &x[2]).unwrap());
    }
    for case in &golden::cases_of("stuffed-mamba", "state_norm_clip") {
        let (x, skip) = scanned(case);
        let p = case.meta_f64("threshold_p");
        let s = scan(&x);
        let start = RepairState::new(&s, 0).unwrap();
        let (y, end) = repaired(&s, Repair::NormClip(p), &start, 0).unwrap();
        near(case, "y_f64", &(y + skip).unwrap());
        near(case, "state_last_f64", &end.main);
    }
}

#[test]
fn a_policy_without_effect_changes_nothing_and_a_window_is_its_tokens_alone() {
    let store = ParamStore::new(3, DType::F64, &Device::Cpu);
    let config = |policy: StatePolicy| Mamba2Config {
        head_dim: 4,
        state_size: 3,
        state_policy: policy,
        ..Mamba2Config::default()
    };
    let build = |policy| Mamba2::new(&config(policy), 8, &store.root()).unwrap();
    let x = wave(&[2, 30, 8], 4);
    let plain = build(StatePolicy::None).forward(&x, None).unwrap().0;
    for policy in [
        StatePolicy::Scale {
            forget: 1.0,
            write: 1.0,
        },
        StatePolicy::NormClip { p: f64::INFINITY },
        StatePolicy::Window { r: 30 },
    ] {
        let y = build(policy).forward(&x, None).unwrap().0;
        assert!(largest(&(y - &plain).unwrap()) < 1e-12, "{policy:?}");
    }
    let scaled = StatePolicy::Scale {
        forget: 1.2,
        write: 0.9,
    };
    let changed = build(scaled).forward(&x, None).unwrap().0;
    assert!(largest(&(changed - &plain).unwrap()) > 1e-6);
    // The window's output is that of a scan from zero with the convolution's past: read the three tokens before it too.
    let r = 6;
    let windowed = build(StatePolicy::Window { r });
    let y = windowed.forward(&x, None).unwrap().0;
    let mixer = build(StatePolicy::None);
    for last in [10, 29] {
        let from = last + 1 - r;
        let start = mixer.init_state(2).unwrap();
        let context = x.narrow(1, from - 4, 4).unwrap();
        let (_, state) = mixer.forward(&context, Some(&start)).unwrap();
        let mut state = state.unwrap();
        let zero = state.tensors["ssm"].zeros_like().unwrap();
        state.tensors.insert("ssm".into(), zero);
        let own = x.narrow(1, from, r).unwrap();
        let (expected, _) = mixer.forward(&own, Some(&state)).unwrap();
        let a = y.narrow(1, last, 1).unwrap();
        let b = expected.narrow(1, r - 1, 1).unwrap();
        assert!(largest(&(a - b).unwrap()) < 1e-12, "token {last}");
    }
    assert!(Mamba2::new(&config(StatePolicy::Window { r: 0 }), 8, &store.root()).is_err());
}
