//! What comes next: a [`Strategy`] is a state machine that gets logits and says which tokens to read next.
//!
//! It never runs the model itself, so a server can read the tokens of many requests in one pass; [`run`]
//! is the loop for one request. Every way of decoding goes through here, plain sampling included.

use super::sample::Choice;
use super::session::{DecodeSession, DraftTree, Result, SeqId};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// What is asked of a strategy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The sequence that holds the prompt.
    pub seq: SeqId,
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
    /// Most tokens of an answer, the end included.
    pub max_tokens: usize,
}

/// What a strategy wants read next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// One token into each of several sequences; the logits come back as [rows, vocab].
    Step(Vec<(SeqId, u32)>),
    /// A tree of guesses after a sequence; the logits come back as [nodes, vocab].
    Tree(SeqId, DraftTree),
    /// Nothing: the answer is complete.
    Done,
}

/// What a strategy, or the loop around it, tells the caller.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A token of the answer, certain.
    Token(Choice),
    /// Work goes on.
    Working,
}

/// Where events go. [`ControlFlow::Break`] ends the answer.
pub type Emit<'a> = dyn FnMut(Event) -> ControlFlow<()> + 'a;

/// Why an answer ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum End {
    /// The model ended it.
    Eos,
    /// The limit of tokens.
    #[default]
    Length,
    /// The caller.
    Cancelled,
}

/// A finished answer of a strategy that weighs several.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Its tokens without the one that ended it.
    pub choices: Vec<Choice>,
    /// What the strategy ranks by.
    pub score: f64,
    /// Sum of the log probabilities of its tokens, the ending one included.
    pub logprob: f64,
    /// Why it ended.
    pub end: End,
}

/// A better and a worse answer to the same prompt, for preference training.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// The better one.
    pub chosen: Answer,
    /// The worse one.
    pub rejected: Answer,
}

/// What the work took.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct DecodeStats {
    /// Passes over the model.
    pub forwards: usize,
    /// Tokens read in them.
    pub tokens: usize,
    /// Tokens emitted.
    pub emitted: usize,
    /// Wall time.
    #[serde(serialize_with = "seconds")]
    pub elapsed: Duration,
}

fn seconds<S: serde::Serializer>(
    time: &Duration,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_secs_f64())
}

/// What a run gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Why the emitted answer ended.
    pub end: End,
    /// All answers of a strategy that weighs several, best first; the first was emitted.
    pub answers: Vec<Answer>,
    /// For preference training, from strategies that search.
    pub pair: Option<Pair>,
    /// What it took.
    pub stats: DecodeStats,
}

/// See the module's text. One value serves one request after another.
pub trait Strategy: Send {
    /// True if tokens are emitted while the answer grows.
    fn streams(&self) -> bool;

    /// Starts an answer. Errors if the session cannot serve the strategy.
    fn begin(&mut self, session: &mut dyn DecodeSession, request: &Request) -> Result<()>;

    /// Takes the logits of the last action, at first those of the prompt's last token [1, vocab].
    /// Strategies that stream leave the sequence holding what was emitted but its last token; those
    /// that search leave it as it was.
    fn next(
        &mut self,
        session: &mut dyn DecodeSession,
        logits: &[f32],
        emit: &mut Emit<'_>,
    ) -> Result<Action>;

    /// Ends the answer, complete or not, and frees all sequences but the request's.
    fn finish(&mut self, session: &mut dyn DecodeSession) -> Result<Outcome>;
}

/// Runs a strategy to its end after `logits` [vocab] of the sequence's last token.
pub fn run(
    session: &mut dyn DecodeSession,
    strategy: &mut dyn Strategy,
    request: &Request,
    logits: Vec<f32>,
    emit: &mut Emit<'_>,
) -> Result<Outcome> {
    let start = Instant::now();
    strategy.begin(session, request)?;
    let mut stats = DecodeStats::default();
    let mut count = |event: Event| {
        stats.emitted += usize::from(matches!(event, Event::Token(_)));
        emit(event)
    };
    let worked = drive(session, strategy, logits, &mut count);
    let (forwards, tokens, cancelled) = match worked {
        Ok(found) => found,
        Err(error) => {
            // What the strategy holds is freed; the first error is the one to tell.
            let _ = strategy.finish(session);
            return Err(error);
        }
    };
    let mut outcome = strategy.finish(session)?;
    if cancelled {
        outcome.end = End::Cancelled;
    }
    if !strategy.streams()
        && let Some(best) = outcome.answers.first()
    {
        for choice in &best.choices {
            if count(Event::Token(choice.clone())).is_break() {
                outcome.end = End::Cancelled;
                break;
            }
        }
    }
    stats.forwards = forwards;
    stats.tokens = tokens;
    stats.elapsed = start.elapsed();
    outcome.stats = stats;
    Ok(outcome)
}

/// Forwards, tokens read, and whether the caller stopped it.
fn drive(
    session: &mut dyn DecodeSession,
    strategy: &mut dyn Strategy,
    mut logits: Vec<f32>,
    emit: &mut Emit<'_>,
) -> Result<(usize, usize, bool)> {
    let (mut forwards, mut tokens) = (0, 0);
    loop {
        match strategy.next(session, &logits, emit)? {
            Action::Done => return Ok((forwards, tokens, false)),
            Action::Step(rows) => {
                logits = session.step(&rows)?;
                tokens += rows.len();
            }
            Action::Tree(seq, tree) => {
                logits = session.step_tree(seq, &tree)?;
                tokens += tree.len();
            }
        }
        forwards += 1;
        if !strategy.streams() && emit(Event::Working).is_break() {
            return Ok((forwards, tokens, true));
        }
    }
}

/// Log probabilities [vocab] of one row of logits.
pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total = f64::from(super::logits::log_sum_exp(logits, max));
    logits.iter().map(|&l| f64::from(l) - total).collect()
}
