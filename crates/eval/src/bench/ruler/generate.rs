//! RULER's generators (paper 57): needles, variable chains, word counts, questions among
//! documents. Every call of the random streams stands where the published generators have it, so
//! equal sources, tokenizer and seed give equal bytes.

use super::sources::{QaSet, Sources};
use crate::count::Counter;
use crate::error::{EvalError, Result};
use crate::python::{NumpyRandom, Random};
use serde::{Deserialize, Serialize};

/// A row as published.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Row number; for needles the character offset of the first answer (as published).
    pub index: usize,
    /// The prompt without the answer's start.
    pub input: String,
    /// Right answers.
    pub outputs: Vec<String>,
    /// Tokens of input, answer's start and output budget.
    pub length: usize,
    /// The same with the template's tokens.
    pub length_w_model_temp: usize,
    /// What the model's answer begins with.
    pub answer_prefix: String,
    /// Tokens before the first answer, for needles.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_position_answer: Option<usize>,
}

/// What needles lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Haystack {
    /// Filler lines.
    Noise,
    /// An essay.
    Essay,
    /// Needles with other keys.
    Needle,
}

/// What keys and values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// Seven digits.
    Numbers,
    /// adjective-noun.
    Words,
    /// Version-4 UUIDs.
    Uuids,
}

/// A needle task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Niah {
    /// What needles lie in.
    pub haystack: Haystack,
    /// What keys are.
    pub key: Token,
    /// What values are.
    pub value: Token,
    /// Keys, values per key, keys asked for.
    pub counts: (usize, usize, usize),
}

/// Which generator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Needles.
    Niah(Niah),
    /// Variable tracking: 1 chain of 4 hops.
    Vt,
    /// Common words.
    Cwe,
    /// Frequent words.
    Fwe,
    /// SQuAD among other documents.
    Qa1,
    /// HotpotQA among other documents.
    Qa2,
}

const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";
/// Common words of cwe.
const COMMON: usize = 10;
/// Hops of vt.
const HOPS: usize = 4;

impl Kind {
    /// Output budget in tokens.
    pub fn tokens_to_generate(self) -> usize {
        match self {
            Kind::Niah(_) => 128,
            Kind::Vt => 30,
            Kind::Cwe => 120,
            Kind::Fwe => 50,
            Kind::Qa1 | Kind::Qa2 => 32,
        }
    }
}

/// What a generation is for.
pub struct Request<'a> {
    /// Texts and words.
    pub sources: &'a Sources,
    /// Counts tokens.
    pub counter: &'a dyn Counter,
    /// Tokens of input, answer's start and output budget at most.
    pub max_seq_length: usize,
    /// Of these, tokens of the chat template.
    pub model_template_token: usize,
    /// Rows.
    pub samples: usize,
    /// The published default is 42.
    pub random_seed: i64,
}

/// Makes rows.
///
/// # Errors
/// A length that the smallest text of the task does not fit, or more rows than there are questions.
pub fn generate(kind: Kind, request: &Request<'_>) -> Result<Vec<Row>> {
    let limit = request
        .max_seq_length
        .checked_sub(request.model_template_token + kind.tokens_to_generate())
        .filter(|left| *left > 0)
        .map(|left| left + kind.tokens_to_generate())
        .ok_or_else(|| too_short(request.max_seq_length))?;
    let mut generator = Generator {
        request,
        limit,
        random: Random::new(request.random_seed),
        numpy: NumpyRandom::new(request.random_seed as u32),
        words: Vec::new(),
    };
    match kind {
        Kind::Niah(niah) => generator.niah(niah),
        Kind::Vt => generator.vt(),
        Kind::Cwe => generator.cwe(),
        Kind::Fwe => generator.fwe(),
        Kind::Qa1 => generator.qa(&request.sources.squad),
        Kind::Qa2 => generator.qa(&request.sources.hotpotqa),
    }
}

fn too_short(length: usize) -> EvalError {
    EvalError::Input(format!(
        "length {length}: the task's smallest text does not fit; take a longer one"
    ))
}

/// A text, and what else a draw gives.
type Drawn<T> = Result<(String, T)>;

struct Generator<'a> {
    request: &'a Request<'a>,
    /// Tokens of text and output budget at most.
    limit: usize,
    random: Random,
    numpy: NumpyRandom,
    /// Shuffled vocabulary of cwe.
    words: Vec<String>,
}

/// Sentences: cut at whitespace after `.`, `!` or `?`.
fn sentences(text: &str) -> Vec<&str> {
    let mut all = Vec::new();
    let (mut start, mut last) = (0, ' ');
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        if c.is_whitespace() && matches!(last, '.' | '!' | '?') {
            all.push(&text[start..at]);
            while chars.next_if(|(_, c)| c.is_whitespace()).is_some() {}
            start = chars.peek().map_or(text.len(), |(at, _)| *at);
            last = ' ';
        } else {
            last = c;
        }
    }
    if start < text.len() {
        all.push(&text[start..]);
    }
    all
}

impl<'a> Generator<'a> {
    fn count(&self, text: &str) -> Result<usize> {
        self.request.counter.count(text)
    }

    fn short(&self) -> bool {
        self.request.max_seq_length < 4096
    }

    fn fresh(&self) -> Random {
        Random::new(self.request.random_seed)
    }

    /// The largest size found between `low` and `high` whose text fits, along the published path of
    /// a binary search; `low` if none does.
    fn size(
        &mut self,
        low: usize,
        high: usize,
        extra: usize,
        limit: usize,
        make: &mut dyn FnMut(&mut Self, usize) -> Result<String>,
    ) -> Result<usize> {
        let (mut low, mut high, first) = (low as i64, high as i64, low);
        let mut best = first;
        while low <= high {
            let middle = (low + high) / 2;
            let text = make(self, middle as usize)?;
            if self.count(&text)? + extra <= limit {
                best = middle as usize;
                low = middle + 1;
            } else {
                high = middle - 1;
            }
        }
        Ok(best)
    }

    /// Draws at `size`, and at smaller sizes while the text is too long.
    fn fitting<T>(
        &mut self,
        size: usize,
        step: usize,
        extra: usize,
        limit: usize,
        make: &mut dyn FnMut(&mut Self, usize) -> Drawn<T>,
    ) -> Result<(String, T, usize)> {
        let mut used = size;
        loop {
            let (text, rest) = make(self, used)?;
            let length = self.count(&text)? + extra;
            if length <= limit {
                return Ok((text, rest, length));
            }
            if used <= step {
                // The published loop would never end here.
                return Err(too_short(self.request.max_seq_length));
            }
            used -= step;
        }
    }

    fn row(
        &self,
        index: usize,
        text: &str,
        prefix: &str,
        outputs: Vec<String>,
        length: usize,
    ) -> Row {
        let mark: String = prefix.chars().take(10).collect();
        let cut = text.rfind(&mark).unwrap_or(text.len());
        Row {
            index,
            input: text[..cut].into(),
            outputs,
            length,
            length_w_model_temp: length + self.request.model_template_token,
            answer_prefix: text[cut..].into(),
            token_position_answer: None,
        }
    }

    fn draw(&mut self, token: Token) -> Result<String> {
        Ok(match token {
            Token::Numbers => self.random.randint(1_000_000, 9_999_999).to_string(),
            Token::Uuids => self.random.uuid4(),
            Token::Words => {
                let keys = &self.request.sources.keys;
                self.random.choice(keys).cloned().unwrap_or_default()
            }
        })
    }

    fn niah(&mut self, niah: Niah) -> Result<Vec<Row>> {
        let budget = Kind::Niah(niah).tokens_to_generate();
        let step = match niah.haystack {
            Haystack::Essay => 500,
            _ if self.short() => 5,
            _ => 25,
        };
        let probe = self.niah_text(niah, step)?.0;
        let per_unit = self.count(&probe)? as f64 / step as f64;
        let high = ((self.limit as f64 / per_unit) * 3.0) as usize;
        let limit = self.limit;
        let size = self.size(
            step,
            high.max(2 * step),
            budget,
            limit,
            &mut |this, size| Ok(this.niah_text(niah, size)?.0),
        )?;
        let mut rows = Vec::new();
        for index in 0..self.request.samples {
            let (text, answers, length) =
                self.fitting(size, step, budget, limit, &mut |this, size| {
                    this.niah_text(niah, size)
                })?;
            let mut row = self.row(index, &text, " The special magic", answers, length);
            if let Some(at) = row.input.find(&row.outputs[0]) {
                row.index = row.input[..at].chars().count();
                row.token_position_answer = Some(self.count(&row.input[..at])?);
            }
            rows.push(row);
        }
        Ok(rows)
    }

    fn niah_text(&mut self, niah: Niah, size: usize) -> Result<(String, Vec<String>)> {
        let (k, v, q) = niah.counts;
        let k = k.max(q);
        let kind = match niah.value {
            Token::Numbers => "numbers",
            Token::Words => "words",
            Token::Uuids => "uuids",
        };
        let needle = |key: &str, value: &str| {
            format!("One of the special magic {kind} for {key} is: {value}.")
        };
        let (mut keys, mut values, mut needles) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..k {
            let key = self.draw(niah.key)?;
            let mut of_key = Vec::new();
            for _ in 0..v {
                let value = self.draw(niah.value)?;
                needles.push(needle(&key, &value));
                of_key.push(value);
            }
            keys.push(key);
            values.push(of_key);
        }
        self.fresh().shuffle(&mut needles);
        let context = match niah.haystack {
            Haystack::Essay => {
                let essay = &self.request.sources.essay;
                let words: Vec<&str> = essay
                    .iter()
                    .cycle()
                    .take(size)
                    .map(String::as_str)
                    .collect();
                let text = words.join(" ");
                let sentences = sentences(text.trim());
                let depths: Vec<f64> = (0..40)
                    .map(|i| (f64::from(i) * (100.0 / 39.0)).round_ties_even())
                    .collect();
                let mut cuts: Vec<usize> = self
                    .random
                    .sample(&depths, needles.len())
                    .into_iter()
                    .map(|depth| (sentences.len() as f64 * (depth / 100.0)) as usize)
                    .collect();
                cuts.sort();
                cuts.push(sentences.len());
                let mut parts = Vec::new();
                let mut last = 0;
                for (index, cut) in cuts.into_iter().enumerate() {
                    parts.push(sentences[last..cut].join(" "));
                    parts.extend(needles.get(index).cloned());
                    last = cut;
                }
                parts.join(" ")
            }
            haystack => {
                let mut lines = Vec::with_capacity(size + needles.len());
                for _ in 0..size {
                    lines.push(if haystack == Haystack::Noise {
                        NOISE.to_string()
                    } else {
                        let key = self.draw(niah.key)?;
                        let value = self.draw(niah.value)?;
                        needle(&key, &value)
                    });
                }
                let mut at = self.random.sample_indices(size, needles.len());
                at.sort_by(|a, b| b.cmp(a));
                for (index, needle) in at.into_iter().zip(needles) {
                    lines.insert(index, needle);
                }
                lines.join("\n")
            }
        };
        let asked = self.random.sample_indices(k, q);
        let queries: Vec<&str> = asked.iter().map(|&i| keys[i].as_str()).collect();
        let answers = asked.iter().flat_map(|&i| values[i].clone()).collect();
        let query = match queries.split_last() {
            Some((last, rest)) if !rest.is_empty() => format!("{}, and {last}", rest.join(", ")),
            _ => queries.concat(),
        };
        let text = if q * v == 1 {
            let kind = &kind[..kind.len() - 1];
            format!(
                "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text? The special magic {kind} for {query} mentioned in the provided text is"
            )
        } else {
            format!(
                "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided text? The special magic {kind} for {query} mentioned in the provided text are"
            )
        };
        Ok((text, answers))
    }

    /// A word of letters `first`..=`last`.
    fn letters(&mut self, first: char, count: usize) -> String {
        let alphabet: Vec<char> = (0..26u8).map(|i| (first as u8 + i) as char).collect();
        self.random.choices(&alphabet, count).into_iter().collect()
    }

    /// One chain in `size` lines of noise; the example's names are short and its value fixed.
    fn vt_text(&mut self, size: usize, example: bool) -> Result<(String, Vec<String>)> {
        let width = if example { 3 } else { 5 };
        let mut names: Vec<String> = (0..=HOPS).map(|_| self.letters('A', width)).collect();
        loop {
            let distinct: std::collections::HashSet<&String> = names.iter().collect();
            if distinct.len() > HOPS {
                break;
            }
            names.push(self.letters('A', width));
        }
        // Names beyond the first five start a chain that is never used; its value is drawn all the same.
        let chains = names.len().div_ceil(HOPS + 1);
        let mut value = "12345".to_string();
        for chain in 0..chains {
            if !example {
                let drawn = self.numpy.randint(10_000, 99_999).to_string();
                if chain == 0 {
                    value = drawn;
                }
            }
        }
        if names.len() > HOPS + 1 {
            return Err(EvalError::Target(format!(
                "seed {}: two of {width}-letter names are alike, which the published generator does not survive; take another seed",
                self.request.random_seed
            )));
        }
        if size < HOPS + 1 {
            return Err(too_short(self.request.max_seq_length));
        }
        let mut chain = vec![format!("VAR {} = {value}", names[0])];
        chain.extend(
            names
                .windows(2)
                .map(|pair| format!("VAR {} = VAR {} ", pair[1], pair[0])),
        );
        let mut lines = vec![NOISE.to_string(); size];
        let mut at = self.random.sample_indices(size, chain.len());
        at.sort();
        for (offset, (index, link)) in at.into_iter().zip(chain).enumerate() {
            lines.insert(index + offset, link);
        }
        let context = lines.join("\n").replace(". \n", ".\n");
        let count = HOPS + 1;
        let text = format!(
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the value {value}, they are: "
        );
        Ok((text, names))
    }

    fn vt(&mut self) -> Result<Vec<Row>> {
        // The one-shot example: 500 tokens, no output budget.
        let probe = self.vt_text(5, true)?.0;
        let per_unit = self.count(&probe)? as f64 / 5.0;
        let high = ((500.0 / per_unit) * 3.0) as usize;
        let size = self.size(5, high.max(10), 0, 500, &mut |this, size| {
            Ok(this.vt_text(size, true)?.0)
        })?;
        let (text, names, _) =
            self.fitting(size, 5, 0, 500, &mut |this, size| this.vt_text(size, true))?;
        let example = format!("{text} {}\n", names.join(" "));
        let example_tokens = self.count(&example)?;

        let budget = Kind::Vt.tokens_to_generate();
        let step = if self.short() { 5 } else { 10 };
        let probe = self.vt_text(step, false)?.0;
        let per_unit = self.count(&probe)? as f64 / step as f64;
        let high = ((self.limit as f64 / per_unit) * 3.0) as usize;
        let limit = self.limit;
        let size = self.size(
            step,
            high.max(2 * step),
            example_tokens + budget,
            limit,
            &mut |this, size| Ok(this.vt_text(size, false)?.0),
        )?;
        let mut rows = Vec::new();
        for index in 0..self.request.samples {
            let (text, names, length) =
                self.fitting(size, step, budget, limit, &mut |this, size| {
                    let (text, names) = this.vt_text(size, false)?;
                    let shot = this.another_example(&example);
                    Ok((format!("{shot}\n{text}"), names))
                })?;
            rows.push(self.row(index, &text, " Answer: According", names, length));
        }
        Ok(rows)
    }

    /// The example with new names and a new value.
    fn another_example(&mut self, example: &str) -> String {
        let words: Vec<&str> = example.split_whitespace().collect();
        let mut text = example.to_string();
        for word in &words[words.len() - HOPS - 1..] {
            let new = self.letters('A', word.chars().count());
            text = text.replace(word, &new);
        }
        let value = self.numpy.randint(10_000, 99_999).to_string();
        text.replace("12345", &value)
    }

    fn word_list(
        &mut self,
        count: usize,
        common: usize,
        other: usize,
    ) -> Result<(String, Vec<String>)> {
        let list = if count <= self.words.len() {
            &self.words
        } else {
            &self.request.sources.english
        };
        if count > list.len() {
            return Err(EvalError::Input(format!(
                "length {}: the text needs {count} different words, the list has {}",
                self.request.max_seq_length,
                list.len()
            )));
        }
        let drawn: Vec<String> = self
            .random
            .sample(list, count)
            .into_iter()
            .cloned()
            .collect();
        let (first, rest) = drawn.split_at(COMMON.min(drawn.len()));
        let mut words: Vec<&str> = Vec::new();
        (0..common).for_each(|_| words.extend(first.iter().map(String::as_str)));
        (0..other).for_each(|_| words.extend(rest.iter().map(String::as_str)));
        self.fresh().shuffle(&mut words);
        Ok((numbered(words), first.to_vec()))
    }

    fn cwe_text(&mut self, size: usize) -> Result<(String, Vec<String>)> {
        let (shot, main) = if self.short() {
            ((20, 3, 1), (6, 1))
        } else {
            ((40, 10, 3), (30, 3))
        };
        let example = self.word_list(shot.0, shot.1, shot.2)?;
        let (context, answer) = self.word_list(size, main.0, main.1)?;
        let fill = |context: &str| {
            format!(
                "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often in the list are:"
            )
        };
        let shown = numbered(example.1.iter().map(String::as_str));
        Ok((
            format!("{} {shown}\n{}", fill(&example.0), fill(&context)),
            answer,
        ))
    }

    fn cwe(&mut self) -> Result<Vec<Row>> {
        self.words = self.request.sources.words.clone();
        let mut words = std::mem::take(&mut self.words);
        self.fresh().shuffle(&mut words);
        self.words = words;
        let budget = Kind::Cwe.tokens_to_generate();
        let step = 10;
        let probe = self.cwe_text(4096)?.0;
        let per_unit = self.count(&probe)? as f64 / 4096.0;
        let high = (self.limit as f64 / per_unit).floor() as usize * 2;
        let limit = self.limit;
        let size = self.size(
            step,
            high.max(2 * step),
            budget,
            limit,
            &mut |this, size| Ok(this.cwe_text(size)?.0),
        )?;
        let mut rows = Vec::new();
        for index in 0..self.request.samples {
            let (text, answer, length) =
                self.fitting(size, step, budget, limit, &mut |this, size| {
                    this.cwe_text(size)
                })?;
            rows.push(self.row(index, &text, " Answer: The top", answer, length));
        }
        Ok(rows)
    }

    fn fwe(&mut self) -> Result<Vec<Row>> {
        let budget = Kind::Fwe.tokens_to_generate();
        let most = self.limit - budget;
        let (vocabulary, step) = (most / 50, most / 32);
        if vocabulary < 4 || step == 0 {
            return Err(too_short(self.request.max_seq_length));
        }
        // The sizing call draws a vocabulary of its own.
        let vocab = self.coded_words(vocabulary);
        let mut words = most / 6;
        while self.count(&self.fwe_text(&vocab, words))? < most {
            words += step;
        }
        words -= step;
        let mut rows = Vec::new();
        for index in 0..self.request.samples {
            let vocab = self.coded_words(vocabulary);
            let mut used = words;
            let mut text = self.fwe_text(&vocab, used);
            while self.count(&text)? > most {
                used = used
                    .checked_sub(step)
                    .ok_or_else(|| too_short(self.request.max_seq_length))?;
                text = self.fwe_text(&vocab, used);
            }
            let length = self.count(&text)? + budget;
            rows.push(self.row(
                index,
                &text,
                " Answer: According",
                vocab[1..4].to_vec(),
                length,
            ));
        }
        Ok(rows)
    }

    fn coded_words(&mut self, count: usize) -> Vec<String> {
        let mut words: Vec<String> = (0..count).map(|_| self.letters('a', 6)).collect();
        let mut set: std::collections::BTreeSet<String> = words.iter().cloned().collect();
        while set.len() < count {
            let word = self.letters('a', 6);
            set.insert(word);
        }
        words = set.into_iter().collect();
        self.fresh().shuffle(&mut words);
        words[0] = "...".into();
        words
    }

    fn fwe_text(&self, vocab: &[String], words: usize) -> String {
        const ALPHA: f64 = 2.0;
        let zeta = std::f64::consts::PI * std::f64::consts::PI / 6.0;
        let mut list: Vec<&str> = Vec::new();
        for (rank, word) in vocab.iter().enumerate() {
            let share = ((rank + 1) as f64).powf(-ALPHA);
            let count = (words as f64 * share / zeta) as usize;
            list.extend(std::iter::repeat_n(word.as_str(), count));
        }
        self.fresh().shuffle(&mut list);
        format!(
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. {}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared words in the above coded text? Answer: According to the coded text above, the three most frequently appeared words are:",
            list.join(" ")
        )
    }

    fn qa_text(
        &mut self,
        set: &QaSet,
        question: usize,
        size: usize,
    ) -> Result<(String, Vec<String>)> {
        let Some(asked) = set.questions.get(question) else {
            return Err(EvalError::Input(format!(
                "question {question} is asked for, the source has {}; take fewer samples",
                set.questions.len()
            )));
        };
        let all = set.documents.len();
        let mut chosen = asked.context.clone();
        if size < all {
            let room = size.saturating_sub(chosen.len());
            if room > asked.more.len() {
                chosen.extend(&asked.more);
                let others: Vec<usize> = (0..all).filter(|i| !chosen.contains(i)).collect();
                chosen.extend(self.random.sample(&others, room - asked.more.len()));
            } else {
                chosen.extend(self.random.sample(&asked.more, room));
            }
        } else {
            chosen = (0..all).cycle().take(size).collect();
        }
        self.fresh().shuffle(&mut chosen);
        let documents: Vec<String> = chosen
            .iter()
            .enumerate()
            .map(|(i, &d)| format!("Document {}:\n{}", i + 1, set.documents[d]))
            .collect();
        let text = format!(
            "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\nThe following are given documents.\n\n{}\n\nAnswer the question based on the given documents. Only give me the answer and do not output any other words.\n\nQuestion: {} Answer:",
            documents.join("\n\n"),
            asked.query
        );
        Ok((text, asked.outputs.clone()))
    }

    fn qa(&mut self, set: &QaSet) -> Result<Vec<Row>> {
        let (budget, step) = (Kind::Qa1.tokens_to_generate(), 10);
        let probe = self.qa_text(set, 0, step)?.0;
        let per_unit = self.count(&probe)? as f64 / step as f64;
        let high = ((self.limit as f64 / per_unit) * 3.0) as usize;
        let limit = self.limit;
        let size = self.size(
            step,
            high.max(2 * step),
            budget,
            limit,
            &mut |this, size| Ok(this.qa_text(set, 0, size)?.0),
        )?;
        let mut rows = Vec::new();
        for index in 0..self.request.samples {
            let (text, answers, length) =
                self.fitting(size, step, budget, limit, &mut |this, size| {
                    this.qa_text(set, index, size)
                })?;
            rows.push(self.row(index, &text, " Answer:", answers, length));
        }
        Ok(rows)
    }
}

/// "1. word 2. word ..."
fn numbered<'w>(words: impl IntoIterator<Item = &'w str>) -> String {
    let items: Vec<String> = words
        .into_iter()
        .enumerate()
        .map(|(i, word)| format!("{}. {word}", i + 1))
        .collect();
    items.join(" ")
}

#[cfg(test)]
mod tests {
    #[test]
    fn sentences_are_cut_after_their_ends() {
        let text = "Dr. A went.  Why? So! Then 3.5 m\nand on.";
        let cut = ["Dr.", "A went.", "Why?", "So!", "Then 3.5 m\nand on."];
        assert_eq!(super::sentences(text), cut);
        assert!(super::sentences("").is_empty());
    }
}
