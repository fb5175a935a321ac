//! Batch normalisation over the rows of `x`, by the batch's own moments (training) or by given ones (evaluation),
//! with an optional ReLU on the result.
//!
//! Sums are taken over fixed parts of the rows, and over the parts in f64 (on a GPU in f32). The running statistics are the
//! caller's: training returns the batch's moments, this file updates nothing.

#[cfg(feature = "cuda")]
mod on_gpu;

use std::sync::{Arc, OnceLock};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::add_relu::relu_reference;
#[cfg(feature = "cuda")]
use super::has_gpu_kernel;
use super::has_kernel;
use super::kernel::{
    Real, View, into_storage, rows_and_width, rows_per_part, slice, sum_over_parts, tensor_like, with_real,
};
use crate::widest::widest;

/// What follows the normalisation. ReLU's gradient at 0 is 0, as in torch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    Identity,
    Relu,
}

/// `x` [.., channels], `gamma` and `beta` [channels].
#[derive(Clone, Copy)]
pub struct BatchNormInput<'a> {
    pub x: &'a Tensor,
    pub gamma: &'a Tensor,
    pub beta: &'a Tensor,
    pub eps: f64,
    pub activation: Activation,
}

/// Mean and **biased** variance of each channel, [channels] in the type of `x`; no graph hangs on them.
#[derive(Clone, Debug)]
pub struct Moments {
    pub mean: Tensor,
    pub variance: Tensor,
}

/// Normalises by the batch's moments, which it also returns.
pub fn batch_norm_train(input: BatchNormInput<'_>) -> Result<(Tensor, Moments)> {
    #[cfg(feature = "cuda")]
    if has_gpu_kernel(input.x) {
        return on_gpu::train(input);
    }
    if !has_kernel(input.x) {
        return reference_train(input);
    }
    let moments = Arc::new(OnceLock::new());
    let op =
        BatchNorm { eps: input.eps, activation: input.activation, source: Source::Batch(moments.clone()) };
    let y = input.apply(op)?;
    let Some(moments) = moments.get() else { bail!("batch-norm: forward pass left no moments") };
    let moments = moments.on(&y)?;
    Ok((y, moments))
}

/// Normalises by `moments`, which are constants of the graph.
pub fn batch_norm_eval(input: BatchNormInput<'_>, moments: &Moments) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if has_gpu_kernel(input.x) {
        return on_gpu::eval(input, moments);
    }
    if !has_kernel(input.x) {
        return reference_eval(input, moments);
    }
    let values = |t: &Tensor| t.to_dtype(DType::F64)?.to_vec1::<f64>();
    let moments = HostMoments { mean: values(&moments.mean)?, variance: values(&moments.variance)? };
    input.apply(BatchNorm { eps: input.eps, activation: input.activation, source: Source::Given(moments) })
}

impl BatchNormInput<'_> {
    fn apply(&self, op: BatchNorm) -> Result<Tensor> {
        self.x.contiguous()?.apply_op3(&self.gamma.contiguous()?, &self.beta.contiguous()?, op)
    }
}

pub(super) fn reference_train(input: BatchNormInput<'_>) -> Result<(Tensor, Moments)> {
    let rows = input.x.reshape(((), input.gamma.elem_count()))?;
    let mean = rows.mean(0)?;
    let variance = rows.broadcast_sub(&mean)?.sqr()?.mean(0)?;
    let y = reference_normalise(input, &mean, &variance)?;
    Ok((y, Moments { mean: mean.detach(), variance: variance.detach() }))
}

pub(super) fn reference_eval(input: BatchNormInput<'_>, moments: &Moments) -> Result<Tensor> {
    reference_normalise(input, &moments.mean.detach(), &moments.variance.detach())
}

fn reference_normalise(input: BatchNormInput<'_>, mean: &Tensor, variance: &Tensor) -> Result<Tensor> {
    let scale = input.gamma.div(&(variance + input.eps)?.sqrt()?)?;
    let y = input.x.broadcast_sub(mean)?.broadcast_mul(&scale)?.broadcast_add(input.beta)?;
    match input.activation {
        Activation::Identity => Ok(y),
        Activation::Relu => relu_reference(&y),
    }
}

/// [`Moments`] before they are tensors.
#[derive(Debug)]
pub(super) struct HostMoments {
    pub mean: Vec<f64>,
    pub variance: Vec<f64>,
}

impl HostMoments {
    /// In the type of `like`.
    pub(super) fn on(&self, like: &Tensor) -> Result<Moments> {
        let tensor = |data: &[f64]| Tensor::new(data, like.device())?.to_dtype(like.dtype());
        Ok(Moments { mean: tensor(&self.mean)?, variance: tensor(&self.variance)? })
    }
}

enum Source {
    /// Set by the forward pass, read by the backward pass.
    Batch(Arc<OnceLock<HostMoments>>),
    Given(HostMoments),
}

struct BatchNorm {
    eps: f64,
    activation: Activation,
    source: Source,
}

/// Each channel's map `x -> (x - mean) * inverse_deviation * gamma + beta`. Arrays, so that loops over channels become
/// vector code.
struct Channels<'a, T> {
    mean: Vec<T>,
    inverse_deviation: Vec<T>,
    /// gamma * inverse_deviation
    scale: Vec<T>,
    beta: &'a [T],
}

impl BatchNorm {
    fn moments(&self) -> Result<&HostMoments> {
        match &self.source {
            Source::Given(moments) => Ok(moments),
            Source::Batch(slot) => match slot.get() {
                Some(moments) => Ok(moments),
                None => bail!("batch-norm: backward before forward"),
            },
        }
    }

    fn channels<'a, T: Real>(&self, gamma: &[T], beta: &'a [T]) -> Result<Channels<'a, T>> {
        let HostMoments { mean, variance } = self.moments()?;
        if mean.len() != gamma.len() || variance.len() != gamma.len() {
            bail!(
                "batch-norm: {} means and {} variances for {} channels",
                mean.len(),
                variance.len(),
                gamma.len()
            );
        }
        let inverse_deviation: Vec<T> =
            variance.iter().map(|variance| T::narrow(1.0 / (variance + self.eps).sqrt())).collect();
        let scale = inverse_deviation.iter().zip(gamma).map(|(&inverse, &gamma)| gamma * inverse).collect();
        let mean = mean.iter().map(|&mean| T::narrow(mean)).collect();
        Ok(Channels { mean, inverse_deviation, scale, beta })
    }

    fn forward<T: Real>(&self, x: &[T], gamma: &[T], beta: &[T]) -> Result<Vec<T>> {
        if let Source::Batch(slot) = &self.source
            && slot.set(batch_moments(x, gamma.len())).is_err()
        {
            bail!("batch-norm: one operation applied twice");
        }
        Ok(normalise(x, &self.channels(gamma, beta)?, self.activation))
    }

    fn backward<T: Real>(&self, saved: Saved<'_, T>, gamma: &[T], beta: &[T]) -> Result<Gradients<T>> {
        let channels = self.channels(gamma, beta)?;
        let sums = saved.channel_sums(&channels);
        let through_moments = matches!(self.source, Source::Batch(_));
        let (dbeta, dgamma) = sums.split_at(gamma.len());
        Ok(Gradients {
            dx: saved.input_gradient(&channels, &sums, through_moments),
            dgamma: dgamma.iter().map(|&sum| T::narrow(sum)).collect(),
            dbeta: dbeta.iter().map(|&sum| T::narrow(sum)).collect(),
        })
    }
}

impl CustomOp3 for BatchNorm {
    fn name(&self) -> &'static str {
        "batch-norm"
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
        let (rows, channels) = rows_and_width(l1)?;
        if l2.dims() != [channels] || l3.dims() != [channels] || rows == 0 || channels == 0 {
            bail!("batch-norm: gamma {:?} and beta {:?} do not fit {:?}", l2.shape(), l3.shape(), l1.shape());
        }
        let storage = with_real!(s1.dtype(), "batch-norm", T => {
            let (x, gamma, beta) = (slice::<T>(s1, l1)?, slice::<T>(s2, l2)?, slice::<T>(s3, l3)?);
            Ok(into_storage(self.forward(x, gamma, beta)?))
        })?;
        Ok((storage, l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gamma: &Tensor,
        beta: &Tensor,
        y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        with_real!(x.dtype(), "batch-norm", T => {
            let (x_view, y, grad) = (View::of(x), View::of(y), View::of(&grad));
            let (gamma_view, beta_view) = (View::of(gamma), View::of(beta));
            let saved = Saved { x: x_view.slice::<T>()?, y: y.slice()?, grad: grad.slice()?, activation: self.activation };
            let out = self.backward(saved, gamma_view.slice()?, beta_view.slice()?)?;
            Ok((
                Some(tensor_like(out.dx, x)?),
                Some(tensor_like(out.dgamma, gamma)?),
                Some(tensor_like(out.dbeta, beta)?),
            ))
        })
    }
}

/// Mean and mean squared distance from it, in one pass: sums of the distances from the first row and of their squares. The
/// shift keeps the digits that a large mean would cost. Parts are summed in `T`, and with each other in f64.
fn batch_moments<T: Real>(x: &[T], channels: usize) -> HostMoments {
    let rows = x.len() / channels;
    let shift = &x[..channels];
    let sums = sum_over_parts(rows, rows_per_part(rows), 2 * channels, |part, sums: &mut [T]| {
        let (first, second) = sums.split_at_mut(channels);
        widest! {
            let (first, second) = (&mut first[..channels], &mut second[..channels]);
            for row in x[part.start * channels..part.end * channels].chunks_exact(channels) {
                for i in 0..channels {
                    let distance = row[i] - shift[i];
                    first[i] += distance;
                    second[i] += distance * distance;
                }
            }
        }
    });
    let (first, second) = sums.split_at(channels);
    let mean_of = |sums: &[f64]| sums.iter().map(|sum| sum / rows as f64).collect::<Vec<f64>>();
    let (first, second) = (mean_of(first), mean_of(second));
    HostMoments {
        mean: first.iter().zip(shift).map(|(distance, shift)| shift.wide() + distance).collect(),
        variance: first.iter().zip(second).map(|(first, second)| (second - first * first).max(0.0)).collect(),
    }
}

impl Activation {
    /// What results are raised to: nothing below it passes, and no gradient.
    pub(super) fn floor<T: Real>(self) -> T {
        match self {
            Activation::Identity => T::narrow(f64::NEG_INFINITY),
            Activation::Relu => T::ZERO,
        }
    }
}

fn normalise<T: Real>(x: &[T], channels: &Channels<'_, T>, activation: Activation) -> Vec<T> {
    let Channels { mean, scale, beta, .. } = channels;
    let width = beta.len();
    let part = rows_per_part(x.len() / width) * width;
    let floor = activation.floor();
    let mut y = vec![T::ZERO; x.len()];
    y.par_chunks_mut(part).zip(x.par_chunks(part)).for_each(|(y, x)| {
        widest! {
            for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                for ((((y, &x), &mean), &scale), &beta) in y.iter_mut().zip(x).zip(mean).zip(scale).zip(*beta) {
                    let value = (x - mean) * scale + beta;
                    // Written so that NaN passes through: a later check must see it.
                    *y = if value < floor { floor } else { value };
                }
            }
        }
    });
    y
}

/// What the backward pass reads.
#[derive(Clone, Copy)]
struct Saved<'a, T> {
    x: &'a [T],
    y: &'a [T],
    grad: &'a [T],
    activation: Activation,
}

struct Gradients<T> {
    dx: Vec<T>,
    dgamma: Vec<T>,
    dbeta: Vec<T>,
}

impl<T: Real> Saved<'_, T> {
    /// Row `row` of x, y and grad.
    #[inline(always)]
    fn row(&self, row: usize, width: usize) -> [&[T]; 3] {
        [self.x, self.y, self.grad].map(|matrix| &matrix[row * width..][..width])
    }

    /// Per channel the sums of grad, then of grad * normalised x: the gradients of beta and gamma. No gradient comes from
    /// where the activation cut.
    fn channel_sums(&self, channels: &Channels<'_, T>) -> Vec<f64> {
        let Channels { mean, inverse_deviation, .. } = channels;
        let width = mean.len();
        let rows = self.x.len() / width;
        let floor = self.activation.floor();
        sum_over_parts(rows, rows_per_part(rows), 2 * width, |part, sums: &mut [T]| {
            let (dbeta, dgamma) = sums.split_at_mut(width);
            widest! {
                // Equal lengths, as far as the compiler can see: no check stands in the loop.
                let (mean, inverse_deviation, dgamma) =
                    (&mean[..width], &inverse_deviation[..width], &mut dgamma[..width]);
                for row in part.clone() {
                    let [x, y, grad] = self.row(row, width);
                    for i in 0..width {
                        let g = if y[i] <= floor { T::ZERO } else { grad[i] };
                        dbeta[i] += g;
                        dgamma[i] += g * ((x[i] - mean[i]) * inverse_deviation[i]);
                    }
                }
            }
        })
    }

    /// With n = (x - mean) / deviation:  dx = gamma / deviation * (grad - mean(grad) - n * mean(grad * n)), where the
    /// means stand for the way through the batch's moments: they are absent where the moments are constants.
    fn input_gradient(&self, channels: &Channels<'_, T>, sums: &[f64], through_moments: bool) -> Vec<T> {
        let Channels { mean, inverse_deviation, scale, .. } = channels;
        let width = mean.len();
        let rows = self.x.len() / width;
        let share = if through_moments { 1.0 / rows as f64 } else { 0.0 };
        let means: Vec<T> = sums.iter().map(|&sum| T::narrow(sum * share)).collect();
        let (mean_grad, mean_grad_n) = means.split_at(width);
        let floor = self.activation.floor();
        let part = rows_per_part(rows);
        let mut dx = vec![T::ZERO; self.x.len()];
        dx.par_chunks_mut(part * width).enumerate().for_each(|(index, dx)| {
            widest! {
                let [mean, inverse_deviation, scale] = [mean, inverse_deviation, scale].map(|values| &values[..width]);
                let (mean_grad, mean_grad_n) = (&mean_grad[..width], &mean_grad_n[..width]);
                for (offset, dx) in dx.chunks_exact_mut(width).enumerate() {
                    let [x, y, grad] = self.row(index * part + offset, width);
                    for i in 0..width {
                        let g = if y[i] <= floor { T::ZERO } else { grad[i] };
                        let n = (x[i] - mean[i]) * inverse_deviation[i];
                        dx[i] = scale[i] * (g - mean_grad[i] - n * mean_grad_n[i]);
                    }
                }
            }
        });
        dx
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradient_check::{assert_close, assert_gradients, assert_same, random};

    fn input(x: &[Tensor], activation: Activation) -> BatchNormInput<'_> {
        BatchNormInput { x: &x[0], gamma: &x[1], beta: &x[2], eps: 1e-5, activation }
    }

    fn given(channels: usize) -> Moments {
        let variance = (random(channels, 5).abs().unwrap() + 0.5).unwrap();
        Moments { mean: random(channels, 4), variance }
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let inputs = [random((2, 3, 4), 1), random(4, 2), random(4, 3)];
        for activation in [Activation::Identity, Activation::Relu] {
            assert_gradients(&inputs, |x| Ok(batch_norm_train(input(x, activation))?.0));
            assert_gradients(&inputs, |x| Ok(reference_train(input(x, activation))?.0));
            assert_gradients(&inputs, |x| batch_norm_eval(input(x, activation), &given(4)));
            assert_gradients(&inputs, |x| reference_eval(input(x, activation), &given(4)));
        }
    }

    #[test]
    fn several_parts_give_what_the_reference_gives() {
        let inputs = [random((150, 3), 1), random(3, 2), random(3, 3)];
        let relu = |x: &[Tensor]| Ok(batch_norm_train(input(x, Activation::Relu))?.0);
        assert_same(&inputs, relu, |x| Ok(reference_train(input(x, Activation::Relu))?.0));
        let (_, moments) = batch_norm_train(input(&inputs, Activation::Relu)).unwrap();
        let (_, expected) = reference_train(input(&inputs, Activation::Relu)).unwrap();
        assert_close(&moments.mean, &expected.mean, 1e-12, "mean");
        assert_close(&moments.variance, &expected.variance, 1e-12, "variance");
    }

    #[test]
    fn relu_lets_a_nan_through() {
        let x = Tensor::new(&[[f32::NAN], [1.0]], &candle_core::Device::Cpu).unwrap();
        let one = Tensor::new(&[1f32], &candle_core::Device::Cpu).unwrap();
        let input =
            BatchNormInput { x: &x, gamma: &one, beta: &one, eps: 1e-5, activation: Activation::Relu };
        let (y, _) = batch_norm_train(input).unwrap();
        assert!(y.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0].is_nan());
    }
}
