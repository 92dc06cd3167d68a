//! The memory stream in one SQLite file: every turn with its summary, its embedding and the turns at which
//! it was activated. A turn is one transaction that is on the disk when it returns; a killed process loses
//! nothing that was answered.

use super::ScmError;
use longspan_kernels::elementwise::dot;
use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// One turn.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Item {
    /// Its number, from 1.
    pub turn: usize,
    /// What the person said.
    pub user: String,
    /// What the model answered.
    pub assistant: String,
    /// Both with their labels, as prompts show them.
    pub text: String,
    /// A sentence or two, or the text itself if that is short.
    pub summary: String,
    /// False while the summary is still to be made: the process ended before.
    pub summarised: bool,
    /// Tokens of the text.
    pub text_tokens: usize,
    /// Tokens of the summary.
    pub summary_tokens: usize,
    /// The last turn that activated it; its own number before that.
    pub last_access: usize,
    /// Seconds since 1970.
    pub created: i64,
    /// Of the text or of the summary.
    #[serde(skip)]
    pub embedding: Vec<f32>,
}

/// See the module's text.
pub struct MemoryStream {
    path: PathBuf,
    db: Connection,
    items: Vec<Item>,
}

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS items (
    turn INTEGER PRIMARY KEY, user TEXT NOT NULL, assistant TEXT NOT NULL, text TEXT NOT NULL,
    summary TEXT NOT NULL, summarised INTEGER NOT NULL, text_tokens INTEGER NOT NULL,
    summary_tokens INTEGER NOT NULL, created INTEGER NOT NULL, embedding BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS accesses (turn INTEGER NOT NULL, item INTEGER NOT NULL, PRIMARY KEY (turn, item));";

/// Kept in the file, so that another program's database is not taken for a memory.
const APPLICATION: i64 = 0x4c53_4d31;

impl MemoryStream {
    /// Opens or makes the memory in this file.
    ///
    /// # Errors
    /// A file that is no memory, or a folder that cannot be written.
    pub fn open(path: &Path) -> Result<MemoryStream, ScmError> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|source| ScmError::Io {
                path: folder.to_path_buf(),
                source,
            })?;
        }
        Self::with(path, Connection::open(path))
    }

    /// A memory that ends with the process.
    ///
    /// # Errors
    /// When SQLite cannot.
    pub fn in_memory() -> Result<MemoryStream, ScmError> {
        Self::with(Path::new("in memory"), Connection::open_in_memory())
    }

    fn with(path: &Path, db: rusqlite::Result<Connection>) -> Result<MemoryStream, ScmError> {
        let sqlite = |source| ScmError::Sqlite {
            path: path.to_path_buf(),
            source,
        };
        let db = db.map_err(sqlite)?;
        let opened = (|| {
            db.busy_timeout(Duration::from_secs(10))?;
            let found: i64 = db.pragma_query_value(None, "application_id", |row| row.get(0))?;
            let tables: i64 =
                db.query_row("SELECT count(*) FROM sqlite_master", [], |row| row.get(0))?;
            if found != APPLICATION && tables > 0 {
                return Ok(Err(found));
            }
            db.pragma_update(None, "journal_mode", "WAL")?;
            db.pragma_update(None, "synchronous", "FULL")?;
            db.pragma_update(None, "application_id", APPLICATION)?;
            db.execute_batch(SCHEMA)?;
            Ok(Ok(()))
        })();
        if opened.map_err(sqlite)?.is_err() {
            return Err(ScmError::NoMemory {
                path: path.to_path_buf(),
            });
        }
        let mut stream = MemoryStream {
            path: path.to_path_buf(),
            db,
            items: Vec::new(),
        };
        stream.items = stream.load().map_err(|source| stream.sqlite(source))?;
        Ok(stream)
    }

    fn sqlite(&self, source: rusqlite::Error) -> ScmError {
        ScmError::Sqlite {
            path: self.path.clone(),
            source,
        }
    }

    fn load(&self) -> rusqlite::Result<Vec<Item>> {
        let mut query = self.db.prepare(
            "SELECT turn, user, assistant, text, summary, summarised, text_tokens, summary_tokens, created,
             embedding, coalesce((SELECT max(a.turn) FROM accesses a WHERE a.item = items.turn), turn)
             FROM items ORDER BY turn",
        )?;
        let count = |value: i64| value.max(0) as usize;
        let rows = query.query_map([], |row| {
            let bytes: Vec<u8> = row.get(9)?;
            let floats = bytes.chunks_exact(4);
            Ok(Item {
                turn: count(row.get(0)?),
                user: row.get(1)?,
                assistant: row.get(2)?,
                text: row.get(3)?,
                summary: row.get(4)?,
                summarised: row.get(5)?,
                text_tokens: count(row.get(6)?),
                summary_tokens: count(row.get(7)?),
                created: row.get(8)?,
                embedding: floats
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect(),
                last_access: count(row.get(10)?),
            })
        })?;
        rows.collect()
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All turns, the oldest first.
    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// A note about how items were made (which tokenizer counted, which embedder).
    ///
    /// # Errors
    /// A damaged file.
    pub fn note(&self, key: &str) -> Result<Option<String>, ScmError> {
        let query = "SELECT value FROM meta WHERE key = ?1";
        (self.db.query_row(query, [key], |row| row.get(0)))
            .optional()
            .map_err(|source| self.sqlite(source))
    }

    /// Adds a turn and the items that its answer activated, by position. Written to disk when this returns.
    ///
    /// # Errors
    /// A full disk, another process that holds the file, a turn that another process added meanwhile.
    pub fn push(&mut self, item: Item, activated: &[usize]) -> Result<(), ScmError> {
        let written = (|| {
            let tx = self
                .db
                .transaction_with_behavior(TransactionBehavior::Immediate)?;
            insert(&tx, "INSERT", &item)?;
            for &position in activated {
                let item_turn = self.items[position].turn;
                tx.execute(
                    "INSERT INTO accesses VALUES (?1, ?2)",
                    params![item.turn as i64, item_turn as i64],
                )?;
            }
            tx.commit()
        })();
        match written {
            Err(rusqlite::Error::SqliteFailure(error, _))
                if error.code == rusqlite::ErrorCode::ConstraintViolation =>
            {
                return Err(ScmError::Shared {
                    path: self.path.clone(),
                    turn: item.turn,
                });
            }
            written => written.map_err(|source| self.sqlite(source))?,
        }
        for &position in activated {
            self.items[position].last_access = item.turn;
        }
        self.items.push(item);
        Ok(())
    }

    /// Replaces what was derived of some items (summary, counts, embedding), and sets notes.
    ///
    /// # Errors
    /// As [`MemoryStream::push`].
    pub fn rewrite(&mut self, items: Vec<Item>, notes: &[(&str, &str)]) -> Result<(), ScmError> {
        let written = (|| {
            let tx = self
                .db
                .transaction_with_behavior(TransactionBehavior::Immediate)?;
            for item in &items {
                insert(&tx, "INSERT OR REPLACE", item)?;
            }
            for (key, value) in notes {
                tx.execute("INSERT OR REPLACE INTO meta VALUES (?1, ?2)", [key, value])?;
            }
            tx.commit()
        })();
        written.map_err(|source| self.sqlite(source))?;
        for item in items {
            if let Some(own) = self.items.iter_mut().find(|own| own.turn == item.turn) {
                *own = item;
            }
        }
        Ok(())
    }

    /// Takes the last turn back, its activations included; false if there is none.
    ///
    /// # Errors
    /// As [`MemoryStream::push`].
    pub fn roll_back(&mut self) -> Result<bool, ScmError> {
        let Some(turn) = self.items.last().map(|item| item.turn as i64) else {
            return Ok(false);
        };
        let written = (|| {
            let tx = self
                .db
                .transaction_with_behavior(TransactionBehavior::Immediate)?;
            tx.execute("DELETE FROM items WHERE turn = ?1", [turn])?;
            tx.execute("DELETE FROM accesses WHERE turn = ?1", [turn])?;
            tx.commit()
        })();
        written.map_err(|source| self.sqlite(source))?;
        self.items = self.load().map_err(|source| self.sqlite(source))?;
        Ok(true)
    }

    /// Forgets everything.
    ///
    /// # Errors
    /// As [`MemoryStream::push`].
    pub fn reset(&mut self) -> Result<(), ScmError> {
        let cleared = self
            .db
            .execute_batch("BEGIN IMMEDIATE; DELETE FROM items; DELETE FROM accesses; COMMIT;");
        cleared.map_err(|source| self.sqlite(source))?;
        self.items.clear();
        Ok(())
    }
}

fn insert(tx: &rusqlite::Transaction<'_>, verb: &str, item: &Item) -> rusqlite::Result<()> {
    let bytes: Vec<u8> = (item.embedding.iter())
        .flat_map(|x| x.to_le_bytes())
        .collect();
    tx.execute(
        &format!("{verb} INTO items VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)"),
        params![
            item.turn as i64,
            item.user,
            item.assistant,
            item.text,
            item.summary,
            item.summarised,
            item.text_tokens as i64,
            item.summary_tokens as i64,
            item.created,
            bytes
        ],
    )?;
    Ok(())
}

/// Cosine of two vectors of the same length in f32; 0 if one has no length.
pub fn cosine(a: &[f32], b: &[f32]) -> f32 {
    if a.len() != b.len() {
        return 0.0;
    }
    let norms = dot(a, a).sqrt() * dot(b, b).sqrt();
    if norms > 0.0 { dot(a, b) / norms } else { 0.0 }
}
