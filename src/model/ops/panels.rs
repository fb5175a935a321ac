//! A weight as a right operand that is kept: cut into panels, which the kernels read from the first byte to the last.

use rayon::prelude::*;

use super::arithmetic::{Arithmetic, Right, Rows};

/// `[panels][depth in groups][columns of a panel][GROUP]`; what pads the last panel and the last group is zero.
pub(super) struct Panels<A: Arithmetic> {
    data: Vec<A::Narrow>,
    /// In groups.
    depth: usize,
    columns: usize,
}

/// Elements of the depth that are written for all columns of a panel before the next ones: what is written then stays in
/// the first-level cache.
const DEPTH_PER_RUN: usize = 16;

impl<A: Arithmetic> Panels<A> {
    /// Of [depth, columns] elements. `run(r, column, put)` calls `put(d, element)` for those elements of a column that
    /// belong to the run `r` in `0..runs`; what is never put is zero.
    pub(super) fn filled(
        (depth, columns): (usize, usize),
        runs: usize,
        run: impl Fn(usize, usize, &mut dyn FnMut(usize, A::Wide)) + Sync,
    ) -> Self {
        let groups = depth.div_ceil(A::GROUP);
        let width = columns.min(A::panel_columns(columns));
        let panel_len = groups * width * A::GROUP;
        let mut data = vec![A::Narrow::default(); columns.div_ceil(width) * panel_len];
        data.par_chunks_exact_mut(panel_len).enumerate().for_each(|(panel, data)| {
            let first = panel * width;
            for r in 0..runs {
                for column in first..(first + width).min(columns) {
                    let mut put = |d: usize, element| {
                        let at = (d / A::GROUP * width + column - first) * A::GROUP + d % A::GROUP;
                        data[at] = A::to_narrow(element);
                    };
                    run(r, column, &mut put);
                }
            }
        });
        Panels { data, depth: groups, columns }
    }

    /// Of `rows` [columns, depth]: contracted along each row.
    pub(super) fn of_rows(rows: Rows<'_, A::Wide>) -> Self {
        let Rows { data, rows, columns: depth, stride } = rows;
        Self::filled((depth, rows), depth.div_ceil(DEPTH_PER_RUN), |run, row, put| {
            let start = run * DEPTH_PER_RUN;
            let elements = &data[row * stride..][start..(start + DEPTH_PER_RUN).min(depth)];
            elements.iter().enumerate().for_each(|(i, &element)| put(start + i, element));
        })
    }

    pub(super) fn right(&self) -> Right<'_, A::Narrow> {
        let width = self.columns.min(A::panel_columns(self.columns));
        let group_stride = width * A::GROUP;
        Right {
            data: &self.data,
            depth: self.depth,
            columns: self.columns,
            group_stride,
            column_stride: A::GROUP,
            panel_columns: width,
            panel_stride: self.depth * group_stride,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::arithmetic::Full;
    use crate::model::ops::bf16::Bf16;
    use crate::model::ops::matrix::Write;
    use crate::model::ops::single::Single;
    use proptest::prelude::*;

    /// Small whole numbers: bf16 holds them, and every order of summation gives the same sum.
    fn numbers<T: crate::model::ops::kernel::Real>(count: usize, seed: usize) -> Vec<T> {
        (0..count).map(|i| T::narrow(((i * 37 + seed * 11) % 15) as f64 - 7.0)).collect()
    }

    /// `a` [rows, depth] times `b` [columns, depth] transposed, by panels.
    fn product<A: Arithmetic>(arithmetic: A, rows: usize, depth: usize, columns: usize) -> Vec<A::Wide> {
        let (a, b) = (numbers::<A::Wide>(rows * depth, 1), numbers::<A::Wide>(columns * depth, 2));
        let panels = Panels::<A>::of_rows(Rows::new(&b, columns, depth));
        let mut scratch = Vec::new();
        let left = A::left(Rows::new(A::narrow(&a, &mut scratch), rows, depth));
        let mut out = vec![A::Wide::default(); rows * columns];
        arithmetic.multiply(left, panels.right(), &mut out, columns, Write::Replace);
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn panels_give_the_product(rows in 1usize..14, half_depth in 1usize..25, columns in 1usize..200) {
            let depth = 2 * half_depth;
            let (a, b) = (numbers::<f64>(rows * depth, 1), numbers::<f64>(columns * depth, 2));
            let cell = |i: usize, j: usize| (0..depth).map(|d| a[i * depth + d] * b[j * depth + d]).sum();
            let wanted: Vec<f64> =
                (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))).map(|(i, j)| cell(i, j)).collect();
            prop_assert_eq!(&product(Full::<f64>::new(), rows, depth, columns), &wanted);
            let wanted: Vec<f32> = wanted.iter().map(|&value| value as f32).collect();
            for single in Single::all() {
                prop_assert_eq!(&product(single, rows, depth, columns), &wanted);
            }
            prop_assert_eq!(&product(Bf16::new(), rows, depth, columns), &wanted);
            prop_assert_eq!(&product(Bf16::without_instructions(), rows, depth, columns), &wanted);
        }
    }
}
