//! StreamingLLM: the first tokens ("attention sinks") and a sliding window, re-indexed as if they
//! were adjacent.
//!
//! For endless streams at constant memory. Paper: arXiv 2309.17453; the baseline `stream-llm` of
//! InfLLM (arXiv 2402.04617): sinks stand at 0..n_init-1 and a query that has left them behind
//! stands at n_local + n_init - 1 towards them.

use super::{Angle, ContextPolicy, Keys, LayerAt, Part, Plan, PolicySpec, Queries, Window};
use crate::kv::{KeyForm, KvStore};
use longspan_kernels::attention::Mask;
use serde::{Deserialize, Serialize};
use std::io;

/// `sinks:N_INIT,N_LOCAL`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SinksConfig {
    /// First tokens kept.
    pub n_init: u64,
    /// Last tokens seen; default the model's trained window less `n_init`.
    pub n_local: Option<u64>,
}

impl Default for SinksConfig {
    fn default() -> Self {
        SinksConfig {
            n_init: 4,
            n_local: None,
        }
    }
}

/// See the module's text.
#[derive(Clone, Debug)]
pub struct Sinks {
    n_init: u64,
    n_local: u64,
}

impl Sinks {
    /// Both counts in tokens, `n_local` >= 1.
    pub fn new(n_init: u64, n_local: u64) -> Self {
        Sinks { n_init, n_local }
    }
}

impl ContextPolicy for Sinks {
    fn spec(&self) -> PolicySpec {
        PolicySpec::default()
    }

    fn plan(&mut self, at: LayerAt, _: &Queries<'_>, _: &mut KvStore) -> io::Result<Plan> {
        let sinks = Part {
            keys: Keys::range(0..self.n_init.min(at.end().saturating_sub(self.n_local))),
            form: KeyForm::Rotated,
            angle: Angle::AtMost(self.n_init + self.n_local - 1),
            mask: Mask::Beyond(self.n_local),
            column_sums: false,
        };
        Ok(Plan {
            parts: vec![Window::part(at, self.n_local), sinks],
        })
    }

    fn observe(
        &mut self,
        at: LayerAt,
        _: &[Option<super::ColumnSums>],
        store: &mut KvStore,
    ) -> io::Result<()> {
        store.drop_tokens(
            at.layer,
            self.n_init..(at.end() + 1).saturating_sub(self.n_local).max(self.n_init),
        );
        Ok(())
    }

    fn fork(&self) -> Box<dyn ContextPolicy> {
        Box::new(self.clone())
    }
}
