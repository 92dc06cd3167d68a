//! Rotary rules as text, for `--rope` and recipe files: `yarn:4`, `linear:4+power:0.5`, `clex:FOLDER`.
//!
//! One type serves the command line, recipe files and saved sessions: [`RopeOverride`] reads and prints
//! the text, which is also how serde stores it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::clex::{Act, ClexTable, ClexWeights, LogScale};
use super::{RopeBasis, RopeError, RopeScaling, YarnParameters};

/// The accepted forms of one term, as shown in help and in errors.
pub const KNOWN_OVERRIDES: &[&str] = &[
    "default",
    "linear:FACTOR",
    "power:EXPONENT",
    "truncated:TOKENS",
    "randomised[:EPS]",
    "xpos[:SCALE_BASE]",
    "ntk:FACTOR",
    "dynamic:FACTOR[,keys=kept]",
    "yarn:FACTOR[:ORIGINAL_TOKENS]",
    "longrope:FILE",
    "llama3:FACTOR[:ORIGINAL_TOKENS]",
    "abf:BASE",
    "clex:FOLDER",
    "clex-init[:MAX_FACTOR]",
];

/// How terms combine, in one sentence for `--help`.
pub const OVERRIDE_HELP: &str = "linear, power and truncated combine with `+`, and abf and xpos with anything; \
     the checkpoint's own rope scaling is replaced";

/// What becomes of cached keys when frequencies change with the length of the text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CachedKeys {
    /// They are turned to the new angles.
    #[default]
    Turned,
    /// They stay as they are: what transformers does.
    Kept,
}

/// One part of an override. Values stand in this order, or as `name=value`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeTerm {
    /// The plain frequencies, without the checkpoint's own scaling.
    Default,
    /// Giraffe: all frequencies divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// Giraffe: slow frequencies slowed further.
    Power {
        /// 0 changes nothing.
        exponent: f64,
    },
    /// Giraffe: frequencies too slow to turn within `tokens` are held or stopped.
    Truncated {
        /// The cut-off.
        tokens: usize,
    },
    /// Giraffe: positions drawn at random, in training only.
    Randomised {
        /// Smallest step.
        eps: f64,
    },
    /// Logits also decay with distance.
    XPos {
        /// Tokens over which pair j decays by `zeta_j`.
        scale_base: f64,
    },
    /// A larger base.
    Ntk {
        /// By how much the slowest frequency shrinks.
        factor: f64,
    },
    /// A base that grows with the text.
    Dynamic {
        /// Growth per window.
        factor: f64,
        /// What becomes of cached keys when the base grows.
        keys: CachedKeys,
    },
    /// YaRN.
    Yarn {
        /// The stretch.
        factor: f64,
        /// Original window, tokens; default the checkpoint's.
        original: Option<usize>,
        /// See [`YarnParameters::beta_fast`].
        beta_fast: f64,
        /// See [`YarnParameters::beta_slow`].
        beta_slow: f64,
        /// Factor on cosines and sines; default by `factor`.
        attention_factor: Option<f64>,
    },
    /// A factor per frequency, from a JSON file with `short_factor` and `long_factor`: a `config.json`, or
    /// its `rope_scaling` alone.
    LongRope {
        /// The file.
        file: PathBuf,
    },
    /// The rule of Llama 3.1.
    Llama3 {
        /// Divisor of the slow frequencies.
        factor: f64,
        /// Original window, tokens; default the checkpoint's.
        original: Option<usize>,
        /// See [`RopeScaling::Llama3`].
        low_freq_factor: f64,
        /// See [`RopeScaling::Llama3`].
        high_freq_factor: f64,
    },
    /// Another base (Llama 2 Long's "adjusted base frequency").
    Abf {
        /// The base.
        base: f64,
    },
    /// Frequencies learned over length, from a folder or file that [`ClexWeights`] reads. Values given here
    /// count more than those of its `config.json`.
    Clex {
        /// Folder, or `.safetensors` file.
        folder: PathBuf,
        /// Longest text in windows.
        max_factor: Option<usize>,
        /// Original window, tokens.
        window: Option<usize>,
        /// Activation of the network.
        act: Option<Act>,
        /// Step of the solver.
        time_dt: Option<f64>,
        /// Factor on queries by the logarithm of the length.
        log_scale: Option<LogScale>,
    },
    /// CLEX before any training: NTK scaling by `2t - 1`, with `t` the number of windows.
    ClexInit {
        /// Longest text in windows.
        max_factor: usize,
    },
}

/// A rule set on a checkpoint in place of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RopeOverride {
    terms: Vec<RopeTerm>,
}

impl RopeTerm {
    fn name(&self) -> &'static str {
        match self {
            RopeTerm::Default => "default",
            RopeTerm::Linear { .. } => "linear",
            RopeTerm::Power { .. } => "power",
            RopeTerm::Truncated { .. } => "truncated",
            RopeTerm::Randomised { .. } => "randomised",
            RopeTerm::XPos { .. } => "xpos",
            RopeTerm::Ntk { .. } => "ntk",
            RopeTerm::Dynamic { .. } => "dynamic",
            RopeTerm::Yarn { .. } => "yarn",
            RopeTerm::LongRope { .. } => "longrope",
            RopeTerm::Llama3 { .. } => "llama3",
            RopeTerm::Abf { .. } => "abf",
            RopeTerm::Clex { .. } => "clex",
            RopeTerm::ClexInit { .. } => "clex-init",
        }
    }

    /// A rule of its own, which no other rule goes with.
    fn is_whole(&self) -> bool {
        !self.is_composed() && !matches!(self.name(), "abf" | "xpos" | "randomised")
    }

    /// One of Giraffe's three, which apply one after another.
    fn is_composed(&self) -> bool {
        matches!(self.name(), "linear" | "power" | "truncated")
    }

    fn parse(term: &str) -> Result<Self, String> {
        let (name, rest) = term.split_once(':').unwrap_or((term, ""));
        let name = match name.trim() {
            "randomized" => "randomised",
            name => name,
        };
        let names: &[&str] = match name {
            "default" => &[],
            "linear" | "ntk" => &["factor"],
            "dynamic" => &["factor", "keys"],
            "power" => &["exponent"],
            "truncated" => &["tokens"],
            "randomised" => &["eps"],
            "xpos" => &["scale_base"],
            "abf" => &["base"],
            "yarn" => &[
                "factor",
                "original",
                "beta_fast",
                "beta_slow",
                "attention_factor",
            ],
            "longrope" => &["file"],
            "llama3" => &["factor", "original", "low_freq_factor", "high_freq_factor"],
            "clex" => &[
                "folder",
                "max_factor",
                "window",
                "act",
                "time_dt",
                "log_scale",
            ],
            "clex-init" => &["max_factor"],
            unknown => return Err(format!("`{unknown}` is not known")),
        };
        let values = Values::split(name, names, rest)?;
        let original = || values.optional("original", |v, n| v.tokens(n));
        Ok(match name {
            "linear" => RopeTerm::Linear {
                factor: values.number("factor", 1.0)?,
            },
            "power" => RopeTerm::Power {
                exponent: values.number("exponent", 0.0)?,
            },
            "truncated" => RopeTerm::Truncated {
                tokens: values.tokens("tokens")?,
            },
            "randomised" => RopeTerm::Randomised {
                eps: values
                    .optional("eps", |v, n| v.number(n, 0.0))?
                    .unwrap_or(0.0),
            },
            "xpos" => RopeTerm::XPos {
                scale_base: values
                    .optional("scale_base", |v, n| v.number(n, 1.0))?
                    .unwrap_or(512.0),
            },
            "ntk" => RopeTerm::Ntk {
                factor: values.number("factor", 1.0)?,
            },
            "dynamic" => RopeTerm::Dynamic {
                factor: values.number("factor", 1.0)?,
                keys: values
                    .optional("keys", |v, n| v.word(n, "turned or kept"))?
                    .unwrap_or_default(),
            },
            "abf" => RopeTerm::Abf {
                base: values.number("base", 1.0)?,
            },
            "yarn" => RopeTerm::Yarn {
                factor: values.number("factor", 1.0)?,
                original: original()?,
                beta_fast: values
                    .optional("beta_fast", |v, n| v.number(n, 0.0))?
                    .unwrap_or(32.0),
                beta_slow: values
                    .optional("beta_slow", |v, n| v.number(n, 0.0))?
                    .unwrap_or(1.0),
                attention_factor: values.optional("attention_factor", |v, n| v.number(n, 0.0))?,
            },
            "longrope" => RopeTerm::LongRope {
                file: values.path("file")?,
            },
            "llama3" => RopeTerm::Llama3 {
                factor: values.number("factor", 1.0)?,
                original: original()?,
                low_freq_factor: values
                    .optional("low_freq_factor", |v, n| v.number(n, 0.0))?
                    .unwrap_or(1.0),
                high_freq_factor: values
                    .optional("high_freq_factor", |v, n| v.number(n, 0.0))?
                    .unwrap_or(4.0),
            },
            "clex" => RopeTerm::Clex {
                folder: values.path("folder")?,
                max_factor: values.optional("max_factor", |v, n| v.tokens(n))?,
                window: values.optional("window", |v, n| v.tokens(n))?,
                act: values.optional("act", |v, n| v.word(n, "tanh or silu"))?,
                time_dt: values.optional("time_dt", |v, n| v.number(n, 0.0))?,
                log_scale: values.optional("log_scale", |v, n| v.word(n, "off, max or raw"))?,
            },
            "clex-init" => RopeTerm::ClexInit {
                max_factor: values
                    .optional("max_factor", |v, n| v.tokens(n))?
                    .unwrap_or(16),
            },
            _ => RopeTerm::Default,
        })
    }
}

/// The values of one term by name.
struct Values<'a> {
    term: &'a str,
    values: Vec<(&'a str, &'a str)>,
}

impl<'a> Values<'a> {
    fn split(term: &'a str, names: &[&'a str], text: &'a str) -> Result<Self, String> {
        let mut values = Vec::new();
        // A path may hold colons, so its values are separated by commas only.
        let takes_path = matches!(names.first(), Some(&"file" | &"folder"));
        let items = text.split(|c| c == ',' || (c == ':' && !takes_path));
        let mut order = names.iter();
        for item in items.map(str::trim).filter(|_| !text.is_empty()) {
            let named = item
                .split_once('=')
                .filter(|(name, _)| names.contains(&name.trim()));
            let (name, value) = match named {
                Some((name, value)) => (name.trim(), value.trim()),
                None => match order.next() {
                    Some(name) => (*name, item),
                    None => return Err(format!("`{term}` has more than {} values", names.len())),
                },
            };
            if values.iter().any(|(seen, _)| *seen == name) {
                return Err(format!("`{name}` of `{term}` is given twice"));
            }
            values.push((name, value));
        }
        Ok(Values { term, values })
    }

    fn get(&self, name: &str) -> &'a str {
        let found = self.values.iter().find(|(key, _)| *key == name);
        found.map_or("", |(_, value)| value)
    }

    fn optional<T>(
        &self,
        name: &str,
        read: impl FnOnce(&Self, &str) -> Result<T, String>,
    ) -> Result<Option<T>, String> {
        if self.values.iter().any(|(key, _)| *key == name) {
            read(self, name).map(Some)
        } else {
            Ok(None)
        }
    }

    fn number(&self, name: &str, least: f64) -> Result<f64, String> {
        let value = self.get(name);
        match value.parse::<f64>() {
            Ok(number) if number.is_finite() && number >= least => Ok(number),
            _ => Err(format!(
                "`{}` needs a number of at least {least} as {name}, found `{value}`",
                self.term
            )),
        }
    }

    fn tokens(&self, name: &str) -> Result<usize, String> {
        let value = self.get(name);
        match value.parse::<usize>() {
            Ok(number) if number > 0 => Ok(number),
            _ => Err(format!(
                "`{}` needs a whole number above 0 as {name}, found `{value}`",
                self.term
            )),
        }
    }

    fn path(&self, name: &str) -> Result<PathBuf, String> {
        match self.get(name) {
            "" => Err(format!("`{}` needs a {name}", self.term)),
            path => Ok(path.into()),
        }
    }

    fn word<T: for<'de> Deserialize<'de>>(&self, name: &str, known: &str) -> Result<T, String> {
        let value = self.get(name);
        serde_json::from_value(value.into())
            .map_err(|_| format!("`{name}` of `{}` is `{value}`, expected {known}", self.term))
    }
}

/// The JSON word of a unit variant.
fn word<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(word)) => word,
        _ => String::new(),
    }
}

impl fmt::Display for RopeTerm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut values: Vec<String> = Vec::new();
        let mut named = |name: &str, value: Option<String>| {
            values.extend(value.map(|value| format!("{name}={value}")));
        };
        let text = |value: &Option<usize>| value.map(|value| value.to_string());
        match self {
            RopeTerm::Default => {}
            RopeTerm::Linear { factor } | RopeTerm::Ntk { factor } => {
                values.push(factor.to_string())
            }
            RopeTerm::Dynamic { factor, keys } => {
                values.push(factor.to_string());
                if *keys != CachedKeys::default() {
                    values.push(format!("keys={}", word(keys)));
                }
            }
            RopeTerm::Power { exponent } => values.push(exponent.to_string()),
            RopeTerm::Truncated { tokens } => values.push(tokens.to_string()),
            RopeTerm::Randomised { eps } => values.push(eps.to_string()),
            RopeTerm::XPos { scale_base } => values.push(scale_base.to_string()),
            RopeTerm::Abf { base } => values.push(base.to_string()),
            RopeTerm::Yarn {
                factor,
                original,
                beta_fast,
                beta_slow,
                attention_factor,
            } => {
                named("factor", Some(factor.to_string()));
                named("original", text(original));
                named(
                    "beta_fast",
                    (*beta_fast != 32.0).then(|| beta_fast.to_string()),
                );
                named(
                    "beta_slow",
                    (*beta_slow != 1.0).then(|| beta_slow.to_string()),
                );
                named("attention_factor", attention_factor.map(|a| a.to_string()));
            }
            RopeTerm::LongRope { file } => values.push(file.display().to_string()),
            RopeTerm::Llama3 {
                factor,
                original,
                low_freq_factor,
                high_freq_factor,
            } => {
                named("factor", Some(factor.to_string()));
                named("original", text(original));
                named("low_freq_factor", Some(low_freq_factor.to_string()));
                named("high_freq_factor", Some(high_freq_factor.to_string()));
            }
            RopeTerm::Clex {
                folder,
                max_factor,
                window,
                act,
                time_dt,
                log_scale,
            } => {
                named("folder", Some(folder.display().to_string()));
                named("max_factor", text(max_factor));
                named("window", text(window));
                named("act", act.as_ref().map(word));
                named("time_dt", time_dt.map(|dt| dt.to_string()));
                named("log_scale", log_scale.as_ref().map(word));
            }
            RopeTerm::ClexInit { max_factor } => values.push(max_factor.to_string()),
        }
        write!(f, "{}", self.name())?;
        if !values.is_empty() {
            write!(f, ":{}", values.join(","))?;
        }
        Ok(())
    }
}

impl fmt::Display for RopeOverride {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let terms: Vec<String> = self.terms.iter().map(RopeTerm::to_string).collect();
        write!(f, "{}", terms.join("+"))
    }
}

impl From<RopeOverride> for String {
    fn from(rope: RopeOverride) -> String {
        rope.to_string()
    }
}

impl TryFrom<String> for RopeOverride {
    type Error = RopeError;

    fn try_from(text: String) -> Result<Self, RopeError> {
        text.parse()
    }
}

impl FromStr for RopeOverride {
    type Err = RopeError;

    /// Errors name the term at fault and list the known forms. A path may hold neither `+` nor `,`.
    fn from_str(text: &str) -> Result<Self, RopeError> {
        let fail = |problem: String| RopeError::Override {
            text: text.into(),
            problem,
            known: KNOWN_OVERRIDES.join(", "),
        };
        let mut terms: Vec<RopeTerm> = Vec::new();
        for part in text.split('+') {
            let term = RopeTerm::parse(part.trim()).map_err(fail)?;
            if terms.iter().any(|seen| seen.name() == term.name()) {
                return Err(fail(format!("`{}` is given twice", term.name())));
            }
            let rule = terms.iter().find(|seen| seen.is_whole());
            let composed = terms.iter().find(|seen| seen.is_composed());
            match (rule, composed) {
                (Some(rule), _) if term.is_whole() => {
                    let problem = format!("`{part}` does not combine with another rule ({rule})");
                    return Err(fail(problem));
                }
                (Some(_), _) if term.is_composed() => {
                    return Err(fail(only_combines(term.name())));
                }
                (_, Some(composed)) if term.is_whole() => {
                    return Err(fail(only_combines(composed.name())));
                }
                _ => terms.push(term),
            }
        }
        Ok(RopeOverride { terms })
    }
}

fn only_combines(name: &str) -> String {
    format!("`{name}` only combines with linear, power, truncated, abf, xpos")
}

impl RopeOverride {
    /// The override that reads CLEX weights from a folder or file.
    pub fn clex(folder: impl Into<PathBuf>) -> Self {
        RopeOverride {
            terms: vec![RopeTerm::Clex {
                folder: folder.into(),
                max_factor: None,
                window: None,
                act: None,
                time_dt: None,
                log_scale: None,
            }],
        }
    }

    /// Its parts.
    pub fn terms(&self) -> &[RopeTerm] {
        &self.terms
    }

    /// Smallest step of random positions, if training is to draw them.
    pub fn randomised(&self) -> Option<f64> {
        self.terms.iter().find_map(|term| match term {
            RopeTerm::Randomised { eps } => Some(*eps),
            _ => None,
        })
    }

    /// The same with paths that do not depend on the working directory, for what is saved.
    pub fn with_absolute_paths(mut self) -> std::io::Result<Self> {
        for term in &mut self.terms {
            if let RopeTerm::LongRope { file: path } | RopeTerm::Clex { folder: path, .. } = term {
                *path = std::path::absolute(&path)?;
            }
        }
        Ok(self)
    }

    /// Applies it to the basis of a checkpoint: the checkpoint's own rule and stored frequency factors are
    /// dropped; its base (unless `abf` gives another), rotated coordinates and window are kept.
    ///
    /// Errors: a parameter out of range for this basis; a file that cannot be read.
    pub fn apply(&self, base: &RopeBasis) -> Result<RopeBasis, RopeError> {
        let theta = self.terms.iter().find_map(|term| match term {
            RopeTerm::Abf { base } => Some(*base),
            _ => None,
        });
        let window = base.max_position_embeddings;
        let plain = RopeBasis::new(theta.unwrap_or(base.rope_theta), base.rotary_dim, window)?
            .with_moving_pairs(base.moving_pairs)?;
        let mut basis = plain.clone();
        let (mut linear, mut power, mut truncated) = (1.0, 0.0, None);
        for term in &self.terms {
            let scaling = match term {
                RopeTerm::Default | RopeTerm::Abf { .. } | RopeTerm::Randomised { .. } => continue,
                RopeTerm::XPos { scale_base } => {
                    basis = basis.with_xpos(*scale_base)?;
                    continue;
                }
                RopeTerm::Linear { factor } => {
                    linear = *factor;
                    continue;
                }
                RopeTerm::Power { exponent } => {
                    power = *exponent;
                    continue;
                }
                RopeTerm::Truncated { tokens } => {
                    truncated = Some(*tokens);
                    continue;
                }
                RopeTerm::Ntk { factor } => RopeScaling::Ntk { factor: *factor },
                RopeTerm::Dynamic { factor, keys } => {
                    basis.keeps_keys = *keys == CachedKeys::Kept;
                    RopeScaling::Dynamic { factor: *factor }
                }
                RopeTerm::Yarn {
                    factor,
                    original,
                    beta_fast,
                    beta_slow,
                    attention_factor,
                } => RopeScaling::Yarn(YarnParameters {
                    beta_fast: *beta_fast,
                    beta_slow: *beta_slow,
                    attention_factor: *attention_factor,
                    ..YarnParameters::new(*factor, original.unwrap_or(window))
                }),
                RopeTerm::LongRope { file } => longrope(file, base)?,
                RopeTerm::Llama3 {
                    factor,
                    original,
                    low_freq_factor,
                    high_freq_factor,
                } => RopeScaling::Llama3 {
                    factor: *factor,
                    low_freq_factor: *low_freq_factor,
                    high_freq_factor: *high_freq_factor,
                    original_max_position_embeddings: original.unwrap_or(window),
                },
                RopeTerm::Clex {
                    folder,
                    max_factor,
                    window: given,
                    act,
                    time_dt,
                    log_scale,
                } => {
                    let mut weights = ClexWeights::open(folder)?;
                    let config = &mut weights.config;
                    config.max_factor = max_factor.unwrap_or(config.max_factor);
                    config.act = act.unwrap_or(config.act);
                    config.time_dt = time_dt.unwrap_or(config.time_dt);
                    config.log_scale = log_scale.unwrap_or(config.log_scale);
                    let window = given.or(weights.window).unwrap_or(window);
                    RopeScaling::Clex(weights.table(&plain.plain(plain.rope_theta), window)?)
                }
                RopeTerm::ClexInit { max_factor } => {
                    if base.rotary_dim < 4 || *max_factor > 4096 {
                        return Err(RopeError::field(
                            "rotary dimension, max_factor",
                            format!("{}, {max_factor}", base.rotary_dim),
                            "at least 4, because the rule raises the base, and at most 4096",
                        ));
                    }
                    let theta = plain.plain(plain.rope_theta);
                    RopeScaling::Clex(ClexTable::untrained(&theta, *max_factor, window))
                }
            };
            basis = basis.with_scaling(scaling)?;
        }
        if self.terms.iter().any(RopeTerm::is_composed) {
            basis = basis.with_scaling(RopeScaling::Composed {
                linear,
                power,
                truncated,
            })?;
        }
        Ok(basis)
    }
}

/// The factors of a `config.json`, or of a file that holds its `rope_scaling` alone.
fn longrope(file: &std::path::Path, base: &RopeBasis) -> Result<RopeScaling, RopeError> {
    let fail = |problem: String| RopeError::File {
        path: file.into(),
        problem,
    };
    let bytes = std::fs::read(file).map_err(|error| fail(error.to_string()))?;
    let mut whole: Value =
        serde_json::from_slice(&bytes).map_err(|error| fail(error.to_string()))?;
    let key = "original_max_position_embeddings";
    let beside = whole.get(key).cloned();
    for name in ["rope_scaling", "rope_parameters"] {
        if let Some(Value::Object(dict)) = whole.get(name) {
            whole = Value::Object(dict.clone());
        }
    }
    let Value::Object(dict) = &mut whole else {
        return Err(fail(format!("found {whole}, expected an object")));
    };
    dict.insert("rope_type".into(), "longrope".into());
    dict.remove("type");
    dict.remove("partial_rotary_factor");
    if let Some(original) = beside.filter(|value| !value.is_null()) {
        dict.insert(key.into(), original);
    }
    let basis = RopeBasis::from_hf(&whole, base.rotary_dim, base.max_position_embeddings)
        .map_err(|error| fail(error.to_string()))?;
    Ok(basis.scaling)
}

impl RopeBasis {
    /// Reads an override such as `yarn:4` and applies it to the basis of a checkpoint: see
    /// [`RopeOverride`]. Errors name the term at fault and list the known forms.
    pub fn parse_override(text: &str, base: &RopeBasis) -> Result<Self, RopeError> {
        text.parse::<RopeOverride>()?
            .apply(base)
            .map_err(|error| RopeError::Override {
                text: text.into(),
                problem: error.to_string(),
                known: KNOWN_OVERRIDES.join(", "),
            })
    }
}
