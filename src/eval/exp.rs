//! exp of f32 without a branch or a call, so that the compiler computes it for several elements at once.
//!
//! Only plain multiplications and additions: every machine gives the same bits.

use std::f32::consts::LOG2_E;

/// Adding it to a small number rounds that to an integer, which then stands in the lowest bits.
const ROUNDER: f32 = 12_582_912.0; // 1.5 * 2^23

/// ln 2 in two parts: products of the first with integers below 2^8 are exact (Cody & Waite, 1980).
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// exp(x) for x <= 88, relative error below 3e-7; what would be less than exp(-87) is exp(-87). NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x * LOG2_E + ROUNDER;
    let power = shifted - ROUNDER;
    let r = (x - power * LN_2_HIGH) - power * LN_2_LOW;
    // Taylor's series: |r| <= ln 2 / 2, where the next term is below 2e-7 of the first.
    let series = 1.0 / 120.0 + r * (1.0 / 720.0);
    let series = 1.0 / 6.0 + r * (1.0 / 24.0 + r * series);
    let series = 1.0 + r * (1.0 + r * (0.5 + r * series));
    // The integer moves into the exponent.
    series * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_equals_the_libraries_to_the_last_bits() {
        for i in -86_999..88_000_i32 {
            let x = i as f32 * 1e-3;
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) - want).abs() < 3e-7 * want, "{x}: {} {want}", exp(x));
        }
        assert_eq!((exp(0.0), exp(f32::NEG_INFINITY)), (1.0, exp(-87.0)));
        assert!(exp(f32::NAN).is_nan());
    }
}
