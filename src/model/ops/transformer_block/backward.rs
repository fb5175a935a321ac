//! The block's backward pass: fixed groups of tiles, each of which sums its share of the parameters' gradient.

use rayon::prelude::*;

use super::super::arithmetic::{Arithmetic, Rows};
use super::super::gelu::gelu_with_derivative;
use super::super::kernel::{Real, sum_in_order};
use super::super::layer_norm::{Norm, NormGradients};
use super::super::matrix::Write;
use super::attention::{self, Attention};
use super::weights::{BackwardWeights, WeightBuffers};
use super::{BlockParameter as P, GRADIENT_PARTS, Geometry, MLP_RATIO, Saved};
use crate::widest::widest;

pub(super) struct Backward<'a, A: Arithmetic> {
    geometry: Geometry,
    arithmetic: A,
    parameters: &'a [A::Wide],
    weights: BackwardWeights<'a, A>,
}

/// What one tile's pass reads, and the input's gradient, which it writes.
struct Tile<'a, A: Arithmetic> {
    x: &'a [A::Wide],
    grad: &'a [A::Wide],
    middle: &'a [A::Wide],
    qkv: &'a [A::Narrow],
    attended: &'a [A::Narrow],
    hidden: &'a [A::Narrow],
    dx: &'a mut [A::Wide],
}

/// Buffers of one thread: [rows of a tile, width] each, if not said otherwise.
struct Scratch<A: Arithmetic> {
    /// The gradient at a normalisation's result.
    dnorm: Vec<A::Wide>,
    product: Vec<A::Wide>,
    /// The gradient at the sum between attention and MLP.
    dmiddle: Vec<A::Wide>,
    /// [rows, 3 width]
    dqkv: Vec<A::Narrow>,
    normalised: Vec<A::Narrow>,
    grad: Vec<A::Narrow>,
    activated: Vec<A::Narrow>,
    dhidden: Vec<A::Narrow>,
    /// Grouped operands: the normalised input, the gradient above, and one for each product in turn.
    groups: [Vec<A::Narrow>; 3],
    attention: attention::Scratch<A>,
}

impl<A: Arithmetic> Scratch<A> {
    fn new(geometry: &Geometry) -> Self {
        let elements = geometry.rows_per_tile() * geometry.width;
        let wide = || vec![A::Wide::ZERO; elements];
        let narrow = || vec![A::Narrow::default(); elements];
        Scratch {
            dnorm: wide(),
            product: wide(),
            dmiddle: wide(),
            dqkv: vec![A::Narrow::default(); 3 * elements],
            normalised: narrow(),
            grad: narrow(),
            activated: narrow(),
            dhidden: narrow(),
            groups: [Vec::new(), Vec::new(), Vec::new()],
            attention: attention::Scratch::new(),
        }
    }
}

impl<'a, A: Arithmetic> Backward<'a, A> {
    pub(super) fn new(
        geometry: Geometry,
        arithmetic: A,
        parameters: &'a [A::Wide],
        buffers: &'a mut WeightBuffers<A>,
    ) -> Self {
        let weights = BackwardWeights::new(&geometry, parameters, buffers);
        Backward { geometry, arithmetic, parameters, weights }
    }

    /// Gradients of `x` and of the parameters.
    pub(super) fn run(
        &self,
        x: &[A::Wide],
        saved: &Saved<A>,
        grad: &[A::Wide],
    ) -> (Vec<A::Wide>, Vec<A::Wide>) {
        let geometry = &self.geometry;
        let tiles = geometry.batch.div_ceil(geometry.images_per_tile());
        let mut dx = vec![A::Wide::ZERO; x.len()];
        let images_per_part = tiles.div_ceil(GRADIENT_PARTS) * geometry.images_per_tile();
        let parts =
            dx.par_chunks_mut(images_per_part * geometry.tokens * geometry.width).enumerate().map_init(
                || Scratch::new(geometry),
                |scratch, (part, dx)| {
                    let mut sums = vec![A::Wide::ZERO; geometry.layout().elements()];
                    for (tile, dx) in dx.chunks_mut(geometry.rows_per_tile() * geometry.width).enumerate() {
                        let first = part * images_per_part + tile * geometry.images_per_tile();
                        self.tile(self.tile_at(first, x, saved, grad, dx), scratch, &mut sums);
                    }
                    sums
                },
            );
        let parts: Vec<Vec<A::Wide>> = parts.collect();
        (dx, sum_in_order(parts))
    }

    fn tile_at<'t>(
        &self,
        first_image: usize,
        x: &'t [A::Wide],
        saved: &'t Saved<A>,
        grad: &'t [A::Wide],
        dx: &'t mut [A::Wide],
    ) -> Tile<'t, A> {
        let Geometry { tokens, queries, width, .. } = self.geometry;
        let images = first_image..first_image + dx.len() / (tokens * width);
        let elements = |an_image: usize| images.start * an_image..images.end * an_image;
        Tile {
            x: &x[elements(tokens * width)],
            grad: &grad[elements(queries * width)],
            middle: &saved.middle[elements(queries * width)],
            qkv: &saved.qkv[elements(tokens * 3 * width)],
            attended: &saved.attended[elements(queries * width)],
            hidden: &saved.hidden[elements(queries * self.geometry.hidden())],
            dx,
        }
    }

    fn tile(&self, tile: Tile<'_, A>, scratch: &mut Scratch<A>, sums: &mut [A::Wide]) {
        let Geometry { tokens, queries, width, .. } = self.geometry;
        self.mlp(&tile, scratch, sums);
        let kept = tile.grad.len();
        scratch.dmiddle[..kept].copy_from_slice(tile.grad);
        self.norm(P::Norm2Weight, tile.middle, &scratch.dnorm[..kept], &mut scratch.dmiddle[..kept], sums);
        self.attention(&tile, scratch, sums);
        // `dx` is zero: only the tokens that were computed have a way round the attention.
        let images = tile.dx.chunks_exact_mut(tokens * width);
        for (dx, dmiddle) in images.zip(scratch.dmiddle.chunks_exact(queries * width)) {
            dx[..queries * width].copy_from_slice(dmiddle);
        }
        self.norm(P::Norm1Weight, tile.x, &scratch.dnorm[..tile.x.len()], tile.dx, sums);
    }

    /// From the block's gradient to that of the second normalisation's result.
    fn mlp(&self, tile: &Tile<'_, A>, scratch: &mut Scratch<A>, sums: &mut [A::Wide]) {
        let (width, hidden) = (self.geometry.width, self.geometry.hidden());
        let elements = tile.grad.len();
        let Scratch { dnorm, product, normalised, grad, activated, dhidden, groups, .. } = scratch;
        let [input_groups, grad_groups, other_groups] = groups;
        let (grad, activated) = (&mut grad[..elements], &mut activated[..elements]);
        let (dhidden, product) = (&mut dhidden[..elements], &mut product[..elements]);

        self.renormalise(P::Norm2Weight, tile.middle, &mut normalised[..elements]);
        let input = A::group_rows(self.matrix(&normalised[..elements]), input_groups);
        widest!(grad.iter_mut().zip(tile.grad).for_each(|(out, &value)| *out = A::to_narrow(value)));
        add_rows(&mut sums[self.range(P::Fc2Bias)], tile.grad);
        let above = A::group_rows(self.matrix(grad), grad_groups).transposed();
        for part in 0..MLP_RATIO {
            let fc2 = self.weights.fc2.columns(part * width, width);
            self.arithmetic.multiply(A::left(self.matrix(grad)), fc2, product, width, Write::Replace);
            let before = tile.hidden.chunks_exact(hidden).map(|row| &row[part * width..][..width]);
            let bias = &mut sums[self.range(P::Fc1Bias)][part * width..][..width];
            through_gelu::<A>(before, product, Activations { activated, dhidden, bias });
            let dfc2 = &mut sums[self.range(P::Fc2Weight)][part * width..];
            let right = A::group_rows(self.matrix(activated), other_groups);
            self.arithmetic.multiply(above, right, dfc2, hidden, Write::Add);
            let left = A::group_rows(self.matrix(dhidden), other_groups).transposed();
            let dfc1 = &mut sums[self.range(P::Fc1Weight)][part * width * width..];
            self.arithmetic.multiply(left, input, dfc1, width, Write::Add);
            let fc1 = self.weights.fc1.groups(part * width / A::GROUP, width / A::GROUP);
            let write = if part == 0 { Write::Replace } else { Write::Add };
            self.arithmetic.multiply(
                A::left(self.matrix(dhidden)),
                fc1,
                &mut dnorm[..elements],
                width,
                write,
            );
        }
    }

    /// From the gradient at the sum in the middle to that of the first normalisation's result.
    fn attention(&self, tile: &Tile<'_, A>, scratch: &mut Scratch<A>, sums: &mut [A::Wide]) {
        let Geometry { tokens, queries, width, heads, .. } = self.geometry;
        let (elements, rows) = (tile.x.len(), tile.x.len() / width);
        let Scratch { dnorm, product, dmiddle, dqkv, normalised, grad, groups, attention, .. } = scratch;
        let [input_groups, grad_groups, other_groups] = groups;
        let kept = tile.grad.len();
        let (grad, product, dmiddle) = (&mut grad[..kept], &mut product[..kept], &dmiddle[..kept]);
        let dqkv = &mut dqkv[..3 * elements];

        widest!(grad.iter_mut().zip(dmiddle).for_each(|(out, &value)| *out = A::to_narrow(value)));
        add_rows(&mut sums[self.range(P::ProjBias)], dmiddle);
        let above = A::group_rows(self.matrix(grad), grad_groups).transposed();
        let right = A::group_rows(self.matrix(tile.attended), other_groups);
        self.arithmetic.multiply(above, right, &mut sums[self.range(P::ProjWeight)], width, Write::Add);
        self.arithmetic.multiply(
            A::left(self.matrix(grad)),
            self.weights.proj,
            product,
            width,
            Write::Replace,
        );
        widest!(grad.iter_mut().zip(&*product).for_each(|(out, &value)| *out = A::to_narrow(value)));

        let heads = Attention { arithmetic: self.arithmetic, tokens, first_query: 0, queries, width, heads };
        let images = tile.qkv.chunks_exact(3 * tokens * width).zip(grad.chunks_exact(queries * width));
        for ((qkv, grad), dqkv) in images.zip(dqkv.chunks_exact_mut(3 * tokens * width)) {
            heads.backward(qkv, grad, attention, dqkv);
        }

        self.renormalise(P::Norm1Weight, tile.x, &mut normalised[..elements]);
        let input = A::group_rows(self.matrix(&normalised[..elements]), input_groups);
        add_narrow_rows::<A>(&mut sums[self.range(P::QkvBias)], dqkv);
        let packed = Rows::new(&*dqkv, rows, 3 * width);
        let left = A::group_rows(packed, other_groups).transposed();
        self.arithmetic.multiply(left, input, &mut sums[self.range(P::QkvWeight)], width, Write::Add);
        let dnorm = &mut dnorm[..elements];
        self.arithmetic.multiply(A::left(packed), self.weights.qkv, dnorm, width, Write::Replace);
    }

    /// [rows, width]
    fn matrix<'m>(&self, data: &'m [A::Narrow]) -> Rows<'m, A::Narrow> {
        Rows::new(data, data.len() / self.geometry.width, self.geometry.width)
    }

    fn range(&self, parameter: P) -> std::ops::Range<usize> {
        self.geometry.layout().range(parameter)
    }

    /// The normalisation whose weight is `gamma`; its bias follows it.
    fn norm_of(&self, gamma: P) -> Norm<'a, A::Wide> {
        let range = self.range(gamma);
        let (gamma, rest) = self.parameters[range.start..].split_at(range.len());
        Norm { gamma, beta: &rest[..range.len()], eps: self.geometry.norm_eps }
    }

    fn renormalise(&self, gamma: P, x: &[A::Wide], out: &mut [A::Narrow]) {
        widest!(self.norm_of(gamma).normalise(x, out, A::to_narrow));
    }

    /// Adds a normalisation's gradients onto `dx` and onto the sums of its weight and bias.
    fn norm(&self, gamma: P, x: &[A::Wide], grad: &[A::Wide], dx: &mut [A::Wide], sums: &mut [A::Wide]) {
        let range = self.range(gamma);
        let (dgamma, rest) = sums[range.start..].split_at_mut(range.len());
        let mut gradients = NormGradients { dx, dgamma, dbeta: &mut rest[..range.len()] };
        widest!(self.norm_of(gamma).add_gradients(x, grad, &mut gradients));
    }
}

/// What [`through_gelu`] writes.
struct Activations<'a, A: Arithmetic> {
    activated: &'a mut [A::Narrow],
    dhidden: &'a mut [A::Narrow],
    /// The bias's gradient, which is added to.
    bias: &'a mut [A::Wide],
}

/// From what stood before GELU and the gradient behind it: GELU again, and the gradient before it.
fn through_gelu<'a, A: Arithmetic>(
    mut before: impl Iterator<Item = &'a [A::Narrow]>,
    grad: &[A::Wide],
    out: Activations<'_, A>,
) {
    let Activations { activated, dhidden, bias } = out;
    let width = bias.len();
    widest! {
        let written = activated.chunks_exact_mut(width).zip(dhidden.chunks_exact_mut(width));
        for ((before, grad), (activated, dhidden)) in before.by_ref().zip(grad.chunks_exact(width)).zip(written) {
            let (before, grad) = (&before[..width], &grad[..width]);
            for i in 0..width {
                let (value, derivative) = gelu_with_derivative(A::to_wide(before[i]));
                let gradient = grad[i] * derivative;
                activated[i] = A::to_narrow(value);
                dhidden[i] = A::to_narrow(gradient);
                bias[i] += gradient;
            }
        }
    };
}

fn add_rows<T: Real>(sums: &mut [T], rows: &[T]) {
    widest! {
        for row in rows.chunks_exact(sums.len()) {
            sums.iter_mut().zip(row).for_each(|(sum, &value)| *sum += value);
        }
    };
}

fn add_narrow_rows<A: Arithmetic>(sums: &mut [A::Wide], rows: &[A::Narrow]) {
    widest! {
        for row in rows.chunks_exact(sums.len()) {
            sums.iter_mut().zip(row).for_each(|(sum, &value)| *sum += A::to_wide(value));
        }
    };
}
