//! Measures of an embedding: pure functions of matrices and labels, and the record of what they gave.
//!
//! Matrices are row-major f32 `[n, d]` ([`Embeddings`]); labels are small integers. Nothing here does I/O or
//! knows a model. What a candidate's measures mean for its publication is `gate`'s to decide.

use serde::{Deserialize, Serialize};

use crate::types::{PeriodId, Version};

/// Row-major f32 `[rows, dim]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Embeddings {
    pub rows: usize,
    pub dim: usize,
    pub data: Vec<f32>,
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
    /// Mean squared distance between two views of a frame, both normalised; lower is better.
    pub alignment: f64,
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
    /// Held-out R^2 of the old space as a linear function of the new one.
    pub recoverability: f64,
}

/// kNN accuracy of an ancestor minus the candidate's, on the same queries, bootstrapped over streams.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    pub against: Version,
    pub knn: Interval,
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
