//! The laws every context policy keeps, on tiny random models with f32 keys and values.

mod common;

use common::{POLICIES, assert_close, engine, golden, ids, options, read};
use longspan_infer::Sequence;
use longspan_infer::engine::Want;

#[test]
fn losses_are_those_of_the_logits() {
    for context in ["full", "sirllm:start=3,recent=80,top=80,decay=0.8"] {
        let engine = engine("llama-tied");
        let vocab = engine.model().config().vocab_size;
        // More than exist at a time.
        let (tokens, targets) = (ids(150, 1, vocab), ids(150, 2, vocab));
        let fresh = || engine.sequence(&options(context), None).unwrap();
        common::assert_losses(&engine, fresh, &tokens, &targets);
    }
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
