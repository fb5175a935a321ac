//! The block's forward pass over tiles of whole images.

use rayon::prelude::*;

use super::super::arithmetic::{Arithmetic, Rows};
use super::super::gelu::gelu;
use super::super::kernel::Real;
use super::super::layer_norm::Norm;
use super::super::matrix::Write;
use super::super::panels::Panels;
use super::attention::{self, Attention};
use super::weights::ForwardWeights;
use super::{BlockParameter as P, Geometry, MLP_RATIO, Saved};
use crate::widest::widest;

pub(super) struct Forward<'a, A: Arithmetic> {
    geometry: Geometry,
    arithmetic: A,
    parameters: &'a [A::Wide],
    weights: &'a ForwardWeights<A>,
}

/// One tile's share of [`Saved`].
struct Tile<'a, A: Arithmetic> {
    middle: &'a mut [A::Wide],
    qkv: &'a mut [A::Narrow],
    attended: &'a mut [A::Narrow],
    hidden: &'a mut [A::Narrow],
}

/// Room for the rows behind the attention.
struct BehindAttention<'a, A: Arithmetic> {
    attended: &'a mut [A::Narrow],
    middle: &'a mut [A::Wide],
    hidden: &'a mut [A::Narrow],
}

/// Parts of a lone image's rows at most: with more the products' blocks are no longer full. With fewer threads there are fewer, since
/// each part reads all weights. A row's results are the same in any part: kernels of our own sum each element over the depth in
/// order, and a test holds the `gemm` crate to it.
const ROW_PARTS: usize = 4;

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
        weights: &'a ForwardWeights<A>,
    ) -> Self {
        Forward { geometry, arithmetic, parameters, weights }
    }

    /// `x` [batch * tokens, width] -> [batch * queries, width].
    pub(super) fn run(&self, x: &[A::Wide]) -> Vec<A::Wide> {
        let Geometry { batch, tokens, width, .. } = self.geometry;
        let mut y = self.zeros();
        if batch == 1 {
            self.run_by_rows(x, &mut y);
            return y;
        }
        let room = || (Scratch::new(), Saved::new(&self.geometry, self.geometry.images_per_tile()));
        self.tiles(&mut y, x).for_each_init(room, |(scratch, room), (y, x)| {
            let tile = room.first_tile(&self.geometry, x.len() / (tokens * width));
            self.tile(x, tile, scratch, y);
        });
        y
    }

    /// One image, whose rows are shared out: first up to the keys and values, which every row then reads.
    fn run_by_rows(&self, x: &[A::Wide], y: &mut [A::Wide]) {
        let Geometry { tokens, queries, width, .. } = self.geometry;
        let mut qkv = vec![A::Narrow::default(); tokens * 3 * width];
        let threads = rayon::current_num_threads().min(ROW_PARTS);
        let rows = tokens.div_ceil(threads);
        let parts = qkv.par_chunks_mut(rows * 3 * width).zip(x.par_chunks(rows * width));
        parts.for_each_init(Scratch::new, |scratch, (qkv, x)| self.project(x, qkv, scratch));
        let rows = queries.div_ceil(threads);
        let room = || {
            let narrow = |width: usize| vec![A::Narrow::default(); rows * width];
            let middle = vec![A::Wide::ZERO; rows * width];
            (Scratch::new(), middle, narrow(width), narrow(self.geometry.hidden()))
        };
        let parts = y.par_chunks_mut(rows * width).enumerate();
        parts.for_each_init(room, |(scratch, middle, attended, hidden), (part, y)| {
            let count = y.len() / width;
            let kept = std::iter::once(&x[part * rows * width..][..y.len()]);
            let behind = BehindAttention {
                attended: &mut attended[..y.len()],
                middle: &mut middle[..y.len()],
                hidden: &mut hidden[..count * self.geometry.hidden()],
            };
            let attention = self.attention(part * rows, count);
            attention.forward(&qkv, &mut scratch.attention, behind.attended);
            self.finish(kept, behind, scratch, y);
        });
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
        let Tile { middle, qkv, attended, hidden } = tile;
        self.project(x, qkv, scratch);
        let images = qkv.chunks_exact(3 * tokens * width).zip(attended.chunks_exact_mut(queries * width));
        let attention = self.attention(0, queries);
        images.for_each(|(qkv, out)| attention.forward(qkv, &mut scratch.attention, out));
        // The rows behind the attention: of each image the first `queries`.
        let kept = x.chunks_exact(tokens * width).map(|image| &image[..queries * width]);
        self.finish(kept, BehindAttention { attended, middle, hidden }, scratch, y);
    }

    fn attention(&self, first_query: usize, queries: usize) -> Attention<A> {
        let Geometry { tokens, width, heads, .. } = self.geometry;
        Attention { arithmetic: self.arithmetic, tokens, first_query, queries, width, heads }
    }

    /// Queries, keys and values of `x` [rows, width], into `qkv` [rows, 3 width].
    fn project(&self, x: &[A::Wide], qkv: &mut [A::Narrow], scratch: &mut Scratch<A>) {
        let width = self.geometry.width;
        let Scratch { product, operand, .. } = scratch;
        product.resize(x.len(), A::Wide::ZERO);
        operand.resize(x.len(), A::Narrow::default());
        widest!(self.norm(P::Norm1Weight, P::Norm1Bias).normalise(x, operand, A::to_narrow));
        let biases = self.parameter(P::QkvBias).chunks_exact(width);
        for (part, (weight, bias)) in self.weights.qkv.iter().zip(biases).enumerate() {
            self.multiply(operand, weight, product, Write::Replace);
            let out = qkv.chunks_exact_mut(3 * width).map(|row| &mut row[part * width..][..width]);
            store::<A>(product, bias, out);
        }
    }

    /// From the attention's results to the block's, of rows whose inputs come in the pieces of `x`.
    fn finish<'x>(
        &self,
        x: impl Iterator<Item = &'x [A::Wide]>,
        rows: BehindAttention<'_, A>,
        scratch: &mut Scratch<A>,
        y: &mut [A::Wide],
    ) {
        let width = self.geometry.width;
        let BehindAttention { attended, middle, hidden } = rows;
        let Scratch { product, operand, activated, .. } = scratch;
        product.resize(y.len(), A::Wide::ZERO);
        operand.resize(y.len(), A::Narrow::default());
        activated.resize(y.len(), A::Narrow::default());
        start_with(middle, x, self.parameter(P::ProjBias));
        self.multiply(attended, &self.weights.proj, middle, Write::Add);

        widest!(self.norm(P::Norm2Weight, P::Norm2Bias).normalise(middle, operand, A::to_narrow));
        start_with(y, std::iter::once(&*middle), self.parameter(P::Fc2Bias));
        let weights = self.weights.fc1.iter().zip(&self.weights.fc2);
        let biases = self.parameter(P::Fc1Bias).chunks_exact(width);
        for (part, ((fc1, fc2), bias)) in weights.zip(biases).enumerate() {
            self.multiply(operand, fc1, product, Write::Replace);
            let rows = hidden.chunks_exact_mut(MLP_RATIO * width);
            let hidden = rows.map(|row| &mut row[part * width..][..width]);
            store_activated::<A>(product, bias, hidden, activated);
            self.multiply(activated, fc2, y, Write::Add);
        }
    }

    /// `left` [rows, width] times `right` [width, width], into [rows, width].
    fn multiply(&self, left: &[A::Narrow], right: &Panels<A>, out: &mut [A::Wide], write: Write) {
        let width = self.geometry.width;
        let left = A::left(Rows::new(left, left.len() / width, width));
        self.arithmetic.multiply(left, right.right(), out, width, write);
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
