//! `longspan bench mixers`: time and memory of one layer of each sequence mixer against the length of the sequence, forward
//! alone and with the backward pass, and the power of the length that each grows with.

use crate::options::Common;
use crate::ui;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use clap::Args;
use longspan_nn::mixer::{MixerConfig, SequenceMixer, StateKind};
use longspan_nn::params::ParamStore;
use serde_json::{Map, Value, json};
use std::time::Instant;

#[derive(Args)]
pub struct MixersBench {
    /// Mixers: a kind of a stack's configuration, with parameters as KIND:KEY=VALUE,KEY=VALUE; may be repeated
    #[arg(value_name = "MIXER", default_values_t = MIXERS.map(String::from))]
    pub mixers: Vec<String>,
    /// Lengths in tokens
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1024,2048,4096,8192,16384,32768,65536"
    )]
    pub lengths: Vec<usize>,
    /// Width of the layer
    #[arg(long, default_value_t = 64)]
    pub width: usize,
    /// A mixer goes on to the next length while that is likely to take no longer than this, in seconds
    #[arg(long, default_value_t = 20.0)]
    pub most_seconds: f64,
    /// Runs of each point; the fastest counts
    #[arg(long, default_value_t = 2)]
    pub repeat: usize,
}

const MIXERS: [&str; 6] = [
    "attention:heads=2",
    "s4",
    "s4:mode=diag,init=lin",
    "mamba2:head_dim=32,state_size=64",
    "rnn:cell=lstm",
    "rnn:cell=gru",
];

/// KIND:KEY=VALUE,.. as a mixer.
fn parse(text: &str, length: usize) -> Result<MixerConfig> {
    let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
    let mut map = Map::new();
    map.insert("kind".into(), kind.into());
    for pair in rest.split(',').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair
            .split_once('=')
            .with_context(|| format!("{text}: {pair:?} is not KEY=VALUE"))?;
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.into()));
        map.insert(key.into(), value);
    }
    if matches!(kind, "s4" | "dss" | "hyena") {
        // The filter that is trained is as long as the sequences.
        map.entry("l_max").or_insert(length.into());
    }
    serde_json::from_value(Value::Object(map)).with_context(|| format!("mixer {text}"))
}

/// One point of a curve.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Length, tokens.
    pub length: usize,
    /// Seconds of the forward pass.
    pub forward: f64,
    /// Seconds of forward and backward pass.
    pub both: f64,
    /// Bytes above those held before, at the peak of both passes; 0 where the system does not say.
    pub bytes: u64,
}

/// The slope of a line through the logarithms: the power of x that y grows with.
pub fn power(points: impl Iterator<Item = (f64, f64)>) -> f64 {
    let logs: Vec<(f64, f64)> = points
        .filter(|&(x, y)| x > 0.0 && y > 0.0)
        .map(|(x, y)| (x.ln(), y.ln()))
        .collect();
    let n = logs.len() as f64;
    let (mx, my) = (
        logs.iter().map(|p| p.0).sum::<f64>() / n,
        logs.iter().map(|p| p.1).sum::<f64>() / n,
    );
    let (up, down) = logs.iter().fold((0.0, 0.0), |(up, down), (x, y)| {
        (up + (x - mx) * (y - my), down + (x - mx).powi(2))
    });
    up / down
}

/// A value of `/proc/self/status`, in bytes.
fn status(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}

/// Runs `f` and says how many bytes more than before were held at its peak.
fn peak<T>(device: &Device, f: impl FnOnce() -> Result<T>) -> Result<(T, u64)> {
    if !device.is_cpu() {
        return watched(device, f);
    }
    longspan_kernels::cpu::release_freed_memory();
    // Linux sets the mark of the highest use back to the present one.
    let reset = std::fs::write("/proc/self/clear_refs", "5").is_ok();
    let before = status("VmRSS:");
    let value = f()?;
    let bytes = match reset {
        true => status("VmHWM:").saturating_sub(before),
        false => 0,
    };
    Ok((value, bytes))
}

/// Free and all bytes of a GPU's memory, those that its pool holds unused counted as taken.
#[cfg(feature = "cuda")]
fn gpu_memory(device: &Device) -> Option<(u64, u64)> {
    let Device::Cuda(_) = device else { return None };
    let (free, total) = candle_core::cuda::cudarc::driver::result::mem_get_info().ok()?;
    Some((free as u64, total as u64))
}

#[cfg(not(feature = "cuda"))]
fn gpu_memory(_: &Device) -> Option<(u64, u64)> {
    None
}

/// Runs `f` while another thread asks the GPU how much of its memory is taken, a thousand times a second. What its pool
/// held unused before counts as taken before, so the figure is a lower bound.
fn watched<T>(device: &Device, f: impl FnOnce() -> Result<T>) -> Result<(T, u64)> {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    device.synchronize()?;
    let before = gpu_memory(device).map_or(0, |(free, _)| free);
    let (least, done) = (AtomicU64::new(before), AtomicBool::new(false));
    let value = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                if let Some((free, _)) = gpu_memory(device) {
                    least.fetch_min(free, Ordering::Relaxed);
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        });
        let value = f();
        done.store(true, Ordering::Relaxed);
        value
    })?;
    Ok((value, before.saturating_sub(least.load(Ordering::Relaxed))))
}

fn measure(
    mixer: &dyn SequenceMixer,
    length: usize,
    width: usize,
    repeat: usize,
    device: &Device,
) -> Result<Point> {
    let values: Vec<f32> = (0..length * width)
        .map(|i| ((i * 7919) % 1009) as f32 / 504.5 - 1.0)
        .collect();
    let x = Var::from_tensor(&Tensor::from_vec(values, (1, length, width), device)?)?;
    let (mut forward, mut both, mut bytes) = (f64::INFINITY, f64::INFINITY, 0);
    for _ in 0..repeat.max(1) {
        let start = Instant::now();
        mixer.forward(&x.as_detached_tensor(), None)?;
        device.synchronize()?;
        forward = forward.min(start.elapsed().as_secs_f64());
        let start = Instant::now();
        let ((), held) = peak(device, || {
            let (y, _) = mixer.forward(x.as_tensor(), None)?;
            y.sum_all()?.backward()?;
            device.synchronize()?;
            Ok(())
        })?;
        both = both.min(start.elapsed().as_secs_f64());
        bytes = bytes.max(held);
    }
    Ok(Point {
        length,
        forward,
        both,
        bytes,
    })
}

/// Whether the next length is likely to be too much, by the growth so far.
fn too_much(points: &[Point], next: usize, most_seconds: f64, free: Option<u64>) -> bool {
    let Some(last) = points.last() else {
        return false;
    };
    let grown = |y: &dyn Fn(&Point) -> f64| {
        let slope = power(points.iter().map(|p| (p.length as f64, y(p))));
        let slope = if slope.is_finite() {
            slope.max(1.0)
        } else {
            2.0
        };
        y(last) * (next as f64 / last.length as f64).powf(slope)
    };
    let bytes = grown(&|p| p.bytes as f64);
    grown(&|p| p.both) > most_seconds || free.is_some_and(|free| bytes > 0.7 * free as f64)
}

/// Runs the bench.
pub fn run(args: &MixersBench, common: &Common) -> Result<()> {
    let device = crate::models::device(common)?;
    let mut lengths = args.lengths.clone();
    lengths.sort_unstable();
    for text in &args.mixers {
        let mut points: Vec<Point> = Vec::new();
        let mut state = 0;
        if !common.json {
            println!("{text}, width {}", args.width);
        }
        for &length in &lengths {
            let free = match device.is_cpu() {
                true => crate::reading::free_memory(),
                false => gpu_memory(&device).map(|(free, _)| free),
            };
            if too_much(&points, length, args.most_seconds, free) {
                break;
            }
            let store = ParamStore::new(1, DType::F32, &device);
            let mixer = parse(text, length)?.build(args.width, &store.root(), &store.root());
            let mixer = match mixer {
                Ok(mixer) => mixer,
                // Others of the list may run there.
                Err(error) if !device.is_cpu() => {
                    eprintln!("{error}");
                    break;
                }
                Err(error) => return Err(error.into()),
            };
            if mixer.spec().state == StateKind::Fixed {
                state = mixer.init_state(1)?.bytes();
            }
            let point = measure(&*mixer, length, args.width, args.repeat, &device);
            let point = match point {
                Ok(point) => point,
                Err(error) if !device.is_cpu() => {
                    eprintln!("{text} at {length} tokens: {error:#}");
                    break;
                }
                Err(error) => return Err(error),
            };
            if !common.json {
                println!(
                    "  {length:>7} tokens  forward {:>10.2} ms  with backward {:>10.2} ms  peak {:>9}",
                    1e3 * point.forward,
                    1e3 * point.both,
                    ui::bytes(point.bytes)
                );
            }
            points.push(point);
            if ui::interrupted() {
                break;
            }
        }
        let slope = |y: &dyn Fn(&Point) -> f64| {
            power(points.iter().map(|point| (point.length as f64, y(point))))
        };
        let (forward, both, bytes) = (
            slope(&|p| p.forward),
            slope(&|p| p.both),
            slope(&|p| p.bytes as f64),
        );
        if common.json {
            let rows: Vec<Value> = points
                .iter()
                .map(|p| json!({"length": p.length, "forward_s": p.forward, "both_s": p.both, "bytes": p.bytes}))
                .collect();
            let line = json!({
                "mixer": text, "width": args.width, "points": rows, "state_bytes": state,
                "power_forward": forward, "power_both": both, "power_bytes": bytes,
            });
            println!("{line}");
        } else {
            let state = match state {
                0 => "state grows with the text, or none".into(),
                bytes => format!("state {}", ui::bytes(bytes as u64)),
            };
            println!(
                "  grows as length to the power of: forward {forward:.2}, with backward {both:.2}, memory {bytes:.2}; {state}\n"
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_are_those_of_the_data() {
        for wanted in [0.0, 1.0, 2.0] {
            let points = [10f64, 100.0, 500.0].map(|x| (x, 3.0 * x.powf(wanted)));
            assert!((power(points.into_iter()) - wanted).abs() < 1e-9);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_that_is_held_is_seen() {
        let (held, bytes) = peak(&Device::Cpu, || Ok(vec![1u8; 64 << 20])).unwrap();
        assert!(bytes > held.len() as u64 / 2, "{bytes} bytes");
    }

    #[test]
    fn mixers_are_named_as_in_configurations_and_measured() {
        for text in MIXERS {
            let store = ParamStore::new(1, DType::F32, &Device::Cpu);
            let config = parse(text, 16).unwrap();
            let mixer = config.build(64, &store.root(), &store.root()).unwrap();
            let point = measure(&*mixer, 16, 64, 1, &Device::Cpu).unwrap();
            assert!(point.forward > 0.0 && point.both > 0.0, "{text}");
        }
        for wrong in ["s99", "s4:d_state", "rnn:cell=lstmm"] {
            assert!(parse(wrong, 8).is_err(), "{wrong}");
        }
        let quadratic = [1000usize, 2000].map(|length| Point {
            length,
            forward: 0.0,
            both: (length as f64 / 1000.0).powi(2),
            bytes: 1 << 20,
        });
        assert!(too_much(&quadratic, 4000, 10.0, None));
        assert!(!too_much(&quadratic, 4000, 20.0, Some(1 << 30)));
        assert!(too_much(&quadratic, 4000, 20.0, Some(1 << 20)));
    }
}
