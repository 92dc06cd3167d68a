//! Work that takes many calls of a model: one file per workflow, all on the [`ChatModel`](crate::chat::model::ChatModel)
//! seam. What a workflow shares with others: [`chunk`] cuts texts, [`Observer`] watches.

pub mod agent_write;
pub mod baselines;
pub mod chain;
pub mod chunk;
pub mod summary;
pub mod xl3m;

use crate::chat::model::{Call, ChatError, ChatModel, Reply, Request, Usage};
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;

/// Watches a workflow. All methods do nothing by default.
pub trait Observer {
    /// A step begins: what it is, how many are done, of how many (the total may grow).
    fn step(&mut self, name: &str, done: usize, total: usize) {
        let _ = (name, done, total);
    }

    /// Text of the final answer as it is written.
    fn text(&mut self, piece: &str) {
        let _ = piece;
    }

    /// Something the person should know, such as a text that was shortened.
    fn note(&mut self, text: &str) {
        let _ = text;
    }
}

/// Watches nothing.
pub struct Silent;

impl Observer for Silent {}

/// What a workflow took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Took {
    /// Calls.
    pub calls: usize,
    /// Tokens.
    pub usage: Usage,
    /// Seconds of waiting for replies, added up.
    pub seconds: f64,
}

impl Took {
    fn add(&mut self, reply: &Reply) {
        if self.calls == 0 {
            self.usage.exact = true;
        }
        self.calls += 1;
        self.usage += reply.usage;
        self.seconds += reply.total_s;
    }
}

/// A reply whose text nobody waits for.
fn quiet(
    model: &dyn ChatModel,
    request: &Request,
    call: &Call,
    took: &mut Took,
) -> Result<String, ChatError> {
    let reply = model.ask(request, call)?;
    took.add(&reply);
    Ok(reply.text)
}

/// A reply that is the answer: its text streams.
fn aloud(
    model: &dyn ChatModel,
    request: &Request,
    call: &Call,
    took: &mut Took,
    observer: &mut dyn Observer,
) -> Result<String, ChatError> {
    let reply = model.reply(request, call, &mut |piece| {
        observer.text(piece);
        ControlFlow::Continue(())
    })?;
    took.add(&reply);
    Ok(reply.text)
}
