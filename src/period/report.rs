//! What the learner does, told in metrics.

use std::collections::BTreeMap;

use metrics::{counter, gauge, histogram};

use super::controller::LearnError;
use super::history;
use crate::eval::gate::Verdict;
use crate::metrics as names;
use crate::registry::{LATEST, PeriodRecord, PeriodState, Registry};
use crate::train::spec::Progress;
use crate::types::EventTime;

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

/// What the newest published version is worth on each probe set, and what it has forgotten.
pub async fn versions(registry: &dyn Registry) -> Result<(), LearnError> {
    let Some(latest) = registry.aliases().await?.get(LATEST).copied() else { return Ok(()) };
    let versions = registry.versions().await?;
    let scores = registry.scores().await?;
    gauge!(names::LATEST_VERSION).set(latest.0 as f64);
    let published = versions.iter().find(|record| record.version == latest).and_then(|v| v.published_at);
    if let Some(at) = published {
        gauge!(names::LATEST_PUBLISHED).set(at.as_seconds());
    }
    let sets = registry.probe_sets().await?;
    for probe in history::PROBES {
        let history = history::of(&versions, &scores, probe)?;
        // A period that `latest` was not measured on is not known, whatever an earlier version scored.
        for period in sets.iter().map(|set| set.period) {
            let labels = [("probe", probe.to_owned()), ("period", period.to_string())];
            gauge!(names::EVAL_ACCURACY, &labels).set(history.score(latest, period).unwrap_or(f64::NAN));
            gauge!(names::FORGETTING, &labels).set(history.forgetting(latest, period).unwrap_or(f64::NAN));
        }
        let average = history.average_forgetting(latest).unwrap_or(f64::NAN);
        gauge!(names::FORGETTING_AVERAGE, "probe" => probe).set(average);
        let transfer = history.backward_transfer(latest).unwrap_or(f64::NAN);
        gauge!(names::BACKWARD_TRANSFER, "probe" => probe).set(transfer);
    }
    for score in scores.iter().filter(|score| score.version == latest && score.measure == history::CKA) {
        gauge!(names::CKA, "period" => score.period.to_string()).set(score.value);
    }
    let own = versions.iter().find(|record| record.version == latest).map(|record| record.period);
    let rank = history::of(&versions, &scores, history::EFFECTIVE_RANK)?;
    let rank = own.and_then(|period| rank.score(latest, period)).unwrap_or(f64::NAN);
    gauge!(names::EFFECTIVE_RANK).set(rank);
    Ok(())
}
