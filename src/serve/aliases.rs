//! Moving an alias: how a version is promoted or rolled back. The one request that changes something, so the one that
//! needs the token.

use std::fmt;

use axum::Json;
use axum::body::to_bytes;
use axum::extract::{Path, Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Shared;
use super::error::Problem;
use crate::types::{Sha256, Version, is_alias_name};

/// Bytes of a body that names one version.
const MAX_BODY_BYTES: usize = 1024;

/// The bearer token, kept as its hash.
#[derive(Clone)]
pub struct Token(Sha256);

impl Token {
    pub fn new(secret: &str) -> Self {
        Self(Sha256::of(secret.as_bytes()))
    }

    /// Takes the same time wherever the two differ: hashes of one length are compared to their end.
    fn is(&self, shown: &str) -> bool {
        let shown = Sha256::of(shown.as_bytes());
        let pairs = self.0.0.bytes().zip(shown.0.bytes());
        let difference = pairs.fold(0, |difference, (a, b)| difference | (a ^ b));
        std::hint::black_box(difference) == 0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<redacted>")
    }
}

#[derive(Deserialize)]
struct Target {
    version: Version,
}

/// `{"version": "v000042"}`; the version must be published.
pub async fn put(
    State(parts): State<Shared>,
    Path(alias): Path<String>,
    request: Request,
) -> Result<Json<Value>, Problem> {
    authorise(parts.token.as_ref(), request.headers())?;
    if !is_alias_name(&alias) {
        let detail =
            format!("{alias:?} is not 1 to 63 of a-z, 0-9 and -, beginning with a letter, and no version");
        return Err(Problem::new(StatusCode::BAD_REQUEST, "bad-alias", detail));
    }
    let too_large = |_| Problem::too_large(format!("at most {MAX_BODY_BYTES} bytes name a version"));
    let body = to_bytes(request.into_body(), MAX_BODY_BYTES).await.map_err(too_large)?;
    let Target { version } = serde_json::from_slice(&body).map_err(|error| {
        let detail = format!("the body should be {{\"version\": \"v000042\"}}: {error}");
        Problem::new(StatusCode::BAD_REQUEST, "bad-body", detail)
    })?;
    parts.registry.set_alias(&alias, version).await?;
    tracing::info!(%alias, %version, "alias moved over HTTP");
    Ok(Json(json!({ "alias": alias, "version": version })))
}

fn authorise(token: Option<&Token>, headers: &HeaderMap) -> Result<(), Problem> {
    let Some(token) = token else {
        let detail = "no token is configured (serve.token), so aliases can't be moved over HTTP";
        return Err(Problem::new(StatusCode::FORBIDDEN, "no-token-configured", detail));
    };
    let shown = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let shown = shown.and_then(|value| {
        let (scheme, shown) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(shown.trim())
    });
    match shown {
        Some(shown) if token.is(shown) => Ok(()),
        Some(_) => Err(Problem::unauthorised("the token is not the configured one")),
        None => Err(Problem::unauthorised("send the token as `Authorization: Bearer TOKEN`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_itself_and_nothing_else() {
        let token = Token::new("0123456789abcdef");
        assert!(token.is("0123456789abcdef"));
        assert!(!token.is("0123456789abcdeg") && !token.is("") && !token.is("0123456789abcdef0"));
        assert_eq!(format!("{token:?}"), "<redacted>");
    }
}
