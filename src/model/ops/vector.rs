//! Sums and functions of contiguous rows, in a form that becomes vector code inside [`crate::widest::widest`].
//!
//! Sums keep [`LANES`] partial sums, which a compiler may not introduce by itself because it changes the order of
//! additions. The order here is fixed, and there are no fused multiply-adds, so that a result does not depend on which
//! instructions were found.

use super::kernel::Real;

/// Partial sums of a row: a 512-bit register of f32. More cost short rows, fewer leave wide registers empty.
const LANES: usize = 16;

/// Sum over i of `term(a[i], b[i])`; both of one length.
#[inline(always)]
pub(super) fn sum_of<T: Real>(a: &[T], b: &[T], term: impl Fn(T, T) -> T) -> T {
    sum_of_three(a, b, a, |a, b, _| term(a, b))
}

/// Sum over i of `term(a[i], b[i], c[i])`; all of one length.
#[inline(always)]
pub(super) fn sum_of_three<T: Real>(a: &[T], b: &[T], c: &[T], term: impl Fn(T, T, T) -> T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    let (c, c_rest) = c.as_chunks::<LANES>();
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for lane in 0..LANES {
            lanes[lane] += term(a[lane], b[lane], c[lane]);
        }
    }
    for (lane, ((&a, &b), &c)) in a_rest.iter().zip(b_rest).zip(c_rest).enumerate() {
        lanes[lane] += term(a, b, c);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            let other = lanes[lane + width];
            lanes[lane] += other;
        }
        width /= 2;
    }
    lanes[0]
}

/// Mean and reciprocal standard deviation of a row, by two passes so that a large mean costs no digits.
#[inline(always)]
pub(super) fn mean_and_scale<T: Real>(row: &[T], eps: f64) -> (T, T) {
    let count = T::narrow(row.len() as f64);
    let mean = sum_of(row, row, |x, _| x) / count;
    let variance = sum_of(row, row, |x, _| (x - mean) * (x - mean)) / count;
    (mean, T::narrow(1.0) / (variance + T::narrow(eps)).sqrt())
}

/// Turns scores into probabilities, in place.
#[inline(always)]
pub(super) fn softmax<T: Real>(row: &mut [T]) {
    let largest = row.iter().copied().fold(T::narrow(f64::NEG_INFINITY), |a, b| if b > a { b } else { a });
    row.iter_mut().for_each(|value| *value = (*value - largest).exp_of_negative());
    let scale = T::narrow(1.0) / sum_of(row, row, |x, _| x);
    row.iter_mut().for_each(|value| *value *= scale);
}

/// Turns the gradient by the probabilities into the gradient by the scores, in place.
#[inline(always)]
pub(super) fn softmax_gradient<T: Real>(grad: &mut [T], probabilities: &[T]) {
    let inner = sum_of(grad, probabilities, |g, p| g * p);
    for (g, &p) in grad.iter_mut().zip(probabilities) {
        *g = p * (*g - inner);
    }
}

/// `e^x` for x <= 0 within 2 units of the last place, without branches, so that loops over it become vector code; 0 below -87,
/// where f32 has no normal numbers left. For x > 0 the result is wrong: every caller subtracts a maximum or negates a square.
#[inline(always)]
pub(super) fn exp_of_negative(x: f32) -> f32 {
    /// Adding it rounds to an integer, which then stands in the low bits: 1.5 * 2^23.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts: products of the first with small integers are exact.
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let clamped = if x < -87.0 { -87.0 } else { x };
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let power = rounded - ROUND;
    let r = clamped - power * LN2[0] - power * LN2[1];
    // Taylor's polynomial to the 7th degree: its error on |r| <= ln(2) / 2 is below 1e-8.
    let mut sum = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = sum * r + coefficient;
    }
    let two_to_power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(1f32.to_bits()));
    if x < -87.0 { 0.0 } else { sum * two_to_power }
}

/// The standard normal distribution's cumulative probability up to x (within 3.5e-7), and its density there, without branches.
/// One exponential serves both: Abramowitz and Stegun, formula 7.1.26.
#[inline(always)]
pub(super) fn normal(x: f32) -> (f32, f32) {
    const COEFFICIENTS: [f32; 5] = [1.061_405_4, -1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6];
    const SLOPE: f32 = 0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2;
    /// 1 / sqrt(2 pi)
    const DENSITY_AT_ZERO: f32 = 0.398_942_3;
    let exponential = exp_of_negative(x * x * -0.5);
    let t = 1.0 / (1.0 + SLOPE * x.abs());
    let mut sum = 0.0;
    for coefficient in COEFFICIENTS {
        sum = (sum + coefficient) * t;
    }
    let tail = 0.5 * sum * exponential;
    (if x < 0.0 { tail } else { 1.0 - tail }, DENSITY_AT_ZERO * exponential)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_normal_distribution_is_right_to_seven_digits() {
        for step in -80_000..=80_000 {
            let x = step as f32 * 1e-4;
            let (cumulative, density) = normal(x);
            let expected = f64::from(x).normal();
            assert!(
                (f64::from(cumulative) - expected.0).abs() < 3.5e-7,
                "at {x}: {cumulative}, {expected:?}"
            );
            assert!((f64::from(density) - expected.1).abs() < 1e-7, "at {x}: {density}, {expected:?}");
        }
        assert!(normal(f32::NAN).0.is_nan());
    }

    #[test]
    fn the_exponential_is_right_to_two_units_of_the_last_place() {
        for step in 0..870_000 {
            let x = step as f32 * -1e-4;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp_of_negative(x)) - expected).abs() / expected;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "e^{x}: relative error {error}");
        }
        assert_eq!(exp_of_negative(0.0), 1.0);
        assert_eq!(exp_of_negative(f32::NEG_INFINITY), 0.0);
        assert!(exp_of_negative(f32::NAN).is_nan());
    }

    #[test]
    fn sums_cover_rows_of_any_length() {
        for len in 0..70 {
            let row: Vec<f64> = (1..=len).map(f64::from).collect();
            assert_eq!(sum_of(&row, &row, |a, _| a), f64::from(len * (len + 1) / 2));
        }
    }

    #[test]
    fn a_softmax_sums_to_one_and_its_gradient_to_zero() {
        let mut row: Vec<f64> = (0..37).map(|i| f64::from(i % 7) - 900.0).collect();
        softmax(&mut row);
        assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        let mut grad: Vec<f64> = (0..37).map(|i| f64::from(i * i % 11)).collect();
        softmax_gradient(&mut grad, &row);
        assert!(grad.iter().sum::<f64>().abs() < 1e-12);
    }
}
