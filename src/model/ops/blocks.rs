//! Products in blocks of sums that stay in registers: what the kernels of the different instructions have in common.
//!
//! Why it is fast: a block of sums stays in registers for the whole depth, so that each operand that is loaded is used
//! several times, and the left operand is read where it lies, without packing.

use super::arithmetic::{Left, Patches, Right};
use super::matrix::Write;

/// The most rows of a block.
const MOST_ROWS: usize = 6;

/// Instructions that multiply a block.
pub(super) trait Kernel {
    /// What operands are made of.
    type Element: Copy + 'static;
    /// Neighbours in the contraction that are multiplied at once.
    const GROUP: usize;
    /// Rows of a block: at most [`MOST_ROWS`].
    const ROWS: usize;
    /// Columns of a block, and of a panel that is laid out for it.
    const COLUMNS: usize;

    /// # Safety
    /// The machine has the instructions; `rows` in 1..=ROWS rows, `columns` in 1..=COLUMNS columns and all groups of all
    /// segments lie inside what the pointers point into.
    unsafe fn multiply_block(block: Block<Self::Element>, rows: usize, columns: usize);
}

/// One block: where its operands start.
#[derive(Clone, Copy)]
pub(super) struct Block<E> {
    /// Where each row of the left operand starts.
    pub left: [*const E; MOST_ROWS],
    pub left_group_stride: usize,
    /// The left operand's rows are runs of `segment_depth` groups, so far apart.
    pub segments: usize,
    pub segment_depth: usize,
    pub segment_stride: usize,
    pub right: *const E,
    pub right_group_stride: usize,
    pub out: *mut f32,
    pub out_stride: usize,
    pub write: Write,
}

/// `destination = (0 or destination) + left * right`; rows of the destination lie `stride` apart.
///
/// # Safety
/// The machine has the kernel's instructions.
///
/// # Panics
/// Where an operand reaches outside its slice or depths differ.
pub(super) unsafe fn multiply<K: Kernel>(
    left: Left<'_, K::Element>,
    right: Right<'_, K::Element>,
    destination: &mut [f32],
    stride: usize,
    write: Write,
) {
    left.assert_fits(K::GROUP);
    right.assert_fits(K::GROUP);
    assert!(left.depth == right.depth && right.column_stride == K::GROUP);
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
            write,
        }
    };
    // SAFETY: the asserts above; the instructions are the caller's promise.
    unsafe { over_blocks::<K>(left.rows, right, block) };
}

/// `destination = patches * right`, without gaps between the rows of the destination.
///
/// # Safety
/// The machine has the kernel's instructions.
///
/// # Panics
/// As `multiply`, and where a patch is no whole number of groups.
pub(super) unsafe fn multiply_patches<K: Kernel>(
    patches: Patches<'_, K::Element>,
    right: Right<'_, K::Element>,
    destination: &mut [f32],
) {
    patches.assert_fits();
    right.assert_fits(K::GROUP);
    assert!(patches.segment_len.is_multiple_of(K::GROUP) && right.column_stride == K::GROUP);
    assert_eq!(right.depth * K::GROUP, patches.columns());
    assert_eq!(destination.len(), patches.starts.len() * right.columns);
    let out = destination.as_mut_ptr();
    let block = |row: usize, rows: usize| {
        let start = |i: usize| patches.data[patches.starts[row + i.min(rows - 1)]..].as_ptr();
        Block {
            left: std::array::from_fn(start),
            left_group_stride: K::GROUP,
            segments: patches.segments,
            segment_depth: patches.segment_len / K::GROUP,
            segment_stride: patches.segment_stride,
            right: right.data.as_ptr(),
            right_group_stride: right.group_stride,
            out,
            out_stride: right.columns,
            write: Write::Replace,
        }
    };
    // SAFETY: the asserts above; the instructions are the caller's promise.
    unsafe { over_blocks::<K>(patches.starts.len(), right, block) };
}

/// Cuts the destination into blocks; `block(row, rows)` gives the operands of the rows from `row` on, and the right operand's
/// first column. A panel of the right operand stays in the cache while all rows pass.
///
/// # Safety
/// As for `Kernel::multiply_block`, for every block.
unsafe fn over_blocks<K: Kernel>(
    rows: usize,
    right: Right<'_, K::Element>,
    block: impl Fn(usize, usize) -> Block<K::Element>,
) {
    const { assert!(K::ROWS <= MOST_ROWS, "a block has room for its rows") };
    assert!(!right.has_panels() || right.panel_columns.is_multiple_of(K::COLUMNS), "blocks across panels");
    for column in (0..right.columns).step_by(K::COLUMNS) {
        let columns = (right.columns - column).min(K::COLUMNS);
        for row in (0..rows).step_by(K::ROWS) {
            let count = (rows - row).min(K::ROWS);
            let whole = block(row, count);
            let part = Block {
                right: whole.right.wrapping_add(right.start_of(column)),
                out: whole.out.wrapping_add(row * whole.out_stride + column),
                ..whole
            };
            // SAFETY: the block lies inside the operands.
            unsafe { K::multiply_block(part, count, columns) };
        }
    }
}
