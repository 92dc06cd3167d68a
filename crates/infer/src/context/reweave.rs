//! CMR without training: a window, the first tokens, and in a few layers the keys and values of old tokens that
//! later text leaned on.
//!
//! For texts whose rare names and numbers must outlive a window of fixed size. Paper: Contextual Memory Reweaving,
//! arXiv 2502.02046. A block's keys and values are functions of the residual stream before it, so keeping
//! those of a captured token is keeping its captured state; the trained weaving of states from several layers is
//! [`longspan_nn::memory::reweave`].

use super::{
    Angle, Call, ColumnSums, ContextPolicy, Keys, LayerAt, Part, Plan, PolicyReport, PolicySpec,
    Queries, Window,
};
use crate::kv::{KeyForm, KvStore};
use crate::wire::{read_f32s, read_u64, write_f32s, write_u64};
use longspan_kernels::attention::Mask;
use longspan_nn::memory::reweave::{Captured, Relevance, ReweaveConfig, ReweaveMemory};
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};

/// How far away remembered tokens seem.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Distance {
    /// As far as the window reaches, which a text of any length allows.
    #[default]
    Window,
    /// As far as they are: only for texts within the trained window.
    Own,
}

/// One number, or several with `+` between.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Layers {
    /// `3`
    One(usize),
    /// `3+7`
    Several(String),
}

/// `cmr:WINDOW,CAPACITY`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CmrConfig {
    /// W: last tokens seen; default a quarter of the trained window.
    pub window: Option<u64>,
    /// M: most tokens remembered.
    pub capacity: usize,
    /// First tokens seen by every layer.
    pub sinks: u64,
    /// S: tokens of a chunk; memory is constant within one.
    pub segment: u64,
    /// kappa: share of a chunk's tokens that may be remembered.
    pub keep: f64,
    /// tau: least relevance; 1 is what uniform attention gives.
    pub min_relevance: f64,
    /// gamma: factor on relevance for each chunk since.
    pub decay: f64,
    /// Tokens nearer than this say nothing about relevance; default a quarter of the window.
    pub delta: Option<u64>,
    /// How far away remembered tokens seem.
    pub distance: Distance,
    /// Queries whose attention is counted at once: `delta` is taken from the first of them.
    pub block: usize,
    /// C: remembering layers, as the number of blocks below each, with `+` between; default a quarter, a half and
    /// three quarters of the depth.
    pub layers: Option<Layers>,
}

impl Default for CmrConfig {
    fn default() -> Self {
        let published = ReweaveConfig::default();
        CmrConfig {
            window: None,
            capacity: published.capacity,
            sinks: 4,
            segment: published.segment as u64,
            keep: published.keep,
            min_relevance: published.min_relevance,
            decay: published.decay,
            delta: None,
            distance: Distance::Window,
            block: 64,
            layers: None,
        }
    }
}

impl CmrConfig {
    fn window(&self, trained: u64) -> u64 {
        self.window.unwrap_or((trained / 4).max(1))
    }

    /// The segment, shortened for windows that it does not fit in.
    fn segment(&self, trained: u64) -> u64 {
        self.segment.min(self.window(trained)).max(1)
    }

    fn memory(&self) -> Result<ReweaveConfig, String> {
        let layers = match &self.layers {
            None => Vec::new(),
            Some(Layers::One(layer)) => vec![*layer],
            Some(Layers::Several(text)) => text
                .split('+')
                .map(|part| {
                    let bad = || format!("layers is {text:?}, expected numbers with + between");
                    part.trim().parse().map_err(|_| bad())
                })
                .collect::<Result<_, _>>()?,
        };
        let config = ReweaveConfig {
            capture_layers: layers,
            segment: self.segment as usize,
            keep: self.keep,
            min_relevance: self.min_relevance,
            capacity: self.capacity,
            decay: self.decay,
            delta: None,
        };
        config.check()?;
        Ok(config)
    }

    /// Refuses impossible values; the text names the option, the value and what is allowed.
    pub fn check(&self, trained: u64) -> Result<(), String> {
        self.memory()?;
        let window = self.window(trained);
        if window == 0 || window > trained {
            return Err(format!(
                "window is {window}, expected 1 to the model's window of {trained}"
            ));
        }
        if self.block == 0 {
            return Err("block is 0, expected at least 1".into());
        }
        if self.delta.is_some_and(|delta| delta >= window) {
            return Err(format!(
                "delta is {}, expected less than the window of {window}",
                self.delta.unwrap_or(0)
            ));
        }
        Ok(())
    }
}

/// See the module's text.
#[derive(Clone)]
pub struct Cmr {
    config: CmrConfig,
    memory_config: ReweaveConfig,
    window: u64,
    segment: u64,
    delta: u64,
    /// Layers that remember, and those whose attention says what is worth it.
    remembering: Vec<usize>,
    listening: Vec<usize>,
    /// Tokens read.
    seen: u64,
    /// Tokens below have been remembered or forgotten by the remembering layers.
    from: u64,
    memory: ReweaveMemory,
    relevance: Relevance,
    evicted: u64,
}

impl Cmr {
    /// The configuration must have passed [`CmrConfig::check`] with this trained window.
    pub fn new(config: &CmrConfig, trained: u64) -> Self {
        let window = config.window(trained);
        Cmr {
            memory_config: config.memory().unwrap_or_default(),
            config: config.clone(),
            window,
            segment: config.segment(trained),
            delta: config.delta.unwrap_or(window / 4),
            remembering: Vec::new(),
            listening: Vec::new(),
            seen: 0,
            from: 0,
            memory: ReweaveMemory::default(),
            relevance: Relevance::default(),
            evicted: 0,
        }
    }

    /// Remembered tokens by position, the first tokens not among them.
    pub fn remembered(&self) -> &[Captured] {
        self.memory.entries()
    }

    /// Slots of a remembering layer that hold remembered tokens, the first tokens among them.
    fn slots(&self) -> u64 {
        self.config.sinks.min(self.from) + self.memory.entries().len() as u64
    }

    /// Chunks that have left every window of the chunk that begins: some of their tokens are remembered, the
    /// others leave the remembering layers.
    fn capture(&mut self, layers: &[usize], store: &mut KvStore) -> io::Result<()> {
        let chunk = self.seen / self.segment;
        let mut order: Vec<u64> = (0..self.slots()).collect();
        let mut positions: Vec<u64> = (0..self.config.sinks.min(self.from)).collect();
        positions.extend(self.memory.entries().iter().map(|entry| entry.position));
        let before = (self.from, order.len() as u64);
        while self.from + self.segment + self.window <= chunk * self.segment + 1 {
            let tokens = self.from..self.from + self.segment;
            let scores: Vec<f32> = tokens
                .clone()
                .map(|token| self.relevance.of(token))
                .collect();
            let new = self
                .memory_config
                .pick(&scores)
                .into_iter()
                .map(|index| Captured {
                    position: tokens.start + index as u64,
                    relevance: scores[index],
                    segment: tokens.start / self.segment,
                    states: Vec::new(),
                });
            // The first tokens stay anyway.
            let new = new.filter(|entry| entry.position >= self.config.sinks);
            let new: Vec<Captured> = new.collect();
            self.memory.push(&self.memory_config, new, chunk);
            self.from = tokens.end;
            self.relevance.forget(self.from);
        }
        if self.from == before.0 {
            return Ok(());
        }
        let slot = |token: u64| match positions.binary_search(&token) {
            Ok(slot) => slot as u64,
            Err(_) => before.1 + token - before.0,
        };
        order.clear();
        order.extend((0..self.config.sinks.min(self.from)).map(slot));
        order.extend(
            self.memory
                .entries()
                .iter()
                .map(|entry| slot(entry.position)),
        );
        let kv_heads = store.layout().num_kv_heads;
        for &layer in self
            .remembering
            .iter()
            .filter(|layer| layers.contains(layer))
        {
            let tail = before.1 + self.from - before.0..store.len(layer);
            let lists = vec![order.iter().copied().chain(tail).collect(); kv_heads];
            store.rearrange(layer, &lists, false)?;
            self.evicted += (self.from - before.0 + before.1).saturating_sub(order.len() as u64);
        }
        Ok(())
    }

    /// The first tokens once they have left the window, where no layer has moved them.
    fn sinks(&self, at: LayerAt) -> Part {
        let out = at.end().saturating_sub(self.window);
        Part {
            keys: Keys::range(0..self.config.sinks.min(out)),
            form: KeyForm::Rotated,
            angle: match self.config.distance {
                Distance::Window => Angle::AtMost(self.config.sinks + self.window - 1),
                Distance::Own => Angle::Own,
            },
            mask: Mask::Beyond(self.window),
            column_sums: false,
        }
    }
}

impl ContextPolicy for Cmr {
    fn spec(&self) -> PolicySpec {
        let block = self.config.block.min(self.segment as usize);
        PolicySpec {
            exec_block: Some(block),
            chunk: self.segment as usize,
            raw_keys: self.config.distance == Distance::Window,
            rearranges: true,
            ..PolicySpec::default()
        }
    }

    fn begin_call(&mut self, call: &Call<'_>, store: &mut KvStore) -> io::Result<()> {
        if self.remembering.is_empty() {
            let of_depth = self.memory_config.layers(store.num_layers());
            let governed = |layer: &usize| call.layers.contains(layer);
            self.remembering = of_depth.iter().copied().filter(governed).collect();
            let below = of_depth.iter().filter_map(|layer| layer.checked_sub(1));
            self.listening = below.filter(governed).collect();
            if self.remembering.is_empty() && self.config.layers.is_some() {
                return Err(io::Error::other(format!(
                    "--context cmr: layers {of_depth:?} are none of the {} that see the whole text, of {} layers",
                    call.layers.len(),
                    store.num_layers()
                )));
            }
        }
        self.capture(call.layers, store)?;
        self.seen += call.tokens as u64;
        Ok(())
    }

    fn plan(&mut self, at: LayerAt, _: &Queries<'_>, _: &mut KvStore) -> io::Result<Plan> {
        let window = Part {
            column_sums: self.listening.contains(&at.layer),
            ..Window::part(at, self.window)
        };
        if !self.remembering.contains(&at.layer) || self.from == 0 {
            return Ok(Plan {
                parts: vec![window, self.sinks(at)],
            });
        }
        let remembered = Part {
            mask: Mask::All,
            ..Part::causal(0..self.slots())
        };
        let remembered = match self.config.distance {
            Distance::Own => remembered,
            Distance::Window => Part {
                form: KeyForm::Raw,
                angle: Angle::Fixed(self.window),
                ..remembered
            },
        };
        Ok(Plan {
            parts: vec![window, remembered],
        })
    }

    fn observe(
        &mut self,
        at: LayerAt,
        sums: &[Option<ColumnSums>],
        store: &mut KvStore,
    ) -> io::Result<()> {
        // In remembering layers what the store calls a token is a slot.
        let moved = match self.remembering.contains(&at.layer) {
            true => self.from - self.slots(),
            false => 0,
        };
        if let Some(Some(sums)) = sums.first() {
            let (start, end) = (at.start + moved, at.end() + moved);
            let heads =
                sums.values.len() / (sums.tiles.len() * longspan_kernels::attention::PAGE).max(1);
            let shares = (heads * self.listening.len()) as f64;
            let visible = ((start + end) / 2 + 1).min(self.window) as f64;
            let first = self.listening.first() == Some(&at.layer);
            for (slot, received) in sums.by_tokens(heads, |token| token) {
                let token = slot + moved;
                // Queries of the block that see the token.
                let queries = end.min(token + self.window).saturating_sub(start);
                if token + self.delta > start || queries == 0 || token < self.from {
                    continue;
                }
                let queries = if first { queries as f64 } else { 0.0 };
                let received = f64::from(received) * visible / shares;
                self.relevance.add(token, received, queries);
            }
        }
        if !self.remembering.contains(&at.layer) {
            let gone = (at.end() + 1).saturating_sub(self.window);
            store.drop_tokens(at.layer, self.config.sinks..gone.max(self.config.sinks));
        }
        Ok(())
    }

    fn fork(&self) -> Box<dyn ContextPolicy> {
        Box::new(self.clone())
    }

    fn save(&self, out: &mut dyn Write) -> io::Result<()> {
        write_u64(out, self.seen)?;
        write_u64(out, self.from)?;
        write_u64(out, self.evicted)?;
        write_u64(out, self.memory.entries().len() as u64)?;
        for entry in self.memory.entries() {
            write_u64(out, entry.position)?;
            write_u64(out, entry.segment)?;
        }
        let worth: Vec<f32> = self.memory.entries().iter().map(|e| e.relevance).collect();
        write_f32s(out, &worth)?;
        let (first, sums, counts) = self.relevance.parts();
        write_u64(out, first)?;
        write_u64(out, sums.len() as u64)?;
        sums.iter()
            .chain(counts)
            .try_for_each(|x| write_u64(out, x.to_bits()))
    }

    fn load(&mut self, input: &mut dyn Read) -> io::Result<()> {
        let wrong =
            |what: String| io::Error::new(io::ErrorKind::InvalidData, format!("CMR state: {what}"));
        (self.seen, self.from) = (read_u64(input)?, read_u64(input)?);
        self.evicted = read_u64(input)?;
        let mut places = Vec::new();
        for _ in 0..read_u64(input)? {
            places.push((read_u64(input)?, read_u64(input)?));
        }
        let worth = read_f32s(input)?;
        let sound = places.windows(2).all(|pair| pair[0].0 < pair[1].0)
            && places
                .iter()
                .all(|&(position, _)| position >= self.config.sinks && position < self.from);
        if worth.len() != places.len()
            || places.len() > self.config.capacity
            || !sound
            || self.from > self.seen
        {
            return Err(wrong(format!(
                "{} tokens are remembered of {}, expected at most {}, ascending",
                places.len(),
                self.from,
                self.config.capacity
            )));
        }
        self.memory = ReweaveMemory::default();
        let entries = places
            .into_iter()
            .zip(worth)
            .map(|((position, segment), relevance)| Captured {
                position,
                relevance,
                segment,
                states: Vec::new(),
            });
        self.memory.push(&self.memory_config, entries, 0);
        let first = read_u64(input)?;
        let count = read_u64(input)?;
        let mut numbers = |count: u64| -> io::Result<Vec<f64>> {
            (0..count)
                .map(|_| Ok(f64::from_bits(read_u64(input)?)))
                .collect()
        };
        let (sums, counts) = (numbers(count)?, numbers(count)?);
        self.relevance = Relevance::from_parts(first, sums, counts)
            .ok_or_else(|| wrong("relevance is incomplete".into()))?;
        Ok(())
    }

    fn kept(&self) -> Vec<(u64, f32)> {
        self.memory
            .entries()
            .iter()
            .map(|e| (e.position, e.relevance))
            .collect()
    }

    fn report(&self) -> PolicyReport {
        PolicyReport {
            evicted: self.evicted,
            index_bytes: (16 * self.relevance.len() + 24 * self.memory.entries().len()) as u64,
            ..PolicyReport::default()
        }
    }
}
