//! What convolutions of channels-last images share: images as operands, the patches in them, and the three products of a
//! convolution: its result, its weight's gradient, its input's gradient.
//!
//! Images are first copied with their padding, in the products' own type. A patch is then a few contiguous runs, one a
//! row of the kernel, which products read where they lie. The input's gradient is made of convolutions too: of the
//! result's gradient with the kernel turned round, at stride s one for each of the s x s phases of the input's pixels, so
//! that no product is scattered over overlapping patches.
//!
//! Parts: tiles of output positions; groups of whole images for the input's gradient; fixed groups of tiles for the weight's
//! gradient, whose sums are combined in order, or blocks of output channels where there are few tiles.

use std::ops::Range;

use candle_core::{Result, bail};
use rayon::prelude::*;

use super::Window;
use super::arithmetic::{Arithmetic, Patches, Right, Rows};
use super::kernel::{Real, sum_in_order};
use super::matrix::Write;
use super::vector::widest;

/// Output positions of one tile: enough rows to read the weight from the second-level cache seldom, few enough that a
/// tile's gathered patches stay there.
const TILE_POSITIONS: usize = 252;
/// Tiles are smaller where there would be fewer of them than this, so that threads find work.
const FEWEST_TILES: usize = 8;
/// Partial sums of the weight's gradient: each costs one copy of the weight, and no more threads than this can help.
const WEIGHT_GRADIENT_PARTS: usize = 8;

/// A convolution's shapes.
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

impl Geometry {
    /// Of images [batch, height, width, channels] and a weight [out_channels, channels, kernel, kernel].
    pub(super) fn of(images: &[usize], weight: &[usize], window: Window) -> Result<Self> {
        let (&[batch, height, width, channels], &[out_channels, weight_channels, k_rows, k_columns]) =
            (images, weight)
        else {
            bail!("convolution of {images:?} with {weight:?}: both have four dimensions")
        };
        let (out_height, out_width) = (window.positions(height), window.positions(width));
        let fits = weight_channels == channels && (k_rows, k_columns) == (window.kernel, window.kernel);
        if !fits || batch * out_height * out_width * channels * out_channels == 0 {
            bail!("convolution: weight {weight:?} and {window:?} do not fit input {images:?}");
        }
        Ok(Geometry { batch, height, width, channels, out_height, out_width, out_channels, window })
    }

    pub(super) fn out_shape(&self) -> (usize, usize, usize, usize) {
        (self.batch, self.out_height, self.out_width, self.out_channels)
    }

    pub(super) fn positions(&self) -> usize {
        self.batch * self.out_height * self.out_width
    }

    pub(super) fn weight_elements(&self) -> usize {
        self.out_channels * self.channels * self.window.kernel * self.window.kernel
    }

    /// The input's images as an operand.
    pub(super) fn operand<A: Arithmetic>(&self, images: &[A::Wide]) -> Padded<A::Narrow> {
        let padding = self.window.padding;
        let mut padded = self.empty_operand::<A>();
        let image_len = self.height * self.width * self.channels;
        let room = padded.images_mut().zip(images.par_chunks_exact(image_len));
        room.for_each(|(mut out, image)| {
            for (y, row) in image.chunks_exact(self.width * self.channels).enumerate() {
                narrow_line::<A>(row, self.channels, out.line(y, padding, self.width));
            }
        });
        padded
    }

    /// The same, still without images.
    pub(super) fn empty_operand<A: Arithmetic>(&self) -> Padded<A::Narrow> {
        let padding = self.window.padding;
        let size = (self.height + 2 * padding, self.width + 2 * padding);
        Padded::zero(self.batch, size, self.channels.next_multiple_of(A::GROUP), padding)
    }

    /// Where the result's patches lie in an operand.
    pub(super) fn sampling<E>(&self, operand: &Padded<E>) -> Sampling {
        let Window { kernel, stride, padding } = self.window;
        Sampling {
            positions: (self.out_height, self.out_width),
            stride,
            first: [operand.before - padding; 2],
            kernel: (kernel, kernel),
        }
    }

    /// `weight` [out, channels, kernel, kernel] as the right operand of the patches' product.
    pub(super) fn weight<'a, A: Arithmetic>(
        &self,
        weight: &[A::Wide],
        buffers: &'a mut WeightBuffers<A>,
    ) -> Right<'a, A::Narrow> {
        let kernel = self.window.kernel;
        let channels = self.channels;
        let at = |out: usize, row: usize, column: usize, channel: usize| {
            weight[((out * channels + channel) * kernel + row) * kernel + column]
        };
        kernel_order::<A>((self.out_channels, kernel, kernel, channels), at, buffers)
    }

    /// The result's gradient as an operand of [`input_gradient`] and [`weight_gradient`], still without values.
    pub(super) fn empty_gradient<A: Arithmetic>(&self) -> Padded<A::Narrow> {
        let room = |size: usize, out: usize| {
            let phases = (0..self.window.stride).map(|offset| Phase::of(self.window, size, offset));
            phases.fold((0, 0), |(before, after): (usize, usize), phase| {
                let first = phase.shift - (phase.taps as isize - 1);
                let end = phase.count as isize + phase.shift;
                (before.max(-first.min(0) as usize), after.max((end - out as isize).max(0) as usize))
            })
        };
        let (rows, columns) = (room(self.height, self.out_height), room(self.width, self.out_width));
        let before = rows.0.max(columns.0);
        let size = (before + self.out_height + rows.1, before + self.out_width + columns.1);
        Padded::zero(self.batch, size, self.out_channels.next_multiple_of(A::GROUP), before)
    }

    /// The result's gradient as such an operand.
    pub(super) fn gradient_operand<A: Arithmetic>(&self, grad: &[A::Wide]) -> Padded<A::Narrow> {
        let mut padded = self.empty_gradient::<A>();
        let (before, line) = (padded.before, self.out_width * self.out_channels);
        let images = padded.images_mut().zip(grad.par_chunks_exact(self.out_height * line));
        images.for_each(|(mut out, grad)| {
            for (y, row) in grad.chunks_exact(line).enumerate() {
                narrow_line::<A>(row, self.out_channels, out.line(y, before, self.out_width));
            }
        });
        padded
    }

    /// Where the gradient's own pixels lie in its operand.
    fn gradient_pixels<E>(&self, operand: &Padded<E>) -> Sampling {
        Sampling {
            positions: (self.out_height, self.out_width),
            stride: 1,
            first: [operand.before; 2],
            kernel: (1, 1),
        }
    }

    /// The one phase of stride 1.
    pub(super) fn only_phase(&self) -> [Phase; 2] {
        [Phase::of(self.window, self.height, 0), Phase::of(self.window, self.width, 0)]
    }

    /// Every convolution of the result's gradient that makes a part of the input's, for stride 1 the only one.
    fn phases(&self) -> Vec<[Phase; 2]> {
        let of = |size: usize, offset: usize| Phase::of(self.window, size, offset);
        let offsets = 0..self.window.stride;
        offsets
            .clone()
            .flat_map(|y| offsets.clone().map(move |x| (y, x)))
            .map(|(y, x)| [of(self.height, y), of(self.width, x)])
            .collect()
    }

    /// The weight of one phase, as the right operand of the gradient's patches.
    pub(super) fn turned_weight<'a, A: Arithmetic>(
        &self,
        weight: &[A::Wide],
        phase: &[Phase; 2],
        buffers: &'a mut WeightBuffers<A>,
    ) -> Right<'a, A::Narrow> {
        let Window { kernel, stride, .. } = self.window;
        let channels = self.channels;
        let [rows, columns] = phase;
        let at = |channel: usize, row: usize, column: usize, out: usize| {
            let row = rows.tap + stride * (rows.taps - 1 - row);
            let column = columns.tap + stride * (columns.taps - 1 - column);
            weight[((out * channels + channel) * kernel + row) * kernel + column]
        };
        kernel_order::<A>((channels, rows.taps, columns.taps, self.out_channels), at, buffers)
    }

    /// Where a phase's patches lie in the gradient's operand.
    pub(super) fn phase_sampling<E>(&self, phase: &[Phase; 2], gradient: &Padded<E>) -> Sampling {
        let first =
            |phase: &Phase| gradient.before.wrapping_add_signed(phase.shift - (phase.taps as isize - 1));
        let [rows, columns] = phase;
        Sampling {
            positions: (rows.count, columns.count),
            stride: 1,
            first: [first(rows), first(columns)],
            kernel: (rows.taps, columns.taps),
        }
    }
}

/// One in `stride` of an input's rows (or columns), those at `offset + i * stride`: which of the kernel's taps reach them, and
/// from where. Tap `tap + j * stride` brings the gradient at `i + shift - j` to pixel i.
#[derive(Clone, Copy, Debug)]
pub(super) struct Phase {
    offset: usize,
    /// Pixels of the phase.
    count: usize,
    tap: usize,
    taps: usize,
    shift: isize,
}

impl Phase {
    fn of(window: Window, size: usize, offset: usize) -> Self {
        let Window { kernel, stride, padding } = window;
        let tap = (offset + padding) % stride;
        Phase {
            offset,
            count: size.saturating_sub(offset).div_ceil(stride),
            tap,
            taps: kernel.saturating_sub(tap).div_ceil(stride),
            shift: ((offset + padding) / stride) as isize,
        }
    }
}

/// Whether a phase has pixels, and taps that reach them.
fn reached(phase: &[Phase; 2]) -> bool {
    phase.iter().all(|phase| phase.count * phase.taps > 0)
}

/// Room for the operand made of a weight: in the kernel's order, and grouped.
pub(super) type WeightBuffers<A> = [Vec<<A as Arithmetic>::Narrow>; 2];

/// Rows of [kernel row, kernel column, padded inner channel] for each outer channel, as a right operand contracted over
/// them. `sizes` are (outer, kernel rows, kernel columns, inner).
fn kernel_order<'a, A: Arithmetic>(
    sizes: (usize, usize, usize, usize),
    at: impl Fn(usize, usize, usize, usize) -> A::Wide + Sync,
    buffers: &'a mut WeightBuffers<A>,
) -> Right<'a, A::Narrow> {
    let (outer, k_rows, k_columns, inner) = sizes;
    let padded = inner.next_multiple_of(A::GROUP);
    let [rows, grouped] = buffers;
    rows.clear();
    rows.resize(outer * k_rows * k_columns * padded, A::Narrow::default());
    rows.par_chunks_exact_mut(k_rows * k_columns * padded).enumerate().for_each(|(out, rows)| {
        for (position, rows) in rows.chunks_exact_mut(padded).enumerate() {
            let (row, column) = (position / k_columns, position % k_columns);
            for (channel, value) in rows.iter_mut().take(inner).enumerate() {
                *value = A::to_narrow(at(out, row, column, channel));
            }
        }
    });
    A::group_columns(Rows::new(rows, outer, k_rows * k_columns * padded), grouped)
}

/// Which patches are read out of padded images.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sampling {
    /// Patches along the height and the width of an image.
    positions: (usize, usize),
    stride: usize,
    /// Row and column of the first patch's corner.
    first: [usize; 2],
    /// Rows and columns of a patch.
    kernel: (usize, usize),
}

impl Sampling {
    fn an_image(&self) -> usize {
        self.positions.0 * self.positions.1
    }
}

/// Images with their padding, [batch, height, width, channels], in an arithmetic's own type. What stands round the images is
/// zero.
pub(super) struct Padded<E> {
    data: Vec<E>,
    batch: usize,
    height: usize,
    width: usize,
    channels: usize,
    /// Rows above and columns left of each image.
    before: usize,
}

/// One image of [`Padded`].
pub(super) struct PaddedImage<'a, E> {
    data: &'a mut [E],
    width: usize,
    channels: usize,
}

impl<E> PaddedImage<'_, E> {
    /// `width` pixels of line `y`, inside a padding of `before`.
    pub(super) fn line(&mut self, y: usize, before: usize, width: usize) -> &mut [E] {
        let start = ((y + before) * self.width + before) * self.channels;
        &mut self.data[start..start + width * self.channels]
    }
}

impl<E: Copy + Default + Send + Sync> Padded<E> {
    fn zero(batch: usize, (height, width): (usize, usize), channels: usize, before: usize) -> Self {
        let data = vec![E::default(); batch * height * width * channels];
        Padded { data, batch, height, width, channels, before }
    }

    pub(super) fn before(&self) -> usize {
        self.before
    }

    pub(super) fn images_mut(&mut self) -> impl IndexedParallelIterator<Item = PaddedImage<'_, E>> {
        let Padded { width, channels, .. } = *self;
        let image = self.height * width * channels;
        self.data.par_chunks_exact_mut(image).map(move |data| PaddedImage { data, width, channels })
    }

    /// The patches of `positions`; `starts` is where they begin.
    fn patches<'a>(
        &'a self,
        sampling: &Sampling,
        positions: Range<usize>,
        starts: &'a mut Vec<usize>,
    ) -> Patches<'a, E> {
        let Sampling { positions: (rows, columns), stride, first: [top, left], kernel } = *sampling;
        let start = |image: usize, y: usize| {
            ((image * self.height + top + y * stride) * self.width + left) * self.channels
        };
        let (mut image, within) = (positions.start / (rows * columns), positions.start % (rows * columns));
        let (mut y, mut x) = (within / columns, within % columns);
        starts.clear();
        // Line by line: a division for each position would take as long as a small product.
        while starts.len() < positions.len() {
            let count = (columns - x).min(positions.len() - starts.len());
            let line = start(image, y);
            starts.extend((x..x + count).map(|x| line + x * stride * self.channels));
            (x, y) = (0, y + 1);
            if y == rows {
                (y, image) = (0, image + 1);
            }
        }
        Patches {
            data: &self.data,
            starts,
            segments: kernel.0,
            segment_len: kernel.1 * self.channels,
            segment_stride: self.width * self.channels,
        }
    }
}

/// Rows of `channels` into pixels of as many, or one more.
fn narrow_line<A: Arithmetic>(line: &[A::Wide], channels: usize, out: &mut [A::Narrow]) {
    if line.len() == out.len() {
        widest!(out.iter_mut().zip(line).for_each(|(out, &value)| *out = A::to_narrow(value)));
        return;
    }
    let pixels = line.chunks_exact(channels);
    for (out, pixel) in out.chunks_exact_mut(channels.next_multiple_of(A::GROUP)).zip(pixels) {
        out.iter_mut().zip(pixel).for_each(|(out, &value)| *out = A::to_narrow(value));
    }
}

/// Patches and what they are multiplied by.
pub(super) struct Product<'a, A: Arithmetic> {
    pub arithmetic: A,
    pub images: &'a Padded<A::Narrow>,
    pub sampling: Sampling,
    pub weight: Right<'a, A::Narrow>,
}

/// Buffers of one thread.
struct Scratch<A: Arithmetic> {
    starts: Vec<usize>,
    gathered: Vec<A::Narrow>,
    product: Vec<A::Wide>,
    other: Vec<A::Wide>,
}

impl<A: Arithmetic> Scratch<A> {
    fn new() -> Self {
        Scratch { starts: Vec::new(), gathered: Vec::new(), product: Vec::new(), other: Vec::new() }
    }
}

impl<A: Arithmetic> Product<'_, A> {
    /// Positions of one tile.
    fn tile(&self) -> usize {
        let positions = self.images.batch * self.sampling.an_image();
        positions.div_ceil(FEWEST_TILES).clamp(A::FEWEST_ROWS, TILE_POSITIONS)
    }

    /// Tile after tile, `finish(positions, product, out)` makes the tile's share of `out`, which has as many elements for each
    /// position as the weight has columns. What it returns comes back in the tiles' order.
    pub(super) fn for_tiles<O: Send, R: Send>(
        &self,
        out: &mut [O],
        finish: impl Fn(Range<usize>, &mut [A::Wide], &mut [O]) -> R + Sync,
    ) -> Vec<R> {
        let (tile, columns) = (self.tile(), self.weight.columns);
        let tiles = out.par_chunks_mut(tile * columns).enumerate();
        let results = tiles.map_init(Scratch::<A>::new, |scratch, (index, out)| {
            let positions = index * tile..index * tile + out.len() / columns;
            let Scratch { starts, gathered, product, .. } = scratch;
            self.multiply(positions.clone(), starts, gathered, product);
            finish(positions, product, out)
        });
        results.collect()
    }

    fn multiply(
        &self,
        positions: Range<usize>,
        starts: &mut Vec<usize>,
        gathered: &mut Vec<A::Narrow>,
        product: &mut Vec<A::Wide>,
    ) {
        product.resize(positions.len() * self.weight.columns, A::Wide::ZERO);
        let patches = self.images.patches(&self.sampling, positions, starts);
        self.arithmetic.multiply_patches(patches, self.weight, product, gathered);
    }
}

/// A convolution whose input's gradient is asked for: its weight and its result's gradient.
pub(super) struct Source<'a, A: Arithmetic> {
    pub geometry: Geometry,
    pub weight: &'a [A::Wide],
    pub gradient: &'a Padded<A::Narrow>,
}

/// The gradient of the input that all `sources` have in common; they have one stride.
pub(super) fn input_gradient<A: Arithmetic>(arithmetic: A, sources: &[Source<'_, A>]) -> Vec<A::Wide> {
    let Geometry { batch, height, width, channels, window, .. } = sources[0].geometry;
    let phases: Vec<Vec<[Phase; 2]>> = sources.iter().map(|source| source.geometry.phases()).collect();
    let mut buffers: Vec<Vec<WeightBuffers<A>>> =
        phases.iter().map(|phases| phases.iter().map(|_| Default::default()).collect()).collect();
    let mut products: Vec<PhaseProducts<'_, A>> =
        phases[0].iter().map(|&at| PhaseProducts { at, products: Vec::new() }).collect();
    for ((source, phases), buffers) in sources.iter().zip(&phases).zip(&mut buffers) {
        for ((phase, buffers), into) in phases.iter().zip(buffers).zip(&mut products) {
            if reached(phase) {
                into.products.push(Product {
                    arithmetic,
                    images: source.gradient,
                    sampling: source.geometry.phase_sampling(phase, source.gradient),
                    weight: source.geometry.turned_weight::<A>(source.weight, phase, buffers),
                });
            }
        }
    }
    let image = height * width * channels;
    // Several small images make one tile.
    let phase_positions = height.div_ceil(window.stride) * width.div_ceil(window.stride);
    let images = (TILE_POSITIONS / phase_positions).clamp(1, batch.div_ceil(FEWEST_TILES));
    let mut dx = vec![A::Wide::ZERO; batch * image];
    dx.par_chunks_mut(images * image).enumerate().for_each_init(Scratch::<A>::new, |scratch, (part, dx)| {
        for phase in &products {
            phase.write(part * images, (height, width, channels), window.stride, (scratch, dx));
        }
    });
    dx
}

/// What the pixels of one phase are the sum of.
struct PhaseProducts<'a, A: Arithmetic> {
    at: [Phase; 2],
    products: Vec<Product<'a, A>>,
}

impl<A: Arithmetic> PhaseProducts<'_, A> {
    /// Writes the phase's pixels of the images in `dx`, the first of which is number `first`.
    fn write(
        &self,
        first: usize,
        (height, width, channels): (usize, usize, usize),
        stride: usize,
        (scratch, dx): (&mut Scratch<A>, &mut [A::Wide]),
    ) {
        let [rows, columns] = self.at;
        let Some((product, others)) = self.products.split_first() else { return };
        let (an_image, images) = (rows.count * columns.count, dx.len() / (height * width * channels));
        let end = (first + images) * an_image;
        let Scratch { starts, gathered, product: sum, other } = scratch;
        for start in (first * an_image..end).step_by(TILE_POSITIONS) {
            let positions = start..(start + TILE_POSITIONS).min(end);
            product.multiply(positions.clone(), starts, gathered, sum);
            for product in others {
                product.multiply(positions.clone(), starts, gathered, other);
                widest!(sum.iter_mut().zip(other.iter()).for_each(|(sum, &share)| *sum += share));
            }
            let pixels = sum.chunks_exact(channels).zip(positions);
            for (pixel, position) in pixels {
                let (image, within) = (position / an_image - first, position % an_image);
                let y = within / columns.count * stride + rows.offset;
                let x = within % columns.count * stride + columns.offset;
                dx[((image * height + y) * width + x) * channels..][..channels].copy_from_slice(pixel);
            }
        }
    }
}

/// The gradient of the weight, [out, channels, kernel, kernel], from the input's operand and the result's gradient.
pub(super) struct WeightGradient<'a, A: Arithmetic> {
    pub arithmetic: A,
    pub geometry: Geometry,
    pub images: &'a Padded<A::Narrow>,
    pub gradient: &'a Padded<A::Narrow>,
}

impl<A: Arithmetic> WeightGradient<'_, A> {
    pub(super) fn write(&self, dw: &mut [A::Wide]) {
        let Geometry { channels, window: Window { kernel, .. }, .. } = self.geometry;
        let positions = self.geometry.positions();
        let padded = self.images.channels;
        let patch = kernel * kernel * padded;
        let tiles = positions.div_ceil(TILE_POSITIONS);
        let sums = if tiles < WEIGHT_GRADIENT_PARTS {
            self.by_channels()
        } else {
            let part = tiles.div_ceil(WEIGHT_GRADIENT_PARTS) * TILE_POSITIONS;
            let parts = (0..positions.div_ceil(part)).into_par_iter();
            sum_in_order(
                parts.map(|index| self.part(index * part..((index + 1) * part).min(positions))).collect(),
            )
        };
        // Rows of channels that only pad the gradient are left out.
        let rows = dw.par_chunks_exact_mut(kernel * kernel * channels).zip(sums.par_chunks_exact(patch));
        rows.for_each(|(dw, sums)| {
            for (channel, dw) in dw.chunks_exact_mut(kernel * kernel).enumerate() {
                dw.iter_mut().zip(sums.chunks_exact(padded)).for_each(|(dw, sums)| *dw = sums[channel]);
            }
        });
    }

    /// The share of `positions`: [padded out, kernel row, kernel column, padded channel].
    fn part(&self, positions: Range<usize>) -> Vec<A::Wide> {
        let [mut left, mut right] = [const { Vec::new() }; 2];
        let [mut pixels, mut starts] = [const { Vec::new() }; 2];
        let mut sums = Vec::new();
        for start in positions.clone().step_by(TILE_POSITIONS) {
            let tile = start..(start + TILE_POSITIONS).min(positions.end);
            let left = self.grouped_gradient(tile.clone(), &mut pixels, &mut left).transposed();
            let right = self.grouped_patches(tile, &mut starts, &mut right);
            sums.resize(left.rows * right.columns, A::Wide::ZERO);
            self.arithmetic.multiply(left, right, &mut sums, right.columns, Write::Add);
        }
        sums
    }

    /// The same where few positions meet many channels: each thread sums all positions for some output channels.
    fn by_channels(&self) -> Vec<A::Wide> {
        let [mut left, mut right] = [const { Vec::new() }; 2];
        let [mut pixels, mut starts] = [const { Vec::new() }; 2];
        let positions = 0..self.geometry.positions();
        let left = self.grouped_gradient(positions.clone(), &mut pixels, &mut left);
        let right = self.grouped_patches(positions, &mut starts, &mut right);
        let mut sums = vec![A::Wide::ZERO; left.columns * right.columns];
        let block = left.columns.div_ceil(WEIGHT_GRADIENT_PARTS);
        sums.par_chunks_mut(block * right.columns).enumerate().for_each(|(index, sums)| {
            let left = left.columns(index * block, sums.len() / right.columns).transposed();
            self.arithmetic.multiply(left, right, sums, right.columns, Write::Replace);
        });
        sums
    }

    fn grouped_gradient<'b>(
        &self,
        positions: Range<usize>,
        starts: &'b mut Vec<usize>,
        scratch: &'b mut Vec<A::Narrow>,
    ) -> Right<'b, A::Narrow> {
        let pixels = self.geometry.gradient_pixels(self.gradient);
        A::group_patches(self.gradient.patches(&pixels, positions, starts), scratch)
    }

    fn grouped_patches<'b>(
        &self,
        positions: Range<usize>,
        starts: &'b mut Vec<usize>,
        scratch: &'b mut Vec<A::Narrow>,
    ) -> Right<'b, A::Narrow> {
        let sampling = self.geometry.sampling(self.images);
        A::group_patches(self.images.patches(&sampling, positions, starts), scratch)
    }
}
