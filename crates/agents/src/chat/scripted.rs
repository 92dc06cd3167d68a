//! A model that answers by rules, a transcript or a function: workflows are tested with it to the byte, and recorded
//! talks are played back. Its tokens are words.

use super::local::Finish;
use super::model::{
    Ability, Call, Card, ChatError, ChatModel, Embeddings, Input, OnText, Reply, Request, Result,
    TokenCount, TokenScore, Usage,
};
use super::wire::{TokenLogprob, TopLogprob};
use longspan_infer::key_context::Distribution;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Mutex;

/// One line of a script.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Applies to requests whose text holds all of these; none = all requests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub contains: Vec<String>,
    /// The answer.
    pub reply: String,
    /// Applies this often; a transcript is a list of rules that apply once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub times: Option<usize>,
}

type Answer = Box<dyn Fn(&Request) -> Result<String> + Send + Sync>;
type Next = Box<dyn Fn(&Request) -> Distribution + Send + Sync>;

/// See the module's text.
pub struct Scripted {
    card: Card,
    answer: Answer,
    next: Option<Next>,
    log: Mutex<Vec<Request>>,
    prepared: Mutex<Vec<Input>>,
}

/// Components of its embeddings.
const DIM: usize = 64;

impl Scripted {
    /// Answers by a function of the request.
    pub fn new(answer: impl Fn(&Request) -> Result<String> + Send + Sync + 'static) -> Scripted {
        let abilities = vec![
            Ability::Chat,
            Ability::Complete,
            Ability::Logprobs,
            Ability::Score,
            Ability::Embed,
            Ability::AnswerPrefix,
            Ability::Seed,
        ];
        Scripted {
            card: Card {
                name: "scripted".into(),
                fingerprint: "scripted".into(),
                window: None,
                abilities,
                embedding_dim: Some(DIM),
            },
            answer: Box::new(answer),
            next: None,
            log: Mutex::default(),
            prepared: Mutex::default(),
        }
    }

    /// Can read ahead: [`Scripted::prepared`] lists what it was given.
    pub fn reads_ahead(mut self) -> Scripted {
        let both = [Ability::Prepare, Ability::ReadAhead];
        self.card.abilities.extend(both);
        self
    }

    /// All beginnings that were prepared so far.
    pub fn prepared(&self) -> Vec<Input> {
        let prepared = self.prepared.lock();
        prepared
            .unwrap_or_else(|poison| poison.into_inner())
            .clone()
    }

    /// Answers by the first rule that applies; a request that none applies to is an error.
    pub fn rules(rules: Vec<Rule>) -> Scripted {
        let used = Mutex::new(vec![0usize; rules.len()]);
        Scripted::new(move |request| {
            let text = text_of(request);
            let mut used = used.lock().unwrap_or_else(|poison| poison.into_inner());
            for (rule, used) in rules.iter().zip(used.iter_mut()) {
                let fits = rule.contains.iter().all(|part| text.contains(part));
                if fits && rule.times.is_none_or(|times| *used < times) {
                    *used += 1;
                    return Ok(rule.reply.clone());
                }
            }
            let shown: String = text.chars().take(200).collect();
            Err(ChatError::Store(format!(
                "no rule of the script applies to {shown:?}"
            )))
        })
    }

    /// Rules from a file, one JSON object a line: `{"contains": ["..."], "reply": "...", "times": 1}`.
    ///
    /// # Errors
    /// A file that cannot be read, a line that is no rule.
    pub fn open(path: &Path) -> Result<Scripted> {
        let wrong = |text: String| ChatError::Store(format!("{}: {text}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        let lines = text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty());
        let rules = lines.map(|(index, line)| {
            serde_json::from_str(line)
                .map_err(|error| wrong(format!("line {}: {error}", index + 1)))
        });
        Ok(Scripted::rules(rules.collect::<Result<_>>()?))
    }

    /// Limits prompt and reply.
    pub fn window(mut self, tokens: usize) -> Scripted {
        self.card.window = Some(tokens);
        self
    }

    /// Takes an ability away.
    pub fn without(mut self, ability: Ability) -> Scripted {
        self.card.abilities.retain(|&other| other != ability);
        self
    }

    /// Prescribes the distribution of the first token.
    pub fn on_next_token(
        mut self,
        next: impl Fn(&Request) -> Distribution + Send + Sync + 'static,
    ) -> Scripted {
        self.next = Some(Box::new(next));
        self
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.log
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
            .clone()
    }

    fn written(&self, request: &Request) -> Result<(String, Finish)> {
        let mut text = (self.answer)(request)?;
        for stop in request.stop.iter().filter(|stop| !stop.is_empty()) {
            if let Some(at) = text.find(stop) {
                text.truncate(at);
            }
        }
        let words = words(&text);
        if words.len() <= request.max_tokens {
            return Ok((text, Finish::Stop));
        }
        let end: usize = words[..request.max_tokens]
            .iter()
            .map(|word| word.len())
            .sum();
        text.truncate(end);
        Ok((text, Finish::Length))
    }
}

/// The text that rules look at.
fn text_of(request: &Request) -> String {
    request.input.plain() + &request.answer_prefix
}

/// Words with the blanks before them; blanks at the end belong to the last one.
fn words(text: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let (mut start, mut in_word) = (0, false);
    for (at, c) in text.char_indices() {
        if c.is_whitespace() && in_word && text[at..].chars().any(|c| !c.is_whitespace()) {
            words.push(&text[start..at]);
            (start, in_word) = (at, false);
        } else if !c.is_whitespace() {
            in_word = true;
        }
    }
    if start < text.len() {
        words.push(&text[start..]);
    }
    words
}

fn count(text: &str) -> usize {
    text.split_whitespace().count()
}

impl ChatModel for Scripted {
    fn card(&self) -> &Card {
        &self.card
    }

    fn count(&self, input: &Input) -> Result<TokenCount> {
        Ok(TokenCount {
            tokens: count(&input.plain()),
            exact: true,
        })
    }

    fn count_text(&self, text: &str) -> Result<TokenCount> {
        Ok(TokenCount {
            tokens: count(text),
            exact: true,
        })
    }

    fn reply(&self, request: &Request, call: &Call, on_text: OnText<'_>) -> Result<Reply> {
        let wrong = |error: &dyn std::fmt::Display| ChatError::BadRequest(error.to_string());
        request.sampling.validate().map_err(|error| wrong(&error))?;
        if request.max_tokens == 0 {
            return Err(wrong(&"max_tokens: 0 found, at least 1 expected"));
        }
        if request.decode != longspan_infer::decode::DecodeConfig::Plain {
            self.card.need(Ability::Decode)?;
        }
        call.check("")?;
        let prompt = self.fit(request)?.tokens;
        self.log
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
            .push(request.clone());
        let (text, finish) = self.written(request)?;
        let mut partial = String::new();
        let words = words(&text);
        for word in &words {
            call.check(&partial)?;
            partial.push_str(word);
            if on_text(word).is_break() {
                return Err(ChatError::Cancelled { partial });
            }
        }
        let logprob = |word: &&str, top: usize| {
            let alone = TopLogprob {
                token: (*word).into(),
                logprob: 0.0,
                bytes: Some(word.as_bytes().to_vec()),
            };
            TokenLogprob {
                token: alone.token.clone(),
                logprob: 0.0,
                bytes: alone.bytes.clone(),
                top_logprobs: if top > 0 { vec![alone] } else { Vec::new() },
            }
        };
        Ok(Reply {
            logprobs: match request.sampling.logprobs {
                Some(top) => words.iter().map(|word| logprob(word, top)).collect(),
                None => Vec::new(),
            },
            usage: Usage {
                prompt,
                cached: 0,
                completion: words.len(),
                exact: true,
            },
            text,
            finish,
            first_s: 0.0,
            total_s: 0.0,
            from_cache: false,
        })
    }

    /// Certain of what it would say itself, and nearly certain that nothing else is said.
    fn score(&self, prompt: &str, continuation: &str, call: &Call) -> Result<Vec<TokenScore>> {
        self.card.need(Ability::Score)?;
        call.check("")?;
        let own = (self.answer)(&Request::text(prompt))?;
        let own = words(&own);
        let scores = words(continuation).into_iter().enumerate();
        let score = |(index, word): (usize, &str)| TokenScore {
            token: word.into(),
            logprob: if own.get(index).is_some_and(|own| own.trim() == word.trim()) {
                0.0
            } else {
                -10.0
            },
        };
        Ok(scores.map(score).collect())
    }

    fn embed(&self, texts: &[String], call: &Call) -> Result<Embeddings> {
        self.card.need(Ability::Embed)?;
        call.check("")?;
        let vectors = texts.iter().map(|text| {
            let mut vector = vec![0f32; DIM];
            for word in text.split_whitespace() {
                let word = word.to_lowercase();
                let hash =
                    blake3::hash(word.trim_matches(|c: char| !c.is_alphanumeric()).as_bytes());
                vector[usize::from(hash.as_bytes()[0]) % DIM] += 1.0;
            }
            let norm = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
            vector
                .iter_mut()
                .for_each(|x| *x /= norm.max(f32::MIN_POSITIVE));
            vector
        });
        Ok(Embeddings {
            vectors: vectors.collect(),
            tokens: texts.iter().map(|text| count(text)).sum(),
        })
    }

    fn prepare(&self, input: &Input, call: &Call) -> Result<()> {
        call.check("")?;
        let prepared = self.prepared.lock();
        prepared
            .unwrap_or_else(|poison| poison.into_inner())
            .push(input.clone());
        Ok(())
    }

    fn next_token(&self, request: &Request, call: &Call) -> Result<Distribution> {
        self.card.need(Ability::Logprobs)?;
        call.check("")?;
        match &self.next {
            Some(next) => {
                self.log
                    .lock()
                    .unwrap_or_else(|poison| poison.into_inner())
                    .push(request.clone());
                Ok(next(request))
            }
            None => Ok(Distribution::Top(vec![0.0])),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_add_up() {
        for text in ["", " ", "a", "a b", "  a\n\nb  c \n", "é ü"] {
            assert_eq!(words(text).concat(), text);
        }
        assert_eq!(words("a b\n"), ["a", " b\n"]);
    }

    #[test]
    fn rules_apply_in_order_and_so_often() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(
            file.path(),
            "{\"reply\":\"first\",\"times\":1}\n\n{\"contains\":[\"x\",\"y\"],\"reply\":\"both\"}\n",
        )
        .unwrap();
        let model = Scripted::open(file.path()).unwrap();
        let ask = |text: &str| model.ask(&Request::user(text), &Call::default());
        assert_eq!(ask("x y").unwrap().text, "first");
        assert_eq!(ask("x y").unwrap().text, "both");
        assert!(matches!(ask("x").unwrap_err(), ChatError::Store(_)));
        assert_eq!(model.requests().len(), 3);
        std::fs::write(file.path(), "{\"answer\":1}").unwrap();
        let error = Scripted::open(file.path()).err().unwrap().to_string();
        assert!(error.contains("line 1"), "{error}");
    }
}
