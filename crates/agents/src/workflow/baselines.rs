//! What Chain of Agents is compared with: the whole text cut to the window, the best passages, a vote over answers from
//! single chunks, and notes that are not handed on.
//!
//! Chain of Agents, arXiv 2406.02818, section 4.

use super::chain::{Chain, ChainConfig, Task, manager_prompt, unit_of, vote, worker_prompt};
use super::chunk::{chunks, keep_ends};
use super::{Observer, Took, aloud, quiet};
use crate::chat::model::{Call, ChatError, ChatModel, Request, Result};
use crate::rag::retrieve::Bm25Config;
use crate::rag::{ChunkConfig, Index, IndexError, Retriever};
use longspan_data::document::{Document, Format};
use serde::{Deserialize, Serialize};

/// Which baseline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Baseline {
    /// The middle of the text is left out until it fits.
    FullContext,
    /// Passages of 300 words, the best first, until the window is full.
    Rag,
    /// Every chunk is asked alone; the most frequent answer stands.
    Merge,
    /// Every chunk that is useful is noted alone; all notes go to the manager.
    Hierarchical,
}

/// What a baseline answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BaselineOutcome {
    /// The answer.
    pub answer: String,
    /// Answers (merge) or notes (hierarchical) of the chunks, or passages shown (rag), in order.
    pub parts: Vec<String>,
    /// Text was left out to fit the window.
    pub truncated: bool,
    /// What it took.
    pub took: Took,
}

/// The pseudo query by which summaries without a question retrieve.
pub const SUMMARY_QUERY: &str = "What is the summary of the whole government report?";

/// The message of a model that sees the text itself.
pub fn direct_prompt(task: Task, requirement: &str, text: &str, query: &str) -> String {
    let own = match task {
        Task::Qa => {
            "Answer the question from the text below as briefly as you can: a name, a number, a phrase."
        }
        Task::Summary => "Write a summary of the text below.",
        Task::Code => "Write the next line of the code, and nothing else.",
    };
    let requirement = if requirement.is_empty() {
        own
    } else {
        requirement
    };
    let mut prompt = format!("{requirement}\n\n{text}\n\n");
    match (task, query.is_empty()) {
        (_, true) => {}
        (Task::Code, false) => {
            prompt.push_str(&format!("Code to be continued:\n{query}\n\nNext line:"))
        }
        (_, false) => prompt.push_str(&format!("Question: {query}\nAnswer:")),
    }
    prompt
}

/// Answers `query` from `text` by a baseline; window, output, task and requirement are those of the chain.
///
/// # Errors
/// A window that is too small, an index that fails, what the model says.
pub fn run(
    baseline: Baseline,
    model: &dyn ChatModel,
    config: &ChainConfig,
    text: &str,
    query: &str,
    call: &Call,
    observer: &mut dyn Observer,
) -> Result<BaselineOutcome> {
    let window = model
        .card()
        .window
        .map_or(config.window, |own| own.min(config.window));
    let ask = Ask {
        model,
        config,
        query,
        call,
        window,
    };
    match baseline {
        Baseline::FullContext => ask.full(text, observer),
        Baseline::Rag => ask.rag(text, observer),
        Baseline::Merge => ask.merge(text, observer),
        Baseline::Hierarchical => ask.hierarchical(text, observer),
    }
}

struct Ask<'a> {
    model: &'a dyn ChatModel,
    config: &'a ChainConfig,
    query: &'a str,
    call: &'a Call,
    window: usize,
}

impl Ask<'_> {
    fn request(&self, prompt: String) -> Request {
        Request::user(prompt).max_tokens(self.config.max_output)
    }

    fn direct(&self, text: &str) -> Request {
        let config = self.config;
        let prompt = direct_prompt(config.task, &config.requirement, text, self.query);
        Request::user(prompt).max_tokens(config.answer_tokens())
    }

    fn count(&self, text: &str) -> Result<usize> {
        Ok(self.model.count_text(text)?.planned())
    }

    /// Tokens for text in [`Ask::direct`].
    fn room(&self) -> Result<usize> {
        let frame = self.model.count(&self.direct("").input)?.planned();
        let room = self
            .window
            .saturating_sub(frame + self.config.answer_tokens() + 8);
        match room {
            0..32 => Err(ChatError::BadRequest(format!(
                "a window of {} tokens leaves {room} for text beside {frame} of the prompt and {} of the reply",
                self.window,
                self.config.answer_tokens()
            ))),
            room => Ok(room),
        }
    }

    fn full(&self, text: &str, observer: &mut dyn Observer) -> Result<BaselineOutcome> {
        let room = self.room()?;
        let shown = keep_ends(text, room, &mut |text: &str| self.count(text))?;
        let mut took = Took::default();
        observer.step("answering", 0, 1);
        let call = self.call.step("full-context", "answer");
        let answer = aloud(self.model, &self.direct(&shown), &call, &mut took, observer)?;
        Ok(BaselineOutcome {
            answer: answer.trim().into(),
            parts: Vec::new(),
            truncated: shown.len() < text.len(),
            took,
        })
    }

    fn rag(&self, text: &str, observer: &mut dyn Observer) -> Result<BaselineOutcome> {
        let room = self.room()?;
        let wrong = |error: IndexError| ChatError::Store(error.to_string());
        let mut index = Index::in_memory(ChunkConfig { words: 300 }).map_err(wrong)?;
        let document = Document {
            name: "text".into(),
            source: Format::Text,
            text: text.into(),
            warnings: Vec::new(),
        };
        index
            .add(&[document], None, &mut |_| {
                std::ops::ControlFlow::Continue(())
            })
            .map_err(wrong)?;
        let query = if self.query.trim().is_empty() {
            SUMMARY_QUERY
        } else {
            self.query
        };
        let most = index.passages().map_err(wrong)?;
        let hits = index
            .search(
                query,
                most.max(1),
                Retriever::Bm25,
                &Bm25Config::default(),
                None,
            )
            .map_err(wrong)?;
        let mut used = 0;
        let mut parts: Vec<String> = Vec::new();
        for hit in &hits {
            let tokens = self.count(&hit.text)? + 2;
            if used + tokens > room {
                break;
            }
            used += tokens;
            parts.push(hit.text.clone());
        }
        observer.step("answering", 0, 1);
        let mut took = Took::default();
        let request = self.direct(&parts.join("\n\n"));
        let answer = aloud(
            self.model,
            &request,
            &self.call.step("rag", "answer"),
            &mut took,
            observer,
        )?;
        Ok(BaselineOutcome {
            answer: answer.trim().into(),
            truncated: parts.len() < most,
            parts,
            took,
        })
    }

    fn merge(&self, text: &str, observer: &mut dyn Observer) -> Result<BaselineOutcome> {
        let chunks = chunks(self.model, text, unit_of(self.config.task), self.room()?)?;
        let mut took = Took::default();
        let mut parts = Vec::new();
        for (index, chunk) in chunks.iter().enumerate() {
            observer.step("asking", index, chunks.len());
            let call = self.call.step("merge", format!("worker {}", index + 1));
            parts.push(
                quiet(self.model, &self.direct(chunk), &call, &mut took)?
                    .trim()
                    .to_string(),
            );
        }
        let answers: Vec<&str> = parts.iter().map(String::as_str).collect();
        let answer = vote(&answers).map_or(String::new(), |index| parts[index].clone());
        observer.text(&answer);
        Ok(BaselineOutcome {
            answer,
            parts,
            truncated: false,
            took,
        })
    }

    fn hierarchical(&self, text: &str, observer: &mut dyn Observer) -> Result<BaselineOutcome> {
        // No notes come from before, so the chain's chunks fit here too.
        let chain = Chain::new(self.model, self.config.clone());
        let (chunks, _) = chain.chunks(text, self.query)?;
        let mut took = Took::default();
        let mut parts = Vec::new();
        for (index, chunk) in chunks.iter().enumerate() {
            observer.step("judging", index, chunks.len() + 1);
            let call = |what: &str| {
                self.call
                    .step("hierarchical", format!("{what} {}", index + 1))
            };
            if !self.query.trim().is_empty() {
                let prompt = format!(
                    "{chunk}\n\nQuestion: {}\n\nIs the text above useful to answer the question? Reply with yes or no only.",
                    self.query
                );
                let request = Request::user(prompt).max_tokens(8);
                let said = quiet(self.model, &request, &call("judge"), &mut took)?;
                let said = said.trim().to_lowercase();
                // Only a clear no leaves a chunk out.
                if said.starts_with("no") && !said.starts_with("not") {
                    continue;
                }
            }
            let prompt = worker_prompt(self.config.task, chunk, "", self.query);
            let note = quiet(
                self.model,
                &self.request(prompt),
                &call("worker"),
                &mut took,
            )?;
            parts.push(note.trim().to_string());
        }
        observer.step("answering", chunks.len(), chunks.len() + 1);
        let frame = self.request(manager_prompt(
            self.config.task,
            &self.config.requirement,
            "",
            self.query,
        ));
        let frame = self.model.count(&frame.input)?.planned();
        let room = self
            .window
            .saturating_sub(frame + self.config.answer_tokens() + 8);
        let all = parts.join("\n\n");
        let notes = keep_ends(&all, room, &mut |text: &str| self.count(text))?;
        let prompt = manager_prompt(
            self.config.task,
            &self.config.requirement,
            &notes,
            self.query,
        );
        let call = self.call.step("hierarchical", "manager");
        let answer = aloud(
            self.model,
            &self.request(prompt).max_tokens(self.config.answer_tokens()),
            &call,
            &mut took,
            observer,
        )?;
        Ok(BaselineOutcome {
            answer: answer.trim().into(),
            truncated: notes.len() < all.len(),
            parts,
            took,
        })
    }
}
