//! The job file: all that a training process needs besides the object store.
//!
//! The controller writes it once for each start, the child reads it. A resumed start must compute what the
//! interrupted one would have, so everything that the result depends on is in [`TrainJob::recipe`], whose
//! hash the checkpoint carries; what may differ between starts (prefixes, attempts' numbers) is outside it.

use std::num::NonZeroUsize;

use serde::{Deserialize, Serialize};

pub use crate::eval::Ancestor;
use crate::model::EncoderSpec;
use crate::types::{EventTime, FileRef, PeriodId, TopicPartition, Version};

/// Major number of the job file's form: a reader refuses a newer one and ignores unknown fields.
pub const SCHEMA: u32 = 1;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainJob {
    pub schema: u32,
    pub pipeline: String,
    pub attempt: u32,
    pub start: u64,
    /// Where this start writes; nobody else does.
    pub output_prefix: String,
    /// Prefixes of earlier starts of the same attempt, newest first: their checkpoints are read only.
    pub earlier_prefixes: Vec<String>,
    /// `auto`, `cpu` or `cuda:N`.
    pub device: String,
    /// What the products of training are computed in; evaluation is f32 always.
    pub precision: PrecisionChoice,
    /// Frames whose activations are in memory at once, for encoders that don't normalise by the batch; none: the whole batch.
    #[serde(default)]
    pub micro_batch: Option<NonZeroUsize>,
    /// Threads for tensor operations; results are the same for equal counts.
    pub threads: usize,
    /// A checkpoint is written every so many steps.
    pub checkpoint_steps: u64,
    pub recipe: Recipe,
}

/// As configured: `auto` is bf16 where the device multiplies it faster, else f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrecisionChoice {
    Auto,
    F32,
    Bf16,
}

/// What the trained weights are a function of (with program version, machine, thread count, precision and micro-batch).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    pub period: PeriodId,
    pub period_end: EventTime,
    /// Seed of the whole attempt, a function of the configured seed, the period and the operator's retries.
    pub seed: u64,
    pub segments: Vec<SegmentInput>,
    /// Above it a deterministic sample by hash is kept.
    pub max_frames: u64,
    pub model: ModelSpec,
    /// `None`: the first period, plain SimCLR.
    pub teacher: Option<Teacher>,
    pub method: Method,
    /// Share of the teacher's weights in what is published, 0..1: after training, weights and running statistics of student and
    /// teacher are averaged, a straight line between two networks of which one was trained from the other (Wortsman et al.,
    /// *Robust fine-tuning of zero-shot models*, 2022).
    #[serde(default)]
    pub teacher_share: f64,
    pub optimisation: Optimisation,
    pub augmentation: Augmentation,
    #[serde(default = "Composition::as_they_came")]
    pub composition: Composition,
    pub probe: ProbeSpec,
    /// Probe sets of earlier periods that the candidate is measured on.
    pub probe_sets: Vec<ProbeInput>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SegmentInput {
    pub partition: TopicPartition,
    /// First offset of the flush that wrote it: the order of segments within a partition.
    pub flush_start: i64,
    pub file: FileRef,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    pub encoder: EncoderSpec,
    pub projector_hidden: usize,
    pub projector_dim: usize,
    /// Per channel, of pixels in 0..1.
    pub mean: [f32; 3],
    pub std: [f32; 3],
    /// Weights to start the first period from (an object or a local file, timm/torchvision names).
    pub init: Option<FileRef>,
}

/// The published version that the student starts from and is distilled from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Teacher {
    pub version: Version,
    pub encoder: FileRef,
    pub projector: FileRef,
}

/// What holds the student to its teacher. `lambda` weighs the distillation against NT-Xent, `tau_d` is its temperature.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum Method {
    /// Nothing does: the baseline that forgets.
    Finetune,
    /// NT-Xent between the student's and the teacher's projections.
    Lwf { lambda: f64, tau_d: f64 },
    /// As lwf, with a predictor between student and teacher.
    Cassle { lambda: f64, tau_d: f64, predictor_hidden: usize },
    /// The cosine between the student's and the teacher's features: a baseline of the benchmark.
    FeatureCosine { lambda: f64 },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Optimisation {
    /// NT-Xent's temperature.
    pub tau: f64,
    /// Frames a step (each gives two views).
    pub batch: usize,
    /// Steps at most; fewer if `max_epochs` epochs have fewer.
    pub steps: u64,
    pub max_epochs: u64,
    /// Peak learning rate, reached after the warm-up, then a cosine down to 0.
    pub learning_rate: f64,
    pub warmup_ratio: f64,
    pub weight_decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    /// Global L2 norm above which gradients are scaled down.
    pub clip_norm: f64,
}

/// SimCLR's augmentation. Ranges and probabilities; see `train/augment/`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Augmentation {
    /// Share of the frame's area that a crop keeps, smallest and largest.
    pub crop_scale: [f64; 2],
    pub flip_probability: f64,
    pub jitter_probability: f64,
    /// Strengths of brightness, contrast, saturation and hue.
    pub jitter: [f64; 4],
    pub grey_probability: f64,
    pub blur_probability: f64,
    /// Standard deviation of the blur in pixels of the output, smallest and largest.
    pub blur_sigma: [f64; 2],
}

/// Which frames are trained on, and which of them meet in a batch.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Composition {
    /// A batch takes at most one frame of a stream in each span of so many milliseconds, where there are streams enough; 0: as they come.
    pub spacing_ms: i64,
    /// Frames with the same bytes that are trained on.
    pub max_copies: u64,
    /// Frames whose thumbnails differ by at most this share of their contrast are alike: no negatives of each other, and
    /// one in a probe set keeps the other from being trained on. 0: only those with equal thumbnails.
    pub duplicate_distance: f64,
}

impl Method {
    /// Whether what is published is averaged with the teacher where the configuration says by how much: what is meant to show forgetting
    /// is left as it is.
    pub fn is_averaged(&self) -> bool {
        matches!(self, Method::Lwf { .. } | Method::Cassle { .. })
    }
}

impl Composition {
    /// Every frame is trained on, with whatever others; only frames with equal thumbnails are no negatives of each other.
    pub const AS_THEY_COME: Self = Self { spacing_ms: 0, max_copies: u64::MAX, duplicate_distance: 0.0 };

    /// What a job was composed by before it said so.
    fn as_they_came() -> Self {
        Self::AS_THEY_COME
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeSpec {
    /// Frames of one stream within one block of this length stay together.
    pub block_ms: i64,
    /// Frames closer than this to a block of the other side are in neither.
    pub guard_ms: i64,
    /// Share of blocks that go to the probe set.
    pub ratio: f64,
    /// Frames at most in a probe set.
    pub max_frames: u64,
    /// Neighbours of the kNN probe.
    pub k: usize,
    /// Resamples of the paired bootstrap over streams.
    pub bootstrap: usize,
}

/// An earlier period's probe set, with what older versions made of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeInput {
    pub period: PeriodId,
    pub file: FileRef,
    pub embeddings: Vec<KeptEmbedding>,
}

/// A version's embeddings of a probe set, kept at its publication: f32 `[frames, dimension]`, rows as in the set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KeptEmbedding {
    pub version: Version,
    pub role: Ancestor,
    pub file: FileRef,
}

/// Names of what a start writes below its prefix.
pub mod output {
    pub const JOB: &str = "job.json";
    pub const ENCODER: &str = "encoder.safetensors";
    pub const PROJECTOR: &str = "projector.safetensors";
    pub const CONFIG: &str = "config.json";
    pub const PROBE_SET: &str = "probe_set.parquet";
    /// The last one: it names all others with their hashes. A start without it did not finish.
    pub const OUTCOME: &str = "outcome.json";

    pub fn checkpoint(step: u64) -> String {
        format!("checkpoints/{step:08}.safetensors")
    }

    /// Embeddings of the period's own frames, in parts.
    pub fn embeddings(part: usize) -> String {
        format!("embeddings/{part:05}.parquet")
    }

    /// The candidate's embeddings of a period's probe set.
    pub fn probe_embeddings(period: crate::types::PeriodId) -> String {
        format!("probe_embeddings/{period}.safetensors")
    }
}

/// What a start that ran to its end left: every file, and what was learned about them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    pub schema: u32,
    /// Names relative to the start's prefix; those that are published and those that are not.
    pub files: Vec<FileRef>,
    pub evaluation: crate::eval::Evaluation,
    pub probe_frames: u64,
    pub train_frames: u64,
    /// Frames that are neither trained on nor probed with.
    #[serde(default)]
    pub left_out: LeftOut,
    pub steps: u64,
    pub seconds: f64,
    pub device: String,
    pub program_version: String,
    /// The attempt's seed and the recipe's settings (not its inputs), for the manifest.
    pub seed: u64,
    pub hyper_parameters: serde_json::Value,
}

/// Counts of frames that the split gives to training and that are not trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LeftOut {
    /// Because enough frames with the same bytes came before.
    pub copies: u64,
    /// Because a probe frame is like them.
    pub near_probe: u64,
}

/// One line on the child's standard output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Progress {
    /// Frames are being copied to the local scratch file.
    Loading {
        frames: u64,
    },
    Loaded {
        train_frames: u64,
        probe_frames: u64,
        steps: u64,
    },
    Resumed {
        step: u64,
    },
    Step {
        step: u64,
        steps: u64,
        total: f64,
        ntxent: f64,
        distillation: f64,
        learning_rate: f64,
        images_per_second: f64,
    },
    Checkpoint {
        step: u64,
    },
    Trained {
        step: u64,
    },
    Evaluating {
        period: PeriodId,
    },
    Finished,
    /// The last line of a start that could not go on; the exit code is not 0 then.
    Failed {
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::train::fixtures;

    /// A daemon of a newer build finds what a child of an older one left.
    #[test]
    fn jobs_and_outcomes_of_older_builds_are_read() {
        let mut job = serde_json::to_value(fixtures::job()).unwrap();
        assert!(job.as_object_mut().unwrap().remove("micro_batch").is_some());
        let recipe = job["recipe"].as_object_mut().unwrap();
        assert!(recipe.remove("teacher_share").is_some() && recipe.remove("composition").is_some());
        let TrainJob { recipe, .. } = serde_json::from_value(job).unwrap();
        assert_eq!((recipe.teacher_share, recipe.composition), (0.0, Composition::AS_THEY_COME));

        let outcome: Outcome = serde_json::from_value(json!({
            "schema": 1, "files": [], "probe_frames": 7,
            "evaluation": { "finite": true, "new_probe": null, "probes": [{
                "period": "19700101T000000Z", "frames": 8, "accuracies": { "knn": null, "linear": null, "few_shot": null },
                "shape": { "alignment": null, "uniformity": -2.0, "effective_rank": 20.0 },
                "drift": { "against": "v000001", "cka": 0.9, "neighbour_overlap": 0.7, "recoverability": null },
                "parent_loss": null, "best_loss": null,
            }] },
            "train_frames": 100, "steps": 3, "seconds": 1.5, "device": "cpu", "program_version": "0.1.0", "seed": 5,
            "hyper_parameters": Value::Null,
        }))
        .unwrap();
        assert_eq!(outcome.left_out, LeftOut::default());
        let probe = &outcome.evaluation.probes[0];
        assert_eq!((probe.drift.unwrap().neighbour_retention, probe.parent_retention), (None, None));
    }
}
