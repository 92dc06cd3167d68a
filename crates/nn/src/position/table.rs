//! Cosines and sines per position, and the rotation of one head by them.
//!
//! Angles are formed in f64 from the f32 frequencies: the frequencies are what a model was trained with,
//! while an f32 angle would lose whole turns at the positions this program is for.

use super::{Frequencies, XPos, angle};

/// How the coordinates of a head pair up.
///
/// Checkpoints are stored for one or the other; mixing them scrambles the frequencies silently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RopeLayout {
    /// Pair j is coordinates (j, j + rotary_dim/2): Hugging Face files, GGUF of the NEOX kind.
    Half,
    /// Pair j is coordinates (2j, 2j + 1): GPT-J, original Llama weights, GGUF of the llama kind.
    Interleaved,
}

/// Cosines and sines of positions 0.., for one set of frequencies.
#[derive(Debug, Clone)]
pub struct RopeTable {
    frequencies: Frequencies,
    layout: RopeLayout,
    /// A row holds the cosines, then the sines. `[positions, 2, rotary_dim / 2]`
    rows: Vec<f32>,
    positions: usize,
}

impl RopeTable {
    /// An empty table; [`ensure`](Self::ensure) fills it.
    pub fn new(frequencies: &Frequencies, layout: RopeLayout) -> Self {
        RopeTable {
            frequencies: frequencies.clone(),
            layout,
            rows: Vec::new(),
            positions: 0,
        }
    }

    /// Makes rows `0..positions_end` available. Grows by at least half, so that appending one position
    /// at a time costs amortised constant time.
    pub fn ensure(&mut self, positions_end: usize) {
        if positions_end <= self.positions {
            return;
        }
        let grown = positions_end.max(self.positions + self.positions / 2);
        let pairs = self.frequencies.inv_freq.len();
        self.rows.resize(grown * 2 * pairs, 0.0);
        for position in self.positions..grown {
            let row = &mut self.rows[position * 2 * pairs..][..2 * pairs];
            let (cos, sin) = row.split_at_mut(pairs);
            Self::compute_row(&self.frequencies, position as f64, cos, sin);
        }
        self.positions = grown;
    }

    /// Number of rows available.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// The frequencies the rows were made from.
    pub fn frequencies(&self) -> &Frequencies {
        &self.frequencies
    }

    /// The pairing this table was made for.
    pub fn layout(&self) -> RopeLayout {
        self.layout
    }

    /// Cosines and sines of one position, each `[rotary_dim / 2]`, attention factor included.
    ///
    /// Panics if [`ensure`](Self::ensure) was not called for this position.
    pub fn row(&self, position: usize) -> (&[f32], &[f32]) {
        let pairs = self.frequencies.inv_freq.len();
        self.rows[position * 2 * pairs..][..2 * pairs].split_at(pairs)
    }

    /// Rotates one head `[head_dim]` to `position`, whose row must be there.
    pub fn rotate(&self, x: &mut [f32], position: usize) {
        let (cos, sin) = self.row(position);
        rotate(self.layout, x, cos, sin);
    }

    /// Computes the row of any position, whole or not, near or far: `cos` and `sin` are
    /// `[rotary_dim / 2]`.
    pub fn compute_row(frequencies: &Frequencies, position: f64, cos: &mut [f32], sin: &mut [f32]) {
        let factor = frequencies.attention_factor * frequencies.query_factor;
        angle::cos_sin(&frequencies.inv_freq, position, factor, cos, sin);
        decay(frequencies, position, cos, sin);
    }

    /// As [`compute_row`](Self::compute_row), for keys: without the factor on queries, and with the decay of
    /// xPos turned round. Most rules have neither, and one row serves both.
    pub fn compute_key_row(
        frequencies: &Frequencies,
        position: f64,
        cos: &mut [f32],
        sin: &mut [f32],
    ) {
        let factor = frequencies.attention_factor;
        angle::cos_sin(&frequencies.inv_freq, position, factor, cos, sin);
        decay(frequencies, -position, cos, sin);
    }
}

/// The factors `zeta_j^(position / scale_base)` of xPos, if there are any.
fn decay(frequencies: &Frequencies, position: f64, cos: &mut [f32], sin: &mut [f32]) {
    let Some(scale_base) = frequencies.scale_base else {
        return;
    };
    for ((zeta, cos), sin) in XPos::zeta(cos.len()).iter().zip(cos).zip(sin) {
        let factor = zeta.powf(position / scale_base) as f32;
        *cos *= factor;
        *sin *= factor;
    }
}

/// Rotates one head in place. `x` is `[head_dim]`, `cos` and `sin` are `[rotary_dim / 2]`; coordinates
/// beyond `rotary_dim` pass through.
///
/// Panics if `cos` and `sin` differ in length or rotate more coordinates than `x` has.
#[inline]
pub fn rotate(layout: RopeLayout, x: &mut [f32], cos: &[f32], sin: &[f32]) {
    assert_eq!(cos.len(), sin.len(), "cosines and sines of one row");
    let pairs = cos.len();
    let x = &mut x[..2 * pairs];
    match layout {
        RopeLayout::Half => {
            // Four slices of one known length: no bounds checks, and the loop becomes vector code.
            let (first, second) = x.split_at_mut(pairs);
            let second = &mut second[..pairs];
            let sin = &sin[..pairs];
            for j in 0..pairs {
                let (a, b) = (first[j], second[j]);
                first[j] = a * cos[j] - b * sin[j];
                second[j] = b * cos[j] + a * sin[j];
            }
        }
        RopeLayout::Interleaved => {
            for ((pair, cos), sin) in x.chunks_exact_mut(2).zip(cos).zip(sin) {
                let (a, b) = (pair[0], pair[1]);
                pair[0] = a * cos - b * sin;
                pair[1] = b * cos + a * sin;
            }
        }
    }
}
