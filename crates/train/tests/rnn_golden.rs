//! Recurrent nets against the goldens of paper 15: truncated back-propagation through time, clipping, LSTM variants.

#[path = "../../../tests/golden.rs"]
mod golden;

use candle_core::{DType, Device, Tensor};
use golden::Case;
use longspan_nn::mixer::{Rnn, RnnConfig, SequenceMixer};
use longspan_nn::params::ParamStore;
use longspan_train::optim::clip_grad_norm;
use longspan_train::tbptt::truncated_bptt;
use std::collections::{BTreeMap, HashMap};

fn tensor(case: &Case, name: &str) -> Tensor {
    Tensor::from_vec(case.f64(name), case.shape(name), &Device::Cpu).unwrap()
}

fn near(case: &Case, name: &str, found: &Tensor) {
    let largest = case.f64(name).iter().fold(0f64, |m, v| m.max(v.abs()));
    let found = found.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    case.assert_within(name, &found, |_, _| 1e-10 * largest);
}

fn net(
    cell: &str,
    hidden: usize,
    inputs: usize,
    tensors: HashMap<String, Tensor>,
) -> (Rnn, ParamStore) {
    let config = format!(r#"{{"cell": "{cell}", "hidden_size": {hidden}}}"#);
    let config: RnnConfig = serde_json::from_str(&config).unwrap();
    let store = ParamStore::from_tensors(tensors, DType::F64, &Device::Cpu);
    (Rnn::new(&config, inputs, &store.root()).unwrap(), store)
}

#[test]
fn truncated_and_whole_gradients_and_clipping() {
    let cases = golden::cases_of("rnn-review", "tbptt_clip");
    assert!(!cases.is_empty());
    for case in &cases {
        let (x, target) = (tensor(case, "x"), tensor(case, "target"));
        let (length, hidden) = (case.shape("x")[1], case.shape("target")[2]);
        let names = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"];
        let mut tensors: HashMap<String, Tensor> = names
            .iter()
            .map(|name| (name.to_string(), tensor(case, &format!("param.{name}"))))
            .collect();
        // The width of the model is the input's; what the net gives goes through the identity.
        let inputs = case.shape("x")[2];
        let wide = Tensor::eye(hidden, DType::F64, &Device::Cpu).unwrap();
        tensors.insert("out_proj.weight".into(), wide.narrow(0, 0, inputs).unwrap());
        let (net, store) = net("lstm", hidden, inputs, tensors);
        // The golden's loss is on all hidden units: take them from the state instead of the projection.
        let count = target.elem_count() as f64;
        let k = case.meta_usize("k");
        let params = store.list();
        for (prefix, window) in [("tbptt", k), ("full", length), ("full", 5 * length)] {
            let hidden_net = Hidden(&net);
            let loss = |y: &Tensor, start: usize| {
                let target = target.narrow(1, start, y.dim(1)?)?;
                (y - target)?.sqr()?.sum_all()? / count
            };
            let (_, mut gradients) = truncated_bptt(&hidden_net, &x, window, &loss).unwrap();
            let mut by_name = BTreeMap::new();
            for (name, param) in &params {
                if let Some(gradient) = gradients.remove(param.var.as_tensor()) {
                    by_name.insert(name.clone(), gradient);
                }
            }
            for name in names {
                near(case, &format!("{prefix}.{name}"), &by_name[name]);
            }
            if prefix == "full" {
                let limit = case.meta_f64("clip_norm");
                let norm = clip_grad_norm(&mut by_name, Some(limit)).unwrap();
                assert!((norm / case.meta_f64("total_norm") - 1.0).abs() < 1e-6);
                for name in names {
                    let largest = case
                        .f64(&format!("clipped.{name}"))
                        .iter()
                        .fold(0f64, |m, v| m.max(v.abs()));
                    let found = by_name[name]
                        .flatten_all()
                        .unwrap()
                        .to_vec1::<f64>()
                        .unwrap();
                    case.assert_within(&format!("clipped.{name}"), &found, |_, _| 1e-6 * largest);
                }
            }
        }
    }
}

/// A net's hidden units in place of its projected outputs.
struct Hidden<'a>(&'a Rnn);

impl SequenceMixer for Hidden<'_> {
    fn spec(&self) -> longspan_nn::mixer::MixerSpec {
        self.0.spec()
    }

    fn forward(
        &self,
        x: &Tensor,
        state: Option<&longspan_nn::mixer::MixerState>,
    ) -> candle_core::Result<(Tensor, Option<longspan_nn::mixer::MixerState>)> {
        let mut next = match state {
            Some(state) => state.clone(),
            None => self.0.init_state(x.dim(0)?)?,
        };
        let (y, mut last) = self.0.run(x, &[next.get("layer0")?.clone()])?;
        next.tensors.insert("layer0".into(), last.remove(0));
        Ok((y, Some(next)))
    }

    fn init_state(&self, batch: usize) -> candle_core::Result<longspan_nn::mixer::MixerState> {
        self.0.init_state(batch)
    }
}

#[test]
fn lstm_variants() {
    let cases = golden::cases_of("rnn-review", "lstm_variants");
    assert!(!cases.is_empty());
    for case in &cases {
        let variants: Vec<String> = serde_json::from_value(case.meta("variants").clone()).unwrap();
        for variant in variants {
            let (cell, gates): (&str, &[&str]) = match variant.as_str() {
                "lstm97" => ("lstm97", &["i", "g", "o"]),
                "forget" => ("lstm", &["i", "f", "g", "o"]),
                "peephole" => ("peephole-lstm", &["i", "f", "g", "o"]),
                other => panic!("{other}"),
            };
            let all = |form: &dyn Fn(&str) -> String| {
                let parts: Vec<Tensor> =
                    gates.iter().map(|gate| tensor(case, &form(gate))).collect();
                Tensor::cat(&parts, 0).unwrap()
            };
            let bias = all(&|gate| format!("b{gate}"));
            let (hidden, inputs) = (case.shape("Wgh")[0], case.shape("Wgx")[1]);
            let stacked =
                |names: [&str; 3]| Tensor::stack(&names.map(|name| tensor(case, name)), 0).unwrap();
            let tensors = HashMap::from([
                ("weight_ih_l0".to_string(), all(&|gate| format!("W{gate}x"))),
                ("weight_hh_l0".to_string(), all(&|gate| format!("W{gate}h"))),
                ("bias_hh_l0".to_string(), bias.zeros_like().unwrap()),
                ("bias_ih_l0".to_string(), bias),
                ("weight_p_l0".to_string(), stacked(["pi", "pf", "po"])),
                (
                    "out_proj.weight".to_string(),
                    Tensor::zeros((inputs, hidden), DType::F64, &Device::Cpu).unwrap(),
                ),
            ]);
            let (net, _) = net(cell, hidden, inputs, tensors);
            let x = tensor(case, "x");
            let state = net.init_state(x.dim(0).unwrap()).unwrap();
            let (h, _) = Hidden(&net).forward(&x, Some(&state)).unwrap();
            near(case, &format!("h_{variant}"), &h);
            let (_, last) = net.forward(&x, Some(&state)).unwrap();
            let last = last.unwrap();
            let s = last
                .get("layer0")
                .unwrap()
                .narrow(1, hidden, hidden)
                .unwrap();
            near(case, &format!("s_last_{variant}"), &s.contiguous().unwrap());
        }
    }
}
