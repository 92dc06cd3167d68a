//! What tests of kernels share: values without a pattern that are the same in every run, and how far tensors lie apart.

use candle_core::{DType, Device, Tensor};

/// f64 values from `low` to `high`, others for another `salt`.
pub fn tensor(shape: &[usize], salt: usize, low: f64, high: f64) -> Tensor {
    let count: usize = shape.iter().product();
    let values: Vec<f64> = (0..count)
        .map(|i| low + (high - low) * (((i * 7919 + salt * 104_729) % 1009) as f64 / 1009.0))
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Values of a tensor of f32 or f64.
pub fn flat(x: &Tensor) -> Vec<f64> {
    let x = x.to_dtype(DType::F64).unwrap();
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest absolute value; not a number when there is one.
pub fn largest(x: &Tensor) -> f64 {
    let larger = |most: f64, value: f64| match most.is_nan() || value.is_nan() {
        true => f64::NAN,
        false => most.max(value.abs()),
    };
    flat(x).into_iter().fold(0.0, larger)
}

/// The largest absolute difference.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    largest(&(a - b).unwrap())
}
