//! The long convolution on a GPU by transforms of our own (`fft.cu`), for [`crate::fftconv`]: up to 2^14 points, which is what
//! fits a block's shared memory.

use super::{Launch, Module, fits, has_shared, run_of};
use candle_core::{DType, Result, Tensor};

/// Binary logarithms of the transforms' sizes.
const LOGS: std::ops::RangeInclusive<u32> = 9..=14;

/// Blocks that fill a GPU: so many are to share the channels' backward passes.
const BLOCKS: usize = 512;

/// A convolution's sizes and the transform that holds them.
#[derive(Clone, Copy)]
pub(crate) struct Fft {
    batch: usize,
    channels: usize,
    length: usize,
    /// Of each direction: all taps, and those within the length.
    taps: (usize, usize),
    reverse: (usize, usize),
    log: u32,
    narrow: bool,
}

impl Fft {
    /// The convolution of u [batch, channels, length] with kernels [channels, taps] of one or both directions, unless it
    /// must be composed: other types than f32 and bf16, not on a GPU, too long.
    pub(crate) fn of(x: &[Tensor]) -> Result<Option<Fft>> {
        let (batch, channels, length) = x[0].dims3()?;
        let taps = |k: Option<&Tensor>| match k {
            Some(k) => k.dim(1).map(|taps| (taps, taps.min(length))),
            None => Ok((0, 0)),
        };
        let (taps, reverse) = (taps(x.get(1))?, taps(x.get(2))?);
        // What runs past either end of the sequence falls into the room after it, both into the same.
        let points = length + reverse.1.max(taps.1.saturating_sub(1));
        let log = points.next_power_of_two().trailing_zeros();
        let fft = Fft {
            batch,
            channels,
            length,
            taps,
            reverse,
            log: log.max(*LOGS.start()),
            narrow: x[0].dtype() == DType::BF16,
        };
        let tensors: Vec<&Tensor> = x.iter().collect();
        let runs = LOGS.contains(&fft.log) && fits(&tensors) && has_shared(&x[0], fft.shared());
        Ok(runs.then_some(fft))
    }

    fn points(&self) -> usize {
        1 << self.log
    }

    /// Bytes: a complex number for each point, and one of padding for 16.
    fn shared(&self) -> usize {
        8 * (self.points() + self.points() / 16)
    }

    /// A kernel of `blocks` blocks. Its threads hold as many points as `fft.cu` says.
    fn launch(&self, name: &'static str, blocks: usize, ints: &[usize]) -> Launch {
        let held = if self.log > 12 { 32 } else { 16 };
        Launch {
            name,
            ints: ints.to_vec(),
            float: None,
            grid: (blocks, 1),
            block: (self.points() / held, 1),
            shared: self.shared(),
        }
    }

    fn module(&self) -> Module {
        Module::Fft {
            log: self.log,
            narrow: self.narrow,
        }
    }

    /// The kernels' spectrum: [channels, points, 2], f32.
    fn spectrum(&self, x: &[Tensor]) -> Result<Tensor> {
        let ints = [self.taps.0, self.taps.1, self.reverse.0, self.reverse.1];
        let launch = self.launch("fft_spectrum", self.channels, &ints);
        let shape = (self.channels, self.points(), 2).into();
        let kernels = [&x[1], x.get(2).unwrap_or(&x[1])];
        Ok(run_of(self.module(), launch, &kernels, vec![(shape, true)])?.remove(0))
    }

    /// u and kernels as [`Fft::of`] took them, to [batch, channels, length].
    pub(crate) fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        let ints = [self.batch, self.channels, self.length];
        let blocks = self.channels * self.batch.div_ceil(2);
        let launch = self.launch("fft_convolve", blocks, &ints);
        let outputs = vec![(x[0].shape().clone(), false)];
        let inputs = [&x[0], &self.spectrum(x)?];
        Ok(run_of(self.module(), launch, &inputs, outputs)?.remove(0))
    }

    /// Gradients of u and kernels, given that of the output: [batch, channels, length].
    pub(crate) fn backward(&self, x: &[Tensor], gradient: &Tensor) -> Result<Vec<Tensor>> {
        let pairs = self.batch.div_ceil(2);
        let parts = BLOCKS.div_ceil(self.channels).min(pairs);
        let ints = [self.batch, self.channels, self.length, parts];
        let launch = self.launch("fft_pull", self.channels * parts, &ints);
        let spectra = self.channels * parts * self.points() * 2;
        let outputs = vec![
            (x[0].shape().clone(), false),
            (spectra.into(), true),
            // Blocks of a single pair need no second place.
            (if parts < pairs { spectra } else { 1 }.into(), true),
        ];
        let inputs = [&x[0], gradient, &self.spectrum(x)?];
        let mut out = run_of(self.module(), launch, &inputs, outputs)?;
        let (grad_u, partial) = (out.remove(0), out.remove(0));
        let (taps, reverse) = (self.taps.0, self.reverse.0);
        let ints = [parts, taps, self.taps.1, reverse, self.reverse.1];
        let launch = self.launch("fft_taps", self.channels, &ints);
        let outputs = vec![((self.channels, taps + reverse).into(), true)];
        let both = run_of(self.module(), launch, &[&partial], outputs)?.remove(0);
        let both = both.to_dtype(x[0].dtype())?;
        if x.len() == 2 {
            return Ok(vec![grad_u, both]);
        }
        let part = |from, count| both.narrow(1, from, count)?.contiguous();
        Ok(vec![grad_u, part(0, taps)?, part(taps, reverse)?])
    }
}
