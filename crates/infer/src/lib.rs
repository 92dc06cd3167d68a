//! The engine: paged keys and values, context policies, decoding strategies, sessions on disk.
//!
//! A token's way: [`Engine::prefill`] in chunks, the model's layers, [`attend`] with the
//! sequence's [`context::ContextPolicy`], logits, a [`decode::Strategy`].

pub mod attend;
pub mod context;
mod continued;
pub mod decode;
pub mod engine;
pub mod key_context;
pub mod kv;
pub mod prefix;
pub mod schedule;
pub mod session;
pub mod wire;

pub use engine::{Engine, EngineError, EngineOptions, Sequence};
