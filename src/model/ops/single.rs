//! Products of f32 as they are.
//!
//! By the kernel of our own where the machine has AVX-512, by the `gemm` crate elsewhere.

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
