//! One message in, one message out: templates and the local model.

pub mod local;
pub mod template;
