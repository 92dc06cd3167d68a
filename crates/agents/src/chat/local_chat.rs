//! The local engine behind the chat seam: conversations and plain texts, with the keys and values of common
//! beginnings kept from one request to the next.
//!
//! A reply does not depend on what was asked before: prompts are read in steps of fixed size, and only whole steps
//! are taken over from earlier requests. Policies that cannot rewind go on from an earlier talk as a whole instead.

use super::local::{Finish, Generation, Limits, LocalModel, ModelError, listed, token_text};
use super::model::{
    Ability, Call, Card, ChatError, ChatModel, Input, OnText, Reply, Request, Result, TokenCount,
    TokenScore, Usage,
};
use super::wire::TokenLogprob;
use longspan_data::tokenize::Special;
use longspan_infer::context::ContextConfig;
use longspan_infer::decode::logits::log_sum_exp;
use longspan_infer::engine::Want;
use longspan_infer::key_context::Distribution;
use longspan_infer::prefix::PrefixCache;
use longspan_infer::{EngineError, EngineOptions, Sequence};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

/// Tokens between the places at which an earlier prompt can be taken over.
const STEP: usize = 256;

/// See the module's text. The engine uses all cores for one sequence, so requests take turns.
pub struct LocalChat {
    model: Arc<LocalModel>,
    options: EngineOptions,
    card: Card,
    kept: Mutex<PrefixCache>,
}

impl LocalChat {
    /// `name` is what people call the model; `keep_bytes` is memory for keys and values of earlier prompts.
    ///
    /// # Errors
    /// A policy that does not fit the model.
    pub fn new(
        model: Arc<LocalModel>,
        name: &str,
        options: EngineOptions,
        keep_bytes: u64,
    ) -> Result<LocalChat> {
        model
            .engine
            .sequence(&options, None)
            .map_err(ModelError::from)?;
        let abilities = vec![
            Ability::Chat,
            Ability::Complete,
            Ability::Logprobs,
            Ability::Score,
            Ability::AnswerPrefix,
            Ability::Seed,
            Ability::Decode,
            Ability::Prepare,
        ];
        // Other policies than full attention read texts of any length.
        let window = (options.context == ContextConfig::Full)
            .then(|| usize::try_from(model.engine.window()).unwrap_or(usize::MAX));
        let card = Card {
            name: name.into(),
            fingerprint: format!(
                "{} {:016x} {} {:?}",
                model.engine.fingerprint(),
                model.tokenizer.fingerprint(),
                options.context,
                options.kv
            ),
            window,
            abilities,
            embedding_dim: None,
        };
        Ok(LocalChat {
            model,
            options,
            card,
            kept: Mutex::new(PrefixCache::new(keep_bytes)),
        })
    }

    /// The model underneath.
    pub fn model(&self) -> &Arc<LocalModel> {
        &self.model
    }

    fn tokens(&self, input: &Input, answer_prefix: &str) -> Result<Vec<u32>> {
        let tokenizer = &self.model.tokenizer;
        let mut tokens = match input {
            Input::Chat(messages) if messages.is_empty() => {
                return Err(ChatError::BadRequest(
                    "a conversation without messages found, at least one expected".into(),
                ));
            }
            Input::Chat(messages) => self.model.conversation(messages)?,
            Input::Text(text) => tokenizer
                .encode(text, Special::ParseWithBos)
                .map_err(ModelError::from)?,
        };
        let prefix = tokenizer
            .encode(answer_prefix, Special::None)
            .map_err(ModelError::from)?;
        tokens.extend(prefix);
        if tokens.is_empty() {
            return Err(ChatError::BadRequest("the prompt is empty".into()));
        }
        Ok(tokens)
    }

    /// The engine's turn.
    fn lock(&self, call: &Call) -> Result<MutexGuard<'_, PrefixCache>> {
        loop {
            match self.kept.try_lock() {
                Ok(guard) => return Ok(guard),
                Err(TryLockError::Poisoned(poison)) => return Ok(poison.into_inner()),
                Err(TryLockError::WouldBlock) => {
                    call.check("")?;
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }

    /// A sequence that has read a beginning of `tokens` shorter than the whole.
    fn begin(&self, kept: &mut PrefixCache, tokens: &[u32]) -> Result<Sequence, ModelError> {
        let engine = &self.model.engine;
        let found = kept.find(engine, tokens, |earlier| {
            earlier.options().context == self.options.context
        })?;
        if let Some(mut sequence) = found {
            let whole_steps = sequence.len() / STEP * STEP;
            if !sequence.spec().rewinds || whole_steps == sequence.len() {
                return Ok(sequence);
            }
            match engine.truncate(&mut sequence, whole_steps) {
                Ok(()) if whole_steps > 0 => return Ok(sequence),
                Ok(()) | Err(EngineError::Refused(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(engine.sequence(&self.options, None)?)
    }

    /// Reads the rest of `tokens` and gives the logits after them.
    fn read(
        &self,
        sequence: &mut Sequence,
        tokens: &[u32],
        call: &Call,
        on_text: OnText<'_>,
    ) -> Result<Vec<f32>> {
        let engine = &self.model.engine;
        let stopped = |_: EngineError| {
            call.check("").err().unwrap_or(ChatError::Cancelled {
                partial: String::new(),
            })
        };
        let go_on = |on_text: OnText<'_>| match call.check("").is_err() || on_text("").is_break() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        };
        if go_on(on_text).is_break() {
            return Err(stopped(EngineError::Cancelled { read: 0, total: 0 }));
        }
        if sequence.spec().rewinds {
            // All but the last piece in calls that begin and end at whole steps, whatever was taken over.
            let last = (tokens.len() - 1) / STEP * STEP;
            sequence.expect_length(tokens.len());
            while sequence.len() < last {
                let piece = &tokens[sequence.len()..sequence.len() + STEP];
                engine
                    .forward(&mut [(sequence, piece)], Want::Nothing)
                    .map_err(ModelError::from)?;
                if go_on(on_text).is_break() {
                    return Err(stopped(EngineError::Cancelled { read: 0, total: 0 }));
                }
            }
        }
        let rest = &tokens[sequence.len()..];
        match engine.prefill(sequence, rest, &mut |_, _| Ok(go_on(on_text))) {
            Err(error @ EngineError::Cancelled { .. }) => Err(stopped(error)),
            other => Ok(other.map_err(ModelError::from)?),
        }
    }

    fn logprobs(&self, generation: &Generation) -> Vec<TokenLogprob> {
        let tokenizer = &self.model.tokenizer;
        let written = generation.choices.iter().filter(|choice| {
            !tokenizer.eos_ids().contains(&choice.token) && !choice.logprob.is_nan()
        });
        written.map(|choice| listed(tokenizer, choice)).collect()
    }
}

impl ChatModel for LocalChat {
    fn card(&self) -> &Card {
        &self.card
    }

    fn count(&self, input: &Input) -> Result<TokenCount> {
        Ok(TokenCount {
            tokens: self.tokens(input, "")?.len(),
            exact: true,
        })
    }

    fn count_text(&self, text: &str) -> Result<TokenCount> {
        let tokens = self.model.tokenizer.encode(text, Special::None);
        Ok(TokenCount {
            tokens: tokens.map_err(ModelError::from)?.len(),
            exact: true,
        })
    }

    fn reply(&self, request: &Request, call: &Call, on_text: OnText<'_>) -> Result<Reply> {
        request
            .sampling
            .validate()
            .map_err(|error| ChatError::BadRequest(error.to_string()))?;
        if request.max_tokens == 0 {
            return Err(ChatError::BadRequest(
                "max_tokens: 0 found, at least 1 expected".into(),
            ));
        }
        let mut strategy = request
            .decode
            .build(&request.sampling, 0, None)
            .map_err(|error| ChatError::BadRequest(error.to_string()))?;
        call.check("")?;
        let tokens = self.tokens(&request.input, &request.answer_prefix)?;
        let needed = tokens.len() + request.max_tokens;
        if let Some(max) = self.card.window.filter(|&max| needed > max) {
            return Err(ChatError::ContextOverflow {
                tokens: needed,
                max,
            });
        }
        let start = Instant::now();
        let mut kept = self.lock(call)?;
        let mut sequence = self.begin(&mut kept, &tokens)?;
        let cached = sequence.len();
        let logits = self.read(&mut sequence, &tokens, call, on_text)?;
        let rewinds = sequence.spec().rewinds;
        if rewinds {
            kept.keep(sequence.fork());
        }
        let limits = Limits {
            max_tokens: request.max_tokens,
            stop: request.stop.clone(),
        };
        let mut first = None;
        let mut partial = String::new();
        let mut stopped = None;
        let generation = self.model.generate(
            &mut sequence,
            logits,
            &mut *strategy,
            &limits,
            &mut |piece| {
                first.get_or_insert_with(|| start.elapsed());
                partial.push_str(piece);
                if let Err(error) = call.check(&partial) {
                    stopped = Some(error);
                    return ControlFlow::Break(());
                }
                on_text(piece)
            },
        )?;
        if let Some(error) = stopped {
            return Err(error);
        }
        if generation.finish == Finish::Cancelled {
            return Err(ChatError::Cancelled { partial });
        }
        if !rewinds {
            kept.keep(sequence);
        }
        Ok(Reply {
            logprobs: match request.sampling.logprobs {
                Some(_) => self.logprobs(&generation),
                None => Vec::new(),
            },
            finish: generation.finish,
            usage: Usage {
                prompt: tokens.len(),
                cached,
                completion: generation.choices.len(),
                exact: true,
            },
            text: generation.text,
            first_s: first.unwrap_or_else(|| start.elapsed()).as_secs_f64(),
            total_s: start.elapsed().as_secs_f64(),
            from_cache: false,
        })
    }

    fn score(&self, prompt: &str, continuation: &str, call: &Call) -> Result<Vec<TokenScore>> {
        let tokenizer = &self.model.tokenizer;
        let encode = |text: &str| tokenizer.encode(text, Special::ParseWithBos);
        let tokens = encode(&format!("{prompt}{continuation}")).map_err(ModelError::from)?;
        if let Some(max) = self.card.window.filter(|&max| tokens.len() > max) {
            return Err(ChatError::ContextOverflow {
                tokens: tokens.len(),
                max,
            });
        }
        // Tokens that begin in the continuation, found from its end: what a start token or an unknown one of the
        // prompt stands for does not matter.
        let mut left = continuation.len();
        let mut first = tokens.len();
        while first > 0 {
            let bytes = tokenizer.token_bytes(tokens[first - 1]).len();
            if left == 0 || bytes > left {
                break;
            }
            left -= bytes;
            first -= 1;
        }
        let first = first.max(1);
        let _turn = self.lock(call)?;
        let engine = &self.model.engine;
        let vocab = engine.model().config().vocab_size;
        let mut sequence = engine
            .sequence(&self.options, None)
            .map_err(ModelError::from)?;
        sequence.expect_length(tokens.len());
        let mut scores = Vec::new();
        let mut index = 0;
        for piece in tokens.chunks(STEP) {
            call.check("")?;
            let wanted = index + piece.len() >= first;
            let want = if wanted { Want::All } else { Want::Nothing };
            let logits = engine
                .forward(&mut [(&mut sequence, piece)], want)
                .map_err(ModelError::from)?;
            // Row i of a call tells of the token after its i-th: [tokens, vocab]
            for (row, logits) in logits.chunks_exact(vocab).enumerate() {
                let next = index + row + 1;
                let Some(&token) = tokens.get(next).filter(|_| next >= first) else {
                    continue;
                };
                let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                scores.push(TokenScore {
                    token: token_text(tokenizer, token).0,
                    logprob: logits[token as usize] - log_sum_exp(logits, top),
                });
            }
            index += piece.len();
        }
        Ok(scores)
    }

    fn next_token(&self, request: &Request, call: &Call) -> Result<Distribution> {
        let tokens = self.tokens(&request.input, &request.answer_prefix)?;
        if let Some(max) = self.card.window.filter(|&max| tokens.len() > max) {
            return Err(ChatError::ContextOverflow {
                tokens: tokens.len(),
                max,
            });
        }
        let mut kept = self.lock(call)?;
        let mut sequence = self.begin(&mut kept, &tokens)?;
        let logits = self.read(&mut sequence, &tokens, call, &mut super::model::ignore)?;
        Ok(Distribution::Logits(logits))
    }

    fn prepare(&self, input: &Input, call: &Call) -> Result<()> {
        let tokens = self.tokens(input, "")?;
        let mut kept = self.lock(call)?;
        let mut sequence = self.begin(&mut kept, &tokens)?;
        if !sequence.spec().rewinds {
            return Ok(());
        }
        // What follows the text begun is not known, and its last tokens may merge with it: whole steps only.
        while sequence.len() + STEP <= tokens.len() {
            call.check("")?;
            let piece = &tokens[sequence.len()..sequence.len() + STEP];
            self.model
                .engine
                .forward(&mut [(&mut sequence, piece)], Want::Nothing)
                .map_err(ModelError::from)?;
        }
        if !sequence.is_empty() {
            kept.keep(sequence);
        }
        Ok(())
    }
}
