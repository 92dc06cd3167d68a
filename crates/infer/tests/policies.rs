//! The laws every context policy keeps, on tiny random models with f32 keys and values.

#[path = "../../../tests/golden.rs"]
mod golden;

use candle_core::{DType, Device};
use longspan_infer::context::{
    Call, ColumnSums, ContextConfig, ContextPolicy, H2o, Hip, InfLlm, InfLlmConfig, Keys, LayerAt,
    LmInfinite, LmInfiniteConfig, Plan, PolicySpec, Queries, Sinks, Span, Squeezed, Window,
};
use longspan_infer::engine::Want;
use longspan_infer::kv::KvStore;
use longspan_infer::kv::plane::TierFile;
use longspan_infer::session::{Mode, SessionDir};
use longspan_infer::{Engine, EngineOptions, Sequence};
use longspan_kernels::attention::{KvDtype, Mask};
use longspan_nn::config::ModelConfig;
use longspan_nn::model::{Decoder, Precision};
use longspan_nn::weights::safetensors::HfWeights;
use std::io;
use std::ops::ControlFlow;

const POLICIES: [&str; 18] = [
    "full",
    "window:24",
    "sinks:3,20",
    "lm-infinite:20,3",
    "lm-infinite:local=20,global=3,top_k=2,top_k_from_layer=0",
    "infllm:n_init=4,n_local=16,block=8,topk=2,repr_topk=2,exec_block=8,max_cached=3,chunk=16",
    "sirllm:start=3,recent=4,top=33,decay=0.8",
    "h2o:10,8",
    "h2o:10,8,positions=cache",
    "span:full=top-1,local=window-12,sinks=2",
    "span:full=1+,local=block-prev-10,sinks=1",
    "hip:k=12,block_q=4,block_k=2,decode_block_k=2,share=none,window=6,sinks=2,dense_layers=1,refresh=3",
    "hip:k=12,block_q=4,block_k=2,decode_block_k=4,share=decode,window=6,sinks=2,dense_layers=1,refresh=3",
    "hip:k=12,block_q=4,block_k=3,decode_block_k=5,share=always,window=6,sinks=2,dense_layers=0,refresh=2",
    "squeezed:0.5,clusters=20,obs=8,sinks=0,share=none,refresh=1",
    "squeezed:0.5,clusters=20,obs=8,sinks=2,share=decode,refresh=3",
    "squeezed:0.6,0.4,clusters=20,coarse=6,obs=8",
    "cmr:24,capacity=9,segment=16,keep=0.3,min_relevance=0.5,block=8,sinks=2,delta=4",
];

fn engine(name: &str) -> Engine {
    let folder = golden::root().join("tiny-models").join(name);
    let mut config = ModelConfig::from_hf_file(&folder.join("config.json")).unwrap();
    config.context_length = 256;
    let weights = HfWeights::open(&folder, &config).unwrap();
    let model = Decoder::load(
        &config,
        &weights,
        Precision::Dense(DType::F32),
        &Device::Cpu,
    )
    .unwrap();
    Engine::new(model, format!("tiny {name}")).unwrap()
}

fn options(context: &str) -> EngineOptions {
    EngineOptions {
        kv: KvDtype::F32,
        context: context.parse().unwrap(),
    }
}

fn ids(count: usize, seed: u32, vocab: usize) -> Vec<u32> {
    (0..count as u32)
        .map(|i| {
            (i.wrapping_mul(2_654_435_761)
                .wrapping_add(seed.wrapping_mul(0x9e37_79b9))
                >> 7)
                % vocab as u32
        })
        .collect()
}

/// Reads tokens in pieces and returns the logits of all of them.
fn read(engine: &Engine, sequence: &mut Sequence, tokens: &[u32], piece: usize) -> Vec<f32> {
    tokens
        .chunks(piece)
        .flat_map(|piece| {
            engine
                .forward(&mut [(&mut *sequence, piece)], Want::All)
                .unwrap()
        })
        .collect()
}

fn assert_close(a: &[f32], b: &[f32], tolerance: f32, what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    let worst = a
        .iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    assert!(worst <= tolerance, "{what}: differs by {worst}");
}

#[test]
fn the_engine_matches_transformers_on_every_tiny_model() {
    let cases = golden::cases_of("tiny-models", "forward");
    let mut compared = 0;
    for case in &cases {
        let folder = case.path.parent().unwrap();
        if !folder.join("config.json").exists() {
            continue;
        }
        let engine = engine(folder.file_name().unwrap().to_str().unwrap());
        let tokens: Vec<u32> = case.i64("input_ids").iter().map(|&id| id as u32).collect();
        for piece in [tokens.len(), 7, 1] {
            let mut sequence = engine.sequence(&options("full"), None).unwrap();
            case.assert_within(
                "logits",
                &read(&engine, &mut sequence, &tokens, piece),
                |_, golden| 2e-5 + 1e-5 * golden.abs(),
            );
        }
        compared += 1;
    }
    assert!(compared >= 8);
}

#[test]
fn a_budget_as_long_as_the_text_is_full_attention() {
    for model in ["llama-tied", "qwen2", "gemma3"] {
        let engine = engine(model);
        let tokens = ids(60, 1, engine.model().config().vocab_size);
        let full = read(
            &engine,
            &mut engine.sequence(&options("full"), None).unwrap(),
            &tokens,
            60,
        );
        for context in [
            "window:60",
            "sinks:4,60",
            "lm-infinite:60,4",
            "infllm:n_local=64,n_init=4,block=8,topk=2,exec_block=16,chunk=32",
            "sirllm:top=60",
            "h2o:30,30",
            "h2o:30,30,positions=cache",
            "span:full=bottom-0,local=window-60,sinks=0",
            "span:full=bottom-0,local=block-60,sinks=0",
            "span:full=bottom-9,local=block-1",
            "hip:k=64,block_q=4,window=8,dense_layers=0",
            "cmr:60,segment=16,block=8",
        ] {
            for piece in [60, 1] {
                let found = read(
                    &engine,
                    &mut engine.sequence(&options(context), None).unwrap(),
                    &tokens,
                    piece,
                );
                assert_close(
                    &found,
                    &full,
                    2e-5,
                    &format!("{model} {context} in pieces of {piece}"),
                );
            }
        }
    }
}

#[test]
fn pieces_do_not_change_results() {
    let engine = engine("llama-tied");
    let tokens = ids(100, 2, engine.model().config().vocab_size);
    for context in POLICIES {
        // Retrieval works on blocks of a call; InfLLM promises invariance in multiples of its block.
        let pieces: &[usize] = match context {
            c if c.starts_with("infllm") => &[8, 16, 48],
            c if c.starts_with("hip") => &[4, 16, 48],
            c if c.starts_with("cmr") => &[8, 16],
            c if c.contains("top_k=2") => &[100],
            // These choose what to drop after every call or round.
            c if c.starts_with("sirllm") || c.starts_with("h2o") => continue,
            _ => &[1, 7, 33],
        };
        // CMR's memory is constant within a call of its segment's length.
        let whole = read(
            &engine,
            &mut engine.sequence(&options(context), None).unwrap(),
            &tokens,
            if context.starts_with("cmr") { 16 } else { 100 },
        );
        for &piece in pieces {
            let found = read(
                &engine,
                &mut engine.sequence(&options(context), None).unwrap(),
                &tokens,
                piece,
            );
            assert_close(
                &found,
                &whole,
                5e-5,
                &format!("{context} in pieces of {piece}"),
            );
        }
    }
}

#[test]
fn a_memory_of_every_token_is_full_attention() {
    let context = "cmr:24,1000,segment=1,keep=1,min_relevance=0,decay=1,block=1,sinks=0,layers=0+1,distance=own";
    for model in ["llama-tied", "qwen2"] {
        let engine = engine(model);
        let tokens = ids(90, 1, engine.model().config().vocab_size);
        let run = |context: &str| {
            let mut sequence = engine.sequence(&options(context), None).unwrap();
            (read(&engine, &mut sequence, &tokens, 1), sequence)
        };
        let (full, _) = run("full");
        let (found, sequence) = run(context);
        assert_close(&found, &full, 1e-4, model);
        assert_eq!(sequence.policy().kept().len(), 90 - 24);
        let (window, _) = run("window:24");
        let off = |a: &[f32], b: &[f32]| a.iter().zip(b).any(|(a, b)| (a - b).abs() > 1e-3);
        assert!(off(&window, &full), "{model}: the memory had nothing to do");
    }
}

#[test]
fn forks_and_returns_replay_bit_for_bit() {
    for model in ["llama-tied", "gemma3"] {
        let engine = engine(model);
        let vocab = engine.model().config().vocab_size;
        let (head, a, b) = (ids(70, 3, vocab), ids(20, 4, vocab), ids(20, 5, vocab));
        for context in POLICIES {
            let mut base = engine.sequence(&options(context), None).unwrap();
            read(&engine, &mut base, &head, 16);
            engine.seal(&mut base).unwrap();
            base.commit();
            let fresh = |tail: &[u32]| {
                let mut sequence = engine.sequence(&options(context), None).unwrap();
                read(&engine, &mut sequence, &head, 16);
                engine.seal(&mut sequence).unwrap();
                read(&engine, &mut sequence, tail, 1)
            };
            let (want_a, want_b) = (fresh(&a), fresh(&b));
            let mut fork = base.fork();
            assert_eq!(
                read(&engine, &mut base, &a, 1),
                want_a,
                "{model} {context}: the original"
            );
            assert_eq!(
                read(&engine, &mut fork, &b, 1),
                want_b,
                "{model} {context}: the fork"
            );
            // Back to the commit, then on another way; and back to the middle of that.
            engine.truncate(&mut base, head.len()).unwrap();
            assert_eq!(
                read(&engine, &mut base, &b, 1),
                want_b,
                "{model} {context}: after a return"
            );
            engine.truncate(&mut base, head.len() + 5).unwrap();
            assert_eq!(base.tokens()[head.len()..], b[..5]);
            let want = &want_b[5 * vocab..];
            assert_close(
                &read(&engine, &mut base, &b[5..], 1),
                want,
                2e-5,
                &format!("{model} {context}: replay"),
            );
            if context != "full" {
                let error = engine.truncate(&mut base, 3).unwrap_err().to_string();
                assert!(error.contains("cannot return to 3"), "{error}");
            }
        }
    }
}

#[test]
fn rows_of_a_batch_do_not_touch_each_other() {
    let engine = engine("qwen2");
    let vocab = engine.model().config().vocab_size;
    let texts = [
        ids(50, 6, vocab),
        ids(33, 7, vocab),
        ids(1, 8, vocab),
        ids(64, 9, vocab),
    ];
    for (first, batch) in [
        (2, [0, 1, 2, 3]),
        (2, [3, 1, 0, 2]),
        (5, [1, 2, 0, 3]),
        (7, [0, 1, 2, 3]),
        (10, [1, 3, 2, 0]),
    ] {
        // Mixed policies in one batch, ragged lengths, then one decode step each.
        let mut sequences: Vec<Sequence> = batch
            .iter()
            .map(|&row| {
                engine
                    .sequence(&options(POLICIES[row + first]), None)
                    .unwrap()
            })
            .collect();
        let mut rows: Vec<(&mut Sequence, &[u32])> = sequences
            .iter_mut()
            .zip(batch)
            .map(|(s, row)| (s, &texts[row][..]))
            .collect();
        let together = engine.forward(&mut rows, Want::Last).unwrap();
        for sequence in &mut sequences {
            engine.seal(sequence).unwrap();
        }
        let step = [11u32];
        let mut rows: Vec<(&mut Sequence, &[u32])> =
            sequences.iter_mut().map(|s| (s, &step[..])).collect();
        let stepped = engine.forward(&mut rows, Want::Last).unwrap();
        for (place, &row) in batch.iter().enumerate() {
            let mut alone = engine
                .sequence(&options(POLICIES[row + first]), None)
                .unwrap();
            let want = engine
                .forward(&mut [(&mut alone, &texts[row])], Want::Last)
                .unwrap();
            assert_close(
                &together[place * vocab..(place + 1) * vocab],
                &want,
                2e-5,
                &format!("row {row}"),
            );
            engine.seal(&mut alone).unwrap();
            let want = engine
                .forward(&mut [(&mut alone, &step)], Want::Last)
                .unwrap();
            assert_close(
                &stepped[place * vocab..(place + 1) * vocab],
                &want,
                2e-5,
                &format!("row {row}, decoded"),
            );
        }
    }
}

#[test]
fn evicting_policies_hold_a_flat_number_of_bytes() {
    let engine = engine("llama-tied");
    let vocab = engine.model().config().vocab_size;
    for context in [
        "window:200",
        "sinks:4,200",
        "lm-infinite:200,10",
        "h2o:100,100",
        "h2o:100,100,positions=cache",
        "sirllm:top=250",
        "span:full=bottom-0,local=block-200,sinks=4",
    ] {
        let mut sequence = engine.sequence(&options(context), None).unwrap();
        let chunk = sequence.spec().chunk;
        let mut peak = 0;
        for step in 0..100 {
            for piece in ids(1000, step, vocab).chunks(chunk) {
                engine
                    .forward(&mut [(&mut sequence, piece)], Want::Nothing)
                    .unwrap();
            }
            if step == 0 {
                peak = sequence.kv_bytes().memory;
                assert!(peak > 0);
            }
        }
        assert_eq!(sequence.len(), 100_000);
        let per_page = 3 * 2 * 64 * 64 * 4 * 8;
        assert!(
            sequence.kv_bytes().memory <= peak + per_page,
            "{context}: {} bytes, {peak} after the first call",
            sequence.kv_bytes().memory
        );
    }
}

/// Checks every plan: no (query, key) pair twice, none from the future.
struct Checked<P>(P, u64);

impl<P: ContextPolicy + Clone + 'static> ContextPolicy for Checked<P> {
    fn spec(&self) -> PolicySpec {
        self.0.spec()
    }

    fn begin_call(&mut self, call: &Call<'_>, store: &mut KvStore) -> io::Result<()> {
        self.0.begin_call(call, store)
    }

    fn block(&self, at: LayerAt) -> usize {
        self.0.block(at)
    }

    fn begin_layer(
        &mut self,
        at: LayerAt,
        queries: &Queries<'_>,
        store: &mut KvStore,
    ) -> io::Result<()> {
        self.0.begin_layer(at, queries, store)
    }

    fn plan(
        &mut self,
        at: LayerAt,
        queries: &Queries<'_>,
        store: &mut KvStore,
    ) -> io::Result<Plan> {
        let plan = self.0.plan(at, queries, store)?;
        for query in at.start..at.end() {
            for head in 0..queries.num_heads {
                let mut seen = vec![0u8; at.end() as usize];
                for part in &plan.parts {
                    let ranges = match &part.keys {
                        Keys::Shared(ranges) => ranges,
                        // A list for each query head, or for each kv head.
                        Keys::PerQueryHead(lists) => &lists[head * lists.len() / queries.num_heads],
                        Keys::Gathered(gathered) => {
                            &gathered.tokens[head * gathered.tokens.len() / queries.num_heads]
                        }
                    };
                    for key in ranges.iter().cloned().flatten() {
                        let visible = match part.mask {
                            Mask::All => true,
                            Mask::Causal => key <= query,
                            Mask::Window(w) => key <= query && query - key < w,
                            Mask::Beyond(w) => key <= query && query - key >= w,
                        };
                        if visible {
                            assert!(key <= query, "query {query} sees key {key} of its future");
                            seen[key as usize] += 1;
                        }
                    }
                }
                assert!(
                    seen.iter().all(|&times| times <= 1),
                    "query {query} sees a key twice"
                );
                assert_eq!(seen[query as usize], 1, "query {query} does not see itself");
                let must = (query + 1).saturating_sub(self.1)..=query;
                assert!(
                    must.clone().all(|key| seen[key as usize] == 1),
                    "query {query} misses keys of its window {must:?}"
                );
            }
        }
        Ok(plan)
    }

    fn observe(
        &mut self,
        at: LayerAt,
        sums: &[Option<ColumnSums>],
        store: &mut KvStore,
    ) -> io::Result<()> {
        self.0.observe(at, sums, store)
    }

    fn fork(&self) -> Box<dyn ContextPolicy> {
        Box::new(Checked(self.0.clone(), self.1))
    }
}

#[test]
fn plans_are_causal_and_disjoint() {
    let run = |policy: &mut dyn ContextPolicy, calls: &[usize]| {
        let layout = longspan_kernels::attention::KvLayout {
            num_kv_heads: 1,
            head_dim: 8,
            dtype: KvDtype::F32,
        };
        let spec = policy.spec();
        let mut store = KvStore::new(layout, 1, spec.raw_keys, spec.first_page, None);
        let layers = [0];
        let shape = longspan_infer::attend::LayerShape {
            layer: 0,
            num_heads: 2,
            scale: 0.3,
            softcap: None,
            sliding_window: None,
        };
        let mut state = 5u32;
        for (number, &count) in calls.iter().enumerate() {
            let mut random = |n: usize| -> Vec<f32> {
                (0..n)
                    .map(|_| {
                        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
                    })
                    .collect()
            };
            let (q, k, v) = (random(count * 16), random(count * 8), random(count * 8));
            let mut out = vec![0f32; count * 16];
            let call = Call {
                tokens: count,
                // A question after the first call: policies that index a prefix do it then.
                round: (number > 0).then_some(count),
                layers: &layers,
            };
            policy.begin_call(&call, &mut store).unwrap();
            let mut rows = [longspan_infer::attend::Row {
                store: &mut store,
                policy: &mut *policy,
                rope: None,
                tables: (&[], &[]),
                count,
            }];
            let rows_of = |data, stride| longspan_infer::kv::Rows { data, stride };
            longspan_infer::attend::attend_rows(
                shape,
                &mut rows,
                rows_of(&q, 16),
                rows_of(&k, 8),
                rows_of(&v, 8),
                &mut out,
            )
            .unwrap();
            assert!(out.iter().all(|x| x.is_finite()));
        }
    };
    for calls in [
        &[90, 1, 1, 13, 1][..],
        &[1, 2, 3, 4, 5, 60, 7, 1, 1, 40],
        &[17; 9],
    ] {
        run(&mut Checked(Window::new(11), 11), calls);
        run(&mut Checked(Sinks::new(3, 9), 9), calls);
        for top_k in [0, 2] {
            let config = LmInfiniteConfig {
                local: Some(10),
                global: 4,
                top_k,
                top_k_from_layer: 0,
                ..Default::default()
            };
            run(&mut Checked(LmInfinite::new(&config, 64), 10), calls);
        }
        for heads in ["shared", "per-query-head"] {
            let text = format!(
                "infllm:n_init=5,n_local=12,block=4,topk=2,repr_topk=2,exec_block=6,max_cached=2,chunk=12,heads={heads}"
            );
            let Ok(ContextConfig::InfLlm(config)) = text.parse() else {
                panic!("{text}")
            };
            run(&mut Checked(InfLlm::new(&config, 64), 12), calls);
        }
        // Positions are slots there; a query sees all of them.
        for text in ["h2o:5,6", "h2o:5,6,positions=cache"] {
            let Ok(ContextConfig::H2o(config)) = text.parse() else {
                panic!("{text}")
            };
            run(&mut Checked(H2o::new(&config, 64), 11), calls);
        }
        for text in [
            "span:full=bottom-0,local=window-9,sinks=3",
            "span:full=bottom-0,local=block-9,sinks=3",
            "span:full=bottom-0,local=block-prev-6,sinks=2",
        ] {
            let Ok(ContextConfig::Span(config)) = text.parse() else {
                panic!("{text}")
            };
            run(&mut Checked(Span::new(&config), 1), calls);
        }
        for text in [
            "hip:k=12,block_q=4,block_k=3,decode_block_k=3,share=none,window=6,sinks=2,dense_layers=0,refresh=3",
            "hip:k=12,block_q=4,block_k=3,decode_block_k=5,share=always,window=6,sinks=2,dense_layers=0,refresh=3",
            "hip:k=8,block_q=8,block_k=2,window=5,sinks=0,dense_layers=0,refresh=1",
        ] {
            let Ok(ContextConfig::Hip(config)) = text.parse() else {
                panic!("{text}")
            };
            run(&mut Checked(Hip::new(&config), config.window), calls);
        }
        for text in [
            "squeezed:0.5,obs=4,clusters=20,sinks=0,share=none,refresh=1",
            "squeezed:0.5,obs=4,clusters=20,sinks=3,share=always,refresh=2",
            "squeezed:0.5,0.3,obs=4,clusters=40,coarse=9",
        ] {
            let Ok(ContextConfig::Squeezed(config)) = text.parse() else {
                panic!("{text}")
            };
            run(&mut Checked(Squeezed::new(&config), 4), calls);
        }
    }
}

#[test]
fn a_prefix_squeezed_by_nothing_is_full_attention() {
    let engine = engine("llama-tied");
    let vocab = engine.model().config().vocab_size;
    let (head, tail) = (ids(120, 13, vocab), ids(20, 14, vocab));
    let run = |context: &str| {
        let mut sequence = engine.sequence(&options(context), None).unwrap();
        read(&engine, &mut sequence, &head, 50);
        engine.seal(&mut sequence).unwrap();
        let mut out = read(&engine, &mut sequence, &tail[..15], 15);
        out.extend(read(&engine, &mut sequence, &tail[15..], 1));
        (out, sequence.report())
    };
    let (want, _) = run("full");
    for context in [
        "squeezed:0",
        "squeezed:0,0,clusters=30,coarse=8,obs=9",
        // Every key its own cluster.
        "squeezed:0,clusters=100,obs=20",
    ] {
        let (found, report) = run(context);
        assert_close(&found, &want, 2e-5, context);
        assert!(report.taken == report.offered && report.taken > 0);
    }
    let (_, report) = run("squeezed:0.8,obs=20,clusters=20");
    let share = report.taken as f64 / report.offered as f64;
    assert!(
        (0.02..0.6).contains(&share),
        "{share} of the keys were taken"
    );
}

#[test]
fn tiers_and_cache_sizes_never_change_outputs() {
    let engine = engine("llama-untied");
    let tokens = ids(400, 10, engine.model().config().vocab_size);
    let context = |block: u64, max_cached: usize| {
        let config = InfLlmConfig {
            n_init: 4,
            n_local: Some(32),
            block,
            topk: 2,
            repr_topk: 2,
            exec_block: 16,
            max_cached,
            chunk: 32,
            ..Default::default()
        };
        EngineOptions {
            kv: KvDtype::F32,
            context: ContextConfig::InfLlm(config),
        }
    };
    let folder = tempfile::tempdir().unwrap();
    for block in [8, 64] {
        let want = read(
            &engine,
            &mut engine.sequence(&context(block, 1000), None).unwrap(),
            &tokens,
            32,
        );
        for max_cached in [2, 4] {
            let tier =
                TierFile::create(&folder.path().join(format!("{block}-{max_cached}"))).unwrap();
            let mut sequence = engine
                .sequence(&context(block, max_cached), Some(tier))
                .unwrap();
            assert_eq!(
                read(&engine, &mut sequence, &tokens, 32),
                want,
                "block {block}, max_cached {max_cached}"
            );
            let bytes = sequence.kv_bytes();
            assert!(bytes.disk > 0, "block {block}: nothing went to disk");
            assert!(sequence.report().blocks > 0 && sequence.report().loads > 0);
        }
    }
}

#[test]
fn a_saved_session_goes_on_bit_for_bit() {
    let engine = engine("qwen3");
    let vocab = engine.model().config().vocab_size;
    let (head, tail) = (ids(90, 11, vocab), ids(30, 12, vocab));
    let folder = tempfile::tempdir().unwrap();
    for (index, context) in POLICIES.iter().enumerate() {
        let directory = SessionDir::new(folder.path().join(index.to_string()));
        let mut sequence = engine
            .sequence(&options(context), Some(directory.create().unwrap()))
            .unwrap();
        read(&engine, &mut sequence, &head, 16);
        engine.seal(&mut sequence).unwrap();
        directory
            .save(&engine, &sequence, serde_json::json!({ "n": index }))
            .unwrap();
        let want = read(&engine, &mut sequence, &tail, 1);
        for mode in [Mode::Read, Mode::Resume] {
            let (mut restored, header) = directory.load(&engine, mode).unwrap();
            assert_eq!(header.note["n"], index);
            assert_eq!(restored.tokens(), head);
            assert_eq!(
                read(&engine, &mut restored, &tail, 1),
                want,
                "{context} {mode:?}"
            );
        }
        // Saved again after going on, it is the longer one.
        directory
            .save(&engine, &sequence, serde_json::Value::Null)
            .unwrap();
        assert_eq!(
            directory.load(&engine, Mode::Read).unwrap().0.len(),
            120,
            "{context}"
        );
    }
}

#[test]
fn damaged_sessions_are_refused_with_the_file_and_the_reason() {
    let engine = engine("llama-tied");
    let folder = tempfile::tempdir().unwrap();
    let directory = SessionDir::new(folder.path().join("s"));
    let mut sequence = engine.sequence(&options("full"), None).unwrap();
    read(
        &engine,
        &mut sequence,
        &ids(100, 1, engine.model().config().vocab_size),
        50,
    );
    directory
        .save(&engine, &sequence, serde_json::Value::Null)
        .unwrap();
    let index = directory.path().join("index");
    let whole = std::fs::read(&index).unwrap();
    let load = |mode| {
        directory
            .load(&engine, mode)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };

    for cut in [0, 5, 16, 30, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&index, &whole[..cut]).unwrap();
        let error = load(Mode::Read);
        assert!(error.contains("index"), "cut at {cut}: {error}");
    }
    for at in (0..whole.len()).step_by(61) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x40;
        std::fs::write(&index, &bytes).unwrap();
        assert!(load(Mode::Read).contains("index"), "byte {at}");
    }
    std::fs::write(&index, &whole).unwrap();

    let other = self::engine("llama-untied");
    assert!(
        directory
            .load(&other, Mode::Read)
            .map(|_| ())
            .unwrap_err()
            .to_string()
            .contains("belongs to the model")
    );

    // A damaged page is found when it is first read.
    let hot = directory.path().join("hot-1");
    let mut bytes = std::fs::read(&hot).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&hot, &bytes).unwrap();
    let (mut restored, _) = directory.load(&engine, Mode::Read).unwrap();
    let error = engine
        .forward(&mut [(&mut restored, &[1])], Want::Last)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("hot-1") && error.contains("checksum"),
        "{error}"
    );
    assert!(
        engine
            .forward(&mut [(&mut restored, &[1])], Want::Last)
            .is_err(),
        "a failed sequence stays refused"
    );
    std::fs::write(&hot, &bytes[..10]).unwrap();
    assert!(load(Mode::Read).contains("truncated"));
}

#[test]
fn prefill_stops_where_asked_and_keeps_what_was_read() {
    let engine = engine("llama-tied");
    let tokens = ids(120, 1, engine.model().config().vocab_size);
    let context = POLICIES[5];
    let mut sequence = engine.sequence(&options(context), None).unwrap();
    let mut calls = 0;
    let result = engine.prefill(&mut sequence, &tokens, &mut |_, _| {
        calls += 1;
        Ok(if calls == 3 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        })
    });
    assert!(result.unwrap_err().to_string().contains("48 of 120"));
    assert_eq!(sequence.tokens(), &tokens[..48]);
    let rest = engine
        .prefill(&mut sequence, &tokens[48..], &mut |_, _| {
            Ok(ControlFlow::Continue(()))
        })
        .unwrap();
    let mut fresh = engine.sequence(&options(context), None).unwrap();
    let want = engine
        .prefill(&mut fresh, &tokens, &mut |_, _| {
            Ok(ControlFlow::Continue(()))
        })
        .unwrap();
    assert_eq!(rest, want);
}

#[test]
fn kept_prefixes_are_found_and_cut() {
    let engine = engine("llama-tied");
    let vocab = engine.model().config().vocab_size;
    let (head, a, b) = (ids(60, 3, vocab), ids(20, 4, vocab), ids(20, 5, vocab));
    let mut cache = longspan_infer::prefix::PrefixCache::new(1 << 30);
    for (context, whole) in [("full", true), ("window:24", false)] {
        let mut first = engine.sequence(&options(context), None).unwrap();
        let text = [&head[..], &a].concat();
        read(&engine, &mut first, &text, 16);
        cache.keep(first);
        let same = |kept: &Sequence| kept.options().context == options(context).context;
        let other = [&head[..], &b].concat();
        let found = cache.find(&engine, &other, same).unwrap();
        assert_eq!(
            found.as_ref().map(Sequence::len),
            whole.then_some(60),
            "{context}"
        );
        let longer = [&text[..], &b].concat();
        let mut found = cache.find(&engine, &longer, same).unwrap().unwrap();
        assert_eq!(found.len(), 80);
        let mut fresh = engine.sequence(&options(context), None).unwrap();
        read(&engine, &mut fresh, &text, 16);
        assert_eq!(
            read(&engine, &mut found, &b, 1),
            read(&engine, &mut fresh, &b, 1),
            "{context}"
        );
    }
    let mut small = longspan_infer::prefix::PrefixCache::new(10);
    let mut sequence = engine.sequence(&options("full"), None).unwrap();
    read(&engine, &mut sequence, &head, 60);
    small.keep(sequence);
    assert!(small.is_empty());
}
