//! Operations of candle's graph whose gradients meet beside it.
//!
//! Candle's backward pass adds every gradient to zeros as large as itself, which on large tensors takes longer than many an
//! operation. Here the graph holds a number for an operation; its outputs hang on the number, and an operation of this kind
//! that reads such an output depends on the number alone and leaves its gradient in the output's [`Slot`], the first one as it
//! is. Candle still says in which order backward passes run, and its own operations may read the outputs as well.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Storage,
    Tensor, TensorId, bail,
};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Where the gradients of a tensor meet.
#[derive(Default)]
struct Slot(Mutex<Option<Tensor>>);

impl Slot {
    fn add(&self, gradient: Tensor) -> Result<()> {
        let mut held = lock(&self.0);
        *held = Some(match held.take() {
            Some(sum) => (sum + gradient)?,
            None => gradient,
        });
        Ok(())
    }

    fn take(&self) -> Option<Tensor> {
        lock(&self.0).take()
    }
}

/// How an output is reached from operations that read it.
struct Channel {
    /// What they depend on.
    number: Tensor,
    slot: Arc<Slot>,
}

/// Outputs of this thread's operations that exist. One that another thread made is an ordinary tensor of the graph.
#[derive(Default)]
struct Known {
    channels: HashMap<TensorId, Weak<Channel>>,
    /// Entries at which those of dropped tensors are taken out.
    most: usize,
}

thread_local! {
    static KNOWN: RefCell<Known> = RefCell::default();
}

fn remember(output: &Tensor, channel: &Arc<Channel>) {
    KNOWN.with_borrow_mut(|known| {
        if known.channels.len() >= known.most {
            known
                .channels
                .retain(|_, channel| channel.strong_count() > 0);
            known.most = 2 * known.channels.len() + 64;
        }
        known.channels.insert(output.id(), Arc::downgrade(channel));
    });
}

fn channel(x: &Tensor) -> Option<Arc<Channel>> {
    KNOWN.with_borrow(|known| known.channels.get(&x.id()).and_then(Weak::upgrade))
}

/// Where the gradient of an input goes.
enum Way {
    /// It is a constant.
    Nowhere,
    /// To the slot; the graph gets a number, whose value nobody reads.
    Slot(Arc<Slot>, Tensor),
    /// To the graph: a variable, or the output of one of candle's operations.
    Graph(Tensor),
}

/// The inputs of an operation, seen from its backward pass.
struct Inputs(Vec<Way>);

impl Inputs {
    /// Beside the inputs, what the operation depends on in the graph.
    fn new(inputs: &[&Tensor]) -> (Self, Vec<Tensor>) {
        let mut arguments = Vec::new();
        let mut way = |&x: &&Tensor| {
            if !x.track_op() {
                return Way::Nowhere;
            }
            match channel(x) {
                Some(channel) => {
                    arguments.push(channel.number.clone());
                    Way::Slot(channel.slot.clone(), channel.number.detach())
                }
                None => {
                    arguments.push(x.clone());
                    Way::Graph(x.detach())
                }
            }
        };
        let ways = inputs.iter().map(&mut way).collect();
        (Inputs(ways), arguments)
    }

    /// From a gradient for each input to one for each argument in the graph.
    fn send(&self, gradients: Vec<Option<Tensor>>) -> Result<Vec<Tensor>> {
        let mut arguments = Vec::new();
        for (way, gradient) in self.0.iter().zip(gradients) {
            match (way, gradient) {
                (Way::Nowhere, _) => {}
                (Way::Slot(slot, number), gradient) => {
                    if let Some(gradient) = gradient {
                        slot.add(gradient)?;
                    }
                    arguments.push(number.clone());
                }
                (Way::Graph(_), Some(gradient)) => arguments.push(gradient),
                (Way::Graph(x), None) => arguments.push(x.zeros_like()?),
            }
        }
        Ok(arguments)
    }
}

/// Makes these elements the outputs of an operation. `back` gets the outputs and their gradients (none: nothing came of the
/// output) and gives the gradient of each input; those of constants are not looked at. One input at least is no constant.
pub(crate) fn attach(
    name: &'static str,
    inputs: &[&Tensor],
    outputs: Vec<(Storage, Shape)>,
    back: impl Fn(&[Tensor], &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
) -> Result<Vec<Tensor>> {
    let (inputs, arguments) = Inputs::new(inputs);
    let slots: Vec<Arc<Slot>> = outputs.iter().map(|_| Arc::default()).collect();
    let values: Arc<OnceLock<Vec<Tensor>>> = Arc::default();
    let pull = {
        let (slots, values) = (slots.clone(), values.clone());
        move || {
            let gradients: Vec<Option<Tensor>> = slots.iter().map(|slot| slot.take()).collect();
            let values = values.get().map_or(&[][..], Vec::as_slice);
            inputs.send(back(values, &gradients)?)
        }
    };
    let number = number(name, &arguments, Box::new(pull))?;
    let output = |((storage, shape), slot): ((Storage, Shape), Arc<Slot>)| {
        let number = number.clone();
        let channel = Arc::new(Channel { number, slot });
        let output = channel.number.apply_op1(Output {
            name,
            elements: Mutex::new(Some(storage)),
            shape,
            channel: channel.clone(),
        })?;
        remember(&output, &channel);
        Ok(output)
    };
    let outputs: Vec<Tensor> =
        (outputs.into_iter().zip(slots).map(output)).collect::<Result<_>>()?;
    values.get_or_init(|| outputs.iter().map(Tensor::detach).collect());
    Ok(outputs)
}

/// A number whose gradient gives `x` this gradient, of its shape: where a backward pass goes on from another graph.
pub fn seeded(x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    if x.dims() != gradient.dims() {
        bail!(
            "seeded: found a gradient {:?} of {:?}, expected the same shape",
            gradient.dims(),
            x.dims()
        );
    }
    let (inputs, arguments) = Inputs::new(&[x]);
    if arguments.is_empty() {
        return Tensor::zeros(1, x.dtype(), x.device());
    }
    let gradient = gradient.detach();
    let pull = move || inputs.send(vec![Some(gradient.clone())]);
    number("seeded", &arguments, Box::new(pull))
}

/// Gives the gradient of each argument.
type Pull = Box<dyn Fn() -> Result<Vec<Tensor>> + Send + Sync>;

/// A number that depends on all these tensors. Candle's operations have up to three inputs: further ones come through a second
/// number, whose backward pass runs after that of the first.
fn number(name: &'static str, arguments: &[Tensor], pull: Pull) -> Result<Tensor> {
    match arguments {
        [] => bail!("{name}: all inputs are constants"),
        [a] => a.apply_op1(Number { name, pull }),
        [a, b] => a.apply_op2(b, Number { name, pull }),
        [a, b, c] => a.apply_op3(b, c, Number { name, pull }),
        [a, b, rest @ ..] => {
            let late: Arc<Mutex<Vec<Tensor>>> = Arc::default();
            let left = late.clone();
            let others = number(
                name,
                rest,
                Box::new(move || Ok(std::mem::take(&mut lock(&left)))),
            )?;
            let nothing = others.detach();
            let pull = Box::new(move || {
                let mut gradients = pull()?;
                *lock(&late) = gradients.split_off(2);
                gradients.push(nothing.clone());
                Ok(gradients)
            });
            a.apply_op3(b, &others, Number { name, pull })
        }
    }
}

struct Number {
    name: &'static str,
    pull: Pull,
}

impl Number {
    fn gradients(&self) -> Result<impl FnMut() -> Option<Tensor>> {
        let mut gradients = (self.pull)()?.into_iter();
        Ok(move || gradients.next())
    }
}

fn on_cpu(like: &CpuStorage) -> Result<(CpuStorage, Shape)> {
    let shape = Shape::from(1);
    let device = BackendStorage::device(like);
    Ok((device.zeros_impl(&shape, like.dtype())?, shape))
}

fn on_gpu(like: &CudaStorage) -> Result<(CudaStorage, Shape)> {
    let shape = Shape::from(1);
    // SAFETY: its value is added to other such values and never looked at.
    let storage = unsafe { like.device().alloc_uninit(&shape, like.dtype())? };
    Ok((storage, shape))
}

impl CustomOp1 for Number {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, a: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        on_cpu(a)
    }

    fn cuda_fwd(&self, a: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        on_gpu(a)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.gradients()?())
    }
}

impl CustomOp2 for Number {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        on_cpu(a)
    }

    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        on_gpu(a)
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut next = self.gradients()?;
        Ok((next(), next()))
    }
}

impl CustomOp3 for Number {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        on_cpu(a)
    }

    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        on_gpu(a)
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut next = self.gradients()?;
        Ok((next(), next(), next()))
    }
}

/// An output for candle's operations.
struct Output {
    name: &'static str,
    /// Until candle has taken them.
    elements: Mutex<Option<Storage>>,
    shape: Shape,
    channel: Arc<Channel>,
}

impl Output {
    fn elements<S>(&self, of: impl FnOnce(Storage) -> Option<S>) -> Result<(S, Shape)> {
        match lock(&self.elements).take().and_then(of) {
            Some(storage) => Ok((storage, self.shape.clone())),
            None => bail!(
                "{}: its inputs and its output lie on different devices",
                self.name
            ),
        }
    }
}

impl CustomOp1 for Output {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.elements(|storage| match storage {
            Storage::Cpu(storage) => Some(storage),
            _ => None,
        })
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.elements(|storage| match storage {
            Storage::Cuda(storage) => Some(storage),
            _ => None,
        })
    }

    fn bwd(&self, number: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        self.channel.slot.add(gradient.clone())?;
        Ok(Some(number.detach()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    /// Twice the sum of all inputs, and the first one.
    fn doubled(inputs: &[&Tensor]) -> Result<[Tensor; 2]> {
        let values = inputs.iter().map(|x| x.to_vec1::<f64>());
        let values = values.collect::<Result<Vec<_>>>()?;
        let sums = (0..values[0].len()).map(|i| 2.0 * values.iter().map(|x| x[i]).sum::<f64>());
        let first = CpuStorage::F64(values[0].clone());
        let outputs = [CpuStorage::F64(sums.collect()), first]
            .map(|storage| (Storage::Cpu(storage), inputs[0].shape().clone()));
        let count = inputs.len();
        let outputs = attach("doubled", inputs, outputs.into(), move |_, gradients| {
            let [sum, first] = gradients else {
                bail!("found {} gradients", gradients.len())
            };
            let of = |i: usize| -> Result<Option<Tensor>> {
                let doubled = sum.as_ref().map(|g| g * 2.0).transpose()?;
                Ok(match (doubled, first) {
                    (Some(doubled), Some(first)) if i == 0 => Some((doubled + first)?),
                    (None, Some(first)) if i == 0 => Some(first.clone()),
                    (doubled, _) => doubled,
                })
            };
            (0..count).map(of).collect()
        })?;
        Ok([outputs[0].clone(), outputs[1].clone()])
    }

    fn var(values: &[f64]) -> Result<Var> {
        Var::from_tensor(&Tensor::new(values, &Device::Cpu)?)
    }

    fn gradient(loss: &Tensor, x: &Var) -> Result<Vec<f64>> {
        let gradients = loss.backward()?;
        match gradients.get(x) {
            Some(gradient) => gradient.to_vec1(),
            None => Ok(vec![0.0; x.elem_count()]),
        }
    }

    #[test]
    fn gradients_of_all_readers_meet() -> Result<()> {
        let x = var(&[1.0, -2.0])?;
        let scale = Tensor::new(&[3.0, 5.0], &Device::Cpu)?;
        // y = 2 x is read by candle twice, by an operation twice over, and by one more.
        let y = &doubled(&[&x])?[0];
        let [z, first] = doubled(&[y, y])?; // 8 x, 2 x
        let loss = ((y * &scale)? + (y + &z)?)?;
        let loss = ((loss + &first)? + &doubled(&[y])?[0])?.sum_all()?; // 6 x, 2 x + 8 x, 2 x, 4 x
        assert_eq!(gradient(&loss, &x)?, [6.0 + 16.0, 10.0 + 16.0]);
        // Again on the same graph: nothing is left from before.
        assert_eq!(gradient(&loss, &x)?, [22.0, 26.0]);
        Ok(())
    }

    #[test]
    fn any_number_of_inputs_and_unread_outputs() -> Result<()> {
        let vars: Vec<Var> = (1..=9)
            .map(|i| var(&[f64::from(i)]))
            .collect::<Result<_>>()?;
        let constant = Tensor::new(&[10.0], &Device::Cpu)?;
        for count in 1..=9 {
            let made = vars
                .iter()
                .map(|x| Ok(doubled(&[x.as_tensor()])?[0].clone()));
            let mut made = made.collect::<Result<Vec<_>>>()?;
            // Variables, outputs and a constant side by side.
            for (at, x) in made.iter_mut().enumerate().step_by(2) {
                *x = vars[at].as_tensor().clone();
            }
            let inputs: Vec<&Tensor> = made[..count].iter().chain([&constant]).collect();
            let [sum, first] = doubled(&inputs)?;
            let gradients = sum.backward()?;
            for (at, x) in vars.iter().enumerate() {
                let expected = match at {
                    at if at >= count => None,
                    at if at % 2 == 0 => Some(vec![2.0]),
                    _ => Some(vec![4.0]),
                };
                let found = gradients.get(x).map(Tensor::to_vec1::<f64>).transpose()?;
                assert_eq!(found, expected, "{count} inputs, the one at {at}");
            }
            assert_eq!(gradient(&first, &vars[0])?, [1.0]);
        }
        Ok(())
    }

    #[test]
    fn a_backward_pass_goes_on_from_a_gradient() -> Result<()> {
        let x = var(&[1.0, 2.0])?;
        let y = &doubled(&[&x])?[0];
        let given = Tensor::new(&[0.5, -1.0], &Device::Cpu)?;
        for y in [y.clone(), (y + 1.0)?] {
            assert_eq!(gradient(&seeded(&y, &given)?, &x)?, [1.0, -2.0]);
        }
        assert!(seeded(&y.detach(), &given)?.backward()?.get(&x).is_none());
        assert!(seeded(y, &given.narrow(0, 0, 1)?).is_err());
        Ok(())
    }

    #[test]
    fn outputs_of_another_thread_and_dropped_ones() -> Result<()> {
        let x = var(&[1.0])?;
        let there = std::thread::scope(|scope| scope.spawn(|| doubled(&[&x])).join());
        let y = &there.map_err(|_| candle_core::Error::msg("panicked"))??[0];
        let z = &doubled(&[y])?[0];
        assert_eq!(gradient(&z.sum_all()?, &x)?, [4.0]);
        for _ in 0..1000 {
            doubled(&[&x])?;
        }
        KNOWN.with_borrow(|known| assert!(known.channels.len() < 200));
        Ok(())
    }
}
