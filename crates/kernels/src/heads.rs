//! Heads out of the width of activations and back, turned by their positions on the way, in one pass.

use crate::autograd::{Kernel, Real, apply};
use crate::composed::{Composed, composes, node};
use crate::dense::uninit;
use crate::elementwise::split_rows;
use crate::gpu::{self, Launch};
use crate::pool::SharedMut;
use candle_core::{Result, Tensor, bail};

/// cos and sin of each token: [tokens, half] each.
pub type Angles<'a> = (&'a Tensor, &'a Tensor);

/// x [documents length, heads width] to [documents heads, length, width], pairs (m, half + m) of every head turned by the angles.
pub fn split_heads(
    x: &Tensor,
    documents: usize,
    heads: usize,
    angles: Option<Angles<'_>>,
) -> Result<Tensor> {
    let op = Heads::new(x.dims2()?, documents, heads, angles)?;
    if composes(x) {
        return node(Split(op), &[x]);
    }
    match angles {
        Some((cos, sin)) => apply(SplitRows(op.sizes()), &[x, cos, sin]),
        None => apply(SplitRows(op.sizes()), &[x]),
    }
}

/// x [documents heads, length, width] to [documents length, heads width].
pub fn join_heads(x: &Tensor, documents: usize) -> Result<Tensor> {
    let (all, length, width) = x.dims3()?;
    let heads = all / documents.max(1);
    let sizes = (documents * length, heads * width);
    let op = Heads::new(sizes, documents, heads, None)?;
    match composes(x) {
        true => node(Join(op), &[x]),
        false => apply(JoinRows(op.sizes()), &[x]),
    }
}

pub(crate) struct Heads {
    documents: usize,
    heads: usize,
    length: usize,
    width: usize,
    angles: Option<(Tensor, Tensor)>,
}

impl Heads {
    pub(crate) fn new(
        (tokens, all): (usize, usize),
        documents: usize,
        heads: usize,
        angles: Option<Angles<'_>>,
    ) -> Result<Heads> {
        let half = angles.map(|(cos, _)| cos.dim(1)).transpose()?;
        let width = all / heads.max(1);
        let fits = documents > 0
            && heads > 0
            && tokens.is_multiple_of(documents)
            && all == heads * width
            && half.is_none_or(|half| 2 * half <= width);
        let turned = angles.is_none_or(|(cos, sin)| {
            cos.dims() == sin.dims() && cos.dims().first() == Some(&tokens)
        });
        if !fits || !turned {
            bail!(
                "heads: found {tokens} tokens of width {all} and {half:?} angles, expected tokens of {documents} equal \
                 documents, {heads} equal heads, and angles of every token for at most half a head"
            );
        }
        Ok(Heads {
            documents,
            heads,
            length: tokens / documents,
            width,
            angles: angles.map(|(cos, sin)| (cos.clone(), sin.clone())),
        })
    }

    pub(crate) fn sizes(&self) -> Sizes {
        Sizes {
            documents: self.documents,
            heads: self.heads,
            length: self.length,
            width: self.width,
            half: self.angles.as_ref().map_or(0, |(cos, _)| cos.dims()[1]),
        }
    }

    fn split_shape(&self) -> [usize; 3] {
        [self.documents * self.heads, self.length, self.width]
    }

    fn joined_shape(&self) -> [usize; 2] {
        [self.documents * self.length, self.heads * self.width]
    }

    /// The kernel of both ways; `sign` -1 turns back.
    fn kernel(
        &self,
        name: &'static str,
        x: &Tensor,
        shape: &[usize],
        sign: f64,
    ) -> Result<Option<Tensor>> {
        let (cos, sin) = match &self.angles {
            Some((cos, sin)) => (cos, sin),
            None => (x, x),
        };
        if !gpu::fits(&[x, cos, sin]) {
            return Ok(None);
        }
        let half = self.angles.as_ref().map_or(0, |(cos, _)| cos.dims()[1]);
        let count = x.elem_count();
        let ints = [count, self.heads, self.length, self.width, half];
        let launch = Launch {
            float: Some(sign),
            ..Launch::elements(name, count, &ints)
        };
        gpu::one(launch, &[x, cos, sin], shape).map(Some)
    }

    pub(crate) fn split(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(y) = self.kernel("split_heads", x, &self.split_shape(), 1.0)? {
            return Ok(y);
        }
        let x = x
            .reshape((self.documents, self.length, self.heads, self.width))?
            .transpose(1, 2)?
            .contiguous()?;
        self.turned(&x, 1.0)?.reshape(&self.split_shape()[..])
    }

    pub(crate) fn join(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(y) = self.kernel("join_heads", x, &self.joined_shape(), -1.0)? {
            return Ok(y);
        }
        let x = x.reshape((self.documents, self.heads, self.length, self.width))?;
        self.turned(&x, -1.0)?
            .transpose(1, 2)?
            .contiguous()?
            .reshape(&self.joined_shape()[..])
    }

    /// x [documents, heads, length, width], turned.
    fn turned(&self, x: &Tensor, sign: f64) -> Result<Tensor> {
        let Some((cos, sin)) = &self.angles else {
            return Ok(x.clone());
        };
        let half = cos.dim(1)?;
        let shape = (self.documents, 1, self.length, half);
        let (cos, sin) = (cos.reshape(shape)?, (sin.reshape(shape)? * sign)?);
        let (a, b) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?);
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        match self.width - 2 * half {
            0 => Tensor::cat(&[first, second], 3),
            rest => Tensor::cat(&[first, second, x.narrow(3, 2 * half, rest)?], 3),
        }
    }
}

struct Split(Heads);

impl Composed for Split {
    fn name(&self) -> &'static str {
        "split_heads"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        self.0.split(&x[0])
    }

    fn backward(&self, _: &[Tensor], _: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        Ok(vec![self.0.join(gradient)?])
    }
}

struct Join(Heads);

impl Composed for Join {
    fn name(&self) -> &'static str {
        "join_heads"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        self.0.join(&x[0])
    }

    fn backward(&self, _: &[Tensor], _: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        Ok(vec![self.0.split(gradient)?])
    }
}

/// What the CPU's forms go by; `half` coordinates of a head turn with as many others.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) documents: usize,
    pub(crate) heads: usize,
    pub(crate) length: usize,
    pub(crate) width: usize,
    half: usize,
}

impl Sizes {
    fn tokens(&self) -> usize {
        self.documents * self.length
    }

    /// Where a token's head lies when heads are apart.
    fn apart(&self, token: usize, head: usize) -> usize {
        let (document, at) = (token / self.length, token % self.length);
        ((document * self.heads + head) * self.length + at) * self.width
    }

    /// Calls `work` with each token, and where each of its heads lies together and apart, tokens shared among threads.
    fn each(&self, work: impl Fn(usize, usize, usize) + Sync) {
        let row = self.heads * self.width;
        split_rows(self.tokens(), row, |first, count| {
            for token in first..first + count {
                for head in 0..self.heads {
                    work(
                        token,
                        token * row + head * self.width,
                        self.apart(token, head),
                    );
                }
            }
        });
    }

    /// x [tokens, heads width] to heads apart, turned.
    pub(crate) fn split<T: Real>(&self, x: &[T], angles: Option<(&[T], &[T])>) -> Vec<T> {
        self.moved(x, angles, true)
    }

    /// The other way, turned back.
    pub(crate) fn join<T: Real>(&self, x: &[T], angles: Option<(&[T], &[T])>) -> Vec<T> {
        self.moved(x, angles, false)
    }

    fn moved<T: Real>(&self, x: &[T], angles: Option<(&[T], &[T])>, splits: bool) -> Vec<T> {
        let (half, width) = (self.half, self.width);
        let sign = if splits { T::one() } else { -T::one() };
        let mut out = uninit(x.len());
        let shared = SharedMut::new(&mut out);
        self.each(|token, together, apart| {
            let (from, to) = if splits {
                (together, apart)
            } else {
                (apart, together)
            };
            let x = &x[from..from + width];
            // SAFETY: a head of a token has a place of its own.
            let out = unsafe { shared.slice(to, width) };
            let Some((cos, sin)) = angles else {
                out.copy_from_slice(x);
                return;
            };
            let angles = token * half..(token + 1) * half;
            turn(x, &cos[angles.clone()], &sin[angles], sign, out);
        });
        out
    }
}

/// Pairs (m, half + m) of one head turned; what is beyond them is copied.
#[inline(always)]
fn turn<T: Real>(x: &[T], cos: &[T], sin: &[T], sign: T, out: &mut [T]) {
    let half = cos.len();
    let (a, rest) = x.split_at(half);
    let (b, rest) = rest.split_at(half);
    let (first, out) = out.split_at_mut(half);
    let (second, out) = out.split_at_mut(half);
    for m in 0..half {
        let sin = sign * sin[m];
        first[m] = a[m] * cos[m] - b[m] * sin;
        second[m] = b[m] * cos[m] + a[m] * sin;
    }
    out.copy_from_slice(rest);
}

struct SplitRows(Sizes);

impl Kernel for SplitRows {
    fn name(&self) -> &'static str {
        "split_heads"
    }

    fn forward<T: Real>(&self, x: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let s = self.0;
        let angles = x.get(1).map(|cos| (*cos, x[2]));
        (
            s.split(x[0], angles),
            vec![s.documents * s.heads, s.length, s.width],
        )
    }

    fn backward<T: Real>(&self, x: &[&[T]], _: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let angles = x.get(1).map(|cos| (*cos, x[2]));
        let mut out = vec![self.0.join(gradient, angles)];
        // Angles are constants.
        out.resize(x.len(), Vec::new());
        out
    }
}

struct JoinRows(Sizes);

impl Kernel for JoinRows {
    fn name(&self) -> &'static str {
        "join_heads"
    }

    fn forward<T: Real>(&self, x: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let s = self.0;
        (s.join(x[0], None), vec![s.tokens(), s.heads * s.width])
    }

    fn backward<T: Real>(&self, _: &[&[T]], _: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        vec![self.0.split(gradient, None)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::gradient_error;
    use crate::composed::composing;
    use crate::harness::{distance, tensor};

    #[test]
    fn the_cpus_form_is_the_composition() {
        let (documents, heads, length, width) = (2, 3, 5, 8);
        let x = tensor(&[documents * length, heads * width], 1, -1.0, 1.0);
        for half in [0, 3, 4] {
            let table = |salt| tensor(&[documents * length, half], salt, -1.0, 1.0);
            let (cos, sin) = (table(2), table(3));
            let angles = (half > 0).then_some((&cos, &sin));
            let split = |x: &Tensor| split_heads(x, documents, heads, angles);
            let apart = split(&x).unwrap();
            assert_eq!(apart.dims(), [documents * heads, length, width]);
            assert!(distance(&apart, &composing(|| split(&x)).unwrap()) < 1e-15);
            let error = gradient_error(std::slice::from_ref(&x), 1e-6, &|x| split(&x[0]));
            assert!(error.unwrap() < 1e-8);
            let together = join_heads(&apart, documents).unwrap();
            let composed = composing(|| join_heads(&apart, documents)).unwrap();
            assert!(distance(&together, &composed) < 1e-15);
            let error = gradient_error(&[apart], 1e-6, &|x| join_heads(&x[0], documents));
            assert!(error.unwrap() < 1e-8);
        }
    }
}
