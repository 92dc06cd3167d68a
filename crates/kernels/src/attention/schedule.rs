//! Hands blocks of queries and ranges of keys to threads, and merges the ranges.
//!
//! Prefill splits by kv head and query block; when that gives too few shares, the keys are split as
//! well and the partial softmaxes merged by their maxima and sums. Single queries (decode) are always
//! split at the same keys, so that their results depend neither on the number of threads nor on the
//! rest of a batch. Calls too small to be worth waking a thread run on the caller.

use super::flash::{self, Block, Outcome, Scratch};
use super::lanes::Portable;
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::layout::PAGE;
use super::micro::Entries;
use super::sight::{Sight, sight};
use super::{Attention, AttentionOutput, KvDtype, Tiles};
use crate::cpu::Level;
use crate::pool::{Pool, SharedMut};
#[cfg(target_arch = "x86_64")]
use crate::tile::Hardware;
use crate::tile::{NoTiles, TileUnit};
use std::cell::RefCell;
use std::f32::consts::LN_2;

/// Query rows of a block, about: enough to hide the expansion of a tile, few enough to keep the
/// block near the core and to waste little on the diagonal.
const BLOCK_ROWS: usize = 192;
/// The same for 16-bit types over many tiles: expansion and reading cost more, and the diagonal matters
/// less.
const BLOCK_ROWS_LONG: usize = 384;
/// Tiles that are many.
const MANY_TILES: usize = 32;
/// The same for int8, which is not expanded.
const BLOCK_ROWS_INT8: usize = 96;
/// Estimated nanoseconds of work from which waking the pool pays.
const FORK_NANOSECONDS: usize = 20_000;
/// Shares per thread that even out unequal shares and unequal cores.
const SHARES_PER_THREAD: usize = 4;
/// Fewest tiles of a share of keys.
const LEAST_TILES: usize = 4;
/// Tiles of a share where queries stand for themselves: some microseconds of work.
const ROW_TILES: usize = 8;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    static PARTIALS: RefCell<Vec<f32>> = RefCell::default();
}

/// One sequence of the batch.
struct Job<'a> {
    args: &'a Attention<'a>,
    out: SharedMut<f32>,
    /// `[queries, num_heads]`, base 2.
    lse: SharedMut<f32>,
    /// Column-sum buffers `[num_heads, tiles * PAGE]` by part.
    sums: Vec<Option<SharedMut<f32>>>,
}

/// One share of the work.
struct Item {
    job: usize,
    block: Block,
    /// Where its partial outcome goes; `None` when it holds all keys and writes the output itself.
    partial: Option<usize>,
    cost: usize,
}

/// Partial outcomes of the same rows, at `offset`, `offset + size`, ...
struct Merge {
    job: usize,
    block: Block,
    offset: usize,
    shares: usize,
}

pub(super) fn run(
    level: Level,
    items: &[Attention],
    outs: &mut [&mut [f32]],
) -> Vec<AttentionOutput> {
    assert_eq!(
        items.len(),
        outs.len(),
        "attention: one output buffer per item"
    );
    for (args, out) in items.iter().zip(outs.iter()) {
        if let Err(error) = args.check(out.len()) {
            panic!("{error}");
        }
    }
    // SAFETY: the arguments are checked, and the level is one this CPU has.
    unsafe {
        match level.min(Level::detected()) {
            #[cfg(target_arch = "x86_64")]
            Level::Amx => run_at::<Avx512, Hardware>(items, outs),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => run_at::<Avx512, NoTiles>(items, outs),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => run_at::<Avx2, NoTiles>(items, outs),
            _ => run_at::<Portable, NoTiles>(items, outs),
        }
    }
}

/// # Safety
/// The CPU has `L`'s and `T`'s instructions.
pub(super) unsafe fn run_at<L: Entries, T: TileUnit>(
    items: &[Attention],
    outs: &mut [&mut [f32]],
) -> Vec<AttentionOutput> {
    assert_eq!(
        items.len(),
        outs.len(),
        "attention: one output buffer per item"
    );
    for (args, out) in items.iter().zip(outs.iter()) {
        if let Err(error) = args.check(out.len()) {
            panic!("{error}");
        }
    }
    let mut outputs: Vec<AttentionOutput> = items.iter().map(empty_output).collect();
    let jobs: Vec<Job> = (items.iter().zip(outs).zip(&mut outputs))
        .map(|((args, out), output)| Job {
            args,
            out: SharedMut::new(out),
            lse: SharedMut::new(&mut output.lse),
            sums: (output.column_sums.iter_mut())
                .map(|sums| sums.as_mut().map(|sums| SharedMut::new(sums)))
                .collect(),
        })
        .collect();
    let pool = Pool::global();
    let fork = pool.threads() > 1 && jobs.iter().map(nanoseconds).sum::<usize>() > FORK_NANOSECONDS;
    let (shares, merges, partials) = split(&jobs, if fork { pool.threads() } else { 1 });

    let mut buffer = PARTIALS.take();
    if buffer.len() < partials {
        buffer.resize(partials, 0.0);
    }
    let partials = SharedMut::new(&mut buffer);
    let work = |index: usize| {
        let item = &shares[index];
        let job = &jobs[item.job];
        SCRATCH.with_borrow_mut(|scratch| run_item::<L, T>(job, item, scratch, &partials));
    };
    if fork && shares.len() > 1 {
        pool.for_each(shares.len(), work);
    } else {
        (0..shares.len()).for_each(work);
    }
    for merge in &merges {
        merge_shares(&jobs[merge.job], merge, &partials);
    }
    PARTIALS.set(buffer);

    finish_column_sums::<L, T>(&jobs, fork.then_some(pool));
    drop(jobs);
    for output in &mut outputs {
        output.lse.iter_mut().for_each(|lse| *lse *= LN_2);
    }
    outputs
}

/// Buffers of an output. Single queries collect logits first, so that their empty columns start
/// at -infinity.
fn empty_output(args: &Attention) -> AttentionOutput {
    let start = if args.queries == 1 {
        f32::NEG_INFINITY
    } else {
        0.0
    };
    let column_sums = (args.parts.iter())
        .map(|part| match part.tiles {
            Tiles::Shared(tiles) if part.column_sums => {
                Some(vec![start; args.num_heads * tiles.len() * PAGE])
            }
            _ => None,
        })
        .collect();
    AttentionOutput {
        column_sums,
        lse: vec![f32::NEG_INFINITY; args.queries * args.num_heads],
    }
}

/// Tiles that a kv head reads.
fn tiles_read(args: &Attention, kv_head: usize) -> usize {
    flash::segments(args, kv_head)
        .map(|segment| segment.tiles.len())
        .sum()
}

/// A rough estimate of a job's time on one core, without masks.
fn nanoseconds(job: &Job) -> usize {
    let args = job.args;
    let tiles: usize = (0..args.layout.num_kv_heads)
        .map(|head| tiles_read(args, head))
        .sum();
    let bytes = tiles * 2 * args.layout.section_bytes();
    let products = tiles * PAGE * args.layout.head_dim * 2 * args.queries * args.group();
    bytes / 16 + products / 32
}

/// Cuts the jobs into shares, the costly ones first.
fn split(jobs: &[Job], threads: usize) -> (Vec<Item>, Vec<Merge>, usize) {
    let mut blocks: Vec<(usize, Block, usize)> = Vec::new();
    for (job, Job { args, .. }) in jobs.iter().enumerate() {
        let step = queries_per_block(args);
        for kv_head in 0..args.layout.num_kv_heads {
            let tiles = tiles_read(args, kv_head);
            for from in (0..args.queries).step_by(step) {
                let queries = (from, (from + step).min(args.queries));
                blocks.push((
                    job,
                    Block {
                        kv_head,
                        queries,
                        tiles: (0, tiles),
                    },
                    tiles,
                ));
            }
        }
    }
    let wanted = if threads > 1 {
        threads * SHARES_PER_THREAD
    } else {
        1
    };
    let shares_per_block = wanted.div_ceil(blocks.len().max(1));
    let mut items = Vec::with_capacity(blocks.len() * shares_per_block);
    let (mut merges, mut offset) = (Vec::new(), 0);
    for (job, block, tiles) in blocks {
        let args = jobs[job].args;
        // Where the shares of `tiles` begin and end.
        let (shares, cut): (usize, &dyn Fn(usize) -> usize) = if args.by_row() {
            let shares = tiles.div_ceil(ROW_TILES).max(1);
            (shares, &|share| (share * ROW_TILES).min(tiles))
        } else {
            let shares = shares_per_block.min(tiles / LEAST_TILES).max(1);
            (shares, &move |share| share * tiles / shares)
        };
        if shares == 1 {
            let cost = if threads > 1 { cost(args, &block) } else { 0 };
            items.push(Item {
                job,
                block,
                partial: None,
                cost,
            });
            continue;
        }
        merges.push(Merge {
            job,
            block,
            offset,
            shares,
        });
        for share in 0..shares {
            let tiles = (cut(share), cut(share + 1));
            let block = Block { tiles, ..block };
            items.push(Item {
                job,
                block,
                partial: Some(offset),
                cost: cost(args, &block),
            });
            offset += partial_size(args, &block);
        }
    }
    if threads > 1 {
        items.sort_by_key(|item| std::cmp::Reverse(item.cost));
    }
    (items, merges, offset)
}

fn queries_per_block(args: &Attention) -> usize {
    let rows = match args.layout.dtype {
        KvDtype::Int8 => BLOCK_ROWS_INT8,
        KvDtype::F16 | KvDtype::Bf16 if tiles_read(args, 0) >= MANY_TILES => BLOCK_ROWS_LONG,
        _ => BLOCK_ROWS,
    };
    (rows / args.group()).max(1)
}

/// Rows times visible tiles.
fn cost(args: &Attention, block: &Block) -> usize {
    let (mut passed, mut seen) = (0, 0);
    for segment in flash::segments(args, block.kv_head) {
        let end = passed + segment.tiles.len();
        let from = block.tiles.0.clamp(passed, end) - passed;
        let to = block.tiles.1.clamp(passed, end) - passed;
        let sees = |tile| {
            !matches!(
                sight(args, segment.part, block.queries, tile),
                Sight::Nothing
            )
        };
        seen += segment.tiles[from..to]
            .iter()
            .filter(|tile| sees(tile))
            .count();
        passed = end;
    }
    seen * block.rows(args)
}

/// f32 elements of a partial outcome: the rows' output, maxima and sums.
fn partial_size(args: &Attention, block: &Block) -> usize {
    block.rows(args) * (args.layout.padded_dim() + 2)
}

unsafe fn run_item<L: Entries, T: TileUnit>(
    job: &Job,
    item: &Item,
    scratch: &mut Scratch,
    partials: &SharedMut<f32>,
) {
    let args = job.args;
    // A single query's logits go straight to the column-sum buffer; see `finish_column_sums`.
    let tap = |part: usize, row: usize, tile: usize, logits: &[f32]| {
        let Some(sums) = &job.sums[part] else { return };
        let Tiles::Shared(tiles) = args.parts[part].tiles else {
            return;
        };
        let head = item.block.kv_head * args.group() + row;
        let to = sums.slice((head * tiles.len() + tile) * PAGE, PAGE);
        to.copy_from_slice(logits);
    };
    let tap: Option<flash::Tap> = if args.queries == 1 { Some(&tap) } else { None };
    T::configure();
    let outcome = flash::run::<L, T>(args, &item.block, scratch, tap);
    T::release();
    let rows = item.block.rows(args);
    let width = args.layout.padded_dim();
    match item.partial {
        None => {
            for row in 0..rows {
                let sum = outcome.sum[row * 16..][..16].iter().sum();
                let out = &outcome.out[row * width..];
                write_row(job, &item.block, row, out, outcome.max[row], sum);
            }
        }
        Some(offset) => {
            let Outcome { out, max, sum } = outcome;
            let to = partials.slice(offset, partial_size(args, &item.block));
            let (to_out, to_rest) = to.split_at_mut(rows * width);
            to_out.copy_from_slice(out);
            to_rest[..rows].copy_from_slice(max);
            for (to, sum) in to_rest[rows..].iter_mut().zip(sum.chunks_exact(16)) {
                *to = sum.iter().sum();
            }
        }
    }
}

/// Writes a finished row of a block: `out / sum`, and the log-sum-exp.
unsafe fn write_row(job: &Job, block: &Block, row: usize, out: &[f32], max: f32, sum: f32) {
    let args = job.args;
    let queries = block.queries.1 - block.queries.0;
    let head = block.kv_head * args.group() + row / queries;
    let index = (block.queries.0 + row % queries) * args.num_heads + head;
    let to = job
        .out
        .slice(index * args.layout.head_dim, args.layout.head_dim);
    // The sum is 0 only when no key was seen.
    let factor = if sum == 0.0 { 0.0 } else { 1.0 / sum };
    for (to, x) in to.iter_mut().zip(out) {
        *to = x * factor;
    }
    job.lse.slice(index, 1)[0] = if sum == 0.0 {
        f32::NEG_INFINITY
    } else {
        max + sum.log2()
    };
}

/// Softmax over disjoint shares of the keys: weights 2^(max_i - max).
unsafe fn merge_shares(job: &Job, merge: &Merge, partials: &SharedMut<f32>) {
    let args = job.args;
    let (rows, width) = (merge.block.rows(args), args.layout.padded_dim());
    let size = partial_size(args, &merge.block);
    let mut out = vec![0f32; width];
    for row in 0..rows {
        let share = |index: usize| {
            let share: &[f32] = partials.slice(merge.offset + index * size, size);
            let rest = &share[rows * width..];
            (&share[row * width..][..width], rest[row], rest[rows + row])
        };
        let max = (0..merge.shares).fold(f32::NEG_INFINITY, |max, i| max.max(share(i).1));
        let mut total = 0.0;
        out.fill(0.0);
        for (part, part_max, sum) in (0..merge.shares).map(share) {
            if part_max == f32::NEG_INFINITY {
                continue;
            }
            let weight = (part_max - max).exp2();
            total += weight * sum;
            for (out, x) in out.iter_mut().zip(part) {
                *out += weight * x;
            }
        }
        write_row(job, &merge.block, row, &out, max, total);
    }
}

/// Column sums: single queries turn their stored logits into probabilities; several queries
/// recompute the logits of the parts that ask, tile range by tile range, since a column's owner
/// must see all queries.
unsafe fn finish_column_sums<L: Entries, T: TileUnit>(jobs: &[Job], pool: Option<&Pool>) {
    // (job, part, kv head, tiles)
    let mut shares: Vec<(usize, usize, usize, (usize, usize))> = Vec::new();
    for (number, job) in jobs.iter().enumerate() {
        for (part, sums) in job.sums.iter().enumerate() {
            let (Some(_), Tiles::Shared(tiles)) = (sums, job.args.parts[part].tiles) else {
                continue;
            };
            let step = if job.args.queries == 1 { 64 } else { 8 };
            for kv_head in 0..job.args.layout.num_kv_heads {
                for from in (0..tiles.len()).step_by(step) {
                    let tiles = (from, (from + step).min(tiles.len()));
                    shares.push((number, part, kv_head, tiles));
                }
            }
        }
    }
    let work = |index: usize| {
        let (number, part, kv_head, range) = shares[index];
        let Job {
            args, lse, sums, ..
        } = &jobs[number];
        let Some(sums) = &sums[part] else { return };
        let Tiles::Shared(tiles) = args.parts[part].tiles else {
            return;
        };
        let group = args.group();
        // Shared reads: nothing writes `lse` any more.
        let lse: &[f32] = lse.slice(0, args.queries * args.num_heads);
        if args.queries == 1 {
            for head in kv_head * group..(kv_head + 1) * group {
                let columns = sums.slice(
                    (head * tiles.len() + range.0) * PAGE,
                    (range.1 - range.0) * PAGE,
                );
                let lse = if lse[head] == f32::NEG_INFINITY {
                    0.0
                } else {
                    lse[head]
                };
                L::normalise(columns.as_mut_ptr(), columns.len(), lse);
            }
            return;
        }
        let step = queries_per_block(args);
        let mut columns = |g: usize| {
            let head = kv_head * group + g;
            // Shares own disjoint tiles, so they write disjoint columns of this row.
            let from = (head * tiles.len() + range.0) * PAGE;
            sums.slice(from, (range.1 - range.0) * PAGE)
                .as_mut_ptr()
                .wrapping_sub(range.0 * PAGE)
        };
        SCRATCH.with_borrow_mut(|scratch| {
            T::configure();
            flash::column_sums::<L, T>(
                args,
                part,
                kv_head,
                range,
                lse,
                step,
                scratch,
                &mut columns,
            );
            T::release();
        });
    };
    match pool {
        Some(pool) if shares.len() > 2 => pool.for_each(shares.len(), work),
        _ => (0..shares.len()).for_each(work),
    }
}
