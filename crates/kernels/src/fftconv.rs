//! Long convolution by FFT: every channel of a sequence with a kernel of its own, in O(L log L).
//!
//! `y_t = Σ_j k[j] u_{t-j}`, and with a second kernel for the other direction `+ Σ_j r[j] u_{t+1+j}`. Sequences of a
//! batch go through the transform two at a time, one as the real and one as the imaginary part: kernels are real, so
//! the parts do not mix.

use crate::autograd::{Kernel, Real, apply};
use crate::composed::{composes, node};
use crate::pool::{Pool, SharedMut};
use candle_core::{Result, Tensor, bail};
use rustfft::num_complex::Complex;

mod products;

/// u [batch, channels, length], kernel [channels, taps], reverse [channels, taps] to [batch, channels, length].
/// Differentiable in all. Taps beyond the length have no effect. Floats of one type; on a GPU, f32 and bf16 of up to 2^14 steps
/// and taps together are transformed at once, others in products. Fails where shapes or types do not match.
pub fn fft_conv(u: &Tensor, kernel: &Tensor, reverse: Option<&Tensor>) -> Result<Tensor> {
    let (batch, channels, length) = u.dims3()?;
    let taps = |k: &Tensor| match k.dims() {
        &[c, taps] if c == channels => Ok(taps),
        other => bail!("convolution kernel: found shape {other:?}, expected [{channels}, taps]"),
    };
    let op = FftConv {
        batch,
        channels,
        length,
        taps: taps(kernel)?,
        reverse_taps: reverse.map(taps).transpose()?,
    };
    if composes(u) {
        if length == 0 || batch * channels == 0 {
            return Ok(u.clone());
        }
        return match reverse {
            Some(reverse) => node(products::Conv, &[u, kernel, reverse]),
            None => node(products::Conv, &[u, kernel]),
        };
    }
    match reverse {
        Some(reverse) => apply(op, &[u, kernel, reverse]),
        None => apply(op, &[u, kernel]),
    }
}

/// The naive twin of [`fft_conv`] on slices: O(L²).
pub fn naive_conv<T: Real>(
    u: &[T],
    kernel: &[T],
    reverse: Option<&[T]>,
    batch: usize,
    channels: usize,
    length: usize,
) -> Vec<T> {
    let taps = kernel.len() / channels.max(1);
    let mut out = vec![T::zero(); batch * channels * length];
    for b in 0..batch {
        for c in 0..channels {
            let row = (b * channels + c) * length;
            for t in 0..length {
                let mut sum = T::zero();
                for j in 0..taps.min(t + 1) {
                    sum += kernel[c * taps + j] * u[row + t - j];
                }
                if let Some(reverse) = reverse {
                    let taps = reverse.len() / channels;
                    for j in 0..taps.min(length - 1 - t) {
                        sum += reverse[c * taps + j] * u[row + t + 1 + j];
                    }
                }
                out[row + t] = sum;
            }
        }
    }
    out
}

struct FftConv {
    batch: usize,
    channels: usize,
    length: usize,
    taps: usize,
    reverse_taps: Option<usize>,
}

impl FftConv {
    /// Room for the sequence and the longest kernel in each direction, so that nothing wraps around.
    fn size(&self) -> usize {
        let used = self.taps.min(self.length);
        let reverse = self.reverse_taps.unwrap_or(0).min(self.length);
        (self.length + used.max(1) + reverse).next_power_of_two()
    }

    /// The spectrum of channel c's kernels, laid out on a circle.
    fn spectrum<T: Real>(&self, inputs: &[&[T]], c: usize) -> Vec<Complex<T>> {
        let size = self.size();
        let mut circle = vec![Complex::new(T::zero(), T::zero()); size];
        let used = self.taps.min(self.length);
        for (j, &k) in inputs[1][c * self.taps..][..used].iter().enumerate() {
            circle[j].re = k;
        }
        if let Some(taps) = self.reverse_taps {
            let used = taps.min(self.length);
            for (j, &k) in inputs[2][c * taps..][..used].iter().enumerate() {
                circle[size - 1 - j].re += k;
            }
        }
        T::fft(size, false).process(&mut circle);
        circle
    }

    /// Rows b and b + 1 of channel c as one complex sequence.
    fn pair<T: Real>(&self, x: &[T], b: usize, c: usize) -> Vec<Complex<T>> {
        let row = |b: usize| &x[(b * self.channels + c) * self.length..][..self.length];
        let mut out = vec![Complex::new(T::zero(), T::zero()); self.size()];
        for (z, &re) in out.iter_mut().zip(row(b)) {
            z.re = re;
        }
        if b + 1 < self.batch {
            for (z, &im) in out.iter_mut().zip(row(b + 1)) {
                z.im = im;
            }
        }
        T::fft(self.size(), false).process(&mut out);
        out
    }

    /// Puts the complex sequence back into its two rows, scaled by the transform's size.
    fn unpair<T: Real>(&self, z: &[Complex<T>], out: &SharedMut<T>, b: usize, c: usize) {
        let scale = T::one() / T::of(self.size() as f64);
        for part in 0..2.min(self.batch - b) {
            let start = ((b + part) * self.channels + c) * self.length;
            // SAFETY: rows of channel c belong to this job alone.
            let row = unsafe { out.slice(start, self.length) };
            for (y, z) in row.iter_mut().zip(z) {
                *y = scale * if part == 0 { z.re } else { z.im };
            }
        }
    }
}

impl Kernel for FftConv {
    fn name(&self) -> &'static str {
        "fft_conv"
    }

    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let mut out = vec![T::zero(); self.batch * self.channels * self.length];
        let shared = SharedMut::new(&mut out);
        Pool::global().for_each(self.channels, |c| {
            let spectrum = self.spectrum(inputs, c);
            let inverse = T::fft(self.size(), true);
            for b in (0..self.batch).step_by(2) {
                let mut z = self.pair(inputs[0], b, c);
                z.iter_mut().zip(&spectrum).for_each(|(z, k)| *z *= k);
                inverse.process(&mut z);
                self.unpair(&z, &shared, b, c);
            }
        });
        (out, vec![self.batch, self.channels, self.length])
    }

    fn backward<T: Real>(&self, inputs: &[&[T]], _: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let mut grad_u = vec![T::zero(); inputs[0].len()];
        let mut grad_kernel = vec![T::zero(); inputs[1].len()];
        let mut grad_reverse = vec![T::zero(); inputs.get(2).map_or(0, |r| r.len())];
        let (u, kernel, reverse) = (
            SharedMut::new(&mut grad_u),
            SharedMut::new(&mut grad_kernel),
            SharedMut::new(&mut grad_reverse),
        );
        let size = self.size();
        Pool::global().for_each(self.channels, |c| {
            let spectrum = self.spectrum(inputs, c);
            let inverse = T::fft(size, true);
            // Gradient of the circle: Σ over rows of the correlation of output gradient and input.
            let mut circle = vec![Complex::new(T::zero(), T::zero()); size];
            for b in (0..self.batch).step_by(2) {
                let input = self.pair(inputs[0], b, c);
                let mut z = self.pair(gradient, b, c);
                for ((sum, z), u) in circle.iter_mut().zip(&z).zip(&input) {
                    *sum += z * u.conj();
                }
                z.iter_mut()
                    .zip(&spectrum)
                    .for_each(|(z, k)| *z *= k.conj());
                inverse.process(&mut z);
                self.unpair(&z, &u, b, c);
            }
            inverse.process(&mut circle);
            let scale = T::one() / T::of(size as f64);
            let used = self.taps.min(self.length);
            // SAFETY: row c belongs to this job alone.
            let row = unsafe { kernel.slice(c * self.taps, self.taps) };
            for (g, z) in row[..used].iter_mut().zip(&circle) {
                *g = z.re * scale;
            }
            if let Some(taps) = self.reverse_taps {
                let used = taps.min(self.length);
                // SAFETY: as above.
                let row = unsafe { reverse.slice(c * taps, taps) };
                for (j, g) in row[..used].iter_mut().enumerate() {
                    *g = circle[size - 1 - j].re * scale;
                }
            }
        });
        let mut out = vec![grad_u, grad_kernel];
        if self.reverse_taps.is_some() {
            out.push(grad_reverse);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::gradient_error;
    use candle_core::Device;
    use proptest::prelude::*;

    fn values(count: usize, salt: usize) -> Vec<f64> {
        (0..count)
            .map(|i| ((i * 7919 + salt * 104_729) % 1009) as f64 / 504.5 - 1.0)
            .collect()
    }

    fn tensor(shape: &[usize], salt: usize) -> Tensor {
        let count = shape.iter().product();
        Tensor::from_vec(values(count, salt), shape, &Device::Cpu).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn agrees_with_the_naive_twin(
            batch in 1usize..4, channels in 1usize..4, length in 1usize..40, taps in 1usize..50,
            reverse in proptest::option::of(1usize..50), salt in 0usize..1000,
        ) {
            let u = values(batch * channels * length, salt);
            let k = values(channels * taps, salt + 1);
            let r = reverse.map(|taps| values(channels * taps, salt + 2));
            let naive = naive_conv(&u, &k, r.as_deref(), batch, channels, length);
            let t = |v: &[f64], shape: &[usize]| Tensor::from_slice(v, shape, &Device::Cpu).unwrap();
            let (u, k) = (t(&u, &[batch, channels, length]), t(&k, &[channels, taps]));
            let r = r.map(|r| t(&r, &[channels, reverse.unwrap()]));
            let fast = fft_conv(&u, &k, r.as_ref()).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            for (a, b) in fast.iter().zip(&naive) {
                prop_assert!((a - b).abs() < 1e-10, "{a} {b}");
            }
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        for (batch, length, taps, reverse) in
            [(3, 7, 7, Some(7)), (2, 5, 9, None), (1, 6, 3, Some(2))]
        {
            let mut inputs = vec![tensor(&[batch, 2, length], 1), tensor(&[2, taps], 2)];
            inputs.extend(reverse.map(|taps| tensor(&[2, taps], 3)));
            let error =
                gradient_error(&inputs, 1e-4, &|x| fft_conv(&x[0], &x[1], x.get(2))).unwrap();
            assert!(error < 1e-8, "{error}");
        }
    }

    #[test]
    fn nothing_wraps_around() {
        let mut u = vec![0f32; 16];
        u[15] = 1.0;
        let u = Tensor::from_vec(u, (1, 1, 16), &Device::Cpu).unwrap();
        let k = Tensor::ones((1, 16), candle_core::DType::F32, &Device::Cpu).unwrap();
        let y = fft_conv(&u, &k, None).unwrap().flatten_all().unwrap();
        let y = y.to_vec1::<f32>().unwrap();
        assert!(y[..15].iter().all(|v| v.abs() < 1e-6), "{y:?}");
        assert!((y[15] - 1.0).abs() < 1e-6);
        let wrong = Tensor::ones((2, 16), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(
            fft_conv(&u, &wrong, None)
                .unwrap_err()
                .to_string()
                .contains("[1, taps]")
        );
    }
}
