//! The training loop.
//!
//! Invariant: what [`run`] returns is a function of the recipe, the frames, the teacher and the initial weights
//! (with program version, machine, thread count, precision and micro-batch), however often it was interrupted and resumed. Where bytes
//! come from and go to, and what happens with the progress, is the caller's.

use std::sync::Arc;
use std::time::Instant;

use super::batches::{BatchPlan, Batches, ViewMaker};
use super::checkpoint::{Checkpoint, Identity};
use super::device::{Selected, select};
use super::error::TrainError;
use super::frames::FrameSet;
use super::learner::{Learner, StepReport};
use super::network::NetworkBytes;
use super::spec::{Progress, Recipe, TrainJob};
use super::split::Split;

/// What a job's names stand for.
pub struct Inputs {
    pub frames: Arc<FrameSet>,
    pub split: Split,
    /// Present where the recipe names a teacher, and only there.
    pub teacher: Option<NetworkBytes>,
    /// The content of `model.init`, for a run without a teacher.
    pub init: Option<Vec<u8>>,
    /// The newest checkpoint of the same attempt.
    pub checkpoint: Option<Vec<u8>>,
    /// Threads that decode and augment. Changes no result.
    pub data_threads: usize,
}

/// The loop's connection to the outside. Called between steps, on the loop's thread.
pub trait JobIo {
    fn progress(&mut self, progress: Progress);

    /// Keeps the bytes of a checkpoint; durable when it returns.
    fn save_checkpoint(
        &mut self,
        step: u64,
        bytes: Vec<u8>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;

    /// Asked before every step: true ends the run with a checkpoint and [`TrainError::Interrupted`].
    fn should_stop(&self) -> bool;
}

/// The end of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Trained {
    pub network: NetworkBytes,
    /// What the student started from: the teacher's weights or, in the first period, the initial ones.
    pub initial: NetworkBytes,
    pub steps: u64,
    /// What it ran on, for people.
    pub device: String,
}

/// Trains to the end of the budget. A checkpoint is saved every `job.checkpoint_steps` steps and after the last.
pub fn run(job: &TrainJob, inputs: Inputs, io: &mut dyn JobIo) -> Result<Trained, TrainError> {
    let recipe = &job.recipe;
    check_inputs(recipe, &inputs)?;
    let selected = select(&job.device, job.precision)?;
    let identity = Identity::new(job, &selected)?;
    let trained = (&inputs.split.train[..], inputs.frames.metas());
    let plan = BatchPlan::new(recipe.seed, trained, &recipe.optimisation, &recipe.composition)?;
    let steps = plan.steps();
    io.progress(loaded(&inputs.split, steps));
    let (mut learner, first_step) = start_or_resume(job, &inputs, &identity, &selected)?;
    if first_step > 0 {
        io.progress(Progress::Resumed { step: first_step });
    }
    let mut batches =
        Batches::start(&plan, view_maker(recipe, &inputs.frames), first_step, inputs.data_threads)?;
    let mut started = Instant::now();
    for step in first_step..steps {
        if io.should_stop() {
            save(&learner, step, &identity, io)?;
            return Err(TrainError::Interrupted { step });
        }
        let report = learner.step(batches.next_batch()?, steps)?;
        let seconds = std::mem::replace(&mut started, Instant::now()).elapsed().as_secs_f64();
        io.progress(step_progress(step + 1, steps, &report, recipe.optimisation.batch as f64 / seconds));
        if (step + 1) % job.checkpoint_steps.max(1) == 0 || step + 1 == steps {
            save(&learner, step + 1, &identity, io)?;
        }
    }
    io.progress(Progress::Trained { step: steps });
    let initial = learner.initial().clone();
    let network = learner.published_bytes(recipe, inputs.teacher.as_ref())?;
    Ok(Trained { network, initial, steps, device: selected.description })
}

/// The maker of a recipe's views.
pub fn view_maker(recipe: &Recipe, frames: &Arc<FrameSet>) -> ViewMaker {
    ViewMaker {
        frames: Arc::clone(frames),
        augmentation: recipe.augmentation.clone(),
        preprocessing: recipe.model.preprocessing(),
        seed: recipe.seed,
    }
}

fn check_inputs(recipe: &Recipe, inputs: &Inputs) -> Result<(), TrainError> {
    let problem = match (&recipe.teacher, &inputs.teacher, &recipe.model.init, &inputs.init) {
        (Some(_), None, _, _) => Some(("names a teacher", "have none")),
        (None, Some(_), _, _) => Some(("names no teacher", "have one")),
        (None, None, Some(_), None) => Some(("names initial weights", "have none")),
        (_, _, None, Some(_)) => Some(("names no initial weights", "have some")),
        _ => None,
    };
    match problem {
        Some((expected, found)) => Err(TrainError::Inputs { expected, found }),
        None => Ok(()),
    }
}

/// The learner and the first step to take.
fn start_or_resume(
    job: &TrainJob,
    inputs: &Inputs,
    identity: &Identity,
    selected: &Selected,
) -> Result<(Learner, u64), TrainError> {
    let recipe = &job.recipe;
    let mut learner = Learner::start(recipe, inputs.teacher.as_ref(), inputs.init.as_deref(), selected)?;
    learner.hold_at_most(job.micro_batch)?;
    let Some(bytes) = &inputs.checkpoint else { return Ok((learner, 0)) };
    let checkpoint = Checkpoint::decode(bytes, identity)?;
    learner.restore(recipe, &checkpoint)?;
    Ok((learner, checkpoint.step))
}

fn save(learner: &Learner, step: u64, identity: &Identity, io: &mut dyn JobIo) -> Result<(), TrainError> {
    let bytes = learner.checkpoint(step)?.encode(identity)?;
    io.save_checkpoint(step, bytes).map_err(|source| TrainError::SaveCheckpoint { step, source })?;
    io.progress(Progress::Checkpoint { step });
    Ok(())
}

fn loaded(split: &Split, steps: u64) -> Progress {
    Progress::Loaded { train_frames: split.train.len() as u64, probe_frames: split.probe.len() as u64, steps }
}

/// `step` counts the steps taken; images are frames, each of which gives two views.
fn step_progress(step: u64, steps: u64, report: &StepReport, images_per_second: f64) -> Progress {
    let StepReport { total, ntxent, distillation, learning_rate, .. } = *report;
    Progress::Step { step, steps, total, ntxent, distillation, learning_rate, images_per_second }
}

#[cfg(test)]
#[path = "job_tests.rs"]
mod tests;
