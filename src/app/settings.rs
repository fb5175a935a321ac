//! From the configuration to each part's own settings. Pure.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use crate::config::{self, Config};
use crate::eval::gate::GateLimits;
use crate::ingest::{
    FlushPolicy, FrameLimits, IdleMode, IdlePolicy, IngestSettings, KafkaSettings, KafkaStart, LatePolicy,
    PeriodPolicy,
};
use crate::model::{Architecture, EncoderSpec};
use crate::period::child::Program;
use crate::period::controller::LearnSettings;
use crate::period::decide::Policy;
use crate::period::job::JobSettings;
use crate::train::spec::{
    Augmentation, Composition, Method, ModelSpec, Optimisation, PrecisionChoice, ProbeSpec,
};
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
            min_neighbour_retention: config.gate.min_neighbour_retention,
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
    let config::Train {
        device, precision, micro_batch, threads, checkpoint_steps, seed, first_steps, ..
    } = config.train;
    JobSettings {
        pipeline: config.pipeline.name.clone(),
        seed,
        max_frames: config.period.max_frames,
        model: model(&config.model, init),
        new_lineage: config.model.new_lineage,
        method: method(&config.train),
        teacher_share: if method(&config.train).is_averaged() { config.train.teacher_share } else { 0.0 },
        optimisation: optimisation(&config.train),
        first_steps,
        augmentation: augmentation(&config.augment),
        composition: composition(&config.train),
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
        precision: self::precision(precision),
        micro_batch: self::micro_batch(micro_batch),
        threads: if threads == 0 { cores() } else { threads },
        checkpoint_steps,
    }
}

/// 0 is none.
pub(super) fn micro_batch(configured: usize) -> Option<NonZeroUsize> {
    NonZeroUsize::new(configured)
}

pub(super) fn precision(precision: config::Precision) -> PrecisionChoice {
    match precision {
        config::Precision::Auto => PrecisionChoice::Auto,
        config::Precision::F32 => PrecisionChoice::F32,
        config::Precision::Bf16 => PrecisionChoice::Bf16,
    }
}

/// Cores that this process may use.
pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |count| count.get())
}

pub(super) fn model(model: &config::Model, init: Option<FileRef>) -> ModelSpec {
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

pub(super) fn optimisation(train: &config::Train) -> Optimisation {
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

pub(super) fn composition(train: &config::Train) -> Composition {
    Composition {
        spacing_ms: train.spacing.as_ms(),
        max_copies: train.max_copies,
        duplicate_distance: train.duplicate_distance,
    }
}

pub(super) fn augmentation(augment: &config::Augment) -> Augmentation {
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

/// How the learner starts its training processes: this program again. What it needs of the configuration goes into
/// its environment, where a store's URL with a password in it is not for every user's eyes.
pub fn training_program(config: &Config, log: Option<PathBuf>) -> std::io::Result<Program> {
    let format = match config.log.format {
        config::LogFormat::Auto if log.is_some() => config::LogFormat::Json,
        format => format,
    };
    Ok(Program {
        executable: std::env::current_exe()?,
        arguments: ["train", "--stop-with-stdin", "--job"].map(Into::into).into(),
        environment: vec![
            ("PALIMPSEST__STORE__URL".into(), config.store.url.expose().into()),
            ("PALIMPSEST__LOG__FORMAT".into(), format.as_str().into()),
            ("PALIMPSEST__LOG__FILTER".into(), config.log.filter.clone().into()),
            ("PALIMPSEST__TRAIN__PRIORITY".into(), config.train.priority.as_str().into()),
        ],
        log,
    })
}

/// Settings of ingest. `identity`: what tells incarnations of the topics apart.
pub fn ingest(config: &Config, identity: String) -> IngestSettings {
    let flush_age_ms = config.ingest.flush_age.as_ms();
    let timeout_ms = config.idle.timeout.as_ms();
    IngestSettings {
        pipeline: config.pipeline.name.clone(),
        kafka: KafkaSettings {
            properties: kafka_properties(&config.kafka),
            topics: config.kafka.topics.clone(),
            identity,
            group: config.consumer_group(),
            start: match config.kafka.start {
                config::KafkaStart::Earliest => KafkaStart::Earliest,
                config::KafkaStart::Latest => KafkaStart::Latest,
            },
            dead_letter_topic: config.dead_letter_topic(),
            max_in_flight_bytes: config.ingest.max_record_bytes.as_usize().saturating_mul(2),
            metadata_interval_ms: METADATA_INTERVAL_MS,
        },
        limits: FrameLimits {
            max_record_bytes: config.ingest.max_record_bytes.as_usize(),
            max_rows: config.ingest.max_rows as usize,
            max_frame_bytes: config.ingest.max_frame_bytes.as_usize(),
            max_pixels: config.ingest.max_pixels,
            earliest_captured_at: config.ingest.earliest_captured_at,
            max_ahead_ms: config.ingest.max_ahead.as_ms(),
        },
        periods: PeriodPolicy {
            length_ms: config.period.length.as_ms(),
            late: match config.ingest.late {
                config::Late::Join => LatePolicy::Join,
                config::Late::Drop => LatePolicy::Drop,
            },
            max_waiting_bytes: config.period.max_waiting_bytes.as_bytes(),
        },
        flush: FlushPolicy {
            max_bytes: config.ingest.segment_bytes.as_usize(),
            max_age_ms: flush_age_ms,
            max_quiet_ms: flush_age_ms.min(timeout_ms),
            max_total_bytes: config.ingest.max_buffered_bytes.as_usize(),
        },
        idle: IdlePolicy {
            mode: match config.idle.mode {
                config::IdleMode::Clock => IdleMode::WallClock,
                config::IdleMode::Hold => IdleMode::Hold,
            },
            timeout_ms,
            report_ttl_ms: REPORT_INTERVAL_MS as i64 * REPORTS_PER_TTL,
        },
        report_interval_ms: REPORT_INTERVAL_MS,
        drain_timeout_ms: drain_of_child(config.shutdown.drain.as_duration()).as_millis() as u64,
    }
}

/// Partitions that are added to a topic hold the watermark back after at most so long.
const METADATA_INTERVAL_MS: u64 = 30_000;
/// The stream's watermark is so old at most.
const REPORT_INTERVAL_MS: u64 = 1000;
/// A report counts until so many of its successors failed to come.
const REPORTS_PER_TTL: i64 = 30;

/// librdkafka's settings: the configured ones over the brokers' addresses.
pub fn kafka_properties(kafka: &config::Kafka) -> BTreeMap<String, String> {
    let brokers = [("bootstrap.servers".to_owned(), kafka.brokers.join(","))];
    let configured = kafka.properties.settings().map(|(key, value)| (key.to_owned(), value.to_owned()));
    brokers.into_iter().chain(configured).collect()
}
