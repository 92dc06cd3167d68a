//! A text read under one policy goes on under another.

mod common;

use common::{assert_close, engine, ids, options, read};

#[test]
fn another_policy_goes_on_from_what_was_read() {
    let engine = engine("llama-tied");
    let tokens = ids(90, 5, engine.model().config().vocab_size);
    let (text, next) = tokens.split_at(70);
    let mut full = engine.sequence(&options("full"), None).unwrap();
    read(&engine, &mut full, text, 70);
    let mut other = full.fork();
    let want = read(&engine, &mut other, next, next.len());
    // A budget as long as the text sees what full attention sees.
    for context in [
        "full",
        "window:100",
        "hip:k=100,block_q=4,dense_layers=0",
        "squeezed:0,obs=8",
    ] {
        let context = context.parse().unwrap();
        let mut sequence = engine.continued(&full, &context).unwrap();
        assert_eq!(sequence.options().context, context);
        let found = read(&engine, &mut sequence, next, next.len());
        assert_close(&found, &want, 2e-5, &context.to_string());
        assert_eq!(full.len(), 70);
    }
    // Keys that were dropped, or that are not kept in the form that is needed.
    let mut window = engine.sequence(&options("window:24"), None).unwrap();
    read(&engine, &mut window, text, 7);
    let refused = engine.continued(&window, &"full".parse().unwrap());
    assert!(refused.err().unwrap().to_string().contains("window"));
    let infllm = "infllm:n_init=4,n_local=16,block=8,topk=2".parse().unwrap();
    assert!(engine.continued(&full, &infllm).is_err());
}
