//! Retrieval against plain evaluations and goldens, the index through changes, stops and damage, prompts within
//! budgets, answers by a scripted model.

#[path = "../../../tests/golden.rs"]
mod golden;

use longspan_agents::chat::model::{Call, ChatError, Input, ignore};
use longspan_agents::chat::scripted::{Rule, Scripted};
use longspan_agents::rag::embed::Kind;
use longspan_agents::rag::index::Retriever;
use longspan_agents::rag::negatives::{contains, exact_match, fisher_yates, hard_negatives};
use longspan_agents::rag::prompt::{Shown, pack};
use longspan_agents::rag::{
    Bm25Config, ChunkConfig, Embedder, HashedWords, Index, IndexError, Order, Progress, RagConfig,
    RagError, Updated, answer,
};
use longspan_data::document::{Document, Format, Limits};
use longspan_data::random::Random;
use std::ops::ControlFlow;
use std::path::Path;

fn go(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn orders_negatives_and_measures_match_the_goldens() {
    let golden = golden::json("long-context-rag", "rag.json");
    let list = |name: &str| golden[name].as_array().unwrap().clone();
    let numbers = |value: &serde_json::Value| -> Vec<usize> {
        serde_json::from_value(value.clone()).unwrap()
    };
    assert!(list("reorder").len() >= 10 && list("hard_negative").len() >= 4);
    for case in list("reorder") {
        let k = case["k"].as_u64().unwrap() as usize;
        assert_eq!(Order::Ends.ranks(k), numbers(&case["order"]), "k = {k}");
    }
    for case in list("hard_negative") {
        let passages: Vec<String> = serde_json::from_value(case["passages"].clone()).unwrap();
        let answers = [case["answer"].as_str().unwrap()];
        let (gold, k) = (case["gold"].as_u64().unwrap(), case["k"].as_u64().unwrap());
        let mut chosen = hard_negatives(&passages, gold as usize, &answers, k as usize);
        assert_eq!(chosen, numbers(&case["selected_before_shuffle"]));
        let uniforms: Vec<f64> = serde_json::from_value(case["uniforms"].clone()).unwrap();
        let mut uniforms = uniforms.into_iter();
        fisher_yates(&mut chosen, || uniforms.next().unwrap());
        assert_eq!(chosen, numbers(&case["final_order"]));
    }
    for case in list("answer_metrics") {
        let answers: Vec<String> = serde_json::from_value(case["answers"].clone()).unwrap();
        let text = case["prediction"].as_str().unwrap();
        let score = |yes: bool| if yes { 1.0 } else { 0.0 };
        assert_eq!(score(exact_match(text, &answers)), case["em"], "{text}");
        assert_eq!(score(contains(text, &answers)), case["contains"], "{text}");
    }
}

const WORDS: &str = "river bank rain stone night light walk sing old new harbour boat captain tax window garden letter";

/// Documents of random words, one passage each.
fn corpus(count: usize, seed: u64) -> Vec<Document> {
    let mut random = Random::new(seed, "corpus");
    let words: Vec<&str> = WORDS.split(' ').collect();
    let documents = (0..count).map(|n| {
        let length = random.between(3, 60);
        // Low words are frequent, high ones rare.
        let pick = |random: &mut Random| {
            let u = random.uniform();
            words[(u * u * words.len() as f64) as usize]
        };
        let text: Vec<&str> = (0..length).map(|_| pick(&mut random)).collect();
        Document {
            name: format!("d{n}"),
            text: text.join(" "),
            source: Format::Text,
            warnings: Vec::new(),
        }
    });
    documents.collect()
}

/// BM25 of one document after another, from the words as they stand.
fn bm25_naive(documents: &[Document], query: &str, config: &Bm25Config) -> Vec<(String, f64)> {
    let words = |document: &Document| -> Vec<String> {
        let text = format!("{} {}", document.name, document.text);
        text.split_whitespace().map(str::to_string).collect()
    };
    let all: Vec<Vec<String>> = documents.iter().map(words).collect();
    let average = all.iter().map(Vec::len).sum::<usize>() as f64 / all.len() as f64;
    let mut scores = Vec::new();
    for (document, words) in documents.iter().zip(&all) {
        let mut score = 0.0;
        for term in query.split_whitespace() {
            let tf = words.iter().filter(|word| *word == term).count() as f64;
            let n = all
                .iter()
                .filter(|words| words.iter().any(|w| w == term))
                .count() as f64;
            let idf = (1.0 + (all.len() as f64 - n + 0.5) / (n + 0.5)).ln();
            let length = words.len() as f64 / average;
            let below = tf + config.k1 * (1.0 - config.b + config.b * length);
            score += idf * tf * (config.k1 + 1.0) / below;
        }
        if score > 0.0 {
            scores.push((document.name.clone(), score));
        }
    }
    scores.sort_by(|a, b| b.1.total_cmp(&a.1));
    scores
}

#[test]
fn bm25_equals_its_plain_evaluation() {
    let documents = corpus(300, 1);
    let mut index = Index::in_memory(ChunkConfig::default()).unwrap();
    index.add(&documents, None, &mut go).unwrap();
    for config in [
        Bm25Config::default(),
        Bm25Config { k1: 1.2, b: 0.75 },
        Bm25Config { k1: 2.0, b: 0.0 },
    ] {
        for query in [
            "letter",
            "river letter",
            "boat boat garden d7",
            "nothing there",
            "harbour tax old rain",
        ] {
            let want = bm25_naive(&documents, query, &config);
            let found = index
                .search(query, 500, Retriever::Bm25, &config, None)
                .unwrap();
            assert_eq!(found.len(), want.len(), "{query}");
            for (hit, want) in found.iter().zip(&want) {
                assert!(
                    (hit.score - want.1).abs() < 1e-9,
                    "{query}: {} {}",
                    hit.score,
                    want.1
                );
                let own = want_score(&want_all(&documents, query, &config), &hit.document);
                assert!((hit.score - own).abs() < 1e-9, "{query}: {}", hit.document);
            }
            let first = index
                .search(query, 3, Retriever::Bm25, &config, None)
                .unwrap();
            assert_eq!(first, found[..found.len().min(3)]);
        }
    }
}

fn want_all(documents: &[Document], query: &str, config: &Bm25Config) -> Vec<(String, f64)> {
    bm25_naive(documents, query, config)
}

fn want_score(all: &[(String, f64)], name: &str) -> f64 {
    all.iter().find(|entry| entry.0 == name).unwrap().1
}

#[test]
fn dense_equals_brute_force_and_hybrid_fuses_ranks() {
    let documents = corpus(200, 2);
    let embedder = HashedWords { dim: 96 };
    let mut index = Index::in_memory(ChunkConfig::default()).unwrap();
    index.add(&documents, Some(&embedder), &mut go).unwrap();
    let bm25 = Bm25Config::default();
    let search = |query: &str, k: usize, by: Retriever| {
        index.search(query, k, by, &bm25, Some(&embedder)).unwrap()
    };
    for query in ["captain of the boat", "old letter", "window"] {
        let asked = embedder.embed(&[query], Kind::Query).unwrap();
        let texts: Vec<String> = documents
            .iter()
            .map(|d| format!("{}\n{}", d.name, d.text))
            .collect();
        let mut want: Vec<(usize, f32)> = texts
            .iter()
            .map(|text| {
                let vector = embedder.embed(&[text.as_str()], Kind::Passage).unwrap();
                vector.iter().zip(&asked).map(|(a, b)| a * b).sum()
            })
            .enumerate()
            .collect();
        want.sort_by(|a, b| b.1.total_cmp(&a.1));
        let found = search(query, 20, Retriever::Dense);
        for (hit, want) in found.iter().zip(&want) {
            assert!((hit.score - f64::from(want.1)).abs() < 1e-5);
        }
        let hybrid = search(query, 10, Retriever::Hybrid);
        let words = search(query, 100, Retriever::Bm25);
        let meaning = search(query, 100, Retriever::Dense);
        for hit in &hybrid {
            let rank =
                |list: &[longspan_agents::rag::Hit]| list.iter().position(|h| h.id == hit.id);
            let share = |rank: Option<usize>| rank.map_or(0.0, |rank| 1.0 / (61.0 + rank as f64));
            let want = share(rank(&words)) + share(rank(&meaning));
            assert!((hit.score - want).abs() < 1e-12);
            assert_eq!(hit.bm25_rank, rank(&words).map(|rank| rank + 1));
            assert_eq!(hit.dense_rank, rank(&meaning).map(|rank| rank + 1));
        }
        assert!(hybrid.windows(2).all(|pair| pair[0].score >= pair[1].score));
    }
    let error = index
        .search("x", 3, Retriever::Hybrid, &bm25, None)
        .unwrap_err();
    assert!(
        error.to_string().contains("hybrid compares vectors"),
        "{error}"
    );
}

fn write(folder: &Path, name: &str, text: &str) {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn update(index: &mut Index, folder: &Path) -> Updated {
    let embedder = HashedWords { dim: 32 };
    index
        .update(folder, &Limits::default(), Some(&embedder), &mut go)
        .unwrap()
}

fn found(index: &Index, query: &str) -> Vec<String> {
    let hits = index.search(query, 5, Retriever::Bm25, &Bm25Config::default(), None);
    hits.unwrap().into_iter().map(|hit| hit.document).collect()
}

#[test]
fn an_index_follows_its_folder() {
    let place = tempfile::tempdir().unwrap();
    let (folder, file) = (
        place.path().join("docs"),
        place.path().join("cache/index.sqlite"),
    );
    write(&folder, "a.txt", "The zebra grazes by the river.");
    write(&folder, "sub/b.md", "# Boats\n\nA quokka sails.\n");
    write(
        &folder,
        "page.html",
        "<html><body><p>An <b>ocelot</b> sleeps.</p></body></html>",
    );
    write(&folder, "code.rs", "fn parseQuagga() {}\n");
    write(&folder, "picture.txt", "\u{89}PNG\0\0\0");
    let mut index = Index::open(&file, ChunkConfig::default()).unwrap();
    let first = update(&mut index, &folder);
    assert_eq!(
        (first.files, first.read, first.passages, first.embedded),
        (5, 4, 4, 4)
    );
    assert_eq!(first.warnings.len(), 1, "{:?}", first.warnings);
    assert!(
        first.warnings[0].starts_with("picture.txt: "),
        "{:?}",
        first.warnings
    );
    assert_eq!(found(&index, "zebra"), ["a.txt"]);
    assert_eq!(found(&index, "ocelot"), ["page.html"]);
    assert_eq!(found(&index, "quagga"), ["code.rs"]);
    assert_eq!(found(&index, "boats quokka"), ["sub/b.md"]);
    // English endings are cut off.
    assert_eq!(found(&index, "grazing zebras"), ["a.txt"]);
    // Nothing has changed: nothing is read, after a restart too.
    drop(index);
    let mut index = Index::open(&file, ChunkConfig::default()).unwrap();
    let second = update(&mut index, &folder);
    assert_eq!((second.read, second.embedded, second.passages), (0, 0, 4));
    assert_eq!(second.warnings, first.warnings);
    // The same bytes at another time are not read either.
    let touched = std::fs::File::options()
        .append(true)
        .open(folder.join("a.txt"))
        .unwrap();
    touched.set_modified(std::time::UNIX_EPOCH).unwrap();
    drop(touched);
    assert_eq!(update(&mut index, &folder).read, 0);
    // Changed, new and gone.
    write(&folder, "a.txt", "A wombat digs here instead.");
    write(&folder, "new.txt", "The zebra moved to this file.");
    std::fs::remove_file(folder.join("sub/b.md")).unwrap();
    let third = update(&mut index, &folder);
    assert_eq!(
        (third.read, third.removed, third.embedded, third.files),
        (2, 1, 2, 5)
    );
    assert_eq!(found(&index, "zebra"), ["new.txt"]);
    assert_eq!(found(&index, "wombat"), ["a.txt"]);
    assert!(found(&index, "quokka").is_empty());
    // Scores are those of an index built at once: nothing of what is gone counts.
    let mut fresh =
        Index::open(&place.path().join("other.sqlite"), ChunkConfig::default()).unwrap();
    update(&mut fresh, &folder);
    let scores = |index: &Index| -> Vec<(String, f64)> {
        let hits = index.search(
            "zebra file here",
            9,
            Retriever::Bm25,
            &Bm25Config::default(),
            None,
        );
        hits.unwrap()
            .into_iter()
            .map(|hit| (hit.document, hit.score))
            .collect()
    };
    assert_eq!(scores(&index), scores(&fresh));
    // Other passages: built anew.
    drop(index);
    let mut index = Index::open(&file, ChunkConfig { words: 3 }).unwrap();
    assert_eq!(index.passages().unwrap(), 0);
    assert!(update(&mut index, &folder).passages > 5);
}

#[test]
fn a_stopped_build_keeps_what_it_has_and_goes_on() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("docs");
    for n in 0..200 {
        write(
            &folder,
            &format!("f{n:03}.txt"),
            &format!("text number {n} of many. ").repeat(15),
        );
    }
    let file = place.path().join("index.sqlite");
    let embedder = HashedWords { dim: 16 };
    let (mut embedded, mut stops) = (0, 0);
    let read = loop {
        let mut index = Index::open(&file, ChunkConfig { words: 20 }).unwrap();
        let before = index.passages().unwrap();
        let mut steps = 0;
        let result = index.update(
            &folder,
            &Limits::default(),
            Some(&embedder),
            &mut |progress| {
                if let Progress::Vectors(done, total) = progress {
                    assert!(done <= total && done >= embedded);
                    embedded = done;
                }
                steps += 1;
                // Each try gets a step further than what it finds done.
                if steps > stops + 1 {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            },
        );
        match result {
            Err(IndexError::Stopped) => {
                stops += 1;
                assert!(index.passages().unwrap() >= before);
            }
            Ok(updated) => {
                assert_eq!(
                    (updated.files, updated.passages),
                    (200, index.passages().unwrap())
                );
                break updated.read;
            }
            Err(other) => panic!("{other}"),
        }
    };
    assert!(stops >= 3, "{stops} stops");
    assert_eq!(read, 0, "the last try had nothing left to read");
}

#[test]
fn a_file_that_is_no_index_is_named() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("index.sqlite");
    std::fs::write(
        &file,
        "this is no database, but it is long enough to be read as one".repeat(99),
    )
    .unwrap();
    let error = match Index::open(&file, ChunkConfig::default()) {
        Ok(_) => panic!("opened"),
        Err(error) => error.to_string(),
    };
    assert!(
        error.contains("index.sqlite") && error.contains("delete the file"),
        "{error}"
    );
}

#[test]
fn prompts_drop_the_worst_first_and_then_are_put_in_order() {
    let model = Scripted::new(|_| Ok("yes".into()));
    let texts: Vec<String> = (0..30)
        .map(|n| format!("passage {n} is {}", "word ".repeat(n % 7)))
        .collect();
    let ranked: Vec<Shown> = texts
        .iter()
        .map(|text| Shown { title: "t", text })
        .collect();
    let all = pack(&model, &ranked, "why?", Order::Ends, usize::MAX).unwrap();
    assert_eq!(all.order, Order::Ends.ranks(30));
    let mut last = 0;
    for budget in (40..all.tokens + 20).step_by(7) {
        let packed = match pack(&model, &ranked, "why?", Order::Ends, budget) {
            Ok(packed) => packed,
            Err(ChatError::ContextOverflow { max, .. }) => {
                assert!(max == budget && last == 0);
                continue;
            }
            Err(other) => panic!("{other}"),
        };
        assert!(packed.tokens <= budget);
        let kept = packed.order.len();
        assert_eq!(packed.order, Order::Ends.ranks(kept));
        // One more would not have fitted.
        if kept < 30 {
            let more = pack(&model, &ranked[..kept + 1], "why?", Order::Ends, usize::MAX).unwrap();
            assert!(more.tokens > budget, "{kept} at {budget}");
        }
        assert!(kept >= last);
        last = kept;
        let places: Vec<usize> = (packed.order.iter())
            .map(|rank| packed.text.find(&format!("passage {rank} ")).unwrap())
            .collect();
        assert!(places.is_sorted() && packed.text.ends_with("Question: why?\nAnswer:"));
    }
    assert_eq!(last, 30);
}

#[test]
fn an_answer_comes_from_the_passages_found() {
    let mut documents = corpus(120, 5);
    documents[77].text += " The password of the lighthouse is heliotrope.";
    let model = Scripted::rules(vec![
        Rule {
            contains: vec!["heliotrope".into()],
            reply: "heliotrope".into(),
            times: None,
        },
        Rule {
            reply: "unknown".into(),
            ..Rule::default()
        },
    ])
    .window(700);
    let config = RagConfig {
        k: 20,
        max_tokens: 16,
        ..RagConfig::default()
    };
    let embedder = HashedWords::default();
    let question = "What is the password of the lighthouse?";
    for retriever in [Retriever::Bm25, Retriever::Dense, Retriever::Hybrid] {
        let config = RagConfig {
            retriever,
            ..config.clone()
        };
        let found = answer(
            &model,
            &documents,
            question,
            &config,
            Some(&embedder),
            &Call::default(),
            &mut ignore,
        )
        .unwrap();
        assert_eq!(found.reply.text, "heliotrope", "{retriever}");
        let place = found.hits.iter().position(|hit| hit.document == "d77");
        assert!(
            place.is_some_and(|place| place < if retriever == Retriever::Bm25 { 1 } else { 20 })
        );
        assert!(found.prompt_tokens <= 700 - 16 && !found.order.is_empty());
    }
    let request = model.requests().pop().unwrap();
    let Input::Chat(messages) = &request.input else {
        panic!("{request:?}")
    };
    assert!(messages[0].content.starts_with("Answer the question") && request.max_tokens == 16);
    let none = RagConfig {
        k: 0,
        ..config.clone()
    };
    let error = answer(
        &model,
        &documents,
        question,
        &none,
        Some(&embedder),
        &Call::default(),
        &mut ignore,
    );
    assert!(matches!(error, Err(RagError::Option { option: "k", .. })));
    let stopped = Call::new(|| true);
    assert!(
        answer(
            &model,
            &documents,
            question,
            &config,
            Some(&embedder),
            &stopped,
            &mut ignore
        )
        .is_err()
    );
    // The configuration reads as it is written, and names what it does not know.
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<RagConfig>(&text).unwrap(), config);
    let error = serde_json::from_str::<RagConfig>(r#"{"order": "best"}"#).unwrap_err();
    assert!(error.to_string().contains("expected rank, ends"), "{error}");
}
