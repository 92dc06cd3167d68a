//! Files in the cache: a file grows under `.partial`, is verified, and then appears whole under its name.
//!
//! Whatever interrupts a pull (a kill, a full disk, a lost network), the bytes already verified stay
//! and the next pull continues after them.

use super::error::HubError;
use super::progress::{Progress, Reporter, Stage};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes free for this user on the disk of `path` (or of its nearest existing parent).
/// `None` where the system does not say.
pub fn free_bytes(path: &Path) -> Option<u64> {
    let existing = path.ancestors().find(|p| p.exists())?;
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let name = std::ffi::CString::new(existing.as_os_str().as_bytes()).ok()?;
        let mut stat = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
        // SAFETY: `name` ends in NUL and `stat` is a valid place for the result.
        let stat = unsafe {
            if libc::statvfs(name.as_ptr(), stat.as_mut_ptr()) != 0 {
                return None;
            }
            stat.assume_init()
        };
        #[allow(clippy::unnecessary_cast)] // the fields' widths differ between systems
        Some((stat.f_bavail as u64).saturating_mul(stat.f_frsize as u64))
    }
    #[cfg(not(unix))]
    {
        let _ = existing;
        None
    }
}

/// Creates a folder and its parents.
pub fn create_folder(path: &Path) -> Result<(), HubError> {
    fs::create_dir_all(path).map_err(|e| HubError::local("create the folder", path, e, 0))
}

/// Removes a file or folder; absence is fine.
pub fn remove(path: &Path) -> Result<(), HubError> {
    let result = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(HubError::local("remove", path, error, 0))
        }
        _ => Ok(()),
    }
}

/// Holds a folder against other pulls, in this process and others, until dropped.
pub struct Lock {
    _file: File,
}

/// Locks `folder`, waiting for another pull to end; the wait is reported and can be cancelled.
pub fn lock(folder: &Path, model: &str, progress: &dyn Progress) -> Result<Lock, HubError> {
    let path = folder.join(".lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| HubError::local("open the lock", &path, e, 0))?;
    let reporter = Reporter {
        progress,
        model,
        file: "",
        source: "another pull",
    };
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Lock { _file: file }),
            Err(TryLockError::WouldBlock) => {
                reporter.tick(Stage::Waiting, 0, None)?;
                std::thread::sleep(Duration::from_millis(100));
            }
            Err(TryLockError::Error(e)) => {
                return Err(HubError::local("lock", &path, e, 0));
            }
        }
    }
}

/// Why a copy stopped: the reading side, the writing side, or the caller.
pub enum CopyError {
    Read(io::Error),
    Write(io::Error),
    Stopped(HubError),
}

/// Copies `reader` to `writer` until the end, calling `tick` with the bytes copied so far.
///
/// Returns the bytes copied. The writer is any, so that a full disk can be tried in a test.
pub fn copy(
    reader: &mut dyn Read,
    writer: &mut dyn Write,
    tick: &mut dyn FnMut(u64) -> Result<(), HubError>,
) -> Result<u64, CopyError> {
    let mut buffer = vec![0; 1 << 20];
    let mut copied = 0;
    loop {
        let read = match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(CopyError::Read(error)),
        };
        writer
            .write_all(&buffer[..read])
            .map_err(CopyError::Write)?;
        copied += read as u64;
        tick(copied).map_err(CopyError::Stopped)?;
    }
    writer.flush().map_err(CopyError::Write)?;
    Ok(copied)
}

/// SHA-256 of a file, in lower-case hexadecimal digits.
pub fn sha256(
    path: &Path,
    tick: &mut dyn FnMut(u64) -> Result<(), HubError>,
) -> Result<String, HubError> {
    struct Hasher(Sha256);
    impl Write for Hasher {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.update(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut file = File::open(path).map_err(|e| HubError::local("open", path, e, 0))?;
    let mut hasher = Hasher(Sha256::new());
    match copy(&mut file, &mut hasher, tick) {
        Ok(_) => Ok(hex(&hasher.0.finalize())),
        Err(CopyError::Read(e) | CopyError::Write(e)) => Err(HubError::local("read", path, e, 0)),
        Err(CopyError::Stopped(error)) => Err(error),
    }
}

/// Lower-case hexadecimal digits of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a partial file holds, beside it on disk.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Journal {
    /// Bytes known to be good; anything after them is cut off before writing goes on.
    bytes: u64,
    /// Wheels wholly appended.
    parts: usize,
    /// The hub's tag of the content the bytes belong to.
    etag: Option<String>,
}

/// A file on its way: data that only grows, and a journal of how much of it is good.
pub struct Partial {
    data: PathBuf,
    journal_path: PathBuf,
    journal: Journal,
}

impl Partial {
    /// Opens the partial file of `name` from the source `key` under `folder`, empty if there is none.
    /// Each source has its own, so that trying one source never spoils the work of another.
    pub fn open(folder: &Path, name: &str, key: &str) -> Result<Partial, HubError> {
        create_folder(folder)?;
        let id = &hex(&Sha256::digest(format!("{name}\0{key}")))[..16];
        let data = folder.join(format!("{id}.part"));
        let journal_path = folder.join(format!("{id}.json"));
        let mut journal: Journal = fs::read(&journal_path)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        let length = fs::metadata(&data).map_or(0, |meta| meta.len());
        if length < journal.bytes {
            journal = Journal::default();
        }
        Ok(Partial {
            data,
            journal_path,
            journal,
        })
    }

    pub fn path(&self) -> &Path {
        &self.data
    }

    /// Bytes known to be good.
    pub fn bytes(&self) -> u64 {
        self.journal.bytes
    }

    /// Wheels wholly appended.
    pub fn parts(&self) -> usize {
        self.journal.parts
    }

    #[cfg(feature = "hub")]
    pub fn etag(&self) -> Option<&str> {
        self.journal.etag.as_deref()
    }

    #[cfg(feature = "hub")]
    /// Forgets all; the next append starts an empty file.
    pub fn clear(&mut self, etag: Option<String>) -> Result<(), HubError> {
        self.journal = Journal {
            etag,
            ..Journal::default()
        };
        remove(&self.data)?;
        self.save()
    }

    /// Removes the data and its journal.
    pub fn discard(self) -> Result<(), HubError> {
        remove(&self.data)?;
        remove(&self.journal_path)
    }

    fn save(&self) -> Result<(), HubError> {
        let text = serde_json::to_vec(&self.journal).expect("a journal is plain JSON");
        write_atomically(&self.journal_path, &text)
    }

    /// The data file, cut to the good bytes and set to append after them.
    pub fn writer(&self) -> Result<File, HubError> {
        let open = || -> io::Result<File> {
            let mut file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&self.data)?;
            file.set_len(self.journal.bytes)?;
            file.seek(SeekFrom::End(0))?;
            Ok(file)
        };
        open().map_err(|e| HubError::local("write", &self.data, e, 0))
    }

    /// Declares `added` more bytes of `file` good, after they reached the disk.
    pub fn commit(&mut self, file: &File, added: u64, parts: usize) -> Result<(), HubError> {
        file.sync_data()
            .map_err(|e| HubError::local("write", &self.data, e, added))?;
        self.journal.bytes += added;
        self.journal.parts += parts;
        self.save()
    }

    /// Moves the finished data to `target` in one step and removes the journal.
    pub fn finish(self, target: &Path) -> Result<(), HubError> {
        if let Some(parent) = target.parent() {
            create_folder(parent)?;
        }
        fs::rename(&self.data, target).map_err(|e| HubError::local("create", target, e, 0))?;
        remove(&self.journal_path)
    }
}

/// Writes a small file so that readers see the old content or the new, never a part.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), HubError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    fs::write(&new, bytes)
        .and_then(|()| fs::rename(&new, path))
        .map_err(|e| HubError::local("write", path, e, bytes.len() as u64))
}

/// Limits how often a progress callback runs while bytes fly by, and always checks for a stop.
pub fn ticker<'a>(
    reporter: Reporter<'a>,
    stage: Stage,
    offset: u64,
    total: Option<u64>,
) -> impl FnMut(u64) -> Result<(), HubError> + 'a {
    let mut last: Option<std::time::Instant> = None;
    move |done| {
        let now = std::time::Instant::now();
        let due = last.is_none_or(|last| now - last >= Duration::from_millis(100));
        if due || Some(offset + done) == total {
            last = Some(now);
            return reporter.tick(stage, offset + done, total);
        }
        Ok(())
    }
}
