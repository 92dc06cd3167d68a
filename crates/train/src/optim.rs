//! Optimisers: AdamW, RMSprop, SGD with momentum, on f32 masters.
//!
//! A parameter of lower precision has an f32 master copy that steps are applied to: in bf16 a step of 1e-6 of the value
//! would be lost. Groups may cap the learning rate and set their own weight decay.

use crate::error::{Result, TrainError};
use candle_core::{DType, Tensor};
use longspan_kernels::composed::{composes, sum_squares};
use longspan_kernels::elementwise::dot;
use longspan_kernels::ops::with_rows;
use longspan_nn::params::Param;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Optimiser and hyper-parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase", deny_unknown_fields)]
pub enum OptimConfig {
    /// Adam with decoupled weight decay (Loshchilov and Hutter 2019).
    AdamW {
        /// Base learning rate.
        lr: f64,
        /// Decay of the first moment.
        #[serde(default = "beta1")]
        beta1: f64,
        /// Decay of the second moment.
        #[serde(default = "beta2")]
        beta2: f64,
        /// Added to the root of the second moment.
        #[serde(default = "eps")]
        eps: f64,
        /// Decoupled weight decay.
        #[serde(default)]
        weight_decay: f64,
    },
    /// RMSprop, not centred, without momentum; eps outside the root.
    RmsProp {
        /// Base learning rate.
        lr: f64,
        /// Decay of the mean square.
        #[serde(default = "alpha")]
        alpha: f64,
        /// Added to the root.
        #[serde(default = "eps")]
        eps: f64,
    },
    /// Gradient descent with momentum.
    Sgd {
        /// Base learning rate.
        lr: f64,
        /// 0 = none.
        #[serde(default)]
        momentum: f64,
        /// Use the gradient after the momentum step (Nesterov).
        #[serde(default)]
        nesterov: bool,
    },
}

fn beta1() -> f64 {
    0.9
}
fn beta2() -> f64 {
    0.999
}
fn eps() -> f64 {
    1e-8
}
fn alpha() -> f64 {
    0.99
}

impl OptimConfig {
    /// AdamW with the usual moments and no decay.
    pub fn adamw(lr: f64) -> Self {
        OptimConfig::AdamW {
            lr,
            beta1: beta1(),
            beta2: beta2(),
            eps: eps(),
            weight_decay: 0.0,
        }
    }

    /// The base learning rate.
    pub fn lr(&self) -> f64 {
        match *self {
            OptimConfig::AdamW { lr, .. }
            | OptimConfig::RmsProp { lr, .. }
            | OptimConfig::Sgd { lr, .. } => lr,
        }
    }

    /// Refuses rates and moments that cannot be.
    pub fn check(&self) -> Result<()> {
        let lr = self.lr();
        if !(lr.is_finite() && lr >= 0.0) {
            return Err(TrainError::option("optim.lr", lr, "a number of 0 or more"));
        }
        let shares: &[(&str, f64)] = match self {
            OptimConfig::AdamW { beta1, beta2, .. } => &[("beta1", *beta1), ("beta2", *beta2)],
            OptimConfig::RmsProp { alpha, .. } => &[("alpha", *alpha)],
            OptimConfig::Sgd { momentum, .. } => &[("momentum", *momentum)],
        };
        for &(name, value) in shares {
            if !(0.0..1.0).contains(&value) {
                let option = format!("optim.{name}");
                return Err(TrainError::option(&option, value, "from 0 to below 1"));
            }
        }
        Ok(())
    }
}

mod flat;
mod fused;

#[derive(Default)]
struct Slot {
    /// f32 copy of a parameter of lower precision.
    master: Option<Tensor>,
    first: Option<Tensor>,
    second: Option<Tensor>,
}

/// Optimiser state by parameter name.
pub struct Optimizer {
    config: OptimConfig,
    slots: BTreeMap<String, Slot>,
    /// State of parameters that are stepped together; others have slots.
    flats: Vec<flat::Flat>,
    /// Steps taken: Adam's bias correction.
    steps: u64,
}

impl Optimizer {
    /// A fresh optimiser.
    pub fn new(config: OptimConfig) -> Result<Self> {
        config.check()?;
        Ok(Optimizer {
            config,
            slots: BTreeMap::new(),
            flats: Vec::new(),
            steps: 0,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &OptimConfig {
        &self.config
    }

    /// One step. Parameters without a gradient stay as they are; `multiplier` is the schedule's.
    pub fn step(
        &mut self,
        params: &[(String, Param)],
        gradients: &BTreeMap<String, Tensor>,
        multiplier: f64,
    ) -> Result<()> {
        self.steps += 1;
        let mut together: BTreeMap<(&str, u64, u64), Vec<flat::Item<'_>>> = BTreeMap::new();
        for (name, param) in params {
            let (Some(gradient), true) = (gradients.get(name), param.group.trainable) else {
                continue;
            };
            let cap = param.group.max_lr.unwrap_or(f64::INFINITY);
            let lr = self.config.lr().min(cap) * multiplier;
            if let OptimConfig::AdamW { weight_decay, .. } = self.config
                && composes(gradient)
            {
                let decay = param.group.weight_decay.unwrap_or(weight_decay);
                let key = (param.var.dtype().as_str(), lr.to_bits(), decay.to_bits());
                let group = together.entry(key).or_default();
                group.push((name, param, gradient));
                continue;
            }
            let slot = self.slots.entry(name.clone()).or_default();
            if let OptimConfig::AdamW { .. } = self.config
                && fused::fits(&param.var, gradient)
            {
                fused::adamw(&self.config, param, slot, gradient, lr, self.steps)?;
                continue;
            }
            let low = matches!(param.var.dtype(), DType::BF16 | DType::F16);
            let weight = match (&slot.master, low) {
                (Some(master), true) => master.clone(),
                (None, true) => param.var.as_detached_tensor().to_dtype(DType::F32)?,
                (_, false) => param.var.as_detached_tensor(),
            };
            let gradient = gradient.to_dtype(weight.dtype())?.detach();
            let weight = update(
                &self.config,
                param,
                slot,
                &weight,
                &gradient,
                lr,
                self.steps,
            )?
            .detach();
            if low {
                param.var.set(&weight.to_dtype(param.var.dtype())?)?;
                slot.master = Some(weight);
            } else {
                param.var.set(&weight)?;
            }
        }
        for ((_, lr, decay), items) in together {
            let rates = (f64::from_bits(lr), f64::from_bits(decay));
            let state = (&mut self.flats, &mut self.slots);
            flat::adamw(&self.config, &items, state, rates, self.steps)?;
        }
        Ok(())
    }

    /// All state as tensors, to be stored.
    pub fn tensors(&self) -> HashMap<String, Tensor> {
        let mut out = HashMap::new();
        // Cutting a flat array into its own parts does not fail.
        let flats = self
            .flats
            .iter()
            .flat_map(|flat| flat.slots().unwrap_or_default());
        let flats: Vec<(String, Slot)> = flats.collect();
        let joined = flats.iter().map(|(name, slot)| (name, slot));
        for (name, slot) in self.slots.iter().chain(joined) {
            let parts = [
                ("master", &slot.master),
                ("first", &slot.first),
                ("second", &slot.second),
            ];
            for (part, tensor) in parts {
                if let Some(tensor) = tensor {
                    out.insert(format!("{part}.{name}"), tensor.clone());
                }
            }
        }
        out
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Takes up stored state. `path` is named in errors.
    pub fn load(
        &mut self,
        tensors: HashMap<String, Tensor>,
        steps: u64,
        path: &Path,
    ) -> Result<()> {
        self.slots.clear();
        self.flats.clear();
        self.steps = steps;
        for (full, tensor) in tensors {
            let Some((part, name)) = full.split_once('.') else {
                return Err(TrainError::contents(path, format!("unknown tensor {full}")));
            };
            let slot = self.slots.entry(name.to_string()).or_default();
            match part {
                "master" => slot.master = Some(tensor),
                "first" => slot.first = Some(tensor),
                "second" => slot.second = Some(tensor),
                _ => return Err(TrainError::contents(path, format!("unknown tensor {full}"))),
            }
        }
        Ok(())
    }
}

fn update(
    config: &OptimConfig,
    param: &Param,
    slot: &mut Slot,
    weight: &Tensor,
    gradient: &Tensor,
    lr: f64,
    steps: u64,
) -> candle_core::Result<Tensor> {
    // a x + b y; y absent = 0
    let mix = |a: f64, x: &Tensor, b: f64, y: &Option<Tensor>| match y {
        Some(y) => (x * a)? + (y * b)?,
        None => x * a,
    };
    match *config {
        OptimConfig::AdamW {
            beta1,
            beta2,
            eps,
            weight_decay,
            ..
        } => {
            let decay = param.group.weight_decay.unwrap_or(weight_decay);
            let first = mix(1.0 - beta1, gradient, beta1, &slot.first)?;
            let second = mix(1.0 - beta2, &gradient.sqr()?, beta2, &slot.second)?;
            let correct = |beta: f64| 1.0 - beta.powf(steps as f64);
            let denominator = ((&second / correct(beta2))?.sqrt()? + eps)?;
            let step = ((&first / correct(beta1))? / denominator)?;
            slot.first = Some(first);
            slot.second = Some(second);
            // The decay uses the weight before the step.
            (weight * (1.0 - lr * decay))? - (step * lr)?
        }
        OptimConfig::RmsProp { alpha, eps, .. } => {
            let second = mix(1.0 - alpha, &gradient.sqr()?, alpha, &slot.second)?;
            let step = (gradient / (second.sqrt()? + eps)?)?;
            slot.second = Some(second);
            weight - (step * lr)?
        }
        OptimConfig::Sgd {
            momentum, nesterov, ..
        } => {
            if momentum == 0.0 {
                return weight - (gradient * lr)?;
            }
            let first = mix(1.0, gradient, momentum, &slot.first)?;
            let step = if nesterov {
                (gradient + (&first * momentum)?)?
            } else {
                first.clone()
            };
            slot.first = Some(first);
            weight - (step * lr)?
        }
    }
}

/// Sum of the squares of all elements.
fn squares(x: &Tensor) -> candle_core::Result<f64> {
    if x.device().is_cpu() && x.dtype() == DType::F32 {
        return with_rows(x, |x| {
            let parts = x.chunks(4096).map(|part| f64::from(dot(part, part)));
            parts.sum()
        });
    }
    sum_squares(x)
}

/// Scales gradients so that their global norm is at most `limit`: the factor is min(1, limit / (norm + 1e-6)).
/// Returns the norm before.
pub fn clip_grad_norm(
    gradients: &mut BTreeMap<String, Tensor>,
    limit: Option<f64>,
) -> candle_core::Result<f64> {
    if gradients
        .values()
        .any(|gradient| !gradient.device().is_cpu())
    {
        return clip_together(gradients, limit);
    }
    let mut sum = 0f64;
    for gradient in gradients.values() {
        sum += squares(gradient)?;
    }
    let norm = sum.sqrt();
    if let Some(limit) = limit {
        let scale = limit / (norm + 1e-6);
        if scale < 1.0 {
            for gradient in gradients.values_mut() {
                *gradient = (&*gradient * scale)?;
            }
        }
    }
    Ok(norm)
}

/// [`clip_grad_norm`] with one reduction, and so one wait for the device.
fn clip_together(
    gradients: &mut BTreeMap<String, Tensor>,
    limit: Option<f64>,
) -> candle_core::Result<f64> {
    let all = flat::join(gradients.values())?;
    let norm = sum_squares(&all)?.sqrt();
    if let Some(limit) = limit {
        let scale = limit / (norm + 1e-6);
        if scale < 1.0 {
            let shapes: Vec<_> = gradients.values().map(|g| g.shape().clone()).collect();
            let parts = flat::cut(&(all * scale)?, shapes.iter())?;
            for (gradient, part) in gradients.values_mut().zip(parts) {
                *gradient = part;
            }
        }
    }
    Ok(norm)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};
    use longspan_nn::params::ParamGroup;

    fn param(value: f32, dtype: DType, group: ParamGroup) -> (String, Param) {
        let tensor = Tensor::new(&[value], &Device::Cpu)
            .unwrap()
            .to_dtype(dtype)
            .unwrap();
        let var = Var::from_tensor(&tensor).unwrap();
        ("w".into(), Param { var, group })
    }

    fn value(params: &[(String, Param)]) -> f32 {
        let tensor = params[0].1.var.to_dtype(DType::F32).unwrap();
        tensor.to_vec1::<f32>().unwrap()[0]
    }

    fn gradient(value: f32) -> BTreeMap<String, Tensor> {
        let tensor = Tensor::new(&[value], &Device::Cpu).unwrap();
        BTreeMap::from([("w".to_string(), tensor)])
    }

    #[test]
    fn small_steps_of_low_precision_weights_are_not_lost() {
        let params = [param(1.0, DType::BF16, ParamGroup::default())];
        let mut optim = Optimizer::new(OptimConfig::adamw(1e-4)).unwrap();
        for _ in 0..100 {
            optim.step(&params, &gradient(1.0), 1.0).unwrap();
        }
        // A bf16 weight near 1 moves in steps of 1/256 or 1/128: each single step would have been rounded away.
        let found = value(&params);
        assert!((found - 0.99).abs() < 0.003, "{found}");
        let master = optim.tensors()["master.w"].to_vec1::<f32>().unwrap()[0];
        assert!((master - 0.99).abs() < 1e-4, "{master}");
    }

    #[test]
    fn groups_cap_the_rate_and_set_the_decay() {
        let config = OptimConfig::AdamW {
            lr: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.5,
        };
        let run = |group| {
            let params = [param(1.0, DType::F32, group)];
            let mut optim = Optimizer::new(config.clone()).unwrap();
            optim.step(&params, &gradient(2.0), 1.0).unwrap();
            value(&params)
        };
        // The first Adam step is lr in size.
        assert!((run(ParamGroup::default()) - (1.0 - 0.05 - 0.1)).abs() < 1e-6);
        assert!((run(ParamGroup::STATE_SPACE) - (1.0 - 1e-3)).abs() < 1e-6);
        assert!((run(ParamGroup::NO_DECAY) - 0.9).abs() < 1e-6);
        let frozen = ParamGroup {
            trainable: false,
            ..ParamGroup::default()
        };
        assert_eq!(run(frozen), 1.0);
    }

    #[test]
    fn momentum_adds_up_and_clipping_keeps_the_direction() {
        let params = [param(0.0, DType::F32, ParamGroup::default())];
        let config = OptimConfig::Sgd {
            lr: 1.0,
            momentum: 0.5,
            nesterov: false,
        };
        let mut optim = Optimizer::new(config).unwrap();
        optim.step(&params, &gradient(1.0), 1.0).unwrap();
        optim.step(&params, &gradient(1.0), 1.0).unwrap();
        assert_eq!(value(&params), -2.5);
        let mut gradients = gradient(3.0);
        let four = Tensor::new(&[4f32], &Device::Cpu).unwrap();
        gradients.insert("v".into(), four);
        assert_eq!(clip_grad_norm(&mut gradients, Some(1.0)).unwrap(), 5.0);
        let scaled = |name: &str| gradients[name].to_vec1::<f32>().unwrap()[0];
        assert!((scaled("w") - 0.6).abs() < 1e-6 && (scaled("v") - 0.8).abs() < 1e-6);
        let mut again = gradient(3.0);
        again.insert("v".into(), Tensor::new(&[4f32], &Device::Cpu).unwrap());
        assert_eq!(clip_together(&mut again, Some(1.0)).unwrap(), 5.0);
        assert_eq!(again["v"].to_vec1::<f32>().unwrap(), [scaled("v")]);
        assert!(Optimizer::new(OptimConfig::adamw(-1.0)).is_err());
    }
}
