//! Every level and every type against the naive product, over ragged shapes.

use super::*;
use crate::quant::dequantize;
use crate::tile::emulated::Emulated;
use proptest::prelude::*;

/// Reproducible noise in `-1..1`.
pub(super) fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Blocks with random codes and tame scales.
pub(super) fn random_tensor(ty: GgmlType, elements: usize, seed: u64) -> Vec<u8> {
    let bytes = ty.bytes(elements).expect("whole blocks");
    match ty {
        GgmlType::F32 => noise(seed, elements)
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect(),
        GgmlType::F16 => noise(seed, elements)
            .iter()
            .flat_map(|&v| half::f16::from_f32(v).to_le_bytes())
            .collect(),
        GgmlType::BF16 => noise(seed, elements)
            .iter()
            .flat_map(|&v| half::bf16::from_f32(v).to_le_bytes())
            .collect(),
        _ => {
            let mut data: Vec<u8> = noise(seed, bytes)
                .iter()
                .map(|v| ((v + 1.0) * 128.0) as u8)
                .collect();
            let scales: &[usize] = match ty {
                GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4K | GgmlType::Q5K => &[0, 2],
                GgmlType::Q2K => &[80, 82],
                GgmlType::Q3K => &[108],
                GgmlType::Q6K => &[208],
                _ => &[0],
            };
            for (block, values) in data
                .chunks_mut(ty.block_bytes())
                .zip(noise(seed + 1, 2 * elements).chunks(2))
            {
                for (&at, value) in scales.iter().zip(values) {
                    let scale = half::f16::from_f32(value * 0.01).to_le_bytes();
                    block[at..at + 2].copy_from_slice(&scale);
                }
            }
            data
        }
    }
}

pub(super) fn weights(ty: GgmlType, elements: usize, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; elements];
    dequantize(ty, bytes, &mut out).expect("whole blocks");
    out
}

/// The largest error allowed for one output, given the weights as they are packed:
/// f32 sums of up to a few hundred terms (2^-18 of `sum |x| |w|`) and activations rounded to
/// 2^-16 of their group's largest, whose share of the whole row's largest is unknown here.
fn tolerance(x: &[f32], w: &[f32]) -> f32 {
    let total: f32 = x.iter().zip(w).map(|(x, w)| (x * w).abs()).sum();
    let largest = x.iter().fold(0.0f32, |a, x| a.max(x.abs()));
    let weights: f32 = w.iter().map(|w| w.abs()).sum();
    total * 2f32.powi(-18) + largest * weights * 2f32.powi(-16) + 1e-6
}

/// The same on bf16 tiles: each factor is rounded by at most 2^-9 of itself, a product by 2^-8
/// and a little; f32 sums add 2^-18 as above.
fn tile_tolerance(x: &[f32], w: &[f32]) -> f32 {
    let total: f32 = x.iter().zip(w).map(|(x, w)| (x * w).abs()).sum();
    total * (2f32.powi(-8) + 2f32.powi(-16)) + 1e-6
}

/// The same with 16-bit integers on both sides: a weight is rounded to 2^-14 of its bound, at most
/// twice the largest weight here; an activation to 2^-13 of its row's largest at worst.
fn word_tolerance(x: &[f32], w: &[f32]) -> f32 {
    let size = |values: &[f32]| values.iter().map(|value| value.abs()).sum::<f32>();
    let top = |values: &[f32]| values.iter().fold(0.0f32, |a, value| a.max(value.abs()));
    let rounding = size(x) * top(w) + top(x) * size(w);
    tolerance(x, w) + rounding * 2f32.powi(-13)
}

/// One way to compute a product.
type Product = fn(&PackedMatrix, &[f32], usize, &mut [f32], Epilogue<'_>);

const LEVELS: [(Level, Product); 4] = [
    (Level::Portable, |w, x, m, out, how| {
        w.matmul_at(Level::Portable, x, m, out, how)
    }),
    (Level::Avx2, |w, x, m, out, how| {
        w.matmul_at(Level::Avx2, x, m, out, how)
    }),
    (Level::Avx512, |w, x, m, out, how| {
        w.matmul_at(Level::Avx512, x, m, out, how)
    }),
    (Level::Amx, |w, x, m, out, how| {
        w.matmul_at(Level::Amx, x, m, out, how)
    }),
];

/// What an error may come from.
type Tolerance = fn(&[f32], &[f32]) -> f32;

/// 16-bit integers, whatever the number of rows.
fn word_products() -> Vec<(&'static str, Product)> {
    let mut products: Vec<(&str, Product)> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    if Level::detected() >= Level::Avx512 {
        products.push(("words", |w, x, m, out, how| {
            // SAFETY: the level was checked.
            unsafe { words::run(w, x, m, out, how) }
        }));
    }
    products
}

/// The tile path on the emulated unit, with every way to fill tiles that this CPU has.
fn tile_products() -> Vec<(&'static str, Product)> {
    let mut products: Vec<(&str, Product)> = vec![("plain tiles", |w, x, m, out, how| {
        // SAFETY: any CPU has what these are made of.
        unsafe { amx::product::<Emulated, amx::Plain>(w, x, m, out, how) }
    })];
    #[cfg(target_arch = "x86_64")]
    if Level::detected() >= Level::Avx512 {
        products.push(("tiles", |w, x, m, out, how| {
            // SAFETY: the level was checked.
            unsafe { amx::product::<Emulated, amx::Avx512>(w, x, m, out, how) }
        }));
    }
    products
}

fn check(cols: usize, parts: &[(GgmlType, usize)], m: usize, seed: u64) {
    let tensors: Vec<Vec<u8>> = parts
        .iter()
        .enumerate()
        .map(|(i, &(ty, rows))| random_tensor(ty, rows * cols, seed + 7 * i as u64))
        .collect();
    let sources: Vec<MatrixSource> = parts
        .iter()
        .zip(&tensors)
        .map(|(&(ty, rows), bytes)| MatrixSource { ty, rows, bytes })
        .collect();
    let matrix = PackedMatrix::pack(cols, &sources).expect("well formed");
    let rows = matrix.rows();
    assert_eq!(rows, parts.iter().map(|part| part.1).sum::<usize>());
    let types: Vec<GgmlType> = parts
        .iter()
        .flat_map(|&(ty, rows)| std::iter::repeat_n(ty, rows))
        .collect();
    let w: Vec<f32> = parts
        .iter()
        .zip(&tensors)
        .flat_map(|(&(ty, rows), bytes)| weights(ty, rows * cols, bytes))
        .collect();

    let mut packed = vec![0.0; rows * cols];
    for (row, found) in packed.chunks_mut(cols).enumerate() {
        matrix.dequantize_row(row, found);
        let expected = &w[row * cols..][..cols];
        let spread = expected.iter().fold(0.0f32, |a, w| a.max(w.abs()));
        for (found, expected) in found.iter().zip(expected) {
            let allowed = match types[row].block_elements() {
                1 => expected.abs() * 2f32.powi(-8),
                256 => spread * 2f32.powi(-9),
                _ => spread * 2f32.powi(-22), // `d u + m` may be fused or not
            };
            assert!(
                (found - expected).abs() <= allowed,
                "{:?}: {found} {expected}",
                types[row]
            );
        }
    }

    let x: Vec<f32> = noise(seed + 99, m * cols)
        .iter()
        .map(|v| v * v * v * 3.0)
        .collect();
    let bias = noise(seed + 98, rows);
    let start = noise(seed + 97, m * rows);
    let mut expected = vec![0.0; m * rows];
    matmul_naive(&packed, rows, cols, &x, m, &mut expected);
    let mut ways: Vec<(&str, Product, Tolerance)> = Vec::new();
    for (name, product) in tile_products() {
        ways.push((name, product, tile_tolerance));
    }
    for (name, product) in word_products() {
        ways.push((name, product, word_tolerance));
    }
    for (level, product) in LEVELS {
        let tolerance: Tolerance = match level {
            Level::Amx if m >= amx::MIN_ROWS => tile_tolerance,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 if m >= words::MIN_ROWS => word_tolerance,
            _ => tolerance,
        };
        if level <= Level::detected() {
            ways.push((level.name(), product, tolerance));
        }
    }
    for (name, product, tolerance) in ways {
        for (with_bias, accumulate) in [(false, false), (true, false), (false, true), (true, true)]
        {
            let epilogue = Epilogue {
                bias: with_bias.then_some(&bias[..]),
                accumulate,
                gate: None,
            };
            let mut out = start.clone();
            product(&matrix, &x, m, &mut out, epilogue);
            for (index, &found) in out.iter().enumerate() {
                let (r, row) = (index / rows, index % rows);
                let mut expected = expected[index];
                expected += if with_bias { bias[row] } else { 0.0 };
                expected += if accumulate { start[index] } else { 0.0 };
                let (x, w) = (&x[r * cols..][..cols], &packed[row * cols..][..cols]);
                let allowed = tolerance(x, w);
                assert!(
                    (found - expected).abs() <= allowed,
                    "{name} {:?} [{m}, {cols}] x [{rows}] at ({r}, {row}): {found}, not {expected} within {allowed}",
                    types[row],
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    #[test]
    fn every_type_and_level_matches_the_naive_product(
        m in 1usize..40, rows in 1usize..70, blocks in 1usize..4, seed in 0u64..1000,
    ) {
        for ty in GgmlType::ALL {
            let unit = match ty.block_elements() { 1 => 21, 32 => 96, elements => elements };
            check(unit * blocks, &[(ty, rows)], m, seed);
        }
    }

    #[test]
    fn parts_of_different_types_stack(m in 1usize..20, seed in 0u64..1000) {
        check(
            256,
            &[(GgmlType::Q5_0, 33), (GgmlType::Q8_0, 16), (GgmlType::Q6K, 7), (GgmlType::F16, 5)],
            m,
            seed,
        );
    }
}

#[test]
fn one_row_and_whole_blocks_of_rows() {
    for m in [1, 2, 8, 9, 16, 17, 32, 33] {
        check(576, &[(GgmlType::Q4_1, 48)], m, 5);
    }
}

#[test]
fn up_to_some_number_rows_are_what_each_is_alone_bit_for_bit() {
    let (rows, cols) = (37, 512);
    for (seed, ty) in GgmlType::ALL.into_iter().enumerate() {
        let bytes = random_tensor(ty, rows * cols, seed as u64);
        let bytes = &bytes;
        let matrix = PackedMatrix::pack(cols, &[MatrixSource { ty, rows, bytes }]).expect("fits");
        for level in Level::available() {
            for m in [2, 3, 5, 7, 12, 16, 17, 31, 95] {
                if m > independent_rows_at(level) {
                    continue;
                }
                let x = noise(seed as u64 + 50, m * cols);
                let mut together = vec![0.0; m * rows];
                matrix.matmul_at(level, &x, m, &mut together, Epilogue::default());
                for (r, (x, found)) in x.chunks(cols).zip(together.chunks(rows)).enumerate() {
                    let mut alone = vec![0.0; rows];
                    matrix.matmul_at(level, x, 1, &mut alone, Epilogue::default());
                    let what = format!("{} {ty:?}: row {r} of {m}", level.name());
                    assert!(found == alone, "{what}");
                }
            }
        }
    }
}

/// A gated product is the activation of the plain product's first half times the second, fused or
/// not, with halves of different types too.
#[test]
fn gates() {
    let both = [
        (576, 37, [(GgmlType::Q4_1, 48); 2]),
        (640, 33, [(GgmlType::Q5_0, 32), (GgmlType::Q8_0, 32)]),
        (1088, 70, [(GgmlType::BF16, 80); 2]),
        (64, 5, [(GgmlType::Q8_0, 21); 2]),
        (256, 64, [(GgmlType::Q6K, 21); 2]),
    ];
    for (cols, m, parts) in both {
        let tensors = parts.map(|(ty, rows)| random_tensor(ty, rows * cols, 17));
        let sources = [0, 1].map(|i| MatrixSource {
            ty: parts[i].0,
            rows: parts[i].1,
            bytes: &tensors[i],
        });
        let matrix = PackedMatrix::pack(cols, &sources).expect("well formed");
        let (rows, width) = (matrix.rows(), parts[0].1);
        let (x, bias) = (noise(3, m * cols), noise(4, rows));
        let mut ways: Vec<(&str, Product)> = Vec::new();
        for (level, product) in LEVELS {
            if level <= Level::detected() {
                ways.push((level.name(), product));
            }
        }
        if amx::pairs_gates(&matrix) {
            ways.extend(tile_products());
        }
        for (name, product) in ways {
            for gate in [Gate::Silu, Gate::GeluTanh] {
                for bias in [None, Some(&bias[..])] {
                    let how = |gate| Epilogue {
                        bias,
                        accumulate: false,
                        gate,
                    };
                    let (mut plain, mut gated) = (vec![0.0; m * rows], vec![f32::NAN; m * width]);
                    product(&matrix, &x, m, &mut plain, how(None));
                    product(&matrix, &x, m, &mut gated, how(Some(gate)));
                    for (at, &found) in gated.iter().enumerate() {
                        let row = &plain[at / width * rows..][..rows];
                        let column = at % width;
                        let expected = gate.apply(row[column]) * row[width + column];
                        assert!(
                            (found - expected).abs() <= 1e-5 * expected.abs().max(1e-3),
                            "{name} {gate:?} at {at}: {found}, not {expected}"
                        );
                    }
                }
            }
        }
    }
}

/// An MLP is its two products one after the other, whichever way the middle is kept.
#[test]
fn mlps() {
    for (cols, width, m) in [
        (576, 96, 40),
        (64, 32, 33),
        (96, 160, 35),
        (1088, 160, 70),
        (64, 64, 3),
    ] {
        let (ty, down_ty) = (GgmlType::Q4_1, GgmlType::Q8_0);
        let up = random_tensor(ty, 2 * width * cols, 23);
        let last = random_tensor(down_ty, 50 * width, 24);
        let pack = |ty, rows, cols, bytes: &[u8]| {
            PackedMatrix::pack(cols, &[MatrixSource { ty, rows, bytes }]).expect("well formed")
        };
        let gate_up = pack(ty, 2 * width, cols, &up);
        let down = pack(down_ty, 50, width, &last);
        let (x, start) = (noise(3, m * cols), noise(4, m * 50));
        let how = |accumulate, gate| Epilogue {
            bias: None,
            accumulate,
            gate,
        };
        let gate = Some(Gate::Silu);
        let (mut hidden, mut expected) = (vec![0.0; m * width], start.clone());
        gate_up.matmul_at(Level::Portable, &x, m, &mut hidden, how(false, gate));
        down.matmul_at(Level::Portable, &hidden, m, &mut expected, how(true, None));
        let size = hidden.iter().fold(0.0f32, |a, x| a.max(x.abs()));
        let close = |found: &[f32], allowed: f32, name: &str| {
            for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert!(
                    (found - expected).abs() <= allowed,
                    "{name} at {at}: {found}, not {expected}"
                );
            }
        };
        let weights = largest_row(&down);
        for level in Level::available() {
            let mut out = start.clone();
            gate_up.mlp_at(
                level,
                how(false, gate),
                (&down, how(true, None)),
                &x,
                m,
                &mut out,
            );
            let allowed = if level >= Level::Avx512 {
                2f32.powi(-6)
            } else {
                2f32.powi(-12)
            };
            close(&out, size * weights * allowed, level.name());
        }
        if amx::pairs_gates(&gate_up) {
            let mut out = start.clone();
            // SAFETY: any CPU has what these are made of.
            unsafe {
                let (first, second) = ((&gate_up, how(false, gate)), (&down, how(true, None)));
                amx::mlp::<Emulated, amx::Plain>(first, second, &x, m, &mut out);
            }
            close(&out, size * weights * 2f32.powi(-6), "plain tiles");
            #[cfg(target_arch = "x86_64")]
            if Level::detected() >= Level::Avx512 {
                let mut same = start.clone();
                // SAFETY: the level was checked.
                unsafe {
                    let (first, second) = ((&gate_up, how(false, gate)), (&down, how(true, None)));
                    amx::mlp::<Emulated, amx::Avx512>(first, second, &x, m, &mut same);
                }
                close(&same, size * weights * 2f32.powi(-6), "tiles");
            }
        }
    }
}

/// The largest sum of `|w|` of a row.
fn largest_row(matrix: &PackedMatrix) -> f32 {
    let mut row = vec![0.0; matrix.cols()];
    let sums = (0..matrix.rows()).map(|r| {
        matrix.dequantize_row(r, &mut row);
        row.iter().map(|w| w.abs()).sum::<f32>()
    });
    sums.fold(0.0, f32::max)
}

/// Past the ends of a unit's rows, panels and slab, where several units share the rows.
#[test]
fn many_rows() {
    check(1088, &[(GgmlType::Q5_0, 70), (GgmlType::BF16, 30)], 130, 3);
    check(256, &[(GgmlType::Q6K, 21), (GgmlType::Q4K, 50)], 1030, 4);
    check(64, &[(GgmlType::Q8_0, 700)], 300, 5);
}

/// With both sides rounded beforehand, only the f32 sums are left to differ. The types are those
/// whose weights are exact in f32 before they are rounded, whatever the order of operations.
/// The shapes pass the ends of a unit's rows, panels and depth.
#[test]
fn tiles_round_the_factors_and_nothing_else() {
    let round = |values: &mut [f32]| {
        for value in values {
            *value = half::bf16::from_f32(*value).to_f32();
        }
    };
    for (ty, m, rows, cols) in [
        (GgmlType::Q4_0, 1056 + 17, 20, 64),
        (GgmlType::Q5_0, 33, 16 * 19 + 3, 96),
        (GgmlType::Q8_0, 48, 40, 1056),
        (GgmlType::Q3K, 40, 33, 768),
        (GgmlType::Q6K, 50, 17, 1280),
        (GgmlType::BF16, 37, 50, 1041),
    ] {
        let bytes = random_tensor(ty, rows * cols, 11);
        let source = MatrixSource {
            ty,
            rows,
            bytes: &bytes,
        };
        let matrix = PackedMatrix::pack(cols, &[source]).unwrap();
        let mut w = vec![0.0; rows * cols];
        for (row, w) in w.chunks_mut(cols).enumerate() {
            matrix.dequantize_row(row, w);
        }
        let mut x = noise(5, m * cols);
        let original = x.clone();
        round(&mut w);
        round(&mut x);
        let mut expected = vec![0.0; m * rows];
        matmul_naive(&w, rows, cols, &x, m, &mut expected);
        for (name, product) in tile_products() {
            let mut out = vec![f32::NAN; m * rows];
            product(&matrix, &original, m, &mut out, Epilogue::default());
            for (index, (found, expected)) in out.iter().zip(&expected).enumerate() {
                let (x, w) = (&x[index / rows * cols..], &w[index % rows * cols..][..cols]);
                let total: f32 = x.iter().zip(w).map(|(x, w)| (x * w).abs()).sum();
                assert!(
                    (found - expected).abs() <= total * 2f32.powi(-18),
                    "{name} {ty:?} at {index}: {found}, not {expected}"
                );
            }
        }
    }
}

#[test]
fn a_group_that_is_not_finite_spoils_its_row_alone() {
    let bytes = random_tensor(GgmlType::Q4_0, 32 * 64, 3);
    let source = MatrixSource {
        ty: GgmlType::Q4_0,
        rows: 32,
        bytes: &bytes,
    };
    let matrix = PackedMatrix::pack(64, &[source]).unwrap();
    let products = LEVELS
        .into_iter()
        .filter(|(level, _)| *level <= Level::detected())
        .map(|(level, product)| (level.name(), product));
    for (name, product) in products.chain(tile_products()) {
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = noise(1, 3 * 64);
            x[64 + 40] = poison;
            let mut out = vec![0.0; 3 * 32];
            product(&matrix, &x, 3, &mut out, Epilogue::default());
            assert!(out[32..64].iter().all(|v| !v.is_finite()), "{name}");
            assert!(out[..32].iter().chain(&out[64..]).all(|v| v.is_finite()));
        }
    }
}

#[test]
fn quantised_types_take_little_more_than_a_byte() {
    for (ty, limit) in [
        (GgmlType::Q4_0, 0.6),
        (GgmlType::Q4_1, 0.66),
        (GgmlType::Q4K, 0.66),
        (GgmlType::Q5_0, 0.72),
        (GgmlType::Q5K, 0.78),
        (GgmlType::Q6K, 0.91),
        (GgmlType::Q8_0, 1.1),
    ] {
        let bytes = vec![0; ty.bytes(512 * 512).unwrap()];
        let source = MatrixSource {
            ty,
            rows: 512,
            bytes: &bytes,
        };
        let matrix = PackedMatrix::pack(512, &[source]).unwrap();
        let ratio = matrix.bytes() as f64 / (512.0 * 512.0);
        assert!(ratio < limit, "{}: {ratio} bytes a parameter", ty.name());
    }
}

#[test]
fn errors_name_the_part_and_the_sizes() {
    let source = MatrixSource {
        ty: GgmlType::Q4_0,
        rows: 2,
        bytes: &[0; 36],
    };
    assert!(PackedMatrix::pack(32, &[source]).is_ok());
    let found = PackedMatrix::pack(64, &[source]).unwrap_err();
    assert_eq!(
        found.to_string(),
        "part 0: [2, 64] of type Q4_0 takes 72 bytes but 36 were given; the file may be cut short"
    );
    let found = PackedMatrix::pack(33, &[source]).unwrap_err();
    assert!(
        matches!(
            found,
            PackError::PartialBlock {
                part: 0,
                cols: 33,
                ..
            }
        ),
        "{found}"
    );
    assert!(matches!(
        PackedMatrix::pack(32, &[]),
        Err(PackError::Empty { .. })
    ));
    let huge = MatrixSource {
        ty: GgmlType::F32,
        rows: usize::MAX / 8,
        bytes: &[],
    };
    assert!(matches!(
        PackedMatrix::pack(32, &[huge]),
        Err(PackError::TooLarge { part: 0, .. })
    ));
}
