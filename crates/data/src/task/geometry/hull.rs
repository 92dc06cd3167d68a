//! Convex hulls: Andrew's monotone chain on exact predicates.

use super::exact::{Point, orient2d};

/// The vertices of the convex hull, counter-clockwise, from the one with the smallest index. Points on an edge are no
/// vertices; of equal points the first counts. A set on one line has two vertices, a set of equal points one.
pub fn convex_hull(points: &[Point]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..points.len()).collect();
    order.sort_by(|&a, &b| {
        let (p, q) = (points[a], points[b]);
        p[0].total_cmp(&q[0])
            .then(p[1].total_cmp(&q[1]))
            .then(a.cmp(&b))
    });
    order.dedup_by(|later, first| points[*later] == points[*first]);
    if order.len() < 3 {
        order.sort_unstable();
        return order;
    }
    let half = |order: &mut dyn Iterator<Item = usize>| {
        let mut chain: Vec<usize> = Vec::new();
        for next in order {
            while let [.., a, b] = chain[..]
                && orient2d(points[a], points[b], points[next]) <= 0
            {
                chain.pop();
            }
            chain.push(next);
        }
        chain.pop();
        chain
    };
    let mut hull = half(&mut order.iter().copied());
    hull.extend(half(&mut order.iter().rev().copied()));
    let first = (0..hull.len()).min_by_key(|&i| hull[i]).unwrap_or(0);
    hull.rotate_left(first);
    hull
}

/// Signed area of a polygon: positive when its vertices run counter-clockwise.
pub fn signed_area(points: &[Point], polygon: &[usize]) -> f64 {
    let mut sum = 0.0;
    for (k, &i) in polygon.iter().enumerate() {
        let (p, q) = (points[i], points[polygon[(k + 1) % polygon.len()]]);
        sum += p[0] * q[1] - p[1] * q[0];
    }
    sum / 2.0
}
