//! A workflow of `agents` as a target: chain of agents, retrieval, one truncated call, ... answer the same samples, so
//! that they can be compared like models and policies.
//!
//! Baselines and chain of paper 30, arXiv 2406.02818.

use super::{Cost, Output, Target, local::stream};
use crate::bench::needle::place;
use crate::count::Counter;
use crate::error::{EvalError, Result};
use crate::python::Random;
use crate::task::{Prediction, Prompt, Sample, Segment, Task, Truncation, Work};
use longspan_agents::chat::model::{Call, ChatError, ChatModel};
use longspan_agents::workflow::baselines::{self, Baseline};
use longspan_agents::workflow::chain::{Chain, ChainConfig, Paths, ReadOrder, Select};
use longspan_agents::workflow::{Silent, Took};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex};

/// How an answer is worked out.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    /// One call that sees the text with its middle left out.
    Full,
    /// One call that sees the passages that share words with the question.
    Rag,
    /// Every chunk is asked alone; the most frequent answer stands.
    Merge,
    /// Every chunk is noted alone; all notes go to one call.
    Hierarchical,
    /// Notes are handed on from chunk to chunk.
    Chain {
        /// Order of reading.
        order: ReadOrder,
        /// Several chains.
        paths: Paths,
        /// Choice among them; None = the one that scores best, for evaluation only.
        select: Option<Select>,
    },
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Method::Full => f.write_str("full"),
            Method::Rag => f.write_str("rag"),
            Method::Merge => f.write_str("merge"),
            Method::Hierarchical => f.write_str("hierarchical"),
            Method::Chain {
                order,
                paths,
                select,
            } => {
                f.write_str("chain")?;
                if *order != ReadOrder::Ltr {
                    write!(f, ";order={order}")?;
                }
                match paths {
                    Paths::One => return Ok(()),
                    Paths::Bidir => f.write_str(";paths=bidir")?,
                    Paths::SelfConsistency(n) => write!(f, ";paths=self:{n}")?,
                    Paths::Perm(n) => write!(f, ";paths=perm:{n}")?,
                }
                f.write_str(match select {
                    Some(Select::Vote) => ";select=vote",
                    Some(Select::Judge) => ";select=judge",
                    None => ";select=oracle",
                })
            }
        }
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let mut parts = text.split(';');
        let name = parts.next().unwrap_or_default();
        let (mut order, mut paths) = (ReadOrder::Ltr, Paths::One);
        let mut select = Some(Select::Vote);
        for part in parts {
            if name != "chain" {
                return Err(format!("{text:?}: {name} takes no options"));
            }
            match part.split_once('=') {
                Some(("order", value)) => order = value.parse()?,
                Some(("paths", value)) => paths = value.parse()?,
                Some(("select", "vote")) => select = Some(Select::Vote),
                Some(("select", "judge")) => select = Some(Select::Judge),
                Some(("select", "oracle")) => select = None,
                _ => {
                    return Err(format!(
                        "{part:?}: order=ORDER, paths=PATHS or select=vote|judge|oracle expected"
                    ));
                }
            }
        }
        Ok(match name {
            "full" => Method::Full,
            "rag" => Method::Rag,
            "merge" => Method::Merge,
            "hierarchical" => Method::Hierarchical,
            "chain" => Method::Chain {
                order,
                paths,
                select,
            },
            _ => {
                return Err(format!(
                    "method {text:?}: full, rag, merge, hierarchical or chain[;order=..][;paths=..][;select=..] expected"
                ));
            }
        })
    }
}

/// A line of what runs took beyond the stored costs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Detail {
    /// The sample's id.
    pub id: String,
    /// The target's policy.
    pub method: String,
    /// Calls of the model.
    pub calls: usize,
    /// Chunks read, passages shown.
    pub parts: usize,
    /// Seconds of waiting for replies.
    pub seconds: f64,
    /// Score of the best notes less the answer's, at least 0; for chains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub information_loss: Option<f64>,
}

/// Lines of [`Detail`] in a file, appended as answers come.
pub struct Details {
    path: PathBuf,
    turn: Mutex<()>,
}

impl Details {
    /// In this file, which may hold lines of an earlier run.
    pub fn new(path: &Path) -> Details {
        Details {
            path: path.into(),
            turn: Mutex::default(),
        }
    }

    fn append(&self, detail: &Detail) -> Result<()> {
        let _turn = self
            .turn
            .lock()
            .unwrap_or_else(|poison| poison.into_inner());
        let line = serde_json::to_string(detail).map_err(|e| EvalError::Input(e.to_string()))?;
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.path);
        file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()))
            .map_err(EvalError::io(&self.path))
    }

    /// All whole lines; a torn one is left out.
    ///
    /// # Errors
    /// The disk's.
    pub fn read(&self) -> Result<Vec<Detail>> {
        let text = match std::fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(EvalError::io(&self.path)(error)),
        };
        Ok(text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect())
    }
}

/// See the module's text. One for each task: the choice among chains may need its score.
pub struct Workflow {
    model: Arc<dyn ChatModel>,
    counter: ChatCounter,
    method: Method,
    config: ChainConfig,
    task: Arc<dyn Task>,
    details: Arc<Details>,
    call: Call,
}

impl Workflow {
    /// `config` has window and lengths; order, paths and choice are the method's.
    pub fn new(
        model: Arc<dyn ChatModel>,
        method: Method,
        config: ChainConfig,
        task: Arc<dyn Task>,
        details: Arc<Details>,
        cancelled: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Workflow {
        Workflow {
            counter: ChatCounter(Arc::clone(&model)),
            model,
            method,
            config,
            task,
            details,
            call: Call::new(cancelled),
        }
    }

    fn score(&self, sample: &Sample, text: &str) -> f64 {
        let row = Prediction {
            id: sample.id.clone(),
            cluster: sample.cluster.clone(),
            attrs: sample.attrs.clone(),
            references: sample.references.clone(),
            text: text.into(),
            finish: "stop".into(),
            ..Prediction::default()
        };
        self.task.score(&row).value
    }
}

/// Counts as a chat model does.
pub struct ChatCounter(pub Arc<dyn ChatModel>);

impl Counter for ChatCounter {
    fn count(&self, text: &str) -> Result<usize> {
        Ok(self.0.count_text(text).map_err(wrong)?.tokens)
    }

    fn cut<'t>(&self, text: &'t str, tokens: usize) -> Result<&'t str> {
        // No token is longer than this, so a long text need not be counted whole.
        const LONGEST: usize = 64;
        let edges: Vec<usize> = text
            .char_indices()
            .map(|(at, _)| at)
            .chain([text.len()])
            .take(tokens.saturating_mul(LONGEST).saturating_add(2))
            .collect();
        let (mut low, mut high) = (0, edges.len() - 1);
        while low < high {
            let middle = (low + high).div_ceil(2);
            match self.count(&text[..edges[middle]])? <= tokens {
                true => low = middle,
                false => high = middle - 1,
            }
        }
        Ok(&text[..edges[low]])
    }

    fn name(&self) -> String {
        format!("tokens of {}", self.0.card().name)
    }
}

fn wrong(error: ChatError) -> EvalError {
    match error {
        ChatError::Cancelled { .. } => EvalError::Interrupted { done: 0, total: 0 },
        error if error.retryable() => EvalError::Unreachable(error.to_string()),
        error => EvalError::Input(error.to_string()),
    }
}

impl Target for Workflow {
    fn model(&self) -> String {
        self.model.card().name.clone()
    }

    fn policy(&self) -> String {
        format!("{} in {}", self.method, self.config.window)
    }

    fn identity(&self) -> Option<String> {
        // A reply is a tree of calls; --cache of the chat model keeps those.
        None
    }

    fn counter(&self) -> &dyn Counter {
        &self.counter
    }

    fn concurrency(&self) -> usize {
        1
    }

    fn run(&self, sample: &Sample, seed: u64) -> Result<Output> {
        let mut output = Output::default();
        let Work::Generate(decode) = &sample.work else {
            output.error = Some("a workflow writes answers, it gives no likelihoods".into());
            return Ok(output);
        };
        let parts = split(&sample.prompt);
        let mut config = ChainConfig {
            requirement: parts.head,
            answer: Some(decode.max_new),
            ..self.config.clone()
        };
        let answered = |baseline: Baseline, config: &ChainConfig| {
            let (text, question) = (&parts.document, &parts.question);
            baselines::run(
                baseline,
                &*self.model,
                config,
                text,
                question,
                &self.call,
                &mut Silent,
            )
            .map(|found| {
                (
                    found.answer,
                    found.took,
                    found.parts.len(),
                    found.truncated,
                    None,
                )
            })
        };
        type Found = (String, Took, usize, bool, Option<f64>);
        let found: std::result::Result<Found, ChatError> = match &self.method {
            Method::Full => answered(Baseline::FullContext, &config),
            Method::Rag => answered(Baseline::Rag, &config),
            Method::Merge => answered(Baseline::Merge, &config),
            Method::Hierarchical => answered(Baseline::Hierarchical, &config),
            Method::Chain {
                order,
                paths,
                select,
            } => {
                config.order = match order {
                    ReadOrder::Perm(own) => ReadOrder::Perm(own ^ stream(seed, &sample.id)),
                    order => *order,
                };
                config.paths = *paths;
                config.select = select.unwrap_or_default();
                let chain = Chain::new(&*self.model, config);
                chain
                    .run(&parts.document, &parts.question, &self.call, &mut Silent)
                    .map(|mut found| {
                        let score = |text: &str| self.score(sample, text);
                        if select.is_none() {
                            found.chosen = found.oracle(&score);
                            found.answer = found.paths[found.chosen].answer.clone();
                        }
                        let loss = found.information_loss(&score);
                        (found.answer, found.took, found.chunks, false, Some(loss))
                    })
            }
        };
        let (text, took, parts, truncated, information_loss) = match found {
            Ok(found) => found,
            // What no other sample would meet is this one's.
            Err(error @ (ChatError::ContextOverflow { .. } | ChatError::BadRequest(_))) => {
                output.error = Some(error.to_string());
                return Ok(output);
            }
            Err(error) => return Err(wrong(error)),
        };
        self.details.append(&Detail {
            id: sample.id.clone(),
            method: self.policy(),
            calls: took.calls,
            parts,
            seconds: took.seconds,
            information_loss,
        })?;
        Ok(Output {
            text,
            finish: "stop".into(),
            tokens_in: took.usage.prompt,
            tokens_out: took.usage.completion,
            truncated,
            cost: Cost {
                decode_s: took.seconds,
                cached_tokens: took.usage.cached,
                ..Cost::default()
            },
            ..Output::default()
        })
    }
}

/// A prompt's parts as workflows need them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// What the task demands, before the document.
    pub head: String,
    /// The long part.
    pub document: String,
    /// What is asked.
    pub question: String,
}

/// Most words of a head or a question.
const SHORT: usize = 120;

/// Finds document and question in a prompt. Where the task has not marked a shared document, a short first paragraph or
/// line is the head, and what begins with the last line that says "Question", or else the last paragraphs of a few
/// words, is the question.
pub fn split(prompt: &Prompt) -> Parts {
    let segments: Vec<&Segment> = prompt
        .segments
        .iter()
        // The given start of an answer has no place in a conversation of several calls.
        .filter(|segment| !matches!(segment, Segment::AnswerPrefix(_)))
        .collect();
    let shared = |segment: &&&Segment| matches!(segment, Segment::Shared(_));
    let text = |segments: &[&Segment]| -> String { segments.iter().map(|s| s.text()).collect() };
    if let Some(first) = segments.iter().position(|segment| shared(&segment)) {
        let last = segments.iter().rposition(|segment| shared(&segment));
        let last = last.unwrap_or(first);
        return Parts {
            head: text(&segments[..first]).trim().into(),
            document: text(&segments[first..=last]),
            question: text(&segments[last + 1..]).trim().into(),
        };
    }
    let whole = text(&segments);
    let words = |text: &str| text.split_whitespace().count();
    let asks = |line: &str| line.trim_start().to_lowercase().starts_with("question");
    let mut at = 0;
    let starts: Vec<(usize, &str)> = whole
        .split_inclusive('\n')
        .map(|line| {
            at += line.len();
            (at - line.len(), line)
        })
        .collect();
    let marked = starts.iter().rev().find(|(_, line)| asks(line));
    let end = marked
        .map(|&(at, _)| at)
        .filter(|&at| words(&whole[at..]) <= SHORT)
        .unwrap_or_else(|| {
            let mut end = whole.len();
            let breaks = whole.match_indices("\n\n").map(|(at, _)| at + 2);
            for at in breaks.collect::<Vec<_>>().into_iter().rev() {
                if words(&whole[at..]) > SHORT {
                    break;
                }
                end = at;
                if words(&whole[at..]) >= 5 {
                    break;
                }
            }
            end
        });
    let (rest, question) = whole.split_at(end);
    let head = rest.find('\n').map_or(0, |at| at + 1);
    let head = if words(&rest[..head]) <= SHORT {
        head
    } else {
        0
    };
    Parts {
        head: rest[..head].trim().into(),
        document: rest[head..].trim().into(),
        question: question.trim().into(),
    }
}

/// The sample with its document in the midst of `prose`, at a place that `seed` decides, so that it has about `tokens`
/// tokens; one that has them already keeps its document. Head, document and question become segments of their own.
///
/// # Errors
/// What counting says.
pub fn stretched(
    sample: &Sample,
    prose: &str,
    tokens: usize,
    counter: &dyn Counter,
    seed: u64,
) -> Result<Sample> {
    let parts = split(&sample.prompt);
    let own = counter.count(&parts.document)?;
    let mut attrs = sample.attrs.clone();
    let mut document = parts.document.clone();
    if own < tokens && !prose.trim().is_empty() {
        let mut random = Random::from_text(&format!("stretched {seed} {}", sample.id));
        let start = place(prose, random.random() * 100.0);
        let mut filler = prose[start..].trim_start().to_string();
        // From the end on to the beginning, as often as it takes.
        while counter.count(&filler)? < tokens - own {
            filler.push('\n');
            filler.push_str(prose.trim());
        }
        let filler = counter.cut(&filler, tokens - own)?;
        let depth = random.random() * 100.0;
        let (before, after) = filler.split_at(place(filler, depth));
        document = format!("{before}\n\n{}\n\n{}", parts.document, after.trim_start());
        attrs.insert("depth".into(), (depth.round() as u64 / 10 * 10).into());
    }
    let prompt = Prompt {
        segments: vec![
            Segment::Unique(parts.head),
            Segment::Shared(document.into()),
            Segment::Unique(parts.question),
        ],
        truncation: Truncation::Forbid,
        raw: false,
    };
    let cluster = sample.cluster.clone();
    let mut stretched = Sample::new(
        prompt,
        sample.work.clone(),
        sample.references.clone(),
        attrs,
        sample.oracle.clone(),
    );
    stretched.cluster = cluster;
    Ok(stretched)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::count::Words;
    use crate::registry::Registry;
    use crate::task::SampleCx;
    use longspan_agents::chat::scripted::Scripted;

    fn samples(task: &str, length: usize) -> Vec<Sample> {
        let task = Registry::default().task(task).unwrap();
        task.samples(&SampleCx {
            length,
            longest: length,
            samples: 2,
            depths: &[20.0, 80.0],
            seed: 3,
            counter: &Words,
            data: None,
            fixtures: true,
        })
        .unwrap()
    }

    #[test]
    fn prompts_of_benchmarks_are_split() {
        let parts = split(&samples("longbench/hotpotqa", 7500)[0].prompt);
        assert!(parts.head.starts_with("Answer the question"), "{parts:?}");
        assert!(parts.document.contains("Passage 1:"), "{parts:?}");
        assert!(
            parts.question.starts_with("Question: Where did"),
            "{parts:?}"
        );
        assert!(!parts.document.contains("Question: Where did"), "{parts:?}");
        let parts = split(&samples("m4le/newsqa", 1000)[0].prompt);
        assert!(parts.head.starts_with("Answer the question"), "{parts:?}");
        assert!(parts.document.starts_with("Paragraph 1F5955"), "{parts:?}");
        assert!(parts.question.starts_with("Question about"), "{parts:?}");
        let parts = split(&samples("needle", 600)[0].prompt);
        assert!(
            parts.question.starts_with("What is the best thing"),
            "{parts:?}"
        );
        let parts = split(&samples("longbench/gov_report", 7500)[0].prompt);
        assert!(parts.question.contains("summary"), "{parts:?}");
        assert!(parts.document.split_whitespace().count() > 100);
    }

    #[test]
    fn short_documents_become_long_and_keep_what_they_say() {
        let prose =
            "The harbour was quiet. Nobody spoke. Boats came and went in the evening. ".repeat(9);
        for sample in samples("longbench/hotpotqa", 7500) {
            let own = split(&sample.prompt);
            let long = stretched(&sample, &prose, 3000, &Words, 1).unwrap();
            let parts = split(&long.prompt);
            assert_eq!((&parts.head, &parts.question), (&own.head, &own.question));
            assert!(parts.document.contains(&own.document));
            let tokens = Words.count(&parts.document).unwrap();
            assert!((2900..=3000).contains(&tokens), "{tokens}");
            assert_eq!(long.references, sample.references);
            assert_ne!(long.id, sample.id);
            // Long enough already: nothing is put around it.
            let same = stretched(&sample, &prose, 10, &Words, 1).unwrap();
            assert_eq!(split(&same.prompt), own);
        }
    }

    #[test]
    fn methods_are_written_as_they_are_read() {
        for text in [
            "full",
            "rag",
            "merge",
            "hierarchical",
            "chain",
            "chain;order=rtl",
            "chain;paths=perm:5;select=oracle",
            "chain;paths=bidir;select=judge",
        ] {
            assert_eq!(text.parse::<Method>().unwrap().to_string(), text);
        }
        for text in ["", "magic", "rag;order=rtl", "chain;order=up", "chain;x"] {
            assert!(text.parse::<Method>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_oracle_takes_the_chain_that_scores_best() {
        let task = Registry::default().task("needle").unwrap();
        let sample = samples("needle", 400).remove(0);
        let answer = sample.references[0].clone();
        // Forwards the notes lose it, backwards they do not.
        let model = Scripted::new(move |request| {
            let text = request.input.plain();
            let notes = text.contains("was summarised");
            Ok(match (notes, text.contains("last:")) {
                (true, true) => answer.clone(),
                (true, false) => "no idea at all".into(),
                (false, _) if text.contains(&answer) && text.contains("first:") => {
                    format!("last: {answer}")
                }
                (false, _) => "first: nothing of note".into(),
            })
        });
        let folder = tempfile::tempdir().unwrap();
        let details = Arc::new(Details::new(&folder.path().join("details.jsonl")));
        let model: Arc<dyn ChatModel> = Arc::new(model);
        let run = |method: &str| {
            let config = ChainConfig {
                window: 300,
                max_output: 20,
                ..ChainConfig::default()
            };
            let target = Workflow::new(
                Arc::clone(&model),
                method.parse().unwrap(),
                config,
                Arc::clone(&task),
                Arc::clone(&details),
                || false,
            );
            target.run(&sample, 0).unwrap().text
        };
        assert_eq!(run("chain"), "no idea at all");
        assert_eq!(run("chain;paths=bidir;select=oracle"), sample.references[0]);
        let lines = details.read().unwrap();
        assert_eq!(lines.len(), 2);
        assert!(lines[0].calls > 2 && lines[1].calls == 2 * lines[0].calls);
        assert!(lines.iter().all(|line| line.information_loss.is_some()));
    }
}
