//! Lookahead (paper 54, arXiv 2312.12728): drafts from tries of what was read and written before, verified as
//! a tree in one pass. For whoever writes what was seen before: summaries, quotes, code, answers over a fixed
//! corpus. Every emitted token is the one plain decoding would have drawn, greedy or seeded.

use super::sample::{Sampler, Writer};
use super::session::{DecodeError, DecodeSession, DraftTree, Result};
use super::strategy::{Action, Emit, Outcome, Request, Strategy};
use super::trie::{DraftQuery, Layout, Source, TrieConfig, TrieStore};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

/// `lookahead:decoding_length=64,branch_length=12`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LookaheadConfig {
    /// Most tokens of one pass, the last certain one included.
    pub decoding_length: usize,
    /// Most guesses in a row.
    pub branch_length: usize,
    /// Last tokens that are looked up together.
    pub max_query_length: usize,
    /// How drafts are laid out: hier, par or one.
    pub layout: Layout,
    /// Which frequencies count: mix, input (prompt lookup) or output.
    pub mode: Source,
    /// Nodes that the prompt's frequency alone admits.
    pub min_input_size: usize,
    /// Nodes that the outputs' frequency alone admits; default half of `decoding_length`.
    pub min_output_size: Option<usize>,
    /// Most nodes of a tree.
    pub max_node: usize,
    /// Most nodes of a tree that come from outputs.
    pub max_output_node: usize,
    /// Token ids too common to be looked up alone.
    pub stop_words: Vec<u32>,
    /// Never draft what only another request's prompt holds.
    pub isolate: bool,
    /// Feed as many guesses as recent acceptance and measured times make worthwhile; false = all.
    pub adaptive: bool,
    /// Outputs are read from this file before and written to it after.
    pub trie_file: Option<PathBuf>,
    /// Behave as the published code does where it errs; tests compare with its traces.
    pub compat: bool,
}

impl Default for LookaheadConfig {
    fn default() -> LookaheadConfig {
        LookaheadConfig {
            decoding_length: 64,
            branch_length: 12,
            max_query_length: 2,
            layout: Layout::Hier,
            mode: Source::Mix,
            min_input_size: 0,
            min_output_size: None,
            max_node: 65_536,
            max_output_node: 512,
            stop_words: Vec::new(),
            isolate: true,
            adaptive: true,
            trie_file: None,
            compat: false,
        }
    }
}

impl LookaheadConfig {
    /// What is wrong with the options, if anything.
    pub fn check(&self) -> std::result::Result<(), String> {
        let range = |name: &str, found: usize, most: usize| {
            if (1..=most).contains(&found) {
                return Ok(());
            }
            Err(format!("{name} is {found}, expected 1 to {most}"))
        };
        range("decoding_length", self.decoding_length, 1024)?;
        range("branch_length", self.branch_length, 256)?;
        range("max_query_length", self.max_query_length, 16)?;
        range("max_node", self.max_node, usize::MAX)?;
        range("max_output_node", self.max_output_node, usize::MAX)
    }

    fn trie(&self, eos: &[u32]) -> TrieConfig {
        TrieConfig {
            max_node: self.max_node,
            max_output_node: self.max_output_node,
            stop_words: self.stop_words.clone(),
            eos: eos.to_vec(),
            compat: self.compat,
        }
    }
}

/// A store that several requests of one model share.
pub type SharedTrie = Arc<Mutex<TrieStore>>;

/// A draft that is compared with what is emitted, whether it was fed to the model or not.
struct Shadow {
    tree: DraftTree,
    cursors: Vec<u32>,
    accepted: Vec<u32>,
    class: usize,
}

/// How many tokens a pass may have so that it pays: recent acceptance beside measured time.
/// Index `i` stands for passes of at most `2^i` tokens.
#[derive(Clone, Debug)]
struct Budget {
    /// Seconds of a pass, smoothed; None = not measured.
    seconds: [Option<f64>; 11],
    /// Per class of drafts: accepted guesses within the budget, smoothed.
    accepted: Vec<[f64; 11]>,
    /// Time that may be lost on guesses, in passes of one token: what earlier ones won and a little more.
    credit: f64,
}

/// Weight of the newest observation.
const SMOOTHING: f64 = 0.15;

/// What part of the guesses holds before anything is known, by how many of the last tokens had been guessed in a
/// row: whoever copies goes on copying. None, 1, 2 or 3, 4 to 7, 8 and more.
const GUESSED: [f64; 5] = [0.35, 0.6, 0.75, 0.85, 0.95];

/// Cost of one more token in a pass, in passes of one token, before it is measured.
const MORE: f64 = 0.1;

/// Credit of an answer before its first token. With [`INCOME`] it bounds what failing guesses are expected to cost:
/// half a pass and 2 % of the answer.
const CREDIT: f64 = 0.5;

/// Credit that each token brings.
const INCOME: f64 = 0.02;

impl Budget {
    /// For queries of at most `most_matched` tokens.
    fn new(most_matched: usize) -> Budget {
        let prior = |&p: &f64| -> [f64; 11] {
            // A chain of 2^size - 1 guesses each of which holds with probability p.
            std::array::from_fn(|size| p * (1.0 - p.powi((1 << size) - 1)) / (1.0 - p))
        };
        Budget {
            seconds: [None; 11],
            accepted: GUESSED
                .iter()
                .map(prior)
                .cycle()
                .take((most_matched + 1) * GUESSED.len())
                .collect(),
            credit: CREDIT,
        }
    }

    /// The class of a draft: query tokens `matched`, and the tokens that were guessed in a `row` before it.
    fn class(matched: usize, row: usize) -> usize {
        let row = (usize::BITS - row.leading_zeros()) as usize;
        matched * GUESSED.len() + row.min(GUESSED.len() - 1)
    }

    fn size_class(tokens: usize) -> usize {
        (tokens.next_power_of_two().trailing_zeros() as usize).min(10)
    }

    fn time(&mut self, tokens: usize, seconds: f64) {
        let old = &mut self.seconds[Self::size_class(tokens)];
        *old = Some(match *old {
            // One slow pass (another process, a page fault) says little.
            Some(old) => old + SMOOTHING * (seconds.min(3.0 * old) - old),
            None => seconds,
        });
    }

    fn learn(&mut self, class: usize, accepted: &[u32]) {
        for (size, mean) in self.accepted[class].iter_mut().enumerate() {
            let inside = accepted.iter().filter(|&&node| node < 1 << size).count();
            *mean += SMOOTHING * (inside as f64 - *mean);
        }
    }

    /// Passes of one token that a pass of each size costs: measured, and before that a prior; never less than a smaller one's.
    fn costs(&self, plain: f64) -> [f64; 11] {
        let mut known = 1.0f64;
        std::array::from_fn(|size| {
            let guess = 1.0 + MORE * ((1 << size) - 1) as f64;
            known = known.max(self.seconds[size].map_or(guess, |seconds| seconds / plain));
            known
        })
    }

    /// Books a pass of `fed` tokens that brought `emitted`.
    fn settle(&mut self, fed: usize, emitted: usize) {
        let cost = match self.seconds[0] {
            Some(plain) => self.costs(plain)[Self::size_class(fed)],
            None => 1.0,
        };
        self.credit += emitted as f64 * (1.0 + INCOME) - cost;
    }

    /// The number of nodes worth feeding, of a draft of `nodes`: what brings most tokens a second, as far as the credit
    /// bears what is lost, on average, when none of them holds. Without a measured pass of one token, that one is made first.
    fn choose(&self, class: usize, nodes: usize) -> usize {
        let Some(plain) = self.seconds[0] else {
            return 1;
        };
        let costs = self.costs(plain);
        let fails = 1.0 - self.accepted[class][1].min(1.0);
        let mut best = (1.0, 1);
        for size in 1..=Self::size_class(nodes) {
            if fails * (costs[size] - 1.0) > self.credit {
                break;
            }
            let gain = (1.0 + self.accepted[class][size]) / costs[size];
            // A gain within the noise is not worth a larger pass.
            if gain > best.0 * 1.02 {
                best = (gain, nodes.min(1 << size));
            }
        }
        best.1
    }
}

/// See the module's text.
pub struct Lookahead {
    config: LookaheadConfig,
    sampler: Box<dyn Sampler>,
    store: Option<SharedTrie>,
    loaded: bool,
    budget: Budget,
    writer: Writer,
    idx: Option<i32>,
    /// Of a tree that the session reads as it would token by token.
    most_nodes: usize,
    /// The tree whose logits come next; None = plain logits.
    fed: Option<DraftTree>,
    /// Drafts whose end is not reached, the oldest first.
    shadows: Vec<Shadow>,
    /// Last tokens that had been guessed, in a row.
    guessed: usize,
    asked_at: Option<(Instant, usize)>,
}

impl Lookahead {
    /// Emits what `sampler` picks. Errors name the option at fault.
    pub fn new(config: LookaheadConfig, sampler: Box<dyn Sampler>) -> Result<Lookahead> {
        if let Err(reason) = config.check() {
            return Err(DecodeError::Option {
                text: "lookahead".into(),
                reason,
            });
        }
        Ok(Lookahead {
            budget: Budget::new(config.max_query_length),
            config,
            sampler,
            store: None,
            loaded: false,
            writer: Writer::default(),
            idx: None,
            most_nodes: usize::MAX,
            fed: None,
            shadows: Vec::new(),
            guessed: 0,
            asked_at: None,
        })
    }

    /// Takes drafts from a store that others use too, instead of one of its own.
    pub fn with_store(mut self, store: SharedTrie) -> Lookahead {
        self.store = Some(store);
        self
    }

    /// The store, once there is one.
    pub fn store(&self) -> Option<&SharedTrie> {
        self.store.as_ref()
    }

    /// Stores finished outputs beforehand: [texts][tokens].
    pub fn warm(&mut self, eos: &[u32], outputs: &[Vec<u32>]) {
        let length = self.branch();
        let mut store = self.locked(eos);
        for tokens in outputs {
            store.put(tokens, length, Source::Output, 0, false);
        }
    }

    /// Tokens of a stored branch.
    fn branch(&self) -> usize {
        self.config.branch_length + 1
    }

    fn locked(&mut self, eos: &[u32]) -> MutexGuard<'_, TrieStore> {
        let config = &self.config;
        let store = self
            .store
            .get_or_insert_with(|| Arc::new(Mutex::new(TrieStore::new(config.trie(eos)))));
        // A panic elsewhere cannot leave a store that drafts would be wrong from: drafts are verified.
        store
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn load(&mut self, eos: &[u32]) -> Result<()> {
        let Some(path) = self.config.trie_file.clone().filter(|_| !self.loaded) else {
            return Ok(());
        };
        self.loaded = true;
        let file = match File::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            file => file,
        };
        let mut store = self.locked(eos);
        file.and_then(|file| store.load(&mut BufReader::new(file)))
            .map_err(|source| file_error(&path, source))
    }

    /// Written beside and renamed: a crash leaves the old file.
    fn save(&mut self) -> Result<()> {
        let Some(path) = self.config.trie_file.clone() else {
            return Ok(());
        };
        let mut beside = path.clone().into_os_string();
        beside.push(".new");
        let mut write = || -> std::io::Result<()> {
            let mut out = BufWriter::new(File::create(&beside)?);
            self.locked(&[]).save(&mut out)?;
            out.flush()?;
            std::fs::rename(&beside, &path)
        };
        write().map_err(|source| file_error(&path, source))
    }

    /// Compares an emitted token with the drafts kept for that.
    fn follow(&mut self, token: u32) {
        // Of the newest draft that has guesses left; older ones mostly say the same.
        let mut guessed = self.shadows.is_empty().then_some(false);
        let budget = &mut self.budget;
        self.shadows.retain_mut(|shadow| {
            let (tree, cursors) = (&shadow.tree, &shadow.cursors);
            let next: Vec<u32> = cursors
                .iter()
                .flat_map(|&cursor| tree.children_with(cursor, token))
                .collect();
            if cursors
                .iter()
                .any(|&cursor| tree.parents().contains(&cursor))
            {
                guessed = Some(!next.is_empty());
            }
            match next.first() {
                Some(&first) => {
                    shadow.accepted.push(first);
                    shadow.cursors = next;
                    true
                }
                None => {
                    budget.learn(shadow.class, &shadow.accepted);
                    false
                }
            }
        });
        match guessed {
            Some(true) => self.guessed += 1,
            Some(false) => self.guessed = 0,
            // The draft was right to its end: nothing more is known.
            None => {}
        }
    }

    /// What to read next after the newest token.
    fn plan(&mut self) -> Action {
        let history = &self.writer.history;
        let last = history[history.len() - 1];
        let (seq, eos) = (self.writer.request.seq, self.writer.request.eos.clone());
        let config = self.config.clone();
        let from = history.len() - config.max_query_length.min(history.len());
        let query = history[from..].to_vec();
        // A draft that reaches past the limit of tokens is of no use.
        let left = self.writer.request.max_tokens - self.writer.written();
        let ask = DraftQuery {
            query: &query,
            mode: config.mode,
            idx: self.idx.unwrap_or(0),
            decoding_length: config.decoding_length,
            branch_length: config.branch_length.min(left - 1),
            min_input_size: config.min_input_size,
            min_output_size: config
                .min_output_size
                .unwrap_or((config.decoding_length / 2).max(1)),
            isolate: config.isolate && !config.compat,
        };
        let draft = self.locked(&eos).draft(config.layout, &ask);
        let mut nodes = draft.tree.len().min(self.most_nodes);
        let class = Budget::class(draft.matched, self.guessed);
        if config.adaptive && nodes > 1 {
            nodes = self.budget.choose(class, nodes);
        }
        let tree = (nodes > 1).then(|| first_nodes(&draft.tree, nodes));
        if draft.tree.len() > 1 {
            self.shadows.push(Shadow {
                tree: draft.tree,
                cursors: vec![0],
                accepted: Vec::new(),
                class,
            });
        }
        self.asked_at = Some((Instant::now(), nodes));
        match tree {
            Some(tree) => {
                self.fed = Some(tree.clone());
                Action::Tree(seq, tree)
            }
            None => Action::Step(vec![(seq, last)]),
        }
    }
}

fn file_error(path: &std::path::Path, source: std::io::Error) -> DecodeError {
    DecodeError::File {
        path: path.display().to_string(),
        source,
    }
}

/// The first `nodes` nodes of a tree: parents stand before children, the most frequent branch first.
fn first_nodes(tree: &DraftTree, nodes: usize) -> DraftTree {
    let mut first = DraftTree::new(tree.tokens()[0]);
    for node in 1..nodes.min(tree.len()) {
        first.push(tree.parents()[node], tree.tokens()[node]);
    }
    first
}

impl Strategy for Lookahead {
    fn streams(&self) -> bool {
        true
    }

    fn begin(&mut self, session: &mut dyn DecodeSession, request: &Request) -> Result<()> {
        let limits = session.limits();
        if !limits.one_pass_tree {
            return Err(DecodeError::Refused(
                "--decode lookahead verifies guesses in one pass, which needs --context full on the CPU and a model without sliding or length-dependent layers; take greedy or sample instead".into(),
            ));
        }
        self.load(&request.eos)?;
        self.most_nodes = limits.most_tree_nodes;
        self.writer = Writer::new(session, request);
        self.sampler.begin(self.writer.history.len());
        (self.fed, self.asked_at) = (None, None);
        self.shadows.clear();
        self.guessed = 0;
        self.budget.credit = CREDIT;
        let length = self.branch();
        let prompt = self.writer.history.clone();
        let mut store = self.locked(&request.eos);
        let idx = store.open();
        if let Some((_, rest)) = prompt.split_first() {
            store.put(rest, length, Source::Input, idx, false);
        }
        drop(store);
        self.idx = Some(idx);
        Ok(())
    }

    fn next(
        &mut self,
        session: &mut dyn DecodeSession,
        logits: &[f32],
        emit: &mut Emit<'_>,
    ) -> Result<Action> {
        let asked = self.asked_at.take();
        if let Some((at, tokens)) = asked {
            self.budget.time(tokens, at.elapsed().as_secs_f64());
        }
        let vocab = session.vocab_size();
        let before = self.writer.history.len();
        let fed = self.fed.take();
        // Nodes whose path agrees with all that was emitted; several only if branches lie side by side.
        let mut here: Vec<u32> = vec![0];
        let goes_on = loop {
            let node = here[0] as usize;
            let row = &logits[node * vocab..(node + 1) * vocab];
            let Some(token) = self.writer.write(&mut *self.sampler, row, emit) else {
                break false;
            };
            let Some(tree) = &fed else { break true };
            let next: Vec<u32> = here
                .iter()
                .flat_map(|&node| tree.children_with(node, token))
                .collect();
            if next.is_empty() {
                break true;
            }
            here = next;
        };
        if let Some(tree) = &fed {
            session.commit_path(self.writer.request.seq, &tree.path(here[0]))?;
        }
        let emitted = self.writer.history[before..].to_vec();
        if let Some((_, tokens)) = asked {
            self.budget.settle(tokens, emitted.len());
        }
        emitted.iter().for_each(|&token| self.follow(token));
        let (length, eos) = (self.branch(), self.writer.request.eos.clone());
        if let Some(idx) = self.idx {
            self.locked(&eos).stream_put(&emitted, length, idx, false);
        }
        Ok(if goes_on { self.plan() } else { Action::Done })
    }

    fn finish(&mut self, _session: &mut dyn DecodeSession) -> Result<Outcome> {
        let length = self.branch();
        if let Some(idx) = self.idx.take() {
            self.locked(&[]).close(length, idx);
            self.save()?;
        }
        Ok(self.writer.outcome())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_follows_acceptance_and_time() {
        let mut budget = Budget::new(2);
        assert_eq!(
            budget.choose(1, 40),
            1,
            "nothing is known: the first pass measures"
        );
        for (tokens, seconds) in [
            (1, 1.0),
            (2, 1.05),
            (4, 1.1),
            (8, 1.2),
            (16, 2.0),
            (64, 8.0),
        ] {
            budget.time(tokens, seconds);
        }
        for _ in 0..60 {
            budget.learn(1, &[]);
            budget.learn(2, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        }
        budget.credit = 10.0;
        assert_eq!(budget.choose(1, 40), 1, "drafts that fail are not fed");
        assert_eq!(budget.choose(2, 40), 8, "nor is more than pays");
        assert_eq!(budget.choose(2, 5), 5);
    }

    #[test]
    fn drafts_are_longer_while_guesses_hold() {
        let mut budget = Budget::new(2);
        budget.time(1, 1.0);
        budget.credit = 10.0;
        let sizes: Vec<usize> = [0, 1, 3, 7, 20]
            .map(|row| budget.choose(Budget::class(2, row), 40))
            .to_vec();
        assert!(sizes.is_sorted() && sizes[0] < sizes[4], "{sizes:?}");
        // Each class learns for itself.
        for _ in 0..60 {
            budget.learn(Budget::class(2, 20), &[]);
        }
        assert_eq!(budget.choose(Budget::class(2, 20), 40), 1);
        assert_eq!(budget.choose(Budget::class(2, 3), 40), sizes[2]);
    }

    #[test]
    fn failing_guesses_cost_no_more_than_the_credit() {
        let mut budget = Budget::new(2);
        let (mut spent, class) = (0.0, Budget::class(2, 0));
        let pass = |budget: &mut Budget, holds: bool| {
            let fed = budget.choose(class, 40);
            let seconds = 1.0 + 0.12 * (fed - 1) as f64;
            budget.time(fed, seconds);
            budget.settle(fed, if holds { fed } else { 1 });
            (fed, seconds)
        };
        // Acceptance is never learned: the worst case. One bet may overdraw the credit, none follows until it is back.
        for tokens in 1..=200 {
            spent += pass(&mut budget, false).1;
            let lost = spent - f64::from(tokens);
            let most = CREDIT + INCOME * f64::from(tokens) + 1.0;
            assert!(lost <= most, "{tokens}: {lost}");
        }
        // Guesses that hold pay for larger ones.
        let fed: Vec<usize> = (0..20).map(|_| pass(&mut budget, true).0).collect();
        assert!(fed[19] > 1 && fed[19] >= fed[0], "{fed:?}");
    }

    #[test]
    fn impossible_options_are_named() {
        let config = LookaheadConfig {
            branch_length: 0,
            ..LookaheadConfig::default()
        };
        assert!(config.check().unwrap_err().contains("branch_length is 0"));
    }
}
