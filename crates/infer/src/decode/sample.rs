//! One token after another: the likeliest, or a draw. [`Sampling`] makes a strategy of a [`Sampler`];
//! others ask the same samplers, so that what they emit is what plain sampling would have.

pub use super::config::parse;

use super::logits::{LogitsPipeline, SamplingConfig, SamplingError, argmax, log_sum_exp, top_k};
use super::random::CounterRng;
use super::session::{DecodeSession, Result};
use super::strategy::{Action, Emit, End, Event, Outcome, Request, Strategy};

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

/// Which token, given logits. One value serves one sequence.
pub trait Sampler: Send {
    /// Starts a sequence whose first `prompt_len` tokens are prompt.
    fn begin(&mut self, _prompt_len: usize) {}

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

impl Sampler for Greedy {
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
    pub fn new(config: SamplingConfig, stream: u64) -> std::result::Result<Sample, SamplingError> {
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

    /// The distribution that [`Sampler::next`] draws from.
    pub fn distribution(&mut self, logits: &[f32], history: &[u32]) -> Vec<(u32, f32)> {
        self.pipeline.distribution(logits, history)
    }
}

impl Sampler for Sample {
    fn begin(&mut self, prompt_len: usize) {
        self.pipeline.set_prompt_len(prompt_len);
    }

    fn next(&mut self, logits: &[f32], history: &[u32]) -> Choice {
        let uniform = self.random.uniform(history.len() as u64);
        let token = self.pipeline.draw(logits, history, uniform);
        Choice::new(token, logits, self.pipeline.config().logprobs)
    }
}

/// Plain decoding: one token, one pass.
pub struct Sampling {
    sampler: Box<dyn Sampler>,
    writer: Writer,
}

impl Sampling {
    /// Tokens as `sampler` picks them.
    pub fn new(sampler: Box<dyn Sampler>) -> Sampling {
        Sampling {
            sampler,
            writer: Writer::default(),
        }
    }
}

impl Strategy for Sampling {
    fn streams(&self) -> bool {
        true
    }

    fn begin(&mut self, session: &mut dyn DecodeSession, request: &Request) -> Result<()> {
        self.writer = Writer::new(session, request);
        self.sampler.begin(self.writer.history.len());
        Ok(())
    }

    fn next(
        &mut self,
        _session: &mut dyn DecodeSession,
        logits: &[f32],
        emit: &mut Emit<'_>,
    ) -> Result<Action> {
        Ok(match self.writer.write(&mut *self.sampler, logits, emit) {
            Some(token) => Action::Step(vec![(self.writer.request.seq, token)]),
            None => Action::Done,
        })
    }

    fn finish(&mut self, _session: &mut dyn DecodeSession) -> Result<Outcome> {
        Ok(self.writer.outcome())
    }
}

/// The answer of a strategy that streams: what was emitted, and when to stop.
pub(crate) struct Writer {
    pub(crate) request: Request,
    /// Prompt and answer.
    pub(crate) history: Vec<u32>,
    prompt_len: usize,
    end: End,
}

impl Default for Writer {
    fn default() -> Writer {
        Writer {
            request: Request {
                seq: super::session::SeqId(0),
                eos: Vec::new(),
                max_tokens: 0,
            },
            history: Vec::new(),
            prompt_len: 0,
            end: End::Length,
        }
    }
}

impl Writer {
    pub(crate) fn new(session: &dyn DecodeSession, request: &Request) -> Writer {
        let history = session.tokens(request.seq).to_vec();
        Writer {
            request: request.clone(),
            prompt_len: history.len(),
            history,
            end: End::Length,
        }
    }

    /// Tokens written.
    pub(crate) fn written(&self) -> usize {
        self.history.len() - self.prompt_len
    }

    /// Picks and emits a token; None if it was the last one.
    pub(crate) fn write(
        &mut self,
        sampler: &mut dyn Sampler,
        logits: &[f32],
        emit: &mut Emit<'_>,
    ) -> Option<u32> {
        if self.request.max_tokens == 0 {
            return None;
        }
        let choice = sampler.next(logits, &self.history);
        let token = choice.token;
        self.history.push(token);
        if self.request.eos.contains(&token) {
            self.end = End::Eos;
        }
        if emit(Event::Token(choice)).is_break() {
            self.end = End::Cancelled;
        }
        (self.end == End::Length && self.written() < self.request.max_tokens).then_some(token)
    }

    pub(crate) fn outcome(&self) -> Outcome {
        Outcome {
            end: self.end,
            ..Outcome::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{ProptestConfig, prop, prop_assert, prop_assert_eq, proptest};

    fn sampler(options: &str, stream: u64) -> Sample {
        Sample::new(options.parse().unwrap(), stream).unwrap()
    }

    fn draws(strategy: &mut dyn Sampler, count: usize) -> Vec<u32> {
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
        let run = |options: &str, stream| draws(&mut sampler(options, stream), 40);
        assert_eq!(run("seed=1", 0), run("seed=1", 0));
        assert_ne!(run("seed=1", 0), run("seed=2", 0));
        assert_ne!(run("seed=1", 0), run("seed=1", 1));
        let greedy = draws(&mut Greedy::default(), 40);
        assert_eq!(greedy, run("temperature=0,seed=9", 3));
        assert_eq!(greedy, run("top_k=1", 0));
    }

    /// What a strategy that guesses ahead needs: order and repetition of calls do not matter.
    #[test]
    fn a_position_draws_the_same_however_it_is_reached() {
        let options = "seed=4,frequency_penalty=0.5,temperature=1.3";
        let text = draws(&mut sampler(options, 0), 20);
        let mut other = sampler(options, 0).with_prompt_len(2);
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
            let options = format!("temperature=0.3,top_k=3,logit_bias=0:50,logprobs={count}");
            let choice = sampler(&options, 0).next(&logits, &[0, 1]);
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
}
