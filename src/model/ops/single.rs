//! Products of f32 as they are.
//!
//! By kernels of our own where the machine has AVX-512, and where it has AVX2 and the right operand lies in panels (a weight
//! that is multiplied often); by the `gemm` crate elsewhere.

use super::arithmetic::{Arithmetic, Full, Left, Patches, Right, Rows};
#[cfg(target_arch = "x86_64")]
use super::blocks::{self, Kernel};
use super::matrix::Write;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};

/// See the module's text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Single {
    /// What the machine has. Only `new` sets it: the kernels' safety hangs on it.
    instructions: Instructions,
}

#[derive(Clone, Copy, Debug)]
enum Instructions {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Other,
}

impl Instructions {
    fn of_machine() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return Instructions::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Instructions::Avx2;
            }
        }
        Instructions::Other
    }
}

impl Single {
    pub(super) fn new() -> Self {
        Single { instructions: Instructions::of_machine() }
    }

    /// Every way of multiplying that this machine has.
    #[cfg(test)]
    pub(super) fn all() -> Vec<Self> {
        let machine = Self::new();
        let mut all = vec![machine, Single { instructions: Instructions::Other }];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            all.push(Single { instructions: Instructions::Avx2 });
        }
        all
    }
}

/// Columns of the panels of a weight that is brought into order for one product. Only the kernel of AVX2 gains from panels of
/// its own width; elsewhere a weight is one panel.
fn weight_width(columns: usize) -> usize {
    match Instructions::of_machine() {
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 => avx2::panel_columns(columns).min(columns),
        _ => columns,
    }
}

/// `data`: panels of `width` columns, one after the other.
fn in_panels(data: &[f32], depth: usize, columns: usize, width: usize) -> Right<'_, f32> {
    Right {
        data,
        depth,
        columns,
        group_stride: width,
        column_stride: 1,
        panel_columns: width,
        panel_stride: depth * width,
    }
}

impl Arithmetic for Single {
    type Wide = f32;
    type Narrow = f32;
    const GROUP: usize = 1;
    const FEWEST_ROWS: usize = 6;

    fn panel_columns(columns: usize) -> usize {
        match Instructions::of_machine() {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => avx2::panel_columns(columns),
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => avx512::Singles::COLUMNS,
            Instructions::Other => 64,
        }
    }

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
        let width = weight_width(rows);
        scratch.resize(rows.next_multiple_of(width) * columns, 0.0);
        for (panel, out) in scratch.chunks_exact_mut(width * columns).enumerate() {
            let (first_row, panel_rows) = (panel * width, (rows - panel * width).min(width));
            let sources = || data[first_row * stride..].chunks(stride).take(panel_rows).enumerate();
            // Whole cache lines of the source at a time: 16 columns of all rows.
            for first in (0..columns).step_by(16) {
                let last = (first + 16).min(columns);
                for (row, source) in sources() {
                    for (column, &element) in source[..last].iter().enumerate().skip(first) {
                        out[column * width + row] = element;
                    }
                }
            }
        }
        in_panels(scratch, columns, rows, width)
    }

    fn group_patches<'a>(patches: Patches<'_, f32>, scratch: &'a mut Vec<f32>) -> Right<'a, f32> {
        Full::group_patches(patches, scratch)
    }

    fn group_weight<'a>(weight: Patches<'_, f32>, scratch: &'a mut Vec<f32>) -> Right<'a, f32> {
        assert_eq!(weight.segments, 1, "a weight's rows are whole");
        let (depth, columns) = (weight.starts.len(), weight.columns());
        let width = weight_width(columns);
        if width == columns {
            return Self::group_patches(weight, scratch);
        }
        scratch.resize(depth * columns.next_multiple_of(width), 0.0);
        for (row, start) in weight.starts.iter().enumerate() {
            let source = &weight.data[*start..][..columns];
            for (panel, source) in source.chunks(width).enumerate() {
                scratch[(panel * depth + row) * width..][..source.len()].copy_from_slice(source);
            }
        }
        in_panels(scratch, depth, columns, width)
    }

    /// The kernels read patches where they lie.
    fn multiply_patches(
        self,
        patches: Patches<'_, f32>,
        right: Right<'_, f32>,
        destination: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        match self.instructions {
            // SAFETY: `instructions` says that the machine has them.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => unsafe {
                blocks::multiply_patches::<avx512::Singles>(patches, right, destination);
            },
            // SAFETY: `instructions` says that the machine has them.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 if avx2::suit(&right) => unsafe {
                avx2::multiply_patches(patches, right, destination);
            },
            _ => Full::new().multiply_patches(patches, right, destination, scratch),
        }
    }

    fn add_over_patches(
        self,
        left: Patches<'_, f32>,
        right: Patches<'_, f32>,
        destination: &mut [f32],
        scratch: &mut [Vec<f32>; 2],
    ) {
        match self.instructions {
            // SAFETY: `instructions` says that the machine has them.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => unsafe { avx2::add_over_patches(left, right, destination) },
            _ => super::arithmetic::add_over_copies(self, left, right, destination, scratch),
        }
    }

    fn multiply(
        self,
        left: Left<'_, f32>,
        right: Right<'_, f32>,
        destination: &mut [f32],
        stride: usize,
        write: Write,
    ) {
        match self.instructions {
            // SAFETY: `instructions` says that the machine has them.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 if right.column_stride == 1 => unsafe {
                blocks::multiply::<avx512::Singles>(left, right, destination, stride, write);
            },
            // SAFETY: `instructions` says that the machine has them.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 if avx2::suit(&right) => unsafe {
                avx2::multiply(left, right, destination, stride, write);
            },
            _ => Full::new().multiply(left, right, destination, stride, write),
        }
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
            for (single, left) in Single::all().into_iter().flat_map(|single| lefts.map(|left| (single, left))) {
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

        /// However the right operand was brought into order.
        #[test]
        fn patches_give_what_their_copies_give(
            count in 1usize..20, segments in 1usize..4, segment_len in 1usize..12, columns in 1usize..90,
        ) {
            let segment_stride = segment_len + 2;
            let image = numbers(2 * count + segments * segment_stride, 3);
            let starts: Vec<usize> = (0..count).map(|i| 2 * i).collect();
            let patches = Patches { data: &image, starts: &starts, segments, segment_len, segment_stride };
            let copies: Vec<f32> = (0..count).flat_map(|row| patches.runs(row).flatten().copied()).collect();
            let depth = patches.columns();
            let b = numbers(depth * columns, 4);
            let wanted = expected(&copies, &b, (count, depth, columns));
            let turned: Vec<f32> = (0..columns).flat_map(|j| (0..depth).map(move |d| (d, j))).map(|(d, j)| b[d * columns + j]).collect();
            let b_starts: Vec<usize> = (0..depth).map(|d| d * columns).collect();
            let weight = Patches { data: &b, starts: &b_starts, segments: 1, segment_len: columns, segment_stride: 0 };
            let [mut s0, mut s1, mut s2, mut s3] = [const { Vec::new() }; 4];
            let rights = [
                Single::group_rows(Rows::new(&b, depth, columns), &mut s0),
                Single::group_columns(Rows::new(&turned, columns, depth), &mut s1),
                Single::group_weight(weight, &mut s2),
            ];
            for (single, right) in Single::all().into_iter().flat_map(|single| rights.map(|right| (single, right))) {
                let mut out = vec![f32::NAN; count * columns];
                single.multiply_patches(patches, right, &mut out, &mut s3);
                prop_assert_eq!(&out, &wanted);
                let left = Single::left(Rows::new(&copies, count, depth));
                single.multiply(left, right, &mut out, columns, Write::Add);
                prop_assert!(out.iter().zip(&wanted).all(|(&out, &wanted)| out == 2.0 * wanted));
            }
        }

        #[test]
        fn a_sum_over_patches_is_that_of_their_copies(
            count in 1usize..100, rows in 1usize..15, segments in 1usize..4, segment_len in 1usize..60,
        ) {
            let (left_stride, segment_stride) = (rows + 1, segment_len + 2);
            let (pixels, image) = (numbers(count * left_stride, 5), numbers(2 * count + segments * segment_stride, 6));
            let left_starts: Vec<usize> = (0..count).map(|i| i * left_stride).collect();
            let right_starts: Vec<usize> = (0..count).map(|i| 2 * i).collect();
            let left = Patches { data: &pixels, starts: &left_starts, segments: 1, segment_len: rows, segment_stride: 0 };
            let right = Patches { data: &image, starts: &right_starts, segments, segment_len, segment_stride };
            let turned: Vec<f32> = (0..rows).flat_map(|i| (0..count).map(move |d| (d, i))).map(|(d, i)| pixels[d * left_stride + i]).collect();
            let copies: Vec<f32> = (0..count).flat_map(|row| right.runs(row).flatten().copied()).collect();
            let wanted = expected(&turned, &copies, (rows, count, right.columns()));
            for single in Single::all() {
                let mut out = vec![1f32; wanted.len()];
                single.add_over_patches(left, right, &mut out, &mut [const { Vec::new() }; 2]);
                prop_assert!(out.iter().zip(&wanted).all(|(&out, &wanted)| out == wanted + 1.0));
            }
        }
    }

    #[test]
    #[should_panic = "a patch beyond its image"]
    fn a_patch_beyond_its_image_is_refused() {
        let data = [1f32; 8];
        let patches =
            |starts| Patches { data: &data, starts, segments: 1, segment_len: 4, segment_stride: 0 };
        Single::new().add_over_patches(
            patches(&[0, 4]),
            patches(&[0, 5]),
            &mut [0.0; 16],
            &mut [const { Vec::new() }; 2],
        );
    }
}
