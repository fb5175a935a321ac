//! Multi-head self-attention inside one image: `softmax(Q K^T / sqrt(head width)) V`.
//!
//! The probabilities are not kept (they would be the largest tensor of the network): the backward pass computes them
//! again. Queries, keys and values lie packed in `qkv` [tokens, 3 * width], in the order in which timm's layer writes.

use candle_core::{Result, Tensor};

use super::super::arithmetic::{Arithmetic, Left, Precision, Right, Rows};
use super::super::kernel::Real;
use super::super::matrix::Write;
use super::super::product::product;
use super::super::softmax::scaled_softmax;
use super::super::vector::{softmax, softmax_gradient};
use crate::widest::widest;

/// `qkv` [batch, tokens, 3 * width] -> [batch, tokens, width]
pub(super) fn reference(qkv: &Tensor, heads: usize, precision: Precision) -> Result<Tensor> {
    let (batch, tokens, packed) = qkv.dims3()?;
    let (width, head_width) = (packed / 3, packed / 3 / heads);
    let qkv = qkv.reshape((batch, tokens, 3, heads, head_width))?.permute((2, 0, 3, 1, 4))?;
    let part = |index: usize| qkv.narrow(0, index, 1)?.squeeze(0)?.contiguous();
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    let scores = product(&q, &k.transpose(2, 3)?.contiguous()?, precision)?;
    let probabilities = scaled_softmax(&scores, 1.0 / (head_width as f64).sqrt())?;
    product(&probabilities, &v, precision)?.transpose(1, 2)?.contiguous()?.reshape((batch, tokens, width))
}

#[derive(Clone, Copy)]
pub(super) struct Attention<A> {
    pub arithmetic: A,
    pub tokens: usize,
    /// Tokens whose results are computed: `queries` from `first_query` on.
    pub first_query: usize,
    pub queries: usize,
    pub width: usize,
    pub heads: usize,
}

/// Buffers of one thread.
pub(super) struct Scratch<A: Arithmetic> {
    /// [queries, tokens]
    probabilities: Vec<A::Wide>,
    /// [queries, tokens]
    scores: Vec<A::Wide>,
    /// The same as an operand, each row padded to whole groups: [queries, padded tokens].
    operand: Vec<A::Narrow>,
    /// [queries or tokens, head width]
    product: Vec<A::Wide>,
    groups: [Vec<A::Narrow>; 2],
}

impl<A: Arithmetic> Scratch<A> {
    pub(super) fn new() -> Self {
        Scratch {
            probabilities: Vec::new(),
            scores: Vec::new(),
            operand: Vec::new(),
            product: Vec::new(),
            groups: [Vec::new(), Vec::new()],
        }
    }
}

impl<A: Arithmetic> Attention<A> {
    fn head_width(&self) -> usize {
        self.width / self.heads
    }

    fn scale(&self) -> A::Wide {
        A::Wide::narrow(1.0 / (self.head_width() as f64).sqrt())
    }

    fn padded_tokens(&self) -> usize {
        self.tokens.next_multiple_of(A::GROUP)
    }

    /// One head's queries, keys or values inside one image of `qkv`.
    fn packed<'a>(&self, qkv: &'a [A::Narrow], part: usize, head: usize) -> Rows<'a, A::Narrow> {
        let (first, rows) = if part == 0 { (self.first_query, self.queries) } else { (0, self.tokens) };
        let data = &qkv[(3 * first + part) * self.width + head * self.head_width()..];
        Rows { data, rows, columns: self.head_width(), stride: 3 * self.width }
    }

    /// `out` [queries, width] of `qkv` [tokens, 3 * width].
    pub(super) fn forward(&self, qkv: &[A::Narrow], scratch: &mut Scratch<A>, out: &mut [A::Narrow]) {
        for head in 0..self.heads {
            self.probabilities(qkv, head, scratch);
            let Scratch { probabilities, operand, product, groups, .. } = scratch;
            narrow_scores::<A>(probabilities, self.tokens, operand);
            let values = A::group_rows(self.packed(qkv, 2, head), &mut groups[0]);
            self.multiply_scores(operand, values, product);
            self.store(product, out, self.width, head * self.head_width());
        }
    }

    /// The gradient of `qkv`, from the gradient of the result [queries, width]:
    /// dV = P^T dO;  dP = dO V^T;  dS = P (dP - sum(dP P)) * scale;  dQ = dS K;  dK = dS^T Q.
    pub(super) fn backward(
        &self,
        qkv: &[A::Narrow],
        grad: &[A::Narrow],
        scratch: &mut Scratch<A>,
        dqkv: &mut [A::Narrow],
    ) {
        // Tokens that asked nothing have no gradient there.
        if self.queries < self.tokens {
            dqkv.fill(A::Narrow::default());
        }
        for head in 0..self.heads {
            let at = head * self.head_width();
            self.probabilities(qkv, head, scratch);
            let Scratch { probabilities, scores, operand, product, groups: [first, second] } = scratch;
            let grad = Rows {
                data: &grad[at..],
                rows: self.queries,
                columns: self.head_width(),
                stride: self.width,
            };
            narrow_scores::<A>(probabilities, self.tokens, operand);
            let transposed = A::group_rows(self.scores(operand), first).transposed();
            self.multiply(transposed, A::group_rows(grad, second), product);
            self.store(product, dqkv, 3 * self.width, 2 * self.width + at);

            scores.resize(self.queries * self.tokens, A::Wide::ZERO);
            let values = A::group_columns(self.packed(qkv, 2, head), first);
            self.arithmetic.multiply(A::left(grad), values, scores, self.tokens, Write::Replace);
            self.score_gradients(scores, probabilities);
            narrow_scores::<A>(scores, self.tokens, operand);
            let keys = A::group_rows(self.packed(qkv, 1, head), first);
            self.multiply_scores(operand, keys, product);
            self.store(product, dqkv, 3 * self.width, at);

            let transposed = A::group_rows(self.scores(operand), first).transposed();
            self.multiply(transposed, A::group_rows(self.packed(qkv, 0, head), second), product);
            self.store(product, dqkv, 3 * self.width, self.width + at);
        }
    }

    /// softmax(Q K^T * scale) of one head, into the scratch.
    fn probabilities(&self, qkv: &[A::Narrow], head: usize, scratch: &mut Scratch<A>) {
        let Scratch { probabilities, groups, .. } = scratch;
        probabilities.resize(self.queries * self.tokens, A::Wide::ZERO);
        let keys = A::group_columns(self.packed(qkv, 1, head), &mut groups[0]);
        let queries = A::left(self.packed(qkv, 0, head));
        self.arithmetic.multiply(queries, keys, probabilities, self.tokens, Write::Replace);
        let scale = self.scale();
        widest! {
            for row in probabilities.chunks_exact_mut(self.tokens) {
                row.iter_mut().for_each(|score| *score *= scale);
                softmax(row);
            }
        };
    }

    fn score_gradients(&self, grad: &mut [A::Wide], probabilities: &[A::Wide]) {
        let scale = self.scale();
        widest! {
            for (grad, p) in grad.chunks_exact_mut(self.tokens).zip(probabilities.chunks_exact(self.tokens)) {
                softmax_gradient(grad, p);
                grad.iter_mut().for_each(|score| *score *= scale);
            }
        };
    }

    /// [queries, tokens], rows padded.
    fn scores<'a>(&self, operand: &'a [A::Narrow]) -> Rows<'a, A::Narrow> {
        Rows { data: operand, rows: self.queries, columns: self.tokens, stride: self.padded_tokens() }
    }

    /// `operand` [queries, padded tokens] times `right` [tokens, head width].
    fn multiply_scores(
        &self,
        operand: &[A::Narrow],
        right: Right<'_, A::Narrow>,
        product: &mut Vec<A::Wide>,
    ) {
        let padded = Rows { columns: self.padded_tokens(), ..self.scores(operand) };
        self.multiply(A::left(padded), right, product);
    }

    fn multiply(&self, left: Left<'_, A::Narrow>, right: Right<'_, A::Narrow>, product: &mut Vec<A::Wide>) {
        product.resize(left.rows * self.head_width(), A::Wide::ZERO);
        self.arithmetic.multiply(left, right, product, self.head_width(), Write::Replace);
    }

    /// Writes rows of [head width] into columns of `out`, from `at` on.
    fn store(&self, product: &[A::Wide], out: &mut [A::Narrow], stride: usize, at: usize) {
        widest! {
            for (out, row) in out.chunks_exact_mut(stride).zip(product.chunks_exact(self.head_width())) {
                let out = &mut out[at..at + row.len()];
                out.iter_mut().zip(row).for_each(|(out, &value)| *out = A::to_narrow(value));
            }
        };
    }
}

/// [queries, tokens] -> [queries, tokens padded to whole groups]; the padding is zero.
fn narrow_scores<A: Arithmetic>(scores: &[A::Wide], tokens: usize, operand: &mut Vec<A::Narrow>) {
    let padded = tokens.next_multiple_of(A::GROUP);
    operand.resize(scores.len() / tokens * padded, A::Narrow::default());
    widest! {
        for (out, row) in operand.chunks_exact_mut(padded).zip(scores.chunks_exact(tokens)) {
            out.iter_mut().zip(row).for_each(|(out, &value)| *out = A::to_narrow(value));
            out[tokens..].fill(A::Narrow::default());
        }
    }
}
