//! The forgetting benchmark's settings, as both sides read them from plan.json, and a training job made of them.

use std::sync::Arc;

use anyhow::Result;
use palimpsest::bench::stream::Period;
use palimpsest::model::{Architecture, EncoderSpec};
use palimpsest::train::device::select;
use palimpsest::train::job::{self, Inputs, JobIo};
use palimpsest::train::network::NetworkBytes;
use palimpsest::train::spec::{
    Augmentation, Composition, Method, ModelSpec, Optimisation, PrecisionChoice, ProbeSpec, Progress, Recipe,
    SCHEMA, Teacher, TrainJob,
};
use palimpsest::train::split::Split;
use palimpsest::types::{EventTime, FileRef, PeriodId, Sha256, Version};
use serde::{Deserialize, Serialize};

use crate::rows::files;

pub const THREADS: usize = 2;

/// Neighbours of the kNN probe.
const K: usize = 20;

#[derive(Clone, Serialize, Deserialize)]
pub struct Settings {
    pub architecture: Architecture,
    pub image_size: usize,
    pub patch_size: usize,
    pub projector_hidden: usize,
    pub projector_dim: usize,
    pub mean: [f32; 3],
    pub std: [f32; 3],
    /// Steps on the first and on the second period.
    pub period_steps: [u64; 2],
    pub lambda: f64,
    pub tau_d: f64,
    #[serde(flatten)]
    pub optimisation: Optimisation,
    #[serde(flatten)]
    pub augmentation: Augmentation,
    pub k: usize,
}

impl Settings {
    /// Those of the forgetting benchmark.
    pub fn benchmark() -> Result<Self> {
        let defaults = files::defaults()?;
        let train = |key| files::default::<f64>(&defaults, "train", key);
        Ok(Self {
            architecture: Architecture::ResnetSmall,
            image_size: 32,
            patch_size: 8,
            projector_hidden: 256,
            projector_dim: 64,
            mean: [0.5; 3],
            std: [0.25; 3],
            period_steps: [400, 300],
            lambda: 4.0,
            tau_d: 0.2,
            optimisation: Optimisation {
                tau: 0.2,
                batch: 128,
                steps: 0,
                max_epochs: u64::MAX,
                learning_rate: 3e-3,
                warmup_ratio: 0.1,
                weight_decay: 1e-4,
                beta1: train("beta1")?,
                beta2: train("beta2")?,
                clip_norm: train("clip_norm")?,
            },
            augmentation: Augmentation {
                crop_scale: [0.3, 1.0],
                flip_probability: 0.5,
                jitter_probability: 0.8,
                jitter: [0.4, 0.4, 0.4, 0.1],
                grey_probability: 0.2,
                blur_probability: 0.0,
                blur_sigma: [0.1, 2.0],
            },
            k: K,
        })
    }

    /// The configuration's.
    pub fn default_learning_rate() -> Result<f64> {
        files::default(&files::defaults()?, "train", "learning_rate")
    }

    pub fn model(&self) -> ModelSpec {
        ModelSpec {
            encoder: EncoderSpec {
                architecture: self.architecture,
                image_size: self.image_size,
                patch_size: self.patch_size,
            },
            projector_hidden: self.projector_hidden,
            projector_dim: self.projector_dim,
            mean: self.mean,
            std: self.std,
            init: None,
        }
    }

    /// lwf on period `number` (0 or 1), which has a teacher unless it is the first.
    pub fn job(&self, number: usize, seed: u64, precision: PrecisionChoice) -> TrainJob {
        let optimisation = Optimisation { steps: self.period_steps[number], ..self.optimisation.clone() };
        let recipe = Recipe {
            period: PeriodId(EventTime(number as i64)),
            period_end: EventTime(number as i64 + 1),
            seed: seed + number as u64,
            segments: Vec::new(),
            max_frames: u64::MAX,
            model: self.model(),
            teacher: (number > 0).then(nameless_teacher),
            method: Method::Lwf { lambda: self.lambda, tau_d: self.tau_d },
            teacher_share: 0.0,
            optimisation,
            augmentation: self.augmentation.clone(),
            composition: Composition::AS_THEY_COME,
            probe: ProbeSpec { block_ms: 1, guard_ms: 0, ratio: 0.5, max_frames: 0, k: K, bootstrap: 0 },
            probe_sets: Vec::new(),
        };
        TrainJob {
            schema: SCHEMA,
            pipeline: "benchmark".into(),
            attempt: 1,
            start: 1,
            output_prefix: String::new(),
            earlier_prefixes: Vec::new(),
            device: "cpu".into(),
            precision,
            micro_batch: None,
            threads: THREADS,
            // After the last one alone.
            checkpoint_steps: u64::MAX,
            recipe,
        }
    }
}

/// The teacher's bytes are handed over: nobody looks for them in a store.
fn nameless_teacher() -> Teacher {
    let file = || FileRef { path: String::new(), sha256: Sha256(String::new()), bytes: 0 };
    Teacher { version: Version(1), encoder: file(), projector: file() }
}

/// One training job with what it learns on.
pub struct Training<'a> {
    pub settings: &'a Settings,
    pub period: &'a Period,
    /// 0 or 1.
    pub number: usize,
    pub seed: u64,
    pub precision: PrecisionChoice,
    pub teacher: Option<&'a NetworkBytes>,
}

impl Training<'_> {
    /// The job from its start to its end, as the daemon's training process runs it. The losses are those of its steps.
    pub fn run(&self) -> Result<(NetworkBytes, Vec<f64>)> {
        let job = self.settings.job(self.number, self.seed, self.precision);
        let inputs = Inputs {
            frames: Arc::clone(&self.period.frames),
            split: Split { train: self.period.trained(), probe: self.period.tested() },
            teacher: self.teacher.cloned(),
            init: None,
            checkpoint: None,
            data_threads: THREADS,
        };
        let mut losses = Losses(Vec::new());
        let trained = job::run(&job, inputs, &mut losses)?;
        Ok((trained.network, losses.0))
    }
}

/// What a reader is told of a choice of precision.
pub fn precision_text(precision: PrecisionChoice) -> Result<String> {
    Ok(format!("products in {}", select("cpu", precision)?.precision))
}

/// Keeps the losses and nothing else.
struct Losses(Vec<f64>);

impl JobIo for Losses {
    fn progress(&mut self, progress: Progress) {
        if let Progress::Step { total, .. } = progress {
            self.0.push(total);
        }
    }

    fn save_checkpoint(
        &mut self,
        _: u64,
        _: Vec<u8>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(())
    }

    fn should_stop(&self) -> bool {
        false
    }
}
