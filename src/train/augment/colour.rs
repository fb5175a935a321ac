//! Changes of colour on the three planes of a view (red, green, blue, in 0..1), as torchvision defines them.
//!
//! Each is one loop without branches; only the mean that contrast needs looks at more than one pixel, in a fixed
//! order. Which changes are made is drawn here, when is `augment`'s to say.

use crate::train::rng::Draws;

/// ITU-R 601-2 luma, as torchvision rounds it.
const LUMA: [f32; 3] = [0.2989, 0.587, 0.114];

/// Sums that a mean is taken from: as many as fill the longest vectors there are.
const LANES: usize = 8;

/// Red, green and blue.
pub(super) type Pixel = [f32; 3];

/// One part of the jitter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Change {
    Brightness(f32),
    Contrast(f32),
    Saturation(f32),
    /// Turns the hue by a share of the colour circle, -0.5..0.5.
    Hue(f32),
}

/// torchvision's `ColorJitter`: brightness, contrast, saturation and hue in a random order.
pub(super) fn jitter(strength: [f64; 4], draws: &mut Draws) -> [Change; 4] {
    let mut order = [0, 1, 2, 3];
    for i in (1..order.len()).rev() {
        order.swap(i, draws.below(i as u32 + 1) as usize);
    }
    order.map(|part| {
        let s = strength[part];
        let mut around_one = || draws.between((1.0 - s).max(0.0), 1.0 + s) as f32;
        match part {
            0 => Change::Brightness(around_one()),
            1 => Change::Contrast(around_one()),
            2 => Change::Saturation(around_one()),
            _ => Change::Hue(draws.between(-s, s) as f32),
        }
    })
}

impl Change {
    #[inline(always)]
    pub(super) fn apply(self, view: &mut [f32]) {
        match self {
            Change::Brightness(factor) => {
                view.iter_mut().for_each(|value| *value = blend(*value, 0.0, factor));
            }
            Change::Contrast(factor) => {
                let mean = mean_luma(view);
                view.iter_mut().for_each(|value| *value = blend(*value, mean, factor));
            }
            Change::Saturation(factor) => for_each_pixel(view, |pixel| {
                let grey = luma(pixel);
                pixel.map(|value| blend(value, grey, factor))
            }),
            Change::Hue(turn) => for_each_pixel(view, |pixel| turned(pixel, turn)),
        }
    }
}

/// All three channels become the luma.
#[inline(always)]
pub(super) fn grey(view: &mut [f32]) {
    for_each_pixel(view, |pixel| [luma(pixel); 3]);
}

#[inline(always)]
fn for_each_pixel(view: &mut [f32], change: impl Fn(Pixel) -> Pixel) {
    let (red, rest) = view.split_at_mut(view.len() / 3);
    let (green, blue) = rest.split_at_mut(red.len());
    for ((red, green), blue) in red.iter_mut().zip(green).zip(blue) {
        [*red, *green, *blue] = change([*red, *green, *blue]);
    }
}

#[inline(always)]
fn luma(pixel: Pixel) -> f32 {
    LUMA[0] * pixel[0] + LUMA[1] * pixel[1] + LUMA[2] * pixel[2]
}

/// Over all pixels, in f64; pixel `i` goes to sum `i % LANES`.
#[inline(always)]
fn mean_luma(view: &[f32]) -> f32 {
    let (red, rest) = view.split_at(view.len() / 3);
    let (green, blue) = rest.split_at(red.len());
    let mut sums = [0f64; LANES];
    for ((red, green), blue) in red.chunks(LANES).zip(green.chunks(LANES)).zip(blue.chunks(LANES)) {
        for (((sum, red), green), blue) in sums.iter_mut().zip(red).zip(green).zip(blue) {
            *sum += f64::from(luma([*red, *green, *blue]));
        }
    }
    (sums.iter().sum::<f64>() / red.len() as f64) as f32
}

/// `factor * value + (1 - factor) * other`, kept in 0..1.
#[inline(always)]
fn blend(value: f32, other: f32, factor: f32) -> f32 {
    (factor * value + (1.0 - factor) * other).clamp(0.0, 1.0)
}

/// The pixel with its hue turned, without the way over HSV and back: with the hue in sixths of the circle, channel
/// `c` is `largest - range * clamp(min(k, 4 - k), 0, 1)` where `k = hue + start[c]` on the circle of six.
#[inline(always)]
fn turned([red, green, blue]: Pixel, turn: f32) -> Pixel {
    let largest = larger(larger(red, green), blue);
    let range = largest - smaller(smaller(red, green), blue);
    let (difference, start) = if largest == red {
        (green - blue, 0.0)
    } else if largest == green {
        (blue - red, 2.0)
    } else {
        (red - green, 4.0)
    };
    // A grey pixel has no hue; its range of 0 keeps it as it is.
    let divisor = if range == 0.0 { 1.0 } else { range };
    // In -1..5 plus -3..3: one correction brings it onto the circle.
    let hue = difference / divisor + start + 6.0 * turn;
    let hue = if hue < 0.0 { hue + 6.0 } else { hue };
    let hue = if hue >= 6.0 { hue - 6.0 } else { hue };
    [5.0, 3.0, 1.0].map(|start| {
        let k = hue + start;
        let k = if k >= 6.0 { k - 6.0 } else { k };
        largest - range * smaller(larger(smaller(k, 4.0 - k), 0.0), 1.0)
    })
}

/// `f32::max` also minds NaN, which takes more instructions.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[inline(always)]
fn smaller(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Planes of the pixels.
    fn planes(pixels: &[Pixel]) -> Vec<f32> {
        (0..3).flat_map(|channel| pixels.iter().map(move |pixel| pixel[channel])).collect()
    }

    fn changed(pixels: &[Pixel], change: Change) -> Vec<Pixel> {
        let mut view = planes(pixels);
        change.apply(&mut view);
        (0..pixels.len()).map(|i| [0, 1, 2].map(|channel| view[channel * pixels.len() + i])).collect()
    }

    /// By the book: to hue, saturation and value, each in 0..1 (a grey pixel has hue and saturation 0) ...
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

    /// ... and back.
    fn to_rgb([hue, saturation, value]: Pixel) -> Pixel {
        let sector = (hue * 6.0).floor();
        let rest = hue * 6.0 - sector;
        let low = value * (1.0 - saturation);
        let falling = value * (1.0 - saturation * rest);
        let rising = value * (1.0 - saturation * (1.0 - rest));
        match sector as u32 % 6 {
            0 => [value, rising, low],
            1 => [falling, value, low],
            2 => [low, value, rising],
            3 => [low, falling, value],
            4 => [rising, low, value],
            _ => [value, low, falling],
        }
    }

    #[test]
    fn colours_change_as_torchvision_defines_it() {
        let start = [[0.2, 0.4, 0.6], [0.8, 0.1, 0.3]];
        let check = |change, expected: [Pixel; 2]| {
            let got = changed(&start, change);
            let pairs = got.as_flattened().iter().zip(expected.as_flattened());
            pairs.for_each(|(a, b)| assert!((a - b).abs() < 1e-6, "{change:?}: {got:?} is not {expected:?}"));
        };
        check(Change::Brightness(1.5), [[0.3, 0.6, 0.9], [1.0, 0.15, 0.45]]);
        // Luma of the two: 0.36298 and 0.33202, mean 0.3475.
        check(Change::Contrast(0.5), [[0.27375, 0.37375, 0.47375], [0.57375, 0.22375, 0.32375]]);
        check(Change::Saturation(0.0), [[0.36298; 3], [0.33202; 3]]);
        check(Change::Hue(1.0 / 3.0), [[0.6, 0.2, 0.4], [0.3, 0.8, 0.1]]);
    }

    #[test]
    fn the_parts_of_a_jitter_come_in_every_order() {
        let mut orders = std::collections::HashSet::new();
        for frame in 0..500 {
            let place = crate::train::rng::Place {
                domain: crate::train::rng::Domain::Augmentation,
                step: 0,
                frame,
                view: 0,
            };
            let parts = jitter([0.8, 0.8, 0.8, 0.2], &mut Draws::new(3, place));
            orders.insert(parts.map(|part| std::mem::discriminant(&part)));
        }
        assert_eq!(orders.len(), 24);
    }

    /// Bytes, or numbers of which some are equal: ties are what a hue can go wrong at.
    fn pixel() -> impl Strategy<Value = Pixel> {
        prop_oneof![
            prop::array::uniform3(0.0f32..=1.0),
            prop::array::uniform3(0u8..=255).prop_map(|bytes| bytes.map(|byte| f32::from(byte) / 255.0)),
            prop::array::uniform3(prop::sample::select(vec![0.0f32, 0.25, 0.5, 1.0])),
        ]
    }

    proptest! {
        #[test]
        fn a_hue_is_turned_as_by_the_way_over_hsv(
            pixels in prop::collection::vec(pixel(), 1..40), turn in -0.5f32..=0.5,
        ) {
            let got = changed(&pixels, Change::Hue(turn));
            for (pixel, got) in pixels.iter().zip(got) {
                let [hue, saturation, value] = to_hsv(*pixel);
                let expected = to_rgb([(hue + turn).rem_euclid(1.0), saturation, value]);
                for (a, b) in got.iter().zip(expected) {
                    prop_assert!((a - b).abs() < 2e-6, "{pixel:?} by {turn}: {got:?} is not {expected:?}");
                    prop_assert!((0.0..=1.0).contains(a));
                }
            }
        }

        #[test]
        fn contrast_keeps_the_mean_of_any_number_of_pixels(pixels in prop::collection::vec(pixel(), 1..40)) {
            let mean = pixels.iter().map(|pixel| f64::from(luma(*pixel))).sum::<f64>() / pixels.len() as f64;
            for value in changed(&pixels, Change::Contrast(0.0)).as_flattened() {
                prop_assert!((f64::from(*value) - mean).abs() < 1e-6);
            }
        }
    }
}
