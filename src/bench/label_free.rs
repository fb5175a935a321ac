//! The measures that need no labels, beside what the probes say was forgotten: which of them an operator without labels can go by, and
//! where the gate's limit lies.

use std::fmt::Write as _;
use std::ops::Range;

use super::measure::{DriftScores, Scores};
use super::report::{is_measured_on_all, plain, sequences};
use super::results::{Probe, Results, RunResult, period_id};
use super::statistics::rank_correlation;
use crate::eval::forgetting::History;
use crate::types::Version;

/// A measure without labels, of a version on a period that an earlier one learned.
struct LabelFree {
    name: &'static str,
    /// Larger is expected with more forgetting.
    of: fn(&Scores, &Scores) -> Option<f64>,
    digits: usize,
}

/// Each takes a version's scores and those of the version that learned the period.
const LABEL_FREE: [LabelFree; 8] = [
    LabelFree { name: "1 - CKA", of: |new, _| Some(1.0 - new.drift?.cka), digits: 3 },
    LabelFree {
        name: "1 - neighbour overlap",
        of: |new, _| Some(1.0 - new.drift?.neighbour_overlap),
        digits: 3,
    },
    LabelFree {
        name: "1 - neighbour retention",
        of: |new, _| Some(1.0 - new.drift?.neighbour_retention?),
        digits: 3,
    },
    LabelFree { name: "1 - recoverability", of: |new, _| Some(1.0 - new.drift?.recoverability), digits: 3 },
    LabelFree {
        name: "rise of the contrastive loss",
        of: |new, old| Some(new.contrastive_loss - old.contrastive_loss),
        digits: 3,
    },
    LabelFree { name: "rise of alignment", of: |new, old| Some(new.alignment - old.alignment), digits: 3 },
    LabelFree { name: "rise of uniformity", of: |new, old| Some(new.uniformity - old.uniformity), digits: 3 },
    LabelFree {
        name: "fall of the effective rank",
        of: |new, old| Some(old.effective_rank - new.effective_rank),
        digits: 2,
    },
];

/// Every measure of each method's newest version.
pub fn newest(text: &mut String, results: &Results) {
    text.push_str("Measures without labels of the newest version on the earlier periods, against the version that learned each:\n\n| method |");
    LABEL_FREE.iter().for_each(|measure| {
        let _ = write!(text, " {} |", measure.name);
    });
    let _ = write!(text, "\n|---|{}\n", "--:|".repeat(LABEL_FREE.len()));
    for method in sequences(results).into_iter().filter(|method| is_measured_on_all(results, method)) {
        let runs = results.of(method);
        let cells = LABEL_FREE.iter().map(|measure| {
            let newest = |run: &&RunResult| {
                changes(run, measure, run.versions.len().saturating_sub(1)..run.versions.len())
            };
            let values: Vec<f64> = runs.iter().flat_map(newest).map(|(value, _)| value).collect();
            plain(&values, measure.digits)
        });
        let _ = writeln!(text, "| `{method}` | {} |", cells.collect::<Vec<_>>().join(" | "));
    }
    text.push('\n');
}

/// Which of them ranks runs as their forgetting does.
pub fn correlations(text: &mut String, results: &Results) {
    text.push_str(
        "Spearman's rank correlation of each measure with forgetting, over every version and earlier period of all runs \
         (`joint` left out):\n\n| measure | pairs | linear | kNN | 10-shot |\n|---|--:|--:|--:|--:|\n",
    );
    let runs: Vec<&RunResult> = results.runs.iter().filter(|run| run.is_sequence()).collect();
    for measure in &LABEL_FREE {
        let pairs: Vec<(f64, [f64; 3])> =
            runs.iter().flat_map(|run| changes(run, measure, 0..run.versions.len())).collect();
        let cell = |probe: usize| {
            let pairs: Vec<(f64, f64)> = pairs.iter().map(|(value, lost)| (*value, lost[probe])).collect();
            rank_correlation(&pairs).map_or("-".to_owned(), |rho| format!("{rho:.2}"))
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} |",
            measure.name,
            pairs.len(),
            cell(0),
            cell(1),
            cell(2)
        );
    }
    text.push('\n');
}

/// A measure of those versions on every earlier period, with what was forgotten there by each probe.
fn changes(run: &RunResult, measure: &LabelFree, versions: Range<usize>) -> Vec<(f64, [f64; 3])> {
    let learned = |period: usize| {
        run.versions.iter().find_map(|version| version.scores.iter().find(|scores| scores.period == period))
    };
    let histories = Probe::ALL.map(|probe| run.history(probe));
    let mut found = Vec::new();
    for index in versions {
        let version = &run.versions[index];
        for scores in version.scores.iter().filter(|scores| scores.drift.is_some()) {
            let number = Version(index as u64 + 1);
            let lost = |history: &History| history.forgetting(number, period_id(scores.period));
            let value = learned(scores.period).and_then(|old| (measure.of)(scores, old));
            if let (Some(value), [Some(a), Some(b), Some(c)]) = (value, histories.each_ref().map(lost)) {
                found.push((value, [a, b, c]));
            }
        }
    }
    found
}

/// A version on an earlier period, against the version before it: what the gate is asked about.
struct Step {
    overlap: f64,
    retention: Option<f64>,
    /// By each probe.
    lost: [f64; 3],
}

/// Limits of retention that the steps are counted for.
const LIMITS: [f64; 7] = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95];
/// Where classes of what was lost by kNN begin, 0..1.
const LOST: [(&str, f64); 4] =
    [("more than 5", 0.05), ("3 to 5", 0.03), ("1 to 3", 0.01), ("less than 1", f64::NEG_INFINITY)];

/// How drift from the version before goes with what was lost since, and how many steps lie below a limit of it.
pub fn steps(text: &mut String, results: &Results) {
    let found: Vec<Step> = results.runs.iter().filter(|run| run.is_sequence()).flat_map(steps_of).collect();
    let correlation = |of: fn(&Step) -> Option<f64>, probe: usize| {
        let pairs: Vec<(f64, f64)> =
            found.iter().filter_map(|step| Some((1.0 - of(step)?, step.lost[probe]))).collect();
        rank_correlation(&pairs).map_or("-".to_owned(), |rho| format!("{rho:.2}"))
    };
    let overlap: fn(&Step) -> Option<f64> = |step| Some(step.overlap);
    let _ = write!(
        text,
        "Against the version before, on every earlier period: rank correlation with what was lost since then, of 1 - neighbour overlap \
         {} by linear probe, {} by kNN, {} by 10-shot; of 1 - neighbour retention {}, {} and {}. By what was lost, how many of these \
         pairs have a retention below a limit:\n\n| lost by kNN, points | pairs | mean overlap | mean retention |",
        correlation(overlap, 0),
        correlation(overlap, 1),
        correlation(overlap, 2),
        correlation(|step| step.retention, 0),
        correlation(|step| step.retention, 1),
        correlation(|step| step.retention, 2),
    );
    LIMITS.iter().for_each(|limit| {
        let _ = write!(text, " {limit} |");
    });
    let _ = write!(text, "\n|---|--:|--:|--:|{}\n", "--:|".repeat(LIMITS.len()));
    let mut most = f64::INFINITY;
    for (name, least) in LOST {
        let class: Vec<&Step> = found.iter().filter(|step| (least..most).contains(&step.lost[1])).collect();
        most = least;
        let overlaps: Vec<f64> = class.iter().map(|step| step.overlap).collect();
        let retentions: Vec<f64> = class.iter().filter_map(|step| step.retention).collect();
        let below = LIMITS.map(|limit| match retentions.len() {
            0 => "-".to_owned(),
            _ => retentions.iter().filter(|one| **one < limit).count().to_string(),
        });
        let _ = writeln!(
            text,
            "| {name} | {} | {} | {} | {} |",
            class.len(),
            plain(&overlaps, 3),
            plain(&retentions, 3),
            below.join(" | ")
        );
    }
    text.push('\n');
}

fn steps_of(run: &RunResult) -> Vec<Step> {
    let mut found = Vec::new();
    for index in 1..run.versions.len() {
        let scores_of =
            |index: usize, period| run.versions[index].scores.iter().find(|scores| scores.period == period);
        for new in &run.versions[index].scores {
            let Some(before) = scores_of(index - 1, new.period) else { continue };
            // The version before learned the period where it has no drift of its own there.
            let drift = if before.drift.is_none() { new.drift } else { new.parent_drift };
            if let Some(DriftScores { neighbour_overlap: overlap, neighbour_retention: retention, .. }) =
                drift
            {
                let lost = Probe::ALL.map(|probe| probe.of(before) - probe.of(new));
                found.push(Step { overlap, retention, lost });
            }
        }
    }
    found
}
