//! Scores against the published scorers of LongBench, L-Eval, M4LE, LongSafety, LongWriter, LoCoV1 and RULER.

#[path = "../../../tests/golden.rs"]
mod golden;

mod fields;

use fields::{close, number, text, texts};
use longspan_eval::metric::{
    bleu, effective_length, length_score, ndcg, pairwise, panel, segment, string_match,
};
use serde_json::Value;

fn rows(value: &Value) -> &Vec<Value> {
    let list = value.as_array().unwrap_or_else(|| panic!("{value}"));
    assert!(!list.is_empty());
    list
}

#[test]
fn jieba_words() {
    let all = golden::jsonl("longbench", "jieba.jsonl");
    for row in all.iter().chain(&golden::jsonl("python", "jieba.jsonl")) {
        assert_eq!(segment::jieba(text(row, "text")), texts(&row["tokens"]));
    }
}

#[test]
fn bleu_tokenizers() {
    let file = golden::json("m4le", "bleu_tokenizers.json");
    for row in rows(&file["t13a"]) {
        assert_eq!(bleu::tokenize_13a(row[0].as_str().unwrap()), texts(&row[1]));
    }
    for row in rows(&file["zh"]) {
        assert_eq!(bleu::tokenize_zh(row[0].as_str().unwrap()), texts(&row[1]));
    }
}

#[test]
fn bleu_of_a_corpus() {
    let split = |text: &str| -> Vec<String> { text.split(' ').map(str::to_string).collect() };
    let texts = ["a b c d e f", "g h i j k l m", "n o p q r"];
    let corpus = |order: [usize; 3]| {
        let pair = |i: usize| (split(texts[i]), vec![split(texts[order[i]])]);
        bleu::corpus_bleu(&[pair(0), pair(1), pair(2)])
    };
    assert_eq!(corpus([0, 1, 2]), 1.0);
    assert!(corpus([1, 0, 2]) < 0.6);
    assert_eq!(bleu::corpus_bleu(&[(vec![], vec![split("a")])]), 0.0);
    assert_eq!(bleu::corpus_bleu(&[]), 0.0);
}

#[test]
fn length_scores_of_longwriter() {
    let file = golden::json("longwriter", "metrics.json");
    for row in rows(&file["S_l"]) {
        let written = number(row, "output") as usize;
        let found = length_score::length_score(number(row, "required") as usize, written);
        close(found, number(row, "score"), row);
    }
    for row in rows(&file["count_words"]) {
        assert_eq!(
            length_score::count_words(text(row, "text")) as f64,
            number(row, "n")
        );
    }
    let ratings: Vec<length_score::Ratings> = rows(&file["S_q"]["judge"])
        .iter()
        .map(|row| length_score::parse_ratings(&row.to_string()).unwrap())
        .collect();
    let (by_dimension, total) = length_score::quality_score(&ratings).unwrap();
    let expected = &file["S_q"]["result"];
    for (name, found) in length_score::DIMENSIONS.iter().zip(by_dimension) {
        close(found, number(expected, name), expected);
    }
    close(total, number(expected, "total"), expected);
}

#[test]
fn rates_of_longsafety() {
    let file = golden::json("longsafety", "aggregate.json");
    let cases = |filter: &dyn Fn(&Value) -> bool| {
        let chosen = rows(&file["rows"]).iter().filter(|row| filter(row));
        let read = |row| {
            let (front, end) = (text(row, "judgment_front"), text(row, "judgment_end"));
            panel::Case::read(front, end, panel::Parse::Official)
        };
        chosen.map(read).collect::<Vec<_>>()
    };
    let check = |cases: &[panel::Case], expected: &Value| {
        let found = panel::rates(cases);
        assert_eq!(found.n as f64, number(expected, "n"), "{expected}");
        assert_eq!(
            found.safety_rate,
            expected["safety_rate"].as_f64(),
            "{expected}"
        );
        assert_eq!(found.front, expected["front"].as_f64(), "{expected}");
        assert_eq!(found.end, expected["end"].as_f64(), "{expected}");
    };
    check(&cases(&|_| true), &file["overall"]);
    for (field, groups) in file["by"].as_object().unwrap() {
        for (value, expected) in groups.as_object().unwrap() {
            check(&cases(&|row| text(row, field) == value), expected);
        }
    }
}

#[test]
fn pairwise_judge_of_leval() {
    let file = golden::json("l-eval", "aggregate.json");
    let mut tally = pairwise::Tally::default();
    for pair in rows(&file["judge"]["verdicts"]) {
        tally.add(pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
    }
    let counts = &file["judge"]["counts"];
    let found = [tally.wins, tally.losses, tally.ties, tally.errors];
    let expected = ["model", "base", "tie", "error"].map(|key| number(counts, key) as usize);
    assert_eq!(found, expected);
    close(
        tally.win_rate().unwrap(),
        number(&file["judge"], "win_rate_model"),
        counts,
    );
    let other = tally.swapped().win_rate().unwrap();
    close(other, number(&file["judge"], "win_rate_base"), counts);
}

#[test]
fn ndcg_of_loco() {
    for case in golden::cases_of("loco-m2bert", "ndcg") {
        let (scores, relevance) = (case.f64("scores"), case.i64("relevance"));
        let columns = case.shape("scores")[1];
        for k in [1, 3, 10] {
            let found: Vec<f64> = scores
                .chunks(columns)
                .zip(relevance.chunks(columns))
                .map(|(scores, relevance)| {
                    let ranked: Vec<bool> = ndcg::rank(scores)
                        .iter()
                        .map(|&i| relevance[i] > 0)
                        .collect();
                    ndcg::ndcg(&ranked, ranked.iter().filter(|&&r| r).count(), k)
                })
                .collect();
            case.assert_within(&format!("ndcg_at_{k}"), &found, |_, _| 1e-9);
        }
    }
}

#[test]
fn effective_lengths_of_needle_threading() {
    for row in rows(&golden::json("needle-threading", "effective_length.json")) {
        let list = |key: &str| -> Vec<f64> { serde_json::from_value(row[key].clone()).unwrap() };
        let (lengths, accuracy) = (list("lengths"), list("accuracy"));
        let found = effective_length::crossing(&lengths, &accuracy, number(row, "threshold"));
        close(found, number(row, "effective"), row);
    }
}

#[test]
fn string_match_of_ruler() {
    let file = golden::json("passkey-and-ruler", "scoring.json");
    let (mut all, mut part) = (Vec::new(), Vec::new());
    for row in rows(&file["cases"]) {
        let references = texts(&row["refs"]);
        let prediction = text(row, "pred");
        all.push(100.0 * string_match::all(prediction, &references));
        part.push(100.0 * string_match::part(prediction, &references));
        let round = |value| longspan_eval::python::round(value, 2);
        assert_eq!(round(all[all.len() - 1]), number(row, "all"), "{row}");
        assert_eq!(round(part[part.len() - 1]), number(row, "part"), "{row}");
    }
    let mean = |list: &[f64]| list.iter().sum::<f64>() / list.len() as f64;
    assert!((mean(&all) - number(&file, "corpus_all")).abs() < 0.0051);
    assert!((mean(&part) - number(&file, "corpus_part")).abs() < 0.0051);
    assert_eq!(string_match::clean(" \x01a\x02\tb\x1f "), "a\n\nb");
}

#[test]
fn rouge_in_three_dialects_and_fuzz_ratio() {
    use longspan_eval::metric::edit_similarity::fuzz_ratio;
    use longspan_eval::metric::rouge::{Rouge, RougeCompat, google_rouge, rouge_l, rouge_l_plain};
    for row in golden::jsonl("rouge", "rouge.jsonl") {
        let (prediction, gold) = (text(&row, "pred"), text(&row, "gold"));
        let check = |found: Rouge, expected: &Value| {
            for (key, found) in [("r", found.recall), ("p", found.precision), ("f", found.f)] {
                close(found, number(expected, key), &row);
            }
        };
        check(
            rouge_l(prediction, gold, RougeCompat::Unlimited),
            &row["rouge"],
        );
        check(rouge_l_plain(prediction, gold), &row["rouge_chinese"]);
        let google = google_rouge(prediction, gold);
        let found = [google.rouge1, google.rouge2, google.rouge_l];
        for (found, expected) in found.iter().zip(rows(&row["google"])) {
            close(*found, expected.as_f64().unwrap(), &row);
        }
        let ratio = fuzz_ratio(prediction, gold);
        assert_eq!(f64::from(ratio), number(&row, "fuzz_ratio"), "{row}");
    }
}
