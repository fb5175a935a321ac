//! The running daemon: bad input, late frames, small and quiet periods, large ones, the orderly stop, the HTTP interface.

mod common;

use common::{Broker, LATENESS_MS, PERIOD_MS, Record, START, Site, frames_of, live_frames, period};
use palimpsest::registry::{PeriodState, Registry};
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::message::{BorrowedMessage, Headers, Message};

const MIB: usize = 1 << 20;

/// A PNG whose header claims 30,000 x 30,000 pixels, with right checksums, and next to nothing behind it.
fn huge_png() -> Vec<u8> {
    let side = 30_000_u32.to_be_bytes();
    let header = [&side[..], &side[..], &[8, 2, 0, 0, 0]].concat();
    let chunks =
        [chunk(b"IHDR", &header), chunk(b"IDAT", &[0x78, 0x9c, 3, 0, 0, 0, 0, 1]), chunk(b"IEND", &[])];
    [b"\x89PNG\r\n\x1a\n".to_vec(), chunks.concat()].concat()
}

fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let named = [&kind[..], data].concat();
    let length = (data.len() as u32).to_be_bytes();
    [&length[..], &named, &crc32(&named).to_be_bytes()].concat()
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

fn truncated_jpeg() -> Vec<u8> {
    let picture = image::RgbImage::from_fn(64, 64, |x, y| image::Rgb([x as u8, y as u8, 90]));
    let mut bytes = std::io::Cursor::new(vec![]);
    picture.write_to(&mut bytes, image::ImageFormat::Jpeg).unwrap();
    let mut bytes = bytes.into_inner();
    bytes.truncate(bytes.len() / 2);
    bytes
}

/// Each with the start of the reason that the dead letter must carry.
fn bad_records() -> Vec<(&'static str, Record)> {
    let at = |ms| Record::frame("stream", "label", palimpsest::types::EventTime::from_ms(ms), 1);
    vec![
        ("undecodable_image", Record::of("image/jpeg", truncated_jpeg())),
        ("too_many_pixels", Record::of("image/png", huge_png())),
        ("empty_value", Record::of("image/png", vec![])),
        ("unknown_content_type", Record::of("text/plain", b"hello".to_vec())),
        ("broken_arrow_stream", Record::of("application/vnd.apache.arrow.stream", b"no arrow".to_vec())),
        ("captured_too_early", at(0)),
        ("captured_ahead_of_clock", at(4_070_908_800_000)),
    ]
}

fn header<'a>(message: &'a BorrowedMessage<'_>, key: &str) -> &'a str {
    let headers = message.headers().unwrap();
    let found = headers.iter().find(|header| header.key == key).and_then(|header| header.value);
    std::str::from_utf8(found.unwrap_or_else(|| panic!("no header {key}"))).unwrap()
}

struct DeadLetters {
    consumer: StreamConsumer,
    found: Vec<(String, i32, i64, String)>,
}

fn dead_letters(broker: &Broker) -> DeadLetters {
    let consumer: StreamConsumer = rdkafka::ClientConfig::new()
        .set("bootstrap.servers", broker.address())
        .set("group.id", "reader")
        .set("auto.offset.reset", "earliest")
        .create()
        .unwrap();
    consumer.subscribe(&["dead-letters"]).unwrap();
    DeadLetters { consumer, found: vec![] }
}

/// (topic, partition, offset, reason) of the first `count` dead letters, sorted.
async fn read(letters: &mut DeadLetters, count: usize, site: &Site) -> Vec<(String, i32, i64, String)> {
    while letters.found.len() < count {
        let next = tokio::time::timeout(common::PATIENCE, letters.consumer.recv()).await;
        let message = next.unwrap_or_else(|_| panic!("{:?}\n{}", letters.found, common::tail(&site.log())));
        let message = message.unwrap();
        let number = |key| header(&message, key).parse::<i64>().unwrap();
        let place = (
            header(&message, "source_topic").to_owned(),
            number("source_partition") as i32,
            number("source_offset"),
        );
        letters.found.push((place.0, place.1, place.2, header(&message, "reason").to_owned()));
    }
    letters.found.sort();
    letters.found.clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_records_are_dead_lettered_with_reason_and_place_and_the_next_good_frame_arrives() {
    let broker = Broker::start(&[("frames", 2), ("more-frames", 2), ("dead-letters", 1)]);
    let topics = [("kafka.topics", r#"["frames", "more-frames"]"#)];
    let site = Site::new(&broker.address(), "bad-input", &topics);
    let daemon = site.daemon(None);
    let mut letters = dead_letters(&broker);
    let mut expected = vec![];
    for topic in ["frames", "more-frames"] {
        // The in-process broker keeps 5 MiB a partition, and a larger record only as the first one.
        broker.send(topic, 1, &Record::of("image/png", vec![0x89; 40 * MIB]));
        expected.push((topic.to_owned(), 1, 0, "record_too_large".to_owned()));
        for (offset, (reason, record)) in bad_records().iter().enumerate() {
            broker.send(topic, 0, record);
            expected.push((topic.to_owned(), 0, offset as i64, (*reason).to_owned()));
        }
    }
    expected.sort();
    assert_eq!(read(&mut letters, expected.len(), &site).await, expected);
    for topic in ["frames", "more-frames"] {
        broker.send(topic, 0, &Record::frame("stream", "label", START, 7));
    }

    let registry = site.registry("bad-input").await;
    let store = site.store();
    site.until("both good frames", async || {
        (live_frames(registry.as_ref(), &store).await.len() == 2).then_some(())
    })
    .await;
    let metrics = scrape(&site).await;
    let refused = sample(&metrics, "palimpsest_ingest_frames_total", r#"outcome="dead_lettered""#);
    assert_eq!(refused, expected.len() as f64);
    drop(daemon);
}

async fn scrape(site: &Site) -> String {
    get(&site.address().await, "/metrics").await.text().await.unwrap()
}

async fn get(address: &str, path: &str) -> reqwest::Response {
    reqwest::get(format!("{address}{path}")).await.unwrap()
}

/// The value of one sample of the Prometheus text.
fn sample(text: &str, name: &str, label: &str) -> f64 {
    // Not another metric whose name begins with this one.
    let is_it = |line: &str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
    let line = text.lines().find(|line| is_it(line) && line.contains(label));
    let line = line.unwrap_or_else(|| panic!("no sample {name} {label} in\n{text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_published_version_by_version_and_served() {
    let broker = Broker::start(&[("frames", 1), ("dead-letters", 1)]);
    let keep_one = [("retention.periods", "1")];
    let site = Site::new(&broker.address(), "served", &keep_one);
    let mut daemon = site.daemon(None);
    for index in 0..3 {
        frames_of(index, 8, 12).iter().for_each(|record| broker.send("frames", 0, record));
    }
    broker.send("frames", 0, &Record::watermark(period(3).start().plus_ms(LATENESS_MS)));
    let registry = site.registry("served").await;
    let states = [PeriodState::Expired, PeriodState::Expired, PeriodState::Published];
    site.until_periods(registry.as_ref(), "three versions and retention", |periods| {
        periods.iter().map(|period| period.state).eq(states)
    })
    .await;
    assert!(
        site.store().list("served/attempts").await.unwrap().len() < 40,
        "attempts' files are not deleted"
    );

    let address = site.address().await;
    let manifest: serde_json::Value = get(&address, "/v1/versions/latest").await.json().await.unwrap();
    assert_eq!(manifest["version"], "v000003");
    assert_eq!(manifest["parent"], "v000002");
    for file in manifest["files"].as_array().unwrap() {
        let path = file["path"].as_str().unwrap();
        let response = get(&address, &format!("/v1/versions/v000003/files/{path}")).await;
        let tag = response.headers()["etag"].to_str().unwrap().trim_matches('"').to_owned();
        assert_eq!(tag, file["sha256"].as_str().unwrap(), "{path}");
        let bytes = response.bytes().await.unwrap();
        assert_eq!(palimpsest::types::Sha256::of(&bytes).to_string(), tag, "{path}");
    }
    let embedded = reqwest::Client::new()
        .post(format!("{address}/v1/embed?version=latest"))
        .header("content-type", "image/png")
        .body(common::png("label-2-0", 3))
        .send()
        .await
        .unwrap();
    assert_eq!(embedded.status(), 200);
    let embedded: serde_json::Value = embedded.json().await.unwrap();
    assert_eq!(embedded["embeddings"][0].as_array().unwrap().len(), 96);
    assert_eq!(get(&address, "/readyz").await.status(), 200);
    let metrics = scrape(&site).await;
    assert_eq!(sample(&metrics, "palimpsest_latest_version", ""), 3.0);
    assert!(sample(&metrics, "palimpsest_forgetting_average_ratio", r#"probe="knn""#).is_finite());

    daemon.terminate();
    assert!(daemon.ended(&site).await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_frame_joins_the_open_period_and_a_small_period_is_merged_into_the_next() {
    let broker = Broker::start(&[("frames", 1), ("dead-letters", 1)]);
    let site = Site::new(&broker.address(), "late", &[]);
    let _daemon = site.daemon(None);
    let registry = site.registry("late").await;
    // Period 0 has fewer frames than period.min_frames (32).
    frames_of(0, 2, 5).iter().for_each(|record| broker.send("frames", 0, record));
    broker.send(
        "frames",
        0,
        &Record::frame("opener", "label", period(1).start().plus_ms(LATENESS_MS + 1), 1),
    );
    let merged = |periods: &[palimpsest::registry::PeriodRecord]| {
        periods.first().is_some_and(|p| p.state == PeriodState::Merged)
    };
    let periods = site.until_periods(registry.as_ref(), "the merge", merged).await;
    assert_eq!(periods[0].merged_into, Some(period(1)));
    // A frame of the merged period is late.
    broker.send("frames", 0, &Record::frame("late", "label", START.plus_ms(5), 2));
    let joined =
        |periods: &[palimpsest::registry::PeriodRecord]| periods.len() == 2 && periods[1].frames == 12;
    site.until_periods(registry.as_ref(), "the late frame in period 1", joined).await;
    let metrics = scrape(&site).await;
    assert_eq!(sample(&metrics, "palimpsest_ingest_frames_total", r#"outcome="late""#), 1.0);
    assert_eq!(live_frames(registry.as_ref(), &site.store()).await.len(), 12);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quiet_topic_closes_its_period() {
    let broker = Broker::start(&[("frames", 2), ("dead-letters", 1)]);
    let quiet = [("idle.mode", r#""clock""#), ("idle.timeout", r#""1s""#)];
    let site = Site::new(&broker.address(), "quiet", &quiet);
    let _daemon = site.daemon(None);
    // Long past: the wall clock is far beyond the period's end; nothing else ever comes, partition 1 stays empty.
    frames_of(0, 8, 12).iter().for_each(|record| broker.send("frames", 0, record));
    let registry = site.registry("quiet").await;
    let closed = |periods: &[palimpsest::registry::PeriodRecord]| {
        periods.first().is_some_and(|p| p.state == PeriodState::Published)
    };
    site.until_periods(registry.as_ref(), "the quiet period's version", closed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_period_above_max_frames_trains_on_a_deterministic_sample() {
    let broker = Broker::start(&[("frames", 1), ("dead-letters", 1)]);
    frames_of(0, 8, 20).iter().for_each(|record| broker.send("frames", 0, record));
    broker.send("frames", 0, &Record::watermark(START.plus_ms(PERIOD_MS + LATENESS_MS)));
    let mut found = vec![];
    for pipeline in ["sample-a", "sample-b"] {
        let site = Site::new(&broker.address(), pipeline, &[("period.max_frames", "64")]);
        let mut daemon = site.daemon(None);
        let registry = site.registry(pipeline).await;
        let published =
            |periods: &[palimpsest::registry::PeriodRecord]| periods.iter().any(|p| p.version.is_some());
        site.until_periods(registry.as_ref(), "a version", published).await;
        let manifest = registry.version(palimpsest::types::Version(1)).await.unwrap().manifest.unwrap();
        let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
        let trained = manifest["training"]["frames"].as_u64().unwrap();
        let probed = manifest["training"]["probe_frames"].as_u64().unwrap();
        assert!(trained + probed <= 64 && trained >= 16, "{trained} trained, {probed} probed");
        found.push(common::encoders(&registry.versions().await.unwrap()).into_values().next().unwrap());
        daemon.terminate();
        assert!(daemon.ended(&site).await.success());
    }
    assert_eq!(found[0], found[1], "the sample depends on something else than the frames");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_like_an_earlier_periods_probe_frame_is_not_trained_on() {
    let broker = Broker::start(&[("frames", 1), ("dead-letters", 1)]);
    let site = Site::new(&broker.address(), "probed", &[("train.duplicate_distance", "0.1")]);
    let mut daemon = site.daemon(None);
    // Each period has scenes of its own; the second one also shows all of the first's again, with another noise.
    let shown = |index: i64, scene: u64, noise: u64, record: Record| Record {
        value: common::scene(scene, noise),
        key: format!("{}-{index}-{noise}", record.key),
        ..record
    };
    for (index, scenes) in [(0, vec![0]), (1, vec![1, 0])] {
        let mut records = vec![];
        for (number, record) in (0..).zip(frames_of(index, 8, 12)) {
            records.extend(
                scenes.iter().map(|first| shown(index, 1000 * first + number, index as u64, record.clone())),
            );
        }
        records.iter().for_each(|record| broker.send("frames", 0, record));
    }
    broker.send("frames", 0, &Record::watermark(period(2).start().plus_ms(LATENESS_MS)));
    let registry = site.registry("probed").await;
    let done = |periods: &[palimpsest::registry::PeriodRecord]| {
        periods.iter().filter(|period| period.version.is_some()).count() == 2
    };
    site.until_periods(registry.as_ref(), "two versions", done).await;
    let mut training = vec![];
    for version in [1, 2] {
        let manifest = registry.version(palimpsest::types::Version(version)).await.unwrap().manifest.unwrap();
        let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
        let count = |pointer: &str| manifest["training"].pointer(pointer).unwrap().as_u64().unwrap();
        training.push((
            count("/frames"),
            count("/probe_frames"),
            count("/left_out/near_probe"),
            count("/left_out/copies"),
        ));
    }
    let [(_, probed, 0, 0), (trained, set_apart, near, 0)] = training[..] else { panic!("{training:?}") };
    // Of the first period's probe frames, those that are shown again and not set apart again.
    assert!(near > probed / 4 && near <= probed, "{training:?}");
    assert!(trained + set_apart + near <= 192, "{training:?}");
    daemon.terminate();
    assert!(daemon.ended(&site).await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_during_training_writes_a_checkpoint_and_the_next_start_goes_on_from_it() {
    let broker = Broker::start(&[("frames", 1), ("dead-letters", 1)]);
    frames_of(0, 8, 12).iter().for_each(|record| broker.send("frames", 0, record));
    broker.send("frames", 0, &Record::watermark(START.plus_ms(PERIOD_MS + LATENESS_MS)));
    let slow =
        [("train.first_steps", "400"), ("train.max_epochs", "10000"), ("train.checkpoint_steps", "100000")];
    let site = Site::new(&broker.address(), "stopped", &slow);
    let registry = site.registry("stopped").await;
    let mut daemon = site.daemon(None);
    let address = site.address().await;
    site.until("the tenth step", async || {
        let metrics = get(&address, "/metrics").await.text().await.ok()?;
        (sample(&metrics, "palimpsest_train_step", "") >= 10.0).then_some(())
    })
    .await;
    daemon.terminate();
    assert!(daemon.ended(&site).await.success());
    assert!(common::training_processes(site.folder.path()).is_empty());
    let checkpoints = site.store().list("stopped/attempts").await.unwrap();
    assert!(checkpoints.iter().any(|path| path.contains("/checkpoints/")), "{checkpoints:?}");

    let mut daemon = site.daemon(None);
    let done = |periods: &[palimpsest::registry::PeriodRecord]| periods.iter().any(|p| p.version.is_some());
    site.until_periods(registry.as_ref(), "the version", done).await;
    assert!(site.log().contains("resumed"), "{}", common::tail(&site.log()));
    daemon.terminate();
    assert!(daemon.ended(&site).await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_closes_promotes_and_rolls_back() {
    let broker = Broker::start(&[("frames", 1), ("dead-letters", 1)]);
    let site = Site::new(&broker.address(), "operator", &[]);
    let _daemon = site.daemon(None);
    let registry = site.registry("operator").await;
    for index in 0..2 {
        frames_of(index, 8, 12).iter().for_each(|record| broker.send("frames", 0, record));
    }
    // Only period 0 is closed by the watermark: period 1 waits for the operator.
    let has = |n: usize| {
        move |periods: &[palimpsest::registry::PeriodRecord]| {
            periods.iter().filter(|p| p.version.is_some()).count() == n
        }
    };
    site.until_periods(registry.as_ref(), "the first version", has(1)).await;
    let run = |arguments: &[&str]| {
        let output = site.command(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    run(&["periods", "close", &period(1).to_string()]);
    site.until_periods(registry.as_ref(), "the second version", has(2)).await;
    assert!(run(&["versions", "list"]).contains("v000002"));
    run(&["versions", "promote", "v000001"]);
    let latest = get(&site.address().await, "/v1/versions/latest").await;
    let manifest: serde_json::Value = latest.json().await.unwrap();
    assert_eq!(manifest["version"], "v000001");
    assert!(run(&["periods", "list"]).contains("published"));
    let refused = site.command(&["periods", "retry", &period(1).to_string()]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2), "a published period can't be tried again");
    assert!(run(&["positions", "list"]).contains("frames"));
    assert!(run(&["config", "show"]).contains("resnet_small"));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_labels_a_candidate_that_drifted_from_its_parent_is_refused() {
    use PeriodState::{Published, Rejected};
    // Steps that nothing holds back, so large that two of three neighbours change; but frames of a label differ in noise alone, and
    // some 99 % of the neighbourhoods are retained. What nothing that moved can fulfil is asked for.
    let drifting = [
        ("train.method", r#""finetune""#),
        ("train.learning_rate", "0.1"),
        ("gate.min_neighbour_retention", "1.0"),
    ];
    for (labelled, second) in [(true, Published), (false, Rejected)] {
        let broker = Broker::start(&[("frames", 1), ("dead-letters", 1)]);
        let site = Site::new(&broker.address(), "drifted", &drifting);
        let mut daemon = site.daemon(None);
        for mut record in (0..2).flat_map(|index| frames_of(index, 8, 12)) {
            record.headers.retain(|(name, _)| labelled || name != "label");
            broker.send("frames", 0, &record);
        }
        broker.send("frames", 0, &Record::watermark(period(2).start().plus_ms(LATENESS_MS)));
        let registry = site.registry("drifted").await;
        let ended = |periods: &[palimpsest::registry::PeriodRecord]| {
            periods.iter().map(|period| period.state).eq([Published, second])
        };
        let periods = site.until_periods(registry.as_ref(), "the verdicts", ended).await;
        let refused = sample(&scrape(&site).await, "palimpsest_gate_verdicts_total", r#"reason="drifted""#);
        assert_eq!(refused, if labelled { 0.0 } else { 1.0 });
        if !labelled {
            let reason = periods[1].reason.as_ref().unwrap();
            let named = format!("drifted too far on {}", period(0));
            assert!(reason.contains(&named) && reason.contains("v000001"), "{reason}");
        }
        daemon.terminate();
        assert!(daemon.ended(&site).await.success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_candidate_gets_no_number_and_can_be_tried_again() {
    let broker = Broker::start(&[("frames", 1), ("dead-letters", 1)]);
    frames_of(0, 8, 12).iter().for_each(|record| broker.send("frames", 0, record));
    broker.send("frames", 0, &Record::watermark(START.plus_ms(PERIOD_MS + LATENESS_MS)));
    let site = Site::new(&broker.address(), "refused", &[("gate.min_effective_rank", "4096.0")]);
    let registry = site.registry("refused").await;
    let mut daemon = site.daemon(None);
    let in_state = |state| {
        move |periods: &[palimpsest::registry::PeriodRecord]| {
            periods.first().is_some_and(|p| p.state == state)
        }
    };
    let periods = site.until_periods(registry.as_ref(), "the refusal", in_state(PeriodState::Rejected)).await;
    assert!(periods[0].reason.as_ref().unwrap().contains("collapsed"), "{periods:?}");
    assert!(registry.versions().await.unwrap().is_empty());
    let address = site.address().await;
    assert_eq!(get(&address, "/v1/versions/latest").await.status(), 404);
    let metrics = scrape(&site).await;
    assert_eq!(sample(&metrics, "palimpsest_gate_verdicts_total", r#"reason="collapsed""#), 1.0);
    daemon.terminate();
    assert!(daemon.ended(&site).await.success());

    let file = site.path("palimpsest.toml");
    let text = std::fs::read_to_string(&file).unwrap().replace("4096.0", "1.0");
    std::fs::write(&file, text).unwrap();
    assert!(site.command(&["periods", "retry", &period(0).to_string()]).status().unwrap().success());
    let mut daemon = site.daemon(None);
    let periods =
        site.until_periods(registry.as_ref(), "the version", in_state(PeriodState::Published)).await;
    assert_eq!((periods[0].retries, periods[0].attempt), (1, 2));
    daemon.terminate();
    assert!(daemon.ended(&site).await.success());
}
