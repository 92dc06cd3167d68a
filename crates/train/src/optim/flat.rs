//! AdamW on parameters of a GPU: all that share a type, a rate and a decay are stepped as one flat array, so that a step costs
//! some twenty operations and two copies for each parameter. The naive twin is the formula for one parameter.

use super::{OptimConfig, Slot};
use candle_core::{DType, Result, Shape, Tensor, bail};
use longspan_nn::params::Param;
use std::collections::BTreeMap;

/// Parameters that are stepped together, in this order, and their moments.
pub(super) struct Flat {
    parts: Vec<(String, Shape)>,
    first: Tensor,
    second: Tensor,
    /// f32 copy of parameters of lower precision.
    master: Option<Tensor>,
}

/// A parameter, its gradient, and where its state is kept.
pub(super) type Item<'a> = (&'a str, &'a Param, &'a Tensor);

/// Tensors one after the other, as f32.
pub(super) fn join<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Result<Tensor> {
    let flat = tensors.map(|t| t.detach().flatten_all()?.to_dtype(DType::F32)?.contiguous());
    Tensor::cat(&flat.collect::<Result<Vec<_>>>()?, 0)
}

/// The stretches of a flat array that belong to tensors of these shapes.
pub(super) fn cut<'a>(
    flat: &Tensor,
    shapes: impl Iterator<Item = &'a Shape>,
) -> Result<Vec<Tensor>> {
    let mut start = 0;
    shapes
        .map(|shape| {
            let count = shape.elem_count();
            start += count;
            flat.narrow(0, start - count, count)?.reshape(shape)
        })
        .collect()
}

impl Flat {
    /// Joins the state of these parameters, zero where there is none.
    fn new(items: &[Item<'_>], slots: &mut BTreeMap<String, Slot>) -> Result<Flat> {
        let mut parts = Vec::new();
        let (mut first, mut second, mut master) = (Vec::new(), Vec::new(), Vec::new());
        let low = matches!(items[0].1.var.dtype(), DType::BF16 | DType::F16);
        for (name, param, _) in items {
            let slot = slots.remove(*name).unwrap_or_default();
            let device = param.var.device();
            let zero = || Tensor::zeros(param.var.shape(), DType::F32, device);
            let there = |state: Option<Tensor>| match state {
                Some(state) => state.to_device(device),
                None => zero(),
            };
            first.push(there(slot.first)?);
            second.push(there(slot.second)?);
            if low {
                master.push(match slot.master {
                    Some(master) => master.to_device(device)?,
                    None => param.var.as_detached_tensor(),
                });
            }
            parts.push((name.to_string(), param.var.shape().clone()));
        }
        Ok(Flat {
            parts,
            first: join(first.iter())?,
            second: join(second.iter())?,
            master: low.then(|| join(master.iter())).transpose()?,
        })
    }

    fn holds(&self, items: &[Item<'_>]) -> bool {
        self.parts.len() == items.len()
            && self
                .parts
                .iter()
                .zip(items)
                .all(|(part, item)| part.0 == item.0)
    }

    /// State by parameter.
    pub(super) fn slots(&self) -> Result<Vec<(String, Slot)>> {
        let shapes = || self.parts.iter().map(|(_, shape)| shape);
        let mut masters = match &self.master {
            Some(master) => cut(master, shapes())?.into_iter().map(Some).collect(),
            None => vec![None; self.parts.len()],
        };
        let moments = cut(&self.first, shapes())?
            .into_iter()
            .zip(cut(&self.second, shapes())?);
        let parts = self.parts.iter().zip(moments).zip(masters.drain(..));
        Ok(parts
            .map(|(((name, _), (first, second)), master)| {
                let slot = Slot {
                    master,
                    first: Some(first),
                    second: Some(second),
                };
                (name.clone(), slot)
            })
            .collect())
    }
}

/// One step of all items, which have one type, device, rate and decay.
pub(super) fn adamw(
    config: &OptimConfig,
    items: &[Item<'_>],
    (flats, slots): (&mut Vec<Flat>, &mut BTreeMap<String, Slot>),
    (lr, decay): (f64, f64),
    steps: u64,
) -> Result<()> {
    let &OptimConfig::AdamW {
        beta1, beta2, eps, ..
    } = config
    else {
        bail!("adamw: another optimiser is configured")
    };
    let at = match flats.iter().position(|flat| flat.holds(items)) {
        Some(at) => at,
        None => {
            // Other parameters than before have gradients: what was joined is taken apart.
            for flat in std::mem::take(flats) {
                slots.extend(flat.slots()?);
            }
            flats.push(Flat::new(items, slots)?);
            flats.len() - 1
        }
    };
    let flat = &mut flats[at];
    let gradient = join(items.iter().map(|(_, _, gradient)| *gradient))?;
    let weight = match &flat.master {
        Some(master) => master.clone(),
        None => join(items.iter().map(|(_, param, _)| param.var.as_tensor()))?,
    };
    let correct = |beta: f64| 1.0 - beta.powf(steps as f64);
    flat.first = ((&flat.first * beta1)? + (&gradient * (1.0 - beta1))?)?;
    flat.second = ((&flat.second * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
    let root = (&flat.second * (1.0 / correct(beta2)))?.sqrt()?;
    let step = (&flat.first / (root + eps)?)?;
    // The decay uses the weight before the step.
    let weight = ((weight * (1.0 - lr * decay))? - (step * (lr / correct(beta1)))?)?;
    if flat.master.is_some() {
        flat.master = Some(weight.clone());
    }
    let stored = weight.to_dtype(items[0].1.var.dtype())?;
    let shapes = flat.parts.iter().map(|(_, shape)| shape);
    for ((_, param, _), part) in items.iter().zip(cut(&stored, shapes)?) {
        param.var.set(&part)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Optimizer;
    use super::*;
    use candle_core::{Device, Var};
    use longspan_kernels::composed::composing;
    use longspan_nn::params::ParamGroup;

    #[test]
    fn steps_together_are_those_of_each_parameter_and_state_is_stored_by_name() {
        let make = |count: usize, salt: usize| {
            let values: Vec<f32> = (0..count)
                .map(|i| ((i * 7919 + salt * 31) % 1009) as f32 / 504.5 - 1.0)
                .collect();
            Tensor::from_vec(values, count, &Device::Cpu).unwrap()
        };
        let params = || -> Vec<(String, Param)> {
            [("a", 7), ("b", 33), ("c", 5), ("d", 12)]
                .iter()
                .map(|&(name, count)| {
                    let group = if name == "c" {
                        ParamGroup::STATE_SPACE
                    } else {
                        ParamGroup::default()
                    };
                    let var = Var::from_tensor(&make(count, count)).unwrap();
                    (name.to_string(), Param { var, group })
                })
                .collect()
        };
        let config = OptimConfig::AdamW {
            lr: 0.01,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
        };
        let (each, together) = (params(), params());
        let mut one = Optimizer::new(config.clone()).unwrap();
        let mut other = Optimizer::new(config).unwrap();
        for step in 0..6 {
            let mut gradients: BTreeMap<String, Tensor> = each
                .iter()
                .map(|(name, p)| (name.clone(), make(p.var.elem_count(), 100 + step)))
                .collect();
            if step == 3 {
                // One has no gradient: what is stepped together changes.
                gradients.remove("b");
            }
            one.step(&each, &gradients, 1.0).unwrap();
            composing(|| other.step(&together, &gradients, 1.0)).unwrap();
        }
        let worst = |a: &Tensor, b: &Tensor| {
            let far = (a - b).unwrap().abs().unwrap().max_all().unwrap();
            far.to_scalar::<f32>().unwrap()
        };
        for ((_, a), (_, b)) in each.iter().zip(&together) {
            assert!(worst(a.var.as_tensor(), b.var.as_tensor()) < 1e-6);
        }
        let (a, b) = (one.tensors(), other.tensors());
        assert_eq!(a.len(), b.len());
        for (name, tensor) in &a {
            assert!(worst(tensor, &b[name]) < 1e-6, "{name}");
        }
    }
}
