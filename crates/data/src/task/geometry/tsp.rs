//! Shortest round trips in the plane: exact (Held and Karp), Christofides, nearest neighbour, 2-opt with Or-opt.

use super::exact::Point;
use super::hull::signed_area;

/// Most cities of [`held_karp`]: its table has 2^(n-1) (n-1) numbers.
pub const MOST_EXACT: usize = 20;
/// Most cities of odd degree that [`christofides`] matches exactly.
pub const MOST_ODD: usize = 22;

/// The solver was asked for more than it can do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{solver}: found {found} {what}, expected at most {most}")]
pub struct TooMany {
    solver: &'static str,
    what: &'static str,
    found: usize,
    most: usize,
}

fn distance(points: &[Point], a: usize, b: usize) -> f64 {
    let (p, q) = (points[a], points[b]);
    (p[0] - q[0]).hypot(p[1] - q[1])
}

/// Length of the round trip, back to its start.
pub fn tour_length(points: &[Point], tour: &[usize]) -> f64 {
    (0..tour.len())
        .map(|k| distance(points, tour[k], tour[(k + 1) % tour.len()]))
        .sum()
}

/// The same round trip from city 0, counter-clockwise (signed area not negative).
pub fn canonical_tour(points: &[Point], tour: &[usize]) -> Vec<usize> {
    let mut tour = tour.to_vec();
    if let Some(start) = tour.iter().position(|&city| city == 0) {
        tour.rotate_left(start);
    }
    let area = signed_area(points, &tour);
    // A tour without area (all on one line) starts with the smaller of the two neighbours.
    let backward = area < 0.0 || (area == 0.0 && tour.len() > 2 && tour[tour.len() - 1] < tour[1]);
    if backward && tour.len() > 1 {
        tour[1..].reverse();
    }
    tour
}

/// A shortest tour, by dynamic programming over sets: O(2^n n²) time.
///
/// # Errors
/// More than [`MOST_EXACT`] cities.
pub fn held_karp(points: &[Point]) -> Result<Vec<usize>, TooMany> {
    let n = points.len();
    if n > MOST_EXACT {
        return Err(TooMany {
            solver: "Held-Karp",
            what: "cities",
            found: n,
            most: MOST_EXACT,
        });
    }
    if n < 4 {
        return Ok(canonical_tour(points, &(0..n).collect::<Vec<_>>()));
    }
    // City 0 is where all paths start; cities 1.. are bits 0.. of a set.
    let m = n - 1;
    let d = |a: usize, b: usize| distance(points, a + 1, b + 1);
    let between: Vec<f64> = (0..m)
        .flat_map(|a| (0..m).map(move |b| (a, b)))
        .map(|(a, b)| d(a, b))
        .collect();
    let home: Vec<f64> = (0..m).map(|a| distance(points, 0, a + 1)).collect();
    // cost[set m + j]: the shortest path from 0 through all of `set` that ends in j.
    let mut cost = vec![f64::INFINITY; m << m];
    for j in 0..m {
        cost[(1 << j) * m + j] = home[j];
    }
    for set in 1usize..1 << m {
        for j in (0..m).filter(|j| set >> j & 1 == 1) {
            let rest = set & !(1 << j);
            if rest == 0 {
                continue;
            }
            let row = &cost[rest * m..][..m];
            let mut best = f64::INFINITY;
            for k in 0..m {
                // Paths that do not exist are infinitely long.
                best = best.min(row[k] + between[k * m + j]);
            }
            cost[set * m + j] = best;
        }
    }
    let mut set = (1usize << m) - 1;
    let mut tour = vec![0];
    let mut last: Option<usize> = None;
    while set != 0 {
        let through =
            |j: usize| cost[set * m + j] + last.map_or(home[j], |last| between[j * m + last]);
        let next = (0..m)
            .filter(|j| set >> j & 1 == 1)
            .min_by(|&a, &b| through(a).total_cmp(&through(b)));
        let Some(next) = next else { break };
        tour.push(next + 1);
        set &= !(1 << next);
        last = Some(next);
    }
    Ok(canonical_tour(points, &tour))
}

/// From city 0 always to the nearest city that is left (ties: the lowest index): A1 of our tables.
pub fn nearest_neighbour(points: &[Point]) -> Vec<usize> {
    let n = points.len();
    let mut left = vec![true; n];
    let mut tour = Vec::with_capacity(n);
    let mut at = 0;
    while tour.len() < n {
        tour.push(at);
        left[at] = false;
        let next = (0..n)
            .filter(|&c| left[c])
            .min_by(|&a, &b| distance(points, at, a).total_cmp(&distance(points, at, b)));
        at = next.unwrap_or(0);
    }
    tour
}

/// Improves a tour by 2-opt and by moving runs of up to three cities until nothing helps: A2 of our tables.
pub fn two_opt(points: &[Point], tour: &[usize]) -> Vec<usize> {
    let mut tour = tour.to_vec();
    let n = tour.len();
    if n < 4 {
        return tour;
    }
    let d = |a: usize, b: usize| distance(points, a, b);
    // Gains below this are rounding.
    const LEAST: f64 = 1e-12;
    loop {
        let mut improved = false;
        for i in 0..n - 1 {
            for j in i + 2..n {
                let (a, b) = (tour[i], tour[i + 1]);
                let (c, e) = (tour[j], tour[(j + 1) % n]);
                if a == e {
                    continue;
                }
                if d(a, b) + d(c, e) - d(a, c) - d(b, e) > LEAST {
                    tour[i + 1..=j].reverse();
                    improved = true;
                }
            }
        }
        for length in 1..=3.min(n - 3) {
            for i in 0..n {
                // Positions i+1 ..= i+length move between two other neighbours.
                let at = |k: usize| tour[(i + k) % n];
                let (before, first, last, after) = (at(0), at(1), at(length), at(length + 1));
                let taken = d(before, first) + d(last, after) - d(before, after);
                let mut best = (LEAST, None);
                for k in length + 1..n {
                    let (p, q) = (at(k), at(k + 1));
                    for reversed in [false, true] {
                        let (head, tail) = if reversed {
                            (last, first)
                        } else {
                            (first, last)
                        };
                        let gain = taken + d(p, q) - d(p, head) - d(tail, q);
                        if gain > best.0 {
                            best = (gain, Some((k, reversed)));
                        }
                    }
                }
                if let (_, Some((k, reversed))) = best {
                    let mut run: Vec<usize> = (1..=length).map(at).collect();
                    if reversed {
                        run.reverse();
                    }
                    let mut next: Vec<usize> = (length + 1..=k).map(at).collect();
                    next.extend(run);
                    next.extend((k + 1..n).map(at));
                    next.push(before);
                    tour = next;
                    improved = true;
                }
            }
        }
        if !improved {
            return tour;
        }
    }
}

/// Christofides: a minimum spanning tree, a minimum matching of its cities of odd degree, a walk over both with
/// shortcuts: at most 1.5 times the optimum. A3 of our tables. The matching is exact, by dynamic programming.
///
/// # Errors
/// More than [`MOST_ODD`] cities of odd degree.
pub fn christofides(points: &[Point]) -> Result<Vec<usize>, TooMany> {
    let n = points.len();
    if n < 4 {
        return Ok(canonical_tour(points, &(0..n).collect::<Vec<_>>()));
    }
    // Prim.
    let mut links: Vec<Vec<usize>> = vec![Vec::new(); n];
    let mut near: Vec<(f64, usize)> = (0..n).map(|c| (distance(points, 0, c), 0)).collect();
    let mut outside: Vec<usize> = (1..n).collect();
    while let Some(k) =
        (0..outside.len()).min_by(|&a, &b| near[outside[a]].0.total_cmp(&near[outside[b]].0))
    {
        let city = outside.swap_remove(k);
        let from = near[city].1;
        links[city].push(from);
        links[from].push(city);
        for &other in &outside {
            let d = distance(points, city, other);
            if d < near[other].0 {
                near[other] = (d, city);
            }
        }
    }
    let odd: Vec<usize> = (0..n).filter(|&c| links[c].len() % 2 == 1).collect();
    if odd.len() > MOST_ODD {
        return Err(TooMany {
            solver: "Christofides",
            what: "cities of odd degree",
            found: odd.len(),
            most: MOST_ODD,
        });
    }
    for (a, b) in matching(points, &odd) {
        links[a].push(b);
        links[b].push(a);
    }
    // Hierholzer: every city has even degree now.
    let (mut stack, mut walk) = (vec![0], Vec::new());
    while let Some(&city) = stack.last() {
        match links[city].pop() {
            Some(next) => {
                if let Some(k) = links[next].iter().position(|&c| c == city) {
                    links[next].swap_remove(k);
                }
                stack.push(next);
            }
            None => {
                walk.push(city);
                stack.pop();
            }
        }
    }
    let mut seen = vec![false; n];
    walk.retain(|&city| !std::mem::replace(&mut seen[city], true));
    Ok(canonical_tour(points, &walk))
}

/// The pairing of an even number of cities with the smallest sum of distances.
fn matching(points: &[Point], cities: &[usize]) -> Vec<(usize, usize)> {
    let m = cities.len();
    let d = |a: usize, b: usize| distance(points, cities[a], cities[b]);
    // cost[set]: of pairing all of `set`; the lowest city of a set is paired first.
    let mut cost = vec![f64::INFINITY; 1 << m];
    let mut partner = vec![0u8; 1 << m];
    cost[0] = 0.0;
    for set in 1usize..1 << m {
        if set.count_ones() % 2 == 1 {
            continue;
        }
        let low = set.trailing_zeros() as usize;
        for other in (low + 1..m).filter(|k| set >> k & 1 == 1) {
            let c = cost[set & !(1 << low) & !(1 << other)] + d(low, other);
            if c < cost[set] {
                cost[set] = c;
                partner[set] = other as u8;
            }
        }
    }
    let mut set = (1usize << m) - 1;
    let mut pairs = Vec::new();
    while set != 0 {
        let (low, other) = (set.trailing_zeros() as usize, usize::from(partner[set]));
        pairs.push((cities[low], cities[other]));
        set &= !(1 << low) & !(1 << other);
    }
    pairs
}
