//! The HTTP interface of a process: health and metrics for every role, all of it for the role that serves.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::Device;
use futures::FutureExt;
use metrics_exporter_prometheus::PrometheusHandle;

use super::Deployment;
use crate::config::Config;
use crate::ingest::IngestStatus;
use crate::registry::Registry;
use crate::serve::{self, Check, Embedder, Limits, Parts, Token};
use crate::supervisor::Supervisor;

/// Binds and starts to answer; returns the address. `serves`: the process has the role that serves versions.
pub async fn start(
    supervisor: &mut Supervisor,
    config: &Config,
    deployment: &Deployment,
    prometheus: PrometheusHandle,
    (serves, ingest): (bool, Option<IngestStatus>),
) -> Result<SocketAddr> {
    let bind = &config.serve.bind;
    let listener =
        tokio::net::TcpListener::bind(bind).await.with_context(|| format!("serve.bind = {bind:?}"))?;
    let address = listener.local_addr()?;
    let token = supervisor.token();
    tracing::info!("listening on http://{address}");
    if !serves {
        let observed = serve::run_observed(listener, checks(deployment, ingest), prometheus, token);
        supervisor.spawn("http", async move { Ok(observed.await?) });
        return Ok(address);
    }
    // On the CPU: the GPU is the training process's, which may need all of its memory.
    let (embedder, thread) = Embedder::start(Device::Cpu)?;
    let parts = Parts {
        registry: deployment.registry(),
        store: Arc::clone(&deployment.store),
        paths: deployment.paths.clone(),
        embedder,
        checks: checks(deployment, ingest),
        metrics: prometheus,
        token: config.serve.token.as_ref().map(|token| Token::new(token.expose())),
        limits: Limits {
            max_body_bytes: config.serve.max_body_bytes.as_usize(),
            max_embed_images: config.serve.max_embed_images,
            max_pixels: config.ingest.max_pixels,
        },
    };
    supervisor.spawn("http", async move {
        serve::run(listener, parts, token).await?;
        // The embedder went with the parts, so its thread is at its end.
        tokio::task::spawn_blocking(move || thread.join())
            .await?
            .map_err(|_| anyhow::anyhow!("the thread that embeds panicked"))
    });
    Ok(address)
}

fn checks(deployment: &Deployment, ingest: Option<IngestStatus>) -> Vec<Check> {
    let registry = Arc::clone(&deployment.registry);
    let answers = Check::new("registry", move || {
        let registry = Arc::clone(&registry);
        async move { registry.ping().await.map_err(|error| error.to_string()) }.boxed()
    });
    let consumes = ingest.map(|status| {
        Check::new("ingest", move || {
            let trouble = status.trouble();
            async move { trouble.map_or(Ok(()), Err) }.boxed()
        })
    });
    std::iter::once(answers).chain(consumes).collect()
}
