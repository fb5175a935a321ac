//! The gate: whether a candidate may be published.
//!
//! A pure function of the evaluation and the limits. Reasons are asked in a fixed order, the most fundamental
//! first, and the first that holds is the verdict. A limit on forgetting is broken only when the whole 95 % interval
//! lies beyond it: a small probe set is no ground for throwing a period's training away. Where labels don't show that what was lost is
//! within its limit, how much of the parent's neighbourhoods is retained is asked too, which needs none (docs/forgetting.md says how it
//! goes with forgetting).

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Evaluation, Interval, Loss, ProbeEvaluation, Retention};
use crate::types::{PeriodId, Version};

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct GateLimits {
    /// Smallest RankMe on the new probe set, in dimensions (1 is a point or a line). Larger refuses encoders that use
    /// few directions for good; smaller lets a collapsed one through.
    pub min_effective_rank: f64,
    /// Refuse a candidate whose contrastive loss on the new probe set is not below its reference's.
    pub require_learning: bool,
    /// Largest loss of kNN accuracy against the parent on any earlier period's probe set, 0..1.
    pub max_parent_loss: f64,
    /// The same against the best ancestor: what may be lost over all periods together.
    pub max_cumulative_loss: f64,
    /// Smallest neighbour retention from the parent, 0..1, on an earlier period's probe set whose labels don't show that no more than
    /// `max_parent_loss` was lost; 0 asks for none.
    pub min_neighbour_retention: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    Accepted,
    Rejected { reason: Reason },
}

/// Why a candidate is refused. `Display` is a sentence with the values, [`Reason::name`] the metric's label.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum Reason {
    /// A weight, an embedding or a measure is NaN or infinite.
    NotFinite,
    /// The embedding has shrunk to few directions.
    Collapsed { period: PeriodId, effective_rank: f64, limit: f64 },
    /// The contrastive loss on the new period is no lower than before training.
    LearnedNothing { period: PeriodId, candidate_loss: f64, reference_loss: f64, first: bool },
    /// More lost in this one period than allowed.
    ForgotParent { period: PeriodId, against: Version, loss: Interval, limit: f64 },
    /// More lost since the best ancestor than allowed.
    ForgotCumulative { period: PeriodId, against: Version, loss: Interval, limit: f64 },
    /// Too little retained of the neighbourhoods in this one period, and no labels that say otherwise.
    Drifted { period: PeriodId, against: Version, kept: Interval, limit: f64 },
}

impl Reason {
    /// Every name, for metrics that exist before the first verdict.
    pub const NAMES: [&str; 6] =
        ["not_finite", "collapsed", "learned_nothing", "forgot_parent", "forgot_cumulative", "drifted"];

    pub const fn name(&self) -> &'static str {
        match self {
            Self::NotFinite => Self::NAMES[0],
            Self::Collapsed { .. } => Self::NAMES[1],
            Self::LearnedNothing { .. } => Self::NAMES[2],
            Self::ForgotParent { .. } => Self::NAMES[3],
            Self::ForgotCumulative { .. } => Self::NAMES[4],
            Self::Drifted { .. } => Self::NAMES[5],
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFinite => write!(f, "a weight, an embedding or a measure is not finite"),
            Self::Collapsed { period, effective_rank, limit } => write!(
                f,
                "collapsed: effective rank {effective_rank:.2} on the probe set of {period} is below {limit}"
            ),
            Self::LearnedNothing { period, candidate_loss, reference_loss, first } => write!(
                f,
                "learned nothing: contrastive loss {candidate_loss:.4} on the probe set of {period} is not below \
                 its {}'s {reference_loss:.4}",
                if *first { "initial weight" } else { "teacher" }
            ),
            Self::ForgotParent { period, against, loss, limit } => {
                write!(f, "forgot too much of {period} against its parent {against}: {}", lost(*loss, *limit))
            }
            Self::ForgotCumulative { period, against, loss, limit } => {
                write!(
                    f,
                    "forgot too much of {period} since its best ancestor {against}: {}",
                    lost(*loss, *limit)
                )
            }
            Self::Drifted { period, against, kept, limit } => write!(
                f,
                "drifted too far on {period}, where labels don't show what was forgotten: {:.1} % of its neighbourhoods under \
                 the parent {against} are retained (95 %: {:.1} to {:.1}), required are {:.1}",
                kept.estimate * 100.0,
                kept.lower * 100.0,
                kept.upper * 100.0,
                limit * 100.0
            ),
        }
    }
}

fn lost(loss: Interval, limit: f64) -> String {
    format!(
        "kNN accuracy fell by {:.1} points (95 %: {:.1} to {:.1}), allowed are {:.1}",
        loss.estimate * 100.0,
        loss.lower * 100.0,
        loss.upper * 100.0,
        limit * 100.0
    )
}

/// `is_first`: the candidate has no parent and was compared with its own initial weights.
pub fn decide(evaluation: &Evaluation, limits: &GateLimits, is_first: bool) -> Verdict {
    let reason = not_finite(evaluation)
        .or_else(|| collapsed(evaluation, limits))
        .or_else(|| learned_nothing(evaluation, limits, is_first))
        .or_else(|| forgot_parent(evaluation, limits))
        .or_else(|| forgot_cumulative(evaluation, limits))
        .or_else(|| drifted(evaluation, limits));
    match reason {
        Some(reason) => Verdict::Rejected { reason },
        None => Verdict::Accepted,
    }
}

fn not_finite(evaluation: &Evaluation) -> Option<Reason> {
    let measures = evaluation
        .new_probe
        .iter()
        .flat_map(|probe| [probe.candidate_loss, probe.reference_loss, probe.shape.effective_rank]);
    let ranks = evaluation.probes.iter().map(|probe| probe.shape.effective_rank);
    let finite = evaluation.finite && measures.chain(ranks).all(f64::is_finite);
    (!finite).then_some(Reason::NotFinite)
}

fn collapsed(evaluation: &Evaluation, limits: &GateLimits) -> Option<Reason> {
    let probe = evaluation.new_probe.as_ref()?;
    let (effective_rank, limit) = (probe.shape.effective_rank, limits.min_effective_rank);
    (effective_rank < limit).then_some(Reason::Collapsed { period: probe.period, effective_rank, limit })
}

fn learned_nothing(evaluation: &Evaluation, limits: &GateLimits, first: bool) -> Option<Reason> {
    let probe = evaluation.new_probe.as_ref()?;
    let (candidate_loss, reference_loss) = (probe.candidate_loss, probe.reference_loss);
    (limits.require_learning && candidate_loss >= reference_loss).then_some(Reason::LearnedNothing {
        period: probe.period,
        candidate_loss,
        reference_loss,
        first,
    })
}

fn forgot_parent(evaluation: &Evaluation, limits: &GateLimits) -> Option<Reason> {
    let limit = limits.max_parent_loss;
    let (period, Loss { against, knn: loss }) = worst(evaluation, |probe| probe.parent_loss, limit)?;
    Some(Reason::ForgotParent { period, against, loss, limit })
}

fn forgot_cumulative(evaluation: &Evaluation, limits: &GateLimits) -> Option<Reason> {
    let limit = limits.max_cumulative_loss;
    let (period, Loss { against, knn: loss }) = worst(evaluation, |probe| probe.best_loss, limit)?;
    Some(Reason::ForgotCumulative { period, against, loss, limit })
}

fn drifted(evaluation: &Evaluation, limits: &GateLimits) -> Option<Reason> {
    let limit = limits.min_neighbour_retention;
    let is_cleared = |loss: Loss| loss.knn.upper <= limits.max_parent_loss;
    let asked = evaluation.probes.iter().filter(|probe| !probe.parent_loss.is_some_and(is_cleared));
    let (period, Retention { against, kept }) = asked
        .filter_map(|probe| Some((probe.period, probe.parent_retention?)))
        .filter(|(_, retention)| retention.kept.upper < limit)
        .min_by(|a, b| a.1.kept.upper.total_cmp(&b.1.kept.upper))?;
    Some(Reason::Drifted { period, against, kept, limit })
}

/// Of the losses that are beyond the limit with certainty the surest.
fn worst(
    evaluation: &Evaluation,
    loss_of: impl Fn(&ProbeEvaluation) -> Option<Loss>,
    limit: f64,
) -> Option<(PeriodId, Loss)> {
    evaluation
        .probes
        .iter()
        .filter_map(|probe| Some((probe.period, loss_of(probe)?)))
        .filter(|(_, loss)| loss.knn.lower > limit)
        .max_by(|a, b| a.1.knn.lower.total_cmp(&b.1.knn.lower))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{Accuracies, NewProbeEvaluation, Shape};
    use crate::types::EventTime;

    const LIMITS: GateLimits = GateLimits {
        min_effective_rank: 4.0,
        require_learning: true,
        max_parent_loss: 0.05,
        max_cumulative_loss: 0.1,
        min_neighbour_retention: 0.8,
    };

    fn period(day: i64) -> PeriodId {
        PeriodId(EventTime(day * 86_400_000))
    }

    fn shape(effective_rank: f64) -> Shape {
        Shape { alignment: None, uniformity: -2.0, effective_rank }
    }

    fn loss(lower: f64, estimate: f64, upper: f64) -> Option<Loss> {
        Some(Loss { against: Version(1), knn: Interval { estimate, lower, upper } })
    }

    fn probe(day: i64, parent_loss: Option<Loss>, best_loss: Option<Loss>) -> ProbeEvaluation {
        ProbeEvaluation {
            period: period(day),
            frames: 100,
            accuracies: Accuracies::default(),
            shape: shape(20.0),
            drift: None,
            parent_loss,
            best_loss,
            parent_retention: retention(0.4, 0.5),
        }
    }

    fn retention(lower: f64, upper: f64) -> Option<Retention> {
        let kept = Interval { estimate: (lower + upper) / 2.0, lower, upper };
        Some(Retention { against: Version(1), kept })
    }

    fn good() -> Evaluation {
        Evaluation {
            finite: true,
            new_probe: Some(NewProbeEvaluation {
                period: period(9),
                frames: 100,
                candidate: Accuracies::default(),
                reference: Accuracies::default(),
                shape: shape(20.0),
                candidate_loss: 2.0,
                reference_loss: 2.5,
            }),
            probes: vec![probe(1, loss(-0.01, 0.01, 0.03), loss(0.0, 0.02, 0.04))],
        }
    }

    fn reason(change: impl Fn(&mut Evaluation)) -> Option<Reason> {
        let mut evaluation = good();
        change(&mut evaluation);
        match decide(&evaluation, &LIMITS, false) {
            Verdict::Accepted => None,
            Verdict::Rejected { reason } => Some(reason),
        }
    }

    fn name(change: impl Fn(&mut Evaluation)) -> &'static str {
        reason(change).map_or("accepted", |reason| reason.name())
    }

    fn with_new(change: impl Fn(&mut NewProbeEvaluation)) -> &'static str {
        name(|evaluation| change(evaluation.new_probe.as_mut().unwrap()))
    }

    #[test]
    fn a_good_candidate_is_accepted_with_and_without_a_new_probe_set() {
        assert_eq!(name(|_| ()), "accepted");
        assert_eq!(name(|evaluation| evaluation.new_probe = None), "accepted");
    }

    #[test]
    fn each_fault_has_its_reason() {
        assert_eq!(name(|evaluation| evaluation.finite = false), "not_finite");
        assert_eq!(with_new(|new| new.candidate_loss = f64::NAN), "not_finite");
        assert_eq!(with_new(|new| new.shape.effective_rank = 1.2), "collapsed");
        assert_eq!(with_new(|new| new.candidate_loss = 2.5), "learned_nothing");
        let probes = |probe| move |evaluation: &mut Evaluation| evaluation.probes = vec![probe];
        assert_eq!(name(|e| probes(probe(1, loss(0.06, 0.1, 0.2), None))(e)), "forgot_parent");
        assert_eq!(
            name(|e| probes(probe(1, loss(0.0, 0.0, 0.0), loss(0.11, 0.2, 0.3)))(e)),
            "forgot_cumulative"
        );
    }

    #[test]
    fn retention_counts_where_labels_clear_nobody_and_only_with_certainty() {
        let with = |day, parent_loss, parent_retention| ProbeEvaluation {
            parent_retention,
            ..probe(day, parent_loss, None)
        };
        let probes = |probes: &[ProbeEvaluation]| reason(|evaluation| evaluation.probes = probes.to_vec());
        let (little, enough) = (retention(0.7, 0.79), retention(0.7, 0.8));
        let cleared = with(3, loss(-0.01, 0.01, 0.05), little);
        assert_eq!(probes(&[cleared, with(1, None, enough), with(2, None, None)]), None);
        let undecided = probes(&[with(1, loss(-0.3, 0.0, 0.3), little)]).unwrap();
        assert_eq!(undecided.name(), "drifted");
        let found = probes(&[with(1, None, little), with(2, None, retention(0.6, 0.7))]).unwrap();
        assert_eq!(
            found.to_string(),
            "drifted too far on 19700103T000000Z, where labels don't show what was forgotten: 65.0 % of its neighbourhoods under \
             the parent v000001 are retained (95 %: 60.0 to 70.0), required are 80.0"
        );
    }

    #[test]
    fn a_loss_whose_interval_reaches_below_the_limit_is_not_broken() {
        let uncertain = |evaluation: &mut Evaluation| {
            let retained = retention(0.7, 0.9);
            evaluation.probes = vec![ProbeEvaluation {
                parent_retention: retained,
                ..probe(1, loss(0.04, 0.2, 0.4), loss(0.1, 0.3, 0.5))
            }];
        };
        assert_eq!(name(uncertain), "accepted");
    }

    #[test]
    fn the_sentence_names_the_surest_loss_and_its_values() {
        let found = reason(|evaluation| {
            evaluation.probes =
                vec![probe(1, loss(0.06, 0.1, 0.2), None), probe(2, loss(0.08, 0.09, 0.1), None)];
        });
        assert_eq!(
            found.unwrap().to_string(),
            "forgot too much of 19700103T000000Z against its parent v000001: kNN accuracy fell by 9.0 points \
             (95 %: 8.0 to 10.0), allowed are 5.0"
        );
    }

    #[test]
    fn a_verdict_reads_back_from_json() {
        let rejected = Verdict::Rejected {
            reason: Reason::Collapsed { period: period(9), effective_rank: 1.5, limit: 4.0 },
        };
        for verdict in [Verdict::Accepted, rejected] {
            let text = serde_json::to_string(&verdict).unwrap();
            assert_eq!(serde_json::from_str::<Verdict>(&text).unwrap(), verdict);
        }
    }
}
