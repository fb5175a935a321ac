//! Every object name, in one place.
//!
//! ```text
//! PIPELINE/segments/PERIOD/TOPIC_ID/PARTITION/START-END-SHA256.parquet
//! PIPELINE/probes/PERIOD/SHA256.parquet
//! PIPELINE/init/SHA256.safetensors                 weights that the first period starts from
//! PIPELINE/attempts/PERIOD/aNNNN/sNNNNNN/...       one start of one attempt: job.json, checkpoints, candidate
//! PIPELINE/versions/vNNNNNN/...                    what is published
//! ```
//!
//! A segment's name holds the SHA-256 of its bytes, so writing it is idempotent, and the offset that its flush
//! started from, so that the sweep can tell whether its transaction can still commit.

use crate::types::{OffsetRange, PeriodId, Sha256, TopicId, Version};

/// The object names of one pipeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    pipeline: String,
}

/// What a segment's object name says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentName {
    pub period: PeriodId,
    pub topic_id: TopicId,
    pub partition: i32,
    /// The offsets of the whole flush that wrote it.
    pub flush: OffsetRange,
    pub sha256: Sha256,
}

impl Paths {
    /// `pipeline` is validated by the configuration: lower-case letters, digits and `-`.
    pub fn new(pipeline: impl Into<String>) -> Self {
        Self { pipeline: pipeline.into() }
    }

    /// Prefix of all segments.
    pub fn segments(&self) -> String {
        format!("{}/segments", self.pipeline)
    }

    pub fn segment(&self, name: &SegmentName) -> String {
        let SegmentName { period, topic_id, partition, flush, sha256 } = name;
        format!("{}/{period}/{topic_id}/{partition}/{flush}-{sha256}.parquet", self.segments())
    }

    /// Reads a segment's object name back; `None` if it is not one of ours.
    pub fn parse_segment(&self, path: &str) -> Option<SegmentName> {
        let rest = path.strip_prefix(&self.segments())?.strip_prefix('/')?;
        let parts: Vec<&str> = rest.split('/').collect();
        let [period, topic_id, partition, file] = parts.as_slice() else {
            return None;
        };
        let mut numbers = file.strip_suffix(".parquet")?.splitn(3, '-');
        let flush = OffsetRange { start: numbers.next()?.parse().ok()?, end: numbers.next()?.parse().ok()? };
        Some(SegmentName {
            period: period.parse().ok()?,
            topic_id: TopicId((*topic_id).to_owned()),
            partition: partition.parse().ok()?,
            flush,
            sha256: Sha256(numbers.next()?.to_owned()),
        })
    }

    pub fn probe_set(&self, period: PeriodId, sha256: &Sha256) -> String {
        format!("{}/probes/{period}/{sha256}.parquet", self.pipeline)
    }

    /// Weights that the first period starts from.
    pub fn initial_weights(&self, sha256: &Sha256) -> String {
        format!("{}/init/{sha256}.safetensors", self.pipeline)
    }

    /// Prefix of every start of every attempt at a period.
    pub fn attempts(&self, period: PeriodId) -> String {
        format!("{}/attempts/{period}", self.pipeline)
    }

    /// Prefix of one start of one attempt: nobody but that start writes below it.
    pub fn start(&self, period: PeriodId, attempt: u32, start: u64) -> String {
        format!("{}/a{attempt:04}/s{start:06}", self.attempts(period))
    }

    /// Prefix of a published version's files.
    pub fn version(&self, version: Version) -> String {
        format!("{}/versions/{version}", self.pipeline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::EventTime;

    #[test]
    fn a_segments_name_reads_back() {
        let paths = Paths::new("main");
        let name = SegmentName {
            period: PeriodId(EventTime(1_769_817_600_000)),
            topic_id: TopicId("g000001".into()),
            partition: 7,
            flush: OffsetRange { start: 120, end: 180 },
            sha256: Sha256::of(b"bytes"),
        };
        assert_eq!(paths.parse_segment(&paths.segment(&name)), Some(name));
        assert_eq!(paths.parse_segment("main/segments/stray.parquet"), None);
    }
}
