//! The operator's commands other than `run`, `train` and `demo`: each opens the registry, does one thing, says what it did.
//!
//! On a terminal the output is for people (tables), otherwise JSON lines, one record each.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Subcommand;
use indicatif::ProgressBar;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::app::Deployment;
use crate::config::Config;
use crate::produce::{self, CaptureTimes, ProduceSettings, ProduceSource};
use crate::registry::{LATEST, PositionRecord, Registry, RegistryError};
use crate::supervisor::cancel_on_signals;
use crate::types::{EventTime, PeriodId, TopicPartition, Version, is_alias_name};

/// The words or the configuration were wrong: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct WrongUsage(pub String);

#[derive(Subcommand)]
pub enum VersionsAction {
    /// All published versions with their scores.
    List,
    /// One version's manifest.
    Show {
        /// v000042, 42 or an alias such as latest.
        #[arg(id = "name", value_name = "VERSION")]
        version: String,
    },
    /// Move an alias to a version: how a version is promoted or rolled back.
    Promote {
        /// v000042, 42 or another alias.
        #[arg(id = "name", value_name = "VERSION")]
        version: String,
        /// Alias to move; made if it does not exist.
        #[arg(long, default_value = LATEST)]
        alias: String,
    },
}

#[derive(Subcommand)]
pub enum PeriodsAction {
    /// All periods with their states.
    List,
    /// One period, its attempts and its segments.
    Show { period: PeriodId },
    /// Close an open period, and every open one before it, whatever the watermark.
    Close { period: PeriodId },
    /// Train a rejected or failed period again, with new random numbers. Only while no later period has begun training.
    Retry { period: PeriodId },
}

#[derive(Subcommand)]
pub enum PositionsAction {
    /// Position and watermark of every partition.
    List,
    /// Set where a partition goes on: what lies between is skipped, or read twice. Stop its ingest first.
    Reset {
        #[arg(long)]
        topic: String,
        #[arg(long)]
        partition: i32,
        /// Next offset to read.
        #[arg(long)]
        offset: i64,
    },
}

#[derive(clap::Args)]
pub struct ProduceArguments {
    /// Folder with LABEL/STREAM-NUMBER.jpg (.png, .webp), or a Parquet file with an image column.
    #[arg(value_name = "SOURCE")]
    source: PathBuf,
    /// Topic to send to. Without it: the first of kafka.topics.
    #[arg(long)]
    topic: Option<String>,
    /// Frames a second; 0: as fast as the brokers take them.
    #[arg(long, default_value_t = 0.0, value_name = "FRAMES")]
    rate: f64,
    /// Capture time of the first frame, RFC 3339. Without it: what a Parquet file says, or now.
    #[arg(long, value_name = "INSTANT")]
    start: Option<EventTime>,
    /// Each stream is spread evenly from --start to here, all streams at once. Without it: --interval.
    #[arg(long, value_name = "INSTANT", requires = "start")]
    end: Option<EventTime>,
    /// Milliseconds between the capture times of one frame and the next.
    #[arg(long, default_value_t = 1000, value_name = "MS", conflicts_with = "end")]
    interval: i64,
    /// Ends with this watermark in every partition: no earlier frame follows. Closes periods up to it.
    #[arg(long, value_name = "INSTANT")]
    watermark: Option<EventTime>,
    /// Frames a record: 1 sends encoded images, more sends Arrow batches.
    #[arg(long, default_value_t = 1, value_name = "FRAMES")]
    batch: usize,
}

/// Reads the configuration; every mistake is told at once, as wrong usage.
pub fn load(file: Option<&Path>) -> Result<Config> {
    Config::load(file).map_err(|mistakes| WrongUsage(mistakes.to_string()).into())
}

pub fn check(file: Option<&Path>) -> Result<()> {
    load(file)?;
    let name = file.map_or_else(|| "the defaults".to_owned(), |file| file.display().to_string());
    println!("{name}: every key is as it should be");
    Ok(())
}

pub fn show(file: Option<&Path>) -> Result<()> {
    print!("{}", load(file)?.show());
    Ok(())
}

pub async fn migrate(config: &Config) -> Result<()> {
    Deployment::open(config).await?;
    println!("the registry's schema is up to date");
    Ok(())
}

pub async fn produce(config: &Config, arguments: ProduceArguments) -> Result<()> {
    let is_folder = arguments.source.is_dir();
    let settings = ProduceSettings {
        properties: crate::app::kafka_properties(config),
        topic: arguments.topic.unwrap_or_else(|| config.kafka.topics[0].clone()),
        times: match (arguments.start, arguments.end) {
            (Some(start), Some(end)) => CaptureTimes::Spread { start, end },
            (Some(start), None) => CaptureTimes::Every { start, interval_ms: arguments.interval },
            (None, _) if is_folder => {
                CaptureTimes::Every { start: crate::app::clock()(), interval_ms: arguments.interval }
            }
            (None, _) => CaptureTimes::Recorded,
        },
        source: match is_folder {
            true => ProduceSource::Folder(arguments.source),
            false => ProduceSource::Parquet(arguments.source),
        },
        frames_per_second: arguments.rate,
        rows_per_record: arguments.batch.max(1),
        watermark: arguments.watermark,
        pacing: None,
    };
    let cancel = CancellationToken::new();
    tokio::spawn(cancel_on_signals(cancel.clone()));
    let bar = ProgressBar::new(0);
    let done = produce::produce(
        settings,
        |progress| {
            bar.set_length(progress.total_frames);
            bar.set_position(progress.frames);
        },
        cancel,
    );
    let done = done.await?;
    bar.finish_and_clear();
    println!("{} of {} frames sent, {} bytes of images", done.frames, done.total_frames, done.bytes);
    Ok(())
}

pub async fn versions(config: &Config, action: VersionsAction) -> Result<()> {
    let deployment = Deployment::open(config).await?;
    let registry = deployment.registry.as_ref();
    match action {
        VersionsAction::List if is_for_people() => {
            println!("{}", crate::app::versions::versions_table(registry).await?)
        }
        VersionsAction::List => {
            for version in registry.versions().await?.into_iter().filter(|version| version.visible) {
                print_line(&version)?;
            }
        }
        VersionsAction::Show { version } => {
            let version = resolve(&deployment, &version).await?;
            let manifest = registry.version(version).await?.manifest;
            println!("{}", manifest.ok_or_else(|| WrongUsage(format!("{version} is not published")))?);
        }
        VersionsAction::Promote { version, alias } => {
            if !is_alias_name(&alias) {
                return Err(WrongUsage(format!(
                    "--alias {alias:?}: an alias is 1 to 63 of a-z, 0-9 and -, and no version"
                ))
                .into());
            }
            let version = resolve(&deployment, &version).await?;
            registry.set_alias(&alias, version).await.map_err(as_usage)?;
            println!("{alias} names {version}");
        }
    }
    Ok(())
}

/// A version by number or by the alias that names it.
async fn resolve(deployment: &Deployment, name: &str) -> Result<Version> {
    if let Ok(version) = name.parse() {
        return Ok(version);
    }
    let aliases = deployment.registry.aliases().await?;
    let found = aliases.get(name).copied();
    found.ok_or_else(|| WrongUsage(format!("there is no version and no alias {name:?}")).into())
}

pub async fn periods(config: &Config, action: PeriodsAction) -> Result<()> {
    let deployment = Deployment::open(config).await?;
    let registry = deployment.registry.as_ref();
    match action {
        PeriodsAction::List => {
            let periods = registry.periods().await?;
            let head = ["period", "end", "state", "frames", "bytes", "attempt", "version", "reason"];
            print_records(&head, &periods, |p| {
                vec![
                    p.id.to_string(),
                    p.end.to_string(),
                    p.state.as_str().to_owned(),
                    p.frames.to_string(),
                    p.bytes.to_string(),
                    p.attempt.to_string(),
                    p.version.map(|version| version.to_string()).unwrap_or_default(),
                    p.reason.clone().unwrap_or_default(),
                ]
            })?;
        }
        PeriodsAction::Show { period } => {
            let record = registry.period(period).await.map_err(as_usage)?;
            print_line(&record)?;
            for number in 1..=record.attempt {
                print_line(&registry.attempt(period, number).await?)?;
            }
            for segment in registry.segments(period).await? {
                print_line(&segment)?;
            }
        }
        PeriodsAction::Close { period } => {
            registry.request_close(period).await.map_err(as_usage)?;
            println!("{period} will be closed, and every open period before it");
        }
        PeriodsAction::Retry { period } => {
            registry.retry(period).await.map_err(as_usage)?;
            println!("{period} will be trained again");
        }
    }
    Ok(())
}

pub async fn positions(config: &Config, action: PositionsAction) -> Result<()> {
    let deployment = Deployment::open(config).await?;
    let positions = deployment.registry.positions().await?;
    match action {
        PositionsAction::List => {
            let lines: Vec<PositionLine> = positions.iter().map(PositionLine::of).collect();
            print_records(&["partition", "position", "watermark"], &lines, |line| {
                let or_none = |text: Option<String>| text.unwrap_or_else(|| "none yet".to_owned());
                vec![
                    line.partition.to_string(),
                    or_none(line.position.map(|position| position.to_string())),
                    or_none(line.watermark.map(|watermark| watermark.to_string())),
                ]
            })
        }
        PositionsAction::Reset { topic, partition, offset } => {
            let known = positions.iter().map(|record| &record.partition);
            let Some(found) = known.into_iter().find(|p| p.topic == topic && p.partition == partition) else {
                return Err(
                    WrongUsage(format!("partition {partition} of topic {topic:?} is not known")).into()
                );
            };
            deployment.registry.reset_position(found, offset).await?;
            println!("{found} goes on at offset {offset}");
            Ok(())
        }
    }
}

#[derive(Serialize)]
struct PositionLine {
    partition: TopicPartition,
    position: Option<i64>,
    watermark: Option<EventTime>,
}

impl PositionLine {
    fn of(record: &PositionRecord) -> Self {
        let PositionRecord { partition, position, watermark, .. } = record;
        Self { partition: partition.clone(), position: *position, watermark: *watermark }
    }
}

/// What the operator asked for can't be done with what is there: that is usage, not a failure of ours.
fn as_usage(error: RegistryError) -> anyhow::Error {
    match error {
        RegistryError::NotFound { .. } | RegistryError::WrongState { .. } => {
            WrongUsage(error.to_string()).into()
        }
        other => other.into(),
    }
}

fn is_for_people() -> bool {
    std::io::stdout().is_terminal()
}

fn print_line(record: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(record)?);
    Ok(())
}

fn print_records<T: Serialize>(head: &[&str], records: &[T], row: impl Fn(&T) -> Vec<String>) -> Result<()> {
    if !is_for_people() {
        return records.iter().try_for_each(print_line);
    }
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY).set_header(head.to_vec());
    table.add_rows(records.iter().map(row));
    println!("{table}");
    Ok(())
}
