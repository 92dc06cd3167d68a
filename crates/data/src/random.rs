//! Random numbers for data and initial weights: small, seeded, the same on every machine.
//!
//! A generator is named by a seed and a key ("which purpose"), so that two purposes never share a stream and adding
//! one draws nothing from another. Its whole state is one number, which is what a checkpoint keeps.

/// SplitMix64 (Steele, Lea, Flood 2014): a counter and a mixing function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Random {
    state: u64,
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Random {
    /// The stream of this seed and purpose.
    pub fn new(seed: u64, key: &str) -> Self {
        // FNV-1a of the key, mixed with the seed.
        let hash = key.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        Random {
            state: mix(seed.wrapping_add(0x9E37_79B9_7F4A_7C15)) ^ mix(hash),
        }
    }

    /// A generator at a state that [`state`](Self::state) returned.
    pub fn from_state(state: u64) -> Self {
        Random { state }
    }

    /// The whole state.
    pub fn state(&self) -> u64 {
        self.state
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.state)
    }

    /// Uniform in [0, 1), 53 random bits.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in low..high.
    pub fn range(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform()
    }

    /// Uniform in 0..n without bias (0 when n is 0).
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 {
            return 0;
        }
        // Values at or above the largest multiple of n would favour small results.
        let limit = u64::MAX - (u64::MAX % n + 1) % n;
        loop {
            let bits = self.bits();
            if bits <= limit {
                return bits % n;
            }
        }
    }

    /// Uniform among low..=high.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below((high.saturating_sub(low) + 1) as u64) as usize
    }

    /// Standard normal (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Puts a list in random order.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            list.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_repeat_differ_and_resume() {
        let draw = |mut r: Random| (0..8).map(|_| r.bits()).collect::<Vec<_>>();
        assert_eq!(draw(Random::new(1, "a")), draw(Random::new(1, "a")));
        assert_ne!(draw(Random::new(1, "a")), draw(Random::new(1, "b")));
        assert_ne!(draw(Random::new(1, "a")), draw(Random::new(2, "a")));
        let mut r = Random::new(3, "x");
        r.normal();
        assert_eq!(draw(Random::from_state(r.state())), draw(r));
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let mut r = Random::new(7, "moments");
        let n = 200_000;
        let (mut sum, mut squares, mut uniform) = (0.0, 0.0, 0.0);
        let mut counts = [0usize; 7];
        for _ in 0..n {
            let x = r.normal();
            sum += x;
            squares += x * x;
            uniform += r.uniform();
            counts[r.below(7) as usize] += 1;
        }
        assert!((sum / n as f64).abs() < 0.01);
        assert!((squares / n as f64 - 1.0).abs() < 0.02);
        assert!((uniform / n as f64 - 0.5).abs() < 0.005);
        for count in counts {
            assert!((count as f64 / n as f64 - 1.0 / 7.0).abs() < 0.005);
        }
    }
}
