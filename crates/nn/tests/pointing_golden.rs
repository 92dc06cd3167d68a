//! Pointer networks and read-process-write: goldens, gradients, laws of decoding (papers 39, 08).

mod close;
#[path = "../../../tests/golden.rs"]
mod golden;

use candle_core::{DType, Device, Tensor};
use close::{difference, flat, tensor};
use golden::Case;
use longspan_data::random::Random;
use longspan_data::task::geometry::delaunay::{by_incenter, delaunay};
use longspan_data::task::geometry::exact::Point;
use longspan_data::task::geometry::hull::{convex_hull, signed_area};
use longspan_data::task::geometry::tsp::{held_karp, nearest_neighbour, tour_length};
use longspan_kernels::autograd::gradient_error;
use longspan_nn::model::pointer::{FixedSeq2Seq, Rule, Sets};
use longspan_nn::model::set2set::{Carry, Similarity, WriteBlock};
use longspan_nn::model::tagged::permutations;
use longspan_nn::model::tempered::tempered_attention;
use longspan_nn::model::{
    Choose, PtrNet, PtrNetConfig, Set2Seq, Set2SeqConfig, Set2Set, Set2SetConfig, TaggedConfig,
    TaggedLm, Temper, TemperedConfig, TemperedDecoder,
};
use longspan_nn::params::ParamStore;
use std::collections::HashMap;

fn store(case: &Case) -> ParamStore {
    let tensors = case
        .tensors
        .keys()
        .filter_map(|name| Some((name.strip_prefix("param.")?.to_string(), tensor(case, name))));
    ParamStore::from_tensors(tensors.collect(), DType::F32, &Device::Cpu)
}

/// Rows [batch][steps] of an integer tensor.
fn rows(case: &Case, name: &str) -> Vec<Vec<i64>> {
    let width = *case.shape(name).last().unwrap();
    case.i64(name).chunks(width).map(<[i64]>::to_vec).collect()
}

fn unpadded(row: &[i64], pad: i64) -> Vec<usize> {
    row.iter()
        .filter(|&&v| v != pad)
        .map(|&v| v as usize)
        .collect()
}

#[test]
fn hulls_triangulations_and_tours_are_those_of_the_goldens() {
    for case in &golden::cases_of("pointer-networks", "geometry") {
        let (n, pad) = (case.meta_usize("n"), case.meta_f64("pad") as i64);
        assert_eq!(case.meta_usize("index_base"), 0);
        let coordinates = case.f64("in.points");
        let sets: Vec<Vec<Point>> = coordinates
            .chunks(2 * n)
            .map(|set| set.chunks(2).map(|p| [p[0], p[1]]).collect())
            .collect();
        let (hulls, width) = (
            rows(case, "out.hull_ccw_from_smallest_index"),
            case.shape("out.delaunay_by_incenter")[1] * 3,
        );
        let (mut areas, mut near) = (Vec::new(), Vec::new());
        for (k, points) in sets.iter().enumerate() {
            let hull = convex_hull(points);
            assert_eq!(hull, unpadded(&hulls[k], pad), "{:?} set {k}", case.path);
            areas.push(signed_area(points, &hull));
            let triangles = delaunay(points);
            let stated = |name: &str| unpadded(&case.i64(name)[k * width..][..width], pad);
            assert_eq!(triangles.concat(), stated("out.delaunay_lexicographic"));
            let ordered = by_incenter(points, &triangles).concat();
            assert_eq!(ordered, stated("out.delaunay_by_incenter"));
            near.push(tour_length(points, &nearest_neighbour(points)));
            if case.meta("tsp").as_bool().unwrap() {
                let tour = held_karp(points).unwrap();
                let stated = unpadded(&rows(case, "out.tsp_optimal_tour")[k], pad);
                let length = case.f64("out.tsp_optimal_length")[k];
                assert!((tour_length(points, &tour) - length).abs() < 1e-9);
                assert_eq!(tour, stated, "{:?} set {k}", case.path);
            }
        }
        case.assert_within("out.hull_area", &areas, |_, _| 1e-9);
        case.assert_within("out.nearest_neighbour_tour_length", &near, |_, _| 1e-9);
    }
}

#[test]
fn pointer_network_has_the_logits_of_the_golden() {
    for case in &golden::cases_of("pointer-networks", "ptrnet_forward") {
        let config = PtrNetConfig {
            hidden: case.meta_usize("hidden"),
            ..PtrNetConfig::default()
        };
        assert_eq!(case.meta_usize("end_index"), 0);
        let store = store(case);
        let net = PtrNet::new(&config, 2, &store.root()).unwrap();
        let points = case.f32("in.points");
        let batch = case.shape("in.points")[0];
        let rows_of: Vec<&[f32]> = points.chunks(points.len() / batch).collect();
        let sets = Sets::new(&rows_of, 2, net.like()).unwrap();
        case.assert_close("out.encoder", &flat(&net.encode(&sets).unwrap().0));
        let targets = rows(case, "in.target");
        let reading = net.read(&sets).unwrap();
        let logits = net.decoder().logits(&reading, &targets).unwrap();
        case.assert_close("out.logits", &flat(&logits));
        let nll = net.decoder().nll(&reading, &targets).unwrap();
        case.assert_close("out.nll", &flat(&nll));
        assert_eq!(store.list().len(), 11);
    }
}

#[test]
fn process_and_write_blocks_are_those_of_the_goldens() {
    for case in &golden::cases_of("order-matters", "process_block") {
        assert_eq!(case.meta_str("similarity"), "dot");
        let config = Set2SetConfig {
            d: case.meta_usize("d"),
            steps: case.meta_usize("steps"),
            ..Set2SetConfig::default()
        };
        let store = store(case);
        let block = Set2Set::new(&config, &store.root()).unwrap();
        let sets = case.i64("in.set_index");
        let count = 1 + *sets.iter().max().unwrap() as usize;
        let sizes: Vec<usize> = (0..count)
            .map(|s| sets.iter().filter(|&&x| x == s as i64).count())
            .collect();
        let (stars, attention) = block.trace(&tensor(case, "in.memories"), &sizes).unwrap();
        case.assert_close("out.q_star", &flat(&Tensor::stack(&stars, 0).unwrap()));
        case.assert_close(
            "out.attention",
            &flat(&Tensor::stack(&attention, 0).unwrap()),
        );
    }
    for case in &golden::cases_of("order-matters", "write_block") {
        let (d, n) = (case.meta_usize("d"), case.meta_usize("n"));
        for glimpse in [false, true] {
            let store = store(case);
            let block = WriteBlock::new(d, glimpse, false, &store.root()).unwrap();
            let memories = tensor(case, "in.memories");
            let batch = memories.dim(0).unwrap();
            let mask = Tensor::zeros((batch, n), DType::F32, &Device::Cpu).unwrap();
            let star = tensor(case, "in.q_star");
            let reading = block.read(&memories, mask, &star, &vec![n; batch]).unwrap();
            let targets = rows(case, "in.target");
            let end = if glimpse { "glimpse" } else { "no_glimpse" };
            let logits = block.decoder().logits(&reading, &targets).unwrap();
            case.assert_close(&format!("out.logits_{end}"), &flat(&logits));
            let nll = block.decoder().nll(&reading, &targets).unwrap();
            let log: Vec<f64> = flat(&nll).iter().map(|v| -v).collect();
            case.assert_close(&format!("out.logprob_{end}"), &log);
        }
    }
}

#[test]
fn orders_are_scored_and_searched_as_in_the_golden() {
    for case in &golden::cases_of("order-matters", "order_search") {
        let (places, symbols) = (case.meta_usize("T"), case.meta_usize("V"));
        let config = TaggedConfig {
            symbols,
            places,
            embedding: case.shape("param.emb")[1],
            hidden: case.shape("param.w_o")[1],
        };
        let store = store(case);
        let model = TaggedLm::new(&config, &store.root()).unwrap();
        let orders = rows(case, "in.permutations");
        let (mut full, mut proposal, mut sums) = (Vec::new(), Vec::new(), Vec::new());
        for (k, set) in rows(case, "in.elements").iter().enumerate() {
            let set: Vec<u32> = set.iter().map(|&id| id as u32).collect();
            let written: Vec<Vec<u32>> = orders
                .iter()
                .map(|order| order.iter().map(|&j| set[j as usize]).collect())
                .collect();
            let log = flat(&model.log_probability(&written).unwrap());
            sums.push(log.iter().map(|l| l.exp()).sum::<f64>().ln());
            let shares = model.log_proposal(&written).unwrap();
            let sum: f64 = shares.iter().map(|l| l.exp()).sum();
            assert!((sum - 1.0).abs() < 1e-6, "{sum}");
            let mut random = Random::new(k as u64, "orders");
            let best = case.i64("out.best")[k] as usize;
            let sets = [set.clone()];
            let mut choose = |how: Choose| model.choose(&sets, how, &mut random).unwrap().remove(0);
            assert_eq!(choose(Choose::Exhaustive), written[best]);
            assert_eq!(choose(Choose::Beam(24)), written[best]);
            assert_eq!(choose(Choose::Greedy), choose(Choose::Beam(1)));
            // 20,000 draws against the proposal: chi-square of 23 degrees of freedom, p = 0.001 at 49.7.
            let many = vec![set.clone(); 20_000];
            let drawn = model
                .choose(&many, Choose::Sample, &mut Random::new(3, "draws"))
                .unwrap();
            let chi: f64 = written
                .iter()
                .zip(&shares)
                .map(|(order, share)| {
                    let count = drawn.iter().filter(|d| *d == order).count() as f64;
                    let expected = 20_000.0 * share.exp();
                    (count - expected).powi(2) / expected
                })
                .sum();
            assert!(chi < 49.7, "{chi}");
            full.extend(log);
            proposal.extend(shares);
        }
        case.assert_close("out.logprob", &full);
        case.assert_close("out.ancestral_logprob", &proposal);
        case.assert_close("out.logsumexp", &sums);
        assert_eq!(permutations(&[1, 2, 3, 4, 5]).len(), 120);
        assert!(model.logits(&[vec![(symbols * places) as u32]]).is_err());
    }
}

#[test]
fn sets_do_not_depend_on_order_or_padding() {
    let mut random = Random::new(1, "sets");
    for (similarity, carry) in [
        (Similarity::Dot, Carry::Input),
        (Similarity::Additive, Carry::Hidden),
    ] {
        let config = Set2SetConfig {
            d: 6,
            steps: 4,
            similarity,
            carry,
        };
        let store = ParamStore::new(3, DType::F32, &Device::Cpu);
        let block = Set2Set::new(&config, &store.root()).unwrap();
        let sizes = [3usize, 1, 0, 5];
        let set = |size: usize, random: &mut Random| -> Vec<f32> {
            (0..size * 6).map(|_| random.normal() as f32).collect()
        };
        let sets: Vec<Vec<f32>> = sizes.iter().map(|&n| set(n, &mut random)).collect();
        let memories = |sets: &[Vec<f32>]| {
            let values = sets.concat();
            let n = values.len() / 6;
            Tensor::from_vec(values, (n, 6), &Device::Cpu).unwrap()
        };
        let whole = block.forward(&memories(&sets), &sizes).unwrap();
        for (k, values) in sets.iter().enumerate() {
            if sizes[k] == 0 {
                // An empty set: r = 0.
                let r = flat(&whole.get(k).unwrap())[6..].to_vec();
                assert!(r.iter().all(|&v| v == 0.0));
                continue;
            }
            let alone = memories(std::slice::from_ref(values));
            let (stars, attention) = block.trace(&alone, &sizes[k..=k]).unwrap();
            let last = stars.last().unwrap().get(0).unwrap();
            assert!(difference(&last, &whole.get(k).unwrap()) < 1e-5);
            // In another order.
            let mut order: Vec<usize> = (0..sizes[k]).collect();
            random.shuffle(&mut order);
            let moved: Vec<f32> = order
                .iter()
                .flat_map(|&j| values[j * 6..][..6].to_vec())
                .collect();
            let (again, turned) = block.trace(&memories(&[moved]), &sizes[k..=k]).unwrap();
            assert!(difference(&again.last().unwrap().get(0).unwrap(), &last) < 1e-5);
            for (a, b) in attention.iter().zip(&turned) {
                let (a, b) = (flat(a), flat(b));
                assert!((0..sizes[k]).all(|j| (a[order[j]] - b[j]).abs() < 1e-5));
            }
            if sizes[k] == 1 {
                let r = &flat(&last)[6..];
                assert!(
                    r.iter()
                        .zip(values)
                        .all(|(r, &m)| (r - f64::from(m)).abs() < 1e-6)
                );
            }
        }
    }
    // One step of a cell without weights pools the mean.
    let config = Set2SetConfig {
        d: 2,
        steps: 1,
        ..Set2SetConfig::default()
    };
    let zero = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let tensors = HashMap::from([
        ("w_ih".to_string(), zero(&[8, 4])),
        ("w_hh".to_string(), zero(&[8, 2])),
        ("b_ih".to_string(), zero(&[8])),
        ("b_hh".to_string(), zero(&[8])),
    ]);
    let store = ParamStore::from_tensors(tensors, DType::F32, &Device::Cpu);
    let block = Set2Set::new(&config, &store.root()).unwrap();
    let memories = Tensor::new(&[[1f32, 4.0], [3.0, 8.0]], &Device::Cpu).unwrap();
    let star = block.forward(&memories, &[2]).unwrap();
    assert_eq!(flat(&star), [0.0, 0.0, 2.0, 6.0]);
}

/// Models of f64 parameters, made tracked through the gradient check's inputs.
fn check_gradients(
    make: &dyn Fn(&ParamStore) -> candle_core::Result<Tensor>,
    start: &ParamStore,
    at_most: f64,
) {
    make(start).unwrap();
    let names: Vec<String> = start.list().into_iter().map(|(name, _)| name).collect();
    let inputs: Vec<Tensor> = start
        .list()
        .iter()
        .map(|(_, param)| param.var.as_detached_tensor())
        .collect();
    // The store's own variables are what gradients reach: set them to the moved values, and hand their gradients on by a
    // sum that is linear in the given inputs.
    let loss = |values: &[Tensor]| -> f64 {
        let tensors = names.iter().cloned().zip(values.iter().cloned()).collect();
        let store = ParamStore::from_tensors(tensors, DType::F64, &Device::Cpu);
        make(&store).unwrap().to_scalar::<f64>().unwrap()
    };
    let gradients = make(start).unwrap().backward().unwrap();
    let mut worst = 0f64;
    let mut random = Random::new(9, "elements");
    for (k, (name, param)) in start.list().iter().enumerate() {
        let gradient = flat(gradients.get(param.var.as_tensor()).expect(name));
        let scale = gradient.iter().fold(1e-2f64, |m, g| m.max(g.abs()));
        let values = flat(&inputs[k]);
        for _ in 0..6.min(values.len()) {
            let element = random.below(values.len() as u64) as usize;
            let moved = |delta: f64| {
                let mut values = values.clone();
                values[element] += delta;
                let mut all = inputs.clone();
                all[k] = Tensor::from_vec(values, inputs[k].shape(), &Device::Cpu).unwrap();
                loss(&all)
            };
            let numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6;
            worst = worst.max((numeric - gradient[element]).abs() / scale);
        }
    }
    assert!(worst < at_most, "{worst}");
}

fn values(random: &mut Random, count: usize) -> Vec<f32> {
    (0..count).map(|_| random.uniform() as f32).collect()
}

#[test]
fn gradients_of_whole_models_are_those_of_finite_differences() {
    let mut random = Random::new(2, "gradients");
    let (a, b) = (values(&mut random, 8), values(&mut random, 6));
    let targets = vec![vec![2, 4, 1, 0], vec![3, 1, 0, -1]];
    for glimpse in [false, true] {
        let config = PtrNetConfig {
            hidden: 5,
            init: 0.5,
            glimpse,
            ends: true,
        };
        let loss = |store: &ParamStore| {
            let net = PtrNet::new(&config, 2, &store.root())?;
            let sets = Sets::new(&[&a, &b], 2, net.like())?;
            net.decoder().nll(&net.read(&sets)?, &targets)?.sum_all()
        };
        let store = ParamStore::new(4, DType::F64, &Device::Cpu);
        check_gradients(&loss, &store, 1e-6);
        let config = Set2SeqConfig {
            d: 5,
            steps: 3,
            glimpse,
            ends: true,
        };
        let loss = |store: &ParamStore| {
            let net = Set2Seq::new(&config, 2, &store.root())?;
            let sets = Sets::new(&[&a, &b], 2, net.like())?;
            net.decoder().nll(&net.reading(&sets)?, &targets)?.sum_all()
        };
        let store = ParamStore::new(4, DType::F64, &Device::Cpu);
        check_gradients(&loss, &store, 1e-6);
        // The baseline has one length.
        let targets = vec![vec![2, 4, 1, 0], vec![3, 1, 2, 0]];
        let loss = |store: &ParamStore| {
            let net = FixedSeq2Seq::new(5, 0.5, glimpse, 4, 2, &store.root())?;
            let sets = Sets::new(&[&a, &a], 2, net.like())?;
            let logits = net.logits(&sets, Some(&targets), 4)?;
            longspan_nn::model::pointer::masked_nll(&logits, &targets)?.sum_all()
        };
        let store = ParamStore::new(4, DType::F64, &Device::Cpu);
        check_gradients(&loss, &store, 1e-6);
    }
    for temper in [Temper::Affine, Temper::Table { longest: 4 }] {
        let config = TemperedConfig {
            d_model: 8,
            heads: 2,
            temper,
            temper_all: true,
            ..TemperedConfig::default()
        };
        let loss = |store: &ParamStore| {
            let model = TemperedDecoder::new(&config, 7, 1, &store.root())?;
            let ids = [vec![2, 3, 1, 4, 0], vec![5, 1, 6, 6, 2]];
            let logits = model.logits(&ids, &[4, 2], &[1, 2, 7], 0)?;
            // logits are f32: too coarse to difference, so take what the loss is linear in.
            logits.to_dtype(DType::F64)?.sqr()?.sum_all()
        };
        let store = ParamStore::new(4, DType::F64, &Device::Cpu);
        loss(&store).unwrap();
        let gradients = loss(&store).unwrap().backward().unwrap();
        let beta = store
            .list()
            .into_iter()
            .find(|(n, _)| n == "beta")
            .unwrap()
            .1;
        let gradient = flat(gradients.get(beta.var.as_tensor()).unwrap());
        assert!(gradient.iter().any(|g| g.abs() > 1e-3), "{gradient:?}");
    }
    let mut random = Random::new(5, "attention");
    let mut normal = |shape: &[usize]| {
        let count: usize = shape.iter().product();
        let values: Vec<f64> = (0..count).map(|_| random.normal()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let inputs = [
        normal(&[2, 2, 3, 4]),
        normal(&[2, 2, 3, 4]),
        normal(&[2, 2, 3, 4]),
        normal(&[2]),
    ];
    let error = gradient_error(&inputs, 1e-6, &|x| {
        tempered_attention(&x[0], &x[1], &x[2], Some(&x[3]))
    })
    .unwrap();
    assert!(error < 1e-7, "{error}");
}

#[test]
fn padded_batches_are_their_rows_alone() {
    let mut random = Random::new(3, "batches");
    let sizes = [2usize, 5, 4];
    let inputs: Vec<Vec<f32>> = sizes.iter().map(|n| values(&mut random, 2 * n)).collect();
    let targets = [vec![2i64, 0, -1], vec![4, 1, 0], vec![3, 0, -1]];
    let all: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
    let config = PtrNetConfig {
        hidden: 8,
        init: 0.5,
        ..PtrNetConfig::default()
    };
    let store = ParamStore::new(5, DType::F32, &Device::Cpu);
    let net = PtrNet::new(&config, 2, &store.root()).unwrap();
    let config = Set2SeqConfig {
        d: 8,
        ends: true,
        ..Set2SeqConfig::default()
    };
    let store = ParamStore::new(6, DType::F32, &Device::Cpu);
    let set = Set2Seq::new(&config, 2, &store.root()).unwrap();
    let losses = |rows: &[&[f32]], targets: &[Vec<i64>]| {
        let sets = Sets::new(rows, 2, net.like()).unwrap();
        let of_net = net.decoder().nll(&net.read(&sets).unwrap(), targets);
        let of_set = set.decoder().nll(&set.reading(&sets).unwrap(), targets);
        [flat(&of_net.unwrap()), flat(&of_set.unwrap())]
    };
    let together = losses(&all, &targets);
    for row in 0..3 {
        let alone = losses(&all[row..=row], &targets[row..=row]);
        for (both, one) in together.iter().zip(&alone) {
            assert!((both[row] - one[0]).abs() < 1e-5);
        }
    }
    // The set encoder gives the loss of the same answer, whatever the order of the input; the LSTM encoder does not.
    let order = [3usize, 0, 4, 1, 2];
    let moved: Vec<f32> = order
        .iter()
        .flat_map(|&j| inputs[1][2 * j..][..2].to_vec())
        .collect();
    let place = |j: i64| 1 + order.iter().position(|&o| o as i64 == j - 1).unwrap() as i64;
    let there = losses(&[&moved], &[vec![place(4), place(1), 0]]);
    assert!((there[1][0] - together[1][1]).abs() < 1e-5);
    assert!((there[0][0] - together[0][1]).abs() > 1e-5);
    // Targets that are no candidates are refused.
    let sets = Sets::new(&all[..1], 2, net.like()).unwrap();
    assert!(
        net.decoder()
            .nll(&net.read(&sets).unwrap(), &[vec![3]])
            .is_err()
    );
}

#[test]
fn wide_beams_are_exhaustive_and_rules_give_valid_answers() {
    let mut random = Random::new(4, "beams");
    let config = Set2SeqConfig {
        d: 8,
        ..Set2SeqConfig::default()
    };
    let store = ParamStore::new(7, DType::F32, &Device::Cpu);
    let net = Set2Seq::new(&config, 1, &store.root()).unwrap();
    let inputs: Vec<Vec<f32>> = (0..5).map(|_| values(&mut random, 4)).collect();
    let all: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
    let sets = Sets::new(&all, 1, net.like()).unwrap();
    let reading = net.reading(&sets).unwrap();
    let beam = net
        .decoder()
        .decode(&reading, Rule::Permutation, 24, 4)
        .unwrap();
    for (row, found) in beam.iter().enumerate() {
        // All 24 permutations, with the mass of used elements shared by the rest.
        let sets = Sets::new(&all[row..=row], 1, net.like()).unwrap();
        let reading = net.reading(&sets).unwrap();
        let mut best = (f64::NEG_INFINITY, Vec::new());
        for code in 0..256i64 {
            let order: Vec<i64> = (0..4).map(|k| code >> (2 * k) & 3).collect();
            if (0..4).any(|c| !order.contains(&c)) {
                continue;
            }
            let logits = net
                .decoder()
                .logits(&reading, std::slice::from_ref(&order))
                .unwrap();
            let logits = logits.get(0).unwrap().to_vec2::<f32>().unwrap();
            let log: f64 = (0..4)
                .map(|t| {
                    let left = &order[t..];
                    let at = |c: i64| f64::from(logits[t][c as usize]);
                    let sum: f64 = left.iter().map(|&c| at(c).exp()).sum();
                    at(order[t]) - sum.ln()
                })
                .sum();
            if log > best.0 {
                best = (log, order.iter().map(|&c| c as usize).collect());
            }
        }
        assert_eq!(found.indices, best.1);
        assert!((found.log_probability - best.0).abs() < 1e-5);
    }
    // Untrained networks say anything; under a rule their answers are valid all the same.
    let config = PtrNetConfig {
        hidden: 8,
        init: 2.0,
        ..PtrNetConfig::default()
    };
    let store = ParamStore::new(8, DType::F32, &Device::Cpu);
    let net = PtrNet::new(&config, 2, &store.root()).unwrap();
    let sizes = [1usize, 7, 4, 9];
    let inputs: Vec<Vec<f32>> = sizes.iter().map(|n| values(&mut random, 2 * n)).collect();
    let all: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
    let sets = Sets::new(&all, 2, net.like()).unwrap();
    let reading = net.read(&sets).unwrap();
    for width in [1, 3] {
        let free = net
            .decoder()
            .decode(&reading, Rule::Free, width, 12)
            .unwrap();
        assert!(free.iter().all(|answer| answer.indices.len() <= 12));
        let tours = net
            .decoder()
            .decode(&reading, Rule::Tour, width, 12)
            .unwrap();
        let hulls = net
            .decoder()
            .decode(&reading, Rule::NoRepeat { least: 3 }, width, 12)
            .unwrap();
        for (row, &n) in sizes.iter().enumerate() {
            let mut tour = tours[row].indices.clone();
            assert!(tours[row].ended && tour[0] == 0);
            tour.sort_unstable();
            assert_eq!(tour, (0..n).collect::<Vec<_>>());
            let hull = &hulls[row].indices;
            assert!(hull.len() >= n.min(3) && hull.iter().all(|&c| c < n));
            assert!((0..hull.len()).all(|k| !hull[..k].contains(&hull[k])));
        }
    }
    // Pointing grows with its input: 500 points, far more than anything was made for. The baseline refuses.
    let many = values(&mut random, 1000);
    let sets = Sets::new(&[&many], 2, net.like()).unwrap();
    let reading = net.read(&sets).unwrap();
    let answer = net
        .decoder()
        .decode(&reading, Rule::NoRepeat { least: 3 }, 1, 500)
        .unwrap();
    assert!(answer[0].indices.iter().all(|&c| c < 500));
    let store = ParamStore::new(9, DType::F32, &Device::Cpu);
    let fixed = FixedSeq2Seq::new(8, 0.5, true, 10, 2, &store.root()).unwrap();
    let error = fixed.greedy(&sets, 10).unwrap_err().to_string();
    assert!(error.contains("500") && error.contains("10"), "{error}");
}

#[test]
fn a_baseline_reads_its_own_choices_when_nothing_is_shown() {
    let mut random = Random::new(6, "greedy");
    let input = values(&mut random, 10);
    for attention in [false, true] {
        let store = ParamStore::new(9, DType::F32, &Device::Cpu);
        let net = FixedSeq2Seq::new(8, 1.0, attention, 5, 2, &store.root()).unwrap();
        let sets = Sets::new(&[&input], 2, net.like()).unwrap();
        let answer = &net.greedy(&sets, 6).unwrap()[0];
        let mut shown: Vec<i64> = answer.indices.iter().map(|&i| i as i64 + 1).collect();
        if answer.ended {
            shown.push(0);
        }
        let logits = net
            .logits(&sets, Some(&[shown.clone()]), shown.len())
            .unwrap();
        let best = logits.argmax(2).unwrap().get(0).unwrap();
        let best: Vec<i64> = best
            .to_vec1::<u32>()
            .unwrap()
            .iter()
            .map(|&i| i.into())
            .collect();
        assert_eq!(best, shown);
    }
}
