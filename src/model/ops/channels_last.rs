//! Images from planes, [batch, channels, height, width], to channels last, [batch, height, width, channels].

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::has_kernel;
use super::kernel::{Real, into_storage, slice, with_real};

/// `images` [batch, channels, height, width] -> [batch, height, width, channels], contiguous.
pub fn channels_last(images: &Tensor) -> Result<Tensor> {
    if !has_kernel(images) {
        return reference(images);
    }
    images.contiguous()?.apply_op1(ChannelsLast)
}

pub(super) fn reference(images: &Tensor) -> Result<Tensor> {
    images.permute((0, 2, 3, 1))?.contiguous()
}

struct ChannelsLast;

impl CustomOp1 for ChannelsLast {
    fn name(&self) -> &'static str {
        "channels-last"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, channels, height, width) = layout.shape().dims4()?;
        let storage = with_real!(storage.dtype(), "channels-last", T => {
            Ok(into_storage(forward::<T>(slice(storage, layout)?, channels, height * width)))
        })?;
        Ok((storage, (batch, height, width, channels).into()))
    }

    /// Nothing takes a gradient by images in training; this one is candle's own copy.
    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.permute((0, 3, 1, 2))?.contiguous()?))
    }
}

/// Image by image.
fn forward<T: Real>(images: &[T], channels: usize, pixels: usize) -> Vec<T> {
    let mut out = vec![T::ZERO; images.len()];
    let image = (channels * pixels).max(1);
    out.par_chunks_exact_mut(image).zip(images.par_chunks_exact(image)).for_each(|(out, image)| {
        for (channel, plane) in image.chunks_exact(pixels).enumerate() {
            let out = out[channel..].iter_mut().step_by(channels);
            out.zip(plane).for_each(|(out, &value)| *out = value);
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradient_check::{assert_gradients, assert_same, random};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn it_is_candles_copy_and_has_its_gradient(
            batch in 1usize..4, channels in 1usize..5, height in 1usize..6, width in 1usize..6,
        ) {
            let images = [random((batch, channels, height, width), 1)];
            assert_same(&images, |x| channels_last(&x[0]), |x| reference(&x[0]));
            assert_gradients(&images, |x| channels_last(&x[0]));
        }
    }

    #[test]
    fn no_images_are_no_error() {
        let none = Tensor::zeros((0, 3, 4, 4), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        assert_eq!(channels_last(&none).unwrap().dims(), [0, 4, 4, 3]);
    }
}
