//! xPos: a rotation whose logits also decay with distance, faster for fast pairs.
//!
//! For those who train or fine-tune with a built-in preference for near tokens (xPos, arXiv 2212.10554;
//! the variant and its defaults are those of Giraffe, arXiv 2308.10882). Queries are multiplied and keys
//! divided by `zeta_j^(p / scale_base)`, so a logit carries `zeta_j^((m - n) / scale_base)` per pair.

use serde::{Deserialize, Serialize};

use super::{Frequencies, RopeLayout, RopeTable, rotate};

/// The hyper-parameters of xPos.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct XPos {
    /// Tokens over which pair j decays by `zeta_j`; infinity is the plain rotation.
    pub scale_base: f64,
    /// Length over which exponents are centred. It keeps the factors near 1 and cancels in every logit,
    /// as long as it is the same for all tokens of a sequence.
    pub max_position_embeddings: usize,
    /// Pairing of the coordinates: that of the checkpoint.
    pub layout: RopeLayout,
}

impl XPos {
    /// xPos with the default decay, 512 tokens.
    pub fn new(max_position_embeddings: usize, layout: RopeLayout) -> Self {
        XPos {
            scale_base: 512.0,
            max_position_embeddings,
            layout,
        }
    }

    /// Decay base of each of `pairs` pairs, `(2j + 0.4 d) / (1.4 d)` with `d = 2 * pairs`.
    pub fn zeta(pairs: usize) -> Vec<f64> {
        let dim = (2 * pairs) as f64;
        (0..pairs)
            .map(|j| ((2 * j) as f64 + 0.4 * dim) / (1.4 * dim))
            .collect()
    }

    /// Factors of one position, `[pairs]`: on a query at that position, one over them on a key.
    pub fn scale_row(&self, position: f64, scale: &mut [f32]) {
        let centred = position - self.max_position_embeddings.div_ceil(2) as f64;
        let zeta = Self::zeta(scale.len());
        for (scale, zeta) in scale.iter_mut().zip(zeta) {
            *scale = zeta.powf(centred / self.scale_base) as f32;
        }
    }

    /// Rotates and scales one query head `[head_dim]` in place.
    pub fn rotate_query(&self, frequencies: &Frequencies, position: f64, query: &mut [f32]) {
        self.rotate_scaled(frequencies, position, query, |scale| scale);
    }

    /// Rotates and scales one key head `[head_dim]` in place.
    pub fn rotate_key(&self, frequencies: &Frequencies, position: f64, key: &mut [f32]) {
        self.rotate_scaled(frequencies, position, key, f32::recip);
    }

    fn rotate_scaled(
        &self,
        frequencies: &Frequencies,
        position: f64,
        x: &mut [f32],
        of_scale: impl Fn(f32) -> f32,
    ) {
        let pairs = frequencies.inv_freq.len();
        let (mut cos, mut sin) = (vec![0.0; pairs], vec![0.0; pairs]);
        let mut scale = vec![0.0; pairs];
        RopeTable::compute_row(frequencies, position, &mut cos, &mut sin);
        self.scale_row(position, &mut scale);
        for j in 0..pairs {
            let factor = of_scale(scale[j]);
            cos[j] *= factor;
            sin[j] *= factor;
        }
        rotate(self.layout, x, &cos, &sin);
    }
}
