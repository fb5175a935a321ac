//! The backward pass, from the result's gradient to those of the input and of all parameters.

use std::ops::Range;

use rayon::prelude::*;

use super::super::arithmetic::Arithmetic;
use super::super::batch_norm::{Activation, HostMoments};
use super::super::kernel::Real;
use super::super::patches::{Geometry, Padded, Product, Source, WeightGradient, input_gradient};
use super::norm::{Channels, GradientSums, Passing, ThroughMoments, add_passing};
use super::{Form, Plan, Saved, SavedRest, SavedStep};

pub(super) struct Backward<'a, A: Arithmetic> {
    pub plan: &'a Plan,
    pub arithmetic: A,
    pub parameters: &'a [A::Wide],
    pub saved: &'a Saved<A>,
    pub moments: &'a [HostMoments],
}

impl<A: Arithmetic> Backward<'_, A> {
    /// Gradients of the input, where it has one, and of the parameters.
    pub(super) fn run(&self, y: &[A::Wide], grad: &[A::Wide]) -> (Option<Vec<A::Wide>>, Vec<A::Wide>) {
        let mut gradient = vec![A::Wide::ZERO; self.parameters.len()];
        let dx = match (self.plan.form, &self.saved.rest) {
            (Form::Residual, Some(rest)) => {
                let passing = Passing { grad, y, activation: Activation::Relu };
                self.residual(rest, passing, &mut gradient)
            }
            (Form::Single(activation), _) => {
                let first =
                    self.end(0, &self.saved.first.rows, Passing { grad, y, activation }, &mut gradient);
                self.weight_gradient(0, &self.saved.x, &first, &mut gradient);
                self.plan
                    .input_tracked
                    .then(|| input_gradient(self.arithmetic, &[self.source(0, &self.saved.first, &first)]))
            }
            (Form::Residual, None) => unreachable!("a residual block's forward pass keeps its second step"),
        };
        (dx, gradient)
    }

    fn residual(
        &self,
        rest: &SavedRest<A>,
        passing: Passing<'_, A::Wide>,
        gradient: &mut [A::Wide],
    ) -> Option<Vec<A::Wide>> {
        let second = self.end(1, &rest.second.rows, passing, gradient);
        self.weight_gradient(1, &rest.hidden, &second, gradient);
        let first = self.hidden(self.source(1, &rest.second, &second), gradient);
        drop(second);
        self.weight_gradient(0, &self.saved.x, &first, gradient);
        let Some(way_round) = &rest.downsample else {
            return self
                .plan
                .input_tracked
                .then(|| self.with_way_round(self.source(0, &self.saved.first, &first), passing));
        };
        let downsample = self.end(2, &way_round.rows, passing, gradient);
        self.weight_gradient(2, &self.saved.x, &downsample, gradient);
        let sources = [self.source(0, &self.saved.first, &first), self.source(2, way_round, &downsample)];
        self.plan.input_tracked.then(|| input_gradient(self.arithmetic, &sources))
    }

    fn channels(&self, step: usize) -> Channels<A::Wide> {
        let ranges = self.plan.ranges(step);
        let (gamma, beta) = (&self.parameters[ranges.gamma], &self.parameters[ranges.beta]);
        Channels::new(&self.moments[step], gamma, beta, self.plan.eps)
    }

    fn source<'s>(
        &self,
        step: usize,
        saved: &'s SavedStep<A::Narrow>,
        gradient: &'s Padded<A::Narrow>,
    ) -> Source<'s, A> {
        Source { geometry: self.plan.steps[step], weight: &saved.weight, gradient }
    }

    fn weight_gradient(
        &self,
        step: usize,
        images: &Padded<A::Narrow>,
        gradient: &Padded<A::Narrow>,
        into: &mut [A::Wide],
    ) {
        let (arithmetic, geometry) = (self.arithmetic, self.plan.steps[step]);
        let into = &mut into[self.plan.ranges(step).weight];
        WeightGradient { arithmetic, geometry, images, gradient }.write(into);
    }

    fn keep_sums(&self, step: usize, sums: &GradientSums, gradient: &mut [A::Wide]) {
        let ranges = self.plan.ranges(step);
        for (range, sums) in [(ranges.gamma, &sums.normalised), (ranges.beta, &sums.plain)] {
            gradient[range].iter_mut().zip(sums).for_each(|(out, &sum)| *out = A::Wide::narrow(sum));
        }
    }

    /// A step whose result is the operation's (or its share of it): the gradient of its convolution.
    fn end(
        &self,
        step: usize,
        rows: &[A::Narrow],
        passing: Passing<'_, A::Wide>,
        gradient: &mut [A::Wide],
    ) -> Padded<A::Narrow> {
        let channels = self.channels(step);
        let sums = channels.sums::<A>(rows, passing);
        self.keep_sums(step, &sums, gradient);
        let geometry = &self.plan.steps[step];
        let through = ThroughMoments::new(&channels, &sums, geometry.positions());
        lines::<A>(geometry, |line, out| {
            let Passing { grad, y, activation } = passing;
            let passing = Passing { grad: &grad[line.clone()], y: &y[line.clone()], activation };
            through.line::<A>(&rows[line], passing, out);
        })
    }

    /// Through the second step's convolution to the gradient of the first one's.
    fn hidden(&self, second: Source<'_, A>, gradient: &mut [A::Wide]) -> Padded<A::Narrow> {
        let (channels, rows) = (self.channels(0), &self.saved.first.rows);
        let count = self.plan.steps[0].out_channels;
        let (passed, sums) = self.at_stride_one(second, |positions, product, out| {
            channels.pass_relu::<A>(&rows[positions.start * count..positions.end * count], product, out)
        });
        let sums = GradientSums::combined(&sums, count);
        self.keep_sums(0, &sums, gradient);
        let geometry = &self.plan.steps[0];
        let through = ThroughMoments::new(&channels, &sums, geometry.positions());
        lines::<A>(geometry, |line, out| through.passed_line::<A>(&rows[line.clone()], &passed[line], out))
    }

    /// The input's gradient where the input itself goes the way round.
    fn with_way_round(&self, first: Source<'_, A>, passing: Passing<'_, A::Wide>) -> Vec<A::Wide> {
        let Passing { grad, y, activation } = passing;
        let count = self.plan.steps[0].channels;
        let (dx, _) = self.at_stride_one(first, |positions, product, dx: &mut [A::Wide]| {
            let part = positions.start * count..positions.end * count;
            add_passing(product, Passing { grad: &grad[part.clone()], y: &y[part], activation });
            dx.copy_from_slice(product);
        });
        dx
    }

    /// Tiles of the input's gradient of a step of stride 1.
    fn at_stride_one<O: Copy + Default + Send + Sync, R: Send>(
        &self,
        source: Source<'_, A>,
        finish: impl Fn(Range<usize>, &mut [A::Wide], &mut [O]) -> R + Sync + Send,
    ) -> (Vec<O>, Vec<R>) {
        let Source { geometry, weight, gradient } = source;
        let mut scratch = Vec::new();
        let phase = geometry.only_phase();
        let product = Product {
            arithmetic: self.arithmetic,
            images: gradient,
            sampling: geometry.phase_sampling(&phase, gradient),
            weight: geometry.turned_weight::<A>(weight, &phase, &mut scratch),
        };
        product.for_tiles(finish)
    }
}

/// A convolution's gradient as an operand, line after line: `write(elements, line)`.
fn lines<A: Arithmetic>(
    geometry: &Geometry,
    write: impl Fn(Range<usize>, &mut [A::Narrow]) + Sync,
) -> Padded<A::Narrow> {
    let Geometry { out_height, out_width, out_channels, .. } = *geometry;
    let mut operand = geometry.empty_gradient::<A>();
    let (before, line) = (operand.before(), out_width * out_channels);
    operand.images_mut().enumerate().for_each(|(image, mut out)| {
        for y in 0..out_height {
            let start = (image * out_height + y) * line;
            write(start..start + line, out.line(y, before, out_width));
        }
    });
    operand
}
