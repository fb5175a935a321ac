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
    let mut paused = None;
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
        status.down(part, &error);
        paused.get_or_insert_with(|| Paused::begin(status));
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

/// All partitions of this process stand still as long as this lives.
pub struct Paused;

impl Paused {
    pub fn begin(status: &IngestStatus) -> Self {
        metrics::gauge!(INGEST_PARTITIONS, "state" => "paused").set(status.assigned() as f64);
        Self
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        metrics::gauge!(INGEST_PARTITIONS, "state" => "paused").set(0.0);
    }
}
