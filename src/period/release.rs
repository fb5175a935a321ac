//! From an accepted candidate to a visible version.
//!
//! Number (one transaction, idempotent per attempt), files copied and verified, card, manifest last, then the
//! transaction that makes the version visible and moves `latest`. A crash anywhere repeats it from the start:
//! number and instant are the same, copies that are there stay, card and manifest get the same bytes again, even from a
//! process that has lost its lease without knowing it yet.

use std::collections::BTreeMap;

use serde_json::json;
use tracing::Instrument;

use super::history;
use super::job::JobSettings;
use crate::eval::forgetting::{History, HistoryError};
use crate::eval::gate::{GateLimits, Verdict};
use crate::eval::{Accuracies, Interval, Retention, Shape};
use crate::failpoint;
use crate::publish::manifest::{self, ByProbe, Manifest, ManifestError};
use crate::publish::{card, copy, file};
use crate::registry::{
    AttemptRecord, Lease, PeriodRecord, ProbeSetRecord, Publication, Published, Registry, RegistryError,
    Reservation, ScoreRecord, SegmentRecord, VersionRecord,
};
use crate::store::paths::Paths;
use crate::store::{Store, StoreError};
use crate::train::spec::{Outcome, output};
use crate::types::{EventTime, FileRef, PeriodId, Sha256, Version};

#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error(transparent)]
    History(#[from] HistoryError),
    #[error("the outcome lists no {0}")]
    Missing(&'static str),
}

/// One candidate on its way.
pub struct Release<'a> {
    pub registry: &'a dyn Registry,
    pub store: &'a Store,
    pub paths: &'a Paths,
    pub lease: &'a Lease,
    pub period: &'a PeriodRecord,
    pub attempt: &'a AttemptRecord,
    pub outcome: &'a Outcome,
    pub verdict: &'a Verdict,
    pub limits: &'a GateLimits,
    pub job: &'a JobSettings,
}

impl Release<'_> {
    pub async fn publish(&self, now: EventTime) -> Result<(Version, Published), ReleaseError> {
        let (period, number) = (self.period.id, self.attempt.number);
        let files = self.published_files();
        let reserved = self.registry.reserve_version(self.lease, period, number, &files, now).await?;
        let span = tracing::info_span!("publish", version = %reserved.version);
        let published = self.bring_out(reserved, files, now).instrument(span).await?;
        Ok((reserved.version, published))
    }

    /// Everything that is written here is a function of the reservation and of what was durable before it.
    async fn bring_out(
        &self,
        reserved: Reservation,
        files: Vec<FileRef>,
        now: EventTime,
    ) -> Result<Published, ReleaseError> {
        let version = reserved.version;
        let probe_set = self.keep_probe_set().await?;
        let scores = history::rows(version, &self.outcome.evaluation);
        let mut manifest = self.manifest(reserved, files, &scores).await?;
        let card = card::card(&manifest).into_bytes();
        let target = self.paths.version(version);
        failpoint::reach("publish.card.before");
        self.store.put(&format!("{target}/{}", file::CARD), card.clone().into()).await?;
        failpoint::reach("publish.card.after");
        let copied = manifest.files.clone();
        manifest.files.push(described(file::CARD, &card));
        let bytes = manifest.to_bytes()?;
        copy::copy_version(self.store, &self.start(), &target, &copied, bytes.clone().into()).await?;
        let mut files = manifest.files;
        files.push(described(file::MANIFEST, &bytes));
        let manifest = String::from_utf8_lossy(&bytes).into_owned();
        let publication = Publication { version, manifest, files, scores, probe_set };
        Ok(self.registry.publish(self.lease, &publication, now).await?)
    }

    /// The prefix of the start that left the outcome.
    fn start(&self) -> String {
        self.paths.start(self.period.id, self.attempt.number, self.attempt.start)
    }

    /// All of the outcome's files but the frames of the probe set, which are nobody's to pull.
    fn published_files(&self) -> Vec<FileRef> {
        let files = self.outcome.files.iter().filter(|file| file.path != output::PROBE_SET);
        files.cloned().collect()
    }

    /// Copies the candidate's probe set to where it outlives the attempt's files.
    async fn keep_probe_set(&self) -> Result<Option<ProbeSetRecord>, ReleaseError> {
        if self.outcome.evaluation.new_probe.is_none() {
            return Ok(None);
        }
        let set = self.outcome.files.iter().find(|file| file.path == output::PROBE_SET);
        let set = set.ok_or(ReleaseError::Missing(output::PROBE_SET))?;
        let source = FileRef { path: format!("{}/{}", self.start(), set.path), ..set.clone() };
        let bytes = self.store.get_verified(&source).await?;
        let path = self.paths.probe_set(self.period.id, &set.sha256);
        failpoint::reach("publish.probe_set.before");
        self.store.put(&path, bytes).await?;
        failpoint::reach("publish.probe_set.after");
        let file = FileRef { path, ..set.clone() };
        Ok(Some(ProbeSetRecord { period: self.period.id, file, frames: self.outcome.probe_frames }))
    }

    async fn manifest(
        &self,
        Reservation { version, reserved_at }: Reservation,
        files: Vec<FileRef>,
        scores: &[ScoreRecord],
    ) -> Result<Manifest, ReleaseError> {
        let Self { period, attempt, outcome, job, .. } = self;
        let segments = self.registry.segments(period.id).await?;
        let matrix = self.matrix(version, scores).await?;
        let span = manifest::Period {
            id: period.id,
            start: period.id.start(),
            end: period.end,
            frames: period.frames,
        };
        Ok(Manifest {
            schema: manifest::SCHEMA,
            pipeline: job.pipeline.clone(),
            version,
            parent: attempt.parent,
            published_at: reserved_at,
            program_version: outcome.program_version.clone(),
            device: outcome.device.clone(),
            periods: vec![span],
            segments: segments.iter().map(segment).collect(),
            training: manifest::Training {
                frames: outcome.train_frames,
                probe_frames: outcome.probe_frames,
                left_out: manifest::LeftOut {
                    copies: outcome.left_out.copies,
                    near_probe: outcome.left_out.near_probe,
                },
                steps: outcome.steps,
                seconds: outcome.seconds,
            },
            hyper_parameters: outcome.hyper_parameters.clone(),
            seeds: BTreeMap::from([("attempt".to_owned(), outcome.seed)]),
            metrics: self.metrics(version, &matrix),
            gate: self.gate(),
            files,
        })
    }

    /// A history of each probe's accuracies with the new version in it.
    async fn matrix(&self, version: Version, scores: &[ScoreRecord]) -> Result<[History; 3], ReleaseError> {
        let mut versions = self.registry.versions().await?;
        versions.retain(|record| record.visible);
        versions.push(VersionRecord {
            version,
            period: self.period.id,
            attempt: self.attempt.number,
            parent: self.attempt.parent,
            visible: true,
            files: vec![],
            manifest: None,
            published_at: None,
        });
        let mut all = self.registry.scores().await?;
        all.extend_from_slice(scores);
        let [knn, linear, few_shot] = history::PROBES;
        let of = |measure| history::of(&versions, &all, measure);
        Ok([of(knn)?, of(linear)?, of(few_shot)?])
    }

    fn metrics(&self, version: Version, matrix: &[History; 3]) -> manifest::Metrics {
        let evaluation = &self.outcome.evaluation;
        let mut probes: Vec<manifest::Probe> = evaluation
            .probes
            .iter()
            .map(|probe| {
                let drift = probe.drift.map(|drift| manifest::Drift {
                    against: drift.against,
                    cka: drift.cka,
                    neighbour_overlap: drift.neighbour_overlap,
                    neighbour_retention: drift.neighbour_retention,
                    recoverability: drift.recoverability,
                });
                let measured = (probe.period, probe.frames, &probe.accuracies, &probe.shape);
                manifest::Probe {
                    forgetting: forgetting(matrix, version, probe.period),
                    drift,
                    parent_retention: probe.parent_retention.map(described_retention),
                    ..described_probe(measured)
                }
            })
            .collect();
        probes.sort_by_key(|probe| probe.period);
        if let Some(new) = &evaluation.new_probe {
            let measured = (new.period, new.frames, &new.candidate, &new.shape);
            probes.push(described_probe(measured));
        }
        manifest::Metrics {
            average_accuracy: by_probe(matrix, |history| history.average_accuracy(version)),
            average_forgetting: by_probe(matrix, |history| history.average_forgetting(version)),
            backward_transfer: by_probe(matrix, |history| history.backward_transfer(version)),
            contrastive_loss: evaluation.new_probe.as_ref().map(|new| new.candidate_loss),
            reference_contrastive_loss: evaluation.new_probe.as_ref().map(|new| new.reference_loss),
            probes,
        }
    }

    fn gate(&self) -> manifest::Gate {
        let (verdict, reason) = match self.verdict {
            Verdict::Accepted => ("accepted", None),
            Verdict::Rejected { reason } => ("rejected", Some(reason.to_string())),
        };
        manifest::Gate { verdict: verdict.to_owned(), limits: json!(self.limits), reason }
    }
}

fn described(name: &str, bytes: &[u8]) -> FileRef {
    FileRef { path: name.to_owned(), sha256: Sha256::of(bytes), bytes: bytes.len() as u64 }
}

fn segment(record: &SegmentRecord) -> manifest::Segment {
    manifest::Segment {
        topic: record.partition.topic.clone(),
        topic_id: record.partition.topic_id.clone(),
        partition: record.partition.partition,
        offsets: record.flush,
        frames: record.frames,
        sha256: record.file.sha256.clone(),
    }
}

fn by_probe(matrix: &[History; 3], ask: impl Fn(&History) -> Option<f64>) -> ByProbe {
    let [knn, linear, few_shot] = matrix.each_ref().map(ask);
    ByProbe { knn, linear, few_shot }
}

fn forgetting(matrix: &[History; 3], version: Version, period: PeriodId) -> ByProbe {
    by_probe(matrix, |history| history.forgetting(version, period))
}

/// Compared with no other version.
fn described_probe(
    (period, frames, accuracies, shape): (PeriodId, u64, &Accuracies, &Shape),
) -> manifest::Probe {
    let Accuracies { knn, linear, few_shot } = *accuracies;
    manifest::Probe {
        period,
        frames,
        accuracy: ByProbe { knn, linear, few_shot },
        forgetting: ByProbe::default(),
        alignment: shape.alignment,
        uniformity: Some(shape.uniformity),
        effective_rank: Some(shape.effective_rank),
        drift: None,
        parent_retention: None,
    }
}

fn described_retention(Retention { against, kept }: Retention) -> manifest::Retention {
    let Interval { estimate, lower, upper } = kept;
    manifest::Retention { against, estimate, lower, upper }
}
