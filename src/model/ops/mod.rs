//! Tensor operations of which every gradient is correct, one file an operation: forward, backward, a reference made
//! of candle's own operations, and the gradient test of both.
//!
//! Layout: activations are channels-last (`[.., channels]`), so that a convolution gathers contiguous runs and every
//! other operation sees a matrix of rows. Weights keep torch's layout.
//!
//! Invariant: on the CPU the result depends on the inputs alone, not on the number of threads. Work is cut into parts
//! whose sizes follow from shapes; each part is computed by one thread; partial sums are combined in the parts' order.
//!
//! On a GPU some operations have kernels of their own for f32 (`gpu`, and `NAME.cu` beside `NAME.rs`); the others run the
//! reference there. Every operation takes f32 and f64: f64 is what the gradient checks run in. Products of f32 tensors may be taken in bf16 ([`Precision`]): `arithmetic` says what an operand is then,
//! `bf16` multiplies, and `vector` compiles the loops between products for the widest instructions there are.
//!
//! Why own operations: candle's `LayerNorm` and `softmax_last_dim` record no backward and say nothing, its max-pool
//! has none where kernel and stride differ, ReLU's gradient at 0 is 1, and the convolution's backward is many times
//! slower than its forward. And a whole block as one operation (a transformer's, a residual network's) keeps in the cache
//! what a chain of operations sends through memory.

mod adamw;
mod add_bias;
mod add_relu;
mod arithmetic;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod batch_norm;
mod bf16;
#[cfg(target_arch = "x86_64")]
mod blocks;
mod channels_last;
mod conv2d;
mod conv_norm;
mod frozen_conv;
mod gelu;
#[cfg(any(test, feature = "cuda"))]
mod gpu;
#[cfg(test)]
pub(super) mod gradient_check;
mod kernel;
mod layer_norm;
mod linear;
mod matrix;
mod max_pool2d;
mod panels;
mod patches;
mod product;
mod single;
mod softmax;
mod transformer_block;
mod unfold;
mod vector;

pub use adamw::{AdamWStep, AdamWTensor, adamw, sums_of_squares};
pub use add_relu::add_relu;
pub use arithmetic::Precision;
pub use batch_norm::{Activation, BatchNormInput, Moments, batch_norm_eval, batch_norm_train};
pub use bf16::is_faster as bf16_is_faster;
pub use channels_last::channels_last;
pub use conv_norm::{ConvNormRule, ConvNormStep, ResidualSteps, conv_norm, residual_block};
pub use conv2d::conv2d;
pub use frozen_conv::{FrozenConvNorm, FrozenNorm};
#[cfg(feature = "cuda")]
pub use gpu::cuda::device as cuda_device;
pub use layer_norm::layer_norm;
pub use linear::linear;
pub use max_pool2d::max_pool2d;
pub use transformer_block::{
    BlockLayout, BlockParameter, BlockSpec, FrozenBlock, Output, transformer_block_of,
};

use candle_core::{DType, Device, Tensor};

/// A window that slides over an image: square kernel, the same stride and padding along both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub kernel: usize,
    pub stride: usize,
    pub padding: usize,
}

impl Window {
    /// Positions of the window along a side of `size` pixels (floor, as torch counts); zero where it does not fit.
    pub fn positions(&self, size: usize) -> usize {
        match (size + 2 * self.padding).checked_sub(self.kernel) {
            Some(room) => room / self.stride + 1,
            None => 0,
        }
    }
}

/// Whether the hand-written kernels for the CPU apply.
fn has_kernel(tensor: &Tensor) -> bool {
    matches!(tensor.device(), Device::Cpu)
}

/// Whether the hand-written kernels for a GPU apply, of operations that have some.
fn has_gpu_kernel(tensor: &Tensor) -> bool {
    cfg!(feature = "cuda") && tensor.device().is_cuda() && tensor.dtype() == DType::F32
}
