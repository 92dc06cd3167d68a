//! Passes over a vocabulary: argmax, the k largest, exponentials and their sums.
//!
//! Each is written so that the compiler turns its inner loop into vector instructions, and gives the same
//! numbers on every machine, so that a seed means the same text everywhere.

/// Elements whose maximum or sum is taken at once.
const BLOCK: usize = 1024;
const LANES: usize = 16;

/// Place of the largest value, the first of equal ones; NaN is never largest. 0 if there is none.
pub fn argmax(values: &[f32]) -> usize {
    let mut best = f32::NEG_INFINITY;
    let mut block_of_best = None;
    for (index, block) in values.chunks(BLOCK).enumerate() {
        let largest = block_max(block);
        if largest > best {
            best = largest;
            block_of_best = Some(index);
        }
    }
    block_of_best.map_or(0, |index| {
        let start = index * BLOCK;
        let block = &values[start..values.len().min(start + BLOCK)];
        start + block.iter().position(|&v| v == best).unwrap_or(0)
    })
}

fn block_max(block: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = block.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            // Not f32::max: this form is one instruction and drops NaN.
            *lane = if value > *lane { value } else { *lane };
        }
    }
    lanes
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
}

/// The `k` largest values with their places, largest first, equal ones by place. NaN and -inf are left out.
///
/// One pass against a rising threshold, with a partial selection each time enough candidates have gathered.
pub fn top_k(values: &[f32], k: usize) -> Vec<(u32, f32)> {
    if k == 0 {
        return Vec::new();
    }
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let room = k.saturating_mul(2).clamp(256, values.len().max(256));
    let mut found: Vec<(u32, f32)> = Vec::with_capacity(room + LANES);
    let mut threshold = f32::NEG_INFINITY;
    for (index, chunk) in values.chunks(LANES).enumerate() {
        if !chunk
            .iter()
            .fold(false, |any, &value| any | (value > threshold))
        {
            continue;
        }
        for (offset, &value) in chunk.iter().enumerate() {
            if value > threshold {
                // Adding 0 makes -0 equal to 0 in the total order too.
                found.push(((index * LANES + offset) as u32, value + 0.0));
            }
        }
        if found.len() >= room && found.len() > k {
            let (_, kth, _) = found.select_nth_unstable_by(k - 1, order);
            // Later equal values have later places, so only larger ones can still get in.
            threshold = kth.1;
            found.truncate(k);
        }
    }
    if found.len() > k {
        found.select_nth_unstable_by(k - 1, order);
        found.truncate(k);
    }
    found.sort_unstable_by(order);
    found
}

/// e^x for x <= 0, within 2 units in the last place; 0 below -87 and for NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Adding this number rounds to a whole one in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    // Taylor's series on [-ln 2 / 2, ln 2 / 2].
    let mut p = 1.0 / 5040.0;
    for c in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = p * r + c;
    }
    let power = (shifted
        .to_bits()
        .wrapping_sub(ROUND.to_bits())
        .wrapping_add(127))
        << 23;
    if x >= -87.0 {
        p * f32::from_bits(power)
    } else {
        0.0
    }
}

/// Writes `weights[i] = exp((values[i] - max) / temperature)` and the sum of each block of them to `sums`.
pub fn weigh(
    values: &[f32],
    max: f32,
    temperature: f32,
    weights: &mut Vec<f32>,
    sums: &mut Vec<f64>,
) {
    weights.clear();
    weights.resize(values.len(), 0.0);
    sums.clear();
    for (values, weights) in values.chunks(BLOCK).zip(weights.chunks_mut(BLOCK)) {
        for (weight, &value) in weights.iter_mut().zip(values) {
            *weight = exp((value - max) / temperature);
        }
        sums.push(sum(weights));
    }
}

/// The place where the running sum of `weights` first exceeds `target`; `sums` as [`weigh`] writes them.
pub fn locate(weights: &[f32], sums: &[f64], mut target: f64) -> usize {
    for (index, (block, &sum)) in weights.chunks(BLOCK).zip(sums).enumerate() {
        if target < sum {
            return index * BLOCK + locate_in(block.iter().copied(), target);
        }
        target -= sum;
    }
    // Rounding carried the target past the end.
    weights
        .iter()
        .rposition(|&weight| weight > 0.0)
        .unwrap_or(0)
}

/// [`locate`] for a short list. If rounding carries the target past the end: the last positive weight.
pub fn locate_in(weights: impl Iterator<Item = f32>, target: f64) -> usize {
    let mut running = 0.0;
    let mut last = 0;
    for (index, weight) in weights.enumerate() {
        running += f64::from(weight);
        if weight > 0.0 {
            last = index;
        }
        if running > target {
            return index;
        }
    }
    last
}

fn sum(values: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest: f64 = chunks.remainder().iter().map(|&v| f64::from(v)).sum();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(value);
        }
    }
    lanes.iter().sum::<f64>() + rest
}

/// ln of the sum of e^value, for log probabilities. `max` is the largest value.
pub fn log_sum_exp(values: &[f32], max: f32) -> f32 {
    if !max.is_finite() {
        return max;
    }
    let mut weights = [0.0; BLOCK];
    let mut total = 0.0;
    for block in values.chunks(BLOCK) {
        for (weight, &value) in weights.iter_mut().zip(block) {
            *weight = exp(value - max);
        }
        total += sum(&weights[..block.len()]);
    }
    (f64::from(max) + total.ln()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Values with many ties, infinities and NaN.
    fn values(max: usize) -> impl Strategy<Value = Vec<f32>> {
        let value = prop_oneof![
            8 => (-20i32..20).prop_map(|v| v as f32 / 4.0),
            4 => -50.0f32..50.0,
            1 => Just(f32::NEG_INFINITY),
            1 => Just(f32::NAN),
            1 => Just(-0.0),
        ];
        prop::collection::vec(value, 0..max)
    }

    fn naive_top_k(values: &[f32], k: usize) -> Vec<(u32, f32)> {
        let mut all: Vec<(u32, f32)> = (0u32..).zip(values.iter().copied()).collect();
        all.retain(|(_, v)| *v > f32::NEG_INFINITY);
        all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
        all.truncate(k);
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn top_k_and_argmax_are_those_of_a_sort(values in values(3000), k in 0usize..600) {
            prop_assert_eq!(top_k(&values, k), naive_top_k(&values, k));
            let best = naive_top_k(&values, 1).first().map_or(0, |b| b.0 as usize);
            prop_assert_eq!(argmax(&values), best);
        }

        #[test]
        fn exp_is_that_of_f64(x in -87.0f32..=0.0) {
            let exact = f64::from(x).exp();
            prop_assert!((f64::from(exp(x)) / exact - 1.0).abs() < 2.4e-7, "{} {}", exp(x), exact);
        }

        #[test]
        fn log_sum_exp_is_that_of_f64(values in prop::collection::vec(-30.0f32..30.0, 1..3000)) {
            let exact = values.iter().map(|&v| f64::from(v).exp()).sum::<f64>().ln();
            let found = log_sum_exp(&values, values[argmax(&values)]);
            prop_assert!((f64::from(found) - exact).abs() < 1e-5, "{found} {exact}");
        }

        #[test]
        fn locate_finds_the_share(values in prop::collection::vec(-9.0f32..0.0, 1..3000), share in 0.0f64..1.0) {
            let (mut weights, mut sums) = (Vec::new(), Vec::new());
            weigh(&values, 0.0, 1.0, &mut weights, &mut sums);
            let target = share * sums.iter().sum::<f64>();
            let at = locate(&weights, &sums, target);
            let before: f64 = weights[..at].iter().map(|&w| f64::from(w)).sum();
            let slack = 1e-9 * values.len() as f64;
            prop_assert!(before <= target + slack && target <= before + f64::from(weights[at]) + slack);
        }
    }

    #[test]
    fn ends_of_exp() {
        assert_eq!((exp(0.0), exp(-0.0)), (1.0, 1.0));
        for x in [-87.1, -1e30, f32::NEG_INFINITY, f32::NAN] {
            assert_eq!(exp(x), 0.0, "{x}");
        }
    }

    #[test]
    fn rounding_never_lands_on_weight_zero() {
        let weights = [0.0, 0.5, 0.0];
        assert_eq!(locate(&weights, &[0.5], 0.5), 1);
        assert_eq!(locate_in(weights.into_iter(), 0.5), 1);
        assert_eq!(locate(&weights, &[0.5], 0.0), 1);
    }
}
