//! Any OpenAI-compatible server as a target: chat or plain completions, with time-outs and patient
//! repeats, so that a server that is busy or restarts loses nothing.

use super::{Cost, Output, Target, local::stream};
use crate::count::{Counter, Words};
use crate::error::{EvalError, Result};
use crate::task::{Sample, Work};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Which server and how patiently.
#[derive(Clone, Debug)]
pub struct EndpointConfig {
    /// Base address, up to and without `/chat/completions`.
    pub url: String,
    /// The model's name there.
    pub model: String,
    /// Sent as a bearer token.
    pub key: Option<String>,
    /// Chat completions; else plain completions of the text.
    pub chat: bool,
    /// Longest wait for a reply.
    pub timeout: Duration,
    /// Tries per sample.
    pub tries: u32,
    /// First pause between tries; doubles up to a minute.
    pub pause: Duration,
}

/// See the module's text.
pub struct Endpoint {
    config: EndpointConfig,
    agent: ureq::Agent,
    cancelled: Box<dyn Fn() -> bool + Send + Sync>,
}

/// Longest pause.
const LONGEST: Duration = Duration::from_secs(60);

enum Failure {
    /// Worth another try, after this pause if the server named one.
    Again(String, Option<Duration>),
    /// This sample cannot be done there.
    Sample(String),
    /// No sample can.
    All(EvalError),
}

impl Endpoint {
    /// `cancelled` is asked between tries.
    ///
    /// # Errors
    /// An address that is none.
    pub fn new(
        config: EndpointConfig,
        cancelled: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Result<Endpoint> {
        if !config.url.starts_with("http://") && !config.url.starts_with("https://") {
            return Err(EvalError::Input(format!(
                "endpoint {:?}: expected http://... or https://...",
                config.url
            )));
        }
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(config.timeout))
            .http_status_as_error(false)
            .build()
            .into();
        Ok(Endpoint {
            config,
            agent,
            cancelled: Box::new(cancelled),
        })
    }

    fn ask(&self, body: &str) -> std::result::Result<Value, Failure> {
        let path = if self.config.chat {
            "chat/completions"
        } else {
            "completions"
        };
        let url = format!("{}/{path}", self.config.url.trim_end_matches('/'));
        let mut request = self
            .agent
            .post(&url)
            .header("content-type", "application/json");
        if let Some(key) = &self.config.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut response = request
            .send(body)
            .map_err(|error| Failure::Again(format!("{url}: {error}"), None))?;
        let status = response.status().as_u16();
        let wait = response
            .headers()
            .get("retry-after")
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .map(Duration::from_secs);
        let text = response
            .body_mut()
            .read_to_string()
            .map_err(|error| Failure::Again(format!("{url}: {error}"), None))?;
        let short: String = text.chars().take(300).collect();
        match status {
            200..=299 => serde_json::from_str(&text)
                .map_err(|error| Failure::Again(format!("{url}: {error} in {short:?}"), None)),
            408 | 425 | 429 | 500..=599 => Err(Failure::Again(
                format!("{url}: status {status}: {short}"),
                wait,
            )),
            401 | 403 | 404 | 405 => Err(Failure::All(EvalError::Input(format!(
                "{url}: status {status}: {short}"
            )))),
            _ => Err(Failure::Sample(format!("status {status}: {short}"))),
        }
    }

    /// Sleeps in short steps, so that a stop is noticed.
    fn rest(&self, pause: Duration) -> Result<()> {
        let end = Instant::now() + pause;
        while Instant::now() < end {
            if (self.cancelled)() {
                return Err(EvalError::Interrupted { done: 0, total: 0 });
            }
            std::thread::sleep(Duration::from_millis(50).min(end - Instant::now().min(end)));
        }
        Ok(())
    }
}

impl Target for Endpoint {
    fn model(&self) -> String {
        self.config.model.clone()
    }

    fn identity(&self) -> Option<String> {
        // What a name stands for on a server can change, but within a run it must not be asked twice.
        Some(format!(
            "{} {} chat {}",
            self.config.url, self.config.model, self.config.chat
        ))
    }

    fn counter(&self) -> &dyn Counter {
        &Words
    }

    fn run(&self, sample: &Sample, seed: u64) -> Result<Output> {
        let mut output = Output::default();
        let Work::Generate(decode) = &sample.work else {
            output.error = Some("a completions endpoint gives no likelihoods of a text".into());
            return Ok(output);
        };
        let text = sample.prompt.text();
        let mut body = json!({
            "model": self.config.model, "max_tokens": decode.max_new, "temperature": 0, "seed": seed,
        });
        if self.config.chat {
            body["messages"] = json!([{ "role": "user", "content": text }]);
        } else {
            body["prompt"] = json!(text);
        }
        if !decode.stop.is_empty() {
            body["stop"] = json!(decode.stop);
        }
        let body = body.to_string();
        let start = Instant::now();
        let mut pause = self.config.pause;
        let mut tried = 0;
        let reply = loop {
            tried += 1;
            match self.ask(&body) {
                Ok(reply) => break reply,
                Err(Failure::All(error)) => return Err(error),
                Err(Failure::Sample(reason)) => {
                    output.error = Some(reason);
                    return Ok(output);
                }
                Err(Failure::Again(reason, _)) if tried >= self.config.tries => {
                    return Err(EvalError::Unreachable(format!(
                        "{reason} (tried {tried} times)"
                    )));
                }
                Err(Failure::Again(_, wait)) => {
                    // Up to a quarter more, so that parallel requests do not come back together.
                    let part = stream(u64::from(tried), &sample.id) % 256;
                    let jitter = pause.mul_f64(part as f64 / 1024.0);
                    self.rest(wait.unwrap_or(pause).min(LONGEST) + jitter)?;
                    pause = (pause * 2).min(LONGEST);
                }
            }
        };
        let choice = &reply["choices"][0];
        let text = if self.config.chat {
            &choice["message"]["content"]
        } else {
            &choice["text"]
        };
        let Some(text) = text.as_str() else {
            output.error = Some(format!(
                "the reply has no text: {}",
                reply.to_string().chars().take(200).collect::<String>()
            ));
            return Ok(output);
        };
        output.text = text.into();
        output.finish = choice["finish_reason"].as_str().unwrap_or("stop").into();
        let count = |key: &str| reply["usage"][key].as_u64().unwrap_or(0) as usize;
        output.tokens_in = count("prompt_tokens");
        output.tokens_out = count("completion_tokens");
        output.cost = Cost {
            decode_s: start.elapsed().as_secs_f64(),
            ..Cost::default()
        };
        Ok(output)
    }
}
