//! How far losses in two precisions lie apart, beside how far seeds do. tests/performance_statistics.rs tests it.

/// Steps that a smoothed loss is the mean of: fewer leave the noise of single batches, more hide where curves part.
pub const WINDOW: usize = 25;

pub struct Spread {
    /// Of bf16's loss minus f32's at equal seeds and steps: the mean over both.
    pub mean_difference: f64,
    /// The mean over the seeds, at the step where it is farthest from 0.
    pub farthest_difference: f64,
    /// The deviation over seeds in f32, its mean over the steps.
    pub seeds_deviation: f64,
    /// The mean over the seeds at the last step, bf16 and f32.
    pub last: [f64; 2],
}

impl Spread {
    /// Of smoothed losses, a list a seed, equal seeds at equal places.
    ///
    /// # Panics
    /// With fewer than two seeds (one has no deviation), or if lists differ in length.
    pub fn of(bf16: &[Vec<f64>], f32: &[Vec<f64>]) -> Self {
        assert!(bf16.len() == f32.len() && f32.len() > 1, "two seeds or more, in both precisions");
        let (bf16_mean, f32_mean) = (means(bf16), means(f32));
        assert_eq!(bf16_mean.len(), f32_mean.len(), "equally many steps");
        let differences: Vec<f64> = bf16_mean.iter().zip(&f32_mean).map(|(a, b)| a - b).collect();
        let farther = |a: f64, b: f64| if b.abs() > a.abs() { b } else { a };
        let deviation = |(step, mean): (usize, &f64)| {
            let squares: f64 = f32.iter().map(|losses| (losses[step] - mean).powi(2)).sum();
            (squares / (f32.len() - 1) as f64).sqrt()
        };
        let steps = f32_mean.len() as f64;
        Self {
            mean_difference: differences.iter().sum::<f64>() / steps,
            farthest_difference: differences.iter().copied().fold(0.0, farther),
            seeds_deviation: f32_mean.iter().enumerate().map(deviation).sum::<f64>() / steps,
            last: [bf16_mean[bf16_mean.len() - 1], f32_mean[f32_mean.len() - 1]],
        }
    }

    /// The curves agree within the noise of seeds.
    pub fn agrees(&self) -> bool {
        self.mean_difference.abs() <= self.seeds_deviation
    }
}

/// Over the seeds, step by step.
fn means(seeds: &[Vec<f64>]) -> Vec<f64> {
    let steps = seeds.iter().map(Vec::len).min().unwrap_or(0);
    let mean = |step: usize| seeds.iter().map(|losses| losses[step]).sum::<f64>() / seeds.len() as f64;
    (0..steps).map(mean).collect()
}

/// Means over each run of [`WINDOW`] steps.
pub fn smoothed(losses: &[f64]) -> Vec<f64> {
    losses.windows(WINDOW).map(|window| window.iter().sum::<f64>() / WINDOW as f64).collect()
}
