//! The bootstrap of a ratio of sums over clusters, and of the paired difference of two accuracies.
//!
//! Frames of one stream resemble each other, so the unit drawn is the stream, not the frame (Efron &
//! Tibshirani 1993, chapter 8; for pairs of classifiers on one set: Koehn 2004). Percentile interval.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

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

/// How often is drawn, and by which key.
#[derive(Debug, Clone, Copy)]
pub struct Draws {
    pub resamples: usize,
    pub seed: u64,
}

/// Accuracy of `before` minus accuracy of `after`, -1..1, with its 95 % interval, as [`ratio`] has it. A positive value is a loss.
///
/// # Panics
/// If the three slices differ in length or are empty, or there are no resamples.
pub fn paired_difference(pairs: Pairs, draws: Draws) -> Interval {
    assert_eq!(pairs.before.len(), pairs.after.len());
    let difference = |(&before, &after): (&bool, &bool)| f64::from(i8::from(before) - i8::from(after));
    let parts: Vec<(f64, f64)> =
        pairs.before.iter().zip(pairs.after).map(|pair| (difference(pair), 1.0)).collect();
    ratio(&parts, pairs.clusters, -1.0..=1.0, draws)
}

/// The sum of the numerators over that of the denominators (a mean where these are 1), with the 95 % interval of draws with replacement
/// of as many clusters as there are; `clusters` is each part's, in any numbering. With fewer than two nothing can be said about the
/// spread: the bounds are then those of `range`, in which the ratio lies. Denominators are not negative; where all are 0 the ratio is the
/// range's end.
///
/// # Panics
/// If the slices differ in length or are empty, or there are no resamples.
pub fn ratio(parts: &[(f64, f64)], clusters: &[usize], range: RangeInclusive<f64>, draws: Draws) -> Interval {
    assert!(!parts.is_empty() && draws.resamples > 0);
    assert_eq!(parts.len(), clusters.len());
    let clusters = totals(parts, clusters);
    let of = |(numerator, denominator): (f64, f64)| match denominator > 0.0 {
        true => numerator / denominator,
        false => *range.end(),
    };
    let estimate = of(sum(clusters.iter()));
    if clusters.len() < 2 {
        return Interval { estimate, lower: *range.start(), upper: *range.end() };
    }
    let mut random = SplitMix64::new(draws.seed);
    let mut ratios: Vec<f64> = (0..draws.resamples)
        .map(|_| of(sum((0..clusters.len()).map(|_| &clusters[random.below(clusters.len())]))))
        .collect();
    ratios.sort_by(f64::total_cmp);
    Interval { estimate, lower: quantile(&ratios, 0.025), upper: quantile(&ratios, 0.975) }
}

/// The parts' sum by cluster.
fn totals(parts: &[(f64, f64)], clusters: &[usize]) -> Vec<(f64, f64)> {
    let mut totals = BTreeMap::<usize, (f64, f64)>::new();
    for (part, &cluster) in parts.iter().zip(clusters) {
        let total = totals.entry(cluster).or_default();
        *total = (total.0 + part.0, total.1 + part.1);
    }
    totals.into_values().collect()
}

fn sum<'a>(parts: impl Iterator<Item = &'a (f64, f64)>) -> (f64, f64) {
    parts.fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1))
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
        let found = paired_difference(pairs, Draws { resamples: 4000, seed: 1 });
        assert!((found.estimate - 0.1).abs() < 1e-12);
        assert!((found.lower - (0.1 - 1.96 * 0.0269)).abs() < 0.006, "{found:?}");
        assert!((found.upper - (0.1 + 1.96 * 0.0269)).abs() < 0.006, "{found:?}");
        assert_eq!(found, paired_difference(pairs, Draws { resamples: 4000, seed: 1 }));
    }

    #[test]
    fn the_same_answers_in_fewer_streams_give_a_wider_interval() {
        let before: Vec<bool> = (0..400).map(|i| i % 100 < 30).collect();
        let after = vec![false; 400];
        let width = |clusters: Vec<usize>| {
            let pairs = Pairs { before: &before, after: &after, clusters: &clusters };
            let found = paired_difference(pairs, Draws { resamples: 2000, seed: 1 });
            found.upper - found.lower
        };
        // Ten streams whose frames share their answer, against single frames.
        assert!(width((0..400).map(|i| i / 10).collect()) > 2.0 * width((0..400).collect()));
    }

    #[test]
    fn one_stream_bounds_nothing() {
        let pairs = Pairs { before: &[true, true], after: &[false, true], clusters: &[3, 3] };
        let found = paired_difference(pairs, Draws { resamples: 100, seed: 1 });
        assert_eq!((found.estimate, found.lower, found.upper), (0.5, -1.0, 1.0));
    }

    #[test]
    fn a_ratio_is_one_of_sums_with_bounds_over_clusters() {
        let (parts, clusters) =
            ([(0.0, 1.0), (0.2, 1.0), (1.5, 3.0), (1.0, 1.0), (1.0, 1.0)], [0, 0, 1, 2, 2]);
        let draws = Draws { resamples: 2000, seed: 1 };
        let found = ratio(&parts, &clusters, 0.0..=1.0, draws);
        assert!((found.estimate - 3.7 / 7.0).abs() < 1e-12);
        // Of three clusters with ratios of 0.1, 0.5 and 1, 1 draw in 27 is the same one thrice: beyond each quantile.
        assert!((found.lower - 0.1).abs() < 1e-12 && (found.upper - 1.0).abs() < 1e-12, "{found:?}");
        let alone = ratio(&parts, &[7; 5], 0.0..=1.0, draws);
        assert_eq!((alone.estimate, alone.lower, alone.upper), (found.estimate, 0.0, 1.0));
        let nothing = ratio(&[(0.0, 0.0); 4], &[0, 0, 1, 2], 0.0..=1.0, draws);
        assert_eq!((nothing.estimate, nothing.lower, nothing.upper), (1.0, 1.0, 1.0));
    }

    proptest! {
        #[test]
        fn bounds_enclose_the_median_and_swapping_sides_negates_the_estimate(
            answers in prop::collection::vec((any::<bool>(), any::<bool>(), 0..6_usize), 2..60), seed: u64,
        ) {
            let before: Vec<_> = answers.iter().map(|a| a.0).collect();
            let after: Vec<_> = answers.iter().map(|a| a.1).collect();
            let clusters: Vec<_> = answers.iter().map(|a| a.2).collect();
            let draws = Draws { resamples: 200, seed };
            let found = paired_difference(Pairs { before: &before, after: &after, clusters: &clusters }, draws);
            let swapped = paired_difference(Pairs { before: &after, after: &before, clusters: &clusters }, draws);
            prop_assert!(-1.0 <= found.lower && found.lower <= found.upper && found.upper <= 1.0);
            prop_assert!((found.estimate + swapped.estimate).abs() < 1e-12);
            prop_assert!((found.lower + swapped.upper).abs() < 1e-12);
        }
    }
}
