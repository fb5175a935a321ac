//! One flush of one partition: everything in memory becomes durable, or nothing of it counts.
//!
//! Owns the order of the durable steps: dead letters acknowledged, segments written, then one registry
//! transaction for segments, watermark and position. A crash before the transaction leaves objects without a
//! row (the sweep's) and dead letters that will be repeated; a crash after it leaves nothing undone. Leaves to
//! others: telling Kafka (`run`), sweeping.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tracing::Instrument;

use super::IngestError;
use super::dead_letter::DeadLetters;
use super::frame::Frame;
use super::partition::Batch;
use super::patience::{MayPass, Paused, persist};
use super::status::{IngestStatus, Part};
use super::window::{LatePolicy, Placement, Windows};
use crate::failpoint;
use crate::metrics::{INGEST_BYTES, INGEST_FLUSHES, INGEST_FRAMES};
use crate::registry::{
    Flush, PeriodBounds, PeriodRecord, PeriodState, Registry, RegistryError, SegmentRecord,
};
use crate::store::paths::{Paths, SegmentName};
use crate::store::segment::{Row, SegmentError};
use crate::store::{Store, segment};
use crate::types::{EventTime, FileRef, PeriodId, Sha256, TopicPartition};

/// How often the bytes that wait for the learner are looked at while they fill their bound.
const LEARNER_POLL: Duration = Duration::from_secs(1);
/// How often a flush is planned anew because a period has other bounds than were planned: each time somebody
/// must have made one meanwhile.
const MAX_REPLANS: u32 = 5;

/// How frames become periods.
#[derive(Debug, Clone)]
pub struct PeriodPolicy {
    /// Length of a period, aligned to 1970.
    pub length_ms: i64,
    pub late: LatePolicy,
    /// Bytes of sealed periods that wait to be trained on; above, ingest waits for the learner.
    pub max_waiting_bytes: u64,
}

/// What became of a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flushed {
    Committed,
    /// Somebody else has moved the position: the batch counts for nothing.
    Superseded,
}

/// The writer of batches.
pub struct Flusher {
    pub registry: Arc<dyn Registry>,
    pub store: Arc<Store>,
    pub paths: Paths,
    pub dead_letters: DeadLetters,
    pub policy: PeriodPolicy,
    pub status: IngestStatus,
}

impl Flusher {
    /// Writes a batch. Waits for what is down; dropping the future gives the batch up, as a crash would.
    pub async fn flush(&self, batch: Batch) -> Result<Flushed, IngestError> {
        let TopicPartition { topic, partition, .. } = &batch.partition;
        // At the highest level, so that its fields are there whichever events are asked for.
        let span = tracing::error_span!("flush", topic = %topic, partition);
        let flushed = self.write_or_replan(batch).instrument(span).await;
        let outcome = match &flushed {
            Ok(Flushed::Committed) => "committed",
            Ok(Flushed::Superseded) => "superseded",
            Err(_) => "failed",
        };
        metrics::counter!(INGEST_FLUSHES, "outcome" => outcome).increment(1);
        flushed
    }

    async fn write_or_replan(&self, batch: Batch) -> Result<Flushed, IngestError> {
        self.send_dead_letters(&batch).await?;
        let batch = Arc::new(batch);
        let mut replans = 0;
        loop {
            let periods = self.periods_with_room().await?;
            let plan = Plan::new(&batch, &Windows::new(self.policy.length_ms, &periods), self.policy.late);
            match self.write(&batch, &plan).await {
                Ok(()) => {
                    plan.count(&batch);
                    return Ok(Flushed::Committed);
                }
                // Its frames are late now: place them again.
                Err(IngestError::Registry(RegistryError::PeriodSealed { period })) => {
                    tracing::info!(%period, "period sealed during a flush");
                }
                // Somebody has made a period that ends elsewhere: place them within its bounds.
                Err(IngestError::Registry(error @ RegistryError::WrongState { .. }))
                    if replans < MAX_REPLANS =>
                {
                    replans += 1;
                    tracing::warn!(%error, replans, "the periods changed during a flush");
                }
                Err(IngestError::Registry(error @ RegistryError::PositionMoved { .. })) => {
                    tracing::warn!(%error, "flush superseded; reading anew");
                    return Ok(Flushed::Superseded);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// A durable step, repeated while what it needs is down. Each try counts as a failure, because this is all that
    /// monitoring sees of a store or registry that stays down.
    async fn step<T, E: MayPass, F: Future<Output = Result<T, E>>>(
        &self,
        part: Part,
        mut call: impl FnMut() -> F,
    ) -> Result<T, E> {
        let counted = || {
            let tried = call();
            async move {
                tried.await.inspect_err(|error| {
                    if error.passes() {
                        metrics::counter!(INGEST_FLUSHES, "outcome" => "failed").increment(1);
                    }
                })
            }
        };
        persist(&self.status, part, counted).await
    }

    async fn send_dead_letters(&self, batch: &Batch) -> Result<(), IngestError> {
        if batch.dead_letters.is_empty() {
            return Ok(());
        }
        failpoint::reach("ingest.dead_letter.before");
        self.step(Part::DeadLetters, || self.dead_letters.send(&batch.dead_letters)).await?;
        failpoint::reach("ingest.dead_letter.after");
        Ok(())
    }

    /// The periods, once the frames that wait for the learner are within their bound. Waiting here can't stop
    /// the learner: what it waits for is sealed already.
    async fn periods_with_room(&self) -> Result<Vec<PeriodRecord>, IngestError> {
        let mut paused: Option<Paused> = None;
        loop {
            let periods = self.step(Part::Registry, || self.registry.periods()).await?;
            let waiting: u64 = periods.iter().filter(|p| waits(p.state)).map(|p| p.bytes).sum();
            let max = self.policy.max_waiting_bytes;
            if waiting <= max {
                return Ok(periods);
            }
            let why = format!("{waiting} bytes wait for training, more than {max}");
            paused.get_or_insert_with(|| Paused::begin(&self.status, Part::Learner)).tell(&why);
            tokio::time::sleep(LEARNER_POLL).await;
        }
    }

    /// Segments, then the transaction.
    async fn write(&self, batch: &Arc<Batch>, plan: &Plan) -> Result<(), IngestError> {
        let mut segments = Vec::with_capacity(plan.segments.len());
        for (&period, (_, indices)) in &plan.segments {
            let (segment, bytes) = self.encode(batch, period, indices.clone()).await?;
            failpoint::reach("ingest.flush.before_put");
            let put = || self.store.put(&segment.file.path, bytes.clone());
            self.step(Part::Store, put).await?;
            failpoint::reach("ingest.flush.after_put");
            segments.push(segment);
        }
        let flush = Flush {
            partition: batch.partition.clone(),
            offsets: batch.offsets,
            watermark: batch.watermark,
            segments,
            periods: plan.segments.iter().map(|(&id, &(end, _))| PeriodBounds { id, end }).collect(),
            lost: None,
        };
        failpoint::reach("ingest.flush.before_commit");
        self.step(Part::Registry, || self.registry.commit_flush(&flush)).await?;
        failpoint::reach("ingest.flush.after_commit");
        Ok(())
    }

    async fn encode(
        &self,
        batch: &Arc<Batch>,
        period: PeriodId,
        indices: Vec<usize>,
    ) -> Result<(SegmentRecord, Bytes), IngestError> {
        let (batch, paths) = (batch.clone(), self.paths.clone());
        let encode = move || encode_segment(&batch, &paths, period, &indices);
        let encoded = tokio::task::spawn_blocking(encode).await;
        Ok(encoded.map_err(|_| IngestError::Panicked { what: "the encoder of segments" })??)
    }
}

/// States in which a period's frames wait for the learner and take no more.
fn waits(state: PeriodState) -> bool {
    matches!(state, PeriodState::Sealed | PeriodState::Training | PeriodState::Evaluating)
}

fn row(partition: &TopicPartition, frame: &Frame) -> Row {
    Row {
        image: frame.image.clone(),
        stream_id: frame.stream_id.clone(),
        captured_at: frame.captured_at,
        label: frame.label.clone(),
        topic: partition.topic.clone(),
        partition: partition.partition,
        offset: frame.offset,
        row: frame.row.cast_signed(),
    }
}

fn encode_segment(
    batch: &Batch,
    paths: &Paths,
    period: PeriodId,
    indices: &[usize],
) -> Result<(SegmentRecord, Bytes), SegmentError> {
    let partition = &batch.partition;
    let rows: Vec<Row> = indices.iter().map(|&i| row(partition, &batch.frames[i])).collect();
    let bytes = segment::write(&rows)?;
    let sha256 = Sha256::of(&bytes);
    let path = paths.segment(&SegmentName {
        period,
        topic_id: partition.topic_id.clone(),
        partition: partition.partition,
        flush: batch.offsets,
        sha256: sha256.clone(),
    });
    let captured = || rows.iter().map(|row| row.captured_at);
    let record = SegmentRecord {
        period,
        partition: partition.clone(),
        flush: batch.offsets,
        file: FileRef { path, sha256, bytes: bytes.len() as u64 },
        frames: rows.len() as u64,
        captured_min: captured().min().unwrap_or(period.start()),
        captured_max: captured().max().unwrap_or(period.start()),
    };
    Ok((record, bytes))
}

/// Which frame of a batch goes where.
struct Plan {
    /// The end of each period, and indices into the batch's frames.
    segments: BTreeMap<PeriodId, (EventTime, Vec<usize>)>,
    late: u64,
    dropped_late: u64,
}

impl Plan {
    fn new(batch: &Batch, windows: &Windows, late: LatePolicy) -> Self {
        let mut plan = Self { segments: BTreeMap::new(), late: 0, dropped_late: 0 };
        for (index, frame) in batch.frames.iter().enumerate() {
            let period = match windows.place(frame.captured_at, late) {
                Placement::Period(period) => period,
                Placement::LateInto(period) => {
                    plan.late += 1;
                    period
                }
                Placement::DroppedLate => {
                    plan.dropped_late += 1;
                    continue;
                }
            };
            let (_, indices) = plan.segments.entry(period.id).or_insert((period.end, Vec::new()));
            indices.push(index);
        }
        plan
    }

    fn count(&self, batch: &Batch) {
        let count = |outcome: &'static str, frames: u64| {
            metrics::counter!(INGEST_FRAMES, "outcome" => outcome).increment(frames);
        };
        let placed = batch.frames.len() as u64 - self.dropped_late;
        count("stored", placed - self.late);
        count("late", self.late);
        count("dropped_late", self.dropped_late);
        count("dead_lettered", batch.dead_letters.len() as u64);
        let stored = self.segments.values().flat_map(|(_, indices)| indices);
        let stored = stored.map(|&i| batch.frames[i].image.len() as u64);
        metrics::counter!(INGEST_BYTES).increment(stored.sum());
        tracing::debug!(
            offsets = %batch.offsets, frames = placed, late = self.late, dead_letters = batch.dead_letters.len(), "flushed"
        );
    }
}

#[cfg(test)]
mod tests;
