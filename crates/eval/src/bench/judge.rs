//! Judges: whatever answers a message (an endpoint, a local model, a script), with replies kept in a file, so that a
//! judged run that was stopped goes on, and one repeated makes no call. Shared by LongSafety, L-Eval and
//! LongBench-Write.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use longspan_agents::chat::model::{Call, ChatError, ChatModel, Request};
use longspan_agents::{Message, Role};

use crate::error::{EvalError, Result};
use crate::target::Target;
use crate::task::{Decode, Prompt, Sample, Segment, Work};

/// Answers a message.
pub trait Judge: Send + Sync {
    /// The reply to a user message, under a system message that may be empty.
    ///
    /// # Errors
    /// [`EvalError::Unreachable`] and [`EvalError::Target`] are worth another try; others end the run.
    fn ask(&self, system: &str, user: &str) -> Result<String>;
}

impl<F: Fn(&str, &str) -> Result<String> + Send + Sync> Judge for F {
    fn ask(&self, system: &str, user: &str) -> Result<String> {
        self(system, user)
    }
}

/// A target as a judge: the local engine or an endpoint.
pub struct TargetJudge<'a> {
    pub target: &'a dyn Target,
    /// Most tokens of a reply.
    pub max_new: usize,
    pub seed: u64,
}

impl Judge for TargetJudge<'_> {
    fn ask(&self, system: &str, user: &str) -> Result<String> {
        let text = if system.is_empty() {
            user.to_string()
        } else {
            format!("{system}\n\n{user}")
        };
        let prompt = Prompt {
            segments: vec![Segment::Unique(text)],
            ..Prompt::default()
        };
        let work = Work::Generate(Decode {
            max_new: self.max_new,
            stop: Vec::new(),
        });
        let sample = Sample::new(prompt, work, Vec::new(), Default::default(), String::new());
        let output = self.target.run(&sample, self.seed)?;
        match output.error {
            Some(reason) => Err(EvalError::Target(reason)),
            None => Ok(output.text),
        }
    }
}

/// A chat model as a judge: the local engine, an endpoint, a script. Greedy.
pub struct ChatJudge {
    pub model: Arc<dyn ChatModel>,
    /// Most tokens of a reply.
    pub max_new: usize,
    /// Stops calls.
    pub call: Call,
}

impl Judge for ChatJudge {
    fn ask(&self, system: &str, user: &str) -> Result<String> {
        let mut messages = Vec::new();
        if !system.is_empty() {
            messages.push(Message::new(Role::System, system));
        }
        messages.push(Message::new(Role::User, user));
        let request = Request::chat(messages)
            .max_tokens(self.max_new)
            .temperature(0.0, 0);
        match self.model.ask(&request, &self.call) {
            Ok(reply) => Ok(reply.text),
            Err(ChatError::Cancelled { .. }) => Err(EvalError::Interrupted { done: 0, total: 0 }),
            Err(error) if error.retryable() => Err(EvalError::Unreachable(error.to_string())),
            // What concerns this message alone; a wrong key, address or script concerns all.
            Err(error @ (ChatError::ContextOverflow { .. } | ChatError::ContentFilter(_))) => {
                Err(EvalError::Target(error.to_string()))
            }
            Err(error) => Err(EvalError::Input(error.to_string())),
        }
    }
}

/// How a failing judge is asked again.
#[derive(Clone, Debug)]
pub struct Retry {
    /// Calls for one message.
    pub tries: usize,
    /// Pause between them.
    pub pause: Duration,
    /// Stands for the reply when all failed.
    pub failure: String,
}

/// A line of the file of replies.
#[derive(Serialize, Deserialize)]
struct Line {
    key: String,
    reply: String,
}

struct Kept {
    replies: HashMap<String, String>,
    file: Option<(PathBuf, File)>,
}

/// A judge whose replies are kept, and who is asked again when it fails.
pub struct Cached<J> {
    judge: J,
    /// Distinguishes judges whose replies share a file.
    name: String,
    retry: Retry,
    kept: Mutex<Kept>,
    calls: AtomicUsize,
}

impl<J: Judge> Cached<J> {
    /// Replies live in memory.
    pub fn new(judge: J, name: &str, retry: Retry) -> Self {
        Cached {
            judge,
            name: name.into(),
            retry,
            kept: Mutex::new(Kept {
                replies: HashMap::new(),
                file: None,
            }),
            calls: AtomicUsize::new(0),
        }
    }

    /// Replies live in a file, which is made or read. A torn last line, of a run that was killed, is cut off.
    ///
    /// # Errors
    /// A file that cannot be read or written, or whose lines are no replies.
    pub fn open(judge: J, name: &str, retry: Retry, path: &Path) -> Result<Self> {
        let cached = Cached::new(judge, name, retry);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(EvalError::io(path))?;
        let mut text = String::new();
        file.read_to_string(&mut text)
            .map_err(EvalError::io(path))?;
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        let mut replies = HashMap::new();
        for (index, line) in text[..whole].lines().enumerate() {
            let line: Line = serde_json::from_str(line).map_err(|e| EvalError::Row {
                path: path.into(),
                line: index + 1,
                reason: e.to_string(),
            })?;
            replies.insert(line.key, line.reply);
        }
        file.set_len(whole as u64).map_err(EvalError::io(path))?;
        file.seek(SeekFrom::End(0)).map_err(EvalError::io(path))?;
        *lock(&cached.kept) = Kept {
            replies,
            file: Some((path.into(), file)),
        };
        Ok(cached)
    }

    /// Calls of the judge so far, repeated ones included.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poison| poison.into_inner())
}

impl<J: Judge> Judge for Cached<J> {
    fn ask(&self, system: &str, user: &str) -> Result<String> {
        let mut hash = blake3::Hasher::new();
        for part in [self.name.as_str(), system, user] {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        let key = hash.finalize().to_hex()[..32].to_string();
        if let Some(reply) = lock(&self.kept).replies.get(&key) {
            return Ok(reply.clone());
        }
        for tried in 0..self.retry.tries.max(1) {
            if tried > 0 {
                std::thread::sleep(self.retry.pause);
            }
            self.calls.fetch_add(1, Ordering::Relaxed);
            match self.judge.ask(system, user) {
                Ok(reply) => {
                    let mut kept = lock(&self.kept);
                    if let Some((path, file)) = &mut kept.file {
                        let line = serde_json::json!({ "key": key, "reply": reply });
                        file.write_all(format!("{line}\n").as_bytes())
                            .map_err(EvalError::io(path))?;
                    }
                    kept.replies.insert(key, reply.clone());
                    return Ok(reply);
                }
                Err(EvalError::Unreachable(_) | EvalError::Target(_)) => {}
                Err(error) => return Err(error),
            }
        }
        // Not kept: the next run asks again.
        Ok(self.retry.failure.clone())
    }
}

/// Runs `work` on every item with up to `workers` threads; results in the order of the items. The first error ends it
/// after the items in progress.
///
/// # Errors
/// That of the earliest item that failed.
pub fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    workers: usize,
    work: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let failed = AtomicUsize::new(usize::MAX);
    let done: Mutex<Vec<(usize, Result<R>)>> = Mutex::new(Vec::with_capacity(items.len()));
    std::thread::scope(|scope| {
        for _ in 0..workers.clamp(1, items.len().max(1)) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= items.len() || failed.load(Ordering::Relaxed) != usize::MAX {
                        return;
                    }
                    let result = work(&items[index]);
                    if result.is_err() {
                        failed.fetch_min(index, Ordering::Relaxed);
                    }
                    lock(&done).push((index, result));
                }
            });
        }
    });
    let mut done = done
        .into_inner()
        .unwrap_or_else(|poison| poison.into_inner());
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}
