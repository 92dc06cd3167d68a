//! Conversations with a model: chat templates, prompts around long documents, streamed answers.

pub mod chat;
pub mod memory;
pub mod rag;
pub mod workflow;

pub use chat::local::{Finish, Generation, Limits, LocalModel, Prompt, Written};
pub use chat::template::{ChatTemplate, Message, Role};
