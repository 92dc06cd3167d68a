//! One layer of one sequence, for goldens given as queries, keys and values: what the engine does
//! around [`attend_rows`].
#![allow(dead_code)]

use longspan_infer::attend::{LayerShape, Row, attend_rows};
use longspan_infer::context::{Call, ContextPolicy, Positions};
use longspan_infer::kv::{KvStore, Rows};
use longspan_kernels::attention::{KvDtype, KvLayout};
use longspan_nn::position::{Frequencies, RopeBasis, RopeTable};

/// One layer of one sequence: heads, head_dim and rotary base.
pub struct Rig {
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// None: keys and queries come rotated.
    pub rope: Option<Frequencies>,
    /// ALiBi's slopes, for models of that kind.
    pub alibi: Option<Vec<f32>>,
    pub store: KvStore,
    pub position: usize,
}

impl Rig {
    pub fn new(
        num_heads: usize,
        num_kv_heads: usize,
        head_dim: usize,
        rope_base: Option<f64>,
        policy: &dyn ContextPolicy,
    ) -> Self {
        let layout = KvLayout {
            num_kv_heads,
            head_dim,
            dtype: KvDtype::F32,
        };
        let rope = rope_base.map(|base| {
            let rope = serde_json::json!({ "rope_theta": base, "rope_type": "default" });
            let basis = RopeBasis::from_hf(&rope, head_dim, 1 << 20).unwrap();
            basis.frequencies(None)
        });
        let spec = policy.spec();
        Rig {
            num_heads,
            num_kv_heads,
            head_dim,
            rope,
            alibi: None,
            store: KvStore::new(layout, 1, spec.raw_keys, spec.first_page, None),
            position: 0,
        }
    }

    /// The same with more layers than one, for [`Rig::attend`].
    pub fn with_layers(mut self, layers: usize) -> Self {
        let (raw, first_page) = (self.store.keeps_raw(), self.store.first_page());
        self.store = KvStore::new(self.store.layout(), layers, raw, first_page, None);
        self
    }

    /// Appends `count` tokens whose rows are token-major and returns [count, num_heads head_dim].
    pub fn call(
        &mut self,
        policy: &mut dyn ContextPolicy,
        query: &[f32],
        key: &[f32],
        value: &[f32],
        count: usize,
    ) -> Vec<f32> {
        let call = Call {
            tokens: count,
            round: None,
            layers: &[0],
        };
        policy.begin_call(&call, &mut self.store).unwrap();
        let out = self.attend(policy, 0, query, key, value, count);
        self.position += count;
        out
    }

    /// One layer's share of a call.
    pub fn attend(
        &mut self,
        policy: &mut dyn ContextPolicy,
        layer: usize,
        query: &[f32],
        key: &[f32],
        value: &[f32],
        count: usize,
    ) -> Vec<f32> {
        let position = match policy.spec().positions {
            Positions::Absolute => self.position,
            Positions::Cache => self.store.len(layer) as usize,
        };
        let half = self.rope.as_ref().map_or(0, |rope| rope.inv_freq.len());
        let (mut cos, mut sin) = (vec![0f32; count * half], vec![0f32; count * half]);
        for index in 0..count {
            let span = index * half..(index + 1) * half;
            if let Some(rope) = &self.rope {
                RopeTable::compute_row(
                    rope,
                    (position + index) as f64,
                    &mut cos[span.clone()],
                    &mut sin[span],
                );
            }
        }
        let (width, kv_width) = (
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        );
        let mut out = vec![0f32; count * width];
        let shape = LayerShape {
            layer,
            num_heads: self.num_heads,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            softcap: None,
            sliding_window: None,
            alibi: self.alibi.as_deref(),
        };
        let mut rows = [Row {
            store: &mut self.store,
            policy,
            rope: self.rope.as_ref(),
            tables: (&cos, &sin),
            count,
        }];
        let query = Rows {
            data: query,
            stride: width,
        };
        let (key, value) = (
            Rows {
                data: key,
                stride: kv_width,
            },
            Rows {
                data: value,
                stride: kv_width,
            },
        );
        attend_rows(shape, &mut rows, query, key, value, &mut out).unwrap();
        out
    }
}

/// [heads, tokens, dim] to [tokens, heads dim].
pub fn token_major(x: &[f32], heads: usize, dim: usize) -> Vec<f32> {
    let tokens = x.len() / heads / dim;
    let at = |t: usize, h: usize| (h * tokens + t) * dim;
    (0..tokens)
        .flat_map(|t| (0..heads).flat_map(move |h| (0..dim).map(move |d| at(t, h) + d)))
        .map(|i| x[i])
        .collect()
}

pub fn assert_close(found: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), want.len(), "{what}");
    for (index, (found, want)) in found.iter().zip(want).enumerate() {
        assert!(
            (*found as f64 - want).abs() <= tolerance,
            "{what}[{index}]: {found}, expected {want} within {tolerance:e}"
        );
    }
}
