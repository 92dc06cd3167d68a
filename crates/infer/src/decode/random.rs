//! Randomness by position: the number for token `i` of a stream depends on nothing but seed, stream and `i`.
//!
//! A strategy that guesses ahead, rolls back or works in batches therefore draws the same number for the
//! same token as plain sampling does, and equal seeds give equal texts.

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) as a keyed function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CounterRng {
    seed: u64,
    stream: u64,
}

impl CounterRng {
    /// `seed`: the user's; `stream`: which sequence of a batch, so that siblings differ.
    pub fn new(seed: u64, stream: u64) -> CounterRng {
        CounterRng { seed, stream }
    }

    /// The uniform number in [0, 1) of token position `index`, with 53 random bits.
    pub fn uniform(&self, index: u64) -> f64 {
        let [a, b, _, _] = self.words(index);
        let bits = (u64::from(a) << 32 | u64::from(b)) >> 11;
        bits as f64 * (1.0 / (1u64 << 53) as f64)
    }

    fn words(&self, index: u64) -> [u32; 4] {
        let (low, high) = (|x: u64| x as u32, |x: u64| (x >> 32) as u32);
        philox(
            [low(index), high(index), low(self.stream), high(self.stream)],
            [low(self.seed), high(self.seed)],
        )
    }
}

/// Ten rounds of Philox4x32.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key[0] = key[0].wrapping_add(0x9E37_79B9);
            key[1] = key[1].wrapping_add(0xBB67_AE85);
        }
        let left = u64::from(counter[0]) * 0xD251_1F53;
        let right = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (right >> 32) as u32 ^ counter[1] ^ key[0],
            right as u32,
            (left >> 32) as u32 ^ counter[3] ^ key[1],
            left as u32,
        ];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the paper's authors publish with their library.
    #[test]
    fn known_answers() {
        assert_eq!(
            philox([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn uniform_in_range_and_even() {
        let rng = CounterRng::new(7, 3);
        let mut bins = [0u32; 16];
        for index in 0..16_000 {
            let u = rng.uniform(index);
            assert!((0.0..1.0).contains(&u));
            bins[(u * 16.0) as usize] += 1;
        }
        // Chi-square with 15 degrees of freedom: 37.7 is passed by one draw in a thousand.
        let chi: f64 = bins
            .iter()
            .map(|&n| (f64::from(n) - 1000.0).powi(2) / 1000.0)
            .sum();
        assert!(chi < 37.7, "{chi}");
    }

    #[test]
    fn seed_stream_and_index_all_matter() {
        let base = CounterRng::new(1, 2).uniform(3);
        assert_eq!(base, CounterRng::new(1, 2).uniform(3));
        assert_ne!(base, CounterRng::new(2, 2).uniform(3));
        assert_ne!(base, CounterRng::new(1, 3).uniform(3));
        assert_ne!(base, CounterRng::new(1, 2).uniform(4));
        assert_ne!(base, CounterRng::new(1 << 40 | 1, 2).uniform(3));
        assert_ne!(base, CounterRng::new(1, 1 << 40 | 2).uniform(3));
    }
}
