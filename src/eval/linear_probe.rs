//! The linear and the few-shot probe: multinomial logistic regression on standardised features.
//!
//! Full-batch L-BFGS in f64 from zero, so there is no seed, no learning rate and no order of rows to tune;
//! the objective is convex and the answer is its minimum. The regularisation is scikit-learn's default
//! (`LogisticRegression(C=1)`): mean cross-entropy + |W|^2 / (2 n), biases free.

use std::collections::{BTreeMap, VecDeque};

use super::Embeddings;
use super::linalg::{Matrix, Standardiser, dot};
use super::random::hash;
use super::split::Split;

/// Examples of each label in a few-shot draw.
pub const SHOTS: usize = 10;

/// Draws whose accuracies are averaged: one draw of few examples varies by points.
const DRAWS: u64 = 5;

/// Pairs of steps and gradient changes that L-BFGS remembers; more pay little on problems this small.
const MEMORY: usize = 10;

/// Bound on the iterations. Standardised features converge in 30-100; stopping earlier costs accuracy's third digit.
const MAX_ITERATIONS: usize = 300;

/// The fit ends when no component of the gradient of the mean loss is larger.
const GRADIENT_TOLERANCE: f64 = 1e-5;

/// Share of the queries that a classifier fitted on the whole bank answers with their label, 0..1.
/// `embeddings` `[n, d]`, one label a row.
///
/// # Panics
/// If the bank or the queries are empty or name rows that don't exist.
pub fn linear(embeddings: &Embeddings, labels: &[u32], split: &Split) -> f64 {
    probe(embeddings, labels, &split.bank, &split.queries)
}

/// As [`linear`], fitted on [`SHOTS`] bank rows of each label (all of a label that has fewer), averaged over five
/// draws that depend on the row numbers alone.
pub fn few_shot(embeddings: &Embeddings, labels: &[u32], split: &Split) -> f64 {
    let draws = (0..DRAWS).map(|draw| {
        let bank = draw_shots(labels, &split.bank, draw);
        probe(embeddings, labels, &bank, &split.queries)
    });
    draws.sum::<f64>() / DRAWS as f64
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
    let x = Matrix::from_embeddings(&embeddings.select(bank));
    let standardiser = Standardiser::fit(&x);
    let problem = Problem {
        x: standardiser.apply(&x),
        targets: bank.iter().filter_map(|&row| class_of(row)).collect(),
        classes: classes.len(),
        l2: 1.0 / bank.len() as f64,
    };
    let weights = minimise(&problem);
    let asked = standardiser.apply(&Matrix::from_embeddings(&embeddings.select(queries)));
    let logits = problem.logits(&weights, &asked);
    let hits = logits
        .data
        .chunks_exact(problem.classes)
        .zip(queries)
        .filter(|(row, query)| class_of(**query) == Some(largest(row)))
        .count();
    hits as f64 / queries.len() as f64
}

/// Index of the largest value, the first of equal ones.
fn largest(values: &[f64]) -> usize {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = index;
        }
    }
    best
}

/// Weights are one vector: `W [d, classes]` row by row, then the biases `[classes]`.
struct Problem {
    /// `[n, d]`, standardised.
    x: Matrix,
    targets: Vec<usize>,
    classes: usize,
    l2: f64,
}

impl Problem {
    fn unknowns(&self) -> usize {
        (self.x.cols + 1) * self.classes
    }

    /// `[rows, classes]`
    fn logits(&self, weights: &[f64], x: &Matrix) -> Matrix {
        let (w, biases) = weights.split_at(x.cols * self.classes);
        let w = Matrix { rows: x.cols, cols: self.classes, data: w.to_vec() };
        let mut logits = x.times(&w);
        for row in logits.data.chunks_exact_mut(self.classes) {
            row.iter_mut().zip(biases).for_each(|(logit, bias)| *logit += bias);
        }
        logits
    }

    /// The objective and its gradient.
    fn evaluate(&self, weights: &[f64]) -> (f64, Vec<f64>) {
        let n = self.x.rows as f64;
        let mut residual = self.logits(weights, &self.x);
        let mut loss = 0.0;
        for (row, &target) in residual.data.chunks_exact_mut(self.classes).zip(&self.targets) {
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = row.iter().map(|logit| (logit - max).exp()).sum();
            loss += max + sum.ln() - row[target];
            row.iter_mut().for_each(|logit| *logit = (*logit - max).exp() / sum / n);
            row[target] -= 1.0 / n;
        }
        let mut gradient = self.x.t_times(&residual).data;
        let w = &weights[..gradient.len()];
        gradient.iter_mut().zip(w).for_each(|(slope, weight)| *slope += self.l2 * weight);
        let mut biases = vec![0.0; self.classes];
        for row in residual.data.chunks_exact(self.classes) {
            biases.iter_mut().zip(row).for_each(|(bias, value)| *bias += value);
        }
        gradient.extend(biases);
        (loss / n + 0.5 * self.l2 * dot(w, w), gradient)
    }
}

/// L-BFGS with backtracking (Nocedal & Wright, *Numerical Optimization*, algorithms 7.4, 7.5 and 3.1).
fn minimise(problem: &Problem) -> Vec<f64> {
    let mut weights = vec![0.0; problem.unknowns()];
    let (mut loss, mut gradient) = problem.evaluate(&weights);
    let mut history = VecDeque::<Update>::new();
    for _ in 0..MAX_ITERATIONS {
        if gradient.iter().all(|slope| slope.abs() <= GRADIENT_TOLERANCE) {
            break;
        }
        let direction = descent_direction(&gradient, &history);
        let Some(next) = line_search(problem, &weights, loss, &gradient, &direction) else {
            break;
        };
        let update = Update::new(&weights, &gradient, &next);
        // Convexity makes this positive but for rounding at the very end.
        if update.curvature > 1e-16 {
            history.push_back(update);
        }
        if history.len() > MEMORY {
            history.pop_front();
        }
        (weights, loss, gradient) = (next.weights, next.loss, next.gradient);
    }
    weights
}

struct Update {
    step: Vec<f64>,
    change: Vec<f64>,
    /// `step . change`
    curvature: f64,
}

impl Update {
    fn new(weights: &[f64], gradient: &[f64], next: &Point) -> Self {
        let step = difference(&next.weights, weights);
        let change = difference(&next.gradient, gradient);
        Self { curvature: dot(&step, &change), step, change }
    }
}

struct Point {
    weights: Vec<f64>,
    loss: f64,
    gradient: Vec<f64>,
}

/// The two-loop recursion.
fn descent_direction(gradient: &[f64], history: &VecDeque<Update>) -> Vec<f64> {
    let mut direction: Vec<f64> = gradient.iter().map(|slope| -slope).collect();
    let mut shares = Vec::with_capacity(history.len());
    for update in history.iter().rev() {
        let share = dot(&update.step, &direction) / update.curvature;
        add_scaled(&mut direction, -share, &update.change);
        shares.push(share);
    }
    if let Some(newest) = history.back() {
        let scale = newest.curvature / dot(&newest.change, &newest.change);
        direction.iter_mut().for_each(|value| *value *= scale);
    }
    for (update, share) in history.iter().zip(shares.into_iter().rev()) {
        let correction = dot(&update.change, &direction) / update.curvature;
        add_scaled(&mut direction, share - correction, &update.step);
    }
    direction
}

/// The first of the steps 1, 1/2, 1/4, ... that lowers the loss enough (Armijo); `None` if rounding allows none.
fn line_search(
    problem: &Problem,
    weights: &[f64],
    loss: f64,
    gradient: &[f64],
    direction: &[f64],
) -> Option<Point> {
    let slope = dot(gradient, direction);
    let mut length = 1.0;
    for _ in 0..40 {
        let mut candidate = weights.to_vec();
        add_scaled(&mut candidate, length, direction);
        let (candidate_loss, candidate_gradient) = problem.evaluate(&candidate);
        if candidate_loss <= loss + 1e-4 * length * slope {
            return Some(Point { weights: candidate, loss: candidate_loss, gradient: candidate_gradient });
        }
        length *= 0.5;
    }
    None
}

fn add_scaled(target: &mut [f64], factor: f64, other: &[f64]) {
    target.iter_mut().zip(other).for_each(|(value, other)| *value += factor * other);
}

fn difference(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

#[cfg(test)]
mod tests;
