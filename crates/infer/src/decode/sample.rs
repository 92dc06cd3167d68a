//! The seam of decoding, [`Strategy`], and its two plain forms: the likeliest token, and a draw.

use super::logits::{LogitsPipeline, SamplingConfig, SamplingError, argmax, log_sum_exp, top_k};
use super::random::CounterRng;

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    pub token: u32,
    /// Natural logarithm of its probability under the model's own distribution, before any option.
    /// NaN where log probabilities were not asked for.
    pub logprob: f32,
    /// The likeliest tokens under that distribution with their log probabilities, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// What comes next, given logits. One value serves one sequence.
pub trait Strategy: Send {
    /// Picks the next token of a sequence from its logits [vocab], given the tokens so far, prompt included.
    fn next(&mut self, logits: &[f32], history: &[u32]) -> Choice;
}

impl Choice {
    /// `token` with what `logprobs` asks about `logits` [vocab].
    pub fn new(token: u32, logits: &[f32], logprobs: Option<usize>) -> Choice {
        let Some(count) = logprobs else {
            return Choice {
                token,
                logprob: f32::NAN,
                top: Vec::new(),
            };
        };
        let best = logits.get(argmax(logits)).copied();
        let total = log_sum_exp(logits, best.unwrap_or(f32::NEG_INFINITY));
        let logit = logits.get(token as usize).copied();
        let mut top = top_k(logits, count);
        top.iter_mut().for_each(|(_, value)| *value -= total);
        Choice {
            token,
            logprob: logit.map_or(f32::NEG_INFINITY, |logit| logit - total),
            top,
        }
    }
}

/// Always the likeliest token; the lower id of equal ones.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Greedy {
    /// As [`SamplingConfig::logprobs`].
    pub logprobs: Option<usize>,
}

impl Strategy for Greedy {
    fn next(&mut self, logits: &[f32], _history: &[u32]) -> Choice {
        Choice::new(argmax(logits) as u32, logits, self.logprobs)
    }
}

/// Draws by a [`SamplingConfig`]. The random number of a token depends only on seed, stream and the
/// token's position in the sequence, so whoever draws for a position draws the same.
#[derive(Debug, Clone)]
pub struct Sample {
    pipeline: LogitsPipeline,
    random: CounterRng,
}

impl Sample {
    /// `stream` tells sequences apart that share a seed.
    ///
    /// # Errors
    /// As [`SamplingConfig::validate`].
    pub fn new(config: SamplingConfig, stream: u64) -> Result<Sample, SamplingError> {
        let random = CounterRng::new(config.seed, stream);
        Ok(Sample {
            pipeline: LogitsPipeline::new(config)?,
            random,
        })
    }

    /// Says how many tokens of the history are prompt. If it is never called, the history of the
    /// first draw is all prompt.
    pub fn with_prompt_len(mut self, tokens: usize) -> Sample {
        self.pipeline.set_prompt_len(tokens);
        self
    }

    /// The distribution that [`Strategy::next`] draws from.
    pub fn distribution(&mut self, logits: &[f32], history: &[u32]) -> Vec<(u32, f32)> {
        self.pipeline.distribution(logits, history)
    }
}

impl Strategy for Sample {
    fn next(&mut self, logits: &[f32], history: &[u32]) -> Choice {
        let uniform = self.random.uniform(history.len() as u64);
        let token = self.pipeline.draw(logits, history, uniform);
        Choice::new(token, logits, self.pipeline.config().logprobs)
    }
}

/// A strategy from `greedy`, `greedy:logprobs=5`, `sample`, or `sample:temperature=0.7,top_p=0.9`.
///
/// # Errors
/// Unknown strategy or option, or a value out of range; the message names it and what is allowed.
pub fn parse(spec: &str, stream: u64) -> Result<Box<dyn Strategy>, SamplingError> {
    let (name, options) = spec.split_once(':').unwrap_or((spec, ""));
    match name.trim() {
        "greedy" => {
            let config: SamplingConfig = options.parse()?;
            let logprobs = config.logprobs;
            let rest = SamplingConfig {
                logprobs: None,
                ..config
            };
            if rest != SamplingConfig::default() {
                return Err(SamplingError::UnknownOption {
                    found: rest.to_string(),
                    known: "for greedy, logprobs (for others use sample:temperature=0,...)",
                });
            }
            Ok(Box::new(Greedy { logprobs }))
        }
        "sample" => Ok(Box::new(Sample::new(options.parse()?, stream)?)),
        other => Err(SamplingError::UnknownStrategy {
            found: other.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::Strategy;
    use super::*;
    use proptest::prelude::{ProptestConfig, prop, prop_assert, prop_assert_eq, proptest};

    fn draws(strategy: &mut dyn Strategy, count: usize) -> Vec<u32> {
        let mut history = vec![5, 6];
        for step in 0..count {
            let logits: Vec<f32> = (0..50)
                .map(|i| ((i * 31 + step * 7) % 23) as f32 / 5.0)
                .collect();
            let token = strategy.next(&logits, &history).token;
            history.push(token);
        }
        history
    }

    #[test]
    fn seeds_and_streams_decide_the_text() {
        let run = |spec: &str, stream| draws(&mut *parse(spec, stream).unwrap(), 40);
        assert_eq!(run("sample:seed=1", 0), run("sample:seed=1", 0));
        assert_ne!(run("sample:seed=1", 0), run("sample:seed=2", 0));
        assert_ne!(run("sample:seed=1", 0), run("sample:seed=1", 1));
        assert_eq!(run("greedy", 0), run("sample:temperature=0,seed=9", 3));
        assert_eq!(run("greedy", 0), run("sample:top_k=1", 0));
    }

    /// What a strategy that guesses ahead needs: order and repetition of calls do not matter.
    #[test]
    fn a_position_draws_the_same_however_it_is_reached() {
        let spec = "sample:seed=4,frequency_penalty=0.5,temperature=1.3";
        let text = draws(&mut *parse(spec, 0).unwrap(), 20);
        let config = spec.strip_prefix("sample:").unwrap().parse().unwrap();
        let mut other = Sample::new(config, 0).unwrap().with_prompt_len(2);
        for step in (0..20usize).rev().chain([7, 7, 3]) {
            let logits: Vec<f32> = (0..50)
                .map(|i| ((i * 31 + step * 7) % 23) as f32 / 5.0)
                .collect();
            let history = &text[..2 + step];
            assert_eq!(other.next(&logits, history).token, text[2 + step]);
            let allowed = other.distribution(&logits, history);
            assert!(allowed.iter().any(|&(token, _)| token == text[2 + step]));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(50))]

        /// Log probabilities are those of the untouched logits, whatever the options do.
        #[test]
        fn logprobs_are_a_log_softmax(logits in prop::collection::vec(-20.0f32..20.0, 1..600), count in 0usize..20) {
            let spec = format!("sample:temperature=0.3,top_k=3,logit_bias=0:50,logprobs={count}");
            let choice = parse(&spec, 0).unwrap().next(&logits, &[0, 1]);
            let total = logits.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
            let exact = |token: u32| f64::from(logits[token as usize]) - total;
            prop_assert!((f64::from(choice.logprob) - exact(choice.token)).abs() < 1e-4);
            prop_assert_eq!(choice.top.len(), count.min(logits.len()));
            for &(token, logprob) in &choice.top {
                prop_assert!((f64::from(logprob) - exact(token)).abs() < 1e-4);
            }
            prop_assert!(choice.top.windows(2).all(|w| w[0].1 >= w[1].1));
        }
    }

    #[test]
    fn without_logprobs_nothing_is_computed_for_them() {
        let choice = Greedy::default().next(&[1.0, 3.0, 3.0], &[]);
        assert_eq!((choice.token, choice.top.len()), (1, 0));
        assert!(choice.logprob.is_nan());
        let certain = Greedy { logprobs: Some(1) }.next(&[f32::NEG_INFINITY, 0.0], &[]);
        assert_eq!((certain.logprob, certain.top), (0.0, vec![(1, 0.0)]));
    }

    #[test]
    fn unknown_words_are_named() {
        let fails = |spec: &str| match parse(spec, 0) {
            Ok(_) => panic!("{spec} was accepted"),
            Err(error) => error.to_string(),
        };
        assert!(fails("greed").contains("unknown decoding strategy `greed`"));
        assert!(fails("sample:heat=1").contains("`heat=1`"));
        assert!(fails("greedy:top_p=0.5").contains("top_p=0.5"));
        assert!(fails("sample:top_p=7").contains("option `top_p`: 7 found"));
    }
}
