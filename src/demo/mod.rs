//! The main job in a few minutes on one machine: `palimpsest demo`.
//!
//! An in-process Kafka-protocol broker, the daemon with every role, and a producer that replays three periods of
//! real frames through it. Each period closes by watermark, is trained on in a child process and published.
//! Everything is what `palimpsest run` uses; only the broker, the small model and the progress bars are the demo's.

mod bars;
mod results;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::FutureExt;
use rdkafka::mocking::MockCluster;
use tokio_util::sync::CancellationToken;

use crate::app::{self, Daemon, Extras, Roles};
use crate::cli::WrongUsage;
use crate::config::Config;
use crate::produce::{self, CaptureTimes, Pacing, ProduceSettings, ProduceSource};
use crate::registry::sqlite::SqliteRegistry;
use crate::registry::{PeriodRecord, PeriodState, Registry};
use crate::supervisor::cancel_on_signals;
use crate::types::{EventTime, PeriodId};
use bars::Bars;

/// 2026-01-01T00:00:00Z: the frames are replayed as if captured from then on, one hour a period.
const START: EventTime = EventTime::from_ms(1_767_225_600_000);
const PERIOD_MS: i64 = 3_600_000;
const LATENESS_MS: i64 = 60_000;
const TOPIC: &str = "frames";
const PARTITIONS: i32 = 2;
/// The broker keeps 5 MiB a partition and drops the oldest beyond: the producer stays this far behind that.
const AHEAD_BYTES: u64 = 2 << 20;
/// Frames a second: a period's frames take a few seconds, so that the bars can be watched.
const RATE: f64 = 300.0;
/// Marks a folder as a demo's, which the next demo may empty.
const MARK: &str = ".palimpsest-demo";

#[derive(clap::Args)]
pub struct DemoArguments {
    /// Folder for all that the demo writes. One that a former demo left is emptied first.
    #[arg(long, default_value = "palimpsest-demo", value_name = "DIR")]
    dir: PathBuf,
    /// Frames: a folder a period, in each LABEL/STREAM-NUMBER.jpg.
    #[arg(long, default_value = "samples/freedoom", value_name = "DIR")]
    frames: PathBuf,
    /// What holds the student to its teacher.
    #[arg(long, default_value = "lwf", value_parser = ["lwf", "cassle", "finetune"])]
    method: String,
    /// Steps of the first period.
    #[arg(long, default_value_t = 400)]
    first_steps: u64,
    /// Steps of each later period.
    #[arg(long, default_value_t = 250)]
    steps: u64,
    /// Seed of weights, batches and augmentations.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// One period of the replay.
struct Chapter {
    folder: PathBuf,
    frames: u64,
    period: PeriodId,
    end: EventTime,
}

pub async fn run(arguments: DemoArguments) -> Result<()> {
    let chapters = chapters(&arguments.frames)?;
    prepare_folder(&arguments.dir)?;
    let broker = broker()?;
    let config = configure(&arguments, &broker.bootstrap_servers())?;
    let bars = Arc::new(Bars::new());
    say_what_comes(&arguments, &chapters);
    let listener = {
        let bars = Arc::clone(&bars);
        Arc::new(move |period, progress: &_| bars.training(period, progress))
    };
    let log = arguments.dir.join("daemon.log");
    let extras = Extras { listener: Some(listener), log: Some(log), identity: Some(identity()) };
    let daemon = Daemon::start(&config, Roles { ingest: true, learn: true, serve: true }, extras).await?;
    tokio::spawn(cancel_on_signals(daemon.stop.clone()));
    let stopped: CancellationToken = daemon.stop.clone();
    let played = tokio::select! {
        played = play(&daemon, &config, &chapters, &bars) => played,
        // By Ctrl-C, or because a part of it failed: how it ended tells.
        () = stopped.cancelled() => Err(anyhow::anyhow!("stopped before the end; nothing is left running")),
    };
    bars.finish();
    let shown = match played {
        Ok(periods) => results::show(&daemon, &arguments, &chapters, &periods).await,
        Err(error) => Err(error),
    };
    daemon.stopped().await?;
    shown
}

/// The folders of the frames, in order, with the time that each is replayed in.
fn chapters(frames: &Path) -> Result<Vec<Chapter>> {
    let unreadable = || {
        WrongUsage(format!("--frames {}: no such folder; run the demo in the repository", frames.display()))
    };
    let entries = std::fs::read_dir(frames).map_err(|_| unreadable())?;
    let mut folders: Vec<PathBuf> =
        entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
    folders.retain(|path| path.is_dir());
    folders.sort();
    if folders.is_empty() {
        return Err(WrongUsage(format!("--frames {}: holds no folder of a period", frames.display())).into());
    }
    let chapters = folders.into_iter().enumerate().map(|(index, folder)| {
        let start = START.plus_ms(index as i64 * PERIOD_MS);
        let end = start.plus_ms(PERIOD_MS);
        let planned =
            produce::plan(&ProduceSource::Folder(folder.clone()), CaptureTimes::Spread { start, end })?;
        Ok(Chapter { folder, frames: planned.len() as u64, period: PeriodId(start), end })
    });
    chapters.collect()
}

fn prepare_folder(dir: &Path) -> Result<()> {
    let is_empty = || std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
    if dir.join(MARK).exists() {
        println!("Emptying {}, which a former demo left.", dir.display());
        std::fs::remove_dir_all(dir).with_context(|| format!("{} can't be emptied", dir.display()))?;
    } else if dir.exists() && !is_empty() {
        bail!(WrongUsage(format!("--dir {}: exists and is not a demo's", dir.display())));
    }
    std::fs::create_dir_all(dir)?;
    std::fs::write(
        dir.join(MARK),
        "made by `palimpsest demo`, which empties this folder when it runs again\n",
    )?;
    Ok(())
}

fn broker() -> Result<MockCluster<'static, rdkafka::producer::DefaultProducerContext>> {
    let broker = MockCluster::new(1).context("the in-process broker can't be started")?;
    broker.create_topic(TOPIC, PARTITIONS, 1)?;
    broker.create_topic("dead-letters", 1, 1)?;
    Ok(broker)
}

/// The broker's offsets begin anew with each run, so its topics are others than those of a former run.
fn identity() -> String {
    format!("demo-{}-{}", std::process::id(), app::clock()().as_ms())
}

/// Writes the demo's configuration and reads it as `palimpsest run` would.
fn configure(arguments: &DemoArguments, brokers: &str) -> Result<Config> {
    let dir = std::path::absolute(&arguments.dir)?;
    let DemoArguments { method, first_steps, steps, seed, .. } = arguments;
    let text = format!(
        r#"# The demo's configuration. Its broker is gone when the demo ends; what it published can be served again:
#   palimpsest run --role serve --config {dir}/palimpsest.toml
[pipeline]
name = "demo"
[store]
url = "{dir}/objects"
[registry]
url = "sqlite://{dir}/registry.db"
[kafka]
brokers = ["{brokers}"]
topics = ["{TOPIC}"]
dead_letter_topic = "dead-letters"
[ingest]
flush_age = "1s"
[idle]
mode = "hold"
[period]
length = "1h"
lateness = "1m"
min_frames = 256
[model]
architecture = "resnet_small"
image_size = 32
projector_hidden = 256
projector_dim = 64
[train]
method = "{method}"
batch = 64
first_steps = {first_steps}
steps = {steps}
learning_rate = 0.003
seed = {seed}
checkpoint_steps = 100
priority = "normal"
[augment]
crop_scale = [0.3, 1.0]
jitter = [0.4, 0.4, 0.4, 0.1]
blur_probability = 0.0
[probe]
block = "1h"
guard = "0s"
ratio = 0.3
[gate]
max_forgetting_parent = 0.2
max_forgetting_cumulative = 0.3
[serve]
bind = "127.0.0.1:0"
[log]
format = "json"
"#,
        dir = dir.display(),
    );
    let path = dir.join("palimpsest.toml");
    std::fs::write(&path, text)?;
    crate::cli::load(Some(&path))
}

fn say_what_comes(arguments: &DemoArguments, chapters: &[Chapter]) {
    println!(
        "Three steps, once for each of {} periods of frames from {}:",
        chapters.len(),
        arguments.frames.display()
    );
    println!(
        "  frames    through an in-process Kafka broker into Parquet segments, until the watermark closes the period"
    );
    println!(
        "  training  SimCLR; from the second period on held to the published version by {}",
        arguments.method
    );
    println!("  gate      what was learned and forgotten decides on publication\n");
}

/// Replays every chapter and waits until each period is settled.
async fn play(
    daemon: &Daemon,
    config: &Config,
    chapters: &[Chapter],
    bars: &Arc<Bars>,
) -> Result<Vec<PeriodRecord>> {
    chapters
        .iter()
        .for_each(|chapter| bars.expect(chapter.period, &name_of(&chapter.folder), chapter.frames));
    let producing = async {
        for (index, chapter) in chapters.iter().enumerate() {
            let is_last = index + 1 == chapters.len();
            produce_chapter(daemon, config, chapter, is_last).await?;
        }
        Ok::<_, anyhow::Error>(())
    };
    let ((), periods) = tokio::try_join!(producing, watch(daemon, chapters, bars))?;
    Ok(periods)
}

fn name_of(folder: &Path) -> String {
    folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// A period is over when frames of the next one come; the last one when its watermark is stated.
async fn produce_chapter(daemon: &Daemon, config: &Config, chapter: &Chapter, is_last: bool) -> Result<()> {
    let watermark = if is_last { chapter.end.plus_ms(LATENESS_MS) } else { chapter.end };
    let settings = ProduceSettings {
        properties: app::kafka_properties(config),
        topic: TOPIC.into(),
        source: ProduceSource::Folder(chapter.folder.clone()),
        times: CaptureTimes::Spread { start: chapter.period.start(), end: chapter.end },
        frames_per_second: RATE,
        rows_per_record: 1,
        watermark: Some(watermark),
        pacing: Some(pacing(&daemon.deployment.registry)),
    };
    produce::produce(settings, |_| {}, daemon.stop.clone()).await?;
    Ok(())
}

/// The broker keeps little: the producer waits for the positions that the registry holds.
fn pacing(registry: &Arc<SqliteRegistry>) -> Pacing {
    let registry = Arc::clone(registry);
    let consumed = move |partition| {
        let registry = Arc::clone(&registry);
        async move {
            // While it can't be told, nothing counts as consumed: the producer asks again.
            let positions = registry.positions().await.unwrap_or_default();
            let found =
                positions.iter().find(|p| p.partition.topic == TOPIC && p.partition.partition == partition);
            found.and_then(|record| record.position).unwrap_or(0)
        }
        .boxed()
    };
    Pacing { max_ahead_bytes: AHEAD_BYTES, consumed: Arc::new(consumed) }
}

/// Redraws the bars until every chapter's period is settled.
async fn watch(daemon: &Daemon, chapters: &[Chapter], bars: &Bars) -> Result<Vec<PeriodRecord>> {
    loop {
        let periods = daemon.deployment.registry.periods().await?;
        periods.iter().for_each(|period| bars.period(period));
        let settled =
            |chapter: &Chapter| periods.iter().any(|p| p.id == chapter.period && is_settled(p.state));
        if chapters.iter().all(settled) {
            return Ok(periods);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn is_settled(state: PeriodState) -> bool {
    use PeriodState::{Expired, Failed, Merged, Published, Rejected};
    matches!(state, Published | Rejected | Failed | Expired | Merged)
}
