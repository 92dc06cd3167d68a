//! LoCoV1 (paper 48, arXiv 2402.07440): search among long documents in twelve data sets, measured by nDCG@10. For
//! comparing encoders of long texts, with BM25 as the yardstick that needs no model.

pub mod bm25;
mod task;

pub use task::tasks;

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::{Deserialize, Serialize};

use super::dataset::{Row, Source};
use crate::error::{EvalError, Result};
use crate::metric::ndcg::{ndcg, rank, recall, reciprocal_rank};
use crate::python::Random;

/// The twelve data sets.
pub const DATA_SETS: [&str; 12] = [
    "summ_screen_fd",
    "gov_report",
    "qmsum",
    "qasper_title",
    "qasper_abstract",
    "multifieldqa",
    "2wikimqa",
    "passage_retrieval",
    "courtlistener_HTML",
    "courtlistener_Plain_Text",
    "legal_case_reports",
    "stackoverflow",
];

/// Results looked at for each query.
const DEPTH: usize = 1000;

/// A query with the ids of the passages that answer it.
#[derive(Clone, Debug, PartialEq)]
pub struct Query {
    pub qid: String,
    pub query: String,
    pub answer_pids: Vec<String>,
}

/// A document.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    pub pid: String,
    pub passage: String,
}

/// One data set of one split.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Corpus {
    pub queries: Vec<Query>,
    pub documents: Vec<Document>,
}

#[derive(Deserialize)]
struct QueryRow {
    qid: String,
    query: String,
    answer_pids: Answers,
    dataset: String,
    split: String,
}

/// A list of ids, or a list written as text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Answers {
    List(Vec<String>),
    One(String),
}

#[derive(Deserialize)]
struct DocumentRow {
    pid: String,
    passage: Option<String>,
    dataset: String,
    split: String,
}

fn ids(answers: Answers) -> Vec<String> {
    match answers {
        Answers::List(list) => list,
        Answers::One(text) => {
            match serde_json::from_str::<Vec<String>>(&text.replace('\'', "\"")) {
                Ok(list) => list,
                Err(_) => vec![text],
            }
        }
    }
}

/// Reads `LoCoV1-Documents.jsonl` and `LoCoV1-Queries.jsonl` of a folder: data set to corpus, of one split ("train" or
/// "test"). Documents without a passage, and queries all of whose documents are gone, are left out.
///
/// # Errors
/// Missing files, bad rows, queries whose documents are unknown, or no row of the split.
pub fn read(data: &Source<'_>, split: &str) -> Result<BTreeMap<String, Corpus>> {
    let names = |table: &str| {
        vec![
            format!("LoCoV1-{table}.jsonl"),
            format!("{}.jsonl", table.to_lowercase()),
            format!("LoCoV1-{table}/{split}.jsonl"),
        ]
    };
    let mut all: BTreeMap<String, Corpus> = BTreeMap::new();
    let mut empty: HashSet<(String, String)> = HashSet::new();
    for row in data.rows(&names("Documents"))? {
        let parsed: DocumentRow = row.parse()?;
        if parsed.split != split {
            continue;
        }
        match parsed.passage {
            Some(passage) => all
                .entry(parsed.dataset)
                .or_default()
                .documents
                .push(Document {
                    pid: parsed.pid,
                    passage,
                }),
            None => {
                empty.insert((parsed.dataset, parsed.pid));
            }
        }
    }
    let known: HashMap<String, HashSet<String>> = all
        .iter()
        .map(|(name, corpus)| {
            let pids = corpus.documents.iter().map(|d| d.pid.clone());
            (name.clone(), pids.collect())
        })
        .collect();
    for row in data.rows(&names("Queries"))? {
        let parsed: QueryRow = row.parse()?;
        if parsed.split != split {
            continue;
        }
        add_query(&mut all, &known, &empty, &row, parsed)?;
    }
    all.retain(|_, corpus| !corpus.queries.is_empty());
    if all.is_empty() {
        return Err(EvalError::Input(format!(
            "loco: found no query of split `{split}`"
        )));
    }
    Ok(all)
}

fn add_query(
    all: &mut BTreeMap<String, Corpus>,
    known: &HashMap<String, HashSet<String>>,
    empty: &HashSet<(String, String)>,
    row: &Row,
    parsed: QueryRow,
) -> Result<()> {
    let mut answer_pids = ids(parsed.answer_pids);
    let set = parsed.dataset;
    answer_pids.retain(|pid| !empty.contains(&(set.clone(), pid.clone())));
    if answer_pids.is_empty() {
        return Ok(());
    }
    let pids = known.get(&set);
    if let Some(unknown) = answer_pids
        .iter()
        .find(|&pid| pids.is_none_or(|pids| !pids.contains(pid)))
    {
        return Err(row.wrong(format!(
            "found answer {unknown}, which is no document of {set}"
        )));
    }
    if let Some(corpus) = all.get_mut(&set) {
        corpus.queries.push(Query {
            qid: parsed.qid,
            query: parsed.query,
            answer_pids,
        });
    }
    Ok(())
}

/// Scores documents for a query: higher is better.
pub trait Searcher: Send + Sync {
    /// One score a document, in their order. NaN counts as -1.
    ///
    /// # Errors
    /// What the encoder cannot do.
    fn scores(&self, query: &str) -> Result<Vec<f64>>;
}

/// Cosine search over embeddings.
pub struct Cosine<E> {
    /// Unit vectors of the documents.
    documents: Vec<Vec<f32>>,
    embed: E,
}

/// Cuts a text into chunks.
pub type Chunker = dyn Fn(&str) -> Vec<String>;

impl<E: Fn(&str) -> Result<Vec<f32>>> Cosine<E> {
    /// Embeds all documents. With `chunks`, a document is the mean of the embeddings of its chunks.
    ///
    /// # Errors
    /// Those of the encoder.
    pub fn new(documents: &[Document], embed: E, chunks: Option<&Chunker>) -> Result<Self> {
        let vectors = embedded(documents, &embed, chunks)?;
        Ok(Cosine {
            documents: vectors,
            embed,
        })
    }

    /// The same for encoders that want other words before a passage than before a query.
    ///
    /// # Errors
    /// Those of the encoder.
    pub fn with_passages(
        documents: &[Document],
        passage: impl Fn(&str) -> Result<Vec<f32>>,
        query: E,
        chunks: Option<&Chunker>,
    ) -> Result<Self> {
        Ok(Cosine {
            documents: embedded(documents, &passage, chunks)?,
            embed: query,
        })
    }
}

/// Unit vectors of documents.
fn embedded(
    documents: &[Document],
    embed: &dyn Fn(&str) -> Result<Vec<f32>>,
    chunks: Option<&Chunker>,
) -> Result<Vec<Vec<f32>>> {
    let vectors = documents.iter().map(|document| {
        let Some(chunks) = chunks else {
            return embed(&document.passage);
        };
        let chunks = chunks(&document.passage);
        let mut mean: Vec<f32> = Vec::new();
        for chunk in &chunks {
            let vector = embed(chunk)?;
            mean.resize(vector.len(), 0.0);
            let weight = 1.0 / chunks.len() as f32;
            mean.iter_mut()
                .zip(vector)
                .for_each(|(m, v)| *m += v * weight);
        }
        Ok(mean)
    });
    let vectors: Vec<Vec<f32>> = vectors.collect::<Result<_>>()?;
    Ok(vectors.into_iter().map(unit).collect())
}

/// A vector of length 1 in the same direction; NaN for a vector of zeros.
fn unit(mut vector: Vec<f32>) -> Vec<f32> {
    let norm = vector
        .iter()
        .map(|v| f64::from(*v).powi(2))
        .sum::<f64>()
        .sqrt();
    vector
        .iter_mut()
        .for_each(|v| *v = (f64::from(*v) / norm) as f32);
    vector
}

impl<E: Fn(&str) -> Result<Vec<f32>> + Send + Sync> Searcher for Cosine<E> {
    fn scores(&self, query: &str) -> Result<Vec<f64>> {
        let query = unit((self.embed)(query)?);
        let dot = |d: &Vec<f32>| {
            d.iter()
                .zip(&query)
                .map(|(a, b)| f64::from(*a) * f64::from(*b))
                .sum::<f64>()
        };
        Ok(self.documents.iter().map(dot).collect())
    }
}

/// Mean scores of a data set's queries, 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    pub queries: usize,
    pub ndcg_at_1: f64,
    pub ndcg_at_3: f64,
    pub ndcg_at_5: f64,
    pub ndcg_at_10: f64,
    pub ndcg_at_100: f64,
    pub mrr_at_10: f64,
    pub recall_at_10: f64,
    pub recall_at_100: f64,
}

/// Searches with every query. A document whose id is that of the query is skipped; the first thousand count.
///
/// # Errors
/// Those of the searcher, or a searcher that does not score every document.
pub fn evaluate(corpus: &Corpus, searcher: &dyn Searcher) -> Result<Figures> {
    let mut sum = Figures::default();
    for query in &corpus.queries {
        let scores = searcher.scores(&query.query)?;
        if scores.len() != corpus.documents.len() {
            return Err(EvalError::Target(format!(
                "loco: found {} scores for {} documents",
                scores.len(),
                corpus.documents.len()
            )));
        }
        let answers: HashSet<&str> = query.answer_pids.iter().map(String::as_str).collect();
        let order = rank(&scores);
        let ranked = order.iter().map(|&i| corpus.documents[i].pid.as_str());
        let one = row_scores(ranked, &query.qid, &answers);
        sum.each(&one, |sum, one| sum + one);
    }
    let n = corpus.queries.len().max(1) as f64;
    sum.each(&Figures::default(), |sum, _| sum / n);
    sum.queries = corpus.queries.len();
    Ok(sum)
}

impl Figures {
    fn each(&mut self, other: &Figures, f: impl Fn(f64, f64) -> f64) {
        for (a, b) in [
            (&mut self.ndcg_at_1, other.ndcg_at_1),
            (&mut self.ndcg_at_3, other.ndcg_at_3),
            (&mut self.ndcg_at_5, other.ndcg_at_5),
            (&mut self.ndcg_at_10, other.ndcg_at_10),
            (&mut self.ndcg_at_100, other.ndcg_at_100),
            (&mut self.mrr_at_10, other.mrr_at_10),
            (&mut self.recall_at_10, other.recall_at_10),
            (&mut self.recall_at_100, other.recall_at_100),
        ] {
            *a = f(*a, b);
        }
    }
}

/// The figures of one ranking of document ids, best first. The id `qid`, the query's own, is skipped; the first
/// thousand count.
pub fn row_scores<'a>(
    ranked: impl Iterator<Item = &'a str>,
    qid: &str,
    answers: &HashSet<&str>,
) -> Figures {
    let relevant: Vec<bool> = ranked
        .filter(|&pid| pid != qid)
        .take(DEPTH)
        .map(|pid| answers.contains(pid))
        .collect();
    let total = answers.len();
    let at = |k| ndcg(&relevant, total, k);
    Figures {
        queries: 1,
        ndcg_at_1: at(1),
        ndcg_at_3: at(3),
        ndcg_at_5: at(5),
        ndcg_at_10: at(10),
        ndcg_at_100: at(100),
        mrr_at_10: reciprocal_rank(&relevant, 10),
        recall_at_10: recall(&relevant, total, 10),
        recall_at_100: recall(&relevant, total, 100),
    }
}

/// The benchmark's score: the plain mean of the data sets' nDCG@10, 0 to 100. `None` without data sets.
pub fn average(by_data_set: &BTreeMap<String, Figures>) -> Option<f64> {
    let n = by_data_set.len() as f64;
    let sum: f64 = by_data_set.values().map(|f| f.ndcg_at_10).sum();
    (n > 0.0).then(|| 100.0 * sum / n)
}

/// Needle documents: `passages` texts in a row, one of them with the fact a query asks for, its place swept evenly from
/// first to last over the documents. Facts are made from templates, so that no two documents answer one query.
pub fn needles(passages: &[String], documents: usize, per_document: usize, seed: u64) -> Corpus {
    let mut random = Random::from_text(&format!("loco {seed}"));
    let mut corpus = Corpus::default();
    if passages.is_empty() || per_document == 0 {
        return corpus;
    }
    for index in 0..documents {
        let place = index % per_document;
        let code = format!("{:06X}", random.getrandbits(24));
        let (pid, qid) = (format!("needle-{index}"), format!("query-{index}"));
        let mut texts: Vec<String> = (0..per_document)
            .map(|_| passages[random.below(passages.len() as u64) as usize].clone())
            .collect();
        texts[place] = format!(
            "{} The archive number of shipment {index} is {code}.",
            texts[place]
        );
        corpus.documents.push(Document {
            pid: pid.clone(),
            passage: texts.join("\n\n"),
        });
        corpus.queries.push(Query {
            qid,
            query: format!("Which document has the archive number of shipment {index}, {code}?"),
            answer_pids: vec![pid],
        });
    }
    corpus
}
