//! A daemon of its own for each test: an in-process Kafka-protocol broker, a stream of made frames, the real
//! binary with a folder of its own, and a look into its registry and its store.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use palimpsest::registry::sqlite::SqliteRegistry;
use palimpsest::registry::{PeriodRecord, Registry, VersionRecord};
use palimpsest::store::Store;
use palimpsest::types::{EventTime, PeriodId};
use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, BaseRecord, DefaultProducerContext, Producer};

/// 2026-01-01T00:00:00Z, a whole number of periods since 1970.
pub const START: EventTime = EventTime::from_ms(1_767_225_600_000);
pub const PERIOD_MS: i64 = 3_600_000;
pub const LATENESS_MS: i64 = 60_000;
/// Longer than any wait here takes on a loaded machine, so that a hang fails instead of blocking.
pub const PATIENCE: Duration = Duration::from_secs(180);

pub fn period(index: i64) -> PeriodId {
    PeriodId(START.plus_ms(index * PERIOD_MS))
}

/// The broker. It lives in this process, so it outlives every kill of the daemon.
pub struct Broker {
    cluster: MockCluster<'static, DefaultProducerContext>,
    producer: BaseProducer,
}

impl Broker {
    pub fn start(topics: &[(&str, i32)]) -> Self {
        let cluster = MockCluster::new(1).unwrap();
        for (topic, partitions) in topics {
            cluster.create_topic(topic, *partitions, 1).unwrap();
        }
        let producer = ClientConfig::new()
            .set("bootstrap.servers", cluster.bootstrap_servers())
            .set("message.max.bytes", "100000000")
            .create()
            .unwrap();
        Self { cluster, producer }
    }

    pub fn address(&self) -> String {
        self.cluster.bootstrap_servers()
    }

    pub fn send(&self, topic: &str, partition: i32, record: &Record) {
        let mut headers = OwnedHeaders::new();
        for (key, value) in &record.headers {
            headers = headers.insert(Header { key, value: Some(value) });
        }
        let mut message = BaseRecord::<str, [u8]>::to(topic)
            .partition(partition)
            .key(&record.key)
            .payload(&record.value)
            .headers(headers);
        if let Some(timestamp) = record.timestamp_ms {
            message = message.timestamp(timestamp);
        }
        self.producer.send(message).map_err(|(error, _)| error).unwrap();
        self.producer.flush(Duration::from_secs(10)).unwrap();
    }
}

/// One Kafka record.
#[derive(Debug, Clone, Default)]
pub struct Record {
    pub key: String,
    pub value: Vec<u8>,
    pub headers: Vec<(String, String)>,
    pub timestamp_ms: Option<i64>,
}

impl Record {
    pub fn of(content_type: &str, value: Vec<u8>) -> Self {
        let headers = vec![("content-type".into(), content_type.into())];
        Self { key: "camera".into(), value, headers, ..Self::default() }
    }

    /// A good frame: a PNG whose look depends on its label.
    pub fn frame(stream: &str, label: &str, captured_at: EventTime, seed: u64) -> Self {
        let mut record = Self::of("image/png", png(label, seed));
        record.key = stream.into();
        record.headers.push(("captured_at".into(), captured_at.as_ms().to_string()));
        record.headers.push(("label".into(), label.into()));
        record
    }

    pub fn watermark(at: EventTime) -> Self {
        let value = format!(r#"{{"watermark":"{at}"}}"#);
        Self::of("application/vnd.palimpsest.watermark+json", value.into_bytes())
    }
}

/// A 32x32 picture: stripes whose direction and colour the label gives, noise by the seed.
pub fn png(label: &str, seed: u64) -> Vec<u8> {
    let kind = label.bytes().map(u64::from).sum::<u64>();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ kind;
    let picture = image::RgbImage::from_fn(32, 32, |x, y| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let noise = (state >> 58) as u8;
        let stripe = (x as u64 * (kind % 5) + y as u64 * (kind % 3 + 1) + seed % 7) / 4 % 2;
        let base = if stripe == 0 { 40 } else { 170 };
        image::Rgb([base + noise, (kind * 37 % 150) as u8 + noise, 200 - base + noise])
    });
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

/// A 32x32 picture of 4 x 4 coloured squares that the seed gives, the same to look at for every `noise`.
pub fn scene(seed: u64, noise: u64) -> Vec<u8> {
    let mixed = |number: u64| {
        number.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
    };
    let picture = image::RgbImage::from_fn(32, 32, |x, y| {
        let square = mixed(seed * 16 + u64::from(x / 8 + y / 8 * 4) + 1);
        let shimmer = mixed(noise * 1024 + u64::from(x + y * 32) + 1) >> 62;
        image::Rgb([0, 16, 32].map(|shift| (square >> (8 + shift)) as u8 / 5 * 4 + shimmer as u8))
    });
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

/// The frames of one period: `streams` walks, interleaved in time, two labels. Event times ascend.
pub fn frames_of(index: i64, streams: usize, frames_per_stream: usize) -> Vec<Record> {
    let count = streams * frames_per_stream;
    let step_ms = PERIOD_MS / count as i64;
    (0..count)
        .map(|i| {
            let stream = i % streams;
            let label = format!("label-{index}-{}", stream % 2);
            let captured_at = period(index).start().plus_ms(i as i64 * step_ms);
            Record::frame(&format!("stream-{index}-{stream}"), &label, captured_at, i as u64)
        })
        .collect()
}

/// The daemon's folder: configuration, registry, store, log.
pub struct Site {
    pub folder: tempfile::TempDir,
}

impl Site {
    /// `extra`: lines of TOML, `section.key = value`, over those that every test wants.
    pub fn new(brokers: &str, pipeline: &str, extra: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().display().to_string();
        let mut keys: BTreeMap<String, String> = [
            ("pipeline.name", format!("{pipeline:?}")),
            ("store.url", format!("{:?}", format!("{root}/objects"))),
            ("registry.url", format!("{:?}", format!("sqlite://{root}/registry.db"))),
            ("kafka.brokers", format!("[{brokers:?}]")),
            ("kafka.topics", r#"["frames"]"#.into()),
            ("kafka.dead_letter_topic", r#""dead-letters""#.into()),
            // A killed consumer's partitions come free after its session.
            (
                "kafka.properties",
                r#"{ "session.timeout.ms" = "3000", "heartbeat.interval.ms" = "500" }"#.into(),
            ),
            ("ingest.flush_age", r#""500ms""#.into()),
            ("idle.mode", r#""hold""#.into()),
            ("period.length", r#""1h""#.into()),
            ("period.lateness", r#""1m""#.into()),
            ("period.min_frames", "32".into()),
            ("model.architecture", r#""resnet_small""#.into()),
            ("model.image_size", "32".into()),
            ("model.projector_hidden", "32".into()),
            ("model.projector_dim", "16".into()),
            ("train.batch", "8".into()),
            ("train.steps", "4".into()),
            ("train.first_steps", "6".into()),
            ("train.checkpoint_steps", "2".into()),
            ("train.device", r#""cpu""#.into()),
            ("train.threads", "1".into()),
            // A machine that tests may be busy all the time: an idle training process would stand still.
            ("train.priority", r#""normal""#.into()),
            ("train.max_failures", "50".into()),
            // Frames of a label are stripes of one kind, and differ in noise alone.
            ("train.duplicate_distance", "0.0".into()),
            ("probe.block", r#""5m""#.into()),
            ("probe.guard", r#""1s""#.into()),
            ("probe.ratio", "0.4".into()),
            ("probe.k", "3".into()),
            ("probe.bootstrap", "100".into()),
            ("gate.max_forgetting_parent", "1.0".into()),
            ("gate.max_forgetting_cumulative", "1.0".into()),
            ("gate.min_neighbour_retention", "0.0".into()),
            ("gate.min_effective_rank", "1.0".into()),
            ("gate.require_learning", "false".into()),
            ("retention.periods", "100".into()),
            ("serve.bind", r#""127.0.0.1:0""#.into()),
            ("log.format", r#""text""#.into()),
            ("lease.ttl", r#""3s""#.into()),
        ]
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect();
        keys.extend(extra.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        let text: String = keys.iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
        std::fs::write(folder.path().join("palimpsest.toml"), text).unwrap();
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_palimpsest"));
        command.args(arguments).arg("--config").arg(self.path("palimpsest.toml"));
        command
    }

    /// Starts the daemon; its log is appended to `daemon.log`.
    pub fn daemon(&self, abort_at: Option<&str>) -> Daemon {
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(self.path("daemon.log")).unwrap();
        let mut command = self.command(&["run"]);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        match abort_at {
            Some(point) => command.env("PALIMPSEST_ABORT_AT", point),
            None => command.env_remove("PALIMPSEST_ABORT_AT"),
        };
        Daemon { child: command.spawn().unwrap() }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("daemon.log")).unwrap_or_default()
    }

    pub async fn registry(&self, pipeline: &str) -> Arc<SqliteRegistry> {
        let url = format!("sqlite://{}", self.path("registry.db").display());
        let registry = SqliteRegistry::open(&url, pipeline).await.unwrap();
        registry.migrate().await.unwrap();
        Arc::new(registry)
    }

    pub fn store(&self) -> Store {
        Store::open(&self.path("objects").display().to_string()).unwrap()
    }

    /// Where the daemon listens, as its log says it.
    pub async fn address(&self) -> String {
        let log = self.until("the daemon to listen", async || {
            let log = self.log();
            let at = log.rfind("listening on http://")?;
            let rest = &log[at + "listening on ".len()..];
            Some(rest.split_whitespace().next()?.trim_matches('"').to_owned())
        });
        log.await
    }

    /// Asks again and again until there is an answer; fails with the log if there is none in time.
    pub async fn until<T>(&self, what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
        let started = Instant::now();
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            if started.elapsed() > PATIENCE {
                panic!("waited {PATIENCE:?} for {what}; the log ends with\n{}", tail(&self.log()));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    pub async fn until_periods(
        &self,
        registry: &dyn Registry,
        what: &str,
        wanted: impl Fn(&[PeriodRecord]) -> bool,
    ) -> Vec<PeriodRecord> {
        let mut last = vec![];
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            last = registry.periods().await.unwrap();
            if wanted(&last) {
                return last;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!(
            "waited {PATIENCE:?} for {what}; there are {last:#?}; the log ends with\n{}",
            tail(&self.log())
        );
    }
}

pub fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

/// A running daemon; killed when dropped.
pub struct Daemon {
    pub child: Child,
}

impl Daemon {
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn terminate(&self) {
        let id = i32::try_from(self.child.id()).unwrap();
        // SAFETY: kill only sends a signal; the process is ours and not waited for yet.
        assert_eq!(unsafe { libc::kill(id, libc::SIGTERM) }, 0);
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Its exit status, or a failure after a while.
    pub async fn ended(&mut self, site: &Site) -> ExitStatus {
        let child = &mut self.child;
        site.until("the daemon to end", async || child.try_wait().unwrap()).await
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// (topic, partition, offset, row) of every frame in live segments, with how often it stands there.
pub async fn live_frames(registry: &dyn Registry, store: &Store) -> BTreeMap<(String, i32, i64, i32), usize> {
    let mut found = BTreeMap::new();
    for period in registry.periods().await.unwrap() {
        for segment in registry.segments(period.id).await.unwrap() {
            let bytes = store.get_verified(&segment.file).await.unwrap();
            for frame in palimpsest::store::segment::read(bytes).unwrap() {
                let frame = frame.unwrap();
                *found.entry((frame.topic, frame.partition, frame.offset, frame.row)).or_default() += 1;
            }
        }
    }
    found
}

/// SHA-256 of each visible version's encoder, by period; fails if a period has two.
pub fn encoders(versions: &[VersionRecord]) -> BTreeMap<PeriodId, String> {
    let mut found = BTreeMap::new();
    for record in versions.iter().filter(|record| record.visible) {
        let encoder = record.files.iter().find(|file| file.path == "encoder.safetensors").unwrap();
        let former = found.insert(record.period, encoder.sha256.to_string());
        assert!(former.is_none(), "period {} has two visible versions", record.period);
    }
    found
}

/// Processes of the training program whose store is the site's.
pub fn training_processes(folder: &Path) -> BTreeSet<u32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let wanted = folder.display().to_string();
    ids.filter(|id| {
        let read = |file| {
            String::from_utf8_lossy(&std::fs::read(format!("/proc/{id}/{file}")).unwrap_or_default())
                .into_owned()
        };
        read("cmdline").contains("\0train\0") && read("environ").contains(&wanted)
    })
    .collect()
}
