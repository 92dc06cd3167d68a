//! What a predicted hull, triangulation or tour is worth (paper 39).

use super::exact::{Point, orient2d};
use super::hull::signed_area;
use std::collections::BTreeSet;

/// Whether two lists are the same cycle, from any start and in either direction.
pub fn same_cycle(a: &[usize], b: &[usize]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let n = a.len();
    (0..n.max(1)).any(|shift| {
        (0..n).all(|k| a[k] == b[(shift + k) % n]) || (0..n).all(|k| a[k] == b[(shift + n - k) % n])
    })
}

/// Whether the polygon has three or more different vertices and no two of its edges touch except neighbours at their
/// common vertex. Exact.
pub fn is_simple(points: &[Point], polygon: &[usize]) -> bool {
    let n = polygon.len();
    let different: BTreeSet<usize> = polygon.iter().copied().collect();
    if n < 3 || different.len() != n || polygon.iter().any(|&i| i >= points.len()) {
        return false;
    }
    let edge = |k: usize| (points[polygon[k]], points[polygon[(k + 1) % n]]);
    for i in 0..n {
        // Neighbours may not fold back onto each other.
        let ((a, b), (_, c)) = (edge(i), edge((i + 1) % n));
        if orient2d(a, b, c) == 0 && dot(b, a, c) > 0.0 {
            return false;
        }
        for j in i + 2..n {
            if (j + 1) % n != i && touch(edge(i), edge(j)) {
                return false;
            }
        }
    }
    true
}

/// (p - o) · (q - o)
fn dot(o: Point, p: Point, q: Point) -> f64 {
    (p[0] - o[0]) * (q[0] - o[0]) + (p[1] - o[1]) * (q[1] - o[1])
}

/// Whether two segments have a point in common.
fn touch((a, b): (Point, Point), (c, d): (Point, Point)) -> bool {
    let within = |p: Point, q: Point, r: Point| {
        // r, on the line of p and q, lies between them.
        (0..2).all(|k| p[k].min(q[k]) <= r[k] && r[k] <= p[k].max(q[k]))
    };
    let (o1, o2) = (orient2d(a, b, c), orient2d(a, b, d));
    let (o3, o4) = (orient2d(c, d, a), orient2d(c, d, b));
    if o1 * o2 < 0 && o3 * o4 < 0 {
        return true;
    }
    (o1 == 0 && within(a, b, c))
        || (o2 == 0 && within(a, b, d))
        || (o3 == 0 && within(c, d, a))
        || (o4 == 0 && within(c, d, b))
}

/// A predicted hull: whether it is the true one, and area covered if it is a simple polygon.
pub fn score_hull(points: &[Point], truth: &[usize], predicted: &[usize]) -> (bool, Option<f64>) {
    let right = same_cycle(truth, predicted);
    let whole = signed_area(points, truth).abs();
    let covered = (whole > 0.0 && is_simple(points, predicted))
        .then(|| signed_area(points, predicted).abs() / whole);
    (right, covered)
}

/// A predicted triangulation as flat triples: whether it is the true set, and the share of true triangles found.
pub fn score_triangles(truth: &[[usize; 3]], flat: &[usize]) -> (bool, f64) {
    let sorted = |mut t: [usize; 3]| {
        t.sort_unstable();
        t
    };
    let truth: BTreeSet<_> = truth.iter().map(|&t| sorted(t)).collect();
    let found: BTreeSet<_> = flat
        .chunks_exact(3)
        .map(|t| sorted([t[0], t[1], t[2]]))
        .collect();
    let covered = truth.intersection(&found).count() as f64 / truth.len().max(1) as f64;
    (flat.len().is_multiple_of(3) && truth == found, covered)
}

/// Whether every city of `n` is visited exactly once.
pub fn is_tour(n: usize, tour: &[usize]) -> bool {
    let mut seen = vec![false; n];
    tour.len() == n
        && tour
            .iter()
            .all(|&city| city < n && !std::mem::replace(&mut seen[city], true))
}
