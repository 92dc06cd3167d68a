//! One message in, one message out: the seam [`model::ChatModel`], the local engine, endpoints and scripts behind it,
//! layers around it, and the laws that all of them keep.

pub mod conformance;
pub mod http;
pub mod layers;
pub mod local;
pub mod local_chat;
pub mod model;
pub mod openai;
pub mod scripted;
pub mod sse;
pub mod template;
pub mod wire;
