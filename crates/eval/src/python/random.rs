//! The random streams of CPython's `random` and of numpy's legacy `RandomState`, call for call. For generators
//! whose published data was made in Python and must come out byte for byte.

use std::collections::HashSet;

use sha2::{Digest, Sha512};

const N: usize = 624;
const M: usize = 397;

/// The Mersenne Twister (MT19937), which both share.
#[derive(Clone)]
struct Twister {
    state: [u32; N],
    index: usize,
}

impl Twister {
    fn from_word(seed: u32) -> Self {
        let mut state = [0; N];
        state[0] = seed;
        for i in 1..N {
            let last: u32 = state[i - 1];
            state[i] = 1_812_433_253u32
                .wrapping_mul(last ^ (last >> 30))
                .wrapping_add(i as u32);
        }
        Twister { state, index: N }
    }

    /// `init_by_array`.
    fn from_words(key: &[u32]) -> Self {
        let mut twister = Twister::from_word(19_650_218);
        let state = &mut twister.state;
        let (mut i, mut j) = (1, 0);
        for _ in 0..N.max(key.len()) {
            let last = state[i - 1];
            state[i] = (state[i] ^ (last ^ (last >> 30)).wrapping_mul(1_664_525))
                .wrapping_add(key[j])
                .wrapping_add(j as u32);
            i += 1;
            j = (j + 1) % key.len();
            if i >= N {
                state[0] = state[N - 1];
                i = 1;
            }
        }
        for _ in 0..N - 1 {
            let last = state[i - 1];
            state[i] = (state[i] ^ (last ^ (last >> 30)).wrapping_mul(1_566_083_941))
                .wrapping_sub(i as u32);
            i += 1;
            if i >= N {
                state[0] = state[N - 1];
                i = 1;
            }
        }
        state[0] = 0x8000_0000;
        twister
    }

    fn next(&mut self) -> u32 {
        if self.index >= N {
            for i in 0..N {
                let joined =
                    (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
                let odd = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + M) % N] ^ (joined >> 1) ^ odd;
            }
            self.index = 0;
        }
        let mut y = self.state[self.index];
        self.index += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// Uniform in [0, 1) with 53 bits.
    fn double(&mut self) -> f64 {
        let (a, b) = (self.next() >> 5, self.next() >> 6);
        (f64::from(a) * 67_108_864.0 + f64::from(b)) / 9_007_199_254_740_992.0
    }
}

/// `random.Random`.
#[derive(Clone)]
pub struct Random {
    twister: Twister,
}

impl Random {
    /// `Random(seed)` with an integer; the sign is dropped, as CPython does.
    pub fn new(seed: i64) -> Self {
        let seed = seed.unsigned_abs();
        let (low, high) = (seed as u32, (seed >> 32) as u32);
        let key: &[u32] = if high == 0 { &[low] } else { &[low, high] };
        Random {
            twister: Twister::from_words(key),
        }
    }

    /// `Random(seed)` with a string: the text followed by its SHA-512, read as one big-endian integer.
    pub fn from_text(seed: &str) -> Self {
        let mut bytes = seed.as_bytes().to_vec();
        bytes.extend_from_slice(&Sha512::digest(seed.as_bytes()));
        let mut key: Vec<u32> = bytes
            .rchunks(4)
            .map(|chunk| {
                chunk
                    .iter()
                    .fold(0, |word, &byte| (word << 8) | u32::from(byte))
            })
            .collect();
        while key.len() > 1 && key.last() == Some(&0) {
            key.pop();
        }
        Random {
            twister: Twister::from_words(&key),
        }
    }

    /// `random()`: uniform in [0, 1).
    pub fn random(&mut self) -> f64 {
        self.twister.double()
    }

    /// `getrandbits(bits)` for at most 128 bits (more are cut to 128); 0 bits draw nothing.
    pub fn getrandbits(&mut self, bits: u32) -> u128 {
        let bits = bits.min(128);
        let mut value = 0;
        let mut done = 0;
        while done < bits {
            let left = bits - done;
            let mut word = self.twister.next();
            if left < 32 {
                word >>= 32 - left;
            }
            value |= u128::from(word) << done;
            done += 32;
        }
        value
    }

    /// `_randbelow(n)`: uniform in 0..n by redrawing. 0 for n = 0, where Python raises.
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 {
            return 0;
        }
        let bits = u64::BITS - n.leading_zeros();
        loop {
            let value = self.getrandbits(bits) as u64;
            if value < n {
                return value;
            }
        }
    }

    fn index(&mut self, n: usize) -> usize {
        self.below(n as u64) as usize
    }

    /// `randint(low, high)`, both ends included; `low` where the range is empty, where Python raises.
    pub fn randint(&mut self, low: i64, high: i64) -> i64 {
        if high < low {
            return low;
        }
        let width = high.wrapping_sub(low) as u64;
        low.wrapping_add(self.below(width.saturating_add(1)) as i64)
    }

    /// `randrange(low, high, step)` with a positive step; `low` where the range is empty.
    pub fn randrange(&mut self, low: i64, high: i64, step: u64) -> i64 {
        if high <= low || step == 0 {
            return low;
        }
        let width = high.wrapping_sub(low) as u64;
        let steps = width.div_ceil(step);
        low.wrapping_add((self.below(steps) * step) as i64)
    }

    /// `uniform(low, high)`.
    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.random()
    }

    /// `choice(list)`; `None` where the list is empty.
    pub fn choice<'a, T>(&mut self, list: &'a [T]) -> Option<&'a T> {
        if list.is_empty() {
            return None;
        }
        Some(&list[self.index(list.len())])
    }

    /// `choices(list, k=count)` without weights; empty for an empty list.
    pub fn choices<'a, T>(&mut self, list: &'a [T], count: usize) -> Vec<&'a T> {
        if list.is_empty() {
            return Vec::new();
        }
        let n = list.len() as f64;
        (0..count)
            .map(|_| &list[(self.random() * n) as usize])
            .collect()
    }

    /// `shuffle(list)`.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            let j = self.index(i + 1);
            list.swap(i, j);
        }
    }

    /// `sample(range(n), count)`; `count` above `n` is cut to `n`, where Python raises.
    pub fn sample_indices(&mut self, n: usize, count: usize) -> Vec<usize> {
        let count = count.min(n);
        let mut set_size = 21;
        if count > 5 {
            let log = ((count * 3) as f64).ln() / 4f64.ln();
            set_size += 4usize.pow(log.ceil() as u32);
        }
        let mut result = Vec::with_capacity(count);
        if n <= set_size {
            let mut pool: Vec<usize> = (0..n).collect();
            for i in 0..count {
                let j = self.index(n - i);
                result.push(pool[j]);
                pool[j] = pool[n - i - 1];
            }
        } else {
            let mut seen = HashSet::with_capacity(count);
            for _ in 0..count {
                let mut j = self.index(n);
                while !seen.insert(j) {
                    j = self.index(n);
                }
                result.push(j);
            }
        }
        result
    }

    /// `sample(list, count)`.
    pub fn sample<'a, T>(&mut self, list: &'a [T], count: usize) -> Vec<&'a T> {
        let indices = self.sample_indices(list.len(), count);
        indices.into_iter().map(|i| &list[i]).collect()
    }

    /// 128 random bits written as a UUID, with no version bits set.
    pub fn uuid(&mut self) -> String {
        uuid_text(self.getrandbits(128))
    }

    /// `str(uuid.UUID(int=getrandbits(128), version=4))`.
    pub fn uuid4(&mut self) -> String {
        let bits = self.getrandbits(128);
        let bits = (bits & !(0xf000 << 64)) | (0x4000 << 64);
        let bits = (bits & !(0xc000 << 48)) | (0x8000 << 48);
        uuid_text(bits)
    }
}

fn uuid_text(bits: u128) -> String {
    let hex = format!("{bits:032x}");
    let (a, b, c, d, e) = (
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    );
    format!("{a}-{b}-{c}-{d}-{e}")
}

/// `numpy.random.RandomState`, also the stream behind `numpy.random.seed`.
#[derive(Clone)]
pub struct NumpyRandom {
    twister: Twister,
}

impl NumpyRandom {
    /// `RandomState(seed)`; numpy takes 32 bits.
    pub fn new(seed: u32) -> Self {
        NumpyRandom {
            twister: Twister::from_word(seed),
        }
    }

    /// `random_sample()`: uniform in [0, 1).
    pub fn random(&mut self) -> f64 {
        self.twister.double()
    }

    /// `random_interval(most)`: uniform in 0..=most, by masking and redrawing; draws nothing for 0.
    fn interval(&mut self, most: u64) -> u64 {
        if most == 0 {
            return 0;
        }
        let mask = u64::MAX >> most.leading_zeros();
        loop {
            let value = if most <= u64::from(u32::MAX) {
                u64::from(self.twister.next())
            } else {
                // The high word is drawn first.
                (u64::from(self.twister.next()) << 32) | u64::from(self.twister.next())
            };
            if value & mask <= most {
                return value & mask;
            }
        }
    }

    /// `randint(low, high)`, `high` excluded; `low` where the range is empty, where numpy raises.
    pub fn randint(&mut self, low: i64, high: i64) -> i64 {
        if high <= low {
            return low;
        }
        let most = (high.wrapping_sub(low) as u64) - 1;
        low.wrapping_add(self.interval(most) as i64)
    }

    /// `shuffle(list)`.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            let j = self.interval(i as u64) as usize;
            list.swap(i, j);
        }
    }

    /// `permutation(n)`.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut list: Vec<usize> = (0..n).collect();
        self.shuffle(&mut list);
        list
    }
}
