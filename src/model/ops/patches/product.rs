//! A convolution's result and its input's gradient. Parts: tiles of output positions, and groups of whole images for the
//! input's gradient.

use std::ops::Range;

use super::super::arithmetic::{Arithmetic, Right};
use super::super::kernel::{Real, in_parts};
use super::{FEWEST_TILES, Geometry, KernelOrder, Padded, Phase, Sampling, TILE_POSITIONS, reached, tile};
use crate::widest::widest;

/// Patches and what they are multiplied by.
pub(in crate::model::ops) struct Product<'a, A: Arithmetic> {
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
    /// Tile after tile, `finish(positions, product, out)` makes the tile's share of a vector, which has as many elements for each
    /// position as the weight has columns. What it returns comes back in the tiles' order.
    pub(in crate::model::ops) fn for_tiles<O: Copy + Default + Send + Sync, R: Send>(
        &self,
        finish: impl Fn(Range<usize>, &mut [A::Wide], &mut [O]) -> R + Sync + Send,
    ) -> (Vec<O>, Vec<R>) {
        let (positions, columns) = (self.images.batch * self.sampling.an_image(), self.weight.columns);
        let (tile, len) = (tile::<A>(positions), positions * columns);
        in_parts(len, tile * columns, Scratch::<A>::new, |scratch, index, out| {
            let positions = index * tile..index * tile + out.len() / columns;
            let Scratch { starts, gathered, product, .. } = scratch;
            self.multiply(positions.clone(), starts, gathered, product);
            finish(positions, product, out)
        })
    }

    /// The whole product on the calling thread: [positions, columns].
    pub(in crate::model::ops) fn all(&self) -> Vec<A::Wide> {
        let positions = 0..self.images.batch * self.sampling.an_image();
        let (mut starts, mut gathered, mut product) = (Vec::new(), Vec::new(), Vec::new());
        self.multiply(positions, &mut starts, &mut gathered, &mut product);
        product
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
pub(in crate::model::ops) struct Source<'a, A: Arithmetic> {
    pub geometry: Geometry,
    pub weight: &'a KernelOrder<A::Narrow>,
    pub gradient: &'a Padded<A::Narrow>,
}

/// The gradient of the input that all `sources` have in common; they have one stride.
pub(in crate::model::ops) fn input_gradient<A: Arithmetic>(
    arithmetic: A,
    sources: &[Source<'_, A>],
) -> Vec<A::Wide> {
    let Geometry { batch, height, width, channels, window, .. } = sources[0].geometry;
    let phases: Vec<Vec<[Phase; 2]>> = sources.iter().map(|source| source.geometry.phases()).collect();
    let mut buffers: Vec<Vec<Vec<A::Narrow>>> =
        phases.iter().map(|phases| vec![Vec::new(); phases.len()]).collect();
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
    let (dx, _) = in_parts(batch * image, images * image, Scratch::<A>::new, |scratch, part, dx| {
        // Pixels that no tap reaches.
        dx.fill(A::Wide::ZERO);
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
