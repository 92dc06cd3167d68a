//! Sliding window: every query sees the last `size` tokens, itself included; older ones are dropped.
//!
//! The cheapest way past the trained window and the baseline that every other policy must beat.

use super::{ContextPolicy, LayerAt, Part, Plan, PolicySpec, Queries};
use crate::kv::KvStore;
use longspan_kernels::attention::Mask;
use serde::{Deserialize, Serialize};
use std::io;

/// `window:SIZE`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WindowConfig {
    /// Tokens seen; default the model's trained window.
    pub size: Option<u64>,
}

/// See the module's text.
#[derive(Clone, Debug)]
pub struct Window {
    size: u64,
}

impl Window {
    /// `size` >= 1 tokens.
    pub fn new(size: u64) -> Self {
        Window { size }
    }

    /// What a window over `at` sees.
    pub(crate) fn part(at: LayerAt, size: u64) -> Part {
        let lo = (at.start + 1).saturating_sub(size);
        Part {
            mask: Mask::Window(size),
            ..Part::causal(lo..at.end())
        }
    }
}

impl ContextPolicy for Window {
    fn spec(&self) -> PolicySpec {
        PolicySpec::default()
    }

    fn plan(&mut self, at: LayerAt, _: &Queries<'_>, _: &mut KvStore) -> io::Result<Plan> {
        Ok(Plan {
            parts: vec![Self::part(at, self.size)],
        })
    }

    fn observe(
        &mut self,
        at: LayerAt,
        _: &[Option<super::ColumnSums>],
        store: &mut KvStore,
    ) -> io::Result<()> {
        store.drop_tokens(at.layer, 0..(at.end() + 1).saturating_sub(self.size));
        Ok(())
    }

    fn fork(&self) -> Box<dyn ContextPolicy> {
        Box::new(self.clone())
    }
}
