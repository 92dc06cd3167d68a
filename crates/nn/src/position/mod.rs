//! Where a token sits: the rotary frequencies of a model, and the rotation of queries and keys by them.
//!
//! [`RopeBasis`] answers one question, "at which angle does position `p` sit?", for every rule found in
//! published checkpoints and for those that stretch a model past its training length. It yields
//! [`Frequencies`]; [`RopeTable`] turns those into cosines and sines, and [`rotate`] applies them.
//! [`RopeOverride`] sets another rule on a checkpoint, [`LayerRopes`] says which layers it applies to.
//! Positions drawn at random for training are in [`randomized`], the decaying variant xPos in [`xpos`],
//! frequencies learned over length in [`clex`], and biases in place of rotations in [`alibi`].

pub mod alibi;
mod angle;
mod basis;
pub mod clex;
mod hf;
mod layers;
mod parse;
pub mod randomized;
mod table;
pub mod xpos;

pub use basis::{Frequencies, RopeBasis, RopeScaling, YarnParameters};
pub use hf::KNOWN_ROPE_TYPES;
pub use layers::LayerRopes;
pub use parse::{CachedKeys, KNOWN_OVERRIDES, OVERRIDE_HELP, RopeOverride, RopeTerm};
pub use table::{RopeLayout, RopeTable, rotate};
pub use xpos::XPos;

/// Why a rotary basis could not be made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RopeError {
    /// The checkpoint names a rule this program does not have.
    #[error("rope_type `{found}` is not known; known types are: {known}")]
    UnknownType {
        /// The name in the configuration.
        found: String,
        /// All accepted names.
        known: String,
    },
    /// The configuration is understood, and cannot be honoured.
    #[error("{what} is not supported: {why}")]
    Unsupported {
        /// What the configuration asks for.
        what: String,
        /// Why it cannot be done, and what to do instead.
        why: String,
    },
    /// A field is missing, of the wrong kind, or out of its range.
    #[error("rope parameter `{field}` is {found}; expected {expected}")]
    Field {
        /// Name of the field, as the configuration spells it.
        field: String,
        /// The value found, or "missing".
        found: String,
        /// What would have been accepted.
        expected: String,
    },
    /// The rule has no angles for a text of this length.
    #[error("a text of {tokens} tokens is too long: {why}; at most {longest} tokens")]
    TooLong {
        /// Tokens of the text.
        tokens: usize,
        /// The longest text it can be used for.
        longest: usize,
        /// What sets the limit.
        why: String,
    },
    /// A file that a rule needs cannot be used.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file or folder.
        path: std::path::PathBuf,
        /// What is wrong with it, and what was expected.
        problem: String,
    },
    /// An override given on the command line does not parse.
    #[error("--rope `{text}`: {problem}; known are: {known}")]
    Override {
        /// The whole text given.
        text: String,
        /// What is wrong with it.
        problem: String,
        /// The accepted forms.
        known: String,
    },
}

impl RopeError {
    pub(crate) fn field(
        field: impl Into<String>,
        found: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        RopeError::Field {
            field: field.into(),
            found: found.to_string(),
            expected: expected.into(),
        }
    }
}
