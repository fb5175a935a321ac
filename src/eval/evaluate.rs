//! Puts the measures together: embeddings of one probe set in, its evaluation out.
//!
//! The caller embeds (and computes the contrastive losses, which need the model); this only measures. All
//! versions are asked the same queries of the same split, so their differences are paired.

use std::collections::{BTreeMap, BTreeSet};

use super::bootstrap::{self, Draws, Pairs, paired_difference};
use super::drift::Neighbourhoods;
use super::knn::{Knn, knn};
use super::split::{Split, by_label, held_out};
use super::{
    Accuracies, Ancestor, Drift, Embeddings, FrameMeta, Loss, NewProbeEvaluation, ProbeEvaluation, Retention,
    Shape, drift, linear_probe,
};
use crate::types::{PeriodId, Version};

/// Fewest frames of which neighbours and singular values say anything.
pub const MIN_FRAMES: usize = 8;

#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EvaluateError {
    #[error("the probe set of {period} has {frames} frames, but {what} has {rows} rows")]
    Rows { period: PeriodId, frames: usize, what: String, rows: usize },
    /// The caller reports such a candidate as not finite; no measure of it exists.
    #[error("{what} on the probe set of {period} is not finite")]
    NotFinite { period: PeriodId, what: String },
    #[error("the probe set of {period} has {frames} frames; {MIN_FRAMES} is the least that can be measured")]
    TooFew { period: PeriodId, frames: usize },
}

/// How probe sets are measured: part of the job, so that a score can be repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    pub block_ms: i64,
    pub guard_ms: i64,
    /// Neighbours of the kNN probe, and of overlap and retention.
    pub k: usize,
    /// Resamples of the bootstrap.
    pub resamples: usize,
    pub seed: u64,
}

impl Settings {
    fn draws(&self) -> Draws {
        Draws { resamples: self.resamples, seed: self.seed }
    }
}

/// One probe set as the candidate sees it. Row i of every matrix is `frames[i]`.
#[derive(Debug, Clone, Copy)]
pub struct Probe<'a> {
    pub period: PeriodId,
    pub frames: &'a [FrameMeta],
    pub candidate: &'a Embeddings,
    /// The candidate's embeddings of two augmented views of every frame.
    pub views: Option<(&'a Embeddings, &'a Embeddings)>,
}

/// What an older version made of the same frames.
#[derive(Debug, Clone, Copy)]
pub struct Older<'a> {
    pub version: Version,
    pub role: Ancestor,
    pub embeddings: &'a Embeddings,
}

/// What the candidate is compared with on the new probe set: its teacher, or its own initial weights.
#[derive(Debug, Clone, Copy)]
pub struct Reference<'a> {
    pub embeddings: &'a Embeddings,
    /// NT-Xent of candidate and reference on identical views and batches.
    pub candidate_loss: f64,
    pub reference_loss: f64,
}

/// The candidate on an earlier period's probe set.
pub fn evaluate_probe(
    probe: Probe,
    older: &[Older],
    settings: &Settings,
) -> Result<ProbeEvaluation, EvaluateError> {
    check(probe)?;
    for old in older {
        check_embeddings(probe, &old.version.to_string(), old.embeddings)?;
    }
    let asked = Asked::new(probe.frames, settings);
    let candidate = asked.as_ref().map(|asked| asked.knn(probe.candidate));
    let with_role = |role| older.iter().find(|old| old.role == role);
    let loss_against = |role| {
        let (asked, candidate) = (asked.as_ref()?, candidate.as_ref()?);
        with_role(role).map(|old| asked.loss(old, candidate))
    };
    let neighbours = Neighbourhoods::of(probe.candidate, settings.k);
    Ok(ProbeEvaluation {
        period: probe.period,
        frames: probe.frames.len() as u64,
        accuracies: accuracies(asked.as_ref(), probe.candidate, candidate.as_ref()),
        shape: shape(probe),
        drift: with_role(Ancestor::Learned).map(|old| drift_from(old, probe, &neighbours, settings)),
        parent_loss: loss_against(Ancestor::Parent),
        best_loss: loss_against(Ancestor::Best),
        parent_retention: with_role(Ancestor::Parent)
            .map(|old| retention_from(old, probe, &neighbours, settings)),
    })
}

/// The candidate and its reference on the new period's probe set.
pub fn evaluate_new_probe(
    probe: Probe,
    reference: Reference,
    settings: &Settings,
) -> Result<NewProbeEvaluation, EvaluateError> {
    check(probe)?;
    check_embeddings(probe, "the reference", reference.embeddings)?;
    for (what, loss) in [
        ("the candidate's contrastive loss", reference.candidate_loss),
        ("the reference's contrastive loss", reference.reference_loss),
    ] {
        if !loss.is_finite() {
            return Err(EvaluateError::NotFinite { period: probe.period, what: what.into() });
        }
    }
    let asked = Asked::new(probe.frames, settings);
    let measured = |embeddings| {
        let found = asked.as_ref().map(|asked| asked.knn(embeddings));
        accuracies(asked.as_ref(), embeddings, found.as_ref())
    };
    Ok(NewProbeEvaluation {
        period: probe.period,
        frames: probe.frames.len() as u64,
        candidate: measured(probe.candidate),
        reference: measured(reference.embeddings),
        shape: shape(probe),
        candidate_loss: reference.candidate_loss,
        reference_loss: reference.reference_loss,
    })
}

fn check(probe: Probe) -> Result<(), EvaluateError> {
    let (period, frames) = (probe.period, probe.frames.len());
    if frames < MIN_FRAMES {
        return Err(EvaluateError::TooFew { period, frames });
    }
    check_embeddings(probe, "the candidate", probe.candidate)?;
    if let Some((first, second)) = probe.views {
        check_embeddings(probe, "the candidate's first view", first)?;
        check_embeddings(probe, "the candidate's second view", second)?;
    }
    Ok(())
}

fn check_embeddings(probe: Probe, what: &str, embeddings: &Embeddings) -> Result<(), EvaluateError> {
    let (period, frames, rows) = (probe.period, probe.frames.len(), embeddings.rows);
    if rows != frames {
        return Err(EvaluateError::Rows { period, frames, what: what.into(), rows });
    }
    if !embeddings.is_finite() {
        return Err(EvaluateError::NotFinite { period, what: what.into() });
    }
    Ok(())
}

/// The questions that a labelled probe set asks every version.
struct Asked {
    split: Split,
    labels: Vec<u32>,
    /// Stream of each query, numbered.
    clusters: Vec<usize>,
    settings: Settings,
}

impl Asked {
    /// `None` where the set has too few labels or streams.
    fn new(frames: &[FrameMeta], settings: &Settings) -> Option<Self> {
        let split = by_label(frames, settings.block_ms, settings.guard_ms)?;
        let names: BTreeSet<&str> = frames.iter().filter_map(|frame| frame.label.as_deref()).collect();
        let numbers: BTreeMap<&str, u32> = names.into_iter().zip(0..).collect();
        // A frame without a label gets a number too, but the split names no such frame.
        let number = |frame: &FrameMeta| frame.label.as_deref().map_or(u32::MAX, |label| numbers[label]);
        let streams = streams_of(frames);
        let clusters = split.queries.iter().map(|&row| streams[row]).collect();
        Some(Self { labels: frames.iter().map(number).collect(), clusters, split, settings: *settings })
    }

    fn knn(&self, embeddings: &Embeddings) -> Knn {
        knn(embeddings, &self.labels, &self.split, self.settings.k)
    }

    fn loss(&self, old: &Older, candidate: &Knn) -> Loss {
        let before = self.knn(old.embeddings);
        let pairs = Pairs { before: &before.correct, after: &candidate.correct, clusters: &self.clusters };
        Loss { against: old.version, knn: paired_difference(pairs, self.settings.draws()) }
    }
}

/// Each frame's stream, numbered.
fn streams_of(frames: &[FrameMeta]) -> Vec<usize> {
    let names: BTreeSet<&str> = frames.iter().map(|frame| frame.stream_id.as_str()).collect();
    let numbers: BTreeMap<&str, usize> = names.into_iter().zip(0..).collect();
    frames.iter().map(|frame| numbers[frame.stream_id.as_str()]).collect()
}

fn accuracies(asked: Option<&Asked>, embeddings: &Embeddings, found: Option<&Knn>) -> Accuracies {
    let Some(asked) = asked else {
        return Accuracies::default();
    };
    Accuracies {
        knn: found.map(|knn| knn.accuracy),
        linear: Some(linear_probe::linear(embeddings, &asked.labels, &asked.split)),
        few_shot: Some(linear_probe::few_shot(embeddings, &asked.labels, &asked.split)),
    }
}

fn shape(probe: Probe) -> Shape {
    Shape {
        alignment: probe.views.map(|(first, second)| drift::alignment(first, second)),
        uniformity: drift::uniformity(probe.candidate),
        effective_rank: drift::effective_rank(probe.candidate),
    }
}

fn drift_from(old: &Older, probe: Probe, neighbours: &Neighbourhoods, settings: &Settings) -> Drift {
    let split = held_out(probe.frames, settings.block_ms, settings.guard_ms);
    let before = Neighbourhoods::of(old.embeddings, settings.k);
    Drift {
        against: old.version,
        cka: drift::linear_cka(probe.candidate, old.embeddings),
        neighbour_overlap: neighbours.overlap(&before),
        neighbour_retention: Some(drift::retention(&neighbours.retained_from(&before))),
        recoverability: split.map(|split| drift::recoverability(probe.candidate, old.embeddings, &split)),
    }
}

fn retention_from(old: &Older, probe: Probe, neighbours: &Neighbourhoods, settings: &Settings) -> Retention {
    let rows = neighbours.retained_from(&Neighbourhoods::of(old.embeddings, settings.k));
    let parts: Vec<(f64, f64)> = rows.iter().map(|row| (row.now, row.before)).collect();
    let kept = bootstrap::ratio(&parts, &streams_of(probe.frames), -1.0..=1.0, settings.draws());
    Retention { against: old.version, kept }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::Interval;
    use crate::types::EventTime;

    const SETTINGS: Settings =
        Settings { block_ms: 600_000, guard_ms: 30_000, k: 5, resamples: 500, seed: 1 };
    const PERIOD: PeriodId = PeriodId(EventTime(0));

    /// 4 labels, 6 streams each, 5 frames a stream.
    fn frames() -> Vec<FrameMeta> {
        (0..120)
            .map(|i| FrameMeta {
                stream_id: format!("s{}", i / 5),
                captured_at: EventTime(i * 1000),
                label: Some(format!("label {}", i / 30)),
            })
            .collect()
    }

    /// Points around one centre a label, `noise` wide.
    fn points(noise: f64) -> Embeddings {
        let value = |i: usize, j: usize| {
            let centre = if i / 30 == j { 1.0 } else { 0.0 };
            (centre + noise * ((i * 8 + j) as f64 * 12.9898).sin()) as f32
        };
        Embeddings::new(120, 8, (0..120).flat_map(|i| (0..8).map(move |j| value(i, j))).collect())
    }

    fn probe<'a>(frames: &'a [FrameMeta], candidate: &'a Embeddings) -> Probe<'a> {
        Probe { period: PERIOD, frames, candidate, views: None }
    }

    #[test]
    fn a_candidate_that_lost_its_labels_shows_a_certain_loss_against_each_role() {
        let (frames, good, bad) = (frames(), points(0.2), points(30.0));
        let mut older: Vec<Older> = [Ancestor::Learned, Ancestor::Best, Ancestor::Parent]
            .into_iter()
            .zip(1..)
            .map(|(role, number)| Older { version: Version(number), role, embeddings: &good })
            .collect();
        let found = evaluate_probe(probe(&frames, &bad), &older, &SETTINGS).unwrap();
        assert!(found.accuracies.knn.unwrap() < 0.6, "{found:?}");
        let (best, parent) = (found.best_loss.unwrap(), found.parent_loss.unwrap());
        assert_eq!((best.against, parent.against), (Version(2), Version(3)));
        assert!(parent.knn.lower > 0.2 && parent.knn == best.knn, "{parent:?}");
        assert_eq!(found.drift.unwrap().against, Version(1));
        // A parent that had lost them too has no loss to show.
        older[2].embeddings = &bad;
        let found = evaluate_probe(probe(&frames, &bad), &older, &SETTINGS).unwrap();
        assert_eq!(found.best_loss.unwrap(), best);
        assert_eq!(found.parent_loss.unwrap().knn, Interval { estimate: 0.0, lower: 0.0, upper: 0.0 });
    }

    #[test]
    fn an_unchanged_candidate_has_neither_loss_nor_drift() {
        let (frames, good) = (frames(), points(0.2));
        let older = [Older { version: Version(1), role: Ancestor::Learned, embeddings: &good }];
        let found = evaluate_probe(probe(&frames, &good), &older, &SETTINGS).unwrap();
        assert_eq!(found.accuracies, Accuracies { knn: Some(1.0), linear: Some(1.0), few_shot: Some(1.0) });
        let drift = found.drift.unwrap();
        assert!((drift.cka - 1.0).abs() < 1e-9 && drift.neighbour_overlap == 1.0);
        assert!(drift.recoverability.unwrap() > 0.95, "{drift:?}");
        assert_eq!((found.parent_loss, found.best_loss, found.shape.alignment), (None, None, None));
    }

    #[test]
    fn a_set_without_labels_still_has_shape_and_drift() {
        let mut frames = frames();
        frames.iter_mut().for_each(|frame| frame.label = None);
        let (good, moved) = (points(0.2), points(0.3));
        let older = [Older { version: Version(1), role: Ancestor::Learned, embeddings: &good }];
        let probe = Probe { views: Some((&good, &moved)), ..probe(&frames, &moved) };
        let found = evaluate_probe(probe, &older, &SETTINGS).unwrap();
        assert_eq!(found.accuracies, Accuracies::default());
        assert!(found.shape.effective_rank > 3.0 && found.shape.alignment.unwrap() > 0.0);
        assert!(found.drift.is_some());
    }

    #[test]
    fn retention_from_the_parent_needs_no_labels() {
        let mut frames = frames();
        frames.iter_mut().for_each(|frame| frame.label = None);
        let (good, moved, bad) = (points(0.2), points(0.3), points(30.0));
        let kept = |candidate: &Embeddings| {
            let older = [
                Older { version: Version(1), role: Ancestor::Learned, embeddings: &bad },
                Older { version: Version(3), role: Ancestor::Parent, embeddings: &good },
            ];
            let found = evaluate_probe(probe(&frames, candidate), &older, &SETTINGS).unwrap();
            assert_eq!((found.parent_loss, found.drift.unwrap().against), (None, Version(1)));
            let Retention { against, kept } = found.parent_retention.unwrap();
            assert_eq!(against, Version(3));
            assert!(kept.lower <= kept.estimate && kept.estimate <= kept.upper);
            kept
        };
        assert_eq!(kept(&good), Interval { estimate: 1.0, lower: 1.0, upper: 1.0 });
        let (moved, bad) = (kept(&moved), kept(&bad));
        // Labels' centres stay where they are under a little noise, and are lost under much.
        assert!(moved.lower > 0.9 && bad.upper < 0.3 && bad.lower < bad.upper, "{moved:?} {bad:?}");
    }

    #[test]
    fn the_new_probe_set_measures_candidate_and_reference_alike() {
        let (frames, good, bad) = (frames(), points(0.2), points(30.0));
        let reference = Reference { embeddings: &bad, candidate_loss: 1.0, reference_loss: 2.0 };
        let found = evaluate_new_probe(probe(&frames, &good), reference, &SETTINGS).unwrap();
        assert!(found.candidate.knn.unwrap() > found.reference.knn.unwrap());
        assert_eq!((found.candidate_loss, found.reference_loss), (1.0, 2.0));
    }

    #[test]
    fn what_cannot_be_measured_is_an_error() {
        let (frames, good) = (frames(), points(0.2));
        let short = good.select(&[0, 1, 2]);
        let mut broken = good.clone();
        broken.data[5] = f32::NAN;
        let error = |frames: &[FrameMeta], candidate: &Embeddings| {
            evaluate_probe(probe(frames, candidate), &[], &SETTINGS).unwrap_err()
        };
        assert!(matches!(error(&frames, &short), EvaluateError::Rows { rows: 3, .. }));
        assert!(matches!(error(&frames, &broken), EvaluateError::NotFinite { .. }));
        assert!(matches!(error(&frames[..3], &short), EvaluateError::TooFew { frames: 3, .. }));
        let infinite = Reference { embeddings: &good, candidate_loss: f64::INFINITY, reference_loss: 2.0 };
        assert!(evaluate_new_probe(probe(&frames, &good), infinite, &SETTINGS).is_err());
    }
}
