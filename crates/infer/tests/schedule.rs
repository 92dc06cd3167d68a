//! The scheduler: many requests at once give what each gives alone, a long prompt does not hold up those that write,
//! and whatever happens, pages return to zero. Tiny models, f32 caches.

mod common;

use common::{ids, options};
use longspan_infer::Engine;
use longspan_infer::decode::logits::SamplingConfig;
use longspan_infer::decode::{DecodeConfig, EngineSession, Request, run};
use longspan_infer::kv::plane::live_planes;
use longspan_infer::schedule::{
    Base, Event, Goal, Job, ScheduleError, ScheduleOptions, Scheduler, Summary, Ticket,
};
use longspan_infer::session::SessionDir;
use longspan_kernels::attention::KvDtype;
use longspan_nn::config::ModelConfig;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Planes are counted for the whole process, so tests take turns.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|poison| poison.into_inner())
}

fn engine() -> Arc<Engine> {
    let longer = |config: &mut ModelConfig| config.context_length = 4096;
    Arc::new(common::engine_with("llama-tied", longer))
}

fn vocab(engine: &Engine) -> usize {
    engine.model().config().vocab_size
}

fn sampling(seed: Option<u64>) -> SamplingConfig {
    SamplingConfig {
        temperature: if seed.is_some() { 1.0 } else { 0.0 },
        seed: seed.unwrap_or(0),
        ..SamplingConfig::default()
    }
}

/// What a request gives by itself.
fn alone(
    engine: &Engine,
    context: &str,
    prompt: &[u32],
    decode: &str,
    seed: Option<u64>,
    max_tokens: usize,
) -> Vec<u32> {
    let mut sequence = engine.sequence(&options(context), None).unwrap();
    sequence.expect_length(prompt.len() + max_tokens);
    let logits = engine
        .prefill(&mut sequence, prompt, &mut |_, _| {
            Ok(ControlFlow::Continue(()))
        })
        .unwrap();
    let decode: DecodeConfig = decode.parse().unwrap();
    let mut strategy = decode.build(&sampling(seed), 0, None).unwrap();
    let mut tokens = Vec::new();
    let request = Request {
        seq: EngineSession::ROOT,
        eos: vec![1],
        max_tokens,
    };
    let mut session = EngineSession::new(engine, &mut sequence);
    run(
        &mut session,
        &mut *strategy,
        &request,
        logits,
        &mut |event| {
            if let longspan_infer::decode::Event::Token(choice) = event {
                tokens.push(choice.token);
            }
            ControlFlow::Continue(())
        },
    )
    .unwrap();
    tokens
}

fn job(context: &str, prompt: Vec<u32>, decode: &str, seed: Option<u64>, max_tokens: usize) -> Job {
    let decode: DecodeConfig = decode.parse().unwrap();
    Job {
        client: 0,
        base: Base::Empty(options(context), None),
        prompt,
        goal: Goal::Answer {
            strategies: vec![decode.build(&sampling(seed), 0, None).unwrap()],
            eos: vec![1],
            max_tokens,
            echo: None,
            watch: false,
        },
        deadline: None,
    }
}

fn keep(id: &str, prompt: Vec<u32>, context: &str) -> Job {
    Job {
        client: 0,
        base: Base::Empty(options(context), None),
        prompt,
        goal: Goal::Keep {
            id: id.into(),
            room: 64,
            save: None,
        },
        deadline: None,
    }
}

struct Asked {
    ticket: Ticket,
    events: Receiver<Event>,
}

fn submit(scheduler: &Scheduler, job: Job) -> Asked {
    let (sender, events) = channel();
    let sink = Box::new(move |event| match sender.send(event) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    });
    let ticket = scheduler.submit(job, sink).unwrap();
    Asked { ticket, events }
}

fn result(asked: Asked) -> Result<(Vec<u32>, Summary), ScheduleError> {
    let Asked { ticket, events } = asked;
    let mut tokens = Vec::new();
    for event in &events {
        match event {
            Event::Token { choice, .. } => tokens.push(choice.token),
            Event::Finished(summary) => return Ok((tokens, summary)),
            Event::Failed(error) => return Err(error),
            _ => {}
        }
    }
    drop(ticket);
    panic!("the request ended without a word");
}

fn small() -> ScheduleOptions {
    ScheduleOptions {
        slice: 16,
        prefix_bytes: 0,
        ..ScheduleOptions::default()
    }
}

/// Waits for what another thread does soon.
fn soon(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(30), "{what}");
        std::thread::yield_now();
    }
}

const INFLLM: &str =
    "infllm:n_init=4,n_local=16,block=8,topk=2,repr_topk=2,exec_block=8,max_cached=3,chunk=16";

#[test]
fn requests_at_once_give_what_each_gives_alone() {
    let _turn = turn();
    let before = live_planes();
    let engine = engine();
    let v = vocab(&engine);
    let mut cases = Vec::new();
    let contexts = [
        "full",
        "window:24",
        "sinks:3,20",
        INFLLM,
        "lm-infinite:20,3",
        "h2o:8,8",
    ];
    for (index, context) in contexts.iter().cycle().take(24).enumerate() {
        let decode = match (*context, index % 4) {
            ("full", 1) => "lookahead:branch_length=4,decoding_length=8",
            ("full", 3) => "beam:beams=3",
            _ => "plain",
        };
        let seed = (index % 3 == 0 && decode == "plain").then_some(index as u64);
        let prompt = ids(5 + 17 * (index % 7), index as u32, v);
        cases.push((*context, prompt, decode, seed, 6 + index % 9));
    }
    let scheduler = Scheduler::new(engine.clone(), small());
    let asked: Vec<Asked> = cases
        .iter()
        .map(|(context, prompt, decode, seed, max)| {
            submit(
                &scheduler,
                job(context, prompt.clone(), decode, *seed, *max),
            )
        })
        .collect();
    for ((context, prompt, decode, seed, max), asked) in cases.iter().zip(asked) {
        let (tokens, _) = result(asked).unwrap();
        let expected = alone(&engine, context, prompt, decode, *seed, *max);
        assert_eq!(
            tokens,
            expected,
            "{context} {decode} {} tokens",
            prompt.len()
        );
    }
    let counters = scheduler.counters();
    assert!(counters.shared_passes.load(Ordering::Relaxed) > 0);
    assert_eq!(counters.finished.load(Ordering::Relaxed), 24);
    assert_eq!(counters.running_bytes.load(Ordering::Relaxed), 0);
    assert_eq!(live_planes(), before);
}

/// Between two pieces of a long prompt everybody who writes gets a token.
#[test]
fn a_long_prompt_does_not_hold_up_those_who_write() {
    let _turn = turn();
    let engine = engine();
    let v = vocab(&engine);
    let scheduler = Scheduler::new(engine, small());
    let log = Arc::new(Mutex::new(Vec::new()));
    let (sender, done) = channel();
    let sink = |name: &'static str| {
        let (log, sender) = (log.clone(), sender.clone());
        Box::new(move |event: Event| {
            match event {
                Event::Token { .. } => log.lock().unwrap().push((name, "token")),
                Event::Progress { .. } => log.lock().unwrap().push((name, "read")),
                Event::Finished(_) | Event::Failed(_) => sender.send(name).unwrap(),
                _ => {}
            }
            ControlFlow::Continue(())
        })
    };
    let mut writer = job("full", ids(4, 1, v), "plain", None, 400);
    if let Goal::Answer { eos, .. } = &mut writer.goal {
        eos.clear();
    }
    let _writer = scheduler.submit(writer, sink("writer")).unwrap();
    soon("the writer writes", || !log.lock().unwrap().is_empty());
    let reader = job("full", ids(1600, 2, v), "plain", None, 1);
    let _reader = scheduler.submit(reader, sink("reader")).unwrap();
    assert_eq!(
        done.recv().unwrap(),
        "reader",
        "100 pieces of 16 tokens, 400 tokens to write"
    );
    let log = log.lock().unwrap();
    let reads: Vec<usize> = (0..log.len())
        .filter(|&at| log[at] == ("reader", "read"))
        .collect();
    assert_eq!(reads.len(), 100);
    for pair in reads.windows(2) {
        let between = &log[pair[0]..pair[1]];
        assert!(between.contains(&("writer", "token")), "{between:?}");
    }
}

#[test]
fn kept_documents_answer_as_if_read_anew() {
    let _turn = turn();
    let before = live_planes();
    let engine = engine();
    let v = vocab(&engine);
    let folder = tempfile::tempdir().unwrap();
    {
        let scheduler = Scheduler::new(engine.clone(), small());
        for (index, context) in ["full", INFLLM].into_iter().enumerate() {
            // A question longer than a block of InfLLM, whose last token is read alone, and one that fits.
            let (document, questions) = (ids(90, 7, v), [ids(9, 8, v), ids(6, 8, v)]);
            let session = SessionDir::new(folder.path().join(context.split(':').next().unwrap()));
            let mut reading = keep(context, document.clone(), context);
            if let Goal::Keep { save, .. } = &mut reading.goal {
                *save = Some((SessionDir::new(session.path()), serde_json::json!({})));
            }
            result(submit(&scheduler, reading)).unwrap();
            // By hand, as the command line does.
            let mut sequence = engine.sequence(&options(context), None).unwrap();
            sequence.expect_length(document.len() + 64);
            for piece in document.chunks(sequence.spec().chunk) {
                engine
                    .forward(
                        &mut [(&mut sequence, piece)],
                        longspan_infer::engine::Want::Nothing,
                    )
                    .unwrap();
            }
            engine.seal(&mut sequence).unwrap();
            let best = questions.each_ref().map(|question| {
                let logits = engine
                    .prefill(&mut sequence.fork(), question, &mut |_, _| {
                        Ok(ControlFlow::Continue(()))
                    })
                    .unwrap();
                longspan_infer::decode::logits::argmax(&logits) as u32
            });
            drop(sequence);
            for round in 0..3 {
                if round == 2 {
                    assert!(scheduler.forget(context).unwrap());
                    assert!(!scheduler.forget(context).unwrap());
                    assert_eq!(
                        scheduler
                            .restore(SessionDir::new(session.path()), context)
                            .unwrap(),
                        90
                    );
                }
                for (question, best) in questions.iter().zip(&best) {
                    let mut asked = job(context, question.clone(), "plain", None, 5);
                    asked.base = Base::Kept(context.into());
                    if let Goal::Answer { watch, .. } = &mut asked.goal {
                        *watch = true;
                    }
                    let (tokens, summary) = result(submit(&scheduler, asked)).unwrap();
                    let count = question.len();
                    assert_eq!(tokens[0], *best, "{context}, round {round}, {count} tokens");
                    assert_eq!((summary.base, summary.cached), (90, 90));
                    let shares: f32 = summary.looked.iter().map(|(_, share)| share).sum();
                    assert!(
                        (shares - 1.0).abs() < 1e-3,
                        "{context}: {:?}",
                        summary.looked
                    );
                }
            }
            assert_eq!(
                scheduler.counters().kept.load(Ordering::Relaxed),
                index as u64 + 1
            );
        }
        let mut asked = job("full", ids(3, 1, v), "plain", None, 5);
        asked.base = Base::Kept("nothing".into());
        let error = result(submit(&scheduler, asked)).unwrap_err();
        assert!(matches!(error, ScheduleError::NotKept(_)), "{error}");
    }
    assert_eq!(live_planes(), before);
}

#[test]
fn several_answers_share_their_prompt_and_echo_scores_it() {
    let _turn = turn();
    let engine = engine();
    let v = vocab(&engine);
    let scheduler = Scheduler::new(engine.clone(), small());
    let prompt = ids(100, 3, v);
    let decode = DecodeConfig::Plain;
    let strategies = (0..3)
        .map(|stream| decode.build(&sampling(Some(5)), stream, None).unwrap())
        .collect();
    let mut asked = job("full", prompt.clone(), "plain", None, 8);
    if let Goal::Answer {
        strategies: mine,
        echo,
        ..
    } = &mut asked.goal
    {
        *mine = strategies;
        *echo = Some(2);
    }
    let Asked { ticket, events } = submit(&scheduler, asked);
    let (mut answers, mut scores) = (vec![Vec::new(); 3], Vec::new());
    for event in &events {
        match event {
            Event::Token { answer, choice } => answers[answer].push(choice.token),
            Event::Echo(choices) => scores.extend(choices),
            Event::Failed(error) => panic!("{error}"),
            _ => {}
        }
    }
    drop(ticket);
    assert_eq!(
        answers[0],
        alone(&engine, "full", &prompt, "plain", Some(5), 8)
    );
    assert_ne!(answers[0], answers[1]);
    // Scores by hand, token by token.
    assert_eq!(scores.len(), prompt.len() - 1);
    let mut sequence = engine.sequence(&options("full"), None).unwrap();
    for (at, pair) in prompt.windows(2).enumerate() {
        let logits = engine
            .forward(
                &mut [(&mut sequence, &pair[..1])],
                longspan_infer::engine::Want::Last,
            )
            .unwrap();
        let exact = longspan_infer::decode::strategy::log_softmax(&logits)[pair[1] as usize];
        let found = &scores[at];
        assert_eq!((found.token, found.top.len()), (pair[1], 2));
        assert!(
            (f64::from(found.logprob) - exact).abs() < 1e-4,
            "token {at}"
        );
    }
}

#[test]
fn talks_that_go_on_are_not_read_twice() {
    let _turn = turn();
    let engine = engine();
    let v = vocab(&engine);
    let options = ScheduleOptions {
        prefix_bytes: 1 << 20,
        ..small()
    };
    let scheduler = Scheduler::new(engine.clone(), options);
    let mut talk = ids(60, 3, v);
    let (answer, summary) = result(submit(
        &scheduler,
        job("full", talk.clone(), "plain", None, 6),
    ))
    .unwrap();
    assert_eq!(summary.cached, 0);
    talk.extend(&answer);
    talk.extend(ids(10, 4, v));
    let (again, summary) = result(submit(
        &scheduler,
        job("full", talk.clone(), "plain", None, 6),
    ))
    .unwrap();
    assert!(
        summary.cached >= 60 + answer.len() - 1,
        "{}",
        summary.cached
    );
    assert_eq!(again, alone(&engine, "full", &talk, "plain", None, 6));
    scheduler.forget_prefixes().unwrap();
    let (_, summary) = result(submit(&scheduler, job("full", talk, "plain", None, 6))).unwrap();
    assert_eq!(summary.cached, 0);
}

#[test]
fn other_rotary_rules_stand_beside_the_own_one() {
    let _turn = turn();
    let engine = engine();
    let v = vocab(&engine);
    let scheduler = Scheduler::new(engine.clone(), small());
    let prompt = ids(40, 9, v);
    let rules = ["ntk:4", "linear:2"];
    let asked: Vec<Asked> = rules
        .iter()
        .map(|rule| {
            let mut job = job("full", prompt.clone(), "plain", None, 6);
            job.base = Base::Empty(options("full"), Some(rule.parse().unwrap()));
            submit(&scheduler, job)
        })
        .collect();
    for (rule, asked) in rules.iter().zip(asked) {
        let other = engine.under_rope(Some(rule.parse().unwrap())).unwrap();
        let (tokens, _) = result(asked).unwrap();
        assert_eq!(
            tokens,
            alone(&other, "full", &prompt, "plain", None, 6),
            "{rule}"
        );
    }
}

#[test]
fn given_up_late_and_impossible_requests_leave_nothing() {
    let _turn = turn();
    let before = live_planes();
    let engine = engine();
    let v = vocab(&engine);
    let bytes = engine.kv_bytes_per_token(KvDtype::F32);
    let options = ScheduleOptions {
        kv_bytes: bytes * 5000,
        max_running: 2,
        max_queued: 3,
        ..small()
    };
    let scheduler = Scheduler::new(engine, options);
    let endless = |max: usize| {
        let mut job = job("full", ids(8, 1, v), "plain", None, max);
        if let Goal::Answer { eos, .. } = &mut job.goal {
            eos.clear();
        }
        job
    };
    // Dropped while it writes, and while it waits.
    let counters = scheduler.counters().clone();
    let first = submit(&scheduler, endless(2000));
    let second = submit(&scheduler, endless(2000));
    soon("both write", || {
        counters.writing.load(Ordering::Relaxed) == 2
    });
    let waiting = submit(&scheduler, endless(10));
    assert_eq!(counters.queued.load(Ordering::Relaxed), 1);
    drop(waiting);
    soon("the queue is empty", || {
        counters.queued.load(Ordering::Relaxed) == 0
    });
    drop(first.ticket);
    drop(second.events);
    soon("nothing runs", || {
        counters.running_bytes.load(Ordering::Relaxed) == 0 && live_planes() == before
    });
    assert_eq!(counters.cancelled.load(Ordering::Relaxed), 3);

    // Too large for the memory there is.
    let error = result(submit(&scheduler, endless(6000))).unwrap_err();
    assert!(
        matches!(error, ScheduleError::Memory { need, left } if need > left),
        "{error}"
    );
    // No tokens, a policy that cannot be.
    let error = result(submit(
        &scheduler,
        job("full", Vec::new(), "plain", None, 1),
    ))
    .unwrap_err();
    assert!(error.to_string().contains("no tokens"), "{error}");
    let error = result(submit(
        &scheduler,
        job("window:0", ids(3, 1, v), "plain", None, 1),
    ))
    .unwrap_err();
    assert!(error.to_string().contains("size is 0"), "{error}");
    // Late.
    let mut late = endless(2000);
    late.deadline = Some(Instant::now());
    let error = result(submit(&scheduler, late)).unwrap_err();
    assert!(matches!(error, ScheduleError::TimedOut), "{error}");
    // A full queue.
    let running: Vec<Asked> = (0..2).map(|_| submit(&scheduler, endless(2000))).collect();
    soon("both write", || {
        counters.writing.load(Ordering::Relaxed) == 2
    });
    let queued: Vec<Asked> = (0..3).map(|_| submit(&scheduler, endless(10))).collect();
    let full = scheduler.submit(endless(10), Box::new(|_| ControlFlow::Continue(())));
    assert!(
        matches!(full, Err(ScheduleError::Busy { queued: 3 })),
        "{full:?}"
    );
    // The end: what waits and what runs is told.
    scheduler.stop(Duration::ZERO);
    for asked in running.into_iter().chain(queued) {
        let error = result(asked).unwrap_err();
        assert!(matches!(error, ScheduleError::ShuttingDown), "{error}");
    }
    assert!(!scheduler.alive());
    let after = scheduler.submit(endless(1), Box::new(|_| ControlFlow::Continue(())));
    assert!(
        matches!(after, Err(ScheduleError::ShuttingDown)),
        "{after:?}"
    );
    assert_eq!(live_planes(), before);
}

/// A client with many requests does not keep another one waiting behind all of them.
#[test]
fn clients_take_turns() {
    let _turn = turn();
    let engine = engine();
    let v = vocab(&engine);
    let options = ScheduleOptions {
        max_running: 2,
        ..small()
    };
    let scheduler = Scheduler::new(engine, options);
    let counters = scheduler.counters().clone();
    let endless = || {
        let mut job = job("full", ids(8, 1, v), "plain", None, 4000);
        job.client = 1;
        if let Goal::Answer { eos, .. } = &mut job.goal {
            eos.clear();
        }
        submit(&scheduler, job)
    };
    let (first, _second) = (endless(), endless());
    soon("both write", || {
        counters.writing.load(Ordering::Relaxed) == 2
    });
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut tickets = Vec::new();
    let (sender, done) = channel();
    for client in [1u64, 1, 1, 2] {
        let mut job = job("full", ids(20, 1, v), "plain", None, 3);
        job.client = client;
        let (order, sender) = (order.clone(), sender.clone());
        let sink = move |event: Event| {
            if let Event::Finished(_) | Event::Failed(_) = event {
                order.lock().unwrap().push(client);
                let _ = sender.send(());
            }
            ControlFlow::Continue(())
        };
        tickets.push(scheduler.submit(job, Box::new(sink)).unwrap());
    }
    // One place is free: it is the other client's turn.
    drop(first);
    (0..4).for_each(|_| done.recv().unwrap());
    assert_eq!(*order.lock().unwrap(), [2, 1, 1, 1]);
}
