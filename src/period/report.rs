//! What the learner does, told in metrics.

use std::collections::{BTreeMap, BTreeSet};

use metrics::{counter, gauge, histogram};

use super::controller::LearnError;
use super::history;
use crate::eval::forgetting::HistoryError;
use crate::eval::gate::Verdict;
use crate::metrics as names;
use crate::registry::{PeriodRecord, PeriodState, Registry, ScoreRecord, VersionRecord};
use crate::train::spec::Progress;
use crate::types::{EventTime, PeriodId, Version};

/// One line of the training process.
pub fn progress(progress: &Progress, batch: usize) {
    match progress {
        Progress::Loaded { steps, .. } => gauge!(names::TRAIN_STEPS).set(*steps as f64),
        Progress::Resumed { step } | Progress::Trained { step } => {
            gauge!(names::TRAIN_STEP).set(*step as f64)
        }
        Progress::Step { step, steps, total, ntxent, distillation, images_per_second, .. } => {
            gauge!(names::TRAIN_STEP).set(*step as f64);
            gauge!(names::TRAIN_STEPS).set(*steps as f64);
            for (term, value) in [("total", total), ("ntxent", ntxent), ("distillation", distillation)] {
                gauge!(names::TRAIN_LOSS, "term" => term).set(*value);
            }
            counter!(names::TRAIN_IMAGES).increment(batch as u64);
            gauge!(names::TRAIN_IMAGES_PER_SECOND).set(*images_per_second);
        }
        _ => {}
    }
}

/// Periods and their frames by state.
pub fn periods(periods: &[PeriodRecord]) {
    let mut by_state: BTreeMap<PeriodState, (u64, u64)> = BTreeMap::new();
    for record in periods {
        let (count, frames) = by_state.entry(record.state).or_default();
        *count += 1;
        *frames += record.frames;
    }
    for state in PeriodState::ALL {
        let (count, frames) = by_state.get(&state).copied().unwrap_or_default();
        gauge!(names::PERIODS, "state" => state.as_str()).set(count as f64);
        gauge!(names::PERIOD_FRAMES, "state" => state.as_str()).set(frames as f64);
    }
}

pub fn verdict(verdict: &Verdict) {
    let (verdict, reason) = match verdict {
        Verdict::Accepted => ("accepted", "none"),
        Verdict::Rejected { reason } => ("rejected", reason.name()),
    };
    counter!(names::GATE_VERDICTS, "verdict" => verdict, "reason" => reason).increment(1);
}

/// From the end of a period to its publication.
pub fn closed(record: &PeriodRecord, now: EventTime) {
    let seconds = now.as_seconds() - record.end.as_seconds();
    histogram!(names::PERIOD_CLOSE_SECONDS).record(seconds.max(0.0));
}

/// What was told of the newest published version, over all the time that this process lives: a series can't be taken
/// back, so those of a period that a newer version was not measured on must be told to be unknown.
#[derive(Default)]
pub struct Told {
    version: Option<Version>,
    /// The periods that have series with a value.
    periods: BTreeSet<PeriodId>,
}

/// Everything that `latest` is measured by.
struct Measured<'a> {
    latest: Version,
    versions: &'a [VersionRecord],
    scores: &'a [ScoreRecord],
}

impl Told {
    /// What `latest` is worth on each probe set, and what it has forgotten; nothing if it was told already.
    pub async fn latest(&mut self, registry: &dyn Registry, latest: Version) -> Result<(), LearnError> {
        if self.version == Some(latest) {
            return Ok(());
        }
        let (versions, scores) = (registry.versions().await?, registry.scores().await?);
        self.measured(&Measured { latest, versions: &versions, scores: &scores })?;
        self.version = Some(latest);
        Ok(())
    }

    /// A period gets series when a version is measured on it, and not for being there: `probe.keep` of them are
    /// measured, while there are more for ever.
    fn measured(&mut self, measured: &Measured) -> Result<(), HistoryError> {
        let Measured { latest, versions, scores } = *measured;
        let own = scores.iter().filter(|score| score.version == latest);
        let periods: BTreeSet<PeriodId> = own.map(|score| score.period).collect();
        let with_series: Vec<PeriodId> = periods.union(&self.periods).copied().collect();
        for probe in history::PROBES {
            let history = history::of(versions, scores, probe)?;
            for &period in &with_series {
                let labels = [("probe", probe.to_owned()), ("period", period.to_string())];
                let accuracy = history.score(latest, period).unwrap_or(f64::NAN);
                gauge!(names::EVAL_ACCURACY, &labels).set(accuracy);
                let forgetting = history.forgetting(latest, period).unwrap_or(f64::NAN);
                gauge!(names::FORGETTING, &labels).set(forgetting);
            }
            let average = history.average_forgetting(latest).unwrap_or(f64::NAN);
            gauge!(names::FORGETTING_AVERAGE, "probe" => probe).set(average);
            let transfer = history.backward_transfer(latest).unwrap_or(f64::NAN);
            gauge!(names::BACKWARD_TRANSFER, "probe" => probe).set(transfer);
        }
        let drifts = [
            (history::CKA, names::CKA, None),
            (history::NEIGHBOUR_RETENTION, names::NEIGHBOUR_RETENTION, Some("learned")),
            (history::PARENT_RETENTION, names::NEIGHBOUR_RETENTION, Some("parent")),
        ];
        for (measure, name, against) in drifts {
            let history = history::of(versions, scores, measure)?;
            for &period in &with_series {
                let mut labels = vec![("period", period.to_string())];
                labels.extend(against.map(|against| ("against", against.to_owned())));
                gauge!(name, &labels).set(history.score(latest, period).unwrap_or(f64::NAN));
            }
        }
        self.periods = periods;
        version(measured)
    }
}

/// The newest version itself.
fn version(Measured { latest, versions, scores }: &Measured) -> Result<(), HistoryError> {
    gauge!(names::LATEST_VERSION).set(latest.0 as f64);
    let record = versions.iter().find(|record| record.version == *latest);
    if let Some(at) = record.and_then(|record| record.published_at) {
        gauge!(names::LATEST_PUBLISHED).set(at.as_seconds());
    }
    let rank = history::of(versions, scores, history::EFFECTIVE_RANK)?;
    let rank = record.and_then(|record| rank.score(*latest, record.period)).unwrap_or(f64::NAN);
    gauge!(names::EFFECTIVE_RANK).set(rank);
    Ok(())
}

#[cfg(test)]
mod tests {
    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;

    fn period(number: i64) -> PeriodId {
        PeriodId(EventTime(number * 86_400_000))
    }

    /// Version N learned period N and was measured by kNN, CKA and retention from the parent on the periods `on`.
    fn published(number: u64, on: &[i64]) -> (VersionRecord, Vec<ScoreRecord>) {
        let version = Version(number);
        let record = VersionRecord {
            version,
            period: period(number as i64),
            attempt: 1,
            parent: (number > 1).then(|| Version(number - 1)),
            visible: true,
            files: vec![],
            manifest: None,
            published_at: Some(EventTime(1000)),
        };
        let score = |on: i64, measure: &str| {
            let value = 0.5 + 0.01 * number as f64;
            ScoreRecord { version, period: period(on), measure: measure.into(), value }
        };
        let measures = [history::KNN, history::CKA, history::PARENT_RETENTION];
        let scores = on.iter().flat_map(|&on| measures.map(|measure| score(on, measure))).collect();
        (record, scores)
    }

    #[test]
    fn only_periods_that_a_version_was_measured_on_have_series_and_unknown_ones_say_so() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let (first, mut scores) = published(1, &[0, 1]);
        let (second, more) = published(2, &[1, 2]);
        scores.extend(more);
        let versions = [first, second];
        let mut told = Told::default();
        metrics::with_local_recorder(&recorder, || {
            for latest in [Version(1), Version(2)] {
                told.measured(&Measured { latest, versions: &versions, scores: &scores }).unwrap();
            }
        });
        let text = recorder.handle().render();
        let value = |name: &str, on: i64| {
            let label = format!("period=\"{}\"", period(on));
            let line = text.lines().find(|line| {
                line.starts_with(name)
                    && line.contains(&label)
                    && !line.contains("linear")
                    && !line.contains("few")
                    && !line.contains("learned")
            });
            line.map(|line| line.rsplit(' ').next().unwrap_or_default().to_owned())
        };
        for name in [names::EVAL_ACCURACY, names::CKA, names::NEIGHBOUR_RETENTION] {
            assert_eq!(value(name, 0).as_deref(), Some("NaN"), "{text}");
            assert_eq!(value(name, 1).as_deref(), Some("0.52"), "{text}");
            assert_eq!(value(name, 2).as_deref(), Some("0.52"), "{text}");
            assert_eq!(value(name, 3), None, "{text}");
        }
        assert_eq!(told.periods, [period(1), period(2)].into());
    }
}
