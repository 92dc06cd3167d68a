//! Chains of agents and their baselines, over a reader that follows facts.

use super::filler;
use longspan_agents::chat::layers::{CacheMode, CacheStore, Cached};
use longspan_agents::chat::model::{Call, ChatError, ChatModel, Request};
use longspan_agents::chat::scripted::Scripted;
use longspan_agents::workflow::baselines::{self, Baseline};
use longspan_agents::workflow::chain::{
    Chain, ChainConfig, Paths, ReadOrder, manager_prompt, worker_prompt,
};
use longspan_agents::workflow::{Observer, Silent};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Facts "A -> B." of a text, in order.
fn facts(text: &str) -> Vec<(String, String)> {
    let sentences = text.split(['.', '\n']);
    let fact = |sentence: &str| {
        let (a, b) = sentence.split_once(" -> ")?;
        let a = a.split_whitespace().last()?;
        Some((a.to_string(), b.split_whitespace().next()?.to_string()))
    };
    sentences.filter_map(fact).collect()
}

/// A reader that only combines what its prompt shows: it follows the question's chain as far as its facts go. With
/// `needs_earlier`, it knows a fact to matter only once the notes lead to it.
fn reader(needs_earlier: bool) -> Scripted {
    Scripted::new(move |request: &Request| {
        let text = request.input.plain();
        let start = text
            .split("Where does ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next())
            .unwrap_or("")
            .to_string();
        let hops: usize = text
            .split(" lead in ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next())
            .unwrap()
            .parse()
            .unwrap();
        let known = facts(&text);
        let manager =
            text.contains("Answer from the summary") || text.contains("Answer the question");
        let judge = text.contains("Reply with yes or no");
        let mut at = start.clone();
        let mut used = Vec::new();
        for _ in 0..hops {
            let Some((a, b)) = known.iter().find(|(a, _)| *a == at) else {
                break;
            };
            used.push(format!("{a} -> {b}."));
            at = b.clone();
        }
        if manager {
            return Ok(if used.len() == hops {
                at
            } else {
                "not mentioned".into()
            });
        }
        // Names on the way are capital; filler is not. A reader of the easy kind notes every fact about them.
        let notes: Vec<String> = match needs_earlier {
            true => used,
            false => known
                .iter()
                .filter(|(a, _)| a.starts_with('N'))
                .map(|(a, b)| format!("{a} -> {b}."))
                .collect(),
        };
        if judge {
            return Ok(if notes.is_empty() { "No." } else { "Yes." }.into());
        }
        Ok(if notes.is_empty() {
            "not mentioned".into()
        } else {
            notes.join(" ")
        })
    })
    .window(400)
}

/// Hops in different chunks, forwards.
fn text(hops: usize) -> String {
    let mut text = filler(30);
    for hop in 0..hops {
        text.push_str(&format!("N{hop} -> N{}. {}", hop + 1, filler(60)));
    }
    text
}

fn reversed(hops: usize) -> String {
    let mut text = filler(30);
    for hop in (0..hops).rev() {
        text.push_str(&format!("N{hop} -> N{}. {}", hop + 1, filler(60)));
    }
    text
}

fn config() -> ChainConfig {
    ChainConfig {
        window: 400,
        max_output: 40,
        ..ChainConfig::default()
    }
}

fn chain(model: &Scripted, text: &str, hops: usize, config: ChainConfig) -> String {
    let query = format!("Where does N0 lead in {hops} steps?");
    Chain::new(model, config)
        .run(text, &query, &Call::default(), &mut Silent)
        .unwrap()
        .answer
}

#[test]
fn notes_that_are_handed_on_join_hops_and_others_do_not() {
    for hops in [2, 3] {
        let (text, goal) = (text(hops), format!("N{hops}"));
        let query = format!("Where does N0 lead in {hops} steps?");
        let call = Call::default();
        for needs_earlier in [true, false] {
            let model = reader(needs_earlier);
            assert_eq!(chain(&model, &text, hops, config()), goal);
            let run = |baseline| {
                let found = baselines::run(
                    baseline,
                    &model,
                    &config(),
                    &text,
                    &query,
                    &call,
                    &mut Silent,
                );
                found.unwrap().answer
            };
            assert_ne!(run(Baseline::Merge), goal);
            // Independent notes do only where a fact's worth can be seen without the earlier hop.
            assert_eq!(run(Baseline::Hierarchical) == goal, !needs_earlier);
            assert_ne!(run(Baseline::FullContext), goal);
        }
        // Hops in the reverse order: only reading backwards joins them.
        let text = reversed(hops);
        let model = reader(true);
        let off = ChainConfig {
            guard: false,
            ..config()
        };
        assert_ne!(chain(&model, &text, hops, off.clone()), goal);
        let rtl = ChainConfig {
            order: ReadOrder::Rtl,
            ..off.clone()
        };
        assert_eq!(chain(&model, &text, hops, rtl), goal);
        // The guard reads once more in the other order; so do two paths, whose vote drops nothing here.
        assert_eq!(chain(&model, &text, hops, config()), goal);
        let both = ChainConfig {
            paths: Paths::Bidir,
            ..off
        };
        let query = format!("Where does N0 lead in {hops} steps?");
        let found = Chain::new(&model, both)
            .run(&text, &query, &call, &mut Silent)
            .unwrap();
        assert!(found.paths.iter().any(|path| path.answer == goal));
    }
}

#[test]
fn prompts_are_as_written_and_fit() {
    let model = reader(true);
    let (text, query) = (text(2), "Where does N0 lead in 2 steps?");
    let chain = Chain::new(&model, config());
    let (chunks, budget) = chain.chunks(&text, query).unwrap();
    assert!(chunks.len() >= 3);
    assert_eq!(chunks.concat(), text);
    let found = chain
        .run(&text, query, &Call::default(), &mut Silent)
        .unwrap();
    let requests = model.requests();
    assert_eq!(requests.len(), chunks.len() + 1);
    assert_eq!(found.took.calls, requests.len());
    let mut notes = String::new();
    for ((chunk, unit), request) in chunks.iter().zip(&found.paths[0].units).zip(&requests) {
        assert!(chunk.split_whitespace().count() <= budget);
        assert_eq!(
            request.input.plain(),
            worker_prompt(Default::default(), chunk, &notes, query)
        );
        let tokens = model.count(&request.input).unwrap().tokens + request.max_tokens;
        assert!(tokens <= 400, "{tokens}");
        notes = unit.text.clone();
    }
    let last = requests.last().unwrap().input.plain();
    assert_eq!(last, manager_prompt(Default::default(), "", &notes, query));
    // A text of one chunk costs two calls.
    let short = reader(true);
    Chain::new(&short, config())
        .run("N0 -> N1. N1 -> N2.", query, &Call::default(), &mut Silent)
        .unwrap();
    assert_eq!(short.requests().len(), 2);
    // Backwards.
    let back = reader(true);
    let rtl = ChainConfig {
        order: ReadOrder::Rtl,
        guard: false,
        ..config()
    };
    Chain::new(&back, rtl)
        .run(&text, query, &Call::default(), &mut Silent)
        .unwrap();
    for (request, chunk) in back.requests().iter().zip(chunks.iter().rev()) {
        assert!(request.input.plain().starts_with(chunk));
    }
    // Too small a window is said before anything is asked.
    let small = reader(true).window(60);
    let error = Chain::new(&small, config())
        .run(&text, query, &Call::default(), &mut Silent)
        .unwrap_err();
    assert!(error.to_string().contains("window of 60"), "{error}");
    assert!(small.requests().is_empty());
}

#[test]
fn long_notes_are_shortened_and_rejections_do_not_spread() {
    let calls = AtomicUsize::new(0);
    let model = Scripted::new(move |_| {
        Ok(match calls.fetch_add(1, Ordering::SeqCst) {
            0 => "good evidence ".repeat(30),
            1 => "The text does not mention it.".into(),
            2 => String::new(),
            _ => "fine".into(),
        })
    });
    let narrow = ChainConfig {
        window: 300,
        max_output: 60,
        reserve: Some(20),
        ..ChainConfig::default()
    };
    let found = Chain::new(&model, narrow)
        .run(&filler(60), "What?", &Call::default(), &mut Silent)
        .unwrap();
    let units = &found.paths[0].units;
    assert!(units.len() >= 3);
    assert!(!units[0].kept_earlier && units[1].kept_earlier && units[2].kept_earlier);
    assert!(units[2].text.contains("evidence"));
    assert!(
        found
            .events
            .iter()
            .any(|event| event.contains("beyond 20 tokens")),
        "{:?}",
        found.events
    );
    let second = model.requests()[1].input.plain();
    let notes = second
        .split("before this: ")
        .nth(1)
        .unwrap()
        .split("\n\n")
        .next()
        .unwrap();
    assert!(
        notes.split_whitespace().count() <= 20 && notes.contains(" ... "),
        "{notes}"
    );
}

#[test]
fn chunks_are_read_ahead_where_the_model_can() {
    let (text, query) = (text(3), "Where does N0 lead in 3 steps?");
    let run = |model: &Scripted, order: ReadOrder| {
        let config = ChainConfig { order, ..config() };
        let chain = Chain::new(model, config);
        chain
            .run(&text, query, &Call::default(), &mut Silent)
            .unwrap()
    };
    for order in [ReadOrder::Ltr, ReadOrder::Rtl] {
        let (plain, ahead) = (reader(true), reader(true).reads_ahead());
        let (a, b) = (run(&plain, order), run(&ahead, order));
        assert_eq!((a.answer, &a.paths), (b.answer, &b.paths));
        assert!(plain.prepared().is_empty());
        // Every chunk but the first of each chain, in order, as its worker's prompt begins.
        let begun: Vec<String> = ahead.prepared().iter().map(|input| input.plain()).collect();
        let workers: Vec<String> = ahead
            .requests()
            .iter()
            .map(|request| request.input.plain())
            .filter(|prompt| prompt.contains("Read the source text"))
            .collect();
        assert_eq!(begun.len() + b.paths.len(), workers.len());
        let mut next = begun.iter();
        for (index, prompt) in workers.iter().enumerate() {
            if index % b.chunks > 0 {
                assert!(prompt.starts_with(next.next().unwrap()), "worker {index}");
            }
        }
    }
}

/// Notes what streams.
#[derive(Default)]
struct Stream(Vec<String>);

impl Observer for Stream {
    fn text(&mut self, piece: &str) {
        self.0.push(piece.into());
    }
}

#[test]
fn the_managers_answer_streams_unless_it_may_be_tried_again() {
    let long = "a b c d e f g h i j k l m n o p q r s t u v w x y z ".repeat(3);
    let run = |answer: &str, config: ChainConfig| {
        let answer = answer.to_string();
        let model = Scripted::new(move |request| {
            Ok(match request.input.plain().contains("was summarised") {
                true => answer.clone(),
                false => "evidence".into(),
            })
        });
        let mut stream = Stream::default();
        let found = Chain::new(&model, config)
            .run(&filler(90), "What?", &Call::default(), &mut stream)
            .unwrap();
        (found, stream.0)
    };
    let config = ChainConfig {
        max_output: 100,
        ..config()
    };
    // Past the words that a rejection may have, word by word.
    let (found, pieces) = run(&long, config.clone());
    assert_eq!(pieces.concat(), long);
    assert!(
        pieces.len() > 30 && pieces[0].split_whitespace().count() == 41,
        "{pieces:?}"
    );
    assert_eq!(found.answer, long.trim());
    // A short answer at once when it is whole.
    let (_, pieces) = run("In the harbour.", config.clone());
    assert_eq!(pieces, ["In the harbour."]);
    // What is tried again is not shown.
    let (found, pieces) = run("The text does not mention it.", config.clone());
    assert!(pieces.is_empty() && found.paths.len() == 2, "{pieces:?}");
    let unguarded = ChainConfig {
        guard: false,
        ..config.clone()
    };
    assert_eq!(run("I do not know", unguarded).1.len(), 4);
    // Of several chains nobody knows yet whose answer stands.
    let several = ChainConfig {
        paths: Paths::Bidir,
        ..config
    };
    assert!(run(&long, several).1.is_empty());
}

#[test]
fn the_oracle_and_the_loss_are_those_of_the_scores() {
    let found = Chain::new(
        &reader(true),
        ChainConfig {
            paths: Paths::Bidir,
            ..config()
        },
    )
    .run(
        &reversed(2),
        "Where does N0 lead in 2 steps?",
        &Call::default(),
        &mut Silent,
    )
    .unwrap();
    let score = |text: &str| {
        f64::from(u8::from(text == "N2")) + f64::from(u8::from(text.contains("N1 -> N2"))) / 2.0
    };
    // Hops stand backwards, so that only the chain that reads backwards answers.
    assert_eq!(found.oracle(&score), 1);
    assert_eq!(found.oracle(&|_| 0.0), 0);
    let lost = |chosen: usize| {
        let mut found = found.clone();
        found.chosen = chosen;
        found.information_loss(&|text: &str| f64::from(u8::from(text.contains("N1"))))
    };
    assert_eq!(lost(1), 1.0);
}

#[test]
fn a_chain_that_was_killed_repeats_no_call() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(CacheStore::open(&folder.path().join("c.sqlite")).unwrap());
    let (text, query) = (text(3), "Where does N0 lead in 3 steps?");
    let run = |stop_after: usize| {
        let inner = Arc::new(reader(true));
        let model = Cached::new(inner.clone(), Arc::clone(&store), CacheMode::ReadWrite);
        let seen = Arc::clone(&inner);
        let call = Call::new(move || seen.requests().len() >= stop_after);
        let result = Chain::new(&model, config()).run(&text, query, &call, &mut Silent);
        (result, inner.requests().len())
    };
    let (result, first) = run(3);
    assert!(
        matches!(result, Err(ChatError::Cancelled { .. })),
        "{result:?}"
    );
    let (result, second) = run(usize::MAX);
    let found = result.unwrap();
    assert_eq!(found.answer, "N3");
    // The call under way when it was stopped has no reply to keep.
    assert_eq!(first + second, found.took.calls + 1);
    let (result, third) = run(usize::MAX);
    assert_eq!((result.unwrap().paths, third), (found.paths, 0));
}
