//! The seam of benchmarks: a [`Task`] makes samples with prompts, and scores stored replies.

use crate::count::Counter;
use crate::error::Result;
use crate::stats::{self, Estimate};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// What a length counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// Tokens of the target's tokenizer.
    Tokens,
    /// Characters.
    Characters,
    /// Lines of the text.
    Lines,
    /// Words between whitespace (Chinese: characters).
    Words,
    /// Rounds of demonstrations.
    Rounds,
}

impl Unit {
    /// Plural, for people.
    pub fn name(self) -> &'static str {
        match self {
            Unit::Tokens => "tokens",
            Unit::Characters => "characters",
            Unit::Lines => "lines",
            Unit::Words => "words",
            Unit::Rounds => "rounds",
        }
    }
}

/// What is known of a task without running it.
#[derive(Clone, Debug, Serialize)]
pub struct TaskMeta {
    /// `bench` or `bench/task`.
    pub id: String,
    /// Grows when prompt, extraction or metric changes; results of different versions are not compared.
    pub version: u32,
    /// What is tested, in a few words.
    pub ability: &'static str,
    /// Name of the score.
    pub metric: &'static str,
    /// False for losses.
    pub higher_is_better: bool,
    /// What a target that always gives the right answer scores.
    pub best: f64,
    /// What a target that always writes the same scores; of a task that needs data, at most.
    pub floor: f64,
    /// What lengths count.
    pub unit: Unit,
    /// Lengths run when none are named.
    pub lengths: &'static [usize],
    /// True if samples come by depth of the answer in the text.
    pub depths: bool,
    /// Where task and data come from.
    pub source: &'static str,
    /// Licence of the data shipped, or of the official data.
    pub licence: &'static str,
}

/// What a task is asked for.
pub struct SampleCx<'a> {
    /// Target length, in the task's unit.
    pub length: usize,
    /// The longest length of the run: length sweeps that score the same text need it.
    pub longest: usize,
    /// Samples, or samples per depth for tasks with depths.
    pub samples: usize,
    /// Depths in percent, for tasks with depths.
    pub depths: &'a [f64],
    /// Decides every random choice.
    pub seed: u64,
    /// Counts tokens as the target does.
    pub counter: &'a dyn Counter,
    /// The user's data in its published format, in place of what ships with the program.
    pub data: Option<&'a Path>,
    /// Use the small samples that ship with the program.
    pub fixtures: bool,
}

/// A piece of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum Segment {
    /// Text that other samples share, read once: a document.
    Shared(Arc<str>),
    /// Text of this sample alone.
    Unique(String),
    /// The start of the answer, written for the model after its turn begins.
    AnswerPrefix(String),
}

impl Segment {
    /// Its text.
    pub fn text(&self) -> &str {
        match self {
            Segment::Shared(text) => text,
            Segment::Unique(text) | Segment::AnswerPrefix(text) => text,
        }
    }
}

/// What is read before the answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prompt {
    /// In reading order.
    pub segments: Vec<Segment>,
    /// What may be left out when the text is too long for the target.
    pub truncation: Truncation,
    /// The text is to be continued as it stands, without a chat template.
    pub raw: bool,
}

/// What may be left out of a prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// Nothing.
    #[default]
    Forbid,
    /// The middle, so that this many tokens stay (LongBench's rule).
    Middle(usize),
}

impl Prompt {
    /// A document and a question about it.
    pub fn ask(document: impl Into<Arc<str>>, question: impl Into<String>) -> Prompt {
        Prompt {
            segments: vec![
                Segment::Shared(document.into()),
                Segment::Unique(question.into()),
            ],
            truncation: Truncation::Forbid,
            raw: false,
        }
    }

    /// Adds the start of the answer.
    pub fn prefixed(mut self, prefix: impl Into<String>) -> Prompt {
        self.segments.push(Segment::AnswerPrefix(prefix.into()));
        self
    }

    /// All text, the answer's start included.
    pub fn text(&self) -> String {
        self.segments.iter().map(Segment::text).collect()
    }

    /// The part that other samples may share.
    pub fn shared(&self) -> String {
        let shared = self
            .segments
            .iter()
            .take_while(|segment| matches!(segment, Segment::Shared(_)));
        shared.map(Segment::text).collect()
    }
}

/// How an answer is written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decode {
    /// Most tokens.
    pub max_new: usize,
    /// Texts that end it.
    pub stop: Vec<String>,
}

/// Tokens that [`Protocol::Recent`] scores in one window.
pub const GROUP: usize = 64;

/// How a text's likelihood is taken (paper 58).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "protocol")]
pub enum Protocol {
    /// P2: windows of `window` tokens every `stride`, positions from 0 in each. `stride = window` is P1.
    Sliding {
        /// Tokens of a window.
        window: usize,
        /// Tokens between windows.
        stride: usize,
    },
    /// P3: only the last token of every window.
    Fixed {
        /// Tokens of a window.
        window: usize,
    },
    /// P6: the last `scored` tokens of the text, with the `context` tokens before each group of [`GROUP`] of them.
    Recent {
        /// Tokens before a group.
        context: usize,
        /// Tokens scored at the text's end.
        scored: usize,
    },
    /// P4, and P5 under a policy that forgets: one pass over the text under the target's policy.
    Position,
}

/// Documents that are searched, shared by the queries of a cell.
#[derive(Clone)]
pub struct Documents {
    /// In their order.
    pub list: Arc<Vec<crate::bench::loco::Document>>,
    digest: String,
}

impl Documents {
    /// Documents that are told apart by their content.
    pub fn new(list: Vec<crate::bench::loco::Document>) -> Documents {
        let mut hash = blake3::Hasher::new();
        for document in &list {
            for part in [&document.pid, &document.passage] {
                hash.update(&(part.len() as u64).to_le_bytes());
                hash.update(part.as_bytes());
            }
        }
        Documents {
            list: Arc::new(list),
            digest: hash.finalize().to_hex()[..32].to_string(),
        }
    }

    /// Hash of the content.
    pub fn digest(&self) -> &str {
        &self.digest
    }
}

// Part of a sample's id: the content's hash stands for it.
impl std::fmt::Debug for Documents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Documents({})", self.digest)
    }
}

impl PartialEq for Documents {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

/// What the target is to do with a prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    /// Write an answer.
    Generate(Decode),
    /// Take the likelihood of the text's first `tokens` tokens.
    Likelihood {
        /// How.
        protocol: Protocol,
        /// Tokens of the text that are used.
        tokens: usize,
    },
    /// Rank documents for the prompt's text; the reply is a JSON list of ids, best first.
    Search {
        /// Among which.
        documents: Documents,
    },
}

/// One question to a target.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Hash of the content, see [`Sample::new`].
    pub id: String,
    /// What is read.
    pub prompt: Prompt,
    /// What is done with it.
    pub work: Work,
    /// Right answers.
    pub references: Vec<String>,
    /// Samples of one document have one cluster; standard errors go by cluster.
    pub cluster: String,
    /// What the sample is, for tables: depth, hops, ...
    pub attrs: BTreeMap<String, Value>,
    /// A reply that gets the best score.
    pub oracle: String,
}

impl Sample {
    /// A sample whose id is the hash of prompt, work, references and attributes.
    pub fn new(
        prompt: Prompt,
        work: Work,
        references: Vec<String>,
        attrs: BTreeMap<String, Value>,
        oracle: String,
    ) -> Sample {
        let mut hash = blake3::Hasher::new();
        let mut add = |text: &str| {
            hash.update(&(text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        };
        prompt
            .segments
            .iter()
            .for_each(|segment| add(segment.text()));
        add(&format!("{:?} {work:?}", prompt.truncation));
        references.iter().for_each(|text| add(text));
        add(&serde_json::to_string(&attrs).unwrap_or_default());
        let id = hash.finalize().to_hex()[..16].to_string();
        let cluster = blake3::hash(prompt.shared().as_bytes()).to_hex()[..8].to_string();
        Sample {
            id,
            prompt,
            work,
            references,
            cluster,
            attrs,
            oracle,
        }
    }
}

/// Likelihoods of a text, token by token.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Likelihood {
    /// Negative log-probability of each token in nats; None = not scored (the first, for instance).
    pub nll: Vec<Option<f32>>,
    /// UTF-8 bytes of the scored tokens' text.
    pub bytes: usize,
    /// Whitespace-separated words of the text.
    pub words: usize,
    /// Whether a beginning-of-text token stood before the text.
    pub bos: bool,
}

/// A stored reply: all that scoring needs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// The sample's id.
    pub id: String,
    /// Its place in the cell.
    pub index: usize,
    /// Its document.
    pub cluster: String,
    /// What it is.
    pub attrs: BTreeMap<String, Value>,
    /// Right answers.
    pub references: Vec<String>,
    /// The question, and a little of what stood before it.
    pub question: String,
    /// The reply.
    pub text: String,
    /// Why it ended: stop, length.
    pub finish: String,
    /// Tokens read.
    pub tokens_in: usize,
    /// Tokens written.
    pub tokens_out: usize,
    /// Part of the prompt was left out.
    pub truncated: bool,
    /// Why there is no reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// For likelihood tasks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub likelihood: Option<Likelihood>,
}

/// A scored row.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scored {
    /// The sample's id.
    pub id: String,
    /// Its document.
    pub cluster: String,
    /// The task's metric.
    pub value: f64,
    /// What was taken from the reply; None if nothing could be.
    pub extracted: Option<String>,
    /// Further metrics.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub more: BTreeMap<String, f64>,
}

impl Scored {
    /// A row with only the metric.
    pub fn new(row: &Prediction, value: f64, extracted: Option<String>) -> Scored {
        Scored {
            id: row.id.clone(),
            cluster: row.cluster.clone(),
            value,
            extracted,
            more: BTreeMap::new(),
        }
    }
}

/// A figure over a cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Aggregate {
    /// Its name; the first of a cell is the task's metric.
    pub name: String,
    /// Value with standard error, interval and count.
    #[serde(flatten)]
    pub estimate: Estimate,
}

/// One benchmark task. See the module's text.
pub trait Task: Send + Sync {
    /// What is known of it.
    fn meta(&self) -> &TaskMeta;

    /// Whether samples come only from published data or from those that ship, not from a generator.
    fn needs_data(&self) -> bool {
        false
    }

    /// The samples of one length, in an order that depends on nothing but the context.
    ///
    /// # Errors
    /// Data that cannot be read, or a length that no sample fits.
    fn samples(&self, cx: &SampleCx<'_>) -> Result<Vec<Sample>>;

    /// The score of one reply. Rows with an error are not scored but counted.
    fn score(&self, row: &Prediction) -> Scored;

    /// Figures over a cell's rows; the first is the task's metric.
    fn aggregate(&self, _rows: &[Prediction], scored: &[Scored]) -> Vec<Aggregate> {
        mean_aggregates(self.meta().metric, scored)
    }
}

/// The mean with its clustered standard error, and the means of the further metrics.
pub fn mean_aggregates(metric: &str, scored: &[Scored]) -> Vec<Aggregate> {
    let column = |get: &dyn Fn(&Scored) -> Option<f64>| -> Estimate {
        let pairs: Vec<(&str, f64)> = scored
            .iter()
            .filter_map(|row| Some((row.cluster.as_str(), get(row)?)))
            .collect();
        stats::mean(&pairs)
    };
    let mut all = vec![Aggregate {
        name: metric.into(),
        estimate: column(&|row| Some(row.value)),
    }];
    let names: std::collections::BTreeSet<&String> =
        scored.iter().flat_map(|row| row.more.keys()).collect();
    for name in names {
        all.push(Aggregate {
            name: name.clone(),
            estimate: column(&|row| row.more.get(name).copied()),
        });
    }
    all
}
