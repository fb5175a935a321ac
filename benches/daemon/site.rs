//! The daemon's folder: its configuration, registry, objects and log; the daemon itself as a process of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use palimpsest::registry::sqlite::SqliteRegistry;
use palimpsest::registry::{PeriodRecord, Registry};
use palimpsest::types::{EventTime, PeriodId};

use crate::broker::{DEAD_LETTERS, TOPIC};

pub const PIPELINE: &str = "bench";
/// 2026-01-01T00:00:00Z, a whole number of periods since 1970.
const START: EventTime = EventTime::from_ms(1_767_225_600_000);
pub const PERIOD_MS: i64 = 3_600_000;
pub const LATENESS_MS: i64 = 60_000;
/// Longer than any wait here takes on a loaded machine, so that a hang ends with the log's last lines.
const PATIENCE: Duration = Duration::from_secs(300);
const LOOK_EVERY: Duration = Duration::from_millis(50);
const LOG_LINES: usize = 30;

pub fn period(index: usize) -> PeriodId {
    PeriodId(START.plus_ms(index as i64 * PERIOD_MS))
}

pub struct Site {
    folder: tempfile::TempDir,
    pub registry: SqliteRegistry,
    daemon: Child,
    /// `http://HOST:PORT`
    pub address: String,
}

impl Site {
    /// Writes the configuration (`settings` over what every benchmark wants, `set` over both) and starts the daemon.
    pub async fn start(brokers: &str, settings: &[(&str, &str)], set: &[String]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let text = configuration(folder.path(), brokers, settings, set)?;
        std::fs::write(folder.path().join("palimpsest.toml"), text)?;
        let url = format!("sqlite://{}", folder.path().join("registry.db").display());
        let registry = SqliteRegistry::open(&url, PIPELINE).await?;
        registry.migrate().await?;
        let daemon = spawn(folder.path())?;
        let mut site = Self { folder, registry, daemon, address: String::new() };
        site.address = site.until("the daemon to listen", async |site| Ok(listening(&site.log()))).await?;
        Ok(site)
    }

    pub fn daemon_id(&self) -> u32 {
        self.daemon.id()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("daemon.log")).unwrap_or_default()
    }

    /// Asks again and again until there is an answer.
    pub async fn until<T>(&self, what: &str, ask: impl AsyncFn(&Self) -> Result<Option<T>>) -> Result<T> {
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            if let Some(answer) = ask(self).await? {
                return Ok(answer);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
        bail!("waited {PATIENCE:?} for {what}; the daemon's log ends with\n{tail}")
    }

    /// Waits until a period's record is as `wanted`.
    pub async fn until_period(
        &self,
        id: PeriodId,
        what: &str,
        wanted: impl Fn(&PeriodRecord) -> bool,
    ) -> Result<PeriodRecord> {
        let ask = async |site: &Self| {
            let periods = site.registry.periods().await?;
            Ok(periods.into_iter().find(|record| record.id == id && wanted(record)))
        };
        self.until(&format!("{what} of period {id}"), ask).await
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // Its training process ends by itself: the pipe that it holds closes.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn spawn(folder: &Path) -> Result<Child> {
    let log = std::fs::File::create(folder.join("daemon.log"))?;
    Command::new(env!("CARGO_BIN_EXE_palimpsest"))
        .args(["run", "--config"])
        .arg(folder.join("palimpsest.toml"))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("the daemon can't be started")
}

fn listening(log: &str) -> Option<String> {
    let at = log.find("listening on http://")?;
    let rest = &log[at + "listening on ".len()..];
    Some(rest.split_whitespace().next()?.trim_matches('"').to_owned())
}

fn configuration(folder: &Path, brokers: &str, settings: &[(&str, &str)], set: &[String]) -> Result<String> {
    let root = folder.display();
    let common = [
        ("pipeline.name", format!("{PIPELINE:?}")),
        ("store.url", format!("\"{root}/objects\"")),
        ("registry.url", format!("\"sqlite://{root}/registry.db\"")),
        ("kafka.brokers", format!("[{brokers:?}]")),
        ("kafka.topics", format!("[{TOPIC:?}]")),
        ("kafka.dead_letter_topic", format!("{DEAD_LETTERS:?}")),
        ("idle.mode", "\"hold\"".into()),
        ("period.length", "\"1h\"".into()),
        ("period.lateness", "\"1m\"".into()),
        ("serve.bind", "\"127.0.0.1:0\"".into()),
        ("log.format", "\"text\"".into()),
    ];
    let mut keys: BTreeMap<&str, String> = common.into_iter().collect();
    keys.extend(settings.iter().map(|(key, value)| (*key, (*value).to_owned())));
    for line in set {
        let parts = line.split_once('=');
        ensure!(parts.is_some(), "--set {line}: is not KEY=VALUE");
        keys.extend(parts.map(|(key, value)| (key.trim(), value.trim().to_owned())));
    }
    Ok(keys.iter().map(|(key, value)| format!("{key} = {value}\n")).collect())
}
