//! The forward pass: each convolution's tiles leave their moments and their rows, one pass more makes the result.

use rayon::prelude::*;

use super::super::arithmetic::Arithmetic;
use super::super::batch_norm::{Activation, HostMoments};
use super::super::patches::{Geometry, Padded, Product};
use super::norm::{Addend, Channels, TileMoments};
use super::{Form, Plan, Saved, SavedRest, SavedStep};

pub(super) struct Forward<'a, A: Arithmetic> {
    pub plan: &'a Plan,
    pub arithmetic: A,
    pub parameters: &'a [A::Wide],
}

/// One step before its normalisation, and how it is normalised.
struct Step<A: Arithmetic> {
    saved: SavedStep<A::Narrow>,
    moments: HostMoments,
    channels: Channels<A::Wide>,
}

impl<A: Arithmetic> Forward<'_, A> {
    /// The result, what the backward pass will read, and the moments of each step.
    pub(super) fn run(&self, x: &[A::Wide]) -> (Vec<A::Wide>, Saved<A>, Vec<HostMoments>) {
        let operand = self.plan.steps[0].operand::<A>(x);
        let first = self.step(0, &operand);
        match self.plan.form {
            Form::Single(activation) => {
                let y = first.channels.finish(&first.saved.rows, &Addend::<A>::Nothing, activation);
                (y, Saved { x: operand, first: first.saved, rest: None }, vec![first.moments])
            }
            Form::Residual => self.residual(x, operand, first),
        }
    }

    fn residual(
        &self,
        x: &[A::Wide],
        operand: Padded<A::Narrow>,
        first: Step<A>,
    ) -> (Vec<A::Wide>, Saved<A>, Vec<HostMoments>) {
        let hidden = hidden_operand(&self.plan.steps[1], &first);
        let second = self.step(1, &hidden);
        let downsample = (self.plan.steps.len() > 2).then(|| self.step(2, &operand));
        let addend = match &downsample {
            None => Addend::Values(x),
            Some(step) => Addend::Normalised(&step.saved.rows, &step.channels),
        };
        let y = second.channels.finish::<A>(&second.saved.rows, &addend, Activation::Relu);
        let mut moments = vec![first.moments, second.moments];
        let downsample = downsample.map(|step| {
            moments.push(step.moments);
            step.saved
        });
        let rest = SavedRest { hidden, second: second.saved, downsample };
        (y, Saved { x: operand, first: first.saved, rest: Some(rest) }, moments)
    }

    fn step(&self, index: usize, images: &Padded<A::Narrow>) -> Step<A> {
        let (geometry, ranges) = (&self.plan.steps[index], self.plan.ranges(index));
        let weight = geometry.kernel_order::<A>(&self.parameters[ranges.weight]);
        let mut scratch = Vec::new();
        let product = Product {
            arithmetic: self.arithmetic,
            images,
            sampling: geometry.sampling(images),
            weight: geometry.weight::<A>(&weight, &mut scratch),
        };
        let channels = geometry.out_channels;
        let (rows, tiles) =
            product.for_tiles(|_, product, out| TileMoments::take::<A>(product, channels, out));
        let moments = TileMoments::combined(&tiles);
        let (gamma, beta) = (&self.parameters[ranges.gamma], &self.parameters[ranges.beta]);
        let channels = Channels::new(&moments, gamma, beta, self.plan.eps);
        Step { saved: SavedStep { weight, rows }, moments, channels }
    }
}

/// The first step's activated result, where the second reads it.
fn hidden_operand<A: Arithmetic>(second: &Geometry, first: &Step<A>) -> Padded<A::Narrow> {
    let mut operand = second.empty_operand::<A>();
    let (before, line) = (operand.before(), second.width * second.channels);
    let images = operand.images_mut().zip(first.saved.rows.par_chunks_exact(second.height * line));
    images.for_each(|(mut out, rows)| {
        for (y, rows) in rows.chunks_exact(line).enumerate() {
            first.channels.relu_line::<A>(rows, out.line(y, before, second.width));
        }
    });
    operand
}
