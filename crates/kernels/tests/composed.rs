//! Every operation composed of candle's against its kernel: values, and the gradients of all inputs, in f64 and f32, on
//! ragged shapes.

use candle_core::{DType, Device, Result, Tensor, Var};
use longspan_kernels::autograd::softplus;
use longspan_kernels::causal::{Documents, causal_attention, document_attention};
use longspan_kernels::composed::{Kept, composing, rows, sum_squares};
use longspan_kernels::cut::cut;
use longspan_kernels::fftconv::fft_conv;
use longspan_kernels::heads::{join_heads, split_heads};
use longspan_kernels::learn::{depthwise_conv, rms_norm, silu_gate, skip, softmax};
use longspan_kernels::linear::{linear, residual_linear};
use longspan_kernels::mlp::{GatedWeights, gated_mlp};
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
    let device = outputs[0].device();
    let mut sum = Tensor::zeros((), outputs[0].dtype(), device)?;
    for y in outputs {
        let weights = tensor(&[y.elem_count()], 5, -1.0, 1.0)
            .to_dtype(y.dtype())?
            .to_device(device)?;
        sum = (sum + (y.flatten_all()? * weights)?.sum_all()?)?;
    }
    Ok(sum)
}

/// Outputs, and the gradients of all inputs on this device.
fn evaluate(
    inputs: &[Tensor],
    device: &Device,
    f: &dyn Fn(&[Tensor]) -> Result<Vec<Tensor>>,
) -> Result<(Vec<Tensor>, Vec<Option<Tensor>>)> {
    let vars = inputs
        .iter()
        .map(|x| Var::from_tensor(&x.to_device(device)?))
        .collect::<Result<Vec<Var>>>()?;
    let tracked: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let outputs = f(&tracked)?;
    let gradients = weighted(&outputs)?.backward()?;
    let of = |var: &Var| gradients.get(var.as_tensor()).cloned();
    Ok((outputs, vars.iter().map(of).collect()))
}

/// A GPU, in a build and on a machine that have one: the kernels there have these tests too.
fn gpu() -> Option<Device> {
    if cfg!(feature = "cuda") {
        Device::new_cuda_with_stream(0).ok()
    } else {
        None
    }
}

fn agree(what: &str, inputs: &[Tensor], f: &dyn Fn(&[Tensor]) -> Result<Vec<Tensor>>) {
    for (dtype, bound) in [(DType::F64, 1e-10), (DType::F32, 1e-4)] {
        let typed: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(dtype).unwrap()).collect();
        let cpu = Device::Cpu;
        let (kernel, wanted) = evaluate(&typed, &cpu, f).unwrap();
        let composed = composing(|| evaluate(&typed, &cpu, f)).unwrap();
        let mut found = vec![("composed", composed)];
        if let (Some(gpu), DType::F32) = (gpu(), dtype) {
            found.push(("GPU", evaluate(&typed, &gpu, f).unwrap()));
        }
        for (how, (outputs, gradients)) in found {
            for (index, (a, b)) in outputs.iter().zip(&kernel).enumerate() {
                let what = format!("{what}, {how}, {dtype:?}, output {index}");
                near(a, b, bound, &what);
            }
            for (index, (a, b)) in gradients.iter().zip(&wanted).enumerate() {
                let what = format!("{what}, {how}, {dtype:?}, gradient {index}");
                let (a, b) = (a.as_ref().expect(&what), b.as_ref().expect(&what));
                near(a, b, bound, &what);
            }
        }
    }
}

#[test]
fn the_last_tables_are_kept() {
    static KEPT: Kept<usize, usize> = Kept::new(2);
    let made = std::cell::Cell::new(0);
    let get = |key: usize| {
        let make = || {
            made.set(made.get() + 1);
            Ok(10 * key)
        };
        assert_eq!(KEPT.get(key, make).unwrap(), 10 * key);
        made.get()
    };
    assert_eq!([get(1), get(1), get(2), get(1)], [1, 1, 2, 2]);
    // The third pushes the oldest out.
    assert_eq!([get(3), get(2), get(3), get(1)], [3, 3, 3, 4]);
    assert!(KEPT.get(9, || candle_core::bail!("no")).is_err());
}

/// Heads out of activations and back, element by element, and their gradients, which are the way back.
#[test]
fn heads_are_split_turned_and_joined() {
    let (documents, heads, length, width, half) = (2, 3, 5, 8, 3);
    let tokens = documents * length;
    let x = t(&[tokens, heads * width], 1);
    let (cos, sin) = (t(&[tokens, half], 2), t(&[tokens, half], 3));
    let (c, s, values) = (flat(&cos), flat(&sin), flat(&x));
    let mut wanted = Vec::new();
    for at in 0..documents * heads * length * width {
        let (e, rest) = (at % width, at / width);
        let (l, head, document) = (rest % length, rest / length % heads, rest / length / heads);
        let token = document * length + l;
        let value = |e: usize| values[(token * heads + head) * width + e];
        let angle = token * half + e % half;
        wanted.push(match e {
            e if e < half => value(e) * c[angle] - value(e + half) * s[angle],
            e if e < 2 * half => value(e) * c[angle] + value(e - half) * s[angle],
            e => value(e),
        });
    }
    let shape = [documents * heads, length, width];
    let wanted = Tensor::from_vec(wanted, &shape, &Device::Cpu).unwrap();
    let devices = [Some(Device::Cpu), gpu()];
    for device in devices.iter().flatten() {
        let put = |x: &Tensor| x.to_dtype(DType::F32).unwrap().to_device(device).unwrap();
        let angles = (put(&cos), put(&sin));
        let var = Var::from_tensor(&put(&x)).unwrap();
        let y = split_heads(
            var.as_tensor(),
            documents,
            heads,
            Some((&angles.0, &angles.1)),
        )
        .unwrap();
        near(&y, &wanted, 1e-6, "split heads");
        // <g, split x> = <split' g, x> for the gradient split'.
        let g = put(&t(&shape, 4));
        let product = (&y * &g).unwrap().sum_all().unwrap();
        let back = product.backward().unwrap();
        let back = (back.get(var.as_tensor()).unwrap() * var.as_tensor()).unwrap();
        let (left, right) = (flat(&product)[0], flat(&back.sum_all().unwrap())[0]);
        assert!((left - right).abs() < 1e-3, "{left} {right}");
        let plain = split_heads(var.as_tensor(), documents, heads, None).unwrap();
        near(
            &join_heads(&plain, documents).unwrap(),
            &x,
            1e-6,
            "there and back",
        );
    }
    assert!(split_heads(&x, 3, heads, None).is_err());
    assert!(split_heads(&x, documents, 7, None).is_err());
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
fn sums_of_squares() {
    for count in [0, 1, 1023, 1024, 5000] {
        let x = t(&[count], 1);
        let wanted: f64 = flat(&x).iter().map(|x| x * x).sum();
        for device in [Some(Device::Cpu), gpu().filter(|_| count > 0)]
            .into_iter()
            .flatten()
        {
            for dtype in [DType::F64, DType::F32, DType::BF16] {
                let x = x.to_dtype(dtype).unwrap().to_device(&device).unwrap();
                let found = sum_squares(&x).unwrap();
                let bound = if dtype == DType::BF16 { 1e-2 } else { 1e-5 };
                assert!(
                    (found - wanted).abs() <= bound * wanted,
                    "{count} {dtype:?}: {found}, {wanted}"
                );
            }
        }
    }
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
fn fused_layers_and_cuts() {
    let inputs = [
        t(&[9, 7], 1),
        t(&[7], 2),
        t(&[11, 7], 3),
        t(&[11, 7], 4),
        t(&[7, 11], 5),
    ];
    agree("gated_mlp", &inputs, &|x| {
        let weights = GatedWeights {
            norm: &x[1],
            gate: &x[2],
            up: &x[3],
            down: &x[4],
        };
        Ok(vec![gated_mlp(&x[0], weights, 1e-5)?])
    });
    let inputs = [t(&[4, 5], 1), t(&[3, 5], 2), t(&[4, 3], 3), t(&[3], 4)];
    agree("residual_linear", &inputs[..3], &|x| {
        Ok(vec![residual_linear(&x[0], &x[1], None, Some(&x[2]))?])
    });
    agree("residual_linear with bias", &inputs, &|x| {
        Ok(vec![residual_linear(
            &x[0],
            &x[1],
            Some(&x[3]),
            Some(&x[2]),
        )?])
    });
    let inputs = [t(&[2, 3, 12], 1), t(&[2, 3, 12], 2), t(&[4], 3)];
    agree("skip", &inputs, &|x| Ok(vec![skip(&x[0], &x[1], &x[2])?]));
    agree("cut", &inputs[..1], &|x| cut(&x[0], &[3, 1, 8]));
    // A part without a gradient.
    agree("cut, one part", &inputs[..1], &|x| {
        Ok(vec![cut(&x[0], &[3, 1, 8])?.remove(2)])
    });
    for (count, heads, kv_heads, half, window) in [
        (2, 2, 2, 3, usize::MAX),
        (3, 4, 2, 2, 4),
        (1, 3, 1, 0, usize::MAX),
    ] {
        let (tokens, d) = (count * 7, 6);
        let kv = [tokens, kv_heads * d];
        let inputs = [t(&[tokens, heads * d], 1), t(&kv, 2), t(&kv, 3)];
        let (cos, sin) = (t(&[tokens, half], 4), t(&[tokens, half], 5));
        let alone = |x: &[Tensor]| -> Result<[Tensor; 2]> {
            let like = |table: &Tensor| -> Result<Tensor> {
                let table = table.to_dtype(x[0].dtype())?;
                table.to_device(x[0].device())
            };
            let (cos, sin) = (like(&cos)?, like(&sin)?);
            let angles = (half > 0).then_some((&cos, &sin));
            let documents = Documents {
                count,
                heads,
                kv_heads,
                angles,
                scale: 0.4,
                window,
            };
            let y = document_attention(&x[0], &x[1], &x[2], documents)?;
            let apart = causal_attention(
                &split_heads(&x[0], count, heads, angles)?,
                &split_heads(&x[1], count, kv_heads, angles)?,
                &split_heads(&x[2], count, kv_heads, None)?,
                0.4,
                window,
            )?;
            Ok([y, join_heads(&apart, count)?])
        };
        agree("document_attention", &inputs, &|x| {
            let [y, parts] = alone(x)?;
            near(
                &y.detach(),
                &parts.detach(),
                1e-5,
                "document_attention and its parts",
            );
            Ok(vec![y])
        });
        // Its gradients are those of its parts.
        let wide = DType::F64;
        let typed: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(wide).unwrap()).collect();
        let of = |which: usize| {
            let f = |x: &[Tensor]| Ok(vec![alone(x)?[which].clone()]);
            evaluate(&typed, &Device::Cpu, &f).unwrap().1
        };
        for (a, b) in of(0).iter().zip(of(1)) {
            near(
                a.as_ref().unwrap(),
                &b.unwrap(),
                1e-10,
                "gradients of parts",
            );
        }
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

/// Every size of the GPU's own transform, kernels shorter and longer than the sequence, pairs of rows for a block of their own
/// and several for one, and a sequence that is too long for a block.
#[test]
fn long_convolutions_on_a_gpu() {
    let Some(gpu) = gpu() else { return };
    for (batch, channels, length, taps, reverse) in [
        (1, 2, 1, 1, None),
        (3, 2, 7, 7, None),
        (2, 3, 7, 9, Some(7)),
        (1, 2, 300, 300, None),
        (3, 2, 1000, 100, None),
        (2, 3, 1000, 1000, Some(1000)),
        (4, 3, 1024, 1024, None),
        (4, 600, 1024, 256, None),
        (3, 2, 2048, 2048, Some(3)),
        (5, 2, 4096, 4096, None),
        (2, 2, 4096, 5000, Some(4096)),
        (3, 2, 8192, 8192, None),
        (1, 2, 8192, 513, Some(8192)),
        (1, 1, 16000, 300, None),
        (2, 1, 8193, 8193, None),
    ] {
        let mut inputs = vec![t(&[batch, channels, length], 1), t(&[channels, taps], 2)];
        inputs.extend(reverse.map(|taps| t(&[channels, taps], 3)));
        // The last is composed, and in bf16 as coarse as bf16's spectra.
        let kinds: &[_] = match length {
            8193 => &[(DType::F32, 1e-4)],
            _ => &[(DType::F32, 3e-6), (DType::BF16, 1e-2)],
        };
        for &(dtype, bound) in kinds {
            let of = |to: DType| -> Vec<Tensor> {
                let typed = inputs.iter().map(|x| x.to_dtype(dtype)?.to_dtype(to));
                typed.collect::<Result<_>>().unwrap()
            };
            let f = |x: &[Tensor]| Ok(vec![fft_conv(&x[0], &x[1], x.get(2))?]);
            let wanted = evaluate(&of(DType::F64), &Device::Cpu, &f).unwrap();
            let found = evaluate(&of(dtype), &gpu, &f).unwrap();
            let what = format!("{dtype:?}, {batch} {channels} {length} {taps} {reverse:?}");
            near(&found.0[0], &wanted.0[0], bound, &what);
            for (index, (a, b)) in found.1.iter().zip(&wanted.1).enumerate() {
                let what = format!("{what}, gradient {index}");
                let (a, b) = (a.as_ref().expect(&what), b.as_ref().expect(&what));
                near(a, b, bound, &what);
            }
        }
    }
}
