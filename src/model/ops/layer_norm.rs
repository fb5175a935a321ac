//! Layer normalisation of each row: `(x - mean) / sqrt(variance + eps) * gamma + beta`, with the biased variance.
//!
//! Means and variances are computed again in the backward pass, which is cheaper than to keep them.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor, bail};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, Device};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use super::gpu::{self, Matrix, cuda};
use super::kernel::{
    Real, View, into_storage, rows_and_width, rows_per_part, slice, sum_in_order, tensor_like, with_real,
};
use super::vector::{mean_and_scale, sum_of, sum_of_three};
use super::{has_gpu_kernel, has_kernel};
use crate::widest::widest;

/// `x` [.., width], `gamma` and `beta` [width] -> [.., width].
pub fn layer_norm(x: &Tensor, gamma: &Tensor, beta: &Tensor, eps: f64) -> Result<Tensor> {
    if !has_kernel(x) && !has_gpu_kernel(x) {
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
        check(l1, l2, l3)?;
        let storage = with_real!(s1.dtype(), "layer-norm", T => {
            let (x, gamma, beta) = (slice::<T>(s1, l1)?, slice::<T>(s2, l2)?, slice::<T>(s3, l3)?);
            Ok(into_storage(forward(x, Norm { gamma, beta, eps: self.eps })))
        })?;
        Ok((storage, l1.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        check(l1, l2, l3)?;
        let inputs = [cuda::span(s1, l1)?, cuda::span(s2, l2)?, cuda::span(s3, l3)?];
        let y = gpu::layer_norm::forward(s1.device(), inputs, Matrix::of(l1)?, self.eps)?;
        Ok((cuda::into_storage(y, s1.device()), l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gamma: &Tensor,
        beta: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = x.device() {
            let views = [cuda::View::of(x), cuda::View::of(gamma), cuda::View::of(&grad)];
            let inputs = [views[0].span()?, views[1].span()?, views[2].span()?];
            let gradients = gpu::layer_norm::backward(device, inputs, Matrix::of(x.layout())?, self.eps)?;
            let dx = cuda::into_tensor(gradients.dx, device, x.shape());
            let parameters = cuda::into_tensor(gradients.parameters, device, (2, gamma.elem_count()));
            return Ok((Some(dx), Some(parameters.get(0)?), Some(parameters.get(1)?)));
        }
        with_real!(x.dtype(), "layer-norm", T => {
            let (x_view, gamma_view, beta_view, grad) = (View::of(x), View::of(gamma), View::of(beta), View::of(&grad));
            let norm = Norm { gamma: gamma_view.slice::<T>()?, beta: beta_view.slice()?, eps: self.eps };
            let [dx, dgamma, dbeta] = backward(x_view.slice()?, grad.slice()?, norm);
            Ok((Some(tensor_like(dx, x)?), Some(tensor_like(dgamma, gamma)?), Some(tensor_like(dbeta, gamma)?)))
        })
    }
}

fn check(x: &Layout, gamma: &Layout, beta: &Layout) -> Result<()> {
    let (_, width) = rows_and_width(x)?;
    if gamma.dims() != [width] || beta.dims() != [width] || width == 0 {
        bail!("layer-norm: gamma {:?} and beta {:?} do not fit {:?}", gamma.shape(), beta.shape(), x.shape());
    }
    Ok(())
}

/// What a row is normalised with: `gamma` and `beta` [width].
#[derive(Clone, Copy)]
pub(super) struct Norm<'a, T> {
    pub gamma: &'a [T],
    pub beta: &'a [T],
    pub eps: f64,
}

impl<T: Real> Norm<'_, T> {
    /// Normalises each row of `x` and writes what `convert` makes of it.
    #[inline(always)]
    pub(super) fn normalise<E>(&self, x: &[T], out: &mut [E], convert: impl Fn(T) -> E) {
        let width = self.gamma.len();
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            let (mean, scale) = mean_and_scale(x, self.eps);
            for (((out, &x), &gamma), &beta) in out.iter_mut().zip(x).zip(self.gamma).zip(self.beta) {
                *out = convert((x - mean) * scale * gamma + beta);
            }
        }
    }

    /// With n = (x - mean) * scale and h = grad * gamma, adds onto each row  dx: scale * (h - mean(h) - n * mean(h * n)),
    /// and over all rows  dgamma: grad * n,  dbeta: grad.
    #[inline(always)]
    pub(super) fn add_gradients(&self, x: &[T], grad: &[T], sums: &mut NormGradients<'_, T>) {
        let width = self.gamma.len();
        let count = T::narrow(width as f64);
        let rows = x.chunks_exact(width).zip(grad.chunks_exact(width));
        for ((x, grad), dx) in rows.zip(sums.dx.chunks_exact_mut(width)) {
            let (mean, scale) = mean_and_scale(x, self.eps);
            for ((dgamma, &x), &grad) in sums.dgamma.iter_mut().zip(x).zip(grad) {
                *dgamma += grad * ((x - mean) * scale);
            }
            sums.dbeta.iter_mut().zip(grad).for_each(|(dbeta, &grad)| *dbeta += grad);
            let mean_h = sum_of(grad, self.gamma, |grad, gamma| grad * gamma) / count;
            let mean_hn =
                sum_of_three(x, grad, self.gamma, |x, grad, gamma| (x - mean) * scale * (grad * gamma))
                    / count;
            for (((dx, &x), &grad), &gamma) in dx.iter_mut().zip(x).zip(grad).zip(self.gamma) {
                *dx += scale * (grad * gamma - mean_h - (x - mean) * scale * mean_hn);
            }
        }
    }
}

/// Where gradients are added.
pub(super) struct NormGradients<'a, T> {
    pub dx: &'a mut [T],
    pub dgamma: &'a mut [T],
    pub dbeta: &'a mut [T],
}

fn forward<T: Real>(x: &[T], norm: Norm<'_, T>) -> Vec<T> {
    let width = norm.gamma.len();
    let part = rows_per_part(x.len() / width) * width;
    let mut y = vec![T::ZERO; x.len()];
    y.par_chunks_mut(part)
        .zip(x.par_chunks(part))
        .for_each(|(y, x)| widest!(norm.normalise(x, y, |value| value)));
    y
}

/// Gradients of x, gamma and beta.
fn backward<T: Real>(x: &[T], grad: &[T], norm: Norm<'_, T>) -> [Vec<T>; 3] {
    let width = norm.gamma.len();
    let part = rows_per_part(x.len() / width) * width;
    let mut dx = vec![T::ZERO; x.len()];
    let parts: Vec<(Vec<T>, Vec<T>)> = dx
        .par_chunks_mut(part)
        .zip(x.par_chunks(part))
        .zip(grad.par_chunks(part))
        .map(|((dx, x), grad)| {
            let (mut dgamma, mut dbeta) = (vec![T::ZERO; width], vec![T::ZERO; width]);
            let mut sums = NormGradients { dx, dgamma: &mut dgamma, dbeta: &mut dbeta };
            widest!(norm.add_gradients(x, grad, &mut sums));
            (dgamma, dbeta)
        })
        .collect();
    let (dgamma, dbeta): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    [dx, sum_in_order(dgamma), sum_in_order(dbeta)]
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
