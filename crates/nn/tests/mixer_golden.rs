//! Mixers and their parts against reference implementations: S4 (official code), Mamba-2 (transformers), RNNs (PyTorch),
//! attention under the position schemes of NoPE's code.

#[path = "../../../tests/golden.rs"]
mod golden;

use candle_core::{DType, Device, Result, Tensor};
use golden::Case;
use longspan_kernels::s4::{Discretisation, diagonal_kernel, dplr_kernel};
use longspan_kernels::ssd::Scan;
use longspan_kernels::vandermonde::{cauchy, vandermonde};
use longspan_nn::mixer::{
    AttentionConfig, AttentionMixer, DtTransform, Mamba2, Mamba2Config, MixerConfig, Position, Rnn,
    RnnCell, RnnConfig, S4, S4Config, S4Init, S4Mode, SequenceMixer, hippo, masked, t5_bucket,
};
use longspan_nn::model::{LanguageModel, StackConfig, StackLm};
use longspan_nn::params::ParamStore;
use std::collections::HashMap;

fn tensor(case: &Case, name: &str, dtype: DType) -> Tensor {
    let tensor = Tensor::from_vec(case.f64(name), case.shape(name), &Device::Cpu).unwrap();
    tensor.to_dtype(dtype).unwrap()
}

fn f32s(case: &Case, name: &str) -> Tensor {
    tensor(case, name, DType::F32)
}

/// Parameters `param.*` of a case.
fn store(case: &Case) -> ParamStore {
    let tensors = case
        .tensors
        .keys()
        .filter_map(|name| Some((name.strip_prefix("param.")?.to_string(), f32s(case, name))));
    ParamStore::from_tensors(tensors.collect(), DType::F32, &Device::Cpu)
}

/// The allowed error of a tensor relative to its largest magnitude: the most specific pattern of `rel_max_tol`.
fn rel_max_tol(case: &Case, name: &str) -> f64 {
    let fits = |pattern: &str| match pattern.split_once('*') {
        None => pattern == name,
        Some((start, end)) => name.starts_with(start) && name.ends_with(end),
    };
    let rules = case.meta("rel_max_tol").as_object().unwrap();
    let best = rules.iter().filter(|(pattern, _)| fits(pattern));
    let best = best.max_by_key(|(pattern, _)| (!pattern.contains('*'), pattern.len()));
    best.unwrap_or_else(|| panic!("{:?}: no tolerance for {name}", case.path))
        .1
        .as_f64()
        .unwrap()
}

/// `at_least`: what arithmetic in another type than the tensor's is allowed.
fn assert_near(case: &Case, name: &str, found: &Tensor, at_least: f64) {
    let largest = case.f64(name).iter().fold(0f64, |m, v| m.max(v.abs()));
    let allowed = rel_max_tol(case, name).max(at_least) * largest;
    let found = found.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    case.assert_within(name, &found.to_vec1::<f64>().unwrap(), |_, _| allowed);
}

/// Gradients of Σ y g for `x` and all parameters.
fn assert_gradients(
    case: &Case,
    store: &ParamStore,
    x: &candle_core::Var,
    x_name: &str,
    y: &Tensor,
) {
    let loss = (y * f32s(case, "g")).unwrap().sum_all().unwrap();
    let gradients = loss.backward().unwrap();
    assert_near(case, x_name, gradients.get(x.as_tensor()).unwrap(), 0.0);
    let mut compared = 0;
    for (name, param) in store.list() {
        let golden = format!("grad.{name}");
        if case.has(&golden) {
            let gradient = gradients.get(param.var.as_tensor()).expect(&name);
            assert_near(case, &golden, gradient, 0.0);
            compared += 1;
        }
    }
    let stated = case
        .tensors
        .keys()
        .filter(|name| name.starts_with("grad."))
        .count();
    assert_eq!(compared, stated, "{:?}", case.path);
}

#[test]
fn hippo_matrices_and_their_normal_form() {
    for case in &golden::cases_of("s4", "hippo_legs") {
        let n = case.meta_usize("N");
        let (a, b) = hippo::legs(n);
        let real = |v: Vec<f64>, shape: &[usize]| Tensor::from_vec(v, shape, &Device::Cpu).unwrap();
        assert_near(case, "A", &real(a.concat(), &[n, n]), 0.0);
        assert_near(case, "B", &real(b, &[n]), 0.0);
        let form = hippo::nplr_legs(n, 1);
        let half = n / 2;
        let pairs = |v: &[rustfft::num_complex::Complex64]| {
            real(v.iter().flat_map(|z| [z.re, z.im]).collect(), &[half, 2])
        };
        assert_near(case, "lambda", &pairs(&form.lambda), 0.0);
        let size = |v: &[rustfft::num_complex::Complex64]| {
            real(v.iter().map(|z| z.norm()).collect(), &[half])
        };
        assert_near(case, "B_abs", &size(&form.b), 0.0);
        assert_near(case, "P_abs", &size(&form.p[0]), 0.0);
        let products: Vec<_> = form
            .b
            .iter()
            .zip(&form.p[0])
            .map(|(b, p)| b * p.conj())
            .collect();
        assert_near(case, "B_conjP", &pairs(&products), 0.0);
    }
    for case in &golden::cases_of("s4", "inits") {
        let n = case.meta_usize("N");
        let real = |v: Vec<f64>, shape: &[usize]| Tensor::from_vec(v, shape, &Device::Cpu).unwrap();
        for (name, (a, b)) in [("fourier", hippo::fourier(n)), ("legt", hippo::legt(n))] {
            assert_near(
                case,
                &format!("A_{name}_dense"),
                &real(a.concat(), &[n, n]),
                0.0,
            );
            assert_near(case, &format!("B_{name}_dense"), &real(b, &[n]), 0.0);
        }
        for (name, init) in [
            ("lin", S4Init::Lin),
            ("inv", S4Init::Inv),
            ("quad", S4Init::Quad),
            ("real", S4Init::Real),
            ("legs", S4Init::Legs),
        ] {
            let config = S4Config {
                d_state: n,
                mode: S4Mode::Diag,
                init,
                n_ssm: case.meta_usize("copies"),
                ..S4Config::default()
            };
            let store = ParamStore::new(0, DType::F64, &Device::Cpu);
            S4::new(&config, case.meta_usize("copies"), &store.root()).unwrap();
            let tensors = store.tensors();
            let re = tensors["layer.kernel.A_real"].exp().unwrap().neg().unwrap();
            let im = tensors["layer.kernel.A_imag"].neg().unwrap();
            let a = Tensor::stack(&[re, im], 2).unwrap();
            // Parameters keep both parts at least 1e-4 from zero.
            let golden = case.f64(&format!("A_{name}"));
            let found = a.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let largest = golden.iter().fold(0f64, |m, v| m.max(v.abs()));
            for (found, golden) in found.iter().zip(golden) {
                assert!(
                    (found - golden).abs() <= 1.01e-4 + 1e-6 * largest,
                    "{name}: {found} {golden}"
                );
            }
        }
    }
}

#[test]
fn cauchy_and_vandermonde_products() {
    for case in &golden::cases_of("s4", "cauchy") {
        let (v, z, w) = (f32s(case, "v"), f32s(case, "z"), f32s(case, "w"));
        assert_near(case, "out_conj_pairs", &cauchy(&v, &z, &w).unwrap(), 0.0);
        let length = case.shape("vandermonde_out")[1];
        let out = vandermonde(&v, &f32s(case, "vandermonde_x"), length).unwrap();
        assert_near(case, "vandermonde_out", &out, 0.0);
    }
}

#[test]
fn s4_kernels() {
    for case in &golden::cases_of("s4", "dplr_kernel") {
        let (l, h) = (case.meta_usize("l_kernel"), case.meta_usize("H"));
        let dt = f32s(case, "dt").reshape(h).unwrap();
        let b = f32s(case, "B").squeeze(0).unwrap();
        let kernel = |length: usize| {
            let (a, p, c) = (f32s(case, "A"), f32s(case, "P"), f32s(case, "C_tilde"));
            dplr_kernel(&dt, &a, &b, &p, &c, l, length).unwrap()
        };
        assert_near(case, "K", &kernel(l), 0.0);
        if case.has("K_half") {
            assert_near(case, "K_half", &kernel(l / 2), 0.0);
        }
    }
    for case in &golden::cases_of("s4", "s4d_kernel") {
        let (l, h) = (case.meta_usize("L"), case.meta_usize("H"));
        let method = match case.meta_str("disc") {
            "zoh" => Discretisation::Zoh,
            "bilinear" => Discretisation::Bilinear,
            "dss" => Discretisation::Dss(case.meta_f64("reciprocal_eps")),
            other => panic!("{other}"),
        };
        let dt = f32s(case, "dt").reshape(h).unwrap();
        let b = f32s(case, "B").squeeze(0).unwrap();
        let (a, c) = (f32s(case, "A"), f32s(case, "C"));
        assert_near(
            case,
            "K",
            &diagonal_kernel(&dt, &a, &b, &c, l, method).unwrap(),
            0.0,
        );
    }
}

#[test]
fn s4_layers_with_all_gradients() {
    for case in &golden::cases_of("s4", "block") {
        let diagonal = case.meta_str("mode") == "s4d";
        let config = S4Config {
            d_state: case.meta_usize("N"),
            bidirectional: case.meta("bidirectional").as_bool().unwrap(),
            mode: if diagonal { S4Mode::Diag } else { S4Mode::Dplr },
            init: if diagonal { S4Init::Lin } else { S4Init::Legs },
            n_ssm: case.meta_usize("n_ssm"),
            dt_transform: DtTransform::Softplus,
            l_max: case.meta_usize("L"),
            ..S4Config::default()
        };
        let store = store(case);
        let h = case.meta_usize("H");
        let layer = S4::new(&config, h, &store.root()).unwrap();
        let x = candle_core::Var::from_tensor(&f32s(case, "x")).unwrap();
        let (y, _) = layer.forward(x.as_tensor(), None).unwrap();
        assert_near(case, "y", &y, 0.0);
        assert_gradients(case, &store, &x, "grad_x", &y);
        if case.meta("step_mode").as_bool().unwrap() {
            let mut state = layer.init_state(case.meta_usize("B")).unwrap();
            let steps: Result<Vec<Tensor>> = (0..case.meta_usize("L"))
                .map(|t| layer.step(&f32s(case, "x").narrow(1, t, 1)?.squeeze(1)?, &mut state))
                .collect();
            assert_near(
                case,
                "y_step",
                &Tensor::stack(&steps.unwrap(), 1).unwrap(),
                2e-5,
            );
        }
    }
}

#[test]
fn recurrent_nets_of_pytorch() {
    let cases = golden::cases_of("rnn-review", "rnn");
    let mut run = 0;
    for case in cases
        .iter()
        .filter(|case| case.meta_usize("proj_size") == 0)
    {
        let cell = match (case.meta_str("cell"), case.meta("nonlinearity").as_str()) {
            ("lstm", _) => RnnCell::Lstm,
            ("gru", _) => RnnCell::Gru,
            (_, Some("relu")) => RnnCell::Relu,
            _ => RnnCell::Tanh,
        };
        let config = RnnConfig {
            cell,
            hidden_size: Some(case.meta_usize("hidden_size")),
            layers: case.meta_usize("layers"),
            bidirectional: case.meta("bidirectional").as_bool().unwrap(),
        };
        let inputs = case.meta_usize("input_size");
        let tensors: HashMap<String, Tensor> = store_tensors(case, &config, inputs);
        let store = ParamStore::from_tensors(tensors, DType::F32, &Device::Cpu);
        let net = Rnn::new(&config, inputs, &store.root()).unwrap();
        let nets = config.layers * if config.bidirectional { 2 } else { 1 };
        let states = if cell == RnnCell::Lstm { 2 } else { 1 };
        let hidden = case.meta_usize("hidden_size");
        let batch = case.shape("x")[0];
        let start: Vec<Tensor> = (0..nets)
            .map(|net| {
                if !case.has("h0") {
                    return Tensor::zeros((batch, states * hidden), DType::F32, &Device::Cpu)
                        .unwrap();
                }
                let part = |name: &str| {
                    f32s(case, name)
                        .narrow(0, net, 1)
                        .unwrap()
                        .squeeze(0)
                        .unwrap()
                };
                if states == 2 {
                    Tensor::cat(&[part("h0"), part("c0")], 1).unwrap()
                } else {
                    part("h0")
                }
            })
            .collect();
        if case.meta("packed").as_bool().unwrap() {
            packed_rows(case, &net, &start, states, hidden);
        } else {
            let x = candle_core::Var::from_tensor(&f32s(case, "x")).unwrap();
            let (y, last) = net.run(x.as_tensor(), &start).unwrap();
            assert_near(case, "y", &y, 0.0);
            let last = Tensor::stack(&last, 0).unwrap();
            assert_near(case, "hn", &last.narrow(2, 0, hidden).unwrap(), 0.0);
            if states == 2 {
                assert_near(case, "cn", &last.narrow(2, hidden, hidden).unwrap(), 0.0);
            }
            assert_gradients(case, &store, &x, "grad_x", &y);
        }
        run += 1;
    }
    assert!(run >= 7, "{run} cases");
}

fn store_tensors(case: &Case, config: &RnnConfig, inputs: usize) -> HashMap<String, Tensor> {
    let mut tensors: HashMap<String, Tensor> = case
        .tensors
        .keys()
        .filter_map(|name| Some((name.strip_prefix("param.")?.to_string(), f32s(case, name))))
        .collect();
    // A mixer keeps the model's width; the golden's net does not, and is asked without its projection.
    let width = config.hidden_size.unwrap() * if config.bidirectional { 2 } else { 1 };
    let zero = Tensor::zeros((inputs, width), DType::F32, &Device::Cpu).unwrap();
    tensors.insert("out_proj.weight".into(), zero);
    tensors
}

/// Sequences of different lengths: each row on its own, outputs beyond its end 0.
fn packed_rows(case: &Case, net: &Rnn, start: &[Tensor], states: usize, hidden: usize) {
    let (x, steps) = (f32s(case, "x"), case.shape("x")[1]);
    let (mut outputs, mut last) = (Vec::new(), Vec::new());
    for (row, &length) in case.i64("lengths").iter().enumerate() {
        let length = length as usize;
        let x = x.narrow(0, row, 1).unwrap().narrow(1, 0, length).unwrap();
        let start: Vec<Tensor> = start.iter().map(|s| s.narrow(0, row, 1).unwrap()).collect();
        let (y, ends) = net.run(&x, &start).unwrap();
        outputs.push(y.pad_with_zeros(1, 0, steps - length).unwrap());
        last.push(Tensor::stack(&ends, 0).unwrap());
    }
    assert_near(case, "y", &Tensor::cat(&outputs, 0).unwrap(), 0.0);
    let last = Tensor::cat(&last, 1).unwrap();
    assert_near(case, "hn", &last.narrow(2, 0, hidden).unwrap(), 0.0);
    if states == 2 {
        assert_near(case, "cn", &last.narrow(2, hidden, hidden).unwrap(), 0.0);
    }
}

fn mamba_config(case: &Case) -> Mamba2Config {
    Mamba2Config {
        num_heads: Some(case.meta_usize("num_heads")),
        head_dim: case.meta_usize("head_dim"),
        expand: case.meta_usize("expand"),
        state_size: case.meta_usize("state_size"),
        n_groups: case.meta_usize("n_groups"),
        conv_kernel: case.meta_usize("conv_kernel"),
        chunk_size: case.meta_usize("chunk_size"),
        // JSON has no infinity.
        time_step_limit: (
            case.meta("time_step_limit")[0].as_f64().unwrap(),
            case.meta("time_step_limit")[1]
                .as_f64()
                .unwrap_or(f64::INFINITY),
        ),
        use_bias: case.meta("use_bias").as_bool().unwrap(),
        use_conv_bias: case.meta("use_conv_bias").as_bool().unwrap(),
        layer_norm_epsilon: case.meta_f64("layer_norm_epsilon"),
        ..Mamba2Config::default()
    }
}

#[test]
fn mamba2_scans() {
    for case in &golden::cases_of("stuffed-mamba", "ssd_scan") {
        for (dtype, names) in [
            (DType::F32, ["y_with_state0", "final_with_state0"]),
            (DType::F64, ["y_recurrent_f64", "final_recurrent_f64"]),
        ] {
            let t = |name: &str| tensor(case, name, dtype);
            let raw = t("dt_raw").broadcast_add(&t("dt_bias")).unwrap();
            let dt = longspan_kernels::autograd::softplus(&raw).unwrap();
            let (x, a, b, c, start) = (t("x"), t("A"), t("B"), t("C"), t("state0"));
            let heads = case.shape("D")[0];
            let skip = x
                .broadcast_mul(&t("D").reshape((1, 1, heads, 1)).unwrap())
                .unwrap();
            for chunk in [1, 3, 8, 64] {
                let run = |state| {
                    let scan = Scan {
                        x: &x,
                        dt: &dt,
                        a: &a,
                        b: &b,
                        c: &c,
                        state,
                    };
                    let (y, last) = scan.chunked(chunk).unwrap();
                    ((y + &skip).unwrap(), last)
                };
                let (y, last) = run(Some(&start));
                assert_near(case, names[0], &y, 0.0);
                assert_near(case, names[1], &last, 0.0);
                if dtype == DType::F32 {
                    let (y, last) = run(None);
                    assert_near(case, "y_zero_state", &y, 0.0);
                    assert_near(case, "final_zero_state", &last, 0.0);
                }
            }
        }
    }
}

#[test]
fn mamba2_mixer_with_all_gradients_and_padding() {
    for case in &golden::cases_of("stuffed-mamba", "mixer") {
        let store = store(case);
        let mixer = Mamba2::new(
            &mamba_config(case),
            case.meta_usize("hidden_size"),
            &store.root(),
        )
        .unwrap();
        let u = candle_core::Var::from_tensor(&f32s(case, "u")).unwrap();
        let (y, _) = mixer.forward(u.as_tensor(), None).unwrap();
        assert_near(case, "y", &y, 0.0);
        assert_gradients(case, &store, &u, "grad_u", &y);
        let length = case.shape("mask")[1];
        let keep: Vec<Vec<bool>> = case
            .i64("mask")
            .chunks(length)
            .map(|row| row.iter().map(|&keep| keep != 0).collect())
            .collect();
        let y = masked(&mixer, &f32s(case, "u"), &keep).unwrap();
        assert_near(case, "y_masked", &y, 0.0);
    }
}

#[test]
fn mamba2_language_model_reads_and_steps() {
    for case in &golden::cases_of("stuffed-mamba", "causal_lm") {
        let config = StackConfig {
            d_model: case.meta_usize("hidden_size"),
            layers: case.meta_usize("num_hidden_layers"),
            mixer: MixerConfig::Mamba2(mamba_config(case)),
            mlp_ratio: 0.0,
            norm_epsilon: case.meta_f64("layer_norm_epsilon"),
            norm: true,
            residual: true,
            tie_embeddings: case.meta("tie_word_embeddings").as_bool().unwrap(),
            sinusoid: false,
        };
        let store = store(case);
        let model = StackLm::new(&config, case.meta_usize("vocab_size"), &store.root()).unwrap();
        let (batch, length) = (case.shape("ids")[0], case.shape("ids")[1]);
        let ids: Vec<u32> = case.i64("ids").iter().map(|&id| id as u32).collect();
        let hidden = model.hidden(&ids, &vec![length; batch]).unwrap();
        assert_near(case, "logits", &model.logits(&hidden).unwrap(), 0.0);
        let prefill = case.meta_usize("prefill_len");
        let rows: Vec<&[u32]> = ids.chunks(length).collect();
        let part = |from: usize, to: usize| -> Vec<Vec<u32>> {
            rows.iter().map(|row| row[from..to].to_vec()).collect()
        };
        let mut states = model.stack().init_states(batch).unwrap();
        let first = model.advance(&part(0, prefill), &mut states).unwrap();
        let mut logits = vec![first.narrow(1, prefill - 1, 1).unwrap()];
        for t in prefill..length {
            logits.push(model.advance(&part(t, t + 1), &mut states).unwrap());
        }
        assert_near(
            case,
            "logits_decode",
            &Tensor::cat(&logits, 1).unwrap(),
            0.0,
        );
        for (layer, state) in states.iter().enumerate() {
            assert_near(
                case,
                &format!("ssm_state_{layer}"),
                state.get("ssm").unwrap(),
                0.0,
            );
            assert_near(
                case,
                &format!("conv_state_{layer}"),
                state.get("conv").unwrap(),
                0.0,
            );
            assert_eq!(state.position, length);
        }
    }
}

#[test]
fn attention_under_every_position_scheme() {
    for case in &golden::cases_of("nope", "attention_pe") {
        let (heads, d_kv) = (case.meta_usize("heads"), case.meta_usize("d_kv"));
        let d_model = case.meta_usize("d_model");
        let buckets = case.meta_usize("buckets");
        let schemes = [
            ("none", Position::None),
            ("alibi", Position::Alibi),
            (
                "t5_relative_bias",
                Position::T5Bias {
                    buckets,
                    max_distance: 128,
                },
            ),
            (
                "rotary",
                Position::Rotary {
                    fraction: case.meta_f64("rotary_dim") / d_kv as f64,
                    base: 10_000.0,
                },
            ),
        ];
        for (name, position) in schemes {
            let given = [
                ("q_proj.weight", "w_q"),
                ("k_proj.weight", "w_k"),
                ("v_proj.weight", "w_v"),
                ("o_proj.weight", "w_o"),
                (
                    "relative_attention_bias.weight",
                    "t5.relative_attention_bias",
                ),
            ];
            let tensors = given.map(|(ours, golden)| (ours.to_string(), f32s(case, golden)));
            let store = ParamStore::from_tensors(tensors.into(), DType::F32, &Device::Cpu);
            let config = AttentionConfig {
                heads,
                head_dim: Some(d_kv),
                position,
                scaled: false,
            };
            let mixer =
                AttentionMixer::new(&config, d_model, &store.root(), &store.root()).unwrap();
            let (y, _) = mixer.forward(&f32s(case, "hidden"), None).unwrap();
            let y = y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            case.assert_within(&format!("{name}.out"), &y, |_, _| 1e-5);
        }
        for (distance, &bucket) in case.i64("t5.buckets32_128").iter().enumerate() {
            assert_eq!(
                t5_bucket(distance, 32, 128),
                bucket as usize,
                "distance {distance}"
            );
        }
    }
}
