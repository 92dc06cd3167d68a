//! Pairwise judging: two answers, both orders, and the win rate over all games (L-Eval's judge, usable for any two
//! models).

/// The verdict of one game.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The answer shown first.
    A,
    /// The answer shown second.
    B,
    Tie,
}

/// The verdict in a judge's reply: the first of `[[A]]`, `[[B]]`, `[[C]]`, tried in this order, that occurs anywhere.
pub fn verdict(reply: &str) -> Option<Verdict> {
    let marks = [
        ("[[A]]", Verdict::A),
        ("[[B]]", Verdict::B),
        ("[[C]]", Verdict::Tie),
    ];
    marks
        .into_iter()
        .find(|(mark, _)| reply.contains(mark))
        .map(|(_, verdict)| verdict)
}

/// Games counted from the model's side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub wins: usize,
    pub losses: usize,
    pub ties: usize,
    /// Replies without a verdict: counted, not scored.
    pub errors: usize,
}

impl Tally {
    /// Adds a question's two games: the reply where the model's answer was A, and where it was B.
    pub fn add(&mut self, model_first: &str, model_second: &str) {
        for (reply, model) in [(model_first, Verdict::A), (model_second, Verdict::B)] {
            match verdict(reply) {
                None => self.errors += 1,
                Some(Verdict::Tie) => self.ties += 1,
                Some(winner) if winner == model => self.wins += 1,
                Some(_) => self.losses += 1,
            }
        }
    }

    /// The same games from the other side.
    pub fn swapped(self) -> Tally {
        Tally {
            wins: self.losses,
            losses: self.wins,
            ..self
        }
    }

    /// (wins + ties / 2) / (wins + losses + ties); `None` if no game has a verdict.
    pub fn win_rate(self) -> Option<f64> {
        let games = self.wins + self.losses + self.ties;
        (games > 0).then(|| (self.wins as f64 + 0.5 * self.ties as f64) / games as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_judge_that_always_says_a_gives_half() {
        let mut tally = Tally::default();
        for _ in 0..7 {
            tally.add("[[A]]", "it is [[A]]");
        }
        assert_eq!(tally.win_rate(), Some(0.5));
        tally.add("[[A]]", "[[B]]");
        tally.add("?", "[[C]]");
        let rates = tally.win_rate().unwrap() + tally.swapped().win_rate().unwrap();
        assert!((rates - 1.0).abs() < 1e-12 && tally.errors == 1);
        assert_eq!(Tally::default().win_rate(), None);
    }
}
