//! The HTTP interface: published versions, periods, embeddings, health, metrics.
//!
//! Everything is answered from the registry and the store; nothing here is kept but the encoder that embeds, so any
//! number of replicas can stand side by side. Only what the registry lists as a file of a visible version is ever
//! read from the store. Every error is an RFC 9457 problem document. What the answers are about is others' to
//! make: `publish` writes versions, `period` moves periods; `app` says which checks make a process ready.
//!
//! | | |
//! |---|---|
//! | `GET /v1/versions` | all published versions and the aliases |
//! | `GET /v1/versions/{version}` | the manifest, byte by byte as it was published |
//! | `GET /v1/versions/{version}/files/{path}` | a file: strong ETag (its SHA-256), one Range |
//! | `GET /v1/periods` | all periods |
//! | `PUT /v1/aliases/{alias}` | moves an alias; needs the bearer token |
//! | `POST /v1/embed?version=` | an image, or JSON with many |
//! | `GET /healthz`, `/readyz`, `/metrics` | |
//!
//! `{version}` is a number (`v000042`, `42`) or an alias. A number's files never change and may be cached for ever. An
//! alias is answered at once, not redirected: with `no-cache`, so that a cache asks again each time (and gets 304), and
//! with the numbered address in `content-location`. Who needs several files of one version asks for the alias once
//! and goes on with that address.

mod aliases;
mod connections;
mod embed;
mod error;
mod files;
mod health;
mod layers;
mod lists;
mod versions;

use std::future::Future;
use std::io;
use std::sync::Arc;

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post, put};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use aliases::Token;
pub use embed::{EmbedError, Embedder};
pub use health::Check;

use crate::registry::Registry;
use crate::store::Store;
use crate::store::paths::Paths;

/// What a request may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub max_body_bytes: usize,
    /// Images in one request to embed.
    pub max_embed_images: usize,
    /// Width x height that an image's header may claim.
    pub max_pixels: u64,
}

/// What the interface is made of.
pub struct Parts {
    pub registry: Arc<dyn Registry>,
    pub store: Arc<Store>,
    pub paths: Paths,
    pub embedder: Embedder,
    /// All must hold for the process to be ready.
    pub checks: Vec<Check>,
    pub metrics: PrometheusHandle,
    /// Without one no alias can be moved over HTTP.
    pub token: Option<Token>,
    pub limits: Limits,
}

type Shared = Arc<Parts>;

/// All routes over `parts`.
pub fn router(mut parts: Parts) -> Router {
    let observed = health::routes(std::mem::take(&mut parts.checks), parts.metrics.clone());
    let parts: Shared = Arc::new(parts);
    // These patterns and those of `health` are `metrics::ROUTES`.
    let routes = Router::new()
        .route("/v1/versions", get(lists::versions))
        .route("/v1/versions/{version}", get(versions::manifest))
        .route("/v1/versions/{version}/files/{*path}", get(files::file))
        .route("/v1/periods", get(lists::periods))
        .route("/v1/aliases/{alias}", put(aliases::put))
        .route("/v1/embed", post(embed::post))
        .with_state(parts.clone())
        .merge(observed)
        .layer(from_fn_with_state(parts, layers::only_small_bodies));
    layers::of_every_router(routes)
}

/// `/healthz`, `/readyz` and `/metrics` alone: what a process answers that has another role than to serve.
pub fn observe_router(checks: Vec<Check>, metrics: PrometheusHandle) -> Router {
    layers::of_every_router(health::routes(checks, metrics))
}

/// Answers until `token` is cancelled, then finishes the requests that are open. Ends in an error if the encoder's thread
/// has ended before that.
pub async fn run(listener: TcpListener, parts: Parts, token: CancellationToken) -> io::Result<()> {
    let encoder_gone = parts.embedder.gone();
    let served = serve_until(listener, router(parts), token.clone());
    tokio::select! {
        biased;
        served = served => served,
        () = encoder_gone => Err(io::Error::other("the thread that embeds has ended")),
    }
}

/// [`run`] for [`observe_router`]: answers until `token` is cancelled, then finishes the requests that are open.
pub async fn run_observed(
    listener: TcpListener,
    checks: Vec<Check>,
    metrics: PrometheusHandle,
    token: CancellationToken,
) -> io::Result<()> {
    serve_until(listener, observe_router(checks, metrics), token).await
}

async fn serve_until(listener: TcpListener, router: Router, token: CancellationToken) -> io::Result<()> {
    let stop: std::pin::Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(token.cancelled_owned());
    axum::serve(connections::Limited::new(listener), router).with_graceful_shutdown(stop).await
}
