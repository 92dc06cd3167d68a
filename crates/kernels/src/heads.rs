//! Heads out of the width of activations and back, turned by their positions on the way: one pass on a GPU.

use crate::composed::{Composed, node};
use crate::gpu::{self, Launch};
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
    node(Split(op), &[x])
}

/// x [documents heads, length, width] to [documents length, heads width].
pub fn join_heads(x: &Tensor, documents: usize) -> Result<Tensor> {
    let (all, length, width) = x.dims3()?;
    let heads = all / documents.max(1);
    let sizes = (documents * length, heads * width);
    node(Join(Heads::new(sizes, documents, heads, None)?), &[x])
}

struct Heads {
    documents: usize,
    heads: usize,
    length: usize,
    width: usize,
    angles: Option<(Tensor, Tensor)>,
}

impl Heads {
    fn new(
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

    fn split(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(y) = self.kernel("split_heads", x, &self.split_shape(), 1.0)? {
            return Ok(y);
        }
        let x = x
            .reshape((self.documents, self.length, self.heads, self.width))?
            .transpose(1, 2)?
            .contiguous()?;
        self.turned(&x, 1.0)?.reshape(&self.split_shape()[..])
    }

    fn join(&self, x: &Tensor) -> Result<Tensor> {
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
