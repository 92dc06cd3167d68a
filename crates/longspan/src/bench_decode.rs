//! `longspan bench decode`: a decoding strategy beside plain decoding on the same prompts: is the text the
//! same, how many passes over the model, how much faster.

use crate::models;
use crate::options::Common;
use crate::reading::kv_dtype;
use anyhow::{Context, Result, bail};
use longspan_agents::{Finish, Generation, Limits, Message, Role};
use longspan_infer::EngineOptions;
use longspan_infer::decode::{DecodeConfig, SamplingConfig, Strategy};
use serde_json::json;
use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Compare a decoding strategy with plain decoding
#[derive(clap::Args)]
pub struct DecodeBench {
    /// One prompt a line: JSON objects with a field prompt, or plain text
    pub prompts: PathBuf,
    /// The strategy compared
    #[arg(long, default_value = "lookahead", value_name = "STRATEGY")]
    pub decode: String,
    /// What it is compared with
    #[arg(long, default_value = "plain", value_name = "STRATEGY")]
    pub against: String,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 128)]
    pub max_tokens: usize,
    /// 0 = always the likeliest token
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Same seed, same draw
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// One strategy for all prompts, so that it remembers earlier answers
    #[arg(long, conflicts_with = "repeat")]
    pub warm: bool,
    /// Each prompt so many times; the fastest counts
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub repeat: u32,
    /// Prompts used at most
    #[arg(long, default_value_t = usize::MAX, hide_default_value = true)]
    pub limit: usize,
}

/// What one strategy did on all prompts.
#[derive(Default)]
struct Sum {
    tokens: usize,
    forwards: usize,
    read: usize,
    seconds: f64,
    /// Mean log probability of a token, summed over prompts.
    score: f64,
    distinct: [f64; 4],
}

impl Sum {
    fn add(&mut self, generation: &Generation) {
        self.tokens += generation.choices.len();
        self.forwards += generation.stats.forwards;
        self.read += generation.stats.tokens;
        self.seconds += generation.elapsed.as_secs_f64();
        let texts: Vec<&str> = if generation.answers.is_empty() {
            vec![&generation.text]
        } else {
            generation.answers.iter().map(|a| a.text.as_str()).collect()
        };
        for (n, sum) in (1..).zip(&mut self.distinct) {
            *sum += distinct(&texts, n);
        }
        // The token that ends an answer counts, as it does in the strategies' own scores.
        self.score += match generation.answers.first() {
            Some(best) => {
                let ended = usize::from(generation.finish == Finish::Stop);
                best.logprob / (generation.choices.len() + ended).max(1) as f64
            }
            None => {
                let logprobs = generation.choices.iter().map(|c| f64::from(c.logprob));
                logprobs.sum::<f64>() / generation.choices.len().max(1) as f64
            }
        };
    }

    fn row(&self, name: &str, prompts: usize) -> serde_json::Value {
        let mean = |sum: f64| sum / prompts.max(1) as f64;
        json!({
            "decode": name,
            "tokens": self.tokens,
            "forwards": self.forwards,
            "read_tokens": self.read,
            "tokens_per_forward": self.tokens as f64 / self.forwards.max(1) as f64,
            "tokens_per_second": self.tokens as f64 / self.seconds.max(1e-9),
            "mean_logprob": mean(self.score),
            "distinct": self.distinct.map(mean),
        })
    }
}

/// Distinct n-grams of words in a list of texts over its words.
fn distinct(texts: &[&str], n: usize) -> f64 {
    let mut words = 0;
    let mut seen = HashSet::new();
    for text in texts {
        let list: Vec<&str> = text.split_whitespace().collect();
        words += list.len();
        seen.extend(list.windows(n).map(<[&str]>::to_vec));
    }
    seen.len() as f64 / words.max(1) as f64
}

fn read_prompts(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    let prompt = |line: &str| match serde_json::from_str::<serde_json::Value>(line) {
        Ok(value) => value["prompt"].as_str().map(str::to_string),
        Err(_) => Some(line.to_string()),
    };
    let prompts: Option<Vec<String>> = lines.map(prompt).collect();
    prompts
        .filter(|prompts| !prompts.is_empty())
        .with_context(|| {
            format!(
                "{}: expected prompts, one a line, as text or as JSON with a field prompt",
                path.display()
            )
        })
}

/// Runs the bench.
pub fn run(args: &DecodeBench, common: &Common) -> Result<()> {
    let sampling = SamplingConfig {
        temperature: args.temperature,
        seed: args.seed,
        logprobs: Some(0),
        ..SamplingConfig::default()
    };
    let configs: [DecodeConfig; 2] = [args.against.parse()?, args.decode.parse()?];
    let build = |config: &DecodeConfig| -> Result<Box<dyn Strategy>> {
        Ok(config.build(&sampling, 0, None)?)
    };
    let mut strategies = [build(&configs[0])?, build(&configs[1])?];
    if args.max_tokens == 0 {
        bail!("--max-tokens is 0, expected at least 1");
    }
    let mut prompts = read_prompts(&args.prompts)?;
    prompts.truncate(args.limit);
    let opened = models::open(common)?;
    let model = &opened.model;
    let options = EngineOptions {
        kv: kv_dtype(common)?,
        context: common.context.as_deref().unwrap_or("full").parse()?,
    };
    let limits = Limits {
        max_tokens: args.max_tokens,
        stop: Vec::new(),
    };
    let mut sums = [Sum::default(), Sum::default()];
    let (mut equal, mut ratios) = (0, Vec::new());
    for (number, prompt) in prompts.iter().enumerate() {
        let tokens = model.conversation(&[Message::new(Role::User, prompt.clone())])?;
        let mut sequence = model.engine.sequence(&options, None)?;
        let mut go_on = |_: usize, _: &mut _| Ok(ControlFlow::Continue(()));
        let logits = model.engine.prefill(&mut sequence, &tokens, &mut go_on)?;
        let mut both: [Option<Generation>; 2] = [None, None];
        // Turns change, so that neither always finds the caches warm.
        let sides = if number % 2 == 0 { [0, 1] } else { [1, 0] };
        for side in (0..args.repeat).flat_map(|_| sides) {
            if !args.warm {
                strategies[side] = build(&configs[side])?;
            }
            let mut fork = sequence.fork();
            let strategy = &mut *strategies[side];
            let mut on_text = |_: &str| match crate::ui::interrupted() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            };
            let generation =
                model.generate(&mut fork, logits.clone(), strategy, &limits, &mut on_text)?;
            both[side] = Some(match both[side].take() {
                Some(before) if before.elapsed <= generation.elapsed => before,
                _ => generation,
            });
        }
        if crate::ui::interrupted() {
            return Err(crate::ui::Interrupted("the bench was cut short".into()).into());
        }
        let [Some(base), Some(other)] = both else {
            bail!("prompt {number} was not decoded");
        };
        sums[0].add(&base);
        sums[1].add(&other);
        let ids = |generation: &Generation| -> Vec<u32> {
            generation
                .choices
                .iter()
                .map(|choice| choice.token)
                .collect()
        };
        let (a, b) = (ids(&base), ids(&other));
        let same = a == b;
        equal += usize::from(same);
        let rate = |generation: &Generation| {
            generation.choices.len() as f64 / generation.elapsed.as_secs_f64().max(1e-9)
        };
        let ratio = rate(&other) / rate(&base);
        ratios.push(ratio);
        let agree = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
        if common.json {
            let row = json!({
                "prompt": number, "prompt_tokens": tokens.len(), "tokens": a.len(), "equal": same,
                "agree": agree, "forwards": [base.stats.forwards, other.stats.forwards], "speed_ratio": ratio,
            });
            println!("{row}");
        }
    }
    ratios.sort_by(f64::total_cmp);
    let (median, least) = (ratios[ratios.len() / 2], ratios[0]);
    let names = [configs[0].to_string(), configs[1].to_string()];
    if common.json {
        let rows: Vec<_> = (names.iter().zip(&sums))
            .map(|(name, sum)| sum.row(name, prompts.len()))
            .collect();
        let summary = json!({
            "model": opened.name, "prompts": prompts.len(), "equal": equal, "speed_ratio_median": median,
            "speed_ratio_least": least, "strategies": rows,
        });
        println!("{summary}");
        return Ok(());
    }
    for (name, sum) in names.iter().zip(&sums) {
        println!(
            "{name}: {} tokens, {:.2} a pass, {:.1} tok/s, mean log probability {:.3}, distinct 1-4 {}",
            sum.tokens,
            sum.tokens as f64 / sum.forwards.max(1) as f64,
            sum.tokens as f64 / sum.seconds.max(1e-9),
            sum.score / prompts.len() as f64,
            sum.distinct
                .map(|d| format!("{:.2}", d / prompts.len() as f64))
                .join(" ")
        );
    }
    println!(
        "{equal} of {} texts equal; speed ratio: median {median:.2}, least {least:.2}, of all tokens {:.2}",
        prompts.len(),
        (sums[1].tokens as f64 / sums[1].seconds) / (sums[0].tokens as f64 / sums[0].seconds)
    );
    Ok(())
}
