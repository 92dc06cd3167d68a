//! Published scorers, prompts and selections of the data-set benchmarks, against what the originals gave.

#[path = "../../../tests/golden.rs"]
mod golden;

mod fields;

use std::collections::BTreeMap;

use fields::{close, number, text, texts};
use longspan_eval::bench::longicl::{DataSet, extract, prompt, select};
use longspan_eval::bench::{leval, longbench, longsafety, m4le};
use longspan_eval::metric::exact_match;
use longspan_eval::metric::micro_f1::Counts;
use longspan_eval::metric::qa_f1::qa_f1;
use longspan_eval::metric::rouge::{RougeCompat, google_rouge};
use serde_json::{Value, json};

const EXACT: RougeCompat = RougeCompat::Unlimited;

#[test]
fn longbench_rows_and_aggregates() {
    let rows = golden::jsonl("longbench", "metrics.jsonl");
    for row in &rows {
        let set = longbench::dataset(text(row, "dataset")).unwrap();
        let classes = row["all_classes"]
            .as_array()
            .map(|_| texts(&row["all_classes"]));
        let classes = classes.unwrap_or_default();
        let answers = texts(&row["answers"]);
        let prediction = longbench::score::extract(set.name, text(row, "pred"));
        for (answer, expected) in answers.iter().zip(row["per_answer"].as_array().unwrap()) {
            let found = set.metric.score(prediction, answer, &classes, EXACT);
            close(found, expected.as_f64().unwrap(), row);
        }
        let found = longbench::score::score(set.name, text(row, "pred"), &answers, &classes, EXACT);
        close(found.unwrap(), number(row, "score"), row);
    }
    let by_id: BTreeMap<i64, &Value> = rows
        .iter()
        .map(|r| (r["id"].as_i64().unwrap(), r))
        .collect();
    for group in golden::json("longbench", "aggregate.json")
        .as_array()
        .unwrap()
    {
        let ids: Vec<i64> = serde_json::from_value(group["ids"].clone()).unwrap();
        let lengths: Vec<usize> = serde_json::from_value(group["lengths"].clone()).unwrap();
        let classes = by_id[&ids[0]]["all_classes"]
            .as_array()
            .map(|_| texts(&by_id[&ids[0]]["all_classes"]));
        let predictions: Vec<longbench::score::PredictionRow> = ids
            .iter()
            .zip(lengths)
            .map(|(id, length)| longbench::score::PredictionRow {
                pred: text(by_id[id], "pred").into(),
                answers: texts(&by_id[id]["answers"]),
                all_classes: classes.clone(),
                length: Some(length),
            })
            .collect();
        let name = text(group, "dataset");
        let score = longbench::score::dataset_score(name, &predictions, EXACT);
        assert_eq!(score, Some(number(group, "score")), "{name}");
        let bins = longbench::score::by_length(name, &predictions, EXACT).unwrap();
        let expected = &group["score_e"];
        for (bin, found) in [
            ("0-4k", bins.to_4k),
            ("4-8k", bins.to_8k),
            ("8k+", bins.above),
        ] {
            assert_eq!(found, expected[bin].as_f64(), "{name} {bin}");
        }
    }
}

#[test]
fn longbench_keeps_the_ends_of_a_long_prompt() {
    for case in golden::json("longbench", "truncation.json")
        .as_array()
        .unwrap()
    {
        let ids: Vec<u32> = (0..number(case, "n") as u32).collect();
        let kept = longbench::score::truncate_middle(&ids, number(case, "max_length") as usize);
        assert_eq!(json!(kept), case["kept"], "{case}");
    }
}

#[test]
fn longbench_result_files_are_equal_byte_for_byte() {
    let folder = tempfile::tempdir().unwrap();
    let line = |pred: &str, length: usize| json!({"pred": pred, "answers": ["the blue ledger"], "all_classes": null, "length": length});
    let write = |name: &str, rows: &[Value]| {
        let text: String = rows.iter().map(|r| format!("{r}\n")).collect();
        std::fs::write(folder.path().join(name), text).unwrap();
    };
    write(
        "hotpotqa.jsonl",
        &[line("a ledger that is blue", 10), line("no", 9000)],
    );
    write("qasper.jsonl", &[line("blue ledger", 5000)]);
    let score = || longbench::score_folder(folder.path(), false, EXACT).unwrap();
    assert_eq!(
        json!(score()).to_string(),
        r#"{"hotpotqa":33.33,"qasper":100.0}"#
    );
    assert_eq!(json!(score()).to_string(), json!(score()).to_string());
    let e = longbench::score_folder(folder.path(), true, EXACT).unwrap();
    assert_eq!(
        json!(e["qasper"]),
        json!({"0-4k": null, "4-8k": 100.0, "8k+": null})
    );
    write("qasper2.jsonl", &[line("x", 1)]);
    let error = longbench::score_folder(folder.path(), false, EXACT).unwrap_err();
    assert!(error.to_string().contains("qasper2"), "{error}");
}

fn kind(task: &str) -> leval::process::Kind {
    use leval::process::Kind;
    match task {
        "coursera" => Kind::Letters { several: true },
        "quality" | "tpo" => Kind::Letters { several: false },
        "gsm100" => Kind::Number,
        "codeU" => Kind::Code,
        "sci_fi" => Kind::TrueFalse,
        _ => Kind::Plain,
    }
}

#[test]
fn leval_closed_and_open() {
    let mut by_task: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let (mut loyal, mut fact) = (Vec::new(), Vec::new());
    for row in golden::jsonl("l-eval", "closed.jsonl") {
        let task = text(&row, "task");
        let (prediction, gold) = (text(&row, "pred"), text(&row, "gt"));
        if task == "sci_fi" {
            let (p, g) = (
                leval::process::true_false(prediction),
                leval::process::true_false(gold),
            );
            assert_eq!(json!([p.0, p.1]), row["proc_pred"], "{row}");
            assert_eq!(json!([g.0, g.1]), row["proc_gt"], "{row}");
            let scores = [exact_match::leval(p.0, g.0), exact_match::leval(p.1, g.1)];
            assert_eq!(scores[0], row["score"][0].as_f64().unwrap(), "{row}");
            assert_eq!(scores[1], row["score"][1].as_f64().unwrap(), "{row}");
            loyal.push(scores[0]);
            fact.push(scores[1]);
            continue;
        }
        let (p, g) = leval::process::process(kind(task), prediction, gold);
        assert_eq!(p, row["proc_pred"], "{row}");
        assert_eq!(g, row["proc_gt"], "{row}");
        let score = exact_match::leval(&p, &g);
        assert_eq!(score, number(&row, "score"), "{row}");
        by_task.entry(task.into()).or_default().push(score);
    }
    let file = golden::json("l-eval", "aggregate.json");
    let mean = |list: &[f64]| 100.0 * list.iter().sum::<f64>() / list.len() as f64;
    for (task, scores) in &by_task {
        assert_eq!(
            longspan_eval::python::round(mean(scores), 4),
            number(&file["exam"], task)
        );
    }
    assert_eq!(mean(&loyal), number(&file["sci_fi"], "loyalty"));
    assert_eq!(mean(&fact), number(&file["sci_fi"], "fact"));

    let mut sums = [0.0; 4];
    let rows = golden::jsonl("l-eval", "open.jsonl");
    for row in &rows {
        let (prediction, gold) = (text(row, "pred"), text(row, "gt"));
        let rouge = google_rouge(prediction, gold);
        let found = [
            qa_f1(prediction, gold),
            rouge.rouge1,
            rouge.rouge2,
            rouge.rouge_l,
        ];
        for (i, key) in ["f1", "rouge1", "rouge2", "rougeL"].iter().enumerate() {
            close(100.0 * found[i], number(row, key), row);
            sums[i] += 100.0 * found[i] / rows.len() as f64;
        }
    }
    let round = |value| longspan_eval::python::round(value, 4);
    assert_eq!(round(sums[0]), number(&file, "f1"));
    for (i, key) in ["rouge1", "rouge2", "rougeL"].iter().enumerate() {
        assert_eq!(round(sums[i + 1]), number(&file["rouge"], key));
    }
    let geometric = leval::geometric_mean(sums[1], sums[2], sums[3]);
    assert_eq!(round(geometric), number(&file, "geometric_mean"));
}

#[test]
fn m4le_rows_and_buckets() {
    let options = m4le::score::Options::default();
    // By task and length bucket: responses with their answers.
    type Rows = Vec<(String, Vec<String>)>;
    let mut buckets: BTreeMap<(String, String), Rows> = BTreeMap::new();
    for row in golden::jsonl("m4le", "metrics.jsonl") {
        let task = text(&row, "task");
        let spec = m4le::score::task(task).unwrap_or_else(|| panic!("{task}"));
        assert_eq!(spec.metric.name(), text(&row, "metric"), "{task}");
        let end: Vec<String> = spec.end.iter().map(|e| e.to_string()).collect();
        assert_eq!(end, texts(&row["end_tokens"]), "{task}");
        let (response, answers) = (text(&row, "gen_resp"), texts(&row["answers"]));
        close(
            m4le::score::score_row(spec, response, &answers, options),
            number(&row, "score"),
            &row,
        );
        let key = (task.to_string(), row["length_bucket"].to_string());
        buckets
            .entry(key)
            .or_default()
            .push((response.into(), answers));
    }
    let file = golden::json("m4le", "aggregate.json");
    let mut tested = 0;
    for (task, expected) in file.as_object().unwrap() {
        let spec = m4le::score::task(task).unwrap_or_else(|| panic!("{task}"));
        for (bucket, value) in expected.as_object().unwrap() {
            let rows = &buckets[&(task.clone(), bucket.clone())];
            let found = m4le::score::score_bucket(spec, rows, options).unwrap();
            close(found, value.as_f64().unwrap(), &json!([task, bucket]));
            tested += 1;
        }
    }
    assert_eq!(tested, buckets.len());
}

fn longicl_set(name: &str) -> DataSet {
    let name = if name == "goemotion" {
        "goemotions"
    } else {
        name
    };
    let found = DataSet::ALL.into_iter().find(|set| set.name() == name);
    found.unwrap_or_else(|| panic!("{name}"))
}

#[test]
fn longicl_selection() {
    for case in golden::json("longiclbench", "select.json")
        .as_array()
        .unwrap()
    {
        let turns = number(case, "turns") as usize;
        let found = match text(case, "fn") {
            "round_robin" => {
                let labels: Vec<i64> = serde_json::from_value(case["labels"].clone()).unwrap();
                select::round_robin(&labels, turns)
            }
            "round_robin_single_label_only" => {
                let labels: Vec<Vec<i64>> = serde_json::from_value(case["labels"].clone()).unwrap();
                select::round_robin_single_label(&labels, turns)
            }
            tacred => {
                let labels = texts(&case["labels"]);
                let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
                match tacred {
                    "tacred_rounds" => {
                        select::tacred_rounds(&labels, DataSet::Tacred.labels(), turns)
                    }
                    "tacred_test_per_label" => {
                        select::tacred_test(&labels, DataSet::Tacred.labels(), turns)
                    }
                    other => panic!("unknown case {other}"),
                }
            }
        };
        assert_eq!(json!(found), case["selected"], "{} {turns}", case["fn"]);
    }
}

/// Reads demonstrations back from a golden prompt.
fn read_back(set: DataSet, text: &str) -> Vec<prompt::Example> {
    let body = text
        .split_once("The examples are as follows: \n")
        .unwrap()
        .1;
    let lines: Vec<&str> = body.trim_end_matches('\n').split('\n').collect();
    let after = |line: &str, cue: &str| {
        line.strip_prefix(cue)
            .unwrap_or_else(|| panic!("{line:?} lacks {cue:?}"))
            .to_string()
    };
    match set {
        DataSet::Banking77 | DataSet::GoEmotions => {
            let cues = match set {
                DataSet::Banking77 => ["service query: ", "intent category: "],
                _ => ["comment: ", "emotion category: "],
            };
            lines
                .chunks(2)
                .map(|pair| prompt::Example::Text {
                    set,
                    text: after(pair[0], cues[0]),
                    labels: vec![after(pair[1], cues[1])],
                })
                .collect()
        }
        DataSet::Discovery => lines
            .chunks(2)
            .map(|pair| {
                let (first, second) = pair[0].split_once(" ( ) ").unwrap();
                let cue = "the most suitable conjunction word in the previous ( ) is  ";
                prompt::Example::Pair {
                    first: first.into(),
                    second: second.into(),
                    label: after(pair[1], cue),
                }
            })
            .collect(),
        _ => lines
            .chunks(3)
            .map(|three| {
                let pair = after(three[1], "the subject is ");
                let (subject, object) = pair.split_once(" and the object is ").unwrap();
                prompt::Example::Sentence {
                    sentence: after(three[0], "sentence: "),
                    relation: prompt::Relation {
                        relation: after(three[2], "the relation between the two entities is: "),
                        subject: subject.into(),
                        object: object.into(),
                    },
                }
            })
            .collect(),
    }
}

#[test]
fn longicl_prompts_byte_for_byte() {
    let file = golden::json("longiclbench", "prompts.json");
    for (name, value) in file["prompts"].as_object().unwrap() {
        let (set, form) = name.rsplit_once('_').unwrap();
        if let Some(set) = set.strip_suffix("_positions") {
            let source = &file["prompts"][format!("{set}_{form}")];
            let examples = read_back(longicl_set(set), source.as_str().unwrap());
            let labels: Vec<&str> = examples.iter().map(prompt::Example::first_label).collect();
            let found = select::positions(&labels);
            assert_eq!(found.len(), value.as_object().unwrap().len());
            for (label, positions) in found {
                assert_eq!(json!(positions), value[label]["pos"], "{name}");
                assert_eq!(json!(positions.len()), value[label]["number"], "{name}");
            }
            continue;
        }
        let set = longicl_set(set);
        let examples = read_back(set, value.as_str().unwrap());
        assert_eq!(examples.len(), 3, "{name}");
        let labels = (form == "instruct").then_some(set.labels());
        assert_eq!(&prompt::head(set, &examples, labels), value, "{name}");
    }
    for (name, count) in file["label_counts"].as_object().unwrap() {
        assert_eq!(json!(longicl_set(name).labels().len()), *count, "{name}");
    }
}

#[test]
fn longicl_extraction_and_counts() {
    let mut totals: BTreeMap<&str, Counts> = BTreeMap::new();
    let file = golden::json("longiclbench", "extract.json");
    for row in file.as_array().unwrap() {
        let set = longicl_set(text(row, "task"));
        let (response, query) = (text(row, "response"), text(row, "query"));
        let total = totals.entry(set.name()).or_default();
        match set {
            DataSet::FewNerd => {
                let found = extract::entities(response, query);
                let object: serde_json::Map<String, Value> =
                    found.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
                assert_eq!(Value::Object(object), row["pred"], "{row}");
                let gold: prompt::Pairs = serde_json::from_value(row["label"].clone()).unwrap();
                *total += extract::entity_counts(&found, &gold.0);
            }
            DataSet::DialogRe => {
                let found = extract::relations(response, query, number(row, "k") as usize);
                assert_eq!(found, text(row, "pred"), "{row}");
                let gold: Vec<&str> = text(row, "label").split(',').map(str::trim).collect();
                *total += extract::relation_counts(&found, &gold, set.labels());
            }
            _ => {
                let found = extract::label(set, response, query);
                assert_eq!(found, text(row, "pred"), "{row}");
                let label = text(row, "label");
                let gold = match set {
                    DataSet::Discovery => extract::discovery_label(label),
                    DataSet::Tacred => label.to_string(),
                    _ => label.to_lowercase(),
                };
                assert_eq!(json!(found == gold), row["correct"], "{row}");
                let predicted = set.labels().contains(&found);
                if set == DataSet::Tacred {
                    assert_eq!(json!(predicted), row["counts_as_pred"], "{row}");
                }
                *total += Counts {
                    predicted: usize::from(predicted),
                    gold: 1,
                    correct: usize::from(found == gold),
                };
            }
        }
    }
    let file = golden::json("longiclbench", "aggregate.json");
    for (name, expected) in file.as_object().unwrap() {
        let counts = totals[name.as_str()];
        let found = [counts.predicted, counts.gold, counts.correct];
        let numbers = ["pred", "label", "correct"].map(|key| number(expected, key) as usize);
        assert_eq!(found, numbers, "{name}");
        let f1 = if name == "fewnerd" {
            counts.f1_plain()
        } else {
            counts.f1()
        };
        close(f1, number(expected, "f1"), expected);
    }
}

#[test]
fn longsafety_prompts_byte_for_byte() {
    let file = golden::json("longsafety", "aggregate.json");
    for row in file["prompts"].as_array().unwrap() {
        let case = longsafety::Case {
            id: 0,
            length: 0,
            safety_type: String::new(),
            task_type: String::new(),
            instruction: text(row, "instruction").into(),
            context: text(row, "context").into(),
        };
        assert_eq!(longsafety::front(&case), text(row, "front"));
        assert_eq!(longsafety::end(&case), text(row, "end"));
    }
}
