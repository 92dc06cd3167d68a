//! Full attention: every query sees every earlier token.
//!
//! For documents that fit the model's window; the oracle of every other policy.

use super::{ColumnSums, ContextPolicy, LayerAt, Looks, Part, Plan, PolicySpec, Queries};
use crate::kv::KvStore;
use std::io;
use std::ops::Range;

/// Tokens of one prefill call: large enough for the matrix kernels, small enough for the caches.
pub(crate) const CHUNK: usize = 1024;

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct Full {
    /// If somebody watches: attention received, and the length it was seen at.
    looks: Option<(Looks, u64)>,
    num_heads: usize,
}

impl ContextPolicy for Full {
    fn spec(&self) -> PolicySpec {
        PolicySpec {
            rewinds: true,
            ..PolicySpec::default()
        }
    }

    fn plan(&mut self, at: LayerAt, queries: &Queries<'_>, _: &mut KvStore) -> io::Result<Plan> {
        self.num_heads = queries.num_heads;
        Ok(Plan {
            parts: vec![Part {
                column_sums: self.looks.is_some(),
                ..Part::causal(0..at.end())
            }],
        })
    }

    fn observe(
        &mut self,
        at: LayerAt,
        sums: &[Option<ColumnSums>],
        _: &mut KvStore,
    ) -> io::Result<()> {
        if let Some((looks, len)) = &mut self.looks {
            *len = at.end();
            let sums = sums.iter().flatten();
            sums.for_each(|sums| looks.add_sums(sums, self.num_heads));
        }
        Ok(())
    }

    fn watch(&mut self) {
        self.looks = Some((Looks::default(), 0));
    }

    fn looked(&self) -> Vec<(Range<u64>, f32)> {
        let looks = self.looks.as_ref();
        looks.map_or(Vec::new(), |(looks, len)| looks.stretches(*len))
    }

    fn fork(&self) -> Box<dyn ContextPolicy> {
        Box::new(self.clone())
    }
}
