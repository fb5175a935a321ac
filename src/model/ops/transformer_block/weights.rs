//! A block's weights as right operands.

use super::super::arithmetic::{Arithmetic, Right, Rows};
use super::super::panels::Panels;
use super::{BlockLayout, BlockParameter as P, Geometry, MLP_RATIO};

/// For the forward pass: contracted over their inputs, made once a pass, or once for ever where they are frozen. Each is
/// cut into products of [width, width], whose results a thread keeps in its cache.
pub(super) struct ForwardWeights<A: Arithmetic> {
    /// Of queries, keys, values.
    pub qkv: [Panels<A>; 3],
    pub proj: Panels<A>,
    /// By parts of the hidden layer.
    pub fc1: [Panels<A>; MLP_RATIO],
    pub fc2: [Panels<A>; MLP_RATIO],
}

impl<A: Arithmetic> ForwardWeights<A> {
    /// `parameters` in the order of [`BlockLayout`].
    pub(super) fn new(width: usize, parameters: &[A::Wide]) -> Self {
        let layout = BlockLayout { width };
        let part = |parameter: P, start: usize, stride: usize| {
            let data = &parameters[layout.range(parameter)][start..];
            Panels::of_rows(Rows { data, rows: width, columns: width, stride })
        };
        ForwardWeights {
            qkv: std::array::from_fn(|index| part(P::QkvWeight, index * width * width, width)),
            proj: part(P::ProjWeight, 0, width),
            fc1: std::array::from_fn(|index| part(P::Fc1Weight, index * width * width, width)),
            fc2: std::array::from_fn(|index| part(P::Fc2Weight, index * width, MLP_RATIO * width)),
        }
    }
}

/// Room for the operands made of a weight: narrowed, and grouped.
pub(super) type WeightBuffers<A> = [[Vec<<A as Arithmetic>::Narrow>; 2]; 4];

/// For the backward pass: contracted over their outputs.
pub(super) struct BackwardWeights<'a, A: Arithmetic> {
    pub qkv: Right<'a, A::Narrow>,
    pub proj: Right<'a, A::Narrow>,
    pub fc1: Right<'a, A::Narrow>,
    pub fc2: Right<'a, A::Narrow>,
}

impl<'a, A: Arithmetic> BackwardWeights<'a, A> {
    pub(super) fn new(
        geometry: &Geometry,
        parameters: &'a [A::Wide],
        buffers: &'a mut WeightBuffers<A>,
    ) -> Self {
        let right = |parameter: P, [narrow, grouped]: &'a mut [Vec<A::Narrow>; 2]| {
            let weight = A::narrow(&parameters[geometry.layout().range(parameter)], narrow);
            let columns = if parameter == P::Fc2Weight { geometry.hidden() } else { geometry.width };
            A::group_rows(Rows::new(weight, weight.len() / columns, columns), grouped)
        };
        let [qkv, proj, fc1, fc2] = buffers;
        BackwardWeights {
            qkv: right(P::QkvWeight, qkv),
            proj: right(P::ProjWeight, proj),
            fc1: right(P::Fc1Weight, fc1),
            fc2: right(P::Fc2Weight, fc2),
        }
    }
}
