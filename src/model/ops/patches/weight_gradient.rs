//! The gradient of a convolution's weight. Parts: fixed groups of tiles, whose sums are combined in order, or blocks of output
//! channels where there are few tiles.

use std::ops::Range;

use rayon::prelude::*;

use super::super::Window;
use super::super::arithmetic::{Arithmetic, Patches};
use super::super::kernel::{Real, sum_in_order};
use super::super::matrix::Write;
use super::{Geometry, Padded, TILE_POSITIONS};

/// Partial sums of the weight's gradient: each costs one copy of the weight, and no more threads than this can help.
const WEIGHT_GRADIENT_PARTS: usize = 8;

/// The gradient of the weight, [out, channels, kernel, kernel], from the input's operand and the result's gradient.
pub(in crate::model::ops) struct WeightGradient<'a, A: Arithmetic> {
    pub arithmetic: A,
    pub geometry: Geometry,
    pub images: &'a Padded<A::Narrow>,
    pub gradient: &'a Padded<A::Narrow>,
}

impl<A: Arithmetic> WeightGradient<'_, A> {
    pub(in crate::model::ops) fn write(&self, dw: &mut [A::Wide]) {
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
        rows.for_each(|(dw, sums)| channels_first(sums, kernel * kernel, dw));
    }

    /// The share of `positions`: [padded out, kernel row, kernel column, padded channel].
    fn part(&self, positions: Range<usize>) -> Vec<A::Wide> {
        let [mut pixels, mut starts] = [const { Vec::new() }; 2];
        let (mut sums, mut scratch) = (Vec::new(), [const { Vec::new() }; 2]);
        for start in positions.clone().step_by(TILE_POSITIONS) {
            let tile = start..(start + TILE_POSITIONS).min(positions.end);
            let (left, right) = (self.gradient(tile.clone(), &mut pixels), self.patches(tile, &mut starts));
            sums.resize(left.columns() * right.columns(), A::Wide::ZERO);
            self.arithmetic.add_over_patches(left, right, &mut sums, &mut scratch);
        }
        sums
    }

    /// The same where few positions meet many channels: each thread sums all positions for some output channels.
    fn by_channels(&self) -> Vec<A::Wide> {
        let [mut left, mut right] = [const { Vec::new() }; 2];
        let [mut pixels, mut starts] = [const { Vec::new() }; 2];
        let positions = 0..self.geometry.positions();
        let left = A::group_patches(self.gradient(positions.clone(), &mut pixels), &mut left);
        let right = A::group_patches(self.patches(positions, &mut starts), &mut right);
        let mut sums = vec![A::Wide::ZERO; left.columns * right.columns];
        let block = left.columns.div_ceil(WEIGHT_GRADIENT_PARTS);
        sums.par_chunks_mut(block * right.columns).enumerate().for_each(|(index, sums)| {
            let left = left.columns(index * block, sums.len() / right.columns).transposed();
            self.arithmetic.multiply(left, right, sums, right.columns, Write::Replace);
        });
        sums
    }

    /// The pixels of the result's gradient.
    fn gradient<'b>(&'b self, positions: Range<usize>, starts: &'b mut Vec<usize>) -> Patches<'b, A::Narrow> {
        let sampling = self.geometry.gradient_pixels(self.gradient);
        self.gradient.patches(&sampling, positions, starts)
    }

    fn patches<'b>(&'b self, positions: Range<usize>, starts: &'b mut Vec<usize>) -> Patches<'b, A::Narrow> {
        self.images.patches(&self.geometry.sampling(self.images), positions, starts)
    }
}

/// [taps, padded channels] -> [channels, taps]
fn channels_first<T: Real>(sums: &[T], taps: usize, out: &mut [T]) {
    let padded = sums.len() / taps;
    for (channel, out) in out.chunks_exact_mut(taps).enumerate() {
        for (tap, out) in out.iter_mut().enumerate() {
            *out = sums[tap * padded + channel];
        }
    }
}
