//! Softmax of scaled rows, as attention takes it of its scores, for devices on which attention is no operation of its own.

use candle_core::{D, Result, Tensor};

#[cfg(feature = "cuda")]
use super::has_gpu_kernel;

/// `softmax(scale * scores)` over the last dimension; `scale` is positive.
pub(super) fn scaled_softmax(scores: &Tensor, scale: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if has_gpu_kernel(scores) {
        return scores.contiguous()?.apply_op1(on_gpu::ScaledSoftmax { scale });
    }
    reference(scores, scale)
}

pub(super) fn reference(scores: &Tensor, scale: f64) -> Result<Tensor> {
    let scores = (scores * scale)?;
    // The shift cancels in the quotient: it is a constant of the graph.
    let shift = scores.max_keepdim(D::Minus1)?.detach();
    let weights = scores.broadcast_sub(&shift)?.exp()?;
    weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)
}

#[cfg(feature = "cuda")]
mod on_gpu {
    use candle_core::backend::BackendStorage;
    use candle_core::{CpuStorage, CudaStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, bail};

    use crate::model::ops::gpu::{self, Matrix, cuda};

    pub(super) struct ScaledSoftmax {
        pub scale: f64,
    }

    impl CustomOp1 for ScaledSoftmax {
        fn name(&self) -> &'static str {
            "scaled-softmax"
        }

        fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
            bail!("scaled-softmax: no kernel for the cpu")
        }

        fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
            let device = storage.device();
            let scores = cuda::span(storage, layout)?;
            let y = gpu::softmax::forward(device, scores, Matrix::of(layout)?, self.scale)?;
            Ok((cuda::into_storage(y, device), layout.shape().clone()))
        }

        fn bwd(&self, scores: &Tensor, probabilities: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
            let Device::Cuda(device) = scores.device() else {
                bail!("scaled-softmax: no kernel for {:?}", scores.device())
            };
            let grad = grad.contiguous()?;
            let (probabilities, view) = (cuda::View::of(probabilities), cuda::View::of(&grad));
            let inputs = [probabilities.span()?, view.span()?];
            let dx = gpu::softmax::backward(device, inputs, Matrix::of(grad.layout())?, self.scale)?;
            Ok(Some(cuda::into_tensor(dx, device, scores.shape())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradient_check::{assert_gradients, random};

    #[test]
    fn gradients_equal_finite_differences() {
        assert_gradients(&[random((2, 3, 5), 1)], |x| scaled_softmax(&x[0], 0.5));
    }

    #[test]
    fn rows_are_probabilities_in_the_order_of_their_scores() {
        let scores = Tensor::new(&[[0f64, 2.0, 4.0]], &candle_core::Device::Cpu).unwrap();
        // numpy: e = numpy.exp([0, 1, 2]); e / e.sum()
        let expected = [0.09003057317038046, 0.24472847105479767, 0.6652409557748219];
        let rows = scaled_softmax(&scores, 0.5).unwrap().to_vec2::<f64>().unwrap();
        rows[0].iter().zip(expected).for_each(|(p, expected)| assert!((p - expected).abs() < 1e-15));
    }
}
