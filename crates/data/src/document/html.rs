//! HTML to text as a reader sees it: headings, lists, tables and `pre` keep their shape; scripts and styles are dropped.
//!
//! Works on the token stream of the WHATWG tokenizer with one small state, so that depth of nesting costs no stack.

use html5gum::emitters::default::DefaultEmitter;
use html5gum::{Token, Tokenizer};

/// Whose rules the tags follow.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Syntax {
    /// HTML: `<script>` holds raw text, and `/>` means nothing.
    Html,
    /// XHTML, the syntax of EPUB chapters: `<script/>` is complete.
    Xhtml,
}

/// Elements whose content no reader sees.
fn is_invisible(name: &[u8]) -> bool {
    matches!(
        name,
        b"script"
            | b"style"
            | b"title"
            | b"template"
            | b"noscript"
            | b"iframe"
            | b"object"
            | b"svg"
    )
}

/// Line breaks around an element: 2 sets it apart by a blank line, 1 starts a line, 0 runs on.
fn breaks(name: &[u8]) -> usize {
    match name {
        b"p" | b"h1" | b"h2" | b"h3" | b"h4" | b"h5" | b"h6" | b"ul" | b"ol" | b"dl" | b"table"
        | b"pre" | b"blockquote" | b"hr" | b"figure" => 2,
        b"div" | b"li" | b"tr" | b"dt" | b"dd" | b"section" | b"article" | b"header"
        | b"footer" | b"main" | b"nav" | b"aside" | b"body" | b"form" | b"caption"
        | b"figcaption" | b"address" | b"details" | b"summary" | b"option" | b"thead"
        | b"tbody" | b"tfoot" | b"fieldset" | b"legend" => 1,
        _ => 0,
    }
}

/// The visible text of `html`.
pub(super) fn to_text(html: &str, syntax: Syntax) -> String {
    let mut emitter = DefaultEmitter::default();
    emitter.naively_switch_states(syntax == Syntax::Html);
    let mut writer = Writer::default();
    // The element being skipped, and how many of its name are open.
    let mut skipped: Option<(Vec<u8>, usize)> = None;
    for Ok(token) in Tokenizer::new_with_emitter(html, emitter) {
        match token {
            Token::StartTag(tag) => {
                let complete = tag.self_closing && syntax == Syntax::Xhtml;
                match &mut skipped {
                    Some((name, open)) => {
                        *open += usize::from(!complete && tag.name[..] == name[..])
                    }
                    None if is_invisible(&tag.name) => {
                        skipped = (!complete).then(|| (tag.name.to_vec(), 1));
                    }
                    None => {
                        writer.start(&tag.name);
                        if complete {
                            writer.end(&tag.name);
                        }
                    }
                }
            }
            Token::EndTag(tag) => match &mut skipped {
                Some((name, open)) => {
                    *open -= usize::from(tag.name[..] == name[..]);
                    if *open == 0 {
                        skipped = None;
                    }
                }
                None => writer.end(&tag.name),
            },
            Token::String(string) if skipped.is_none() => {
                writer.text(&String::from_utf8_lossy(&string))
            }
            _ => {}
        }
    }
    writer.finish()
}

/// The text so far, and what is owed before the next character.
#[derive(Default)]
struct Writer {
    text: String,
    /// Line breaks owed.
    breaks: usize,
    /// A space owed.
    space: bool,
    /// What opens the next line: a bullet, a number, hashes of a heading.
    prefix: String,
    /// Open lists: the next number, or 0 for bullets.
    lists: Vec<usize>,
    /// Cells begun in each open table's row.
    rows: Vec<usize>,
    pre: usize,
}

/// Lists nested deeper than this are indented no further, so that hostile nesting cannot multiply the output.
const MAX_INDENT: usize = 16;

impl Writer {
    fn start(&mut self, name: &[u8]) {
        self.break_line(breaks(name));
        match name {
            b"br" if self.pre > 0 => self.text("\n"),
            b"br" => {
                // Two in a row set paragraphs apart in old pages.
                self.breaks = (self.breaks + 1).min(2);
                self.space = false;
            }
            [b'h', level @ b'1'..=b'6'] => {
                self.prefix = "#".repeat(usize::from(level - b'0')) + " ";
            }
            b"hr" => {
                self.text("---");
                self.break_line(2);
            }
            b"ul" | b"ol" => {
                if !self.lists.is_empty() {
                    self.breaks = self.breaks.min(1);
                }
                self.lists.push(usize::from(name == b"ol"));
            }
            b"li" => {
                let indent = "  ".repeat(self.lists.len().saturating_sub(1).min(MAX_INDENT));
                self.prefix = match self.lists.last_mut() {
                    Some(number) if *number > 0 => {
                        *number += 1;
                        format!("{indent}{}. ", *number - 1)
                    }
                    _ => format!("{indent}- "),
                };
            }
            b"table" => self.rows.push(0),
            b"tr" => {
                if let Some(cells) = self.rows.last_mut() {
                    *cells = 0;
                }
            }
            b"td" | b"th" => {
                if let Some(cells) = self.rows.last_mut() {
                    *cells += 1;
                    if *cells > 1 {
                        (self.breaks, self.space) = (0, false);
                        self.text.push_str(" | ");
                    }
                }
            }
            b"pre" => self.pre += 1,
            _ => {}
        }
    }

    fn end(&mut self, name: &[u8]) {
        match name {
            b"ul" | b"ol" => {
                self.lists.pop();
            }
            b"table" => {
                self.rows.pop();
            }
            b"tr" => {
                if let Some(cells) = self.rows.last_mut() {
                    *cells = 0;
                }
            }
            b"pre" => self.pre = self.pre.saturating_sub(1),
            b"li" | [b'h', b'1'..=b'6'] => self.prefix.clear(),
            _ => {}
        }
        self.break_line(if self.lists.is_empty() {
            breaks(name)
        } else {
            breaks(name).min(1)
        });
    }

    fn text(&mut self, text: &str) {
        if self.pre > 0 {
            // The line end right after `<pre>` is not part of it.
            let text = if self.breaks > 0 {
                text.strip_prefix('\n').unwrap_or(text)
            } else {
                text
            };
            if !text.is_empty() {
                self.flush();
                self.text.push_str(text);
            }
            return;
        }
        for (index, word) in text.split([' ', '\t', '\n', '\r', '\x0c']).enumerate() {
            self.space |= index > 0;
            if !word.is_empty() {
                self.flush();
                self.text
                    .extend(word.chars().map(|c| if c == '\u{a0}' { ' ' } else { c }));
            }
        }
    }

    /// Pays the breaks, the prefix and the space owed.
    fn flush(&mut self) {
        if self.breaks > 0 {
            if !self.text.is_empty() {
                let present = self
                    .text
                    .bytes()
                    .rev()
                    .take_while(|&byte| byte == b'\n')
                    .count();
                self.text.extend(std::iter::repeat_n(
                    '\n',
                    self.breaks.saturating_sub(present),
                ));
            }
        } else if self.space && !self.text.is_empty() && !self.text.ends_with([' ', '\n']) {
            self.text.push(' ');
        }
        (self.breaks, self.space) = (0, false);
        self.text.push_str(&std::mem::take(&mut self.prefix));
    }

    /// Owes at least `count` line breaks; none where a table cell begins, and no blank line inside a table row.
    fn break_line(&mut self, count: usize) {
        if count == 0 || self.text.ends_with(" | ") {
            return;
        }
        let in_row = self.rows.last().is_some_and(|&cells| cells > 0);
        self.breaks = self.breaks.max(if in_row { count.min(1) } else { count });
        self.space = false;
    }

    fn finish(mut self) -> String {
        self.text.truncate(self.text.trim_end().len());
        if !self.text.is_empty() {
            self.text.push('\n');
        }
        self.text
    }
}
