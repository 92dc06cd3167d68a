//! The list of models with short names: `models.toml`, with the user's own file merged over it.

use super::error::HubError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Component, Path};

const BUILT_IN: &str = include_str!("../../../../models.toml");

/// Models by alias.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalogue {
    /// Alias used where the user names no model.
    pub default: Option<String>,
    #[serde(default)]
    pub models: BTreeMap<String, Model>,
}

/// A model with an alias.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// One line for people.
    pub description: String,
    /// SPDX id, or the name of the terms.
    pub licence: String,
    /// Terms shown to the user at pull, where the licence asks for it.
    pub terms: Option<String>,
    /// The first is the model itself; a model of several files is a folder.
    pub files: Vec<ModelFile>,
}

/// A file of a model, pinned by size and hash.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelFile {
    /// Path relative to the model's folder in the cache, with `/`.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// 64 lower-case hexadecimal digits.
    pub sha256: String,
    /// Tried in order.
    pub sources: Vec<Source>,
}

/// A place a file can come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// A file of a model hub's repository.
    Hub(HubFile),
    /// Files inside Python wheels, concatenated in order.
    Wheels(Vec<Wheel>),
}

/// A file of a repository on a model hub.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HubFile {
    /// `org/name`.
    pub repo: String,
    pub file: String,
    /// Branch, tag or commit.
    #[serde(default = "main_branch")]
    pub revision: String,
}

fn main_branch() -> String {
    "main".to_owned()
}

/// A file inside a Python wheel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wheel {
    pub package: String,
    pub version: String,
    /// Path inside the wheel.
    pub path: String,
    /// Bytes of the wheel, for progress and the check of disk space.
    pub bytes: Option<u64>,
}

impl Wheel {
    /// `package==version`, as pip takes it.
    pub fn requirement(&self) -> String {
        format!("{}=={}", self.package, self.version)
    }
}

impl Source {
    /// The source in a few words, for people.
    pub fn label(&self) -> String {
        match self {
            Source::Hub(hub) => format!("hub {}", hub.repo),
            Source::Wheels(wheels) => match wheels.as_slice() {
                [one] => format!("wheel {}", one.requirement()),
                _ => format!("{} wheels from {}", wheels.len(), wheels[0].requirement()),
            },
        }
    }
}

impl Model {
    /// Bytes of all files.
    pub fn size(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }
}

impl Catalogue {
    /// The list built into the program.
    pub fn built_in() -> Result<Catalogue, HubError> {
        Catalogue::parse(BUILT_IN, "models.toml (built in)")
    }

    /// The built-in list with the file at `user` merged over it, if that exists.
    ///
    /// # Errors
    /// [`HubError::Catalogue`] names the file and the entry at fault.
    pub fn with_user_file(user: Option<&Path>) -> Result<Catalogue, HubError> {
        let mut catalogue = Catalogue::built_in()?;
        if let Some(path) = user {
            match std::fs::read_to_string(path) {
                Ok(text) => {
                    let own = Catalogue::parse(&text, &path.display().to_string())?;
                    catalogue.models.extend(own.models);
                    catalogue.default = own.default.or(catalogue.default);
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(HubError::local("read", path, error, 0)),
            }
            catalogue.check_default(&path.display().to_string())?;
        }
        Ok(catalogue)
    }

    /// Parses and checks a list. `origin` names it in errors.
    pub fn parse(text: &str, origin: &str) -> Result<Catalogue, HubError> {
        let catalogue: Catalogue = toml::from_str(text).map_err(|error| HubError::Catalogue {
            origin: origin.to_owned(),
            reason: error.to_string(),
        })?;
        for (alias, model) in &catalogue.models {
            check(alias, model).map_err(|reason| HubError::Catalogue {
                origin: origin.to_owned(),
                reason: format!("model \"{alias}\": {reason}"),
            })?;
        }
        Ok(catalogue)
    }

    fn check_default(&self, origin: &str) -> Result<(), HubError> {
        match &self.default {
            Some(alias) if !self.models.contains_key(alias) => Err(HubError::Catalogue {
                origin: origin.to_owned(),
                reason: format!("default = \"{alias}\", but no model has that name"),
            }),
            _ => Ok(()),
        }
    }

    /// The model called `alias`, or [`HubError::UnknownModel`] with the nearest names.
    pub fn model(&self, alias: &str) -> Result<&Model, HubError> {
        self.models
            .get(alias)
            .ok_or_else(|| HubError::UnknownModel {
                spec: alias.to_owned(),
                near: self.near(alias),
                known: self.models.keys().cloned().collect(),
            })
    }

    /// Aliases that resemble `spec`, nearest first.
    pub fn near(&self, spec: &str) -> Vec<String> {
        let spec = spec.to_lowercase();
        let mut scored: Vec<(usize, &String)> = self
            .models
            .keys()
            .filter_map(|alias| {
                // A slip may be in the whole name or in its first word alone ("gema").
                let word = alias.split('-').next().unwrap_or(alias);
                let whole = edit_distance(&spec, alias);
                let distance = whole.min(edit_distance(&spec, word));
                let contained =
                    spec.len() >= 3 && (alias.contains(&spec) || spec.contains(alias.as_str()));
                let close = whole <= alias.len().div_ceil(3) || distance <= word.len() / 3;
                (contained || close).then_some((distance, alias))
            })
            .collect();
        scored.sort();
        scored.into_iter().map(|(_, alias)| alias.clone()).collect()
    }
}

/// Names that stay inside a folder: relative, no `..`, no drive, no empty or hidden part.
pub(super) fn is_safe_relative(name: &str) -> bool {
    !name.is_empty()
        && !name.contains(['\\', ':', '\0'])
        && name
            .split('/')
            .all(|part| !part.is_empty() && !part.starts_with('.'))
        && Path::new(name)
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
}

fn check(alias: &str, model: &Model) -> Result<(), String> {
    // The cache has folders of these names for other things.
    if !is_safe_relative(alias) || alias.contains('/') || ["hub", "sessions"].contains(&alias) {
        return Err("a name must be one plain file name, and not hub or sessions".to_owned());
    }
    if model.files.is_empty() {
        return Err("no files; at least one expected".to_owned());
    }
    for file in &model.files {
        let name = &file.name;
        if !is_safe_relative(name) {
            return Err(format!(
                "file name \"{name}\": a plain relative path expected"
            ));
        }
        if file.sha256.len() != 64
            || !file
                .sha256
                .bytes()
                .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        {
            return Err(format!(
                "file \"{name}\": sha256 \"{}\" found, 64 lower-case hexadecimal digits expected",
                file.sha256
            ));
        }
        if file.sources.is_empty() {
            return Err(format!(
                "file \"{name}\": no sources; at least one expected"
            ));
        }
        for source in &file.sources {
            match source {
                Source::Wheels(wheels) if wheels.is_empty() => {
                    return Err(format!("file \"{name}\": an empty list of wheels"));
                }
                Source::Wheels(wheels) => {
                    // A leading dash would be read as an option by pip.
                    let odd = |text: &str| {
                        !text.starts_with(|c: char| c.is_ascii_alphanumeric())
                            || !text
                                .chars()
                                .all(|c| c.is_ascii_alphanumeric() || "._-+!".contains(c))
                    };
                    if let Some(wheel) = wheels.iter().find(|w| odd(&w.package) || odd(&w.version))
                    {
                        return Err(format!(
                            "file \"{name}\": wheel \"{}\" is not a plain package name and version",
                            wheel.requirement()
                        ));
                    }
                }
                Source::Hub(hub) if !is_hub_id(&hub.repo) || !is_safe_relative(&hub.file) => {
                    return Err(format!(
                        "file \"{name}\": hub repository \"{}\" and file \"{}\": org/name and a plain path expected",
                        hub.repo, hub.file
                    ));
                }
                Source::Hub(_) => {}
            }
        }
    }
    Ok(())
}

/// Whether `text` has the form `org/name` of a hub id.
pub(super) fn is_hub_id(text: &str) -> bool {
    let mut parts = text.split('/');
    let mut plain = || {
        parts.next().is_some_and(|part| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric())
                && part
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        })
    };
    plain() && plain() && parts.next().is_none()
}

/// Levenshtein's distance over characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &right) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(left != right);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
