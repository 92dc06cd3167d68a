//! The star-shaped graphical model of paper 08 (Order Matters): one head variable, and others that depend on it alone. The
//! true entropy is known, so that what an order of the variables costs can be told in nats.

use crate::random::Random;
use serde::{Deserialize, Serialize};

/// How a model is drawn. Rows of its tables are softmax(beta N(0, 1)).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StarConfig {
    /// Variables, the head among them.
    pub variables: usize,
    /// Values of each.
    pub symbols: usize,
    /// How peaked the distributions are; the paper gives no formula.
    pub beta: f64,
}

impl Default for StarConfig {
    fn default() -> Self {
        StarConfig {
            variables: 20,
            symbols: 10,
            beta: 2.0,
        }
    }
}

/// A drawn model: variable 0 is the head.
#[derive(Clone, Debug)]
pub struct Star {
    config: StarConfig,
    /// [symbols]
    head: Vec<f64>,
    /// [variables - 1][head's value][symbols]
    tables: Vec<Vec<Vec<f64>>>,
}

impl Star {
    /// The model of this seed.
    pub fn new(config: &StarConfig, seed: u64) -> Self {
        let config = StarConfig {
            variables: config.variables.max(1),
            symbols: config.symbols.max(1),
            beta: config.beta,
        };
        let mut random = Random::new(seed, "star tables");
        let mut row = || {
            let logits: Vec<f64> = (0..config.symbols)
                .map(|_| config.beta * random.normal())
                .collect();
            let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.iter().map(|l| (l - top).exp()).sum();
            logits
                .iter()
                .map(|l| (l - top).exp() / sum)
                .collect::<Vec<f64>>()
        };
        let head = row();
        let tables = (1..config.variables)
            .map(|_| (0..config.symbols).map(|_| row()).collect())
            .collect();
        Star {
            config,
            head,
            tables,
        }
    }

    /// The settings.
    pub fn config(&self) -> &StarConfig {
        &self.config
    }

    /// Values of all variables, the head's first.
    pub fn sample(&self, random: &mut Random) -> Vec<u32> {
        let mut draw = |row: &[f64]| {
            let mut rest = random.uniform();
            for (value, p) in row.iter().enumerate() {
                rest -= p;
                if rest < 0.0 {
                    return value;
                }
            }
            row.len() - 1
        };
        let head = draw(&self.head);
        let mut out = vec![head as u32];
        out.extend(self.tables.iter().map(|table| draw(&table[head]) as u32));
        out
    }

    /// ln p of values as [`sample`](Self::sample) gives them.
    pub fn log_probability(&self, values: &[u32]) -> f64 {
        let head = values[0] as usize;
        let rest: f64 = self
            .tables
            .iter()
            .zip(&values[1..])
            .map(|(table, &value)| table[head][value as usize].ln())
            .sum();
        self.head[head].ln() + rest
    }

    /// Entropy of all variables together, nats: the least mean loss that any order can reach.
    pub fn entropy(&self) -> f64 {
        let of = |row: &[f64]| -> f64 { row.iter().map(|p| -p * p.ln()).sum() };
        let rest = |head: usize| -> f64 { self.tables.iter().map(|table| of(&table[head])).sum() };
        of(&self.head)
            + self
                .head
                .iter()
                .enumerate()
                .map(|(head, p)| p * rest(head))
                .sum::<f64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_is_the_mean_of_minus_ln_p_and_heads_tell_of_the_rest() {
        let star = Star::new(&StarConfig::default(), 3);
        let mut random = Random::new(1, "samples");
        let n = 20_000;
        let mean = (0..n)
            .map(|_| -star.log_probability(&star.sample(&mut random)))
            .sum::<f64>()
            / f64::from(n);
        assert!(
            (mean - star.entropy()).abs() < 0.1,
            "{mean} {}",
            star.entropy()
        );
        // Small enough to sum over everything: probabilities sum to 1 and the entropy is exact.
        let small = Star::new(
            &StarConfig {
                variables: 3,
                symbols: 4,
                beta: 1.0,
            },
            5,
        );
        let (mut sum, mut entropy) = (0.0, 0.0);
        for code in 0..64u32 {
            let log = small.log_probability(&[code / 16, code / 4 % 4, code % 4]);
            sum += log.exp();
            entropy -= log.exp() * log;
        }
        assert!((sum - 1.0).abs() < 1e-12);
        assert!((entropy - small.entropy()).abs() < 1e-12);
    }
}
