//! [`LayerRopes`]: the rotary bases of a whole model, and which layer uses which.
//!
//! For engines and trainers. An override changes the layers that see everything; layers with a sliding
//! window keep their base, because no distance in them grows with the text, and layers without position
//! encoding stay without.

use serde::Serialize;

use super::{RopeBasis, RopeError, RopeOverride};
use crate::config::{ModelConfig, RopeSpec};

/// The bases of a model, by layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerRopes {
    bases: Vec<RopeBasis>,
    /// Index into `bases`, by layer.
    of_layer: Vec<Option<usize>>,
    /// Whether a basis is that of layers that see everything.
    reaches: Vec<bool>,
}

/// The rule of a checkpoint that only an override can complete.
const CLEX: &str = "clex";

fn basis(config: &ModelConfig, spec: &RopeSpec) -> Result<RopeBasis, RopeError> {
    let basis = RopeBasis::from_hf(
        &spec.parameters,
        config.head_dim,
        spec.max_position_embeddings,
    )?;
    match &spec.freq_factors {
        Some(factors) => basis.with_freq_factors(factors),
        None => Ok(basis),
    }
}

fn is_clex(spec: &RopeSpec) -> bool {
    spec.parameters
        .get("rope_type")
        .is_some_and(|name| name == CLEX)
}

impl LayerRopes {
    /// The bases that a checkpoint states. Errors name the field at fault.
    pub fn new(config: &ModelConfig) -> Result<Self, RopeError> {
        let bases: Vec<RopeBasis> = config
            .rope
            .iter()
            .map(|spec| basis(config, spec))
            .collect::<Result<_, _>>()?;
        Ok(Self::assign(config, bases))
    }

    fn assign(config: &ModelConfig, bases: Vec<RopeBasis>) -> Self {
        let mut reaches = vec![false; bases.len()];
        for layer in &config.layers {
            if let (Some(rope), None) = (layer.rope, layer.sliding_window) {
                reaches[rope] = true;
            }
        }
        LayerRopes {
            bases,
            of_layer: config.layers.iter().map(|layer| layer.rope).collect(),
            reaches,
        }
    }

    /// Whether the checkpoint was tuned with CLEX: its bases are complete only with the weights, which an
    /// override of [`RopeOverride::clex`] on the model's own folder reads.
    pub fn needs_clex(config: &ModelConfig) -> bool {
        config.rope.iter().any(is_clex)
    }

    /// The bases with another rule on all layers that see everything.
    ///
    /// Errors: a rule that this model, or reading as such, has no use for; a parameter out of range; a file
    /// that cannot be read.
    pub fn with_override(config: &ModelConfig, rope: &RopeOverride) -> Result<Self, RopeError> {
        let refuse = |why: &str| RopeError::Unsupported {
            what: format!("--rope {rope} on this model"),
            why: why.into(),
        };
        if rope.randomised().is_some() {
            return Err(refuse(
                "positions are drawn at random in training only; a model trained so reads with the plain ones, so leave `randomised` out",
            ));
        }
        if config.layers.iter().all(|layer| layer.rope.is_none()) {
            return Err(refuse("it has no rotary positions"));
        }
        let reaches = |layer: &crate::config::LayerConfig| layer.sliding_window.is_none();
        if !config.layers.iter().any(|l| l.rope.is_some() && reaches(l)) {
            return Err(refuse(
                "every rotary layer sees only the last tokens, at distances the model was trained for; it needs no stretch",
            ));
        }
        // The own rule is dropped anyway; CLEX could not be read without its weights.
        let plain = |spec: &RopeSpec| {
            let mut spec = spec.clone();
            if is_clex(&spec) {
                spec.parameters["rope_type"] = "default".into();
            }
            basis(config, &spec)
        };
        let mut bases: Vec<RopeBasis> = config.rope.iter().map(plain).collect::<Result<_, _>>()?;
        let own = bases.len();
        let mut of_layer: Vec<Option<usize>> = config.layers.iter().map(|l| l.rope).collect();
        let mut reaching = vec![false; own];
        let mut replaced: Vec<Option<usize>> = vec![None; own];
        for (layer, of_layer) in config.layers.iter().zip(&mut of_layer) {
            let (Some(index), true) = (layer.rope, reaches(layer)) else {
                continue;
            };
            let new = match replaced[index] {
                Some(new) => new,
                None => {
                    bases.push(rope.apply(&bases[index])?);
                    reaching.push(true);
                    replaced[index] = Some(bases.len() - 1);
                    bases.len() - 1
                }
            };
            *of_layer = Some(new);
        }
        Ok(LayerRopes {
            bases,
            of_layer,
            reaches: reaching,
        })
    }

    /// All bases; a layer's is named by [`of_layer`](Self::of_layer).
    pub fn bases(&self) -> &[RopeBasis] {
        &self.bases
    }

    /// Index of a layer's basis; None = no position encoding.
    pub fn of_layer(&self, layer: usize) -> Option<usize> {
        self.of_layer.get(layer).copied().flatten()
    }

    /// The bases in use by some layer.
    fn used(&self) -> impl Iterator<Item = &RopeBasis> {
        let of_layer = &self.of_layer;
        let used = move |index: usize| of_layer.contains(&Some(index));
        let bases = self.bases.iter().enumerate();
        bases.filter(move |(i, _)| used(*i)).map(|(_, basis)| basis)
    }

    /// Whether some layer's angles depend on the length of the text.
    pub fn depend_on_length(&self) -> bool {
        self.used().any(RopeBasis::depends_on_length)
    }

    /// Whether cached keys of some layer must be turned anew as the text grows.
    pub fn turn_cached_keys(&self) -> bool {
        let mut used = self.used();
        used.any(|basis| basis.depends_on_length() && !basis.keeps_keys())
    }

    /// Whether some layer turns keys otherwise than queries: xPos, or CLEX with a factor on queries.
    pub fn keys_differ(&self) -> bool {
        self.used().any(|basis| {
            basis.scale_base().is_some()
                || matches!(basis.scaling(), super::RopeScaling::Clex(table)
                    if table.log_scale != super::clex::LogScale::Off)
        })
    }

    /// The longest text that the rules of the layers which see everything are made for, tokens.
    pub fn stretched_window(&self) -> Option<usize> {
        let bases = self.bases.iter().zip(&self.reaches);
        let reaching = bases.filter(|(_, reaches)| **reaches);
        reaching.map(|(basis, _)| basis.stretched_window()).min()
    }

    /// Refuses texts that a rule cannot express.
    pub fn check_length(&self, tokens: usize) -> Result<(), RopeError> {
        self.used().try_for_each(|basis| basis.check_length(tokens))
    }
}
