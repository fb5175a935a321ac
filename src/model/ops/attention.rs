//! Multi-head self-attention on packed queries, keys and values: `softmax(Q K^T / sqrt(head width)) V`.
//!
//! The probabilities are not kept (they would be the largest tensor of the network): the backward pass computes them
//! again. Parts are whole images.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::has_kernel;
use super::kernel::{Real, View, into_storage, slice, tensor_like, with_real};
use super::matrix::{Matrix, Shape as MatrixShape, Write};

/// `qkv` [batch, tokens, 3 * width], in each token queries, keys, values of `width`, each cut into `heads`
/// -> [batch, tokens, width]. This is the order in which timm's `qkv` layer writes.
pub fn attention(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    if !has_kernel(qkv) {
        return reference(qkv, heads);
    }
    qkv.contiguous()?.apply_op1(Attention { heads })
}

pub(super) fn reference(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    let Geometry { batch, tokens, width, head_width, .. } = Geometry::of(qkv.layout(), heads)?;
    let qkv = qkv.reshape((batch, tokens, 3, heads, head_width))?.permute((2, 0, 3, 1, 4))?;
    let part = |index: usize| qkv.narrow(0, index, 1)?.squeeze(0)?.contiguous();
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    let scores = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? / (head_width as f64).sqrt())?;
    // The shift cancels in the quotient: it is a constant of the graph.
    let shift = scores.max_keepdim(D::Minus1)?.detach();
    let weights = scores.broadcast_sub(&shift)?.exp()?;
    let probabilities = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    probabilities.matmul(&v)?.transpose(1, 2)?.contiguous()?.reshape((batch, tokens, width))
}

struct Attention {
    heads: usize,
}

#[derive(Clone, Copy)]
struct Geometry {
    batch: usize,
    tokens: usize,
    width: usize,
    heads: usize,
    head_width: usize,
}

impl Geometry {
    fn of(qkv: &Layout, heads: usize) -> Result<Self> {
        let (batch, tokens, packed) = qkv.shape().dims3()?;
        if heads == 0 || packed % (3 * heads) != 0 || batch * tokens * packed == 0 {
            bail!("attention: {heads} heads do not fit packed queries, keys and values {:?}", qkv.shape());
        }
        let width = packed / 3;
        Ok(Geometry { batch, tokens, width, heads, head_width: width / heads })
    }

    fn scale(&self) -> f64 {
        1.0 / (self.head_width as f64).sqrt()
    }

    /// One head's queries, keys or values inside one image of `qkv`.
    fn packed(&self) -> MatrixShape {
        MatrixShape::with_row_stride(self.tokens, self.head_width, 3 * self.width)
    }

    /// One head's share inside one image of the result.
    fn merged(&self) -> MatrixShape {
        MatrixShape::with_row_stride(self.tokens, self.head_width, self.width)
    }

    fn square(&self) -> MatrixShape {
        MatrixShape::row_major(self.tokens, self.tokens)
    }

    fn offsets(&self, head: usize) -> Offsets {
        let q = head * self.head_width;
        Offsets { q, k: q + self.width, v: q + 2 * self.width }
    }

    fn forward<T: Real>(&self, qkv: &[T]) -> Vec<T> {
        let image_out = self.tokens * self.width;
        let mut out = vec![T::ZERO; self.batch * image_out];
        let images = out.par_chunks_mut(image_out).zip(qkv.par_chunks(3 * image_out));
        images.for_each_init(Vec::new, |probabilities, (out, qkv)| {
            for head in 0..self.heads {
                let at = self.offsets(head);
                self.probabilities(qkv, at, probabilities);
                let values = Matrix::new(&qkv[at.v..], self.packed());
                let p = Matrix::new(probabilities, self.square());
                p.multiply_into(values, 1.0, &mut out[at.q..], self.merged(), Write::Replace);
            }
        });
        out
    }

    /// softmax(Q K^T * scale) of one head of one image.
    fn probabilities<T: Real>(&self, qkv: &[T], at: Offsets, p: &mut Vec<T>) {
        p.resize(self.tokens * self.tokens, T::ZERO);
        let q = Matrix::new(&qkv[at.q..], self.packed());
        let k = Matrix::new(&qkv[at.k..], self.packed().transposed());
        q.multiply_into(k, self.scale(), p, self.square(), Write::Replace);
        p.chunks_exact_mut(self.tokens).for_each(softmax);
    }

    fn backward<T: Real>(&self, qkv: &[T], grad: &[T]) -> Vec<T> {
        let image_out = self.tokens * self.width;
        let mut dqkv = vec![T::ZERO; qkv.len()];
        let images = dqkv
            .par_chunks_mut(3 * image_out)
            .zip(qkv.par_chunks(3 * image_out))
            .zip(grad.par_chunks(image_out));
        images.for_each_init(Scratch::default, |scratch, ((dqkv, qkv), grad)| {
            for head in 0..self.heads {
                self.backward_head(qkv, grad, self.offsets(head), scratch, dqkv);
            }
        });
        dqkv
    }

    /// dV = P^T dO;  dP = dO V^T;  dS = P (dP - sum(dP P));  dQ = dS K * scale;  dK = dS^T Q * scale.
    fn backward_head<T: Real>(
        &self,
        qkv: &[T],
        grad: &[T],
        at: Offsets,
        scratch: &mut Scratch<T>,
        dqkv: &mut [T],
    ) {
        let (packed, square) = (self.packed(), self.square());
        let Scratch { probabilities, scores } = scratch;
        self.probabilities(qkv, at, probabilities);
        let grad = Matrix::new(&grad[at.q..], self.merged());
        let p = Matrix::new(probabilities, square.transposed());
        p.multiply_into(grad, 1.0, &mut dqkv[at.v..], packed, Write::Replace);

        scores.resize(self.tokens * self.tokens, T::ZERO);
        let values = Matrix::new(&qkv[at.v..], packed.transposed());
        grad.multiply_into(values, 1.0, scores, square, Write::Replace);
        for (ds, p) in scores.chunks_exact_mut(self.tokens).zip(probabilities.chunks_exact(self.tokens)) {
            softmax_gradient(ds, p);
        }
        let ds = Matrix::new(scores, square);
        let keys = Matrix::new(&qkv[at.k..], packed);
        ds.multiply_into(keys, self.scale(), &mut dqkv[at.q..], packed, Write::Replace);
        let ds = Matrix::new(scores, square.transposed());
        let queries = Matrix::new(&qkv[at.q..], packed);
        ds.multiply_into(queries, self.scale(), &mut dqkv[at.k..], packed, Write::Replace);
    }
}

/// Where one head's queries, keys and values start within an image.
#[derive(Clone, Copy)]
struct Offsets {
    q: usize,
    k: usize,
    v: usize,
}

struct Scratch<T> {
    probabilities: Vec<T>,
    scores: Vec<T>,
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Scratch { probabilities: Vec::new(), scores: Vec::new() }
    }
}

fn softmax<T: Real>(row: &mut [T]) {
    let largest = row.iter().copied().fold(T::narrow(f64::NEG_INFINITY), |a, b| if b > a { b } else { a });
    let mut sum = T::ZERO;
    for value in row.iter_mut() {
        *value = (*value - largest).exp();
        sum += *value;
    }
    for value in row.iter_mut() {
        *value /= sum;
    }
}

/// Turns the gradient by the probabilities into the gradient by the scores.
fn softmax_gradient<T: Real>(grad: &mut [T], probabilities: &[T]) {
    let mut inner = T::ZERO;
    for (&g, &p) in grad.iter().zip(probabilities) {
        inner += g * p;
    }
    for (g, &p) in grad.iter_mut().zip(probabilities) {
        *g = p * (*g - inner);
    }
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let geometry = Geometry::of(layout, self.heads)?;
        let storage = with_real!(storage.dtype(), "attention", T => {
            Ok(into_storage(geometry.forward::<T>(slice(storage, layout)?)))
        })?;
        Ok((storage, Shape::from((geometry.batch, geometry.tokens, geometry.width))))
    }

    fn bwd(&self, qkv: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let geometry = Geometry::of(qkv.layout(), self.heads)?;
        let grad = grad.contiguous()?;
        with_real!(qkv.dtype(), "attention", T => {
            tensor_like(geometry.backward::<T>(View::of(qkv).slice()?, View::of(&grad).slice()?), qkv)
        })
        .map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradient_check::{assert_gradients, assert_same, random};

    #[test]
    fn gradients_equal_finite_differences() {
        let inputs = [(random((2, 3, 3 * 4), 1) * 2.0).unwrap()];
        assert_gradients(&inputs, |x| attention(&x[0], 2));
        assert_gradients(&inputs, |x| reference(&x[0], 2));
    }

    #[test]
    fn many_tokens_and_heads_give_what_the_reference_gives() {
        let inputs = [(random((3, 20, 3 * 12), 1) * 2.0).unwrap()];
        assert_same(&inputs, |x| attention(&x[0], 3), |x| reference(&x[0], 3));
    }

    #[test]
    fn heads_that_do_not_divide_the_width_are_refused() {
        assert!(attention(&random((1, 2, 12), 1), 3).is_err());
    }
}
