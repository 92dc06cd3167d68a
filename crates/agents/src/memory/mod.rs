//! Memories of conversations that outgrow a model's window.

pub mod scm;
