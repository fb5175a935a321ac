//! Two-dimensional convolution of channels-last images, by gathering patches into a matrix tile and multiplying.
//!
//! A patch is laid out [kernel row, kernel column, channel], so that one row of it is contiguous in the image; the
//! weight is brought from torch's [out, in, row, column] into that order once a pass.
//! Parts: tiles of output positions forward; whole images for the input's gradient, where patches overlap; fixed
//! groups of tiles for the weight's gradient, whose sums are combined in order.

use std::ops::Range;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::kernel::{Real, View, into_storage, slice, sum_over_parts, tensor_like, with_real};
use super::matrix::{Matrix, Shape as MatrixShape, Write};
use super::{Window, has_kernel};

/// Output positions of one tile: enough rows to amortise the packing of the weight, few enough that the patches
/// (tile x kernel^2 x channels) of a small network stay in the second-level cache.
const TILE_POSITIONS: usize = 256;
/// Partial sums of the weight's gradient: each costs one copy of the weight, and no more threads than this can help.
const WEIGHT_GRADIENT_PARTS: usize = 8;

/// `x` [batch, height, width, channels], `weight` [out_channels, channels, kernel, kernel]
/// -> [batch, out_height, out_width, out_channels]. No bias: a normalisation follows every convolution here.
pub fn conv2d(x: &Tensor, weight: &Tensor, window: Window) -> Result<Tensor> {
    if !has_kernel(x) {
        return reference(x, weight, window);
    }
    let x = x.contiguous()?;
    let op = Conv2d { window, input_tracked: x.track_op() };
    x.apply_op2(&weight.contiguous()?, op)
}

/// Patches by index, then one product. candle's own `conv2d` is no reference: its backward takes the rounding of the
/// height for that of the width too, and fails on images that are not square.
pub(super) fn reference(x: &Tensor, weight: &Tensor, window: Window) -> Result<Tensor> {
    let (batch, height, width, _) = x.dims4()?;
    let (out_height, out_width) = (window.positions(height), window.positions(width));
    let Window { kernel, stride, padding } = window;
    let x = x.pad_with_zeros(1, padding, padding)?.pad_with_zeros(2, padding, padding)?.contiguous()?;
    let shifted = |count: usize, shift: usize| {
        let indices: Vec<u32> = (0..count).map(|position| (position * stride + shift) as u32).collect();
        Tensor::new(indices, x.device())
    };
    let mut patches = Vec::with_capacity(kernel * kernel);
    for row in 0..kernel {
        let rows = x.index_select(&shifted(out_height, row)?, 1)?;
        for column in 0..kernel {
            patches.push(rows.index_select(&shifted(out_width, column)?, 2)?);
        }
    }
    let patches = Tensor::cat(&patches, 3)?.flatten(0, 2)?;
    let weight = weight.permute((0, 2, 3, 1))?.flatten_from(1)?;
    patches.matmul(&weight.t()?)?.reshape((batch, out_height, out_width, ()))
}

struct Conv2d {
    window: Window,
    /// False where the input is data: its gradient is not computed.
    input_tracked: bool,
}

impl CustomOp2 for Conv2d {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let geometry = Geometry::of(l1, l2, self.window)?;
        let storage = with_real!(s1.dtype(), "conv2d", T => {
            Ok(into_storage(geometry.forward::<T>(slice(s1, l1)?, slice(s2, l2)?)))
        })?;
        let Geometry { batch, out_height, out_width, out_channels, .. } = geometry;
        Ok((storage, Shape::from((batch, out_height, out_width, out_channels))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let geometry = Geometry::of(x.layout(), weight.layout(), self.window)?;
        with_real!(x.dtype(), "conv2d", T => {
            let (x_view, w_view, grad) = (View::of(x), View::of(weight), View::of(&grad));
            let grad = grad.slice::<T>()?;
            let dw = geometry.weight_gradient(x_view.slice::<T>()?, grad);
            let dx = match self.input_tracked {
                true => Some(tensor_like(geometry.input_gradient(w_view.slice::<T>()?, grad), x)?),
                false => None,
            };
            Ok((dx, Some(tensor_like(dw, weight)?)))
        })
    }
}

#[derive(Clone, Copy, Debug)]
struct Geometry {
    batch: usize,
    height: usize,
    width: usize,
    channels: usize,
    out_height: usize,
    out_width: usize,
    out_channels: usize,
    window: Window,
}

/// One kernel row of one patch that lies (partly) inside the image.
struct PatchRow {
    /// Where the patch's row stands in the tile.
    tile: Range<usize>,
    /// Where it stands in the image's elements; as long as `tile`.
    image: Range<usize>,
}

impl Geometry {
    fn of(x: &Layout, weight: &Layout, window: Window) -> Result<Self> {
        let (batch, height, width, channels) = x.shape().dims4()?;
        let (out_channels, weight_channels, k_rows, k_columns) = weight.shape().dims4()?;
        let (out_height, out_width) = (window.positions(height), window.positions(width));
        let fits = weight_channels == channels && (k_rows, k_columns) == (window.kernel, window.kernel);
        if !fits || batch * out_height * out_width * channels * out_channels == 0 {
            bail!("conv2d: weight {:?} and {window:?} do not fit input {:?}", weight.shape(), x.shape());
        }
        Ok(Geometry { batch, height, width, channels, out_height, out_width, out_channels, window })
    }

    fn patch_len(&self) -> usize {
        self.window.kernel * self.window.kernel * self.channels
    }

    fn positions(&self) -> usize {
        self.batch * self.out_height * self.out_width
    }

    fn forward<T: Real>(&self, x: &[T], weight: &[T]) -> Vec<T> {
        let (out, patch) = (self.out_channels, self.patch_len());
        let weight = self.patch_order(weight);
        let weight = Matrix::new(&weight, MatrixShape::row_major(out, patch).transposed());
        let mut y = vec![T::ZERO; self.positions() * out];
        y.par_chunks_mut(TILE_POSITIONS * out).enumerate().for_each_init(Vec::new, |tile, (index, y)| {
            let rows = y.len() / out;
            let start = index * TILE_POSITIONS;
            self.gather(x, start..start + rows, tile);
            let patches = Matrix::new(tile, MatrixShape::row_major(rows, patch));
            patches.multiply_into(weight, 1.0, y, MatrixShape::row_major(rows, out), Write::Replace);
        });
        y
    }

    fn weight_gradient<T: Real>(&self, x: &[T], grad: &[T]) -> Vec<T> {
        let (out, patch) = (self.out_channels, self.patch_len());
        let tiles = self.positions().div_ceil(TILE_POSITIONS);
        let part = tiles.div_ceil(WEIGHT_GRADIENT_PARTS) * TILE_POSITIONS;
        let shape = MatrixShape::row_major(out, patch);
        let sums = sum_over_parts(self.positions(), part, out * patch, |part, sums: &mut [T]| {
            let mut tile = Vec::new();
            for start in part.clone().step_by(TILE_POSITIONS) {
                let rows = start..(start + TILE_POSITIONS).min(part.end);
                self.gather(x, rows.clone(), &mut tile);
                let patches = Matrix::new(&tile, MatrixShape::row_major(rows.len(), patch));
                let grad = &grad[rows.start * out..rows.end * out];
                let grad = Matrix::new(grad, MatrixShape::row_major(rows.len(), out).transposed());
                grad.multiply_into(patches, 1.0, sums, shape, Write::Add);
            }
        });
        self.torch_order(&sums)
    }

    fn input_gradient<T: Real>(&self, weight: &[T], grad: &[T]) -> Vec<T> {
        let (out, patch) = (self.out_channels, self.patch_len());
        let weight = self.patch_order(weight);
        let weight = Matrix::new(&weight, MatrixShape::row_major(out, patch));
        let image_positions = self.out_height * self.out_width;
        // Several small images make one tile.
        let images = (TILE_POSITIONS / image_positions).max(1);
        let image_len = self.height * self.width * self.channels;
        let mut dx = vec![T::ZERO; self.batch * image_len];
        dx.par_chunks_mut(images * image_len).enumerate().for_each_init(Vec::new, |tile, (index, dx)| {
            let first = index * images * image_positions;
            let end = first + dx.len() / image_len * image_positions;
            for start in (first..end).step_by(TILE_POSITIONS) {
                let rows = start..(start + TILE_POSITIONS).min(end);
                let grad = &grad[rows.start * out..rows.end * out];
                let grad = Matrix::new(grad, MatrixShape::row_major(rows.len(), out));
                tile.resize(rows.len() * patch, T::ZERO);
                grad.multiply_into(
                    weight,
                    1.0,
                    tile,
                    MatrixShape::row_major(rows.len(), patch),
                    Write::Replace,
                );
                self.scatter_add(tile, rows, index * images * image_len, dx);
            }
        });
        dx
    }

    /// Fills `tile` with the patches at `positions`, zeros where a patch hangs over the edge.
    fn gather<T: Real>(&self, x: &[T], positions: Range<usize>, tile: &mut Vec<T>) {
        tile.clear();
        tile.resize(positions.len() * self.patch_len(), T::ZERO);
        self.visit(positions, |row| tile[row.tile].copy_from_slice(&x[row.image]));
    }

    /// Adds the patches of `tile` onto the images from which they would have been gathered; `dx` starts at element
    /// `offset` of all images.
    fn scatter_add<T: Real>(&self, tile: &[T], positions: Range<usize>, offset: usize, dx: &mut [T]) {
        self.visit(positions, |row| {
            let image = row.image.start - offset..row.image.end - offset;
            for (dx, &share) in dx[image].iter_mut().zip(&tile[row.tile]) {
                *dx += share;
            }
        });
    }

    /// Every kernel row of every patch at `positions`, cut to what lies inside the image.
    fn visit(&self, positions: Range<usize>, mut each: impl FnMut(PatchRow)) {
        let Window { kernel, stride, padding } = self.window;
        let row_len = kernel * self.channels;
        for (index, position) in positions.enumerate() {
            let (image, within) = (
                position / (self.out_height * self.out_width),
                position % (self.out_height * self.out_width),
            );
            // The patch's corner, shifted by the padding so as not to be negative.
            let (top, left) = (within / self.out_width * stride, within % self.out_width * stride);
            let columns = left.max(padding)..(left + kernel).min(self.width + padding);
            if columns.is_empty() {
                continue;
            }
            let skipped = (columns.start - left) * self.channels;
            let len = columns.len() * self.channels;
            for kernel_row in 0..kernel {
                let y = top + kernel_row;
                if y < padding || y >= self.height + padding {
                    continue;
                }
                let tile = index * self.patch_len() + kernel_row * row_len + skipped;
                let source = ((image * self.height + y - padding) * self.width + columns.start - padding)
                    * self.channels;
                each(PatchRow { tile: tile..tile + len, image: source..source + len });
            }
        }
    }

    /// [out, in, row, column] -> [out, row, column, in]
    fn patch_order<T: Real>(&self, weight: &[T]) -> Vec<T> {
        transpose_blocks(weight, self.channels, self.window.kernel * self.window.kernel)
    }

    /// [out, row, column, in] -> [out, in, row, column]
    fn torch_order<T: Real>(&self, weight: &[T]) -> Vec<T> {
        transpose_blocks(weight, self.window.kernel * self.window.kernel, self.channels)
    }
}

/// Transposes each block of `rows` x `columns`.
fn transpose_blocks<T: Real>(data: &[T], rows: usize, columns: usize) -> Vec<T> {
    let mut out = vec![T::ZERO; data.len()];
    let block = rows * columns;
    out.par_chunks_exact_mut(block).zip(data.par_chunks_exact(block)).for_each(|(out, data)| {
        for (column, out) in out.chunks_exact_mut(rows).enumerate() {
            let mut at = column;
            for value in out {
                *value = data[at];
                at += columns;
            }
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradient_check::{assert_gradients, assert_same, random};

    const WINDOWS: [Window; 4] = [
        Window { kernel: 3, stride: 1, padding: 1 },
        Window { kernel: 3, stride: 2, padding: 1 },
        Window { kernel: 1, stride: 2, padding: 0 },
        Window { kernel: 5, stride: 2, padding: 3 },
    ];

    #[test]
    fn gradients_equal_finite_differences() {
        for window in WINDOWS {
            let inputs = [random((2, 4, 5, 2), 1), random((3, 2, window.kernel, window.kernel), 2)];
            assert_gradients(&inputs, |x| conv2d(&x[0], &x[1], window));
            assert_gradients(&inputs, |x| reference(&x[0], &x[1], window));
        }
    }

    #[test]
    fn several_tiles_give_what_the_reference_gives() {
        // 4 x 17 x 18 positions: tiles that end inside an image, and in a part of their own.
        for window in WINDOWS {
            let inputs = [random((4, 17, 18, 3), 1), random((5, 3, window.kernel, window.kernel), 2)];
            assert_same(&inputs, |x| conv2d(&x[0], &x[1], window), |x| reference(&x[0], &x[1], window));
        }
    }

    #[test]
    fn a_weight_for_other_channels_is_refused() {
        assert!(conv2d(&random((1, 4, 4, 2), 1), &random((3, 3, 3, 3), 2), WINDOWS[0]).is_err());
        assert!(
            conv2d(
                &random((1, 1, 1, 3), 1),
                &random((3, 3, 5, 5), 2),
                Window { kernel: 5, stride: 1, padding: 0 }
            )
            .is_err()
        );
    }
}
