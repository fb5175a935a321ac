//! Measures of an embedding: pure functions of matrices and labels, and the record of what they gave.
//!
//! Matrices are row-major f32 `[n, d]` ([`Embeddings`]); labels are small integers. Nothing here does I/O or
//! knows a model. What a candidate's measures mean for its publication is `gate`'s to decide.

pub mod bootstrap;
pub mod drift;
mod eigen;
pub mod evaluate;
mod exp;
pub mod forgetting;
pub mod gate;
#[cfg(test)]
mod golden;
pub mod knn;
mod linalg;
pub mod linear_probe;
mod neighbours;
mod panels;
mod random;
pub mod split;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::types::{EventTime, PeriodId, Version};
use crate::widest::widest;

/// Row-major f32 `[rows, dim]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Embeddings {
    pub rows: usize,
    pub dim: usize,
    pub data: Vec<f32>,
}

impl Embeddings {
    /// # Panics
    /// If `data` does not hold `rows * dim` values.
    pub fn new(rows: usize, dim: usize, data: Vec<f32>) -> Self {
        assert_eq!(data.len(), rows * dim, "{rows} rows of {dim} values");
        Self { rows, dim, data }
    }

    pub fn row(&self, index: usize) -> &[f32] {
        &self.data[index * self.dim..(index + 1) * self.dim]
    }

    pub fn is_finite(&self) -> bool {
        self.data.iter().all(|value| value.is_finite())
    }

    /// The rows named by `indices`, in that order.
    pub fn select(&self, indices: &[usize]) -> Self {
        let mut data = Vec::with_capacity(indices.len() * self.dim);
        indices.iter().for_each(|&index| data.extend_from_slice(self.row(index)));
        Self::new(indices.len(), self.dim, data)
    }

    /// Each row divided by its L2 norm; a row of zeros stays one.
    pub fn normalised(&self) -> Self {
        self.clone().into_normalised()
    }

    /// As [`Self::normalised`].
    pub fn into_normalised(mut self) -> Self {
        let dim = self.dim.max(1);
        self.data.par_chunks_mut(dim * NORMALISED_ROWS).for_each(|rows| widest!(normalise(rows, dim)));
        self
    }
}

/// Rows that a thread normalises at a time: enough to be worth handing over.
const NORMALISED_ROWS: usize = 256;

#[inline(always)]
fn normalise(rows: &mut [f32], dim: usize) {
    for row in rows.chunks_exact_mut(dim) {
        let (chunks, rest) = row.as_chunks::<16>();
        let mut squares = [0.0; 16];
        for chunk in chunks {
            for (sum, &value) in squares.iter_mut().zip(chunk) {
                *sum += f64::from(value) * f64::from(value);
            }
        }
        let rest: f64 = rest.iter().map(|&value| f64::from(value).powi(2)).sum();
        let square = squares.iter().sum::<f64>() + rest;
        if square > 0.0 {
            let scale = (1.0 / square.sqrt()) as f32;
            row.iter_mut().for_each(|value| *value *= scale);
        }
    }
}

/// What is known of a probe set's frame besides its pixels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameMeta {
    pub stream_id: String,
    pub captured_at: EventTime,
    pub label: Option<String>,
}

/// Why an ancestor's embeddings are compared with; one version may be listed once for each role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ancestor {
    /// The first one evaluated on the set: it learned the period.
    Learned,
    /// The one with the best kNN score on it.
    Best,
    /// The candidate's parent.
    Parent,
}

/// Accuracies in 0..1 on one labelled probe set; `None` where the set has too few labels or streams.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Accuracies {
    pub knn: Option<f64>,
    pub linear: Option<f64>,
    pub few_shot: Option<f64>,
}

/// An estimate with the bounds of its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    pub estimate: f64,
    pub lower: f64,
    pub upper: f64,
}

/// Label-free measures of one embedding of one probe set.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    /// Mean squared distance between two views of a frame, both normalised; lower is better. `None`: no views were embedded.
    pub alignment: Option<f64>,
    /// Log of the mean Gaussian potential of pairs; lower is more uniform.
    pub uniformity: f64,
    /// RankMe: exp of the entropy of the normalised singular values, 1..dim.
    pub effective_rank: f64,
}

/// How far a candidate has moved from an older version on one frozen probe set.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Drift {
    pub against: Version,
    /// Linear CKA, 1: the same up to rotation and scale.
    pub cka: f64,
    /// Mean share of the k nearest neighbours that both have.
    pub neighbour_overlap: f64,
    /// [`drift::retention`]. Absent from evaluations by programs that did not measure it.
    pub neighbour_retention: Option<f64>,
    /// Held-out R^2 of the old space as a linear function of the new one. `None`: the set can't be held out by
    /// stream or by time.
    pub recoverability: Option<f64>,
}

/// kNN accuracy of an ancestor minus the candidate's, on the same queries, bootstrapped over streams.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    pub against: Version,
    pub knn: Interval,
}

/// Neighbour retention from an ancestor on one frozen probe set: a measure of what was kept that needs no labels.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Retention {
    pub against: Version,
    /// As [`drift::retention`], at most 1, bootstrapped over streams.
    pub kept: Interval,
}

/// The candidate on one earlier period's probe set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeEvaluation {
    pub period: PeriodId,
    pub frames: u64,
    pub accuracies: Accuracies,
    pub shape: Shape,
    /// Against the version that learned the period.
    pub drift: Option<Drift>,
    /// Against the candidate's parent; `None` without labels.
    pub parent_loss: Option<Loss>,
    /// Against the best ancestor by kNN.
    pub best_loss: Option<Loss>,
    /// Against the candidate's parent.
    pub parent_retention: Option<Retention>,
}

/// Candidate and its reference (teacher; for the first period its own initial weights) on the new probe set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NewProbeEvaluation {
    pub period: PeriodId,
    pub frames: u64,
    pub candidate: Accuracies,
    pub reference: Accuracies,
    pub shape: Shape,
    /// NT-Xent of candidate and reference on identical views and batches.
    pub candidate_loss: f64,
    pub reference_loss: f64,
}

/// All that the gate decides on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Every weight and every embedding is finite.
    pub finite: bool,
    pub new_probe: Option<NewProbeEvaluation>,
    pub probes: Vec<ProbeEvaluation>,
}

#[cfg(test)]
mod tests {
    use super::random::SplitMix64;
    use super::split::Split;
    use super::*;

    /// Every measure of 1,300 x 70 values: several blocks of each kind, none of them full at the end.
    fn measures() -> Vec<u64> {
        let mut random = SplitMix64::new(5);
        let mut cloud = || {
            let data = (0..1300 * 70).map(|i| (random.next() >> 40) as f32 / 1e7 + (i % 210) as f32 * 0.01);
            Embeddings::new(1300, 70, data.collect())
        };
        let (x, y) = (cloud(), cloud());
        let labels: Vec<u32> = (0..1300).map(|i| i % 6).collect();
        let split = Split { bank: (0..700).collect(), queries: (700..1300).collect() };
        let values = [
            knn::knn(&x, &labels, &split, 20).accuracy,
            linear_probe::linear(&x, &labels, &split),
            linear_probe::few_shot(&x, &labels, &split),
            drift::linear_cka(&x, &y),
            drift::neighbour_overlap(&x, &y, 20),
            drift::recoverability(&x, &y, &split),
            drift::uniformity(&x),
            drift::effective_rank(&x),
        ];
        values.map(f64::to_bits).to_vec()
    }

    #[test]
    fn one_thread_and_three_measure_the_same_bits() {
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(measures)
        };
        assert_eq!(on(1), on(3));
    }
}
