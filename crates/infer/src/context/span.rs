//! Mixed spans (MASFormer): full attention in a few layers, a short span in the others, chosen for
//! any existing model at run time.
//!
//! For long texts where attention and cache should cost a fraction. Paper: arXiv 2310.12442; the
//! first tokens may stay visible, which a model needs that was not trained with such spans.

use super::{ColumnSums, ContextPolicy, Keys, LayerAt, Part, Plan, PolicySpec, Queries};
use crate::kv::KvStore;
use longspan_kernels::attention::Mask;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::str::FromStr;

/// What a query of a layer sees, itself included: `window-SIZE`, `block-SIZE`, `block-prev-SIZE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Local {
    /// The last tokens.
    Window(u64),
    /// The tokens of its block of the text.
    Block(u64),
    /// Its block and the one before.
    BlockPrev(u64),
}

/// Layers with full attention: `bottom-N`, `top-N`, `every-N`, or indices as `0+5+11`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum FullLayers {
    /// The first N.
    Bottom(usize),
    /// The last N.
    Top(usize),
    /// Layers 0, N, 2 N, ...
    Every(usize),
    /// These.
    List(Vec<usize>),
}

/// `span:full=bottom-4,local=window-512,sinks=4`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SpanConfig {
    /// Layers that see everything.
    pub full: FullLayers,
    /// What the others see.
    pub local: Local,
    /// First tokens that every layer sees; 0 is the paper's, for models trained that way.
    pub sinks: u64,
}

impl Default for SpanConfig {
    fn default() -> Self {
        SpanConfig {
            full: FullLayers::Bottom(4),
            local: Local::Window(1024),
            sinks: 4,
        }
    }
}

impl Local {
    /// Index of the first key that the query at position i sees; it sees all up to itself.
    pub fn first_visible(self, i: u64) -> u64 {
        match self {
            Local::Window(w) => (i + 1).saturating_sub(w),
            Local::Block(b) => i / b * b,
            Local::BlockPrev(b) => (i / b * b).saturating_sub(b),
        }
    }

    /// Pairs of query and key that a text of `n` tokens costs.
    pub fn visible_pairs(self, n: u64) -> u64 {
        (0..n).map(|i| i + 1 - self.first_visible(i)).sum()
    }

    fn size(self) -> u64 {
        match self {
            Local::Window(size) | Local::Block(size) | Local::BlockPrev(size) => size,
        }
    }
}

impl fmt::Display for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Local::Window(size) => write!(f, "window-{size}"),
            Local::Block(size) => write!(f, "block-{size}"),
            Local::BlockPrev(size) => write!(f, "block-prev-{size}"),
        }
    }
}

impl From<Local> for String {
    fn from(local: Local) -> String {
        local.to_string()
    }
}

impl FromStr for Local {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, size) = text.rsplit_once('-').unwrap_or((text, ""));
        match (kind, size.parse()) {
            ("window", Ok(size)) if size > 0 => Ok(Local::Window(size)),
            ("block", Ok(size)) if size > 0 => Ok(Local::Block(size)),
            ("block-prev", Ok(size)) if size > 0 => Ok(Local::BlockPrev(size)),
            _ => Err(format!(
                "local is {text:?}, expected window-SIZE, block-SIZE or block-prev-SIZE"
            )),
        }
    }
}

impl TryFrom<String> for Local {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for FullLayers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FullLayers::Bottom(n) => write!(f, "bottom-{n}"),
            FullLayers::Top(n) => write!(f, "top-{n}"),
            FullLayers::Every(n) => write!(f, "every-{n}"),
            FullLayers::List(list) => {
                let list: Vec<String> = list.iter().map(usize::to_string).collect();
                // A plus sign at the end keeps a list of one from being read as a number.
                write!(f, "{}+", list.join("+"))
            }
        }
    }
}

impl From<FullLayers> for String {
    fn from(layers: FullLayers) -> String {
        layers.to_string()
    }
}

impl FromStr for FullLayers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!("full is {text:?}, expected bottom-N, top-N, every-N or layers as in 0+5+11")
        };
        let Some((kind, count)) = text.rsplit_once('-') else {
            let items = text.split('+').filter(|item| !item.is_empty());
            let list: Result<Vec<usize>, _> = items.map(str::parse).collect();
            let mut list = list.map_err(|_| wrong())?;
            list.sort_unstable();
            return Ok(FullLayers::List(list));
        };
        match (kind, count.parse()) {
            ("bottom", Ok(n)) => Ok(FullLayers::Bottom(n)),
            ("top", Ok(n)) => Ok(FullLayers::Top(n)),
            ("every", Ok(n)) if n > 0 => Ok(FullLayers::Every(n)),
            _ => Err(wrong()),
        }
    }
}

impl TryFrom<String> for FullLayers {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FullLayers {
    /// True if the layer sees everything, in a model of so many layers.
    pub fn contains(&self, layer: usize, num_layers: usize) -> bool {
        match self {
            FullLayers::Bottom(n) => layer < *n,
            FullLayers::Top(n) => layer + n >= num_layers,
            FullLayers::Every(n) => layer.is_multiple_of(*n),
            FullLayers::List(list) => list.contains(&layer),
        }
    }
}

/// See the module's text.
#[derive(Clone, Debug)]
pub struct Span {
    config: SpanConfig,
    num_layers: usize,
}

impl Span {
    /// A policy with these spans.
    pub fn new(config: &SpanConfig) -> Self {
        Span {
            config: config.clone(),
            num_layers: 0,
        }
    }

    fn is_full(&self, layer: usize) -> bool {
        self.config.full.contains(layer, self.num_layers)
    }
}

impl ContextPolicy for Span {
    fn spec(&self) -> PolicySpec {
        PolicySpec::default()
    }

    fn begin_layer(&mut self, _: LayerAt, _: &Queries<'_>, store: &mut KvStore) -> io::Result<()> {
        self.num_layers = store.num_layers();
        Ok(())
    }

    /// Queries of one block of the text see the same first key.
    fn block(&self, at: LayerAt) -> usize {
        match self.config.local {
            Local::Block(b) | Local::BlockPrev(b) if !self.is_full(at.layer) => {
                ((b - at.start % b) as usize).min(at.queries)
            }
            _ => at.queries,
        }
    }

    fn plan(&mut self, at: LayerAt, _: &Queries<'_>, _: &mut KvStore) -> io::Result<Plan> {
        if self.is_full(at.layer) {
            return Ok(Plan {
                parts: vec![Part::causal(0..at.end())],
            });
        }
        let local = self.config.local;
        let first = local.first_visible(at.start);
        // With a window the sinks leave it one query at a time.
        let (mask, sinks, sinks_mask) = match local {
            Local::Window(w) => (
                Mask::Window(w),
                local.first_visible(at.end() - 1),
                Mask::Beyond(w),
            ),
            _ => (Mask::Causal, first, Mask::All),
        };
        let mut parts = vec![Part {
            mask,
            ..Part::causal(first..at.end())
        }];
        if self.config.sinks > 0 {
            parts.push(Part {
                keys: Keys::range(0..self.config.sinks.min(sinks)),
                mask: sinks_mask,
                ..Part::causal(0..0)
            });
        }
        Ok(Plan { parts })
    }

    fn observe(
        &mut self,
        at: LayerAt,
        _: &[Option<ColumnSums>],
        store: &mut KvStore,
    ) -> io::Result<()> {
        if !self.is_full(at.layer) {
            let first = self.config.local.first_visible(at.end());
            store.drop_tokens(at.layer, self.config.sinks..first.max(self.config.sinks));
        }
        Ok(())
    }

    fn fork(&self) -> Box<dyn ContextPolicy> {
        Box::new(self.clone())
    }
}

impl SpanConfig {
    /// Bytes of keys and values at a text of `n` tokens, as the paper counts them: full layers keep
    /// all tokens, the others their longest span and the sinks. `token_bytes`: of one layer.
    pub fn kv_bytes(&self, n: u64, num_layers: usize, token_bytes: u64) -> u64 {
        let span = match self.local {
            Local::BlockPrev(b) => 2 * b,
            local => local.size(),
        };
        let full = (0..num_layers).filter(|&layer| self.full.contains(layer, num_layers));
        let full = full.count() as u64;
        let local = num_layers as u64 - full;
        token_bytes * (full * n + local * n.min(span + self.sinks))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_follow_the_paper_s_cost_model() {
        let (n, b) = (8192u64, 1024u64);
        let full = n * (n + 1) / 2;
        let ratio = |local: Local| local.visible_pairs(n) as f64 / full as f64;
        assert!((ratio(Local::Block(b)) - 0.125).abs() < 1e-3);
        assert!((ratio(Local::Window(b)) - 0.234).abs() < 1e-3);
        assert!((ratio(Local::BlockPrev(b)) - 0.344).abs() < 1e-3);
        let window = Local::Window(b).visible_pairs(n);
        assert_eq!(window, n * b - b * (b - 1) / 2);
    }

    #[test]
    fn layers_and_spans_round_trip() {
        for text in ["bottom-4", "top-2", "every-5", "0+5+11+", "7+"] {
            let layers: FullLayers = text.parse().unwrap();
            assert_eq!(layers.to_string(), text);
        }
        assert!("middle-3".parse::<FullLayers>().is_err());
        assert!("window-0".parse::<Local>().is_err());
        let top: FullLayers = "top-2".parse().unwrap();
        let picked: Vec<usize> = (0..6).filter(|&layer| top.contains(layer, 6)).collect();
        assert_eq!(picked, [4, 5]);
    }
}
