//! EPUB: a ZIP of XHTML chapters, read in the order of the package's spine (EPUB 3.3, sections 4 and 5).

use std::collections::HashMap;
use std::io::{Cursor, Read};

use roxmltree::{Document as Xml, ParsingOptions};
use zip::ZipArchive;
use zip::result::ZipError;

use super::{DocumentError, Extracted, Format, Limits, find, html, text};

const FORMAT: Format = Format::Epub;
const CONTAINER: &str = "META-INF/container.xml";
const ENCRYPTION: &str = "META-INF/encryption.xml";

/// An open archive, and how many bytes it may still expand to.
struct Book<'a> {
    name: &'a str,
    archive: ZipArchive<Cursor<&'a [u8]>>,
    size: usize,
    left: u64,
    limit: u64,
}

/// The chapters' text in reading order, a blank line between two.
pub(super) fn extract(
    name: &str,
    bytes: &[u8],
    limits: &Limits,
) -> Result<Extracted, DocumentError> {
    if !bytes.starts_with(b"PK") {
        return Err(malformed(
            name,
            "it does not begin with the bytes PK of a ZIP archive".to_owned(),
        ));
    }
    // The directory of a ZIP is at its end: without its signature the end is missing.
    if find(
        &bytes[bytes.len().saturating_sub(22 + (1 << 16))..],
        b"PK\x05\x06",
    )
    .is_none()
    {
        let detail = "the ZIP directory at the end is missing".to_owned();
        return Err(DocumentError::Truncated {
            name: name.to_owned(),
            format: FORMAT,
            bytes: bytes.len(),
            detail,
        });
    }
    let archive =
        ZipArchive::new(Cursor::new(bytes)).map_err(|error| zip_error(name, "directory", error))?;
    let limit = limits.max_expanded_bytes;
    let mut book = Book {
        name,
        archive,
        size: bytes.len(),
        left: limit,
        limit,
    };
    let container = book.xml(CONTAINER)?;
    let container = parse(name, CONTAINER, &container)?;
    let package_path = container
        .descendants()
        .find(|node| node.tag_name().name() == "rootfile")
        .and_then(|node| node.attribute("full-path"))
        .ok_or_else(|| {
            malformed(
                name,
                format!("{CONTAINER} names no package (rootfile with full-path)"),
            )
        })?
        .to_owned();
    let package = book.xml(&package_path)?;
    let package = parse(name, &package_path, &package)?;
    let items: HashMap<&str, &str> = package
        .descendants()
        .filter(|node| node.tag_name().name() == "item")
        .filter_map(|node| Some((node.attribute("id")?, node.attribute("href")?)))
        .collect();
    let spine: Vec<&str> = package
        .descendants()
        .filter(|node| node.tag_name().name() == "itemref")
        .filter_map(|node| node.attribute("idref"))
        .collect();
    if spine.is_empty() {
        return Err(malformed(
            name,
            format!("the spine of {package_path} lists no chapter (itemref)"),
        ));
    }
    let encrypted = if book.archive.index_for_name(ENCRYPTION).is_some() {
        book.xml(ENCRYPTION)?
    } else {
        String::new()
    };

    let (mut text, mut warnings) = (String::new(), Vec::new());
    for idref in spine {
        let Some(href) = items.get(idref) else {
            warnings.push(format!(
                "chapter {idref} is in the spine and not in the manifest; skipped"
            ));
            continue;
        };
        let path = resolve(&package_path, href);
        // Obfuscated fonts are listed there too, and do no harm.
        if encrypted.contains(&format!("\"{path}\"")) {
            return Err(DocumentError::Encrypted {
                name: name.to_owned(),
                format: FORMAT,
            });
        }
        if book.archive.index_for_name(&path).is_none() {
            warnings.push(format!(
                "chapter {path} is missing from the archive; skipped"
            ));
            continue;
        }
        let bytes = book.entry(&path)?;
        let chapter = text::decode(&format!("{name}: {path}"), &bytes, None)?;
        warnings.extend(
            chapter
                .warnings
                .into_iter()
                .map(|warning| format!("{path}: {warning}")),
        );
        let chapter = html::to_text(&chapter.text, html::Syntax::Xhtml);
        if !chapter.is_empty() {
            if !text.is_empty() {
                text.push('\n');
            }
            text.push_str(&chapter);
        }
    }
    Ok(Extracted { text, warnings })
}

impl Book<'_> {
    /// The bytes of one entry. What is counted is what really comes out, whatever the directory claims.
    fn entry(&mut self, path: &str) -> Result<Vec<u8>, DocumentError> {
        let entry = self
            .archive
            .by_name(path)
            .map_err(|error| zip_error(self.name, path, error))?;
        let mut bytes = Vec::new();
        entry
            .take(self.left.saturating_add(1))
            .read_to_end(&mut bytes)
            .map_err(|error| malformed(self.name, format!("{path}: {error}")))?;
        let too_far = || DocumentError::ExpandsTooFar {
            name: self.name.to_owned(),
            format: FORMAT,
            bytes: self.size,
            limit: self.limit,
        };
        self.left = self
            .left
            .checked_sub(bytes.len() as u64)
            .ok_or_else(too_far)?;
        Ok(bytes)
    }

    fn xml(&mut self, path: &str) -> Result<String, DocumentError> {
        let bytes = self.entry(path)?;
        Ok(text::decode(&format!("{}: {path}", self.name), &bytes, None)?.text)
    }
}

fn parse<'a>(name: &str, path: &str, xml: &'a str) -> Result<Xml<'a>, DocumentError> {
    // Old packages carry a DTD; the parser bounds entity expansion, and the nodes are bounded here.
    let options = ParsingOptions {
        allow_dtd: true,
        nodes_limit: 1 << 20,
        ..ParsingOptions::default()
    };
    Xml::parse_with_options(xml, options)
        .map_err(|error| malformed(name, format!("{path}: {error}")))
}

fn malformed(name: &str, detail: String) -> DocumentError {
    DocumentError::Malformed {
        name: name.to_owned(),
        format: FORMAT,
        detail,
    }
}

fn zip_error(name: &str, path: &str, error: ZipError) -> DocumentError {
    match error {
        ZipError::UnsupportedArchive(ZipError::PASSWORD_REQUIRED) => DocumentError::Encrypted {
            name: name.to_owned(),
            format: FORMAT,
        },
        error => malformed(name, format!("{path}: {error}")),
    }
}

/// The archive path of `href`, relative to the package document: `%20` decoded, `..` followed, `#part` dropped.
fn resolve(package: &str, href: &str) -> String {
    let href = href.split('#').next().unwrap_or_default();
    let mut parts: Vec<&str> = package.split('/').collect();
    parts.pop();
    let decoded = percent_decode(href);
    for part in decoded.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut decoded, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while at < bytes.len() {
        let hex = bytes
            .get(at + 1..at + 3)
            .and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) if bytes[at] == b'%' => {
                decoded.push(byte);
                at += 3;
            }
            _ => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}
