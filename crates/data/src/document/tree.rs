//! A folder as one text: its files in path order, each under `=== path ===`; what git ignores, hidden files, build
//! folders, links and binaries are left out; the warnings count the binaries.

use std::path::Path;

use ignore::WalkBuilder;

use super::{
    Document, DocumentError, Extracted, Format, Limits, epub, pdf, push_section, read_bounded, text,
};

/// Folders that tools fill: their content is made from the rest of the tree.
const BUILT: [&str; 8] = [
    "target",
    "node_modules",
    "__pycache__",
    "build",
    "dist",
    "_build",
    "venv",
    "bower_components",
];

/// The files of the folder `root` that are read, in path order, and what could not be looked at. Links are not followed,
/// so that a tree cannot lead out of itself or in circles.
pub(super) fn files(root: &Path) -> (Vec<ignore::DirEntry>, Vec<String>) {
    // Only what lies in the tree decides, not the user's own git settings: one tree gives one text on every machine.
    let walk = WalkBuilder::new(root)
        .require_git(false)
        .git_global(false)
        .filter_entry(|entry| {
            let is_folder = entry.file_type().is_some_and(|kind| kind.is_dir());
            let built = entry
                .file_name()
                .to_str()
                .is_some_and(|name| BUILT.contains(&name));
            entry.depth() == 0 || !(is_folder && built)
        })
        .sort_by_file_path(Path::cmp)
        .build();
    let (mut files, mut warnings) = (Vec::new(), Vec::new());
    for entry in walk {
        match entry {
            Ok(entry) if entry.file_type().is_some_and(|kind| kind.is_file()) => files.push(entry),
            Ok(_) => {}
            Err(error) => warnings.push(format!("skipped: {error}")),
        }
    }
    (files, warnings)
}

/// Reads the folder `root`.
pub(super) fn read(root: &Path, limits: &Limits) -> Result<Document, DocumentError> {
    let name = root.display().to_string();
    let (files, mut warnings) = files(root);
    let (mut joined, mut read_bytes) = (String::new(), 0u64);
    let mut binaries: Vec<String> = Vec::new();
    for entry in files {
        let relative = entry.path().strip_prefix(root).unwrap_or(entry.path());
        let relative = relative
            .to_string_lossy()
            .replace(std::path::MAIN_SEPARATOR, "/");
        let length = entry.metadata().map_or(0, |metadata| metadata.len());
        if read_bytes.saturating_add(length) > limits.max_bytes {
            let found = read_bytes.saturating_add(length);
            return Err(DocumentError::TooLong {
                name: format!("{name} up to {relative}"),
                found,
                limit: limits.max_bytes,
            });
        }
        let result = std::fs::File::open(entry.path())
            .map_err(|error| DocumentError::from_io(entry.path(), error))
            .and_then(|file| read_bounded(file, entry.path(), limits))
            .and_then(|bytes| {
                let extracted = extract(&relative, &bytes, limits)?;
                Ok((bytes.len() as u64, extracted))
            });
        match result {
            Ok((length, extracted)) => {
                read_bytes += length;
                warnings.extend(
                    extracted
                        .warnings
                        .into_iter()
                        .map(|warning| format!("{relative}: {warning}")),
                );
                if !extracted.text.trim().is_empty() {
                    push_section(&mut joined, &relative, &extracted.text);
                }
            }
            Err(DocumentError::Binary { .. }) => binaries.push(relative),
            Err(error @ (DocumentError::TooLong { .. } | DocumentError::ExpandsTooFar { .. })) => {
                return Err(error);
            }
            Err(error) => warnings.push(format!("skipped: {error}")),
        }
        if joined.len() as u64 > limits.max_expanded_bytes {
            let found = joined.len() as u64;
            return Err(DocumentError::TooLong {
                name,
                found,
                limit: limits.max_expanded_bytes,
            });
        }
    }
    if joined.is_empty() {
        return Err(DocumentError::Empty {
            name,
            format: Format::Tree,
        });
    }
    if let Some(first) = binaries.first() {
        warnings.push(format!(
            "binary files left out: {}, the first of them {first}",
            binaries.len()
        ));
    }
    Ok(Document {
        name,
        text: joined,
        source: Format::Tree,
        warnings,
    })
}

/// One file of a tree. Books are read as books; HTML stays source, as the rest of a source tree.
fn extract(relative: &str, bytes: &[u8], limits: &Limits) -> Result<Extracted, DocumentError> {
    let extension = relative
        .rsplit_once('.')
        .map(|(_, extension)| extension.to_ascii_lowercase());
    match extension.as_deref() {
        Some("pdf") => pdf::extract(relative, bytes, limits),
        Some("epub") => epub::extract(relative, bytes, limits),
        _ => text::decode(relative, bytes, None),
    }
}
