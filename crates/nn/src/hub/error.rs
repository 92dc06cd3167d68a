//! Everything that can go wrong between a model's name and its file on disk, with what to do about it.

use std::io;
use std::path::{Path, PathBuf};

/// Errors of [`crate::hub`].
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error(
        "no model called \"{spec}\"{}; known names: {}. A path to a .gguf file, a folder with config.json, or a hub id (org/name or org/name:file.gguf) works too",
        near_text(near), known.join(", ")
    )]
    UnknownModel {
        spec: String,
        near: Vec<String>,
        known: Vec<String>,
    },

    #[error("model path {}: {reason}", path.display())]
    NotAModel { path: PathBuf, reason: String },

    #[error("model list {origin}: {reason}")]
    Catalogue { origin: String, reason: String },

    #[error(
        "not enough disk space for {}: {needed} bytes needed, {} free; free some space or set LONGSPAN_CACHE to a folder on a larger disk",
        path.display(), free_text(*free)
    )]
    DiskSpace {
        path: PathBuf,
        needed: u64,
        free: Option<u64>,
    },

    #[error(
        "no permission to {action} {}: {source}; fix the permissions or set LONGSPAN_CACHE to a folder you may write to",
        path.display()
    )]
    Permission {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },

    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },

    #[error(
        "no cache folder: none of LONGSPAN_CACHE, XDG_CACHE_HOME, HOME and LOCALAPPDATA is set; set LONGSPAN_CACHE to a folder for models"
    )]
    NoCacheFolder,

    #[error(
        "{file} from {origin} has the wrong content: SHA-256 {found} found, {expected} expected; it was not kept"
    )]
    WrongHash {
        file: String,
        origin: String,
        found: String,
        expected: String,
    },

    #[error("{file} from {origin} has the wrong size: {found} bytes found, {expected} expected")]
    WrongSize {
        file: String,
        origin: String,
        found: u64,
        expected: u64,
    },

    #[error(
        "{what} needs Python with pip, but `{command}` does not run ({reason}); install Python 3 with pip, or set LONGSPAN_PIP to the command that runs pip"
    )]
    PipMissing {
        what: String,
        command: String,
        reason: String,
    },

    #[error("`{command}` failed for {requirement} ({status}); its last lines:\n{tail}")]
    Pip {
        command: String,
        requirement: String,
        status: String,
        tail: String,
    },

    #[error("wheel {}: {reason}", wheel.display())]
    Wheel { wheel: PathBuf, reason: String },

    #[error("{url}: {reason}; check the network, HF_ENDPOINT and the proxy settings")]
    Network { url: String, reason: String },

    #[error("{url}: the hub answers {status}{}", status_hint(*status))]
    Status { url: String, status: u16 },

    #[error("{repo}: {reason}")]
    Repository { repo: String, reason: String },

    #[error(
        "{what} needs the hub, and this build has no hub access; build with the cargo feature `hub`"
    )]
    HubDisabled { what: String },

    #[error("pull of {model} cancelled; what was downloaded stays, so the next pull continues")]
    Cancelled { model: String },

    #[error("{file} of {model}: no source worked\n{}", tries_text(tries))]
    AllSources {
        model: String,
        file: String,
        tries: Vec<(String, HubError)>,
    },
}

impl HubError {
    /// Wraps an I/O error of a local path; a full disk and a lack of permission get their own kinds.
    /// `needed`: bytes that remained to be written, for the message.
    pub(super) fn local(
        action: &'static str,
        path: &Path,
        source: io::Error,
        needed: u64,
    ) -> HubError {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => HubError::DiskSpace {
                free: super::store::free_bytes(&path),
                path,
                needed,
            },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                HubError::Permission {
                    action,
                    path,
                    source,
                }
            }
            _ => HubError::Io {
                action,
                path,
                source,
            },
        }
    }

    /// Whether another source could still succeed after this error.
    pub(super) fn is_about_the_source(&self) -> bool {
        !matches!(
            self,
            HubError::DiskSpace { .. }
                | HubError::Permission { .. }
                | HubError::Io { .. }
                | HubError::Cancelled { .. }
        )
    }
}

fn near_text(near: &[String]) -> String {
    if near.is_empty() {
        String::new()
    } else {
        format!(", did you mean {}?", near.join(" or "))
    }
}

fn free_text(free: Option<u64>) -> String {
    free.map_or("an unknown number".to_owned(), |free| {
        format!("{free} bytes")
    })
}

fn status_hint(status: u16) -> &'static str {
    match status {
        401 | 403 => {
            ": the model may be private or gated; accept its terms on its page and set HF_TOKEN to an access token"
        }
        404 => ": no such repository or file",
        429 => ": too many requests; try again later or set HF_TOKEN",
        _ => "",
    }
}

fn tries_text(tries: &[(String, HubError)]) -> String {
    let lines: Vec<String> = tries
        .iter()
        .map(|(source, error)| format!("  {source}: {error}"))
        .collect();
    lines.join("\n")
}
