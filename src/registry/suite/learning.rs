//! Attempts, versions, aliases, leases.

use super::*;

pub async fn periods_are_trained_in_order(registry: &dyn Registry) {
    let lease = with_sealed(registry, 2).await;
    assert_err!(
        registry.begin_attempt(&lease, id(1), "1.0", Lineage::Continued).await,
        RegistryError::WrongState { .. }
    );
    registry.begin_attempt(&lease, id(0), "1.0", Lineage::Continued).await.unwrap();
    assert_err!(
        registry.begin_attempt(&lease, id(1), "1.0", Lineage::Continued).await,
        RegistryError::WrongState { .. }
    );
    registry.settle_unpublished(&lease, id(0), PeriodState::Rejected, "collapsed", NOW).await.unwrap();
    registry.begin_attempt(&lease, id(1), "1.0", Lineage::Continued).await.unwrap();
    assert_eq!(state(registry, 1).await, PeriodState::Training);
}

pub async fn an_attempt_keeps_its_program_and_its_parent(registry: &dyn Registry) {
    let lease = with_sealed(registry, 2).await;
    let first = publish(registry, &lease, 0).await;
    let attempt = registry.begin_attempt(&lease, id(1), "1.0", Lineage::Continued).await.unwrap();
    assert_eq!((attempt.number, attempt.parent, attempt.start), (1, Some(first), 0));
    // The same program asks again after a crash; another one begins anew, from the same teacher.
    assert_eq!(registry.begin_attempt(&lease, id(1), "1.0", Lineage::Continued).await.unwrap(), attempt);
    registry.set_evaluating(&lease, id(1)).await.unwrap();
    assert_eq!(registry.begin_attempt(&lease, id(1), "1.0", Lineage::Continued).await.unwrap(), attempt);
    assert_eq!(state(registry, 1).await, PeriodState::Evaluating);
    let second = registry.begin_attempt(&lease, id(1), "2.0", Lineage::Continued).await.unwrap();
    assert_eq!((second.number, second.parent), (2, Some(first)));
    assert_eq!(state(registry, 1).await, PeriodState::Training);
    assert_eq!(registry.attempt(id(1), 1).await.unwrap(), attempt);
    assert_eq!(registry.period(id(1)).await.unwrap().attempt, 2);
    assert_err!(registry.attempt(id(1), 3).await, RegistryError::NotFound { .. });
}

pub async fn starts_and_failures_are_counted(registry: &dyn Registry) {
    let lease = with_sealed(registry, 1).await;
    registry.begin_attempt(&lease, id(0), "1.0", Lineage::Continued).await.unwrap();
    for start in 1..=3 {
        assert_eq!(registry.begin_start(&lease, id(0), 1).await.unwrap(), start);
    }
    for failures in 1..=2 {
        let reason = format!("failure {failures}");
        assert_eq!(registry.record_failure(&lease, id(0), 1, &reason).await.unwrap(), failures);
    }
    let record = registry.attempt(id(0), 1).await.unwrap();
    assert_eq!((record.start, record.failures), (3, 2));
    assert_eq!(record.last_failure.as_deref(), Some("failure 2"));
    registry.begin_attempt(&lease, id(0), "2.0", Lineage::Continued).await.unwrap();
    for result in [
        registry.begin_start(&lease, id(0), 1).await.map(|_| ()),
        registry.record_failure(&lease, id(0), 1, "late").await.map(|_| ()),
    ] {
        assert_err!(result, RegistryError::WrongState { .. });
    }
    assert_eq!(registry.begin_start(&lease, id(0), 2).await.unwrap(), 1);
}

pub async fn a_period_goes_only_from_state_to_state(registry: &dyn Registry) {
    let lease = with_sealed(registry, 1).await;
    assert_err!(registry.set_evaluating(&lease, id(0)).await, RegistryError::WrongState { .. });
    assert_err!(registry.begin_start(&lease, id(0), 1).await, RegistryError::WrongState { .. });
    let settle = async |state| registry.settle_unpublished(&lease, id(0), state, "why", NOW).await;
    assert_err!(settle(PeriodState::Failed).await, RegistryError::WrongState { .. });
    registry.begin_attempt(&lease, id(0), "1.0", Lineage::Continued).await.unwrap();
    assert_err!(registry.reserve_version(&lease, id(0), 1, &[], NOW).await, RegistryError::WrongState { .. });
    registry.set_evaluating(&lease, id(0)).await.unwrap();
    registry.set_evaluating(&lease, id(0)).await.unwrap();
    assert_err!(settle(PeriodState::Published).await, RegistryError::WrongState { .. });
    settle(PeriodState::Rejected).await.unwrap();
    settle(PeriodState::Rejected).await.unwrap();
    assert_err!(settle(PeriodState::Failed).await, RegistryError::WrongState { .. });
    let record = registry.period(id(0)).await.unwrap();
    assert_eq!((record.settled_at, record.reason.as_deref()), (Some(NOW), Some("why")));
    assert_err!(
        registry.begin_attempt(&lease, id(0), "1.0", Lineage::Continued).await,
        RegistryError::WrongState { .. }
    );
    assert_err!(registry.set_evaluating(&lease, id(0)).await, RegistryError::WrongState { .. });
}

pub async fn every_method_of_the_learner_is_fenced_after_a_takeover(registry: &dyn Registry) {
    let old = with_sealed(registry, 1).await;
    let version = reserve(registry, &old, 0).await;
    let new = registry.acquire_lease("learner", "other", TTL_MS, NOW.plus_ms(TTL_MS)).await.unwrap().unwrap();
    assert!(new.token > old.token);
    let before = registry.periods().await.unwrap();
    let failed = PeriodState::Failed;
    for result in [
        registry.seal(&old, id(0), 1, period(1), NOW).await.map(|_| ()),
        registry.begin_attempt(&old, id(0), "2.0", Lineage::Continued).await.map(|_| ()),
        registry.begin_start(&old, id(0), 1).await.map(|_| ()),
        registry.record_failure(&old, id(0), 1, "x").await.map(|_| ()),
        registry.set_evaluating(&old, id(0)).await,
        registry.settle_unpublished(&old, id(0), failed, "x", NOW).await,
        registry.reserve_version(&old, id(0), 1, &[], NOW).await.map(|_| ()),
        registry.publish(&old, &publication(version), NOW).await.map(|_| ()),
        registry.expire(&old, id(0), NOW).await.map(|_| ()),
        registry.renew_lease(&old, TTL_MS, NOW).await.map(|_| ()),
    ] {
        assert_err!(result, RegistryError::Fenced { token, .. } if *token == old.token);
    }
    registry.release_lease(&old).await.unwrap();
    assert_eq!(registry.periods().await.unwrap(), before);
    registry.publish(&new, &publication(version), NOW).await.unwrap();
}

pub async fn a_version_number_is_never_given_twice(registry: &dyn Registry) {
    let lease = with_sealed(registry, 2).await;
    let first = reserve(registry, &lease, 0).await;
    assert_eq!(first, Version(1));
    // The attempt keeps its number; the files given last count.
    let files = [file("c"), file("a")];
    // And the instant at which it was drawn.
    let later = EventTime(NOW.0 + 1);
    let again = registry.reserve_version(&lease, id(0), 1, &files, later).await.unwrap();
    assert_eq!(again, Reservation { version: first, reserved_at: NOW });
    assert_eq!(registry.version(first).await.unwrap().files, files);
    // Another attempt gets another one, and a rejected one's is not given again.
    registry.begin_attempt(&lease, id(0), "2.0", Lineage::Continued).await.unwrap();
    registry.set_evaluating(&lease, id(0)).await.unwrap();
    assert_eq!(registry.reserve_version(&lease, id(0), 2, &files, NOW).await.unwrap().version, Version(2));
    registry.settle_unpublished(&lease, id(0), PeriodState::Rejected, "no", NOW).await.unwrap();
    assert_eq!(publish(registry, &lease, 1).await, Version(3));
    let numbers: Vec<_> = registry.versions().await.unwrap().iter().map(|v| (v.version, v.visible)).collect();
    assert_eq!(numbers, [(Version(1), false), (Version(2), false), (Version(3), true)]);
    assert_err!(registry.version(Version(4)).await, RegistryError::NotFound { .. });
}

pub async fn publishing_shows_the_version_and_moves_latest(registry: &dyn Registry) {
    let lease = with_sealed(registry, 2).await;
    let version = reserve(registry, &lease, 0).await;
    let hidden = registry.version(version).await.unwrap();
    assert!(!hidden.visible && hidden.manifest.is_none() && registry.aliases().await.unwrap().is_empty());
    let score = ScoreRecord { version, period: id(0), measure: "knn".into(), value: 0.75 };
    let probe_set = ProbeSetRecord { period: id(0), file: file("probes/0"), frames: 64 };
    let publication = Publication {
        scores: vec![score.clone()],
        probe_set: Some(probe_set.clone()),
        ..publication(version)
    };
    assert_eq!(registry.publish(&lease, &publication, NOW).await.unwrap(), Published::LatestMoved);
    let record = registry.version(version).await.unwrap();
    assert_eq!(
        record,
        VersionRecord {
            version,
            period: id(0),
            attempt: 1,
            parent: None,
            visible: true,
            files: publication.files,
            manifest: Some(publication.manifest),
            published_at: Some(NOW),
        }
    );
    assert_eq!(registry.versions().await.unwrap(), [VersionRecord { manifest: None, ..record }]);
    assert_eq!(registry.aliases().await.unwrap(), [(LATEST.to_owned(), version)].into());
    assert_eq!(registry.scores().await.unwrap(), [score]);
    assert_eq!(registry.probe_sets().await.unwrap(), [probe_set]);
    let period = registry.period(id(0)).await.unwrap();
    assert_eq!(
        (period.state, period.version, period.settled_at),
        (PeriodState::Published, Some(version), Some(NOW))
    );
}

pub async fn publishing_twice_changes_nothing(registry: &dyn Registry) {
    let lease = with_sealed(registry, 2).await;
    let first = publish(registry, &lease, 0).await;
    let before = registry.version(first).await.unwrap();
    let again = Publication { manifest: "other".into(), ..publication(first) };
    assert_eq!(registry.publish(&lease, &again, NOW.plus_ms(1)).await.unwrap(), Published::LatestMoved);
    assert_eq!(registry.version(first).await.unwrap(), before);
    let second = publish(registry, &lease, 1).await;
    let stays = Published::LatestStays { latest: Some(second) };
    assert_eq!(registry.publish(&lease, &again, NOW).await.unwrap(), stays);
    let unknown = publication(Version(99));
    assert_err!(registry.publish(&lease, &unknown, NOW).await, RegistryError::NotFound { .. });
}

pub async fn latest_moves_only_from_the_parent(registry: &dyn Registry) {
    let lease = with_sealed(registry, 3).await;
    let first = publish(registry, &lease, 0).await;
    let second = publish(registry, &lease, 1).await;
    assert_eq!(registry.version(second).await.unwrap().parent, Some(first));
    let third = reserve(registry, &lease, 2).await;
    // An operator rolls back while the third is on its way.
    registry.set_alias(LATEST, first).await.unwrap();
    let stays = Published::LatestStays { latest: Some(first) };
    assert_eq!(registry.publish(&lease, &publication(third), NOW).await.unwrap(), stays);
    assert_eq!(registry.aliases().await.unwrap()[LATEST], first);
    assert!(registry.version(third).await.unwrap().visible);
    registry.set_alias(LATEST, third).await.unwrap();
    assert_eq!(registry.publish(&lease, &publication(third), NOW).await.unwrap(), Published::LatestMoved);
}

pub async fn a_replaced_attempt_is_not_published(registry: &dyn Registry) {
    let lease = with_sealed(registry, 1).await;
    let version = reserve(registry, &lease, 0).await;
    registry.begin_attempt(&lease, id(0), "2.0", Lineage::Continued).await.unwrap();
    registry.set_evaluating(&lease, id(0)).await.unwrap();
    let result = registry.publish(&lease, &publication(version), NOW).await;
    assert_err!(result, RegistryError::WrongState { .. });
    assert_err!(registry.reserve_version(&lease, id(0), 1, &[], NOW).await, RegistryError::WrongState { .. });
    assert!(!registry.version(version).await.unwrap().visible);
    assert_eq!(state(registry, 0).await, PeriodState::Evaluating);
}

pub async fn an_alias_names_only_a_visible_version(registry: &dyn Registry) {
    let lease = with_sealed(registry, 2).await;
    let first = publish(registry, &lease, 0).await;
    registry.set_alias("production", first).await.unwrap();
    let hidden = reserve(registry, &lease, 1).await;
    assert_err!(registry.set_alias("production", hidden).await, RegistryError::WrongState { .. });
    assert_err!(registry.set_alias("production", Version(9)).await, RegistryError::NotFound { .. });
    assert_eq!(registry.aliases().await.unwrap()["production"], first);
}

pub async fn retrying_is_for_the_last_period_trained(registry: &dyn Registry) {
    let lease = with_sealed(registry, 2).await;
    assert_err!(registry.retry(id(0)).await, RegistryError::WrongState { .. });
    registry.begin_attempt(&lease, id(0), "1.0", Lineage::Continued).await.unwrap();
    registry.settle_unpublished(&lease, id(0), PeriodState::Failed, "why", NOW).await.unwrap();
    registry.retry(id(0)).await.unwrap();
    let record = registry.period(id(0)).await.unwrap();
    assert_eq!((record.state, record.retries), (PeriodState::Sealed, 1));
    assert_eq!((record.reason, record.settled_at), (None, None));
    // A retry is a new attempt, by the same program too.
    assert_eq!(registry.begin_attempt(&lease, id(0), "1.0", Lineage::Continued).await.unwrap().number, 2);
    registry.settle_unpublished(&lease, id(0), PeriodState::Rejected, "why", NOW).await.unwrap();
    registry.begin_attempt(&lease, id(1), "1.0", Lineage::Continued).await.unwrap();
    assert_err!(registry.retry(id(0)).await, RegistryError::WrongState { .. });
    assert_err!(registry.retry(id(9)).await, RegistryError::NotFound { .. });
}

pub async fn a_score_that_is_not_a_number_is_kept(registry: &dyn Registry) {
    let lease = with_sealed(registry, 1).await;
    let version = reserve(registry, &lease, 0).await;
    let score = |measure: &str, value| ScoreRecord { version, period: id(0), measure: measure.into(), value };
    let scores = vec![score("cka", f64::NAN), score("knn", f64::INFINITY)];
    let publication = Publication { scores, ..publication(version) };
    registry.publish(&lease, &publication, NOW).await.unwrap();
    let values: Vec<f64> = registry.scores().await.unwrap().iter().map(|score| score.value).collect();
    assert!(values[0].is_nan() && values[1] == f64::INFINITY, "{values:?}");
}

pub async fn a_lease_has_one_holder_at_a_time(registry: &dyn Registry) {
    let acquire =
        async |holder, now| registry.acquire_lease("learner", holder, 100, EventTime(now)).await.unwrap();
    let first = acquire("a", 0).await.unwrap();
    assert_eq!((first.holder.as_str(), first.expires_at), ("a", EventTime(100)));
    assert_eq!(acquire("b", 99).await, None);
    let renewed = registry.renew_lease(&first, 100, EventTime(50)).await.unwrap();
    assert_eq!((renewed.token, renewed.expires_at), (first.token, EventTime(150)));
    assert_eq!(acquire("b", 149).await, None);
    // The same name once more is another process: what the earlier one holds is void.
    let again = acquire("a", 60).await.unwrap();
    assert!(again.token > first.token);
    assert_err!(registry.renew_lease(&renewed, 100, EventTime(60)).await, RegistryError::Fenced { .. });
    registry.release_lease(&renewed).await.unwrap();
    assert_eq!(acquire("b", 61).await, None, "a fenced holder frees nothing");
    registry.release_lease(&again).await.unwrap();
    assert_err!(registry.renew_lease(&again, 100, EventTime(62)).await, RegistryError::Fenced { .. });
    let taken = acquire("b", 62).await.unwrap();
    assert!(taken.token > again.token);
    assert!(registry.acquire_lease("another", "a", 100, EventTime(62)).await.unwrap().is_some());
}

pub async fn a_lease_that_ran_out_holds_until_somebody_takes_it(registry: &dyn Registry) {
    let lease = registry.acquire_lease("learner", "a", 100, EventTime(0)).await.unwrap().unwrap();
    let late = registry.renew_lease(&lease, 100, EventTime(500)).await.unwrap();
    assert_eq!((late.token, late.expires_at), (lease.token, EventTime(600)));
    let other = registry.acquire_lease("learner", "b", 100, EventTime(600)).await.unwrap().unwrap();
    assert!(other.token > lease.token);
    assert_err!(registry.renew_lease(&late, 100, EventTime(601)).await, RegistryError::Fenced { .. });
}
