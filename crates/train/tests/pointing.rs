//! Learning to point, order search, task hinting: that models learn, and that what should change nothing changes nothing.

use candle_core::{DType, Device};
use longspan_data::random::Random;
use longspan_data::task::{
    Hint, HintedSort, PointingTask, Sort, SortSet, Star, StarConfig, Tokens,
};
use longspan_nn::model::pointer::Rule;
use longspan_nn::model::{Choose, TaggedConfig, TaggedLm, TemperedConfig, TemperedDecoder};
use longspan_nn::params::ParamStore;
use longspan_train::hints::{HintSource, Hinting, Mixing, TaskBatch, exact};
use longspan_train::objective::Objective;
use longspan_train::optim::{OptimConfig, Optimizer};
use longspan_train::order_search::{Order, OrderSearch, SetBatch, SetSource};
use longspan_train::pointing::{PointingConfig, PointingLoss, PointingModel, PointingSource};
use longspan_train::schedule::Schedule;
use longspan_train::source::Source;
use longspan_train::trainer::{LoopConfig, Trainer};
use std::sync::Arc;

fn store(seed: u64) -> Arc<ParamStore> {
    Arc::new(ParamStore::new(seed, DType::F32, &Device::Cpu))
}

fn steps(count: u64) -> LoopConfig {
    LoopConfig {
        steps: count,
        clip: Some(2.0),
        schedule: Schedule::Constant { warmup: 0 },
        ..LoopConfig::default()
    }
}

fn adamw(lr: f64) -> Optimizer {
    Optimizer::new(OptimConfig::adamw(lr)).unwrap()
}

#[test]
fn three_numbers_are_sorted_by_all_that_point() {
    let task = PointingTask::Sort(SortSet::default());
    for config in [
        PointingConfig::PtrNet {
            hidden: 24,
            init: 0.2,
            glimpse: false,
        },
        PointingConfig::Set2Seq {
            d: 24,
            steps: 2,
            glimpse: true,
        },
    ] {
        let params = store(1);
        let model = PointingModel::new(&config, 1, false, &params.root()).unwrap();
        let model = Arc::new(model);
        let source = PointingSource::new(task.clone(), (2, 3), 64, 1, "train").unwrap();
        let loss = PointingLoss::new(model.clone(), 1);
        let mut trainer = Trainer::new(params, adamw(1e-2), source, loss, steps(250)).unwrap();
        while trainer.step().unwrap().is_some() {}
        let mut random = Random::new(2, "test");
        let examples: Vec<_> = (0..200)
            .map(|_| task.get().sample(3, &mut random))
            .collect();
        let inputs: Vec<Vec<f32>> = examples.iter().map(|e| e.inputs.clone()).collect();
        let answers = model.answer(&inputs, 1, Rule::Free, 1, 3).unwrap();
        let right = examples
            .iter()
            .zip(&answers)
            .filter(|(e, a)| e.answer == a.indices)
            .count();
        assert!(right > 150, "{config:?}: {right} of 200");
    }
    // What cannot end has no end.
    let fixed = PointingConfig::Fixed {
        hidden: 4,
        init: 0.1,
        attention: true,
        n: 3,
    };
    assert!(PointingModel::new(&fixed, 1, false, &store(0).root()).is_err());
    assert!(PointingSource::new(task, (3, 2), 1, 0, "x").is_err());
}

#[test]
fn sources_go_on_where_they_were() {
    fn check<S: Source>(mut source: S, mut again: S)
    where
        S::Batch: PartialEq + std::fmt::Debug,
    {
        source.next(3).unwrap();
        let state = source.state();
        let expected = source.next(4).unwrap();
        again.load(&state).unwrap();
        let mut found = again.next(2).unwrap();
        found.extend(again.next(2).unwrap());
        assert_eq!(found, expected);
        assert!(again.load(&serde_json::json!("x")).is_err());
    }
    let sets: Vec<Vec<u32>> = (0..7).map(|k| vec![k, k + 1]).collect();
    let make = || SetSource::new(sets.clone(), 3, 5).unwrap();
    check(make(), make());
    // Every set once an epoch.
    let mut seen: Vec<u32> = SetSource::new(sets.clone(), 1, 5)
        .unwrap()
        .next(7)
        .unwrap()
        .iter()
        .map(|batch| batch.values[0][0])
        .collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..7).collect::<Vec<_>>());
    let task = PointingTask::Sort(SortSet::default());
    let make = || PointingSource::new(task.clone(), (1, 6), 4, 5, "x").unwrap();
    check(make(), make());
    let sort = HintedSort {
        sort: Sort { values: 9 },
    };
    let hint = Some((Hint::Count, Mixing::Mix { share: 0.5 }));
    let make = || HintSource::new(sort.clone(), hint, (1, 6), 4, 5).unwrap();
    check(make(), make());
    let wrong = Some((Hint::Count, Mixing::Mix { share: 1.5 }));
    assert!(HintSource::new(sort, wrong, (1, 6), 4, 5).is_err());
}

#[test]
fn a_hint_without_weight_is_no_hint_bit_for_bit() {
    let sort = HintedSort {
        sort: Sort { values: 9 },
    };
    let run = |hint: Option<(Hint, Mixing)>| {
        let params = store(3);
        let config = TemperedConfig {
            d_model: 16,
            heads: 2,
            ..TemperedConfig::default()
        };
        let model = TemperedDecoder::new(&config, sort.vocab_size(), 2, &params.root()).unwrap();
        let source = HintSource::new(sort.clone(), hint, (1, 5), 8, 3).unwrap();
        let loss = Hinting::new(Arc::new(model));
        let mut trainer =
            Trainer::new(params.clone(), adamw(1e-2), source, loss, steps(12)).unwrap();
        let mut losses = Vec::new();
        while let Some(event) = trainer.step().unwrap() {
            losses.push(event.loss.to_bits());
        }
        let weights: Vec<Vec<f32>> = params
            .list()
            .iter()
            .map(|(_, p)| p.var.flatten_all().unwrap().to_vec1::<f32>().unwrap())
            .collect();
        (losses, weights)
    };
    let none = run(None);
    assert_eq!(
        run(Some((Hint::Successor, Mixing::Sum { weight: 0.0 }))),
        none
    );
    assert_ne!(
        run(Some((Hint::Successor, Mixing::Sum { weight: 1.0 }))).1,
        none.1
    );
}

#[test]
fn only_answers_are_targets_and_short_lists_are_learned() {
    let sort = HintedSort {
        sort: Sort { values: 6 },
    };
    let mut random = Random::new(1, "examples");
    let examples: Vec<_> = (1..6)
        .map(|n| (n, sort.sort.sample(n, &mut random)))
        .collect();
    let batch = TaskBatch::new(&examples, 0, 1.0);
    let longest = batch.ids[0].len();
    let mut answers = Vec::new();
    for (row, target) in batch.rows.iter().zip(&batch.targets) {
        let (k, t) = (*row as usize / longest, *row as usize % longest);
        let example = &examples[k].1;
        let whole = [&example.prompt[..], &example.answer[..]].concat();
        assert_eq!(whole[t + 1], *target);
        assert_eq!(whole[..=t], batch.ids[k][..=t]);
        answers.push(*target);
    }
    let all: Vec<u32> = examples
        .iter()
        .flat_map(|(_, e)| e.answer.clone())
        .collect();
    assert_eq!(answers, all);
    let params = store(3);
    let config = TemperedConfig {
        d_model: 32,
        heads: 4,
        ..TemperedConfig::default()
    };
    let model = TemperedDecoder::new(&config, sort.vocab_size(), 2, &params.root()).unwrap();
    let model = Arc::new(model);
    let hint = Some((Hint::Successor, Mixing::default()));
    let source = HintSource::new(sort.clone(), hint, (1, 3), 32, 3).unwrap();
    let loss = Hinting::new(model.clone());
    let mut trainer = Trainer::new(params, adamw(3e-3), source, loss, steps(300)).unwrap();
    while trainer.step().unwrap().is_some() {}
    let share = |hint, n| exact(&model, &sort, hint, n, 200, 5).unwrap();
    assert!(share(None, 2) > 0.8, "{}", share(None, 2));
    let hinted = share(Some(Hint::Successor), 2);
    assert!(hinted > 0.8, "{hinted}");
}

#[test]
fn searched_orders_are_learned_and_every_mode_writes_the_set() {
    let star = Star::new(
        &StarConfig {
            variables: 4,
            symbols: 5,
            beta: 3.0,
        },
        1,
    );
    let mut random = Random::new(1, "sets");
    let sets: Vec<Vec<u32>> = (0..400).map(|_| star.sample(&mut random)).collect();
    let config = TaggedConfig {
        symbols: 5,
        places: 4,
        embedding: 16,
        hidden: 24,
    };
    let orders = [
        Order::Fixed(vec![3, 0, 2, 1]),
        Order::Random,
        Order::LogSumExp,
        Order::Search {
            warmup: 2,
            mode: Choose::Sample,
        },
        Order::Search {
            warmup: 0,
            mode: Choose::Greedy,
        },
        Order::Search {
            warmup: 0,
            mode: Choose::Exhaustive,
        },
        Order::Search {
            warmup: 0,
            mode: Choose::Beam(3),
        },
    ];
    for order in orders {
        let params = store(2);
        let model = Arc::new(TaggedLm::new(&config, &params.root()).unwrap());
        let search = OrderSearch::new(model.clone(), order.clone()).unwrap();
        let batch = SetBatch {
            values: sets[..20].to_vec(),
            step: 5,
            draw: 7,
        };
        for (written, values) in search.written(&batch).unwrap().iter().zip(&batch.values) {
            let mut written = written.clone();
            let mut expected: Vec<u32> =
                (0..4).map(|place| model.id(values[place], place)).collect();
            written.sort_unstable();
            expected.sort_unstable();
            assert_eq!(written, expected, "{order:?}");
        }
        if order == Order::LogSumExp {
            // The sum over all orders is the least loss there is.
            let one = OrderSearch::new(model.clone(), Order::Fixed(vec![0, 1, 2, 3])).unwrap();
            assert!(search.mean(&sets, 0).unwrap() < one.mean(&sets, 0).unwrap());
        }
        let before = search.mean(&sets, 1000).unwrap();
        let source = SetSource::new(sets.clone(), 40, 1).unwrap();
        let mut trainer = Trainer::new(params, adamw(1e-2), source, search, steps(60)).unwrap();
        while trainer.step().unwrap().is_some() {}
        let after = trainer.objective.mean(&sets, 1000).unwrap();
        assert!(after < before - 1.5, "{order:?}: {before} to {after}");
        assert_eq!(trainer.objective.weight(&batch), 20.0);
    }
    let model = Arc::new(TaggedLm::new(&config, &store(2).root()).unwrap());
    assert!(OrderSearch::new(model, Order::Fixed(vec![0, 0, 1, 2])).is_err());
}
