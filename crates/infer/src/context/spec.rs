//! One configuration for command line, recipe files and server: `NAME[:value,...][:key=value,...]`.

use super::*;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Which policy, with its hyper-parameters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "policy", rename_all = "kebab-case")]
pub enum ContextConfig {
    /// Everything.
    #[default]
    Full,
    /// The last tokens.
    Window(WindowConfig),
    /// StreamingLLM.
    Sinks(SinksConfig),
    /// LM-Infinite.
    LmInfinite(LmInfiniteConfig),
    /// InfLLM.
    #[serde(rename = "infllm")]
    InfLlm(InfLlmConfig),
    /// SirLLM.
    #[serde(rename = "sirllm")]
    SirLlm(SirLlmConfig),
    /// H2O.
    #[serde(rename = "h2o")]
    H2o(H2oConfig),
    /// Mixed spans.
    Span(SpanConfig),
    /// Squeezed Attention.
    Squeezed(SqueezedConfig),
    /// HiP.
    Hip(HipConfig),
    /// Contextual Memory Reweaving, without training.
    Cmr(CmrConfig),
}

/// A configuration that cannot be used. The text names option, value found and what is allowed.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("--context {text}: {reason}")]
pub struct ContextError {
    text: String,
    reason: String,
}

/// Names of all policies.
pub const POLICIES: [&str; 11] = [
    "full",
    "window",
    "sinks",
    "lm-infinite",
    "infllm",
    "sirllm",
    "h2o",
    "span",
    "squeezed",
    "hip",
    "cmr",
];

const KNOWN: &str = "full, window:SIZE, sinks:N_INIT,N_LOCAL, lm-infinite:LOCAL,GLOBAL,TOP_K, infllm:n_local=...,block=...,topk=..., sirllm:top=...,decay=..., h2o:HEAVY,RECENT, span:full=bottom-N,local=window-SIZE,sinks=..., squeezed:PERCENTILE,LOWER, hip:k=...,beams=...,window=...,refresh=..., cmr:WINDOW,CAPACITY,keep=...";

impl ContextConfig {
    /// Makes the policy for a model with this trained window (tokens).
    pub fn build(&self, window: u64) -> Result<Box<dyn ContextPolicy>, ContextError> {
        let refuse = |reason: String| {
            Err(ContextError {
                text: self.to_string(),
                reason,
            })
        };
        Ok(match self {
            ContextConfig::Full => Box::new(Full::default()),
            ContextConfig::Window(config) => match config.size.unwrap_or(window) {
                0 => return refuse("size is 0, expected at least 1".into()),
                size => Box::new(Window::new(size)),
            },
            ContextConfig::Sinks(config) => {
                let n_local = config
                    .n_local
                    .unwrap_or(window.saturating_sub(config.n_init));
                if n_local == 0 {
                    return refuse(format!(
                        "n_local is 0 (n_init is {} of a window of {window}), expected at least 1",
                        config.n_init
                    ));
                }
                Box::new(Sinks::new(config.n_init, n_local))
            }
            ContextConfig::LmInfinite(config) => {
                if config.local == Some(0) {
                    return refuse("local is 0, expected at least 1".into());
                }
                Box::new(LmInfinite::new(config, window))
            }
            ContextConfig::InfLlm(config) => match config.check(window) {
                Err(reason) => return refuse(reason),
                Ok(()) => Box::new(InfLlm::new(config, window)),
            },
            ContextConfig::SirLlm(config) => match config.check(window) {
                Err(reason) => return refuse(reason),
                Ok(()) => Box::new(SirLlm::new(config, window)),
            },
            ContextConfig::H2o(config) => match config.check(window) {
                Err(reason) => return refuse(reason),
                Ok(()) => Box::new(H2o::new(config, window)),
            },
            ContextConfig::Span(config) => Box::new(Span::new(config)),
            ContextConfig::Squeezed(config) => match config.check() {
                Err(reason) => return refuse(reason),
                Ok(()) => Box::new(Squeezed::new(config)),
            },
            ContextConfig::Hip(config) => match config.check() {
                Err(reason) => return refuse(reason),
                Ok(()) => Box::new(Hip::new(config)),
            },
            ContextConfig::Cmr(config) => match config.check(window) {
                Err(reason) => return refuse(reason),
                Ok(()) => Box::new(Cmr::new(config, window)),
            },
        })
    }

    /// The policy's name without parameters.
    pub fn name(&self) -> &'static str {
        match self {
            ContextConfig::Full => "full",
            ContextConfig::Window(_) => "window",
            ContextConfig::Sinks(_) => "sinks",
            ContextConfig::LmInfinite(_) => "lm-infinite",
            ContextConfig::InfLlm(_) => "infllm",
            ContextConfig::SirLlm(_) => "sirllm",
            ContextConfig::H2o(_) => "h2o",
            ContextConfig::Span(_) => "span",
            ContextConfig::Squeezed(_) => "squeezed",
            ContextConfig::Hip(_) => "hip",
            ContextConfig::Cmr(_) => "cmr",
        }
    }
}

impl FromStr for ContextConfig {
    type Err = ContextError;

    fn from_str(text: &str) -> Result<Self, ContextError> {
        let (name, parameters) = text.split_once(':').unwrap_or((text, ""));
        let wrap = |reason: String| ContextError {
            text: text.into(),
            reason,
        };
        match name {
            "full" if parameters.is_empty() => Ok(ContextConfig::Full),
            "full" => Err(wrap("full takes no parameters".into())),
            "window" => parse(parameters, &["size"])
                .map(ContextConfig::Window)
                .map_err(wrap),
            "sinks" => parse(parameters, &["n_init", "n_local"])
                .map(ContextConfig::Sinks)
                .map_err(wrap),
            "lm-infinite" => parse(parameters, &["local", "global", "top_k"])
                .map(ContextConfig::LmInfinite)
                .map_err(wrap),
            "infllm" => parse(parameters, &["n_local"])
                .map(ContextConfig::InfLlm)
                .map_err(wrap),
            "sirllm" => parse(parameters, &["top"])
                .map(ContextConfig::SirLlm)
                .map_err(wrap),
            "h2o" => parse(parameters, &["heavy", "recent"])
                .map(ContextConfig::H2o)
                .map_err(wrap),
            "span" => parse(parameters, &["full", "local"])
                .map(ContextConfig::Span)
                .map_err(wrap),
            "squeezed" => parse(parameters, &["percentile", "lower"])
                .map(ContextConfig::Squeezed)
                .map_err(wrap),
            "hip" => parse(parameters, &["k"])
                .map(ContextConfig::Hip)
                .map_err(wrap),
            "cmr" => parse(parameters, &["window", "capacity"])
                .map(ContextConfig::Cmr)
                .map_err(wrap),
            _ => Err(wrap(format!("unknown policy {name:?}; known: {KNOWN}"))),
        }
    }
}

/// `value,value,key=value`: values without a key take the `positional` names in order.
fn parse<T: DeserializeOwned>(text: &str, positional: &[&str]) -> Result<T, String> {
    let mut map = serde_json::Map::new();
    let mut names = positional.iter();
    for item in text.split([',', ':']).filter(|item| !item.is_empty()) {
        let (key, value) = match item.split_once('=') {
            Some((key, value)) => (key, value),
            None => match names.next() {
                Some(name) => (*name, item),
                None => return Err(format!("{item:?} has no name; write key=value")),
            },
        };
        let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
        if map.insert(key.into(), value).is_some() {
            return Err(format!("{key} is given twice"));
        }
    }
    serde_json::from_value(map.into()).map_err(|error| error.to_string())
}

impl fmt::Display for ContextConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name())?;
        let value = serde_json::to_value(self).map_err(|_| fmt::Error)?;
        let fields = value
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(key, value)| *key != "policy" && !value.is_null());
        for (index, (key, value)) in fields.enumerate() {
            let value = value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_string);
            write!(f, "{}{key}={value}", if index == 0 { ':' } else { ',' })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips_and_mistakes_are_named() {
        for text in [
            "full",
            "window:512",
            "sinks:4,100",
            "lm-infinite:512,10,5",
            "infllm:n_local=256,block=32,topk=4,exec_block=128,evict=lru-s",
            "sirllm:top=252,decay=0.9,entropy=self-shifted",
            "h2o:64,64,positions=cache",
            "span:full=every-5,local=block-prev-256,sinks=0",
            "span:full=3+9,local=window-64",
            "squeezed:0.9,0.5",
            "hip:k=2048,beams=0,window=512,representative=first,prefill=false,share=none",
            "squeezed:0.9,sinks=0,refresh=8,share=none",
            "cmr:layers=3",
            "cmr:512,64,layers=3+7,distance=own",
        ] {
            let config: ContextConfig = text.parse().unwrap();
            assert_eq!(
                config.to_string().parse::<ContextConfig>().unwrap(),
                config,
                "{text}"
            );
        }
        let window: ContextConfig = "window:512".parse().unwrap();
        assert_eq!(
            window,
            ContextConfig::Window(WindowConfig { size: Some(512) })
        );
        for (text, word) in [
            ("magic", "unknown policy"),
            ("window:a", "invalid type"),
            ("window:1,2", "has no name"),
            ("infllm:blok=3", "blok"),
            ("infllm:block=3,block=4", "twice"),
            ("span:local=row-3", "block-prev-SIZE"),
            ("h2o:positions=far", "absolute"),
            ("hip:depth=3", "depth"),
            ("cmr:distance=far", "own"),
        ] {
            let error = text.parse::<ContextConfig>().unwrap_err().to_string();
            assert!(error.contains(word) && error.contains(text), "{error}");
        }
        let too_wide: ContextConfig = "infllm:n_local=8000".parse().unwrap();
        assert!(
            too_wide
                .build(8192)
                .err()
                .unwrap()
                .to_string()
                .contains("window of 8192")
        );
        assert!(
            "window:0"
                .parse::<ContextConfig>()
                .unwrap()
                .build(10)
                .is_err()
        );
    }
}
