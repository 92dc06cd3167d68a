//! The scheduler: many requests over one engine, for servers.
//!
//! One thread drives the engine. Each pass over the model reads one token into every sequence that is being written,
//! and beside them a slice of the prompts that are being read, so that a long prompt holds nobody up for longer than
//! a slice. Requests wait in a queue that serves the client with the fewest running requests first. A dropped
//! [`Ticket`] ends its request before the next pass, and its pages are free then.

mod core;
mod running;

use crate::decode::{Choice, DecodeError, Outcome, Strategy};
use crate::engine::{Engine, EngineError, EngineOptions};
use crate::session::SessionDir;
use longspan_nn::position::RopeOverride;
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How much at once.
#[derive(Clone, Debug)]
pub struct ScheduleOptions {
    /// Requests read or written at once; at least 1.
    pub max_running: usize,
    /// Requests that wait; more are refused.
    pub max_queued: usize,
    /// Bytes of keys and values that running requests and kept documents may need.
    pub kv_bytes: u64,
    /// Bytes of keys and values of finished talks, kept for those that go on.
    pub prefix_bytes: u64,
    /// Tokens of prompts in a pass that also writes; at least 1.
    pub slice: usize,
}

impl Default for ScheduleOptions {
    fn default() -> Self {
        ScheduleOptions {
            max_running: 64,
            max_queued: 256,
            kv_bytes: 4 << 30,
            prefix_bytes: 1 << 30,
            slice: 256,
        }
    }
}

/// What a request starts from.
#[derive(Clone, Debug)]
pub enum Base {
    /// Nothing; under a rotary rule other than the engine's own, if one is named.
    Empty(EngineOptions, Option<RopeOverride>),
    /// A document that was kept under this name.
    Kept(String),
}

/// What a request is for.
pub enum Goal {
    /// Answers to the prompt.
    Answer {
        /// One strategy for each answer.
        strategies: Vec<Box<dyn Strategy>>,
        /// Tokens that end an answer.
        eos: Vec<u32>,
        /// Most tokens of an answer.
        max_tokens: usize,
        /// Hand back the prompt's own tokens with log probabilities, and those of this many likeliest.
        echo: Option<usize>,
        /// Note where the model looks; see [`Summary::looked`].
        watch: bool,
    },
    /// Read a document and keep it under a name.
    Keep {
        /// The name; what was kept under it before is replaced.
        id: String,
        /// Tokens left for a question and an answer, for rotary rules that go by length.
        room: usize,
        /// Also save it here.
        save: Option<(SessionDir, serde_json::Value)>,
    },
}

/// A request.
pub struct Job {
    /// Who asks: requests of one client share its turn.
    pub client: u64,
    /// What it starts from.
    pub base: Base,
    /// Tokens to read; at least one.
    pub prompt: Vec<u32>,
    /// What for.
    pub goal: Goal,
    /// It ends with [`ScheduleError::TimedOut`] then.
    pub deadline: Option<Instant>,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ScheduleError {
    /// The engine failed or refused.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The strategy failed or refused.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The queue is full.
    #[error("{queued} requests are waiting already; try again later")]
    Busy {
        /// Requests in the queue.
        queued: usize,
    },
    /// The deadline passed.
    #[error("the request's time is over")]
    TimedOut,
    /// The scheduler ends.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// No document is kept under the name.
    #[error("no document is kept under {0:?}")]
    NotKept(String),
    /// There will never be room.
    #[error("keys and values need {need} bytes, {left} bytes are left beside kept documents")]
    Memory {
        /// Bytes that the request needs.
        need: u64,
        /// Bytes of the limit that documents leave.
        left: u64,
    },
}

/// What a request took.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// From submission to the first pass.
    pub queued: Duration,
    /// Of reading the prompt.
    pub prefill: Duration,
    /// Of writing.
    pub decode: Duration,
    /// Tokens of the prompt whose keys and values were there already.
    pub cached: usize,
    /// Tokens that the prompt's base held before.
    pub base: usize,
    /// Passes that writing took.
    pub forwards: usize,
    /// Where the first answer looked: ranges of tokens with their share of the looks.
    pub looked: Vec<(Range<u64>, f32)>,
}

/// What a request is told while it is served.
#[derive(Debug)]
pub enum Event {
    /// So much of the prompt is read.
    Progress {
        /// Tokens read.
        read: usize,
        /// Of so many.
        total: usize,
    },
    /// Tokens of the prompt, from its second on, with log probabilities; in order, in pieces.
    Echo(Vec<Choice>),
    /// A token of an answer. [`ControlFlow::Break`] ends that answer.
    Token {
        /// Which answer.
        answer: usize,
        /// The token.
        choice: Choice,
    },
    /// An answer is complete.
    Ended {
        /// Which answer.
        answer: usize,
        /// What the strategy found.
        outcome: Outcome,
    },
    /// All is done; the last event.
    Finished(Summary),
    /// It failed; the last event.
    Failed(ScheduleError),
}

/// Where events go, on the engine's thread: it must not block. [`ControlFlow::Break`] ends the request, or one
/// answer of it after [`Event::Token`].
pub type Sink = Box<dyn FnMut(Event) -> ControlFlow<()> + Send>;

/// Counters and gauges.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests that wait.
    pub queued: AtomicU64,
    /// Requests whose prompts are being read.
    pub reading: AtomicU64,
    /// Requests whose answers are being written.
    pub writing: AtomicU64,
    /// Documents kept.
    pub kept: AtomicU64,
    /// Bytes of keys and values of running requests.
    pub running_bytes: AtomicU64,
    /// Bytes of keys and values of kept documents.
    pub kept_bytes: AtomicU64,
    /// Bytes reserved for running requests.
    pub reserved_bytes: AtomicU64,
    /// Requests that finished.
    pub finished: AtomicU64,
    /// Requests that failed.
    pub failed: AtomicU64,
    /// Requests whose clients went away.
    pub cancelled: AtomicU64,
    /// Tokens of prompts computed.
    pub prompt_tokens: AtomicU64,
    /// Tokens of prompts that were there already.
    pub cached_tokens: AtomicU64,
    /// Tokens written.
    pub answer_tokens: AtomicU64,
    /// Passes over the model.
    pub passes: AtomicU64,
    /// Passes that served more than one request.
    pub shared_passes: AtomicU64,
    /// Nanoseconds in passes.
    pub busy_nanos: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// A request in the scheduler. Dropping it ends the request.
#[derive(Debug)]
pub struct Ticket(Arc<AtomicBool>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

pub(crate) struct Waiting {
    job: Job,
    sink: Sink,
    dropped: Arc<AtomicBool>,
    since: Instant,
}

pub(crate) enum Command {
    Submit(Box<Waiting>),
    Restore(SessionDir, String, Sender<Result<usize, ScheduleError>>),
    Forget(String, Sender<bool>),
    ForgetPrefixes(Sender<()>),
    Stop(Instant),
}

/// See the module's text.
pub struct Scheduler {
    commands: Sender<Command>,
    counters: Arc<Counters>,
    max_queued: usize,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Scheduler {
    /// Starts the thread.
    pub fn new(engine: Arc<Engine>, options: ScheduleOptions) -> Scheduler {
        let (commands, receiver) = channel();
        let counters = Arc::new(Counters::default());
        let max_queued = options.max_queued;
        let shared = counters.clone();
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || {
                longspan_kernels::pool::Pool::global().pin_caller();
                core::drive(engine, options, &shared, &receiver);
                // What runs no longer must not seem to.
                for gauge in [
                    &shared.queued,
                    &shared.reading,
                    &shared.writing,
                    &shared.running_bytes,
                ] {
                    gauge.store(0, Ordering::Relaxed);
                }
            })
            .expect("a thread can be started");
        Scheduler {
            commands,
            counters,
            max_queued,
            thread: Mutex::new(Some(thread)),
        }
    }

    /// Counters and gauges.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// True while the engine's thread runs.
    pub fn alive(&self) -> bool {
        let thread = self.thread.lock();
        let thread = thread.unwrap_or_else(|poison| poison.into_inner());
        thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Puts a request into the queue.
    ///
    /// # Errors
    /// [`ScheduleError::Busy`] or [`ScheduleError::ShuttingDown`].
    pub fn submit(&self, job: Job, sink: Sink) -> Result<Ticket, ScheduleError> {
        let queued = self.counters.queued.fetch_add(1, Ordering::AcqRel) as usize;
        if queued >= self.max_queued {
            self.counters.queued.fetch_sub(1, Ordering::AcqRel);
            return Err(ScheduleError::Busy { queued });
        }
        let dropped = Arc::new(AtomicBool::new(false));
        let waiting = Waiting {
            job,
            sink,
            dropped: dropped.clone(),
            since: Instant::now(),
        };
        self.send(Command::Submit(Box::new(waiting)))?;
        Ok(Ticket(dropped))
    }

    fn send(&self, command: Command) -> Result<(), ScheduleError> {
        let sent = self.commands.send(command);
        sent.map_err(|_| ScheduleError::ShuttingDown)
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<T, ScheduleError> {
        let (sender, receiver) = channel();
        self.send(command(sender))?;
        receiver.recv().map_err(|_| ScheduleError::ShuttingDown)
    }

    /// Keeps a document that an earlier process saved; its tokens. Blocks between two passes.
    pub fn restore(&self, from: SessionDir, id: &str) -> Result<usize, ScheduleError> {
        self.ask(|sender| Command::Restore(from, id.to_string(), sender))?
    }

    /// Lets a kept document go; false if there was none. Requests that ask about it go on.
    pub fn forget(&self, id: &str) -> Result<bool, ScheduleError> {
        self.ask(|sender| Command::Forget(id.to_string(), sender))
    }

    /// Lets go what is kept of finished talks.
    pub fn forget_prefixes(&self) -> Result<(), ScheduleError> {
        self.ask(Command::ForgetPrefixes)
    }

    /// Refuses new requests, gives running ones this long, and ends.
    pub fn stop(&self, grace: Duration) {
        let _ = self.send(Command::Stop(Instant::now() + grace));
        let thread = self.thread.lock();
        let thread = thread.unwrap_or_else(|poison| poison.into_inner()).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.stop(Duration::ZERO);
    }
}
