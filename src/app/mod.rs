//! The only place that knows every concrete type: from the configuration to running roles.

pub mod settings;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use tokio_util::sync::CancellationToken;

use crate::cli::WrongUsage;
use crate::config::Config;
use crate::failpoint;
use crate::period::controller::{Clock, Controller, Listener};
use crate::period::job::{self, JobError};
use crate::period::worker::{self, Worker};
use crate::period::{history, report};
use crate::publish::table::{VersionRow, versions_table as render};
use crate::registry::sqlite::SqliteRegistry;
use crate::registry::{LATEST, PeriodState, Registry};
use crate::store::Store;
use crate::store::paths::Paths;
use crate::train::spec::{Progress, TrainJob};
use crate::types::{EventTime, FileRef, Sha256};

/// What one process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Roles {
    pub ingest: bool,
    pub learn: bool,
    pub serve: bool,
}

/// Registry and store of one pipeline, opened and up to date.
pub struct Deployment {
    pub registry: Arc<SqliteRegistry>,
    pub store: Arc<Store>,
    pub paths: Paths,
}

impl Deployment {
    pub async fn open(config: &Config) -> Result<Self> {
        let registry = SqliteRegistry::open(config.registry.url.expose(), &config.pipeline.name)
            .await
            .context("registry.url")?;
        registry.migrate().await.context("registry.url")?;
        let store = Store::open(config.store.url.expose()).context("store.url")?;
        Ok(Self {
            registry: Arc::new(registry),
            store: Arc::new(store),
            paths: Paths::new(&config.pipeline.name),
        })
    }

    /// Copies the configured initial weights into the store, where training processes find them.
    async fn keep_initial_weights(&self, config: &Config) -> Result<Option<FileRef>> {
        let Some(path) = &config.model.init else { return Ok(None) };
        let bytes =
            tokio::fs::read(path).await.with_context(|| format!("model.init: {} can't be read", path.display()))?;
        let sha256 = Sha256::of(&bytes);
        let file = FileRef { path: self.paths.initial_weights(&sha256), sha256, bytes: bytes.len() as u64 };
        self.store.put(&file.path, bytes.into()).await?;
        Ok(Some(file))
    }
}

/// The system's clock, in milliseconds.
pub fn clock() -> Clock {
    Arc::new(|| {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        EventTime::from_ms(since.as_millis() as i64)
    })
}
