//! GELU by the error function, `x * Phi(x)`: what timm's vision transformers use (not the tanh approximation).
//!
//! A function of one element: the block that it belongs to puts it between two products.

use std::f64::consts::FRAC_1_SQRT_2;

use candle_core::{Result, Tensor};

use super::kernel::Real;

/// `x Phi(x)`
#[inline(always)]
pub(super) fn gelu<T: Real>(x: T) -> T {
    x * x.normal().0
}

/// Value and derivative: `x Phi(x)` and `Phi(x) + x phi(x)`, with phi the density of the standard normal distribution.
#[inline(always)]
pub(super) fn gelu_with_derivative<T: Real>(x: T) -> (T, T) {
    let (cumulative, density) = x.normal();
    (x * cumulative, cumulative + x * density)
}

pub(super) fn reference(x: &Tensor) -> Result<Tensor> {
    let phi = ((x * FRAC_1_SQRT_2)?.erf()? + 1.0)?;
    (x * phi)? * 0.5
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_exact_gelu_and_not_the_tanh_approximation() {
        // torch.nn.functional.gelu(torch.tensor(1., dtype=torch.float64)) = 0.8413447460685429; by tanh 0.841192.
        assert!((gelu(1f64) - 0.8413447460685429).abs() < 1e-15);
        assert!((gelu(1f32) - 0.841_344_7).abs() < 2e-7);
    }

    #[test]
    fn the_derivative_equals_finite_differences() {
        for step in -400..=400 {
            let x = f64::from(step) * 0.02;
            let numeric = (gelu(x + 1e-6) - gelu(x - 1e-6)) / 2e-6;
            let (value, derivative) = gelu_with_derivative(x);
            assert_eq!(value, gelu(x));
            assert!((derivative - numeric).abs() < 1e-8, "at {x}: {derivative} {numeric}");
        }
    }
}
