//! The same training here and in PyTorch: equal weights, equal views, step by step.
//!
//! Our views are written down and read by benches/peers/parity.py, so that nothing random is left: what differs is rounding, which
//! grows from step to step. The reference is PyTorch in f64; PyTorch in f32 shows what rounding comes to there.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use palimpsest::bench::stream::Period;
use palimpsest::train::batches::{BatchPlan, Batches};
use palimpsest::train::device::select;
use palimpsest::train::job::view_maker;
use palimpsest::train::learner::Learner;
use palimpsest::train::network::NetworkBytes;
use palimpsest::train::spec::PrecisionChoice;
use serde::{Deserialize, Serialize};

use super::recipe::{Settings, THREADS, Training};
use crate::rows::files;

/// Steps that are compared.
pub const STEPS: u64 = 50;
/// Of the first period, which the teacher learns: enough for a teacher that differs from initial weights.
const TEACHER_STEPS: u64 = 100;
const SEED: u64 = 11;
/// Largest difference of a step's losses, and of all weights together at the end, relative to their size.
pub const LOSS_TOLERANCE: f64 = 1e-3;
pub const WEIGHT_TOLERANCE: f64 = 1e-2;
/// At the benchmark's learning rate rounding outgrows the bars: how many times as far from f64 as PyTorch in f32 we may be there.
pub const TIMES_THE_PEER: f64 = 3.0;

#[derive(Serialize)]
struct Plan {
    #[serde(flatten)]
    settings: Settings,
    steps: u64,
}

/// What both sides came to.
pub struct Parity {
    pub learning_rate: f64,
    /// Ours, PyTorch's in f64 and PyTorch's in f32, by step.
    pub losses: Vec<[f64; 3]>,
    /// From f64's weights at the end, all learned ones together, ours and PyTorch's in f32: the norm of the difference over the norm.
    pub distances: [f64; 2],
    pub torch: String,
}

#[derive(Deserialize)]
struct Peer {
    losses: Vec<f64>,
    losses_f32: Vec<f64>,
    distance: f64,
    distance_f32: f64,
    torch: String,
}

impl Parity {
    /// The largest relative difference from f64's losses, of ours and of PyTorch's in f32.
    pub fn farthest_losses(&self) -> [f64; 2] {
        let farthest = |which: usize| {
            let differences = self.losses.iter().map(|losses| (losses[which] - losses[1]).abs() / losses[1]);
            differences.fold(0.0, f64::max)
        };
        [farthest(0), farthest(2)]
    }

    pub fn holds(&self) -> bool {
        self.farthest_losses()[0] <= LOSS_TOLERANCE && self.distances[0] <= WEIGHT_TOLERANCE
    }

    /// Whether we are no farther from f64 than PyTorch is in f32, times [`TIMES_THE_PEER`].
    pub fn is_rounding(&self) -> bool {
        let ([loss, peer_loss], [weights, peer_weights]) = (self.farthest_losses(), self.distances);
        loss <= TIMES_THE_PEER * peer_loss && weights <= TIMES_THE_PEER * peer_weights
    }
}

/// Learns the first period, at the benchmark's learning rate.
pub fn teacher(first: &Period) -> Result<NetworkBytes> {
    let settings = settings()?;
    let training = Training {
        settings: &settings,
        period: first,
        number: 0,
        seed: SEED,
        precision: PrecisionChoice::F32,
        teacher: None,
    };
    Ok(training.run()?.0)
}

fn settings() -> Result<Settings> {
    let mut settings = Settings::benchmark()?;
    settings.period_steps = [TEACHER_STEPS, STEPS];
    Ok(settings)
}

/// Trains the second period by lwf on both sides, at a peak `learning_rate`.
pub fn compare(second: &Period, teacher: &NetworkBytes, learning_rate: f64, python: &Path) -> Result<Parity> {
    let mut settings = settings()?;
    settings.optimisation.learning_rate = learning_rate;
    let precision = PrecisionChoice::F32;

    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    std::fs::write(folder.join("encoder.safetensors"), &teacher.encoder)?;
    std::fs::write(folder.join("projector.safetensors"), &teacher.projector)?;
    let recipe = settings.job(1, SEED, precision).recipe;
    let mut learner = Learner::start(&recipe, Some(teacher), None, &select("cpu", precision)?)?;
    let frames = (&second.trained()[..], second.frames.metas());
    let plan = BatchPlan::new(recipe.seed, frames, &recipe.optimisation, &recipe.composition)?;
    ensure!(plan.steps() == STEPS, "{} steps instead of {STEPS}", plan.steps());
    let mut batches = Batches::start(&plan, view_maker(&recipe, &Arc::clone(&second.frames)), 0, THREADS)?;
    let size = recipe.model.encoder.image_size;
    let mut losses = Vec::new();
    for step in 0..STEPS {
        let batch = batches.next_batch()?;
        ensure!(batch.same.is_empty(), "step {step} has copies, which the peer doesn't know of");
        let shape = (2 * recipe.optimisation.batch, 3, size, size);
        let views = Tensor::from_slice(&batch.views, shape, &Device::Cpu)?;
        files::write_tensors(
            folder,
            &format!("views-{step:03}.safetensors"),
            HashMap::from([("views", views)]),
        )?;
        losses.push(learner.step(batch, STEPS)?.total);
    }
    let ours = learner.student_bytes()?;
    std::fs::write(folder.join("ours-encoder.safetensors"), ours.encoder)?;
    std::fs::write(folder.join("ours-projector.safetensors"), ours.projector)?;
    files::write_plan(folder, &Plan { settings, steps: STEPS })?;

    let peer = run_peer(folder, python)?;
    let taken = [peer.losses.len(), peer.losses_f32.len()];
    ensure!(taken == [losses.len(); 2], "PyTorch took {taken:?} steps");
    let peers = peer.losses.into_iter().zip(peer.losses_f32);
    let losses = losses.into_iter().zip(peers).map(|(ours, (exact, f32))| [ours, exact, f32]).collect();
    Ok(Parity { learning_rate, losses, distances: [peer.distance, peer.distance_f32], torch: peer.torch })
}

fn run_peer(folder: &Path, python: &Path) -> Result<Peer> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/parity.py");
    let mut command = Command::new(python);
    command.arg(script).arg(folder).args(["--threads", &THREADS.to_string()]);
    let output = command.output().with_context(|| format!("starting {}", python.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "parity.py ended with {}: {said}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}
