//! SimCLR's augmentation: one decoded frame and one sequence of draws give one normalised view.
//!
//! In the published order: random resized crop, flip, colour jitter (its four parts in random order), grey,
//! blur. Each part computes what torchvision's does on float images in 0..1 (the crop is resized in bytes, as
//! from a PIL image). A view is a pure function of the frame, the parameters and the draws, bit by bit whatever
//! vector instructions the processor has: sums have a fixed order, and no product is fused with a sum.
//!
//! All is drawn before a pixel is touched ([`Changes`]). Pixels lie in planes, in the view itself from the start:
//! every part is a loop over neighbours in memory without branches, which the compiler turns into vector code, once
//! for any processor and once for AVX2. Decoding is left to `model::preprocess`.

mod blur;
mod colour;

use crate::model::preprocess::{Crop, PreprocessError, Preprocessing, RgbFrame, Scaler, to_planes};

use self::blur::Blur;
use self::colour::Change;
use super::rng::Draws;
use super::spec::Augmentation;

/// Aspect ratios of crops, SimCLR's and torchvision's default.
const CROP_RATIO: [f64; 2] = [3.0 / 4.0, 4.0 / 3.0];
/// Crops drawn before the largest central one is taken.
const CROP_TRIES: usize = 10;

/// Memory that one view leaves to the next; its content means nothing.
#[derive(Debug, Default)]
pub struct Scratch {
    scaler: Scaler,
    blur: Blur,
}

/// Writes one augmented view `[3, size, size]` of `frame`.
pub fn augmented_view(
    frame: &RgbFrame,
    parameters: &Augmentation,
    preprocessing: &Preprocessing,
    draws: &mut Draws,
    scratch: &mut Scratch,
    out: &mut [f32],
) -> Result<(), PreprocessError> {
    let size = preprocessing.size as u32;
    let crop = random_crop(frame.width, frame.height, parameters.crop_scale, draws);
    let changes = Changes::drawn(parameters, draws);
    let pixels = scratch.scaler.crop(frame, crop, [size, size])?;
    changes.apply(pixels, preprocessing, &mut scratch.blur, out);
    Ok(())
}

/// What is done to a crop, in this order.
#[derive(Debug)]
struct Changes {
    flip: bool,
    jitter: Option<[Change; 4]>,
    grey: bool,
    /// Standard deviation in pixels.
    blur_sigma: Option<f64>,
}

impl Changes {
    fn drawn(parameters: &Augmentation, draws: &mut Draws) -> Self {
        let flip = draws.uniform() < parameters.flip_probability;
        let jitter = draws.uniform() < parameters.jitter_probability;
        let jitter = jitter.then(|| colour::jitter(parameters.jitter, draws));
        let grey = draws.uniform() < parameters.grey_probability;
        let blur = draws.uniform() < parameters.blur_probability;
        let [low, high] = parameters.blur_sigma;
        Self { flip, jitter, grey, blur_sigma: blur.then(|| draws.between(low, high)) }
    }

    /// Writes the normalised view `[3, size, size]` of `pixels`, `size * size` times three bytes.
    fn apply(&self, pixels: &[u8], preprocessing: &Preprocessing, blur: &mut Blur, view: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2, and nothing else is asked of the caller.
            return unsafe { self.apply_avx2(pixels, preprocessing, blur, view) };
        }
        self.apply_anywhere(pixels, preprocessing, blur, view);
    }

    /// The same instructions on vectors twice as long, so the same numbers: fused multiply-add stays off.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn apply_avx2(&self, pixels: &[u8], preprocessing: &Preprocessing, blur: &mut Blur, view: &mut [f32]) {
        self.apply_anywhere(pixels, preprocessing, blur, view);
    }

    // Inlined, as all that it calls: it is compiled for its caller's instructions.
    #[inline(always)]
    fn apply_anywhere(
        &self,
        pixels: &[u8],
        preprocessing: &Preprocessing,
        blur: &mut Blur,
        view: &mut [f32],
    ) {
        to_planes(pixels, view);
        if self.flip {
            view.chunks_exact_mut(preprocessing.size).for_each(<[f32]>::reverse);
        }
        for change in self.jitter.iter().flatten() {
            change.apply(view);
        }
        if self.grey {
            colour::grey(view);
        }
        if let Some(sigma) = self.blur_sigma {
            blur.apply(view, preprocessing.size, sigma);
        }
        preprocessing.normalise(view);
    }
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

#[cfg(test)]
mod tests;
