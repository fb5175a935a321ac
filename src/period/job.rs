//! Builds the job file: what the registry knows, turned into all that the training process needs.
//!
//! A job is a function of the registry's records and the settings. The part that decides the weights
//! ([`Recipe`]) is the same for every start of an attempt, because everything it is made of is fixed when the
//! attempt begins: the segments are sealed, the parent is the attempt's, probe sets come from the parent's line.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;

use sha2::Digest;

use super::history;
use crate::eval::Ancestor;
use crate::eval::forgetting::{History, HistoryError};
use crate::registry::{
    AttemptRecord, LATEST, Lineage, PeriodRecord, ProbeSetRecord, Registry, RegistryError, ScoreRecord,
    SegmentRecord, VersionRecord,
};
use crate::store::paths::Paths;
use crate::train::spec::{
    Augmentation, Composition, KeptEmbedding, Method, ModelSpec, Optimisation, PrecisionChoice, ProbeInput,
    ProbeSpec, Recipe, SCHEMA, SegmentInput, Teacher, TrainJob, output,
};
use crate::types::{FileRef, PeriodId, Version};

/// The settings that every job of a deployment shares.
#[derive(Debug, Clone, PartialEq)]
pub struct JobSettings {
    pub pipeline: String,
    pub seed: u64,
    pub max_frames: u64,
    pub model: ModelSpec,
    /// Another model than that of `latest` may start anew.
    pub new_lineage: bool,
    pub method: Method,
    /// Of a period with a teacher.
    pub teacher_share: f64,
    pub optimisation: Optimisation,
    /// Steps of the first period, which has no teacher.
    pub first_steps: u64,
    pub augmentation: Augmentation,
    pub composition: Composition,
    pub probe: ProbeSpec,
    /// Probe sets of so many newest periods are measured, and the first period's.
    pub probe_keep: usize,
    pub device: String,
    pub precision: PrecisionChoice,
    pub micro_batch: Option<NonZeroUsize>,
    pub threads: usize,
    pub checkpoint_steps: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    History(#[from] HistoryError),
    #[error(
        "`latest` names {version}, whose {field} is {found}, configured is {configured}: set model.new_lineage = true \
         to start anew, or change it back"
    )]
    OtherModel { version: Version, field: String, found: String, configured: String },
    #[error("version {version} has no file {name}")]
    MissingFile { version: Version, name: String },
}

/// What the next attempt descends from: the version that `latest` names, or nothing if there is none or if it is
/// of another model and the settings allow a new lineage.
pub async fn lineage(registry: &dyn Registry, settings: &JobSettings) -> Result<Lineage, JobError> {
    let Some(latest) = registry.aliases().await?.get(LATEST).copied() else { return Ok(Lineage::Continued) };
    let manifest = registry.version(latest).await?.manifest.unwrap_or_default();
    let manifest: serde_json::Value = serde_json::from_str(&manifest)
        .map_err(|_| RegistryError::Corrupt { what: "a manifest", value: manifest })?;
    let configured = serde_json::json!(settings.model);
    let found = &manifest["hyper_parameters"]["model"];
    // Where the first weights came from does not matter to those that descend from them.
    let fields = configured.as_object().into_iter().flatten().filter(|(field, _)| *field != "init");
    let Some((field, value)) = fields.into_iter().find(|(field, value)| found[field] != **value) else {
        return Ok(Lineage::Continued);
    };
    if settings.new_lineage {
        return Ok(Lineage::New);
    }
    Err(JobError::OtherModel {
        version: latest,
        field: format!("model.{field}"),
        found: found[field].to_string(),
        configured: value.to_string(),
    })
}

/// The job of one start of an attempt.
pub async fn build(
    registry: &dyn Registry,
    paths: &Paths,
    settings: &JobSettings,
    period: &PeriodRecord,
    attempt: &AttemptRecord,
) -> Result<TrainJob, JobError> {
    let segments = registry.segments(period.id).await?;
    let versions = registry.versions().await?;
    let published = PublishedFiles { paths, versions: &versions };
    let teacher = attempt.parent.map(|parent| published.teacher(parent)).transpose()?;
    let probe_sets = match attempt.parent {
        Some(parent) => {
            let scores = registry.scores().await?;
            let sets = chosen_probe_sets(registry.probe_sets().await?, &scores, parent, settings.probe_keep);
            let measured = history::of(&versions, &scores, history::EFFECTIVE_RANK)?;
            let knn = history::of(&versions, &scores, history::KNN)?;
            let inputs = sets.iter().map(|set| published.probe_input(set, parent, &measured, &knn));
            inputs.collect::<Result<_, _>>()?
        }
        None => Vec::new(),
    };
    let first = teacher.is_none();
    let mut optimisation = settings.optimisation.clone();
    if first {
        optimisation.steps = settings.first_steps;
    }
    let recipe = Recipe {
        period: period.id,
        period_end: period.end,
        seed: attempt_seed(settings.seed, period.id, period.retries),
        segments: segments.iter().map(segment_input).collect(),
        max_frames: settings.max_frames,
        model: settings.model.clone(),
        teacher,
        method: if first { Method::Finetune } else { settings.method },
        teacher_share: if first { 0.0 } else { settings.teacher_share },
        optimisation,
        augmentation: settings.augmentation.clone(),
        composition: settings.composition,
        probe: settings.probe.clone(),
        probe_sets,
    };
    Ok(TrainJob {
        schema: SCHEMA,
        pipeline: settings.pipeline.clone(),
        attempt: attempt.number,
        start: attempt.start,
        output_prefix: paths.start(period.id, attempt.number, attempt.start),
        earlier_prefixes: (1..attempt.start)
            .rev()
            .map(|s| paths.start(period.id, attempt.number, s))
            .collect(),
        device: settings.device.clone(),
        precision: settings.precision,
        micro_batch: settings.micro_batch,
        threads: settings.threads,
        checkpoint_steps: settings.checkpoint_steps,
        recipe,
    })
}

/// A function of the configured seed, the period and the operator's retries: a crash doesn't change it, a retry does.
fn attempt_seed(seed: u64, period: PeriodId, retries: u32) -> u64 {
    let mut hash = sha2::Sha256::new();
    hash.update(b"palimpsest attempt seed");
    hash.update(seed.to_le_bytes());
    hash.update(period.start().as_ms().to_le_bytes());
    hash.update(retries.to_le_bytes());
    let digest = hash.finalize();
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    u64::from_le_bytes(first)
}

fn segment_input(segment: &SegmentRecord) -> SegmentInput {
    SegmentInput {
        partition: segment.partition.clone(),
        flush_start: segment.flush.start,
        file: segment.file.clone(),
    }
}

/// Of the sets that the parent was measured on, the newest `keep` and the first.
fn chosen_probe_sets(
    mut sets: Vec<ProbeSetRecord>,
    scores: &[ScoreRecord],
    parent: Version,
    keep: usize,
) -> Vec<ProbeSetRecord> {
    let measured: BTreeSet<PeriodId> =
        scores.iter().filter(|score| score.version == parent).map(|score| score.period).collect();
    sets.retain(|set| measured.contains(&set.period));
    sets.sort_by_key(|set| set.period);
    let older = sets.len().saturating_sub(keep);
    if older > 1 {
        sets.drain(1..older);
    }
    sets
}

/// The files of published versions, under their full object names.
struct PublishedFiles<'a> {
    paths: &'a Paths,
    versions: &'a [VersionRecord],
}

impl PublishedFiles<'_> {
    fn file(&self, version: Version, name: &str) -> Result<FileRef, JobError> {
        let missing = || JobError::MissingFile { version, name: name.to_owned() };
        let record = self.versions.iter().find(|record| record.version == version).ok_or_else(missing)?;
        let file = record.files.iter().find(|file| file.path == name).ok_or_else(missing)?;
        Ok(FileRef { path: format!("{}/{name}", self.paths.version(version)), ..file.clone() })
    }

    fn teacher(&self, version: Version) -> Result<Teacher, JobError> {
        Ok(Teacher {
            version,
            encoder: self.file(version, output::ENCODER)?,
            projector: self.file(version, output::PROJECTOR)?,
        })
    }

    /// A set with the embeddings of the ancestor that learned its period, of the best one and of the parent.
    fn probe_input(
        &self,
        set: &ProbeSetRecord,
        parent: Version,
        measured: &History,
        knn: &History,
    ) -> Result<ProbeInput, JobError> {
        let roles = [
            (Ancestor::Learned, measured.learned(parent, set.period)),
            (Ancestor::Best, knn.best(parent, set.period)),
            (Ancestor::Parent, Some(parent)),
        ];
        let name = output::probe_embeddings(set.period);
        let kept = roles.into_iter().filter_map(|(role, version)| Some((role, version?)));
        let embeddings = kept
            .map(|(role, version)| Ok(KeptEmbedding { version, role, file: self.file(version, &name)? }))
            .collect::<Result<_, JobError>>()?;
        Ok(ProbeInput { period: set.period, file: set.file.clone(), embeddings })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{EventTime, Sha256};

    fn period(n: u64) -> PeriodId {
        PeriodId(EventTime(n as i64 * 1000))
    }

    fn version(n: u64, parent: Option<u64>) -> VersionRecord {
        let files = (1..=n).map(|p| file(&output::probe_embeddings(period(p)))).collect();
        VersionRecord {
            version: Version(n),
            period: period(n),
            attempt: 1,
            parent: parent.map(Version),
            visible: true,
            files,
            manifest: None,
            published_at: None,
        }
    }

    fn file(path: &str) -> FileRef {
        FileRef { path: path.to_owned(), sha256: Sha256::of(path.as_bytes()), bytes: 1 }
    }

    fn set(n: u64) -> ProbeSetRecord {
        ProbeSetRecord { period: period(n), file: file("set"), frames: 10 }
    }

    #[test]
    fn a_retry_changes_the_seed_and_nothing_else_does() {
        assert_eq!(attempt_seed(1, period(1), 0), attempt_seed(1, period(1), 0));
        assert_ne!(attempt_seed(1, period(1), 0), attempt_seed(1, period(1), 1));
        assert_ne!(attempt_seed(1, period(1), 0), attempt_seed(1, period(2), 0));
        assert_ne!(attempt_seed(1, period(1), 0), attempt_seed(2, period(1), 0));
    }

    fn score(version: u64, set: u64, value: f64) -> ScoreRecord {
        ScoreRecord { version: Version(version), period: period(set), measure: "knn".into(), value }
    }

    #[test]
    fn probe_sets_are_the_newest_and_the_first_of_those_that_the_parent_was_measured_on() {
        // Period 3's version was rolled back: the parent never saw its set.
        let scores: Vec<_> = [1, 2, 4, 5].map(|set| score(5, set, 0.5)).into();
        let chosen = chosen_probe_sets((1..=5).map(set).collect(), &scores, Version(5), 2);
        assert_eq!(chosen.iter().map(|set| set.period).collect::<Vec<_>>(), [1, 4, 5].map(period));
        assert!(chosen_probe_sets((1..=5).map(set).collect(), &scores, Version(6), 2).is_empty());
    }

    #[test]
    fn a_set_comes_with_the_version_that_learned_it_the_best_and_the_parent() {
        let versions = [version(1, None), version(2, Some(1)), version(3, Some(2))];
        let scores = [score(1, 1, 0.7), score(2, 1, 0.9), score(3, 1, 0.8)];
        let knn = history::of(&versions, &scores, history::KNN).unwrap();
        let published = PublishedFiles { paths: &Paths::new("main"), versions: &versions };
        let input = published.probe_input(&set(1), Version(3), &knn, &knn).unwrap();
        let roles: Vec<_> = input.embeddings.iter().map(|kept| (kept.role, kept.version.0)).collect();
        assert_eq!(roles, [(Ancestor::Learned, 1), (Ancestor::Best, 2), (Ancestor::Parent, 3)]);
        let learned = &input.embeddings[0].file.path;
        assert_eq!(learned, "main/versions/v000001/probe_embeddings/19700101T000001Z.safetensors");
    }
}
