//! Truncated back-propagation through time (paper 15): a long sequence in windows; the state is carried on, its gradient is
//! not. A window of the whole length is back-propagation through time.

use crate::error::{Result, TrainError};
use candle_core::Tensor;
use candle_core::backprop::GradStore;
use longspan_nn::mixer::SequenceMixer;

/// Loss and gradients of a sequence x [batch, length, width] read in windows of `k` steps.
///
/// `loss(y, start)` is a window's share of the loss, given its outputs y [batch, at most k, width] and its first step; shares
/// add up, so divide each by what the whole sequence is divided by.
///
/// # Errors
/// `k` = 0; a mixer whose gradients do not pass, or that looks both ways.
pub fn truncated_bptt(
    mixer: &dyn SequenceMixer,
    x: &Tensor,
    k: usize,
    loss: &dyn Fn(&Tensor, usize) -> candle_core::Result<Tensor>,
) -> Result<(f64, GradStore)> {
    if k == 0 {
        return Err(TrainError::option("k", 0, "1 or more"));
    }
    let (batch, length, _) = x.dims3()?;
    let mut state = mixer.init_state(batch)?;
    let (mut total, mut store) = (0.0, GradStore::default());
    for start in (0..length).step_by(k) {
        let window = x.narrow(1, start, k.min(length - start))?;
        let (y, next) = mixer.forward(&window, Some(&state))?;
        if let Some(next) = next {
            state = next.detach();
        }
        let share = loss(&y, start)?;
        total += share
            .to_dtype(candle_core::DType::F64)?
            .to_scalar::<f64>()?;
        store.extend(share.backward()?)?;
    }
    Ok((total, store))
}
