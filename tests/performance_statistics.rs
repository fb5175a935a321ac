//! The statistics behind docs/performance.md and docs/learning_performance.md. They belong to the benchmark, which has
//! no test harness.

#[path = "../benches/performance/learning/spread.rs"]
mod spread;
#[path = "../benches/performance/statistics.rs"]
mod statistics;

use spread::{Spread, WINDOW, smoothed};
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

#[test]
fn precisions_agree_only_while_they_differ_less_than_seeds() {
    let f32 = [vec![1.0, 2.0], vec![1.5, 2.5]];
    let shifted =
        |by: f64| f32.clone().map(|losses| losses.into_iter().map(|loss| loss + by).collect::<Vec<f64>>());
    let deviation = 0.5 / 2f64.sqrt();
    let near = Spread::of(&shifted(0.9 * deviation), &f32);
    assert!((near.seeds_deviation - deviation).abs() < 1e-12);
    assert!((near.mean_difference - 0.9 * deviation).abs() < 1e-12 && near.agrees());
    assert!(!Spread::of(&shifted(-1.1 * deviation), &f32).agrees());
}

#[test]
fn the_farthest_difference_keeps_its_sign_and_opposite_ones_cancel_in_the_mean() {
    let f32 = [vec![1.0, 1.0, 1.0], vec![2.0, 2.0, 2.0]];
    let bf16 = [vec![1.1, 0.7, 1.2], vec![2.1, 1.7, 2.2]];
    let spread = Spread::of(&bf16, &f32);
    assert!((spread.farthest_difference + 0.3).abs() < 1e-12 && spread.mean_difference.abs() < 1e-12);
    assert!((spread.last[0] - 1.7).abs() < 1e-12 && spread.last[1] == 1.5);
}

#[test]
fn a_smoothed_loss_is_the_mean_of_whole_windows_alone() {
    let losses: Vec<f64> = (0..WINDOW + 1).map(|step| step as f64).collect();
    let middle = (WINDOW - 1) as f64 / 2.0;
    assert_eq!(smoothed(&losses), [middle, middle + 1.0]);
}
