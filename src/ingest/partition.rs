//! What is in memory of one partition between two flushes.
//!
//! Owns: the frames and dead letters of the records since the last flush, and whether the partition is at its
//! end. Pure: the clock comes in. Invariant: a [`Batch`] holds everything of the records in its offsets and
//! nothing else. Frames are not sorted into periods here but when they are flushed, because their period may
//! have been sealed by then.

use super::dead_letter::DeadLetter;
use super::frame::{Decoded, Frame, Record};
use super::position::Progress;
use super::window::{raise_by_frame, raise_by_punctuation};
use crate::registry::{CaughtUp, PositionRecord};
use crate::types::{EventTime, OffsetRange, TopicPartition};

/// Memory of a frame beside its image and texts.
const FRAME_OVERHEAD_BYTES: usize = 128;
/// An end offset above the position (transaction markers, compaction) counts as reached when the client has met
/// the end and the offset then stayed for this long while nothing came.
const END_SETTLE_MS: i64 = 2_000;

/// When a partition's memory is written.
#[derive(Debug, Clone)]
pub struct FlushPolicy {
    /// Bytes of one partition.
    pub max_bytes: usize,
    /// Time that a record waits in memory.
    pub max_age_ms: i64,
    /// A partition that nothing comes to is flushed after this, so that it can be reported caught up.
    pub max_quiet_ms: i64,
    /// Bytes of all partitions together; the largest is flushed then.
    pub max_total_bytes: usize,
}

/// Everything of one partition that one flush makes durable.
#[derive(Debug, Clone)]
pub struct Batch {
    pub partition: TopicPartition,
    pub offsets: OffsetRange,
    pub frames: Vec<Frame>,
    pub dead_letters: Vec<DeadLetter>,
    pub watermark: Option<EventTime>,
}

/// One partition that this process owns and reads.
#[derive(Debug)]
pub struct Partition {
    pub id: TopicPartition,
    /// Records of another epoch are not ours.
    pub epoch: u64,
    progress: Progress,
    frames: Vec<Frame>,
    dead_letters: Vec<DeadLetter>,
    bytes: usize,
    /// When the oldest unflushed record came.
    waiting_since: Option<EventTime>,
    watermark: Option<EventTime>,
    punctuated: bool,
    end: EndWatch,
    /// The registry has a report that we are at the end.
    pub reported: bool,
}

impl Partition {
    /// A partition about to be read from `position`, as the registry has it.
    pub fn new(record: PositionRecord, position: i64, epoch: u64, now: EventTime) -> Self {
        Self {
            id: record.partition,
            epoch,
            progress: Progress::starting_at(position),
            frames: Vec::new(),
            dead_letters: Vec::new(),
            bytes: 0,
            waiting_since: None,
            watermark: record.watermark,
            punctuated: false,
            end: EndWatch::new(now),
            reported: record.caught_up.is_some(),
        }
    }

    /// Takes a record's content. `false`: the record was taken before.
    pub fn take(&mut self, record: &Record, decoded: Decoded, now: EventTime) -> bool {
        if !self.progress.take(record.offset) {
            return false;
        }
        self.end.record(now);
        self.waiting_since.get_or_insert(now);
        for frame in &decoded.frames {
            self.watermark = raise_by_frame(self.watermark, frame.captured_at, now);
            let texts = frame.stream_id.len() + frame.label.as_ref().map_or(0, String::len);
            self.bytes += frame.image.len() + texts + FRAME_OVERHEAD_BYTES;
        }
        if let Some(stated) = decoded.watermark {
            self.watermark = raise_by_punctuation(self.watermark, stated);
            self.punctuated = true;
        }
        self.frames.extend(decoded.frames);
        for reject in &decoded.rejects {
            let letter = DeadLetter::new(&self.id, record, reject);
            self.bytes += letter.bytes();
            self.dead_letters.push(letter);
        }
        true
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn next_offset(&self) -> i64 {
        self.progress.next()
    }

    /// Whether the partition is to be flushed now.
    pub fn is_due(&self, policy: &FlushPolicy, now: EventTime) -> bool {
        if self.bytes >= policy.max_bytes || self.punctuated {
            return true;
        }
        let Some(since) = self.waiting_since else { return false };
        now.0 - since.0 >= policy.max_age_ms || now.0 - self.end.quiet_since.0 >= policy.max_quiet_ms
    }

    /// The position that the registry has.
    pub fn committed_offset(&self) -> i64 {
        self.progress.committed_offset()
    }

    /// Takes all that is in memory out of it; `None`: no record came since the last flush.
    pub fn take_batch(&mut self) -> Option<Batch> {
        let offsets = self.progress.unflushed()?;
        self.bytes = 0;
        self.waiting_since = None;
        self.punctuated = false;
        Some(Batch {
            partition: self.id.clone(),
            offsets,
            frames: std::mem::take(&mut self.frames),
            dead_letters: std::mem::take(&mut self.dead_letters),
            watermark: self.watermark,
        })
    }

    /// The batch that was taken is durable.
    pub fn committed(&mut self) {
        self.progress.committed();
        // The flush has cleared the report.
        self.reported = false;
    }

    /// The client met the end of this partition, or of another one with its number.
    pub fn met_end(&mut self) {
        self.end.met_end = true;
    }

    /// The broker answered that the partition ends at `end`: the report to make, if we are there with nothing in
    /// memory.
    pub fn end_answered(&mut self, end: i64, answered_at: EventTime) -> Option<CaughtUp> {
        let at_end = self.end.is_reached(self.progress.next(), end, answered_at);
        (at_end && self.progress.unflushed().is_none())
            .then_some(CaughtUp { answered_at, quiet_since: self.end.quiet_since })
    }
}

/// Whether everything that the broker holds was read.
#[derive(Debug)]
struct EndWatch {
    quiet_since: EventTime,
    met_end: bool,
    /// An end offset above the position, and since when it stayed.
    stays: Option<(i64, EventTime)>,
}

impl EndWatch {
    fn new(now: EventTime) -> Self {
        Self { quiet_since: now, met_end: false, stays: None }
    }

    fn record(&mut self, now: EventTime) {
        *self = Self::new(now);
    }

    fn is_reached(&mut self, next: i64, end: i64, answered_at: EventTime) -> bool {
        if next >= end {
            return true;
        }
        if !self.met_end {
            return false;
        }
        match self.stays {
            Some((stays, since)) if stays == end => answered_at.0 - since.0 >= END_SETTLE_MS,
            _ => {
                self.stays = Some((end, answered_at));
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::ingest::frame::{Reject, RejectReason, Value};
    use crate::types::TopicId;

    const POLICY: FlushPolicy =
        FlushPolicy { max_bytes: 1000, max_age_ms: 100, max_quiet_ms: 20, max_total_bytes: 5000 };

    fn partition(position: i64) -> Partition {
        let id = TopicPartition { topic: "t".into(), topic_id: TopicId("g1".into()), partition: 0 };
        let record =
            PositionRecord { partition: id, position: Some(position), watermark: None, caught_up: None };
        Partition::new(record, position, 1, EventTime(0))
    }

    fn record(offset: i64) -> Record {
        Record {
            topic: "t".into(),
            partition: 0,
            offset,
            key: None,
            timestamp: None,
            headers: vec![],
            value: Value::Bytes("record".into()),
        }
    }

    fn frame(offset: i64, captured_at: i64, bytes: usize) -> Decoded {
        let frame = Frame {
            offset,
            row: 0,
            stream_id: "s".into(),
            captured_at: EventTime(captured_at),
            label: None,
            image: Bytes::from(vec![0; bytes]),
        };
        Decoded { frames: vec![frame], ..Decoded::default() }
    }

    #[test]
    fn a_batch_holds_all_since_the_last_flush_and_nothing_twice() {
        let mut partition = partition(10);
        assert!(partition.take_batch().is_none());
        assert!(partition.take(&record(10), frame(10, 500, 10), EventTime(1)));
        let reject = Reject { reason: RejectReason::EmptyValue, row: None, detail: String::new() };
        let rejected = Decoded { rejects: vec![reject], ..Decoded::default() };
        assert!(partition.take(&record(14), rejected, EventTime(2)));
        assert!(!partition.take(&record(10), frame(10, 900, 10), EventTime(3)));
        let batch = partition.take_batch().unwrap();
        assert_eq!(batch.offsets, OffsetRange { start: 10, end: 15 });
        assert_eq!((batch.frames.len(), batch.dead_letters.len()), (1, 1));
        assert_eq!(batch.watermark, Some(EventTime(1)), "capped at the clock");
        partition.committed();
        assert!(partition.take_batch().is_none());
        assert_eq!(partition.bytes(), 0);
    }

    #[test]
    fn a_partition_is_due_by_bytes_age_quiet_and_punctuation() {
        let now = EventTime(1000);
        let at = |ms: i64| now.plus_ms(ms);
        let mut small = partition(0);
        assert!(!small.is_due(&POLICY, at(10_000)), "nothing to flush");
        small.take(&record(0), frame(0, 500, 10), now);
        assert!(!small.is_due(&POLICY, at(19)));
        assert!(small.is_due(&POLICY, at(20)), "quiet");
        for offset in 1..10 {
            small.take(&record(offset), Decoded::default(), at(offset * 10));
        }
        assert!(!small.is_due(&POLICY, at(99)));
        assert!(small.is_due(&POLICY, at(100)), "age");
        let mut large = partition(0);
        large.take(&record(0), frame(0, 500, 1000), now);
        assert!(large.is_due(&POLICY, now), "bytes");
        let mut punctuated = partition(0);
        let stated = Decoded { watermark: Some(EventTime(2000)), ..Decoded::default() };
        punctuated.take(&record(0), stated, now);
        assert!(punctuated.is_due(&POLICY, now), "punctuation");
        assert_eq!(punctuated.take_batch().unwrap().watermark, Some(EventTime(2000)));
    }

    #[test]
    fn a_partition_is_caught_up_at_its_end_with_nothing_in_memory() {
        let mut partition = partition(0);
        partition.take(&record(0), frame(0, 500, 10), EventTime(100));
        assert_eq!(partition.end_answered(1, EventTime(200)), None, "in memory");
        partition.take_batch();
        partition.committed();
        assert_eq!(partition.end_answered(2, EventTime(300)), None, "one more to read");
        let report = CaughtUp { answered_at: EventTime(400), quiet_since: EventTime(100) };
        assert_eq!(partition.end_answered(1, EventTime(400)), Some(report));
    }

    #[test]
    fn an_end_behind_markers_counts_once_it_was_met_and_stays() {
        let mut partition = partition(0);
        assert_eq!(partition.end_answered(2, EventTime(100)), None, "not met");
        partition.met_end();
        assert_eq!(partition.end_answered(2, EventTime(200)), None, "met just now");
        assert_eq!(partition.end_answered(2, EventTime(200 + END_SETTLE_MS - 1)), None);
        assert_eq!(partition.end_answered(3, EventTime(200 + END_SETTLE_MS)), None, "it grew");
        assert!(partition.end_answered(3, EventTime(200 + 2 * END_SETTLE_MS)).is_some());
        partition.take(&record(3), Decoded::default(), EventTime(9000));
        assert_eq!(partition.end_answered(5, EventTime(20_000)), None, "met no more");
    }
}
