//! Sessions on disk: a sequence saved with its keys, values and policy, restored bit for bit.
//!
//! A session is a folder: `index` (a header in JSON, tokens, policy state, page tables, a BLAKE3
//! hash over all of it), `cold` (pages a policy moved to disk, append-only) and `hot-N` (the pages
//! that were in memory at the N-th save). The index is replaced last and atomically, so a killed
//! process leaves the previous save whole. Planes carry checksums that are verified when first read.

use crate::context::ContextConfig;
use crate::engine::{Engine, EngineError, EngineOptions, Result, Sequence};
use crate::kv::plane::TierFile;
use crate::kv::{LayerPages, Page};
use crate::wire::{read_bytes, read_u64, write_bytes, write_u64};
use longspan_kernels::attention::{KvDtype, PAGE};
use longspan_nn::position::RopeOverride;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

mod states;

const MAGIC: &[u8; 16] = b"longspan session";
const VERSION: u64 = 1;

/// What a session says about itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// Names the weights.
    pub model: String,
    /// The policy with all its parameters.
    pub context: ContextConfig,
    /// Element type of keys and values: "f32", "bf16", "int8".
    pub kv: String,
    /// What was read, for people and for resuming: hash of the document, names, ...
    pub note: serde_json::Value,
    /// Number of saves so far; names the `hot` file.
    pub generation: u64,
    /// Written ends of the two files.
    pub cold_end: u64,
    /// See `cold_end`.
    pub hot_end: u64,
    /// The rotary rule in place of the model's own, if there was one.
    #[serde(default)]
    pub rope: Option<RopeOverride>,
    /// See [`Sequence::expect_length`].
    #[serde(default)]
    expected_length: usize,
    num_layers: usize,
    first_page: usize,
    keeps_raw: bool,
}

/// The names of the types of cached keys and values.
pub const KV_NAMES: [(&str, KvDtype); 4] = [
    ("f16", KvDtype::F16),
    ("f32", KvDtype::F32),
    ("bf16", KvDtype::Bf16),
    ("int8", KvDtype::Int8),
];

fn kv_name(kv: KvDtype) -> &'static str {
    KV_NAMES
        .iter()
        .find(|(_, dtype)| *dtype == kv)
        .map(|(name, _)| *name)
        .expect("every type has a name")
}

/// A folder that sequences are saved to.
pub struct SessionDir {
    path: PathBuf,
}

/// What an opened session is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Ask questions: files stay as they are, several processes may do so.
    Read,
    /// Go on reading the document: cold pages are appended.
    Resume,
}

impl SessionDir {
    /// The session at this path, present or not.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        SessionDir { path: path.into() }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// True if a whole save is there.
    pub fn exists(&self) -> bool {
        self.path.join("index").is_file()
    }

    /// Makes the folder and an empty cold file for a new sequence.
    pub fn create(&self) -> Result<Arc<TierFile>> {
        fs::create_dir_all(&self.path).map_err(|error| named(&self.path, error))?;
        match fs::remove_file(self.path.join("index")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(named(&self.path, error).into());
            }
            _ => {}
        }
        Ok(TierFile::create(&self.path.join("cold"))?)
    }

    /// Deletes the session's files and folder.
    pub fn delete(&self) -> Result<()> {
        fs::remove_dir_all(&self.path).map_err(|error| named(&self.path, error).into())
    }

    /// Reads the header only.
    pub fn header(&self) -> Result<Header> {
        Ok(parse_index(&self.read_index()?, &self.path.join("index"))?.header)
    }

    fn read_index(&self) -> Result<Vec<u8>> {
        let path = self.path.join("index");
        fs::read(&path).map_err(|error| named(&path, error).into())
    }

    /// Saves a sequence. What an earlier save holds stays valid until this one is complete.
    pub fn save(
        &self,
        engine: &Engine,
        sequence: &Sequence,
        note: serde_json::Value,
    ) -> Result<()> {
        fs::create_dir_all(&self.path).map_err(|error| named(&self.path, error))?;
        let generation = self.header().map_or(0, |header| header.generation) + 1;
        let hot_path = self.path.join(format!("hot-{generation}"));
        let hot = TierFile::create(&hot_path)?;
        let cold_path = self.path.join("cold");
        let written = self.write(engine, sequence, note, generation, &hot, &cold_path);
        if let Err(error) = written {
            let _ = fs::remove_file(&hot_path);
            let _ = fs::remove_file(self.path.join("index.new"));
            return Err(error);
        }
        // Only now may the files of earlier saves go.
        for entry in fs::read_dir(&self.path)
            .map_err(|error| named(&self.path, error))?
            .flatten()
        {
            let name = entry.file_name();
            if name.to_string_lossy().starts_with("hot-") && entry.path() != hot_path {
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(())
    }

    fn write(
        &self,
        engine: &Engine,
        sequence: &Sequence,
        note: serde_json::Value,
        generation: u64,
        hot: &Arc<TierFile>,
        cold_path: &Path,
    ) -> Result<()> {
        let mut tables = Vec::new();
        for layer in &sequence.store.layers {
            write_u64(&mut tables, layer.len)?;
            write_u64(&mut tables, layer.pages.len() as u64)?;
            for plane in layer.pages.iter().flat_map(Page::planes) {
                let Some(plane) = plane else {
                    write_u64(&mut tables, 0)?;
                    continue;
                };
                match plane.place() {
                    Some((file, offset, checksum)) if file.path() == cold_path => {
                        [1, offset, checksum]
                            .iter()
                            .try_for_each(|&word| write_u64(&mut tables, word))?;
                    }
                    _ => {
                        plane.verify()?;
                        let copy = hot.append(plane.bytes())?;
                        let (_, offset, checksum) =
                            copy.place().expect("an appended plane has a place");
                        [2, offset, checksum]
                            .iter()
                            .try_for_each(|&word| write_u64(&mut tables, word))?;
                    }
                }
            }
        }
        hot.sync()?;
        let cold_end = match sequence.store.tier() {
            Some(tier) if tier.path() == cold_path => {
                tier.sync()?;
                tier.end()
            }
            _ => 0,
        };
        let header = Header {
            model: engine.fingerprint().into(),
            context: sequence.options.context.clone(),
            kv: kv_name(sequence.options.kv).into(),
            note,
            generation,
            cold_end,
            hot_end: hot.end(),
            rope: engine.rope().cloned(),
            expected_length: sequence.expected_length,
            num_layers: sequence.store.num_layers(),
            first_page: sequence.store.first_page(),
            keeps_raw: sequence.store.keeps_raw(),
        };
        let mut index = MAGIC.to_vec();
        write_u64(&mut index, VERSION)?;
        write_bytes(
            &mut index,
            &serde_json::to_vec(&header).map_err(io::Error::from)?,
        )?;
        write_bytes(
            &mut index,
            &sequence
                .tokens
                .iter()
                .flat_map(|token| token.to_le_bytes())
                .collect::<Vec<_>>(),
        )?;
        let mut policy = Vec::new();
        match &sequence.states {
            Some(states) => states::save(&mut policy, states)?,
            None => sequence.policy.save(&mut policy)?,
        }
        write_bytes(&mut index, &policy)?;
        write_bytes(&mut index, &tables)?;
        let hash = blake3::hash(&index);
        index.extend_from_slice(hash.as_bytes());

        let path = self.path.join("index.new");
        let mut file = File::create(&path).map_err(|error| named(&path, error))?;
        file.write_all(&index)
            .and_then(|()| file.sync_all())
            .map_err(|error| named(&path, error))?;
        fs::rename(&path, self.path.join("index")).map_err(|error| named(&path, error).into())
    }

    /// Restores a sequence. Errors say what does not fit: another model, a damaged file, a newer
    /// version.
    pub fn load(&self, engine: &Engine, mode: Mode) -> Result<(Sequence, Header)> {
        let path = self.path.join("index");
        let bytes = self.read_index()?;
        let Index {
            header,
            tokens,
            policy,
            tables,
        } = parse_index(&bytes, &path)?;
        if header.rope.as_ref() != engine.rope() {
            let named = |rope: Option<&RopeOverride>| match rope {
                Some(rope) => format!("--rope {rope}"),
                None => "the model's own rotary positions".into(),
            };
            let message = format!(
                "{}: the session was read with {}, found {}",
                path.display(),
                named(header.rope.as_ref()),
                named(engine.rope())
            );
            return Err(EngineError::Session(message));
        }
        if header.model != engine.fingerprint() {
            let message = format!(
                "{}: the session belongs to the model {}, found {}",
                path.display(),
                header.model,
                engine.fingerprint()
            );
            return Err(EngineError::Session(message));
        }
        let kv = KV_NAMES
            .iter()
            .find(|(name, _)| *name == header.kv)
            .map(|(_, kv)| *kv);
        let kv = kv.ok_or_else(|| {
            EngineError::Session(format!(
                "{}: unknown type {:?} of keys and values",
                path.display(),
                header.kv
            ))
        })?;
        let options = EngineOptions {
            kv,
            context: header.context.clone(),
        };
        let cold = match mode {
            Mode::Resume => Some(TierFile::open(&self.path.join("cold"), header.cold_end)?),
            Mode::Read if header.cold_end > 0 => Some(TierFile::open_read(
                &self.path.join("cold"),
                header.cold_end,
            )?),
            Mode::Read => None,
        };
        let hot = TierFile::open_read(
            &self.path.join(format!("hot-{}", header.generation)),
            header.hot_end,
        )?;
        let tier = if mode == Mode::Resume {
            cold.clone()
        } else {
            None
        };
        let mut sequence = engine.sequence(&options, tier)?;
        let store = &sequence.store;
        let shape = (store.num_layers(), store.first_page(), store.keeps_raw());
        if shape != (header.num_layers, header.first_page, header.keeps_raw) {
            let found = (header.num_layers, header.first_page, header.keeps_raw);
            return Err(EngineError::Session(format!(
                "{}: pages are laid out as {found:?}, expected {shape:?}",
                path.display()
            )));
        }
        let plane_bytes = store.layout().plane_bytes();
        let mut input = tables;
        let first = header.first_page as u64;
        let pages_of = |tokens: u64| match tokens {
            0 => 0,
            _ => 1 + tokens.saturating_sub(first).div_ceil(PAGE as u64) as usize,
        };
        for layer in &mut sequence.store.layers {
            *layer = read_layer(
                &mut input,
                plane_bytes,
                tokens.len() as u64,
                cold.as_ref(),
                &hot,
            )
            .map_err(|error| named(&path, error))?;
            if layer.pages.len() < pages_of(layer.len) {
                let (len, pages) = (layer.len, layer.pages.len());
                let what = format!("a layer has {len} tokens on {pages} pages, which hold fewer");
                let error = io::Error::new(io::ErrorKind::InvalidData, what);
                return Err(named(&path, error).into());
            }
        }
        let rearranges = sequence.policy.spec().rearranges;
        for (index, layer) in sequence.store.layers.iter().enumerate() {
            if layer.len != tokens.len() as u64 && !(rearranges && engine.governs(index)) {
                let message = format!(
                    "{}: layer {index} has {} tokens, expected {}",
                    path.display(),
                    layer.len,
                    tokens.len()
                );
                return Err(EngineError::Session(message));
            }
        }
        let loaded = match &mut sequence.states {
            Some(states) => states::load(&mut &policy[..], states, tokens.len()),
            None => sequence.policy.load(&mut &policy[..]),
        };
        loaded.map_err(|error| named(&path, error))?;
        sequence.tokens = tokens;
        sequence.expected_length = header.expected_length;
        engine.restore_frequencies(&mut sequence);
        Ok((sequence, header))
    }
}

fn read_layer(
    input: &mut &[u8],
    plane_bytes: usize,
    tokens: u64,
    cold: Option<&Arc<TierFile>>,
    hot: &Arc<TierFile>,
) -> io::Result<LayerPages> {
    let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let (len, pages) = (read_u64(input)?, read_u64(input)?);
    // Policies that rearrange a layer keep fewer slots than tokens.
    if len > tokens || pages > tokens + 1 {
        return Err(wrong(format!(
            "a layer has {len} tokens on {pages} pages, expected at most {tokens} tokens"
        )));
    }
    let mut layer = LayerPages {
        len,
        ..LayerPages::default()
    };
    for _ in 0..pages {
        let mut plane = || -> io::Result<_> {
            let file = match read_u64(input)? {
                0 => return Ok(None),
                1 => cold
                    .ok_or_else(|| wrong("a page lies in the cold file, which is empty".into()))?,
                2 => hot,
                other => {
                    return Err(wrong(format!(
                        "a page lies in file {other}, expected 0, 1 or 2"
                    )));
                }
            };
            let (offset, checksum) = (read_u64(input)?, read_u64(input)?);
            Ok(Some(Arc::new(file.plane(offset, plane_bytes, checksum)?)))
        };
        layer.pages.push(Page {
            rotated: plane()?,
            raw: plane()?,
            value: plane()?,
        });
    }
    Ok(layer)
}

/// The parts of an index file.
pub struct Index<'a> {
    /// What the session says about itself.
    pub header: Header,
    tokens: Vec<u32>,
    policy: Vec<u8>,
    tables: &'a [u8],
}

/// Splits an index into its parts after checking magic, version and hash.
pub fn parse_index<'a>(bytes: &'a [u8], path: &Path) -> Result<Index<'a>> {
    let damaged = |what: &str| {
        EngineError::Session(format!(
            "{}: {what}; delete the session and prepare it again",
            path.display()
        ))
    };
    if !bytes.starts_with(MAGIC) {
        return Err(damaged("this is not a session index"));
    }
    let mut input = &bytes[MAGIC.len()..];
    let version = read_u64(&mut input).map_err(|_| damaged("the index is truncated"))?;
    if version != VERSION {
        return Err(damaged(&format!(
            "found version {version}, expected {VERSION}"
        )));
    }
    let Some((body, hash)) = input.split_last_chunk::<32>() else {
        return Err(damaged("the index is truncated"));
    };
    if blake3::hash(&bytes[..bytes.len() - 32]).as_bytes() != hash {
        return Err(damaged("the index does not match its hash"));
    }
    let mut input = body;
    let truncated = |_| damaged("the index is truncated");
    let header = read_bytes(&mut input).map_err(truncated)?;
    let header: Header = serde_json::from_slice(&header)
        .map_err(|error| damaged(&format!("the header cannot be read: {error}")))?;
    let tokens = read_bytes(&mut input).map_err(truncated)?;
    let policy = read_bytes(&mut input).map_err(truncated)?;
    let length = read_u64(&mut input).map_err(truncated)?;
    if length != input.len() as u64 || !tokens.len().is_multiple_of(4) {
        return Err(damaged(&format!(
            "the page tables have {} bytes, expected {length}",
            input.len()
        )));
    }
    let tokens = tokens
        .chunks_exact(4)
        .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    Ok(Index {
        header,
        tokens,
        policy,
        tables: input,
    })
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
