//! Exact signs of determinants of f64 coordinates: a floating-point filter, then expansion sums (Shewchuk 1997).
//!
//! An expansion is a sum of f64 that do not overlap, smallest first: sums and products of expansions lose nothing, so
//! the sign is that of real arithmetic (as long as nothing overflows or underflows).

/// A point of the plane.
pub type Point = [f64; 2];

const EPS: f64 = f64::EPSILON / 2.0;

fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let bb = sum - a;
    (sum, (a - (sum - bb)) + (b - bb))
}

fn two_product(a: f64, b: f64) -> (f64, f64) {
    let product = a * b;
    (product, a.mul_add(b, -product))
}

/// A sum of parts, smallest first.
#[derive(Clone, Debug, Default)]
struct Expansion(Vec<f64>);

impl Expansion {
    fn product(a: f64, b: f64) -> Self {
        let (high, low) = two_product(a, b);
        Expansion(vec![low, high])
    }

    fn difference(a: f64, b: f64) -> Self {
        let (high, low) = two_sum(a, -b);
        Expansion(vec![low, high])
    }

    /// Adds one number (Shewchuk's grow-expansion).
    fn grow(&mut self, value: f64) {
        let mut carry = value;
        for part in &mut self.0 {
            (carry, *part) = two_sum(carry, *part);
        }
        self.0.push(carry);
        self.0.retain(|&part| part != 0.0);
    }

    fn add(mut self, other: &Expansion) -> Self {
        other.0.iter().for_each(|&part| self.grow(part));
        self
    }

    fn negated(mut self) -> Self {
        self.0.iter_mut().for_each(|part| *part = -*part);
        self
    }

    fn times(&self, other: &Expansion) -> Self {
        let mut out = Expansion::default();
        for &a in &self.0 {
            for &b in &other.0 {
                let (high, low) = two_product(a, b);
                out.grow(low);
                out.grow(high);
            }
        }
        out
    }

    /// The largest part has the sign of the sum.
    fn sign(&self) -> i8 {
        self.0
            .iter()
            .rev()
            .find(|&&part| part != 0.0)
            .map_or(0, |&part| if part > 0.0 { 1 } else { -1 })
    }
}

/// +1 when a, b, c turn left (counter-clockwise), -1 when right, 0 when they lie on one line.
pub fn orient2d(a: Point, b: Point, c: Point) -> i8 {
    let left = (a[0] - c[0]) * (b[1] - c[1]);
    let right = (a[1] - c[1]) * (b[0] - c[0]);
    let det = left - right;
    let bound = (3.0 + 16.0 * EPS) * EPS * (left.abs() + right.abs());
    if det.abs() > bound {
        return if det > 0.0 { 1 } else { -1 };
    }
    let minor = |p: Point, q: Point| {
        Expansion::product(p[0], q[1]).add(&Expansion::product(p[1], q[0]).negated())
    };
    minor(a, b).add(&minor(b, c)).add(&minor(c, a)).sign()
}

/// For a, b, c counter-clockwise: +1 when d lies inside their circle, -1 outside, 0 on it.
pub fn incircle(a: Point, b: Point, c: Point, d: Point) -> i8 {
    let of = |p: Point| {
        let (x, y) = (p[0] - d[0], p[1] - d[1]);
        (x, y, x * x + y * y)
    };
    let ((ax, ay, al), (bx, by, bl), (cx, cy, cl)) = (of(a), of(b), of(c));
    let det = al * (bx * cy - cx * by) + bl * (cx * ay - ax * cy) + cl * (ax * by - bx * ay);
    let permanent = ((bx * cy).abs() + (cx * by).abs()) * al
        + ((cx * ay).abs() + (ax * cy).abs()) * bl
        + ((ax * by).abs() + (bx * ay).abs()) * cl;
    if det.abs() > (10.0 + 96.0 * EPS) * EPS * permanent {
        return if det > 0.0 { 1 } else { -1 };
    }
    // The same determinant with exact differences.
    let exact = |p: Point| {
        let (x, y) = (
            Expansion::difference(p[0], d[0]),
            Expansion::difference(p[1], d[1]),
        );
        let lift = x.times(&x).add(&y.times(&y));
        (x, y, lift)
    };
    let (a, b, c) = (exact(a), exact(b), exact(c));
    type Lifted = (Expansion, Expansion, Expansion);
    let term = |lift: &Expansion, p: &Lifted, q: &Lifted| {
        lift.times(&p.0.times(&q.1).add(&q.0.times(&p.1).negated()))
    };
    term(&a.2, &b, &c)
        .add(&term(&b.2, &c, &a))
        .add(&term(&c.2, &a, &b))
        .sign()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn sign(value: i128) -> i8 {
        value.signum() as i8
    }

    #[test]
    fn signs_are_those_of_integer_arithmetic() {
        let mut random = Random::new(1, "predicates");
        let mut zeros = [0; 2];
        for round in 0..40_000 {
            // Small grids give many degenerate cases; large ones give determinants that f64 cannot hold.
            let size = [3, 8, 1 << 20, 1 << 26][round % 4];
            let mut point = || [0; 2].map(|_: i32| random.below(size) as i128);
            let mut p = [point(), point(), point(), point()];
            if round % 8 > 3 {
                // Nearly on one line: c = a + k (b - a), perhaps off by one.
                let k = 1 + (round as i128 % 5);
                let off = (round as i128 / 8) % 2;
                p[2] = [
                    p[0][0] + k * (p[1][0] - p[0][0]),
                    p[0][1] + k * (p[1][1] - p[0][1]) + off,
                ];
            }
            // Scaled to the unit square by a power of two: exact.
            let f = p.map(|q| q.map(|v| v as f64 / (1u64 << 30) as f64));
            let [a, b, c, d] = p;
            let turn = (a[0] - c[0]) * (b[1] - c[1]) - (a[1] - c[1]) * (b[0] - c[0]);
            assert_eq!(orient2d(f[0], f[1], f[2]), sign(turn), "{p:?}");
            let of = |q: [i128; 2]| {
                let (x, y) = (q[0] - d[0], q[1] - d[1]);
                (x, y, x * x + y * y)
            };
            let ((ax, ay, al), (bx, by, bl), (cx, cy, cl)) = (of(a), of(b), of(c));
            let circle =
                al * (bx * cy - cx * by) + bl * (cx * ay - ax * cy) + cl * (ax * by - bx * ay);
            assert_eq!(incircle(f[0], f[1], f[2], f[3]), sign(circle), "{p:?}");
            zeros[0] += i32::from(turn == 0);
            zeros[1] += i32::from(circle == 0);
        }
        assert!(zeros.iter().all(|&count| count > 1000), "{zeros:?}");
    }

    #[test]
    fn the_filter_alone_would_be_wrong() {
        // Points of a line near (0.5, 0.5), a few units in the last place apart: the plain determinant has no sign here.
        let u = f64::EPSILON;
        let (mut wrong, mut checked) = (0, 0);
        for i in 0..32i32 {
            for j in 0..32i32 {
                let (a, b, c) = (
                    [0.5 + f64::from(i) * u, 0.5 + f64::from(j) * u],
                    [12.0, 12.0],
                    [24.0, 24.0],
                );
                let plain = (a[0] - c[0]) * (b[1] - c[1]) - (a[1] - c[1]) * (b[0] - c[0]);
                let plain = if plain > 0.0 {
                    1
                } else if plain < 0.0 {
                    -1
                } else {
                    0
                };
                // Above the diagonal is on the left of the way from (12, 12) to (24, 24).
                let exact = (j - i).signum() as i8;
                assert_eq!(orient2d(a, b, c), exact);
                wrong += i32::from(plain != exact);
                checked += 1;
            }
        }
        assert!(wrong > 0, "none of {checked} needed more than f64");
    }
}
