//! Perplexity figures over documents, from stored likelihoods.

use super::sliding;
use crate::stats::{self, Estimate};
use crate::task::Likelihood;

/// Figures over all scored tokens of all documents.
#[derive(Clone, Debug, PartialEq)]
pub struct Figures {
    /// Tokens scored.
    pub tokens: usize,
    /// Mean nll, nats per token, with its error over documents.
    pub nll: Estimate,
    /// exp of the mean nll over all tokens, with the interval's ends mapped likewise.
    pub ppl: Estimate,
    /// Mean of the documents' own perplexities.
    pub document_ppl: f64,
    /// Bits per byte of the scored text.
    pub bits_per_byte: f64,
    /// exp of the summed nll per word.
    pub word_ppl: f64,
}

/// Tokens of a block of the bootstrap.
const BLOCK: usize = 1000;

/// Figures over documents; each likelihood is one document.
pub fn figures(documents: &[&Likelihood]) -> Figures {
    let (mut sum, mut tokens, mut bytes, mut words) = (0.0f64, 0, 0, 0);
    let mut blocks = Vec::new();
    let mut per_document = Vec::new();
    for document in documents {
        let losses: Vec<f64> = document
            .nll
            .iter()
            .flatten()
            .map(|&x| f64::from(x))
            .collect();
        let total: f64 = losses.iter().sum();
        sum += total;
        tokens += losses.len();
        bytes += document.bytes;
        words += document.words;
        blocks.extend(
            losses
                .chunks(BLOCK)
                .map(|b| (b.iter().sum::<f64>(), b.len())),
        );
        per_document.push((total, losses.len()));
    }
    let mean = sum / tokens as f64;
    // Ratio estimate: the error of Σ nll / Σ tokens over documents.
    let count = per_document.len();
    let se = (count > 1).then(|| {
        let squares: f64 = per_document
            .iter()
            .map(|(total, n)| (total - mean * *n as f64).powi(2))
            .sum();
        (count as f64 / (count - 1) as f64 * squares).sqrt() / tokens as f64
    });
    let interval = stats::bootstrap(&blocks);
    let nll = Estimate {
        value: mean,
        se,
        interval,
        n: tokens,
        clusters: count,
    };
    let ppl = Estimate {
        value: mean.exp(),
        se: se.map(|se| se * mean.exp()),
        interval: interval.map(|(low, high)| (low.exp(), high.exp())),
        ..nll
    };
    let documents_ppl: Vec<f64> = per_document
        .iter()
        .filter(|(_, n)| *n > 0)
        .map(|(total, n)| (total / *n as f64).exp())
        .collect();
    Figures {
        tokens,
        nll,
        ppl,
        document_ppl: documents_ppl.iter().sum::<f64>() / documents_ppl.len() as f64,
        bits_per_byte: sum / (std::f64::consts::LN_2 * bytes as f64),
        word_ppl: (sum / words as f64).exp(),
    }
}

/// Perplexity as Hugging Face's guide takes it (`hf`): the mean loss of each sliding window, weighted by the tokens that
/// the window adds, the first window's first token included although it has no loss. Differs from [`Figures::ppl`] a
/// little. None for impossible windows.
pub fn of_window_means(documents: &[&Likelihood], window: usize, stride: usize) -> Option<f64> {
    let (mut sum, mut weight) = (0.0, 0.0);
    for document in documents {
        let held = window - usize::from(document.bos).min(window);
        let plan = sliding(document.nll.len(), window, stride.min(held), document.bos).ok()?;
        let mut previous = 0;
        for w in plan {
            let losses = document.nll[w.end - w.take..w.end].iter().flatten();
            let (total, count) = losses.fold((0.0, 0), |(sum, n), &x| (sum + f64::from(x), n + 1));
            let added = (w.end - previous) as f64;
            if count > 0 {
                sum += total / f64::from(count) * added;
            }
            weight += added;
            previous = w.end;
        }
    }
    (weight > 0.0).then(|| (sum / weight).exp())
}

/// Edges of position buckets: 0, 16, 32, 64, ... up to `count`, which is the last.
pub fn bucket_edges(count: usize) -> Vec<usize> {
    let mut edges = vec![0];
    let mut edge = 16;
    while edge < count {
        edges.push(edge);
        edge *= 2;
    }
    edges.push(count);
    edges
}

/// Mean nll per bucket; entry i of a document is its token i + 1, which has i + 1 tokens before it.
/// Returns (first entry, one past the last, mean, tokens).
pub fn by_position(documents: &[&Likelihood]) -> Vec<(usize, usize, f64, usize)> {
    let longest = documents.iter().map(|d| d.nll.len()).max().unwrap_or(0);
    bucket_edges(longest.saturating_sub(1))
        .windows(2)
        .filter_map(|edge| {
            let mut losses = 0.0;
            let mut count = 0;
            for document in documents {
                let end = (edge[1] + 1).min(document.nll.len());
                for loss in document.nll[(edge[0] + 1).min(end)..end].iter().flatten() {
                    losses += f64::from(*loss);
                    count += 1;
                }
            }
            (count > 0).then(|| (edge[0], edge[1], losses / count as f64, count))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(nll: &[f32]) -> Likelihood {
        Likelihood {
            nll: std::iter::once(None)
                .chain(nll.iter().map(|&x| Some(x)))
                .collect(),
            bytes: 4 * nll.len(),
            words: nll.len(),
            bos: false,
        }
    }

    #[test]
    fn long_documents_count_by_their_tokens() {
        let (a, b) = (document(&[1.0; 30]), document(&[3.0; 10]));
        let figures = figures(&[&a, &b]);
        assert_eq!(figures.tokens, 40);
        assert!((figures.nll.value - 1.5).abs() < 1e-12);
        assert!((figures.ppl.value - 1.5f64.exp()).abs() < 1e-12);
        let own = (1f64.exp() + 3f64.exp()) / 2.0;
        assert!((figures.document_ppl - own).abs() < 1e-12);
        assert!((figures.bits_per_byte - 1.5 / 4.0 / std::f64::consts::LN_2).abs() < 1e-12);
    }

    #[test]
    fn a_uniform_model_has_the_vocabulary_as_perplexity() {
        let a = document(&[64f32.ln(); 100]);
        assert!((figures(&[&a]).ppl.value - 64.0).abs() < 1e-4);
        assert!((figures(&[&document(&[0.0; 9])]).ppl.value - 1.0).abs() < 1e-12);
    }

    #[test]
    fn window_means_weigh_the_first_token_too() {
        // Windows [0, 4) and [2, 6), [4, 8): 3, 2 and 2 losses, weights 4, 2, 2.
        let a = document(&[1.0, 2.0, 3.0, 4.0, 6.0, 1.0, 2.0]);
        let want: f64 = (2.0 * 4.0 + 5.0 * 2.0 + 1.5 * 2.0) / 8.0;
        let found = of_window_means(&[&a], 4, 2).unwrap();
        assert!((found - want.exp()).abs() < 1e-9, "{found}");
        // A flat text has one perplexity however it is taken.
        let flat = document(&[2.0; 50]);
        for (window, stride) in [(8, 8), (8, 3), (64, 64)] {
            let found = of_window_means(&[&flat], window, stride).unwrap();
            assert!(
                (found.ln() - 2.0).abs() < 1e-9,
                "{window} {stride}: {found}"
            );
        }
        assert_eq!(of_window_means(&[], 4, 2), None);
    }

    #[test]
    fn buckets_double_and_hold_every_token() {
        assert_eq!(bucket_edges(199), [0, 16, 32, 64, 128, 199]);
        let a = document(&(0..199).map(|i| i as f32).collect::<Vec<_>>());
        let buckets = by_position(&[&a]);
        assert_eq!(buckets.iter().map(|b| b.3).sum::<usize>(), 199);
        assert_eq!(buckets[1], (16, 32, 23.5, 16));
    }
}
