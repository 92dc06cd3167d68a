//! The hub's place in a build without the cargo feature `hub`: every use says so.

use super::error::HubError;
use super::progress::Reporter;
use super::store::Partial;

#[derive(Clone)]
pub struct Web;

#[derive(Clone, Copy)]
pub struct Pinned<'a> {
    pub size: u64,
    pub sha256: &'a str,
}

pub struct Fetched {
    pub sha256: Option<String>,
}

fn disabled(repo: &str, file: &str) -> HubError {
    HubError::HubDisabled {
        what: format!("{file} of {repo}"),
    }
}

impl Web {
    pub fn from_env() -> Web {
        Web
    }

    pub fn text(&self, repo: &str, file: &str, _limit: u64) -> Result<Option<Vec<u8>>, HubError> {
        Err(disabled(repo, file))
    }

    pub fn files(&self, repo: &str, suffix: &str) -> Result<Vec<String>, HubError> {
        Err(disabled(repo, suffix))
    }

    pub fn download(
        &self,
        repo: &str,
        _revision: &str,
        file: &str,
        pinned: Option<Pinned<'_>>,
        _partial: &mut Partial,
        _reporter: &Reporter<'_>,
    ) -> Result<Fetched, HubError> {
        if let Some(Pinned { size, sha256 }) = pinned {
            return Err(HubError::HubDisabled {
                what: format!("{file} of {repo} ({size} bytes, SHA-256 {sha256})"),
            });
        }
        Err(disabled(repo, file))
    }
}
