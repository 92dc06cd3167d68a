//! What sequences hold: flat under policies that drop tokens, and the same answers wherever it lies.

mod common;

use common::{engine, ids, options, read};
use longspan_infer::EngineOptions;
use longspan_infer::context::{ContextConfig, InfLlmConfig};
use longspan_infer::engine::Want;
use longspan_infer::kv::plane::{TierFile, live_planes};
use longspan_kernels::attention::{KvDtype, KvLayout};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard};

/// Counts the bytes that the process holds.
struct Counting;

static LIVE: AtomicI64 = AtomicI64::new(0);

// SAFETY: all is handed to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size() as i64, Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size() as i64, Ordering::Relaxed);
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size() as i64, Ordering::Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes are counted for the whole process, so tests take turns.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|poison| poison.into_inner())
}

/// Tokens of the long streams.
const STREAM: usize = 200_000;

#[test]
fn evicting_policies_hold_a_flat_number_of_bytes_and_say_how_many() {
    let _turn = turn();
    let engine = engine("llama-tied");
    let config = engine.model().config();
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
        let mut early = 0;
        for step in 0..STREAM / 1000 {
            for piece in ids(1000, step as u32, config.vocab_size).chunks(chunk) {
                engine
                    .forward(&mut [(&mut sequence, piece)], Want::Nothing)
                    .unwrap();
            }
            if step == 0 {
                early = sequence.kv_bytes().memory;
                assert!(early > 0);
            }
        }
        assert_eq!(sequence.len(), STREAM);
        let bytes = sequence.kv_bytes().memory;
        // A page more or less in each layer: keys in up to two forms, and values, of 64 tokens.
        let layout = KvLayout {
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            dtype: KvDtype::F32,
        };
        let plane = layout.plane_bytes() as u64;
        let page = 3 * plane * config.num_layers as u64;
        assert!(
            bytes <= early + page,
            "{context}: {bytes} bytes, {early} after the first call"
        );
        // What is reported is what lies in memory, plane by plane.
        assert_eq!(bytes, live_planes() * plane, "{context}");
        // And what the process gets back. The rest: token ids, page tables (24 bytes for 64 tokens in a layer), both
        // in vectors that double, and the policy's indices.
        let tables = 2 * (4 * STREAM + 24 * STREAM / 64 * config.num_layers) as u64;
        let indices = 2 * sequence.report().index_bytes + (1 << 16);
        let before = LIVE.load(Ordering::Relaxed);
        drop(sequence);
        let freed = (before - LIVE.load(Ordering::Relaxed)) as u64;
        assert!(
            (bytes..=bytes + tables + indices).contains(&freed),
            "{context}: {bytes} bytes reported, {freed} given back"
        );
        assert_eq!(live_planes(), 0, "{context}");
    }
}

#[test]
fn tiers_and_cache_sizes_never_change_outputs() {
    let _turn = turn();
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
