//! AdamW on f32 parameters of the CPU in place: each array is read once and written once. The naive twin is the formula in
//! candle operations, which other types and devices use.

use super::{OptimConfig, Slot};
use candle_core::{CpuStorage, DType, InplaceOp2, InplaceOp3, Layout, Result, Tensor, Var, bail};
use longspan_kernels::elementwise::{self, AdamStep};
use longspan_nn::params::Param;

/// Whether a parameter can be stepped in place.
pub(super) fn fits(var: &Var, gradient: &Tensor) -> bool {
    let plain = |t: &Tensor| t.device().is_cpu() && t.dtype() == DType::F32 && t.is_contiguous();
    plain(var.as_tensor()) && gradient.device().is_cpu() && gradient.dtype() == DType::F32
}

/// One step.
pub(super) fn adamw(
    config: &OptimConfig,
    param: &Param,
    slot: &mut Slot,
    gradient: &Tensor,
    lr: f64,
    steps: u64,
) -> Result<()> {
    let &OptimConfig::AdamW {
        beta1,
        beta2,
        eps,
        weight_decay,
        ..
    } = config
    else {
        bail!("adamw: another optimiser is configured")
    };
    let gradient = gradient.detach().contiguous()?;
    let weight = param.var.as_detached_tensor();
    let moment = |slot: &mut Option<Tensor>| -> Result<Tensor> {
        match slot {
            Some(moment) => Ok(moment.clone()),
            None => {
                let zero = Tensor::zeros(weight.shape(), DType::F32, weight.device())?;
                Ok(slot.insert(zero).clone())
            }
        }
    };
    let (first, second) = (moment(&mut slot.first)?, moment(&mut slot.second)?);
    first.inplace_op2(
        &gradient,
        &Mean {
            beta: beta1,
            square: false,
        },
    )?;
    second.inplace_op2(
        &gradient,
        &Mean {
            beta: beta2,
            square: true,
        },
    )?;
    let decay = param.group.weight_decay.unwrap_or(weight_decay);
    let correct = |beta: f64| 1.0 - beta.powf(steps as f64);
    let step = AdamStep {
        keep: (1.0 - lr * decay) as f32,
        rate: (lr / correct(beta1)) as f32,
        second: (1.0 / correct(beta2)) as f32,
        eps: eps as f32,
    };
    weight.inplace_op3(&first, &second, &Step(step))
}

fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let values = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => bail!("adamw: a tensor is not contiguous"),
    }
}

fn slice_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    let CpuStorage::F32(values) = storage else {
        bail!("adamw: a tensor is not f32")
    };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&mut values[start..end]),
        None => bail!("adamw: a tensor is not contiguous"),
    }
}

/// mean = beta mean + (1 - beta) x, or x².
struct Mean {
    beta: f64,
    square: bool,
}

impl InplaceOp2 for Mean {
    fn name(&self) -> &'static str {
        "running_mean"
    }

    fn cpu_fwd(
        &self,
        mean: &mut CpuStorage,
        l1: &Layout,
        x: &CpuStorage,
        l2: &Layout,
    ) -> Result<()> {
        let (mean, x) = (slice_mut(mean, l1)?, slice(x, l2)?);
        elementwise::running_mean(
            mean,
            x,
            self.beta as f32,
            (1.0 - self.beta) as f32,
            self.square,
        );
        Ok(())
    }
}

struct Step(AdamStep);

impl InplaceOp3 for Step {
    fn name(&self) -> &'static str {
        "adam_step"
    }

    fn cpu_fwd(
        &self,
        weight: &mut CpuStorage,
        l1: &Layout,
        first: &CpuStorage,
        l2: &Layout,
        second: &CpuStorage,
        l3: &Layout,
    ) -> Result<()> {
        elementwise::adam_step(
            slice_mut(weight, l1)?,
            slice(first, l2)?,
            slice(second, l3)?,
            &self.0,
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Optimizer, update};
    use super::*;
    use longspan_nn::params::ParamGroup;
    use std::collections::BTreeMap;

    #[test]
    fn steps_in_place_are_those_of_the_formula() {
        let device = candle_core::Device::Cpu;
        let value = |i: usize, salt: usize| ((i * 7919 + salt * 31) % 1009) as f32 / 504.5 - 1.0;
        let make = |salt: usize| {
            let values: Vec<f32> = (0..70_001).map(|i| value(i, salt)).collect();
            Tensor::from_vec(values, 70_001, &device).unwrap()
        };
        let config = OptimConfig::AdamW {
            lr: 0.01,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
        };
        let param = Param {
            var: Var::from_tensor(&make(0)).unwrap(),
            group: ParamGroup::default(),
        };
        let mut optimizer = Optimizer::new(config.clone()).unwrap();
        let (mut slot, mut weight) = (Slot::default(), make(0));
        for step in 1..4u64 {
            let gradient = make(step as usize);
            let gradients = BTreeMap::from([("w".to_string(), gradient.clone())]);
            optimizer
                .step(&[("w".into(), param.clone())], &gradients, 1.0)
                .unwrap();
            weight = update(&config, &param, &mut slot, &weight, &gradient, 0.01, step).unwrap();
            let found = param.var.as_detached_tensor();
            let worst = (found - &weight).unwrap().abs().unwrap().max_all().unwrap();
            assert!(worst.to_scalar::<f32>().unwrap() < 2e-6);
        }
        assert_eq!(optimizer.tensors()["first.w"].dims(), [70_001]);
    }
}
