//! The learner: one process of a deployment, as long as it holds the lease.
//!
//! Owns the lease, its renewal and what a learner is made of; what it does meanwhile is [`Session`]'s. It can be
//! killed anywhere and another one goes on. What it writes carries its lease; when the lease is lost, everything
//! it had begun is dropped.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::child::Program;
use super::decide::Policy;
use super::job::{JobError, JobSettings};
use super::release::ReleaseError;
use super::report::Told;
use super::session::Session;
use crate::eval::forgetting::HistoryError;
use crate::eval::gate::GateLimits;
use crate::registry::{Lease, Registry, RegistryError};
use crate::store::paths::Paths;
use crate::store::{Store, StoreError};
use crate::train::spec::{Progress, SCHEMA};
use crate::types::{EventTime, PeriodId};

/// The lease that makes a process the learner.
pub const LEASE: &str = "learner";

/// How often the lease is asked for while another process has it.
const ASK_EVERY: Duration = Duration::from_secs(1);

pub type Clock = Arc<dyn Fn() -> EventTime + Send + Sync>;
/// Told of every line of progress of the training process.
pub type Listener = Arc<dyn Fn(PeriodId, &Progress) + Send + Sync>;

#[derive(Clone)]
pub struct LearnSettings {
    /// Names this process among those that want the lease.
    pub holder: String,
    pub lease_ttl_ms: i64,
    pub policy: Policy,
    /// A period with fewer frames is merged into a later one.
    pub min_frames: u64,
    pub period_length_ms: i64,
    pub gate: GateLimits,
    pub job: JobSettings,
    pub program: Program,
    /// How long the training process may take to write its last checkpoint at a stop.
    pub drain: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum LearnError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Job(#[from] JobError),
    #[error(transparent)]
    Release(#[from] ReleaseError),
    #[error(transparent)]
    History(#[from] HistoryError),
    #[error("{path} can't be read: {source}")]
    Outcome { path: String, source: serde_json::Error },
    #[error("{path} has schema {found}, this program reads {SCHEMA}")]
    Schema { path: String, found: u32 },
    #[error("the training process can't be reached: {0}")]
    Process(#[from] std::io::Error),
}

pub struct Controller {
    pub registry: Arc<dyn Registry>,
    pub store: Arc<Store>,
    pub paths: Paths,
    pub settings: LearnSettings,
    pub clock: Clock,
    pub listener: Option<Listener>,
}

impl LearnError {
    fn registry(&self) -> Option<&RegistryError> {
        match self {
            Self::Registry(error)
            | Self::Job(JobError::Registry(error))
            | Self::Release(ReleaseError::Registry(error)) => Some(error),
            _ => None,
        }
    }

    /// Another process is the learner now.
    pub fn is_fenced(&self) -> bool {
        matches!(self.registry(), Some(RegistryError::Fenced { .. }))
    }

    /// The registry or the store did not answer: it passes by itself.
    pub fn is_outage(&self) -> bool {
        let store = match self {
            Self::Store(error) | Self::Release(ReleaseError::Store(error)) => Some(error),
            _ => None,
        };
        matches!(self.registry(), Some(RegistryError::Unavailable(_)))
            || matches!(store, Some(StoreError::Unavailable { .. }))
    }
}

impl Controller {
    /// Waits for the lease, learns while it is held, until `cancel`; then lets the training process write a
    /// checkpoint, frees the lease and returns.
    pub async fn run(&self, cancel: CancellationToken) {
        metrics::gauge!(crate::metrics::LEASE_HELD).set(0.0);
        let mut told = Told::default();
        while !cancel.is_cancelled() {
            match self.acquire().await {
                Ok(Some(lease)) => self.hold(lease, &mut told, &cancel).await,
                Ok(None) => tracing::debug!("another process is the learner"),
                Err(error) => tracing::warn!(%error, "the learner's lease can't be asked for; trying again"),
            }
            tokio::select! {
                () = cancel.cancelled() => {}
                () = tokio::time::sleep(ASK_EVERY) => {}
            }
        }
    }

    async fn acquire(&self) -> Result<Option<Lease>, RegistryError> {
        let LearnSettings { holder, lease_ttl_ms, .. } = &self.settings;
        self.registry.acquire_lease(LEASE, holder, *lease_ttl_ms, (self.clock)()).await
    }

    /// Learns until `cancel` or until the lease is lost. It is renewed beside the steps, some of which take long.
    async fn hold(&self, lease: Lease, told: &mut Told, cancel: &CancellationToken) {
        tracing::info!(token = lease.token, "this process is the learner");
        metrics::gauge!(crate::metrics::LEASE_HELD).set(1.0);
        let session = Session::new(self, lease.clone(), told);
        tokio::select! {
            () = session.work(cancel) => {}
            () = self.renew(&lease) => {}
        }
        metrics::gauge!(crate::metrics::LEASE_HELD).set(0.0);
        if let Err(error) = self.registry.release_lease(&lease).await {
            tracing::warn!(%error, "the learner's lease could not be freed; it runs out by itself");
        }
    }

    /// Returns when the lease is another's.
    async fn renew(&self, lease: &Lease) {
        let ttl_ms = self.settings.lease_ttl_ms;
        loop {
            tokio::time::sleep(Duration::from_millis((ttl_ms / 3).max(1) as u64)).await;
            match self.registry.renew_lease(lease, ttl_ms, (self.clock)()).await {
                Ok(_) => {}
                Err(error @ RegistryError::Fenced { .. }) => {
                    tracing::warn!(%error, "another process is the learner: what this one had begun is dropped");
                    return;
                }
                Err(error) => tracing::warn!(%error, "the learner's lease can't be renewed; trying again"),
            }
        }
    }
}
