//! Delaunay triangulations on exact predicates: a sweep makes some triangulation, flips of edges make it Delaunay.

use super::exact::{Point, incircle, orient2d};
use std::collections::HashMap;

/// Directed edges of counter-clockwise triangles, each with the triangle's third point.
#[derive(Default)]
struct Mesh {
    third: HashMap<(usize, usize), usize>,
}

impl Mesh {
    fn insert(&mut self, a: usize, b: usize, c: usize) {
        for (u, v, w) in [(a, b, c), (b, c, a), (c, a, b)] {
            self.third.insert((u, v), w);
        }
    }

    fn remove(&mut self, a: usize, b: usize, c: usize) {
        for edge in [(a, b), (b, c), (c, a)] {
            self.third.remove(&edge);
        }
    }
}

/// The triangles of the Delaunay triangulation, each with its indices ascending, in lexicographic order.
///
/// Where four points lie on one circle, the diagonal is the pair of indices that comes first lexicographically. Of equal
/// points the first counts; a set on one line has no triangles.
pub fn delaunay(points: &[Point]) -> Vec<[usize; 3]> {
    let mut order: Vec<usize> = (0..points.len()).collect();
    order.sort_by(|&a, &b| {
        let (p, q) = (points[a], points[b]);
        p[0].total_cmp(&q[0])
            .then(p[1].total_cmp(&q[1]))
            .then(a.cmp(&b))
    });
    order.dedup_by(|later, first| points[*later] == points[*first]);
    let turn = |a: usize, b: usize, c: usize| orient2d(points[a], points[b], points[c]);
    // The first points may lie on one line: all of them are joined to the first point that does not.
    let Some(apex) = (2..order.len()).find(|&k| turn(order[0], order[1], order[k]) != 0) else {
        return Vec::new();
    };
    let mut mesh = Mesh::default();
    let tip = order[apex];
    let left = turn(order[0], order[1], tip) > 0;
    for pair in order[..apex].windows(2) {
        let (a, b) = if left {
            (pair[0], pair[1])
        } else {
            (pair[1], pair[0])
        };
        mesh.insert(a, b, tip);
    }
    // Outline, counter-clockwise.
    let mut outline: Vec<usize> = order[..apex].to_vec();
    if !left {
        outline.reverse();
    }
    outline.push(tip);
    for &next in &order[apex + 1..] {
        // The edges that the next point sees follow each other on the outline.
        let count = outline.len();
        let sees = |k: usize| turn(outline[k % count], outline[(k + 1) % count], next) < 0;
        let Some(start) = (0..count).find(|&k| sees(k) && !sees(k + count - 1)) else {
            continue;
        };
        let mut seen = 0;
        while seen < count && sees(start + seen) {
            mesh.insert(
                outline[(start + seen + 1) % count],
                outline[(start + seen) % count],
                next,
            );
            seen += 1;
        }
        // Of the seen part only the ends stay on the outline.
        let mut rest = vec![outline[start], next];
        rest.extend((seen..count).map(|k| outline[(start + k) % count]));
        outline = rest;
    }
    flip(points, &mut mesh);
    let mut triangles: Vec<[usize; 3]> = mesh
        .third
        .iter()
        .filter(|&(&(a, b), &c)| a < b && a < c)
        .map(|(&(a, b), &c)| [a, b.min(c), b.max(c)])
        .collect();
    triangles.sort_unstable();
    triangles
}

/// Lawson's flips until no edge is illegal.
fn flip(points: &[Point], mesh: &mut Mesh) {
    let mut open: Vec<(usize, usize)> =
        mesh.third.keys().copied().filter(|&(a, b)| a < b).collect();
    // The map's order is not the same in every run; the result must be.
    open.sort_unstable();
    while let Some((a, b)) = open.pop() {
        let (Some(&c), Some(&d)) = (mesh.third.get(&(a, b)), mesh.third.get(&(b, a))) else {
            continue;
        };
        let inside = incircle(points[a], points[b], points[c], points[d]);
        let (old, new) = ([a.min(b), a.max(b)], [c.min(d), c.max(d)]);
        if inside < 0 || (inside == 0 && old <= new) {
            continue;
        }
        mesh.remove(a, b, c);
        mesh.remove(b, a, d);
        // a, d, b, c run counter-clockwise around the two triangles.
        mesh.insert(d, b, c);
        mesh.insert(c, a, d);
        for (u, v) in [(a, d), (d, b), (b, c), (c, a)] {
            open.push((u.min(v), u.max(v)));
        }
    }
}

/// The centre of a triangle's inscribed circle.
pub fn incenter(points: &[Point], triangle: [usize; 3]) -> Point {
    let [p, q, r] = triangle.map(|i| points[i]);
    let length = |u: Point, v: Point| (u[0] - v[0]).hypot(u[1] - v[1]);
    let (a, b, c) = (length(q, r), length(r, p), length(p, q));
    let sum = a + b + c;
    [0, 1].map(|k| (a * p[k] + b * q[k] + c * r[k]) / sum)
}

/// Sorts triangles by their incenters, x before y: the order in which answers are written (paper 39).
pub fn by_incenter(points: &[Point], triangles: &[[usize; 3]]) -> Vec<[usize; 3]> {
    let mut keyed: Vec<(Point, [usize; 3])> = triangles
        .iter()
        .map(|&triangle| (incenter(points, triangle), triangle))
        .collect();
    keyed.sort_by(|(p, a), (q, b)| {
        p[0].total_cmp(&q[0])
            .then(p[1].total_cmp(&q[1]))
            .then(a.cmp(b))
    });
    keyed.into_iter().map(|(_, triangle)| triangle).collect()
}
