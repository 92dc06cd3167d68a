//! How alike a candidate is to what earlier groups of beams hold (paper 36, Diverse Beam Search): four terms,
//! which a weighted sum composes. Larger is more alike and is penalised more.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// One measure of likeness.
#[derive(Clone, Debug, PartialEq)]
pub enum Term {
    /// 1 for every beam of an earlier group that chose the token at this step.
    Hamming,
    /// exp(-D / gamma), D = steps at which candidate and earlier beam differ, this one included.
    Cumulative {
        /// Mismatches after which the penalty has fallen to 1/e.
        gamma: f64,
    },
    /// Occurrences of the candidate's last n tokens anywhere in earlier groups' answers.
    Ngram {
        /// Tokens of an n-gram, at least 1.
        n: usize,
    },
    /// Cosine of the token's embedding with those of the tokens earlier groups chose at this step.
    Embedding,
    /// Cosine of summed embeddings: the candidate's last n tokens with every n-gram of earlier groups.
    EmbeddingNgram {
        /// Tokens of an n-gram, at least 1.
        n: usize,
    },
}

/// A weighted sum of terms: `hamming`, `cumulative:2`, `ngram:3`, `embedding`, `embedding_ngram:2`,
/// `hamming+0.3*ngram:2`.
#[derive(Clone, Debug, PartialEq)]
pub struct Diversity(pub Vec<(f64, Term)>);

impl Default for Diversity {
    fn default() -> Diversity {
        Diversity(vec![(1.0, Term::Hamming)])
    }
}

impl Diversity {
    /// True if a term needs the model's embedding.
    pub fn needs_embedding(&self) -> bool {
        let needs = |term: &Term| matches!(term, Term::Embedding | Term::EmbeddingNgram { .. });
        self.0.iter().any(|(_, term)| needs(term))
    }
}

impl FromStr for Diversity {
    type Err = String;

    fn from_str(text: &str) -> Result<Diversity, String> {
        let number = |text: &str, what: &str| {
            let value: Result<f64, _> = text.trim().parse();
            value.map_err(|_| format!("{what} is {text:?}, expected a number"))
        };
        let terms = text.split('+').map(|item| {
            let (weight, name) = match item.split_once('*') {
                Some((weight, name)) => (number(weight, "a weight")?, name),
                None => (1.0, item),
            };
            let (name, parameter) = match name.split_once(':') {
                Some((name, parameter)) => (name, Some(parameter)),
                None => (name, None),
            };
            let n = |default: usize| match parameter {
                None => Ok(default),
                Some(text) => match text.trim().parse() {
                    Ok(n) if n > 0 => Ok(n),
                    _ => Err(format!("n is {text:?}, expected a whole number above 0")),
                },
            };
            let term = match (name.trim(), parameter) {
                ("hamming", None) => Term::Hamming,
                ("embedding", None) => Term::Embedding,
                ("cumulative", _) => {
                    let gamma = parameter.map_or(Ok(1.0), |text| number(text, "gamma"))?;
                    if gamma.is_nan() || gamma <= 0.0 {
                        return Err(format!("gamma is {gamma}, expected a number above 0"));
                    }
                    Term::Cumulative { gamma }
                }
                ("ngram", _) => Term::Ngram { n: n(2)? },
                ("embedding_ngram", _) => Term::EmbeddingNgram { n: n(2)? },
                _ => {
                    return Err(format!(
                        "unknown term {item:?}; known: hamming, cumulative:GAMMA, ngram:N, embedding, embedding_ngram:N, joined by + with weights as in 0.3*ngram:2"
                    ));
                }
            };
            Ok((weight, term))
        });
        terms.collect::<Result<_, _>>().map(Diversity)
    }
}

impl fmt::Display for Diversity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (weight, term)) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("+")?;
            }
            if *weight != 1.0 {
                write!(f, "{weight}*")?;
            }
            match term {
                Term::Hamming => f.write_str("hamming")?,
                Term::Cumulative { gamma } => write!(f, "cumulative:{gamma}")?,
                Term::Ngram { n } => write!(f, "ngram:{n}")?,
                Term::Embedding => f.write_str("embedding")?,
                Term::EmbeddingNgram { n } => write!(f, "embedding_ngram:{n}")?,
            }
        }
        Ok(())
    }
}

impl Serialize for Diversity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Diversity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Diversity, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[derive(Debug)]
enum Values {
    F32(Vec<f32>),
    F64(Vec<f64>),
}

/// Rows of an embedding [vocab, dim]; cheap to share.
#[derive(Clone, Debug)]
pub struct EmbeddingTable {
    values: Arc<Values>,
    /// Length of each row.
    norms: Arc<Vec<f64>>,
    dim: usize,
}

impl EmbeddingTable {
    /// values [vocab, dim].
    pub fn from_f32(values: Vec<f32>, dim: usize) -> EmbeddingTable {
        Self::new(Values::F32(values), dim)
    }

    /// values [vocab, dim].
    pub fn from_f64(values: Vec<f64>, dim: usize) -> EmbeddingTable {
        Self::new(Values::F64(values), dim)
    }

    fn new(values: Values, dim: usize) -> EmbeddingTable {
        let elements = match &values {
            Values::F32(values) => values.len(),
            Values::F64(values) => values.len(),
        };
        let mut table = EmbeddingTable {
            values: Arc::new(values),
            norms: Arc::default(),
            dim,
        };
        let norms = (0..elements / dim.max(1)).map(|row| {
            let row = table.row(row as u32);
            row.iter().map(|x| x * x).sum::<f64>().sqrt()
        });
        table.norms = Arc::new(norms.collect());
        table
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.norms.len()
    }

    fn row(&self, token: u32) -> Vec<f64> {
        let span = token as usize * self.dim..(token as usize + 1) * self.dim;
        match &*self.values {
            Values::F32(values) => values[span].iter().map(|&x| f64::from(x)).collect(),
            Values::F64(values) => values[span].to_vec(),
        }
    }

    /// Sum of the rows of tokens [dim].
    fn sum(&self, tokens: &[u32]) -> Vec<f64> {
        let mut sum = vec![0.0; self.dim];
        for &token in tokens {
            sum.iter_mut()
                .zip(self.row(token))
                .for_each(|(s, x)| *s += x);
        }
        sum
    }

    /// Products of a vector [dim] with all rows: [vocab].
    fn products(&self, vector: &[f64]) -> Vec<f64> {
        match &*self.values {
            Values::F32(values) => {
                // Rows are f32: products in f32 lanes, sums of them in f64.
                let vector: Vec<f32> = vector.iter().map(|&x| x as f32).collect();
                let dot = |row: &[f32]| {
                    let blocks = row.chunks(16).zip(vector.chunks(16));
                    let sums = blocks
                        .map(|(a, b)| f64::from(a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>()));
                    sums.sum::<f64>()
                };
                values.chunks_exact(self.dim).map(dot).collect()
            }
            Values::F64(values) => values
                .chunks_exact(self.dim)
                .map(|row| row.iter().zip(vector).map(|(a, b)| a * b).sum())
                .collect(),
        }
    }
}

/// A beam of an earlier group, its step-t token included.
#[derive(Clone, Copy, Debug)]
pub struct Earlier<'a> {
    /// Tokens written.
    pub tokens: &'a [u32],
    /// It took part in this step; finished beams count for n-grams only.
    pub steps: bool,
}

/// What a beam's candidates are compared with.
#[derive(Clone, Copy, Debug)]
pub struct GroupView<'a> {
    /// Tokens the beam has written before this step.
    pub own: &'a [u32],
    /// The beams of all earlier groups after this step.
    pub earlier: &'a [Earlier<'a>],
    /// The embedding, if a term needs one.
    pub embedding: Option<&'a EmbeddingTable>,
    /// Count only positive cosines.
    pub clamp_negative: bool,
}

/// A measure of likeness that adds to a row of penalties [vocab].
pub trait DiversityTerm {
    /// Adds `weight` times the likeness of (beam + v) to `row[v]`, for every token v.
    fn penalise(&self, weight: f64, view: &GroupView<'_>, row: &mut [f64]);
}

/// The cosine, 0 where a vector has no length.
fn cosine(product: f64, a: f64, b: f64, clamp: bool) -> f64 {
    let cosine = if a > 0.0 && b > 0.0 {
        product / (a * b)
    } else {
        0.0
    };
    if clamp { cosine.max(0.0) } else { cosine }
}

impl DiversityTerm for Term {
    fn penalise(&self, weight: f64, view: &GroupView<'_>, row: &mut [f64]) {
        let step = view.own.len();
        let now = view.earlier.iter().filter(|beam| beam.steps);
        match self {
            Term::Hamming => {
                for token in now.filter_map(|beam| beam.tokens.get(step)) {
                    row[*token as usize] += weight;
                }
            }
            Term::Cumulative { gamma } => {
                for beam in now {
                    let Some(&token) = beam.tokens.get(step) else {
                        continue;
                    };
                    let pairs = view.own.iter().zip(beam.tokens);
                    let before = pairs.filter(|(a, b)| a != b).count() as f64;
                    let (same, other) = ((-before / gamma).exp(), (-(before + 1.0) / gamma).exp());
                    row.iter_mut().for_each(|x| *x += weight * other);
                    row[token as usize] += weight * (same - other);
                }
            }
            Term::Ngram { n } => {
                let Some(from) = (step + 1).checked_sub(*n) else {
                    return;
                };
                let context = &view.own[from..];
                for beam in view.earlier {
                    for gram in beam.tokens.windows(*n) {
                        if gram[..n - 1] == *context {
                            row[gram[n - 1] as usize] += weight;
                        }
                    }
                }
            }
            Term::Embedding => {
                let Some(table) = view.embedding else { return };
                for &token in now.filter_map(|beam| beam.tokens.get(step)) {
                    let products = table.products(&table.row(token));
                    let norm = table.norms[token as usize];
                    for (v, (x, product)) in row.iter_mut().zip(products).enumerate() {
                        *x += weight * cosine(product, table.norms[v], norm, view.clamp_negative);
                    }
                }
            }
            Term::EmbeddingNgram { n } => {
                let (Some(table), Some(from)) = (view.embedding, (step + 1).checked_sub(*n)) else {
                    return;
                };
                let context = table.sum(&view.own[from..]);
                let square: f64 = context.iter().map(|x| x * x).sum();
                // |context + e_v| for all v.
                let norms: Vec<f64> = (table.products(&context).iter().zip(&*table.norms))
                    .map(|(product, norm)| (square + 2.0 * product + norm * norm).max(0.0).sqrt())
                    .collect();
                for gram in view.earlier.iter().flat_map(|beam| beam.tokens.windows(*n)) {
                    let gram = table.sum(gram);
                    let length = gram.iter().map(|x| x * x).sum::<f64>().sqrt();
                    let shared: f64 = context.iter().zip(&gram).map(|(a, b)| a * b).sum();
                    let products = table.products(&gram);
                    for (v, (x, product)) in row.iter_mut().zip(products).enumerate() {
                        *x += weight
                            * cosine(shared + product, norms[v], length, view.clamp_negative);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips_and_mistakes_are_named() {
        for text in [
            "hamming",
            "cumulative:2.5",
            "ngram:3",
            "embedding",
            "embedding_ngram:2",
            "hamming+0.3*ngram:2",
        ] {
            let terms: Diversity = text.parse().unwrap();
            assert_eq!(terms.to_string(), text);
        }
        for (text, word) in [
            ("hamming:2", "unknown term"),
            ("ngram:0", "expected a whole number"),
            ("cumulative:-1", "gamma is -1"),
            ("x*hamming", "a weight"),
        ] {
            let error = text.parse::<Diversity>().unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }
}
