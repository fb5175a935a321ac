//! GELU by the error function, `x * Phi(x)`: what timm's vision transformers use (not the tanh approximation).

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::has_kernel;
use super::kernel::{Real, View, into_storage, slice, tensor_like, with_real};

/// Elements of one part: the error function is slow, so parts are smaller than for plain arithmetic.
const ELEMENTS_PER_PART: usize = 4 * 1024;

/// Any shape -> the same.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if !has_kernel(x) {
        return reference(x);
    }
    x.contiguous()?.apply_op1(Gelu)
}

pub(super) fn reference(x: &Tensor) -> Result<Tensor> {
    let phi = ((x * FRAC_1_SQRT_2)?.erf()? + 1.0)?;
    (x * phi)? * 0.5
}

struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let result = with_real!(storage.dtype(), "gelu", T => {
            Ok(into_storage(forward::<T>(slice(storage, layout)?)))
        })?;
        Ok((result, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        with_real!(x.dtype(), "gelu", T => {
            tensor_like(backward::<T>(View::of(x).slice()?, View::of(&grad).slice()?), x)
        })
        .map(Some)
    }
}

fn normal_cdf<T: Real>(x: T) -> T {
    T::narrow(0.5) * (T::narrow(1.0) + (x * T::narrow(FRAC_1_SQRT_2)).erf())
}

fn forward<T: Real>(x: &[T]) -> Vec<T> {
    let mut out = vec![T::ZERO; x.len()];
    out.par_chunks_mut(ELEMENTS_PER_PART).zip(x.par_chunks(ELEMENTS_PER_PART)).for_each(|(out, x)| {
        for (out, &x) in out.iter_mut().zip(x) {
            *out = x * normal_cdf(x);
        }
    });
    out
}

/// d/dx x Phi(x) = Phi(x) + x phi(x), with phi the density of the standard normal distribution.
fn backward<T: Real>(x: &[T], grad: &[T]) -> Vec<T> {
    let density_at_zero = T::narrow(1.0 / (2.0 * PI).sqrt());
    let mut out = vec![T::ZERO; x.len()];
    out.par_chunks_mut(ELEMENTS_PER_PART)
        .zip(x.par_chunks(ELEMENTS_PER_PART))
        .zip(grad.par_chunks(ELEMENTS_PER_PART))
        .for_each(|((out, x), grad)| {
            for ((out, &x), &grad) in out.iter_mut().zip(x).zip(grad) {
                let density = density_at_zero * (x * x * T::narrow(-0.5)).exp();
                *out = grad * (normal_cdf(x) + x * density);
            }
        });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradient_check::{assert_gradients, assert_same, random};

    #[test]
    fn gradients_equal_finite_differences() {
        let inputs = [(random((3, 5), 1) * 3.0).unwrap()];
        assert_gradients(&inputs, |x| gelu(&x[0]));
        assert_gradients(&inputs, |x| reference(&x[0]));
        assert_same(&inputs, |x| gelu(&x[0]), |x| reference(&x[0]));
    }

    #[test]
    fn it_is_the_exact_gelu_and_not_the_tanh_approximation() {
        // torch.nn.functional.gelu(torch.tensor(1., dtype=torch.float64)) = 0.8413447460685429; by tanh 0.841192.
        let y = gelu(&Tensor::new(1f64, &candle_core::Device::Cpu).unwrap()).unwrap();
        assert!((y.to_scalar::<f64>().unwrap() - 0.8413447460685429).abs() < 1e-15);
    }
}
