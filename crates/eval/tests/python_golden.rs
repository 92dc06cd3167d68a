//! Python's strings, numbers, `difflib` and random streams against what CPython 3.11 and numpy 1.26 gave.

#[path = "../../../tests/golden.rs"]
mod golden;

use longspan_eval::python::{
    self, NumpyRandom, Random, SequenceMatcher, chars, parse_float, repr_float, text,
};
use serde_json::Value;

fn list<'a>(value: &'a Value, key: &str) -> &'a Vec<Value> {
    value[key]
        .as_array()
        .unwrap_or_else(|| panic!("no list `{key}` in {value}"))
}

fn texts(value: &Value) -> Vec<&str> {
    let list = value.as_array().expect("a list");
    list.iter().map(|v| v.as_str().expect("a text")).collect()
}

fn indices(value: &Value) -> Vec<usize> {
    serde_json::from_value(value.clone()).expect("indices")
}

fn int(value: &Value) -> i64 {
    value.as_i64().unwrap_or_else(|| panic!("{value}"))
}

#[test]
fn cpython_streams_of_one_seed() {
    let cases = golden::json("passkey-and-ruler", "python_random.json");
    let cases = cases.as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let seed = int(&case["seed"]);
        let mut random = Random::new(seed);
        for expected in list(case, "random") {
            assert_eq!(Some(random.random()), expected.as_f64(), "seed {seed}");
        }
        for entry in list(case, "getrandbits") {
            let bits = random.getrandbits(int(&entry[0]) as u32);
            assert_eq!(bits.to_string(), entry[1].as_str().unwrap(), "seed {seed}");
        }
        for entry in list(case, "randint") {
            let found = random.randint(int(&entry[0]), int(&entry[1]));
            assert_eq!(found, int(&entry[2]), "seed {seed}");
        }
        let seven: Vec<char> = "abcdefg".chars().collect();
        for expected in texts(&case["choice_of_7"]) {
            assert_eq!(random.choice(&seven).unwrap().to_string(), expected);
        }
        let upper: Vec<char> = ('A'..='Z').collect();
        for expected in texts(&case["choices_upper_k5"]) {
            let found: String = random.choices(&upper, 5).into_iter().collect();
            assert_eq!(found, expected);
        }
        for entry in list(case, "sample") {
            let found = random.sample_indices(int(&entry[0]) as usize, int(&entry[1]) as usize);
            assert_eq!(found, indices(&entry[2]), "seed {seed}");
        }
        let mut dozen: Vec<usize> = (0..12).collect();
        random.shuffle(&mut dozen);
        assert_eq!(dozen, indices(&case["shuffle_12"]));
        for expected in texts(&case["uuid"]) {
            assert_eq!(random.uuid(), expected);
        }
        for expected in texts(&case["uuid4"]) {
            assert_eq!(random.uuid4(), expected);
        }
        let Some(integers) = case["np_randint_10000_99999"].as_array() else {
            assert!(seed > i64::from(u32::MAX));
            continue;
        };
        let mut numpy = NumpyRandom::new(seed as u32);
        for expected in integers {
            assert_eq!(numpy.randint(10000, 99999), int(expected), "seed {seed}");
        }
        for expected in list(case, "np_rand") {
            assert_eq!(Some(numpy.random()), expected.as_f64());
        }
    }
}

#[test]
fn cpython_streams_of_text_seeds_and_other_calls() {
    let cases = golden::json("python", "random.json");
    for case in cases.as_array().unwrap() {
        let mut random = match &case["seed"] {
            Value::String(seed) => Random::from_text(seed),
            seed => Random::new(int(seed)),
        };
        for expected in list(case, "random") {
            assert_eq!(Some(random.random()), expected.as_f64(), "{}", case["seed"]);
        }
        for entry in list(case, "randrange") {
            let (low, high) = (int(&entry[0]), int(&entry[1]));
            let found = random.randrange(low, high, int(&entry[2]) as u64);
            assert_eq!(found, int(&entry[3]), "{}", case["seed"]);
        }
        assert_eq!(Some(random.uniform(-2.5, 9.0)), case["uniform"].as_f64());
        let thirteen: Vec<usize> = (0..13).collect();
        let found: Vec<usize> = random.choices(&thirteen, 6).into_iter().copied().collect();
        assert_eq!(found, indices(&case["choices"]));
        let mut thirty: Vec<usize> = (0..30).collect();
        random.shuffle(&mut thirty);
        assert_eq!(thirty, indices(&case["shuffle_30"]));
        for entry in list(case, "sample") {
            let found = random.sample_indices(int(&entry[0]) as usize, int(&entry[1]) as usize);
            assert_eq!(found, indices(&entry[2]));
        }
        for entry in list(case, "getrandbits") {
            let bits = random.getrandbits(int(&entry[0]) as u32);
            assert_eq!(bits.to_string(), entry[1].as_str().unwrap());
        }
    }
}

#[test]
fn numpy_legacy_streams() {
    let cases = golden::json("python", "numpy.json");
    for case in cases.as_array().unwrap() {
        let mut random = NumpyRandom::new(int(&case["seed"]) as u32);
        for entry in list(case, "randint") {
            let found = random.randint(int(&entry[0]), int(&entry[1]));
            assert_eq!(found, int(&entry[2]), "{entry} of {}", case["seed"]);
        }
        for expected in list(case, "random") {
            assert_eq!(Some(random.random()), expected.as_f64());
        }
        let mut twenty: Vec<usize> = (0..20).collect();
        random.shuffle(&mut twenty);
        assert_eq!(twenty, indices(&case["shuffle_20"]));
        assert_eq!(random.permutation(17), indices(&case["permutation_17"]));
        assert_eq!(Some(random.random()), case["random_after"].as_f64());
    }
}

#[test]
fn strings() {
    let cases = golden::json("python", "strings.json");
    for case in cases.as_array().unwrap() {
        let given = case["text"].as_str().unwrap();
        let words: Vec<&str> = python::split(given).collect();
        assert_eq!(words, texts(&case["split"]), "{given:?}");
        assert_eq!(python::strip(given), case["strip"], "{given:?}");
        assert_eq!(python::splitlines(given), texts(&case["splitlines"]));
        assert_eq!(python::repr_str(given), case["repr"], "{given:?}");
        assert_eq!(text::replace_articles(given), case["articles"], "{given:?}");
        assert_eq!(given.to_lowercase(), case["lower"], "{given:?}");
    }
}

#[test]
fn classes_of_every_assigned_character() {
    let cases = golden::json("python", "classes.json");
    let has = |key: &str, c: char| {
        let ranges = list(&cases, key);
        let after = ranges.partition_point(|r| int(&r[0]) <= c as i64);
        after > 0 && c as i64 <= int(&ranges[after - 1][1])
    };
    let mut tested = 0;
    for c in ('\0'..=char::MAX).filter(|&c| has("assigned", c)) {
        assert_eq!(chars::is_space(c), has("space", c), "{c:?}");
        assert_eq!(chars::is_word(c), has("word", c), "{c:?}");
        assert_eq!(chars::is_decimal(c), has("decimal", c), "{c:?}");
        assert_eq!(chars::is_printable(c), has("printable", c), "{c:?}");
        tested += 1;
    }
    assert!(tested > 100_000, "{tested}");
}

#[test]
fn numbers() {
    let cases = golden::json("python", "rounding.json");
    for case in cases.as_array().unwrap() {
        let value = case[0].as_f64().unwrap();
        for (digits, expected) in case[1].as_array().unwrap().iter().enumerate() {
            let found = python::round(value, digits);
            assert_eq!(Some(found), expected.as_f64(), "round({value}, {digits})");
        }
        assert_eq!(repr_float(value), case[2].as_str().unwrap());
    }
    for case in golden::json("python", "float.json").as_array().unwrap() {
        let found = parse_float(case[0].as_str().unwrap()).map(repr_float);
        assert_eq!(found.as_deref(), case[1].as_str(), "{}", case[0]);
    }
}

#[test]
fn difflib_ratios() {
    let cases = golden::json("python", "difflib.json");
    for case in cases.as_array().unwrap() {
        let a: Vec<char> = case[0].as_str().unwrap().chars().collect();
        let b: Vec<char> = case[1].as_str().unwrap().chars().collect();
        let found = SequenceMatcher::new(&a, &b).ratio();
        assert_eq!(Some(found), case[2].as_f64(), "{case}");
    }
}
