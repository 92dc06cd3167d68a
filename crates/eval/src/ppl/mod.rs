//! Long-document perplexity: windows, negative log-likelihoods under each protocol, and figures
//! over documents. For comparing models, policies and lengths (paper 58).
//!
//! Logits exist for few tokens at a time, whatever the length of the text.

mod figures;
mod plan;

pub use figures::{Figures, bucket_edges, by_position, figures, of_window_means};
pub use plan::{Window, fixed, recent, scored, sliding, windows};

use crate::error::{EvalError, Result};
use crate::task::Protocol;
use longspan_infer::engine::Want;
use longspan_infer::{Engine, EngineError, EngineOptions, Sequence};

/// Negative log-likelihood in nats of each of `tokens`; None = not scored by the protocol. `bos`
/// (none or one token) stands before every window, whose first token is then scored too. Under
/// [`Protocol::Position`] the text is one sequence under the engine's policy; in the windowed
/// protocols each window is a sequence of its own. `go_on` is asked after each piece.
///
/// # Errors
/// The engine's, and a likelihood that is no number, with its position.
pub fn nll(
    engine: &Engine,
    options: &EngineOptions,
    bos: &[u32],
    tokens: &[u32],
    protocol: Protocol,
    go_on: &mut dyn FnMut(&Sequence) -> bool,
) -> Result<Vec<Option<f32>>> {
    let mut all = vec![None; tokens.len()];
    let fail = |error: EngineError| EvalError::Target(error.to_string());
    for window in windows(tokens.len(), protocol, bos.len())? {
        let (begin, end) = (window.begin, window.end);
        let first = end - window.take;
        let input: Vec<u32> = bos.iter().chain(&tokens[begin..end]).copied().collect();
        let mut sequence = engine.sequence(options, None).map_err(fail)?;
        let piece = sequence.spec().chunk;
        let mut at = 0;
        // The last token predicts nothing that is scored.
        let input = &input[..input.len() - 1];
        for part in input.chunks(piece) {
            // Input token i predicts the text's token begin + i + 1 - bos.
            let next = begin + at + 1 - bos.len();
            let targets = &tokens[next..next + part.len()];
            let want = match window.take == 0 || next + part.len() <= first {
                true => Want::Nothing,
                false => Want::Losses(targets),
            };
            let losses = engine
                .forward(&mut [(&mut sequence, part)], want)
                .map_err(fail)?;
            for (target, loss) in (next..).zip(losses) {
                if target < first {
                    continue;
                }
                if !loss.is_finite() {
                    return Err(EvalError::Target(format!(
                        "the likelihood of token {target} is {loss}"
                    )));
                }
                all[target] = Some(loss.max(0.0));
            }
            at += part.len();
            if !go_on(&sequence) {
                return Err(EvalError::Interrupted { done: 0, total: 0 });
            }
        }
    }
    Ok(all)
}
