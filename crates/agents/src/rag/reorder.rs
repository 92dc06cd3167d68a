//! In which order retrieved passages stand in the prompt: by rank, or with the best at both ends and the
//! worst in the middle, where long-context readers look least. For anyone who gives a model many
//! passages. Long-Context LLMs Meet RAG, arXiv 2410.05983, algorithm 2 (retrieval reordering).

use super::negatives::fisher_yates;
use longspan_data::random::Random;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The order of passages in the prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Order {
    /// The best first.
    #[default]
    Rank,
    /// d1, d3, d5, ..., d6, d4, d2: the paper's retrieval reordering.
    Ends,
    /// The best last.
    Reverse,
    /// By a seed.
    Random(u64),
}

impl Order {
    /// `order[position]` is the rank (from 0) of the passage that stands there.
    pub fn ranks(self, k: usize) -> Vec<usize> {
        match self {
            Order::Rank => (0..k).collect(),
            Order::Reverse => (0..k).rev().collect(),
            Order::Ends => {
                // Rank i from 1: position (i + 1) / 2 if odd, k + 1 - i / 2 if even.
                let mut order = vec![0; k];
                for i in 1..=k {
                    let position = if i % 2 == 1 {
                        i.div_ceil(2)
                    } else {
                        k + 1 - i / 2
                    };
                    order[position - 1] = i - 1;
                }
                order
            }
            Order::Random(seed) => {
                let mut order: Vec<usize> = (0..k).collect();
                let mut random = Random::new(seed, "order of passages");
                fisher_yates(&mut order, || random.uniform());
                order
            }
        }
    }

    /// Puts passages given by rank into this order.
    pub fn apply<T>(self, passages: Vec<T>) -> Vec<T> {
        let mut slots: Vec<Option<T>> = passages.into_iter().map(Some).collect();
        let order = self.ranks(slots.len());
        order
            .into_iter()
            .filter_map(|rank| slots[rank].take())
            .collect()
    }
}

/// Text that names no order.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("order of passages `{0}`, expected rank, ends, reverse or random:SEED")]
pub struct OrderError(String);

impl FromStr for Order {
    type Err = OrderError;

    fn from_str(text: &str) -> Result<Self, OrderError> {
        match text {
            "rank" => Ok(Order::Rank),
            "ends" => Ok(Order::Ends),
            "reverse" => Ok(Order::Reverse),
            _ => (text.strip_prefix("random:"))
                .and_then(|seed| seed.parse().ok())
                .map(Order::Random)
                .ok_or_else(|| OrderError(text.into())),
        }
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Order::Rank => f.write_str("rank"),
            Order::Ends => f.write_str("ends"),
            Order::Reverse => f.write_str("reverse"),
            Order::Random(seed) => write!(f, "random:{seed}"),
        }
    }
}

impl TryFrom<String> for Order {
    type Error = OrderError;

    fn try_from(text: String) -> Result<Self, OrderError> {
        text.parse()
    }
}

impl From<Order> for String {
    fn from(order: Order) -> String {
        order.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_is_a_bijection_that_falls_then_rises() {
        for k in 0..=200 {
            let order = Order::Ends.ranks(k);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..k).collect::<Vec<_>>());
            if k > 1 {
                assert_eq!((order[0], order[k - 1]), (0, 1));
            }
            // Ranks rise (relevance falls) to the worst, then fall.
            let worst = order.iter().position(|&rank| rank + 1 == k).unwrap_or(0);
            assert!(order[..worst].is_sorted() && order[worst..].iter().rev().is_sorted());
        }
        let passages = vec!["d1", "d2", "d3", "d4", "d5", "d6"];
        let placed = Order::Ends.apply(passages);
        assert_eq!(placed, ["d1", "d3", "d5", "d6", "d4", "d2"]);
    }

    #[test]
    fn orders_are_written_as_they_are_read() {
        for text in ["rank", "ends", "reverse", "random:7"] {
            assert_eq!(text.parse::<Order>().unwrap().to_string(), text);
        }
        for text in ["", "random", "random:x", "best"] {
            assert!(text.parse::<Order>().is_err(), "{text}");
        }
        let a = Order::Random(1).ranks(20);
        assert_ne!(a, Order::Random(2).ranks(20));
        assert_eq!(a, Order::Random(1).ranks(20));
    }
}
