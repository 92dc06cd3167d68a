//! Self-controlled memory: a chat of any length with a fixed window. Every turn is kept with a summary and an
//! embedding; a controller decides per request which old turns return, whole, shortened or not at all; the
//! turn just before (flash memory) always does. Paper 45, arXiv 2304.13343.

pub mod controller;
pub mod stream;

use crate::chat::model::{Call, ChatError, ChatModel, Input, OnText, Reply, Request};
use crate::chat::template::{Message, Role};
use crate::rag::embed::{EmbedError, Embedder, Kind};
use controller::{Activation, Candidate, Form, yes_or_no};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use stream::{Item, MemoryStream, cosine};

/// Which controller decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The paper's: is memory needed, relevance and recency, do summaries suffice.
    #[default]
    Paper,
    /// The published code's: similar turns, judged one by one when they do not fit.
    Code,
    /// Similar turns while they fit; no questions.
    Naive,
    /// No long-term memory: the last turns that fit the window.
    None,
}

impl std::str::FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "paper" => Ok(Mode::Paper),
            "code" => Ok(Mode::Code),
            "naive" => Ok(Mode::Naive),
            "none" => Ok(Mode::None),
            _ => Err(format!(
                "memory mode `{text}`, expected paper, code, naive or none"
            )),
        }
    }
}

/// How relevance and recency become one score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Combine {
    /// relevance + w recency
    #[default]
    Sum,
    /// relevance * recency
    Product,
}

/// The method's constants. The defaults are the paper's, or its code's where the paper is silent; only
/// `recency_weight` is ours.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScmConfig {
    /// Which controller.
    pub mode: Mode,
    /// Turns activated.
    pub k: usize,
    /// Most tokens of prompt and answer; the model's own window where that is smaller.
    pub window: usize,
    /// Most tokens of activated turns and the turn before; none: 0.625 of the window.
    pub history_tokens: Option<usize>,
    /// A turn before of more tokens is shown as its summary; none: 0.125 of the window.
    pub flash_tokens: Option<usize>,
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// Weight of recency. The paper's sum has 1: then a turn of 150 turns ago falls behind any recent one, as
    /// recency has halved and cosines seldom differ by as much. 0.1 lets recency decide between equals only.
    pub recency_weight: f64,
    /// Recency after n turns without an access is this to the n.
    pub decay: f64,
    /// How both become one score.
    pub combine: Combine,
    /// Scale relevance and recency to 0..1 first.
    pub normalise: bool,
    /// Ask the model whether the input needs memory.
    pub activation_question: bool,
    /// Ask the model whether summaries suffice.
    pub sufficiency_question: bool,
    /// Show the turn before.
    pub flash: bool,
    /// Embed summaries instead of texts.
    pub embed_summary: bool,
    /// Turns whose summary request has more tokens than this are summarised.
    pub summary_above: usize,
}

impl Default for ScmConfig {
    fn default() -> Self {
        ScmConfig {
            mode: Mode::Paper,
            k: 6,
            window: 4000,
            history_tokens: None,
            flash_tokens: None,
            max_tokens: 1024,
            recency_weight: 0.1,
            decay: 0.995,
            combine: Combine::Sum,
            normalise: false,
            activation_question: true,
            sufficiency_question: true,
            flash: true,
            embed_summary: false,
            summary_above: 300,
        }
    }
}

impl From<EmbedError> for ScmError {
    fn from(error: EmbedError) -> Self {
        ScmError::Embed(Box::new(error))
    }
}

/// Why a turn fails. What was remembered before stays as it was.
#[derive(Debug, thiserror::Error)]
pub enum ScmError {
    /// The model.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// The embedder.
    #[error(transparent)]
    Embed(Box<EmbedError>),
    /// The file.
    #[error("the memory {}: {source}", path.display())]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rusqlite::Error,
    },
    /// The folder of the file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A database of something else.
    #[error("{}: a database, but not one of memories; name another file", path.display())]
    NoMemory {
        /// The file.
        path: PathBuf,
    },
    /// Two talks write one memory.
    #[error("{}: another process added turn {turn} to this memory meanwhile; start again", path.display())]
    Shared {
        /// The file.
        path: PathBuf,
        /// The turn.
        turn: usize,
    },
    /// An option.
    #[error("memory: {option} is {found}, expected {expected}")]
    Option {
        /// Its name.
        option: &'static str,
        /// Its value.
        found: String,
        /// The values that make sense.
        expected: &'static str,
    },
}

/// An answered turn.
#[derive(Clone, Debug)]
pub struct Turn {
    /// The answer.
    pub reply: Reply,
    /// What the controller decided.
    pub activation: Activation,
    /// The conversation as the model saw it.
    pub messages: Vec<Message>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Why the turn has no summary yet, if making one failed; it is tried again with the next turn.
    pub summary_failed: Option<String>,
}

/// A conversation with a memory.
pub struct Scm {
    stream: MemoryStream,
    config: ScmConfig,
}

const TASK: &str = "You are talking with a person. Below are turns of the same conversation that were said earlier, then the newest input after ###. Answer the newest input, and use what was said earlier where it helps.";

impl Scm {
    /// Goes on with a stream. Counts of tokens are made anew if another model counted, embeddings if another
    /// embedder made them.
    ///
    /// # Errors
    /// Options that make no sense; counting, embedding and writing.
    pub fn new(
        stream: MemoryStream,
        config: ScmConfig,
        model: &dyn ChatModel,
        embedder: &dyn Embedder,
    ) -> Result<Scm, ScmError> {
        let option = |option, found: String, expected| {
            Err(ScmError::Option {
                option,
                found,
                expected,
            })
        };
        if config.k == 0 {
            return option("k", "0".into(), "at least 1");
        }
        if !(0.0..=1.0).contains(&config.decay) {
            return option("decay", config.decay.to_string(), "0 to 1");
        }
        let mut scm = Scm { stream, config };
        if scm.window(model) <= scm.config.max_tokens {
            let found = scm.config.max_tokens.to_string();
            return option("max_tokens", found, "less than the window");
        }
        let counter = model.card().fingerprint.clone();
        let maker = format!("{} {}", embedder.id(), scm.config.embed_summary);
        let recount = scm.stream.note("tokenizer")?.as_ref() != Some(&counter);
        let reembed = scm.stream.note("embedder")?.as_ref() != Some(&maker);
        if recount || reembed {
            let mut items = scm.stream.items().to_vec();
            for item in &mut items {
                if recount {
                    item.text_tokens = model.count_text(&item.text)?.planned();
                    item.summary_tokens = model.count_text(&item.summary)?.planned();
                }
                if reembed {
                    item.embedding = scm.embedding(item, embedder)?;
                }
            }
            scm.stream
                .rewrite(items, &[("tokenizer", &counter), ("embedder", &maker)])?;
        }
        Ok(scm)
    }

    /// What is remembered.
    pub fn stream(&self) -> &MemoryStream {
        &self.stream
    }

    /// Takes the last turn back.
    ///
    /// # Errors
    /// See [`ScmError`].
    pub fn roll_back(&mut self) -> Result<bool, ScmError> {
        self.stream.roll_back()
    }

    /// Forgets everything.
    ///
    /// # Errors
    /// See [`ScmError`].
    pub fn reset(&mut self) -> Result<(), ScmError> {
        self.stream.reset()
    }

    fn window(&self, model: &dyn ChatModel) -> usize {
        let own = model.card().window.unwrap_or(usize::MAX);
        self.config.window.min(own)
    }

    fn history(&self, model: &dyn ChatModel) -> usize {
        let share = self.window(model) * 5 / 8;
        self.config.history_tokens.unwrap_or(share)
    }

    fn flash_limit(&self, model: &dyn ChatModel) -> usize {
        let share = self.window(model) / 8;
        self.config.flash_tokens.unwrap_or(share)
    }

    fn embedding(&self, item: &Item, embedder: &dyn Embedder) -> Result<Vec<f32>, ScmError> {
        let text = match self.config.embed_summary {
            true => &item.summary,
            false => &item.text,
        };
        Ok(embedder.embed(&[text], Kind::Passage)?)
    }

    /// One turn: activates, answers, remembers.
    ///
    /// # Errors
    /// See [`ScmError`]; a turn that fails or is stopped is not remembered.
    pub fn turn(
        &mut self,
        model: &dyn ChatModel,
        embedder: &dyn Embedder,
        request: &Request,
        system: Option<&str>,
        input: &str,
        call: &Call,
        on_text: OnText<'_>,
    ) -> Result<Turn, ScmError> {
        let activation = self.activate(model, embedder, input, call)?;
        let (messages, prompt_tokens) = self.assemble(model, &activation, system, input)?;
        let mut request = request.clone();
        request.input = Input::Chat(messages.clone());
        request.max_tokens = self.config.max_tokens;
        request.stop.push("###".into());
        let reply = model.reply(&request, &call.step("scm", "answer"), on_text)?;
        let turn = self.stream.items().last().map_or(0, |item| item.turn) + 1;
        let text = turn_text(turn, input, reply.text.trim());
        let tokens = model.count_text(&text)?.planned();
        let mut item = Item {
            turn,
            user: input.into(),
            assistant: reply.text.trim().into(),
            summary: text.clone(),
            summarised: false,
            text_tokens: tokens,
            summary_tokens: tokens,
            last_access: turn,
            created: (std::time::SystemTime::now())
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |time| time.as_secs() as i64),
            embedding: Vec::new(),
            text,
        };
        item.embedding = self.embedding(&item, embedder)?;
        let activated: Vec<usize> = activation.items.iter().map(|entry| entry.0).collect();
        // On disk before anything else is asked of the model: a turn is never lost for its summary.
        self.stream.push(item, &activated)?;
        // A plain window shows no summaries; those of its turns are made when a controller needs them.
        let made = match self.config.mode {
            Mode::None => Ok(()),
            _ => self.summarise_missing(model, embedder, call),
        };
        let summary_failed = match made {
            Ok(()) => None,
            Err(error @ (ScmError::Sqlite { .. } | ScmError::Io { .. })) => return Err(error),
            Err(error) => Some(error.to_string()),
        };
        Ok(Turn {
            reply,
            activation,
            messages,
            prompt_tokens,
            summary_failed,
        })
    }

    /// Makes the summaries that are missing: the last turn's, and those of turns after which the process ended.
    fn summarise_missing(
        &mut self,
        model: &dyn ChatModel,
        embedder: &dyn Embedder,
        call: &Call,
    ) -> Result<(), ScmError> {
        let missing = self.stream.items().iter().filter(|item| !item.summarised);
        for mut item in missing.cloned().collect::<Vec<_>>() {
            let prompt = format!(
                "Below is one turn of a conversation between User and Assistant. Summarise what each of them said, in one sentence for each, and keep names, numbers and other key information.\n\n{}\n\nUser: {}\n\nAssistant: {}\n\nSummary:",
                "###", item.user, item.assistant
            );
            let mut request = Request::user(prompt).max_tokens(200);
            let count = model.count(&request.input)?.planned();
            let window = self.window(model);
            if count > self.config.summary_above && count < window {
                request.max_tokens = request.max_tokens.min(window - count);
                let reply = model.ask(&request, &call.step("scm", "summary"))?;
                let summary = reply.text.trim();
                let tokens = model.count_text(summary)?.planned();
                // A model that says nothing, or more than there was, has made no summary.
                if !summary.is_empty() && tokens < item.text_tokens {
                    item.summary = format!("[Turn {}] {summary}", item.turn);
                    item.summary_tokens = model.count_text(&item.summary)?.planned();
                }
            }
            item.summarised = true;
            if self.config.embed_summary {
                item.embedding = self.embedding(&item, embedder)?;
            }
            self.stream.rewrite(vec![item], &[])?;
        }
        Ok(())
    }

    /// Decides which turns return for this input. Positions are those of [`MemoryStream::items`]; the last
    /// turn, which is the flash memory, is never among them.
    ///
    /// # Errors
    /// See [`ScmError`].
    pub fn activate(
        &self,
        model: &dyn ChatModel,
        embedder: &dyn Embedder,
        input: &str,
        call: &Call,
    ) -> Result<Activation, ScmError> {
        let items = self.stream.items();
        // Without flash memory the last turn is a turn like the others.
        let older = items.len() - usize::from(self.config.flash).min(items.len());
        if older == 0 || self.config.mode == Mode::None {
            return Ok(Activation::default());
        }
        let query = embedder.embed(&[input], Kind::Query)?;
        let now = items.last().map_or(0, |item| item.turn) + 1;
        let candidate = |item: &Item| Candidate {
            text_tokens: item.text_tokens,
            summary_tokens: item.summary_tokens,
            relevance: cosine(&query, &item.embedding),
            age: now - item.last_access.min(now),
        };
        let candidates: Vec<Candidate> = items[..older].iter().map(candidate).collect();
        let flash = match self.config.flash {
            true => items.last().map_or(0, |last| {
                controller::flash_budget(&candidate(last), self.flash_limit(model))
            }),
            false => 0,
        };
        let history = self.history(model);
        let window = self.window(model);
        let call = call.step("scm", "controller");
        match self.config.mode {
            Mode::None => Ok(Activation::default()),
            Mode::Naive => Ok(controller::naive(&candidates, self.config.k, history).0),
            Mode::Code => controller::code(
                &candidates,
                flash,
                self.config.k,
                history,
                &mut |item, form| {
                    let shown = shown(&items[item], form);
                    let question = format!(
                        "Here is a part of an earlier conversation:\n\n{shown}\n\nCan the following input be answered from it?\n\nInput: {input}\n\nAnswer with one letter only: (A) yes, (B) no.\nAnswer:"
                    );
                    ask_yes_or_no(model, question, window, &call)
                },
            ),
            Mode::Paper => {
                let mut needed = || {
                    let flash = match (self.config.flash, items.last()) {
                        (true, Some(last)) => {
                            format!("The turn before was:\n\n{}\n\n", shown(last, Form::Summary))
                        }
                        _ => String::new(),
                    };
                    let question = format!(
                        "{flash}The new input is:\n\n{input}\n\nDoes answering it well need anything said earlier in the conversation?\n\nAnswer with one letter only: (A) yes, (B) no.\nAnswer:"
                    );
                    ask_yes_or_no(model, question, window, &call)
                };
                let mut suffices = |selected: &[usize]| {
                    let summaries: Vec<&str> = (selected.iter())
                        .map(|&item| shown(&items[item], Form::Summary))
                        .collect();
                    let question = format!(
                        "Summaries of earlier turns:\n\n{}\n\nInput: {input}\n\nDo these summaries suffice to answer the input, without the full turns?\n\nAnswer with one letter only: (A) yes, (B) no.\nAnswer:",
                        summaries.join("\n\n")
                    );
                    ask_yes_or_no(model, question, window, &call)
                };
                let config = &self.config;
                controller::paper(
                    &candidates,
                    flash,
                    history,
                    config,
                    &mut needed,
                    &mut suffices,
                )
            }
        }
    }

    /// The prompt, and its exact count: task, related turns, the turn before, ###, the input. What does not
    /// fit the window with the answer is left out, least relevant first.
    fn assemble(
        &self,
        model: &dyn ChatModel,
        activation: &Activation,
        system: Option<&str>,
        input: &str,
    ) -> Result<(Vec<Message>, usize), ScmError> {
        let room = self.window(model) - self.config.max_tokens;
        let fits = |messages: &[Message]| -> Result<(bool, usize), ScmError> {
            let tokens = model.count(&Input::Chat(messages.to_vec()))?.planned();
            Ok((tokens <= room, tokens))
        };
        let system: Vec<Message> = (system.iter())
            .map(|text| Message::new(Role::System, *text))
            .collect();
        let items = self.stream.items();
        if self.config.mode == Mode::None {
            // As many of the last turns as fit.
            let mut last: Option<(Vec<Message>, usize)> = None;
            for first in (0..=items.len()).rev() {
                let mut messages = system.clone();
                for item in &items[first..] {
                    messages.push(Message::new(Role::User, item.user.clone()));
                    messages.push(Message::new(Role::Assistant, item.assistant.clone()));
                }
                messages.push(Message::new(Role::User, input));
                match (fits(&messages)?, last.is_some()) {
                    ((true, tokens), _) => last = Some((messages, tokens)),
                    ((false, _), true) => break,
                    ((false, tokens), false) => return Err(overflow(tokens, room)),
                }
            }
            return Ok(last.expect("the first prompt fits or fails"));
        }
        let cut = match self.config.mode {
            // The reference cuts a turn that is alone too long.
            Mode::Naive => 2000,
            _ => usize::MAX,
        };
        let flash = match (self.config.flash, items.last()) {
            (true, Some(last)) => {
                let candidate = Candidate {
                    text_tokens: last.text_tokens,
                    summary_tokens: last.summary_tokens,
                    relevance: 0.0,
                    age: 0,
                };
                let form = controller::flash_form(&candidate, self.flash_limit(model));
                [Some(form), Some(Form::Summary), None]
            }
            _ => [None; 3],
        };
        let history = self.history(model);
        let mut left = activation.by_relevance.clone();
        let mut flash = flash.into_iter();
        let mut flash_form = flash.next().flatten();
        loop {
            let related: Vec<String> = (activation.items.iter())
                .filter(|(item, _)| left.contains(item))
                .map(|&(item, form)| {
                    let text = shown(&items[item], form);
                    match items[item].text_tokens > history {
                        true => text.chars().take(cut).collect(),
                        false => text.to_string(),
                    }
                })
                .collect();
            let before = flash_form.and_then(|form| Some(shown(items.last()?, form)));
            let mut text = String::new();
            if !related.is_empty() || before.is_some() {
                text.push_str(TASK);
                if !related.is_empty() {
                    text.push_str("\n\nRelated turns:\n\n");
                    text.push_str(&related.join("\n\n"));
                }
                if let Some(before) = before {
                    text.push_str("\n\nThe turn before:\n\n");
                    text.push_str(before);
                }
                text.push_str("\n\n###\n\n");
            }
            text.push_str(input);
            let mut messages = system.clone();
            messages.push(Message::new(Role::User, text));
            let (fit, tokens) = fits(&messages)?;
            if fit {
                return Ok((messages, tokens));
            }
            if left.pop().is_some() {
                continue;
            }
            match flash_form.is_some() {
                true => flash_form = flash.next().flatten(),
                false => return Err(overflow(tokens, room)),
            }
        }
    }
}

fn overflow(tokens: usize, max: usize) -> ScmError {
    ScmError::Chat(ChatError::ContextOverflow { tokens, max })
}

/// A question that does not fit the window has no answer, as one that is answered with neither.
fn ask_yes_or_no(
    model: &dyn ChatModel,
    question: String,
    window: usize,
    call: &Call,
) -> Result<Option<bool>, ScmError> {
    let request = Request::user(question).max_tokens(8);
    if model.count(&request.input)?.planned() + request.max_tokens > window {
        return Ok(None);
    }
    Ok(yes_or_no(&model.ask(&request, call)?.text))
}

fn shown(item: &Item, form: Form) -> &str {
    match form {
        Form::Text => &item.text,
        Form::Summary => &item.summary,
    }
}

/// A turn as prompts show it: in Chinese if its ASCII letters are no more than 0.6 of it and it has Chinese
/// characters.
fn turn_text(turn: usize, user: &str, assistant: &str) -> String {
    let (mut letters, mut chinese, mut all) = (0, 0, 0);
    for c in user.chars().chain(assistant.chars()) {
        all += 1;
        letters += usize::from(c.is_ascii_alphabetic());
        chinese += usize::from(('\u{4E00}'..='\u{9FFF}').contains(&c));
    }
    match chinese > 0 && letters * 10 <= all * 6 {
        true => format!("[第{turn}轮]\n\n用户：{user}\n\n助手：{assistant}"),
        false => format!("[Turn {turn}]\n\nUser: {user}\n\nAssistant: {assistant}"),
    }
}
