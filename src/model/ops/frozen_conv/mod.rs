//! A convolution with its batch normalisation, neither of which will change: one product, scaled and shifted by channel.
//!
//! The normalisation's scale goes into the weight and its shift into a bias; the weight is brought into the products'
//! layout at the first use. A kernel of 3 x 3 at stride 1 is taken by Winograd's algorithm where products are f32 and
//! there are output tiles enough, every other one as a product of patches. No graph is recorded.
//!
//! Parts: tiles of output positions, or panels of output channels where there are few positions.

mod winograd;

use std::sync::OnceLock;

use candle_core::{DType, Device, Result, Tensor, bail};
use rayon::prelude::*;

use super::Window;
use super::arithmetic::{Arithmetic, Precision};
use super::batch_norm::Activation;
use super::bf16::Bf16;
use super::kernel::View;
use super::panels::Panels;
use super::patches::{Geometry, Product};
use super::single::Single;
use crate::widest::widest;
use winograd::Winograd;

/// Up to so many output positions the work is shared out by panels of channels: a tile of fewer rows would read the whole
/// weight for each of a few products.
const FEW_POSITIONS: usize = 32;
/// Output channels of a part then, or a little more to make whole panels: fewer share out less than the handing over takes.
const COLUMNS_PER_PART: usize = 64;
/// Input channels whose weights are brought into order together: with the panel's columns they stay in the cache.
const CHANNELS_PER_RUN: usize = 16;

/// What is known of the normalisation: vectors [channels].
#[derive(Clone, Copy)]
pub struct FrozenNorm<'a> {
    pub gamma: &'a Tensor,
    pub beta: &'a Tensor,
    pub mean: &'a Tensor,
    pub variance: &'a Tensor,
    pub eps: f64,
    pub activation: Activation,
}

/// See the module's text.
pub struct FrozenConvNorm {
    /// [out, in, kernel, kernel], as it was given.
    weight: Tensor,
    window: Window,
    precision: Precision,
    /// By output channel, of the weight.
    scale: Vec<f32>,
    /// By output channel, behind the product.
    bias: Vec<f32>,
    activation: Activation,
    single: OnceLock<Panels<Single>>,
    bf16: OnceLock<Panels<Bf16>>,
    winograd: OnceLock<Winograd>,
}

/// What is done to a product, row by row.
#[derive(Clone, Copy)]
struct Behind<'a> {
    bias: &'a [f32],
    /// Results below it are raised to it.
    floor: f32,
}

impl Behind<'_> {
    /// Over rows of all channels, with the shortcut's rows where there is one.
    fn apply(&self, y: &mut [f32], shortcut: Option<&[f32]>) {
        let (bias, floor) = (self.bias, self.floor);
        // Written so that NaN passes through: a later check must see it.
        let raised = |value: f32| if value < floor { floor } else { value };
        match shortcut {
            None => widest! {
                for y in y.chunks_exact_mut(bias.len()) {
                    y.iter_mut().zip(bias).for_each(|(y, &bias)| *y = raised(*y + bias));
                }
            },
            Some(shortcut) => widest! {
                for (y, shortcut) in y.chunks_exact_mut(bias.len()).zip(shortcut.chunks_exact(bias.len())) {
                    let values = y.iter_mut().zip(bias).zip(shortcut);
                    values.for_each(|((y, &bias), &shortcut)| *y = raised(*y + bias + shortcut));
                }
            },
        }
    }
}

impl FrozenConvNorm {
    /// `weight` [out, in, kernel, kernel]. `None` where there are no kernels of our own: off the CPU, and for f64.
    pub fn new(
        weight: &Tensor,
        norm: FrozenNorm<'_>,
        window: Window,
        precision: Precision,
    ) -> Result<Option<Self>> {
        if !matches!(weight.device(), Device::Cpu) || weight.dtype() != DType::F32 {
            return Ok(None);
        }
        let values = |tensor: &Tensor| tensor.to_dtype(DType::F64)?.to_vec1::<f64>();
        let [gamma, beta, mean, variance] = [norm.gamma, norm.beta, norm.mean, norm.variance].map(values);
        let (gamma, beta, mean, variance) = (gamma?, beta?, mean?, variance?);
        let outputs = weight.dim(0)?;
        if [&gamma, &beta, &mean, &variance].iter().any(|values| values.len() != outputs) {
            bail!(
                "conv-norm: a normalisation of {} channels behind weight {:?}",
                gamma.len(),
                weight.shape()
            );
        }
        let scale: Vec<f64> = gamma.iter().zip(&variance).map(|(g, v)| g / (v + norm.eps).sqrt()).collect();
        let bias =
            beta.iter().zip(&mean).zip(&scale).map(|((beta, mean), scale)| (beta - mean * scale) as f32);
        Ok(Some(FrozenConvNorm {
            weight: weight.detach().contiguous()?,
            window,
            precision,
            bias: bias.collect(),
            scale: scale.into_iter().map(|scale| scale as f32).collect(),
            activation: norm.activation,
            single: OnceLock::new(),
            bf16: OnceLock::new(),
            winograd: OnceLock::new(),
        }))
    }

    /// `x` [batch, height, width, in] -> [batch, height', width', out]: `activation(norm(conv(x)))`, or, with a shortcut of
    /// the result's shape, `relu(norm(conv(x)) + shortcut)`.
    pub fn forward(&self, x: &Tensor, shortcut: Option<&Tensor>) -> Result<Tensor> {
        let x = x.contiguous()?;
        let geometry = Geometry::of(x.dims(), self.weight.dims(), self.window)?;
        let Geometry { batch, out_height, out_width, out_channels, .. } = geometry;
        let shape = (batch, out_height, out_width, out_channels);
        let shortcut = shortcut.map(Tensor::contiguous).transpose()?;
        if let Some(shortcut) = &shortcut
            && shortcut.dims4()? != shape
        {
            bail!("conv-norm: a shortcut of {:?} for a result of {shape:?}", shortcut.shape());
        }
        let rectified = shortcut.is_some() || self.activation == Activation::Relu;
        let behind = Behind { bias: &self.bias, floor: if rectified { 0.0 } else { f32::NEG_INFINITY } };
        let (x_view, weight) = (View::of(&x), View::of(&self.weight));
        let (x_values, weight) = (x_view.slice::<f32>()?, weight.slice::<f32>()?);
        let shortcut_view = shortcut.as_ref().map(View::of);
        let shortcut = shortcut_view.as_ref().map(|view| view.slice::<f32>()).transpose()?;
        let y = match self.precision {
            Precision::F32 if Winograd::pays(&geometry) => {
                let weight = self.winograd.get_or_init(|| Winograd::new(&geometry, weight, &self.scale));
                weight.forward(&geometry, x_values, behind, shortcut)
            }
            Precision::F32 => {
                let weight = self.single.get_or_init(|| in_panels(&geometry, weight, &self.scale));
                forward(&geometry, Single::new(), x_values, weight, (behind, shortcut))
            }
            Precision::Bf16 => {
                let weight = self.bf16.get_or_init(|| in_panels(&geometry, weight, &self.scale));
                forward(&geometry, Bf16::new(), x_values, weight, (behind, shortcut))
            }
        };
        Tensor::from_vec(y, shape, x.device())
    }
}

/// The weight times `scale`, contracted over [kernel row, kernel column, padded channel].
fn in_panels<A: Arithmetic<Wide = f32>>(geometry: &Geometry, weight: &[f32], scale: &[f32]) -> Panels<A> {
    let Geometry { channels, out_channels, window: Window { kernel, .. }, .. } = *geometry;
    let (padded, area) = (channels.next_multiple_of(A::GROUP), kernel * kernel);
    let runs = channels.div_ceil(CHANNELS_PER_RUN);
    Panels::filled((area * padded, out_channels), runs, |run, out, put| {
        let first = run * CHANNELS_PER_RUN;
        for channel in first..(first + CHANNELS_PER_RUN).min(channels) {
            let taps = &weight[(out * channels + channel) * area..][..area];
            taps.iter().enumerate().for_each(|(tap, &w)| put(tap * padded + channel, w * scale[out]));
        }
    })
}

fn forward<A: Arithmetic<Wide = f32>>(
    geometry: &Geometry,
    arithmetic: A,
    x: &[f32],
    weight: &Panels<A>,
    (behind, shortcut): (Behind<'_>, Option<&[f32]>),
) -> Vec<f32> {
    let images = geometry.operand::<A>(x);
    let (sampling, weight) = (geometry.sampling(&images), weight.right());
    let product = Product { arithmetic, images: &images, sampling, weight };
    if geometry.positions() <= FEW_POSITIONS
        && geometry.out_channels > A::panel_columns(geometry.out_channels)
    {
        let mut y = by_panels(&product);
        behind.apply(&mut y, shortcut);
        return y;
    }
    let out = geometry.out_channels;
    let (y, _) = product.for_tiles(|positions, product, y: &mut [f32]| {
        y.copy_from_slice(product);
        behind.apply(y, shortcut.map(|shortcut| &shortcut[positions.start * out..positions.end * out]));
    });
    y
}

/// All positions at once, some panels of the weight on each thread.
fn by_panels<A: Arithmetic<Wide = f32>>(product: &Product<'_, A>) -> Vec<f32> {
    let out = product.weight.columns;
    let width = COLUMNS_PER_PART.next_multiple_of(product.weight.panel_columns);
    let parts: Vec<Vec<f32>> = (0..out.div_ceil(width))
        .into_par_iter()
        .map(|part| Product { weight: product.weight.panels(part * width, width), ..*product }.all())
        .collect();
    let positions = parts[0].len() / width.min(out);
    let mut y = vec![0.0; positions * out];
    for (position, y) in y.chunks_exact_mut(out).enumerate() {
        for (y, part) in y.chunks_mut(width).zip(&parts) {
            y.copy_from_slice(&part[position * y.len()..][..y.len()]);
        }
    }
    y
}

#[cfg(test)]
mod tests;
