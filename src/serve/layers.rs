//! What holds for every request: it is measured, bounded in size and time, and its errors are problem documents.

use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{Method, StatusCode};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};

use super::Shared;
use super::error::{PROBLEM_JSON, Problem};
use crate::metrics::{HTTP_REQUESTS, UNMATCHED_ROUTE};

/// Time until an answer begins; the body of a download may take longer. Shorter cuts off embeddings of many images
/// on a slow machine, longer lets a stuck store hold connections.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// The layers that need nothing to know, the outermost last.
pub fn of_every_router(routes: Router) -> Router {
    routes.layer(from_fn(only_problems)).layer(from_fn(in_time)).layer(from_fn(measured))
}

/// Times the request under its route's pattern, never under its path.
async fn measured(route: Option<MatchedPath>, request: Request, next: Next) -> Response {
    let begin = Instant::now();
    let method = bounded(request.method());
    let response = next.run(request).await;
    let route = route.map_or(UNMATCHED_ROUTE.to_owned(), |route| route.as_str().to_owned());
    let status = response.status().as_u16().to_string();
    metrics::histogram!(HTTP_REQUESTS, "route" => route, "method" => method, "status" => status)
        .record(begin.elapsed().as_secs_f64());
    response
}

/// HTTP lets a client make up methods; a label must not.
fn bounded(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::PUT => "PUT",
        Method::POST => "POST",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

/// Refuses a body that says it is too large before any of it is read. One that does not say is bounded where it is read.
pub async fn only_small_bodies(State(parts): State<Shared>, request: Request, next: Next) -> Response {
    let most = parts.limits.max_body_bytes;
    let length = request.headers().get(CONTENT_LENGTH);
    match length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok()) {
        Some(length) if length > most as u64 => {
            Problem::too_large(format!("a body of {length} bytes, at most {most} are taken")).into_response()
        }
        _ => next.run(request).await,
    }
}

async fn in_time(request: Request, next: Next) -> Response {
    match tokio::time::timeout(TIME_LIMIT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let detail = format!("no answer within {} s", TIME_LIMIT.as_secs());
            Problem::try_again("timeout", detail).into_response()
        }
    }
}

/// Gives the router's own errors (no such route, no such method, a path that is not UTF-8) the form of all others.
async fn only_problems(request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let response = next.run(request).await;
    let status = response.status();
    let is_problem = response.headers().get(CONTENT_TYPE).is_some_and(|found| found == PROBLEM_JSON);
    if is_problem || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let detail = match status {
        StatusCode::NOT_FOUND => format!("nothing is at {path}"),
        StatusCode::METHOD_NOT_ALLOWED => format!("{path} does not take {method}"),
        _ => format!("{method} {path} could not be answered"),
    };
    let mut problem = Problem::of_status(status, detail).into_response();
    if let Some(allowed) = response.headers().get(axum::http::header::ALLOW) {
        problem.headers_mut().insert(axum::http::header::ALLOW, allowed.clone());
    }
    problem
}
