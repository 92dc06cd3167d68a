//! Cuts a document into passages of about equal size that never pass a number of words, for retrieval
//! (paper 17: sections, long ones in equal chunks of at most 100 words). Together the passages are the
//! document, byte for byte.

use longspan_data::document::Format;
use serde::{Deserialize, Serialize};

/// How documents are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ChunkConfig {
    /// Most words of a passage. A Chinese, Japanese or Korean character counts as a word, and so do every 16
    /// characters of a longer run without blanks.
    pub words: usize,
}

impl Default for ChunkConfig {
    fn default() -> Self {
        ChunkConfig { words: 100 }
    }
}

/// A passage of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The document's name, and the section's heading or the page where there is one.
    pub title: String,
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
    /// Line of the first byte, from 1.
    pub line: usize,
}

/// Characters of a run without blanks that count as one word.
const LONG_WORD: usize = 16;

/// Cuts `text`; `format` says what a section is: headings in Markdown, pages in a PDF.
pub fn chunk(name: &str, format: Format, text: &str, config: &ChunkConfig) -> Vec<Chunk> {
    let most = config.words.max(1);
    let mut chunks = Vec::new();
    for section in sections(name, format, text) {
        let units = units(&text[section.start..section.end]);
        if units.is_empty() {
            continue;
        }
        // A little room below the limit lets the cuts move to ends of sentences.
        let room = (most - most / 8).max(1);
        let pieces = units.len().div_ceil(room);
        let mut first = 0;
        for piece in 0..pieces {
            let left = pieces - piece;
            let end = match left {
                1 => units.len(),
                _ => cut(text, section.start, &units, first, left, most),
            };
            let start_byte = section.start + units[first].0;
            let end_byte = section.start + units[end - 1].1;
            chunks.push(Chunk {
                title: section.title.clone(),
                start: start_byte,
                end: end_byte,
                line: 0,
            });
            first = end;
        }
    }
    let (mut line, mut at) = (1, 0);
    for chunk in &mut chunks {
        line += count_lines(&text[at..chunk.start]);
        at = chunk.start;
        let blank = text[at..chunk.end].len() - text[at..chunk.end].trim_start().len();
        chunk.line = line + count_lines(&text[at..at + blank]);
    }
    chunks
}

fn count_lines(text: &str) -> usize {
    text.bytes().filter(|&b| b == b'\n').count()
}

/// The unit at which the first of `left` pieces should end: nearest to an equal share, at the end of a
/// sentence or line if one is near, never above `most` units and leaving no more than the rest can hold.
fn cut(
    text: &str,
    offset: usize,
    units: &[(usize, usize)],
    first: usize,
    left: usize,
    most: usize,
) -> usize {
    let total = units.len() - first;
    let share = total.div_ceil(left);
    let least = total.saturating_sub(most * (left - 1)).max(1);
    let ideal = share.clamp(least, most);
    let reach = (most / 8).max(1);
    let quality = |end: usize| {
        let (start, stop) = units[first + end - 1];
        let unit = &text[offset + start..offset + stop];
        let word = unit.trim_end();
        if unit[word.len()..].contains("\n\n") {
            3
        } else if word.ends_with(['.', '!', '?', '。', '！', '？', ';', '}']) {
            2
        } else if unit[word.len()..].contains('\n') {
            1
        } else {
            0
        }
    };
    let from = ideal.saturating_sub(reach).max(least);
    let to = (ideal + reach).min(most).min(total - (left - 1));
    let best = (from..=to.max(from))
        .max_by_key(|&end| (quality(end), std::cmp::Reverse(end.abs_diff(ideal))))
        .unwrap_or(ideal);
    first + best
}

/// Words as byte ranges; each holds the blanks after it, the first those before it too.
fn units(text: &str) -> Vec<(usize, usize)> {
    let mut units: Vec<(usize, usize)> = Vec::new();
    let (mut start, mut length, mut blank) = (0, 0usize, false);
    for (at, c) in text.char_indices() {
        if c.is_whitespace() {
            blank = true;
            continue;
        }
        let own = is_wide(c);
        if length > 0 && (blank || own || length >= LONG_WORD) {
            units.push((start, at));
            (start, length) = (at, 0);
        }
        blank = false;
        // The next character begins another word after a wide one.
        length = if own { LONG_WORD } else { length + 1 };
    }
    if length > 0 {
        units.push((start, text.len()));
    }
    units
}

fn is_wide(c: char) -> bool {
    matches!(c, '\u{2E80}'..='\u{9FFF}' | '\u{AC00}'..='\u{D7AF}' | '\u{F900}'..='\u{FAFF}' | '\u{20000}'..='\u{3FFFF}')
}

struct Section {
    title: String,
    start: usize,
    end: usize,
}

fn sections(name: &str, format: Format, text: &str) -> Vec<Section> {
    let mut starts: Vec<(usize, String)> = vec![(0, name.to_string())];
    match format {
        Format::Markdown => {
            let (mut at, mut fenced, mut path) = (0, false, Vec::<(usize, String)>::new());
            for line in text.split_inclusive('\n') {
                if line.trim_start().starts_with("```") {
                    fenced = !fenced;
                }
                let level = line.bytes().take_while(|&b| b == b'#').count();
                let heading = line[level..].strip_prefix(' ').map(str::trim);
                if let (false, 1..=6, Some(heading)) = (fenced, level, heading) {
                    path.retain(|(above, _)| *above < level);
                    path.push((level, heading.to_string()));
                    let names: Vec<&str> = path.iter().map(|(_, name)| name.as_str()).collect();
                    let title = format!("{name}: {}", names.join(" / "));
                    let before = &text[starts.last().map_or(0, |last| last.0)..at];
                    match starts.last_mut() {
                        // A heading without a text of its own goes with the next one.
                        Some(last) if is_bare(before) => last.1 = title,
                        _ => starts.push((at, title)),
                    }
                }
                at += line.len();
            }
        }
        Format::Pdf => {
            let pages = text.match_indices('\u{c}').map(|(at, _)| at + 1);
            starts[0].1 = format!("{name}, page 1");
            starts.extend(
                pages
                    .enumerate()
                    .map(|(n, at)| (at, format!("{name}, page {}", n + 2))),
            );
        }
        _ => {}
    }
    let ends: Vec<usize> = (starts.iter().skip(1).map(|s| s.0))
        .chain([text.len()])
        .collect();
    (starts.into_iter().zip(ends))
        .map(|((start, title), end)| Section { title, start, end })
        .collect()
}

/// Nothing but headings and blanks.
fn is_bare(text: &str) -> bool {
    text.lines()
        .all(|line| line.trim().is_empty() || line.starts_with('#'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> usize {
        units(text).len()
    }

    #[test]
    fn chunks_are_the_document_and_never_too_long() {
        let long = "x".repeat(500);
        let texts = [
            "".to_string(),
            " \n\n ".into(),
            "one".into(),
            " lead and trail \n".into(),
            "A sentence of six words here. ".repeat(100),
            (0..1000).map(|i| format!("word{i}\n")).collect(),
            format!("{long} and {long}"),
            "東京は日本の首都です。".repeat(60),
            "# One\n\ntext of one\n\n## Two\n\n### Three\n\ntext of three ".repeat(40),
            "fn a() {\n    b();\n}\n\n".repeat(200),
        ];
        for text in &texts {
            for format in [Format::Text, Format::Markdown, Format::Pdf] {
                for most in [1, 2, 7, 100] {
                    let chunks = chunk("name", format, text, &ChunkConfig { words: most });
                    let joined: String = chunks.iter().map(|c| &text[c.start..c.end]).collect();
                    if text.trim().is_empty() {
                        assert!(chunks.is_empty());
                    } else {
                        assert_eq!(&joined, text, "{format} {most}");
                    }
                    let sizes: Vec<usize> = chunks
                        .iter()
                        .map(|c| words(&text[c.start..c.end]))
                        .collect();
                    assert!(
                        sizes.iter().all(|&n| (1..=most).contains(&n)),
                        "{most}: {sizes:?}"
                    );
                    for c in &chunks {
                        let blank = text[c.start..].len() - text[c.start..].trim_start().len();
                        assert_eq!(c.line, 1 + count_lines(&text[..c.start + blank]));
                    }
                }
            }
        }
    }

    #[test]
    fn chunks_are_about_equal_and_end_with_sentences() {
        let text = "Six words stand in this sentence. ".repeat(101);
        let chunks = chunk("a", Format::Text, &text, &ChunkConfig { words: 100 });
        let sizes: Vec<usize> = chunks
            .iter()
            .map(|c| words(&text[c.start..c.end]))
            .collect();
        assert_eq!(sizes.len(), 7);
        assert!(sizes.iter().all(|&n| (80..=96).contains(&n)), "{sizes:?}");
        assert!(
            chunks
                .iter()
                .all(|c| text[c.start..c.end].trim_end().ends_with('.'))
        );
    }

    #[test]
    fn headings_and_pages_become_titles() {
        let text =
            "intro\n\n# Top\n\n## Part\n\nbody\n\n```\n# no heading\n```\n\n# Next\n\nmore\n";
        let chunks = chunk("a.md", Format::Markdown, text, &ChunkConfig::default());
        let titles: Vec<&str> = chunks.iter().map(|c| c.title.as_str()).collect();
        assert_eq!(titles, ["a.md", "a.md: Top / Part", "a.md: Next"]);
        let chunks = chunk("b.pdf", Format::Pdf, "one\u{c}two", &ChunkConfig::default());
        let titles: Vec<&str> = chunks.iter().map(|c| c.title.as_str()).collect();
        assert_eq!(titles, ["b.pdf, page 1", "b.pdf, page 2"]);
    }
}
