//! Predicates, hulls, triangulations and tours against brute force.

use super::delaunay::{by_incenter, delaunay};
use super::exact::{incircle, orient2d};
use super::format::{read_lines, read_tsplib, write_line};
use super::hull::{convex_hull, signed_area};
use super::score::*;
use super::tsp::*;
use super::*;
use proptest::prelude::*;

/// Vertices by definition: a point is one when some line through it has all others strictly on one side or further away
/// on the line's other half.
fn hull_by_definition(points: &[Point]) -> Vec<usize> {
    let n = points.len();
    (0..n)
        .filter(|&i| {
            if (0..i).any(|j| points[j] == points[i]) {
                return false;
            }
            let others: Vec<Point> = points.iter().copied().filter(|&p| p != points[i]).collect();
            if others.is_empty() {
                return true;
            }
            // Not a vertex when it lies in a triangle or on a segment of others.
            let p = points[i];
            !others.iter().any(|&a| {
                others.iter().any(|&b| {
                    let between = orient2d(a, b, p) == 0
                        && (a[0] - p[0]) * (b[0] - p[0]) + (a[1] - p[1]) * (b[1] - p[1]) < 0.0;
                    between
                        || others.iter().any(|&c| {
                            let turns = [orient2d(a, b, p), orient2d(b, c, p), orient2d(c, a, p)];
                            orient2d(a, b, c) != 0
                                && (turns.iter().all(|&t| t >= 0) || turns.iter().all(|&t| t <= 0))
                        })
                })
            })
        })
        .collect()
}

fn check_hull(points: &[Point]) {
    let hull = convex_hull(points);
    let mut sorted = hull.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, hull_by_definition(points), "{points:?}");
    if let Some(&first) = hull.first() {
        assert_eq!(first, sorted[0]);
    }
    if hull.len() > 2 {
        for k in 0..hull.len() {
            let at = |j: usize| points[hull[(k + j) % hull.len()]];
            assert_eq!(orient2d(at(0), at(1), at(2)), 1, "{points:?}");
        }
        assert!(is_simple(points, &hull));
    }
}

fn check_delaunay(points: &[Point]) {
    let triangles = delaunay(points);
    let ccw = |[a, b, c]: [usize; 3]| {
        if orient2d(points[a], points[b], points[c]) > 0 {
            [a, b, c]
        } else {
            [a, c, b]
        }
    };
    let mut area = 0.0;
    for &triangle in &triangles {
        assert!(triangle[0] < triangle[1] && triangle[1] < triangle[2]);
        let [a, b, c] = ccw(triangle).map(|i| points[i]);
        assert_eq!(orient2d(a, b, c), 1, "flat triangle in {points:?}");
        for &p in points {
            assert!(
                incircle(a, b, c, p) <= 0,
                "a point inside a circle: {points:?}"
            );
        }
        area += signed_area(points, &ccw(triangle));
    }
    let hull = convex_hull(points);
    if hull.len() > 2 {
        let whole = signed_area(points, &hull);
        assert!(
            (area - whole).abs() <= 1e-9 * whole.max(1.0),
            "{area} of {whole}: {points:?}"
        );
        // Euler: 2 n - 2 - b triangles, b points on the border (not only vertices), n different points.
        let mut different: Vec<Point> = points.to_vec();
        different.sort_by(|p, q| p[0].total_cmp(&q[0]).then(p[1].total_cmp(&q[1])));
        different.dedup();
        let border = different
            .iter()
            .filter(|&&p| {
                (0..hull.len()).any(|k| {
                    let (a, b) = (points[hull[k]], points[hull[(k + 1) % hull.len()]]);
                    orient2d(a, b, p) == 0
                })
            })
            .count();
        assert_eq!(
            triangles.len(),
            2 * different.len() - 2 - border,
            "{points:?}"
        );
    } else {
        assert!(triangles.is_empty());
    }
    let mut again = by_incenter(points, &triangles);
    again.sort_unstable();
    assert_eq!(again, triangles);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn hulls_and_triangulations_of_grids_and_lines(
        size in 1u32..9,
        raw in prop::collection::vec((0u32..1000, 0u32..1000), 0..14),
        line in any::<bool>(),
    ) {
        // Small grids are full of equal, collinear and cocircular points; scaled so that coordinates are not exact thirds.
        let points: Vec<Point> = raw
            .iter()
            .map(|&(x, y)| {
                let (x, y) = (x % size, if line { x % size * 2 } else { y % size });
                [f64::from(x) / 3.0, f64::from(y) / 3.0]
            })
            .collect();
        check_hull(&points);
        check_delaunay(&points);
    }
}

#[test]
fn hulls_and_triangulations_of_random_points() {
    let mut random = Random::new(2, "random points");
    for round in 0..10_000 {
        let points = random_points(round % 16, &mut random);
        let hull = convex_hull(&points);
        // Every point is on the left of every edge.
        for k in 0..hull.len() {
            let (a, b) = (points[hull[k]], points[hull[(k + 1) % hull.len()]]);
            assert!(points.iter().all(|&p| orient2d(a, b, p) >= 0));
        }
        if round % 10 == 0 {
            check_hull(&points);
        }
        check_delaunay(&points);
    }
    check_delaunay(&random_points(200, &mut random));
}

/// Shortest of all tours, by trying them.
fn shortest(points: &[Point]) -> f64 {
    fn go(points: &[Point], tour: &mut Vec<usize>, best: &mut f64) {
        if tour.len() == points.len() {
            *best = best.min(tour_length(points, tour));
            return;
        }
        for city in 1..points.len() {
            if !tour.contains(&city) {
                tour.push(city);
                go(points, tour, best);
                tour.pop();
            }
        }
    }
    let mut best = f64::INFINITY;
    go(points, &mut vec![0], &mut best);
    best
}

#[test]
fn tours_are_shortest_or_within_their_bounds() {
    let mut random = Random::new(3, "tours");
    for round in 0..250 {
        let n = 1 + round % 8;
        let points = random_points(n, &mut random);
        let tour = held_karp(&points).unwrap();
        let best = if n == 1 { 0.0 } else { shortest(&points) };
        assert!((tour_length(&points, &tour) - best).abs() < 1e-12);
        assert!(is_tour(n, &tour) && tour[0] == 0);
        assert!(n < 3 || signed_area(&points, &tour) > 0.0);
    }
    for round in 0..200 {
        let n = 4 + round % 9;
        let points = random_points(n, &mut random);
        let best = tour_length(&points, &held_karp(&points).unwrap());
        let near = nearest_neighbour(&points);
        let improved = two_opt(&points, &near);
        let bounded = christofides(&points).unwrap();
        for tour in [&near, &improved, &bounded] {
            assert!(is_tour(n, tour));
            assert!(tour_length(&points, tour) >= best - 1e-12);
        }
        assert!(tour_length(&points, &improved) <= tour_length(&points, &near) + 1e-12);
        assert!(tour_length(&points, &bounded) <= 1.5 * best + 1e-12);
    }
    let error = held_karp(&random_points(21, &mut random)).unwrap_err();
    assert!(error.to_string().contains("21"), "{error}");
    // All on one line, and all equal.
    let line: Vec<Point> = [3.0, 0.0, 1.0, 2.0, 4.0].map(|x| [x, 0.0]).to_vec();
    assert_eq!(tour_length(&line, &held_karp(&line).unwrap()), 8.0);
    assert!(is_tour(6, &held_karp(&[[1.0, 1.0]; 6]).unwrap()));
}

#[test]
fn mean_lengths_are_those_that_are_known() {
    let mut random = Random::new(4, "mean lengths");
    for (n, known) in [(5, 2.12), (10, 2.87)] {
        let mean = (0..1000)
            .map(|_| {
                let points = random_points(n, &mut random);
                tour_length(&points, &held_karp(&points).unwrap())
            })
            .sum::<f64>()
            / 1000.0;
        assert!((mean - known).abs() < 0.03, "{n}: {mean}");
    }
}

#[test]
fn scores_know_cycles_crossings_and_triangles() {
    let square = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 0.5]];
    let truth = [0, 1, 2, 3];
    assert_eq!(
        score_hull(&square, &truth, &[2, 1, 0, 3]),
        (true, Some(1.0))
    );
    assert_eq!(score_hull(&square, &truth, &[0, 2, 1, 3]), (false, None));
    assert_eq!(score_hull(&square, &truth, &[0, 1, 2]), (false, Some(0.5)));
    assert_eq!(score_hull(&square, &truth, &[0, 1, 1, 2]), (false, None));
    assert_eq!(score_hull(&square, &truth, &[0, 1]), (false, None));
    // 0, 4, 2 lie on one line: going there and back is no polygon.
    assert!(!is_simple(&square, &[0, 2, 4]));
    assert!(!is_simple(&square, &[0, 1, 2, 9]));
    let triangles = [[0, 1, 4], [1, 2, 4], [2, 3, 4], [0, 3, 4]];
    let flat = [4, 0, 1, 1, 2, 4, 2, 3, 4, 3, 0, 4];
    assert_eq!(score_triangles(&triangles, &flat), (true, 1.0));
    assert_eq!(score_triangles(&triangles, &flat[..6]), (false, 0.5));
    assert_eq!(score_triangles(&triangles, &flat[..7]), (false, 0.5));
    assert!(!is_tour(3, &[0, 1, 1]) && is_tour(3, &[2, 0, 1]));
}

#[test]
fn files_are_read_as_written_and_errors_name_the_line() {
    let mut random = Random::new(5, "files");
    for question in [Question::Hull, Question::Delaunay, Question::Tsp] {
        for closed in [false, true] {
            let mut text = String::new();
            let mut lines = Vec::new();
            for n in 3..9 {
                let points = random_points(n, &mut random);
                let answer = question.answer(&points);
                text += &(write_line(&points, &answer, closed) + "\n\n");
                lines.push(format::Line { points, answer });
            }
            assert_eq!(read_lines(&text, closed).unwrap(), lines);
        }
    }
    for (text, words) in [
        ("0 0 1 1 output 1 2\n0 0 x 1 output 1", ["line 2", "\"x\""]),
        ("0 0 1 output 1", ["line 1", "3 coordinates"]),
        ("0 0 1 1 output 3", ["line 1", "\"3\""]),
        ("0 0 1 1 output 0", ["line 1", "\"0\""]),
        ("\n0 0 1 1", ["line 2", "output"]),
        ("0 0 1 inf output 1", ["line 1", "inf"]),
    ] {
        let error = read_lines(text, true).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
    let file = "NAME : x\nEDGE_WEIGHT_TYPE : EUC_2D\nNODE_COORD_SECTION\n1 0.5 2\n2 1e1 3\nEOF\n";
    assert_eq!(read_tsplib(file).unwrap(), [[0.5, 2.0], [10.0, 3.0]]);
    assert!(read_tsplib(&file.replace("EUC_2D", "GEO")).is_err());
    let error = read_tsplib(&file.replace("2 1e1 3", "2 1e1")).unwrap_err();
    assert!(error.to_string().contains("line 5"), "{error}");
}

#[test]
fn four_points_on_a_circle_are_cut_along_the_smaller_pair() {
    let square = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]];
    assert_eq!(delaunay(&square), [[0, 1, 2], [0, 2, 3]]);
    // The same square with other numbers: 0 and 1 face each other now.
    let crossed = [square[0], square[2], square[1], square[3]];
    assert_eq!(delaunay(&crossed), [[0, 1, 2], [0, 1, 3]]);
    assert!(delaunay(&[[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]).is_empty());
}

#[test]
fn pointing_examples_are_canonical_and_repeat_by_seed() {
    use super::super::{AnswerOrder, PointingTask, SortSet};
    let geometry = |question| PointingTask::Geometry(Geometry { question });
    let sort = |order| PointingTask::Sort(SortSet { order });
    for task in [
        geometry(Question::Hull),
        geometry(Question::Delaunay),
        geometry(Question::Tsp),
        sort(AnswerOrder::Ascending),
        sort(AnswerOrder::Scrambled),
    ] {
        let draw = |seed| {
            let mut random = Random::new(seed, "pointing");
            (3..8)
                .map(|n| task.get().sample(n, &mut random))
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        for (n, example) in (3..8).zip(draw(3)) {
            assert_eq!(example.inputs.len(), n * task.get().dim());
            assert!(example.answer.iter().all(|&i| i < n));
            if let PointingTask::Geometry(g) = &task {
                let points: Vec<Point> = example
                    .inputs
                    .chunks(2)
                    .map(|p| [f64::from(p[0]), f64::from(p[1])])
                    .collect();
                assert_eq!(example.answer, g.question.answer(&points));
            }
        }
    }
    // A scrambled answer is the same permutation of ranks every time.
    let ranks = |seed| {
        let mut random = Random::new(seed, "ranks");
        let example = sort(AnswerOrder::Scrambled).get().sample(6, &mut random);
        let rank = |i: usize| {
            let x = &example.inputs;
            x.iter().filter(|&&y| y < x[i]).count()
        };
        example.answer.iter().map(|&i| rank(i)).collect::<Vec<_>>()
    };
    assert_eq!(ranks(1), ranks(2));
    assert!(!ranks(1).is_sorted());
}
