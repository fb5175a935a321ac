//! Two-dimensional convolution of channels-last images, as a product of their patches with the weight (`patches`). For where
//! its normalisation is by given moments; in training both are one operation (`conv_norm`).

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};

use super::arithmetic::{Arithmetic, Full, Precision};
use super::bf16::Bf16;
use super::kernel::{Real, View, into_storage, slice, tensor_like};
use super::patches::{Geometry, Product, Source, WeightGradient, input_gradient};
use super::product::product_transposed;
use super::single::Single;
use super::unfold::unfold;
use super::{Window, has_kernel};

/// `x` [batch, height, width, channels], `weight` [out_channels, channels, kernel, kernel]
/// -> [batch, out_height, out_width, out_channels]. No bias: a normalisation follows every convolution here.
pub fn conv2d(x: &Tensor, weight: &Tensor, window: Window, precision: Precision) -> Result<Tensor> {
    if !has_kernel(x) {
        return reference(x, weight, window, precision);
    }
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let input_tracked = x.track_op();
    match (x.dtype(), precision) {
        (DType::F64, _) => {
            x.apply_op2(&weight, Conv2d { window, input_tracked, arithmetic: Full::<f64>::new() })
        }
        (_, Precision::F32) => {
            x.apply_op2(&weight, Conv2d { window, input_tracked, arithmetic: Single::new() })
        }
        (_, Precision::Bf16) => {
            x.apply_op2(&weight, Conv2d { window, input_tracked, arithmetic: Bf16::new() })
        }
    }
}

/// Patches, then one product. candle's own `conv2d` is no reference: its backward takes the rounding of the height for that of the
/// width too, and fails on images that are not square.
pub(super) fn reference(x: &Tensor, weight: &Tensor, window: Window, precision: Precision) -> Result<Tensor> {
    let (batch, height, width, _) = x.dims4()?;
    let patches = unfold(x, window)?;
    let weight = weight.permute((0, 2, 3, 1))?.flatten_from(1)?;
    let shape = (batch, window.positions(height), window.positions(width), weight.dim(0)?);
    product_transposed(&patches, &weight, precision)?.reshape(shape)
}

struct Conv2d<A> {
    window: Window,
    /// False where the input is data: its gradient is not computed.
    input_tracked: bool,
    arithmetic: A,
}

impl<A: Arithmetic> CustomOp2 for Conv2d<A> {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if s1.dtype() != s2.dtype() {
            bail!("conv2d: input of {:?}, weight of {:?}", s1.dtype(), s2.dtype());
        }
        let geometry = Geometry::of(l1.dims(), l2.dims(), self.window)?;
        let images = geometry.operand::<A>(slice(s1, l1)?);
        let (weight, mut scratch) = (geometry.kernel_order::<A>(slice(s2, l2)?), Vec::new());
        let product = Product {
            arithmetic: self.arithmetic,
            images: &images,
            sampling: geometry.sampling(&images),
            weight: geometry.weight::<A>(&weight, &mut scratch),
        };
        let (y, _) = product.for_tiles(|_, product, y| y.copy_from_slice(product));
        Ok((into_storage(y), Shape::from(geometry.out_shape())))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let geometry = Geometry::of(x.dims(), weight.dims(), self.window)?;
        let (x_view, w_view, grad) = (View::of(x), View::of(weight), View::of(&grad));
        let images = geometry.operand::<A>(x_view.slice()?);
        let gradient = geometry.gradient_operand::<A>(grad.slice()?);
        let arithmetic = self.arithmetic;
        let mut dw = vec![A::Wide::ZERO; geometry.weight_elements()];
        WeightGradient { arithmetic, geometry, images: &images, gradient: &gradient }.write(&mut dw);
        let dx = || {
            let weight = geometry.kernel_order::<A>(w_view.slice()?);
            let source = Source { geometry, weight: &weight, gradient: &gradient };
            tensor_like(input_gradient(arithmetic, &[source]), x)
        };
        let dx = self.input_tracked.then(dx).transpose()?;
        Ok((dx, Some(tensor_like(dw, weight)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradient_check::{
        assert_gradients, assert_near, assert_same, random, weighted_sum,
    };
    use candle_core::Var;
    use proptest::prelude::*;

    const WINDOWS: [Window; 4] = [
        Window { kernel: 3, stride: 1, padding: 1 },
        Window { kernel: 3, stride: 2, padding: 1 },
        Window { kernel: 1, stride: 2, padding: 0 },
        Window { kernel: 5, stride: 2, padding: 3 },
    ];

    #[test]
    fn gradients_equal_finite_differences() {
        for window in WINDOWS {
            let inputs = [random((2, 4, 5, 2), 1), random((3, 2, window.kernel, window.kernel), 2)];
            assert_gradients(&inputs, |x| conv2d(&x[0], &x[1], window, Precision::F32));
            assert_gradients(&inputs, |x| reference(&x[0], &x[1], window, Precision::F32));
        }
    }

    #[test]
    fn several_tiles_give_what_the_reference_gives() {
        // 4 x 17 x 18 positions: tiles that end inside an image, and in a part of their own.
        for window in WINDOWS {
            let inputs = [random((4, 17, 18, 3), 1), random((5, 3, window.kernel, window.kernel), 2)];
            assert_same(
                &inputs,
                |x| conv2d(&x[0], &x[1], window, Precision::F32),
                |x| reference(&x[0], &x[1], window, Precision::F32),
            );
        }
    }

    /// Results and both gradients, in one vector each.
    fn results(inputs: &[Tensor; 2], window: Window, precision: Precision) -> [Vec<f32>; 3] {
        let vars = inputs.each_ref().map(|t| Var::from_tensor(&t.to_dtype(DType::F32).unwrap()).unwrap());
        let y = conv2d(vars[0].as_tensor(), vars[1].as_tensor(), window, precision).unwrap();
        let grads = weighted_sum(&y).backward().unwrap();
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        [flat(&y), flat(grads.get(&vars[0]).unwrap()), flat(grads.get(&vars[1]).unwrap())]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Any sizes, odd ones included: f32 equals the reference, bf16 stays as close to it as 8 bits allow.
        #[test]
        fn every_shape_gives_what_the_reference_gives(
            (batch, height, width) in (1usize..12, 1usize..20, 1usize..20),
            (channels, out_channels) in (1usize..7, 1usize..40),
            (kernel, stride, padding) in (1usize..6, 1usize..4, 0usize..4),
        ) {
            let window = Window { kernel, stride, padding };
            prop_assume!(window.positions(height) * window.positions(width) > 0);
            let inputs =
                [random((batch, height, width, channels), 1), random((out_channels, channels, kernel, kernel), 2)];
            let f32_op = |x: &[Tensor]| conv2d(&x[0], &x[1], window, Precision::F32);
            assert_same(&inputs, f32_op, |x| reference(&x[0], &x[1], window, Precision::F32));
            let exact = results(&inputs, window, Precision::F32);
            let rounded = results(&inputs, window, Precision::Bf16);
            exact.iter().zip(&rounded).for_each(|(exact, rounded)| assert_near(exact, rounded, 0.01));
        }
    }

    #[test]
    fn threads_change_no_bit() {
        let inputs = [random((9, 17, 16, 4), 1), random((6, 4, 3, 3), 2)];
        for precision in [Precision::F32, Precision::Bf16] {
            for window in [WINDOWS[0], WINDOWS[1]] {
                let with = |threads: usize| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    pool.install(|| results(&inputs, window, precision))
                };
                assert_eq!(with(1), with(3));
            }
        }
    }

    #[test]
    fn a_weight_for_other_channels_is_refused() {
        assert!(
            conv2d(&random((1, 4, 4, 2), 1), &random((3, 3, 3, 3), 2), WINDOWS[0], Precision::F32).is_err()
        );
        assert!(
            conv2d(
                &random((1, 1, 1, 3), 1),
                &random((3, 3, 5, 5), 2),
                Window { kernel: 5, stride: 1, padding: 0 },
                Precision::F32
            )
            .is_err()
        );
    }
}
