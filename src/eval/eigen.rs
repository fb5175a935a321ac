//! Eigenvalues of a real symmetric matrix in f64: Householder's reduction to tridiagonal form, then the
//! implicit QR algorithm with Wilkinson's shift (Golub & Van Loan, *Matrix Computations*, 8.3).
//!
//! Eigenvectors are never formed: the measures need none, and without them 512 x 512 takes some 0.1 s.

use super::linalg::{Matrix, dot};

/// All eigenvalues of the symmetric `a [n, n]`, largest first. Error: about 1e-15 of the largest magnitude.
///
/// # Panics
/// If `a` is not square or not finite (the iteration would never end).
pub(super) fn symmetric_eigenvalues(a: Matrix) -> Vec<f64> {
    assert_eq!(a.rows, a.cols, "a square matrix");
    assert!(a.data.iter().all(|value| value.is_finite()), "a finite matrix");
    let (mut diagonal, mut off) = tridiagonal(a);
    diagonalise(&mut diagonal, &mut off);
    diagonal.sort_by(|x, y| y.total_cmp(x));
    diagonal
}

/// Diagonal and first off-diagonal of a tridiagonal matrix similar to `a`.
fn tridiagonal(mut a: Matrix) -> (Vec<f64>, Vec<f64>) {
    let n = a.rows;
    let mut off = vec![0.0; n.saturating_sub(1)];
    for (k, off) in off.iter_mut().enumerate() {
        // Rows equal columns: the part of row k right of the diagonal is the column to be eliminated.
        let mut v = a.data[k * n + k + 1..(k + 1) * n].to_vec();
        *off = v[0];
        let norm = dot(&v, &v).sqrt();
        if norm == v[0].abs() {
            continue;
        }
        *off = if v[0] > 0.0 { -norm } else { norm };
        v[0] -= *off;
        reflect_trailing(&mut a, k + 1, &v);
    }
    ((0..n).map(|i| a.data[i * n + i]).collect(), off)
}

/// `H A H` on the trailing block that starts at `start`, `H = I - 2 v vᵀ / vᵀv`.
fn reflect_trailing(a: &mut Matrix, start: usize, v: &[f64]) {
    let n = a.rows;
    let beta = 2.0 / dot(v, v);
    let p: Vec<f64> = (start..n).map(|i| beta * dot(&a.data[i * n + start..(i + 1) * n], v)).collect();
    let half = 0.5 * beta * dot(&p, v);
    let w: Vec<f64> = p.iter().zip(v).map(|(p, v)| p - half * v).collect();
    for i in start..n {
        let (vi, wi) = (v[i - start], w[i - start]);
        let row = &mut a.data[i * n + start..(i + 1) * n];
        for ((value, vj), wj) in row.iter_mut().zip(v).zip(&w) {
            *value -= vi * wj + wi * vj;
        }
    }
}

/// Turns `d` into the eigenvalues of the tridiagonal matrix with diagonal `d` and off-diagonal `e`.
fn diagonalise(d: &mut [f64], e: &mut [f64]) {
    let largest = d.iter().chain(e.iter()).fold(0.0_f64, |max, value| max.max(value.abs()));
    // Relative to the whole matrix: a rank-deficient Gram matrix has eigenvalues that are noise around 0.
    let negligible = f64::EPSILON * largest;
    let mut high = d.len().saturating_sub(1);
    while high > 0 {
        if e[high - 1].abs() <= negligible {
            high -= 1;
            continue;
        }
        let low = (0..high - 1).rev().find(|&k| e[k].abs() <= negligible).map_or(0, |k| k + 1);
        shifted_step(d, e, low, high);
    }
}

/// One implicit QR step on the unreduced block `low..=high`: a bulge chased from its top to its bottom.
fn shifted_step(d: &mut [f64], e: &mut [f64], low: usize, high: usize) {
    let last = e[high - 1];
    let delta = 0.5 * (d[high - 1] - d[high]);
    let shift = d[high] - last * last / (delta + delta.hypot(last).copysign(delta));
    let (mut x, mut z) = (d[low] - shift, e[low]);
    for k in low..high {
        let r = x.hypot(z);
        let (c, s) = if r > 0.0 { (x / r, z / r) } else { (1.0, 0.0) };
        if k > low {
            e[k - 1] = r;
        }
        let (upper, lower, between) = (d[k], d[k + 1], e[k]);
        d[k] = c * c * upper + 2.0 * c * s * between + s * s * lower;
        d[k + 1] = s * s * upper - 2.0 * c * s * between + c * c * lower;
        e[k] = c * s * (lower - upper) + (c * c - s * s) * between;
        if k + 1 < high {
            x = e[k];
            z = s * e[k + 1];
            e[k + 1] *= c;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::linalg::gram;
    use crate::eval::random::SplitMix64;

    fn uniform(random: &mut SplitMix64) -> f64 {
        (random.next() >> 11) as f64 / (1_u64 << 53) as f64 - 0.5
    }

    /// `numpy.linalg.eigvalsh([[4,1,-2,2],[1,2,0,1],[-2,0,3,-2],[2,1,-2,-1]])`
    #[test]
    fn eigenvalues_equal_numpys() {
        let data = [4.0, 1.0, -2.0, 2.0, 1.0, 2.0, 0.0, 1.0, -2.0, 0.0, 3.0, -2.0, 2.0, 1.0, -2.0, -1.0];
        let a = Matrix { rows: 4, cols: 4, data: data.to_vec() };
        let want = [6.844_621_11, 2.268_531_41, 1.084_364_46, -2.197_516_98];
        for (got, want) in symmetric_eigenvalues(a).iter().zip(want) {
            assert!((got - want).abs() < 1e-8, "{got} {want}");
        }
    }

    #[test]
    fn sum_and_sum_of_squares_are_the_trace_and_the_squared_norm() {
        let mut random = SplitMix64::new(3);
        let x = Matrix { rows: 50, cols: 80, data: (0..4000).map(|_| uniform(&mut random)).collect() };
        let gram = gram(x.view());
        let trace: f64 = (0..80).map(|i| gram.data[i * 81]).sum();
        let norm = gram.squared_norm();
        let values = symmetric_eigenvalues(gram);
        assert!((values.iter().sum::<f64>() - trace).abs() < 1e-9 * trace);
        assert!((values.iter().map(|v| v * v).sum::<f64>() - norm).abs() < 1e-9 * norm);
        assert!(values[50..].iter().all(|v| v.abs() < 1e-12 * values[0]), "rank 50");
    }

    #[test]
    fn small_and_diagonal_matrices_need_no_iteration() {
        assert!(symmetric_eigenvalues(Matrix { rows: 0, cols: 0, data: vec![] }).is_empty());
        let diagonal = Matrix { rows: 2, cols: 2, data: vec![1.0, 0.0, 0.0, 5.0] };
        assert_eq!(symmetric_eigenvalues(diagonal), [5.0, 1.0]);
    }
}
