//! Limits of calls, tokens and time over any number of calls and models. What a call may cost is set aside before it
//! and settled after it, so that parallel calls never exceed a limit together.

use crate::chat::model::{
    Call, Card, ChatError, ChatModel, Embeddings, Input, OnText, Reply, Request, Result,
    TokenCount, TokenScore,
};
use longspan_infer::key_context::Distribution;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The limits; None = none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limit {
    /// Calls.
    pub calls: Option<u64>,
    /// Tokens of prompts.
    pub prompt_tokens: Option<u64>,
    /// Tokens of replies.
    pub completion_tokens: Option<u64>,
    /// Tokens of both.
    pub tokens: Option<u64>,
    /// Seconds since the budget was made.
    pub seconds: Option<f64>,
}

/// What was spent, or is set aside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// Calls.
    pub calls: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Tokens of replies.
    pub completion_tokens: u64,
}

impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} calls, {} prompt tokens, {} completion tokens",
            self.calls, self.prompt_tokens, self.completion_tokens
        )
    }
}

impl Ledger {
    fn plus(self, other: Ledger) -> Ledger {
        Ledger {
            calls: self.calls + other.calls,
            prompt_tokens: self.prompt_tokens + other.prompt_tokens,
            completion_tokens: self.completion_tokens + other.completion_tokens,
        }
    }
}

/// A budget that models share.
#[derive(Debug)]
pub struct Budget {
    limit: Limit,
    begun: Instant,
    /// Spent, and set aside for calls under way.
    state: Mutex<(Ledger, Ledger)>,
}

impl Budget {
    /// Time counts from now.
    pub fn new(limit: Limit) -> Budget {
        Budget {
            limit,
            begun: Instant::now(),
            state: Mutex::default(),
        }
    }

    /// What was spent so far.
    pub fn spent(&self) -> Ledger {
        self.lock().0
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (Ledger, Ledger)> {
        self.state
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }

    fn reserve(&self, need: Ledger) -> Result<()> {
        let mut state = self.lock();
        let after = state.0.plus(state.1).plus(need);
        let both = after.prompt_tokens + after.completion_tokens;
        let limits = [
            ("calls", self.limit.calls, after.calls),
            (
                "prompt tokens",
                self.limit.prompt_tokens,
                after.prompt_tokens,
            ),
            (
                "completion tokens",
                self.limit.completion_tokens,
                after.completion_tokens,
            ),
            ("tokens", self.limit.tokens, both),
        ];
        for (name, limit, would) in limits {
            if let Some(limit) = limit.filter(|&limit| would > limit) {
                return Err(ChatError::Budget(format!(
                    "the budget of {limit} {name} is used up: spent {}, this call may need {} prompt and {} completion tokens more",
                    state.0, need.prompt_tokens, need.completion_tokens
                )));
            }
        }
        if let Some(seconds) = self.limit.seconds
            && self.begun.elapsed().as_secs_f64() >= seconds
        {
            return Err(ChatError::Budget(format!(
                "the budget of {seconds} s is used up: spent {}",
                state.0
            )));
        }
        state.1 = state.1.plus(need);
        Ok(())
    }

    fn settle(&self, reserved: Ledger, spent: Ledger) {
        let mut state = self.lock();
        let held = &mut state.1;
        held.calls -= reserved.calls;
        held.prompt_tokens -= reserved.prompt_tokens;
        held.completion_tokens -= reserved.completion_tokens;
        state.0 = state.0.plus(spent);
    }
}

/// See the module's text.
pub struct Budgeted {
    inner: Arc<dyn ChatModel>,
    budget: Arc<Budget>,
}

impl Budgeted {
    /// Wraps a model.
    pub fn new(inner: Arc<dyn ChatModel>, budget: Arc<Budget>) -> Budgeted {
        Budgeted { inner, budget }
    }

    fn within<T>(
        &self,
        call: &Call,
        need: Ledger,
        work: impl FnOnce(&Call) -> Result<T>,
        cost: impl FnOnce(&Result<T>) -> Ledger,
    ) -> Result<T> {
        self.budget.reserve(need)?;
        let mut call = call.clone();
        if let Some(seconds) = self.budget.limit.seconds {
            // A limit beyond what a clock can tell is none.
            let total = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
            call = match total.checked_sub(self.budget.begun.elapsed()) {
                Some(left) if left < Duration::from_secs(1 << 30) => call.within(left),
                _ => call,
            };
        }
        let result = work(&call);
        self.budget.settle(need, cost(&result));
        result
    }

    fn prompt(&self, tokens: TokenCount) -> Ledger {
        Ledger {
            calls: 1,
            prompt_tokens: tokens.planned() as u64,
            completion_tokens: 0,
        }
    }
}

/// What a call cost that failed: nothing where it was not sent, all its prompt where something came back.
fn cost_of_failure(error: &ChatError, need: Ledger, written: usize) -> Ledger {
    let sent = error.retryable() || matches!(error, ChatError::Cancelled { .. });
    Ledger {
        calls: u64::from(sent),
        prompt_tokens: if sent { need.prompt_tokens } else { 0 },
        completion_tokens: written as u64,
    }
}

impl ChatModel for Budgeted {
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
        let mut need = self.prompt(self.inner.count(&request.input)?);
        need.completion_tokens = request.max_tokens as u64;
        let work = |call: &Call| self.inner.reply(request, call, on_text);
        self.within(call, need, work, |result| match result {
            Ok(reply) => Ledger {
                calls: 1,
                prompt_tokens: reply.usage.prompt as u64,
                completion_tokens: reply.usage.completion as u64,
            },
            Err(error) => {
                let written = self.inner.count_text(error.partial());
                let written = written
                    .map_or(0, |count| count.tokens)
                    .min(request.max_tokens);
                cost_of_failure(error, need, written)
            }
        })
    }

    fn score(&self, prompt: &str, continuation: &str, call: &Call) -> Result<Vec<TokenScore>> {
        let text = Input::Text(format!("{prompt}{continuation}"));
        let need = self.prompt(self.inner.count(&text)?);
        let work = |call: &Call| self.inner.score(prompt, continuation, call);
        self.within(call, need, work, |result| match result {
            Ok(_) => need,
            Err(error) => cost_of_failure(error, need, 0),
        })
    }

    fn embed(&self, texts: &[String], call: &Call) -> Result<Embeddings> {
        let mut need = Ledger {
            calls: 1,
            ..Ledger::default()
        };
        for text in texts {
            need.prompt_tokens += self.inner.count_text(text)?.planned() as u64;
        }
        let work = |call: &Call| self.inner.embed(texts, call);
        self.within(call, need, work, |result| match result {
            Ok(_) => need,
            Err(error) => cost_of_failure(error, need, 0),
        })
    }

    fn next_token(&self, request: &Request, call: &Call) -> Result<Distribution> {
        let mut need = self.prompt(self.inner.count(&request.input)?);
        need.completion_tokens = 1;
        let work = |call: &Call| self.inner.next_token(request, call);
        self.within(call, need, work, |result| match result {
            Ok(_) => need,
            Err(error) => cost_of_failure(error, need, 0),
        })
    }

    fn prepare(&self, input: &Input, call: &Call) -> Result<()> {
        // The requests that follow pay for these tokens.
        self.inner.prepare(input, call)
    }
}
