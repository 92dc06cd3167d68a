//! Bytes to clean text: the encoding is found, line ends become `\n`, and what is not text is refused.

use encoding_rs::{Encoding, UTF_8};

use super::{DocumentError, Extracted, find};

/// Bytes looked at to tell text from binary.
const SAMPLE: usize = 64 << 10;
/// A sample with more control bytes than this, in percent, is binary.
const MAX_CONTROL_PERCENT: usize = 10;
/// A sample with more control or invalid bytes than this, in percent, is binary or in a foreign encoding.
const MAX_BAD_PERCENT: usize = 30;

/// Decodes `bytes`: by its byte-order mark, else by `charset`, else as UTF-8 with what is invalid replaced and counted.
pub(super) fn decode(
    name: &str,
    bytes: &[u8],
    charset: Option<&'static Encoding>,
) -> Result<Extracted, DocumentError> {
    let (encoding, body) = match Encoding::for_bom(bytes) {
        Some((encoding, length)) => (encoding, &bytes[length..]),
        None => (charset.unwrap_or(UTF_8), bytes),
    };
    if encoding == UTF_8 {
        refuse_binary(name, body, bytes.len() - body.len())?;
    }
    let mut warnings = Vec::new();
    let decoded = if encoding == UTF_8 {
        let invalid = body
            .utf8_chunks()
            .filter(|chunk| !chunk.invalid().is_empty())
            .count();
        if invalid > 0 {
            warnings.push(format!(
                "{invalid} invalid UTF-8 sequences were replaced by U+FFFD"
            ));
        }
        String::from_utf8_lossy(body)
    } else {
        let (decoded, invalid) = encoding.decode_without_bom_handling(body);
        if invalid {
            let count = decoded.matches('\u{fffd}').count();
            warnings.push(format!(
                "{count} invalid {} sequences were replaced by U+FFFD",
                encoding.name()
            ));
        }
        decoded
    };
    Ok(Extracted {
        text: unix_lines(&decoded),
        warnings,
    })
}

/// The charset that an HTML file declares in its first kilobyte.
pub(super) fn declared_charset(bytes: &[u8]) -> Option<&'static Encoding> {
    let head = bytes[..bytes.len().min(1024)].to_ascii_lowercase();
    let after = &head[find(&head, b"charset")? + b"charset".len()..];
    let value = after
        .trim_ascii_start()
        .strip_prefix(b"=")?
        .trim_ascii_start();
    let value = value
        .strip_prefix(b"\"")
        .or(value.strip_prefix(b"'"))
        .unwrap_or(value);
    let length = value
        .iter()
        .take_while(|byte| byte.is_ascii_alphanumeric() || b"-_:.".contains(byte))
        .count();
    // A declaration that could be read as ASCII is not in UTF-16, whatever it says; the standard reads it as UTF-8.
    Encoding::for_label(&value[..length]).map(Encoding::output_encoding)
}

/// CRLF and lone CR to LF.
fn unix_lines(text: &str) -> String {
    if text.contains('\r') {
        text.replace("\r\n", "\n").replace('\r', "\n")
    } else {
        text.to_owned()
    }
}

/// Fails when the first bytes are mostly not text; `offset` is where `body` begins in the file.
fn refuse_binary(name: &str, body: &[u8], offset: usize) -> Result<(), DocumentError> {
    let sample = &body[..body.len().min(SAMPLE)];
    let is_control =
        |byte: u8| (byte < 0x20 && !b"\t\n\r\x08\x0c\x1b".contains(&byte)) || byte == 0x7f;
    let (mut control, mut invalid, mut first, mut at) = (0, 0, None, 0);
    for chunk in sample.utf8_chunks() {
        for byte in chunk.valid().bytes() {
            if is_control(byte) {
                control += 1;
                first = first.or(Some(at));
            }
            at += 1;
        }
        // A character cut by the end of the sample is no fault.
        let cut = at + chunk.invalid().len() == sample.len() && sample.len() < body.len();
        if !chunk.invalid().is_empty() && !cut {
            invalid += chunk.invalid().len();
            first = first.or(Some(at));
        }
        at += chunk.invalid().len();
    }
    let percent = |count: usize| count * 100 / sample.len().max(1);
    match first {
        Some(at)
            if percent(control) > MAX_CONTROL_PERCENT
                || percent(control + invalid) > MAX_BAD_PERCENT =>
        {
            Err(DocumentError::Binary {
                name: name.to_owned(),
                offset: offset + at,
                byte: sample[at],
                percent: percent(control + invalid),
                sampled: sample.len(),
            })
        }
        _ => Ok(()),
    }
}
