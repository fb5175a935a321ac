//! One step of AdamW (Loshchilov, Hutter 2019) on many tensors, in place: with g the scaled gradient,
//! `m = beta1 m + (1 - beta1) g`, `v = beta2 v + (1 - beta2) g^2`, and
//! `parameter = keep * parameter - rate * m / (sqrt(v) / root_correction + EPSILON)`.
//!
//! On the CPU each tensor goes through the cache once a moment and once itself; on a GPU all of them go through one kernel.

use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Result, Tensor, bail};
use rayon::prelude::*;

/// Added to the root of the second moment, as in the publication and in PyTorch.
pub(super) const EPSILON: f64 = 1e-8;
/// Elements updated by one task. Below a few thousand the hand-over costs more than the work.
const CHUNK: usize = 1 << 14;

/// The numbers of a step that all tensors share.
#[derive(Clone, Copy)]
pub struct AdamWStep {
    /// What gradients are multiplied by, because of clipping.
    pub scale: f64,
    pub beta1: f64,
    pub beta2: f64,
    /// Learning rate over the first moment's bias correction.
    pub rate: f64,
    /// Root of the second moment's bias correction.
    pub root_correction: f64,
}

/// A tensor with what moves it: f32 of one shape, contiguous.
#[derive(Clone, Copy)]
pub struct AdamWTensor<'a> {
    pub parameter: &'a Tensor,
    pub gradient: &'a Tensor,
    /// Running means of the gradient and of its square; moved too.
    pub moments: [&'a Tensor; 2],
    /// What the parameter is multiplied by, because of weight decay.
    pub keep: f64,
}

/// See the module's text. All tensors are on one device.
pub fn adamw(tensors: &[AdamWTensor<'_>], step: AdamWStep) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Some(device) = on_gpu::device(tensors.first().map(|tensor| tensor.parameter)) {
        return on_gpu::update(device, tensors, step);
    }
    tensors.iter().try_for_each(|tensor| tensor.move_on_cpu(step))
}

/// The sum of squares of each of `tensors`, on their device: [tensors].
pub fn sums_of_squares(tensors: &[Tensor]) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(device) = on_gpu::device(tensors.first()) {
        return on_gpu::sums_of_squares(device, tensors);
    }
    let sums = tensors.iter().map(|tensor| tensor.sqr()?.sum_all()).collect::<Result<Vec<_>>>()?;
    Tensor::stack(&sums, 0)
}

impl AdamWTensor<'_> {
    fn move_on_cpu(&self, step: AdamWStep) -> Result<()> {
        let AdamWTensor { parameter, gradient, moments: [first, second], keep } = self;
        let AdamWStep { scale, beta1, beta2, rate, root_correction } = step;
        let mean = |beta: f64, square| RunningMean { beta: beta as f32, scale: scale as f32, square };
        first.inplace_op2(gradient, &mean(beta1, false))?;
        second.inplace_op2(gradient, &mean(beta2, true))?;
        let rate = rate as f32;
        let move_by = Move { keep: *keep as f32, rate, root_correction: root_correction as f32 };
        parameter.inplace_op3(first, second, &move_by)
    }
}

/// `mean = beta * mean + (1 - beta) * x`, x being the scaled gradient or its square.
struct RunningMean {
    beta: f32,
    scale: f32,
    square: bool,
}

impl InplaceOp2 for RunningMean {
    fn name(&self) -> &'static str {
        "running-mean"
    }

    fn cpu_fwd(
        &self,
        mean: &mut CpuStorage,
        at: &Layout,
        gradient: &CpuStorage,
        from: &Layout,
    ) -> Result<()> {
        let gradient = values(gradient, from)?;
        let mean = values_mut(mean, at)?;
        check_lengths(mean.len(), &[gradient.len()])?;
        let chunks = mean.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
        chunks.for_each(|(mean, gradient)| {
            for (mean, gradient) in mean.iter_mut().zip(gradient) {
                let g = gradient * self.scale;
                let x = if self.square { g * g } else { g };
                *mean = self.beta * *mean + (1.0 - self.beta) * x;
            }
        });
        Ok(())
    }
}

/// The step from both moments.
struct Move {
    keep: f32,
    rate: f32,
    root_correction: f32,
}

impl InplaceOp3 for Move {
    fn name(&self) -> &'static str {
        "adamw-move"
    }

    fn cpu_fwd(
        &self,
        parameter: &mut CpuStorage,
        at: &Layout,
        first: &CpuStorage,
        first_at: &Layout,
        second: &CpuStorage,
        second_at: &Layout,
    ) -> Result<()> {
        let (first, second) = (values(first, first_at)?, values(second, second_at)?);
        let parameter = values_mut(parameter, at)?;
        check_lengths(parameter.len(), &[first.len(), second.len()])?;
        let moments = first.par_chunks(CHUNK).zip(second.par_chunks(CHUNK));
        parameter.par_chunks_mut(CHUNK).zip(moments).for_each(|(parameter, (first, second))| {
            for ((p, m), v) in parameter.iter_mut().zip(first).zip(second) {
                let root = v.sqrt() / self.root_correction + EPSILON as f32;
                *p = self.keep * *p - self.rate * m / root;
            }
        });
        Ok(())
    }
}

fn check_lengths(expected: usize, found: &[usize]) -> Result<()> {
    if found.iter().any(|&length| length != expected) {
        bail!("adamw: {found:?} elements beside {expected}");
    }
    Ok(())
}

fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (layout.contiguous_offsets(), storage.as_slice::<f32>()?) {
        (Some((start, end)), all) => Ok(&all[start..end]),
        _ => bail!("adamw needs contiguous f32 tensors"),
    }
}

fn values_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (layout.contiguous_offsets(), storage) {
        (Some((start, end)), CpuStorage::F32(all)) => Ok(&mut all[start..end]),
        _ => bail!("adamw needs contiguous f32 tensors"),
    }
}

#[cfg(feature = "cuda")]
mod on_gpu {
    use candle_core::{CudaDevice, Device, Result, Tensor};

    use super::{AdamWStep, AdamWTensor};
    use crate::model::ops::gpu::{self, cuda};

    pub(super) fn device(tensor: Option<&Tensor>) -> Option<&CudaDevice> {
        match tensor?.device() {
            Device::Cuda(device) => Some(device),
            _ => None,
        }
    }

    pub(super) fn sums_of_squares(device: &CudaDevice, tensors: &[Tensor]) -> Result<Tensor> {
        let views: Vec<_> = tensors.iter().map(cuda::View::of).collect();
        let spans = views.iter().map(cuda::View::span).collect::<Result<Vec<_>>>()?;
        let sums = gpu::adamw::sums_of_squares(device, &spans)?;
        Ok(cuda::into_tensor(sums, device, tensors.len()))
    }

    /// The kernel writes behind read locks: what it writes is the device's memory, in the order of the device's stream, and no
    /// reference of Rust's points there.
    pub(super) fn update(device: &CudaDevice, tensors: &[AdamWTensor<'_>], step: AdamWStep) -> Result<()> {
        let views: Vec<_> = tensors
            .iter()
            .map(|AdamWTensor { parameter, gradient, moments: [first, second], .. }| {
                [*parameter, *gradient, *first, *second].map(cuda::View::of)
            })
            .collect();
        let rows = tensors.iter().zip(&views).map(|(tensor, [parameter, gradient, first, second])| {
            Ok(gpu::adamw::Moved {
                parameter: parameter.span()?,
                gradient: gradient.span()?,
                moments: [first.span()?, second.span()?],
                keep: tensor.keep,
            })
        });
        let rows = rows.collect::<Result<Vec<_>>>()?;
        gpu::adamw::update(device, &rows, step)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    /// The same by candle's operations.
    fn reference(tensor: AdamWTensor<'_>, step: AdamWStep) -> Result<[Tensor; 3]> {
        let AdamWStep { scale, beta1, beta2, rate, root_correction } = step;
        let gradient = (tensor.gradient * scale)?;
        let mean = |moment: &Tensor, value: Tensor, beta: f64| (moment * beta)? + (value * (1.0 - beta))?;
        let first = mean(tensor.moments[0], gradient.clone(), beta1)?;
        let second = mean(tensor.moments[1], gradient.sqr()?, beta2)?;
        let root = ((second.sqrt()? / root_correction)? + EPSILON)?;
        let parameter = ((tensor.parameter * tensor.keep)? - ((&first / root)? * rate)?)?;
        Ok([parameter, first, second])
    }

    #[test]
    fn passes_in_place_compute_what_tensor_operations_do() {
        let wave = |factor: f32, shift: f32| {
            let data: Vec<f32> = (0..40_000).map(|i| (i as f32 * factor + shift).sin()).collect();
            Tensor::from_vec(data, (200, 200), &Device::Cpu).unwrap()
        };
        let parameter = Var::from_tensor(&wave(0.37, 0.0)).unwrap();
        let moments = [parameter.zeros_like().unwrap(), parameter.zeros_like().unwrap()];
        let step = AdamWStep { scale: 0.7, beta1: 0.9, beta2: 0.999, rate: 0.01, root_correction: 0.5 };
        for shift in [0.1, 0.9] {
            let gradient = wave(0.11, shift);
            let moments = moments.each_ref();
            let moved = AdamWTensor { parameter: &parameter, gradient: &gradient, moments, keep: 0.99 };
            let expected = reference(moved, step).unwrap();
            adamw(&[moved], step).unwrap();
            for (expected, found) in expected.iter().zip([moved.parameter, moments[0], moments[1]]) {
                let distance = (expected - found).unwrap().abs().unwrap().max_all().unwrap();
                assert!(distance.to_scalar::<f32>().unwrap() < 1e-6);
            }
        }
    }
}
