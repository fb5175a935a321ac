//! A bias added to each row: what follows a product whose kernel is a library's.
//!
//! On the CPU biases are part of the operations that multiply; this one is for devices where they are not.

use candle_core::{Result, Tensor};

#[cfg(feature = "cuda")]
use super::has_gpu_kernel;

/// `x` [.., width], `bias` [width] -> [.., width].
pub(super) fn add_bias(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if has_gpu_kernel(x) {
        return x.contiguous()?.apply_op2(&bias.contiguous()?, on_gpu::AddBias);
    }
    x.broadcast_add(bias)
}

#[cfg(feature = "cuda")]
mod on_gpu {
    use candle_core::backend::BackendStorage;
    use candle_core::{CpuStorage, CudaStorage, CustomOp2, Device, Layout, Result, Shape, Tensor, bail};

    use crate::model::ops::gpu::{self, Matrix, cuda};

    pub(super) struct AddBias;

    impl CustomOp2 for AddBias {
        fn name(&self) -> &'static str {
            "add-bias"
        }

        fn cpu_fwd(
            &self,
            _: &CpuStorage,
            _: &Layout,
            _: &CpuStorage,
            _: &Layout,
        ) -> Result<(CpuStorage, Shape)> {
            bail!("add-bias: no kernel for the cpu")
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
            let y = gpu::add_bias::forward(device, inputs, Matrix::of(l1)?)?;
            Ok((cuda::into_storage(y, device), l1.shape().clone()))
        }

        fn bwd(
            &self,
            x: &Tensor,
            bias: &Tensor,
            _: &Tensor,
            grad: &Tensor,
        ) -> Result<(Option<Tensor>, Option<Tensor>)> {
            let Device::Cuda(device) = x.device() else { bail!("add-bias: no kernel for {:?}", x.device()) };
            let grad = grad.contiguous()?;
            let view = cuda::View::of(&grad);
            let sums = gpu::column_sums::column_sums(device, view.span()?, Matrix::of(grad.layout())?, 1.0)?;
            let dbias = cuda::into_tensor(sums, device, bias.shape());
            drop(view);
            Ok((Some(grad), Some(dbias)))
        }
    }
}
