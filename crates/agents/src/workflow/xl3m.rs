//! XL3M on the chat seam: every passage of a long text is read alone with the question, those after which the model is
//! surest of the answer's first token are kept in order, and the answer comes from them.
//!
//! XL3M, arXiv 2405.17755. [`longspan_infer::key_context`] is the same on tokens of an engine; here passages end at
//! sentences, the model's template stands around them, and endpoints with log probabilities will do.

use super::chunk::{Unit, chunks};
use super::{Observer, Took, aloud};
use crate::chat::model::{Ability, Call, ChatError, ChatModel, Request, Result};
use longspan_infer::key_context::{KeyContextConfig, choose};
use serde::{Deserialize, Serialize};

/// Hyper-parameters under the planner's names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Xl3mConfig {
    /// Most tokens of a passage (w).
    pub segment: usize,
    /// Most passages kept (k); fewer where the window has no room.
    pub keep: usize,
    /// Keep only passages with at most this entropy in nats, still `keep` at most.
    pub threshold: Option<f64>,
    /// The answer's given start: certainty is that of the token after it. Needs a model that can go on from one.
    pub answer_prefix: String,
    /// Most tokens of the answer (g).
    pub max_tokens: usize,
}

impl Default for Xl3mConfig {
    fn default() -> Self {
        let planner = KeyContextConfig::default();
        Xl3mConfig {
            segment: planner.segment,
            keep: planner.keep,
            threshold: planner.threshold,
            answer_prefix: String::new(),
            max_tokens: 256,
        }
    }
}

/// One passage and what it was worth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Passage {
    /// First byte in the text.
    pub start: usize,
    /// One past its last byte.
    pub end: usize,
    /// Entropy of the answer's first token, nats.
    pub entropy: f64,
    /// Part of the key context.
    pub kept: bool,
}

/// The answer and how it came about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Xl3mOutcome {
    /// The answer, its given start included.
    pub answer: String,
    /// All passages; empty if the text fits the window.
    pub passages: Vec<Passage>,
    /// Entropies come from the likeliest tokens only.
    pub approx: bool,
    /// What the answer took; reading passages is not a call in it.
    pub took: Took,
}

fn request(text: &str, question: &str, config: &Xl3mConfig) -> Request {
    let prompt = format!(
        "Here is a text:\n\n{}\n\nUse the text to answer this question, as briefly as you can: {question}",
        text.trim()
    );
    let mut request = Request::user(prompt).max_tokens(config.max_tokens);
    request.answer_prefix = config.answer_prefix.clone();
    request
}

/// Answers a question from a text of any length.
///
/// # Errors
/// Sizes of 0, a window without room for one passage, a model without log probabilities, what the model says.
pub fn run(
    model: &dyn ChatModel,
    text: &str,
    question: &str,
    config: &Xl3mConfig,
    call: &Call,
    observer: &mut dyn Observer,
) -> Result<Xl3mOutcome> {
    for (name, value) in [
        ("segment", config.segment),
        ("keep", config.keep),
        ("max_tokens", config.max_tokens),
    ] {
        if value == 0 {
            return Err(ChatError::BadRequest(format!(
                "xl3m: {name} is 0, expected at least 1"
            )));
        }
    }
    if question.trim().is_empty() {
        return Err(ChatError::BadRequest("xl3m: the question is empty".into()));
    }
    let mut took = Took::default();
    let whole = request(text, question, config);
    let fits = model.card().window.is_some() && model.fit(&whole).is_ok();
    let (mut passages, mut approx) = (Vec::new(), false);
    let asked = if fits {
        whole
    } else {
        model.card().need(Ability::Logprobs)?;
        let segments = chunks(model, text, Unit::Sentence, config.segment)?;
        let frame = model.count(&request("", question, config).input)?.planned()
            + model.count_text(&config.answer_prefix)?.planned();
        // Passages are parted by a blank line.
        let most = model.card().window.map_or(config.keep, |window| {
            window.saturating_sub(frame + config.max_tokens + 8) / (config.segment + 2)
        });
        if most == 0 {
            return Err(ChatError::BadRequest(format!(
                "xl3m: a window of {} tokens has no room for a passage of {} beside {frame} of the prompt and {} of the answer",
                model.card().window.unwrap_or(0),
                config.segment,
                config.max_tokens
            )));
        }
        let mut entropies = Vec::with_capacity(segments.len());
        for (index, segment) in segments.iter().enumerate() {
            observer.step("reading", index, segments.len() + 1);
            let step = call.step("xl3m", format!("passage {}", index + 1));
            let found = model.next_token(&request(segment, question, config), &step)?;
            let (entropy, rough) = found.entropy();
            if entropy.is_nan() {
                return Err(ChatError::Protocol(format!(
                    "xl3m: passage {} has no entropy",
                    index + 1
                )));
            }
            approx |= rough;
            entropies.push(entropy);
        }
        let kept = choose(&entropies, most.min(config.keep), config.threshold);
        let base = text.as_ptr() as usize;
        passages = segments
            .iter()
            .zip(&entropies)
            .enumerate()
            .map(|(index, (segment, &entropy))| {
                let start = segment.as_ptr() as usize - base;
                Passage {
                    start,
                    end: start + segment.len(),
                    entropy,
                    kept: kept.contains(&index),
                }
            })
            .collect();
        let shown: Vec<&str> = kept.iter().map(|&index| segments[index].trim()).collect();
        request(&shown.join("\n\n"), question, config)
    };
    observer.step("answering", passages.len(), passages.len() + 1);
    observer.text(&config.answer_prefix);
    let answer = aloud(
        model,
        &asked,
        &call.step("xl3m", "answer"),
        &mut took,
        observer,
    )?;
    Ok(Xl3mOutcome {
        answer: format!("{}{answer}", config.answer_prefix)
            .trim()
            .to_string(),
        passages,
        approx,
        took,
    })
}
