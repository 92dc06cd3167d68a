//! The tree of completions under LLM Tree Search: scores, the choice of the next leaf, visits and values.
//! It knows nothing of sequences: log probabilities come in, node numbers go out.

use super::{Backup, Confidence, Evaluator, TreeConfig};
use crate::decode::beam::best_of;

/// What a node is to the search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A leaf that can be expanded.
    Open,
    /// It has children.
    Expanded,
    /// The end of an answer.
    Terminal,
    /// A leaf that the cap of the frontier dropped.
    Dropped,
}

/// A partial completion.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its last token; `u32::MAX` at the root.
    pub token: u32,
    /// Its parent; `usize::MAX` at the root.
    pub parent: usize,
    /// Log probability of the token, by the model's own distribution.
    pub logprob: f64,
    /// Tokens of the completion.
    pub depth: usize,
    /// Likeliest first, ties by token id.
    pub children: Vec<usize>,
    /// What can be done with it.
    pub state: State,
    /// Share among its siblings (puct).
    pub prior: f64,
    /// Simulations through it (puct).
    pub visits: u64,
    /// Sum of their values (puct).
    pub value_sum: f64,
    /// The largest of their values (puct).
    pub value_max: f64,
    /// Logarithm of its confidence; 0 at the root.
    pub log_confidence: f64,
    /// Sum and minimum of the path's log probabilities.
    sum: f64,
    min: f64,
}

/// See the module's text.
pub struct SearchTree {
    config: TreeConfig,
    eos: Vec<u32>,
    max_len: usize,
    evaluator: Option<Box<Evaluator>>,
    nodes: Vec<Node>,
    /// Open leaves in order of creation.
    open: Vec<usize>,
}

impl SearchTree {
    /// A root alone. Completions have at most `max_len` tokens; those of `eos` end them.
    pub fn new(
        config: TreeConfig,
        eos: &[u32],
        max_len: usize,
        evaluator: Option<Box<Evaluator>>,
    ) -> SearchTree {
        let root = Node {
            token: u32::MAX,
            parent: usize::MAX,
            logprob: 0.0,
            depth: 0,
            children: Vec::new(),
            state: State::Open,
            prior: 1.0,
            visits: 0,
            value_sum: 0.0,
            value_max: 0.0,
            log_confidence: 0.0,
            sum: 0.0,
            min: 0.0,
        };
        SearchTree {
            config,
            eos: eos.to_vec(),
            max_len,
            evaluator,
            nodes: vec![root],
            open: vec![0],
        }
    }

    /// All nodes, in order of creation.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// True if a token at this depth ends a completion.
    pub fn ends(&self, token: u32, depth: usize) -> bool {
        depth >= self.max_len || self.eos.contains(&token)
    }

    /// True if a token ends a completion by the model's own will.
    pub fn is_eos(&self, token: u32) -> bool {
        self.eos.contains(&token)
    }

    /// Tokens and log probabilities from the root to a node.
    pub fn path(&self, node: usize) -> Vec<(u32, f64)> {
        let mut path = Vec::with_capacity(self.nodes[node].depth);
        let mut at = node;
        while self.nodes[at].parent != usize::MAX {
            path.push((self.nodes[at].token, self.nodes[at].logprob));
            at = self.nodes[at].parent;
        }
        path.reverse();
        path
    }

    /// Confidence in a node's path followed by `more`.
    pub fn confidence(&self, node: usize, more: &[(u32, f64)]) -> f64 {
        self.log_confidence(node, more).exp()
    }

    fn log_confidence(&self, node: usize, more: &[(u32, f64)]) -> f64 {
        let start = &self.nodes[node];
        if let Some(evaluator) = &self.evaluator {
            let path = self.path(node).into_iter().chain(more.iter().copied());
            let (tokens, logprobs): (Vec<u32>, Vec<f64>) = path.unzip();
            return evaluator(&tokens, &logprobs).ln();
        }
        let sum = more.iter().fold(start.sum, |sum, (_, lp)| sum + lp);
        let min = more.iter().fold(start.min, |min, (_, lp)| min.min(*lp));
        let count = start.depth + more.len();
        if count == 0 {
            return 0.0;
        }
        match self.config.confidence {
            Confidence::Mean => sum / count as f64,
            Confidence::Joint => sum,
            Confidence::Min => min,
            Confidence::Last => more.last().map_or(start.logprob, |last| last.1),
        }
    }

    /// Adds the likeliest tokens after a node as its children, from `logprobs` [vocab].
    pub fn expand(&mut self, node: usize, logprobs: &[f64]) {
        let best = best_of(logprobs.iter().copied(), self.config.top_k.unwrap_or(4));
        let certain = self.config.adaptive.is_some_and(|limit| {
            best.first()
                .is_some_and(|&(logprob, _)| logprob.exp() >= limit)
        });
        let keep = if certain { 1 } else { best.len() };
        self.add_children(node, &best[..keep]);
        self.cap_frontier();
    }

    /// Adds the likeliest token alone and returns its node.
    pub fn expand_greedily(&mut self, node: usize, logprobs: &[f64]) -> Option<usize> {
        let best = best_of(logprobs.iter().copied(), 1);
        self.add_children(node, &best);
        self.nodes[node].children.first().copied()
    }

    fn add_children(&mut self, node: usize, best: &[(f64, u32)]) {
        let tau = self.config.tau_prior;
        let top = best.first().map_or(0.0, |&(logprob, _)| logprob);
        let weights: Vec<f64> = best
            .iter()
            .map(|(lp, _)| ((lp - top) / tau).exp())
            .collect();
        let total: f64 = weights.iter().sum();
        let depth = self.nodes[node].depth + 1;
        for (&(logprob, token), weight) in best.iter().zip(weights) {
            let index = self.nodes.len();
            let ends = self.ends(token, depth);
            let parent = &self.nodes[node];
            let (sum, min) = (parent.sum + logprob, parent.min.min(logprob));
            self.nodes.push(Node {
                token,
                parent: node,
                logprob,
                depth,
                children: Vec::new(),
                state: if ends { State::Terminal } else { State::Open },
                prior: weight / total,
                visits: 0,
                value_sum: 0.0,
                value_max: 0.0,
                log_confidence: 0.0,
                sum,
                min,
            });
            self.nodes[index].log_confidence = self.log_confidence(index, &[]);
            self.nodes[node].children.push(index);
            if !ends {
                self.open.push(index);
            }
        }
        self.nodes[node].state = State::Expanded;
        self.open.retain(|&leaf| leaf != node);
    }

    /// Drops the open leaves of least confidence above the cap.
    fn cap_frontier(&mut self) {
        if self.open.len() <= self.config.frontier {
            return;
        }
        let mut order = self.open.clone();
        order.sort_by(|&a, &b| {
            let confidence = |node: usize| self.nodes[node].log_confidence;
            confidence(b).total_cmp(&confidence(a)).then(a.cmp(&b))
        });
        for leaf in order.split_off(self.config.frontier) {
            self.nodes[leaf].state = State::Dropped;
        }
        let nodes = &self.nodes;
        self.open.retain(|&leaf| nodes[leaf].state == State::Open);
    }

    /// Open leaves, in order of creation.
    pub fn open(&self) -> &[usize] {
        &self.open
    }

    /// Mode leaf: the next leaf to expand, drawn by confidence^alpha with `uniform` in [0, 1); None if
    /// every completion has ended.
    pub fn pick(&self, uniform: f64) -> Option<usize> {
        let alpha = self.config.alpha.0;
        let confidence = |leaf: usize| self.nodes[leaf].log_confidence;
        let best = self.open.iter().copied().reduce(|best, leaf| {
            if confidence(leaf) > confidence(best) {
                leaf
            } else {
                best
            }
        })?;
        if alpha.is_infinite() {
            return Some(best);
        }
        // From logarithms, so that long paths do not underflow.
        let top = confidence(best);
        let weight = |leaf: usize| {
            if alpha == 0.0 {
                1.0
            } else {
                (alpha * (confidence(leaf) - top)).exp()
            }
        };
        let total: f64 = self.open.iter().map(|&leaf| weight(leaf)).sum();
        let mut running = 0.0;
        for &leaf in &self.open {
            running += weight(leaf);
            if uniform * total < running {
                return Some(leaf);
            }
        }
        self.open.last().copied()
    }

    /// Mode leaf: ended completions, or all leaves if none has ended, most confident first.
    pub fn ranked(&self) -> Vec<usize> {
        let of = |state: State| {
            let nodes = self.nodes.iter().enumerate();
            let found = nodes.filter(move |(_, node)| node.state == state);
            found.map(|(index, _)| index).collect::<Vec<_>>()
        };
        let mut pool = of(State::Terminal);
        if pool.is_empty() {
            pool = of(State::Open);
        }
        // Stable: equal confidence in order of creation.
        pool.sort_by(|&a, &b| {
            let confidence = |node: usize| self.nodes[node].log_confidence;
            confidence(b).total_cmp(&confidence(a))
        });
        pool
    }

    /// Mode puct: the node that a simulation reaches.
    pub fn select(&self) -> usize {
        let mut at = 0;
        while !self.nodes[at].children.is_empty() {
            let parent = &self.nodes[at];
            let root = (parent.visits.max(1) as f64).sqrt();
            let mut best: Option<(f64, usize)> = None;
            for &child in &parent.children {
                let node = &self.nodes[child];
                let quality = match self.config.backup {
                    _ if node.visits == 0 => 0.0,
                    Backup::Mean => node.value_sum / node.visits as f64,
                    Backup::Max => node.value_max,
                };
                let score =
                    quality + self.config.c_puct * node.prior * root / (1.0 + node.visits as f64);
                if best.is_none_or(|(top, _)| score > top) {
                    best = Some((score, child));
                }
            }
            at = best.map_or(at, |(_, child)| child);
        }
        at
    }

    /// Mode puct: counts a simulation that reached `node` and was worth `value`.
    pub fn back_up(&mut self, node: usize, value: f64) {
        let mut at = node;
        while at != usize::MAX {
            let here = &mut self.nodes[at];
            here.visits += 1;
            here.value_sum += value;
            here.value_max = here.value_max.max(value);
            at = here.parent;
        }
    }

    /// Mode puct: the path of most visits, ties by value.
    pub fn most_visited(&self) -> usize {
        let mut at = 0;
        loop {
            let key = |&&child: &&usize| {
                let node = &self.nodes[child];
                (node.visits, node.value_sum / node.visits.max(1) as f64)
            };
            let visited = self.nodes[at].children.iter();
            let best = visited
                .filter(|&&child| self.nodes[child].visits > 0)
                .reduce(|best, child| {
                    let (a, b) = (key(&best), key(&child));
                    if b.0 > a.0 || b.0 == a.0 && b.1 > a.1 {
                        child
                    } else {
                        best
                    }
                });
            match best {
                Some(&child) => at = child,
                None => return at,
            }
        }
    }
}
