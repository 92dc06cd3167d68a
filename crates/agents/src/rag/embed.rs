//! Texts to vectors, for dense retrieval and for memories: the seam, MiniLM behind it, and hashed words
//! for when there is no model.

use crate::chat::model::{Ability, Call, ChatError, ChatModel};
use longspan_nn::model::TextEncoder;
use longspan_nn::model::bert::EncoderError;
use std::sync::Arc;

/// Why there are no vectors.
#[derive(Debug, thiserror::Error)]
pub enum EmbedError {
    /// The encoder failed.
    #[error("the embedder: {0}")]
    Encoder(Box<EncoderError>),
    /// The endpoint failed.
    #[error("the embedder: {0}")]
    Chat(#[from] ChatError),
    /// Vectors of another length than said.
    #[error("the embedder {id} gave {found} numbers for {texts} texts, expected {expected}")]
    Length {
        /// Which embedder.
        id: String,
        /// Numbers given.
        found: usize,
        /// Texts given.
        texts: usize,
        /// Numbers expected.
        expected: usize,
    },
}

impl From<EncoderError> for EmbedError {
    fn from(error: EncoderError) -> Self {
        EmbedError::Encoder(Box::new(error))
    }
}

/// What a text is for: some embedders want other words before a question than before a passage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What is searched for.
    Query,
    /// What is found.
    Passage,
}

/// Texts to vectors of length 1.
pub trait Embedder: Send + Sync {
    /// Identifies what the vectors depend on: vectors of different ids are not compared.
    fn id(&self) -> String;

    /// Numbers in a vector.
    fn dim(&self) -> usize;

    /// One vector for each text, `[texts.len(), dim]`, row-major.
    ///
    /// # Errors
    /// See [`EmbedError`].
    fn embed(&self, texts: &[&str], kind: Kind) -> Result<Vec<f32>, EmbedError>;
}

/// A sentence encoder of our own engine (MiniLM) with the words it wants before queries and passages
/// (`"query: "` and `"passage: "` for e5; none for MiniLM).
pub struct SentenceEmbedder {
    encoder: TextEncoder,
    query_prefix: String,
    passage_prefix: String,
}

impl SentenceEmbedder {
    /// Without prefixes.
    pub fn new(encoder: TextEncoder) -> Self {
        Self::with_prefixes(encoder, "", "")
    }

    /// With prefixes.
    pub fn with_prefixes(encoder: TextEncoder, query: &str, passage: &str) -> Self {
        SentenceEmbedder {
            encoder,
            query_prefix: query.into(),
            passage_prefix: passage.into(),
        }
    }
}

impl Embedder for SentenceEmbedder {
    fn id(&self) -> String {
        format!(
            "bert {} {:?}",
            self.encoder.fingerprint(),
            self.passage_prefix
        )
    }

    fn dim(&self) -> usize {
        self.encoder.dim()
    }

    fn embed(&self, texts: &[&str], kind: Kind) -> Result<Vec<f32>, EmbedError> {
        let prefix = match kind {
            Kind::Query => &self.query_prefix,
            Kind::Passage => &self.passage_prefix,
        };
        if prefix.is_empty() {
            return Ok(self.encoder.embed(texts)?);
        }
        let texts: Vec<String> = texts.iter().map(|text| format!("{prefix}{text}")).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        Ok(self.encoder.embed(&texts)?)
    }
}

/// A chat model that embeds (an OpenAI-compatible endpoint).
pub struct ChatEmbedder {
    model: Arc<dyn ChatModel>,
    dim: usize,
}

impl ChatEmbedder {
    /// # Errors
    /// [`ChatError::Unsupported`] if the model does not embed or does not say how long its vectors are.
    pub fn new(model: Arc<dyn ChatModel>) -> Result<Self, ChatError> {
        model.card().need(Ability::Embed)?;
        let dim = model.card().embedding_dim;
        let dim = dim.ok_or_else(|| ChatError::Unsupported {
            model: model.card().name.clone(),
            ability: Ability::Embed,
        })?;
        Ok(ChatEmbedder { model, dim })
    }
}

impl Embedder for ChatEmbedder {
    fn id(&self) -> String {
        format!("chat {}", self.model.card().fingerprint)
    }

    fn dim(&self) -> usize {
        self.dim
    }

    fn embed(&self, texts: &[&str], _: Kind) -> Result<Vec<f32>, EmbedError> {
        let owned: Vec<String> = texts.iter().map(|text| (*text).to_string()).collect();
        let reply = self.model.embed(&owned, &Call::default())?;
        let mut vectors = reply.vectors.concat();
        if vectors.len() != texts.len() * self.dim {
            return Err(EmbedError::Length {
                id: self.id(),
                found: vectors.len(),
                texts: texts.len(),
                expected: texts.len() * self.dim,
            });
        }
        vectors.chunks_exact_mut(self.dim).for_each(to_unit);
        Ok(vectors)
    }
}

/// Counts of words, hashed into `dim` numbers with a sign: needs no model and knows no synonyms.
#[derive(Clone, Copy, Debug)]
pub struct HashedWords {
    /// Numbers in a vector.
    pub dim: usize,
}

impl Default for HashedWords {
    fn default() -> Self {
        HashedWords { dim: 512 }
    }
}

impl Embedder for HashedWords {
    fn id(&self) -> String {
        format!("hashed words {}", self.dim)
    }

    fn dim(&self) -> usize {
        self.dim
    }

    fn embed(&self, texts: &[&str], _: Kind) -> Result<Vec<f32>, EmbedError> {
        let mut out = vec![0f32; texts.len() * self.dim];
        for (text, vector) in texts.iter().zip(out.chunks_exact_mut(self.dim)) {
            let lower = text.to_lowercase();
            let words = lower.split(|c: char| !c.is_alphanumeric());
            for word in words.filter(|word| !word.is_empty()) {
                let hash = blake3::hash(word.as_bytes());
                let bits =
                    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes"));
                // Long words tell texts apart better than short ones.
                let weight = (word.chars().count() as f32).min(8.0);
                let sign = if bits >> 63 == 0 { 1.0 } else { -1.0 };
                vector[(bits % self.dim as u64) as usize] += sign * weight;
            }
            to_unit(vector);
        }
        Ok(out)
    }
}

/// Scales to length 1; nothing stays nothing.
pub(crate) fn to_unit(vector: &mut [f32]) {
    let norm = vector.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
    let scale = (1.0 / norm.sqrt().max(1e-12)) as f32;
    vector.iter_mut().for_each(|x| *x *= scale);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashed_words_know_texts_by_their_words() {
        let words = HashedWords::default();
        let texts = [
            "The river rises.",
            "river the RISES",
            "a tax on windows",
            "",
        ];
        let vectors = words.embed(&texts, Kind::Passage).unwrap();
        let dot = |a: usize, b: usize| -> f32 {
            let row = |i: usize| &vectors[i * words.dim..(i + 1) * words.dim];
            row(a).iter().zip(row(b)).map(|(a, b)| a * b).sum()
        };
        assert!((dot(0, 1) - 1.0).abs() < 1e-6 && (dot(2, 2) - 1.0).abs() < 1e-6);
        assert!(dot(0, 2).abs() < 0.5 && dot(3, 3) == 0.0);
    }
}
