//! Lookahead (54): the published trie's traces, whole runs of the published decoder, and the law that matters:
//! nothing that is emitted differs from plain decoding, greedy or seeded, whatever the drafts.

mod decode_common;
#[path = "../../../tests/golden.rs"]
mod golden;

use decode_common::{Call, Table, TableSession, tokens};
use longspan_infer::decode::logits::SamplingConfig;
use longspan_infer::decode::lookahead::{Lookahead, LookaheadConfig};
use longspan_infer::decode::sample::{Greedy, Sample, Sampling};
use longspan_infer::decode::trie::{DraftQuery, Layout, Source, TrieConfig, TrieStore};
use longspan_infer::decode::{DecodeError, DraftTree, Strategy};
use proptest::prelude::*;
use serde_json::Value;
use std::fs;
use std::sync::{Arc, Mutex};

fn list(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn number(value: &Value, key: &str) -> usize {
    value[key]
        .as_u64()
        .unwrap_or_else(|| panic!("{key} of {value}")) as usize
}

fn source(text: &str) -> Source {
    serde_json::from_value(text.into()).unwrap()
}

fn mask_rows(tree: &DraftTree) -> Value {
    let mut rows: Vec<Vec<u32>> = (0..tree.len() as u32).map(|n| tree.path(n)).collect();
    rows.iter_mut().for_each(|row| row.sort());
    serde_json::json!(rows)
}

fn files(prefix: &str) -> Vec<std::path::PathBuf> {
    let folder = golden::root().join("lookahead");
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            name.starts_with(prefix) && name.ends_with(".json")
        })
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no golden {prefix}*.json");
    files
}

#[test]
fn the_trie_follows_the_published_traces() {
    for path in files("trie_") {
        let at = path.display().to_string();
        let golden: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let config = &golden["config"];
        let mut store = TrieStore::new(TrieConfig {
            max_node: number(config, "max_node"),
            max_output_node: number(config, "max_output_node"),
            stop_words: list(&config["stop_words"]),
            eos: list(&config["eos"]),
            compat: true,
        });
        let mut drafts = 0;
        for (index, op) in golden["ops"].as_array().unwrap().iter().enumerate() {
            let at = format!("{at}, operation {index}");
            let idx = || op["idx"].as_i64().unwrap() as i32;
            let branch = || number(op, "branch_length");
            let layout = match op["op"].as_str().unwrap() {
                "put" => {
                    let (mode, last) = (source(op["mode"].as_str().unwrap()), op["final"] == true);
                    store.put(&list(&op["tokens"]), branch(), mode, idx(), last);
                    continue;
                }
                "stream_put" => {
                    store.stream_put(&list(&op["tokens"]), branch(), idx(), op["final"] == true);
                    continue;
                }
                "force_squeeze" => {
                    store.squeeze();
                    continue;
                }
                "hier_get" => Layout::Hier,
                "par_get" => Layout::Par,
                "one_get" => Layout::One,
                other => panic!("{at}: unknown operation {other}"),
            };
            let query = list(&op["query"]);
            let draft = store.draft(
                layout,
                &DraftQuery {
                    query: &query,
                    mode: source(op["mode"].as_str().unwrap()),
                    idx: idx(),
                    decoding_length: number(op, "decoding_length"),
                    branch_length: branch(),
                    min_input_size: number(op, "min_input_size"),
                    min_output_size: number(op, "min_output_size"),
                    isolate: false,
                },
            );
            assert_eq!(draft.tree.tokens(), list(&op["ids"]), "{at}: ids");
            assert_eq!(mask_rows(&draft.tree), op["mask_rows"], "{at}: mask");
            let guesses = draft.tree.len() - 1;
            let sizes = match layout {
                Layout::Hier => vec![draft.input, draft.output],
                Layout::One if draft.matched == 0 => vec![0, 0],
                Layout::Par | Layout::One => vec![guesses],
            };
            assert_eq!(serde_json::json!(sizes), op["sizes"], "{at}: sizes");
            drafts += usize::from(guesses > 0);
        }
        assert!(drafts > 10, "{at}: only {drafts} drafts");
        // The order of children shows in the drafts above; JSON maps are compared without it.
        assert_eq!(store.to_json(), golden["final"], "{at}: final store");
    }
}

fn greedy() -> Box<Greedy> {
    Box::new(Greedy::default())
}

#[test]
fn whole_runs_follow_the_published_decoder() {
    for case in golden::cases_of("lookahead", "e2e") {
        let at = case.path.display().to_string();
        let runs = golden::json("lookahead", case.meta_str("runs_file"));
        let eos = list(case.meta("eos"));
        let config = LookaheadConfig {
            decoding_length: case.meta_usize("decoding_length"),
            branch_length: case.meta_usize("branch_length"),
            max_query_length: case.meta_usize("query_length"),
            layout: serde_json::from_value(case.meta("layout").clone()).unwrap(),
            mode: serde_json::from_value(case.meta("mode").clone()).unwrap(),
            min_input_size: case.meta_usize("min_input_size"),
            min_output_size: Some(case.meta_usize("min_output_size")),
            max_node: case.meta_usize("max_node"),
            max_output_node: case.meta_usize("max_output_node"),
            stop_words: list(case.meta("stop_words")),
            adaptive: false,
            compat: true,
            ..LookaheadConfig::default()
        };
        assert_eq!(case.meta_usize("put_length"), config.branch_length + 1);
        let mut strategy = Lookahead::new(config, greedy()).unwrap();
        let table = Table {
            vocab: case.meta_usize("vocab"),
            t1: case.f64("t1"),
            t2: case.f64("t2"),
            pos: case.f64("pos"),
            embedding: None,
        };
        for (index, run) in runs["runs"].as_array().unwrap().iter().enumerate() {
            let at = format!("{at}, run {index}");
            let prompt = list(&run["prompt"]);
            let mut session = TableSession::new(table.clone(), &prompt);
            let (emitted, _) = session.decode(&mut strategy, &eos, case.meta_usize("maxnew"));
            let emitted = tokens(&emitted);
            assert_eq!(emitted, list(&run["output"]), "{at}: output");
            assert_eq!(emitted, list(&run["greedy"]), "{at}: greedy");
            assert_steps(&session, &prompt, &emitted, run, &at);
        }
    }
}

/// The passes over the model against the golden steps: drafts, accepted tokens, cache slots.
fn assert_steps(session: &TableSession, prompt: &[u32], emitted: &[u32], run: &Value, at: &str) {
    let steps = run["steps"].as_array().unwrap();
    let mut calls = session.calls.iter();
    let mut written = 0;
    for (index, step) in steps.iter().enumerate() {
        let at = format!("{at}, step {index}");
        let ids = list(&step["draft_ids"]);
        let accepted = list(&step["accepted"]);
        // Tokens known before the step, the draft's root included.
        let known = prompt.len() + written;
        let history = [prompt, &emitted[..written]].concat();
        assert!(history.ends_with(&list(&step["query"])), "{at}: query");
        let mut slots = (Vec::new(), 0);
        if index > 0 {
            match calls.next() {
                Some(Call::Step(rows)) => {
                    assert_eq!(ids, [rows[0].1], "{at}: a plain step");
                }
                Some(Call::Tree(tree)) => {
                    assert_eq!(tree.tokens(), ids, "{at}: draft");
                    assert_eq!(mask_rows(tree), step["mask_rows"], "{at}: mask");
                    let Some(Call::Commit(nodes)) = calls.next() else {
                        panic!("{at}: no path was kept");
                    };
                    let moved = nodes[1..].iter().map(|&n| known as u64 - 1 + u64::from(n));
                    slots = (moved.collect(), nodes.len() - 1);
                }
                other => panic!("{at}: {other:?}"),
            }
        }
        assert_eq!(
            emitted[written..written + accepted.len()],
            accepted,
            "{at}: accepted"
        );
        assert_eq!(step["dl"], ids.len(), "{at}: dl");
        assert_eq!(step["edl"], accepted.len(), "{at}: edl");
        let (source, matched) = slots;
        if step["kv"].is_null() {
            assert_eq!(
                matched + 1,
                ids.len(),
                "{at}: nothing moves if all is accepted"
            );
        } else {
            let continuous = source.iter().zip(known as u64..).all(|(&a, b)| a == b);
            let kv = serde_json::json!({
                "src": source, "context_length": known, "match": matched, "continuous": continuous,
            });
            assert_eq!(kv, step["kv"], "{at}: cache slots");
        }
        written += accepted.len();
    }
    assert_eq!(written, emitted.len(), "{at}: all steps were seen");
    assert!(
        calls.next().is_none(),
        "{at}: passes beyond the golden ones"
    );
}

fn layouts() -> impl proptest::strategy::Strategy<Value = Layout> {
    prop::sample::select(vec![Layout::Hier, Layout::Par, Layout::One])
}

fn sources() -> impl proptest::strategy::Strategy<Value = Source> {
    prop::sample::select(vec![Source::Mix, Source::Input, Source::Output])
}

/// Runs a strategy on prompts one after another: [prompts][tokens].
fn outputs(
    strategy: &mut dyn Strategy,
    table: &Table,
    prompts: &[Vec<u32>],
    eos: &[u32],
    naive: bool,
) -> Vec<(Vec<u32>, usize)> {
    let run = |prompt: &Vec<u32>| {
        let mut session = TableSession::new(table.clone(), prompt);
        session.naive_trees = naive;
        let (emitted, outcome) = session.decode(strategy, eos, 40);
        let mut held = prompt.clone();
        held.extend(tokens(&emitted));
        held.pop();
        assert_eq!(
            session.seqs[0].as_ref(),
            Some(&held),
            "the sequence holds all but the last"
        );
        (tokens(&emitted), outcome.stats.forwards)
    };
    prompts.iter().map(run).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(80))]

    /// Every option of drafting, token 0 in play, with penalties, greedy or seeded: the text is that of
    /// plain decoding, and no more passes are made.
    #[test]
    fn nothing_differs_from_plain_decoding(
        seed in 0u64..100_000,
        vocab in 4usize..12,
        sharp in 0.5f64..4.0,
        layout in layouts(),
        mode in sources(),
        decoding_length in 1usize..20,
        branch_length in 1usize..8,
        max_query_length in 1usize..4,
        temperature in prop::sample::select(vec![0.0f32, 0.7, 1.5]),
        repetition_penalty in prop::sample::select(vec![1.0f32, 1.3]),
        presence_penalty in prop::sample::select(vec![0.0f32, 0.8]),
        stop_words in prop::collection::vec(0u32..4, 0..3),
        flags in any::<(bool, bool, bool, bool)>(),
        prompts in prop::collection::vec(prop::collection::vec(0u32..4, 1..20), 1..5),
    ) {
        let (adaptive, isolate, compat, naive) = flags;
        let table = Table::random(vocab, 2, seed, sharp);
        let sampling = SamplingConfig {
            temperature,
            repetition_penalty,
            presence_penalty,
            seed,
            ..SamplingConfig::default()
        };
        let eos = [3];
        let config = LookaheadConfig {
            decoding_length,
            branch_length,
            max_query_length,
            layout,
            mode,
            stop_words,
            isolate,
            adaptive,
            compat,
            ..LookaheadConfig::default()
        };
        let sampler = || Box::new(Sample::new(sampling.clone(), 0).unwrap());
        let plain = outputs(&mut Sampling::new(sampler()), &table, &prompts, &eos, false);
        // One strategy for all prompts: it remembers, its sampler starts anew.
        let mut lookahead = Lookahead::new(config.clone(), sampler()).unwrap();
        let found = outputs(&mut lookahead, &table, &prompts, &eos, naive);
        for (found, plain) in found.iter().zip(&plain) {
            prop_assert_eq!(&found.0, &plain.0);
            prop_assert!(found.1 <= plain.1);
        }
        // And a fresh sampler over the store that the first one filled.
        let store = lookahead.store().cloned().unwrap();
        let mut other = Lookahead::new(config, sampler()).unwrap().with_store(store);
        let again = outputs(&mut other, &table, &prompts, &eos, naive);
        for (again, prompt) in again.iter().zip(&prompts) {
            let mut alone = Sampling::new(sampler());
            let alone = outputs(&mut alone, &table, std::slice::from_ref(prompt), &eos, false);
            prop_assert_eq!(&again.0, &alone[0].0);
        }
    }

    /// Drafts stay within their limits, and with isolation never hold what only another live request read.
    #[test]
    fn drafts_keep_their_limits(
        mine in prop::collection::vec(0u32..6, 2..30),
        theirs in prop::collection::vec(4u32..10, 2..30),
        output in prop::collection::vec(0u32..8, 2..30),
        layout in layouts(),
        mode in sources(),
        decoding_length in 1usize..12,
        branch_length in 1usize..6,
        query in prop::collection::vec(0u32..10, 1..3),
    ) {
        let mut store = TrieStore::new(trie(64, 64));
        let (a, b) = (store.open(), store.open());
        store.put(&mine, branch_length + 1, Source::Input, a, false);
        store.put(&theirs, branch_length + 1, Source::Input, b, false);
        store.put(&output, branch_length + 1, Source::Output, a, false);
        let draft = store.draft(layout, &DraftQuery {
            query: &query,
            mode,
            idx: a,
            decoding_length,
            branch_length,
            min_input_size: 0,
            min_output_size: decoding_length.div_ceil(2),
            isolate: true,
        });
        prop_assert!(draft.tree.len() <= decoding_length.max(1));
        prop_assert_eq!(draft.tree.tokens()[0], *query.last().unwrap());
        for node in 0..draft.tree.len() as u32 {
            prop_assert!(draft.tree.depth(node) <= branch_length);
            let token = draft.tree.tokens()[node as usize];
            let seen = match mode {
                Source::Mix => mine.contains(&token) || output.contains(&token),
                Source::Input => mine.contains(&token),
                Source::Output => output.contains(&token),
            };
            prop_assert!(node == 0 || seen, "{} is another request's", token);
        }
    }

    /// A prompt leaves no trace, the other request's stays, and a squeezed tree is within its capacity.
    #[test]
    fn prompts_are_forgotten_and_outputs_decay(
        texts in prop::collection::vec(prop::collection::vec(0u32..5, 2..40), 3),
        output in prop::collection::vec(0u32..5, 2..200),
        max_node in 4usize..40,
    ) {
        let mut store = TrieStore::new(trie(max_node, max_node / 2 + 1));
        store.put(&output, 5, Source::Output, 0, false);
        let before = store.to_json();
        let (a, b) = (store.open(), store.open());
        store.put(&texts[0], 5, Source::Input, a, false);
        store.put(&texts[1], 5, Source::Input, b, false);
        let mut only_b = TrieStore::new(trie(max_node, max_node / 2 + 1));
        only_b.put(&output, 5, Source::Output, 0, false);
        let _ = only_b.open();
        let _ = only_b.open();
        only_b.put(&texts[1], 5, Source::Input, b, false);
        store.put(&[], 5, Source::Input, a, true);
        let sorted = |store: &TrieStore| frequencies(&store.to_json());
        prop_assert_eq!(sorted(&store), sorted(&only_b));
        store.put(&[], 5, Source::Input, b, true);
        prop_assert_eq!(sorted(&store), frequencies(&before));
        store.put(&texts[2], 5, Source::Input, a, false);
        store.squeeze();
        for (_, tree) in store.to_json().as_object().unwrap() {
            prop_assert!(number(tree, "n_node") <= max_node);
            prop_assert!(number(tree, "n_output_node") <= max_node / 2 + 1);
        }
    }

    /// What was stored is there after saving and loading, and damaged files are refused.
    #[test]
    fn stores_survive_the_disk(text in prop::collection::vec(0u32..9, 2..80), cut in 0.0f64..1.0) {
        let mut store = TrieStore::new(trie(1000, 1000));
        store.put(&text, 6, Source::Output, 0, false);
        let mut bytes = Vec::new();
        store.save(&mut bytes).unwrap();
        let mut again = TrieStore::new(trie(1000, 1000));
        again.load(&mut &bytes[..]).unwrap();
        prop_assert_eq!(frequencies(&again.to_json()), frequencies(&store.to_json()));
        let part = &bytes[..(bytes.len() as f64 * cut) as usize];
        prop_assert!(TrieStore::new(trie(1000, 1000)).load(&mut &*part).is_err());
    }
}

fn trie(max_node: usize, max_output_node: usize) -> TrieConfig {
    TrieConfig {
        max_node,
        max_output_node,
        stop_words: Vec::new(),
        eos: vec![],
        compat: false,
    }
}

/// All frequencies by path, without counters and order.
fn frequencies(store: &Value) -> std::collections::BTreeMap<String, f64> {
    fn walk(nodes: &Value, path: String, out: &mut std::collections::BTreeMap<String, f64>) {
        for (token, node) in nodes.as_object().unwrap() {
            let path = format!("{path} {token}");
            for (idx, freq) in node["f"].as_object().unwrap() {
                out.insert(format!("{path} by {idx}"), freq.as_f64().unwrap());
            }
            walk(&node["c"], path, out);
        }
    }
    let mut out = Default::default();
    for (first, tree) in store.as_object().unwrap() {
        walk(&tree["nodes"], first.clone(), &mut out);
    }
    out
}

/// Sampled text has the model's own distribution: 20,000 draws against exact probabilities.
#[test]
fn sampled_pairs_have_the_exact_distribution() {
    let table = Table::random(5, 2, 11, 1.0);
    let prompt = [1, 2, 3, 1, 2, 4, 1, 2];
    let store = Arc::new(Mutex::new(TrieStore::new(trie(1000, 1000))));
    let mut counts = [0u32; 25];
    let draws = 20_000;
    let mut guessed = 0;
    for seed in 0..draws {
        let config = SamplingConfig {
            seed,
            ..SamplingConfig::default()
        };
        let sampler = Box::new(Sample::new(config, 0).unwrap());
        let options = LookaheadConfig {
            adaptive: false,
            decoding_length: 6,
            branch_length: 3,
            ..LookaheadConfig::default()
        };
        let mut strategy = Lookahead::new(options, sampler)
            .unwrap()
            .with_store(store.clone());
        let mut session = TableSession::new(table.clone(), &prompt);
        let (emitted, _) = session.decode(&mut strategy, &[], 4);
        let emitted = tokens(&emitted);
        counts[(emitted[2] * 5 + emitted[3]) as usize] += 1;
        guessed += usize::from(
            session
                .calls
                .iter()
                .any(|call| matches!(call, Call::Tree(_))),
        );
    }
    assert!(
        guessed > draws as usize / 2,
        "drafts took part in {guessed} of {draws}"
    );
    let mut exact = [0f64; 25];
    for code in 0..625u32 {
        let text: Vec<u32> = (0..4).map(|i| code / 5u32.pow(i) % 5).collect();
        let mut tokens = prompt.to_vec();
        let mut logprob = 0.0;
        for &token in &text {
            logprob += table.log_softmax(&tokens)[token as usize];
            tokens.push(token);
        }
        exact[(text[2] * 5 + text[3]) as usize] += logprob.exp();
    }
    let chi: f64 = counts
        .iter()
        .zip(&exact)
        .map(|(&count, &p)| (f64::from(count) - p * draws as f64).powi(2) / (p * draws as f64))
        .sum();
    // 24 degrees of freedom: 51.2 is passed by one in a thousand.
    assert!(chi < 51.2, "chi-square {chi}");
}

/// The same text again costs a fraction of the passes: the store remembers what was written.
#[test]
fn what_was_written_before_is_written_faster() {
    let table = Table::random(40, 3, 5, 3.0);
    let config = LookaheadConfig {
        decoding_length: 16,
        adaptive: false,
        ..LookaheadConfig::default()
    };
    let mut strategy = Lookahead::new(config, greedy()).unwrap();
    let prompt = vec![vec![7, 9, 30]];
    let first = outputs(&mut strategy, &table, &prompt, &[], false);
    let second = outputs(&mut strategy, &table, &prompt, &[], false);
    assert_eq!(first[0].0, second[0].0);
    assert!(second[0].1 * 4 < 40, "{} passes for 40 tokens", second[0].1);
}

#[test]
fn trie_files_are_read_and_written_and_mistakes_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("drafts.trie");
    let config = LookaheadConfig {
        trie_file: Some(path.clone()),
        adaptive: false,
        ..LookaheadConfig::default()
    };
    let table = Table::random(30, 2, 3, 3.0);
    let prompt = vec![vec![4, 5]];
    let mut passes = Vec::new();
    for _ in 0..2 {
        // A new strategy each time: only the file remembers.
        let mut strategy = Lookahead::new(config.clone(), greedy()).unwrap();
        passes.push(outputs(&mut strategy, &table, &prompt, &[], false)[0].1);
    }
    assert!(passes[1] * 2 < passes[0], "{passes:?}");
    fs::write(&path, "not a trie").unwrap();
    let mut strategy = Lookahead::new(config, greedy()).unwrap();
    let mut session = TableSession::new(table, &[4, 5]);
    let request = longspan_infer::decode::Request {
        seq: longspan_infer::decode::SeqId(0),
        eos: vec![],
        max_tokens: 4,
    };
    match strategy.begin(&mut session, &request) {
        Err(DecodeError::File { path: named, .. }) => assert!(named.ends_with("drafts.trie")),
        other => panic!("{other:?}"),
    }
}
