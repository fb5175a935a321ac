//! Between the registry's rows and the matrix R: which measures are kept under which names, and a history of each.

use std::collections::BTreeMap;

use crate::eval::forgetting::{History, HistoryError};
use crate::eval::{Accuracies, Evaluation, Shape};
use crate::registry::{ScoreRecord, VersionRecord};
use crate::types::{PeriodId, Version};

/// Accuracies of the probes, which need labels.
pub const PROBES: [&str; 3] = [KNN, "linear", "few_shot"];
/// The probe that gates and tables go by.
pub const KNN: &str = "knn";
/// RankMe: measured on every probe set of every version, labelled or not.
pub const EFFECTIVE_RANK: &str = "effective_rank";
pub const CKA: &str = "cka";
pub const NEIGHBOUR_RETENTION: &str = "neighbour_retention";
pub const PARENT_RETENTION: &str = "parent_retention";

/// One measure over all published versions.
pub fn of(
    versions: &[VersionRecord],
    scores: &[ScoreRecord],
    measure: &str,
) -> Result<History, HistoryError> {
    let visible = versions.iter().filter(|record| record.visible);
    let parents = visible.map(|record| (record.version, record.parent)).collect();
    let cells = scores.iter().filter(|score| score.measure == measure);
    History::new(parents, cells.map(|score| ((score.version, score.period), score.value)).collect())
}

/// The rows that a version's evaluation adds: its own period's and those of the earlier ones.
pub fn rows(version: Version, evaluation: &Evaluation) -> Vec<ScoreRecord> {
    let mut rows = Rows { version, found: BTreeMap::new() };
    if let Some(new) = &evaluation.new_probe {
        rows.add_all(new.period, &new.candidate, &new.shape);
    }
    for probe in &evaluation.probes {
        rows.add_all(probe.period, &probe.accuracies, &probe.shape);
        if let Some(drift) = &probe.drift {
            rows.add(probe.period, CKA, Some(drift.cka));
            rows.add(probe.period, "neighbour_overlap", Some(drift.neighbour_overlap));
            rows.add(probe.period, NEIGHBOUR_RETENTION, drift.neighbour_retention);
            rows.add(probe.period, "recoverability", drift.recoverability);
        }
        rows.add(probe.period, PARENT_RETENTION, probe.parent_retention.map(|found| found.kept.estimate));
    }
    rows.found.into_values().collect()
}

struct Rows {
    version: Version,
    found: BTreeMap<(PeriodId, &'static str), ScoreRecord>,
}

impl Rows {
    fn add_all(&mut self, period: PeriodId, accuracies: &Accuracies, shape: &Shape) {
        let Accuracies { knn, linear, few_shot } = *accuracies;
        for (measure, value) in PROBES.into_iter().zip([knn, linear, few_shot]) {
            self.add(period, measure, value);
        }
        self.add(period, EFFECTIVE_RANK, Some(shape.effective_rank));
        self.add(period, "uniformity", Some(shape.uniformity));
        self.add(period, "alignment", shape.alignment);
    }

    fn add(&mut self, period: PeriodId, measure: &'static str, value: Option<f64>) {
        let Some(value) = value else { return };
        let record = ScoreRecord { version: self.version, period, measure: measure.to_owned(), value };
        self.found.insert((period, measure), record);
    }
}
