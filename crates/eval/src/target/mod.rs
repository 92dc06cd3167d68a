//! What answers: the local engine, an OpenAI-compatible endpoint, a search by words or vectors, stored
//! replies, and two yardsticks, one that knows the answers and one that always says the same.

pub mod endpoint;
pub mod local;
pub mod pace;
pub mod search;
pub mod workflow;
pub mod yardstick;

pub use endpoint::{Endpoint, EndpointConfig};
pub use local::{ChatMode, Local, LocalOptions};
pub use search::{Search, SearchBy};
pub use workflow::{Details, Method, Workflow};
pub use yardstick::{CONSTANT_SYMBOLS, Constant, Oracle, Recorded};

use crate::count::Counter;
use crate::error::Result;
use crate::task::{Likelihood, Sample};
use serde::{Deserialize, Serialize};

/// A reply and what it took.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Output {
    /// The text, the answer's given start not included.
    pub text: String,
    /// stop, length.
    pub finish: String,
    /// Tokens of the prompt.
    pub tokens_in: usize,
    /// Tokens written.
    pub tokens_out: usize,
    /// Part of the prompt was left out.
    pub truncated: bool,
    /// Why there is no reply (the target refused this sample).
    pub error: Option<String>,
    /// For likelihood tasks.
    pub likelihood: Option<Likelihood>,
    /// What it took; never part of a score.
    #[serde(default)]
    pub cost: Cost,
}

/// Time and memory of one reply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Seconds of reading.
    pub prefill_s: f64,
    /// Seconds of writing.
    pub decode_s: f64,
    /// Prompt tokens that were not read anew.
    pub cached_tokens: usize,
    /// Bytes of keys and values at the end.
    pub kv_bytes: u64,
    /// The reply came from the store of earlier replies.
    pub from_cache: bool,
}

/// Answers samples. Equal identity, sample and seed give equal outputs but for their cost.
pub trait Target: Send + Sync {
    /// The model, as the report names it.
    fn model(&self) -> String;

    /// The context policy, "-" where there is none.
    fn policy(&self) -> String {
        "-".into()
    }

    /// All that decides outputs; None if they must not be cached.
    fn identity(&self) -> Option<String>;

    /// Counts tokens as this target does.
    fn counter(&self) -> &dyn Counter;

    /// Most samples it can work on at a time.
    fn concurrency(&self) -> usize {
        usize::MAX
    }

    /// Answers one sample.
    ///
    /// # Errors
    /// [`crate::EvalError::Unreachable`] if trying again later may help,
    /// [`crate::EvalError::Interrupted`] if the caller asked to stop, others if the run is
    /// hopeless. A sample that this target cannot do is no error but an [`Output::error`].
    fn run(&self, sample: &Sample, seed: u64) -> Result<Output>;
}
