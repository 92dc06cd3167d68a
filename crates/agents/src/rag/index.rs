//! A search index of documents in one SQLite file: passages, their words (FTS5) and their vectors. Built
//! incrementally by the hash of each file, in transactions, so that a build that was stopped or killed
//! goes on where it was. Retrieval of paper 17: BM25, dense, and both fused.

mod file;

use super::chunk::ChunkConfig;
use super::embed::{EmbedError, Embedder, Kind};
use super::retrieve::{Bm25Config, fuse, top};
use file::{Known, Looked, ReadText, forget, indexed, look};
use longspan_data::document::{self, Document, DocumentError, Limits};
use longspan_kernels::elementwise::{dot, split_rows};
use longspan_kernels::pool::{Pool, SharedMut};
use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

/// Changes when the tables or what fills them change; an older index is built anew.
const VERSION: &str = "1";
/// Files read together by all cores, then written in one transaction.
const FILES_AT_ONCE: usize = 64;
/// Passages embedded together, then written in one transaction.
const PASSAGES_AT_ONCE: usize = 512;

/// Why an index cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The database.
    #[error("the index {}: {source}; delete the file to build it anew", path.display())]
    Sqlite {
        /// Its file.
        path: PathBuf,
        /// Why.
        source: rusqlite::Error,
    },
    /// The folder of the index.
    #[error("{}: {source}", path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The folder to be searched.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// The embedder.
    #[error(transparent)]
    Embed(#[from] EmbedError),
    /// Dense retrieval without vectors.
    #[error("retrieval by {0} compares vectors; give an embedder, or use bm25")]
    NoEmbedder(Retriever),
    /// The caller asked to stop; what was done is kept.
    #[error("stopped by the caller")]
    Stopped,
}

/// What ranks passages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Retriever {
    /// Words in common, rare ones first.
    Bm25,
    /// Nearness of meaning: cosine of vectors.
    Dense,
    /// Both, by reciprocal ranks.
    #[default]
    Hybrid,
}

impl std::fmt::Display for Retriever {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Retriever::Bm25 => "bm25",
            Retriever::Dense => "dense",
            Retriever::Hybrid => "hybrid",
        })
    }
}

impl std::str::FromStr for Retriever {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "bm25" => Ok(Retriever::Bm25),
            "dense" => Ok(Retriever::Dense),
            "hybrid" => Ok(Retriever::Hybrid),
            _ => Err(format!(
                "retriever `{text}`, expected bm25, dense or hybrid"
            )),
        }
    }
}

/// A passage that was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Hit {
    /// Number of the passage in the index.
    pub id: i64,
    /// The document, as named when it was added.
    pub document: String,
    /// Document and section or page.
    pub title: String,
    /// Line in the document's text, from 1.
    pub line: usize,
    /// First byte in the document's text.
    pub start: usize,
    /// One past its last byte.
    pub end: usize,
    /// The passage.
    pub text: String,
    /// What it is ranked by: a BM25 sum, a cosine, or a sum of reciprocal ranks.
    pub score: f64,
    /// Rank by BM25, from 1, if among the candidates.
    pub bm25_rank: Option<usize>,
    /// Rank by cosine, from 1, if among the candidates.
    pub dense_rank: Option<usize>,
}

/// How far a build is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Files looked at, of all.
    Files(usize, usize),
    /// Passages with a vector, of all.
    Vectors(usize, usize),
}

/// What a build found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Updated {
    /// Files in the index now.
    pub files: usize,
    /// Passages in the index now.
    pub passages: usize,
    /// Files read in this build: new, or with another content.
    pub read: usize,
    /// Bytes of text read in this build.
    pub bytes: u64,
    /// Files that are gone.
    pub removed: usize,
    /// Vectors computed in this build.
    pub embedded: usize,
    /// Files left out and why, and what was lost in reading.
    pub warnings: Vec<String>,
}

/// See the module's text.
pub struct Index {
    path: PathBuf,
    db: Connection,
    chunk: ChunkConfig,
    /// Lengths of passages in words by id, their sum, and vectors: read when first searched.
    cache: Mutex<Cache>,
}

#[derive(Default)]
struct Cache {
    lengths: Option<(HashMap<i64, u32>, f64)>,
    vectors: Option<Vectors>,
}

struct Vectors {
    ids: Vec<i64>,
    /// [ids.len(), dim]
    values: Vec<f32>,
}

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS files (
    id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, hash BLOB NOT NULL,
    size INTEGER NOT NULL, modified INTEGER NOT NULL, warnings TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS passages (
    id INTEGER PRIMARY KEY AUTOINCREMENT, file INTEGER NOT NULL, title TEXT NOT NULL, line INTEGER NOT NULL,
    first INTEGER NOT NULL, last INTEGER NOT NULL, text TEXT NOT NULL, words INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS passages_of_file ON passages (file);
CREATE TABLE IF NOT EXISTS vectors (passage INTEGER PRIMARY KEY, value BLOB NOT NULL);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(
    body, content='', contentless_delete=1, tokenize='porter unicode61 remove_diacritics 2');
CREATE VIRTUAL TABLE IF NOT EXISTS postings USING fts5vocab(words, instance);
CREATE VIRTUAL TABLE IF NOT EXISTS temp.asked USING fts5(
    body, tokenize='porter unicode61 remove_diacritics 2');
CREATE VIRTUAL TABLE IF NOT EXISTS temp.asked_words USING fts5vocab(temp, asked, row);";

impl Index {
    /// Opens or makes the index in this file. One that was cut otherwise, or by an older version, is
    /// emptied.
    ///
    /// # Errors
    /// A file that is no index, or a folder that cannot be written.
    pub fn open(path: &Path, chunk: ChunkConfig) -> Result<Index, IndexError> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|source| IndexError::Io {
                path: folder.to_path_buf(),
                source,
            })?;
        }
        Self::with(path, Connection::open(path), chunk)
    }

    /// An index in memory.
    ///
    /// # Errors
    /// When SQLite cannot.
    pub fn in_memory(chunk: ChunkConfig) -> Result<Index, IndexError> {
        let path = Path::new("in memory");
        Self::with(path, Connection::open_in_memory(), chunk)
    }

    fn with(
        path: &Path,
        db: rusqlite::Result<Connection>,
        chunk: ChunkConfig,
    ) -> Result<Index, IndexError> {
        let sqlite = |source| IndexError::Sqlite {
            path: path.to_path_buf(),
            source,
        };
        let db = db.map_err(sqlite)?;
        let made = (|| {
            db.busy_timeout(Duration::from_secs(60))?;
            // A log that a killed process leaves behind is read at the next opening.
            db.pragma_update(None, "journal_mode", "WAL")?;
            db.pragma_update(None, "synchronous", "NORMAL")?;
            db.execute_batch(SCHEMA)
        })();
        made.map_err(sqlite)?;
        let mut index = Index {
            path: path.to_path_buf(),
            db,
            chunk,
            cache: Mutex::default(),
        };
        let kind = format!("{VERSION} {}", chunk.words);
        index.reset_unless("passages", &kind, |tx| {
            tx.execute_batch("DELETE FROM files; DELETE FROM passages; DELETE FROM vectors;")?;
            tx.execute("INSERT INTO words(words) VALUES('delete-all')", [])
                .map(|_| ())
        })?;
        Ok(index)
    }

    /// Runs `reset` unless the key has this value, which it has then.
    fn reset_unless(
        &mut self,
        key: &str,
        value: &str,
        reset: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<()>,
    ) -> Result<(), IndexError> {
        self.write(|tx| {
            let found: Option<String> = tx
                .query_row("SELECT value FROM meta WHERE key = ?1", [key], |row| {
                    row.get(0)
                })
                .optional()?;
            if found.as_deref() == Some(value) {
                return Ok(());
            }
            reset(tx)?;
            tx.execute("INSERT OR REPLACE INTO meta VALUES (?1, ?2)", [key, value])
                .map(|_| ())
        })
    }

    fn write<R>(
        &mut self,
        work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<R>,
    ) -> Result<R, IndexError> {
        *self.cache() = Cache::default();
        let db = &mut self.db;
        let done = (|| {
            let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let result = work(&tx)?;
            tx.commit()?;
            Ok(result)
        })();
        done.map_err(|source| self.sqlite(source))
    }

    fn sqlite(&self, source: rusqlite::Error) -> IndexError {
        IndexError::Sqlite {
            path: self.path.clone(),
            source,
        }
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }

    fn count(&self, query: &str) -> Result<usize, IndexError> {
        let count: i64 = (self.db.query_row(query, [], |row| row.get(0)))
            .map_err(|source| self.sqlite(source))?;
        Ok(count as usize)
    }

    /// Passages in the index.
    ///
    /// # Errors
    /// A damaged file.
    pub fn passages(&self) -> Result<usize, IndexError> {
        self.count("SELECT count(*) FROM passages")
    }

    /// Brings the index up to date with the files below `root` (or the one file): reads what is new or
    /// has another content, forgets what is gone, and computes missing vectors if there is an embedder.
    /// Files that cannot be read are left out with a warning.
    ///
    /// # Errors
    /// See [`IndexError`]; [`IndexError::Stopped`] when `on` breaks. What was committed is kept.
    pub fn update(
        &mut self,
        root: &Path,
        limits: &Limits,
        embedder: Option<&dyn Embedder>,
        on: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Updated, IndexError> {
        let (paths, warnings) = document::files(root)?;
        let mut updated = Updated {
            warnings,
            ..Updated::default()
        };
        let mut known = self.known().map_err(|source| self.sqlite(source))?;
        let total = paths.len();
        let mut done = 0;
        while done < total {
            let mut end = done;
            let mut bytes = 0;
            while end < total && end - done < FILES_AT_ONCE && bytes < 64 << 20 {
                bytes += std::fs::metadata(&paths[end]).map_or(0, |metadata| metadata.len());
                end += 1;
            }
            let batch = &paths[done..end];
            let slots: Vec<Mutex<Option<Looked>>> =
                batch.iter().map(|_| Mutex::default()).collect();
            let chunk = self.chunk;
            Pool::global().for_each(batch.len(), |index| {
                let looked = look(root, &batch[index], &known, limits, &chunk);
                *slots[index]
                    .lock()
                    .unwrap_or_else(|poison| poison.into_inner()) = Some(looked);
            });
            let looked: Vec<Looked> = slots
                .into_iter()
                .filter_map(|slot| {
                    slot.into_inner()
                        .unwrap_or_else(|poison| poison.into_inner())
                })
                .collect();
            for file in &looked {
                known.remove(&file.name);
                if let Some(text) = &file.text {
                    updated.read += 1;
                    updated.bytes += text.bytes;
                }
            }
            if looked.iter().any(|file| file.stamp.is_some()) {
                self.write(|tx| looked.iter().try_for_each(|file| file.store(tx)))?;
            }
            done = end;
            if on(Progress::Files(done, total)).is_break() {
                return Err(IndexError::Stopped);
            }
        }
        updated.removed = known.len();
        if !known.is_empty() {
            self.write(|tx| known.values().try_for_each(|file| forget(tx, file.id)))?;
        }
        if let Some(embedder) = embedder {
            updated.embedded = self.embed_missing(embedder, on)?;
        }
        updated.files = self.count("SELECT count(*) FROM files")?;
        updated.passages = self.passages()?;
        let warnings = self
            .stored_warnings()
            .map_err(|source| self.sqlite(source))?;
        updated.warnings.extend(warnings);
        Ok(updated)
    }

    /// Adds documents that are in memory already; one of a known name takes its place.
    ///
    /// # Errors
    /// See [`IndexError`].
    pub fn add(
        &mut self,
        documents: &[Document],
        embedder: Option<&dyn Embedder>,
        on: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<(), IndexError> {
        let chunk = self.chunk;
        self.write(|tx| {
            documents.iter().try_for_each(|document| {
                let looked = Looked {
                    name: document.name.clone(),
                    old: None,
                    stamp: Some((0, 0)),
                    hash: Some(*blake3::hash(document.text.as_bytes()).as_bytes()),
                    text: Some(ReadText::new(document, &chunk)),
                    warnings: document.warnings.clone(),
                };
                looked.store(tx)
            })
        })?;
        if let Some(embedder) = embedder {
            self.embed_missing(embedder, on)?;
        }
        Ok(())
    }

    /// What the index holds of each file, by name.
    fn known(&self) -> rusqlite::Result<HashMap<String, Known>> {
        let mut query = self
            .db
            .prepare("SELECT path, id, hash, size, modified FROM files")?;
        let rows = query.query_map([], |row| {
            let known = Known {
                id: row.get(1)?,
                hash: row.get(2)?,
                stamp: (row.get(3)?, row.get(4)?),
            };
            Ok((row.get(0)?, known))
        })?;
        rows.collect()
    }

    fn stored_warnings(&self) -> rusqlite::Result<Vec<String>> {
        let mut query = self
            .db
            .prepare("SELECT path, warnings FROM files WHERE warnings != '' ORDER BY path")?;
        let rows = query.query_map([], |row| {
            let (path, warnings): (String, String) = (row.get(0)?, row.get(1)?);
            Ok(warnings
                .lines()
                .map(|warning| format!("{path}: {warning}"))
                .collect::<Vec<_>>())
        })?;
        Ok(rows.collect::<rusqlite::Result<Vec<_>>>()?.concat())
    }

    /// Computes vectors of passages that have none; those of another embedder are dropped first.
    fn embed_missing(
        &mut self,
        embedder: &dyn Embedder,
        on: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<usize, IndexError> {
        self.reset_unless("embedder", &embedder.id(), |tx| {
            tx.execute("DELETE FROM vectors", []).map(|_| ())
        })?;
        let total = self.passages()?;
        let mut done = self.count("SELECT count(*) FROM vectors")?;
        let (mut last, mut embedded) = (i64::MIN, 0);
        while done < total {
            if on(Progress::Vectors(done, total)).is_break() {
                return Err(IndexError::Stopped);
            }
            let rows = self
                .without_vector(last)
                .map_err(|source| self.sqlite(source))?;
            let Some(&(end, _)) = rows.last() else {
                break;
            };
            let texts: Vec<&str> = rows.iter().map(|(_, text)| text.as_str()).collect();
            let vectors = embedder.embed(&texts, Kind::Passage)?;
            let dim = embedder.dim();
            if vectors.len() != rows.len() * dim {
                return Err(IndexError::Embed(EmbedError::Length {
                    id: embedder.id(),
                    found: vectors.len(),
                    texts: rows.len(),
                    expected: rows.len() * dim,
                }));
            }
            self.write(|tx| {
                let mut insert = tx.prepare("INSERT OR REPLACE INTO vectors VALUES (?1, ?2)")?;
                for ((id, _), vector) in rows.iter().zip(vectors.chunks_exact(dim)) {
                    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
                    insert.execute(params![id, bytes])?;
                }
                Ok(())
            })?;
            (done, embedded, last) = (done + rows.len(), embedded + rows.len(), end);
        }
        let _ = on(Progress::Vectors(done, total));
        Ok(embedded)
    }

    /// Some passages after this id without a vector, as they are embedded.
    fn without_vector(&self, after: i64) -> rusqlite::Result<Vec<(i64, String)>> {
        let mut query = self.db.prepare(
            "SELECT id, title, text FROM passages LEFT JOIN vectors ON passage = id
             WHERE passage IS NULL AND id > ?1 ORDER BY id LIMIT ?2",
        )?;
        let rows = query.query_map(params![after, PASSAGES_AT_ONCE as i64], |row| {
            let (title, text): (String, String) = (row.get(1)?, row.get(2)?);
            Ok((row.get(0)?, format!("{title}\n{text}")))
        })?;
        rows.collect()
    }

    /// The `k` best passages, best first.
    ///
    /// # Errors
    /// [`IndexError::NoEmbedder`] when vectors are compared and there is no embedder.
    pub fn search(
        &self,
        query: &str,
        k: usize,
        retriever: Retriever,
        bm25: &Bm25Config,
        embedder: Option<&dyn Embedder>,
    ) -> Result<Vec<Hit>, IndexError> {
        // Fusion looks further down both lists than what it returns.
        let depth = match retriever {
            Retriever::Hybrid => k.max(100),
            _ => k,
        };
        let by_words = match retriever {
            Retriever::Dense => Vec::new(),
            _ => self.by_words(query, depth, bm25)?,
        };
        let by_meaning = match (retriever, embedder) {
            (Retriever::Bm25, _) => Vec::new(),
            (_, Some(embedder)) => self.by_meaning(query, depth, embedder)?,
            (_, None) => return Err(IndexError::NoEmbedder(retriever)),
        };
        let ranked = match retriever {
            Retriever::Bm25 => by_words.clone(),
            Retriever::Dense => by_meaning.clone(),
            Retriever::Hybrid => fuse(&[&by_words, &by_meaning]),
        };
        let ranks = |list: &[(i64, f64)]| -> HashMap<i64, usize> {
            let ids = list.iter().map(|entry| entry.0);
            ids.zip(1..).collect()
        };
        let (word_ranks, meaning_ranks) = (ranks(&by_words), ranks(&by_meaning));
        let hits = ranked.iter().take(k).map(|&(id, score)| {
            let mut hit = self.hit(id, score)?;
            hit.bm25_rank = word_ranks.get(&id).copied();
            hit.dense_rank = meaning_ranks.get(&id).copied();
            Ok(hit)
        });
        hits.collect::<rusqlite::Result<_>>()
            .map_err(|source| self.sqlite(source))
    }

    fn hit(&self, id: i64, score: f64) -> rusqlite::Result<Hit> {
        let mut query = self.db.prepare(
            "SELECT path, title, line, first, last, text FROM passages JOIN files ON files.id = file
             WHERE passages.id = ?1",
        )?;
        query.query_row([id], |row| {
            Ok(Hit {
                id,
                document: row.get(0)?,
                title: row.get(1)?,
                line: row.get::<_, i64>(2)? as usize,
                start: row.get::<_, i64>(3)? as usize,
                end: row.get::<_, i64>(4)? as usize,
                text: row.get(5)?,
                score,
                bm25_rank: None,
                dense_rank: None,
            })
        })
    }

    /// Passages by BM25, best first: ids and sums over the query's words.
    fn by_words(
        &self,
        query: &str,
        k: usize,
        config: &Bm25Config,
    ) -> Result<Vec<(i64, f64)>, IndexError> {
        let scores = || -> rusqlite::Result<Vec<(i64, f64)>> {
            let terms = self.terms(query)?;
            let mut cache = self.cache();
            if cache.lengths.is_none() {
                let mut query = self.db.prepare("SELECT id, words FROM passages")?;
                let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
                let lengths: HashMap<i64, u32> = rows.collect::<rusqlite::Result<_>>()?;
                let sum = lengths.values().map(|&n| f64::from(n)).sum();
                cache.lengths = Some((lengths, sum));
            }
            let (lengths, sum) = cache.lengths.as_ref().expect("just filled");
            let average = sum / (lengths.len() as f64).max(1.0);
            let mut scores: HashMap<i64, f64> = HashMap::new();
            let mut query = self
                .db
                .prepare("SELECT doc, count(*) FROM postings WHERE term = ?1 GROUP BY doc")?;
            for (term, times) in terms {
                let rows = query.query_map([term], |row| {
                    Ok((row.get::<_, i64>(0)?, row.get::<_, f64>(1)?))
                })?;
                let counts: Vec<(i64, f64)> = rows.collect::<rusqlite::Result<_>>()?;
                let counts: Vec<_> = (counts.into_iter())
                    .filter_map(|(id, tf)| Some((id, tf, *lengths.get(&id)?)))
                    .collect();
                let idf = config.idf(lengths.len(), counts.len());
                for (id, tf, length) in counts {
                    let weight = config.weight(tf, f64::from(length) / average);
                    *scores.entry(id).or_default() += times * idf * weight;
                }
            }
            Ok(top(scores.into_iter().collect(), k))
        };
        scores().map_err(|source| self.sqlite(source))
    }

    /// The words of a text as the index knows them, and how often each occurs.
    pub(super) fn terms(&self, text: &str) -> rusqlite::Result<Vec<(String, f64)>> {
        self.db.execute("DELETE FROM temp.asked", [])?;
        self.db
            .execute("INSERT INTO temp.asked VALUES (?1)", [indexed(text)])?;
        let mut query = self.db.prepare("SELECT term, cnt FROM temp.asked_words")?;
        let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        rows.collect()
    }

    /// Passages by cosine, best first: exact, all of them are looked at.
    fn by_meaning(
        &self,
        query: &str,
        k: usize,
        embedder: &dyn Embedder,
    ) -> Result<Vec<(i64, f64)>, IndexError> {
        let dim = embedder.dim();
        let query = embedder.embed(&[query], Kind::Query)?;
        let mut cache = self.cache();
        if cache.vectors.is_none() {
            let vectors = self.vectors(dim).map_err(|source| self.sqlite(source))?;
            cache.vectors = Some(vectors);
        }
        let vectors = cache.vectors.as_ref().expect("just filled");
        let mut scores = vec![0f32; vectors.ids.len()];
        let shared = SharedMut::new(&mut scores);
        split_rows(vectors.ids.len(), dim, |first, rows| {
            // SAFETY: pieces are disjoint ranges.
            let scores = unsafe { shared.slice(first, rows) };
            let values = vectors.values[first * dim..(first + rows) * dim].chunks_exact(dim);
            for (score, vector) in scores.iter_mut().zip(values) {
                *score = dot(vector, &query);
            }
        });
        let scores = vectors.ids.iter().zip(&scores);
        Ok(top(
            scores.map(|(&id, &score)| (id, score.into())).collect(),
            k,
        ))
    }

    fn vectors(&self, dim: usize) -> rusqlite::Result<Vectors> {
        let mut query = self
            .db
            .prepare("SELECT passage, value FROM vectors ORDER BY passage")?;
        let (mut ids, mut values) = (Vec::new(), Vec::new());
        let mut rows = query.query([])?;
        while let Some(row) = rows.next()? {
            let bytes = row.get_ref(1)?.as_blob()?;
            if bytes.len() == dim * 4 {
                ids.push(row.get(0)?);
                let floats = bytes.chunks_exact(4);
                values.extend(floats.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
            }
        }
        Ok(Vectors { ids, values })
    }
}
