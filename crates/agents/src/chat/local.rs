//! The local model: engine, tokenizer and chat template together, from text to text.

use super::template::{ChatTemplate, Message, Role, TemplateError};
use super::wire::{TokenLogprob, TopLogprob};
use longspan_data::tokenize::{Special, TokenKind, Tokenizer, TokenizerError};
use longspan_infer::decode::stop::StopStrings;
use longspan_infer::decode::strategy::DecodeStats;
use longspan_infer::decode::{
    Answer, Choice, DecodeError, End, EngineSession, Event, Request, Strategy, run,
};
use longspan_infer::{Engine, EngineError, Sequence};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

/// What can go wrong between two texts.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The engine failed or refused.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The strategy failed or refused.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The text cannot be tokenized.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The template cannot be rendered.
    #[error(transparent)]
    Template(#[from] TemplateError),
}

/// A prompt around a document, in tokens. The parts are read as separate calls, so that retrieval
/// for the question is not mixed with the document's last queries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// What comes before the question, the document included.
    pub document: Vec<u32>,
    /// The question and the start of the answer's turn.
    pub question: Vec<u32>,
}

/// When an answer ends.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most tokens written.
    pub max_tokens: usize,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// The model ended its turn, or a stop text came.
    Stop,
    /// The limit of tokens.
    Length,
    /// The caller.
    Cancelled,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Generation {
    /// The text without stop texts and special tokens.
    pub text: String,
    /// What was chosen, one entry per token.
    pub choices: Vec<Choice>,
    /// Why it ended.
    pub finish: Finish,
    /// Time from the first token's choice to the last's.
    pub elapsed: Duration,
    /// What the strategy took.
    pub stats: DecodeStats,
    /// All answers of a strategy that weighs several, best first; the first is `text`.
    pub answers: Vec<Written>,
    /// A better and a worse answer, from strategies that search: a pair for preference training.
    pub pair: Option<(Written, Written)>,
}

/// An answer of several.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Written {
    /// Its text up to a stop text.
    pub text: String,
    /// What the strategy ranks by.
    pub score: f64,
    /// Sum of the log probabilities of its tokens.
    pub logprob: f64,
}

/// A token as answers list it, and its share of the text. A control token is listed by its name and has no text.
pub fn token_text(tokenizer: &Tokenizer, id: u32) -> (String, Vec<u8>) {
    let bytes = match tokenizer.kind(id) {
        None | Some(TokenKind::Control) => {
            let name = String::from_utf8_lossy(&tokenizer.token_bytes(id)).into_owned();
            return (name, Vec::new());
        }
        // Written as a sign of its own, whatever the vocabulary calls it.
        Some(TokenKind::Unknown) => tokenizer.decode(&[id]).into_bytes(),
        Some(_) => tokenizer.token_bytes(id),
    };
    (String::from_utf8_lossy(&bytes).into_owned(), bytes)
}

/// A chosen token with its log probability and those of the likeliest, as answers list it.
pub fn listed(tokenizer: &Tokenizer, choice: &Choice) -> TokenLogprob {
    // JSON has no infinities.
    let finite = |logprob: f32| logprob.max(-9999.0);
    let top = choice.top.iter().map(|&(id, logprob)| {
        let (token, bytes) = token_text(tokenizer, id);
        TopLogprob {
            token,
            logprob: finite(logprob),
            bytes: Some(bytes),
        }
    });
    let (token, bytes) = token_text(tokenizer, choice.token);
    TokenLogprob {
        token,
        logprob: finite(choice.logprob),
        top_logprobs: top.collect(),
        bytes: Some(bytes),
    }
}

/// See the module's text.
pub struct LocalModel {
    /// Runs the weights; shared with a scheduler that serves many requests.
    pub engine: Arc<Engine>,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
}

const DOCUMENT: &str = "\u{1}document\u{1}";
const QUESTION: &str = "\u{1}question\u{1}";

impl LocalModel {
    /// Puts the parts together; a checkpoint without a chat template gets plain prompts.
    pub fn new(engine: impl Into<Arc<Engine>>, tokenizer: Tokenizer) -> Result<Self, ModelError> {
        let engine = engine.into();
        let text = |id: Option<u32>| {
            id.map(|id| String::from_utf8_lossy(&tokenizer.token_bytes(id)).into_owned())
                .unwrap_or_default()
        };
        let template = match tokenizer.chat_template() {
            Some(source) => Some(ChatTemplate::new(
                source,
                &text(tokenizer.bos()),
                &text(tokenizer.eos_ids().first().copied()),
            )?),
            None => None,
        };
        Ok(LocalModel {
            engine,
            tokenizer,
            template,
        })
    }

    /// True if the checkpoint brings a chat template.
    pub fn chats(&self) -> bool {
        self.template.is_some()
    }

    /// The text of a conversation up to the assistant's next turn; the plain contents without a
    /// chat template.
    pub fn render(&self, messages: &[Message]) -> Result<String, ModelError> {
        match &self.template {
            Some(template) => Ok(template.render(messages)?),
            None => Ok(messages.iter().map(|m| m.content.as_str()).collect()),
        }
    }

    /// The tokens of a prompt that asks about a document: what stands before the question can be
    /// read once and kept.
    pub fn ask(&self, document: &str, question: &str) -> Result<Prompt, ModelError> {
        let (head, middle, tail) = self.frame()?;
        let mut tokens = self.tokenizer.encode(&head, Special::ParseWithBos)?;
        tokens.extend(self.tokenizer.encode(document, Special::None)?);
        Ok(Prompt {
            document: tokens,
            question: self.question_tokens(&middle, question, &tail)?,
        })
    }

    /// The tokens of a question about a document that was read before.
    pub fn question(&self, question: &str) -> Result<Vec<u32>, ModelError> {
        let (_, middle, tail) = self.frame()?;
        self.question_tokens(&middle, question, &tail)
    }

    fn question_tokens(
        &self,
        middle: &str,
        question: &str,
        tail: &str,
    ) -> Result<Vec<u32>, ModelError> {
        let mut tokens = self.tokenizer.encode(middle, Special::Parse)?;
        tokens.extend(self.tokenizer.encode(question, Special::None)?);
        tokens.extend(self.tokenizer.encode(tail, Special::Parse)?);
        Ok(tokens)
    }

    /// Text before the document, between document and question, and after the question.
    fn frame(&self) -> Result<(String, String, String), ModelError> {
        let text = match &self.template {
            Some(template) => {
                let content = format!(
                    "Here is a text:\n\n{DOCUMENT}\n\nUse the text to answer this question: {QUESTION}"
                );
                template.render(&[Message::new(Role::User, content)])?
            }
            None => format!("{DOCUMENT}\n\nQuestion: {QUESTION}\nAnswer:"),
        };
        // A template that drops or changes the message would lose the markers; then the plain form serves.
        let split = text.split_once(DOCUMENT).and_then(|(head, rest)| {
            rest.split_once(QUESTION)
                .map(|(middle, tail)| (head, middle, tail))
        });
        let (head, middle, tail) = split.unwrap_or(("", "\n\nQuestion: ", "\nAnswer:"));
        Ok((head.into(), middle.into(), tail.into()))
    }

    /// The tokens of a conversation up to the assistant's next turn.
    pub fn conversation(&self, messages: &[Message]) -> Result<Vec<u32>, ModelError> {
        match &self.template {
            Some(template) => {
                let text = template.render(messages)?;
                // Templates write the beginning-of-text token themselves where the model wants it.
                Ok(self.tokenizer.encode(&text, Special::Parse)?)
            }
            None => {
                let turns = messages.iter().map(|message| match message.role {
                    Role::System => format!("{}\n\n", message.content),
                    Role::User => format!("Question: {}\n", message.content),
                    Role::Assistant => format!("Answer: {}\n\n", message.content),
                });
                let text: String = turns.chain(["Answer:".to_string()]).collect();
                Ok(self.tokenizer.encode(&text, Special::ParseWithBos)?)
            }
        }
    }

    /// Writes an answer after `logits` [vocab] of the sequence's last token, handing text to
    /// `on_text` as it becomes certain; strategies that weigh several answers hand it all at the end,
    /// and call it with nothing while they work. Under strategies that stream, the sequence then holds
    /// every token that was read back in; others leave it as it was.
    pub fn generate(
        &self,
        sequence: &mut Sequence,
        logits: Vec<f32>,
        strategy: &mut dyn Strategy,
        limits: &Limits,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generation, ModelError> {
        let mut stream = self.tokenizer.stream();
        let mut stop = StopStrings::new(&limits.stop);
        let (mut text, mut choices) = (String::new(), Vec::new());
        let mut finish = None;
        let eos = self.tokenizer.eos_ids().to_vec();
        let mut emit = |event: Event| {
            let Event::Token(choice) = event else {
                return on_text("");
            };
            let token = choice.token;
            choices.push(choice);
            // The strategy ends at these by itself; they have no text.
            if eos.contains(&token) {
                return ControlFlow::Continue(());
            }
            let Some(piece) = stream.push(token) else {
                return ControlFlow::Continue(());
            };
            let (piece, stopped) = stop.push(&piece);
            text.push_str(&piece);
            if !piece.is_empty() && on_text(&piece).is_break() {
                finish = Some(Finish::Cancelled);
            } else if stopped {
                finish = Some(Finish::Stop);
            }
            match finish {
                Some(_) => ControlFlow::Break(()),
                None => ControlFlow::Continue(()),
            }
        };
        let request = Request {
            seq: EngineSession::ROOT,
            eos: eos.clone(),
            max_tokens: limits.max_tokens,
        };
        let mut session = EngineSession::new(&self.engine, sequence);
        let outcome = run(&mut session, strategy, &request, logits, &mut emit)?;
        let mut finish = finish.unwrap_or(match outcome.end {
            End::Eos => Finish::Stop,
            End::Length => Finish::Length,
            End::Cancelled => Finish::Cancelled,
        });
        if finish != Finish::Cancelled && !stop.stopped() {
            let rest = stop.end(stream.finish());
            if stop.stopped() {
                finish = Finish::Stop;
            }
            text.push_str(&rest);
            if !rest.is_empty() {
                let _ = on_text(&rest);
            }
        }
        let written = |answer: &Answer| self.written(answer, limits);
        Ok(Generation {
            text,
            choices,
            finish,
            elapsed: outcome.stats.elapsed,
            stats: outcome.stats,
            answers: outcome.answers.iter().map(written).collect(),
            pair: (outcome.pair.as_ref())
                .map(|pair| (written(&pair.chosen), written(&pair.rejected))),
        })
    }

    fn written(&self, answer: &Answer, limits: &Limits) -> Written {
        let mut stream = self.tokenizer.stream();
        let mut stop = StopStrings::new(&limits.stop);
        let mut text = String::new();
        for choice in &answer.choices {
            if let Some(piece) = stream.push(choice.token) {
                text.push_str(&stop.push(&piece).0);
            }
        }
        text.push_str(&stop.end(stream.finish()));
        Written {
            text,
            score: answer.score,
            logprob: answer.logprob,
        }
    }
}
