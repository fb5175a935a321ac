//! Two-dimensional convolution of channels-last images, as a product of their patches with the weight.
//!
//! Images are first copied with their padding, in the products' own type. A patch is then a few contiguous runs, one a
//! row of the kernel, which the bf16 product reads where they lie (others gather a tile of patches first); the weight is
//! brought from torch's [out, in, row, column] into that order once a pass. At stride 1 the input's gradient is itself a
//! convolution, of the result's gradient with the kernel turned round.
//!
//! Parts: tiles of output positions forward; whole images for the input's gradient at larger strides, where patches
//! overlap; fixed groups of tiles for the weight's gradient, whose sums are combined in order, or blocks of output
//! channels where there are few tiles.

use std::ops::Range;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::arithmetic::{Arithmetic, Full, Patches, Precision, Right, Rows, narrow_rows};
use super::bf16::Bf16;
use super::kernel::{Real, View, into_storage, slice, sum_in_order, tensor_like};
use super::matrix::Write;
use super::single::Single;
use super::vector::widest;
use super::{Window, has_kernel};

/// Output positions of one tile: enough rows to read the weight from the second-level cache seldom, few enough that a
/// tile's gathered patches stay there.
const TILE_POSITIONS: usize = 252;
/// Tiles are smaller where there would be fewer of them than this, so that threads find work.
const FEWEST_TILES: usize = 8;
/// Partial sums of the weight's gradient: each costs one copy of the weight, and no more threads than this can help.
const WEIGHT_GRADIENT_PARTS: usize = 8;

/// `x` [batch, height, width, channels], `weight` [out_channels, channels, kernel, kernel]
/// -> [batch, out_height, out_width, out_channels]. No bias: a normalisation follows every convolution here.
pub fn conv2d(x: &Tensor, weight: &Tensor, window: Window, precision: Precision) -> Result<Tensor> {
    if !has_kernel(x) {
        return reference(x, weight, window);
    }
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let input_tracked = x.track_op();
    match (x.dtype(), precision) {
        (DType::F64, _) => {
            x.apply_op2(&weight, Conv2d { window, input_tracked, arithmetic: Full::<f64>::new() })
        }
        (_, Precision::F32) => {
            x.apply_op2(&weight, Conv2d { window, input_tracked, arithmetic: Single::new() })
        }
        (_, Precision::Bf16) => {
            x.apply_op2(&weight, Conv2d { window, input_tracked, arithmetic: Bf16::new() })
        }
    }
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

struct Conv2d<A> {
    window: Window,
    /// False where the input is data: its gradient is not computed.
    input_tracked: bool,
    arithmetic: A,
}

impl<A: Arithmetic> CustomOp2 for Conv2d<A> {
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
        if s1.dtype() != s2.dtype() {
            bail!("conv2d: input of {:?}, weight of {:?}", s1.dtype(), s2.dtype());
        }
        let geometry = Geometry::of(l1, l2, self.window)?;
        let weight = KernelOrder::of(&geometry, slice::<A::Wide>(s2, l2)?);
        let y = geometry.forward(self.arithmetic, slice(s1, l1)?, &weight);
        let Geometry { batch, out_height, out_width, out_channels, .. } = geometry;
        Ok((into_storage(y), Shape::from((batch, out_height, out_width, out_channels))))
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
        let (x_view, w_view, grad) = (View::of(x), View::of(weight), View::of(&grad));
        let grad = grad.slice::<A::Wide>()?;
        let dw = geometry.weight_gradient(self.arithmetic, x_view.slice()?, grad);
        let dx = match self.input_tracked {
            true => {
                let dx = geometry.input_gradient(self.arithmetic, w_view.slice()?, grad);
                Some(tensor_like(dx, x)?)
            }
            false => None,
        };
        Ok((dx, Some(tensor_like(dw, weight)?)))
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub batch: usize,
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    pub out_height: usize,
    pub out_width: usize,
    pub out_channels: usize,
    pub window: Window,
}

/// One kernel row of one patch that lies (partly) inside the image.
struct PatchRow {
    /// Where the patch's row stands in the tile.
    tile: Range<usize>,
    /// Where it stands in the image's elements; as long as `tile`.
    image: Range<usize>,
}

/// A weight as [out, kernel row, kernel column, padded channel].
struct KernelOrder<T>(Vec<T>);

impl<T: Real> KernelOrder<T> {
    fn of(geometry: &Geometry, weight: &[T]) -> Self {
        let (window, channels) = (geometry.window.kernel, geometry.channels);
        Self::filled(geometry, geometry.out_channels, channels, |out, row, column, channel| {
            weight[((out * channels + channel) * window + row) * window + column]
        })
    }

    /// For the input's gradient: inputs and outputs change places, and the kernel is turned by half a circle.
    fn turned(geometry: &Geometry, weight: &[T]) -> Self {
        let (window, channels) = (geometry.window.kernel, geometry.channels);
        Self::filled(geometry, channels, geometry.out_channels, |channel, row, column, out| {
            let (row, column) = (window - 1 - row, window - 1 - column);
            weight[((out * channels + channel) * window + row) * window + column]
        })
    }

    fn filled(
        geometry: &Geometry,
        outer: usize,
        inner: usize,
        at: impl Fn(usize, usize, usize, usize) -> T + Sync,
    ) -> Self {
        let kernel = geometry.window.kernel;
        let channels = padded_channels(kernel, inner);
        let mut data = vec![T::ZERO; outer * kernel * kernel * channels];
        data.par_chunks_exact_mut(kernel * kernel * channels).enumerate().for_each(|(out, data)| {
            for (position, data) in data.chunks_exact_mut(channels).enumerate() {
                let (row, column) = (position / kernel, position % kernel);
                data.iter_mut()
                    .take(inner)
                    .enumerate()
                    .for_each(|(channel, value)| *value = at(out, row, column, channel));
            }
        });
        KernelOrder(data)
    }
}

/// Channels of padded images: as many as there are, or one more, so that `kernel` pixels are a whole number of pairs.
pub(super) fn padded_channels(kernel: usize, channels: usize) -> usize {
    channels + kernel * channels % 2
}

/// Images with their padding, [batch, height, width, channels], in an arithmetic's own type.
pub(super) struct Padded<E> {
    data: Vec<E>,
    height: usize,
    width: usize,
    channels: usize,
}

impl<E: Copy + Default + Send + Sync> Padded<E> {
    pub(super) fn of<A: Arithmetic<Narrow = E>>(geometry: &Geometry, images: &[A::Wide]) -> Self {
        let Geometry { batch, height, width, channels, window: Window { kernel, padding, .. }, .. } =
            *geometry;
        let padded = padded_channels(kernel, channels);
        let (full_height, full_width) = (height + 2 * padding, width + 2 * padding);
        let image_len = full_height * full_width * padded;
        let mut data = vec![E::default(); batch * image_len];
        let images = images.par_chunks_exact(height * width * channels);
        data.par_chunks_exact_mut(image_len).zip(images).for_each(|(out, image)| {
            for (y, row) in image.chunks_exact(width * channels).enumerate() {
                let start = ((y + padding) * full_width + padding) * padded;
                let out = &mut out[start..start + width * padded];
                if padded == channels {
                    widest!(out.iter_mut().zip(row).for_each(|(out, &value)| *out = A::to_narrow(value)));
                } else {
                    for (out, pixel) in out.chunks_exact_mut(padded).zip(row.chunks_exact(channels)) {
                        out.iter_mut().zip(pixel).for_each(|(out, &value)| *out = A::to_narrow(value));
                    }
                }
            }
        });
        Padded { data, height: full_height, width: full_width, channels: padded }
    }

    /// The patches of `positions`; `starts` is where they begin.
    pub(super) fn patches<'a>(
        &'a self,
        geometry: &Geometry,
        positions: Range<usize>,
        starts: &'a mut Vec<usize>,
    ) -> Patches<'a, E> {
        let Geometry { out_height, out_width, window, .. } = *geometry;
        starts.clear();
        starts.extend(positions.map(|position| {
            let (image, within) = (position / (out_height * out_width), position % (out_height * out_width));
            let (y, x) = (within / out_width * window.stride, within % out_width * window.stride);
            ((image * self.height + y) * self.width + x) * self.channels
        }));
        Patches {
            data: &self.data,
            starts,
            segments: window.kernel,
            segment_len: window.kernel * self.channels,
            segment_stride: self.width * self.channels,
        }
    }
}

impl Geometry {
    pub(super) fn of(x: &Layout, weight: &Layout, window: Window) -> Result<Self> {
        let (batch, height, width, channels) = x.shape().dims4()?;
        let (out_channels, weight_channels, k_rows, k_columns) = weight.shape().dims4()?;
        let (out_height, out_width) = (window.positions(height), window.positions(width));
        let fits = weight_channels == channels && (k_rows, k_columns) == (window.kernel, window.kernel);
        if !fits || batch * out_height * out_width * channels * out_channels == 0 {
            bail!("conv2d: weight {:?} and {window:?} do not fit input {:?}", weight.shape(), x.shape());
        }
        Ok(Geometry { batch, height, width, channels, out_height, out_width, out_channels, window })
    }

    /// The convolution by which the result's gradient becomes the input's; `None` where it is not one.
    fn turned(&self) -> Option<Self> {
        let Geometry { height, width, channels, out_height, out_width, out_channels, window, .. } = *self;
        let padding = (window.kernel - 1).checked_sub(window.padding)?;
        (window.stride == 1).then_some(Geometry {
            height: out_height,
            width: out_width,
            channels: out_channels,
            out_height: height,
            out_width: width,
            out_channels: channels,
            window: Window { padding, ..window },
            ..*self
        })
    }

    /// Without what pads channels.
    fn patch_len(&self) -> usize {
        self.window.kernel * self.window.kernel * self.channels
    }

    pub(super) fn positions(&self) -> usize {
        self.batch * self.out_height * self.out_width
    }

    pub(super) fn positions_per_tile<A: Arithmetic>(&self) -> usize {
        self.positions().div_ceil(FEWEST_TILES).clamp(A::FEWEST_ROWS, TILE_POSITIONS)
    }

    fn forward<A: Arithmetic>(
        &self,
        arithmetic: A,
        x: &[A::Wide],
        weight: &KernelOrder<A::Wide>,
    ) -> Vec<A::Wide> {
        let out = self.out_channels;
        let padded = Padded::of::<A>(self, x);
        let (mut narrow, mut grouped) = (Vec::new(), Vec::new());
        let narrow = A::narrow(&weight.0, &mut narrow);
        let weight = A::group_columns(Rows::new(narrow, out, narrow.len() / out), &mut grouped);
        let tile = self.positions_per_tile::<A>();
        let mut y = vec![A::Wide::ZERO; self.positions() * out];
        let room = || (Vec::new(), Vec::new());
        y.par_chunks_mut(tile * out).enumerate().for_each_init(room, |(starts, scratch), (index, y)| {
            let positions = index * tile..index * tile + y.len() / out;
            arithmetic.multiply_patches(padded.patches(self, positions, starts), weight, y, scratch);
        });
        y
    }

    fn weight_gradient<A: Arithmetic>(&self, arithmetic: A, x: &[A::Wide], grad: &[A::Wide]) -> Vec<A::Wide> {
        let (out, kernel) = (self.out_channels, self.window.kernel);
        let padded = Padded::of::<A>(self, x);
        let patch = kernel * kernel * padded.channels;
        let tiles = self.positions().div_ceil(TILE_POSITIONS);
        let sums = if tiles < WEIGHT_GRADIENT_PARTS {
            self.weight_gradient_by_channels(arithmetic, &padded, grad)
        } else {
            let part = tiles.div_ceil(WEIGHT_GRADIENT_PARTS) * TILE_POSITIONS;
            let parts = (0..self.positions().div_ceil(part)).into_par_iter().map(|index| {
                let positions = index * part..((index + 1) * part).min(self.positions());
                let mut sums = vec![A::Wide::ZERO; out * patch];
                self.add_weight_gradient(arithmetic, &padded, grad, positions, &mut sums);
                sums
            });
            sum_in_order(parts.collect())
        };
        let mut dw = vec![A::Wide::ZERO; out * self.patch_len()];
        let rows = dw.par_chunks_exact_mut(self.patch_len()).zip(sums.par_chunks_exact(patch));
        rows.for_each(|(dw, sums)| {
            for (channel, dw) in dw.chunks_exact_mut(kernel * kernel).enumerate() {
                dw.iter_mut()
                    .zip(sums.chunks_exact(padded.channels))
                    .for_each(|(dw, sums)| *dw = sums[channel]);
            }
        });
        dw
    }

    /// Adds the shares of `positions` onto `sums` [out, kernel row, kernel column, padded channel].
    fn add_weight_gradient<A: Arithmetic>(
        &self,
        arithmetic: A,
        padded: &Padded<A::Narrow>,
        grad: &[A::Wide],
        positions: Range<usize>,
        sums: &mut [A::Wide],
    ) {
        let out = self.out_channels;
        let [mut narrow, mut left, mut right] = [const { Vec::new() }; 3];
        let mut starts = Vec::new();
        for start in positions.clone().step_by(TILE_POSITIONS) {
            let tile = start..(start + TILE_POSITIONS).min(positions.end);
            let grad = A::narrow(&grad[tile.start * out..tile.end * out], &mut narrow);
            let left = A::group_rows(Rows::new(grad, tile.len(), out), &mut left).transposed();
            let right = A::group_patches(padded.patches(self, tile, &mut starts), &mut right);
            arithmetic.multiply(left, right, sums, sums.len() / out, Write::Add);
        }
    }

    /// The same where few positions meet many channels: each thread sums all positions for some output channels.
    fn weight_gradient_by_channels<A: Arithmetic>(
        &self,
        arithmetic: A,
        padded: &Padded<A::Narrow>,
        grad: &[A::Wide],
    ) -> Vec<A::Wide> {
        let out = self.out_channels;
        let [mut narrow, mut left, mut right] = [const { Vec::new() }; 3];
        let mut starts = Vec::new();
        let grad = A::narrow(grad, &mut narrow);
        let left: Right<'_, A::Narrow> = A::group_rows(Rows::new(grad, self.positions(), out), &mut left);
        let right = A::group_patches(padded.patches(self, 0..self.positions(), &mut starts), &mut right);
        let mut sums = vec![A::Wide::ZERO; out * right.columns];
        let block = out.div_ceil(WEIGHT_GRADIENT_PARTS);
        sums.par_chunks_mut(block * right.columns).enumerate().for_each(|(index, sums)| {
            let left = left.columns(index * block, sums.len() / right.columns).transposed();
            arithmetic.multiply(left, right, sums, right.columns, Write::Replace);
        });
        sums
    }

    fn input_gradient<A: Arithmetic>(
        &self,
        arithmetic: A,
        weight: &[A::Wide],
        grad: &[A::Wide],
    ) -> Vec<A::Wide> {
        if let Some(turned) = self.turned() {
            return turned.forward(arithmetic, grad, &KernelOrder::turned(self, weight));
        }
        let (out, patch) = (self.out_channels, self.patch_len());
        let weight = transpose_blocks(weight, self.channels, self.window.kernel * self.window.kernel);
        let (mut narrow, mut grouped) = (Vec::new(), Vec::new());
        let narrow = A::narrow(&weight, &mut narrow);
        let weight = A::group_rows(Rows::new(narrow, out, patch), &mut grouped);
        let image_positions = self.out_height * self.out_width;
        // Several small images make one tile.
        let images = (TILE_POSITIONS / image_positions).clamp(1, self.batch.div_ceil(FEWEST_TILES));
        let image_len = self.height * self.width * self.channels;
        let mut dx = vec![A::Wide::ZERO; self.batch * image_len];
        let room = || (Vec::new(), Vec::new());
        dx.par_chunks_mut(images * image_len).enumerate().for_each_init(
            room,
            |(tile, operand), (index, dx)| {
                let first = index * images * image_positions;
                let end = first + dx.len() / image_len * image_positions;
                for start in (first..end).step_by(TILE_POSITIONS) {
                    let rows = start..(start + TILE_POSITIONS).min(end);
                    let grad = narrow_rows::<A>(&grad[rows.start * out..rows.end * out], out, operand);
                    tile.resize(rows.len() * patch, A::Wide::ZERO);
                    arithmetic.multiply(A::left(grad), weight, tile, patch, Write::Replace);
                    self.scatter_add(tile, rows, index * images * image_len, dx);
                }
            },
        );
        dx
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
    use crate::model::ops::gradient_check::{
        assert_gradients, assert_near, assert_same, random, weighted_sum,
    };
    use candle_core::Var;
    use proptest::prelude::*;

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
            assert_gradients(&inputs, |x| conv2d(&x[0], &x[1], window, Precision::F32));
            assert_gradients(&inputs, |x| reference(&x[0], &x[1], window));
        }
    }

    #[test]
    fn several_tiles_give_what_the_reference_gives() {
        // 4 x 17 x 18 positions: tiles that end inside an image, and in a part of their own.
        for window in WINDOWS {
            let inputs = [random((4, 17, 18, 3), 1), random((5, 3, window.kernel, window.kernel), 2)];
            assert_same(
                &inputs,
                |x| conv2d(&x[0], &x[1], window, Precision::F32),
                |x| reference(&x[0], &x[1], window),
            );
        }
    }

    /// Results and both gradients, in one vector each.
    fn results(inputs: &[Tensor; 2], window: Window, precision: Precision) -> [Vec<f32>; 3] {
        let vars = inputs.each_ref().map(|t| Var::from_tensor(&t.to_dtype(DType::F32).unwrap()).unwrap());
        let y = conv2d(vars[0].as_tensor(), vars[1].as_tensor(), window, precision).unwrap();
        let grads = weighted_sum(&y).backward().unwrap();
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        [flat(&y), flat(grads.get(&vars[0]).unwrap()), flat(grads.get(&vars[1]).unwrap())]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Any sizes, odd ones included: f32 equals the reference, bf16 stays as close to it as 8 bits allow.
        #[test]
        fn every_shape_gives_what_the_reference_gives(
            (batch, height, width) in (1usize..12, 1usize..20, 1usize..20),
            (channels, out_channels) in (1usize..7, 1usize..40),
            (kernel, stride, padding) in (1usize..6, 1usize..4, 0usize..4),
        ) {
            let window = Window { kernel, stride, padding };
            prop_assume!(window.positions(height) * window.positions(width) > 0);
            let inputs =
                [random((batch, height, width, channels), 1), random((out_channels, channels, kernel, kernel), 2)];
            let f32_op = |x: &[Tensor]| conv2d(&x[0], &x[1], window, Precision::F32);
            assert_same(&inputs, f32_op, |x| reference(&x[0], &x[1], window));
            let exact = results(&inputs, window, Precision::F32);
            let rounded = results(&inputs, window, Precision::Bf16);
            exact.iter().zip(&rounded).for_each(|(exact, rounded)| assert_near(exact, rounded, 0.01));
        }
    }

    #[test]
    fn threads_change_no_bit() {
        let inputs = [random((9, 17, 16, 4), 1), random((6, 4, 3, 3), 2)];
        for precision in [Precision::F32, Precision::Bf16] {
            for window in [WINDOWS[0], WINDOWS[1]] {
                let with = |threads: usize| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    pool.install(|| results(&inputs, window, precision))
                };
                assert_eq!(with(1), with(3));
            }
        }
    }

    #[test]
    fn a_weight_for_other_channels_is_refused() {
        assert!(
            conv2d(&random((1, 4, 4, 2), 1), &random((3, 3, 3, 3), 2), WINDOWS[0], Precision::F32).is_err()
        );
        assert!(
            conv2d(
                &random((1, 1, 1, 3), 1),
                &random((3, 3, 5, 5), 2),
                Window { kernel: 5, stride: 1, padding: 0 },
                Precision::F32
            )
            .is_err()
        );
    }
}
