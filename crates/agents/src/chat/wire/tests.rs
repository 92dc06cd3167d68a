//! What is read and what is refused.

use super::*;
use crate::chat::template::{Message, Role};

#[test]
fn requests_of_the_official_client_are_read() {
    let body = br#"{"model":"m","messages":[{"role":"developer","content":"Be brief."},
        {"role":"user","content":[{"type":"text","text":"Hel"},{"type":"text","text":"lo"}],"name":"x"}],
        "stream":true,"stream_options":{"include_usage":true},"max_completion_tokens":5,"max_tokens":9,
        "temperature":0,"stop":"x","logprobs":true,"top_logprobs":3,"seed":-1,"user":"me","tools":null,
        "context":{"policy":"window","size":64},"decode":"lookahead:branch_length=4","rope":"ntk:2"}"#;
    let request: ChatRequest = read(body).unwrap();
    request.check().unwrap();
    let turns = turns(&request.messages).unwrap();
    assert_eq!(turns[0], Message::new(Role::System, "Be brief."));
    assert_eq!(turns[1], Message::new(Role::User, "Hello"));
    assert_eq!(request.max_new_tokens(), Some(5));
    assert_eq!(request.stops(), ["x"]);
    assert_eq!(request.extra["user"], "me");
    assert_eq!(
        request.policy().unwrap().unwrap().to_string(),
        "window:size=64"
    );
    let decode = request.strategy().unwrap();
    assert_eq!(decode.to_string(), "lookahead:branch_length=4");
    let sampling = request
        .sampling(&decode, 3, request.wanted_logprobs())
        .unwrap();
    assert_eq!((sampling.seed, sampling.logprobs), (u64::MAX, Some(3)));
    assert_eq!(request.rotary().unwrap().unwrap().to_string(), "ntk:2");
    let again: ChatRequest = read(&serde_json::to_vec(&request).unwrap()).unwrap();
    assert_eq!(again, request);
}

#[test]
fn wrong_types_are_named_by_their_path() {
    for (body, param, words) in [
        (
            r#"{"messages":[{"role":"user","content":3}]}"#,
            "messages[0].content",
            "a text or a list",
        ),
        (r#"{"messages":"hello"}"#, "messages", "sequence"),
        (
            r#"{"messages":[],"temperature":"hot"}"#,
            "temperature",
            "f32",
        ),
        (r#"{"messages":[],"max_tokens":-3}"#, "max_tokens", "-3"),
        (r#"{"messages":[],"n":1.5}"#, "n", "1.5"),
        (r#"{"messages":[],"stop":[1]}"#, "stop", "list of texts"),
        (r#"{"messages":[],"context":3}"#, "context", "infllm"),
    ] {
        let error = read::<ChatRequest>(body.as_bytes()).unwrap_err();
        assert_eq!(error.param.as_deref(), Some(param), "{error:?}");
        assert!(error.message.contains(words), "{error:?}");
        assert_eq!(error.code.as_deref(), Some("invalid_value"));
    }
    for body in [
        "",
        "{",
        "nonsense",
        "{\"messages\":[]} {}",
        "{\"model\":\"\u{1}\"}",
    ] {
        let error = read::<ChatRequest>(body.as_bytes()).unwrap_err();
        assert_eq!(
            error.code.as_deref(),
            Some("invalid_json"),
            "{body}: {error:?}"
        );
    }
    let error = read::<ChatRequest>(b"{\"messages\":[],\"model\":\"\xff\"}").unwrap_err();
    assert_eq!(error.code.as_deref(), Some("invalid_json"), "{error:?}");
    let error = read::<ChatRequest>(b"{}").unwrap_err();
    assert!(error.message.contains("messages"), "{error:?}");
}

#[test]
fn impossible_values_are_named() {
    let user = r#""messages":[{"role":"user","content":"x"}]"#;
    for (fields, param) in [
        (r#""n":0"#, "n"),
        (r#""n":99"#, "n"),
        (r#""stop":["a",""]"#, "stop"),
        (r#""max_tokens":0"#, "max_tokens"),
        (r#""top_logprobs":2"#, "top_logprobs"),
        (r#""logprobs":true,"top_logprobs":21"#, "top_logprobs"),
        (r#""stream_options":{}"#, "stream_options"),
        (r#""temperature":-1"#, "temperature"),
        (r#""top_p":2"#, "top_p"),
        (r#""logit_bias":{"a":1}"#, "logit_bias"),
        (r#""context":"magic""#, "context"),
        (r#""decode":"magic""#, "decode"),
        (r#""rope":"magic""#, "rope"),
    ] {
        let request: ChatRequest = read(format!("{{{user},{fields}}}").as_bytes()).unwrap();
        let all = |request: &ChatRequest| {
            request.check()?;
            request.policy()?;
            request.rotary()?;
            request.sampling(&request.strategy()?, 0, request.wanted_logprobs())
        };
        let error = all(&request).unwrap_err();
        assert_eq!(error.param.as_deref(), Some(param), "{fields}: {error:?}");
        assert!(error.message.contains(param), "{error:?}");
    }
    for (messages, param) in [
        ("[]", "messages"),
        (r#"[{"role":"wizard","content":""}]"#, "messages[0].role"),
        (r#"[{"role":"user"}]"#, "messages[0].content"),
        (
            r#"[{"role":"user","content":[{"type":"image_url"}]}]"#,
            "messages[0].content[0]",
        ),
    ] {
        let messages: Vec<ChatMessage> = serde_json::from_str(messages).unwrap();
        let error = turns(&messages).unwrap_err();
        assert_eq!(error.param.as_deref(), Some(param), "{error:?}");
    }
}

#[test]
fn answers_of_other_endpoints_are_read() {
    let reply: ChatReply = read(br#"{"choices":[{"message":{"role":"assistant","content":null,"refusal":null}}],"usage":{"prompt_tokens":1}}"#).unwrap();
    assert_eq!(reply.choices[0].message.text(), "");
    let chunk: ChatChunk = read(br#"{"id":"x","choices":[{"delta":{"content":"a","tool_calls":[]},"finish_reason":null}],"x":1}"#).unwrap();
    assert_eq!(chunk.choices[0].delta.content.as_deref(), Some("a"));
    let error: ErrorReply = read(br#"{"error":{"message":"no","code":400}}"#).unwrap();
    assert_eq!(error.error.code.as_deref(), Some("400"));
    let prompt: CompletionRequest = read(br#"{"prompt":[1,2,3]}"#).unwrap();
    assert_eq!(prompt.prompt, Prompt::Tokens(vec![1, 2, 3]));
    assert_eq!(
        read::<CompletionRequest>(br#"{"prompt":[]}"#)
            .unwrap()
            .prompt,
        Prompt::Texts(vec![])
    );
}
