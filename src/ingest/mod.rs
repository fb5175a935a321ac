//! Ingest: records from Kafka in, segments in the store and rows in the registry out, each frame exactly once.
//!
//! The way of a record: `source` reads it on a thread of its own -> `frame` decodes it or says why not ->
//! `partition` keeps it in memory -> `flush` places its frames into periods (`window`), writes them as Parquet
//! (`segment`) and commits them together with the position. `run` is the loop that drives this.
//!
//! Invariant: a partition's position in the registry moves only together with everything of the records it moves
//! over. What is in memory is a copy of what Kafka still has: it may be dropped at any moment.

pub(crate) mod client_log;
pub(crate) mod columns;
mod dead_letter;
mod flush;
pub mod frame;
mod partition;
mod patience;
pub mod position;
mod probe;
mod run;
pub mod source;
mod status;
#[cfg(test)]
mod tests;
pub mod window;

use std::collections::BTreeMap;
use std::sync::Arc;

use rdkafka::error::KafkaError;

pub use flush::PeriodPolicy;
pub use frame::FrameLimits;
pub use partition::FlushPolicy;
pub use position::KafkaStart;
pub use run::run;
pub use status::{IngestStatus, Part};
pub use window::{IdleMode, IdlePolicy, LatePolicy, stream_watermark};

use crate::registry::{Registry, RegistryError};
use crate::store::{Store, StoreError};
use crate::types::EventTime;

/// The wall clock, injected.
pub type Clock = Arc<dyn Fn() -> EventTime + Send + Sync>;

/// What ingest works with, all of it shared with others.
#[derive(Clone)]
pub struct IngestParts {
    pub registry: Arc<dyn Registry>,
    pub store: Arc<Store>,
    pub clock: Clock,
    /// Where ingest says what it waits for.
    pub status: IngestStatus,
}

/// Everything that ingest is told by the configuration.
#[derive(Debug, Clone)]
pub struct IngestSettings {
    /// Names the prefix of all objects.
    pub pipeline: String,
    pub kafka: KafkaSettings,
    pub limits: FrameLimits,
    pub periods: PeriodPolicy,
    pub flush: FlushPolicy,
    pub idle: IdlePolicy,
    /// How often ends of partitions are asked for, reports made and the stream's watermark computed.
    pub report_interval_ms: u64,
    /// How long a revocation or an orderly stop may take to flush what is in memory; what is not flushed by
    /// then is read again by whoever owns the partition next.
    pub drain_timeout_ms: u64,
}

/// What to consume.
#[derive(Debug, Clone)]
pub struct KafkaSettings {
    /// Settings of librdkafka, for the consumer and the producer of dead letters: `bootstrap.servers` at least.
    pub properties: BTreeMap<String, String>,
    pub topics: Vec<String>,
    /// What the client can see of the topics' incarnation: the cluster's id, or the run of an in-process broker.
    pub identity: String,
    /// The consumer group.
    pub group: String,
    /// Where a partition starts that nobody has read yet.
    pub start: KafkaStart,
    pub dead_letter_topic: String,
    /// Memory that records on their way from the client may take, beside `FlushPolicy::max_total_bytes`.
    pub max_in_flight_bytes: usize,
    /// How often the topics' partitions are listed.
    pub metadata_interval_ms: u64,
}

/// Why ingest ended although nobody stopped it. What passes by itself is waited for instead.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// The client refuses a setting or can't go on.
    #[error("the Kafka client failed: {0}")]
    Kafka(#[from] KafkaError),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Segment(#[from] crate::store::segment::SegmentError),
    #[error("{what} panicked")]
    Panicked { what: &'static str },
}
