//! Answers that are errors, in the dialect's form.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use longspan_agents::chat::local::ModelError;
use longspan_agents::chat::wire::{ErrorBody, ErrorReply};
use longspan_infer::EngineError;
use longspan_infer::decode::DecodeError;
use longspan_infer::schedule::ScheduleError;

/// A request that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The HTTP status.
    pub status: StatusCode,
    /// The body.
    pub error: ErrorBody,
}

/// Result of a handler.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// An error with a status, a type and a code.
    pub fn new(status: StatusCode, code: &str, message: impl Into<String>) -> Self {
        let kind = match status.as_u16() {
            401 | 403 => "authentication_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        };
        Failure {
            status,
            error: ErrorBody {
                message: message.into(),
                kind: kind.into(),
                param: None,
                code: Some(code.into()),
            },
        }
    }

    /// Names the field at fault.
    pub fn at(mut self, param: &str) -> Self {
        self.error.param = Some(param.into());
        self
    }

    fn refused(param: Option<&str>, message: String) -> Self {
        let failure = Failure::new(StatusCode::BAD_REQUEST, "invalid_value", message);
        match param {
            Some(param) => failure.at(param),
            None => failure,
        }
    }

    fn internal(message: String) -> Self {
        Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }
}

impl From<ErrorBody> for Failure {
    fn from(error: ErrorBody) -> Self {
        Failure {
            status: StatusCode::BAD_REQUEST,
            error,
        }
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        let message = error.to_string();
        match error {
            EngineError::Context(_) => Failure::refused(Some("context"), message),
            EngineError::Rope(_) => Failure::refused(Some("rope"), message),
            EngineError::Refused(_) => Failure::refused(None, message),
            EngineError::Tensor(_)
            | EngineError::Io(_)
            | EngineError::Cancelled { .. }
            | EngineError::Session(_) => Failure::internal(message),
        }
    }
}

impl From<DecodeError> for Failure {
    fn from(error: DecodeError) -> Self {
        let message = error.to_string();
        match error {
            DecodeError::Engine(error) => error.into(),
            DecodeError::File { .. } => Failure::internal(message),
            _ => Failure::refused(Some("decode"), message),
        }
    }
}

impl From<ModelError> for Failure {
    fn from(error: ModelError) -> Self {
        let message = error.to_string();
        match error {
            ModelError::Engine(error) => error.into(),
            ModelError::Decode(error) => error.into(),
            ModelError::Template(_) => Failure::refused(Some("messages"), message),
            _ => Failure::refused(None, message),
        }
    }
}

impl From<ScheduleError> for Failure {
    fn from(error: ScheduleError) -> Self {
        let message = error.to_string();
        let new = |status, code| Failure::new(status, code, message.clone());
        match error {
            ScheduleError::Engine(error) => error.into(),
            ScheduleError::Decode(error) => error.into(),
            ScheduleError::Busy { .. } => new(StatusCode::TOO_MANY_REQUESTS, "queue_full"),
            ScheduleError::TimedOut => new(StatusCode::GATEWAY_TIMEOUT, "timeout"),
            ScheduleError::ShuttingDown => new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down"),
            ScheduleError::NotKept(_) => {
                new(StatusCode::NOT_FOUND, "document_not_found").at("session")
            }
            ScheduleError::Memory { .. } => new(StatusCode::BAD_REQUEST, "insufficient_memory"),
        }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = self.status;
        let mut response = (status, Json(ErrorReply { error: self.error })).into_response();
        let headers = response.headers_mut();
        match status.as_u16() {
            429 | 503 => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            401 => {
                let bearer = HeaderValue::from_static("Bearer");
                headers.insert(header::WWW_AUTHENTICATE, bearer);
            }
            _ => {}
        }
        response
    }
}
