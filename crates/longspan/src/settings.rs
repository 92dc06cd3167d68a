//! The settings file: defaults for options that were not given.

use crate::options::{Common, DeviceKind, Precision};
use anyhow::{Context, Result};
use longspan_nn::position::RopeOverride;
use serde::Deserialize;
use std::path::PathBuf;

/// Contents of `config.toml`.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    model: Option<String>,
    context: Option<String>,
    rope: Option<RopeOverride>,
    kv: Option<String>,
    precision: Option<Precision>,
    device: Option<DeviceKind>,
    threads: Option<usize>,
    max_tokens: Option<usize>,
}

/// `LONGSPAN_CONFIG`, else `longspan/config.toml` in the user's configuration folder.
fn path() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("LONGSPAN_CONFIG") {
        return Some(path.into());
    }
    let base = std::env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute());
    let base = base.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".config")))?;
    Some(base.join("longspan/config.toml"))
}

impl Settings {
    /// Reads the file if there is one. Errors name the file and the key.
    pub fn load() -> Result<Settings> {
        let Some(path) = path() else {
            return Ok(Settings::default());
        };
        match std::fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text).with_context(|| format!("{}", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Settings::default()),
            Err(error) => Err(error).with_context(|| format!("{}", path.display())),
        }
    }

    /// What commands see where the command line says nothing.
    pub fn common(&self) -> Common {
        Common {
            model: self.model.clone(),
            context: self.context.clone(),
            rope: self.rope.clone(),
            kv: self.kv.clone(),
            precision: self.precision,
            device: self.device,
            threads: self.threads,
            max_tokens: self.max_tokens,
            json: false,
        }
    }
}
