//! Every plan of every policy: no pair of query and key twice, none from the future, none of a window missing.

use longspan_infer::context::{
    Call, ColumnSums, ContextConfig, ContextPolicy, H2o, Hip, InfLlm, Keys, LayerAt, LmInfinite,
    LmInfiniteConfig, Plan, PolicySpec, Queries, Sinks, Span, Squeezed, Window,
};
use longspan_infer::kv::KvStore;
use longspan_kernels::attention::{KvDtype, Mask};
use std::io;

/// Checks every plan: no (query, key) pair twice, none from the future.
struct Checked<P>(P, u64);

impl<P: ContextPolicy> ContextPolicy for Checked<P> {
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
        self.0.fork()
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
            alibi: None,
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
            "hip:k=12,beams=0,block_q=4,block_k=3,decode_block_k=3,share=none,window=6,sinks=2,dense_layers=0,refresh=3",
            "hip:k=12,beams=6,block_q=4,block_k=3,decode_block_k=5,share=always,window=6,sinks=2,dense_layers=0,refresh=3",
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
