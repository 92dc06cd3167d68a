//! Generated tasks: the same by seed, and their answers right by other means.

use super::copy::Variant;
use super::*;

fn variants() -> Vec<Box<dyn Tokens>> {
    let copy = |variant| {
        Box::new(Copy {
            variant,
            symbols: 12,
        }) as Box<dyn Tokens>
    };
    vec![
        copy(Variant::Rsc),
        copy(Variant::Rdc),
        copy(Variant::Rsc2x),
        copy(Variant::Cmc),
        copy(Variant::Cmc2x),
        copy(Variant::Reverse),
        Box::new(Sort { values: 9 }),
        Box::new(Addition::default()),
        Box::new(Addition { reversed: true }),
        Box::new(Passkey::default()),
    ]
}

#[test]
fn examples_repeat_by_seed_and_stay_in_the_vocabulary() {
    for (index, task) in variants().iter().enumerate() {
        let draw = |seed| {
            let mut random = Random::new(seed, "tasks");
            (1..40)
                .map(|length| task.sample(length, &mut random))
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1), "task {index}");
        assert_ne!(draw(1), draw(2), "task {index}");
        for example in draw(3) {
            assert_eq!(example.prompt.last(), Some(&SEP));
            assert_eq!(example.answer.last(), Some(&EOS));
            let largest = example.prompt.iter().chain(&example.answer).max().unwrap();
            assert!((*largest as usize) < task.vocab_size(), "task {index}");
        }
    }
}

#[test]
fn sums_are_sums() {
    let mut random = Random::new(5, "sums");
    for length in 1..30 {
        for reversed in [false, true] {
            let Example { prompt, mut answer } = Addition { reversed }.sample(length, &mut random);
            let number = |tokens: &[u32]| -> u128 {
                tokens
                    .iter()
                    .fold(0, |value, token| value * 10 + u128::from(token - FIRST))
            };
            let plus = prompt.iter().position(|&t| t == FIRST + 10).unwrap();
            let (a, b) = (&prompt[..plus], &prompt[plus + 1..prompt.len() - 1]);
            assert_eq!(a.len().max(b.len()), length);
            answer.pop();
            if reversed {
                answer.reverse();
            }
            assert_eq!(number(&answer), number(a) + number(b));
        }
    }
}

#[test]
fn copies_and_keys_are_those_of_the_prompt() {
    let mut random = Random::new(6, "copies");
    for length in 1..20 {
        let twice = Copy {
            variant: Variant::Cmc2x,
            symbols: 5,
        }
        .sample(length, &mut random);
        assert_eq!(twice.answer.len(), 2 * length + 1);
        assert_eq!(twice.answer[..length], twice.prompt[..length]);
        assert_eq!(twice.answer[length..2 * length], twice.prompt[..length]);
        let replaced = Copy {
            variant: Variant::Rdc,
            symbols: 5,
        }
        .sample(length, &mut random);
        assert_eq!(replaced.answer[..length], vec![replaced.prompt[1]; length]);
        let sorted = Sort { values: 7 }.sample(length, &mut random);
        assert!(sorted.answer[..length].is_sorted());
    }
    for depth in [Some(0.0), Some(0.5), Some(1.0), None] {
        let task = Passkey {
            depth,
            ..Passkey::default()
        };
        let example = task.sample(200, &mut random);
        assert_eq!(example.prompt.len(), 201);
        let mark = example.prompt.iter().position(|&t| t == FIRST).unwrap();
        assert_eq!(example.prompt[mark + 1..mark + 6], example.answer[..5]);
        if let Some(depth) = depth {
            assert_eq!(mark, (depth * 194.0) as usize);
        }
    }
}

#[test]
fn signals_have_the_stated_targets_and_moments() {
    let mut random = Random::new(8, "signals");
    let lag = Lag::default();
    let (mut sum, mut squares, mut count) = (0.0, 0.0, 0.0);
    for _ in 0..40 {
        let (input, target) = lag.sample(&mut random);
        assert_eq!(input[..lag.steps - lag.lag], target[lag.lag..]);
        assert!(target[..lag.lag].iter().all(|&v| v == 0.0));
        for value in input {
            sum += f64::from(value);
            squares += f64::from(value * value);
            count += 1.0;
        }
    }
    assert!((sum / count).abs() < 0.05, "{}", sum / count);
    assert!((squares / count - 1.0).abs() < 0.1, "{}", squares / count);
    for steps in [2, 3, 50] {
        let (input, target) = Adding { steps }.sample(&mut random);
        let marked: Vec<f32> = input
            .chunks(2)
            .filter(|pair| pair[1] == 1.0)
            .map(|pair| pair[0])
            .collect();
        assert_eq!(marked.len(), 2);
        assert!((marked.iter().sum::<f32>() - target[0]).abs() < 1e-6);
    }
}
