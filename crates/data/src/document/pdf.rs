//! PDF: the text operators of each page are followed in order, and gaps between glyphs become spaces and line breaks.
//!
//! lopdf parses the file and the fonts' encodings; where text stands on the page is followed here (ISO 32000-1, 9.4).
//! The order is that of the content stream, which is the reading order in what common programs write.

use std::collections::{BTreeSet, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};

use lopdf::Encoding;
use lopdf::content::Content;
use lopdf::{DecompressError, Dictionary, Document as Pdf, Error as PdfError, LoadOptions, Object};

use super::{DocumentError, Extracted, Format, Limits};

const FORMAT: Format = Format::Pdf;
/// The end of a whole file is marked within its last bytes.
const END_WINDOW: usize = 4096;
/// Forms drawn inside forms deeper than this are left out: a form may draw itself.
const MAX_FORM_DEPTH: usize = 8;
/// Operators followed in one document; far above any book, and it bounds the time of a hostile file.
const MAX_OPERATIONS: usize = 100_000_000;
/// A gap wider than this share of the font size is a space between words; kerning is smaller.
const SPACE_GAP: f32 = 0.18;
/// A step down beyond this share of the font size is a new line.
const LINE_STEP: f32 = 0.5;
/// A step down beyond this share of the font size is a new paragraph.
const PARAGRAPH_STEP: f32 = 1.9;

/// The text of all pages, a form feed between two.
pub(super) fn extract(
    name: &str,
    bytes: &[u8],
    limits: &Limits,
) -> Result<Extracted, DocumentError> {
    if super::find(&bytes[..bytes.len().min(1024)], b"%PDF-").is_none() {
        return Err(malformed(
            name,
            "no %PDF- in its first 1024 bytes".to_owned(),
        ));
    }
    let end = &bytes[bytes.len().saturating_sub(END_WINDOW)..];
    if super::find(end, b"%%EOF").is_none() && super::find(end, b"startxref").is_none() {
        let detail = format!(
            "neither %%EOF nor startxref in its last {} bytes",
            end.len()
        );
        return Err(DocumentError::Truncated {
            name: name.to_owned(),
            format: FORMAT,
            bytes: bytes.len(),
            detail,
        });
    }
    // The parser and its decoders (flate, LZW, brotli, ciphers) index into data the file controls, and a PDF is
    // often hostile: a panic in them must end this document, not the program. Nothing shared is left half changed.
    catch_unwind(AssertUnwindSafe(|| pages(name, bytes, limits))).unwrap_or_else(|_| {
        Err(malformed(
            name,
            "its parser gave up on an inconsistent structure".to_owned(),
        ))
    })
}

fn pages(name: &str, bytes: &[u8], limits: &Limits) -> Result<Extracted, DocumentError> {
    let budget = usize::try_from(limits.max_expanded_bytes).unwrap_or(usize::MAX);
    let failed = |error: PdfError| match error {
        PdfError::Decompress(DecompressError::MemoryLimitExceeded { .. }) => {
            DocumentError::ExpandsTooFar {
                name: name.to_owned(),
                format: FORMAT,
                bytes: bytes.len(),
                limit: limits.max_expanded_bytes,
            }
        }
        PdfError::InvalidPassword
        | PdfError::Decryption(_)
        | PdfError::UnsupportedSecurityHandler(_) => DocumentError::Encrypted {
            name: name.to_owned(),
            format: FORMAT,
        },
        error => malformed(name, error.to_string()),
    };
    let options = LoadOptions {
        max_decompressed_size: Some(budget),
        ..LoadOptions::default()
    };
    // A file locked only against printing opens with the empty password, and is then no longer marked encrypted.
    let pdf = Pdf::load_mem_with_options(bytes, options).map_err(failed)?;
    if pdf.is_encrypted() {
        return Err(DocumentError::Encrypted {
            name: name.to_owned(),
            format: FORMAT,
        });
    }
    let mut reader = Reader {
        pdf: &pdf,
        fonts: HashMap::new(),
        budget,
        operations: MAX_OPERATIONS,
        unsure: BTreeSet::new(),
    };
    let (mut text, mut warnings, mut count) = (String::new(), Vec::new(), 0);
    if pdf.xref_recovery.is_some() {
        warnings
            .push("the file's index is damaged and was rebuilt; pages may be missing".to_owned());
    }
    for page in pdf.page_iter() {
        count += 1;
        let before = text.len();
        if count > 1 {
            text.push('\x0c');
        }
        let mut pen = Pen::default();
        match reader.page(page, &mut pen) {
            Ok(()) => {}
            Err(error @ PdfError::Decompress(DecompressError::MemoryLimitExceeded { .. })) => {
                return Err(failed(error));
            }
            Err(error) => warnings.push(format!(
                "page {count}: {error}; what was read before it is kept"
            )),
        }
        if pen.text.trim().is_empty() && count > 1 {
            // A page without text is a picture; it leaves its form feed, so that pages can still be counted.
            text.truncate(before + 1);
        } else {
            text.push_str(pen.text.trim_end());
            text.push('\n');
        }
        if reader.operations == 0 {
            warnings.push(format!(
                "page {count}: more than {MAX_OPERATIONS} drawing operators; the rest is left out"
            ));
            break;
        }
    }
    if count == 0 {
        return Err(malformed(name, "it has no pages".to_owned()));
    }
    if text.trim().is_empty() {
        return Err(DocumentError::NoText {
            name: name.to_owned(),
            pages: count,
        });
    }
    if !reader.unsure.is_empty() {
        let fonts: Vec<String> = reader.unsure.into_iter().collect();
        warnings.push(format!(
            "fonts without a map to Unicode, whose text may be wrong or missing: {}",
            fonts.join(", ")
        ));
    }
    Ok(Extracted { text, warnings })
}

fn malformed(name: &str, detail: String) -> DocumentError {
    DocumentError::Malformed {
        name: name.to_owned(),
        format: FORMAT,
        detail,
    }
}

/// An affine map `[a b c d e f]`: x' = a x + c y + e, y' = b x + d y + f.
type Matrix = [f32; 6];
const IDENTITY: Matrix = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0];

/// First `inner`, then `outer`.
fn compose(inner: &Matrix, outer: &Matrix) -> Matrix {
    let [a, b, c, d, e, f] = *inner;
    let [oa, ob, oc, od, oe, of] = *outer;
    [
        a * oa + b * oc,
        a * ob + b * od,
        c * oa + d * oc,
        c * ob + d * od,
        e * oa + f * oc + oe,
        e * ob + f * od + of,
    ]
}

fn matrix(operands: &[Object]) -> Option<Matrix> {
    let mut entries = operands.iter().map(|operand| operand.as_float().ok());
    let matrix = [(); 6].map(|()| entries.next().flatten());
    matrix
        .iter()
        .all(Option::is_some)
        .then(|| matrix.map(Option::unwrap_or_default))
}

/// The text written so far on a page, and where its last glyph ended, in page units.
#[derive(Default)]
struct Pen {
    text: String,
    end: Option<[f32; 2]>,
}

impl Pen {
    /// Adds `shown`, which begins at `start` under `place` (text space to page) with a font of `size`.
    fn show(&mut self, shown: &str, start: [f32; 2], place: &Matrix, size: f32) {
        let scale = place[0].hypot(place[1]);
        if let (Some(end), true) = (self.end, scale > 0.0) {
            let (along, across) = (
                [place[0] / scale, place[1] / scale],
                [-place[1] / scale, place[0] / scale],
            );
            let step = [start[0] - end[0], start[1] - end[1]];
            let size = (size * scale).abs();
            let sideways = step[0] * along[0] + step[1] * along[1];
            let down = (step[0] * across[0] + step[1] * across[1]).abs();
            let gap = if down > PARAGRAPH_STEP * size {
                "\n\n"
            } else if down > LINE_STEP * size || sideways < -size {
                "\n"
            } else if sideways > SPACE_GAP * size {
                " "
            } else {
                ""
            };
            let blank = self.text.ends_with([' ', '\n']) || shown.starts_with(' ');
            if gap.starts_with('\n') {
                self.text.truncate(self.text.trim_end_matches(' ').len());
                self.text.push_str(gap);
            } else if !blank {
                self.text.push_str(gap);
            }
        }
        self.text.push_str(shown);
    }
}

/// What a font needs to be read: its encoding, and how wide its glyphs are.
struct Font<'a> {
    /// Its encoding is a guess, or unknown.
    unsure: bool,
    encoding: Option<Encoding<'a>>,
    /// Bytes of one glyph's code: 1, or 2 in a composite font.
    code_len: usize,
    /// Widths by code, in thousandths of the font size.
    widths: HashMap<u32, f32>,
    default_width: f32,
}

/// The text state that `q` saves (ISO 32000-1, table 104), with the matrix from user space to the page.
#[derive(Clone)]
struct State {
    page: Matrix,
    font: Option<usize>,
    size: f32,
    char_space: f32,
    word_space: f32,
    stretch: f32,
    leading: f32,
}

struct Reader<'a> {
    pdf: &'a Pdf,
    /// Fonts by the address of their dictionary, which the document owns: pages share them.
    fonts: HashMap<usize, Font<'a>>,
    /// Bytes that streams may still expand to.
    budget: usize,
    operations: usize,
    /// Names of the fonts whose text may be wrong or missing.
    unsure: BTreeSet<String>,
}

impl<'a> Reader<'a> {
    fn page(&mut self, page: lopdf::ObjectId, pen: &mut Pen) -> Result<(), PdfError> {
        let pdf = self.pdf;
        let content = pdf.get_page_content_with_limit(page, self.budget)?;
        self.spend(content.len())?;
        let (own, inherited) = pdf.get_page_resources(page)?;
        // The nearest resources come first, and hide those of the page's parents.
        let resources: Vec<&Dictionary> = own
            .into_iter()
            .chain(
                inherited
                    .into_iter()
                    .filter_map(|id| pdf.get_dictionary(id).ok()),
            )
            .collect();
        self.run(&content, &resources, IDENTITY, 0, pen)
    }

    fn spend(&mut self, bytes: usize) -> Result<(), PdfError> {
        let limit = self.budget;
        self.budget = limit
            .checked_sub(bytes)
            .ok_or(DecompressError::MemoryLimitExceeded { limit })?;
        Ok(())
    }

    /// Follows the operators of one content stream.
    fn run(
        &mut self,
        content: &[u8],
        resources: &[&'a Dictionary],
        page: Matrix,
        depth: usize,
        pen: &mut Pen,
    ) -> Result<(), PdfError> {
        let (char_space, word_space) = (0.0, 0.0);
        let mut state = State {
            page,
            font: None,
            size: 0.0,
            char_space,
            word_space,
            stretch: 1.0,
            leading: 0.0,
        };
        let mut saved: Vec<State> = Vec::new();
        // The matrix of the line's start, and that of the next glyph.
        let (mut line, mut place) = (IDENTITY, IDENTITY);
        for operation in Content::decode_iter(content) {
            let operation = operation?;
            self.operations = self.operations.saturating_sub(1);
            if self.operations == 0 {
                return Ok(());
            }
            let operands = operation.operands.as_slice();
            let number = |index: usize| {
                operands
                    .get(index)
                    .and_then(|operand| operand.as_float().ok())
            };
            let operator = operation.operator.as_str();
            match operator {
                "q" => saved.push(state.clone()),
                "Q" => state = saved.pop().unwrap_or(state),
                "cm" => {
                    if let Some(matrix) = matrix(operands) {
                        state.page = compose(&matrix, &state.page);
                    }
                }
                "BT" => (line, place) = (IDENTITY, IDENTITY),
                "Tc" => state.char_space = number(0).unwrap_or(0.0),
                "Tw" => state.word_space = number(0).unwrap_or(0.0),
                "Tz" => state.stretch = number(0).unwrap_or(100.0) / 100.0,
                "TL" => state.leading = number(0).unwrap_or(0.0),
                "Tf" => {
                    let name = operands.first().and_then(|operand| operand.as_name().ok());
                    state.font = name.and_then(|name| self.font(name, resources));
                    state.size = number(1).unwrap_or(0.0);
                }
                "Tm" => {
                    if let Some(matrix) = matrix(operands) {
                        (line, place) = (matrix, matrix);
                    }
                }
                "Td" | "TD" | "T*" | "'" | "\"" => {
                    let (x, y) = match operator {
                        "Td" | "TD" => (number(0).unwrap_or(0.0), number(1).unwrap_or(0.0)),
                        _ => (0.0, -state.leading),
                    };
                    match operator {
                        "TD" => state.leading = -y,
                        "\"" => {
                            state.word_space = number(0).unwrap_or(0.0);
                            state.char_space = number(1).unwrap_or(0.0);
                        }
                        _ => {}
                    }
                    line = compose(&[1.0, 0.0, 0.0, 1.0, x, y], &line);
                    place = line;
                    if let ("'" | "\"", Some(string)) = (operator, operands.last()) {
                        self.show(string, &state, &mut place, pen);
                    }
                }
                "Tj" => {
                    if let Some(string) = operands.first() {
                        self.show(string, &state, &mut place, pen);
                    }
                }
                "TJ" => {
                    let parts = operands.first().and_then(|operand| operand.as_array().ok());
                    for part in parts.into_iter().flatten() {
                        match part.as_float() {
                            Ok(back) => {
                                let x = -back / 1000.0 * state.size * state.stretch;
                                place = compose(&[1.0, 0.0, 0.0, 1.0, x, 0.0], &place);
                            }
                            Err(_) => self.show(part, &state, &mut place, pen),
                        }
                    }
                }
                "Do" if depth < MAX_FORM_DEPTH => {
                    let Some(name) = operands.first().and_then(|operand| operand.as_name().ok())
                    else {
                        continue;
                    };
                    let Some(object) = self.resource(b"XObject", name, resources) else {
                        continue;
                    };
                    let Ok(form) = object.as_stream() else {
                        continue;
                    };
                    if form.dict.get(b"Subtype").and_then(Object::as_name).ok() != Some(b"Form") {
                        continue;
                    }
                    let content = form.get_plain_content_with_limit(self.budget)?;
                    self.spend(content.len())?;
                    let own = form
                        .dict
                        .get_deref(b"Resources", self.pdf)
                        .and_then(Object::as_dict)
                        .ok();
                    let resources = own.map_or_else(|| resources.to_vec(), |own| vec![own]);
                    let inner = form
                        .dict
                        .get_deref(b"Matrix", self.pdf)
                        .and_then(Object::as_array)
                        .ok();
                    let inner = inner
                        .and_then(|entries| matrix(entries))
                        .unwrap_or(IDENTITY);
                    self.run(
                        &content,
                        &resources,
                        compose(&inner, &state.page),
                        depth + 1,
                        pen,
                    )?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Shows one string and moves `place` past it.
    fn show(&self, string: &Object, state: &State, place: &mut Matrix, pen: &mut Pen) {
        let (Ok(bytes), Some(font)) = (
            string.as_str(),
            state.font.and_then(|key| self.fonts.get(&key)),
        ) else {
            return;
        };
        let mut advance = 0.0;
        for code in bytes.chunks(font.code_len) {
            let code = code
                .iter()
                .fold(0, |code, &byte| code << 8 | u32::from(byte));
            let width = font
                .widths
                .get(&code)
                .copied()
                .unwrap_or(font.default_width);
            let word = if font.code_len == 1 && code == 32 {
                state.word_space
            } else {
                0.0
            };
            advance += (width / 1000.0 * state.size + state.char_space + word) * state.stretch;
        }
        let start = compose(place, &state.page);
        *place = compose(&[1.0, 0.0, 0.0, 1.0, advance, 0.0], place);
        let decoded = font
            .encoding
            .as_ref()
            .and_then(|encoding| encoding.bytes_to_string(bytes).ok());
        let Some(decoded) = decoded.filter(|decoded| !decoded.is_empty()) else {
            return;
        };
        let decoded: String = decoded
            .chars()
            .filter(|c| !c.is_control() && *c != '\u{feff}')
            .collect();
        pen.show(&decoded, [start[4], start[5]], &start, state.size);
        let end = compose(place, &state.page);
        pen.end = Some([end[4], end[5]]);
    }

    fn resource(
        &self,
        kind: &[u8],
        name: &[u8],
        resources: &[&'a Dictionary],
    ) -> Option<&'a Object> {
        resources.iter().find_map(|resources| {
            let group = resources
                .get_deref(kind, self.pdf)
                .and_then(Object::as_dict)
                .ok()?;
            group.get_deref(name, self.pdf).ok()
        })
    }

    /// The key of a font in `self.fonts`, read on first use.
    fn font(&mut self, name: &[u8], resources: &[&'a Dictionary]) -> Option<usize> {
        let dict = self.resource(b"Font", name, resources)?.as_dict().ok()?;
        let key = std::ptr::from_ref(dict).addr();
        if !self.fonts.contains_key(&key) {
            let font = read_font(self.pdf, dict, self.budget);
            if font.unsure {
                let name = dict
                    .get(b"BaseFont")
                    .and_then(Object::as_name)
                    .unwrap_or(name);
                self.unsure
                    .insert(String::from_utf8_lossy(name).into_owned());
            }
            self.fonts.insert(key, font);
        }
        Some(key)
    }
}

fn read_font<'a>(pdf: &'a Pdf, dict: &'a Dictionary, budget: usize) -> Font<'a> {
    let composite = dict.get(b"Subtype").and_then(Object::as_name).ok() == Some(b"Type0");
    let map = unicode_map(pdf, dict, budget);
    let descriptor = dict
        .get_deref(b"FontDescriptor", pdf)
        .and_then(Object::as_dict)
        .ok();
    let embedded = descriptor.is_some_and(|descriptor| {
        [&b"FontFile"[..], b"FontFile2", b"FontFile3"]
            .iter()
            .any(|key| descriptor.has(key))
    });
    // An embedded font that names no encoding has one inside, which is not read: its letters are mostly the usual ones.
    let unsure = map.is_none() && (composite || embedded && !dict.has(b"Encoding"));
    let encoding = map.or_else(|| dict.get_font_encoding_with_limit(pdf, budget).ok());
    // Glyph numbers without a map to Unicode mean nothing outside the font: no text is better than a wrong one.
    let readable = |encoding: &Encoding| {
        !composite
            || matches!(
                encoding,
                Encoding::UnicodeMapEncoding(_) | Encoding::SimpleEncoding(_)
            )
    };
    let encoding = encoding.filter(readable);
    let mut font = Font {
        unsure,
        encoding,
        code_len: if composite { 2 } else { 1 },
        widths: HashMap::new(),
        // The mean of Latin text; the 14 standard fonts need not give widths.
        default_width: 500.0,
    };
    let number = |object: &Object| {
        pdf.dereference(object)
            .ok()
            .and_then(|(_, object)| object.as_float().ok())
    };
    if composite {
        let descendants = dict
            .get_deref(b"DescendantFonts", pdf)
            .and_then(Object::as_array)
            .ok();
        let first = descendants
            .and_then(|fonts| fonts.first())
            .and_then(|object| pdf.dereference(object).ok());
        let Some(inner) = first.and_then(|(_, object)| object.as_dict().ok()) else {
            return font;
        };
        font.default_width = inner.get(b"DW").ok().and_then(number).unwrap_or(1000.0);
        let entries = inner
            .get_deref(b"W", pdf)
            .and_then(Object::as_array)
            .map_or(&[][..], Vec::as_slice);
        // `first [w w w]` or `first last w`.
        let mut at = 0;
        while let [Some(first), Some(next)] = [entries.get(at), entries.get(at + 1)] {
            let first = number(first).unwrap_or(0.0) as u32;
            if let Ok((_, Object::Array(widths))) = pdf.dereference(next) {
                let codes = (first..).zip(widths);
                font.widths
                    .extend(codes.filter_map(|(code, width)| Some((code, number(width)?))));
                at += 2;
            } else {
                let last = (number(next).unwrap_or(0.0) as u32).min(0xffff);
                if let Some(width) = entries.get(at + 2).and_then(number) {
                    font.widths.extend((first..=last).map(|code| (code, width)));
                }
                at += 3;
            }
        }
    } else if let Ok(widths) = dict.get_deref(b"Widths", pdf).and_then(Object::as_array) {
        let first = dict.get(b"FirstChar").ok().and_then(number).unwrap_or(0.0) as u32;
        font.widths.extend(
            (first..=0xff)
                .zip(widths)
                .filter_map(|(code, width)| Some((code, number(width)?))),
        );
    }
    font
}

/// The font's own map to Unicode, which is surer than the glyph names of its encoding.
fn unicode_map<'a>(pdf: &'a Pdf, dict: &Dictionary, budget: usize) -> Option<Encoding<'a>> {
    dict.get_deref(b"ToUnicode", pdf)
        .and_then(Object::as_stream)
        .ok()?;
    let mut without = dict.clone();
    without.remove(b"Encoding");
    match without.get_font_encoding_with_limit(pdf, budget) {
        Ok(Encoding::UnicodeMapEncoding(map)) => Some(Encoding::UnicodeMapEncoding(map)),
        _ => None,
    }
}
