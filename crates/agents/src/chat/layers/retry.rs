//! Repeats calls that failed for a moment: rate limits, overload, timeouts, broken connections.

use crate::chat::model::{
    Call, Card, ChatError, ChatModel, Embeddings, Input, OnText, Reply, Request, Result,
    TokenCount, TokenScore,
};
use longspan_infer::decode::random::CounterRng;
use longspan_infer::key_context::Distribution;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How patiently.
#[derive(Clone)]
pub struct Retry {
    /// Tries per call.
    pub tries: u32,
    /// First pause; doubles with every try.
    pub pause: Duration,
    /// Longest pause; also of what a server asks for.
    pub longest: Duration,
    /// Waits between tries; tests put their own clock here.
    pub sleep: Sleep,
}

/// A pause that a stop ends.
pub type Sleep = Arc<dyn Fn(&Call, Duration) -> Result<()> + Send + Sync>;

impl Default for Retry {
    fn default() -> Self {
        Retry {
            tries: 6,
            pause: Duration::from_millis(500),
            longest: Duration::from_secs(30),
            sleep: Arc::new(|call, time| call.sleep(time)),
        }
    }
}

/// See the module's text.
pub struct Retrying {
    inner: Arc<dyn ChatModel>,
    retry: Retry,
    calls: AtomicU64,
}

impl Retrying {
    /// Wraps a model.
    pub fn new(inner: Arc<dyn ChatModel>, retry: Retry) -> Retrying {
        Retrying {
            inner,
            retry,
            calls: AtomicU64::new(0),
        }
    }

    fn run<T>(
        &self,
        call: &Call,
        work: &mut dyn FnMut() -> Result<T>,
        begun: &dyn Fn() -> bool,
    ) -> Result<T> {
        // Half to all of the pause, so that parallel calls do not come back together.
        let random = CounterRng::new(self.calls.fetch_add(1, Ordering::Relaxed), 0);
        let mut pause = self.retry.pause;
        let mut tried = 1;
        loop {
            let error = match work() {
                Err(error) if error.retryable() => error,
                other => return other,
            };
            // Text that was handed on cannot be taken back, and a stop or a deadline is not a failure of the server.
            call.check(error.partial())?;
            if tried >= self.retry.tries || begun() {
                return Err(counted(error, tried));
            }
            let asked = match &error {
                ChatError::RateLimited { after, .. } | ChatError::Overloaded { after, .. } => {
                    *after
                }
                _ => None,
            };
            let jitter = 0.5 + 0.5 * random.uniform(u64::from(tried));
            let wait = asked.unwrap_or_else(|| pause.mul_f64(jitter));
            (self.retry.sleep)(call, wait.min(self.retry.longest))?;
            pause = (pause * 2).min(self.retry.longest);
            tried += 1;
        }
    }
}

/// The last error, saying how often it was tried.
fn counted(error: ChatError, tries: u32) -> ChatError {
    if tries == 1 {
        return error;
    }
    let more = |message: String| format!("{message} (tried {tries} times)");
    match error {
        ChatError::RateLimited { message, after } => ChatError::RateLimited {
            message: more(message),
            after,
        },
        ChatError::Overloaded { message, after } => ChatError::Overloaded {
            message: more(message),
            after,
        },
        ChatError::Timeout { message, partial } => ChatError::Timeout {
            message: more(message),
            partial,
        },
        ChatError::Network { message, partial } => ChatError::Network {
            message: more(message),
            partial,
        },
        error => error,
    }
}

impl ChatModel for Retrying {
    fn card(&self) -> &Card {
        self.inner.card()
    }

    fn count(&self, input: &Input) -> Result<TokenCount> {
        self.run(&Call::default(), &mut || self.inner.count(input), &|| false)
    }

    fn count_text(&self, text: &str) -> Result<TokenCount> {
        let mut work = || self.inner.count_text(text);
        self.run(&Call::default(), &mut work, &|| false)
    }

    fn count_texts(&self, texts: &[&str]) -> Result<Vec<TokenCount>> {
        let mut work = || self.inner.count_texts(texts);
        self.run(&Call::default(), &mut work, &|| false)
    }

    fn reply(&self, request: &Request, call: &Call, on_text: OnText<'_>) -> Result<Reply> {
        let begun = std::cell::Cell::new(false);
        let mut work = || {
            self.inner.reply(request, call, &mut |piece| {
                begun.set(begun.get() || !piece.is_empty());
                on_text(piece)
            })
        };
        self.run(call, &mut work, &|| begun.get())
    }

    fn score(&self, prompt: &str, continuation: &str, call: &Call) -> Result<Vec<TokenScore>> {
        let mut work = || self.inner.score(prompt, continuation, call);
        self.run(call, &mut work, &|| false)
    }

    fn embed(&self, texts: &[String], call: &Call) -> Result<Embeddings> {
        self.run(call, &mut || self.inner.embed(texts, call), &|| false)
    }

    fn next_token(&self, request: &Request, call: &Call) -> Result<Distribution> {
        self.run(call, &mut || self.inner.next_token(request, call), &|| {
            false
        })
    }

    fn prepare(&self, input: &Input, call: &Call) -> Result<()> {
        self.inner.prepare(input, call)
    }
}
