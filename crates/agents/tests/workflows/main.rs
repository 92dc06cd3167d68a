//! Workflows over models that follow rules: what is asked, in which order, and what happens when work is cut short.

mod chain;
mod longer;

fn filler(n: usize) -> String {
    (0..n)
        .map(|i| format!("The sea was calm on day {i}. "))
        .collect()
}
