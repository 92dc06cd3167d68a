//! Goldens of LM-Infinite (07) and InfLLM (20): one layer, queries, keys and values given
//! un-rotated, through the same `attend_rows` the engine uses, with f32 keys and values.

#[path = "../../../tests/golden.rs"]
mod golden;

mod rig;

use golden::Case;
use longspan_infer::context::infllm::{Evict, Heads, Question};
use longspan_infer::context::{InfLlm, InfLlmConfig, LmInfinite, LmInfiniteConfig};
use rig::{Rig, assert_close, token_major};

fn run_infllm(case: &Case, compat_overlap: bool) {
    let what = format!(
        "{} ({})",
        case.path.display(),
        if compat_overlap { "compat" } else { "strict" }
    );
    let (heads, kv_heads, dim) = (
        case.meta_usize("num_heads"),
        case.meta_usize("num_kv_heads"),
        case.meta_usize("head_dim"),
    );
    let lru_s = case.meta_str("evict") == "lru-s";
    let config = InfLlmConfig {
        n_init: case.meta_usize("n_init") as u64,
        n_local: Some(case.meta_usize("n_local") as u64),
        block: case.meta_usize("block") as u64,
        topk: case.meta_usize("topk"),
        repr_topk: case.meta_usize("repr_topk"),
        exec_block: case.meta_usize("exc_block"),
        max_cached: case.meta_usize("max_cached"),
        evict: if lru_s { Evict::LruS } else { Evict::Lru },
        decay: if lru_s { case.meta_f64("decay") } else { 0.1 },
        heads: Heads::Shared,
        question: Question::LastAlone,
        chunk: case.meta_usize("exc_block"),
        compat_overlap,
    };
    let mut policy = InfLlm::new(&config, 1 << 20);
    let mut rig = Rig::new(
        heads,
        kv_heads,
        dim,
        Some(case.meta_f64("rope_base")),
        &policy,
    );
    let query = token_major(&case.f32("q"), heads, dim);
    let key = token_major(&case.f32("k"), kv_heads, dim);
    let value = token_major(&case.f32("v"), kv_heads, dim);
    let suffix = if compat_overlap { "compat" } else { "strict" };
    let (mut out, mut picked, mut start) = (Vec::new(), Vec::new(), 0);
    for &count in &case.i64("calls") {
        // Each execution block is handed over by itself, so that its picks can be looked at; the
        // call as a whole must give the same.
        let end = start + count as usize;
        while start < end {
            let n = config.exec_block.min(end - start);
            let (w, kw) = (heads * dim, kv_heads * dim);
            out.extend(rig.call(
                &mut policy,
                &query[start * w..(start + n) * w],
                &key[start * kw..(start + n) * kw],
                &value[start * kw..(start + n) * kw],
                n,
            ));
            picked.push(policy.picked_blocks(0).to_vec());
            start += n;
        }
    }
    let tokens = start;
    let want = case.tensor(&format!("out_{suffix}"));
    let want: Vec<f64> = (0..tokens)
        .flat_map(|t| {
            (0..heads).flat_map(move |h| (0..dim).map(move |d| (h * tokens + t) * dim + d))
        })
        .map(|i| want.values[i])
        .collect();
    assert_close(&out, &want, if compat_overlap { 5e-6 } else { 1e-5 }, &what);
    let selected = case.i64(&format!("selected_{suffix}"));
    let columns = case.shape(&format!("selected_{suffix}"))[1];
    for (index, (picked, want)) in picked.iter().zip(selected.chunks(columns)).enumerate() {
        let want: Vec<usize> = want
            .iter()
            .filter(|&&block| block >= 0)
            .map(|&block| block as usize)
            .collect();
        assert_eq!(*picked, want, "{what}: picks of execution block {index}");
    }
    assert_eq!(
        picked.len(),
        selected.len() / columns.max(1),
        "{what}: number of execution blocks"
    );
    let name = format!("block_repr_{suffix}");
    if case.has(&name) {
        assert_close(
            policy.representatives(0),
            &case.f64(&name),
            1e-5,
            &format!("{what}: representatives"),
        );
    }
    if compat_overlap {
        let want: Vec<usize> = case
            .i64("cached_blocks")
            .iter()
            .map(|&block| block as usize)
            .collect();
        assert_eq!(policy.cached_blocks(0), want, "{what}: resident blocks");
    }

    // One call as a whole: retrieval is scored ahead for all its blocks, with the same result.
    let mut whole = InfLlm::new(&config, 1 << 20);
    let mut rig = Rig::new(
        heads,
        kv_heads,
        dim,
        Some(case.meta_f64("rope_base")),
        &whole,
    );
    let (mut again, mut start) = (Vec::new(), 0);
    for &count in &case.i64("calls") {
        let n = count as usize;
        let (w, kw) = (heads * dim, kv_heads * dim);
        again.extend(rig.call(
            &mut whole,
            &query[start * w..(start + n) * w],
            &key[start * kw..(start + n) * kw],
            &value[start * kw..(start + n) * kw],
            n,
        ));
        start += n;
    }
    assert_close(
        &again,
        &out.iter().map(|&x| x as f64).collect::<Vec<_>>(),
        1e-6,
        &format!("{what}: whole calls"),
    );
}

#[test]
fn infllm_streams() {
    let cases = golden::cases_of("infllm", "stream");
    assert!(!cases.is_empty());
    for case in &cases {
        run_infllm(case, true);
        run_infllm(case, false);
    }
}

#[test]
fn lm_infinite_lambda_attention() {
    let cases = golden::cases_of("lm-infinite", "lambda_attention");
    assert!(!cases.is_empty());
    for case in &cases {
        for name in case.meta("cases").as_array().unwrap() {
            let name = name.as_str().unwrap();
            let config = LmInfiniteConfig {
                local: Some(case.meta_usize(&format!("{name}.local")) as u64),
                global: case.meta_usize(&format!("{name}.global")) as u64,
                limit: case
                    .meta
                    .get(&format!("{name}.limit"))
                    .and_then(serde_json::Value::as_u64),
                ..LmInfiniteConfig::default()
            };
            lm_infinite(
                case,
                &format!("{name}."),
                &config,
                case.meta_usize(&format!("{name}.first_query_pos")),
            );
        }
    }
}

#[test]
fn lm_infinite_rereads_the_middle() {
    let cases = golden::cases_of("lm-infinite", "topk_middle");
    assert!(!cases.is_empty());
    for case in &cases {
        let config = LmInfiniteConfig {
            local: Some(case.meta_usize("local") as u64),
            global: case.meta_usize("global") as u64,
            limit: case.meta.get("limit").and_then(serde_json::Value::as_u64),
            top_k: case.meta_usize("top_k"),
            insert_at: Some(case.meta_usize("insert_at") as u64),
            top_k_from_layer: 0,
        };
        lm_infinite(case, "", &config, case.meta_usize("first_query_pos"));
    }
}

/// Feeds the keys before the queries with dummy queries, then the queries; batch rows one by one.
fn lm_infinite(case: &Case, prefix: &str, config: &LmInfiniteConfig, first: usize) {
    let name = |tensor: &str| format!("{prefix}{tensor}");
    let &[batch, heads, queries, dim] = case.shape(&name("q")) else {
        panic!("q has four dimensions")
    };
    let keys = case.shape(&name("k"))[2];
    let (q, k, v) = (
        case.f32(&name("q")),
        case.f32(&name("k")),
        case.f32(&name("v")),
    );
    let want = case.f64(&name("out64"));
    assert_eq!(first + queries, keys);
    for row in 0..batch {
        let part = |x: &[f32], tokens: usize| {
            let size = heads * tokens * dim;
            token_major(&x[row * size..(row + 1) * size], heads, dim)
        };
        let (query, key, value) = (part(&q, queries), part(&k, keys), part(&v, keys));
        let want64 = &want[row * heads * queries * dim..(row + 1) * heads * queries * dim];
        let want: Vec<f64> = (0..queries)
            .flat_map(|t| {
                (0..heads).flat_map(move |h| (0..dim).map(move |d| (h * queries + t) * dim + d))
            })
            .map(|i| want64[i])
            .collect();
        let width = heads * dim;
        // As one call, and for several queries also split: chunks must not change results.
        for pieces in [
            vec![queries],
            vec![1; queries],
            vec![queries / 3, queries - queries / 3],
        ] {
            if config.top_k > 0 && pieces != [1] {
                continue;
            }
            let mut policy = LmInfinite::new(config, 1 << 20);
            let mut rig = Rig::new(heads, heads, dim, Some(case.meta_f64("rope_base")), &policy);
            if first > 0 {
                rig.call(
                    &mut policy,
                    &vec![0.0; first * width],
                    &key[..first * width],
                    &value[..first * width],
                    first,
                );
            }
            let mut out = Vec::new();
            let mut start = 0;
            for n in pieces {
                let at = (first + start) * width..(first + start + n) * width;
                out.extend(rig.call(
                    &mut policy,
                    &query[start * width..(start + n) * width],
                    &key[at.clone()],
                    &value[at],
                    n,
                ));
                start += n;
            }
            assert_close(
                &out,
                &want,
                2e-6,
                &format!("{} {prefix} row {row}", case.path.display()),
            );
        }
    }
}

#[test]
fn lm_infinite_under_alibi() {
    let cases = golden::cases_of("lm-infinite", "alibi");
    assert!(!cases.is_empty());
    for case in &cases {
        let &[batch, heads, tokens, dim] = case.shape("q") else {
            panic!("q has four dimensions")
        };
        assert_eq!((batch, case.meta_usize("first_query_pos")), (1, 0));
        let config = LmInfiniteConfig {
            local: Some(case.meta_usize("local") as u64),
            global: case.meta_usize("global") as u64,
            ..LmInfiniteConfig::default()
        };
        let [query, key, value] =
            ["q", "k", "v"].map(|name| token_major(&case.f32(name), heads, dim));
        let slopes: Vec<f32> = case.f64("slopes").iter().map(|&x| x as f32).collect();
        let golden = case.f64("out");
        let want: Vec<f64> = (0..tokens)
            .flat_map(|t| (0..heads * dim).map(move |i| ((i / dim) * tokens + t) * dim + i % dim))
            .map(|i| golden[i])
            .collect();
        let width = heads * dim;
        for pieces in [vec![tokens], vec![1; tokens], vec![7, 1, tokens - 8]] {
            let mut policy = LmInfinite::new(&config, 1 << 20);
            let mut rig = Rig::new(heads, heads, dim, None, &policy);
            rig.alibi = Some(slopes.clone());
            let (mut out, mut start) = (Vec::new(), 0);
            for count in pieces {
                let rows = start * width..(start + count) * width;
                let [q, k, v] = [&query, &key, &value].map(|x| &x[rows.clone()]);
                out.extend(rig.call(&mut policy, q, k, v, count));
                start += count;
            }
            assert_close(&out, &want, 2e-6, &case.path.display().to_string());
        }
    }
}
