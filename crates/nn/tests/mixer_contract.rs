//! What every mixer of the registry must keep: parallel = steps = any split, causality, gradients, batch rows that do not
//! see each other, padding and packed documents, states that are stored and selected.

use candle_core::{DType, Device, Tensor, Var};
use longspan_kernels::composed::composing;
use longspan_nn::mixer::{MixerConfig, MixerState, SequenceMixer, StateKind, masked, packed};
use longspan_nn::model::stack::{Stack, StackConfig};
use longspan_nn::params::ParamStore;

const WIDTH: usize = 8;
const LENGTH: usize = 13;

/// One entry per member and variant of the registry.
fn registry() -> Vec<(String, MixerConfig)> {
    [
        r#"{"kind": "attention", "heads": 2}"#,
        r#"{"kind": "attention", "heads": 2, "position": {"scheme": "t5-bias", "buckets": 8, "max_distance": 10}}"#,
        r#"{"kind": "attention", "heads": 2, "position": {"scheme": "alibi"}, "scaled": false}"#,
        r#"{"kind": "attention", "heads": 2, "position": {"scheme": "rotary", "fraction": 0.5}}"#,
        r#"{"kind": "s4", "d_state": 6, "l_max": 13}"#,
        r#"{"kind": "s4", "d_state": 8, "l_max": 16, "init": "legt", "rank": 2, "n_ssm": 2, "dt_transform": "exp"}"#,
        r#"{"kind": "s4", "d_state": 6, "mode": "diag", "init": "lin", "n_ssm": 0}"#,
        r#"{"kind": "s4", "d_state": 6, "mode": "diag", "init": "inv", "bilinear": true, "glu": false}"#,
        r#"{"kind": "s4", "d_state": 6, "l_max": 13, "bidirectional": true}"#,
        r#"{"kind": "mamba2", "head_dim": 4, "state_size": 3, "n_groups": 2, "chunk_size": 4}"#,
        r#"{"kind": "rnn", "cell": "tanh"}"#,
        r#"{"kind": "rnn", "cell": "lstm", "layers": 2, "hidden_size": 5}"#,
        r#"{"kind": "rnn", "cell": "gru"}"#,
        r#"{"kind": "rnn", "cell": "lstm97"}"#,
        r#"{"kind": "rnn", "cell": "peephole-lstm", "layers": 2, "hidden_size": 5}"#,
        r#"{"kind": "rnn", "cell": "gru", "bidirectional": true}"#,
        r#"{"kind": "lssl", "order": 5, "dt_min": 0.05, "dt_max": 0.5}"#,
        r#"{"kind": "lssl", "order": 4, "learn": 2, "measure": "lagt", "channels": 2, "alpha": 1.0}"#,
        r#"{"kind": "lssl", "order": 4, "learn": 0, "measure": "legt", "zoh": true}"#,
        r#"{"kind": "lssl", "order": 4, "learn": 0, "measure": "random", "projection": false}"#,
        r#"{"kind": "lssl", "order": 6, "measure": "chebyshev", "rate": 2.0, "reference_rate_quirk": true}"#,
        r#"{"kind": "dss", "n": 4, "dt_min": 0.05, "dt_max": 0.5}"#,
        r#"{"kind": "dss", "n": 4, "version": "softmax", "l_max": 40, "glu": false}"#,
        r#"{"kind": "s5", "p": 6, "blocks": 2, "dt_min": 0.05, "dt_max": 0.5}"#,
        r#"{"kind": "liquid-s4", "d_state": 6, "degree": 3}"#,
        r#"{"kind": "liquid-s4", "d_state": 6, "degree": null, "glu": false}"#,
        r#"{"kind": "gss", "n": 4, "gate_width": 12, "ssm_width": 3}"#,
        r#"{"kind": "h3", "n_shift": 3, "d_state": 6}"#,
        r#"{"kind": "hyena", "l_max": 40, "filter_order": 6}"#,
        r#"{"kind": "hyena", "order": 3, "l_max": 64, "filter_order": 5, "emb_dim": 5, "shift": 0.05}"#,
        r#"{"kind": "lru", "n": 6}"#,
        r#"{"kind": "ema", "ndim": 3}"#,
        r#"{"kind": "ema", "ndim": 3, "bidirectional": true}"#,
        r#"{"kind": "retention", "heads": 2, "chunk_size": 5}"#,
        r#"{"kind": "mamba", "state_size": 3}"#,
        r#"{"kind": "mamba", "state_size": 3, "use_bias": true, "conv_kernel": 1}"#,
        r#"{"kind": "longvq", "key_dim": 4, "codes": 5, "block": 3, "ema_order": 2}"#,
        r#"{"kind": "longvq", "key_dim": 4, "codes": 5, "block": 2, "memory": "none", "bias": false}"#,
        r#"{"kind": "longvq", "key_dim": 4, "codes": 5, "block": 3, "ema_order": 2, "causal": false}"#,
    ]
    .iter()
    .map(|text| (text.to_string(), serde_json::from_str(text).unwrap()))
    .collect()
}

fn each(test: impl Fn(&str, &dyn SequenceMixer, &ParamStore)) {
    for (name, config) in registry() {
        let store = ParamStore::new(7, DType::F32, &Device::Cpu);
        let mixer = config
            .build(WIDTH, &store.root().at("m"), &store.root())
            .unwrap();
        test(&name, &*mixer, &store);
    }
}

fn input(batch: usize, length: usize, salt: usize) -> Tensor {
    let values: Vec<f32> = (0..batch * length * WIDTH)
        .map(|i| ((i * 7919 + salt * 104_729) % 1009) as f32 / 504.5 - 1.0)
        .collect();
    Tensor::from_vec(values, (batch, length, WIDTH), &Device::Cpu).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    if a.elem_count() == 0 {
        return 0.0;
    }
    let d = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
    let d = d.max_all().unwrap().to_scalar::<f32>().unwrap();
    if d.is_nan() { f32::INFINITY } else { d }
}

fn parallel(mixer: &dyn SequenceMixer, x: &Tensor) -> Tensor {
    mixer.forward(x, None).unwrap().0.detach()
}

fn part(x: &Tensor, from: usize, to: usize) -> Tensor {
    x.narrow(1, from, to - from).unwrap()
}

#[test]
fn the_parallel_form_is_the_steps_and_every_split() {
    each(|name, mixer, _| {
        if mixer.spec().state == StateKind::None {
            assert!(mixer.init_state(1).is_err(), "{name}");
            return;
        }
        let x = input(3, LENGTH, 1);
        let whole = parallel(mixer, &x);
        let mut state = mixer.init_state(3).unwrap();
        let steps: Vec<Tensor> = (0..LENGTH)
            .map(|t| {
                mixer
                    .step(&part(&x, t, t + 1).squeeze(1).unwrap(), &mut state)
                    .unwrap()
            })
            .collect();
        let error = distance(&Tensor::stack(&steps, 1).unwrap(), &whole);
        assert!(error < 1e-5, "{name}: steps differ by {error}");
        assert_eq!(state.position, LENGTH, "{name}");
        for cut in [0, 1, 6, LENGTH] {
            let state = mixer.init_state(3).unwrap();
            let (first, state) = mixer.forward(&part(&x, 0, cut), Some(&state)).unwrap();
            let state = state.unwrap();
            let (second, state) = mixer.forward(&part(&x, cut, LENGTH), Some(&state)).unwrap();
            assert_eq!(state.unwrap().position, LENGTH, "{name}");
            let both = Tensor::cat(&[first.detach(), second.detach()], 1).unwrap();
            let error = distance(&both, &whole);
            assert!(error < 1e-5, "{name}: split at {cut} differs by {error}");
        }
    });
}

#[test]
fn later_tokens_change_nothing_before_them_unless_the_spec_says_so() {
    each(|name, mixer, _| {
        let x = input(1, LENGTH, 2);
        let changed = Tensor::cat(&[part(&x, 0, 9), input(1, LENGTH - 9, 5)], 1).unwrap();
        let (a, b) = (parallel(mixer, &x), parallel(mixer, &changed));
        let before = distance(&part(&a, 0, 9), &part(&b, 0, 9));
        if mixer.spec().causal {
            assert!(before < 1e-6, "{name}: {before}");
        } else {
            assert!(before > 1e-4, "{name} claims to look both ways");
        }
        assert!(
            distance(&part(&a, 9, LENGTH), &part(&b, 9, LENGTH)) > 1e-4,
            "{name}"
        );
    });
}

#[test]
fn rows_of_a_batch_do_not_see_each_other() {
    each(|name, mixer, _| {
        let x = input(3, LENGTH, 3);
        let whole = parallel(mixer, &x);
        for row in 0..3 {
            let alone = parallel(mixer, &x.narrow(0, row, 1).unwrap());
            let error = distance(&alone, &whole.narrow(0, row, 1).unwrap());
            assert!(error < 1e-6, "{name}: {error}");
        }
    });
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for (name, config) in registry() {
        let store = ParamStore::new(7, DType::F64, &Device::Cpu);
        let mixer = config
            .build(WIDTH, &store.root().at("m"), &store.root())
            .unwrap();
        if let Some(reason) = mixer.estimated_gradient() {
            assert!(!reason.is_empty(), "{name}");
            continue;
        }
        let x = Var::from_tensor(&input(1, 6, 4).to_dtype(DType::F64).unwrap()).unwrap();
        let weights = input(1, 6, 9).to_dtype(DType::F64).unwrap();
        let value = |x: &Tensor| {
            let y = mixer.forward(x, None).unwrap().0;
            (y * &weights).unwrap().sum_all().unwrap()
        };
        let gradients = value(x.as_tensor()).backward().unwrap();
        let mut vars = vec![("x".to_string(), x.clone())];
        vars.extend(
            store
                .list()
                .into_iter()
                .filter(|(_, param)| param.group.trainable)
                .map(|(name, param)| (name, param.var)),
        );
        for (param, var) in vars {
            let gradient = gradients.get(var.as_tensor());
            let gradient = gradient.unwrap_or_else(|| panic!("{name}: {param} has no gradient"));
            let analytic = gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let start = var.as_detached_tensor().copy().unwrap();
            let values = start.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let scale = analytic.iter().fold(1e-2f64, |m, g| m.max(g.abs()));
            for element in [0, values.len() / 3, values.len() - 1] {
                let at = |delta: f64| {
                    let mut moved = values.clone();
                    moved[element] += delta;
                    var.set(&Tensor::from_vec(moved, var.shape(), &Device::Cpu).unwrap())
                        .unwrap();
                    value(x.as_tensor()).to_scalar::<f64>().unwrap()
                };
                let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
                let error = (numeric - analytic[element]).abs() / scale;
                assert!(
                    error < 1e-5,
                    "{name}: {param}[{element}]: {numeric} and {}",
                    analytic[element]
                );
            }
            var.set(&start).unwrap();
        }
    }
}

/// On a GPU no kernel runs: models of these mixers, norms and perceptrons included, must be composed of tensor operations
/// throughout (a kernel would be an error here), and come to the same values and gradients.
#[test]
fn models_that_compose_use_no_kernel_and_agree_with_those_that_do() {
    let mut composed = 0;
    for (name, mixer) in registry() {
        if !mixer.composes() {
            continue;
        }
        composed += 1;
        let config = StackConfig {
            d_model: WIDTH,
            layers: 2,
            mixer,
            mlp_ratio: 2.0,
            norm_epsilon: 1e-5,
            norm: true,
            residual: true,
            tie_embeddings: true,
            sinusoid: false,
        };
        let store = ParamStore::new(7, DType::F64, &Device::Cpu);
        let stack = Stack::new(&config, &store.root()).unwrap();
        let x = Var::from_tensor(&input(2, LENGTH, 4).to_dtype(DType::F64).unwrap()).unwrap();
        let weights = input(2, LENGTH, 9).to_dtype(DType::F64).unwrap();
        let both = || {
            let y = stack.forward(x.as_tensor()).unwrap();
            let gradients = (&y * &weights).unwrap().sum_all().unwrap().backward();
            (y.detach(), gradients.unwrap())
        };
        let ((kernels, expected), (found, gradients)) = (both(), composing(both));
        let far = |a: &Tensor, b: &Tensor| {
            let largest = a.abs().unwrap().flatten_all().unwrap().max_all().unwrap();
            f64::from(distance(
                &a.to_dtype(DType::F32).unwrap(),
                &b.to_dtype(DType::F32).unwrap(),
            )) / largest.to_scalar::<f64>().unwrap().max(1e-3)
        };
        assert!(far(&kernels, &found) < 1e-5, "{name}");
        let mut vars = vec![("x".to_string(), x.clone())];
        vars.extend(
            store
                .list()
                .into_iter()
                .map(|(name, param)| (name, param.var)),
        );
        for (param, var) in vars {
            match (
                expected.get(var.as_tensor()),
                gradients.get(var.as_tensor()),
            ) {
                (Some(a), Some(b)) => assert!(far(a, b) < 1e-4, "{name}: {param}: {}", far(a, b)),
                (None, None) => {}
                (a, _) => panic!(
                    "{name}: {param}: a gradient in one of the two only: {}",
                    a.is_some()
                ),
            }
        }
    }
    assert!(composed >= 10, "{composed} mixers compose");
}

#[test]
fn gradients_flow_into_a_carried_state_or_the_spec_says_why_not() {
    each(|name, mixer, _| {
        if mixer.spec().state == StateKind::None {
            return;
        }
        let x = Var::from_tensor(&input(1, 5, 6)).unwrap();
        let start = mixer.init_state(1).unwrap();
        let carried = mixer.forward(x.as_tensor(), Some(&start));
        if mixer.spec().state_gradient.is_some() {
            assert!(
                carried.is_err(),
                "{name}: a gradient would be lost without a word"
            );
            return;
        }
        let state = carried.unwrap().1.unwrap();
        let (y, _) = mixer.forward(&input(1, 4, 7), Some(&state)).unwrap();
        let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let gradient = gradients.get(x.as_tensor()).expect(name);
        let size = |t: &Tensor| -> f32 {
            let sum = t.abs().unwrap().sum_all().unwrap();
            sum.to_scalar().unwrap()
        };
        // The loss's gradient at the output is 2 y; what comes back through the state is small against it where the first
        // time steps are, but not lost in its rounding.
        let share = size(gradient) / (2.0 * size(&y));
        assert!(share > 1e-5, "{name}: {share}");
        // Detached, it is cut.
        let (y, _) = mixer
            .forward(&input(1, 4, 7), Some(&state.detach()))
            .unwrap();
        let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        assert!(gradients.get(x.as_tensor()).is_none(), "{name}");
    });
}

#[test]
fn packed_documents_and_padding_change_nothing() {
    each(|name, mixer, _| {
        let lengths = [4, 1, 7];
        let x = input(1, 12, 8);
        let flat = x.squeeze(0).unwrap();
        let y = packed(mixer, &flat, &lengths).unwrap().detach();
        let mut start = 0;
        for length in lengths {
            let alone = parallel(mixer, &part(&x, start, start + length))
                .squeeze(0)
                .unwrap();
            let error = distance(&alone, &y.narrow(0, start, length).unwrap());
            assert!(error < 2e-6, "{name}: document of {length}: {error}");
            start += length;
        }
        assert!(packed(mixer, &flat, &[4, 4]).is_err());
        // Left, right and inner padding of a row equal the row without it; padded outputs are 0.
        for keep in ["111111110000", "000011111111", "011011110011"] {
            let keep: Vec<bool> = keep.chars().map(|c| c == '1').collect();
            let rows: Vec<Tensor> = (0..12)
                .filter(|&t| keep[t])
                .map(|t| part(&x, t, t + 1))
                .collect();
            let alone = parallel(mixer, &Tensor::cat(&rows, 1).unwrap());
            let y = masked(mixer, &x, std::slice::from_ref(&keep)).unwrap();
            let mut seen = 0;
            for t in 0..12 {
                let token = part(&y, t, t + 1);
                if keep[t] {
                    assert!(
                        distance(&token, &part(&alone, seen, seen + 1)) < 2e-6,
                        "{name}"
                    );
                    seen += 1;
                } else {
                    assert_eq!(
                        distance(&token, &token.zeros_like().unwrap()),
                        0.0,
                        "{name}"
                    );
                }
            }
        }
    });
}

#[test]
fn states_are_selected_and_their_size_is_what_the_spec_says() {
    each(|name, mixer, _| {
        if mixer.spec().state == StateKind::None {
            return;
        }
        let x = input(3, 40, 10);
        let read = |length: usize| -> MixerState {
            let start = mixer.init_state(3).unwrap();
            mixer
                .forward(&part(&x, 0, length), Some(&start))
                .unwrap()
                .1
                .unwrap()
        };
        let sizes = [10, 20, 40].map(|length| read(length).bytes());
        match mixer.spec().state {
            StateKind::Fixed => assert_eq!(sizes, [sizes[0]; 3], "{name}"),
            _ => assert_eq!(sizes, [sizes[0], 2 * sizes[0], 4 * sizes[0]], "{name}"),
        }
        // Rows 2 and 0 of the state go on as rows 2 and 0 of the batch.
        let mut state = read(10).select(&[2, 0]).unwrap();
        let next = part(&x, 10, 11).squeeze(1).unwrap().contiguous().unwrap();
        let picked = next
            .index_select(&Tensor::new(&[2u32, 0], &Device::Cpu).unwrap(), 0)
            .unwrap();
        let y = mixer.step(&picked, &mut state).unwrap();
        let all = mixer.step(&next, &mut read(10)).unwrap();
        let expected = all
            .index_select(&Tensor::new(&[2u32, 0], &Device::Cpu).unwrap(), 0)
            .unwrap();
        assert!(distance(&y, &expected) < 1e-6, "{name}");
    });
}
