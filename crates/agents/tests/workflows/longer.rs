//! Long answers, summaries, and passages chosen by certainty.

use super::filler;
use longspan_agents::chat::model::{Call, ChatError, ChatModel, Request};
use longspan_agents::chat::scripted::Scripted;
use longspan_agents::workflow::Silent;
use longspan_agents::workflow::agent_write::{
    AgentWrite, AgentWriteConfig, Step, count_words, write_prompt,
};
use longspan_agents::workflow::summary::{self, Kind, SummaryConfig, SummaryOutcome, Utterance};
use longspan_agents::workflow::xl3m::{self, Xl3mConfig};
use longspan_infer::key_context::Distribution;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const PLAN: &str = "Paragraph 1 - Main Point: The sea - Word Count: 200 words\n\nParagraph 2 - Main Point: The land - Word Count: 300 words\nParagraph 3 - Main Point: The end - Word Count: 500 words";

fn writer() -> Scripted {
    Scripted::new(|request: &Request| {
        let text = request.input.plain();
        if text.contains("Break the writing task") {
            return Ok(PLAN
                .strip_prefix(request.answer_prefix.as_str())
                .unwrap()
                .into());
        }
        let words = text
            .split("about ")
            .last()
            .unwrap()
            .split(' ')
            .next()
            .unwrap()
            .parse::<usize>()
            .unwrap();
        // It stops early, as models do, and says something new each time.
        let seen = text.len() + request.answer_prefix.len();
        let name: String = seen
            .to_string()
            .bytes()
            .map(|b| char::from(b - b'0' + b'a'))
            .collect();
        Ok(format!("{name} ").repeat(words.min(120)))
    })
}

#[test]
fn writing_reaches_its_length_and_goes_on_after_a_kill() {
    let config = AgentWriteConfig {
        words: Some(1000),
        ..AgentWriteConfig::default()
    };
    let whole = writer();
    let done = AgentWrite::new(&whole, config.clone())
        .run("Write about the coast", &Call::default(), &mut Silent)
        .unwrap();
    let words = count_words(&done.text());
    assert!((900..=1100).contains(&words), "{words}");
    assert!(done.finished() && done.paragraphs.len() == 3);
    let total = whole.requests().len();
    // The first paragraph's prompt, to the byte, and the growth of the text so far.
    let requests = whole.requests();
    assert_eq!(
        requests[1].input.plain(),
        write_prompt("Write about the coast", &done.plan, 0, "", "", 200)
    );
    let second = requests
        .iter()
        .find(|request| {
            request
                .input
                .plain()
                .contains("only this one:\nParagraph 2")
        })
        .unwrap();
    assert_eq!(
        second.input.plain(),
        write_prompt(
            "Write about the coast",
            &done.plan,
            1,
            &done.paragraphs[0],
            "",
            300
        )
    );
    // Killed at every call, the work goes on from the last whole paragraph.
    let folder = tempfile::tempdir().unwrap();
    for stop_after in 1..total {
        let path = folder.path().join(format!("{stop_after}.json"));
        let first = Arc::new(writer());
        let seen = Arc::clone(&first);
        let call = Call::new(move || seen.requests().len() > stop_after);
        let result = AgentWrite::new(&*first, config.clone()).state(&path).run(
            "Write about the coast",
            &call,
            &mut Silent,
        );
        assert!(
            matches!(result, Err(ChatError::Cancelled { .. })),
            "{result:?}"
        );
        let second = writer();
        let again = AgentWrite::new(&second, config.clone())
            .state(&path)
            .run("Write about the coast", &Call::default(), &mut Silent)
            .unwrap();
        assert_eq!(again.paragraphs, done.paragraphs);
        // Only calls of the paragraph under way are made again.
        // What goes on with a paragraph begins with it.
        let steps = |requests: &[Request]| {
            requests
                .iter()
                .filter(|r| r.answer_prefix.lines().count() < 3)
                .filter(|r| r.input.plain().contains("only this one"))
                .count()
        };
        let finished = 3 - steps(&second.requests());
        assert!(steps(&first.requests()) <= finished + 1);
        assert!(second.requests().len() < total);
        // Finished work asks nothing.
        let third = writer();
        AgentWrite::new(&third, config.clone())
            .state(&path)
            .run("Write about the coast", &Call::default(), &mut Silent)
            .unwrap();
        assert!(third.requests().is_empty());
        // A state of other work is not overwritten.
        let error = AgentWrite::new(&third, config.clone())
            .state(&path)
            .run("Another", &Call::default(), &mut Silent)
            .unwrap_err();
        assert!(error.to_string().contains("another instruction"), "{error}");
    }
}

#[test]
fn writing_says_what_fails_and_shortens_what_it_shows() {
    let deaf = Scripted::new(|_| Ok("I cannot plan.".into()));
    let error = AgentWrite::new(&deaf, AgentWriteConfig::default())
        .run("x", &Call::default(), &mut Silent)
        .unwrap_err();
    assert!(
        error.to_string().contains("no usable plan in 3 tries"),
        "{error}"
    );
    assert_eq!(deaf.requests().len(), 3);
    let mute = Scripted::new(|_| Ok("  ".into()));
    let plan = || {
        vec![Step {
            point: "The sea".into(),
            words: 100,
        }]
    };
    let error = AgentWrite::new(&mute, AgentWriteConfig::default())
        .run_with("x", Some(plan()), &Call::default(), &mut Silent)
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("wrote nothing for step 1 in 9 tries"),
        "{error}"
    );
    assert_eq!(mute.requests().len(), 9);
    let tries = AtomicUsize::new(0);
    let late = Scripted::new(move |_| {
        Ok(match tries.fetch_add(1, Ordering::Relaxed) {
            0 => String::new(),
            _ => "wave ".repeat(90),
        })
    });
    let text = AgentWrite::new(&late, AgentWriteConfig::default())
        .run_with("x", Some(plan()), &Call::default(), &mut Silent)
        .unwrap();
    assert_eq!(late.requests().len(), 2);
    assert_eq!(
        text.paragraphs,
        [format!("## The sea\n\n{}", "wave ".repeat(90).trim())]
    );
    struct Notes(Vec<String>);
    impl longspan_agents::workflow::Observer for Notes {
        fn note(&mut self, text: &str) {
            self.0.push(text.into());
        }
    }
    let model = writer().window(700);
    let steps = (0..8)
        .map(|i| Step {
            point: format!("Part {i}"),
            words: 100,
        })
        .collect();
    let mut notes = Notes(Vec::new());
    let done = AgentWrite::new(&model, AgentWriteConfig::default())
        .run_with("x", Some(steps), &Call::default(), &mut notes)
        .unwrap();
    assert_eq!(done.paragraphs.len(), 8);
    assert!(
        notes.0.iter().any(|note| note.contains("last")),
        "{:?}",
        notes.0
    );
    for request in model.requests() {
        assert!(model.count(&request.input).unwrap().tokens + request.max_tokens <= 700);
    }
}

fn summarized(model: &Scripted, text: &str, kind: &Kind, config: &SummaryConfig) -> SummaryOutcome {
    summary::run(model, text, kind, config, &Call::default(), &mut Silent).unwrap()
}

#[test]
fn summaries_hand_on_the_block_before_and_merge() {
    let model = Scripted::new(|request: &Request| {
        let text = request.input.plain();
        let kind = if text.contains("final summary") {
            "merged"
        } else {
            "block"
        };
        let hash = blake3_of(&text);
        Ok(format!("{kind}{hash} {}", "word ".repeat(20)))
    });
    let config = SummaryConfig {
        block: 100,
        flash: 50,
        group: 60,
        max_tokens: 60,
        ..SummaryConfig::default()
    };
    let text = filler(60);
    let found = summarized(&model, &text, &Kind::Book, &config);
    let blocks: Vec<_> = found.nodes.iter().filter(|node| node.level == 0).collect();
    let spans: Vec<&str> = blocks
        .iter()
        .map(|node| &text[node.text.unwrap().0..node.text.unwrap().1])
        .collect();
    assert_eq!(spans.concat(), text);
    let requests = model.requests();
    assert!(!requests[0].input.plain().contains("as background only"));
    for (index, request) in requests.iter().enumerate().take(blocks.len()).skip(1) {
        let prompt = request.input.plain();
        assert!(prompt.contains(&blocks[index - 1].summary) && prompt.contains(spans[index]));
        assert!(!prompt.contains(spans[index - 1]));
    }
    // Every summary is merged once, and the last node is the answer.
    let mut merged: Vec<usize> = found
        .nodes
        .iter()
        .flat_map(|node| node.members.clone())
        .collect();
    merged.sort_unstable();
    assert_eq!(merged, (0..found.nodes.len() - 1).collect::<Vec<_>>());
    assert_eq!(found.summary, found.nodes.last().unwrap().summary);
    assert_eq!(found.took.calls, found.nodes.len());
    // A model that never shortens comes to an end.
    let stubborn = Scripted::new(|_| Ok("word ".repeat(60)));
    summarized(&stubborn, &text, &Kind::Book, &config);
    // A meeting has a theme in every prompt.
    let said = |role: &str, content: &str| Utterance {
        role: role.into(),
        content: content.into(),
    };
    let utterances = vec![
        said("Ana", "We talk about the harbour. "),
        said("Boris", &filler(40)),
    ];
    let model = Scripted::new(|request: &Request| {
        Ok(if request.input.plain().contains("Name its topic") {
            "The harbour.".into()
        } else {
            "A summary".to_string()
        })
    });
    let text = summary::meeting_text(&utterances);
    let small = SummaryConfig {
        meeting_block: 100,
        ..config
    };
    let found = summarized(&model, &text, &Kind::Meeting(utterances), &small);
    assert_eq!(found.theme.as_deref(), Some("The harbour"));
    assert!(model.requests()[1..].iter().all(|request| {
        request
            .input
            .plain()
            .contains("topic of the meeting is: The harbour\n")
    }));
}

fn blake3_of(text: &str) -> u64 {
    text.bytes().fold(7, |hash: u64, byte| {
        hash.wrapping_mul(31).wrapping_add(u64::from(byte))
    })
}

#[test]
fn certainty_alone_chooses_passages() {
    // The model is sure after passages that say "day 3x" and speaks of nothing the question asks.
    let sure = |request: &Request| {
        let text = request.input.plain();
        let sure = text.contains("day 31.") || text.contains("day 7.");
        Distribution::Logits(if sure {
            vec![9.0, 0.0, 0.0]
        } else {
            vec![0.0; 3]
        })
    };
    let model = Scripted::new(|request: &Request| Ok(request.answer_prefix.clone() + "!"))
        .window(150)
        .on_next_token(sure);
    let text = filler(60);
    let config = Xl3mConfig {
        segment: 30,
        keep: 2,
        answer_prefix: "It is".into(),
        max_tokens: 10,
        ..Xl3mConfig::default()
    };
    let found = xl3m::run(
        &model,
        &text,
        "Which fish?",
        &config,
        &Call::default(),
        &mut Silent,
    )
    .unwrap();
    let kept: Vec<&str> = found
        .passages
        .iter()
        .filter(|p| p.kept)
        .map(|p| &text[p.start..p.end])
        .collect();
    assert!(
        kept.len() == 2 && kept[0].contains("day 7.") && kept[1].contains("day 31."),
        "{kept:?}"
    );
    let requests = model.requests();
    assert_eq!(requests.len(), found.passages.len() + 1);
    // Every passage is read alone, and the answer sees the kept ones in the text's order.
    for (request, passage) in requests.iter().zip(&found.passages) {
        let prompt = request.input.plain();
        assert!(prompt.contains(text[passage.start..passage.end].trim()));
        assert_eq!(
            prompt.matches("The sea").count(),
            text[passage.start..passage.end].matches("The sea").count()
        );
    }
    let last = requests.last().unwrap().input.plain();
    assert!(last.find("day 7.") < last.find("day 31.") && !last.contains("day 20."));
    assert_eq!(found.answer, "It isIt is!");
    // What fits is asked as it is.
    let model = Scripted::new(|_| Ok("x".into())).window(1000);
    let found = xl3m::run(
        &model,
        "Short text.",
        "Which?",
        &config,
        &Call::default(),
        &mut Silent,
    )
    .unwrap();
    assert!(found.passages.is_empty() && model.requests().len() == 1);
    let error = xl3m::run(
        &Scripted::new(|_| Ok("x".into())).window(45),
        &text,
        "Which?",
        &config,
        &Call::default(),
        &mut Silent,
    )
    .unwrap_err();
    assert!(error.to_string().contains("no room"), "{error}");
}
