//! The engine behind the seam of decoding: trees verified in one pass are what plain runs of their paths give,
//! forks and returns are fresh runs, and strategies over it emit what they must. Tiny models, f32 caches.

mod common;

use common::{assert_close, engine, engine_as, ids, options};
use longspan_infer::decode::logits::SamplingConfig;
use longspan_infer::decode::{
    DecodeConfig, DecodeSession, DraftTree, EngineSession, Event, Outcome, Request, SeqId, run,
};
use longspan_infer::engine::Want;
use longspan_infer::{Engine, Sequence};
use longspan_nn::model::Precision;
use std::ops::ControlFlow;

const POLICIES: [&str; 5] = [
    "full",
    "window:24",
    "sinks:3,20",
    "lm-infinite:20,3",
    "infllm:n_init=4,n_local=16,block=8,topk=2,repr_topk=2,exec_block=8,max_cached=3,chunk=16",
];

/// Tiny models with attention over all of the text in every layer.
const WHOLE: [&str; 3] = ["llama-tied", "qwen2", "qwen3"];

/// Logits after each token, read one at a time as decoding reads them.
fn read(engine: &Engine, sequence: &mut Sequence, tokens: &[u32]) -> Vec<Vec<f32>> {
    tokens
        .iter()
        .map(|&token| {
            engine
                .forward(&mut [(&mut *sequence, &[token])], Want::Last)
                .unwrap()
        })
        .collect()
}

fn fresh(engine: &Engine, context: &str, tokens: &[u32]) -> (Sequence, Vec<f32>) {
    let mut sequence = engine.sequence(&options(context), None).unwrap();
    let logits = read(engine, &mut sequence, tokens).pop().unwrap();
    (sequence, logits)
}

/// In the packed form, what a draft's token gets is what it would get alone, whatever stands beside it.
#[test]
fn packed_models_read_trees_and_batches_bit_for_bit_as_single_tokens() {
    for name in WHOLE {
        let engine = engine_as(name, Precision::Packed);
        let vocab = engine.model().config().vocab_size;
        for (length, nodes, seed) in [(60, 5, 0), (63, 12, 2), (120, 30, 6), (7, 16, 7)] {
            let prompt = ids(length, seed, vocab);
            let guesses = tree(nodes, seed, vocab);
            let (mut root, _) = fresh(&engine, "full", &prompt);
            let mut session = EngineSession::new(&engine, &mut root);
            let found = session.step_tree(EngineSession::ROOT, &guesses).unwrap();
            for node in 0..nodes as u32 {
                let path = guesses.path(node);
                let text: Vec<u32> = path.iter().map(|&n| guesses.tokens()[n as usize]).collect();
                let (_, alone) = fresh(&engine, "full", &[&prompt[..], &text].concat());
                let row = &found[node as usize * vocab..(node as usize + 1) * vocab];
                assert!(
                    row == alone,
                    "{name}, {length} tokens, node {node} of {nodes}"
                );
            }
            let path = guesses.path(nodes as u32 - 1);
            session.commit_path(EngineSession::ROOT, &path).unwrap();
            let fork = session.fork(EngineSession::ROOT).unwrap();
            let mut text = prompt.clone();
            text.extend(path.iter().map(|&n| guesses.tokens()[n as usize]));
            let next = ids(2, seed + 50, vocab);
            let both = [(EngineSession::ROOT, next[0]), (fork, next[1])];
            let found = session.step(&both).unwrap();
            for (row, &token) in found.chunks_exact(vocab).zip(&next) {
                let (_, alone) = fresh(&engine, "full", &[&text[..], &[token]].concat());
                assert!(row == alone, "{name}, a batch of two after {length} tokens");
            }
        }
    }
}

/// A pseudo-random tree; shape 0 is a chain, 1 a star, others mixed.
fn tree(nodes: usize, seed: u32, vocab: usize) -> DraftTree {
    let tokens = ids(nodes, seed, vocab);
    let mut tree = DraftTree::new(tokens[0]);
    for node in 1..nodes as u32 {
        let parent = match seed % 4 {
            0 => node - 1,
            1 => 0,
            _ => (node * 7 + seed) % node,
        };
        tree.push(parent, tokens[node as usize]);
    }
    tree
}

#[test]
fn a_tree_in_one_pass_is_its_paths() {
    for name in WHOLE {
        let engine = engine(name);
        let vocab = engine.model().config().vocab_size;
        // Around the borders of pages of 64 tokens.
        for (length, nodes, seed) in [
            (1, 5, 0),
            (7, 9, 1),
            (63, 12, 2),
            (64, 3, 3),
            (100, 30, 6),
            (60, 16, 7),
        ] {
            let prompt = ids(length, seed, vocab);
            let guesses = tree(nodes, seed, vocab);
            let what = format!("{name}, {length} tokens, {nodes} nodes");
            let (mut root, _) = fresh(&engine, "full", &prompt);
            let (mut naive_root, _) = fresh(&engine, "full", &prompt);
            let mut session = EngineSession::new(&engine, &mut root);
            assert!(session.limits().one_pass_tree);
            let found = session.step_tree(EngineSession::ROOT, &guesses).unwrap();
            assert_eq!(
                session.tokens(EngineSession::ROOT),
                prompt,
                "{what}: nothing is read yet"
            );
            let mut naive = EngineSession::new(&engine, &mut naive_root).with_naive_trees();
            assert!(!naive.limits().one_pass_tree);
            let twin = naive.step_tree(EngineSession::ROOT, &guesses).unwrap();
            assert_close(&found, &twin, 1e-4, &what);
            for node in 0..nodes as u32 {
                let path = guesses.path(node);
                let text: Vec<u32> = path.iter().map(|&n| guesses.tokens()[n as usize]).collect();
                let (_, alone) = fresh(&engine, "full", &[&prompt[..], &text].concat());
                let row = &found[node as usize * vocab..(node as usize + 1) * vocab];
                assert_close(row, &alone, 1e-4, &format!("{what}, node {node}"));
            }
            // Keep a path and go on: as if it had been read plainly.
            let path = guesses.path(nodes as u32 - 1);
            session.commit_path(EngineSession::ROOT, &path).unwrap();
            naive.commit_path(EngineSession::ROOT, &path).unwrap();
            assert_eq!((session.live(), naive.live()), (1, 1));
            let mut text = prompt.clone();
            text.extend(path.iter().map(|&n| guesses.tokens()[n as usize]));
            assert_eq!(session.tokens(EngineSession::ROOT), text);
            let next = ids(5, seed + 50, vocab);
            let (mut plain, _) = fresh(&engine, "full", &text);
            let expected = read(&engine, &mut plain, &next);
            for (&token, expected) in next.iter().zip(&expected) {
                let row = [(EngineSession::ROOT, token)];
                assert_close(&session.step(&row).unwrap(), expected, 1e-4, &what);
                assert_close(&naive.step(&row).unwrap(), expected, 1e-4, &what);
            }
        }
    }
}

#[test]
fn trees_by_forks_serve_every_policy_and_model() {
    for (name, context) in POLICIES
        .iter()
        .map(|c| ("llama-tied", *c))
        .chain([("gemma3", "full")])
    {
        let engine = engine(name);
        let vocab = engine.model().config().vocab_size;
        let prompt = ids(45, 4, vocab);
        let guesses = tree(9, 6, vocab);
        let (mut root, _) = fresh(&engine, context, &prompt);
        let mut session = EngineSession::new(&engine, &mut root).with_naive_trees();
        let found = session.step_tree(EngineSession::ROOT, &guesses).unwrap();
        for node in 0..9 {
            let path = guesses.path(node);
            let text: Vec<u32> = path.iter().map(|&n| guesses.tokens()[n as usize]).collect();
            let (_, alone) = fresh(&engine, context, &[&prompt[..], &text].concat());
            let row = &found[node as usize * vocab..(node as usize + 1) * vocab];
            assert_close(row, &alone, 1e-4, &format!("{name} {context}, node {node}"));
        }
        session
            .commit_path(EngineSession::ROOT, &guesses.path(8))
            .unwrap();
        assert_eq!(session.live(), 1);
    }
}

/// Random forks, steps, returns and releases against fresh runs; nothing leaks.
#[test]
fn sequences_are_fresh_runs_however_they_came_to_be() {
    for context in [
        "full",
        "infllm:n_init=4,n_local=16,block=8,topk=2,repr_topk=2,exec_block=8,max_cached=3,chunk=16",
    ] {
        let engine = engine("llama-tied");
        let vocab = engine.model().config().vocab_size;
        let prompt = ids(30, 1, vocab);
        let (mut root, _) = fresh(&engine, context, &prompt);
        let mut session = EngineSession::new(&engine, &mut root);
        let mut live: Vec<(SeqId, Vec<u32>)> = vec![(EngineSession::ROOT, prompt.clone())];
        let mut last = std::collections::HashMap::new();
        for (turn, dice) in ids(120, 9, 1000).into_iter().enumerate() {
            let at = dice as usize % live.len();
            match dice % 7 {
                0 | 1 => {
                    let seq = session.fork(live[at].0).unwrap();
                    live.push((seq, live[at].1.clone()));
                }
                2 if live[at].0 != EngineSession::ROOT => {
                    session.release(live[at].0);
                    live.remove(at);
                }
                3 if context == "full" && live[at].1.len() > 20 => {
                    let len = live[at].1.len() - 3;
                    session.truncate(live[at].0, len).unwrap();
                    live[at].1.truncate(len);
                }
                4 if live.len() > 1 && at > 0 => {
                    let (seq, text) = live.remove(at);
                    session.replace(live[0].0, seq).unwrap();
                    live[0].1 = text;
                }
                _ => {
                    // All at once: rows of one pass do not touch each other.
                    let rows: Vec<(SeqId, u32)> = live
                        .iter()
                        .map(|(seq, _)| (*seq, (dice + seq.0 * 31) % vocab as u32))
                        .collect();
                    let logits = session.step(&rows).unwrap();
                    for (index, (_, token)) in rows.iter().enumerate() {
                        live[index].1.push(*token);
                        let row = logits[index * vocab..(index + 1) * vocab].to_vec();
                        last.insert(live[index].1.clone(), row);
                    }
                }
            }
            assert_eq!(session.live(), live.len(), "turn {turn}");
            for (seq, text) in &live {
                assert_eq!(session.tokens(*seq), text, "turn {turn}");
            }
        }
        let mut checked = 0;
        for (text, logits) in last.iter().filter(|(text, _)| text.len() % 4 == 0) {
            let (_, alone) = fresh(&engine, context, text);
            assert_close(logits, &alone, 1e-4, context);
            checked += 1;
        }
        assert!(checked > 10, "{checked}");
        for (seq, _) in live.iter().skip(1) {
            session.release(*seq);
        }
        assert_eq!(session.live(), 1);
    }
}

fn decode(
    engine: &Engine,
    context: &str,
    prompt: &[u32],
    decode: &str,
    sampling: &SamplingConfig,
    max_tokens: usize,
) -> (Vec<u32>, Outcome, Vec<u32>) {
    let (mut root, logits) = fresh(engine, context, prompt);
    let config: DecodeConfig = decode.parse().unwrap();
    let mut strategy = config.build(sampling, 0, None).unwrap();
    let mut session = EngineSession::new(engine, &mut root);
    let request = Request {
        seq: EngineSession::ROOT,
        eos: vec![3],
        max_tokens,
    };
    let mut emitted = Vec::new();
    let mut emit = |event: Event| {
        if let Event::Token(choice) = event {
            emitted.push(choice.token);
        }
        ControlFlow::Continue(())
    };
    let outcome = run(&mut session, &mut *strategy, &request, logits, &mut emit).unwrap();
    assert_eq!(session.live(), 1);
    (emitted, outcome, root.tokens().to_vec())
}

#[test]
fn lookahead_over_the_engine_is_plain_decoding() {
    let mut fewer = 0;
    for name in WHOLE {
        let engine = engine(name);
        let vocab = engine.model().config().vocab_size;
        for seed in 0..6u32 {
            // Repetition in the prompt, so that there is something to guess.
            let part = ids(6, seed, vocab.min(40));
            let prompt = part.repeat(4);
            for temperature in [0.0, 0.8] {
                let sampling = SamplingConfig {
                    temperature,
                    top_k: 3,
                    seed: u64::from(seed),
                    ..SamplingConfig::default()
                };
                let run = |text: &str| decode(&engine, "full", &prompt, text, &sampling, 60);
                let (plain, _, held) = run("plain");
                for text in [
                    "lookahead:adaptive=false,decoding_length=12,branch_length=6",
                    "lookahead:layout=par",
                    "lookahead:layout=one,mode=input",
                ] {
                    let (found, outcome, kept) = run(text);
                    assert_eq!(found, plain, "{name}, seed {seed}, {text}");
                    assert_eq!(kept, held);
                    fewer += usize::from(outcome.stats.forwards + 1 < plain.len());
                }
            }
        }
    }
    assert!(fewer > 10, "guesses were right in {fewer} runs");
}

#[test]
fn lookahead_says_where_it_cannot_serve() {
    for (name, context) in [("llama-tied", "window:24"), ("gemma3", "full")] {
        let engine = engine(name);
        let (mut root, logits) = fresh(&engine, context, &[5, 6, 7]);
        let config: DecodeConfig = "lookahead".parse().unwrap();
        let mut strategy = config.build(&SamplingConfig::default(), 0, None).unwrap();
        let mut session = EngineSession::new(&engine, &mut root);
        let request = Request {
            seq: EngineSession::ROOT,
            eos: vec![],
            max_tokens: 5,
        };
        let mut emit = |_: Event| ControlFlow::Continue(());
        let error = run(&mut session, &mut *strategy, &request, logits, &mut emit).unwrap_err();
        assert!(error.to_string().contains("--context full"), "{error}");
    }
}

/// What searches report of their answers is what reading the answers gives, under every policy.
#[test]
fn searches_over_the_engine_report_true_log_probabilities() {
    let greedy = SamplingConfig {
        temperature: 0.0,
        ..SamplingConfig::default()
    };
    for context in POLICIES {
        let engine = engine("qwen2");
        let vocab = engine.model().config().vocab_size;
        let prompt = ids(40, 8, vocab);
        for text in [
            "beam:beams=3,n=3",
            "dbs:groups=3,n=3",
            "dbs:beams=4,groups=2,term=embedding+0.2*embedding_ngram:2,n=2",
            "tree:budget=12,n=2",
            "tree:mode=leaf,budget=20,n=2",
        ] {
            let (emitted, outcome, held) = decode(&engine, context, &prompt, text, &greedy, 9);
            assert_eq!(
                held, prompt,
                "{context} {text}: the prompt's sequence is as it was"
            );
            assert!(!emitted.is_empty(), "{context} {text}");
            // In mode leaf only ended completions count.
            assert!(
                outcome.answers.len() > 1 || text.contains("leaf"),
                "{context} {text}"
            );
            for answer in &outcome.answers {
                let mut all = prompt.clone();
                all.extend(answer.choices.iter().map(|choice| choice.token));
                if answer.end == longspan_infer::decode::End::Eos {
                    all.push(3);
                }
                let mut sequence = engine.sequence(&options(context), None).unwrap();
                let rows = read(&engine, &mut sequence, &all);
                let sum: f64 = (prompt.len()..all.len())
                    .map(|at| {
                        let row = &rows[at - 1];
                        let total = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
                        f64::from(row[all[at] as usize]) - total
                    })
                    .sum();
                assert!(
                    (sum - answer.logprob).abs() < 1e-3,
                    "{context} {text}: {} reported, {sum} read",
                    answer.logprob
                );
            }
        }
    }
}
