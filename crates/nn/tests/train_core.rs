//! The model that answers also learns: golden `train-core`, logits, losses and every gradient
//! through the same decoder (design of the trainer; transformers made the numbers).

#[path = "../../../tests/golden.rs"]
mod golden;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use golden::Case;
use longspan_nn::attention::CausalAttention;
use longspan_nn::config::ModelConfig;
use longspan_nn::model::Decoder;
use std::collections::HashMap;
use std::path::Path;

fn config(case: &Case) -> ModelConfig {
    let json = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": case.meta_usize("vocab"), "hidden_size": case.meta_usize("width"),
        "intermediate_size": case.meta_usize("mlp_width"), "num_hidden_layers": case.meta_usize("layers"),
        "num_attention_heads": case.meta_usize("heads"), "num_key_value_heads": case.meta_usize("kv_heads"),
        "rms_norm_eps": case.meta_f64("rms_eps"), "rope_theta": case.meta_f64("rope_theta"),
        "tie_word_embeddings": case.meta("tied_embeddings"), "max_position_embeddings": 64, "hidden_act": "silu",
    });
    ModelConfig::from_hf_json(Path::new("train-core"), json.to_string().as_bytes()).unwrap()
}

/// Mean over t of nll(logits[t-1], labels[t]) where labels[t] is not -100, and each target's nll.
fn loss(logits: &Tensor, labels: &[i64]) -> Result<(Tensor, Vec<f32>)> {
    let rows = labels.len() - 1;
    let logits = logits.narrow(0, 0, rows)?;
    let top = logits.max_keepdim(D::Minus1)?.detach();
    let log_z = (logits
        .broadcast_sub(&top)?
        .exp()?
        .sum_keepdim(D::Minus1)?
        .log()?
        + top)?;
    let targets: Vec<u32> = labels[1..]
        .iter()
        .map(|&label| label.max(0) as u32)
        .collect();
    let picked = logits.gather(&Tensor::from_vec(targets, (rows, 1), &Device::Cpu)?, 1)?;
    let mask: Vec<f32> = labels[1..]
        .iter()
        .map(|&label| if label == -100 { 0.0 } else { 1.0 })
        .collect();
    let count: f32 = mask.iter().sum();
    let nll = ((log_z - picked)?.squeeze(1)? * Tensor::from_vec(mask, rows, &Device::Cpu)?)?;
    Ok(((nll.sum_all()? / count as f64)?, nll.to_vec1()?))
}

fn logits(
    case: &Case,
    tensors: &HashMap<String, Tensor>,
    positions: Option<&[usize]>,
) -> Result<Tensor> {
    let config = config(case);
    let lengths: Vec<usize> = case
        .i64("seq_lengths")
        .iter()
        .map(|&length| length as usize)
        .collect();
    let ids: Vec<u32> = case.i64("input_ids").iter().map(|&id| id as u32).collect();
    let model = Decoder::from_tensors(&config, tensors, &Device::Cpu)?;
    let mut attend =
        CausalAttention::packed(&config, &lengths, positions, DType::F32, &Device::Cpu)?;
    model.logits(&model.hidden(&ids, &mut attend)?)
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn logits_losses_and_every_gradient() {
    let cases = golden::cases_of("train-core", "tiny_llama_packed");
    assert!(!cases.is_empty());
    for case in &cases {
        let variable = |name: &str| {
            let tensor = Tensor::from_vec(case.f32(name), case.shape(name), &Device::Cpu).unwrap();
            Var::from_tensor(&tensor).unwrap()
        };
        let vars: HashMap<String, Var> = case
            .tensors
            .keys()
            .filter_map(|name| Some((name.strip_prefix("w.")?.to_string(), variable(name))))
            .collect();
        let tensors: HashMap<String, Tensor> = vars
            .iter()
            .map(|(name, var)| (name.clone(), var.as_tensor().clone()))
            .collect();
        let labels = case.i64("labels");

        let reset = logits(case, &tensors, None).unwrap();
        case.assert_close("logits_reset", &flat(&reset));
        let (total, nll) = loss(&reset, &labels).unwrap();
        case.assert_close("nll_reset", &nll);
        case.assert_close("loss_reset", &[total.to_scalar::<f32>().unwrap()]);
        let gradients = total.backward().unwrap();
        assert!(vars.len() > 10);
        for (name, var) in &vars {
            let gradient = gradients
                .get(var)
                .unwrap_or_else(|| panic!("{name} has no gradient"));
            case.assert_close(&format!("grad.{name}"), &flat(gradient));
        }

        let row: Vec<usize> = (0..labels.len()).collect();
        let continuous = logits(case, &tensors, Some(&row)).unwrap();
        case.assert_close("logits_continuous", &flat(&continuous));
        case.assert_close(
            "loss_continuous",
            &[loss(&continuous, &labels)
                .unwrap()
                .0
                .to_scalar::<f32>()
                .unwrap()],
        );
    }
}

#[test]
fn low_rank_updates_of_weights_get_their_gradients() {
    for case in &golden::cases_of("train-core", "tiny_llama_packed") {
        let lora = case.meta("lora");
        let scale = lora["alpha"].as_f64().unwrap() / lora["rank"].as_f64().unwrap();
        let tensor =
            |name: &str| Tensor::from_vec(case.f32(name), case.shape(name), &Device::Cpu).unwrap();
        let mut tensors: HashMap<String, Tensor> = case
            .tensors
            .keys()
            .filter_map(|name| Some((name.strip_prefix("w.")?.to_string(), tensor(name))))
            .collect();
        let mut vars = HashMap::new();
        for name in case
            .tensors
            .keys()
            .filter(|name| name.starts_with("lora.") && name.ends_with(".A"))
        {
            let base = name.strip_suffix(".A").unwrap();
            let (a, b) = (
                Var::from_tensor(&tensor(name)).unwrap(),
                Var::from_tensor(&tensor(&format!("{base}.B"))).unwrap(),
            );
            let [_, layer, projection] = base.split('.').collect::<Vec<_>>()[..] else {
                panic!("{base}")
            };
            let weight = tensors
                .get_mut(&format!(
                    "model.layers.{layer}.self_attn.{projection}.weight"
                ))
                .unwrap();
            *weight = (&*weight + (b.matmul(&a).unwrap() * scale).unwrap()).unwrap();
            vars.insert(format!("{layer}.{projection}.A"), a);
            vars.insert(format!("{layer}.{projection}.B"), b);
        }
        let (total, _) = loss(&logits(case, &tensors, None).unwrap(), &case.i64("labels")).unwrap();
        case.assert_close("lora_loss", &[total.to_scalar::<f32>().unwrap()]);
        let gradients = total.backward().unwrap();
        let mut compared = 0;
        for (name, var) in &vars {
            let golden = format!("lora_grad.{name}");
            if case.has(&golden) {
                case.assert_close(&golden, &flat(gradients.get(var).unwrap()));
                compared += 1;
            }
        }
        assert!(compared >= 4);
    }
}
