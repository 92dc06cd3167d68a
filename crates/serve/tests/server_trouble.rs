//! The server in trouble: bad input, keys, clients that are slow or go away, many at once, stops; and pages return to zero.

mod common;
#[path = "../../../tests/golden.rs"]
mod golden;

use common::*;
use longspan_infer::kv::plane::live_planes;
use longspan_serve::{ServeError, Server};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

#[test]
fn bad_input_is_named() {
    let _turn = turn();
    let server = start(|options| {
        options.max_body = 10_000;
        options.body_timeout = Duration::from_millis(300);
    });
    let error = |reply: &Reply| -> (u16, String, String) {
        let error = &reply.json()["error"];
        let text = |name: &str| error[name].as_str().unwrap_or("").to_string();
        assert!(!text("message").is_empty() && !text("type").is_empty());
        assert!(reply.head.contains("content-type: application/json"));
        (reply.status, text("code"), text("param"))
    };
    let raw = |body: &[u8]| receive(&mut send(server.address(), "POST", CHAT, "", body));
    let expect = |found: (u16, String, String), status: u16, code: &str, param: &str| {
        assert_eq!(found, (status, code.into(), param.into()));
    };
    expect(error(&raw(b"{\"messages\":")), 400, "invalid_json", "");
    expect(error(&raw(b"\xff\xfe{}")), 400, "invalid_json", "");
    expect(
        error(&raw(
            b"{\"messages\":[{\"role\":\"user\",\"content\":\"\xc3\x28\"}]}",
        )),
        400,
        "invalid_json",
        "",
    );
    expect(
        error(&raw(b"{\"messages\":7}")),
        400,
        "invalid_value",
        "messages",
    );
    expect(error(&raw(&vec![b' '; 20_000])), 413, "body_too_large", "");
    for (more, status, code, param) in [
        (json!({ "model": "other" }), 404, "model_not_found", "model"),
        (
            json!({ "max_tokens": 5000 }),
            400,
            "context_length_exceeded",
            "messages",
        ),
        (
            json!({ "context": "full", "rope": "clex:/etc" }),
            400,
            "invalid_value",
            "rope",
        ),
        (
            json!({ "context": "magic" }),
            400,
            "invalid_value",
            "context",
        ),
        (
            json!({ "decode": "beam", "temperature": 1 }),
            400,
            "invalid_value",
            "decode",
        ),
        (
            json!({ "logit_bias": { "999999": 1 } }),
            400,
            "invalid_value",
            "logit_bias",
        ),
        (
            json!({ "session": "none" }),
            404,
            "document_not_found",
            "session",
        ),
        (json!({ "messages": [] }), 400, "invalid_value", "messages"),
    ] {
        expect(
            error(&call(&server, "POST", CHAT, &chat("x", more))),
            status,
            code,
            param,
        );
    }
    let complete = |body: Value| error(&call(&server, "POST", "/v1/completions", &body));
    expect(
        complete(json!({ "prompt": [1, 99999] })),
        400,
        "invalid_value",
        "prompt",
    );
    expect(
        complete(json!({ "prompt": [] })),
        400,
        "invalid_value",
        "prompt",
    );
    expect(
        complete(json!({ "prompt": "x", "max_tokens": 0 })),
        400,
        "invalid_value",
        "max_tokens",
    );
    expect(
        error(&call(
            &server,
            "POST",
            "/v1/embeddings",
            &json!({ "input": "x" }),
        )),
        404,
        "model_not_found",
        "model",
    );
    expect(
        error(&call(
            &server,
            "POST",
            "/v1/documents",
            &json!({ "text": " " }),
        )),
        400,
        "invalid_value",
        "text",
    );
    expect(
        error(&call(&server, "GET", "/nothing", &Value::Null)),
        404,
        "unknown_route",
        "",
    );
    expect(
        error(&call(&server, "GET", CHAT, &Value::Null)),
        405,
        "method_not_allowed",
        "",
    );
    // A body that never comes.
    let mut stream = TcpStream::connect(server.address()).unwrap();
    write!(
        stream,
        "POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 50\r\n\r\n{{"
    )
    .unwrap();
    expect(error(&receive(&mut stream)), 408, "timeout", "");
    // A page of another site.
    let headers = "Origin: http://elsewhere.example\r\n";
    let body = chat("x", json!({})).to_string();
    let reply = receive(&mut send(
        server.address(),
        "POST",
        CHAT,
        headers,
        body.as_bytes(),
    ));
    expect(error(&reply), 403, "foreign_origin", "");
    // After all that it still answers.
    assert_eq!(
        call(&server, "POST", CHAT, &chat("x", json!({}))).status,
        200
    );
}

#[test]
fn a_key_guards_what_matters() {
    let _turn = turn();
    let mut open = options();
    open.address = ([0, 0, 0, 0], 0).into();
    assert!(matches!(
        Server::start(model(), None, open),
        Err(ServeError::Open(_))
    ));
    let server = start(|options| options.key = Some("secret".into()));
    let ask = |path: &str, headers: &str| {
        receive(&mut send(server.address(), "GET", path, headers, b"")).status
    };
    assert_eq!(ask("/v1/models", ""), 401);
    assert_eq!(ask("/v1/models", "Authorization: Bearer wrong\r\n"), 401);
    assert_eq!(ask("/metrics", ""), 401);
    assert_eq!(ask("/v1/models", "Authorization: Bearer secret\r\n"), 200);
    for path in ["/", "/style.css", "/page.js", "/healthz", "/openapi.json"] {
        assert_eq!(ask(path, ""), 200, "{path}");
    }
}

#[test]
fn clients_that_go_away_or_do_not_read_leave_nothing() {
    let _turn = turn();
    let before = live_planes();
    let server = start(|options| options.write_timeout = Duration::from_millis(500));
    let counters = server.counters().clone();
    let running =
        || counters.reading.load(Ordering::Relaxed) + counters.writing.load(Ordering::Relaxed);
    // A bias keeps the end away, so that answers are long.
    let eos: Vec<(String, Value)> = model()
        .tokenizer
        .eos_ids()
        .iter()
        .map(|id| (id.to_string(), json!(-100)))
        .collect();
    let eos: serde_json::Map<String, Value> = eos.into_iter().collect();
    for stream in [true, false] {
        let body = chat(
            "Hello",
            json!({ "stream": stream, "max_tokens": 3500, "logit_bias": eos }),
        );
        let connection = send(
            server.address(),
            "POST",
            CHAT,
            "",
            body.to_string().as_bytes(),
        );
        soon("it runs", || running() == 1);
        connection.shutdown(Shutdown::Both).unwrap();
        drop(connection);
        soon("it is given up", || {
            running() == 0 && live_planes() == before
        });
    }
    // Nobody reads: the answer is written to the end and its pages are free.
    let body = chat(
        "Hello",
        json!({ "stream": true, "max_tokens": 3000, "logit_bias": eos, "logprobs": true, "top_logprobs": 20 }),
    );
    let mut slow = send(
        server.address(),
        "POST",
        CHAT,
        "",
        body.to_string().as_bytes(),
    );
    let finished = counters.finished.load(Ordering::Relaxed);
    let given_up = counters.cancelled.load(Ordering::Relaxed);
    soon("the engine is done with it", || {
        counters.finished.load(Ordering::Relaxed) + counters.cancelled.load(Ordering::Relaxed)
            > finished + given_up
    });
    soon("pages return", || live_planes() == before);
    let other = call(&server, "POST", CHAT, &chat("x", json!({})));
    assert_eq!(other.status, 200);
    let mut rest = Vec::new();
    let _ = slow.read_to_end(&mut rest);
    soon("pages return", || live_planes() == before);
}

#[test]
fn sixty_four_clients_at_once() {
    let _turn = turn();
    let before = live_planes();
    let server = start(|_| {});
    let alone = call(&server, "POST", CHAT, &chat("Client 5 asks", json!({}))).json();
    let (good, dropped) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for client in 0..64usize {
            let (server, good, dropped, alone) = (&server, &good, &dropped, &alone);
            scope.spawn(move || {
                for round in 0..6usize {
                    let stream = (client + round).is_multiple_of(2);
                    let body = chat(
                        &format!("Client {client} asks"),
                        json!({ "stream": stream }),
                    );
                    if (client + round).is_multiple_of(7) {
                        drop(send(
                            server.address(),
                            "POST",
                            CHAT,
                            "",
                            body.to_string().as_bytes(),
                        ));
                        dropped.fetch_add(1, Ordering::Relaxed);
                        continue;
                    }
                    let reply = call(server, "POST", CHAT, &body);
                    assert_eq!(
                        reply.status,
                        200,
                        "{}",
                        String::from_utf8_lossy(&reply.body)
                    );
                    if stream {
                        reply.events();
                    } else if client == 5 {
                        assert_eq!(reply.json()["choices"], alone["choices"]);
                    }
                    good.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(good.into_inner() + dropped.into_inner(), 64 * 6);
    let counters = server.counters();
    soon("nothing runs", || {
        [
            &counters.queued,
            &counters.reading,
            &counters.writing,
            &counters.running_bytes,
        ]
        .iter()
        .all(|gauge| gauge.load(Ordering::Relaxed) == 0)
            && live_planes() == before
    });
    assert!(counters.shared_passes.load(Ordering::Relaxed) > 0);
    let metrics = call(&server, "GET", "/metrics", &Value::Null);
    let text = String::from_utf8(metrics.body).unwrap();
    assert!(
        text.contains("longspan_requests_writing 0")
            && text.contains(
                "longspan_http_answers_total{route=\"/v1/chat/completions\",status=\"200\"}"
            ),
        "{text}"
    );
}

#[test]
fn a_stop_lets_answers_end_and_takes_no_more() {
    let _turn = turn();
    let before = live_planes();
    let server = start(|_| {});
    let address = server.address();
    let body = chat("Hello", json!({ "max_tokens": 200 })).to_string();
    let mut stream = send(address, "POST", CHAT, "", body.as_bytes());
    let counters = server.counters().clone();
    soon("it runs or is done", || {
        counters.reading.load(Ordering::Relaxed)
            + counters.writing.load(Ordering::Relaxed)
            + counters.finished.load(Ordering::Relaxed)
            > 0
    });
    server.stop();
    assert_eq!(receive(&mut stream).status, 200);
    assert!(TcpStream::connect(address).is_err());
    assert_eq!(live_planes(), before);
}
