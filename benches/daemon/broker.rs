//! The stream: real frames, an in-process Kafka-protocol broker, and a producer that keeps the daemon saturated.
//!
//! The broker keeps 5 MiB a partition and drops the oldest beyond, so nothing here runs further ahead of the
//! daemon's committed positions than [`AHEAD_BYTES`].

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use palimpsest::types::EventTime;
use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, BaseRecord, DefaultProducerContext, Producer};
use rdkafka::types::RDKafkaErrorCode;

pub const TOPIC: &str = "frames";
pub const DEAD_LETTERS: &str = "dead-letters";
/// Values of one partition that are sent and not yet committed. Larger, with keys and headers, nears what the broker
/// keeps; smaller makes the daemon wait for the producer.
const AHEAD_BYTES: usize = 3 << 20;
const FLUSH_TIMEOUT: Duration = Duration::from_secs(30);
/// While the producer waits for the daemon, or for its client's queue.
const PAUSE: Duration = Duration::from_millis(2);

/// An encoded image with its label.
pub struct Picture {
    pub label: String,
    pub image: Vec<u8>,
}

/// All images below `folder` (LEVEL/LABEL/STREAM-NUMBER.jpg), in the order of their names.
pub fn pictures(folder: &Path) -> Result<Vec<Picture>> {
    let mut files = vec![];
    for level in subfolders(folder)? {
        for label in subfolders(&level)? {
            let name = label.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let entries = std::fs::read_dir(&label)?.collect::<std::io::Result<Vec<_>>>()?;
            files.extend(entries.into_iter().map(|entry| (entry.path(), name.clone())));
        }
    }
    files.retain(|(path, _)| path.extension().is_some_and(|extension| extension == "jpg"));
    files.sort();
    let read = |(path, label): (PathBuf, String)| Ok(Picture { label, image: std::fs::read(path)? });
    let pictures = files.into_iter().map(read).collect::<Result<Vec<_>>>()?;
    ensure!(!pictures.is_empty(), "{} holds no LEVEL/LABEL/*.jpg", folder.display());
    Ok(pictures)
}

fn subfolders(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut found = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>>>()?;
    found.retain(|path| path.is_dir());
    Ok(found)
}

/// The broker and the one client that fills it.
pub struct Broker {
    cluster: MockCluster<'static, DefaultProducerContext>,
    pub sender: Sender,
}

impl Broker {
    pub fn start(partitions: i32) -> Result<Self> {
        let cluster = MockCluster::new(1).context("the in-process broker can't be started")?;
        cluster.create_topic(TOPIC, partitions, 1)?;
        cluster.create_topic(DEAD_LETTERS, 1, 1)?;
        let producer = ClientConfig::new()
            .set("bootstrap.servers", cluster.bootstrap_servers())
            .set("enable.idempotence", "true")
            .create()?;
        let sender = Sender { producer, partitions, sent: vec![0; partitions as usize] };
        Ok(Self { cluster, sender })
    }

    pub fn address(&self) -> String {
        self.cluster.bootstrap_servers()
    }
}

pub struct Sender {
    producer: BaseProducer,
    pub partitions: i32,
    /// Records sent to each partition: the next one's offset.
    sent: Vec<i64>,
}

impl Sender {
    /// Queues one frame.
    pub fn frame(&mut self, partition: i32, stream: &str, picture: &Picture, at: EventTime) -> Result<()> {
        let captured_at = at.as_ms().to_string();
        let headers = OwnedHeaders::new()
            .insert(header("content-type", "image/jpeg"))
            .insert(header("captured_at", &captured_at))
            .insert(header("label", &picture.label));
        self.send(partition, stream, &picture.image, headers)
    }

    /// States in every partition that no frame earlier than `at` follows.
    pub fn watermark(&mut self, at: EventTime) -> Result<()> {
        let value = format!(r#"{{"watermark":"{at}"}}"#);
        for partition in 0..self.partitions {
            let kind = header("content-type", "application/vnd.palimpsest.watermark+json");
            self.send(partition, "", value.as_bytes(), OwnedHeaders::new().insert(kind))?;
        }
        Ok(())
    }

    fn send(&mut self, partition: i32, key: &str, value: &[u8], headers: OwnedHeaders) -> Result<()> {
        let mut record = BaseRecord::to(TOPIC).partition(partition).key(key).payload(value).headers(headers);
        while let Err((error, back)) = self.producer.send(record) {
            ensure!(
                matches!(error, KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull)),
                "a record can't be sent: {error}"
            );
            self.producer.poll(PAUSE);
            record = back;
        }
        self.sent[partition as usize] += 1;
        Ok(())
    }

    /// Waits until the broker has all that was sent.
    pub fn flush(&self) -> Result<()> {
        Ok(self.producer.flush(FLUSH_TIMEOUT)?)
    }
}

fn header<'a>(key: &'a str, value: &'a str) -> Header<'a, &'a str> {
    Header { key, value: Some(value) }
}

/// The committed position of each partition, as the registry says it.
pub type Positions = Arc<Vec<AtomicI64>>;

/// Sends frames of one period to all partitions, as many as the daemon takes, until `stop`.
/// Returns the share of the looks at which every partition was full, so that the daemon had what to do.
pub fn saturate(
    sender: &mut Sender,
    pictures: &[Picture],
    period_start: EventTime,
    positions: &Positions,
    stop: &AtomicBool,
) -> Result<f64> {
    let mut lanes: Vec<Lane> = (0..sender.partitions).map(|_| Lane::default()).collect();
    let (mut looks, mut full, mut next) = (0_u64, 0_u64, 0_usize);
    while !stop.load(Ordering::Relaxed) {
        let before = next;
        for (partition, lane) in lanes.iter_mut().enumerate() {
            lane.forget(positions[partition].load(Ordering::Relaxed));
            while lane.bytes < AHEAD_BYTES {
                let picture = &pictures[next % pictures.len()];
                let at = period_start.plus_ms((next % 1_000_000) as i64);
                lane.unconsumed.push_back((sender.sent[partition], picture.image.len()));
                lane.bytes += picture.image.len();
                sender.frame(partition as i32, &format!("camera-{partition}"), picture, at)?;
                next += 1;
            }
        }
        sender.producer.poll(Duration::ZERO);
        looks += 1;
        if next == before {
            full += 1;
            std::thread::sleep(PAUSE);
        }
    }
    sender.flush()?;
    Ok(full as f64 / looks.max(1) as f64)
}

#[derive(Default)]
struct Lane {
    /// Offset and bytes of what is not committed yet.
    unconsumed: VecDeque<(i64, usize)>,
    bytes: usize,
}

impl Lane {
    fn forget(&mut self, position: i64) {
        while let Some(&(offset, bytes)) = self.unconsumed.front()
            && offset < position
        {
            self.unconsumed.pop_front();
            self.bytes -= bytes;
        }
    }
}
