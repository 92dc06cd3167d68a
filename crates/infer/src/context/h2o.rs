//! H2O: the tokens that received most attention so far ("heavy hitters") and the last ones, chosen
//! anew after every call, per layer and kv head; the rest is dropped.
//!
//! For serving with a fraction of the cache. Papers: H2O (arXiv 2306.14048), and SinkLoRA (arXiv
//! 2406.05678), which serves its tuned models this way.

use super::{
    ColumnSums, ContextPolicy, LayerAt, Part, Plan, PolicyReport, PolicySpec, Positions, Queries,
};
use crate::kv::KvStore;
use crate::wire::{read_f32s, read_u64, write_f32s, write_u64};
use longspan_kernels::attention::PAGE;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};

/// `h2o:HEAVY,RECENT`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct H2oConfig {
    /// Heavy hitters kept; default a tenth of the trained window.
    pub heavy: Option<usize>,
    /// Last tokens kept; default as many as `heavy`.
    pub recent: Option<usize>,
    /// Where kept keys stand: at their numbers in the text, or at their slots, which a text
    /// longer than the window needs.
    pub positions: Positions,
}

impl H2oConfig {
    fn sizes(&self, window: u64) -> (usize, usize) {
        let heavy = self.heavy.unwrap_or((window / 10).max(1) as usize);
        (heavy, self.recent.unwrap_or(heavy))
    }

    /// Refuses impossible values; the text names the option, the value and what is allowed.
    pub fn check(&self, window: u64) -> Result<(), String> {
        let (heavy, recent) = self.sizes(window);
        if recent == 0 {
            return Err("recent is 0, expected at least 1".into());
        }
        if self.positions == Positions::Cache && (heavy + recent) as u64 >= window {
            return Err(format!(
                "heavy + recent = {} tokens, expected less than the model's window of {window}",
                heavy + recent
            ));
        }
        Ok(())
    }
}

/// What one layer remembers besides keys and values.
#[derive(Clone, Default)]
struct LayerState {
    seen: u64,
    /// Per kv head and slot: the token's number in the text.
    tokens: Vec<Vec<u64>>,
    /// Per kv head and slot: the attention received so far, summed over the group's query heads.
    scores: Vec<Vec<f32>>,
}

/// See the module's text.
#[derive(Clone)]
pub struct H2o {
    heavy: usize,
    recent: usize,
    positions: Positions,
    layers: Vec<LayerState>,
    evicted: u64,
}

impl H2o {
    /// The configuration must have passed [`H2oConfig::check`].
    pub fn new(config: &H2oConfig, window: u64) -> Self {
        let (heavy, recent) = config.sizes(window);
        H2o {
            heavy,
            recent,
            positions: config.positions,
            layers: Vec::new(),
            evicted: 0,
        }
    }

    /// The cached tokens of a layer and kv head by their numbers in the text, ascending, with the
    /// attention each received.
    pub fn cached(&self, layer: usize, kv_head: usize) -> Vec<(u64, f32)> {
        let Some(layer) = self.layers.get(layer) else {
            return Vec::new();
        };
        let (tokens, scores) = (&layer.tokens[kv_head], &layer.scores[kv_head]);
        let mut cached: Vec<(u64, f32)> =
            tokens.iter().copied().zip(scores.iter().copied()).collect();
        cached.sort_unstable_by_key(|&(token, _)| token);
        cached
    }

    /// Adds a block's column sums of each query head to its kv head's scores.
    fn receive(&mut self, at: LayerAt, sums: &ColumnSums, num_kv_heads: usize) {
        let layer = &mut self.layers[at.layer];
        layer.tokens.resize_with(num_kv_heads, Vec::new);
        layer.scores.resize_with(num_kv_heads, Vec::new);
        for (tokens, scores) in layer.tokens.iter_mut().zip(&mut layer.scores) {
            tokens.extend(layer.seen..layer.seen + at.queries as u64);
            scores.resize(tokens.len(), 0.0);
        }
        layer.seen += at.queries as u64;
        let width = sums.tiles.len() * PAGE;
        let group = sums.values.len() / width.max(1) / num_kv_heads;
        for (head, columns) in sums.values.chunks_exact(width).enumerate() {
            let scores = &mut layer.scores[head / group];
            for (tile, (first, slots)) in sums.tiles.iter().enumerate() {
                let received = &columns[tile * PAGE..][slots.clone()];
                let start = *first as usize + slots.start;
                for (score, x) in scores[start..].iter_mut().zip(received) {
                    *score += x;
                }
            }
        }
    }

    /// The slots a kv head keeps, in the order in which they will lie.
    fn order(&self, layer: usize, kv_head: usize) -> Vec<u64> {
        let state = &self.layers[layer];
        let (tokens, scores) = (&state.tokens[kv_head], &state.scores[kv_head]);
        let (n, budget) = (tokens.len(), self.heavy + self.recent);
        let recent_from = state.seen - self.recent as u64;
        let mut old: Vec<usize> = (0..n).filter(|&slot| tokens[slot] < recent_from).collect();
        if self.heavy > 0 {
            old.select_nth_unstable_by(self.heavy - 1, |&a, &b| {
                scores[b]
                    .total_cmp(&scores[a])
                    .then(tokens[a].cmp(&tokens[b]))
            });
        }
        let mut keeps = vec![true; n];
        old[self.heavy..]
            .iter()
            .for_each(|&slot| keeps[slot] = false);
        if self.positions == Positions::Cache {
            return (0..n as u64).filter(|&slot| keeps[slot as usize]).collect();
        }
        // The order does not matter to attention: kept tokens of the tail fill the holes.
        let mut tail = (budget as u64..n as u64).filter(|&slot| keeps[slot as usize]);
        (0..budget as u64)
            .map(|slot| {
                if keeps[slot as usize] {
                    slot
                } else {
                    tail.next().expect("as many tokens are kept as fit")
                }
            })
            .collect()
    }
}

impl ContextPolicy for H2o {
    fn spec(&self) -> PolicySpec {
        PolicySpec {
            raw_keys: self.positions == Positions::Cache,
            rearranges: true,
            positions: self.positions,
            ..PolicySpec::default()
        }
    }

    fn plan(&mut self, at: LayerAt, _: &Queries<'_>, store: &mut KvStore) -> io::Result<Plan> {
        if self.layers.len() < store.num_layers() {
            self.layers
                .resize_with(store.num_layers(), LayerState::default);
        }
        let known = &self.layers[at.layer].tokens;
        if let Some(tokens) = known.iter().find(|list| list.len() as u64 != at.start) {
            return Err(io::Error::other(format!(
                "H2O: layer {} holds {} tokens, {} are known",
                at.layer,
                at.start,
                tokens.len()
            )));
        }
        Ok(Plan {
            parts: vec![Part {
                column_sums: true,
                ..Part::causal(0..at.end())
            }],
        })
    }

    fn observe(
        &mut self,
        at: LayerAt,
        sums: &[Option<ColumnSums>],
        store: &mut KvStore,
    ) -> io::Result<()> {
        let Some(Some(sums)) = sums.first() else {
            return Err(io::Error::other("H2O: the column sums are missing"));
        };
        let num_kv_heads = store.layout().num_kv_heads;
        self.receive(at, sums, num_kv_heads);
        let (n, budget) = (at.end() as usize, self.heavy + self.recent);
        if n <= budget {
            return Ok(());
        }
        self.evicted += (n - budget) as u64;
        let order: Vec<Vec<u64>> = (0..num_kv_heads)
            .map(|head| self.order(at.layer, head))
            .collect();
        store.rearrange(at.layer, &order, self.positions == Positions::Cache)?;
        let layer = &mut self.layers[at.layer];
        for (head, order) in order.iter().enumerate() {
            let (tokens, scores) = (&mut layer.tokens[head], &mut layer.scores[head]);
            *tokens = order.iter().map(|&slot| tokens[slot as usize]).collect();
            *scores = order.iter().map(|&slot| scores[slot as usize]).collect();
        }
        Ok(())
    }

    fn fork(&self) -> Box<dyn ContextPolicy> {
        Box::new(self.clone())
    }

    fn save(&self, out: &mut dyn Write) -> io::Result<()> {
        write_u64(out, self.layers.len() as u64)?;
        write_u64(out, self.evicted)?;
        for layer in &self.layers {
            write_u64(out, layer.seen)?;
            write_u64(out, layer.tokens.len() as u64)?;
            for (tokens, scores) in layer.tokens.iter().zip(&layer.scores) {
                write_f32s(out, scores)?;
                tokens.iter().try_for_each(|&token| write_u64(out, token))?;
            }
        }
        Ok(())
    }

    fn load(&mut self, input: &mut dyn Read) -> io::Result<()> {
        let count = read_u64(input)?;
        self.evicted = read_u64(input)?;
        self.layers.clear();
        for _ in 0..count {
            let mut layer = LayerState {
                seen: read_u64(input)?,
                ..LayerState::default()
            };
            for _ in 0..read_u64(input)? {
                let scores = read_f32s(input)?;
                let tokens = (0..scores.len())
                    .map(|_| read_u64(input))
                    .collect::<io::Result<Vec<_>>>()?;
                if scores.len() > self.heavy + self.recent
                    || tokens.iter().any(|&token| token >= layer.seen)
                {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!(
                            "H2O state: {} tokens are kept of {}, expected at most {}",
                            scores.len(),
                            layer.seen,
                            self.heavy + self.recent
                        ),
                    ));
                }
                layer.scores.push(scores);
                layer.tokens.push(tokens);
            }
            self.layers.push(layer);
        }
        Ok(())
    }

    fn report(&self) -> PolicyReport {
        let kept = self.layers.iter().flat_map(|layer| &layer.tokens);
        PolicyReport {
            evicted: self.evicted,
            index_bytes: kept.map(|tokens| 12 * tokens.len() as u64).sum(),
            ..PolicyReport::default()
        }
    }
}
