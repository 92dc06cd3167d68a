//! Geometric tasks with exact answers (paper 39, Pointer Networks): convex hull, Delaunay triangulation, shortest tour.
//!
//! Points are uniform in the unit square and answers are canonical lists of point indices. Labels come from exact
//! predicates and exact solvers, never from the sign of a rounded determinant.

pub mod delaunay;
pub mod exact;
pub mod format;
pub mod hull;
pub mod score;
pub mod tsp;

#[cfg(test)]
mod tests;

use super::pointing::{Pointing, PointingExample};
use crate::random::Random;
use exact::Point;
use serde::{Deserialize, Serialize};

/// Which question is asked about the points.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    /// The hull's vertices, counter-clockwise from the lowest index.
    Hull,
    /// Triangles as ascending triples, in the order of their incenters.
    Delaunay,
    /// A shortest tour from the first city, counter-clockwise.
    Tsp,
}

/// The tasks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Geometry {
    /// What is asked.
    pub question: Question,
}

/// n points uniform in the unit square.
pub fn random_points(n: usize, random: &mut Random) -> Vec<Point> {
    (0..n)
        .map(|_| [random.uniform(), random.uniform()])
        .collect()
}

impl Question {
    /// The canonical answer, indices from 0. Tours of more cities than can be solved exactly are Christofides' improved by
    /// 2-opt, or nearest neighbour's where Christofides refuses.
    pub fn answer(self, points: &[Point]) -> Vec<usize> {
        match self {
            Question::Hull => hull::convex_hull(points),
            Question::Delaunay => {
                delaunay::by_incenter(points, &delaunay::delaunay(points)).concat()
            }
            Question::Tsp => tsp::held_karp(points).unwrap_or_else(|_| {
                let start =
                    tsp::christofides(points).unwrap_or_else(|_| tsp::nearest_neighbour(points));
                tsp::canonical_tour(points, &tsp::two_opt(points, &start))
            }),
        }
    }
}

impl Pointing for Geometry {
    fn dim(&self) -> usize {
        2
    }

    fn ends(&self) -> bool {
        true
    }

    fn sample(&self, n: usize, random: &mut Random) -> PointingExample {
        // What the model reads is f32: the answer is that of the rounded points.
        let points: Vec<Point> = random_points(n, random)
            .into_iter()
            .map(|p| p.map(|v| f64::from(v as f32)))
            .collect();
        PointingExample {
            answer: self.question.answer(&points),
            inputs: points.iter().flatten().map(|&v| v as f32).collect(),
        }
    }
}
