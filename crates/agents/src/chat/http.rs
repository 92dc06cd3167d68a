//! One HTTP exchange that can be stopped: the connection is read by a helper thread, so that the caller notices a
//! stop, a deadline or silence within a moment, whatever the server does.

use super::model::{Call, ChatError, Result};
use std::io::Read;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// How long to wait for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For a connection.
    pub connect: Duration,
    /// For the first byte of an answer: the prompt is read meanwhile.
    pub first: Duration,
    /// Between bytes of an answer.
    pub idle: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience {
            connect: Duration::from_secs(10),
            first: Duration::from_secs(120),
            idle: Duration::from_secs(60),
        }
    }
}

/// What came before the body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The status.
    pub status: u16,
    /// Retry-After, if it counts seconds.
    pub after: Option<Duration>,
    /// True if the body is server-sent events.
    pub events: bool,
}

enum Piece {
    Head(Head),
    Body(Vec<u8>),
    End,
    Failed(ChatError),
}

/// Sends requests.
#[derive(Clone)]
pub struct Client {
    agent: ureq::Agent,
    patience: Patience,
    headers: Vec<(String, String)>,
}

impl Client {
    /// `headers` go with every request.
    pub fn new(patience: Patience, headers: Vec<(String, String)>) -> Client {
        let agent = ureq::Agent::config_builder()
            .timeout_connect(Some(patience.connect))
            .timeout_recv_response(Some(patience.first))
            .timeout_per_read(Some(patience.idle.max(patience.first)))
            .http_status_as_error(false)
            .build()
            .into();
        Client {
            agent,
            patience,
            headers,
        }
    }

    /// Sends a JSON body, or asks with GET, and hands the answer's bytes to `on_body` as they come.
    ///
    /// # Errors
    /// Timeouts, connection failures, a stop by the caller, and what `on_body` returns, which ends the exchange.
    pub fn exchange(
        &self,
        url: &str,
        body: Option<String>,
        call: &Call,
        on_body: &mut dyn FnMut(&Head, &[u8]) -> Result<()>,
    ) -> Result<Head> {
        call.check("")?;
        let (sender, pieces) = sync_channel(16);
        let (client, address) = (self.clone(), url.to_string());
        std::thread::Builder::new()
            .name("http".into())
            .spawn(move || client.run(&address, body, &sender))
            .map_err(|error| ChatError::Network {
                message: format!("{url}: no thread for the connection: {error}"),
                partial: String::new(),
            })?;
        let mut head = None;
        let mut heard = Instant::now();
        loop {
            match next(&pieces) {
                Ok(Piece::Head(found)) => head = Some(found),
                Ok(Piece::Body(bytes)) => {
                    if let Some(head) = &head {
                        on_body(head, &bytes)?;
                    }
                }
                Ok(Piece::End) => break,
                Ok(Piece::Failed(error)) => return Err(error),
                Err(RecvTimeoutError::Timeout) => {
                    call.check("")?;
                    let (limit, what) = match &head {
                        None => (self.patience.connect + self.patience.first, "an answer"),
                        Some(_) => (self.patience.idle.max(Duration::from_secs(1)), "more"),
                    };
                    if heard.elapsed() > limit {
                        return Err(ChatError::Timeout {
                            message: format!("{url}: waited {} s for {what}", limit.as_secs()),
                            partial: String::new(),
                        });
                    }
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(ChatError::Network {
                        message: format!("{url}: the connection's thread ended early"),
                        partial: String::new(),
                    });
                }
            }
            call.check("")?;
            heard = Instant::now();
        }
        head.ok_or_else(|| ChatError::Protocol(format!("{url}: an answer without a status")))
    }

    /// In the helper thread. It ends when the caller no longer listens.
    fn run(&self, url: &str, body: Option<String>, sender: &SyncSender<Piece>) {
        let failed = |error: ureq::Error| {
            let message = format!("{url}: {error}");
            let partial = String::new();
            Piece::Failed(match error {
                ureq::Error::Timeout(_) => ChatError::Timeout { message, partial },
                ureq::Error::BadUri(_) | ureq::Error::Http(_) => ChatError::BadRequest(message),
                _ => ChatError::Network { message, partial },
            })
        };
        let response = match body {
            Some(body) => {
                let mut request = self
                    .agent
                    .post(url)
                    .header("content-type", "application/json");
                for (name, value) in &self.headers {
                    request = request.header(name, value);
                }
                request.send(body)
            }
            None => {
                let mut request = self.agent.get(url);
                for (name, value) in &self.headers {
                    request = request.header(name, value);
                }
                request.call()
            }
        };
        let mut response = match response {
            Ok(response) => response,
            Err(error) => {
                let _ = sender.send(failed(error));
                return;
            }
        };
        let header = |name: &str| response.headers().get(name)?.to_str().ok();
        let head = Head {
            status: response.status().as_u16(),
            after: header("retry-after")
                .and_then(|value| value.trim().parse().ok())
                .map(Duration::from_secs),
            events: header("content-type").is_some_and(|kind| kind.contains("event-stream")),
        };
        if sender.send(Piece::Head(head)).is_err() {
            return;
        }
        let mut reader = response.body_mut().as_reader();
        let mut buffer = vec![0; 16 << 10];
        loop {
            let piece = match reader.read(&mut buffer) {
                Ok(0) => Piece::End,
                Ok(n) => Piece::Body(buffer[..n].to_vec()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => failed(ureq::Error::from(error)),
            };
            let last = !matches!(piece, Piece::Body(_));
            if sender.send(piece).is_err() || last {
                return;
            }
        }
    }
}

fn next(pieces: &Receiver<Piece>) -> std::result::Result<Piece, RecvTimeoutError> {
    pieces.recv_timeout(Duration::from_millis(20))
}
