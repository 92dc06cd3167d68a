//! A linear layer that learns, `y = x Wᵀ + b`, as one operation with its analytic gradient: for the many small products of
//! small models, where transposes, broadcasts and gradients of constants cost as much as the products.

use crate::autograd::{Kernel, Real, apply};
use crate::composed::{Composed, composes, node, sum_rows};
use crate::cpu::Level;
use crate::dense::{Left, Packed, product, uninit};
use crate::elementwise::{copy, split_rows};
use crate::pool::SharedMut;
use candle_core::{Result, Tensor, bail};

/// x [.., inputs], weight [outputs, inputs], bias [outputs] to [.., outputs].
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    residual_linear(x, weight, bias, None)
}

/// [`linear`] added to `residual` [.., outputs].
pub fn residual_linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let (outputs, inputs) = weight.dims2()?;
    let fits = bias.is_none_or(|bias| bias.dims() == [outputs]);
    if x.dims().last() != Some(&inputs) || !fits {
        bail!(
            "linear: found x {:?}, weight {:?}, bias {:?}, expected [.., inputs], [outputs, inputs], [outputs]",
            x.dims(),
            weight.dims(),
            bias.map(Tensor::dims)
        );
    }
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    if let Some(residual) = residual
        && residual.dims() != shape
    {
        bail!(
            "linear: found residual {:?}, expected {shape:?}",
            residual.dims()
        );
    }
    let biased = bias.is_some();
    let all = [Some(x), Some(weight), bias, residual];
    let all: Vec<&Tensor> = all.into_iter().flatten().collect();
    if composes(x) {
        return node(LinearComposed { biased }, &all);
    }
    let op = Linear {
        level: Level::current(),
        inputs,
        outputs,
        shape,
        biased,
    };
    apply(op, &all)
}

/// The naive twin of [`linear`], of candle operations.
pub fn linear_naive(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (outputs, inputs) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    let rows = x.elem_count() / inputs.max(1);
    let x = x.contiguous()?.reshape((rows, inputs))?;
    let y = x.matmul(&weight.t()?)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    y.reshape(shape)
}

struct LinearComposed {
    /// As in [`Linear`].
    biased: bool,
}

impl Composed for LinearComposed {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        let y = linear_naive(&x[0], &x[1], self.biased.then(|| &x[2]))?;
        match x.get(2 + usize::from(self.biased)) {
            Some(residual) => residual + y,
            None => Ok(y),
        }
    }

    fn backward(&self, x: &[Tensor], _: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        let (outputs, inputs) = x[1].dims2()?;
        let rows = x[0].elem_count() / inputs.max(1);
        let flat = gradient.reshape((rows, outputs))?;
        let read = x[0].reshape((rows, inputs))?;
        let mut out = vec![
            flat.matmul(&x[1])?.reshape(x[0].shape())?,
            flat.t()?.matmul(&read)?,
        ];
        if self.biased {
            out.push(sum_rows(&flat)?.to_dtype(x[2].dtype())?);
        }
        if x.len() > out.len() {
            out.push(gradient.clone());
        }
        Ok(out)
    }
}

struct Linear {
    level: Level,
    inputs: usize,
    outputs: usize,
    shape: Vec<usize>,
    /// Behind x and weight comes a bias; behind that may come a residual.
    biased: bool,
}

impl Linear {
    fn bias<'a, T>(&self, x: &[&'a [T]]) -> Option<&'a [T]> {
        self.biased.then(|| x[2])
    }

    fn residual<'a, T>(&self, x: &[&'a [T]]) -> Option<&'a [T]> {
        x.get(2 + usize::from(self.biased)).copied()
    }
}

/// C [rows, cols] = A B, plus what C holds if `added`; rows of A shared among threads.
pub(crate) fn shared_product<T: Real>(
    level: Level,
    a: Left<'_, T>,
    rows: usize,
    b: &Packed<T>,
    c: &mut [T],
    added: bool,
) {
    let cols = b.cols();
    let shared = SharedMut::new(c);
    split_rows(rows, cols, |first, rows| {
        let a = Left {
            data: &a.data[(first * a.row).min(a.data.len())..],
            ..a
        };
        // SAFETY: pieces are disjoint row ranges.
        let c = unsafe { shared.slice(first * cols, rows * cols) };
        product(level, a, rows, b, (b.rows(), cols), c, cols, !added);
    });
}

impl Kernel for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn forward<T: Real>(&self, x: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let (k, n) = (self.inputs, self.outputs);
        let rows: usize = self.shape[..self.shape.len() - 1].iter().product();
        let mut out = match (self.residual(x), self.bias(x)) {
            (Some(residual), _) => copy(residual, n),
            (None, Some(bias)) => bias.repeat(rows),
            (None, None) => uninit(rows * n),
        };
        if let (Some(_), Some(bias)) = (self.residual(x), self.bias(x)) {
            for row in out.chunks_exact_mut(n.max(1)) {
                row.iter_mut().zip(bias).for_each(|(y, &b)| *y += b);
            }
        }
        let added = self.biased || self.residual(x).is_some();
        let weight = Packed::new(x[1], k, n, 1, k);
        let left = Left {
            data: x[0],
            row: k,
            col: 1,
        };
        shared_product(self.level, left, rows, &weight, &mut out, added);
        (out, self.shape.clone())
    }

    fn backward<T: Real>(&self, x: &[&[T]], _: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let (k, n) = (self.inputs, self.outputs);
        let rows = gradient.len() / n.max(1);
        // [rows, inputs] = gradient [rows, outputs] W
        let mut grad_x = uninit(x[0].len());
        let weight = Packed::new(x[1], n, k, k, 1);
        let left = Left {
            data: gradient,
            row: n,
            col: 1,
        };
        shared_product(self.level, left, rows, &weight, &mut grad_x, false);
        // [outputs, inputs] = gradientᵀ x
        let mut grad_weight = uninit(x[1].len());
        let read = Packed::new(x[0], rows, k, k, 1);
        let turned = Left {
            data: gradient,
            row: 1,
            col: n,
        };
        shared_product(self.level, turned, n, &read, &mut grad_weight, false);
        let mut out = vec![grad_x, grad_weight];
        if self.biased {
            let mut bias = vec![T::zero(); n];
            for row in gradient.chunks_exact(n.max(1)) {
                bias.iter_mut().zip(row).for_each(|(sum, &g)| *sum += g);
            }
            out.push(bias);
        }
        if self.residual(x).is_some() {
            out.push(copy(gradient, n));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::gradient_error;
    use crate::harness::{distance, largest, tensor};
    use candle_core::{DType, Var};
    use proptest::prelude::*;

    #[test]
    fn a_residual_is_added_and_gets_its_gradient() {
        for biased in [false, true] {
            let mut inputs = vec![
                tensor(&[3, 5], 1, -1.0, 1.0),
                tensor(&[4, 5], 2, -1.0, 1.0),
                tensor(&[3, 4], 3, -1.0, 1.0),
            ];
            if biased {
                inputs.push(tensor(&[4], 4, -1.0, 1.0));
            }
            let run = |t: &[Tensor]| residual_linear(&t[0], &t[1], t.get(3), Some(&t[2]));
            let naive = linear_naive(&inputs[0], &inputs[1], inputs.get(3)).unwrap();
            let wanted = (&inputs[2] + naive).unwrap();
            assert!(distance(&run(&inputs).unwrap(), &wanted) < 1e-14);
            assert!(gradient_error(&inputs, 1e-6, &run).unwrap() < 1e-7);
        }
        let x = tensor(&[3, 5], 1, -1.0, 1.0);
        assert!(residual_linear(&x, &tensor(&[4, 5], 2, -1.0, 1.0), None, Some(&x)).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(30))]
        #[test]
        fn agrees_with_the_naive_twin_forward_and_back(
            batch in 1usize..4, rows in 0usize..40, inputs in 1usize..70, outputs in 1usize..70, biased in any::<bool>(),
            salt in 0usize..99,
        ) {
            for dtype in [DType::F64, DType::F32] {
                let var = |shape: &[usize], salt| Var::from_tensor(&tensor(shape, salt, -1.0, 1.0).to_dtype(dtype).unwrap()).unwrap();
                let (x, w, b) = (var(&[batch, rows, inputs], salt), var(&[outputs, inputs], salt + 1), var(&[outputs], salt + 2));
                let bias = biased.then_some(b.as_tensor());
                let fast = linear(x.as_tensor(), w.as_tensor(), bias).unwrap();
                let naive = linear_naive(x.as_tensor(), w.as_tensor(), bias).unwrap();
                let close = |a: &Tensor, b: &Tensor| {
                    let scale = largest(b).max(1.0);
                    distance(a, b) < scale * if dtype == DType::F64 { 1e-12 } else { 1e-4 }
                };
                prop_assert_eq!(fast.dims(), naive.dims());
                if rows == 0 { continue; }
                prop_assert!(close(&fast, &naive));
                let back = |y: &Tensor| y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
                let (fast, naive) = (back(&fast), back(&naive));
                for var in [&x, &w, &b] {
                    match (fast.get(var.as_tensor()), naive.get(var.as_tensor())) {
                        (Some(a), Some(b)) => prop_assert!(close(a, b)),
                        (a, b) => prop_assert!(a.is_none() && b.is_none() && !biased),
                    }
                }
            }
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let inputs = [
            tensor(&[2, 3, 5], 1, -1.0, 1.0),
            tensor(&[4, 5], 2, -1.0, 1.0),
            tensor(&[4], 3, -1.0, 1.0),
        ];
        let error = gradient_error(&inputs, 1e-6, &|t| linear(&t[0], &t[1], Some(&t[2]))).unwrap();
        assert!(error < 1e-7, "{error}");
        assert!(linear(&inputs[0], &inputs[1], Some(&inputs[0])).is_err());
        assert!(linear(&inputs[2], &inputs[1], None).is_err());
    }
}
