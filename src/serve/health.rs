//! Whether the process lives, whether it can do its work, and what it measures.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use futures::future::{BoxFuture, join_all};
use serde_json::{Map, Value, json};

use super::Shared;
use super::error::Problem;

/// One check may take so long: a probe asks every few seconds and gives up by itself.
const CHECK_LIMIT: Duration = Duration::from_secs(2);

type Ask = Box<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// Something that must hold for the process to do its work.
pub struct Check {
    name: &'static str,
    ask: Ask,
}

impl Check {
    /// `ask` gives `Ok`, or why not.
    pub fn new<F>(name: &'static str, ask: F) -> Self
    where
        F: Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync + 'static,
    {
        Self { name, ask: Box::new(ask) }
    }

    async fn answer(&self) -> (&'static str, Result<(), String>) {
        let late = |_| Err(format!("no answer within {} s", CHECK_LIMIT.as_secs()));
        let answer = tokio::time::timeout(CHECK_LIMIT, (self.ask)()).await;
        (self.name, answer.unwrap_or_else(late))
    }
}

/// It answers, so it lives. Says nothing of what it needs: a restart would not bring that back.
pub async fn alive() -> impl IntoResponse {
    ([(CACHE_CONTROL, "no-store")], Json(json!({ "status": "alive" })))
}

/// All checks at once.
pub async fn ready(State(parts): State<Shared>) -> Response {
    let answers = join_all(parts.checks.iter().map(Check::answer)).await;
    let is_ready = answers.iter().all(|(_, answer)| answer.is_ok());
    let checks: Map<String, Value> = answers
        .into_iter()
        .map(|(name, answer)| (name.to_owned(), json!(answer.err().unwrap_or_else(|| "ok".to_owned()))))
        .collect();
    match is_ready {
        true => ([(CACHE_CONTROL, "no-store")], Json(json!({ "status": "ready", "checks": checks })))
            .into_response(),
        false => {
            let detail = "not every check holds";
            Problem::new(StatusCode::SERVICE_UNAVAILABLE, "not-ready", detail)
                .with("checks", checks)
                .into_response()
        }
    }
}

/// Prometheus' text form.
pub async fn metrics(State(parts): State<Shared>) -> impl IntoResponse {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], parts.metrics.render())
}
