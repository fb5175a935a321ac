use std::io;
use std::sync::Mutex;

use metrics_exporter_prometheus::PrometheusBuilder;

use super::*;
use crate::ingest::tests::rig::{HOUR_MS, Rig, eventually, now};
use crate::store::Op;
use crate::store::testing::Fault;
use crate::types::OffsetRange;

async fn flusher(rig: &Rig, status: IngestStatus) -> Flusher {
    let settings = rig.settings();
    let id = rig.id("frames", 0).await;
    rig.registry.register_partitions(std::slice::from_ref(&id)).await.unwrap();
    rig.registry.start_position(&id, 0).await.unwrap();
    Flusher {
        registry: rig.registry.clone(),
        store: rig.store.clone(),
        paths: Paths::new(&settings.pipeline),
        dead_letters: DeadLetters::new(&settings.kafka.properties, "dead").unwrap(),
        policy: settings.periods,
        status,
    }
}

async fn batch(rig: &Rig, offset: i64, captured_at: EventTime) -> Batch {
    let frame = Frame {
        offset,
        row: 0,
        stream_id: "camera".into(),
        captured_at,
        label: None,
        image: Bytes::from_static(b"image"),
    };
    Batch {
        partition: rig.id("frames", 0).await,
        offsets: OffsetRange { start: offset, end: offset + 1 },
        frames: vec![frame],
        dead_letters: vec![],
        watermark: None,
    }
}

/// Text that a subscriber writes.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn each_failed_try_of_a_flush_is_counted_and_told_with_its_partition() {
    let rig = Rig::new(&[("frames", 1)]).await;
    let flusher = flusher(&rig, IngestStatus::default()).await;
    let recorder = PrometheusBuilder::new().build_recorder();
    let _metrics = metrics::set_default_local_recorder(&recorder);
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().json().with_writer(move || writer.clone()).finish();
    let _logging = tracing::subscriber::set_default(subscriber);
    rig.faults.fail_next(Op::Put, Fault::Refused, 2);
    assert_eq!(flusher.flush(batch(&rig, 0, now()).await).await.unwrap(), Flushed::Committed);
    let metrics = recorder.handle().render();
    for (outcome, count) in [("failed", 2), ("committed", 1)] {
        let expected = format!("{INGEST_FLUSHES}{{outcome=\"{outcome}\"}} {count}");
        assert!(metrics.lines().any(|line| line == expected), "{expected}\nnot in {metrics}");
    }
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let waiting: Vec<&str> = log.lines().filter(|line| line.contains("waiting; nothing is lost")).collect();
    assert_eq!(waiting.len(), 2, "{log}");
    let span = r#""span":{"partition":0,"topic":"frames","name":"flush"}"#;
    assert!(waiting.iter().all(|line| line.contains(span)), "{log}");
}

#[tokio::test]
async fn a_period_that_got_other_bounds_during_a_flush_takes_its_frames() {
    let rig = Rig::new(&[("frames", 1)]).await;
    let status = IngestStatus::default();
    let flusher = flusher(&rig, status.clone()).await;
    let first = EventTime(now().as_ms() / HOUR_MS * HOUR_MS - 5 * HOUR_MS);
    flusher.flush(batch(&rig, 0, first).await).await.unwrap();
    rig.faults.take_down(&[Op::Put]);
    // Planned into a whole hour.
    let second = batch(&rig, 1, first.plus_ms(HOUR_MS + 1)).await;
    let half =
        PeriodBounds { id: PeriodId(first.plus_ms(HOUR_MS)), end: first.plus_ms(HOUR_MS + HOUR_MS / 2) };
    let merge = async {
        eventually("the flush waits for the store", async || {
            status.trouble().is_some_and(|trouble| trouble.contains("store"))
        })
        .await;
        let lease = rig.registry.acquire_lease("learner", "me", 60_000, now()).await.unwrap().unwrap();
        rig.registry.seal(&lease, PeriodId(first), 10, half, now()).await.unwrap();
        rig.faults.recover();
    };
    let (flushed, ()) = tokio::join!(flusher.flush(second), merge);
    assert_eq!(flushed.unwrap(), Flushed::Committed);
    let open = rig.registry.periods().await.unwrap().into_iter().filter(|p| p.state == PeriodState::Open);
    assert_eq!(open.map(|p| (p.id, p.end, p.frames)).collect::<Vec<_>>(), [(half.id, half.end, 2)]);
}

#[tokio::test]
async fn a_flush_that_the_registry_always_finds_wrong_is_an_error() {
    let rig = Rig::new(&[("frames", 1)]).await;
    let flusher = flusher(&rig, IngestStatus::default()).await;
    let mut wrong = batch(&rig, 0, now()).await;
    wrong.offsets = OffsetRange { start: 3, end: 1 };
    let failed = flusher.flush(wrong).await;
    assert!(matches!(failed, Err(IngestError::Registry(RegistryError::WrongState { .. }))), "{failed:?}");
}
