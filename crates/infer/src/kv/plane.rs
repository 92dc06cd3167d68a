//! One plane: the keys or the values of one page of one layer, on the heap or in a tier file.
//!
//! Planes are immutable once shared; the store copies a shared plane before it writes to it.

use memmap2::{Mmap, MmapOptions};
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};

/// Bytes of a tier file mapped at a time; planes never straddle two segments.
const SEGMENT: u64 = 64 << 20;

/// Planes on the heap, of all sequences of the process.
static LIVE: AtomicI64 = AtomicI64::new(0);

/// Planes of keys or values that the process holds in memory. Shared ones count once; 0 when no sequence is left.
pub fn live_planes() -> u64 {
    LIVE.load(Ordering::Relaxed).max(0) as u64
}

/// 64-byte aligned heap memory.
pub struct AlignedBytes {
    pointer: *mut u8,
    len: usize,
}

// SAFETY: plain owned memory.
unsafe impl Send for AlignedBytes {}
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(64), 64)
            .expect("a plane is far smaller than the address space")
    }

    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout is not empty.
        let pointer = unsafe { alloc_zeroed(layout) };
        if pointer.is_null() {
            handle_alloc_error(layout);
        }
        LIVE.fetch_add(1, Ordering::Relaxed);
        AlignedBytes { pointer, len }
    }

    /// A copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut copy = Self::zeroed(bytes.len());
        copy.as_mut_slice().copy_from_slice(bytes);
        copy
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `pointer` owns `len` bytes.
        unsafe { std::slice::from_raw_parts(self.pointer, self.len) }
    }

    /// The bytes, writable.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: `pointer` owns `len` bytes.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        // SAFETY: allocated with the same layout.
        unsafe { dealloc(self.pointer, Self::layout(self.len)) }
        LIVE.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Keys or values of one page. See the module's text.
pub enum Plane {
    /// In memory.
    Heap(AlignedBytes),
    /// In a tier or session file, read through its mapping.
    Mapped(MappedPlane),
    /// A copy in memory of a mapped plane, which can be dropped again at no cost.
    Loaded(AlignedBytes, Arc<Plane>),
}

/// A plane inside a [`TierFile`].
pub struct MappedPlane {
    file: Arc<TierFile>,
    segment: Arc<Mmap>,
    offset: u64,
    len: usize,
    checksum: u64,
    verified: AtomicBool,
}

impl Plane {
    /// A zero plane on the heap.
    pub fn heap(len: usize) -> Self {
        Plane::Heap(AlignedBytes::zeroed(len))
    }

    /// The bytes. A mapped plane that came from an earlier process must be verified first.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Plane::Heap(bytes) | Plane::Loaded(bytes, _) => bytes.as_slice(),
            Plane::Mapped(plane) => plane.bytes(),
        }
    }

    /// Checks a mapped plane against its checksum, once. Errors name file and offset.
    pub fn verify(&self) -> io::Result<()> {
        let Plane::Mapped(plane) = self else {
            return Ok(());
        };
        if plane.verified.load(Ordering::Relaxed) {
            return Ok(());
        }
        if checksum(plane.bytes()) != plane.checksum {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "{}: the {} bytes at offset {} do not match their checksum; the file is damaged, delete it and read the document again",
                    plane.file.path.display(),
                    plane.len,
                    plane.offset
                ),
            ));
        }
        plane.verified.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// True for a plane that lies in a file.
    pub fn is_mapped(&self) -> bool {
        matches!(self, Plane::Mapped(_))
    }

    /// Where a plane lies on disk, if it does: (file, offset, checksum).
    pub fn place(&self) -> Option<(&Arc<TierFile>, u64, u64)> {
        match self {
            Plane::Heap(_) => None,
            Plane::Mapped(plane) => Some((&plane.file, plane.offset, plane.checksum)),
            Plane::Loaded(_, home) => home.place(),
        }
    }
}

impl MappedPlane {
    fn bytes(&self) -> &[u8] {
        let start = (self.offset % SEGMENT) as usize;
        &self.segment[start..start + self.len]
    }
}

/// 64-bit checksum of a plane: four independent multiply-rotate lanes over 32-byte stripes, fast
/// enough to run at memory speed. It guards against damage, not against forgery.
pub fn checksum(bytes: &[u8]) -> u64 {
    const PRIMES: [u64; 4] = [
        0x9e37_79b1_85eb_ca87,
        0xc2b2_ae3d_27d4_eb4f,
        0x1656_67b1_9e37_79f9,
        0x85eb_ca77_c2b2_ae63,
    ];
    let mut lanes = PRIMES;
    let mut stripes = bytes.chunks_exact(32);
    for stripe in &mut stripes {
        for (lane, word) in lanes.iter_mut().zip(stripe.chunks_exact(8)) {
            let word = u64::from_le_bytes(word.try_into().unwrap());
            *lane = (*lane ^ word).wrapping_mul(PRIMES[0]).rotate_left(31);
        }
    }
    let mut hash = bytes.len() as u64;
    for (lane, prime) in lanes.iter().zip(PRIMES) {
        hash = (hash ^ lane).wrapping_mul(prime).rotate_left(27);
    }
    for &byte in stripes.remainder() {
        hash = (hash ^ byte as u64).wrapping_mul(PRIMES[1]).rotate_left(11);
    }
    hash ^ (hash >> 32)
}

/// An append-only file of planes: the cold tier of a running sequence and the data of a saved one.
pub struct TierFile {
    file: File,
    path: PathBuf,
    state: Mutex<TierState>,
}

struct TierState {
    /// End of what has been written.
    end: u64,
    segments: Vec<Option<Arc<Mmap>>>,
}

impl TierFile {
    /// Creates (or empties) a file for planes.
    pub fn create(path: &Path) -> io::Result<Arc<Self>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .map_err(|error| named(path, error))?;
        Ok(Arc::new(TierFile {
            file,
            path: path.into(),
            state: Mutex::new(TierState {
                end: 0,
                segments: Vec::new(),
            }),
        }))
    }

    /// Opens a file written earlier; planes up to `end` stay, whatever follows is overwritten.
    pub fn open(path: &Path, end: u64) -> io::Result<Arc<Self>> {
        Self::open_with(path, end, true)
    }

    /// Opens a file written earlier for reading only.
    pub fn open_read(path: &Path, end: u64) -> io::Result<Arc<Self>> {
        Self::open_with(path, end, false)
    }

    fn open_with(path: &Path, end: u64, write: bool) -> io::Result<Arc<Self>> {
        let file = OpenOptions::new()
            .read(true)
            .write(write)
            .open(path)
            .map_err(|error| named(path, error))?;
        let found = file.metadata().map_err(|error| named(path, error))?.len();
        if found < end {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "{}: found {found} bytes, expected at least {end}; the file is truncated",
                    path.display()
                ),
            ));
        }
        Ok(Arc::new(TierFile {
            file,
            path: path.into(),
            state: Mutex::new(TierState {
                end,
                segments: Vec::new(),
            }),
        }))
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes written so far.
    pub fn end(&self) -> u64 {
        self.state.lock().unwrap().end
    }

    /// Appends a plane and returns it as a mapped one. Errors (a full disk) leave the file's
    /// earlier planes intact.
    pub fn append(self: &Arc<Self>, bytes: &[u8]) -> io::Result<Plane> {
        let len = bytes.len() as u64;
        let offset = {
            let mut state = self.state.lock().unwrap();
            let mut offset = state.end;
            if offset % SEGMENT + len > SEGMENT {
                offset = offset.next_multiple_of(SEGMENT);
            }
            self.file
                .write_all_at(bytes, offset)
                .map_err(|error| named(&self.path, error))?;
            state.end = offset + len;
            offset
        };
        let plane = self.plane(offset, bytes.len(), checksum(bytes))?;
        if let Plane::Mapped(plane) = &plane {
            plane.verified.store(true, Ordering::Relaxed);
        }
        Ok(plane)
    }

    /// The plane that lies at `offset`. Errors if it reaches past the written end or over a
    /// segment's edge.
    pub fn plane(self: &Arc<Self>, offset: u64, len: usize, checksum: u64) -> io::Result<Plane> {
        let mut state = self.state.lock().unwrap();
        let fits = offset
            .checked_add(len as u64)
            .is_some_and(|end| end <= state.end);
        if !fits || offset % SEGMENT + len as u64 > SEGMENT || !offset.is_multiple_of(64) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "{}: a plane of {len} bytes at offset {offset} is impossible in a file of {} bytes",
                    self.path.display(),
                    state.end
                ),
            ));
        }
        let index = (offset / SEGMENT) as usize;
        if state.segments.len() <= index {
            state.segments.resize(index + 1, None);
        }
        let start = index as u64 * SEGMENT;
        let needed = (offset - start) as usize + len;
        // A segment at the end of the file is mapped whole, so that later planes need no new
        // mapping; only bytes below the written end are ever touched.
        let segment = match &state.segments[index] {
            Some(segment) if segment.len() >= needed => segment.clone(),
            _ => {
                // SAFETY: the file is private to this process while it is open.
                let map = unsafe {
                    MmapOptions::new()
                        .offset(start)
                        .len(SEGMENT as usize)
                        .map(&self.file)
                };
                let map = Arc::new(map.map_err(|error| named(&self.path, error))?);
                state.segments[index] = Some(map.clone());
                map
            }
        };
        drop(state);
        Ok(Plane::Mapped(MappedPlane {
            file: self.clone(),
            segment,
            offset,
            len,
            checksum,
            verified: AtomicBool::new(false),
        }))
    }

    /// Lets the system take back the memory of pages read through the mapping.
    pub fn release_memory(&self) {
        for segment in self.state.lock().unwrap().segments.iter().flatten() {
            // SAFETY: the mapping is shared and file-backed, so its pages are read again on the next access.
            unsafe {
                libc::madvise(
                    segment.as_ptr() as *mut libc::c_void,
                    segment.len(),
                    libc::MADV_DONTNEED,
                );
            }
        }
    }

    /// Makes everything written so far durable.
    pub fn sync(&self) -> io::Result<()> {
        self.file
            .sync_data()
            .map_err(|error| named(&self.path, error))
    }
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
