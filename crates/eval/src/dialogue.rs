//! Talks with known answers on a memory of fixed size, for policies that choose what to remember (SirLLM, arXiv
//! 2405.12528): at every turn the likeliest of the offered replies counts, nothing is written freely.
//!
//! Two rules of scoring side by side: the paper's, by a reply's first token (a reply that is the greedy continuation
//! as a whole wins outright), and by the mean log probability of all of a reply's tokens.

use crate::error::{EvalError, Result};
use crate::target::ChatMode;
use longspan_agents::{LocalModel, Message, Role};
use longspan_data::task::dialogue::{Kind, Session};
use longspan_data::tokenize::Special;
use longspan_infer::context::ContextConfig;
use longspan_infer::engine::Want;
use longspan_infer::{EngineError, EngineOptions, Sequence};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::time::Instant;

/// Which reply goes into the memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Feed {
    /// The right one; in games, where there is none, the model's own.
    #[default]
    Right,
    /// The model's own, as in the paper.
    Own,
}

/// How a talk is held.
#[derive(Clone, Debug)]
pub struct TalkOptions {
    /// Context policy and type of keys and values.
    pub engine: EngineOptions,
    /// The model's chat template, or the paper's `USER: ... ASSISTANT: `.
    pub chat: ChatMode,
    /// What is remembered of the replies.
    pub feed: Feed,
}

/// What became of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TurnResult {
    /// What the turn was for.
    pub kind: Kind,
    /// Index of the right reply.
    pub right: usize,
    /// The reply by the paper's rule.
    pub chosen: usize,
    /// The reply of the largest mean log probability.
    pub likeliest: usize,
    /// Mean log probability of the right reply's tokens less the mean over all replies, nats.
    pub margin: f64,
    /// For a recall: how many tokens of the turn that stated it were still cached, and how many it had. None
    /// where the policy does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<(usize, usize)>,
}

/// What became of a session.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SessionResult {
    /// The session.
    pub session: String,
    /// In order.
    pub turns: Vec<TurnResult>,
    /// Tokens read.
    pub tokens: usize,
    /// Tokens that the policy reports as dropped by choice.
    pub evicted: u64,
    /// Bytes of keys and values at the end.
    pub kv_bytes: u64,
    /// Seconds.
    pub seconds: f64,
}

/// What stands around the turns.
struct Frame {
    /// Before the first thing said, and before the later ones.
    open: [String; 2],
    /// Between what is said and the reply.
    close: String,
    /// How the first opener is encoded.
    special: Special,
}

impl Frame {
    fn new(model: &LocalModel, chat: ChatMode) -> Result<Frame> {
        const MARKS: [&str; 3] = ["\u{1}a\u{1}", "\u{1}b\u{1}", "\u{1}c\u{1}"];
        if chat == ChatMode::Auto && model.chats() {
            let roles = [Role::User, Role::Assistant, Role::User];
            let messages: Vec<Message> = (roles.into_iter().zip(MARKS))
                .map(|(role, mark)| Message::new(role, mark))
                .collect();
            let text = model
                .render(&messages)
                .map_err(|error| EvalError::Input(error.to_string()))?;
            let parts = text.split_once(MARKS[0]).and_then(|(first, rest)| {
                let (close, rest) = rest.split_once(MARKS[1])?;
                let (next, _) = rest.split_once(MARKS[2])?;
                Some((first, close, next))
            });
            // A template that changes the messages cannot frame them.
            if let Some((first, close, next)) = parts {
                return Ok(Frame {
                    open: [first.into(), next.into()],
                    close: close.into(),
                    special: Special::Parse,
                });
            }
        }
        Ok(Frame {
            open: ["USER: ".into(), "\n\nUSER: ".into()],
            close: "\n\nASSISTANT: ".into(),
            special: Special::ParseWithBos,
        })
    }
}

fn failed(error: EngineError) -> EvalError {
    EvalError::Target(error.to_string())
}

fn log_softmax(row: &[f32], token: u32) -> f64 {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&x| f64::from(x - top).exp()).sum();
    f64::from(row[token as usize]) - f64::from(top) - sum.ln()
}

fn best(row: &[f32]) -> u32 {
    (0..row.len())
        .max_by(|&a, &b| row[a].total_cmp(&row[b]))
        .unwrap_or(0) as u32
}

/// The first of the largest.
fn largest(values: impl Iterator<Item = f64>) -> usize {
    let mut top = (0, f64::NEG_INFINITY);
    for (index, value) in values.enumerate() {
        if value > top.1 {
            top = (index, value);
        }
    }
    top.0
}

/// Tokens of `range` that the newest query still sees, where that is known.
fn held(sequence: &Sequence, window: u64, range: &Range<usize>) -> Option<usize> {
    let len = sequence.len();
    let last = |n: u64| {
        let from = len.saturating_sub(n as usize);
        range.clone().filter(|&token| token >= from).count()
    };
    match &sequence.options().context {
        ContextConfig::Full => Some(range.len()),
        ContextConfig::Window(config) => Some(last(config.size.unwrap_or(window))),
        ContextConfig::Sinks(config) => {
            let n_local = config
                .n_local
                .unwrap_or(window.saturating_sub(config.n_init));
            let from = len.saturating_sub(n_local as usize);
            let seen = |token: &usize| *token < config.n_init as usize || *token >= from;
            Some(range.clone().filter(seen).count())
        }
        ContextConfig::SirLlm(_) => {
            let kept = sequence.policy().kept();
            let inside = |token: u64| range.contains(&(token as usize));
            Some(kept.iter().filter(|(token, _)| inside(*token)).count())
        }
        _ => None,
    }
}

/// Holds a session's talk.
///
/// # Errors
/// A policy that cannot serve, a turn that does not fit its memory, or [`EvalError::Interrupted`] once `stop` says so.
pub fn hold(
    model: &LocalModel,
    options: &TalkOptions,
    session: &Session,
    stop: &dyn Fn() -> bool,
) -> Result<SessionResult> {
    let engine = &model.engine;
    let frame = Frame::new(model, options.chat)?;
    let encode = |text: &str, special| {
        let ids = model.tokenizer.encode(text, special);
        ids.map_err(|error| EvalError::Input(error.to_string()))
    };
    let clock = Instant::now();
    let mut sequence = engine.sequence(&options.engine, None).map_err(failed)?;
    let spec = sequence.spec();
    let vocab = engine.model().config().vocab_size;
    let mut result = SessionResult {
        session: session.id.clone(),
        ..SessionResult::default()
    };
    // Where the words of each turn lie.
    let mut places: Vec<Range<usize>> = Vec::with_capacity(session.turns.len());
    for (number, turn) in session.turns.iter().enumerate() {
        if stop() {
            return Err(EvalError::Interrupted {
                done: number,
                total: session.turns.len(),
            });
        }
        let mut prompt = match number {
            0 => encode(&frame.open[0], frame.special)?,
            _ => encode(&frame.open[1], Special::Parse)?,
        };
        let said = encode(&turn.user, Special::None)?;
        let from = sequence.len() + prompt.len();
        places.push(from..from + said.len());
        prompt.extend(said);
        prompt.extend(encode(&frame.close, Special::Parse)?);
        let choices: Vec<Vec<u32>> = (turn.choices.iter())
            .map(|text| encode(text, Special::None))
            .collect::<Result<_>>()?;
        if choices.is_empty() || choices.iter().any(Vec::is_empty) {
            return Err(EvalError::Input(format!(
                "{}, turn {number}: a reply without words",
                session.id
            )));
        }

        // The round has room for the longest reply.
        let longest = choices.iter().map(Vec::len).max().unwrap_or(0);
        sequence.begin_round(prompt.len() + longest);
        let body = prompt.len() - usize::from(spec.exec_block.is_some() && prompt.len() > 1);
        let mut pieces: Vec<&[u32]> = prompt[..body].chunks(spec.chunk).collect();
        if body < prompt.len() {
            pieces.push(&prompt[body..]);
        }
        let mut after = Vec::new();
        for (index, piece) in pieces.iter().enumerate() {
            let want = match index + 1 == pieces.len() {
                true => Want::Last,
                false => Want::Nothing,
            };
            let rows = &mut [(&mut sequence, *piece)];
            after = engine.forward(rows, want).map_err(failed)?;
        }
        let held = turn.stated.and_then(|stated| {
            let place = places.get(stated)?;
            Some((held(&sequence, engine.window(), place)?, place.len()))
        });

        // Every reply on a copy of the memory; its last token predicts nothing that is asked for.
        let mut forks: Vec<Sequence> = choices.iter().map(|_| sequence.fork()).collect();
        let mut rows: Vec<(&mut Sequence, &[u32])> = (forks.iter_mut().zip(&choices))
            .filter(|(_, ids)| ids.len() > 1)
            .map(|(fork, ids)| (fork, &ids[..ids.len() - 1]))
            .collect();
        let logits = engine.forward(&mut rows, Want::All).map_err(failed)?;
        drop(forks);
        let mut rest = logits.chunks_exact(vocab);
        let (mut first, mut mean, mut greedy) = (Vec::new(), Vec::new(), None);
        for (index, ids) in choices.iter().enumerate() {
            let (mut sum, mut likeliest) = (0.0, true);
            for (place, &id) in ids.iter().enumerate() {
                let row = match place {
                    0 => &after[..],
                    _ => rest.next().unwrap_or(&after),
                };
                let log_p = log_softmax(row, id);
                likeliest &= best(row) == id;
                sum += log_p;
                if place == 0 {
                    first.push(log_p);
                }
            }
            if likeliest && greedy.is_none() {
                greedy = Some(index);
            }
            mean.push(sum / ids.len() as f64);
        }
        let chosen = greedy.unwrap_or_else(|| largest(first.iter().copied()));
        let average = mean.iter().sum::<f64>() / mean.len() as f64;
        result.turns.push(TurnResult {
            kind: turn.kind,
            right: turn.right,
            chosen,
            likeliest: largest(mean.iter().copied()),
            margin: mean[turn.right] - average,
            held,
        });
        let own = options.feed == Feed::Own || turn.kind == Kind::Move;
        let reply = &choices[if own { chosen } else { turn.right }];
        for piece in reply.chunks(spec.chunk) {
            let rows = &mut [(&mut sequence, piece)];
            engine.forward(rows, Want::Nothing).map_err(failed)?;
        }
    }
    let bytes = sequence.kv_bytes();
    result.tokens = sequence.len();
    result.evicted = sequence.report().evicted;
    result.kv_bytes = bytes.memory + bytes.disk;
    result.seconds = clock.elapsed().as_secs_f64();
    Ok(result)
}

/// Figures over sessions; shares are 0 to 1, None where there was no such turn.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// Sessions.
    pub sessions: usize,
    /// Turns.
    pub turns: usize,
    /// Right by the paper's rule, of recalls.
    pub recall: Option<f64>,
    /// Right by mean log probability, of recalls.
    pub recall_mean: Option<f64>,
    /// Right by the paper's rule, of turns with a right reply that are no recalls and offer a choice.
    pub filler: Option<f64>,
    /// Mean margin of recalls, nats.
    pub margin: Option<f64>,
    /// Mean number of tokens cached of the turns asked for.
    pub held: Option<f64>,
    /// Shares of rounds won, drawn and lost.
    pub game: Option<[f64; 3]>,
    /// Most bytes of keys and values at the end of a session.
    pub kv_bytes: u64,
    /// Tokens dropped by choice.
    pub evicted: u64,
    /// Tokens read a second.
    pub tokens_per_second: f64,
}

/// The figures of a method.
pub fn figures(results: &[&SessionResult]) -> Figures {
    let turns = || results.iter().flat_map(|result| &result.turns);
    let mean = |values: Vec<f64>| match values.len() {
        0 => None,
        n => Some(values.iter().sum::<f64>() / n as f64),
    };
    let of = |kinds: &[Kind], value: &dyn Fn(&TurnResult) -> f64| {
        let inside = turns().filter(|turn| kinds.contains(&turn.kind));
        mean(inside.map(value).collect())
    };
    let right = |turn: &TurnResult| f64::from(u8::from(turn.chosen == turn.right));
    let likeliest = |turn: &TurnResult| f64::from(u8::from(turn.likeliest == turn.right));
    let held: Vec<f64> = turns()
        .filter_map(|turn| turn.held.map(|(held, _)| held as f64))
        .collect();
    // A game's right reply beats the opponent's move, the next but one is that move.
    let share = |offset: usize| {
        of(&[Kind::Move], &|turn: &TurnResult| {
            f64::from(u8::from(turn.chosen == (turn.right + offset) % 3))
        })
    };
    let game = match (share(0), share(2), share(1)) {
        (Some(won), Some(drawn), Some(lost)) => Some([won, drawn, lost]),
        _ => None,
    };
    let seconds: f64 = results.iter().map(|result| result.seconds).sum();
    let tokens: usize = results.iter().map(|result| result.tokens).sum();
    Figures {
        sessions: results.len(),
        turns: turns().count(),
        recall: of(&[Kind::Recall], &right),
        recall_mean: of(&[Kind::Recall], &likeliest),
        filler: of(&[Kind::Filler], &right),
        margin: of(&[Kind::Recall], &|turn: &TurnResult| turn.margin),
        held: mean(held),
        game,
        kv_bytes: results
            .iter()
            .map(|result| result.kv_bytes)
            .max()
            .unwrap_or(0),
        evicted: results.iter().map(|result| result.evicted).sum(),
        tokens_per_second: tokens as f64 / seconds.max(1e-9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_count_kinds_apart() {
        let turn = |kind, right, chosen, likeliest, held| TurnResult {
            kind,
            right,
            chosen,
            likeliest,
            margin: 0.5,
            held,
        };
        let result = SessionResult {
            turns: vec![
                turn(Kind::Fact, 0, 0, 0, None),
                turn(Kind::Filler, 1, 1, 0, None),
                turn(Kind::Filler, 2, 1, 2, None),
                turn(Kind::Recall, 3, 0, 3, Some((4, 9))),
                // Paper beats rock: a win, a draw with rock, a loss with scissors.
                turn(Kind::Move, 1, 1, 1, None),
                turn(Kind::Move, 1, 0, 0, None),
                turn(Kind::Move, 1, 0, 0, None),
                turn(Kind::Move, 1, 2, 2, None),
            ],
            kv_bytes: 7,
            ..SessionResult::default()
        };
        let figures = figures(&[&result]);
        assert_eq!(
            (figures.recall, figures.recall_mean),
            (Some(0.0), Some(1.0))
        );
        assert_eq!((figures.filler, figures.held), (Some(0.5), Some(4.0)));
        assert_eq!(figures.game, Some([0.25, 0.5, 0.25]));
        assert_eq!((figures.turns, figures.kv_bytes), (8, 7));
        assert_eq!(super::figures(&[]).recall, None);
        assert_eq!(largest([1.0, 3.0, 3.0].into_iter()), 1);
    }
}
