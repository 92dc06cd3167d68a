//! BM25 over whole documents (k1 = 0.9, b = 0.4, as search toolkits report it), the yardstick of LoCoV1.

use std::collections::HashMap;

use super::{Document, Searcher};
use crate::error::Result;
use crate::python::chars::{is_word, runs};

/// An index. Terms are runs of letters and digits in lower case.
pub struct Bm25 {
    /// Documents and counts of each term.
    postings: HashMap<String, Vec<(usize, usize)>>,
    /// Terms of each document.
    lengths: Vec<usize>,
    mean_length: f64,
}

const K1: f64 = 0.9;
const B: f64 = 0.4;

fn terms(text: &str) -> Vec<String> {
    let text = text.to_lowercase();
    runs(&text, is_word)
        .map(|(_, term)| term.to_string())
        .collect()
}

impl Bm25 {
    /// Indexes documents.
    pub fn new(documents: &[Document]) -> Self {
        let mut postings: HashMap<String, Vec<(usize, usize)>> = HashMap::new();
        let mut lengths = Vec::with_capacity(documents.len());
        for (index, document) in documents.iter().enumerate() {
            let mut counts: HashMap<String, usize> = HashMap::new();
            let terms = terms(&document.passage);
            lengths.push(terms.len());
            for term in terms {
                *counts.entry(term).or_default() += 1;
            }
            for (term, count) in counts {
                postings.entry(term).or_default().push((index, count));
            }
        }
        let total: usize = lengths.iter().sum();
        Bm25 {
            postings,
            mean_length: total as f64 / lengths.len().max(1) as f64,
            lengths,
        }
    }
}

impl Searcher for Bm25 {
    fn scores(&self, query: &str) -> Result<Vec<f64>> {
        let n = self.lengths.len() as f64;
        let mut scores = vec![0.0; self.lengths.len()];
        for term in terms(query) {
            let Some(list) = self.postings.get(&term) else {
                continue;
            };
            let with = list.len() as f64;
            let idf = (1.0 + (n - with + 0.5) / (with + 0.5)).ln();
            for &(document, count) in list {
                let (count, length) = (count as f64, self.lengths[document] as f64);
                let norm = K1 * (1.0 - B + B * length / self.mean_length);
                scores[document] += idf * count * (K1 + 1.0) / (count + norm);
            }
        }
        Ok(scores)
    }
}
