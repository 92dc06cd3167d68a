//! Generators against the published ones' output (byte for byte) and solvers that read only the
//! prompt.

#[path = "../../../tests/golden.rs"]
mod golden;

use longspan_eval::bench::ruler::{self, Request, Row, Sources, generate, official};
use longspan_eval::bench::threading::{Direction, Haystack, depth_index, literal, positions};
use longspan_eval::bench::{altered, lines, passkey};
use longspan_eval::count::Words;
use longspan_eval::metric::string_match;
use longspan_eval::python::Random;
use longspan_eval::registry::Registry;
use longspan_eval::task::{Prediction, Sample, SampleCx};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;

fn folder(slug: &str) -> PathBuf {
    golden::root().join(slug)
}

fn text(slug: &str, name: &str) -> String {
    let path = folder(slug).join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn json(slug: &str, name: &str) -> Vec<Value> {
    let value: Value = serde_json::from_str(&text(slug, name)).unwrap();
    value.as_array().unwrap().clone()
}

#[test]
fn ruler_rows_are_those_of_the_published_generators() {
    let sources = Sources::from_text(
        &text("passkey-and-ruler", "sources.json"),
        &folder("sources.json"),
    )
    .unwrap();
    let mut groups: BTreeMap<(String, usize, i64), Vec<Row>> = BTreeMap::new();
    for line in text("passkey-and-ruler", "samples.jsonl").lines() {
        let value: Value = serde_json::from_str(line).unwrap();
        let key = (
            value["task"].as_str().unwrap().to_string(),
            value["max_seq_length"].as_u64().unwrap() as usize,
            value["random_seed"].as_i64().unwrap(),
        );
        groups
            .entry(key)
            .or_default()
            .push(serde_json::from_value(value).unwrap());
    }
    assert!(!groups.is_empty());
    let mut wrong = Vec::new();
    for ((task, length, seed), want) in &groups {
        let rows = generate(
            ruler::kind(task).unwrap_or_else(|| panic!("{task}")),
            &Request {
                sources: &sources,
                counter: &Words,
                max_seq_length: *length,
                model_template_token: 0,
                samples: want.len(),
                random_seed: *seed,
            },
        )
        .unwrap();
        for (index, (row, want)) in rows.iter().zip(want).enumerate() {
            if row != want {
                let same = row
                    .input
                    .bytes()
                    .zip(want.input.bytes())
                    .take_while(|(a, b)| a == b)
                    .count();
                let shown = |text: &str| {
                    text.chars()
                        .skip(same.saturating_sub(20))
                        .take(80)
                        .collect::<String>()
                };
                wrong.push(format!(
                    "{task} {length} row {index}: lengths {} {}, {} {}, outputs {:?} {:?}, from byte {same}: {:?} / {:?}",
                    row.length, want.length, row.input.len(), want.input.len(), row.outputs, want.outputs,
                    shown(&row.input), shown(&want.input)
                ));
            }
        }
        assert_eq!(rows.len(), want.len());
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn ruler_rows_fit_their_length_and_hold_their_answers() {
    let sources = Sources::shipped().unwrap();
    for task in Registry::default().select("ruler").unwrap() {
        let name = task.meta().id.trim_start_matches("ruler/").to_string();
        let kind = ruler::kind(&name).unwrap();
        for length in [1024, 2048, 4096] {
            let rows = generate(
                kind,
                &Request {
                    sources: &sources,
                    counter: &Words,
                    max_seq_length: length,
                    model_template_token: 30,
                    samples: 3,
                    random_seed: 7,
                },
            )
            .unwrap();
            for row in rows {
                let whole = row.input.clone() + &row.answer_prefix;
                use longspan_eval::count::Counter;
                let tokens = Words.count(&whole).unwrap() + kind.tokens_to_generate();
                assert_eq!(tokens, row.length, "{name}");
                assert!(tokens + 30 <= length, "{name} {length}: {tokens}");
                // Another unit would not have fitted: ten documents, or about 500 words.
                let documents = row.input.matches("Document ").count();
                let unit = match documents {
                    0 => length / 2,
                    _ => 16 * (tokens - 32) / documents,
                };
                assert!(tokens + 30 + unit > length, "{name} {length}: {tokens}");
                assert!(
                    row.outputs.iter().all(|answer| row.input.contains(answer)),
                    "{name}"
                );
            }
        }
        let tiny = generate(
            kind,
            &Request {
                sources: &sources,
                counter: &Words,
                max_seq_length: 140,
                model_template_token: 0,
                samples: 1,
                random_seed: 7,
            },
        );
        assert!(tiny.is_err(), "{name} at 140 tokens");
    }
}

#[test]
fn ruler_scores_are_the_published_ones() {
    let value: Value = serde_json::from_str(&text("passkey-and-ruler", "scoring.json")).unwrap();
    let (mut all, mut part) = (Vec::new(), Vec::new());
    for case in value["cases"].as_array().unwrap() {
        let pred = case["pred"].as_str().unwrap();
        let refs: Vec<String> = serde_json::from_value(case["refs"].clone()).unwrap();
        all.push(string_match::all(pred, &refs));
        part.push(string_match::part(pred, &refs));
        assert_eq!(
            official(&all[all.len() - 1..]),
            case["all"].as_f64().unwrap(),
            "{case}"
        );
        assert_eq!(
            official(&part[part.len() - 1..]),
            case["part"].as_f64().unwrap(),
            "{case}"
        );
    }
    assert_eq!(official(&all), value["corpus_all"].as_f64().unwrap());
    assert_eq!(official(&part), value["corpus_part"].as_f64().unwrap());
}

#[test]
fn passkey_prompts_are_the_published_ones() {
    let cases = json("passkey-and-ruler", "passkey.json");
    assert!(!cases.is_empty());
    for case in cases {
        let total = case["n_garbage_chars"].as_u64().unwrap() as usize;
        let (before, key, prompt) = passkey::published(case["seed"].as_i64().unwrap(), total);
        assert_eq!(before as u64, case["prefix_chars"].as_u64().unwrap());
        assert_eq!(key, case["pass_key"].as_i64().unwrap());
        assert_eq!(
            prompt.chars().count() as u64,
            case["chars"].as_u64().unwrap()
        );
        assert_eq!(prompt, case["prompt"].as_str().unwrap());
    }
}

#[test]
fn threading_haystacks_and_threads_are_the_golden_ones() {
    for case in json("needle-threading", "haystack.json") {
        let n = case["num_kv_pairs"].as_u64().unwrap() as usize;
        let mut random = Random::new(case["seed"].as_i64().unwrap());
        let haystack = Haystack::new(n, &mut random);
        let printed = haystack.text();
        assert_eq!(
            printed.chars().count() as u64,
            case["chars"].as_u64().unwrap()
        );
        assert_eq!(printed.len(), 80 * n);
        if let Some(text) = case["haystack"].as_str() {
            assert_eq!(printed, text);
        }
        let pair = |at: usize| [haystack.keys[at].as_str(), haystack.values[at][0].as_str()];
        let want = |name: &str| serde_json::from_value::<[String; 2]>(case[name].clone()).unwrap();
        assert_eq!(pair(0), want("first"));
        assert_eq!(pair(n / 2), want("middle"));
        assert_eq!(pair(n - 1), want("last"));
        for (depth, at) in case["depth_index"].as_object().unwrap() {
            let at = at.as_u64().unwrap() as usize;
            assert_eq!(depth_index(n, depth.parse().unwrap()), at, "{n} {depth}");
        }
    }
    for case in json("needle-threading", "threads.json") {
        let n = case["n"].as_u64().unwrap() as usize;
        let length = case["length"].as_u64().unwrap() as usize;
        let direction: Direction = serde_json::from_value(case["direction"].clone()).unwrap();
        let mut random = Random::new(case["seed"].as_i64().unwrap());
        let mut haystack = Haystack::new(n, &mut random);
        let chain = positions(&mut (0..n).collect(), length, direction, &mut random);
        let (start, answer) = haystack.chain(&chain);
        assert_eq!(serde_json::to_value(&chain).unwrap(), case["positions"]);
        assert_eq!(start, case["start"].as_str().unwrap());
        assert_eq!(answer, case["answer"].as_str().unwrap());
        let values: Vec<&str> = chain
            .iter()
            .map(|&at| haystack.values[at][0].as_str())
            .collect();
        assert_eq!(serde_json::to_value(values).unwrap(), case["values_at"]);
    }
}

#[test]
fn lines_and_altered_answers_score_as_published() {
    let value: Value = serde_json::from_str(&text("giraffe", "metrics.json")).unwrap();
    for case in value["presence_and_bleu"].as_array().unwrap() {
        let (output, reference) = (
            case["output"].as_str().unwrap(),
            case["ref"].as_str().unwrap(),
        );
        assert_eq!(
            u64::from(altered::presence(output, reference)),
            case["presence"].as_u64().unwrap(),
            "{case}"
        );
        assert!(
            (altered::bleu(output, reference) - case["bleu"].as_f64().unwrap()).abs() < 1e-12,
            "{case}"
        );
    }
    for case in value["lines_number"].as_array().unwrap() {
        let number = lines::first_number(case["output"].as_str().unwrap());
        assert_eq!(number, case["parsed"].as_i64().unwrap());
        assert_eq!(
            number == case["expected"].as_i64().unwrap(),
            case["correct"].as_bool().unwrap()
        );
    }
}

fn made(id: &str, length: usize, samples: usize) -> Vec<Sample> {
    let task = Registry::default().task(id).unwrap();
    task.samples(&SampleCx {
        length,
        longest: length,
        samples,
        depths: &[0.0, 30.0, 100.0],
        seed: 5,
        counter: &Words,
        data: None,
        fixtures: false,
    })
    .unwrap()
}

fn score(id: &str, sample: &Sample, reply: &str) -> f64 {
    let row = Prediction {
        references: sample.references.clone(),
        text: reply.into(),
        ..Prediction::default()
    };
    Registry::default().task(id).unwrap().score(&row).value
}

/// Pairs of a printed haystack.
fn parse(text: &str) -> HashMap<String, Vec<String>> {
    let value: Value = serde_json::from_str(text.trim()).unwrap();
    let object = value.as_object().unwrap();
    object
        .iter()
        .map(|(key, value)| match value {
            Value::String(one) => (key.clone(), vec![one.clone()]),
            many => (key.clone(), serde_json::from_value(many.clone()).unwrap()),
        })
        .collect()
}

/// The end of the longest thread from a key, and its links, in at most `most` links.
fn follow(pairs: &HashMap<String, Vec<String>>, key: &str, most: usize) -> (String, usize) {
    let values = &pairs[key];
    if most <= 1 {
        return (values[0].clone(), 1);
    }
    values
        .iter()
        .map(|value| match pairs.contains_key(value) {
            true => {
                let (end, links) = follow(pairs, value, most - 1);
                (end, links + 1)
            }
            false => (value.clone(), 1),
        })
        .max_by_key(|(_, links)| *links)
        .unwrap()
}

#[test]
fn a_dictionary_solves_every_threading_task_from_its_prompt() {
    for name in [
        "single",
        "multi",
        "conditional",
        "thread",
        "multithread",
        "branched",
    ] {
        let id = format!("threading/{name}");
        let all = made(&id, 8000, 2);
        assert!(all.len() >= 6, "{id}");
        for sample in &all {
            let pairs = parse(&sample.prompt.shared());
            assert_eq!(pairs.len(), 100);
            let distinct: HashSet<&String> = pairs.keys().collect();
            assert_eq!(distinct.len(), 100);
            let question = sample.prompt.segments[1].text();
            let links = sample
                .attrs
                .get("thread_length")
                .and_then(Value::as_u64)
                .unwrap_or(1) as usize;
            let keys: Vec<String> = match name {
                "conditional" => pairs
                    .keys()
                    .filter(|key| key.contains('*'))
                    .cloned()
                    .collect(),
                _ => {
                    let from = question.find(['[', '"']).unwrap();
                    literal(&question[from..]).unwrap()
                }
            };
            let solve = |most: usize| -> String {
                let ends: Vec<String> = keys
                    .iter()
                    .map(|key| {
                        if name == "conditional" {
                            pairs[key][0].clone()
                        } else {
                            follow(&pairs, key, most).0
                        }
                    })
                    .collect();
                match name {
                    "multi" | "conditional" | "multithread" => format!("{ends:?}"),
                    _ => ends[0].clone(),
                }
            };
            assert_eq!(
                score(&id, sample, &solve(usize::MAX)),
                1.0,
                "{id} {:?}",
                sample.attrs
            );
            if name.contains("thread") || name == "branched" {
                assert_eq!(
                    score(&id, sample, &solve(links - 1)),
                    0.0,
                    "{id} short of {links}"
                );
                for answer in &sample.references {
                    assert!(!pairs.contains_key(answer) && !question.contains(answer));
                }
                if name != "branched" {
                    assert_eq!(sample.prompt.shared().len(), 8000);
                }
            }
        }
    }
}

#[test]
fn needle_grids_share_or_do_not_share_their_text() {
    let shared = made("needle/shared", 1500, 2);
    let texts: HashSet<String> = shared.iter().map(|s| s.prompt.shared()).collect();
    assert_eq!((shared.len(), texts.len()), (6, 2));
    let single = made("needle", 1500, 2);
    let texts: HashSet<String> = single.iter().map(|s| s.prompt.shared()).collect();
    assert_eq!((single.len(), texts.len()), (6, 6));
    for (sample, depth) in single.iter().zip([0.0, 30.0, 100.0]) {
        let text = sample.prompt.shared();
        let at = text.find(&sample.references[0]).unwrap() as f64 / text.len() as f64;
        assert!((at - depth / 100.0).abs() < 0.08, "{at} {depth}");
        use longspan_eval::count::Counter;
        let tokens = Words.count(&sample.prompt.text()).unwrap();
        assert!(tokens <= 1500 && tokens > 1000, "{tokens}");
    }
}

/// Depths of needles over many samples are spread evenly (chi-square over ten bins, p > 0.01).
#[test]
fn ruler_needles_lie_anywhere() {
    let rows = generate(
        ruler::kind("niah_single_1").unwrap(),
        &Request {
            sources: &Sources::shipped().unwrap(),
            counter: &Words,
            max_seq_length: 1024,
            model_template_token: 0,
            samples: 400,
            random_seed: 11,
        },
    )
    .unwrap();
    let (mut found, mut expected) = ([0.0f64; 10], [0.0f64; 10]);
    for row in &rows {
        // By lines of filler, without the first line and the question; a needle stands before one.
        let lines: Vec<&str> = row.input.lines().collect();
        let body = &lines[1..lines.len() - 1];
        let places = body.len() - 1;
        let at = body
            .iter()
            .position(|line| line.contains(&row.outputs[0]))
            .unwrap();
        found[at * 10 / places] += 1.0;
        (0..places).for_each(|at| expected[at * 10 / places] += 1.0 / places as f64);
    }
    let pairs = found.iter().zip(&expected);
    let chi: f64 = pairs.map(|(n, e)| (n - e).powi(2) / e).sum();
    assert!(chi < 21.67, "{found:?} {expected:?}: {chi}");
}
