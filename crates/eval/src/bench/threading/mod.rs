//! Needle Threading (paper 43): abstract key-value texts, measured in characters, with retrieval
//! from one needle to many branched threads. For the effective context length of a model when
//! knowledge cannot help.

mod generate;
mod reply;

pub use generate::{Direction, Haystack, PAIR_CHARS, depth_index, positions};
pub use reply::{ends_on, list_score, literal, single};

use super::attr;
use crate::error::{EvalError, Result};
use crate::python::Random;
use crate::task::*;
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;

/// Share of right answers at which a length still counts as effective.
pub const THRESHOLD: f64 = 0.75;

/// Needles of the multiple and conditional tasks.
const NEEDLES: [usize; 9] = [1, 2, 3, 4, 5, 10, 15, 20, 25];
/// Lengths of threads and numbers of threads.
const THREADS: [usize; 5] = [2, 5, 10, 15, 25];
/// Keys per step of branched threads.
const BRANCHES: [usize; 3] = [2, 3, 5];
/// Links of branched threads.
const BRANCHED_LENGTHS: [usize; 3] = [3, 5, 8];
/// Links of each of many threads, and the number of threads where their length varies.
const PER_THREAD: usize = 5;

/// One of the six tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One key's value.
    Single,
    /// The values of several keys.
    Multi,
    /// The values of all keys with a special character.
    Conditional,
    /// The end of one thread.
    Thread,
    /// The ends of several threads.
    MultiThread,
    /// The end of the longest of branching threads.
    Branched,
}

impl Kind {
    fn all() -> [(Kind, &'static str, &'static str, &'static [&'static str]); 6] {
        [
            (
                Kind::Single,
                "single",
                "retrieval of one value",
                &["Single_Needle"],
            ),
            (
                Kind::Multi,
                "multi",
                "retrieval of several values",
                &["Multiple_Needles", "Multi_Needle"],
            ),
            (
                Kind::Conditional,
                "conditional",
                "retrieval by a condition",
                &["Conditional_Needles", "Conditional_Needle"],
            ),
            (
                Kind::Thread,
                "thread",
                "following a thread",
                &["Single_Threads", "Single_Thread"],
            ),
            (
                Kind::MultiThread,
                "multithread",
                "following threads side by side",
                &["Multi_Threads"],
            ),
            (
                Kind::Branched,
                "branched",
                "following branching threads",
                &[],
            ),
        ]
    }

    fn lists(self) -> bool {
        matches!(self, Kind::Multi | Kind::Conditional | Kind::MultiThread)
    }

    fn fixture(self) -> Option<&'static str> {
        macro_rules! file {
            ($name:literal) => {
                Some(include_str!(concat!(
                    "../../../../../tests/fixtures/needle-threading/",
                    $name,
                    ".json"
                )))
            };
        }
        match self {
            Kind::Single => file!("Single_Needle"),
            Kind::Multi => file!("Multiple_Needles"),
            Kind::Conditional => file!("Conditional_Needles"),
            Kind::Thread => file!("Single_Threads"),
            Kind::MultiThread => file!("Multi_Threads"),
            Kind::Branched => None,
        }
    }
}

/// One task. See the module's text.
pub struct Threading {
    meta: TaskMeta,
    kind: Kind,
    files: &'static [&'static str],
}

/// The six tasks.
pub fn tasks() -> Vec<Arc<dyn Task>> {
    Kind::all()
        .into_iter()
        .map(|(kind, name, ability, files)| {
            Arc::new(Threading {
                meta: TaskMeta {
                    id: format!("threading/{name}"),
                    version: 1,
                    ability,
                    metric: if kind.lists() { "recall" } else { "accuracy" },
                    higher_is_better: true,
                    best: 1.0,
                    floor: 0.0,
                    unit: Unit::Characters,
                    lengths: &[2000, 4000, 8000, 16000],
                    depths: kind == Kind::Single,
                    source: "arXiv 2411.05000; data re-created from its random stream",
                    licence: "MIT",
                },
                kind,
                files,
            }) as Arc<dyn Task>
        })
        .collect()
}

/// A row of the published files.
#[derive(Deserialize)]
struct Row {
    haystack: String,
    values: String,
    question: String,
    #[serde(default)]
    context_length: usize,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

/// A question with its answers and what it is.
struct Question {
    text: String,
    answers: Vec<String>,
    attrs: Vec<(String, Value)>,
}

fn python_list(items: &[String]) -> String {
    let quoted: Vec<String> = items.iter().map(|item| format!("'{item}'")).collect();
    format!("[{}]", quoted.join(", "))
}

impl Threading {
    fn sample(&self, haystack: Arc<str>, question: Question) -> Sample {
        let count = question.answers.len();
        let max_new = if count > 1 { 60 * count } else { 100 };
        let oracle = if self.kind.lists() {
            python_list(&question.answers)
        } else {
            question.answers.concat()
        };
        Sample::new(
            Prompt::ask(haystack, format!("\n{}", question.text)),
            Work::Generate(Decode {
                max_new,
                stop: Vec::new(),
            }),
            question.answers,
            question.attrs.into_iter().collect(),
            oracle,
        )
    }

    fn published(&self, text: &str, path: &Path, cx: &SampleCx<'_>) -> Result<Vec<Sample>> {
        let rows: Vec<Row> = serde_json::from_str(text).map_err(|error| EvalError::Row {
            path: path.into(),
            line: error.line(),
            reason: error.to_string(),
        })?;
        let mut shared: BTreeMap<String, Arc<str>> = BTreeMap::new();
        let mut all = Vec::new();
        for row in rows {
            if !cx.fixtures && row.context_length != cx.length {
                continue;
            }
            let haystack = shared
                .entry(row.haystack)
                .or_insert_with_key(|text| text.as_str().into());
            let answers = literal(&row.values).unwrap_or_else(|| vec![row.values.clone()]);
            let attrs = row
                .rest
                .into_iter()
                .filter(|(_, value)| value != "N/A")
                .filter_map(|(name, value)| match name.as_str() {
                    "needle_depth" => {
                        let depth: f64 = value.as_str()?.parse().ok()?;
                        Some(attr("depth", depth))
                    }
                    "num_needles" | "needle_placement" | "thread_length" | "thread_direction"
                    | "num_threads" | "repeat_number" => Some((name, value)),
                    _ => None,
                })
                .collect();
            all.push(self.sample(
                Arc::clone(haystack),
                Question {
                    text: row.question,
                    answers,
                    attrs,
                },
            ));
        }
        if all.is_empty() {
            return Err(EvalError::Input(format!(
                "{}: no row has context_length {}",
                path.display(),
                cx.length
            )));
        }
        Ok(all)
    }

    /// The questions about one haystack, which they may rewrite.
    fn questions(
        &self,
        n: usize,
        repeat: usize,
        cx: &SampleCx<'_>,
    ) -> Result<Vec<(Arc<str>, Question)>> {
        // The published seed of a repeat is its number; other run seeds lie far from it.
        let seed = repeat as i64 + cx.seed as i64 * 1_000_003;
        let mut random = Random::new(seed);
        let base = Haystack::new(n, &mut random);
        let repeat = attr("repeat_number", repeat);
        let mut all = Vec::new();
        let fits = |list: &[usize], most: usize| -> Vec<usize> {
            list.iter().copied().filter(|&x| x <= most).collect()
        };
        match self.kind {
            Kind::Single => {
                let text: Arc<str> = base.text().into();
                let mut asked = HashSet::new();
                for &depth in cx.depths {
                    let at = depth_index(n, depth);
                    if !asked.insert(at) {
                        continue;
                    }
                    let key = &base.keys[at];
                    all.push((
                        Arc::clone(&text),
                        Question {
                            text: format!("Extract the value corresponding to the specified key in the JSON object. Key: \"{key}\"\n Corresponding value: "),
                            answers: base.values[at].clone(),
                            attrs: vec![attr("depth", depth), repeat.clone()],
                        },
                    ));
                }
            }
            Kind::Multi | Kind::Conditional => {
                let shared: Arc<str> = base.text().into();
                for count in fits(&NEEDLES, n) {
                    for placement in ["random", "clustered"] {
                        let mut chosen: Vec<usize> = if placement == "random" {
                            random.sample_indices(n, count)
                        } else {
                            let start = random.below((n - count + 1) as u64) as usize;
                            (start..start + count).collect()
                        };
                        let attrs = vec![
                            attr("num_needles", count),
                            attr("needle_placement", placement),
                            repeat.clone(),
                        ];
                        if self.kind == Kind::Multi {
                            let pick = |of: &dyn Fn(usize) -> String| {
                                chosen.iter().map(|&at| of(at)).collect::<Vec<_>>()
                            };
                            let keys = pick(&|at| base.keys[at].clone());
                            let answers = pick(&|at| base.values[at][0].clone());
                            let text = format!(
                                "Extract the values corresponding to the specified keys in the JSON object. Keys: {}\n Corresponding values (as a list): ",
                                python_list(&keys)
                            );
                            all.push((
                                Arc::clone(&shared),
                                Question {
                                    text,
                                    answers,
                                    attrs,
                                },
                            ));
                        } else {
                            // One random character of each needle's key, dashes excepted, becomes a star.
                            chosen.sort();
                            let mut haystack = base.clone();
                            for &at in &chosen {
                                let key = &mut haystack.keys[at];
                                let letters: Vec<usize> = (0..key.len())
                                    .filter(|&i| !key[i..].starts_with('-'))
                                    .collect();
                                let star = letters[random.below(letters.len() as u64) as usize];
                                key.replace_range(star..=star, "*");
                            }
                            let answers = chosen
                                .iter()
                                .map(|&at| base.values[at][0].clone())
                                .collect();
                            let text = "Extract the values corresponding to all keys that contain the character \"*\" in the JSON object.\n Corresponding values (as a list): ".to_string();
                            all.push((
                                haystack.text().into(),
                                Question {
                                    text,
                                    answers,
                                    attrs,
                                },
                            ));
                        }
                    }
                }
            }
            Kind::Thread => {
                for length in fits(&THREADS, n) {
                    for direction in Direction::ALL {
                        let mut haystack = base.clone();
                        let chain =
                            positions(&mut (0..n).collect(), length, direction, &mut random);
                        let (key, answer) = haystack.chain(&chain);
                        let text = format!(
                            "The value of one key can be the key of another pair. Start at the key below and follow the thread to its final value. Key: \"{key}\"\n Final value: "
                        );
                        let attrs = vec![
                            attr("thread_length", length),
                            attr("thread_direction", direction.name()),
                            repeat.clone(),
                        ];
                        all.push((
                            haystack.text().into(),
                            Question {
                                text,
                                answers: vec![answer],
                                attrs,
                            },
                        ));
                    }
                }
            }
            Kind::MultiThread => {
                for count in fits(&THREADS, n / PER_THREAD) {
                    for direction in Direction::ALL {
                        let mut haystack = base.clone();
                        let mut free: Vec<usize> = (0..n).collect();
                        let (mut keys, mut answers) = (Vec::new(), Vec::new());
                        for _ in 0..count {
                            let chain = positions(&mut free, PER_THREAD, direction, &mut random);
                            let (key, answer) = haystack.chain(&chain);
                            keys.push(key);
                            answers.push(answer);
                        }
                        let text = format!(
                            "Follow the thread that starts at each of these keys to its final value. Keys: {}\n Final values (as a list): ",
                            python_list(&keys)
                        );
                        let attrs = vec![
                            attr("num_threads", count),
                            attr("thread_length", PER_THREAD),
                            attr("thread_direction", direction.name()),
                            repeat.clone(),
                        ];
                        all.push((
                            haystack.text().into(),
                            Question {
                                text,
                                answers,
                                attrs,
                            },
                        ));
                    }
                }
            }
            Kind::Branched => {
                for length in BRANCHED_LENGTHS {
                    for branches in BRANCHES {
                        // Each step but the last has branches - 1 dead ends; after the last, a dead end
                        // would be as long as the thread.
                        let needed = length + (length - 2) * (branches - 1);
                        if needed > n {
                            continue;
                        }
                        let mut haystack = base.clone();
                        let mut free: Vec<usize> = (0..n).collect();
                        let chain = positions(&mut free, length, Direction::Random, &mut random);
                        for (at, step) in chain.windows(2).enumerate() {
                            let mut next = vec![step[1]];
                            if at + 2 < length {
                                next.extend(positions(
                                    &mut free,
                                    branches - 1,
                                    Direction::Random,
                                    &mut random,
                                ));
                                random.shuffle(&mut next);
                            }
                            haystack.values[step[0]] =
                                next.iter().map(|&at| base.keys[at].clone()).collect();
                        }
                        let (key, last) = (&base.keys[chain[0]], chain[length - 1]);
                        let text = format!(
                            "The value of one key can be a list of keys of other pairs; only one of them leads on. Start at the key below and follow the longest thread to its final value. Key: \"{key}\"\n Final value: "
                        );
                        let attrs = vec![
                            attr("thread_length", length),
                            attr("branches", branches),
                            repeat.clone(),
                        ];
                        all.push((
                            haystack.text().into(),
                            Question {
                                text,
                                answers: base.values[last].clone(),
                                attrs,
                            },
                        ));
                    }
                }
            }
        }
        if all.is_empty() {
            return Err(EvalError::Input(format!(
                "{}: {} characters are {n} pairs, too few for the smallest question; take a longer text",
                self.meta.id, cx.length
            )));
        }
        Ok(all)
    }
}

impl Task for Threading {
    fn meta(&self) -> &TaskMeta {
        &self.meta
    }

    fn samples(&self, cx: &SampleCx<'_>) -> Result<Vec<Sample>> {
        if cx.fixtures
            && let Some(text) = self.kind.fixture()
        {
            return self.published(text, Path::new(self.files[0]), cx);
        }
        if let Some(folder) = cx.data {
            let found = self
                .files
                .iter()
                .map(|name| folder.join(format!("{name}.json")))
                .find(|path| path.is_file());
            let Some(path) = found else {
                return Err(EvalError::Input(format!(
                    "{}: found none of {:?} (.json)",
                    folder.display(),
                    self.files
                )));
            };
            let text = std::fs::read_to_string(&path).map_err(EvalError::io(&path))?;
            return self.published(&text, &path, cx);
        }
        let n = cx.length / PAIR_CHARS;
        let mut all = Vec::new();
        for repeat in 0..cx.samples {
            for (haystack, question) in self.questions(n, repeat, cx)? {
                all.push(self.sample(haystack, question));
            }
        }
        Ok(all)
    }

    fn score(&self, row: &Prediction) -> Scored {
        if self.kind.lists() {
            let score = list_score(&row.text, &row.references);
            let extracted = score.found.then(|| row.text.trim().to_string());
            let mut scored = Scored::new(row, score.recall, extracted);
            scored.more.insert("precision".into(), score.precision);
            scored
                .more
                .insert("exact order".into(), f64::from(u8::from(score.exact)));
            scored
        } else {
            let reply = single(&row.text);
            let answer = row.references.first();
            let right = answer.is_some_and(|answer| *answer == reply);
            // Small models answer in a sentence, which the published score calls wrong.
            let last = answer.is_some_and(|answer| ends_on(&row.text, answer));
            let extracted = (!reply.is_empty()).then_some(reply);
            let mut scored = Scored::new(row, f64::from(u8::from(right)), extracted);
            scored
                .more
                .insert("last value".into(), f64::from(u8::from(last)));
            scored
        }
    }
}
