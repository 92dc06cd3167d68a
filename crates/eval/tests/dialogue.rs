//! Talks over the local engine: on a memory that holds everything all policies agree, on a small one the right
//! tokens are gone.

#[path = "../../../tests/golden.rs"]
mod golden;

use candle_core::Device;
use longspan_agents::LocalModel;
use longspan_data::task::dialogue::{Kind, Session, Turn};
use longspan_eval::EvalError;
use longspan_eval::dialogue::{Feed, SessionResult, TalkOptions, hold};
use longspan_eval::target::ChatMode;
use longspan_infer::{Engine, EngineOptions};
use longspan_kernels::attention::KvDtype;
use longspan_nn::model::{Decoder, Precision};
use longspan_nn::weights::Checkpoint;

fn model() -> LocalModel {
    let path = golden::root().join("tiny-models/gguf-llama/model.gguf");
    let checkpoint = Checkpoint::open(&path).unwrap();
    let (config, weights) = (&checkpoint.config, &*checkpoint.weights);
    let decoder = Decoder::load(config, weights, Precision::Packed, &Device::Cpu).unwrap();
    let engine = Engine::new(decoder, checkpoint.fingerprint.to_string()).unwrap();
    LocalModel::new(engine, checkpoint.tokenizer).unwrap()
}

fn options(context: &str, feed: Feed) -> TalkOptions {
    TalkOptions {
        engine: EngineOptions {
            kv: KvDtype::F32,
            context: context.parse().unwrap(),
        },
        chat: ChatMode::Never,
        feed,
    }
}

/// A fact, `fillers` turns of something else, and the question.
fn session(fillers: usize) -> Session {
    let turn = |kind, user: &str, choices: &[&str], right, stated| Turn {
        kind,
        user: user.into(),
        choices: choices.iter().map(|text| text.to_string()).collect(),
        right,
        stated,
    };
    let mut turns = vec![turn(Kind::Fact, "abc is cab.", &["ok"], 0, None)];
    for index in 0..fillers {
        let said = format!("b {index} a?");
        turns.push(turn(
            Kind::Filler,
            &said,
            &["a b", "c", "bca"],
            index % 3,
            None,
        ));
    }
    turns.push(turn(Kind::Recall, "abc?", &["bac", "cab"], 1, Some(0)));
    Session {
        id: "talk".into(),
        turns,
    }
}

#[test]
fn a_memory_of_everything_is_full_attention_and_a_small_one_forgets() {
    let model = model();
    let talk = session(6);
    let run = |context: &str, feed| -> SessionResult {
        hold(&model, &options(context, feed), &talk, &|| false).unwrap()
    };
    let full = run("full", Feed::Right);
    assert_eq!(full.turns.len(), 8);
    let (held, said) = full.turns[7].held.unwrap();
    assert!(held == said && said > 0);
    assert!(full.tokens > 100, "{}", full.tokens);
    // The model's window.
    let room = 128;
    assert!(full.tokens <= room - 4, "{}", full.tokens);
    for context in [
        format!("sirllm:start=4,top={}", room - 4),
        format!("sinks:4,{}", room - 4),
        format!("window:{room}"),
    ] {
        let found = run(&context, Feed::Right);
        assert_eq!((found.tokens, found.evicted), (full.tokens, 0), "{context}");
        for (found, full) in found.turns.iter().zip(&full.turns) {
            assert!((found.margin - full.margin).abs() < 1e-3, "{context}");
            assert_eq!(found.held, full.held, "{context}");
        }
    }
    // The same cache, once by age and once by surprise.
    let window = run("window:48", Feed::Right);
    assert_eq!(window.turns[7].held.unwrap().0, 0);
    let sinks = run("sinks:4,44", Feed::Right);
    let sirllm = run("sirllm:start=4,top=60", Feed::Right);
    assert!(sirllm.evicted > 0 && sirllm.kv_bytes < full.kv_bytes);
    assert!(sinks.turns[7].held.unwrap().0 <= 4);
    assert!(sirllm.turns[7].held.unwrap().0 <= said);
    let unknown = run("h2o:20,20", Feed::Right);
    assert_eq!(unknown.turns[7].held, None);
    // Twice the same, and the model's own replies make another talk.
    let again = run("sirllm:start=4,top=60", Feed::Right);
    assert_eq!(again.turns, sirllm.turns);
    let own = run("full", Feed::Own);
    let wrong = full.turns.iter().any(|turn| turn.chosen != turn.right);
    assert_eq!(own.turns != full.turns, wrong);
}

#[test]
fn talks_stop_and_refuse_with_a_reason() {
    let model = model();
    let stopped = hold(&model, &options("full", Feed::Right), &session(2), &|| true);
    assert!(matches!(stopped, Err(EvalError::Interrupted { .. })));
    let mut talk = session(1);
    talk.turns[1].choices[2].clear();
    let error = hold(&model, &options("full", Feed::Right), &talk, &|| false).unwrap_err();
    assert!(error.to_string().contains("turn 1"), "{error}");
}
