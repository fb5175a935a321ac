//! Medians with intervals that assume nothing about the distribution. tests/performance_statistics.rs tests it.

use serde::Serialize;

/// The median of a sample.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Median {
    pub value: f64,
    /// Bounds of the interval of at least 95 %; `None` for samples of fewer than 6.
    pub interval: Option<(f64, f64)>,
}

/// The median of `sample` and the order statistics around it that hold the distribution's median with a probability
/// of at least 95 %: the largest k with P(Binomial(n, 1/2) < k) <= 2.5 %, then the k-th smallest and largest values.
///
/// # Panics
/// If `sample` is empty.
pub fn median(sample: &[f64]) -> Median {
    let mut sorted = sample.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    let value = (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0;
    let interval = match rank(n) {
        0 => None,
        k => Some((sorted[k - 1], sorted[n - k])),
    };
    Median { value, interval }
}

/// The largest k with P(Binomial(n, 1/2) < k) <= 2.5 %.
pub fn rank(n: usize) -> usize {
    let mut probability = 0.5f64.powi(n as i32);
    let mut below = probability;
    let mut k = 0;
    while below <= 0.025 {
        k += 1;
        probability *= (n + 1 - k) as f64 / k as f64;
        below += probability;
    }
    k
}
