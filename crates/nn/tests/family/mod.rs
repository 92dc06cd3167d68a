//! What tests against goldens of sequence mixers share.
#![allow(dead_code)]

#[path = "../../../../tests/golden.rs"]
pub mod golden;

use candle_core::{DType, Device, Tensor};
use golden::Case;
use longspan_nn::params::ParamStore;
use std::collections::HashMap;

pub fn tensor(case: &Case, name: &str, dtype: DType) -> Tensor {
    let tensor = Tensor::from_vec(case.f64(name), case.shape(name), &Device::Cpu).unwrap();
    tensor.to_dtype(dtype).unwrap()
}

/// In f64.
pub fn t(case: &Case, name: &str) -> Tensor {
    tensor(case, name, DType::F64)
}

pub fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F64, &Device::Cpu).unwrap()
}

/// The allowed error of a tensor relative to its largest magnitude: the most specific pattern of `rel_max_tol`.
pub fn rel_max_tol(case: &Case, name: &str) -> f64 {
    let fits = |pattern: &str| match pattern.split_once('*') {
        None => pattern == name,
        Some((start, end)) => name.starts_with(start) && name.ends_with(end),
    };
    let rules = case.meta("rel_max_tol").as_object().unwrap();
    let best = rules.iter().filter(|(pattern, _)| fits(pattern));
    let best = best.max_by_key(|(pattern, _)| (!pattern.contains('*'), pattern.len()));
    best.unwrap_or_else(|| panic!("{:?}: no tolerance for {name}", case.path))
        .1
        .as_f64()
        .unwrap()
}

pub fn near(case: &Case, name: &str, found: &Tensor) {
    let largest = case.f64(name).iter().fold(0f64, |m, v| m.max(v.abs()));
    let allowed = rel_max_tol(case, name) * largest;
    assert_eq!(found.elem_count(), case.f64(name).len(), "{name}");
    let found = found.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    case.assert_within(name, &found.to_vec1::<f64>().unwrap(), |_, _| allowed);
}

pub fn largest(x: &Tensor) -> f64 {
    let x = x.abs().unwrap().flatten_all().unwrap();
    x.to_dtype(DType::F64)
        .unwrap()
        .max_all()
        .unwrap()
        .to_scalar()
        .unwrap()
}

pub fn wave(shape: &[usize], salt: usize) -> Tensor {
    let count: usize = shape.iter().product();
    let values: Vec<f64> = (0..count)
        .map(|i| ((i * 7919 + salt * 104_729) % 1009) as f64 / 504.5 - 1.0)
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

pub fn given<const N: usize>(tensors: [(&str, Tensor); N]) -> ParamStore {
    let tensors: HashMap<String, Tensor> = tensors
        .into_iter()
        .map(|(name, t)| (name.to_string(), t))
        .collect();
    ParamStore::from_tensors(tensors, DType::F64, &Device::Cpu)
}

pub fn sibling(case: &Case, key: &str) -> Case {
    let file = case.meta(key).as_str().unwrap().to_string();
    let mut all = golden::cases(&case.paper);
    all.retain(|c| c.path.file_name().is_some_and(|name| name == file.as_str()));
    all.pop().unwrap_or_else(|| panic!("no {file}"))
}
