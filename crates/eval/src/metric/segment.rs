//! Chinese word segmentation as `jieba` 0.42 does it (precise mode, HMM on), for scores that count words of
//! Chinese text (LongBench, M4LE). Dictionary, best path and Viterbi pass are those of the crate `jieba-rs`; what is
//! Chinese, and how runs of other characters are cut, is decided here, where that crate differs from jieba.

use std::sync::LazyLock;

use jieba_rs::Jieba;

static JIEBA: LazyLock<Jieba> = LazyLock::new(Jieba::new);
/// Without words every run goes through the Viterbi pass whole.
static VITERBI: LazyLock<Jieba> = LazyLock::new(Jieba::empty);

fn is_chinese(c: char) -> bool {
    ('\u{4e00}'..='\u{9fd5}').contains(&c)
}

/// What jieba looks up in its dictionary: `[\u4E00-\u9FD5a-zA-Z0-9+#&._%-]`.
fn in_block(c: char) -> bool {
    is_chinese(c)
        || c.is_ascii_alphanumeric()
        || matches!(c, '+' | '#' | '&' | '.' | '_' | '%' | '-')
}

fn end_of(text: &str, inside: fn(char) -> bool) -> usize {
    text.find(|c| !inside(c)).unwrap_or(text.len())
}

/// `jieba.lcut(text)`: words, in order; together they are the text. Outside blocks every character is a word.
pub fn jieba(text: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let end = if in_block(first) {
            let end = end_of(rest, in_block);
            block(&rest[..end], &mut words);
            end
        } else {
            let end = if rest.starts_with("\r\n") {
                2
            } else {
                first.len_utf8()
            };
            words.push(&rest[..end]);
            end
        };
        rest = &rest[end..];
    }
    words
}

/// Cuts a block along the best path; runs of characters that are no word there go to [`unknown`].
fn block<'t>(block: &'t str, words: &mut Vec<&'t str>) {
    let mut at = 0;
    let mut run = 0;
    for word in JIEBA.cut(block, false) {
        // A longer word that is not in the dictionary is a run of single letters and digits put together.
        let single = word.chars().nth(1).is_none() || !JIEBA.has_word(word);
        if !single {
            unknown(&block[run..at], words);
            words.push(word);
            run = at + word.len();
        }
        at += word.len();
    }
    unknown(&block[run..], words);
}

/// Cuts a run of single characters: by Viterbi where it is Chinese, else into numbers and words, and what lies
/// between. A run that is a word of the dictionary falls into its characters.
fn unknown<'t>(run: &'t str, words: &mut Vec<&'t str>) {
    let mut chars = run
        .char_indices()
        .map(|(at, c)| &run[at..at + c.len_utf8()]);
    if run.chars().nth(1).is_none() || JIEBA.has_word(run) {
        words.extend(&mut chars);
        return;
    }
    let mut rest = run;
    while let Some(first) = rest.chars().next() {
        let end;
        if is_chinese(first) {
            end = end_of(rest, is_chinese);
            words.extend(VITERBI.cut(&rest[..end], true));
        } else if first.is_ascii_alphanumeric() {
            end = number(rest);
            words.push(&rest[..end]);
        } else {
            end = end_of(rest, |c| !is_chinese(c) && !c.is_ascii_alphanumeric());
            words.push(&rest[..end]);
        }
        rest = &rest[end..];
    }
}

/// Length of `[a-zA-Z0-9]+(\.[0-9]+)?%?` at the start of a text that begins with a letter or digit.
fn number(text: &str) -> usize {
    let mut end = end_of(text, |c| c.is_ascii_alphanumeric());
    if let Some(fraction) = text[end..].strip_prefix('.') {
        let digits = end_of(fraction, |c| c.is_ascii_digit());
        if digits > 0 {
            end += 1 + digits;
        }
    }
    end + usize::from(text[end..].starts_with('%'))
}

/// The words joined by single spaces, the form ROUGE is given.
pub fn jieba_joined(text: &str) -> String {
    jieba(text).join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_make_up_the_text() {
        let text = "他在1987年 说\r\n“你好”，A+B！㐀㐁\u{9fff}GPT-4 3.5%x--y";
        let words = jieba(text);
        assert_eq!(words.concat(), text);
        // Rare characters outside jieba's block are words of their own.
        assert!(words.contains(&"㐀") && words.contains(&"㐁"));
        assert!(words.contains(&"\r\n") && words.contains(&"3.5%") && words.contains(&"GPT"));
    }
}
