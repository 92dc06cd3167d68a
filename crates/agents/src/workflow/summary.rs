//! Summaries of books and meetings of any length: block by block with the block before as background, then the
//! summaries of sections are merged, level by level, until one is left.
//!
//! Self-Controlled Memory, arXiv 2304.13343, sections on book and meeting summaries.

use super::chunk::{Unit, chunks, pack};
use super::{Observer, Took, aloud, quiet};
use crate::chat::model::{Call, ChatError, ChatModel, Request, Result};
use serde::{Deserialize, Serialize};

/// What is summarised.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A book or any other text.
    #[default]
    Book,
    /// A meeting: utterances, each with its speaker.
    Meeting(Vec<Utterance>),
}

/// One utterance of a meeting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Utterance {
    /// Who speaks.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// Hyper-parameters, with the reference's values as defaults; [`SummaryConfig::scaled`] fits them to a model's window.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SummaryConfig {
    /// Most tokens of a block of a book.
    pub block: usize,
    /// Most tokens of a block of a meeting.
    pub meeting_block: usize,
    /// The block before is shown as text below so many tokens, else as its summary.
    pub flash: usize,
    /// Most tokens of a group of summaries that are merged at once.
    pub group: usize,
    /// The window that the character limits of merges are reckoned from.
    pub window: usize,
    /// Most tokens of a reply.
    pub max_tokens: usize,
    /// Each block on its own, without the one before.
    pub no_scm: bool,
}

impl Default for SummaryConfig {
    fn default() -> Self {
        SummaryConfig {
            block: 3000,
            meeting_block: 2800,
            flash: 500,
            group: 2300,
            window: 4000,
            max_tokens: 700,
            no_scm: false,
        }
    }
}

/// Most levels of merging.
const LEVELS: usize = 12;

impl SummaryConfig {
    /// The same shares of another window than 4000 tokens, where the model's is smaller.
    pub fn scaled(window: Option<usize>) -> SummaryConfig {
        let own = SummaryConfig::default();
        let Some(window) = window.filter(|&window| window < own.window + own.max_tokens) else {
            return own;
        };
        let part = |tokens: usize| (tokens * window / (own.window + own.max_tokens)).max(1);
        SummaryConfig {
            block: part(own.block),
            meeting_block: part(own.meeting_block),
            flash: part(own.flash),
            group: part(own.group),
            window: part(own.window),
            max_tokens: part(own.max_tokens),
            no_scm: false,
        }
    }

    /// Most characters of a merged summary, never less than 100.
    pub fn limit(&self, group_tokens: usize, groups: usize) -> usize {
        (self.raw_limit(group_tokens, groups)).max(100) as usize
    }

    /// The reference's limit, which can be negative for one huge summary.
    pub fn raw_limit(&self, group_tokens: usize, groups: usize) -> i64 {
        let limit = if groups == 1 { 1500 } else { 1000 };
        let room = self.window as i64 - group_tokens.max(self.group) as i64 - 400;
        room.min(limit)
    }
}

/// A block or a merge and its summary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// 0 for blocks of the text, then the level of merging.
    pub level: usize,
    /// For blocks: first byte and one past the last of the text; for merges: none.
    pub text: Option<(usize, usize)>,
    /// For merges: numbers of the nodes merged.
    pub members: Vec<usize>,
    /// The summary.
    pub summary: String,
}

/// The summary and all below it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SummaryOutcome {
    /// Of the whole.
    pub summary: String,
    /// Blocks in order, then merges; the last one is the summary.
    pub nodes: Vec<Node>,
    /// The topic of a meeting.
    pub theme: Option<String>,
    /// What it took.
    pub took: Took,
}

/// Groups of neighbours that have at most `most` tokens together; one beyond it stands alone.
pub fn groups(tokens: &[usize], most: usize) -> Vec<std::ops::Range<usize>> {
    pack(tokens, most)
}

/// The text that a meeting's theme is asked from: the first utterance; if that is short, what follows up to 1800
/// characters; cut at 1200.
pub fn theme_text(utterances: &[Utterance]) -> String {
    let mut text = utterances
        .first()
        .map_or(String::new(), |first| first.content.clone());
    let length = |text: &str| text.chars().count();
    if length(&text) < 100 {
        for utterance in utterances.iter().skip(1) {
            if length(&text) >= 1800 {
                break;
            }
            text.push_str(&utterance.content);
        }
    }
    text.chars().take(1200).collect()
}

/// A meeting as text.
pub fn meeting_text(utterances: &[Utterance]) -> String {
    let lines = utterances
        .iter()
        .map(|u| format!("[{}]: {}", u.role, u.content));
    lines.collect::<Vec<_>>().join("\n\n")
}

fn block_prompt(block: &str, before: Option<&str>, theme: Option<&str>) -> String {
    let mut prompt = String::new();
    if let Some(theme) = theme {
        prompt.push_str(&format!("The topic of the meeting is: {theme}\n\n"));
    }
    let what = if theme.is_some() {
        "part of the meeting"
    } else {
        "section"
    };
    if let Some(before) = before {
        prompt.push_str(&format!(
            "Before this {what}, as background only:\n{before}\n\n###\n\nThe {what} to be summarised:\n{block}\n\nSummarise this {what} in at most 500 words. Use the background to understand it, and repeat nothing of the background. Begin with \"This section describes\"."
        ));
    } else {
        prompt.push_str(&format!(
            "The {what} to be summarised:\n{block}\n\nSummarise this {what} in at most 500 words."
        ));
    }
    prompt
}

fn merge_prompt(members: &[&str], limit: usize, theme: Option<&str>) -> String {
    let mut prompt = String::new();
    if let Some(theme) = theme {
        prompt.push_str(&format!("The topic of the meeting is: {theme}\n\n"));
    }
    for (index, member) in members.iter().enumerate() {
        prompt.push_str(&format!("Section {}: {}\n\n", index + 1, member.trim()));
    }
    prompt.push_str(&format!(
        "Write one final summary from these summaries of sections. Keep the most important 30 % of what they say, in at most {limit} characters."
    ));
    prompt
}

/// Merges summaries level by level. `merge(level, members, limit, last)` writes one; `count` counts its tokens; `members` are
/// numbers of nodes: summaries first, then merges in the order of their calls. Gives the number of the last.
///
/// # Errors
/// What `merge` and `count` say.
pub fn hierarchy<E>(
    config: &SummaryConfig,
    tokens: &[usize],
    mut merge: impl FnMut(usize, &[usize], i64, bool) -> Result<usize, E>,
) -> Result<usize, E> {
    let mut level: Vec<(usize, usize)> = tokens.iter().copied().enumerate().collect();
    let mut next = tokens.len();
    let mut halvings = 0;
    for depth in 1..=LEVELS {
        let counts: Vec<usize> = level.iter().map(|&(_, tokens)| tokens).collect();
        let before: usize = counts.iter().sum();
        // A model that does not shorten would go on for ever: then pairs are forced, with half the room.
        let mut parts = groups(&counts, config.group);
        if (halvings > 0 && parts.len() == level.len()) || depth == LEVELS {
            let size = if depth == LEVELS { level.len() } else { 2 };
            parts = (0..level.len())
                .step_by(size)
                .map(|at| at..(at + size).min(level.len()))
                .collect();
        }
        let mut merged = Vec::new();
        for part in &parts {
            let members: Vec<usize> = level[part.clone()].iter().map(|&(node, _)| node).collect();
            let sum = counts[part.clone()].iter().sum();
            let limit = config.raw_limit(sum, parts.len()) >> halvings;
            merged.push((next, merge(depth, &members, limit, parts.len() == 1)?));
            next += 1;
        }
        if parts.len() == 1 {
            break;
        }
        let after: usize = merged.iter().map(|&(_, tokens)| tokens).sum();
        if after * 10 > before * 9 {
            halvings += 1;
        }
        level = merged;
    }
    Ok(next - 1)
}

/// Summarises a text. For a meeting, `text` is [`meeting_text`].
///
/// # Errors
/// An empty text, a window that is too small, an empty reply, what the model says.
pub fn run(
    model: &dyn ChatModel,
    text: &str,
    kind: &Kind,
    config: &SummaryConfig,
    call: &Call,
    observer: &mut dyn Observer,
) -> Result<SummaryOutcome> {
    let mut took = Took::default();
    let ask = |prompt: String| Request::user(prompt).max_tokens(config.max_tokens);
    let (block, theme) = match kind {
        Kind::Book => (config.block, None),
        Kind::Meeting(utterances) => {
            observer.step("finding the topic", 0, 1);
            let prompt = format!(
                "{}\n\nThis is the beginning of a meeting. Name its topic in at most 100 characters, and write nothing else.",
                theme_text(utterances)
            );
            let theme = quiet(
                model,
                &ask(prompt),
                &call.step("summary", "theme"),
                &mut took,
            )?;
            let theme: String = theme
                .trim()
                .trim_end_matches(['.', '。'])
                .chars()
                .take(100)
                .collect();
            (config.meeting_block, Some(theme))
        }
    };
    let theme_ref = theme.as_deref();
    let blocks = chunks(model, text, Unit::Sentence, block)?;
    if blocks.is_empty() {
        return Err(ChatError::BadRequest("summary: the text is empty".into()));
    }
    let count = |text: &str| Ok::<_, ChatError>(model.count_text(text)?.planned());
    let only = blocks.len() == 1;
    let mut nodes: Vec<Node> = Vec::new();
    let mut tokens = Vec::new();
    let base = text.as_ptr() as usize;
    for (index, block) in blocks.iter().enumerate() {
        observer.step("summarising", index, blocks.len() + usize::from(!only));
        let before = match nodes.last().filter(|_| !config.no_scm) {
            None => None,
            Some(_) if count(blocks[index - 1])? < config.flash => {
                Some(blocks[index - 1].to_string())
            }
            Some(last) => Some(last.summary.clone()),
        };
        let request = ask(block_prompt(block, before.as_deref(), theme_ref));
        let step = call.step("summary", format!("block {}", index + 1));
        let summary = match only {
            true => aloud(model, &request, &step, &mut took, observer)?,
            false => quiet(model, &request, &step, &mut took)?,
        };
        let summary = summary.trim().to_string();
        if summary.is_empty() {
            return Err(ChatError::Protocol(format!(
                "summary: the model wrote nothing about block {} of {}",
                index + 1,
                blocks.len()
            )));
        }
        tokens.push(count(&summary)?);
        let start = block.as_ptr() as usize - base;
        nodes.push(Node {
            level: 0,
            text: Some((start, start + block.len())),
            members: Vec::new(),
            summary,
        });
    }
    if !only {
        let blocks = nodes.len();
        let mut calls = 0;
        hierarchy(config, &tokens, |level, members, limit, last| {
            calls += 1;
            observer.step(
                "merging",
                blocks + calls - 1,
                blocks + calls + usize::from(!last),
            );
            let texts: Vec<&str> = members
                .iter()
                .map(|&node| nodes[node].summary.as_str())
                .collect();
            let limit = limit.max(100) as usize;
            let request = ask(merge_prompt(&texts, limit, theme_ref));
            let step = call.step("summary", format!("level {level} merge {calls}"));
            let summary = match last {
                true => aloud(model, &request, &step, &mut took, observer)?,
                false => quiet(model, &request, &step, &mut took)?,
            };
            let summary = summary.trim().to_string();
            if summary.is_empty() {
                return Err(ChatError::Protocol(format!(
                    "summary: the model wrote nothing at level {level}"
                )));
            }
            let tokens = count(&summary)?;
            nodes.push(Node {
                level,
                text: None,
                members: members.to_vec(),
                summary,
            });
            Ok(tokens)
        })?;
    }
    Ok(SummaryOutcome {
        summary: nodes
            .last()
            .map_or(String::new(), |node| node.summary.clone()),
        nodes,
        theme,
        took,
    })
}
