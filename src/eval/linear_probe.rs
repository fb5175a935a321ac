//! The linear and the few-shot probe: multinomial logistic regression on standardised features.
//!
//! Full-batch L-BFGS from zero, so there is no seed, no learning rate and no order of rows to tune; the objective
//! is convex and the answer is its minimum. The regularisation is scikit-learn's default
//! (`LogisticRegression(C=1)`): mean cross-entropy + |W|^2 / (2 n), biases free.
//!
//! Fast because features, logits and each block's gradient are f32 (an error of some 1e-8 of a gradient that is followed
//! down to 1e-5), features lie as each product reads them, and the preconditioner (`lbfgs`) saves two thirds of the
//! evaluations. Weights, sums over blocks and L-BFGS's own state are f64.

mod lbfgs;

use std::collections::BTreeMap;
use std::ops::Range;

use rayon::prelude::*;

use super::Embeddings;
use super::exp::exp;
use super::linalg::{Matrix, Standardiser, View, dot, product, product_into};
use super::random::hash;
use super::split::Split;

/// Examples of each label in a few-shot draw.
pub const SHOTS: usize = 10;

/// Draws whose accuracies are averaged: one draw of few examples varies by points.
const DRAWS: u64 = 5;

/// Rows of one part of the objective: larger outgrows the second-level cache, smaller adds more partial gradients.
const BLOCK: usize = 256;

/// Share of the queries that a classifier fitted on the whole bank answers with their label, 0..1.
/// `embeddings` `[n, d]`, one label a row.
///
/// # Panics
/// If the bank or the queries are empty or name rows that don't exist, or a value is not finite.
pub fn linear(embeddings: &Embeddings, labels: &[u32], split: &Split) -> f64 {
    probe(embeddings, labels, &split.bank, &split.queries)
}

/// As [`linear`], fitted on [`SHOTS`] bank rows of each label (all of a label that has fewer), averaged over five
/// draws that depend on the row numbers alone.
pub fn few_shot(embeddings: &Embeddings, labels: &[u32], split: &Split) -> f64 {
    let draws = (0..DRAWS).into_par_iter().map(|draw| {
        let bank = draw_shots(labels, &split.bank, draw);
        probe(embeddings, labels, &bank, &split.queries)
    });
    draws.collect::<Vec<f64>>().iter().sum::<f64>() / DRAWS as f64
}

fn draw_shots(labels: &[u32], bank: &[usize], draw: u64) -> Vec<usize> {
    let mut by_label = BTreeMap::<u32, Vec<usize>>::new();
    bank.iter().for_each(|&row| by_label.entry(labels[row]).or_default().push(row));
    let mut drawn = Vec::new();
    for rows in by_label.values_mut() {
        rows.sort_by_key(|row| (hash(draw, &row.to_le_bytes()), *row));
        drawn.extend(rows.iter().take(SHOTS));
    }
    drawn.sort_unstable();
    drawn
}

fn probe(embeddings: &Embeddings, labels: &[u32], bank: &[usize], queries: &[usize]) -> f64 {
    assert!(!bank.is_empty() && !queries.is_empty());
    let mut classes: Vec<u32> = bank.iter().map(|&row| labels[row]).collect();
    classes.sort_unstable();
    classes.dedup();
    // A label that is not in the bank is no class: its queries are answered wrongly.
    let class_of = |row: usize| classes.binary_search(&labels[row]).ok();
    let x = embeddings.select(bank);
    let standardiser = Standardiser::fit(&x);
    let targets = bank.iter().filter_map(|&row| class_of(row)).collect();
    let problem = Problem::new(standardiser.apply(&x), targets, classes.len(), 1.0 / bank.len() as f64);
    let answers =
        problem.classify(&lbfgs::minimise(&problem), &standardiser.apply(&embeddings.select(queries)));
    let hits =
        answers.iter().zip(queries).filter(|(answer, query)| class_of(**query) == Some(**answer)).count();
    hits as f64 / queries.len() as f64
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

/// Weights are one vector: `W [classes, d]` row by row, then the biases `[classes]`.
struct Problem {
    /// `[n, d]`, standardised.
    x: Matrix<f32>,
    /// The same with each block transposed, `[d, rows]`: logits and gradient both read memory in order.
    transposed: Vec<f32>,
    targets: Vec<usize>,
    classes: usize,
    l2: f64,
}

impl Problem {
    fn new(x: Matrix<f32>, targets: Vec<usize>, classes: usize, l2: f64) -> Self {
        let blocks = x.data.par_chunks(BLOCK * x.cols.max(1)).flat_map_iter(|block| {
            (0..x.cols).flat_map(move |column| block[column..].iter().step_by(x.cols).copied())
        });
        Self { transposed: blocks.collect(), x, targets, classes, l2 }
    }

    /// How many of the weights are `W`'s.
    fn slopes(&self) -> usize {
        self.x.cols * self.classes
    }

    /// The class of each row of `x [rows, d]`.
    fn classify(&self, weights: &[f64], x: &Matrix<f32>) -> Vec<usize> {
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
    fn evaluate(&self, weights: &[f64]) -> (f64, Vec<f64>) {
        let n = self.x.rows;
        let narrowed = narrow(weights);
        let parts: Vec<(f64, Vec<f32>)> = (0..n.div_ceil(BLOCK))
            .into_par_iter()
            .map(|block| self.part(&narrowed, block * BLOCK..((block + 1) * BLOCK).min(n)))
            .collect();
        let (mut loss, mut gradient) = (0.0, vec![0.0; weights.len()]);
        for (part_loss, part) in parts {
            loss += part_loss;
            gradient.iter_mut().zip(part).for_each(|(sum, slope)| *sum += f64::from(slope));
        }
        gradient.iter_mut().for_each(|slope| *slope /= n as f64);
        let w = &weights[..self.slopes()];
        gradient.iter_mut().zip(w).for_each(|(slope, weight)| *slope += self.l2 * weight);
        (loss / n as f64 + 0.5 * self.l2 * dot(w, w), gradient)
    }

    /// Sums over some rows: the cross-entropy and its gradient.
    fn part(&self, weights: &[f32], rows: Range<usize>) -> (f64, Vec<f32>) {
        let (w, biases) = weights.split_at(self.slopes());
        let (d, targets) = (self.x.cols, &self.targets[rows.clone()]);
        let transposed = &self.transposed[rows.start * d..rows.end * d];
        let mut residual = product(View::new(w, self.classes, d), View::new(transposed, d, targets.len()));
        let loss = softmax_residual(&mut residual, biases, targets);
        let mut gradient = vec![0.0; weights.len()];
        let (slopes, bias_slopes) = gradient.split_at_mut(self.slopes());
        product_into(
            slopes,
            View::new(&residual, self.classes, targets.len()),
            self.x.view().row_range(rows),
        );
        for (slope, class) in bias_slopes.iter_mut().zip(residual.chunks_exact(targets.len())) {
            *slope = class.iter().sum();
        }
        (loss, gradient)
    }
}

/// Turns logits `[classes, rows]` without their biases into probability minus target; returns the sum of the rows'
/// cross-entropies. Rows lie side by side, so that several are computed at once.
fn softmax_residual(logits: &mut [f32], biases: &[f32], targets: &[usize]) -> f64 {
    let rows = targets.len();
    let mut largest = vec![f32::NEG_INFINITY; rows];
    for (class, bias) in logits.chunks_exact_mut(rows).zip(biases) {
        for (logit, largest) in class.iter_mut().zip(&mut largest) {
            *logit += bias;
            *largest = if *logit > *largest { *logit } else { *largest };
        }
    }
    let of_targets: Vec<f32> =
        targets.iter().enumerate().map(|(row, class)| logits[class * rows + row]).collect();
    let mut sums = vec![0.0_f32; rows];
    for class in logits.chunks_exact_mut(rows) {
        for ((logit, sum), largest) in class.iter_mut().zip(&mut sums).zip(&largest) {
            *logit = exp(*logit - largest);
            *sum += *logit;
        }
    }
    let terms = largest.iter().zip(&sums).zip(&of_targets);
    let loss = terms.map(|((&max, &sum), &target)| f64::from(max - target) + f64::from(sum).ln()).sum();
    sums.iter_mut().for_each(|sum| *sum = 1.0 / *sum);
    for class in logits.chunks_exact_mut(rows) {
        class.iter_mut().zip(&sums).for_each(|(value, scale)| *value *= scale);
    }
    targets.iter().enumerate().for_each(|(row, class)| logits[class * rows + row] -= 1.0);
    loss
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&value| value as f32).collect()
}

#[cfg(test)]
mod tests;
