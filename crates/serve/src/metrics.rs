//! `GET /metrics` in Prometheus' text form, and `GET /healthz`.

use crate::app::App;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use longspan_infer::kv::plane::live_planes;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// What the HTTP side counts.
#[derive(Debug, Default)]
pub struct HttpCounters {
    /// Answers by route and status.
    pub answers: Mutex<BTreeMap<(String, u16), u64>>,
    /// Requests without an answer yet.
    pub in_flight: AtomicU64,
}

impl HttpCounters {
    /// Counts an answer.
    pub fn answered(&self, route: &str, status: u16) {
        let mut answers = self.answers.lock().unwrap_or_else(|p| p.into_inner());
        *answers.entry((route.into(), status)).or_default() += 1;
    }
}

/// `GET /healthz`
pub async fn health(State(app): State<Arc<App>>) -> Response {
    match app.scheduler.alive() {
        true => "ok\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "the engine has stopped\n").into_response(),
    }
}

/// `GET /metrics`
pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    let counters = app.scheduler.counters();
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let mut text = String::new();
    let mut write = |name: &str, kind: &str, help: &str, value: String| {
        let _ = write!(
            text,
            "# HELP longspan_{name} {help}\n# TYPE longspan_{name} {kind}\nlongspan_{name} {value}\n"
        );
    };
    let busy = get(&counters.busy_nanos) as f64 / 1e9;
    for (name, kind, help, value) in [
        (
            "requests_queued",
            "gauge",
            "Requests that wait for the engine",
            get(&counters.queued),
        ),
        (
            "requests_reading",
            "gauge",
            "Requests whose prompts are being read",
            get(&counters.reading),
        ),
        (
            "requests_writing",
            "gauge",
            "Requests whose answers are being written",
            get(&counters.writing),
        ),
        (
            "requests_finished_total",
            "counter",
            "Requests the engine finished",
            get(&counters.finished),
        ),
        (
            "requests_failed_total",
            "counter",
            "Requests the engine refused or failed",
            get(&counters.failed),
        ),
        (
            "requests_cancelled_total",
            "counter",
            "Requests whose clients went away",
            get(&counters.cancelled),
        ),
        (
            "prompt_tokens_total",
            "counter",
            "Tokens of prompts computed",
            get(&counters.prompt_tokens),
        ),
        (
            "cached_tokens_total",
            "counter",
            "Tokens of prompts whose keys and values were reused",
            get(&counters.cached_tokens),
        ),
        (
            "answer_tokens_total",
            "counter",
            "Tokens written",
            get(&counters.answer_tokens),
        ),
        (
            "passes_total",
            "counter",
            "Passes over the model",
            get(&counters.passes),
        ),
        (
            "shared_passes_total",
            "counter",
            "Passes that served several requests",
            get(&counters.shared_passes),
        ),
        ("documents", "gauge", "Documents kept", get(&counters.kept)),
        (
            "kv_running_bytes",
            "gauge",
            "Bytes of keys and values of running requests",
            get(&counters.running_bytes),
        ),
        (
            "kv_documents_bytes",
            "gauge",
            "Bytes of keys and values of kept documents",
            get(&counters.kept_bytes),
        ),
        (
            "kv_reserved_bytes",
            "gauge",
            "Bytes reserved for running requests",
            get(&counters.reserved_bytes),
        ),
        (
            "kv_planes",
            "gauge",
            "Planes of keys or values in memory",
            live_planes(),
        ),
        (
            "http_requests_in_flight",
            "gauge",
            "HTTP requests without an answer yet",
            get(&app.http.in_flight),
        ),
    ] {
        write(name, kind, help, value.to_string());
    }
    write(
        "busy_seconds_total",
        "counter",
        "Seconds in passes over the model",
        format!("{busy:.6}"),
    );
    text.push_str("# HELP longspan_http_answers_total HTTP answers by route and status\n# TYPE longspan_http_answers_total counter\n");
    let answers = app.http.answers.lock().unwrap_or_else(|p| p.into_inner());
    for ((route, status), count) in answers.iter() {
        let _ = writeln!(
            text,
            "longspan_http_answers_total{{route=\"{route}\",status=\"{status}\"}} {count}"
        );
    }
    drop(answers);
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4")];
    (kind, text).into_response()
}
