//! LLM Tree Search (paper 40, arXiv 2410.19117): a tree of completions, grown where the model is confident.
//! For whoever would rather spend more on one answer. Mode `leaf` draws the next leaf by confidence, as the
//! paper says; mode `puct` selects, expands, rolls out and backs up, as the program it names as its model.

mod tree;

pub use tree::{Node, SearchTree, State};

use super::random::CounterRng;
use super::sample::Choice;
use super::session::{DecodeError, DecodeSession, Result, SeqId};
use super::strategy::{Action, Answer, Emit, End, Outcome, Pair, Request, Strategy, log_softmax};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::time::Instant;

type SharedEvaluator = std::sync::Arc<dyn Fn(&[u32], &[f64]) -> f64 + Send + Sync>;

/// A judge of completions: tokens and their log probabilities to a value from 0 to 1.
pub type Evaluator = dyn Fn(&[u32], &[f64]) -> f64 + Send;

/// How the next node is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// A leaf drawn in proportion to its confidence.
    Leaf,
    /// The full loop with priors, visits and rollouts.
    #[default]
    Puct,
}

/// What the log probabilities of a path say about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Confidence {
    /// Geometric mean of the probabilities: length does not matter.
    #[default]
    Mean,
    /// Their product: favours short answers.
    Joint,
    /// The least of them.
    Min,
    /// The last.
    Last,
}

/// Which value of a node counts in selection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backup {
    /// The mean over simulations.
    #[default]
    Mean,
    /// The best of them.
    Max,
}

/// Which completion mode puct returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Best {
    /// The most valuable rollout.
    #[default]
    BestRollout,
    /// The path of most visits, completed greedily by its rollout.
    MostVisited,
}

/// The exponent of confidence; `inf` takes the best leaf always.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Alpha(pub f64);

impl Serialize for Alpha {
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        if self.0.is_infinite() {
            s.serialize_str("inf")
        } else {
            s.serialize_f64(self.0)
        }
    }
}

impl<'de> Deserialize<'de> for Alpha {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Alpha, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum NumberOrWord {
            Number(f64),
            Word(String),
        }
        match NumberOrWord::deserialize(d)? {
            NumberOrWord::Number(value) => Ok(Alpha(value)),
            NumberOrWord::Word(word) if word == "inf" => Ok(Alpha(f64::INFINITY)),
            NumberOrWord::Word(word) => Err(serde::de::Error::custom(format!(
                "alpha is {word:?}, expected a number or inf"
            ))),
        }
    }
}

/// `tree:mode=puct,budget=64,top_k=4`, `tree:mode=leaf,confidence=min,alpha=2`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TreeConfig {
    /// leaf or puct.
    pub mode: Mode,
    /// Expansions (leaf) or simulations (puct); default 200 and 64.
    pub budget: Option<usize>,
    /// Children of a node; default 5 (leaf) and 4 (puct).
    pub top_k: Option<usize>,
    /// mean, joint, min or last.
    pub confidence: Confidence,
    /// Mode leaf: exponent of the confidence a leaf is drawn by; 0 = all alike, inf = the best.
    pub alpha: Alpha,
    /// Mode leaf: complete a leaf that is more confident than every finished answer.
    pub finish: bool,
    /// Most open leaves.
    pub frontier: usize,
    /// Mode puct: weight of the priors.
    pub c_puct: f64,
    /// Mode puct: temperature of the priors.
    pub tau_prior: f64,
    /// Mode puct: tokens of a greedy rollout; default to the end of the answer.
    pub roll: Option<usize>,
    /// Mode puct: mean or max.
    pub backup: Backup,
    /// Mode puct: best_rollout or most_visited.
    pub answer: Best,
    /// Follow tokens at least this likely without branching, for instance 0.9.
    pub adaptive: Option<f64>,
    /// Most passes over the model.
    pub max_forwards: Option<usize>,
    /// Most seconds.
    pub seconds: Option<f64>,
    /// Answers returned.
    pub n: usize,
    /// How much likeness to a better answer costs a further one, in logarithms of confidence.
    pub lambda: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for TreeConfig {
    fn default() -> TreeConfig {
        TreeConfig {
            mode: Mode::Puct,
            budget: None,
            top_k: None,
            confidence: Confidence::Mean,
            alpha: Alpha(1.0),
            finish: true,
            frontier: 4096,
            c_puct: 1.25,
            tau_prior: 1.0,
            roll: None,
            backup: Backup::Mean,
            answer: Best::BestRollout,
            adaptive: None,
            max_forwards: None,
            seconds: None,
            n: 1,
            lambda: 0.0,
            seed: 0,
        }
    }
}

impl TreeConfig {
    /// The same with defaults filled in; errors name the option at fault.
    pub fn resolved(&self) -> std::result::Result<TreeConfig, String> {
        let mut config = self.clone();
        let (budget, top_k) = match self.mode {
            Mode::Leaf => (200, 5),
            Mode::Puct => (64, 4),
        };
        config.budget = Some(self.budget.unwrap_or(budget));
        config.top_k = Some(self.top_k.unwrap_or(top_k));
        for (name, value) in [
            ("budget", config.budget),
            ("top_k", config.top_k),
            ("frontier", Some(self.frontier)),
            ("max_forwards", self.max_forwards),
            ("n", Some(self.n)),
        ] {
            if value == Some(0) {
                return Err(format!("{name} is 0, expected at least 1"));
            }
        }
        for (name, value, least) in [
            ("alpha", self.alpha.0, 0.0),
            ("c_puct", self.c_puct, 0.0),
            ("lambda", self.lambda, 0.0),
            ("tau_prior", self.tau_prior, f64::MIN_POSITIVE),
            ("seconds", self.seconds.unwrap_or(1.0), 0.0),
            ("adaptive", self.adaptive.unwrap_or(1.0), 0.0),
        ] {
            if value.is_nan() || value < least {
                return Err(format!(
                    "{name} is {value}, expected a number of at least 0"
                ));
            }
        }
        Ok(config)
    }
}

/// A completed rollout or answer.
#[derive(Clone, Debug, PartialEq)]
struct Found {
    path: Vec<(u32, f64)>,
    value: f64,
}

enum Phase {
    /// Logits of the prompt come next.
    Start,
    /// Logits after a node come next.
    Expand(usize),
    /// Logits of a rollout's newest token come next.
    Roll(usize, SeqId, Vec<(u32, f64)>),
    /// Logits after the last node of a leaf's greedy completion come next.
    Complete(usize),
    Done,
}

/// [`SearchTree`] over a session. Nodes share their prefix's pages.
pub struct TreeSearch {
    config: TreeConfig,
    evaluator: Option<SharedEvaluator>,
    tree: SearchTree,
    phase: Phase,
    root: SeqId,
    random: CounterRng,
    max_len: usize,
    /// The sequence of an expanded node.
    seqs: HashMap<usize, SeqId>,
    /// Rollouts known of nodes that lie on their parent's.
    rolls: HashMap<usize, Vec<(u32, f64)>>,
    /// Best last; replaced only by what is better.
    best: Option<Found>,
    rollouts: Vec<Found>,
    done: usize,
    forwards: usize,
    start: Instant,
}

impl TreeSearch {
    /// Errors name the option at fault.
    pub fn new(config: TreeConfig, text: &str) -> Result<TreeSearch> {
        let config = config.resolved().map_err(|reason| DecodeError::Option {
            text: text.into(),
            reason,
        })?;
        Ok(TreeSearch {
            tree: SearchTree::new(config.clone(), &[], 0, None),
            random: CounterRng::new(config.seed, 0),
            config,
            evaluator: None,
            phase: Phase::Done,
            root: SeqId(0),
            max_len: 0,
            seqs: HashMap::new(),
            rolls: HashMap::new(),
            best: None,
            rollouts: Vec::new(),
            done: 0,
            forwards: 0,
            start: Instant::now(),
        })
    }

    /// Values completions by a judge instead of the model's confidence.
    pub fn with_evaluator(
        mut self,
        evaluator: impl Fn(&[u32], &[f64]) -> f64 + Send + Sync + 'static,
    ) -> TreeSearch {
        self.evaluator = Some(std::sync::Arc::new(evaluator));
        self
    }

    /// The tree of the last request.
    pub fn tree(&self) -> &SearchTree {
        &self.tree
    }

    fn spent(&self) -> bool {
        let most = self.config.max_forwards;
        self.done >= self.config.budget.unwrap_or(usize::MAX)
            || most.is_some_and(|most| self.forwards >= most)
            || (self.config.seconds).is_some_and(|most| self.start.elapsed().as_secs_f64() >= most)
    }

    fn step(&mut self, seq: SeqId, token: u32) -> Action {
        self.forwards += 1;
        Action::Step(vec![(seq, token)])
    }

    /// A sequence that holds a node's path, its token still to be read: the parent's own if no other
    /// child will need it, else a fork.
    fn heir(&mut self, session: &mut dyn DecodeSession, node: usize) -> Result<SeqId> {
        let parent = self.tree.nodes()[node].parent;
        let open = |&&child: &&usize| self.tree.nodes()[child].state == State::Open;
        let waiting = self.tree.nodes()[parent]
            .children
            .iter()
            .filter(open)
            .count();
        match self.seqs.get(&parent) {
            Some(&seq) if parent != 0 && waiting <= 1 => {
                self.seqs.remove(&parent);
                Ok(seq)
            }
            Some(&seq) => session.fork(seq),
            None => Err(DecodeError::Refused(
                "a node's sequence was given up too early".into(),
            )),
        }
    }

    /// Goes on until a pass over the model is needed.
    fn advance(&mut self, session: &mut dyn DecodeSession) -> Result<Action> {
        loop {
            if self.spent() {
                return self.complete(session);
            }
            let node = match self.config.mode {
                Mode::Leaf => match self.tree.pick(self.random.uniform(self.done as u64)) {
                    Some(node) => node,
                    None => return self.complete(session),
                },
                Mode::Puct => {
                    let node = self.tree.select();
                    if self.tree.nodes()[node].state != State::Open {
                        let value = self.tree.confidence(node, &[]);
                        self.record(self.tree.path(node), value);
                        self.tree.back_up(node, value);
                        self.done += 1;
                        continue;
                    }
                    node
                }
            };
            let seq = self.heir(session, node)?;
            self.seqs.insert(node, seq);
            self.phase = Phase::Expand(node);
            return Ok(self.step(seq, self.tree.nodes()[node].token));
        }
    }

    fn record(&mut self, path: Vec<(u32, f64)>, value: f64) {
        let found = Found { path, value };
        if (self.best.as_ref()).is_none_or(|best| found.value > best.value + 1e-15) {
            self.best = Some(found.clone());
        }
        if !self.rollouts.iter().any(|old| old.path == found.path) {
            self.rollouts.push(found);
        }
    }

    /// Mode puct: values a node that was just expanded by `logprobs`.
    fn roll(
        &mut self,
        session: &mut dyn DecodeSession,
        node: usize,
        logprobs: &[f64],
    ) -> Result<Action> {
        if let Some(path) = self.rolls.remove(&node) {
            return self.rolled(session, node, path);
        }
        let roll = self.config.roll.unwrap_or(usize::MAX);
        if roll == 0 {
            return self.rolled(session, node, Vec::new());
        }
        let path = vec![greedy(logprobs)];
        if self.roll_is_over(node, &path) {
            return self.rolled(session, node, path);
        }
        let seq = session.fork(self.seqs[&node])?;
        let token = path[0].0;
        self.phase = Phase::Roll(node, seq, path);
        Ok(self.step(seq, token))
    }

    fn roll_is_over(&self, node: usize, path: &[(u32, f64)]) -> bool {
        let depth = self.tree.nodes()[node].depth + path.len();
        path.len() >= self.config.roll.unwrap_or(usize::MAX)
            || path
                .last()
                .is_some_and(|&(token, _)| self.tree.ends(token, depth))
    }

    fn rolled(
        &mut self,
        session: &mut dyn DecodeSession,
        node: usize,
        path: Vec<(u32, f64)>,
    ) -> Result<Action> {
        let value = self.tree.confidence(node, &path);
        let mut whole = self.tree.path(node);
        whole.extend_from_slice(&path);
        self.record(whole, value);
        self.tree.back_up(node, value);
        self.done += 1;
        // The likeliest child's rollout is the rest of this one, if this one came to an end.
        let depth = self.tree.nodes()[node].depth + path.len();
        if let (Some(&child), Some(&(last, _))) =
            (self.tree.nodes()[node].children.first(), path.last())
            && self.tree.ends(last, depth)
        {
            self.rolls.insert(child, path[1..].to_vec());
        }
        self.advance(session)
    }

    /// Mode leaf: a leaf more confident than every finished answer is completed greedily.
    fn complete(&mut self, session: &mut dyn DecodeSession) -> Result<Action> {
        self.phase = Phase::Done;
        if self.config.mode == Mode::Puct || !self.config.finish {
            return Ok(Action::Done);
        }
        let confidence = |&node: &usize| self.tree.nodes()[node].log_confidence;
        let best = |nodes: &[usize]| {
            let mut best: Option<usize> = None;
            for &node in nodes {
                if best.is_none_or(|old| confidence(&node) > confidence(&old)) {
                    best = Some(node);
                }
            }
            best
        };
        let Some(leaf) = best(self.tree.open()) else {
            return Ok(Action::Done);
        };
        let ended = |&&node: &&usize| self.tree.nodes()[node].state == State::Terminal;
        let finished = self.tree.ranked();
        let finished = finished.iter().find(ended);
        if leaf == 0 || finished.is_some_and(|node| confidence(node) >= confidence(&leaf)) {
            return Ok(Action::Done);
        }
        let seq = self.heir(session, leaf)?;
        self.seqs.insert(leaf, seq);
        self.phase = Phase::Complete(leaf);
        Ok(self.step(seq, self.tree.nodes()[leaf].token))
    }

    fn answer(&self, found: &Found) -> Answer {
        let ended = (found.path.last()).is_some_and(|&(token, _)| self.tree.is_eos(token));
        let shown = found.path.len() - usize::from(ended);
        Answer {
            choices: found.path[..shown]
                .iter()
                .map(|&(token, logprob)| Choice {
                    token,
                    logprob: logprob as f32,
                    top: Vec::new(),
                })
                .collect(),
            score: found.value,
            logprob: found.path.iter().map(|(_, logprob)| logprob).sum(),
            end: if ended { End::Eos } else { End::Length },
        }
    }

    /// All completions found, best first.
    fn found(&self) -> Vec<Found> {
        let of = |node: usize| Found {
            path: self.tree.path(node),
            value: self.tree.confidence(node, &[]),
        };
        match self.config.mode {
            Mode::Leaf => self.tree.ranked().into_iter().map(of).collect(),
            Mode::Puct => {
                let mut found = self.rollouts.clone();
                found.sort_by(|a, b| b.value.total_cmp(&a.value));
                let first = match self.config.answer {
                    Best::BestRollout => self.best.clone(),
                    Best::MostVisited => {
                        let node = self.tree.most_visited();
                        let path = self.tree.path(node);
                        // Its own rollout, the best known completion of that path.
                        let whole = found.iter().find(|f| f.path.starts_with(&path));
                        Some(whole.cloned().unwrap_or_else(|| of(node)))
                    }
                };
                if let Some(first) = first {
                    found.retain(|other| other.path != first.path);
                    found.insert(0, first);
                }
                found
            }
        }
    }
}

/// The likeliest token and its log probability.
fn greedy(logprobs: &[f64]) -> (u32, f64) {
    let mut best = (0, f64::NEG_INFINITY);
    for (token, &logprob) in (0u32..).zip(logprobs) {
        if logprob > best.1 {
            best = (token, logprob);
        }
    }
    best
}

/// Picks `n` of the completions: the first, then each best after a penalty for likeness to those picked.
fn varied(found: &[Found], n: usize, lambda: f64) -> Vec<usize> {
    let likeness = |a: &Found, b: &Found| {
        let same = (a.path.iter().zip(&b.path))
            .filter(|(x, y)| x.0 == y.0)
            .count();
        same as f64 / a.path.len().max(b.path.len()).max(1) as f64
    };
    let mut picked: Vec<usize> = Vec::new();
    while picked.len() < n.min(found.len()) {
        let score = |index: usize| {
            let alike = picked.iter().map(|&p| likeness(&found[index], &found[p]));
            found[index].value.ln() - lambda * alike.fold(0.0, f64::max)
        };
        let mut best: Option<usize> = None;
        for index in (0..found.len()).filter(|index| !picked.contains(index)) {
            // The first stays first, whatever rule made it so.
            if picked.is_empty() {
                best = Some(index);
                break;
            }
            if best.is_none_or(|old| score(index) > score(old)) {
                best = Some(index);
            }
        }
        picked.extend(best);
    }
    picked
}

impl Strategy for TreeSearch {
    fn streams(&self) -> bool {
        false
    }

    fn begin(&mut self, _session: &mut dyn DecodeSession, request: &Request) -> Result<()> {
        let evaluator = self.evaluator.clone().map(|judge| {
            Box::new(move |tokens: &[u32], logprobs: &[f64]| judge(tokens, logprobs))
                as Box<Evaluator>
        });
        self.max_len = request.max_tokens;
        let config = self.config.clone();
        self.tree = SearchTree::new(config, &request.eos, self.max_len, evaluator);
        self.phase = Phase::Start;
        self.root = request.seq;
        self.seqs = HashMap::from([(0, request.seq)]);
        self.rolls.clear();
        self.best = None;
        self.rollouts.clear();
        (self.done, self.forwards) = (0, 0);
        self.start = Instant::now();
        Ok(())
    }

    fn next(
        &mut self,
        session: &mut dyn DecodeSession,
        logits: &[f32],
        _emit: &mut Emit<'_>,
    ) -> Result<Action> {
        let logprobs = log_softmax(&logits[..session.vocab_size()]);
        let expanded = match std::mem::replace(&mut self.phase, Phase::Done) {
            Phase::Done => return Ok(Action::Done),
            Phase::Start if self.max_len == 0 => return Ok(Action::Done),
            Phase::Start => 0,
            Phase::Expand(node) => node,
            Phase::Roll(node, seq, mut path) => {
                path.push(greedy(&logprobs));
                if self.roll_is_over(node, &path) {
                    session.release(seq);
                    return self.rolled(session, node, path);
                }
                let token = path[path.len() - 1].0;
                self.phase = Phase::Roll(node, seq, path);
                return Ok(self.step(seq, token));
            }
            Phase::Complete(node) => {
                let seq = self.seqs.remove(&node);
                let child = self.tree.expand_greedily(node, &logprobs);
                if let (Some(seq), Some(child)) = (seq, child) {
                    self.seqs.insert(child, seq);
                    if self.tree.nodes()[child].state == State::Open {
                        self.phase = Phase::Complete(child);
                        return Ok(self.step(seq, self.tree.nodes()[child].token));
                    }
                }
                return Ok(Action::Done);
            }
        };
        self.tree.expand(expanded, &logprobs);
        match self.config.mode {
            Mode::Puct => self.roll(session, expanded, &logprobs),
            Mode::Leaf => {
                self.done += 1;
                // Nothing will grow from a node whose children have all ended.
                let nodes = self.tree.nodes();
                let open = |&child: &usize| nodes[child].state == State::Open;
                if expanded != 0
                    && !nodes[expanded].children.iter().any(open)
                    && let Some(seq) = self.seqs.remove(&expanded)
                {
                    session.release(seq);
                }
                self.advance(session)
            }
        }
    }

    fn finish(&mut self, session: &mut dyn DecodeSession) -> Result<Outcome> {
        if let Phase::Roll(_, seq, _) = std::mem::replace(&mut self.phase, Phase::Done) {
            session.release(seq);
        }
        for (_, seq) in self.seqs.drain() {
            if seq != self.root {
                session.release(seq);
            }
        }
        let found = self.found();
        let picked = varied(&found, self.config.n, self.config.lambda);
        let answers: Vec<Answer> = picked.iter().map(|&i| self.answer(&found[i])).collect();
        // The worse one: the greedy answer, which is the first rollout, or else the least confident.
        let worse = match self.config.mode {
            Mode::Puct => self.rollouts.first(),
            Mode::Leaf => None,
        };
        let worse = worse
            .filter(|worse| found.first().is_some_and(|best| best.path != worse.path))
            .or(found.last().filter(|_| found.len() > 1));
        let pair = (answers.first().zip(worse)).map(|(chosen, worse)| Pair {
            chosen: chosen.clone(),
            rejected: self.answer(worse),
        });
        Ok(Outcome {
            end: answers.first().map_or(End::Length, |answer| answer.end),
            answers,
            pair,
            ..Outcome::default()
        })
    }
}
