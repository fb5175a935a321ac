//! Whether the process lives, whether it can do its work, and what it measures.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use futures::future::{BoxFuture, join_all};
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::{Map, Value, json};

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

struct Observed {
    checks: Vec<Check>,
    metrics: PrometheusHandle,
}

/// Complete in themselves: a process that serves has them among its routes, any other has them alone.
pub fn routes(checks: Vec<Check>, metrics: PrometheusHandle) -> Router {
    Router::new()
        .route("/healthz", get(alive))
        .route("/readyz", get(ready))
        .route("/metrics", get(self::metrics))
        .with_state(Arc::new(Observed { checks, metrics }))
}

/// It answers, so it lives. Says nothing of what it needs: a restart would not bring that back.
async fn alive() -> impl IntoResponse {
    ([(CACHE_CONTROL, "no-store")], Json(json!({ "status": "alive" })))
}

/// All checks at once.
async fn ready(State(observed): State<Arc<Observed>>) -> Response {
    let answers = join_all(observed.checks.iter().map(Check::answer)).await;
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
async fn metrics(State(observed): State<Arc<Observed>>) -> impl IntoResponse {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], observed.metrics.render())
}

#[cfg(test)]
mod tests {
    use metrics_exporter_prometheus::PrometheusBuilder;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::serve::error::PROBLEM_JSON;
    use crate::serve::run_observed;

    async fn ask(address: std::net::SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_process_that_does_not_serve_answers_for_its_health_and_for_nothing_else() {
        let recorder = PrometheusBuilder::new().build_recorder();
        ::metrics::with_local_recorder(&recorder, || ::metrics::counter!("frames").absolute(7));
        let trouble = Check::new("ingest", || Box::pin(async { Err("partition 3 is stopped".to_owned()) }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let token = CancellationToken::new();
        let running = tokio::spawn(run_observed(listener, vec![trouble], recorder.handle(), token.clone()));
        assert!(ask(address, "/healthz").await.contains("200 OK"));
        let ready = ask(address, "/readyz").await;
        assert!(ready.contains("503") && ready.contains("partition 3 is stopped"), "{ready}");
        assert!(ask(address, "/metrics").await.contains("frames 7"));
        let versions = ask(address, "/v1/versions").await;
        assert!(versions.contains("404") && versions.contains(PROBLEM_JSON), "{versions}");
        token.cancel();
        running.await.unwrap().unwrap();
    }
}
