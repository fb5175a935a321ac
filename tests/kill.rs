//! The process dies at every durable step, just before and just after the write, and is started again.
//!
//! Afterwards every frame is in exactly one live segment, every period has exactly one visible version, and its
//! encoder has the bytes of a run that nobody interrupted. Points in the daemon abort it; points in the
//! training process abort that one, and then the daemon is killed as well (SIGKILL) and must leave no child.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{
    Broker, LATENESS_MS, Record, Site, encoders, frames_of, live_frames, period, training_processes,
};
use palimpsest::registry::{PeriodState, Registry};
use palimpsest::types::PeriodId;

/// In the daemon: ingest, close, bookkeeping of training and evaluation, publication, retention.
const DAEMON_POINTS: &[&str] = &[
    "ingest.dead_letter",
    "ingest.flush.put",
    "registry.start_position",
    "registry.commit_flush",
    "ingest.kafka_commit",
    "registry.seal",
    "registry.begin_attempt",
    "registry.begin_start",
    "learn.job.put",
    "registry.set_evaluating",
    "registry.reserve_version",
    "publish.probe_set",
    "publish.card",
    "publish.copy",
    "publish.manifest",
    "registry.publish",
];

/// In the training process.
const TRAINING_POINTS: &[&str] =
    &["worker.probe_set", "worker.checkpoint", "worker.candidate", "worker.outcome"];

/// Frames of the two periods that are trained on; a third one opens and stays open.
const STREAMS: usize = 8;
const FRAMES_PER_STREAM: usize = 12;

struct Stream {
    broker: Broker,
    /// Records of partition 0 and of partition 1 that hold good frames.
    good_frames: usize,
}

/// Two periods over two partitions, one broken record, and punctuation that closes both.
fn stream() -> Stream {
    let broker = Broker::start(&[("frames", 2), ("dead-letters", 1)]);
    let mut good_frames = 0;
    for index in 0..2 {
        for (i, record) in frames_of(index, STREAMS, FRAMES_PER_STREAM).iter().enumerate() {
            broker.send("frames", (i % 2) as i32, record);
            good_frames += 1;
        }
        broker.send("frames", 0, &Record::of("image/png", b"not a picture".to_vec()));
        let closes = period(index + 1).start().plus_ms(LATENESS_MS);
        (0..2).for_each(|partition| broker.send("frames", partition, &Record::watermark(closes)));
    }
    Stream { broker, good_frames }
}

/// Runs the daemon to the end of the stream and checks everything; returns the encoders' hashes.
async fn finish(site: &Site, pipeline: &str, stream: &Stream) -> BTreeMap<PeriodId, String> {
    let mut daemon = site.daemon(None);
    let registry = site.registry(pipeline).await;
    let published = |state| state == PeriodState::Published;
    site.until_periods(registry.as_ref(), "two published periods", |periods| {
        periods.len() >= 2 && periods.iter().take(2).all(|period| published(period.state))
    })
    .await;
    daemon.terminate();
    let status = daemon.ended(site).await;
    assert!(status.success(), "the daemon ended with {status}\n{}", common::tail(&site.log()));
    let frames = live_frames(registry.as_ref(), &site.store()).await;
    assert_eq!(frames.len(), stream.good_frames, "frames in live segments");
    assert!(frames.values().all(|&times| times == 1), "a frame is in two live segments");
    let encoders = encoders(&registry.versions().await.unwrap());
    assert_eq!(encoders.keys().copied().collect::<Vec<_>>(), [period(0), period(1)]);
    encoders
}

/// A pipeline name for each scenario: consumer group and registry keys of its own.
fn pipeline_of(scenario: &str) -> String {
    scenario.replace(['.', '_', '#'], "-")
}

async fn reference(stream: &Stream) -> BTreeMap<PeriodId, String> {
    let site = Site::new(&stream.broker.address(), "reference", &[]);
    finish(&site, "reference", stream).await
}

async fn daemon_dies_at(point: &str, stream: &Stream, expected: &BTreeMap<PeriodId, String>) {
    let pipeline = pipeline_of(point);
    let site = Site::new(&stream.broker.address(), &pipeline, &[]);
    let mut daemon = site.daemon(Some(point));
    let status = daemon.ended(&site).await;
    assert!(
        site.log().contains(&format!("aborting at {}", point.split('#').next().unwrap())),
        "{point}: {status}"
    );
    assert_eq!(finish(&site, &pipeline, stream).await, *expected, "encoders after a death at {point}");
}

async fn training_dies_at(point: &str, stream: &Stream, expected: &BTreeMap<PeriodId, String>) {
    let pipeline = pipeline_of(point);
    let site = Site::new(&stream.broker.address(), &pipeline, &[]);
    let mut daemon = site.daemon(Some(point));
    let aborting = format!("aborting at {point}");
    site.until(&aborting, async || site.log().contains(&aborting).then_some(())).await;
    daemon.kill();
    let none_left = async || training_processes(site.folder.path()).is_empty().then_some(());
    site.until("the children of the killed daemon to end", none_left).await;
    assert_eq!(finish(&site, &pipeline, stream).await, *expected, "encoders after a death at {point}");
}

/// Scenarios wait more than they compute: several at a time.
const AT_ONCE: usize = 4;

async fn all(points: Vec<String>, in_daemon: bool) {
    use futures::StreamExt;
    let stream = stream();
    let expected = reference(&stream).await;
    let scenarios = points.iter().map(|point| {
        let (stream, expected) = (&stream, &expected);
        async move {
            match in_daemon {
                true => daemon_dies_at(point, stream, expected).await,
                false => training_dies_at(point, stream, expected).await,
            }
        }
    });
    futures::stream::iter(scenarios).buffer_unordered(AT_ONCE).collect::<Vec<()>>().await;
}

fn before_and_after(points: &[&str]) -> Vec<String> {
    points.iter().flat_map(|point| [before(point), after(point)]).collect()
}

/// Failpoints of the registry are named after the commit, the others after what they write.
fn before(point: &str) -> String {
    name_of(point, "before")
}

fn after(point: &str) -> String {
    name_of(point, "after")
}

fn name_of(point: &str, side: &str) -> String {
    match point.rsplit_once('.') {
        _ if point.starts_with("registry.") => format!("{point}.{side}_commit"),
        Some((stage, "put")) => format!("{stage}.{side}_put"),
        _ => format!("{point}.{side}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_at_any_durable_step_loses_and_doubles_nothing() {
    all(before_and_after(DAEMON_POINTS), true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_training_process_killed_at_any_durable_step_ends_with_the_same_weights() {
    all(before_and_after(TRAINING_POINTS), false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_while_it_deletes_leaves_nothing_behind() {
    let stream = stream();
    for point in [
        "learn.expire.after_attempts",
        "registry.expire.after_commit",
        "learn.expire.before_delete",
        "learn.expire.after_delete",
    ] {
        let pipeline = pipeline_of(point);
        let keep_one = [("retention.periods", "1")];
        let site = Site::new(&stream.broker.address(), &pipeline, &keep_one);
        let mut daemon = site.daemon(Some(point));
        daemon.ended(&site).await;
        assert!(site.log().contains(&format!("aborting at {point}")), "{}", common::tail(&site.log()));
        let _daemon = site.daemon(None);
        let registry = site.registry(&pipeline).await;
        let states = [PeriodState::Expired, PeriodState::Published];
        site.until_periods(registry.as_ref(), "the first period's expiry", |periods| {
            periods.iter().map(|period| period.state).eq(states)
        })
        .await;
        let store = site.store();
        let left = async || {
            let segments = store.list(&format!("{pipeline}/segments/{}", period(0))).await.ok()?;
            let attempts = store.list(&format!("{pipeline}/attempts/{}", period(0))).await.ok()?;
            (segments.is_empty() && attempts.is_empty()).then_some(())
        };
        site.until(&format!("the first period's objects to go after a death at {point}"), left).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_child_outlives_a_daemon_that_is_killed_while_it_trains() {
    let stream = stream();
    let slow = [("train.first_steps", "100000"), ("train.max_epochs", "100000")];
    let site = Site::new(&stream.broker.address(), "orphan", &slow);
    let mut daemon = site.daemon(None);
    let running = async || {
        let found = training_processes(site.folder.path());
        (!found.is_empty() && site.log().contains("training")).then_some(())
    };
    site.until("a training process", running).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    daemon.kill();
    let none_left = async || training_processes(site.folder.path()).is_empty().then_some(());
    site.until("the children of the killed daemon to end", none_left).await;
}
