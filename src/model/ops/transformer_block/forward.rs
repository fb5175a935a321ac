//! The block's forward pass over tiles of whole images.

use rayon::prelude::*;

use super::super::arithmetic::{Arithmetic, Right, Rows};
use super::super::gelu::gelu;
use super::super::kernel::Real;
use super::super::layer_norm::Norm;
use super::super::matrix::Write;
use super::super::vector::widest;
use super::attention::{self, Attention};
use super::weights::{WeightBuffers, Weights};
use super::{BlockParameter as P, Geometry, MLP_RATIO, Saved};

pub(super) struct Forward<'a, A: Arithmetic> {
    geometry: Geometry,
    arithmetic: A,
    parameters: &'a [A::Wide],
    /// Contracted over their inputs.
    weights: Weights<'a, A>,
}

/// One tile's share of [`Saved`].
struct Tile<'a, A: Arithmetic> {
    middle: &'a mut [A::Wide],
    qkv: &'a mut [A::Narrow],
    attended: &'a mut [A::Narrow],
    hidden: &'a mut [A::Narrow],
}

impl<A: Arithmetic> Saved<A> {
    /// The shares of the tiles, in order.
    fn tiles<'a>(&'a mut self, geometry: &Geometry) -> impl IndexedParallelIterator<Item = Tile<'a, A>> {
        let width = geometry.width;
        let (rows, queries) = (geometry.rows_per_tile(), geometry.queries_per_tile());
        self.middle
            .par_chunks_mut(queries * width)
            .zip(self.qkv.par_chunks_mut(rows * 3 * width))
            .zip(self.attended.par_chunks_mut(queries * width))
            .zip(self.hidden.par_chunks_mut(queries * geometry.hidden()))
            .map(|(((middle, qkv), attended), hidden)| Tile { middle, qkv, attended, hidden })
    }

    /// The share of the first `images` images.
    fn first_tile(&mut self, geometry: &Geometry, images: usize) -> Tile<'_, A> {
        let (rows, queries) = (images * geometry.tokens, images * geometry.queries);
        Tile {
            middle: &mut self.middle[..queries * geometry.width],
            qkv: &mut self.qkv[..rows * 3 * geometry.width],
            attended: &mut self.attended[..queries * geometry.width],
            hidden: &mut self.hidden[..queries * geometry.hidden()],
        }
    }
}

/// Buffers of one thread: [rows of a tile, width] each.
struct Scratch<A: Arithmetic> {
    product: Vec<A::Wide>,
    operand: Vec<A::Narrow>,
    /// A part of the hidden layer, behind GELU.
    activated: Vec<A::Narrow>,
    attention: attention::Scratch<A>,
}

impl<A: Arithmetic> Scratch<A> {
    fn new() -> Self {
        Scratch {
            product: Vec::new(),
            operand: Vec::new(),
            activated: Vec::new(),
            attention: attention::Scratch::new(),
        }
    }
}

impl<'a, A: Arithmetic> Forward<'a, A> {
    pub(super) fn new(
        geometry: Geometry,
        arithmetic: A,
        parameters: &'a [A::Wide],
        buffers: &'a mut WeightBuffers<A>,
    ) -> Self {
        let weights = Weights::new(&geometry, parameters, buffers, A::group_columns);
        Forward { geometry, arithmetic, parameters, weights }
    }

    /// `x` [batch * tokens, width] -> [batch * queries, width].
    pub(super) fn run(&self, x: &[A::Wide]) -> Vec<A::Wide> {
        let Geometry { tokens, width, .. } = self.geometry;
        let mut y = self.zeros();
        let room = || (Scratch::new(), Saved::new(&self.geometry, self.geometry.images_per_tile()));
        self.tiles(&mut y, x).for_each_init(room, |(scratch, room), (y, x)| {
            let tile = room.first_tile(&self.geometry, x.len() / (tokens * width));
            self.tile(x, tile, scratch, y);
        });
        y
    }

    /// The same, keeping what the backward pass reads.
    pub(super) fn run_and_save(&self, x: &[A::Wide], saved: &mut Saved<A>) -> Vec<A::Wide> {
        let mut y = self.zeros();
        let tiles = self.tiles(&mut y, x).zip(saved.tiles(&self.geometry));
        tiles.for_each_init(Scratch::new, |scratch, ((y, x), tile)| self.tile(x, tile, scratch, y));
        y
    }

    fn zeros(&self) -> Vec<A::Wide> {
        let Geometry { batch, queries, width, .. } = self.geometry;
        vec![A::Wide::ZERO; batch * queries * width]
    }

    /// Result and input, tile by tile.
    fn tiles<'t>(
        &self,
        y: &'t mut [A::Wide],
        x: &'t [A::Wide],
    ) -> impl IndexedParallelIterator<Item = (&'t mut [A::Wide], &'t [A::Wide])> + use<'t, A> {
        let width = self.geometry.width;
        y.par_chunks_mut(self.geometry.queries_per_tile() * width)
            .zip(x.par_chunks(self.geometry.rows_per_tile() * width))
    }

    fn parameter(&self, parameter: P) -> &'a [A::Wide] {
        &self.parameters[self.geometry.layout().range(parameter)]
    }

    fn norm(&self, gamma: P, beta: P) -> Norm<'a, A::Wide> {
        Norm { gamma: self.parameter(gamma), beta: self.parameter(beta), eps: self.geometry.norm_eps }
    }

    fn tile(&self, x: &[A::Wide], tile: Tile<'_, A>, scratch: &mut Scratch<A>, y: &mut [A::Wide]) {
        let Geometry { tokens, queries, width, .. } = self.geometry;
        let Scratch { product, operand, activated, attention } = scratch;
        product.resize(x.len(), A::Wide::ZERO);
        operand.resize(x.len(), A::Narrow::default());
        activated.resize(y.len(), A::Narrow::default());

        widest!(self.norm(P::Norm1Weight, P::Norm1Bias).normalise(x, operand, A::to_narrow));
        for (part, bias) in self.parameter(P::QkvBias).chunks_exact(width).enumerate() {
            self.multiply(operand, self.weights.qkv.columns(part * width, width), product, Write::Replace);
            let out = tile.qkv.chunks_exact_mut(3 * width).map(|row| &mut row[part * width..][..width]);
            store::<A>(product, bias, out);
        }
        self.attend(tile.qkv, attention, tile.attended);
        // The rows behind the attention: of each image the first `queries`.
        let (product, operand) = (&mut product[..y.len()], &mut operand[..y.len()]);
        let kept = x.chunks_exact(tokens * width).map(|image| &image[..queries * width]);
        start_with(tile.middle, kept, self.parameter(P::ProjBias));
        self.multiply(tile.attended, self.weights.proj, tile.middle, Write::Add);

        widest!(self.norm(P::Norm2Weight, P::Norm2Bias).normalise(tile.middle, operand, A::to_narrow));
        start_with(y, std::iter::once(&*tile.middle), self.parameter(P::Fc2Bias));
        for (part, bias) in self.parameter(P::Fc1Bias).chunks_exact(width).enumerate() {
            self.multiply(operand, self.weights.fc1.columns(part * width, width), product, Write::Replace);
            let hidden =
                tile.hidden.chunks_exact_mut(MLP_RATIO * width).map(|row| &mut row[part * width..][..width]);
            store_activated::<A>(product, bias, hidden, activated);
            let groups = width / A::GROUP;
            self.multiply(activated, self.weights.fc2.groups(part * groups, groups), y, Write::Add);
        }
    }

    fn attend(&self, qkv: &[A::Narrow], scratch: &mut attention::Scratch<A>, out: &mut [A::Narrow]) {
        let Geometry { tokens, queries, width, heads, .. } = self.geometry;
        let attention = Attention { arithmetic: self.arithmetic, tokens, queries, width, heads };
        let images = qkv.chunks_exact(3 * tokens * width).zip(out.chunks_exact_mut(queries * width));
        images.for_each(|(qkv, out)| attention.forward(qkv, scratch, out));
    }

    /// `left` [rows, width] times `right` [width, width], into [rows, width].
    fn multiply(&self, left: &[A::Narrow], right: Right<'_, A::Narrow>, out: &mut [A::Wide], write: Write) {
        let width = self.geometry.width;
        let left = A::left(Rows::new(left, left.len() / width, width));
        self.arithmetic.multiply(left, right, out, width, write);
    }
}

/// What products are then added onto: the rows of `x`, which comes in pieces, + `bias`.
fn start_with<'a, T: Real>(out: &mut [T], x: impl Iterator<Item = &'a [T]>, bias: &[T]) {
    let mut out = out.chunks_exact_mut(bias.len());
    for piece in x {
        widest! {
            for (x, out) in piece.chunks_exact(bias.len()).zip(out.by_ref()) {
                out.iter_mut().zip(x).zip(bias).for_each(|((out, &x), &bias)| *out = x + bias);
            }
        }
    }
}

/// `product` + `bias`, as operands.
fn store<'a, A: Arithmetic>(
    product: &[A::Wide],
    bias: &[A::Wide],
    mut rows: impl Iterator<Item = &'a mut [A::Narrow]>,
) {
    widest! {
        for (out, product) in rows.by_ref().zip(product.chunks_exact(bias.len())) {
            out.iter_mut().zip(product).zip(bias).for_each(|((out, &p), &bias)| *out = A::to_narrow(p + bias));
        }
    };
}

/// `hidden` = `product` + `bias`, and `activated` = GELU of it.
fn store_activated<'a, A: Arithmetic>(
    product: &[A::Wide],
    bias: &[A::Wide],
    mut hidden: impl Iterator<Item = &'a mut [A::Narrow]>,
    activated: &mut [A::Narrow],
) {
    let width = bias.len();
    widest! {
        let rows = hidden.by_ref().zip(activated.chunks_exact_mut(width)).zip(product.chunks_exact(width));
        for ((hidden, activated), product) in rows {
            for (((hidden, activated), &product), &bias) in hidden.iter_mut().zip(activated).zip(product).zip(bias) {
                let value = product + bias;
                *hidden = A::to_narrow(value);
                *activated = A::to_narrow(gelu(value));
            }
        }
    };
}
