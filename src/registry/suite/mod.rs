//! What every registry must do, as tests over the trait. A backend runs all of them by one line,
//! `registry_suite!(open)`, where `open` is an async function that gives an empty, migrated registry.

mod flushes;
mod learning;
mod model;
mod periods;

pub use flushes::*;
pub use learning::*;
pub use model::*;
pub use periods::*;

use super::*;
use crate::types::Sha256;

/// One test for each fact. `$open` gives a fresh registry and whatever must live as long as it.
macro_rules! registry_suite {
    ($open:expr) => {
        $crate::registry::suite::registry_suite!(@tests $open;
            a_position_moves_only_from_where_it_is
            a_flush_committed_twice_fails_the_second_time
            a_flush_is_all_or_nothing
            a_flush_without_frames_moves_the_position
            a_start_is_recorded_once
            an_operator_may_set_a_position
            offsets_that_were_lost_lie_inside_their_flush
            a_malformed_flush_is_refused
            a_watermark_never_falls
            a_flush_clears_the_report_of_being_caught_up
            only_the_present_position_can_be_reported_caught_up
            a_topic_made_anew_is_another_topic
            a_flush_makes_its_periods
            a_period_sealed_meanwhile_refuses_the_flush
            no_period_is_made_before_a_sealed_one
            periods_do_not_overlap
            sealing_closes_every_earlier_period_in_order
            sealing_twice_changes_nothing
            a_small_period_gives_its_frames_to_the_oldest_open_one
            small_periods_merge_along_a_chain
            a_small_period_without_a_successor_makes_one
            an_operator_may_ask_for_an_open_period_to_be_closed
            expiry_returns_the_objects_and_forgets_them
            only_a_settled_period_expires
            periods_are_trained_in_order
            an_attempt_keeps_its_program_and_its_parent
            starts_and_failures_are_counted
            a_period_goes_only_from_state_to_state
            every_method_of_the_learner_is_fenced_after_a_takeover
            a_version_number_is_never_given_twice
            publishing_shows_the_version_and_moves_latest
            publishing_twice_changes_nothing
            latest_moves_only_from_the_parent
            a_replaced_attempt_is_not_published
            an_alias_names_only_a_visible_version
            retrying_is_for_the_last_period_trained
            a_score_that_is_not_a_number_is_kept
            a_lease_has_one_holder_at_a_time
            a_lease_that_ran_out_holds_until_somebody_takes_it
            every_offset_is_in_exactly_one_live_segment
        );
    };
    (@tests $open:expr; $($name:ident)*) => {$(
        #[tokio::test]
        async fn $name() {
            let (_guard, registry) = $open().await;
            $crate::registry::suite::$name(&registry).await;
        }
    )*};
}
pub(crate) use registry_suite;

pub const LENGTH_MS: i64 = 1000;
pub const NOW: EventTime = EventTime(5_000_000);
pub const TTL_MS: i64 = 60_000;

/// The `n`th period: [1000 n, 1000 n + 1000).
pub fn period(n: i64) -> PeriodBounds {
    let start = EventTime(n * LENGTH_MS);
    PeriodBounds { id: PeriodId(start), end: start.plus_ms(LENGTH_MS) }
}

pub fn id(n: i64) -> PeriodId {
    period(n).id
}

pub fn file(path: &str) -> FileRef {
    FileRef { path: path.to_owned(), sha256: Sha256::of(path.as_bytes()), bytes: 100 }
}

/// Partition 0 of a topic that is known, at position 0.
pub async fn partition(registry: &dyn Registry) -> TopicPartition {
    let topic_id = registry.open_topic("frames", "cluster").await.unwrap();
    let partition = TopicPartition { topic: "frames".into(), topic_id, partition: 0 };
    registry.register_partitions(std::slice::from_ref(&partition)).await.unwrap();
    registry.start_position(&partition, 0).await.unwrap();
    partition
}

/// A flush of `offsets` with frames for the periods, as (period number, frames).
pub fn flush(partition: &TopicPartition, offsets: std::ops::Range<i64>, frames: &[(i64, u64)]) -> Flush {
    let offsets = OffsetRange { start: offsets.start, end: offsets.end };
    let segment = |&(n, frames): &(i64, u64)| SegmentRecord {
        period: id(n),
        partition: partition.clone(),
        flush: offsets,
        file: file(&format!("segments/{}/{}/{}/{offsets}", id(n), partition.topic_id, partition.partition)),
        frames,
        captured_min: id(n).start(),
        captured_max: id(n).start().plus_ms(1),
    };
    Flush {
        partition: partition.clone(),
        offsets,
        watermark: None,
        segments: frames.iter().map(segment).collect(),
        periods: frames.iter().map(|(n, _)| period(*n)).collect(),
        lost: None,
    }
}

pub async fn lease(registry: &dyn Registry) -> Lease {
    registry.acquire_lease("learner", "me", TTL_MS, NOW).await.unwrap().unwrap()
}

pub async fn state(registry: &dyn Registry, n: i64) -> PeriodState {
    registry.period(id(n)).await.unwrap().state
}

pub async fn paths(registry: &dyn Registry, n: i64) -> Vec<String> {
    registry.segments(id(n)).await.unwrap().into_iter().map(|segment| segment.file.path).collect()
}

/// A registry with periods 0 .. `sealed` of 10 frames each, all sealed.
pub async fn with_sealed(registry: &dyn Registry, sealed: i64) -> Lease {
    let partition = partition(registry).await;
    for n in 0..sealed {
        registry.commit_flush(&flush(&partition, n * 10..n * 10 + 10, &[(n, 10)])).await.unwrap();
    }
    let lease = lease(registry).await;
    registry.seal(&lease, id(sealed - 1), 1, period(sealed), NOW).await.unwrap();
    lease
}

/// Trains and evaluates period `n` and reserves its version.
pub async fn reserve(registry: &dyn Registry, lease: &Lease, n: i64) -> Version {
    let attempt = registry.begin_attempt(lease, id(n), "1.0", Lineage::Continued).await.unwrap();
    registry.begin_start(lease, id(n), attempt.number).await.unwrap();
    registry.set_evaluating(lease, id(n)).await.unwrap();
    registry
        .reserve_version(lease, id(n), attempt.number, &[file("b"), file("a")], NOW)
        .await
        .unwrap()
        .version
}

pub fn publication(version: Version) -> Publication {
    Publication {
        version,
        manifest: format!("{{\"version\":\"{version}\"}}"),
        files: vec![file("b"), file("a"), file("manifest.json")],
        scores: Vec::new(),
        probe_set: None,
    }
}

pub async fn publish(registry: &dyn Registry, lease: &Lease, n: i64) -> Version {
    let version = reserve(registry, lease, n).await;
    registry.publish(lease, &publication(version), NOW).await.unwrap();
    version
}

/// Asserts that an expression is `Err` of a pattern, and says what it was otherwise.
macro_rules! assert_err {
    ($result:expr, $pattern:pat $(if $guard:expr)?) => {{
        let result = $result;
        assert!(matches!(&result, Err($pattern) $(if $guard)?), "{result:?}");
    }};
}
pub(crate) use assert_err;
