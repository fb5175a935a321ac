use std::path::Path;

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message};
use rdkafka::mocking::MockCluster;

use super::frames::Image;
use super::*;
use crate::ingest::frame::{
    ARROW_STREAM, Decoded, Frame, FrameLimits, Record, Value, WATERMARK_JSON, decode,
};
use crate::store::segment;

const START: EventTime = EventTime(1_769_817_600_000);

fn touch(root: &Path, name: &str, content: &[u8]) {
    let path = root.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, content).unwrap();
}

fn jpeg() -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let image = image::DynamicImage::ImageRgb8(image::RgbImage::new(8, 8));
    image.write_to(&mut bytes, image::ImageFormat::Jpeg).unwrap();
    bytes.into_inner()
}

fn summary(planned: &[Planned]) -> Vec<(&str, Option<&str>, i64)> {
    let of = |frame: &'_ Planned| frame.captured_at.as_ms() - START.as_ms();
    planned.iter().map(|f| (f.stream_id.as_str(), f.label.as_deref(), of(f))).collect()
}

#[test]
fn a_folder_is_spread_over_the_span_stream_beside_stream() {
    let directory = tempfile::tempdir().unwrap();
    for name in
        ["b/walk-00-0001.jpg", "b/walk-00-0000.JPG", "a/w-1.png", "a/w-0.png", "a/x-0.webp", "a/notes.txt"]
    {
        touch(directory.path(), name, b"");
    }
    touch(directory.path(), "stray.jpg", b"");
    let source = ProduceSource::Folder(directory.path().to_owned());
    let times = CaptureTimes::Spread { start: START, end: START.plus_ms(100) };
    let planned = plan(&source, times).unwrap();
    let expected = vec![
        ("a/w", Some("a"), 0),
        ("a/x", Some("a"), 0),
        ("b/walk-00", Some("b"), 0),
        ("a/w", Some("a"), 50),
        ("b/walk-00", Some("b"), 50),
    ];
    assert_eq!(summary(&planned), expected);
    assert_eq!(planned[2].image, Image::File(directory.path().join("b/walk-00-0000.JPG")));
    let every = plan(&source, CaptureTimes::Every { start: START, interval_ms: 7 }).unwrap();
    assert_eq!(summary(&every).iter().map(|s| s.2).collect::<Vec<_>>(), vec![0, 7, 14, 21, 28]);
    let recorded = plan(&source, CaptureTimes::Recorded).unwrap_err();
    assert!(matches!(recorded, ProduceError::NoCaptureTime { .. }), "{recorded}");
}

#[test]
fn an_empty_folder_is_an_error_that_says_what_was_expected() {
    let directory = tempfile::tempdir().unwrap();
    let source = ProduceSource::Folder(directory.path().to_owned());
    let error = plan(&source, CaptureTimes::Recorded).unwrap_err().to_string();
    assert!(error.contains("LABEL/*.jpg"), "{error}");
}

#[test]
fn a_segment_of_ours_is_replayed_at_its_recorded_times() {
    let row = |n: i64| segment::Row {
        image: jpeg().into(),
        stream_id: format!("s{}", n % 2),
        captured_at: START.plus_ms(10 - n),
        label: (n > 0).then(|| "cat".into()),
        topic: "t".into(),
        partition: 0,
        offset: n,
        row: 0,
    };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("segment.parquet");
    std::fs::write(&path, segment::write(&[row(0), row(1), row(2)]).unwrap()).unwrap();
    let planned = plan(&ProduceSource::Parquet(path), CaptureTimes::Recorded).unwrap();
    assert_eq!(summary(&planned), vec![("s0", Some("cat"), 8), ("s1", Some("cat"), 9), ("s0", None, 10)]);
}

/// What a consumer finds in every partition.
fn consume(
    cluster: &MockCluster<'_, rdkafka::producer::DefaultProducerContext>,
    partitions: i32,
    total: usize,
) -> Vec<Record> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", cluster.bootstrap_servers())
        .set("group.id", "test")
        .create()
        .unwrap();
    let mut list = rdkafka::TopicPartitionList::new();
    for partition in 0..partitions {
        list.add_partition_offset("frames", partition, rdkafka::Offset::Beginning).unwrap();
    }
    consumer.assign(&list).unwrap();
    let mut records = Vec::new();
    let started = std::time::Instant::now();
    while records.len() < total {
        assert!(started.elapsed() < Duration::from_secs(60), "only {} records", records.len());
        let Some(message) = consumer.poll(Duration::from_millis(200)) else { continue };
        let message = message.unwrap();
        let headers = message.headers().unwrap().iter();
        records.push(Record {
            topic: "frames".into(),
            partition: message.partition(),
            offset: message.offset(),
            key: message.key().map(bytes::Bytes::copy_from_slice),
            timestamp: None,
            headers: headers
                .map(|h| (h.key.to_owned(), bytes::Bytes::copy_from_slice(h.value.unwrap())))
                .collect(),
            value: Value::Bytes(bytes::Bytes::copy_from_slice(message.payload().unwrap())),
        });
    }
    records
}

fn content_type(record: &Record) -> &str {
    let header = record.headers.iter().find(|(name, _)| name == "content-type").unwrap();
    std::str::from_utf8(&header.1).unwrap()
}

async fn replay(rows_per_record: usize, records: usize) -> (Vec<Record>, Vec<Decoded>) {
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("frames", 2, 1).unwrap();
    let directory = tempfile::tempdir().unwrap();
    for stream in 0..4 {
        for n in 0..5 {
            touch(directory.path(), &format!("cat/s{stream}-{n:04}.jpg"), &jpeg());
        }
    }
    let settings = ProduceSettings {
        properties: BTreeMap::from([("bootstrap.servers".into(), cluster.bootstrap_servers())]),
        topic: "frames".into(),
        source: ProduceSource::Folder(directory.path().to_owned()),
        times: CaptureTimes::Spread { start: START, end: START.plus_ms(1000) },
        frames_per_second: 0.0,
        rows_per_record,
        watermark: Some(START.plus_ms(1000)),
        pacing: None,
    };
    let mut seen = 0;
    let done = produce(settings, |progress| seen = progress.frames, CancellationToken::new()).await.unwrap();
    assert_eq!((done.frames, done.total_frames, seen), (20, 20, 20));
    let records = consume(&cluster, 2, records);
    let decoded = records.iter().map(|r| decode(r, &FrameLimits::default(), START.plus_ms(2000))).collect();
    (records, decoded)
}

#[tokio::test]
async fn every_frame_arrives_in_its_streams_order_and_each_partition_ends_with_the_watermark() {
    let (records, decoded) = replay(1, 22).await;
    for stream in 0..4 {
        let id = format!("cat/s{stream}");
        let frames = decoded.iter().flat_map(|d| &d.frames).filter(|f| f.stream_id == id);
        let times: Vec<i64> = frames.map(|f| f.captured_at.as_ms() - START.as_ms()).collect();
        assert_eq!(times, vec![0, 200, 400, 600, 800], "{id}");
    }
    for partition in 0..2 {
        let last = records.iter().rposition(|r| r.partition == partition).unwrap();
        assert_eq!(content_type(&records[last]), WATERMARK_JSON);
        assert_eq!(decoded[last].watermark, Some(START.plus_ms(1000)));
    }
    assert!(decoded.iter().all(|d| d.rejects.is_empty()));
}

#[tokio::test]
async fn batches_carry_the_same_frames() {
    let (_, single) = replay(1, 22).await;
    let mut expected: Vec<_> = single.iter().flat_map(|d| &d.frames).collect();
    let on_first = expected.iter().filter(|f| f.stream_id == expected[0].stream_id).count();
    assert_eq!(on_first, 5);
    // Two partitions with 10 frames each or 20 and 0: either way at most ceil(n / 4) batches and two punctuations.
    let partition_of = |decoded: &[Decoded], records: &[Record]| {
        let with = |p| records.iter().zip(decoded).filter(move |(r, _)| r.partition == p);
        [0, 1].map(|p| with(p).map(|(_, d)| d.frames.len()).sum::<usize>())
    };
    let (records, _) = replay(1, 22).await;
    let sizes = partition_of(&single, &records);
    let count = sizes.iter().map(|n| n.div_ceil(4)).sum::<usize>() + 2;
    let (records, batched) = replay(4, count).await;
    assert!(records.iter().filter(|r| content_type(r) == ARROW_STREAM).count() == count - 2);
    let mut found: Vec<_> = batched.iter().flat_map(|d| &d.frames).collect();
    let key = |f: &&Frame| (f.stream_id.clone(), f.captured_at);
    expected.sort_by_key(key);
    found.sort_by_key(key);
    assert_eq!(found.len(), 20);
    for (a, b) in expected.iter().zip(&found) {
        assert_eq!((&a.stream_id, a.captured_at, &a.label), (&b.stream_id, b.captured_at, &b.label));
        assert_eq!(a.image, b.image);
    }
}

#[tokio::test]
async fn pacing_keeps_the_producer_within_its_bound_of_the_consumer() {
    use std::sync::atomic::{AtomicI64, Ordering};
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("frames", 1, 1).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let image = jpeg();
    for n in 0..30 {
        touch(directory.path(), &format!("cat/s-{n:04}.jpg"), &image);
    }
    // A consumer that passes one record each time it is asked, and checks how far ahead the producer was.
    let consumed = Arc::new(AtomicI64::new(0));
    let position = consumed.clone();
    let settings = ProduceSettings {
        properties: BTreeMap::from([("bootstrap.servers".into(), cluster.bootstrap_servers())]),
        topic: "frames".into(),
        source: ProduceSource::Folder(directory.path().to_owned()),
        times: CaptureTimes::Every { start: START, interval_ms: 1 },
        frames_per_second: 0.0,
        rows_per_record: 1,
        watermark: None,
        pacing: Some(Pacing {
            max_ahead_bytes: 4 * image.len() as u64,
            consumed: Arc::new(move |_| {
                let next = position.fetch_add(1, Ordering::SeqCst) + 1;
                Box::pin(async move { next })
            }),
        }),
    };
    let ahead = consumed.clone();
    let mut worst = 0;
    let progress = |p: ProduceProgress| worst = worst.max(p.frames as i64 - ahead.load(Ordering::SeqCst));
    produce(settings, progress, CancellationToken::new()).await.unwrap();
    assert_eq!(worst, 4);
    assert_eq!(consumed.load(Ordering::SeqCst), 26);
}
