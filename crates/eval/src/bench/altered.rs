//! AlteredNumericQA (paper 06, Giraffe): questions about documents whose numbers were changed, so
//! that a model must read them and cannot know them.

use super::{attr, rows};
use crate::error::{EvalError, Result};
use crate::python::{Random, chars, strip};
use crate::task::*;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Most tokens of an answer.
const MAX_NEW: usize = 50;

/// Another number in place of `number`: a year-like one (1000 to 2100) moves by 1 to 10, others
/// become a different number of as many digits. None for texts that are no plain number, and for
/// single digits when all others are taken.
fn another(number: &str, random: &mut Random) -> Option<String> {
    let value: u64 = number.parse().ok().filter(|_| number.len() <= 18)?;
    if number.len() > 1 && number.starts_with('0') {
        return None;
    }
    if (1000..=2100).contains(&value) {
        let step = random.randint(1, 10);
        let sign = if random.below(2) == 0 { -1 } else { 1 };
        return Some((value as i64 + sign * step).to_string());
    }
    let low = if number.len() == 1 {
        0
    } else {
        10i64.pow(number.len() as u32 - 1)
    };
    let high = 10i64.pow(number.len() as u32) - 1;
    loop {
        let drawn = random.randint(low, high);
        if drawn != value as i64 {
            return Some(drawn.to_string());
        }
    }
}

/// Where a whole number stands: not inside a longer number or word.
fn occurrences<'t>(text: &'t str, number: &'t str) -> impl Iterator<Item = usize> + 't {
    text.match_indices(number)
        .map(|(at, _)| at)
        .filter(move |&at| {
            let part_of = |c: Option<char>| c.is_some_and(chars::is_word);
            !part_of(text[..at].chars().next_back())
                && !part_of(text[at + number.len()..].chars().next())
        })
}

/// Rewrites a document and its numeric answer; every whole-number occurrence is replaced. None if
/// the answer is no plain number or does not stand in the document.
pub fn alter(document: &str, answer: &str, random: &mut Random) -> Option<(String, String)> {
    let answer = strip(answer);
    occurrences(document, answer).next()?;
    // A new answer that already stands in the text would make the question ambiguous.
    let new = (0..100)
        .filter_map(|_| another(answer, random))
        .find(|new| occurrences(document, new).next().is_none())?;
    let mut out = String::with_capacity(document.len());
    let mut last = 0;
    for at in occurrences(document, answer) {
        out += &document[last..at];
        out += &new;
        last = at + answer.len();
    }
    out += &document[last..];
    Some((out, new))
}

/// Presence accuracy: the stripped reference is a part of the output, case and all.
pub fn presence(output: &str, reference: &str) -> bool {
    output.contains(strip(reference))
}

/// Sentence BLEU as published: whitespace words, n = min(words of the reference, 4), uniform
/// weights, no smoothing, clipped counts, brevity penalty for outputs that are not longer.
pub fn bleu(output: &str, reference: &str) -> f64 {
    let output: Vec<&str> = crate::python::split(output).collect();
    let reference: Vec<&str> = crate::python::split(reference).collect();
    let order = reference.len().min(4);
    if order == 0 || output.is_empty() {
        return 0.0;
    }
    let mut log_sum = 0.0;
    for n in 1..=order {
        let count = |words: &[&str]| {
            let mut counts: BTreeMap<Vec<String>, usize> = BTreeMap::new();
            for gram in words.windows(n) {
                *counts
                    .entry(gram.iter().map(|w| w.to_string()).collect())
                    .or_default() += 1;
            }
            counts
        };
        let (ours, theirs) = (count(&output), count(&reference));
        let matches: usize = ours
            .iter()
            .map(|(gram, &count)| count.min(theirs.get(gram).copied().unwrap_or(0)))
            .sum();
        let total = output.len().saturating_sub(n - 1).max(1);
        if matches == 0 {
            return 0.0;
        }
        log_sum += (matches as f64 / total as f64).ln() / order as f64;
    }
    let penalty = if output.len() > reference.len() {
        1.0
    } else {
        (1.0 - reference.len() as f64 / output.len() as f64).exp()
    };
    penalty * log_sum.exp()
}

/// See the module's text.
pub struct AlteredQa {
    meta: TaskMeta,
}

const TOWNS: [&str; 24] = [
    "Arden",
    "Bexley",
    "Corvale",
    "Dunmore",
    "Eastrow",
    "Fennwick",
    "Glenhaven",
    "Harrow",
    "Ilmouth",
    "Jorvik",
    "Kestrel",
    "Lowmere",
    "Marston",
    "Norfell",
    "Oakham",
    "Pellworth",
    "Quarn",
    "Ravensby",
    "Stanmore",
    "Thirlby",
    "Ulverton",
    "Varnholm",
    "Westacre",
    "Yarrow",
];
const KINDS: [&str; 12] = [
    "bridge",
    "museum",
    "library",
    "observatory",
    "theatre",
    "lighthouse",
    "railway station",
    "school",
    "aqueduct",
    "botanical garden",
    "town hall",
    "harbour",
];
const PEOPLE: [&str; 12] = [
    "Ada Lindqvist",
    "Tomas Okafor",
    "Mira Castellan",
    "Jonas Weidmann",
    "Leila Haddad",
    "Piotr Zielny",
    "Grace Omondi",
    "Henrik Dahl",
    "Ines Carvalho",
    "Ravi Menon",
    "Clara Novak",
    "Samuel Ortega",
];

/// One building's facts as a paragraph, with questions and numeric answers.
fn article(random: &mut Random, town: &str, kind: &str) -> (String, Vec<(String, String)>) {
    let mut number = |low, high| random.randint(low, high);
    let (year, height, cost, rooms, visitors) = (
        number(1100, 2010),
        number(12, 98),
        number(2_200, 99_000),
        number(101, 989),
        number(100_000, 990_000),
    );
    let architect = PEOPLE[number(0, PEOPLE.len() as i64 - 1) as usize];
    let text = format!(
        "The {kind} of {town} was opened in {year}. It was designed by {architect}, who had won the competition two seasons earlier. The {kind} is {height} metres high and cost {cost} crowns, most of it paid by a lottery that the council of {town} held over several winters. Since its opening in {year} the {kind} has been repaired twice, and its keepers maintain {rooms} numbered fittings. In a good season the {kind} of {town} receives {visitors} visitors, many of whom come for the view."
    );
    let ask = |question: &str| question.replace("{k}", &format!("{kind} of {town}"));
    let questions = vec![
        (ask("In which year was the {k} opened?"), year.to_string()),
        (ask("How many metres high is the {k}?"), height.to_string()),
        (ask("How many crowns did the {k} cost?"), cost.to_string()),
        (
            ask("How many numbered fittings do the keepers of the {k} maintain?"),
            rooms.to_string(),
        ),
        (
            ask("How many visitors does the {k} receive in a good season?"),
            visitors.to_string(),
        ),
    ];
    (text, questions)
}

impl AlteredQa {
    /// The task.
    pub fn task() -> Arc<dyn Task> {
        Arc::new(AlteredQa {
            meta: TaskMeta {
                id: "altered-qa".into(),
                version: 1,
                ability: "question answering against changed numbers",
                metric: "presence accuracy",
                higher_is_better: true,
                best: 1.0,
                floor: 0.0,
                unit: Unit::Tokens,
                lengths: &[2048, 4096],
                depths: true,
                source: "arXiv 2308.10882; texts made for this program; published rows with --data",
                licence: "generated; published rows: Apache-2.0",
            },
        })
    }

    /// Rows `{conversations: [{from, value, tok_len}, {from, value}]}`; every group of six has the
    /// answer at the start, anywhere, and at the end, with the question last (even) or first (odd).
    fn published(&self, cx: &SampleCx<'_>, path: &Path) -> Result<Vec<Sample>> {
        let read = |path: &Path| std::fs::read_to_string(path).map_err(EvalError::io(path));
        let path = if path.is_dir() {
            path.join(format!("{}.jsonl", cx.length))
        } else {
            path.to_path_buf()
        };
        let text = read(&path)?;
        let all: Vec<Value> = if text.trim_start().starts_with('[') {
            serde_json::from_str(&text).map_err(|error| EvalError::Row {
                path: path.clone(),
                line: error.line(),
                reason: error.to_string(),
            })?
        } else {
            rows(&text, &path)?
        };
        let mut samples = Vec::new();
        for (index, row) in all.iter().enumerate() {
            let turn = |at: usize| {
                row["conversations"][at]["value"]
                    .as_str()
                    .ok_or_else(|| EvalError::Row {
                        path: path.clone(),
                        line: index + 1,
                        reason: format!("conversations[{at}].value is missing or no string"),
                    })
            };
            let (prompt, answer) = (turn(0)?, turn(1)?);
            if row["conversations"][0]["tok_len"]
                .as_u64()
                .is_some_and(|n| n as usize > cx.length)
            {
                continue;
            }
            let depth = [0, 0, 50, 50, 100, 100][index % 6];
            samples.push(self.sample(
                prompt.into(),
                String::new(),
                answer,
                f64::from(depth),
                index,
            ));
            if samples.len() == cx.samples * cx.depths.len() {
                break;
            }
        }
        Ok(samples)
    }

    fn sample(
        &self,
        document: Arc<str>,
        question: String,
        answer: &str,
        depth: f64,
        repeat: usize,
    ) -> Sample {
        let mut prompt = Prompt::ask(document, question);
        prompt.segments.retain(|segment| !segment.text().is_empty());
        Sample::new(
            prompt,
            Work::Generate(Decode {
                max_new: MAX_NEW,
                stop: Vec::new(),
            }),
            vec![answer.to_string()],
            BTreeMap::from([attr("depth", depth), attr("repeat", repeat)]),
            format!("The answer is {} .", strip(answer)),
        )
    }
}

impl Task for AlteredQa {
    fn meta(&self) -> &TaskMeta {
        &self.meta
    }

    fn samples(&self, cx: &SampleCx<'_>) -> Result<Vec<Sample>> {
        if let Some(path) = cx.data {
            return self.published(cx, path);
        }
        const INTRO: &str = "Read the following notes and answer the question after them.\n\n";
        let mut all = Vec::new();
        for repeat in 0..cx.samples {
            let seed = format!("altered {} {} {repeat}", cx.seed, cx.length);
            let mut random = Random::from_text(&seed);
            let mut order: Vec<usize> = (0..TOWNS.len() * KINDS.len()).collect();
            random.shuffle(&mut order);
            let mut articles = Vec::new();
            let mut tokens = cx.counter.overhead() + cx.counter.count(INTRO)? + MAX_NEW + 48;
            for at in order {
                let article = article(
                    &mut random,
                    TOWNS[at / KINDS.len()],
                    KINDS[at % KINDS.len()],
                );
                tokens += cx.counter.count(&article.0)? + 2;
                if tokens > cx.length {
                    break;
                }
                articles.push(article);
            }
            if articles.is_empty() {
                return Err(EvalError::Input(format!(
                    "altered-qa: {} tokens hold no article; take a longer text",
                    cx.length
                )));
            }
            let plain: Vec<&str> = articles.iter().map(|(text, _)| text.as_str()).collect();
            let plain = plain.join("\n\n");
            for &depth in cx.depths {
                let at = ((articles.len() as f64 * depth / 100.0) as usize).min(articles.len() - 1);
                let questions = &articles[at].1;
                let start = random.below(questions.len() as u64) as usize;
                // Altered documents differ in one number: each question gets a document of its own.
                let made = (0..questions.len()).find_map(|offset| {
                    let (question, answer) = &questions[(start + offset) % questions.len()];
                    let (text, new) = alter(&plain, answer, &mut random)?;
                    Some((question, text, new))
                });
                let Some((question, text, new)) = made else {
                    return Err(EvalError::Input(
                        "altered-qa: no question of an article can be altered".into(),
                    ));
                };
                let question = format!("\n\nQuestion: {question} Answer with the number alone.");
                let document: Arc<str> = (INTRO.to_string() + &text).into();
                all.push(self.sample(document, question, &new, depth, repeat));
            }
        }
        Ok(all)
    }

    fn score(&self, row: &Prediction) -> Scored {
        let reference = row.references.first().map_or("", String::as_str);
        let value = f64::from(u8::from(presence(&row.text, reference)));
        let extracted = (!row.text.trim().is_empty()).then(|| row.text.clone());
        let mut scored = Scored::new(row, value, extracted);
        scored
            .more
            .insert("bleu".into(), bleu(&row.text, reference));
        scored
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_old_answer_stays_and_years_stay_near() {
        let mut random = Random::new(3);
        let mut done = 0;
        for round in 0..1000 {
            let town = TOWNS[round % TOWNS.len()];
            let (text, questions) = article(&mut random, town, KINDS[round % KINDS.len()]);
            // Fuzz: numbers inside longer ones and words must stay.
            let (_, old) = &questions[round % questions.len()];
            let text = format!("{text} Code x{old} and {old}7 stay; {old}, ({old}) and {old}. go.");
            let Some((out, new)) = alter(&text, old, &mut random) else {
                continue;
            };
            done += 1;
            assert_eq!(occurrences(&out, old).count(), 0, "{old}: {out}");
            assert!(occurrences(&out, &new).count() >= 4);
            assert!(out.contains(&format!("x{old}")) && out.contains(&format!("{old}7")));
            let (old, new): (i64, i64) = (old.parse().unwrap(), new.parse().unwrap());
            assert_ne!(old, new);
            if (1000..=2100).contains(&old) {
                assert!((old - new).abs() <= 10);
            } else {
                assert_eq!(old.to_string().len(), new.to_string().len());
            }
        }
        assert!(done > 900, "{done}");
        assert!(alter("no number", "12", &mut random).is_none());
        assert!(alter("about 3.5", "three", &mut random).is_none());
    }
}
