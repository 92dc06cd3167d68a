//! Tries of token sequences seen before, from which drafts are taken (paper 54, Lookahead).
//!
//! One tree for every first token. Prompts count per request and are forgotten with it; outputs count for
//! all requests, and decay by halving when a tree outgrows its capacity. [`super::lookahead`] verifies drafts.

use super::session::DraftTree;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::io::{self, Read, Write};

/// The frequency key that all requests share.
const OUTPUT: i32 = -1;
/// Trees touched before capacities are looked at (the reference's number).
const SQUEEZE_AFTER: usize = 1024;
/// Children that are searched one by one; above, a map finds them.
const FEW: usize = 16;

/// Which frequencies count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// Prompt of this request and outputs of all.
    #[default]
    Mix,
    /// The prompt only (prompt lookup).
    Input,
    /// Outputs only.
    Output,
}

/// How drafts are laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// A tree whose branches share prefixes.
    #[default]
    Hier,
    /// Branches side by side.
    Par,
    /// One branch.
    One,
}

/// Capacities and habits of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrieConfig {
    /// Most nodes of a tree.
    pub max_node: usize,
    /// Most nodes of a tree that come from outputs.
    pub max_output_node: usize,
    /// Tokens too common to look up alone, and whose outputs are not stored under them.
    pub stop_words: Vec<u32>,
    /// Tokens that end texts: no branch holds one.
    pub eos: Vec<u32>,
    /// Behaves as the published code does where it errs: of a text only what precedes its first end is
    /// stored, one squeeze may leave a tree above its capacity, and ending one request makes the store
    /// forget which trees the others touched.
    pub compat: bool,
}

/// What a draft is asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DraftQuery<'a> {
    /// The last tokens, oldest first; the last one becomes the draft's root.
    pub query: &'a [u32],
    /// Which frequencies count.
    pub mode: Source,
    /// The request.
    pub idx: i32,
    /// Most nodes, the root included.
    pub decoding_length: usize,
    /// Most tokens of a branch after the root.
    pub branch_length: usize,
    /// As in the paper's code: how many nodes the prompt's frequency alone admits.
    pub min_input_size: usize,
    /// How many nodes the outputs' frequency alone admits.
    pub min_output_size: usize,
    /// Leave out nodes that only other requests' prompts put there.
    pub isolate: bool,
}

/// A draft and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draft {
    /// The guesses; the root is the last token of the query.
    pub tree: DraftTree,
    /// Nodes with a prompt frequency, of [`Layout::Hier`].
    pub input: usize,
    /// Nodes with an output frequency, of [`Layout::Hier`].
    pub output: usize,
    /// Tokens of the query that were matched; 0 = no tree continues it.
    pub matched: usize,
}

#[derive(Clone, Debug, Default)]
struct Node {
    freqs: Vec<(i32, f32)>,
    children: Children,
}

/// Children in order of insertion: ties between equal frequencies are broken by it.
#[derive(Clone, Debug, Default)]
struct Children {
    list: Vec<(u32, Node)>,
    /// Places in `list`, once there are more than a [`FEW`].
    index: Option<HashMap<u32, u32>>,
}

#[derive(Clone, Debug, Default)]
struct Tree {
    nodes: Children,
    n_node: usize,
    n_output_node: usize,
}

impl Node {
    fn freq(&self, idx: i32) -> f32 {
        let found = self.freqs.iter().find(|&&(key, _)| key == idx);
        found.map_or(0.0, |&(_, freq)| freq)
    }

    fn add(&mut self, idx: i32) {
        match self.freqs.iter_mut().find(|(key, _)| *key == idx) {
            Some((_, freq)) => *freq += 1.0,
            None => self.freqs.push((idx, 1.0)),
        }
    }
}

impl Children {
    fn place(&self, token: u32) -> Option<usize> {
        match &self.index {
            Some(index) => index.get(&token).map(|&place| place as usize),
            None => self.list.iter().position(|&(t, _)| t == token),
        }
    }

    fn get(&self, token: u32) -> Option<&Node> {
        self.place(token).map(|place| &self.list[place].1)
    }

    fn get_mut(&mut self, token: u32) -> Option<&mut Node> {
        self.place(token).map(|place| &mut self.list[place].1)
    }

    fn push(&mut self, token: u32, node: Node) -> &mut Node {
        self.list.push((token, node));
        let place = self.list.len() - 1;
        match &mut self.index {
            Some(index) => {
                index.insert(token, place as u32);
            }
            None if self.list.len() > FEW => self.reindex(),
            None => {}
        }
        &mut self.list[place].1
    }

    fn reindex(&mut self) {
        let places = self.list.iter().zip(0..).map(|(&(t, _), place)| (t, place));
        self.index = (self.list.len() > FEW).then(|| places.collect());
    }

    fn count(&self) -> usize {
        self.list.iter().map(|(_, n)| 1 + n.children.count()).sum()
    }
}

impl Tree {
    fn put(&mut self, tokens: &[u32], idx: i32) {
        let mut children = &mut self.nodes;
        for (at, &token) in tokens.iter().enumerate() {
            if children.place(token).is_none() {
                let rest = &tokens[at..];
                self.n_node += rest.len();
                if idx == OUTPUT {
                    self.n_output_node += rest.len();
                }
                for &token in rest {
                    let mut node = Node::default();
                    node.add(idx);
                    children = &mut children.push(token, node).children;
                }
                return;
            }
            let node = children.get_mut(token).expect("its place was just found");
            node.add(idx);
            children = &mut node.children;
        }
    }

    /// Sets a request's frequencies to nothing. Nodes left without any are removed unless `keep`.
    fn reset(&mut self, idx: i32, keep: bool) {
        fn walk(children: &mut Children, idx: i32, keep: bool) {
            for (_, node) in &mut children.list {
                if node.freq(idx) == 0.0 {
                    continue;
                }
                if keep {
                    let found = node.freqs.iter_mut().find(|(key, _)| *key == idx);
                    found.expect("its frequency is not 0").1 = 0.0;
                } else {
                    node.freqs.retain(|&(key, _)| key != idx);
                }
                walk(&mut node.children, idx, keep);
            }
            if !keep {
                let before = children.list.len();
                // Nobody passed a child without passing its parent: nothing is lost below.
                children.list.retain(|(_, node)| !node.freqs.is_empty());
                if children.list.len() != before {
                    children.reindex();
                }
            }
        }
        walk(&mut self.nodes, idx, keep);
        if !keep {
            self.n_node = self.nodes.count();
        }
    }

    fn squeeze(&mut self) {
        fn walk(children: &mut Children) -> usize {
            children.list.retain_mut(|(_, node)| {
                let Some((_, freq)) = node.freqs.iter_mut().find(|(key, _)| *key == OUTPUT) else {
                    return false;
                };
                let stays = *freq > 1.0;
                *freq *= 0.5;
                stays
            });
            children.reindex();
            let below = children.list.iter_mut().map(|(_, n)| walk(&mut n.children));
            below.sum::<usize>() + children.list.len()
        }
        let left = walk(&mut self.nodes);
        self.n_node = left;
        self.n_output_node = left;
    }
}

/// See the module's text. Shared by the requests of one model.
#[derive(Clone, Debug)]
pub struct TrieStore {
    config: TrieConfig,
    trees: HashMap<u32, Tree>,
    /// Output of live requests that is too short to be inserted yet.
    tails: HashMap<i32, Vec<u32>>,
    /// Trees touched since capacities were looked at.
    touched: HashSet<u32>,
    /// Trees touched by prompts, per request.
    prompted: HashMap<i32, HashSet<u32>>,
    live: HashSet<i32>,
}

impl TrieStore {
    /// An empty store.
    pub fn new(config: TrieConfig) -> TrieStore {
        TrieStore {
            config,
            trees: HashMap::new(),
            tails: HashMap::new(),
            touched: HashSet::new(),
            prompted: HashMap::new(),
            live: HashSet::new(),
        }
    }

    /// The number of a new request; [`TrieStore::close`] gives it back.
    pub fn open(&mut self) -> i32 {
        let idx = (0..).find(|idx| !self.live.contains(idx));
        let idx = idx.expect("there are fewer requests than numbers");
        self.live.insert(idx);
        idx
    }

    /// Ends a request: what is left of its output is stored, its prompt is forgotten.
    pub fn close(&mut self, branch_length: usize, idx: i32) {
        self.stream_put(&[], branch_length, idx, true);
        self.live.remove(&idx);
    }

    /// Trees and nodes held.
    pub fn size(&self) -> (usize, usize) {
        let nodes = self.trees.values().map(|tree| tree.n_node).sum();
        (self.trees.len(), nodes)
    }

    fn cut<'a>(&self, tokens: &'a [u32]) -> &'a [u32] {
        let end = tokens.iter().position(|t| self.config.eos.contains(t));
        &tokens[..end.unwrap_or(tokens.len())]
    }

    fn insert(&mut self, first: u32, branch: &[u32], idx: i32) {
        self.trees.entry(first).or_default().put(branch, idx);
        self.touched.insert(first);
    }

    /// Stores a text: a prompt of request `idx`, or an output for all (`mode` [`Source::Output`]).
    /// Branches have `branch_length` tokens. `last` forgets the request's prompts.
    pub fn put(
        &mut self,
        tokens: &[u32],
        branch_length: usize,
        mode: Source,
        idx: i32,
        last: bool,
    ) {
        let key = if mode == Source::Output { OUTPUT } else { idx };
        // Ends of turns lie inside a conversation: what follows them is stored too, nothing across them.
        let mut pieces = tokens.split(|token| self.config.eos.contains(token));
        let pieces: Vec<&[u32]> = if self.config.compat {
            pieces.next().into_iter().collect()
        } else {
            pieces.collect()
        };
        for tokens in pieces {
            for first in 0..tokens.len().saturating_sub(1) {
                let end = (first + 1 + branch_length).min(tokens.len());
                self.insert(tokens[first], &tokens[first + 1..end], key);
                if key != OUTPUT {
                    let group = self.group(idx);
                    self.prompted
                        .entry(group)
                        .or_default()
                        .insert(tokens[first]);
                }
            }
        }
        if last {
            self.finish(idx);
        }
    }

    /// Stores output as it comes, each position once its branch is complete. `last` stores the rest
    /// and forgets the request's prompts.
    pub fn stream_put(&mut self, tokens: &[u32], branch_length: usize, idx: i32, last: bool) {
        let mut tail = self.tails.remove(&idx).unwrap_or_default();
        tail.extend_from_slice(self.cut(tokens));
        let keep = if last { 1 } else { branch_length };
        if tail.len() > keep {
            for first in 0..tail.len() - keep {
                if self.config.stop_words.contains(&tail[first]) {
                    continue;
                }
                let end = (first + 1 + branch_length).min(tail.len());
                self.insert(tail[first], &tail[first + 1..end], OUTPUT);
            }
            tail.drain(..tail.len() - keep);
        }
        if last {
            self.finish(idx);
        } else {
            self.tails.insert(idx, tail);
        }
    }

    /// Which set of touched trees a request has.
    fn group(&self, idx: i32) -> i32 {
        if self.config.compat { 0 } else { idx }
    }

    fn finish(&mut self, idx: i32) {
        for first in self.prompted.remove(&self.group(idx)).unwrap_or_default() {
            if let Some(tree) = self.trees.get_mut(&first) {
                tree.reset(idx, self.config.compat);
            }
        }
        if !self.config.compat {
            self.trees.retain(|_, tree| tree.n_node > 0);
        }
        if self.touched.len() >= SQUEEZE_AFTER {
            self.squeeze();
        }
    }

    /// Lets the trees touched since the last time that outgrew their capacity decay.
    pub fn squeeze(&mut self) {
        for first in std::mem::take(&mut self.touched) {
            let Some(tree) = self.trees.get_mut(&first) else {
                continue;
            };
            while tree.n_node > self.config.max_node
                || tree.n_output_node > self.config.max_output_node
            {
                tree.squeeze();
                if self.config.compat {
                    break;
                }
            }
        }
    }

    /// A draft in a layout.
    pub fn draft(&self, layout: Layout, ask: &DraftQuery<'_>) -> Draft {
        match layout {
            Layout::Hier => self.hier(ask),
            Layout::Par => par(self.hier(ask)),
            Layout::One => self.one(ask),
        }
    }

    fn lone(ask: &DraftQuery<'_>) -> Draft {
        Draft {
            tree: DraftTree::new(ask.query.last().copied().unwrap_or(0)),
            input: 0,
            output: 0,
            matched: 0,
        }
    }

    /// The children that continue the query from its token `at` on, if its tree is there to be asked.
    fn find<'a>(&'a self, ask: &DraftQuery<'_>, at: usize) -> Option<Option<&'a Children>> {
        let (first, rest) = (ask.query[at], &ask.query[at + 1..]);
        let tree = self.trees.get(&first)?;
        if rest.is_empty() && self.config.stop_words.contains(&first) {
            return None;
        }
        let mut children = &tree.nodes;
        for &token in rest {
            match children.get(token) {
                Some(node) if ask.seen(node) => children = &node.children,
                _ => return Some(None),
            }
        }
        Some(Some(children).filter(|children| !children.list.is_empty()))
    }

    fn hier(&self, ask: &DraftQuery<'_>) -> Draft {
        let mut draft = Self::lone(ask);
        if ask.decoding_length <= 1 || ask.branch_length == 0 {
            return draft;
        }
        for at in 0..ask.query.len() {
            let Some(found) = self.find(ask, at) else {
                continue;
            };
            draft = Self::lone(ask);
            if let Some(children) = found {
                draft.matched = ask.query.len() - at;
                let limits = ask.thresholds(children);
                ask.ravel(children, &limits, &mut draft, 0, ask.branch_length);
            }
            if draft.tree.len() >= ask.branch_length {
                break;
            }
        }
        draft
    }

    fn one(&self, ask: &DraftQuery<'_>) -> Draft {
        let mut draft = Self::lone(ask);
        if ask.decoding_length <= 1 || ask.branch_length == 0 {
            return draft;
        }
        for at in 0..ask.query.len() {
            let Some(found) = self.find(ask, at) else {
                continue;
            };
            draft = Self::lone(ask);
            let mut children = found;
            if children.is_some() {
                draft.matched = ask.query.len() - at;
            }
            let longest = ask.branch_length.min(ask.decoding_length - 1);
            while let Some(here) = children.filter(|_| draft.tree.len() <= longest) {
                let mut best: Option<(f64, u32, &Node)> = None;
                for (token, node) in &here.list {
                    let score = ask.score_of_one(node);
                    if best.is_none_or(|(top, ..)| score > top) {
                        best = Some((score, *token, node));
                    }
                }
                let Some((_, token, node)) = best.filter(|&(score, ..)| score > 0.0) else {
                    break;
                };
                draft.tree.push(draft.tree.len() as u32 - 1, token);
                children = Some(&node.children);
            }
            if draft.tree.len() >= ask.branch_length / 2 {
                break;
            }
        }
        draft
    }

    /// Writes the outputs' part of the store; [`TrieStore::load`] adds it to another.
    pub fn save(&self, out: &mut dyn Write) -> io::Result<()> {
        fn walk(children: &Children, depth: u32, rows: &mut Vec<SavedNode>) {
            for (token, node) in &children.list {
                let freq = node.freq(OUTPUT);
                if freq > 0.0 {
                    rows.push((depth, *token, freq));
                    walk(&node.children, depth + 1, rows);
                }
            }
        }
        let mut trees = Vec::new();
        for (&first, tree) in &self.trees {
            let mut rows = Vec::new();
            walk(&tree.nodes, 0, &mut rows);
            if !rows.is_empty() {
                trees.push((first, rows));
            }
        }
        trees.sort_by_key(|&(first, _)| first);
        serde_json::to_writer(out, &Saved { version: 1, trees }).map_err(io::Error::other)
    }

    /// Adds a saved store's frequencies to this one's.
    pub fn load(&mut self, input: &mut dyn Read) -> io::Result<()> {
        let bad = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
        let saved: Saved =
            serde_json::from_reader(input).map_err(|error| bad(error.to_string()))?;
        if saved.version != 1 {
            return Err(bad(format!(
                "a trie of version {} was found, expected 1",
                saved.version
            )));
        }
        for (first, rows) in saved.trees {
            let mut path: Vec<u32> = Vec::new();
            let tree = self.trees.entry(first).or_default();
            self.touched.insert(first);
            for (depth, token, freq) in rows {
                if depth as usize > path.len() || depth > 4096 || !(freq > 0.0 && freq.is_finite())
                {
                    return Err(bad(format!(
                        "tree {first}: a node of depth {depth} and frequency {freq} was found after one of depth {}",
                        path.len()
                    )));
                }
                path.truncate(depth as usize);
                path.push(token);
                let mut children = &mut tree.nodes;
                for &token in &path[..path.len() - 1] {
                    let node = children.get_mut(token);
                    children = &mut node.expect("its row came before").children;
                }
                let node = if children.place(token).is_some() {
                    children.get_mut(token).expect("its place was just found")
                } else {
                    tree.n_node += 1;
                    children.push(token, Node::default())
                };
                match node.freqs.iter_mut().find(|(key, _)| *key == OUTPUT) {
                    Some((_, found)) => *found += freq,
                    None => {
                        node.freqs.push((OUTPUT, freq));
                        tree.n_output_node += 1;
                    }
                }
            }
        }
        Ok(())
    }

    /// The whole store as JSON: first token to counters and nodes with their frequencies by request.
    pub fn to_json(&self) -> serde_json::Value {
        fn nodes(children: &Children) -> serde_json::Value {
            let map: serde_json::Map<_, _> = children
                .list
                .iter()
                .map(|(token, node)| {
                    let freqs: serde_json::Map<_, _> = (node.freqs.iter())
                        .map(|&(idx, freq)| (idx.to_string(), freq.into()))
                        .collect();
                    let value = serde_json::json!({ "f": freqs, "c": nodes(&node.children) });
                    (token.to_string(), value)
                })
                .collect();
            map.into()
        }
        let trees: serde_json::Map<_, _> = (self.trees.iter())
            .map(|(first, tree)| {
                let value = serde_json::json!({
                    "n_node": tree.n_node,
                    "n_output_node": tree.n_output_node,
                    "nodes": nodes(&tree.nodes),
                });
                (first.to_string(), value)
            })
            .collect();
        trees.into()
    }
}

/// Depth, token and frequency of a node.
type SavedNode = (u32, u32, f32);

/// Outputs on disk: per first token the nodes in pre-order.
#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    trees: Vec<(u32, Vec<SavedNode>)>,
}

/// Frequencies below which a node is left out: prompt, output.
struct Thresholds {
    input: f64,
    output: f64,
}

impl DraftQuery<'_> {
    fn freqs(&self, node: &Node) -> (f64, f64) {
        (f64::from(node.freq(self.idx)), f64::from(node.freq(OUTPUT)))
    }

    /// Whether a node counts in the mode.
    fn seen(&self, node: &Node) -> bool {
        let (input, output) = self.freqs(node);
        match self.mode {
            Source::Mix => input > 0.0 || output > 0.0,
            Source::Input => input > 0.0,
            Source::Output => output > 0.0,
        }
    }

    fn thresholds(&self, children: &Children) -> Thresholds {
        fn collect(ask: &DraftQuery<'_>, children: &Children, found: &mut Vec<(f64, f64)>) {
            for (_, node) in &children.list {
                let freqs = ask.freqs(node);
                if freqs.0 > 0.0 || freqs.1 > 0.0 {
                    found.push(freqs);
                    collect(ask, &node.children, found);
                }
            }
        }
        let mut found = Vec::new();
        collect(self, children, &mut found);
        let in_mode = |&&(input, output): &&(f64, f64)| match self.mode {
            Source::Mix => input > 0.0 || output > 0.0,
            Source::Input => input > 0.0,
            Source::Output => output > 0.0,
        };
        if found.iter().filter(in_mode).count() <= self.decoding_length {
            return Thresholds {
                input: 0.0,
                output: 0.0,
            };
        }
        // The value of a rank, largest first; rank 0 is the last one, as in the published code.
        let rank = |mut values: Vec<f64>, rank: usize| {
            values.sort_by(|a, b| b.total_cmp(a));
            let place = rank.checked_sub(1).unwrap_or(values.len() - 1);
            values[place.min(values.len() - 1)]
        };
        let inputs = || found.iter().map(|f| f.0).collect();
        let outputs = || found.iter().map(|f| f.1).collect();
        let (input, output) = match self.mode {
            Source::Input => (rank(inputs(), self.min_input_size), 0.0),
            Source::Output => (0.0, rank(outputs(), self.min_output_size)),
            Source::Mix if self.min_input_size > 0 => (
                rank(inputs(), self.min_input_size),
                rank(outputs(), self.min_output_size),
            ),
            Source::Mix => (1e9, rank(outputs(), self.min_output_size)),
        };
        Thresholds { input, output }
    }

    /// Adds children, most frequent first, each with what is below it.
    fn ravel(
        &self,
        children: &Children,
        limits: &Thresholds,
        draft: &mut Draft,
        parent: u32,
        depth_left: usize,
    ) {
        if depth_left == 0 || draft.tree.len() >= self.decoding_length {
            return;
        }
        let weight = match self.mode {
            Source::Mix => 1e-4,
            Source::Input => 0.0,
            Source::Output => 1.0,
        };
        let mut order: Vec<(f64, &(u32, Node))> = (children.list.iter())
            .map(|child| {
                let (input, output) = self.freqs(&child.1);
                ((1.0 - weight) * input + weight * output, child)
            })
            .collect();
        // Stable: equal frequencies stay in order of insertion.
        order.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (_, (token, node)) in order {
            if draft.tree.len() >= self.decoding_length {
                return;
            }
            let (input, output) = self.freqs(node);
            let rare = match self.mode {
                Source::Mix => input < limits.input && output < limits.output,
                Source::Input => input < limits.input,
                Source::Output => output < limits.output,
            };
            if rare || (self.isolate && !self.seen(node)) {
                continue;
            }
            draft.input += usize::from(input > 0.0);
            draft.output += usize::from(output > 0.0);
            let here = draft.tree.push(parent, *token);
            self.ravel(&node.children, limits, draft, here, depth_left - 1);
        }
    }

    fn score_of_one(&self, node: &Node) -> f64 {
        let (input, output) = self.freqs(node);
        match self.mode {
            Source::Mix => 10_000.0 * output + input,
            Source::Input => input,
            Source::Output => output,
        }
    }
}

/// A tree's branches side by side: each sees itself and the root only. No more tokens than the tree had.
fn par(hier: Draft) -> Draft {
    let tree = &hier.tree;
    let mut budget = tree.len() - 1;
    let mut flat = DraftTree::new(tree.tokens()[0]);
    for leaf in 1..tree.len() as u32 {
        if tree.parents().contains(&leaf) {
            continue;
        }
        let mut parent = 0;
        for &node in tree.path(leaf)[1..].iter().take(budget) {
            parent = flat.push(parent, tree.tokens()[node as usize]);
            budget -= 1;
        }
        if budget == 0 {
            break;
        }
    }
    Draft { tree: flat, ..hier }
}
