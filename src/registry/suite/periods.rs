//! Making, sealing, merging and expiring periods.

use super::*;

pub async fn a_flush_makes_its_periods(registry: &dyn Registry) {
    let partition = partition(registry).await;
    registry.commit_flush(&flush(&partition, 0..10, &[(3, 4), (1, 6)])).await.unwrap();
    let mut second = flush(&partition, 10..20, &[(1, 10)]);
    second.periods.push(period(8));
    registry.commit_flush(&second).await.unwrap();
    let records = registry.periods().await.unwrap();
    let seen: Vec<_> = records.iter().map(|r| (r.id, r.end, r.state, r.frames, r.bytes)).collect();
    let open = PeriodState::Open;
    assert_eq!(
        seen,
        [(id(1), period(1).end, open, 16, 200), (id(3), period(3).end, open, 4, 100)],
        "a period without a frame is not made"
    );
    assert_eq!(records[0], registry.period(id(1)).await.unwrap());
    assert_err!(registry.period(id(2)).await, RegistryError::NotFound { .. });
    let starts: Vec<_> = registry.segments(id(1)).await.unwrap().iter().map(|s| s.flush.start).collect();
    assert_eq!(starts, [0, 10]);
}

pub async fn a_period_sealed_meanwhile_refuses_the_flush(registry: &dyn Registry) {
    let lease = with_sealed(registry, 1).await;
    let partition = partition(registry).await;
    let before = registry.segments(id(0)).await.unwrap();
    let mut late = flush(&partition, 10..15, &[(0, 5)]);
    assert_err!(registry.commit_flush(&late).await, RegistryError::PeriodSealed { period } if *period == id(0));
    late.periods.clear();
    assert_err!(registry.commit_flush(&late).await, RegistryError::PeriodSealed { .. });
    // The frames are late now: they join the oldest open period.
    registry.commit_flush(&flush(&partition, 10..15, &[(1, 5)])).await.unwrap();
    registry.seal(&lease, id(1), 1, period(2), NOW).await.unwrap();
    assert_eq!(registry.segments(id(0)).await.unwrap(), before);
}

pub async fn no_period_is_made_before_a_sealed_one(registry: &dyn Registry) {
    let partition = partition(registry).await;
    registry.commit_flush(&flush(&partition, 0..10, &[(5, 10)])).await.unwrap();
    let lease = lease(registry).await;
    registry.seal(&lease, id(5), 1, period(6), NOW).await.unwrap();
    let early = flush(&partition, 10..20, &[(3, 10)]);
    assert_err!(registry.commit_flush(&early).await, RegistryError::PeriodSealed { period } if *period == id(3));
    registry.commit_flush(&flush(&partition, 10..20, &[(6, 10)])).await.unwrap();
}

pub async fn periods_do_not_overlap(registry: &dyn Registry) {
    let partition = partition(registry).await;
    registry.commit_flush(&flush(&partition, 0..10, &[(2, 10)])).await.unwrap();
    let mut longer = flush(&partition, 10..20, &[(2, 10)]);
    longer.periods[0].end = period(3).end;
    assert_err!(registry.commit_flush(&longer).await, RegistryError::WrongState { .. });
    let mut across = flush(&partition, 10..20, &[(1, 10)]);
    across.periods[0].end = period(1).end.plus_ms(1);
    assert_err!(registry.commit_flush(&across).await, RegistryError::WrongState { .. });
    across.periods[0].end = period(1).end;
    registry.commit_flush(&across).await.unwrap();
}

pub async fn sealing_closes_every_earlier_period_in_order(registry: &dyn Registry) {
    let partition = partition(registry).await;
    registry.commit_flush(&flush(&partition, 0..40, &[(4, 10), (2, 10), (1, 10), (9, 10)])).await.unwrap();
    let lease = lease(registry).await;
    let outcomes = registry.seal(&lease, id(4), 10, period(5), NOW).await.unwrap();
    let sealed = SealOutcome::Sealed { frames: 10 };
    assert_eq!(outcomes, [(id(1), sealed.clone()), (id(2), sealed.clone()), (id(4), sealed)]);
    assert_eq!(registry.period(id(4)).await.unwrap().sealed_at, Some(NOW));
    assert_eq!(state(registry, 9).await, PeriodState::Open);
}

pub async fn sealing_twice_changes_nothing(registry: &dyn Registry) {
    let lease = with_sealed(registry, 2).await;
    let before = registry.periods().await.unwrap();
    assert!(registry.seal(&lease, id(1), 1, period(2), NOW.plus_ms(9)).await.unwrap().is_empty());
    assert_eq!(registry.periods().await.unwrap(), before);
    assert_err!(registry.seal(&lease, id(7), 1, period(8), NOW).await, RegistryError::NotFound { .. });
}

pub async fn a_small_period_gives_its_frames_to_the_oldest_open_one(registry: &dyn Registry) {
    let partition = partition(registry).await;
    registry.commit_flush(&flush(&partition, 0..30, &[(1, 3), (4, 20), (5, 7)])).await.unwrap();
    let lease = lease(registry).await;
    let outcomes = registry.seal(&lease, id(1), 10, period(2), NOW).await.unwrap();
    assert_eq!(outcomes, [(id(1), SealOutcome::Merged { into: id(4), frames: 3 })]);
    let merged = registry.period(id(1)).await.unwrap();
    assert_eq!((merged.state, merged.merged_into), (PeriodState::Merged, Some(id(4))));
    assert_eq!((merged.frames, merged.bytes), (3, 100), "what it had stays known");
    let target = registry.period(id(4)).await.unwrap();
    assert_eq!((target.state, target.frames), (PeriodState::Open, 23));
    assert!(paths(registry, 1).await.is_empty());
    assert_eq!(registry.live_objects().await.unwrap().paths.len(), 3);
    assert!(registry.segments(id(4)).await.unwrap().iter().all(|segment| segment.period == id(4)));
    // A merged period is closed: what still comes for it is late.
    let late = flush(&partition, 30..31, &[(1, 1)]);
    assert_err!(registry.commit_flush(&late).await, RegistryError::PeriodSealed { .. });
}

/// Closed one by one or all at once, the frames end in the same places.
pub async fn small_periods_merge_along_a_chain(registry: &dyn Registry) {
    let partition = partition(registry).await;
    registry
        .commit_flush(&flush(&partition, 0..30, &[(1, 4), (2, 4), (3, 4), (4, 4), (6, 4)]))
        .await
        .unwrap();
    let lease = lease(registry).await;
    let outcomes = registry.seal(&lease, id(4), 12, period(5), NOW).await.unwrap();
    let merged = |into, frames| SealOutcome::Merged { into: id(into), frames };
    assert_eq!(
        outcomes,
        [
            (id(1), merged(2, 4)),
            (id(2), merged(3, 8)),
            (id(3), SealOutcome::Sealed { frames: 12 }),
            (id(4), merged(6, 4)),
        ]
    );
    assert_eq!(paths(registry, 3).await.len(), 3);
    assert_eq!(paths(registry, 6).await.len(), 2);
    assert_eq!(registry.live_objects().await.unwrap().paths.len(), 5);
}

pub async fn a_small_period_without_a_successor_makes_one(registry: &dyn Registry) {
    let partition = partition(registry).await;
    registry.commit_flush(&flush(&partition, 0..3, &[(1, 3)])).await.unwrap();
    let lease = lease(registry).await;
    assert_err!(registry.seal(&lease, id(1), 10, period(0), NOW).await, RegistryError::WrongState { .. });
    assert_err!(registry.seal(&lease, id(1), 10, period(1), NOW).await, RegistryError::WrongState { .. });
    let outcomes = registry.seal(&lease, id(1), 10, period(2), NOW).await.unwrap();
    assert_eq!(outcomes, [(id(1), SealOutcome::Merged { into: id(2), frames: 3 })]);
    let next = registry.period(id(2)).await.unwrap();
    assert_eq!((next.state, next.end, next.frames), (PeriodState::Open, period(2).end, 3));
}

pub async fn an_operator_may_ask_for_an_open_period_to_be_closed(registry: &dyn Registry) {
    let lease = with_sealed(registry, 1).await;
    let partition = partition(registry).await;
    registry.commit_flush(&flush(&partition, 10..20, &[(1, 10)])).await.unwrap();
    registry.request_close(id(1)).await.unwrap();
    registry.request_close(id(1)).await.unwrap();
    let record = registry.period(id(1)).await.unwrap();
    assert!(record.close_requested && record.state == PeriodState::Open);
    assert_err!(registry.request_close(id(0)).await, RegistryError::WrongState { .. });
    assert_err!(registry.request_close(id(9)).await, RegistryError::NotFound { .. });
    registry.seal(&lease, id(1), 1, period(2), NOW).await.unwrap();
}

pub async fn expiry_returns_the_objects_and_forgets_them(registry: &dyn Registry) {
    let lease = with_sealed(registry, 2).await;
    publish(registry, &lease, 0).await;
    let objects = paths(registry, 0).await;
    let expired = registry.expire(&lease, id(0), NOW.plus_ms(5)).await.unwrap();
    assert_eq!(expired, objects.iter().map(|path| file(path)).collect::<Vec<_>>());
    let record = registry.period(id(0)).await.unwrap();
    assert_eq!((record.state, record.frames, record.bytes), (PeriodState::Expired, 10, 100));
    assert_eq!((record.version, record.settled_at), (Some(Version(1)), Some(NOW)));
    assert!(paths(registry, 0).await.is_empty());
    let live = registry.live_objects().await.unwrap();
    assert_eq!(live.paths, paths(registry, 1).await.into_iter().collect());
    assert!(registry.expire(&lease, id(0), NOW).await.unwrap().is_empty());
}

pub async fn only_a_settled_period_expires(registry: &dyn Registry) {
    let lease = with_sealed(registry, 1).await;
    assert_err!(registry.expire(&lease, id(0), NOW).await, RegistryError::WrongState { .. });
    registry.begin_attempt(&lease, id(0), "1.0", Lineage::Continued).await.unwrap();
    assert_err!(registry.expire(&lease, id(0), NOW).await, RegistryError::WrongState { .. });
    registry.settle_unpublished(&lease, id(0), PeriodState::Failed, "broken", NOW).await.unwrap();
    assert_eq!(registry.expire(&lease, id(0), NOW).await.unwrap().len(), 1);
    assert_eq!(registry.period(id(0)).await.unwrap().reason.as_deref(), Some("broken"));
    assert_err!(registry.retry(id(0)).await, RegistryError::WrongState { .. });
}
