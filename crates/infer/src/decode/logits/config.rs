//! The options of sampling: one struct for the command line, recipes and the server.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// How a token is drawn from logits. Names and defaults are those of the OpenAI API, with `top_k`, `min_p`
/// and `repetition_penalty` as other servers and Hugging Face add them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingConfig {
    /// Logits are divided by it; 0 takes the likeliest token. At least 0.
    pub temperature: f32,
    /// Only the `top_k` likeliest tokens; 0 means all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability. Above 0, at most 1 (all).
    pub top_p: f32,
    /// Only tokens at least this fraction as likely as the likeliest. 0 (all) to 1.
    pub min_p: f32,
    /// Logits of tokens seen in prompt or answer are divided by it if positive, else multiplied.
    /// Above 0; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Subtracted from logits of tokens of the answer so far. -2 to 2.
    pub presence_penalty: f32,
    /// Subtracted once for each time a token occurs in the answer so far. -2 to 2.
    pub frequency_penalty: f32,
    /// Equal seeds give equal texts.
    pub seed: u64,
    /// Added to the logits of single tokens, by token id. -100 to 100.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Report the chosen token's log probability, and those of this many likeliest tokens (at most 20).
    pub logprobs: Option<usize>,
}

impl Default for SamplingConfig {
    fn default() -> SamplingConfig {
        SamplingConfig {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            logit_bias: BTreeMap::new(),
            logprobs: None,
        }
    }
}

/// Options that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SamplingError {
    #[error("option `{option}`: {found} found, {allowed} expected")]
    Value {
        option: &'static str,
        found: String,
        allowed: &'static str,
    },
    #[error("unknown option `{found}`; {known} expected")]
    UnknownOption { found: String, known: &'static str },
    #[error("option `logit_bias`: token {token} found, a vocabulary of {vocab_size} tokens has 0 to {}", vocab_size.saturating_sub(1))]
    UnknownToken { token: u32, vocab_size: usize },
}

const OPTIONS: &str = "temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, seed, logit_bias (as ID:BIAS;ID:BIAS) or logprobs";

impl SamplingConfig {
    /// Checks all ranges.
    ///
    /// # Errors
    /// [`SamplingError::Value`] names the first option out of range, its value and what is allowed.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let check = |option, found: f32, allowed, good: bool| {
            if good {
                return Ok(());
            }
            let found = found.to_string();
            Err(SamplingError::Value {
                option,
                found,
                allowed,
            })
        };
        // Comparisons with NaN are false, so NaN is out of every range.
        let t = self.temperature;
        check(
            "temperature",
            t,
            "a finite number of at least 0",
            (0.0..f32::INFINITY).contains(&t),
        )?;
        let p = self.top_p;
        check(
            "top_p",
            p,
            "a number above 0 and at most 1",
            p > 0.0 && p <= 1.0,
        )?;
        let p = self.min_p;
        check("min_p", p, "a number from 0 to 1", (0.0..=1.0).contains(&p))?;
        let r = self.repetition_penalty;
        check(
            "repetition_penalty",
            r,
            "a finite number above 0",
            r > 0.0 && r < f32::INFINITY,
        )?;
        let p = self.presence_penalty;
        check(
            "presence_penalty",
            p,
            "a number from -2 to 2",
            p.abs() <= 2.0,
        )?;
        let p = self.frequency_penalty;
        check(
            "frequency_penalty",
            p,
            "a number from -2 to 2",
            p.abs() <= 2.0,
        )?;
        for &bias in self.logit_bias.values() {
            check(
                "logit_bias",
                bias,
                "biases from -100 to 100",
                bias.abs() <= 100.0,
            )?;
        }
        match self.logprobs {
            Some(count) if count > 20 => Err(SamplingError::Value {
                option: "logprobs",
                found: count.to_string(),
                allowed: "at most 20",
            }),
            _ => Ok(()),
        }
    }

    /// [`SamplingConfig::validate`], and that biased tokens exist in the vocabulary.
    pub fn validate_for(&self, vocab_size: usize) -> Result<(), SamplingError> {
        self.validate()?;
        match self
            .logit_bias
            .keys()
            .find(|&&token| token as usize >= vocab_size)
        {
            Some(&token) => Err(SamplingError::UnknownToken { token, vocab_size }),
            None => Ok(()),
        }
    }
}

/// Parses `temperature=0.7,top_p=0.9`; what is not named keeps its default. Validates.
impl FromStr for SamplingConfig {
    type Err = SamplingError;

    fn from_str(text: &str) -> Result<SamplingConfig, SamplingError> {
        let mut config = SamplingConfig::default();
        for part in text
            .split(',')
            .map(str::trim)
            .filter(|part| !part.is_empty())
        {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            let name = name.trim().replace('-', "_");
            let value = value.trim();
            match name.as_str() {
                "temperature" => config.temperature = number("temperature", value)?,
                "top_k" => config.top_k = number("top_k", value)?,
                "top_p" => config.top_p = number("top_p", value)?,
                "min_p" => config.min_p = number("min_p", value)?,
                "repetition_penalty" => {
                    config.repetition_penalty = number("repetition_penalty", value)?
                }
                "presence_penalty" => config.presence_penalty = number("presence_penalty", value)?,
                "frequency_penalty" => {
                    config.frequency_penalty = number("frequency_penalty", value)?
                }
                "seed" => config.seed = number("seed", value)?,
                "logprobs" => config.logprobs = Some(number("logprobs", value)?),
                "logit_bias" => {
                    for pair in value.split(';') {
                        let (token, bias) = pair.split_once(':').unwrap_or((pair, ""));
                        let (token, bias) =
                            (number("logit_bias", token)?, number("logit_bias", bias)?);
                        config.logit_bias.insert(token, bias);
                    }
                }
                _ => {
                    return Err(SamplingError::UnknownOption {
                        found: part.to_owned(),
                        known: OPTIONS,
                    });
                }
            }
        }
        config.validate()?;
        Ok(config)
    }
}

fn number<T: FromStr>(option: &'static str, text: &str) -> Result<T, SamplingError> {
    text.trim().parse().map_err(|_| SamplingError::Value {
        option,
        found: format!("\"{text}\""),
        allowed: match option {
            "top_k" | "seed" | "logprobs" => "a whole number of at least 0",
            "logit_bias" => "ID:BIAS pairs separated by `;`",
            _ => "a number",
        },
    })
}

/// The options that differ from their defaults, as [`FromStr`] reads them.
impl fmt::Display for SamplingConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let default = SamplingConfig::default();
        let mut parts = Vec::new();
        let mut number = |name, value: f32, default: f32| {
            if value != default {
                parts.push(format!("{name}={value}"));
            }
        };
        number("temperature", self.temperature, default.temperature);
        number("top_p", self.top_p, default.top_p);
        number("min_p", self.min_p, default.min_p);
        number(
            "repetition_penalty",
            self.repetition_penalty,
            default.repetition_penalty,
        );
        number(
            "presence_penalty",
            self.presence_penalty,
            default.presence_penalty,
        );
        number(
            "frequency_penalty",
            self.frequency_penalty,
            default.frequency_penalty,
        );
        if self.top_k != default.top_k {
            parts.push(format!("top_k={}", self.top_k));
        }
        if self.seed != default.seed {
            parts.push(format!("seed={}", self.seed));
        }
        if let Some(count) = self.logprobs {
            parts.push(format!("logprobs={count}"));
        }
        if !self.logit_bias.is_empty() {
            let pairs: Vec<String> = self
                .logit_bias
                .iter()
                .map(|(id, bias)| format!("{id}:{bias}"))
                .collect();
            parts.push(format!("logit_bias={}", pairs.join(";")));
        }
        f.write_str(&parts.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_it_prints() {
        let text = "temperature=0.7,top_p=0.9,min_p=0.05,repetition_penalty=1.1,presence_penalty=-0.5,\
                    frequency_penalty=2,top_k=40,seed=18446744073709551615,logprobs=0,logit_bias=3:-100;7:1.5";
        let config: SamplingConfig = text.parse().unwrap();
        assert_eq!(config.to_string(), text);
        assert_eq!(config.logit_bias, BTreeMap::from([(3, -100.0), (7, 1.5)]));
        assert_eq!("".parse(), Ok(SamplingConfig::default()));
        assert_eq!(
            " top-p = 0.5 ".parse::<SamplingConfig>().unwrap().top_p,
            0.5
        );
    }

    #[test]
    fn json_as_the_openai_api_sends_it() {
        let text = r#"{"temperature": 0.2, "logit_bias": {"50256": -100}, "seed": 5}"#;
        let config: SamplingConfig = serde_json::from_str(text).unwrap();
        assert_eq!(config.logit_bias, BTreeMap::from([(50256, -100.0)]));
        assert_eq!(
            (config.temperature, config.top_p, config.seed),
            (0.2, 1.0, 5)
        );
        let back = serde_json::to_string(&config).unwrap();
        assert_eq!(
            serde_json::from_str::<SamplingConfig>(&back).unwrap(),
            config
        );
        assert_eq!(
            serde_json::from_str::<SamplingConfig>("{}").unwrap(),
            SamplingConfig::default()
        );
    }

    #[test]
    fn errors_name_option_value_and_range() {
        for (text, option, found) in [
            ("temperature=-1", "temperature", "-1"),
            ("temperature=inf", "temperature", "inf"),
            ("temperature=NaN", "temperature", "NaN"),
            ("top_p=0", "top_p", "0"),
            ("top_p=1.5", "top_p", "1.5"),
            ("min_p=-0.1", "min_p", "-0.1"),
            ("repetition_penalty=0", "repetition_penalty", "0"),
            ("presence_penalty=3", "presence_penalty", "3"),
            ("frequency_penalty=-2.5", "frequency_penalty", "-2.5"),
            ("logprobs=21", "logprobs", "21"),
            ("logit_bias=5:101", "logit_bias", "101"),
            ("logit_bias=5", "logit_bias", "\"\""),
            ("top_k=-1", "top_k", "\"-1\""),
            ("seed", "seed", "\"\""),
        ] {
            let error = text.parse::<SamplingConfig>().unwrap_err();
            let message = error.to_string();
            let start = format!("option `{option}`: {found} found, ");
            assert!(
                message.starts_with(&start) && message.ends_with("expected"),
                "{message}"
            );
        }
        let error = "colour=3"
            .parse::<SamplingConfig>()
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("colour=3") && error.contains("top_k"),
            "{error}"
        );
        let config: SamplingConfig = "logit_bias=9:1".parse().unwrap();
        assert!(config.validate_for(10).is_ok());
        assert!(
            config
                .validate_for(9)
                .unwrap_err()
                .to_string()
                .contains("0 to 8")
        );
    }
}
