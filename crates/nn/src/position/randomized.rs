//! Randomised positions: training on gaps of random width teaches a model distances it never reads.
//!
//! For those who fine-tune a rotary model for longer inputs (Giraffe, arXiv 2308.10882). One draw serves
//! all layers, queries and keys of a sequence; evaluation uses the plain positions 0, 1, 2, ...

/// Positions of a sequence from uniform draws in [0, 1), one per token: `[tokens] -> [tokens]`.
///
/// Steps are uniform in [`eps`, 2); the walk is shrunk if it would end beyond the number of tokens. The
/// first position is the first step, not 0. The paper asks for a small `eps` above 0, its code uses 0.
pub fn randomized_positions(uniform: &[f32], eps: f32) -> Vec<f32> {
    let mut reached = 0.0f64;
    let mut positions: Vec<f32> = uniform
        .iter()
        .map(|u| {
            reached += f64::from(eps) + f64::from(*u) * (2.0 - f64::from(eps));
            reached as f32
        })
        .collect();
    let tokens = uniform.len() as f32;
    if let Some(&last) = positions.last()
        && last > tokens
    {
        let shrink = tokens / last;
        for position in &mut positions {
            *position *= shrink;
        }
    }
    positions
}
