//! The few dense products and the one solver that the measures need, in row-major memory.
//!
//! A product is cut into blocks of rows of a fixed size, each computed by one thread; sums over blocks are taken
//! in their order. So no result depends on how many threads there are. Eigenvalues are in `eigen`.

use std::ops::Range;

use gemm::Parallelism;
use rayon::prelude::*;

use super::Embeddings;
use crate::widest::widest;

/// Rows of one part. Larger: fewer partial sums, but too few parts for many cores and longer chains of f32 sums.
const BLOCK: usize = 512;

/// Columns of a Gram matrix that are computed together. Smaller saves more of its redundant half, but is slower per product.
const PANEL: usize = 64;

/// f32 and f64: what `gemm` has kernels for.
pub(super) trait Real: Copy + Send + Sync + Into<f64> + 'static {
    const ZERO: Self;
    const ONE: Self;
    fn narrow(value: f64) -> Self;
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    fn narrow(value: f64) -> Self {
        value as f32
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    fn narrow(value: f64) -> Self {
        value
    }
}

/// A dense matrix, or rows and columns of one, that lies row by row, or transposed, in a slice.
/// Element (i, j) is `data[i * row_stride + j * col_stride]`, inside the slice for all i < rows, j < cols.
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

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn row_range(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows, "{range:?} of {} rows", self.rows);
        Self { data: &self.data[range.start * self.row_stride..], rows: range.len(), ..self }
    }

    fn col_range(self, range: Range<usize>) -> Self {
        self.t().row_range(range).t()
    }
}

/// `a b`, row-major `[a.rows, b.cols]`, on this thread.
pub(super) fn product<T: Real>(a: View<T>, b: View<T>) -> Vec<T> {
    let mut out = vec![T::ZERO; a.rows * b.cols];
    product_into(&mut out, a, b);
    out
}

/// As [`product`], over what `out` holds.
pub(super) fn product_into<T: Real>(out: &mut [T], a: View<T>, b: View<T>) {
    assert_eq!(a.cols, b.rows, "inner dimensions");
    assert_eq!(out.len(), a.rows * b.cols, "{} x {}", a.rows, b.cols);
    if out.is_empty() || a.cols == 0 {
        return out.fill(T::ZERO);
    }
    // SAFETY: a `View`'s rows * cols elements lie inside its slice at its strides, `out` holds a.rows * b.cols
    // contiguous ones, is borrowed by nobody else, and `Real` covers only gemm's own types.
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
}

/// `aᵀ b`, `[a.cols, b.cols]`: each block of rows in `T`, the sum of blocks in f64.
pub(super) fn t_product<T: Real>(a: View<T>, b: View<T>) -> Matrix {
    assert_eq!(a.rows, b.rows, "inner dimensions");
    let data = sum_of_blocks(a.rows, a.cols * b.cols, |rows, out| {
        product_into(out, a.row_range(rows.clone()).t(), b.row_range(rows));
    });
    Matrix { rows: a.cols, cols: b.cols, data }
}

/// `aᵀ a`, as [`t_product`]. Fast because what lies above the diagonal's panels is mirrored, not computed.
pub(super) fn gram<T: Real>(a: View<T>) -> Matrix {
    let n = a.cols;
    let panels: Vec<Range<usize>> =
        (0..n).step_by(PANEL).map(|start| start..(start + PANEL).min(n)).collect();
    let values = panels.iter().map(|panel| (n - panel.start) * panel.len()).sum();
    let sums = sum_of_blocks(a.rows, values, |rows, mut out| {
        let block = a.row_range(rows);
        for panel in &panels {
            let below;
            (below, out) = out.split_at_mut((n - panel.start) * panel.len());
            product_into(below, block.col_range(panel.start..n).t(), block.col_range(panel.clone()));
        }
    });
    let mut data = vec![0.0; n * n];
    let mut sums = sums.into_iter();
    for panel in panels {
        for (i, j) in (panel.start..n).flat_map(|i| panel.clone().map(move |j| (i, j))) {
            let value = sums.next().expect("a sum for each element of each panel");
            data[i * n + j] = value;
            data[j * n + i] = value;
        }
    }
    Matrix { rows: n, cols: n, data }
}

/// The sum of what `part` writes into `values` zeros for each block of `0..rows`.
fn sum_of_blocks<T: Real>(
    rows: usize,
    values: usize,
    part: impl Fn(Range<usize>, &mut [T]) + Sync,
) -> Vec<f64> {
    let parts: Vec<Vec<T>> = (0..rows.div_ceil(BLOCK))
        .into_par_iter()
        .map(|block| {
            let mut out = vec![T::ZERO; values];
            part(block * BLOCK..((block + 1) * BLOCK).min(rows), &mut out);
            out
        })
        .collect();
    let mut sums = vec![0.0; values];
    for part in parts {
        sums.iter_mut().zip(part).for_each(|(sum, value)| *sum += value.into());
    }
    sums
}

/// Row-major `[rows, cols]`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Matrix<T = f64> {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) data: Vec<T>,
}

impl<T: Real> Matrix<T> {
    pub(super) fn view(&self) -> View<'_, T> {
        View::new(&self.data, self.rows, self.cols)
    }

    /// `self other`, `[self.rows, other.cols]`.
    pub(super) fn times(&self, other: View<T>) -> Self {
        let mut data = vec![T::ZERO; self.rows * other.cols];
        data.par_chunks_mut(BLOCK * other.cols.max(1)).enumerate().for_each(|(block, out)| {
            let rows = block * BLOCK..((block + 1) * BLOCK).min(self.rows);
            product_into(out, self.view().row_range(rows), other);
        });
        Self { rows: self.rows, cols: other.cols, data }
    }
}

impl Matrix {
    pub(super) fn from_embeddings(embeddings: &Embeddings) -> Self {
        Self {
            rows: embeddings.rows,
            cols: embeddings.dim,
            data: embeddings.data.iter().map(|&value| f64::from(value)).collect(),
        }
    }

    pub(super) fn squared_norm(&self) -> f64 {
        dot(&self.data, &self.data)
    }
}

/// What makes columns have mean 0 and variance 1, learned from some rows and applied to others.
pub(super) struct Standardiser {
    mean: Vec<f64>,
    scale: Vec<f64>,
}

impl Standardiser {
    /// A column that hardly varies (standard deviation below 1e-12) is only shifted.
    pub(super) fn fit(x: &Embeddings) -> Self {
        let (mean, variance) = moments(x);
        let deviations = variance.into_iter().map(f64::sqrt);
        let scale = deviations.map(|deviation| if deviation > 1e-12 { 1.0 / deviation } else { 1.0 });
        Self { mean, scale: scale.collect() }
    }

    /// Only shifts.
    pub(super) fn centre(x: &Embeddings) -> Self {
        Self { mean: moments(x).0, scale: vec![1.0; x.dim] }
    }

    /// `(x - mean) * scale` in f64, then rounded to `T`.
    pub(super) fn apply<T: Real>(&self, x: &Embeddings) -> Matrix<T> {
        let mut data = vec![T::ZERO; x.data.len()];
        let cols = x.dim.max(1);
        data.par_chunks_mut(BLOCK * cols)
            .zip(x.data.par_chunks(BLOCK * cols))
            .for_each(|(out, x)| self.apply_to(x, out));
        Matrix { rows: x.rows, cols: x.dim, data }
    }

    /// As [`Self::apply`], of whole rows.
    pub(super) fn apply_to<T: Real>(&self, x: &[f32], out: &mut [T]) {
        let cols = self.mean.len().max(1);
        widest! {
            for (out, x) in out.chunks_exact_mut(cols).zip(x.chunks_exact(cols)) {
                for (((out, &x), mean), scale) in out.iter_mut().zip(x).zip(&self.mean).zip(&self.scale) {
                    *out = T::narrow((f64::from(x) - mean) * scale);
                }
            }
        }
    }
}

/// Mean and variance of each column. Values are taken relative to the first row's, so that a common offset costs no
/// digits of the variance.
fn moments(x: &Embeddings) -> (Vec<f64>, Vec<f64>) {
    let origin: Vec<f64> = x.data.iter().take(x.dim).map(|&value| f64::from(value)).collect();
    let sums = sum_of_blocks(x.rows, 2 * x.dim, |rows, out: &mut [f64]| {
        let (sums, squares) = out.split_at_mut(x.dim);
        widest! {
            for row in x.data[rows.start * x.dim..rows.end * x.dim].chunks_exact(x.dim.max(1)) {
                let sums = sums.iter_mut().zip(&mut *squares);
                for (((sum, square), &value), origin) in sums.zip(row).zip(&origin) {
                    let value = f64::from(value) - origin;
                    *sum += value;
                    *square += value * value;
                }
            }
        }
    });
    let n = x.rows.max(1) as f64;
    let (sums, squares) = sums.split_at(x.dim);
    let variance = squares.iter().zip(sums).map(|(square, sum)| ((square - sum * sum / n) / n).max(0.0));
    (origin.iter().zip(sums).map(|(origin, sum)| origin + sum / n).collect(), variance.collect())
}

/// The inverse of a symmetric positive definite `a [n, n]`, by the Schur complement of its first half: nearly all of the
/// work is products. `None` if `a` is not positive definite.
pub(super) fn inverse(a: View<f64>) -> Option<Matrix> {
    let n = a.rows;
    assert_eq!(a.cols, n, "a square matrix");
    if n <= 1 {
        let data: Vec<f64> = a.data.iter().take(n).map(|&pivot| 1.0 / pivot).collect();
        return data.iter().all(|&pivot| pivot > 0.0).then_some(Matrix { rows: n, cols: n, data });
    }
    let half = n / 2;
    let (first, second) = (a.row_range(0..half), a.row_range(half..n));
    let (coupling, corner) = (second.col_range(0..half), second.col_range(half..n));
    let first = inverse(first.col_range(0..half))?;
    let m = n - half;
    let ratio = product(coupling, first.view());
    let ratio = View::new(&ratio, m, half);
    let mut schur = product(ratio, coupling.t());
    for (i, row) in schur.chunks_exact_mut(m).enumerate() {
        for (j, value) in row.iter_mut().enumerate() {
            *value = corner.data[i * corner.row_stride + j * corner.col_stride] - *value;
        }
    }
    let second = inverse(View::new(&schur, m, m))?;
    let below = product(second.view(), ratio);
    let change = product(ratio.t(), View::new(&below, m, half));
    let mut data = vec![0.0; n * n];
    for i in 0..half {
        for j in 0..half {
            data[i * n + j] = first.data[i * half + j] + change[i * half + j];
        }
    }
    for i in 0..m {
        for j in 0..half {
            data[(half + i) * n + j] = -below[i * half + j];
            data[j * n + half + i] = -below[i * half + j];
        }
        data[(half + i) * n + half..(half + i + 1) * n].copy_from_slice(&second.data[i * m..(i + 1) * m]);
    }
    Some(Matrix { rows: n, cols: n, data })
}

/// Eight sums at a time, in a fixed order: one running sum would wait for each addition.
pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(x, y)| x * y).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, cols: usize, data: &[f64]) -> Matrix {
        Matrix { rows, cols, data: data.to_vec() }
    }

    /// Values of no pattern in -1..1.
    fn noise(rows: usize, cols: usize) -> Matrix {
        let data = (0..rows * cols).map(|i| (i as f64 * 1.7 + (i as f64 * 0.31).sin() * 9.0).sin());
        Matrix { rows, cols, data: data.collect() }
    }

    fn assert_close(got: &[f64], want: &[f64], tolerance: f64) {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < tolerance, "{got} {want}");
        }
    }

    #[test]
    fn products_equal_the_ones_by_hand() {
        let a = matrix(2, 3, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let b = matrix(3, 1, &[1.0, 0.0, -1.0]);
        assert_eq!(a.times(b.view()).data, [-2.0, -2.0]);
        assert_eq!(t_product(a.view(), matrix(2, 1, &[1.0, 1.0]).view()).data, [5.0, 7.0, 9.0]);
    }

    #[test]
    fn blocks_and_panels_give_the_whole_product() {
        let (a, b) = (noise(2 * BLOCK + 3, 2 * PANEL + 5), noise(2 * PANEL + 5, 7));
        assert_close(&a.times(b.view()).data, &product(a.view(), b.view()), 1e-11);
        let whole = product(a.view().t(), a.view());
        assert_close(&gram(a.view()).data, &whole, 1e-11);
        assert_close(&t_product(a.view(), a.view()).data, &whole, 1e-11);
        let wide = gram(noise(3, BLOCK + 9).view().t());
        assert_eq!((wide.rows, wide.cols), (3, 3));
    }

    #[test]
    fn a_matrix_times_its_inverse_is_the_identity() {
        for n in [0, 1, 2, 3, 13, 50] {
            let mut a = gram(noise(n + 4, n).view());
            (0..n).for_each(|i| a.data[i * n + i] += 0.1);
            let identity: Vec<f64> = (0..n * n).map(|i| f64::from(i % (n + 1) == 0)).collect();
            assert_close(&a.times(inverse(a.view()).unwrap().view()).data, &identity, 1e-11);
        }
    }

    #[test]
    fn a_matrix_that_is_not_positive_definite_has_no_inverse() {
        for indefinite in [[1.0, 2.0, 2.0, 1.0], [-1.0, 0.0, 0.0, 1.0], [f64::NAN, 0.0, 0.0, 1.0]] {
            assert_eq!(inverse(matrix(2, 2, &indefinite).view()), None);
        }
    }

    #[test]
    fn standardised_columns_have_mean_0_and_variance_1_and_constant_ones_are_0() {
        let x = Embeddings::new(4, 2, vec![1.0, 7.1, 2.0, 7.1, 3.0, 7.1, 4.0, 7.1]);
        let z: Matrix = Standardiser::fit(&x).apply(&x);
        let column = |j: usize| z.data.iter().skip(j).step_by(2);
        assert!(column(0).sum::<f64>().abs() < 1e-12);
        assert!((column(0).map(|value| value * value).sum::<f64>() - 4.0).abs() < 1e-12);
        assert!(column(1).all(|&value| value == 0.0));
    }
}
