//! [`RopeBasis`]: one type for every rule that sets the rotary frequencies of a model.
//!
//! Serves anyone who runs a rotary model at, or past, its training length. The rules composed from
//! linear, power and truncated bases are from Giraffe (arXiv 2308.10882); the others are those that
//! published checkpoints carry. Frequencies are computed in f32 in the order the published
//! implementations use, so that a checkpoint sees the angles it was trained with.

use serde::{Deserialize, Serialize};

use super::clex::ClexTable;
use super::{RopeError, XPos};

/// What a basis yields for one sequence length.
#[derive(Debug, Clone, PartialEq)]
pub struct Frequencies {
    /// Angle per position of each rotated pair, radians. `[rotary_dim / 2]`
    pub inv_freq: Vec<f32>,
    /// Factor on cosines and sines alike; attention logits scale by its square.
    pub attention_factor: f64,
    /// A further factor on queries only; 1 for all rules but CLEX with its `log_scale`.
    pub query_factor: f64,
    /// xPos: tokens over which pair j decays by `zeta_j`. Queries grow by `zeta_j^(p / scale_base)`, keys
    /// by one over it, so that a key at position 0 is the un-rotated key.
    pub scale_base: Option<f64>,
}

impl Frequencies {
    /// Frequencies without factors. `[rotary_dim / 2]`
    pub fn plain(inv_freq: Vec<f32>) -> Self {
        Frequencies {
            inv_freq,
            attention_factor: 1.0,
            query_factor: 1.0,
            scale_base: None,
        }
    }

    /// Whether keys are turned and scaled exactly as queries are.
    pub fn keys_are_as_queries(&self) -> bool {
        self.query_factor == 1.0 && self.scale_base.is_none()
    }

    /// Whether a key rotated by one stands where a key rotated by the other does.
    pub fn same_keys(&self, other: &Frequencies) -> bool {
        self.inv_freq == other.inv_freq
            && self.attention_factor == other.attention_factor
            && self.scale_base == other.scale_base
    }
}

/// The hyper-parameters of YaRN, under the names of the checkpoint format.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct YarnParameters {
    /// How many times longer than `original_max_position_embeddings` the model shall read.
    pub factor: f64,
    /// Window the model was trained with before it was stretched, tokens.
    pub original_max_position_embeddings: usize,
    /// Pairs that turn more often than this within the original window keep their frequency.
    pub beta_fast: f64,
    /// Pairs that turn less often than this within the original window are slowed by `factor`.
    pub beta_slow: f64,
    /// Round the ends of the ramp to whole pairs.
    pub truncate: bool,
    /// Factor on cosines and sines; computed from the other fields if absent.
    pub attention_factor: Option<f64>,
    /// Numerator of the computed attention factor; 0 or absent means unset.
    pub mscale: Option<f64>,
    /// Denominator of the computed attention factor; 0 or absent means unset.
    pub mscale_all_dim: Option<f64>,
}

impl YarnParameters {
    /// YaRN with its published defaults: ramp between 32 and 1 turns, rounded ends.
    pub fn new(factor: f64, original_max_position_embeddings: usize) -> Self {
        YarnParameters {
            factor,
            original_max_position_embeddings,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
        }
    }
}

/// The rule that turns the plain frequencies `rope_theta^(-2j/d)` into those in use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// The plain frequencies.
    Default,
    /// Giraffe's bases, applied in this order: `linear` divides every frequency; `power` multiplies
    /// frequency j by `(1 - 2j/d)^power`; `truncated` keeps frequencies that turn fully within that many
    /// tokens, sets those down to an eighth of it to one constant, and stops the slower ones.
    Composed {
        /// Divisor of all frequencies (position interpolation); 1 changes nothing.
        linear: f64,
        /// Exponent; 0 changes nothing.
        power: f64,
        /// Cut-off, tokens; `None` changes nothing.
        truncated: Option<usize>,
    },
    /// A larger base, chosen so that the slowest frequency shrinks by `factor`.
    Ntk {
        /// How many times longer the model shall read.
        factor: f64,
    },
    /// A base that grows with the current length, once that exceeds `max_position_embeddings`.
    Dynamic {
        /// Growth of the base per training window.
        factor: f64,
    },
    /// YaRN: fast pairs keep their frequency, slow ones are divided, a ramp lies between.
    Yarn(YarnParameters),
    /// A factor per frequency, one list for sequences within the original window, one beyond it.
    LongRope {
        /// Divisors within the original window. `[rotary_dim / 2]`
        short_factor: Vec<f32>,
        /// Divisors beyond the original window. `[rotary_dim / 2]`
        long_factor: Vec<f32>,
        /// Window of the training before the stretch, tokens.
        original_max_position_embeddings: usize,
        /// Factor on cosines and sines, in both regimes.
        attention_factor: f64,
    },
    /// Llama 3.1: long wavelengths are divided by `factor`, short ones kept, blended between.
    Llama3 {
        /// Divisor of the slow frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` count as slow.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Window of the training before the stretch, tokens.
        original_max_position_embeddings: usize,
    },
    /// CLEX: frequencies learned per multiple of the training window, computed once.
    Clex(ClexTable),
}

/// How a model rotates its queries and keys: base, rotated coordinates, rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct RopeBasis {
    pub(super) rope_theta: f64,
    /// Coordinates that take part in pairs; the rest of the head passes through.
    pub(super) rotary_dim: usize,
    /// Pairs from this one on stand still though they belong to the rotation ("proportional" rope).
    pub(super) moving_pairs: usize,
    pub(super) max_position_embeddings: usize,
    /// Divisors of the plain frequencies, as stored beside the weights in GGUF files.
    pub(super) freq_factors: Option<Vec<f32>>,
    pub(super) scaling: RopeScaling,
    /// xPos on top of the rule: see [`Frequencies::scale_base`].
    pub(super) scale_base: Option<f64>,
    /// See [`RopeBasis::keeps_keys`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) keeps_keys: bool,
}

/// The fields of a basis as read from outside, before anyone looked at them.
#[derive(Deserialize)]
struct Unchecked {
    rope_theta: f64,
    rotary_dim: usize,
    moving_pairs: usize,
    max_position_embeddings: usize,
    freq_factors: Option<Vec<f32>>,
    scaling: RopeScaling,
    #[serde(default)]
    scale_base: Option<f64>,
    #[serde(default)]
    keeps_keys: bool,
}

impl TryFrom<Unchecked> for RopeBasis {
    type Error = RopeError;

    fn try_from(fields: Unchecked) -> Result<Self, RopeError> {
        let mut basis = RopeBasis::new(
            fields.rope_theta,
            fields.rotary_dim,
            fields.max_position_embeddings,
        )?
        .with_moving_pairs(fields.moving_pairs)?;
        if let Some(factors) = fields.freq_factors {
            check_factors("freq_factors", &factors, basis.pairs())?;
            basis.freq_factors = Some(factors);
        }
        if let Some(scale_base) = fields.scale_base {
            basis = basis.with_xpos(scale_base)?;
        }
        basis.keeps_keys = fields.keeps_keys;
        basis.with_scaling(fields.scaling)
    }
}

/// A divisor at or above this stops a frequency; GGUF files use 1e30 for pairs that do not rotate.
const STOPPED: f32 = 1e9;

impl RopeBasis {
    /// The plain rotation of `rotary_dim` coordinates with base `rope_theta`.
    ///
    /// `max_position_embeddings` is the window of the checkpoint in tokens; only rules that depend on
    /// a window read it. Errors: a base that is not above 0, an odd or zero `rotary_dim`, a zero window.
    pub fn new(
        rope_theta: f64,
        rotary_dim: usize,
        max_position_embeddings: usize,
    ) -> Result<Self, RopeError> {
        positive("rope_theta", rope_theta)?;
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            return Err(RopeError::field(
                "rotary dimension (head_dim * partial_rotary_factor)",
                rotary_dim,
                "an even number above 0, because coordinates rotate in pairs",
            ));
        }
        window("max_position_embeddings", max_position_embeddings)?;
        Ok(RopeBasis {
            rope_theta,
            rotary_dim,
            moving_pairs: rotary_dim / 2,
            max_position_embeddings,
            freq_factors: None,
            scaling: RopeScaling::Default,
            scale_base: None,
            keeps_keys: false,
        })
    }

    /// Leaves cached keys at the angles that they were first turned to.
    pub fn with_kept_keys(mut self) -> Self {
        self.keeps_keys = true;
        self
    }

    /// Whether keys stay as they were cached when the frequencies change with the length, as transformers
    /// leaves them; else all are turned anew, so that a text gives the same result however it was read.
    pub fn keeps_keys(&self) -> bool {
        self.keeps_keys
    }

    /// Adds the decay of xPos: pair j loses a factor `zeta_j` over every `scale_base` tokens of distance.
    pub fn with_xpos(mut self, scale_base: f64) -> Result<Self, RopeError> {
        positive("scale_base", scale_base)?;
        self.scale_base = Some(scale_base);
        Ok(self)
    }

    /// Lets only the first `moving_pairs` pairs rotate; the others keep their place with frequency 0.
    pub fn with_moving_pairs(mut self, moving_pairs: usize) -> Result<Self, RopeError> {
        if moving_pairs > self.pairs() {
            return Err(RopeError::field(
                "moving_pairs",
                moving_pairs,
                format!("at most {}, half the rotary dimension", self.pairs()),
            ));
        }
        self.moving_pairs = moving_pairs;
        Ok(self)
    }

    /// Replaces the rule. Errors name the parameter that is out of range.
    pub fn with_scaling(mut self, scaling: RopeScaling) -> Result<Self, RopeError> {
        match &scaling {
            RopeScaling::Default => {}
            RopeScaling::Clex(table) => table.check(self.pairs())?,
            RopeScaling::Composed {
                linear,
                power,
                truncated,
            } => {
                positive("factor", *linear)?;
                if !(power.is_finite() && *power >= 0.0) {
                    return Err(RopeError::field("power", power, "a number of at least 0"));
                }
                if let Some(tokens) = truncated {
                    window("truncated", *tokens)?;
                }
            }
            RopeScaling::Ntk { factor } | RopeScaling::Dynamic { factor } => {
                if !(factor.is_finite() && *factor >= 1.0) {
                    return Err(RopeError::field(
                        "factor",
                        factor,
                        "a number of at least 1: the rule raises the base",
                    ));
                }
                if self.rotary_dim == 2 {
                    return Err(RopeError::field(
                        "rotary dimension",
                        2,
                        "at least 4: a rule that raises the base needs two pairs",
                    ));
                }
            }
            RopeScaling::Yarn(yarn) => {
                positive("factor", yarn.factor)?;
                window(
                    "original_max_position_embeddings",
                    yarn.original_max_position_embeddings,
                )?;
                positive("beta_fast", yarn.beta_fast)?;
                positive("beta_slow", yarn.beta_slow)?;
                if self.rope_theta == 1.0 {
                    return Err(RopeError::field(
                        "rope_theta",
                        1.0,
                        "a base other than 1 for yarn, whose ramp divides by its logarithm",
                    ));
                }
                if let Some(factor) = yarn.attention_factor {
                    positive("attention_factor", factor)?;
                }
                for (name, value) in [
                    ("mscale", yarn.mscale),
                    ("mscale_all_dim", yarn.mscale_all_dim),
                ] {
                    if value.is_some_and(|v| !v.is_finite() || v < 0.0) {
                        return Err(RopeError::field(
                            name,
                            value.unwrap_or_default(),
                            "a number of at least 0",
                        ));
                    }
                }
            }
            RopeScaling::LongRope {
                short_factor,
                long_factor,
                original_max_position_embeddings,
                attention_factor,
            } => {
                check_factors("short_factor", short_factor, self.pairs())?;
                check_factors("long_factor", long_factor, self.pairs())?;
                window(
                    "original_max_position_embeddings",
                    *original_max_position_embeddings,
                )?;
                positive("attention_factor", *attention_factor)?;
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                positive("factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                positive("high_freq_factor", *high_freq_factor)?;
                if high_freq_factor <= low_freq_factor {
                    return Err(RopeError::field(
                        "high_freq_factor",
                        high_freq_factor,
                        format!("more than low_freq_factor ({low_freq_factor})"),
                    ));
                }
                window(
                    "original_max_position_embeddings",
                    *original_max_position_embeddings,
                )?;
            }
        }
        self.scaling = scaling;
        Ok(self)
    }

    /// The longest text that the rule is made for, tokens: the window times what it is stretched by.
    /// Rules that state no stretch (another base, power, truncated) leave the window as it is.
    pub fn stretched_window(&self) -> usize {
        let window = self.max_position_embeddings;
        let times = |tokens: usize, factor: f64| (tokens as f64 * factor.max(1.0)) as usize;
        match &self.scaling {
            RopeScaling::Default | RopeScaling::LongRope { .. } => window,
            RopeScaling::Composed { linear, .. } => times(window, *linear),
            RopeScaling::Ntk { factor } | RopeScaling::Dynamic { factor } => times(window, *factor),
            RopeScaling::Yarn(yarn) => times(yarn.original_max_position_embeddings, yarn.factor),
            RopeScaling::Llama3 {
                factor,
                original_max_position_embeddings,
                ..
            } => times(*original_max_position_embeddings, *factor),
            RopeScaling::Clex(table) => table.longest(),
        }
    }

    /// Refuses texts that the rule cannot express: past the last frequencies of CLEX, or where the
    /// factors of xPos leave the range of 16- and 32-bit numbers.
    pub fn check_length(&self, tokens: usize) -> Result<(), RopeError> {
        let too_long = |longest: usize, why: String| {
            if tokens <= longest {
                return Ok(());
            }
            Err(RopeError::TooLong {
                tokens,
                longest,
                why,
            })
        };
        if let RopeScaling::Clex(table) = &self.scaling {
            let why = format!(
                "CLEX has frequencies for up to {} windows of {} tokens",
                table.frequencies.len(),
                table.window
            );
            too_long(table.longest(), why)?;
        }
        if let Some(scale_base) = self.scale_base {
            // The first pair decays most; 2^100 leaves 2^27 for the values themselves.
            let zeta = XPos::zeta(self.pairs())[0];
            let longest = (100.0 * scale_base / -zeta.log2()) as usize;
            let why = format!("xPos with scale_base {scale_base} grows keys past what f32 holds");
            too_long(longest, why)?;
        }
        Ok(())
    }

    /// Divides the plain frequencies by `factors` `[rotary_dim / 2]`, the tensor `rope_freqs.weight`
    /// of a GGUF file. Trailing factors of 1e9 and more mean pairs that do not rotate; these belong to
    /// the model and survive an override of the rule, the others do not.
    pub fn with_freq_factors(mut self, factors: &[f32]) -> Result<Self, RopeError> {
        check_factors("rope_freqs.weight", factors, self.pairs())?;
        let moving = factors
            .iter()
            .rposition(|&factor| factor < STOPPED)
            .map_or(0, |last| last + 1);
        self.moving_pairs = self.moving_pairs.min(moving);
        self.freq_factors = factors[..moving]
            .iter()
            .any(|&factor| factor != 1.0)
            .then(|| factors.to_vec());
        Ok(self)
    }

    /// Number of leading coordinates of a head that rotate; the others pass through.
    pub fn rotary_dim(&self) -> usize {
        self.rotary_dim
    }

    /// The base of the geometric series of frequencies, before any rule.
    pub fn rope_theta(&self) -> f64 {
        self.rope_theta
    }

    /// The decay of xPos, tokens, if there is one.
    pub fn scale_base(&self) -> Option<f64> {
        self.scale_base
    }

    /// The window the checkpoint states, tokens.
    pub fn max_position_embeddings(&self) -> usize {
        self.max_position_embeddings
    }

    /// The rule in use.
    pub fn scaling(&self) -> &RopeScaling {
        &self.scaling
    }

    /// Whether [`frequencies`](Self::frequencies) reads the sequence length. Keys rotated at one length
    /// then do not fit queries rotated at another: cache keys un-rotated, or accept the mixture.
    pub fn depends_on_length(&self) -> bool {
        matches!(
            self.scaling,
            RopeScaling::Dynamic { .. } | RopeScaling::LongRope { .. } | RopeScaling::Clex(_)
        )
    }

    /// The frequencies for a sequence of `seq_len` tokens (highest position + 1); without a length,
    /// those for sequences within the training window.
    pub fn frequencies(&self, seq_len: Option<usize>) -> Frequencies {
        let dim = self.rotary_dim;
        let (mut attention_factor, mut query_factor) = (1.0, 1.0);
        let mut inv_freq = match &self.scaling {
            RopeScaling::Default => self.plain(self.rope_theta),
            RopeScaling::Composed {
                linear,
                power,
                truncated,
            } => {
                let mut inv_freq = self.plain(self.rope_theta);
                divide(&mut inv_freq, *linear);
                if *power != 0.0 {
                    for (j, freq) in inv_freq.iter_mut().enumerate() {
                        let keep = 1.0 - (2 * j) as f64 / dim as f64;
                        *freq *= keep.powf(*power) as f32;
                    }
                }
                if let Some(tokens) = truncated {
                    truncate(&mut inv_freq, *tokens);
                }
                inv_freq
            }
            RopeScaling::Ntk { factor } => self.plain(self.raised_base(*factor)),
            RopeScaling::Dynamic { factor } => {
                let window = self.max_position_embeddings;
                let length = seq_len.unwrap_or(window).max(window) as f64;
                let growth = factor * length / window as f64 - (factor - 1.0);
                self.plain(self.raised_base(growth))
            }
            RopeScaling::Yarn(yarn) => {
                attention_factor = yarn_attention_factor(yarn);
                self.yarn(yarn)
            }
            RopeScaling::LongRope {
                short_factor,
                long_factor,
                original_max_position_embeddings,
                attention_factor: factor,
            } => {
                attention_factor = *factor;
                let beyond = seq_len.is_some_and(|n| n > *original_max_position_embeddings);
                let factors = if beyond { long_factor } else { short_factor };
                self.wavelengths(self.rope_theta)
                    .iter()
                    .zip(factors)
                    .map(|(wavelength, factor)| 1.0 / (factor * wavelength))
                    .collect()
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let original = *original_max_position_embeddings as f32;
                let (low, high) = (*low_freq_factor as f32, *high_freq_factor as f32);
                let mut inv_freq = self.plain(self.rope_theta);
                for freq in &mut inv_freq {
                    let wavelength = std::f32::consts::TAU / *freq;
                    let slow = *freq / *factor as f32;
                    if wavelength > original / low {
                        *freq = slow;
                    } else if wavelength >= original / high {
                        let keep = (original / wavelength - low) / (high - low);
                        *freq = (1.0 - keep) * slow + keep * *freq;
                    }
                }
                inv_freq
            }
            RopeScaling::Clex(table) => {
                query_factor = table.query_factor(seq_len);
                table.row(seq_len).to_vec()
            }
        };
        inv_freq[self.moving_pairs..].fill(0.0);
        Frequencies {
            inv_freq,
            attention_factor,
            query_factor,
            scale_base: self.scale_base,
        }
    }

    /// Half the rotary dimension.
    pub(super) fn pairs(&self) -> usize {
        self.rotary_dim / 2
    }

    /// `base^(2j/d)` times the stored factors: tokens per radian. `[rotary_dim / 2]`
    fn wavelengths(&self, base: f64) -> Vec<f32> {
        // The base and the exponent are rounded to f32 first, as in the frameworks models train with.
        let base = f64::from(base as f32);
        let dim = self.rotary_dim as f32;
        let mut wavelengths: Vec<f32> = (0..self.pairs())
            .map(|j| base.powf(f64::from((2 * j) as f32 / dim)) as f32)
            .collect();
        if let Some(factors) = &self.freq_factors {
            for (wavelength, factor) in wavelengths.iter_mut().zip(factors) {
                *wavelength *= factor;
            }
        }
        wavelengths
    }

    /// The plain frequencies of `base`. `[rotary_dim / 2]`
    pub(super) fn plain(&self, base: f64) -> Vec<f32> {
        let mut inv_freq = self.wavelengths(base);
        for value in &mut inv_freq {
            *value = 1.0 / *value;
        }
        inv_freq
    }

    /// The base whose slowest frequency is that of `rope_theta` divided by `factor`.
    fn raised_base(&self, factor: f64) -> f64 {
        let dim = self.rotary_dim as f64;
        self.rope_theta * factor.powf(dim / (dim - 2.0))
    }

    fn yarn(&self, yarn: &YarnParameters) -> Vec<f32> {
        let dim = self.rotary_dim as f64;
        let original = yarn.original_max_position_embeddings as f64;
        // The (fractional) pair that turns `turns` times within the original window.
        let pair_turning = |turns: f64| {
            dim * (original / (turns * std::f64::consts::TAU)).ln() / (2.0 * self.rope_theta.ln())
        };
        let (mut low, mut high) = (pair_turning(yarn.beta_fast), pair_turning(yarn.beta_slow));
        if yarn.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001; // a step instead of a division by zero
        }
        let (low, width) = (low as f32, (high - low) as f32);
        self.wavelengths(self.rope_theta)
            .iter()
            .enumerate()
            .map(|(j, wavelength)| {
                let slowed = ((j as f32 - low) / width).clamp(0.0, 1.0);
                let kept = 1.0 - slowed;
                1.0 / (yarn.factor as f32 * wavelength) * slowed + 1.0 / wavelength * kept
            })
            .collect()
    }
}

/// YaRN's factor on cosines and sines.
fn yarn_attention_factor(yarn: &YarnParameters) -> f64 {
    let of_mscale = |mscale: f64| {
        if yarn.factor <= 1.0 {
            1.0
        } else {
            0.1 * mscale * yarn.factor.ln() + 1.0
        }
    };
    let set = |value: Option<f64>| value.filter(|&v| v != 0.0);
    if let Some(factor) = yarn.attention_factor {
        return factor;
    }
    match (set(yarn.mscale), set(yarn.mscale_all_dim)) {
        (Some(mscale), Some(all_dim)) => of_mscale(mscale) / of_mscale(all_dim),
        _ => of_mscale(1.0),
    }
}

fn divide(inv_freq: &mut [f32], factor: f64) {
    for freq in inv_freq {
        *freq /= factor as f32;
    }
}

/// Giraffe's truncated basis: `tokens` is the cut-off window.
fn truncate(inv_freq: &mut [f32], tokens: usize) {
    let keep_from = std::f64::consts::TAU / tokens as f64;
    let stop_below = keep_from / 8.0;
    let constant = (keep_from / 16.0) as f32;
    for freq in inv_freq {
        let value = f64::from(*freq);
        if value < stop_below {
            *freq = 0.0;
        } else if value < keep_from {
            *freq = constant;
        }
    }
}

fn positive(field: &str, value: f64) -> Result<(), RopeError> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(RopeError::field(field, value, "a number above 0"))
}

fn window(field: &str, tokens: usize) -> Result<(), RopeError> {
    if tokens > 0 {
        return Ok(());
    }
    Err(RopeError::field(
        field,
        tokens,
        "a number of tokens above 0",
    ))
}

fn check_factors(field: &str, factors: &[f32], pairs: usize) -> Result<(), RopeError> {
    if factors.len() != pairs {
        return Err(RopeError::field(
            field,
            format!("a list of {} values", factors.len()),
            format!("{pairs} values, half the rotary dimension"),
        ));
    }
    match factors.iter().find(|f| !f.is_finite() || **f <= 0.0) {
        Some(bad) => Err(RopeError::field(field, bad, "only numbers above 0")),
        None => Ok(()),
    }
}
