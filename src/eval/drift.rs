//! Measures that need no labels: the shape of one space, and how far it has moved from another.
//!
//! Each is computed in f64 (neighbours in f32) on one thread per row block, so it repeats bit for bit. Rows of
//! two embeddings that are compared are the same frames in the same order.

use rayon::prelude::*;

use super::Embeddings;
use super::eigen::symmetric_eigenvalues;
use super::linalg::{Matrix, Standardiser, View, cholesky_solve, product};
use super::neighbours::nearest;
use super::split::Split;

/// Weight of the ridge penalty per training row, on standardised features. Larger flattens what small banks
/// overfit, smaller lets directions without variance in the bank decide the held-out score.
const RIDGE: f64 = 1e-2;

/// Rows whose pairs are summed together: the parts of a sum are fixed, so threads don't change it.
const BLOCK: usize = 128;

/// Linear centred kernel alignment in its feature-space form (Kornblith, Norouzi, Lee, Hinton, ICML 2019):
/// |YᵀX|² / (|XᵀX| |YᵀY|) of the centred columns, Frobenius norms; 0..1, 1 the same up to rotation and
/// scale. 0 where either embedding is constant.
pub fn linear_cka(x: &Embeddings, y: &Embeddings) -> f64 {
    assert_eq!(x.rows, y.rows, "the same frames");
    let (x, y) = (centred(x), centred(y));
    let scale = (x.t_times(&x).squared_norm() * y.t_times(&y).squared_norm()).sqrt();
    if scale == 0.0 {
        return 0.0;
    }
    y.t_times(&x).squared_norm() / scale
}

fn centred(embeddings: &Embeddings) -> Matrix {
    let matrix = Matrix::from_embeddings(embeddings);
    matrix.shifted_scaled(&matrix.column_means(), &vec![1.0; matrix.cols])
}

/// Mean share of each row's `k` nearest other rows (by cosine) that both spaces agree on, 0..1. `k` is capped at
/// one less than the rows.
///
/// # Panics
/// With fewer than two rows, or `k` 0.
pub fn neighbour_overlap(x: &Embeddings, y: &Embeddings, k: usize) -> f64 {
    assert_eq!(x.rows, y.rows, "the same frames");
    assert!(x.rows > 1 && k > 0);
    let k = k.min(x.rows - 1);
    let neighbours = |points: &Embeddings| {
        let points = points.normalised();
        nearest(&points, &points, k, true)
    };
    let shared: usize = neighbours(x)
        .iter()
        .zip(&neighbours(y))
        .map(|(a, b)| a.iter().filter(|one| b.iter().any(|other| other.row == one.row)).count())
        .sum();
    shared as f64 / (x.rows * k) as f64
}

/// Held-out R² of `old` as a ridge regression on `new`: fitted on `split.bank`, judged on `split.queries`, the
/// squared errors of all columns together over their variance there. 1: a linear map recovers the old
/// space; 0 or less: no better than its mean. 0 where the held-out old rows are constant.
///
/// # Panics
/// If the bank or the queries are empty, or a value is not finite.
pub fn recoverability(new: &Embeddings, old: &Embeddings, split: &Split) -> f64 {
    assert_eq!(new.rows, old.rows, "the same frames");
    assert!(!split.bank.is_empty() && !split.queries.is_empty());
    let rows = |embeddings: &Embeddings, rows: &[usize]| Matrix::from_embeddings(&embeddings.select(rows));
    let (x, y) = (rows(new, &split.bank), rows(old, &split.bank));
    let standardiser = Standardiser::fit(&x);
    let x = standardiser.apply(&x);
    let target_mean = y.column_means();
    let ones = vec![1.0; y.cols];
    let map = ridge(&x, &y.shifted_scaled(&target_mean, &ones));

    let held_out = rows(old, &split.queries);
    let predicted = standardiser.apply(&rows(new, &split.queries)).times(&map);
    let wanted = held_out.shifted_scaled(&target_mean, &ones);
    let errors: f64 = wanted.data.iter().zip(&predicted.data).map(|(a, b)| (a - b).powi(2)).sum();
    let spread = held_out.shifted_scaled(&held_out.column_means(), &ones).squared_norm();
    if spread == 0.0 {
        return 0.0;
    }
    1.0 - errors / spread
}

/// `[x.cols, y.cols]`: the minimum of |x w - y|² + RIDGE n |w|².
fn ridge(x: &Matrix, y: &Matrix) -> Matrix {
    let mut gram = x.t_times(x);
    for i in 0..gram.rows {
        gram.data[i * gram.cols + i] += RIDGE * x.rows as f64;
    }
    cholesky_solve(gram, x.t_times(y)).expect("a Gram matrix plus a positive diagonal is positive definite")
}

/// Mean squared distance between the L2-normalised embeddings of two views of the same frames, 0..4 (Wang & Isola,
/// ICML 2020, alpha = 2). Lower: views agree better.
///
/// # Panics
/// Without rows, or if the shapes differ.
pub fn alignment(first: &Embeddings, second: &Embeddings) -> f64 {
    assert_eq!((first.rows, first.dim), (second.rows, second.dim), "the same frames and space");
    assert!(first.rows > 0);
    let (first, second) = (first.normalised(), second.normalised());
    let squares = first.data.iter().zip(&second.data).map(|(a, b)| f64::from(a - b).powi(2));
    squares.sum::<f64>() / first.rows as f64
}

/// Log of the mean over all pairs of exp(-2 |x - y|²) of the L2-normalised rows, -8..0 (Wang & Isola, t = 2). Lower: the
/// rows fill the sphere more evenly; 0: all are the same.
///
/// # Panics
/// With fewer than two rows.
pub fn uniformity(embeddings: &Embeddings) -> f64 {
    let n = embeddings.rows;
    assert!(n > 1);
    let points = embeddings.normalised();
    let parts: Vec<f64> = (0..n.div_ceil(BLOCK))
        .into_par_iter()
        .map(|part| potential(&points, part * BLOCK, ((part + 1) * BLOCK).min(n)))
        .collect();
    (parts.iter().sum::<f64>() / (n * (n - 1) / 2) as f64).ln()
}

/// Sum of the potentials of the pairs (i, j), start <= i < end, i < j.
fn potential(points: &Embeddings, start: usize, end: usize) -> f64 {
    let (n, d) = (points.rows, points.dim);
    let similarities = product(
        View::new(&points.data[start * d..end * d], end - start, d),
        View::new(&points.data[start * d..], n - start, d).t(),
    );
    let mut sum = 0.0;
    for (i, row) in similarities.chunks_exact(n - start).enumerate() {
        // |x - y|² = 2 - 2 x.y for unit vectors.
        sum += row[i + 1..].iter().map(|&dot| (4.0 * f64::from(dot) - 4.0).exp()).sum::<f64>();
    }
    sum
}

/// RankMe (Garrido, Balestriero, Najman, LeCun, ICML 2023): exp of the entropy of the singular values divided by their
/// sum, 1..min(rows, dim); columns are not centred, as there. Without the paper's small constant: 0 log 0
/// is 0. 0 for an embedding of zeros.
///
/// # Panics
/// If a value is not finite.
pub fn effective_rank(embeddings: &Embeddings) -> f64 {
    let x = Matrix::from_embeddings(embeddings);
    let gram = if x.rows < x.cols {
        Matrix { rows: x.rows, cols: x.rows, data: product(x.view(), x.view().t()) }
    } else {
        x.t_times(&x)
    };
    let eigenvalues = symmetric_eigenvalues(gram);
    // Below this an eigenvalue is rounding, whose root would count as a singular value of 1e-8.
    let noise = eigenvalues.first().copied().unwrap_or(0.0) * 1e-14;
    let singular: Vec<f64> = eigenvalues.into_iter().filter(|&value| value > noise).map(f64::sqrt).collect();
    let sum: f64 = singular.iter().sum();
    if sum == 0.0 {
        return 0.0;
    }
    let entropy: f64 = singular.iter().map(|value| value / sum).map(|p| -p * p.ln()).sum();
    entropy.exp()
}

#[cfg(test)]
mod tests;
