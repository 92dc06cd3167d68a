//! Which windows a protocol reads and which tokens it scores in each (paper 58, P1 to P4, P6).

use crate::error::{EvalError, Result};
use crate::task::{GROUP, Protocol};

/// Reads tokens [begin, end) from position 0 and scores the last `take` of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First token.
    pub begin: usize,
    /// One past the last.
    pub end: usize,
    /// Scored tokens at the end.
    pub take: usize,
}

/// P2, and P1 at `stride = window`: every token but the first is scored once; at
/// `stride = window` the first of each window is left out. With `bos` every window starts with a
/// token from outside the text, and all tokens are scored.
///
/// # Errors
/// A stride outside 1..=window, or a window that holds no text.
pub fn sliding(tokens: usize, window: usize, stride: usize, bos: bool) -> Result<Vec<Window>> {
    let held = window.saturating_sub(usize::from(bos));
    if stride == 0 || stride > held || held == 0 {
        return Err(EvalError::Input(format!(
            "stride is {stride}, expected 1 to the window's {held} text tokens"
        )));
    }
    let mut all = Vec::new();
    let (mut previous, mut begin) = (0, 0);
    while previous < tokens {
        let end = (begin + held).min(tokens);
        let take = if bos {
            end - previous
        } else {
            (end - previous).min(end - begin - 1)
        };
        all.push(Window { begin, end, take });
        previous = end;
        begin += stride;
    }
    Ok(all)
}

/// P3: the last token of every window.
///
/// # Errors
/// A window without context.
pub fn fixed(tokens: usize, window: usize, bos: bool) -> Result<Vec<Window>> {
    let held = window.saturating_sub(usize::from(bos));
    if held == 0 || window < 2 {
        return Err(EvalError::Input(format!(
            "window is {window}, expected at least 2"
        )));
    }
    Ok((held..=tokens)
        .map(|end| Window {
            begin: end - held,
            end,
            take: 1,
        })
        .collect())
}

/// P6: the last `scored` tokens in groups of [`GROUP`], each after `context` tokens (or as many as there are). Equal
/// targets for all contexts.
///
/// # Errors
/// No context, or a text that has not `scored` tokens after its first.
pub fn recent(tokens: usize, context: usize, scored: usize, bos: usize) -> Result<Vec<Window>> {
    if context == 0 || scored == 0 || scored >= tokens + bos {
        return Err(EvalError::Input(format!(
            "context {context} and {scored} scored tokens of {tokens}: expected at least 1 token of context, and fewer \
             scored than there are"
        )));
    }
    let first = tokens - scored;
    let groups = (first..tokens).step_by(GROUP);
    Ok(groups
        .map(|begin| {
            let end = (begin + GROUP).min(tokens);
            Window {
                begin: begin.saturating_sub(context.saturating_sub(bos)),
                end,
                take: end - begin,
            }
        })
        .collect())
}

/// The windows of a protocol; `bos` tokens (0 or 1) stand before each.
///
/// # Errors
/// As [`sliding`] and [`fixed`].
pub fn windows(tokens: usize, protocol: Protocol, bos: usize) -> Result<Vec<Window>> {
    match protocol {
        Protocol::Sliding { window, stride } => {
            // With BOS a disjoint plan steps by the text it holds.
            let stride = stride.min(window.saturating_sub(bos));
            sliding(tokens, window, stride, bos > 0)
        }
        Protocol::Fixed { window } => fixed(tokens, window, bos > 0),
        Protocol::Recent { context, scored } => recent(tokens, context, scored, bos.min(1)),
        Protocol::Position => Ok(if tokens == 0 {
            Vec::new()
        } else {
            vec![Window {
                begin: 0,
                end: tokens,
                take: tokens - 1 + bos.min(1),
            }]
        }),
    }
}

/// Which tokens a protocol scores, without BOS; empty for impossible protocols.
pub fn scored(tokens: usize, protocol: Protocol) -> Vec<bool> {
    let mut all = vec![false; tokens];
    for window in windows(tokens, protocol, 0).unwrap_or_default() {
        all[window.end - window.take..window.end].fill(true);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_once_with_the_promised_context() {
        for tokens in 1..=40 {
            for window in 2..=40usize {
                for stride in 1..=window {
                    for bos in [false, true] {
                        if bos && stride > window - 1 {
                            assert!(sliding(tokens, window, stride, bos).is_err());
                            continue;
                        }
                        let plan = sliding(tokens, window, stride, bos).unwrap();
                        let mut seen = vec![0; tokens];
                        for (index, w) in plan.iter().enumerate() {
                            assert!(w.end - w.begin <= window);
                            for target in w.end - w.take..w.end {
                                seen[target] += 1;
                                let context = target - w.begin + usize::from(bos);
                                assert!(context >= 1 && context < window);
                                if index > 0 {
                                    let least = (window - stride).max(1);
                                    assert!(
                                        context >= least.min(window - 1),
                                        "{tokens} {window} {stride} {bos}"
                                    );
                                }
                            }
                        }
                        assert!(seen.iter().all(|&n| n <= 1));
                        let missing = seen.iter().filter(|&&n| n == 0).count();
                        if bos {
                            assert_eq!(missing, 0);
                        } else if stride < window {
                            assert_eq!(missing, 1, "{tokens} {window} {stride}");
                        } else {
                            assert_eq!(missing, tokens.div_ceil(window));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn equal_targets_for_all_contexts() {
        for tokens in [70, 200, 333] {
            for scored in [1, 63, 64, 65, 69] {
                for bos in [0, 1] {
                    let mut targets = Vec::new();
                    for context in [1, 2, 50, 1000] {
                        let plan = recent(tokens, context, scored, bos).unwrap();
                        let own: Vec<usize> =
                            plan.iter().flat_map(|w| w.end - w.take..w.end).collect();
                        assert_eq!(own, (tokens - scored..tokens).collect::<Vec<_>>());
                        for w in &plan {
                            let first = w.end - w.take;
                            let before = first - w.begin + bos;
                            assert_eq!(before, context.min(first + bos).max(bos), "{w:?}");
                        }
                        targets.push(own);
                    }
                    assert!(targets.windows(2).all(|pair| pair[0] == pair[1]));
                }
            }
        }
        assert!(recent(64, 8, 64, 0).is_err() && recent(64, 0, 8, 0).is_err());
    }

    #[test]
    fn impossible_plans_are_refused() {
        assert!(sliding(10, 4, 0, false).is_err());
        assert!(sliding(10, 4, 5, false).is_err());
        assert!(fixed(10, 1, false).is_err());
        assert!(windows(0, Protocol::Position, 1).unwrap().is_empty());
    }
}
