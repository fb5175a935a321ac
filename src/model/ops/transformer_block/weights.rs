//! A block's weights as right operands, made once a pass.

use super::super::arithmetic::{Arithmetic, Right, Rows};
use super::{BlockParameter as P, Geometry};

/// Room for the operands made of a weight: narrowed, and grouped.
pub(super) type WeightBuffers<A> = [[Vec<<A as Arithmetic>::Narrow>; 2]; 4];

/// How rows become a right operand.
type Group<'a, E> = fn(Rows<'a, E>, &'a mut Vec<E>) -> Right<'a, E>;

pub(super) struct Weights<'a, A: Arithmetic> {
    pub qkv: Right<'a, A::Narrow>,
    pub proj: Right<'a, A::Narrow>,
    pub fc1: Right<'a, A::Narrow>,
    pub fc2: Right<'a, A::Narrow>,
}

impl<'a, A: Arithmetic> Weights<'a, A> {
    /// `group` says what they are contracted over: [`Arithmetic::group_columns`] their inputs, [`Arithmetic::group_rows`]
    /// their outputs.
    pub(super) fn new(
        geometry: &Geometry,
        parameters: &'a [A::Wide],
        buffers: &'a mut WeightBuffers<A>,
        group: Group<'a, A::Narrow>,
    ) -> Self {
        let right = |parameter: P, [narrow, grouped]: &'a mut [Vec<A::Narrow>; 2]| {
            let weight = A::narrow(&parameters[geometry.layout().range(parameter)], narrow);
            let columns = if parameter == P::Fc2Weight { geometry.hidden() } else { geometry.width };
            group(Rows::new(weight, weight.len() / columns, columns), grouped)
        };
        let [qkv, proj, fc1, fc2] = buffers;
        Weights {
            qkv: right(P::QkvWeight, qkv),
            proj: right(P::ProjWeight, proj),
            fc1: right(P::Fc1Weight, fc1),
            fc2: right(P::Fc2Weight, fc2),
        }
    }
}
