//! Speed of the f32 products that learn ([`longspan_kernels::dense`]) on the shapes of a small model: forward, the
//! gradient of the input, the gradient of the weight, each with its packing, beside a register-only loop of FMAs.
//!
//! `cargo run --release -p longspan-kernels --example dense_bench -- [threads]`

use candle_core::{Device, Tensor, Var};
use longspan_kernels::cpu::Level;
use longspan_kernels::dense::{Left, Packed, add_product};
use longspan_kernels::elementwise::split_rows;
use longspan_kernels::linear::linear;
use longspan_kernels::pool::{Pool, SharedMut};
use std::hint::black_box;

/// Rows, inputs, outputs of the layers of `longspan bench train`'s transformer.
const SHAPES: [(usize, usize, usize); 5] = [
    (2048, 320, 960),
    (2048, 320, 320),
    (2048, 320, 1728),
    (2048, 864, 320),
    (2048, 320, 256),
];

/// Seconds: CPU time of this thread, or wall time when several threads work.
fn now() -> f64 {
    let clock = match Pool::global().threads() {
        1 => libc::CLOCK_THREAD_CPUTIME_ID,
        _ => libc::CLOCK_MONOTONIC,
    };
    // SAFETY: `time` is plain memory.
    unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(clock, &mut time);
        time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64
    }
}

/// The least of some runs, in seconds.
fn least(mut work: impl FnMut()) -> f64 {
    let times = (0..40).map(|_| {
        let start = now();
        work();
        now() - start
    });
    times.fold(f64::INFINITY, f64::min)
}

fn main() {
    let threads = std::env::args().nth(1).and_then(|n| n.parse().ok());
    Pool::request_threads(threads.unwrap_or(1));
    let (level, pool) = (Level::current(), Pool::global());
    println!(
        "{level:?}, {} threads; GFLOP/s: product of packed, with packing",
        pool.threads()
    );
    for (m, k, n) in SHAPES {
        let value = |i: usize| ((i * 7919) % 1009) as f32 / 504.5 - 1.0;
        let x: Vec<f32> = (0..m * k).map(value).collect();
        let w: Vec<f32> = (0..n * k).map(value).collect();
        let g: Vec<f32> = (0..m * n).map(value).collect();
        let flops = 2e-9 * (m * k * n) as f64;
        let run = |name: &str, a: Left<'_, f32>, rows: usize, pack: &dyn Fn() -> Packed<f32>| {
            let packed = pack();
            let cols = packed.cols();
            let mut c = vec![0f32; rows * cols];
            let product = |packed: &Packed<f32>, c: &mut [f32]| {
                let shared = SharedMut::new(c);
                split_rows(rows, cols, |first, rows| {
                    let a = Left {
                        data: &a.data[first * a.row..],
                        ..a
                    };
                    // SAFETY: pieces are disjoint row ranges.
                    let c = unsafe { shared.slice(first * cols, rows * cols) };
                    add_product(level, a, rows, packed, c, cols);
                });
            };
            let alone = least(|| product(&packed, &mut c));
            let packing = least(|| {
                black_box(pack());
            });
            let both = least(|| product(&pack(), &mut c));
            print!(
                "  {name} {:4.0} {:4.0} (pack {:.2} of {:.2} ms)",
                flops / alone,
                flops / both,
                1e3 * packing,
                1e3 * both
            );
        };
        print!("{m}x{k}x{n}");
        run(
            "forward",
            Left {
                data: &x,
                row: k,
                col: 1,
            },
            m,
            &|| Packed::new(&w, k, n, 1, k),
        );
        run(
            "input",
            Left {
                data: &g,
                row: n,
                col: 1,
            },
            m,
            &|| Packed::new(&w, n, k, k, 1),
        );
        run(
            "weight",
            Left {
                data: &g,
                row: 1,
                col: n,
            },
            n,
            &|| Packed::new(&x, m, k, k, 1),
        );
        let tensor = |values: &[f32], shape: (usize, usize)| {
            Var::from_tensor(&Tensor::from_slice(values, shape, &Device::Cpu).unwrap()).unwrap()
        };
        let (x, w) = (tensor(&x, (m, k)), tensor(&w, (n, k)));
        let forward = least(|| {
            black_box(linear(&x.as_detached_tensor(), &w.as_detached_tensor(), None).unwrap());
        });
        println!("  op {:.0}", flops / forward);
    }
}
