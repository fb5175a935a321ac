//! `manifest.json`: where a version comes from, what it is worth, and the hash of every file of it.
//!
//! Equal values give equal bytes: fields in the order below, the keys of free-form parts sorted. A reader ignores fields
//! that it does not know and refuses a `schema` above its own. A measure that was not taken is `null`. Instants are RFC 3339, for people who read it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::types::{EventTime, FileRef, OffsetRange, PeriodId, Sha256, TopicId, Version};

/// Major number of the manifest's form. New fields don't raise it; a changed meaning does.
pub const SCHEMA: u32 = 1;

#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Written by a newer program: read it with that.
    #[error("the manifest has schema {found}, this program reads up to {SCHEMA}")]
    NewerSchema { found: u32 },
    #[error("the manifest can't be read: {0}")]
    Malformed(#[source] serde_json::Error),
    #[error("the manifest can't be written: {0}")]
    Unwritable(#[source] serde_json::Error),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub schema: u32,
    pub pipeline: String,
    pub version: Version,
    /// The teacher; `null` starts a lineage.
    pub parent: Option<Version>,
    /// When its number was drawn; it became visible moments later.
    #[serde(with = "rfc3339")]
    pub published_at: EventTime,
    pub program_version: String,
    /// What it was trained on, such as `cpu`.
    pub device: String,
    /// The periods whose frames it was trained on; several where waiting ones were merged.
    pub periods: Vec<Period>,
    /// The objects of those frames, and the offsets of the flush that wrote each.
    pub segments: Vec<Segment>,
    pub training: Training,
    /// Model, method, optimiser, augmentation and probe settings, as the training job held them.
    pub hyper_parameters: Value,
    pub seeds: BTreeMap<String, u64>,
    pub metrics: Metrics,
    pub gate: Gate,
    /// Every file below the version's prefix but this one.
    pub files: Vec<FileRef>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Period {
    pub id: PeriodId,
    /// Half open.
    #[serde(with = "rfc3339")]
    pub start: EventTime,
    #[serde(with = "rfc3339")]
    pub end: EventTime,
    pub frames: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    pub topic: String,
    pub topic_id: TopicId,
    pub partition: i32,
    pub offsets: OffsetRange,
    pub frames: u64,
    pub sha256: Sha256,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// Frames trained on, and frames set apart for the probe set.
    pub frames: u64,
    pub probe_frames: u64,
    /// Frames of the period that are in neither for being a copy, or like a probe frame. Absent in the first manifests.
    #[serde(default)]
    pub left_out: LeftOut,
    pub steps: u64,
    /// Wall-clock seconds of the start that ran to its end.
    pub seconds: f64,
}

/// Counts of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LeftOut {
    pub copies: u64,
    pub near_probe: u64,
}

/// A score for each labelled probe, 0..1 (or a difference of two).
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct ByProbe {
    pub knn: Option<f64>,
    pub linear: Option<f64>,
    pub few_shot: Option<f64>,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Metrics {
    pub average_accuracy: ByProbe,
    pub average_forgetting: ByProbe,
    pub backward_transfer: ByProbe,
    /// NT-Xent on the new period's probe set, and that of the teacher (or the initial weights) on the same views.
    pub contrastive_loss: Option<f64>,
    pub reference_contrastive_loss: Option<f64>,
    /// By period, the oldest first; the new one is the last.
    pub probes: Vec<Probe>,
}

/// The version on one period's probe set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    pub period: PeriodId,
    pub frames: u64,
    pub accuracy: ByProbe,
    /// Against the best ancestor; `null` for the new period.
    pub forgetting: ByProbe,
    pub alignment: Option<f64>,
    pub uniformity: Option<f64>,
    pub effective_rank: Option<f64>,
    /// Against the version that learned the period.
    pub drift: Option<Drift>,
    /// From the parent: what the gate goes by where labels don't clear the version.
    pub parent_retention: Option<Retention>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Drift {
    pub against: Version,
    pub cka: f64,
    pub neighbour_overlap: f64,
    /// Absent from manifests of programs that did not measure it.
    pub neighbour_retention: Option<f64>,
    pub recoverability: Option<f64>,
}

/// How much of another version's neighbourhoods is left, at most 1, with the bounds of its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Retention {
    pub against: Version,
    pub estimate: f64,
    pub lower: f64,
    pub upper: f64,
}

/// What the gate said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gate {
    /// `accepted`: a refused candidate gets no manifest.
    pub verdict: String,
    /// The limits that held, and the reason of a refusal.
    pub limits: Value,
    pub reason: Option<String>,
}

impl Manifest {
    /// Canonical bytes: equal manifests give equal bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ManifestError> {
        let mut sorted = self.clone();
        sorted.hyper_parameters = sort_keys(sorted.hyper_parameters);
        sorted.gate.limits = sort_keys(sorted.gate.limits);
        let mut bytes = serde_json::to_vec_pretty(&sorted).map_err(ManifestError::Unwritable)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Reads a manifest of this or an older schema, whatever fields a newer program has added.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        struct Head {
            schema: u32,
        }
        // The schema alone first: a newer one may not have the other fields.
        let head: Head = serde_json::from_slice(bytes).map_err(ManifestError::Malformed)?;
        if head.schema > SCHEMA {
            return Err(ManifestError::NewerSchema { found: head.schema });
        }
        serde_json::from_slice(bytes).map_err(ManifestError::Malformed)
    }

    /// The entry of the file with that name.
    pub fn file(&self, path: &str) -> Option<&FileRef> {
        self.files.iter().find(|file| file.path == path)
    }
}

/// Whether `serde_json` keeps a map's keys in insertion order depends on features that any dependency may turn on.
fn sort_keys(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<String, Value> =
                map.into_iter().map(|(key, value)| (key, sort_keys(value))).collect();
            Value::Object(sorted.into_iter().collect())
        }
        Value::Array(values) => Value::Array(values.into_iter().map(sort_keys).collect()),
        other => other,
    }
}

mod rfc3339 {
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::types::EventTime;

    pub fn serialize<S: Serializer>(instant: &EventTime, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(instant)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<EventTime, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
pub(super) mod tests;
