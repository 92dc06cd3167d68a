//! From the scheduler's tokens to text: pieces of answers, collected or sent as events.

use crate::app::App;
use crate::error::{Failure, Result};
use bytes::Bytes;
use futures_core::Stream;
use longspan_agents::chat::local::listed;
use longspan_agents::chat::wire::{
    self, Details, Looked, Progress, PromptDetails, TokenLogprob, Usage,
};
use longspan_data::tokenize::{StreamDecoder, Tokenizer};
use longspan_infer::decode::stop::StopStrings;
use longspan_infer::decode::{Answer, Choice, End};
use longspan_infer::schedule::{Base, Event, Goal, Job, Sink, Summary, Ticket};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::ops::ControlFlow;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::Sleep;

/// A client hears something at least this often.
const ALIVE_EVERY: Duration = Duration::from_secs(10);

/// A part of what is answered.
#[derive(Debug)]
pub enum Piece {
    /// So much of the prompt is read.
    Progress(Progress),
    /// Tokens of the prompt from its second on.
    Echo(Vec<TokenLogprob>),
    /// Text of an answer, certain, with the tokens that came since the last piece, if asked.
    Text {
        /// Which answer.
        answer: usize,
        /// What is added.
        text: String,
        /// What it is made of.
        tokens: Vec<TokenLogprob>,
    },
    /// An answer is complete.
    Ended {
        /// Which.
        answer: usize,
        /// `stop` or `length`.
        finish: &'static str,
        /// Tokens written, the ending one included.
        tokens: usize,
    },
    /// All is done.
    Finished(Summary),
    /// It failed.
    Failed(Failure),
}

/// A prompt ready for the scheduler.
pub struct Ask {
    /// Whose turn it takes.
    pub client: u64,
    /// What it starts from.
    pub base: Base,
    /// Its tokens.
    pub prompt: Vec<u32>,
    /// What is asked.
    pub shared: wire::Shared,
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// Report the prompt's own log probabilities.
    pub echo: Option<usize>,
}

/// A request that the scheduler has. Dropping it ends the request.
pub struct Asked {
    /// What comes.
    pub pieces: UnboundedReceiver<Piece>,
    /// Looked at already.
    pub first: VecDeque<Piece>,
    #[allow(dead_code)] // held
    ticket: Ticket,
}

/// One answer on its way to text.
struct Writer {
    stream: StreamDecoder,
    stop: StopStrings,
    /// Listed tokens whose text is not out yet.
    tokens: Vec<TokenLogprob>,
    count: usize,
}

/// All answers of a request.
struct Writers {
    tokenizer: Tokenizer,
    eos: Vec<u32>,
    stops: Vec<String>,
    logprobs: bool,
    /// Answers that a search gives beside its best.
    others: usize,
    answers: Vec<Writer>,
    sender: UnboundedSender<Piece>,
}

impl Writers {
    fn send(&self, piece: Piece) -> ControlFlow<()> {
        match self.sender.send(piece) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    }

    fn writer(&mut self, answer: usize) -> &mut Writer {
        while self.answers.len() <= answer {
            self.answers.push(Writer {
                stream: self.tokenizer.stream(),
                stop: StopStrings::new(&self.stops),
                tokens: Vec::new(),
                count: 0,
            });
        }
        &mut self.answers[answer]
    }

    fn token(&mut self, answer: usize, choice: &Choice) -> ControlFlow<()> {
        let ends = self.eos.contains(&choice.token);
        let entry = (self.logprobs && !ends && !choice.logprob.is_nan())
            .then(|| listed(&self.tokenizer, choice));
        let writer = self.writer(answer);
        writer.count += 1;
        writer.tokens.extend(entry);
        // The token that ends an answer has no text.
        let piece = if ends {
            None
        } else {
            writer.stream.push(choice.token)
        };
        let Some(piece) = piece else {
            return ControlFlow::Continue(());
        };
        let (text, stopped) = writer.stop.push(&piece);
        if !text.is_empty() {
            let tokens = std::mem::take(&mut writer.tokens);
            self.send(Piece::Text {
                answer,
                text,
                tokens,
            })?;
        }
        if stopped {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }

    fn ended(&mut self, answer: usize, end: End) -> ControlFlow<()> {
        let writer = self.writer(answer);
        let text = writer.stop.end(writer.stream.finish());
        let stopped = writer.stop.stopped();
        let tokens = std::mem::take(&mut writer.tokens);
        let count = writer.count;
        if !text.is_empty() || !tokens.is_empty() {
            self.send(Piece::Text {
                answer,
                text,
                tokens,
            })?;
        }
        let finish = match end {
            End::Length if !stopped => "length",
            _ => "stop",
        };
        self.send(Piece::Ended {
            answer,
            finish,
            tokens: count,
        })
    }

    /// The answers that a search found beside its best.
    fn others(&mut self, answers: &[Answer]) -> ControlFlow<()> {
        for (index, answer) in answers.iter().enumerate().skip(1).take(self.others) {
            for choice in &answer.choices {
                if self.token(index, choice).is_break() {
                    break;
                }
            }
            self.ended(index, answer.end)?;
        }
        ControlFlow::Continue(())
    }

    fn take(&mut self, event: Event) -> ControlFlow<()> {
        match event {
            Event::Progress { read, total } => self.send(Piece::Progress(Progress { read, total })),
            Event::Echo(choices) => {
                let tokens = choices.iter().map(|c| listed(&self.tokenizer, c));
                self.send(Piece::Echo(tokens.collect()))
            }
            Event::Token { answer, choice } => self.token(answer, &choice),
            Event::Ended { answer, outcome } => {
                self.ended(answer, outcome.end)?;
                self.others(&outcome.answers)
            }
            Event::Finished(summary) => self.send(Piece::Finished(summary)),
            Event::Failed(error) => self.send(Piece::Failed(error.into())),
        }
    }
}

/// Puts a request into the scheduler. What fails at once is an error; what may take long is not waited for.
pub async fn ask(app: &App, ask: Ask) -> Result<Asked> {
    let Ask {
        client,
        base,
        prompt,
        shared,
        max_tokens,
        echo,
    } = ask;
    let vocab = app.model.engine.model().config().vocab_size;
    shared
        .sampling
        .validate_for(vocab)
        .map_err(|error| wire::ErrorBody::invalid("logit_bias", error.to_string()))?;
    let first = shared.decode.build(&shared.sampling, 0, None)?;
    let others = if first.streams() { 0 } else { shared.n - 1 };
    let mut strategies = vec![first];
    if others == 0 {
        for stream in 1..shared.n as u64 {
            strategies.push(shared.decode.build(&shared.sampling, stream, None)?);
        }
    }
    let eos = app.model.tokenizer.eos_ids().to_vec();
    let (sender, pieces) = unbounded_channel();
    let mut writers = Writers {
        tokenizer: app.model.tokenizer.clone(),
        eos: eos.clone(),
        stops: shared.stops.clone(),
        logprobs: shared.sampling.logprobs.is_some(),
        others,
        answers: Vec::new(),
        sender,
    };
    let sink: Sink = Box::new(move |event| writers.take(event));
    let job = Job {
        client,
        base,
        prompt,
        goal: Goal::Answer {
            strategies,
            eos,
            max_tokens,
            echo,
            watch: shared.show_context,
        },
        deadline: Some(Instant::now() + app.options.request_timeout),
    };
    let ticket = app.scheduler.submit(job, sink)?;
    begun(pieces, ticket).await
}

/// Waits a moment for what is refused at once.
pub async fn begun(mut pieces: UnboundedReceiver<Piece>, ticket: Ticket) -> Result<Asked> {
    let mut first = VecDeque::new();
    match tokio::time::timeout(Duration::from_secs(1), pieces.recv()).await {
        Ok(Some(Piece::Failed(failure))) => return Err(failure),
        Ok(Some(piece)) => first.push_back(piece),
        Ok(None) => return Err(gone()),
        Err(_) => {}
    }
    Ok(Asked {
        pieces,
        first,
        ticket,
    })
}

fn gone() -> Failure {
    let status = axum::http::StatusCode::INTERNAL_SERVER_ERROR;
    Failure::new(status, "engine_stopped", "the engine has stopped")
}

impl Asked {
    /// The next piece.
    pub async fn next(&mut self) -> Piece {
        if let Some(piece) = self.first.pop_front() {
            return piece;
        }
        let piece = self.pieces.recv().await;
        piece.unwrap_or_else(|| Piece::Failed(gone()))
    }
}

/// A whole answer.
#[derive(Debug, Default)]
pub struct Whole {
    /// Its text.
    pub text: String,
    /// What it is made of, if asked.
    pub tokens: Vec<TokenLogprob>,
    /// Why it ended.
    pub finish: &'static str,
    /// Tokens written.
    pub count: usize,
}

/// All answers, the prompt's own tokens if asked, and what it took.
pub async fn collect(mut asked: Asked) -> Result<(Vec<Whole>, Vec<TokenLogprob>, Summary)> {
    let (mut answers, mut echo): (Vec<Whole>, _) = (Vec::new(), Vec::new());
    let at = |answers: &mut Vec<Whole>, index: usize| {
        while answers.len() <= index {
            answers.push(Whole::default());
        }
    };
    loop {
        match asked.next().await {
            Piece::Progress(_) => {}
            Piece::Echo(tokens) => echo.extend(tokens),
            Piece::Text {
                answer,
                text,
                tokens,
            } => {
                at(&mut answers, answer);
                answers[answer].text.push_str(&text);
                answers[answer].tokens.extend(tokens);
            }
            Piece::Ended {
                answer,
                finish,
                tokens,
            } => {
                at(&mut answers, answer);
                answers[answer].finish = finish;
                answers[answer].count = tokens;
            }
            Piece::Finished(summary) => return Ok((answers, echo, summary)),
            Piece::Failed(failure) => return Err(failure),
        }
    }
}

/// The tokens of a request and its answers.
pub fn usage(prompt: usize, written: usize, summary: &Summary) -> Usage {
    let prompt_tokens = prompt + summary.base;
    Usage {
        prompt_tokens,
        completion_tokens: written,
        total_tokens: prompt_tokens + written,
        prompt_tokens_details: Some(PromptDetails {
            cached_tokens: summary.cached,
        }),
    }
}

/// What our answers add. `chars` finds a token range's characters in a document.
pub fn details(
    context: &str,
    shared: &wire::Shared,
    summary: &Summary,
    chars: impl Fn([u64; 2]) -> Option<[usize; 2]>,
) -> Details {
    let looked = summary.looked.iter().map(|(range, weight)| {
        let tokens = [range.start, range.end];
        Looked {
            tokens,
            chars: chars(tokens),
            weight: *weight,
        }
    });
    Details {
        context: context.into(),
        decode: shared.decode.to_string(),
        queue_seconds: summary.queued.as_secs_f64(),
        prefill_seconds: summary.prefill.as_secs_f64(),
        decode_seconds: summary.decode.as_secs_f64(),
        forwards: summary.forwards,
        looked: shared.show_context.then(|| looked.collect()),
    }
}

/// A server-sent event.
pub fn event<T: serde::Serialize>(value: &T) -> Bytes {
    let json = serde_json::to_string(value).unwrap_or_else(|error| {
        format!("{{\"error\":{{\"message\":\"the answer is no JSON: {error}\"}}}}")
    });
    format!("data: {json}\n\n").into()
}

/// The event that ends a stream.
pub const DONE: Bytes = Bytes::from_static(b"data: [DONE]\n\n");

/// The events of a request: `format` says which bytes a piece becomes.
pub struct Events<F> {
    asked: Option<Asked>,
    ready: VecDeque<Bytes>,
    format: F,
    alive: Pin<Box<Sleep>>,
}

impl<F: FnMut(Piece) -> Vec<Bytes> + Unpin> Events<F> {
    /// The events of a request.
    pub fn new(asked: Asked, format: F) -> Self {
        Events {
            asked: Some(asked),
            ready: VecDeque::new(),
            format,
            alive: Box::pin(tokio::time::sleep(ALIVE_EVERY)),
        }
    }

    /// As an answer.
    pub fn response(self) -> axum::response::Response
    where
        F: Send + 'static,
    {
        use axum::http::header;
        use axum::response::IntoResponse;
        let headers = [
            (header::CONTENT_TYPE, "text/event-stream"),
            (header::CACHE_CONTROL, "no-cache"),
        ];
        (headers, axum::body::Body::from_stream(self)).into_response()
    }
}

impl<F: FnMut(Piece) -> Vec<Bytes> + Unpin> Stream for Events<F> {
    type Item = std::result::Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(bytes) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(bytes)));
            }
            let Some(asked) = &mut self.asked else {
                return Poll::Ready(None);
            };
            let piece = match asked.first.pop_front() {
                Some(piece) => piece,
                None => match asked.pieces.poll_recv(context) {
                    Poll::Ready(piece) => piece.unwrap_or_else(|| Piece::Failed(gone())),
                    Poll::Pending => {
                        // A comment keeps connections open, and finds out who went away.
                        if self.alive.as_mut().poll(context).is_pending() {
                            return Poll::Pending;
                        }
                        let next = tokio::time::Instant::now() + ALIVE_EVERY;
                        self.alive.as_mut().reset(next);
                        self.ready.push_back(Bytes::from_static(b": waiting\n\n"));
                        continue;
                    }
                },
            };
            let over = matches!(piece, Piece::Finished(_) | Piece::Failed(_));
            let bytes = (self.format)(piece);
            self.ready.extend(bytes);
            if over {
                self.asked = None;
            }
        }
    }
}

/// The event of a request that failed after its answer had begun.
pub fn failed(failure: Failure) -> Vec<Bytes> {
    vec![event(&wire::ErrorReply {
        error: failure.error,
    })]
}
