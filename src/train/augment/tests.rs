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
    let mut scratch = Scratch::default();
    augmented_view(frame, parameters, &preprocessing(size), &mut draws, &mut scratch, &mut out).unwrap();
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

/// Sides that are and are not a multiple of a vector.
#[test]
fn a_view_is_the_same_whatever_instructions_compute_it() {
    for (seed, size) in (0..60).zip([16, 17, 31, 32, 64].into_iter().cycle()) {
        let pixels = picture(size as u32, size as u32).pixels;
        let preprocessing = Preprocessing { size, mean: [0.4, 0.5, 0.6], std: [0.2, 0.3, 0.25] };
        let changes = Changes::drawn(&SIMCLR, &mut draws(seed, 0, 0));
        let mut views = [vec![f32::NAN; 3 * size * size], vec![f32::NAN; 3 * size * size]];
        changes.apply(&pixels, &preprocessing, &mut Blur::default(), &mut views[0]);
        changes.apply_anywhere(&pixels, &preprocessing, &mut Blur::default(), &mut views[1]);
        assert!(views[0] == views[1], "{changes:?} at size {size}");
    }
}

/// The memory of a view leaves no trace in the next, of another size.
#[test]
fn a_view_does_not_depend_on_the_one_before() {
    let (mut scratch, mut out) = (Scratch::default(), vec![0.0; 3 * 24 * 24]);
    let mut view_in = |size: usize, seed| {
        let out = &mut out[..3 * size * size];
        let (frame, draws) = (picture(20 + size as u32, 30), &mut draws(seed, 0, 0));
        augmented_view(&frame, &SIMCLR, &preprocessing(size), draws, &mut scratch, out).unwrap();
        out.to_vec()
    };
    for (seed, size) in (0..30).zip([16, 24, 8].into_iter().cycle()) {
        let alone = view(&picture(20 + size as u32, 30), &SIMCLR, size, draws(seed, 0, 0));
        assert!(view_in(size, seed) == alone);
    }
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
}
