//! Cutting text into words before byte-level BPE: one set of rules per model family, each run in linear time.
//!
//! The families publish their rules as regular expressions that end in `\s+(?!\S)|\s+`. The look-ahead is the only
//! part outside regular languages, and it says: a run of white space gives its last character to the word after it.
//! Here the expression ends in `\s+` and that one character is handed back by [`Stage::Pattern`], so that a
//! linear-time engine can run it and no input makes it backtrack.

use super::TokenizerError;
use regex::Regex;

/// One step of cutting. Later steps cut what earlier ones left whole; what no rule matches stays as it is.
#[derive(Debug, Clone)]
enum Stage {
    /// Every numeric character stands alone.
    EachNumber,
    /// Matches are cut out; a match of white space alone gives back its last character if a word follows.
    Pattern { regex: Regex, newline_rule: bool },
}

/// How a family cuts text.
#[derive(Debug, Clone)]
pub(crate) struct Splitter {
    stages: Vec<Stage>,
}

/// What `tokenizer.ggml.pre` decides.
#[derive(Debug, Clone)]
pub(crate) struct PreRules {
    pub splitter: Splitter,
    /// Compose characters (NFC) before cutting.
    pub nfc: bool,
    /// A word that is a token is that token, whatever the merges say.
    pub ignore_merges: bool,
    /// Whether a start token is put before the text when the file does not say.
    pub add_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+";
const PUNCTUATION: &str = r"[\p{P}\$\+<=>\^~\|]+";

/// The names understood in `tokenizer.ggml.pre`, each with its rules.
const KNOWN: &[(&str, Family)] = &[
    ("default", Family::Default),
    ("gpt-2", Family::Gpt2),
    ("gpt-4o", Family::Gpt4o),
    ("llama-bpe", Family::Llama3),
    ("llama-v3", Family::Llama3),
    ("llama3", Family::Llama3),
    ("qwen2", Family::Qwen2),
    ("deepseek-r1-qwen", Family::Qwen2),
    ("smollm", Family::Digits),
    ("starcoder", Family::Digits),
    ("refact", Family::Digits),
    ("command-r", Family::Digits),
    ("tekken", Family::Tekken),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Default,
    Gpt2,
    Gpt4o,
    Llama3,
    Qwen2,
    Digits,
    Tekken,
}

impl PreRules {
    /// Rules for a value of `tokenizer.ggml.pre`; a file without it gets `default`.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownPre`], listing the names understood.
    pub fn named(pre: Option<&str>) -> Result<Self, TokenizerError> {
        let name = pre.unwrap_or("default");
        let Some(&(_, family)) = KNOWN.iter().find(|(known, _)| *known == name) else {
            return Err(TokenizerError::UnknownPre {
                found: name.to_string(),
                known: KNOWN.iter().map(|(n, _)| *n).collect::<Vec<_>>().join(", "),
            });
        };
        Self::of(family)
    }

    /// Rules for the `pre_tokenizer` of a tokenizer.json; `None` if they are not among those known.
    pub fn from_json(value: &serde_json::Value) -> Result<Option<Self>, TokenizerError> {
        let byte_level = |step: &serde_json::Value, cuts: bool| {
            step["type"] == "ByteLevel"
                && step["add_prefix_space"] == false
                && (step["use_regex"] != false) == cuts
        };
        let steps = match value["type"].as_str() {
            Some("Sequence") => value["pretokenizers"]
                .as_array()
                .map_or(&[][..], Vec::as_slice),
            _ => std::slice::from_ref(value),
        };
        let family = match steps {
            [one] if byte_level(one, true) => Family::Gpt2,
            [digits, last]
                if digits["type"] == "Digits"
                    && digits["individual_digits"] == true
                    && byte_level(last, true) =>
            {
                Family::Digits
            }
            [split, last] if split["type"] == "Split" && byte_level(last, false) => {
                let whole = split["behavior"] == "Isolated" && split["invert"] != true
                    || split["behavior"] == "Removed" && split["invert"] == true;
                let pattern = split["pattern"]["Regex"].as_str().unwrap_or("");
                let published = |ours: &str| {
                    let start = ours.strip_suffix(r"\s+").unwrap_or(ours);
                    pattern.strip_prefix(start) == Some(r"\s+(?!\S)|\s+")
                };
                let known = [
                    (GPT2, Family::Gpt2),
                    (LLAMA3, Family::Llama3),
                    (QWEN2, Family::Qwen2),
                    (TEKKEN, Family::Tekken),
                    (GPT4O, Family::Gpt4o),
                ];
                match known.into_iter().find(|(ours, _)| published(ours)) {
                    Some((_, family)) if whole => family,
                    _ => return Ok(None),
                }
            }
            _ => return Ok(None),
        };
        Self::of(family).map(Some)
    }

    fn of(family: Family) -> Result<Self, TokenizerError> {
        let stages = match family {
            Family::Default => vec![
                Stage::pattern(PUNCTUATION, false)?,
                Stage::pattern(GPT2, false)?,
                Stage::pattern(r"\p{N}+", false)?,
                Stage::pattern("[0-9][0-9][0-9]", false)?,
            ],
            Family::Gpt2 => vec![Stage::pattern(GPT2, false)?],
            Family::Gpt4o => vec![Stage::pattern(GPT4O, true)?],
            Family::Llama3 => vec![Stage::pattern(LLAMA3, true)?],
            Family::Qwen2 => vec![Stage::pattern(QWEN2, true)?],
            Family::Digits => vec![Stage::EachNumber, Stage::pattern(GPT2, false)?],
            Family::Tekken => vec![Stage::pattern(TEKKEN, true)?],
        };
        Ok(Self {
            splitter: Splitter { stages },
            nfc: family == Family::Qwen2,
            ignore_merges: matches!(family, Family::Llama3 | Family::Tekken),
            add_bos: matches!(family, Family::Llama3 | Family::Tekken),
        })
    }
}

impl Stage {
    fn pattern(pattern: &str, newline_rule: bool) -> Result<Self, TokenizerError> {
        let regex = Regex::new(pattern).map_err(|e| TokenizerError::Library {
            doing: "compiling the splitting rules",
            message: e.to_string(),
        })?;
        Ok(Self::Pattern {
            regex,
            newline_rule,
        })
    }
}

impl Splitter {
    /// Calls `word` with every word of `text`, in order; the words put together are `text`.
    ///
    /// # Errors
    /// Those of `word`.
    pub fn split<'t, E>(
        &self,
        text: &'t str,
        word: &mut impl FnMut(&'t str) -> Result<(), E>,
    ) -> Result<(), E> {
        split_from(&self.stages, text, word)
    }
}

fn split_from<'t, E>(
    stages: &[Stage],
    text: &'t str,
    word: &mut impl FnMut(&'t str) -> Result<(), E>,
) -> Result<(), E> {
    let Some((stage, rest)) = stages.split_first() else {
        return if text.is_empty() { Ok(()) } else { word(text) };
    };
    let mut start = 0;
    match stage {
        Stage::EachNumber => {
            for (at, c) in text.char_indices().filter(|(_, c)| c.is_numeric()) {
                let end = at + c.len_utf8();
                split_from(rest, &text[start..at], word)?;
                split_from(rest, &text[at..end], word)?;
                start = end;
            }
        }
        Stage::Pattern {
            regex,
            newline_rule,
        } => {
            while let Some(found) = regex.find_at(text, start) {
                let mut end = found.end();
                if let Some(last) = found.as_str().chars().next_back()
                    && last.is_whitespace()
                    && !(*newline_rule && matches!(last, '\r' | '\n'))
                    && end < text.len()
                    && found.len() > last.len_utf8()
                    && found.as_str().chars().all(char::is_whitespace)
                {
                    // The run ends before a word, else it would be longer.
                    end -= last.len_utf8();
                }
                split_from(rest, &text[start..found.start()], word)?;
                split_from(rest, &text[found.start()..end], word)?;
                start = end;
            }
        }
    }
    split_from(rest, &text[start..], word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::{
        OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior,
    };

    fn ours(splitter: &Splitter, text: &str) -> Vec<String> {
        let mut words = Vec::new();
        splitter
            .split(text, &mut |word| {
                words.push(word.to_string());
                Ok::<(), ()>(())
            })
            .unwrap();
        words
    }

    /// The oracle: the published expression, look-ahead and all, run by the library.
    fn oracle(pattern: &str) -> Split {
        let start = pattern.strip_suffix(r"\s+").unwrap();
        let pattern = SplitPattern::Regex(format!(r"{start}\s+(?!\S)|\s+"));
        Split::new(pattern, SplitDelimiterBehavior::Isolated, false).unwrap()
    }

    fn theirs(oracle: &Split, text: &str) -> Vec<String> {
        let mut cut = PreTokenizedString::from(text);
        oracle.pre_tokenize(&mut cut).unwrap();
        let parts = cut.get_splits(OffsetReferential::Original, OffsetType::Byte);
        let words = parts.into_iter().map(|(word, _, _)| word.to_string());
        words.collect()
    }

    fn families() -> Vec<(&'static str, Splitter, Split)> {
        [
            (GPT2, Family::Gpt2),
            (LLAMA3, Family::Llama3),
            (QWEN2, Family::Qwen2),
            (TEKKEN, Family::Tekken),
            (GPT4O, Family::Gpt4o),
        ]
        .map(|(pattern, family)| {
            let rules = PreRules::of(family).unwrap();
            (pattern, rules.splitter, oracle(pattern))
        })
        .into()
    }

    #[test]
    fn words_are_those_of_the_published_expression() {
        let families = families();
        let spaces: Vec<char> = " \t\n\r\u{a0}\u{3000}\u{85}  \n".chars().collect();
        let others: Vec<char> = "aBsStTlLrReEd'ſéǅʰ中\u{301}1½٣./_😀\u{200d}"
            .chars()
            .collect();
        let one = prop_oneof![
            proptest::sample::select(spaces),
            proptest::sample::select(others)
        ];
        let texts = proptest::collection::vec(one, 0..40)
            .prop_map(|chars| chars.into_iter().collect::<String>());
        TestRunner::new(ProptestConfig::with_cases(400))
            .run(&texts, |text| {
                for (pattern, splitter, oracle) in &families {
                    prop_assert_eq!(ours(splitter, &text), theirs(oracle, &text), "{}", pattern);
                }
                Ok(())
            })
            .unwrap();
    }

    #[test]
    fn every_kind_of_character_falls_where_the_published_expression_puts_it() {
        // All of the first planes' busy part, then samples.
        let characters = ('\0'..='\u{3100}').chain(('\u{3100}'..=char::MAX).step_by(499));
        let text: String = characters
            .flat_map(|c| ['a', c, ' ', c, c, '\n', c, '1'])
            .collect();
        for (pattern, splitter, oracle) in families() {
            assert!(
                ours(&splitter, &text) == theirs(&oracle, &text),
                "{pattern}"
            );
        }
    }

    #[test]
    fn rules_in_stages_cut_what_earlier_ones_left() {
        let cut = |name, text| ours(&PreRules::named(Some(name)).unwrap().splitter, text);
        assert_eq!(cut("smollm", "a 12  b"), ["a", " ", "1", "2", " ", " b"]);
        assert_eq!(
            cut("default", "a 12345, x\t\ty"),
            ["a", " ", "123", "45", ",", " x", "\t", "\t", "y"]
        );
    }

    #[test]
    fn a_long_run_of_white_space_is_linear() {
        let text = " ".repeat(3_000_000) + "x";
        for (_, splitter, _) in families() {
            let words = ours(&splitter, &text);
            assert_eq!(
                words.iter().map(String::len).collect::<Vec<_>>(),
                [2_999_999, 2]
            );
        }
    }
}
