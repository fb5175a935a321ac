//! The statistics behind docs/performance.md. They belong to the benchmark, which has no test harness.

#[path = "../benches/performance/statistics.rs"]
mod statistics;

use statistics::{median, rank};

#[test]
fn the_median_of_an_even_sample_is_the_middle_of_its_two_middle_values() {
    assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]).value, 2.5);
    assert_eq!(median(&[3.0, 1.0, 2.0]).value, 2.0);
}

#[test]
fn ranks_are_those_of_the_published_table_of_the_sign_test() {
    // Critical values of the two-sided sign test at 5 % (Dixon and Mood 1946), plus one.
    for (n, k) in [(5, 0), (6, 1), (8, 1), (9, 2), (12, 3), (15, 4), (20, 6), (25, 8), (40, 14)] {
        assert_eq!(rank(n), k, "n = {n}");
    }
}

#[test]
fn the_interval_is_made_of_order_statistics() {
    let sample: Vec<f64> = (1..=15).rev().map(f64::from).collect();
    assert_eq!(median(&sample).interval, Some((4.0, 12.0)));
    assert_eq!(median(&sample[..5]).interval, None);
}
