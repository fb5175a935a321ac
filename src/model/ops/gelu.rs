//! GELU by the error function, `x * Phi(x)`: what timm's vision transformers use (not the tanh approximation).
//!
//! On the CPU a function of one element: the block that it belongs to puts it between two products. Elsewhere [`bias_gelu`]
//! takes it of a whole product, with the bias.

use std::f64::consts::FRAC_1_SQRT_2;

use candle_core::{Result, Tensor};

#[cfg(feature = "cuda")]
use super::has_gpu_kernel;
use super::kernel::Real;

/// `x Phi(x)`
#[inline(always)]
pub(super) fn gelu<T: Real>(x: T) -> T {
    x * x.normal().0
}

/// Value and derivative: `x Phi(x)` and `Phi(x) + x phi(x)`, with phi the density of the standard normal distribution.
#[inline(always)]
pub(super) fn gelu_with_derivative<T: Real>(x: T) -> (T, T) {
    let (cumulative, density) = x.normal();
    (x * cumulative, cumulative + x * density)
}

pub(super) fn reference(x: &Tensor) -> Result<Tensor> {
    let phi = ((x * FRAC_1_SQRT_2)?.erf()? + 1.0)?;
    (x * phi)? * 0.5
}

/// `x` [.., width], `bias` [width] -> `gelu(x + bias)`.
pub(super) fn bias_gelu(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if has_gpu_kernel(x) {
        return x.contiguous()?.apply_op2(&bias.contiguous()?, on_gpu::BiasGelu);
    }
    bias_gelu_reference(x, bias)
}

pub(super) fn bias_gelu_reference(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    reference(&x.broadcast_add(bias)?)
}

#[cfg(feature = "cuda")]
mod on_gpu {
    use candle_core::backend::BackendStorage;
    use candle_core::{CpuStorage, CudaStorage, CustomOp2, Device, Layout, Result, Shape, Tensor, bail};

    use crate::model::ops::gpu::{self, Matrix, cuda};

    pub(super) struct BiasGelu;

    impl CustomOp2 for BiasGelu {
        fn name(&self) -> &'static str {
            "bias-gelu"
        }

        fn cpu_fwd(
            &self,
            _: &CpuStorage,
            _: &Layout,
            _: &CpuStorage,
            _: &Layout,
        ) -> Result<(CpuStorage, Shape)> {
            bail!("bias-gelu: no kernel for the cpu")
        }

        fn cuda_fwd(
            &self,
            s1: &CudaStorage,
            l1: &Layout,
            s2: &CudaStorage,
            l2: &Layout,
        ) -> Result<(CudaStorage, Shape)> {
            let device = s1.device();
            let inputs = [cuda::span(s1, l1)?, cuda::span(s2, l2)?];
            let y = gpu::gelu::forward(device, inputs, Matrix::of(l1)?)?;
            Ok((cuda::into_storage(y, device), l1.shape().clone()))
        }

        fn bwd(
            &self,
            x: &Tensor,
            bias: &Tensor,
            _: &Tensor,
            grad: &Tensor,
        ) -> Result<(Option<Tensor>, Option<Tensor>)> {
            let Device::Cuda(device) = x.device() else { bail!("bias-gelu: no kernel for {:?}", x.device()) };
            let grad = grad.contiguous()?;
            let views = [x, bias, &grad].map(cuda::View::of);
            let inputs = [views[0].span()?, views[1].span()?, views[2].span()?];
            let [dx, dbias] = gpu::gelu::backward(device, inputs, Matrix::of(x.layout())?)?;
            let dx = cuda::into_tensor(dx, device, x.shape());
            Ok((Some(dx), Some(cuda::into_tensor(dbias, device, bias.shape()))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_exact_gelu_and_not_the_tanh_approximation() {
        // torch.nn.functional.gelu(torch.tensor(1., dtype=torch.float64)) = 0.8413447460685429; by tanh 0.841192.
        assert!((gelu(1f64) - 0.8413447460685429).abs() < 1e-15);
        assert!((gelu(1f32) - 0.841_344_7).abs() < 2e-7);
    }

    #[test]
    fn the_derivative_equals_finite_differences() {
        for step in -400..=400 {
            let x = f64::from(step) * 0.02;
            let numeric = (gelu(x + 1e-6) - gelu(x - 1e-6)) / 2e-6;
            let (value, derivative) = gelu_with_derivative(x);
            assert_eq!(value, gelu(x));
            assert!((derivative - numeric).abs() < 1e-8, "at {x}: {derivative} {numeric}");
        }
    }
}
