//! Attention in which every token of a document sees every other: encoders (BERT).
//!
//! Plain f32 tensors on the CPU go through the paged kernel, all documents in one fork-join; anything
//! else is composed of candle ops, which have gradients and run on any device.

use super::Attend;
use candle_core::{D, Device, Result, Tensor, bail};
use longspan_kernels::attention::{
    Attention, KvDtype, KvLayout, Mask, PAGE, Part, Tile, Tiles, attention_batch,
};
use longspan_kernels::ops::{is_plain, with_rows, with_strided_rows};
use longspan_kernels::pool::{Pool, SharedMut};

/// 64 bytes on a cache line: what planes are made of.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Softmax attention inside each of several documents whose tokens lie flat.
pub struct BidirectionalAttention {
    num_heads: usize,
    head_dim: usize,
    kv: KvDtype,
    /// Document lengths of the flat tokens; they sum to the number of tokens of a call.
    lengths: Vec<usize>,
    /// First page of each document, and the number of all pages.
    pages: Vec<usize>,
    /// K planes of all pages, then their V planes; kept from layer to layer.
    planes: Vec<Line>,
}

impl BidirectionalAttention {
    /// Attention over packed documents of these lengths; `kv` is how the kernel holds keys and values.
    pub fn packed(num_heads: usize, head_dim: usize, kv: KvDtype, lengths: &[usize]) -> Self {
        let mut pages = vec![0];
        pages.extend(lengths.iter().scan(0, |sum, length| {
            *sum += length.div_ceil(PAGE);
            Some(*sum)
        }));
        BidirectionalAttention {
            num_heads,
            head_dim,
            kv,
            lengths: lengths.to_vec(),
            pages,
            planes: Vec::new(),
        }
    }

    /// The kernel's path. query [tokens, heads head_dim] contiguous, key and value rows of it.
    fn fused(&mut self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
        let (heads, dim) = (self.num_heads, self.head_dim);
        let (tokens, width) = (query.dim(0)?, heads * dim);
        let layout = KvLayout {
            num_kv_heads: heads,
            head_dim: dim,
            dtype: self.kv,
        };
        let plane = layout.plane_bytes();
        let pages = *self.pages.last().unwrap_or(&0);
        let lines = (2 * pages * plane).div_ceil(64);
        self.planes.resize(lines, Line([0; 64]));
        // SAFETY: lines are plain bytes without padding.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(self.planes.as_mut_ptr().cast::<u8>(), lines * 64)
        };
        let (key_planes, value_planes) = bytes.split_at_mut(pages * plane);
        let starts: Vec<usize> = (self.lengths.iter())
            .scan(0, |sum, length| {
                let start = *sum;
                *sum += length;
                Some(start)
            })
            .collect();
        let (lengths, firsts) = (&self.lengths, &self.pages);
        for (planes, rows, keys) in [
            (&mut *key_planes, key, true),
            (&mut *value_planes, value, false),
        ] {
            let shared = SharedMut::new(planes);
            with_strided_rows(rows, |rows, stride| {
                Pool::global().for_each(lengths.len(), |document| {
                    let (start, length) = (starts[document], lengths[document]);
                    for (page, at) in (0..length).step_by(PAGE).enumerate() {
                        let count = PAGE.min(length - at);
                        // SAFETY: every page belongs to one document.
                        let plane =
                            unsafe { shared.slice((firsts[document] + page) * plane, plane) };
                        let first = (start + at) * stride;
                        let rows = &rows[first..first + (count - 1) * stride + width];
                        if keys {
                            layout.write_keys(plane, 0, rows, stride);
                        } else {
                            layout.write_values(plane, 0, rows, stride);
                        }
                    }
                });
            })?;
        }
        let tiles: Vec<Vec<Tile>> = (lengths.iter().zip(firsts))
            .map(|(&length, &first)| {
                (0..length.div_ceil(PAGE))
                    .map(|page| {
                        let at = (first + page) * plane;
                        Tile {
                            keys: &key_planes[at..at + plane],
                            values: &value_planes[at..at + plane],
                            first: (page * PAGE) as u64,
                            lo: 0,
                            hi: PAGE.min(length - page * PAGE) as u8,
                        }
                    })
                    .collect()
            })
            .collect();
        let mut out = vec![0f32; tokens * width];
        with_rows(query, |query| {
            let parts: Vec<[Part; 1]> = (starts.iter().zip(lengths).zip(&tiles))
                .map(|((&start, &length), tiles)| {
                    [Part {
                        query: &query[start * width..(start + length) * width],
                        tiles: Tiles::Shared(tiles),
                        mask: Mask::All,
                        column_sums: false,
                        alibi: None,
                    }]
                })
                .collect();
            let items: Vec<Attention> = (parts.iter().zip(lengths))
                .map(|(parts, &queries)| Attention {
                    layout,
                    num_heads: heads,
                    queries,
                    query_start: 0,
                    scale: (dim as f32).powf(-0.5),
                    softcap: None,
                    row_exact: false,
                    parts,
                })
                .collect();
            let mut rest = &mut out[..];
            let mut outs = Vec::with_capacity(lengths.len());
            for &length in lengths {
                let (own, others) = rest.split_at_mut(length * width);
                outs.push(own);
                rest = others;
            }
            for (item, out) in items.iter().zip(&outs) {
                item.check(out.len()).map_err(candle_core::Error::wrap)?;
            }
            attention_batch(&items, &mut outs);
            Ok::<_, candle_core::Error>(())
        })??;
        Tensor::from_vec(out, (tokens, width), &Device::Cpu)
    }

    /// The same by candle ops: query, key and value [tokens, heads head_dim].
    fn composed(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
        let (heads, dim) = (self.num_heads, self.head_dim);
        let mut outputs = Vec::with_capacity(self.lengths.len());
        let mut start = 0;
        for &length in &self.lengths {
            // [length, heads head_dim] -> [heads, length, head_dim]
            let split = |x: &Tensor| {
                x.narrow(0, start, length)?
                    .contiguous()?
                    .reshape((length, heads, dim))?
                    .transpose(0, 1)?
                    .contiguous()
            };
            let (query, key, value) = (split(query)?, split(key)?, split(value)?);
            let scores = query.matmul(&key.transpose(1, 2)?.contiguous()?)?; // [heads, length, length]
            let scores = (scores * (dim as f64).powf(-0.5))?;
            let top = scores.max_keepdim(D::Minus1)?.detach();
            let weights = scores.broadcast_sub(&top)?.exp()?;
            let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
            let out = weights.matmul(&value)?; // [heads, length, head_dim]
            outputs.push(
                out.transpose(0, 1)?
                    .contiguous()?
                    .reshape((length, heads * dim))?,
            );
            start += length;
        }
        Tensor::cat(&outputs, 0)
    }
}

impl Attend for BidirectionalAttention {
    fn attend(&mut self, _: usize, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
        let (tokens, held) = (query.dim(0)?, self.lengths.iter().sum::<usize>());
        if held != tokens || self.lengths.contains(&0) {
            bail!(
                "document lengths {:?} sum to {held}, expected {tokens} tokens and none without any",
                self.lengths
            );
        }
        if is_plain(query) && is_plain(key) && is_plain(value) && self.head_dim.is_multiple_of(2) {
            self.fused(query, key, value)
        } else {
            self.composed(query, key, value)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_agrees_with_candle_ops() {
        for (heads, dim, lengths) in [
            (2, 8, vec![1, 5, 63]),
            (3, 32, vec![64, 65, 2]),
            (12, 32, vec![200, 7, 129]),
        ] {
            let tokens: usize = lengths.iter().sum();
            let width = heads * dim;
            let value = |i: usize| ((i * 7919 % 1009) as f32 / 300.0) - 1.7;
            let values: Vec<f32> = (0..tokens * 3 * width).map(value).collect();
            let qkv = Tensor::from_vec(values, (tokens, 3 * width), &Device::Cpu).unwrap();
            let part = |i: usize| qkv.narrow(1, i * width, width).unwrap();
            let mut exact = BidirectionalAttention::packed(heads, dim, KvDtype::F32, &lengths);
            let fused = exact.fused(&part(0), &part(1), &part(2)).unwrap();
            let composed = exact.composed(&part(0), &part(1), &part(2)).unwrap();
            let greatest = (fused - composed)
                .and_then(|d| d.abs()?.max_all()?.to_scalar::<f32>())
                .unwrap();
            assert!(greatest < 2e-6, "{heads} heads of {dim}: {greatest}");
        }
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        let x = Tensor::zeros((4, 8), candle_core::DType::F32, &Device::Cpu).unwrap();
        for lengths in [vec![3], vec![4, 0]] {
            let mut attend = BidirectionalAttention::packed(2, 4, KvDtype::F32, &lengths);
            let error = attend.attend(0, &x, &x, &x).unwrap_err().to_string();
            assert!(error.contains("expected 4 tokens"), "{error}");
        }
    }
}
