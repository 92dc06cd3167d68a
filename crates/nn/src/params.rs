//! Parameters of a model that learns: variables by name, made from a seed or taken from a checkpoint.
//!
//! A model asks for its parameters by the names of the reference it follows, with shape and initial distribution; the
//! store draws each from a stream of its own (seed and name), so that adding a layer changes no other layer's start.

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use longspan_data::random::Random;
use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;

/// How a parameter starts.
#[derive(Clone, Debug, PartialEq)]
pub enum Init {
    /// All elements this value.
    Constant(f64),
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// Uniform in low..high.
    Uniform {
        /// Smallest value.
        low: f64,
        /// Largest value.
        high: f64,
    },
    /// These values, row-major.
    Values(Vec<f64>),
}

/// How the optimiser treats a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ParamGroup {
    /// The learning rate is at most this, whatever the run's is (state-space parameters).
    pub max_lr: Option<f64>,
    /// Weight decay instead of the run's.
    pub weight_decay: Option<f64>,
    /// False: kept as it is.
    pub trainable: bool,
}

impl Default for ParamGroup {
    fn default() -> Self {
        ParamGroup {
            max_lr: None,
            weight_decay: None,
            trainable: true,
        }
    }
}

impl ParamGroup {
    /// The group of state-space parameters in S4: learning rate at most 1e-3, no decay.
    pub const STATE_SPACE: ParamGroup = ParamGroup {
        max_lr: Some(1e-3),
        weight_decay: Some(0.0),
        trainable: true,
    };
    /// No weight decay: norms, biases.
    pub const NO_DECAY: ParamGroup = ParamGroup {
        max_lr: None,
        weight_decay: Some(0.0),
        trainable: true,
    };
}

/// One variable and its group.
#[derive(Clone, Debug)]
pub struct Param {
    /// The values; gradients are looked up by it.
    pub var: Var,
    /// How it is optimised.
    pub group: ParamGroup,
}

/// All parameters of a model.
pub struct ParamStore {
    params: Mutex<BTreeMap<String, Param>>,
    /// Tensors of a checkpoint; none = draw.
    given: Option<HashMap<String, Tensor>>,
    /// No gradients will be asked: tensors are handed out untracked.
    frozen: bool,
    seed: u64,
    dtype: DType,
    device: Device,
}

impl ParamStore {
    /// Parameters are drawn from `seed`.
    pub fn new(seed: u64, dtype: DType, device: &Device) -> Self {
        ParamStore {
            params: Mutex::default(),
            given: None,
            frozen: false,
            seed,
            dtype,
            device: device.clone(),
        }
    }

    /// Parameters are those of a checkpoint; asking for one that is absent is an error. Tensors of other types are
    /// converted to `dtype`.
    pub fn from_tensors(tensors: HashMap<String, Tensor>, dtype: DType, device: &Device) -> Self {
        ParamStore {
            params: Mutex::default(),
            given: Some(tensors),
            frozen: false,
            seed: 0,
            dtype,
            device: device.clone(),
        }
    }

    /// The same store for a model that only reads and writes: gradients stop at its parameters, so that no graph grows.
    pub fn frozen(mut self) -> Self {
        self.frozen = true;
        self
    }

    /// The name space of the whole model.
    pub fn root(&self) -> Params<'_> {
        Params {
            store: self,
            prefix: String::new(),
        }
    }

    /// Where parameters live.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// All parameters by name, in the order of names.
    pub fn list(&self) -> Vec<(String, Param)> {
        self.locked()
            .iter()
            .map(|(name, param)| (name.clone(), param.clone()))
            .collect()
    }

    /// Number of values that are trained.
    pub fn count(&self) -> usize {
        let params = self.locked();
        params
            .values()
            .filter(|param| param.group.trainable)
            .map(|param| param.var.elem_count())
            .sum()
    }

    /// The tensors by name: models built from these see every later change.
    pub fn tensors(&self) -> HashMap<String, Tensor> {
        self.locked()
            .iter()
            .map(|(name, param)| (name.clone(), param.var.as_tensor().clone()))
            .collect()
    }

    /// Sets all parameters to the values of a checkpoint.
    ///
    /// # Errors
    /// Names the tensor that is absent or has another shape; then nothing has changed.
    pub fn load(&self, tensors: &HashMap<String, Tensor>) -> Result<()> {
        let params = self.locked();
        for (name, param) in params.iter() {
            match tensors.get(name) {
                Some(tensor) if tensor.dims() == param.var.dims() => {}
                Some(tensor) => bail!(
                    "tensor {name}: found shape {:?}, expected {:?}",
                    tensor.dims(),
                    param.var.dims()
                ),
                None => bail!("tensor {name} is missing"),
            }
        }
        for (name, param) in params.iter() {
            let tensor = tensors[name].to_dtype(param.var.dtype())?;
            param.var.set(&tensor.to_device(&self.device)?)?;
        }
        Ok(())
    }

    /// Changes the group of every parameter for which `choose` gives one.
    pub fn regroup(&self, choose: impl Fn(&str, ParamGroup) -> Option<ParamGroup>) {
        for (name, param) in self.locked().iter_mut() {
            if let Some(group) = choose(name, param.group) {
                param.group = group;
            }
        }
    }

    fn handed(&self, var: &Var) -> Tensor {
        if self.frozen {
            var.as_detached_tensor()
        } else {
            var.as_tensor().clone()
        }
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Param>> {
        self.params
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }
}

/// A name space in a [`ParamStore`].
#[derive(Clone)]
pub struct Params<'a> {
    store: &'a ParamStore,
    prefix: String,
}

impl<'a> Params<'a> {
    /// The name space `name` inside this one.
    pub fn at(&self, name: impl std::fmt::Display) -> Params<'a> {
        Params {
            store: self.store,
            prefix: self.full(&name.to_string()),
        }
    }

    /// A parameter of this shape. The tensor is tracked: gradients reach it, and it shows later updates.
    ///
    /// # Errors
    /// With a checkpoint: the tensor is absent or has another shape.
    pub fn get(&self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        self.get_in(name, shape, init, ParamGroup::default())
    }

    /// As [`get`](Self::get), in a group.
    pub fn get_in(
        &self,
        name: &str,
        shape: &[usize],
        init: Init,
        group: ParamGroup,
    ) -> Result<Tensor> {
        let full = self.full(name);
        let mut params = self.store.locked();
        if let Some(param) = params.get(&full) {
            if param.var.dims() != shape {
                bail!(
                    "tensor {full}: found shape {:?}, expected {shape:?}",
                    param.var.dims()
                );
            }
            return Ok(self.store.handed(&param.var));
        }
        let values = match &self.store.given {
            Some(given) => match given.get(&full) {
                Some(tensor) if tensor.dims() == shape => tensor.to_device(&self.store.device)?,
                Some(tensor) => bail!(
                    "tensor {full}: found shape {:?}, expected {shape:?}",
                    tensor.dims()
                ),
                None => bail!("tensor {full} is missing"),
            },
            None => {
                let values = draw(&init, shape, self.store.seed, &full)?;
                Tensor::from_vec(values, shape, &self.store.device)?
            }
        };
        let var = Var::from_tensor(&values.to_dtype(self.store.dtype)?.detach().copy()?)?;
        let tensor = self.store.handed(&var);
        params.insert(full, Param { var, group });
        Ok(tensor)
    }

    /// Whether a checkpoint holds this tensor; false when parameters are drawn.
    pub fn given(&self, name: &str) -> bool {
        let full = self.full(name);
        let given = self.store.given.as_ref();
        given.is_some_and(|given| given.contains_key(&full))
    }

    /// A tensor of a checkpoint that is no parameter (a table, a count), as stored.
    pub fn constant(&self, name: &str) -> Option<Tensor> {
        self.store.given.as_ref()?.get(&self.full(name)).cloned()
    }

    /// The seed parameters are drawn from.
    pub fn seed(&self) -> u64 {
        self.store.seed
    }

    /// A generator for initial values that are computed rather than drawn element by element.
    pub fn random(&self, name: &str) -> Random {
        Random::new(self.store.seed, &self.full(name))
    }

    /// The type of parameters.
    pub fn dtype(&self) -> DType {
        self.store.dtype
    }

    /// Where parameters live.
    pub fn device(&self) -> &Device {
        &self.store.device
    }

    /// The full name of `name`.
    pub fn full(&self, name: &str) -> String {
        if self.prefix.is_empty() {
            name.to_string()
        } else if name.is_empty() {
            self.prefix.clone()
        } else {
            format!("{}.{name}", self.prefix)
        }
    }
}

fn draw(init: &Init, shape: &[usize], seed: u64, name: &str) -> Result<Vec<f64>> {
    let count = shape.iter().product::<usize>();
    let mut random = Random::new(seed, name);
    Ok(match init {
        Init::Constant(value) => vec![*value; count],
        Init::Normal { std } => (0..count).map(|_| std * random.normal()).collect(),
        Init::Uniform { low, high } => (0..count).map(|_| random.range(*low, *high)).collect(),
        Init::Values(values) if values.len() == count => values.clone(),
        Init::Values(values) => bail!(
            "tensor {name}: found {} initial values, expected {count} for {shape:?}",
            values.len()
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_repeat_by_name_and_are_shared() {
        let make = || ParamStore::new(3, DType::F32, &Device::Cpu);
        let (a, b) = (make(), make());
        b.root()
            .at("other")
            .get("x", &[5], Init::Normal { std: 1.0 })
            .unwrap();
        let init = || Init::Normal { std: 0.5 };
        let x = a.root().at("layer").get("w", &[2, 3], init()).unwrap();
        let y = b.root().at("layer").get("w", &[2, 3], init()).unwrap();
        assert_eq!(
            x.to_vec2::<f32>().unwrap(),
            y.to_vec2::<f32>().unwrap(),
            "another parameter changed this one's start"
        );
        let again = a.root().at("layer").get("w", &[2, 3], init()).unwrap();
        assert_eq!(again.id(), x.id());
        assert!(a.root().at("layer").get("w", &[6], init()).is_err());
        assert_eq!(a.count(), 6);
    }

    #[test]
    fn checkpoints_are_checked_and_loaded_whole() {
        let store = ParamStore::new(0, DType::F32, &Device::Cpu);
        let w = store.root().get("w", &[2], Init::Constant(1.0)).unwrap();
        store.root().get("v", &[1], Init::Constant(2.0)).unwrap();
        let new = |list: &[f32]| Tensor::new(list, &Device::Cpu).unwrap();
        let partial = HashMap::from([("w".to_string(), new(&[5.0, 6.0]))]);
        let error = store.load(&partial).unwrap_err().to_string();
        assert!(error.contains("v is missing"), "{error}");
        assert_eq!(w.to_vec1::<f32>().unwrap(), [1.0, 1.0]);
        let whole = HashMap::from([
            ("w".to_string(), new(&[5.0, 6.0])),
            ("v".to_string(), new(&[7.0])),
        ]);
        store.load(&whole).unwrap();
        assert_eq!(w.to_vec1::<f32>().unwrap(), [5.0, 6.0]);
        let read = ParamStore::from_tensors(whole, DType::F32, &Device::Cpu);
        assert!(read.root().get("x", &[1], Init::Constant(0.0)).is_err());
        assert!(read.root().given("v") && !read.root().given("x"));
    }
}
