//! From the configuration to each part's own settings. Pure.

use std::path::PathBuf;
use std::time::Duration;

use crate::config::{self, Config};
use crate::eval::gate::GateLimits;
use crate::model::{Architecture, EncoderSpec};
use crate::period::child::Program;
use crate::period::controller::LearnSettings;
use crate::period::decide::Policy;
use crate::period::job::JobSettings;
use crate::train::spec::{Augmentation, Method, ModelSpec, Optimisation, ProbeSpec};
use crate::types::FileRef;

/// Settings of the learner. `init`: the object that `model.init` was copied to.
pub fn learn(config: &Config, holder: String, program: Program, init: Option<FileRef>) -> LearnSettings {
    LearnSettings {
        holder,
        lease_ttl_ms: config.lease.ttl.as_ms(),
        policy: Policy {
            lateness_ms: config.period.lateness.as_ms(),
            max_failures: config.train.max_failures,
            keep_published: config.retention.periods,
            inspect_for_ms: config.retention.inspect_for.as_ms(),
        },
        min_frames: config.period.min_frames,
        period_length_ms: config.period.length.as_ms(),
        gate: GateLimits {
            min_effective_rank: config.gate.min_effective_rank,
            max_parent_loss: config.gate.max_forgetting_parent,
            max_cumulative_loss: config.gate.max_forgetting_cumulative,
            require_learning: config.gate.require_learning,
        },
        job: job(config, init),
        program,
        drain: drain_of_child(config.shutdown.drain.as_duration()),
    }
}

/// The child's share of the drain: the rest is for the registry and the store.
fn drain_of_child(drain: Duration) -> Duration {
    drain * 4 / 5
}

fn job(config: &Config, init: Option<FileRef>) -> JobSettings {
    let config::Train { device, threads, checkpoint_steps, seed, first_steps, .. } = config.train;
    JobSettings {
        pipeline: config.pipeline.name.clone(),
        seed,
        max_frames: config.period.max_frames,
        model: model(&config.model, init),
        new_lineage: config.model.new_lineage,
        method: method(&config.train),
        optimisation: optimisation(&config.train),
        first_steps,
        augmentation: augmentation(&config.augment),
        probe: ProbeSpec {
            block_ms: config.probe.block.as_ms(),
            guard_ms: config.probe.guard.as_ms(),
            ratio: config.probe.ratio,
            max_frames: config.probe.max_frames,
            k: config.probe.k,
            bootstrap: config.probe.bootstrap,
        },
        probe_keep: config.probe.keep,
        device: device.to_string(),
        threads: if threads == 0 { cores() } else { threads },
        checkpoint_steps,
    }
}

/// Cores that this process may use.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |count| count.get())
}

fn model(model: &config::Model, init: Option<FileRef>) -> ModelSpec {
    let architecture = match model.architecture {
        config::Architecture::VitTiny => Architecture::VitTiny,
        config::Architecture::Resnet18 => Architecture::Resnet18,
        config::Architecture::ResnetSmall => Architecture::ResnetSmall,
    };
    ModelSpec {
        encoder: EncoderSpec { architecture, image_size: model.image_size, patch_size: model.patch_size },
        projector_hidden: model.projector_hidden,
        projector_dim: model.projector_dim,
        mean: model.mean.map(|value| value as f32),
        std: model.std.map(|value| value as f32),
        init,
    }
}

fn method(train: &config::Train) -> Method {
    let config::Train { lambda, tau_d, predictor_hidden, .. } = *train;
    match train.method {
        config::Method::Lwf => Method::Lwf { lambda, tau_d },
        config::Method::Cassle => Method::Cassle { lambda, tau_d, predictor_hidden },
        config::Method::Finetune => Method::Finetune,
    }
}

fn optimisation(train: &config::Train) -> Optimisation {
    Optimisation {
        tau: train.tau,
        batch: train.batch,
        steps: train.steps,
        max_epochs: train.max_epochs,
        learning_rate: train.learning_rate,
        warmup_ratio: train.warmup_ratio,
        weight_decay: train.weight_decay,
        beta1: train.beta1,
        beta2: train.beta2,
        clip_norm: train.clip_norm,
    }
}

fn augmentation(augment: &config::Augment) -> Augmentation {
    Augmentation {
        crop_scale: augment.crop_scale,
        flip_probability: augment.flip_probability,
        jitter_probability: augment.jitter_probability,
        jitter: augment.jitter,
        grey_probability: augment.grey_probability,
        blur_probability: augment.blur_probability,
        blur_sigma: augment.blur_sigma,
    }
}

/// How the learner starts its training processes: this program again.
pub fn training_program(store_url: &str, log: Option<PathBuf>) -> std::io::Result<Program> {
    Ok(Program {
        executable: std::env::current_exe()?,
        arguments: vec!["train".into(), "--stop-with-stdin".into(), "--store".into(), store_url.into(), "--job".into()],
        log,
    })
}
