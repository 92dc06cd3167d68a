//! Speed of the packed matrix products on the shapes of real models, beside this machine's limits
//! measured in the same run.
//!
//! `cargo run --release -p longspan-kernels --example matmul_bench -- [threads] [level] [seconds]`
//!
//! With one thread (the default) times are CPU times, with more they are wall times; always the
//! smallest of many, so that a busy machine disturbs them little. GFLOP/s count two per weight
//! and row. The limits: for decoding the bytes a streaming read delivers, for prefill a
//! register-only loop of the instruction that the level rests on (AMX `tdpbf16ps`, AVX-512
//! `vpdpbusd`, of which the integer path spends two per product, AVX2 `vpmaddwd` + `vpaddd`).

use longspan_kernels::cpu::Level;
use longspan_kernels::elementwise::Gate;
use longspan_kernels::matmul::{Epilogue, MatrixSource, PackedMatrix};
use longspan_kernels::measure::memory_bandwidth;
use longspan_kernels::pool::Pool;
use longspan_kernels::quant::GgmlType;
use std::hint::black_box;

/// Model, matrix, rows, columns, type.
const SHAPES: [(&str, &str, usize, usize, GgmlType); 14] = [
    ("in cache", "", 64, 576, GgmlType::Q4_1),
    ("SmolLM2-135M", "q k v", 960, 576, GgmlType::Q4_1),
    ("SmolLM2-135M", "gate up", 3072, 576, GgmlType::Q4_1),
    ("SmolLM2-135M", "down", 576, 1536, GgmlType::Q4_1),
    ("SmolLM2-135M", "head", 49152, 576, GgmlType::Q8_0),
    ("Qwen2.5-0.5B", "q k v", 1152, 896, GgmlType::Q5_0),
    ("Qwen2.5-0.5B", "gate up", 9728, 896, GgmlType::Q5_0),
    ("Qwen2.5-0.5B", "down", 896, 4864, GgmlType::Q6K),
    ("Qwen2.5-0.5B", "down", 896, 4864, GgmlType::Q4K),
    ("Qwen2.5-0.5B", "head", 151_936, 896, GgmlType::Q8_0),
    ("Gemma-3-270M", "gate up", 4096, 640, GgmlType::Q5_0),
    ("Gemma-3-270M", "down", 640, 2048, GgmlType::Q6K),
    ("Gemma-3-270M", "head", 262_144, 640, GgmlType::Q8_0),
    ("a bf16 model", "gate up", 3072, 576, GgmlType::BF16),
];

/// Model, width, inner width, types of gate, up and of down, activation.
const MLPS: [(&str, usize, usize, GgmlType, GgmlType, Gate); 3] = [
    (
        "SmolLM2-135M",
        576,
        1536,
        GgmlType::Q4_1,
        GgmlType::Q4_1,
        Gate::Silu,
    ),
    (
        "Qwen2.5-0.5B",
        896,
        4864,
        GgmlType::Q5_0,
        GgmlType::Q6K,
        Gate::Silu,
    ),
    (
        "Gemma-3-270M",
        640,
        2048,
        GgmlType::Q5_0,
        GgmlType::Q6K,
        Gate::GeluTanh,
    ),
];

/// Bytes of copies of a matrix that decoding cycles through, far more than the caches hold.
const COLD: usize = 400 << 20;

/// Seconds: CPU time of this thread, or wall time when several threads work.
fn now() -> f64 {
    let wall = Pool::global().threads() > 1;
    // SAFETY: `time` is plain memory.
    unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        let clock = if wall {
            libc::CLOCK_MONOTONIC
        } else {
            libc::CLOCK_THREAD_CPUTIME_ID
        };
        libc::clock_gettime(clock, &mut time);
        time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64
    }
}

/// The shortest of several runs that take about `budget` seconds together.
fn shortest(budget: f64, mut run: impl FnMut()) -> f64 {
    let (mut best, mut spent, mut runs) = (f64::INFINITY, 0.0, 0);
    while spent < budget || runs < 3 {
        let start = now();
        run();
        let time = now() - start;
        best = best.min(time);
        spent += time;
        runs += 1;
    }
    best
}

/// GFLOP/s of all threads in a loop of the instruction that bounds prefill at this level.
#[cfg(target_arch = "x86_64")]
fn peak(level: Level) -> Option<f64> {
    use std::arch::asm;
    const ROUNDS: usize = 100_000;
    // Runs eight independent copies of an instruction, `$n` times, on registers that are declared.
    macro_rules! rounds {
        ([$($line:tt),+], [$($register:tt),+]) => {
            asm!("2:", $($line,)+ "dec {n}", "jnz 2b", n = inout(reg) ROUNDS => _,
                $(out($register) _,)+ options(nostack))
        };
    }
    // SAFETY of each: registers only, all declared; the caller passes available levels only.
    #[rustfmt::skip]
    let (run, flop): (fn(), usize) = match level {
        Level::Portable => return None,
        Level::Avx2 => (|| unsafe {
            rounds!(["vpmaddwd ymm8, ymm14, ymm15", "vpaddd ymm0, ymm0, ymm8",
                "vpmaddwd ymm9, ymm14, ymm15", "vpaddd ymm1, ymm1, ymm9",
                "vpmaddwd ymm10, ymm14, ymm15", "vpaddd ymm2, ymm2, ymm10",
                "vpmaddwd ymm11, ymm14, ymm15", "vpaddd ymm3, ymm3, ymm11",
                "vpmaddwd ymm12, ymm14, ymm15", "vpaddd ymm4, ymm4, ymm12",
                "vpmaddwd ymm13, ymm14, ymm15", "vpaddd ymm5, ymm5, ymm13"],
                ["ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm8", "ymm9", "ymm10", "ymm11",
                 "ymm12", "ymm13"])
        }, 6 * 16 * 2),
        Level::Avx512 => (|| unsafe {
            rounds!(["vpdpbusd zmm0, zmm14, zmm15", "vpdpbusd zmm1, zmm14, zmm15",
                "vpdpbusd zmm2, zmm14, zmm15", "vpdpbusd zmm3, zmm14, zmm15",
                "vpdpbusd zmm4, zmm14, zmm15", "vpdpbusd zmm5, zmm14, zmm15",
                "vpdpbusd zmm6, zmm14, zmm15", "vpdpbusd zmm7, zmm14, zmm15",
                "vpdpbusd zmm8, zmm14, zmm15", "vpdpbusd zmm9, zmm14, zmm15",
                "vpdpbusd zmm10, zmm14, zmm15", "vpdpbusd zmm11, zmm14, zmm15"],
                ["zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9",
                 "zmm10", "zmm11"])
        }, 12 * 64), // two instructions per product: 64 x 2 / 2
        Level::Amx => (|| unsafe {
            let mut config = [0u8; 64];
            config[0] = 1;
            for tile in 0..8 {
                config[16 + 2 * tile] = 64;
                config[48 + tile] = 16;
            }
            asm!("ldtilecfg [{c}]", "tilezero tmm0", "tilezero tmm1", "tilezero tmm2",
                "tilezero tmm3", "tilezero tmm4", "tilezero tmm5", "tilezero tmm6",
                "tilezero tmm7",
                "2:", "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {n}", "jnz 2b", "tilerelease",
                c = in(reg) config.as_ptr(), n = inout(reg) ROUNDS => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _, options(nostack));
        }, 4 * 16 * 16 * 32 * 2),
    };
    let pool = Pool::global();
    let time = shortest(0.2, || pool.broadcast(&|_| run()));
    Some((ROUNDS * flop * pool.threads()) as f64 / time * 1e-9)
}

#[cfg(not(target_arch = "x86_64"))]
fn peak(_: Level) -> Option<f64> {
    None
}

fn noise(seed: u32, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments
        .next()
        .map_or(1, |n| n.parse().expect("a number of threads"));
    let wanted = arguments.next();
    let budget = arguments
        .next()
        .map_or(0.3, |s| s.parse().expect("seconds per measurement"));
    let only = arguments.next();
    Pool::request_threads(threads);
    Pool::global().pin_caller();
    for level in Level::available() {
        if wanted
            .as_deref()
            .is_some_and(|name| name != level.name() && name != "all")
        {
            continue;
        }
        let peak = peak(level);
        let bandwidth = memory_bandwidth() * 1e-9;
        println!(
            "\n{}, {threads} threads: memory {bandwidth:.1} GB/s, peak {:.0} GFLOP/s",
            level.name(),
            peak.unwrap_or(f64::NAN)
        );
        println!(
            "{:14}{:9}{:>15}{:6}  decode GB/s (share)  batch 4: us/row  prefill GFLOP/s (share): 64, 512, 2048 rows",
            "model", "matrix", "shape", "type"
        );
        for (model, name, rows, cols, ty) in SHAPES {
            if only
                .as_deref()
                .is_some_and(|only| !format!("{model} {name}").contains(only))
            {
                continue;
            }
            // Small random scales; codes of any value.
            let bytes: Vec<u8> = match ty {
                GgmlType::BF16 => noise(1, rows * cols)
                    .iter()
                    .flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes())
                    .collect(),
                _ => vec![0x11; ty.bytes(rows * cols).expect("whole blocks")],
            };
            let source = MatrixSource {
                ty,
                rows,
                bytes: &bytes,
            };
            let pack = || PackedMatrix::pack(cols, &[source]).expect("well formed");
            let copies: Vec<PackedMatrix> = {
                let first = pack();
                let count = (COLD / first.bytes()).clamp(1, 200);
                std::iter::once(first)
                    .chain((1..count).map(|_| pack()))
                    .collect()
            };
            let x = noise(7, 2048 * cols);
            let run = |m: usize, copies: &[PackedMatrix], budget: f64| {
                let mut out = vec![0.0; m * rows];
                let time = shortest(budget, || {
                    for matrix in copies {
                        matrix.matmul_at(level, &x[..m * cols], m, &mut out, Epilogue::default());
                    }
                });
                black_box(&out);
                time / copies.len() as f64
            };
            let time = run(1, &copies, budget);
            let rate = copies[0].bytes() as f64 / time * 1e-9;
            print!(
                "{model:14}{name:9}{:>15} {:5}",
                format!("{rows} x {cols}"),
                ty.name()
            );
            print!("  {rate:5.1} ({:3.0} %)", 100.0 * rate / bandwidth);
            print!("  {:9.1}      ", 1e6 * run(4, &copies, budget) / 4.0);
            if rows < 20_000 && level != Level::Portable {
                for m in [64, 512, 2048] {
                    let flop = 2.0 * (m * rows * cols) as f64;
                    let rate = flop / run(m, &copies[..1], budget) * 1e-9;
                    print!("  {rate:6.0}");
                    if let Some(peak) = peak {
                        print!(" ({:3.0} %)", 100.0 * rate / peak);
                    }
                }
            }
            println!();
        }
        for (model, cols, inner, up_type, down_type, gate) in MLPS {
            if only
                .as_deref()
                .is_some_and(|only| !format!("{model} mlp").contains(only))
                || level == Level::Portable
            {
                continue;
            }
            let pack = |ty: GgmlType, rows: usize, cols: usize| {
                let bytes = vec![0x11; ty.bytes(rows * cols).expect("whole blocks")];
                let bytes = &bytes[..];
                PackedMatrix::pack(cols, &[MatrixSource { ty, rows, bytes }]).expect("well formed")
            };
            let (up, down) = (pack(up_type, 2 * inner, cols), pack(down_type, cols, inner));
            let x = noise(7, 2048 * cols);
            print!("{model:14}mlp  ");
            for m in [64, 256, 512, 1024, 2048] {
                let mut out = vec![0.0; m * cols];
                let time = shortest(budget, || {
                    let how = Epilogue {
                        gate: Some(gate),
                        ..Epilogue::default()
                    };
                    let last = (&down, Epilogue::default());
                    up.mlp_at(level, how, last, &x[..m * cols], m, &mut out);
                });
                black_box(&out);
                let rate = 6.0 * (m * inner * cols) as f64 / time * 1e-9;
                let share = 100.0 * rate / peak.unwrap_or(f64::NAN);
                print!("  {m} rows: {rate:6.0} ({share:3.0} %)");
            }
            println!();
        }
    }
}
