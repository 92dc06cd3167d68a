//! Which policy for a text, a model and a machine, where nobody says: `--context auto`.
//!
//! The rule is what `longspan bench context` printed; `docs/choosing.md` holds the table.

use super::{ContextConfig, ContextError, InfLlmConfig};

/// What the choice depends on.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    /// Tokens of text, question and answer.
    pub tokens: u64,
    /// The window of the model, in tokens, under its rotary rule.
    pub window: u64,
    /// Bytes of keys and values of a token; 0 = the model carries a state instead.
    pub kv_bytes_per_token: u64,
    /// Memory that can be had; None = not known.
    pub free_bytes: Option<u64>,
    /// On other devices there is only full attention.
    pub cpu: bool,
}

/// The policy, and why, for people.
pub fn choose(need: &Need) -> (ContextConfig, String) {
    let Need { tokens, window, .. } = *need;
    if !need.cpu {
        return (ContextConfig::Full, "the only policy on this device".into());
    }
    if need.kv_bytes_per_token == 0 {
        let why = "the model carries a state of fixed size, whatever the length";
        return (ContextConfig::Full, why.into());
    }
    let infllm = || ContextConfig::InfLlm(InfLlmConfig::fitting(window));
    if tokens > window {
        let why = format!(
            "{} tokens exceed the model's window of {}",
            count(tokens),
            count(window)
        );
        return (infllm(), why);
    }
    let bytes = tokens * need.kv_bytes_per_token;
    if let Some(free) = need.free_bytes.filter(|&free| bytes > free / 10 * 8) {
        let mb = |bytes: u64| bytes / 1_000_000;
        let why = format!(
            "keys and values of {} tokens need {} MB, of {} MB that are free",
            count(tokens),
            mb(bytes),
            mb(free)
        );
        return (infllm(), why);
    }
    let fits = format!(
        "{} tokens fit the model's window of {}",
        count(tokens),
        count(window)
    );
    (ContextConfig::Full, fits)
}

/// A policy's text; InfLLM without parameters is fitted to the window.
///
/// # Errors
/// Text that names no policy or no possible parameters.
pub fn parse(text: &str, window: u64) -> Result<ContextConfig, ContextError> {
    let config = text.parse()?;
    Ok(match config {
        ContextConfig::InfLlm(config) if config == InfLlmConfig::default() => {
            ContextConfig::InfLlm(InfLlmConfig::fitting(window))
        }
        config => config,
    })
}

fn count(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| std::str::from_utf8(group).unwrap_or(""))
        .collect();
    groups.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(tokens: u64) -> Need {
        Need {
            tokens,
            window: 8192,
            kv_bytes_per_token: 23_040,
            free_bytes: Some(8 << 30),
            cpu: true,
        }
    }

    #[test]
    fn the_choice_can_always_be_built() {
        for window in [128, 512, 2048, 8192, 32_768, 131_072] {
            for tokens in [1, window / 2, window, window + 1, 100 * window] {
                for free_bytes in [None, Some(0), Some(1 << 20), Some(64 << 30)] {
                    let need = Need {
                        window,
                        free_bytes,
                        ..need(tokens)
                    };
                    let (config, why) = choose(&need);
                    config
                        .build(window)
                        .unwrap_or_else(|error| panic!("{error}"));
                    assert!(!why.is_empty());
                    if tokens > window {
                        assert_eq!(config.name(), "infllm");
                    }
                }
            }
        }
    }

    #[test]
    fn little_memory_needs_a_policy_that_puts_keys_away() {
        assert_eq!(choose(&need(4000)).0, ContextConfig::Full);
        let little = Need {
            free_bytes: Some(50 << 20),
            ..need(4000)
        };
        let (config, why) = choose(&little);
        assert!(config.name() == "infllm" && why.contains("92 MB"), "{why}");
        let gpu = Need {
            cpu: false,
            ..need(100_000)
        };
        assert_eq!(choose(&gpu).0, ContextConfig::Full);
        let state = Need {
            kv_bytes_per_token: 0,
            ..need(100_000)
        };
        let (config, why) = choose(&state);
        assert!(
            config == ContextConfig::Full && why.contains("state"),
            "{why}"
        );
    }

    #[test]
    fn infllm_is_fitted_unless_told() {
        let fitted = parse("infllm", 1024).unwrap();
        assert!(fitted.build(1024).is_ok());
        assert!(
            "infllm"
                .parse::<ContextConfig>()
                .unwrap()
                .build(1024)
                .is_err()
        );
        let text = "infllm:topk=3";
        assert_eq!(parse(text, 1024).unwrap(), text.parse().unwrap());
    }
}
