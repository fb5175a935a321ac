//! A block whose parameters will not change: its weights are brought into the products' layout once.
//!
//! Invariant: it computes what `transformer_block` computes of the same parameters, bit for bit.

use candle_core::{DType, Device, Result, Tensor};

use super::super::arithmetic::{Arithmetic, Precision};
use super::super::bf16::Bf16;
use super::super::kernel::View;
use super::super::single::Single;
use super::forward::Forward;
use super::weights::ForwardWeights;
use super::{BlockLayout, BlockSpec, Geometry, transformer_block};

/// See the module's text.
pub struct FrozenBlock {
    parameters: Tensor,
    /// `None` off the CPU, where there is no layout of our own.
    weights: Option<Prepared>,
}

enum Prepared {
    Single(ForwardWeights<Single>),
    Bf16(ForwardWeights<Bf16>),
}

impl FrozenBlock {
    /// `parameters`: a vector in [`BlockLayout`]'s order for blocks of `width`.
    ///
    /// # Errors
    /// For parameters of another width.
    pub fn new(parameters: Tensor, width: usize, precision: Precision) -> Result<Self> {
        BlockLayout { width }.check(parameters.shape())?;
        let ours = matches!(parameters.device(), Device::Cpu) && parameters.dtype() == DType::F32;
        let prepare = || -> Result<Prepared> {
            let view = View::of(&parameters);
            let values = view.slice::<f32>()?;
            Ok(match precision {
                Precision::F32 => Prepared::Single(ForwardWeights::new(width, values)),
                Precision::Bf16 => Prepared::Bf16(ForwardWeights::new(width, values)),
            })
        };
        let weights = ours.then(prepare).transpose()?;
        Ok(FrozenBlock { parameters, weights })
    }

    /// As [`transformer_block`]. An `x` that is part of a graph goes through that operation, so that gradients pass.
    pub fn forward(&self, x: &Tensor, spec: BlockSpec) -> Result<Tensor> {
        match (&self.weights, spec.precision) {
            (Some(Prepared::Single(weights)), Precision::F32) if !x.track_op() => {
                self.run(x, spec, Single::new(), weights)
            }
            (Some(Prepared::Bf16(weights)), Precision::Bf16) if !x.track_op() => {
                self.run(x, spec, Bf16::new(), weights)
            }
            _ => transformer_block(x, &self.parameters, spec),
        }
    }

    fn run<A: Arithmetic>(
        &self,
        x: &Tensor,
        spec: BlockSpec,
        arithmetic: A,
        weights: &ForwardWeights<A>,
    ) -> Result<Tensor> {
        let x = x.contiguous()?;
        let geometry = Geometry::of(x.layout(), self.parameters.layout(), spec)?;
        let (x_view, parameters) = (View::of(&x), View::of(&self.parameters));
        let pass = Forward::new(geometry, arithmetic, parameters.slice()?, weights);
        let y: Vec<A::Wide> = pass.run(x_view.slice()?);
        Tensor::from_vec(y, (geometry.batch, geometry.queries, geometry.width), x.device())
    }
}
