//! Goldens of the policies that choose keys by search: Squeezed Attention (14) and HiP (21), with
//! queries and keys given rotated and f32 keys and values.

#[path = "../../../tests/golden.rs"]
mod golden;
mod rig;

use golden::Case;
use longspan_infer::context::hip::{Representative, Share};
use longspan_infer::context::squeezed::kmeans;
use longspan_infer::context::{Hip, HipConfig, Squeezed, SqueezedConfig};
use longspan_infer::kv::KeyForm;
use rig::{Rig, assert_close, token_major};

#[test]
fn hip_selects_and_attends() {
    let cases = golden::cases_of("hip-attention", "select_and_attend");
    for case in &cases {
        for name in case.meta("representatives").as_array().unwrap() {
            run_hip(case, name.as_str().unwrap());
        }
    }
}

fn run_hip(case: &Case, representative: &str) {
    let what = format!("{} {representative}", case.path.display());
    let size = |key: &str| case.meta_usize(key);
    let config = HipConfig {
        k: size("k_mask") as u64,
        beams: 0,
        block_q: size("block_q"),
        block_k: size("block_k") as u64,
        decode_block_k: size("block_k") as u64,
        share: Share::None,
        stride_q: size("stride_q"),
        least_q: 0,
        window: size("window") as u64,
        sinks: size("sinks") as u64,
        representative: match representative {
            "center" => Representative::Center,
            "first" => Representative::First,
            other => panic!("{what}: representative {other}"),
        },
        dense_layers: 0,
        refresh: 1,
        prefill: true,
    };
    let &[heads, queries, dim] = case.shape("q") else {
        panic!("q is [heads, queries, dim]")
    };
    let keys = case.shape("k")[1];
    let rows = |name: &str| token_major(&case.f32(name), heads, dim);
    let (query, key, value) = (rows("q"), rows("k"), rows("v"));
    let want = token_major(&case.f32(&format!("{representative}.out")), heads, dim);
    let want: Vec<f64> = want.into_iter().map(f64::from).collect();
    let (width, before) = (heads * dim, keys - queries);
    let starts = case.i64(&format!("{representative}.block_starts"));
    let columns = case.shape(&format!("{representative}.block_starts"))[2];
    let blocks = queries.div_ceil(config.block_q);
    // Block by block, to look at each choice, and as one call.
    for step in [config.block_q, queries] {
        let mut policy = Hip::new(&config);
        let mut rig = Rig::new(heads, heads, dim, None, &policy);
        if before > 0 {
            let zeros = vec![0.0; before * width];
            let at = ..before * width;
            rig.call(&mut policy, &zeros, &key[at], &value[at], before);
        }
        let mut out = Vec::new();
        for first in (0..queries).step_by(step) {
            let count = step.min(queries - first);
            let at = (before + first) * width..(before + first + count) * width;
            out.extend(rig.call(
                &mut policy,
                &query[first * width..(first + count) * width],
                &key[at.clone()],
                &value[at],
                count,
            ));
            if step == queries {
                continue;
            }
            let block = first / step;
            for head in 0..heads {
                let want: Vec<u64> = starts[(head * blocks + block) * columns..][..columns]
                    .iter()
                    .filter(|&&start| start >= 0)
                    .map(|&start| start as u64)
                    .collect();
                let found = &policy.selected(0)[head];
                assert_eq!(*found, want, "{what}: block {block}, head {head}");
            }
        }
        assert_close(&out, &want, case.tolerance("out").0, &what);
    }
}

/// A three-dimensional part of a golden: `x[layer, head]`, for x [layers, heads, ...].
fn of(x: &[f32], shape: &[usize], layer: usize, head: usize) -> Vec<f32> {
    let size: usize = shape[2..].iter().product();
    x[(layer * shape[1] + head) * size..][..size].to_vec()
}

#[test]
fn squeezed_clusters_as_the_reference_does() {
    for case in golden::cases_of("squeezed-attention", "two_level") {
        let (shape, keys) = (case.shape("keys"), case.f32("keys"));
        let dim = shape[3];
        let n = case.meta_usize("prefix") - case.meta_usize("obs");
        let iterations = case.meta_usize("kmeans_max_iters");
        for layer in 0..shape[0] {
            for head in 0..shape[1] {
                let keys = &of(&keys, shape, layer, head)[..n * dim];
                let part =
                    |name: &str| -> Vec<f32> { of(&case.f32(name), case.shape(name), layer, head) };
                let labels = |name: &str| -> Vec<u32> {
                    let all = case.i64(name);
                    let size = case.shape(name)[2];
                    let at = (layer * shape[1] + head) * size;
                    all[at..at + size].iter().map(|&l| l as u32).collect()
                };
                let run = |rows: &[f32], init: &str| {
                    let points = kmeans::normalised(rows, dim);
                    let first = part(init).into_iter().map(f64::from).collect();
                    kmeans::lloyd(&points, dim, first, iterations)
                };
                let check = |found: &[f32], name: &str| {
                    let want: Vec<f64> = part(name).into_iter().map(f64::from).collect();
                    assert_close(found, &want, case.tolerance("centroids").0, name);
                };
                let flat = run(keys, "kmeans_init.flat");
                assert_eq!(flat, labels("labels.flat"));
                check(
                    &kmeans::means(keys, dim, &flat, case.meta_usize("k_flat")).0,
                    "centroids.flat",
                );
                let fine = run(keys, "kmeans_init.l2");
                assert_eq!(fine, labels("labels.l2"));
                let (centroids, _) = kmeans::means(keys, dim, &fine, case.meta_usize("k_l2"));
                check(&centroids, "centroids.l2");
                let coarse = run(&centroids, "kmeans_init.l1");
                assert_eq!(coarse, labels("labels_l1_of_l2"));
                let composed: Vec<u32> = fine.iter().map(|&l| coarse[l as usize]).collect();
                assert_eq!(composed, labels("labels.l1"));
                check(
                    &kmeans::means(&centroids, dim, &coarse, case.meta_usize("k_l1")).0,
                    "centroids.l1",
                );
            }
        }
    }
}

struct SqueezedRun {
    policy: Squeezed,
    rig: Rig,
}

/// Reads the prefix of all layers and seals it from the golden's first centres.
fn squeezed(case: &Case, percentile: f64, lower: Option<f64>) -> SqueezedRun {
    let shape = case.shape("keys");
    let (layers, heads, prefix, dim) = (shape[0], shape[1], shape[2], shape[3]);
    let config = SqueezedConfig {
        percentile,
        lower,
        obs: case.meta_usize("obs"),
        iterations: case.meta_usize("kmeans_max_iters"),
        sinks: 0,
        refresh: 1,
        share: Share::None,
        ..SqueezedConfig::default()
    };
    let mut policy = Squeezed::new(&config);
    let mut rig = Rig::new(heads, heads, dim, None, &policy).with_layers(layers);
    for layer in 0..layers {
        let rows = |name: &str| {
            let size = heads * case.shape(name)[2] * dim;
            let layer = &case.f32(name)[layer * size..(layer + 1) * size];
            token_major(layer, heads, dim)
        };
        let (query, key) = (rows("queries_prefix"), rows("keys"));
        let value = &rows("values")[..prefix * heads * dim];
        rig.attend(&mut policy, layer, &query, &key, value, prefix);
    }
    rig.position = prefix;
    let levels = lower.is_some();
    let (k, coarse) = if levels {
        (case.meta_usize("k_l2"), Some(case.meta_usize("k_l1")))
    } else {
        (case.meta_usize("k_flat"), None)
    };
    let first = |layer: usize, head: usize, _: &[f64], count: usize| {
        let name = match (levels, Some(count) == coarse) {
            (false, _) => "kmeans_init.flat",
            (true, false) => "kmeans_init.l2",
            (true, true) => "kmeans_init.l1",
        };
        let init = of(&case.f32(name), case.shape(name), layer, head);
        init.into_iter().map(f64::from).collect()
    };
    let all: Vec<usize> = (0..layers).collect();
    policy
        .seal_from(&all, &mut rig.store, (k, coarse), &first)
        .unwrap();
    SqueezedRun { policy, rig }
}

#[test]
fn squeezed_thresholds_are_those_of_the_calibration() {
    for case in golden::cases_of("squeezed-attention", "two_level") {
        let rtol = case.tolerance("thresholds").1;
        for (index, quantile) in case
            .meta("quantiles")
            .as_array()
            .unwrap()
            .iter()
            .enumerate()
        {
            let quantile = quantile.as_f64().unwrap();
            let flat = squeezed(&case, quantile, None).policy.thresholds().unwrap();
            let both = squeezed(&case, quantile, Some(quantile))
                .policy
                .thresholds()
                .unwrap();
            for (found, name) in [
                (flat.fine, "thresholds.flat"),
                (both.fine, "thresholds.l2"),
                (both.coarse.unwrap(), "thresholds.l1"),
            ] {
                let want = case.f64(name)[index];
                assert!(
                    (f64::from(found) - want).abs() <= rtol * want.abs(),
                    "{name} at {quantile}: {found}, expected {want}"
                );
            }
        }
    }
}

#[test]
fn squeezed_keeps_and_attends() {
    for case in golden::cases_of("squeezed-attention", "two_level") {
        let shape = case.shape("keys").to_vec();
        let (layers, heads, prefix, dim) = (shape[0], shape[1], shape[2], shape[3]);
        let (width, count) = (heads * dim, case.meta_usize("input_len"));
        let n = prefix - case.meta_usize("obs");
        for mode in case.meta("modes").as_array().unwrap() {
            let mode = mode.as_str().unwrap();
            let lower = (mode == "hier").then(|| case.meta_f64("percentile_lower"));
            for phase in case.meta("phases").as_array().unwrap() {
                let phase = phase.as_str().unwrap();
                let percentile = case.meta_f64("percentile");
                let SqueezedRun {
                    mut policy,
                    mut rig,
                } = squeezed(&case, percentile, lower);
                let mut fractions = Vec::new();
                for layer in 0..layers {
                    let rows = |name: &str| {
                        let size = heads * case.shape(name)[2] * dim;
                        let layer = &case.f32(name)[layer * size..(layer + 1) * size];
                        token_major(layer, heads, dim)
                    };
                    let (query, key) = (rows("queries_input"), rows("keys_input"));
                    let value = &rows("values")[prefix * width..];
                    // Decoding: the last input query by itself.
                    let first = if phase == "decode" { count - 1 } else { 0 };
                    if first > 0 {
                        let at = ..first * width;
                        let (q, k, v) = (&query[at], &key[at], &value[at]);
                        rig.attend(&mut policy, layer, q, k, v, first);
                    }
                    let at = first * width..;
                    let (q, k, v) = (&query[at.clone()], &key[at.clone()], &value[at]);
                    let out = rig.attend(&mut policy, layer, q, k, v, count - first);
                    let what = format!("{phase}.{mode}");
                    let name = format!("{what}.out");
                    let size = case.f32(&name).len() / layers;
                    let want = &case.f32(&name)[layer * size..(layer + 1) * size];
                    let want = token_major(want, heads, dim);
                    let want: Vec<f64> = want.into_iter().map(f64::from).collect();
                    assert_close(&out, &want, case.tolerance("out").0, &what);

                    // Slots back to keys: no two keys are alike.
                    let planes = rig
                        .store
                        .key_planes(layer, n as u64, KeyForm::Rotated)
                        .unwrap();
                    for head in 0..heads {
                        let keys = of(&case.f32("keys"), &shape, layer, head);
                        let mut row = vec![0f32; dim];
                        let mut key_of = |slot: u64| {
                            let (page, slot) = rig.store.place(slot);
                            let layout = rig.store.layout();
                            layout.read_key(planes[page], head, slot, &mut row);
                            let found = keys.chunks_exact(dim).position(|key| key == row);
                            found.expect("the store holds the prefix's keys")
                        };
                        let queries: Vec<f32> = q
                            .chunks_exact(width)
                            .flat_map(|row| row[head * dim..(head + 1) * dim].to_vec())
                            .collect();
                        let thresholds = policy.thresholds().unwrap();
                        let clusters = policy.clusters(layer, head).unwrap();
                        let scale = 1.0 / (dim as f32).sqrt();
                        let (kept, _) = clusters.kept(&queries, 1, scale, thresholds);
                        let mut mask = vec![0i64; prefix];
                        mask[n..].fill(1);
                        kept.into_iter()
                            .flatten()
                            .for_each(|slot| mask[key_of(slot)] = 1);
                        let name = format!("{what}.keep");
                        let want = &case.i64(&name)[(layer * heads + head) * prefix..][..prefix];
                        assert_eq!(mask, want, "{what}: layer {layer}, head {head}");
                        fractions.push(mask[..n].iter().sum::<i64>());
                    }
                }
                // One threshold for the whole model: heads keep different shares.
                assert!(fractions.iter().any(|&kept| kept != fractions[0]));
            }
        }
    }
}
