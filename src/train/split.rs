//! The split of a period's frames into those that are trained on and its probe set.
//!
//! Frames of one stream within one block of time look alike, so a block is never divided, and frames closer
//! than the guard to a block of the other side are in neither. Invariant: a training frame and a probe frame
//! of one stream are at least the guard apart. The split is a pure function of what is known of the frames:
//! no seed (a retry measures on the same probe set), no order of arrival, no label.
//!
//! Blocks are ranked by (how many blocks of their stream come before them by hash, hash) and the first share
//! of them goes to the probe set: it meets as many streams as it has blocks for. With two blocks or more at
//! least one goes either way, and never more than half are probed.

use std::collections::HashMap;

use sha2::{Digest, Sha256};

use super::frames::FrameMeta;
use super::spec::ProbeSpec;

/// Indices into the frames that were split, ascending.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Split {
    pub train: Vec<usize>,
    pub probe: Vec<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Train,
    Probe,
}

/// A stream's block of time: the stream and the number of the block since 1970.
type Block<'a> = (&'a str, i64);

/// Splits at most `max_frames` of the frames (a sample by hash).
pub fn split(metas: &[FrameMeta], max_frames: u64, probe: &ProbeSpec) -> Split {
    let all: Vec<usize> = (0..metas.len()).collect();
    let sampled = sample(metas, all, max_frames);
    let sides = sides(metas, &sampled, probe);
    let mut split = Split::default();
    for index in sampled {
        match guarded_side(&metas[index], &sides, probe) {
            Some(Side::Train) => split.train.push(index),
            Some(Side::Probe) => split.probe.push(index),
            None => {}
        }
    }
    split.probe = sample(metas, split.probe, probe.max_frames);
    split
}

/// At most `max_frames` of `indices`: those whose frames have the smallest hashes. Keeps their order.
pub fn sample(metas: &[FrameMeta], indices: Vec<usize>, max_frames: u64) -> Vec<usize> {
    if indices.len() as u64 <= max_frames {
        return indices;
    }
    let mut hashed: Vec<(u64, usize)> =
        indices.into_iter().map(|index| (frame_hash(&metas[index]), index)).collect();
    hashed.sort_unstable();
    hashed.truncate(max_frames as usize);
    let mut kept: Vec<usize> = hashed.into_iter().map(|(_, index)| index).collect();
    kept.sort_unstable();
    kept
}

/// Which side each block that has frames belongs to.
fn sides<'a>(metas: &'a [FrameMeta], indices: &[usize], probe: &ProbeSpec) -> HashMap<Block<'a>, Side> {
    let ranked = ranked_blocks(metas, indices, probe.block_ms);
    let share = (ranked.len() as f64 * probe.ratio).round() as usize;
    let probed = share.max(1).min(ranked.len() / 2);
    let side = |rank| {
        if rank < probed { Side::Probe } else { Side::Train }
    };
    ranked.into_iter().enumerate().map(|(rank, block)| (block, side(rank))).collect()
}

/// All blocks, those that the probe set takes first in front.
fn ranked_blocks<'a>(metas: &'a [FrameMeta], indices: &[usize], block_ms: i64) -> Vec<Block<'a>> {
    let mut blocks: Vec<Block> = indices.iter().map(|index| block_of(&metas[*index], block_ms)).collect();
    blocks.sort_unstable();
    blocks.dedup();
    let mut by_stream: Vec<(&str, u64, Block)> =
        blocks.into_iter().map(|block| (block.0, block_hash(block), block)).collect();
    by_stream.sort_unstable();
    let mut ranked = Vec::with_capacity(by_stream.len());
    for stream in by_stream.chunk_by(|a, b| a.0 == b.0) {
        for (before, (_, hash, block)) in stream.iter().enumerate() {
            ranked.push((before, *hash, *block));
        }
    }
    ranked.sort_unstable();
    ranked.into_iter().map(|(_, _, block)| block).collect()
}

/// The side of a frame's block, or none if a block of the other side is closer than the guard.
fn guarded_side(meta: &FrameMeta, sides: &HashMap<Block<'_>, Side>, probe: &ProbeSpec) -> Option<Side> {
    let (stream, number) = block_of(meta, probe.block_ms);
    let side = *sides.get(&(stream, number))?;
    let time = meta.captured_at.as_ms();
    let reach = 1 + probe.guard_ms / probe.block_ms;
    let near = (number - reach..=number + reach).any(|other| {
        let first = other * probe.block_ms;
        let last = first + probe.block_ms - 1;
        let distance = (first - time).max(time - last);
        distance < probe.guard_ms && sides.get(&(stream, other)).is_some_and(|s| *s != side)
    });
    (!near).then_some(side)
}

fn block_of(meta: &FrameMeta, block_ms: i64) -> Block<'_> {
    (&meta.stream_id, meta.captured_at.as_ms().div_euclid(block_ms))
}

fn block_hash((stream, number): Block<'_>) -> u64 {
    hash(&[stream.as_bytes(), &number.to_le_bytes()])
}

fn frame_hash(meta: &FrameMeta) -> u64 {
    hash(&[
        meta.topic.as_bytes(),
        &meta.partition.to_le_bytes(),
        &meta.offset.to_le_bytes(),
        &meta.row.to_le_bytes(),
    ])
}

/// The first eight bytes of SHA-256 over the parts, each with its length before it.
fn hash(parts: &[&[u8]]) -> u64 {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let digest = hash.finalize();
    digest[..8].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::EventTime;
    use proptest::prelude::*;

    const PROBE: ProbeSpec = ProbeSpec {
        block_ms: 600_000,
        guard_ms: 30_000,
        ratio: 0.2,
        max_frames: 1_000,
        k: 20,
        bootstrap: 100,
    };

    fn meta(stream: &str, at_ms: i64, offset: i64) -> FrameMeta {
        FrameMeta {
            stream_id: stream.into(),
            captured_at: EventTime(at_ms),
            label: None,
            topic: "frames".into(),
            partition: 0,
            offset,
            row: 0,
        }
    }

    /// `streams` streams with a frame every 10 s over `minutes`.
    fn stream_frames(streams: usize, minutes: i64) -> Vec<FrameMeta> {
        (0..streams)
            .flat_map(|s| (0..minutes * 6).map(move |i| (s, i)))
            .map(|(s, i)| meta(&format!("s{s}"), i * 10_000, s as i64 * 100_000 + i))
            .collect()
    }

    fn blocks(metas: &[FrameMeta], indices: &[usize]) -> usize {
        let mut blocks: Vec<Block> = indices.iter().map(|i| block_of(&metas[*i], PROBE.block_ms)).collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks.len()
    }

    #[test]
    fn the_share_of_probed_blocks_is_the_ratio_and_they_meet_every_stream() {
        let metas = stream_frames(6, 50);
        let split = split(&metas, u64::MAX, &PROBE);
        assert_eq!(blocks(&metas, &split.probe), 6);
        assert_eq!(blocks(&metas, &split.train), 24);
        let mut streams: Vec<_> = split.probe.iter().map(|i| &metas[*i].stream_id).collect();
        streams.dedup();
        assert_eq!(streams.len(), 6);
    }

    #[test]
    fn two_blocks_go_one_either_way_and_a_single_one_is_trained_on() {
        let two = [meta("a", 0, 0), meta("b", 0, 1)];
        let divided = split(&two, u64::MAX, &PROBE);
        assert_eq!((divided.train.len(), divided.probe.len()), (1, 1));
        let one = [meta("a", 0, 0), meta("a", 1, 1)];
        let divided = split(&one, u64::MAX, &PROBE);
        assert_eq!((divided.train.len(), divided.probe.len()), (2, 0));
        assert_eq!(split(&[], u64::MAX, &PROBE), Split::default());
    }

    #[test]
    fn frames_near_the_border_of_the_sides_are_in_neither() {
        let metas = stream_frames(1, 20);
        let split = split(&metas, u64::MAX, &PROBE);
        // A frame every 10 s: 580 s and 590 s lie within 30 s of the second block, and 600 s up to 620 s of the
        // first (its last millisecond is 599 999).
        let kept = split.train.len() + split.probe.len();
        assert_eq!(kept, 120 - 2 - 3);
    }

    #[test]
    fn a_probe_set_is_bounded_and_what_it_leaves_is_not_trained_on() {
        let metas = stream_frames(6, 50);
        let whole = split(&metas, u64::MAX, &PROBE);
        let bounded = split(&metas, u64::MAX, &ProbeSpec { max_frames: 40, ..PROBE });
        assert_eq!(bounded.probe.len(), 40);
        assert!(bounded.probe.iter().all(|index| whole.probe.contains(index)));
        assert_eq!(bounded.train, whole.train);
    }

    #[test]
    fn a_period_above_its_limit_is_sampled() {
        let metas = stream_frames(6, 50);
        let split = split(&metas, 500, &PROBE);
        assert!(split.train.len() + split.probe.len() <= 500);
        assert!(split.train.len() > 300 && !split.probe.is_empty());
    }

    prop_compose! {
        fn any_frames()(frames in prop::collection::vec((0u8..5, 0i64..6_000_000), 0..200)) -> Vec<FrameMeta> {
            frames
                .iter()
                .enumerate()
                .map(|(i, (stream, at))| meta(&format!("s{stream}"), *at, i as i64))
                .collect()
        }
    }

    prop_compose! {
        fn any_probe()(block in 5_000i64..900_000, guard in 0i64..1_000_000, ratio in 0.0f64..0.9, max in 0u64..50)
            -> ProbeSpec
        {
            ProbeSpec { block_ms: block, guard_ms: guard, ratio, max_frames: max, ..PROBE }
        }
    }

    proptest! {
        #[test]
        fn nothing_leaks(metas in any_frames(), probe in any_probe(), max in 0u64..300) {
            let split = split(&metas, max, &probe);
            prop_assert!(split.probe.len() as u64 <= probe.max_frames);
            prop_assert!((split.train.len() + split.probe.len()) as u64 <= max);
            for t in &split.train {
                for p in &split.probe {
                    let (t, p) = (&metas[*t], &metas[*p]);
                    if t.stream_id == p.stream_id {
                        prop_assert_ne!(block_of(t, probe.block_ms), block_of(p, probe.block_ms));
                        prop_assert!((t.captured_at.0 - p.captured_at.0).abs() >= probe.guard_ms);
                    }
                }
            }
        }

        #[test]
        fn the_order_of_frames_does_not_matter(
            (metas, shuffled) in any_frames().prop_flat_map(|m| (Just(m.clone()), Just(m).prop_shuffle())),
            probe in any_probe(),
            max in 0u64..300,
        ) {
            let offsets = |metas: &[FrameMeta], indices: &[usize]| {
                let mut offsets: Vec<i64> = indices.iter().map(|i| metas[*i].offset).collect();
                offsets.sort_unstable();
                offsets
            };
            let (a, b) = (split(&metas, max, &probe), split(&shuffled, max, &probe));
            prop_assert_eq!(offsets(&metas, &a.train), offsets(&shuffled, &b.train));
            prop_assert_eq!(offsets(&metas, &a.probe), offsets(&shuffled, &b.probe));
        }

        #[test]
        fn without_a_guard_every_frame_of_a_trained_block_is_trained_on(metas in any_frames()) {
            let probe = ProbeSpec { guard_ms: 0, ..PROBE };
            let split = split(&metas, u64::MAX, &probe);
            prop_assert_eq!(split.train.len() + split.probe.len(), metas.len());
        }
    }
}
