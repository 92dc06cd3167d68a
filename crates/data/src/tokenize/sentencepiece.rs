//! SentencePiece models: score-driven BPE (Llama 2, Gemma) and unigram (T5), on text whose spaces are written `▁`.
//!
//! Both work on stretches that can be cut wherever no token of the vocabulary holds the two characters beside the cut:
//! a merge, or a path of the lattice, that crossed it would need such a token. Each stretch is therefore encoded alone,
//! and each distinct one once per call, with the same result as encoding the whole.

use super::TokenizerError;
use super::pieces::TokenKind;
use aho_corasick::{AhoCorasick, MatchKind};
use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap, HashSet};

/// How SentencePiece writes a space.
pub(crate) const SPACE: char = '▁';

/// How pieces are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Search {
    /// Merge the neighbouring pair whose union scores highest, until none is a token.
    Merge,
    /// The segmentation with the highest sum of scores.
    Unigram,
}

/// A token that text can become.
#[derive(Debug, Clone, Copy)]
struct Piece {
    id: u32,
    score: f32,
    kind: TokenKind,
}

/// One token as the vocabulary gives it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry<'a> {
    pub text: &'a str,
    pub score: f32,
    pub kind: TokenKind,
}

/// A SentencePiece encoder for text without control tokens.
#[derive(Debug, Clone)]
pub(crate) struct SentencePiece {
    search: Search,
    pieces: HashMap<Box<str>, Piece>,
    /// User-defined tokens: always one token, found before anything else; the longest wins.
    fixed: Option<(AhoCorasick, Vec<u32>)>,
    joins: Joins,
    unknown: Option<u32>,
    bytes: Option<Box<[u32; 256]>>,
    /// Longest piece in bytes.
    longest: usize,
    /// Lowest and highest score among normal pieces.
    score_range: (f32, f32),
    /// All pieces in order, to see that no piece starts with a given text.
    sorted: Vec<Box<str>>,
}

/// The pairs of characters that stand side by side within some piece.
#[derive(Debug, Clone)]
struct Joins {
    /// Pairs among the 128 ASCII characters and `▁` (index 128).
    common: Box<[bool]>,
    other: HashSet<(char, char)>,
}

const COMMON: usize = 129;

fn common_index(c: char) -> Option<usize> {
    match c {
        SPACE => Some(128),
        c if c.is_ascii() => Some(c as usize),
        _ => None,
    }
}

impl Joins {
    fn new() -> Self {
        Self {
            common: vec![false; COMMON * COMMON].into_boxed_slice(),
            other: HashSet::new(),
        }
    }

    fn add(&mut self, piece: &str) {
        for (a, b) in piece.chars().zip(piece.chars().skip(1)) {
            match (common_index(a), common_index(b)) {
                (Some(i), Some(j)) => self.common[i * COMMON + j] = true,
                _ => {
                    self.other.insert((a, b));
                }
            }
        }
    }

    fn has(&self, a: char, b: char) -> bool {
        match (common_index(a), common_index(b)) {
            (Some(i), Some(j)) => self.common[i * COMMON + j],
            _ => self.other.contains(&(a, b)),
        }
    }
}

/// A candidate merge: the highest score first, the leftmost among equals.
struct Candidate {
    score: f32,
    left: u32,
    right: u32,
    /// Bytes of the union, to notice that one side has changed since.
    size: u32,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score
            .total_cmp(&other.score)
            .then(other.left.cmp(&self.left))
    }
}
impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Candidate {}

/// A run of text that merging treats as one, in a doubly linked list. `len` 0 marks one that was merged away.
#[derive(Clone, Copy)]
struct Symbol {
    start: u32,
    len: u32,
    prev: u32,
    next: u32,
}

const NONE: u32 = u32::MAX;

/// Longest stretch, in bytes, whose ids are remembered during a call.
const CACHED_STRETCH: usize = 64;

/// What one encode call may reuse: the queue and list, and the halves that unused pieces were made of.
#[derive(Default)]
struct Scratch<'t> {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Candidate>,
    halves: HashMap<&'t str, (&'t str, &'t str)>,
    best: Vec<(f64, usize, u32)>,
}

impl SentencePiece {
    /// `entries` in the order of their ids.
    ///
    /// # Errors
    /// [`TokenizerError::BadValue`] for a score that is not a number.
    pub fn new(
        search: Search,
        entries: &[Entry],
        unknown: Option<u32>,
    ) -> Result<Self, TokenizerError> {
        let mut pieces = HashMap::with_capacity(entries.len());
        let mut joins = Joins::new();
        let (mut fixed_texts, mut fixed_ids) = (Vec::new(), Vec::new());
        let mut bytes: Vec<Option<u32>> = vec![None; 256];
        let mut longest = 0;
        let mut score_range = (f32::INFINITY, f32::NEG_INFINITY);
        for (id, entry) in entries.iter().enumerate() {
            let id = id as u32;
            if !entry.score.is_finite() {
                return Err(TokenizerError::BadValue {
                    field: format!("score of token {id} `{}`", entry.text),
                    found: entry.score.to_string(),
                    expected: "a finite number".into(),
                });
            }
            match entry.kind {
                TokenKind::Byte => {
                    let Some(byte) = super::pieces::byte_token(entry.text) else {
                        return Err(TokenizerError::BadValue {
                            field: format!("byte token {id}"),
                            found: format!("`{}`", entry.text),
                            expected: "`<0x00>` to `<0xFF>`".into(),
                        });
                    };
                    bytes[byte as usize] = Some(id);
                    continue;
                }
                TokenKind::Control | TokenKind::Unknown => continue,
                TokenKind::Normal | TokenKind::UserDefined | TokenKind::Unused => {}
            }
            if entry.text.is_empty() {
                continue;
            }
            // Some converters write the spaces of user-defined tokens as they are.
            let text = entry.text.replace(' ', "▁");
            if entry.kind == TokenKind::UserDefined && search == Search::Merge {
                // Found before merging starts, so what is merged never contains it.
                fixed_texts.push(text);
                fixed_ids.push(id);
                continue;
            }
            if entry.kind == TokenKind::Normal {
                score_range = (
                    score_range.0.min(entry.score),
                    score_range.1.max(entry.score),
                );
            }
            joins.add(&text);
            longest = longest.max(text.len());
            // Adding 0 makes -0 and 0 the same score.
            let piece = Piece {
                id,
                score: entry.score + 0.0,
                kind: entry.kind,
            };
            pieces.insert(text.into_boxed_str(), piece);
        }
        if score_range.0 > score_range.1 {
            score_range = (0.0, 0.0);
        }
        let fixed = if fixed_texts.is_empty() {
            None
        } else {
            let finder = AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .build(&fixed_texts)
                .map_err(|e| TokenizerError::Library {
                    doing: "indexing user-defined tokens",
                    message: e.to_string(),
                })?;
            Some((finder, fixed_ids))
        };
        let mut sorted: Vec<Box<str>> = match search {
            Search::Merge => Vec::new(),
            Search::Unigram => pieces.keys().cloned().collect(),
        };
        sorted.sort_unstable();
        let bytes = bytes
            .into_iter()
            .collect::<Option<Vec<u32>>>()
            .and_then(|v| v.into_boxed_slice().try_into().ok());
        Ok(Self {
            search,
            pieces,
            fixed,
            joins,
            unknown,
            bytes,
            longest,
            score_range,
            sorted,
        })
    }

    /// Appends the ids of `text`, in which spaces are already written `▁`.
    ///
    /// # Errors
    /// [`TokenizerError::NotEncodable`] for a character outside a vocabulary without unknown and byte tokens;
    /// [`TokenizerError::BadValue`] for 4 GiB of text or more.
    pub fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<(), TokenizerError> {
        if u32::try_from(text.len()).is_err() {
            return Err(TokenizerError::BadValue {
                field: "length of the text".into(),
                found: format!("{} bytes", text.len()),
                expected: "less than 4 GiB".into(),
            });
        }
        let first = out.len();
        let mut run = Run {
            last_unknown: false,
            stretches: HashMap::new(),
            scratch: Scratch::default(),
        };
        let done = self.encode_stretches(text, out, &mut run, true)?;
        if !done {
            // An unused piece was formed. Which halves it falls back into depends on every merge tried in the
            // whole text, so cutting is not exact: start again without it.
            out.truncate(first);
            run.last_unknown = false;
            run.scratch = Scratch::default();
            self.encode_stretches(text, out, &mut run, false)?;
        }
        Ok(())
    }

    /// Walks over user-defined tokens and what lies between. False if `cut` and cutting turned out not to be exact.
    fn encode_stretches<'t>(
        &self,
        text: &'t str,
        out: &mut Vec<u32>,
        run: &mut Run<'t>,
        cut: bool,
    ) -> Result<bool, TokenizerError> {
        if self.search == Search::Unigram {
            // The lattice knows user-defined tokens itself.
            return self.encode_between(text, out, run, cut);
        }
        if !cut {
            return self.merge_whole(text, out, run);
        }
        let mut start = 0;
        if let Some((finder, ids)) = &self.fixed {
            for found in finder.find_iter(text) {
                if !self.encode_between(&text[start..found.start()], out, run, cut)? {
                    return Ok(false);
                }
                out.push(ids[found.pattern().as_usize()]);
                run.last_unknown = false;
                start = found.end();
            }
        }
        self.encode_between(&text[start..], out, run, cut)
    }

    fn encode_between<'t>(
        &self,
        text: &'t str,
        out: &mut Vec<u32>,
        run: &mut Run<'t>,
        cut: bool,
    ) -> Result<bool, TokenizerError> {
        let mut start = 0;
        let mut previous: Option<char> = None;
        for (at, c) in text.char_indices() {
            if cut && previous.is_some_and(|p| !self.joins.has(p, c)) {
                if !self.encode_stretch(&text[start..at], out, run)? {
                    return Ok(false);
                }
                start = at;
            }
            previous = Some(c);
        }
        self.encode_stretch(&text[start..], out, run)
    }

    fn encode_stretch<'t>(
        &self,
        text: &'t str,
        out: &mut Vec<u32>,
        run: &mut Run<'t>,
    ) -> Result<bool, TokenizerError> {
        if text.is_empty() {
            return Ok(true);
        }
        if let Some(&(start, end)) = run.stretches.get(text) {
            run.last_unknown = false;
            out.extend_from_within(start..end);
            return Ok(true);
        }
        let start = out.len();
        let mut plain = true;
        match self.search {
            Search::Merge => {
                self.merge(text, std::iter::empty(), &mut run.scratch);
                let mut at = 0;
                while at != NONE {
                    let symbol = run.scratch.symbols[at as usize];
                    let piece = &text[symbol.start as usize..(symbol.start + symbol.len) as usize];
                    match self.pieces.get(piece) {
                        Some(p) if p.kind == TokenKind::Unused => return Ok(false),
                        Some(p) => self.push(p.id, out, &mut run.last_unknown),
                        None => {
                            plain = false;
                            self.push_unknown(piece, out, &mut run.last_unknown)?;
                        }
                    }
                    at = symbol.next;
                }
            }
            Search::Unigram => plain = self.viterbi(text, out, run)?,
        }
        // Unknown tokens fuse with their neighbours, so stretches with one depend on what came before.
        if (plain || self.bytes.is_some()) && text.len() <= CACHED_STRETCH {
            run.stretches.insert(text, (start, out.len()));
        }
        Ok(true)
    }

    fn push(&self, id: u32, out: &mut Vec<u32>, last_unknown: &mut bool) {
        out.push(id);
        *last_unknown = false;
    }

    /// A character outside the vocabulary: its bytes if there are byte tokens, else one unknown token for the whole
    /// run of such characters.
    fn push_unknown(
        &self,
        piece: &str,
        out: &mut Vec<u32>,
        last_unknown: &mut bool,
    ) -> Result<(), TokenizerError> {
        if let Some(bytes) = &self.bytes {
            out.extend(piece.bytes().map(|b| bytes[b as usize]));
            return Ok(());
        }
        let Some(unknown) = self.unknown else {
            return Err(TokenizerError::NotEncodable {
                piece: piece.to_string(),
            });
        };
        if !*last_unknown {
            out.push(unknown);
        }
        *last_unknown = true;
        Ok(())
    }

    /// Merges `text` into `scratch.symbols`, a list that starts at symbol 0. `frozen` lists stretches (start, end), in
    /// order, that are one symbol and take no part in merging.
    fn merge<'t>(
        &self,
        text: &'t str,
        frozen: impl Iterator<Item = (usize, usize)>,
        scratch: &mut Scratch<'t>,
    ) {
        let Scratch {
            symbols,
            queue,
            halves,
            ..
        } = scratch;
        symbols.clear();
        queue.clear();
        let mut is_frozen: HashSet<u32> = HashSet::new();
        let mut frozen = frozen.peekable();
        let mut at = 0;
        while let Some(c) = text[at..].chars().next() {
            let mut len = c.len_utf8();
            if let Some(&(start, end)) = frozen.peek()
                && start == at
            {
                frozen.next();
                len = end - start;
                is_frozen.insert(symbols.len() as u32);
            }
            let index = symbols.len() as u32;
            symbols.push(Symbol {
                start: at as u32,
                len: len as u32,
                prev: index.checked_sub(1).unwrap_or(NONE),
                next: index + 1,
            });
            at += len;
        }
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
        let mut offer =
            |left: u32, right: u32, symbols: &[Symbol], queue: &mut BinaryHeap<Candidate>| {
                if left == NONE
                    || right == NONE
                    || is_frozen.contains(&left)
                    || is_frozen.contains(&right)
                {
                    return;
                }
                let (l, r) = (symbols[left as usize], symbols[right as usize]);
                let (from, middle, to) = (
                    l.start as usize,
                    r.start as usize,
                    (r.start + r.len) as usize,
                );
                if to - from > self.longest {
                    return;
                }
                let Some(piece) = self.pieces.get(&text[from..to]) else {
                    return;
                };
                queue.push(Candidate {
                    score: piece.score,
                    left,
                    right,
                    size: (to - from) as u32,
                });
                if piece.kind == TokenKind::Unused {
                    halves.insert(&text[from..to], (&text[from..middle], &text[middle..to]));
                }
            };
        for left in 0..(symbols.len() as u32).saturating_sub(1) {
            offer(left, left + 1, symbols, queue);
        }
        while let Some(top) = queue.pop() {
            let (l, r) = (symbols[top.left as usize], symbols[top.right as usize]);
            if l.len == 0 || r.len == 0 || l.len + r.len != top.size {
                continue;
            }
            symbols[top.left as usize].len = top.size;
            symbols[top.left as usize].next = r.next;
            symbols[top.right as usize].len = 0;
            if r.next != NONE {
                symbols[r.next as usize].prev = top.left;
            }
            offer(l.prev, top.left, symbols, queue);
            offer(top.left, r.next, symbols, queue);
        }
    }

    /// The whole text at once, for vocabularies whose unused pieces were met.
    fn merge_whole<'t>(
        &self,
        text: &'t str,
        out: &mut Vec<u32>,
        run: &mut Run<'t>,
    ) -> Result<bool, TokenizerError> {
        let fixed: Vec<(usize, usize, u32)> = match &self.fixed {
            Some((finder, ids)) => finder
                .find_iter(text)
                .map(|m| (m.start(), m.end(), ids[m.pattern().as_usize()]))
                .collect(),
            None => Vec::new(),
        };
        self.merge(text, fixed.iter().map(|f| (f.0, f.1)), &mut run.scratch);
        let mut fixed = fixed.iter().peekable();
        let mut at = if run.scratch.symbols.is_empty() {
            NONE
        } else {
            0
        };
        let mut pending: Vec<&str> = Vec::new();
        while at != NONE {
            let symbol = run.scratch.symbols[at as usize];
            let start = symbol.start as usize;
            at = symbol.next;
            if let Some(&(_, _, id)) = fixed.next_if(|f| f.0 == start) {
                self.push(id, out, &mut run.last_unknown);
                continue;
            }
            pending.push(&text[start..start + symbol.len as usize]);
            while let Some(piece) = pending.pop() {
                match self.pieces.get(piece) {
                    Some(p) if p.kind == TokenKind::Unused => match run.scratch.halves.get(piece) {
                        Some(&(left, right)) => pending.extend([right, left]),
                        None => self.push(p.id, out, &mut run.last_unknown),
                    },
                    Some(p) => self.push(p.id, out, &mut run.last_unknown),
                    None => self.push_unknown(piece, out, &mut run.last_unknown)?,
                }
            }
        }
        Ok(true)
    }

    /// The best path through the lattice of pieces. True if every character was in the vocabulary.
    fn viterbi<'t>(
        &self,
        text: &'t str,
        out: &mut Vec<u32>,
        run: &mut Run<'t>,
    ) -> Result<bool, TokenizerError> {
        // SentencePiece's penalty for a character outside the vocabulary, below the worst piece.
        let unknown_score = self.score_range.0 as f64 - 10.0;
        let best = &mut run.scratch.best;
        best.clear();
        best.resize(text.len() + 1, (f64::NEG_INFINITY, usize::MAX, NONE));
        best[0].0 = 0.0;
        for (start, c) in text.char_indices() {
            let here = best[start].0;
            let mut single = false;
            for (offset, last) in text[start..].char_indices() {
                let end = start + offset + last.len_utf8();
                let prefix = &text[start..end];
                let Some(piece) = self.pieces.get(prefix) else {
                    let next = self.sorted.partition_point(|p| p.as_ref() < prefix);
                    if self.sorted.get(next).is_some_and(|p| p.starts_with(prefix)) {
                        continue;
                    }
                    break;
                };
                let score = match piece.kind {
                    TokenKind::Unused => continue,
                    // Enough to be chosen over any split.
                    TokenKind::UserDefined => {
                        (end - start) as f64 * self.score_range.1 as f64 - 0.1
                    }
                    _ => piece.score as f64,
                };
                single |= offset == 0;
                if best[end].1 == usize::MAX || here + score > best[end].0 {
                    best[end] = (here + score, start, piece.id);
                }
            }
            let end = start + c.len_utf8();
            if !single && (best[end].1 == usize::MAX || here + unknown_score > best[end].0) {
                best[end] = (here + unknown_score, start, NONE);
            }
        }
        let mut path = Vec::new();
        let mut end = text.len();
        while end > 0 {
            let (_, start, id) = best[end];
            path.push((start, end, id));
            end = start;
        }
        let mut plain = true;
        for &(start, end, id) in path.iter().rev() {
            if id == NONE {
                plain = false;
                self.push_unknown(&text[start..end], out, &mut run.last_unknown)?;
            } else {
                self.push(id, out, &mut run.last_unknown);
            }
        }
        Ok(plain)
    }
}

/// State of one encode call.
struct Run<'t> {
    /// The last id stands for an unknown character, which the next one would join.
    last_unknown: bool,
    /// Where in the output the ids of a stretch stand already.
    stretches: HashMap<&'t str, (usize, usize)>,
    scratch: Scratch<'t>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The rule as its authors state it: merge the best-scoring pair, leftmost first, until no union is a piece.
    fn naive_merge(entries: &[Entry], text: &str) -> Vec<u32> {
        let find = |text: &str| {
            let normal = |e: &&(usize, &Entry)| e.1.kind == TokenKind::Normal && e.1.text == text;
            entries
                .iter()
                .enumerate()
                .collect::<Vec<_>>()
                .iter()
                .find(normal)
                .map(|(id, e)| (*id as u32, e.score))
        };
        let fixed = |rest: &str| {
            let user = entries
                .iter()
                .enumerate()
                .filter(|(_, e)| e.kind == TokenKind::UserDefined);
            user.filter(|(_, e)| rest.starts_with(e.text))
                .max_by_key(|(_, e)| e.text.len())
                .map(|(id, e)| (id as u32, e.text.len()))
        };
        let mut parts: Vec<(String, Option<u32>)> = Vec::new();
        let mut at = 0;
        while at < text.len() {
            let (id, len) = match fixed(&text[at..]) {
                Some((id, len)) => (Some(id), len),
                None => (None, text[at..].chars().next().unwrap().len_utf8()),
            };
            parts.push((text[at..at + len].to_string(), id));
            at += len;
        }
        loop {
            let mut best: Option<(f32, usize)> = None;
            for (i, pair) in parts.windows(2).enumerate() {
                if pair.iter().any(|p| p.1.is_some()) {
                    continue;
                }
                let Some((_, score)) = find(&format!("{}{}", pair[0].0, pair[1].0)) else {
                    continue;
                };
                if best.is_none_or(|(s, _)| score > s) {
                    best = Some((score, i));
                }
            }
            let Some((_, i)) = best else { break };
            let right = parts.remove(i + 1).0;
            parts[i].0.push_str(&right);
        }
        let mut ids = Vec::new();
        let mut unknown = false;
        for (text, fixed) in parts {
            match fixed.or(find(&text).map(|f| f.0)) {
                Some(id) => ids.push(id),
                None if unknown => continue,
                None => ids.push(0),
            }
            unknown = ids.last() == Some(&0);
        }
        ids
    }

    /// The highest score of any path, by trying all of them from the left.
    fn best_score(entries: &[Entry], text: &str) -> f64 {
        let lowest = entries
            .iter()
            .filter(|e| e.kind == TokenKind::Normal)
            .map(|e| e.score)
            .fold(f32::INFINITY, f32::min);
        let Some(first) = text.chars().next() else {
            return 0.0;
        };
        let mut best = f64::NEG_INFINITY;
        let mut single = false;
        for e in entries
            .iter()
            .filter(|e| e.kind == TokenKind::Normal && text.starts_with(e.text))
        {
            single |= e.text.len() == first.len_utf8();
            best = best.max(e.score as f64 + best_score(entries, &text[e.text.len()..]));
        }
        if !single {
            best = best.max(lowest as f64 - 10.0 + best_score(entries, &text[first.len_utf8()..]));
        }
        best
    }

    fn vocabulary() -> impl Strategy<Value = Vec<(String, i32, bool)>> {
        proptest::collection::vec(
            ("[abc▁é]{1,4}", -6i32..1, proptest::bool::weighted(0.06)),
            1..25,
        )
    }

    fn entries(pieces: &[(String, i32, bool)], users: bool) -> Vec<Entry<'_>> {
        let mut list = vec![Entry {
            text: "<unk>",
            score: 0.0,
            kind: TokenKind::Unknown,
        }];
        for (text, score, user) in pieces {
            if list.iter().all(|e| e.text != text) {
                let kind = if *user && users {
                    TokenKind::UserDefined
                } else {
                    TokenKind::Normal
                };
                list.push(Entry {
                    text,
                    score: *score as f32 / 2.0,
                    kind,
                });
            }
        }
        list
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]
        #[test]
        fn merging_in_stretches_is_merging_the_whole(pieces in vocabulary(), text in "[abc▁éx]{0,40}") {
            let list = entries(&pieces, true);
            let model = SentencePiece::new(Search::Merge, &list, Some(0)).unwrap();
            let mut ids = Vec::new();
            model.encode(&text, &mut ids).unwrap();
            prop_assert_eq!(ids, naive_merge(&list, &text));
        }

        #[test]
        fn no_path_scores_higher(pieces in vocabulary(), text in "[abc▁éx]{0,12}") {
            let list = entries(&pieces, false);
            let model = SentencePiece::new(Search::Unigram, &list, Some(0)).unwrap();
            prop_assume!(list.iter().any(|e| e.kind == TokenKind::Normal));
            let mut run = Run { last_unknown: false, stretches: HashMap::new(), scratch: Scratch::default() };
            let mut whole = Vec::new();
            model.viterbi(&text, &mut whole, &mut run).unwrap();
            let found = run.scratch.best[text.len()].0;
            prop_assert!((found - best_score(&list, &text)).abs() < 1e-9);
            let mut ids = Vec::new();
            model.encode(&text, &mut ids).unwrap();
            let score = |ids: &[u32]| ids.iter().filter(|&&id| id > 0).map(|&id| list[id as usize].score as f64).sum::<f64>();
            prop_assert!((score(&ids) - score(&whole)).abs() < 1e-9);
        }
    }

    #[test]
    fn without_a_place_to_cut_merging_is_still_fast() {
        let list = [
            Entry {
                text: "a",
                score: 0.0,
                kind: TokenKind::Normal,
            },
            Entry {
                text: "aa",
                score: -1.0,
                kind: TokenKind::Normal,
            },
            Entry {
                text: "aaaa",
                score: -2.0,
                kind: TokenKind::Normal,
            },
        ];
        let model = SentencePiece::new(Search::Merge, &list, None).unwrap();
        let mut ids = Vec::new();
        model.encode(&"a".repeat(1_000_001), &mut ids).unwrap();
        assert_eq!(
            (
                ids.len(),
                ids.iter().filter(|&&id| id == 2).count(),
                ids.last()
            ),
            (250_001, 250_000, Some(&0))
        );
    }
}
