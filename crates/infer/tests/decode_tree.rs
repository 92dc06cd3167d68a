//! LLM Tree Search (40): goldens of the definitions in f64, and the laws that tie the search to exhaustive,
//! best-first and greedy search.

mod decode_common;
#[path = "../../../tests/golden.rs"]
mod golden;

use decode_common::{Call, Table, TableSession, tokens};
use golden::Case;
use longspan_infer::decode::End;
use longspan_infer::decode::tree_search::{
    Alpha, Confidence, Mode, SearchTree, State, TreeConfig, TreeSearch,
};
use proptest::prelude::*;

fn table(case: &Case) -> Table {
    Table {
        vocab: case.meta_usize("vocab"),
        t1: case.f64("t1"),
        t2: case.f64("t2"),
        pos: case.f64("pos"),
        embedding: None,
    }
}

fn prompt(case: &Case) -> Vec<u32> {
    case.i64("prompt").iter().map(|&t| t as u32).collect()
}

fn confidence(case: &Case) -> Confidence {
    serde_json::from_value(case.meta("kind").clone()).unwrap()
}

/// Prompt and path of a node, and the log probabilities after it.
fn after(tree: &SearchTree, table: &Table, prompt: &[u32], node: usize) -> Vec<f64> {
    let mut text = prompt.to_vec();
    text.extend(tree.path(node).iter().map(|&(token, _)| token));
    table.log_softmax(&text)
}

fn ids(nodes: &[usize]) -> Vec<f64> {
    nodes.iter().map(|&node| node as f64).collect()
}

/// Index of a node as the goldens write it: -1 above the root.
fn parent_id(parent: usize) -> f64 {
    if parent == usize::MAX {
        -1.0
    } else {
        parent as f64
    }
}

fn token_id(token: u32) -> f64 {
    if token == u32::MAX {
        -1.0
    } else {
        f64::from(token)
    }
}

/// Integers must be equal, whatever tolerance is stated for floats.
fn exact(case: &Case, name: &str, found: &[f64]) {
    case.assert_within(name, found, |_, _| 0.0);
}

#[test]
fn leaf_search_agrees_with_its_definition() {
    for case in golden::cases_of("llm-tree-search", "leaf") {
        let config = TreeConfig {
            mode: Mode::Leaf,
            budget: Some(case.meta_usize("budget")),
            top_k: Some(case.meta_usize("top_k")),
            alpha: Alpha(case.meta_f64("alpha")),
            confidence: confidence(&case),
            ..TreeConfig::default()
        };
        let (table, prompt) = (table(&case), prompt(&case));
        let eos = [case.meta_usize("eos") as u32];
        let mut tree = SearchTree::new(config, &eos, case.meta_usize("max_len"), None);
        let mut expanded = Vec::new();
        for uniform in case.f64("uniforms") {
            let Some(node) = tree.pick(uniform) else {
                break;
            };
            expanded.push(node);
            let logprobs = after(&tree, &table, &prompt, node);
            tree.expand(node, &logprobs);
        }
        exact(&case, "expanded", &ids(&expanded));
        let nodes = tree.nodes();
        let of = |f: &dyn Fn(&longspan_infer::decode::tree_search::Node) -> f64| -> Vec<f64> {
            nodes.iter().map(f).collect()
        };
        exact(&case, "node_token", &of(&|node| token_id(node.token)));
        exact(&case, "node_parent", &of(&|node| parent_id(node.parent)));
        case.assert_close("node_logprob", &of(&|node| node.logprob));
        let ranked = tree.ranked();
        exact(&case, "ranked_leaves", &ids(&ranked));
        let values: Vec<f64> = ranked.iter().map(|&n| tree.confidence(n, &[])).collect();
        case.assert_close("ranked_confidence", &values);
        let best: Vec<u32> = serde_json::from_value(case.meta("best").clone()).unwrap();
        let found: Vec<u32> = tree
            .path(ranked[0])
            .iter()
            .map(|&(token, _)| token)
            .collect();
        assert_eq!(found, best, "{}", case.path.display());
    }
}

#[test]
fn puct_agrees_with_its_definition() {
    for case in golden::cases_of("llm-tree-search", "puct") {
        let roll = case.meta_usize("roll");
        let max_len = case.meta_usize("max_len");
        let config = TreeConfig {
            mode: Mode::Puct,
            top_k: Some(case.meta_usize("top_k")),
            c_puct: case.meta_f64("c"),
            tau_prior: case.meta_f64("T"),
            backup: serde_json::from_value(case.meta("backup").clone()).unwrap(),
            confidence: confidence(&case),
            ..TreeConfig::default()
        };
        let (table, prompt) = (table(&case), prompt(&case));
        let eos = [case.meta_usize("eos") as u32];
        let mut tree = SearchTree::new(config, &eos, max_len, None);
        let mut selected = Vec::new();
        let mut best = (f64::NEG_INFINITY, Vec::new());
        for _ in 0..case.meta_usize("budget") {
            let node = tree.select();
            selected.push(node);
            let mut text = prompt.clone();
            text.extend(tree.path(node).iter().map(|&(token, _)| token));
            let mut rollout = Vec::new();
            if tree.nodes()[node].state != State::Terminal {
                tree.expand(node, &table.log_softmax(&text));
                while rollout.len() < roll {
                    let logprobs = table.log_softmax(&text);
                    let mut top = 0;
                    for (index, lp) in logprobs.iter().enumerate() {
                        if *lp > logprobs[top] {
                            top = index;
                        }
                    }
                    rollout.push((top as u32, logprobs[top]));
                    text.push(top as u32);
                    if tree.ends(top as u32, tree.nodes()[node].depth + rollout.len()) {
                        break;
                    }
                }
            }
            let value = tree.confidence(node, &rollout);
            tree.back_up(node, value);
            if value > best.0 + 1e-15 {
                best = (value, text[prompt.len()..].to_vec());
            }
        }
        exact(&case, "selected", &ids(&selected));
        let nodes = tree.nodes();
        let of = |f: &dyn Fn(&longspan_infer::decode::tree_search::Node) -> f64| -> Vec<f64> {
            nodes.iter().map(f).collect()
        };
        exact(&case, "node_token", &of(&|node| token_id(node.token)));
        exact(&case, "node_parent", &of(&|node| parent_id(node.parent)));
        exact(&case, "node_visits", &of(&|node| node.visits as f64));
        case.assert_close("node_prior", &of(&|node| node.prior));
        case.assert_close("node_value_sum", &of(&|node| node.value_sum));
        case.assert_close("node_value_max", &of(&|node| node.value_max));
        let found: Vec<f64> = best.1.iter().map(|&t| f64::from(t)).collect();
        exact(&case, "best_tokens", &found);
        case.assert_close("best_value", &[best.0]);
        // The strategy over a session makes the same simulations.
        let spec = TreeConfig {
            budget: Some(case.meta_usize("budget")),
            roll: Some(roll),
            top_k: Some(case.meta_usize("top_k")),
            c_puct: case.meta_f64("c"),
            tau_prior: case.meta_f64("T"),
            backup: serde_json::from_value(case.meta("backup").clone()).unwrap(),
            confidence: confidence(&case),
            ..TreeConfig::default()
        };
        let mut strategy = TreeSearch::new(spec, "tree").unwrap();
        let mut session = TableSession::new(table, &prompt);
        let (emitted, _) = session.decode(&mut strategy, &eos, max_len);
        let visits = strategy
            .tree()
            .nodes()
            .iter()
            .map(|node| node.visits as f64);
        exact(&case, "node_visits", &visits.collect::<Vec<f64>>());
        let shown = best.1.iter().filter(|&token| *token != eos[0]).copied();
        assert_eq!(tokens(&emitted), shown.collect::<Vec<u32>>());
    }
}

const KINDS: [Confidence; 4] = [
    Confidence::Mean,
    Confidence::Joint,
    Confidence::Min,
    Confidence::Last,
];

/// Every text of at most `max_len` tokens that ends with `eos` or at the limit, with its log probabilities.
fn all_texts(table: &Table, prompt: &[u32], eos: u32, max_len: usize) -> Vec<Vec<(u32, f64)>> {
    let mut open = vec![Vec::new()];
    let mut done = Vec::new();
    while let Some(path) = open.pop() {
        let mut text = prompt.to_vec();
        text.extend(path.iter().map(|&(token, _): &(u32, f64)| token));
        for (token, logprob) in (0u32..).zip(table.log_softmax(&text)) {
            let mut path = path.clone();
            path.push((token, logprob));
            if token == eos || path.len() == max_len {
                done.push(path);
            } else {
                open.push(path);
            }
        }
    }
    done
}

fn value(kind: Confidence, path: &[(u32, f64)]) -> f64 {
    let lps = path.iter().map(|&(_, lp)| lp);
    match kind {
        Confidence::Mean => lps.sum::<f64>() / path.len() as f64,
        Confidence::Joint => lps.sum(),
        Confidence::Min => lps.fold(0.0, f64::min),
        Confidence::Last => path[path.len() - 1].1,
    }
}

fn search(
    config: TreeConfig,
    table: &Table,
    prompt: &[u32],
    eos: &[u32],
    max_len: usize,
) -> (TreeSearch, longspan_infer::decode::Outcome, TableSession) {
    let mut strategy = TreeSearch::new(config, "tree").unwrap();
    let mut session = TableSession::new(table.clone(), prompt);
    let (emitted, outcome) = session.decode(&mut strategy, eos, max_len);
    assert_eq!(
        session.seqs[0].as_deref(),
        Some(prompt),
        "the prompt's sequence was touched"
    );
    assert_eq!(tokens(&emitted), tokens(&outcome.answers[0].choices));
    (strategy, outcome, session)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// With room for everything the answer is the best text there is, by every confidence.
    #[test]
    fn a_large_budget_is_exhaustive(seed in 0u64..1000, kind in prop::sample::select(KINDS.to_vec())) {
        let table = Table::random(4, 3, seed, 1.5);
        let config = TreeConfig {
            mode: Mode::Leaf,
            budget: Some(500),
            top_k: Some(4),
            confidence: kind,
            ..TreeConfig::default()
        };
        let (_, outcome, _) = search(config, &table, &[1, 3], &[2], 4);
        let texts = all_texts(&table, &[1, 3], 2, 4);
        let best = texts.iter().map(|path| value(kind, path)).fold(f64::NEG_INFINITY, f64::max);
        prop_assert!((outcome.answers[0].score.ln() - best).abs() < 1e-5);
    }

    /// alpha = inf by joint probability is best-first search.
    #[test]
    fn the_sharpest_draw_is_best_first(seed in 0u64..1000, budget in 1usize..40) {
        let table = Table::random(6, 3, seed, 1.5);
        let config = TreeConfig {
            mode: Mode::Leaf,
            top_k: Some(3),
            alpha: Alpha(f64::INFINITY),
            confidence: Confidence::Joint,
            ..TreeConfig::default()
        };
        let mut tree = SearchTree::new(config, &[2], 6, None);
        let mut heap: Vec<(f64, Vec<u32>)> = vec![(0.0, vec![])];
        for _ in 0..budget {
            let Some(node) = tree.pick(0.3) else { break };
            let found: Vec<u32> = tree.path(node).iter().map(|&(token, _)| token).collect();
            // The oracle: the best of a list, its three likeliest children back into it.
            let mut top = 0;
            for (index, item) in heap.iter().enumerate() {
                if item.0 > heap[top].0 {
                    top = index;
                }
            }
            let (sum, path) = heap.remove(top);
            prop_assert_eq!(&found, &path);
            let mut text = vec![1];
            text.extend(&path);
            let logprobs = table.log_softmax(&text);
            let mut order: Vec<(f64, u32)> = logprobs.iter().copied().zip(0..).collect();
            order.sort_by(|a, b| b.0.total_cmp(&a.0));
            for &(lp, token) in &order[..3] {
                let mut path = path.clone();
                path.push(token);
                if token != 2 && path.len() < 6 {
                    heap.push((sum + lp, path));
                }
            }
            tree.expand(node, &logprobs);
        }
    }

    /// One child a node is greedy decoding, in both modes.
    #[test]
    fn one_child_is_greedy(seed in 0u64..1000, leaf in any::<bool>()) {
        let table = Table::random(7, 3, seed, 2.0);
        let config = TreeConfig {
            mode: if leaf { Mode::Leaf } else { Mode::Puct },
            top_k: Some(1),
            budget: Some(30),
            ..TreeConfig::default()
        };
        let (_, outcome, _) = search(config, &table, &[1], &[2], 9);
        let greedy = table.greedy(&[1], &[2], 9);
        let mut found = tokens(&outcome.answers[0].choices);
        if outcome.answers[0].end == End::Eos {
            found.push(2);
        }
        prop_assert_eq!(found, greedy);
    }

    /// puct with whole rollouts is never less confident than greedy, more budget never hurts, visits add
    /// up, every pass reads one token on its parent's keys, and best, pair and n-best fit together.
    #[test]
    fn puct_keeps_its_books(
        seed in 0u64..1000,
        budget in 1usize..50,
        kind in prop::sample::select(KINDS.to_vec()),
        adaptive in prop::option::of(0.3f64..1.0),
        most_forwards in prop::option::of(1usize..60),
    ) {
        let table = Table::random(6, 3, seed, 2.0);
        let config = |budget| TreeConfig {
            budget: Some(budget),
            confidence: kind,
            adaptive,
            max_forwards: most_forwards,
            n: 3,
            lambda: 0.1,
            ..TreeConfig::default()
        };
        let (strategy, outcome, session) = search(config(budget), &table, &[1], &[2], 8);
        let greedy = table.greedy(&[1], &[2], 8);
        let mut text = vec![1];
        let path: Vec<(u32, f64)> = greedy.iter().map(|&token| {
            let lp = table.log_softmax(&text)[token as usize];
            text.push(token);
            (token, lp)
        }).collect();
        prop_assert!(outcome.answers[0].score.ln() >= value(kind, &path) - 1e-5);
        let (_, more, _) = search(config(budget + 10), &table, &[1], &[2], 8);
        prop_assert!(more.answers[0].score >= outcome.answers[0].score);
        let nodes = strategy.tree().nodes();
        for node in nodes {
            let below: u64 = node.children.iter().map(|&child| nodes[child].visits).sum();
            prop_assert!(below <= node.visits);
        }
        let forwards = session.calls.len();
        prop_assert!(session.calls.iter().all(|call| matches!(call, Call::Step(rows) if rows.len() == 1)));
        if let Some(most) = most_forwards {
            // A simulation that has begun is ended: at most its rollout more.
            prop_assert!(forwards <= most + 8, "{} passes", forwards);
        } else {
            prop_assert_eq!(nodes[0].visits, budget as u64);
        }
        prop_assert!(outcome.answers.windows(2).all(|w| w[0].choices != w[1].choices || w[0].end != w[1].end));
        if let Some(pair) = &outcome.pair {
            prop_assert_eq!(&pair.chosen, &outcome.answers[0]);
            prop_assert!(pair.rejected.score <= pair.chosen.score);
            prop_assert!(pair.rejected != pair.chosen);
        }
    }

    /// The cap on open leaves holds, and an evaluator's word counts instead of the model's.
    #[test]
    fn evaluators_and_caps(seed in 0u64..1000, wanted in 3u32..7) {
        let table = Table::random(7, 3, seed, 1.0);
        for mode in [Mode::Leaf, Mode::Puct] {
            let config = TreeConfig {
                mode,
                budget: Some(60),
                frontier: 8,
                top_k: Some(7),
                ..TreeConfig::default()
            };
            let judge = move |tokens: &[u32], _: &[f64]| {
                let hits = tokens.iter().filter(|&&token| token == wanted).count();
                (1.0 + hits as f64) / (1.0 + tokens.len() as f64)
            };
            let mut strategy = TreeSearch::new(config, "tree").unwrap().with_evaluator(judge);
            let mut session = TableSession::new(table.clone(), &[1]);
            let (emitted, outcome) = session.decode(&mut strategy, &[], 3);
            prop_assert!(strategy.tree().open().len() <= 8);
            let score = judge(&tokens(&emitted), &[]);
            prop_assert!((outcome.answers[0].score - score).abs() < 1e-9);
            if mode == Mode::Leaf {
                prop_assert_eq!(tokens(&emitted), vec![wanted; 3]);
            }
        }
    }
}

/// Leaves are drawn in proportion to confidence^alpha: 20,000 draws on a grown tree.
#[test]
fn leaves_are_drawn_in_proportion() {
    let table = Table::random(8, 3, 3, 1.0);
    for alpha in [0.0, 1.0, 3.0] {
        let config = TreeConfig {
            mode: Mode::Leaf,
            top_k: Some(3),
            alpha: Alpha(alpha),
            ..TreeConfig::default()
        };
        let mut tree = SearchTree::new(config, &[2], 6, None);
        for uniform in [0.0, 0.4, 0.9, 0.2, 0.7] {
            let node = tree.pick(uniform).unwrap();
            let logprobs = after(&tree, &table, &[1], node);
            tree.expand(node, &logprobs);
        }
        let random = longspan_infer::decode::random::CounterRng::new(9, 1);
        let mut counts = vec![0f64; tree.nodes().len()];
        let draws = 20_000;
        (0..draws).for_each(|i| counts[tree.pick(random.uniform(i)).unwrap()] += 1.0);
        let weight = |&leaf: &usize| tree.confidence(leaf, &[]).powf(alpha);
        let total: f64 = tree.open().iter().map(weight).sum();
        let chi: f64 = tree
            .open()
            .iter()
            .map(|leaf| {
                let expected = weight(leaf) / total * draws as f64;
                (counts[*leaf] - expected).powi(2) / expected
            })
            .sum();
        let freedom = tree.open().len() as f64 - 1.0;
        // Wilson and Hilferty's approximation of the quantile at one in a thousand.
        let limit =
            freedom * (1.0 - 2.0 / (9.0 * freedom) + 3.09 * (2.0 / (9.0 * freedom)).sqrt()).powi(3);
        assert!(chi < limit, "alpha {alpha}: chi-square {chi} above {limit}");
    }
}

/// A leaf more confident than every finished answer is completed, and the search goes back to earlier forks.
#[test]
fn leaf_search_finishes_and_returns_to_forks() {
    let table = Table::random(12, 3, 21, 2.0);
    let config = |finish| TreeConfig {
        mode: Mode::Leaf,
        budget: Some(30),
        finish,
        n: 4,
        lambda: 1.0,
        ..TreeConfig::default()
    };
    let (strategy, with, _) = search(config(true), &table, &[1, 4], &[2], 12);
    let (_, without, _) = search(config(false), &table, &[1, 4], &[2], 12);
    assert!(
        with.answers[0].score >= without.answers[0].score || without.answers[0].choices.len() < 12
    );
    let depths: Vec<usize> = strategy
        .tree()
        .nodes()
        .iter()
        .map(|node| node.depth)
        .collect();
    assert!(
        depths.windows(2).any(|w| w[1] < w[0]),
        "no return to an earlier fork: {depths:?}"
    );
    let best = &with.answers[0];
    assert!(
        best.end == End::Eos || best.choices.len() == 12,
        "the answer is complete"
    );
}
