//! The product kernel of machines with AVX-512, for f32 and for pairs of bf16.
//!
//! Why it is fast: a block of 6 x 64 sums stays in registers for the whole depth, so that each operand that is loaded is
//! used four or six times, and both operands are read where they lie, without packing. An f32 and a pair of bf16 are both
//! 32 bits, so one kernel serves both; the two differ in the instruction that multiplies and adds.

use std::arch::x86_64::{
    __m512bh, __m512i, __mmask16, _mm512_add_ps, _mm512_castsi512_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps,
    _mm512_mask_storeu_ps, _mm512_maskz_loadu_epi32, _mm512_maskz_loadu_ps, _mm512_set1_epi32,
    _mm512_setzero_ps, _mm512_setzero_si512,
};

use super::arithmetic::{Left, PANEL_COLUMNS, Patches, Right};
use super::bf16::Bits;
use super::matrix::Write;

/// Sums in a vector.
const LANES: usize = 16;
/// Rows and vectors of a block: 24 of the 32 registers hold sums, 4 the right operand, 1 the left.
const BLOCK_ROWS: usize = 6;
const BLOCK_VECTORS: usize = 4;
const _: () = assert!(BLOCK_VECTORS * LANES == PANEL_COLUMNS);

/// What operands of the kernel are made of: `GROUP` of them are 32 bits.
pub(super) trait Element: Copy + 'static {
    const GROUP: usize;

    /// # Safety
    /// The machine has AVX512F (and BW and BF16 for bf16); `rows` in 1..=6 rows, `vectors` in 1..=4 vectors (the last one's
    /// lanes in `block.last`) and all groups of all segments lie inside what the pointers point into.
    unsafe fn multiply_block(block: Block<Self>, rows: usize, vectors: usize);
}

/// One block: where its operands start, and what of it exists.
#[derive(Clone, Copy)]
pub(super) struct Block<E> {
    /// Where each row of the left operand starts.
    left: [*const E; BLOCK_ROWS],
    left_group_stride: usize,
    /// The left operand's rows are runs of `segment_depth` groups, so far apart.
    segments: usize,
    segment_depth: usize,
    segment_stride: usize,
    right: *const E,
    right_group_stride: usize,
    out: *mut f32,
    out_stride: usize,
    /// Lanes of the last vector that are columns.
    last: __mmask16,
    write: Write,
}

/// `destination = (0 or destination) + left * right`; rows of the destination lie `stride` apart.
///
/// # Safety
/// The machine has the element's instructions.
///
/// # Panics
/// Where an operand reaches outside its slice or depths differ.
pub(super) unsafe fn multiply<E: Element>(
    left: Left<'_, E>,
    right: Right<'_, E>,
    destination: &mut [f32],
    stride: usize,
    write: Write,
) {
    left.assert_fits(E::GROUP);
    right.assert_fits(E::GROUP);
    assert!(left.depth == right.depth && right.column_stride == E::GROUP);
    assert!(right.columns <= stride && (left.rows - 1) * stride + right.columns <= destination.len());
    let out = destination.as_mut_ptr();
    let block = |row: usize, rows: usize| {
        let start = |i: usize| left.data[(row + i.min(rows - 1)) * left.row_stride..].as_ptr();
        Block {
            left: std::array::from_fn(start),
            left_group_stride: left.group_stride,
            segments: 1,
            segment_depth: left.depth,
            segment_stride: 0,
            right: right.data.as_ptr(),
            right_group_stride: right.group_stride,
            out,
            out_stride: stride,
            last: 0,
            write,
        }
    };
    // SAFETY: the asserts above; the instructions are the caller's promise.
    unsafe { over_blocks(left.rows, right, block) };
}

/// `destination = patches * right`, without gaps between the rows of the destination.
///
/// # Safety
/// The machine has the element's instructions.
///
/// # Panics
/// As `multiply`, and where a patch is no whole number of groups.
pub(super) unsafe fn multiply_patches<E: Element>(
    patches: Patches<'_, E>,
    right: Right<'_, E>,
    destination: &mut [f32],
) {
    patches.assert_fits();
    right.assert_fits(E::GROUP);
    assert!(patches.segment_len.is_multiple_of(E::GROUP) && right.column_stride == E::GROUP);
    assert_eq!(right.depth * E::GROUP, patches.columns());
    assert_eq!(destination.len(), patches.starts.len() * right.columns);
    let out = destination.as_mut_ptr();
    let block = |row: usize, rows: usize| {
        let start = |i: usize| patches.data[patches.starts[row + i.min(rows - 1)]..].as_ptr();
        Block {
            left: std::array::from_fn(start),
            left_group_stride: E::GROUP,
            segments: patches.segments,
            segment_depth: patches.segment_len / E::GROUP,
            segment_stride: patches.segment_stride,
            right: right.data.as_ptr(),
            right_group_stride: right.group_stride,
            out,
            out_stride: right.columns,
            last: 0,
            write: Write::Replace,
        }
    };
    // SAFETY: the asserts above; the instructions are the caller's promise.
    unsafe { over_blocks(patches.starts.len(), right, block) };
}

/// Cuts the destination into blocks; `block(row, rows)` gives the operands of the rows from `row` on, and the right operand's
/// first column. A panel of the right operand stays in the cache while all rows pass.
///
/// # Safety
/// As for `Element::multiply_block`, for every block.
unsafe fn over_blocks<E: Element>(
    rows: usize,
    right: Right<'_, E>,
    block: impl Fn(usize, usize) -> Block<E>,
) {
    for (panel, column) in (0..right.columns).step_by(PANEL_COLUMNS).enumerate() {
        let width = (right.columns - column).min(PANEL_COLUMNS);
        for row in (0..rows).step_by(BLOCK_ROWS) {
            let count = (rows - row).min(BLOCK_ROWS);
            let whole = block(row, count);
            let part = Block {
                right: whole.right.wrapping_add(panel * right.panel_stride),
                out: whole.out.wrapping_add(row * whole.out_stride + column),
                last: u16::MAX >> (width.next_multiple_of(LANES) - width),
                ..whole
            };
            // SAFETY: the block lies inside the operands, and lanes beyond its columns are masked out.
            unsafe { E::multiply_block(part, count, width.div_ceil(LANES)) };
        }
    }
}

/// Calls `$block` for the sizes of a block that are found at run time.
macro_rules! by_size {
    ($block:ident, $argument:expr, $rows:expr, $vectors:expr; $($row_count:literal)+) => {
        match ($rows, $vectors) {
            // SAFETY: the caller's.
            $(($row_count, 1) => unsafe { $block::<$row_count, 1>($argument) },
            ($row_count, 2) => unsafe { $block::<$row_count, 2>($argument) },
            ($row_count, 3) => unsafe { $block::<$row_count, 3>($argument) },
            ($row_count, 4) => unsafe { $block::<$row_count, 4>($argument) },)+
            (rows, vectors) => unreachable!("a block of {rows} rows and {vectors} vectors"),
        }
    };
}

/// Implements [`Element`] by the kernel that adds `$product` of 16 groups on the left and on the right onto 16 sums.
macro_rules! element {
    ($element:ty, $group:literal, $features:literal, |$sum:ident, $left:ident, $right:ident| $product:expr) => {
        impl Element for $element {
            const GROUP: usize = $group;

            unsafe fn multiply_block(b: Block<Self>, rows: usize, vectors: usize) {
                /// # Safety
                /// As for `multiply_block`, of `ROWS` rows and `VECTORS` vectors.
                #[target_feature(enable = $features)]
                unsafe fn block<const ROWS: usize, const VECTORS: usize>(b: Block<$element>) {
                    let mask = |vector: usize| if vector + 1 == VECTORS { b.last } else { __mmask16::MAX };
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
                by_size!(block, b, rows, vectors; 1 2 3 4 5 6)
            }
        }
    };
}

element!(f32, 1, "avx512f", |sum, left, right| {
    _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), *sum)
});

element!(Bits, 2, "avx512f,avx512bw,avx512bf16", |sum, left, right| {
    _mm512_dpbf16_ps(*sum, bf16s(left), bf16s(right))
});

#[inline(always)]
fn bf16s(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 plain bits.
    unsafe { std::mem::transmute(bits) }
}
