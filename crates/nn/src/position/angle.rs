//! Cosine and sine of many angles at once: a loop the compiler turns into vector code.
//!
//! The library's own functions take one angle at a time, which is felt when each token of a long text
//! needs a row of them. Results are within 1e-11 of the true values, far below what f32 can hold.

use std::f64::consts::FRAC_2_PI;

/// Beyond this angle the quarter turns are no longer counted exactly; the library's functions take over.
const FARTHEST: f64 = (1u64 << 30) as f64;
/// Adding and subtracting it rounds to a whole number, which its low bits then hold.
const ROUND: f64 = 1.5 * (1u64 << 52) as f64;
/// A quarter turn in three parts, the first two short enough that a count times them is exact.
const QUARTER: [f64; 3] = [
    1.570796012878418,
    3.139164164167596e-7,
    6.223372171896613e-14,
];

/// Writes `factor` times cosine and sine of `position * freq` for each frequency.
pub(super) fn cos_sin(
    inv_freq: &[f32],
    position: f64,
    factor: f64,
    cos: &mut [f32],
    sin: &mut [f32],
) {
    let largest = inv_freq
        .iter()
        .fold(0f32, |most, freq| most.max(freq.abs()));
    // Written so that a position that is not a number goes to the library as well.
    let near = (position * f64::from(largest)).abs() <= FARTHEST;
    let rows = inv_freq.iter().zip(cos).zip(sin);
    if near {
        for ((freq, cos), sin) in rows {
            let (c, s) = near_cos_sin(position * f64::from(*freq));
            (*cos, *sin) = ((c * factor) as f32, (s * factor) as f32);
        }
    } else {
        for ((freq, cos), sin) in rows {
            let (s, c) = (position * f64::from(*freq)).sin_cos();
            (*cos, *sin) = ((c * factor) as f32, (s * factor) as f32);
        }
    }
}

/// Cosine and sine of an angle of at most [`FARTHEST`], free of branches.
#[inline(always)]
fn near_cos_sin(angle: f64) -> (f64, f64) {
    let shifted = angle * FRAC_2_PI + ROUND;
    let quarters = shifted - ROUND;
    let turn = shifted.to_bits();
    let rest = ((angle - quarters * QUARTER[0]) - quarters * QUARTER[1]) - quarters * QUARTER[2];

    // Taylor series on at most an eighth turn; the first terms left out are below 1e-11.
    let z = rest * rest;
    let series = |terms: [f64; 6]| terms.iter().rev().fold(0.0, |sum, term| sum * z + term);
    let sine = rest
        * series([
            1.0,
            -1.0 / 6.0,
            1.0 / 120.0,
            -1.0 / 5_040.0,
            1.0 / 362_880.0,
            -1.0 / 39_916_800.0,
        ]);
    let cosine = 1.0
        + z * series([
            -0.5,
            1.0 / 24.0,
            -1.0 / 720.0,
            1.0 / 40_320.0,
            -1.0 / 3_628_800.0,
            1.0 / 479_001_600.0,
        ]);

    // An odd number of quarter turns swaps the two; the second bit flips a sign.
    let swap = (turn & 1).wrapping_neg();
    let (s, c) = (sine.to_bits(), cosine.to_bits());
    let flip_sine = (turn & 2) << 62;
    let flip_cosine = (turn.wrapping_add(1) & 2) << 62;
    (
        f64::from_bits(((c & !swap) | (s & swap)) ^ flip_cosine),
        f64::from_bits(((s & !swap) | (c & swap)) ^ flip_sine),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn agrees_with_the_library(scale in 0u32..31, part in -1.0..1.0f64) {
            let angle = part * f64::from(scale).exp2();
            let (cos, sin) = near_cos_sin(angle);
            prop_assert!((cos - angle.cos()).abs() <= 2e-11);
            prop_assert!((sin - angle.sin()).abs() <= 2e-11);
        }
    }

    #[test]
    fn agrees_on_the_borders_of_the_quarters() {
        for quarter in -40i32..40 {
            for step in [-1e-9, 0.0, 1e-9] {
                let angle = f64::from(quarter) * std::f64::consts::FRAC_PI_4 + step;
                let (cos, sin) = near_cos_sin(angle);
                assert!((cos - angle.cos()).abs() <= 2e-11, "cosine of {angle}");
                assert!((sin - angle.sin()).abs() <= 2e-11, "sine of {angle}");
            }
        }
        assert_eq!(near_cos_sin(0.0), (1.0, 0.0));
    }

    #[test]
    fn very_far_positions_use_the_library() {
        let position = 3e12;
        let (mut cos, mut sin) = ([0.0; 2], [0.0; 2]);
        cos_sin(&[1.0, 0.5], position, 2.0, &mut cos, &mut sin);
        assert_eq!(cos[0], (2.0 * position.cos()) as f32);
        assert_eq!(sin[1], (2.0 * (0.5 * position).sin()) as f32);
    }
}
