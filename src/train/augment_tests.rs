use proptest::prelude::*;

use super::*;
use crate::train::rng::{Domain, Place};

const NOTHING: Augmentation = Augmentation {
    crop_scale: [1.0, 1.0],
    flip_probability: 0.0,
    jitter_probability: 0.0,
    jitter: [0.0; 4],
    grey_probability: 0.0,
    blur_probability: 0.0,
    blur_sigma: [0.1, 2.0],
};
const SIMCLR: Augmentation = Augmentation {
    crop_scale: [0.08, 1.0],
    flip_probability: 0.5,
    jitter_probability: 0.8,
    jitter: [0.8, 0.8, 0.8, 0.2],
    grey_probability: 0.2,
    blur_probability: 0.5,
    blur_sigma: [0.1, 2.0],
};

fn preprocessing(size: usize) -> Preprocessing {
    Preprocessing { size, mean: [0.0; 3], std: [1.0; 3] }
}

fn draws(seed: u64, frame: u32, view: u8) -> Draws {
    let place = Place { domain: Domain::Augmentation, step: 0, frame, view };
    Draws::new(seed, place)
}

fn picture(width: u32, height: u32) -> RgbFrame {
    let pixels = (0..width * height)
        .flat_map(|i| [(i * 7 % 251) as u8, (i % width * 9) as u8, (i / width * 11) as u8])
        .collect();
    RgbFrame { width, height, pixels }
}

fn view(frame: &RgbFrame, parameters: &Augmentation, size: usize, mut draws: Draws) -> Vec<f32> {
    let mut out = vec![f32::NAN; 3 * size * size];
    augmented_view(frame, parameters, &preprocessing(size), &mut draws, &mut out).unwrap();
    out
}

#[test]
fn a_view_is_a_function_of_its_key() {
    let frame = picture(20, 20);
    let base = view(&frame, &SIMCLR, 16, draws(1, 2, 0));
    assert_eq!(base, view(&frame, &SIMCLR, 16, draws(1, 2, 0)));
    assert_ne!(base, view(&frame, &SIMCLR, 16, draws(1, 2, 1)));
    assert_ne!(base, view(&frame, &SIMCLR, 16, draws(1, 3, 0)));
    assert_ne!(base, view(&frame, &SIMCLR, 16, draws(2, 2, 0)));
}

#[test]
fn without_any_part_the_view_is_the_frame() {
    let frame = picture(16, 16);
    // A full-area crop fits only at ratio 1: all tries fail and the centre, here the whole frame, is taken.
    let out = view(&frame, &NOTHING, 16, draws(1, 0, 0));
    for (i, pixel) in frame.pixels.chunks_exact(3).enumerate() {
        for channel in 0..3 {
            assert_eq!(out[channel * 256 + i], f32::from(pixel[channel]) / 255.0);
        }
    }
}

#[test]
fn a_flip_mirrors_rows() {
    let flip = Augmentation { flip_probability: 1.0, ..NOTHING };
    let frame = picture(16, 16);
    let plain = view(&frame, &NOTHING, 16, draws(1, 0, 0));
    let flipped = view(&frame, &flip, 16, draws(1, 0, 0));
    for i in 0..plain.len() {
        assert_eq!(flipped[i], plain[i - i % 16 + 15 - i % 16]);
    }
}

#[test]
fn grey_views_have_three_equal_channels() {
    let grey = Augmentation { grey_probability: 1.0, ..SIMCLR };
    let out = view(&picture(20, 30), &grey, 16, draws(5, 0, 0));
    for i in 0..256 {
        assert!((out[i] - out[256 + i]).abs() < 1e-6 && (out[i] - out[512 + i]).abs() < 1e-6);
    }
}

#[test]
fn a_long_frame_falls_back_to_its_largest_allowed_centre() {
    let crop = |left, top, width, height| Crop { left, top, width, height };
    assert_eq!(central_crop(400, 30), crop(180, 0, 40, 30));
    assert_eq!(central_crop(30, 400), crop(0, 180, 30, 40));
    assert_eq!(central_crop(32, 32), crop(0, 0, 32, 32));
    assert_eq!(random_crop(400, 30, [1.0, 1.0], &mut draws(0, 0, 0)), central_crop(400, 30));
}

#[test]
fn colours_change_as_torchvision_defines_it() {
    let start = [[0.2, 0.4, 0.6], [0.8, 0.1, 0.3]];
    let close = |got: &[Pixel], expected: &[Pixel]| {
        let pairs = got.as_flattened().iter().zip(expected.as_flattened());
        pairs.for_each(|(a, b)| assert!((a - b).abs() < 1e-6, "{got:?} is not {expected:?}"));
    };
    let mut pixels = start;
    brightness(&mut pixels, 1.5);
    close(&pixels, &[[0.3, 0.6, 0.9], [1.0, 0.15, 0.45]]);
    // Luma of the two: 0.36298 and 0.33202, mean 0.3475.
    let mut pixels = start;
    contrast(&mut pixels, 0.5);
    close(&pixels, &[[0.27375, 0.37375, 0.47375], [0.57375, 0.22375, 0.32375]]);
    let mut pixels = start;
    saturation(&mut pixels, 0.0);
    close(&pixels, &[[0.36298; 3], [0.33202; 3]]);
    let mut pixels = start;
    shift_hue(&mut pixels, 1.0 / 3.0);
    close(&pixels, &[[0.6, 0.2, 0.4], [0.3, 0.8, 0.1]]);
}

#[test]
fn a_blur_keeps_flat_areas_and_spreads_a_point() {
    let flat = vec![[0.25, 0.5, 0.75]; 64];
    for (a, b) in blurred(&flat, 8, 1.0).iter().zip(&flat) {
        (0..3).for_each(|c| assert!((a[c] - b[c]).abs() < 1e-6));
    }
    let mut point = vec![[0.0; 3]; 64];
    point[3 * 8 + 3] = [1.0; 3];
    let spread = blurred(&point, 8, 1.0);
    let e = (-0.5f32).exp();
    let centre = 1.0 / (1.0 + 2.0 * e);
    assert!((spread[27][0] - centre * centre).abs() < 1e-6);
    assert!((spread[28][0] - centre * centre * e).abs() < 1e-6);
    assert!((spread[36][0] - centre * centre * e * e).abs() < 1e-6);
    assert_eq!(spread[29][0], 0.0);
}

#[test]
fn the_blur_kernel_spans_a_tenth_of_the_image() {
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

    #[test]
    fn crops_lie_inside_and_keep_the_area_asked_for(
        seed: u64, width in 8u32..300, height in 8u32..300, low in 0.05f64..0.9,
    ) {
        let crop = random_crop(width, height, [low, 1.0], &mut draws(seed, 0, 0));
        prop_assert!(crop.left + crop.width <= width && crop.top + crop.height <= height);
        let ratio = f64::from(crop.width) / f64::from(crop.height);
        // Half a pixel of rounding on either side.
        prop_assert!(ratio > 0.5 && ratio < 2.0, "{crop:?}");
        prop_assert!(crop.width >= 1 && crop.height >= 1);
    }

    #[test]
    fn views_stay_in_the_range_of_pixels(seed: u64, width in 4u32..60, height in 4u32..60) {
        let out = view(&picture(width, height), &SIMCLR, 16, draws(seed, 0, 0));
        prop_assert!(out.iter().all(|v| (-1e-6..=1.0 + 1e-6).contains(v)));
    }

    #[test]
    fn colours_read_back_from_hsv(red in 0.0f32..1.0, green in 0.0f32..1.0, blue in 0.0f32..1.0) {
        let back = to_rgb(to_hsv([red, green, blue]));
        for (a, b) in back.iter().zip([red, green, blue]) {
            prop_assert!((a - b).abs() < 1e-5, "{back:?}");
        }
    }
}
