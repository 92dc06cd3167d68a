//! A model's identity in 32 bytes: what a file says of itself, its size, and a few bytes of every
//! tensor. Cheap enough to take at every start, and different for models that differ in practice.

use std::fmt;

/// Identifies the weights of a model, so that a saved session is not resumed with another one.
///
/// BLAKE3 over the header, the file sizes, and up to [`SAMPLES`] runs of [`RUN`] bytes spread over
/// each tensor. It does not depend on file names or dates. It is no proof against forgery: bytes
/// between the samples are not read.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

/// Runs of bytes read from each tensor.
const SAMPLES: usize = 4;
/// Bytes in a run.
const RUN: usize = 64;

impl Fingerprint {
    /// A fingerprint read back from a file.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Fingerprint {
    /// 64 hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// Collects what goes into a [`Fingerprint`]; every field is preceded by its length.
pub(crate) struct Hasher(blake3::Hasher);

impl Hasher {
    pub(crate) fn new() -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"longspan model fingerprint 1");
        Self(hasher)
    }

    /// Adds one file: its header and its whole length in bytes.
    pub(crate) fn header(&mut self, header: &[u8], file_bytes: usize) {
        self.field(header);
        self.0.update(&(file_bytes as u64).to_le_bytes());
    }

    /// Adds one tensor.
    pub(crate) fn tensor(&mut self, name: &str, data: &[u8]) {
        self.field(name.as_bytes());
        self.0.update(&(data.len() as u64).to_le_bytes());
        if data.len() <= SAMPLES * RUN {
            self.0.update(data);
            return;
        }
        for sample in 0..SAMPLES {
            // The first run at the very beginning, the last at the very end.
            let last = (data.len() - RUN) as u128;
            let start = (last * sample as u128 / (SAMPLES - 1) as u128) as usize;
            self.0.update(&data[start..start + RUN]);
        }
    }

    fn field(&mut self, bytes: &[u8]) {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    pub(crate) fn finish(self) -> Fingerprint {
        Fingerprint(*self.0.finalize().as_bytes())
    }
}
