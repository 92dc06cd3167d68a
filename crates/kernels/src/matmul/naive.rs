//! The oracle of every product: a triple loop in f64.

/// `out[m, rows] = x[m, cols] . weights[rows, cols]^T`, summed in f64.
///
/// # Panics
/// When a slice's length does not fit the shapes.
pub fn matmul_naive(
    weights: &[f32],
    rows: usize,
    cols: usize,
    x: &[f32],
    m: usize,
    out: &mut [f32],
) {
    assert_eq!(
        (weights.len(), x.len(), out.len()),
        (rows * cols, m * cols, m * rows)
    );
    for (x, out) in x.chunks(cols).zip(out.chunks_mut(rows.max(1))) {
        for (weights, out) in weights.chunks(cols).zip(out) {
            let products = x
                .iter()
                .zip(weights)
                .map(|(&x, &w)| f64::from(x) * f64::from(w));
            *out = products.sum::<f64>() as f32;
        }
    }
}
