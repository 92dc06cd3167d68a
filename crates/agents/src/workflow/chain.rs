//! Chain of Agents: workers read the chunks of a text in order and hand on notes, a manager answers from the last
//! notes. For questions about, and summaries of, texts far beyond a model's window, with a trail of the notes.
//!
//! Chain of Agents: Large Language Models Collaborating on Long-Context Tasks, arXiv 2406.02818.

use super::chunk::{Unit, chunks, keep_ends};
use super::{Observer, Took, quiet};
use crate::chat::model::{Ability, Call, ChatError, ChatModel, Reply, Request, Result};
use longspan_infer::decode::random::CounterRng;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::ControlFlow;
use std::str::FromStr;

/// What is wanted of the text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// An answer.
    #[default]
    Qa,
    /// A summary; there may be no question.
    Summary,
    /// The next line of code; the question is the code before it.
    Code,
}

/// In which order chunks are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReadOrder {
    /// As they stand.
    #[default]
    Ltr,
    /// Backwards.
    Rtl,
    /// Shuffled by this seed.
    Perm(u64),
}

/// How many chains run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Paths {
    /// One.
    #[default]
    One,
    /// Forwards and backwards.
    Bidir,
    /// So many forwards, drawn at `path_temperature`.
    SelfConsistency(usize),
    /// So many shuffled orders.
    Perm(usize),
}

/// How the answer of several chains is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Select {
    /// The most frequent answer. For short answers.
    #[default]
    Vote,
    /// The model picks the most reliable notes.
    Judge,
}

/// Hyper-parameters, with the paper's defaults where it has them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ChainConfig {
    /// What is wanted.
    pub task: Task,
    /// Tokens of a worker's prompt and reply (k); the model's own window if that is smaller.
    pub window: usize,
    /// Most tokens of notes and of the answer.
    pub max_output: usize,
    /// Most tokens of the answer, where it may be another number.
    pub answer: Option<usize>,
    /// Tokens kept free for the earlier notes; default `max_output`.
    pub reserve: Option<usize>,
    /// Order of reading.
    pub order: ReadOrder,
    /// Chains.
    pub paths: Paths,
    /// Choice among them.
    pub select: Select,
    /// Temperature of self-consistency. The paper does not give it.
    pub path_temperature: f32,
    /// Notes that say that nothing was found do not replace earlier notes, and an answer that says so is
    /// tried again in another order.
    pub guard: bool,
    /// Phrases that say so, in lower case.
    pub rejections: Vec<String>,
    /// Notes with more words than this are kept whatever phrase they hold.
    pub rejection_words: usize,
    /// What the task demands of the answer, put before the manager's notes.
    pub requirement: String,
}

impl Default for ChainConfig {
    fn default() -> Self {
        let rejections = [
            "not mentioned",
            "not mention",
            "no mention",
            "don't know",
            "do not know",
            "no information",
            "not provide",
            "no evidence",
            "cannot be determined",
            "cannot determine",
            "not specified",
            "no answer",
            "unknown",
            "not contain",
            "no relevant",
        ];
        ChainConfig {
            task: Task::Qa,
            window: 8192,
            max_output: 1024,
            answer: None,
            reserve: None,
            order: ReadOrder::Ltr,
            paths: Paths::One,
            select: Select::Vote,
            path_temperature: 0.7,
            guard: true,
            rejections: rejections.map(String::from).to_vec(),
            rejection_words: 40,
            requirement: String::new(),
        }
    }
}

impl ChainConfig {
    /// Most tokens of the answer.
    pub fn answer_tokens(&self) -> usize {
        self.answer.unwrap_or(self.max_output)
    }
}

/// One worker's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitNote {
    /// Which chunk of the text, from 0.
    pub chunk: usize,
    /// The notes handed on (communication unit).
    pub text: String,
    /// The worker's own notes were a rejection, and the earlier ones were handed on instead.
    pub kept_earlier: bool,
}

/// One chain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Path {
    /// Order of reading.
    pub order: ReadOrder,
    /// The notes in reading order.
    pub units: Vec<UnitNote>,
    /// The manager's answer.
    pub answer: String,
}

/// The answer and how it came about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChainOutcome {
    /// The answer.
    pub answer: String,
    /// Chunks of the text.
    pub chunks: usize,
    /// All chains; the answer is that of `paths[chosen]`.
    pub paths: Vec<Path>,
    /// See `paths`.
    pub chosen: usize,
    /// What was shortened, kept, or tried again.
    pub events: Vec<String>,
    /// What it took.
    pub took: Took,
}

impl ChainOutcome {
    /// The chain whose answer scores best: what a perfect choice among them would give. For evaluation only.
    pub fn oracle(&self, score: &dyn Fn(&str) -> f64) -> usize {
        let scores = self.paths.iter().map(|path| score(&path.answer));
        let best = scores
            .enumerate()
            .fold((0, f64::NEG_INFINITY), |best, (index, score)| {
                if score > best.1 { (index, score) } else { best }
            });
        best.0
    }

    /// How much the chosen chain's answer lost of its best notes; see [`information_loss`].
    pub fn information_loss(&self, score: &dyn Fn(&str) -> f64) -> f64 {
        let path = &self.paths[self.chosen];
        let units: Vec<f64> = path.units.iter().map(|unit| score(&unit.text)).collect();
        information_loss(&units, score(&path.answer))
    }
}

/// See the module's text.
pub struct Chain<'a> {
    worker: &'a dyn ChatModel,
    manager: &'a dyn ChatModel,
    config: ChainConfig,
}

/// The worker's message: chunk, earlier notes, question, instruction. The chunk comes first, so that its keys and
/// values serve every chain that reads it.
pub fn worker_prompt(task: Task, chunk: &str, earlier: &str, query: &str) -> String {
    let mut prompt = format!("{chunk}\n\n");
    if !earlier.is_empty() {
        prompt.push_str(&format!(
            "Summary of the source text before this: {earlier}\n\n"
        ));
    }
    match (task, query.is_empty()) {
        (Task::Code, _) => prompt.push_str(&format!(
            "Code to be continued:\n{query}\n\nThe text above is code of the same project. Together with the summary of what came before, if there is one, name the functions and classes that help to continue the code, and say what each does and how it is called. Keep what the earlier summary names. Write the new summary only."
        )),
        (_, false) => prompt.push_str(&format!(
            "Question: {query}\n\nRead the source text above, and the summary of what came before if there is one. Write a new summary that includes both. Others will answer the question from your summary alone, so it must hold the evidence for the answer. Keep the evidence of the earlier summary, and leave out what does not matter for the question. Write the new summary only."
        )),
        (_, true) => prompt.push_str(
            "Read the source text above, and the summary of what came before if there is one. Write a new summary that includes both. Others will summarise the whole text from your summary alone, so keep it long enough to hold all main points. Write the new summary only.",
        ),
    }
    prompt
}

/// The manager's message: requirement, notes, question.
pub fn manager_prompt(task: Task, requirement: &str, notes: &str, query: &str) -> String {
    let own = match task {
        Task::Qa => "Answer the question as briefly as you can: a name, a number, a phrase.",
        Task::Summary => "Write a summary of the whole text.",
        Task::Code => "Write the next line of the code, and nothing else.",
    };
    let requirement = if requirement.is_empty() {
        own
    } else {
        requirement
    };
    let mut prompt = format!(
        "{requirement}\n\nThe source text is too long and was summarised. Answer from the summary:\n\n{notes}\n\n"
    );
    match (task, query.is_empty()) {
        (_, true) => {}
        (Task::Code, false) => {
            prompt.push_str(&format!("Code to be continued:\n{query}\n\nNext line:"))
        }
        (_, false) => prompt.push_str(&format!("Question: {query}\nAnswer:")),
    }
    prompt
}

/// How a text of this task is cut.
pub fn unit_of(task: Task) -> Unit {
    match task {
        Task::Qa | Task::Summary => Unit::Sentence,
        Task::Code => Unit::Block,
    }
}

impl<'a> Chain<'a> {
    /// One model in all roles.
    pub fn new(model: &'a dyn ChatModel, config: ChainConfig) -> Chain<'a> {
        Chain {
            worker: model,
            manager: model,
            config,
        }
    }

    /// Another model for the manager.
    pub fn manager(mut self, model: &'a dyn ChatModel) -> Chain<'a> {
        self.manager = model;
        self
    }

    fn window(&self) -> usize {
        [self.worker, self.manager]
            .iter()
            .filter_map(|model| model.card().window)
            .fold(self.config.window, usize::min)
    }

    /// Tokens kept free for earlier notes.
    fn reserve(&self) -> usize {
        self.config.reserve.unwrap_or(self.config.max_output)
    }

    /// The chunks of a text for this question, and the tokens that each may have.
    ///
    /// # Errors
    /// A window without room for a chunk.
    pub fn chunks<'t>(&self, text: &'t str, query: &str) -> Result<(Vec<&'t str>, usize)> {
        let empty = Request::user(worker_prompt(self.config.task, "", "-", query));
        let frame = self.worker.count(&empty.input)?.planned();
        let used = frame + self.config.max_output + self.reserve();
        let window = self.window();
        // A few tokens may be added where the parts of a prompt meet.
        let budget = window.saturating_sub(used + 8);
        if budget < 32 {
            return Err(ChatError::BadRequest(format!(
                "chain: a window of {window} tokens leaves {budget} for a chunk beside {frame} of the prompt, {} of notes and {} of the reply; shorten the question or lower max_output",
                self.reserve(),
                self.config.max_output
            )));
        }
        Ok((
            chunks(self.worker, text, unit_of(self.config.task), budget)?,
            budget,
        ))
    }

    /// Whether a text says that nothing was found.
    pub fn rejects(&self, text: &str) -> bool {
        let lower = text.to_lowercase().replace('’', "'");
        text.trim().is_empty()
            || (text.split_whitespace().count() <= self.config.rejection_words
                && self
                    .config
                    .rejections
                    .iter()
                    .any(|phrase| lower.contains(phrase)))
    }

    /// Answers `query` from `text`; the query may be empty for summaries.
    ///
    /// # Errors
    /// A text without content, a window that is too small, what the model says.
    pub fn run(
        &self,
        text: &str,
        query: &str,
        call: &Call,
        observer: &mut dyn Observer,
    ) -> Result<ChainOutcome> {
        if query.trim().is_empty() && self.config.task != Task::Summary {
            return Err(ChatError::BadRequest("chain: the question is empty".into()));
        }
        let (chunks, _) = self.chunks(text, query)?;
        if chunks.is_empty() {
            return Err(ChatError::BadRequest("chain: the text is empty".into()));
        }
        let plans: Vec<(ReadOrder, Option<u64>)> = match self.config.paths {
            Paths::One => vec![(self.config.order, None)],
            Paths::Bidir => vec![(ReadOrder::Ltr, None), (ReadOrder::Rtl, None)],
            Paths::SelfConsistency(n) => (0..n.max(1) as u64)
                .map(|seed| (ReadOrder::Ltr, Some(seed)))
                .collect(),
            Paths::Perm(n) => (0..n.max(1) as u64)
                .map(|seed| (ReadOrder::Perm(seed), None))
                .collect(),
        };
        let mut outcome = ChainOutcome {
            answer: String::new(),
            chunks: chunks.len(),
            paths: Vec::new(),
            chosen: 0,
            events: Vec::new(),
            took: Took::default(),
        };
        let mut total = plans.len() * (chunks.len() + 1);
        let several = plans.len() > 1;
        for (order, seed) in plans {
            // What one chain alone writes is the answer, and streams.
            let done = outcome.took.calls;
            let path = self.path(
                &chunks,
                query,
                order,
                seed,
                call,
                observer,
                &mut outcome,
                (done, total),
                !several,
            )?;
            outcome.paths.push(path);
        }
        if several {
            outcome.chosen = self.choose(&outcome.paths, query, call, &mut outcome.took)?;
        } else if self.config.guard && chunks.len() > 1 && self.rejects(&outcome.paths[0].answer) {
            let other = match self.config.order {
                ReadOrder::Ltr => ReadOrder::Rtl,
                _ => ReadOrder::Ltr,
            };
            note(
                &mut outcome,
                observer,
                format!("the answer found nothing; read again in order {other}"),
            );
            let done = outcome.took.calls;
            total += chunks.len() + 1;
            let path = self.path(
                &chunks,
                query,
                other,
                None,
                call,
                observer,
                &mut outcome,
                (done, total),
                true,
            )?;
            if !self.rejects(&path.answer) {
                outcome.chosen = 1;
            }
            outcome.paths.push(path);
        }
        outcome.answer = outcome.paths[outcome.chosen].answer.clone();
        Ok(outcome)
    }

    fn path(
        &self,
        chunks: &[&str],
        query: &str,
        order: ReadOrder,
        seed: Option<u64>,
        call: &Call,
        observer: &mut dyn Observer,
        outcome: &mut ChainOutcome,
        (done, total): (usize, usize),
        streams: bool,
    ) -> Result<Path> {
        let config = &self.config;
        let shape = |request: Request| {
            let request = request.max_tokens(config.max_output);
            match seed {
                Some(seed) => request.temperature(config.path_temperature, seed),
                None => request,
            }
        };
        let mut notes = String::new();
        let mut units = Vec::new();
        let sequence = order.of(chunks.len());
        for (step, &chunk) in sequence.iter().enumerate() {
            observer.step("reading", done + step, total);
            let earlier = self.shortened(&notes, outcome, observer)?;
            let prompt = worker_prompt(config.task, chunks[chunk], &earlier, query);
            let request = shape(Request::user(prompt));
            let named = call.step("chain", format!("{order} worker {}", chunk + 1));
            let next = sequence.get(step + 1).map(|&next| chunks[next]);
            let (reply, ahead) = self.work(&request, next, &named);
            if let Err(error) = ahead {
                // It costs time, nothing else.
                let next = sequence[step + 1] + 1;
                let text = format!("chunk {next} could not be read ahead: {error}");
                note(outcome, observer, text);
            }
            let reply = reply?;
            outcome.took.add(&reply);
            let written = reply.text;
            let kept_earlier = config.guard && self.rejects(&written);
            if kept_earlier {
                outcome.events.push(format!(
                    "chunk {}: nothing found, earlier notes kept",
                    chunk + 1
                ));
            } else {
                notes = written.trim().to_string();
            }
            units.push(UnitNote {
                chunk,
                text: notes.clone(),
                kept_earlier,
            });
        }
        observer.step("answering", done + chunks.len(), total);
        let last = self.shortened(&notes, outcome, observer)?;
        let prompt = manager_prompt(config.task, &config.requirement, &last, query);
        let step = call.step("chain", format!("{order} manager"));
        let request = shape(Request::user(prompt)).max_tokens(config.answer_tokens());
        let mut held = Held {
            observer: streams.then_some(observer),
            text: String::new(),
            // An answer that may be tried again is not shown before it is seen to be none of those.
            words: if config.guard && chunks.len() > 1 {
                config.rejection_words
            } else {
                0
            },
            open: false,
        };
        let reply = self.manager.reply(&request, &step, &mut |piece| {
            held.piece(piece);
            ControlFlow::Continue(())
        })?;
        outcome.took.add(&reply);
        let answer = reply.text;
        if !config.guard || chunks.len() == 1 || !self.rejects(&answer) {
            held.release();
        }
        Ok(Path {
            order,
            units,
            answer: answer.trim().to_string(),
        })
    }

    /// A worker's notes. Where the model reads while it writes, the next worker's chunk is read meanwhile: it stands
    /// before the notes in the prompt.
    fn work(
        &self,
        request: &Request,
        next: Option<&str>,
        call: &Call,
    ) -> (Result<Reply>, Result<()>) {
        let ahead = next.filter(|_| self.worker.card().can(Ability::ReadAhead));
        std::thread::scope(|scope| {
            let mut reading = None;
            let reply = self.worker.reply(request, call, &mut |piece| {
                // Not before the first word: the prompt that is wanted now is read first.
                if let Some(chunk) = ahead.filter(|_| reading.is_none() && !piece.is_empty()) {
                    let begun = Request::user(format!("{chunk}\n\n")).input;
                    let call = call.clone();
                    reading = Some(scope.spawn(move || self.worker.prepare(&begun, &call)));
                }
                ControlFlow::Continue(())
            });
            let ahead = reading.map_or(Ok(()), |reading| {
                let gone = |_| Err(ChatError::Protocol("the reader broke down".into()));
                reading.join().unwrap_or_else(gone)
            });
            (reply, ahead)
        })
    }

    /// Notes that fit their reserve.
    fn shortened(
        &self,
        notes: &str,
        outcome: &mut ChainOutcome,
        observer: &mut dyn Observer,
    ) -> Result<String> {
        let mut count = |text: &str| Ok::<_, ChatError>(self.worker.count_text(text)?.planned());
        let short = keep_ends(notes, self.reserve(), &mut count)?;
        if short.len() < notes.len() {
            note(
                outcome,
                observer,
                format!(
                    "notes beyond {} tokens were shortened in the middle",
                    self.reserve()
                ),
            );
        }
        Ok(short)
    }

    /// Which chain's answer stands.
    fn choose(&self, paths: &[Path], query: &str, call: &Call, took: &mut Took) -> Result<usize> {
        let answers: Vec<&str> = paths.iter().map(|path| path.answer.as_str()).collect();
        let voted = vote(&answers).unwrap_or(0);
        if self.config.select == Select::Vote {
            return Ok(voted);
        }
        let mut prompt = String::from("Several readers took notes on the same text.\n\n");
        let mut count = |text: &str| Ok::<_, ChatError>(self.manager.count_text(text)?.planned());
        let room = self.window().saturating_sub(256) / paths.len();
        for (index, path) in paths.iter().enumerate() {
            let notes = path.units.last().map_or("", |unit| unit.text.as_str());
            let notes = keep_ends(notes, room, &mut count)?;
            prompt.push_str(&format!("Notes {}: {notes}\n\n", index + 1));
        }
        prompt.push_str(&format!(
            "Question: {query}\n\nWhich notes are the most reliable source for the answer? Reply with their number only."
        ));
        let request = Request::user(prompt).max_tokens(16);
        let said = quiet(self.manager, &request, &call.step("chain", "judge"), took)?;
        let digits: String = said
            .chars()
            .skip_while(|c| !c.is_ascii_digit())
            .take_while(char::is_ascii_digit)
            .collect();
        // A reply without a number leaves it to the vote.
        let picked = digits
            .parse::<usize>()
            .ok()
            .filter(|n| (1..=paths.len()).contains(n));
        Ok(picked.map_or(voted, |n| n - 1))
    }
}

/// An answer that streams once it has more words than a rejection may have.
struct Held<'o> {
    /// Nobody, where another chain's answer may be chosen.
    observer: Option<&'o mut dyn Observer>,
    text: String,
    words: usize,
    open: bool,
}

impl Held<'_> {
    fn piece(&mut self, piece: &str) {
        self.text.push_str(piece);
        if self.open || self.text.split_whitespace().count() > self.words {
            self.release();
        }
    }

    fn release(&mut self) {
        self.open = true;
        let text = std::mem::take(&mut self.text);
        if let Some(observer) = self.observer.as_mut().filter(|_| !text.is_empty()) {
            observer.text(&text);
        }
    }
}

fn note(outcome: &mut ChainOutcome, observer: &mut dyn Observer, text: String) {
    observer.note(&text);
    outcome.events.push(text);
}

impl ReadOrder {
    /// The chunks in this order.
    pub fn of(self, chunks: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..chunks).collect();
        match self {
            ReadOrder::Ltr => {}
            ReadOrder::Rtl => order.reverse(),
            ReadOrder::Perm(seed) => {
                let random = CounterRng::new(seed, 0);
                for last in (1..chunks).rev() {
                    let other = (random.uniform(last as u64) * (last + 1) as f64) as usize;
                    order.swap(last, other.min(last));
                }
            }
        }
        order
    }
}

impl fmt::Display for ReadOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReadOrder::Ltr => f.write_str("ltr"),
            ReadOrder::Rtl => f.write_str("rtl"),
            ReadOrder::Perm(seed) => write!(f, "perm:{seed}"),
        }
    }
}

impl FromStr for ReadOrder {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "ltr" => Ok(ReadOrder::Ltr),
            None if text == "rtl" => Ok(ReadOrder::Rtl),
            Some(("perm", seed)) => seed
                .parse()
                .map(ReadOrder::Perm)
                .map_err(|_| format!("perm:{seed}: a seed expected")),
            _ => Err(format!("{text:?}: ltr, rtl or perm:SEED expected")),
        }
    }
}

impl FromStr for Paths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |n: &str| {
            n.parse()
                .ok()
                .filter(|n| (1..=64).contains(n))
                .ok_or(format!("{text}: a number from 1 to 64 expected"))
        };
        match text.split_once(':') {
            None if text == "one" => Ok(Paths::One),
            None if text == "bidir" => Ok(Paths::Bidir),
            Some(("self", n)) => number(n).map(Paths::SelfConsistency),
            Some(("perm", n)) => number(n).map(Paths::Perm),
            _ => Err(format!("{text:?}: one, bidir, self:N or perm:N expected")),
        }
    }
}

/// An answer as votes compare it: lower case, without ASCII punctuation and the words a, an, the, single blanks.
pub fn normalise(answer: &str) -> String {
    let bare: String = answer
        .to_lowercase()
        .chars()
        .filter(|c| !c.is_ascii_punctuation())
        .collect();
    let words = bare
        .split_whitespace()
        .filter(|word| !matches!(*word, "a" | "an" | "the"));
    words.collect::<Vec<_>>().join(" ")
}

/// The index of the first of the most frequent answers; blank ones do not vote; ties go to the earliest. None if all
/// are blank.
pub fn vote(answers: &[&str]) -> Option<usize> {
    let normal: Vec<String> = answers.iter().map(|answer| normalise(answer)).collect();
    let mut best: Option<(usize, usize)> = None;
    for (index, answer) in normal.iter().enumerate() {
        let first = normal.iter().position(|other| other == answer) == Some(index);
        if answer.is_empty() || !first {
            continue;
        }
        let votes = normal.iter().filter(|other| *other == answer).count();
        if best.is_none_or(|(most, _)| votes > most) {
            best = Some((votes, index));
        }
    }
    best.map(|(_, index)| index)
}

/// Query-key pairs of reading and writing, as the paper counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cost {
    /// Reading n tokens at once.
    pub full_enc: u64,
    /// Writing r tokens after them.
    pub full_dec: u64,
    /// Chunks of k tokens.
    pub chunks: u64,
    /// Reading them one by one.
    pub coa_enc: u64,
    /// Writing r tokens after each.
    pub coa_dec: u64,
}

/// The cost of `n` tokens in windows of `k` with replies of `r`.
pub fn cost(n: u64, k: u64, r: u64) -> Cost {
    let sum = |n: u64| n * (n + 1) / 2;
    let chunks = n.div_ceil(k.max(1));
    Cost {
        full_enc: sum(n),
        full_dec: n * r + sum(r),
        chunks,
        coa_enc: chunks * sum(k),
        coa_dec: chunks * (k * r + sum(r)),
    }
}

/// How much of the best notes' worth the answer lost: max(0, max score(unit) - score(answer)).
pub fn information_loss(units: &[f64], answer: f64) -> f64 {
    let best = units.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (best - answer).max(0.0)
}
