//! The loop of the engine's thread.

use super::running::{Result, Running, State};
use super::{
    Base, Command, Counters, Event, Goal, Job, ScheduleError, ScheduleOptions, Summary, Waiting,
    add,
};
use crate::context::ContextConfig;
use crate::decode::Action;
use crate::engine::{Engine, EngineError, EngineOptions, Sequence, Want};
use crate::prefix::PrefixCache;
use crate::session::{Mode, SessionDir};
use longspan_nn::position::RopeOverride;
use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

/// Rotary rules served at once, the engine's own among them.
const MAX_RULES: usize = 16;

/// Time between two looks at the bytes that sequences hold.
const GAUGE_EVERY: Duration = Duration::from_millis(100);

/// A rotary rule with the engine that applies it. All share their weights.
struct Lane {
    rope: Option<RopeOverride>,
    engine: Arc<Engine>,
}

struct Kept {
    lane: usize,
    sequence: Sequence,
    bytes: u64,
}

struct Core<'e> {
    options: ScheduleOptions,
    counters: &'e Counters,
    lanes: &'e [OnceCell<Lane>],
    /// Of finished talks, by lane.
    prefixes: Vec<PrefixCache>,
    kept: BTreeMap<String, Kept>,
    queue: Vec<Waiting>,
    running: Vec<Running<'e>>,
    /// The request whose prompt is read next is the first at or after this number.
    turn: u64,
    numbers: u64,
    stopping: Option<Instant>,
    gauged: Instant,
}

pub(super) fn drive(
    engine: Arc<Engine>,
    options: ScheduleOptions,
    counters: &Counters,
    commands: &Receiver<Command>,
) {
    let lanes: Vec<OnceCell<Lane>> = (0..MAX_RULES).map(|_| OnceCell::new()).collect();
    let rope = engine.rope().cloned();
    let _ = lanes[0].set(Lane { rope, engine });
    let mut core = Core {
        prefixes: (0..MAX_RULES)
            .map(|_| PrefixCache::new(options.prefix_bytes))
            .collect(),
        options,
        counters,
        lanes: &lanes,
        kept: BTreeMap::new(),
        queue: Vec::new(),
        running: Vec::new(),
        turn: 0,
        numbers: 0,
        stopping: None,
        gauged: Instant::now(),
    };
    loop {
        if core.running.is_empty() && core.queue.is_empty() {
            core.gauge(true);
            if core.stopping.is_some() {
                return;
            }
            match commands.recv() {
                Ok(command) => core.obey(command),
                Err(_) => return,
            }
        }
        loop {
            match commands.try_recv() {
                Ok(command) => core.obey(command),
                Err(TryRecvError::Empty) => break,
                // The scheduler was dropped without a word.
                Err(TryRecvError::Disconnected) => {
                    core.stopping.get_or_insert_with(Instant::now);
                    break;
                }
            }
        }
        core.sweep();
        core.admit();
        for lane in 0..core.lanes.len() {
            core.pass(lane);
        }
        core.settle();
        core.gauge(false);
    }
}

impl<'e> Core<'e> {
    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(waiting) => self.queue.push(*waiting),
            Command::Restore(from, id, answer) => {
                let _ = answer.send(self.restore(&from, id));
            }
            Command::Forget(id, answer) => {
                let _ = answer.send(self.kept.remove(&id).is_some());
                self.gauge(true);
            }
            Command::ForgetPrefixes(answer) => {
                let limit = self.options.prefix_bytes;
                self.prefixes
                    .iter_mut()
                    .for_each(|cache| *cache = PrefixCache::new(limit));
                let _ = answer.send(());
            }
            Command::Stop(by) => self.stopping = Some(by),
        }
    }

    /// The lane of a rotary rule; None is the engine's own.
    fn lane(&self, rope: Option<RopeOverride>) -> Result<usize> {
        let Some(rope) = rope else { return Ok(0) };
        let rope = Some(rope);
        for (index, cell) in self.lanes.iter().enumerate() {
            match cell.get() {
                Some(lane) if lane.rope == rope => return Ok(index),
                Some(_) => {}
                None => {
                    let own = self.engine(0);
                    let engine = Arc::new(own.under_rope(rope.clone())?);
                    let _ = cell.set(Lane { rope, engine });
                    return Ok(index);
                }
            }
        }
        let message = format!("{MAX_RULES} rotary rules are in use already; ask with one of those");
        Err(EngineError::Refused(message).into())
    }

    fn engine(&self, lane: usize) -> &'e Engine {
        &self.lanes[lane].get().expect("lanes in use are set").engine
    }

    fn kept_bytes(&self) -> u64 {
        self.kept.values().map(|kept| kept.bytes).sum()
    }

    fn restore(&mut self, from: &SessionDir, id: String) -> Result<usize> {
        let lane = self.lane(from.header()?.rope)?;
        let (sequence, _) = from.load(self.engine(lane), Mode::Read)?;
        let tokens = sequence.len();
        self.keep(id, lane, sequence);
        Ok(tokens)
    }

    fn keep(&mut self, id: String, lane: usize, sequence: Sequence) {
        let bytes = sequence.kv_bytes().memory;
        let kept = Kept {
            lane,
            sequence,
            bytes,
        };
        self.kept.insert(id, kept);
    }

    /// Ends what was given up, what is late, and, when the time for stopping is over, everything.
    fn sweep(&mut self) {
        let now = Instant::now();
        let over = self.stopping.is_some_and(|by| now >= by);
        let stopping = self.stopping.is_some();
        let counters = self.counters;
        let late = |deadline: Option<Instant>| deadline.is_some_and(|deadline| now >= deadline);
        self.queue.retain_mut(|waiting| {
            let error = if waiting.dropped.load(Ordering::Acquire) {
                add(&counters.cancelled, 1);
                None
            } else if stopping {
                Some(ScheduleError::ShuttingDown)
            } else if late(waiting.job.deadline) {
                Some(ScheduleError::TimedOut)
            } else {
                return true;
            };
            counters.queued.fetch_sub(1, Ordering::AcqRel);
            if let Some(error) = error {
                add(&counters.failed, 1);
                let _ = (waiting.sink)(Event::Failed(error));
            }
            false
        });
        self.running.retain_mut(|running| {
            if running.broken || running.dropped.load(Ordering::Acquire) {
                add(&counters.cancelled, 1);
                return false;
            }
            let error = if over {
                ScheduleError::ShuttingDown
            } else if late(running.deadline) {
                ScheduleError::TimedOut
            } else {
                return true;
            };
            add(&counters.failed, 1);
            running.tell(Event::Failed(error));
            false
        });
    }

    /// Starts waiting requests: of the client with the fewest running ones, the one that came first. One that finds no
    /// room holds up those behind it, so that large ones get their turn.
    fn admit(&mut self) {
        while self.running.len() < self.options.max_running.max(1) {
            let of_client = |client: u64| {
                let same = self.running.iter().filter(|r| r.client == client);
                same.count()
            };
            let next = self.queue.iter().enumerate();
            let Some((index, _)) =
                next.min_by_key(|(index, waiting)| (of_client(waiting.job.client), *index))
            else {
                return;
            };
            let need = self.need(&self.queue[index].job);
            let kept = self.kept_bytes();
            let left = self.options.kv_bytes.saturating_sub(kept);
            let reserved: u64 = self.running.iter().map(|running| running.reserved).sum();
            if need <= left && reserved + need > left {
                return;
            }
            let waiting = Box::new(self.queue.remove(index));
            self.counters.queued.fetch_sub(1, Ordering::AcqRel);
            let mut refused = None;
            if need > left {
                refused = Some((ScheduleError::Memory { need, left }, waiting));
            } else {
                match self.start(waiting, need) {
                    Ok(running) => self.running.push(running),
                    Err(failed) => refused = Some(failed),
                }
            }
            if let Some((error, mut waiting)) = refused {
                add(&self.counters.failed, 1);
                let _ = (waiting.sink)(Event::Failed(error));
            }
        }
    }

    /// Bytes of keys and values that a request will hold.
    fn need(&self, job: &Job) -> u64 {
        let (options, lane) = match &job.base {
            Base::Empty(options, _) => (options.clone(), 0),
            Base::Kept(id) => match self.kept.get(id) {
                Some(kept) => (kept.sequence.options().clone(), kept.lane),
                None => return 0,
            },
        };
        let engine = self.engine(lane);
        let written = match &job.goal {
            Goal::Answer {
                strategies,
                max_tokens,
                ..
            } => strategies.len().max(1) * max_tokens,
            Goal::Keep { .. } => 0,
        };
        let mut bytes = engine.kv_bytes_per_token(options.kv);
        // Un-rotated keys are kept beside the rotated ones, of which only the newest stay.
        if matches!(options.context, ContextConfig::LmInfinite(_)) {
            bytes += bytes / 2;
        }
        (job.prompt.len() + written) as u64 * bytes
    }

    #[allow(clippy::result_large_err)] // the request goes back to be told
    fn start(
        &mut self,
        mut waiting: Box<Waiting>,
        reserved: u64,
    ) -> std::result::Result<Running<'e>, (ScheduleError, Box<Waiting>)> {
        match self.begin(&mut waiting.job) {
            Ok((lane, sequence, cached, base)) => {
                let Waiting {
                    job,
                    sink,
                    dropped,
                    since,
                } = *waiting;
                self.numbers += 1;
                add(&self.counters.cached_tokens, cached as u64);
                let watched = base > 0;
                Ok(Running {
                    number: self.numbers,
                    client: job.client,
                    lane,
                    engine: self.engine(lane),
                    prompt: job.prompt,
                    goal: job.goal,
                    state: State::Reading {
                        sequence: Box::new(sequence),
                        read: cached,
                        watched,
                    },
                    sink,
                    dropped,
                    deadline: job.deadline,
                    reserved,
                    summary: Summary {
                        queued: since.elapsed(),
                        cached: cached + base,
                        base,
                        ..Summary::default()
                    },
                    since: Instant::now(),
                    broken: false,
                })
            }
            Err(error) => Err((error, waiting)),
        }
    }

    /// Lane and sequence of a request, the tokens of its prompt that the sequence holds already, and those before.
    fn begin(&mut self, job: &mut Job) -> Result<(usize, Sequence, usize, usize)> {
        if job.prompt.is_empty() {
            return Err(EngineError::Refused("there are no tokens to read".into()).into());
        }
        let (lane, mut sequence, base) = match &job.base {
            Base::Kept(id) => {
                let kept = self.kept.get(id);
                let kept = kept.ok_or_else(|| ScheduleError::NotKept(id.clone()))?;
                (kept.lane, kept.sequence.fork(), kept.sequence.len())
            }
            Base::Empty(options, rope) => {
                let lane = self.lane(rope.clone())?;
                let found = self.known(lane, options, job)?;
                let sequence = match found {
                    Some(sequence) => sequence,
                    None => self.engine(lane).sequence(options, None)?,
                };
                (lane, sequence, 0)
            }
        };
        let cached = sequence.len() - base;
        match &job.goal {
            Goal::Answer {
                max_tokens, watch, ..
            } => {
                sequence.begin_round(job.prompt.len() - cached);
                let whole = base + job.prompt.len() + max_tokens;
                sequence.expected_length = sequence.expected_length.max(whole);
                if *watch && base > 0 {
                    sequence.watch();
                }
            }
            Goal::Keep { room, .. } => sequence.expect_length(job.prompt.len() + room),
        }
        Ok((lane, sequence, cached, base))
    }

    /// A finished talk that the prompt goes on.
    fn known(
        &mut self,
        lane: usize,
        options: &EngineOptions,
        job: &Job,
    ) -> Result<Option<Sequence>> {
        // Other policies forget: what they would see depends on how the text was cut into calls.
        let usable = options.context == ContextConfig::Full
            && matches!(job.goal, Goal::Answer { echo: None, .. });
        if !usable {
            return Ok(None);
        }
        let engine = self.engine(lane);
        let same = |kept: &Sequence| kept.options().kv == options.kv;
        Ok(self.prefixes[lane].find(engine, &job.prompt, same)?)
    }

    /// One pass over the model for the requests of a lane.
    fn pass(&mut self, lane: usize) {
        let here = self.running.iter().filter(|running| running.lane == lane);
        let here: Vec<u64> = here.map(|running| running.number).collect();
        if here.is_empty() {
            return;
        }
        let start = Instant::now();
        self.joint(lane, &here);
        for running in self.running.iter_mut().filter(|r| r.lane == lane) {
            let before = running.emitted();
            match running.trees() {
                Ok(0) => {}
                Ok(_) => add(&self.counters.passes, 1),
                Err(error) => fail(self.counters, running, error),
            }
            let written = running.emitted().saturating_sub(before);
            add(&self.counters.answer_tokens, written as u64);
        }
        add(&self.counters.busy_nanos, start.elapsed().as_nanos() as u64);
    }

    /// Reads one token into every sequence that is written, and a slice of the prompts.
    fn joint(&mut self, lane: usize, numbers: &[u64]) {
        let engine = self.engine(lane);
        let cpu = engine.model().device().is_cpu();
        let pieces = self.pieces(numbers);
        let mut batch: Vec<(&mut Sequence, &[u32])> = Vec::new();
        let mut served = Vec::new();
        let mut want = Want::Nothing;
        let mut echoed = None;
        for running in &mut self.running {
            let number = running.number;
            if !numbers.contains(&number) {
                continue;
            }
            let before = batch.len();
            if let Some(&(_, piece)) = pieces.iter().find(|(n, _)| *n == number) {
                if running.echo().is_some() {
                    echoed = Some((number, piece));
                    continue;
                }
                let whole = match &running.state {
                    State::Reading { read, .. } => read + piece == running.prompt.len(),
                    _ => false,
                };
                if whole && running.answers() {
                    want = Want::Last;
                }
                batch.extend(running.lend_piece(piece));
            } else if let State::Writing(answers) = &mut running.state {
                for answer in answers {
                    let Some(Action::Step(rows)) = &answer.action else {
                        continue;
                    };
                    match answer.session.lend(rows) {
                        Ok(lent) => {
                            let tokens = rows.iter().map(|(_, token)| std::slice::from_ref(token));
                            batch.extend(lent.into_iter().zip(tokens));
                            want = Want::Last;
                        }
                        Err(error) => answer.error = Some(error.into()),
                    }
                }
            }
            let rows = batch.len() - before;
            if rows > 0 {
                served.push((number, rows));
            }
        }
        if !batch.is_empty() {
            let result = if cpu || batch.len() == 1 {
                engine.forward(&mut batch, want)
            } else {
                // Other devices run one sequence at a time.
                let mut logits = Vec::new();
                let each = batch.into_iter().try_for_each(|row| {
                    logits.extend(engine.forward(&mut [row], want)?);
                    Ok(())
                });
                each.map(|()| logits)
            };
            add(&self.counters.passes, 1);
            match result {
                Ok(logits) => {
                    if served.len() > 1 {
                        add(&self.counters.shared_passes, 1);
                    }
                    self.deliver(engine, &served, &pieces, want, &logits);
                }
                // One request must not take the others with it.
                Err(_) if served.len() > 1 => {
                    for (number, _) in served {
                        self.joint(lane, &[number]);
                    }
                }
                Err(error) => {
                    let mut all = self.running.iter_mut();
                    if let Some(running) = all.find(|r| r.number == served[0].0) {
                        fail(self.counters, running, error.into());
                    }
                }
            }
        }
        if let Some((number, piece)) = echoed {
            self.echo(engine, number, piece);
        }
    }

    /// Which prompts are read in the next pass, and how many tokens of each.
    fn pieces(&mut self, numbers: &[u64]) -> Vec<(u64, usize)> {
        let mine = |running: &&Running<'e>| numbers.contains(&running.number);
        let writes = self.running.iter().filter(mine).any(|running| {
            matches!(&running.state, State::Writing(answers) if answers.iter().any(|a| a.action.is_some()))
        });
        let mut budget = if writes {
            self.options.slice.max(1)
        } else {
            usize::MAX
        };
        let mut readers: Vec<&Running<'e>> = self
            .running
            .iter()
            .filter(mine)
            .filter(|running| matches!(running.state, State::Reading { .. }))
            .collect();
        // Round and round, from the one whose turn it is.
        readers.sort_by_key(|running| (running.number < self.turn, running.number));
        let mut pieces: Vec<(u64, usize)> = Vec::new();
        let mut echoes = false;
        for running in readers {
            let Some(piece) = running.next_piece(budget) else {
                continue;
            };
            let echo = running.echo().is_some();
            // Policies with blocks may need more than is left; only the first may take it.
            if (piece > budget && !pieces.is_empty()) || (echo && echoes) {
                continue;
            }
            echoes |= echo;
            if pieces.is_empty() {
                self.turn = running.number + 1;
                // Nobody writes: one call as large as its policy likes, and whoever fits beside it.
                budget = budget.min(piece.max(self.options.slice));
            }
            budget = budget.saturating_sub(piece);
            pieces.push((running.number, piece));
            if budget == 0 {
                break;
            }
        }
        pieces
    }

    /// Hands logits out in the order of the batch.
    fn deliver(
        &mut self,
        engine: &Engine,
        served: &[(u64, usize)],
        pieces: &[(u64, usize)],
        want: Want<'_>,
        logits: &[f32],
    ) {
        let vocab = engine.model().config().vocab_size;
        let mut first = 0;
        for &(number, rows) in served {
            let mine = match want {
                Want::Nothing => &[][..],
                _ => &logits[first * vocab..(first + rows) * vocab],
            };
            first += rows;
            let mut all = self.running.iter_mut();
            let Some(running) = all.find(|running| running.number == number) else {
                continue;
            };
            let before = running.emitted();
            let result = match pieces.iter().find(|(n, _)| *n == number) {
                Some(&(_, piece)) => {
                    add(&self.counters.prompt_tokens, piece as u64);
                    running.piece_read(piece, mine)
                }
                None => running.stepped(mine).map(|_| ()),
            };
            let written = running.emitted().saturating_sub(before);
            add(&self.counters.answer_tokens, written as u64);
            if let Err(error) = result {
                fail(self.counters, running, error);
            }
        }
    }

    /// A piece of a prompt whose own log probabilities are asked for, in a pass of its own: it needs all logits.
    fn echo(&mut self, engine: &Engine, number: u64, piece: usize) {
        let mut all = self.running.iter_mut();
        let Some(running) = all.find(|running| running.number == number) else {
            return;
        };
        let Some((sequence, tokens)) = running.lend_piece(piece) else {
            return;
        };
        add(&self.counters.passes, 1);
        add(&self.counters.prompt_tokens, piece as u64);
        let read = engine.forward(&mut [(sequence, tokens)], Want::All);
        let told = read
            .map_err(ScheduleError::from)
            .and_then(|logits| running.piece_read(piece, &logits));
        add(&self.counters.answer_tokens, running.emitted() as u64);
        if let Err(error) = told {
            fail(self.counters, running, error);
        }
    }

    /// Ends what is complete.
    fn settle(&mut self) {
        let done = |running: &Running<'_>| match &running.state {
            State::Reading { read, .. } => *read == running.prompt.len(),
            State::Writing(_) => running.written(),
            State::Over => true,
        };
        let mut index = 0;
        while index < self.running.len() {
            if !done(&self.running[index]) {
                index += 1;
                continue;
            }
            let mut running = self.running.remove(index);
            if running.broken {
                add(&self.counters.cancelled, 1);
                continue;
            }
            if let State::Reading { .. } = running.state {
                match self.store(&mut running) {
                    Ok(()) => {}
                    Err(error) => {
                        fail(self.counters, &mut running, error);
                        continue;
                    }
                }
            } else if let State::Writing(_) = running.state {
                let root = running.finish();
                if let Some(root) = root.filter(|root| {
                    running.summary.base == 0 && root.options().context == ContextConfig::Full
                }) {
                    self.prefixes[running.lane].keep(root);
                }
            } else {
                continue; // it failed and was told so
            }
            add(&self.counters.finished, 1);
            let summary = std::mem::take(&mut running.summary);
            // The client may ask for counters right after: they must be true by then.
            drop(std::mem::replace(&mut running.state, State::Over));
            self.gauge(true);
            running.tell(Event::Finished(summary));
        }
    }

    /// Keeps a document that is read.
    fn store(&mut self, running: &mut Running<'e>) -> Result<()> {
        let state = std::mem::replace(&mut running.state, State::Over);
        let (State::Reading { mut sequence, .. }, Goal::Keep { id, save, .. }) =
            (state, &mut running.goal)
        else {
            return Ok(());
        };
        running.engine.seal(&mut sequence)?;
        if let Some((directory, note)) = save.take() {
            directory.save(running.engine, &sequence, note)?;
        }
        let id = std::mem::take(id);
        self.keep(id, running.lane, *sequence);
        Ok(())
    }

    fn gauge(&mut self, now: bool) {
        let set = |gauge: &std::sync::atomic::AtomicU64, value: u64| {
            gauge.store(value, Ordering::Relaxed);
        };
        let counters = self.counters;
        let reading = |running: &&Running<'_>| matches!(running.state, State::Reading { .. });
        let reads = self.running.iter().filter(reading).count();
        set(&counters.reading, reads as u64);
        set(&counters.writing, (self.running.len() - reads) as u64);
        set(&counters.kept, self.kept.len() as u64);
        let reserved = self.running.iter().map(|running| running.reserved);
        set(&counters.reserved_bytes, reserved.sum());
        if now || self.gauged.elapsed() > GAUGE_EVERY {
            self.gauged = Instant::now();
            let bytes = self.running.iter().map(Running::kv_bytes);
            set(&counters.running_bytes, bytes.sum());
            set(&counters.kept_bytes, self.kept_bytes());
        }
    }
}

/// Tells a request that it failed and frees what it holds.
fn fail(counters: &Counters, running: &mut Running<'_>, error: ScheduleError) {
    add(&counters.failed, 1);
    running.state = State::Over;
    running.tell(Event::Failed(error));
}
