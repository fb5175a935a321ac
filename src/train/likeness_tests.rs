use std::io::Cursor;

use image::codecs::jpeg::JpegEncoder;
use image::{ImageFormat, RgbImage};
use proptest::prelude::*;

use super::*;
use crate::train::fixtures;

const RULES: Composition = Composition { spacing_ms: 0, max_copies: 1, duplicate_distance: 0.2 };

fn of_bytes(bytes: &[u8]) -> Thumbnail {
    let mut frame = RgbFrame::default();
    frame.decode(bytes, MAX_PIXELS).unwrap();
    Thumbnail::of(&frame, &mut Scaler::default()).unwrap()
}

fn png(image: &RgbImage) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn jpeg(image: &RgbImage, quality: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    JpegEncoder::new_with_quality(&mut bytes, quality).encode_image(image).unwrap();
    bytes
}

/// A dark scene with a bright door at `door`, and a shimmer that no two of them share.
fn dark_scene(door: u32, shimmer: u32) -> RgbImage {
    RgbImage::from_fn(64, 48, |x, y| {
        let lit = (door..door + 10).contains(&x) && (10..40).contains(&y);
        let noise = (x * 31 + y * 17 + shimmer * 13) % 3;
        image::Rgb(if lit { [200, 180, 90] } else { [8 + noise as u8; 3] })
    })
}

/// Black on the left and `level` on the right: a contrast of half of it.
fn halves(level: u8) -> Thumbnail {
    let mut bytes = [0; LEN];
    bytes.chunks_exact_mut(24).for_each(|row| row[12..].fill(level));
    Thumbnail::new(bytes)
}

fn look(level: u8, bytes: &[u8]) -> Look {
    Look { content: Sha256::digest(bytes).into(), thumbnail: halves(level) }
}

#[test]
fn differences_count_by_the_smaller_contrast() {
    let (dark, bright) = (halves(20), halves(200));
    assert_eq!((dark.mean, dark.contrast), (10.0, 10.0));
    assert_eq!(dark.difference(&bright), 90.0);
    // Two levels off in half of the bytes: a tenth of the contrast of one, a hundredth of the other's.
    assert!(dark.is_like(&halves(22), 0.1) && !dark.is_like(&halves(22), 0.09));
    assert!(bright.is_like(&halves(202), 0.01) && !bright.is_like(&halves(202), 0.009));
}

#[test]
fn equal_thumbnails_are_alike_at_any_limit_and_two_flat_ones_are_not_unless_they_are() {
    let flat = |level| Thumbnail::new([level; LEN]);
    assert!(halves(30).is_like(&halves(30), 0.0) && flat(7).is_like(&flat(7), 0.0));
    assert!(!flat(7).is_like(&flat(8), 1.0));
}

#[test]
fn another_compression_and_a_shimmer_are_alike_and_a_scene_that_moved_is_not() {
    let first = of_bytes(&jpeg(&dark_scene(10, 0), 90));
    for again in [jpeg(&dark_scene(10, 0), 50), jpeg(&dark_scene(10, 1), 90), png(&dark_scene(10, 2))] {
        assert!(first.is_like(&of_bytes(&again), 0.1));
        assert!(!first.is_like(&of_bytes(&again), 0.0));
    }
    assert!(!first.is_like(&of_bytes(&png(&dark_scene(22, 0))), 0.2));
    assert!(!first.is_like(&of_bytes(&png(&dark_scene(64, 0))), 0.2));
}

#[test]
fn pairs_are_named_once_by_position() {
    let thumbnails = [10, 90, 11, 90].map(halves);
    assert_eq!(alike(&thumbnails, 0.2), [(0, 2), (1, 3)]);
    assert_eq!(alike(&thumbnails, 0.0), [(1, 3)]);
    assert_eq!(alike(&[], 0.2), []);
}

#[test]
fn of_copies_the_first_few_are_trained_on_and_nothing_that_a_probe_frame_is_like() {
    let looks =
        [look(10, b"a"), look(50, b"b"), look(10, b"a"), look(90, b"c"), look(10, b"a"), look(91, b"d")];
    let train = [0, 1, 2, 3, 4];
    let choose_by = |rules| choose(&train, &looks[..5], &looks[5..], &rules);
    let chosen = choose_by(RULES);
    assert_eq!(chosen, Chosen { train: vec![0, 1], left_out: LeftOut { copies: 2, near_probe: 1 } });
    let twice = choose_by(Composition { max_copies: 2, ..RULES });
    assert_eq!(twice, Chosen { train: vec![0, 1, 2], left_out: LeftOut { copies: 1, near_probe: 1 } });
    // Without a limit a copy of a probe frame still is not.
    let exact =
        choose(&train, &looks[..5], &[look(50, b"b")], &Composition { duplicate_distance: 0.0, ..RULES });
    assert_eq!(exact, Chosen { train: vec![0, 3], left_out: LeftOut { copies: 2, near_probe: 1 } });
}

#[test]
fn looks_come_in_the_order_that_is_asked_for_and_a_broken_frame_is_named() {
    let frames = fixtures::frames(9);
    let found = looks(&frames, &[8, 0, 3]).unwrap();
    let of_frame =
        |bytes: Vec<u8>| Look { content: Sha256::digest(&bytes).into(), thumbnail: of_bytes(&bytes) };
    let expected: Vec<Look> = [8, 0, 3].map(|frame| of_frame(frames.bytes(frame).unwrap())).to_vec();
    assert_eq!(found, expected);
    let error = looks(&fixtures::frames_with_a_broken_one(5, 3), &[0, 1, 2, 3]).unwrap_err();
    assert!(matches!(error, BatchError::Image { frame: 3, .. }), "{error}");
    assert_eq!(looks(&frames, &[]).unwrap(), []);
}

prop_compose! {
    fn any_looks(most: usize)(bytes in prop::collection::vec(prop::collection::vec(any::<u8>(), 4), 0..most)) -> Vec<Look> {
        let look = |bytes: Vec<u8>| {
            let mut thumbnail = [0; LEN];
            thumbnail.iter_mut().enumerate().for_each(|(at, byte)| *byte = bytes[at % 4] / 8);
            Look { content: Sha256::digest(&bytes).into(), thumbnail: Thumbnail::new(thumbnail) }
        };
        bytes.into_iter().map(look).collect()
    }
}

proptest! {
    #[test]
    fn every_pair_that_is_alike_is_found(looks in any_looks(30), limit in 0.0f64..2.0) {
        let thumbnails: Vec<Thumbnail> = looks.into_iter().map(|look| look.thumbnail).collect();
        let mut expected = Vec::new();
        for (a, thumbnail) in thumbnails.iter().enumerate() {
            for (b, other) in thumbnails.iter().enumerate().skip(a + 1) {
                if thumbnail.is_like(other, limit) {
                    expected.push((a, b));
                }
            }
        }
        prop_assert_eq!(alike(&thumbnails, limit), expected);
    }

    #[test]
    fn what_is_sorted_away_by_its_mean_is_like_no_probe_frame(
        looks in any_looks(30), probes in any_looks(30), limit in 0.0f64..2.0,
    ) {
        let train: Vec<usize> = (0..looks.len()).collect();
        let rules = Composition { duplicate_distance: limit, max_copies: u64::MAX, ..RULES };
        let chosen = choose(&train, &looks, &probes, &rules);
        let expected: Vec<usize> =
            train.into_iter().filter(|frame| !probes.iter().any(|probe| looks[*frame].thumbnail.is_like(&probe.thumbnail, limit))).collect();
        prop_assert_eq!(chosen.left_out.near_probe as usize, looks.len() - expected.len());
        prop_assert_eq!(chosen.train, expected);
    }
}
