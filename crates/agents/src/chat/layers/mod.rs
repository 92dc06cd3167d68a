//! Layers around a model, each a model itself: trace, cache, budget, retries.
//!
//! Outermost first: `Traced(Cached(Budgeted(Retrying(model))))`. A reply from the cache then costs no budget, and a
//! trace has one line per call however often it was tried. [`Layers::wrap`] builds them in this order.

mod budget;
mod cache;
mod retry;
mod trace;

pub use budget::{Budget, Budgeted, Ledger, Limit};
pub use cache::{CacheMode, CacheStore, Cached};
pub use retry::{Retry, Retrying};
pub use trace::{TraceLine, TraceSummary, TraceWriter, Traced, read_trace, summarize_trace};

use super::model::ChatModel;
use std::sync::Arc;

/// Which layers to put around a model.
#[derive(Default)]
pub struct Layers {
    /// Repeats what failed for a moment.
    pub retry: Option<Retry>,
    /// Limits; several models may share one.
    pub budget: Option<Arc<Budget>>,
    /// Keeps replies.
    pub cache: Option<(Arc<CacheStore>, CacheMode)>,
    /// Writes down calls.
    pub trace: Option<Arc<TraceWriter>>,
}

impl Layers {
    /// The model inside the layers that are given.
    pub fn wrap(&self, model: Arc<dyn ChatModel>) -> Arc<dyn ChatModel> {
        let mut model = model;
        if let Some(retry) = &self.retry {
            model = Arc::new(Retrying::new(model, retry.clone()));
        }
        if let Some(budget) = &self.budget {
            model = Arc::new(Budgeted::new(model, Arc::clone(budget)));
        }
        if let Some((store, mode)) = &self.cache {
            model = Arc::new(Cached::new(model, Arc::clone(store), *mode));
        }
        if let Some(trace) = &self.trace {
            model = Arc::new(Traced::new(model, Arc::clone(trace)));
        }
        model
    }
}
