//! The memory against the reference's goldens, over hundreds of turns, through restarts, kills and roll-backs.

#[path = "../../../tests/golden.rs"]
mod golden;

use longspan_agents::chat::model::{Call, ChatError, Input, Request, ignore};
use longspan_agents::chat::scripted::Scripted;
use longspan_agents::memory::scm::controller::{self, Candidate, Form};
use longspan_agents::memory::scm::stream::{MemoryStream, cosine};
use longspan_agents::memory::scm::{Mode, Scm, ScmConfig, ScmError, Turn};
use longspan_agents::rag::HashedWords;
use longspan_data::random::Random;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

#[test]
fn the_controllers_match_the_reference() {
    let golden = golden::json("scm", "controller.json");
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 5);
    let vector =
        |value: &serde_json::Value| -> Vec<f32> { serde_json::from_value(value.clone()).unwrap() };
    let count = |value: &serde_json::Value| value.as_u64().unwrap() as usize;
    let name = |(item, form): (usize, Form)| match form {
        Form::Text => format!("raw{item}"),
        Form::Summary => format!("sum{item}"),
    };
    for case in cases {
        let query = vector(&case["query_embedding"]);
        let turns = case["turns"].as_array().unwrap();
        let candidates: Vec<Candidate> = (turns.iter())
            .map(|turn| Candidate {
                text_tokens: count(&turn["raw_tokens"]),
                summary_tokens: count(&turn["summary_tokens"]),
                relevance: cosine(&query, &vector(&turn["embedding"])),
                age: 0,
            })
            .collect();
        let (last, older) = candidates.split_last().unwrap();
        let (k, history) = (count(&case["k"]), count(&case["max_history_tokens"]));
        let limit = count(&case["max_pre_turn_tokens"]);
        let mut calls = Vec::new();
        let flash = controller::flash_budget(last, limit);
        let found = controller::code(older, flash, k, history, &mut |item, form| {
            calls.push(name((item, form)));
            let key = match form {
                Form::Text => "answer_raw",
                Form::Summary => "answer_summary",
            };
            Ok(turns[item][key].as_bool())
        })
        .unwrap();
        let names = |items: &[(usize, Form)]| items.iter().copied().map(name).collect::<Vec<_>>();
        let want =
            |key: &str| -> Vec<String> { serde_json::from_value(case[key].clone()).unwrap() };
        assert_eq!(names(&found.items), want("retrieved"));
        assert_eq!(calls, want("judge_calls"));
        assert_eq!(found.questions, calls.len());
        let (naive, _) = controller::naive(older, k, history);
        assert_eq!(names(&naive.items), want("naive_retrieved"));
        let previous = (older.len(), controller::flash_form(last, limit));
        assert_eq!(name(previous), case["previous"].as_str().unwrap());
    }
}

/// Says what the prompt says about the thing asked for; small talk gets small talk. Answers yes to every
/// question of the controller.
fn reader() -> Scripted {
    Scripted::new(|request| {
        let text = request.input.plain();
        if text.contains("Answer with one letter only") {
            let whole = text.contains("without the full turns");
            return Ok(if whole { "(B)" } else { "(A)" }.into());
        }
        if text.ends_with("Summary:") {
            return Ok("The user told something; the assistant listened.".into());
        }
        let (before, input) = text.rsplit_once("###").unwrap_or(("", &text));
        let before = match before {
            // A plain conversation: the last line is the input.
            "" => text.rsplit_once('\n').map_or("", |(before, _)| before),
            before => before,
        };
        let asked = input.lines().last().unwrap_or_default();
        let Some(thing) = asked
            .strip_prefix("What is my ")
            .and_then(|rest| rest.strip_suffix('?'))
        else {
            return Ok("I see.".into());
        };
        // The last mention counts.
        let told = before.rsplit_once(&format!("My {thing} is "));
        let value = told.and_then(|(_, rest)| rest.split('.').next());
        Ok(value.unwrap_or("I do not know").into())
    })
}

const TALK: [&str; 6] = [
    "The weather turned cold today and the streets were empty.",
    "I walked along the canal and watched the boats for an hour.",
    "They are repairing the bridge again, it takes for ever.",
    "Lunch was soup with bread, nothing special really.",
    "The neighbours were loud last night, so I slept badly.",
    "I read a chapter of that long novel about the sea.",
];
const FACTS: [(&str, &str); 10] = [
    ("passport number", "K4471"),
    ("sister's birthday", "the ninth of May"),
    ("blood group", "AB negative"),
    ("locker code", "7731"),
    ("favourite composer", "Telemann"),
    ("dentist", "Doctor Osei"),
    ("first car", "a green Saab"),
    ("library card", "L-202"),
    ("allergy", "walnuts"),
    ("wifi password", "heron-river-nine"),
];

fn talk(config: &ScmConfig, turns: usize) -> (Scm, Scripted, HashedWords) {
    let (model, embedder) = (reader(), HashedWords::default());
    let mut scm = fresh(config.clone(), &model, &embedder).unwrap();
    let mut random = Random::new(4, "talk");
    for n in 0..turns {
        let line = match n % 7 {
            3 if n / 7 < FACTS.len() => {
                let (thing, value) = FACTS[n / 7];
                format!("By the way: My {thing} is {value}.")
            }
            _ => format!(
                "Day {n}. {} {}",
                TALK[random.between(0, 5)],
                TALK[random.between(0, 5)]
            ),
        };
        say(&mut scm, &model, &embedder, &line);
    }
    (scm, model, embedder)
}

fn say(scm: &mut Scm, model: &Scripted, embedder: &HashedWords, line: &str) -> String {
    turn(scm, model, embedder, None, line).unwrap().reply.text
}

fn turn(
    scm: &mut Scm,
    model: &Scripted,
    embedder: &HashedWords,
    system: Option<&str>,
    line: &str,
) -> Result<Turn, ScmError> {
    let request = Request::chat(Vec::new());
    let call = Call::default();
    scm.turn(model, embedder, &request, system, line, &call, &mut ignore)
}

/// A memory that lives as long as the test.
fn fresh(config: ScmConfig, model: &Scripted, embedder: &HashedWords) -> Result<Scm, ScmError> {
    Scm::new(MemoryStream::in_memory().unwrap(), config, model, embedder)
}

/// The memory of a file, with the small window.
fn kept(file: &Path, model: &Scripted, embedder: &HashedWords) -> Scm {
    Scm::new(MemoryStream::open(file).unwrap(), small(), model, embedder).unwrap()
}

fn small() -> ScmConfig {
    ScmConfig {
        window: 700,
        max_tokens: 60,
        ..ScmConfig::default()
    }
}

fn recalled(mode: Mode, recency_weight: f64) -> usize {
    let config = ScmConfig {
        mode,
        recency_weight,
        ..small()
    };
    let (mut scm, model, embedder) = talk(&config, 370);
    assert_eq!(scm.stream().items().len(), 370);
    let mut right = 0;
    for (thing, value) in FACTS {
        // All facts were said in turns 4 to 67: 300 turns back and more.
        let answer = say(&mut scm, &model, &embedder, &format!("What is my {thing}?"));
        right += usize::from(answer == value);
        assert!(scm.roll_back().unwrap());
    }
    right
}

#[test]
fn facts_from_three_hundred_turns_back_return_where_the_window_has_lost_them() {
    assert_eq!(recalled(Mode::None, 0.1), 0);
    assert_eq!(recalled(Mode::Paper, 0.1), FACTS.len());
    assert_eq!(recalled(Mode::Code, 0.1), FACTS.len());
    assert_eq!(recalled(Mode::Naive, 0.1), FACTS.len());
    // The published weight of recency lets any recent turn pass an old one, however near.
    assert_eq!(recalled(Mode::Paper, 1.0), 0);
}

#[test]
fn without_long_term_memory_the_talk_is_a_plain_window() {
    let config = ScmConfig {
        mode: Mode::None,
        ..small()
    };
    let (mut scm, model, embedder) = talk(&config, 30);
    let turn = turn(&mut scm, &model, &embedder, Some("Be kind."), "Hello?").unwrap();
    // System, then whole turns up to the last, then the input.
    let texts: Vec<&str> = turn.messages.iter().map(|m| m.content.as_str()).collect();
    assert_eq!((texts[0], texts[texts.len() - 1]), ("Be kind.", "Hello?"));
    let items = scm.stream().items();
    let shown = (texts.len() - 2) / 2;
    assert!(shown > 5 && shown < 30 && turn.activation.items.is_empty());
    for (n, pair) in texts[1..texts.len() - 1].chunks(2).enumerate() {
        let item = &items[30 - shown + n];
        assert_eq!(pair, [item.user.as_str(), item.assistant.as_str()]);
    }
    assert!(turn.prompt_tokens <= 640);
}

#[test]
fn an_updated_fact_is_the_newer_one_and_what_was_asked_for_stays_fresh() {
    let (mut scm, model, embedder) = talk(&ScmConfig { k: 2, ..small() }, 80);
    say(
        &mut scm,
        &model,
        &embedder,
        "By the way: My locker code is 1209.",
    );
    say(&mut scm, &model, &embedder, "Thanks.");
    assert_eq!(
        say(&mut scm, &model, &embedder, "What is my locker code?"),
        "1209"
    );
    // Of two equal turns, the one that was activated later scores higher.
    let twins = ["The heron waits.", "The heron waits."];
    for line in twins {
        say(&mut scm, &model, &embedder, line);
    }
    let items = scm.stream().items();
    let (first, now) = (items.len() - 2, items.len() + 1);
    let age = |position: usize| now - items[position].last_access;
    assert!(age(first) > age(first + 1));
    for item in items
        .iter()
        .filter(|item| item.user.contains("locker code is 1209"))
    {
        assert!(
            item.last_access > item.turn,
            "an answer must count as an access"
        );
    }
}

fn state(scm: &Scm) -> String {
    let items = scm.stream().items();
    let embeddings: Vec<&[f32]> = items.iter().map(|item| item.embedding.as_slice()).collect();
    format!("{} {embeddings:?}", serde_json::to_string(items).unwrap())
}

#[test]
fn roll_back_restores_what_was_and_a_restart_finds_it() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("deep/memory.sqlite");
    let (model, embedder) = (reader(), HashedWords::default());
    let open = || kept(&file, &model, &embedder);
    let mut scm = open();
    for line in TALK
        .iter()
        .chain(&["My badge is blue.", "Fine \u{0} day \u{1F600}\r\n."])
    {
        say(&mut scm, &model, &embedder, line);
    }
    let before = state(&scm);
    assert_eq!(
        say(&mut scm, &model, &embedder, "What is my badge?"),
        "blue"
    );
    assert_ne!(state(&scm), before);
    assert!(scm.roll_back().unwrap());
    assert_eq!(state(&scm), before);
    drop(scm);
    let mut scm = open();
    assert_eq!(state(&scm), before);
    assert_eq!(
        say(&mut scm, &model, &embedder, "What is my badge?"),
        "blue"
    );
    scm.reset().unwrap();
    assert!(!scm.roll_back().unwrap());
    drop(scm);
    assert!(open().stream().items().is_empty());
}

#[test]
fn another_embedder_or_tokenizer_makes_its_numbers_anew() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("memory.sqlite");
    let model = reader();
    let wide = HashedWords { dim: 300 };
    let mut scm = kept(&file, &model, &wide);
    say(&mut scm, &model, &wide, "My badge is blue.");
    drop(scm);
    let narrow = HashedWords { dim: 40 };
    let mut scm = kept(&file, &model, &narrow);
    assert_eq!(scm.stream().items()[0].embedding.len(), 40);
    say(&mut scm, &model, &narrow, TALK[0]);
    say(&mut scm, &model, &narrow, TALK[1]);
    assert_eq!(say(&mut scm, &model, &narrow, "What is my badge?"), "blue");
}

#[test]
fn a_killed_process_loses_no_turn_that_was_answered() {
    const FILE: &str = "LONGSPAN_TEST_SCM_FILE";
    let (model, embedder) = (reader(), HashedWords::default());
    let open = |file: &Path| kept(file, &model, &embedder);
    if let Some(file) = std::env::var_os(FILE) {
        // The process that is killed.
        let mut scm = open(Path::new(&file));
        for n in 1.. {
            say(
                &mut scm,
                &model,
                &embedder,
                &format!("My item {n} is value {n}. {}", TALK[n % 6]),
            );
            println!("answered {n}");
        }
    }
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("memory.sqlite");
    let name = "a_killed_process_loses_no_turn_that_was_answered";
    let mut turns = 0;
    for kill_after in [1, 7, 20] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(FILE, &file)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let answered = lines
            .map_while(Result::ok)
            .filter(|line| line.contains("answered "))
            .take(kill_after)
            .count();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(answered, kill_after);
        let scm = open(&file);
        let items = scm.stream().items();
        assert!(items.len() >= turns + answered, "{} turns", items.len());
        for (n, item) in items.iter().enumerate() {
            assert_eq!(item.turn, n + 1);
            assert!(item.user.starts_with("My item") && item.assistant == "I see.");
        }
        turns = items.len();
    }
    let mut scm = open(&file);
    assert_eq!(
        say(&mut scm, &model, &embedder, "What is my item 1?"),
        "value 1"
    );
}

#[test]
fn every_prompt_fits_the_window() {
    let embedder = HashedWords { dim: 64 };
    let mut random = Random::new(9, "histories");
    for round in 0..60 {
        let window = random.between(150, 900);
        let mode = [Mode::Paper, Mode::Code, Mode::Naive, Mode::None][round % 4];
        let config = ScmConfig {
            mode,
            window,
            max_tokens: 40,
            k: random.between(1, 10),
            ..ScmConfig::default()
        };
        let seed = random.bits();
        let model = Scripted::new(move |request| {
            let text = request.input.plain();
            let mut random = Random::new(seed ^ text.len() as u64, "answers");
            if text.contains("Answer with one letter only") {
                return Ok(["(A)", "(B)", "what?"][random.between(0, 2)].into());
            }
            let long = if text.ends_with("Summary:") { 30 } else { 60 };
            Ok("word ".repeat(random.between(0, long)))
        });
        let mut scm = fresh(config, &model, &embedder).unwrap();
        for _ in 0..20 {
            let input = "talk of things ".repeat(random.between(1, 30).min((window - 60) / 4));
            let turn = turn(&mut scm, &model, &embedder, None, &input).unwrap();
            assert!(
                turn.prompt_tokens + 40 <= window,
                "{} of {window}",
                turn.prompt_tokens
            );
            let last = scm.stream().items().len() - 2;
            let flash = turn.activation.items.iter().any(|entry| entry.0 == last);
            assert!(
                !flash || scm.stream().items().len() < 2,
                "the turn before is shown once"
            );
        }
        for request in model.requests() {
            let words = request.input.plain().split_whitespace().count();
            assert!(words + request.max_tokens <= window, "{words} of {window}");
            assert!(matches!(request.input, Input::Chat(_)));
        }
    }
}

#[test]
fn a_summary_that_fails_is_made_later_and_an_empty_one_is_none() {
    let embedder = HashedWords::default();
    let long = format!("My badge is blue. {}", TALK.join(" ").repeat(6));
    let mut failing = true;
    for reply in ["", "Short."] {
        let model = Scripted::new(move |request| match request.input.plain() {
            text if text.ends_with("Summary:") && failing => Err(ChatError::BadRequest(text)),
            text if text.ends_with("Summary:") => Ok(reply.into()),
            _ => Ok("I see.".into()),
        });
        let config = ScmConfig {
            window: 3000,
            ..ScmConfig::default()
        };
        let mut scm = fresh(config, &model, &embedder).unwrap();
        let turn = turn(&mut scm, &model, &embedder, None, &long).unwrap();
        assert_eq!(turn.summary_failed.is_some(), failing);
        let item = &scm.stream().items()[0];
        assert_eq!(item.summarised, !failing);
        match failing {
            true => assert_eq!(item.summary, item.text),
            false => assert_eq!(item.summary, "[Turn 1] Short."),
        }
        // The second round has a model that works, and finds the summary missing.
        let working = Scripted::new(move |request| match request.input.plain() {
            text if text.ends_with("Summary:") => Ok(reply.into()),
            _ => Ok("I see.".into()),
        });
        say(&mut scm, &working, &embedder, "And?");
        assert!(scm.stream().items().iter().all(|item| item.summarised));
        let first = &scm.stream().items()[0];
        let want = if reply.is_empty() {
            first.text.clone()
        } else {
            format!("[Turn 1] {reply}")
        };
        assert_eq!(first.summary, want);
        failing = false;
    }
}

#[test]
fn what_cannot_be_right_is_refused() {
    let (model, embedder) = (reader(), HashedWords::default());
    let refused = |config: ScmConfig| {
        let scm = fresh(config, &model, &embedder);
        scm.err().map(|error| error.to_string()).unwrap_or_default()
    };
    assert!(refused(ScmConfig { k: 0, ..small() }).contains("k is 0"));
    assert!(
        refused(ScmConfig {
            decay: 1.5,
            ..small()
        })
        .contains("decay is 1.5")
    );
    assert!(
        refused(ScmConfig {
            max_tokens: 700,
            ..small()
        })
        .contains("less than the window")
    );
    let place = tempfile::tempdir().unwrap();
    let other = place.path().join("other.sqlite");
    longspan_agents::rag::Index::open(&other, Default::default()).unwrap();
    assert!(matches!(
        MemoryStream::open(&other),
        Err(ScmError::NoMemory { .. })
    ));
    let text = place.path().join("notes.txt");
    std::fs::write(
        &text,
        "no database at all, a text that someone wrote".repeat(50),
    )
    .unwrap();
    let error = MemoryStream::open(&text).err().unwrap().to_string();
    assert!(error.contains("notes.txt"), "{error}");
    // An input that no window takes is an error, and nothing is remembered of it.
    let mut scm = fresh(small(), &model, &embedder).unwrap();
    let input = "word ".repeat(900);
    let error = turn(&mut scm, &model, &embedder, None, &input).unwrap_err();
    assert!(
        matches!(error, ScmError::Chat(ChatError::ContextOverflow { .. })),
        "{error}"
    );
    assert!(scm.stream().items().is_empty());
}
