//! Beam search and Diverse Beam Search (paper 36, arXiv 1610.02424): groups of beams advance in turn, each
//! penalised for likeness with what earlier groups hold at the same step. For whoever wants several answers
//! that differ. With the Hamming term it agrees with transformers' group beam search.

use super::diversity::{Diversity, DiversityTerm, Earlier, EmbeddingTable, GroupView};
use super::sample::Choice;
use super::session::{DecodeError, DecodeSession, Result, SeqId};
use super::strategy::{Action, Answer, Emit, End, Outcome, Request, Strategy, log_softmax};
use serde::{Deserialize, Serialize};

/// When a group stops looking for better answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EarlyStopping {
    /// When no live beam would beat its worst answer if it ended now.
    #[default]
    False,
    /// As soon as it has as many answers as beams.
    True,
    /// When no live beam could ever beat its worst answer.
    Never,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum BoolOrWord {
    Bool(bool),
    Word(String),
}

impl Serialize for EarlyStopping {
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            EarlyStopping::False => s.serialize_bool(false),
            EarlyStopping::True => s.serialize_bool(true),
            EarlyStopping::Never => s.serialize_str("never"),
        }
    }
}

impl<'de> Deserialize<'de> for EarlyStopping {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        match BoolOrWord::deserialize(d)? {
            BoolOrWord::Bool(false) => Ok(EarlyStopping::False),
            BoolOrWord::Bool(true) => Ok(EarlyStopping::True),
            BoolOrWord::Word(word) if word == "never" => Ok(EarlyStopping::Never),
            BoolOrWord::Word(word) => Err(serde::de::Error::custom(format!(
                "early_stopping is {word:?}, expected true, false or never"
            ))),
        }
    }
}

/// `beam:beams=4`, `dbs:beams=6,groups=3,lambda=0.5,term=hamming`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BeamConfig {
    /// Beams in all (B); default the number of groups, or 4.
    pub beams: Option<usize>,
    /// Groups (G), a divisor of B; default B for `dbs`, 1 for `beam`.
    pub groups: Option<usize>,
    /// Factor of the penalties.
    pub lambda: f64,
    /// What counts as likeness.
    pub term: Diversity,
    /// Count only positive cosines in the embedding terms.
    pub clamp_negative: bool,
    /// Li and Jurafsky's penalty: this much times k off the k-th best child of a beam.
    pub sibling_penalty: f64,
    /// Sums are divided by the answer's length to this power.
    pub length_penalty: f64,
    /// true, false or never.
    pub early_stopping: EarlyStopping,
    /// Answers returned, at most B.
    pub n: usize,
}

impl Default for BeamConfig {
    fn default() -> BeamConfig {
        BeamConfig {
            beams: None,
            groups: None,
            lambda: 0.5,
            term: Diversity::default(),
            clamp_negative: false,
            sibling_penalty: 0.0,
            length_penalty: 1.0,
            early_stopping: EarlyStopping::False,
            n: 1,
        }
    }
}

impl BeamConfig {
    /// (beams, groups) with defaults filled in.
    pub fn sizes(&self) -> (usize, usize) {
        match (self.beams, self.groups) {
            (Some(beams), Some(groups)) => (beams, groups),
            (Some(size), None) | (None, Some(size)) => (size, size),
            (None, None) => (4, 4),
        }
    }

    /// What is wrong with the options, if anything.
    pub fn check(&self) -> std::result::Result<(), String> {
        let (beams, groups) = self.sizes();
        if !(1..=1024).contains(&beams) {
            return Err(format!("beams is {beams}, expected 1 to 1024"));
        }
        if groups == 0 || !beams.is_multiple_of(groups) {
            return Err(format!(
                "groups is {groups}, expected a divisor of beams = {beams}"
            ));
        }
        if !(1..=beams).contains(&self.n) {
            return Err(format!("n is {}, expected 1 to beams = {beams}", self.n));
        }
        for (name, value) in [
            ("lambda", self.lambda),
            ("sibling_penalty", self.sibling_penalty),
        ] {
            if !(0.0..f64::INFINITY).contains(&value) {
                return Err(format!(
                    "{name} is {value}, expected a number of at least 0"
                ));
            }
        }
        if !self.length_penalty.is_finite() {
            return Err(format!(
                "length_penalty is {}, expected a finite number",
                self.length_penalty
            ));
        }
        Ok(())
    }
}

/// A live beam.
#[derive(Clone, Debug, Default)]
pub struct Beam {
    /// Tokens written.
    pub tokens: Vec<u32>,
    /// Log probability of each.
    pub logprobs: Vec<f64>,
    /// Running sum with penalties: what beams are ranked by.
    pub score: f64,
    /// Running sum without.
    pub logprob: f64,
    /// Its row in the next logits.
    row: usize,
}

/// A finished answer.
#[derive(Clone, Debug)]
pub struct Hypothesis {
    /// Tokens without the one that ended it.
    pub tokens: Vec<u32>,
    /// Log probability of each.
    pub logprobs: Vec<f64>,
    /// Sum with penalties over length to the `length_penalty`.
    pub score: f64,
    /// Sum of log probabilities, the ending token included.
    pub logprob: f64,
    /// The model ended it.
    pub ended: bool,
}

#[derive(Debug)]
struct Group {
    beams: Vec<Beam>,
    /// In order of insertion.
    pool: Vec<Hypothesis>,
    done: bool,
}

/// The search itself: takes log probabilities, says which beams to extend by which tokens.
pub struct BeamSearch {
    config: BeamConfig,
    eos: Vec<u32>,
    max_tokens: usize,
    per_group: usize,
    /// What finished groups go on to write, in the eyes of later groups: transformers counts it.
    pad: Option<u32>,
    embedding: Option<EmbeddingTable>,
    groups: Vec<Group>,
    step: usize,
}

impl BeamSearch {
    /// Errors name the option at fault. `pad` as in transformers, None to leave finished groups out.
    pub fn new(
        config: BeamConfig,
        eos: &[u32],
        max_tokens: usize,
        pad: Option<u32>,
        embedding: Option<EmbeddingTable>,
    ) -> std::result::Result<BeamSearch, String> {
        config.check()?;
        if config.term.needs_embedding() && embedding.is_none() {
            return Err(format!(
                "term {} needs the model's input embedding, which this session does not give",
                config.term
            ));
        }
        let (beams, groups) = config.sizes();
        let per_group = beams / groups;
        // One beam of each group is alive; the others would be copies of it.
        let start = |index: usize| Beam {
            score: if index == 0 { 0.0 } else { -1e9 },
            ..Beam::default()
        };
        let group = || Group {
            beams: (0..per_group).map(start).collect(),
            pool: Vec::new(),
            done: false,
        };
        Ok(BeamSearch {
            groups: (0..groups).map(|_| group()).collect(),
            config,
            eos: eos.to_vec(),
            max_tokens,
            per_group,
            pad,
            embedding,
            step: 0,
        })
    }

    /// Beams of a group, in rank order.
    pub fn group(&self, index: usize) -> &[Beam] {
        &self.groups[index].beams
    }

    /// One step. `logprobs(row)` [vocab] of the rows that the last call returned; row 0 is the prompt
    /// at first. Returns for each row of the next step (row it extends, token); none = finished.
    pub fn advance(&mut self, logprobs: &dyn Fn(usize) -> Vec<f64>) -> Vec<(usize, u32)> {
        if self.step >= self.max_tokens {
            return Vec::new();
        }
        self.step += 1;
        // The groups' beams may share rows (all do at first): each row is made once.
        let mut cache: Vec<Option<Vec<f64>>> = Vec::new();
        let mut next = Vec::new();
        for index in 0..self.groups.len() {
            if self.groups[index].done {
                if let Some(pad) = self.pad {
                    let beams = &mut self.groups[index].beams;
                    beams.iter_mut().for_each(|beam| beam.tokens.push(pad));
                }
                continue;
            }
            let rows = self.groups[index].beams.iter().map(|beam| beam.row).max();
            let rows = rows.map_or(0, |row| row + 1);
            cache.resize(cache.len().max(rows), None);
            for beam in &self.groups[index].beams {
                cache[beam.row].get_or_insert_with(|| logprobs(beam.row));
            }
            let candidates = self.candidates(index, &cache);
            self.take(index, &candidates, &cache);
            if self.step < self.max_tokens {
                let group = &mut self.groups[index];
                for beam in group.beams.iter_mut().filter(|_| !group.done) {
                    let token = beam.tokens[beam.tokens.len() - 1];
                    next.push((beam.row, token));
                    beam.row = next.len() - 1;
                }
            }
        }
        next
    }

    /// The best candidates of a group as (score, beam, token), best first; of equals the lower place in
    /// the flattened [beams, vocab].
    fn candidates(&self, index: usize, cache: &[Option<Vec<f64>>]) -> Vec<(f64, usize, u32)> {
        let group = &self.groups[index];
        let keep = (1 + self.eos.len()).max(2) * self.per_group;
        let earlier: Vec<Earlier<'_>> = self.groups[..index]
            .iter()
            .flat_map(|group| {
                let steps = !group.done || self.pad.is_some();
                group.beams.iter().map(move |beam| (beam, steps))
            })
            .map(|(beam, steps)| Earlier {
                tokens: &beam.tokens,
                // A group that was done before this step has not grown with it.
                steps: steps || beam.tokens.len() == self.step,
            })
            .collect();
        let mut all: Vec<(f64, usize, u32)> = Vec::new();
        let mut penalties = Vec::new();
        for (number, beam) in group.beams.iter().enumerate() {
            let row = cache[beam.row].as_ref().expect("the row was just made");
            penalties.clear();
            if !earlier.is_empty() && self.config.lambda > 0.0 {
                penalties.resize(row.len(), 0.0);
                let view = GroupView {
                    own: &beam.tokens,
                    earlier: &earlier,
                    embedding: self.embedding.as_ref(),
                    clamp_negative: self.config.clamp_negative,
                };
                for (weight, term) in &self.config.term.0 {
                    term.penalise(*weight, &view, &mut penalties);
                }
            }
            let mut best = if penalties.is_empty() {
                best_of(row.iter().map(|lp| beam.score + lp), keep)
            } else {
                let lambda = self.config.lambda;
                let scores = row.iter().zip(&penalties);
                best_of(
                    scores.map(|(lp, pen)| beam.score + (lp - lambda * pen)),
                    keep,
                )
            };
            for (rank, (score, _)) in best.iter_mut().enumerate() {
                *score -= self.config.sibling_penalty * (rank + 1) as f64;
            }
            all.extend(
                best.into_iter()
                    .map(|(score, token)| (score, number, token)),
            );
        }
        // Stable: beams in order, tokens of equal score in order of their ids.
        all.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        all.truncate(keep);
        all
    }

    /// Walks the candidates in rank order: ends go to the pool, others become the live beams.
    fn take(&mut self, index: usize, candidates: &[(f64, usize, u32)], cache: &[Option<Vec<f64>>]) {
        let (per_group, length) = (self.per_group, self.step);
        let group = &mut self.groups[index];
        let mut live: Vec<Beam> = Vec::with_capacity(per_group);
        let power = (length as f64).powf(self.config.length_penalty);
        for (rank, &(score, number, token)) in candidates.iter().enumerate() {
            let beam = &group.beams[number];
            let row = cache[beam.row].as_ref().expect("the row was just made");
            let logprob = row[token as usize];
            if self.eos.contains(&token) {
                if rank < per_group {
                    let found = Hypothesis {
                        tokens: beam.tokens.clone(),
                        logprobs: beam.logprobs.clone(),
                        score: score / power,
                        logprob: beam.logprob + logprob,
                        ended: true,
                    };
                    add(&mut group.pool, found, per_group);
                }
                continue;
            }
            let mut beam = beam.clone();
            beam.tokens.push(token);
            beam.logprobs.push(logprob);
            beam.logprob += logprob;
            beam.score = score;
            live.push(beam);
            if live.len() == per_group {
                break;
            }
        }
        group.beams = live;
        let best = candidates.first().map_or(f64::NEG_INFINITY, |c| c.0);
        let worst = group
            .pool
            .iter()
            .map(|h| h.score)
            .fold(f64::INFINITY, f64::min);
        group.done = group.beams.is_empty()
            || group.pool.len() >= per_group
                && match self.config.early_stopping {
                    EarlyStopping::True => true,
                    EarlyStopping::False => worst >= best / power,
                    EarlyStopping::Never => {
                        let longest = if self.config.length_penalty > 0.0 {
                            self.max_tokens
                        } else {
                            length
                        };
                        worst >= best / (longest as f64).powf(self.config.length_penalty)
                    }
                };
    }

    /// The answers, best first.
    pub fn finish(mut self) -> Vec<Hypothesis> {
        for group in &mut self.groups {
            if group.done {
                continue;
            }
            for beam in std::mem::take(&mut group.beams) {
                let length = beam.tokens.len() as f64;
                let found = Hypothesis {
                    score: beam.score / length.max(1.0).powf(self.config.length_penalty),
                    logprob: beam.logprob,
                    tokens: beam.tokens,
                    logprobs: beam.logprobs,
                    ended: false,
                };
                add(&mut group.pool, found, self.per_group);
            }
        }
        let mut all: Vec<Hypothesis> = self.groups.into_iter().flat_map(|g| g.pool).collect();
        // Ascending and stable, then from the end: of equals the later inserted comes first.
        all.sort_by(|a, b| a.score.total_cmp(&b.score));
        all.reverse();
        all.truncate(self.config.n);
        all
    }
}

/// Adds a hypothesis to a pool of limited size; the lowest leaves, the earliest inserted of equals.
fn add(pool: &mut Vec<Hypothesis>, found: Hypothesis, capacity: usize) {
    let worst = |pool: &[Hypothesis]| {
        let mut worst = 0;
        for (index, hypothesis) in pool.iter().enumerate() {
            if hypothesis.score < pool[worst].score {
                worst = index;
            }
        }
        worst
    };
    if pool.len() >= capacity && found.score <= pool[worst(pool)].score {
        return;
    }
    pool.push(found);
    if pool.len() > capacity {
        pool.remove(worst(pool));
    }
}

/// The `keep` largest values with their indices, largest first, lower index first of equals.
pub(crate) fn best_of(values: impl Iterator<Item = f64>, keep: usize) -> Vec<(f64, u32)> {
    let mut best: Vec<(f64, u32)> = Vec::with_capacity(keep + 1);
    for (value, index) in values.zip(0u32..) {
        if best.len() == keep && best.last().is_none_or(|&(worst, _)| value <= worst) {
            continue;
        }
        let place = best.partition_point(|&(other, _)| other >= value);
        best.insert(place, (value, index));
        best.truncate(keep);
    }
    best
}

/// [`BeamSearch`] over a session: one pass a step, whatever the number of groups.
pub struct BeamStrategy {
    config: BeamConfig,
    text: String,
    search: Option<BeamSearch>,
    root: SeqId,
    /// The sequence of each row.
    rows: Vec<SeqId>,
}

impl BeamStrategy {
    /// Errors name the option at fault.
    pub fn new(config: BeamConfig, text: &str) -> Result<BeamStrategy> {
        if let Err(reason) = config.check() {
            return Err(DecodeError::Option {
                text: text.into(),
                reason,
            });
        }
        Ok(BeamStrategy {
            config,
            text: text.into(),
            search: None,
            root: SeqId(0),
            rows: Vec::new(),
        })
    }
}

impl Strategy for BeamStrategy {
    fn streams(&self) -> bool {
        false
    }

    fn begin(&mut self, session: &mut dyn DecodeSession, request: &Request) -> Result<()> {
        let embedding = if self.config.term.needs_embedding() {
            session.embedding()?
        } else {
            None
        };
        let config = self.config.clone();
        let search = BeamSearch::new(config, &request.eos, request.max_tokens, None, embedding);
        self.search = Some(search.map_err(|reason| DecodeError::Option {
            text: self.text.clone(),
            reason,
        })?);
        self.root = request.seq;
        self.rows = vec![request.seq];
        Ok(())
    }

    fn next(
        &mut self,
        session: &mut dyn DecodeSession,
        logits: &[f32],
        _emit: &mut Emit<'_>,
    ) -> Result<Action> {
        let vocab = session.vocab_size();
        let Some(search) = &mut self.search else {
            return Ok(Action::Done);
        };
        let row = |row: usize| log_softmax(&logits[row * vocab..(row + 1) * vocab]);
        let next = search.advance(&row);
        // The last heir of a row takes its sequence over; the others get forks.
        let mut heirs = vec![0usize; self.rows.len()];
        next.iter().for_each(|&(row, _)| heirs[row] += 1);
        for (&seq, _) in self.rows.iter().zip(&heirs).filter(|&(_, &n)| n == 0) {
            if seq != self.root {
                session.release(seq);
            }
        }
        let mut rows = Vec::with_capacity(next.len());
        for (done, &(row, token)) in next.iter().enumerate() {
            heirs[row] -= 1;
            let old = self.rows[row];
            let forked = if heirs[row] == 0 && old != self.root {
                Ok(old)
            } else {
                session.fork(old)
            };
            match forked {
                Ok(seq) => rows.push((seq, token)),
                Err(error) => {
                    // What is left to free: forks made, and rows not yet taken over.
                    let kept = next[done..].iter().map(|&(row, _)| self.rows[row]);
                    self.rows = rows.iter().map(|&(seq, _)| seq).chain(kept).collect();
                    self.rows.sort();
                    self.rows.dedup();
                    return Err(error);
                }
            }
        }
        self.rows = rows.iter().map(|&(seq, _)| seq).collect();
        Ok(if rows.is_empty() {
            Action::Done
        } else {
            Action::Step(rows)
        })
    }

    fn finish(&mut self, session: &mut dyn DecodeSession) -> Result<Outcome> {
        for seq in std::mem::take(&mut self.rows) {
            if seq != self.root {
                session.release(seq);
            }
        }
        let found = self.search.take().map_or_else(Vec::new, BeamSearch::finish);
        let answers: Vec<Answer> = found.into_iter().map(answer).collect();
        Ok(Outcome {
            end: answers.first().map_or(End::Length, |answer| answer.end),
            answers,
            ..Outcome::default()
        })
    }
}

fn answer(found: Hypothesis) -> Answer {
    let choices = found.tokens.iter().zip(&found.logprobs);
    Answer {
        choices: choices
            .map(|(&token, &logprob)| Choice {
                token,
                logprob: logprob as f32,
                top: Vec::new(),
            })
            .collect(),
        score: found.score,
        logprob: found.logprob,
        end: if found.ended { End::Eos } else { End::Length },
    }
}
