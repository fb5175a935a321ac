//! In which arithmetic matrix products are taken, and the operands' layouts.
//!
//! Tensors hold f32 (f64 in gradient checks). [`super::single::Single`] and, for f64, [`Full`] multiply what they hold;
//! [`super::bf16::Bf16`] rounds operands to bf16 first and sums in f32, twice as many a second where the machine has the
//! instructions.
//!
//! A product contracts over an index that advances in groups of [`Arithmetic::GROUP`] neighbours (pairs for bf16).
//! *Rows* are row-major, the contraction along each row: what stands on the left. *Grouped* is `[groups][columns][GROUP]`:
//! what stands on the right, or transposed on the left. What is multiplied often (a weight) is cut into *panels* of
//! [`Arithmetic::panel_columns`] columns, each of them grouped: a kernel then reads it from the first byte to the last.
//!
//! Invariant: products run on the calling thread, and each element is summed in an order that follows from shapes alone.

use serde::{Deserialize, Serialize};

use super::kernel::Real;
use super::matrix::{Matrix, Shape, Write};

/// What products of f32 tensors are computed in. Sums, norms, losses and weights are f32 either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    F32,
    /// Operands are rounded to bf16, sums are f32. Results are as far from f32's as bf16's 8 bits of mantissa bring them.
    Bf16,
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        })
    }
}

/// A matrix `[rows, columns]` inside a slice, rows `stride` elements apart.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, E> {
    pub data: &'a [E],
    pub rows: usize,
    pub columns: usize,
    pub stride: usize,
}

impl<'a, E> Rows<'a, E> {
    pub(super) fn new(data: &'a [E], rows: usize, columns: usize) -> Self {
        Rows { data, rows, columns, stride: columns }
    }
}

/// The left operand `[rows, depth]`: element (i, d) is `data[i * row_stride + d / GROUP * group_stride + d % GROUP]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a, E> {
    pub data: &'a [E],
    pub rows: usize,
    /// In groups.
    pub depth: usize,
    pub row_stride: usize,
    pub group_stride: usize,
}

impl<E> Left<'_, E> {
    /// # Panics
    /// Where it is empty or reaches outside its slice.
    pub(super) fn assert_fits(&self, group: usize) {
        assert!(self.rows * self.depth > 0, "an empty left operand");
        let last = (self.rows - 1) * self.row_stride + (self.depth - 1) * self.group_stride;
        assert!(last + group <= self.data.len(), "a left operand beyond its slice");
    }
}

/// The right operand `[depth, columns]`: element (d, j) is `data[start_of(j) + d / GROUP * group_stride + d % GROUP]`.
#[derive(Clone, Copy)]
pub(super) struct Right<'a, E> {
    pub data: &'a [E],
    /// In groups.
    pub depth: usize,
    pub columns: usize,
    pub group_stride: usize,
    pub column_stride: usize,
    /// Columns of a panel: [`UNCUT`] where they are not cut into panels.
    pub panel_columns: usize,
    pub panel_stride: usize,
}

/// The columns of a panel where there are none.
pub(super) const UNCUT: usize = usize::MAX;

impl<'a, E> Right<'a, E> {
    /// Of groups that lie side by side, without panels; `depth` in groups.
    pub(super) fn side_by_side<A: Arithmetic<Narrow = E>>(
        data: &'a [E],
        depth: usize,
        columns: usize,
    ) -> Self {
        Right {
            data,
            depth,
            columns,
            group_stride: A::GROUP * columns,
            column_stride: A::GROUP,
            panel_columns: UNCUT,
            panel_stride: 0,
        }
    }

    /// Where column `column` starts.
    pub(super) fn start_of(&self, column: usize) -> usize {
        column / self.panel_columns * self.panel_stride + column % self.panel_columns * self.column_stride
    }

    /// # Panics
    /// Where it is empty or reaches outside its slice.
    pub(super) fn assert_fits(&self, group: usize) {
        assert!(self.columns * self.depth > 0, "an empty right operand");
        let cut = self.panel_stride >= self.panel_columns.saturating_mul(self.column_stride);
        assert!(cut || !self.has_panels(), "panels that overlap");
        let last = self.start_of(self.columns - 1) + (self.depth - 1) * self.group_stride;
        assert!(last + group <= self.data.len(), "a right operand beyond its slice");
    }

    pub(super) fn has_panels(&self) -> bool {
        self.columns > self.panel_columns
    }

    /// The same matrix transposed, as a left operand.
    ///
    /// # Panics
    /// Where it is cut into panels.
    pub(super) fn transposed(self) -> Left<'a, E> {
        assert!(!self.has_panels(), "panels have no transpose");
        Left {
            data: self.data,
            rows: self.columns,
            depth: self.depth,
            row_stride: self.column_stride,
            group_stride: self.group_stride,
        }
    }

    /// Columns `start..start + count` of it.
    ///
    /// # Panics
    /// Where it is cut into panels.
    pub(super) fn columns(self, start: usize, count: usize) -> Self {
        assert!(!self.has_panels(), "columns across panels");
        Right { data: &self.data[start * self.column_stride..], columns: count, ..self }
    }

    /// The first `count` columns.
    pub(super) fn first_columns(self, count: usize) -> Self {
        Right { columns: count, ..self }
    }

    /// `count` columns from `start` on, where a panel begins; fewer where there are fewer.
    ///
    /// # Panics
    /// Where `start` lies within a panel.
    pub(super) fn panels(self, start: usize, count: usize) -> Self {
        assert!(start.is_multiple_of(self.panel_columns), "a part of a panel");
        Right { data: &self.data[self.start_of(start)..], columns: (self.columns - start).min(count), ..self }
    }

    /// Groups `start..start + count` of its depth.
    pub(super) fn groups(self, start: usize, count: usize) -> Self {
        Right { data: &self.data[start * self.group_stride..], depth: count, ..self }
    }
}

/// Rows that are gathered from an image: row i is `segments` runs of `segment_len` elements, the first at `starts[i]`, each
/// `segment_stride` after the one before. A convolution's patches: a segment is a row of the kernel.
#[derive(Clone, Copy)]
pub(super) struct Patches<'a, E> {
    pub data: &'a [E],
    pub starts: &'a [usize],
    pub segments: usize,
    /// A multiple of the arithmetic's group.
    pub segment_len: usize,
    pub segment_stride: usize,
}

impl<'a, E> Patches<'a, E> {
    /// # Panics
    /// Where there is none, or one reaches outside the slice.
    pub(super) fn assert_fits(&self) {
        assert!(self.columns() > 0 && !self.starts.is_empty(), "no patches");
        let reach = (self.segments - 1) * self.segment_stride + self.segment_len;
        let fits = |start: &usize| start + reach <= self.data.len();
        assert!(self.starts.iter().all(fits), "a patch beyond its image");
    }

    /// Elements of one row.
    pub(super) fn columns(&self) -> usize {
        self.segments * self.segment_len
    }

    /// The runs of row `row`, in order.
    #[inline(always)]
    pub(super) fn runs(&self, row: usize) -> impl Iterator<Item = &'a [E]> + use<'a, E> {
        let Patches { data, starts, segments, segment_len, segment_stride } = *self;
        (0..segments).map(move |segment| &data[starts[row] + segment * segment_stride..][..segment_len])
    }
}

/// See the module's text. A value of it says that the machine can.
pub(super) trait Arithmetic: Copy + Send + Sync + 'static {
    /// What tensors hold and products are summed in.
    type Wide: Real;
    /// What operands are made of.
    type Narrow: Copy + Default + Send + Sync + 'static;
    /// Neighbours in the contraction that lie side by side.
    const GROUP: usize;
    /// Rows of the left operand below which a product is slow because it first copies the right one.
    const FEWEST_ROWS: usize;

    /// Into panels of how many columns so many are cut: what this machine's kernel keeps sums of in registers.
    fn panel_columns(_columns: usize) -> usize {
        64
    }

    fn to_narrow(wide: Self::Wide) -> Self::Narrow;
    fn to_wide(narrow: Self::Narrow) -> Self::Wide;

    /// The elements as operands hold them. May write into `scratch`.
    fn narrow<'a>(wide: &'a [Self::Wide], scratch: &'a mut Vec<Self::Narrow>) -> &'a [Self::Narrow];

    /// `rows` as a left operand; its width must be a multiple of `GROUP`.
    fn left(rows: Rows<'_, Self::Narrow>) -> Left<'_, Self::Narrow> {
        assert_eq!(rows.columns % Self::GROUP, 0, "rows of whole groups");
        Left {
            data: rows.data,
            rows: rows.rows,
            depth: rows.columns / Self::GROUP,
            row_stride: rows.stride,
            group_stride: Self::GROUP,
        }
    }

    /// `rows` as a right operand that is contracted over the rows. May write into `scratch`.
    fn group_rows<'a>(
        rows: Rows<'a, Self::Narrow>,
        scratch: &'a mut Vec<Self::Narrow>,
    ) -> Right<'a, Self::Narrow>;

    /// `rows` transposed as a right operand: contracted over the columns, whose number must be a multiple of `GROUP`.
    fn group_columns<'a>(
        rows: Rows<'a, Self::Narrow>,
        scratch: &'a mut Vec<Self::Narrow>,
    ) -> Right<'a, Self::Narrow>;

    /// `patches` as a right operand that is contracted over the patches.
    fn group_patches<'a>(
        patches: Patches<'_, Self::Narrow>,
        scratch: &'a mut Vec<Self::Narrow>,
    ) -> Right<'a, Self::Narrow>;

    /// The same of a weight, which is then multiplied by many rows: in panels where this machine's kernel wants them.
    fn group_weight<'a>(
        weight: Patches<'_, Self::Narrow>,
        scratch: &'a mut Vec<Self::Narrow>,
    ) -> Right<'a, Self::Narrow> {
        Self::group_patches(weight, scratch)
    }

    /// `destination = patches * right`, without gaps between the rows of the destination. May write into `scratch`.
    fn multiply_patches(
        self,
        patches: Patches<'_, Self::Narrow>,
        right: Right<'_, Self::Narrow>,
        destination: &mut [Self::Wide],
        scratch: &mut Vec<Self::Narrow>,
    );

    /// `destination += transposed left * right`, contracted over the patches, of which there are as many on both sides: without gaps
    /// between the rows of the destination. May write into `scratch`.
    fn add_over_patches(
        self,
        left: Patches<'_, Self::Narrow>,
        right: Patches<'_, Self::Narrow>,
        destination: &mut [Self::Wide],
        scratch: &mut [Vec<Self::Narrow>; 2],
    ) {
        add_over_copies(self, left, right, destination, scratch);
    }

    /// `destination = (0 or destination) + left * right`; rows of the destination lie `stride` apart.
    ///
    /// # Panics
    /// Where an operand reaches outside its slice or depths differ: a bug in the calling kernel.
    fn multiply(
        self,
        left: Left<'_, Self::Narrow>,
        right: Right<'_, Self::Narrow>,
        destination: &mut [Self::Wide],
        stride: usize,
        write: Write,
    );
}

/// Products of what the tensors hold, by the `gemm` crate: for f64, and f32 where there are no kernels of our own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Full<T>(std::marker::PhantomData<T>);

impl<T> Full<T> {
    pub(super) fn new() -> Self {
        Full(std::marker::PhantomData)
    }
}

impl<T: Real> Arithmetic for Full<T> {
    type Wide = T;
    type Narrow = T;
    const GROUP: usize = 1;
    const FEWEST_ROWS: usize = 128;

    #[inline(always)]
    fn to_narrow(wide: T) -> T {
        wide
    }

    #[inline(always)]
    fn to_wide(narrow: T) -> T {
        narrow
    }

    fn narrow<'a>(wide: &'a [T], _: &'a mut Vec<T>) -> &'a [T] {
        wide
    }

    fn group_rows<'a>(rows: Rows<'a, T>, _: &'a mut Vec<T>) -> Right<'a, T> {
        let Rows { data, rows, columns, stride } = rows;
        Right {
            data,
            depth: rows,
            columns,
            group_stride: stride,
            column_stride: 1,
            panel_columns: UNCUT,
            panel_stride: 0,
        }
    }

    fn group_columns<'a>(rows: Rows<'a, T>, _: &'a mut Vec<T>) -> Right<'a, T> {
        let Rows { data, rows, columns, stride } = rows;
        Right {
            data,
            depth: columns,
            columns: rows,
            group_stride: 1,
            column_stride: stride,
            panel_columns: UNCUT,
            panel_stride: 0,
        }
    }

    fn group_patches<'a>(patches: Patches<'_, T>, scratch: &'a mut Vec<T>) -> Right<'a, T> {
        gather(patches, scratch);
        Right::side_by_side::<Self>(scratch, patches.starts.len(), patches.columns())
    }

    fn multiply_patches(
        self,
        patches: Patches<'_, T>,
        right: Right<'_, T>,
        destination: &mut [T],
        scratch: &mut Vec<T>,
    ) {
        gather(patches, scratch);
        let left = Self::left(Rows::new(scratch, patches.starts.len(), patches.columns()));
        self.multiply(left, right, destination, right.columns, Write::Replace);
    }

    fn multiply(
        self,
        left: Left<'_, T>,
        right: Right<'_, T>,
        destination: &mut [T],
        stride: usize,
        write: Write,
    ) {
        let shape =
            |rows, columns, row_stride, column_stride| Shape { rows, columns, row_stride, column_stride };
        let l = Matrix::new(left.data, shape(left.rows, left.depth, left.row_stride, left.group_stride));
        for column in (0..right.columns).step_by(right.panel_columns) {
            let columns = (right.columns - column).min(right.panel_columns);
            let r = shape(right.depth, columns, right.group_stride, right.column_stride);
            let r = Matrix::new(&right.data[right.start_of(column)..], r);
            let target = Shape::with_row_stride(left.rows, columns, stride);
            l.multiply_into(r, &mut destination[column..], target, write);
        }
    }
}

/// [`Arithmetic::add_over_patches`], with both sides' patches gathered first.
pub(super) fn add_over_copies<A: Arithmetic>(
    arithmetic: A,
    left: Patches<'_, A::Narrow>,
    right: Patches<'_, A::Narrow>,
    destination: &mut [A::Wide],
    [first, second]: &mut [Vec<A::Narrow>; 2],
) {
    left.assert_fits();
    right.assert_fits();
    let left = A::group_patches(left, first).transposed();
    let right = A::group_patches(right, second);
    arithmetic.multiply(left, right, destination, right.columns, Write::Add);
}

/// Writes the patches one after the other.
pub(super) fn gather<E: Copy + Default>(patches: Patches<'_, E>, out: &mut Vec<E>) {
    out.resize(patches.starts.len() * patches.columns(), E::default());
    for (row, out) in out.chunks_exact_mut(patches.columns()).enumerate() {
        for (out, run) in out.chunks_exact_mut(patches.segment_len).zip(patches.runs(row)) {
            out.copy_from_slice(run);
        }
    }
}
