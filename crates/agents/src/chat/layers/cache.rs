//! Replies kept in one SQLite file: equal requests to equal models are answered once. A recorded workflow replays
//! without its model, and one that was killed goes on where it stopped.

use crate::chat::model::{
    Call, Card, ChatError, ChatModel, Embeddings, Input, OnText, Reply, Request, Result,
    TokenCount, TokenScore,
};
use longspan_infer::key_context::Distribution;
use rusqlite::{Connection, OptionalExtension, params};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What the cache does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// Answers from it what is deterministic (temperature 0, or a seed that the model honours), and keeps it.
    #[default]
    ReadWrite,
    /// The same for every request, deterministic or not.
    All,
    /// Keeps every reply and answers none.
    Record,
    /// Answers from it only; a request that it does not hold is an error.
    Replay,
}

/// A file of replies. Several models and processes may share it.
pub struct CacheStore {
    path: PathBuf,
    connection: Mutex<Connection>,
}

impl CacheStore {
    /// Opens or makes the file.
    ///
    /// # Errors
    /// A path that cannot be written or holds something else.
    pub fn open(path: &Path) -> Result<CacheStore> {
        let wrong =
            |error: rusqlite::Error| ChatError::Store(format!("{}: {error}", path.display()));
        let connection = Connection::open(path).map_err(wrong)?;
        connection
            .busy_timeout(Duration::from_secs(10))
            .map_err(wrong)?;
        connection
            .execute_batch(
                "PRAGMA journal_mode = WAL;
                 PRAGMA synchronous = NORMAL;
                 CREATE TABLE IF NOT EXISTS reply (
                   key BLOB PRIMARY KEY, model TEXT NOT NULL, request TEXT NOT NULL,
                   reply TEXT NOT NULL, created INTEGER NOT NULL
                 ) WITHOUT ROWID;",
            )
            .map_err(wrong)?;
        Ok(CacheStore {
            path: path.into(),
            connection: Mutex::new(connection),
        })
    }

    /// Replies held.
    ///
    /// # Errors
    /// A file that fails.
    pub fn len(&self) -> Result<u64> {
        let count = self
            .lock()
            .query_row("SELECT count(*) FROM reply", [], |row| row.get::<_, i64>(0));
        Ok(count.map_err(|error| self.wrong(&error))? as u64)
    }

    /// True if it holds none.
    ///
    /// # Errors
    /// A file that fails.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Connection> {
        self.connection
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }

    fn wrong(&self, error: &dyn std::fmt::Display) -> ChatError {
        ChatError::Store(format!("{}: {error}", self.path.display()))
    }

    fn get<T: DeserializeOwned>(&self, key: &[u8; 32]) -> Result<Option<T>> {
        let text: Option<String> = self
            .lock()
            .query_row(
                "SELECT reply FROM reply WHERE key = ?1",
                [&key[..]],
                |row| row.get(0),
            )
            .optional()
            .map_err(|error| self.wrong(&error))?;
        // A reply of another version is asked for again.
        Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
    }

    fn put<T: Serialize>(
        &self,
        key: &[u8; 32],
        model: &str,
        request: &str,
        reply: &T,
    ) -> Result<()> {
        let reply = serde_json::to_string(reply).map_err(|error| self.wrong(&error))?;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| time.as_secs());
        self.lock()
            .execute(
                "INSERT OR REPLACE INTO reply (key, model, request, reply, created) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![&key[..], model, request, reply, now as i64],
            )
            .map_err(|error| self.wrong(&error))?;
        Ok(())
    }
}

/// See the module's text.
pub struct Cached {
    inner: Arc<dyn ChatModel>,
    store: Arc<CacheStore>,
    mode: CacheMode,
}

impl Cached {
    /// Wraps a model.
    pub fn new(inner: Arc<dyn ChatModel>, store: Arc<CacheStore>, mode: CacheMode) -> Cached {
        Cached { inner, store, mode }
    }

    /// Answers from the store or by `work`, whose result is kept. The flag says which.
    fn through<T: Serialize + DeserializeOwned>(
        &self,
        method: &str,
        request: &impl Serialize,
        deterministic: bool,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<(T, bool)> {
        // Structs and ordered maps only: equal requests have equal JSON.
        let request = serde_json::to_string(request)
            .map_err(|error| ChatError::BadRequest(format!("the request: {error}")))?;
        let card = self.inner.card();
        let mut hash = blake3::Hasher::new();
        for part in [&card.fingerprint, method, &request] {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        let key = *hash.finalize().as_bytes();
        let read = match self.mode {
            CacheMode::ReadWrite => deterministic,
            CacheMode::All | CacheMode::Replay => true,
            CacheMode::Record => false,
        };
        if read && let Some(found) = self.store.get(&key)? {
            return Ok((found, true));
        }
        if self.mode == CacheMode::Replay {
            let shown: String = request.chars().take(160).collect();
            return Err(ChatError::Store(format!(
                "{}: no reply of {} to {shown}...; record it first",
                self.store.path.display(),
                card.name
            )));
        }
        let found = work()?;
        if deterministic || self.mode != CacheMode::ReadWrite {
            self.store.put(&key, &card.name, &request, &found)?;
        }
        Ok((found, false))
    }
}

impl ChatModel for Cached {
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
        call.check("")?;
        let deterministic = request.deterministic(self.inner.card());
        let work = || self.inner.reply(request, call, &mut *on_text);
        let (mut reply, found): (Reply, bool) =
            self.through("reply", request, deterministic, work)?;
        if found {
            reply.from_cache = true;
            if on_text(&reply.text).is_break() {
                return Err(ChatError::Cancelled {
                    partial: reply.text,
                });
            }
        }
        Ok(reply)
    }

    fn score(&self, prompt: &str, continuation: &str, call: &Call) -> Result<Vec<TokenScore>> {
        let work = || self.inner.score(prompt, continuation, call);
        Ok(self
            .through("score", &(prompt, continuation), true, work)?
            .0)
    }

    fn embed(&self, texts: &[String], call: &Call) -> Result<Embeddings> {
        let work = || self.inner.embed(texts, call);
        Ok(self.through("embed", &texts, true, work)?.0)
    }

    fn next_token(&self, request: &Request, call: &Call) -> Result<Distribution> {
        // As large as the vocabulary: computing it again is cheaper than keeping it.
        self.inner.next_token(request, call)
    }

    fn prepare(&self, input: &Input, call: &Call) -> Result<()> {
        match self.mode {
            CacheMode::Replay => Ok(()),
            _ => self.inner.prepare(input, call),
        }
    }
}
