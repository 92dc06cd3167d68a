//! Members of the state-space family against reference results, and against each other where one is a case of the other.

mod family;

use candle_core::{DType, Device, Tensor};
use family::{given, golden, largest, near, t, tensor, wave, zeros};
use longspan_kernels::ssd::Scan;
use longspan_nn::config::StackFile;
use longspan_nn::mixer::liquid::{liquid_exact, liquid_products};
use longspan_nn::mixer::*;
use longspan_nn::model::{LanguageModel, StackLm};
use longspan_nn::params::ParamStore;

fn part(z: &Tensor, which: usize) -> Tensor {
    let last = z.rank() - 1;
    z.narrow(last, which, 1).unwrap().squeeze(last).unwrap()
}

fn layer_norm(x: &Tensor) -> Tensor {
    let x = x.broadcast_sub(&x.mean_keepdim(2).unwrap()).unwrap();
    let scale = (x.sqr().unwrap().mean_keepdim(2).unwrap() + 1e-5).unwrap();
    x.broadcast_div(&scale.sqrt().unwrap()).unwrap()
}

#[test]
fn dss() {
    for case in &golden::cases_of("mamba-360", "dss") {
        let dt = t(case, "log_dt").exp().unwrap();
        let dt = Tensor::stack(&[&dt, &dt], 1).unwrap();
        let (lambda, w) = (t(case, "lambda"), t(case, "W"));
        let length = case.meta_usize("L");
        let kernel = |normalised| dss_kernel(&lambda, &dt, &w, normalised, length).unwrap();
        near(case, "K_exp", &kernel(None));
        let eps = case.meta_f64("reciprocal_eps");
        near(case, "K_softmax", &kernel(Some((length, eps))));
        let start: Vec<f64> = dss_start(case.meta_usize("N"))
            .into_iter()
            .flat_map(|(re, im)| [re, im])
            .collect();
        near(
            case,
            "lambda",
            &Tensor::from_vec(start, lambda.shape(), &Device::Cpu).unwrap(),
        );
        // The layer, with no skip.
        let config = DssConfig {
            n: case.meta_usize("N"),
            glu: false,
            ..DssConfig::default()
        };
        let h = case.meta_usize("H");
        let stored = Tensor::stack(
            &[
                part(&lambda, 0).neg().unwrap().log().unwrap(),
                part(&lambda, 1),
            ],
            1,
        )
        .unwrap();
        let store = given([
            ("Lambda", stored),
            ("log_dt", dt.log().unwrap()),
            ("W", w.clone()),
            ("D", zeros(&[h])),
        ]);
        let layer = Dss::new(&config, h, &store.root()).unwrap();
        let (y, _) = layer.forward(&t(case, "u"), None).unwrap();
        near(case, "y_exp_no_skip", &y);
    }
}

#[test]
fn lru() {
    for case in &golden::cases_of("mamba-360", "lru") {
        let config = LruConfig {
            n: case.meta_usize("N"),
            r_min: case.meta_f64("r_min"),
            r_max: case.meta_f64("r_max"),
            max_phase: case.meta_f64("max_phase"),
            glu: false,
        };
        let draws = case.f64("u_nu").into_iter().zip(case.f64("u_theta"));
        let starts: Vec<_> = draws
            .map(|(nu, theta)| lru_start(&config, nu, theta))
            .collect();
        let row = |pick: fn(&(f64, f64, f64)) -> f64| {
            let values: Vec<f64> = starts.iter().map(pick).collect();
            Tensor::new(values, &Device::Cpu).unwrap()
        };
        near(case, "nu_log", &row(|s| s.0));
        near(case, "theta_log", &row(|s| s.1));
        near(case, "gamma_log", &row(|s| s.2));
        let names = ["nu_log", "theta_log", "gamma_log", "B", "C", "D"];
        let store = given(names.map(|name| (name, t(case, name))));
        let layer = Lru::new(&config, case.meta_usize("D_model"), &store.root()).unwrap();
        let u = t(case, "u");
        let start = zeros(&[u.dim(0).unwrap(), config.n, 2]);
        let (y, last) = layer.system(&u, &start).unwrap();
        near(case, "y", &y);
        near(case, "state_final", &last);
    }
}

#[test]
fn s5() {
    for case in &golden::cases_of("mamba-360", "s5") {
        let p = case.meta_usize("P");
        let store = given([
            ("Lambda", t(case, "lambda")),
            ("log_step", t(case, "delta").log().unwrap()),
            ("B", t(case, "B")),
            ("C", t(case, "C")),
            ("D", t(case, "D")),
        ]);
        let config = S5Config {
            p,
            gate: false,
            ..S5Config::default()
        };
        let layer = S5::new(&config, case.meta_usize("D_model"), &store.root()).unwrap();
        let u = t(case, "u");
        let (y, last) = layer
            .system(&u, &zeros(&[u.dim(0).unwrap(), p, 2]))
            .unwrap();
        near(case, "y", &y);
        near(case, "state_final", &last);
    }
}

#[test]
fn gss() {
    for case in &golden::cases_of("mamba-360", "gss") {
        let store = given([
            ("v_proj.weight", t(case, "W_v")),
            ("v_proj.bias", t(case, "b_v")),
            ("u_proj.weight", t(case, "W_u")),
            ("u_proj.bias", t(case, "b_u")),
            ("y_proj.weight", t(case, "W_y")),
            ("y_proj.bias", t(case, "b_y")),
            ("o_proj.weight", t(case, "W_o")),
            ("o_proj.bias", t(case, "b_o")),
            ("log_neg_re", t(case, "log_neg_re")),
            ("log_im", t(case, "log_im")),
            ("C", t(case, "C")),
            ("D", t(case, "D")),
        ]);
        let config = GssConfig {
            gate_width: Some(case.meta_usize("F")),
            ssm_width: Some(case.meta_usize("H")),
            n: case.meta_usize("N"),
        };
        let x = t(case, "x");
        let layer = Gss::new(&config, x.dim(2).unwrap(), &store.root()).unwrap();
        near(case, "kernel", &layer.kernel(case.meta_usize("L")).unwrap());
        // Norm and residual are the block's.
        let (y, _) = layer.forward(&layer_norm(&x), None).unwrap();
        near(case, "y", &(x + y).unwrap());
    }
}

#[test]
fn h3() {
    for case in &golden::cases_of("mamba-360", "h3") {
        let a = t(case, "A");
        let store = given([
            ("q_proj.weight", t(case, "W_q")),
            ("q_proj.bias", t(case, "b_q")),
            ("k_proj.weight", t(case, "W_k")),
            ("k_proj.bias", t(case, "b_k")),
            ("v_proj.weight", t(case, "W_v")),
            ("v_proj.bias", t(case, "b_v")),
            ("out_proj.weight", t(case, "W_o")),
            ("out_proj.bias", t(case, "b_o")),
            ("shift.C", t(case, "shift_C")),
            ("shift.D", t(case, "shift_D")),
            ("ssm.log_dt", t(case, "dt").log().unwrap()),
            ("ssm.A_real", part(&a, 0).neg().unwrap().log().unwrap()),
            ("ssm.A_imag", part(&a, 1)),
            ("ssm.C", t(case, "C")),
            ("ssm.D", t(case, "D")),
        ]);
        let config = H3Config {
            n_shift: case.meta_usize("n_shift"),
            d_state: 2 * case.meta_usize("N_half"),
            ..H3Config::default()
        };
        let x = t(case, "x");
        let layer = H3::new(&config, x.dim(2).unwrap(), &store.root()).unwrap();
        let length = case.meta_usize("L");
        near(case, "diag_kernel", &layer.kernel(length).unwrap());
        let (y, _) = layer.forward(&x, None).unwrap();
        near(case, "y", &y);
    }
}

#[test]
fn hyena_of_two_orders() {
    let cases = golden::cases_of("mamba-360", "hyena");
    assert!(cases.len() >= 2);
    for case in &cases {
        let short = t(case, "short_w").unsqueeze(1).unwrap();
        let store = given([
            ("in_proj.weight", t(case, "W_in")),
            ("in_proj.bias", t(case, "b_in")),
            ("out_proj.weight", t(case, "W_out")),
            ("out_proj.bias", t(case, "b_out")),
            ("short_filter.weight", short),
            ("short_filter.bias", t(case, "short_b")),
            ("filter_fn.implicit_filter.0.weight", t(case, "W1")),
            ("filter_fn.implicit_filter.0.bias", t(case, "b1")),
            ("filter_fn.implicit_filter.1.weight", t(case, "W2")),
            ("filter_fn.implicit_filter.1.bias", t(case, "b2")),
            ("filter_fn.implicit_filter.2.weight", t(case, "W3")),
            ("filter_fn.implicit_filter.2.bias", t(case, "b3")),
            ("filter_fn.implicit_filter.3.weight", t(case, "W4")),
            ("filter_fn.freq", t(case, "freq")),
            ("filter_fn.deltas", t(case, "deltas")),
            ("filter_fn.bias", t(case, "bias")),
        ]);
        let config = HyenaConfig {
            order: case.meta_usize("order"),
            l_max: case.meta_usize("l_max"),
            emb_dim: case.meta_usize("emb_dim"),
            filter_order: case.meta_usize("filter_order"),
            w: case.meta_f64("w"),
            shift: case.meta_f64("shift"),
            short_kernel: case.meta_usize("short_kernel"),
        };
        let layer = Hyena::new(&config, case.meta_usize("D_model"), &store.root()).unwrap();
        let length = case.meta_usize("L");
        near(case, "filter", &layer.filter(length).unwrap());
        let (y, _) = layer.forward(&t(case, "x"), None).unwrap();
        near(case, "y", &y);
        // The initial decays of the window are the golden's.
        let drawn = ParamStore::new(0, DType::F64, &Device::Cpu);
        Hyena::new(&config, case.meta_usize("D_model"), &drawn.root()).unwrap();
        near(case, "deltas", &drawn.tensors()["filter_fn.deltas"]);
    }
}

#[test]
fn liquid_s4_exact_and_by_products() {
    for case in &golden::cases_of("mamba-360", "liquid_s4") {
        let (u, a, b, c) = (
            t(case, "u"),
            t(case, "A_bar"),
            t(case, "B_bar"),
            t(case, "C"),
        );
        let (batch, length, h) = u.dims3().unwrap();
        let n = case.meta_usize("N_half");
        let (y, last) = liquid_exact(&u, &a, &b, &c, &zeros(&[batch, h, n, 2])).unwrap();
        near(case, "y_exact", &y);
        near(case, "state_final_exact", &last);
        // Linear part: an impulse through the system without its liquid term.
        let degree = case.meta_usize("degree");
        let kernel = t(case, "kernel_linear");
        let linear = longspan_kernels::fftconv::fft_conv(
            &u.transpose(1, 2).unwrap().contiguous().unwrap(),
            &kernel,
            None,
        )
        .unwrap();
        let padded = Tensor::cat(&[&zeros(&[batch, degree - 1, h]), &u], 1).unwrap();
        let products = liquid_products(&padded, &b, &c, degree).unwrap();
        assert_eq!(products.dims(), [batch, length, h]);
        let y = (linear.transpose(1, 2).unwrap() + products).unwrap();
        near(case, "y_pb_degree3", &y);
        let impulse = zeros(&[1, length, h]);
        let one = Tensor::ones((1, 1, h), DType::F64, &Device::Cpu).unwrap();
        let impulse = impulse.slice_assign(&[0..1, 0..1, 0..h], &one).unwrap();
        let scan = longspan_kernels::modal::ModalScan {
            u: &impulse,
            decay: &a,
            input: &b,
            output: &(&c * 2.0).unwrap(),
            state: &zeros(&[1, h, n, 2]),
            liquid: false,
        };
        let response = scan.run().unwrap().0.squeeze(0).unwrap().t().unwrap();
        near(case, "kernel_linear", &response.contiguous().unwrap());
    }
}

#[test]
fn retention_with_any_chunk() {
    for case in &golden::cases_of("mamba-360", "retention") {
        let (q, k, v, gamma) = (t(case, "q"), t(case, "k"), t(case, "v"), t(case, "gamma"));
        for chunk in [1, 3, 64] {
            let (y, last) = retain(&q, &k, &v, &gamma, None, chunk).unwrap();
            near(case, "y", &y);
            // Stored as (d_k, d_v).
            near(
                case,
                "state_final",
                &last.transpose(2, 3).unwrap().contiguous().unwrap(),
            );
        }
    }
}

#[test]
fn moving_averages_one_way_and_both_ways() {
    let cases = golden::cases_of("mamba-360", "mega_ema");
    assert!(cases.len() >= 2);
    for case in &cases {
        let names = ["delta", "alpha", "beta", "gamma", "omega"];
        let tensors = names.map(|name| {
            let t = tensor(case, &format!("param.{name}"), DType::F32);
            (name.to_string(), t)
        });
        let store = ParamStore::from_tensors(tensors.into(), DType::F32, &Device::Cpu);
        let config = EmaConfig {
            ndim: case.meta_usize("ndim"),
            bidirectional: case.meta("bidirectional").as_bool().unwrap(),
        };
        let layer = Ema::new(&config, case.meta_usize("D_model"), &store.root()).unwrap();
        near(case, "kernel", &layer.kernel(case.meta_usize("L")).unwrap());
        let (y, _) = layer.forward(&tensor(case, "x", DType::F32), None).unwrap();
        near(case, "y", &y);
        let q = layer.decays().unwrap().flatten_all().unwrap();
        assert!(
            q.to_vec1::<f32>()
                .unwrap()
                .iter()
                .all(|&q| q > 0.0 && q < 1.0)
        );
    }
}

#[test]
fn mamba_with_all_gradients() {
    for case in &golden::cases_of("mamba-360", "mamba1_mixer") {
        let params = case.tensors.keys().filter_map(|name| {
            let plain = name.strip_prefix("param.")?;
            Some((plain.to_string(), tensor(case, name, DType::F32)))
        });
        let store = ParamStore::from_tensors(params.collect(), DType::F32, &Device::Cpu);
        let config = MambaConfig {
            expand: case.meta_usize("expand"),
            state_size: case.meta_usize("state"),
            conv_kernel: case.meta_usize("conv"),
            time_step_rank: Some(case.meta_usize("dt_rank")),
            ..MambaConfig::default()
        };
        let layer = Mamba::new(&config, case.meta_usize("hidden"), &store.root()).unwrap();
        let x = candle_core::Var::from_tensor(&tensor(case, "x", DType::F32)).unwrap();
        let (y, _) = layer.forward(x.as_tensor(), None).unwrap();
        near(case, "y", &y);
        let g = tensor(case, "g", DType::F32);
        let gradients = (y * g).unwrap().sum_all().unwrap().backward().unwrap();
        near(case, "grad_x", gradients.get(x.as_tensor()).unwrap());
        let list = store.list();
        assert_eq!(
            list.len(),
            case.tensors
                .keys()
                .filter(|n| n.starts_with("grad."))
                .count()
        );
        for (name, param) in list {
            let gradient = gradients.get(param.var.as_tensor()).expect(&name);
            near(case, &format!("grad.{name}"), gradient);
        }
    }
}

#[test]
fn a_hugging_face_mamba_loads_by_its_config_and_names_and_steps() {
    for case in &golden::cases_of("mamba-360", "mamba1_lm") {
        let params = case.tensors.keys().filter_map(|name| {
            let plain = name.strip_prefix("param.")?;
            Some((plain.to_string(), tensor(case, name, DType::F32)))
        });
        let store = ParamStore::from_tensors(params.collect(), DType::F32, &Device::Cpu);
        let text = serde_json::to_string(case.meta("config")).unwrap();
        let file = StackFile::parse(&case.path, &text).unwrap().unwrap();
        let model = StackLm::new(&file.stack, file.vocab_size, &store.root()).unwrap();
        let (batch, length) = (case.shape("ids")[0], case.shape("ids")[1]);
        let ids: Vec<u32> = case.i64("ids").iter().map(|&id| id as u32).collect();
        let hidden = model.hidden(&ids, &vec![length; batch]).unwrap();
        near(case, "logits", &model.logits(&hidden).unwrap());
        // Reading most of it at once, then token by token.
        let rows: Vec<&[u32]> = ids.chunks(length).collect();
        let part = |from: usize, to: usize| -> Vec<Vec<u32>> {
            rows.iter().map(|row| row[from..to].to_vec()).collect()
        };
        let first = case.meta_usize("decode_from");
        let mut states = model.stack().init_states(batch).unwrap();
        let mut logits = vec![model.advance(&part(0, first), &mut states).unwrap()];
        for t in first..length {
            logits.push(model.advance(&part(t, t + 1), &mut states).unwrap());
        }
        near(case, "logits", &Tensor::cat(&logits, 1).unwrap());
    }
}

// One member as a case of another

#[test]
fn s5_with_one_channel_is_a_diagonal_system_and_mamba_with_fixed_steps_is_time_invariant() {
    // S5 with one input and output: the impulse response of the same modes by Vandermonde.
    let n = 3;
    let (lambda, b, c) = (
        (wave(&[n, 2], 1).abs().unwrap() * -1.0).unwrap(),
        wave(&[n, 1, 2], 2),
        wave(&[1, n, 2], 3),
    );
    let log_step = Tensor::new(vec![-2.0f64; n], &Device::Cpu).unwrap();
    let store = given([
        ("Lambda", lambda.clone()),
        ("log_step", log_step),
        ("B", b.clone()),
        ("C", c.clone()),
        ("D", zeros(&[1])),
    ]);
    let config = S5Config {
        p: n,
        gate: false,
        ..S5Config::default()
    };
    let layer = S5::new(&config, 1, &store.root()).unwrap();
    let mut impulse = vec![0.0; 20];
    impulse[0] = 1.0;
    let impulse = Tensor::from_vec(impulse, (1, 20, 1), &Device::Cpu).unwrap();
    let (y, _) = layer.system(&impulse, &zeros(&[1, n, 2])).unwrap();
    let kernel = longspan_kernels::s4::diagonal_kernel(
        &Tensor::new(&[(-2.0f64).exp()], &Device::Cpu).unwrap(),
        &lambda.unsqueeze(0).unwrap(),
        &b.squeeze(1).unwrap().unsqueeze(0).unwrap(),
        &c.unsqueeze(0).unwrap(),
        20,
        longspan_kernels::s4::Discretisation::Zoh,
    )
    .unwrap();
    let y = y.flatten_all().unwrap();
    assert!(largest(&(y - kernel.flatten_all().unwrap()).unwrap()) < 1e-12);

    // Mamba's scan with one step, b and c for all tokens is a convolution with Σ c e^{l dt a} dt b.
    let (d, n, length) = (2, 3, 15);
    let u = wave(&[1, length, d], 4);
    let a = (wave(&[d, n], 5).abs().unwrap() * -1.0).unwrap();
    let row = |salt: usize| wave(&[1, 1, n], salt);
    let all = |x: &Tensor| {
        x.broadcast_as((1, length, n))
            .unwrap()
            .contiguous()
            .unwrap()
    };
    let (b, c) = (row(6), row(7));
    let dt = (Tensor::ones((1, length, d), DType::F64, &Device::Cpu).unwrap() * 0.3).unwrap();
    let scan = longspan_kernels::selective::SelectiveScan {
        u: &u,
        dt: &dt,
        a: &a,
        b: &all(&b),
        c: &all(&c),
        state: None,
    };
    let (y, _) = scan.run().unwrap();
    let weight = ((b * c).unwrap() * 0.3).unwrap().squeeze(0).unwrap();
    let weight = weight.broadcast_as((d, n)).unwrap();
    let pairs = |x: &Tensor| Tensor::stack(&[x, &x.zeros_like().unwrap()], 2).unwrap();
    let kernel = longspan_kernels::vandermonde::vandermonde(
        &pairs(&(weight * 0.5).unwrap()),
        &pairs(&(&a * 0.3).unwrap()),
        length,
    )
    .unwrap();
    let u = u.transpose(1, 2).unwrap().contiguous().unwrap();
    let expected = longspan_kernels::fftconv::fft_conv(&u, &kernel, None).unwrap();
    let y = y.transpose(1, 2).unwrap();
    assert!(largest(&(y - expected).unwrap()) < 1e-12);
}

#[test]
fn mamba_with_one_decay_per_head_is_mamba_2s_scan() {
    let (batch, length, heads, p, n) = (2, 17, 2, 3, 4);
    let u = wave(&[batch, length, heads, p], 1);
    let dt = (wave(&[batch, length, heads], 2).abs().unwrap() + 0.05).unwrap();
    let a = (wave(&[heads], 3).abs().unwrap() * -1.0).unwrap();
    let (b, c) = (
        wave(&[batch, length, 1, n], 4),
        wave(&[batch, length, 1, n], 5),
    );
    let ssd = Scan {
        x: &u,
        dt: &dt,
        a: &a,
        b: &b,
        c: &c,
        state: None,
    };
    let (expected, state) = ssd.chunked(5).unwrap();
    let channels = heads * p;
    let flat = |x: &Tensor, shape: &[usize]| x.contiguous().unwrap().reshape(shape).unwrap();
    let wide = dt.unsqueeze(3).unwrap();
    let wide = wide.broadcast_as((batch, length, heads, p)).unwrap();
    let rates = a.reshape((heads, 1, 1)).unwrap();
    let rates = rates.broadcast_as((heads, p, n)).unwrap();
    let scan = longspan_kernels::selective::SelectiveScan {
        u: &flat(&u, &[batch, length, channels]),
        dt: &flat(&wide, &[batch, length, channels]),
        a: &flat(&rates, &[channels, n]),
        b: &b.squeeze(2).unwrap(),
        c: &c.squeeze(2).unwrap(),
        state: None,
    };
    let (y, last) = scan.run().unwrap();
    let expected = flat(&expected, &[batch, length, channels]);
    assert!(largest(&(y - expected).unwrap()) < 1e-12);
    let state = flat(&state, &[batch, channels, n]);
    assert!(largest(&(last - state).unwrap()) < 1e-12);
}
