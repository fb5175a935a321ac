//! Measures that need no labels: the shape of one space, and how far it has moved from another.
//!
//! Sums are taken in f64 over row blocks of a fixed size, so a measure repeats bit for bit on any number of threads.
//! Rows of two embeddings that are compared are the same frames in the same order.

use rayon::prelude::*;

use super::Embeddings;
use super::eigen::symmetric_eigenvalues;
use super::exp::exp;
use super::linalg::{Matrix, Standardiser, View, gram, inverse, product_into, t_product};
use super::neighbours::nearest;
use super::panels::Panels;
use super::split::Split;

/// Weight of the ridge penalty per training row, on standardised features. Larger flattens what small banks
/// overfit, smaller lets directions without variance in the bank decide the held-out score.
const RIDGE: f64 = 1e-2;

/// Rows that are paired with as many others at a time: the parts of a sum are fixed, so threads don't change it, and
/// `BLOCK * BLOCK` f32 fit the cache.
const BLOCK: usize = 256;

/// Linear centred kernel alignment in its feature-space form (Kornblith, Norouzi, Lee, Hinton, ICML 2019):
/// |YᵀX|² / (|XᵀX| |YᵀY|) of the centred columns, Frobenius norms; 0..1, 1 the same up to rotation and
/// scale. 0 where either embedding is constant. Fast because products are f32 (errors below 1e-6; 6e-10 at 10,000 x
/// 384) and about half of each symmetric one is enough.
pub fn linear_cka(x: &Embeddings, y: &Embeddings) -> f64 {
    assert_eq!(x.rows, y.rows, "the same frames");
    let (x, y) = (centred(x), centred(y));
    let scale = (x.gram().squared_norm() * y.gram().squared_norm()).sqrt();
    if scale == 0.0 {
        return 0.0;
    }
    y.t_product(&x).squared_norm() / scale
}

fn centred(points: &Embeddings) -> Panels {
    let standardiser = Standardiser::centre(points);
    Panels::new(points.rows, points.dim, |rows| {
        let mut block = vec![0.0; rows.len() * points.dim];
        standardiser.apply_to(&points.data[rows.start * points.dim..rows.end * points.dim], &mut block);
        block
    })
}

/// The `k` nearest other rows of each row, by cosine.
#[derive(Debug, Clone, PartialEq)]
pub struct Neighbourhoods {
    k: usize,
    /// L2-normalised.
    points: Embeddings,
    rows: Vec<Vec<usize>>,
}

impl Neighbourhoods {
    /// `k` is capped at one less than the rows.
    ///
    /// # Panics
    /// With fewer than two rows, or `k` 0.
    pub fn of(points: &Embeddings, k: usize) -> Self {
        assert!(points.rows > 1 && k > 0);
        let k = k.min(points.rows - 1);
        let points = points.normalised();
        let found = nearest(&points, &points, k, true);
        let rows = found.iter().map(|row| row.iter().map(|neighbour| neighbour.row).collect());
        let rows = rows.collect();
        Self { k, points, rows }
    }

    /// Mean share of each row's neighbours that it has in `other` too, 0..1.
    ///
    /// # Panics
    /// If they have other numbers of rows or neighbours.
    pub fn overlap(&self, other: &Self) -> f64 {
        self.assert_same_frames(other);
        let pairs = self.rows.iter().zip(&other.rows);
        let shared = pairs.map(|(a, b)| a.iter().filter(|row| b.contains(row)).count());
        shared.sum::<usize>() as f64 / (self.rows.len() * self.k) as f64
    }

    /// How near each row's neighbours were in `old`, against its nearest ones there.
    ///
    /// # Panics
    /// As [`Self::overlap`].
    pub fn retained_from(&self, old: &Self) -> Vec<Retained> {
        self.assert_same_frames(old);
        let (now, before) = (old.excess(&self.rows), old.excess(&old.rows));
        now.into_iter().zip(before).map(|(now, before)| Retained { now, before }).collect()
    }

    fn assert_same_frames(&self, other: &Self) {
        assert_eq!((self.rows.len(), self.k), (other.rows.len(), other.k), "the same frames");
    }

    /// By how much the cosine similarity of each row to the named ones, on average, exceeds that to all others.
    fn excess(&self, named: &[Vec<usize>]) -> Vec<f64> {
        let n = self.points.rows;
        let mut sum = vec![0.0; self.points.dim];
        for row in 0..n {
            sum.iter_mut().zip(self.points.row(row)).for_each(|(sum, &value)| *sum += f64::from(value));
        }
        let of_row = |(row, named): (usize, &Vec<usize>)| {
            let own = self.points.row(row);
            let dot = |other: &[f32]| -> f64 {
                own.iter().zip(other).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
            };
            let to_all: f64 = own.iter().zip(&sum).map(|(&a, b)| f64::from(a) * b).sum();
            let to_others = (to_all - dot(own)) / (n - 1) as f64;
            let to_named =
                named.iter().map(|&other| dot(self.points.row(other))).sum::<f64>() / self.k as f64;
            to_named - to_others
        };
        named.par_iter().enumerate().map(of_row).collect()
    }
}

/// Of one row: excess cosine similarity in an old space, over that to all other rows, of the neighbours it has now and of those it had.
/// The ratio is 1 where nothing that the old space told apart has moved, and 0 where neighbours are drawn at random: unlike the overlap it
/// doesn't mind frames that look alike changing places, and its zero doesn't depend on how many frames there are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Retained {
    pub now: f64,
    pub before: f64,
}

/// The sums' ratio, at most 1. 1 where the old space held nothing nearer than anything else.
pub fn retention(rows: &[Retained]) -> f64 {
    let (now, before) = rows.iter().fold((0.0, 0.0), |sum, row| (sum.0 + row.now, sum.1 + row.before));
    if before > 0.0 { now / before } else { 1.0 }
}

/// Mean share of each row's `k` nearest other rows (by cosine) that both spaces agree on, 0..1.
///
/// # Panics
/// As [`Neighbourhoods::of`] and [`Neighbourhoods::overlap`].
pub fn neighbour_overlap(x: &Embeddings, y: &Embeddings, k: usize) -> f64 {
    Neighbourhoods::of(x, k).overlap(&Neighbourhoods::of(y, k))
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
    let (x, y) = (new.select(&split.bank), old.select(&split.bank));
    let (standardiser, target_mean) = (Standardiser::fit(&x), Standardiser::centre(&y));
    let map = ridge(&standardiser.apply(&x), &target_mean.apply(&y));

    let held_out = old.select(&split.queries);
    let predicted = standardiser.apply::<f64>(&new.select(&split.queries)).times(map.view());
    let wanted: Matrix = target_mean.apply(&held_out);
    let errors: f64 = wanted.data.iter().zip(&predicted.data).map(|(a, b)| (a - b).powi(2)).sum();
    let spread = Standardiser::centre(&held_out).apply::<f64>(&held_out).squared_norm();
    if spread == 0.0 {
        return 0.0;
    }
    1.0 - errors / spread
}

/// `[x.cols, y.cols]`: the minimum of |x w - y|² + RIDGE n |w|².
fn ridge(x: &Matrix, y: &Matrix) -> Matrix {
    let mut gram = gram(x.view());
    for i in 0..gram.rows {
        gram.data[i * gram.cols + i] += RIDGE * x.rows as f64;
    }
    inverse(gram.view())
        .expect("a Gram matrix plus a positive diagonal is positive definite")
        .times(t_product(x.view(), y.view()).view())
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
    let points = View::new(&points.data, n, points.dim);
    let parts: Vec<f64> =
        (0..n.div_ceil(BLOCK)).into_par_iter().map(|block| potential(points, block)).collect();
    (parts.iter().sum::<f64>() / (n * (n - 1) / 2) as f64).ln()
}

/// Sum of the potentials of the pairs (i, j), i in the block, i < j.
fn potential(points: View<f32>, block: usize) -> f64 {
    let rows_of = |block: usize| block * BLOCK..((block + 1) * BLOCK).min(points.rows());
    let (rows, mut similarities) = (rows_of(block), vec![0.0; BLOCK * BLOCK]);
    let mut sum = 0.0;
    for other in block..points.rows().div_ceil(BLOCK) {
        let columns = rows_of(other);
        let similarities = &mut similarities[..rows.len() * columns.len()];
        product_into(similarities, points.row_range(rows.clone()), points.row_range(columns.clone()).t());
        for (i, row) in similarities.chunks_exact(columns.len()).enumerate() {
            let first = if other == block { i + 1 } else { 0 };
            sum += potentials(&row[first..]);
        }
    }
    sum
}

/// Sum of exp(-2 |x - y|²) = exp(4 x.y - 4) of unit vectors, eight at a time.
fn potentials(similarities: &[f32]) -> f64 {
    let (chunks, rest) = similarities.as_chunks::<8>();
    let mut sums = [0.0; 8];
    for chunk in chunks {
        for (sum, dot) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(exp(4.0 * dot - 4.0));
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|dot| f64::from(exp(4.0 * dot - 4.0))).sum::<f64>()
}

/// RankMe (Garrido, Balestriero, Najman, LeCun, ICML 2023): exp of the entropy of the singular values divided by their
/// sum, 1..min(rows, dim); columns are not centred, as there. Without the paper's small constant: 0 log 0
/// is 0. 0 for an embedding of zeros.
///
/// # Panics
/// If a value is not finite.
pub fn effective_rank(embeddings: &Embeddings) -> f64 {
    let x = Matrix::from_embeddings(embeddings);
    let gram = if x.rows < x.cols { gram(x.view().t()) } else { gram(x.view()) };
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
