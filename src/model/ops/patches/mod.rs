//! What convolutions of channels-last images share: images as operands, the patches in them, and the three products of a
//! convolution: its result, its weight's gradient, its input's gradient.
//!
//! Images are first copied with their padding, in the products' own type. A patch is then a few contiguous runs, one a
//! row of the kernel, which products read where they lie. The input's gradient is made of convolutions too: of the
//! result's gradient with the kernel turned round, at stride s one for each of the s x s phases of the input's pixels, so
//! that no product is scattered over overlapping patches.
//!
//! This file lays operands out, those beside it multiply.

mod product;
mod weight_gradient;

use std::ops::Range;

pub(super) use product::{Product, Source, input_gradient};
pub(super) use weight_gradient::WeightGradient;

use candle_core::{Result, bail};
use rayon::prelude::*;

use super::Window;
use super::arithmetic::{Arithmetic, Patches, Right, Rows};
use crate::widest::widest;

/// Output positions of one tile: enough rows to read the weight from the second-level cache seldom, few enough that a
/// tile's gathered patches stay there.
const TILE_POSITIONS: usize = 252;
/// Tiles are smaller where there would be fewer of them than this, so that threads find work.
const FEWEST_TILES: usize = 8;

/// Positions of one tile, out of so many.
fn tile<A: Arithmetic>(positions: usize) -> usize {
    positions.div_ceil(FEWEST_TILES).clamp(A::FEWEST_ROWS, TILE_POSITIONS)
}

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

    /// `weight` [out, channels, kernel, kernel] in the order in which patches lie.
    pub(super) fn kernel_order<A: Arithmetic>(&self, weight: &[A::Wide]) -> KernelOrder<A::Narrow> {
        let taps = self.window.kernel * self.window.kernel;
        let row = taps * self.channels.next_multiple_of(A::GROUP);
        let mut data = vec![A::Narrow::default(); self.out_channels.next_multiple_of(A::GROUP) * row];
        let rows = data.par_chunks_exact_mut(row).zip(weight.par_chunks_exact(taps * self.channels));
        rows.for_each(|(out, weight)| taps_first::<A>(weight, taps, out));
        KernelOrder { data, row }
    }

    /// The right operand of the patches' product.
    pub(super) fn weight<'a, A: Arithmetic>(
        &self,
        weight: &'a KernelOrder<A::Narrow>,
        scratch: &'a mut Vec<A::Narrow>,
    ) -> Right<'a, A::Narrow> {
        let KernelOrder { data, row } = weight;
        A::group_columns(Rows::new(&data[..self.out_channels * row], self.out_channels, *row), scratch)
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

    /// The weight of one phase, as the right operand of the gradient's patches: for each tap of the turned kernel the rows of
    /// all outputs.
    pub(super) fn turned_weight<'a, A: Arithmetic>(
        &self,
        weight: &KernelOrder<A::Narrow>,
        phase: &[Phase; 2],
        scratch: &'a mut Vec<A::Narrow>,
    ) -> Right<'a, A::Narrow> {
        let Window { kernel, stride, .. } = self.window;
        let pixel = self.channels.next_multiple_of(A::GROUP);
        let KernelOrder { data, row } = weight;
        let mut starts = Vec::new();
        let [rows, columns] = phase;
        for y in (0..rows.taps).rev().map(|tap| rows.tap + stride * tap) {
            for x in (0..columns.taps).rev().map(|tap| columns.tap + stride * tap) {
                let tap = (y * kernel + x) * pixel;
                starts.extend((0..data.len() / row).map(|out| out * row + tap));
            }
        }
        let rows = Patches { data, starts: &starts, segments: 1, segment_len: pixel, segment_stride: 0 };
        A::group_weight(rows, scratch).first_columns(self.channels)
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

/// A weight as [padded out, kernel row, kernel column, padded channel], in an arithmetic's own type; what pads is zero.
pub(super) struct KernelOrder<E> {
    data: Vec<E>,
    /// Elements of one output.
    row: usize,
}

/// [channels, taps] -> [taps, padded channels]
fn taps_first<A: Arithmetic>(weight: &[A::Wide], taps: usize, out: &mut [A::Narrow]) {
    let padded = out.len() / taps;
    widest! {
        for (channel, weight) in weight.chunks_exact(taps).enumerate() {
            for (tap, &value) in weight.iter().enumerate() {
                out[tap * padded + channel] = A::to_narrow(value);
            }
        }
    }
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
    pub(super) fn patches<'a>(
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
