//! The paired bootstrap of a difference in accuracy, over clusters.
//!
//! Frames of one stream resemble each other, so the unit drawn is the stream, not the frame (Efron &
//! Tibshirani 1993, chapter 8; for pairs of classifiers on one set: Koehn 2004). Percentile interval.

use super::Interval;
use super::random::SplitMix64;

/// Two classifiers' answers to the same queries.
#[derive(Debug, Clone, Copy)]
pub struct Pairs<'a> {
    pub before: &'a [bool],
    pub after: &'a [bool],
    /// Number of each query's stream; any numbering will do.
    pub clusters: &'a [usize],
}

/// Accuracy of `before` minus accuracy of `after`, -1..1, with its 95 % interval from `resamples` draws of as
/// many clusters as there are, with replacement. A positive value is a loss. With fewer than two clusters
/// nothing can be said about the spread: the bounds are then -1 and 1.
///
/// # Panics
/// If the three slices differ in length or are empty, or `resamples` is 0.
pub fn paired_difference(pairs: Pairs, resamples: usize, seed: u64) -> Interval {
    let queries = pairs.before.len();
    assert!(queries > 0 && resamples > 0);
    assert_eq!((pairs.after.len(), pairs.clusters.len()), (queries, queries));
    let clusters = totals(pairs);
    let estimate = ratio(clusters.iter());
    if clusters.len() < 2 {
        return Interval { estimate, lower: -1.0, upper: 1.0 };
    }
    let mut random = SplitMix64::new(seed);
    let mut draws: Vec<f64> = (0..resamples)
        .map(|_| ratio((0..clusters.len()).map(|_| &clusters[random.below(clusters.len())])))
        .collect();
    draws.sort_by(f64::total_cmp);
    Interval { estimate, lower: quantile(&draws, 0.025), upper: quantile(&draws, 0.975) }
}

#[derive(Default)]
struct Cluster {
    queries: i64,
    /// Right answers of `before` minus those of `after`.
    difference: i64,
}

fn totals(pairs: Pairs) -> Vec<Cluster> {
    let mut clusters = std::collections::BTreeMap::<usize, Cluster>::new();
    for ((&before, &after), &cluster) in pairs.before.iter().zip(pairs.after).zip(pairs.clusters) {
        let total = clusters.entry(cluster).or_default();
        total.queries += 1;
        total.difference += i64::from(before) - i64::from(after);
    }
    clusters.into_values().collect()
}

fn ratio<'a>(clusters: impl Iterator<Item = &'a Cluster>) -> f64 {
    let (queries, difference) = clusters.fold((0, 0), |(queries, difference), cluster| {
        (queries + cluster.queries, difference + cluster.difference)
    });
    difference as f64 / queries as f64
}

/// Linear interpolation between order statistics (numpy's default).
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let place = q * (sorted.len() - 1) as f64;
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * (place - low as f64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn quantiles_equal_numpys() {
        // numpy.quantile([1, 2, 4, 8], [0.025, 0.5, 0.975])
        for (q, want) in [(0.025, 1.075), (0.5, 3.0), (0.975, 7.7)] {
            assert!((quantile(&[1.0, 2.0, 4.0, 8.0], q) - want).abs() < 1e-12);
        }
    }

    #[test]
    fn independent_queries_get_about_the_normal_interval() {
        // 400 clusters of one query, a loss in 80 and a gain in 40: mean 0.1, sd sqrt(0.3 - 0.01) / 20 = 0.0269.
        let before: Vec<bool> = (0..400).map(|i| i < 80).collect();
        let after: Vec<bool> = (0..400).map(|i| (80..120).contains(&i)).collect();
        let clusters: Vec<usize> = (0..400).collect();
        let pairs = Pairs { before: &before, after: &after, clusters: &clusters };
        let found = paired_difference(pairs, 4000, 1);
        assert!((found.estimate - 0.1).abs() < 1e-12);
        assert!((found.lower - (0.1 - 1.96 * 0.0269)).abs() < 0.006, "{found:?}");
        assert!((found.upper - (0.1 + 1.96 * 0.0269)).abs() < 0.006, "{found:?}");
        assert_eq!(found, paired_difference(pairs, 4000, 1));
    }

    #[test]
    fn the_same_answers_in_fewer_streams_give_a_wider_interval() {
        let before: Vec<bool> = (0..400).map(|i| i % 100 < 30).collect();
        let after = vec![false; 400];
        let width = |clusters: Vec<usize>| {
            let pairs = Pairs { before: &before, after: &after, clusters: &clusters };
            let found = paired_difference(pairs, 2000, 1);
            found.upper - found.lower
        };
        // Ten streams whose frames share their answer, against single frames.
        assert!(width((0..400).map(|i| i / 10).collect()) > 2.0 * width((0..400).collect()));
    }

    #[test]
    fn one_stream_bounds_nothing() {
        let pairs = Pairs { before: &[true, true], after: &[false, true], clusters: &[3, 3] };
        let found = paired_difference(pairs, 100, 1);
        assert_eq!((found.estimate, found.lower, found.upper), (0.5, -1.0, 1.0));
    }

    proptest! {
        #[test]
        fn bounds_enclose_the_median_and_swapping_sides_negates_the_estimate(
            answers in prop::collection::vec((any::<bool>(), any::<bool>(), 0..6_usize), 2..60), seed: u64,
        ) {
            let before: Vec<_> = answers.iter().map(|a| a.0).collect();
            let after: Vec<_> = answers.iter().map(|a| a.1).collect();
            let clusters: Vec<_> = answers.iter().map(|a| a.2).collect();
            let found = paired_difference(Pairs { before: &before, after: &after, clusters: &clusters }, 200, seed);
            let swapped = paired_difference(Pairs { before: &after, after: &before, clusters: &clusters }, 200, seed);
            prop_assert!(-1.0 <= found.lower && found.lower <= found.upper && found.upper <= 1.0);
            prop_assert!((found.estimate + swapped.estimate).abs() < 1e-12);
            prop_assert!((found.lower + swapped.upper).abs() < 1e-12);
        }
    }
}
