//! Diverse Beam Search (36): goldens of transformers' group beam search and of the definitions in f64, and
//! the laws that tie it to greedy decoding, beam search and exhaustive search.

mod decode_common;
#[path = "../../../tests/golden.rs"]
mod golden;

use decode_common::{Call, Table, TableSession, tokens};
use golden::Case;
use longspan_infer::decode::beam::{BeamConfig, BeamSearch, BeamStrategy, EarlyStopping};
use longspan_infer::decode::diversity::{
    Diversity, DiversityTerm, Earlier, EmbeddingTable, GroupView, Term,
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

/// Drives a search over a table in f64; calls of the model.
fn drive(search: &mut BeamSearch, table: &Table, prompt: &[u32]) -> usize {
    let mut rows = vec![prompt.to_vec()];
    let mut calls = 0;
    loop {
        let next = search.advance(&|row| table.log_softmax(&rows[row]));
        if next.is_empty() {
            return calls;
        }
        rows = next
            .iter()
            .map(|&(row, token)| {
                let mut tokens = rows[row].clone();
                tokens.push(token);
                tokens
            })
            .collect();
        calls += 1;
    }
}

#[test]
fn group_beam_search_agrees_with_transformers() {
    for case in golden::cases_of("diverse-beam-search", "group_beam") {
        let eos: Vec<u32> = serde_json::from_value(case.meta("eos_token_id").clone()).unwrap();
        let pad = case.meta_usize("pad_token_id") as u32;
        let max_new = case.meta_usize("max_new_tokens");
        let config = BeamConfig {
            beams: Some(case.meta_usize("num_beams")),
            groups: Some(case.meta_usize("num_beam_groups")),
            lambda: case.meta_f64("diversity_penalty"),
            length_penalty: case.meta_f64("length_penalty"),
            early_stopping: serde_json::from_value(case.meta("early_stopping").clone()).unwrap(),
            n: case.meta_usize("num_return_sequences"),
            ..BeamConfig::default()
        };
        let (table, prompts) = (table(&case), case.i64("prompt"));
        let length = case.meta_usize("prompt_len");
        let mut found = Vec::new();
        let mut scores = Vec::new();
        for prompt in prompts.chunks(length) {
            let prompt: Vec<u32> = prompt.iter().map(|&t| t as u32).collect();
            let mut search =
                BeamSearch::new(config.clone(), &eos, max_new, Some(pad), None).unwrap();
            drive(&mut search, &table, &prompt);
            for hypothesis in search.finish() {
                let mut row = prompt.clone();
                row.extend(&hypothesis.tokens);
                found.push(row);
                scores.push(hypothesis.score);
            }
        }
        // One more than the longest for the end, which is written where there is room.
        let longest = found.iter().map(Vec::len).max().unwrap();
        let width = (longest + 1).min(length + max_new);
        assert_eq!(case.shape("sequences")[1], width, "{}", case.path.display());
        for row in &mut found {
            if row.len() < width {
                row.extend(eos.first());
            }
            row.resize(width, pad);
        }
        let flat: Vec<u32> = found.concat();
        case.assert_close("sequences", &flat);
        case.assert_close("sequences_scores", &scores);
    }
}

#[test]
fn every_term_agrees_with_its_definition() {
    for case in golden::cases_of("diverse-beam-search", "variant") {
        let n = || case.meta_usize("n");
        let term = match case.meta_str("kind") {
            "hamming" => Term::Hamming,
            "cumulative" => Term::Cumulative {
                gamma: case.meta_f64("gamma"),
            },
            "ngram" => Term::Ngram { n: n() },
            "embedding" => Term::Embedding,
            "embedding_ngram" => Term::EmbeddingNgram { n: n() },
            other => panic!("{}: unknown kind {other}", case.path.display()),
        };
        let (groups, width) = (
            case.meta_usize("groups"),
            case.meta_usize("beams_per_group"),
        );
        let steps = case.meta_usize("steps");
        let config = BeamConfig {
            beams: Some(groups * width),
            groups: Some(groups),
            lambda: case.meta_f64("lam"),
            term: Diversity(vec![(1.0, term)]),
            clamp_negative: case.meta("clamp_negative").as_bool().unwrap(),
            n: groups * width,
            ..BeamConfig::default()
        };
        let embedding = EmbeddingTable::from_f64(case.f64("embedding"), case.shape("embedding")[1]);
        let prompt: Vec<u32> = case.i64("prompt").iter().map(|&t| t as u32).collect();
        let mut search = BeamSearch::new(config, &[], steps, None, Some(embedding)).unwrap();
        let calls = drive(&mut search, &table(&case), &prompt);
        assert_eq!(calls, steps - 1, "one pass a step, none after the last");
        let beams: Vec<_> = (0..groups).flat_map(|g| search.group(g).to_vec()).collect();
        let sequences: Vec<u32> = beams.iter().flat_map(|b| b.tokens.clone()).collect();
        case.assert_close("sequences", &sequences);
        let scores: Vec<f64> = beams.iter().map(|b| b.score).collect();
        case.assert_close("augmented_scores", &scores);
        let logprobs: Vec<f64> = beams.iter().map(|b| b.logprob).collect();
        case.assert_close("logprobs", &logprobs);
    }
}

/// The definitions, one token after another.
fn naive(term: &Term, view: &GroupView<'_>, embedding: &[Vec<f64>], v: u32) -> f64 {
    let step = view.own.len();
    let mut candidate = view.own.to_vec();
    candidate.push(v);
    let cosine = |a: &[f64], b: &[f64]| {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let value = dot(a, b) / (dot(a, a).sqrt() * dot(b, b).sqrt());
        if view.clamp_negative {
            value.max(0.0)
        } else {
            value
        }
    };
    let sum = |gram: &[u32]| -> Vec<f64> {
        let dims = 0..embedding[0].len();
        dims.map(|d| gram.iter().map(|&t| embedding[t as usize][d]).sum())
            .collect()
    };
    let now = view.earlier.iter().filter(|beam| beam.steps);
    let grams = |n: usize| {
        view.earlier
            .iter()
            .flat_map(move |beam| beam.tokens.windows(n))
    };
    match term {
        Term::Hamming => now.filter(|beam| beam.tokens[step] == v).count() as f64,
        Term::Cumulative { gamma } => now
            .map(|beam| {
                let differ = (0..=step)
                    .filter(|&i| beam.tokens[i] != candidate[i])
                    .count();
                (-(differ as f64) / gamma).exp()
            })
            .sum(),
        Term::Ngram { n } if candidate.len() >= *n => {
            let mine = &candidate[candidate.len() - n..];
            grams(*n).filter(|gram| *gram == mine).count() as f64
        }
        Term::Embedding => now
            .map(|beam| cosine(&sum(&[v]), &sum(&[beam.tokens[step]])))
            .sum(),
        Term::EmbeddingNgram { n } if candidate.len() >= *n => {
            let mine = sum(&candidate[candidate.len() - n..]);
            grams(*n).map(|gram| cosine(&mine, &sum(gram))).sum()
        }
        Term::Ngram { .. } | Term::EmbeddingNgram { .. } => 0.0,
    }
}

fn config(beams: usize, groups: usize, lambda: f64) -> BeamConfig {
    BeamConfig {
        beams: Some(beams),
        groups: Some(groups),
        lambda,
        n: beams,
        ..BeamConfig::default()
    }
}

fn search(
    config: &BeamConfig,
    table: &Table,
    prompt: &[u32],
    eos: &[u32],
    max: usize,
) -> BeamSearch {
    let mut search = BeamSearch::new(config.clone(), eos, max, None, None).unwrap();
    drive(&mut search, table, prompt);
    search
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// The sparse form of every term, in f64 and with an f32 table, is its definition.
    #[test]
    fn terms_are_their_naive_twins(
        own in prop::collection::vec(0u32..7, 0..6),
        others in prop::collection::vec((prop::collection::vec(0u32..7, 7), any::<bool>()), 1..5),
        rows in prop::collection::vec(-1.0f64..1.0, 7 * 3),
        gamma in 0.3f64..4.0,
        n in 1usize..4,
        clamp_negative in any::<bool>(),
    ) {
        let step = own.len();
        // Beams that take part hold this step's token; finished ones may be shorter.
        let held: Vec<(Vec<u32>, bool)> = others
            .into_iter()
            .map(|(tokens, steps)| (tokens[..step + usize::from(steps)].to_vec(), steps))
            .collect();
        let earlier: Vec<Earlier<'_>> = held
            .iter()
            .map(|(tokens, steps)| Earlier { tokens, steps: *steps })
            .collect();
        let embedding: Vec<Vec<f64>> = rows.chunks(3).map(<[f64]>::to_vec).collect();
        let single: Vec<f32> = rows.iter().map(|&x| x as f32).collect();
        let tables = [
            (EmbeddingTable::from_f64(rows.clone(), 3), 1e-9),
            (EmbeddingTable::from_f32(single, 3), 1e-4),
        ];
        for (table, tolerance) in &tables {
            let view = GroupView {
                own: &own,
                earlier: &earlier,
                embedding: Some(table),
                clamp_negative,
            };
            for term in [
                Term::Hamming,
                Term::Cumulative { gamma },
                Term::Ngram { n },
                Term::Embedding,
                Term::EmbeddingNgram { n },
            ] {
                let mut row = vec![0.25; 7];
                term.penalise(0.5, &view, &mut row);
                for (v, found) in (0u32..).zip(&row) {
                    let expected = 0.25 + 0.5 * naive(&term, &view, &embedding, v);
                    prop_assert!(
                        (found - expected).abs() <= *tolerance,
                        "{:?} of {}: {} found, {} expected", term, v, found, expected
                    );
                }
            }
        }
    }

    /// Group 1 is beam search of its width; without penalties all groups are alike; one beam is greedy.
    #[test]
    fn groups_relate_to_beam_search(seed in 0u64..1000, width in 1usize..4, groups in 2usize..4) {
        let table = Table::random(9, 4, seed, 2.0);
        let prompt = [1, 5];
        let alone = search(&config(width, 1, 0.0), &table, &prompt, &[], 8);
        let found = search(&config(width * groups, groups, 0.9), &table, &prompt, &[], 8);
        let beams = |search: &BeamSearch, group: usize| -> Vec<Vec<u32>> {
            search.group(group).iter().map(|beam| beam.tokens.clone()).collect()
        };
        prop_assert_eq!(beams(&found, 0), beams(&alone, 0));
        let unpenalised = search(&config(width * groups, groups, 0.0), &table, &prompt, &[], 8);
        for group in 0..groups {
            prop_assert_eq!(beams(&unpenalised, group), beams(&alone, 0));
        }
        let mut one = BeamStrategy::new(config(1, 1, 0.0), "beam").unwrap();
        let mut session = TableSession::new(table.clone(), &prompt);
        let (emitted, _) = session.decode(&mut one, &[], 8);
        prop_assert_eq!(tokens(&emitted), table.greedy(&prompt, &[], 8));
    }

    /// With a beam for every text, beam search is exhaustive.
    #[test]
    fn enough_beams_find_the_best_text(seed in 0u64..1000) {
        let table = Table::random(4, 3, seed, 1.5);
        let found = search(&config(256, 1, 0.0), &table, &[2], &[], 4);
        let best = &found.finish()[0];
        let mut top = (f64::NEG_INFINITY, Vec::new());
        for code in 0..256u32 {
            let text: Vec<u32> = (0..4).map(|i| code >> (2 * i) & 3).collect();
            let mut tokens = vec![2];
            let mut sum = 0.0;
            for &token in &text {
                sum += table.log_softmax(&tokens)[token as usize];
                tokens.push(token);
            }
            if sum > top.0 {
                top = (sum, text);
            }
        }
        prop_assert!((best.logprob - top.0).abs() < 1e-9);
        prop_assert_eq!(&best.tokens, &top.1);
    }

    /// Over a session: one pass a step whatever the groups, every sequence freed, the prompt untouched,
    /// answers that end are ended by the model, sums that are the tokens' sums.
    #[test]
    fn a_session_is_stepped_once_and_left_clean(
        seed in 0u64..1000,
        groups in 1usize..4,
        width in 1usize..4,
        term in prop::sample::select(vec!["hamming", "cumulative:2", "ngram:2", "hamming+0.5*ngram:2"]),
        early in prop::sample::select(vec![EarlyStopping::True, EarlyStopping::False, EarlyStopping::Never]),
    ) {
        let table = Table::random(8, 3, seed, 2.0);
        let mut session = TableSession::new(table.clone(), &[3, 4, 5]);
        let config = BeamConfig {
            term: term.parse().unwrap(),
            early_stopping: early,
            ..config(groups * width, groups, 0.6)
        };
        let mut strategy = BeamStrategy::new(config, "dbs").unwrap();
        let (emitted, outcome) = session.decode(&mut strategy, &[2], 10);
        prop_assert_eq!(session.seqs[0].as_deref(), Some(&[3, 4, 5][..]));
        let steps: Vec<usize> = session.calls.iter().map(|call| match call {
            Call::Step(rows) => rows.len(),
            other => panic!("{other:?}"),
        }).collect();
        prop_assert!(steps.len() <= 9 && steps.iter().all(|&rows| rows <= groups * width));
        prop_assert_eq!(outcome.stats.forwards, steps.len());
        prop_assert_eq!(outcome.answers.len(), groups * width);
        prop_assert_eq!(tokens(&emitted), tokens(&outcome.answers[0].choices));
        for answer in &outcome.answers {
            let mut text = vec![3, 4, 5];
            let mut sum = 0.0;
            for choice in &answer.choices {
                prop_assert!(choice.token != 2);
                sum += table.log_softmax(&text)[choice.token as usize];
                text.push(choice.token);
            }
            if answer.end == longspan_infer::decode::End::Eos {
                sum += table.log_softmax(&text)[2];
            } else {
                prop_assert_eq!(answer.choices.len(), 10);
            }
            prop_assert!((sum - answer.logprob).abs() < 1e-4);
        }
        prop_assert!(outcome.answers.windows(2).all(|w| w[0].score >= w[1].score));
    }
}

/// Li and Jurafsky: the k-th best child of a beam pays k times, against a search that lists all children.
#[test]
fn siblings_pay_by_rank() {
    for (seed, gamma) in [(1, 0.0), (2, 0.3), (3, 1.0), (4, 5.0)] {
        let table = Table::random(10, 2, seed, 1.0);
        let penalised = BeamConfig {
            sibling_penalty: gamma,
            ..config(3, 1, 0.0)
        };
        let found = search(&penalised, &table, &[1], &[], 6);
        let mut beams: Vec<(f64, Vec<u32>)> = vec![(0.0, vec![1])];
        for _ in 0..6 {
            let mut all = Vec::new();
            for (score, text) in &beams {
                let mut children: Vec<(f64, u32)> =
                    table.log_softmax(text).into_iter().zip(0..).collect();
                children.sort_by(|a, b| b.0.total_cmp(&a.0));
                for (rank, (lp, token)) in children.into_iter().enumerate() {
                    let mut text = text.clone();
                    text.push(token);
                    all.push((score + lp - gamma * (rank + 1) as f64, text));
                }
            }
            all.sort_by(|a, b| b.0.total_cmp(&a.0));
            all.truncate(3);
            beams = all;
        }
        for (beam, (score, text)) in found.group(0).iter().zip(&beams) {
            assert_eq!(beam.tokens, text[1..]);
            assert!((beam.score - score).abs() < 1e-9);
        }
    }
}

#[test]
fn terms_that_need_an_embedding_say_so() {
    let config = BeamConfig {
        term: "embedding".parse().unwrap(),
        ..config(2, 2, 0.5)
    };
    let error = BeamSearch::new(config, &[], 4, None, None).err().unwrap();
    assert!(error.contains("input embedding"), "{error}");
}
