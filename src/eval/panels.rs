//! Products of tall f32 matrices whose columns lie sixteen together: no packing, each value read once.
//!
//! The sums of up to twenty rows of the result stay in registers while one panel passes by; every machine's own
//! registers are used (`pulp`), found at run time. Each sum is taken in the order of the rows.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::linalg::Matrix;

/// Columns of a panel: one AVX-512 register, or several narrower ones.
pub(super) const PANEL: usize = 16;

/// Rows of a block: 384 columns of it fit a second-level cache of 1 MiB. A chain of f32 sums is no longer than this.
const BLOCK: usize = 512;

/// Rows whose products one thread sums: fewer mean more sums to hold, more leave cores idle.
const PART: usize = 1024;

/// A panel's part of one row.
pub(super) type Lanes = [f32; PANEL];

/// `aᵀ b`, `[m, 16]`, of `a [k, m]`, row-major, and a panel `b [k, 16]`, over what `out` holds.
#[inline(always)]
pub(super) fn t_product_into<S: Simd>(simd: S, out: &mut [Lanes], a: &[f32], b: &[Lanes]) {
    let m = out.len();
    assert_eq!(a.len(), b.len() * m, "{} x {m}", b.len());
    let mut first = 0;
    while first < m {
        let (left, out) = (m - first, &mut out[first..]);
        // With what one step loads, the sums must not outnumber the registers.
        first += match left {
            20.. if S::REGISTER_COUNT > 22 => rows::<S, 20, 1>(simd, out, a, b, first, m),
            16.. if S::REGISTER_COUNT > 22 => rows::<S, 16, 1>(simd, out, a, b, first, m),
            8.. if S::F32_LANES == PANEL => rows::<S, 8, 1>(simd, out, a, b, first, m),
            // Evenly: a few rows alone would wait for their sums.
            _ => match left.div_ceil(left.div_ceil(6)) {
                6 => few_rows::<S, 6>(simd, out, a, b, first, m),
                5 => few_rows::<S, 5>(simd, out, a, b, first, m),
                4 => few_rows::<S, 4>(simd, out, a, b, first, m),
                3 => few_rows::<S, 3>(simd, out, a, b, first, m),
                2 => few_rows::<S, 2>(simd, out, a, b, first, m),
                _ => few_rows::<S, 1>(simd, out, a, b, first, m),
            },
        };
    }
}

/// [`rows`], two registers of a panel at a time where it has more than one: each factor is loaded half as often.
#[inline(always)]
fn few_rows<S: Simd, const T: usize>(
    simd: S,
    out: &mut [Lanes],
    a: &[f32],
    b: &[Lanes],
    first: usize,
    m: usize,
) -> usize {
    if S::F32_LANES < PANEL {
        rows::<S, T, 2>(simd, out, a, b, first, m)
    } else {
        rows::<S, T, 1>(simd, out, a, b, first, m)
    }
}

/// `T` rows of the product, those of `a`'s columns from `first` on, `R` registers of each together; returns `T`.
#[inline(always)]
fn rows<S: Simd, const T: usize, const R: usize>(
    simd: S,
    out: &mut [Lanes],
    a: &[f32],
    b: &[Lanes],
    first: usize,
    m: usize,
) -> usize {
    let registers = PANEL / S::F32_LANES;
    let (b, _) = S::as_simd_f32s(b.as_flattened());
    let (out, _) = S::as_mut_simd_f32s(out[..T].as_flattened_mut());
    for register in (0..registers).step_by(R) {
        let mut sums = [[simd.splat_f32s(0.0); R]; T];
        for (a, b) in a.chunks_exact(m).zip(b.chunks_exact(registers)) {
            let factors = a[first..].first_chunk::<T>().expect("T columns from the first on");
            let b = b[register..].first_chunk::<R>().expect("R registers from this one on");
            for t in 0..T {
                for r in 0..R {
                    sums[t][r] = simd.mul_add_e_f32s(simd.splat_f32s(factors[t]), b[r], sums[t][r]);
                }
            }
        }
        for (out, sums) in out.chunks_exact_mut(registers).zip(sums) {
            out[register..register + R].copy_from_slice(&sums);
        }
    }
    T
}

/// `a bᵀ`, row-major `[m, n]`, `shape`, of panels of rows `a [p, m, 16]` and `b`, p panels that lie as [`of_rows`] makes them of
/// n columns: the sum over all p and lanes.
#[inline(always)]
pub(super) fn lane_product_into<S: Simd>(
    simd: S,
    out: &mut [f32],
    shape: [usize; 2],
    a: &[Lanes],
    b: &[Lanes],
) {
    let [m, n] = shape;
    assert_eq!((a.len() * stride(n), out.len()), (b.len() * m, m * n), "{m} x {n}");
    let mut j = 0;
    while j < n {
        // With what one step loads, the sums must not outnumber the registers.
        j += match n - j {
            4.. if S::REGISTER_COUNT > 29 => lane_columns::<S, 4>(simd, out, shape, j, a, b),
            3.. => lane_columns::<S, 3>(simd, out, shape, j, a, b),
            _ => lane_columns::<S, 1>(simd, out, shape, j, a, b),
        };
    }
}

/// `U` columns of the product from `j` on; returns `U`.
#[inline(always)]
fn lane_columns<S: Simd, const U: usize>(
    simd: S,
    out: &mut [f32],
    shape: [usize; 2],
    j: usize,
    a: &[Lanes],
    b: &[Lanes],
) -> usize {
    let m = shape[0];
    let mut i = 0;
    while i < m {
        i += match m - i {
            5.. if S::REGISTER_COUNT > 29 => lane_sums::<S, 5, U>(simd, out, shape, [i, j], a, b),
            3.. => lane_sums::<S, 3, U>(simd, out, shape, [i, j], a, b),
            2 => lane_sums::<S, 2, U>(simd, out, shape, [i, j], a, b),
            _ => lane_sums::<S, 1, U>(simd, out, shape, [i, j], a, b),
        };
    }
    U
}

/// `T` rows and `U` columns of the product from `at` on; returns `T`.
#[inline(always)]
fn lane_sums<S: Simd, const T: usize, const U: usize>(
    simd: S,
    out: &mut [f32],
    [m, n]: [usize; 2],
    [i, j]: [usize; 2],
    a: &[Lanes],
    b: &[Lanes],
) -> usize {
    let registers = PANEL / S::F32_LANES;
    let ((a, _), (b, _)) = (S::as_simd_f32s(a.as_flattened()), S::as_simd_f32s(b.as_flattened()));
    let mut sums = [[simd.splat_f32s(0.0); U]; T];
    for (a, b) in a.chunks_exact(m * registers).zip(b.chunks_exact(stride(n) * registers)) {
        let (a, b) = (&a[i * registers..(i + T) * registers], &b[j * registers..(j + U) * registers]);
        for register in 0..registers {
            for t in 0..T {
                for u in 0..U {
                    let (a, b) = (a[t * registers + register], b[u * registers + register]);
                    sums[t][u] = simd.mul_add_e_f32s(a, b, sums[t][u]);
                }
            }
        }
    }
    for t in 0..T {
        for u in 0..U {
            out[(i + t) * n + j + u] = simd.reduce_sum_f32s(sums[t][u]);
        }
    }
    T
}

/// A matrix in blocks of rows, and each of them in panels: whatever is computed of a block finds it in the cache.
pub(super) struct Panels {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// `[ceil(cols / 16), rows]` each; zeros fill the last panel.
    pub(super) blocks: Vec<Vec<Lanes>>,
}

impl Panels {
    /// Of `[rows, cols]` whose blocks `block` gives, row-major.
    pub(super) fn new<B: AsRef<[f32]>>(
        rows: usize,
        cols: usize,
        block: impl Fn(Range<usize>) -> B + Sync,
    ) -> Self {
        let blocks = (0..rows.div_ceil(BLOCK)).into_par_iter();
        let blocks = blocks.map(|i| of_columns(block(i * BLOCK..((i + 1) * BLOCK).min(rows)).as_ref(), cols));
        Self { rows, cols, blocks: blocks.collect() }
    }

    /// `selfᵀ self`; each block in f32, the sum of blocks in f64.
    pub(super) fn gram(&self) -> Matrix {
        let panels = self.cols.div_ceil(PANEL);
        let pairs = (0..panels).flat_map(|i| (i..panels).map(move |j| (i, j))).collect();
        let mut gram = self.products(self, pairs);
        for i in 0..self.cols {
            for j in 0..i {
                gram.data[i * self.cols + j] = gram.data[j * self.cols + i];
            }
        }
        gram
    }

    /// `selfᵀ other`, as [`Self::gram`].
    pub(super) fn t_product(&self, other: &Self) -> Matrix {
        let others = other.cols.div_ceil(PANEL);
        let pairs = (0..self.cols.div_ceil(PANEL)).flat_map(|i| (0..others).map(move |j| (i, j)));
        self.products(other, pairs.collect())
    }

    /// Of the product, what the pairs of panels give; zeros elsewhere.
    fn products(&self, other: &Self, pairs: Vec<(usize, usize)>) -> Matrix {
        assert_eq!(self.rows, other.rows, "inner dimensions");
        assert!(self.cols > 0 && other.cols > 0, "{} x {}", self.cols, other.cols);
        let blocks: Vec<(&Vec<Lanes>, &Vec<Lanes>)> = self.blocks.iter().zip(&other.blocks).collect();
        let rows = self.blocks.first().map_or(1, |block| block.len() / self.cols.div_ceil(PANEL));
        let parts = blocks.par_chunks((PART / rows).max(1)).map(|part| {
            let mut sums = vec![[[0.0; PANEL]; PANEL]; pairs.len()];
            for (a, b) in part {
                Arch::new().dispatch(Pairs { a, b, pairs: &pairs, sums: &mut sums });
            }
            sums
        });
        let parts: Vec<Vec<Square>> = parts.collect();
        let mut out = vec![0.0; self.cols * other.cols];
        for (pair, (i, j)) in pairs.into_iter().enumerate() {
            let (first, columns) = (j * PANEL, PANEL.min(other.cols - j * PANEL));
            let rows = out.chunks_exact_mut(other.cols).skip(i * PANEL).take(PANEL);
            for (row, out) in rows.enumerate() {
                for part in &parts {
                    let sums = &part[pair][row][..columns];
                    out[first..].iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
                }
            }
        }
        Matrix { rows: self.cols, cols: other.cols, data: out }
    }
}

/// Sums of a panel's columns times another's.
type Square = [[f64; PANEL]; PANEL];

/// Adds one block's products of panels to their sums.
struct Pairs<'a> {
    a: &'a [Lanes],
    b: &'a [Lanes],
    pairs: &'a [(usize, usize)],
    sums: &'a mut [Square],
}

impl WithSimd for Pairs<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let last = self.pairs.last().expect("a product of panels").0 + 1;
        let rows = self.a.len() / last;
        let mut products = [[0.0; PANEL]; PANEL];
        for (&(i, j), sums) in self.pairs.iter().zip(self.sums) {
            let a = self.a[i * rows..][..rows].as_flattened();
            t_product_into(simd, &mut products, a, &self.b[j * rows..][..rows]);
            for (sum, product) in sums.as_flattened_mut().iter_mut().zip(products.as_flattened()) {
                *sum += f64::from(*product);
            }
        }
    }
}

/// Row-major `[rows, cols]` in panels, one after the other, `[ceil(cols / 16), rows]`; zeros fill the last one.
pub(super) fn of_columns(data: &[f32], cols: usize) -> Vec<Lanes> {
    let mut panels = Vec::with_capacity(data.len().div_ceil(PANEL));
    for first in (0..cols).step_by(PANEL) {
        for row in data.chunks_exact(cols) {
            match row[first..].first_chunk() {
                Some(lanes) => panels.push(*lanes),
                None => {
                    let mut lanes = [0.0; PANEL];
                    lanes[..cols - first].copy_from_slice(&row[first..]);
                    panels.push(lanes);
                }
            }
        }
    }
    panels
}

/// Row-major `[rows, cols]` in panels of sixteen rows, one after the other, `[ceil(rows / 16), stride(cols)]`; zeros fill the last
/// one and the additional column.
pub(super) fn of_rows(data: &[f32], cols: usize) -> Vec<Lanes> {
    let mut panels = Vec::with_capacity(data.len().div_ceil(PANEL * cols.max(1)) * stride(cols));
    for rows in data.chunks(PANEL * cols.max(1)) {
        let first = panels.len();
        panels.resize(first + stride(cols), [0.0; PANEL]);
        for (lane, row) in rows.chunks_exact(cols).enumerate() {
            panels[first..].iter_mut().zip(row).for_each(|(lanes, value)| lanes[lane] = *value);
        }
    }
    panels
}

/// Columns from one panel of rows to the next. One more than it holds: else the same column of all panels would fall into a few
/// sets of the cache.
pub(super) const fn stride(cols: usize) -> usize {
    cols + 1
}

#[cfg(test)]
mod tests {
    use pulp::Scalar;

    use super::*;

    /// `f` on every kind of register that this machine has, and without any.
    fn on_every_kind(f: impl Fn(&mut dyn FnMut(Kernel))) {
        f(&mut |kernel| Arch::new().dispatch(kernel));
        f(&mut |kernel| kernel.with_simd(Scalar::new()));
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = pulp::x86::V3::try_new() {
            f(&mut |kernel| Simd::vectorize(avx2, kernel));
        }
    }

    enum Kernel<'a> {
        T(&'a mut [Lanes], &'a [f32], &'a [Lanes]),
        Lane(&'a mut [f32], [usize; 2], &'a [Lanes], &'a [Lanes]),
    }

    impl WithSimd for Kernel<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            match self {
                Kernel::T(out, a, b) => t_product_into(simd, out, a, b),
                Kernel::Lane(out, shape, a, b) => lane_product_into(simd, out, shape, a, b),
            }
        }
    }

    /// Integers, whose sums are exact in any order.
    fn value(i: usize) -> f32 {
        (i * i % 23) as f32 - 11.0
    }

    #[test]
    fn panels_of_any_size_give_the_whole_product_on_every_kind_of_register() {
        let shapes = (1..=21).map(|m| (9, m, 20));
        for (k, m, n) in shapes.chain([(3, 1, 1), (40, 7, 16), (33, 20, 35), (5, 53, 20), (0, 4, 2)]) {
            let a: Vec<f32> = (0..k * m).map(value).collect();
            let b: Vec<f32> = (0..k * n).map(|i| value(i + 5)).collect();
            let panels = of_columns(&b, n);
            on_every_kind(|run| {
                for panel in 0..n.div_ceil(PANEL) {
                    let mut out = vec![[9.0; PANEL]; m];
                    run(Kernel::T(&mut out, &a, &panels[panel * k..][..k]));
                    for (i, j) in (0..m).flat_map(|i| (0..PANEL).map(move |j| (i, j))) {
                        let column = panel * PANEL + j;
                        let products =
                            (0..k).filter(|_| column < n).map(|k| a[k * m + i] * b[k * n + column]);
                        assert_eq!(out[i][j], products.sum::<f32>(), "{k} x {m} x {n}: {i} {column}");
                    }
                }
            });
        }
    }

    #[test]
    fn products_over_lanes_are_whole_on_every_kind_of_register() {
        for (rows, m, n) in
            (1..=11).flat_map(|m| (1..=9).map(move |n| (37, m, n))).chain([(0, 2, 3), (16, 20, 5)])
        {
            let a: Vec<f32> = (0..rows * m).map(value).collect();
            let b: Vec<f32> = (0..rows * n).map(|i| value(i + 5)).collect();
            // Without the additional column.
            let a_panels: Vec<Lanes> =
                of_rows(&a, m).chunks_exact(stride(m)).flat_map(|panel| &panel[..m]).copied().collect();
            let mut b_panels = of_rows(&b, n);
            b_panels.chunks_exact_mut(stride(n)).for_each(|panel| panel[n] = [f32::NAN; PANEL]);
            on_every_kind(|run| {
                let mut out = vec![9.0; m * n];
                run(Kernel::Lane(&mut out, [m, n], &a_panels, &b_panels));
                for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                    let sum: f32 = (0..rows).map(|row| a[row * m + i] * b[row * n + j]).sum();
                    assert_eq!(out[i * n + j], sum, "{rows} x {m} x {n}: {i} {j}");
                }
            });
        }
    }

    #[test]
    fn panels_of_rows_are_those_of_the_transposed_matrix() {
        let data: Vec<f32> = (0..18 * 3).map(|i| i as f32).collect();
        let transposed: Vec<f32> = (0..18 * 3).map(|i| data[i % 18 * 3 + i / 18]).collect();
        let panels: Vec<Lanes> =
            of_rows(&data, 3).chunks_exact(stride(3)).flat_map(|panel| &panel[..3]).copied().collect();
        assert_eq!(panels, of_columns(&transposed, 18));
    }

    #[test]
    fn blocks_and_panels_give_the_whole_product() {
        let matrix = |rows: usize, cols: usize| -> Vec<f32> {
            (0..rows * cols).map(|i| (i * i % 23) as f32 - (cols % 17) as f32).collect()
        };
        for (rows, cols, others) in [(PART + BLOCK + 3, 37, 20), (7, 16, 1), (0, 3, 2)] {
            let (a, b) = (matrix(rows, cols), matrix(rows, others));
            let panels = |data: &[f32], cols| {
                Panels::new(rows, cols, |block| data[block.start * cols..block.end * cols].to_vec())
            };
            let product = |a: &[f32], n: usize, b: &[f32], m: usize| -> Vec<f64> {
                let of = |i, j| (0..rows).map(|row| f64::from(a[row * n + i] * b[row * m + j])).sum();
                (0..n).flat_map(|i| (0..m).map(move |j| (i, j))).map(|(i, j)| of(i, j)).collect()
            };
            let (left, right) = (panels(&a, cols), panels(&b, others));
            assert_eq!(left.t_product(&right).data, product(&a, cols, &b, others));
            assert_eq!(left.gram().data, product(&a, cols, &a, cols));
        }
    }
}
