//! Saved sessions, kept prefixes and prompts that are stopped half-way go on as if nothing had happened.

mod common;

use common::{POLICIES, engine, ids, options, read};
use longspan_infer::Sequence;
use longspan_infer::engine::Want;
use longspan_infer::session::{Mode, SessionDir};
use std::ops::ControlFlow;

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
