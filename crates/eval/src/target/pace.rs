//! Keeps to a server's pace: at most so many requests a minute, and when it says "later" to one request, all wait.
//! Repeating what was refused is [`longspan_agents::chat::layers::Retrying`]'s work, around this.

use longspan_agents::chat::model::{
    Call, Card, ChatError, ChatModel, Input, OnText, Reply, Request, Result, TokenCount, TokenScore,
};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A bucket of tokens that fills by time, and a gate that a server's `Retry-After` closes.
struct State {
    /// Requests that may begin now.
    tokens: f64,
    /// When they were counted.
    at: Instant,
    /// Nothing begins before.
    closed: Option<Instant>,
}

/// See the module's text.
pub struct Paced {
    inner: Arc<dyn ChatModel>,
    /// Requests a second; None = as many as come.
    rate: Option<f64>,
    /// The longest that a server's word closes the gate.
    longest: Duration,
    state: Mutex<State>,
}

impl Paced {
    /// `per_minute` requests begin in a minute, a tenth of them (at least one) at once.
    pub fn new(inner: Arc<dyn ChatModel>, per_minute: Option<f64>, longest: Duration) -> Paced {
        let rate = per_minute.map(|n| n / 60.0);
        Paced {
            inner,
            rate,
            longest,
            state: Mutex::new(State {
                tokens: burst(rate),
                at: Instant::now(),
                closed: None,
            }),
        }
    }

    /// Waits for a turn.
    fn turn(&self, call: &Call) -> Result<()> {
        loop {
            let wait = self.try_turn(Instant::now());
            if wait.is_zero() {
                return Ok(());
            }
            call.sleep(wait)?;
        }
    }

    /// Takes a turn, or says how long to wait before asking again.
    fn try_turn(&self, now: Instant) -> Duration {
        let mut state = self.state.lock().unwrap_or_else(|p| p.into_inner());
        if let Some(until) = state.closed {
            if now < until {
                return until - now;
            }
            state.closed = None;
        }
        let Some(rate) = self.rate else {
            return Duration::ZERO;
        };
        let passed = now.saturating_duration_since(state.at).as_secs_f64();
        state.tokens = (state.tokens + passed * rate).min(burst(self.rate));
        state.at = state.at.max(now);
        if state.tokens < 1.0 {
            return Duration::from_secs_f64((1.0 - state.tokens) / rate).max(SHORTEST);
        }
        state.tokens -= 1.0;
        Duration::ZERO
    }

    /// Closes the gate where the server asked for it.
    fn heed<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(
            ChatError::RateLimited {
                after: Some(after), ..
            }
            | ChatError::Overloaded {
                after: Some(after), ..
            },
        ) = &result
        {
            let until = Instant::now() + (*after).min(self.longest);
            let mut state = self.state.lock().unwrap_or_else(|p| p.into_inner());
            state.closed = Some(state.closed.map_or(until, |known| known.max(until)));
        }
        result
    }
}

/// No busy waiting where the bucket is nearly full.
const SHORTEST: Duration = Duration::from_millis(1);

fn burst(rate: Option<f64>) -> f64 {
    rate.map_or(1.0, |rate| (rate * 6.0).max(1.0))
}

impl ChatModel for Paced {
    fn card(&self) -> &Card {
        self.inner.card()
    }

    fn count(&self, input: &Input) -> Result<TokenCount> {
        self.inner.count(input)
    }

    fn count_text(&self, text: &str) -> Result<TokenCount> {
        self.inner.count_text(text)
    }

    fn count_texts(&self, texts: &[&str]) -> Result<Vec<TokenCount>> {
        self.inner.count_texts(texts)
    }

    fn reply(&self, request: &Request, call: &Call, on_text: OnText<'_>) -> Result<Reply> {
        self.turn(call)?;
        self.heed(self.inner.reply(request, call, on_text))
    }

    fn score(&self, prompt: &str, continuation: &str, call: &Call) -> Result<Vec<TokenScore>> {
        self.turn(call)?;
        self.heed(self.inner.score(prompt, continuation, call))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use longspan_agents::chat::scripted::Scripted;

    fn paced(per_minute: Option<f64>) -> Paced {
        let model = Scripted::new(|_| Ok("yes".into()));
        Paced::new(Arc::new(model), per_minute, Duration::from_secs(60))
    }

    #[test]
    fn a_minute_has_its_number_of_turns() {
        let pace = paced(Some(120.0));
        let start = pace.state.lock().unwrap().at;
        let (mut now, mut turns) = (start, Vec::new());
        while now < start + Duration::from_secs(60) {
            match pace.try_turn(now) {
                wait if wait.is_zero() => turns.push(now),
                wait => now += wait,
            }
        }
        // A burst of 12, then two a second.
        assert_eq!(turns.iter().filter(|&&t| t == start).count(), 12);
        assert!((130..=132).contains(&turns.len()), "{}", turns.len());
    }

    #[test]
    fn one_refusal_makes_all_wait() {
        let pace = paced(None);
        assert!(pace.try_turn(Instant::now()).is_zero());
        let refused: Result<()> = Err(ChatError::RateLimited {
            message: "later".into(),
            after: Some(Duration::from_secs(9)),
        });
        assert!(pace.heed(refused).is_err());
        let wait = pace.try_turn(Instant::now());
        assert!(wait > Duration::from_secs(8) && wait <= Duration::from_secs(9));
        assert!(
            pace.try_turn(Instant::now() + Duration::from_secs(10))
                .is_zero()
        );
        // A shorter word does not open it.
        let shorter: Result<()> = Err(ChatError::Overloaded {
            message: "later".into(),
            after: Some(Duration::from_secs(9)),
        });
        assert!(pace.heed(shorter).is_err());
        let again: Result<()> = Err(ChatError::Overloaded {
            message: "later".into(),
            after: Some(Duration::from_secs(1)),
        });
        assert!(pace.heed(again).is_err());
        assert!(pace.try_turn(Instant::now()) > Duration::from_secs(8));
        // What a server asks for has a limit.
        let for_ever: Result<()> = Err(ChatError::RateLimited {
            message: "later".into(),
            after: Some(Duration::from_secs(86_400)),
        });
        assert!(pace.heed(for_ever).is_err());
        assert!(pace.try_turn(Instant::now()) <= Duration::from_secs(60));
    }
}
