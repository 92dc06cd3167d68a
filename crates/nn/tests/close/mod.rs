//! Tensors of golden cases, and how far two of them are apart.

use crate::golden::Case;
use candle_core::{DType, Device, Tensor};

/// A case's tensor as f32.
pub fn tensor(case: &Case, name: &str) -> Tensor {
    Tensor::from_vec(case.f32(name), case.shape(name), &Device::Cpu).unwrap()
}

/// All values in order.
pub fn flat(x: &Tensor) -> Vec<f64> {
    let x = x.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    x.to_vec1::<f64>().unwrap()
}

/// The largest absolute difference; NaN counts as infinite.
pub fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let pairs = flat(a).into_iter().zip(flat(b));
    pairs.fold(0.0, |m, (a, b)| {
        let d = if a == b { 0.0 } else { (a - b).abs() };
        if d.is_nan() { f64::INFINITY } else { m.max(d) }
    })
}
