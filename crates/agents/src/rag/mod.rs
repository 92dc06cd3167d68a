//! Retrieval and answers from it: documents cut into passages, an index on disk, BM25, dense and hybrid
//! retrieval, the order of passages in the prompt. Paper 17, Long-Context LLMs Meet RAG, arXiv 2410.05983.

pub mod answer;
pub mod chunk;
pub mod embed;
pub mod index;
pub mod negatives;
pub mod prompt;
pub mod reorder;
pub mod retrieve;
pub mod study;

pub use answer::{RagAnswer, RagConfig, RagError, answer, answer_from};
pub use chunk::ChunkConfig;
pub use embed::{Embedder, HashedWords, SentenceEmbedder};
pub use index::{Hit, Index, IndexError, Progress, Retriever, Updated};
pub use reorder::Order;
pub use retrieve::Bm25Config;
