//! How fast attention is, against what this core can do: prefill in share of the multiply-add
//! peak, decode in share of the streaming-read bandwidth, both measured in the same run.
//!
//! `cargo run --release --example attention_bench -- [prefill|decode] [model] [dtype] [level]`
//! with any words left out; words select by substring match (`bf16`, `llama`, `avx512`, ...).
//! Times are CPU times of one thread, minimum over repeats, so that other programs on the machine
//! disturb little.

use longspan_kernels::attention::{
    Attention, KvDtype, KvLayout, Mask, PAGE, Part, Tile, Tiles, attention_at,
};
use longspan_kernels::cpu::Level;
use longspan_kernels::pool::Pool;

/// (name, num_heads, num_kv_heads, head_dim)
const MODELS: [(&str, usize, usize, usize); 4] = [
    ("smollm2", 9, 3, 64),
    ("qwen2.5-0.5b", 14, 2, 64),
    ("gemma3-270m", 4, 1, 256),
    ("llama3-8b", 32, 8, 128),
];
const DTYPES: [(&str, KvDtype); 4] = [
    ("f32", KvDtype::F32),
    ("f16", KvDtype::F16),
    ("bf16", KvDtype::Bf16),
    ("int8", KvDtype::Int8),
];
const PREFILL: usize = 512;

fn main() {
    Pool::request_threads(1);
    let words: Vec<String> = std::env::args().skip(1).collect();
    let known = |word: &str| -> bool {
        word == "prefill"
            || word == "decode"
            || MODELS.iter().any(|model| model.0.contains(word))
            || DTYPES.iter().any(|dtype| dtype.0 == word)
            || Level::ALL.iter().any(|level| level.name() == word)
    };
    if let Some(word) = words.iter().find(|word| !known(word)) {
        eprintln!("attention_bench: {word:?} is no task, model, dtype or level");
        std::process::exit(2);
    }
    // A kind of word that is not given selects everything of its kind.
    let wants = |name: &str, kind: &[&str], whole: bool| {
        let matches = |word: &str, name: &str| {
            if whole {
                word == name
            } else {
                name.contains(word)
            }
        };
        let given: Vec<_> = words
            .iter()
            .filter(|word| kind.iter().any(|name| matches(word, name)))
            .collect();
        given.is_empty() || given.iter().any(|word| matches(word, name))
    };
    let models: Vec<&str> = MODELS.iter().map(|model| model.0).collect();
    let dtypes: Vec<&str> = DTYPES.iter().map(|dtype| dtype.0).collect();
    let levels: Vec<&str> = Level::ALL.iter().map(|level| level.name()).collect();
    let tasks = ["prefill", "decode"];

    println!("CPU level {}; one thread", Level::detected().name());
    let bandwidth = streaming_read();
    println!("streaming read: {bandwidth:.1} GB/s");
    for level in Level::available().filter(|level| wants(level.name(), &levels, true)) {
        let peak = peak_flops(level);
        println!(
            "{} register-only multiply-adds: {:.0} GFLOP/s",
            level.name(),
            peak / 1e9
        );
        for (name, heads, kv_heads, dim) in MODELS {
            for (dtype_name, dtype) in DTYPES {
                if !wants(name, &models, false) || !wants(dtype_name, &dtypes, true) {
                    continue;
                }
                let layout = KvLayout {
                    num_kv_heads: kv_heads,
                    head_dim: dim,
                    dtype,
                };
                let label = format!("{:8} {name:12} {dtype_name}", level.name());
                if wants("prefill", &tasks, true) {
                    for depth in [512, 4096, 8192, 32768] {
                        let flops = prefill(level, layout, heads, depth);
                        println!(
                            "{label} prefill of {PREFILL} at {depth:6}: {:6.3} TFLOP/s, {:3.0} % of peak",
                            flops / 1e12,
                            flops / peak * 100.0
                        );
                    }
                }
                if wants("decode", &tasks, true) {
                    for depth in [512, 8192, 32768, 131_072] {
                        let (seconds, bytes) = decode(level, layout, heads, depth);
                        let rate = bytes / seconds / 1e9;
                        println!(
                            "{label} decode at {depth:6}: {rate:5.1} GB/s, {:3.0} % of streaming, {:9.1} us",
                            rate / bandwidth * 100.0,
                            seconds * 1e6
                        );
                    }
                }
            }
        }
    }
}

/// Multiply-adds per second times 2.
fn prefill(level: Level, layout: KvLayout, heads: usize, depth: usize) -> f64 {
    let cache = Cache::new(layout, depth);
    let start = depth - PREFILL;
    let seen: f64 = (0..PREFILL).map(|t| (start + t + 1) as f64).sum();
    let flops = 4.0 * seen * (heads * layout.head_dim) as f64;
    let seconds = cache.time(level, heads, PREFILL, start as u64, 3);
    flops / seconds
}

/// Seconds, and bytes of keys and values.
fn decode(level: Level, layout: KvLayout, heads: usize, depth: usize) -> (f64, f64) {
    let cache = Cache::new(layout, depth);
    let bytes = (depth / PAGE * 2 * layout.plane_bytes()) as f64;
    let repeats = (2_000_000_000.0 / bytes).clamp(5.0, 200.0) as usize;
    (
        cache.time(level, heads, 1, depth as u64 - 1, repeats),
        bytes,
    )
}

/// A paged cache of random content in one aligned allocation.
struct Cache {
    layout: KvLayout,
    memory: Vec<Line>,
    pages: usize,
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

impl Cache {
    fn new(layout: KvLayout, depth: usize) -> Cache {
        let width = layout.num_kv_heads * layout.head_dim;
        let mut state = 1u32;
        let mut rows = || -> Vec<f32> {
            (0..PAGE * width)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / 8_388_608.0 - 1.0
                })
                .collect()
        };
        let mut page = vec![0u8; 2 * layout.plane_bytes()];
        let (keys, values) = page.split_at_mut(layout.plane_bytes());
        layout.write_keys(keys, 0, &rows(), width);
        layout.write_values(values, 0, &rows(), width);
        let lines: Vec<Line> = page
            .chunks_exact(64)
            .map(|line| Line(line.try_into().expect("64 bytes")))
            .collect();
        let pages = depth / PAGE;
        let mut memory = Vec::with_capacity(lines.len() * pages);
        (0..pages).for_each(|_| memory.extend_from_slice(&lines));
        Cache {
            layout,
            memory,
            pages,
        }
    }

    fn tiles(&self) -> Vec<Tile<'_>> {
        // SAFETY: a `Line` is 64 bytes without padding.
        let bytes: &[u8] = unsafe {
            std::slice::from_raw_parts(self.memory.as_ptr().cast(), self.memory.len() * 64)
        };
        let plane = self.layout.plane_bytes();
        (0..self.pages)
            .map(|page| {
                let (keys, values) = bytes[page * 2 * plane..][..2 * plane].split_at(plane);
                Tile {
                    keys,
                    values,
                    first: (page * PAGE) as u64,
                    lo: 0,
                    hi: PAGE as u8,
                }
            })
            .collect()
    }

    fn time(&self, level: Level, heads: usize, queries: usize, start: u64, repeats: usize) -> f64 {
        let dim = self.layout.head_dim;
        let query: Vec<f32> = (0..queries * heads * dim)
            .map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0)
            .collect();
        let tiles = self.tiles();
        let parts = [Part {
            query: &query,
            tiles: Tiles::Shared(&tiles),
            mask: Mask::Causal,
            column_sums: false,
            alibi: None,
        }];
        let args = Attention {
            layout: self.layout,
            num_heads: heads,
            queries,
            query_start: start,
            scale: (dim as f32).powf(-0.5),
            softcap: None,
            row_exact: false,
            parts: &parts,
        };
        let mut out = vec![0.0; query.len()];
        fastest(repeats, || {
            std::hint::black_box(attention_at(level, &args, &mut out));
        })
    }
}

/// CPU seconds of this thread: the least of `repeats` runs.
fn fastest(repeats: usize, mut run: impl FnMut()) -> f64 {
    (0..=repeats)
        .map(|_| {
            let start = cpu_seconds();
            run();
            cpu_seconds() - start
        })
        .fold(f64::INFINITY, f64::min)
}

#[cfg(target_os = "linux")]
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call fills the struct it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

#[cfg(not(target_os = "linux"))]
fn cpu_seconds() -> f64 {
    use std::time::{SystemTime, UNIX_EPOCH};
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |time| time.as_secs_f64())
}

/// GB/s of a sum over 512 MB.
fn streaming_read() -> f64 {
    let data = vec![1u64; 64 << 20];
    let seconds = fastest(4, || {
        let mut sums = [0u64; 32];
        for chunk in data.chunks_exact(32) {
            for (sum, x) in sums.iter_mut().zip(chunk) {
                *sum |= x;
            }
        }
        std::hint::black_box(sums);
    });
    (data.len() * 8) as f64 / seconds / 1e9
}

/// FLOP/s of independent multiply-adds that never leave the registers.
fn peak_flops(level: Level) -> f64 {
    const ROUNDS: usize = 2_000_000;
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: the level is one this CPU has.
        let (seconds, per_round) = unsafe {
            match level {
                Level::Amx => (
                    fastest(5, || peak::amx(ROUNDS / 8)),
                    4.0 * 8192.0 * 2.0 / 8.0,
                ),
                Level::Avx512 => (fastest(5, || peak::avx512(ROUNDS)), 20.0 * 16.0 * 2.0),
                Level::Avx2 => (fastest(5, || peak::avx2(ROUNDS)), 12.0 * 8.0 * 2.0),
                Level::Portable => (fastest(5, || peak::portable(ROUNDS)), 8.0 * 4.0 * 2.0),
            }
        };
        ROUNDS as f64 * per_round / seconds
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = level;
        ROUNDS as f64 * 64.0 / fastest(5, || peak::portable(ROUNDS))
    }
}

mod peak {
    #[cfg(target_arch = "x86_64")]
    use core::arch::{asm, x86_64::*};

    /// 8 vectors of 4: products and sums apart, as the portable kernels compute.
    pub fn portable(rounds: usize) {
        let mut acc = [[1f32; 4]; 8];
        let (a, b) = std::hint::black_box(([1.000_1f32; 4], [1e-9f32; 4]));
        for _ in 0..rounds {
            for v in &mut acc {
                for lane in 0..4 {
                    v[lane] = v[lane] * a[lane] + b[lane];
                }
            }
        }
        std::hint::black_box(acc);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(rounds: usize) {
        let x = std::hint::black_box(_mm256_set1_ps(0.5));
        let mut acc = [x; 12];
        for _ in 0..rounds {
            for v in &mut acc {
                *v = _mm256_fmadd_ps(*v, x, x);
            }
        }
        std::hint::black_box(acc);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512(rounds: usize) {
        let x = std::hint::black_box(_mm512_set1_ps(0.5));
        let mut acc = [x; 20];
        for _ in 0..rounds {
            for v in &mut acc {
                *v = _mm512_fmadd_ps(*v, x, x);
            }
        }
        std::hint::black_box(acc);
    }

    /// Four independent bf16 tile products a round.
    #[cfg(target_arch = "x86_64")]
    pub unsafe fn amx(rounds: usize) {
        let mut config = [0u8; 64];
        config[0] = 1;
        for tile in 0..8 {
            config[16 + 2 * tile] = 64;
            config[48 + tile] = 16;
        }
        asm!("ldtilecfg [{}]", in(reg) config.as_ptr(), options(nostack));
        for _ in 0..rounds {
            asm!(
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                options(nomem, nostack),
            );
        }
        asm!("tilerelease", options(nomem, nostack));
    }
}
