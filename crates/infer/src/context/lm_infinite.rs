//! LM-Infinite: the first `global` tokens at a capped distance and the last `local` tokens; in the
//! upper layers the newest query may re-read its best matching tokens of the middle.
//!
//! For zero-shot streaming of any length at constant cost. Paper: arXiv 2308.16137, where these
//! are the Lambda-shaped mask, the distance ceiling and the top-k re-attention.

use super::{Angle, ContextPolicy, Keys, LayerAt, Part, Plan, PolicySpec, Queries, Window, full};
use crate::kv::{KeyForm, KvStore};
use longspan_kernels::attention::Mask;
use serde::{Deserialize, Serialize};
use std::io;
use std::ops::Range;

/// `lm-infinite:LOCAL,GLOBAL,TOP_K`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LmInfiniteConfig {
    /// L: last tokens seen; default the model's trained window.
    pub local: Option<u64>,
    /// G: first tokens seen.
    pub global: u64,
    /// Distance at which the first tokens appear; default `local`.
    pub limit: Option<u64>,
    /// k: middle tokens re-read by the last query of a call, per head; 0 = off (the middle is
    /// then dropped).
    pub top_k: usize,
    /// Distance at which re-read tokens appear; default half of `local`.
    pub insert_at: Option<u64>,
    /// First layer that re-reads.
    pub top_k_from_layer: usize,
}

impl Default for LmInfiniteConfig {
    fn default() -> Self {
        LmInfiniteConfig {
            local: None,
            global: 10,
            limit: None,
            top_k: 0,
            insert_at: None,
            top_k_from_layer: 4,
        }
    }
}

/// See the module's text.
#[derive(Clone, Debug)]
pub struct LmInfinite {
    local: u64,
    global: u64,
    limit: u64,
    top_k: usize,
    insert_at: u64,
    top_k_from_layer: usize,
}

impl LmInfinite {
    /// `window` is the model's trained window, used where the configuration is silent.
    pub fn new(config: &LmInfiniteConfig, window: u64) -> Self {
        let local = config.local.unwrap_or(window).max(1);
        LmInfinite {
            local,
            global: config.global,
            limit: config.limit.unwrap_or(local),
            top_k: config.top_k,
            insert_at: config.insert_at.unwrap_or(local / 2),
            top_k_from_layer: config.top_k_from_layer,
        }
    }

    fn rereads(&self, layer: usize) -> bool {
        self.top_k > 0 && layer >= self.top_k_from_layer
    }

    /// The tokens of the middle that each head's newest query likes best, at distance `insert_at`.
    fn middle(
        &self,
        at: LayerAt,
        queries: &Queries<'_>,
        store: &KvStore,
    ) -> io::Result<Option<Vec<Vec<Range<u64>>>>> {
        let seen = at.end();
        if seen.saturating_sub(self.local) < self.global + self.top_k as u64 {
            return Ok(None);
        }
        let tokens = self.global..seen - self.local;
        let group = queries.num_heads / store.layout().num_kv_heads;
        let mut key = vec![0f32; queries.head_dim];
        let mut scores =
            vec![Vec::with_capacity((tokens.end - tokens.start) as usize); queries.num_heads];
        let last = (at.queries - 1) * queries.stride;
        let mut rotated = queries.data[last..last + queries.num_heads * queries.head_dim].to_vec();
        rotated
            .chunks_exact_mut(queries.head_dim)
            .for_each(|head| (queries.rotate)(self.insert_at, head));
        for token in tokens {
            for kv_head in 0..store.layout().num_kv_heads {
                store.raw_key(at.layer, token, kv_head, &mut key)?;
                for head in kv_head * group..(kv_head + 1) * group {
                    let query = &rotated[head * queries.head_dim..(head + 1) * queries.head_dim];
                    let score: f32 = query.iter().zip(&key).map(|(q, k)| q * k).sum();
                    scores[head].push((score, token));
                }
            }
        }
        let best = scores.into_iter().map(|mut scores| {
            scores.select_nth_unstable_by(self.top_k - 1, |a, b| {
                b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
            });
            let mut tokens: Vec<u64> = scores[..self.top_k]
                .iter()
                .map(|&(_, token)| token)
                .collect();
            tokens.sort_unstable();
            tokens.into_iter().map(|token| token..token + 1).collect()
        });
        Ok(Some(best.collect()))
    }
}

impl ContextPolicy for LmInfinite {
    fn spec(&self) -> PolicySpec {
        // A limit on the block, here the whole call, makes the last prompt token a call of its own.
        let exec_block = (self.top_k > 0).then_some(full::CHUNK);
        PolicySpec {
            exec_block,
            raw_keys: true,
            ..PolicySpec::default()
        }
    }

    fn plan(
        &mut self,
        at: LayerAt,
        queries: &Queries<'_>,
        store: &mut KvStore,
    ) -> io::Result<Plan> {
        let mut parts = vec![
            Window::part(at, self.local),
            Part {
                keys: Keys::range(0..self.global.min(at.end().saturating_sub(self.local))),
                form: KeyForm::Raw,
                angle: Angle::AtMost(self.limit),
                mask: Mask::Beyond(self.local),
                column_sums: false,
            },
        ];
        // Only the last prompt token and decoded ones re-read: those come as calls of one query.
        if self.rereads(at.layer)
            && at.queries == 1
            && let Some(middle) = self.middle(at, queries, store)?
        {
            parts.push(Part {
                keys: Keys::PerQueryHead(middle),
                form: KeyForm::Raw,
                angle: Angle::Fixed(self.insert_at),
                mask: Mask::All,
                column_sums: false,
            });
        }
        Ok(Plan { parts })
    }

    fn observe(
        &mut self,
        at: LayerAt,
        _: &[Option<super::ColumnSums>],
        store: &mut KvStore,
    ) -> io::Result<()> {
        let left = (at.end() + 1).saturating_sub(self.local);
        if self.rereads(at.layer) {
            store.release_rotated(at.layer, 0..left);
        } else {
            store.drop_tokens(at.layer, self.global..left.max(self.global));
        }
        Ok(())
    }

    fn fork(&self) -> Box<dyn ContextPolicy> {
        Box::new(self.clone())
    }
}
