//! AgentWrite: long texts from models that stop early. One call plans paragraphs with their lengths, then each paragraph
//! is written with the plan and all text so far in view. What is written is on disk after every paragraph.
//!
//! LongWriter, arXiv 2408.07055, section 3.

use super::{Observer, Took, aloud, quiet};
use crate::chat::model::{Ability, Call, ChatError, ChatModel, Request, Result};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// Hyper-parameters, with the paper's defaults where it has them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AgentWriteConfig {
    /// Words of the whole; the plan's counts are scaled to it. None = as planned.
    pub words: Option<usize>,
    /// Most tokens of a reply.
    pub max_tokens: usize,
    /// Of the plan and of the text.
    pub temperature: f32,
    /// For texts that can be written again.
    pub seed: u64,
    /// A plan with more steps is refused.
    pub max_steps: usize,
    /// Share of a plan's lines that must be steps.
    pub min_matched: f64,
    /// Plans asked for before giving up.
    pub plan_tries: usize,
    /// A paragraph below this share of its count is gone on with. Not in the paper, whose models write long paragraphs.
    pub short: f64,
    /// At most so often.
    pub extend: usize,
    /// Of the text, for models that can be given an answer's start (ours): small ones otherwise go round in circles. Not in
    /// the paper.
    pub repetition_penalty: f32,
    /// Without the text so far: the paper's ablation.
    pub parallel: bool,
}

impl Default for AgentWriteConfig {
    fn default() -> Self {
        AgentWriteConfig {
            words: None,
            max_tokens: 4096,
            temperature: 1.0,
            seed: 0,
            max_steps: 50,
            min_matched: 0.8,
            plan_tries: 3,
            short: 0.9,
            extend: 8,
            repetition_penalty: 1.15,
            parallel: false,
        }
    }
}

/// A paragraph of the plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What it is about.
    pub point: String,
    /// How many words it should have.
    pub words: usize,
}

impl Step {
    fn line(&self, number: usize) -> String {
        format!(
            "Paragraph {number} - Main Point: {} - Word Count: {} words",
            self.point, self.words
        )
    }
}

/// Why a plan cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Too few of its lines are steps.
    #[error(
        "{matched} of the plan's {lines} lines are steps of the form \"Paragraph N - Main Point: ... - Word Count: ...\""
    )]
    Lines {
        /// Lines that are.
        matched: usize,
        /// Lines there are.
        lines: usize,
    },
    /// More steps than allowed.
    #[error("the plan has {0} steps, more than allowed")]
    Steps(usize),
    /// Steps that say the same.
    #[error("the plan's {steps} steps have {points} different main points")]
    Repeated {
        /// Steps there are.
        steps: usize,
        /// Points that differ.
        points: usize,
    },
}

/// An error unless more than half of the points differ.
fn varied(steps: &[Step]) -> std::result::Result<(), PlanError> {
    let points: HashSet<String> = steps.iter().map(|step| step.point.to_lowercase()).collect();
    match points.len() * 2 > steps.len() {
        true => Ok(()),
        false => Err(PlanError::Repeated {
            steps: steps.len(),
            points: points.len(),
        }),
    }
}

/// The steps of a plan: one a line, `Paragraph N - Main Point: ... - Word Count: 400 words`, bold marks and list marks
/// forgiven.
///
/// # Errors
/// See [`PlanError`].
pub fn parse_plan(
    text: &str,
    config: &AgentWriteConfig,
) -> std::result::Result<Vec<Step>, PlanError> {
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    if lines.len() > config.max_steps {
        return Err(PlanError::Steps(lines.len()));
    }
    let steps: Vec<Step> = lines.iter().filter_map(|line| parse_step(line)).collect();
    if steps.is_empty() || (steps.len() as f64) < config.min_matched * lines.len() as f64 {
        return Err(PlanError::Lines {
            matched: steps.len(),
            lines: lines.len(),
        });
    }
    Ok(steps)
}

fn parse_step(line: &str) -> Option<Step> {
    let plain = line.replace(['*', '`', '#'], "").replace(['–', '—'], "-");
    let plain = plain.trim_start_matches(|c: char| c == '-' || c == '•' || c.is_whitespace());
    let rest = plain.strip_prefix("Paragraph ")?;
    let digits = rest
        .find(|c: char| !c.is_ascii_digit())
        .filter(|&at| at > 0)?;
    let rest = rest[digits..]
        .trim_start()
        .strip_prefix(['-', ':'])?
        .trim_start();
    let rest = rest.strip_prefix("Main Point:")?;
    // The last one: the point may speak of word counts.
    let at = rest.rfind("Word Count:")?;
    let point = rest[..at].trim_end().strip_suffix('-')?.trim();
    let point = point
        .strip_prefix('[')
        .and_then(|point| point.strip_suffix(']'))
        .unwrap_or(point)
        .trim();
    let count: String = rest[at + "Word Count:".len()..]
        .chars()
        .skip_while(|c| !c.is_ascii_digit())
        .take_while(|c| c.is_ascii_digit() || *c == ',')
        .filter(char::is_ascii_digit)
        .collect();
    let words = count.parse().ok().filter(|&words| words > 0)?;
    (!point.is_empty()).then(|| Step {
        point: point.into(),
        words,
    })
}

/// Words as the paper counts them: Chinese characters, and runs of ASCII letters that touch no other letter, digit or
/// underscore.
pub fn count_words(text: &str) -> usize {
    let mut count = 0;
    let mut letters = false;
    let mut alone = true;
    for c in text.chars().chain([' ']) {
        let chinese = ('\u{4E00}'..='\u{9FFF}').contains(&c);
        count += usize::from(chinese);
        if c.is_ascii_alphabetic() {
            letters = true;
        } else if c.is_alphanumeric() || c == '_' || is_mark(c) {
            alone = false;
        } else {
            count += usize::from(letters && alone);
            (letters, alone) = (false, true);
        }
    }
    count
}

/// Marks that stand on letters are part of words.
fn is_mark(c: char) -> bool {
    matches!(c, '\u{300}'..='\u{36F}' | '\u{203F}' | '\u{2040}')
}

/// What is on disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// What was asked for.
    pub instruction: String,
    /// How.
    pub config: AgentWriteConfig,
    /// The model's name.
    pub model: String,
    /// The plan.
    pub plan: Vec<Step>,
    /// The paragraphs so far.
    pub paragraphs: Vec<String>,
    /// What they took.
    pub took: Took,
}

impl State {
    /// The text so far.
    pub fn text(&self) -> String {
        self.paragraphs.join("\n\n")
    }

    /// True if every step is written.
    pub fn finished(&self) -> bool {
        !self.plan.is_empty() && self.paragraphs.len() == self.plan.len()
    }
}

/// See the module's text.
pub struct AgentWrite<'a> {
    model: &'a dyn ChatModel,
    config: AgentWriteConfig,
    state: Option<PathBuf>,
}

impl<'a> AgentWrite<'a> {
    /// Writes with this model.
    pub fn new(model: &'a dyn ChatModel, config: AgentWriteConfig) -> AgentWrite<'a> {
        AgentWrite {
            model,
            config,
            state: None,
        }
    }

    /// Keeps the work in this file and goes on from it. It is replaced whole after every paragraph.
    pub fn state(mut self, path: &Path) -> AgentWrite<'a> {
        self.state = Some(path.into());
        self
    }

    /// The instruction's text, planned and written.
    ///
    /// # Errors
    /// No usable plan after all tries, an empty paragraph, a state file of other work, what the model says. All
    /// paragraphs written before are in the state file.
    pub fn run(
        &self,
        instruction: &str,
        call: &Call,
        observer: &mut dyn Observer,
    ) -> Result<State> {
        self.run_with(instruction, None, call, observer)
    }

    /// As [`AgentWrite::run`], with a plan of one's own.
    ///
    /// # Errors
    /// As [`AgentWrite::run`].
    pub fn run_with(
        &self,
        instruction: &str,
        plan: Option<Vec<Step>>,
        call: &Call,
        observer: &mut dyn Observer,
    ) -> Result<State> {
        if instruction.trim().is_empty() {
            return Err(ChatError::BadRequest(
                "write: the instruction is empty".into(),
            ));
        }
        if self.config.words == Some(0) {
            return Err(ChatError::BadRequest(
                "write: 0 words found, at least 1 expected".into(),
            ));
        }
        let mut state = match self.load(instruction)? {
            Some(state) => {
                for paragraph in &state.paragraphs {
                    observer.text(&format!("{paragraph}\n\n"));
                }
                state
            }
            None => State {
                instruction: instruction.into(),
                config: self.config.clone(),
                model: self.model.card().name.clone(),
                plan: Vec::new(),
                paragraphs: Vec::new(),
                took: Took::default(),
            },
        };
        if state.plan.is_empty() {
            observer.step("planning", 0, 1);
            let steps = match plan {
                Some(steps) => steps,
                None => self.plan(instruction, call, &mut state.took, observer)?,
            };
            state.plan = self.scaled(steps);
            self.save(&state)?;
        }
        while !state.finished() {
            let index = state.paragraphs.len();
            observer.step("writing", index, state.plan.len());
            let paragraph = self.paragraph(&mut state, index, call, observer)?;
            state.paragraphs.push(paragraph);
            self.save(&state)?;
            observer.text("\n\n");
        }
        Ok(state)
    }

    fn load(&self, instruction: &str) -> Result<Option<State>> {
        let Some(path) = self.state.as_ref().filter(|path| path.exists()) else {
            return Ok(None);
        };
        let wrong = |text: String| ChatError::Store(format!("{}: {text}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        let state: State = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        let model = &self.model.card().name;
        let same = state.instruction == instruction
            && state.config == self.config
            && state.model == *model;
        if !same {
            return Err(wrong(format!(
                "it holds the text of another instruction, model or options ({:?} by {}); name another file or delete it",
                state.instruction.chars().take(60).collect::<String>(),
                state.model
            )));
        }
        Ok(Some(state))
    }

    fn save(&self, state: &State) -> Result<()> {
        let Some(path) = &self.state else {
            return Ok(());
        };
        let wrong = |error: &dyn std::fmt::Display| {
            ChatError::Store(format!("{}: {error}", path.display()))
        };
        let text = serde_json::to_vec_pretty(state).map_err(|error| wrong(&error))?;
        // A kill leaves the file as it was or as it is to be.
        let mut beside = path.clone().into_os_string();
        beside.push(".part");
        let beside = PathBuf::from(beside);
        std::fs::write(&beside, text).map_err(|error| wrong(&error))?;
        std::fs::rename(&beside, path).map_err(|error| wrong(&error))
    }

    /// The counts scaled to the words asked for.
    fn scaled(&self, mut steps: Vec<Step>) -> Vec<Step> {
        let planned: usize = steps.iter().map(|step| step.words).sum();
        if let Some(words) = self.config.words {
            for step in &mut steps {
                step.words = (step.words * words).div_ceil(planned.max(1)).max(1);
            }
        }
        steps
    }

    fn plan(
        &self,
        instruction: &str,
        call: &Call,
        took: &mut Took,
        observer: &mut dyn Observer,
    ) -> Result<Vec<Step>> {
        const START: &str = "Paragraph 1 - Main Point:";
        let mut prompt = plan_prompt(instruction, self.config.words);
        let mut last = None;
        let mut repeats = None;
        for attempt in 0..self.config.plan_tries.max(1) {
            let seed = self.config.seed.wrapping_add(attempt as u64);
            if let Some(error) = &last {
                prompt = format!(
                    "{}\n\nYour last plan could not be used: {error}.",
                    plan_prompt(instruction, self.config.words)
                );
            }
            let mut request = Request::user(&prompt).temperature(self.config.temperature, seed);
            request.max_tokens = self.tokens(&request, self.config.max_tokens.min(2048))?;
            if self.model.card().can(Ability::AnswerPrefix) {
                request.answer_prefix = START.into();
            }
            let step = call.step("write", format!("plan {}", attempt + 1));
            let reply = quiet(self.model, &request, &step, took)?;
            let steps = parse_plan(&format!("{}{reply}", request.answer_prefix), &self.config);
            match steps.and_then(|steps| match varied(&steps) {
                Ok(()) => Ok(steps),
                Err(error) => {
                    repeats = Some(steps);
                    Err(error)
                }
            }) {
                Ok(steps) => return Ok(steps),
                Err(error) => {
                    observer.note(&format!("plan {}: {error}", attempt + 1));
                    last = Some(error);
                }
            }
        }
        if let Some(steps) = repeats {
            // Its counts are of use; the observer was told what it lacks.
            return Ok(steps);
        }
        let error = last.map_or(String::new(), |error| error.to_string());
        Err(ChatError::Protocol(format!(
            "write: no usable plan in {} tries: {error}; give one of your own",
            self.config.plan_tries.max(1)
        )))
    }

    /// One paragraph; short ones are gone on with.
    fn paragraph(
        &self,
        state: &mut State,
        index: usize,
        call: &Call,
        observer: &mut dyn Observer,
    ) -> Result<String> {
        let wanted = state.plan[index].words;
        let mut written = String::new();
        // A model that can go on from a given start does so until it ends there; then it is asked for more.
        let mut goes_on = self.model.card().can(Ability::AnswerPrefix);
        // Its start is the small heading that the prompt allows: without it a small model repeats the prompt.
        let heading = format!("## {}\n\n", state.plan[index].point);
        for attempt in 0..=self.config.extend {
            let words = count_words(&written);
            if attempt > 0 && words as f64 >= self.config.short * wanted as f64 {
                break;
            }
            let rest = wanted.saturating_sub(words);
            let mut before = match (self.config.parallel, attempt) {
                (true, _) => String::new(),
                // A small model that wrote nothing took the text so far for a finished one: it sees less of it.
                (false, 1) if written.is_empty() => last_words(&state.text(), 100).to_string(),
                (false, 2..) if written.is_empty() => String::new(),
                (false, _) => state.text(),
            };
            let mut request;
            // Where the window is too small, the end of the text so far must do.
            loop {
                let (shown, words) = match goes_on {
                    true => ("", wanted),
                    false => (written.as_str(), rest),
                };
                let prompt = write_prompt(
                    &state.instruction,
                    &state.plan,
                    index,
                    &before,
                    shown,
                    words,
                );
                let seed = self
                    .config
                    .seed
                    .wrapping_add((index * 100 + attempt) as u64);
                request = Request::user(prompt).temperature(self.config.temperature, seed);
                if self.model.card().can(Ability::AnswerPrefix) {
                    request.sampling.repetition_penalty = self.config.repetition_penalty;
                }
                if goes_on && !written.is_empty() {
                    request.answer_prefix = format!("{written}\n\n");
                } else if goes_on {
                    request.answer_prefix.clone_from(&heading);
                }
                match self.tokens(&request, self.config.max_tokens.min(rest * 3 + 200)) {
                    Ok(tokens) => {
                        request.max_tokens = tokens;
                        break;
                    }
                    Err(error @ ChatError::ContextOverflow { .. }) => {
                        let kept = last_words(&before, before.split_whitespace().count() * 2 / 3);
                        if kept.is_empty() {
                            return Err(error);
                        }
                        observer.note(&format!(
                            "step {}: the window shows the last {} words of the text so far",
                            index + 1,
                            kept.split_whitespace().count()
                        ));
                        before = kept.to_string();
                    }
                    Err(error) => return Err(error),
                }
            }
            let step = call.step(
                "write",
                format!("paragraph {} part {}", index + 1, attempt + 1),
            );
            let reply = aloud(self.model, &request, &step, &mut state.took, observer)?;
            let mut known = state.paragraphs.clone();
            known.push(written.clone());
            let frame = ["", "x"].map(|written| {
                let plan = &state.plan;
                write_prompt(&state.instruction, plan, index, "", written, wanted)
            });
            let part = clean(&reply, &frame.join("\n"), &known);
            if part.is_empty() {
                if !written.is_empty() && goes_on {
                    goes_on = false;
                    continue;
                }
                if !written.is_empty() {
                    // It has nothing to add.
                    break;
                }
                // Another seed, another chance: small models now and then end where they should begin.
                observer.note(&format!(
                    "step {}: try {} came back empty",
                    index + 1,
                    attempt + 1
                ));
                continue;
            }
            if written.is_empty() {
                written.push_str(&request.answer_prefix);
            } else {
                written.push_str(if goes_on { "\n\n" } else { " " });
            }
            written.push_str(&part);
        }
        if written.is_empty() {
            return Err(ChatError::Protocol(format!(
                "write: the model wrote nothing for step {} in {} tries: {:?}; go on with another --seed or a higher --temperature",
                index + 1,
                self.config.extend + 1,
                state.plan[index].point
            )));
        }
        Ok(written)
    }

    /// Tokens that a reply may have: at most `most`, and at least a quarter of it.
    fn tokens(&self, request: &Request, most: usize) -> Result<usize> {
        let Some(window) = self.model.card().window else {
            return Ok(most);
        };
        let prompt = self.model.count(&request.input)?.planned();
        // The answer's given start takes a few.
        let free = window.saturating_sub(prompt + 16);
        match free >= most.div_ceil(4).max(1) {
            true => Ok(most.min(free)),
            false => Err(ChatError::ContextOverflow {
                tokens: prompt + most,
                max: window,
            }),
        }
    }
}

/// The plan's message.
pub fn plan_prompt(instruction: &str, words: Option<usize>) -> String {
    let total = words.map_or(String::new(), |words| {
        let paragraphs = (words / 300).clamp(2, 40);
        format!(" The whole text shall have {words} words, so plan about {paragraphs} paragraphs.")
    });
    format!(
        "Break the writing task below into paragraphs. Each paragraph gets one line with its main point and its word count, like this:\n\nParagraph 1 - Main Point: [what the paragraph says] - Word Count: [for instance 400 words]\nParagraph 2 - Main Point: [what the paragraph says] - Word Count: [for instance 300 words]\n\nThe writing task:\n{instruction}\n\nEvery paragraph has 200 to 1000 words, and together they cover the whole task.{total} Write these lines only, one for every paragraph, and nothing else."
    )
}

/// A paragraph's message: instruction, plan, text so far, then the step, so that each prompt goes on where the one before
/// ended.
pub fn write_prompt(
    instruction: &str,
    plan: &[Step],
    index: usize,
    before: &str,
    written: &str,
    words: usize,
) -> String {
    let lines = plan.iter().enumerate().map(|(at, step)| step.line(at + 1));
    let lines = lines.collect::<Vec<_>>().join("\n");
    let step = plan[index].line(index + 1);
    let text = [before, written]
        .into_iter()
        .filter(|part| !part.is_empty());
    let text = text.collect::<Vec<_>>().join("\n\n");
    let text = if text.is_empty() {
        "(nothing yet)".to_string()
    } else {
        text
    };
    let task = if written.is_empty() {
        format!(
            "Write the next paragraph, and only this one:\n{step}\n\nIt shall have about {words} words. A short heading is allowed."
        )
    } else {
        format!(
            "The last paragraph is too short. It is:\n{step}\n\nGo on with it where the text ends, with about {words} words more and new details."
        )
    };
    format!(
        "The writing task:\n{instruction}\n\nThe plan:\n{lines}\n\nThe text so far:\n{text}\n\n{task} Repeat nothing of the text so far, and do not close the text: it goes on after this paragraph."
    )
}

/// A reply without lines of the prompt's frame or parts of them, lines of a plan, and lines and sentences of some length
/// that the text has already: small models repeat what they were shown.
fn clean(reply: &str, frame: &str, known: &[String]) -> String {
    let frame: HashSet<&str> = filled(frame).collect();
    let mut written: HashSet<String> = HashSet::new();
    for line in known.iter().flat_map(|text| filled(text)) {
        written.extend(sentences(line).map(|sentence| sentence.trim().to_string()));
    }
    let mut text = String::new();
    for line in reply.trim().lines() {
        let line = line.trim();
        let words = line.split_whitespace().count();
        let shown = |frame: &&str| *frame == line || (words >= 4 && frame.contains(line));
        let kept: String = match parse_step(line).is_some() || frame.iter().any(shown) {
            true => String::new(),
            false => sentences(line)
                .filter(|sentence| {
                    let long = sentence.split_whitespace().count() >= 8;
                    written.insert(sentence.trim().into()) || !long
                })
                .collect(),
        };
        // What was dropped leaves no gap behind.
        if !kept.trim().is_empty()
            || (line.is_empty() && !text.is_empty() && !text.ends_with("\n\n"))
        {
            text.push_str(kept.trim_end());
            text.push('\n');
        }
    }
    text.trim().to_string()
}

/// Lines that hold something, trimmed.
fn filled(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty())
}

/// A line cut after full stops, question and exclamation marks that a space follows; together they are the line.
fn sentences(line: &str) -> impl Iterator<Item = &str> {
    let mut rest = line;
    std::iter::from_fn(move || {
        let end = rest.char_indices().zip(rest.chars().skip(1));
        let end = end
            .filter(|((_, c), next)| matches!(c, '.' | '!' | '?') && *next == ' ')
            .map(|((at, _), _)| at + 2)
            .next()
            .unwrap_or(rest.len());
        let (sentence, after) = rest.split_at(end);
        rest = after;
        (!sentence.is_empty()).then_some(sentence)
    })
}

fn last_words(text: &str, words: usize) -> &str {
    let mut at = text.len();
    let mut seen = 0;
    let mut in_word = false;
    for (index, c) in text.char_indices().rev() {
        if c.is_whitespace() {
            if in_word {
                seen += 1;
                if seen == words {
                    break;
                }
            }
            in_word = false;
        } else {
            in_word = true;
            at = index;
        }
    }
    if words == 0 { "" } else { &text[at..] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_read_and_refused() {
        let config = AgentWriteConfig::default();
        let read = |text: &str| parse_plan(text, &config);
        let step = |point: &str, words| Step {
            point: point.into(),
            words,
        };
        for line in [
            "Paragraph 1 - Main Point: The sea - Word Count: 400 words",
            "**Paragraph 1** - Main Point: The sea - Word Count: 400",
            "- Paragraph 12 – Main Point: [The sea] – Word Count: [about 400 words]",
            "### Paragraph 3: Main Point: The sea - Word Count: 400 words.",
        ] {
            assert_eq!(read(line), Ok(vec![step("The sea", 400)]), "{line}");
        }
        assert_eq!(
            read("Paragraph 1 - Main Point: A - b: Word Count: 3 - Word Count: 1,200 words")
                .unwrap()[0]
                .words,
            1200
        );
        for line in [
            "",
            "Paragraph one - Main Point: x - Word Count: 400",
            "Paragraph 1 - Main Point: x",
            "Paragraph 1 - Main Point: x - Word Count: many",
            "Paragraph 1 - Main Point: x - Word Count: 0",
            "Paragraph 1 - Main Point: - Word Count: 100",
            "Paragraph - Main Point: x - Word Count: 100",
        ] {
            assert!(
                matches!(read(line), Err(PlanError::Lines { matched: 0, .. })),
                "{line}"
            );
        }
        let good = "Paragraph 1 - Main Point: x - Word Count: 200\n";
        assert_eq!(
            read(&(good.repeat(4) + "\n\nThat is the plan."))
                .unwrap()
                .len(),
            4
        );
        let error = read(&(good.repeat(3) + "That is the plan.")).unwrap_err();
        assert_eq!(
            error,
            PlanError::Lines {
                matched: 3,
                lines: 4
            }
        );
        assert_eq!(read(&good.repeat(50)).unwrap().len(), 50);
        assert_eq!(read(&good.repeat(51)), Err(PlanError::Steps(51)));
    }

    #[test]
    fn what_was_shown_is_no_part_of_a_reply() {
        let frame = "The plan:\nParagraph 1 - Main Point: The sea - Word Count: 400 words\n\nThe last paragraph is too short. It is:\nIt shall have about 400 words. A short heading is allowed.";
        let known = ["The waves came in from the west all day long.\nYes.".to_string()];
        let reply = "Paragraph 2 - Main Point: The land - Word Count: 9 words\n\nThe last paragraph is too short. It is:\nParagraph 1 - Main Point: The sea\nIt shall have about 400 words.\n\nThe waves came in from the west all day long.\nYes.\n\nA new line.\n";
        assert_eq!(clean(reply, frame, &known), "Yes.\n\nA new line.");
        let twice = "The keeper lit the lamp before the ships came home.\n".repeat(2);
        assert_eq!(clean(&twice, frame, &[]), twice.lines().next().unwrap());
        let line = "The keeper lit the lamp before the ships came home. Yes. No. ".repeat(2);
        assert_eq!(
            clean(&line, frame, &[]),
            "The keeper lit the lamp before the ships came home. Yes. No. Yes. No."
        );
        assert_eq!(
            clean("Paragraph 1 - Main Point: x - Word Count: 3", "", &[]),
            ""
        );
    }

    #[test]
    fn plans_that_repeat_themselves_are_told_from_others() {
        let step = |point: &str| Step {
            point: point.into(),
            words: 100,
        };
        assert_eq!(varied(&[step("a")]), Ok(()));
        assert_eq!(varied(&[step("a"), step("b"), step("B")]), Ok(()));
        let error = varied(&[step("a"), step("A"), step("b"), step("b")]);
        let want = PlanError::Repeated {
            steps: 4,
            points: 2,
        };
        assert_eq!(error, Err(want));
    }

    #[test]
    fn the_last_words() {
        assert_eq!(last_words("a b  c d", 2), "c d");
        assert_eq!(last_words("a b", 5), "a b");
        assert_eq!(last_words("a b", 0), "");
    }
}
