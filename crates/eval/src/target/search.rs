//! Search as a target: documents ranked for a query, by words (BM25) or by the vectors of an embedder. For comparing
//! encoders of long texts (LoCoV1).

use super::{Cost, Output, Target};
use crate::bench::loco::{Cosine, Document, Searcher, bm25::Bm25};
use crate::count::{Counter, Words};
use crate::error::{EvalError, Result};
use crate::metric::ndcg::rank;
use crate::task::{Documents, Sample, Work};
use longspan_agents::rag::embed::{EmbedError, Embedder, Kind};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Why a target that writes gives no ranking.
pub const NO_SEARCH: &str = "this target does not search; name a searcher with --search";

/// Ids of a reply: what nDCG@100 needs, and one for the query's own document.
const SHOWN: usize = 101;

/// How documents are ranked.
#[derive(Clone)]
pub enum SearchBy {
    /// By words.
    Bm25,
    /// By the cosine of vectors.
    Vectors {
        /// Texts to vectors.
        embedder: Arc<dyn Embedder>,
        /// A document is the mean of the vectors of pieces of this many words; None = one vector, of what the encoder
        /// reads of it.
        pieces: Option<usize>,
    },
}

/// See the module's text.
pub struct Search {
    by: SearchBy,
    name: String,
    indexes: Mutex<HashMap<String, Arc<dyn Searcher>>>,
}

impl Search {
    /// `name` is the searcher's name in reports.
    pub fn new(by: SearchBy, name: &str) -> Search {
        Search {
            by,
            name: name.into(),
            indexes: Mutex::default(),
        }
    }

    fn index(&self, documents: &Documents) -> Result<Arc<dyn Searcher>> {
        let mut indexes = self.indexes.lock().unwrap_or_else(|p| p.into_inner());
        if let Some(known) = indexes.get(documents.digest()) {
            return Ok(Arc::clone(known));
        }
        let index: Arc<dyn Searcher> = match &self.by {
            SearchBy::Bm25 => Arc::new(Bm25::new(&documents.list)),
            SearchBy::Vectors { embedder, pieces } => {
                Arc::new(vectors(embedder, *pieces, &documents.list)?)
            }
        };
        indexes.insert(documents.digest().into(), Arc::clone(&index));
        Ok(index)
    }
}

fn failed(error: EmbedError) -> EvalError {
    EvalError::Target(error.to_string())
}

type Embed = Box<dyn Fn(&str) -> Result<Vec<f32>> + Send + Sync>;

fn vectors(
    embedder: &Arc<dyn Embedder>,
    pieces: Option<usize>,
    documents: &[Document],
) -> Result<Cosine<Embed>> {
    let passage = |text: &str| embedder.embed(&[text], Kind::Passage).map_err(failed);
    let chunker = pieces.map(|words| {
        move |text: &str| {
            let all: Vec<&str> = text.split_whitespace().collect();
            let pieces: Vec<String> = all.chunks(words.max(1)).map(|p| p.join(" ")).collect();
            // A document of no words is still a document.
            if pieces.is_empty() {
                vec![String::new()]
            } else {
                pieces
            }
        }
    });
    let chunks = chunker.as_ref().map(|c| c as &crate::bench::loco::Chunker);
    let for_queries = Arc::clone(embedder);
    let query: Embed =
        Box::new(move |text| for_queries.embed(&[text], Kind::Query).map_err(failed));
    Cosine::with_passages(documents, passage, query, chunks)
}

impl Target for Search {
    fn model(&self) -> String {
        self.name.clone()
    }

    fn policy(&self) -> String {
        match &self.by {
            SearchBy::Vectors {
                pieces: Some(words),
                ..
            } => format!("mean of {words} words"),
            _ => "-".into(),
        }
    }

    fn identity(&self) -> Option<String> {
        Some(match &self.by {
            SearchBy::Bm25 => "bm25 k1 0.9 b 0.4".into(),
            SearchBy::Vectors { embedder, pieces } => {
                format!("cosine {} pieces {pieces:?}", embedder.id())
            }
        })
    }

    fn counter(&self) -> &dyn Counter {
        &Words
    }

    fn run(&self, sample: &Sample, _seed: u64) -> Result<Output> {
        let mut output = Output {
            finish: "stop".into(),
            ..Output::default()
        };
        let Work::Search { documents } = &sample.work else {
            output.error = Some("a searcher ranks documents, it writes nothing".into());
            return Ok(output);
        };
        let start = Instant::now();
        let index = self.index(documents)?;
        let query = sample.prompt.text();
        let scores = index.scores(&query)?;
        let best: Vec<&str> = rank(&scores)
            .into_iter()
            .take(SHOWN)
            .map(|at| documents.list[at].pid.as_str())
            .collect();
        output.text = serde_json::Value::from(best).to_string();
        output.tokens_in = Words.count(&query)?;
        output.cost = Cost {
            decode_s: start.elapsed().as_secs_f64(),
            ..Cost::default()
        };
        Ok(output)
    }
}
