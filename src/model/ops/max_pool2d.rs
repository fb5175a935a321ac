//! Maximum over overlapping windows of channels-last images (candle's has a backward only where kernel = stride).
//!
//! Where a gradient is asked for, the forward pass keeps where each maximum stood; among equals the first in row order gets
//! it, as in torch. Parts are whole images.

use std::sync::OnceLock;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::kernel::{Real, View, into_storage, slice, tensor_like, with_real};
use super::{Window, has_kernel};
use crate::widest::widest;

/// `x` [batch, height, width, channels] -> [batch, out_height, out_width, channels]. Padding never wins; it must be
/// at most half the kernel, so that no window lies in it altogether.
pub fn max_pool2d(x: &Tensor, window: Window) -> Result<Tensor> {
    if window.padding * 2 > window.kernel {
        bail!("max-pool2d: padding {} is more than half of kernel {}", window.padding, window.kernel);
    }
    if !has_kernel(x) {
        return reference(x, window);
    }
    x.contiguous()?.apply_op1(MaxPool2d { window, tracked: x.track_op(), winners: OnceLock::new() })
}

/// The maximum of shifted copies. A window over the edge takes the nearest row or column inside once more, which is
/// in the window anyway, so that no padding value is needed. Equal maxima share the gradient.
pub(super) fn reference(x: &Tensor, window: Window) -> Result<Tensor> {
    let (_, height, width, _) = x.dims4()?;
    let x = x.contiguous()?;
    let shifted_indices = |size: usize, shift: usize| {
        let last = (size - 1) as u32;
        let index = |position: usize| {
            ((position * window.stride + shift).saturating_sub(window.padding) as u32).min(last)
        };
        let indices: Vec<u32> = (0..window.positions(size)).map(index).collect();
        Tensor::new(indices, x.device())
    };
    let mut result: Option<Tensor> = None;
    for row in 0..window.kernel {
        let rows = x.index_select(&shifted_indices(height, row)?, 1)?;
        for column in 0..window.kernel {
            let shifted = rows.index_select(&shifted_indices(width, column)?, 2)?;
            result = Some(match result {
                None => shifted,
                Some(result) => result.maximum(&shifted)?,
            });
        }
    }
    result.ok_or_else(|| candle_core::Error::Msg("max-pool2d: empty kernel".into()).bt())
}

struct MaxPool2d {
    window: Window,
    tracked: bool,
    /// For each output element its maximum's place within its image. Set by the forward pass where it is tracked.
    winners: OnceLock<Vec<u32>>,
}

#[derive(Clone, Copy)]
struct Geometry {
    batch: usize,
    height: usize,
    width: usize,
    channels: usize,
    out_height: usize,
    out_width: usize,
    window: Window,
}

impl Geometry {
    fn of(x: &Layout, window: Window) -> Result<Self> {
        let (batch, height, width, channels) = x.shape().dims4()?;
        let (out_height, out_width) = (window.positions(height), window.positions(width));
        if batch * channels * out_height * out_width == 0 || u32::try_from(height * width * channels).is_err()
        {
            bail!("max-pool2d: {window:?} does not fit input {:?}", x.shape());
        }
        Ok(Geometry { batch, height, width, channels, out_height, out_width, window })
    }

    fn image_len(&self) -> usize {
        self.height * self.width * self.channels
    }

    fn out_len(&self) -> usize {
        self.out_height * self.out_width * self.channels
    }

    /// Maxima.
    fn forward<T: Real>(&self, x: &[T]) -> Vec<T> {
        let mut y = vec![T::ZERO; self.batch * self.out_len()];
        y.par_chunks_mut(self.out_len()).zip(x.par_chunks(self.image_len())).for_each(|(y, x)| {
            for (position, y) in y.chunks_exact_mut(self.channels).enumerate() {
                let mut taps = self.taps(position).map(|at| &x[at..at + self.channels]);
                y.copy_from_slice(taps.next().expect("a window lies in part in its image"));
                for x in taps {
                    widest!(
                        y.iter_mut()
                            .zip(x)
                            .for_each(|(y, &value)| *y = if wins(value, *y) { value } else { *y })
                    );
                }
            }
        });
        y
    }

    /// Maxima and their places.
    fn forward_with_places<T: Real>(&self, x: &[T]) -> (Vec<T>, Vec<u32>) {
        let mut y = vec![T::ZERO; self.batch * self.out_len()];
        let mut winners = vec![0u32; y.len()];
        y.par_chunks_mut(self.out_len())
            .zip(winners.par_chunks_mut(self.out_len()))
            .zip(x.par_chunks(self.image_len()))
            .for_each(|((y, winners), x)| {
                let outputs = y.chunks_exact_mut(self.channels).zip(winners.chunks_exact_mut(self.channels));
                for (position, (y, winners)) in outputs.enumerate() {
                    self.pool_one(x, position, y, winners);
                }
            });
        (y, winners)
    }

    /// All channels of one output position.
    fn pool_one<T: Real>(&self, x: &[T], position: usize, y: &mut [T], winners: &mut [u32]) {
        for (tap, at) in self.taps(position).enumerate() {
            let (x, first) = (&x[at..at + self.channels], tap == 0);
            widest! {
                for (channel, ((&value, y), winner)) in x.iter().zip(&mut *y).zip(&mut *winners).enumerate() {
                    let wins = first || wins(value, *y);
                    *y = if wins { value } else { *y };
                    *winner = if wins { (at + channel) as u32 } else { *winner };
                }
            }
        }
    }

    /// Where the pixels under the window of an output position start in an image, in row order.
    fn taps(&self, position: usize) -> impl Iterator<Item = usize> + use<> {
        let Window { kernel, stride, padding } = self.window;
        let inside =
            |start: usize, size: usize| start.saturating_sub(padding)..(start + kernel - padding).min(size);
        let rows = inside(position / self.out_width * stride, self.height);
        let columns = inside(position % self.out_width * stride, self.width);
        let (width, channels) = (self.width, self.channels);
        rows.flat_map(move |row| columns.clone().map(move |column| (row * width + column) * channels))
    }

    fn backward<T: Real>(&self, winners: &[u32], grad: &[T]) -> Vec<T> {
        let mut dx = vec![T::ZERO; self.batch * self.image_len()];
        dx.par_chunks_mut(self.image_len())
            .zip(winners.par_chunks(self.out_len()))
            .zip(grad.par_chunks(self.out_len()))
            .for_each(|((dx, winners), grad)| {
                for (&winner, &grad) in winners.iter().zip(grad) {
                    dx[winner as usize] += grad;
                }
            });
        dx
    }
}

/// Whether `value` takes the place of the largest so far. A NaN does and stays, as in torch: a later check must see it.
#[inline(always)]
fn wins<T: Real>(value: T, largest: T) -> bool {
    value > largest || value.is_nan()
}

impl CustomOp1 for MaxPool2d {
    fn name(&self) -> &'static str {
        "max-pool2d"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let geometry = Geometry::of(layout, self.window)?;
        let (storage, winners) = with_real!(storage.dtype(), "max-pool2d", T => {
            let x = slice(storage, layout)?;
            Ok(if self.tracked {
                let (y, winners) = geometry.forward_with_places::<T>(x);
                (into_storage(y), Some(winners))
            } else {
                (into_storage(geometry.forward::<T>(x)), None)
            })
        })?;
        if let Some(winners) = winners
            && self.winners.set(winners).is_err()
        {
            bail!("max-pool2d: one operation applied twice");
        }
        let Geometry { batch, out_height, out_width, channels, .. } = geometry;
        Ok((storage, Shape::from((batch, out_height, out_width, channels))))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let Some(winners) = self.winners.get() else { bail!("max-pool2d: backward before forward") };
        let geometry = Geometry::of(x.layout(), self.window)?;
        let grad = grad.contiguous()?;
        with_real!(x.dtype(), "max-pool2d", T => {
            tensor_like(geometry.backward::<T>(winners, View::of(&grad).slice()?), x)
        })
        .map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradient_check::{assert_gradients, assert_same, random};
    use candle_core::{Device, Var};

    /// ResNet's stem.
    const STEM: Window = Window { kernel: 3, stride: 2, padding: 1 };

    #[test]
    fn gradients_equal_finite_differences() {
        for window in [STEM, Window { kernel: 2, stride: 2, padding: 0 }] {
            let inputs = [random((2, 5, 6, 3), 1)];
            assert_gradients(&inputs, |x| max_pool2d(&x[0], window));
            assert_gradients(&inputs, |x| reference(&x[0], window));
            assert_same(&inputs, |x| max_pool2d(&x[0], window), |x| reference(&x[0], window));
        }
    }

    #[test]
    fn negative_images_do_not_lose_to_the_padding() {
        let x = Tensor::full(-2f32, (1, 3, 3, 1), &Device::Cpu).unwrap();
        for y in [max_pool2d(&x, STEM).unwrap(), reference(&x, STEM).unwrap()] {
            assert_eq!(y.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [-2.0; 4]);
        }
    }

    #[test]
    fn the_first_of_equal_maxima_gets_the_gradient() {
        let x = Var::zeros((1, 3, 3, 1), candle_core::DType::F32, &Device::Cpu).unwrap();
        let window = Window { kernel: 3, stride: 1, padding: 0 };
        let grads = max_pool2d(&x, window).unwrap().sum_all().unwrap().backward().unwrap();
        let grad = grads.get(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(grad, [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn without_a_gradient_the_maxima_are_the_same_and_a_value_that_is_no_number_stays() {
        let mut values: Vec<f64> = random((2, 7, 6, 3), 1).flatten_all().unwrap().to_vec1().unwrap();
        values[30] = f64::NAN;
        let still = Tensor::from_vec(values, (2, 7, 6, 3), &Device::Cpu).unwrap();
        let bits = |y: Tensor| -> Vec<u64> {
            y.flatten_all().unwrap().to_vec1::<f64>().unwrap().into_iter().map(f64::to_bits).collect()
        };
        let tracked = max_pool2d(Var::from_tensor(&still).unwrap().as_tensor(), STEM).unwrap();
        let untracked = bits(max_pool2d(&still, STEM).unwrap());
        assert!(untracked.iter().any(|&bits| f64::from_bits(bits).is_nan()));
        assert_eq!(bits(tracked), untracked);
    }
}
