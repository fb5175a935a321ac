//! The operation on a GPU: moments first, then one operation that normalises by them.

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp3, Device, Layout, Result, Shape, Tensor, bail,
};

use super::{BatchNormInput, Moments};
use crate::model::ops::gpu::batch_norm::{MomentSpans, Rule, Saved};
use crate::model::ops::gpu::{self, Matrix, NormGradients, cuda};

pub(super) fn train(input: BatchNormInput<'_>) -> Result<(Tensor, Moments)> {
    let x = input.x.contiguous()?;
    let moments = moments_of(&x)?;
    let y = normalise(&x, input, &moments, true)?;
    Ok((y, moments))
}

pub(super) fn eval(input: BatchNormInput<'_>, moments: &Moments) -> Result<Tensor> {
    normalise(&input.x.contiguous()?, input, moments, false)
}

fn moments_of(x: &Tensor) -> Result<Moments> {
    let device = device_of(x)?;
    let matrix = Matrix::of(x.layout())?;
    let view = cuda::View::of(x);
    let [mean, variance] = gpu::batch_norm::moments(device, view.span()?, matrix)?
        .map(|moment| cuda::into_tensor(moment, device, matrix.width));
    Ok(Moments { mean, variance })
}

fn normalise(
    x: &Tensor,
    input: BatchNormInput<'_>,
    moments: &Moments,
    through_moments: bool,
) -> Result<Tensor> {
    let moments = Moments { mean: moments.mean.contiguous()?, variance: moments.variance.contiguous()? };
    let BatchNormInput { gamma, beta, eps, activation, .. } = input;
    let op = BatchNorm { eps, floor: activation.floor(), moments, through_moments };
    x.apply_op3(&gamma.contiguous()?, &beta.contiguous()?, op)
}

fn device_of(tensor: &Tensor) -> Result<&CudaDevice> {
    match tensor.device() {
        Device::Cuda(device) => Ok(device),
        other => bail!("batch-norm: no kernel for {other:?}"),
    }
}

struct BatchNorm {
    eps: f64,
    floor: f32,
    moments: Moments,
    through_moments: bool,
}

impl BatchNorm {
    fn rule(&self, layout: &Layout) -> Result<Rule> {
        Ok(Rule { matrix: Matrix::of(layout)?, eps: self.eps, floor: self.floor })
    }
}

impl CustomOp3 for BatchNorm {
    fn name(&self) -> &'static str {
        "batch-norm"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("batch-norm: the gpu's operation on the cpu")
    }

    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let device = s1.device();
        let (mean, variance) = (cuda::View::of(&self.moments.mean), cuda::View::of(&self.moments.variance));
        let moments = MomentSpans { mean: mean.span()?, variance: variance.span()? };
        let inputs = [cuda::span(s1, l1)?, cuda::span(s2, l2)?, cuda::span(s3, l3)?];
        let y = gpu::batch_norm::forward(device, inputs, moments, self.rule(l1)?)?;
        Ok((cuda::into_storage(y, device), l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gamma: &Tensor,
        _: &Tensor,
        y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let device = device_of(x)?;
        let grad = grad.contiguous()?;
        let views = [x, y, gamma, &grad, &self.moments.mean, &self.moments.variance].map(cuda::View::of);
        let saved = Saved {
            x: views[0].span()?,
            y: views[1].span()?,
            gamma: views[2].span()?,
            grad: views[3].span()?,
            moments: MomentSpans { mean: views[4].span()?, variance: views[5].span()? },
            through_moments: self.through_moments,
        };
        let NormGradients { dx, parameters } =
            gpu::batch_norm::backward(device, saved, self.rule(x.layout())?)?;
        let dx = cuda::into_tensor(dx, device, x.shape());
        let parameters = cuda::into_tensor(parameters, device, (2, gamma.elem_count()));
        Ok((Some(dx), Some(parameters.get(0)?), Some(parameters.get(1)?)))
    }
}
