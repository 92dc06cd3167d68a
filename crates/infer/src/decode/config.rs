//! One configuration of decoding for command line, recipe files and server: `NAME[:key=value,...]`.

use super::beam::{BeamConfig, BeamStrategy};
use super::logits::SamplingConfig;
use super::lookahead::{Lookahead, LookaheadConfig, SharedTrie};
use super::sample::{Sample, Sampling};
use super::session::{DecodeError, Result};
use super::strategy::Strategy;
use super::tree_search::{TreeConfig, TreeSearch};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Which strategy, with its hyper-parameters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "strategy", rename_all = "kebab-case")]
pub enum DecodeConfig {
    /// One token after another, by the request's own sampling options.
    #[default]
    Plain,
    /// The likeliest token.
    Greedy,
    /// Draws, by options of its own.
    Sample(SamplingConfig),
    /// Beam search.
    Beam(BeamConfig),
    /// Diverse Beam Search.
    Dbs(BeamConfig),
    /// Verified drafts from tries.
    Lookahead(LookaheadConfig),
    /// Tree search.
    Tree(TreeConfig),
}

const KNOWN: &str = "plain, greedy, sample:temperature=..,top_p=.., beam:beams=.., dbs:groups=..,lambda=..,term=.., lookahead:decoding_length=..,branch_length=.., tree:mode=..,budget=..,top_k=..";

impl DecodeConfig {
    /// Makes the strategy. `sampling` are the request's options; strategies that search take the model's
    /// own distribution and refuse options that would bend it. `stream` tells sequences of a batch apart.
    /// `drafts` is a store that lookahead shares with other requests, None for one of its own.
    pub fn build(
        &self,
        sampling: &SamplingConfig,
        stream: u64,
        drafts: Option<SharedTrie>,
    ) -> Result<Box<dyn Strategy>> {
        let plain = |config: &SamplingConfig| -> Result<Sampling> {
            Ok(Sampling::new(Box::new(Sample::new(
                config.clone(),
                stream,
            )?)))
        };
        let greedy = SamplingConfig {
            temperature: 0.0,
            logprobs: sampling.logprobs,
            seed: sampling.seed,
            ..SamplingConfig::default()
        };
        let searches = matches!(
            self,
            DecodeConfig::Beam(_) | DecodeConfig::Dbs(_) | DecodeConfig::Tree(_)
        );
        let own = matches!(self, DecodeConfig::Greedy | DecodeConfig::Sample(_));
        // The filters below temperature mean nothing at temperature 0.
        let bends = SamplingConfig {
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            ..sampling.clone()
        };
        if (searches || own) && bends != greedy {
            let reason = if searches {
                "searches the model's own distribution; take away temperature, penalties and biases"
            } else {
                "brings sampling options of its own; give them there or take --decode plain"
            };
            return Err(self.wrong(reason.into()));
        }
        Ok(match self {
            DecodeConfig::Plain => Box::new(plain(sampling)?),
            DecodeConfig::Greedy => Box::new(plain(&greedy)?),
            DecodeConfig::Sample(config) => {
                let logprobs = config.logprobs.or(sampling.logprobs);
                Box::new(plain(&SamplingConfig {
                    logprobs,
                    ..config.clone()
                })?)
            }
            DecodeConfig::Beam(config) => {
                Box::new(BeamStrategy::new(ungrouped(config), &self.to_string())?)
            }
            DecodeConfig::Dbs(config) => {
                Box::new(BeamStrategy::new(config.clone(), &self.to_string())?)
            }
            DecodeConfig::Lookahead(config) => {
                let sampler = Box::new(Sample::new(sampling.clone(), stream)?);
                let lookahead = Lookahead::new(config.clone(), sampler)?;
                Box::new(match drafts {
                    Some(store) => lookahead.with_store(store),
                    None => lookahead,
                })
            }
            DecodeConfig::Tree(config) => {
                Box::new(TreeSearch::new(config.clone(), &self.to_string())?)
            }
        })
    }

    fn check(&self) -> std::result::Result<(), String> {
        match self {
            DecodeConfig::Plain | DecodeConfig::Greedy => Ok(()),
            DecodeConfig::Sample(config) => config.validate().map_err(|e| e.to_string()),
            DecodeConfig::Beam(config) if config.groups.is_some_and(|groups| groups != 1) => {
                Err("groups are for dbs; beam has one".into())
            }
            DecodeConfig::Beam(config) => ungrouped(config).check(),
            DecodeConfig::Dbs(config) => config.check(),
            DecodeConfig::Lookahead(config) => config.check(),
            DecodeConfig::Tree(config) => config.resolved().map(|_| ()),
        }
    }

    fn wrong(&self, reason: String) -> DecodeError {
        DecodeError::Option {
            text: self.to_string(),
            reason,
        }
    }

    /// The strategy's name without parameters.
    pub fn name(&self) -> &'static str {
        match self {
            DecodeConfig::Plain => "plain",
            DecodeConfig::Greedy => "greedy",
            DecodeConfig::Sample(_) => "sample",
            DecodeConfig::Beam(_) => "beam",
            DecodeConfig::Dbs(_) => "dbs",
            DecodeConfig::Lookahead(_) => "lookahead",
            DecodeConfig::Tree(_) => "tree",
        }
    }
}

/// A strategy from its text; what samples takes the likeliest token unless the text says otherwise.
/// `stream` tells sequences apart that share a seed.
pub fn parse(text: &str, stream: u64) -> Result<Box<dyn Strategy>> {
    let greedy = SamplingConfig {
        temperature: 0.0,
        ..SamplingConfig::default()
    };
    text.parse::<DecodeConfig>()?.build(&greedy, stream, None)
}

fn ungrouped(config: &BeamConfig) -> BeamConfig {
    BeamConfig {
        groups: Some(1),
        beams: Some(config.beams.unwrap_or(4)),
        ..config.clone()
    }
}

impl FromStr for DecodeConfig {
    type Err = DecodeError;

    fn from_str(text: &str) -> Result<DecodeConfig> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        let parsed = match name.trim() {
            "plain" if rest.is_empty() => Ok(DecodeConfig::Plain),
            "greedy" if rest.is_empty() => Ok(DecodeConfig::Greedy),
            "plain" | "greedy" => Err(format!("{name} takes no parameters")),
            "sample" => rest
                .parse()
                .map(DecodeConfig::Sample)
                .map_err(|error: super::logits::SamplingError| error.to_string()),
            "beam" => options(rest).map(DecodeConfig::Beam),
            "dbs" => options(rest).map(DecodeConfig::Dbs),
            "lookahead" => options(rest).map(DecodeConfig::Lookahead),
            "tree" => options(rest).map(DecodeConfig::Tree),
            _ => Err(format!("unknown strategy {name:?}; known: {KNOWN}")),
        };
        let checked = parsed.and_then(|config| config.check().map(|()| config));
        checked.map_err(|reason| DecodeError::Option {
            text: text.into(),
            reason,
        })
    }
}

/// `key=value,...`; values of a list stand between `;`.
fn options<T: DeserializeOwned>(text: &str) -> std::result::Result<T, String> {
    let mut map = serde_json::Map::new();
    for item in text.split(',').filter(|item| !item.trim().is_empty()) {
        let Some((key, value)) = item.split_once('=') else {
            return Err(format!("{item:?} has no name; write key=value"));
        };
        let (key, value) = (key.trim().replace('-', "_"), value.trim());
        let value = if key == "stop_words" {
            value.split(';').map(scalar).collect()
        } else {
            scalar(value)
        };
        if map.insert(key.clone(), value).is_some() {
            return Err(format!("{key} is given twice"));
        }
    }
    serde_json::from_value(map.into()).map_err(|error| error.to_string())
}

fn scalar(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|_| text.into())
}

/// The options that differ from their defaults, as [`FromStr`] reads them.
impl fmt::Display for DecodeConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let default = match self {
            DecodeConfig::Sample(config) => {
                let options = config.to_string();
                let colon = if options.is_empty() { "" } else { ":" };
                return write!(f, "sample{colon}{options}");
            }
            DecodeConfig::Plain | DecodeConfig::Greedy => self.clone(),
            DecodeConfig::Beam(_) => DecodeConfig::Beam(BeamConfig::default()),
            DecodeConfig::Dbs(_) => DecodeConfig::Dbs(BeamConfig::default()),
            DecodeConfig::Lookahead(_) => DecodeConfig::Lookahead(LookaheadConfig::default()),
            DecodeConfig::Tree(_) => DecodeConfig::Tree(TreeConfig::default()),
        };
        let value = |config: &DecodeConfig| serde_json::to_value(config).map_err(|_| fmt::Error);
        let (mine, default) = (value(self)?, value(&default)?);
        write!(f, "{}", self.name())?;
        let fields = mine.as_object().into_iter().flatten();
        let changed = fields.filter(|(key, value)| default.get(key) != Some(value));
        for (index, (key, value)) in changed.enumerate() {
            let value = match value {
                serde_json::Value::String(text) => text.clone(),
                serde_json::Value::Array(list) => {
                    let items: Vec<String> = list.iter().map(|item| item.to_string()).collect();
                    items.join(";")
                }
                other => other.to_string(),
            };
            write!(f, "{}{key}={value}", if index == 0 { ':' } else { ',' })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_json_round_trip() {
        for text in [
            "plain",
            "greedy",
            "sample:temperature=0.7,top_p=0.9",
            "beam:beams=6,early_stopping=never,n=3",
            "dbs:beams=6,groups=3,lambda=0.8,term=hamming+0.3*ngram:2",
            "lookahead:branch_length=8,decoding_length=16,layout=par,stop_words=4;9",
            "tree:alpha=inf,budget=50,mode=leaf,top_k=3",
            "tree:adaptive=0.9,backup=max,confidence=min,roll=8",
        ] {
            let config: DecodeConfig = text.parse().unwrap();
            let again: DecodeConfig = config.to_string().parse().unwrap();
            assert_eq!(again, config, "{text} became {config}");
            let json = serde_json::to_string(&config).unwrap();
            let again: DecodeConfig = serde_json::from_str(&json).unwrap();
            assert_eq!(again, config, "{json}");
            let greedy = SamplingConfig {
                temperature: 0.0,
                ..SamplingConfig::default()
            };
            let strategy = config.build(&greedy, 0, None).unwrap();
            let searches = ["beam", "dbs", "tree"].contains(&config.name());
            assert_eq!(strategy.streams(), !searches);
        }
        let dbs: DecodeConfig = "dbs:groups=3".parse().unwrap();
        assert_eq!(dbs.to_string(), "dbs:groups=3");
    }

    #[test]
    fn mistakes_are_named() {
        for (text, word) in [
            ("magic", "unknown strategy"),
            ("greedy:top_p=1", "takes no parameters"),
            ("dbs:group=3", "group"),
            ("dbs:beams=5,groups=3", "divisor of beams = 5"),
            ("dbs:term=what", "unknown term"),
            ("dbs:early_stopping=maybe", "expected true, false or never"),
            ("beam:groups=2", "groups are for dbs"),
            ("beam:4", "has no name"),
            ("beam:beams=4,beams=5", "twice"),
            ("lookahead:branch_length=0", "branch_length is 0"),
            ("lookahead:layout=heap", "heap"),
            ("tree:alpha=-1", "alpha is -1"),
            ("tree:mode=dfs", "dfs"),
            ("sample:heat=1", "heat=1"),
            ("sample:top_p=7", "top_p"),
        ] {
            let error = text.parse::<DecodeConfig>().unwrap_err().to_string();
            assert!(error.contains(word) && error.contains(text), "{error}");
        }
    }

    #[test]
    fn searches_refuse_what_would_bend_the_distribution() {
        let hot = SamplingConfig::default();
        for text in ["beam", "dbs", "tree", "greedy", "sample"] {
            let config: DecodeConfig = text.parse().unwrap();
            let error = config.build(&hot, 0, None).err().unwrap().to_string();
            assert!(error.contains(text), "{error}");
        }
        let config: DecodeConfig = "lookahead".parse().unwrap();
        assert!(config.build(&hot, 0, None).is_ok());
    }
}
