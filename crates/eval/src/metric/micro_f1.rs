//! Micro F1 from counts over a test set, with the small constants of LongICLBench's scripts.

/// Predicted, gold and right items.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub predicted: usize,
    pub gold: usize,
    pub correct: usize,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.predicted += other.predicted;
        self.gold += other.gold;
        self.correct += other.correct;
    }
}

const EPSILON: f64 = 1e-8;

impl Counts {
    /// Precision and recall with 1e-8 added below the line.
    pub fn precision_recall(self) -> (f64, f64) {
        let over = |count: usize| self.correct as f64 / (count as f64 + EPSILON);
        (over(self.predicted), over(self.gold))
    }

    /// 2PR / (P + R + 1e-8), 0 to 1.
    pub fn f1(self) -> f64 {
        let (precision, recall) = self.precision_recall();
        2.0 * precision * recall / (precision + recall + EPSILON)
    }

    /// 2PR / (P + R) (Few-NERD's script); 0 where that is 0/0.
    pub fn f1_plain(self) -> f64 {
        let (precision, recall) = self.precision_recall();
        if precision + recall == 0.0 {
            return 0.0;
        }
        2.0 * precision * recall / (precision + recall)
    }
}
