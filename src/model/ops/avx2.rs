//! The product kernels of machines with AVX2 and FMA, for f32.
//!
//! A block of 6 x 16 sums: 12 of the 16 registers hold sums, 2 the right operand, 1 the left. The block is narrow, so it
//! pays where the right operand lies in panels of its width; elsewhere the `gemm` crate, which copies it, is faster. A
//! convolution's weight gradient has a kernel to itself, which copies neither operand.

use std::arch::x86_64::{
    __m256, __m256i, _mm256_add_ps, _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_maskload_ps, _mm256_maskstore_ps, _mm256_setzero_ps, _mm256_storeu_ps,
};

use super::arithmetic::{Left, Patches, Right};
use super::blocks::{self, Block, Kernel};
use super::matrix::Write;

/// Sums in a vector.
const LANES: usize = 8;

/// Products of f32 in blocks of 6 x 16.
struct SixBySixteen;
/// Products of f32 in blocks of 3 x 24: 9 registers hold sums, 3 the right operand, 1 the left. (The compiler has no register
/// left for a fourth row.)
struct ThreeByTwentyFour;

/// Into panels of how many columns so many are cut: of 24 where that leaves no rest and 16 would.
pub(super) fn panel_columns(columns: usize) -> usize {
    let (narrow, wide) = (SixBySixteen::COLUMNS, ThreeByTwentyFour::COLUMNS);
    if !columns.is_multiple_of(narrow) && columns.is_multiple_of(wide) { wide } else { narrow }
}

/// Whether the kernels read the right operand from the first byte to the last.
pub(super) fn suit(right: &Right<'_, f32>) -> bool {
    right.column_stride == 1 && right.group_stride <= ThreeByTwentyFour::COLUMNS
}

/// `destination = (0 or destination) + left * right`; rows of the destination lie `stride` apart.
///
/// # Safety
/// The machine has AVX2 and FMA.
///
/// # Panics
/// As [`blocks::multiply`].
pub(super) unsafe fn multiply(
    left: Left<'_, f32>,
    right: Right<'_, f32>,
    destination: &mut [f32],
    stride: usize,
    write: Write,
) {
    // SAFETY: this function's condition.
    unsafe {
        if right.group_stride == ThreeByTwentyFour::COLUMNS {
            blocks::multiply::<ThreeByTwentyFour>(left, right, destination, stride, write);
        } else {
            blocks::multiply::<SixBySixteen>(left, right, destination, stride, write);
        }
    }
}

/// `destination = patches * right`, without gaps between the rows of the destination.
///
/// # Safety
/// The machine has AVX2 and FMA.
///
/// # Panics
/// As [`blocks::multiply_patches`].
pub(super) unsafe fn multiply_patches(
    patches: Patches<'_, f32>,
    right: Right<'_, f32>,
    destination: &mut [f32],
) {
    // SAFETY: this function's condition.
    unsafe {
        if right.group_stride == ThreeByTwentyFour::COLUMNS {
            blocks::multiply_patches::<ThreeByTwentyFour>(patches, right, destination);
        } else {
            blocks::multiply_patches::<SixBySixteen>(patches, right, destination);
        }
    }
}

/// Implements a [`Kernel`] of so many rows, which are listed, and vectors.
macro_rules! kernel {
    ($kernel:ident, $vectors:literal; $($rows:literal)+) => {
        impl Kernel for $kernel {
            type Element = f32;
            const GROUP: usize = 1;
            const ROWS: usize = [$($rows),+].len();
            const COLUMNS: usize = $vectors * LANES;

            unsafe fn multiply_block(b: Block<f32>, rows: usize, columns: usize) {
                // SAFETY: this function's condition.
                unsafe {
                    match (rows, columns == Self::COLUMNS) {
                        $(($rows, true) => block::<$rows, $vectors, true>(b, columns),
                        ($rows, false) => block::<$rows, $vectors, false>(b, columns),)+
                        (rows, _) => unreachable!("a block of {rows} rows"),
                    }
                }
            }
        }
    };
}

kernel!(SixBySixteen, 2; 1 2 3 4 5 6);
kernel!(ThreeByTwentyFour, 3; 1 2 3);

/// # Safety
/// As for `multiply_block`, of `ROWS` rows, and of all columns where it is `WHOLE`.
#[target_feature(enable = "avx2,fma")]
unsafe fn block<const ROWS: usize, const VECTORS: usize, const WHOLE: bool>(b: Block<f32>, columns: usize) {
    let lanes = Lanes::<VECTORS>::of(if WHOLE { None } else { Some(columns) });
    let mut sums = [[_mm256_setzero_ps(); VECTORS]; ROWS];
    let mut right = b.right;
    for segment in 0..b.segments {
        let mut at = segment * b.segment_stride;
        for _ in 0..b.segment_depth {
            // SAFETY: inside the operands, by this function's condition.
            unsafe {
                let rights = lanes.load(right);
                for (sums, left) in sums.iter_mut().zip(b.left) {
                    let left = _mm256_broadcast_ss(&*left.add(at));
                    for (sum, right) in sums.iter_mut().zip(rights) {
                        *sum = _mm256_fmadd_ps(left, right, *sum);
                    }
                }
            }
            at += b.left_group_stride;
            // Past the end after the last group, where it is not read any more.
            right = right.wrapping_add(b.right_group_stride);
        }
    }
    for (row, sums) in sums.into_iter().enumerate() {
        // SAFETY: inside the destination, by this function's condition.
        unsafe { lanes.store(b.out.add(row * b.out_stride), sums, b.write) };
    }
}

/// Columns of a block: all of its vectors' lanes, or some.
#[derive(Clone, Copy)]
struct Lanes<const VECTORS: usize> {
    masks: Option<[__m256i; VECTORS]>,
}

impl<const VECTORS: usize> Lanes<VECTORS> {
    /// The first `columns` of them; all for `None`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn of(columns: Option<usize>) -> Self {
        let mask = |columns: usize, vector: usize| mask(columns.saturating_sub(vector * LANES).min(LANES));
        Lanes { masks: columns.map(|columns| std::array::from_fn(|vector| mask(columns, vector))) }
    }

    /// # Safety
    /// These lanes from `from` on can be read.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn load(&self, from: *const f32) -> [__m256; VECTORS] {
        std::array::from_fn(|vector| {
            let from = from.wrapping_add(vector * LANES);
            // SAFETY: this function's condition; a mask's other lanes are not read.
            unsafe {
                match &self.masks {
                    None => _mm256_loadu_ps(from),
                    Some(masks) => _mm256_maskload_ps(from, masks[vector]),
                }
            }
        })
    }

    /// # Safety
    /// These lanes from `to` on can be read and written.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn store(&self, to: *mut f32, sums: [__m256; VECTORS], write: Write) {
        let sums = match write {
            Write::Replace => sums,
            Write::Add => {
                // SAFETY: this function's condition.
                let before = unsafe { self.load(to) };
                std::array::from_fn(|vector| _mm256_add_ps(before[vector], sums[vector]))
            }
        };
        for (vector, sum) in sums.into_iter().enumerate() {
            let to = to.wrapping_add(vector * LANES);
            // SAFETY: this function's condition; a mask's other lanes are not written.
            unsafe {
                match &self.masks {
                    None => _mm256_storeu_ps(to, sum),
                    Some(masks) => _mm256_maskstore_ps(to, masks[vector], sum),
                }
            }
        }
    }
}

/// So many patches' share of a block, of both sides, stays in the first-level cache; tiles of positions are multiples of it.
const PATCHES_AT_ONCE: usize = 42;

/// `destination += transposed left * right`, contracted over the patches, which are read where they lie; those on the left
/// are one run each.
///
/// # Safety
/// The machine has AVX2 and FMA.
///
/// # Panics
/// Where a patch reaches outside its slice, or sizes differ.
pub(super) unsafe fn add_over_patches(
    left: Patches<'_, f32>,
    right: Patches<'_, f32>,
    destination: &mut [f32],
) {
    left.assert_fits();
    right.assert_fits();
    assert!(left.segments == 1 && left.starts.len() == right.starts.len());
    assert_eq!(destination.len(), left.columns() * right.columns());
    let wide = panel_columns(right.segment_len) == ThreeByTwentyFour::COLUMNS;
    let starts = left.starts.chunks(PATCHES_AT_ONCE).zip(right.starts.chunks(PATCHES_AT_ONCE));
    for (left_starts, right_starts) in starts {
        let left = Patches { starts: left_starts, ..left };
        let right = Patches { starts: right_starts, ..right };
        // SAFETY: the asserts above; the instructions are the caller's promise.
        unsafe {
            if wide {
                add_over::<{ ThreeByTwentyFour::ROWS }, 3>(left, right, destination);
            } else {
                add_over::<{ SixBySixteen::ROWS }, 2>(left, right, destination);
            }
        }
    }
}

/// [`add_over_patches`] in blocks of `ROWS` (at most 6) x `VECTORS`.
///
/// # Safety
/// The machine has AVX2 and FMA, the patches lie inside their slices, `left` has one run each, and the destination has room
/// for each of its columns with each of `right`'s.
unsafe fn add_over<const ROWS: usize, const VECTORS: usize>(
    left: Patches<'_, f32>,
    right: Patches<'_, f32>,
    destination: &mut [f32],
) {
    let (all_rows, out_stride, run) = (left.columns(), right.columns(), right.segment_len);
    for segment in 0..right.segments {
        for column in (0..run).step_by(VECTORS * LANES) {
            for row in (0..all_rows).step_by(ROWS) {
                let (rows, columns) = ((all_rows - row).min(ROWS), (run - column).min(VECTORS * LANES));
                let block = PatchBlock {
                    left: left.data[row..].as_ptr(),
                    right: right.data[segment * right.segment_stride + column..].as_ptr(),
                    starts: (left.starts, right.starts),
                    out: destination[row * out_stride + segment * run + column..].as_mut_ptr(),
                    out_stride,
                    columns,
                };
                // SAFETY: the block lies inside the operands and the destination, by this function's condition.
                unsafe {
                    match rows {
                        _ if rows == ROWS && columns == VECTORS * LANES => {
                            patch_block::<ROWS, VECTORS, true>(block);
                        }
                        1 => patch_block::<1, VECTORS, false>(block),
                        2 => patch_block::<2, VECTORS, false>(block),
                        3 => patch_block::<3, VECTORS, false>(block),
                        4 => patch_block::<4, VECTORS, false>(block),
                        5 => patch_block::<5, VECTORS, false>(block),
                        6 => patch_block::<6, VECTORS, false>(block),
                        rows => unreachable!("a block of {rows} rows"),
                    }
                }
            }
        }
    }
}

/// Some rows and columns of the destination of [`add_over_patches`].
struct PatchBlock<'a> {
    /// The block's first element in a patch that would start at 0.
    left: *const f32,
    right: *const f32,
    /// Where the patches start.
    starts: (&'a [usize], &'a [usize]),
    out: *mut f32,
    out_stride: usize,
    columns: usize,
}

/// # Safety
/// The machine has the instructions, and `ROWS` rows and the block's columns (all of them where it is `WHOLE`) of every patch lie
/// inside what the pointers point into.
#[target_feature(enable = "avx2,fma")]
unsafe fn patch_block<const ROWS: usize, const VECTORS: usize, const WHOLE: bool>(b: PatchBlock<'_>) {
    let lanes = Lanes::<VECTORS>::of(if WHOLE { None } else { Some(b.columns) });
    let mut sums = [[_mm256_setzero_ps(); VECTORS]; ROWS];
    for (&left, &right) in b.starts.0.iter().zip(b.starts.1) {
        // SAFETY: inside the operands, by this function's condition.
        unsafe {
            let rights = lanes.load(b.right.add(right));
            for (row, sums) in sums.iter_mut().enumerate() {
                let left = _mm256_broadcast_ss(&*b.left.add(left + row));
                for (sum, right) in sums.iter_mut().zip(rights) {
                    *sum = _mm256_fmadd_ps(left, right, *sum);
                }
            }
        }
    }
    for (row, sums) in sums.into_iter().enumerate() {
        // SAFETY: inside the destination, by this function's condition.
        unsafe { lanes.store(b.out.add(row * b.out_stride), sums, Write::Add) };
    }
}

/// All bits of the first `lanes` lanes.
#[target_feature(enable = "avx2")]
fn mask(lanes: usize) -> __m256i {
    const BITS: [i32; 2 * LANES] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: 8 of the 16, as there are at most 8 lanes.
    unsafe { _mm256_loadu_si256(BITS[LANES - lanes..][..LANES].as_ptr().cast()) }
}
