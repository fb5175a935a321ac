//! Positions, flushes, watermarks, topics.

use super::*;

async fn position_of(registry: &dyn Registry, partition: &TopicPartition) -> Option<i64> {
    registry.position(partition).await.unwrap().unwrap().position
}

pub async fn a_position_moves_only_from_where_it_is(registry: &dyn Registry) {
    let partition = partition(registry).await;
    registry.commit_flush(&flush(&partition, 0..10, &[(0, 10)])).await.unwrap();
    // A zombie that still stands at 0, and one that stands ahead.
    for stale in [flush(&partition, 0..5, &[(0, 5)]), flush(&partition, 15..20, &[(0, 5)])] {
        assert_err!(
            registry.commit_flush(&stale).await,
            RegistryError::PositionMoved { expected, found: Some(10), .. } if *expected == stale.offsets.start
        );
    }
    assert_eq!(position_of(registry, &partition).await, Some(10));
    assert_eq!(registry.period(id(0)).await.unwrap().frames, 10);
    let nobody = TopicPartition { partition: 7, ..partition };
    assert_err!(
        registry.commit_flush(&flush(&nobody, 0..1, &[])).await,
        RegistryError::PositionMoved { found: None, .. }
    );
}

pub async fn a_flush_committed_twice_fails_the_second_time(registry: &dyn Registry) {
    let partition = partition(registry).await;
    let flush = flush(&partition, 0..10, &[(0, 10)]);
    registry.commit_flush(&flush).await.unwrap();
    assert_err!(registry.commit_flush(&flush).await, RegistryError::PositionMoved { found: Some(10), .. });
    assert_eq!(paths(registry, 0).await.len(), 1);
}

pub async fn a_flush_is_all_or_nothing(registry: &dyn Registry) {
    let lease = with_sealed(registry, 1).await;
    let partition = partition(registry).await;
    let before = registry.position(&partition).await.unwrap();
    let mut flush = flush(&partition, 10..20, &[(1, 5), (0, 5)]);
    flush.watermark = Some(EventTime(77));
    assert_err!(registry.commit_flush(&flush).await, RegistryError::PeriodSealed { period } if *period == id(0));
    assert_eq!(registry.position(&partition).await.unwrap(), before);
    assert_err!(registry.period(id(1)).await, RegistryError::NotFound { .. });
    assert!(registry.seal(&lease, id(0), 1, period(1), NOW).await.unwrap().is_empty());
}

pub async fn a_flush_without_frames_moves_the_position(registry: &dyn Registry) {
    let partition = partition(registry).await;
    let mut empty = flush(&partition, 0..10, &[]);
    empty.watermark = Some(EventTime(5));
    registry.commit_flush(&empty).await.unwrap();
    // Nothing read, but the owner has something to say about time.
    let mut still = flush(&partition, 10..10, &[]);
    still.watermark = Some(EventTime(9));
    registry.commit_flush(&still).await.unwrap();
    let record = registry.position(&partition).await.unwrap().unwrap();
    assert_eq!((record.position, record.watermark), (Some(10), Some(EventTime(9))));
    assert!(registry.periods().await.unwrap().is_empty());
}

pub async fn a_start_is_recorded_once(registry: &dyn Registry) {
    let topic_id = registry.open_topic("frames", "cluster").await.unwrap();
    let partition = TopicPartition { topic: "frames".into(), topic_id, partition: 3 };
    assert_eq!(registry.position(&partition).await.unwrap(), None);
    registry.register_partitions(std::slice::from_ref(&partition)).await.unwrap();
    assert_eq!(position_of(registry, &partition).await, None);
    assert!(registry.live_objects().await.unwrap().positions.is_empty());
    assert_eq!(registry.start_position(&partition, 40).await.unwrap(), 40);
    assert_eq!(registry.start_position(&partition, 70).await.unwrap(), 40);
    registry.register_partitions(std::slice::from_ref(&partition)).await.unwrap();
    assert_eq!(position_of(registry, &partition).await, Some(40));
    let unknown = TopicPartition { topic: "other".into(), ..partition };
    assert_err!(registry.start_position(&unknown, 0).await, RegistryError::NotFound { .. });
    assert_err!(registry.register_partitions(&[unknown]).await, RegistryError::NotFound { .. });
}

pub async fn an_operator_may_set_a_position(registry: &dyn Registry) {
    let partition = partition(registry).await;
    let first = flush(&partition, 0..10, &[(0, 10)]);
    registry.commit_flush(&first).await.unwrap();
    registry.reset_position(&partition, 0).await.unwrap();
    assert_eq!(position_of(registry, &partition).await, Some(0));
    // The same flush again is the same object: its frames are not counted twice.
    registry.commit_flush(&first).await.unwrap();
    assert_eq!(registry.period(id(0)).await.unwrap().frames, 10);
    let nobody = TopicPartition { partition: 7, ..partition };
    assert_err!(registry.reset_position(&nobody, 0).await, RegistryError::NotFound { .. });
}

pub async fn offsets_that_were_lost_lie_inside_their_flush(registry: &dyn Registry) {
    let partition = partition(registry).await;
    let mut gap = flush(&partition, 0..50, &[]);
    gap.lost = Some(OffsetRange { start: 0, end: 60 });
    assert_err!(registry.commit_flush(&gap).await, RegistryError::WrongState { .. });
    gap.lost = Some(OffsetRange { start: 0, end: 50 });
    registry.commit_flush(&gap).await.unwrap();
    assert_eq!(position_of(registry, &partition).await, Some(50));
}

pub async fn a_malformed_flush_is_refused(registry: &dyn Registry) {
    let partition = partition(registry).await;
    let good = flush(&partition, 0..10, &[(0, 10)]);
    let mut backwards = good.clone();
    backwards.offsets.end = -1;
    let mut foreign = good.clone();
    foreign.segments[0].partition.partition = 1;
    let mut other_range = good.clone();
    other_range.segments[0].flush.end = 11;
    let mut twice = good.clone();
    twice.segments.push(good.segments[0].clone());
    for flush in [backwards, foreign, other_range, twice] {
        assert_err!(registry.commit_flush(&flush).await, RegistryError::WrongState { .. });
    }
    let mut no_bounds = good.clone();
    no_bounds.periods.clear();
    assert_err!(registry.commit_flush(&no_bounds).await, RegistryError::NotFound { .. });
    let mut no_frames = good;
    no_frames.segments[0].frames = 0;
    assert_err!(registry.commit_flush(&no_frames).await, RegistryError::Refused(_));
    assert_eq!(position_of(registry, &partition).await, Some(0));
}

pub async fn a_watermark_never_falls(registry: &dyn Registry) {
    let partition = partition(registry).await;
    for (n, (given, expected)) in
        [(None, None), (Some(7), Some(7)), (Some(3), Some(7)), (None, Some(7))].into_iter().enumerate()
    {
        let start = n as i64;
        let mut flush = flush(&partition, start..start + 1, &[]);
        flush.watermark = given.map(EventTime);
        registry.commit_flush(&flush).await.unwrap();
        let record = registry.position(&partition).await.unwrap().unwrap();
        assert_eq!(record.watermark, expected.map(EventTime));
    }
    assert_eq!(registry.watermark().await.unwrap(), None);
    for (given, expected) in [(-5, -5), (10, 10), (4, 10)] {
        registry.advance_watermark(EventTime(given)).await.unwrap();
        assert_eq!(registry.watermark().await.unwrap(), Some(EventTime(expected)));
    }
}

const REPORT: CaughtUp = CaughtUp { answered_at: EventTime(20), quiet_since: EventTime(10) };

pub async fn a_flush_clears_the_report_of_being_caught_up(registry: &dyn Registry) {
    let partition = partition(registry).await;
    let reported = async || registry.position(&partition).await.unwrap().unwrap().caught_up;
    registry.report_caught_up(&partition, 0, Some(REPORT)).await.unwrap();
    assert_eq!(reported().await, Some(REPORT));
    registry.commit_flush(&flush(&partition, 0..10, &[])).await.unwrap();
    assert_eq!(reported().await, None);
    registry.report_caught_up(&partition, 10, Some(REPORT)).await.unwrap();
    registry.report_caught_up(&partition, 10, None).await.unwrap();
    assert_eq!(reported().await, None);
    registry.report_caught_up(&partition, 10, Some(REPORT)).await.unwrap();
    registry.reset_position(&partition, 0).await.unwrap();
    assert_eq!(reported().await, None);
}

pub async fn only_the_present_position_can_be_reported_caught_up(registry: &dyn Registry) {
    let partition = partition(registry).await;
    registry.commit_flush(&flush(&partition, 0..10, &[])).await.unwrap();
    assert_err!(
        registry.report_caught_up(&partition, 0, Some(REPORT)).await,
        RegistryError::PositionMoved { expected: 0, found: Some(10), .. }
    );
    assert_eq!(registry.position(&partition).await.unwrap().unwrap().caught_up, None);
}

pub async fn a_topic_made_anew_is_another_topic(registry: &dyn Registry) {
    let old = partition(registry).await;
    registry.commit_flush(&flush(&old, 0..10, &[(0, 10)])).await.unwrap();
    assert_eq!(registry.open_topic("frames", "cluster").await.unwrap(), old.topic_id);
    let other = registry.open_topic("others", "cluster").await.unwrap();
    assert_ne!(other, old.topic_id);

    let new_id = registry.open_topic("frames", "another cluster").await.unwrap();
    assert_ne!(new_id, old.topic_id);
    assert_ne!(new_id, other);
    let new = TopicPartition { topic_id: new_id, ..old.clone() };
    registry.register_partitions(std::slice::from_ref(&new)).await.unwrap();
    let current: Vec<_> =
        registry.positions().await.unwrap().into_iter().map(|r| (r.partition, r.position)).collect();
    assert_eq!(current, [(new.clone(), None)], "only the present incarnation counts for the watermark");

    // The same offsets are other frames now, and the sweep can judge the objects of both incarnations.
    registry.start_position(&new, 0).await.unwrap();
    registry.commit_flush(&flush(&new, 0..4, &[(0, 4)])).await.unwrap();
    let live = registry.live_objects().await.unwrap();
    assert_eq!(live.paths.len(), 2);
    let expected = [((old.topic_id.clone(), 0), 10), ((new.topic_id.clone(), 0), 4)];
    assert_eq!(live.positions, expected.into());
    // Going back to the first identity is once more another topic.
    let third = registry.open_topic("frames", "cluster").await.unwrap();
    assert!(third != old.topic_id && third != new.topic_id);
}
