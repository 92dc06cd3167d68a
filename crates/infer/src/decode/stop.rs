//! Stop strings over text that arrives in pieces: what a stop could still swallow is held back.
//!
//! The text ends before the stop string that is completed first (the longest, if several end at one
//! character), so the result does not depend on how the text was cut into pieces.

/// Watches one stream of text for stop strings.
#[derive(Debug, Clone)]
pub struct StopStrings {
    stops: Vec<String>,
    /// Text received and not yet shown: the end of it may begin a stop string.
    held: String,
    which: Option<usize>,
}

impl StopStrings {
    /// Empty stop strings never match.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> StopStrings {
        StopStrings {
            stops: stops.iter().map(|stop| stop.as_ref().to_owned()).collect(),
            held: String::new(),
            which: None,
        }
    }

    /// Whether a stop string has ended the text.
    pub fn stopped(&self) -> bool {
        self.which.is_some()
    }

    /// The stop string that ended the text, by its place in the list given to [`StopStrings::new`].
    pub fn which(&self) -> Option<usize> {
        self.which
    }

    /// Takes the next piece and returns the text that no stop string can take back, and whether a stop
    /// string has ended the text. After a stop everything further is swallowed.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        if self.stopped() {
            return (String::new(), true);
        }
        let before = self.held.len();
        self.held.push_str(piece);
        let ends = piece
            .char_indices()
            .map(|(at, c)| before + at + c.len_utf8());
        for end in ends {
            let text = &self.held[..end];
            let ending =
                |(_, stop): &(usize, &String)| !stop.is_empty() && text.ends_with(stop.as_str());
            // The first in the list wins among equal ones.
            let longest =
                |&(index, stop): &(usize, &String)| (stop.len(), std::cmp::Reverse(index));
            let found = self
                .stops
                .iter()
                .enumerate()
                .filter(ending)
                .max_by_key(longest);
            if let Some((index, stop)) = found {
                self.which = Some(index);
                self.held.truncate(end - stop.len());
                return (std::mem::take(&mut self.held), true);
            }
        }
        let rest = self.held.split_off(self.held.len() - self.possible());
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// The stream ended: the text still held back. Empty after a stop.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The stream ended with this last piece, such as the sign for a character that was cut: all text not shown yet.
    pub fn end(&mut self, last: Option<String>) -> String {
        let (mut text, stopped) = self.push(last.as_deref().unwrap_or(""));
        if !stopped {
            text += &self.finish();
        }
        text
    }

    /// Bytes of the longest end of `held` that is a beginning of a stop string.
    fn possible(&self) -> usize {
        let longest = |stop: &String| {
            stop.char_indices()
                .map(|(at, _)| at)
                .rev()
                .find(|&at| self.held.ends_with(&stop[..at]))
        };
        self.stops.iter().filter_map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The oracle, on the whole text: the first end of any stop, the longest of those; the text before it.
    fn naive(stops: &[String], text: &str) -> (String, Option<usize>) {
        for end in (1..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let mut best: Option<usize> = None;
            for (index, stop) in stops.iter().enumerate() {
                let longer = best.is_none_or(|b| stop.len() > stops[b].len());
                if text[..end].ends_with(stop.as_str()) && longer {
                    best = Some(index);
                }
            }
            if let Some(index) = best {
                return (text[..end - stops[index].len()].to_owned(), best);
            }
        }
        (text.to_owned(), None)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// Few letters, so that stops match, nearly match and overlap; some are more than one byte.
        #[test]
        fn any_cutting_gives_the_same_text(
            text in "[abé\u{1F600}]{0,24}",
            stops in prop::collection::vec("[abé\u{1F600}]{1,4}", 0..4),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let chars: Vec<char> = text.chars().collect();
            let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(chars.len() + 1)).collect();
            places.extend([0, chars.len()]);
            places.sort_unstable();
            let (whole, which) = naive(&stops, &text);

            let mut watch = StopStrings::new(&stops);
            let mut shown = String::new();
            for pair in places.windows(2) {
                let piece: String = chars[pair[0]..pair[1]].iter().collect();
                let (text, stopped) = watch.push(&piece);
                prop_assert_eq!(stopped, watch.stopped());
                shown += &text;
                prop_assert!(whole.starts_with(&shown), "{} was shown of {}", shown, whole);
            }
            shown += &watch.finish();
            prop_assert_eq!((shown, watch.which()), (whole, which));
        }
    }

    #[test]
    fn holds_back_only_what_it_must() {
        let mut watch = StopStrings::new(&["\n\nUser:", "é!"]);
        let mut push = |piece| watch.push(piece);
        assert_eq!(push("Hello\n"), ("Hello".to_owned(), false));
        assert_eq!(push("\nYou"), ("\n\nYou".to_owned(), false));
        assert_eq!(push(" café"), (" caf".to_owned(), false));
        assert_eq!(push("?\n\nUs"), ("é?".to_owned(), false));
        assert_eq!(push("er: more"), (String::new(), true));
        assert_eq!(push("further"), (String::new(), true));
        assert_eq!((watch.which(), watch.finish().as_str()), (Some(0), ""));
    }

    #[test]
    fn empty_stops_never_match() {
        let mut watch = StopStrings::new(&["", "x"]);
        assert_eq!(watch.push("abx"), ("ab".to_owned(), true));
        assert_eq!(watch.which(), Some(1));
        let mut none = StopStrings::new::<&str>(&[]);
        assert_eq!(none.push("abx"), ("abx".to_owned(), false));
    }
}
