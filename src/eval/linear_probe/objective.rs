//! The objective of a probe and its gradient: two products of the features, and a softmax between them.
//!
//! Both products read the same panels of sixteen rows, block by block: a block comes from memory once, and the second
//! product finds it in the cache. In panels of columns the features serve the preconditioner.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::eval::Embeddings;
use crate::eval::exp::exp;
use crate::eval::linalg::{Matrix, Standardiser, View, dot};
use crate::eval::panels::{
    Lanes, PANEL, Panels, lane_product_into, of_columns, of_rows, stride, t_product_into,
};

/// Rows of a block: 384 columns of it fit a second-level cache of 512 KiB. A chain of f32 sums is no longer than this.
pub(super) const BLOCK: usize = 256;

/// Weights are one vector: `W [classes, d]` row by row, then the biases `[classes]`.
pub(super) struct Problem {
    /// `[n, d]`, standardised.
    pub(super) features: Panels,
    /// Each block's panels of rows, [`of_rows`].
    by_rows: Vec<Vec<Lanes>>,
    targets: Vec<usize>,
    pub(super) classes: usize,
    pub(super) l2: f64,
}

impl Problem {
    /// Of the rows of `x`, standardised.
    pub(super) fn new(
        x: &Embeddings,
        standardiser: &Standardiser,
        targets: Vec<usize>,
        classes: usize,
        l2: f64,
    ) -> Self {
        let blocks = x.data.par_chunks(BLOCK * x.dim).map(|block| {
            let mut standardised = vec![0.0; block.len()];
            standardiser.apply_to(block, &mut standardised);
            (of_columns(&standardised, x.dim), of_rows(&standardised, x.dim))
        });
        let (blocks, by_rows) = blocks.unzip();
        Self { features: Panels { rows: x.rows, cols: x.dim, blocks }, by_rows, targets, classes, l2 }
    }

    /// How many weights there are.
    pub(super) fn weights(&self) -> usize {
        self.slopes() + self.classes
    }

    /// How many of them are `W`'s.
    fn slopes(&self) -> usize {
        self.features.cols * self.classes
    }

    /// The class of each row of `x [rows, d]`.
    pub(super) fn classify(&self, weights: &[f64], x: &Matrix<f32>) -> Vec<usize> {
        let weights = narrow(weights);
        let (w, biases) = weights.split_at(self.slopes());
        let mut logits = x.times(View::new(w, self.classes, x.cols).t());
        let rows = logits.data.chunks_exact_mut(self.classes);
        rows.map(|row| {
            row.iter_mut().zip(biases).for_each(|(logit, bias)| *logit += bias);
            largest(row)
        })
        .collect()
    }

    /// The objective and its gradient.
    pub(super) fn evaluate(&self, weights: &[f64]) -> (f64, Vec<f64>) {
        let n = self.features.rows;
        let (w, biases) = weights.split_at(self.slopes());
        let by_feature =
            (0..self.features.cols).flat_map(|feature| w[feature..].iter().step_by(self.features.cols));
        let (by_feature, biases) = (by_feature.map(|&weight| weight as f32).collect(), narrow(biases));
        let parts: Vec<(f64, Vec<f32>)> = (0..self.by_rows.len())
            .into_par_iter()
            .map(|block| Part { problem: self, by_feature: &by_feature, biases: &biases, block })
            .map(|part| pulp::Arch::new().dispatch(part))
            .collect();
        let (mut loss, mut gradient) = (0.0, vec![0.0; weights.len()]);
        for (part_loss, part) in parts {
            loss += part_loss;
            gradient.iter_mut().zip(part).for_each(|(sum, slope)| *sum += f64::from(slope));
        }
        gradient.iter_mut().for_each(|slope| *slope /= n as f64);
        gradient.iter_mut().zip(w).for_each(|(slope, weight)| *slope += self.l2 * weight);
        (loss / n as f64 + 0.5 * self.l2 * dot(w, w), gradient)
    }
}

/// The rows of one block, summed: their cross-entropy and its gradient.
struct Part<'a> {
    problem: &'a Problem,
    /// `Wᵀ [d, classes]`
    by_feature: &'a Vec<f32>,
    biases: &'a [f32],
    block: usize,
}

impl WithSimd for Part<'_> {
    type Output = (f64, Vec<f32>);

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> (f64, Vec<f32>) {
        let (d, classes) = (self.problem.features.cols, self.problem.classes);
        let targets = self.problem.targets.chunks(BLOCK).nth(self.block).unwrap_or_default();
        let rows = &self.problem.by_rows[self.block];
        let mut residual = vec![[0.0; PANEL]; targets.len().div_ceil(PANEL) * classes];
        let mut loss = 0.0;
        let panels = residual.chunks_exact_mut(classes).zip(targets.chunks(PANEL));
        for (rows, (residual, targets)) in rows.chunks_exact(stride(d)).zip(panels) {
            t_product_into(simd, residual, self.by_feature, &rows[..d]);
            loss += softmax_residual(residual, self.biases, targets);
        }
        let mut gradient = vec![0.0; self.problem.weights()];
        let (slopes, bias_slopes) = gradient.split_at_mut(d * classes);
        lane_product_into(simd, slopes, [classes, d], &residual, rows);
        for panel in residual.chunks_exact(classes) {
            bias_slopes.iter_mut().zip(panel).for_each(|(sum, lanes)| *sum += lanes.iter().sum::<f32>());
        }
        (loss, gradient)
    }
}

/// Turns sixteen rows' logits `[classes, 16]` without their biases into probability minus target; returns the sum of the
/// rows' cross-entropies. `targets` has one for each row; where they are fewer than sixteen, zeros fill the others.
#[inline(always)]
fn softmax_residual(logits: &mut [Lanes], biases: &[f32], targets: &[usize]) -> f64 {
    let mut largest = [f32::NEG_INFINITY; PANEL];
    for (class, bias) in logits.iter_mut().zip(biases) {
        for (logit, largest) in class.iter_mut().zip(&mut largest) {
            *logit += bias;
            *largest = if *logit > *largest { *logit } else { *largest };
        }
    }
    let mut of_targets = [0.0; PANEL];
    for (lane, &target) in targets.iter().enumerate() {
        of_targets[lane] = logits[target][lane];
    }
    let mut sums = [0.0_f32; PANEL];
    for class in logits.iter_mut() {
        for lane in 0..PANEL {
            class[lane] = exp(class[lane] - largest[lane]);
            sums[lane] += class[lane];
        }
    }
    let mut loss = 0.0;
    let mut scales = [0.0; PANEL];
    for lane in 0..targets.len() {
        loss += f64::from(largest[lane] - of_targets[lane]) + f64::from(sums[lane]).ln();
        scales[lane] = 1.0 / sums[lane];
    }
    for class in logits.iter_mut() {
        class.iter_mut().zip(&scales).for_each(|(value, scale)| *value *= scale);
    }
    targets.iter().enumerate().for_each(|(lane, &target)| logits[target][lane] -= 1.0);
    loss
}

/// Index of the largest value, the first of equal ones.
fn largest(values: &[f32]) -> usize {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = index;
        }
    }
    best
}

pub(super) fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&value| value as f32).collect()
}
