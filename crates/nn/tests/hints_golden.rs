//! Task hinting: tempered attention and the examples of the goldens, laws of decoding, and the sorter set by hand (paper 51).

mod close;
#[path = "../../../tests/golden.rs"]
mod golden;

use candle_core::{DType, Device, Tensor};
use close::{difference, flat, tensor};
use longspan_data::random::Random;
use longspan_data::task::{Hint, HintedSort, Sort, Tokens};
use longspan_nn::model::tempered::{log_line, tempered_attention};
use longspan_nn::model::{Temper, TemperedConfig, TemperedDecoder};
use longspan_nn::params::ParamStore;

#[test]
fn tempered_attention_and_hints_are_those_of_the_goldens() {
    for case in &golden::cases_of("task-hinting", "tempered_attention") {
        let of = |name: &str| tensor(case, name);
        let (q, k, v) = (of("in.q"), of("in.k"), of("in.v"));
        let n: Vec<usize> = case.i64("in.n").iter().map(|&n| n as usize).collect();
        let table = case.f32("param.beta_table");
        let least = case.meta_usize("log_n_min");
        let row = |f: &dyn Fn(usize) -> f32| {
            let values: Vec<f32> = n.iter().map(|&n| f(n)).collect();
            Tensor::from_vec(values, n.len(), &Device::Cpu).unwrap()
        };
        for (name, beta) in [
            ("out.plain", None),
            ("out.plain", Some(row(&|_| 1.0))),
            ("out.table", Some(row(&|n| table[n]))),
            ("out.log_n", Some(row(&|n| (n.max(least) as f32).ln()))),
        ] {
            let y = tempered_attention(&q, &k, &v, beta.as_ref()).unwrap();
            case.assert_close(name, &flat(&y));
        }
        // The model's own beta of both forms.
        let tensors = |temper: Temper| {
            let config = TemperedConfig {
                d_model: 8,
                heads: 2,
                temper,
                ..TemperedConfig::default()
            };
            let store = ParamStore::new(1, DType::F32, &Device::Cpu);
            TemperedDecoder::new(&config, 5, 1, &store.root()).unwrap();
            let mut tensors = store.tensors();
            tensors.insert(
                "beta".into(),
                Tensor::new(table.as_slice(), &Device::Cpu).unwrap(),
            );
            let store = ParamStore::from_tensors(tensors, DType::F32, &Device::Cpu);
            let model = TemperedDecoder::new(&config, 5, 1, &store.root()).unwrap();
            flat(&model.beta(&n).unwrap().unwrap())
        };
        let longest = table.len() - 1;
        let found = tensors(Temper::Table { longest });
        assert!(
            found
                .iter()
                .zip(&n)
                .all(|(b, &n)| *b == f64::from(table[n]))
        );
        let found = tensors(Temper::LogN { n_train: None });
        assert!(
            found
                .iter()
                .zip(&n)
                .all(|(b, &n)| (b - (n.max(2) as f64).ln()).abs() < 1e-6)
        );
    }
    let hinted = HintedSort {
        sort: Sort { values: 100 },
    };
    let token = |value: &serde_json::Value| match value.as_u64() {
        Some(value) => 2 + value as u32,
        None if value == "SEP" => 1,
        None if value == "EOS" => 0,
        None => hinted.none(),
    };
    let examples = golden::json("task-hinting", "examples.json");
    let mut checked = 0;
    for example in examples.as_array().unwrap() {
        let list = |key: &str| -> Vec<u32> {
            example[key].as_array().unwrap().iter().map(token).collect()
        };
        let input = list("input");
        if example.get("sort").is_some() {
            let mut sorted = input.clone();
            sorted.sort_unstable();
            let written = [input.clone(), vec![1], sorted, vec![0]].concat();
            assert_eq!(written, list("sort"));
            checked += 1;
            continue;
        }
        let query = token(&example["query"]);
        let place = input.iter().position(|&x| x == query).unwrap();
        for (key, hint) in [
            ("successor", Hint::Successor),
            ("predecessor", Hint::Predecessor),
        ] {
            let made = hinted.example(hint, &input, place);
            assert_eq!(made.answer, [token(&example[key])], "{example}");
            let prompt = [input.clone(), vec![hinted.query(hint), query]].concat();
            assert_eq!(made.prompt, prompt);
        }
        let count = hinted.example(Hint::Count, &input, place).answer;
        let digit = hinted.digit(example["count"].as_u64().unwrap() as u32);
        assert_eq!(count, [digit, 0]);
        checked += 1;
    }
    assert_eq!(checked, examples.as_array().unwrap().len());
    // The generator writes what the golden's base task is.
    let made = hinted.sort.sample(9, &mut Random::new(1, "x"));
    let mut sorted = made.prompt[..9].to_vec();
    sorted.sort_unstable();
    assert_eq!(made.answer[..9], sorted);
}

#[test]
fn written_tokens_are_those_of_the_whole_forward_and_padding_is_not_seen() {
    for (temper, head_per_task) in [
        (Temper::Affine, true),
        (Temper::LogN { n_train: Some(4) }, false),
    ] {
        let config = TemperedConfig {
            d_model: 16,
            heads: 4,
            temper,
            head_per_task,
            ..TemperedConfig::default()
        };
        let store = ParamStore::new(2, DType::F32, &Device::Cpu);
        let model = TemperedDecoder::new(&config, 12, 2, &store.root()).unwrap();
        let prompts = [vec![3u32, 5, 7, 1], vec![4, 4, 2, 1]];
        for task in [0, 1] {
            let written = model.greedy(&prompts, 3, 5, task).unwrap();
            for (prompt, written) in prompts.iter().zip(&written) {
                let whole = [prompt.clone(), written.clone()].concat();
                let rows: Vec<u32> = (3..8).collect();
                let logits = model
                    .logits(std::slice::from_ref(&whole), &[3], &rows, task)
                    .unwrap();
                let best = logits.argmax(1).unwrap().to_vec1::<u32>().unwrap();
                assert_eq!(&best, written);
                let padded = [whole, vec![11; 4]].concat();
                let again = model.logits(&[padded], &[3], &rows, task).unwrap();
                assert!(difference(&again, &logits) < 1e-5);
            }
        }
    }
}

/// The paper's second layer with its weights set by hand: one-hot embeddings of values, S[x, y] = -c (y - x) for y > x and
/// next to nothing else, one tempered attention over the list, and the written value is the nearest to its answer. The list
/// is started by a value below all; what layer 1 copies is the element just written.
fn constructed_sort(list: &[u32], c: f32, beta: f32) -> Vec<u32> {
    let (v, n) = (101usize, list.len());
    let mut keys = vec![0f32; n * v];
    for (k, &y) in list.iter().enumerate() {
        keys[k * v + y as usize + 1] = 1.0;
    }
    let tensor = |values: Vec<f32>, shape: (usize, usize, usize, usize)| {
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let keys = tensor(keys, (1, 1, n, v));
    let values = tensor(list.iter().map(|&y| y as f32).collect(), (1, 1, n, 1));
    let beta = Tensor::new(&[beta], &Device::Cpu).unwrap();
    // Row 0 of S is that of the value below all.
    let mut x = 0usize;
    (0..n)
        .map(|_| {
            let scale = (v as f32).sqrt();
            let row: Vec<f32> = (0..v)
                .map(|y| {
                    if y > x {
                        -c * (y - x) as f32 * scale
                    } else {
                        -1e4
                    }
                })
                .collect();
            let query = tensor(row, (1, 1, 1, v));
            let mean = flat(&tempered_attention(&query, &keys, &values, Some(&beta)).unwrap())[0];
            x = mean.round() as usize + 1;
            mean.round() as u32
        })
        .collect()
}

#[test]
fn the_hand_built_sorter_needs_sharpness_that_grows_with_ln_n() {
    let mut random = Random::new(7, "construction");
    let mut flat_fails = 0;
    for n in 1..=100usize {
        let mut list: Vec<u32> = (0..100).collect();
        random.shuffle(&mut list);
        list.truncate(n);
        let mut sorted = list.clone();
        sorted.sort_unstable();
        let enough = 2.0 * (2.0 * n as f32).ln();
        assert_eq!(constructed_sort(&list, 1.0, enough.max(1.0)), sorted, "{n}");
        // Sharpness of n = 10 with a small c.
        let c = 0.2;
        let fixed = constructed_sort(&list, c, (2.0 * 10f32).ln());
        flat_fails += usize::from(n > 90 && fixed != sorted);
    }
    assert_eq!(flat_fails, 10);
    let table: Vec<f64> = (0..20).map(|n| 0.5 + 2.0 * (n as f64).ln()).collect();
    let (a, b) = log_line(&table);
    assert!((a - 0.5).abs() < 1e-12 && (b - 2.0).abs() < 1e-12);
}
