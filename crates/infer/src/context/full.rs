//! Full attention: every query sees every earlier token.
//!
//! For documents that fit the model's window; the oracle of every other policy.

use super::{ContextPolicy, LayerAt, Part, Plan, PolicySpec, Queries};
use crate::kv::KvStore;
use std::io;

/// Tokens of one prefill call: large enough for the matrix kernels, small enough for the caches.
pub(crate) const CHUNK: usize = 1024;

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct Full;

impl ContextPolicy for Full {
    fn spec(&self) -> PolicySpec {
        PolicySpec {
            rewinds: true,
            ..PolicySpec::default()
        }
    }

    fn plan(&mut self, at: LayerAt, _: &Queries<'_>, _: &mut KvStore) -> io::Result<Plan> {
        Ok(Plan {
            parts: vec![Part::causal(0..at.end())],
        })
    }

    fn fork(&self) -> Box<dyn ContextPolicy> {
        Box::new(self.clone())
    }
}
