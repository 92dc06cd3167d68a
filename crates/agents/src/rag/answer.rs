//! Questions answered from retrieved passages: index, retrieve, drop what does not fit, order, ask. For
//! documents far longer than a model's window. Long-Context LLMs Meet RAG, arXiv 2410.05983.

use super::chunk::ChunkConfig;
use super::embed::Embedder;
use super::index::{Hit, Index, IndexError, Progress, Retriever};
use super::prompt::{Shown, pack};
use super::reorder::Order;
use super::retrieve::Bm25Config;
use crate::chat::model::{Call, ChatError, ChatModel, OnText, Reply, Request};
use longspan_data::document::Document;
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;

/// Retrieval and prompt. The defaults are the paper's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RagConfig {
    /// Passages retrieved.
    pub k: usize,
    /// Their order in the prompt: `rank`, `ends` (retrieval reordering), `reverse`, `random:SEED`.
    pub order: Order,
    /// `bm25`, `dense` or `hybrid`.
    pub retriever: Retriever,
    /// How documents are cut.
    pub chunk: ChunkConfig,
    /// Constants of BM25.
    pub bm25: Bm25Config,
    /// Most tokens of the answer.
    pub max_tokens: usize,
    /// Most tokens of prompt and answer; none: the model's window.
    pub window: Option<usize>,
}

impl Default for RagConfig {
    fn default() -> Self {
        RagConfig {
            k: 40,
            order: Order::Ends,
            retriever: Retriever::Hybrid,
            chunk: ChunkConfig::default(),
            bm25: Bm25Config::default(),
            max_tokens: 256,
            window: None,
        }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum RagError {
    /// Indexing or retrieval.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The model.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// An option.
    #[error("rag: {option} is {found}, expected {expected}")]
    Option {
        /// Its name.
        option: &'static str,
        /// Its value.
        found: String,
        /// The values that make sense.
        expected: &'static str,
    },
}

/// An answer and what it rests on.
#[derive(Clone, Debug)]
pub struct RagAnswer {
    /// The model's reply.
    pub reply: Reply,
    /// The passages, best first; those after the first `order.len()` did not fit.
    pub hits: Vec<Hit>,
    /// `order[position]`: rank (from 0) of the passage at this place of the prompt.
    pub order: Vec<usize>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
}

/// Answers a question about documents: builds an index of them in memory, then [`answer_from`] it.
/// Without an embedder, `retriever` must be bm25.
///
/// # Errors
/// See [`RagError`].
pub fn answer(
    model: &dyn ChatModel,
    documents: &[Document],
    question: &str,
    config: &RagConfig,
    embedder: Option<&dyn Embedder>,
    call: &Call,
    on_text: OnText<'_>,
) -> Result<RagAnswer, RagError> {
    let mut index = Index::in_memory(config.chunk)?;
    let embedder = embedder.filter(|_| config.retriever != Retriever::Bm25);
    index.add(
        documents,
        embedder,
        &mut |_: Progress| match call.cancelled() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        },
    )?;
    answer_from(model, &index, question, config, embedder, call, on_text)
}

/// Answers a question from an index.
///
/// # Errors
/// See [`RagError`].
pub fn answer_from(
    model: &dyn ChatModel,
    index: &Index,
    question: &str,
    config: &RagConfig,
    embedder: Option<&dyn Embedder>,
    call: &Call,
    on_text: OnText<'_>,
) -> Result<RagAnswer, RagError> {
    if config.k == 0 {
        return Err(RagError::Option {
            option: "k",
            found: "0".into(),
            expected: "at least 1",
        });
    }
    let hits = index.search(question, config.k, config.retriever, &config.bm25, embedder)?;
    let shown: Vec<Shown> = (hits.iter())
        .map(|hit| Shown {
            title: &hit.title,
            text: &hit.text,
        })
        .collect();
    let window = match (config.window, model.card().window) {
        (Some(asked), Some(own)) => asked.min(own),
        (asked, own) => asked.or(own).unwrap_or(usize::MAX),
    };
    let budget = window.saturating_sub(config.max_tokens);
    let packed = pack(model, &shown, question, config.order, budget)?;
    let request = Request::user(packed.text).max_tokens(config.max_tokens);
    let reply = model.reply(&request, &call.step("rag", "answer"), on_text)?;
    Ok(RagAnswer {
        reply,
        hits,
        order: packed.order,
        prompt_tokens: packed.tokens,
    })
}
