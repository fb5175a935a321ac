//! The product kernels of machines with AVX-512, for f32 and for pairs of bf16.
//!
//! A block of 6 x 64 sums: each element of the operands that is loaded is used four or six times. An f32 and a pair of bf16
//! are both 32 bits, so one kernel serves both; the two differ in the instruction that multiplies and adds.

use std::arch::x86_64::{
    __m512bh, __m512i, __mmask16, _mm512_add_ps, _mm512_castsi512_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps,
    _mm512_mask_storeu_ps, _mm512_maskz_loadu_epi32, _mm512_maskz_loadu_ps, _mm512_set1_epi32,
    _mm512_setzero_ps, _mm512_setzero_si512,
};

use super::bf16::Bits;
use super::blocks::{Block, Kernel};
use super::matrix::Write;

/// Sums in a vector.
const LANES: usize = 16;
/// Vectors of a block's row: with 6 rows, 24 of the 32 registers hold sums, 4 the right operand, 1 the left.
const BLOCK_VECTORS: usize = 4;

/// Calls `$block` for the sizes of a block that are found at run time.
macro_rules! by_size {
    ($block:ident, $arguments:expr, $rows:expr, $vectors:expr; $($row_count:literal)+) => {
        match ($rows, $vectors) {
            // SAFETY: the caller's.
            $(($row_count, 1) => unsafe { $block::<$row_count, 1>($arguments) },
            ($row_count, 2) => unsafe { $block::<$row_count, 2>($arguments) },
            ($row_count, 3) => unsafe { $block::<$row_count, 3>($arguments) },
            ($row_count, 4) => unsafe { $block::<$row_count, 4>($arguments) },)+
            (rows, vectors) => unreachable!("a block of {rows} rows and {vectors} vectors"),
        }
    };
}

/// Implements a [`Kernel`] that adds `$product` of 16 groups on the left and on the right onto 16 sums.
macro_rules! kernel {
    ($kernel:ident, $element:ty, $group:literal, $features:literal, |$sum:ident, $left:ident, $right:ident| $product:expr) => {
        impl Kernel for $kernel {
            type Element = $element;
            const GROUP: usize = $group;
            const ROWS: usize = 6;
            const COLUMNS: usize = BLOCK_VECTORS * LANES;

            unsafe fn multiply_block(b: Block<$element>, rows: usize, columns: usize) {
                let vectors = columns.div_ceil(LANES);
                let last = u16::MAX >> (vectors * LANES - columns);
                /// # Safety
                /// As for `multiply_block`, of `ROWS` rows and `VECTORS` vectors; `last` are the last vector's lanes that are columns.
                #[target_feature(enable = $features)]
                unsafe fn block<const ROWS: usize, const VECTORS: usize>((b, last): (Block<$element>, __mmask16)) {
                    let mask = |vector: usize| if vector + 1 == VECTORS { last } else { __mmask16::MAX };
                    let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
                    let mut right = b.right;
                    for segment in 0..b.segments {
                        let mut at = segment * b.segment_stride;
                        for _ in 0..b.segment_depth {
                            let mut rights = [_mm512_setzero_si512(); VECTORS];
                            for (vector, groups) in rights.iter_mut().enumerate() {
                                // SAFETY: inside the right operand, by this function's condition.
                                *groups = unsafe {
                                    let at = right.add($group * LANES * vector);
                                    _mm512_maskz_loadu_epi32(mask(vector), at.cast())
                                };
                            }
                            for (sums, left) in sums.iter_mut().zip(b.left) {
                                // SAFETY: a group inside the left operand, by this function's condition.
                                let group = unsafe { left.add(at).cast::<i32>().read_unaligned() };
                                let $left = _mm512_set1_epi32(group);
                                for ($sum, $right) in sums.iter_mut().zip(rights) {
                                    *$sum = $product;
                                }
                            }
                            at += b.left_group_stride;
                            // Past the end after the last group, where it is not read any more.
                            right = right.wrapping_add(b.right_group_stride);
                        }
                    }
                    for (row, sums) in sums.into_iter().enumerate() {
                        for (vector, sum) in sums.into_iter().enumerate() {
                            // SAFETY: inside the destination, by this function's condition.
                            unsafe {
                                let out = b.out.add(row * b.out_stride + vector * LANES);
                                let sum = match b.write {
                                    Write::Replace => sum,
                                    Write::Add => {
                                        _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask(vector), out))
                                    }
                                };
                                _mm512_mask_storeu_ps(out, mask(vector), sum);
                            }
                        }
                    }
                }
                by_size!(block, (b, last), rows, vectors; 1 2 3 4 5 6)
            }
        }
    };
}

/// Products of f32.
pub(super) struct Singles;

kernel!(Singles, f32, 1, "avx512f", |sum, left, right| {
    _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), *sum)
});

/// Products of bf16, in pairs.
pub(super) struct Pairs;

kernel!(Pairs, Bits, 2, "avx512f,avx512bw,avx512bf16", |sum, left, right| {
    _mm512_dpbf16_ps(*sum, bf16s(left), bf16s(right))
});

#[inline(always)]
fn bf16s(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 plain bits.
    unsafe { std::mem::transmute(bits) }
}
