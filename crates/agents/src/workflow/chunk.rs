//! Texts cut into pieces that a model reads one by one: sentences, lines or blocks of code, packed greedily into a
//! budget of tokens. Nothing is lost: the chunks of a text, put together, are the text.
//!
//! Chain of Agents (arXiv 2406.02818, Algorithm 2), with two differences: empty chunks are left out, and a
//! piece beyond the budget is cut.

use crate::chat::model::{ChatError, ChatModel};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// What a text is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// Sentences.
    #[default]
    Sentence,
    /// Lines: transcripts, tables.
    Line,
    /// Blocks of code: a blank line and then a line that is not indented.
    Block,
}

/// The pieces of a text with the blanks after them; together they are the text.
pub fn pieces(text: &str, unit: Unit) -> Vec<&str> {
    let ends = match unit {
        Unit::Sentence => sentence_ends(text),
        Unit::Line => text.match_indices('\n').map(|(at, _)| at + 1).collect(),
        Unit::Block => block_ends(text),
    };
    let mut pieces = Vec::new();
    let mut start = 0;
    for end in ends.into_iter().chain([text.len()]) {
        if end > start {
            pieces.push(&text[start..end]);
            start = end;
        }
    }
    pieces
}

/// Words before a full stop that end no sentence.
const ABBREVIATIONS: &[&str] = &[
    "mr", "mrs", "ms", "dr", "prof", "st", "rev", "gen", "col", "capt", "lt", "sgt", "jr", "sr",
    "vs", "no", "fig", "eq", "sec", "ch", "vol", "pp", "cf", "al", "e.g", "i.e", "approx", "dept",
    "est", "inc", "ltd", "co", "bd", "bl",
];

fn sentence_ends(text: &str) -> Vec<usize> {
    let mut ends = Vec::new();
    let mut chars = text.char_indices().peekable();
    let mut start = 0;
    while let Some((at, c)) = chars.next() {
        let ends_here = match c {
            '。' | '！' | '？' | '｡' => true,
            '.' | '!' | '?' | '…' => {
                // Closing marks belong to the sentence.
                let mut after = at + c.len_utf8();
                while let Some(&(next, mark)) = chars.peek() {
                    if !matches!(
                        mark,
                        '.' | '!' | '?' | '"' | '\'' | ')' | ']' | '”' | '’' | '»'
                    ) {
                        break;
                    }
                    after = next + mark.len_utf8();
                    chars.next();
                }
                let rest = &text[after..];
                let blank = rest.chars().next().is_none_or(char::is_whitespace);
                let follows = rest.trim_start().chars().next();
                blank
                    && !follows.is_some_and(char::is_lowercase)
                    && !(c == '.' && abbreviates(&text[start..at]))
            }
            // A blank line ends whatever stands before it.
            '\n' => text[at + 1..]
                .trim_start_matches([' ', '\t', '\r'])
                .starts_with('\n'),
            _ => false,
        };
        if !ends_here {
            continue;
        }
        let mut end = text.len();
        while let Some(&(next, c)) = chars.peek() {
            let closes = matches!(c, '」' | '』' | '”' | '’' | '）' | '》');
            if !c.is_whitespace() && !closes {
                end = next;
                break;
            }
            chars.next();
        }
        ends.push(end);
        start = end;
    }
    ends
}

/// True if the full stop after this text ends no sentence: an initial or a common abbreviation.
fn abbreviates(before: &str) -> bool {
    let word = before
        .rsplit(|c: char| c.is_whitespace() || matches!(c, '(' | '[' | '"' | '“'))
        .next();
    let word = word.unwrap_or_default();
    let mut chars = word.chars();
    let initial =
        matches!((chars.next(), chars.next()), (Some(c), None) if c.is_uppercase() && c != 'I');
    initial || ABBREVIATIONS.contains(&word.to_lowercase().as_str())
}

fn block_ends(text: &str) -> Vec<usize> {
    let mut ends = Vec::new();
    let mut blank = false;
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let indented = line.starts_with([' ', '\t', '}', ')', ']']);
        let empty = line.trim().is_empty();
        if blank && !empty && !indented {
            ends.push(at);
        }
        blank = if empty { blank || at > 0 } else { false };
        at += line.len();
    }
    ends
}

/// Ranges of pieces whose counts add up to at most `budget`, greedily; a piece beyond it stands alone.
pub fn pack(counts: &[usize], budget: usize) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let (mut start, mut sum) = (0, 0);
    for (index, &count) in counts.iter().enumerate() {
        if index > start && sum + count > budget {
            ranges.push(start..index);
            (start, sum) = (index, 0);
        }
        sum += count;
    }
    if start < counts.len() {
        ranges.push(start..counts.len());
    }
    ranges
}

/// A piece cut into parts of at most `budget` tokens each, at blanks where there are any near the end.
///
/// # Errors
/// What counting says.
pub fn cut_long<'t, E>(
    mut piece: &'t str,
    budget: usize,
    count: &mut dyn FnMut(&str) -> Result<usize, E>,
) -> Result<Vec<&'t str>, E> {
    let mut parts = Vec::new();
    while count(piece)? > budget {
        let edges: Vec<usize> = piece.char_indices().map(|(at, _)| at).skip(1).collect();
        // The longest beginning that fits: edges[..low] do, edges[high..] do not.
        let (mut low, mut high) = (0, edges.len());
        while low < high {
            let middle = (low + high) / 2;
            match count(&piece[..edges[middle]])? <= budget {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        // At least one character, or there would be no end.
        let most = edges
            .get(low.saturating_sub(1))
            .copied()
            .unwrap_or(piece.len());
        let blank = piece[..most]
            .char_indices()
            .rev()
            .find(|(_, c)| c.is_whitespace())
            .map(|(at, c)| at + c.len_utf8())
            .filter(|&at| at * 2 > most);
        let end = blank.unwrap_or(most);
        parts.push(&piece[..end]);
        piece = &piece[end..];
        if piece.is_empty() {
            return Ok(parts);
        }
    }
    parts.push(piece);
    Ok(parts)
}

/// The chunks of a text, none with more than `budget` tokens of this model. Counts of pieces are added up, then every
/// chunk is counted as a whole and halved if it has more.
///
/// # Errors
/// A budget of 0; what the model's counting says.
pub fn chunks<'t>(
    model: &dyn ChatModel,
    text: &'t str,
    unit: Unit,
    budget: usize,
) -> Result<Vec<&'t str>, ChatError> {
    if budget == 0 {
        return Err(ChatError::BadRequest(
            "chunks of 0 tokens found, at least 1 expected".into(),
        ));
    }
    let mut count = |text: &str| Ok::<_, ChatError>(model.count_text(text)?.planned());
    let whole = pieces(text, unit);
    let sizes = model.count_texts(&whole)?;
    let (mut parts, mut counts) = (Vec::new(), Vec::new());
    for (piece, size) in whole.into_iter().zip(sizes) {
        if size.planned() <= budget {
            parts.push(piece);
            counts.push(size.planned());
            continue;
        }
        for part in cut_long(piece, budget, &mut count)? {
            parts.push(part);
            counts.push(count(part)?);
        }
    }
    let mut ranges = pack(&counts, budget);
    ranges.reverse();
    let mut starts = Vec::with_capacity(parts.len() + 1);
    let mut at = 0;
    for part in &parts {
        starts.push(at);
        at += part.len();
    }
    starts.push(at);
    let mut chunks = Vec::new();
    while let Some(range) = ranges.pop() {
        let chunk = &text[starts[range.start]..starts[range.end]];
        if range.len() > 1 && count(chunk)? > budget {
            let middle = range.start + range.len() / 2;
            ranges.push(middle..range.end);
            ranges.push(range.start..middle);
        } else if !chunk.trim().is_empty() {
            chunks.push(chunk);
        }
    }
    Ok(chunks)
}

/// The text shortened to `budget` tokens, head and tail halves kept; unchanged if it fits.
///
/// # Errors
/// What counting says.
pub fn keep_ends<E>(
    text: &str,
    budget: usize,
    count: &mut dyn FnMut(&str) -> Result<usize, E>,
) -> Result<String, E> {
    halves(text, budget, " ... ", count)
}

/// As [`keep_ends`], with `gap` where the middle was.
///
/// # Errors
/// What counting says.
pub fn halves<E>(
    text: &str,
    budget: usize,
    gap: &str,
    count: &mut dyn FnMut(&str) -> Result<usize, E>,
) -> Result<String, E> {
    if count(text)? <= budget {
        return Ok(text.to_string());
    }
    let edges: Vec<usize> = text
        .char_indices()
        .map(|(at, _)| at)
        .chain([text.len()])
        .collect();
    // How many characters of each end may stay.
    let (mut low, mut high) = (0, edges.len() / 2);
    let both = |n: usize| {
        let (head, tail) = (edges[n], edges[edges.len() - 1 - n]);
        format!("{}{gap}{}", &text[..head], &text[tail..])
    };
    while low < high {
        let middle = (low + high).div_ceil(2);
        match middle * 2 < edges.len() && count(&both(middle))? <= budget {
            true => low = middle,
            false => high = middle - 1,
        }
    }
    Ok(if low == 0 { String::new() } else { both(low) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::scripted::Scripted;
    use proptest::prelude::*;

    #[test]
    fn sentences_end_where_people_end_them() {
        let text = "Dr. J. Smith paid 3.50 dollars, i.e. too much. \"Really?\" he said. Yes!  No…\n\nNew part 你好。再见！Well.";
        assert_eq!(
            pieces(text, Unit::Sentence),
            [
                "Dr. J. Smith paid 3.50 dollars, i.e. too much. ",
                "\"Really?\" he said. ",
                "Yes!  ",
                "No…\n\n",
                "New part 你好。",
                "再见！",
                "Well."
            ]
        );
    }

    #[test]
    fn code_is_cut_between_blocks() {
        let text = "import a\n\ndef f(x):\n    y = x\n\n    return y\n\nclass B:\n    pass\n";
        assert_eq!(
            pieces(text, Unit::Block),
            [
                "import a\n\n",
                "def f(x):\n    y = x\n\n    return y\n\n",
                "class B:\n    pass\n"
            ]
        );
    }

    #[test]
    fn long_pieces_are_cut_at_blanks() {
        let words = |text: &str| Ok::<_, ()>(text.split_whitespace().count());
        assert_eq!(
            cut_long("a b c d e", 2, &mut { words }).unwrap(),
            ["a b ", "c d ", "e"]
        );
        let chars = |text: &str| Ok::<_, ()>(text.chars().count());
        assert_eq!(
            cut_long("äbcdé", 2, &mut { chars }).unwrap(),
            ["äb", "cd", "é"]
        );
        assert_eq!(
            keep_ends("abcdefghijklmnopqrst", 9, &mut { chars }).unwrap(),
            "ab ... st"
        );
        assert_eq!(keep_ends("abcd", 4, &mut { chars }).unwrap(), "abcd");
    }

    proptest! {
        #[test]
        fn chunks_are_the_text(
            text in "([a-zA-Z]{1,5}|3\\.5|Mr\\.|。|！|\\.|\\?|\"|\n|\n\n| |  |你|é){0,60}",
            budget in 1usize..8,
            unit in prop_oneof![Just(Unit::Sentence), Just(Unit::Line), Just(Unit::Block)],
        ) {
            prop_assert_eq!(pieces(&text, unit).concat(), text.clone());
            let model = Scripted::new(|_| Ok(String::new()));
            let chunks = chunks(&model, &text, unit, budget).unwrap();
            for chunk in &chunks {
                prop_assert!(chunk.split_whitespace().count() <= budget);
            }
            let bare = |text: &str| text.split_whitespace().collect::<String>();
            prop_assert_eq!(bare(&chunks.concat()), bare(&text));
        }
    }
}
