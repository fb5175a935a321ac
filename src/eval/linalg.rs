//! The few dense products and the one solver that the measures need, in row-major memory.
//!
//! Every product runs on one thread, so a result never depends on how many there are; measures parallelise
//! over independent rows instead. Eigenvalues are in `eigen`.

use gemm::Parallelism;

use super::Embeddings;

/// f32 and f64: what `gemm` has kernels for.
pub(super) trait Real: Copy + 'static {
    const ZERO: Self;
    const ONE: Self;
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
}

/// A dense matrix that lies in a slice without gaps, row by row, or transposed.
#[derive(Clone, Copy)]
pub(super) struct View<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> View<'a, T> {
    /// Row-major `[rows, cols]`.
    pub(super) fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "{rows} x {cols}");
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    pub(super) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// `a b`, row-major `[a.rows, b.cols]`.
pub(super) fn product<T: Real>(a: View<T>, b: View<T>) -> Vec<T> {
    assert_eq!(a.cols, b.rows, "inner dimensions");
    let mut out = vec![T::ZERO; a.rows * b.cols];
    if out.is_empty() || a.cols == 0 {
        return out;
    }
    // SAFETY: `View` holds exactly rows * cols elements at strides that stay inside its slice, `out` holds
    // a.rows * b.cols contiguous ones, is borrowed by nobody else, and `Real` covers only gemm's own types.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out.as_mut_ptr(),
            1,
            b.cols as isize,
            false,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            T::ZERO,
            T::ONE,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
    out
}

/// Row-major f64 `[rows, cols]`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Matrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) data: Vec<f64>,
}

impl Matrix {
    pub(super) fn from_embeddings(embeddings: &Embeddings) -> Self {
        Self {
            rows: embeddings.rows,
            cols: embeddings.dim,
            data: embeddings.data.iter().map(|&value| f64::from(value)).collect(),
        }
    }

    pub(super) fn view(&self) -> View<'_, f64> {
        View::new(&self.data, self.rows, self.cols)
    }

    /// `selfᵀ other`, `[self.cols, other.cols]`.
    pub(super) fn t_times(&self, other: &Self) -> Self {
        Self { rows: self.cols, cols: other.cols, data: product(self.view().t(), other.view()) }
    }

    /// `self other`, `[self.rows, other.cols]`.
    pub(super) fn times(&self, other: &Self) -> Self {
        Self { rows: self.rows, cols: other.cols, data: product(self.view(), other.view()) }
    }

    pub(super) fn column_means(&self) -> Vec<f64> {
        let mut means = vec![0.0; self.cols];
        for row in self.data.chunks_exact(self.cols.max(1)) {
            means.iter_mut().zip(row).for_each(|(mean, value)| *mean += value);
        }
        means.iter_mut().for_each(|mean| *mean /= self.rows.max(1) as f64);
        means
    }

    /// `(value - shift) * scale`, column by column.
    pub(super) fn shifted_scaled(&self, shift: &[f64], scale: &[f64]) -> Self {
        let mut data = self.data.clone();
        for row in data.chunks_exact_mut(self.cols.max(1)) {
            for ((value, shift), scale) in row.iter_mut().zip(shift).zip(scale) {
                *value = (*value - shift) * scale;
            }
        }
        Self { data, ..*self }
    }

    pub(super) fn squared_norm(&self) -> f64 {
        self.data.iter().map(|value| value * value).sum()
    }
}

/// What makes columns have mean 0 and variance 1, learned from one matrix and applied to others.
pub(super) struct Standardiser {
    mean: Vec<f64>,
    scale: Vec<f64>,
}

impl Standardiser {
    /// A column that hardly varies (standard deviation below 1e-12) is only shifted.
    pub(super) fn fit(x: &Matrix) -> Self {
        let mean = x.column_means();
        let centred = x.shifted_scaled(&mean, &vec![1.0; x.cols]);
        let mut variance = vec![0.0; x.cols];
        for row in centred.data.chunks_exact(x.cols.max(1)) {
            variance.iter_mut().zip(row).for_each(|(sum, value)| *sum += value * value);
        }
        let scale = variance
            .iter()
            .map(|sum| (sum / x.rows.max(1) as f64).sqrt())
            .map(|deviation| if deviation > 1e-12 { 1.0 / deviation } else { 1.0 })
            .collect();
        Self { mean, scale }
    }

    pub(super) fn apply(&self, x: &Matrix) -> Matrix {
        x.shifted_scaled(&self.mean, &self.scale)
    }
}

/// Solves `a x = b` for a symmetric positive definite `a [n, n]` and `b [n, m]` by Cholesky's decomposition.
/// `None` if `a` is not positive definite.
pub(super) fn cholesky_solve(mut a: Matrix, mut b: Matrix) -> Option<Matrix> {
    let n = a.rows;
    assert_eq!((a.cols, b.rows), (n, n), "a square system");
    for i in 0..n {
        let (above, rest) = a.data.split_at_mut(i * n);
        for j in 0..i {
            let other = &above[j * n..j * n + j + 1];
            rest[j] = (rest[j] - dot(&rest[..j], &other[..j])) / other[j];
        }
        let pivot = rest[i] - dot(&rest[..i], &rest[..i]);
        if pivot.is_nan() || pivot <= 0.0 {
            return None;
        }
        rest[i] = pivot.sqrt();
    }
    let m = b.cols;
    for i in 0..n {
        let (solved, rest) = b.data.split_at_mut(i * m);
        for j in 0..i {
            subtract_scaled(&mut rest[..m], a.data[i * n + j], &solved[j * m..(j + 1) * m]);
        }
        rest[..m].iter_mut().for_each(|value| *value /= a.data[i * n + i]);
    }
    for i in (0..n).rev() {
        let (rest, solved) = b.data.split_at_mut((i + 1) * m);
        let row = &mut rest[i * m..];
        for j in i + 1..n {
            let start = (j - i - 1) * m;
            subtract_scaled(row, a.data[j * n + i], &solved[start..start + m]);
        }
        row.iter_mut().for_each(|value| *value /= a.data[i * n + i]);
    }
    Some(b)
}

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn subtract_scaled(target: &mut [f64], factor: f64, other: &[f64]) {
    target.iter_mut().zip(other).for_each(|(value, other)| *value -= factor * other);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, cols: usize, data: &[f64]) -> Matrix {
        Matrix { rows, cols, data: data.to_vec() }
    }

    #[test]
    fn products_equal_the_ones_by_hand() {
        let a = matrix(2, 3, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let b = matrix(3, 1, &[1.0, 0.0, -1.0]);
        assert_eq!(a.times(&b).data, [-2.0, -2.0]);
        assert_eq!(a.t_times(&matrix(2, 1, &[1.0, 1.0])).data, [5.0, 7.0, 9.0]);
    }

    #[test]
    fn cholesky_solves_a_known_system() {
        let a = matrix(3, 3, &[4.0, 2.0, 0.6, 2.0, 5.0, 1.0, 0.6, 1.0, 3.0]);
        let x = matrix(3, 2, &[1.0, -2.0, 0.5, 3.0, -1.0, 0.25]);
        let b = a.times(&x);
        let solved = cholesky_solve(a, b).unwrap();
        for (got, want) in solved.data.iter().zip(&x.data) {
            assert!((got - want).abs() < 1e-12, "{got} {want}");
        }
    }

    #[test]
    fn an_indefinite_system_is_refused() {
        let a = matrix(2, 2, &[1.0, 2.0, 2.0, 1.0]);
        assert_eq!(cholesky_solve(a, matrix(2, 1, &[1.0, 1.0])), None);
    }

    #[test]
    fn standardised_columns_have_mean_0_and_variance_1_and_constant_ones_are_0() {
        let x = matrix(4, 2, &[1.0, 7.0, 2.0, 7.0, 3.0, 7.0, 4.0, 7.0]);
        let z = Standardiser::fit(&x).apply(&x);
        assert!(z.column_means().iter().all(|mean| mean.abs() < 1e-12));
        assert!((z.squared_norm() - 4.0).abs() < 1e-12);
    }
}
