//! The training process: reads its job, sets up its threads, works until it is done or asked to stop.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};

use crate::config::{Config, Priority};
use crate::logging;
use crate::period::worker::{self, Worker};
use crate::store::Store;
use crate::train::runtime;
use crate::train::spec::{Progress, TrainJob};

/// A process whose parent is gone ends after so long even if it can't write its checkpoint: longer than a step
/// takes, shorter than an operator's patience.
const LAST_CHECKPOINT: Duration = Duration::from_secs(60);

/// Runs one job; the store, the log and the priority are the configuration's. `with_stdin`: it is to stop when its standard input closes, because its parent is gone then.
pub fn train(config: &Config, job_path: &str, with_stdin: bool) -> Result<()> {
    logging::install(&config.log, None)?;
    let done = work(config, job_path, with_stdin);
    if let Err(error) = &done {
        let failed = Progress::Failed { reason: format!("{error:#}") };
        println!("{}", serde_json::to_string(&failed)?);
    }
    if !done? {
        bail!("stopped before it was done; another start goes on from its last checkpoint");
    }
    Ok(())
}

/// True: the outcome is written.
fn work(config: &Config, job_path: &str, with_stdin: bool) -> Result<bool> {
    let store_url = config.store.url.expose();
    // Before there is another thread: each inherits it.
    if config.train.priority == Priority::Idle {
        runtime::yield_to_others()?;
    }
    let job = read_job(store_url, job_path)?;
    let _span = tracing::info_span!("train", period = %job.recipe.period, attempt = job.attempt).entered();
    runtime::prepare(job.threads).context("the training process can't be set up")?;
    let stop = Arc::new(AtomicBool::new(false));
    let io = Builder::new_multi_thread().worker_threads(1).thread_name("store").enable_all().build()?;
    io.spawn(stop_on_signal(Arc::clone(&stop)));
    if with_stdin {
        let stop = Arc::clone(&stop);
        std::thread::Builder::new().name("stdin".into()).spawn(move || stop_with_stdin(&stop))?;
    }
    let store = io.block_on(async { Store::open(store_url) })?;
    let worker = Worker { handle: io.handle().clone(), store: &store, job: &job, stop };
    Ok(worker.run()?)
}

/// On a runtime of its own, whose threads are gone afterwards: the process can still set up its threads then.
fn read_job(store_url: &str, job_path: &str) -> Result<TrainJob> {
    let runtime: Runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let store = Store::open(store_url).context("the object store can't be opened")?;
        Ok(worker::read_job(&store, job_path).await?)
    })
}

fn stop_with_stdin(stop: &AtomicBool) {
    let mut ignored = [0; 64];
    let mut stdin = std::io::stdin().lock();
    while !matches!(stdin.read(&mut ignored), Ok(0) | Err(_)) {}
    stop.store(true, Ordering::Relaxed);
    std::thread::sleep(LAST_CHECKPOINT);
    tracing::error!("the parent is gone and the last checkpoint takes too long: giving up");
    std::process::exit(1);
}

async fn stop_on_signal(stop: Arc<AtomicBool>) {
    match signal(SignalKind::terminate()) {
        Ok(mut terminate) => {
            terminate.recv().await;
            stop.store(true, Ordering::Relaxed);
        }
        Err(error) => {
            tracing::warn!(%error, "SIGTERM can't be waited for: it ends the process without a checkpoint")
        }
    }
}
