//! Patches of images on a GPU: `unfold.cu`.

use candle_core::Result;

use super::{Argument, Call, Machine, Module, Span, blocks_of, count};
use crate::model::ops::Window;

/// Channels-last images and the window that slides over them.
#[derive(Clone, Copy, Debug)]
pub(in crate::model::ops) struct Unfolding {
    pub batch: usize,
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    pub window: Window,
}

impl Unfolding {
    fn pixels(&self) -> usize {
        self.batch * self.height * self.width * self.channels
    }

    /// Of the patches.
    pub fn rows(&self) -> usize {
        self.batch * self.window.positions(self.height) * self.window.positions(self.width)
    }

    /// Elements of a patch.
    pub fn patch(&self) -> usize {
        self.window.kernel * self.window.kernel * self.channels
    }
}

/// `x` [batch, height, width, channels] -> [rows, patch].
pub(in crate::model::ops) fn forward<M: Machine>(
    machine: &M,
    x: Span<'_>,
    unfolding: Unfolding,
) -> Result<M::Memory> {
    x.expect(unfolding.pixels(), "the images")?;
    launch(machine, "unfold_forward", x, unfolding, unfolding.rows() * unfolding.patch())
}

/// The gradient of x from that of its patches.
pub(in crate::model::ops) fn backward<M: Machine>(
    machine: &M,
    grad: Span<'_>,
    unfolding: Unfolding,
) -> Result<M::Memory> {
    grad.expect(unfolding.rows() * unfolding.patch(), "the patches")?;
    launch(machine, "unfold_backward", grad, unfolding, unfolding.pixels())
}

/// Both kernels take what they read, a result of `elements`, and the shapes.
fn launch<M: Machine>(
    machine: &M,
    kernel: &'static str,
    input: Span<'_>,
    unfolding: Unfolding,
    elements: usize,
) -> Result<M::Memory> {
    let out = machine.allocate(elements)?;
    let Unfolding { height, width, channels, window, .. } = unfolding;
    let mut arguments: Vec<Argument> = vec![input.into(), machine.span(&out).into()];
    let (out_height, out_width) = (window.positions(height), window.positions(width));
    for value in [
        elements,
        height,
        width,
        channels,
        window.kernel,
        window.stride,
        window.padding,
        out_height,
        out_width,
    ] {
        arguments.push(count(value)?);
    }
    let call = Call { module: Module::Unfold, kernel, blocks: blocks_of(elements)?, arguments };
    // SAFETY: the kernels' parameters in their order; they touch the images and the patches, whose spans the callers have checked.
    unsafe { machine.launch(call) }?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::super::emulation::{Memory, emulate};
    use super::*;
    use crate::model::ops::gradient_check::{assert_close, random};
    use crate::model::ops::unfold::reference;
    use candle_core::{DType, Var};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn patches_and_gradients_are_the_references(
            (batch, channels) in (1usize..3, 1usize..5),
            (height, width) in (1usize..9, 1usize..9),
            (kernel, stride, padding) in (1usize..5, 1usize..4, 0usize..4),
        ) {
            let window = Window { kernel, stride, padding };
            let unfolding = Unfolding { batch, height, width, channels, window };
            prop_assume!(unfolding.rows() > 0);
            let x = random((batch, height, width, channels), 1).to_dtype(DType::F32).unwrap();
            let grad = random((unfolding.rows(), unfolding.patch()), 2).to_dtype(DType::F32).unwrap();
            let (given, given_grad) = (Memory::of(&x), Memory::of(&grad));
            let results = emulate(|machine| {
                let patches = forward(machine, machine.span(&given), unfolding)?;
                Ok(vec![patches, backward(machine, machine.span(&given_grad), unfolding)?])
            });
            let var = Var::from_tensor(&x).unwrap();
            let patches = reference(&var, window).unwrap();
            let grads = (&patches * &grad).unwrap().sum_all().unwrap().backward().unwrap();
            assert_close(&patches, &results[0].tensor(patches.shape()), 0.0, "patches");
            let dx = grads.get(&var).unwrap();
            assert_close(dx, &results[1].tensor(dx.shape()), 1e-6, "dx");
        }
    }
}
