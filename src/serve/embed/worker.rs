//! The thread that the encoder runs on, and the versions that it has at hand.
//!
//! One thread, because the encoder takes all cores (or the device) for itself; requests wait their turn in a bounded
//! queue. A request's images are embedded in small batches, never together with another's, so that an image gives the
//! same numbers whoever else asks. The thread ends when the [`Embedder`] is dropped.

use std::sync::Arc;
use std::thread::JoinHandle;

use candle_core::Device;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::super::error::Problem;
use super::encoder::{LoadError, PublishedEncoder};
use crate::model::preprocess::PreprocessError;
use crate::registry::VersionRecord;
use crate::store::Store;
use crate::store::paths::Paths;
use crate::types::Version;

/// Requests that are worked on at once, from reading the body on; the next is told to come again. Each holds its body,
/// one decoded image and its views: at the default limits some hundred megabytes at most.
const MAX_REQUESTS: usize = 8;

/// Images in one pass through the encoder. Larger: more activations in memory; smaller: more overhead.
const BATCH_IMAGES: usize = 16;

/// Versions at hand: `latest`, and one that somebody compares it with. Each costs its weights.
const KEPT_ENCODERS: usize = 2;

/// Why there is no embedding.
#[derive(Debug, thiserror::Error)]
pub enum EmbedError {
    #[error("{MAX_REQUESTS} requests are being worked on already")]
    Busy,
    #[error("the thread that embeds has ended")]
    Gone,
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Encoder(#[from] PreprocessError),
    #[error("the thread that embeds could not be started: {0}")]
    Start(#[from] std::io::Error),
}

impl From<EmbedError> for Problem {
    fn from(error: EmbedError) -> Self {
        match error {
            EmbedError::Busy => Self::try_again("busy", error),
            EmbedError::Load(LoadError::Store(error)) => error.into(),
            _ => Self::internal(&error),
        }
    }
}

struct Job {
    encoder: Arc<PublishedEncoder>,
    views: Vec<f32>,
    answer: oneshot::Sender<Result<Vec<f32>, PreprocessError>>,
}

/// A handle on the thread.
pub struct Embedder {
    jobs: mpsc::Sender<Job>,
    admissions: Arc<Semaphore>,
    /// The newest use last. Locked while one loads, so that a version is loaded once however many ask for it.
    encoders: Mutex<Vec<Arc<PublishedEncoder>>>,
    device: Device,
    ended: CancellationToken,
}

impl Embedder {
    /// Starts the thread. Join the handle after the `Embedder` was dropped.
    pub fn start(device: Device) -> Result<(Self, JoinHandle<()>), EmbedError> {
        // As many as are admitted, so that sending never waits.
        let (jobs, received) = mpsc::channel(MAX_REQUESTS);
        let ended = CancellationToken::new();
        let guard = ended.clone().drop_guard();
        let thread = std::thread::Builder::new().name("embed".into()).spawn(move || {
            let _ends_with_the_thread = guard;
            work(received);
        })?;
        let admissions = Arc::new(Semaphore::new(MAX_REQUESTS));
        Ok((Self { jobs, admissions, encoders: Mutex::new(Vec::new()), device, ended }, thread))
    }

    /// The right to be worked on, until it is dropped.
    pub fn admit(&self) -> Result<OwnedSemaphorePermit, EmbedError> {
        self.admissions.clone().try_acquire_owned().map_err(|_| EmbedError::Busy)
    }

    /// The version's encoder, if it is loaded.
    pub async fn at_hand(&self, version: Version) -> Option<Arc<PublishedEncoder>> {
        use_again(&mut self.encoders.lock().await, version)
    }

    /// The version's encoder, loaded now if it is not at hand.
    pub async fn encoder(
        &self,
        record: &VersionRecord,
        store: &Store,
        paths: &Paths,
    ) -> Result<Arc<PublishedEncoder>, EmbedError> {
        let mut encoders = self.encoders.lock().await;
        // Somebody else may have loaded it while this one waited.
        if let Some(encoder) = use_again(&mut encoders, record.version) {
            return Ok(encoder);
        }
        let encoder = Arc::new(PublishedEncoder::load(record, store, paths, &self.device).await?);
        tracing::info!(version = %record.version, "encoder loaded");
        encoders.push(encoder.clone());
        let surplus = encoders.len().saturating_sub(KEPT_ENCODERS);
        encoders.drain(..surplus);
        Ok(encoder)
    }

    /// `views` as the encoder's preprocessing makes them -> row-major `[images, dimension]`.
    pub async fn embed(
        &self,
        encoder: Arc<PublishedEncoder>,
        views: Vec<f32>,
    ) -> Result<Vec<f32>, EmbedError> {
        let (answer, answered) = oneshot::channel();
        self.jobs.send(Job { encoder, views, answer }).await.map_err(|_| EmbedError::Gone)?;
        Ok(answered.await.map_err(|_| EmbedError::Gone)??)
    }

    /// Ends when the thread has: it panicked, if the `Embedder` is still there.
    pub fn gone(&self) -> impl Future<Output = ()> + Send + 'static {
        self.ended.clone().cancelled_owned()
    }
}

/// Moves the version's encoder to the end, where the newest use is.
fn use_again(encoders: &mut [Arc<PublishedEncoder>], version: Version) -> Option<Arc<PublishedEncoder>> {
    let at = encoders.iter().position(|encoder| encoder.version == version)?;
    encoders[at..].rotate_left(1);
    encoders.last().cloned()
}

fn work(mut jobs: mpsc::Receiver<Job>) {
    while let Some(Job { encoder, views, answer }) = jobs.blocking_recv() {
        // Whoever asked may have gone away meanwhile.
        if answer.is_closed() {
            continue;
        }
        let _ = answer.send(in_batches(&encoder, &views));
    }
}

fn in_batches(encoder: &PublishedEncoder, views: &[f32]) -> Result<Vec<f32>, PreprocessError> {
    let mut embeddings = Vec::new();
    for batch in views.chunks(BATCH_IMAGES * encoder.preprocessing.view_len()) {
        embeddings.extend(encoder.embed(batch.to_vec())?);
    }
    Ok(embeddings)
}
