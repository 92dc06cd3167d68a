//! What a user's word for a model means: an alias, a GGUF file, a folder, or a hub id.

use super::Hub;
use super::catalogue::is_hub_id;
use super::error::HubError;
use super::progress::Progress;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The meaning of a model's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolved {
    /// A GGUF file on this machine.
    Gguf(PathBuf),
    /// A folder with config.json and safetensors weights on this machine.
    Directory(PathBuf),
    /// A name of the catalogue that is not in the cache yet.
    Alias(String),
    /// A repository of the hub, or one file of it, not in the cache yet.
    Repository { repo: String, file: Option<String> },
}

impl Hub {
    /// Finds out what `spec` means, without the network and without hashing.
    ///
    /// In this order: an alias; an existing path (GGUF by its content, or a folder with config.json or with
    /// one GGUF file); a hub id `org/name` or `org/name:file.gguf`. What is already in the cache resolves
    /// to its path.
    ///
    /// # Errors
    /// [`HubError::UnknownModel`] lists the aliases and the near ones; [`HubError::NotAModel`] says what
    /// is wrong with a path.
    pub fn resolve(&self, spec: &str) -> Result<Resolved, HubError> {
        let spec = spec.trim();
        if let Some(model) = self.catalogue.models.get(spec) {
            let folder = self.alias_folder(spec);
            let whole = model.files.iter().all(|file| {
                std::fs::metadata(folder.join(&file.name)).is_ok_and(|meta| meta.len() == file.size)
            });
            return if whole {
                local(&self.main_path(spec, model))
            } else {
                Ok(Resolved::Alias(spec.to_owned()))
            };
        }
        let path = Path::new(spec);
        if !spec.is_empty() && path.exists() {
            return local(path);
        }
        let (repo, file) = match spec.split_once(':') {
            Some((repo, file)) => (repo, Some(file)),
            None => (spec, None),
        };
        if is_hub_id(repo) && !repo.ends_with(".gguf") && file.is_none_or(|f| f.ends_with(".gguf"))
        {
            return match self.cached_repository(repo, file) {
                Some(path) => local(&path),
                None => Ok(Resolved::Repository {
                    repo: repo.to_owned(),
                    file: file.map(str::to_owned),
                }),
            };
        }
        if spec.contains(['/', '\\']) || spec.ends_with(".gguf") {
            return Err(HubError::NotAModel {
                path: path.to_owned(),
                reason: "no such file or folder".to_owned(),
            });
        }
        self.catalogue
            .model(spec)
            .map(|_| Resolved::Alias(spec.to_owned()))
    }

    /// Resolves `spec` and pulls it if it is not on this machine: the result is a GGUF file or a folder.
    pub fn obtain(&self, spec: &str, progress: &dyn Progress) -> Result<PathBuf, HubError> {
        match self.resolve(spec)? {
            Resolved::Gguf(path) | Resolved::Directory(path) => Ok(path),
            Resolved::Alias(alias) => self.pull(&alias, progress),
            Resolved::Repository { repo, file } => {
                self.pull_repository(&repo, file.as_deref(), progress)
            }
        }
    }
}

/// An existing path as a model.
fn local(path: &Path) -> Result<Resolved, HubError> {
    let wrong = |reason: String| {
        Err(HubError::NotAModel {
            path: path.to_owned(),
            reason,
        })
    };
    if path.is_dir() {
        // `latest` names the newest checkpoint of a training run.
        if ["config.json", "latest"]
            .iter()
            .any(|name| path.join(name).is_file())
        {
            return Ok(Resolved::Directory(path.to_owned()));
        }
        let entries = std::fs::read_dir(path).map_err(|e| HubError::local("read", path, e, 0))?;
        let mut found: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|file| {
                file.extension()
                    .is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
            })
            .collect();
        found.sort();
        return match found.as_slice() {
            [one] => local(one),
            [] => wrong(
                "a folder with neither config.json nor a .gguf file, and no training run"
                    .to_owned(),
            ),
            many => wrong(format!(
                "{} .gguf files in the folder; name one of them",
                many.len()
            )),
        };
    }
    let mut magic = Vec::new();
    File::open(path)
        .and_then(|file| file.take(4).read_to_end(&mut magic))
        .map_err(|e| HubError::local("read", path, e, 0))?;
    if magic == *b"GGUF" {
        return Ok(Resolved::Gguf(path.to_owned()));
    }
    if path.extension().is_some_and(|e| e == "safetensors") {
        return match path.parent() {
            Some(parent) if parent.join("config.json").is_file() => {
                Ok(Resolved::Directory(parent.to_owned()))
            }
            _ => wrong("safetensors weights without a config.json beside them".to_owned()),
        };
    }
    wrong(format!(
        "first bytes {magic:02x?} found, \"GGUF\" expected; a .gguf file or a folder with config.json works"
    ))
}
