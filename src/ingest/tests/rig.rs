//! A broker in this process, a registry, a store that fails on request, and the loop between them.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::sync::Arc;
use std::time::{Duration, Instant};

use image::{DynamicImage, ImageFormat, Rgb, RgbImage};
use object_store::local::LocalFileSystem;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Header, Headers, Message, OwnedHeaders};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{DefaultProducerContext, FutureProducer, FutureRecord};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::ingest::frame::{CAPTURED_AT, CONTENT_TYPE};
use crate::ingest::{
    FlushPolicy, FrameLimits, IdleMode, IdlePolicy, IngestError, IngestParts, IngestSettings, IngestStatus,
    KafkaSettings, KafkaStart, LatePolicy, PeriodPolicy, run,
};
use crate::registry::Registry;
use crate::registry::sqlite::SqliteRegistry;
use crate::store::Store;
use crate::store::testing::FaultyStore;
use crate::types::{EventTime, TopicPartition};

pub const HOUR_MS: i64 = 3_600_000;
const IDENTITY: &str = "run-1";
const DEAD_LETTERS: &str = "dead";

pub fn now() -> EventTime {
    let elapsed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    EventTime(elapsed.as_millis() as i64)
}

pub fn jpeg(seed: u8) -> Vec<u8> {
    let pixel = |x: u32, y: u32| Rgb([seed, x as u8 * 16, y as u8 * 16]);
    let mut bytes = Cursor::new(Vec::new());
    let image = DynamicImage::ImageRgb8(RgbImage::from_fn(16, 16, pixel));
    image.write_to(&mut bytes, ImageFormat::Jpeg).unwrap();
    bytes.into_inner()
}

/// Polls until it holds. The limit is for a machine under load: a member may take 11 s to join.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !holds().await {
        assert!(started.elapsed() < Duration::from_secs(90), "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A record to be sent.
#[derive(Clone)]
pub struct Sent {
    value: Vec<u8>,
    headers: Vec<(String, String)>,
}

impl Sent {
    pub fn new(value: Vec<u8>) -> Self {
        Self { value, headers: vec![] }
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    pub fn frame(seed: u8, captured_at: EventTime) -> Self {
        Self::new(jpeg(seed))
            .header(CONTENT_TYPE, "image/jpeg")
            .header(CAPTURED_AT, &captured_at.as_ms().to_string())
    }
}

pub struct Rig {
    cluster: MockCluster<'static, DefaultProducerContext>,
    producer: FutureProducer,
    pub registry: Arc<SqliteRegistry>,
    pub faults: Arc<FaultyStore>,
    pub store: Arc<Store>,
    topics: Vec<String>,
    _directory: tempfile::TempDir,
}

/// The loop in a task.
pub struct Run {
    pub status: IngestStatus,
    cancel: CancellationToken,
    task: JoinHandle<Result<(), IngestError>>,
}

impl Run {
    pub async fn stop(self) {
        self.cancel.cancel();
        self.task.await.unwrap().unwrap();
    }
}

impl Rig {
    pub async fn new(topics: &[(&str, i32)]) -> Self {
        let cluster = MockCluster::new(1).unwrap();
        for (topic, partitions) in topics.iter().chain(&[(DEAD_LETTERS, 1)]) {
            cluster.create_topic(topic, *partitions, 1).unwrap();
        }
        let producer = ClientConfig::new()
            .set("bootstrap.servers", cluster.bootstrap_servers())
            .set("message.max.bytes", "60000000")
            .create()
            .unwrap();
        let directory = tempfile::tempdir().unwrap();
        let registry = SqliteRegistry::open("sqlite::memory:", "main").await.unwrap();
        registry.migrate().await.unwrap();
        let local = LocalFileSystem::new_with_prefix(directory.path()).unwrap();
        let faults = FaultyStore::new(Arc::new(local));
        Self {
            cluster,
            producer,
            registry: Arc::new(registry),
            store: Arc::new(Store::new(faults.clone())),
            faults,
            topics: topics.iter().map(|(topic, _)| topic.to_string()).collect(),
            _directory: directory,
        }
    }

    fn properties(&self) -> BTreeMap<String, String> {
        BTreeMap::from([
            ("bootstrap.servers".into(), self.cluster.bootstrap_servers()),
            // This broker lets a rebalance last as long as a session, less a second.
            ("session.timeout.ms".into(), "4000".into()),
        ])
    }

    pub fn settings(&self) -> IngestSettings {
        IngestSettings {
            pipeline: "main".into(),
            kafka: KafkaSettings {
                properties: self.properties(),
                topics: self.topics.clone(),
                identity: IDENTITY.into(),
                group: "main".into(),
                start: KafkaStart::Earliest,
                dead_letter_topic: DEAD_LETTERS.into(),
                max_in_flight_bytes: 8 << 20,
                metadata_interval_ms: 1000,
            },
            limits: FrameLimits::default(),
            periods: PeriodPolicy { length_ms: HOUR_MS, late: LatePolicy::Join, max_waiting_bytes: u64::MAX },
            flush: FlushPolicy {
                max_bytes: 1 << 20,
                max_age_ms: 500,
                max_quiet_ms: 200,
                max_total_bytes: 4 << 20,
            },
            idle: IdlePolicy { mode: IdleMode::WallClock, timeout_ms: 400, report_ttl_ms: 60_000 },
            report_interval_ms: 100,
            drain_timeout_ms: 20_000,
        }
    }

    /// Nothing but a punctuation or a stop flushes.
    pub fn keep_in_memory(settings: &mut IngestSettings) {
        settings.flush.max_age_ms = 3_600_000;
        settings.flush.max_quiet_ms = 3_600_000;
    }

    pub fn start(&self, change: impl FnOnce(&mut IngestSettings)) -> Run {
        let mut settings = self.settings();
        change(&mut settings);
        let (cancel, status) = (CancellationToken::new(), IngestStatus::default());
        let work = run(settings, self.parts(status.clone()), cancel.clone());
        Run { status, cancel, task: tokio::spawn(work) }
    }

    pub fn parts(&self, status: IngestStatus) -> IngestParts {
        let (registry, store) = (self.registry.clone(), self.store.clone());
        IngestParts { registry, store, clock: Arc::new(now), status }
    }

    /// Returns the record's offset.
    pub async fn send(&self, topic: &str, partition: i32, sent: Sent) -> i64 {
        let mut headers = OwnedHeaders::new();
        for (key, value) in &sent.headers {
            headers = headers.insert(Header { key, value: Some(value) });
        }
        let record =
            FutureRecord::to(topic).partition(partition).key("camera").payload(&sent.value).headers(headers);
        self.producer.send(record, Duration::from_secs(30)).await.unwrap().offset
    }

    pub async fn id(&self, topic: &str, partition: i32) -> TopicPartition {
        let topic_id = self.registry.open_topic(topic, IDENTITY).await.unwrap();
        TopicPartition { topic: topic.into(), topic_id, partition }
    }

    /// -1: nobody has begun to read it.
    pub async fn position(&self, topic: &str, partition: i32) -> i64 {
        let id = self.id(topic, partition).await;
        let record = self.registry.position(&id).await.unwrap();
        record.and_then(|record| record.position).unwrap_or(-1)
    }

    /// Whether somebody has begun to read it.
    pub async fn reads(&self, topic: &str, partition: i32) -> bool {
        self.position(topic, partition).await >= 0
    }

    /// (partition, offset, row) of every frame in a live segment.
    pub async fn stored(&self) -> Vec<(i32, i64, u32)> {
        let mut rows = Vec::new();
        for period in self.registry.periods().await.unwrap() {
            for segment in self.registry.segments(period.id).await.unwrap() {
                let bytes = self.store.get_verified(&segment.file).await.unwrap();
                for row in crate::store::segment::read(bytes).unwrap() {
                    let row = row.unwrap();
                    rows.push((row.partition, row.offset, row.row.cast_unsigned()));
                }
            }
        }
        rows
    }

    /// (reason, topic, partition, offset, row) of each dead letter, once there are as many as are expected.
    pub fn dead_letters(&self, at_least: usize) -> Vec<(String, String, i32, i64, String)> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", self.cluster.bootstrap_servers())
            .set("group.id", "reader")
            .set("auto.offset.reset", "earliest")
            .create()
            .unwrap();
        let mut list = rdkafka::TopicPartitionList::new();
        list.add_partition_offset(DEAD_LETTERS, 0, rdkafka::Offset::Beginning).unwrap();
        consumer.assign(&list).unwrap();
        let mut letters = Vec::new();
        let started = Instant::now();
        while letters.len() < at_least {
            assert!(started.elapsed() < Duration::from_secs(30), "only {letters:?}");
            let Some(message) = consumer.poll(Duration::from_millis(200)) else { continue };
            let message = message.unwrap();
            let headers = message.headers().unwrap();
            let text = |name: &str| {
                let header = headers.iter().find(|header| header.key == name);
                header.map(|h| String::from_utf8(h.value.unwrap().to_vec()).unwrap()).unwrap_or_default()
            };
            letters.push((
                text("reason"),
                text("source_topic"),
                text("source_partition").parse().unwrap(),
                text("source_offset").parse().unwrap(),
                text("source_row"),
            ));
        }
        letters
    }
}
