//! Waiting for what is down.
//!
//! Owns: which errors pass by themselves, and how long to wait between tries. Invariant: a call is repeated
//! only if repeating it is harmless; everything that ingest repeats is idempotent or a compare-and-swap.

use std::fmt::Display;
use std::future::Future;
use std::time::Duration;

use rdkafka::error::KafkaError;

use super::status::{IngestStatus, Part};
use crate::metrics::INGEST_PARTITIONS;
use crate::registry::RegistryError;
use crate::store::StoreError;

const FIRST_WAIT: Duration = Duration::from_millis(100);
/// Longer would delay the recovery by as much.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// An error that may pass by itself.
pub trait MayPass: Display {
    fn passes(&self) -> bool;
}

impl MayPass for RegistryError {
    fn passes(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }
}

impl MayPass for StoreError {
    fn passes(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }
}

impl MayPass for KafkaError {
    fn passes(&self) -> bool {
        true
    }
}

/// Repeats a call until it gives a result or an error that does not pass. Meanwhile readiness names the part,
/// and the metrics show this process's partitions as paused. Dropping the future gives up.
pub async fn persist<T, E: MayPass, F: Future<Output = Result<T, E>>>(
    status: &IngestStatus,
    part: Part,
    mut call: impl FnMut() -> F,
) -> Result<T, E> {
    let mut wait = FIRST_WAIT;
    let mut paused: Option<Paused> = None;
    loop {
        let error = match call().await {
            Err(error) if error.passes() => error,
            settled => {
                if paused.is_some() {
                    tracing::info!(%part, "answers again; going on");
                }
                status.up(part);
                return settled;
            }
        };
        tracing::warn!(%part, %error, wait_ms = wait.as_millis(), "waiting; nothing is lost");
        paused.get_or_insert_with(|| Paused::begin(status, part)).tell(&error);
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

/// All partitions of this process stand still for one part as long as this lives. Dropping it clears the part:
/// nobody waits for it any more, whether it came back or the wait was given up.
pub struct Paused {
    status: IngestStatus,
    part: Part,
}

impl Paused {
    pub fn begin(status: &IngestStatus, part: Part) -> Self {
        metrics::gauge!(INGEST_PARTITIONS, "state" => "paused").set(status.assigned() as f64);
        Self { status: status.clone(), part }
    }

    pub fn tell(&self, why: &dyn Display) {
        self.status.down(self.part, why);
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        metrics::gauge!(INGEST_PARTITIONS, "state" => "paused").set(0.0);
        self.status.up(self.part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ask() -> Result<(), RegistryError> {
        Err(RegistryError::Unavailable(sqlx::Error::PoolTimedOut))
    }

    #[tokio::test]
    async fn a_wait_that_is_given_up_is_told_no_more() {
        let status = IngestStatus::default();
        status.up(Part::Kafka);
        let mut wait = Box::pin(persist(&status, Part::Registry, ask));
        assert!(futures::poll!(&mut wait).is_pending());
        assert!(status.trouble().is_some_and(|trouble| trouble.starts_with("registry")));
        drop(wait);
        assert_eq!(status.trouble(), None);
    }
}
