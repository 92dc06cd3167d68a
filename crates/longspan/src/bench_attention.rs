//! `longspan bench attention`: one layer's attention alone, on made-up keys at any depth: every method beside full
//! attention, its search and copies included, and the power of length that its time grows with.

use crate::bench_context::parse_length;
use crate::options::Common;
use crate::reading::kv_dtype;
use crate::ui;
use anyhow::{Result, bail};
use clap::Args;
use longspan_infer::attend::{LayerShape, Row, attend_rows};
use longspan_infer::context::{ContextConfig, ContextPolicy};
use longspan_infer::kv::{KvStore, Rows};
use longspan_kernels::attention::KvLayout;
use longspan_kernels::cpu::Level;
use longspan_kernels::measure::{self, Stage};
use longspan_kernels::pool::Pool;
use serde_json::json;
use std::time::Instant;

/// `longspan bench attention`
#[derive(Args)]
pub struct AttentionBench {
    /// Depths in tokens
    #[arg(long, value_delimiter = ',', value_parser = parse_length, default_value = "8k,32k,128k", value_name = "N,..")]
    lengths: Vec<usize>,
    /// Policies as --context takes them; may be repeated; full is always measured
    #[arg(long = "method", value_name = "POLICY", default_values_t = ["hip".to_string(), "squeezed:0.9".to_string()])]
    methods: Vec<String>,
    /// Query heads
    #[arg(long, default_value_t = 9)]
    heads: usize,
    /// Key and value heads
    #[arg(long, default_value_t = 3)]
    kv_heads: usize,
    /// Elements of a head
    #[arg(long, default_value_t = 64)]
    head_dim: usize,
    /// Tokens decoded in a run
    #[arg(long, default_value_t = 64, value_name = "N")]
    decode: usize,
    /// Tokens of a prefill call at the end of the depth; 0 = decoding only
    #[arg(long, default_value_t = 1024, value_name = "N")]
    prefill: usize,
    /// Runs; the fastest counts
    #[arg(long, default_value_t = 3)]
    repeat: usize,
}

/// Tokens that are read with their queries before a prefix is sealed.
const OBSERVED: usize = 128;

/// Made-up queries, keys and values of one layer. Keys have topics that last for some tokens and drift, so that near
/// ones are alike; the heads of a kv head look for similar topics.
struct Made {
    shape: (usize, usize, usize),
    topics: Vec<f32>,
    wanted: Vec<f32>,
    state: u64,
}

impl Made {
    const TOPICS: usize = 512;

    fn new(heads: usize, kv_heads: usize, dim: usize) -> Self {
        let mut made = Made {
            shape: (heads, kv_heads, dim),
            topics: Vec::new(),
            wanted: Vec::new(),
            state: 1,
        };
        made.topics = (0..Self::TOPICS * dim).map(|_| made.normal()).collect();
        let group = heads / kv_heads;
        for _ in 0..kv_heads {
            let common: Vec<f32> = (0..dim).map(|_| made.normal()).collect();
            for _ in 0..group {
                for x in &common {
                    let own = made.normal();
                    made.wanted.push(x + 0.5 * own);
                }
            }
        }
        made
    }

    fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.state;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// About normal: the sum of four uniform numbers.
    fn normal(&mut self) -> f32 {
        let bits = self.bits();
        let sum: f32 = (0..4)
            .map(|i| (bits >> (16 * i) & 0xffff) as f32 / 65536.0)
            .sum();
        (sum - 2.0) * 1.732
    }

    /// [count, kv_heads dim] keys from position `start` on.
    fn keys(&mut self, start: usize, count: usize) -> Vec<f32> {
        let (_, kv_heads, dim) = self.shape;
        let mut out = Vec::with_capacity(count * kv_heads * dim);
        for position in start..start + count {
            for head in 0..kv_heads {
                // A topic lasts 16 to 64 tokens; topics come back.
                let seed = ((position / 32 * 31 + head) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let topic = (seed >> 40) as usize % Self::TOPICS;
                for d in 0..dim {
                    let noise = self.normal();
                    out.push(self.topics[topic * dim + d] + 0.5 * noise);
                }
            }
        }
        out
    }

    fn values(&mut self, count: usize) -> Vec<f32> {
        let (_, kv_heads, dim) = self.shape;
        (0..count * kv_heads * dim).map(|_| self.normal()).collect()
    }

    fn queries(&mut self, count: usize) -> Vec<f32> {
        let mut out = Vec::with_capacity(count * self.wanted.len());
        for _ in 0..count {
            for index in 0..self.wanted.len() {
                let noise = self.normal();
                out.push(self.wanted[index] + 0.5 * noise);
            }
        }
        out
    }
}

/// One layer of one sequence.
struct Layer {
    shape: LayerShape<'static>,
    store: KvStore,
    policy: Box<dyn ContextPolicy>,
}

/// Queries, keys and values of some tokens.
type Tokens = (Vec<f32>, Vec<f32>, Vec<f32>);

impl Layer {
    /// Attention of further tokens, appended; seconds.
    fn read(&mut self, tokens: &Tokens, range: std::ops::Range<usize>) -> Result<f64> {
        let layout = self.store.layout();
        let width = self.shape.num_heads * layout.head_dim;
        let kv_width = layout.num_kv_heads * layout.head_dim;
        let mut out = vec![0f32; range.len() * width];
        let rows = |data, stride: usize| Rows { data, stride };
        let (query, key, value) = tokens;
        let mut row = [Row {
            store: &mut self.store,
            policy: &mut *self.policy,
            rope: None,
            tables: (&[], &[]),
            count: range.len(),
        }];
        let clock = Instant::now();
        attend_rows(
            self.shape,
            &mut row,
            rows(&query[range.start * width..range.end * width], width),
            rows(&key[range.start * kv_width..range.end * kv_width], kv_width),
            rows(
                &value[range.start * kv_width..range.end * kv_width],
                kv_width,
            ),
            &mut out,
        )?;
        let seconds = clock.elapsed().as_secs_f64();
        std::hint::black_box(&out);
        Ok(seconds)
    }

    fn fork(&self) -> Layer {
        Layer {
            shape: self.shape,
            store: self.store.clone(),
            policy: self.policy.fork(),
        }
    }
}

/// One method at one depth: seconds per decoded token and per prefill call, and what was taken of what was offered.
#[derive(Clone, Copy, Default)]
struct Times {
    decode: f64,
    prefill: f64,
    kept: Option<f64>,
    seal: f64,
    /// Parts of `decode`: what the policy chose, the attention kernel.
    split: [f64; 2],
}

/// Runs the bench.
pub fn run(args: &AttentionBench, common: &Common) -> Result<()> {
    if args.kv_heads == 0 || args.heads == 0 || !args.heads.is_multiple_of(args.kv_heads) {
        bail!(
            "--heads {} and --kv-heads {}: expected a multiple of it, above 0",
            args.heads,
            args.kv_heads
        );
    }
    if args.head_dim == 0 || !args.head_dim.is_multiple_of(2) || args.decode == 0 {
        bail!("--head-dim and --decode: expected an even number and one, above 0");
    }
    let least = 4 * OBSERVED;
    if let Some(short) = args.lengths.iter().find(|&&length| length < least) {
        bail!("--lengths {short}: expected at least {least}");
    }
    let mut methods = vec![ContextConfig::Full];
    for text in &args.methods {
        let method = match text.parse::<ContextConfig>()? {
            // The layers that see everything are not the method's.
            ContextConfig::Hip(mut config) => {
                config.dense_layers = 0;
                ContextConfig::Hip(config)
            }
            method => method,
        };
        if method != ContextConfig::Full {
            methods.push(method);
        }
    }
    if !common.json {
        println!(
            "{} heads of {}, {} kv heads; level {}, {} threads",
            args.heads,
            args.head_dim,
            args.kv_heads,
            Level::current().name(),
            Pool::global().threads()
        );
    }
    // By method, then length.
    let mut all: Vec<Vec<Times>> = vec![Vec::new(); methods.len()];
    for &length in &args.lengths {
        let mut full = Times::default();
        for (index, method) in methods.iter().enumerate() {
            let times = measure(args, common, method, length)?;
            if index == 0 {
                full = times;
            }
            all[index].push(times);
            report(method, length, &times, &full, common.json);
            if ui::interrupted() {
                return Err(ui::Interrupted("the rows printed so far are complete".into()).into());
            }
        }
    }
    if args.lengths.len() > 1 {
        for (method, times) in methods.iter().zip(&all) {
            let slope = |of: fn(&Times) -> f64| slope(&args.lengths, times, of);
            let (decode, prefill) = (slope(|t| t.decode), slope(|t| t.prefill));
            if common.json {
                println!(
                    "{}",
                    json!({ "method": method.to_string(), "decode_slope": decode, "prefill_slope": (args.prefill > 0).then_some(prefill) })
                );
            } else {
                print!("{method}: time grows with length to the power of {decode:.2} for a token");
                if args.prefill > 0 {
                    print!(", {prefill:.2} for a call of {}", args.prefill);
                }
                println!();
            }
        }
    }
    Ok(())
}

fn measure(
    args: &AttentionBench,
    common: &Common,
    method: &ContextConfig,
    length: usize,
) -> Result<Times> {
    let layout = KvLayout {
        num_kv_heads: args.kv_heads,
        head_dim: args.head_dim,
        dtype: kv_dtype(common)?,
    };
    let policy = method.build(2 * length as u64)?;
    let spec = policy.spec();
    if spec.raw_keys {
        bail!("{method}: turns keys itself, and made-up keys have no positions");
    }
    let mut layer = Layer {
        shape: LayerShape {
            layer: 0,
            num_heads: args.heads,
            scale: (args.head_dim as f32).powf(-0.5),
            softcap: None,
            sliding_window: None,
            alibi: None,
        },
        store: KvStore::new(layout, 1, false, spec.first_page, None),
        policy,
    };
    let mut made = Made::new(args.heads, args.kv_heads, args.head_dim);
    let width = args.kv_heads * args.head_dim;
    let depth = length - OBSERVED;
    for start in (0..depth).step_by(1024) {
        let count = 1024.min(depth - start);
        let (key, value) = (made.keys(start, count), made.values(count));
        let rows = |data| Rows {
            data,
            stride: width,
        };
        let raw = Rows {
            data: &[],
            stride: width,
        };
        layer.store.append(0, rows(&key), raw, rows(&value), count);
    }
    let mut tokens = |start: usize, count: usize| -> Tokens {
        (
            made.queries(count),
            made.keys(start, count),
            made.values(count),
        )
    };
    layer.read(&tokens(depth, OBSERVED), 0..OBSERVED)?;
    let mut times = Times::default();
    let best = |to: &mut f64, seconds: f64| {
        *to = match *to {
            0.0 => seconds,
            old => old.min(seconds),
        }
    };
    // The prefill of a method that seals comes before its index, as it does in the engine.
    if args.prefill > 0 {
        let call = tokens(length, args.prefill);
        for _ in 0..args.repeat.max(1) {
            let mut fork = layer.fork();
            let mut seconds = 0.0;
            let chunk = fork.policy.spec().chunk;
            for first in (0..args.prefill).step_by(chunk) {
                seconds += fork.read(&call, first..(first + chunk).min(args.prefill))?;
            }
            best(&mut times.prefill, seconds);
        }
    }
    let clock = Instant::now();
    layer.policy.seal(&[0], &mut layer.store)?;
    times.seal = clock.elapsed().as_secs_f64();
    let next = tokens(length, args.decode);
    for _ in 0..args.repeat.max(1) {
        let mut fork = layer.fork();
        let before = fork.policy.report();
        let mut seconds = 0.0;
        measure::watch(true);
        for index in 0..args.decode {
            seconds += fork.read(&next, index..index + 1)?;
        }
        let stages = measure::totals();
        measure::watch(false);
        let before_this = times.decode;
        best(&mut times.decode, seconds / args.decode as f64);
        if times.decode != before_this {
            let of = |wanted: Stage| {
                let found = stages.iter().find(|(stage, _)| *stage == wanted);
                found.map_or(0.0, |(_, spent)| spent.as_secs_f64() / args.decode as f64)
            };
            times.split = [of(Stage::Policy), of(Stage::Attention)];
        }
        let after = fork.policy.report();
        let offered = after.offered - before.offered;
        times.kept = (offered > 0).then(|| (after.taken - before.taken) as f64 / offered as f64);
    }
    Ok(times)
}

fn report(method: &ContextConfig, length: usize, times: &Times, full: &Times, json: bool) {
    let ratio = |full: f64, own: f64| (own > 0.0).then(|| full / own);
    if json {
        let row = json!({
            "method": method.to_string(), "length": length,
            "decode_seconds": times.decode, "policy_seconds": times.split[0], "attention_seconds": times.split[1],
            "decode_ratio": ratio(full.decode, times.decode),
            "prefill_seconds": (times.prefill > 0.0).then_some(times.prefill),
            "prefill_ratio": ratio(full.prefill, times.prefill),
            "seal_seconds": times.seal, "kept": times.kept,
        });
        println!("{row}");
        return;
    }
    print!(
        "{:>9} tokens  {:<28} decode {:>9.1} us a token ({:.1} choosing, {:.1} attending), {:>5.2} x full",
        ui::count(length as u64),
        method.to_string(),
        times.decode * 1e6,
        times.split[0] * 1e6,
        times.split[1] * 1e6,
        ratio(full.decode, times.decode).unwrap_or(0.0),
    );
    if times.prefill > 0.0 {
        print!(
            "   prefill {:>8.2} ms a call, {:>5.2} x full",
            times.prefill * 1e3,
            ratio(full.prefill, times.prefill).unwrap_or(0.0)
        );
    }
    if let Some(kept) = times.kept {
        print!("   {:.1} % of the keys", kept * 100.0);
    }
    println!();
}

/// The power of length that a time grows with, by least squares of logarithms.
fn slope(lengths: &[usize], times: &[Times], of: fn(&Times) -> f64) -> f64 {
    let points: Vec<(f64, f64)> = lengths
        .iter()
        .zip(times)
        .filter(|(_, times)| of(times) > 0.0)
        .map(|(&length, times)| ((length as f64).ln(), of(times).ln()))
        .collect();
    let n = points.len() as f64;
    let mean = |values: &dyn Fn(&(f64, f64)) -> f64| points.iter().map(values).sum::<f64>() / n;
    let (x, y) = (mean(&|p| p.0), mean(&|p| p.1));
    let above: f64 = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum();
    let below: f64 = points.iter().map(|p| (p.0 - x).powi(2)).sum();
    if below > 0.0 { above / below } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quadratic_time_has_slope_two() {
        let lengths = [10, 100, 1000];
        let times: Vec<Times> = lengths
            .iter()
            .map(|&n| Times {
                decode: 3.0 * (n * n) as f64,
                ..Times::default()
            })
            .collect();
        assert!((slope(&lengths, &times, |t| t.decode) - 2.0).abs() < 1e-9);
        assert_eq!(slope(&lengths[..1], &times[..1], |t| t.decode), 0.0);
    }
}
