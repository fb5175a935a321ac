//! The matrix R and what it says about forgetting, over a tree of versions.
//!
//! R\[v\]\[p\] is the score of version v on period p's probe set. The literature has one version a task, in a
//! row; here a version has a parent, and after a rollback two versions share one. So "earlier" means **ancestors
//! by parent**: what a rolled-back version once reached was never promised to those that don't descend from it, and
//! a rejected candidate has no number and no row. On a chain of one version a period all of it is the usual:
//!
//! * forgetting of p at v = max over earlier versions of R\[.\]\[p\], minus R\[v\]\[p\]; its average over the earlier
//!   periods (Chaudhry, Dokania, Ajanthan, Torr, ECCV 2018, section 3)
//! * backward transfer = mean over the earlier periods of R\[v\]\[p\] minus R\[the version that learned p\]\[p\];
//!   average accuracy = mean of R\[v\]\[.\] (Lopez-Paz & Ranzato, NeurIPS 2017, section 2)
//!
//! Averages run over the periods that v was evaluated on: the oldest probe sets may have been given up.

use std::collections::{BTreeMap, BTreeSet};

use crate::types::{PeriodId, Version};

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    #[error("version {version} has the parent {parent}, which is not known")]
    UnknownParent { version: Version, parent: Version },
    /// Numbers come from a sequence, so a parent's is smaller; this also rules circles out.
    #[error("version {version} has the parent {parent}, which is not older")]
    ParentNotOlder { version: Version, parent: Version },
    #[error("version {version} has a score on {period} but is not known")]
    UnknownVersion { version: Version, period: PeriodId },
}

/// The published versions with their parents, and one measure's scores.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct History {
    parents: BTreeMap<Version, Option<Version>>,
    scores: BTreeMap<(Version, PeriodId), f64>,
}

impl History {
    /// `parents`: every published version, `None` for one that starts a lineage. `scores`: the cells of R of one
    /// measure; cells that were not measured are absent.
    pub fn new(
        parents: BTreeMap<Version, Option<Version>>,
        scores: BTreeMap<(Version, PeriodId), f64>,
    ) -> Result<Self, HistoryError> {
        for (&version, &parent) in &parents {
            let Some(parent) = parent else { continue };
            if parent >= version {
                return Err(HistoryError::ParentNotOlder { version, parent });
            }
            if !parents.contains_key(&parent) {
                return Err(HistoryError::UnknownParent { version, parent });
            }
        }
        for &(version, period) in scores.keys() {
            if !parents.contains_key(&version) {
                return Err(HistoryError::UnknownVersion { version, period });
            }
        }
        Ok(Self { parents, scores })
    }

    /// R\[version\]\[period\].
    pub fn score(&self, version: Version, period: PeriodId) -> Option<f64> {
        self.scores.get(&(version, period)).copied()
    }

    pub fn parent(&self, version: Version) -> Option<Version> {
        self.parents.get(&version).copied().flatten()
    }

    /// `newest` and its ancestors, oldest first.
    pub fn line(&self, newest: Version) -> Vec<Version> {
        let mut line: Vec<Version> =
            std::iter::successors(Some(newest), |&version| self.parent(version)).collect();
        line.reverse();
        line
    }

    /// The first in `newest`'s line that was evaluated on the period: the one that learned it.
    pub fn learned(&self, newest: Version, period: PeriodId) -> Option<Version> {
        self.line(newest).into_iter().find(|&version| self.score(version, period).is_some())
    }

    /// The one in `newest`'s line with the best score on the period, the oldest of equals.
    pub fn best(&self, newest: Version, period: PeriodId) -> Option<Version> {
        let mut best: Option<(Version, f64)> = None;
        for version in self.line(newest) {
            let Some(score) = self.score(version, period) else { continue };
            if best.is_none_or(|(_, highest)| score > highest) {
                best = Some((version, score));
            }
        }
        best.map(|(version, _)| version)
    }

    /// Best score of an ancestor minus the version's own; negative where it surpasses them all. `None` where the
    /// version was not evaluated on the period, or none of its ancestors was.
    pub fn forgetting(&self, version: Version, period: PeriodId) -> Option<f64> {
        let best = self.best(self.parent(version)?, period)?;
        Some(self.score(best, period)? - self.score(version, period)?)
    }

    /// The version's own score minus that of the one that learned the period.
    fn transfer(&self, version: Version, period: PeriodId) -> Option<f64> {
        let learned = self.learned(self.parent(version)?, period)?;
        Some(self.score(version, period)? - self.score(learned, period)?)
    }

    /// Mean forgetting over the earlier periods; `None` if there is none.
    pub fn average_forgetting(&self, version: Version) -> Option<f64> {
        mean(self.periods(version).iter().filter_map(|&period| self.forgetting(version, period)))
    }

    /// Mean gain on the earlier periods since each was learned; negative: forgetting.
    pub fn backward_transfer(&self, version: Version) -> Option<f64> {
        mean(self.periods(version).iter().filter_map(|&period| self.transfer(version, period)))
    }

    /// Mean score over all periods that the version was evaluated on.
    pub fn average_accuracy(&self, version: Version) -> Option<f64> {
        mean(self.periods(version).iter().filter_map(|&period| self.score(version, period)))
    }

    /// The periods that the version was evaluated on.
    pub fn periods(&self, version: Version) -> BTreeSet<PeriodId> {
        let first = (version, PeriodId(crate::types::EventTime(i64::MIN)));
        let cells = self.scores.range(first..).map(|(cell, _)| *cell);
        cells.take_while(|cell| cell.0 == version).map(|cell| cell.1).collect()
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0_u32), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::EventTime;

    fn period(number: i64) -> PeriodId {
        PeriodId(EventTime(number * 86_400_000))
    }

    fn history(parents: &[(u64, u64)], scores: &[(u64, i64, f64)]) -> History {
        let parents = parents
            .iter()
            .map(|&(version, parent)| (Version(version), (parent > 0).then_some(Version(parent))));
        let scores =
            scores.iter().map(|&(version, number, score)| ((Version(version), period(number)), score));
        History::new(parents.collect(), scores.collect()).unwrap()
    }

    fn close(got: Option<f64>, want: f64) {
        assert!(got.is_some_and(|got| (got - want).abs() < 1e-12), "{got:?}, not {want}");
    }

    /// Three tasks in a row, by hand:
    /// F(3) = ((max(.9, .8) - .7) + (.85 - .8)) / 2 = .125, BWT = ((.7 - .9) + (.8 - .85)) / 2 = -.125, ACC = (.7 + .8 + .95) / 3.
    #[test]
    fn on_a_chain_it_is_the_literatures_definition() {
        let r = history(
            &[(1, 0), (2, 1), (3, 2)],
            &[(1, 1, 0.9), (2, 1, 0.8), (2, 2, 0.85), (3, 1, 0.7), (3, 2, 0.8), (3, 3, 0.95)],
        );
        close(r.average_forgetting(Version(3)), 0.125);
        close(r.backward_transfer(Version(3)), -0.125);
        close(r.average_accuracy(Version(3)), 2.45 / 3.0);
        assert_eq!(r.average_forgetting(Version(1)), None);
        assert_eq!(r.forgetting(Version(3), period(3)), None, "its own period");
    }

    /// A period that got better before it got worse: forgetting counts from the best, transfer from the first.
    #[test]
    fn forgetting_is_measured_from_the_best_ancestor_and_transfer_from_the_one_that_learned() {
        let r = history(&[(1, 0), (2, 1), (3, 2)], &[(1, 1, 0.6), (2, 1, 0.9), (3, 1, 0.7)]);
        close(r.forgetting(Version(3), period(1)), 0.2);
        close(r.backward_transfer(Version(3)), 0.1);
        close(r.forgetting(Version(2), period(1)), -0.3);
        assert_eq!(r.best(Version(3), period(1)), Some(Version(2)));
        assert_eq!(r.learned(Version(3), period(1)), Some(Version(1)));
    }

    /// 1 - 2 - 3 was rolled back to 2; 5 descends from 2 (4 was given to a candidate that never became visible). What 3
    /// reached on period 1 (.95) and its period 3 are no part of 5's past.
    #[test]
    fn a_rolled_back_branch_never_counts() {
        let r = history(
            &[(1, 0), (2, 1), (3, 2), (5, 2)],
            &[
                (1, 1, 0.9),
                (2, 1, 0.8),
                (2, 2, 0.8),
                (3, 1, 0.95),
                (3, 2, 0.7),
                (3, 3, 0.9),
                (5, 1, 0.85),
                (5, 2, 0.75),
                (5, 3, 0.5),
                (5, 4, 0.9),
            ],
        );
        close(r.forgetting(Version(5), period(1)), 0.05);
        close(r.forgetting(Version(5), period(2)), 0.05);
        assert_eq!(r.forgetting(Version(5), period(3)), None, "only the branch that was left had learned it");
        close(r.average_forgetting(Version(5)), 0.05);
        close(r.backward_transfer(Version(5)), -0.05);
        assert_eq!(r.line(Version(5)), [Version(1), Version(2), Version(5)]);
    }

    #[test]
    fn a_version_without_its_ancestors_is_an_error() {
        let parents = |pairs: &[(u64, u64)]| {
            pairs.iter().map(|&(v, p)| (Version(v), Some(Version(p)))).collect::<BTreeMap<_, _>>()
        };
        let (version, parent) = (Version(2), Version(1));
        assert_eq!(
            History::new(parents(&[(2, 1)]), BTreeMap::new()),
            Err(HistoryError::UnknownParent { version, parent })
        );
        assert!(matches!(
            History::new(parents(&[(2, 3), (3, 2)]), BTreeMap::new()),
            Err(HistoryError::ParentNotOlder { .. })
        ));
        assert!(matches!(
            History::new(BTreeMap::new(), [((version, period(1)), 0.5)].into()),
            Err(HistoryError::UnknownVersion { .. })
        ));
    }

    /// A random tree with random cells.
    fn trees() -> impl Strategy<Value = History> {
        let version =
            (any::<prop::sample::Index>(), prop::collection::vec(prop::option::of(0.0..1.0_f64), 5));
        prop::collection::vec(version, 1..12).prop_map(|versions| {
            let (mut parents, mut scores) = (BTreeMap::new(), BTreeMap::new());
            for (number, (parent, row)) in versions.into_iter().enumerate() {
                let version = Version(number as u64 + 1);
                let parent = parent.index(number + 1) as u64;
                parents.insert(version, (parent > 0).then_some(Version(parent)));
                for (number, score) in row.into_iter().enumerate() {
                    score.map(|score| scores.insert((version, period(number as i64)), score));
                }
            }
            History::new(parents, scores).unwrap()
        })
    }

    proptest! {
        #[test]
        fn forgetting_is_at_least_minus_the_transfer(r in trees()) {
            for version in r.parents.keys().copied() {
                match (r.average_forgetting(version), r.backward_transfer(version)) {
                    (Some(forgotten), Some(transfer)) => prop_assert!(forgotten >= -transfer - 1e-12),
                    (forgotten, transfer) => prop_assert_eq!((forgotten, transfer), (None, None)),
                }
            }
        }

        #[test]
        fn only_a_versions_own_line_matters(r in trees()) {
            for version in r.parents.keys().copied() {
                let line: BTreeSet<Version> = r.line(version).into_iter().collect();
                let parents = r.parents.iter().filter(|(v, _)| line.contains(v)).map(|(v, p)| (*v, *p)).collect();
                let scores = r.scores.iter().filter(|(cell, _)| line.contains(&cell.0)).map(|(c, s)| (*c, *s)).collect();
                let alone = History::new(parents, scores).unwrap();
                prop_assert_eq!(alone.average_forgetting(version), r.average_forgetting(version));
                prop_assert_eq!(alone.backward_transfer(version), r.backward_transfer(version));
            }
        }

        #[test]
        fn adding_a_constant_to_every_score_changes_no_difference(r in trees(), shift in -1.0..1.0_f64) {
            let scores = r.scores.iter().map(|(cell, score)| (*cell, score + shift)).collect();
            let shifted = History::new(r.parents.clone(), scores).unwrap();
            for version in r.parents.keys().copied() {
                let difference = r.average_forgetting(version).zip(shifted.average_forgetting(version));
                prop_assert!(difference.is_none_or(|(a, b)| (a - b).abs() < 1e-9));
            }
        }
    }
}
