//! What runs inside the training process: from a job file to an outcome, with nothing but the object store.
//!
//! The way through: [`inputs`] fetches, `train::split` divides, `train::job` trains, [`measure`] evaluates,
//! [`outputs`] writes. Everything is written below the start's own prefix; `outcome.json` comes last and names
//! all the rest with their hashes, so a start that was killed anywhere left nothing that counts but checkpoints.

mod inputs;
mod measure;
mod outputs;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::Device;
use tokio::runtime::Handle;

use crate::eval::Evaluation;
use crate::eval::evaluate::EvaluateError;
use crate::failpoint;
use crate::publish::embeddings::EmbeddingsError;
use crate::store::segment::SegmentError;
use crate::store::{Store, StoreError};
use crate::train::checkpoint::CheckpointError;
use crate::train::device::Selected;
use crate::train::frames::FrameSet;
use crate::train::job::{self, Inputs, JobIo, Trained};
use crate::train::likeness::{self, Look};
use crate::train::spec::{LeftOut, Outcome, Progress, SCHEMA, TrainJob, output};
use crate::train::split::{Split, split};
use crate::train::{TrainError, device};

#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Segment(#[from] SegmentError),
    #[error(transparent)]
    Train(#[from] TrainError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Device(#[from] device::DeviceError),
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    #[error(transparent)]
    Embeddings(#[from] EmbeddingsError),
    #[error(transparent)]
    Measure(#[from] measure::MeasureError),
    #[error("{path} is not a job file: {source}")]
    Job { path: String, source: serde_json::Error },
    #[error("{path} has schema {found}, this program reads {SCHEMA}")]
    Schema { path: String, found: u32 },
    #[error("{what} can't be written as JSON: {source}")]
    Json { what: &'static str, source: serde_json::Error },
    #[error("stopped")]
    Stopped,
    #[error("the scratch file: {0}")]
    Scratch(std::io::Error),
    #[error(
        "period {period} has {frames} frames to train on, fewer than one batch of {batch}; left out were {} copies \
         (train.max_copies) and {} frames that a probe frame is like (train.duplicate_distance)",
        left_out.copies, left_out.near_probe
    )]
    TooFewFrames { period: crate::types::PeriodId, frames: usize, left_out: LeftOut, batch: usize },
}

/// Frames that are decoded between two looks at whether to stop: seconds, of large ones.
const LOOKS_AT_ONCE: usize = 1024;

pub type Result<T> = std::result::Result<T, WorkerError>;

/// Reads a job file.
pub async fn read_job(store: &Store, path: &str) -> Result<TrainJob> {
    let bytes = store.get(path).await?;
    let job: TrainJob = serde_json::from_slice(&bytes)
        .map_err(|source| WorkerError::Job { path: path.to_owned(), source })?;
    if job.schema > SCHEMA {
        return Err(WorkerError::Schema { path: path.to_owned(), found: job.schema });
    }
    Ok(job)
}

/// One training process. Runs on a thread that is not the runtime's; `handle` serves the store.
pub struct Worker<'a> {
    pub handle: Handle,
    pub store: &'a Store,
    pub job: &'a TrainJob,
    /// Set when the parent wants an end: a checkpoint is written, then [`Worker::run`] returns.
    pub stop: Arc<AtomicBool>,
}

/// The frames of a job, divided.
struct Data {
    frames: Arc<FrameSet>,
    split: Split,
    left_out: LeftOut,
}

impl Worker<'_> {
    /// True: the outcome is written. False: it was stopped before.
    pub fn run(&self) -> Result<bool> {
        match self.work() {
            // Whatever it was in the middle of: the next start goes on from the last checkpoint.
            Err(_) if self.is_stopped() => Ok(false),
            done => done,
        }
    }

    fn work(&self) -> Result<bool> {
        let started = Instant::now();
        let selected = device::select(&self.job.device, self.job.precision)?;
        let data = self.load()?;
        let Some(trained) = self.train(&data, &selected)? else { return Ok(false) };
        let written = outputs::Written::new(self);
        let (evaluation, written) = self.evaluate(&data, &trained, &selected.device, written)?;
        if self.is_stopped() {
            return Ok(false);
        }
        let outcome = Outcome {
            schema: SCHEMA,
            files: written.files,
            evaluation,
            probe_frames: data.split.probe.len() as u64,
            train_frames: data.split.train.len() as u64,
            left_out: data.left_out,
            steps: trained.steps,
            seconds: started.elapsed().as_secs_f64(),
            device: trained.device,
            program_version: crate::VERSION.to_owned(),
            seed: self.job.recipe.seed,
            hyper_parameters: hyper_parameters(self.job),
        };
        let bytes = serde_json::to_vec_pretty(&outcome)
            .map_err(|source| WorkerError::Json { what: "the outcome", source })?;
        failpoint::reach("worker.outcome.before");
        self.put(output::OUTCOME, bytes)?;
        failpoint::reach("worker.outcome.after");
        self.say(&Progress::Finished);
        Ok(true)
    }

    fn load(&self) -> Result<Data> {
        let recipe = &self.job.recipe;
        let frames = self.handle.block_on(inputs::frames(self.store, recipe, |n| {
            self.say(&Progress::Loading { frames: n });
            self.check_stop()
        }))?;
        let mut split = split(frames.metas(), recipe.max_frames, &recipe.probe);
        let left_out = self.leave_out(&frames, &mut split)?;
        let batch = recipe.optimisation.batch;
        if split.train.len() < batch {
            let (period, frames) = (recipe.period, split.train.len());
            return Err(WorkerError::TooFewFrames { period, frames, left_out, batch });
        }
        Ok(Data { frames: Arc::new(frames), split, left_out })
    }

    /// Takes copies, and what is like a frame of any probe set, from the frames that are trained on.
    fn leave_out(&self, frames: &FrameSet, split: &mut Split) -> Result<LeftOut> {
        let recipe = &self.job.recipe;
        let looks = self.looks(frames, &split.train)?;
        let mut probes = self.looks(frames, &split.probe)?;
        for probe in &recipe.probe_sets {
            let set = inputs::probe_set(self, &probe.file)?;
            let all: Vec<usize> = (0..set.len()).collect();
            probes.extend(self.looks(&set, &all)?);
        }
        let chosen = likeness::choose(&split.train, &looks, &probes, &recipe.composition);
        split.train = chosen.train;
        let LeftOut { copies, near_probe } = chosen.left_out;
        tracing::info!(
            train = split.train.len(),
            probe = split.probe.len(),
            copies,
            near_probe,
            "frames chosen"
        );
        Ok(chosen.left_out)
    }

    fn looks(&self, frames: &FrameSet, indices: &[usize]) -> Result<Vec<Look>> {
        let mut looks = Vec::with_capacity(indices.len());
        for part in indices.chunks(LOOKS_AT_ONCE) {
            self.check_stop()?;
            looks.extend(likeness::looks(frames, part).map_err(TrainError::from)?);
        }
        Ok(looks)
    }

    /// `None`: it was stopped, and a checkpoint is written.
    fn train(&self, data: &Data, selected: &Selected) -> Result<Option<Trained>> {
        let recipe = &self.job.recipe;
        let fetch = async {
            Ok::<_, WorkerError>(Inputs {
                frames: Arc::clone(&data.frames),
                split: data.split.clone(),
                teacher: inputs::teacher(self.store, recipe).await?,
                init: inputs::initial_weights(self.store, recipe).await?,
                checkpoint: inputs::checkpoint(self.store, self.job, selected).await?,
                data_threads: self.job.threads,
            })
        };
        let inputs = self.handle.block_on(fetch)?;
        match job::run(self.job, inputs, &mut Reporter { worker: self }) {
            Ok(trained) => Ok(Some(trained)),
            Err(TrainError::Interrupted { step }) => {
                tracing::info!(step, "stopped after a checkpoint");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn evaluate<'a>(
        &'a self,
        data: &Data,
        trained: &Trained,
        device: &Device,
        mut written: outputs::Written<'a>,
    ) -> Result<(Evaluation, outputs::Written<'a>)> {
        failpoint::reach("worker.candidate.before");
        written.network(trained)?;
        failpoint::reach("worker.candidate.after");
        let candidate = measure::Subject::new(self, &trained.network, device)?;
        let reference = measure::Subject::new(self, &trained.initial, device)?;
        let mut finite = candidate.is_finite()?;
        written.frame_embeddings(data, &candidate, &mut finite)?;
        if !finite {
            return Ok((Evaluation { finite, new_probe: None, probes: vec![] }, written));
        }
        let new_probe = match data.split.probe.len() >= crate::eval::evaluate::MIN_FRAMES {
            true => {
                self.say(&Progress::Evaluating { period: self.job.recipe.period });
                failpoint::reach("worker.probe_set.before");
                written.probe_set(data)?;
                failpoint::reach("worker.probe_set.after");
                Some(measure::new_probe(self, data, &candidate, &reference, &mut written)?)
            }
            false => None,
        };
        let mut probes = vec![];
        for probe in &self.job.recipe.probe_sets {
            self.check_stop()?;
            self.say(&Progress::Evaluating { period: probe.period });
            probes.push(measure::earlier_probe(self, probe, &candidate, &mut written)?);
        }
        Ok((Evaluation { finite, new_probe, probes }, written))
    }

    /// An error if it is to stop. Asked wherever work can take long.
    fn check_stop(&self) -> Result<()> {
        if self.is_stopped() { Err(WorkerError::Stopped) } else { Ok(()) }
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// One line of progress. A parent that doesn't read any more has gone: the closed standard input tells.
    fn say(&self, progress: &Progress) {
        match serde_json::to_string(progress) {
            Ok(line) => {
                let mut out = std::io::stdout().lock();
                let written = writeln!(out, "{line}").and_then(|()| out.flush());
                if let Err(error) = written {
                    tracing::debug!(%error, "nobody reads the progress");
                }
            }
            Err(error) => tracing::error!(%error, "progress can't be written as JSON"),
        }
    }

    /// Writes an object below the start's prefix.
    fn put(&self, name: &str, bytes: Vec<u8>) -> Result<()> {
        let path = format!("{}/{name}", self.job.output_prefix);
        Ok(self.handle.block_on(self.store.put(&path, bytes.into()))?)
    }
}

/// The settings of a job, without what it was applied to and where it ran.
fn hyper_parameters(job: &TrainJob) -> serde_json::Value {
    let recipe = &job.recipe;
    let mut settings = serde_json::json!({
        "model": recipe.model,
        "method": recipe.method,
        "teacher_share": recipe.teacher_share,
        "optimisation": recipe.optimisation,
        "augmentation": recipe.augmentation,
        "composition": recipe.composition,
        "probe": recipe.probe,
        "max_frames": recipe.max_frames,
    });
    if let Some(frames) = job.micro_batch {
        settings["micro_batch"] = frames.get().into();
    }
    settings
}

/// What the training loop tells and asks.
struct Reporter<'a> {
    worker: &'a Worker<'a>,
}

impl JobIo for Reporter<'_> {
    fn progress(&mut self, progress: Progress) {
        self.worker.say(&progress);
    }

    fn save_checkpoint(
        &mut self,
        step: u64,
        bytes: Vec<u8>,
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        failpoint::reach("worker.checkpoint.before");
        self.worker.put(&output::checkpoint(step), bytes)?;
        failpoint::reach("worker.checkpoint.after");
        Ok(())
    }

    fn should_stop(&self) -> bool {
        self.worker.is_stopped()
    }
}
