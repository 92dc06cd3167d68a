//! Models that tell positions by ALiBi, through the engine: against the naive attention of `longspan_nn`, under
//! policies, and in trees of guesses. Tiny models whose rotation is taken away, f32 caches.

mod common;

use candle_core::Tensor;
use common::{assert_close, engine_with, ids, options, read};
use longspan_infer::Engine;
use longspan_infer::decode::{DecodeSession, DraftTree, EngineSession};
use longspan_infer::engine::Want;
use longspan_nn::attention::{Attend, CausalAttention};
use longspan_nn::config::ModelConfig;
use longspan_nn::position::alibi::{Alibi, AlibiAttention};

/// A tiny model with ALiBi in place of its rotation.
fn engine(name: &str) -> Engine {
    engine_with(name, |config: &mut ModelConfig| {
        config.rope.clear();
        config.layers.iter_mut().for_each(|layer| layer.rope = None);
        config.alibi_max_bias = Some(8.0);
    })
}

/// Logits [tokens, vocab] with this attention in place of the engine's.
fn logits(engine: &Engine, tokens: &[u32], attend: &mut dyn Attend) -> Vec<f32> {
    let model = engine.model();
    let hidden = model.hidden(tokens, attend).unwrap();
    let logits: Tensor = model.logits(&hidden).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

fn naive(engine: &Engine, tokens: &[u32], local: usize, global: usize) -> Vec<f32> {
    let config = engine.model().config();
    let alibi = Alibi {
        local,
        global,
        ..Alibi::new(config.num_heads)
    };
    let scale = f64::from(config.attention_scale);
    let (layers, kv) = (config.num_layers, config.num_kv_heads);
    let mut attend = AlibiAttention::new(alibi, layers, kv, config.head_dim, scale).unwrap();
    logits(engine, tokens, &mut attend)
}

#[test]
fn the_engine_is_the_naive_attention() {
    for name in ["llama-tied", "qwen2"] {
        let engine = engine(name);
        let config = engine.model().config();
        let tokens = ids(100, 1, config.vocab_size);
        let full = naive(&engine, &tokens, usize::MAX, 0);
        // The bias does something.
        let none = engine_with(name, |config: &mut ModelConfig| {
            config.rope.clear();
            config.layers.iter_mut().for_each(|layer| layer.rope = None);
        });
        let mut sequence = none.sequence(&options("full"), None).unwrap();
        let plain = read(&none, &mut sequence, &tokens, 100);
        let gap = plain.iter().zip(&full).map(|(a, b)| (a - b).abs());
        assert!(
            gap.fold(0.0, f32::max) > 1e-3,
            "{name}: ALiBi changes nothing"
        );

        for (context, local, global) in [
            ("full", usize::MAX, 0),
            ("window:24", 24, 0),
            ("lm-infinite:24,3", 24, 3),
            ("lm-infinite:100,4", 100, 4),
        ] {
            let want = naive(&engine, &tokens, local, global);
            for piece in [100, 33, 1] {
                let mut sequence = engine.sequence(&options(context), None).unwrap();
                let found = read(&engine, &mut sequence, &tokens, piece);
                let what = format!("{name} {context} in pieces of {piece}");
                assert_close(&found, &want, 3e-5, &what);
            }
        }
        // The differentiable attention says the same.
        let dtype = candle_core::DType::F32;
        let device = engine.model().device().clone();
        let mut cache = Vec::new();
        let cached = CausalAttention::cached(config, 100, &mut cache, dtype, &device);
        let found = logits(&engine, &tokens, &mut cached.unwrap());
        assert_close(&found, &full, 3e-5, "by candle");
        let packed = CausalAttention::packed(config, &[40, 60], None, dtype, &device);
        let found = logits(&engine, &tokens, &mut packed.unwrap());
        let mut want = naive(&engine, &tokens[..40], usize::MAX, 0);
        want.extend(naive(&engine, &tokens[40..], usize::MAX, 0));
        assert_close(&found, &want, 3e-5, "by candle, two documents");
    }
}

#[test]
fn policies_keep_their_laws_under_alibi() {
    let engine = engine("llama-tied");
    let vocab = engine.model().config().vocab_size;
    let tokens = ids(60, 2, vocab);
    let full = naive(&engine, &tokens, usize::MAX, 0);
    for context in [
        "window:60",
        "sinks:4,60",
        "lm-infinite:60,4",
        "infllm:n_local=64,n_init=4,block=8,topk=2,exec_block=16,chunk=32",
        "sirllm:top=60",
        "h2o:30,30,positions=cache",
        "span:full=bottom-0,local=window-60,sinks=0",
    ] {
        for piece in [60, 1] {
            let mut sequence = engine.sequence(&options(context), None).unwrap();
            let found = read(&engine, &mut sequence, &tokens, piece);
            assert_close(&found, &full, 3e-5, &format!("{context} by {piece}"));
        }
    }
    for refused in [
        "hip:k=12,block_q=4,block_k=2,window=6",
        "squeezed:0.5",
        "h2o:10,8",
        "cmr:24",
    ] {
        let error = engine.sequence(&options(refused), None).map(|_| ());
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("ALiBi") && error.contains("lm-infinite"),
            "{error}"
        );
    }
    let error = engine
        .under_rope(Some("linear:4".parse().unwrap()))
        .map(|_| ());
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("no rotary positions")
    );
}

#[test]
fn a_tree_of_guesses_is_its_paths_under_alibi() {
    let engine = engine("llama-tied");
    let vocab = engine.model().config().vocab_size;
    let head = ids(30, 4, vocab);
    let mut tree = DraftTree::new(5);
    let a = tree.push(0, 6);
    let b = tree.push(0, 7);
    let (c, d) = (tree.push(a, 8), tree.push(b, 9));
    let mut sequence = engine.sequence(&options("full"), None).unwrap();
    engine
        .forward(&mut [(&mut sequence, &head)], Want::Nothing)
        .unwrap();
    let mut session = EngineSession::new(&engine, &mut sequence);
    // Siblings share a position, which slots do not show: such trees are read by forks.
    assert!(!session.limits().one_pass_tree);
    let found = session.step_tree(EngineSession::ROOT, &tree).unwrap();
    for (node, path) in [(c, [5, 6, 8]), (d, [5, 7, 9])] {
        let mut plain = engine.sequence(&options("full"), None).unwrap();
        let text = [&head[..], &path].concat();
        let want = engine
            .forward(&mut [(&mut plain, &text)], Want::Last)
            .unwrap();
        let node = node as usize;
        assert_close(
            &found[node * vocab..(node + 1) * vocab],
            &want,
            3e-5,
            "a path",
        );
    }
}
