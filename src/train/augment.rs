//! SimCLR's augmentation: one decoded frame and one sequence of draws give one normalised view.
//!
//! In the published order: random resized crop, flip, colour jitter (its four parts in random order), grey,
//! blur. Each part computes what torchvision's does on float images in 0..1 (the crop is resized in bytes, as
//! from a PIL image). A view is a pure function of the frame, the parameters and the draws.

use crate::model::preprocess::{Crop, PreprocessError, Preprocessing, RgbFrame};

use super::rng::Draws;
use super::spec::Augmentation;

/// Aspect ratios of crops, SimCLR's and torchvision's default.
const CROP_RATIO: [f64; 2] = [3.0 / 4.0, 4.0 / 3.0];
/// Crops drawn before the largest central one is taken.
const CROP_TRIES: usize = 10;
/// ITU-R 601-2 luma, as torchvision rounds it.
const LUMA: [f32; 3] = [0.2989, 0.587, 0.114];

type Pixel = [f32; 3];

/// Writes one augmented view `[3, size, size]` of `frame`.
pub fn augmented_view(
    frame: &RgbFrame,
    parameters: &Augmentation,
    preprocessing: &Preprocessing,
    draws: &mut Draws,
    out: &mut [f32],
) -> Result<(), PreprocessError> {
    let size = preprocessing.size;
    let crop = random_crop(frame.width, frame.height, parameters.crop_scale, draws);
    let resized = frame.resized(crop, size as u32, size as u32)?;
    let mut pixels: Vec<Pixel> = resized
        .pixels
        .chunks_exact(3)
        .map(|p| [p[0], p[1], p[2]].map(|byte| f32::from(byte) / 255.0))
        .collect();
    if draws.uniform() < parameters.flip_probability {
        pixels.chunks_exact_mut(size).for_each(<[Pixel]>::reverse);
    }
    if draws.uniform() < parameters.jitter_probability {
        jitter(&mut pixels, parameters.jitter, draws);
    }
    if draws.uniform() < parameters.grey_probability {
        pixels.iter_mut().for_each(|p| *p = [luma(*p); 3]);
    }
    if draws.uniform() < parameters.blur_probability {
        let [low, high] = parameters.blur_sigma;
        pixels = blurred(&pixels, size, draws.between(low, high));
    }
    preprocessing.normalise(pixels.into_iter(), out);
    Ok(())
}

/// torchvision's `RandomResizedCrop.get_params`: area and log aspect ratio uniform, ten tries, then the centre.
fn random_crop(width: u32, height: u32, scale: [f64; 2], draws: &mut Draws) -> Crop {
    let area = f64::from(width) * f64::from(height);
    for _ in 0..CROP_TRIES {
        let target = area * draws.between(scale[0], scale[1]);
        let ratio = draws.between(CROP_RATIO[0].ln(), CROP_RATIO[1].ln()).exp();
        let crop_width = (target * ratio).sqrt().round_ties_even() as u32;
        let crop_height = (target / ratio).sqrt().round_ties_even() as u32;
        if (1..=width).contains(&crop_width) && (1..=height).contains(&crop_height) {
            return Crop {
                top: draws.below(height - crop_height + 1),
                left: draws.below(width - crop_width + 1),
                width: crop_width,
                height: crop_height,
            };
        }
    }
    central_crop(width, height)
}

/// The largest central crop whose aspect ratio is allowed.
fn central_crop(width: u32, height: u32) -> Crop {
    let ratio = f64::from(width) / f64::from(height);
    let (crop_width, crop_height) = if ratio < CROP_RATIO[0] {
        (width, (f64::from(width) / CROP_RATIO[0]).round_ties_even() as u32)
    } else if ratio > CROP_RATIO[1] {
        ((f64::from(height) * CROP_RATIO[1]).round_ties_even() as u32, height)
    } else {
        (width, height)
    };
    Crop {
        left: (width - crop_width) / 2,
        top: (height - crop_height) / 2,
        width: crop_width,
        height: crop_height,
    }
}

/// torchvision's `ColorJitter`: brightness, contrast, saturation and hue in a random order.
fn jitter(pixels: &mut [Pixel], strength: [f64; 4], draws: &mut Draws) {
    let mut order = [0, 1, 2, 3];
    for i in (1..order.len()).rev() {
        order.swap(i, draws.below(i as u32 + 1) as usize);
    }
    for part in order {
        let s = strength[part];
        let around_one = [(1.0 - s).max(0.0), 1.0 + s];
        match part {
            0 => brightness(pixels, draws.between(around_one[0], around_one[1]) as f32),
            1 => contrast(pixels, draws.between(around_one[0], around_one[1]) as f32),
            2 => saturation(pixels, draws.between(around_one[0], around_one[1]) as f32),
            _ => shift_hue(pixels, draws.between(-s, s) as f32),
        }
    }
}

fn luma(pixel: Pixel) -> f32 {
    LUMA[0] * pixel[0] + LUMA[1] * pixel[1] + LUMA[2] * pixel[2]
}

/// `factor * value + (1 - factor) * other`, kept in 0..1.
fn blend(value: f32, other: f32, factor: f32) -> f32 {
    (factor * value + (1.0 - factor) * other).clamp(0.0, 1.0)
}

fn brightness(pixels: &mut [Pixel], factor: f32) {
    for pixel in pixels {
        *pixel = pixel.map(|value| blend(value, 0.0, factor));
    }
}

fn contrast(pixels: &mut [Pixel], factor: f32) {
    let sum: f64 = pixels.iter().map(|pixel| f64::from(luma(*pixel))).sum();
    let mean = (sum / pixels.len() as f64) as f32;
    for pixel in pixels {
        *pixel = pixel.map(|value| blend(value, mean, factor));
    }
}

fn saturation(pixels: &mut [Pixel], factor: f32) {
    for pixel in pixels {
        let grey = luma(*pixel);
        *pixel = pixel.map(|value| blend(value, grey, factor));
    }
}

/// Turns the hue by `turn` of the colour circle, -0.5..0.5.
fn shift_hue(pixels: &mut [Pixel], turn: f32) {
    for pixel in pixels {
        let [hue, saturation, value] = to_hsv(*pixel);
        *pixel = to_rgb([(hue + turn).rem_euclid(1.0), saturation, value]);
    }
}

/// Hue, saturation and value, each in 0..1; a grey pixel has hue and saturation 0.
fn to_hsv([red, green, blue]: Pixel) -> Pixel {
    let largest = red.max(green).max(blue);
    let range = largest - red.min(green).min(blue);
    if range == 0.0 {
        return [0.0, 0.0, largest];
    }
    let sector = if largest == red {
        ((green - blue) / range).rem_euclid(6.0)
    } else if largest == green {
        (blue - red) / range + 2.0
    } else {
        (red - green) / range + 4.0
    };
    [sector / 6.0, range / largest, largest]
}

fn to_rgb([hue, saturation, value]: Pixel) -> Pixel {
    let sector = (hue * 6.0).floor();
    let rest = hue * 6.0 - sector;
    let low = (value * (1.0 - saturation)).clamp(0.0, 1.0);
    let falling = (value * (1.0 - saturation * rest)).clamp(0.0, 1.0);
    let rising = (value * (1.0 - saturation * (1.0 - rest))).clamp(0.0, 1.0);
    match sector as u32 % 6 {
        0 => [value, rising, low],
        1 => [falling, value, low],
        2 => [low, value, rising],
        3 => [low, falling, value],
        4 => [rising, low, value],
        _ => [value, low, falling],
    }
}

/// Gaussian blur with reflected edges. The kernel spans a tenth of the image (SimCLR's choice), odd, at least 3.
fn blurred(pixels: &[Pixel], size: usize, sigma: f64) -> Vec<Pixel> {
    let kernel = gaussian(size, sigma);
    let radius = kernel.len() / 2;
    let pass = |source: &[Pixel], step: usize, across: usize| {
        let mut target = vec![[0.0; 3]; source.len()];
        for line in 0..size {
            for i in 0..size {
                let mut sum = [0f32; 3];
                for (k, weight) in kernel.iter().enumerate() {
                    let at = reflected(i + k, radius, size);
                    let pixel = source[line * across + at * step];
                    (0..3).for_each(|channel| sum[channel] += weight * pixel[channel]);
                }
                target[line * across + i * step] = sum;
            }
        }
        target
    };
    pass(&pass(pixels, 1, size), size, 1)
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
#[path = "augment_tests.rs"]
mod tests;
