//! The only place that knows every concrete type: from the configuration to running roles.

pub mod bench;
mod cluster;
mod serve;
mod settings;
pub mod train;
pub mod versions;

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cli::WrongUsage;
use crate::config::Config;
use crate::ingest::{self, IngestParts, IngestStatus};
use crate::period::controller::{Clock, Controller, Listener};
use crate::period::job::{self, JobError};
use crate::registry::Registry;
use crate::registry::sqlite::SqliteRegistry;
use crate::store::Store;
use crate::store::paths::Paths;
use crate::supervisor::{Outcome, Supervisor, cancel_on_signals};
use crate::types::{EventTime, FileRef, Sha256};
use crate::{logging, metrics};

/// What one process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Roles {
    pub ingest: bool,
    pub learn: bool,
    pub serve: bool,
}

/// What an embedding program (the demo) adds to a daemon.
#[derive(Default)]
pub struct Extras {
    /// Told of the training process's progress.
    pub listener: Option<Listener>,
    /// The log goes here instead of to standard error; the training process's too.
    pub log: Option<PathBuf>,
    /// Tells incarnations of an in-process broker's topics apart.
    pub identity: Option<String>,
}

/// Registry and store of one pipeline, opened and up to date.
pub struct Deployment {
    pub registry: Arc<SqliteRegistry>,
    pub store: Arc<Store>,
    pub paths: Paths,
}

impl Deployment {
    pub async fn open(config: &Config) -> Result<Self> {
        let registry = SqliteRegistry::open(config.registry.url.expose(), &config.pipeline.name);
        let registry = registry.await.context("registry.url")?;
        registry.migrate().await.context("registry.url")?;
        let store = Store::open(config.store.url.expose()).context("store.url")?;
        let paths = Paths::new(&config.pipeline.name);
        Ok(Self { registry: Arc::new(registry), store: Arc::new(store), paths })
    }

    fn registry(&self) -> Arc<dyn Registry> {
        Arc::clone(&self.registry) as Arc<dyn Registry>
    }

    /// Copies the configured initial weights into the store, where training processes find them.
    async fn keep_initial_weights(&self, config: &Config) -> Result<Option<FileRef>> {
        let Some(path) = &config.model.init else { return Ok(None) };
        let unreadable = |error| WrongUsage(format!("model.init = {path:?}: can't be read: {error}"));
        let bytes = tokio::fs::read(path).await.map_err(unreadable)?;
        let sha256 = Sha256::of(&bytes);
        let file = FileRef { path: self.paths.initial_weights(&sha256), sha256, bytes: bytes.len() as u64 };
        self.store.put(&file.path, bytes.into()).await?;
        Ok(Some(file))
    }
}

/// The system's clock.
pub fn clock() -> Clock {
    Arc::new(|| {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        EventTime::from_ms(since.as_millis() as i64)
    })
}

/// librdkafka's settings as configured.
pub fn kafka_properties(config: &Config) -> BTreeMap<String, String> {
    settings::kafka_properties(&config.kafka)
}

/// `palimpsest run`: every role until a signal, or until one of them fails.
pub async fn run(config: &Config, roles: Roles) -> Result<()> {
    let daemon = Daemon::start(config, roles, Extras::default()).await?;
    tokio::spawn(cancel_on_signals(daemon.stop.clone()));
    let outcome = daemon.ended().await?;
    tracing::info!("{outcome}");
    if !outcome.is_orderly() {
        bail!("{outcome}");
    }
    Ok(())
}

/// Running roles.
pub struct Daemon {
    pub deployment: Deployment,
    /// Where it listens.
    pub address: SocketAddr,
    /// Cancelled when it is to stop.
    pub stop: CancellationToken,
    outcome: JoinHandle<Outcome>,
}

impl Daemon {
    pub async fn start(config: &Config, roles: Roles, extras: Extras) -> Result<Self> {
        let log = extras.log.as_ref().map(|path| OpenOptions::new().create(true).append(true).open(path));
        logging::install(&config.log, log.transpose()?)?;
        let prometheus = metrics::install(&config.pipeline.name)?;
        let deployment = Deployment::open(config).await?;
        let mut supervisor = Supervisor::new(config.shutdown.drain.as_duration());
        let stop = supervisor.token();
        let status = roles.ingest.then(IngestStatus::default);
        if let Some(status) = &status {
            start_ingest(&mut supervisor, config, &deployment, extras.identity, status.clone());
        }
        if roles.learn {
            start_learner(&mut supervisor, config, &deployment, extras.listener, extras.log).await?;
        }
        let token = supervisor.token();
        let upkeep = metrics::upkeep(prometheus.clone(), token);
        supervisor.spawn("metrics", async move {
            upkeep.await;
            Ok(())
        });
        let address =
            serve::start(&mut supervisor, config, &deployment, prometheus, (roles.serve, status)).await?;
        Ok(Self { deployment, address, stop, outcome: tokio::spawn(supervisor.run()) })
    }

    /// Waits until all of it has ended.
    pub async fn ended(self) -> Result<Outcome> {
        Ok(self.outcome.await?)
    }

    /// Asks it to stop and waits; an error if that was not orderly.
    pub async fn stopped(self) -> Result<()> {
        self.stop.cancel();
        let outcome = self.ended().await?;
        if !outcome.is_orderly() {
            bail!("{outcome}");
        }
        Ok(())
    }
}

fn start_ingest(
    supervisor: &mut Supervisor,
    config: &Config,
    deployment: &Deployment,
    identity: Option<String>,
    status: IngestStatus,
) {
    let (registry, store, cancel) =
        (deployment.registry(), Arc::clone(&deployment.store), supervisor.token());
    let config = config.clone();
    supervisor.spawn("ingest", async move {
        let identity = match identity.or_else(|| config.kafka.identity.clone()) {
            Some(identity) => identity,
            None => {
                let properties = settings::kafka_properties(&config.kafka);
                let Some(id) = cluster::id(&properties, &cancel).await? else { return Ok(()) };
                id
            }
        };
        let settings = settings::ingest(&config, identity);
        let parts = IngestParts { registry, store, clock: clock(), status };
        Ok(ingest::run(settings, parts, cancel).await?)
    });
}

async fn start_learner(
    supervisor: &mut Supervisor,
    config: &Config,
    deployment: &Deployment,
    listener: Option<Listener>,
    log: Option<PathBuf>,
) -> Result<()> {
    let init = deployment.keep_initial_weights(config).await?;
    // The time too: in containers with the host's network, names and process ids repeat.
    let holder = format!("{}-{}-{}", hostname(), std::process::id(), clock()().as_ms());
    let program = settings::training_program(config, log)?;
    let controller = Controller {
        registry: deployment.registry(),
        store: Arc::clone(&deployment.store),
        paths: deployment.paths.clone(),
        settings: settings::learn(config, holder, program, init),
        clock: clock(),
        listener,
    };
    // Told before anything runs: a model that can't copy its teacher is a mistake in the configuration.
    match job::lineage(deployment.registry.as_ref(), &controller.settings.job).await {
        Err(error @ JobError::OtherModel { .. }) => bail!(WrongUsage(error.to_string())),
        other => other?,
    };
    let cancel = supervisor.token();
    supervisor.spawn("learner", async move {
        controller.run(cancel).await;
        Ok(())
    });
    Ok(())
}

/// For people who look at a lease: which machine holds it.
fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "unknown".into(), |name| name.trim().into())
}
