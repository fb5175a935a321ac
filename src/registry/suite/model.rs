//! Random interleavings of two consumers, seals and merges against what must always hold: the flushes behind the
//! live segments tile the offsets read, no frame is lost or doubled, and a sealed period stays as it was.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::*;

/// Histories tried on one registry, each on a partition of its own.
const HISTORIES: i32 = 24;

#[derive(Debug, Clone)]
enum Event {
    /// The consumer reads on by `offsets` and flushes them as frames of the periods that lie `ahead` of the oldest
    /// that it believes open, from where it believes the position to be.
    Flush { consumer: usize, offsets: i64, ahead: Vec<i64> },
    /// The consumer reads position and periods again, as after a rebalance.
    Refresh { consumer: usize },
    /// The learner closes the oldest open period, and `more` after it.
    Seal { more: i64, min_frames: u64 },
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        5 => (0..2usize, 1..8i64, proptest::collection::btree_set(0..3i64, 1..3))
            .prop_map(|(consumer, offsets, ahead)| Event::Flush { consumer, offsets, ahead: ahead.into_iter().collect() }),
        2 => (0..2usize).prop_map(|consumer| Event::Refresh { consumer }),
        1 => (0..3i64, 0..30u64).prop_map(|(more, min_frames)| Event::Seal { more, min_frames }),
    ];
    proptest::collection::vec(event, 1..40)
}

/// What one consumer believes.
#[derive(Debug, Clone, Copy, Default)]
struct Belief {
    position: i64,
    oldest_open: i64,
}

/// What has truly been committed.
#[derive(Debug, Default)]
struct Truth {
    position: i64,
    frames: u64,
    refused: [usize; 2],
}

/// Histories share the registry's periods, so that a later one begins among sealed and merged ones.
pub async fn every_offset_is_in_exactly_one_live_segment(registry: &dyn Registry) {
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let topic_id = registry.open_topic("frames", "cluster").await.unwrap();
    let lease = lease(registry).await;
    let mut closed = BTreeMap::new();
    let mut refused = [0, 0];
    for number in 0..HISTORIES {
        let partition =
            TopicPartition { topic: "frames".into(), topic_id: topic_id.clone(), partition: number };
        registry.start_position(&partition, 0).await.unwrap();
        let history = events().new_tree(&mut runner).unwrap().current();
        let truth = run(registry, &lease, &partition, &history, &mut closed).await;
        check(registry, &partition, &truth, &history).await;
        refused = [refused[0] + truth.refused[0], refused[1] + truth.refused[1]];
    }
    assert!(refused[0] > 10 && refused[1] > 10, "the histories never raced: {refused:?}");
}

async fn run(
    registry: &dyn Registry,
    lease: &Lease,
    partition: &TopicPartition,
    history: &[Event],
    closed: &mut BTreeMap<PeriodId, Vec<SegmentRecord>>,
) -> Truth {
    let mut truth = Truth::default();
    let mut beliefs = [Belief::default(); 2];
    for event in history {
        match event {
            Event::Refresh { consumer } => beliefs[*consumer] = refresh(registry, &truth).await,
            Event::Flush { consumer, offsets, ahead } => {
                let belief = beliefs[*consumer];
                let (start, end) = (belief.position, belief.position + offsets);
                let frames: Vec<_> =
                    ahead.iter().map(|n| (belief.oldest_open + n, *offsets as u64)).collect();
                match registry.commit_flush(&flush(partition, start..end, &frames)).await {
                    Ok(()) => {
                        assert_eq!(start, truth.position, "a stale flush was committed: {history:?}");
                        truth.position = end;
                        truth.frames += frames.iter().map(|(_, frames)| frames).sum::<u64>();
                        beliefs[*consumer].position = end;
                    }
                    Err(RegistryError::PositionMoved { .. }) => {
                        assert_ne!(start, truth.position, "{history:?}");
                        truth.refused[0] += 1;
                        beliefs[*consumer] = refresh(registry, &truth).await;
                    }
                    Err(RegistryError::PeriodSealed { .. }) => {
                        truth.refused[1] += 1;
                        beliefs[*consumer].oldest_open = refresh(registry, &truth).await.oldest_open;
                    }
                    Err(error) => panic!("{error}: {history:?}"),
                }
            }
            Event::Seal { more, min_frames } => seal(registry, lease, *more, *min_frames, closed).await,
        }
    }
    truth
}

/// The truth, as a consumer reads it.
async fn refresh(registry: &dyn Registry, truth: &Truth) -> Belief {
    let periods = registry.periods().await.unwrap();
    let number = |record: &PeriodRecord| record.id.start().as_ms() / LENGTH_MS;
    let oldest_open = match periods.iter().find(|record| record.state == PeriodState::Open) {
        Some(record) => number(record),
        None => periods.last().map_or(0, |record| number(record) + 1),
    };
    Belief { position: truth.position, oldest_open }
}

async fn seal(
    registry: &dyn Registry,
    lease: &Lease,
    more: i64,
    min_frames: u64,
    closed: &mut BTreeMap<PeriodId, Vec<SegmentRecord>>,
) {
    let periods = registry.periods().await.unwrap();
    let open: Vec<_> = periods.iter().filter(|record| record.state == PeriodState::Open).collect();
    let Some(upto) = open.get(more as usize).or(open.last()) else { return };
    let next = PeriodBounds { id: PeriodId(upto.end), end: upto.end.plus_ms(LENGTH_MS) };
    for (period, _) in registry.seal(lease, upto.id, min_frames, next, NOW).await.unwrap() {
        closed.insert(period, registry.segments(period).await.unwrap());
    }
    for (period, segments) in closed {
        assert_eq!(
            registry.segments(*period).await.unwrap(),
            *segments,
            "{period} changed after it was closed"
        );
    }
    let states: Vec<_> =
        registry.periods().await.unwrap().iter().map(|r| r.state == PeriodState::Open).collect();
    assert!(states.is_sorted(), "an open period lies before a closed one");
}

/// The flushes of the partition's live segments tile [0, position), and their frames are those committed.
async fn check(registry: &dyn Registry, partition: &TopicPartition, truth: &Truth, history: &[Event]) {
    let mut flushes: BTreeMap<OffsetRange, Vec<String>> = BTreeMap::new();
    let mut frames = 0;
    for record in registry.periods().await.unwrap() {
        for segment in registry.segments(record.id).await.unwrap() {
            if segment.partition == *partition {
                frames += segment.frames;
                flushes.entry(segment.flush).or_default().push(segment.file.path);
            }
        }
    }
    let mut reached = 0;
    for range in flushes.keys() {
        assert_eq!(range.start, reached, "a gap or an overlap: {history:?}");
        reached = range.end;
    }
    assert_eq!((reached, frames), (truth.position, truth.frames), "{history:?}");
    let position = registry.position(partition).await.unwrap().unwrap().position;
    assert_eq!(position, Some(truth.position));
}
