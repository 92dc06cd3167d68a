//! Every operation composed of candle's against its kernel: values, and the gradients of all inputs, in f64 and f32, on
//! ragged shapes.

use candle_core::{DType, Device, Result, Tensor, Var};
use longspan_kernels::autograd::softplus;
use longspan_kernels::causal::causal_attention;
use longspan_kernels::composed::{composing, rows};
use longspan_kernels::fftconv::fft_conv;
use longspan_kernels::learn::{depthwise_conv, rms_norm, silu_gate, softmax};
use longspan_kernels::linear::linear;
use longspan_kernels::s4::{Discretisation, diagonal_kernel};
use longspan_kernels::selective::SelectiveScan;
use longspan_kernels::ssd::Scan;
use longspan_kernels::vandermonde::vandermonde;

/// Values in low..high.
fn tensor(shape: &[usize], salt: usize, low: f64, high: f64) -> Tensor {
    let count: usize = shape.iter().product();
    let values: Vec<f64> = (0..count)
        .map(|i| low + (high - low) * (((i * 7919 + salt * 104_729) % 1009) as f64 / 1009.0))
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn t(shape: &[usize], salt: usize) -> Tensor {
    tensor(shape, salt, -1.5, 1.5)
}

fn flat(x: &Tensor) -> Vec<f64> {
    let x = x.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    x.to_vec1().unwrap()
}

fn near(found: &Tensor, wanted: &Tensor, bound: f64, what: &str) {
    assert_eq!(found.dims(), wanted.dims(), "{what}");
    let (found, wanted) = (flat(found), flat(wanted));
    let largest = wanted.iter().fold(1e-3f64, |m, x| m.max(x.abs()));
    for (at, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
        assert!(
            (found - wanted).abs() <= bound * largest,
            "{what}, element {at}: {found}, expected {wanted} within {bound} of {largest}"
        );
    }
}

/// The outputs, weighted and summed: what gradients are taken of.
fn weighted(outputs: &[Tensor]) -> Result<Tensor> {
    let mut sum = Tensor::zeros((), outputs[0].dtype(), &Device::Cpu)?;
    for y in outputs {
        let weights = tensor(&[y.elem_count()], 5, -1.0, 1.0).to_dtype(y.dtype())?;
        sum = (sum + (y.flatten_all()? * weights)?.sum_all()?)?;
    }
    Ok(sum)
}

fn agree(what: &str, inputs: &[Tensor], f: &dyn Fn(&[Tensor]) -> Result<Vec<Tensor>>) {
    for (dtype, bound) in [(DType::F64, 1e-10), (DType::F32, 1e-4)] {
        let vars: Vec<Var> = inputs
            .iter()
            .map(|x| Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap())
            .collect();
        let tracked: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let kernel = f(&tracked).unwrap();
        let composed = composing(|| f(&tracked)).unwrap();
        for (index, (a, b)) in composed.iter().zip(&kernel).enumerate() {
            near(a, b, bound, &format!("{what}, {dtype:?}, output {index}"));
        }
        let kernel = weighted(&kernel).unwrap().backward().unwrap();
        let composed = composing(|| weighted(&composed).unwrap().backward()).unwrap();
        for (index, var) in vars.iter().enumerate() {
            let what = format!("{what}, {dtype:?}, gradient {index}");
            let (a, b) = (composed.get(var.as_tensor()), kernel.get(var.as_tensor()));
            near(a.expect(&what), b.expect(&what), bound, &what);
        }
    }
}

#[test]
fn norms_gates_and_projections() {
    agree("rms_norm", &[t(&[3, 5, 19], 1), t(&[19], 2)], &|x| {
        Ok(vec![rms_norm(&x[0], &x[1], 1e-5)?])
    });
    agree("softmax", &[t(&[3, 4, 21], 1)], &|x| {
        Ok(vec![softmax(&x[0])?])
    });
    agree("silu_gate", &[t(&[7, 13], 1), t(&[7, 13], 2)], &|x| {
        Ok(vec![silu_gate(&x[0], Some(&x[1]))?])
    });
    agree("silu", &[t(&[7, 13], 1)], &|x| {
        Ok(vec![silu_gate(&x[0], None)?])
    });
    agree(
        "linear",
        &[t(&[2, 5, 7], 1), t(&[11, 7], 2), t(&[11], 3)],
        &|x| Ok(vec![linear(&x[0], &x[1], Some(&x[2]))?]),
    );
    agree("turned input", &[t(&[7, 9], 1), t(&[3, 7], 2)], &|x| {
        Ok(vec![linear(&x[0].t()?, &x[1], None)?])
    });
    for taps in [1, 2, 4] {
        let inputs = [t(&[2, taps + 6, 5], 1), t(&[5, taps], 2), t(&[5], 3)];
        agree("depthwise_conv", &inputs, &|x| {
            Ok(vec![depthwise_conv(&x[0], &x[1], Some(&x[2]))?])
        });
        agree("depthwise_conv without bias", &inputs[..2], &|x| {
            Ok(vec![depthwise_conv(&x[0], &x[1], None)?])
        });
    }
    let ids: Vec<u32> = (0..200)
        .map(|i| if i % 3 == 0 { 4 } else { i * 7 % 11 })
        .collect();
    agree("rows", &[t(&[13, 6], 1)], &|x| Ok(vec![rows(&x[0], &ids)?]));
}

#[test]
fn softplus_keeps_small_values() {
    let x = tensor(&[4, 25], 1, -30.0, 30.0)
        .to_dtype(DType::F32)
        .unwrap();
    let (kernel, composed) = (softplus(&x).unwrap(), composing(|| softplus(&x)).unwrap());
    for (found, wanted) in flat(&composed).iter().zip(flat(&kernel)) {
        assert!((found - wanted).abs() <= 1e-4 * wanted, "{found} {wanted}");
    }
    let error = |x: &Tensor| {
        let x = Var::from_tensor(x).unwrap();
        let back = |y: Tensor| y.sum_all().unwrap().backward().unwrap();
        let kernel = back(softplus(x.as_tensor()).unwrap());
        let composed = back(composing(|| softplus(x.as_tensor())).unwrap());
        let (a, b) = (composed.get(x.as_tensor()), kernel.get(x.as_tensor()));
        near(a.unwrap(), b.unwrap(), 1e-4, "softplus");
    };
    error(&x);
}

#[test]
fn attention_in_one_block() {
    let wide = usize::MAX;
    for (kv, group, len, more, window) in [(2, 1, 9, 0, wide), (1, 3, 7, 4, wide), (2, 2, 17, 3, 5)]
    {
        let keys = [kv, len + more, 6];
        let inputs = [t(&[kv * group, len, 6], 1), t(&keys, 2), t(&keys, 3)];
        agree("causal_attention", &inputs, &|x| {
            Ok(vec![causal_attention(&x[0], &x[1], &x[2], 0.7, window)?])
        });
    }
}

#[test]
fn scans() {
    for (length, chunk, groups) in [(1, 4, 1), (13, 4, 2), (16, 8, 1), (5, 64, 1)] {
        let (heads, p, n) = (2 * groups, 3, 4);
        let inputs = [
            t(&[2, length, heads, p], 1),
            tensor(&[2, length, heads], 2, 0.01, 0.8),
            tensor(&[heads], 3, -2.0, -0.1),
            t(&[2, length, groups, n], 4),
            t(&[2, length, groups, n], 5),
            t(&[2, heads, p, n], 6),
        ];
        agree("ssd", &inputs, &|x| {
            let scan = Scan {
                x: &x[0],
                dt: &x[1],
                a: &x[2],
                b: &x[3],
                c: &x[4],
                state: Some(&x[5]),
            };
            let (y, state) = scan.chunked(chunk)?;
            Ok(vec![y, state])
        });
    }
    for length in [1, 2, 11, 16] {
        let inputs = [
            t(&[2, length, 3], 1),
            tensor(&[2, length, 3], 2, 0.01, 0.8),
            tensor(&[3, 4], 3, -2.0, -0.1),
            t(&[2, length, 4], 4),
            t(&[2, length, 4], 5),
            t(&[2, 3, 4], 6),
        ];
        agree("selective scan", &inputs, &|x| {
            let scan = SelectiveScan {
                u: &x[0],
                dt: &x[1],
                a: &x[2],
                b: &x[3],
                c: &x[4],
                state: Some(&x[5]),
            };
            let (y, state) = scan.run()?;
            Ok(vec![y, state])
        });
    }
}

#[test]
fn long_convolutions_and_their_kernels() {
    for (batch, length, taps, reverse) in [
        (3, 7, 7, Some(7)),
        (2, 33, 40, None),
        (1, 6, 3, Some(2)),
        (2, 1, 1, None),
    ] {
        let mut inputs = vec![t(&[batch, 2, length], 1), t(&[2, taps], 2)];
        inputs.extend(reverse.map(|taps| t(&[2, taps], 3)));
        agree("fft_conv", &inputs, &|x| {
            Ok(vec![fft_conv(&x[0], &x[1], x.get(2))?])
        });
    }
    for length in [1, 2, 10, 50] {
        let (re, im) = (
            tensor(&[3, 4], 1, -0.3, -0.01),
            tensor(&[3, 4], 2, -2.0, 2.0),
        );
        let x = Tensor::stack(&[re, im], 2).unwrap();
        agree("vandermonde", &[t(&[3, 4, 2], 3), x.clone()], &|x| {
            Ok(vec![vandermonde(&x[0], &x[1], length)?])
        });
        let dt = tensor(&[3], 4, 0.01, 0.2);
        let inputs = [dt, x, t(&[3, 4, 2], 5), t(&[2, 3, 4, 2], 6)];
        agree("s4d kernel", &inputs, &|x| {
            let zoh = Discretisation::Zoh;
            let kernel = diagonal_kernel(&x[0], &x[1], &x[2], &x[3], length, zoh)?;
            Ok(vec![kernel])
        });
    }
}
