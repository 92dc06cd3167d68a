//! The settings file: defaults for options that were not given.

use crate::cli::{Common, DeviceKind, Precision};
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

    /// Fills in what the command line left open.
    pub fn apply(self, given: Common) -> Result<Common> {
        if let Some(0) = given.threads.or(self.threads) {
            anyhow::bail!("--threads is 0, expected at least 1");
        }
        Ok(Common {
            model: given.model.or(self.model),
            context: given.context.or(self.context),
            rope: given.rope.or(self.rope),
            kv: given.kv.or(self.kv),
            precision: given.precision.or(self.precision),
            device: given.device.or(self.device),
            threads: given.threads.or(self.threads),
            max_tokens: given.max_tokens.or(self.max_tokens),
            json: given.json,
        })
    }
}
