use std::path::Path;

use super::*;
use crate::registry::suite::*;

async fn in_memory() -> ((), SqliteRegistry) {
    let registry = SqliteRegistry::open("sqlite::memory:", "main").await.unwrap();
    registry.migrate().await.unwrap();
    ((), registry)
}

registry_suite!(in_memory);

async fn in_file(directory: &Path, pipeline: &str) -> SqliteRegistry {
    let url = format!("sqlite://{}", directory.join("new/registry.db").display());
    let registry = SqliteRegistry::open(&url, pipeline).await.unwrap();
    registry.migrate().await.unwrap();
    registry
}

#[tokio::test]
async fn a_commit_is_on_the_disk_when_it_returns_and_read_back_by_another_connection() {
    let directory = tempfile::tempdir().unwrap();
    let registry = in_file(directory.path(), "main").await;
    for (pragma, expected) in [("journal_mode", "wal"), ("synchronous", "2"), ("foreign_keys", "1")] {
        let query = sqlx::AssertSqlSafe(format!("SELECT CAST({pragma} AS TEXT) FROM pragma_{pragma}"));
        let value: String = sqlx::query_scalar(query).fetch_one(&registry.pool).await.unwrap();
        assert_eq!(value, expected, "{pragma}");
    }
    let lease = with_sealed(&registry, 2).await;
    publish(&registry, &lease, 0).await;
    let before = (registry.periods().await.unwrap(), registry.versions().await.unwrap());
    registry.close().await;
    let again = in_file(directory.path(), "main").await;
    assert_eq!((again.periods().await.unwrap(), again.versions().await.unwrap()), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_processes_may_open_and_migrate_at_once() {
    for _ in 0..5 {
        let directory = tempfile::tempdir().unwrap();
        let opened = (0..4).map(|_| {
            let path = directory.path().to_owned();
            tokio::spawn(async move { in_file(&path, "main").await.ping().await })
        });
        for result in futures::future::join_all(opened).await {
            result.unwrap().unwrap();
        }
    }
}

/// Flushes from where it believes the position to be until it stands at `until`; the flushes that it committed.
async fn consume(registry: SqliteRegistry, partition: TopicPartition, until: i64, step: i64) -> u64 {
    let mut position = 0;
    let mut committed = 0;
    while position < until {
        let end = (position + step).min(until);
        match registry.commit_flush(&flush(&partition, position..end, &[(0, (end - position) as u64)])).await
        {
            Ok(()) => {
                committed += 1;
                position = end;
            }
            Err(RegistryError::PositionMoved { found, .. }) => position = found.unwrap(),
            Err(error) => panic!("{error}"),
        }
    }
    committed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_connections_that_race_for_a_partition_commit_each_offset_once() {
    let directory = tempfile::tempdir().unwrap();
    let [a, b] = [in_file(directory.path(), "main").await, in_file(directory.path(), "main").await];
    let partition = partition(&a).await;
    let racers = [
        tokio::spawn(consume(a.clone(), partition.clone(), 300, 7)),
        tokio::spawn(consume(b.clone(), partition.clone(), 300, 11)),
    ];
    let mut committed = 0;
    for racer in racers {
        committed += racer.await.unwrap();
    }
    let segments = b.segments(id(0)).await.unwrap();
    assert_eq!(segments.len() as u64, committed);
    let mut reached = 0;
    for segment in &segments {
        assert_eq!(segment.flush.start, reached);
        reached = segment.flush.end;
    }
    assert_eq!((reached, a.period(id(0)).await.unwrap().frames), (300, 300));
}

#[tokio::test]
async fn pipelines_share_a_database_and_see_nothing_of_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let [a, b] = [in_file(directory.path(), "a").await, in_file(directory.path(), "b").await];
    let lease_a = with_sealed(&a, 1).await;
    assert!(b.periods().await.unwrap().is_empty() && b.positions().await.unwrap().is_empty());
    assert_err!(b.renew_lease(&lease_a, TTL_MS, NOW).await, RegistryError::Fenced { .. });
    let lease_b = with_sealed(&b, 1).await;
    assert_eq!(publish(&a, &lease_a, 0).await, Version(1));
    assert_eq!(publish(&b, &lease_b, 0).await, Version(1));
    assert_eq!(b.live_objects().await.unwrap().paths.len(), 1);
}

#[tokio::test]
async fn a_database_that_was_never_migrated_is_unavailable() {
    let registry = SqliteRegistry::open("sqlite::memory:", "main").await.unwrap();
    assert_err!(registry.periods().await, RegistryError::Unavailable(_));
    assert_err!(registry.advance_watermark(EventTime(1)).await, RegistryError::Unavailable(_));
    registry.migrate().await.unwrap();
    registry.migrate().await.unwrap();
    assert!(registry.periods().await.unwrap().is_empty());
}
