//! The registry: the one place that says what has been read, what is sealed, what is published.
//!
//! Objects in the store mean nothing by themselves; a row here makes them a part of the world. Every method
//! below is **one transaction**: it has happened entirely or not at all, and after an error of kind
//! [`RegistryError::Unavailable`] the caller can't know which and asks again. The invariants:
//!
//! * A partition's position moves only by compare-and-swap, in the transaction that adds the segments of the
//!   frames it moves over ([`Registry::commit_flush`]). So each frame has exactly one live segment.
//! * A period's segment list never changes after the period was sealed. `commit_flush` reads the states of its
//!   periods in its own transaction and fails with [`RegistryError::PeriodSealed`].
//! * Periods are sealed in order of their start, and none is made before one that was sealed.
//! * What the learner writes carries its [`Lease`]; a lease that another holder has taken over since is
//!   refused with [`RegistryError::Fenced`], whatever the clock of the old holder says.
//! * A version number is drawn from a sequence and never drawn again; a version is visible or it isn't;
//!   `latest` moves in the transaction that makes a version visible, and only from that version's parent.
//!
//! The clock is the caller's: methods that need the time take it. Every writing method passes two failpoints,
//! `registry.METHOD.before_commit` and `registry.METHOD.after_commit`, and counts its outcome.

pub mod sqlite;
#[cfg(test)]
mod suite;

use std::collections::BTreeMap;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

pub use crate::types::{AttemptRecord, PeriodRecord, PeriodState};
use crate::types::{EventTime, FileRef, OffsetRange, PeriodId, TopicId, TopicPartition, Version};

/// Name of the alias that the learner moves.
pub const LATEST: &str = "latest";

#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Somebody else has moved the position: drop all memory of the partition and read it again.
    #[error("the position of {partition} is {found:?}, not {expected}")]
    PositionMoved { partition: TopicPartition, expected: i64, found: Option<i64> },
    /// The period was sealed meanwhile: its frames are late now.
    #[error("period {period} is sealed")]
    PeriodSealed { period: PeriodId },
    /// The lease belongs to somebody else by now: stop what was done under it.
    #[error("lease {name:?} with token {token} was taken over")]
    Fenced { name: String, token: u64 },
    /// The record is not in a state in which this may be done.
    #[error("{what} is {found}, not {expected}")]
    WrongState { what: String, found: String, expected: &'static str },
    #[error("{what} does not exist")]
    NotFound { what: String },
    /// The database did not answer or refused: try again, nothing is known about this transaction.
    #[error("the registry is unavailable: {0}")]
    Unavailable(#[source] sqlx::Error),
    /// What was to be written breaks a rule of the schema: a defect of the caller, which repeating won't mend.
    #[error("the registry's schema refuses it: {0}")]
    Refused(#[source] sqlx::Error),
    /// A stored value can't be read back: somebody must act.
    #[error("the registry holds {value:?} as {what}")]
    Corrupt { what: &'static str, value: String },
    #[error("the registry's schema could not be migrated: {0}")]
    Migration(#[source] sqlx::migrate::MigrateError),
}

impl From<sqlx::Error> for RegistryError {
    fn from(error: sqlx::Error) -> Self {
        use sqlx::error::ErrorKind;
        match &error {
            sqlx::Error::ColumnDecode { index, source } => {
                Self::Corrupt { what: "a column", value: format!("{index}: {source}") }
            }
            sqlx::Error::Database(refusal) if !matches!(refusal.kind(), ErrorKind::Other) => {
                Self::Refused(error)
            }
            _ => Self::Unavailable(error),
        }
    }
}

pub type Result<T> = std::result::Result<T, RegistryError>;

/// What is known of one partition.
#[derive(Debug, Clone, PartialEq)]
pub struct PositionRecord {
    pub partition: TopicPartition,
    /// The next offset to read; `None`: known from Kafka's metadata, not read by anyone yet.
    pub position: Option<i64>,
    /// The largest event time that the committed frames and punctuations of this partition vouch for.
    pub watermark: Option<EventTime>,
    /// The owner's last report that the partition was at its end, if nothing has come since.
    pub caught_up: Option<CaughtUp>,
}

/// A partition's owner found nothing more to read and has nothing in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaughtUp {
    /// When the broker answered the end offset (wall clock of the owner).
    pub answered_at: EventTime,
    /// Since when no record has come (wall clock of the owner).
    pub quiet_since: EventTime,
}

/// One object of frames of one partition and one period.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SegmentRecord {
    /// The period the frames belong to now (a merged period gives its segments away; the object stays).
    pub period: PeriodId,
    pub partition: TopicPartition,
    /// The offsets of the flush that wrote it.
    pub flush: OffsetRange,
    pub file: FileRef,
    pub frames: u64,
    pub captured_min: EventTime,
    pub captured_max: EventTime,
}

/// Everything that one flush of one partition makes durable.
#[derive(Debug, Clone, PartialEq)]
pub struct Flush {
    pub partition: TopicPartition,
    /// From the position that the owner read, to the one that it moves to.
    pub offsets: OffsetRange,
    /// Replaces the partition's watermark where it is larger.
    pub watermark: Option<EventTime>,
    /// At most one per period; may be empty: a flush without frames only moves the position.
    pub segments: Vec<SegmentRecord>,
    /// The bounds of each segment's period: it is made if it does not exist.
    pub periods: Vec<PeriodBounds>,
    /// Offsets that retention removed before anyone read them, recorded as lost.
    pub lost: Option<OffsetRange>,
}

/// A period's span, half open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeriodBounds {
    pub id: PeriodId,
    pub end: EventTime,
}

/// What sealing did to one period.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SealOutcome {
    Sealed { frames: u64 },
    Merged { into: PeriodId, frames: u64 },
}

/// What an attempt descends from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lineage {
    /// The version that `latest` names, if there is one: it becomes the teacher.
    Continued,
    /// Nothing, whatever `latest` names: its version becomes visible, and `latest` stays.
    New,
}

/// A bounded set of frames of one period, never trained on, kept after the frames are gone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeSetRecord {
    pub period: PeriodId,
    pub file: FileRef,
    pub frames: u64,
}

/// One cell of the matrix R and of the label-free measures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScoreRecord {
    pub version: Version,
    /// The period whose probe set was measured.
    pub period: PeriodId,
    /// `knn`, `linear`, `few_shot`, `cka`, ...
    pub measure: String,
    pub value: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VersionRecord {
    pub version: Version,
    pub period: PeriodId,
    pub attempt: u32,
    pub parent: Option<Version>,
    /// Only a visible version is published.
    pub visible: bool,
    /// Names relative to the version's prefix.
    pub files: Vec<FileRef>,
    /// The manifest as it was written, once visible; never in a list of versions, where it would be most of the memory.
    pub manifest: Option<String>,
    pub published_at: Option<EventTime>,
}

/// A version's number, drawn for an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reservation {
    pub version: Version,
    pub reserved_at: EventTime,
}

/// What [`Registry::publish`] takes.
#[derive(Debug, Clone, PartialEq)]
pub struct Publication {
    pub version: Version,
    pub manifest: String,
    /// Every file of the version, manifest and card included, relative to its prefix: replaces the reserved list.
    pub files: Vec<FileRef>,
    pub scores: Vec<ScoreRecord>,
    /// The period's own probe set, if it has one.
    pub probe_set: Option<ProbeSetRecord>,
}

/// What [`Registry::publish`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// The version is visible and `latest` names it.
    LatestMoved,
    /// The version is visible; `latest` did not name its parent any more and stays.
    LatestStays { latest: Option<Version> },
}

/// The right to act as the one learner until somebody else takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    pub name: String,
    pub holder: String,
    /// Larger with each acquisition, by the same holder too.
    pub token: u64,
    pub expires_at: EventTime,
}

/// See the module's head for what each method guarantees together with the others.
#[async_trait]
pub trait Registry: Send + Sync {
    /// Brings the schema up to date. Idempotent.
    async fn migrate(&self) -> Result<()>;
    /// One trivial query, for readiness.
    async fn ping(&self) -> Result<()>;

    // --- ingest ---

    /// The id of the topic's present incarnation. `identity` is what the client can see of it (the cluster's id,
    /// or the run of an in-process broker); another identity than the recorded one starts a new generation.
    async fn open_topic(&self, topic: &str, identity: &str) -> Result<TopicId>;
    /// Makes partitions known that Kafka's metadata lists; positions of known ones stay.
    async fn register_partitions(&self, partitions: &[TopicPartition]) -> Result<()>;
    /// All partitions of the current incarnations of all topics.
    async fn positions(&self) -> Result<Vec<PositionRecord>>;
    async fn position(&self, partition: &TopicPartition) -> Result<Option<PositionRecord>>;
    /// Records where a partition starts, if nobody has yet; returns the position that counts.
    async fn start_position(&self, partition: &TopicPartition, start: i64) -> Result<i64>;
    /// Sets a position by an operator's order (`positions reset`), whatever it was. Clears `caught_up`. Offsets that
    /// are read once more by it are frames once more, unless the flush comes out with the same object name.
    async fn reset_position(&self, partition: &TopicPartition, position: i64) -> Result<()>;
    /// Segments, watermark and position together. Errors: `PositionMoved`, `PeriodSealed` (also for a period that
    /// does not exist and starts before one that was sealed). Clears `caught_up`.
    async fn commit_flush(&self, flush: &Flush) -> Result<()>;
    /// Records or clears the owner's report; `PositionMoved` if the position is not `position` any more.
    async fn report_caught_up(
        &self,
        partition: &TopicPartition,
        position: i64,
        report: Option<CaughtUp>,
    ) -> Result<()>;
    /// Raises the stream's watermark to `watermark`; a smaller one changes nothing.
    async fn advance_watermark(&self, watermark: EventTime) -> Result<()>;
    async fn watermark(&self) -> Result<Option<EventTime>>;

    // --- periods ---

    /// All periods by start.
    async fn periods(&self) -> Result<Vec<PeriodRecord>>;
    async fn period(&self, id: PeriodId) -> Result<PeriodRecord>;
    /// Live segments of a period by (topic, topic id, partition, flush start).
    async fn segments(&self, period: PeriodId) -> Result<Vec<SegmentRecord>>;
    /// Object names of all live segments of all periods together with the positions, read in one snapshot:
    /// what the sweep compares its earlier listing with.
    async fn live_objects(&self) -> Result<LiveObjects>;
    /// An operator's wish: the learner seals it, and all before it, at its next look.
    async fn request_close(&self, id: PeriodId) -> Result<()>;
    /// Closes every open period up to this one, one after the other by start, so that the result is the same
    /// whether they are closed by one call or by several. One with fewer than `min_frames` is merged into the
    /// oldest one still open after it, or into `next` (made then) if there is none. Repeating it changes nothing.
    async fn seal(
        &self,
        lease: &Lease,
        id: PeriodId,
        min_frames: u64,
        next: PeriodBounds,
        now: EventTime,
    ) -> Result<Vec<(PeriodId, SealOutcome)>>;
    /// Sealed again, with a new attempt seed. Only from rejected or failed, and only while no later period has begun training.
    async fn retry(&self, id: PeriodId) -> Result<()>;

    // --- the learner ---

    /// sealed -> training with a new attempt whose parent `lineage` says, once every earlier period is
    /// settled; from training or evaluating (another program version found it) a further attempt with the old
    /// parent. With the newest attempt's own program version it changes nothing and returns that attempt.
    async fn begin_attempt(
        &self,
        lease: &Lease,
        period: PeriodId,
        program_version: &str,
        lineage: Lineage,
    ) -> Result<AttemptRecord>;
    async fn attempt(&self, period: PeriodId, number: u32) -> Result<AttemptRecord>;
    /// Draws the next start of an attempt: its prefix is nobody else's.
    async fn begin_start(&self, lease: &Lease, period: PeriodId, attempt: u32) -> Result<u64>;
    /// Counts a start that failed; returns the failures so far.
    async fn record_failure(
        &self,
        lease: &Lease,
        period: PeriodId,
        attempt: u32,
        reason: &str,
    ) -> Result<u32>;
    /// training -> evaluating. Repeating it changes nothing.
    async fn set_evaluating(&self, lease: &Lease, period: PeriodId) -> Result<()>;
    /// training or evaluating -> rejected or failed, with the reason. Repeating it changes nothing.
    async fn settle_unpublished(
        &self,
        lease: &Lease,
        period: PeriodId,
        state: PeriodState,
        reason: &str,
        now: EventTime,
    ) -> Result<()>;
    /// Draws a version number for the newest attempt of an evaluating period and stores its files' hashes; an
    /// attempt that has a number keeps it, with the hashes given last.
    async fn reserve_version(
        &self,
        lease: &Lease,
        period: PeriodId,
        attempt: u32,
        files: &[FileRef],
        now: EventTime,
    ) -> Result<Reservation>;
    /// The version becomes visible, its period published, its scores and probe set known, and `latest` moves
    /// if it names the version's parent. Repeating it changes nothing and says `LatestMoved` if `latest` is it.
    async fn publish(&self, lease: &Lease, publication: &Publication, now: EventTime) -> Result<Published>;
    /// published, rejected or failed -> expired: its segment rows go; returns their objects for deletion.
    /// Repeating it returns none: what an earlier call could not delete is left to the sweep.
    async fn expire(&self, lease: &Lease, period: PeriodId, now: EventTime) -> Result<Vec<FileRef>>;

    // --- what is published ---

    async fn version(&self, version: Version) -> Result<VersionRecord>;
    /// By number, without their manifests; reserved ones that are not visible included.
    async fn versions(&self) -> Result<Vec<VersionRecord>>;
    async fn aliases(&self) -> Result<BTreeMap<String, Version>>;
    /// Moves or makes an alias; the version must be visible.
    async fn set_alias(&self, alias: &str, version: Version) -> Result<()>;
    async fn probe_sets(&self) -> Result<Vec<ProbeSetRecord>>;
    async fn scores(&self) -> Result<Vec<ScoreRecord>>;

    // --- leases ---

    /// Takes the lease if it is free, expired at `now` or already `holder`'s; `None` if somebody else has it. What
    /// was acquired before is fenced from then on: a holder extends its lease by `renew_lease`.
    async fn acquire_lease(
        &self,
        name: &str,
        holder: &str,
        ttl_ms: i64,
        now: EventTime,
    ) -> Result<Option<Lease>>;
    /// Extends it; `Fenced` if it was taken over.
    async fn renew_lease(&self, lease: &Lease, ttl_ms: i64, now: EventTime) -> Result<Lease>;
    /// Frees it, if it is still this holder's.
    async fn release_lease(&self, lease: &Lease) -> Result<()>;
}

/// One snapshot for the sweep.
#[derive(Debug, Clone, PartialEq)]
pub struct LiveObjects {
    pub paths: std::collections::BTreeSet<String>,
    /// Position by (topic id, partition), those of past incarnations of a topic included.
    pub positions: BTreeMap<(TopicId, i32), i64>,
}
