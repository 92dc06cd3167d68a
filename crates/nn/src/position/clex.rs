//! CLEX: rotary frequencies learned as a continuous path over the length of the text.
//!
//! For models fine-tuned (or, with `clex-init`, not tuned at all) to read several times their window, from
//! CLEX (arXiv 2310.16450): `log theta(t)` follows an ordinary differential equation in the scale `t`,
//! text length over training window, whose field is the trend of NTK scaling plus a small learned network.

mod field;
mod weights;

use serde::{Deserialize, Serialize};

use super::RopeError;
pub use field::{Act, ClexField, Gradients};
pub use weights::ClexWeights;

/// The hyper-parameters of CLEX, under the names of the checkpoint format.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClexConfig {
    /// Longest text in windows: frequencies exist for scales 1 to this.
    pub max_factor: usize,
    /// Width of the network over the rotary dimension (the paper's lambda).
    pub param_factor: usize,
    /// Activation of the network; files that do not state it mean `silu`.
    pub act: Act,
    /// Step of the solver.
    pub time_dt: f64,
    /// Base of the NTK trend inside the field. The published code uses 10000 whatever the model's own base is.
    pub clex_field_base: f64,
    /// Whether queries grow with the logarithm of the length.
    pub log_scale: LogScale,
}

impl Default for ClexConfig {
    fn default() -> Self {
        ClexConfig {
            max_factor: 16,
            param_factor: 1,
            act: Act::Tanh,
            time_dt: 0.01,
            clex_field_base: 10_000.0,
            log_scale: LogScale::Off,
        }
    }
}

/// A factor `ln(length) / ln(window)` on queries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogScale {
    /// None.
    #[default]
    Off,
    /// At least 1: texts within the window are left alone.
    Max,
    /// As the published code has it, below 1 for texts shorter than the window.
    Raw,
}

/// What reading needs of CLEX: the frequencies at every whole scale.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClexTable {
    /// The training window before any stretch (L), tokens.
    pub window: usize,
    /// See [`ClexConfig::log_scale`].
    pub log_scale: LogScale,
    /// Row `t - 1` serves texts of up to `t` windows. `[max_factor, rotary_dim / 2]`
    pub frequencies: Vec<Vec<f32>>,
}

impl ClexTable {
    /// Solves the equation from the plain frequencies `theta` `[rotary_dim / 2]` at scale 1, which stay as
    /// they are, to every whole scale up to `config.max_factor`.
    pub fn new(theta: &[f32], field: &ClexField, config: &ClexConfig, window: usize) -> Self {
        let times: Vec<f64> = (1..=config.max_factor).map(|t| t as f64).collect();
        let start: Vec<f64> = theta.iter().map(|&theta| f64::from(theta).ln()).collect();
        let mut frequencies: Vec<Vec<f32>> = field
            .solve(&start, &times, config.time_dt)
            .into_iter()
            .map(|z| z.into_iter().map(|z| z.exp() as f32).collect())
            .collect();
        if let Some(first) = frequencies.first_mut() {
            first.copy_from_slice(theta);
        }
        ClexTable {
            window,
            log_scale: config.log_scale,
            frequencies,
        }
    }

    /// What the equation gives before any training (the network adds nothing): NTK scaling by
    /// `2t - 1`, in closed form.
    pub fn untrained(theta: &[f32], max_factor: usize, window: usize) -> Self {
        let dim = (2 * theta.len()) as f64;
        let row = |t: usize| {
            let log_alpha = (2.0 * t as f64 - 1.0).ln();
            let slowed = theta.iter().enumerate().map(|(j, &theta)| {
                let exponent = (2 * j) as f64 / (dim - 2.0);
                (f64::from(theta) * (-exponent * log_alpha).exp()) as f32
            });
            slowed.collect()
        };
        let mut frequencies: Vec<Vec<f32>> = (1..=max_factor).map(row).collect();
        if let Some(first) = frequencies.first_mut() {
            first.copy_from_slice(theta);
        }
        ClexTable {
            window,
            log_scale: LogScale::Off,
            frequencies,
        }
    }

    /// The scale for a text of this many tokens, and whether it had to be cut down to the largest one.
    pub fn factor_for(&self, tokens: usize) -> (usize, bool) {
        let factor = tokens.div_ceil(self.window).max(1);
        let most = self.frequencies.len();
        (factor.min(most), factor > most)
    }

    /// The frequencies for a text of `seq_len` tokens; those of the window if it is not known.
    /// `[rotary_dim / 2]`
    pub fn row(&self, seq_len: Option<usize>) -> &[f32] {
        let (factor, _) = self.factor_for(seq_len.unwrap_or(self.window));
        &self.frequencies[factor - 1]
    }

    /// The factor on queries for a text of `seq_len` tokens.
    pub fn query_factor(&self, seq_len: Option<usize>) -> f64 {
        let ratio = (seq_len.unwrap_or(self.window) as f64).ln() / (self.window as f64).ln();
        match self.log_scale {
            LogScale::Off => 1.0,
            LogScale::Max => ratio.max(1.0),
            LogScale::Raw => ratio,
        }
    }

    /// The longest text there are frequencies for, tokens.
    pub fn longest(&self) -> usize {
        self.window.saturating_mul(self.frequencies.len())
    }

    /// Refuses tables that do not fit a rotation of so many pairs.
    pub(super) fn check(&self, pairs: usize) -> Result<(), RopeError> {
        // A window of one token has logarithm 0, by which `log_scale` divides.
        if self.window == 0 || (self.window == 1 && self.log_scale != LogScale::Off) {
            return Err(RopeError::field("window", self.window, "at least 2 tokens"));
        }
        if self.frequencies.is_empty() {
            return Err(RopeError::field("max_factor", 0, "at least 1"));
        }
        for row in &self.frequencies {
            if row.len() != pairs {
                return Err(RopeError::field(
                    "clex frequencies",
                    format!("{} values for a scale", row.len()),
                    format!("{pairs}, half the rotary dimension"),
                ));
            }
            if let Some(bad) = row.iter().find(|freq| !freq.is_finite() || **freq < 0.0) {
                return Err(RopeError::field(
                    "clex frequencies",
                    bad,
                    "numbers of at least 0; the weights or `time_dt` are wrong",
                ));
            }
        }
        Ok(())
    }
}

/// Stretched positions of one training step: `length` tokens spread over `factor` times as many places,
/// in units of the window (Algorithm of section 3.3; the paper's code divides by `floor(length / window)`).
///
/// `draw` are `length - 2` distinct whole numbers in `0..length * factor - 2`, sorted. The first position is
/// 0, the last the end of the stretched text. For texts of several windows neighbours may coincide near the
/// end, which the reference allows too. Errors on a draw of another size or out of range.
pub fn training_positions(
    length: usize,
    window: usize,
    factor: usize,
    draw: &[u64],
) -> Result<Vec<f64>, RopeError> {
    if length < 2 || window == 0 || factor == 0 {
        return Err(RopeError::field(
            "length, window, factor",
            format!("{length}, {window}, {factor}"),
            "at least 2 tokens, a window and a factor above 0",
        ));
    }
    let places = (length * factor) as u64;
    let rising = draw.windows(2).all(|pair| pair[0] < pair[1]);
    let inside = draw.last().is_none_or(|&last| last < places - 2);
    if draw.len() != length - 2 || !rising || !inside {
        return Err(RopeError::field(
            "draw",
            format!("{} numbers", draw.len()),
            format!(
                "{} distinct numbers below {}, sorted",
                length - 2,
                places - 2
            ),
        ));
    }
    let share = (length / window).max(1) as u64;
    let mut positions = Vec::with_capacity(length);
    positions.push(0.0);
    positions.extend(draw.iter().map(|&place| (place + 1) as f64 / share as f64));
    positions.push((places / share - 1) as f64);
    Ok(positions)
}
