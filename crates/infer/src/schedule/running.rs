//! A request that has begun: its prompt being read, then its answers being written.

use super::{Event, Goal, ScheduleError, Sink, Summary};
use crate::context::PolicySpec;
use crate::decode::strategy::DecodeStats;
use crate::decode::{Action, Choice, End, EngineSession, Event as Written, Request, Strategy};
use crate::engine::{Engine, Sequence};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// Result of a step of a request; the error ends it.
pub(super) type Result<T> = std::result::Result<T, ScheduleError>;

/// What a request is doing.
pub(super) enum State<'e> {
    /// The prompt is read into the sequence: `read` of the request's tokens are in it.
    Reading {
        sequence: Box<Sequence>,
        read: usize,
        watched: bool,
    },
    /// The answers are written.
    Writing(Vec<Answering<'e>>),
    /// All is said.
    Over,
}

/// An answer being written.
pub(super) struct Answering<'e> {
    pub(super) session: EngineSession<'e>,
    strategy: Box<dyn Strategy>,
    /// What it wants read next; None once it is complete.
    pub(super) action: Option<Action>,
    stats: DecodeStats,
    since: Instant,
    /// A row of the last pass could not be lent.
    pub(super) error: Option<ScheduleError>,
}

/// A request that has begun.
pub(super) struct Running<'e> {
    pub(super) number: u64,
    pub(super) client: u64,
    pub(super) lane: usize,
    pub(super) engine: &'e Engine,
    pub(super) prompt: Vec<u32>,
    pub(super) goal: Goal,
    pub(super) state: State<'e>,
    pub(super) sink: Sink,
    pub(super) dropped: Arc<AtomicBool>,
    pub(super) deadline: Option<Instant>,
    pub(super) reserved: u64,
    pub(super) summary: Summary,
    pub(super) since: Instant,
    /// The client is gone.
    pub(super) broken: bool,
}

/// Tokens of the next call that reads a prompt of which `left` are left: what [`Engine::prefill`] would read, but no
/// more than `budget` where calls may be cut without changing results.
/// `asks`: none of what is left was read yet, and it follows a text that was.
pub(super) fn piece(
    spec: &PolicySpec,
    left: usize,
    answers: bool,
    asks: bool,
    budget: usize,
) -> usize {
    // The last token of a prompt is read by itself under policies with blocks, or with its question.
    let alone = spec
        .exec_block
        .is_some_and(|most| !(spec.whole_question && asks && left <= most));
    let body = if answers && alone { left - 1 } else { left };
    if body == 0 {
        return 1;
    }
    let most = match spec.exec_block {
        // What these keep depends on their calls.
        _ if spec.rearranges || spec.logits => spec.chunk,
        // Nobody writes: the budget knows no bound.
        Some(block) => budget.div_ceil(block).saturating_mul(block),
        None => budget,
    };
    most.clamp(1, spec.chunk).min(body)
}

impl Running<'_> {
    /// Tells the client; false if it is gone.
    pub(super) fn tell(&mut self, event: Event) {
        self.broken |= (self.sink)(event).is_break();
    }

    pub(super) fn answers(&self) -> bool {
        matches!(self.goal, Goal::Answer { .. })
    }

    /// Log probabilities of the prompt itself, with those of so many likeliest tokens.
    pub(super) fn echo(&self) -> Option<usize> {
        match self.goal {
            Goal::Answer { echo, .. } => echo,
            Goal::Keep { .. } => None,
        }
    }

    /// Tokens that the next call reads, if a prompt is being read.
    pub(super) fn next_piece(&self, budget: usize) -> Option<usize> {
        let State::Reading { sequence, read, .. } = &self.state else {
            return None;
        };
        let left = self.prompt.len() - read;
        // All rows of logits of an echoed piece are in memory at once.
        let budget = if self.echo().is_some() {
            budget.min(64)
        } else {
            budget
        };
        let (known, cached) = (self.summary.base + read, self.summary.cached);
        let asks = cached > 0 && known == cached;
        Some(piece(&sequence.spec(), left, self.answers(), asks, budget))
    }

    /// The sequence and the tokens of the next call.
    pub(super) fn lend_piece(&mut self, piece: usize) -> Option<(&mut Sequence, &[u32])> {
        let last = |read: usize| read + piece == self.prompt.len();
        let watch = matches!(self.goal, Goal::Answer { watch: true, .. });
        let State::Reading {
            sequence,
            read,
            watched,
        } = &mut self.state
        else {
            return None;
        };
        if watch && !*watched && last(*read) && piece == 1 {
            sequence.watch();
            *watched = true;
        }
        Some((sequence, &self.prompt[*read..*read + piece]))
    }

    /// After a call that read a piece. `logits` are those of its last token, all of them under echo.
    pub(super) fn piece_read(&mut self, piece: usize, logits: &[f32]) -> Result<()> {
        let total = self.prompt.len();
        let vocab = self.engine.model().config().vocab_size;
        let State::Reading { read, .. } = &mut self.state else {
            return Ok(());
        };
        let first = *read;
        *read += piece;
        let now = *read;
        if let Some(count) = self.echo() {
            // Row t is about the token after it; the last row is the first answer token's.
            let known = logits.chunks_exact(vocab).zip(&self.prompt[first + 1..]);
            let choices = known
                .map(|(row, &token)| Choice::new(token, row, Some(count)))
                .collect();
            self.tell(Event::Echo(choices));
        }
        self.tell(Event::Progress { read: now, total });
        if now == total {
            self.summary.prefill = self.since.elapsed();
            if self.answers() {
                self.begin_answers(&logits[logits.len() - vocab..])?;
            }
        }
        Ok(())
    }

    fn begin_answers(&mut self, logits: &[f32]) -> Result<()> {
        let state = std::mem::replace(&mut self.state, State::Over);
        let (
            State::Reading {
                mut sequence,
                watched,
                ..
            },
            Goal::Answer {
                strategies,
                eos,
                max_tokens,
                watch,
                ..
            },
        ) = (state, &mut self.goal)
        else {
            return Ok(());
        };
        if *watch && !watched {
            sequence.watch();
        }
        let request = Request {
            seq: EngineSession::ROOT,
            eos: std::mem::take(eos),
            max_tokens: *max_tokens,
        };
        let strategies = std::mem::take(strategies);
        let mut roots: Vec<Sequence> = (1..strategies.len()).map(|_| sequence.fork()).collect();
        roots.insert(0, *sequence);
        let mut answers = Vec::with_capacity(roots.len());
        for (root, strategy) in roots.into_iter().zip(strategies) {
            let mut answer = Answering {
                session: EngineSession::owning(self.engine, root),
                strategy,
                action: None,
                stats: DecodeStats::default(),
                since: Instant::now(),
                error: None,
            };
            answer.strategy.begin(&mut answer.session, &request)?;
            answers.push(answer);
        }
        for (index, answer) in answers.iter_mut().enumerate() {
            answer.advance(index, logits, &mut self.sink, &mut self.broken)?;
        }
        self.state = State::Writing(answers);
        Ok(())
    }

    /// Verifies one tree of guesses for each answer that wants it; tokens read.
    pub(super) fn trees(&mut self) -> Result<usize> {
        let State::Writing(answers) = &mut self.state else {
            return Ok(0);
        };
        let mut tokens = 0;
        for (index, answer) in answers.iter_mut().enumerate() {
            let Some(Action::Tree(seq, tree)) = &answer.action else {
                continue;
            };
            use crate::decode::DecodeSession;
            let (seq, tree) = (*seq, tree.clone());
            let logits = answer.session.step_tree(seq, &tree)?;
            answer.stats.tokens += tree.len();
            tokens += tree.len();
            answer.stats.forwards += 1;
            answer.advance(index, &logits, &mut self.sink, &mut self.broken)?;
        }
        Ok(tokens)
    }

    /// After a pass that read the rows of all answers: their logits, in order. How many rows were taken.
    pub(super) fn stepped(&mut self, logits: &[f32]) -> Result<usize> {
        let vocab = self.engine.model().config().vocab_size;
        let State::Writing(answers) = &mut self.state else {
            return Ok(0);
        };
        let mut taken = 0;
        for (index, answer) in answers.iter_mut().enumerate() {
            if let Some(error) = answer.error.take() {
                return Err(error);
            }
            let Some(Action::Step(rows)) = &answer.action else {
                continue;
            };
            let rows = rows.len();
            let mine = &logits[taken * vocab..(taken + rows) * vocab];
            taken += rows;
            answer.stats.forwards += 1;
            answer.stats.tokens += rows;
            answer.advance(index, mine, &mut self.sink, &mut self.broken)?;
        }
        Ok(taken)
    }

    /// True once every answer is complete.
    pub(super) fn written(&self) -> bool {
        matches!(&self.state, State::Writing(answers) if answers.iter().all(|a| a.action.is_none()))
    }

    /// Ends a request whose answers are complete; the first answer's sequence, to be kept.
    pub(super) fn finish(&mut self) -> Option<Sequence> {
        let State::Writing(answers) = std::mem::replace(&mut self.state, State::Over) else {
            return None;
        };
        self.summary.decode = self.since.elapsed().saturating_sub(self.summary.prefill);
        self.summary.forwards = answers.iter().map(|answer| answer.stats.forwards).sum();
        let first = answers.into_iter().next()?;
        let streams = first.strategy.streams();
        let root = first.session.into_root()?;
        self.summary.looked = root.policy().looked();
        streams.then_some(root)
    }

    /// Tokens written so far.
    pub(super) fn emitted(&self) -> usize {
        match &self.state {
            State::Writing(answers) => answers.iter().map(|answer| answer.stats.emitted).sum(),
            _ => 0,
        }
    }

    /// Bytes of keys and values in memory.
    pub(super) fn kv_bytes(&self) -> u64 {
        match &self.state {
            State::Reading { sequence, .. } => sequence.kv_bytes().memory,
            State::Writing(answers) => answers
                .iter()
                .filter_map(|answer| answer.session.root())
                .map(|root| root.kv_bytes().memory)
                .sum(),
            State::Over => 0,
        }
    }
}

impl Answering<'_> {
    /// Gives the strategy the logits it waits for.
    fn advance(
        &mut self,
        index: usize,
        logits: &[f32],
        sink: &mut Sink,
        broken: &mut bool,
    ) -> Result<()> {
        let stats = &mut self.stats;
        let mut emit = |event: Written| match event {
            Written::Token(choice) => {
                stats.emitted += 1;
                sink(Event::Token {
                    answer: index,
                    choice,
                })
            }
            Written::Working => ControlFlow::Continue(()),
        };
        let next = self.strategy.next(&mut self.session, logits, &mut emit)?;
        if next != Action::Done {
            self.action = Some(next);
            return Ok(());
        }
        self.action = None;
        let mut outcome = self.strategy.finish(&mut self.session)?;
        if !self.strategy.streams()
            && let Some(best) = outcome.answers.first()
        {
            for choice in &best.choices {
                if emit(Written::Token(choice.clone())).is_break() {
                    outcome.end = End::Cancelled;
                    break;
                }
            }
        }
        stats.elapsed = self.since.elapsed();
        outcome.stats = *stats;
        *broken |= sink(Event::Ended {
            answer: index,
            outcome,
        })
        .is_break();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_those_of_a_prefill() {
        let spec = PolicySpec {
            exec_block: Some(8),
            whole_question: true,
            chunk: 16,
            ..PolicySpec::default()
        };
        // (left, a question about a known text, budget, piece)
        for (left, asks, budget, want) in [
            (100, false, usize::MAX, 16),
            (100, false, 3, 8),
            (6, true, usize::MAX, 6),
            (6, false, usize::MAX, 5),
            (9, true, usize::MAX, 8),
            (1, false, usize::MAX, 1),
        ] {
            let found = piece(&spec, left, true, asks, budget);
            assert_eq!(found, want, "{left} left, budget {budget}");
        }
        // Of a document that is only kept, nothing is read alone.
        assert_eq!(piece(&spec, 6, false, false, usize::MAX), 6);
    }
}
