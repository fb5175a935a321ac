//! Products of f32 as they are.
//!
//! By the kernel of our own where the machine has AVX-512, by the `gemm` crate elsewhere: with AVX2 a kernel of our own changed
//! whole steps by no more than the noise of the machine, since both come near the limit of those instructions.

use super::arithmetic::{Arithmetic, Full, Left, Patches, Right, Rows};
#[cfg(target_arch = "x86_64")]
use super::avx512;
use super::matrix::Write;

/// See the module's text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Single {
    /// The machine has AVX512F. Only `new` sets it: the kernel's safety hangs on it.
    instructions: bool,
}

impl Single {
    pub(super) fn new() -> Self {
        #[cfg(target_arch = "x86_64")]
        let instructions = is_x86_feature_detected!("avx512f");
        #[cfg(not(target_arch = "x86_64"))]
        let instructions = false;
        Single { instructions }
    }

    #[cfg(test)]
    pub(super) fn without_instructions() -> Self {
        Single { instructions: false }
    }
}

impl Arithmetic for Single {
    type Wide = f32;
    type Narrow = f32;
    const GROUP: usize = 1;
    const FEWEST_ROWS: usize = 6;

    #[inline(always)]
    fn to_narrow(wide: f32) -> f32 {
        wide
    }

    #[inline(always)]
    fn to_wide(narrow: f32) -> f32 {
        narrow
    }

    fn narrow<'a>(wide: &'a [f32], _: &'a mut Vec<f32>) -> &'a [f32] {
        wide
    }

    fn group_rows<'a>(rows: Rows<'a, f32>, scratch: &'a mut Vec<f32>) -> Right<'a, f32> {
        Full::group_rows(rows, scratch)
    }

    fn group_columns<'a>(rows: Rows<'a, f32>, scratch: &'a mut Vec<f32>) -> Right<'a, f32> {
        let Rows { data, rows, columns, stride } = rows;
        scratch.resize(rows * columns, 0.0);
        // Whole cache lines of the source at a time: 16 columns of all rows.
        for first in (0..columns).step_by(16) {
            let last = (first + 16).min(columns);
            for (row, source) in data.chunks(stride).take(rows).enumerate() {
                for (column, &element) in source[..last].iter().enumerate().skip(first) {
                    scratch[column * rows + row] = element;
                }
            }
        }
        Right::side_by_side::<Self>(scratch, columns, rows)
    }

    fn group_patches<'a>(patches: Patches<'_, f32>, scratch: &'a mut Vec<f32>) -> Right<'a, f32> {
        Full::group_patches(patches, scratch)
    }

    /// The kernel reads patches where they lie.
    fn multiply_patches(
        self,
        patches: Patches<'_, f32>,
        right: Right<'_, f32>,
        destination: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        #[cfg(target_arch = "x86_64")]
        if self.instructions {
            // SAFETY: `instructions` says that the machine has them.
            unsafe { avx512::multiply_patches(patches, right, destination) };
            return;
        }
        Full::new().multiply_patches(patches, right, destination, scratch);
    }

    fn multiply(
        self,
        left: Left<'_, f32>,
        right: Right<'_, f32>,
        destination: &mut [f32],
        stride: usize,
        write: Write,
    ) {
        #[cfg(target_arch = "x86_64")]
        if self.instructions && right.column_stride == Self::GROUP {
            // SAFETY: `instructions` says that the machine has them.
            unsafe { avx512::multiply(left, right, destination, stride, write) };
            return;
        }
        Full::new().multiply(left, right, destination, stride, write);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Small whole numbers: every order of summation gives the same sum.
    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 37 + seed * 11) % 15) as f32 - 7.0).collect()
    }

    fn expected(a: &[f32], b: &[f32], (rows, depth, columns): (usize, usize, usize)) -> Vec<f32> {
        let cell = |i: usize, j: usize| (0..depth).map(|d| a[i * depth + d] * b[d * columns + j]).sum();
        (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))).map(|(i, j)| cell(i, j)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// By everything that the machine can, at sizes that leave rests everywhere; nothing is written between the rows.
        #[test]
        fn rows_and_columns_give_the_product(rows in 1usize..15, depth in 1usize..40, columns in 1usize..150) {
            let (a, b) = (numbers(rows * depth, 1), numbers(depth * columns, 2));
            let wanted = expected(&a, &b, (rows, depth, columns));
            let turned: Vec<f32> = (0..depth).flat_map(|d| (0..rows).map(move |i| (i, d))).map(|(i, d)| a[i * depth + d]).collect();
            let mut scratch = [Vec::new(), Vec::new()];
            let [s0, s1] = &mut scratch;
            let right = Single::group_rows(Rows::new(&b, depth, columns), s0);
            let lefts = [
                Single::left(Rows::new(&a, rows, depth)),
                Single::group_rows(Rows::new(&turned, depth, rows), s1).transposed(),
            ];
            let stride = columns + 3;
            for (single, left) in [Single::new(), Single::without_instructions()].into_iter().flat_map(|single| lefts.map(|left| (single, left))) {
                let mut out = vec![1f32; rows * stride];
                single.multiply(left, right, &mut out, stride, Write::Add);
                let added = |row: usize, column: usize| match column < columns {
                    true => wanted[row * columns + column] + 1.0,
                    false => 1.0,
                };
                let all: Vec<f32> = (0..rows * stride).map(|at| added(at / stride, at % stride)).collect();
                prop_assert_eq!(&out, &all);
                single.multiply(left, right, &mut out, stride, Write::Replace);
                prop_assert!(out.chunks(stride).zip(wanted.chunks(columns)).all(|(out, row)| &out[..columns] == row));
            }
        }

        #[test]
        fn patches_give_what_their_copies_give(
            count in 1usize..20, segments in 1usize..4, segment_len in 1usize..12, columns in 1usize..90,
        ) {
            let segment_stride = segment_len + 2;
            let image = numbers(2 * count + segments * segment_stride, 3);
            let starts: Vec<usize> = (0..count).map(|i| 2 * i).collect();
            let patches = Patches { data: &image, starts: &starts, segments, segment_len, segment_stride };
            let copies: Vec<f32> = (0..count).flat_map(|row| patches.runs(row).flatten().copied()).collect();
            let b = numbers(patches.columns() * columns, 4);
            let wanted = expected(&copies, &b, (count, patches.columns(), columns));
            let (mut s0, mut s1) = (Vec::new(), Vec::new());
            let right = Single::group_rows(Rows::new(&b, patches.columns(), columns), &mut s0);
            for single in [Single::new(), Single::without_instructions()] {
                let mut out = vec![f32::NAN; count * columns];
                single.multiply_patches(patches, right, &mut out, &mut s1);
                prop_assert_eq!(&out, &wanted);
            }
        }
    }
}
