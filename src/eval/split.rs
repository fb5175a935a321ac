//! Which frames of a probe set teach a probe (the bank) and which are asked (the queries).
//!
//! Invariant: no stream stands on both sides, except where a label has a single stream; there the earlier
//! blocks of time are the bank, the later ones the queries, and queries within the guard of the bank are in
//! neither. A split is a function of streams, times and labels alone, so every version is asked the same.

use std::collections::{BTreeMap, HashMap};

use super::FrameMeta;
use super::random::hash;

/// Keys the order in which streams are dealt out; another value gives another, equally good split.
const STREAM_ORDER_SEED: u64 = 0x7061_6C69;

/// Row numbers of both sides, ascending and disjoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    pub bank: Vec<usize>,
    pub queries: Vec<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Bank,
    Queries,
}

/// Splits by label: each label whose streams (or, of a single stream, blocks) allow it stands on both sides with
/// about half of its frames; the others and frames without a label are on neither. `None` with fewer than
/// two such labels: there is nothing to tell apart.
pub fn by_label(frames: &[FrameMeta], block_ms: i64, guard_ms: i64) -> Option<Split> {
    let groups = group(frames, |frame| frame.label.as_deref());
    deal(frames, &groups, 2, Times { block_ms, guard_ms })
}

/// Splits all frames, labelled or not, as one group: what a map is fitted on, and what it is judged on.
/// `None` if there is a single stream within one block.
pub fn held_out(frames: &[FrameMeta], block_ms: i64, guard_ms: i64) -> Option<Split> {
    let groups = group(frames, |_| Some(""));
    deal(frames, &groups, 1, Times { block_ms, guard_ms })
}

#[derive(Clone, Copy)]
struct Times {
    block_ms: i64,
    guard_ms: i64,
}

/// Rows by label, then by stream.
type Groups<'a> = BTreeMap<&'a str, BTreeMap<&'a str, Vec<usize>>>;

fn group<'a>(frames: &'a [FrameMeta], label_of: impl Fn(&'a FrameMeta) -> Option<&'a str>) -> Groups<'a> {
    let mut groups = Groups::new();
    for (row, frame) in frames.iter().enumerate() {
        if let Some(label) = label_of(frame) {
            let streams = groups.entry(label).or_default();
            streams.entry(&frame.stream_id).or_default().push(row);
        }
    }
    groups
}

fn deal(frames: &[FrameMeta], groups: &Groups, min_labels: usize, times: Times) -> Option<Split> {
    let sides = deal_streams(groups);
    let mut split = Split { bank: Vec::new(), queries: Vec::new() };
    let mut labels = 0;
    for streams in groups.values() {
        let (bank, queries) = match streams.iter().next() {
            Some((stream, rows)) if streams.len() == 1 && !sides.contains_key(stream) => {
                cut_by_time(frames, rows, times)
            }
            _ => whole_streams(streams, &sides),
        };
        if bank.is_empty() || queries.is_empty() {
            continue;
        }
        labels += 1;
        split.bank.extend(bank);
        split.queries.extend(queries);
    }
    split.bank.sort_unstable();
    split.queries.sort_unstable();
    (labels >= min_labels).then_some(split)
}

/// A side for every stream of a label with several streams: in hash order, each to the side that has fewer
/// of the label's frames so far. A stream that an earlier label placed stays there.
fn deal_streams<'a>(groups: &Groups<'a>) -> HashMap<&'a str, Side> {
    let mut sides: HashMap<&str, Side> = HashMap::new();
    for streams in groups.values().filter(|streams| streams.len() > 1) {
        let mut order: Vec<(&str, usize)> =
            streams.iter().map(|(stream, rows)| (*stream, rows.len())).collect();
        order.sort_by_key(|(stream, _)| (hash(STREAM_ORDER_SEED, stream.as_bytes()), *stream));
        let (mut bank_frames, mut query_frames) = (0, 0);
        // Those already placed count first, so that the free ones balance them.
        order.sort_by_key(|(stream, _)| !sides.contains_key(stream));
        for (stream, frames) in order {
            let smaller = if bank_frames <= query_frames { Side::Bank } else { Side::Queries };
            match *sides.entry(stream).or_insert(smaller) {
                Side::Bank => bank_frames += frames,
                Side::Queries => query_frames += frames,
            }
        }
    }
    sides
}

fn whole_streams(
    streams: &BTreeMap<&str, Vec<usize>>,
    sides: &HashMap<&str, Side>,
) -> (Vec<usize>, Vec<usize>) {
    let (mut bank, mut queries) = (Vec::new(), Vec::new());
    for (stream, rows) in streams {
        match sides.get(stream) {
            Some(Side::Bank) => bank.extend(rows),
            Some(Side::Queries) => queries.extend(rows),
            None => {}
        }
    }
    (bank, queries)
}

/// Earlier blocks against later ones, cut where the halves are most equal.
fn cut_by_time(frames: &[FrameMeta], rows: &[usize], times: Times) -> (Vec<usize>, Vec<usize>) {
    let at = |row: usize| frames[row].captured_at.as_ms();
    let block = |row: usize| at(row).div_euclid(times.block_ms.max(1));
    let mut sizes = BTreeMap::<i64, usize>::new();
    rows.iter().for_each(|&row| *sizes.entry(block(row)).or_default() += 1);
    let mut before = 0;
    let mut best: Option<(usize, i64)> = None;
    for (number, size) in sizes {
        let imbalance = rows.len().abs_diff(2 * before);
        if before > 0 && best.is_none_or(|(smallest, _)| imbalance < smallest) {
            best = Some((imbalance, number));
        }
        before += size;
    }
    let Some((_, cut)) = best else {
        return (Vec::new(), Vec::new());
    };
    let (bank, later): (Vec<usize>, Vec<usize>) = rows.iter().partition(|&&row| block(row) < cut);
    let end = bank.iter().map(|&row| at(row)).max().unwrap_or(i64::MIN);
    let queries = later.into_iter().filter(|&row| at(row) >= end.saturating_add(times.guard_ms)).collect();
    (bank, queries)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::types::EventTime;

    fn frame(stream: &str, seconds: i64, label: Option<&str>) -> FrameMeta {
        FrameMeta {
            stream_id: stream.into(),
            captured_at: EventTime(seconds * 1000),
            label: label.map(Into::into),
        }
    }

    fn streams<'a>(frames: &'a [FrameMeta], rows: &[usize]) -> BTreeSet<&'a str> {
        rows.iter().map(|&row| frames[row].stream_id.as_str()).collect()
    }

    #[test]
    fn no_stream_stands_on_both_sides_and_the_sides_are_balanced() {
        let frames: Vec<_> = (0..400)
            .map(|i| {
                let stream = i % 20;
                frame(&format!("s{stream}"), i, Some(if stream < 10 { "a" } else { "b" }))
            })
            .collect();
        let split = by_label(&frames, 600_000, 30_000).unwrap();
        assert!(streams(&frames, &split.bank).is_disjoint(&streams(&frames, &split.queries)));
        assert_eq!((split.bank.len(), split.queries.len()), (200, 200));
    }

    #[test]
    fn a_label_of_one_stream_is_cut_by_time_with_a_guard() {
        let mut frames: Vec<_> = (0..20).map(|i| frame("only", i * 10, Some("a"))).collect();
        frames.extend((0..10).map(|i| frame(&format!("s{}", i % 2), i, Some("b"))));
        let split = by_label(&frames, 100_000, 30_000).unwrap();
        let of_a = |rows: &[usize]| rows.iter().copied().filter(|&row| row < 20).collect::<Vec<_>>();
        assert_eq!(of_a(&split.bank), (0..10).collect::<Vec<_>>());
        // The bank ends at 90 s: the frames at 100 s and 110 s are nearer than 30 s.
        assert_eq!(of_a(&split.queries), (12..20).collect::<Vec<_>>());
    }

    #[test]
    fn a_label_that_cannot_stand_on_both_sides_is_left_out() {
        let mut frames: Vec<_> = (0..12).map(|i| frame(&format!("s{}", i % 4), i, Some("a"))).collect();
        frames.extend((0..12).map(|i| frame(&format!("t{}", i % 4), i, Some("b"))));
        frames.extend((0..5).map(|i| frame("lone", i, Some("c"))));
        frames.push(frame("s0", 3, None));
        let split = by_label(&frames, 600_000, 30_000).unwrap();
        assert!(split.bank.iter().chain(&split.queries).all(|&row| row < 24));
        assert_eq!(by_label(&frames[..12], 600_000, 30_000), None, "one label");
        assert_eq!(by_label(&[], 600_000, 30_000), None);
    }

    #[test]
    fn frames_without_labels_can_be_held_out() {
        let frames: Vec<_> = (0..12).map(|i| frame(&format!("s{}", i % 3), i, None)).collect();
        let split = held_out(&frames, 600_000, 30_000).unwrap();
        assert_eq!(split.bank.len() + split.queries.len(), 12);
        assert_eq!(held_out(&frames[..1], 600_000, 30_000), None);
    }

    proptest! {
        #[test]
        fn the_order_of_frames_changes_nothing_and_no_side_shares_a_stream(
            picks in prop::collection::vec((0..8_usize, 0..5_000_i64, 0..4_usize), 1..80),
            rotation in 0..80_usize,
        ) {
            let frames: Vec<_> = picks.iter()
                .map(|(stream, at, label)| frame(&format!("s{stream}"), *at, Some(["a", "b", "c", "d"][*label])))
                .collect();
            let mut turned = frames.clone();
            turned.rotate_left(rotation % frames.len());
            let split = by_label(&frames, 600_000, 30_000);
            let again = by_label(&turned, 600_000, 30_000);
            let content = |frames: &[FrameMeta], rows: &[usize]| {
                let mut all: Vec<_> = rows.iter().map(|&row| format!("{:?}", frames[row])).collect();
                all.sort();
                all
            };
            prop_assert_eq!(split.is_some(), again.is_some());
            if let (Some(split), Some(again)) = (split, again) {
                prop_assert_eq!(content(&frames, &split.bank), content(&turned, &again.bank));
                prop_assert_eq!(content(&frames, &split.queries), content(&turned, &again.queries));
                for label in ["a", "b", "c", "d"] {
                    let has = |rows: &[usize]| rows.iter().any(|&row| frames[row].label.as_deref() == Some(label));
                    prop_assert_eq!(has(&split.bank), has(&split.queries));
                }
            }
        }
    }
}
