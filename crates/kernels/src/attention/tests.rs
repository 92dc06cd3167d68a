//! Every level, storage type and shape against the naive twin.

use super::*;
use proptest::prelude::*;

/// A deterministic stream of numbers in [-1, 1).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }
    fn below(&mut self, end: usize) -> usize {
        self.next() as usize % end
    }
    fn float(&mut self) -> f32 {
        (self.next() & 0xff_ffff) as f32 / 8_388_608.0 - 1.0
    }
    fn floats(&mut self, count: usize, size: f32) -> Vec<f32> {
        (0..count).map(|_| self.float() * size).collect()
    }
}

/// Planes of a page filled with random rows, 64-byte aligned not needed for correctness.
fn page(layout: &KvLayout, random: &mut Random) -> (Vec<u8>, Vec<u8>) {
    let width = layout.num_kv_heads * layout.head_dim;
    let (mut keys, mut values) = (vec![0; layout.plane_bytes()], vec![0; layout.plane_bytes()]);
    let stride = width + 3;
    let rows = random.floats(PAGE * stride, 2.0);
    layout.write_keys(&mut keys, 0, &rows, stride);
    let rows = random.floats(PAGE * stride, 1.0);
    layout.write_values(&mut values, 0, &rows, stride);
    (keys, values)
}

#[derive(Clone, Debug)]
struct Case {
    dtype: KvDtype,
    head_dim: usize,
    num_kv_heads: usize,
    group: usize,
    queries: usize,
    softcap: bool,
    alibi: bool,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    (
        prop::sample::select(vec![
            KvDtype::F32,
            KvDtype::F16,
            KvDtype::Bf16,
            KvDtype::Int8,
        ]),
        prop::sample::select(vec![8usize, 16, 64, 80, 128, 256]),
        1usize..3,
        prop::sample::select(vec![1usize, 3, 7, 9]),
        prop_oneof![Just(1usize), 2usize..9, 9usize..71],
        any::<bool>(),
        any::<bool>(),
        1u64..1 << 40,
    )
        .prop_map(
            |(dtype, head_dim, num_kv_heads, group, queries, cap, alibi, seed)| Case {
                dtype,
                head_dim,
                num_kv_heads,
                group,
                queries,
                softcap: cap,
                alibi,
                seed,
            },
        )
}

/// Builds the case's pages and parts and hands the attention to `check`, with the bf16 error bound
/// scale max|v|.
fn with_case(case: &Case, check: impl Fn(&Attention)) {
    let random = &mut Random(case.seed | 1);
    let layout = KvLayout {
        num_kv_heads: case.num_kv_heads,
        head_dim: case.head_dim,
        dtype: case.dtype,
    };
    let num_heads = case.num_kv_heads * case.group;
    let pages: Vec<_> = (0..5).map(|_| page(&layout, random)).collect();
    let query_start = random.below(400) as u64;
    let list = |random: &mut Random| -> Vec<Tile> {
        (0..random.below(5))
            .map(|_| {
                let (keys, values) = &pages[random.below(pages.len())];
                let (a, b) = (random.below(65) as u8, random.below(65) as u8);
                let whole = random.below(2) == 0;
                let (lo, hi) = if whole { (0, 64) } else { (a.min(b), a.max(b)) };
                Tile {
                    keys,
                    values,
                    first: random.below(420) as u64,
                    lo,
                    hi,
                }
            })
            .collect()
    };
    let shared: Vec<Vec<Tile>> = (0..2).map(|_| list(random)).collect();
    let per_kv: Vec<Vec<Tile>> = (0..case.num_kv_heads).map(|_| list(random)).collect();
    let per_head: Vec<Vec<Tile>> = (0..num_heads).map(|_| list(random)).collect();
    let elements = case.queries * num_heads * case.head_dim;
    // Terms of up to 30 or so: their rounding stays below that of the products.
    let slopes = random.floats(num_heads, 0.05);
    let queries: Vec<Vec<f32>> = (0..4).map(|_| random.floats(elements, 1.5)).collect();
    let mut parts = Vec::new();
    for (index, query) in queries.iter().enumerate() {
        let tiles = match index {
            0 | 1 => Tiles::Shared(&shared[index]),
            2 => Tiles::PerKvHead(&per_kv),
            _ => Tiles::PerQueryHead(&per_head),
        };
        let mask = match random.below(4) {
            0 => Mask::All,
            1 => Mask::Causal,
            2 => Mask::Window(random.below(200) as u64),
            _ => Mask::Beyond(random.below(200) as u64),
        };
        let alibi = Alibi {
            slopes: &slopes,
            query: match random.below(3) {
                0 => Place::Own,
                1 => Place::AtMost(random.below(450) as u64),
                _ => Place::At(random.below(450) as u64),
            },
            keys_at: (random.below(3) == 0).then_some(random.below(200) as u64),
        };
        if index == 0 || random.below(2) == 0 {
            parts.push(Part {
                query,
                tiles,
                mask,
                column_sums: random.below(2) == 0,
                alibi: case.alibi.then_some(alibi),
            });
        }
    }
    check(&Attention {
        layout,
        num_heads,
        queries: case.queries,
        query_start,
        scale: (case.head_dim as f32).powf(-0.5),
        softcap: case.softcap.then_some(4.0),
        row_exact: false,
        parts: &parts,
    });
}

/// The largest difference of two equally long slices; NaN counts as infinite.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let gap = |(a, b): (&f32, &f32)| {
        if a == b {
            0.0
        } else if (a - b).is_nan() {
            f32::INFINITY
        } else {
            (a - b).abs()
        }
    };
    a.iter().zip(b).map(gap).fold(0.0, f32::max)
}

fn assert_like_naive(level: Level, args: &Attention, tolerance: f32) {
    let mut out = vec![f32::NAN; args.queries * args.num_heads * args.layout.head_dim];
    let mut expected = out.clone();
    let output = attention_at(level, args, &mut out);
    let truth = attention_naive(args, &mut expected);
    assert_close(
        &output,
        &truth,
        &out,
        &expected,
        tolerance,
        args.queries as f32,
        level.name(),
    );
}

/// The tile path on an emulated unit. Queries and probabilities are rounded to bf16, each by at
/// most 2^-9 of itself: logits (at most ~24 here in base e, typically under 4) move by 2^-9 of
/// `sum |q k|`, outputs by that share and another 2^-9 of the largest value, which is 1.
#[cfg(target_arch = "x86_64")]
fn assert_tiles_like_naive(args: &Attention) {
    use crate::tile::emulated::Emulated;
    let mut out = vec![f32::NAN; args.queries * args.num_heads * args.layout.head_dim];
    let mut expected = out.clone();
    let truth = attention_naive(args, &mut expected);
    let items = std::slice::from_ref(args);
    // SAFETY: the lanes are chosen by what this CPU has.
    let output = unsafe {
        if Level::detected() >= Level::Avx512 {
            schedule::run_at::<lanes::Avx512, Emulated>(items, &mut [&mut out])
        } else {
            schedule::run_at::<lanes::Portable, Emulated>(items, &mut [&mut out])
        }
    };
    assert_close(
        &output[0],
        &truth,
        &out,
        &expected,
        1.5e-2,
        args.queries as f32,
        "tiles",
    );
}

fn assert_close(
    output: &AttentionOutput,
    truth: &AttentionOutput,
    out: &[f32],
    expected: &[f32],
    tolerance: f32,
    queries: f32,
    name: &str,
) {
    let gap = distance(out, expected);
    assert!(gap <= tolerance, "{name}: output is off by {gap}");
    let gap = distance(&output.lse, &truth.lse);
    assert!(
        gap <= 4.0 * tolerance,
        "{name}: log-sum-exp is off by {gap}"
    );
    assert_eq!(output.column_sums.len(), truth.column_sums.len());
    for (sums, truth) in output.column_sums.iter().zip(&truth.column_sums) {
        assert_eq!(sums.is_some(), truth.is_some());
        if let (Some(sums), Some(truth)) = (sums, truth) {
            let gap = distance(sums, truth);
            assert!(
                gap <= tolerance * queries.max(1.0),
                "{name}: column sums are off by {gap}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..Default::default() })]

    /// The naive twin reads the same stored numbers, so one tolerance serves all storage types in
    /// f32 arithmetic.
    #[test]
    fn every_level_agrees_with_the_naive_twin(case in case()) {
        with_case(&case, |args| {
            for level in Level::available().filter(|&level| level < Level::Amx) {
                // Integers of about 16 bits on one side or both.
                let integers = level == Level::Avx512 && args.layout.dtype != KvDtype::F32;
                assert_like_naive(level, args, if integers { 4e-4 } else { 5e-5 });
            }
            if Level::detected() == Level::Amx {
                assert_like_naive(Level::Amx, args, 1.5e-2);
            }
            #[cfg(target_arch = "x86_64")]
            assert_tiles_like_naive(args);
        });
    }

    #[test]
    fn the_order_of_parts_does_not_matter(case in case()) {
        with_case(&case, |args| {
            let mut turned = args.parts.to_vec();
            turned.reverse();
            let turned = Attention { parts: &turned, ..*args };
            let mut out = vec![0.0; args.queries * args.num_heads * args.layout.head_dim];
            let mut other = out.clone();
            attention(args, &mut out);
            attention(&turned, &mut other);
            // Logits of some tens (ALiBi) are rounded to some 1e-6, which the exponential passes on.
            let bound = match args.layout.dtype {
                KvDtype::F32 => 1e-5,
                _ if Level::current() == Level::Amx => 2e-2,
                KvDtype::F16 | KvDtype::Bf16 if Level::current() < Level::Avx512 => 1e-5,
                _ => 4e-4,
            };
            let gap = distance(&out, &other);
            assert!(gap <= bound, "off by {gap}");
        });
    }
}

/// Whole pages at consecutive positions, all valid but the last one.
fn context<'a>(pages: &'a [(Vec<u8>, Vec<u8>)], last: u8) -> Vec<Tile<'a>> {
    let tile = |(index, (keys, values)): (usize, &'a (Vec<u8>, Vec<u8>))| {
        let hi = if index + 1 == pages.len() {
            last
        } else {
            PAGE as u8
        };
        Tile {
            keys,
            values,
            first: (index * PAGE) as u64,
            lo: 0,
            hi,
        }
    };
    pages.iter().enumerate().map(tile).collect()
}

/// Verified drafts must be what decoding token by token gives, at every level: no tolerance.
#[test]
fn rows_that_stand_for_themselves_equal_single_queries_bit_for_bit() {
    let random = &mut Random(17);
    // Some queries see one share of the keys more than others do (8 tiles of 64).
    for (pages, queries) in [(1, 3), (3, 17), (9, 30), (17, 66)] {
        for (dtype, group) in [
            (KvDtype::F32, 1),
            (KvDtype::F16, 3),
            (KvDtype::F16, 7),
            (KvDtype::Bf16, 7),
            (KvDtype::Bf16, 16),
            (KvDtype::Int8, 2),
        ] {
            let layout = KvLayout {
                num_kv_heads: 2,
                head_dim: 64,
                dtype,
            };
            let num_heads = 2 * group;
            let planes: Vec<_> = (0..pages).map(|_| page(&layout, random)).collect();
            let last = 1 + random.below(PAGE) as u64;
            let end = (pages as u64 - 1) * 64 + last;
            let queries = queries.min(end as usize);
            let start = end - queries as u64;
            let width = num_heads * 64;
            let query = random.floats(queries * width, 1.5);
            let run = |level, first: usize, count: usize| {
                // What a store holds when query `first + count - 1` is the newest.
                let end = start + (first + count) as u64;
                let used = end.div_ceil(64) as usize;
                let tiles = context(&planes[..used], (end - (used as u64 - 1) * 64) as u8);
                let parts = [Part {
                    query: &query[first * width..(first + count) * width],
                    tiles: Tiles::Shared(&tiles),
                    mask: Mask::Causal,
                    column_sums: false,
                    alibi: None,
                }];
                let args = Attention {
                    layout,
                    num_heads,
                    queries: count,
                    query_start: start + first as u64,
                    scale: 0.125,
                    softcap: None,
                    row_exact: count > 1,
                    parts: &parts,
                };
                let mut out = vec![0.0; count * width];
                attention_at(level, &args, &mut out);
                out
            };
            for level in Level::available() {
                let together = run(level, 0, queries);
                for (index, row) in together.chunks_exact(width).enumerate() {
                    let what = format!("{} {dtype:?} x{group}: {index}", level.name());
                    assert_eq!(row, run(level, index, 1), "{what} of {queries}");
                }
            }
        }
    }
}

/// Long contexts of several sequences: the keys are split over threads and merged, and a batch
/// gives what its items give alone.
#[test]
fn batches_and_split_keys_agree_with_the_naive_twin() {
    for (dtype, tolerance) in [
        (KvDtype::F32, 2e-5),
        (KvDtype::F16, 2e-4),
        (KvDtype::Bf16, 2e-4),
        (KvDtype::Int8, 2e-4),
    ] {
        let random = &mut Random(7);
        let layout = KvLayout {
            num_kv_heads: 2,
            head_dim: 64,
            dtype,
        };
        let num_heads = 6;
        let pages: Vec<_> = (0..40).map(|_| page(&layout, random)).collect();
        // (pages, queries): single queries, a few, and one that needs no split.
        let shapes = [(40, 1), (33, 4), (3, 1), (20, 8)];
        let inputs: Vec<_> = (shapes.iter())
            .map(|&(count, queries)| {
                let tiles = context(&pages[..count], 17);
                (tiles, queries, random.floats(queries * num_heads * 64, 2.0))
            })
            .collect();
        let parts: Vec<_> = (inputs.iter())
            .map(|(tiles, _, query)| {
                let tiles = Tiles::Shared(tiles);
                [Part {
                    query,
                    tiles,
                    mask: Mask::Causal,
                    column_sums: true,
                    alibi: None,
                }]
            })
            .collect();
        let items: Vec<Attention> = (inputs.iter().zip(&parts))
            .map(|((tiles, queries, _), parts)| Attention {
                layout,
                num_heads,
                queries: *queries,
                query_start: (tiles.len() * PAGE - 47 - queries) as u64,
                scale: 0.125,
                softcap: None,
                row_exact: false,
                parts,
            })
            .collect();
        let mut outs: Vec<Vec<f32>> = inputs
            .iter()
            .map(|(_, queries, _)| vec![f32::NAN; queries * num_heads * 64])
            .collect();
        let mut slices: Vec<&mut [f32]> = outs.iter_mut().map(|out| &mut out[..]).collect();
        let outputs = attention_batch(&items, &mut slices);
        let tolerance = if Level::current() == Level::Amx {
            1.5e-2
        } else {
            tolerance
        };
        for ((args, out), output) in items.iter().zip(&outs).zip(&outputs) {
            let mut expected = out.clone();
            let truth = attention_naive(args, &mut expected);
            assert_close(
                output,
                &truth,
                out,
                &expected,
                tolerance,
                args.queries as f32,
                "batch",
            );
            let mut alone = out.clone();
            attention(args, &mut alone);
            assert!(distance(out, &alone) <= tolerance);
        }
    }
}

#[test]
fn queries_without_keys_give_zeros_and_huge_logits_stay_finite() {
    let layout = KvLayout {
        num_kv_heads: 1,
        head_dim: 16,
        dtype: KvDtype::Bf16,
    };
    let pages = vec![page(&layout, &mut Random(3))];
    let tiles = context(&pages, 64);
    for level in Level::available() {
        for (query_start, scale) in [(0, 1.0), (200, 1e6)] {
            let query = vec![1.0; 2 * 16];
            let mask = Mask::Beyond(100);
            let tiles = Tiles::Shared(&tiles);
            let parts = [Part {
                query: &query,
                tiles,
                mask,
                column_sums: true,
                alibi: None,
            }];
            let args = Attention {
                layout,
                num_heads: 1,
                queries: 2,
                query_start,
                scale,
                softcap: None,
                row_exact: false,
                parts: &parts,
            };
            let mut out = vec![f32::NAN; 32];
            let output = attention_at(level, &args, &mut out);
            let sums: f32 = output.column_sums[0]
                .as_ref()
                .expect("asked for")
                .iter()
                .sum();
            if query_start == 0 {
                assert_eq!(out, [0.0; 32]);
                assert_eq!(output.lse, [f32::NEG_INFINITY; 2]);
                assert_eq!(sums, 0.0);
            } else {
                assert!(
                    out.iter().all(|x| x.abs() <= 1.0),
                    "{}: {out:?}",
                    level.name()
                );
                assert!((sums - 2.0).abs() < 1e-3, "{}: {sums}", level.name());
            }
        }
    }
}

/// Every tile has larger logits than the one before, so that what was summed and what still waits to be
/// summed has to follow the maximum. Queries are exact in bf16, also times the scale in base 2: sharp
/// softmaxes agree.
#[test]
fn maxima_that_rise_from_tile_to_tile() {
    let random = &mut Random(23);
    for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8] {
        let (heads, dim, queries) = (2, 64, 45);
        let layout = KvLayout {
            num_kv_heads: 1,
            head_dim: dim,
            dtype,
        };
        let signs: Vec<f32> = random.floats(dim, 1.0).iter().map(|x| x.signum()).collect();
        let pages: Vec<(Vec<u8>, Vec<u8>)> = (1..=7)
            .map(|size| {
                let mut pages = page(&layout, random);
                let mut keys = Vec::new();
                for _ in 0..PAGE {
                    let some = 1 + random.below(dim);
                    let of = |(at, sign): (usize, &f32)| match at < some {
                        true => sign * size as f32,
                        false => 0.0,
                    };
                    keys.extend(signs.iter().enumerate().map(of));
                }
                layout.write_keys(&mut pages.0, 0, &keys, dim);
                pages
            })
            .collect();
        let tiles = context(&pages, PAGE as u8);
        let query: Vec<f32> = (0..queries * heads)
            .flat_map(|row| {
                signs
                    .iter()
                    .map(move |sign| sign / (1 + row % 3 % 2) as f32)
            })
            .collect();
        let parts = [Part {
            query: &query,
            tiles: Tiles::Shared(&tiles),
            mask: Mask::Causal,
            column_sums: false,
            alibi: None,
        }];
        let args = Attention {
            layout,
            num_heads: heads,
            queries,
            query_start: 7 * PAGE as u64 - queries as u64,
            scale: 0.125 * std::f32::consts::LN_2,
            softcap: None,
            row_exact: false,
            parts: &parts,
        };
        for level in Level::available() {
            let tolerance = if level == Level::Amx { 1.5e-2 } else { 2e-3 };
            assert_like_naive(level, &args, tolerance);
        }
        #[cfg(target_arch = "x86_64")]
        assert_tiles_like_naive(&args);
    }
}

#[test]
fn pages_read_back_what_was_written() {
    let random = &mut Random(11);
    for (dtype, tolerance) in [
        (KvDtype::F32, 0.0),
        (KvDtype::F16, 3e-4),
        (KvDtype::Bf16, 2e-3),
        (KvDtype::Int8, 4e-3),
    ] {
        for head_dim in [8, 10, 64, 80] {
            let layout = KvLayout {
                num_kv_heads: 2,
                head_dim,
                dtype,
            };
            let (mut keys, mut values) =
                (vec![0; layout.plane_bytes()], vec![0; layout.plane_bytes()]);
            let stride = 2 * head_dim + 5;
            // Rows may end with the last element instead of the last stride.
            let rows = random.floats(63 * stride + 2 * head_dim, 1.0);
            layout.write_keys(&mut keys, 0, &rows, stride);
            layout.write_values(&mut values, 0, &rows, stride);
            let (mut key, mut value) = (vec![0.0; head_dim], vec![0.0; head_dim]);
            for slot in 0..PAGE {
                for kv_head in 0..2 {
                    let row = &rows[slot * stride + kv_head * head_dim..][..head_dim];
                    layout.read_key(&keys, kv_head, slot, &mut key);
                    layout.read_value(&values, kv_head, slot, &mut value);
                    assert!(distance(&key, row) <= tolerance, "{dtype:?} key");
                    assert!(distance(&value, row) <= tolerance, "{dtype:?} value");
                }
            }
        }
    }
}

#[test]
fn contradicting_fields_are_named() {
    let layout = KvLayout {
        num_kv_heads: 2,
        head_dim: 16,
        dtype: KvDtype::F32,
    };
    let pages = vec![page(&layout, &mut Random(5))];
    let query = vec![0.0; 4 * 16];
    let tiles = context(&pages, 64);
    let bad = [Tile {
        lo: 9,
        hi: 70,
        ..tiles[0]
    }];
    let short = [Tile {
        values: &pages[0].1[1..],
        ..tiles[0]
    }];
    let lists = vec![tiles.clone(); 3];
    let complaint = |tiles: Tiles, query: &[f32], num_heads: usize, out_len: usize| {
        let parts = [Part {
            query,
            tiles,
            mask: Mask::All,
            column_sums: false,
            alibi: None,
        }];
        let args = Attention {
            layout,
            num_heads,
            queries: 1,
            query_start: 0,
            scale: 1.0,
            softcap: None,
            row_exact: false,
            parts: &parts,
        };
        args.check(out_len)
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default()
    };
    assert_eq!(complaint(Tiles::Shared(&tiles), &query, 4, 64), "");
    assert!(complaint(Tiles::Shared(&tiles), &query, 4, 63).contains("output is 63, expected 64"));
    assert!(complaint(Tiles::Shared(&tiles), &query[1..], 4, 64).contains("query is 63"));
    assert!(complaint(Tiles::Shared(&tiles), &query, 3, 48).contains("num_heads is 3"));
    assert!(complaint(Tiles::Shared(&tiles), &query, 0, 0).contains("num_heads is 0"));
    assert!(complaint(Tiles::Shared(&bad), &query, 4, 64).contains("valid slots 9..70"));
    assert!(complaint(Tiles::Shared(&short), &query, 4, 64).contains("V plane"));
    assert!(complaint(Tiles::PerKvHead(&lists), &query, 4, 64).contains("lists is 3, expected 2"));
    assert!(complaint(Tiles::PerQueryHead(&lists), &query, 4, 64).contains("expected 4"));
}

#[test]
fn one_slope_for_each_head() {
    let layout = KvLayout {
        num_kv_heads: 1,
        head_dim: 16,
        dtype: KvDtype::F32,
    };
    let pages = vec![page(&layout, &mut Random(5))];
    let (tiles, query) = (context(&pages, 64), vec![0.0; 2 * 16]);
    let attend = |slopes: &[f32], keys_at: Option<u64>| {
        let parts = [Part {
            query: &query,
            tiles: Tiles::Shared(&tiles),
            mask: Mask::Causal,
            column_sums: true,
            alibi: Some(Alibi {
                slopes,
                query: Place::Own,
                keys_at,
            }),
        }];
        let args = Attention {
            layout,
            num_heads: 2,
            queries: 1,
            query_start: 40,
            scale: 1.0,
            softcap: None,
            row_exact: false,
            parts: &parts,
        };
        args.check(32)?;
        let sums = attention(&args, &mut [0.0; 32]).column_sums;
        Ok::<_, AttentionError>(sums[0].clone().expect("asked for"))
    };
    // Without query, a head weighs keys by distance alone: e^-slope from one to the next.
    let sums = attend(&[0.0, 1.0], None).unwrap();
    assert!(distance(&sums[..41], &[1.0 / 41.0; 41]) <= 1e-6);
    let nearest = 1.0 - (-1f32).exp();
    for (back, sum) in sums[PAGE..PAGE + 41].iter().rev().enumerate() {
        assert!((sum - nearest * (-(back as f32)).exp()).abs() <= 1e-6);
    }
    // Keys in one place are weighed alike at any slope.
    let sums = attend(&[0.5, 1.0], Some(3)).unwrap();
    assert!(distance(&sums[PAGE..PAGE + 41], &[1.0 / 41.0; 41]) <= 1e-6);
    let error = attend(&[1.0], None).unwrap_err().to_string();
    assert!(
        error.contains("the number of ALiBi slopes is 1, expected 2"),
        "{error}"
    );
}
