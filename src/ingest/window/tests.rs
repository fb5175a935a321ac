use proptest::prelude::*;

use super::*;
use crate::types::{TopicId, TopicPartition};

const HOUR: i64 = 3_600_000;

fn period(start: i64, end: i64, state: PeriodState) -> PeriodRecord {
    PeriodRecord {
        id: PeriodId(EventTime(start)),
        end: EventTime(end),
        state,
        frames: 1,
        bytes: 1,
        close_requested: false,
        sealed_at: None,
        settled_at: None,
        merged_into: None,
        version: None,
        reason: None,
        retries: 0,
        attempt: 0,
    }
}

fn bounds(start: i64, end: i64) -> PeriodBounds {
    PeriodBounds { id: PeriodId(EventTime(start)), end: EventTime(end) }
}

fn joined(windows: &Windows, at: i64) -> Placement {
    windows.place(EventTime(at), LatePolicy::Join)
}

#[test]
fn the_first_frame_makes_the_grids_period() {
    let windows = Windows::new(HOUR, &[]);
    let own = Placement::Period(bounds(2 * HOUR, 3 * HOUR));
    assert_eq!(joined(&windows, 2 * HOUR), own);
    assert_eq!(joined(&windows, 3 * HOUR - 1), own);
    assert_eq!(joined(&windows, -1), Placement::Period(bounds(-HOUR, 0)), "before 1970 too");
}

#[test]
fn a_late_frame_joins_the_oldest_open_period_or_is_dropped() {
    let periods = [
        period(0, 10, PeriodState::Published),
        period(20, 30, PeriodState::Open),
        period(40, 50, PeriodState::Open),
    ];
    let windows = Windows::new(10, &periods);
    assert_eq!(joined(&windows, 5), Placement::LateInto(bounds(20, 30)));
    assert_eq!(joined(&windows, -5), Placement::LateInto(bounds(20, 30)));
    assert_eq!(windows.place(EventTime(5), LatePolicy::Drop), Placement::DroppedLate);
    assert_eq!(joined(&windows, 25), Placement::Period(bounds(20, 30)));
    assert_eq!(joined(&windows, 15), Placement::Period(bounds(10, 20)));
}

#[test]
fn a_period_that_never_existed_is_closed_by_a_later_closing() {
    let windows = Windows::new(10, &[period(20, 30, PeriodState::Sealed)]);
    assert_eq!(joined(&windows, 5), Placement::LateInto(bounds(30, 40)));
}

#[test]
fn without_an_open_period_a_late_frame_makes_the_next_one() {
    for state in [PeriodState::Sealed, PeriodState::Merged, PeriodState::Expired] {
        let windows = Windows::new(10, &[period(0, 10, state)]);
        assert_eq!(joined(&windows, 5), Placement::LateInto(bounds(10, 20)));
    }
}

#[test]
fn another_length_takes_effect_after_the_last_period() {
    let windows = Windows::new(7, &[period(10, 20, PeriodState::Open)]);
    assert_eq!(joined(&windows, 13), Placement::Period(bounds(10, 20)));
    assert_eq!(joined(&windows, 20), Placement::Period(bounds(20, 21)));
    assert_eq!(joined(&windows, 22), Placement::Period(bounds(21, 28)));
    assert_eq!(joined(&windows, 9), Placement::Period(bounds(7, 10)));
}

#[test]
fn a_frame_from_the_future_counts_as_now() {
    let now = EventTime(100);
    assert_eq!(raise_by_frame(None, EventTime(150), now), Some(now));
    let raised = raise_by_frame(Some(EventTime(50)), EventTime(40), now);
    assert_eq!(raised, Some(EventTime(50)));
    let stated = raise_by_punctuation(raised, EventTime(150));
    assert_eq!(stated, Some(EventTime(150)));
}

const WALL: IdlePolicy = IdlePolicy { mode: IdleMode::WallClock, timeout_ms: 10, report_ttl_ms: 5 };
const HOLD: IdlePolicy = IdlePolicy { mode: IdleMode::Hold, ..WALL };

fn at(position: Option<i64>, watermark: Option<i64>, report: Option<(i64, i64)>) -> PositionRecord {
    PositionRecord {
        partition: TopicPartition { topic: "t".into(), topic_id: TopicId("g1".into()), partition: 0 },
        position,
        watermark: watermark.map(EventTime),
        caught_up: report.map(|(answered, quiet)| CaughtUp {
            answered_at: EventTime(answered),
            quiet_since: EventTime(quiet),
        }),
    }
}

#[test]
fn the_streams_watermark_follows_its_truth_table() {
    let unread = at(None, None, None);
    let fresh = at(Some(0), None, None);
    let busy = at(Some(5), Some(700), None);
    let slow = at(Some(5), Some(400), None);
    let idle = at(Some(5), Some(300), Some((1000, 990)));
    let idle_empty = at(Some(0), None, Some((998, 900)));
    let idle_ahead = at(Some(5), Some(995), Some((1000, 900)));
    let not_yet_quiet = at(Some(5), Some(300), Some((1000, 991)));
    let stale = at(Some(5), Some(300), Some((994, 900)));
    let now = EventTime(1000);
    // (name, partitions, watermark by the wall clock, watermark with hold)
    let table: Vec<(&str, Vec<&PositionRecord>, Option<i64>, Option<i64>)> = vec![
        ("no partition", vec![], None, None),
        ("unread holds back", vec![&busy, &unread], None, None),
        ("unread holds back the idle", vec![&idle, &unread], None, None),
        ("nothing vouched for yet holds back", vec![&busy, &fresh], None, None),
        ("smallest of the busy", vec![&busy, &slow], Some(400), Some(400)),
        ("idle is left out", vec![&busy, &idle], Some(700), Some(700)),
        ("idle empty is left out", vec![&busy, &idle_empty], Some(700), Some(700)),
        ("not quiet long enough holds", vec![&busy, &not_yet_quiet], Some(300), Some(300)),
        ("a stale report holds", vec![&busy, &stale], Some(300), Some(300)),
        ("a stale report alone holds", vec![&stale], Some(300), Some(300)),
        ("all idle: the clock counts", vec![&idle], Some(990), Some(300)),
        ("all idle: the smallest answer", vec![&idle, &idle_empty], Some(988), None),
        ("all idle: a larger watermark stays", vec![&idle_ahead], Some(995), Some(995)),
    ];
    for (name, partitions, wall, hold) in table {
        let partitions: Vec<_> = partitions.into_iter().cloned().collect();
        let by = |policy| stream_watermark(&partitions, now, policy).map(EventTime::as_ms);
        assert_eq!(by(WALL), wall, "{name}");
        assert_eq!(by(HOLD), hold, "{name}, hold");
    }
}

fn any_periods() -> impl Strategy<Value = Vec<PeriodRecord>> {
    // Disjoint spans in order, a prefix of them closed.
    (prop::collection::vec((0i64..30, 1i64..30), 0..8), 0usize..9, -50i64..50).prop_map(
        |(spans, closed, first)| {
            let mut at = first;
            let mut periods = Vec::new();
            for (index, (gap, length)) in spans.into_iter().enumerate() {
                let state = if index < closed { PeriodState::Sealed } else { PeriodState::Open };
                periods.push(period(at + gap, at + gap + length, state));
                at += gap + length;
            }
            periods
        },
    )
}

fn any_position() -> impl Strategy<Value = PositionRecord> {
    (
        prop::option::weighted(0.95, 0i64..9),
        prop::option::weighted(0.9, 0i64..1200),
        prop::option::of((980i64..1010, 900i64..1000)),
    )
        .prop_map(|(position, watermark, report)| at(position, watermark, report))
}

proptest! {
    #[test]
    fn a_placement_is_open_and_overlaps_no_other_period(
        periods in any_periods(), length in 1i64..40, captured in -100i64..400,
    ) {
        let windows = Windows::new(length, &periods);
        let own = match joined(&windows, captured) {
            Placement::Period(own) => {
                prop_assert!(own.id.start().0 <= captured && captured < own.end.0);
                own
            }
            Placement::LateInto(own) => {
                prop_assert!(captured < own.id.start().0);
                own
            }
            Placement::DroppedLate => unreachable!("late frames join"),
        };
        prop_assert!(own.id.start() < own.end);
        for known in &periods {
            if known.id == own.id {
                prop_assert_eq!(known.state, PeriodState::Open);
                prop_assert_eq!(known.end, own.end);
            } else {
                prop_assert!(own.end <= known.id.start() || known.end <= own.id.start());
            }
            if known.state != PeriodState::Open {
                prop_assert!(known.end <= own.id.start(), "earlier than a closed period");
            }
        }
    }

    #[test]
    fn the_streams_watermark_never_passes_a_partition_that_is_not_idle(
        positions in prop::collection::vec(any_position(), 1..6), hold in any::<bool>(),
    ) {
        let policy = if hold { HOLD } else { WALL };
        let now = EventTime(1000);
        if let Some(watermark) = stream_watermark(&positions, now, policy) {
            for record in &positions {
                prop_assert!(record.position.is_some());
                if idle_report(record, now, policy).is_none() {
                    prop_assert!(Some(watermark) <= record.watermark);
                }
            }
        }
    }

    #[test]
    fn a_frame_more_never_lowers_the_streams_watermark(
        positions in prop::collection::vec(any_position(), 1..6), captured in 0i64..1500,
    ) {
        // The first partition gets a frame, and loses no report: only its watermark moves.
        let now = EventTime(1000);
        let before = stream_watermark(&positions, now, WALL);
        let mut after = positions.clone();
        after[0].watermark = raise_by_frame(after[0].watermark, EventTime(captured), now);
        prop_assert!(stream_watermark(&after, now, WALL) >= before);
    }
}
