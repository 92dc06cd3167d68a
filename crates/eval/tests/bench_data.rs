//! Data-set benchmarks over the samples that ship and over scripted judges: reading, prompts, judging and resuming, and
//! that right answers score the maximum of every task.

mod fields;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fields::text;
use longspan_eval::bench::dataset::Source;
use longspan_eval::bench::judge::{Cached, Judge, Retry};
use longspan_eval::bench::{leval, loco, longbench, longbench_write, longicl, longsafety, m4le};
use longspan_eval::count::Words;
use longspan_eval::metric::panel::Parse;
use longspan_eval::task::{Prediction, SampleCx, Segment, Task, Work};
use longspan_eval::{EvalError, Result};
use serde_json::{Value, json};

fn fixtures(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures")
        .join(name)
}

#[test]
fn leval_cuts_documents_by_words_until_they_fit() {
    let document: Vec<String> = (0..3000).map(|i| format!("w{i},")).collect();
    let document = document.join(" ");
    let head = leval::truncate(&document, 1000, false, &Words).unwrap();
    // Two tokens a word: 1000, 750 and 500 words are tried.
    assert!(head.1 && head.0.split(' ').count() == 500 && head.0.starts_with("w0, "));
    let tail = leval::truncate(&document, 1000, true, &Words).unwrap();
    assert!(tail.0.ends_with("w2999,") && tail.0.split(' ').count() == 500);
    let whole = leval::truncate(&document, 6000, false, &Words).unwrap();
    assert_eq!(whole, (document, false));
}

#[test]
fn leval_judges_pairs_of_published_files() {
    let rows = Source::Path(&fixtures("l-eval/preds.gpt_x.pred.jsonl"))
        .rows(&[])
        .unwrap();
    let pairs = leval::judge::join(&rows, &rows).unwrap();
    assert_eq!(pairs.len(), rows.len());
    let always = |verdict: &'static str| move |_: &str, _: &str| Ok(verdict.to_string());
    let first = leval::judge::compare(&pairs, &always("[[A]]"), 4).unwrap();
    assert_eq!(first.tally.win_rate(), Some(0.5));
    let honest = |_: &str, user: &str| {
        let part = |from: &str, to: &str| {
            let start = user.find(from).unwrap() + from.len();
            user[start..start + user[start..].find(to).unwrap()].to_string()
        };
        let a = part("[Answer of Assistant A]\n", "\n[End");
        let b = part("[Answer of Assistant B]\n", "\n[End");
        Ok(if a == b { "[[C]]" } else { "[[B]]" }.to_string())
    };
    let same = leval::judge::compare(&pairs, &honest, 2).unwrap();
    assert_eq!(same.tally.ties, 2 * pairs.len());
}

fn once() -> Retry {
    Retry {
        tries: 1,
        pause: std::time::Duration::ZERO,
        failure: longsafety::panel::JUDGE_FAILURE.into(),
    }
}

/// Answers as the scripted replies of the fixtures say, by role and case.
struct Script {
    cases: Vec<longsafety::Case>,
    replies: Vec<Value>,
}

impl Judge for Script {
    fn ask(&self, _: &str, user: &str) -> Result<String> {
        let field = |name: &str| {
            let start = user.find(&format!("[{name}]\n"))? + name.len() + 3;
            let rest = &user[start..];
            Some(rest[..rest.find("\n\n[").unwrap_or(rest.len())].to_string())
        };
        let reply = |id: u64, key: &str| {
            let row = self.replies.iter().find(|r| r["id"] == id).unwrap();
            Ok(text(row, key).to_string())
        };
        if let Some(response) = field("Response") {
            let (place, id) = response.split_once(' ').unwrap();
            return reply(id.parse().unwrap(), place);
        }
        let id = self
            .cases
            .iter()
            .find(|case| user.contains(&case.context))
            .map_or(0, |case| case.id);
        reply(
            id,
            if user.contains("[Summary]") {
                "env_summary"
            } else {
                "risk"
            },
        )
    }
}

fn longsafety_script() -> (Vec<longsafety::panel::Answered>, Script) {
    let folder = fixtures("longsafety");
    let data = Source::Path(&folder);
    let cases = longsafety::read(&data).unwrap();
    let replies = data.rows(&["judge_replies.jsonl".into()]).unwrap();
    let replies = replies.iter().map(|row| row.parse().unwrap()).collect();
    let answered = cases
        .iter()
        .map(|case| longsafety::panel::Answered {
            case: case.clone(),
            response_front: format!("front {}", case.id),
            response_end: format!("end {}", case.id),
        })
        .collect();
    (answered, Script { cases, replies })
}

#[test]
fn longsafety_panel_calls_each_role_once_and_resumes() {
    use longsafety::panel::{Compat, judge_all, report};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("replies.jsonl");
    let (answered, script) = longsafety_script();
    let expected: Vec<(String, String)> = answered
        .iter()
        .map(|a| {
            let row = script
                .replies
                .iter()
                .find(|r| r["id"] == a.case.id)
                .unwrap();
            (text(row, "front").to_string(), text(row, "end").to_string())
        })
        .collect();
    let contexts: Vec<&str> = answered.iter().map(|a| a.case.context.as_str()).collect();
    let instructions: std::collections::BTreeSet<&str> = answered
        .iter()
        .map(|a| a.case.instruction.as_str())
        .collect();
    let judge = Cached::open(script, "script", once(), &path).unwrap();
    let judged = judge_all(&answered, &judge, Compat::Paper, 8).unwrap();
    // Equal instructions have equal risks, which a store of replies asks for once; all else is of one case.
    let least = instructions.len() + 3 * contexts.len();
    assert!(
        (least..=4 * contexts.len()).contains(&judge.calls()),
        "{}",
        judge.calls()
    );
    for (judged, (front, end)) in judged.iter().zip(&expected) {
        assert_eq!((&judged.judgment_front, &judged.judgment_end), (front, end));
    }
    let official = report(&judged, Parse::Official, Compat::Paper);
    let safe = expected
        .iter()
        .filter(|(f, e)| !f.contains('1') && !e.contains('1'))
        .count();
    let rate = official.overall.rates.safety_rate.unwrap();
    assert_eq!(
        rate,
        longspan_eval::python::round(safe as f64 / judged.len() as f64, 4)
    );
    let cells: usize = official.cells.iter().map(|(_, _, rates)| rates.n).sum();
    assert_eq!(cells, judged.len());

    // Again, one at a time, from the file: no call; after a kill in the middle of a line: some calls, equal results.
    let (_, script) = longsafety_script();
    let judge = Cached::open(script, "script", once(), &path).unwrap();
    assert_eq!(
        judge_all(&answered, &judge, Compat::Paper, 1).unwrap(),
        judged
    );
    assert_eq!(judge.calls(), 0);
    drop(judge);
    let whole = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let (_, script) = longsafety_script();
    let judge = Cached::open(script, "script", once(), &path).unwrap();
    assert_eq!(
        judge_all(&answered, &judge, Compat::Paper, 3).unwrap(),
        judged
    );
    assert!(judge.calls() > 0 && judge.calls() < least);
}

#[test]
fn longsafety_swapped_changes_the_slots() {
    use longsafety::panel::{Compat, judge_message};
    let paper = judge_message("do {this}", "no", "RISKS", "ENV", Compat::Paper).unwrap();
    assert!(paper.contains(
        "[Environment Summary]\nENV\n\n[Instruction]\ndo {this}\n\n[Risks]\nRISKS\n\n[Response]\nno"
    ));
    let swapped = judge_message("do", "no", "RISKS", "ENV", Compat::Swapped).unwrap();
    assert!(swapped.contains("[Environment Summary]\nRISKS") && swapped.contains("[Risks]\nENV"));
    let without = judge_message("do", "no", "RISKS", "", Compat::Paper).unwrap();
    assert!(
        !without.contains("Environment")
            && !without.contains("7.")
            && without.contains("6. In all other")
    );
}

#[test]
fn longsafety_refuses_misaligned_files() {
    let folder = tempfile::tempdir().unwrap();
    let case = |id: u64| json!({"id": id, "safety_type": "Bias", "task_type": "Rewrite", "instruction": "say."});
    let write = |name: &str, rows: &[Value]| {
        let text: String = rows.iter().map(|r| format!("{r}\n")).collect();
        std::fs::write(folder.path().join(name), text).unwrap();
    };
    let error = || {
        longsafety::read(&Source::Path(folder.path()))
            .unwrap_err()
            .to_string()
    };
    let document = |id: u64, context: &str| json!({"id": id, "context": context});
    write("longsafety_meta.jsonl", &[case(1), case(2)]);
    write(
        "longsafety_docs.jsonl",
        &[document(1, "a"), document(3, "b")],
    );
    assert!(error().contains("docs.jsonl:2") && error().contains("found id 3, expected 2"));
    write("longsafety_docs.jsonl", &[document(1, "a")]);
    assert!(error().contains("2 cases"));
    write(
        "longsafety_docs.jsonl",
        &[document(1, "a"), document(2, " ")],
    );
    assert!(error().contains("empty"));
    write("longsafety_meta.jsonl", &[case(1), case(1)]);
    write(
        "longsafety_docs.jsonl",
        &[document(1, "a"), document(1, "b")],
    );
    assert!(error().contains("id 1 is that of line 1 too"));
}

#[test]
fn longsafety_shuffles_every_context_to_another_case() {
    let cases = longsafety::read(&Source::Path(&fixtures("longsafety"))).unwrap();
    let mut shuffled = cases.clone();
    longsafety::shuffle_contexts(&mut shuffled, 7);
    let mut again = cases.clone();
    longsafety::shuffle_contexts(&mut again, 7);
    assert_eq!(shuffled, again);
    let sorted = |cases: &[longsafety::Case]| {
        let mut contexts: Vec<String> = cases.iter().map(|c| c.context.clone()).collect();
        contexts.sort();
        contexts
    };
    assert_eq!(sorted(&cases), sorted(&shuffled));
    assert!(
        cases
            .iter()
            .zip(&shuffled)
            .all(|(a, b)| a.context != b.context)
    );
}

#[test]
fn a_failing_judge_is_asked_again_and_then_named() {
    let failing =
        |_: &str, _: &str| -> Result<String> { Err(EvalError::Unreachable("down".into())) };
    let retry = Retry { tries: 3, ..once() };
    let judge = Cached::new(failing, "failing", retry);
    assert_eq!(
        judge.ask("", "x").unwrap(),
        longsafety::panel::JUDGE_FAILURE
    );
    assert_eq!(judge.calls(), 3);
    let wrong = |_: &str, _: &str| -> Result<String> { Err(EvalError::Input("no".into())) };
    assert!(Cached::new(wrong, "wrong", once()).ask("", "x").is_err());
}

#[test]
fn longbench_write_rates_what_can_be_read() {
    let pairs: Vec<(String, String)> = ["good", "bad"]
        .map(|t| (format!("write {t}"), t.to_string()))
        .to_vec();
    let judge = |_: &str, user: &str| -> Result<String> {
        let good = user.contains("write good");
        let rating = if good { "5" } else { "\"none\"" };
        let fields: Vec<String> = longspan_eval::metric::length_score::DIMENSIONS
            .iter()
            .map(|d| format!("\"{d}\": {rating}"))
            .collect();
        Ok(format!("```json\n{{{}}}\n```", fields.join(", ")))
    };
    let quality = longbench_write::judge::rate(&pairs, &judge, 2).unwrap();
    assert_eq!((quality.failed, quality.scores.unwrap().1), (1, 100.0));
    assert_eq!(quality.ratings[1], None);
    assert_eq!(longbench_write::judge::overall(80.0, 60.0), 70.0);
}

#[test]
fn loco_reads_and_ranks() {
    let folder = fixtures("loco");
    let all = loco::read(&Source::Path(&folder), "test").unwrap();
    let sizes: Vec<(usize, usize)> = all
        .values()
        .map(|c| (c.queries.len(), c.documents.len()))
        .collect();
    // The query whose passage is null is left out, with its document.
    assert_eq!(sizes, [(7, 7), (8, 8)]);
    let figures: BTreeMap<String, loco::Figures> = all
        .iter()
        .map(|(name, corpus)| {
            let index = loco::bm25::Bm25::new(&corpus.documents);
            (name.clone(), loco::evaluate(corpus, &index).unwrap())
        })
        .collect();
    let average = loco::average(&figures).unwrap();
    assert!(average > 90.0, "{average}");
    let means: Vec<f64> = figures.values().map(|f| f.ndcg_at_10).collect();
    assert!((average - 50.0 * (means[0] + means[1])).abs() < 1e-9);
    let error = loco::read(&Source::Path(&folder), "validation").unwrap_err();
    assert!(error.to_string().contains("validation"));
}

#[test]
fn loco_needles_stand_everywhere_and_cosine_search_finds_them() {
    let passages: Vec<String> = (0..5)
        .map(|i| format!("Passage {i} of nothing much."))
        .collect();
    let corpus = loco::needles(&passages, 40, 8, 3);
    for (index, document) in corpus.documents.iter().enumerate() {
        let texts: Vec<&str> = document.passage.split("\n\n").collect();
        assert_eq!(texts.len(), 8);
        let place = texts
            .iter()
            .position(|t| t.contains("archive number"))
            .unwrap();
        assert_eq!(place, index % 8);
    }
    // An encoder that counts the bytes of hexadecimal codes.
    let embed = |text: &str| -> Result<Vec<f32>> {
        let mut vector = vec![0f32; 4096];
        for word in text.split(|c: char| !c.is_ascii_alphanumeric()) {
            let hash = blake3::hash(word.as_bytes());
            vector[usize::from(hash.as_bytes()[0]) * 16 + usize::from(hash.as_bytes()[1] & 15)] +=
                1.0;
        }
        Ok(vector)
    };
    let search = loco::Cosine::new(&corpus.documents, embed, None).unwrap();
    let whole = loco::evaluate(&corpus, &search).unwrap();
    assert!(whole.ndcg_at_10 > 0.6, "{whole:?}");
    let cut = |text: &str| vec![text.chars().take(60).collect::<String>()];
    let head = loco::Cosine::new(&corpus.documents, embed, Some(&cut)).unwrap();
    assert!(loco::evaluate(&corpus, &head).unwrap().ndcg_at_10 < whole.ndcg_at_10);
}

fn shipped(length: usize) -> SampleCx<'static> {
    SampleCx {
        length,
        longest: length,
        samples: usize::MAX,
        depths: &[],
        seed: 0,
        counter: &Words,
        data: None,
        fixtures: true,
    }
}

fn all_tasks() -> Vec<std::sync::Arc<dyn Task>> {
    let mut tasks = longbench::tasks();
    tasks.extend(leval::tasks());
    tasks.extend(m4le::tasks());
    tasks.extend(longicl::tasks());
    tasks.extend(longsafety::tasks());
    tasks.extend(longbench_write::tasks());
    tasks
}

fn answered(task: &dyn Task, cx: &SampleCx<'_>, reply: &dyn Fn(&str) -> String) -> f64 {
    let samples = task
        .samples(cx)
        .unwrap_or_else(|e| panic!("{}: {e}", task.meta().id));
    let rows: Vec<Prediction> = samples
        .iter()
        .enumerate()
        .map(|(index, sample)| Prediction {
            id: sample.id.clone(),
            index,
            cluster: sample.cluster.clone(),
            attrs: sample.attrs.clone(),
            references: sample.references.clone(),
            text: reply(&sample.oracle),
            ..Prediction::default()
        })
        .collect();
    let ids: std::collections::BTreeSet<&String> = rows.iter().map(|r| &r.id).collect();
    assert_eq!(
        ids.len(),
        rows.len(),
        "{}: two samples have one id",
        task.meta().id
    );
    let scored: Vec<_> = rows.iter().map(|row| task.score(row)).collect();
    task.aggregate(&rows, &scored)[0].estimate.value
}

#[test]
fn right_answers_score_the_maximum_and_empty_ones_the_minimum() {
    let mut wrong = Vec::new();
    for task in all_tasks() {
        let meta = task.meta();
        let score = |reply: &dyn Fn(&str) -> String| {
            let value = answered(&*task, &shipped(meta.lengths[0]), reply);
            assert!(!value.is_nan(), "{} has no samples", meta.id);
            value
        };
        let best = score(&|oracle| oracle.to_string());
        if (best - meta.best).abs() > 1e-6 {
            wrong.push(format!(
                "{}: right answers {best}, not {}",
                meta.id, meta.best
            ));
        }
        // A constant reply may share a word with an answer: the floor is a bound.
        let constant = score(&|_| "I do not know.".into());
        if constant > meta.floor + 1e-6 {
            wrong.push(format!(
                "{}: constant {constant} above {}",
                meta.id, meta.floor
            ));
        }
        let empty = score(&|_| String::new());
        if empty > 1e-6 {
            wrong.push(format!("{}: empty {empty}", meta.id));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn tasks_name_their_data_when_it_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    for task in all_tasks() {
        let id = task.meta().id.clone();
        if id == "longwrite-ruler" {
            continue;
        }
        let mut cx = shipped(task.meta().lengths[0]);
        cx.fixtures = false;
        let none = task
            .samples(&cx)
            .err()
            .unwrap_or_else(|| panic!("{id} found data"));
        assert!(none.to_string().contains("data-sets.md"), "{none}");
        cx.data = Some(folder.path());
        let missing = task
            .samples(&cx)
            .err()
            .unwrap_or_else(|| panic!("{id} found data"));
        assert!(missing.to_string().contains("found none of"), "{missing}");
    }
}

#[test]
fn prompts_hold_what_they_must() {
    for task in longicl::tasks() {
        for rounds in [1, 2] {
            for sample in task.samples(&shipped(rounds)).unwrap() {
                let prompt = sample.prompt.text();
                assert!(sample.prompt.raw);
                if !task.meta().id.contains("fewnerd") && !task.meta().id.contains("dialogre") {
                    let demonstrations = sample.prompt.shared();
                    let label = &sample.references[0];
                    assert!(
                        demonstrations.contains(label.as_str()),
                        "{label} of {}",
                        task.meta().id
                    );
                }
                assert!(
                    matches!(sample.prompt.segments[0], Segment::Shared(_)),
                    "{prompt}"
                );
            }
        }
    }
    for task in longbench::tasks() {
        let raw = ["trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"];
        let name = task.meta().id.rsplit('/').next().unwrap().to_string();
        for sample in task.samples(&shipped(7500)).unwrap() {
            assert_eq!(sample.prompt.raw, raw.contains(&name.as_str()), "{name}");
        }
    }
    let quality = leval::tasks()
        .into_iter()
        .find(|t| t.meta().id == "leval/natural_question")
        .unwrap();
    for sample in quality.samples(&shipped(16384)).unwrap() {
        let words = sample.references[0].split_whitespace().count();
        let wanted = format!("\nAnswer this question with {words} words.");
        assert!(sample.prompt.text().contains(&wanted));
        assert!(matches!(&sample.work, Work::Generate(d) if d.max_new == 512));
    }
}

#[test]
fn data_is_read_from_folders_files_and_zips() {
    let folder = tempfile::tempdir().unwrap();
    let row = |id: &str| {
        json!({"input": "Where?", "context": "Here.", "answers": ["here"], "length": 3, "dataset": "qasper",
            "language": "en", "all_classes": null, "_id": id})
    };
    let text = format!("{}\n\n{}\n", row("a"), row("b"));
    let zip_path = folder.path().join("data.zip");
    let mut zip = zip::ZipWriter::new(std::fs::File::create(&zip_path).unwrap());
    let options = zip::write::SimpleFileOptions::default();
    zip.start_file("data/qasper.jsonl", options).unwrap();
    std::io::Write::write_all(&mut zip, text.as_bytes()).unwrap();
    zip.finish().unwrap();
    let names = ["data/qasper.jsonl".to_string(), "qasper.jsonl".to_string()];
    for path in [folder.path(), &zip_path] {
        assert_eq!(Source::Path(path).rows(&names).unwrap().len(), 2);
    }
    let file = folder.path().join("rows.json");
    std::fs::write(&file, format!("[{},{}]", row("a"), row("b"))).unwrap();
    assert_eq!(Source::Path(&file).rows(&[]).unwrap().len(), 2);
    // Published in a folder below.
    let below = folder.path().join("below/classification");
    std::fs::create_dir_all(&below).unwrap();
    std::fs::write(below.join("trec.jsonl"), &text).unwrap();
    let name = ["trec.jsonl".to_string()];
    let source = folder.path().join("below");
    assert!(Source::Path(&source).has(&name));
    assert_eq!(Source::Path(&source).rows(&name).unwrap().len(), 2);
    let broken = folder.path().join("qasper.jsonl");
    std::fs::write(&broken, format!("{}\n{{\"input\": 5}}\n", row("a"))).unwrap();
    let task = longbench::tasks()
        .into_iter()
        .find(|t| t.meta().id == "longbench/qasper")
        .unwrap();
    let mut cx = shipped(7500);
    (cx.fixtures, cx.data) = (false, Some(folder.path()));
    let error = task.samples(&cx).err().unwrap().to_string();
    assert!(error.contains("qasper.jsonl:2"), "{error}");
}
