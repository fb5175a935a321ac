//! torchvision's Gaussian blur with reflected edges, on the planes of a view.
//!
//! Two passes, along rows and along columns. Both are weighted sums of equally long runs of neighbours (a row at
//! several offsets, several rows), added up in the order of the kernel.

/// Numbers summed side by side: two vectors of AVX2, as the latency of an addition wants.
const LANES: usize = 16;

/// Memory of a blur.
#[derive(Debug, Default)]
pub(super) struct Blur {
    /// One row and its reflected edges.
    padded: Vec<f32>,
    /// A plane after the first pass.
    plane: Vec<f32>,
}

impl Blur {
    /// Blurs planes of `size * size`. The kernel spans a tenth of the image (SimCLR's choice), odd, at least 3.
    #[inline(always)]
    pub(super) fn apply(&mut self, view: &mut [f32], size: usize, sigma: f64) {
        let kernel = gaussian(size, sigma);
        let radius = kernel.len() / 2;
        self.padded.resize(size + 2 * radius, 0.0);
        self.plane.resize(size * size, 0.0);
        for plane in view.chunks_exact_mut(size * size) {
            for (row, blurred) in plane.chunks_exact(size).zip(self.plane.chunks_exact_mut(size)) {
                pad(row, radius, &mut self.padded);
                weighted_sum(&kernel, |k| &self.padded[k..k + size], blurred);
            }
            for (y, row) in plane.chunks_exact_mut(size).enumerate() {
                let rows = |k| &self.plane[reflected(y + k, radius, size) * size..][..size];
                weighted_sum(&kernel, rows, row);
            }
        }
    }
}

#[inline(always)]
fn pad(row: &[f32], radius: usize, padded: &mut [f32]) {
    let size = row.len();
    padded[radius..radius + size].copy_from_slice(row);
    for i in (0..radius).chain(radius + size..size + 2 * radius) {
        padded[i] = row[reflected(i, radius, size)];
    }
}

/// `sum[i]` of all `kernel[k] * run(k)[i]`.
#[inline(always)]
fn weighted_sum<'a>(kernel: &[f32], run: impl Fn(usize) -> &'a [f32], sum: &mut [f32]) {
    let (vectors, rest) = sum.as_chunks_mut::<LANES>();
    let done = vectors.len() * LANES;
    for (at, vector) in vectors.iter_mut().enumerate() {
        let mut sums = [0.0; LANES];
        for (k, weight) in kernel.iter().enumerate() {
            let values = &run(k)[at * LANES..][..LANES];
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += weight * value);
        }
        *vector = sums;
    }
    for (at, sum) in rest.iter_mut().enumerate() {
        *sum = kernel.iter().enumerate().fold(0.0, |sum, (k, weight)| sum + weight * run(k)[done + at]);
    }
}

/// Weights at -radius..=radius, which sum to 1.
fn gaussian(size: usize, sigma: f64) -> Vec<f32> {
    let radius = ((size as f64 * 0.1).round() as usize / 2).max(1);
    // Reflection needs the radius to lie inside the image.
    let radius = radius.min(size - 1);
    let weight = |k: usize| {
        let distance = k as f64 - radius as f64;
        (-0.5 * (distance / sigma).powi(2)).exp()
    };
    let weights: Vec<f64> = (0..=2 * radius).map(weight).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|w| (w / sum) as f32).collect()
}

/// Index `shifted - radius`, mirrored at the first and last pixel without repeating them.
fn reflected(shifted: usize, radius: usize, size: usize) -> usize {
    let at = shifted.abs_diff(radius);
    if shifted >= radius && at >= size { 2 * (size - 1) - at } else { at }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_blur_keeps_flat_areas_and_spreads_a_point() {
        let flat: Vec<f32> = [0.25, 0.5, 0.75].iter().flat_map(|value| [*value; 64]).collect();
        let mut blurred = flat.clone();
        let mut blur = Blur::default();
        blur.apply(&mut blurred, 8, 1.0);
        assert!(blurred.iter().zip(&flat).all(|(a, b)| (a - b).abs() < 1e-6));
        let mut spread = vec![0.0; 3 * 64];
        spread[3 * 8 + 3] = 1.0;
        blur.apply(&mut spread, 8, 1.0);
        let e = (-0.5f32).exp();
        let centre = 1.0 / (1.0 + 2.0 * e);
        assert!((spread[27] - centre * centre).abs() < 1e-6);
        assert!((spread[28] - centre * centre * e).abs() < 1e-6);
        assert!((spread[36] - centre * centre * e * e).abs() < 1e-6);
        assert!(spread[29] == 0.0 && spread[64..].iter().all(|value| *value == 0.0));
    }

    #[test]
    fn the_kernel_spans_a_tenth_of_the_image() {
        assert_eq!(gaussian(224, 1.0).len(), 23);
        assert_eq!(gaussian(64, 1.0).len(), 7);
        assert_eq!(gaussian(32, 1.0).len(), 3);
    }

    #[test]
    fn edges_are_mirrored_without_repeating_them() {
        let around: Vec<usize> = (0..8).map(|shifted| reflected(shifted, 2, 4)).collect();
        assert_eq!(around, [2, 1, 0, 1, 2, 3, 2, 1]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Of any side, so also where the side is no multiple of a vector, and in memory that another side left.
        #[test]
        fn a_blur_is_the_weighted_mean_of_the_pixels_around(
            size in 2usize..70, sigma in 0.1f64..3.0, seed: u32,
        ) {
            let value = |i: usize| (i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) % 1_000;
            let view: Vec<f32> = (0..3 * size * size).map(|i| value(i) as f32 / 1_000.0).collect();
            let mut blur = Blur { padded: vec![f32::NAN; 17], plane: vec![f32::NAN; 31] };
            let mut blurred = view.clone();
            blur.apply(&mut blurred, size, sigma);
            let (kernel, radius) = (gaussian(size, sigma), gaussian(size, sigma).len() / 2);
            for (i, got) in blurred.iter().enumerate() {
                let (plane, y, x) = (i / (size * size), i / size % size, i % size);
                let mut expected = 0.0;
                for (a, down) in kernel.iter().enumerate() {
                    for (b, across) in kernel.iter().enumerate() {
                        let row = plane * size + reflected(y + a, radius, size);
                        expected += down * across * view[row * size + reflected(x + b, radius, size)];
                    }
                }
                prop_assert!((got - expected).abs() < 1e-5, "{got} is not {expected} at {i}");
            }
        }
    }
}
