//! What can be wrong with a tokenizer file: every way to fail, named with what was found and what was expected.

use std::path::PathBuf;

/// Why a tokenizer could not be built or could not encode.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file could not be read.
    #[error("cannot read {path}: {source}", path = path.display())]
    Read {
        /// The file asked for.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A JSON file is cut short or is not what its name says.
    #[error("{path} is not a usable tokenizer file: {found}; expected {expected}", path = path.display())]
    Json {
        /// The file at fault.
        path: PathBuf,
        /// What was found.
        found: String,
        /// What was expected.
        expected: &'static str,
    },
    /// `tokenizer.ggml.model` names a family that is not implemented.
    #[error("tokenizer.ggml.model is `{found}`; known models are: {known}")]
    UnknownModel {
        /// The value found.
        found: String,
        /// The values understood, comma separated.
        known: String,
    },
    /// `tokenizer.ggml.pre` names a pre-tokenizer that is not implemented.
    #[error(
        "tokenizer.ggml.pre is `{found}`, whose splitting rules are not known here; known ones are: {known}. \
         Use the model's tokenizer.json instead"
    )]
    UnknownPre {
        /// The value found.
        found: String,
        /// The values understood, comma separated.
        known: String,
    },
    /// Two parallel arrays differ in length.
    #[error("{field} has {found} entries; expected {expected}, one for each token")]
    Length {
        /// The array at fault.
        field: &'static str,
        /// Its length.
        found: usize,
        /// The number of tokens.
        expected: usize,
    },
    /// A token id lies outside the vocabulary.
    #[error("{field} is {found}; expected a token id below {size}")]
    IdOutOfRange {
        /// The option at fault.
        field: String,
        /// The id found.
        found: u64,
        /// The number of ids that may be used.
        size: u64,
    },
    /// Two ids share one text.
    #[error(
        "token `{token}` appears twice, as ids {first} and {second}; expected every token once"
    )]
    DuplicateToken {
        /// The text they share.
        token: String,
        /// The lower id.
        first: u32,
        /// The higher id.
        second: u32,
    },
    /// A merge rule is malformed, or names a token that the vocabulary lacks.
    #[error("merge {index} is `{merge}`: {problem}")]
    BadMerge {
        /// Position in the list of merges, from 0.
        index: usize,
        /// The rule as it stands in the file.
        merge: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A value lies outside what the format allows.
    #[error("{field} is {found}; expected {expected}")]
    BadValue {
        /// The option at fault.
        field: String,
        /// The value found.
        found: String,
        /// What would be right.
        expected: String,
    },
    /// The text holds a character that the vocabulary cannot write down.
    #[error(
        "the vocabulary has no token for `{piece}` and neither an unknown token nor byte tokens; \
         set unknown_token_id"
    )]
    NotEncodable {
        /// The stretch of text at fault.
        piece: String,
    },
    /// The tokenizers library refused.
    #[error("tokenizer failed while {doing}: {message}")]
    Library {
        /// What was being done.
        doing: &'static str,
        /// What the library said.
        message: String,
    },
}
