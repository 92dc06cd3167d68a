//! What comes next, given logits: one file per strategy behind [`Strategy`], over a [`DecodeSession`].

pub mod beam;
pub mod config;
pub mod diversity;
pub mod engine_session;
pub mod logits;
pub mod lookahead;
pub mod random;
pub mod sample;
pub mod session;
pub mod stop;
pub mod strategy;
mod tree_forward;
pub mod tree_search;
pub mod trie;

pub use config::DecodeConfig;
pub use engine_session::EngineSession;
pub use logits::SamplingConfig;
pub use sample::{Choice, Sampler, Sampling};
pub use session::{DecodeError, DecodeSession, DraftTree, SeqId};
pub use strategy::{Action, Answer, End, Event, Outcome, Request, Strategy, run};
