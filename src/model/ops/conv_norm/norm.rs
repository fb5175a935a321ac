//! The passes over rows of channels between two convolutions: moments, normalisation, and the gradients of both.
//!
//! Channels are often no multiple of a vector (24, 48): rows are taken as one long run, and each channel's numbers are
//! repeated up to a period of whole vectors.

use super::super::arithmetic::Arithmetic;
use super::super::batch_norm::{Activation, HostMoments};
use super::super::kernel::{ELEMENTS_PER_PART, Real, in_parts, rows_per_part, sum_over_parts};
use crate::widest::widest;

/// Elements that are computed side by side: a 512-bit register of f32.
const LANES: usize = 16;

/// Runs `$body` for every element of rows: of each `read` slice it sees the value, of each `write` slice the new value's
/// place under a name of its own; likewise of vectors over one period, which are values (`channel`) or sums' places (`sum`).
/// A place's name must differ from its slice's. Values go through local arrays, which the compiler knows not to overlap: the loop over them becomes vector code.
macro_rules! each_lane {
    ($period:expr, $len:expr; read $($read:ident)*; write $($write:ident as $w:ident)*; channel $($channel:ident)*;
     sum $($sum:ident as $s:ident)*; $body:block) => {
        for start in (0..$len).step_by($period) {
            let len = $period.min($len - start);
            $(let $read = &$read[start..start + len];)*
            $(let $write = &mut $write[start..start + len];)*
            $(let $channel = &$channel[..len];)*
            $(let $sum = &mut $sum[..len];)*
            for block in 0..len / LANES {
                $(let $read = $read.as_chunks::<LANES>().0[block];)*
                $(let $channel = $channel.as_chunks::<LANES>().0[block];)*
                $(let mut $s = $sum.as_chunks::<LANES>().0[block];)*
                $(let mut $w = [Default::default(); LANES];)*
                for lane in 0..LANES {
                    $(let $read = $read[lane];)*
                    $(let $channel = $channel[lane];)*
                    $(let $s = &mut $s[lane];)*
                    $(let $w = &mut $w[lane];)*
                    $body
                }
                $($sum.as_chunks_mut::<LANES>().0[block] = $s;)*
                $($write.as_chunks_mut::<LANES>().0[block] = $w;)*
            }
            for lane in len / LANES * LANES..len {
                $(let $read = $read[lane];)*
                $(let $channel = $channel[lane];)*
                $(let $s = &mut $sum[lane];)*
                $(let $w = &mut $write[lane];)*
                $body
            }
        }
    };
}

/// The shortest run of whole rows that is whole vectors too.
fn period(channels: usize) -> usize {
    let shared =
        (0..).map(|power| 1 << power).take_while(|size| channels.is_multiple_of(*size) && *size <= LANES);
    channels * (LANES / shared.last().unwrap_or(1))
}

fn repeated<T: Copy>(channels: &[T]) -> Vec<T> {
    channels.iter().copied().cycle().take(period(channels.len())).collect()
}

/// Sums over one period, brought together by channel.
fn folded<T: Real>(sums: &[T], channels: usize) -> Vec<f64> {
    let mut total = vec![0.0; channels];
    for row in sums.chunks_exact(channels) {
        total.iter_mut().zip(row).for_each(|(total, sum)| *total += sum.wide());
    }
    total
}

/// One tile's share of the moments.
pub(super) struct TileMoments {
    rows: f64,
    mean: Vec<f64>,
    /// Sums of squared distances from the mean.
    squares: Vec<f64>,
}

impl TileMoments {
    /// Of a product's rows, which are written to `out` at the same time. Distances are taken from the tile's first row: that
    /// keeps the digits that a large mean would cost.
    pub(super) fn take<A: Arithmetic>(
        product: &[A::Wide],
        channels: usize,
        out: &mut [A::Narrow],
    ) -> TileMoments {
        let shift = repeated(&product[..channels]);
        let period = shift.len();
        let mut sums = vec![A::Wide::ZERO; 2 * period];
        let (first, second) = sums.split_at_mut(period);
        widest! {
            each_lane!(period, product.len(); read product; write out as o; channel shift;
                sum first as a second as b; {
                    let distance = product - shift;
                    *a += distance;
                    *b += distance * distance;
                    *o = A::to_narrow(product);
                })
        }
        let rows = (product.len() / channels) as f64;
        let (first, second) = (folded(first, channels), folded(second, channels));
        TileMoments {
            rows,
            mean: first.iter().zip(product).map(|(sum, shift)| shift.wide() + sum / rows).collect(),
            squares: first.iter().zip(&second).map(|(first, second)| second - first * first / rows).collect(),
        }
    }

    /// Mean and biased variance of all tiles' rows.
    pub(super) fn combined(tiles: &[TileMoments]) -> HostMoments {
        let channels = tiles.first().map_or(0, |tile| tile.mean.len());
        let rows: f64 = tiles.iter().map(|tile| tile.rows).sum();
        let of = |channel: usize| {
            let mean = tiles.iter().map(|tile| tile.rows * tile.mean[channel]).sum::<f64>() / rows;
            let squares = tiles.iter().map(|tile| {
                let distance = tile.mean[channel] - mean;
                tile.squares[channel] + tile.rows * distance * distance
            });
            (mean, (squares.sum::<f64>() / rows).max(0.0))
        };
        let (mean, variance) = (0..channels).map(of).unzip();
        HostMoments { mean, variance }
    }
}

/// Each channel's map `x -> (x - mean) * scale + beta`, where scale is gamma / deviation.
pub(super) struct Channels<T> {
    count: usize,
    mean: Vec<T>,
    inverse_deviation: Vec<T>,
    scale: Vec<T>,
    beta: Vec<T>,
}

/// What is added to a normalised result before its activation.
pub(super) enum Addend<'a, A: Arithmetic> {
    Nothing,
    Values(&'a [A::Wide]),
    /// Another convolution's result, normalised.
    Normalised(&'a [A::Narrow], &'a Channels<A::Wide>),
}

impl<T: Real> Channels<T> {
    pub(super) fn new(moments: &HostMoments, gamma: &[T], beta: &[T], eps: f64) -> Self {
        let inverse: Vec<T> =
            moments.variance.iter().map(|variance| T::narrow(1.0 / (variance + eps).sqrt())).collect();
        let scale: Vec<T> = inverse.iter().zip(gamma).map(|(&inverse, &gamma)| gamma * inverse).collect();
        let mean: Vec<T> = moments.mean.iter().map(|&mean| T::narrow(mean)).collect();
        Channels {
            count: gamma.len(),
            mean: repeated(&mean),
            inverse_deviation: repeated(&inverse),
            scale: repeated(&scale),
            beta: repeated(beta),
        }
    }

    fn period(&self) -> usize {
        self.mean.len()
    }

    /// ReLU of normalised rows, as an operand.
    pub(super) fn relu_line<A: Arithmetic<Wide = T>>(&self, conv: &[A::Narrow], out: &mut [A::Narrow]) {
        let Channels { mean, scale, beta, .. } = self;
        let floor = T::ZERO;
        widest! {
            each_lane!(self.period(), conv.len(); read conv; write out as o; channel mean scale beta; sum; {
                let value = (A::to_wide(conv) - mean) * scale + beta;
                *o = A::to_narrow(if value < floor { floor } else { value });
            })
        }
    }

    /// `activation(normalised + addend)`
    pub(super) fn finish<A: Arithmetic<Wide = T>>(
        &self,
        conv: &[A::Narrow],
        addend: &Addend<'_, A>,
        activation: Activation,
    ) -> Vec<T> {
        let part = (ELEMENTS_PER_PART / self.period()).max(1) * self.period();
        let write = |_: &mut (), index: usize, y: &mut [T]| {
            let part = index * part..index * part + y.len();
            let conv = &conv[part.clone()];
            match addend {
                Addend::Nothing => self.finish_alone::<A>(conv, y, activation),
                Addend::Values(values) => self.finish_sum::<A>(conv, &values[part], y, activation),
                Addend::Normalised(other, channels) => {
                    self.finish_two::<A>([conv, &other[part]], channels, y, activation);
                }
            }
        };
        in_parts(conv.len(), part, || (), write).0
    }

    fn finish_alone<A: Arithmetic<Wide = T>>(&self, conv: &[A::Narrow], y: &mut [T], activation: Activation) {
        let Channels { mean, scale, beta, .. } = self;
        let floor: T = activation.floor();
        widest! {
            each_lane!(self.period(), y.len(); read conv; write y as o; channel mean scale beta; sum; {
                let value = (A::to_wide(conv) - mean) * scale + beta;
                // Written so that NaN passes through: a later check must see it.
                *o = if value < floor { floor } else { value };
            })
        }
    }

    fn finish_sum<A: Arithmetic<Wide = T>>(
        &self,
        conv: &[A::Narrow],
        addend: &[T],
        y: &mut [T],
        activation: Activation,
    ) {
        let Channels { mean, scale, beta, .. } = self;
        let floor: T = activation.floor();
        widest! {
            each_lane!(self.period(), y.len(); read conv addend; write y as o; channel mean scale beta; sum; {
                let value = (A::to_wide(conv) - mean) * scale + beta + addend;
                *o = if value < floor { floor } else { value };
            })
        }
    }

    fn finish_two<A: Arithmetic<Wide = T>>(
        &self,
        [conv, other]: [&[A::Narrow]; 2],
        channels: &Channels<T>,
        y: &mut [T],
        activation: Activation,
    ) {
        let Channels { mean, scale, beta, .. } = self;
        let Channels { mean: other_mean, scale: other_scale, beta: other_beta, .. } = channels;
        let floor: T = activation.floor();
        widest! {
            each_lane!(self.period(), y.len(); read conv other; write y as o;
                channel mean scale beta other_mean other_scale other_beta; sum; {
                    let first = (A::to_wide(conv) - mean) * scale + beta;
                    let second = (A::to_wide(other) - other_mean) * other_scale + other_beta;
                    let value = first + second;
                    *o = if value < floor { floor } else { value };
                })
        }
    }

    /// Sums of the gradient that passes the activation of `y`, and of its products with the normalised result.
    pub(super) fn sums<A: Arithmetic<Wide = T>>(
        &self,
        conv: &[A::Narrow],
        passing: Passing<'_, T>,
    ) -> GradientSums {
        let (count, rows) = (self.count, conv.len() / self.count);
        let Channels { mean, inverse_deviation, .. } = self;
        let floor: T = passing.activation.floor();
        let period = self.period();
        let sums = sum_over_parts(rows, rows_per_part(rows), 2 * count, |part, sums: &mut [T]| {
            let part = part.start * count..part.end * count;
            let (conv, y, grad) = (&conv[part.clone()], &passing.y[part.clone()], &passing.grad[part]);
            let mut lanes = vec![T::ZERO; 2 * period];
            let (plain, normalised) = lanes.split_at_mut(period);
            widest! {
                each_lane!(period, conv.len(); read conv y grad; write; channel mean inverse_deviation;
                    sum plain as a normalised as b; {
                        let passed = if y <= floor { T::ZERO } else { grad };
                        *a += passed;
                        *b += passed * ((A::to_wide(conv) - mean) * inverse_deviation);
                    })
            }
            let totals = folded(plain, count).into_iter().chain(folded(normalised, count));
            sums.iter_mut().zip(totals).for_each(|(sum, total)| *sum = T::narrow(total));
        });
        let (plain, normalised) = sums.split_at(count);
        GradientSums { plain: plain.to_vec(), normalised: normalised.to_vec() }
    }

    /// The same for one tile of a gradient that has not passed this normalisation's ReLU: what passes goes to `out`.
    pub(super) fn pass_relu<A: Arithmetic<Wide = T>>(
        &self,
        conv: &[A::Narrow],
        grad: &[T],
        out: &mut [A::Narrow],
    ) -> GradientSums {
        let Channels { mean, inverse_deviation, scale, beta, .. } = self;
        let period = self.period();
        let mut lanes = vec![T::ZERO; 2 * period];
        let (plain, normalised) = lanes.split_at_mut(period);
        widest! {
            each_lane!(period, conv.len(); read conv grad; write out as o;
                channel mean inverse_deviation scale beta; sum plain as a normalised as b; {
                    let distance = A::to_wide(conv) - mean;
                    let passed = if distance * scale + beta <= T::ZERO { T::ZERO } else { grad };
                    *a += passed;
                    *b += passed * (distance * inverse_deviation);
                    *o = A::to_narrow(passed);
                })
        }
        GradientSums { plain: folded(plain, self.count), normalised: folded(normalised, self.count) }
    }
}

/// A result's gradient, and what says where it passes the activation.
#[derive(Clone, Copy)]
pub(super) struct Passing<'a, T> {
    pub grad: &'a [T],
    pub y: &'a [T],
    pub activation: Activation,
}

/// Of each channel: the gradients of beta and of gamma.
pub(super) struct GradientSums {
    pub plain: Vec<f64>,
    pub normalised: Vec<f64>,
}

impl GradientSums {
    /// The sum of the tiles' sums, in their order.
    pub(super) fn combined(tiles: &[GradientSums], channels: usize) -> GradientSums {
        let mut total = GradientSums { plain: vec![0.0; channels], normalised: vec![0.0; channels] };
        let add = |total: &mut [f64], share: &[f64]| {
            total.iter_mut().zip(share).for_each(|(total, share)| *total += share);
        };
        for tile in tiles {
            add(&mut total.plain, &tile.plain);
            add(&mut total.normalised, &tile.normalised);
        }
        total
    }
}

/// From a normalised result's gradient g to the convolution's: with n the normalised result,
/// `scale * (g - mean(g) - n * mean(g * n))`.
pub(super) struct ThroughMoments<'a, T> {
    mean: &'a [T],
    scale: &'a [T],
    mean_grad: Vec<T>,
    /// mean(g * n) / deviation
    slope: Vec<T>,
}

impl<'a, T: Real> ThroughMoments<'a, T> {
    pub(super) fn new(channels: &'a Channels<T>, sums: &GradientSums, rows: usize) -> Self {
        let means =
            |sums: &[f64]| -> Vec<T> { sums.iter().map(|&sum| T::narrow(sum / rows as f64)).collect() };
        let normalised = means(&sums.normalised);
        let slope: Vec<T> = normalised
            .iter()
            .zip(&channels.inverse_deviation)
            .map(|(&mean, &inverse)| mean * inverse)
            .collect();
        ThroughMoments {
            mean: &channels.mean,
            scale: &channels.scale,
            mean_grad: repeated(&means(&sums.plain)),
            slope: repeated(&slope),
        }
    }

    /// Rows of a gradient that has to pass the activation first.
    pub(super) fn line<A: Arithmetic<Wide = T>>(
        &self,
        conv: &[A::Narrow],
        passing: Passing<'_, T>,
        out: &mut [A::Narrow],
    ) {
        let ThroughMoments { mean, scale, mean_grad, slope } = self;
        let Passing { grad, y, activation } = passing;
        let floor: T = activation.floor();
        widest! {
            each_lane!(mean.len(), conv.len(); read conv y grad; write out as o;
                channel mean scale mean_grad slope; sum; {
                    let passed = if y <= floor { T::ZERO } else { grad };
                    let distance = A::to_wide(conv) - mean;
                    *o = A::to_narrow(scale * (passed - mean_grad - distance * slope));
                })
        }
    }

    /// Rows of a gradient that has passed it.
    pub(super) fn passed_line<A: Arithmetic<Wide = T>>(
        &self,
        conv: &[A::Narrow],
        grad: &[A::Narrow],
        out: &mut [A::Narrow],
    ) {
        let ThroughMoments { mean, scale, mean_grad, slope } = self;
        widest! {
            each_lane!(mean.len(), conv.len(); read conv grad; write out as o;
                channel mean scale mean_grad slope; sum; {
                    let distance = A::to_wide(conv) - mean;
                    *o = A::to_narrow(scale * (A::to_wide(grad) - mean_grad - distance * slope));
                })
        }
    }
}

/// Adds the gradient that passes the activation onto `sum`: the way round.
pub(super) fn add_passing<T: Real>(sum: &mut [T], passing: Passing<'_, T>) {
    let Passing { grad, y, activation } = passing;
    let floor: T = activation.floor();
    widest! {
        for ((sum, &y), &grad) in sum.iter_mut().zip(y).zip(grad) {
            *sum += if y <= floor { T::ZERO } else { grad };
        }
    }
}
