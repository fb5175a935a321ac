//! The patches of channels-last images under a sliding window, for devices on which a convolution is a library's product of them
//! with the weight.

use candle_core::{Result, Tensor};

use super::Window;
#[cfg(feature = "cuda")]
use super::has_gpu_kernel;

/// `x` [batch, height, width, channels] -> [batch * out_height * out_width, kernel * kernel * channels], a patch's elements by
/// row, column and channel; 0 where the window leaves the image.
pub(super) fn unfold(x: &Tensor, window: Window) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if has_gpu_kernel(x) {
        return x.contiguous()?.apply_op1(on_gpu::Unfold { window });
    }
    reference(x, window)
}

/// Patches by index.
pub(super) fn reference(x: &Tensor, window: Window) -> Result<Tensor> {
    let (_, height, width, _) = x.dims4()?;
    let (out_height, out_width) = (window.positions(height), window.positions(width));
    let Window { kernel, stride, padding } = window;
    let x = x.pad_with_zeros(1, padding, padding)?.pad_with_zeros(2, padding, padding)?.contiguous()?;
    let shifted = |count: usize, shift: usize| {
        let indices: Vec<u32> = (0..count).map(|position| (position * stride + shift) as u32).collect();
        Tensor::new(indices, x.device())
    };
    let mut patches = Vec::with_capacity(kernel * kernel);
    for row in 0..kernel {
        let rows = x.index_select(&shifted(out_height, row)?, 1)?;
        for column in 0..kernel {
            patches.push(rows.index_select(&shifted(out_width, column)?, 2)?);
        }
    }
    Tensor::cat(&patches, 3)?.flatten(0, 2)
}

#[cfg(feature = "cuda")]
mod on_gpu {
    use candle_core::backend::BackendStorage;
    use candle_core::{CpuStorage, CudaStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, bail};

    use crate::model::ops::Window;
    use crate::model::ops::gpu::unfold::Unfolding;
    use crate::model::ops::gpu::{self, cuda};

    pub(super) struct Unfold {
        pub window: Window,
    }

    impl Unfold {
        fn unfolding(&self, layout: &Layout) -> Result<Unfolding> {
            let (batch, height, width, channels) = layout.shape().dims4()?;
            Ok(Unfolding { batch, height, width, channels, window: self.window })
        }
    }

    impl CustomOp1 for Unfold {
        fn name(&self) -> &'static str {
            "unfold"
        }

        fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
            bail!("unfold: no kernel for the cpu")
        }

        fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
            let (device, unfolding) = (storage.device(), self.unfolding(layout)?);
            let patches = gpu::unfold::forward(device, cuda::span(storage, layout)?, unfolding)?;
            let shape = Shape::from((unfolding.rows(), unfolding.patch()));
            Ok((cuda::into_storage(patches, device), shape))
        }

        fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
            let Device::Cuda(device) = x.device() else { bail!("unfold: no kernel for {:?}", x.device()) };
            let grad = grad.contiguous()?;
            let view = cuda::View::of(&grad);
            let dx = gpu::unfold::backward(device, view.span()?, self.unfolding(x.layout())?)?;
            Ok(Some(cuda::into_tensor(dx, device, x.shape())))
        }
    }
}
