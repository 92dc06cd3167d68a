//! The local engine as a target: any model with any context policy. A document that several
//! samples share is read once; reuse starts at fixed cuts of the document, so that a reply does
//! not depend on which samples came before.

use super::{Cost, Output, Target};
use crate::count::Counter;
use crate::error::{EvalError, Result};
use crate::ppl;
use crate::task::{Likelihood, Prompt, Sample, Segment, Truncation, Work};
use longspan_agents::chat::local::ModelError;
use longspan_agents::{Finish, Limits, LocalModel, Message, Role};
use longspan_data::tokenize::Special;
use longspan_infer::decode::{DecodeConfig, SamplingConfig};
use longspan_infer::engine::Want;
use longspan_infer::prefix::PrefixCache;
use longspan_infer::{EngineError, EngineOptions, Sequence};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Whether prompts stand in the model's chat template.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ChatMode {
    /// Where the checkpoint brings one.
    #[default]
    Auto,
    /// Never: the text alone.
    Never,
}

/// How the local engine is used.
#[derive(Clone, Debug)]
pub struct LocalOptions {
    /// Context policy and type of keys and values.
    pub engine: EngineOptions,
    /// Chat template or plain text.
    pub chat: ChatMode,
    /// Decoding strategy.
    pub decode: DecodeConfig,
    /// Read shared documents once.
    pub reuse: bool,
    /// Bytes of keys and values kept for that.
    pub reuse_bytes: u64,
    /// Refuse samples whose keys and values would need more bytes than this.
    pub memory_bytes: Option<u64>,
}

/// See the module's text.
pub struct Local {
    model: Arc<LocalModel>,
    name: String,
    options: LocalOptions,
    counter: Framed,
    /// The engine uses all cores for one sequence: samples take turns.
    state: Mutex<PrefixCache>,
    cancelled: Box<dyn Fn() -> bool + Send + Sync>,
}

/// The model's tokenizer, with what a prompt gets around its text.
struct Framed {
    model: Arc<LocalModel>,
    overhead: usize,
}

impl Counter for Framed {
    fn count(&self, text: &str) -> Result<usize> {
        self.model.tokenizer.count(text)
    }

    fn cut<'t>(&self, text: &'t str, tokens: usize) -> Result<&'t str> {
        self.model.tokenizer.cut(text, tokens)
    }

    fn overhead(&self) -> usize {
        self.overhead
    }

    fn name(&self) -> String {
        self.model.tokenizer.name()
    }
}

/// Tokens between the cuts at which a policy that can rewind may reuse a prefix.
const CUT: usize = 256;

impl Local {
    /// `name` is the model's name in reports; `cancelled` is asked between chunks.
    ///
    /// # Errors
    /// A context policy or decoding strategy that cannot be used with this model.
    pub fn new(
        model: Arc<LocalModel>,
        name: &str,
        options: LocalOptions,
        cancelled: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Result<Local> {
        let input = |error: &dyn std::fmt::Display| EvalError::Input(error.to_string());
        model
            .engine
            .sequence(&options.engine, None)
            .map_err(|e| input(&e))?;
        options
            .decode
            .build(&greedy(), 0, None)
            .map_err(|e| input(&e))?;
        let mut local = Local {
            counter: Framed {
                model: Arc::clone(&model),
                overhead: 0,
            },
            model,
            name: name.into(),
            state: Mutex::new(PrefixCache::new(options.reuse_bytes)),
            options,
            cancelled: Box::new(cancelled),
        };
        let text = Prompt {
            segments: vec![Segment::Unique("text".into())],
            ..Prompt::default()
        };
        let (shared, rest, _) = local.tokens(&text)?;
        let bare = local.model.tokenizer.count("text")?;
        local.counter.overhead = (shared.len() + rest.len()).saturating_sub(bare);
        Ok(local)
    }

    /// The prompt's tokens: what samples may share, and the rest.
    fn tokens(&self, prompt: &Prompt) -> Result<(Vec<u32>, Vec<u32>, bool)> {
        let model = &self.model;
        let tokenizer = &model.tokenizer;
        let encode = |text: &str, special| {
            tokenizer
                .encode(text, special)
                .map_err(|e| EvalError::Input(e.to_string()))
        };
        const MARK: &str = "\u{1}text\u{1}";
        let (mut head, mut tail) = (String::new(), String::new());
        let mut chat = self.options.chat == ChatMode::Auto && !prompt.raw && model.chats();
        if chat {
            let text = model
                .render(&[Message::new(Role::User, MARK)])
                .map_err(|e| EvalError::Input(e.to_string()))?;
            match text.split_once(MARK) {
                Some((before, after)) => (head, tail) = (before.into(), after.into()),
                // A template that changes the message cannot frame it.
                None => chat = false,
            }
        }
        // Templates write the beginning-of-text token themselves where the model wants it.
        let special = if chat {
            Special::Parse
        } else {
            Special::ParseWithBos
        };
        let mut shared = encode(&head, special)?;
        let (mut rest, mut prefix) = (Vec::new(), String::new());
        let mut truncated = false;
        let mut segments = prompt.segments.clone();
        if let Truncation::Middle(most) = prompt.truncation {
            let text: String = segments
                .iter()
                .filter(|segment| !matches!(segment, Segment::AnswerPrefix(_)))
                .map(Segment::text)
                .collect();
            let ids = encode(&text, Special::None)?;
            if ids.len() > most {
                let half = most / 2;
                let (start, end) = (&ids[..half], &ids[ids.len() - half..]);
                let cut = tokenizer.decode(start) + &tokenizer.decode(end);
                segments.retain(|segment| matches!(segment, Segment::AnswerPrefix(_)));
                segments.insert(0, Segment::Unique(cut));
                truncated = true;
            }
        }
        for segment in &segments {
            match segment {
                Segment::Shared(text) if rest.is_empty() => {
                    shared.extend(encode(text, Special::None)?)
                }
                Segment::Shared(_) | Segment::Unique(_) => {
                    rest.extend(encode(segment.text(), Special::None)?)
                }
                Segment::AnswerPrefix(text) => prefix.push_str(text),
            }
        }
        rest.extend(encode(&tail, Special::Parse)?);
        // After a turn's opener the answer starts without the space that parts it from the question.
        let prefix = if chat { prefix.trim_start() } else { &prefix };
        rest.extend(encode(prefix, Special::None)?);
        if rest.is_empty() {
            // Something must be read after what is kept, so that there are logits.
            rest.extend(shared.pop());
        }
        Ok((shared, rest, truncated))
    }

    /// A sequence that has read `shared`, and how many of its tokens were read before.
    fn read_shared(&self, cache: &mut PrefixCache, shared: &[u32]) -> Result<(Sequence, usize)> {
        let engine = &self.model.engine;
        let mut sequence = None;
        if self.options.reuse {
            // One token more than there is, as a prefix is found only short of the whole.
            let mut probe = shared.to_vec();
            probe.push(u32::MAX);
            sequence = cache
                .find(engine, &probe, |kept| {
                    kept.options().context == self.options.engine.context
                })
                .map_err(failed)?;
        }
        let mut sequence = match sequence {
            Some(sequence) => sequence,
            None => engine
                .sequence(&self.options.engine, None)
                .map_err(failed)?,
        };
        let chunk = if sequence.spec().rewinds {
            CUT.min(sequence.spec().chunk)
        } else {
            sequence.spec().chunk
        };
        if sequence.len() < shared.len() {
            let cut = sequence.len() / chunk * chunk;
            if cut < sequence.len() {
                match engine.truncate(&mut sequence, cut) {
                    Ok(()) => {}
                    Err(EngineError::Refused(_)) => {
                        sequence = engine
                            .sequence(&self.options.engine, None)
                            .map_err(failed)?;
                    }
                    Err(error) => return Err(failed(error)),
                }
            }
        }
        let before = sequence.len();
        for piece in shared[before..].chunks(chunk) {
            if (self.cancelled)() {
                return Err(EvalError::Interrupted { done: 0, total: 0 });
            }
            engine
                .forward(&mut [(&mut sequence, piece)], Want::Nothing)
                .map_err(failed)?;
        }
        if self.options.reuse && before < shared.len() {
            cache.keep(sequence.fork());
        }
        Ok((sequence, before))
    }

    fn generate(&self, sample: &Sample, seed: u64) -> Result<Output> {
        let Work::Generate(decode) = &sample.work else {
            return Err(EvalError::Target("this sample asks for no text".into()));
        };
        let (shared, rest, truncated) = self.tokens(&sample.prompt)?;
        let mut output = Output {
            tokens_in: shared.len() + rest.len(),
            truncated,
            ..Output::default()
        };
        if let Some(reason) = self.too_large(output.tokens_in + decode.max_new) {
            output.error = Some(reason);
            return Ok(output);
        }
        let mut cache = self
            .state
            .lock()
            .unwrap_or_else(|poison| poison.into_inner());
        let start = Instant::now();
        let (mut sequence, cached) = self.read_shared(&mut cache, &shared)?;
        let logits = self
            .model
            .engine
            .prefill(&mut sequence, &rest, &mut |_, _| {
                Ok(if (self.cancelled)() {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                })
            })
            .map_err(failed)?;
        let prefill_s = start.elapsed().as_secs_f64();
        let stream = stream(seed, &sample.id);
        let mut strategy = self
            .options
            .decode
            .build(&greedy(), stream, None)
            .map_err(|e| EvalError::Input(e.to_string()))?;
        let limits = Limits {
            max_tokens: decode.max_new,
            stop: decode.stop.clone(),
        };
        let generation = self
            .model
            .generate(&mut sequence, logits, &mut *strategy, &limits, &mut |_| {
                if (self.cancelled)() {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            })
            .map_err(|error| match error {
                ModelError::Engine(error) => failed(error),
                error => EvalError::Target(error.to_string()),
            })?;
        output.finish = match generation.finish {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Cancelled => return Err(EvalError::Interrupted { done: 0, total: 0 }),
        }
        .into();
        output.text = generation.text;
        output.tokens_out = generation.choices.len();
        let bytes = sequence.kv_bytes();
        output.cost = Cost {
            prefill_s,
            decode_s: generation.elapsed.as_secs_f64(),
            cached_tokens: cached,
            kv_bytes: bytes.memory + bytes.disk,
            from_cache: false,
        };
        Ok(output)
    }

    fn likelihood(&self, sample: &Sample) -> Result<Output> {
        let Work::Likelihood { protocol, tokens } = sample.work else {
            return Err(EvalError::Target(
                "this sample asks for no likelihood".into(),
            ));
        };
        let tokenizer = &self.model.tokenizer;
        let text = sample.prompt.text();
        let mut ids = tokenizer
            .encode(&text, Special::None)
            .map_err(|e| EvalError::Input(e.to_string()))?;
        let mut output = Output {
            finish: "stop".into(),
            ..Output::default()
        };
        if ids.len() < tokens {
            output.error = Some(format!(
                "the document has {} tokens, fewer than the {tokens} asked for",
                ids.len()
            ));
            return Ok(output);
        }
        ids.truncate(tokens);
        if let Some(reason) = self.too_large(tokens) {
            output.error = Some(reason);
            return Ok(output);
        }
        let _turn = self
            .state
            .lock()
            .unwrap_or_else(|poison| poison.into_inner());
        // BOS stands before the text where the tokenizer adds one by itself.
        let with = tokenizer
            .encode("", Special::ParseWithBos)
            .map_err(|e| EvalError::Input(e.to_string()))?;
        let start = Instant::now();
        let mut kv_bytes = 0;
        let nll = ppl::nll(
            &self.model.engine,
            &self.options.engine,
            &with,
            &ids,
            protocol,
            &mut |sequence| {
                let bytes = sequence.kv_bytes();
                kv_bytes = kv_bytes.max(bytes.memory + bytes.disk);
                !(self.cancelled)()
            },
        )?;
        let scored: usize = ids
            .iter()
            .zip(&nll)
            .filter(|(_, nll)| nll.is_some())
            .map(|(&id, _)| tokenizer.token_bytes(id).len())
            .sum();
        output.tokens_in = ids.len();
        output.likelihood = Some(Likelihood {
            nll,
            bytes: scored,
            words: tokenizer.decode(&ids).split_whitespace().count(),
            bos: !with.is_empty(),
        });
        output.cost = Cost {
            prefill_s: start.elapsed().as_secs_f64(),
            kv_bytes,
            ..Cost::default()
        };
        Ok(output)
    }

    /// Why this many tokens do not fit in memory.
    fn too_large(&self, tokens: usize) -> Option<String> {
        let limit = self.options.memory_bytes?;
        let c = self.model.engine.model().config();
        let per_token = (2 * 2 * c.num_layers * c.num_kv_heads * c.head_dim) as u64;
        let bytes = tokens as u64 * per_token;
        (bytes > limit).then(|| {
            format!("skipped: memory: keys and values of {tokens} tokens need {bytes} bytes, {limit} are free")
        })
    }
}

/// The sampling options of strategies without their own: the likeliest token.
fn greedy() -> SamplingConfig {
    SamplingConfig {
        temperature: 0.0,
        ..SamplingConfig::default()
    }
}

fn failed(error: EngineError) -> EvalError {
    match error {
        EngineError::Cancelled { .. } => EvalError::Interrupted { done: 0, total: 0 },
        error => EvalError::Target(error.to_string()),
    }
}

/// The stream of random numbers of a sample: from the run's seed and the sample alone.
pub(crate) fn stream(seed: u64, id: &str) -> u64 {
    let mut hash = blake3::Hasher::new();
    hash.update(&seed.to_le_bytes());
    hash.update(id.as_bytes());
    u64::from_le_bytes(hash.finalize().as_bytes()[..8].try_into().expect("8 bytes"))
}

impl Target for Local {
    fn model(&self) -> String {
        self.name.clone()
    }

    fn policy(&self) -> String {
        self.options.engine.context.to_string()
    }

    fn identity(&self) -> Option<String> {
        Some(format!(
            "{} {:016x} {} {:?} {:?} {} cut{CUT}",
            self.model.engine.fingerprint(),
            self.model.tokenizer.fingerprint(),
            self.options.engine.context,
            self.options.engine.kv,
            self.options.chat,
            self.options.decode,
        ))
    }

    fn counter(&self) -> &dyn Counter {
        &self.counter
    }

    fn concurrency(&self) -> usize {
        1
    }

    fn run(&self, sample: &Sample, seed: u64) -> Result<Output> {
        match sample.work {
            Work::Generate(_) => self.generate(sample, seed),
            Work::Likelihood { .. } => self.likelihood(sample),
            Work::Search { .. } => Ok(Output {
                error: Some(super::search::NO_SEARCH.into()),
                ..Output::default()
            }),
        }
    }
}
