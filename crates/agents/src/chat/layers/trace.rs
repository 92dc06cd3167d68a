//! One line of JSON per call: who asked what in which step, what came back, what it took.

use crate::chat::model::{
    Call, Card, ChatError, ChatModel, Embeddings, Input, OnText, Reply, Request, Result,
    TokenCount, TokenScore, Usage,
};
use longspan_infer::key_context::Distribution;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// One call.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TraceLine {
    /// Unix seconds at its end.
    pub time: f64,
    /// The workflow.
    pub workflow: String,
    /// The step of it.
    pub step: String,
    /// The model's name.
    pub model: String,
    /// reply, score, embed, next_token.
    pub method: String,
    /// Hash of the request: equal requests have equal ones.
    pub request_hash: String,
    /// The request, if prompts are traced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<Request>,
    /// The text that came back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply: Option<String>,
    /// stop, length.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finish: Option<String>,
    /// Tokens.
    pub usage: Usage,
    /// Seconds until the first piece of text.
    pub first_s: f64,
    /// Seconds in all.
    pub total_s: f64,
    /// It came from the cache.
    pub from_cache: bool,
    /// Why there is no reply.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Appends to a file.
pub struct TraceWriter {
    path: PathBuf,
    prompts: bool,
    file: Mutex<File>,
}

impl TraceWriter {
    /// Goes on with the file or makes it; `prompts` says whether requests are written out.
    ///
    /// # Errors
    /// A path that cannot be written.
    pub fn open(path: &Path, prompts: bool) -> Result<TraceWriter> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        Ok(TraceWriter {
            path: path.into(),
            prompts,
            file: Mutex::new(
                file.map_err(|error| ChatError::Store(format!("{}: {error}", path.display())))?,
            ),
        })
    }

    fn write(&self, line: &TraceLine) -> Result<()> {
        let wrong = |error: &dyn std::fmt::Display| {
            ChatError::Store(format!("{}: {error}", self.path.display()))
        };
        let mut text = serde_json::to_string(line).map_err(|error| wrong(&error))?;
        text.push('\n');
        let mut file = self
            .file
            .lock()
            .unwrap_or_else(|poison| poison.into_inner());
        file.write_all(text.as_bytes())
            .map_err(|error| wrong(&error))
    }
}

/// The calls of a file. A last line that was cut short by a kill is left out.
///
/// # Errors
/// A file that cannot be read; another line that is none.
pub fn read_trace(path: &Path) -> Result<Vec<TraceLine>> {
    let wrong = |text: String| ChatError::Store(format!("{}: {text}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    let mut lines = Vec::new();
    let whole = text.ends_with('\n');
    let count = text.lines().count();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        match serde_json::from_str(line) {
            Ok(line) => lines.push(line),
            Err(_) if index + 1 == count && !whole => {}
            Err(error) => return Err(wrong(format!("line {}: {error}", index + 1))),
        }
    }
    Ok(lines)
}

/// What some calls took together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct TraceSummary {
    /// Calls.
    pub calls: usize,
    /// Of those, answered from the cache.
    pub from_cache: usize,
    /// Of those, without a reply.
    pub failed: usize,
    /// Tokens that were paid for: not those of cached replies.
    pub usage: Usage,
    /// Seconds of waiting, added up.
    pub seconds: f64,
}

/// By workflow and model.
pub fn summarize_trace(lines: &[TraceLine]) -> BTreeMap<(String, String), TraceSummary> {
    let mut by: BTreeMap<(String, String), TraceSummary> = BTreeMap::new();
    for line in lines {
        let entry = by
            .entry((line.workflow.clone(), line.model.clone()))
            .or_insert(TraceSummary {
                usage: Usage {
                    exact: true,
                    ..Usage::default()
                },
                ..TraceSummary::default()
            });
        entry.calls += 1;
        entry.failed += usize::from(line.error.is_some());
        if line.from_cache {
            entry.from_cache += 1;
        } else if line.error.is_none() {
            entry.usage += line.usage;
            entry.seconds += line.total_s;
        }
    }
    by
}

/// See the module's text.
pub struct Traced {
    inner: Arc<dyn ChatModel>,
    writer: Arc<TraceWriter>,
}

impl Traced {
    /// Wraps a model.
    pub fn new(inner: Arc<dyn ChatModel>, writer: Arc<TraceWriter>) -> Traced {
        Traced { inner, writer }
    }

    fn line(
        &self,
        method: &str,
        request: &impl Serialize,
        call: &Call,
        start: Instant,
    ) -> TraceLine {
        let json = serde_json::to_vec(request).unwrap_or_default();
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        TraceLine {
            time: now.map_or(0.0, |time| time.as_secs_f64()),
            workflow: call.workflow.clone(),
            step: call.step.clone(),
            model: self.inner.card().name.clone(),
            method: method.into(),
            request_hash: blake3::hash(&json).to_hex()[..16].to_string(),
            total_s: start.elapsed().as_secs_f64(),
            ..TraceLine::default()
        }
    }

    fn simple<T>(
        &self,
        method: &str,
        request: &impl Serialize,
        call: &Call,
        work: impl FnOnce() -> Result<T>,
        usage: impl FnOnce(&T) -> Usage,
    ) -> Result<T> {
        let start = Instant::now();
        let result = work();
        let mut line = self.line(method, request, call, start);
        match &result {
            Ok(value) => line.usage = usage(value),
            Err(error) => line.error = Some(error.to_string()),
        }
        self.writer.write(&line)?;
        result
    }
}

impl ChatModel for Traced {
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
        let start = Instant::now();
        let result = self.inner.reply(request, call, on_text);
        let mut line = self.line("reply", request, call, start);
        line.request = self.writer.prompts.then(|| request.clone());
        match &result {
            Ok(reply) => {
                line.reply = Some(reply.text.clone());
                line.finish = serde_json::to_value(reply.finish)
                    .ok()
                    .and_then(|value| value.as_str().map(str::to_string));
                line.usage = reply.usage;
                line.first_s = reply.first_s;
                line.from_cache = reply.from_cache;
            }
            Err(error) => {
                line.error = Some(error.to_string());
                line.reply = Some(error.partial().to_string()).filter(|text| !text.is_empty());
            }
        }
        self.writer.write(&line)?;
        result
    }

    fn score(&self, prompt: &str, continuation: &str, call: &Call) -> Result<Vec<TokenScore>> {
        let work = || self.inner.score(prompt, continuation, call);
        self.simple("score", &(prompt, continuation), call, work, |scores| {
            Usage {
                prompt: scores.len(),
                ..Usage::default()
            }
        })
    }

    fn embed(&self, texts: &[String], call: &Call) -> Result<Embeddings> {
        let work = || self.inner.embed(texts, call);
        self.simple("embed", &texts, call, work, |found| Usage {
            prompt: found.tokens,
            ..Usage::default()
        })
    }

    fn next_token(&self, request: &Request, call: &Call) -> Result<Distribution> {
        let work = || self.inner.next_token(request, call);
        self.simple("next_token", request, call, work, |_| Usage {
            completion: 1,
            ..Usage::default()
        })
    }

    fn prepare(&self, input: &Input, call: &Call) -> Result<()> {
        self.inner.prepare(input, call)
    }
}
