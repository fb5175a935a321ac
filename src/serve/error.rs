//! Errors as RFC 9457 problem documents: `application/problem+json` with type, title, status and detail.

use std::fmt;

use axum::Json;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use crate::registry::RegistryError;
use crate::store::StoreError;

pub const PROBLEM_JSON: &str = "application/problem+json";

/// A problem document with the headers that belong to it.
#[derive(Debug)]
pub struct Problem(Box<Document>);

#[derive(Debug)]
struct Document {
    status: StatusCode,
    /// Last part of the type's URN; `None`: the status says it all (`about:blank`).
    kind: Option<&'static str>,
    detail: String,
    extensions: Map<String, Value>,
    header: Option<(HeaderName, HeaderValue)>,
}

impl Problem {
    pub fn new(status: StatusCode, kind: &'static str, detail: impl fmt::Display) -> Self {
        let mut problem = Self::of_status(status, detail);
        problem.0.kind = Some(kind);
        problem
    }

    /// One whose status says all that a program can act on.
    pub fn of_status(status: StatusCode, detail: impl fmt::Display) -> Self {
        let (detail, extensions) = (detail.to_string(), Map::new());
        Self(Box::new(Document { status, kind: None, detail, extensions, header: None }))
    }

    fn with_header(mut self, name: HeaderName, value: &'static str) -> Self {
        self.0.header = Some((name, HeaderValue::from_static(value)));
        self
    }

    pub fn unknown_version(name: &str) -> Self {
        let detail = format!("no published version and no alias is named {name:?}");
        Self::new(StatusCode::NOT_FOUND, "unknown-version", detail)
    }

    pub fn too_large(detail: impl fmt::Display) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too-large", detail)
    }

    /// The request may be repeated in a second: what it needs is busy or away.
    pub fn try_again(kind: &'static str, detail: impl fmt::Display) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, kind, detail).with_header(RETRY_AFTER, "1")
    }

    /// Who asks has not shown the right token.
    pub fn unauthorised(detail: impl fmt::Display) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthorised", detail).with_header(WWW_AUTHENTICATE, "Bearer")
    }

    /// A fault of this program or of what is stored: told to the log in full, to the client in general.
    pub fn internal(error: &dyn std::error::Error) -> Self {
        tracing::error!(%error, "a request failed");
        Self::of_status(StatusCode::INTERNAL_SERVER_ERROR, "the log of this process says why")
    }

    /// A further member of the document.
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.0.extensions.insert(name.to_owned(), value.into());
        self
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let Document { status, kind, detail, extensions: mut document, header } = *self.0;
        let title = match kind {
            Some(kind) => kind.replace('-', " "),
            None => status.canonical_reason().unwrap_or("error").to_lowercase(),
        };
        let kind = kind.map_or("about:blank".into(), |kind| format!("urn:palimpsest:problem:{kind}"));
        document.extend([
            ("type".to_owned(), json!(kind)),
            ("title".to_owned(), json!(title)),
            ("status".to_owned(), json!(status.as_u16())),
            ("detail".to_owned(), json!(detail)),
        ]);
        let headers = [(CONTENT_TYPE, PROBLEM_JSON), (CACHE_CONTROL, "no-store")];
        let mut response = (status, headers, Json(document)).into_response();
        // `Json` sets a content type of its own.
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        if let Some((name, value)) = header {
            response.headers_mut().insert(name, value);
        }
        response
    }
}

impl From<RegistryError> for Problem {
    fn from(error: RegistryError) -> Self {
        match error {
            RegistryError::NotFound { .. } => Self::new(StatusCode::NOT_FOUND, "not-found", error),
            RegistryError::WrongState { .. } => Self::new(StatusCode::CONFLICT, "wrong-state", error),
            RegistryError::Unavailable(_) => {
                tracing::warn!(%error, "a request found no registry");
                Self::try_again("registry-unavailable", "the registry does not answer")
            }
            _ => Self::internal(&error),
        }
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable { .. } => {
                tracing::warn!(%error, "a request found no store");
                Self::try_again("store-unavailable", "the object store does not answer")
            }
            // The registry lists it, so it should be there.
            _ => Self::internal(&error),
        }
    }
}
