//! A training step: forward, backward, NT-Xent, lwf distillation, AdamW with clipping, on fixed views in memory.
//!
//! Both sides begin with the same student, teacher and views. The losses of their first steps are compared, which
//! compares gradients and updates too.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use palimpsest::model::{Architecture, EncoderSpec, Precision};
use palimpsest::train::batches::Batch;
use palimpsest::train::device::{Selected, select};
use palimpsest::train::learner::Learner;
use palimpsest::train::network::{Compute, Network, NetworkBytes};
use palimpsest::train::spec::{
    Augmentation, Composition, Method, ModelSpec, Optimisation, PrecisionChoice, ProbeSpec, Recipe,
};
use palimpsest::types::{EventTime, PeriodId};
use serde::{Deserialize, Serialize};

use super::{Comparison, OURS, OURS_F32, Row, Targets, Units, Work, files};
use crate::flops;

/// Steps whose losses are compared. More would compare how rounding grows.
const CHECKED_STEPS: usize = 4;
/// Frames a step of a trial.
const SMALL_BATCH: usize = 8;
/// The learning rate stays at its peak: the cosine over so many steps is flat where it is measured.
const STEPS: u64 = 1 << 40;
const SEED: u64 = 4;

pub fn rows() -> Vec<Box<dyn Row>> {
    let row = |row: Training| -> Box<dyn Row> { Box::new(row) };
    vec![
        row(Training {
            place: Place::Cpu,
            architecture: Architecture::VitTiny,
            image_size: 64,
            patch_size: 8,
            batch: 64,
            inner: 1,
            targets: [Some((0.55, 0.35)), Some((1.0, 0.65))],
        }),
        row(Training {
            place: Place::Cpu,
            architecture: Architecture::Resnet18,
            image_size: 64,
            patch_size: 8,
            batch: 32,
            inner: 1,
            targets: [Some((1.2, 1.0)), Some((2.2, 1.3))],
        }),
        row(Training {
            place: Place::Cpu,
            architecture: Architecture::ResnetSmall,
            image_size: 32,
            patch_size: 8,
            batch: 128,
            inner: 4,
            targets: [Some((1.2, 0.8)), None],
        }),
    ]
}

/// The same step on the first CUDA device, beside PyTorch there.
pub fn gpu_rows() -> Vec<Box<dyn Row>> {
    let row = |architecture, (image_size, patch_size), batch| -> Box<dyn Row> {
        let place = Place::Gpu;
        Box::new(Training {
            place,
            architecture,
            image_size,
            patch_size,
            batch,
            inner: 4,
            targets: [None; 2],
        })
    };
    vec![
        row(Architecture::VitTiny, (224, 16), 64),
        row(Architecture::Resnet18, (64, 8), 64),
        row(Architecture::ResnetSmall, (32, 8), 128),
    ]
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Cpu,
    Gpu,
}

struct Training {
    place: Place,
    architecture: Architecture,
    image_size: usize,
    /// Of transformers; others ignore it.
    patch_size: usize,
    /// Frames a step.
    batch: usize,
    /// Steps a repetition.
    inner: usize,
    /// Against f32 and bf16.
    targets: [Targets; 2],
}

#[derive(Serialize, Deserialize)]
struct Plan {
    /// As `train.device` names it, and PyTorch.
    device: String,
    architecture: Architecture,
    image_size: usize,
    patch_size: usize,
    batch: usize,
    projector_hidden: usize,
    projector_dim: usize,
    tau: f64,
    tau_d: f64,
    lambda: f64,
    learning_rate: f64,
    weight_decay: f64,
    beta1: f64,
    beta2: f64,
    clip_norm: f64,
    warm_up: usize,
    checked_steps: usize,
    inner: usize,
}

impl Training {
    fn plan(&self, small: bool) -> Result<Plan> {
        let defaults = files::defaults()?;
        let model = |key| files::default::<usize>(&defaults, "model", key);
        let train = |key| files::default::<f64>(&defaults, "train", key);
        Ok(Plan {
            device: match self.place {
                Place::Cpu => "cpu",
                Place::Gpu => "cuda:0",
            }
            .to_owned(),
            architecture: self.architecture,
            image_size: self.image_size,
            patch_size: self.patch_size,
            batch: if small { SMALL_BATCH } else { self.batch },
            projector_hidden: model("projector_hidden")?,
            projector_dim: model("projector_dim")?,
            tau: train("tau")?,
            tau_d: train("tau_d")?,
            lambda: train("lambda")?,
            learning_rate: train("learning_rate")?,
            weight_decay: train("weight_decay")?,
            beta1: train("beta1")?,
            beta2: train("beta2")?,
            clip_norm: train("clip_norm")?,
            warm_up: self.warm_up(),
            checked_steps: CHECKED_STEPS,
            inner: self.inner,
        })
    }
}

impl Row for Training {
    fn name(&self) -> &'static str {
        match (self.place, self.architecture) {
            (Place::Cpu, architecture) => architecture.name(),
            (Place::Gpu, Architecture::VitTiny) => "gpu_vit_tiny",
            (Place::Gpu, Architecture::Resnet18) => "gpu_resnet18",
            (Place::Gpu, Architecture::ResnetSmall) => "gpu_resnet_small",
        }
    }

    fn title(&self) -> String {
        let Training { architecture, image_size, batch, .. } = self;
        let place = if self.place == Place::Gpu { " on the GPU" } else { "" };
        format!("training step of {architecture}{place}, {image_size}x{image_size}, {batch} frames x 2 views")
    }

    fn peer_kind(&self) -> &'static str {
        "training"
    }

    fn comparisons(&self) -> Vec<Comparison> {
        let (f32_variants, bf16_variants): (&[_], &[_]) = match self.place {
            Place::Cpu => (&["eager", "compile"], &["eager-bf16", "compile-bf16"]),
            Place::Gpu => (&["eager"], &["eager-bf16"]),
        };
        let f32 = |ours, targets| Comparison {
            ours,
            against: "PyTorch f32",
            variants: f32_variants,
            targets,
            tolerance: 1e-3,
            checked: self.ours().last().expect("the side in f32"),
            needs_bf16: false,
        };
        let bf16 = Comparison {
            ours: OURS,
            against: "PyTorch bf16 autocast",
            variants: bf16_variants,
            targets: self.targets[1],
            tolerance: 5e-2,
            checked: OURS,
            needs_bf16: self.place == Place::Cpu,
        };
        let mut all = vec![f32(OURS, self.targets[0]), bf16];
        if self.place == Place::Cpu {
            all.push(f32(OURS_F32, None));
        }
        all
    }

    /// On a GPU products are f32 so far.
    fn ours(&self) -> &'static [&'static str] {
        match self.place {
            Place::Cpu => &[OURS, OURS_F32],
            Place::Gpu => &[OURS],
        }
    }

    fn warm_up(&self) -> usize {
        2
    }

    fn units(&self) -> Units {
        Units { count: self.inner, name: "step", as_rate: false }
    }

    fn flops(&self) -> Option<f64> {
        if self.place == Place::Gpu {
            return None;
        }
        let plan = self.plan(false).ok()?;
        let step = flops::training_step(
            &plan.encoder(),
            [plan.projector_hidden, plan.projector_dim],
            2 * self.batch,
        );
        Some(step * self.inner as f64)
    }

    fn prepare(&self, folder: &Path, small: bool) -> Result<()> {
        let plan = self.plan(small)?;
        let network = Network::initialise(
            &plan.model(),
            SEED,
            None,
            Compute { device: &Device::Cpu, precision: Precision::F32 },
        )?
        .to_bytes()?;
        std::fs::write(folder.join("encoder.safetensors"), network.encoder)?;
        std::fs::write(folder.join("projector.safetensors"), network.projector)?;
        let views = HashMap::from([("views", plan.views()?)]);
        files::write_tensors(folder, "views.safetensors", views)?;
        files::write_plan(folder, &plan)
    }

    fn start(&self, folder: &Path, ours: &str) -> Result<Box<dyn Work>> {
        let plan: Plan = files::read_plan(folder)?;
        let network = NetworkBytes {
            encoder: files::read(folder, "encoder.safetensors")?,
            projector: files::read(folder, "projector.safetensors")?,
        };
        let views = files::read_tensor(folder, "views.safetensors", "views")?;
        let precision = if ours == OURS_F32 { PrecisionChoice::F32 } else { PrecisionChoice::Auto };
        let selected = select(&plan.device, precision)?;
        let mut steps = Steps {
            details: details(&selected),
            learner: Learner::start(&plan.recipe(), Some(&network), None, &selected)?,
            views: views.flatten_all()?.to_vec1()?,
            taken: 0,
            inner: plan.inner,
            check: Vec::new(),
        };
        for _ in 0..plan.checked_steps {
            let loss = steps.step()?;
            steps.check.push(loss);
        }
        Ok(Box::new(steps))
    }

    fn verify(&self, losses: &[f64]) -> Result<()> {
        ensure!(losses.len() == CHECKED_STEPS && losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
        let learned = losses[losses.len() - 1] < losses[0];
        ensure!(learned, "steps on the same views must lower their loss, which was {losses:?}");
        Ok(())
    }
}

fn details(selected: &Selected) -> String {
    match selected.device {
        Device::Cpu => format!("products in {}", selected.precision),
        _ => selected.description.clone(),
    }
}

impl Plan {
    fn encoder(&self) -> EncoderSpec {
        EncoderSpec {
            architecture: self.architecture,
            image_size: self.image_size,
            patch_size: self.patch_size,
        }
    }

    fn model(&self) -> ModelSpec {
        ModelSpec {
            encoder: self.encoder(),
            projector_hidden: self.projector_hidden,
            projector_dim: self.projector_dim,
            mean: [0.5; 3],
            std: [0.25; 3],
            init: None,
        }
    }

    /// Two views of a frame share most of their values, so that there is something to learn.
    fn views(&self) -> Result<Tensor> {
        let shape = [2 * self.batch, 3, self.image_size, self.image_size];
        let half = shape.iter().product::<usize>() / 2;
        let common = files::noise(SEED, half);
        let own = files::noise(SEED + 1, 2 * half);
        let mixed = own.iter().enumerate().map(|(i, own)| 0.8 * common[i % half] + 0.6 * own);
        Ok(Tensor::from_vec(mixed.collect(), &shape, &Device::Cpu)?)
    }

    /// What a step reads of it is as in the plan; the rest names no file and is not used.
    fn recipe(&self) -> Recipe {
        Recipe {
            period: PeriodId(EventTime(0)),
            period_end: EventTime(1),
            seed: SEED,
            segments: Vec::new(),
            max_frames: 0,
            model: self.model(),
            teacher: None,
            method: Method::Lwf { lambda: self.lambda, tau_d: self.tau_d },
            teacher_share: 0.0,
            optimisation: Optimisation {
                tau: self.tau,
                batch: self.batch,
                steps: STEPS,
                max_epochs: 1,
                learning_rate: self.learning_rate,
                warmup_ratio: 0.0,
                weight_decay: self.weight_decay,
                beta1: self.beta1,
                beta2: self.beta2,
                clip_norm: self.clip_norm,
            },
            augmentation: Augmentation {
                crop_scale: [1.0; 2],
                flip_probability: 0.0,
                jitter_probability: 0.0,
                jitter: [0.0; 4],
                grey_probability: 0.0,
                blur_probability: 0.0,
                blur_sigma: [1.0; 2],
            },
            composition: Composition::AS_THEY_COME,
            probe: ProbeSpec { block_ms: 1, guard_ms: 0, ratio: 0.5, max_frames: 0, k: 1, bootstrap: 0 },
            probe_sets: Vec::new(),
        }
    }
}

struct Steps {
    details: String,
    learner: Learner,
    views: Vec<f32>,
    taken: u64,
    inner: usize,
    check: Vec<f64>,
}

impl Steps {
    fn step(&mut self) -> Result<f64> {
        let batch = Batch { step: self.taken, views: self.views.clone(), same: Vec::new() };
        let report = self.learner.step(batch, STEPS)?;
        self.taken += 1;
        Ok(report.total)
    }
}

impl Work for Steps {
    fn repeat(&mut self) -> Result<()> {
        for _ in 0..self.inner {
            self.step()?;
        }
        Ok(())
    }

    fn check(&self) -> Vec<f64> {
        self.check.clone()
    }

    fn details(&self) -> String {
        self.details.clone()
    }
}
