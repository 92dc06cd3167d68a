//! Rotary rules as text, for `--rope` and recipe files: `yarn:4`, `linear:4+power:0.5`, `abf:500000`.

use super::{RopeBasis, RopeError, RopeScaling, YarnParameters};

/// The accepted forms of one term, as shown in help and in errors.
pub const KNOWN_OVERRIDES: &[&str] = &[
    "default",
    "linear:FACTOR",
    "power:EXPONENT",
    "truncated:TOKENS",
    "ntk:FACTOR",
    "dynamic:FACTOR",
    "yarn:FACTOR[:ORIGINAL_TOKENS]",
    "abf:BASE",
];

/// How terms combine, in one sentence for `--help`.
pub const OVERRIDE_HELP: &str = "linear, power and truncated combine with `+`, and abf with anything; \
     the checkpoint's own rope scaling is replaced";

impl RopeBasis {
    /// Reads an override such as `yarn:4` and applies it to the basis of a checkpoint.
    ///
    /// The text names the whole rule: the checkpoint's own rule and stored frequency factors are dropped,
    /// its base (unless `abf` gives another), rotated coordinates and window are kept. `yarn` takes the
    /// checkpoint's window as its original window unless one is given. Errors name the term at fault and
    /// list the known forms.
    pub fn parse_override(text: &str, base: &RopeBasis) -> Result<Self, RopeError> {
        let fail = |problem: String| RopeError::Override {
            text: text.into(),
            problem,
            known: KNOWN_OVERRIDES.join(", "),
        };
        let (mut linear, mut power, mut truncated) = (1.0, 0.0, None);
        let mut whole_rule: Option<RopeScaling> = None;
        let mut theta = base.rope_theta;
        let mut seen: Vec<&str> = Vec::new();

        for term in text.split('+') {
            let mut parts = term.trim().split(':');
            let name = parts.next().unwrap_or_default();
            let arguments: Vec<&str> = parts.collect();
            if seen.contains(&name) {
                return Err(fail(format!("`{name}` is given twice")));
            }
            seen.push(name);

            let most = match name {
                "default" => 0,
                "yarn" => 2,
                _ => 1,
            };
            if arguments.len() > most {
                return Err(fail(format!("`{term}` has more than {most} values")));
            }
            let number = |least: f64| -> Result<f64, RopeError> {
                let argument = arguments.first().copied().unwrap_or_default();
                match argument.parse::<f64>() {
                    Ok(value) if value.is_finite() && value >= least => Ok(value),
                    _ => Err(fail(format!(
                        "`{name}` needs a number of at least {least}, found `{argument}`"
                    ))),
                }
            };
            let tokens = |index: usize| -> Result<usize, RopeError> {
                let argument = arguments.get(index).copied().unwrap_or_default();
                match argument.parse::<usize>() {
                    Ok(value) if value > 0 => Ok(value),
                    _ => Err(fail(format!(
                        "`{name}` needs a whole number of tokens above 0, found `{argument}`"
                    ))),
                }
            };
            let rule = match name {
                "default" => RopeScaling::Default,
                "ntk" => RopeScaling::Ntk {
                    factor: number(1.0)?,
                },
                "dynamic" => RopeScaling::Dynamic {
                    factor: number(1.0)?,
                },
                "yarn" => {
                    let original = match arguments.len() {
                        2 => tokens(1)?,
                        _ => base.max_position_embeddings,
                    };
                    RopeScaling::Yarn(YarnParameters::new(number(1.0)?, original))
                }
                "linear" => {
                    linear = number(1.0)?;
                    continue;
                }
                "power" => {
                    power = number(0.0)?;
                    continue;
                }
                "truncated" => {
                    truncated = Some(tokens(0)?);
                    continue;
                }
                "abf" => {
                    theta = number(1.0)?;
                    continue;
                }
                unknown => return Err(fail(format!("`{unknown}` is not known"))),
            };
            if whole_rule.replace(rule).is_some() {
                return Err(fail(format!("`{term}` does not combine with another rule")));
            }
        }

        let composed = seen
            .iter()
            .find(|n| ["linear", "power", "truncated"].contains(n));
        let scaling = match (whole_rule, composed) {
            (Some(_), Some(other)) => {
                return Err(fail(format!(
                    "`{other}` only combines with linear, power, truncated, abf"
                )));
            }
            (Some(rule), None) => rule,
            (None, Some(_)) => RopeScaling::Composed {
                linear,
                power,
                truncated,
            },
            (None, None) => RopeScaling::Default,
        };
        RopeBasis::new(theta, base.rotary_dim, base.max_position_embeddings)?
            .with_moving_pairs(base.moving_pairs)?
            .with_scaling(scaling)
            .map_err(|error| fail(error.to_string()))
    }
}
