//! A task described by one TOML file: your own rows, prompt and metric, without a line of code. For a question that no
//! published benchmark asks, with everything a benchmark has here: stored replies, resuming, reports, comparisons.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use regex::Regex;
use serde::Deserialize;
use serde_json::Value;

use super::dataset::{Row, Source};
use crate::error::{EvalError, Result};
use crate::metric::classification::classification;
use crate::metric::edit_similarity::fuzz_ratio;
use crate::metric::qa_f1::{qa_f1, qa_f1_zh};
use crate::metric::rouge::{RougeCompat, rouge_l, rouge_l_zh};
use crate::metric::{exact_match, letters, string_match};
use crate::python::format_fields;
use crate::task::*;

/// How a reply is compared with an answer; of several answers the best counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// 1 if equal, case and outer spaces ignored.
    Exact,
    /// 1 if the answer occurs in the reply, case ignored.
    Contains,
    /// The share of all answers that occur in the reply, case ignored.
    ContainsAll,
    /// SQuAD's F1 of words.
    QaF1,
    /// The same over Chinese words.
    QaF1Zh,
    /// F of ROUGE-L.
    RougeL,
    /// The same over Chinese words.
    RougeLZh,
    /// Similarity of strings by edits, 0 to 1.
    EditSimilarity,
    /// 1 / (class names in the reply) if the right one is among them; needs `classes`.
    Classification,
    /// 1 if the letter found in the reply, A to D, is the answer's.
    Letter,
}

impl Metric {
    fn name(self) -> &'static str {
        match self {
            Metric::Exact => "exact match",
            Metric::Contains => "contains",
            Metric::ContainsAll => "string match",
            Metric::QaF1 | Metric::QaF1Zh => "qa_f1",
            Metric::RougeL | Metric::RougeLZh => "rouge_l",
            Metric::EditSimilarity => "edit similarity",
            Metric::Classification => "classification",
            Metric::Letter => "accuracy",
        }
    }

    fn score(self, reply: &str, answers: &[String], classes: &[String]) -> f64 {
        let best =
            |score: &dyn Fn(&str) -> f64| answers.iter().map(|a| score(a)).fold(0.0, f64::max);
        let compat = RougeCompat::Unlimited;
        match self {
            Metric::Exact => exact_match::any_equal(reply, answers),
            Metric::Contains => string_match::part(reply, answers),
            Metric::ContainsAll => string_match::all(reply, answers),
            Metric::QaF1 => best(&|answer| qa_f1(reply, answer)),
            Metric::QaF1Zh => best(&|answer| qa_f1_zh(reply, answer)),
            Metric::RougeL => best(&|answer| rouge_l(reply, answer, compat).f),
            Metric::RougeLZh => best(&|answer| rouge_l_zh(reply, answer, compat).f),
            Metric::EditSimilarity => best(&|answer| f64::from(fuzz_ratio(reply, answer)) / 100.0),
            Metric::Classification => best(&|answer| classification(reply, answer, classes)),
            Metric::Letter => {
                let found = letters::predicted(reply, false);
                best(&|answer| f64::from(u8::from(found == letters::gold(answer))))
            }
        }
    }
}

/// The file. Texts name a row's fields as `{field}`; `{{` and `}}` stand for braces.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The task's name, as `contracts` or `contracts/dates`.
    pub id: String,
    /// Grows when rows, prompt or metric change.
    #[serde(default = "one")]
    pub version: u32,
    /// What is tested, in a few words.
    #[serde(default = "own")]
    pub ability: String,
    /// Rows: a file (JSON lines, JSON, parquet), beside this one unless the path is absolute. `--data` replaces it.
    pub data: PathBuf,
    /// What rows may share: read once, before the question.
    #[serde(default)]
    pub document: String,
    /// What is asked of one row.
    pub question: String,
    /// The start of the answer, written for the model.
    #[serde(default)]
    pub answer_prefix: String,
    /// The field with the right answer: a text, a number, or a list of them.
    #[serde(default = "answers")]
    pub answers: String,
    /// How a reply is scored.
    pub metric: Metric,
    /// Class names, for `classification`.
    #[serde(default)]
    pub classes: Vec<String>,
    /// Only the first line of a reply counts, after leading newlines.
    #[serde(default)]
    pub first_line: bool,
    /// A regular expression: its first group in its last match is what counts of a reply.
    pub extract: Option<String>,
    /// Most tokens of a reply.
    #[serde(default = "sixty_four")]
    pub max_new: usize,
    /// Texts that end it.
    #[serde(default)]
    pub stop: Vec<String>,
    /// The prompt is continued as it stands, without a chat template.
    #[serde(default)]
    pub raw: bool,
    /// Budgets of prompt tokens; what is longer loses its middle, and is counted as truncated.
    #[serde(default = "budget")]
    pub lengths: Vec<usize>,
    /// Fields that tables are broken down by.
    #[serde(default)]
    pub attrs: Vec<String>,
    /// The score of saying always the same, at most.
    #[serde(default)]
    pub floor: f64,
    /// Where the data comes from, and its licence, for the report.
    #[serde(default)]
    pub source: String,
    /// See `source`.
    #[serde(default)]
    pub licence: String,
}

fn one() -> u32 {
    1
}

fn own() -> String {
    "described by a file".into()
}

fn answers() -> String {
    "answers".into()
}

fn sixty_four() -> usize {
    64
}

fn budget() -> Vec<usize> {
    vec![7500]
}

/// See the module's text.
pub struct FileTask {
    meta: TaskMeta,
    config: Config,
    /// Where `data` is looked for.
    folder: PathBuf,
    extract: Option<Regex>,
    text: String,
}

impl FileTask {
    /// Reads a file.
    ///
    /// # Errors
    /// A file that cannot be read, or one of [`FileTask::from_text`].
    pub fn open(path: &Path) -> Result<FileTask> {
        let text = std::fs::read_to_string(path).map_err(EvalError::io(path))?;
        FileTask::from_text(&text, path)
    }

    /// From the file's text; `path` is where it stands, for messages and for its data.
    ///
    /// # Errors
    /// Options that are unknown, missing or contradict each other.
    pub fn from_text(text: &str, path: &Path) -> Result<FileTask> {
        let wrong = |reason: String| EvalError::Input(format!("{}: {reason}", path.display()));
        let config: Config = toml::from_str(text).map_err(|e| wrong(e.to_string()))?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
        if config.id.is_empty() || !config.id.chars().all(plain) {
            return Err(wrong(format!(
                "id is {:?}, expected letters, digits, `-`, `_`, `.` and `/`",
                config.id
            )));
        }
        if config.lengths.is_empty() || config.lengths.contains(&0) {
            return Err(wrong("lengths: expected at least one, all above 0".into()));
        }
        if (config.metric == Metric::Classification) == config.classes.is_empty() {
            return Err(wrong(
                "`classes` and metric = \"classification\" go together".into(),
            ));
        }
        let extract = match &config.extract {
            Some(pattern) => {
                let regex = Regex::new(pattern).map_err(|e| wrong(format!("extract: {e}")))?;
                if regex.captures_len() < 2 {
                    return Err(wrong(format!("extract is {pattern:?}, expected a group")));
                }
                Some(regex)
            }
            None => None,
        };
        // The registry lives as long as the program, and so do the few texts of its tasks.
        let keep = |text: &str| -> &'static str { text.to_string().leak() };
        Ok(FileTask {
            meta: TaskMeta {
                id: config.id.clone(),
                version: config.version,
                ability: keep(&config.ability),
                metric: config.metric.name(),
                higher_is_better: true,
                best: 1.0,
                floor: config.floor,
                unit: Unit::Tokens,
                lengths: config.lengths.clone().leak(),
                depths: false,
                source: keep(&config.source),
                licence: keep(&config.licence),
            },
            extract,
            folder: path.parent().unwrap_or(Path::new("")).to_path_buf(),
            text: text.into(),
            config,
        })
    }

    /// The file's text.
    pub fn text(&self) -> &str {
        &self.text
    }

    fn sample(&self, row: &Row, length: usize) -> Result<Sample> {
        let fields: BTreeMap<String, Value> = row.parse()?;
        let fill = |template: &str| -> Result<String> {
            let field = |name: &str| fields.get(name).and_then(plain).map(Cow::Owned);
            format_fields(template, field).map_err(|name| {
                row.wrong(match fields.contains_key(&name) {
                    true => format!("field `{name}` is no text and no number"),
                    false => format!("found no field `{name}`, which the prompt names"),
                })
            })
        };
        let config = &self.config;
        let answer = fields.get(&config.answers).ok_or_else(|| {
            row.wrong(format!("found no field `{}` with answers", config.answers))
        })?;
        let references: Option<Vec<String>> = match answer {
            Value::Array(list) => list.iter().map(plain).collect(),
            one => plain(one).map(|text| vec![text]),
        };
        let references = references.filter(|list| !list.is_empty()).ok_or_else(|| {
            row.wrong(format!(
                "field `{}` is {answer}, expected a text, a number, or a list of them",
                config.answers
            ))
        })?;
        let mut segments = Vec::new();
        if !config.document.is_empty() {
            segments.push(Segment::Shared(fill(&config.document)?.into()));
        }
        segments.push(Segment::Unique(fill(&config.question)?));
        if !config.answer_prefix.is_empty() {
            segments.push(Segment::AnswerPrefix(fill(&config.answer_prefix)?));
        }
        let mut attrs = BTreeMap::from([super::attr("row", row.line)]);
        for name in &config.attrs {
            let value = fields
                .get(name)
                .ok_or_else(|| row.wrong(format!("found no field `{name}`, named in `attrs`")))?;
            attrs.insert(name.clone(), value.clone());
        }
        let oracle = match config.metric {
            Metric::ContainsAll => references.join("\n"),
            _ => references[0].clone(),
        };
        let mut sample = Sample::new(
            Prompt {
                segments,
                truncation: Truncation::Middle(length),
                raw: config.raw,
            },
            Work::Generate(Decode {
                max_new: config.max_new,
                stop: config.stop.clone(),
            }),
            references,
            attrs,
            oracle,
        );
        if config.document.is_empty() {
            sample.cluster = sample.id.clone();
        }
        Ok(sample)
    }
}

/// A text or number as text.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

impl Task for FileTask {
    fn meta(&self) -> &TaskMeta {
        &self.meta
    }

    fn needs_data(&self) -> bool {
        true
    }

    fn samples(&self, cx: &SampleCx<'_>) -> Result<Vec<Sample>> {
        let own = self.folder.join(&self.config.data);
        let data = Source::Path(cx.data.unwrap_or(&own));
        let name = self.config.data.to_string_lossy().into_owned();
        let rows = data.rows(&[name])?;
        let samples: Vec<Sample> = rows
            .iter()
            .take(cx.samples)
            .map(|row| self.sample(row, cx.length))
            .collect::<Result<_>>()?;
        match samples.is_empty() {
            true => Err(EvalError::Input(format!(
                "{}: the data has no row",
                self.meta.id
            ))),
            false => Ok(samples),
        }
    }

    fn score(&self, row: &Prediction) -> Scored {
        let mut text = row.text.as_str();
        if self.config.first_line {
            text = text.trim_start_matches('\n');
            text = text.split('\n').next().unwrap_or("");
        }
        let mut found = Some(text);
        if let Some(regex) = &self.extract {
            let last = regex.captures_iter(text).last();
            found = last.and_then(|c| c.get(1)).map(|group| group.as_str());
        }
        let found = found.filter(|text| !text.trim().is_empty());
        let value = found.map_or(0.0, |text| {
            self.config
                .metric
                .score(text, &row.references, &self.config.classes)
        });
        Scored::new(row, value, found.map(str::to_string))
    }
}

/// Loads the tasks that a run's folder keeps beside its replies.
pub(crate) fn of_folder(folder: &Path) -> Result<Vec<Arc<FileTask>>> {
    let folder = folder.join("tasks");
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&folder).map_err(EvalError::io(&folder))? {
        files.push(entry.map_err(EvalError::io(&folder))?.path());
    }
    files.sort();
    files
        .iter()
        .filter(|path| path.extension().is_some_and(|e| e == "toml"))
        .map(|path| FileTask::open(path).map(Arc::new))
        .collect()
}
