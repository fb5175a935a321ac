//! Layer normalisation of each row: `(x - mean) / sqrt(variance + eps) * gamma + beta`, with the biased variance.
//!
//! Means and variances are taken in f64 and computed again in the backward pass, which is cheaper than to keep them.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::has_kernel;
use super::kernel::{
    Real, View, into_storage, rows_and_width, rows_per_part, slice, sum_over_parts, tensor_like, with_real,
};

/// `x` [.., width], `gamma` and `beta` [width] -> [.., width].
pub fn layer_norm(x: &Tensor, gamma: &Tensor, beta: &Tensor, eps: f64) -> Result<Tensor> {
    if !has_kernel(x) {
        return reference(x, gamma, beta, eps);
    }
    x.contiguous()?.apply_op3(&gamma.contiguous()?, &beta.contiguous()?, LayerNorm { eps })
}

pub(super) fn reference(x: &Tensor, gamma: &Tensor, beta: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normalised = centred.broadcast_div(&(variance + eps)?.sqrt()?)?;
    normalised.broadcast_mul(gamma)?.broadcast_add(beta)
}

struct LayerNorm {
    eps: f64,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, width) = rows_and_width(l1)?;
        if l2.dims() != [width] || l3.dims() != [width] || width == 0 {
            bail!("layer-norm: gamma {:?} and beta {:?} do not fit {:?}", l2.shape(), l3.shape(), l1.shape());
        }
        let storage = with_real!(s1.dtype(), "layer-norm", T => {
            let (x, gamma, beta) = (slice::<T>(s1, l1)?, slice::<T>(s2, l2)?, slice::<T>(s3, l3)?);
            Ok(into_storage(forward(x, gamma, beta, self.eps)))
        })?;
        Ok((storage, l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gamma: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        with_real!(x.dtype(), "layer-norm", T => {
            let (x_view, gamma_view, grad) = (View::of(x), View::of(gamma), View::of(&grad));
            let (x_data, grad) = (x_view.slice::<T>()?, grad.slice::<T>()?);
            let dx = input_gradient(x_data, gamma_view.slice()?, grad, self.eps);
            let (dgamma, dbeta) = parameter_gradients(x_data, grad, gamma.elem_count(), self.eps);
            Ok((Some(tensor_like(dx, x)?), Some(tensor_like(dgamma, gamma)?), Some(tensor_like(dbeta, gamma)?)))
        })
    }
}

/// Mean and reciprocal standard deviation of a row.
fn moments<T: Real>(row: &[T], eps: f64) -> (f64, f64) {
    let count = row.len() as f64;
    let mean = row.iter().fold(0.0, |sum, x| sum + x.wide()) / count;
    let squares = row.iter().fold(0.0, |sum, x| {
        let d = x.wide() - mean;
        sum + d * d
    });
    (mean, 1.0 / (squares / count + eps).sqrt())
}

fn forward<T: Real>(x: &[T], gamma: &[T], beta: &[T], eps: f64) -> Vec<T> {
    let width = gamma.len();
    let part = rows_per_part(x.len() / width) * width;
    let mut y = vec![T::ZERO; x.len()];
    y.par_chunks_mut(part).zip(x.par_chunks(part)).for_each(|(y, x)| {
        for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            let (mean, scale) = moments(x, eps);
            for (((y, x), gamma), beta) in y.iter_mut().zip(x).zip(gamma).zip(beta) {
                *y = T::narrow((x.wide() - mean) * scale * gamma.wide() + beta.wide());
            }
        }
    });
    y
}

/// With n = (x - mean) * scale and h = grad * gamma:  dx = scale * (h - mean(h) - n * mean(h * n)).
fn input_gradient<T: Real>(x: &[T], gamma: &[T], grad: &[T], eps: f64) -> Vec<T> {
    let width = gamma.len();
    let part = rows_per_part(x.len() / width) * width;
    let mut dx = vec![T::ZERO; x.len()];
    dx.par_chunks_mut(part).zip(x.par_chunks(part)).zip(grad.par_chunks(part)).for_each(|((dx, x), grad)| {
        for ((dx, x), grad) in
            dx.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(grad.chunks_exact(width))
        {
            let (mean, scale) = moments(x, eps);
            let (mut sum_h, mut sum_hn) = (0.0, 0.0);
            for ((x, grad), gamma) in x.iter().zip(grad).zip(gamma) {
                let h = grad.wide() * gamma.wide();
                sum_h += h;
                sum_hn += h * (x.wide() - mean) * scale;
            }
            let (mean_h, mean_hn) = (sum_h / width as f64, sum_hn / width as f64);
            for (((dx, x), grad), gamma) in dx.iter_mut().zip(x).zip(grad).zip(gamma) {
                let n = (x.wide() - mean) * scale;
                *dx = T::narrow(scale * (grad.wide() * gamma.wide() - mean_h - n * mean_hn));
            }
        }
    });
    dx
}

fn parameter_gradients<T: Real>(x: &[T], grad: &[T], width: usize, eps: f64) -> (Vec<T>, Vec<T>) {
    let rows = x.len() / width;
    let sums = sum_over_parts(rows, rows_per_part(rows), 2 * width, |part, sums: &mut [f64]| {
        let (dgamma, dbeta) = sums.split_at_mut(width);
        let elements = part.start * width..part.end * width;
        for (x, grad) in x[elements.clone()].chunks_exact(width).zip(grad[elements].chunks_exact(width)) {
            let (mean, scale) = moments(x, eps);
            for (((dgamma, dbeta), x), grad) in dgamma.iter_mut().zip(dbeta.iter_mut()).zip(x).zip(grad) {
                *dgamma += grad.wide() * (x.wide() - mean) * scale;
                *dbeta += grad.wide();
            }
        }
    });
    let narrow = |sums: &[f64]| sums.iter().map(|&sum| T::narrow(sum)).collect();
    (narrow(&sums[..width]), narrow(&sums[width..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradient_check::{assert_gradients, assert_same, random};

    #[test]
    fn gradients_equal_finite_differences() {
        let inputs = [random((2, 3, 6), 1), random(6, 2), random(6, 3)];
        assert_gradients(&inputs, |x| layer_norm(&x[0], &x[1], &x[2], 1e-6));
        assert_gradients(&inputs, |x| reference(&x[0], &x[1], &x[2], 1e-6));
    }

    #[test]
    fn several_parts_give_what_the_reference_gives() {
        let inputs = [random((70, 3, 5), 1), random(5, 2), random(5, 3)];
        let op = |x: &[Tensor]| layer_norm(&x[0], &x[1], &x[2], 1e-6);
        assert_same(&inputs, op, |x| reference(&x[0], &x[1], &x[2], 1e-6));
    }
}
