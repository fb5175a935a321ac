//! The learning rate of each step: linear warm-up, then half a cosine down to 0.

use super::spec::Optimisation;

/// The rate of step `step` (from 0) of `steps`. It starts at a part of the peak, is the peak at the end of the
/// warm-up, and would reach 0 at step `steps`, which is not taken.
pub fn learning_rate(optimisation: &Optimisation, step: u64, steps: u64) -> f64 {
    let warmup = (optimisation.warmup_ratio * steps as f64).round() as u64;
    if step < warmup {
        return optimisation.learning_rate * (step + 1) as f64 / warmup as f64;
    }
    let progress = (step - warmup) as f64 / steps.saturating_sub(warmup).max(1) as f64;
    optimisation.learning_rate * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIMISATION: Optimisation = Optimisation {
        tau: 0.2,
        batch: 8,
        steps: 100,
        max_epochs: 10,
        learning_rate: 2e-3,
        warmup_ratio: 0.1,
        weight_decay: 1e-4,
        beta1: 0.9,
        beta2: 0.999,
        clip_norm: 1.0,
    };

    #[test]
    fn the_rate_rises_to_its_peak_and_falls_to_nothing() {
        let rate = |step| learning_rate(&OPTIMISATION, step, 100);
        assert!((rate(0) - 2e-4).abs() < 1e-12);
        assert!((rate(9) - 2e-3).abs() < 1e-12);
        assert!((rate(10) - 2e-3).abs() < 1e-12);
        assert!((rate(55) - 1e-3).abs() < 1e-12);
        assert!(rate(99) > 0.0 && rate(99) < 1e-6);
        assert!((10..99).all(|step| rate(step + 1) < rate(step)));
    }

    #[test]
    fn without_a_warm_up_the_first_step_has_the_peak() {
        let optimisation = Optimisation { warmup_ratio: 0.0, ..OPTIMISATION };
        assert_eq!(learning_rate(&optimisation, 0, 1), 2e-3);
        let all = Optimisation { warmup_ratio: 1.0, ..OPTIMISATION };
        assert_eq!(learning_rate(&all, 4, 5), 2e-3);
    }
}
