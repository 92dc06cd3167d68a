//! `difflib.SequenceMatcher` of CPython: the total length of recursively longest matching blocks, with the
//! rule that drops frequent elements of a long second sequence ("autojunk").

use std::collections::HashMap;
use std::hash::Hash;

/// Compares `a` with `b`. The roles differ: only `b` has its frequent elements dropped.
pub struct SequenceMatcher<'a, T> {
    a: &'a [T],
    b: &'a [T],
    /// Positions in `b` of each element of `a`, ascending; none for frequent elements.
    positions: HashMap<&'a T, Vec<usize>>,
}

impl<'a, T: Eq + Hash> SequenceMatcher<'a, T> {
    /// `SequenceMatcher(None, a, b)`, autojunk on: if `b` has 200 elements or more, those that occur more than
    /// `len(b) // 100 + 1` times start no match.
    pub fn new(a: &'a [T], b: &'a [T]) -> Self {
        let mut positions: HashMap<&T, Vec<usize>> = HashMap::new();
        for (index, element) in b.iter().enumerate() {
            positions.entry(element).or_default().push(index);
        }
        if b.len() >= 200 {
            let most = b.len() / 100 + 1;
            positions.retain(|_, list| list.len() <= most);
        }
        SequenceMatcher { a, b, positions }
    }

    /// `ratio()`: twice the matched elements over all elements; 1 for two empty sequences.
    pub fn ratio(&self) -> f64 {
        let all = self.a.len() + self.b.len();
        if all == 0 {
            return 1.0;
        }
        2.0 * self.matched() as f64 / all as f64
    }

    /// The number of matched elements.
    pub fn matched(&self) -> usize {
        let mut total = 0;
        let mut queue = vec![(0, self.a.len(), 0, self.b.len())];
        let mut scratch = Scratch {
            length: vec![0; self.b.len() + 1],
            next: vec![0; self.b.len() + 1],
        };
        while let Some((a_low, a_high, b_low, b_high)) = queue.pop() {
            let (i, j, size) = self.longest(a_low, a_high, b_low, b_high, &mut scratch);
            if size == 0 {
                continue;
            }
            total += size;
            if a_low < i && b_low < j {
                queue.push((a_low, i, b_low, j));
            }
            if i + size < a_high && j + size < b_high {
                queue.push((i + size, a_high, j + size, b_high));
            }
        }
        total
    }

    /// `find_longest_match`: earliest in `a`, then earliest in `b`, then extended over equal neighbours.
    fn longest(
        &self,
        a_low: usize,
        a_high: usize,
        b_low: usize,
        b_high: usize,
        scratch: &mut Scratch,
    ) -> (usize, usize, usize) {
        let (mut best_i, mut best_j, mut best) = (a_low, b_low, 0);
        // length[j + 1]: length of the match that ends at the previous i and at j.
        let mut touched: Vec<usize> = Vec::new();
        for i in a_low..a_high {
            let mut written = Vec::with_capacity(touched.len());
            if let Some(list) = self.positions.get(&self.a[i]) {
                let from = list.partition_point(|&j| j < b_low);
                for &j in &list[from..] {
                    if j >= b_high {
                        break;
                    }
                    let size = scratch.length[j] + 1;
                    scratch.next[j + 1] = size;
                    written.push(j + 1);
                    if size > best {
                        (best_i, best_j, best) = (i + 1 - size, j + 1 - size, size);
                    }
                }
            }
            for &slot in &touched {
                scratch.length[slot] = 0;
            }
            std::mem::swap(&mut scratch.length, &mut scratch.next);
            touched = written;
        }
        for &slot in &touched {
            scratch.length[slot] = 0;
        }
        while best_i > a_low && best_j > b_low && self.a[best_i - 1] == self.b[best_j - 1] {
            (best_i, best_j, best) = (best_i - 1, best_j - 1, best + 1);
        }
        while best_i + best < a_high
            && best_j + best < b_high
            && self.a[best_i + best] == self.b[best_j + best]
        {
            best += 1;
        }
        (best_i, best_j, best)
    }
}

/// Two rows of match lengths, zero between calls.
struct Scratch {
    length: Vec<usize>,
    next: Vec<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, without any index.
    fn naive(a: &[u8], b: &[u8], popular: &dyn Fn(u8) -> bool) -> usize {
        let (mut at, mut size) = ((0, 0), 0);
        for i in 0..a.len() {
            for j in 0..b.len() {
                let same = |k: usize| {
                    i + k < a.len() && j + k < b.len() && a[i + k] == b[j + k] && !popular(b[j + k])
                };
                let length = (0..).take_while(|&k| same(k)).count();
                if length > size {
                    (at, size) = ((i, j), length);
                }
            }
        }
        let (mut i, mut j) = at;
        while i > 0 && j > 0 && a[i - 1] == b[j - 1] {
            (i, j, size) = (i - 1, j - 1, size + 1);
        }
        while i + size < a.len() && j + size < b.len() && a[i + size] == b[j + size] {
            size += 1;
        }
        if size == 0 {
            return 0;
        }
        size + naive(&a[..i], &b[..j], popular) + naive(&a[i + size..], &b[j + size..], popular)
    }

    proptest! {
        #[test]
        fn indexed_search_is_the_definition(
            a in proptest::collection::vec(0u8..6, 0..60),
            b in proptest::collection::vec(0u8..90, 0..260),
        ) {
            let popular = |x: u8| {
                b.len() >= 200 && b.iter().filter(|&&y| y == x).count() > b.len() / 100 + 1
            };
            prop_assert_eq!(SequenceMatcher::new(&a, &b).matched(), naive(&a, &b, &popular));
        }
    }
}
