//! Products of strided matrices on one thread, by the `gemm` crate.
//!
//! Invariant: a `Matrix` never reaches outside its slice: its constructor checks the last element. Splitting work over
//! threads is the caller's, who cuts it into fixed parts.

use super::kernel::Real;

/// Element (i, j) is `data[i * row_stride + j * column_stride]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub rows: usize,
    pub columns: usize,
    pub row_stride: usize,
    pub column_stride: usize,
}

impl Shape {
    /// Rows of `columns` contiguous elements each.
    pub(super) fn row_major(rows: usize, columns: usize) -> Self {
        Shape::with_row_stride(rows, columns, columns)
    }

    /// Rows of `columns` contiguous elements, `row_stride` apart.
    pub(super) fn with_row_stride(rows: usize, columns: usize, row_stride: usize) -> Self {
        Shape { rows, columns, row_stride, column_stride: 1 }
    }

    pub(super) fn transposed(self) -> Self {
        Shape {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }

    fn assert_fits(&self, len: usize) {
        let last = self.rows.saturating_sub(1) * self.row_stride
            + self.columns.saturating_sub(1) * self.column_stride;
        assert!(
            self.rows > 0 && self.columns > 0 && last < len,
            "matrix {self:?} in a slice of {len} elements"
        );
    }
}

/// What the product does with the old content of its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Write {
    Replace,
    Add,
}

/// A matrix to read.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, T> {
    data: &'a [T],
    shape: Shape,
}

impl<'a, T: Real> Matrix<'a, T> {
    /// # Panics
    /// When the shape is empty or does not fit the slice: a bug in the calling kernel.
    pub(super) fn new(data: &'a [T], shape: Shape) -> Self {
        shape.assert_fits(data.len());
        Matrix { data, shape }
    }

    /// `destination = (0 or destination) + self * rhs`
    ///
    /// # Panics
    /// When the shapes do not fit each other or `destination`.
    pub(super) fn multiply_into(
        &self,
        rhs: Matrix<'_, T>,
        destination: &mut [T],
        shape: Shape,
        write: Write,
    ) {
        shape.assert_fits(destination.len());
        let (m, n, k) = (shape.rows, shape.columns, self.shape.columns);
        assert_eq!((self.shape.rows, rhs.shape.rows, rhs.shape.columns), (m, k, n), "shapes of a product");
        // SAFETY: `assert_fits` has checked every operand's last element against its slice, strides are not negative,
        // and `destination` is borrowed mutably, so it overlaps neither operand.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                destination.as_mut_ptr(),
                shape.column_stride as isize,
                shape.row_stride as isize,
                write == Write::Add,
                self.data.as_ptr(),
                self.shape.column_stride as isize,
                self.shape.row_stride as isize,
                rhs.data.as_ptr(),
                rhs.shape.column_stride as isize,
                rhs.shape.row_stride as isize,
                T::narrow(1.0),
                T::narrow(1.0),
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_product_adds_onto_the_destination() {
        // a = [[1, 2], [3, 4]] inside rows of 3; b read transposed: [[5, 7], [6, 8]].
        let a = [1.0, 2.0, 99.0, 3.0, 4.0];
        let b = [5.0, 6.0, 7.0, 8.0];
        let mut c = [1.0; 4];
        let lhs = Matrix::new(&a, Shape::with_row_stride(2, 2, 3));
        let rhs = Matrix::new(&b, Shape::row_major(2, 2).transposed());
        lhs.multiply_into(rhs, &mut c, Shape::row_major(2, 2), Write::Add);
        assert_eq!(c, [1.0 + 17.0, 1.0 + 23.0, 1.0 + 39.0, 1.0 + 53.0]);
        lhs.multiply_into(rhs, &mut c, Shape::row_major(2, 2), Write::Replace);
        assert_eq!(c, [17.0, 23.0, 39.0, 53.0]);
    }

    #[test]
    #[should_panic(expected = "in a slice of 5 elements")]
    fn a_matrix_beyond_its_slice_is_refused() {
        Matrix::new(&[0f32; 5], Shape::row_major(2, 3));
    }
}
