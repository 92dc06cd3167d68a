//! Chain of Agents, AgentWrite's word count, and the merging of summaries against reference results.

#[path = "../../../tests/golden.rs"]
mod golden;

use longspan_agents::workflow::agent_write::count_words;
use longspan_agents::workflow::chain::{cost, vote};
use longspan_agents::workflow::chunk::{cut_long, pack};
use longspan_agents::workflow::summary::{SummaryConfig, hierarchy};
use serde_json::Value;

fn json(path: &str) -> Value {
    let path = golden::root().join(path);
    serde_json::from_str(
        &std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())),
    )
    .unwrap()
}

fn words(text: &str) -> usize {
    text.split_whitespace().count()
}

fn list(value: &Value) -> Vec<&str> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|text| text.as_str().unwrap())
        .collect()
}

/// The chunks of pieces joined by one blank.
fn joined(pieces: &[&str], budget: usize) -> Vec<String> {
    let counts: Vec<usize> = pieces.iter().map(|piece| words(piece)).collect();
    let join = |range: std::ops::Range<usize>| {
        pieces[range]
            .iter()
            .map(|piece| piece.trim())
            .collect::<Vec<_>>()
            .join(" ")
    };
    pack(&counts, budget).into_iter().map(join).collect()
}

#[test]
fn chunks_votes_and_costs() {
    let file = json("chain-of-agents/coa.json");
    let cases = file["chunking"].as_array().unwrap();
    assert!(cases.len() >= 4);
    for case in cases {
        let number = |key: &str| case[key].as_u64().unwrap() as usize;
        let budget = number("window")
            - number("query_tokens")
            - number("instruction_tokens")
            - number("reserved_cu_tokens");
        assert_eq!(budget, number("budget"));
        let sentences = list(&case["sentences"]);
        assert_eq!(joined(&sentences, budget), list(&case["chunks_paper"]));
        let mut pieces = Vec::new();
        for sentence in &sentences {
            pieces
                .extend(cut_long(sentence, budget, &mut |text| Ok::<_, ()>(words(text))).unwrap());
        }
        let chunks = joined(&pieces, budget);
        assert_eq!(chunks, list(&case["chunks_hard_split"]));
        let most = chunks.iter().map(|chunk| words(chunk)).max().unwrap();
        assert_eq!(most, number("max_chunk_tokens"));
    }
    for case in file["voting"].as_array().unwrap() {
        let winner = case["winner_index"].as_u64().map(|index| index as usize);
        assert_eq!(vote(&list(&case["answers"])), winner, "{case}");
    }
    for case in file["cost"].as_array().unwrap() {
        let number = |key: &str| case[key].as_u64().unwrap();
        let found = cost(number("n"), number("k"), number("r"));
        let found = serde_json::to_value(found).unwrap();
        for (key, value) in found.as_object().unwrap() {
            assert_eq!(value, &case[key], "{key} of {case}");
        }
    }
}

#[test]
fn words_are_counted_as_the_paper_does() {
    let file = json("longwriter/metrics.json");
    let cases = file["count_words"].as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let want = case["n"].as_u64().unwrap();
        assert_eq!(count_words(text) as u64, want, "{text:?}");
    }
}

#[test]
fn summaries_merge_as_in_the_reference() {
    let file = json("scm/hierarchy.json");
    let cases = file["cases"].as_array().unwrap();
    assert!(cases.len() >= 3);
    for case in cases {
        let config = SummaryConfig {
            group: case["group_tokens"].as_u64().unwrap() as usize,
            ..SummaryConfig::default()
        };
        let tokens: Vec<usize> = case["summary_tokens"]
            .as_array()
            .unwrap()
            .iter()
            .map(|n| n.as_u64().unwrap() as usize)
            .collect();
        let calls = case["calls"].as_array().unwrap();
        let name = |node: usize| match node.checked_sub(tokens.len()) {
            Some(call) => format!("g{call}"),
            None => format!("p{node}"),
        };
        let mut made = 0;
        let mut depths: Vec<usize> = Vec::new();
        let last = hierarchy(&config, &tokens, |level, members, limit, _| {
            let call = &calls[made];
            let members: Vec<String> = members.iter().map(|&node| name(node)).collect();
            assert_eq!(members, list(&call["members"]));
            assert_eq!(limit, call["max_tokens"].as_i64().unwrap());
            depths.resize(depths.len().max(level), 0);
            depths[level - 1] += 1;
            made += 1;
            Ok::<_, ()>(call["out_tokens"].as_u64().unwrap() as usize)
        })
        .unwrap();
        assert_eq!(made, calls.len());
        assert_eq!(name(last), case["final"].as_str().unwrap());
        let want = case["depths"]
            .as_array()
            .unwrap()
            .iter()
            .map(|depth| depth["count"].as_u64().unwrap() as usize);
        assert_eq!(depths, want.collect::<Vec<_>>());
    }
}
